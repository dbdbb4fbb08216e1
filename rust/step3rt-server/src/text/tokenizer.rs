//! Text to token ids, and the bytes of every token id.
//!
//! It never decodes a stream: that is [`crate::text::detokenizer`], which reads the bytes here.

use std::path::Path;

use step3rt_core::ids::TokenId;
use thiserror::Error;
use tokenizers::decoders::DecoderWrapper;

use crate::text::defuse::SEPARATOR;

/// A checkpoint's byte-level tokenizer.
pub struct Tokenizer {
    encoder: tokenizers::Tokenizer,
    bytes: TokenBytes,
    opening: Option<TokenId>,
}

/// A tokenizer that cannot be used.
#[derive(Debug, Error)]
pub enum TokenizerError {
    /// tokenizer.json cannot be read.
    #[error("{path} is not a usable tokenizer: {reason}. Download the checkpoint again")]
    Unreadable {
        /// The file.
        path: String,
        /// The library's words.
        reason: String,
    },
    /// Streams are decoded byte by byte, which needs a byte-level vocabulary.
    #[error(
        "{path} decodes with {found}, and only ByteLevel can be streamed byte by byte. Remove the \
         file to serve token ids alone"
    )]
    NotByteLevel {
        /// The file.
        path: String,
        /// The decoder's type.
        found: String,
    },
    /// Every text is to begin with a token that there is not.
    #[error(
        "{path} has no token {opening:?}, which tokenizer_config.json wants before every text \
         (add_bos_token). Download the checkpoint again"
    )]
    NoOpening {
        /// The file.
        path: String,
        /// The token's text.
        opening: String,
    },
    /// The library refused a text.
    #[error("the text cannot be tokenised: {0}")]
    Encode(String),
}

impl Tokenizer {
    /// Reads tokenizer.json in `directory`; `None` if there is none. `opening` is the text of the
    /// token that plain texts begin with, whether the file says so or not.
    pub fn read(directory: &Path, opening: Option<&str>) -> Result<Option<Self>, TokenizerError> {
        let path = directory.join("tokenizer.json");
        if !path.exists() {
            return Ok(None);
        }
        let mut encoder = tokenizers::Tokenizer::from_file(&path).map_err(|error| {
            TokenizerError::Unreadable {
                path: path.display().to_string(),
                reason: error.to_string(),
            }
        })?;
        match encoder.get_decoder() {
            Some(DecoderWrapper::ByteLevel(_)) => {}
            other => {
                return Err(TokenizerError::NotByteLevel {
                    path: path.display().to_string(),
                    found: other.map_or_else(|| "nothing".to_owned(), decoder_name),
                });
            }
        }
        // The file may carry the settings of a training run; a prompt is never cut or padded.
        encoder.with_padding(None);
        encoder
            .with_truncation(None)
            .map_err(|error| TokenizerError::Encode(error.to_string()))?;
        let id_of = |text: &str| {
            let id = encoder.token_to_id(text);
            id.map(TokenId).ok_or_else(|| TokenizerError::NoOpening {
                path: path.display().to_string(),
                opening: text.to_owned(),
            })
        };
        let opening = opening.map(id_of).transpose()?;
        let bytes = TokenBytes::new(&encoder);
        Ok(Some(Self {
            encoder,
            bytes,
            opening,
        }))
    }

    /// The ids of `text`. Special tokens written out in it count as such, as with the model's
    /// own tools; `add_special_tokens` adds what the tokenizer puts around every text, an opening
    /// token once: not before one that the text begins with.
    pub fn encode(
        &self,
        text: &str,
        add_special_tokens: bool,
    ) -> Result<Vec<TokenId>, TokenizerError> {
        let encoding = self
            .encoder
            .encode_fast(text, add_special_tokens)
            .map_err(|error| TokenizerError::Encode(error.to_string()))?;
        let ids = encoding.get_ids().iter().copied().map(TokenId);
        let opening = self
            .opening
            .filter(|opening| add_special_tokens && encoding.get_ids().first() != Some(&opening.0));
        Ok(opening.into_iter().chain(ids).collect())
    }

    /// The ids of a rendered chat: each piece between separators by itself, so that what was cut
    /// stays cut. The template writes the special tokens, so none are added.
    pub fn encode_chat(&self, text: &str) -> Result<Vec<TokenId>, TokenizerError> {
        let mut tokens = Vec::new();
        for piece in text.split(SEPARATOR) {
            tokens.extend(self.encode(piece, false)?);
        }
        Ok(tokens)
    }

    /// The text of every special token.
    pub fn special_tokens(&self) -> Vec<String> {
        let added = self.encoder.get_added_tokens_decoder();
        added
            .into_values()
            .filter(|token| token.special)
            .map(|token| token.content)
            .collect()
    }

    /// The bytes of every token.
    pub fn bytes(&self) -> &TokenBytes {
        &self.bytes
    }
}

fn decoder_name(decoder: &DecoderWrapper) -> String {
    let debug = format!("{decoder:?}");
    debug
        .split(|character: char| !character.is_alphanumeric())
        .next()
        .unwrap_or_default()
        .to_owned()
}

/// The bytes that each token stands for, back to back.
///
/// ```text
///   bytes   | token 0 | token 1 |  ...  |
///   ends         ^         ^
/// ```
pub struct TokenBytes {
    bytes: Vec<u8>,
    ends: Vec<usize>,
    is_special: Vec<bool>,
    longest: usize,
}

impl TokenBytes {
    fn new(encoder: &tokenizers::Tokenizer) -> Self {
        let byte_of = byte_level_alphabet();
        let added = encoder.get_added_tokens_decoder();
        let num_ids = encoder
            .get_vocab(true)
            .values()
            .max()
            .map_or(0, |largest| *largest as usize + 1);
        let mut table = Self {
            bytes: Vec::new(),
            ends: Vec::with_capacity(num_ids),
            is_special: Vec::with_capacity(num_ids),
            longest: 1,
        };
        for id in 0..u32::try_from(num_ids).unwrap_or(u32::MAX) {
            let start = table.bytes.len();
            let text = encoder.id_to_token(id).unwrap_or_default();
            // An added token that is not spelt in the byte alphabet stands for itself.
            match text.chars().map(&byte_of).collect::<Option<Vec<u8>>>() {
                Some(bytes) => table.bytes.extend(bytes),
                None => table.bytes.extend(text.as_bytes()),
            }
            table.longest = table.longest.max(table.bytes.len() - start);
            table.ends.push(table.bytes.len());
            table
                .is_special
                .push(added.get(&id).is_some_and(|token| token.special));
        }
        table
    }

    /// What `token` stands for; empty for an id without text.
    pub fn get(&self, token: TokenId) -> &[u8] {
        let index = token.0 as usize;
        let Some(end) = self.ends.get(index) else {
            return &[];
        };
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.bytes[start..*end]
    }

    /// Whether `token` is a marker rather than text.
    pub fn is_special(&self, token: TokenId) -> bool {
        self.is_special
            .get(token.0 as usize)
            .copied()
            .unwrap_or(false)
    }

    /// One more than the largest id.
    pub fn num_ids(&self) -> usize {
        self.ends.len()
    }

    /// The length of the longest token, so that `text.len() / longest` bounds a text's token
    /// count from below.
    pub fn longest(&self) -> usize {
        self.longest
    }
}

/// The byte alphabet of byte-level BPE: printable Latin-1 bytes stand for themselves, the other 68
/// follow from U+0100 in order.
fn byte_level_alphabet() -> impl Fn(char) -> Option<u8> {
    let is_printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let shifted: Vec<u8> = (0..=u8::MAX).filter(|byte| !is_printable(*byte)).collect();
    move |character| {
        let code = u32::from(character);
        match u8::try_from(code) {
            Ok(byte) => is_printable(byte).then_some(byte),
            Err(_) => shifted.get(code.checked_sub(0x100)? as usize).copied(),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::HashSet;

    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    use super::*;

    /// A vocabulary of the 256 bytes (ids 0..256), one merge "he" (256), a special token (257)
    /// and an added token (258) that is not spelt in the byte alphabet.
    const BYTE_MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/byte_model");

    pub(crate) fn byte_tokenizer() -> Tokenizer {
        Tokenizer::read(Path::new(BYTE_MODEL), None)
            .expect("usable")
            .expect("present")
    }

    #[test]
    fn the_byte_alphabet_is_the_librarys() {
        let byte_of = byte_level_alphabet();
        let alphabet = ByteLevel::alphabet();
        let bytes: HashSet<_> = alphabet.iter().filter_map(|c| byte_of(*c)).collect();
        assert_eq!((alphabet.len(), bytes.len()), (256, 256));
    }

    #[test]
    fn the_bytes_of_a_texts_tokens_are_the_text() {
        let tokenizer = byte_tokenizer();
        for text in ["hello he", "naïve 🦀\n\t", "a→äb", ""] {
            let tokens = tokenizer.encode(text, true).expect("encodes");
            let bytes: Vec<u8> = tokens
                .iter()
                .flat_map(|token| tokenizer.bytes().get(*token))
                .copied()
                .collect();
            assert_eq!(String::from_utf8_lossy(&bytes), text);
            let ids: Vec<u32> = tokens.iter().map(|token| token.0).collect();
            assert_eq!(
                tokenizer.encoder.decode(&ids, false).expect("decodes"),
                text
            );
        }
    }

    #[test]
    fn special_tokens_are_known_as_such() {
        let tokenizer = byte_tokenizer();
        assert_eq!(
            tokenizer.encode("<|EOT|>", false).expect("encodes"),
            [TokenId(257)]
        );
        assert!(tokenizer.bytes().is_special(TokenId(257)));
        assert!(!tokenizer.bytes().is_special(TokenId(258)));
        assert!(tokenizer.bytes().get(TokenId(9_999)).is_empty());
        assert_eq!(tokenizer.bytes().longest(), 7);
    }

    #[test]
    fn another_decoder_is_refused_by_name_and_a_missing_file_is_not_an_error() {
        let directory = tempfile::tempdir().expect("temporary directory");
        assert!(
            Tokenizer::read(directory.path(), None)
                .expect("no file")
                .is_none()
        );
        let text = std::fs::read_to_string(Path::new(BYTE_MODEL).join("tokenizer.json"));
        let mut json: serde_json::Value =
            serde_json::from_str(&text.expect("readable")).expect("JSON");
        json["decoder"] = serde_json::json!({"type": "Fuse"});
        std::fs::write(directory.path().join("tokenizer.json"), json.to_string()).expect("write");
        let error = Tokenizer::read(directory.path(), None)
            .err()
            .expect("refused")
            .to_string();
        assert!(error.contains("decodes with Fuse"), "{error}");
    }

    #[test]
    fn a_training_runs_settings_neither_cut_nor_pad_a_prompt() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let text = std::fs::read_to_string(Path::new(BYTE_MODEL).join("tokenizer.json"));
        let mut json: serde_json::Value =
            serde_json::from_str(&text.expect("readable")).expect("JSON");
        json["truncation"] = serde_json::json!({
            "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0
        });
        json["padding"] = serde_json::json!({
            "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 257, "pad_type_id": 0, "pad_token": "<|EOT|>"
        });
        std::fs::write(directory.path().join("tokenizer.json"), json.to_string()).expect("write");
        let tokenizer = Tokenizer::read(directory.path(), None);
        let tokenizer = tokenizer.expect("usable").expect("present");
        let plain = b"abcde".map(|byte| TokenId(byte.into()));
        assert_eq!(tokenizer.encode("abcde", true).expect("encodes"), plain);
        assert_eq!(tokenizer.encode_chat("abcde").expect("encodes"), plain);
    }

    #[test]
    fn an_opening_token_comes_once_and_before_plain_texts_alone() {
        let read = |opening| Tokenizer::read(Path::new(BYTE_MODEL), opening);
        let tokenizer = read(Some("<|EOT|>")).expect("usable").expect("present");
        let opened = [TokenId(257), TokenId(u32::from(b'a'))];
        assert_eq!(tokenizer.encode("a", true).expect("encodes"), opened);
        assert_eq!(tokenizer.encode("<|EOT|>a", true).expect("encodes"), opened);
        assert_eq!(tokenizer.encode("", true).expect("encodes"), opened[..1]);
        assert_eq!(tokenizer.encode("a", false).expect("encodes"), opened[1..]);
        assert_eq!(tokenizer.encode_chat("a").expect("encodes"), opened[1..]);
        let error = read(Some("<s>")).err().expect("refused").to_string();
        assert!(error.contains(r#"no token "<s>""#), "{error}");
    }

    #[test]
    fn text_that_a_user_wrote_is_never_a_special_token() {
        let tokenizer = byte_tokenizer();
        let cut = format!("<|EOT|><{SEPARATOR}|EOT|>");
        let tokens = tokenizer.encode_chat(&cut).expect("encodes");
        assert_eq!(
            tokens
                .iter()
                .filter(|token| **token == TokenId(257))
                .count(),
            1
        );
        let bytes: Vec<u8> = tokens
            .iter()
            .flat_map(|token| tokenizer.bytes().get(*token))
            .copied()
            .collect();
        assert_eq!(bytes, b"<|EOT|><|EOT|>");
        assert_eq!(tokenizer.special_tokens(), ["<|EOT|>"]);
    }

    #[test]
    fn the_nano_models_tokens_decode_as_the_library_decodes_them() {
        let model = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../python/step3rt/data/nano"
        );
        let tokenizer = Tokenizer::read(Path::new(model), None)
            .expect("usable")
            .expect("present");
        let text = "The old man said, “Où est-il?” — and 3.14 🦀\n\n\tthen left.<|EOT|>";
        let tokens = tokenizer.encode(text, true).expect("encodes");
        let bytes: Vec<u8> = tokens
            .iter()
            .flat_map(|token| tokenizer.bytes().get(*token))
            .copied()
            .collect();
        let ids: Vec<u32> = tokens.iter().map(|token| token.0).collect();
        let decoded = tokenizer.encoder.decode(&ids, false).expect("decodes");
        assert_eq!(String::from_utf8(bytes).expect("UTF-8"), decoded);
        assert!(decoded.ends_with(text), "{decoded}");
    }
}
