//! PASID structures that contain themselves, or lead nowhere a million times: the search for PASIDs is bounded by count and by bytes, and so is everything that
//! follows from what it finds.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::OnceLock;

use serde_json::json;
use stagecraft::device::LookupError;
use stagecraft::guest::{Guest, GuestError};
use stagecraft::memory::Limits;
use stagecraft::plugin::{Config, Engine, Plugins};
use stagecraft::snapshot::Snapshot;

fn plugins() -> &'static Plugins {
    static PLUGINS: OnceLock<Plugins> = OnceLock::new();
    PLUGINS.get_or_init(|| Plugins::builtin(&Engine::new(Config::default()).unwrap()).unwrap())
}

/// Words of some pages.
#[derive(Default)]
struct Pages(BTreeMap<u64, Vec<u64>>);

impl Pages {
    fn put(mut self, address: u64, words: &[u64]) -> Self {
        let page = self.0.entry(address & !0xfff).or_insert_with(|| vec![0; 512]);
        page[(address & 0xfff) as usize / 8..][..words.len()].copy_from_slice(words);
        self
    }

    fn full(self, address: u64, word: u64) -> Self {
        self.put(address, &[word; 512])
    }
}

/// A guest with eight devices, all with the same structures.
fn snapshot(kind: &str, registers: &[(&str, u64)], pages: &Pages) -> Snapshot {
    let folder = tempfile::tempdir().unwrap();
    let registers: serde_json::Map<_, _> = registers.iter().map(|(name, value)| ((*name).to_owned(), json!(format!("{value:#x}")))).collect();
    let document = json!({
        "version": 1,
        "unit": {"kind": kind, "registers": registers},
        "memory": [{"kind": "ram", "first": 0, "last": "0xffffffff"}],
        "devices": (0..20).map(|id| json!({"label": format!("d{id}"), "id": id})).collect::<Vec<_>>(),
        "page_size": 4096,
        "pages": pages.0.keys().collect::<Vec<_>>(),
    });
    std::fs::write(folder.path().join("snapshot.json"), document.to_string()).unwrap();
    let bytes: Vec<u8> = pages.0.values().flatten().flat_map(|word| word.to_le_bytes()).collect();
    std::fs::write(folder.path().join("pages.bin"), bytes).unwrap();
    Snapshot::load(folder.path()).unwrap()
}

/// AMD: guest CR3 tables of three levels.
fn amd(pages: Pages) -> Snapshot {
    // V, TV, GV, GLX 2, IR, IW; the guest CR3 table at 0x20000: bits 30:15 stand in word 1 from bit 16.
    let entry = [3 | 1 << 55 | 2 << 56 | 3 << 61, (0x2_0000 >> 15) << 16, 0, 0];
    let pages = pages.put(0x1_0000, &entry.repeat(20));
    snapshot("amd-vi", &[("DEVTAB_BASE", 0x1_0000), ("CONTROL", 1 | 1 << 16), ("EXT_FEATURES", 0)], &pages)
}

/// RISC-V: process directories of three levels.
fn riscv(pages: Pages) -> Snapshot {
    // V, PDTV; mode PD20, the directory at 0x20000.
    let context = [1 | 1 << 5, 0, 0, 3 << 60 | 0x20];
    let pages = pages.put(0x1_0000, &context.repeat(20));
    snapshot("riscv-iommu", &[("CAPABILITIES", 1 << 40 | 56 << 32 | 1 << 9), ("FCTL", 0), ("DDTP", 0x10 << 10 | 2)], &pages)
}

/// VT-d: a PASID directory of 2^14 entries.
fn vtd(pages: Pages) -> Snapshot {
    // Present, PDTS 7, PASIDs enabled.
    let context = [0x2_0000 | 1 | 7 << 9 | 1 << 3, 0, 0, 0];
    let pages = pages.put(0x1_0000, &[0x1_1000 | 1]).put(0x1_1000, &context.repeat(20));
    let ecap = 1 << 43 | 1 << 40 | 19 << 35 | 1 << 47;
    snapshot("intel-vtd", &[("CAP", 47 << 16 | 1 << 10), ("ECAP", ecap), ("GSTS", 1 << 31), ("RTADDR", 0x1_0000 | 1 << 10)], &pages)
}

/// Each architecture, with structures whose last level is full of valid contexts, and with a last level that is empty.
fn guests() -> Vec<(&'static str, Snapshot, bool)> {
    let chain = |last: u64, pointer: fn(u64) -> u64| {
        Pages::default().full(0x2_0000, pointer(0x3_0000)).full(0x3_0000, pointer(0x4_0000)).full(0x4_0000, last)
    };
    let amd_pointer: fn(u64) -> u64 = |address| address | 1;
    let riscv_pointer: fn(u64) -> u64 = |address| address >> 2 | 1;
    let directory = |table: &[u64]| {
        let pages = (0..32).fold(Pages::default(), |pages, page| pages.full(0x2_0000 + page * 0x1000, 0x8_0000 | 1));
        pages.put(0x8_0000, &table.repeat(512 / table.len()))
    };
    // A PASID table entry of the first stage: present, four levels, the table at 0x80000.
    let pasid = [1 | 1 << 6, 0, 0x8_0000, 0, 0, 0, 0, 0];
    vec![
        ("AMD, a table that contains itself", amd(Pages::default().full(0x2_0000, amd_pointer(0x2_0000))), true),
        ("AMD, a million PASIDs", amd(chain(amd_pointer(0x4_0000), amd_pointer)), true),
        ("AMD, none", amd(chain(0, amd_pointer)), false),
        ("RISC-V, a table that contains itself", riscv(Pages::default().full(0x2_0000, riscv_pointer(0x2_0000))), true),
        ("RISC-V, a million processes", riscv(chain(1, riscv_pointer)), true),
        ("RISC-V, none", riscv(chain(0, riscv_pointer)), false),
        ("VT-d, a million PASIDs", vtd(directory(&pasid)), true),
        ("VT-d, none", vtd(directory(&[0])), false),
    ]
}

fn is_exhausted(result: &GuestError, what: &str) -> bool {
    matches!(result, GuestError::Lookup(LookupError::Exhausted(exhausted)) if exhausted.what == what)
}

#[test]
fn the_search_is_bounded() {
    for (name, snapshot, any) in guests() {
        let limits = Limits { bytes: 64 << 20, ..Limits::default() };
        let guest = Guest::with_limits(&snapshot, plugins(), limits).unwrap();
        let found = guest.pasids(0).unwrap_or_else(|error| panic!("{name}: {error}")).value;
        assert_eq!(found.len(), if any { 1024 } else { 0 }, "{name}");
        assert!(found.is_sorted(), "{name}");
        // What is read is charged, also where nothing is found.
        let guest = Guest::with_limits(&snapshot, plugins(), Limits { bytes: 10_000, ..Limits::default() }).unwrap();
        let error = guest.pasids(0).err().unwrap_or_else(|| panic!("{name}: not charged"));
        assert!(is_exhausted(&error, "bytes of device structures"), "{name}: {error}");
    }
}

#[test]
fn all_devices_together_are_bounded() {
    for (name, snapshot, any) in guests() {
        let guest = Guest::with_limits(&snapshot, plugins(), Limits { bytes: 64 << 20, ..Limits::default() }).unwrap();
        let ended = (0..20).find_map(|id| guest.pasids(id).err().map(|error| (id, error)));
        match ended {
            // Sixteen devices of 1,024.
            Some((id, error)) => assert!(any && id == 16 && is_exhausted(&error, "PASIDs of all devices together"), "{name}: {id}: {error}"),
            None => assert!(!any, "{name}"),
        }
    }
}
