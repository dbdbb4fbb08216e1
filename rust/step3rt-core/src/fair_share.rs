//! Owns how much each tenant was served, so that among equals the least served goes first.
//!
//! It never holds anybody back: with one tenant at work, or room for all, order is all it decides.
//!
//! Every tenant has a counter of the work done for it, and whoever takes a turn adds to its own
//! counter, so tenants that always have something waiting are served at the same rate, whatever
//! the number and length of their requests. A tenant that comes (back) starts no lower than the
//! least served one at work: there is no credit for having been away.

use std::collections::BTreeMap;

use crate::ids::TenantId;

/// A generated token costs a step of its own that reads the whole KV of its sequence; a prompt
/// token shares its step with the others of its chunk. Price lists have the same order.
const GENERATED_TOKEN_COST: u64 = 2;
/// Tenants that are away and were served more than others, of which that is remembered: so many
/// that names cannot be used up at leisure, few enough to be gone through.
const MAX_ABSENT: usize = 1_024;

#[derive(Debug, Default)]
pub(crate) struct FairShare {
    tenants: BTreeMap<TenantId, Share>,
}

/// The tokens of one step by tenant, gathered so that a step of one tenant is one look-up.
#[derive(Debug, Default)]
pub(crate) struct TokenCount {
    runs: Vec<(TenantId, u64)>,
}

impl TokenCount {
    pub(crate) fn count(&mut self, tenant: TenantId, num_tokens: u64) {
        match self.runs.last_mut() {
            Some((last, sum)) if *last == tenant => *sum += num_tokens,
            _ => self.runs.push((tenant, num_tokens)),
        }
    }
}

#[derive(Debug, Default)]
struct Share {
    cost: u64,
    num_live_sequences: u64,
}

impl FairShare {
    /// Notes new sequences of `tenant`.
    pub(crate) fn arrive(&mut self, tenant: TenantId, num_sequences: u64) {
        let floor = self.least_cost_at_work();
        let share = self.tenants.entry(tenant).or_default();
        if share.num_live_sequences == 0 {
            share.cost = share.cost.max(floor.unwrap_or(0));
        }
        share.num_live_sequences += num_sequences;
    }

    /// Notes that a sequence of `tenant` has ended. What is known of tenants that are away and
    /// were served no more than others is forgotten: they start with the least served anyway.
    pub(crate) fn depart(&mut self, tenant: TenantId) {
        let share = self.tenants.get_mut(&tenant).expect("it arrived");
        share.num_live_sequences -= 1;
        if share.num_live_sequences > 0 {
            return;
        }
        let floor = self.least_cost_at_work();
        self.tenants.retain(|_, share| {
            let has_debt = floor.is_some_and(|floor| share.cost > floor);
            share.num_live_sequences > 0 || has_debt
        });
        self.bound_absent();
    }

    /// Forgets the smallest debt if there are too many.
    fn bound_absent(&mut self) {
        let tenants = self.tenants.iter();
        let absent = tenants.filter(|(_, share)| share.num_live_sequences == 0);
        if absent.clone().count() > MAX_ABSENT {
            let least = absent.min_by_key(|(_, share)| share.cost);
            let (&tenant, _) = least.expect("there are many");
            self.tenants.remove(&tenant);
        }
    }

    pub(crate) fn charge_prompt(&mut self, tenant: TenantId, num_tokens: u64) {
        self.charge(tenant, num_tokens);
    }

    pub(crate) fn charge_generated(&mut self, tokens: TokenCount) {
        for (tenant, num_tokens) in tokens.runs {
            self.charge(tenant, num_tokens * GENERATED_TOKEN_COST);
        }
    }

    /// What `tenant` was served, on a scale that is common to all.
    pub(crate) fn cost(&self, tenant: TenantId) -> u64 {
        self.tenants.get(&tenant).map_or(0, |share| share.cost)
    }

    /// How many sequences of each tenant at work have not ended.
    pub(crate) fn live_sequences(&self) -> impl Iterator<Item = (TenantId, u64)> {
        let counts = self.tenants.iter();
        let counts = counts.map(|(&tenant, share)| (tenant, share.num_live_sequences));
        counts.filter(|&(_, num_live)| num_live > 0)
    }

    fn charge(&mut self, tenant: TenantId, cost: u64) {
        let share = self.tenants.get_mut(&tenant).expect("it arrived");
        share.cost += cost;
    }

    fn least_cost_at_work(&self) -> Option<u64> {
        let shares = self.tenants.values();
        let at_work = shares.filter(|share| share.num_live_sequences > 0);
        at_work.map(|share| share.cost).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: TenantId = TenantId(1);
    const B: TenantId = TenantId(2);
    const C: TenantId = TenantId(3);

    #[test]
    fn a_newcomer_starts_with_the_least_served_at_work() {
        let mut share = FairShare::default();
        share.arrive(A, 1);
        share.charge_prompt(A, 100);
        share.arrive(B, 1);
        assert_eq!(share.cost(B), 100);
        let mut generated = TokenCount::default();
        for tenant in [B, B, A, B] {
            generated.count(tenant, 3);
        }
        share.charge_generated(generated);
        share.arrive(C, 1);
        assert_eq!([A, B, C].map(|t| share.cost(t)), [106, 118, 106]);
    }

    #[test]
    fn going_away_neither_earns_credit_nor_clears_a_debt() {
        let mut share = FairShare::default();
        share.arrive(A, 1);
        share.arrive(B, 2);
        share.charge_prompt(A, 50);
        share.depart(A);
        share.charge_prompt(B, 20);
        share.arrive(A, 1);
        assert_eq!(share.cost(A), 50, "it has had more than the others");
        share.depart(A);
        share.charge_prompt(B, 200);
        share.arrive(A, 1);
        assert_eq!(share.cost(A), 220, "it has missed its turns");
    }

    #[test]
    fn few_debts_are_kept_however_many_tenants_come() {
        let mut share = FairShare::default();
        share.arrive(A, 1); // is never served
        for number in 10..5_000 {
            share.arrive(TenantId(number), 1);
            share.charge_prompt(TenantId(number), number);
            share.depart(TenantId(number));
            assert!(share.tenants.len() <= MAX_ABSENT + 1);
        }
        assert_eq!(share.cost(TenantId(4_999)), 4_999, "the largest are kept");
    }

    #[test]
    fn nothing_is_kept_of_tenants_without_debt() {
        let mut share = FairShare::default();
        share.arrive(A, 1);
        share.arrive(B, 1);
        share.charge_prompt(A, 5);
        share.charge_prompt(B, 5);
        share.depart(A);
        assert_eq!(share.tenants.len(), 1, "A has had no more than B");
        share.depart(B);
        assert!(share.tenants.is_empty());
    }
}
