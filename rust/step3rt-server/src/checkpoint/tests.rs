//! Checkpoints' descriptions, as people have them.

use std::fs;

use super::*;

fn directory(files: &[(&str, &str)]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("temporary directory");
    for (name, text) in files {
        fs::write(directory.path().join(name), text).expect("write");
    }
    directory
}

const STEP3_LIKE: &str = r#"{
    "eos_token_id": 128805, "auto_map": {"x": "y"},
    "text_config": {"vocab_size": 128815, "max_position_embedding": 65536, "max_seq_len": 65536}
}"#;

#[test]
fn step3s_nested_config_with_the_singular_key_is_understood() {
    let directory = directory(&[("config.json", STEP3_LIKE)]);
    let checkpoint = Checkpoint::read(directory.path(), Some("step3"), None).expect("valid");
    assert_eq!(checkpoint.limits.vocab_size, 128_815);
    assert_eq!(checkpoint.limits.max_model_len, 65_536);
    assert_eq!(checkpoint.limits.eos_tokens, [TokenId(128_805)]);
    assert_eq!(checkpoint.limits.defaults, SamplingDefaults::default());
}

#[test]
fn generation_config_gives_defaults_and_end_tokens() {
    let generation = r#"{"temperature": 0.5, "top_k": 20, "eos_token_id": [1, 128805],
        "min_p": 0.05, "repetition_penalty": 1.1}"#;
    let directory = directory(&[
        ("config.json", STEP3_LIKE),
        ("generation_config.json", generation),
    ]);
    let limits = Checkpoint::read(directory.path(), None, None)
        .expect("valid")
        .limits;
    assert_eq!(limits.eos_tokens, [TokenId(1), TokenId(128_805)]);
    assert_eq!(limits.defaults.top_k, 20);
    assert!((limits.defaults.temperature - 0.5).abs() < f32::EPSILON);
    assert!((limits.defaults.min_p - 0.05).abs() < f32::EPSILON);
    assert!((limits.defaults.repetition_penalty - 1.1).abs() < f32::EPSILON);
}

#[test]
fn a_flat_config_with_both_spellings_and_top_k_off_is_understood() {
    let config = r#"{"vocab_size": 9, "max_position_embedding": 64,
        "max_position_embeddings": 32, "eos_token_id": [1, 9]}"#;
    let directory = directory(&[
        ("config.json", config),
        (
            "generation_config.json",
            r#"{"top_k": -1, "repetition_penalty": -2.0}"#,
        ),
    ]);
    let limits = Checkpoint::read(directory.path(), None, None)
        .expect("valid")
        .limits;
    assert_eq!((limits.vocab_size, limits.max_model_len), (9, 64));
    assert_eq!(
        limits.eos_tokens,
        [TokenId(1)],
        "ids beyond the vocabulary end nothing"
    );
    assert_eq!(limits.defaults, SamplingDefaults::default());
}

#[test]
fn the_context_is_read_from_the_same_key_as_by_instances() {
    let config = r#"{"vocab_size": 9, "max_position_embeddings": 64, "max_seq_len": 32}"#;
    let directory = directory(&[("config.json", config)]);
    let checkpoint = Checkpoint::read(directory.path(), None, None).expect("valid");
    assert_eq!(checkpoint.limits.max_model_len, 32);
}

#[test]
fn a_configured_context_may_be_shorter_but_not_longer() {
    let directory = directory(&[("config.json", STEP3_LIKE)]);
    let shorter = Checkpoint::read(directory.path(), None, Some(128)).expect("shorter");
    assert_eq!(shorter.limits.max_model_len, 128);
    let longer = Checkpoint::read(directory.path(), None, Some(65_537));
    assert!(matches!(
        longer,
        Err(CheckpointError::ContextTooLong { .. })
    ));
}

#[test]
fn a_template_file_wins_over_json_and_tokenizer_config() {
    let tokenizer_config = r#"{"chat_template": "old", "bos_token": {"content": "<s>"}}"#;
    let mut files = vec![
        ("config.json", STEP3_LIKE),
        ("tokenizer_config.json", tokenizer_config),
    ];
    let read = |files: &[(&str, &str)]| {
        Checkpoint::read(directory(files).path(), None, None).expect("valid")
    };
    assert_eq!(read(&files).chat_template.as_deref(), Some("old"));
    assert_eq!(read(&files).bos_token.as_deref(), Some("<s>"));
    files.push(("chat_template.json", r#"{"chat_template": "newer"}"#));
    assert_eq!(read(&files).chat_template.as_deref(), Some("newer"));
    files.push(("chat_template.jinja", "newest"));
    assert_eq!(read(&files).chat_template.as_deref(), Some("newest"));
}

#[test]
fn a_text_is_opened_where_the_tokenizers_config_says_so() {
    let opening = |tokenizer_config: &str| {
        let files = [
            ("config.json", STEP3_LIKE),
            ("tokenizer_config.json", tokenizer_config),
        ];
        let checkpoint = Checkpoint::read(directory(&files).path(), None, None);
        checkpoint
            .expect("valid")
            .opening_token()
            .map(str::to_owned)
    };
    let object = r#"{"add_bos_token": true, "bos_token": {"content": "<s>"}}"#;
    assert_eq!(opening(object).as_deref(), Some("<s>"));
    for without in [
        r#"{"add_bos_token": false, "bos_token": "<s>"}"#,
        r#"{"bos_token": "<s>"}"#,
        r#"{"add_bos_token": true, "bos_token": null}"#,
    ] {
        assert_eq!(opening(without), None);
    }
}

#[test]
fn missing_and_broken_files_are_named() {
    let empty = directory(&[]);
    let error = Checkpoint::read(empty.path(), None, None).expect_err("no config");
    assert!(
        error.to_string().contains("config.json cannot be read"),
        "{error}"
    );
    let broken = directory(&[("config.json", "{")]);
    let error = Checkpoint::read(broken.path(), None, None).expect_err("broken");
    assert!(
        error.to_string().contains("config.json is not usable"),
        "{error}"
    );
}
