//! Which device, port and GID a link takes: read from sysfs, chosen by the control connection.
//!
//! It opens no device. A GID is an address of a port; RoCE ports have several, of which only those
//! of RoCE v2 (UDP over IP) are routed, and each of these is an IP address of the port's interface.

use std::fmt;
use std::fs;
use std::net::{IpAddr, Ipv6Addr};
use std::path::Path;

/// Where the kernel lists RDMA devices.
pub(crate) const SYSFS: &str = "/sys/class/infiniband";

/// What packets travel on. Both ends of a link must have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Network {
    RoceV2Ipv4,
    RoceV2Ipv6,
    Infiniband,
    /// Ethernet without IP; never leaves its segment.
    RoceV1,
}

impl Network {
    const ALL: [Self; 4] = [
        Self::RoceV2Ipv4,
        Self::RoceV2Ipv6,
        Self::Infiniband,
        Self::RoceV1,
    ];

    pub(crate) fn code(self) -> u8 {
        self as u8
    }

    pub(crate) fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|network| network.code() == code)
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RoceV2Ipv4 => "RoCE v2 over IPv4",
            Self::RoceV2Ipv6 => "RoCE v2 over IPv6",
            Self::Infiniband => "InfiniBand",
            Self::RoceV1 => "RoCE v1",
        })
    }
}

/// One port of one device, as sysfs has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Port {
    pub(crate) device: String,
    pub(crate) number: u8,
    /// `"ACTIVE"` when packets pass.
    pub(crate) state: String,
    /// `"Ethernet"` or `"InfiniBand"`.
    pub(crate) link_layer: String,
    pub(crate) gids: Vec<Gid>,
}

impl Port {
    /// Whether packets pass.
    pub(crate) fn is_active(&self) -> bool {
        self.state == "ACTIVE"
    }

    /// Whether it has an address by which packets leave their segment.
    pub(crate) fn has_routed_gid(&self) -> bool {
        self.gids.iter().any(|gid| gid.rank() <= ROUTED_RANK)
    }
}

/// The last rank of [`Gid::rank`] that is routed.
const ROUTED_RANK: u8 = 2;

/// One address of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gid {
    pub(crate) index: u8,
    pub(crate) bytes: [u8; 16],
    pub(crate) network: Network,
}

impl fmt::Display for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let address = match self.address().to_ipv4_mapped() {
            Some(ipv4) => IpAddr::V4(ipv4),
            None => IpAddr::V6(self.address()),
        };
        write!(f, "GID {} {address} ({})", self.index, self.network)
    }
}

impl Gid {
    fn address(&self) -> Ipv6Addr {
        Ipv6Addr::from(self.bytes)
    }

    /// Lower is better: routed before not routed, as operators number hosts before as machines do.
    fn rank(&self) -> u8 {
        match self.network {
            Network::RoceV2Ipv4 => 0,
            Network::RoceV2Ipv6 if !self.address().is_unicast_link_local() => 1,
            Network::Infiniband => 2,
            Network::RoceV2Ipv6 => 3,
            Network::RoceV1 => 4,
        }
    }
}

/// The port and GID of one end of a link, and why these.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Choice {
    pub(crate) device: String,
    pub(crate) port: u8,
    pub(crate) gid: Gid,
    why: Why,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    /// The GID is this end's address of the control connection.
    ControlAddress,
    /// No GID is; this one has the best rank.
    First { control: IpAddr },
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} port {}, {}, ", self.device, self.port, self.gid)?;
        match self.why {
            Why::ControlAddress => f.write_str("the address of the control connection"),
            Why::First { control } => {
                write!(
                    f,
                    "the first usable one, as none is the control connection's {control}"
                )
            }
        }
    }
}

/// Every port of every device. Empty when there is none, and when sysfs cannot be read.
pub(crate) fn ports(sysfs: &Path) -> Vec<Port> {
    let mut found: Vec<Port> = names(sysfs)
        .iter()
        .flat_map(|device| {
            let ports = sysfs.join(device).join("ports");
            let numbers = names(&ports)
                .into_iter()
                .filter_map(|name| name.parse().ok());
            numbers
                .map(|number: u8| read_port(&ports.join(number.to_string()), device, number))
                .collect::<Vec<_>>()
        })
        .collect();
    found.sort_by(|a, b| (&a.device, a.number).cmp(&(&b.device, b.number)));
    found
}

fn read_port(path: &Path, device: &str, number: u8) -> Port {
    let link_layer = text(&path.join("link_layer")).unwrap_or_default();
    let state = text(&path.join("state")).unwrap_or_default();
    let mut indices: Vec<u8> = names(&path.join("gids"))
        .into_iter()
        .filter_map(|name| name.parse().ok())
        .collect();
    indices.sort_unstable();
    let gids = indices
        .into_iter()
        .filter_map(|index| read_gid(path, index, &link_layer))
        .collect();
    Port {
        device: device.to_owned(),
        number,
        // As in "4: ACTIVE".
        state: state.rsplit(' ').next().unwrap_or_default().to_owned(),
        link_layer,
        gids,
    }
}

/// None for a place of the table that holds nothing.
fn read_gid(port: &Path, index: u8, link_layer: &str) -> Option<Gid> {
    let address: Ipv6Addr = text(&port.join(format!("gids/{index}")))?.parse().ok()?;
    if address.is_unspecified() {
        return None;
    }
    let network = if link_layer == "InfiniBand" {
        Network::Infiniband
    } else {
        // Missing, or unreadable for a place that is empty by now.
        match text(&port.join(format!("gid_attrs/types/{index}")))?.as_str() {
            "RoCE v2" if address.to_ipv4_mapped().is_some() => Network::RoceV2Ipv4,
            "RoCE v2" => Network::RoceV2Ipv6,
            _ => Network::RoceV1,
        }
    };
    Some(Gid {
        index,
        bytes: address.octets(),
        network,
    })
}

/// The GID that equals this end's address of the control connection, for that is the network on
/// which the peer is known to be; else the best, in the order of devices, ports and indices.
/// `network` restricts the choice to what the other end has.
pub(crate) fn choose(ports: &[Port], control: IpAddr, network: Option<Network>) -> Option<Choice> {
    let wanted = match control {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    };
    let usable = ports
        .iter()
        .filter(|port| port.is_active())
        .flat_map(|port| {
            let gids = port
                .gids
                .iter()
                .filter(|gid| network.is_none_or(|n| n == gid.network));
            gids.map(move |gid| (port, *gid))
        });
    let (port, gid) = usable.min_by_key(|(_, gid)| {
        let is_routed = matches!(gid.network, Network::RoceV2Ipv4 | Network::RoceV2Ipv6);
        (!(is_routed && gid.address() == wanted), gid.rank())
    })?;
    let why = if gid.address() == wanted && gid.network != Network::RoceV1 {
        Why::ControlAddress
    } else {
        Why::First { control }
    };
    Some(Choice {
        device: port.device.clone(),
        port: port.number,
        gid,
        why,
    })
}

fn names(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect()
}

fn text(file: &Path) -> Option<String> {
    Some(fs::read_to_string(file).ok()?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "IB/RoCE v1";
    const V2: &str = "RoCE v2";

    fn gid(index: u8, address: &str, network: Network) -> Gid {
        let bytes = address.parse::<Ipv6Addr>().unwrap().octets();
        Gid {
            index,
            bytes,
            network,
        }
    }

    fn port(device: &str, state: &str, gids: Vec<Gid>) -> Port {
        Port {
            device: device.to_owned(),
            number: 1,
            state: state.to_owned(),
            link_layer: "Ethernet".to_owned(),
            gids,
        }
    }

    fn host() -> Vec<Port> {
        let gids = |address: &str| {
            vec![
                gid(0, "fe80::1", Network::RoceV1),
                gid(1, "fe80::1", Network::RoceV2Ipv6),
                gid(2, address, Network::RoceV1),
                gid(3, address, Network::RoceV2Ipv4),
            ]
        };
        vec![
            port("mlx5_0", "DOWN", gids("::ffff:10.0.0.9")),
            port("mlx5_1", "ACTIVE", gids("::ffff:10.0.1.1")),
            port("mlx5_2", "ACTIVE", gids("::ffff:10.0.2.1")),
        ]
    }

    fn chosen(control: &str, network: Option<Network>) -> Choice {
        choose(&host(), control.parse().unwrap(), network).unwrap()
    }

    #[test]
    fn the_gid_of_the_control_connection_is_taken_as_roce_v2() {
        let choice = chosen("10.0.2.1", None);
        assert_eq!((choice.device.as_str(), choice.gid.index), ("mlx5_2", 3));
        assert_eq!(
            choice.to_string(),
            "mlx5_2 port 1, GID 3 10.0.2.1 (RoCE v2 over IPv4), the address of the control \
             connection"
        );
    }

    #[test]
    fn without_such_a_gid_the_first_routed_one_of_an_active_port_is_taken() {
        for control in ["192.168.0.1", "10.0.0.9", "::1"] {
            let choice = chosen(control, None);
            assert_eq!((choice.device.as_str(), choice.gid.index), ("mlx5_1", 3));
            let expected = format!("as none is the control connection's {control}");
            assert!(choice.to_string().ends_with(&expected), "{choice}");
        }
    }

    #[test]
    fn the_other_ends_network_restricts_the_choice() {
        let choice = chosen("10.0.2.1", Some(Network::RoceV2Ipv6));
        assert_eq!((choice.device.as_str(), choice.gid.index), ("mlx5_1", 1));
        assert_eq!(
            choose(
                &host(),
                "10.0.2.1".parse().unwrap(),
                Some(Network::Infiniband)
            ),
            None
        );
    }

    #[test]
    fn a_host_without_an_active_port_has_nothing_to_choose() {
        let ports = [port("mlx5_0", "DOWN", host()[1].gids.clone())];
        assert_eq!(choose(&ports, "10.0.1.1".parse().unwrap(), None), None);
    }

    #[test]
    fn sysfs_is_read_as_the_kernel_writes_it() {
        let root = std::env::temp_dir().join(format!("step3rt-gid-{}", std::process::id()));
        let write = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("rxe0/ports/1/state", "4: ACTIVE\n");
        write("rxe0/ports/1/link_layer", "Ethernet\n");
        for (index, address, kind) in [
            (0, "fe80:0000:0000:0000:5054:00ff:fe12:3456", V1),
            (1, "0000:0000:0000:0000:0000:ffff:0a4d:0001", V2),
            (2, "0000:0000:0000:0000:0000:0000:0000:0000", V2),
        ] {
            write(
                &format!("rxe0/ports/1/gids/{index}"),
                &format!("{address}\n"),
            );
            write(
                &format!("rxe0/ports/1/gid_attrs/types/{index}"),
                &format!("{kind}\n"),
            );
        }
        write("mlx5_0/ports/1/state", "1: DOWN\n");
        write("mlx5_0/ports/1/link_layer", "InfiniBand\n");
        write(
            "mlx5_0/ports/1/gids/0",
            "fe80:0000:0000:0000:0000:0000:0000:0007\n",
        );
        let found = ports(&root);
        fs::remove_dir_all(&root).unwrap();

        let infiniband = Port {
            link_layer: "InfiniBand".to_owned(),
            ..port(
                "mlx5_0",
                "DOWN",
                vec![gid(0, "fe80::7", Network::Infiniband)],
            )
        };
        let rxe_gids = vec![
            gid(0, "fe80::5054:ff:fe12:3456", Network::RoceV1),
            gid(1, "::ffff:10.77.0.1", Network::RoceV2Ipv4),
        ];
        assert_eq!(found, [infiniband, port("rxe0", "ACTIVE", rxe_gids)]);
        assert_eq!(ports(&root), []);
    }
}
