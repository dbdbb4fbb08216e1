//! The listening sockets: the public one, which the service manager may hand over, the control one, and
//! one for metrics if it is asked for. And the file that tells where they are.
//!
//! It never accepts a connection.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::{fs, io, process};

use listenfd::ListenFd;
use thiserror::Error;

use crate::config::{ConfigError, CoordinatorConfig};

/// The bound sockets.
#[derive(Debug)]
pub struct Listeners {
    /// For clients.
    pub public: TcpListener,
    /// For instances.
    pub control: TcpListener,
    /// For collectors of metrics.
    pub metrics: Option<TcpListener>,
}

/// A socket or the ready file cannot be had.
#[derive(Debug, Error)]
pub enum ListenError {
    /// The address is not usable.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The operating system refuses.
    #[error(
        "{key} = {address} cannot be bound: {source}. Stop what listens there, or choose another port"
    )]
    Bind {
        /// The configuration key.
        key: &'static str,
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The service manager's socket is of no use.
    #[error("the socket that the service manager passed is not usable: {0}. Check the socket unit")]
    Activation(io::Error),
    /// The ready file cannot be written.
    #[error(
        "ready_file = {path} cannot be written: {source}. Choose a path in a writable directory"
    )]
    ReadyFile {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Listeners {
    /// Binds them, and takes the public one from the service manager if it passed one.
    pub fn bind(config: &CoordinatorConfig) -> Result<Self, ListenError> {
        let activated = ListenFd::from_env()
            .take_tcp_listener(0)
            .map_err(ListenError::Activation)?;
        let public = if let Some(listener) = activated {
            let address = listener.local_addr().map_err(ListenError::Activation)?;
            config.check_bind("the socket unit's address", address)?;
            listener
        } else {
            bind("listen", config.listen_address()?)?
        };
        let control = bind("control_listen", config.control_listen_address()?)?;
        let metrics = config.metrics_listen_address()?;
        let metrics = metrics.map(|address| bind("metrics_listen", address));
        let metrics = metrics.transpose()?;
        for listener in [&public, &control].into_iter().chain(&metrics) {
            listener
                .set_nonblocking(true)
                .map_err(ListenError::Activation)?;
        }
        Ok(Self {
            public,
            control,
            metrics,
        })
    }

    /// Where clients connect.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.public.local_addr()
    }

    /// Where instances connect.
    pub fn control_address(&self) -> io::Result<SocketAddr> {
        self.control.local_addr()
    }

    /// Where metrics are, if anywhere.
    pub fn metrics_address(&self) -> io::Result<Option<SocketAddr>> {
        self.metrics
            .as_ref()
            .map(TcpListener::local_addr)
            .transpose()
    }
}

fn bind(key: &'static str, address: SocketAddr) -> Result<TcpListener, ListenError> {
    TcpListener::bind(address).map_err(|source| ListenError::Bind {
        key,
        address,
        source,
    })
}

/// A file that tells where the sockets are, while this value lives.
#[derive(Debug)]
pub struct ReadyFile(PathBuf);

impl ReadyFile {
    /// Writes `{"address","control_address","metrics_address","pid"}` so that a reader sees all of it or
    /// nothing.
    pub fn write(
        path: PathBuf,
        address: SocketAddr,
        control_address: SocketAddr,
        metrics_address: Option<SocketAddr>,
    ) -> Result<Self, ListenError> {
        let text = serde_json::json!({
            "address": address.to_string(),
            "control_address": control_address.to_string(),
            "metrics_address": metrics_address.map(|address| address.to_string()),
            "pid": process::id(),
        })
        .to_string();
        let mut unfinished = path.as_os_str().to_owned();
        unfinished.push(format!(".{}", process::id()));
        let written = fs::write(&unfinished, text).and_then(|()| fs::rename(&unfinished, &path));
        if let Err(source) = written {
            let _ = fs::remove_file(&unfinished); // what is there of it
            return Err(ListenError::ReadyFile { path, source });
        }
        Ok(Self(path))
    }
}

impl Drop for ReadyFile {
    fn drop(&mut self) {
        // It may be gone already; it only must not stay.
        let _ = fs::remove_file(&self.0);
    }
}
