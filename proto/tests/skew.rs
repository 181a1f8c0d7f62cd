//! Version skew: the protocol of each recorded version stays part of the current one, so that programs of both versions
//! understand each other (docs/upgrading.md).
//!
//! Every folder in `versions` contains `schema.txt`, one line per field, enum value and call, and `frames.txt`, messages with
//! all fields set. `SWITCHTOWER_RECORD=VERSION cargo test -p switchtower-proto --test skew` records the current protocol;
//! do this for each release, and never change a recorded version.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test ends where something it needs is missing")]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use prost::Message;
use protox::prost_reflect::{
    Cardinality, DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, Value,
};
use switchtower_proto::v1;

const PACKAGE: &str = "switchtower.v1";
/// Messages that are encoded by themselves: those of the stream and between replicas, the contents of a part and of an
/// answer, and what digests cover.
const FRAMES: [&str; 8] = [
    "AgentMessage",
    "ControllerMessage",
    "Segment",
    "Buckets",
    "Item",
    "KernelTable",
    "ReplicaRequest",
    "ReplicaResponse",
];
/// Combinations of alternatives that are tried; more than the product of the largest nested oneofs.
const ALTERNATIVES: usize = 200;
/// Maximum depth of a frame.
const DEPTH: usize = 8;

fn versions() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/versions")
}

fn pool() -> DescriptorPool {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto");
    let mut compiler = protox::Compiler::new([&root]).unwrap();
    compiler.open_file("switchtower/v1/fleet.proto").unwrap();
    compiler.descriptor_pool()
}

fn kind(field: &FieldDescriptor) -> String {
    match field.kind() {
        Kind::Message(message) => message.name().to_owned(),
        Kind::Enum(values) => values.name().to_owned(),
        scalar => format!("{scalar:?}").to_lowercase(),
    }
}

/// One line per field, enum value and call, with all that a peer relies on.
fn schema(pool: &DescriptorPool) -> BTreeSet<String> {
    let mut lines = BTreeSet::new();
    for message in pool.all_messages().filter(|message| message.package_name() == PACKAGE) {
        for field in message.fields() {
            let repeated = if field.cardinality() == Cardinality::Repeated { "repeated " } else { "" };
            let oneof = field.containing_oneof().filter(|_| !is_optional(&field));
            let oneof = oneof.map_or(String::new(), |oneof| format!(" in {}", oneof.name()));
            let optional = if is_optional(&field) { "optional " } else { "" };
            lines.insert(format!(
                "{}.{} = {} {repeated}{optional}{}{oneof}",
                message.name(),
                field.name(),
                field.number(),
                kind(&field)
            ));
        }
    }
    for values in pool.all_enums().filter(|values| values.package_name() == PACKAGE) {
        lines.extend(values.values().map(|value| format!("{} = {}", value.name(), value.number())));
    }
    for service in pool.services() {
        for method in service.methods() {
            let stream = |streaming: bool| if streaming { "stream " } else { "" };
            lines.insert(format!(
                "rpc {}({}{}) returns ({}{})",
                method.full_name(),
                stream(method.is_client_streaming()),
                method.input().name(),
                stream(method.is_server_streaming()),
                method.output().name()
            ));
        }
    }
    lines
}

/// A field with the keyword `optional`: its oneof is synthetic.
fn is_optional(field: &FieldDescriptor) -> bool {
    field.field_descriptor_proto().proto3_optional()
}

/// A message with all fields set, and of each oneof the alternative of this number.
fn filled(message: &MessageDescriptor, alternative: usize, depth: usize) -> DynamicMessage {
    let mut filled = DynamicMessage::new(message.clone());
    // So that every alternative of a nested oneof occurs with every one of this message.
    let alternatives: usize = message.oneofs().map(|oneof| oneof.fields().count()).product();
    for field in message.fields() {
        let oneof = field.containing_oneof().filter(|_| !is_optional(&field));
        let chosen = oneof.is_none_or(|oneof| {
            let all: Vec<_> = oneof.fields().map(|field| field.number()).collect();
            all.get(alternative % all.len()) == Some(&field.number())
        });
        if !chosen || (depth == 0 && matches!(field.kind(), Kind::Message(_))) {
            continue;
        }
        let value = value(&field, alternative / alternatives, depth);
        filled
            .set_field(&field, if field.is_list() { Value::List(vec![value.clone(), value]) } else { value });
    }
    filled
}

/// A value that would change if the type became narrower.
fn value(field: &FieldDescriptor, alternative: usize, depth: usize) -> Value {
    let number = field.number();
    match field.kind() {
        Kind::Bool => Value::Bool(true),
        Kind::Double => Value::F64(0.5 + f64::from(number)),
        Kind::Float => Value::F32(0.5),
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => Value::I32(-(1 << 30)),
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => Value::I64(-(1 << 60) - i64::from(number)),
        Kind::Uint32 | Kind::Fixed32 => Value::U32((1 << 31) + number),
        Kind::Uint64 | Kind::Fixed64 => Value::U64((1 << 63) + u64::from(number)),
        Kind::String => Value::String(format!("{}-{number}", field.name())),
        Kind::Bytes => Value::Bytes(vec![u8::try_from(number % 256).unwrap(); 16].into()),
        Kind::Enum(values) => Value::EnumNumber(values.values().last().unwrap().number()),
        Kind::Message(message) => Value::Message(filled(&message, alternative, depth - 1)),
    }
}

/// Frames that together contain every alternative of every oneof.
fn frames(pool: &DescriptorPool) -> String {
    let mut text = String::new();
    let mut seen = BTreeSet::new();
    for name in FRAMES {
        let message = pool.get_message_by_name(&format!("{PACKAGE}.{name}")).unwrap();
        for alternative in 0..ALTERNATIVES {
            let bytes = filled(&message, alternative, DEPTH).encode_to_vec();
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            if seen.insert((name, hex.clone())) {
                writeln!(text, "{name} {hex}").unwrap();
            }
        }
    }
    text
}

fn bytes_of(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

/// Decodes and encodes a frame with the generated code, as the programs do.
fn through_generated_code(name: &str, bytes: &[u8]) -> Vec<u8> {
    fn again<M: Message + Default>(bytes: &[u8]) -> Vec<u8> {
        M::decode(bytes).unwrap().encode_to_vec()
    }
    match name {
        "AgentMessage" => again::<v1::AgentMessage>(bytes),
        "ControllerMessage" => again::<v1::ControllerMessage>(bytes),
        "Segment" => again::<v1::Segment>(bytes),
        "Buckets" => again::<v1::Buckets>(bytes),
        "Item" => again::<v1::Item>(bytes),
        "KernelTable" => again::<v1::KernelTable>(bytes),
        "ReplicaRequest" => again::<v1::ReplicaRequest>(bytes),
        "ReplicaResponse" => again::<v1::ReplicaResponse>(bytes),
        other => panic!("{other} is no frame"),
    }
}

fn recorded() -> Vec<PathBuf> {
    let pool = pool();
    if let Some(version) = std::env::var_os("SWITCHTOWER_RECORD") {
        let folder = versions().join(version);
        fs::create_dir_all(&folder).unwrap();
        let lines: String = schema(&pool).iter().map(|line| format!("{line}\n")).collect();
        fs::write(folder.join("schema.txt"), lines).unwrap();
        fs::write(folder.join("frames.txt"), frames(&pool)).unwrap();
    }
    let folders: Vec<_> = fs::read_dir(versions()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(!folders.is_empty());
    folders
}

#[test]
fn schema_contains_every_recorded_version() {
    let current = schema(&pool());
    for folder in recorded() {
        let text = fs::read_to_string(folder.join("schema.txt")).unwrap();
        let missing: Vec<_> = text.lines().filter(|line| !current.contains(*line)).collect();
        assert!(missing.is_empty(), "{}: removed or changed: {missing:#?}", folder.display());
    }
}

#[test]
fn recorded_frames_keep_every_field() {
    for folder in recorded() {
        let text = fs::read_to_string(folder.join("frames.txt")).unwrap();
        assert!(text.lines().count() > 20, "{}", folder.display());
        for line in text.lines() {
            let (name, hex) = line.split_once(' ').unwrap();
            let bytes = bytes_of(hex);
            let again = through_generated_code(name, &bytes);
            assert!(bytes == again, "{}: a {name} loses fields: {hex}", folder.display());
        }
    }
}

#[test]
fn frames_contain_every_field_of_the_protocol() {
    let pool = pool();
    let mut reached = BTreeSet::new();
    for line in frames(&pool).lines() {
        let (name, hex) = line.split_once(' ').unwrap();
        let message = pool.get_message_by_name(&format!("{PACKAGE}.{name}")).unwrap();
        collect(&DynamicMessage::decode(message, bytes_of(hex).as_slice()).unwrap(), &mut reached);
    }
    let all = pool.all_messages().filter(|message| message.package_name() == PACKAGE);
    let all = all
        .flat_map(|message| message.fields().map(|field| field.full_name().to_owned()).collect::<Vec<_>>());
    let missing: Vec<_> = all.filter(|field| !reached.contains(field)).collect();
    assert!(missing.is_empty(), "{missing:#?}");
}

fn collect(message: &DynamicMessage, reached: &mut BTreeSet<String>) {
    for (field, value) in message.fields() {
        reached.insert(field.full_name().to_owned());
        let values = match value {
            Value::List(values) => values.clone(),
            value => vec![value.clone()],
        };
        for value in values {
            if let Value::Message(message) = value {
                collect(&message, reached);
            }
        }
    }
}
