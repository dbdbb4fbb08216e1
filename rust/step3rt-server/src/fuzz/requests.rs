//! Requests as the SDK writes them, and a scheduler that serves.

use step3rt_core::config::SchedulerConfig;
use step3rt_core::ids::{Epoch, InstanceId, TimeNs, TokenId};
use step3rt_core::scheduler::{Event, Request, RequestEvent, Scheduler};
use step3rt_core::step::{SequenceOutput, StepOutput, StepPlan};
use step3rt_proto::v1;
use step3rt_proto::v1::generate_request::Prompt;

pub(super) const VOCAB_SIZE: u32 = 40;
pub(super) const MAX_MODEL_LEN: u32 = 64;

pub(super) fn scheduler_config() -> SchedulerConfig {
    SchedulerConfig {
        num_lanes: 2,
        block_size_tokens: 4,
        max_model_len: MAX_MODEL_LEN,
        max_tokens_per_micro_batch: 16,
        max_steps_in_flight: 2,
        target_tpot_ms: 50,
        max_sequences_per_lane: 4,
        max_waiting_requests: 4,
        recovery_timeout_ms: 1_000,
        assumes_computed_prompts: false,
    }
}

/// One instance that answers everything, with all the room that a request could need.
pub(super) struct Serving {
    scheduler: Scheduler,
    now: TimeNs,
}

impl Serving {
    pub(super) fn new() -> Self {
        let mut scheduler = Scheduler::new(scheduler_config());
        let now = TimeNs(0);
        let (instance, epoch) = (InstanceId(1), Epoch(1));
        let ready = Event::AttentionReady {
            instance,
            epoch,
            num_kv_blocks: 4_096,
        };
        scheduler.handle(now, ready);
        scheduler.handle(now, Event::ExpertsComplete(true));
        Self { scheduler, now }
    }

    /// Serves one request to its end and returns every plan that it took.
    pub(super) fn plans_of(&mut self, request: Request) -> Vec<StepPlan> {
        let (id, n) = (request.id, request.n as usize);
        let mut all = Vec::new();
        let mut num_ends = 0;
        self.scheduler.handle(self.now, Event::Submit(request));
        loop {
            self.now = self.now.plus_ms(1);
            let plans = self.scheduler.plan(self.now);
            for (_, event) in self.scheduler.take_events() {
                match event {
                    RequestEvent::Finished { .. } => num_ends += 1,
                    RequestEvent::Failed(error) => panic!("a good request failed: {error:?}"),
                    _ => {}
                }
            }
            if plans.is_empty() {
                break;
            }
            for plan in plans {
                self.scheduler
                    .handle(self.now, Event::StepDone(answer(&plan)));
                all.push(plan);
            }
        }
        assert_eq!(num_ends, n, "every continuation ends once");
        self.scheduler.handle(self.now, Event::Cancel(id));
        assert_eq!(self.scheduler.audit(), Ok(()));
        all
    }
}

/// What an instance that always chooses token 7 makes of a plan.
pub(super) fn answer(plan: &StepPlan) -> StepOutput {
    let outputs = plan.chunks.iter().map(|chunk| SequenceOutput {
        sequence: chunk.sequence,
        token: chunk.samples.then_some(TokenId(7)),
        logprob: None,
        prompt_logprobs: Vec::new(),
        is_corrupt: false,
    });
    StepOutput {
        key: plan.key,
        outputs: outputs.collect(),
    }
}

/// A request for each of the ways to ask, and some that are refused.
pub(super) fn examples() -> Vec<v1::GenerateRequest> {
    let tokens = |ids: &[u32]| Some(Prompt::TokenIds(v1::TokenIds { ids: ids.to_vec() }));
    let plain = v1::GenerateRequest {
        request_id: "req-1".to_owned(),
        prompt: tokens(&[3, 4, 5, 6, 7]),
        ..Default::default()
    };
    let full = v1::GenerateRequest {
        model: "m".to_owned(),
        sampling: Some(v1::SamplingParams {
            temperature: Some(0.5),
            top_p: Some(0.9),
            top_k: Some(3),
            min_p: Some(0.1),
            presence_penalty: Some(-2.0),
            frequency_penalty: Some(0.25),
            repetition_penalty: Some(1.5),
            seed: Some(-1),
            n: Some(2),
            logit_bias: [(3, 100.0), (4, -1.5)].into(),
            structured_output: None,
        }),
        stopping: Some(v1::StoppingCriteria {
            max_tokens: Some(6),
            min_tokens: Some(2),
            stop: vec!["END".to_owned()],
            stop_token_ids: vec![9],
            include_stop: Some(true),
            ignore_eos: Some(false),
        }),
        output: Some(v1::OutputOptions {
            text: Some(false),
            token_ids: Some(true),
            top_logprobs: Some(2),
            prompt_logprobs: Some(0),
            skip_special_tokens: Some(true),
        }),
        priority: -3,
        tenant: Some("a-tenant".to_owned()),
        ..plain.clone()
    };
    let text = v1::GenerateRequest {
        prompt: Some(Prompt::Text("one two".to_owned())),
        ..plain.clone()
    };
    let chat = v1::GenerateRequest {
        prompt: Some(Prompt::Chat(v1::ChatPrompt {
            messages_json: r#"[{"role": "user", "content": "hi"}]"#.to_owned(),
            tools_json: String::new(),
            add_generation_prompt: Some(true),
        })),
        ..plain.clone()
    };
    let resumed = v1::GenerateRequest {
        resume_token_ids: Some(v1::TokenIds { ids: vec![7, 7] }),
        stopping: Some(v1::StoppingCriteria {
            max_tokens: Some(5),
            ..Default::default()
        }),
        ..plain.clone()
    };
    let refused = refused(&plain);
    vec![plain, full, text, chat, resumed, refused]
}

/// One that is wrong wherever it can be.
fn refused(plain: &v1::GenerateRequest) -> v1::GenerateRequest {
    v1::GenerateRequest {
        request_id: "a b".to_owned(),
        tenant: Some("ä".to_owned()),
        media: vec![v1::Media::default()],
        prompt: Some(Prompt::TokenIds(v1::TokenIds { ids: vec![99] })),
        sampling: Some(v1::SamplingParams {
            temperature: Some(f32::NAN),
            top_p: Some(0.0),
            n: Some(0),
            logit_bias: [(99, f32::INFINITY)].into(),
            ..Default::default()
        }),
        stopping: Some(v1::StoppingCriteria {
            max_tokens: Some(0),
            stop: vec![String::new()],
            stop_token_ids: vec![99],
            ..Default::default()
        }),
        ..plain.clone()
    }
}
