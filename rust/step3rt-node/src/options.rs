//! What an instance must know before it can reach its coordinator. Everything else comes from the
//! coordinator, so that a cluster has one configuration. This module opens no connection; of files, it
//! reads those that TLS needs.

use std::net::{AddrParseError, IpAddr};
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;
use step3rt_proto::v1;
use step3rt_tls::{Identity, TlsFiles};

use crate::error::NodeError;

/// Longest time that any option may name: a day. Longer is a unit mistake.
const MAX_DURATION_S: f64 = 86_400.0;

/// An instance's options, checked.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// Where the coordinator's control listener is.
    pub coordinator: CoordinatorAddress,
    /// What this instance does.
    pub role: Role,
    /// The address that peers of other hosts connect to.
    pub data_host: IpAddr,
    /// How long to try to reach the coordinator.
    pub connect_timeout: Duration,
    /// Who this instance is to its cluster; without it, session and links are in clear text.
    pub tls: Option<Identity>,
    /// How long a waiting loop spins before it sleeps; 0 where ranks outnumber cores.
    pub spin_us: u32,
    /// Names the checkpoint; instances of one cluster must agree.
    pub model_fingerprint: String,
    /// What the scheduler must know of the model.
    pub model: v1::ModelSummary,
}

/// The two kinds of instances.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Holds the KV cache; pushes first on every lane.
    Attention,
    /// Holds experts; replies.
    Ffn,
}

impl Role {
    /// The role on the wire.
    pub fn to_wire(self) -> v1::Role {
        match self {
            Self::Attention => v1::Role::Attention,
            Self::Ffn => v1::Role::Ffn,
        }
    }
}

/// Where the coordinator listens for instances.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CoordinatorAddress {
    text: String,
    uri: String,
}

impl CoordinatorAddress {
    /// Understands `host:port` and `unix:/absolute/path`.
    pub fn parse(text: &str) -> Result<Self, NodeError> {
        let refused = || NodeError::CoordinatorAddress(text.to_owned());
        let uri = if let Some(path) = text.strip_prefix("unix:") {
            if !path.starts_with('/') {
                return Err(refused());
            }
            format!("unix://{path}")
        } else {
            let (host, port) = text.rsplit_once(':').ok_or_else(refused)?;
            let port: u16 = port.parse().map_err(|_| refused())?;
            let is_bare_ipv6 = host.contains(':') && !host.starts_with('[');
            if host.is_empty() || is_bare_ipv6 || host.contains(['/', '@', ' ']) || port == 0 {
                return Err(refused());
            }
            format!("http://{text}")
        };
        Ok(Self {
            text: text.to_owned(),
            uri,
        })
    }

    /// As configured, for people.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// As gRPC wants it.
    pub fn uri(&self) -> &str {
        &self.uri
    }
}

/// The JSON form of [`NodeOptions`].
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawOptions {
    coordinator: String,
    role: Role,
    data_host: String,
    connect_timeout_s: f64,
    tls_cert: Option<PathBuf>,
    tls_key: Option<PathBuf>,
    tls_ca: Option<PathBuf>,
    spin_us: u32,
    model_fingerprint: String,
    model: RawModel,
}

/// The JSON form of `ModelSummary`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawModel {
    name: String,
    vocab_size: u32,
    max_model_len: u32,
    num_layers: u32,
    hidden_size: u32,
    num_experts: u32,
    num_experts_per_token: u32,
    eos_token_ids: Vec<u32>,
    bos_token_id: u32,
}

impl NodeOptions {
    /// Parses and checks the options.
    pub fn from_json(json: &str) -> Result<Self, NodeError> {
        let raw: RawOptions = serde_json::from_str(json)?;
        let model = raw.model;
        let tls = TlsFiles::from_settings(raw.tls_cert, raw.tls_key, raw.tls_ca)?;
        let tls = tls.map(Identity::follow).transpose()?;
        Ok(Self {
            coordinator: CoordinatorAddress::parse(&raw.coordinator)?,
            role: raw.role,
            data_host: parse_data_host(&raw.data_host)?,
            connect_timeout: duration_from_s("connect_timeout_s", raw.connect_timeout_s)?,
            tls,
            spin_us: raw.spin_us,
            model_fingerprint: raw.model_fingerprint,
            model: v1::ModelSummary {
                name: model.name,
                vocab_size: model.vocab_size,
                max_model_len: model.max_model_len,
                num_layers: model.num_layers,
                hidden_size: model.hidden_size,
                num_experts: model.num_experts,
                num_experts_per_token: model.num_experts_per_token,
                eos_token_ids: model.eos_token_ids,
                bos_token_id: model.bos_token_id,
            },
        })
    }
}

fn parse_data_host(data_host: &str) -> Result<IpAddr, NodeError> {
    let refused = |why: String| NodeError::DataHost {
        data_host: data_host.to_owned(),
        why,
    };
    let address: IpAddr = data_host
        .parse()
        .map_err(|error: AddrParseError| refused(error.to_string()))?;
    if address.is_unspecified() {
        return Err(refused("a wildcard names no host".to_owned()));
    }
    Ok(address)
}

/// A duration from a number of seconds that a caller wrote.
pub fn duration_from_s(field: &'static str, value: f64) -> Result<Duration, NodeError> {
    if (0.0..=MAX_DURATION_S).contains(&value) {
        Ok(Duration::from_secs_f64(value))
    } else {
        Err(NodeError::DurationOutOfRange {
            field,
            value,
            max_s: MAX_DURATION_S,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options_json(coordinator: &str, data_host: &str, timeout: &str) -> String {
        format!(
            r#"{{"coordinator": "{coordinator}", "role": "ffn", "data_host": "{data_host}",
                "connect_timeout_s": {timeout}, "spin_us": 50,
                "model_fingerprint": "abc", "model": {{"name": "m", "vocab_size": 8,
                "max_model_len": 16, "num_layers": 2, "hidden_size": 128, "num_experts": 4,
                "num_experts_per_token": 2, "eos_token_ids": [1], "bos_token_id": 0}}}}"#
        )
    }

    #[test]
    fn complete_options_are_accepted() {
        let options =
            NodeOptions::from_json(&options_json("127.0.0.1:5000", "10.0.0.2", "1.5")).unwrap();
        assert_eq!(options.role, Role::Ffn);
        assert_eq!(options.connect_timeout, Duration::from_millis(1500));
        assert_eq!(options.spin_us, 50);
        assert_eq!(options.coordinator.uri(), "http://127.0.0.1:5000");
        assert_eq!(options.model.eos_token_ids, [1]);
    }

    #[test]
    fn an_unknown_option_is_named() {
        let json = options_json("127.0.0.1:5000", "10.0.0.2", "1").replacen("role", "rolle", 1);
        let text = NodeOptions::from_json(&json).unwrap_err().to_string();
        assert!(text.contains("unknown field `rolle`"), "{text}");
    }

    #[test]
    fn addresses_that_lead_nowhere_are_refused() {
        for address in [
            "",
            "host",
            "host:",
            ":1",
            "host:0",
            "host:70000",
            "::1:50",
            "unix:relative",
            "a b:1",
            "http://host:1",
            "user@host:1",
        ] {
            assert!(CoordinatorAddress::parse(address).is_err(), "{address}");
        }
        for address in ["host:1", "[::1]:50051", "unix:/run/step3rt/control.sock"] {
            assert_eq!(
                CoordinatorAddress::parse(address).unwrap().as_str(),
                address
            );
        }
    }

    #[test]
    fn durations_that_are_no_time_are_refused() {
        for value in [-1.0, f64::NAN, f64::INFINITY, 1e9] {
            let error = duration_from_s("timeout_s", value).unwrap_err();
            assert!(error.to_string().starts_with("timeout_s is not usable"));
        }
    }

    #[test]
    fn a_data_host_must_be_an_address_that_peers_can_reach() {
        for data_host in ["localhost", "0.0.0.0", "::", "10.0.0.1:7000", ""] {
            let json = options_json("127.0.0.1:5000", data_host, "1");
            let text = NodeOptions::from_json(&json).unwrap_err().to_string();
            let expected = format!("data_host is not usable: `{data_host}`");
            assert!(text.starts_with(&expected), "{text}");
        }
    }
}
