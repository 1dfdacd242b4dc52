//! Tables that a real guest's driver built. `STAGECRAFT_FIXTURES` names the folder that holds the snapshots; without it there is nothing to do.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::HashMap;
use std::path::Path;

use serde_json::Value;
use stagecraft_plugin_intel_vtd::{first_stage::FirstStage, second_stage::SecondStage, unit::IntelVtd};
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

/// A leaf as the walk finds it: first IOVA, address, size, attributes.
type Leaf = (u64, u64, u64, Attributes);

/// The plainest walk: by the format's geometry, through these pages, in order of IOVA.
struct Walk<'a, F> {
    format: &'a F,
    geometry: Geometry,
    pages: &'a mut Pages,
    leaves: Vec<Leaf>,
}

impl<F: Format> Walk<'_, F> {
    fn table(&mut self, table: u64, level: u8, inherited: u64, base: u64) {
        let words = stagecraft_sdk::bits::words(&self.pages.read(table, 4096).unwrap());
        for (index, entry) in (0_u64..).zip(words) {
            let kind = &self.geometry.levels[usize::from(level)];
            let iova = base | index << kind.index_lsb;
            let shape = kind.shapes.iter().find(|shape| entry & shape.mask == shape.value);
            let (mut pattern, mut address) = (entry, 0);
            for segment in shape.iter().flat_map(|shape| &shape.address) {
                let mask = stagecraft_sdk::bits::mask(segment.entry_lsb + segment.width - 1, segment.entry_lsb);
                pattern &= !mask;
                address |= entry & mask;
            }
            assert!(address >> self.geometry.output_bits == 0);
            match self.format.decode(level, inherited, pattern) {
                Meaning::Absent => {}
                Meaning::Table { next, inherited } => self.table(address, next.level, inherited, iova),
                Meaning::Leaf { size_log2, attributes } => self.leaves.push((iova, address, 1 << size_log2, attributes)),
                other => panic!("{iova:#x}: {entry:#x}: {other:?}"),
            }
        }
    }
}

fn leaves<F: Format>(table: &TableConfig, pages: &mut Pages) -> Vec<Leaf> {
    let format = F::open(&table.settings).unwrap();
    let mut walk = Walk { format: &format, geometry: format.geometry(), pages, leaves: Vec::new() };
    let root = walk.geometry.roots[0].clone();
    walk.table(root.address, root.level, root.inherited, 0);
    walk.leaves.retain(|leaf| leaf.0 <= root.last);
    walk.leaves
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
        let Outcome::Tables(Translated { tables, .. }) = IntelVtd::lookup(&registers, Requester { id, pasid: None }, &mut pages).unwrap() else {
            panic!("{id:#x}")
        };
        assert_eq!(tables.len(), 1);
        let found = match tables[0].format.as_str() {
            FirstStage::NAME => leaves::<FirstStage>(&tables[0], &mut pages),
            _ => leaves::<SecondStage>(&tables[0], &mut pages),
        };
        let mut runs: Vec<(u64, u64, u64, String)> = Vec::new();
        for &(iova, address, size, attributes) in &found {
            match runs.last_mut() {
                Some(run) if run.0 + run.2 == iova && run.1 + run.2 == address && run.3 == access(attributes) => run.2 += size,
                _ => runs.push((iova, address, size, access(attributes))),
            }
        }
        let mappings = stream["mappings"].as_array().unwrap().iter();
        let text = |m: &Value| (number(&m["iova"]), number(&m["address"]), number(&m["size"]), m["access"].as_str().unwrap().to_owned());
        let expected: Vec<_> = mappings.map(text).collect();
        let missing: Vec<_> = expected.iter().filter(|run| !runs.contains(run)).take(3).collect();
        let extra: Vec<_> = runs.iter().filter(|run| !expected.contains(run)).take(3).collect();
        assert!(missing.is_empty() && extra.is_empty(), "{id:#x}: missing {missing:x?}, not expected {extra:x?}");
        println!("{} {id:#x}: {:?}, {} leaves, {} runs", folder.display(), tables[0].settings, found.len(), runs.len());
        assert!(IntelVtd::pasids(&registers, id, &mut pages).unwrap().is_empty());
        by_device.insert(id, found);
    }
    let (mut right, mut wrong) = (0, Vec::new());
    for request in json(&folder.join("dma.json")).as_array().unwrap() {
        let (iova, write) = (number(&request["iova"]), request["access"] == "w");
        let leaf = by_device[&number(&request["id"])].iter().find(|leaf| (leaf.0..leaf.0 + leaf.2).contains(&iova));
        let passes = leaf.is_some_and(|leaf| if write { leaf.3.write } else { leaf.3.read });
        if passes == request["succeeds"].as_bool().unwrap() {
            right += 1;
        } else {
            wrong.push(format!("{request} against {leaf:x?}"));
        }
    }
    println!("{}: {right} requests as in the model, others: {wrong:#?}", folder.display());
}

#[test]
fn real_drivers_tables_are_understood_exactly() {
    let Some(fixtures) = std::env::var_os("STAGECRAFT_FIXTURES") else {
        println!("skipped: STAGECRAFT_FIXTURES is not set");
        return;
    };
    for name in ["vtd-legacy-48", "vtd-sm-fs", "vtd-sm-ss"] {
        check(&Path::new(&fixtures).join(name));
    }
}
