//! What clients send to be tokenised.

use step3rt_core::ids::TokenId;

use crate::text::tokenizer::{Tokenizer, TokenizerError};

/// A text and how it is tokenised.
pub(crate) enum Text {
    /// As it is; with what the tokenizer puts around every text, or without.
    Plain(String, bool),
    /// A rendered chat.
    Chat(String),
}

impl Text {
    /// Of UTF-8.
    pub(crate) fn num_bytes(&self) -> usize {
        match self {
            Self::Plain(text, _) | Self::Chat(text) => text.len(),
        }
    }

    /// Its tokens.
    pub(crate) fn encode(&self, tokenizer: &Tokenizer) -> Result<Vec<TokenId>, TokenizerError> {
        match self {
            Self::Plain(text, add_special_tokens) => tokenizer.encode(text, *add_special_tokens),
            Self::Chat(text) => tokenizer.encode_chat(text),
        }
    }
}
