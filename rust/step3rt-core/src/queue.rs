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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sequence::Sequence;
    use crate::sequence_table::SequenceTable;

    #[test]
    fn the_line_is_by_rank_and_its_length_in_requests() {
        let mut table = SequenceTable::default();
        let mut queue = WaitingQueue::default();
        let rank = |priority, arrival| Rank { priority, arrival };
        let entries = [(rank(1, 0), 7), (rank(0, 2), 8), (rank(0, 1), 8)];
        let slots = entries.map(|(rank, request)| {
            let slot = table.insert(Sequence::for_tests(&[1], &[]));
            queue.insert(rank, slot, RequestId(request));
            slot
        });
        assert_eq!(
            queue.iter().collect::<Vec<_>>(),
            [slots[2], slots[1], slots[0]]
        );
        assert_eq!((queue.num_requests(), queue.num_sequences()), (2, 3));
        queue.remove(rank(0, 1), slots[2], RequestId(8));
        assert!(queue.contains(rank(0, 2), slots[1]));
        assert!(!queue.contains(rank(0, 1), slots[2]));
        assert_eq!(
            queue.num_requests(),
            2,
            "the other continuation waits still"
        );
        queue.remove(rank(0, 2), slots[1], RequestId(8));
        assert_eq!((queue.num_requests(), queue.num_sequences()), (1, 1));
    }
}
