//! Renders messages with the checkpoint's chat template, which is data from elsewhere: fuel and
//! output are limited, and a template can reach nothing but its arguments.
//!
//! It never has a template of its own.

use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior};
use serde_json::Value;
use thiserror::Error;

use crate::checkpoint::Checkpoint;
use crate::text::defuse::defuse;
use crate::text::media_parts::first_media_part;
use crate::text::python_json::tojson;

/// Instructions that one rendering may take. Real templates take some hundreds per message.
const FUEL: u64 = 2_000_000;
/// Most bytes of JSON in one request's messages or tools.
const MAX_JSON_BYTES: usize = 4 * 1024 * 1024;
/// Most bytes of a rendered chat: messages and tools once each, and as much again of the template's
/// own. A template that repeats a long message would fill the memory long before its fuel is out.
const MAX_RENDERED_BYTES: usize = 4 * MAX_JSON_BYTES;
/// Most bytes of a template's own words in an error. They may quote a message, and gRPC's libraries
/// drop the whole error where it has more than 8 KiB.
const MAX_REASON_BYTES: usize = 512;
const TEMPLATE_NAME: &str = "chat_template";

/// A checkpoint's chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
    special_tokens: Vec<String>,
}

/// What a chat prompt consists of.
#[derive(Clone, Copy, Debug)]
pub struct Chat<'a> {
    /// A JSON array of messages.
    pub messages_json: &'a str,
    /// A JSON array of tools, or nothing.
    pub tools_json: &'a str,
    /// Whether the assistant's turn is opened.
    pub add_generation_prompt: bool,
}

/// Why a chat is no prompt.
#[derive(Debug, Error)]
pub enum RenderError {
    /// It is not what the template takes.
    #[error("{0}")]
    Chat(String),
    /// It has something else than text.
    #[error(
        "a message has a content part of type {0:?}, and this build takes text alone. Send parts of \
         type \"text\", or one string"
    )]
    Media(&'static str),
}

impl From<String> for RenderError {
    fn from(reason: String) -> Self {
        Self::Chat(reason)
    }
}

impl ChatTemplate {
    /// Compiles the checkpoint's template; `None` if it has none. `special_tokens` are those that
    /// users' text must not forge.
    pub fn new(
        checkpoint: &Checkpoint,
        special_tokens: Vec<String>,
    ) -> Result<Option<Self>, String> {
        let Some(source) = checkpoint.chat_template.clone() else {
            return Ok(None);
        };
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL));
        // As the reference implementation renders: blocks leave no blank lines behind.
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|error| error.to_string())?;
        environment.set_syntax(syntax);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function(
            "raise_exception",
            |message: String| -> Result<String, Error> {
                Err(Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        environment.add_filter("tojson", tojson);
        environment
            .add_template_owned(TEMPLATE_NAME, source)
            .map_err(|error| error.to_string())?;
        Ok(Some(Self {
            environment,
            bos_token: checkpoint.bos_token.clone().unwrap_or_default(),
            eos_token: checkpoint.eos_token.clone().unwrap_or_default(),
            special_tokens,
        }))
    }

    /// The prompt text of `chat`, cut at every [`SEPARATOR`](crate::text::defuse::SEPARATOR); the error
    /// says what is wrong with it.
    pub fn render(&self, chat: Chat<'_>) -> Result<String, RenderError> {
        let messages = parse_list("chat.messages_json", chat.messages_json)?;
        // A template may pass over what it does not know, and the answer would be to something else.
        if let Some(kind) = first_media_part(&messages) {
            return Err(RenderError::Media(kind));
        }
        self.render_any(messages, chat).map_err(RenderError::Chat)
    }

    /// As [`ChatTemplate::render`], with what a template makes of images.
    fn render_any(&self, mut messages: Vec<Value>, chat: Chat<'_>) -> Result<String, String> {
        defuse(&mut messages, &self.special_tokens);
        if messages.is_empty() {
            return Err("chat.messages_json has no message. Send at least one".to_owned());
        }
        let tools = if chat.tools_json.is_empty() {
            Vec::new()
        } else {
            parse_list("chat.tools_json", chat.tools_json)?
        };
        let tools = (!tools.is_empty()).then_some(tools);
        let template = self
            .environment
            .get_template(TEMPLATE_NAME)
            .expect("added by the constructor");
        let context = minijinja::context! {
            messages => Serde(messages),
            tools => Serde(tools),
            add_generation_prompt => chat.add_generation_prompt,
            bos_token => self.bos_token.as_str(),
            eos_token => self.eos_token.as_str(),
        };
        let mut rendered = Rendered::default();
        let outcome = template.render_captured_to(context, &mut rendered);
        if rendered.is_too_long {
            return Err(format!(
                "the model's chat template makes more than {MAX_RENDERED_BYTES} bytes of these \
                 messages. Shorten them"
            ));
        }
        outcome.map_err(|error| {
            let error = shortened(error.to_string());
            format!(
                "the model's chat template refuses these messages: {error}. Give every message \
                 the fields that the template reads, such as role and content"
            )
        })?;
        String::from_utf8(rendered.bytes).map_err(|error| error.to_string())
    }
}

/// A template's output, refused where it exceeds [`MAX_RENDERED_BYTES`].
#[derive(Default)]
struct Rendered {
    bytes: Vec<u8>,
    is_too_long: bool,
}

impl io::Write for Rendered {
    fn write(&mut self, more: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + more.len() > MAX_RENDERED_BYTES {
            self.is_too_long = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(more);
        Ok(more.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn shortened(mut text: String) -> String {
    if text.len() > MAX_REASON_BYTES {
        text.truncate(text.floor_char_boundary(MAX_REASON_BYTES));
        text.push_str(" ...");
    }
    text
}

/// `serde_json` stops at a depth of 128 by itself.
fn parse_list(field: &str, json: &str) -> Result<Vec<Value>, String> {
    if json.len() > MAX_JSON_BYTES {
        return Err(format!(
            "{field} has {} bytes, more than {MAX_JSON_BYTES}. Shorten it",
            json.len()
        ));
    }
    let kind = match serde_json::from_str(json) {
        Ok(Value::Array(items)) => return Ok(items),
        Ok(Value::Object(_)) => "an object",
        Ok(Value::String(_)) => "a string",
        Ok(Value::Number(_)) => "a number",
        Ok(Value::Bool(_)) => "a boolean",
        Ok(Value::Null) => "null",
        Err(error) => return Err(format!("{field} is not JSON: {error}. Correct it")),
    };
    // Not serde's words, which quote the whole string.
    Err(format!("{field} is {kind}. Send a JSON array"))
}

#[cfg(test)]
mod tests {
    use step3rt_proto::generate::{ModelLimits, SamplingDefaults};

    use super::*;

    fn template(source: &str) -> ChatTemplate {
        let checkpoint = Checkpoint {
            path: "/model".into(),
            name: "m".to_owned(),
            limits: ModelLimits {
                vocab_size: 1,
                max_model_len: 1,
                eos_tokens: vec![],
                defaults: SamplingDefaults::default(),
            },
            chat_template: Some(source.to_owned()),
            bos_token: Some("<s>".to_owned()),
            eos_token: None,
            adds_bos: false,
        };
        ChatTemplate::new(&checkpoint, vec![])
            .expect("compiles")
            .expect("present")
    }

    fn render(source: &str, messages_json: &str) -> Result<String, String> {
        let rendered = template(source).render(Chat {
            messages_json,
            tools_json: "",
            add_generation_prompt: true,
        });
        rendered.map_err(|error| error.to_string())
    }

    #[test]
    fn messages_render_with_python_methods_and_trimmed_blocks() {
        let source = "{{ bos_token }}\n{% for m in messages %}\n    {% if m.role == 'user' %}\n\
            <|BOT|>{{ m['role'] }}: {{ m.content.strip() }}\n    {% endif %}\n{% endfor %}\n\
            {% if add_generation_prompt %}<|BOT|>assistant{% endif %}";
        let text = render(source, r#"[{"role": "user", "content": " hi "}]"#).expect("renders");
        assert_eq!(text, "<s>\n<|BOT|>user: hi\n<|BOT|>assistant");
    }

    /// Step-3's is one line, whose blanks beside blocks count. What Python's jinja2 3.1.6 makes of it.
    #[test]
    fn blanks_between_blocks_of_one_line_stay_as_in_step3s_template() {
        let source = "{% macro say(it) %} {% if it is string %}{{- it }}{% elif it is iterable %}\
            {% for part in it %}{{- part.text }}{% endfor %}{% endif %} {% endmacro %}\
            {% if not silent is defined %}{% set silent = false %}{% endif %}{{ bos_token }}\
            {% for m in messages %}{{ say(m['content']) }}{% endfor %}\
            {% if tools is defined and tools %}{% set ns = namespace(text='') %}\
            {% for tool in tools %}{% set ns.text = ns.text + (tool | tojson(ensure_ascii=False)) + '\\n' %}\
            {% endfor %}# {{ ns.text }}\\n{% endif %} {% if not silent %}end{% endif %}";
        let messages = r#"[{"content": "ä"}, {"content": [{"text": "b"}, {"text": "c"}]}]"#;
        assert_eq!(render(source, messages).expect("renders"), "<s> ä  bc  end");
        let chat = Chat {
            messages_json: messages,
            tools_json: r#"[{"n": 1, "é": []}, 2]"#,
            add_generation_prompt: true,
        };
        let text = template(source).render(chat).expect("renders");
        assert_eq!(text, "<s> ä  bc # {\"n\": 1, \"é\": []}\n2\n\\n end");
    }

    #[test]
    fn what_a_message_lacks_is_empty_and_json_is_as_python_writes_it() {
        let source = "{{ messages[0].name }}|{{ messages[0].a | tojson(ensure_ascii=False) }}|\
            {{ messages[0].a | tojson(indent=2) }}|{{ [1] | tojson(indent=99) }}";
        let text = render(source, r#"[{"a": {"b": [1, "<ä>"], "c": null}}]"#);
        let indented = "{\n  \"b\": [\n    1,\n    \"<ä>\"\n  ],\n  \"c\": null\n}";
        let most = format!("[\n{}1\n]", " ".repeat(16));
        let expected = format!(r#"|{{"b": [1, "<ä>"], "c": null}}|{indented}|{most}"#);
        assert_eq!(text.expect("renders"), expected);
        let error = render("{{ 1 | tojson(sort_keys=true) }}", "[1]");
        assert!(error.expect_err("not passed over").contains("sort_keys"));
    }

    #[test]
    fn messages_and_prompts_may_be_as_long_as_they_may() {
        let json = |num_bytes: usize| format!("[{}]", " ".repeat(num_bytes - 2));
        assert!(parse_list("f", &json(MAX_JSON_BYTES)).is_ok());
        let error = parse_list("f", &json(MAX_JSON_BYTES + 1)).expect_err("too long");
        assert!(error.contains("Shorten it"), "{error}");
        let mut rendered = Rendered::default();
        io::Write::write_all(&mut rendered, &vec![b'x'; MAX_RENDERED_BYTES - 1]).expect("fits");
        io::Write::write_all(&mut rendered, b"x").expect("fits");
        assert!(!rendered.is_too_long);
        assert!(io::Write::write_all(&mut rendered, b"xy").is_err());
        assert!(rendered.is_too_long);
    }

    #[test]
    fn an_endless_template_runs_out_of_fuel() {
        let source =
            "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}";
        let error = render(source, r#"[{"role": "user"}]"#).expect_err("no fuel");
        assert!(error.contains("fuel"), "{error}");
    }

    #[test]
    fn a_template_that_repeats_a_long_message_is_cut_before_it_fills_the_memory() {
        let source = "{% for a in range(9999) %}{{ messages[0].content }}{% endfor %}";
        let long = "x".repeat(MAX_RENDERED_BYTES / 8);
        let messages = format!(r#"[{{"role": "user", "content": "{long}"}}]"#);
        let error = render(source, &messages).expect_err("too long");
        assert!(error.contains("Shorten them"), "{error}");
    }

    #[test]
    fn a_template_may_refuse_and_messages_must_be_a_list() {
        let error = render("{{ raise_exception('no system') }}", "[1]").expect_err("refused");
        assert!(error.contains("no system"), "{error}");
        assert!(
            render("x", "{}")
                .expect_err("not a list")
                .contains("JSON array")
        );
        assert!(
            render("x", "[]")
                .expect_err("empty")
                .contains("at least one")
        );
        let deep = "[".repeat(100_000);
        assert!(render("x", &deep).is_err());
    }

    #[test]
    fn messages_of_another_kind_are_named_and_not_quoted() {
        let long = format!(r#""{}""#, "ä".repeat(100_000));
        for (json, expected) in [
            (long.as_str(), "is a string. Send a JSON array"),
            ("1e3", "is a number. Send a JSON array"),
            ("null", "is null. Send a JSON array"),
            ("[1,", "is not JSON: EOF while parsing"),
            ("1e999", "is not JSON: number out of range"),
        ] {
            let error = render("x", json).expect_err("no list");
            assert!(error.contains(expected), "{error}");
            assert!(error.len() < MAX_REASON_BYTES, "{} bytes", error.len());
        }
    }

    #[test]
    fn an_image_is_refused_and_not_passed_over() {
        let messages = r#"[{"content": [{"type": "image_url"}, {"type": "text", "text": "?"}]}]"#;
        let error = render("{{ messages[0].content[1].text }}", messages).expect_err("no text");
        assert!(error.contains(r#"of type "image_url""#), "{error}");
    }

    #[test]
    fn a_template_that_quotes_a_long_message_gives_a_short_error() {
        let messages = format!(r#"[{{"content": "a{}"}}]"#, "ä".repeat(100_000));
        let source = "{{ raise_exception(messages[0].content) }}";
        let error = render(source, &messages).expect_err("refused");
        assert!(error.len() < 2 * MAX_REASON_BYTES, "{} bytes", error.len());
        assert!(
            error.contains("aää") && error.ends_with("role and content"),
            "{error}"
        );
        assert!(error.contains("ä ..."), "it says that there was more");
        let longest = "x".repeat(MAX_REASON_BYTES);
        assert_eq!(shortened(longest.clone()), longest);
    }

    #[test]
    fn indentation_of_nested_lists_is_cut_before_it_fills_the_memory() {
        let depth = 100;
        let (open, close) = ("[".repeat(depth), "]".repeat(depth));
        let messages = format!("[{open}{}1{close}]", "1,".repeat(50_000));
        let error = render("{{ messages[0] | tojson(indent=4) }}", &messages);
        let error = error.expect_err("too long");
        assert!(
            error.contains("more bytes than a prompt may have"),
            "{error}"
        );
    }

    #[test]
    fn a_template_reaches_nothing_of_the_host() {
        for source in [
            "{{ ''.__class__ }}",
            "{{ cycler.__init__ }}",
            "{{ open('/etc/passwd') }}",
        ] {
            let rendered = render(source, "[1]");
            assert!(
                rendered.as_deref().unwrap_or_default().is_empty(),
                "{rendered:?}"
            );
        }
    }

    /// prompt.txt is what Python's jinja2 3.1.6 makes of the same, set up as transformers does:
    /// `trim_blocks`, `lstrip_blocks`, and `tojson` with `ensure_ascii=False`.
    #[test]
    fn the_nano_models_template_renders_as_in_python() {
        let model = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../python/step3rt/data/nano"
        );
        let checkpoint = Checkpoint::read(model.as_ref(), None, None).expect("shipped");
        let template = ChatTemplate::new(&checkpoint, vec![])
            .expect("compiles")
            .expect("present");
        let chat = Chat {
            messages_json: include_str!("../../tests/fixtures/chat/messages.json"),
            tools_json: include_str!("../../tests/fixtures/chat/tools.json"),
            add_generation_prompt: true,
        };
        let messages = parse_list("messages", chat.messages_json).expect("a list");
        let text = template.render_any(messages, chat);
        assert_eq!(
            text.expect("renders"),
            include_str!("../../tests/fixtures/chat/prompt.txt")
        );
    }
}
