//! Text of clients on its way to tokens, and tokens of instances on their way to text.

use std::sync::{Arc, OnceLock};

use step3rt_core::ids::TokenId;

use super::{byte, folder, part};
use crate::text::continuation::{Continuation, TextRules};
use crate::text::detokenizer::Detokenizer;
use crate::text::stop_strings::StopStrings;
use crate::text::tokenizer::Tokenizer;

const PIECES: u8 = 0;
const STOPS: u8 = 1;
const CONTINUATION: u8 = 2;
const TOKENIZE: u8 = 3;

pub(super) fn run(mut data: &[u8]) {
    match byte(&mut data) {
        PIECES => pieces(data),
        STOPS => stops(data),
        CONTINUATION => continuation(data),
        TOKENIZE => tokenize(data),
        _ => {}
    }
}

/// Bytes in pieces give the text of the whole.
fn pieces(mut data: &[u8]) {
    let mut detokenizer = Detokenizer::default();
    let (mut whole, mut text) = (Vec::new(), String::new());
    while !data.is_empty() {
        let piece = part(&mut data);
        whole.extend_from_slice(piece);
        detokenizer.push(piece, &mut text);
        let all = String::from_utf8_lossy(&whole);
        assert!(all.starts_with(&text) || all.starts_with(text.trim_end_matches('\u{FFFD}')));
    }
    detokenizer.finish(&mut text);
    assert_eq!(text, String::from_utf8_lossy(&whole));
}

/// Pieces do not change which stop string is found, and nothing that one begins with is given out
/// before.
fn stops(mut data: &[u8]) {
    let flags = byte(&mut data);
    let include_stop = flags & 1 == 1;
    let stops: Vec<String> = (0..flags >> 1 & 3)
        .map(|_| lossy(part(&mut data)))
        .collect();
    let mut search = StopStrings::new(&stops);
    let (mut whole, mut text) = (String::new(), String::new());
    while !data.is_empty() {
        let piece = lossy(part(&mut data));
        whole.push_str(&piece);
        let found = search.push(&piece, include_stop, &mut text);
        let (expected, stop) = definition(&stops, &whole, include_stop);
        assert_eq!(found.as_ref().map(|found| &found.stop), stop.as_ref());
        if found.is_some() {
            return assert_eq!(text, expected);
        }
        assert!(whole.starts_with(&text));
        let held = &whole[text.len()..];
        let could_match = |stop: &String| stop.len() > held.len() && stop.starts_with(held);
        assert!(
            held.is_empty() || stops.iter().any(could_match),
            "{held:?} is held back"
        );
    }
    search.finish(&mut text);
    assert_eq!(text, whole);
}

/// On the whole text: the smallest end, then the longest stop string.
fn definition(stops: &[String], text: &str, include_stop: bool) -> (String, Option<String>) {
    for end in 1..=text.len() {
        let ends =
            |stop: &&String| !stop.is_empty() && text.as_bytes()[..end].ends_with(stop.as_bytes());
        if let Some(stop) = stops.iter().filter(ends).max_by_key(|stop| stop.len()) {
            let kept = if include_stop { end } else { end - stop.len() };
            return (text[..kept].to_owned(), Some(stop.clone()));
        }
    }
    (text.to_owned(), None)
}

/// The text of a continuation is that of its tokens, up to what ends it.
fn continuation(mut data: &[u8]) {
    let flags = byte(&mut data);
    let stop_strings = (0..flags & 3).map(|_| lossy(part(&mut data)));
    let rules = TextRules {
        tokenizer: Some(tokenizer()),
        stop_strings: stop_strings.collect(),
        include_stop: flags & 4 != 0,
        skip_special_tokens: flags & 8 != 0,
        stop_tokens: vec![TokenId(257), TokenId(u32::from(b'Z'))],
        min_tokens: u32::from(flags >> 4),
    };
    let rules = Arc::new(rules);
    let mut continuation = Continuation::new(Arc::clone(&rules));
    let (mut bytes, mut text) = (Vec::new(), String::new());
    let tokenizer = tokenizer();
    for (position, pair) in (0..).zip(data.chunks(2)) {
        // Ids up to 511, of which 259 exist.
        let high = u32::from(pair.get(1).copied().unwrap_or_default() % 2);
        let token = TokenId(high << 8 | u32::from(pair[0]));
        let ends = position >= rules.min_tokens && rules.stop_tokens.contains(&token);
        let is_skipped = rules.skip_special_tokens && tokenizer.bytes().is_special(token);
        if !(is_skipped || ends && !rules.include_stop) {
            bytes.extend_from_slice(tokenizer.bytes().get(token));
        }
        if continuation.push(position, token, &mut text).is_some() {
            break;
        }
    }
    let has_matched = continuation.has_matched();
    continuation.finish(&mut text);
    let whole = String::from_utf8_lossy(&bytes);
    let (expected, stop) = definition(&rules.stop_strings, &whole, rules.include_stop);
    if stop.is_some() == has_matched {
        assert_eq!(text, expected);
    } else {
        // What only the replacement of an unfinished character completes ends nothing any more.
        assert!(
            !has_matched && whole.ends_with('\u{FFFD}'),
            "{whole:?} as {text:?}"
        );
    }
}

/// The bytes of a text's tokens are the text.
fn tokenize(data: &[u8]) {
    let text = lossy(data);
    let tokenizer = tokenizer();
    let tokens = tokenizer.encode(&text, true).expect("text has tokens");
    let bytes = tokenizer.bytes();
    let back: Vec<u8> = tokens
        .iter()
        .flat_map(|token| bytes.get(*token))
        .copied()
        .collect();
    assert_eq!(back, text.as_bytes());
    assert!(
        tokens
            .iter()
            .all(|token| (token.0 as usize) < bytes.num_ids())
    );
    assert!(
        tokens.len() >= text.len() / bytes.longest(),
        "a prompt is refused by this bound"
    );
}

/// A vocabulary of bytes with one merge, a special token (257) and an added one (258).
pub(super) fn tokenizer() -> Arc<Tokenizer> {
    static TOKENIZER: OnceLock<Arc<Tokenizer>> = OnceLock::new();
    let read = || {
        let model = folder("rust/step3rt-server/tests/fixtures/byte_model");
        let tokenizer = Tokenizer::read(&model, None)
            .expect("usable")
            .expect("present");
        Arc::new(tokenizer)
    };
    Arc::clone(TOKENIZER.get_or_init(read))
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let parts = |parts: &[&[u8]]| {
        let parts = parts.iter().map(|part| {
            let len = u8::try_from(part.len()).expect("short");
            [&[len], *part].concat()
        });
        parts.collect::<Vec<_>>().concat()
    };
    let tokens = |text: &str| {
        let tokens = text.bytes().map(|byte| [byte, 0]);
        tokens.collect::<Vec<_>>().concat()
    };
    let special = [1, 1, 2, 1, 255, 1]; // the special token, the added one, one that does not exist
    let end = parts(&[b"END"]);
    vec![
        [
            &[PIECES][..],
            &parts(&[b"a\xF0", b"\x9F\xA6", b"\x80b", b"\xE2\x82"]),
        ]
        .concat(),
        [&[PIECES][..], &parts(&[b"\xFFa", b"\x80", b"\xED\xA0\x80"])].concat(),
        [&[STOPS, 2][..], &parts(&[b"END", b"one E", b"N", b"D two"])].concat(),
        [&[STOPS, 5][..], &parts(&[b"abcd", b"bc", b"xab", b"cd"])].concat(),
        [
            &[STOPS, 6][..],
            &parts(&[b"aab", "é".as_bytes(), b"", b"xaa", b"a"]),
        ]
        .concat(),
        [&[CONTINUATION, 9 | 1 << 4][..], &end, &tokens("a ENDb")].concat(),
        [&[CONTINUATION, 5][..], &end, &tokens("abZ"), &special].concat(),
        [&[CONTINUATION, 0][..], &tokens("naïve 🦀"), &special].concat(),
        [
            &[CONTINUATION, 1][..],
            &parts(&["\u{FFFD}".as_bytes()]),
            &tokens("a🦀")[..6],
        ]
        .concat(),
        [&[TOKENIZE][..], "he said <|EOT|> naïve 🦀\n\t".as_bytes()].concat(),
    ]
}
