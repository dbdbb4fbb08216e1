//! A simulated fabric: two ends in one process, with delays and faults that one seed decides.
//!
//! For testing what lies above the contract. It checks frames with the code that the real fabrics
//! use, but takes a lock per call, which they never do.
//!
//! What happens to a frame depends on the seed, its direction, lane and sequence number alone, and
//! time is counted in polls of the receiving end: the same calls give the same events, also when
//! the two ends are driven by two threads.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use step3rt_core::ids::{Epoch, LaneId};
use thiserror::Error;

use crate::contract::{
    Doorbell, DownReason, Geometry, GeometryError, Link, LinkEvent, LinkIdentity, PushError, Side,
    SlotMemory,
};
use crate::frame::{Frame, FrameHeader, HEADER_BYTES};
use crate::lane::{Lanes, LinkTerms};
use crate::region::Region;
use crate::state::LinkState;

/// Chances are given in parts of this.
pub const ONE_MILLION: u32 = 1_000_000;

/// What may happen to a frame. The default is nothing: it arrives at the next poll.
#[derive(Clone, Copy, Debug, Default)]
pub struct SimFaults {
    /// A frame waits for 0 to this many polls of the receiving end; lanes overtake each other.
    pub max_delay_polls: u32,
    /// Chance, per frame, that the link drops instead; frames on their way are lost.
    pub drop_link_ppm: u32,
    /// Chance, per frame, that it carries an epoch before the sender's.
    pub stale_epoch_ppm: u32,
    /// Chance, per frame, that one bit of its header is flipped.
    pub corrupt_header_ppm: u32,
}

/// One simulated link.
#[derive(Clone, Copy, Debug)]
pub struct SimConfig {
    /// Decides everything.
    pub seed: u64,
    /// Of both ends.
    pub geometry: Geometry,
    /// What may happen.
    pub faults: SimFaults,
}

/// One end of a simulated link, before it exists.
#[derive(Clone)]
pub struct SimEnd {
    /// Who it is.
    pub identity: LinkIdentity,
    /// Rung when [`Link::poll`] has something new for it.
    pub doorbell: Arc<dyn Doorbell>,
}

/// Why a simulated link could not be made.
#[derive(Debug, Error)]
pub enum SimError {
    /// Sizes that no link can have.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// No memory for the slots.
    #[error("cannot make the slots: {0}")]
    System(#[from] io::Error),
}

/// Links an initiator to a responder; returns their ends in this order.
pub fn pair(
    config: SimConfig,
    initiator: &SimEnd,
    responder: &SimEnd,
) -> Result<(SimLink, SimLink), SimError> {
    config.geometry.validate()?;
    let ends = [initiator, responder];
    let sides = [Side::Initiator, Side::Responder];
    let mut outgoing = Vec::with_capacity(ends.len());
    for side in sides {
        outgoing.push(Region::private(&config.geometry, side.sends())?);
    }
    let states = ends.map(|end| Arc::new(LinkState::new(Arc::clone(&end.doorbell))));
    let num_lanes = usize::from(config.geometry.num_lanes);
    let wire = Arc::new(Mutex::new(Wire {
        on_way: vec![[None, None]; num_lanes],
    }));
    let make = |own: usize| -> Result<SimLink, SimError> {
        let terms = LinkTerms {
            local: ends[own].identity,
            peer: ends[1 - own].identity,
            side: sides[own],
            geometry: config.geometry,
            payload_checksum: false,
        };
        let incoming = Region::private(&config.geometry, sides[own].receives())?;
        Ok(SimLink {
            lanes: Lanes::new(terms, outgoing[own].clone(), incoming),
            peer_outgoing: outgoing[1 - own].clone(),
            own,
            config,
            wire: Arc::clone(&wire),
            state: Arc::clone(&states[own]),
            peer_state: Arc::clone(&states[1 - own]),
            is_down_reported: false,
        })
    };
    Ok((make(0)?, make(1)?))
}

/// A frame between the ends; its payload stays in the sender's slot, as the sender may not touch
/// that before the answer.
#[derive(Clone, Copy)]
struct OnWay {
    delay_polls: u64,
    header: [u8; HEADER_BYTES],
    sequence: u64,
    payload_bytes: usize,
}

struct Wire {
    /// Per lane, what each end (0 initiator, 1 responder) has sent; alternation allows one at most.
    on_way: Vec<[Option<OnWay>; 2]>,
}

/// One end of a simulated link.
pub struct SimLink {
    lanes: Lanes,
    peer_outgoing: Region,
    /// 0 initiator, 1 responder.
    own: usize,
    config: SimConfig,
    wire: Arc<Mutex<Wire>>,
    state: Arc<LinkState>,
    peer_state: Arc<LinkState>,
    is_down_reported: bool,
}

/// What the seed holds for one frame.
struct Fate {
    delay_polls: u64,
    drops_link: bool,
    is_stale: bool,
    flipped_bit: Option<u64>,
}

impl SimLink {
    fn wire(&self) -> MutexGuard<'_, Wire> {
        self.wire.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fate(&self, lane: LaneId, sequence: u64) -> Fate {
        let SimConfig { seed, faults, .. } = self.config;
        let mut state = [self.own as u64, lane.0.into(), sequence]
            .into_iter()
            .fold(seed, mix);
        let mut draw = |below: u64| {
            state = mix(state, 0);
            state % below
        };
        let delay_polls = draw(u64::from(faults.max_delay_polls) + 1);
        let mut strikes = |ppm: u32| draw(ONE_MILLION.into()) < u64::from(ppm);
        let drops_link = strikes(faults.drop_link_ppm);
        let is_stale = strikes(faults.stale_epoch_ppm);
        let is_corrupt = strikes(faults.corrupt_header_ppm);
        let bit = draw(8 * HEADER_BYTES as u64);
        Fate {
            delay_polls,
            drops_link,
            is_stale,
            flipped_bit: is_corrupt.then_some(bit),
        }
    }

    /// Moves what is due into this end's slots; all of it when the peer has closed.
    fn deliver(&mut self) {
        let is_over = self.state.down().is_some();
        let mut wire = self.wire.lock().unwrap_or_else(PoisonError::into_inner);
        let mut is_waiting = false;
        for (lane, on_way) in self.lanes.incoming.lanes().zip(&mut wire.on_way) {
            let slot = &mut on_way[1 - self.own];
            match slot {
                Some(frame) if frame.delay_polls > 0 && !is_over => {
                    frame.delay_polls -= 1;
                    is_waiting = true;
                }
                Some(frame) => {
                    let incoming = &self.lanes.incoming;
                    incoming.copy_payload(lane, &self.peer_outgoing, frame.payload_bytes);
                    incoming.write_header(lane, &frame.header);
                    incoming.publish(lane, frame.sequence);
                    *slot = None;
                }
                None => {}
            }
        }
        drop(wire);
        if is_waiting {
            // Time is counted in polls: whoever sleeps for the next event has to poll for it.
            self.state.ring();
        }
    }
}

/// One step of `SplitMix64`, with `value` folded in.
fn mix(state: u64, value: u64) -> u64 {
    let mut z = (state ^ value).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Link for SimLink {
    fn peer(&self) -> LinkIdentity {
        self.lanes.terms.peer
    }

    fn fabric(&self) -> &'static str {
        "sim"
    }

    fn send_slot(&self, lane: LaneId) -> Option<Arc<dyn SlotMemory>> {
        self.lanes.outgoing.slot(lane)
    }

    fn receive_slot(&self, lane: LaneId) -> Option<Arc<dyn SlotMemory>> {
        self.lanes.incoming.slot(lane)
    }

    fn push(&mut self, lane: LaneId, frame: Frame) -> Result<(), PushError> {
        if let Some(reason) = self.state.down() {
            return Err(PushError::Down(reason.clone()));
        }
        let sequence = self.lanes.begin_push(lane, frame)?;
        let fate = self.fate(lane, sequence);
        if fate.drops_link {
            self.wire().on_way.fill([None, None]);
            self.state.fail(DownReason::PeerClosed);
            self.peer_state.fail(DownReason::PeerClosed);
            return Ok(());
        }
        let mut header = self.lanes.outgoing.read_header(lane);
        if fate.is_stale {
            let fresh = FrameHeader::decode(&header).expect("this end has just written it");
            let epoch = Epoch(fresh.epoch.0.wrapping_sub(1));
            header = FrameHeader { epoch, ..fresh }.encode();
        }
        if let Some(bit) = fate.flipped_bit {
            let byte = usize::try_from(bit / 8).expect("a bit of the header");
            header[byte] ^= 1 << (bit % 8);
        }
        let (delay_polls, payload_bytes) = (fate.delay_polls, frame.payload_bytes);
        self.wire().on_way[usize::from(lane.0)][self.own] = Some(OnWay {
            delay_polls,
            header,
            sequence,
            payload_bytes,
        });
        self.peer_state.ring();
        Ok(())
    }

    fn ask_reset(&mut self, reason: &str) -> io::Result<()> {
        self.peer_state.ask_reset(reason.to_owned());
        Ok(())
    }

    fn poll(&mut self, out: &mut Vec<LinkEvent>) {
        self.deliver();
        self.state
            .poll_lanes(&mut self.lanes, &mut self.is_down_reported, out);
    }
}

impl Drop for SimLink {
    fn drop(&mut self) {
        self.peer_state.fail(DownReason::PeerClosed);
    }
}
