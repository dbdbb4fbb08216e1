//! What the coordinator says of the cluster, checked. This module never connects to anything.

use step3rt_core::ids::{Epoch, InstanceId};
use step3rt_fabric::address::{DataAddress, PeerAddress};
use step3rt_fabric::contract::LinkIdentity;
use step3rt_proto::v1;

use crate::options::Role;

/// All instances that are ready.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// Rises with every change.
    pub version: u64,
    /// In no particular order; instance ids are distinct.
    pub peers: Vec<Peer>,
}

/// One instance of the topology.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Who and where.
    pub address: PeerAddress,
    /// What it does.
    pub role: Role,
    /// Its position in its role.
    pub role_rank: u32,
}

impl Topology {
    /// Checks a topology from the wire; the error says what is wrong with it.
    pub fn from_wire(topology: v1::Topology) -> Result<Self, String> {
        let mut peers: Vec<Peer> = Vec::with_capacity(topology.peers.len());
        for peer in topology.peers {
            let instance = InstanceId(peer.instance_id);
            let role = match peer.role() {
                v1::Role::Attention => Role::Attention,
                v1::Role::Ffn => Role::Ffn,
                v1::Role::Unspecified => {
                    return Err(format!(
                        "instance {instance} has the unknown role {}",
                        peer.role
                    ));
                }
            };
            if peers
                .iter()
                .any(|p| p.address.identity.instance == instance)
            {
                return Err(format!("instance {instance} is in the topology twice"));
            }
            peers.push(Peer {
                address: PeerAddress {
                    identity: LinkIdentity {
                        instance,
                        epoch: Epoch(peer.epoch),
                    },
                    boot_id: peer.boot_id,
                    addresses: peer.addresses.into_iter().map(address_from_wire).collect(),
                },
                role,
                role_rank: peer.role_rank,
            });
        }
        Ok(Self {
            version: topology.version,
            peers,
        })
    }

    /// The peer with this identity, incarnation included.
    pub fn find(&self, identity: LinkIdentity) -> Option<&Peer> {
        self.peers.iter().find(|p| p.address.identity == identity)
    }
}

fn address_from_wire(address: v1::DataAddress) -> DataAddress {
    DataAddress {
        fabric: address.fabric,
        address: address.address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(instance_id: u32, role: v1::Role) -> v1::Peer {
        v1::Peer {
            instance_id,
            role: role.into(),
            role_rank: 0,
            epoch: 7,
            boot_id: "b".to_owned(),
            addresses: vec![],
        }
    }

    #[test]
    fn a_peer_is_found_by_instance_and_epoch_together() {
        let wire = v1::Topology {
            version: 3,
            peers: vec![peer(1, v1::Role::Ffn), peer(2, v1::Role::Attention)],
        };
        let topology = Topology::from_wire(wire).unwrap();
        let identity = |epoch| LinkIdentity {
            instance: InstanceId(2),
            epoch: Epoch(epoch),
        };
        assert_eq!(topology.find(identity(7)).unwrap().role, Role::Attention);
        assert_eq!(topology.find(identity(6)), None);
    }

    #[test]
    fn nonsense_of_the_coordinator_is_refused() {
        let refused = |peers| Topology::from_wire(v1::Topology { version: 1, peers }).unwrap_err();
        let text = refused(vec![peer(1, v1::Role::Unspecified)]);
        assert_eq!(text, "instance 1 has the unknown role 0");
        let text = refused(vec![peer(1, v1::Role::Ffn), peer(1, v1::Role::Ffn)]);
        assert_eq!(text, "instance 1 is in the topology twice");
    }
}
