//! Compiles `proto/` in Rust alone: no protoc on the machine is needed.

use std::path::PathBuf;
use std::{env, error, fs};

use protox::prost::Message;

const PROTOS: [&str; 3] = [
    "step3rt/v1/common.proto",
    "step3rt/v1/inference_service.proto",
    "step3rt/v1/node_service.proto",
];

fn main() -> Result<(), Box<dyn error::Error>> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("../../proto");
    println!("cargo::rerun-if-changed={}", root.display());

    let descriptors = protox::compile(PROTOS, [&root])?;
    let out_dir = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out_dir.join("step3rt.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
