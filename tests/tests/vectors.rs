//! Entries written from the specifications, bit by bit, and what the production plugins in their sandbox and the engine make of them.
//!
//! The files are `tests/vectors/*.txt`; their form is explained in the README beside them. `STAGECRAFT_VECTORS=NAME` runs one file.
#![allow(clippy::unwrap_used)]

mod vector;

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use stagecraft::plugin::{Config, Engine, Plugins};
use vector::judge::{Kind, judge};
use vector::{File, Want, file};

/// Leaves that a format has, whatever its plugin makes of its own accord and under which settings: the format, the level, the lowest IOVA bit of an entry there, and
/// log2 of the sizes. AMD's entries say any size between their own level's and the one above, as far as there are address bits.
const READ: [(&str, i8, u8, RangeInclusive<u8>); 6] = [
    ("amd-vi/v1", 1, 12, 12..=20),
    ("amd-vi/v1", 2, 21, 21..=29),
    ("amd-vi/v1", 3, 30, 30..=38),
    ("amd-vi/v1", 4, 39, 39..=47),
    ("amd-vi/v1", 5, 48, 48..=53),
    ("loongarch/paging", 2, 36, 36..=36),
];

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

/// A kind of entry in words.
fn words((level, low, kind): &Kind) -> String {
    let what = match kind {
        None => "absent entries".to_owned(),
        Some(None) => "tables".to_owned(),
        Some(Some(size)) => format!("leaves of 2^{size} bytes"),
    };
    format!("{what} at level {level} (2^{low} bytes an entry)")
}

#[test]
fn every_bit_of_every_kind_of_entry_is_flipped() {
    let plugins = Plugins::builtin(&Engine::new(Config::default()).unwrap()).unwrap();
    let mut missing = Vec::new();
    for file in files() {
        let width = file.entry_bytes * 8;
        let (mut flipped, mut shown): (BTreeSet<Kind>, BTreeSet<Kind>) = Default::default();
        for block in &file.blocks {
            let kind = match block.good() {
                Want::Absent => None,
                Want::Table { .. } => Some(None),
                Want::Leaf { size_log2, .. } | Want::Part { size_log2, .. } => Some(Some(size_log2)),
                Want::Fault(_) => continue,
            };
            let tables = &file.configurations[block.configuration].tables;
            let Some(low) = tables.iter().find(|table| table.level == block.level).map(|table| table.low) else { continue };
            shown.insert((block.level, low, kind));
            if block.part {
                continue;
            }
            flipped.insert((block.level, low, kind));
            let bits = block.missing(width);
            if !bits.is_empty() {
                missing.push(format!("{}:{}: {}: bits {bits:?} are not flipped", file.name, block.line, block.title));
            }
        }
        let mut kinds = judge(&file, &plugins).unwrap_or_else(|error| panic!("{}: {error:#}", file.name)).kinds;
        for (_, level, low, sizes) in READ.iter().filter(|read| read.0 == file.format) {
            kinds.extend(sizes.clone().map(|size| (*level, *low, Some(Some(size)))));
        }
        for kind in flipped.difference(&kinds) {
            missing.push(format!("{}: nothing asks for the block of {}: nobody would notice if it went", file.name, words(kind)));
        }
        // Where the entry says the size of a leaf, all such leaves of a level have the same bits.
        let says_size = |kind: &Kind| matches!(kind.2, Some(Some(size)) if size > kind.1);
        let like = |kind: &Kind| flipped.iter().any(|other| (other.0, other.1) == (kind.0, kind.1) && says_size(other));
        let covered = |kind: &Kind| flipped.contains(kind) || says_size(kind) && shown.contains(kind) && like(kind);
        missing.extend(kinds.iter().filter(|kind| !covered(kind)).map(|kind| format!("{}: no block for {}", file.name, words(kind))));
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
