//! By which fabric two instances talk when device memory is in play; what [`address`](crate::address)
//! decides stands behind it.
//!
//! Pure decisions; nothing here opens a socket.

use std::fmt;

use thiserror::Error;

use crate::address::{self, ChoiceReason, FabricChoice, FabricKind, PeerAddress};

/// What carries the handshake and the liveness of a link through device memory, in order.
const CARRIERS: [FabricKind; 2] = [FabricKind::Shm, FabricKind::Tcp];

/// What kept device memory from being used, where an end offered it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum DeviceNote {
    /// It is used, or was not in play.
    #[default]
    Nothing,
    /// Only one end offers any.
    OneSided,
    /// Both ends do, and memory is not shared between hosts.
    DifferentHosts,
    /// Both ends do on one host, but no link came about.
    Failed,
}

impl DeviceNote {
    const ALL: [Self; 4] = [
        Self::Nothing,
        Self::OneSided,
        Self::DifferentHosts,
        Self::Failed,
    ];
}

/// Why a link has the fabric that it has, in full. The connecting end decides and tells the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Choice {
    pub(crate) reason: ChoiceReason,
    pub(crate) device: DeviceNote,
}

impl Choice {
    #[cfg(test)]
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        let with = |reason| DeviceNote::ALL.map(|device| Self { reason, device });
        ChoiceReason::ALL.into_iter().flat_map(with)
    }

    /// As it travels: the reason in the low byte, the note in the next one.
    pub(crate) fn code(self) -> u32 {
        self.reason.code() | (self.device as u32) << 8
    }

    pub(crate) fn from_code(code: u32) -> Option<Self> {
        let device = DeviceNote::ALL
            .into_iter()
            .find(|note| *note as u32 == code >> 8)?;
        let reason = ChoiceReason::from_code(code & 0xff)?;
        Some(Self { reason, device })
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.reason.fmt(f)?;
        f.write_str(match self.device {
            DeviceNote::Nothing => "",
            DeviceNote::OneSided => "; no cuda_ipc, as only one end offers device memory",
            DeviceNote::DifferentHosts => {
                "; no cuda_ipc, as device memory is not shared between hosts"
            }
            DeviceNote::Failed => "; no cuda_ipc, although both ends offer device memory",
        })
    }
}

/// Why a peer cannot be linked by `cuda_ipc`, where the setting asks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum DeviceError {
    /// This end has nothing to offer.
    #[error(
        "this instance offers no device memory. Give it a device with `--device`, or set `fabric` to \
         \"auto\""
    )]
    NoOffer,
    /// The peer has nothing to offer.
    #[error(
        "it offers no device memory. Give it a device with `--device`, or set `fabric` to \"auto\""
    )]
    NotOffered,
    /// Memory is not shared between hosts.
    #[error(
        "it runs on another host, and device memory is shared within one. Run both on one host, or set \
         `fabric` to \"auto\""
    )]
    DifferentHosts,
    /// There is no way to exchange the offers.
    #[error("it listens on neither shm nor tcp, which carry the handshake. Have it listen on one")]
    NoCarrier,
}

/// What decides at this end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LocalEnd<'a> {
    pub(crate) boot_id: &'a str,
    pub(crate) has_rdma: bool,
    pub(crate) has_device_offer: bool,
}

/// One fabric to try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) fabric: FabricKind,
    /// What carries the handshake: the fabric itself, except for `cuda_ipc`.
    pub(crate) carrier: FabricKind,
    /// The reason that holds if it succeeds.
    pub(crate) choice: Choice,
}

/// The fabrics to try, in order. A later one is tried only when the one before is out of reach.
///
/// Device memory comes first: by any other fabric each payload would pass through the host's memory.
pub(crate) fn candidates(
    setting: FabricChoice,
    local: LocalEnd<'_>,
    peer: &PeerAddress,
) -> Result<Vec<Candidate>, DeviceError> {
    let carriers = CARRIERS
        .into_iter()
        .filter(|c| peer.address_of(*c).is_some());
    let by_device = |reason| {
        carriers.map(move |carrier| Candidate {
            fabric: FabricKind::CudaIpc,
            carrier,
            choice: Choice {
                reason,
                device: DeviceNote::Nothing,
            },
        })
    };
    let verdict = judge(local, peer);
    if setting == FabricChoice::CudaIpc {
        verdict?;
        let found: Vec<_> = by_device(ChoiceReason::Setting).collect();
        return match found[..] {
            [] => Err(DeviceError::NoCarrier),
            _ => Ok(found),
        };
    }
    let mut found = Vec::new();
    let mut device = DeviceNote::Nothing;
    if setting == FabricChoice::Auto {
        let peer_offers = peer.address_of(FabricKind::CudaIpc).is_some();
        device = match verdict {
            Ok(()) => DeviceNote::Failed,
            Err(DeviceError::DifferentHosts) => DeviceNote::DifferentHosts,
            Err(_) if local.has_device_offer || peer_offers => DeviceNote::OneSided,
            Err(_) => DeviceNote::Nothing,
        };
        if verdict.is_ok() {
            found.extend(by_device(ChoiceReason::DeviceMemory));
        }
    }
    let others = address::candidates(setting, local.boot_id, local.has_rdma, peer);
    found.extend(others.into_iter().map(|(fabric, reason)| Candidate {
        fabric,
        carrier: fabric,
        choice: Choice { reason, device },
    }));
    Ok(found)
}

/// Whether two ends can reach each other's device memory, as far as can be told before they talk.
fn judge(local: LocalEnd<'_>, peer: &PeerAddress) -> Result<(), DeviceError> {
    if !local.has_device_offer {
        Err(DeviceError::NoOffer)
    } else if peer.address_of(FabricKind::CudaIpc).is_none() {
        Err(DeviceError::NotOffered)
    } else if !address::is_same_host(local.boot_id, peer) {
        Err(DeviceError::DifferentHosts)
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use step3rt_core::ids::{Epoch, InstanceId};

    use super::*;
    use crate::address::DataAddress;
    use crate::contract::LinkIdentity;

    fn peer(boot_id: &str, fabrics: &[&str]) -> PeerAddress {
        let address = |fabric: &&str| DataAddress {
            fabric: (*fabric).to_owned(),
            address: String::new(),
        };
        PeerAddress {
            identity: LinkIdentity {
                instance: InstanceId(1),
                epoch: Epoch(1),
            },
            boot_id: boot_id.to_owned(),
            addresses: fabrics.iter().map(address).collect(),
        }
    }

    fn found(has_device_offer: bool, peer: &PeerAddress) -> Vec<(FabricKind, FabricKind, String)> {
        let local = LocalEnd {
            boot_id: "b",
            has_rdma: false,
            has_device_offer,
        };
        candidates(FabricChoice::Auto, local, peer)
            .unwrap()
            .into_iter()
            .map(|c| (c.fabric, c.carrier, c.choice.to_string()))
            .collect()
    }

    #[test]
    fn one_host_takes_device_memory_first_over_each_carrier_and_says_so_when_it_fails() {
        let both = peer("b", &["shm", "tcp", "cuda_ipc"]);
        let why = "both ends run on one host and offer device memory".to_owned();
        let failed = "; no cuda_ipc, although both ends offer device memory";
        assert_eq!(
            found(true, &both),
            [
                (FabricKind::CudaIpc, FabricKind::Shm, why.clone()),
                (FabricKind::CudaIpc, FabricKind::Tcp, why),
                (
                    FabricKind::Shm,
                    FabricKind::Shm,
                    format!("both ends run on one host{failed}")
                ),
                (
                    FabricKind::Tcp,
                    FabricKind::Tcp,
                    format!("one host, but the peer's shm socket is out of reach{failed}")
                ),
            ]
        );
    }

    #[test]
    fn what_keeps_device_memory_away_is_part_of_the_reason() {
        let suffix = |has_offer, peer: &PeerAddress| {
            let found = found(has_offer, peer);
            assert!(found.iter().all(|c| c.0 != FabricKind::CudaIpc));
            let (_, rest) = found[0].2.split_once("host").unwrap();
            rest.split_once("; ").map_or("", |(_, s)| s).to_owned()
        };
        let one_sided = "no cuda_ipc, as only one end offers device memory";
        assert_eq!(suffix(true, &peer("b", &["shm", "tcp"])), one_sided);
        assert_eq!(suffix(false, &peer("b", &["shm", "cuda_ipc"])), one_sided);
        assert_eq!(suffix(false, &peer("b", &["shm", "tcp"])), "");
        assert_eq!(
            suffix(true, &peer("c", &["tcp", "cuda_ipc"])),
            "no cuda_ipc, as device memory is not shared between hosts"
        );
    }

    #[test]
    fn the_setting_takes_nothing_else_and_says_what_is_missing() {
        let forced = |has_device_offer, peer: &PeerAddress| {
            let local = LocalEnd {
                boot_id: "b",
                has_rdma: true,
                has_device_offer,
            };
            candidates(FabricChoice::CudaIpc, local, peer)
        };
        let offers = peer("b", &["tcp", "cuda_ipc"]);
        let [only] = forced(true, &offers).unwrap()[..] else {
            panic!("not one");
        };
        assert_eq!(
            (only.fabric, only.carrier),
            (FabricKind::CudaIpc, FabricKind::Tcp)
        );
        assert_eq!(only.choice.reason, ChoiceReason::Setting);
        assert_eq!(forced(false, &offers), Err(DeviceError::NoOffer));
        let refused = |peer: &PeerAddress| forced(true, peer).unwrap_err();
        assert_eq!(refused(&peer("b", &["tcp"])), DeviceError::NotOffered);
        let elsewhere = peer("c", &["tcp", "cuda_ipc"]);
        assert_eq!(refused(&elsewhere), DeviceError::DifferentHosts);
        assert_eq!(refused(&peer("b", &["cuda_ipc"])), DeviceError::NoCarrier);
    }

    #[test]
    fn a_setting_of_another_fabric_keeps_device_memory_away_without_a_word() {
        let local = LocalEnd {
            boot_id: "b",
            has_rdma: false,
            has_device_offer: true,
        };
        let both = peer("b", &["shm", "cuda_ipc"]);
        let [only] = candidates(FabricChoice::Shm, local, &both).unwrap()[..] else {
            panic!("not one");
        };
        assert_eq!(only.fabric, FabricKind::Shm);
        assert_eq!(only.choice.to_string(), "chosen by the `fabric` setting");
    }

    #[test]
    fn every_choice_comes_back_as_it_went() {
        for choice in Choice::all() {
            assert_eq!(Choice::from_code(choice.code()), Some(choice));
        }
        assert_eq!(Choice::from_code(4 << 8), None);
        assert_eq!(Choice::from_code(0xff), None);
    }
}
