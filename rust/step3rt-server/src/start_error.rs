//! Why the coordinator does not start.

use std::io;

use step3rt_tls::SetupError;
use thiserror::Error;

use crate::checkpoint::CheckpointError;
use crate::config::ConfigError;
use crate::listeners::ListenError;
use crate::text::tokenizer::TokenizerError;

/// Why the coordinator does not start.
#[derive(Debug, Error)]
pub enum StartError {
    /// A setting is not usable.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A setting of the scheduler is not usable.
    #[error(transparent)]
    Scheduler(#[from] step3rt_core::config::ConfigError),
    /// The checkpoint is not usable.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Its tokenizer is not usable.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// Its tokenizer belongs to another model.
    #[error(
        "tokenizer.json has ids up to {largest} and the model's vocabulary {vocab_size}. Use the \
         checkpoint's own tokenizer.json"
    )]
    ForeignTokenizer {
        /// The largest id.
        largest: usize,
        /// The model's.
        vocab_size: u32,
    },
    /// Its chat template is not usable.
    #[error("the checkpoint's chat template does not compile: {0}. Correct or remove it")]
    ChatTemplate(String),
    /// A listener cannot be had.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Certificate, key or CA cannot be used.
    #[error(transparent)]
    Tls(#[from] SetupError),
    /// The operating system refuses something basic.
    #[error("the coordinator cannot start: {0}. Check the process's limits")]
    System(#[from] io::Error),
}
