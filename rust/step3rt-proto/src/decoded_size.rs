//! How much memory a message takes when it is decoded, counted on its wire form beforehand.
//!
//! Two bytes of a message are an empty element of a list, which takes the size of its struct: 72 bytes
//! for a [`v1::Media`]. [`element_bytes`] counts them and allocates nothing; it reads what any client sends.
//!
//! What is counted is the elements: a struct or a number for each, and a little for each text. The bytes of
//! texts are no more than the message's own. A vector grows by doubling, from four elements on, with its
//! old and its new block alive at once: a decoder that is given `wire` holds at most
//! [`GROWTH`]` × element_bytes + `[`COPIES`]` × wire.len()` bytes, beside a few blocks of constant size.

use crate::v1;

/// Bytes that a vector's blocks take at most, for each byte of its elements: four elements' room for
/// the first, and three for each of many while they are moved.
pub const GROWTH: usize = 4;

/// Bytes that texts take at most, for each byte of the message: a text that is sent again may find
/// a block of twice its length, and the old one.
pub const COPIES: usize = 3;

/// What a text that is not empty takes beside its bytes: the allocator's header and rounding.
const TEXT_BLOCK_BYTES: usize = 16;

/// As prost: deeper messages are refused.
const MAX_DEPTH: u32 = 100;

/// The fields of a message whose decoding allocates.
#[derive(Debug)]
pub struct Shape {
    fields: &'static [Field],
}

#[derive(Debug)]
struct Field {
    number: u32,
    name: &'static str,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// A list of numbers that are varints on the wire.
    Varints { size_bytes: usize },
    /// A list of numbers of the same size on the wire.
    Fixed { size_bytes: usize },
    /// A text, or a list of them.
    Text { is_repeated: bool },
    /// A map of numbers.
    Entries { size_bytes: usize },
    /// A message within its parent.
    Message { shape: &'static Shape },
    /// A list of messages.
    Messages {
        size_bytes: usize,
        shape: &'static Shape,
    },
}

/// Each message's, under the message's name.
#[allow(
    non_upper_case_globals,
    missing_docs,
    reason = "generated; named as the messages are"
)]
pub mod shapes {
    use super::{Field, Kind, Shape, v1};
    include!(concat!(env!("OUT_DIR"), "/shapes.rs"));
}

/// Why a message is not decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It is no message of protobuf.
    Malformed,
    /// It has a group, which proto3 has not.
    Group,
    /// Its elements take too much.
    TooLarge {
        /// The list that went beyond.
        field: &'static str,
    },
}

/// The bytes that the elements of a message of `shape` take, unless they are more than `most_bytes`.
pub fn element_bytes(
    shape: &'static Shape,
    wire: &[u8],
    most_bytes: usize,
) -> Result<usize, Fault> {
    let mut count = Count {
        num_bytes: 0,
        most_bytes,
    };
    count.message(shape, wire, MAX_DEPTH)?;
    Ok(count.num_bytes)
}

struct Count {
    num_bytes: usize,
    most_bytes: usize,
}

impl Count {
    fn message(&mut self, shape: &'static Shape, mut wire: &[u8], depth: u32) -> Result<(), Fault> {
        let depth = depth.checked_sub(1).ok_or(Fault::Malformed)?;
        while !wire.is_empty() {
            let key = u32::try_from(varint(&mut wire)?).map_err(|_| Fault::Malformed)?;
            let number = key >> 3;
            if number == 0 {
                return Err(Fault::Malformed);
            }
            let field = shape.fields.iter().find(|field| field.number == number);
            let content = match key & 7 {
                0 => varint(&mut wire).map(|_| None)?,
                1 => take(&mut wire, 8).map(|_| None)?,
                2 => {
                    let num_bytes = varint(&mut wire)?;
                    let num_bytes = usize::try_from(num_bytes).map_err(|_| Fault::Malformed)?;
                    Some(take(&mut wire, num_bytes)?)
                }
                5 => take(&mut wire, 4).map(|_| None)?,
                3 | 4 => return Err(Fault::Group),
                _ => return Err(Fault::Malformed),
            };
            match (field, content) {
                (Some(field), Some(content)) => self.delimited(field, content, depth)?,
                (Some(field), None) => self.number(field)?,
                (None, _) => {} // a later version's, which the decoder passes over
            }
        }
        Ok(())
    }

    /// A number by itself, which may be an element of a list. A decoder refuses it elsewhere.
    fn number(&mut self, field: &Field) -> Result<(), Fault> {
        match field.kind {
            Kind::Varints { size_bytes } | Kind::Fixed { size_bytes } => {
                self.add(field, size_bytes)
            }
            _ => Ok(()),
        }
    }

    fn delimited(&mut self, field: &Field, content: &[u8], depth: u32) -> Result<(), Fault> {
        match field.kind {
            Kind::Varints { size_bytes } => {
                if content.last().is_some_and(|last| *last >= 0x80) {
                    return Err(Fault::Malformed);
                }
                self.add(field, num_varints(content).saturating_mul(size_bytes))
            }
            Kind::Fixed { .. } => self.add(field, content.len()),
            Kind::Text { is_repeated } => {
                let text = if content.is_empty() {
                    0
                } else {
                    TEXT_BLOCK_BYTES
                };
                let element = if is_repeated { size_of::<String>() } else { 0 };
                self.add(field, element + text)
            }
            Kind::Entries { size_bytes } => self.add(field, size_bytes),
            Kind::Message { shape } => self.message(shape, content, depth),
            Kind::Messages { size_bytes, shape } => {
                self.add(field, size_bytes)?;
                self.message(shape, content, depth)
            }
        }
    }

    fn add(&mut self, field: &Field, num_bytes: usize) -> Result<(), Fault> {
        self.num_bytes = self.num_bytes.saturating_add(num_bytes);
        if self.num_bytes > self.most_bytes {
            return Err(Fault::TooLarge { field: field.name });
        }
        Ok(())
    }
}

/// Counts varints by their last bytes, which are those below 0x80; in sums of a byte each, of which
/// the machine adds many at a time.
fn num_varints(content: &[u8]) -> usize {
    let runs = content.chunks(usize::from(u8::MAX));
    let num_in = |run: &[u8]| run.iter().map(|byte| u8::from(*byte < 0x80)).sum::<u8>();
    runs.map(|run| usize::from(num_in(run))).sum()
}

/// Takes the varint that `wire` begins with: at most 10 bytes, of 64 bits together.
fn varint(wire: &mut &[u8]) -> Result<u64, Fault> {
    let mut value = 0;
    for (position, byte) in wire.iter().take(10).enumerate() {
        value |= u64::from(byte & 0x7f) << (7 * position);
        if *byte < 0x80 {
            if position == 9 && *byte > 1 {
                return Err(Fault::Malformed);
            }
            *wire = &wire[position + 1..];
            return Ok(value);
        }
    }
    Err(Fault::Malformed)
}

fn take<'a>(wire: &mut &'a [u8], num_bytes: usize) -> Result<&'a [u8], Fault> {
    let (taken, rest) = wire.split_at_checked(num_bytes).ok_or(Fault::Malformed)?;
    *wire = rest;
    Ok(taken)
}

#[cfg(test)]
mod tests;
