//! Entries written from the specifications, bit by bit, and what the production plugins in their sandbox and the engine make of them.
//!
//! The files are `tests/vectors/*.txt`; their form is explained in the README beside them. `STAGECRAFT_VECTORS=NAME` runs one file.
#![allow(clippy::unwrap_used)]

mod vector;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use stagecraft::plugin::{Config, Engine, Plugins};
use vector::judge::{Kind, judge};
use vector::{File, Want, file};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("vectors")
}

fn files() -> Vec<File> {
    let only = std::env::var("STAGECRAFT_VECTORS").ok();
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "txt"));
    paths.retain(|path| only.as_deref().is_none_or(|only| path.file_stem().is_some_and(|stem| stem == only)));
    paths.sort();
    paths
        .iter()
        .map(|path| {
            let name = format!("tests/vectors/{}", path.file_name().unwrap().to_string_lossy());
            file::read(&name, &std::fs::read_to_string(path).unwrap()).unwrap_or_else(|error| panic!("{error:#}"))
        })
        .collect()
}

#[test]
fn every_vector_means_what_its_specification_says() {
    let plugins = Plugins::builtin(&Engine::new(Config::default()).unwrap()).unwrap();
    let (mut wrong, mut count) = (Vec::new(), 0);
    for file in files() {
        let report = judge(&file, &plugins).unwrap_or_else(|error| panic!("{}: {error:#}", file.name));
        count += report.vectors;
        println!("{}: {} vectors in {} blocks", file.name, report.vectors, file.blocks.len());
        wrong.extend(report.deviations.iter().map(|deviation| format!("{}:{}: {}", file.name, deviation.line, deviation.text)));
    }
    assert!(wrong.is_empty(), "{} deviations in {count} vectors:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn every_bit_of_every_kind_of_entry_is_flipped() {
    let plugins = Plugins::builtin(&Engine::new(Config::default()).unwrap()).unwrap();
    let mut missing = Vec::new();
    for file in files() {
        let width = file.entry_bytes * 8;
        let mut covered: BTreeSet<Kind> = BTreeSet::new();
        for block in file.blocks.iter().filter(|block| !block.part) {
            let bits = block.missing(width);
            if !bits.is_empty() {
                missing.push(format!("{}:{}: {}: bits {bits:?} are not flipped", file.name, block.line, block.title));
            }
            let kind = match block.good() {
                Want::Absent => None,
                Want::Table { .. } => Some(None),
                Want::Leaf { size_log2, .. } | Want::Part { size_log2, .. } => Some(Some(size_log2)),
                Want::Fault(_) => continue,
            };
            let tables = &file.configurations[block.configuration].tables;
            let low = tables.iter().find(|table| table.level == block.level).map(|table| table.low);
            covered.extend(low.map(|low| (block.level, low, kind)));
        }
        let kinds = judge(&file, &plugins).unwrap_or_else(|error| panic!("{}: {error:#}", file.name)).kinds;
        for (level, low, kind) in kinds.difference(&covered) {
            let kind = match kind {
                None => "absent entries".to_owned(),
                Some(None) => "tables".to_owned(),
                Some(Some(size)) => format!("leaves of 2^{size} bytes"),
            };
            missing.push(format!("{}: no block for {kind} at level {level} (2^{low} bytes an entry)", file.name));
        }
    }
    assert!(missing.is_empty(), "{} gaps:\n{}", missing.len(), missing.join("\n"));
}

#[test]
fn every_format_has_its_vectors() {
    if std::env::var_os("STAGECRAFT_VECTORS").is_some() {
        return;
    }
    let there: BTreeSet<String> = files().into_iter().map(|file| file.format).collect();
    let plugins = Plugins::builtin(&Engine::new(Config::default()).unwrap()).unwrap();
    for (manifest, _) in plugins.iter() {
        for format in &manifest.formats {
            assert!(there.contains(&format.name), "no file of vectors for {}", format.name);
        }
    }
}
