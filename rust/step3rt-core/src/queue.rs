//! Owns the order in which sequences without a place get one.
//!
//! It never knows why a sequence waits: new ones, preempted ones and those of a lost instance
//! stand in the same line, by [`Rank`](crate::sequence::Rank). Each tenant has a line of its own
//! per priority, and [`FairShare`] says whose turn it is.

use std::collections::{BTreeMap, BTreeSet, btree_map, btree_set};
use std::iter::Peekable;

use crate::fair_share::FairShare;
use crate::ids::{RequestId, TenantId};
use crate::sequence::{Rank, Sequence};
use crate::sequence_table::{SequenceTable, Slot};

type Line = BTreeSet<(Rank, Slot)>;
type RestOfLine<'a> = Peekable<btree_set::Iter<'a, (Rank, Slot)>>;

#[derive(Debug, Default)]
pub(crate) struct WaitingQueue {
    /// By priority.
    classes: BTreeMap<i32, BTreeMap<TenantId, Line>>,
    /// How many sequences of each request wait; the bound is on requests.
    requests: BTreeMap<RequestId, u32>,
    /// How many requests of each tenant wait.
    tenants: BTreeMap<TenantId, usize>,
}

impl WaitingQueue {
    pub(crate) fn insert(&mut self, slot: Slot, sequence: &Sequence) {
        let (rank, tenant) = (sequence.details.rank, sequence.tenant);
        let class = self.classes.entry(rank.priority).or_default();
        let line = class.entry(tenant).or_default();
        let is_new = line.insert((rank, slot));
        assert!(is_new, "a sequence waits once");
        let count = self.requests.entry(sequence.request).or_default();
        *count += 1;
        if *count == 1 {
            *self.tenants.entry(tenant).or_default() += 1;
        }
    }

    pub(crate) fn remove(&mut self, slot: Slot, sequence: &Sequence) {
        let (priority, tenant) = (sequence.details.rank.priority, sequence.tenant);
        let class = self.classes.get_mut(&priority).expect("it waits");
        let line = class.get_mut(&tenant).expect("it waits");
        let was_there = line.remove(&(sequence.details.rank, slot));
        assert!(was_there, "only what waits is removed");
        if line.is_empty() {
            class.remove(&tenant);
        }
        if class.is_empty() {
            self.classes.remove(&priority);
        }
        let count = self.requests.get_mut(&sequence.request).expect("it waits");
        *count -= 1;
        if *count == 0 {
            self.requests.remove(&sequence.request);
            let count = self.tenants.get_mut(&tenant).expect("it waits");
            *count -= 1;
            if *count == 0 {
                self.tenants.remove(&tenant);
            }
        }
    }

    pub(crate) fn num_requests(&self) -> usize {
        self.requests.len()
    }

    /// The request that must give its place in the line of `max` requests to a newcomer of
    /// `tenant`: if that has fewer there than an equal share, the youngest of the lowest priority of
    /// the tenant that has most, as long as that has more than its share. One that has begun is
    /// never asked, since its client has seen tokens.
    ///
    /// When the line is full and one tenant is below its share, some other is above it.
    pub(crate) fn must_yield(
        &self,
        tenant: TenantId,
        max: usize,
        has_begun: impl Fn(Slot) -> bool,
    ) -> Option<Slot> {
        let own = self.tenants.get(&tenant).copied().unwrap_or(0);
        let num_tenants = self.tenants.len() + usize::from(own == 0);
        let share = (max / num_tenants).max(1);
        if own >= share {
            return None;
        }
        let above = self.tenants.iter().filter(|&(_, &count)| count > share);
        let mut above: Vec<_> = above.map(|(&tenant, &count)| (count, tenant)).collect();
        above.sort_unstable_by(|a, b| b.cmp(a));
        above.into_iter().find_map(|(_, tenant)| {
            let lines = self.classes.values().rev();
            let lines = lines.filter_map(|class| class.get(&tenant));
            let slots = lines.flat_map(|line| line.iter().rev().map(|&(_, slot)| slot));
            slots.into_iter().find(|&slot| !has_begun(slot))
        })
    }

    /// At least so many requests get their first places before this sequence does, whether it
    /// waits or comes now: those of better priorities, and the older ones of its tenant.
    pub(crate) fn num_requests_before(&self, sequence: &Sequence, table: &SequenceTable) -> usize {
        let rank = sequence.details.rank;
        let better = self.classes.range(..rank.priority);
        let better = better.flat_map(|(_, class)| class.values()).flatten();
        let class = self.classes.get(&rank.priority);
        let line = class.and_then(|class| class.get(&sequence.tenant));
        let older = line
            .into_iter()
            .flatten()
            .take_while(|&&(other, _)| other < rank);
        // A request's other continuations wait for its first one.
        let first = |&&(_, slot): &&(Rank, Slot)| table[slot].index == 0;
        better.chain(older).filter(first).count()
    }

    /// Goes through all that wait, in the order in which they are served.
    pub(crate) fn turns(&self) -> Turns<'_> {
        Turns {
            classes: self.classes.values(),
            lines: Vec::new(),
        }
    }

    pub(crate) fn contains(&self, slot: Slot, sequence: &Sequence) -> bool {
        let class = self.classes.get(&sequence.details.rank.priority);
        let line = class.and_then(|class| class.get(&sequence.tenant));
        line.is_some_and(|line| line.contains(&(sequence.details.rank, slot)))
    }

    pub(crate) fn num_sequences(&self) -> usize {
        let lines = self.classes.values().flat_map(BTreeMap::values);
        lines.map(BTreeSet::len).sum()
    }
}

/// See [`WaitingQueue::turns`].
pub(crate) struct Turns<'a> {
    classes: btree_map::Values<'a, i32, BTreeMap<TenantId, Line>>,
    /// Of the class whose turn it is.
    lines: Vec<(TenantId, RestOfLine<'a>)>,
}

impl Turns<'_> {
    /// The next one. Shares may change between two turns: they are looked at for each.
    pub(crate) fn take_one(&mut self, shares: &FairShare) -> Option<Slot> {
        loop {
            let heads = self.lines.iter_mut().filter_map(|(tenant, line)| {
                let &&(rank, _) = line.peek()?;
                Some(((shares.cost(*tenant), rank), line))
            });
            if let Some((_, line)) = heads.min_by_key(|&(turn, _)| turn) {
                return line.next().map(|&(_, slot)| slot);
            }
            let class = self.classes.next()?.iter();
            let lines = class.map(|(tenant, line)| (*tenant, line.iter().peekable()));
            self.lines = lines.collect();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(priority: i32, arrival: u64, (tenant, request): (u64, u64)) -> Sequence {
        let mut sequence = Sequence::for_tests(&[1], &[]);
        sequence.details.rank = Rank { priority, arrival };
        sequence.tenant = TenantId(tenant);
        sequence.request = RequestId(request);
        sequence
    }

    /// The arrivals of all that wait, in their turn; each turn costs ten.
    fn order(queue: &WaitingQueue, table: &SequenceTable, shares: &mut FairShare) -> Vec<u64> {
        let mut turns = queue.turns();
        let mut order = Vec::new();
        while let Some(slot) = turns.take_one(shares) {
            let sequence = &table[slot];
            order.push(sequence.details.rank.arrival);
            shares.charge_prompt(sequence.tenant, 10);
        }
        order
    }

    fn queue_of(sequences: Vec<Sequence>) -> (WaitingQueue, SequenceTable, FairShare) {
        let mut queue = WaitingQueue::default();
        let mut table = SequenceTable::default();
        let mut shares = FairShare::default();
        for sequence in sequences {
            shares.arrive(sequence.tenant, 1);
            let slot = table.insert(sequence);
            queue.insert(slot, &table[slot]);
        }
        (queue, table, shares)
    }

    #[test]
    fn one_tenant_is_served_by_priority_and_then_by_age() {
        let (queue, table, mut shares) = queue_of(vec![
            waiting(1, 0, (0, 7)),
            waiting(0, 2, (0, 8)),
            waiting(0, 1, (0, 8)),
        ]);
        assert_eq!(order(&queue, &table, &mut shares), [1, 2, 0]);
    }

    #[test]
    fn tenants_of_one_priority_take_turns() {
        let sequences =
            (0..6).map(|arrival| waiting(0, arrival, (u64::from(arrival > 3), arrival)));
        let (queue, table, mut shares) = queue_of(sequences.collect());
        assert_eq!(order(&queue, &table, &mut shares), [0, 4, 1, 5, 2, 3]);
    }

    #[test]
    fn a_full_line_is_shared_between_tenants() {
        let sequences = (0..6).map(|arrival| {
            let tenant = u64::from(arrival == 5) + 1; // five of tenant 1, one of tenant 2
            waiting(i32::from(arrival == 1), arrival, (tenant, arrival))
        });
        let (mut queue, table, _) = queue_of(sequences.collect());
        let yields = |queue: &WaitingQueue, tenant, begun: &[u64]| {
            let has_begun = |slot| begun.contains(&table[slot].details.rank.arrival);
            let slot = queue.must_yield(TenantId(tenant), 6, has_begun);
            slot.map(|slot| table[slot].details.rank.arrival)
        };
        assert_eq!(yields(&queue, 3, &[]), Some(1), "the lowest priority");
        assert_eq!(yields(&queue, 2, &[1]), Some(4), "then the youngest");
        assert_eq!(yields(&queue, 2, &[0, 1, 2, 3, 4]), None, "all have begun");
        assert_eq!(yields(&queue, 1, &[]), None, "it has had its share");
        let three_each = (0..6).map(|arrival| waiting(0, arrival, (arrival % 2, arrival)));
        let (even, _, _) = queue_of(three_each.collect());
        assert_eq!(even.must_yield(TenantId(0), 7, |_| false), None, "exactly");
        let slots: Vec<Slot> = table.iter().map(|(slot, _)| slot).collect();
        for slot in &slots[..3] {
            queue.remove(*slot, &table[*slot]);
        }
        assert_eq!(
            yields(&queue, 3, &[]),
            None,
            "nobody is above a share of two"
        );
    }

    #[test]
    fn the_tenant_that_has_most_in_line_yields_first() {
        for largest in 1..4 {
            let tenants =
                (1..4).flat_map(|tenant| vec![tenant; 3 + usize::from(tenant == largest)]);
            let sequences = (0..)
                .zip(tenants)
                .map(|(n, tenant)| waiting(0, n, (tenant, n)));
            let (queue, table, _) = queue_of(sequences.collect());
            let slot = queue.must_yield(TenantId(9), 10, |_| false);
            assert_eq!(slot.map(|slot| table[slot].tenant), Some(TenantId(largest)));
        }
    }

    #[test]
    fn a_full_line_of_more_tenants_than_places_gives_everybody_one() {
        let (queue, _, _) = queue_of((0..4).map(|n| waiting(0, n, (n, n))).collect());
        for tenant in [0, 9] {
            let yields = queue.must_yield(TenantId(tenant), 4, |_| false);
            assert_eq!(yields, None, "nobody has more than one");
        }
    }

    #[test]
    fn shares_of_the_line_are_counted_in_requests_of_those_that_still_wait() {
        // Three continuations of one request, and two requests, of another tenant that is gone.
        let own = (0..3).map(|arrival| waiting(0, arrival, (1, 1)));
        let others = (3..5).map(|arrival| waiting(1, arrival, (2, arrival)));
        let (mut queue, table, _) = queue_of(own.chain(others).collect());
        assert_eq!(queue.tenants, [(TenantId(1), 1), (TenantId(2), 2)].into());
        for (slot, sequence) in table.iter().skip(3) {
            queue.remove(slot, sequence);
        }
        assert_eq!(queue.tenants, [(TenantId(1), 1)].into());
        assert_eq!((queue.classes.len(), queue.requests.len()), (1, 1));
        for (slot, sequence) in table.iter().take(3) {
            queue.remove(slot, sequence);
        }
        assert!(queue.classes.is_empty() && queue.tenants.is_empty());
    }

    #[test]
    fn before_one_come_better_priorities_and_older_ones_of_its_tenant() {
        let (queue, table, _) = queue_of(vec![
            waiting(0, 5, (2, 0)),
            waiting(1, 1, (1, 1)),
            waiting(1, 2, (2, 2)),
            waiting(1, 3, (1, 3)),
            waiting(2, 0, (1, 4)),
        ]);
        let before = |arrival| {
            let newcomer = waiting(1, arrival, (1, 9));
            queue.num_requests_before(&newcomer, &table)
        };
        assert_eq!([before(0), before(2), before(9)], [1, 2, 3]);
        let one_that_waits = table.iter().find(|(_, s)| s.request == RequestId(3));
        let (_, one_that_waits) = one_that_waits.unwrap();
        assert_eq!(queue.num_requests_before(one_that_waits, &table), 2);
    }

    #[test]
    fn a_share_says_nothing_across_priorities() {
        let (queue, table, mut shares) = queue_of(vec![
            waiting(0, 0, (1, 0)),
            waiting(0, 1, (1, 1)),
            waiting(1, 2, (2, 2)),
        ]);
        shares.charge_prompt(TenantId(1), 1_000);
        assert_eq!(order(&queue, &table, &mut shares), [0, 1, 2]);
    }

    #[test]
    fn the_length_of_the_line_is_in_requests() {
        let (mut queue, table, _) = queue_of(vec![
            waiting(1, 0, (0, 7)),
            waiting(0, 2, (1, 8)),
            waiting(0, 1, (1, 8)),
        ]);
        assert_eq!((queue.num_requests(), queue.num_sequences()), (2, 3));
        let slots: Vec<Slot> = table.iter().map(|(slot, _)| slot).collect();
        queue.remove(slots[2], &table[slots[2]]);
        assert!(queue.contains(slots[1], &table[slots[1]]));
        assert!(!queue.contains(slots[2], &table[slots[2]]));
        assert_eq!(
            queue.num_requests(),
            2,
            "the other continuation waits still"
        );
        queue.remove(slots[1], &table[slots[1]]);
        assert_eq!((queue.num_requests(), queue.num_sequences()), (1, 1));
    }
}
