//! Owns every live sequence under a small reusable index.
//!
//! A lane of thousands of sequences is walked twice per step, so a sequence is found by one
//! array access. A [`Slot`] never leaves this crate: it is reused, a
//! [`SequenceId`](crate::ids::SequenceId) is not.

use std::hint::black_box;
use std::ops::{Index, IndexMut};

use crate::sequence::Sequence;

/// A live sequence's place in the [`SequenceTable`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Slot(u32);

impl Slot {
    fn at(index: usize) -> Self {
        Self(u32::try_from(index).expect("admission bounds the sequences that live"))
    }

    fn index(self) -> usize {
        self.0 as usize
    }
}

#[derive(Debug, Default)]
pub(crate) struct SequenceTable {
    entries: Vec<Option<Sequence>>,
    vacant: Vec<Slot>,
}

impl SequenceTable {
    pub(crate) fn insert(&mut self, sequence: Sequence) -> Slot {
        if let Some(slot) = self.vacant.pop() {
            self.entries[slot.index()] = Some(sequence);
            return slot;
        }
        self.entries.push(Some(sequence));
        Slot::at(self.entries.len() - 1)
    }

    pub(crate) fn remove(&mut self, slot: Slot) -> Sequence {
        let sequence = self.entries[slot.index()].take().expect("the slot is live");
        self.vacant.push(slot);
        sequence
    }

    /// Reads a little of each sequence in `slots`, and does nothing: the memory of many arrives side
    /// by side then, where the work on one after the other would wait for each.
    pub(crate) fn bring_near(&self, slots: impl Iterator<Item = Slot>) {
        black_box(
            slots
                .map(|slot| self[slot].touch())
                .fold(0, usize::wrapping_add),
        );
    }

    /// All live sequences, by slot.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Slot, &Sequence)> {
        self.entries
            .iter()
            .enumerate()
            .filter_map(|(index, entry)| Some((Slot::at(index), entry.as_ref()?)))
    }
}

impl Index<Slot> for SequenceTable {
    type Output = Sequence;

    fn index(&self, slot: Slot) -> &Sequence {
        self.entries[slot.index()]
            .as_ref()
            .expect("the slot is live")
    }
}

impl IndexMut<Slot> for SequenceTable {
    fn index_mut(&mut self, slot: Slot) -> &mut Sequence {
        self.entries[slot.index()]
            .as_mut()
            .expect("the slot is live")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vacant_slots_are_used_again() {
        let mut table = SequenceTable::default();
        let first = table.insert(Sequence::for_tests(&[1], &[]));
        let second = table.insert(Sequence::for_tests(&[2], &[]));
        assert_eq!(table.remove(first).num_prompt_tokens(), 1);
        assert_eq!(table.insert(Sequence::for_tests(&[3, 4], &[])), first);
        let live: Vec<_> = table
            .iter()
            .map(|(slot, s)| (slot, s.num_prompt_tokens()))
            .collect();
        assert_eq!(live, [(first, 2), (second, 1)]);
    }

    #[test]
    #[should_panic(expected = "the slot is live")]
    fn a_vacant_slot_has_no_sequence() {
        let mut table = SequenceTable::default();
        let slot = table.insert(Sequence::for_tests(&[1], &[]));
        table.remove(slot);
        let _ = &table[slot];
    }
}
