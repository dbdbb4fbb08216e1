//! Links that do not come in time. Leases are tested with the registry's histories.

use step3rt_proto::v1;

use super::*;
use crate::registry::tests::{decisions, hello, join, links, ready, serving};

#[test]
fn an_instance_that_cannot_link_to_a_replaced_ffn_is_closed_in_time() {
    let (mut registry, attention, ffn) = serving();
    registry.session_ended(ffn.instance);
    let renewed = |registry: &mut Registry, ms| {
        registry.renew(TimeNs(0).plus_ms(ms), attention.instance);
        decisions(registry.expire(TimeNs(0).plus_ms(ms)))
    };
    // While experts are missing it could not link, and the scheduler counts the time.
    assert_eq!(renewed(&mut registry, 10_000), []);
    let back = registry
        .hello(TimeNs(0).plus_ms(10_000), hello(v1::Role::Ffn))
        .expect("its rank is free");
    registry.ready(back.instance, ready(0));
    registry.renew(TimeNs(0).plus_ms(20_000), back.instance);
    assert_eq!(renewed(&mut registry, 10_000), []);
    assert_eq!(renewed(&mut registry, 12_999), []);
    assert_eq!(registry.next_timer(), Some(TimeNs(0).plus_ms(13_000)));
    let actions = renewed(&mut registry, 13_000);
    let [Action::CloseSession { instance, reason }, lost] = &actions[..] else {
        panic!("{actions:?}");
    };
    assert_eq!(*instance, attention.instance);
    assert!(reason.contains("not linked to every FFN instance for 3000 ms"));
    assert_eq!(*lost, Action::AttentionLost(attention.instance));
}

#[test]
fn links_in_time_and_instances_without_work_are_left_alone() {
    let (mut registry, attention, ffn) = serving();
    let idle = join(&mut registry, v1::Role::Attention);
    registry.ready(idle.instance, ready(8));
    registry.session_ended(ffn.instance);
    let back = join(&mut registry, v1::Role::Ffn);
    registry.ready(back.instance, ready(0));
    let expire = |registry: &mut Registry, ms| {
        for one in [attention, idle, back] {
            registry.renew(TimeNs(0).plus_ms(ms), one.instance);
        }
        registry.expire(TimeNs(0).plus_ms(ms))
    };
    assert_eq!(expire(&mut registry, 0), []);
    let version = registry.topology().version;
    registry.links_ready(attention.instance, links(version));
    assert_eq!(expire(&mut registry, 2_999), []);
    assert_eq!(expire(&mut registry, 9_000), []);
}
