//! Owns the KV blocks of one attention instance: which are free, which are in use.
//!
//! It never knows who uses a block: an owner keeps the ids that it was given and returns them.

use crate::ids::BlockId;

/// The free list of one attention instance's KV pool. `free + used = total`, always.
///
/// ```text
///   0 .......... num_touched ................ num_blocks
///   | used, or in `returned` | never given out yet |
/// ```
#[derive(Debug)]
pub struct BlockPool {
    num_blocks: u32,
    /// Memory grows with use and not with `num_blocks`, which a peer names.
    num_touched: u32,
    /// A stack: the block that was returned last is given out first, while it is warm.
    returned: Vec<BlockId>,
    /// Indexed by touched block: a block that is returned twice is found at once, not when two
    /// sequences have overwritten each other.
    is_free: Vec<bool>,
}

impl BlockPool {
    /// A pool of `num_blocks` free blocks, ids `0..num_blocks`.
    pub fn new(num_blocks: u32) -> Self {
        Self {
            num_blocks,
            num_touched: 0,
            returned: Vec::new(),
            is_free: Vec::new(),
        }
    }

    /// Takes `num_blocks` blocks, or none and `None` if there are not enough.
    pub fn allocate(&mut self, num_blocks: u32) -> Option<Vec<BlockId>> {
        if num_blocks > self.num_free_blocks() {
            return None;
        }
        Some((0..num_blocks).map(|_| self.allocate_one()).collect())
    }

    /// Returns blocks that [`Self::allocate`] gave out.
    ///
    /// # Panics
    /// If a block is free already or not of this pool: the books are wrong, and going on would
    /// hand one block to two sequences.
    pub fn release(&mut self, blocks: &[BlockId]) {
        for &block in blocks.iter().rev() {
            let is_free = &mut self.is_free[block.0 as usize];
            assert!(!*is_free, "KV block {block} is returned twice");
            *is_free = true;
            self.returned.push(block);
        }
    }

    /// Blocks that nobody uses.
    pub fn num_free_blocks(&self) -> u32 {
        let returned = u32::try_from(self.returned.len()).expect("ids of blocks are u32");
        self.num_blocks - self.num_touched + returned
    }

    /// All blocks.
    pub fn num_blocks(&self) -> u32 {
        self.num_blocks
    }

    fn allocate_one(&mut self) -> BlockId {
        if let Some(block) = self.returned.pop() {
            self.is_free[block.0 as usize] = false;
            return block;
        }
        let block = BlockId(self.num_touched);
        self.num_touched += 1;
        self.is_free.push(false);
        block
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_pool_gives_out_every_block_once_and_then_none() {
        let mut pool = BlockPool::new(3);
        assert_eq!(pool.allocate(2), Some(vec![BlockId(0), BlockId(1)]));
        assert_eq!(pool.allocate(1), Some(vec![BlockId(2)]));
        assert_eq!(pool.allocate(1), None);
        assert_eq!(pool.num_free_blocks(), 0);
    }

    #[test]
    fn a_demand_that_cannot_be_met_takes_nothing() {
        let mut pool = BlockPool::new(3);
        assert_eq!(pool.allocate(4), None);
        assert_eq!(pool.num_free_blocks(), 3);
    }

    #[test]
    fn blocks_returned_last_are_given_out_first() {
        let mut pool = BlockPool::new(4);
        let first = pool.allocate(2).unwrap();
        pool.allocate(2).unwrap();
        pool.release(&first);
        assert_eq!(pool.allocate(2), Some(first));
    }

    #[test]
    fn a_pool_of_any_size_costs_nothing_until_it_is_used() {
        let mut pool = BlockPool::new(u32::MAX);
        assert_eq!(pool.num_free_blocks(), u32::MAX);
        assert_eq!(pool.allocate(1), Some(vec![BlockId(0)]));
        assert_eq!(pool.num_free_blocks(), u32::MAX - 1);
    }

    #[test]
    #[should_panic(expected = "KV block 1 is returned twice")]
    fn a_block_cannot_be_returned_twice() {
        let mut pool = BlockPool::new(2);
        pool.allocate(2).unwrap();
        pool.release(&[BlockId(1)]);
        pool.release(&[BlockId(1)]);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Allocate(u32),
        /// Returns the allocation at this index of those outstanding, modulo their number.
        Release(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (0_u32..6).prop_map(Step::Allocate),
            any::<usize>().prop_map(Step::Release),
        ];
        prop::collection::vec(step, 0..200)
    }

    proptest! {
        /// The model is a plain set of used blocks.
        #[test]
        fn any_history_keeps_the_books(num_blocks in 0_u32..24, steps in steps()) {
            let mut pool = BlockPool::new(num_blocks);
            let mut used: BTreeSet<BlockId> = BTreeSet::new();
            let mut outstanding: Vec<Vec<BlockId>> = Vec::new();
            for step in steps {
                match step {
                    Step::Allocate(wanted) => {
                        let fits = used.len() + wanted as usize <= num_blocks as usize;
                        let given = pool.allocate(wanted);
                        prop_assert_eq!(given.is_some(), fits);
                        let given = given.unwrap_or_default();
                        for block in &given {
                            prop_assert!(block.0 < num_blocks);
                            prop_assert!(used.insert(*block), "block {} has two owners", block);
                        }
                        outstanding.push(given);
                    }
                    Step::Release(index) if !outstanding.is_empty() => {
                        let returned = outstanding.swap_remove(index % outstanding.len());
                        pool.release(&returned);
                        for block in &returned {
                            used.remove(block);
                        }
                    }
                    Step::Release(_) => {}
                }
                prop_assert_eq!(pool.num_blocks(), num_blocks);
                prop_assert_eq!(pool.num_free_blocks() as usize + used.len(), num_blocks as usize);
            }
        }
    }
}
