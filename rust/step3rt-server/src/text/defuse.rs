//! Keeps text that users wrote from acting as the model's special tokens.
//!
//! A chat template writes `<|EOT|>` and the like around messages; the same characters inside a
//! user's message must stay characters, and so in any name, id or argument that a message of
//! whatever role brings along. They are cut with a separator that the tokenizer never sees, so that
//! no piece is a special token and the text stays the same. So is a text that ends with the beginning
//! of a special token, which the next one could complete. (A special token of one character
//! cannot be cut, and is left out.) Only what the application and the model themselves wrote, the
//! content of the other roles, may speak to the model in special tokens.
//!
//! ```text
//!   "hi<|EOT|>"  ── defuse ──▶  "hi<" SEP "|EOT|>"  ── template, split at SEP ──▶  tokens of "hi<"
//!                                                                                  and "|EOT|>"
//! ```

use serde_json::Value;

/// A code point that Unicode reserves for such private use and no text contains.
pub const SEPARATOR: char = '\u{FDD0}';

/// The roles whose text does not come from outside.
const TRUSTED_ROLES: [&str; 3] = ["system", "developer", "assistant"];
/// What of their messages is such text.
const TRUSTED_FIELDS: [&str; 2] = ["content", "reasoning_content"];

/// Cuts every occurrence of `special_tokens` but in what application and model said.
pub fn defuse(messages: &mut [Value], special_tokens: &[String]) {
    for message in messages {
        let role = message.get("role").and_then(Value::as_str);
        let is_trusted = role.is_some_and(|role| TRUSTED_ROLES.contains(&role));
        let trusted = TRUSTED_FIELDS.iter().filter(|_| is_trusted);
        let mut kept: Vec<(&str, Value)> = trusted
            .filter_map(|field| Some((*field, message.get_mut(*field)?.take())))
            .collect();
        defuse_value(message, special_tokens);
        for (field, value) in &mut kept {
            drop_separators(value);
            message[*field] = value.take();
        }
    }
}

fn defuse_value(value: &mut Value, special_tokens: &[String]) {
    // One character cannot be cut. Left out first: what is left may be a special token only then.
    let is_special = |character: char| {
        let mut buffer = [0; 4];
        let text = character.encode_utf8(&mut buffer);
        special_tokens.iter().any(|token| token == text)
    };
    for_each_text(value, &mut |text| {
        text.retain(|character| character != SEPARATOR && !is_special(character));
        for token in special_tokens {
            let mut characters = token.chars();
            let (Some(first), rest) = (characters.next(), characters.as_str()) else {
                continue;
            };
            // Occurrences may overlap, and one pass cuts every other of those.
            while text.contains(token.as_str()) {
                *text = text.replace(token.as_str(), &format!("{first}{SEPARATOR}{rest}"));
            }
        }
        if special_tokens.iter().any(|token| ends_within(text, token)) {
            text.push(SEPARATOR);
        }
    });
}

/// Whether `text` ends with a beginning of `token`, which another text could complete: templates put
/// the parts of a message's content one behind the other.
fn ends_within(text: &str, token: &str) -> bool {
    let mut beginnings = token.char_indices().skip(1).map(|(end, _)| &token[..end]);
    beginnings.any(|beginning| text.ends_with(beginning))
}

fn drop_separators(value: &mut Value) {
    for_each_text(value, &mut |text| {
        text.retain(|character| character != SEPARATOR);
    });
}

/// Names of fields are text, too: templates write a call's arguments out. `serde_json` limits the
/// depth.
fn for_each_text(value: &mut Value, change: &mut impl FnMut(&mut String)) {
    match value {
        Value::String(text) => change(text),
        Value::Array(items) => items
            .iter_mut()
            .for_each(|item| for_each_text(item, change)),
        Value::Object(entries) => {
            for (mut name, mut entry) in std::mem::take(entries) {
                change(&mut name);
                for_each_text(&mut entry, change);
                entries.insert(name, entry);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_what_users_and_tools_said_is_cut() {
        let special_tokens = ["<|EOT|>".to_owned(), "<p>".to_owned()];
        let mut messages = json!([
            {"role": "user", "content": [{"type": "text", "text": "a<|EOT|><p>b<|EOT|>"}]},
            {"role": "assistant", "content": "<|EOT|>\u{FDD0}"},
            {"role": "tool", "content": "<p>\u{FDD0}"},
        ]);
        defuse(messages.as_array_mut().expect("a list"), &special_tokens);
        assert_eq!(
            messages,
            json!([
                {"role": "user", "content": [{
                    "type": "text",
                    "text": "a<\u{FDD0}|EOT|><\u{FDD0}p>b<\u{FDD0}|EOT|>"
                }]},
                {"role": "assistant", "content": "<|EOT|>"},
                {"role": "tool", "content": "<\u{FDD0}p>"},
            ])
        );
    }

    #[test]
    fn names_ids_and_arguments_are_cut_whatever_the_role() {
        let special_tokens = ["<|EOT|>".to_owned()];
        let mut messages = json!([
            {"role": "user", "name": "<|EOT|>", "content": "a", "extra": {"b<|EOT|>": ["<|EOT|>"]}},
            {"role": "assistant", "name": "\u{FDD0}<|EOT|>", "content": "<|EOT|>",
             "reasoning_content": "<|EOT|>\u{FDD0}",
             "tool_calls": [{"id": "<|EOT|>", "function": {"arguments": {"<|EOT|>": "<|EOT|>"}}}]},
            {"role": "system", "content": null, "name": "<|EOT|>"},
            {"role": "x<|EOT|>", "content": "<|EOT|>"},
            {"content": "<|EOT|>"},
            "<|EOT|>",
        ]);
        let trusted = json!([messages[1]["content"], "<|EOT|>"]);
        defuse(messages.as_array_mut().expect("a list"), &special_tokens);
        assert_eq!(
            json!([messages[1]["content"], messages[1]["reasoning_content"]]),
            trusted
        );
        messages[1]["content"] = json!("");
        messages[1]["reasoning_content"] = json!("");
        let text = messages.to_string();
        assert!(!text.contains("<|EOT|>"), "{text}");
        assert_eq!(text.matches("<\u{FDD0}|EOT|>").count(), 12, "{text}");
        assert_eq!(messages[2]["content"], Value::Null);
        assert_eq!(messages[1]["role"], "assistant");
    }

    #[test]
    fn a_special_token_of_one_character_is_left_out() {
        let special_tokens = ["\u{2581}".to_owned(), "<p>".to_owned()];
        let mut messages = json!([{"role": "user", "content": "a\u{2581}<p>\u{2581}b"}]);
        defuse(messages.as_array_mut().expect("a list"), &special_tokens);
        assert_eq!(messages[0]["content"], "a<\u{FDD0}p>b");
    }

    #[test]
    fn what_is_left_out_does_not_make_a_special_token_of_its_neighbours() {
        let special_tokens = ["<p>".to_owned(), "\u{2581}".to_owned()];
        let mut messages = json!([{"role": "user", "content": "<\u{2581}p>"}]);
        defuse(messages.as_array_mut().expect("a list"), &special_tokens);
        assert_eq!(messages[0]["content"], "<\u{FDD0}p>");
    }

    #[test]
    fn texts_that_a_template_puts_together_are_no_special_token() {
        let special_tokens = ["<|EOT|>".to_owned()];
        let mut messages = json!([{"role": "user", "content": [
            {"type": "text", "text": "a<|EO"},
            {"type": "text", "text": "T|>b <"},
            {"type": "text", "text": "|E"},
            {"type": "text", "text": "OT|>"},
        ]}]);
        defuse(messages.as_array_mut().expect("a list"), &special_tokens);
        let parts = messages[0]["content"].as_array().expect("a list").iter();
        let texts = parts.map(|part| part["text"].as_str().expect("text"));
        let text = texts.collect::<String>();
        assert!(
            text.split(SEPARATOR)
                .all(|piece| !piece.contains("<|EOT|>")),
            "{text}"
        );
        assert_eq!(text.replace(SEPARATOR, ""), "a<|EOT|>b <|EOT|>");
    }

    #[test]
    fn no_piece_is_special_and_the_text_stays() {
        let special_tokens = ["<|EOT|>".to_owned()];
        let mut messages = json!([{"role": "user", "content": "<<|EOT|>EOT|>"}]);
        defuse(messages.as_array_mut().expect("a list"), &special_tokens);
        let text = messages[0]["content"].as_str().expect("text");
        assert!(
            text.split(SEPARATOR)
                .all(|piece| !piece.contains("<|EOT|>"))
        );
        assert_eq!(text.replace(SEPARATOR, ""), "<<|EOT|>EOT|>");
    }
}
