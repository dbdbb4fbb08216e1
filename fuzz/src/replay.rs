//! Runs each target of a crate on the committed corpus and on its own seeds, in the crate's tests.
//!
//! Part of every crate that has targets, as a module of its module `fuzz`.

use super::{TARGETS, seeds};

#[test]
fn every_input_of_the_corpus_and_every_seed_passes() {
    for (name, target) in TARGETS {
        let path = format!("{}/../../fuzz/corpus/{name}", env!("CARGO_MANIFEST_DIR"));
        let packed = std::fs::read(path).expect("a corpus is committed");
        let (mut rest, mut num_inputs) = (&packed[..], 0);
        while let Some((len, more)) = rest.split_first_chunk() {
            let (input, more) = more.split_at(u16::from_be_bytes(*len).into());
            target(input);
            num_inputs += 1;
            rest = more;
        }
        assert!(num_inputs > 0);
        for (_, seed) in seeds().into_iter().filter(|seed| seed.0 == name) {
            target(&seed);
        }
    }
}
