//! Tables that a real guest's driver built. `STAGECRAFT_FIXTURES` names the folder that holds the snapshots; without it there is nothing to do.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::Value;
use stagecraft_plugin_amd_vi::{unit::AmdVi, v1::V1, v2::V2};
use stagecraft_sdk::bits::mask;
use stagecraft_sdk::{Attributes, Error, Format, Geometry, GuestMemory, Meaning, Outcome, Registers, Requester, TableConfig, Translated, Unit};

#[derive(Clone)]
struct Pages(HashMap<u64, Vec<u8>>);

impl GuestMemory for Pages {
    fn read(&mut self, address: u64, length: u32) -> Result<Vec<u8>, Error> {
        let offset = (address & 0xfff) as usize;
        let page = self.0.get(&(address & !0xfff)).and_then(|page| page.get(offset..offset + length as usize));
        page.map(<[u8]>::to_vec).ok_or(Error::Unreadable(address))
    }

    fn read_through(&mut self, _: &TableConfig, address: u64, _: u32) -> Result<Vec<u8>, Error> {
        Err(Error::Unreadable(address))
    }
}

fn number(value: &Value) -> u64 {
    match value {
        Value::String(text) => u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap(),
        other => other.as_u64().unwrap(),
    }
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// What one slot maps, as the walk finds it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Piece {
    iova: u64,
    address: u64,
    size: u64,
    attributes: Attributes,
    /// The entry stands here.
    entry: u64,
    /// The leaf is larger than its slot: bytes of the leaf.
    leaf: u64,
}

/// The plainest walk: by the format's geometry, through these pages, in order of IOVA.
struct Walk<'a, F> {
    format: &'a F,
    geometry: Geometry,
    pages: &'a mut Pages,
    pieces: Vec<Piece>,
}

impl<F: Format> Walk<'_, F> {
    fn table(&mut self, table: u64, level: u8, inherited: u64, base: u64) {
        let words = stagecraft_sdk::bits::words(&self.pages.read(table, 4096).unwrap());
        let kind = self.geometry.levels[usize::from(level)].clone();
        for (index, entry) in (0..1_u64 << kind.index_bits).zip(words) {
            let iova = base | index << kind.index_lsb;
            let shape = kind.shapes.iter().find(|shape| entry & shape.mask == shape.value);
            let bits = shape.iter().flat_map(|shape| &shape.address).fold(0, |bits, s| bits | mask(s.entry_lsb + s.width - 1, s.entry_lsb));
            assert!((entry & bits) >> self.geometry.output_bits == 0);
            let meaning = match self.format.decode(level, inherited, entry & !bits) {
                Meaning::WholeEntry => self.format.decode_entry(level, inherited, entry),
                meaning => meaning,
            };
            match meaning {
                Meaning::Absent => {}
                Meaning::Table { next, inherited } => self.table(entry & bits, next.level, inherited, iova),
                Meaning::Leaf { size_log2, attributes } => {
                    // The low bits of a leaf that is larger than its slot code the size; the slot shows the piece under it.
                    let within = (1 << size_log2) - 1;
                    let address = entry & bits & !within | iova & within;
                    let (size, entry) = (1 << kind.index_lsb, table + index * 8);
                    self.pieces.push(Piece { iova, address, size, attributes, entry, leaf: within + 1 });
                }
                other => panic!("{iova:#x}: {entry:#x}: {other:?}"),
            }
        }
    }
}

fn pieces<F: Format>(table: &TableConfig, pages: &mut Pages) -> Vec<Piece> {
    let format = F::open(&table.settings).unwrap();
    let geometry = format.geometry();
    assert_eq!(geometry.roots.len(), 1, "requests without PASID have one range of addresses");
    let root = geometry.roots[0].clone();
    let mut walk = Walk { format: &format, geometry, pages, pieces: Vec::new() };
    walk.table(root.address, root.level, root.inherited, 0);
    assert!(walk.pieces.iter().all(|piece| piece.iova + (piece.size - 1) <= root.last));
    walk.pieces
}

fn access(attributes: Attributes) -> String {
    [(attributes.read, 'r'), (attributes.write, 'w')].iter().filter(|(allowed, _)| *allowed).map(|(_, letter)| letter).collect()
}

struct Guest {
    folder: PathBuf,
    registers: Registers,
    ids: Vec<u64>,
    pages: Pages,
}

impl Guest {
    /// None if no snapshots are given.
    fn load(name: &str) -> Option<Self> {
        let Some(fixtures) = std::env::var_os("STAGECRAFT_FIXTURES") else {
            println!("skipped: STAGECRAFT_FIXTURES is not set");
            return None;
        };
        let folder = Path::new(&fixtures).join(name);
        let snapshot = json(&folder.join("snapshot.json"));
        let bytes = std::fs::read(folder.join("pages.bin")).unwrap();
        let addresses = snapshot["pages"].as_array().unwrap().iter().map(number);
        let pages = Pages(addresses.zip(bytes.chunks(4096).map(<[u8]>::to_vec)).collect());
        let registers = snapshot["unit"]["registers"].as_object().unwrap();
        let registers = registers.iter().map(|(name, value)| (name.clone(), number(value))).collect();
        let ids = snapshot["devices"].as_array().unwrap().iter().map(|device| number(&device["id"])).collect();
        Some(Self { folder, registers, ids, pages })
    }

    fn lookup(&mut self, id: u64) -> Outcome {
        AmdVi::lookup(&self.registers, Requester { id, pasid: None }, &mut self.pages).unwrap()
    }

    fn pieces(&mut self, id: u64) -> Vec<Piece> {
        let Outcome::Tables(Translated { tables, .. }) = self.lookup(id) else { panic!("{id:#x}") };
        assert_eq!(tables.len(), 1);
        match tables[0].format.as_str() {
            V1::NAME => pieces::<V1>(&tables[0], &mut self.pages),
            _ => pieces::<V2>(&tables[0], &mut self.pages),
        }
    }
}

fn check(name: &str) {
    let Some(mut guest) = Guest::load(name) else { return };
    let mut by_device = HashMap::new();
    for stream in json(&guest.folder.join("expected.json"))["streams"].as_array().unwrap() {
        let id = number(&stream["id"]);
        let found = guest.pieces(id);
        let mut runs: Vec<(u64, u64, u64, String)> = Vec::new();
        for piece in &found {
            let access = access(piece.attributes);
            match runs.last_mut() {
                Some(run) if run.0 + run.2 == piece.iova && run.1 + run.2 == piece.address && run.3 == access => run.2 += piece.size,
                _ => runs.push((piece.iova, piece.address, piece.size, access)),
            }
        }
        let mappings = stream["mappings"].as_array().unwrap().iter();
        let text = |m: &Value| (number(&m["iova"]), number(&m["address"]), number(&m["size"]), m["access"].as_str().unwrap().to_owned());
        let expected: Vec<_> = mappings.map(text).collect();
        let missing: Vec<_> = expected.iter().filter(|run| !runs.contains(run)).take(3).collect();
        let extra: Vec<_> = runs.iter().filter(|run| !expected.contains(run)).take(3).collect();
        assert!(missing.is_empty() && extra.is_empty(), "{id:#x}: missing {missing:x?}, not expected {extra:x?}");
        println!("{name} {id:#x}: {} pieces, {} runs", found.len(), runs.len());
        assert!(AmdVi::pasids(&guest.registers, id, &mut guest.pages).unwrap().is_empty());
        by_device.insert(id, found);
    }
    // All others are the unit itself, which a driver blocks.
    for id in guest.ids.clone().into_iter().filter(|id| !by_device.contains_key(id)) {
        assert!(matches!(guest.lookup(id), Outcome::Blocked(_)), "{id:#x}");
    }
    let dma = guest.folder.join("dma.json");
    if !dma.exists() {
        return;
    }
    let (mut right, mut wrong) = (0, 0);
    for request in json(&dma).as_array().unwrap() {
        let (iova, write) = (number(&request["iova"]), request["access"] == "w");
        let piece = by_device[&number(&request["id"])].iter().find(|piece| (piece.iova..=piece.iova + (piece.size - 1)).contains(&iova));
        let passes = piece.is_some_and(|piece| if write { piece.attributes.write } else { piece.attributes.read });
        if passes == request["succeeds"].as_bool().unwrap() {
            right += 1;
        } else {
            // Reads of the test module's own buffer were recorded as failing although they are mapped.
            assert!(passes && !write && (0x500_0000..0x510_0000).contains(&iova), "{request} against {piece:x?}");
            wrong += 1;
        }
    }
    println!("{name}: {right} requests as in the model, {wrong} contradict the recording");
    assert!(right > 100 && wrong <= 4);
}

#[test]
fn host_tables_of_a_real_driver_are_understood_exactly() {
    check("amd-v1");
}

#[test]
fn guest_tables_of_a_real_driver_are_understood_exactly() {
    check("amd-v2-4l");
}

#[test]
fn a_missing_replica_is_a_hole_and_the_others_stay() {
    let Some(mut guest) = Guest::load("amd-v1") else { return };
    let before = guest.pieces(0x38);
    let mut sizes: Vec<u64> = before.iter().filter(|piece| piece.leaf > piece.size).map(|piece| piece.leaf).collect();
    sizes.sort_unstable();
    sizes.dedup();
    assert!(sizes.contains(&0x2000) && sizes.contains(&0x8000_0000), "leaves of many sizes: {sizes:x?}");
    for size in sizes {
        // the last replica of the first leaf of this size: of a size that every power of two can be, it stands elsewhere than the first
        let hit = *before.iter().filter(|piece| piece.leaf == size).find(|piece| piece.iova & (size - 1) == size - piece.size).unwrap();
        let mut broken = Guest { pages: guest.pages.clone(), folder: guest.folder.clone(), registers: guest.registers.clone(), ids: Vec::new() };
        broken.pages.0.get_mut(&(hit.entry & !0xfff)).unwrap()[(hit.entry & 0xfff) as usize] &= !1;
        let after = broken.pieces(0x38);
        let expected: Vec<Piece> = before.iter().copied().filter(|piece| piece.entry != hit.entry).collect();
        assert_eq!(after.len() + 1, before.len(), "{size:#x}");
        assert_eq!(after, expected);
    }
}
