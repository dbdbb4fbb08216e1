//! Where a mapping's bytes come from: memfds that two processes map, and anonymous memory.
//!
//! It makes pages and gives them back; it never reads or writes one. `heap_pages` stands in for it
//! where there is no kernel to ask, under Miri and in models.

#![allow(
    unsafe_code,
    reason = "maps and unmaps memory; with `memory`, all of the crate's unsafe but the verbs"
)]

use std::ffi::c_void;
use std::io;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

use crate::memory::{MapError, Sharing};

/// Mapped pages, unmapped when dropped. Whoever has them keeps others from using them later.
#[derive(Debug)]
pub(crate) struct Pages {
    base: NonNull<u8>,
    len: usize,
}

impl Pages {
    /// Makes a sealed memfd of `len` bytes, allocated in full and zeroed, and maps it for writing.
    pub(crate) fn share(name: &str, len: usize, sharing: Sharing) -> io::Result<(Self, OwnedFd)> {
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        // Allocated now: a full machine is an error here and not a SIGBUS at the first store.
        rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, len as u64)?;
        let pages = Self::map(&fd, len, true)?;
        rustix::fs::fcntl_add_seals(&fd, seals(sharing))?;
        Ok((pages, fd))
    }

    /// Maps a memfd that a peer made with [`Pages::share`], after checking its size and seals.
    pub(crate) fn open(fd: &OwnedFd, len: usize, sharing: Sharing) -> Result<Self, MapError> {
        let found = u64::try_from(rustix::fs::fstat(fd).map_err(io::Error::from)?.st_size);
        let found = found.unwrap_or(0);
        if found != len as u64 {
            return Err(MapError::Size {
                found,
                expected: len,
            });
        }
        let found = rustix::fs::fcntl_get_seals(fd).map_err(io::Error::from)?;
        let expected = seals(sharing);
        if !found.contains(expected) {
            let (found, expected) = (found.bits(), expected.bits());
            return Err(MapError::Seals { found, expected });
        }
        Ok(Self::map(fd, len, sharing == Sharing::PeerWrites)?)
    }

    /// Maps private, zeroed memory.
    pub(crate) fn private(len: usize) -> io::Result<Self> {
        Self::anonymous(len, MapFlags::PRIVATE)
    }

    /// Maps zeroed memory that stays where it is after a fork.
    #[cfg(feature = "rdma")]
    pub(crate) fn for_device(len: usize) -> io::Result<Self> {
        Self::anonymous(len, MapFlags::SHARED)
    }

    /// The first byte.
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// How many bytes there are.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    fn anonymous(len: usize, flags: MapFlags) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice aliases nothing.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                len,
                protection,
                flags | MapFlags::POPULATE,
            )?
        };
        Self::from_mmap(base, len)
    }

    fn map(fd: &OwnedFd, len: usize, is_writable: bool) -> io::Result<Self> {
        let protection = if is_writable {
            ProtFlags::READ | ProtFlags::WRITE
        } else {
            ProtFlags::READ
        };
        // SAFETY: a new mapping at an address of the kernel's choice aliases no Rust object. The
        // memfd cannot shrink below `len`: our own is sealed right after, a peer's was checked.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                protection,
                MapFlags::SHARED | MapFlags::POPULATE,
                fd,
                0,
            )?
        };
        Self::from_mmap(base, len)
    }

    fn from_mmap(base: *mut c_void, len: usize) -> io::Result<Self> {
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, len })
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: `base` and `len` are what mmap returned, and the last owner is here, so no pointer
        // that this crate gave out under an owner is left.
        if let Err(error) = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) } {
            tracing::error!(%error, len_bytes = self.len, "memory cannot be unmapped");
        }
    }
}

fn seals(sharing: Sharing) -> SealFlags {
    let fixed_size = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    match sharing {
        Sharing::PeerReads => fixed_size | SealFlags::FUTURE_WRITE,
        Sharing::PeerWrites => fixed_size,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::PAGE_BYTES;

    fn plain_memfd(len: u64) -> OwnedFd {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("test", flags).unwrap();
        rustix::fs::ftruncate(&fd, len).unwrap();
        fd
    }

    #[test]
    fn the_reader_can_neither_map_for_writing_nor_resize_nor_punch_holes() {
        let (_ours, fd) = Pages::share("test", PAGE_BYTES, Sharing::PeerReads).unwrap();
        assert!(Pages::map(&fd, PAGE_BYTES, true).is_err());
        assert!(rustix::fs::ftruncate(&fd, 0).is_err());
        assert!(rustix::fs::ftruncate(&fd, 1 << 20).is_err());
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        assert!(rustix::fs::fallocate(&fd, punch, 0, PAGE_BYTES as u64).is_err());
        assert!(rustix::fs::fcntl_add_seals(&fd, SealFlags::WRITE).is_err());
    }

    #[test]
    fn memory_without_seals_is_refused() {
        let bare = plain_memfd(PAGE_BYTES as u64);
        let error = Pages::open(&bare, PAGE_BYTES, Sharing::PeerWrites).unwrap_err();
        assert!(matches!(error, MapError::Seals { found: 0, .. }), "{error}");
    }

    #[test]
    fn something_that_is_no_memfd_is_refused() {
        let fd: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
        assert!(Pages::open(&fd, 0, Sharing::PeerReads).is_err());
        let directory: OwnedFd = std::fs::File::open("/").unwrap().into();
        assert!(Pages::open(&directory, PAGE_BYTES, Sharing::PeerReads).is_err());
    }
}
