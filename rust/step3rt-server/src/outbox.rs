//! Responses that a client has not taken yet, merged as they wait.
//!
//! It never holds more than a bounded number of tokens; whoever asks too slowly is cut.

use std::collections::VecDeque;

use step3rt_core::step::TokenLogprob;
use step3rt_proto::v1;
use step3rt_proto::v1::GenerateResponse;
use step3rt_proto::v1::generate_response::Event;

/// Most tokens that wait for a client. With 20 rivals each they are 256 KiB.
const MAX_UNSENT_TOKENS: usize = 1_024;
/// But so many of each continuation: seconds of generation, within which a network that has lost a
/// packet has sent it again. Of the most continuations they are 2 MiB.
const MAX_UNSENT_TOKENS_OF_EACH: usize = 64;
/// Prompt logprobs come thousands at a time and must not look like a client that does not read:
/// this many weigh as much as one token, so at most 16384 wait, which are 4 MiB.
const PROMPT_LOGPROBS_PER_TOKEN: usize = 16;
/// Most prompt logprobs of one message: with 20 rivals each they are 256 KiB, far from the 4 MiB
/// that clients accept.
const MAX_PROMPT_LOGPROBS: usize = 1_024;
/// JSON and statistics have no infinity: an impossible token has this logprob.
const LOGPROB_FLOOR: f32 = -9999.0;

/// A piece of a continuation.
#[derive(Debug, Default)]
pub struct Piece {
    /// Which of `n`.
    pub index: u32,
    /// The token's position.
    pub position: u32,
    /// The token, if it is wanted.
    pub token: Option<u32>,
    /// Text that it completes.
    pub text: String,
    /// When asked for.
    pub logprob: Option<TokenLogprob>,
}

/// What waits for a client, in order.
#[derive(Debug)]
pub struct Outbox {
    responses: VecDeque<GenerateResponse>,
    num_unsent_tokens: usize,
    max_unsent_tokens: usize,
}

/// Most tokens of a request with `n` continuations that wait, here or on their way here.
pub fn max_unsent_tokens(n: u32) -> usize {
    (n as usize * MAX_UNSENT_TOKENS_OF_EACH).max(MAX_UNSENT_TOKENS)
}

impl Outbox {
    /// Empty, for a client that asked for `n` continuations.
    pub fn new(n: u32) -> Self {
        Self {
            responses: VecDeque::new(),
            num_unsent_tokens: 0,
            max_unsent_tokens: max_unsent_tokens(n),
        }
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.responses.is_empty()
    }

    /// Whether more waits than a client may leave lying. What one event adds is never too much by
    /// itself, so this is asked before the next one is taken.
    pub fn is_overfull(&self) -> bool {
        self.num_unsent_tokens > self.max_unsent_tokens
    }

    /// Takes the next response.
    pub fn pop(&mut self) -> Option<GenerateResponse> {
        let response = self.responses.pop_front()?;
        if let Some(Event::Delta(delta)) = &response.event {
            self.num_unsent_tokens -= num_tokens(delta);
        }
        Some(response)
    }

    /// Adds a response that is not a delta.
    pub fn push(&mut self, event: Event) {
        self.responses
            .push_back(GenerateResponse { event: Some(event) });
    }

    /// Adds `piece` to the delta of its continuation that waits, or a new one.
    pub fn push_piece(&mut self, piece: Piece) {
        if piece.token.is_none() && piece.text.is_empty() && piece.logprob.is_none() {
            return;
        }
        let waiting =
            self.responses
                .iter_mut()
                .rev()
                .find_map(|response| match &mut response.event {
                    Some(Event::Delta(delta))
                        if delta.index == piece.index && delta.prompt_logprobs.is_empty() =>
                    {
                        Some(delta)
                    }
                    _ => None,
                });
        let num_before = waiting.as_deref().map_or(0, num_tokens);
        let num_after = if let Some(delta) = waiting {
            extend(delta, piece);
            num_tokens(delta)
        } else {
            let mut delta = v1::Delta {
                index: piece.index,
                sequence: piece.position.into(),
                ..Default::default()
            };
            extend(&mut delta, piece);
            let num_after = num_tokens(&delta);
            self.push(Event::Delta(delta));
            num_after
        };
        self.num_unsent_tokens += num_after - num_before;
    }

    /// Adds prompt logprobs, `offset` being that of the first, in messages of bounded size.
    pub fn push_prompt_logprobs(&mut self, offset: u32, logprobs: Vec<TokenLogprob>) {
        let mut offset = offset;
        let mut rest = logprobs.into_iter();
        loop {
            let chunk: Vec<_> = rest
                .by_ref()
                .take(MAX_PROMPT_LOGPROBS)
                .map(floored)
                .collect();
            let Some(num_sent) = u32::try_from(chunk.len()).ok().filter(|n| *n > 0) else {
                return;
            };
            let delta = v1::Delta {
                prompt_offset: offset,
                prompt_logprobs: chunk,
                ..Default::default()
            };
            self.num_unsent_tokens += num_tokens(&delta);
            self.push(Event::Delta(delta));
            offset += num_sent;
        }
    }
}

fn extend(delta: &mut v1::Delta, piece: Piece) {
    delta.token_ids.extend(piece.token);
    delta.text.push_str(&piece.text);
    delta.logprobs.extend(piece.logprob.map(floored));
}

/// What a delta weighs, in tokens: of ids, of logprobs, or of text at about 4 bytes each.
fn num_tokens(delta: &v1::Delta) -> usize {
    let num_ids = delta.token_ids.len().max(delta.logprobs.len());
    num_ids.max(delta.text.len() / 4) + delta.prompt_logprobs.len() / PROMPT_LOGPROBS_PER_TOKEN
}

fn floored(logprob: TokenLogprob) -> v1::TokenLogprob {
    let mut wire = v1::TokenLogprob::from(logprob);
    wire.logprob = wire.logprob.max(LOGPROB_FLOOR);
    for top in &mut wire.top {
        top.logprob = top.logprob.max(LOGPROB_FLOOR);
    }
    wire
}

#[cfg(test)]
mod tests {
    use step3rt_core::ids::TokenId;

    use super::*;

    fn piece(index: u32, position: u32, text: &str) -> Piece {
        Piece {
            index,
            position,
            token: Some(100 + position),
            text: text.to_owned(),
            logprob: None,
        }
    }

    fn deltas(outbox: &mut Outbox) -> Vec<v1::Delta> {
        std::iter::from_fn(|| outbox.pop())
            .filter_map(|response| match response.event {
                Some(Event::Delta(delta)) => Some(delta),
                _ => None,
            })
            .collect()
    }

    #[test]
    fn tokens_that_wait_are_merged_per_continuation() {
        let mut outbox = Outbox::new(1);
        for position in 0..3 {
            outbox.push_piece(piece(0, position, "a"));
            outbox.push_piece(piece(1, position, "b"));
        }
        let deltas = deltas(&mut outbox);
        assert_eq!(deltas.len(), 2);
        assert_eq!(deltas[0].token_ids, [100, 101, 102]);
        assert_eq!((deltas[0].sequence, deltas[0].text.as_str()), (0, "aaa"));
        assert_eq!(deltas[1].text, "bbb");
        assert!(outbox.is_empty());
    }

    #[test]
    fn a_delta_that_was_taken_is_followed_by_one_that_goes_on_without_a_gap() {
        let mut outbox = Outbox::new(1);
        outbox.push_piece(piece(0, 0, "a"));
        assert!(outbox.pop().is_some());
        outbox.push_piece(piece(0, 1, "b"));
        assert_eq!(deltas(&mut outbox)[0].sequence, 1);
    }

    #[test]
    fn too_many_waiting_tokens_overfill_it_and_taking_them_empties_it() {
        let mut outbox = Outbox::new(1);
        for position in 0..=u32::try_from(MAX_UNSENT_TOKENS).expect("small") {
            assert!(!outbox.is_overfull());
            outbox.push_piece(piece(0, position, ""));
        }
        assert!(outbox.is_overfull());
        assert_eq!(deltas(&mut outbox).len(), 1);
        assert!(!outbox.is_overfull());
        assert_eq!(outbox.num_unsent_tokens, 0);
    }

    #[test]
    fn many_continuations_may_wait_as_long_as_a_few() {
        let n = 128;
        let mut outbox = Outbox::new(n);
        for position in 0..32 {
            for index in 0..n {
                outbox.push_piece(piece(index, position, "a"));
            }
        }
        assert!(!outbox.is_overfull(), "32 tokens of each wait");
    }

    #[test]
    fn prompt_logprobs_are_sent_in_chunks_with_their_offsets() {
        let mut outbox = Outbox::new(1);
        let logprob = TokenLogprob {
            token: TokenId(1),
            logprob: f32::NEG_INFINITY,
            top: vec![(TokenId(2), f32::NEG_INFINITY)],
        };
        outbox.push_prompt_logprobs(5, vec![logprob; MAX_PROMPT_LOGPROBS + 1]);
        let deltas = deltas(&mut outbox);
        let sent: Vec<_> = deltas
            .iter()
            .map(|delta| (delta.prompt_offset as usize, delta.prompt_logprobs.len()))
            .collect();
        assert_eq!(
            sent,
            [(5, MAX_PROMPT_LOGPROBS), (5 + MAX_PROMPT_LOGPROBS, 1)]
        );
        let first = &deltas[0].prompt_logprobs[0];
        assert!((first.logprob - LOGPROB_FLOOR).abs() < 0.5);
        assert!((first.top[0].logprob - LOGPROB_FLOOR).abs() < 0.5);
    }
}
