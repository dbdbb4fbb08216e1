//! Which settings are refused, and by which key.

use super::*;

fn parse(extra: &str) -> Result<CoordinatorConfig, ConfigError> {
    CoordinatorConfig::from_json(&format!(r#"{{"model_path": "/model"{extra}}}"#))
}

#[test]
fn a_model_path_is_enough() {
    let config = parse("").expect("valid");
    assert_eq!(config.listen, "127.0.0.1:50051");
    assert_eq!((config.num_lanes, config.lease_ms), (3, 3_000));
    assert!(!config.reflection && !config.insecure_bind);
    assert_eq!(config.scheduler_config(64).target_tpot_ms, 50);
}

#[test]
fn a_small_micro_batch_lowers_the_number_of_sequences() {
    let config = parse(r#", "max_tokens_per_micro_batch": 16"#).expect("valid");
    assert_eq!(config.scheduler_config(64).max_sequences_per_lane, 16);
    assert_eq!(config.scheduler_config(64).validate(), Ok(()));
}

#[test]
fn an_unknown_key_is_an_error_that_names_it() {
    let error = parse(r#", "num_lane": 2"#)
        .expect_err("unknown key")
        .to_string();
    assert!(error.contains("num_lane"), "{error}");
}

#[test]
fn values_out_of_range_are_refused_by_key() {
    for (extra, key) in [
        (r#", "ep_size": 0"#, "ep_size"),
        (r#", "lease_ms": 99"#, "lease_ms"),
        (r#", "step_timeout_ms": 10"#, "step_timeout_ms"),
        (r#", "drain_timeout_s": -1"#, "drain_timeout_s"),
        (r#", "target_tpot_ms": 0"#, "target_tpot_ms"),
        (r#", "fabric": "pigeon""#, "fabric"),
        (r#", "a2f_dtype": "int4""#, "a2f_dtype"),
    ] {
        let error = parse(extra).expect_err(extra).to_string();
        assert!(error.starts_with(key), "{error}");
    }
}

#[test]
fn an_address_beyond_this_host_needs_insecure_bind() {
    let public = r#", "listen": "0.0.0.0:0", "control_listen": "192.0.2.1:1""#;
    let config = parse(public).expect("parses");
    assert!(matches!(
        config.listen_address(),
        Err(ConfigError::InsecureBind { key: "listen", .. })
    ));
    assert!(matches!(
        config.control_listen_address(),
        Err(ConfigError::InsecureBind {
            key: "control_listen",
            ..
        })
    ));
    let config = parse(&format!(r#"{public}, "insecure_bind": true"#)).expect("parses");
    assert!(config.listen_address().is_ok());
}

#[test]
fn metrics_beyond_this_host_need_insecure_bind_though_there_is_tls() {
    let identity = r#", "tls_cert": "/c", "tls_key": "/k", "tls_ca": "/a""#;
    let public = format!(r#"{identity}, "metrics_listen": "0.0.0.0:0""#);
    let config = parse(&public).expect("parses");
    assert!(matches!(
        config.metrics_listen_address(),
        Err(ConfigError::PublicMetrics { .. })
    ));
    let config = parse(&format!(r#"{public}, "insecure_bind": true"#)).expect("parses");
    assert!(matches!(config.metrics_listen_address(), Ok(Some(_))));
    let config = parse("").expect("parses");
    assert!(matches!(config.metrics_listen_address(), Ok(None)));
}

#[test]
fn an_address_without_a_port_is_refused_with_an_example() {
    let config = parse(r#", "listen": "localhost""#).expect("parses");
    let error = config.listen_address().expect_err("no port").to_string();
    assert!(error.contains("host:port"), "{error}");
}
