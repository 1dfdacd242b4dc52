//! Tables that real Linux drivers built are found and understood exactly. STAGECRAFT_FIXTURES names the folder of snapshots; without it nothing is tested.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};

use common::{Guest, leaves, walk};
use stagecraft_plugin_arm_smmuv3::{Smmuv3, Stage1, Stage2};
use stagecraft_sdk::{Format, Outcome, Registers, Requester, TableConfig, Translated, Unit};

/// The value of `"key": ...` in a line of these files.
fn field<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let (_, rest) = line.split_once(&format!("\"{key}\": "))?;
    Some(rest.split([',', '}', ']']).next().unwrap_or(rest).trim().trim_matches('"'))
}

fn number(text: &str) -> u64 {
    text.strip_prefix("0x").map_or_else(|| text.parse().unwrap(), |hex| u64::from_str_radix(hex, 16).unwrap())
}

fn snapshots() -> Vec<PathBuf> {
    let Some(fixtures) = std::env::var_os("STAGECRAFT_FIXTURES") else {
        println!("skipped: STAGECRAFT_FIXTURES does not name a folder of snapshots");
        return Vec::new();
    };
    let folders = std::fs::read_dir(&fixtures).unwrap();
    let mut folders: Vec<PathBuf> = folders.map(|entry| entry.unwrap().path()).collect();
    folders.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("arm64-")));
    folders.sort();
    folders
}

fn load(folder: &Path) -> (Registers, Guest) {
    let text = std::fs::read_to_string(folder.join("snapshot.json")).unwrap();
    let bytes = std::fs::read(folder.join("pages.bin")).unwrap();
    let section = |from: &str, to: &str| {
        let (_, rest) = text.split_once(from).unwrap();
        rest.split_once(to).unwrap().0.to_owned()
    };
    let line = |line: &str| {
        let (name, value) = line.trim().trim_end_matches(',').split_once(": ")?;
        Some((name.trim_matches('"').to_owned(), number(value.trim_matches('"'))))
    };
    let registers = section("\"registers\": {", "}").lines().filter_map(line).collect();
    let mut guest = Guest::default();
    let pages = section("\"pages\": [", "]");
    let addresses = pages.split(',').map(|page| number(page.trim().trim_matches('"')));
    for (address, page) in addresses.zip(bytes.chunks_exact(4096)) {
        guest.page(address).copy_from_slice(page);
    }
    (registers, guest)
}

fn table(registers: &Registers, guest: &mut Guest, id: u64) -> TableConfig {
    match Smmuv3::lookup(registers, Requester { id, pasid: None }, guest).unwrap() {
        Outcome::Tables(Translated { mut tables, .. }) if tables.len() == 1 => tables.remove(0),
        other => panic!("{id:#x}: {other:?}"),
    }
}

/// Start, address, size and access.
type Run = (u64, u64, u64, String);

fn runs(format: &impl Format, guest: &Guest) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for leaf in leaves(format, guest) {
        let access = format!("{}{}", if leaf.attributes.read { "r" } else { "" }, if leaf.attributes.write { "w" } else { "" });
        match runs.last_mut() {
            Some(run) if run.0 + run.2 == leaf.iova && run.1 + run.2 == leaf.address && run.3 == access => run.2 += leaf.size,
            _ => runs.push((leaf.iova, leaf.address, leaf.size, access)),
        }
    }
    runs
}

#[test]
fn tables_hold_exactly_what_the_kernel_mapped() {
    for folder in snapshots() {
        let (registers, mut guest) = load(&folder);
        let mut expected: Vec<(u64, Vec<Run>)> = Vec::new();
        for line in std::fs::read_to_string(folder.join("expected.json")).unwrap().lines() {
            if let Some(id) = field(line, "id") {
                expected.push((number(id), Vec::new()));
            } else if let Some(iova) = field(line, "iova") {
                let get = |key| number(field(line, key).unwrap());
                let run = (number(iova), get("address"), get("size"), field(line, "access").unwrap().to_owned());
                expected.last_mut().unwrap().1.push(run);
            }
        }
        assert!(!expected.is_empty());
        for (id, expected) in expected {
            let config = table(&registers, &mut guest, id);
            let found = match config.format.as_str() {
                Stage1::NAME => runs(&Stage1::open(&config.settings).unwrap(), &guest),
                _ => runs(&Stage2::open(&config.settings).unwrap(), &guest),
            };
            let different = found.iter().zip(&expected).find(|(found, expected)| found != expected);
            assert_eq!(different, None, "{} {id:#x} {config:?}", folder.display());
            assert_eq!(found.len(), expected.len(), "{} {id:#x}", folder.display());
            println!("{} {id:#x}: {} runs, {:?}", folder.file_name().unwrap().display(), found.len(), config.settings);
        }
    }
}

#[test]
fn dma_succeeds_where_it_succeeded() {
    for folder in snapshots() {
        let Ok(text) = std::fs::read_to_string(folder.join("dma.json")) else { continue };
        let (registers, mut guest) = load(&folder);
        let (mut count, mut failed_elsewhere) = (0, 0);
        for line in text.lines().filter(|line| line.contains("\"iova\"")) {
            let config = table(&registers, &mut guest, number(field(line, "id").unwrap()));
            let iova = number(field(line, "iova").unwrap());
            let found = match config.format.as_str() {
                Stage1::NAME => walk(&Stage1::open(&config.settings).unwrap(), &guest, iova),
                _ => walk(&Stage2::open(&config.settings).unwrap(), &guest, iova),
            };
            let write = field(line, "access").unwrap() == "w";
            let succeeds = found.is_ok_and(|(_, attributes)| if write { attributes.write } else { attributes.read });
            if succeeds && field(line, "succeeds") == Some("false") {
                // A DMA can fail behind the SMMU too: one in a snapshot did, in a page that the kernel's own trace has as mapped.
                failed_elsewhere += 1;
            } else {
                assert_eq!(Some(succeeds.to_string().as_str()), field(line, "succeeds"), "{} {line}", folder.display());
            }
            count += 1;
        }
        assert!(count > 100 && failed_elsewhere <= 1, "{}: {failed_elsewhere} of {count}", folder.display());
    }
}

#[test]
fn a_plain_table_is_described_in_few_words() {
    for folder in snapshots() {
        let (registers, mut guest) = load(&folder);
        let config = table(&registers, &mut guest, 0x38);
        let names: Vec<&str> = config.settings.iter().map(|(name, _)| name).collect();
        let concatenated = folder.ends_with("arm64-s2-4k-40");
        let expected: &[&str] = if concatenated {
            &["granule", "input-bits", "output-bits", "start-level", "root"]
        } else {
            &["granule", "input-bits", "output-bits", "root"]
        };
        assert_eq!(names, expected, "{}", folder.display());
    }
}
