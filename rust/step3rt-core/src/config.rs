//! The scheduler's settings, validated once where they enter.

use thiserror::Error;

/// Fixed for a coordinator's life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Micro-batch lanes per attention instance, 1 to 8.
    pub num_lanes: u8,
    /// Tokens of one KV block.
    pub block_size_tokens: u32,
    /// Longest sequence, prompt and output together.
    pub max_model_len: u32,
    /// Most tokens (prefill and decode together) of one lane's step; every slot has this size.
    pub max_tokens_per_micro_batch: u32,
    /// Steps of one lane that may be planned and not answered, 1 to 4. With 2, the instance has
    /// the next step before the last one's tokens are back, and never waits for a plan.
    pub max_steps_in_flight: u8,
    /// The time per output token that prompts must leave to those that decode: a step with decodes
    /// gets no more prompt tokens than it can compute within this time.
    pub target_tpot_ms: u32,
    /// Most sequences of one lane.
    pub max_sequences_per_lane: u32,
    /// Most requests that wait for a place.
    pub max_waiting_requests: u32,
    /// How long sequences wait for a lost instance to come back before they fail.
    pub recovery_timeout_ms: u64,
    /// For measurements of decoding at long contexts, which would spend their time on prompts: all
    /// of a sequence but its last known token counts as computed from the start, whatever its
    /// blocks hold. What is generated then means nothing, and nothing is shared or cached.
    pub assumes_computed_prompts: bool,
}

/// Most lanes of one attention instance. The pipeline has three stages; more than two lanes per
/// stage only add slots and latency.
pub const MAX_LANES: u8 = 8;

/// Most steps of one lane in flight. One ahead hides the round trip; what runs further ahead is
/// only more to throw away when a sequence stops.
pub const MAX_STEPS_IN_FLIGHT: u8 = 4;

impl SchedulerConfig {
    /// Checks every setting against its range and against each other.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.num_lanes == 0 || self.num_lanes > MAX_LANES {
            return Err(ConfigError::NumLanes {
                num_lanes: self.num_lanes,
            });
        }
        if self.block_size_tokens == 0 {
            return Err(ConfigError::EmptyBlock);
        }
        if self.max_model_len < 2 {
            return Err(ConfigError::ContextTooShort {
                max_model_len: self.max_model_len,
            });
        }
        if self.max_steps_in_flight == 0 || self.max_steps_in_flight > MAX_STEPS_IN_FLIGHT {
            return Err(ConfigError::StepsInFlight {
                max_steps_in_flight: self.max_steps_in_flight,
            });
        }
        if self.target_tpot_ms == 0 {
            return Err(ConfigError::NoStepTime);
        }
        if self.max_sequences_per_lane == 0 {
            return Err(ConfigError::NoSequences);
        }
        if self.max_sequences_per_lane > self.max_tokens_per_micro_batch {
            return Err(ConfigError::LaneOutgrowsMicroBatch {
                max_sequences: self.max_sequences_per_lane,
                max_tokens: self.max_tokens_per_micro_batch,
            });
        }
        if self.max_waiting_requests == 0 {
            return Err(ConfigError::NoQueue);
        }
        Ok(())
    }
}

/// A setting that the scheduler cannot work with.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// See [`SchedulerConfig::num_lanes`].
    #[error(
        "`num_lanes` is {num_lanes}. Every lane has its own slots at every peer, and the pipeline \
         has three stages to fill. Set `num_lanes` between 1 and {MAX_LANES}"
    )]
    NumLanes {
        /// As given.
        num_lanes: u8,
    },
    /// See [`SchedulerConfig::block_size_tokens`].
    #[error(
        "`block_size_tokens` is 0. A KV block holds at least one token. Set `block_size_tokens` \
         to 64"
    )]
    EmptyBlock,
    /// See [`SchedulerConfig::max_model_len`].
    #[error(
        "`max_model_len` is {max_model_len}. A sequence has at least one prompt token and one \
         new token. Set `max_model_len` to 2 or more"
    )]
    ContextTooShort {
        /// As given.
        max_model_len: u32,
    },
    /// See [`SchedulerConfig::max_steps_in_flight`].
    #[error(
        "`max_steps_in_flight` is {max_steps_in_flight}. A lane needs one step to work, and what \
         runs far ahead is thrown away when sequences stop. Set `max_steps_in_flight` between 1 \
         and {MAX_STEPS_IN_FLIGHT}"
    )]
    StepsInFlight {
        /// As given.
        max_steps_in_flight: u8,
    },
    /// See [`SchedulerConfig::target_tpot_ms`].
    #[error(
        "`target_tpot_ms` is 0. Every step takes some time, and prompts would get next to none \
         of it. Set `target_tpot_ms` to what a client should wait for a token, 50 as a rule"
    )]
    NoStepTime,
    /// See [`SchedulerConfig::max_sequences_per_lane`].
    #[error(
        "`max_sequences_per_lane` is 0. A lane without sequences never has work. Set \
         `max_sequences_per_lane` to 1 or more"
    )]
    NoSequences,
    /// A lane that only decodes must fit one micro-batch.
    #[error(
        "`max_sequences_per_lane` is {max_sequences} and `max_tokens_per_micro_batch` is \
         {max_tokens}. A decode step takes one token of every sequence of the lane, and a slot \
         holds one micro-batch. Lower `max_sequences_per_lane` to {max_tokens} or raise \
         `max_tokens_per_micro_batch`"
    )]
    LaneOutgrowsMicroBatch {
        /// As given.
        max_sequences: u32,
        /// As given.
        max_tokens: u32,
    },
    /// See [`SchedulerConfig::max_waiting_requests`].
    #[error(
        "`max_waiting_requests` is 0. A request waits at least until the next step is planned. \
         Set `max_waiting_requests` to 1 or more"
    )]
    NoQueue,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn valid() -> SchedulerConfig {
        SchedulerConfig {
            num_lanes: 3,
            block_size_tokens: 64,
            max_model_len: 4096,
            max_tokens_per_micro_batch: 256,
            max_steps_in_flight: 4,
            target_tpot_ms: 50,
            max_sequences_per_lane: 256,
            max_waiting_requests: 100,
            recovery_timeout_ms: 10_000,
            assumes_computed_prompts: false,
        }
    }

    fn with(change: impl FnOnce(&mut SchedulerConfig)) -> String {
        let mut config = valid();
        change(&mut config);
        config.validate().unwrap_err().to_string()
    }

    #[test]
    fn settings_at_their_limits_are_valid() {
        assert_eq!(valid().validate(), Ok(()));
        let smallest = SchedulerConfig {
            num_lanes: 1,
            block_size_tokens: 1,
            max_model_len: 2,
            max_tokens_per_micro_batch: 1,
            max_steps_in_flight: 1,
            target_tpot_ms: 1,
            max_sequences_per_lane: 1,
            max_waiting_requests: 1,
            recovery_timeout_ms: 0,
            assumes_computed_prompts: false,
        };
        assert_eq!(smallest.validate(), Ok(()));
        let mut most_lanes = valid();
        most_lanes.num_lanes = MAX_LANES;
        assert_eq!(most_lanes.validate(), Ok(()));
    }

    #[test]
    fn every_bad_setting_says_what_why_and_fix() {
        let messages = [
            with(|c| c.num_lanes = 0),
            with(|c| c.num_lanes = 9),
            with(|c| c.block_size_tokens = 0),
            with(|c| c.max_model_len = 1),
            with(|c| c.max_steps_in_flight = 0),
            with(|c| c.max_steps_in_flight = 5),
            with(|c| c.target_tpot_ms = 0),
            with(|c| c.max_sequences_per_lane = 0),
            with(|c| c.max_sequences_per_lane = 257),
            with(|c| c.max_waiting_requests = 0),
        ];
        insta::assert_snapshot!(messages.join("\n"));
    }
}
