//! The text of one continuation: its tokens through detokenizer and stop strings.
//!
//! It never sends anything; [`crate::response_stream`] does.

use std::sync::Arc;

use step3rt_core::ids::TokenId;

use crate::text::detokenizer::Detokenizer;
use crate::text::stop_strings::{StopMatch, StopStrings};
use crate::text::tokenizer::Tokenizer;

/// What is the same for all continuations of a request.
#[derive(Clone)]
pub struct TextRules {
    /// Without one there is no text, and no stop string.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// Strings that end the text.
    pub stop_strings: Vec<String>,
    /// Whether whatever ended the text is part of it.
    pub include_stop: bool,
    /// Whether markers are left out.
    pub skip_special_tokens: bool,
    /// Ids that end a continuation.
    pub stop_tokens: Vec<TokenId>,
    /// Positions below this do not end it.
    pub min_tokens: u32,
}

/// One continuation's text so far.
pub struct Continuation {
    rules: Arc<TextRules>,
    detokenizer: Detokenizer,
    search: StopStrings,
    has_matched: bool,
}

impl Continuation {
    /// Before the first token.
    pub fn new(rules: Arc<TextRules>) -> Self {
        let search = StopStrings::new(&rules.stop_strings);
        Self {
            rules,
            detokenizer: Detokenizer::default(),
            search,
            has_matched: false,
        }
    }

    /// Whether a stop string has matched: what comes now is not wanted.
    pub fn has_matched(&self) -> bool {
        self.has_matched
    }

    /// Appends to `text` what the token at `position` completes. A match says that the
    /// continuation ends with this token.
    pub fn push(&mut self, position: u32, token: TokenId, text: &mut String) -> Option<StopMatch> {
        let tokenizer = self.rules.tokenizer.as_deref()?;
        let rules = &self.rules;
        let is_stop = position >= rules.min_tokens && rules.stop_tokens.contains(&token);
        let bytes = tokenizer.bytes();
        if (is_stop && !rules.include_stop)
            || (rules.skip_special_tokens && bytes.is_special(token))
        {
            return None;
        }
        let mut piece = String::new();
        self.detokenizer.push(bytes.get(token), &mut piece);
        let found = self.search.push(&piece, rules.include_stop, text);
        self.has_matched |= found.is_some();
        found
    }

    /// Appends to `text` what was held back, when nothing more comes.
    pub fn finish(&mut self, text: &mut String) {
        if self.has_matched {
            return;
        }
        let mut piece = String::new();
        self.detokenizer.finish(&mut piece);
        // A match here could only cut what has already ended.
        let found = self.search.push(&piece, true, text);
        if found.is_none() {
            self.search.finish(text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::tests::byte_tokenizer;

    const EOT: TokenId = TokenId(257);

    fn rules(stops: &[&str]) -> TextRules {
        TextRules {
            tokenizer: Some(Arc::new(byte_tokenizer())),
            stop_strings: stops.iter().map(|stop| (*stop).to_owned()).collect(),
            include_stop: false,
            skip_special_tokens: true,
            stop_tokens: vec![EOT, TokenId(u32::from(b'Z'))],
            min_tokens: 1,
        }
    }

    fn run(rules: TextRules, tokens: &[TokenId]) -> (String, Option<usize>) {
        let mut continuation = Continuation::new(Arc::new(rules));
        let mut text = String::new();
        for (position, token) in tokens.iter().enumerate() {
            let position_u32 = u32::try_from(position).expect("short");
            if continuation.push(position_u32, *token, &mut text).is_some() {
                return (text, Some(position));
            }
        }
        continuation.finish(&mut text);
        (text, None)
    }

    fn bytes(text: &str) -> Vec<TokenId> {
        text.bytes().map(|byte| TokenId(byte.into())).collect()
    }

    #[test]
    fn a_stop_string_matches_across_tokens_at_the_token_that_completes_it() {
        assert_eq!(
            run(rules(&["END"]), &bytes("a ENDb")),
            ("a ".to_owned(), Some(4))
        );
    }

    #[test]
    fn a_stop_id_has_no_text_unless_it_is_asked_for() {
        let tokens = bytes("abZ");
        assert_eq!(run(rules(&[]), &tokens).0, "ab");
        let with_stop = TextRules {
            include_stop: true,
            ..rules(&[])
        };
        assert_eq!(run(with_stop, &tokens).0, "abZ");
        // Before min_tokens a stop id is a token like any other.
        assert_eq!(run(rules(&[]), &bytes("Z")).0, "Z");
    }

    #[test]
    fn special_tokens_are_text_only_when_they_are_not_skipped() {
        let tokens = [TokenId(u32::from(b'a')), EOT];
        let shown = TextRules {
            include_stop: true,
            skip_special_tokens: false,
            ..rules(&[])
        };
        assert_eq!(run(shown, &tokens).0, "a<|EOT|>");
        let skipped = TextRules {
            include_stop: true,
            ..rules(&[])
        };
        assert_eq!(run(skipped, &tokens).0, "a");
    }

    #[test]
    fn held_text_comes_out_at_the_end() {
        assert_eq!(run(rules(&["END"]), &bytes("a EN")).0, "a EN");
        let mut cut = bytes("aé");
        cut.pop();
        assert_eq!(run(rules(&[]), &cut).0, "a\u{FFFD}");
    }

    #[test]
    fn nothing_follows_a_match_and_a_match_at_the_end_cuts_nothing() {
        let mut continuation = Continuation::new(Arc::new(rules(&["END"])));
        let mut text = String::new();
        for (position, token) in (0..).zip(bytes("aEND")) {
            continuation.push(position, token, &mut text);
        }
        assert!(continuation.has_matched());
        continuation.finish(&mut text);
        assert_eq!(text, "a");
        // The character that the end leaves incomplete completes a stop string.
        let mut cut = bytes("xé");
        cut.pop();
        assert_eq!(run(rules(&["x\u{FFFD}"]), &cut).0, "x\u{FFFD}");
    }

    #[test]
    fn without_a_tokenizer_there_is_no_text() {
        let silent = TextRules {
            tokenizer: None,
            ..rules(&[])
        };
        assert_eq!(run(silent, &bytes("abc")), (String::new(), None));
    }
}
