//! `InferenceService`: checks requests, makes prompts into tokens, and starts one task per stream.
//!
//! It never schedules, and keeps nothing between requests.

use std::sync::Arc;

use step3rt_core::error::ErrorKind;
use step3rt_core::ids::{TimeNs, TokenId};
use step3rt_proto::MAX_RECEIVED_MESSAGE_BYTES;
use step3rt_proto::generate::{Prompt, check, check_vocabulary, prompt_too_long};
use step3rt_proto::refusal::{Refusal, Violations};
use step3rt_proto::sampling::{MAX_N, MAX_STOP_STRINGS};
use step3rt_proto::v1;
use step3rt_proto::v1::inference_service_server::InferenceService;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use tonic_types::StatusExt;

use crate::checkpoint::Checkpoint;
use crate::clock::Clock;
use crate::deadline::grpc_timeout;
use crate::drive_handle::{ClusterStatus, DriveHandle, Message, Submission};
use crate::internal_error::without_diagnostics;
use crate::metrics::RequestMetrics;
use crate::outbox::max_unsent_tokens;
use crate::receiving::Received;
use crate::response_stream::{RESPONSE_BOUND, ResponseStream, StreamParts};
use crate::text::chat_template::{Chat, ChatTemplate, RenderError};
use crate::text::continuation::TextRules;
use crate::text::detokenizer::Detokenizer;
use crate::text::input::Text;
use crate::text::tokenizer::Tokenizer;

/// Texts above this are rendered and tokenised on a thread of their own: it takes about a
/// millisecond.
const MAX_INLINE_TEXT_BYTES: usize = 16 * 1024;
/// Long texts that are worked on at a time, so that they cannot take every core.
const MAX_LONG_TEXTS: usize = 2;
/// Longest text of `Tokenize`: its ids fill at most 3 of the 4 MiB that clients accept.
const MAX_TOKENIZE_BYTES: usize = 1024 * 1024;
/// Longest text that `Detokenize` returns, within the 4 MiB that clients accept.
const MAX_DETOKENIZE_BYTES: usize = 3 * 1024 * 1024;

/// Most requests that one `Abort` names. Each is looked up by the loop that schedules for all.
const MAX_ABORTED_IDS: usize = 4_096;

/// What serving a model takes.
pub struct Model {
    /// Its limits and defaults.
    pub checkpoint: Checkpoint,
    /// Without one, prompts are token ids and responses have no text.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// Without one, there are no chat prompts.
    pub chat_template: Option<ChatTemplate>,
}

type GenerateStream = ReceiverStream<Result<v1::GenerateResponse, Status>>;

/// Serves `InferenceService` for a drive loop.
pub struct InferenceServer {
    model: Arc<Model>,
    drive: DriveHandle,
    clock: Clock,
    status: watch::Receiver<ClusterStatus>,
    long_texts: Arc<Semaphore>,
    metrics: RequestMetrics,
}

impl InferenceServer {
    /// A server of `model` whose requests go to `drive`.
    pub fn new(
        model: Arc<Model>,
        drive: DriveHandle,
        clock: Clock,
        status: watch::Receiver<ClusterStatus>,
    ) -> Self {
        Self {
            model,
            drive,
            clock,
            status,
            long_texts: Arc::new(Semaphore::new(MAX_LONG_TEXTS)),
            metrics: RequestMetrics::default(),
        }
    }

    /// What its requests count.
    pub fn metrics(&self) -> &RequestMetrics {
        &self.metrics
    }

    fn tokenizer(&self, field: &str) -> Result<&Arc<Tokenizer>, Refusal> {
        self.model.tokenizer.as_ref().ok_or_else(|| {
            Refusal::of_field(
                ErrorKind::UnsupportedFeature,
                field,
                "the served checkpoint has no tokenizer.json, so text has no meaning here. Send \
                 token ids",
            )
        })
    }

    fn check_model_name(&self, asked: &str) -> Result<(), Refusal> {
        let served = &self.model.checkpoint.name;
        if asked.is_empty() || asked == served {
            return Ok(());
        }
        // The name is the client's own text: only its length is bounded here.
        let asked: String = asked.chars().take(128).collect();
        Err(Refusal::of_field(
            ErrorKind::ModelNotFound,
            "model",
            format!("{asked:?} is not served here, {served:?} is. Name it, or leave it out"),
        ))
    }

    async fn prompt_tokens(&self, prompt: Prompt) -> Result<Vec<TokenId>, Refusal> {
        match prompt {
            Prompt::Tokens(tokens) => Ok(tokens),
            Prompt::Text(text) => self.encode("text", Text::Plain(text, true)).await,
            Prompt::Chat(chat) => {
                let text = self.render(chat).await?;
                self.encode("chat", Text::Chat(text)).await
            }
        }
    }

    async fn render(&self, chat: v1::ChatPrompt) -> Result<String, Refusal> {
        if self.model.chat_template.is_none() {
            return Err(Refusal::of_field(
                ErrorKind::UnsupportedFeature,
                "chat",
                "the served checkpoint has no chat template. Send text or token ids",
            ));
        }
        let model = Arc::clone(&self.model);
        let num_bytes = chat.messages_json.len() + chat.tools_json.len();
        let render = move || {
            let template = model.chat_template.as_ref().expect("looked at above");
            template.render(Chat {
                messages_json: &chat.messages_json,
                tools_json: &chat.tools_json,
                add_generation_prompt: chat.add_generation_prompt.unwrap_or(true),
            })
        };
        let rendered = self.run_aside(num_bytes, render).await?;
        rendered.map_err(|error| {
            let kind = match error {
                RenderError::Chat(_) => ErrorKind::InvalidParameter,
                RenderError::Media(_) => ErrorKind::UnsupportedFeature,
            };
            Refusal::of_field(kind, "chat", error.to_string())
        })
    }

    async fn encode(&self, field: &str, text: Text) -> Result<Vec<TokenId>, Refusal> {
        let tokenizer = Arc::clone(self.tokenizer(field)?);
        let limits = &self.model.checkpoint.limits;
        let num_bytes = text.num_bytes();
        let least_tokens = num_bytes / tokenizer.bytes().longest();
        if least_tokens >= limits.max_model_len as usize {
            return Err(prompt_too_long(field, least_tokens, limits));
        }
        let encoded = self
            .run_aside(num_bytes, move || text.encode(&tokenizer))
            .await?;
        encoded.map_err(|error| {
            Refusal::of_field(ErrorKind::InvalidParameter, field, error.to_string())
        })
    }

    /// Runs `work` on a text of `num_bytes`: here if it is short, or else where it holds up neither
    /// streams nor the drive loop.
    async fn run_aside<T: Send + 'static>(
        &self,
        num_bytes: usize,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Refusal> {
        if num_bytes <= MAX_INLINE_TEXT_BYTES {
            return Ok(work());
        }
        let place = Arc::clone(&self.long_texts).acquire_owned().await;
        let work = move || {
            let _place = place; // until it is done: its client may have left long before
            work()
        };
        tokio::task::spawn_blocking(work).await.map_err(|panic| {
            let refusal = Refusal::new(ErrorKind::Internal, panic.to_string());
            Refusal {
                error: without_diagnostics(refusal.error),
                ..refusal
            }
        })
    }

    /// Checks a request, submits it, and starts its stream.
    async fn start(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<GenerateStream>, Status> {
        let timeout = grpc_timeout(request.metadata())?;
        // While its text waits for its turn and is worked on.
        let _received = Received::of(request.extensions());
        let arrived = self.clock.now();
        let limits = &self.model.checkpoint.limits;
        let mut params = check(request.into_inner(), limits, crate::random::u64())?;
        self.check_model_name(&params.model)?;
        if !params.stop_strings.is_empty() {
            self.tokenizer("stopping.stop")?;
        }
        if params.request_id.is_empty() {
            params.request_id = format!("req-{:016x}", crate::random::u64());
        }
        let sent_prompt = std::mem::replace(&mut params.prompt, Prompt::Tokens(Vec::new()));
        let prompt = self.prompt_tokens(sent_prompt).await?;

        let id = self.drive.next_request_id();
        let client_id = params.request_id.clone();
        let (output, include_stop) = (params.output, params.include_stop);
        let stop_strings = std::mem::take(&mut params.stop_strings);
        let longest = self.status.borrow().longest_sequence_tokens;
        params.fill_max_tokens(prompt.len(), longest, limits);
        let tenant = std::mem::take(&mut params.tenant);
        let mut request = params.into_request(id, prompt, limits)?;
        request.deadline = timeout.map(|timeout| {
            let timeout_ns = u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX);
            TimeNs(arrived.0.saturating_add(timeout_ns))
        });
        let stream = ResponseStream::new(StreamParts {
            id,
            client_id: client_id.clone(),
            n: request.n,
            num_prompt_tokens: u32::try_from(request.prompt.len()).unwrap_or(u32::MAX),
            resumed: request.resumed.clone(),
            text_rules: TextRules {
                tokenizer: self.model.tokenizer.clone(),
                stop_strings,
                include_stop,
                skip_special_tokens: output.skip_special_tokens,
                stop_tokens: request.sampling.stop_tokens.clone(),
                min_tokens: request.sampling.min_tokens,
            },
            wants_text: output.text,
            wants_token_ids: output.token_ids,
            drive: self.drive.clone(),
            metrics: self.metrics.clone(),
        });
        let (event_sender, events) = mpsc::channel(max_unsent_tokens(request.n));
        let (response_sender, responses) = mpsc::channel(RESPONSE_BOUND);
        self.drive
            .send(Message::Submit(Submission {
                client_id,
                tenant,
                request,
                events: event_sender,
            }))
            .await?;
        tokio::spawn(stream.run(events, response_sender));
        Ok(Response::new(ReceiverStream::new(responses)))
    }
}

#[tonic::async_trait]
impl InferenceService for InferenceServer {
    type GenerateStream = GenerateStream;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let started = self.start(request).await;
        if let Err(refusal) = &started {
            let info = refusal.get_details_error_info();
            let reason = info.map_or_else(|| format!("{:?}", refusal.code()), |info| info.reason);
            self.metrics.ended(&reason);
        }
        started
    }

    async fn abort(
        &self,
        request: Request<v1::AbortRequest>,
    ) -> Result<Response<v1::AbortResponse>, Status> {
        let client_ids = request.into_inner().request_ids;
        let num_ids = client_ids.len();
        if num_ids > MAX_ABORTED_IDS {
            return Err(Refusal::of_field(
                ErrorKind::InvalidParameter,
                "request_ids",
                format!(
                    "{num_ids} ids exceed the limit of {MAX_ABORTED_IDS}: nothing is scheduled while \
                     they are looked up. Send several calls"
                ),
            )
            .into());
        }
        let aborted_request_ids = self
            .drive
            .ask(|reply| Message::Abort { client_ids, reply })
            .await?;
        Ok(Response::new(v1::AbortResponse {
            aborted_request_ids,
        }))
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        let _received = Received::of(request.extensions());
        let v1::TokenizeRequest {
            text,
            add_special_tokens,
        } = request.into_inner();
        if text.len() > MAX_TOKENIZE_BYTES {
            return Err(too_large("text", text.len(), MAX_TOKENIZE_BYTES).into());
        }
        let tokens = self
            .encode(
                "text",
                Text::Plain(text, add_special_tokens.unwrap_or(true)),
            )
            .await?;
        Ok(Response::new(v1::TokenizeResponse {
            token_ids: tokens.into_iter().map(|token| token.0).collect(),
        }))
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        let request = request.into_inner();
        let skip_special_tokens = request.skip_special_tokens.unwrap_or(true);
        let bytes = self.tokenizer("token_ids")?.bytes();
        let mut violations = Violations::default();
        let limits = &self.model.checkpoint.limits;
        check_vocabulary(&request.token_ids, "token_ids", limits, &mut violations);
        violations.into_result()?;
        let tokens = || {
            let tokens = request.token_ids.iter().copied().map(TokenId);
            tokens.filter(|token| !(skip_special_tokens && bytes.is_special(*token)))
        };
        let num_bytes: usize = tokens().map(|token| bytes.get(token).len()).sum();
        if num_bytes > MAX_DETOKENIZE_BYTES {
            return Err(too_large("token_ids", num_bytes, MAX_DETOKENIZE_BYTES).into());
        }
        let mut detokenizer = Detokenizer::default();
        let mut text = String::with_capacity(num_bytes);
        for token in tokens() {
            detokenizer.push(bytes.get(token), &mut text);
        }
        detokenizer.finish(&mut text);
        Ok(Response::new(v1::DetokenizeResponse { text }))
    }

    async fn get_model_info(
        &self,
        _request: Request<v1::GetModelInfoRequest>,
    ) -> Result<Response<v1::GetModelInfoResponse>, Status> {
        let checkpoint = &self.model.checkpoint;
        let limits = &checkpoint.limits;
        Ok(Response::new(v1::GetModelInfoResponse {
            model: checkpoint.name.clone(),
            checkpoint_sha256: self.status.borrow().model_fingerprint.clone(),
            max_model_len: limits.max_model_len,
            vocab_size: limits.vocab_size,
            eos_token_ids: limits.eos_tokens.iter().map(|token| token.0).collect(),
            supports_images: false,
            api_version: "v1".to_owned(),
            server_version: env!("CARGO_PKG_VERSION").to_owned(),
            limits: Some(v1::Limits {
                max_request_bytes: u32::try_from(MAX_RECEIVED_MESSAGE_BYTES).unwrap_or(u32::MAX),
                max_n: MAX_N,
                max_stop_strings: u32::try_from(MAX_STOP_STRINGS).unwrap_or(u32::MAX),
                max_images: 0,
                max_image_pixels: 0,
            }),
        }))
    }
}

fn too_large(field: &str, num_bytes: usize, max: usize) -> Refusal {
    Refusal::of_field(
        ErrorKind::InvalidParameter,
        field,
        format!("{num_bytes} bytes of text exceed the limit of {max}. Send it in parts"),
    )
}

#[cfg(test)]
mod tests;
