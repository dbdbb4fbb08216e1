//! Keeps text that users wrote from acting as the model's special tokens.
//!
//! A chat template writes `<|EOT|>` and the like around messages; the same characters inside a
//! user's message must stay characters. They are cut with a separator that the tokenizer never
//! sees, so that no piece is a special token and the text stays the same. (A special token of one
//! character cannot be cut, and is left out.)
//!
//! ```text
//!   "hi<|EOT|>"  ── defuse ──▶  "hi<" SEP "|EOT|>"  ── template, split at SEP ──▶  tokens of "hi<"
//!                                                                                  and "|EOT|>"
//! ```

use serde_json::Value;

/// A code point that Unicode reserves for such private use and no text contains.
pub const SEPARATOR: char = '\u{FDD0}';

/// The roles whose text comes from outside.
const FOREIGN_ROLES: [&str; 2] = ["user", "tool"];

/// Cuts every occurrence of `special_tokens` in what users and tools said.
pub fn defuse(messages: &mut [Value], special_tokens: &[String]) {
    for message in messages {
        let role = message.get("role").and_then(Value::as_str);
        if role.is_some_and(|role| FOREIGN_ROLES.contains(&role)) {
            if let Some(content) = message.get_mut("content") {
                defuse_value(content, special_tokens);
            }
        } else {
            drop_separators(message);
        }
    }
}

fn defuse_value(value: &mut Value, special_tokens: &[String]) {
    for_each_text(value, &mut |text| {
        text.retain(|character| character != SEPARATOR);
        for token in special_tokens {
            let mut characters = token.chars();
            let (Some(first), rest) = (characters.next(), characters.as_str()) else {
                continue;
            };
            if rest.is_empty() {
                text.retain(|character| character != first); // one character cannot be cut
                continue;
            }
            // Occurrences may overlap, and one pass cuts every other of those.
            while text.contains(token.as_str()) {
                *text = text.replace(token.as_str(), &format!("{first}{SEPARATOR}{rest}"));
            }
        }
    });
}

fn drop_separators(value: &mut Value) {
    for_each_text(value, &mut |text| {
        text.retain(|character| character != SEPARATOR);
    });
}

/// `serde_json` limits the depth.
fn for_each_text(value: &mut Value, change: &mut impl FnMut(&mut String)) {
    match value {
        Value::String(text) => change(text),
        Value::Array(items) => items
            .iter_mut()
            .for_each(|item| for_each_text(item, change)),
        Value::Object(entries) => entries
            .values_mut()
            .for_each(|entry| for_each_text(entry, change)),
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
    fn a_special_token_of_one_character_is_left_out() {
        let special_tokens = ["\u{2581}".to_owned(), "<p>".to_owned()];
        let mut messages = json!([{"role": "user", "content": "a\u{2581}<p>\u{2581}b"}]);
        defuse(messages.as_array_mut().expect("a list"), &special_tokens);
        assert_eq!(messages[0]["content"], "a<\u{FDD0}p>b");
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
