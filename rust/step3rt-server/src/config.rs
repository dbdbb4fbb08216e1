//! The coordinator's settings: parsed from JSON, validated once, then passed.
//!
//! It never reads the environment or a file; the command line does, and hands over one JSON text.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;

use serde::Deserialize;
use step3rt_core::config::SchedulerConfig;
use step3rt_proto::v1::ClusterSettings;
use step3rt_tls::{SetupError, TlsFiles};

pub use error::ConfigError;

mod error;

/// The longest drain; a service manager kills long before.
const MAX_DRAIN_TIMEOUT_S: f64 = 86_400.0;
/// Below this a heartbeat round trip of a busy host already breaks a lease.
const MIN_LEASE_MS: u32 = 100;

/// What `step3rt serve` runs with.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct CoordinatorConfig {
    /// Directory of the checkpoint: config.json, tokenizer.json, chat template.
    pub model_path: PathBuf,
    /// The name that clients use; the directory's name when absent.
    pub model_name: Option<String>,
    /// `host:port` of the public services; port 0 takes a free one.
    #[serde(default = "default_listen")]
    pub listen: String,
    /// `host:port` of `NodeService`, apart from the public port so that no client reaches it.
    #[serde(default = "default_control_listen")]
    pub control_listen: String,
    /// `host:port` of metrics by plain HTTP; none when absent.
    pub metrics_listen: Option<String>,
    /// The coordinator's certificate; with it both listeners of gRPC speak TLS.
    pub tls_cert: Option<PathBuf>,
    /// Its key.
    pub tls_key: Option<PathBuf>,
    /// The CA that issued it, and every instance's.
    pub tls_ca: Option<PathBuf>,
    /// Allows addresses beyond this host without TLS.
    #[serde(default)]
    pub insecure_bind: bool,
    /// Receives `{"address","control_address","metrics_address","pid"}` once the listeners are bound.
    pub ready_file: Option<PathBuf>,
    /// Serves gRPC reflection on the public port.
    #[serde(default)]
    pub reflection: bool,
    /// Attention instances needed before the service is SERVING.
    #[serde(default = "default_one")]
    pub num_attention: u32,
    /// FFN instances that together hold all experts.
    #[serde(default = "default_one")]
    pub ep_size: u32,
    /// Micro-batch lanes per attention instance.
    #[serde(default = "default_num_lanes")]
    pub num_lanes: u8,
    /// Most tokens of one lane's step; sizes every slot.
    #[serde(default = "default_max_tokens_per_micro_batch")]
    pub max_tokens_per_micro_batch: u32,
    /// Tokens of one KV block.
    #[serde(default = "default_block_size_tokens")]
    pub block_size_tokens: u32,
    /// Longest sequence; the model's own limit when absent.
    pub max_model_len: Option<u32>,
    /// Arithmetic of both roles.
    #[serde(default = "default_dtype")]
    pub compute_dtype: String,
    /// Payload from attention to FFN.
    #[serde(default = "default_dtype")]
    pub a2f_dtype: String,
    /// Payload from FFN to attention.
    #[serde(default = "default_dtype")]
    pub f2a_dtype: String,
    /// KV blocks.
    #[serde(default = "default_dtype")]
    pub kv_dtype: String,
    /// `auto`, `shm`, `rdma` or `tcp`.
    #[serde(default = "default_fabric")]
    pub fabric: String,
    /// Silence after which an instance is lost; instances beat each third of it.
    #[serde(default = "default_lease_ms")]
    pub lease_ms: u32,
    /// Longest time a step may take, or an instance's loop may stand still.
    #[serde(default = "default_step_timeout_ms")]
    pub step_timeout_ms: u64,
    /// How long sequences wait for a lost instance to come back.
    #[serde(default = "default_recovery_timeout_ms")]
    pub recovery_timeout_ms: u64,
    /// The time per output token that prompts must leave to those that decode.
    #[serde(default = "default_target_tpot_ms")]
    pub target_tpot_ms: u32,
    /// Most sequences of one lane. Each takes a token of a step when it decodes, so a smaller
    /// `max_tokens_per_micro_batch` lowers it.
    #[serde(default = "default_max_sequences_per_lane")]
    pub max_sequences_per_lane: u32,
    /// Most requests that wait for a place.
    #[serde(default = "default_max_waiting_requests")]
    pub max_waiting_requests: u32,
    /// How long running requests may go on after a stop signal.
    #[serde(default = "default_drain_timeout_s")]
    pub drain_timeout_s: f64,
    /// Steps of a lane that are planned and not answered: the token that a step samples is known
    /// to the instance before it is known here, so the next step need not wait for its way.
    #[serde(default = "default_max_steps_in_flight")]
    pub max_steps_in_flight: u8,
    /// For measurements: see [`SchedulerConfig::assumes_computed_prompts`].
    #[serde(default)]
    pub assume_computed_prompts: bool,
    /// How log lines look.
    #[serde(default)]
    pub log_format: LogFormat,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people; under systemd with priorities and without times, which the journal has.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

fn default_listen() -> String {
    "127.0.0.1:50051".to_owned()
}
fn default_control_listen() -> String {
    "127.0.0.1:0".to_owned()
}
fn default_one() -> u32 {
    1
}
fn default_num_lanes() -> u8 {
    3
}
fn default_max_tokens_per_micro_batch() -> u32 {
    256
}
fn default_block_size_tokens() -> u32 {
    64
}
fn default_dtype() -> String {
    "float32".to_owned()
}
fn default_fabric() -> String {
    "auto".to_owned()
}
fn default_lease_ms() -> u32 {
    3_000
}
fn default_step_timeout_ms() -> u64 {
    60_000
}
fn default_recovery_timeout_ms() -> u64 {
    30_000
}
fn default_target_tpot_ms() -> u32 {
    50
}
fn default_max_sequences_per_lane() -> u32 {
    256
}
fn default_max_waiting_requests() -> u32 {
    1_024
}
fn default_drain_timeout_s() -> f64 {
    30.0
}
fn default_max_steps_in_flight() -> u8 {
    2
}

impl CoordinatorConfig {
    /// Parses and validates `json`.
    pub fn from_json(json: &str) -> Result<Self, ConfigError> {
        let config: Self = serde_json::from_str(json)?;
        config.validate()?;
        Ok(config)
    }

    /// Checks every value that depends neither on the checkpoint nor on the scheduler, which
    /// checks its own.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let check = |is_valid: bool, key, found: String, allowed| {
            if is_valid {
                Ok(())
            } else {
                Err(ConfigError::OutOfRange {
                    key,
                    found,
                    allowed,
                })
            }
        };
        for (key, value) in [
            ("num_attention", self.num_attention),
            ("ep_size", self.ep_size),
            ("target_tpot_ms", self.target_tpot_ms),
        ] {
            check(value >= 1, key, value.to_string(), "at least 1 is needed")?;
        }
        check(
            self.lease_ms >= MIN_LEASE_MS,
            "lease_ms",
            self.lease_ms.to_string(),
            "at least 100 ms, or a busy host breaks every lease",
        )?;
        check(
            self.step_timeout_ms >= u64::from(self.lease_ms),
            "step_timeout_ms",
            self.step_timeout_ms.to_string(),
            "at least lease_ms, or slow steps look like dead instances",
        )?;
        check(
            (0.0..=MAX_DRAIN_TIMEOUT_S).contains(&self.drain_timeout_s),
            "drain_timeout_s",
            self.drain_timeout_s.to_string(),
            "0 to 86400 seconds, or a stop never ends",
        )?;
        for (key, value, allowed, text) in [
            (
                "compute_dtype",
                &self.compute_dtype,
                &["float32", "bfloat16"][..],
                "float32 or bfloat16",
            ),
            (
                "a2f_dtype",
                &self.a2f_dtype,
                &["float32", "bfloat16", "fp8"],
                "float32, bfloat16 or fp8",
            ),
            (
                "f2a_dtype",
                &self.f2a_dtype,
                &["float32", "bfloat16"],
                "float32 or bfloat16",
            ),
            (
                "kv_dtype",
                &self.kv_dtype,
                &["float32", "bfloat16", "fp8"],
                "float32, bfloat16 or fp8",
            ),
            (
                "fabric",
                &self.fabric,
                &["auto", "cuda_ipc", "shm", "rdma", "tcp"],
                "auto, cuda_ipc, shm, rdma or tcp",
            ),
        ] {
            check(allowed.contains(&value.as_str()), key, value.clone(), text)?;
        }
        Ok(())
    }

    /// Where the public services listen.
    pub fn listen_address(&self) -> Result<SocketAddr, ConfigError> {
        self.resolve("listen", &self.listen)
    }

    /// Where `NodeService` listens.
    pub fn control_listen_address(&self) -> Result<SocketAddr, ConfigError> {
        self.resolve("control_listen", &self.control_listen)
    }

    /// Where metrics are served, if they are. TLS does not make them less public.
    pub fn metrics_listen_address(&self) -> Result<Option<SocketAddr>, ConfigError> {
        let Some(text) = &self.metrics_listen else {
            return Ok(None);
        };
        let address = parse_address("metrics_listen", text)?;
        if address.ip().is_loopback() || self.insecure_bind {
            Ok(Some(address))
        } else {
            Err(ConfigError::PublicMetrics { address })
        }
    }

    /// The files of the coordinator's identity, if it has one.
    pub fn tls_files(&self) -> Result<Option<TlsFiles>, SetupError> {
        let [cert, key, ca] = [&self.tls_cert, &self.tls_key, &self.tls_ca].map(Clone::clone);
        TlsFiles::from_settings(cert, key, ca)
    }

    /// Refuses an address that other hosts can reach, without TLS and unless `insecure_bind`.
    pub fn check_bind(&self, key: &'static str, address: SocketAddr) -> Result<(), ConfigError> {
        if address.ip().is_loopback() || self.tls_cert.is_some() || self.insecure_bind {
            Ok(())
        } else {
            Err(ConfigError::InsecureBind { key, address })
        }
    }

    fn resolve(&self, key: &'static str, text: &str) -> Result<SocketAddr, ConfigError> {
        let address = parse_address(key, text)?;
        self.check_bind(key, address)?;
        Ok(address)
    }

    /// The settings that every instance gets at its welcome.
    pub fn cluster_settings(&self, max_model_len: u32) -> ClusterSettings {
        ClusterSettings {
            num_lanes: self.num_lanes.into(),
            max_tokens_per_micro_batch: self.max_tokens_per_micro_batch,
            block_size_tokens: self.block_size_tokens,
            max_model_len,
            ep_size: self.ep_size,
            lease_ms: self.lease_ms,
            compute_dtype: self.compute_dtype.clone(),
            a2f_dtype: self.a2f_dtype.clone(),
            f2a_dtype: self.f2a_dtype.clone(),
            kv_dtype: self.kv_dtype.clone(),
            fabric: self.fabric.clone(),
            max_steps_in_flight: self.max_steps_in_flight.into(),
            num_attention: self.num_attention,
        }
    }

    /// The scheduler's part.
    pub fn scheduler_config(&self, max_model_len: u32) -> SchedulerConfig {
        SchedulerConfig {
            num_lanes: self.num_lanes,
            block_size_tokens: self.block_size_tokens,
            max_model_len,
            max_tokens_per_micro_batch: self.max_tokens_per_micro_batch,
            max_steps_in_flight: self.max_steps_in_flight,
            target_tpot_ms: self.target_tpot_ms,
            max_sequences_per_lane: self
                .max_sequences_per_lane
                .min(self.max_tokens_per_micro_batch),
            max_waiting_requests: self.max_waiting_requests,
            recovery_timeout_ms: self.recovery_timeout_ms,
            assumes_computed_prompts: self.assume_computed_prompts,
        }
    }
}

fn parse_address(key: &'static str, text: &str) -> Result<SocketAddr, ConfigError> {
    let unusable = |reason: String| ConfigError::Address {
        key,
        found: text.to_owned(),
        reason,
    };
    text.to_socket_addrs()
        .map_err(|error| unusable(error.to_string()))?
        .next()
        .ok_or_else(|| unusable("the name has no address".to_owned()))
}

#[cfg(test)]
mod tests;
