//! Which of this process's memory a device may touch: the headers and slots of one direction.
//!
//! It registers nothing; it names what `wire` registers, and keeps it mapped.

use std::ops::Range;

use crate::memory::SharedMapping;
use crate::region::Region;

/// A range of a mapping that lives at least as long as this.
pub(crate) struct Registered {
    pub(crate) mapping: SharedMapping,
    pub(crate) range: Range<usize>,
}

impl Registered {
    /// Headers and slots of a region; not its flags, which are no device's business.
    pub(crate) fn new(region: &Region) -> Self {
        Self {
            mapping: region.shared_mapping(),
            range: region.frames_range(),
        }
    }

    /// The first byte. Panics when the range is not in the mapping.
    pub(crate) fn start(&self) -> *mut u8 {
        self.mapping.at(self.range.start, self.range.len(), 1)
    }

    /// The address of the byte at `offset` of the mapping, as a device knows it.
    pub(crate) fn address(&self, offset: usize) -> u64 {
        self.mapping.at(offset, 0, 1) as u64
    }

    /// Panics when `range` is not all within what is registered.
    pub(crate) fn check(&self, range: &Range<usize>) {
        assert!(
            self.range.start <= range.start && range.end <= self.range.end,
            "{range:?} is outside of the registered {:?}",
            self.range
        );
    }
}
