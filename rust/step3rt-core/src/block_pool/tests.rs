use std::collections::{BTreeMap, BTreeSet};

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

const BLOCK: usize = 2;
const TENANT: TenantId = TenantId(3);

#[test]
fn a_block_that_was_used_again_is_forgotten_after_those_idle_for_longer() {
    let mut pool = BlockPool::new(2);
    let blocks = pool.allocate(2).unwrap();
    let contents = [tokens(&[1, 2]), tokens(&[3, 4])];
    let root = find(&pool, &contents[0]).node;
    for (content, &block) in contents.iter().zip(&blocks) {
        pool.publish(root, content, block);
    }
    pool.release(&blocks[..1]);
    pool.release(&blocks[1..]);
    pool.share(&blocks[..1]);
    pool.release(&blocks[..1]);
    let taken = pool.allocate(1).unwrap();
    assert_eq!(taken, blocks[1..]);
    assert_eq!(find(&pool, &contents[0]).blocks, blocks[..1]);
}

fn tokens(ids: &[u32]) -> Vec<TokenId> {
    ids.iter().copied().map(TokenId).collect()
}

fn find(pool: &BlockPool, tokens: &[TokenId]) -> CachedPrefix {
    let blocks = tokens.chunks_exact(BLOCK).map(Cow::Borrowed);
    pool.find_prefix(TENANT, blocks)
}

/// Fills a whole sequence's blocks as a scheduler would after computing them.
fn fill(pool: &mut BlockPool, ids: &[u32]) -> Vec<BlockId> {
    let tokens = tokens(ids);
    let prefix = find(pool, &tokens);
    pool.share(&prefix.blocks);
    let full = tokens.chunks_exact(BLOCK).skip(prefix.blocks.len());
    let num_new = u32::try_from(full.len()).unwrap();
    let mut node = prefix.node;
    let mut blocks = prefix.blocks;
    let new = pool.allocate(num_new).unwrap();
    for (content, block) in full.zip(&new) {
        node = pool.publish(node, content, *block);
    }
    blocks.extend(new);
    blocks
}

#[test]
fn an_equal_beginning_is_shared_block_by_block() {
    let mut pool = BlockPool::new(8);
    let first = fill(&mut pool, &[1, 2, 3, 4]);
    let second = fill(&mut pool, &[1, 2, 9, 9, 5, 5]);
    assert_eq!(second[0], first[0]);
    assert_eq!(pool.num_owners(first[0]), 2);
    assert_eq!(pool.num_used_blocks(), 4);
    let found = find(&pool, &tokens(&[1, 2, 9, 9, 7, 7]));
    assert_eq!(found.blocks, second[..2]);
    assert_eq!(found.num_used_blocks, 2);
}

#[test]
fn equal_tokens_after_another_beginning_are_something_else() {
    let mut pool = BlockPool::new(8);
    fill(&mut pool, &[1, 2, 3, 4]);
    assert_eq!(find(&pool, &tokens(&[3, 4])).blocks, []);
    assert_eq!(find(&pool, &tokens(&[1, 2])).blocks.len(), 1);
    assert_eq!(find(&pool, &tokens(&[1])).blocks, []);
}

#[test]
fn tenants_do_not_find_each_others_beginnings() {
    let mut pool = BlockPool::new(8);
    let blocks = fill(&mut pool, &[1, 2, 3, 4]);
    let content = [tokens(&[1, 2])];
    let find = |tenant| pool.find_prefix(tenant, content.iter().map(Cow::from));
    assert_eq!(find(TENANT).blocks, blocks[..1]);
    assert_eq!(find(TenantId(4)).blocks, []);
}

#[test]
fn a_returned_beginning_is_found_until_its_block_is_needed() {
    let mut pool = BlockPool::new(4);
    let blocks = fill(&mut pool, &[1, 2, 3, 4, 5, 6]);
    pool.release(&blocks);
    assert_eq!(pool.num_free_blocks(), 4);
    pool.allocate(2).unwrap(); // the one that holds nothing, and the end of the beginning
    let found = find(&pool, &tokens(&[1, 2, 3, 4, 5, 6]));
    assert_eq!(found.blocks, blocks[..2]);
    assert_eq!(found.num_used_blocks, 0);
    pool.share(&found.blocks);
    assert_eq!(pool.allocate(1), None, "what is shared is in use");
}

#[test]
fn what_is_not_to_be_trusted_is_not_found_and_its_blocks_return() {
    let mut pool = BlockPool::new(4);
    let blocks = fill(&mut pool, &[1, 2, 3, 4]);
    let sharer = fill(&mut pool, &[1, 2, 5, 6]);
    pool.unpublish(&blocks);
    assert_eq!(find(&pool, &tokens(&[1, 2, 5, 6])).blocks, []);
    pool.release(&blocks);
    pool.release(&sharer);
    assert_eq!(pool.num_free_blocks(), 4);
    assert_eq!(pool.allocate(4).map(|blocks| blocks.len()), Some(4));
}

#[test]
fn what_was_used_last_is_forgotten_last() {
    let mut pool = BlockPool::new(2);
    let first = fill(&mut pool, &[1, 1]);
    let second = fill(&mut pool, &[2, 2]);
    pool.release(&second);
    pool.release(&first);
    pool.allocate(1).unwrap();
    assert_eq!(find(&pool, &tokens(&[2, 2])).blocks, []);
    assert_eq!(find(&pool, &tokens(&[1, 1])).blocks, first);
}

#[test]
fn two_that_compute_the_same_at_once_keep_their_blocks_and_one_is_known() {
    let mut pool = BlockPool::new(4);
    let [a, b] = pool.allocate(2).unwrap()[..] else {
        panic!("two blocks were asked for");
    };
    let node = pool.publish(NodeId::Root(TENANT), &tokens(&[1, 2]), a);
    assert_eq!(
        pool.publish(NodeId::Root(TENANT), &tokens(&[1, 2]), b),
        node
    );
    assert_eq!(find(&pool, &tokens(&[1, 2])).blocks, [a]);
    pool.release(&[b]);
    assert_eq!(pool.num_free_blocks(), 3);
}

#[derive(Clone, Debug)]
enum Step {
    /// Computes a sequence of so many blocks, whose tokens follow from these bits.
    Fill(u32, usize),
    /// Returns the sequence at this index of those that are there, modulo their number.
    Release(usize),
    /// The same, and nothing that it had is to be found again.
    Distrust(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (any::<u32>(), 0_usize..6).prop_map(|(bits, len)| Step::Fill(bits, len)),
        any::<usize>().prop_map(Step::Release),
        any::<usize>().prop_map(Step::Distrust),
    ];
    prop::collection::vec(step, 0..200)
}

/// Few different beginnings, so that many are shared.
fn content(bits: u32, num_blocks: usize) -> Vec<TokenId> {
    let bit = |index: usize| TokenId((bits >> (index / BLOCK)) & 1);
    (0..num_blocks * BLOCK).map(bit).collect()
}

proptest! {
    /// The model is what every block holds (the whole path to it) and who owns it.
    #[test]
    fn any_history_keeps_the_books(num_blocks in 0_u32..24, steps in steps()) {
        let mut pool = BlockPool::new(num_blocks);
        let mut holds: BTreeMap<BlockId, Vec<TokenId>> = BTreeMap::new();
        let mut sequences: Vec<Vec<BlockId>> = Vec::new();
        for step in steps {
            match step {
                Step::Fill(bits, len) => {
                    let tokens = content(bits, len);
                    let prefix = find(&pool, &tokens);
                    for (index, block) in prefix.blocks.iter().enumerate() {
                        let path = &tokens[..(index + 1) * BLOCK];
                        let held = holds.get(block).map(|path| &path[..]);
                        prop_assert_eq!(held, Some(path), "a wrong past");
                    }
                    pool.share(&prefix.blocks);
                    let num_new = u32::try_from(len - prefix.blocks.len()).unwrap();
                    let fits = num_new <= pool.num_free_blocks();
                    let new = pool.allocate(num_new);
                    prop_assert_eq!(new.is_some(), fits);
                    let Some(new) = new else {
                        pool.release(&prefix.blocks);
                        continue;
                    };
                    let mut node = prefix.node;
                    let mut blocks = prefix.blocks;
                    for block in new {
                        prop_assert!(block.0 < num_blocks);
                        prop_assert!(sequences.iter().flatten().all(|used| *used != block));
                        let end = (blocks.len() + 1) * BLOCK;
                        node = pool.publish(node, &tokens[end - BLOCK..end], block);
                        holds.insert(block, tokens[..end].to_vec());
                        blocks.push(block);
                    }
                    sequences.push(blocks);
                }
                Step::Release(index) if !sequences.is_empty() => {
                    let index = index % sequences.len();
                    pool.release(&sequences.swap_remove(index));
                }
                Step::Distrust(index) if !sequences.is_empty() => {
                    let index = index % sequences.len();
                    let blocks = sequences.swap_remove(index);
                    pool.unpublish(&blocks);
                    pool.release(&blocks);
                    holds.retain(|block, _| !blocks.contains(block));
                }
                Step::Release(_) | Step::Distrust(_) => {}
            }
            let used: BTreeSet<BlockId> = sequences.iter().flatten().copied().collect();
            for block in &used {
                let owners = sequences.iter().filter(|blocks| blocks.contains(block));
                prop_assert_eq!(pool.num_owners(*block) as usize, owners.count());
            }
            prop_assert_eq!(pool.num_used_blocks() as usize, used.len());
            prop_assert_eq!(pool.num_free_blocks() + pool.num_used_blocks(), num_blocks);
        }
    }
}
