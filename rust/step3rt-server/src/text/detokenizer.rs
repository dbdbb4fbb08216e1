//! Token bytes to text, as they come: complete UTF-8 only, O(1) per token.
//!
//! It never looks at stop strings; [`crate::text::stop_strings`] sees its text.

/// Turns one continuation's bytes into text.
///
/// ```text
///   bytes so far   | text given out | incomplete character, at most 3 bytes |
/// ```
#[derive(Debug, Default)]
pub struct Detokenizer {
    incomplete: Vec<u8>,
}

impl Detokenizer {
    /// Appends to `text` every character that `bytes` completes. Bytes that no continuation can
    /// make valid become U+FFFD.
    pub fn push(&mut self, bytes: &[u8], text: &mut String) {
        self.incomplete.extend_from_slice(bytes);
        let mut consumed = 0;
        loop {
            match std::str::from_utf8(&self.incomplete[consumed..]) {
                Ok(valid) => {
                    text.push_str(valid);
                    consumed = self.incomplete.len();
                    break;
                }
                Err(error) => {
                    let end = consumed + error.valid_up_to();
                    text.push_str(
                        std::str::from_utf8(&self.incomplete[consumed..end])
                            .expect("from_utf8 has just found it valid"),
                    );
                    consumed = end;
                    let Some(num_invalid) = error.error_len() else {
                        break; // the rest may become a character
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    consumed += num_invalid;
                }
            }
        }
        self.incomplete.drain(..consumed);
    }

    /// Appends what is left when nothing more comes.
    pub fn finish(&mut self, text: &mut String) {
        if !self.incomplete.is_empty() {
            self.incomplete.clear();
            text.push(char::REPLACEMENT_CHARACTER);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pushed(pieces: &[&[u8]]) -> Vec<String> {
        let mut detokenizer = Detokenizer::default();
        let mut texts: Vec<String> = pieces
            .iter()
            .map(|piece| {
                let mut text = String::new();
                detokenizer.push(piece, &mut text);
                text
            })
            .collect();
        let mut rest = String::new();
        detokenizer.finish(&mut rest);
        texts.push(rest);
        texts
    }

    #[test]
    fn a_split_character_is_held_until_it_is_complete() {
        assert_eq!(
            pushed(&[b"a\xF0", b"\x9F\xA6", b"\x80b"]),
            ["a", "", "🦀b", ""]
        );
    }

    #[test]
    fn invalid_bytes_become_replacement_characters_at_once() {
        assert_eq!(pushed(&[b"\xFFa", b"\x80"]), ["\u{FFFD}a", "\u{FFFD}", ""]);
    }

    #[test]
    fn an_unfinished_character_is_replaced_at_the_end() {
        assert_eq!(pushed(&[b"\xE2\x82"]), ["", "\u{FFFD}"]);
    }

    #[test]
    fn any_split_gives_the_text_of_the_whole() {
        let bytes = "añ🦀"
            .bytes()
            .chain(*b"\xE2\x82\xFF\x80z\xF0\x9F")
            .collect::<Vec<_>>();
        let whole = String::from_utf8_lossy(&bytes).into_owned();
        for cut in 0..=bytes.len() {
            for second in cut..=bytes.len() {
                let pieces = [&bytes[..cut], &bytes[cut..second], &bytes[second..]];
                assert_eq!(pushed(&pieces).concat(), whole, "cut at {cut} and {second}");
            }
        }
    }
}
