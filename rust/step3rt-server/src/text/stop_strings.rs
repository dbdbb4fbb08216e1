//! Finds stop strings in a text that comes in pieces, and holds back what may become one.
//!
//! It never sees tokens; the caller maps a match back to the token that completed it.

/// Searches one continuation's text.
///
/// Every stop string is matched with its own Knuth-Morris-Pratt automaton, so a byte costs O(1)
/// per stop string whatever the pieces are.
///
/// ```text
///   text so far   | given out | held: the longest suffix that begins a stop string |
/// ```
#[derive(Clone, Debug, Default)]
pub struct StopStrings {
    automata: Vec<Automaton>,
    held: String,
}

/// A stop string that has matched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopMatch {
    /// The stop string.
    pub stop: String,
}

#[derive(Clone, Debug)]
struct Automaton {
    stop: String,
    /// `failure[i]`: length of the longest proper border of the first `i + 1` bytes.
    failure: Vec<usize>,
    /// Bytes matched so far.
    state: usize,
}

impl StopStrings {
    /// Searches for `stops`, none of which is empty.
    pub fn new(stops: &[String]) -> Self {
        let automata = stops
            .iter()
            .filter(|stop| !stop.is_empty())
            .map(|stop| Automaton::new(stop))
            .collect();
        Self {
            automata,
            held: String::new(),
        }
    }

    /// Appends to `out` the part of `piece`, and of what was held, that no stop string can need
    /// any more. On a match the text ends before the stop string, or after it if `include_stop`;
    /// the rest of `piece` is dropped and the search is over.
    ///
    /// The match is the one that ends first; of several that end together, the longest.
    pub fn push(&mut self, piece: &str, include_stop: bool, out: &mut String) -> Option<StopMatch> {
        let num_held = self.held.len();
        self.held.push_str(piece);
        for (offset, byte) in piece.bytes().enumerate() {
            let mut longest: Option<&Automaton> = None;
            for automaton in &mut self.automata {
                automaton.advance(byte);
                let is_longer = longest.is_none_or(|best| best.stop.len() < automaton.stop.len());
                if automaton.is_matched() && is_longer {
                    longest = Some(automaton);
                }
            }
            if let Some(automaton) = longest {
                let stop = automaton.stop.clone();
                let end = num_held + offset + 1;
                let kept = if include_stop { end } else { end - stop.len() };
                out.push_str(&self.held[..kept]);
                self.held.clear();
                self.automata.clear();
                return Some(StopMatch { stop });
            }
        }
        let num_needed = self.automata.iter().map(|a| a.state).max().unwrap_or(0);
        let num_free = self.held.len() - num_needed;
        out.push_str(&self.held[..num_free]);
        self.held.drain(..num_free);
        None
    }

    /// Appends what was held when nothing more comes.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }
}

impl Automaton {
    fn new(stop: &str) -> Self {
        let bytes = stop.as_bytes();
        let mut failure = vec![0; bytes.len()];
        let mut border = 0;
        for i in 1..bytes.len() {
            while border > 0 && bytes[i] != bytes[border] {
                border = failure[border - 1];
            }
            if bytes[i] == bytes[border] {
                border += 1;
            }
            failure[i] = border;
        }
        Self {
            stop: stop.to_owned(),
            failure,
            state: 0,
        }
    }

    fn advance(&mut self, byte: u8) {
        let bytes = self.stop.as_bytes();
        while self.state > 0 && bytes[self.state] != byte {
            self.state = self.failure[self.state - 1];
        }
        if bytes[self.state] == byte {
            self.state += 1;
        }
    }

    fn is_matched(&self) -> bool {
        self.state == self.stop.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(stops: &[&str], pieces: &[&str], include_stop: bool) -> (String, Option<String>) {
        let stops: Vec<String> = stops.iter().map(|stop| (*stop).to_owned()).collect();
        let mut search = StopStrings::new(&stops);
        let mut out = String::new();
        for piece in pieces {
            if let Some(found) = search.push(piece, include_stop, &mut out) {
                return (out, Some(found.stop));
            }
        }
        search.finish(&mut out);
        (out, None)
    }

    #[test]
    fn a_stop_string_across_pieces_is_found_and_cut_off() {
        let (text, stop) = run(&["END"], &["one E", "N", "D two"], false);
        assert_eq!((text.as_str(), stop.as_deref()), ("one ", Some("END")));
        let (text, _) = run(&["END"], &["one E", "N", "D two"], true);
        assert_eq!(text, "one END");
    }

    #[test]
    fn only_what_may_become_a_stop_string_is_held() {
        let mut search = StopStrings::new(&["aab".to_owned()]);
        let mut out = String::new();
        assert_eq!(search.push("xaa", false, &mut out), None);
        assert_eq!(out, "x");
        assert_eq!(search.push("a", false, &mut out), None);
        assert_eq!(out, "xa");
        search.finish(&mut out);
        assert_eq!(out, "xaaa");
    }

    #[test]
    fn the_first_to_end_wins_and_of_those_the_longest() {
        assert_eq!(
            run(&["bc", "abc"], &["xabc"], false),
            ("x".into(), Some("abc".into()))
        );
        assert_eq!(
            run(&["abc", "bc"], &["xabc"], false),
            ("x".into(), Some("abc".into())),
            "in whatever order they are asked for"
        );
        assert_eq!(
            run(&["abcd", "bc"], &["xabcd"], false),
            ("xa".into(), Some("bc".into()))
        );
    }

    #[test]
    fn after_a_match_the_search_is_over_and_holds_nothing() {
        let mut search = StopStrings::new(&["END".to_owned()]);
        let mut out = String::new();
        let found = search.push("one END two", false, &mut out);
        assert!(found.is_some());
        search.finish(&mut out);
        assert_eq!(out, "one ");
        assert_eq!(search.push("END", false, &mut out), None);
        assert_eq!(out, "one END");
    }

    #[test]
    fn text_without_stop_strings_passes_at_once() {
        let mut search = StopStrings::new(&[]);
        let mut out = String::new();
        assert_eq!(search.push("anything", false, &mut out), None);
        assert_eq!(out, "anything");
    }

    /// The definition, on the whole text: the smallest end, then the longest stop string.
    fn oracle(stops: &[String], text: &str) -> (String, Option<String>) {
        for end in 1..=text.len() {
            let found = stops
                .iter()
                .filter(|stop| {
                    !stop.is_empty() && text.as_bytes()[..end].ends_with(stop.as_bytes())
                })
                .max_by_key(|stop| stop.len());
            if let Some(stop) = found {
                return (text[..end - stop.len()].to_owned(), Some(stop.clone()));
            }
        }
        (text.to_owned(), None)
    }

    proptest! {
        #[test]
        fn pieces_do_not_change_what_is_found(
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
            pieces in prop::collection::vec("[abé]{0,5}", 0..8),
        ) {
            let stops_ref: Vec<&str> = stops.iter().map(String::as_str).collect();
            let pieces_ref: Vec<&str> = pieces.iter().map(String::as_str).collect();
            prop_assert_eq!(run(&stops_ref, &pieces_ref, false), oracle(&stops, &pieces.concat()));
        }

        /// Long ones of two letters begin within themselves, and a mismatch falls back within them.
        #[test]
        fn stop_strings_that_overlap_themselves_are_found_where_they_are(
            stops in prop::collection::vec("[ab]{4,7}", 1..3),
            text in "[ab]{0,100}",
            cut in 0_usize..=100,
        ) {
            let stops_ref: Vec<&str> = stops.iter().map(String::as_str).collect();
            let pieces = text.split_at(cut.min(text.len()));
            let found = run(&stops_ref, &[pieces.0, pieces.1], false);
            prop_assert_eq!(found, oracle(&stops, &text));
        }
    }
}
