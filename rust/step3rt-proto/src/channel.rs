//! Channels to a coordinator's control listener, in clear text or by TLS, and what went wrong.
//!
//! Opens connections; it never decides whether to try again.

use std::error::Error;
use std::io;
use std::sync::Arc;

use hyper_util::rt::TokioIo;
use step3rt_tls::{Fault, Identity};
use tokio::io::AsyncBufReadExt;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::pki_types::ServerName;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

/// Connects to `endpoint`. With `tls`, only to a coordinator of the same cluster whose certificate is
/// for the endpoint's host; but a Unix socket never leaves this one, and is not encrypted.
pub async fn connect(
    endpoint: &Endpoint,
    tls: Option<&Identity>,
) -> Result<Channel, tonic::transport::Error> {
    match tls {
        Some(identity) if endpoint.uri().scheme_str() != Some("unix") => {
            let identity = identity.clone();
            let open = move |uri| open(uri, Arc::clone(&identity.settings().control_client));
            endpoint.connect_with_connector(service_fn(open)).await
        }
        _ => endpoint.connect().await,
    }
}

async fn open(uri: Uri, config: Arc<ClientConfig>) -> io::Result<TokioIo<TlsStream<TcpStream>>> {
    let host = uri.host().unwrap_or_default();
    let host = host
        .trim_start_matches('[')
        .trim_end_matches(']')
        .to_owned();
    let port = uri.port_u16().unwrap_or_default();
    let socket = TcpStream::connect((host.as_str(), port)).await?;
    socket.set_nodelay(true)?;
    let name = ServerName::try_from(host)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    let mut stream = TlsConnector::from(config)
        .connect(name, socket)
        .await
        .map_err(in_our_words)?;
    // Whether the coordinator accepts this end's certificate is known with its first bytes, which it
    // sends at once (the settings of HTTP/2). Past this point an error's reason would be lost.
    match stream.fill_buf().await {
        Ok([]) => Err(untrusted(Fault::PeerLeft)),
        Ok(_) => Ok(TokioIo::new(stream)),
        Err(error) => Err(in_our_words(error)),
    }
}

/// The text of an error of TLS says what to do.
fn in_our_words(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => untrusted(Fault::PeerLeft),
        _ => match Fault::among_causes(&error) {
            Some(fault) => untrusted(fault),
            None => error,
        },
    }
}

fn untrusted(fault: Fault) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, fault)
}

/// What an error of a channel, or of a call by it, says about TLS; `None` when it is about something
/// else.
pub fn fault_of(error: &(dyn Error + 'static)) -> Option<Fault> {
    Fault::among_causes(error)
}
