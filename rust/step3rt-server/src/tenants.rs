//! Owns the numbers of tenants: a name has one while a request of it is live, and long after.
//!
//! It never grows with the names that were ever heard: beyond the live ones, it knows the last
//! [`MAX_IDLE_TENANTS`]. A name that was forgotten gets a new number when it comes back, which
//! loses what the scheduler had cached for it and nothing else.

use std::collections::{BTreeMap, HashMap};

use step3rt_core::ids::TenantId;

/// Tenants without a live request whose numbers are kept.
pub(crate) const MAX_IDLE_TENANTS: usize = 1_024;

/// Whose requests are those that name no tenant.
const DEFAULT_TENANT: TenantId = TenantId(0);

#[derive(Debug)]
struct Tenant {
    id: TenantId,
    num_live: usize,
    /// Its place in `idle`, while it has no live request.
    idle_since: u64,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct Tenants {
    by_name: HashMap<String, Tenant>,
    /// Names without a live request, longest idle first.
    idle: BTreeMap<u64, String>,
    num_ever: u64,
    num_idles_ever: u64,
}

impl Tenants {
    /// Notes a live request of the tenant `name`; empty names the default tenant.
    pub(crate) fn enter(&mut self, name: &str) -> TenantId {
        if name.is_empty() {
            return DEFAULT_TENANT;
        }
        if let Some(tenant) = self.by_name.get_mut(name) {
            if tenant.num_live == 0 {
                self.idle.remove(&tenant.idle_since);
            }
            tenant.num_live += 1;
            return tenant.id;
        }
        self.num_ever += 1;
        let id = TenantId(DEFAULT_TENANT.0 + self.num_ever);
        let tenant = Tenant {
            id,
            num_live: 1,
            idle_since: 0,
        };
        self.by_name.insert(name.to_owned(), tenant);
        id
    }

    /// Notes that a request of the tenant `name` has ended.
    pub(crate) fn leave(&mut self, name: &str) {
        let Some(tenant) = self.by_name.get_mut(name) else {
            return; // the default tenant
        };
        tenant.num_live = tenant.num_live.saturating_sub(1);
        if tenant.num_live > 0 {
            return;
        }
        self.num_idles_ever += 1;
        tenant.idle_since = self.num_idles_ever;
        self.idle.insert(self.num_idles_ever, name.to_owned());
        if self.idle.len() > MAX_IDLE_TENANTS
            && let Some((_, forgotten)) = self.idle.pop_first()
        {
            self.by_name.remove(&forgotten);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_one_number_and_no_other_has_it() {
        let mut tenants = Tenants::default();
        let first = tenants.enter("a");
        assert_eq!(tenants.enter("a"), first);
        let second = tenants.enter("b");
        let default = tenants.enter("");
        assert!(first != second && first != default && second != default);
        for name in ["a", "a", "b", ""] {
            tenants.leave(name);
        }
        assert_eq!(tenants.enter("a"), first, "it is idle and not forgotten");
        assert_eq!(tenants.enter(""), default);
    }

    #[test]
    fn however_many_names_come_few_are_kept() {
        let mut tenants = Tenants::default();
        let lives_on = tenants.enter("lives on");
        let came_back = tenants.enter("came back");
        tenants.leave("came back");
        for number in 0..100_000 {
            let name = number.to_string();
            tenants.enter(&name);
            tenants.leave(&name);
            assert!(tenants.by_name.len() <= MAX_IDLE_TENANTS + 1);
            assert!(tenants.idle.len() <= MAX_IDLE_TENANTS);
        }
        assert_eq!(tenants.enter("lives on"), lives_on);
        let again = tenants.enter("came back");
        assert!(again > came_back, "a number is never used for two names");
    }
}
