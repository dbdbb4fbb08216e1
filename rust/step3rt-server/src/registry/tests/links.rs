//! Who is linked to whom, and what is announced of it.

use super::*;

#[test]
fn an_attention_instance_is_used_once_it_is_linked_to_every_expert() {
    let mut registry = registry(2, 1);
    let attention = join(&mut registry, v1::Role::Attention);
    let first = join(&mut registry, v1::Role::Ffn);
    let second = join(&mut registry, v1::Role::Ffn);
    assert_eq!(decisions(registry.ready(attention.instance, ready(8))), []);
    assert_eq!(decisions(registry.ready(first.instance, ready(0))), []);
    let incomplete = registry.topology().version;
    assert_eq!(
        decisions(registry.links_ready(attention.instance, links(incomplete))),
        []
    );
    assert!(!registry.is_linked(attention.instance), "not to every one");
    let actions = decisions(registry.ready(second.instance, ready(0)));
    assert_eq!(actions, [Action::ExpertsComplete(true)]);
    assert!(!registry.is_serving(), "linked for an older topology");
    // A late answer to the older topology proves nothing.
    assert_eq!(
        decisions(registry.links_ready(attention.instance, links(incomplete))),
        []
    );
    let complete = registry.topology().version;
    let actions = decisions(registry.links_ready(attention.instance, links(complete)));
    assert_eq!(actions, [attention_ready(attention)]);
    assert!(registry.is_serving());
    registry.links_ready(attention.instance, links(incomplete));
    assert!(registry.is_serving(), "nor does it undo anything");
}

#[test]
fn links_made_while_weights_are_loaded_count_when_they_are() {
    let mut registry = registry(1, 1);
    let attention = join(&mut registry, v1::Role::Attention);
    let ffn = join(&mut registry, v1::Role::Ffn);
    registry.ready(ffn.instance, ready(0));
    let version = registry.topology().version;
    assert_eq!(
        decisions(registry.links_ready(attention.instance, links(version))),
        []
    );
    let actions = decisions(registry.ready(attention.instance, ready(8)));
    assert_eq!(actions, [attention_ready(attention)]);
}

#[test]
fn another_attention_instance_does_not_make_links_stale() {
    let (mut registry, attention, _ffn) = serving();
    let other = join(&mut registry, v1::Role::Attention);
    registry.ready(other.instance, ready(8));
    assert!(registry.is_linked(attention.instance) && registry.is_serving());
    assert!(!registry.is_linked(other.instance));
}

#[test]
fn every_change_is_announced_with_a_higher_version_and_only_ready_instances() {
    let mut registry = registry(1, 1);
    let loading = join(&mut registry, v1::Role::Attention);
    let ffn = join(&mut registry, v1::Role::Ffn);
    let actions = registry.ready(ffn.instance, ready(0));
    let Some(Action::AnnounceTopology(first)) = actions.last() else {
        panic!("announced last: {actions:?}");
    };
    assert_eq!(first.peers.len(), 1);
    assert_eq!(first.peers[0].instance_id, ffn.instance.0);
    let actions = registry.session_ended(ffn.instance);
    let Some(Action::AnnounceTopology(second)) = actions.last() else {
        panic!("announced last: {actions:?}");
    };
    assert!(second.version > first.version && second.peers.is_empty());
    assert_eq!(
        registry.session_ended(loading.instance),
        [],
        "nobody linked to it"
    );
}

#[test]
fn links_of_a_topology_that_was_never_announced_are_a_lie() {
    let (mut registry, attention, _ffn) = serving();
    let version = registry.topology().version;
    assert!(
        registry
            .links_ready(attention.instance, links(version))
            .is_empty()
    );
    let actions = registry.links_ready(attention.instance, links(version + 1));
    assert!(matches!(actions[0], Action::CloseSession { .. }));
    assert!(!registry.is_serving());
}

#[test]
fn an_ffn_instance_that_reports_links_is_closed() {
    let (mut registry, _attention, ffn) = serving();
    let version = registry.topology().version;
    let actions = registry.links_ready(ffn.instance, links(version));
    assert!(
        matches!(actions[0], Action::CloseSession { instance, .. } if instance == ffn.instance)
    );
}

#[test]
fn time_without_experts_does_not_count_against_an_instances_links() {
    let (mut registry, attention, ffn) = serving();
    registry.session_ended(ffn.instance);
    let mut at = TimeNs(0);
    for _ in 0..10 {
        registry.renew(at, attention.instance);
        assert_eq!(registry.expire(at), [], "nobody could make them");
        at = at.plus_ms(LEASE_MS / 2);
    }
    let back = join(&mut registry, v1::Role::Ffn);
    registry.ready(back.instance, ready(0));
    for _ in 0..6 {
        registry.renew(at, attention.instance);
        registry.renew(at, back.instance);
        assert_eq!(registry.expire(at), []);
        at = at.plus_ms(LEASE_MS / 2);
    }
    registry.renew(at, attention.instance);
    let actions = decisions(registry.expire(at));
    assert_eq!(actions[1..], [Action::AttentionLost(attention.instance)]);
}
