//! The registry under random histories: what must hold after every event.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

const EP_SIZE: u32 = 2;
const LEASE_MS: u64 = 100;

#[derive(Clone, Debug)]
enum Happening {
    Hello(bool),
    Ready(usize),
    LinksReady(usize, u64),
    PeerLost(usize, usize, bool),
    Heartbeat(usize, u64),
    Leaving(usize),
    Ended(usize),
    Wait(u64),
    Expire,
}

fn happening() -> impl Strategy<Value = Happening> {
    let who = 0_usize..6;
    prop_oneof![
        3 => any::<bool>().prop_map(Happening::Hello),
        4 => who.clone().prop_map(Happening::Ready),
        6 => (who.clone(), 0_u64..3).prop_map(|(who, age)| Happening::LinksReady(who, age)),
        1 => (who.clone(), who.clone(), any::<bool>())
            .prop_map(|(who, peer, is_stale)| Happening::PeerLost(who, peer, is_stale)),
        3 => (who.clone(), 0_u64..2_000).prop_map(|(who, age)| Happening::Heartbeat(who, age)),
        1 => who.clone().prop_map(Happening::Leaving),
        2 => who.prop_map(Happening::Ended),
        3 => (0_u64..60).prop_map(Happening::Wait),
        2 => Just(Happening::Expire),
    ]
}

/// Chance seldom builds a cluster that serves, so every history begins with one.
fn serving() -> Vec<Happening> {
    let hellos = [false, false, true, true].map(Happening::Hello);
    let ready = (0..4).map(Happening::Ready);
    let links = (2..4).map(|who| Happening::LinksReady(who, 0));
    hellos.into_iter().chain(ready).chain(links).collect()
}

/// What the drive loop and the scheduler believe, from the actions alone.
#[derive(Default)]
struct Believer {
    schedulable: BTreeSet<InstanceId>,
    are_experts_complete: bool,
    version: u64,
    closed: BTreeSet<InstanceId>,
    epochs: BTreeMap<InstanceId, Epoch>,
}

impl Believer {
    fn carry_out(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::AnnounceTopology(topology) => {
                    assert!(topology.version > self.version, "versions rise");
                    self.version = topology.version;
                }
                Action::AttentionReady {
                    instance, epoch, ..
                } => {
                    assert!(self.are_experts_complete, "nobody is used without experts");
                    assert!(self.schedulable.insert(instance), "ready once");
                    assert_eq!(self.epochs.get(&instance), Some(&epoch));
                }
                Action::AttentionLost(instance) => {
                    assert!(self.schedulable.remove(&instance), "lost after ready");
                }
                Action::ExpertsComplete(are_complete) => {
                    assert_ne!(are_complete, self.are_experts_complete, "told on change");
                    self.are_experts_complete = are_complete;
                }
                Action::CloseSession { instance, .. } => {
                    assert!(self.closed.insert(instance), "closed once");
                }
            }
        }
    }

    fn check(&self, registry: &Registry) {
        let ranks: Vec<_> = registry
            .instances
            .values()
            .filter(|entry| entry.role == Role::Ffn)
            .map(|entry| entry.role_rank)
            .collect();
        let distinct: BTreeSet<_> = ranks.iter().collect();
        assert_eq!(ranks.len(), distinct.len(), "a rank has one owner");
        assert!(ranks.iter().all(|rank| *rank < EP_SIZE));
        for instance in &self.schedulable {
            assert!(
                registry.instances.contains_key(instance),
                "no ghost is used"
            );
        }
        assert!(
            self.closed
                .iter()
                .all(|gone| !registry.instances.contains_key(gone)),
            "closed is gone"
        );
        if registry.is_serving() {
            assert!(self.are_experts_complete && !self.schedulable.is_empty());
        }
    }
}

fn apply(registry: &mut Registry, believer: &mut Believer, now: &mut TimeNs, event: &Happening) {
    let known: Vec<_> = registry.instances.keys().copied().collect();
    // Sometimes nobody: messages of the dead arrive, too.
    let pick = |who: usize| known.get(who).copied().unwrap_or(InstanceId(u32::MAX));
    let actions = match *event {
        Happening::Hello(is_attention) => {
            let role = if is_attention {
                v1::Role::Attention
            } else {
                v1::Role::Ffn
            };
            let hello = v1::Hello {
                protocol_version: step3rt_proto::PROTOCOL_VERSION,
                role: role.into(),
                model: Some(v1::ModelSummary {
                    vocab_size: 10,
                    max_model_len: 10,
                    ..Default::default()
                }),
                ..Default::default()
            };
            if let Ok(admission) = registry.hello(*now, hello) {
                let previous = believer.epochs.insert(admission.instance, admission.epoch);
                assert_eq!(previous, None, "numbers are never used twice");
            }
            Vec::new()
        }
        Happening::Ready(who) => {
            let ready = v1::Ready {
                num_kv_blocks: 4,
                ..Default::default()
            };
            registry.ready(pick(who), ready)
        }
        Happening::LinksReady(who, age) => {
            let links = v1::LinksReady {
                topology_version: believer.version.saturating_sub(age),
                ..Default::default()
            };
            registry.links_ready(pick(who), links)
        }
        Happening::PeerLost(who, peer, is_stale) => {
            let epoch = believer.epochs.get(&pick(peer)).map_or(0, |epoch| epoch.0);
            let lost = v1::PeerLost {
                instance_id: pick(peer).0,
                epoch: epoch.saturating_sub(u64::from(is_stale)),
                ..Default::default()
            };
            registry.peer_lost(pick(who), &lost)
        }
        Happening::Heartbeat(who, last_progress_age_ms) => {
            registry.renew(*now, pick(who));
            let heartbeat = v1::Heartbeat {
                last_progress_age_ms,
                ..Default::default()
            };
            registry.heartbeat(pick(who), heartbeat)
        }
        Happening::Leaving(who) => registry.leaving(pick(who)),
        Happening::Ended(who) => registry.session_ended(pick(who)),
        Happening::Wait(ms) => {
            *now = now.plus_ms(ms);
            Vec::new()
        }
        Happening::Expire => {
            let actions = registry.expire(*now);
            assert!(registry.next_timer().is_none_or(|timer| timer > *now));
            actions
        }
    };
    believer.carry_out(actions);
}

proptest! {
    #[test]
    fn what_the_scheduler_is_told_is_consistent_whatever_happens(
        history in prop::collection::vec(happening(), 1..120),
    ) {
        let mut registry = Registry::new(RegistryConfig {
            ep_size: EP_SIZE,
            num_attention: 1,
            lease_ms: LEASE_MS,
            max_standstill_ms: 1_000,
            max_unlinked_ms: 150,
            vocab_size: 10,
            max_model_len: 10,
            first_epoch: 1,
        });
        let (mut believer, mut now) = (Believer::default(), TimeNs(0));
        for event in serving().iter().chain(&history) {
            apply(&mut registry, &mut believer, &mut now, event);
            believer.check(&registry);
        }
    }
}
