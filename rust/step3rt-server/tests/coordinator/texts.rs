//! Every error text that an operator can meet: what happened, why it is not allowed, what to do.

use std::io;

use step3rt_server::ListError;
use step3rt_server::checkpoint::CheckpointError;
use step3rt_server::config::{ConfigError, CoordinatorConfig};
use step3rt_server::listeners::ListenError;
use step3rt_server::registry::HelloError;
use step3rt_server::start_error::StartError;
use step3rt_server::text::tokenizer::TokenizerError;

fn in_use() -> io::Error {
    io::Error::from(io::ErrorKind::AddrInUse)
}

fn config_errors() -> Vec<String> {
    let parse = |extra: &str| {
        let json = format!(r#"{{"model_path": "/m"{extra}}}"#);
        CoordinatorConfig::from_json(&json)
    };
    let refused = |extra: &str| parse(extra).expect_err(extra).to_string();
    let address = |extra: &str| {
        let config = parse(extra).expect("parses");
        config.listen_address().expect_err(extra).to_string()
    };
    let metrics_address = |extra: &str| {
        let config = parse(extra).expect("parses");
        let refused = config.metrics_listen_address();
        refused.expect_err(extra).to_string()
    };
    vec![
        refused(r#", "num_lane": 3"#),
        refused(r#", "num_lanes": "three""#),
        refused(r#", "ep_size": 0"#),
        refused(r#", "lease_ms": 5"#),
        refused(r#", "step_timeout_ms": 5"#),
        refused(r#", "drain_timeout_s": -1"#),
        refused(r#", "fabric": "pigeon""#),
        address(r#", "listen": "0.0.0.0:1""#),
        address(r#", "listen": "127.0.0.1""#),
        metrics_address(r#", "metrics_listen": "0.0.0.0:1""#),
    ]
}

fn start_errors() -> Vec<String> {
    let address = "127.0.0.1:50051".parse().expect("an address");
    let errors: Vec<StartError> = vec![
        CheckpointError::Unreadable {
            path: "/m/config.json".into(),
            source: io::Error::from(io::ErrorKind::NotFound),
        }
        .into(),
        CheckpointError::Malformed {
            path: "/m/config.json".into(),
            reason: "it has no positive vocab_size".to_owned(),
        }
        .into(),
        CheckpointError::ContextTooLong {
            asked: 9_000,
            model: 4_096,
        }
        .into(),
        TokenizerError::Unreadable {
            path: "/m/tokenizer.json".to_owned(),
            reason: "EOF while parsing".to_owned(),
        }
        .into(),
        TokenizerError::NotByteLevel {
            path: "/m/tokenizer.json".to_owned(),
            found: "Metaspace".to_owned(),
        }
        .into(),
        StartError::ForeignTokenizer {
            largest: 128_814,
            vocab_size: 3_072,
        },
        StartError::ChatTemplate("syntax error: unexpected end of input".to_owned()),
        ListenError::Bind {
            key: "listen",
            address,
            source: in_use(),
        }
        .into(),
        ListenError::Activation(in_use()).into(),
        ListenError::ReadyFile {
            path: "/r/ready.json".into(),
            source: io::Error::from(io::ErrorKind::PermissionDenied),
        }
        .into(),
        StartError::System(in_use()),
        ConfigError::InsecureBind {
            key: "control_listen",
            address,
        }
        .into(),
    ];
    errors.iter().map(ToString::to_string).collect()
}

fn hello_errors() -> Vec<String> {
    let errors = [
        HelloError::ProtocolVersion { found: 9 },
        HelloError::UnknownRole,
        HelloError::NoModel,
        HelloError::OtherModel {
            found: "a".to_owned(),
            found_fingerprint: "11".to_owned(),
            expected: "b".to_owned(),
            expected_fingerprint: "22".to_owned(),
        },
        HelloError::OtherLimits {
            key: "vocab_size",
            found: 1,
            expected: 2,
        },
        HelloError::NoFreeRank { ep_size: 2 },
        HelloError::Draining,
    ];
    errors.iter().map(ToString::to_string).collect()
}

#[test]
fn error_texts_say_what_why_and_what_to_do() {
    let list = ListError::Unreachable {
        address: "127.0.0.1:50052".to_owned(),
        reason: "no answer within 5s".to_owned(),
    };
    let mut texts = config_errors();
    texts.extend(start_errors());
    texts.extend(hello_errors());
    texts.push(list.to_string());
    insta::assert_snapshot!(texts.join("\n"));
}
