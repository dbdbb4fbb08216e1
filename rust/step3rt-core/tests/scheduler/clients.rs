//! What clients have been told, checked as it arrives: streams without gap, duplicate or second
//! end.

use std::collections::BTreeMap;

use step3rt_core::error::RequestError;
use step3rt_core::ids::{RequestId, TokenId};
use step3rt_core::request::{FinishReason, Request, RequestEvent, Usage};
use step3rt_core::step::TokenLogprob;

use crate::instance::{next_token, prompt_logprob};

/// One request as its client sees it.
pub(crate) struct Stream {
    pub(crate) request: Request,
    pub(crate) is_started: bool,
    pub(crate) prompt_logprobs: Vec<TokenLogprob>,
    /// Per continuation, resumed tokens included.
    pub(crate) tokens: Vec<Vec<TokenId>>,
    pub(crate) finished: Vec<Option<(FinishReason, Usage)>>,
    pub(crate) error: Option<RequestError>,
}

impl Stream {
    pub(crate) fn has_ended(&self) -> bool {
        self.error.is_some() || self.finished.iter().all(Option::is_some)
    }

    /// The whole stream of continuation `index`, computed without a scheduler.
    pub(crate) fn expected(
        &self,
        index: usize,
        max_model_len: u32,
    ) -> (Vec<TokenId>, FinishReason) {
        let request = &self.request;
        let seed = request.sampling.seed.wrapping_add(index as u64);
        let mut tokens = request.prompt.clone();
        loop {
            let token = next_token(seed, &tokens);
            tokens.push(token);
            let generated = &tokens[request.prompt.len()..];
            let may_stop = generated.len() > request.sampling.min_tokens as usize;
            if may_stop && request.sampling.stop_tokens.contains(&token) {
                return (generated.to_vec(), FinishReason::StopToken(token));
            }
            let is_full = tokens.len() == max_model_len as usize;
            if generated.len() == request.max_tokens as usize || is_full {
                return (generated.to_vec(), FinishReason::Length);
            }
        }
    }

    fn note(&mut self, event: RequestEvent) {
        assert!(
            self.error.is_none(),
            "an event after the failure: {event:?}"
        );
        match event {
            RequestEvent::Started { .. } => {
                assert!(!self.is_started, "started twice");
                self.is_started = true;
            }
            RequestEvent::PromptLogprobs { offset, logprobs } => {
                assert!(!logprobs.is_empty());
                assert_eq!(offset as usize, self.prompt_logprobs.len());
                assert_eq!(self.tokens[0].len(), self.request.resumed.len());
                self.prompt_logprobs.extend(logprobs);
            }
            RequestEvent::Token {
                index,
                position,
                token,
                ..
            } => {
                let index = index as usize;
                assert!(self.is_started, "a token before the start");
                assert!(self.finished[index].is_none(), "a token after the end");
                assert_eq!(position as usize, self.tokens[index].len(), "gap or repeat");
                self.tokens[index].push(token);
            }
            RequestEvent::Finished {
                index,
                reason,
                usage,
            } => {
                let index = index as usize;
                assert_eq!(usage.prompt_tokens as usize, self.request.prompt.len());
                assert_eq!(usage.completion_tokens as usize, self.tokens[index].len());
                assert!(usage.times.is_sorted(), "times run backwards: {usage:?}");
                let before = self.finished[index].replace((reason, usage));
                assert!(before.is_none(), "continuation {index} ends twice");
            }
            RequestEvent::Failed(error) => {
                assert!(!self.has_ended(), "a failure after the end");
                self.error = Some(error);
            }
        }
    }
}

#[derive(Default)]
pub(crate) struct Clients {
    pub(crate) streams: BTreeMap<RequestId, Stream>,
}

impl Clients {
    pub(crate) fn submit(&mut self, request: &Request) {
        let n = request.n.max(1) as usize; // one that asks for none is refused, and ends once
        let stream = Stream {
            request: request.clone(),
            is_started: false,
            prompt_logprobs: Vec::new(),
            tokens: vec![request.resumed.clone(); n],
            finished: vec![None; n],
            error: None,
        };
        self.streams.insert(request.id, stream);
    }

    pub(crate) fn note(&mut self, events: Vec<(RequestId, RequestEvent)>) {
        for (id, event) in events {
            let stream = self.streams.get_mut(&id);
            stream.expect("only live requests are told").note(event);
        }
    }

    /// Every stream is what one client alone would have got, or the beginning of it.
    pub(crate) fn check_contents(&self, max_model_len: u32) {
        for stream in self.streams.values().filter(|stream| stream.is_started) {
            for (index, tokens) in stream.tokens.iter().enumerate() {
                let (expected, reason) = stream.expected(index, max_model_len);
                assert_eq!(tokens[..], expected[..tokens.len().min(expected.len())]);
                match stream.finished[index] {
                    Some((FinishReason::StopString, _)) | None => {}
                    Some((given, _)) => {
                        assert_eq!((given, tokens), (reason, &expected));
                    }
                }
            }
            let prompt = &stream.request.prompt;
            let wants = stream.request.sampling.prompt_logprobs.is_some();
            let all: Vec<_> = (1..prompt.len())
                .filter(|_| wants)
                .map(|index| prompt_logprob(prompt, index))
                .collect();
            assert_eq!(
                stream.prompt_logprobs[..],
                all[..stream.prompt_logprobs.len()]
            );
            if stream.tokens[0].len() > stream.request.resumed.len() {
                assert_eq!(stream.prompt_logprobs.len(), all.len(), "lost logprobs");
            }
        }
    }
}
