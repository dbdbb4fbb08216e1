//! Owns the KV blocks of one attention instance: which are free, who shares which, and which free
//! ones still hold a beginning that may be asked for again.
//!
//! It never knows who uses a block: an owner keeps the ids that it was given and returns them.
//!
//! Only full blocks are shared, and a full block is never written again, so sharing needs no copy:
//! continuations of one prompt share its full blocks and each computes the rest of its own.

use std::borrow::Cow;

use crate::ids::{BlockId, TenantId, TokenId};
pub use crate::prefix_cache::NodeId;
use crate::prefix_cache::PrefixCache;

/// The blocks of one attention instance's KV pool. `free + used = total`, always; a free block may
/// hold a cached beginning until it is needed for something else.
///
/// ```text
///   0 .................... num_touched ................ num_blocks
///   | used, idle or returned    | never given out yet |
/// ```
#[derive(Debug)]
pub struct BlockPool {
    num_blocks: u32,
    /// Memory grows with use and not with `num_blocks`, which a peer names.
    num_touched: u32,
    /// Blocks that hold nothing. A stack: the block that was returned last is given out first,
    /// while it is warm.
    returned: Vec<BlockId>,
    /// Indexed by touched block.
    num_owners: Vec<u32>,
    cache: PrefixCache,
}

/// A beginning that is in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CachedPrefix {
    /// In table order.
    pub blocks: Vec<BlockId>,
    /// The content of the last of them, the tenant's root if there are none.
    pub node: NodeId,
    /// How many of the blocks somebody uses already, so that sharing them takes no room.
    pub num_used_blocks: u64,
}

impl BlockPool {
    /// A pool of `num_blocks` free blocks, ids `0..num_blocks`.
    pub fn new(num_blocks: u32) -> Self {
        Self {
            num_blocks,
            num_touched: 0,
            returned: Vec::new(),
            num_owners: Vec::new(),
            cache: PrefixCache::default(),
        }
    }

    /// Takes `num_blocks` blocks, or none and `None` if there are not enough. Cached beginnings
    /// are forgotten, longest idle first, when nothing else is free.
    pub fn allocate(&mut self, num_blocks: u32) -> Option<Vec<BlockId>> {
        if num_blocks == 0 {
            return Some(Vec::new()); // a decode step needs a new block rarely
        }
        if num_blocks > self.num_free_blocks() {
            return None;
        }
        Some((0..num_blocks).map(|_| self.allocate_one()).collect())
    }

    /// Gives up one ownership of each block.
    ///
    /// # Panics
    /// If a block has no owner or is not of this pool: the books are wrong, and going on would
    /// hand one block to two sequences.
    pub fn release(&mut self, blocks: &[BlockId]) {
        for &block in blocks.iter().rev() {
            let num_owners = &mut self.num_owners[block.0 as usize];
            assert!(*num_owners > 0, "KV block {block} is returned twice");
            *num_owners -= 1;
            if *num_owners == 0 && !self.cache.set_idle(block) {
                self.returned.push(block);
            }
        }
    }

    /// The longest beginning that is cached of a tenant's sequence with these full blocks. Nothing
    /// changes; whoever wants it must [`Self::share`] it before anything is allocated.
    pub fn find_prefix<'a>(
        &self,
        tenant: TenantId,
        full_blocks: impl Iterator<Item = Cow<'a, [TokenId]>>,
    ) -> CachedPrefix {
        let mut prefix = CachedPrefix {
            blocks: Vec::new(),
            node: NodeId::Root(tenant),
            num_used_blocks: 0,
        };
        for tokens in full_blocks {
            let Some((block, node)) = self.cache.find(prefix.node, &tokens) else {
                break;
            };
            prefix.blocks.push(block);
            prefix.node = node;
            prefix.num_used_blocks += u64::from(self.num_owners(block) > 0);
        }
        prefix
    }

    /// Adds one owner to each block of a found prefix.
    pub fn share(&mut self, blocks: &[BlockId]) {
        for &block in blocks {
            let num_owners = &mut self.num_owners[block.0 as usize];
            *num_owners += 1;
            if *num_owners == 1 {
                self.cache.set_used(block);
            }
        }
    }

    /// Notes that `block`, in use and computed, holds `tokens` after the content of `parent`, so
    /// that others can share it. Returns the node that this content has.
    pub fn publish(&mut self, parent: NodeId, tokens: &[TokenId], block: BlockId) -> NodeId {
        self.cache.insert(parent, tokens, block)
    }

    /// Makes sure that nobody who comes finds these blocks, which are in use: what they hold is
    /// not to be trusted.
    pub fn unpublish(&mut self, blocks: &[BlockId]) {
        for &block in blocks {
            self.cache.forget(block);
        }
    }

    /// How many sequences use `block`.
    pub fn num_owners(&self, block: BlockId) -> u32 {
        self.num_owners.get(block.0 as usize).copied().unwrap_or(0)
    }

    /// Blocks that nobody uses.
    pub fn num_free_blocks(&self) -> u32 {
        let touched = self.returned.len() + self.cache.num_idle_blocks();
        let touched = u32::try_from(touched).expect("ids of blocks are u32");
        self.num_blocks - self.num_touched + touched
    }

    /// Blocks that somebody uses, each counted once.
    pub fn num_used_blocks(&self) -> u32 {
        self.num_blocks - self.num_free_blocks()
    }

    /// All blocks.
    pub fn num_blocks(&self) -> u32 {
        self.num_blocks
    }

    fn allocate_one(&mut self) -> BlockId {
        if self.returned.is_empty() && self.num_touched < self.num_blocks {
            let block = BlockId(self.num_touched);
            self.num_touched += 1;
            self.num_owners.push(1);
            return block;
        }
        let free = self.returned.pop().or_else(|| self.cache.forget_one());
        let block = free.expect("the caller has counted the free blocks");
        self.num_owners[block.0 as usize] = 1;
        block
    }
}

#[cfg(test)]
mod tests;
