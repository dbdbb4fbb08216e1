//! Connections to a listener, in clear text or after their TLS handshake.
//!
//! Handshakes run beside each other and against a deadline, so that one that dawdles keeps nobody
//! out. It knows nothing of what a connection is used for.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use step3rt_tls::settings::Settings;
use step3rt_tls::{FIRST_BYTE, Fault, Identity};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Sleep, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use tonic::codegen::http::{HeaderValue, Response};
use tonic::transport::server::Connected;
use tracing::{debug, info, warn};

use crate::receiving::ConnectionBudget;

/// How long a handshake may take, and what a connection begins with after it. It takes milliseconds, and
/// two journeys to the client and back.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// What every client of HTTP/2 begins with (RFC 9113, 3.4). From then on it is probed.
const PREFACE_BYTES: usize = 24;

/// Handshakes at one time; more connections wait in the listener's backlog.
const MAX_HANDSHAKES: usize = 1024;

/// Connections that wait for the server to take them, which it does at once.
const MAX_READY: usize = 64;

/// How long accepting rests after it failed, as when descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long a client that speaks plain HTTP/2 has to call, and to read why it is refused.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(2);

/// A listener's settings.
#[derive(Clone)]
pub(crate) struct Security {
    /// Who this end is, when a connection comes.
    pub(crate) identity: Identity,
    /// Which of its settings this listener goes by.
    pub(crate) config: fn(&Settings) -> &Arc<ServerConfig>,
    /// What a client is told that does not speak it.
    pub(crate) advice: &'static str,
}

/// An accepted connection.
pub(crate) struct Connection {
    stream: Stream,
    preface: Option<Preface>,
    /// Bytes of its requests that may be held.
    budget: ConnectionBudget,
}

enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// What the server waits for before it can find out by itself that nobody is there.
struct Preface {
    num_bytes_to_come: usize,
    too_late: Pin<Box<Sleep>>,
}

impl Connection {
    fn new(stream: Stream) -> Self {
        let preface = Preface {
            num_bytes_to_come: PREFACE_BYTES,
            too_late: Box::pin(sleep(HANDSHAKE_TIMEOUT)),
        };
        Self {
            stream,
            preface: Some(preface),
            budget: ConnectionBudget::default(),
        }
    }
}

/// The connections of `listener`, until the result is dropped.
pub(crate) fn incoming(
    listener: std::net::TcpListener,
    security: Option<Security>,
) -> io::Result<ReceiverStream<io::Result<Connection>>> {
    let listener = TcpListener::from_std(listener)?;
    let (ready, connections) = mpsc::channel(MAX_READY);
    let handshakes = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    tokio::spawn(async move {
        tokio::select! {
            () = ready.closed() => {}
            () = accept(&listener, security, &handshakes, &ready) => {}
        }
    });
    Ok(ReceiverStream::new(connections))
}

type Ready = mpsc::Sender<io::Result<Connection>>;

async fn accept(
    listener: &TcpListener,
    security: Option<Security>,
    handshakes: &Arc<Semaphore>,
    ready: &Ready,
) {
    loop {
        let Ok(permit) = Arc::clone(handshakes).acquire_owned().await else {
            return;
        };
        let (socket, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "connections cannot be accepted now");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // Tokens are small packets that must not wait for each other.
        if let Err(error) = socket.set_nodelay(true) {
            debug!(%peer, %error, "a connection was over before it began");
            continue;
        }
        let Some(security) = security.clone() else {
            // Refused when the server is gone.
            let _ = ready.send(Ok(Connection::new(Stream::Plain(socket)))).await;
            continue;
        };
        tokio::spawn(shake_hands(socket, peer, (security, permit), ready.clone()));
    }
}

async fn shake_hands(
    socket: TcpStream,
    peer: SocketAddr,
    (security, _permit): (Security, OwnedSemaphorePermit),
    ready: Ready,
) {
    match timeout(HANDSHAKE_TIMEOUT, secure(socket, &security)).await {
        Ok(Ok(Some(stream))) => {
            let connection = Connection::new(Stream::Tls(Box::new(stream)));
            let _ = ready.send(Ok(connection)).await;
        }
        Ok(Ok(None)) => info!(%peer, "a client was refused: it does not speak TLS"),
        Ok(Err(error)) => {
            if let Some(fault) = Fault::among_causes(&error) {
                info!(%peer, %fault, "a client was refused");
            } else {
                debug!(%peer, %error, "a client went away during its TLS handshake");
            }
        }
        Err(_) => info!(%peer, "a client was hung up on: its TLS handshake took too long"),
    }
}

/// `None` for a client that speaks something else, which was told so.
async fn secure(
    socket: TcpStream,
    security: &Security,
) -> io::Result<Option<TlsStream<TcpStream>>> {
    let mut first = [0];
    if socket.peek(&mut first).await? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    if first[0] != FIRST_BYTE {
        // It may be gone already.
        let _ = timeout(REFUSAL_TIMEOUT, refuse(socket, security.advice)).await;
        return Ok(None);
    }
    let config = Arc::clone((security.config)(&security.identity.settings()));
    let acceptor = TlsAcceptor::from(config);
    acceptor.accept(socket).await.map(Some)
}

/// Answers every call that a client in clear text makes with why it is not served.
async fn refuse(socket: TcpStream, advice: &'static str) -> Result<(), h2::Error> {
    let mut calls = h2::server::handshake(socket).await?;
    while let Some(call) = calls.accept().await {
        let (_, mut answer) = call?;
        let mut response = Response::new(());
        let headers = response.headers_mut();
        headers.insert("content-type", HeaderValue::from_static("application/grpc"));
        headers.insert(
            "grpc-status",
            HeaderValue::from(Code::FailedPrecondition as i32),
        );
        // Only characters that gRPC does not escape.
        headers.insert("grpc-message", HeaderValue::from_static(advice));
        answer.send_response(response, true)?;
        calls.graceful_shutdown();
    }
    Ok(())
}

impl Connected for Connection {
    type ConnectInfo = ConnectionBudget;

    fn connect_info(&self) -> ConnectionBudget {
        self.budget.clone()
    }
}

impl Preface {
    /// Whether it has come; an error when it comes too late.
    fn poll(&mut self, num_bytes: usize, context: &mut Context<'_>) -> io::Result<bool> {
        self.num_bytes_to_come = self.num_bytes_to_come.saturating_sub(num_bytes);
        if self.num_bytes_to_come > 0 && self.too_late.as_mut().poll(context).is_ready() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(self.num_bytes_to_come == 0)
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let num_before = buffer.filled().len();
        let polled = match &mut this.stream {
            Stream::Plain(socket) => Pin::new(socket).poll_read(context, buffer),
            Stream::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        };
        if let Some(preface) = &mut this.preface
            && preface.poll(buffer.filled().len() - num_before, context)?
        {
            this.preface = None;
        }
        polled
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().stream {
            Stream::Plain(socket) => Pin::new(socket).poll_write(context, bytes),
            Stream::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Stream::Plain(socket) => Pin::new(socket).poll_flush(context),
            Stream::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Stream::Plain(socket) => Pin::new(socket).poll_shutdown(context),
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().stream {
            Stream::Plain(socket) => Pin::new(socket).poll_write_vectored(context, buffers),
            Stream::Tls(stream) => Pin::new(stream).poll_write_vectored(context, buffers),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Stream::Plain(socket) => socket.is_write_vectored(),
            Stream::Tls(stream) => stream.is_write_vectored(),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::time::Instant;

    use super::*;

    async fn connected() -> (TcpStream, Connection) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (socket, _) = accepted.expect("accepted");
        (
            client.expect("connects"),
            Connection::new(Stream::Plain(socket)),
        )
    }

    #[tokio::test(start_paused = true)]
    async fn who_connects_and_does_not_begin_is_hung_up_on() {
        for num_sent in [0, PREFACE_BYTES - 1] {
            let (mut client, mut connection) = connected().await;
            client.write_all(&vec![1; num_sent]).await.expect("sent");
            let begun = Instant::now();
            let mut received = vec![0; PREFACE_BYTES];
            let error = connection
                .read_exact(&mut received)
                .await
                .expect_err("late");
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            assert_eq!(begun.elapsed().as_secs(), HANDSHAKE_TIMEOUT.as_secs());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_begun_may_be_silent() {
        let (mut client, mut connection) = connected().await;
        client.write_all(&[1; PREFACE_BYTES]).await.expect("sent");
        let mut received = vec![0; PREFACE_BYTES];
        let read = connection.read_exact(&mut received).await;
        assert_eq!(read.expect("in time"), PREFACE_BYTES);
        let more = timeout(10 * HANDSHAKE_TIMEOUT, connection.read_u8()).await;
        assert!(more.is_err(), "nothing comes, and nobody minds");
    }
}
