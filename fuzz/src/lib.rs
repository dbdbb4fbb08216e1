//! Runs a target on an input and holds it to its allowance of memory.
//!
//! The targets are in the crates that they are about, in their modules `fuzz`.

mod corpus;
mod meter;

pub use meter::run;

/// A target: its name, and what is run on its inputs.
pub type Target = (&'static str, fn(&[u8]));

/// Defines a fuzzer of a target of a crate's module `fuzz`.
#[macro_export]
macro_rules! fuzzer {
    ($name:literal, $($module:ident)::+) => {
        fn target() -> $crate::Target {
            let mut targets = $($module)::+::TARGETS.into_iter();
            targets.find(|target| target.0 == $name).expect("the crate has it")
        }

        libfuzzer_sys::fuzz_target!(
            init: $crate::prepare(target(), $($module)::+::seeds()),
            |data: &[u8]| $crate::run(target(), data)
        );
    };
}

/// Does what the environment asks for and ends the process, or runs each seed: what a target makes once
/// is then there, and no input's fault.
pub fn prepare((name, target): Target, seeds: Vec<(&'static str, Vec<u8>)>) {
    let seeds = seeds.into_iter().filter(|seed| seed.0 == name);
    let seeds = seeds.map(|(_, seed)| seed).collect();
    if corpus::is_asked_for(name, &seeds) {
        std::process::exit(0);
    }
    seeds.iter().for_each(|seed| target(seed));
}
