//! Guests without a valid bit in their directories: every slot that is not used leads to a table with nothing in it, one for each level, which all slots share. The
//! tables are written here from the architecture's manual (LoongArch volume 1 section 5.4) alone.

use std::collections::BTreeMap;
use std::fs;

use serde_json::{Value, json};

use crate::support::{folder, hex, run};

/// Valid, dirty, for user level, cached, present, writable.
const PAGE: u64 = 0x19f;
/// A huge page, in a directory.
const HUGE: u64 = 0x40;
/// Kernels store their own, virtual addresses; these bits play no part.
const VIRTUAL: u64 = 0x9000 << 48;

/// A guest's tables.
struct Tables {
    granule_log2: u32,
    levels: u32,
    pages: BTreeMap<u64, [u8; 4096]>,
    /// By level: the table that is shared.
    empty: Vec<u64>,
    root: u64,
    next: u64,
    mapped: BTreeMap<u64, (u64, u64)>,
}

impl Tables {
    fn new(granule_log2: u32, levels: u32) -> Self {
        let mut tables =
            Self { granule_log2, levels, pages: BTreeMap::new(), empty: Vec::new(), root: 0, next: 0x8000_0000, mapped: BTreeMap::new() };
        for level in 0..levels - 1 {
            let table = tables.table(level);
            tables.empty.push(table);
        }
        tables.root = tables.table(levels - 1);
        tables
    }

    fn put(&mut self, address: u64, word: u64) {
        let page = self.pages.entry(address & !0xfff).or_insert([0; 4096]);
        page[(address & 0xfff) as usize..][..8].copy_from_slice(&word.to_le_bytes());
    }

    fn word(&self, address: u64) -> u64 {
        u64::from_le_bytes(self.pages[&(address & !0xfff)][(address & 0xfff) as usize..][..8].try_into().unwrap())
    }

    /// A new table in which nothing is mapped.
    fn table(&mut self, level: u32) -> u64 {
        let table = self.next;
        self.next += 1 << self.granule_log2;
        for slot in (table..self.next).step_by(8) {
            let word = if level == 0 { 0 } else { self.empty[level as usize - 1] | VIRTUAL };
            self.put(slot, word);
        }
        table
    }

    fn shift(&self, level: u32) -> u32 {
        self.granule_log2 + (self.granule_log2 - 3) * level
    }

    /// Maps a page at this level.
    fn map(&mut self, iova: u64, address: u64, leaf_level: u32) {
        let mut table = self.root;
        for level in (leaf_level..self.levels).rev() {
            let slot = table + (iova >> self.shift(level) & ((1 << (self.granule_log2 - 3)) - 1)) * 8;
            if level == leaf_level {
                self.put(slot, address | PAGE | if level == 0 { 0 } else { HUGE });
                break;
            }
            table = self.word(slot) & !VIRTUAL;
            if table == self.empty[level as usize - 1] {
                table = self.table(level - 1);
                self.put(slot, table | VIRTUAL);
            }
        }
        self.mapped.insert(iova, (address, 1 << self.shift(leaf_level)));
    }

    /// Maximal runs: IOVA, address, size.
    fn runs(&self) -> Vec<(u64, u64, u64)> {
        let mut runs: Vec<(u64, u64, u64)> = Vec::new();
        for (iova, (address, size)) in &self.mapped {
            match runs.last_mut().filter(|last| (last.0 + last.2, last.1 + last.2) == (*iova, *address)) {
                Some(last) => last.2 += size,
                None => runs.push((*iova, *address, *size)),
            }
        }
        runs
    }

    /// Writes the snapshot; its path.
    fn write(&self, name: &str) -> String {
        let path = folder(name);
        let bits = self.shift(self.levels).min(63);
        let settings = json!({ "granule": 1_u64 << self.granule_log2, "levels": self.levels, "input-bits": bits });
        let addresses: Vec<String> = self.pages.keys().map(|page| format!("{page:#x}")).collect();
        let snapshot = json!({
            "version": 1, "page_size": 4096, "pages": addresses,
            "memory": [{ "kind": "ram", "first": "0x0", "last": "0xffffffffff" }],
            "devices": [{ "label": "0000:00:07.0", "id": "0x38" }],
            "tables": [{ "id": "0x38", "format": "loongarch/paging", "root": format!("{:#x}", self.root), "settings": settings }],
        });
        fs::write(path.join("snapshot.json"), snapshot.to_string()).unwrap();
        fs::write(path.join("pages.bin"), self.pages.values().copied().collect::<Vec<_>>().concat()).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

/// A hundred pages or more, in a row and far apart, and a huge one.
fn guest(granule_log2: u32, levels: u32) -> Tables {
    let mut tables = Tables::new(granule_log2, levels);
    let page = 1_u64 << granule_log2;
    let last = 1 << tables.shift(levels).min(47);
    for index in 0..60 {
        tables.map(0x4000_0000 + index * page, 0x1_0000_0000 + index * page, 0);
    }
    for index in 0..50 {
        tables.map((last / 64 * index + index * 7 * page) & !(page - 1), 0x2_0000_0000 + index * 5 * page, 0);
    }
    tables.map(last - page, 0x3_0000_0000, 0);
    let huge = 1_u64 << tables.shift(1);
    tables.map(last / 2 + 64 * huge, 0x40_0000_0000, 1);
    tables
}

fn mappings(path: &str) -> Vec<(u64, u64, u64)> {
    let report = run(&["inspect", path, "--format", "json"]).good().json();
    let stream = &report["streams"][0];
    assert_eq!((&stream["state"], &stream["reason"]), (&json!("translated"), &Value::Null));
    let mapping = |mapping: &Value| (hex(&mapping["iova"]), hex(&mapping["address"]), mapping["size"].as_u64().unwrap());
    stream["mappings"].as_array().unwrap().iter().map(mapping).collect()
}

/// Levels and granules that kernels use, and one that none does.
const SHAPES: [(u32, u32); 4] = [(14, 3), (12, 3), (12, 4), (14, 4)];

#[test]
fn what_is_mapped_is_found_whatever_the_other_slots_lead_to() {
    for (granule_log2, levels) in SHAPES {
        let tables = guest(granule_log2, levels);
        let path = tables.write(&format!("empties-{granule_log2}-{levels}"));
        assert_eq!(mappings(&path), tables.runs(), "{granule_log2} {levels}");
        let report = run(&["validate", &path, "--format", "json", "--strict"]).good().json();
        assert_eq!(report, json!({"version": 1, "violations": [], "errors": 0, "warnings": 0}), "{granule_log2} {levels}");
        run(&["draw", &path, "--out", &format!("{path}.svg"), "--force"]).good();
        for target in ["intel-vtd/second-stage", "amd-vi/v1", "loongarch/paging", "riscv-iommu/first-stage"] {
            // Where a target has no such IOVAs, that is a loss that is reported, and no matter of this test.
            if levels == 4 && granule_log2 == 14 && target != "loongarch/paging" {
                continue;
            }
            let out = format!("{path}-out");
            run(&["convert", &path, "--to", target, "--out", &out, "--force"]);
            let (ours, theirs) = (mappings(&path), mappings(&out));
            assert_eq!(ours, theirs, "{granule_log2} {levels} to {target}");
            assert_eq!(run(&["diff", &path, &out]).status, 0, "{granule_log2} {levels} to {target}");
        }
    }
}

/// One thing that is wrong in a shared table is said of the table's entry, and not once for each way to it.
#[test]
fn a_warning_in_a_shared_table_is_given_once() {
    let mut tables = guest(12, 3);
    // No fault: bits below the address of a table that is nowhere are not looked at, but a leaf for nobody's level is.
    let (shared, unassigned) = (tables.empty[0], 1 << 50);
    tables.put(shared + 8 * 5, 0x5000 | PAGE | unassigned);
    let path = tables.write("empties-warning");
    // Now it is not empty: as many leaves as there are slots that lead there are more than a guest of so few pages may have.
    let inspected = run(&["inspect", &path]);
    assert!(inspected.stdout.contains("stopped by budget") || inspected.stderr.contains("stopped by budget"), "{inspected:?}");
    tables.put(shared + 8 * 5, 0);
    // An entry that is absent and has bits: nothing to say, and nothing to say of those that lead there.
    tables.put(shared + 8 * 6, 0x6000 | PAGE & !1);
    let path = tables.write("empties-remains");
    assert_eq!(mappings(&path), tables.runs());
    run(&["validate", &path, "--strict"]).good();
}

#[test]
fn their_format_is_guessed() {
    for (granule_log2, levels) in SHAPES.into_iter().filter(|shape| *shape != (14, 4)) {
        let tables = guest(granule_log2, levels);
        let path = tables.write(&format!("empties-guess-{granule_log2}-{levels}"));
        let report = run(&["guess", &path, "--root", &format!("{:#x}", tables.root), "--format", "json"]).good().json();
        let first = &report["candidates"][0];
        assert_eq!((&first["format"], &first["levels"]), (&json!("loongarch/paging"), &json!(levels)), "{granule_log2} {levels}: {report:#}");
        assert_eq!((&report["fits"], &first["granule"]), (&json!(true), &json!(1_u64 << granule_log2)), "{granule_log2} {levels}");
    }
}
