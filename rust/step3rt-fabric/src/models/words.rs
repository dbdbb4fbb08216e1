//! Loom's atomics in the place of mapped memory, one per word of eight bytes.
//!
//! Code reaches mapped words by address, so this is a table from addresses to atomics. It knows what
//! is mapped: an access to what is not, and an unmapping that does not come after every access, end
//! the model.

use std::collections::{BTreeMap, VecDeque};
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

use loom::sync::atomic::AtomicU64;

const WORD_BYTES: usize = size_of::<u64>();

/// The words of each mapped range, by its first address. Of all models, which run in parallel:
/// addresses tell them apart.
static MAPPED: Mutex<BTreeMap<usize, Words>> = Mutex::new(BTreeMap::new());

/// Words unmapped lately. An access that was on its way when its word went is loom's to report, so the
/// word must not be gone for good.
static UNMAPPED: Mutex<VecDeque<Words>> = Mutex::new(VecDeque::new());
const MAX_UNMAPPED: usize = 256;

type Words = Box<[AtomicU64]>;

fn lock<T>(mutex: &'static Mutex<T>) -> MutexGuard<'static, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Notes `len` zeroed bytes at `base`.
pub(crate) fn mapped(base: NonNull<u8>, len: usize) {
    let words = (0..len / WORD_BYTES).map(|_| AtomicU64::new(0)).collect();
    lock(&MAPPED).insert(base.addr().get(), words);
}

/// Forgets what starts at `base`.
pub(crate) fn unmapped(base: NonNull<u8>) {
    let words = lock(&MAPPED).remove(&base.addr().get());
    let mut words = words.expect("only what is mapped is unmapped");
    // A model that has failed already is not asked again.
    if !std::thread::panicking() {
        for word in &mut words {
            // Exclusive access: loom fails the model if any other may come at the same time.
            word.with_mut(|_| ());
        }
    }
    let mut unmapped = lock(&UNMAPPED);
    unmapped.push_back(words);
    if unmapped.len() > MAX_UNMAPPED {
        unmapped.pop_front();
    }
}

/// The word at an address, which must be its first byte: no two narrower values share a word.
pub(crate) fn at(pointer: *const u8) -> *const AtomicU64 {
    let ranges = lock(&MAPPED);
    let found = ranges.range(..=pointer.addr()).next_back();
    let word = found.and_then(|(base, words)| {
        let offset = pointer.addr() - base;
        assert!(offset.is_multiple_of(WORD_BYTES), "not the start of a word");
        words.get(offset / WORD_BYTES).map(std::ptr::from_ref)
    });
    drop(ranges);
    word.expect("Causality violation: no word is mapped there")
}
