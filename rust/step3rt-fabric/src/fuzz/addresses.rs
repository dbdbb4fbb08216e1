//! Addresses that peers publish, and which of them an end would try.

use step3rt_core::ids::InstanceId;

use super::{PEER, byte};
use crate::address::{
    ChoiceReason, DataAddress, FabricChoice, FabricKind, PeerAddress, candidates,
};

pub(super) const SELECTOR: u8 = 5;

const OWN_BOOT_ID: &str = "b";

/// `flags`, then texts with their lengths in front: the setting, the peer's boot id, and its
/// addresses.
pub(super) fn run(mut data: &[u8]) {
    let has_rdma = byte(&mut data) % 2 == 1;
    let setting = text(&mut data);
    let choice = setting.parse::<FabricChoice>();
    let is_known = ["auto", "shm", "tcp", "rdma"].contains(&setting.as_str());
    assert_eq!(choice.is_ok(), is_known, "{setting:?}");
    let mut peer = PeerAddress {
        identity: PEER,
        boot_id: text(&mut data),
        addresses: Vec::new(),
    };
    while !data.is_empty() && peer.addresses.len() < 8 {
        peer.addresses.push(DataAddress {
            fabric: text(&mut data),
            address: text(&mut data),
        });
    }
    let choice = choice.unwrap_or_default();
    check(choice, has_rdma, &peer);
    assert_eq!(peer.identity.instance, InstanceId(1));
}

fn check(choice: FabricChoice, has_rdma: bool, peer: &PeerAddress) {
    let found = candidates(choice, OWN_BOOT_ID, has_rdma, peer);
    let offers = |kind: FabricKind| peer.addresses.iter().any(|a| a.fabric == kind.as_str());
    let is_same_host = peer.boot_id == OWN_BOOT_ID;
    let only = |kind| vec![(kind, ChoiceReason::Setting)];
    match choice {
        FabricChoice::Shm => assert_eq!(found, only(FabricKind::Shm)),
        FabricChoice::Tcp => assert_eq!(found, only(FabricKind::Tcp)),
        FabricChoice::Rdma => assert_eq!(found, only(FabricKind::Rdma)),
        FabricChoice::Auto => {
            let kinds: Vec<_> = found.iter().map(|(kind, _)| *kind).collect();
            let mut expected = Vec::new();
            if is_same_host && offers(FabricKind::Shm) {
                expected.push(FabricKind::Shm);
            }
            if has_rdma && offers(FabricKind::Rdma) {
                expected.push(FabricKind::Rdma);
            }
            expected.push(FabricKind::Tcp);
            assert_eq!(kinds, expected);
        }
    }
    for (kind, reason) in found {
        let first = peer.addresses.iter().find(|a| a.fabric == kind.as_str());
        assert_eq!(peer.address_of(kind), first.map(|a| a.address.as_str()));
        assert_eq!(ChoiceReason::from_code(reason.code()), Some(reason));
    }
}

fn text(data: &mut &[u8]) -> String {
    let len = usize::from(byte(data)).min(data.len());
    let (text, rest) = data.split_at(len);
    *data = rest;
    String::from_utf8_lossy(text).into_owned()
}

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let seed = |flags: u8, texts: &[&str]| {
        let texts = texts.iter().map(|text| {
            let len = u8::try_from(text.len()).expect("short");
            [&[len], text.as_bytes()].concat()
        });
        [vec![SELECTOR, flags], texts.collect::<Vec<_>>().concat()].concat()
    };
    let addresses = ["shm", "@step3rt-1-0", "rdma", "h:1", "tcp", "h:1"];
    let all = |setting, boot_id| [&[setting, boot_id][..], &addresses].concat();
    let mut seeds = vec![seed(1, &["auto", "b", "pigeon", "loft"])];
    for setting in ["auto", "shm", "tcp", "rdma", "pigeon"] {
        seeds.push(seed(1, &all(setting, OWN_BOOT_ID)));
        seeds.push(seed(0, &all(setting, "another")));
    }
    seeds
}
