//! Memory that slots lie in: sealed memfds shared between processes, and private memory.
//!
//! With `pages`, which maps them, and `rdma`'s calls of libibverbs, all of the crate's `unsafe`. It never forms a reference to slot bytes: other processes, the
//! kernel and the embedding program write them, so they are reached by raw pointer, by system call
//! or through atomics only.

#![allow(
    unsafe_code,
    reason = "reaches mapped memory by pointer and does I/O on it"
)]

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use thiserror::Error;

use crate::contract::SlotMemory;
use crate::pages::Pages;
use crate::sync::{Arc, AtomicU32, AtomicU64, Ordering};

/// Mappings are whole pages of this size; a multiple of it is fine where pages are larger, because
/// `mmap` rounds up itself. Small in models, which keep a history of each word.
pub(crate) const PAGE_BYTES: usize = if cfg!(loom) { 256 } else { 4096 };

/// Slot bytes are copied and summed by words: atomics, because another process may write them.
pub(crate) const WORD_BYTES: usize = size_of::<u64>();

/// What the other process may do with a memfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sharing {
    /// Only the creator writes. The seal also forbids punching holes, so that reading the mapping
    /// can never fault.
    PeerReads,
    /// Both write.
    PeerWrites,
}

/// Why a received memfd was not mapped.
#[derive(Debug, Error)]
pub enum MapError {
    /// A memfd of another size than agreed.
    #[error("shared memory has {found} bytes where {expected} were agreed")]
    Size {
        /// Of the memfd.
        found: u64,
        /// By the geometry.
        expected: usize,
    },
    /// Without the seals the peer could shrink it under our feet.
    #[error("shared memory has seals {found:#x}, {expected:#x} are needed")]
    Seals {
        /// Of the memfd.
        found: u32,
        /// Needed.
        expected: u32,
    },
    /// The operating system refused.
    #[error("shared memory cannot be mapped: {0}")]
    System(#[from] io::Error),
}

/// A mapped range, unmapped when the last owner drops it.
#[derive(Debug)]
pub(crate) struct Mapping {
    pages: Pages,
    is_writable: bool,
}

/// A mapping that slots, links and devices hold on to together.
pub(crate) type SharedMapping = Arc<Mapping>;

// SAFETY: the range stays mapped until Drop, which needs the last owner; all accesses go through
// atomics, system calls or raw pointers, none of which depend on the thread.
unsafe impl Send for Mapping {}
// SAFETY: as for Send; no method forms a reference to plain bytes.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Makes a sealed memfd of `len` bytes, allocated in full and zeroed, and maps it for writing.
    pub(crate) fn share(name: &str, len: usize, sharing: Sharing) -> io::Result<(Self, OwnedFd)> {
        let (pages, fd) = Pages::share(name, len, sharing)?;
        Ok((Self::of(pages, true), fd))
    }

    /// Maps a memfd that a peer made with [`Mapping::share`], after checking its size and seals.
    pub(crate) fn open(fd: &OwnedFd, len: usize, sharing: Sharing) -> Result<Self, MapError> {
        let pages = Pages::open(fd, len, sharing)?;
        Ok(Self::of(pages, sharing == Sharing::PeerWrites))
    }

    /// Maps private, zeroed memory.
    pub(crate) fn private(len: usize) -> io::Result<Self> {
        Ok(Self::of(Pages::private(len)?, true))
    }

    /// Maps zeroed memory for a device to read and write. Shared, because after a fork a first store
    /// to private memory moves it to other pages, which the device does not know.
    #[cfg(feature = "rdma")]
    pub(crate) fn for_device(len: usize) -> io::Result<Self> {
        Ok(Self::of(Pages::for_device(len)?, true))
    }

    fn of(pages: Pages, is_writable: bool) -> Self {
        Self { pages, is_writable }
    }

    /// The 32-bit word at `offset`, for futexes. Panics outside of the mapping, when misaligned, and
    /// on memory that this process may not write.
    pub(crate) fn u32_at(&self, offset: usize) -> &AtomicU32 {
        assert!(
            self.is_writable,
            "an atomic that may be stored to needs writable memory"
        );
        let pointer = self.at(offset, size_of::<u32>(), size_of::<u32>());
        // SAFETY: in bounds and aligned (checked by `at`), mapped for as long as `self` lives, and
        // only ever accessed as an atomic, here and by other processes.
        unsafe { AtomicU32::from_ptr(pointer.cast()) }
    }

    /// Loads the 64-bit word at `offset`. Panics outside of the mapping or when misaligned.
    pub(crate) fn load_u64(&self, offset: usize, ordering: Ordering) -> u64 {
        let pointer = self.at(offset, WORD_BYTES, WORD_BYTES);
        // SAFETY: in bounds and aligned (checked by `at`), mapped for as long as `self` lives. Atomic
        // loads of this size are allowed on read-only memory.
        unsafe { AtomicU64::from_ptr(pointer.cast()) }.load(ordering)
    }

    /// Stores the 64-bit word at `offset`. Panics as [`Mapping::u32_at`] does.
    pub(crate) fn store_u64(&self, offset: usize, value: u64, ordering: Ordering) {
        assert!(self.is_writable, "a store needs writable memory");
        let pointer = self.at(offset, WORD_BYTES, WORD_BYTES);
        // SAFETY: in bounds, aligned and writable (checked), mapped for as long as `self` lives.
        unsafe { AtomicU64::from_ptr(pointer.cast()) }.store(value, ordering);
    }

    /// Sends bytes of the mapping on a socket; may send fewer, as the system call does.
    pub(crate) fn send(
        &self,
        socket: impl AsFd,
        range: Range<usize>,
        flags: i32,
    ) -> io::Result<usize> {
        let pointer = self.at(range.start, range.len(), 1);
        let socket = socket.as_fd().as_raw_fd();
        // SAFETY: the kernel reads `range`, which is in bounds (checked by `at`) and mapped until
        // `self` drops; what it reads while somebody writes is theirs to answer for.
        let sent = unsafe {
            libc::send(
                socket,
                pointer.cast(),
                range.len(),
                flags | libc::MSG_NOSIGNAL,
            )
        };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    /// Receives into the mapping from a socket; 0 when the peer has closed.
    pub(crate) fn receive(&self, socket: impl AsFd, range: Range<usize>) -> io::Result<usize> {
        assert!(self.is_writable, "receiving needs writable memory");
        let pointer = self.at(range.start, range.len(), 1);
        let socket = socket.as_fd().as_raw_fd();
        // SAFETY: the kernel writes `range`, which is in bounds (checked by `at`), writable and
        // mapped until `self` drops. The lane's credit says that nobody reads it meanwhile; who
        // does all the same sees torn bytes and no more.
        let received = unsafe { libc::recv(socket, pointer.cast(), range.len(), 0) };
        usize::try_from(received).map_err(|_| io::Error::last_os_error())
    }

    /// Copies bytes of the mapping out, as sending them would.
    #[cfg(feature = "tls")]
    pub(crate) fn copy_out(&self, offset: usize, bytes: &mut [u8]) {
        let pointer = self.at(offset, bytes.len(), 1);
        // SAFETY: in bounds (checked by `at`) and mapped until `self` drops; `bytes` is Rust's own
        // memory and so no part of it. As for `send`, whoever writes meanwhile answers for it.
        unsafe { pointer.copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
    }

    /// Copies bytes into the mapping, as receiving them would.
    #[cfg(feature = "tls")]
    pub(crate) fn copy_in(&self, offset: usize, bytes: &[u8]) {
        assert!(self.is_writable, "receiving needs writable memory");
        let pointer = self.at(offset, bytes.len(), 1);
        // SAFETY: in bounds (checked by `at`), writable and mapped until `self` drops; `bytes` is
        // Rust's own memory and so no part of it. As for `receive`, the lane's credit says that
        // nobody reads it meanwhile.
        unsafe { pointer.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// The byte at `offset`. Panics when `len` bytes from there are not all in the mapping.
    pub(crate) fn at(&self, offset: usize, len: usize, align: usize) -> *mut u8 {
        let end = offset.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= self.pages.len()) && offset.is_multiple_of(align),
            "{len} bytes at {offset} are misaligned or outside of a mapping of {} bytes",
            self.pages.len()
        );
        // SAFETY: `offset` is at most `len` (just checked), so the result stays in the allocation.
        unsafe { self.pages.base().as_ptr().add(offset) }
    }
}

/// The payload bytes of one slot; keeps its mapping alive.
#[derive(Debug)]
pub(crate) struct SlotBytes {
    mapping: SharedMapping,
    range: Range<usize>,
}

impl SlotBytes {
    /// Panics when `range` is not within the mapping or does not start at a multiple of 64. What
    /// follows it up to the next multiple of 8 must be nobody's.
    pub(crate) fn new(mapping: SharedMapping, range: Range<usize>) -> Self {
        mapping.at(range.start, range.len(), 64);
        Self { mapping, range }
    }
}

impl SlotMemory for SlotBytes {
    fn as_ptr(&self) -> *mut u8 {
        self.mapping.at(self.range.start, self.range.len(), 64)
    }

    fn len(&self) -> usize {
        self.range.len()
    }

    fn write(&self, bytes: &[u8]) {
        assert!(
            bytes.len() <= self.len(),
            "{} bytes for a slot of {}",
            bytes.len(),
            self.len()
        );
        for (i, chunk) in bytes.chunks(WORD_BYTES).enumerate() {
            let offset = self.range.start + i * WORD_BYTES;
            // Slots are padded to whole words; bytes after the last chunk keep their value.
            let mut word = self
                .mapping
                .load_u64(offset, Ordering::Relaxed)
                .to_ne_bytes();
            word[..chunk.len()].copy_from_slice(chunk);
            self.mapping
                .store_u64(offset, u64::from_ne_bytes(word), Ordering::Relaxed);
        }
    }

    fn read(&self, bytes: &mut [u8]) {
        assert!(
            bytes.len() <= self.len(),
            "{} bytes of a slot of {}",
            bytes.len(),
            self.len()
        );
        for (i, chunk) in bytes.chunks_mut(WORD_BYTES).enumerate() {
            let offset = self.range.start + i * WORD_BYTES;
            let word = self
                .mapping
                .load_u64(offset, Ordering::Relaxed)
                .to_ne_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_store_of_the_creator_is_seen_through_the_passed_fd() {
        let (ours, fd) = Mapping::share("test", PAGE_BYTES, Sharing::PeerReads).unwrap();
        let theirs = Mapping::open(&fd, PAGE_BYTES, Sharing::PeerReads).unwrap();
        ours.store_u64(64, 0xfeed, Ordering::Release);
        assert_eq!(theirs.load_u64(64, Ordering::Acquire), 0xfeed);
    }

    #[test]
    fn memory_of_another_size_or_that_others_may_write_is_refused() {
        let (_ours, fd) = Mapping::share("test", PAGE_BYTES, Sharing::PeerWrites).unwrap();
        let error = Mapping::open(&fd, 2 * PAGE_BYTES, Sharing::PeerWrites).unwrap_err();
        assert!(
            matches!(
                error,
                MapError::Size {
                    found: 4096,
                    expected: 8192
                }
            ),
            "{error}"
        );
        let error = Mapping::open(&fd, PAGE_BYTES, Sharing::PeerReads).unwrap_err();
        assert!(matches!(error, MapError::Seals { .. }), "{error}");
    }

    #[test]
    fn bytes_go_from_one_mapping_by_a_socket_into_another() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (far, _) = listener.accept().unwrap();
        let [from, to] = [(); 2].map(|()| Mapping::private(PAGE_BYTES).unwrap());
        from.store_u64(64, 0xfeed, Ordering::Relaxed);
        assert_eq!(from.send(&near, 64..72, 0).unwrap(), 8);
        let mut missing = 128..136;
        while !missing.is_empty() {
            missing.start += to.receive(&far, missing.clone()).unwrap();
        }
        assert_eq!(to.load_u64(128, Ordering::Relaxed), 0xfeed);
        drop(near);
        assert_eq!(to.receive(&far, 0..PAGE_BYTES).unwrap(), 0);
    }

    #[test]
    #[should_panic(expected = "outside of a mapping")]
    fn receiving_past_the_end_of_a_mapping_panics() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let memory = Mapping::private(PAGE_BYTES).unwrap();
        let _ = memory.receive(&listener, PAGE_BYTES - 1..PAGE_BYTES + 1);
    }

    #[test]
    #[should_panic(expected = "outside of a mapping")]
    fn a_word_outside_of_the_mapping_panics() {
        Mapping::private(PAGE_BYTES)
            .unwrap()
            .load_u64(PAGE_BYTES - 4, Ordering::Relaxed);
    }

    #[test]
    #[should_panic(expected = "writable")]
    fn a_store_to_the_peers_memory_panics_instead_of_faulting() {
        let (_ours, fd) = Mapping::share("test", PAGE_BYTES, Sharing::PeerReads).unwrap();
        let theirs = Mapping::open(&fd, PAGE_BYTES, Sharing::PeerReads).unwrap();
        theirs.store_u64(0, 1, Ordering::Relaxed);
    }
}
