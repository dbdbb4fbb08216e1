//! Leases, reports of lost peers, and leaving.

use super::*;

#[test]
fn a_lost_ffn_instance_stops_steps_but_keeps_attention_and_its_kv() {
    let (mut registry, attention, ffn) = serving();
    let actions = decisions(registry.session_ended(ffn.instance));
    assert_eq!(actions, [Action::ExpertsComplete(false)]);
    assert!(!registry.is_serving() && !registry.is_linked(attention.instance));
    let back = join(&mut registry, v1::Role::Ffn);
    let actions = decisions(registry.ready(back.instance, ready(0)));
    assert_eq!(actions, [Action::ExpertsComplete(true)]);
    assert!(!registry.is_linked(attention.instance), "to the dead one");
    assert!(!registry.is_serving());
    let version = registry.topology().version;
    assert_eq!(
        decisions(registry.links_ready(attention.instance, links(version))),
        []
    );
    assert!(registry.is_serving());
}

#[test]
fn a_lease_runs_out_unless_it_is_renewed() {
    let (mut registry, attention, ffn) = serving();
    let half = TimeNs(0).plus_ms(LEASE_MS / 2);
    registry.renew(half, ffn.instance);
    let end = TimeNs(0).plus_ms(LEASE_MS);
    assert_eq!(registry.next_timer(), Some(end));
    assert_eq!(registry.expire(TimeNs(end.0 - 1)), []);
    let actions = decisions(registry.expire(end));
    assert!(matches!(
        actions.as_slice(),
        [Action::CloseSession { instance, .. }, Action::AttentionLost(lost)]
            if *instance == attention.instance && *lost == attention.instance
    ));
    assert_eq!(registry.next_timer(), Some(half.plus_ms(LEASE_MS)));
}

#[test]
fn a_loop_that_stands_still_loses_its_session_whatever_its_heartbeats_say() {
    let (mut registry, _attention, ffn) = serving();
    let beat = |last_progress_age_ms| v1::Heartbeat {
        last_progress_age_ms,
        ..Default::default()
    };
    assert_eq!(registry.heartbeat(ffn.instance, beat(5_000)), []);
    let actions = decisions(registry.heartbeat(ffn.instance, beat(5_001)));
    assert!(matches!(
        actions.as_slice(),
        [Action::CloseSession { .. }, Action::ExpertsComplete(false)]
    ));
    let loading = join(&mut registry, v1::Role::Ffn);
    let long_load = registry.heartbeat(loading.instance, beat(600_000));
    assert_eq!(long_load, [], "loading weights may take long");
}

#[test]
fn a_peer_reported_lost_is_closed_unless_the_report_is_stale() {
    let (mut registry, attention, ffn) = serving();
    let mut report = v1::PeerLost {
        instance_id: ffn.instance.0,
        epoch: ffn.epoch.0 + 1,
        reason: "reset".to_owned(),
    };
    assert_eq!(registry.peer_lost(attention.instance, &report), []);
    report.epoch = ffn.epoch.0;
    assert_eq!(
        registry.peer_lost(InstanceId(99), &report),
        [],
        "from nobody"
    );
    let actions = decisions(registry.peer_lost(attention.instance, &report));
    assert!(matches!(
        actions.as_slice(),
        [Action::CloseSession { instance, .. }, Action::ExpertsComplete(false)]
            if *instance == ffn.instance
    ));
    assert_eq!(
        registry.peer_lost(attention.instance, &report),
        [],
        "told before"
    );
}

#[test]
fn a_leaving_attention_instance_gets_nothing_new_and_is_lost_once() {
    let (mut registry, attention, _ffn) = serving();
    let actions = registry.leaving(attention.instance);
    assert_eq!(actions, [Action::AttentionLost(attention.instance)]);
    assert!(!registry.is_serving());
    let version = registry.topology().version;
    assert_eq!(
        decisions(registry.links_ready(attention.instance, links(version))),
        []
    );
    assert_eq!(decisions(registry.session_ended(attention.instance)), []);
}

#[test]
fn an_ffn_instance_that_leaves_while_it_loads_holds_no_experts() {
    let mut registry = registry(2, 1);
    let (first, second) = (
        join(&mut registry, v1::Role::Ffn),
        join(&mut registry, v1::Role::Ffn),
    );
    let actions = registry.leaving(first.instance);
    assert!(matches!(actions[..], [Action::CloseSession { .. }]));
    assert!(decisions(registry.ready(second.instance, ready(0))).is_empty());
    assert_eq!(registry.topology().peers.len(), 1);
}
