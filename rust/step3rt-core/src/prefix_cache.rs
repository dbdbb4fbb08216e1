//! Owns what full KV blocks hold, so that an equal beginning is computed once.
//!
//! It never counts owners and never gives a block out: [`BlockPool`](crate::block_pool::BlockPool)
//! does, and asks here which content may be forgotten.
//!
//! Contents form a tree. A node is one full block, named by its tokens and by the node before it,
//! so a path from the root is a beginning, and the KV of a token depends on exactly that path.
//! Tokens are compared and not only hashed: a collision would serve one client with another's past.
//!
//! ```text
//!   root ── [tok 0..64) n1 ──┬── [tok 64..128) n2
//!                            └── [other 64..128) n3
//! ```
//!
//! Whatever the number of blocks, each verb looks at a few places in memory: sequences end and
//! begin in every step, and a search of a large tree waits for memory at every level.

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::ops::Range;

use hashbrown::HashTable;

use crate::ids::{BlockId, TenantId, TokenId};

/// A block's content with everything before it. Never reused, so that the children of a node that
/// was forgotten are never taken for those of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NodeId {
    /// The beginning of every sequence of a tenant. Tenants share nothing: that a prompt is
    /// answered sooner would tell one that another has sent it.
    Root(TenantId),
    /// A content of at least one block.
    Content(u64),
}

#[derive(Debug)]
struct Node {
    id: NodeId,
    parent: NodeId,
    /// Of `parent` and `tokens`.
    hash: u64,
    /// Its place in `idle`, while nobody uses the block.
    idle_since: Option<u64>,
}

/// Which blocks hold which beginnings.
#[derive(Debug, Default)]
pub(crate) struct PrefixCache {
    /// By block; no longer than the blocks that ever held something.
    nodes: Vec<Option<Node>>,
    /// What those blocks hold, one after the other. All blocks are of one size.
    tokens: Vec<TokenId>,
    block_size_tokens: usize,
    /// The blocks in `nodes`, by parent and tokens.
    by_content: HashTable<BlockId>,
    /// Clients choose tokens, so nobody may know which ones collide. It is only ever searched, so
    /// what is found, and with it every plan, is the same under any key.
    hash_key: RandomState,
    /// Blocks that nobody uses, longest idle first, each with the time since when. Those in use
    /// again are passed over.
    idle: VecDeque<(u64, BlockId)>,
    num_idle_blocks: usize,
    num_nodes_ever: u64,
    num_idles_ever: u64,
}

impl PrefixCache {
    /// The block that holds `tokens` after the content of `parent`, and the node of both.
    pub(crate) fn find(&self, parent: NodeId, tokens: &[TokenId]) -> Option<(BlockId, NodeId)> {
        let hash = self.hash_key.hash_one((parent, tokens));
        let holds = |&block: &BlockId| {
            let is_child = self.node(block).is_some_and(|node| node.parent == parent);
            is_child && self.tokens[self.range(block)] == *tokens
        };
        let &block = self.by_content.find(hash, holds)?;
        Some((block, self.node(block)?.id))
    }

    /// Notes that `block`, which is in use, holds `tokens` after `parent`. If another block holds
    /// the same, that one stays the known one. Returns the node of this content.
    pub(crate) fn insert(&mut self, parent: NodeId, tokens: &[TokenId], block: BlockId) -> NodeId {
        if let Some((_, node)) = self.find(parent, tokens) {
            return node;
        }
        assert!(
            self.node(block).is_none(),
            "KV block {block} is filled twice"
        );
        self.num_nodes_ever += 1;
        let id = NodeId::Content(self.num_nodes_ever);
        let hash = self.hash_key.hash_one((parent, tokens));
        self.block_size_tokens = tokens.len();
        let (index, range) = (block.0 as usize, self.range(block));
        if self.nodes.len() <= index {
            self.nodes.resize_with(index + 1, || None);
            self.tokens.resize(range.end, TokenId(0));
        }
        self.tokens[range].copy_from_slice(tokens);
        self.nodes[index] = Some(Node {
            id,
            parent,
            hash,
            idle_since: None,
        });
        let nodes = &self.nodes;
        let hash_of = |block: &BlockId| nodes[block.0 as usize].as_ref().map_or(0, |n| n.hash);
        self.by_content.insert_unique(hash, block, hash_of);
        id
    }

    /// Notes that nobody uses `block` any more. False if it holds nothing that is known.
    pub(crate) fn set_idle(&mut self, block: BlockId) -> bool {
        let Some(Some(node)) = self.nodes.get_mut(block.0 as usize) else {
            return false;
        };
        self.num_idles_ever += 1;
        node.idle_since = Some(self.num_idles_ever);
        self.idle.push_back((self.num_idles_ever, block));
        self.num_idle_blocks += 1;
        self.drop_stale();
        true
    }

    /// Notes that somebody uses the idle `block` again.
    pub(crate) fn set_used(&mut self, block: BlockId) {
        let node = self.nodes[block.0 as usize].as_mut();
        let since = node.and_then(|node| node.idle_since.take());
        assert!(since.is_some(), "the block was idle");
        self.num_idle_blocks -= 1;
    }

    /// Forgets the content that was idle longest, and returns its block. A sequence returns its
    /// blocks last to first, so what follows a beginning is forgotten before the beginning is.
    pub(crate) fn forget_one(&mut self) -> Option<BlockId> {
        loop {
            let (since, block) = self.idle.pop_front()?;
            if self.is_idle_since(block, since) {
                self.forget(block);
                self.num_idle_blocks -= 1;
                return Some(block);
            }
        }
    }

    /// Forgets what `block` holds. What followed it is found no more.
    pub(crate) fn forget(&mut self, block: BlockId) {
        let node = self.nodes.get_mut(block.0 as usize).and_then(Option::take);
        let Some(node) = node else { return };
        let entry = self
            .by_content
            .find_entry(node.hash, |&other| other == block);
        entry.expect("every node is found by its content").remove();
    }

    /// Blocks that hold something and that nobody uses.
    pub(crate) fn num_idle_blocks(&self) -> usize {
        self.num_idle_blocks
    }

    fn node(&self, block: BlockId) -> Option<&Node> {
        self.nodes.get(block.0 as usize)?.as_ref()
    }

    /// Where in `tokens` those of `block` are.
    fn range(&self, block: BlockId) -> Range<usize> {
        let start = block.0 as usize * self.block_size_tokens;
        start..start + self.block_size_tokens
    }

    fn is_idle_since(&self, block: BlockId, since: u64) -> bool {
        self.node(block).and_then(|node| node.idle_since) == Some(since)
    }

    /// Keeps `idle` from growing with the number of times that blocks were used again. It takes
    /// as many of those times to get here as there are entries to look at.
    fn drop_stale(&mut self) {
        if self.idle.len() > 2 * self.num_idle_blocks + MIN_IDLE_ENTRIES {
            let mut idle = std::mem::take(&mut self.idle);
            idle.retain(|&(since, block)| self.is_idle_since(block, since));
            self.idle = idle;
        }
    }
}

/// Below this, looking for stale entries is not worth while.
const MIN_IDLE_ENTRIES: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_of_idle_blocks_does_not_grow_with_how_often_they_are_used() {
        let mut cache = PrefixCache::default();
        let num_blocks = 10;
        for block in 0..num_blocks {
            cache.insert(NodeId::Root(TenantId(0)), &[TokenId(block)], BlockId(block));
            cache.set_idle(BlockId(block));
        }
        let most = 2 * num_blocks as usize + MIN_IDLE_ENTRIES;
        let mut longest = 0;
        for _ in 0..1_000 {
            for block in 1..num_blocks {
                cache.set_used(BlockId(block));
                cache.set_idle(BlockId(block));
                longest = longest.max(cache.idle.len());
            }
        }
        assert_eq!(longest, most, "and it is not tidied more often than that");
        let forgotten = std::iter::from_fn(|| cache.forget_one());
        let forgotten: Vec<_> = forgotten.map(|block| block.0).collect();
        let in_order: Vec<_> = (0..num_blocks).collect();
        assert_eq!(forgotten, in_order, "the first was idle all the time");
        assert!(cache.by_content.is_empty(), "no trace is left of them");
    }
}
