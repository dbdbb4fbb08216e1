//! When the links of an attention instance are dialled, and again: at once, then after longer and longer.
//!
//! An FFN instance dials nobody; its links are awaited.

use std::time::{Duration, Instant};

use step3rt_fabric::contract::LinkIdentity;

use super::{LinkNews, LinkState, Links};
use crate::options::Role;

/// First and longest pause between attempts to link to a peer that the topology names.
const FIRST_RETRY: Duration = Duration::from_millis(50);
const LONGEST_RETRY: Duration = Duration::from_secs(2);

impl LinkState {
    /// Of a link that is to be made from now on.
    pub(super) fn begin(role: Role, now: Instant) -> Self {
        match role {
            Role::Attention => Self::Wanted {
                at: now,
                pause: FIRST_RETRY,
            },
            Role::Ffn => Self::Awaited,
        }
    }
}

impl Links {
    /// When the next attempt to connect is due.
    pub fn next_attempt(&self) -> Option<Instant> {
        self.peers
            .values()
            .filter_map(|state| match state.link {
                LinkState::Wanted { at, .. } => Some(at),
                _ => None,
            })
            .min()
    }

    /// Threads of the fabric dial, so that a peer that is out of reach holds up nobody else.
    pub(super) fn dial_due(&mut self, now: Instant, out: &mut LinkNews) {
        let mut failed = Vec::new();
        for state in self.peers.values_mut() {
            let LinkState::Wanted { at, pause } = state.link else {
                continue;
            };
            let Some(peer) = self.topology.find(state.identity) else {
                continue;
            };
            if at > now {
                continue;
            }
            state.link = LinkState::Dialling { pause };
            let address = peer.address.clone();
            let dialled = match &state.reset {
                Some(reason) => self.endpoint.dial_again(address, reason),
                None => self.endpoint.dial(address),
            };
            if let Err(error) = dialled {
                failed.push((state.identity, error.to_string()));
            }
        }
        for (peer, reason) in failed {
            self.retry(peer, &reason, out);
        }
    }

    /// Notes that a peer could not be linked, and wants it again after a pause.
    pub(super) fn retry(&mut self, peer: LinkIdentity, reason: &str, out: &mut LinkNews) {
        let instance = peer.instance;
        let Some(state) = self.peers.get_mut(&instance) else {
            return;
        };
        if let LinkState::Dialling { pause } = state.link
            && state.identity == peer
        {
            tracing::warn!(peer = instance.0, reason, "cannot link; trying again");
            out.status = Some(format!("cannot link to FFN instance {instance}: {reason}"));
            state.link = LinkState::Wanted {
                at: Instant::now() + pause,
                pause: (pause * 2).min(LONGEST_RETRY),
            };
        }
    }
}
