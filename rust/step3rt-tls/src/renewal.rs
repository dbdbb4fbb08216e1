//! What becomes of files that change while a process uses them, and what an operator is told of it.
//!
//! Files that are of no use change nothing, however long they stay so. It never ends a connection.

use std::fmt;
use std::path::PathBuf;

use rustls::pki_types::UnixTime;

use crate::date::Date;
use crate::files::Contents;
use crate::identity::Identity;

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
                 that was read before{}; the files are read again until they can",
                until(expiry)
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

/// What was found and said already, from one look to the next.
#[derive(Default)]
pub struct Renewal {
    pending: Option<Pending>,
    /// The days that the certificate in use had left when that was said, and whether it was over.
    ending: Option<(u64, bool)>,
}

/// Files that differ from what is in use.
struct Pending {
    found: Result<Contents, String>,
    /// What was said to be wrong with them.
    said: Option<String>,
}

impl Renewal {
    /// What is to be said of an identity at its start.
    pub fn begin(&mut self, identity: &Identity, now: UnixTime) -> Vec<News> {
        let ending = self.ending(identity, now);
        ending.into_iter().chain(open_key(identity)).collect()
    }

    /// Looks at the files. What two looks in succession find is meant: the identity is renewed by it if
    /// it is usable. What the next look no longer finds was a renewal under way, with a file half
    /// written or not all of them replaced.
    pub fn look(&mut self, identity: &Identity, now: UnixTime) -> Vec<News> {
        // By content: no file system's times are precise enough to tell a file that is half written
        // from the whole one, and any way to replace files will do, links to other ones included.
        let found = identity.files().read().map_err(|error| error.to_string());
        let is_in_use = |contents: &Contents| contents == identity.settings().contents();
        let mut news = Vec::new();
        match &mut self.pending {
            _ if found.as_ref().is_ok_and(is_in_use) => self.pending = None,
            Some(pending) if pending.found == found => {
                let renewed = found.and_then(|contents| {
                    let renewed = identity.renew(contents);
                    renewed.map_err(|error| error.to_string())
                });
                match renewed {
                    Ok(()) => {
                        *self = Self::default();
                        news.push(News::Renewed {
                            cert: identity.files().cert.clone(),
                            expiry: identity.expiry(),
                        });
                        news.extend(open_key(identity));
                    }
                    Err(error) => news.extend(pending.unusable(error, identity)),
                }
            }
            pending => *pending = Some(Pending { found, said: None }),
        }
        news.extend(self.ending(identity, now));
        news
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

impl Pending {
    /// Says what is wrong, unless that was said.
    fn unusable(&mut self, error: String, identity: &Identity) -> Option<News> {
        if self.said.as_ref() == Some(&error) {
            return None;
        }
        self.said = Some(error.clone());
        Some(News::Unusable {
            error,
            expiry: identity.expiry(),
        })
    }
}

fn open_key(identity: &Identity) -> Option<News> {
    let files = identity.files();
    files.key_is_readable_by_all().then(|| News::OpenKey {
        key: files.key.clone(),
    })
}
