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

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::ids::{BlockId, TenantId, TokenId};

/// A block's content with everything before it. Never reused, so that the children of a node that
/// was forgotten are never taken for those of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum NodeId {
    /// The beginning of every sequence of a tenant. Tenants share nothing: that a prompt is
    /// answered sooner would tell one that another has sent it.
    Root(TenantId),
    /// A content of at least one block.
    Content(u64),
}

#[derive(Debug)]
struct Node {
    block: BlockId,
    parent: NodeId,
    tokens: Arc<[TokenId]>,
    /// Its place in `idle`, while nobody uses the block.
    idle_since: Option<u64>,
}

/// Which blocks hold which beginnings.
#[derive(Debug, Default)]
pub(crate) struct PrefixCache {
    nodes: BTreeMap<NodeId, Node>,
    children: BTreeMap<NodeId, BTreeMap<Arc<[TokenId]>, NodeId>>,
    by_block: BTreeMap<BlockId, NodeId>,
    /// Nodes whose blocks nobody uses, longest idle first.
    idle: BTreeMap<u64, NodeId>,
    num_nodes_ever: u64,
    num_idles_ever: u64,
}

impl PrefixCache {
    /// The block that holds `tokens` after the content of `parent`, and the node of both.
    pub(crate) fn find(&self, parent: NodeId, tokens: &[TokenId]) -> Option<(BlockId, NodeId)> {
        let node = *self.children.get(&parent)?.get(tokens)?;
        Some((self.nodes[&node].block, node))
    }

    /// Notes that `block`, which is in use, holds `tokens` after `parent`. If another block holds
    /// the same, that one stays the known one. Returns the node of this content.
    pub(crate) fn insert(&mut self, parent: NodeId, tokens: &[TokenId], block: BlockId) -> NodeId {
        let children = self.children.entry(parent).or_default();
        if let Some(&node) = children.get(tokens) {
            return node;
        }
        self.num_nodes_ever += 1;
        let node = NodeId::Content(self.num_nodes_ever);
        let tokens: Arc<[TokenId]> = tokens.into();
        children.insert(Arc::clone(&tokens), node);
        let before = self.by_block.insert(block, node);
        assert!(before.is_none(), "KV block {block} is filled twice");
        let content = Node {
            block,
            parent,
            tokens,
            idle_since: None,
        };
        self.nodes.insert(node, content);
        node
    }

    /// Notes that nobody uses `block` any more. False if it holds nothing that is known.
    pub(crate) fn set_idle(&mut self, block: BlockId) -> bool {
        let Some(node) = self.by_block.get(&block) else {
            return false;
        };
        self.num_idles_ever += 1;
        let content = self.nodes.get_mut(node).expect("by_block names live nodes");
        content.idle_since = Some(self.num_idles_ever);
        self.idle.insert(self.num_idles_ever, *node);
        true
    }

    /// Notes that somebody uses the idle `block` again.
    pub(crate) fn set_used(&mut self, block: BlockId) {
        let node = self.by_block[&block];
        let content = self
            .nodes
            .get_mut(&node)
            .expect("by_block names live nodes");
        let since = content.idle_since.take().expect("the block was idle");
        self.idle.remove(&since);
    }

    /// Forgets the content that was idle longest, and returns its block. A sequence returns its
    /// blocks last to first, so what follows a beginning is forgotten before the beginning is.
    pub(crate) fn forget_one(&mut self) -> Option<BlockId> {
        let (_, node) = self.idle.pop_first()?;
        Some(self.remove(node))
    }

    /// Forgets what `block`, which is in use, holds. What followed it is found no more.
    pub(crate) fn forget(&mut self, block: BlockId) {
        if let Some(&node) = self.by_block.get(&block) {
            self.remove(node);
        }
    }

    fn remove(&mut self, node: NodeId) -> BlockId {
        let content = self.nodes.remove(&node).expect("the callers know it");
        self.by_block.remove(&content.block);
        let siblings = self.children.get_mut(&content.parent);
        let siblings = siblings.expect("a live node is a child");
        siblings.remove(&content.tokens);
        if siblings.is_empty() {
            self.children.remove(&content.parent);
        }
        content.block
    }

    /// Blocks that hold something and that nobody uses.
    pub(crate) fn num_idle_blocks(&self) -> usize {
        self.idle.len()
    }
}
