//! The registry against histories of joins, losses and lies.

mod links;
mod losses;

use super::*;

const LEASE_MS: u64 = 1_000;

fn registry(ep_size: u32, num_attention: u32) -> Registry {
    Registry::new(RegistryConfig {
        ep_size,
        num_attention,
        lease_ms: LEASE_MS,
        max_standstill_ms: 5_000,
        max_unlinked_ms: 3_000,
        vocab_size: 100,
        max_model_len: 64,
        first_epoch: 7,
    })
}

pub(super) fn hello(role: v1::Role) -> v1::Hello {
    v1::Hello {
        protocol_version: step3rt_proto::PROTOCOL_VERSION,
        role: role.into(),
        model_fingerprint: "f".to_owned(),
        model: Some(v1::ModelSummary {
            name: "m".to_owned(),
            vocab_size: 100,
            max_model_len: 64,
            ..Default::default()
        }),
        ..Default::default()
    }
}

pub(super) fn join(registry: &mut Registry, role: v1::Role) -> Admission {
    registry
        .hello(TimeNs(0), hello(role))
        .expect("nothing speaks against it")
}

pub(super) fn ready(num_kv_blocks: u32) -> v1::Ready {
    v1::Ready {
        num_kv_blocks,
        ..Default::default()
    }
}

pub(super) fn links(topology_version: u64) -> v1::LinksReady {
    v1::LinksReady {
        topology_version,
        ..Default::default()
    }
}

/// Actions without the topologies, which follow every change.
pub(super) fn decisions(actions: Vec<Action>) -> Vec<Action> {
    actions
        .into_iter()
        .filter(|action| !matches!(action, Action::AnnounceTopology(_)))
        .collect()
}

fn attention_ready(admission: Admission) -> Action {
    Action::AttentionReady {
        instance: admission.instance,
        epoch: admission.epoch,
        num_kv_blocks: 8,
    }
}

/// One instance of each role, linked.
pub(super) fn serving() -> (Registry, Admission, Admission) {
    let mut registry = registry(1, 1);
    let attention = join(&mut registry, v1::Role::Attention);
    let ffn = join(&mut registry, v1::Role::Ffn);
    registry.ready(attention.instance, ready(8));
    registry.ready(ffn.instance, ready(0));
    let version = registry.topology().version;
    registry.links_ready(attention.instance, links(version));
    assert!(registry.is_serving());
    (registry, attention, ffn)
}

#[test]
fn ffn_ranks_are_handed_out_lowest_free_first_and_run_out() {
    let mut registry = registry(3, 1);
    let ranks: Vec<_> = (0..3).map(|_| join(&mut registry, v1::Role::Ffn)).collect();
    assert_eq!(
        ranks.iter().map(|a| a.role_rank).collect::<Vec<_>>(),
        [0, 1, 2]
    );
    assert_eq!(
        registry.hello(TimeNs(0), hello(v1::Role::Ffn)),
        Err(HelloError::NoFreeRank { ep_size: 3 })
    );
    registry.session_ended(ranks[1].instance);
    assert_eq!(join(&mut registry, v1::Role::Ffn).role_rank, 1);
}

#[test]
fn instance_numbers_and_epochs_are_never_used_twice() {
    let mut registry = registry(1, 1);
    let first = join(&mut registry, v1::Role::Ffn);
    registry.session_ended(first.instance);
    let second = join(&mut registry, v1::Role::Ffn);
    assert_eq!((first.epoch, second.epoch), (Epoch(7), Epoch(8)));
    assert!(second.instance > first.instance);
}

#[test]
fn peers_and_operators_see_what_instances_have_told() {
    let mut registry = registry(1, 1);
    assert_eq!(registry.model_fingerprint(), "");
    assert_eq!(registry.vocab_size(), 100);
    let attention = join(&mut registry, v1::Role::Attention);
    let ffn = join(&mut registry, v1::Role::Ffn);
    assert_eq!(registry.model_fingerprint(), "f");
    let status = "waiting for instances: 0 of 1 attention linked, 0 of 1 FFN ready, 2 loading";
    assert_eq!(registry.status(), status);

    let addresses = vec![v1::DataAddress {
        address: "10.0.0.1:7".to_owned(),
        ..Default::default()
    }];
    registry.ready(attention.instance, ready(8));
    let status = "waiting for instances: 0 of 1 attention linked, 0 of 1 FFN ready, 1 loading";
    assert_eq!(registry.status(), status);
    registry.ready(
        ffn.instance,
        v1::Ready {
            addresses: addresses.clone(),
            ..Default::default()
        },
    );
    let topology = registry.topology();
    let peer = topology
        .peers
        .iter()
        .find(|p| p.instance_id == ffn.instance.0);
    assert_eq!(peer.expect("it is ready").addresses, addresses);

    let made = vec![v1::LinkInfo {
        peer_instance_id: ffn.instance.0,
        ..Default::default()
    }];
    let links = v1::LinksReady {
        topology_version: topology.version,
        links: made.clone(),
    };
    registry.links_ready(attention.instance, links);
    let beat = v1::Heartbeat {
        status: "well".to_owned(),
        ..Default::default()
    };
    registry.heartbeat(attention.instance, beat);
    let status = "serving: 1 of 1 attention linked, 1 of 1 FFN ready, 0 loading";
    assert_eq!(registry.status(), status);
    let seen = registry.instances();
    let told = seen
        .iter()
        .map(|info| (&info.status[..], &info.links[..], &info.state[..]));
    let expected = [("well", &made[..], "ready"), ("", &[], "ready")];
    assert!(told.eq(expected), "{seen:?}");
}

#[test]
fn the_first_instance_fixes_the_model_until_the_last_leaves() {
    let mut registry = registry(1, 1);
    let first = join(&mut registry, v1::Role::Attention);
    let other = v1::Hello {
        model_fingerprint: "g".to_owned(),
        ..hello(v1::Role::Ffn)
    };
    let refused = registry.hello(TimeNs(0), other.clone());
    assert!(matches!(refused, Err(HelloError::OtherModel { .. })));
    let mut longer = hello(v1::Role::Ffn);
    longer.model.as_mut().expect("set").max_model_len = 65;
    let refused = registry.hello(TimeNs(0), longer);
    assert!(matches!(refused, Err(HelloError::OtherModel { .. })));
    registry.session_ended(first.instance);
    assert!(registry.hello(TimeNs(0), other).is_ok());
}

#[test]
fn one_model_may_lie_in_directories_of_different_names() {
    let mut registry = registry(1, 1);
    join(&mut registry, v1::Role::Attention);
    let mut elsewhere = hello(v1::Role::Ffn);
    elsewhere.model.as_mut().expect("set").name = "elsewhere".to_owned();
    assert!(registry.hello(TimeNs(0), elsewhere).is_ok());
}

#[test]
fn what_contradicts_the_coordinators_checkpoint_is_refused() {
    let mut registry = registry(1, 1);
    let mut short = hello(v1::Role::Attention);
    short.model.as_mut().expect("set").max_model_len = 63;
    let no_model = v1::Hello {
        model: None,
        ..hello(v1::Role::Attention)
    };
    assert_eq!(
        registry.hello(TimeNs(0), short),
        Err(HelloError::OtherLimits {
            key: "max_model_len",
            found: 63,
            expected: 64
        })
    );
    assert_eq!(
        registry.hello(TimeNs(0), no_model),
        Err(HelloError::NoModel)
    );
    let mut other_ids = hello(v1::Role::Attention);
    other_ids.model.as_mut().expect("set").vocab_size = 101;
    assert_eq!(
        registry.hello(TimeNs(0), other_ids),
        Err(HelloError::OtherLimits {
            key: "vocab_size",
            found: 101,
            expected: 100
        })
    );
    let found = step3rt_proto::PROTOCOL_VERSION + 1;
    let of_a_later_build = v1::Hello {
        protocol_version: found,
        ..hello(v1::Role::Attention)
    };
    assert_eq!(
        registry.hello(TimeNs(0), of_a_later_build),
        Err(HelloError::ProtocolVersion { found })
    );
}

#[test]
fn attention_without_kv_blocks_and_a_second_ready_are_refused() {
    let (mut registry, _attention, ffn) = serving();
    let empty = join(&mut registry, v1::Role::Attention);
    let actions = registry.ready(empty.instance, ready(0));
    assert!(matches!(actions.as_slice(), [Action::CloseSession { .. }]));
    let actions = decisions(registry.ready(ffn.instance, ready(0)));
    assert!(matches!(actions.first(), Some(Action::CloseSession { .. })));
}

#[test]
fn a_draining_cluster_admits_nobody() {
    let (mut registry, _attention, _ffn) = serving();
    registry.drain();
    assert!(!registry.is_serving());
    let refused = registry.hello(TimeNs(0), hello(v1::Role::Attention));
    assert_eq!(refused, Err(HelloError::Draining));
    assert!(registry.status().starts_with("draining"));
}

#[test]
fn messages_of_unknown_instances_have_no_effect() {
    let (mut registry, _attention, _ffn) = serving();
    let nobody = InstanceId(99);
    registry.renew(TimeNs(5), nobody);
    assert_eq!(registry.ready(nobody, ready(8)), []);
    assert_eq!(registry.links_ready(nobody, links(1)), []);
    assert_eq!(registry.leaving(nobody), []);
    assert_eq!(registry.session_ended(nobody), []);
    assert_eq!(registry.close(nobody, "why"), []);
    assert!(registry.is_serving());
}
