//! Compiles `proto/` in Rust alone: no protoc on the machine is needed.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::{env, error, fs};

use protox::prost::Message;
use protox::prost_reflect::prost_types::field_descriptor_proto::{Label, Type};
use protox::prost_reflect::prost_types::{
    DescriptorProto, FieldDescriptorProto, FileDescriptorSet,
};

const PROTOS: [&str; 3] = [
    "step3rt/v1/common.proto",
    "step3rt/v1/inference_service.proto",
    "step3rt/v1/node_service.proto",
];

const PACKAGE: &str = "step3rt.v1";

/// Messages of other packages that hold no memory but their own.
const FLAT_MESSAGES: [&str; 1] = [".google.protobuf.Duration"];

fn main() -> Result<(), Box<dyn error::Error>> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("../../proto");
    println!("cargo::rerun-if-changed={}", root.display());

    let descriptors = protox::compile(PROTOS, [&root])?;
    let out_dir = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out_dir.join("step3rt.bin"), descriptors.encode_to_vec())?;
    fs::write(out_dir.join("shapes.rs"), shapes(&descriptors)?)?;
    tonic_prost_build::configure()
        .codec_path("crate::codec::BoundedCodec")
        .compile_fds(descriptors)?;
    Ok(())
}

/// A `Shape` for each message, under its name: which of its fields make the decoder allocate.
fn shapes(descriptors: &FileDescriptorSet) -> Result<String, Box<dyn error::Error>> {
    let files = descriptors.file.iter();
    let files = files.filter(|file| file.package() == PACKAGE);
    let mut text = String::new();
    for message in files.flat_map(|file| &file.message_type) {
        let mut fields = String::new();
        for field in &message.field {
            if let Some(kind) = kind_of(field, message)? {
                let (number, name) = (field.number(), field.name());
                write!(
                    fields,
                    "Field {{ number: {number}, name: {name:?}, kind: {kind} }}, "
                )?;
            }
        }
        let name = message.name();
        writeln!(
            text,
            "pub static {name}: Shape = Shape {{ fields: &[{fields}] }};"
        )?;
    }
    Ok(text)
}

/// The `Kind` of a field of `message`; `None` of one that lies within its message.
fn kind_of(
    field: &FieldDescriptorProto,
    message: &DescriptorProto,
) -> Result<Option<String>, Box<dyn error::Error>> {
    let is_repeated = field.label() == Label::Repeated;
    let scalar = match field.r#type() {
        Type::String | Type::Bytes => {
            return Ok(Some(format!("Kind::Text {{ is_repeated: {is_repeated} }}")));
        }
        Type::Message => return message_kind(field, message, is_repeated),
        Type::Bool => "Kind::Varints { size_bytes: 1 }",
        Type::Int32 | Type::Sint32 | Type::Uint32 | Type::Enum => "Kind::Varints { size_bytes: 4 }",
        Type::Int64 | Type::Sint64 | Type::Uint64 => "Kind::Varints { size_bytes: 8 }",
        Type::Float | Type::Fixed32 | Type::Sfixed32 => "Kind::Fixed { size_bytes: 4 }",
        Type::Double | Type::Fixed64 | Type::Sfixed64 => "Kind::Fixed { size_bytes: 8 }",
        Type::Group => return Err("proto3 has no groups".into()),
    };
    Ok(is_repeated.then(|| scalar.to_owned()))
}

fn message_kind(
    field: &FieldDescriptorProto,
    message: &DescriptorProto,
    is_repeated: bool,
) -> Result<Option<String>, Box<dyn error::Error>> {
    let path = field.type_name();
    if FLAT_MESSAGES.contains(&path) && !is_repeated {
        return Ok(None);
    }
    let name = path.strip_prefix(&format!(".{PACKAGE}."));
    let name = name.ok_or_else(|| format!("{path} has no shape"))?;
    if let Some(entry) = name.strip_prefix(&format!("{}.", message.name())) {
        return match (message.name(), entry) {
            // A key and a value of 4 bytes each, in a table that may be half empty.
            ("SamplingParams", "LogitBiasEntry") => {
                Ok(Some("Kind::Entries { size_bytes: 16 }".to_owned()))
            }
            _ => Err(format!("{path} is nested, and has no shape").into()),
        };
    }
    let shape = format!("shape: &{name}");
    Ok(Some(if is_repeated {
        format!("Kind::Messages {{ size_bytes: size_of::<v1::{name}>(), {shape} }}")
    } else {
        format!("Kind::Message {{ {shape} }}")
    }))
}
