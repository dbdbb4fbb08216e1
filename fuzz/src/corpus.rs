//! A target's corpus as one file: inputs, each behind its length in two bytes, the higher first.
//!
//! `run` asks for what is done here through the environment.

use std::fs;
use std::path::Path;

/// Whether the environment asked for something, which is then done.
pub(crate) fn is_asked_for(name: &str, seeds: &Vec<Vec<u8>>) -> bool {
    let file = format!("corpus/{name}");
    if let Some(folder) = std::env::var_os("STEP3RT_FUZZ_SEEDS") {
        write(folder.as_ref(), "seed", seeds);
    } else if let Some(folder) = std::env::var_os("STEP3RT_FUZZ_UNPACK") {
        write(folder.as_ref(), "input", &unpack(Path::new(&file)));
    } else if let Some(folder) = std::env::var_os("STEP3RT_FUZZ_PACK") {
        fs::write(file, pack(folder.as_ref())).expect("the corpus can be written");
    } else {
        return false;
    }
    true
}

fn write(folder: &Path, prefix: &str, inputs: &[Vec<u8>]) {
    for (number, input) in inputs.iter().enumerate() {
        let path = folder.join(format!("{prefix}-{number:04}"));
        fs::write(path, input).expect("the folder can be written");
    }
}

fn unpack(file: &Path) -> Vec<Vec<u8>> {
    // There is none before the first.
    let bytes = fs::read(file).unwrap_or_default();
    let (mut rest, mut inputs) = (&bytes[..], Vec::new());
    while let Some((len, more)) = rest.split_first_chunk() {
        let (input, more) = more.split_at(u16::from_be_bytes(*len).into());
        inputs.push(input.to_vec());
        rest = more;
    }
    inputs
}

fn pack(folder: &Path) -> Vec<u8> {
    let files = fs::read_dir(folder).expect("the folder can be read");
    let files = files.map(|file| fs::read(file.expect("it can be listed").path()));
    let mut inputs: Vec<_> = files.map(|input| input.expect("it can be read")).collect();
    inputs.sort_by(|a, b| (a.len(), a).cmp(&(b.len(), b)));
    inputs.dedup();
    let mut packed = Vec::new();
    for input in inputs {
        let len = u16::try_from(input.len()).expect("`run` limits it");
        packed.extend(len.to_be_bytes());
        packed.extend(input);
    }
    packed
}
