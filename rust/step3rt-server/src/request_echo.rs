//! Gives a call's `x-request-id` back: in the metadata of its response, and in the details of its
//! error.
//!
//! The id is the caller's own, for its logs and those of proxies between. It never names a stream:
//! `request_id` of the message does, and may be another.

use std::pin::Pin;
use std::task::{Context, Poll};

use step3rt_proto::status::with_request_id;
use step3rt_proto::v1;
use step3rt_proto::v1::inference_service_server::InferenceService;
use tokio_stream::Stream;
use tonic::metadata::{Ascii, MetadataMap, MetadataValue};
use tonic::{Request, Response, Status};

/// The header, in both directions.
pub const REQUEST_ID_KEY: &str = "x-request-id";
/// A longer id is somebody's mistake, and is not sent back.
const MAX_REQUEST_ID_BYTES: usize = 128;

/// A service whose answers carry the `x-request-id` of what they answer.
pub struct Echoing<S>(pub S);

#[tonic::async_trait]
impl<S> InferenceService for Echoing<S>
where
    S: InferenceService<GenerateStream: Unpin>,
{
    type GenerateStream = EchoStream<S::GenerateStream>;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let echo = Echo::of(request.metadata());
        let response = echo.of_result(self.0.generate(request).await)?;
        Ok(response.map(|responses| EchoStream { responses, echo }))
    }

    async fn abort(
        &self,
        request: Request<v1::AbortRequest>,
    ) -> Result<Response<v1::AbortResponse>, Status> {
        let echo = Echo::of(request.metadata());
        echo.of_result(self.0.abort(request).await)
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        let echo = Echo::of(request.metadata());
        echo.of_result(self.0.tokenize(request).await)
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        let echo = Echo::of(request.metadata());
        echo.of_result(self.0.detokenize(request).await)
    }

    async fn get_model_info(
        &self,
        request: Request<v1::GetModelInfoRequest>,
    ) -> Result<Response<v1::GetModelInfoResponse>, Status> {
        let echo = Echo::of(request.metadata());
        echo.of_result(self.0.get_model_info(request).await)
    }
}

/// A stream whose error carries the id.
pub struct EchoStream<R> {
    responses: R,
    echo: Echo,
}

impl<T, R: Stream<Item = Result<T, Status>> + Unpin> Stream for EchoStream<R> {
    type Item = R::Item;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<R::Item>> {
        let next = Pin::new(&mut self.responses).poll_next(context);
        next.map(|item| item.map(|response| response.map_err(|status| self.echo.of_status(status))))
    }
}

/// The id of one call, if it has one that can be sent back.
struct Echo(Option<MetadataValue<Ascii>>);

impl Echo {
    fn of(metadata: &MetadataMap) -> Self {
        let id = metadata.get(REQUEST_ID_KEY);
        let is_usable = |id: &&MetadataValue<Ascii>| {
            id.to_str()
                .is_ok_and(|id| (1..=MAX_REQUEST_ID_BYTES).contains(&id.len()))
        };
        Self(id.filter(is_usable).cloned())
    }

    fn of_result<T>(&self, result: Result<Response<T>, Status>) -> Result<Response<T>, Status> {
        let mut response = result.map_err(|status| self.of_status(status))?;
        if let Some(id) = &self.0 {
            response.metadata_mut().insert(REQUEST_ID_KEY, id.clone());
        }
        Ok(response)
    }

    fn of_status(&self, status: Status) -> Status {
        let Some(id) = &self.0 else {
            return status;
        };
        let mut status = with_request_id(&status, id.to_str().unwrap_or_default());
        status.metadata_mut().insert(REQUEST_ID_KEY, id.clone());
        status
    }
}
