//! What threads hand to each other beside frames: links to the owner, sockets to the watcher, a
//! doorbell to those who ring it.
//!
//! Bound: 3 preemptions, two threads.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use loom::thread;
use step3rt_core::ids::{Epoch, InstanceId};

use super::sync::{AtomicUsize, Ordering, Weakness};
use super::{check, check_without};
use crate::config::LinkSettings;
use crate::contract::{Doorbell, LinkIdentity, Side};
use crate::doorbell::FutexDoorbell;
use crate::handshake::{Introduction, RefusalCode};
use crate::hub::{Hub, Watch};
use crate::late_doorbell::LateDoorbell;
use crate::new_link::NewLink;
use crate::state::LinkState;
use crate::two_sides::pair::{ATTENTION, End, FFN, FOREVER, Made, terms};

fn hub() -> Arc<Hub> {
    let introduction = Introduction {
        identity: FFN,
        side: Side::Responder,
        geometry: terms(Side::Responder, 1).geometry,
    };
    let settings = LinkSettings {
        max_peers: 1,
        spin_us: 0,
        ..LinkSettings::default()
    };
    Arc::new(Hub::new(introduction, settings, false, None).unwrap())
}

fn incarnation(epoch: u64) -> LinkIdentity {
    let epoch = Epoch(epoch);
    LinkIdentity { epoch, ..ATTENTION }
}

/// A link to an incarnation of the attention instance.
fn link_to(made: &[Made; 2], peer: LinkIdentity) -> NewLink {
    let [of_attention, of_ffn] = made;
    let mut of_ffn = of_ffn.clone();
    of_ffn.terms.peer = peer;
    let End { link, .. } = of_ffn.meet(of_attention);
    NewLink::adopted(Box::new(link))
}

fn made() -> [Made; 2] {
    [Side::Initiator, Side::Responder].map(|side| Made::new(terms(side, 1)))
}

/// The owner's half: what has been accepted, as soon as there is something.
fn next_accepted(hub: &Hub) -> Vec<NewLink> {
    loop {
        let seen = hub.bell.current();
        let accepted = hub.take_accepted();
        if !accepted.is_empty() {
            return accepted;
        }
        assert!(hub.bell.wait(seen, FOREVER));
    }
}

fn one_link_handed_over() {
    let (hub, made) = (hub(), made());
    let link = link_to(&made, incarnation(5));
    let watchers = Arc::clone(&hub);
    let watcher = thread::spawn(move || watchers.deliver(link));
    assert_eq!(next_accepted(&hub).len(), 1);
    assert!(hub.take_accepted().is_empty());
    watcher.join().unwrap();
}

#[test]
fn an_accepted_link_wakes_the_owner_that_takes_it_once() {
    check(one_link_handed_over);
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_a_common_order_in_the_doorbell_an_accepted_link_is_slept_through() {
    check_without(Weakness::NoSeqCst, one_link_handed_over);
}

#[test]
fn the_epoch_moves_on_while_the_owner_takes_the_link_of_the_last_one() {
    check(|| {
        let (hub, made) = (hub(), made());
        let links = [5, 6].map(|epoch| link_to(&made, incarnation(epoch)));
        let watchers = Arc::clone(&hub);
        let watcher = thread::spawn(move || {
            for link in links {
                let peer = link.link.peer();
                watchers.admit(peer).unwrap();
                watchers.confirm(peer);
                watchers.deliver(link);
            }
        });
        // As `Endpoint` does: the later link takes the place of the earlier.
        let mut held: Option<NewLink> = None;
        let epoch = |held: &Option<NewLink>| held.as_ref().map(|held| held.link.peer().epoch);
        while epoch(&held) != Some(Epoch(6)) {
            for accepted in next_accepted(&hub) {
                let peer = accepted.link.peer();
                hub.confirm(peer);
                if held.replace(accepted).is_some() {
                    hub.dismiss(peer.instance);
                }
            }
        }
        watcher.join().unwrap();
        let stale = RefusalCode::Stale(Epoch(6));
        assert_eq!(hub.admit(incarnation(5)), Err(stale));
        // One link is counted, whether the first was taken or dropped on the way.
        let stranger = LinkIdentity {
            instance: InstanceId(9),
            epoch: Epoch(1),
        };
        assert_eq!(hub.admit(stranger), Err(RefusalCode::Full));
        hub.dismiss(ATTENTION.instance);
        assert_eq!(hub.admit(stranger), Ok(()));
    });
}

/// A watcher's loop, which sees `num_watches` sockets or the end; how often it clears its event
/// again after it looked.
fn watch_until(hub: &Hub, num_watches: usize, clears_late: bool) {
    let mut num_seen = 0;
    loop {
        num_seen += hub.take_new_watches().len();
        if clears_late {
            hub.wake().clear();
        }
        if hub.is_stopping() || num_seen == num_watches {
            return;
        }
        hub.wake().wait();
    }
}

fn watch(hub: &Hub) {
    let (socket, _) = UnixStream::pair().unwrap();
    let bell = Arc::clone(&hub.bell) as Arc<dyn Doorbell>;
    hub.watch(Watch {
        socket: Arc::new(socket.into()),
        process: None,
        state: Arc::new(LinkState::new(bell)),
    });
}

fn one_socket_to_watch(clears_late: bool) {
    let hub = hub();
    let watchers = Arc::clone(&hub);
    let watcher = thread::spawn(move || watch_until(&watchers, 1, clears_late));
    watch(&hub);
    watcher.join().unwrap();
}

#[test]
fn the_watcher_sees_a_socket_whenever_it_is_handed_over() {
    check(|| one_socket_to_watch(false));
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_watcher_that_clears_its_event_after_it_looked_misses_a_socket() {
    check(|| one_socket_to_watch(true));
}

#[test]
fn the_watcher_stops_also_while_it_is_handed_a_socket() {
    check(|| {
        let hub = hub();
        let watchers = Arc::clone(&hub);
        let watcher = thread::spawn(move || watch_until(&watchers, usize::MAX, false));
        watch(&hub);
        hub.stop();
        watcher.join().unwrap();
    });
}

fn news_before_the_doorbell_is_there() {
    let (bell, _fd) = FutexDoorbell::create(0).unwrap();
    let bell = Arc::new(bell);
    let late = Arc::new(LateDoorbell::default());
    let news = Arc::new(AtomicUsize::new(0));
    let session = thread::spawn({
        let (late, news) = (Arc::clone(&late), Arc::clone(&news));
        move || {
            news.store(1, Ordering::Release);
            late.ring();
        }
    });
    late.set(Arc::clone(&bell) as Arc<dyn Doorbell>);
    loop {
        let seen = bell.current();
        if news.load(Ordering::Acquire) == 1 {
            break;
        }
        assert!(bell.wait(seen, FOREVER));
    }
    session.join().unwrap();
}

#[test]
fn news_is_seen_or_rung_for_whenever_the_doorbell_is_set() {
    check(news_before_the_doorbell_is_there);
}

#[test]
#[should_panic(expected = "deadlock")]
fn without_fences_around_the_late_doorbell_news_is_neither_seen_nor_rung_for() {
    check_without(Weakness::NoSeqCst, news_before_the_doorbell_is_there);
}
