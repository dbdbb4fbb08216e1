//! Owns the three synthetic traces: who asks what, and when. A seed gives the same trace always.
//!
//! They are made up, with the shapes that serving papers report; they are no recordings.

use serde::Deserialize;
use step3rt_core::ids::{RequestId, TenantId, TimeNs, TokenId};
use step3rt_core::request::Request;
use step3rt_core::step::SamplingState;

use crate::rng::Rng;

/// Which trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TraceKind {
    /// Chat that comes in bursts: one system prompt for all, short answers.
    Bursty,
    /// Long thinking: prompts of 500 to 8,000 tokens, answers of 1K to 32K.
    Reasoning,
    /// Interactive requests of two tenants, and a third tenant's bulk work behind them.
    Mixed,
}

/// Tokens of the system prompt that all chats begin with.
const NUM_SYSTEM_TOKENS: u32 = 512;

/// `num_requests` requests in the order of their arrival.
pub(crate) fn requests(kind: TraceKind, seed: u64, num_requests: u32) -> Vec<(u64, Request)> {
    let mut rng = Rng::new(seed);
    let mut now_ms = 0.0;
    let mut left_in_burst = 0;
    let request = |id: u32| {
        let (gap_ms, shape) = match kind {
            TraceKind::Bursty => {
                let starts_burst = left_in_burst == 0;
                if starts_burst {
                    left_in_burst = rng.within(100, 400);
                }
                left_in_burst -= 1;
                let mean_ms = if starts_burst { 9_000.0 } else { 3.0 };
                (rng.exponential(mean_ms), Shape::chat(&mut rng))
            }
            TraceKind::Reasoning => (rng.exponential(3_500.0), Shape::reasoning(&mut rng)),
            TraceKind::Mixed => {
                let shape = if rng.chance(650) {
                    Shape::chat(&mut rng)
                } else {
                    Shape::bulk(&mut rng)
                };
                (rng.exponential(70.0), shape)
            }
        };
        now_ms += gap_ms;
        (ns_of_ms(now_ms), shape.request(id))
    };
    (0..num_requests).map(request).collect()
}

/// What a request is like.
struct Shape {
    num_system_tokens: u32,
    num_own_tokens: u32,
    max_tokens: u32,
    priority: i32,
    tenant: u64,
}

impl Shape {
    fn chat(rng: &mut Rng) -> Self {
        Self {
            num_system_tokens: NUM_SYSTEM_TOKENS,
            num_own_tokens: log_uniform(rng, 20, 1_500),
            max_tokens: log_uniform(rng, 40, 600),
            priority: 0,
            tenant: rng.below(2),
        }
    }

    fn reasoning(rng: &mut Rng) -> Self {
        Self {
            num_system_tokens: 0,
            num_own_tokens: log_uniform(rng, 500, 8_000),
            max_tokens: log_uniform(rng, 1_024, 32_768),
            priority: 0,
            tenant: rng.below(4),
        }
    }

    fn bulk(rng: &mut Rng) -> Self {
        Self {
            num_system_tokens: 0,
            num_own_tokens: log_uniform(rng, 2_000, 12_000),
            max_tokens: log_uniform(rng, 500, 2_000),
            priority: 1,
            tenant: 2,
        }
    }

    fn request(&self, id: u32) -> Request {
        let system = (0..self.num_system_tokens).map(TokenId);
        let own = (0..self.num_own_tokens).map(|_| TokenId(1_000_000 + id));
        Request {
            id: RequestId(u64::from(id)),
            prompt: system.chain(own).collect(),
            resumed: Vec::new(),
            n: 1,
            sampling: SamplingState {
                temperature: 0.0,
                top_k: 0,
                top_p: 1.0,
                min_p: 0.0,
                seed: 0,
                top_logprobs: None,
                prompt_logprobs: None,
                min_tokens: 0,
                stop_tokens: Vec::new(),
                adjustments: None,
            },
            max_tokens: self.max_tokens,
            priority: self.priority,
            tenant: TenantId(self.tenant),
            deadline: None::<TimeNs>,
        }
    }
}

/// Between `low` and `high`, each doubling as likely as the next.
fn log_uniform(rng: &mut Rng, low: u32, high: u32) -> u32 {
    let ratio = f64::from(high) / f64::from(low);
    let drawn = f64::from(low) * ratio.powf(rng.unit());
    whole(drawn).clamp(low, high)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "positive, and a cast saturates"
)]
fn whole(value: f64) -> u32 {
    value as u32
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "positive, and a cast saturates"
)]
fn ns_of_ms(ms: f64) -> u64 {
    (ms * 1e6) as u64
}
