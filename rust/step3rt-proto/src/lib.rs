//! Owns the wire: generated messages and services, their conversion to and from core types, and
//! the one place where an error becomes a gRPC status.
//!
//! This crate opens no sockets but those of [`channel`], and never decides anything about a request
//! beyond whether its numbers are acceptable.
//!
//! Reading order: [`v1`] (from `proto/`), [`codec`], [`status`], [`refusal`], [`generate`], [`step`],
//! [`channel`].

pub mod adjustments;
pub mod channel;
pub mod codec;
pub mod decoded_size;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod generate;
pub mod refusal;
pub mod sampling;
mod sampling_wire;
pub mod status;
pub mod step;

/// Messages, clients and servers of package `step3rt.v1`, generated from `proto/`.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::allow_attributes_without_reason,
    reason = "generated code; the .proto files carry the documentation"
)]
pub mod v1 {
    tonic::include_proto!("step3rt.v1");
}

/// Encodes and decodes any message of [`v1`].
pub use prost::Message;

/// The encoded `FileDescriptorSet` of `proto/` and its imports, for server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/step3rt.bin"));

/// `Hello.protocol_version` of this build. Raised when the meaning of a node message changes.
pub const PROTOCOL_VERSION: u32 = 2;

/// The service name that clients ask `grpc.health.v1` about.
pub const INFERENCE_SERVICE_NAME: &str = "step3rt.v1.InferenceService";

/// Most bytes of one message that a server accepts. Images will travel inline.
pub const MAX_RECEIVED_MESSAGE_BYTES: usize = 32 * 1024 * 1024;

/// Most bytes of one message that a server sends: the default limit of gRPC clients.
pub const MAX_SENT_MESSAGE_BYTES: usize = 4 * 1024 * 1024;

/// Most bytes of one message between coordinator and instances. A plan carries all tokens of the
/// sequences that join: 256 sequences of 65536 tokens of 3 bytes each are 48 MiB.
pub const MAX_CONTROL_MESSAGE_BYTES: usize = 64 * 1024 * 1024;
