//! Who a process is to its cluster, by the files that it was given, as they are now.
//!
//! Whoever opens or accepts a connection asks for the settings then, and keeps them no longer than the
//! handshake takes.

use std::convert::Infallible;
use std::fmt;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::UnixTime;

pub use crate::date::Date;
use crate::files::{Contents, SetupError, TlsFiles};
use crate::renewal::Renewal;
use crate::settings::Settings;
pub use crate::settings::provider;

/// How often the files are looked at: three small ones, which are in memory unless they are new.
pub const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// One member of a cluster. Cheap to clone; all clones are renewed together.
#[derive(Clone)]
pub struct Identity {
    shared: Arc<Shared>,
}

struct Shared {
    files: TlsFiles,
    provider: Arc<CryptoProvider>,
    /// Locked to copy or replace it, and for nothing that takes time.
    settings: Mutex<Arc<Settings>>,
    /// Gone with the last clone, which ends the thread.
    _alive: Option<Sender<Infallible>>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Identity").field(&self.shared.files).finish()
    }
}

impl Identity {
    /// Reads the files, once. Whether peers will trust the certificate is [`Identity::check`]'s
    /// question.
    pub fn load(files: TlsFiles) -> Result<Self, SetupError> {
        Self::with_provider(files, &Arc::new(provider()))
    }

    /// As [`Identity::load`], with other ciphers. For tests of how keys are renewed.
    pub fn with_provider(
        files: TlsFiles,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self, SetupError> {
        Self::new(files, provider, None)
    }

    /// Reads the files, refuses a certificate that no peer would trust, and takes what the files hold
    /// later, until the last clone is dropped. [`crate::renewal`] says what the log is told.
    pub fn follow(files: TlsFiles) -> Result<Self, SetupError> {
        let (alive, is_over) = channel();
        let identity = Self::new(files, &Arc::new(provider()), Some(alive))?;
        identity.check()?;
        let mut renewal = Renewal::default();
        for news in renewal.begin(&identity, UnixTime::now()) {
            news.log();
        }
        let shared = Arc::downgrade(&identity.shared);
        // A thread, so that no connection waits for a disk; and a renewal that is of no use is known
        // when it comes, not when the next client does.
        thread::Builder::new()
            .name("step3rt-certs".to_owned())
            .spawn(move || follow(&shared, &is_over, renewal))
            .map_err(SetupError::NoThread)?;
        Ok(identity)
    }

    fn new(
        files: TlsFiles,
        provider: &Arc<CryptoProvider>,
        alive: Option<Sender<Infallible>>,
    ) -> Result<Self, SetupError> {
        let settings = Settings::new(&files, files.read()?, provider)?;
        let shared = Shared {
            files,
            provider: Arc::clone(provider),
            settings: Mutex::new(Arc::new(settings)),
            _alive: alive,
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// What the next connection is to begin with.
    pub fn settings(&self) -> Arc<Settings> {
        let settings = self.shared.settings.lock();
        Arc::clone(&settings.unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether peers will trust the certificate now.
    pub fn check(&self) -> Result<(), SetupError> {
        self.checked(&self.settings())
    }

    /// When the certificate (or its CA) expires, as far as that can be told.
    pub fn expiry(&self) -> Option<Date> {
        self.settings().expiry
    }

    /// Where it comes from.
    pub fn files(&self) -> &TlsFiles {
        &self.shared.files
    }

    /// Goes by `contents` of its files from now on. What peers would not trust is an error and changes
    /// nothing.
    pub(crate) fn renew(&self, contents: Contents) -> Result<(), SetupError> {
        let settings = Settings::new(&self.shared.files, contents, &self.shared.provider)?;
        self.checked(&settings)?;
        let present = self.shared.settings.lock();
        *present.unwrap_or_else(PoisonError::into_inner) = Arc::new(settings);
        Ok(())
    }

    fn checked(&self, settings: &Settings) -> Result<(), SetupError> {
        settings.judge().map_err(|fault| SetupError::Own {
            cert: self.shared.files.cert.clone(),
            fault,
        })
    }
}

/// Looks at the files again and again, while somebody uses what is made of them.
fn follow(shared: &Weak<Shared>, is_over: &Receiver<Infallible>, mut renewal: Renewal) {
    while is_over.recv_timeout(LOOK_INTERVAL) == Err(RecvTimeoutError::Timeout) {
        let Some(shared) = shared.upgrade() else {
            return;
        };
        for news in renewal.look(&Identity { shared }, UnixTime::now()) {
            news.log();
        }
    }
}
