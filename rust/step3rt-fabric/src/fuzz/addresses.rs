//! Addresses that peers publish, and which of them an end would try.

use step3rt_core::ids::InstanceId;

use super::{PEER, byte};
use crate::address::{ChoiceReason, DataAddress, FabricChoice, FabricKind, PeerAddress};
use crate::choice::{Candidate, Choice, DeviceError, DeviceNote, LocalEnd, candidates};

pub(super) const SELECTOR: u8 = 5;

const OWN_BOOT_ID: &str = "b";
const SETTINGS: [&str; 5] = ["auto", "shm", "tcp", "rdma", "cuda_ipc"];

const HAS_RDMA: u8 = 1;
const HAS_DEVICE_OFFER: u8 = 2;

/// `flags`, then texts with their lengths in front: the setting, the peer's boot id, and its
/// addresses.
pub(super) fn run(mut data: &[u8]) {
    let flags = byte(&mut data);
    let local = LocalEnd {
        boot_id: OWN_BOOT_ID,
        has_rdma: flags & HAS_RDMA != 0,
        has_device_offer: flags & HAS_DEVICE_OFFER != 0,
    };
    let setting = text(&mut data);
    let choice = setting.parse::<FabricChoice>();
    let is_known = SETTINGS.contains(&setting.as_str());
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
    match candidates(choice, local, &peer) {
        Ok(found) => check(choice, local, &peer, &found),
        Err(error) => {
            assert_eq!(choice, FabricChoice::CudaIpc);
            assert_eq!(Some(error), device_fault(local, &peer));
        }
    }
    assert_eq!(peer.identity.instance, InstanceId(1));
}

fn offers(peer: &PeerAddress, kind: FabricKind) -> bool {
    peer.addresses.iter().any(|a| a.fabric == kind.as_str())
}

/// What keeps two ends from a link through device memory.
fn device_fault(local: LocalEnd<'_>, peer: &PeerAddress) -> Option<DeviceError> {
    let has_carrier = offers(peer, FabricKind::Shm) || offers(peer, FabricKind::Tcp);
    if !local.has_device_offer {
        Some(DeviceError::NoOffer)
    } else if !offers(peer, FabricKind::CudaIpc) {
        Some(DeviceError::NotOffered)
    } else if peer.boot_id != OWN_BOOT_ID {
        Some(DeviceError::DifferentHosts)
    } else if !has_carrier {
        Some(DeviceError::NoCarrier)
    } else {
        None
    }
}

fn check(setting: FabricChoice, local: LocalEnd<'_>, peer: &PeerAddress, found: &[Candidate]) {
    use FabricKind::{CudaIpc, Rdma, Shm, Tcp};
    let is_same_host = peer.boot_id == OWN_BOOT_ID;
    let carriers = [Shm, Tcp].into_iter().filter(|kind| offers(peer, *kind));
    let by_device = carriers.map(|carrier| (CudaIpc, carrier));
    let mut expected = Vec::new();
    match setting {
        FabricChoice::Shm => expected.push((Shm, Shm)),
        FabricChoice::Tcp => expected.push((Tcp, Tcp)),
        FabricChoice::Rdma => expected.push((Rdma, Rdma)),
        FabricChoice::CudaIpc => {
            assert_eq!(device_fault(local, peer), None);
            expected.extend(by_device);
        }
        FabricChoice::Auto => {
            if device_fault(local, peer).is_none() {
                expected.extend(by_device);
            }
            if is_same_host && offers(peer, Shm) {
                expected.push((Shm, Shm));
            }
            if local.has_rdma && offers(peer, Rdma) {
                expected.push((Rdma, Rdma));
            }
            expected.push((Tcp, Tcp));
        }
    }
    let kinds: Vec<_> = found.iter().map(|c| (c.fabric, c.carrier)).collect();
    assert_eq!(kinds, expected);
    let is_in_play = local.has_device_offer || offers(peer, CudaIpc);
    for candidate in found {
        let Candidate {
            fabric,
            carrier,
            choice,
        } = *candidate;
        let first = peer.addresses.iter().find(|a| a.fabric == carrier.as_str());
        assert_eq!(peer.address_of(carrier), first.map(|a| a.address.as_str()));
        assert_eq!(Choice::from_code(choice.code()), Some(choice));
        let is_set = setting != FabricChoice::Auto;
        assert_eq!(choice.reason == ChoiceReason::Setting, is_set);
        let is_explained = !is_set && fabric != CudaIpc && is_in_play;
        assert_eq!(choice.device != DeviceNote::Nothing, is_explained);
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
    let all = |setting, boot_id, more: &[&'static str]| {
        [&[setting, boot_id][..], &addresses, more].concat()
    };
    let device = ["cuda_ipc", ""];
    let both = HAS_RDMA | HAS_DEVICE_OFFER;
    let mut seeds = vec![
        seed(HAS_RDMA, &["auto", "b", "pigeon", "loft"]),
        seed(both, &["cuda_ipc", "b", "cuda_ipc", "", "rdma", "h:1"]),
        seed(HAS_DEVICE_OFFER, &all("auto", OWN_BOOT_ID, &[])),
        seed(0, &all("auto", OWN_BOOT_ID, &device)),
        seed(0, &all("cuda_ipc", OWN_BOOT_ID, &device)),
    ];
    for setting in SETTINGS.into_iter().chain(["pigeon"]) {
        seeds.push(seed(HAS_RDMA, &all(setting, OWN_BOOT_ID, &[])));
        seeds.push(seed(0, &all(setting, "another", &[])));
        seeds.push(seed(both, &all(setting, OWN_BOOT_ID, &device)));
        seeds.push(seed(both, &all(setting, "another", &device)));
    }
    seeds
}
