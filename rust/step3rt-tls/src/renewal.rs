//! What becomes of files that change while a process uses them, and what an operator is told of it.
//!
//! Files that are of no use change nothing, however long they stay so. It never ends a connection.

use std::fmt;
use std::path::PathBuf;

use rustls::pki_types::UnixTime;

use crate::date::Date;
use crate::identity::{Identity, LOOK_INTERVAL};

/// How many days before the end of a certificate the log begins to say so.
pub const WARNED_DAYS: u64 = 14;

/// Something that an operator acts on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// New connections go by other files than before.
    Renewed {
        /// As configured.
        cert: PathBuf,
        /// When it expires.
        expiry: Option<Date>,
    },
    /// The files have changed, and cannot be used.
    Unusable {
        /// Why, and what to do.
        error: String,
        /// When what is used instead expires.
        expiry: Option<Date>,
    },
    /// The certificate in use has days left, or none.
    Ending {
        /// As configured.
        cert: PathBuf,
        /// When.
        expiry: Date,
        /// Whether that has passed.
        is_over: bool,
    },
    /// Every user of this host may read the key.
    OpenKey {
        /// As configured.
        key: PathBuf,
    },
}

impl News {
    /// Says it in the log.
    pub(crate) fn log(&self) {
        if matches!(self, Self::Renewed { .. }) {
            tracing::info!("{self}");
        } else {
            tracing::warn!("{self}");
        }
    }
}

impl fmt::Display for News {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let until = |expiry: &Option<Date>| {
            expiry.map_or_else(String::new, |date| format!(", which is valid until {date}"))
        };
        match self {
            Self::Renewed { cert, expiry } => {
                let (cert, until) = (cert.display(), until(expiry));
                write!(
                    f,
                    "new connections go by the renewed tls_cert = {cert}{until}"
                )
            }
            Self::Unusable { error, expiry } => write!(
                f,
                "the renewed TLS files cannot be used: {error}. New connections go by the certificate \
                 that was read before{}; the files are read again every {} s",
                until(expiry),
                LOOK_INTERVAL.as_secs()
            ),
            Self::Ending {
                cert,
                expiry,
                is_over,
            } => write!(
                f,
                "tls_cert = {} {} on {expiry}. Issue a new one; it needs no restart",
                cert.display(),
                if *is_over {
                    "is refused by peers: it expired"
                } else {
                    "expires"
                },
            ),
            Self::OpenKey { key } => {
                let key = key.display();
                write!(
                    f,
                    "every user of this host may read tls_key = {key}. Do: chmod o= {key}"
                )
            }
        }
    }
}

/// What was said already, from one look to the next.
#[derive(Debug, Default)]
pub struct Renewal {
    /// What is wrong with the files, since the last look at least.
    fault: Option<Fault>,
    /// The days that the certificate in use had left when that was said, and whether it was over.
    ending: Option<(u64, bool)>,
}

#[derive(Debug)]
struct Fault {
    error: String,
    is_said: bool,
}

impl Renewal {
    /// What is to be said of an identity at its start.
    pub fn begin(&mut self, identity: &Identity) -> Vec<News> {
        let ending = self.ending(identity, UnixTime::now());
        ending.into_iter().chain(open_key(identity)).collect()
    }

    /// Looks at the files, and renews the identity by what they hold if that is usable.
    pub fn look(&mut self, identity: &Identity) -> Vec<News> {
        let mut news = Vec::new();
        match identity.renew() {
            Ok(false) => self.fault = None,
            Ok(true) => {
                *self = Self::default();
                news.push(News::Renewed {
                    cert: identity.files().cert.clone(),
                    expiry: identity.expiry(),
                });
                news.extend(open_key(identity));
            }
            Err(error) => {
                if self.persists(error.to_string()) {
                    news.push(News::Unusable {
                        error: error.to_string(),
                        expiry: identity.expiry(),
                    });
                }
            }
        }
        news.extend(self.ending(identity, UnixTime::now()));
        news
    }

    /// Whether an error is there a second time. What the next look finds put right was a renewal under
    /// way, of which not all files had been replaced.
    fn persists(&mut self, error: String) -> bool {
        match &mut self.fault {
            Some(fault) if fault.error == error => !std::mem::replace(&mut fault.is_said, true),
            fault => {
                let is_said = false;
                *fault = Some(Fault { error, is_said });
                false
            }
        }
    }

    /// Says each day that the certificate in use ends soon, and once that it has.
    fn ending(&mut self, identity: &Identity, now: UnixTime) -> Option<News> {
        let expiry = identity.expiry()?;
        let is_over = expiry < Date::of(now);
        let days = expiry.days_after(now);
        if days >= WARNED_DAYS || self.ending.replace((days, is_over)) == Some((days, is_over)) {
            return None;
        }
        Some(News::Ending {
            cert: identity.files().cert.clone(),
            expiry,
            is_over,
        })
    }
}

fn open_key(identity: &Identity) -> Option<News> {
    let files = identity.files();
    files.key_is_readable_by_all().then(|| News::OpenKey {
        key: files.key.clone(),
    })
}
