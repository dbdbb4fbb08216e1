//! Between text and tokens: prompts in, streams out.
//!
//! Nothing here knows of requests, channels or time.
//!
//! Reading order: [`tokenizer`], [`chat_template`] (prompts), [`continuation`] (streams).

pub mod chat_template;
pub mod continuation;
pub mod defuse;
pub mod detokenizer;
pub(crate) mod input;
pub mod media_parts;
pub mod python_json;
pub mod stop_strings;
pub mod tokenizer;
