//! Counts the bytes that a target holds at a time: a number that a peer sends must not become an
//! allocation before it is checked.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use crate::Target;

#[global_allocator]
static METER: Meter = Meter;

static HELD_BYTES: AtomicUsize = AtomicUsize::new(0);
static PEAK_BYTES: AtomicUsize = AtomicUsize::new(0);

/// No target comes near it; an allocation beyond it fails, which aborts.
const MAX_BYTES: usize = 1 << 30;

/// What a target may hold beside its input: bytes for any input, and bytes for each of the input's.
/// Generous towards growth by doubling, far below what an unchecked count would take.
fn allowance_bytes(name: &str, data: &[u8]) -> usize {
    let (fixed, per_byte) = match name {
        // As the product's own count of an input promises.
        "wire" => (step3rt_proto::fuzz::most_bytes(data), 0),
        "frame" => (64 << 10, 16),
        "handshake" => (64 << 10, 16),
        // An empty message of two bytes becomes a struct of some hundreds.
        "plan" => (64 << 10, 1024),
        // The scheduler, and its channels.
        "session" => (4 << 20, 1024),
        "generate" => (1 << 20, 1024),
        // The template and its indentation.
        "chat" => (4 << 20, 4096),
        // The tokenizer's caches.
        "text" => (4 << 20, 256),
        other => panic!("{other} has no allowance"),
    };
    fixed + per_byte * data.len()
}

/// Runs a target on one input.
pub fn run((name, target): Target, data: &[u8]) {
    let before = HELD_BYTES.load(Relaxed);
    PEAK_BYTES.store(before, Relaxed);
    target(data);
    let took_bytes = PEAK_BYTES.load(Relaxed).saturating_sub(before);
    let most_bytes = allowance_bytes(name, data);
    assert!(
        took_bytes <= most_bytes,
        "{took_bytes} bytes were allocated for an input of {}, more than {most_bytes}",
        data.len()
    );
}

struct Meter;

fn take(num_bytes: usize) -> bool {
    let held = HELD_BYTES.fetch_add(num_bytes, Relaxed) + num_bytes;
    PEAK_BYTES.fetch_max(held, Relaxed);
    let fits = held <= MAX_BYTES;
    if !fits {
        give_back(num_bytes);
    }
    fits
}

fn give_back(num_bytes: usize) {
    HELD_BYTES.fetch_sub(num_bytes, Relaxed);
}

// SAFETY: every call goes to the system's allocator with the arguments that came.
unsafe impl GlobalAlloc for Meter {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !take(layout.size()) {
            return std::ptr::null_mut();
        }
        // SAFETY: as promised to this function.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if !take(layout.size()) {
            return std::ptr::null_mut();
        }
        // SAFETY: as promised to this function.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        give_back(layout.size());
        // SAFETY: as promised to this function.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // Both may be held while one is copied to the other.
        if !take(new_size) {
            return std::ptr::null_mut();
        }
        // SAFETY: as promised to this function.
        let moved = unsafe { System.realloc(pointer, layout, new_size) };
        give_back(if moved.is_null() {
            new_size
        } else {
            layout.size()
        });
        moved
    }
}
