//! The slots of one direction of one link, laid out in one mapping, with their headers and flags.
//!
//! It publishes and takes frames; whether a frame is due is the lane's business.
//!
//! ```text
//! 0           128         128·L                                         128·L + stride
//! ├ flag 0 ───┼ flag 1 ───┼ ... ┼ header 0 (64) │ payload 0 (slot_bytes) │ pad to 64 ┼ header 1 ... ┼ notes
//! ```
//! A flag is the sequence number of the last frame published on the lane: the header and payload
//! are written first, the flag is stored with release and loaded with acquire. Header and payload
//! are contiguous, so that a frame is one range for a system call too; and so are the notes by which a
//! fabric that sends ranges asks for a new link, once.

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use step3rt_core::ids::LaneId;

use crate::contract::{Geometry, SlotMemory};
use crate::frame::{Direction, FrameHeader, HEADER_BYTES, ProtocolError};
use crate::memory::{MapError, Mapping, PAGE_BYTES, SharedMapping, Sharing, SlotBytes, WORD_BYTES};
use crate::reset_ask::{self, NOTE_BYTES};
use crate::sync::Ordering;

/// Two cache lines, because x86 fetches them in pairs and some ARM lines are that long.
const FLAG_STRIDE_BYTES: usize = 128;
const SLOT_ALIGN_BYTES: usize = 64;

/// Where things lie; a pure function of the geometry, so that both ends agree.
#[derive(Clone, Copy, Debug)]
struct Layout {
    num_lanes: u8,
    slot_bytes: usize,
}

impl Layout {
    fn header_at(self, lane: LaneId) -> usize {
        let stride = HEADER_BYTES + self.slot_bytes.next_multiple_of(SLOT_ALIGN_BYTES);
        usize::from(self.num_lanes) * FLAG_STRIDE_BYTES + usize::from(lane.0) * stride
    }

    fn payload_at(self, lane: LaneId) -> usize {
        self.header_at(lane) + HEADER_BYTES
    }

    fn notes_at(self) -> usize {
        self.header_at(LaneId(self.num_lanes))
    }

    fn total_bytes(self) -> usize {
        (self.notes_at() + MAX_NOTES_BYTES).next_multiple_of(PAGE_BYTES)
    }
}

/// All slots of one direction.
#[derive(Clone, Debug)]
pub(crate) struct Region {
    mapping: SharedMapping,
    layout: Layout,
}

/// Room for the notes of the longest reason.
const MAX_NOTES_BYTES: usize = reset_ask::MAX_NOTES * NOTE_BYTES;

impl Region {
    /// Makes the slots that this process writes and a peer reads.
    pub(crate) fn share(geometry: &Geometry, direction: Direction) -> io::Result<(Self, OwnedFd)> {
        let layout = layout(geometry, direction);
        let (mapping, fd) =
            Mapping::share("step3rt-slots", layout.total_bytes(), Sharing::PeerReads)?;
        Ok((
            Self {
                mapping: SharedMapping::new(mapping),
                layout,
            },
            fd,
        ))
    }

    /// Maps the slots that a peer writes.
    pub(crate) fn open(
        fd: &OwnedFd,
        geometry: &Geometry,
        direction: Direction,
    ) -> Result<Self, MapError> {
        let layout = layout(geometry, direction);
        let mapping = Mapping::open(fd, layout.total_bytes(), Sharing::PeerReads)?;
        Ok(Self {
            mapping: SharedMapping::new(mapping),
            layout,
        })
    }

    /// Makes slots that only this process sees.
    pub(crate) fn private(geometry: &Geometry, direction: Direction) -> io::Result<Self> {
        let layout = layout(geometry, direction);
        let mapping = Mapping::private(layout.total_bytes())?;
        Ok(Self {
            mapping: SharedMapping::new(mapping),
            layout,
        })
    }

    /// Makes slots that this process and its device see.
    #[cfg(feature = "rdma")]
    pub(crate) fn for_device(geometry: &Geometry, direction: Direction) -> io::Result<Self> {
        let layout = layout(geometry, direction);
        let mapping = SharedMapping::new(Mapping::for_device(layout.total_bytes())?);
        Ok(Self { mapping, layout })
    }

    /// What keeps the memory mapped.
    #[cfg(feature = "rdma")]
    pub(crate) fn shared_mapping(&self) -> SharedMapping {
        SharedMapping::clone(&self.mapping)
    }

    /// All headers and slots, without the flags: what a device may touch.
    #[cfg(feature = "rdma")]
    pub(crate) fn frames_range(&self) -> Range<usize> {
        self.layout.header_at(LaneId(0))..self.layout.total_bytes()
    }

    /// Bytes of a full slot with its header.
    #[cfg(feature = "rdma")]
    pub(crate) fn max_frame_bytes(&self) -> usize {
        HEADER_BYTES + self.slot_bytes()
    }

    /// The payload bytes of a lane, `None` when there is no such lane.
    pub(crate) fn slot(&self, lane: LaneId) -> Option<Arc<dyn SlotMemory>> {
        let start = self.layout.payload_at(lane);
        let slot = || {
            SlotBytes::new(
                SharedMapping::clone(&self.mapping),
                start..start + self.slot_bytes(),
            )
        };
        (lane.0 < self.layout.num_lanes).then(|| Arc::new(slot()) as Arc<dyn SlotMemory>)
    }

    /// Capacity of each slot.
    pub(crate) fn slot_bytes(&self) -> usize {
        self.layout.slot_bytes
    }

    /// Every lane.
    pub(crate) fn lanes(&self) -> impl Iterator<Item = LaneId> + use<> {
        (0..self.layout.num_lanes).map(LaneId)
    }

    /// The memory that [`Region::frame_range`] lies in.
    pub(crate) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// Header and payload of a lane as one range of [`Region::mapping`].
    pub(crate) fn frame_range(&self, lane: LaneId, payload_bytes: usize) -> Range<usize> {
        let start = self.layout.header_at(lane);
        start..start + HEADER_BYTES + payload_bytes
    }

    /// Writes the header into the slot's head.
    pub(crate) fn write_header(&self, lane: LaneId, header: &[u8; HEADER_BYTES]) {
        let start = self.layout.header_at(lane);
        for (i, word) in header.chunks_exact(WORD_BYTES).enumerate() {
            let word = u64::from_ne_bytes(word.try_into().expect("chunks are of a word's size"));
            self.mapping
                .store_u64(start + i * WORD_BYTES, word, Ordering::Relaxed);
        }
    }

    /// Copies the header out of the slot's head. Done once per frame: what a peer changes after it
    /// was checked is not looked at.
    pub(crate) fn read_header(&self, lane: LaneId) -> [u8; HEADER_BYTES] {
        let start = self.layout.header_at(lane);
        let mut header = [0; HEADER_BYTES];
        for (i, word) in header.chunks_exact_mut(WORD_BYTES).enumerate() {
            let value = self
                .mapping
                .load_u64(start + i * WORD_BYTES, Ordering::Relaxed);
            word.copy_from_slice(&value.to_ne_bytes());
        }
        header
    }

    /// Writes the notes that ask for a new link because of `reason`, and returns where they lie; `None`
    /// when they were written before, and so are on their way.
    pub(crate) fn write_notes(&self, reason: &str) -> Option<Range<usize>> {
        let start = self.layout.notes_at();
        if self.mapping.load_u64(start, Ordering::Relaxed) != 0 {
            return None;
        }
        let notes = reset_ask::encode(reason).concat();
        for (i, word) in notes.chunks_exact(WORD_BYTES).enumerate() {
            let word = u64::from_ne_bytes(word.try_into().expect("chunks are of a word's size"));
            self.mapping
                .store_u64(start + i * WORD_BYTES, word, Ordering::Relaxed);
        }
        Some(start..start + notes.len())
    }

    /// Makes header and payload visible to the consumer, as frame `sequence` of the lane.
    pub(crate) fn publish(&self, lane: LaneId, sequence: u64) {
        self.mapping
            .store_u64(flag_at(lane), sequence, Ordering::Release);
    }

    /// The sequence number last published on the lane.
    pub(crate) fn published(&self, lane: LaneId) -> u64 {
        self.mapping.load_u64(flag_at(lane), Ordering::Acquire)
    }

    /// CRC-32 of the first `payload_bytes` bytes of a slot.
    pub(crate) fn payload_checksum(&self, lane: LaneId, payload_bytes: usize) -> u32 {
        let start = self.layout.payload_at(lane);
        let mut hasher = crc32fast::Hasher::new();
        for offset in (0..payload_bytes).step_by(WORD_BYTES) {
            // Slots are padded to whole words, so the last one may be read whole.
            let word = self
                .mapping
                .load_u64(start + offset, Ordering::Relaxed)
                .to_ne_bytes();
            hasher.update(&word[..WORD_BYTES.min(payload_bytes - offset)]);
        }
        hasher.finalize()
    }

    /// Checks the payload against the checksum that its header carries, if it carries one.
    pub(crate) fn verify_payload(&self, header: &FrameHeader) -> Result<(), ProtocolError> {
        let Some(found) = header.payload_checksum else {
            return Ok(());
        };
        let computed = self.payload_checksum(header.lane, header.frame.payload_bytes);
        if found == computed {
            Ok(())
        } else {
            Err(ProtocolError::PayloadChecksum { found, computed })
        }
    }

    /// Copies the first `payload_bytes` bytes of a lane's slot from another region of the layout.
    pub(crate) fn copy_payload(&self, lane: LaneId, source: &Self, payload_bytes: usize) {
        let (to, from) = (self.layout.payload_at(lane), source.layout.payload_at(lane));
        for offset in (0..payload_bytes).step_by(WORD_BYTES) {
            let word = source.mapping.load_u64(from + offset, Ordering::Relaxed);
            self.mapping.store_u64(to + offset, word, Ordering::Relaxed);
        }
    }
}

fn flag_at(lane: LaneId) -> usize {
    usize::from(lane.0) * FLAG_STRIDE_BYTES
}

fn layout(geometry: &Geometry, direction: Direction) -> Layout {
    Layout {
        num_lanes: geometry.num_lanes,
        slot_bytes: geometry.slot_bytes(direction),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_aligned_and_do_not_overlap() {
        let geometry = Geometry {
            num_lanes: 3,
            a2f_slot_bytes: 100,
            f2a_slot_bytes: 1,
        };
        let region = Region::private(&geometry, Direction::A2f).unwrap();
        let mut last_end = 3 * FLAG_STRIDE_BYTES;
        for lane in region.lanes() {
            let frame = region.frame_range(lane, 100);
            assert!(frame.start >= last_end);
            last_end = frame.end;
            let slot = region.slot(lane).unwrap();
            assert_eq!(slot.len(), 100);
            assert_eq!(slot.as_ptr() as usize % 64, 0);
        }
        assert!(last_end <= region.layout.total_bytes());
        assert!(region.slot(LaneId(3)).is_none());
    }

    #[test]
    fn a_header_is_read_as_it_was_written_and_a_slot_outlives_its_region() {
        let geometry = Geometry {
            num_lanes: 1,
            a2f_slot_bytes: 8,
            f2a_slot_bytes: 8,
        };
        let (ours, fd) = Region::share(&geometry, Direction::F2a).unwrap();
        let theirs = Region::open(&fd, &geometry, Direction::F2a).unwrap();
        let header = std::array::from_fn(|i| u8::try_from(i).unwrap());
        ours.write_header(LaneId(0), &header);
        ours.publish(LaneId(0), 5);
        assert_eq!(theirs.published(LaneId(0)), 5);
        assert_eq!(theirs.read_header(LaneId(0)), header);
        let slot = theirs.slot(LaneId(0)).unwrap();
        drop((ours, theirs, fd));
        assert_eq!(slot.len(), 8);
    }
}
