//! The cluster as people see it.
//!
//! Nothing is decided from these texts.

use step3rt_proto::v1;

use super::{Registry, Role, State};

impl Registry {
    /// The state of the cluster in one line, for people.
    pub fn status(&self) -> String {
        let num_ffn = self
            .instances
            .values()
            .filter(|entry| entry.role == Role::Ffn && entry.state != State::Loading)
            .count();
        let num_loading = self
            .instances
            .values()
            .filter(|entry| entry.state == State::Loading)
            .count();
        let prefix = match (self.is_draining, self.is_serving()) {
            (true, _) => "draining",
            (false, true) => "serving",
            (false, false) => "waiting for instances",
        };
        format!(
            "{prefix}: {} of {} attention linked, {num_ffn} of {} FFN ready, {num_loading} loading",
            self.num_linked(),
            self.config.num_attention,
            self.config.ep_size,
        )
    }

    /// Every instance as operators see it; free KV blocks are the scheduler's to fill in.
    pub fn instances(&self) -> Vec<v1::InstanceInfo> {
        self.instances
            .iter()
            .map(|(instance, entry)| v1::InstanceInfo {
                instance_id: instance.0,
                role: entry.hello.role,
                role_rank: entry.role_rank,
                epoch: entry.epoch.0,
                pid: entry.hello.pid,
                state: match entry.state {
                    State::Loading => "loading",
                    State::Ready => "ready",
                    State::Draining => "draining",
                }
                .to_owned(),
                status: entry.status.clone(),
                num_kv_blocks: entry.num_kv_blocks,
                num_free_kv_blocks: entry.num_kv_blocks,
                links: entry.links.clone(),
            })
            .collect()
    }
}
