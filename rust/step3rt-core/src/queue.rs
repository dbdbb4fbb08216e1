//! Owns the order in which sequences without a place get one.
//!
//! It never knows why a sequence waits: new ones, preempted ones and those of a lost instance
//! stand in one line, by [`Rank`].

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::RequestId;
use crate::sequence::Rank;
use crate::sequence_table::Slot;

#[derive(Debug, Default)]
pub(crate) struct WaitingQueue {
    line: BTreeSet<(Rank, Slot)>,
    /// How many sequences of each request wait; the bound is on requests.
    requests: BTreeMap<RequestId, u32>,
}

impl WaitingQueue {
    pub(crate) fn insert(&mut self, rank: Rank, slot: Slot, request: RequestId) {
        let is_new = self.line.insert((rank, slot));
        assert!(is_new, "a sequence waits once");
        *self.requests.entry(request).or_default() += 1;
    }

    pub(crate) fn remove(&mut self, rank: Rank, slot: Slot, request: RequestId) {
        let was_there = self.line.remove(&(rank, slot));
        assert!(was_there, "only what waits is removed");
        let count = self.requests.get_mut(&request).expect("it waits");
        *count -= 1;
        if *count == 0 {
            self.requests.remove(&request);
        }
    }

    pub(crate) fn num_requests(&self) -> usize {
        self.requests.len()
    }

    /// Best rank first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Slot> + '_ {
        self.line.iter().map(|&(_, slot)| slot)
    }

    pub(crate) fn contains(&self, rank: Rank, slot: Slot) -> bool {
        self.line.contains(&(rank, slot))
    }

    pub(crate) fn num_sequences(&self) -> usize {
        self.line.len()
    }
}
