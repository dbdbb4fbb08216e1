//! What the coordinator must know of a checkpoint: its limits, its defaults and its chat template.
//!
//! It reads the small JSON files only, never weights.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use step3rt_core::ids::TokenId;
use step3rt_proto::adjustments::is_repetition_penalty;
use step3rt_proto::generate::{ModelLimits, SamplingDefaults};
use thiserror::Error;

/// More than any config or template has; a larger file is not what its name says.
const MAX_JSON_BYTES: u64 = 16 * 1024 * 1024;

/// A checkpoint's description.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// Its directory.
    pub path: PathBuf,
    /// The name that clients use.
    pub name: String,
    /// What requests are checked against.
    pub limits: ModelLimits,
    /// The source of its chat template, if it has one.
    pub chat_template: Option<String>,
    /// Text of the token that opens a sequence, for templates that write it.
    pub bos_token: Option<String>,
    /// Text of the token that ends one.
    pub eos_token: Option<String>,
    /// Whether a plain text gets `bos_token`, too: tokenizer.json may leave that to its users.
    pub adds_bos: bool,
}

/// A checkpoint that cannot be served.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// A file that must be there cannot be read.
    #[error("{path} cannot be read: {source}. Point `model_path` at a checkpoint directory")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not what its name says.
    #[error("{path} is not usable: {reason}. Download the checkpoint again, or correct the file")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The configured context exceeds the model's.
    #[error(
        "max_model_len = {asked} exceeds the model's context of {model} tokens, which it was \
         trained for. Lower `max_model_len`, or leave it out"
    )]
    ContextTooLong {
        /// As configured.
        asked: u32,
        /// As trained.
        model: u32,
    },
}

#[derive(Deserialize)]
struct ModelConfig {
    text_config: Option<TextConfig>,
    #[serde(flatten)]
    flat: TextConfig,
}

#[derive(Default, Deserialize)]
struct TextConfig {
    vocab_size: Option<u32>,
    // Step-3 spells it in the singular; others do not, and some configs have both.
    max_position_embedding: Option<u32>,
    max_position_embeddings: Option<u32>,
    max_seq_len: Option<u32>,
    eos_token_id: Option<OneOrMany>,
}

impl TextConfig {
    /// In the order in which instances look: they must come to the same limit, or may not join.
    fn context(&self) -> Option<u32> {
        self.max_position_embedding
            .or(self.max_seq_len)
            .or(self.max_position_embeddings)
    }
}

#[derive(Default, Deserialize)]
struct GenerationConfig {
    temperature: Option<f32>,
    top_p: Option<f32>,
    // 0 and -1 are both written for off.
    top_k: Option<i64>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    eos_token_id: Option<OneOrMany>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

impl OneOrMany {
    fn into_tokens(self) -> Vec<TokenId> {
        match self {
            Self::One(id) => vec![TokenId(id)],
            Self::Many(ids) => ids.into_iter().map(TokenId).collect(),
        }
    }
}

impl Checkpoint {
    /// Reads the checkpoint in `path`; `name` and `max_model_len` override what it says.
    pub fn read(
        path: &Path,
        name: Option<&str>,
        max_model_len: Option<u32>,
    ) -> Result<Self, CheckpointError> {
        let config_path = path.join("config.json");
        let config: ModelConfig = read_json(&config_path)?;
        let malformed = |reason: &str| CheckpointError::Malformed {
            path: config_path.clone(),
            reason: reason.to_owned(),
        };
        let flat = config.flat;
        let text = config.text_config.unwrap_or_default();
        let vocab_size = text
            .vocab_size
            .or(flat.vocab_size)
            .filter(|size| *size > 0)
            .ok_or_else(|| malformed("it has no positive vocab_size"))?;
        let model_len = text
            .context()
            .or(flat.context())
            .filter(|len| *len > 0)
            .ok_or_else(|| malformed("it has neither max_position_embedding nor max_seq_len"))?;
        if let Some(asked) = max_model_len.filter(|asked| *asked > model_len) {
            return Err(CheckpointError::ContextTooLong {
                asked,
                model: model_len,
            });
        }
        let generation: GenerationConfig =
            read_optional_json(&path.join("generation_config.json"))?.unwrap_or_default();
        let mut eos_tokens = generation
            .eos_token_id
            .or(flat.eos_token_id)
            .or(text.eos_token_id)
            .map(OneOrMany::into_tokens)
            .unwrap_or_default();
        eos_tokens.retain(|token| token.0 < vocab_size);
        let tokenizer_config: Value =
            read_optional_json(&path.join("tokenizer_config.json"))?.unwrap_or_default();
        let defaults = SamplingDefaults::default();
        Ok(Self {
            path: path.to_owned(),
            name: name.map_or_else(|| directory_name(path), str::to_owned),
            limits: ModelLimits {
                vocab_size,
                max_model_len: max_model_len.unwrap_or(model_len),
                eos_tokens,
                defaults: SamplingDefaults {
                    temperature: generation
                        .temperature
                        .filter(|value| value.is_finite() && *value >= 0.0)
                        .unwrap_or(defaults.temperature),
                    top_p: generation
                        .top_p
                        .filter(|value| *value > 0.0 && *value <= 1.0)
                        .unwrap_or(defaults.top_p),
                    top_k: generation
                        .top_k
                        .and_then(|top_k| u32::try_from(top_k).ok())
                        .unwrap_or(defaults.top_k),
                    min_p: generation
                        .min_p
                        .filter(|value| (0.0..=1.0).contains(value))
                        .unwrap_or(defaults.min_p),
                    repetition_penalty: generation
                        .repetition_penalty
                        .filter(|value| is_repetition_penalty(*value))
                        .unwrap_or(defaults.repetition_penalty),
                },
            },
            chat_template: find_chat_template(path, &tokenizer_config)?,
            bos_token: token_text(&tokenizer_config, "bos_token"),
            eos_token: token_text(&tokenizer_config, "eos_token"),
            adds_bos: tokenizer_config
                .get("add_bos_token")
                .is_some_and(|value| *value == Value::Bool(true)),
        })
    }

    /// Text of the token that every plain text begins with.
    pub fn opening_token(&self) -> Option<&str> {
        self.bos_token.as_deref().filter(|_| self.adds_bos)
    }
}

fn directory_name(path: &Path) -> String {
    path.canonicalize()
        .ok()
        .as_deref()
        .unwrap_or(path)
        .file_name()
        .map_or_else(
            || "model".to_owned(),
            |name| name.to_string_lossy().into_owned(),
        )
}

/// Newer checkpoints have `chat_template.jinja`, Step-3 has `chat_template.json`, older ones a key
/// of `tokenizer_config.json`; the most specific file wins.
fn find_chat_template(
    path: &Path,
    tokenizer_config: &Value,
) -> Result<Option<String>, CheckpointError> {
    let jinja = path.join("chat_template.jinja");
    if jinja.exists() {
        return read_text(&jinja).map(Some);
    }
    let json: Option<Value> = read_optional_json(&path.join("chat_template.json"))?;
    let template = [json.as_ref(), Some(tokenizer_config)]
        .into_iter()
        .flatten()
        .find_map(|value| value.get("chat_template")?.as_str());
    Ok(template.map(str::to_owned))
}

/// A special token is a string, or an object with `content`.
fn token_text(tokenizer_config: &Value, key: &str) -> Option<String> {
    let value = tokenizer_config.get(key)?;
    let text = value.as_str().or_else(|| value.get("content")?.as_str());
    text.map(str::to_owned)
}

fn read_optional_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, CheckpointError> {
    if path.exists() {
        read_json(path).map(Some)
    } else {
        Ok(None)
    }
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, CheckpointError> {
    serde_json::from_str(&read_text(path)?).map_err(|error| CheckpointError::Malformed {
        path: path.to_owned(),
        reason: error.to_string(),
    })
}

fn read_text(path: &Path) -> Result<String, CheckpointError> {
    let unreadable = |source| CheckpointError::Unreadable {
        path: path.to_owned(),
        source,
    };
    let mut text = String::new();
    let num_bytes = File::open(path)
        .map_err(unreadable)?
        .take(MAX_JSON_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(unreadable)?;
    if num_bytes as u64 > MAX_JSON_BYTES {
        return Err(CheckpointError::Malformed {
            path: path.to_owned(),
            reason: format!("it has more than {MAX_JSON_BYTES} bytes"),
        });
    }
    Ok(text)
}

#[cfg(test)]
mod tests;
