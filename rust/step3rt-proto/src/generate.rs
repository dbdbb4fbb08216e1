//! Checks a `GenerateRequest` number by number and turns it into a core request.
//!
//! Every count is checked before anything of its size is allocated. It never tokenises: the prompt
//! arrives as ids in [`GenerateParams::into_request`].

use step3rt_core::error::ErrorKind;
use step3rt_core::ids::{RequestId, TenantId, TokenId};
use step3rt_core::scheduler::Request;
use step3rt_core::step::SamplingState;

use crate::refusal::{Refusal, Violations};
use crate::sampling::AskedSampling;
use crate::v1;

const NO_PROMPT: &str =
    "the prompt has no tokens, and generation needs at least one. Send a prompt";

/// Longest request id.
pub const MAX_REQUEST_ID_BYTES: usize = 128;

/// Longest name of a tenant.
pub const MAX_TENANT_BYTES: usize = 64;

/// What applies where a request is silent, from the checkpoint's `generation_config.json`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingDefaults {
    /// 0 is greedy.
    pub temperature: f32,
    /// 1 is off.
    pub top_p: f32,
    /// 0 is off.
    pub top_k: u32,
    /// 0 is off.
    pub min_p: f32,
    /// 1 is off.
    pub repetition_penalty: f32,
}

impl Default for SamplingDefaults {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
        }
    }
}

/// What a request is checked against.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelLimits {
    /// Token ids are below this.
    pub vocab_size: u32,
    /// Most tokens of prompt and output together.
    pub max_model_len: u32,
    /// Ids that end a sequence unless `ignore_eos`.
    pub eos_tokens: Vec<TokenId>,
    /// Where the request is silent.
    pub defaults: SamplingDefaults,
}

/// A prompt in the form it was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// To be tokenised.
    Text(String),
    /// Checked against the vocabulary.
    Tokens(Vec<TokenId>),
    /// To be rendered with the model's chat template, then tokenised.
    Chat(v1::ChatPrompt),
}

/// What a request's responses carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutputForm {
    /// Deltas carry text.
    pub text: bool,
    /// Deltas carry token ids.
    pub token_ids: bool,
    /// Special tokens are left out of the text.
    pub skip_special_tokens: bool,
}

/// A request whose every number is acceptable. The prompt's length is not known yet.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateParams {
    /// The client's id; may be empty.
    pub request_id: String,
    /// Empty selects the only model.
    pub model: String,
    /// As sent.
    pub prompt: Prompt,
    /// Tokens that an earlier stream delivered already; they count towards `max_tokens`.
    pub resumed: Vec<TokenId>,
    /// How many continuations.
    pub n: u32,
    /// How to sample, defaults filled in.
    pub sampling: SamplingState,
    /// `None`: as many as the context holds.
    pub max_tokens: Option<u32>,
    /// Strings that end a continuation.
    pub stop_strings: Vec<String>,
    /// Whether whatever stopped a continuation is part of its text.
    pub include_stop: bool,
    /// What responses carry.
    pub output: OutputForm,
    /// Lower runs first.
    pub priority: i32,
    /// Whose request it is; empty is the default tenant.
    pub tenant: String,
}

/// Checks `request`; `random_seed` is used where it names none.
pub fn check(
    request: v1::GenerateRequest,
    limits: &ModelLimits,
    random_seed: u64,
) -> Result<GenerateParams, Refusal> {
    let mut violations = Violations::default();
    check_request_id(&request.request_id, &mut violations);
    let tenant = request.tenant.unwrap_or_default();
    check_tenant(&tenant, &mut violations);
    violations.unsupported(
        !request.media.is_empty(),
        "media",
        "images are not supported by this build. Send a text-only prompt",
    );
    let asked = AskedSampling {
        sampling: request.sampling.unwrap_or_default(),
        stopping: request.stopping.unwrap_or_default(),
        output: request.output.unwrap_or_default(),
    };
    asked.check(limits, &mut violations);

    let resumed = request.resume_token_ids.unwrap_or_default().ids;
    check_tokens(&resumed, "resume_token_ids", limits, &mut violations)?;
    let n = asked.sampling.n.unwrap_or(1);
    violations.check(resumed.is_empty() || n <= 1, "resume_token_ids", || {
        format!("only one continuation can be resumed, but sampling.n is {n}. Set it to 1")
    });
    if let Some(max_tokens) = asked.stopping.max_tokens {
        let num_resumed = resumed.len();
        violations.check(
            num_resumed <= max_tokens as usize,
            "stopping.max_tokens",
            || {
                format!(
                    "{max_tokens} tokens are wanted, fewer than the {num_resumed} of \
                     resume_token_ids, which count towards it. Repeat the first request's value"
                )
            },
        );
    }
    let prompt = match request.prompt {
        Some(v1::generate_request::Prompt::Text(text)) => {
            // A tokenizer that puts a token in front of every text would hide it.
            violations.check(!text.is_empty(), "prompt", || NO_PROMPT.to_owned());
            Prompt::Text(text)
        }
        Some(v1::generate_request::Prompt::TokenIds(tokens)) => {
            check_tokens(&tokens.ids, "token_ids", limits, &mut violations)?;
            Prompt::Tokens(tokens.ids.into_iter().map(TokenId).collect())
        }
        Some(v1::generate_request::Prompt::Chat(chat)) => Prompt::Chat(chat),
        None => {
            violations.check(false, "prompt", || {
                "no prompt was given. Set one of text, token_ids and chat".to_owned()
            });
            Prompt::Tokens(Vec::new())
        }
    };
    violations.into_result()?;

    Ok(GenerateParams {
        request_id: request.request_id,
        model: request.model,
        prompt,
        resumed: resumed.into_iter().map(TokenId).collect(),
        n,
        sampling: asked.state(limits, random_seed),
        max_tokens: asked.stopping.max_tokens,
        output: OutputForm {
            text: asked.output.text.unwrap_or(true),
            token_ids: asked.output.token_ids.unwrap_or(true),
            skip_special_tokens: asked.output.skip_special_tokens.unwrap_or(true),
        },
        include_stop: asked.stopping.include_stop.unwrap_or(false),
        stop_strings: asked.stopping.stop,
        priority: request.priority,
        tenant,
    })
}

impl GenerateParams {
    /// Without `max_tokens`, asks for all that fit beside a prompt of `num_prompt` tokens: in the
    /// context, and in `longest` tokens, which is what a KV pool holds of it, if that is known.
    pub fn fill_max_tokens(
        &mut self,
        num_prompt: usize,
        longest: Option<u32>,
        limits: &ModelLimits,
    ) {
        let num_prompt = u32::try_from(num_prompt).unwrap_or(u32::MAX);
        let most = limits.max_model_len.saturating_sub(num_prompt);
        let in_pool = longest.map_or(most, |longest| longest.saturating_sub(num_prompt));
        // A pool without room for what must be generated, or was already, refuses the request itself.
        let num_resumed = u32::try_from(self.resumed.len()).unwrap_or(u32::MAX);
        let wanted = in_pool.max(self.sampling.min_tokens).max(num_resumed);
        let wanted = wanted.clamp(1, most.max(1));
        self.max_tokens.get_or_insert(wanted);
    }

    /// The core request for `prompt`, which this request's prompt was tokenised to; without a
    /// deadline, and with the default tenant's number until the name has its own.
    pub fn into_request(
        self,
        id: RequestId,
        prompt: Vec<TokenId>,
        limits: &ModelLimits,
    ) -> Result<Request, Refusal> {
        let max_model_len = limits.max_model_len;
        if prompt.is_empty() {
            return Err(Refusal::of_field(
                ErrorKind::InvalidParameter,
                "prompt",
                NO_PROMPT,
            ));
        }
        // The prompt leaves room for a token; resumed tokens may fill it, and then only the
        // stream's end is missing.
        let num_known = prompt.len().saturating_add(self.resumed.len());
        let most = u32::try_from(prompt.len())
            .ok()
            .and_then(|num_prompt| max_model_len.checked_sub(num_prompt))
            .filter(|most| *most > 0 && num_known <= max_model_len as usize)
            .ok_or_else(|| prompt_too_long("prompt", num_known, limits))?;
        let max_tokens = self.max_tokens.unwrap_or(most);
        if max_tokens > most {
            let num_prompt = prompt.len();
            return Err(Refusal::of_field(
                ErrorKind::InvalidParameter,
                "stopping.max_tokens",
                format!(
                    "{max_tokens} tokens do not fit: the prompt has {num_prompt} tokens and the \
                     context {max_model_len}. Lower it to at most {most}, or leave it out"
                ),
            ));
        }
        Ok(Request {
            id,
            prompt,
            resumed: self.resumed,
            n: self.n,
            sampling: self.sampling,
            max_tokens,
            priority: self.priority,
            tenant: TenantId(0),
            deadline: None,
        })
    }
}

/// The refusal of `num_tokens` tokens that leave no room for even one more.
#[must_use]
pub fn prompt_too_long(field: &str, num_tokens: usize, limits: &ModelLimits) -> Refusal {
    Refusal::of_field(
        ErrorKind::PromptTooLong,
        field,
        format!(
            "{num_tokens} tokens leave no room to generate: the context holds {}, prompt and \
             output together. Shorten the prompt",
            limits.max_model_len
        ),
    )
}

fn check_request_id(request_id: &str, violations: &mut Violations) {
    let is_valid = request_id.len() <= MAX_REQUEST_ID_BYTES
        && request_id
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_.:-".contains(&byte));
    violations.check(is_valid, "request_id", || {
        format!(
            "{} bytes that are not all of [A-Za-z0-9_.:-], or more than {MAX_REQUEST_ID_BYTES}. \
             Use a UUID, or leave it out",
            request_id.len()
        )
    });
}

fn check_tenant(tenant: &str, violations: &mut Violations) {
    let is_valid = tenant.len() <= MAX_TENANT_BYTES
        && tenant
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    violations.check(is_valid, "tenant", || {
        format!(
            "{} bytes that are not all of [A-Za-z0-9._-], or more than {MAX_TENANT_BYTES}. Use a \
             short name, or leave it out",
            tenant.len()
        )
    });
}

/// Counts first: a list that is too long is refused before it is looked at.
fn check_tokens(
    tokens: &[u32],
    field: &str,
    limits: &ModelLimits,
    violations: &mut Violations,
) -> Result<(), Refusal> {
    if tokens.len() >= limits.max_model_len as usize {
        return Err(prompt_too_long(field, tokens.len(), limits));
    }
    check_vocabulary(tokens, field, limits, violations);
    Ok(())
}

/// Checks that all of `tokens` are the model's.
pub fn check_vocabulary(
    tokens: &[u32],
    field: &str,
    limits: &ModelLimits,
    violations: &mut Violations,
) {
    let vocab_size = limits.vocab_size;
    if let Some(position) = tokens.iter().position(|id| *id >= vocab_size) {
        violations.check(false, field, || {
            format!(
                "id {} at position {position} is not in the vocabulary of {vocab_size}. Tokenise \
                 with this model's tokenizer",
                tokens[position]
            )
        });
    }
}

#[cfg(test)]
mod tests;
