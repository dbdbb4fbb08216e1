//! What ends by the clock: leases that run out, and links that do not come.
//!
//! It never reads a clock; the drive loop calls it with the time.

use step3rt_core::ids::TimeNs;

use super::{Action, Instance, Registry};

impl Registry {
    /// Ends the sessions whose lease has run out, and those of instances that could not link in
    /// time: the steps planned for one wait for its links, and the sequences with them.
    pub fn expire(&mut self, now: TimeNs) -> Vec<Action> {
        let reason = format!("no heartbeat for lease_ms = {}", self.config.lease_ms);
        let mut actions = self.close_all(&reason, |entry| entry.lease_end <= now);
        self.review_links(now);
        let max_unlinked_ms = self.config.max_unlinked_ms;
        let reason = format!(
            "it has not linked to every FFN instance for {max_unlinked_ms} ms (recovery_timeout_ms, \
             at least lease_ms), and the steps planned for it wait for its links. Its log says what \
             keeps it from linking; see that its host reaches the data address of every FFN instance"
        );
        actions.extend(self.close_all(&reason, |entry| {
            let since = entry.unlinked_since;
            since.is_some_and(|since| since.plus_ms(max_unlinked_ms) <= now)
        }));
        actions
    }

    /// When [`Self::expire`] must be called even if nothing happens.
    pub fn next_timer(&self) -> Option<TimeNs> {
        let max_unlinked_ms = self.config.max_unlinked_ms;
        let entries = self.instances.values();
        let unlinked = entries.clone().filter_map(|entry| entry.unlinked_since);
        entries
            .map(|entry| entry.lease_end)
            .chain(unlinked.map(|since| since.plus_ms(max_unlinked_ms)))
            .min()
    }

    fn close_all(&mut self, reason: &str, is_over: impl Fn(&Instance) -> bool) -> Vec<Action> {
        let instances = self.instances.iter();
        let over: Vec<_> = instances
            .filter(|(_, entry)| is_over(entry))
            .map(|(instance, _)| *instance)
            .collect();
        over.into_iter()
            .flat_map(|instance| self.close(instance, reason))
            .collect()
    }

    /// Notes whose steps wait for links. While experts are missing nobody could make them all, and
    /// the scheduler counts that time.
    fn review_links(&mut self, now: TimeNs) {
        let (are_complete, experts_version) = (self.are_experts_complete, self.experts_version);
        for entry in self.instances.values_mut() {
            let is_waiting =
                are_complete && entry.is_schedulable && entry.linked_version < experts_version;
            let since = is_waiting.then(|| entry.unlinked_since.unwrap_or(now));
            entry.unlinked_since = since;
        }
    }
}

#[cfg(test)]
mod tests;
