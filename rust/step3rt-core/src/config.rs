//! The scheduler's settings, validated once where they enter.

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
    /// Most sequences of one lane.
    pub max_sequences_per_lane: u32,
    /// Most requests that wait for a place.
    pub max_waiting_requests: u32,
    /// How long sequences wait for a lost instance to come back before they fail.
    pub recovery_timeout_ms: u64,
}
