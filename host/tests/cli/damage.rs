//! `validate` on a table of every format in which one entry is damaged: the path to it, the bits, the section, the severity and the exit status.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::{folder, hex, run};

/// What one flipped bit is expected to cause.
struct Damage {
    /// Counted from the root's entry, or the leaf's.
    at: At,
    flip: u64,
    kind: &'static str,
    bits: u64,
    section: &'static str,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    Root,
    Leaf,
}

/// How tables of a format are read here, which is all that is known of it: written from the specification.
struct Case {
    format: &'static str,
    settings: &'static [&'static str],
    bytes: u64,
    big_endian: bool,
    /// Lowest IOVA bit and number of bits of each level's index, the root's first.
    levels: &'static [(u32, u32)],
    next: fn(u64) -> u64,
    /// Whether an entry that is not in the last level is a leaf.
    is_leaf: fn(u64) -> bool,
    error: Option<Damage>,
    warning: Option<Damage>,
}

const fn field(high: u32, low: u32) -> u64 {
    (u64::MAX >> (63 - high)) & (u64::MAX << low)
}

const fn damage(at: At, flip: u64, kind: &'static str, section: &'static str) -> Option<Damage> {
    Some(Damage { at, flip, kind, bits: flip, section })
}

const FOUR: &[(u32, u32)] = &[(39, 9), (30, 9), (21, 9), (12, 9)];

fn cases() -> Vec<Case> {
    let in_place: fn(u64) -> u64 = |entry| entry & field(51, 12);
    let page_size_bit: fn(u64) -> bool = |entry| entry & 1 << 7 != 0;
    let case = |format, settings, error, warning| Case {
        format,
        settings,
        bytes: 8,
        big_endian: false,
        levels: FOUR,
        next: in_place,
        is_leaf: page_size_bit,
        error,
        warning,
    };
    let arm: fn(u64) -> u64 = |entry| entry & field(47, 12);
    let block: fn(u64) -> bool = |entry| entry & 2 == 0;
    let flag = || damage(At::Leaf, 1 << 10, "access-flag", "DDI 0487 section D8.5.1");
    let page_number: fn(u64) -> u64 = |entry| (entry & field(53, 10)) << 2;
    let readable: fn(u64) -> bool = |entry| entry & 0xe != 0;
    let riscv = || damage(At::Leaf, 1 << 54, "reserved", "RISC-V Privileged 1.12 section 4.4.1");
    vec![
        Case {
            next: arm,
            is_leaf: block,
            ..case("arm-smmuv3/stage1", &["input-bits=48"], flag(), damage(At::Leaf, 1 << 48, "reserved", "DDI 0487 section D8.3.1"))
        },
        Case {
            next: arm,
            is_leaf: block,
            ..case("arm-smmuv3/stage2", &["input-bits=48"], flag(), damage(At::Root, 1 << 59, "reserved", "DDI 0487 section D8.3.1.1"))
        },
        case("intel-vtd/first-stage", &["levels=4"], damage(At::Root, 1 << 7, "reserved", "D51397 section 9.7"), None),
        case("intel-vtd/second-stage", &["levels=4"], damage(At::Leaf, 1 << 62, "reserved", "D51397 section 9.8"), None),
        Case {
            is_leaf: |entry| matches!(entry >> 9 & 7, 0 | 7),
            ..case("amd-vi/v1", &["levels=4"], damage(At::Leaf, 1 << 52, "reserved", "48882 section 2.2.3"), None)
        },
        case("amd-vi/v2", &["levels=4"], damage(At::Root, 1 << 7, "reserved", "24593 section 5.3.3"), None),
        Case { next: page_number, is_leaf: readable, ..case("riscv-iommu/first-stage", &["levels=4"], riscv(), None) },
        Case {
            next: page_number,
            is_leaf: readable,
            levels: &[(39, 11), (30, 9), (21, 9), (12, 9)],
            ..case("riscv-iommu/second-stage", &["levels=4"], riscv(), damage(At::Leaf, 1 << 5, "reserved", "RISC-V Privileged 1.12 section 8.5.1"))
        },
        Case {
            big_endian: true,
            levels: &[(31, 11), (20, 11), (12, 8)],
            // The table that a segment-table entry points to is aligned to 2 KiB, all others to more.
            next: |entry| entry & !0x7ff,
            is_leaf: |entry| entry & 1 << 10 != 0,
            // The type of a region-third entry is 1: 3 is a region-first one's. All of the field is named.
            error: Some(Damage { at: At::Root, flip: 1 << 3, kind: "reserved", bits: 3 << 2, section: "SA22-7832 chapter 3, region-table entries" }),
            ..case("s390-zpci/dma", &["levels=3"], None, damage(At::Leaf, 1 << 11, "reserved", "SA22-7832 chapter 3, page-table entries"))
        },
        Case {
            next: arm,
            is_leaf: |entry| entry & 1 << 6 != 0,
            // Below the address of a table.
            error: damage(At::Root, 1 << 3, "reserved", "LoongArch volume 1 section 5.4.5"),
            ..case("loongarch/paging", &["granule=4096", "levels=4"], None, damage(At::Leaf, 1 << 48, "reserved", "LoongArch volume 1 section 5.4.5"))
        },
        Case {
            levels: &[(30, 9), (21, 9), (12, 9)],
            next: |entry| entry & field(35, 12),
            is_leaf: |_| false,
            ..case(
                "apple-dart/dart1",
                &["granule=4096", "levels=3", "input-bits=39"],
                None,
                damage(At::Leaf, 1 << 2, "reserved", "Linux, Apple DART page tables"),
            )
        },
        Case {
            levels: &[(25, 11), (14, 11)],
            next: |entry| (entry & field(37, 10)) << 4,
            is_leaf: |_| false,
            ..case("apple-dart/dart2", &["levels=2"], None, damage(At::Leaf, 1 << 4, "reserved", "Linux, Apple DART page tables"))
        },
        Case {
            bytes: 4,
            levels: &[(20, 12), (12, 8)],
            next: |entry| entry & !0x3ff,
            is_leaf: |entry| entry & 2 != 0,
            ..case(
                "arm-v7s/short",
                &[],
                damage(At::Leaf, 1 << 4, "access-flag", "DDI 0406 section B3.7.1"),
                damage(At::Root, 1 << 4, "reserved", "DDI 0406 section B3.5.1"),
            )
        },
    ]
}

/// A converted snapshot whose pages can be changed.
struct Converted {
    path: PathBuf,
    json: Value,
    pages: Vec<u8>,
}

/// A step of a walk: address of the table, index, entry.
type Step = (u64, u64, u64);

impl Converted {
    fn new(test: &str, case: &Case) -> Self {
        let path = folder(&format!("damage-{test}-{}", case.format.replace('/', "-"))).join("out");
        let out = path.to_str().unwrap();
        let mut arguments = vec!["convert", "arm64-s1-4k", "--to", case.format, "--out", out];
        arguments.extend(case.settings.iter().flat_map(|setting| ["--set", setting]));
        run(&arguments).good();
        let json = serde_json::from_slice(&fs::read(path.join("snapshot.json")).unwrap()).unwrap();
        Self { json, pages: fs::read(path.join("pages.bin")).unwrap(), path }
    }

    fn place(&self, address: u64) -> usize {
        let pages = self.json["pages"].as_array().unwrap();
        let index = pages.iter().position(|page| hex(page) == address & !0xfff).unwrap_or_else(|| panic!("no page at {address:#x}"));
        index * 4096 + (address & 0xfff) as usize
    }

    fn entry(&self, case: &Case, address: u64) -> u64 {
        let place = self.place(address);
        let mut bytes = [0; 8];
        bytes[..case.bytes as usize].copy_from_slice(&self.pages[place..place + case.bytes as usize]);
        if case.big_endian { u64::from_be_bytes(bytes) } else { u64::from_le_bytes(bytes) }
    }

    fn flip(&mut self, case: &Case, address: u64, bits: u64) {
        let place = self.place(address);
        let bytes = if case.big_endian { bits.to_be_bytes() } else { bits.to_le_bytes() };
        self.pages[place..].iter_mut().zip(&bytes[..case.bytes as usize]).for_each(|(byte, flip)| *byte ^= flip);
        fs::write(self.path.join("pages.bin"), &self.pages).unwrap();
    }

    /// The way to a leaf of `iova` of the table at `root`.
    fn walk(&self, case: &Case, root: u64, iova: u64) -> Vec<Step> {
        let (mut table, mut steps) = (root, Vec::new());
        for (depth, (lsb, bits)) in case.levels.iter().enumerate() {
            let index = iova >> lsb & ((1 << bits) - 1);
            let entry = self.entry(case, table + index * case.bytes);
            steps.push((table, index, entry));
            if depth + 1 < case.levels.len() && (case.is_leaf)(entry) {
                break;
            }
            table = (case.next)(entry);
        }
        steps
    }
}

/// The smallest mapping: device, root, IOVA.
fn small_mapping(path: &Path) -> (String, u64, u64) {
    let report = run(&["inspect", path.to_str().unwrap(), "--format", "json"]).good().json();
    let streams = report["streams"].as_array().unwrap();
    let mappings = streams.iter().flat_map(|stream| stream["mappings"].as_array().unwrap().iter().map(move |mapping| (stream, mapping)));
    let (stream, mapping) = mappings.min_by_key(|(_, mapping)| mapping["size"].as_u64()).expect("a device with a mapping");
    (stream["id"].as_str().unwrap().to_owned(), hex(&stream["tables"][0]["root"]), hex(&mapping["iova"]))
}

fn check(case: &Case, damage: &Damage, severity: &str) {
    let mut converted = Converted::new(severity, case);
    let path = converted.path.to_str().unwrap().to_owned();
    let validate = |more: &[&str]| run(&[&["validate", &path, "--format", "json"], more].concat());
    let before = validate(&["--strict"]).good().json();
    assert_eq!((&before["errors"], &before["warnings"]), (&Value::from(0), &Value::from(0)), "{}", case.format);

    let (id, root, iova) = small_mapping(&converted.path);
    let steps = converted.walk(case, root, iova);
    let steps = if damage.at == At::Root { &steps[..1] } else { &steps[..] };
    let (table, index, entry) = *steps.last().unwrap();
    converted.flip(case, table + index * case.bytes, damage.flip);

    let found = validate(&[]);
    let is_error = severity == "error";
    assert_eq!((found.status, &*found.stderr), (i32::from(is_error), ""), "{} {severity}", case.format);
    let report = found.json();
    let of_this = |violation: &&Value| violation["severity"] == severity && violation["entry"] == format!("{:#x}", entry ^ damage.flip);
    let violations: Vec<&Value> = report["violations"].as_array().unwrap().iter().collect();
    let violation = violations.iter().copied().find(of_this).unwrap_or_else(|| panic!("{} {severity}: {report:#}", case.format));
    assert_eq!((&violation["kind"], &violation["section"]), (&Value::from(damage.kind), &Value::from(damage.section)), "{}", case.format);
    assert_eq!(violation["bits"], format!("{:#x}", damage.bits), "{}: {violation:#}", case.format);
    let path_found: Vec<(u64, u64)> =
        violation["path"].as_array().unwrap().iter().map(|step| (hex(&step["table"]), step["index"].as_u64().unwrap())).collect();
    assert_eq!(path_found, steps.iter().map(|(table, index, _)| (*table, *index)).collect::<Vec<_>>(), "{}", case.format);
    let mut users = vec![violation["id"].as_str().unwrap()];
    users.extend(violation["shared"].as_array().unwrap().iter().filter_map(|stream| stream["id"].as_str()));
    assert!(users.contains(&&*id), "{}: {violation:#}", case.format);
    let reason = violation["reason"].as_str().unwrap();
    assert!(!reason.is_empty() && !reason.starts_with(char::is_uppercase) || reason.starts_with("AP"), "{reason}");
    assert_eq!(violations.iter().filter(|violation| violation["severity"] == "error").count() > 0, is_error, "{report:#}");

    assert_eq!(validate(&["--strict"]).status, 1, "{} {severity}", case.format);
    // And as people see it.
    let human = run(&["validate", &path]);
    let line = format!("{severity}: {}", damage.kind);
    assert!(human.stdout.contains(&line) && human.stdout.contains(damage.section) && human.stdout.contains(reason), "{}", human.stdout);
    assert!(human.stdout.contains(&format!("bits {:#018x} of the entry", damage.bits)), "{}", human.stdout);
}

/// A leaf of an AMD table with a bit that faults, and one of a RISC-V table with a bit that does not.
#[test]
fn a_person_reads_where_it_is_and_what_says_so() {
    let read = |format: &str, pick: fn(&Case) -> &Option<Damage>| {
        let cases = cases();
        let case = cases.iter().find(|case| case.format == format).unwrap();
        let mut converted = Converted::new("read", case);
        let (_, root, iova) = small_mapping(&converted.path);
        let (table, index, _) = *converted.walk(case, root, iova).last().unwrap();
        converted.flip(case, table + index * case.bytes, pick(case).as_ref().unwrap().flip);
        let found = run(&["validate", converted.path.to_str().unwrap()]);
        format!("{}status {}\n", found.stdout, found.status)
    };
    assert_eq!(read("amd-vi/v1", |case| &case.error), AMD);
    assert_eq!(read("riscv-iommu/second-stage", |case| &case.warning), RISC_V);
}

const AMD: &str = "\
6 streams, 5 tables: 1 error, no warnings

error: reserved  device 0x18 (0000:00:03.0), IOVA 0xfffff000..=0xffffffff
  bits 58:52 are reserved (48882 section 2.2.3)
  bits 0x0010000000000000 of the entry
  STAGE  LEVEL        TABLE  INDEX               ENTRY
      1      4  0x100001000      0  0x6000000100002601
      1      3  0x100002000      3  0x6000000100003401
      1      2  0x100003000    511  0x6000000100004201
      1      1  0x100004000    511  0x6010000008090001
status 1
";
const RISC_V: &str = "\
6 streams, 5 tables: no errors, 1 warning

warning: reserved  device 0x18 (0000:00:03.0), IOVA 0xfffff000..=0xffffffff
  the global bit means nothing in the second stage (RISC-V Privileged 1.12 section 8.5.1)
  bits 0x0000000000000020 of the entry
  STAGE  LEVEL        TABLE  INDEX               ENTRY
      1      3  0x100004000      0  0x0000000040002001
      1      2  0x100008000      3  0x0000000040002401
      1      1  0x100009000    511  0x0000000040002801
      1      0  0x10000a000    511  0x00000000020240f7
status 0
";

#[test]
fn what_faults_is_an_error() {
    let cases = cases();
    assert_eq!(cases.iter().filter(|case| case.error.is_some()).count(), 11, "nothing of a DART entry is known to fault");
    for case in &cases {
        if let Some(damage) = &case.error {
            check(case, damage, "error");
        }
    }
}

#[test]
fn what_is_reserved_and_ignored_is_a_warning() {
    let cases = cases();
    for case in &cases {
        if let Some(damage) = &case.warning {
            check(case, damage, "warning");
        }
    }
}

/// All formats that there are.
#[test]
fn no_format_is_left_out() {
    let report = run(&["formats", "--format", "json"]).good().json();
    let plugins = report["plugins"].as_array().unwrap();
    let mut names: Vec<&str> = plugins.iter().flat_map(|plugin| plugin["formats"].as_array().unwrap()).map(|f| f["name"].as_str().unwrap()).collect();
    let cases = cases();
    let mut known: Vec<&str> = cases.iter().map(|case| case.format).collect();
    names.sort_unstable();
    known.sort_unstable();
    assert_eq!(known, names);
}
