//! The protocol files against the tables of record: every RPC, field and enum value
//! of the table is in the compiled descriptors, and nothing else is.

use longshore_proto as proto;
use prost::Message;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet};
use std::collections::BTreeSet;

fn read(bytes: &[u8]) -> FileDescriptorSet {
    FileDescriptorSet::decode(bytes).unwrap()
}

fn scalar(field: &FieldDescriptorProto) -> String {
    match field.r#type() {
        Type::Message | Type::Enum => field.type_name().trim_start_matches('.').to_string(),
        other => other.as_str_name().trim_start_matches("TYPE_").to_lowercase(),
    }
}

fn rows(file: &FileDescriptorProto, out: &mut BTreeSet<String>) {
    let package = file.package();
    for service in &file.service {
        for m in &service.method {
            let stream = if m.server_streaming() { "stream " } else { "" };
            let (i, o) = (m.input_type().trim_start_matches('.'), m.output_type().trim_start_matches('.'));
            out.insert(format!("rpc\t{package}\t{}\t{}\t-\t{i} -> {stream}{o}\t-", service.name(), m.name()));
        }
    }
    for e in &file.enum_type {
        for v in &e.value {
            out.insert(format!("enum\t{package}\t{}\t{}\t{}\t-\t-", e.name(), v.name(), v.number()));
        }
    }
    for m in &file.message_type {
        message(package, "", m, out);
    }
}

fn message(package: &str, within: &str, m: &DescriptorProto, out: &mut BTreeSet<String>) {
    let name = format!("{within}{}", m.name());
    if m.field.is_empty() {
        out.insert(format!("message\t{package}\t{name}\t-\t-\t-\t-"));
    }
    for f in &m.field {
        let mut kind = scalar(f);
        if f.label() == Label::Repeated {
            kind = format!("repeated {kind}");
            let entry = m.nested_type.iter().find(|n| {
                n.options.as_ref().is_some_and(|o| o.map_entry()) && f.type_name().ends_with(&format!(".{}", n.name()))
            });
            if let Some(entry) = entry {
                kind = format!("map<{}, {}>", scalar(&entry.field[0]), scalar(&entry.field[1]));
            }
        }
        let mut oneof = match f.oneof_index {
            Some(i) => m.oneof_decl[usize::try_from(i).unwrap()].name().to_string(),
            None => "-".to_string(),
        };
        if f.options.as_ref().is_some_and(|o| o.deprecated()) {
            oneof.push_str(" deprecated");
        }
        out.insert(format!("field\t{package}\t{name}\t{}\t{}\t{kind}\t{oneof}", f.name(), f.number()));
    }
    for e in &m.enum_type {
        for v in &e.value {
            out.insert(format!("enum\t{package}\t{name}.{}\t{}\t{}\t-\t-", e.name(), v.name(), v.number()));
        }
    }
    for n in m.nested_type.iter().filter(|n| !n.options.as_ref().is_some_and(|o| o.map_entry())) {
        message(package, &format!("{name}."), n, out);
    }
}

/// The table's rows with full type names; `package` where the table leaves it out.
fn table(text: &str, package: Option<&str>) -> BTreeSet<String> {
    let known: BTreeSet<&str> = text.lines().filter_map(|l| l.split('\t').nth(1)).collect();
    text.lines()
        .filter(|l| !l.starts_with('#'))
        .map(|line| {
            let Some(package) = package else { return line.replace("\t(empty)\t", "\t-\t") };
            let mut cells: Vec<String> = line.split('\t').map(str::to_string).collect();
            let full = |t: &str| if known.contains(t) { format!("{package}.{t}") } else { t.to_string() };
            cells[4] = if cells[0] == "rpc" {
                let (i, o) = cells[4].split_once(" -> ").unwrap();
                match o.strip_prefix("stream ") {
                    Some(o) => format!("{package}.{i} -> stream {package}.{o}"),
                    None => format!("{package}.{i} -> {package}.{o}"),
                }
            } else if let Some(t) = cells[4].strip_prefix("repeated ") {
                format!("repeated {}", full(t))
            } else if let Some(t) = cells[4].strip_prefix("map<string, ").and_then(|t| t.strip_suffix('>')) {
                format!("map<string, {}>", full(t))
            } else {
                full(&cells[4])
            };
            cells.insert(1, package.to_string());
            cells.join("\t")
        })
        .collect()
}

fn compare(compiled: &BTreeSet<String>, table: &BTreeSet<String>) {
    let missing: Vec<_> = table.difference(compiled).collect();
    let extra: Vec<_> = compiled.difference(table).collect();
    assert!(missing.is_empty() && extra.is_empty(), "not compiled: {missing:#?}\nnot in the table: {extra:#?}");
}

#[test]
#[cfg(feature = "cri")]
fn cri_is_the_table() {
    let mut compiled = BTreeSet::new();
    let set = read(proto::cri::DESCRIPTORS);
    for file in set.file.iter().filter(|f| f.package() == "runtime.v1") {
        rows(file, &mut compiled);
    }
    let table = table(include_str!("cri-v1.tsv"), Some("runtime.v1"));
    assert_eq!(table.iter().filter(|r| r.starts_with("rpc")).count(), 43);
    compare(&compiled, &table);
}

#[test]
fn the_shim_wire_is_the_table() {
    let mut compiled = BTreeSet::new();
    let ours = |f: &&FileDescriptorProto| !f.package().starts_with("google.") && !f.package().starts_with("longshore.");
    for file in read(proto::SHIM_DESCRIPTORS).file.iter().filter(ours) {
        rows(file, &mut compiled);
    }
    compare(&compiled, &table(include_str!("shim-v2.tsv"), None));
}
