//! The codec of both services: prost's, behind a look at what a message will take when decoded.
//!
//! Whoever may connect may send a message of many MiB, so decoding it must not take gigabytes. The limits
//! are far above what any request needs: fields have limits of their own, which are checked later.

use std::marker::PhantomData;

use prost::Message;
use prost::bytes::Buf;
use step3rt_core::error::ErrorKind;
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder};
use tonic_prost::ProstEncoder;

use crate::decoded_size::{Fault, Shape, element_bytes, shapes};
use crate::refusal::Refusal;
use crate::v1;

/// What the elements of a message's lists may take in memory. Their blocks may take
/// [`GROWTH`](crate::decoded_size::GROWTH) times that while they grow.
#[derive(Clone, Copy, Debug)]
pub struct Allowance {
    /// For any message.
    fixed_bytes: usize,
    /// For each byte of the message: one on the wire can be a token id, which takes 4.
    bytes_per_byte: usize,
    /// For a message of any size.
    most_bytes: usize,
}

impl Allowance {
    /// Of clients. The most that one may ask for, 1,024 biases, 16 stop strings and 128 stop ids, takes
    /// 20 KiB, and prompts of four million tokens are beyond any model's context.
    const CLIENTS: Self = Self {
        fixed_bytes: 64 * 1024,
        bytes_per_byte: 4,
        most_bytes: 16 * 1024 * 1024,
    };

    /// Of the cluster's own processes, and of servers to their clients. A plan of 256 sequences of 65,536
    /// tokens takes 64 MiB, and the output of a step some hundreds of bytes for each of its sequences.
    const MEMBERS: Self = Self {
        fixed_bytes: 4 * 1024 * 1024,
        bytes_per_byte: 4,
        most_bytes: 96 * 1024 * 1024,
    };

    /// For a message of `num_bytes`.
    #[must_use]
    pub fn of_message(&self, num_bytes: usize) -> usize {
        let bytes = num_bytes.saturating_mul(self.bytes_per_byte);
        bytes.saturating_add(self.fixed_bytes).min(self.most_bytes)
    }
}

/// A message that this build may be sent.
pub trait Bounded: Message + Default + 'static {
    /// Which of its fields allocate.
    const SHAPE: &'static Shape;
    /// What they may take.
    const ALLOWANCE: Allowance;
}

macro_rules! bounded {
    ($allowance:ident: $($message:ident)+) => {$(
        impl Bounded for v1::$message {
            const SHAPE: &'static Shape = &shapes::$message;
            const ALLOWANCE: Allowance = Allowance::$allowance;
        }
    )+};
}

bounded!(CLIENTS: GenerateRequest AbortRequest TokenizeRequest DetokenizeRequest GetModelInfoRequest);
bounded!(MEMBERS: SessionRequest SessionResponse ListInstancesRequest ListInstancesResponse);
bounded!(MEMBERS: GenerateResponse AbortResponse TokenizeResponse DetokenizeResponse GetModelInfoResponse);

/// Decodes a message unless it would take more memory than it may.
pub fn decode<T: Bounded>(wire: impl Buf) -> Result<T, Status> {
    // Both of gRPC's buffers and slices are in one piece.
    let bytes = wire.chunk();
    if bytes.len() != wire.remaining() {
        return Err(Status::internal("a message is in pieces"));
    }
    let most_bytes = T::ALLOWANCE.of_message(bytes.len());
    match element_bytes(T::SHAPE, bytes, most_bytes) {
        // As a message that prost cannot decode.
        Err(Fault::Malformed | Fault::Group) => {
            Err(Status::internal("the message is not valid protobuf"))
        }
        Err(Fault::TooLarge { field }) => Err(too_large(field, bytes.len(), most_bytes).into()),
        Ok(_) => T::decode(wire).map_err(|error| Status::internal(error.to_string())),
    }
}

fn too_large(field: &str, num_bytes: usize, most_bytes: usize) -> Refusal {
    Refusal::of_field(
        ErrorKind::InvalidParameter,
        field,
        format!(
            "the elements of a message of {num_bytes} bytes would take more than {most_bytes} bytes \
             of memory, more than any use of it needs. Send fewer elements"
        ),
    )
}

/// Encodes `T` and decodes `U`.
pub struct BoundedCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for BoundedCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for BoundedCodec<T, U>
where
    T: Message + Send + 'static,
    U: Bounded + Send,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = BoundedDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::default()
    }

    fn decoder(&mut self) -> Self::Decoder {
        BoundedDecoder(PhantomData)
    }
}

/// Decodes `U`.
pub struct BoundedDecoder<U>(PhantomData<U>);

impl<U: Bounded> Decoder for BoundedDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, wire: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        decode(wire).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_may_take_what_its_bytes_earn_up_to_a_bound() {
        let mib = 1024 * 1024;
        let fixed = 64 * 1024;
        for (num_bytes, allowed) in [
            (0, fixed),
            (1_000, fixed + 4_000),
            (3 * mib, 12 * mib + fixed),
            (4 * mib, 16 * mib),
            (usize::MAX, 16 * mib),
        ] {
            assert_eq!(Allowance::CLIENTS.of_message(num_bytes), allowed);
        }
    }
}
