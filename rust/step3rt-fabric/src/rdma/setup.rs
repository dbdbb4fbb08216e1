//! Making a link: objects, offer, connection, and proof that packets pass.
//!
//! The handshake that carries the offers is not its business.

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config::LinkSettings;
use crate::contract::{Link, MAX_LANES};
use crate::lane::{Lanes, LinkTerms};
use crate::rdma::gid::{self, Choice, Network};
use crate::rdma::layout::{Completion, WC_SUCCESS};
use crate::rdma::library::PortFacts;
use crate::rdma::link::RdmaLink;
use crate::rdma::offer::{OFFER_BYTES, Offer, first_packet_number};
use crate::rdma::registered::Registered;
use crate::rdma::request::{Request, reason_of};
use crate::rdma::route::Route;
use crate::rdma::timing::DRAIN_TIMEOUT;
use crate::rdma::wire::{Wire, WireConfig};
use crate::rdma::{Devices, RdmaError};
use crate::region::Region;
use crate::state::LinkState;

/// Between two looks for the first packets' completions; nothing is hurried here.
const PATH_CHECK_PAUSE: Duration = Duration::from_micros(200);

/// One end of a link, before it is connected with the other.
pub(crate) struct Prepared {
    terms: LinkTerms,
    choice: Choice,
    facts: PortFacts,
    offer: Offer,
    pub(super) wire: Wire,
    pub(super) outgoing: Region,
    incoming: Region,
}

impl Prepared {
    /// Makes the connecting end. `control` is this end's address of the control connection.
    pub(crate) fn new(
        devices: &Devices,
        terms: LinkTerms,
        control: IpAddr,
    ) -> Result<Self, RdmaError> {
        Self::on(devices, terms, control, None)
    }

    /// Makes the accepting end for the connecting end's offer, and connects it.
    pub(crate) fn answer(
        devices: &Devices,
        terms: LinkTerms,
        control: IpAddr,
        offer: &[u8],
    ) -> Result<Self, RdmaError> {
        let theirs = Offer::decode(offer, terms.geometry.num_lanes)?;
        let mut prepared = Self::on(devices, terms, control, Some(theirs.network))?;
        prepared.connect_to(&theirs)?;
        Ok(prepared)
    }

    fn on(
        devices: &Devices,
        terms: LinkTerms,
        control: IpAddr,
        network: Option<Network>,
    ) -> Result<Self, RdmaError> {
        super::usable()?;
        let ports = gid::ports(Path::new(gid::SYSFS));
        let choice = gid::choose(&ports, control.to_canonical(), network).ok_or_else(|| {
            let network = network.map_or("no network".to_owned(), |network| network.to_string());
            RdmaError::NoCommonNetwork(network)
        })?;
        let device = devices.open(&choice.device)?;
        let facts = device.port(choice.port)?;
        let outgoing = Region::for_device(&terms.geometry, terms.side.sends())?;
        let incoming = Region::for_device(&terms.geometry, terms.side.receives())?;
        let wire = Wire::new(
            device,
            WireConfig {
                num_lanes: terms.geometry.num_lanes,
                max_message_bytes: usize::try_from(facts.max_message_bytes).unwrap_or(usize::MAX),
                max_frame_bytes: outgoing.max_frame_bytes(),
                outgoing: Registered::new(&outgoing),
                incoming: Registered::new(&incoming),
            },
        )?;
        let (slots_at, rkey) = wire.incoming_key();
        let mut queue_pairs = [0; MAX_LANES as usize];
        for (place, number) in queue_pairs.iter_mut().zip(wire.queue_pair_numbers()) {
            *place = number;
        }
        let offer = Offer {
            network: choice.gid.network,
            mtu_code: facts.mtu_code,
            lid: facts.lid,
            psn: first_packet_number()?,
            rkey,
            slots_at,
            gid: choice.gid.bytes,
            queue_pairs,
        };
        Ok(Self {
            terms,
            choice,
            facts,
            offer,
            wire,
            outgoing,
            incoming,
        })
    }

    /// What the other end must know.
    pub(crate) fn offer(&self) -> [u8; OFFER_BYTES] {
        self.offer.encode()
    }

    /// Connects this, the connecting end, with an accepting end that is connected, and sees that
    /// packets pass both ways.
    pub(crate) fn connect(&mut self, offer: &[u8]) -> Result<(), RdmaError> {
        let theirs = Offer::decode(offer, self.terms.geometry.num_lanes)?;
        if theirs.network != self.choice.gid.network {
            return Err(RdmaError::NoCommonNetwork(theirs.network.to_string()));
        }
        self.connect_to(&theirs)?;
        self.check_path()
    }

    fn connect_to(&mut self, theirs: &Offer) -> Result<(), RdmaError> {
        // The first half of a GID is the subnet's; beyond it, packets are routed by the GID.
        let is_one_subnet = theirs.gid[..8] == self.offer.gid[..8];
        let route = Route {
            port: self.choice.port,
            gid_index: self.choice.gid.index,
            mtu_code: theirs.mtu_code.min(self.facts.mtu_code),
            remote_gid: theirs.gid,
            remote_lid: (theirs.network == Network::Infiniband && is_one_subnet)
                .then_some(theirs.lid),
            local_psn: self.offer.psn,
            remote_psn: theirs.psn,
        };
        let remote = (theirs.slots_at, theirs.rkey);
        self.wire.connect(&route, &theirs.queue_pairs, remote)
    }

    /// Writes nothing on each queue pair and awaits the acknowledgements: two ends that share a
    /// control network and no RDMA network are found out here, while another fabric can be tried.
    fn check_path(&self) -> Result<(), RdmaError> {
        let no_path = |why| RdmaError::NoPath {
            path: self.choice.to_string(),
            why,
        };
        for lane in self.outgoing.lanes() {
            self.wire.post_probe(lane)?;
        }
        let mut num_missing = self.terms.geometry.num_lanes;
        let mut completions = [Completion::default(); 8];
        let started = Instant::now();
        while num_missing > 0 {
            let found = self.wire.poll(&mut completions)?;
            for completion in &completions[..found] {
                if completion.status != WC_SUCCESS {
                    return Err(no_path(reason_of(completion.status).0));
                }
                num_missing -= u8::from(matches!(Request::of(completion), Some(Request::Probe(_))));
            }
            if found == 0 {
                if started.elapsed() > DRAIN_TIMEOUT {
                    return Err(no_path("the device does not report"));
                }
                std::thread::sleep(PATH_CHECK_PAUSE);
            }
        }
        Ok(())
    }

    /// Starts the link. `control` is the control connection, silent from now on.
    pub(crate) fn into_link(
        self,
        control: OwnedFd,
        state: Arc<LinkState>,
        settings: &LinkSettings,
    ) -> std::io::Result<Box<dyn Link>> {
        let lanes = Lanes::new(self.terms, self.outgoing, self.incoming);
        let path = self.choice.to_string();
        let link = RdmaLink::new(lanes, (self.wire, path), (control, state), settings)?;
        Ok(Box::new(link))
    }
}
