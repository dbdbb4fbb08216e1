//! Owns the prediction whether a request can still end within its deadline.
//!
//! It never says no to what could: every figure is the least that could be needed. Whoever runs now
//! may end with its next step, what others compute of the same beginning counts as computed, and
//! steps are faster than any that was seen.

use crate::cluster::Need;
use crate::error::Failure;
use crate::ids::{RequestId, TimeNs};
use crate::instance::Instance;
use crate::recovery::Health;
use crate::scheduler::Scheduler;
use crate::sequence::Sequence;

/// The least that a sequence without a place needs to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Least {
    ns: u64,
    num_prompt_tokens: u32,
    num_new_tokens: u32,
}

impl Scheduler {
    /// Refuses a newcomer that cannot end in time. Returns when it must have begun at the latest;
    /// `None` if nothing is known of that.
    pub(crate) fn check_deadline(
        &self,
        now: TimeNs,
        sequence: &Sequence,
        deadline: TimeNs,
    ) -> Result<Option<TimeNs>, Failure> {
        let own = self.least(sequence, false);
        let queued_ns = self.least_wait_ns(sequence);
        let latest = TimeNs(deadline.0.saturating_sub(own.ns));
        if now.0.saturating_add(queued_ns) <= latest.0 {
            return Ok((own.ns > 0).then_some(latest));
        }
        let own = self.least(sequence, true);
        let latest = TimeNs(deadline.0.saturating_sub(own.ns));
        if now.0.saturating_add(queued_ns) <= latest.0 {
            return Ok((own.ns > 0).then_some(latest));
        }
        Err(Failure::DeadlineOutOfReach {
            least_ms: (queued_ns + own.ns).div_ceil(1_000_000),
            left_ms: deadline.since_ns(now) / 1_000_000,
            num_prompt_tokens: own.num_prompt_tokens,
            num_new_tokens: own.num_new_tokens,
        })
    }

    /// Fails those whose last chance to begin has passed while they waited. What was cached or
    /// measured since may give them another one.
    pub(crate) fn expire_hopeless(&mut self, now: TimeNs) {
        while let Some(&(latest, id)) = self.latest_starts.first()
            && latest < now
        {
            self.latest_starts.pop_first();
            let request = &self.requests[&id];
            let deadline = request.deadline.expect("who must begin must end");
            let slot = request.slots().next().expect("a live request has one");
            let sequence = &self.sequences[slot];
            if sequence.stay.is_some() {
                continue; // it has begun, and is let go on to its deadline
            }
            match self.check_deadline(now, sequence, deadline) {
                Ok(latest) => self.note_latest_start(id, latest),
                Err(failure) => self.fail(id, failure),
            }
        }
    }

    pub(crate) fn note_latest_start(&mut self, id: RequestId, latest: Option<TimeNs>) {
        let request = self.requests.get_mut(&id).expect("a live request");
        request.latest_start = latest;
        self.latest_starts.extend(latest.map(|latest| (latest, id)));
    }

    /// For the instance where it would be quickest; 0 where nothing is known. `shares` counts as
    /// computed what any live sequence has in common with it.
    fn least(&self, sequence: &Sequence, shares: bool) -> Least {
        let num_shared = if shares {
            self.num_shareable_tokens(sequence)
        } else {
            0
        };
        let need = Need::of(sequence, self.config.block_size_tokens);
        let instances = self.cluster.instances.values();
        let able = instances.filter(|i| need.at_most <= u64::from(i.pool.num_blocks()));
        let least = able.map(|instance| self.least_on(instance, sequence, num_shared));
        let nothing = Least {
            ns: 0,
            num_prompt_tokens: 0,
            num_new_tokens: 0,
        };
        // While the cluster recovers, who knows what will come.
        let least = least.filter(|_| self.health == Health::Whole);
        least.min_by_key(|least| least.ns).unwrap_or(nothing)
    }

    fn least_on(&self, instance: &Instance, sequence: &Sequence, num_shared: u32) -> Least {
        let block_size_tokens = self.config.block_size_tokens;
        let blocks = sequence.reusable_blocks(block_size_tokens);
        let cached = instance.pool.find_prefix(sequence.tenant, blocks);
        let num_cached = u32::try_from(cached.blocks.len()).expect("ids of blocks are u32");
        let num_computed = (num_cached * block_size_tokens).max(num_shared);
        let num_prompt_tokens = sequence.num_known_tokens() - num_computed;
        let num_new_tokens = least_new_tokens(sequence);
        let times = &instance.step_times;
        let chunks = num_prompt_tokens.div_ceil(self.config.max_tokens_per_micro_batch);
        let prefill_us = times.least_prefill_token_us() * f64::from(num_prompt_tokens);
        let prefill_us = prefill_us.max(times.least_step_us() * f64::from(chunks));
        let decode_us = times.least_step_us() * f64::from(num_new_tokens - 1);
        Least {
            ns: whole_ns(prefill_us + decode_us),
            num_prompt_tokens,
            num_new_tokens,
        }
    }

    /// Those who get places before it fill all that there are so many times over, and every one of
    /// them keeps its own for a step at least.
    fn least_wait_ns(&self, sequence: &Sequence) -> u64 {
        if self.health != Health::Whole {
            return 0;
        }
        let instances = self.cluster.instances.values();
        let num_lanes = u64::from(self.config.num_lanes);
        let num_places = num_lanes * u64::from(self.config.max_sequences_per_lane);
        let places = instances.clone().map(|i| {
            let num_blocks = u64::from(i.pool.num_blocks());
            num_places.min(num_blocks)
        });
        let num_ahead = self.queue.num_requests_before(sequence, &self.sequences) as u64;
        let num_rounds = num_ahead / places.sum::<u64>().max(1);
        let step_us = instances.map(|i| i.step_times.least_step_us());
        let step_us = step_us.min_by(f64::total_cmp).unwrap_or(0.0);
        whole_ns(step_us).saturating_mul(num_rounds)
    }

    /// Tokens of full blocks that some live sequence of the tenant has too, computed or not.
    fn num_shareable_tokens(&self, sequence: &Sequence) -> u32 {
        let block_size_tokens = self.config.block_size_tokens;
        let num_reusable = sequence.reusable_blocks(block_size_tokens).count();
        let others = self.sequences.iter().map(|(_, other)| other);
        let others = others
            .filter(|other| other.tenant == sequence.tenant && other.request != sequence.request);
        let mut num_shared = 0;
        for other in others {
            let num_full = (other.num_known_tokens() / block_size_tokens) as usize;
            let is_shared = |index: usize| {
                let [one, other] =
                    [sequence, other].map(|s| s.full_block(index, block_size_tokens));
                one == other
            };
            let most = num_reusable.min(num_full);
            // Thousands may begin alike: whether one has more in common shows at the next block.
            if num_shared < most && is_shared(num_shared) && (0..num_shared).all(is_shared) {
                let more = (num_shared..most).take_while(|&index| is_shared(index));
                num_shared += more.count();
            }
        }
        len(num_shared) * block_size_tokens
    }
}

/// Tokens that it must still generate before anything but its client can end it.
fn least_new_tokens(sequence: &Sequence) -> u32 {
    let most = sequence.max_known_tokens - sequence.num_prompt_tokens();
    let least = sequence.details.sampling.min_tokens.clamp(1, most);
    least.saturating_sub(sequence.num_generated_tokens()).max(1)
}

fn len(count: usize) -> u32 {
    u32::try_from(count).expect("tokens of a sequence are bounded by max_model_len")
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "positive, and a cast saturates"
)]
fn whole_ns(us: f64) -> u64 {
    (us * 1e3) as u64
}
