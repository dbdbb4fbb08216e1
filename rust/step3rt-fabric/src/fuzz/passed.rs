//! What comes along with a hello over a Unix socket: descriptors, right ones and others.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use super::GEOMETRY;
use crate::doorbell::FutexDoorbell;
use crate::frame::Direction;
use crate::memory::{Mapping, Sharing};
use crate::region::Region;

pub(super) const NONE: u8 = 0;
pub(super) const RIGHT: u8 = 1;
const SLOTS_ONLY: u8 = 2;
const LARGE: u8 = 3;
const UNSEALED: u8 = 4;
const NO_MEMORY: u8 = 5;
pub(super) const NO_BELL: u8 = 6;

struct Memory {
    slots: OwnedFd,
    bell: OwnedFd,
    large: OwnedFd,
    unsealed: OwnedFd,
    other: OwnedFd,
    _mappings: (Region, FutexDoorbell, [Mapping; 2]),
}

pub(super) fn descriptors(passed: u8) -> Vec<BorrowedFd<'static>> {
    static MEMORY: OnceLock<Memory> = OnceLock::new();
    let memory = MEMORY.get_or_init(|| {
        let (region, slots) = Region::share(&GEOMETRY, Direction::A2f).expect("memory");
        let (doorbell, bell) = FutexDoorbell::create(0).expect("memory");
        let len = rustix::fs::fstat(&slots).expect("a memfd").st_size;
        let len = usize::try_from(len).expect("a few pages");
        let share = |len, sharing| Mapping::share("fuzz", len, sharing).expect("memory");
        let (first, large) = share(2 * len, Sharing::PeerReads);
        let (second, unsealed) = share(len, Sharing::PeerWrites);
        Memory {
            slots,
            bell,
            large,
            unsealed,
            other: std::fs::File::open("/dev/null").expect("a device").into(),
            _mappings: (region, doorbell, [first, second]),
        }
    });
    let Memory {
        slots,
        bell,
        large,
        unsealed,
        other,
        ..
    } = memory;
    let descriptors = match passed % 8 {
        NONE => vec![],
        RIGHT => vec![slots, bell],
        SLOTS_ONLY => vec![slots],
        LARGE => vec![large, bell],
        UNSEALED => vec![unsealed, bell],
        NO_MEMORY => vec![other, bell],
        NO_BELL => vec![slots, other],
        _ => vec![slots, bell, other],
    };
    descriptors.into_iter().map(AsFd::as_fd).collect()
}

/// As [`crate::shm::send`], for a message of any length.
pub(super) fn send(socket: &OwnedFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    let parts = [std::io::IoSlice::new(bytes)];
    sendmsg(socket, &parts, &mut control, SendFlags::NOSIGNAL).expect("fits the buffer");
}
