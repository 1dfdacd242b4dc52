//! Tables that a real guest's driver built. `STAGECRAFT_FIXTURES` names the folder that holds the snapshots; without it there is nothing to do.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::collections::HashMap;
use std::path::Path;

use serde_json::Value;
use stagecraft_plugin_riscv_iommu::{first_stage::FirstStage, unit::RiscvIommu};
use stagecraft_sdk::{Attributes, Error, Format, Geometry, GuestMemory, Meaning, Outcome, Registers, Requester, TableConfig, Translated, Unit};

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

/// What one slot shows: first IOVA, address, size of the slot, size of the leaf, attributes.
struct Slot {
    iova: u64,
    address: u64,
    size: u64,
    leaf: u64,
    attributes: Attributes,
}

/// The plainest walk: by the format's geometry, through these pages, in order of IOVA.
struct Walk<'a> {
    format: &'a FirstStage,
    geometry: Geometry,
    pages: &'a mut Pages,
    slots: Vec<Slot>,
}

impl Walk<'_> {
    fn table(&mut self, table: u64, level: u8, base: u64) {
        let words = stagecraft_sdk::bits::words(&self.pages.read(table, 4096).unwrap());
        for (index, entry) in (0_u64..).zip(words) {
            let lsb = self.geometry.levels[usize::from(level)].index_lsb;
            let iova = base | index << lsb;
            let (pattern, address) = common::split(&self.geometry, level, entry);
            assert!(address >> self.geometry.output_bits == 0);
            match self.format.decode(level, 0, pattern) {
                Meaning::Absent => {}
                Meaning::Table { next, inherited: 0 } => self.table(address, next.level, iova),
                Meaning::Leaf { size_log2, attributes } => {
                    let leaf = 1 << size_log2;
                    assert!(address & (leaf - 1) == 0);
                    // a leaf above its slot shows the piece that lies under it
                    self.slots.push(Slot { iova, address: address | iova & (leaf - 1), size: 1 << lsb, leaf, attributes });
                }
                other => panic!("{iova:#x}: {entry:#x}: {other:?}"),
            }
        }
    }
}

fn slots(table: &TableConfig, pages: &mut Pages) -> Vec<Slot> {
    assert_eq!(table.format, FirstStage::NAME);
    let format = FirstStage::open(&table.settings).unwrap();
    let mut walk = Walk { format: &format, geometry: format.geometry(), pages, slots: Vec::new() };
    let root = walk.geometry.roots[0].clone();
    walk.table(root.address, root.level, 0);
    // the upper half is empty
    assert!(walk.slots.iter().all(|slot| slot.iova <= root.last));
    walk.slots
}

fn access(attributes: Attributes) -> String {
    [(attributes.read, 'r'), (attributes.write, 'w')].iter().filter(|(allowed, _)| *allowed).map(|(_, letter)| letter).collect()
}

fn check(folder: &Path) {
    let snapshot = json(&folder.join("snapshot.json"));
    let bytes = std::fs::read(folder.join("pages.bin")).unwrap();
    let addresses = snapshot["pages"].as_array().unwrap().iter().map(number);
    let mut pages = Pages(addresses.zip(bytes.chunks(4096).map(<[u8]>::to_vec)).collect());
    let registers = snapshot["unit"]["registers"].as_object().unwrap();
    let registers: Registers = registers.iter().map(|(name, value)| (name.clone(), number(value))).collect();
    let mut by_device = HashMap::new();
    for stream in json(&folder.join("expected.json"))["streams"].as_array().unwrap() {
        let id = number(&stream["id"]);
        let tables = match RiscvIommu::lookup(&registers, Requester { id, pasid: None }, &mut pages).unwrap() {
            Outcome::Bypass if stream["mappings"].as_array().unwrap().is_empty() => continue,
            Outcome::Tables(Translated { tables, .. }) => tables,
            other => panic!("{id:#x}: {other:?}"),
        };
        assert_eq!(tables.len(), 1);
        let found = slots(&tables[0], &mut pages);
        let mut runs: Vec<(u64, u64, u64, String)> = Vec::new();
        for slot in &found {
            match runs.last_mut() {
                Some(run) if run.0 + run.2 == slot.iova && run.1 + run.2 == slot.address && run.3 == access(slot.attributes) => run.2 += slot.size,
                _ => runs.push((slot.iova, slot.address, slot.size, access(slot.attributes))),
            }
        }
        let mappings = stream["mappings"].as_array().unwrap().iter();
        let text = |m: &Value| (number(&m["iova"]), number(&m["address"]), number(&m["size"]), m["access"].as_str().unwrap().to_owned());
        let expected: Vec<_> = mappings.map(text).collect();
        let missing: Vec<_> = expected.iter().filter(|run| !runs.contains(run)).take(3).collect();
        let extra: Vec<_> = runs.iter().filter(|run| !expected.contains(run)).take(3).collect();
        assert!(missing.is_empty() && extra.is_empty(), "{id:#x}: missing {missing:x?}, not expected {extra:x?}");
        let count = |size| found.iter().filter(|slot| slot.leaf == size).count();
        let sizes = [1 << 12, 1 << 16, 1 << 21, 1 << 30].map(count);
        println!("{} {id:#x}: {:?}, slots by leaf size {sizes:?}, {} runs", folder.display(), tables[0].settings, runs.len());
        assert!(expected.is_empty() || sizes[1] > 0, "no pages of 64 KiB");
        assert!(RiscvIommu::pasids(&registers, id, &mut pages).unwrap().is_empty());
        by_device.insert(id, found);
    }
    assert_eq!(by_device.len(), 1);
    let (mut right, mut artefacts) = (0, 0);
    for request in json(&folder.join("dma.json")).as_array().unwrap() {
        let (iova, write) = (number(&request["iova"]), request["access"] == "w");
        let slot = by_device[&number(&request["id"])].iter().find(|slot| (slot.iova..slot.iova + slot.size).contains(&iova));
        let passes = slot.is_some_and(|slot| if write { slot.attributes.write } else { slot.attributes.read });
        match passes == request["succeeds"].as_bool().unwrap() {
            true => right += 1,
            // The model does not know pages of 64 KiB and reads elsewhere, which failed where that was no memory of the guest.
            false if (0x500_0000..=0x50f_ffff).contains(&iova) && !write && passes => artefacts += 1,
            false => panic!("{request}, but the leaf is {:x?}", slot.map(|slot| (slot.iova, slot.address, slot.attributes))),
        }
    }
    println!("{}: {right} requests as in the model, {artefacts} of its artefacts", folder.display());
}

#[test]
fn real_drivers_tables_are_understood_exactly() {
    let Some(fixtures) = std::env::var_os("STAGECRAFT_FIXTURES") else {
        println!("skipped: STAGECRAFT_FIXTURES is not set");
        return;
    };
    for name in ["riscv-sv39", "riscv-sv48"] {
        check(&Path::new(&fixtures).join(name));
    }
}
