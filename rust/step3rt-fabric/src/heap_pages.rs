//! Pages without a kernel, for Miri and for models: heap memory that several mappings share.
//!
//! It stands in for `pages`. What a descriptor refers to is looked up by its number, because neither
//! Miri nor a model has memfds; the descriptor itself is real, and of no use for anything else. What
//! it cannot show: seals keep nobody out, and memory ends with its last mapping, not with its
//! descriptor.

#![allow(
    unsafe_code,
    reason = "allocates and frees the memory that mappings lie in"
)]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::{LazyLock, Mutex, PoisonError, Weak};

use rustix::event::EventfdFlags;

use crate::memory::{MapError, PAGE_BYTES, Sharing};
use crate::sync::Arc;

/// Shared blocks by the number of their descriptor. A closed descriptor's number comes again, and
/// its entry is replaced then.
static SHARED: LazyLock<Mutex<HashMap<RawFd, Weak<Shared>>>> = LazyLock::new(Mutex::default);

/// What a memfd is elsewhere.
struct Shared {
    block: Arc<Block>,
    sharing: Sharing,
}

/// Pages of one mapping.
pub(crate) struct Pages {
    block: Arc<Block>,
    /// What the descriptor leads to, for as long as its maker has it mapped.
    _shared: Option<std::sync::Arc<Shared>>,
}

impl Pages {
    pub(crate) fn share(_name: &str, len: usize, sharing: Sharing) -> io::Result<(Self, OwnedFd)> {
        let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?;
        let block = Arc::new(Block::new(len)?);
        let shared = std::sync::Arc::new(Shared {
            block: Arc::clone(&block),
            sharing,
        });
        let mut all = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(fd.as_raw_fd(), std::sync::Arc::downgrade(&shared));
        let pages = Self {
            block,
            _shared: Some(shared),
        };
        Ok((pages, fd))
    }

    pub(crate) fn open(fd: &OwnedFd, len: usize, sharing: Sharing) -> Result<Self, MapError> {
        let all = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = all.get(&fd.as_raw_fd()).and_then(Weak::upgrade);
        let shared = shared.ok_or(io::Error::from(io::ErrorKind::NotFound))?;
        let found = shared.block.layout.size();
        if found != len {
            return Err(MapError::Size {
                found: found as u64,
                expected: len,
            });
        }
        // As with seals: what only its maker may write has all that is needed, and one more.
        if shared.sharing != sharing && sharing == Sharing::PeerReads {
            let (found, expected) = (0, 1);
            return Err(MapError::Seals { found, expected });
        }
        Ok(Self {
            block: Arc::clone(&shared.block),
            _shared: None,
        })
    }

    pub(crate) fn private(len: usize) -> io::Result<Self> {
        Ok(Self {
            block: Arc::new(Block::new(len)?),
            _shared: None,
        })
    }

    #[cfg(feature = "rdma")]
    pub(crate) fn for_device(len: usize) -> io::Result<Self> {
        Self::private(len)
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.block.base
    }

    pub(crate) fn len(&self) -> usize {
        self.block.layout.size()
    }
}

impl std::fmt::Debug for Pages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes of the heap", self.len())
    }
}

/// Memory that is freed with the last mapping of it.
struct Block {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: owns its memory, and forms no reference to it.
unsafe impl Send for Block {}
// SAFETY: as for Send; what is in it is reached through atomics by the mappings.
unsafe impl Sync for Block {}

impl Block {
    fn new(len: usize) -> io::Result<Self> {
        assert!(len > 0, "pages have bytes");
        let layout = Layout::from_size_align(len, PAGE_BYTES).expect("a length of whole pages");
        // SAFETY: the layout has bytes.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) });
        let base = base.ok_or(io::ErrorKind::OutOfMemory)?;
        #[cfg(loom)]
        crate::models::words::mapped(base, len);
        Ok(Self { base, layout })
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        #[cfg(loom)]
        crate::models::words::unmapped(self.base);
        // SAFETY: allocated with this layout, and the last mapping is gone.
        unsafe { dealloc(self.base.as_ptr(), self.layout) };
    }
}
