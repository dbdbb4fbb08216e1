//! The coordinator.

pub mod chat_template;
pub mod checkpoint;
pub mod config;
pub mod detokenizer;
pub mod stop_strings;
pub mod tokenizer;
