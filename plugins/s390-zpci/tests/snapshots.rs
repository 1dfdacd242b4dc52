//! Tables that a real guest's driver built. `STAGECRAFT_FIXTURES` names the folder that holds the snapshots; without it there is nothing to do.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use serde_json::Value;
use stagecraft_plugin_s390_zpci::{dma::Dma, unit::S390Zpci};
use stagecraft_sdk::{Error, Format, Geometry, GuestMemory, Meaning, Outcome, Registers, Requester, TableConfig, Translated, Unit};

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

/// First IOVA, address, size, access.
type Run = (u64, u64, u64, &'static str);

/// The plainest walk: by the format's geometry, through these pages, in order of IOVA.
struct Walk<'a> {
    format: &'a Dma,
    geometry: Geometry,
    pages: &'a mut Pages,
    runs: Vec<Run>,
    leaves: u64,
    patterns: BTreeSet<(u8, u64)>,
}

impl Walk<'_> {
    fn table(&mut self, table: u64, level: u8, inherited: u64, base: u64) {
        let kind = self.geometry.levels[usize::from(level)].clone();
        for index in 0..1_u64 << kind.index_bits {
            let entry = u64::from_be_bytes(self.pages.read(table + index * 8, 8).unwrap().try_into().unwrap());
            let iova = base | index << kind.index_lsb;
            let shape = kind.shapes.iter().find(|shape| entry & shape.mask == shape.value);
            let (mut pattern, mut address) = (entry, 0);
            for segment in shape.iter().flat_map(|shape| &shape.address) {
                let mask = stagecraft_sdk::bits::mask(segment.entry_lsb + segment.width - 1, segment.entry_lsb);
                pattern &= !mask;
                address |= entry & mask;
            }
            self.patterns.insert((level, pattern));
            assert!(self.format.explain(level, inherited, pattern).is_empty(), "{iova:#x}: {entry:#x}");
            match self.format.decode(level, inherited, pattern) {
                Meaning::Absent => {}
                Meaning::Table { next, inherited } => self.table(address, next.level, inherited, iova),
                Meaning::Leaf { size_log2, attributes } => {
                    assert!(attributes.read && (self.geometry.roots[0].first..=self.geometry.roots[0].last).contains(&iova));
                    self.leaf((iova, address, 1 << size_log2, if attributes.write { "rw" } else { "r" }));
                }
                other => panic!("{iova:#x}: {entry:#x}: {other:?}"),
            }
        }
    }

    fn leaf(&mut self, leaf: Run) {
        self.leaves += 1;
        match self.runs.last_mut() {
            Some(run) if run.0 + run.2 == leaf.0 && run.1 + run.2 == leaf.1 && run.3 == leaf.3 => run.2 += leaf.2,
            _ => self.runs.push(leaf),
        }
    }
}

#[test]
fn real_drivers_tables_are_understood_exactly() {
    let Some(fixtures) = std::env::var_os("STAGECRAFT_FIXTURES") else {
        println!("skipped: STAGECRAFT_FIXTURES is not set");
        return;
    };
    let folder = Path::new(&fixtures).join("s390-zpci");
    let snapshot = json(&folder.join("snapshot.json"));
    let bytes = std::fs::read(folder.join("pages.bin")).unwrap();
    let addresses = snapshot["pages"].as_array().unwrap().iter().map(number);
    let mut pages = Pages(addresses.zip(bytes.chunks(4096).map(<[u8]>::to_vec)).collect());
    let registers = snapshot["unit"]["registers"].as_object().unwrap();
    let registers: Registers = registers.iter().map(|(name, value)| (name.clone(), number(value))).collect();
    for stream in json(&folder.join("expected.json"))["streams"].as_array().unwrap() {
        let id = number(&stream["id"]);
        let Outcome::Tables(Translated { tables, .. }) = S390Zpci::lookup(&registers, Requester { id, pasid: None }, &mut pages).unwrap() else {
            panic!("{id:#x}")
        };
        let [table] = &tables[..] else { panic!("{tables:?}") };
        let format = Dma::open(&table.settings).unwrap();
        let geometry = format.geometry();
        let root = geometry.roots[0].clone();
        let mut walk = Walk { format: &format, geometry, pages: &mut pages, runs: Vec::new(), leaves: 0, patterns: BTreeSet::new() };
        walk.table(root.address, root.level, root.inherited, 0);
        let mappings = stream["mappings"].as_array().unwrap().iter();
        let access = |text: &str| if text == "r" { "r" } else { "rw" };
        let text = |m: &Value| (number(&m["iova"]), number(&m["address"]), number(&m["size"]), access(m["access"].as_str().unwrap()));
        let expected: Vec<Run> = mappings.map(text).collect();
        let missing: Vec<_> = expected.iter().filter(|run| !walk.runs.contains(run)).take(3).collect();
        let extra: Vec<_> = walk.runs.iter().filter(|run| !expected.contains(run)).take(3).collect();
        assert!(missing.is_empty() && extra.is_empty() && !expected.is_empty(), "{id:#x}: missing {missing:x?}, not expected {extra:x?}");
        println!("{id:#x}: {:?}, {} leaves, {} runs, patterns {:x?}", table.settings, walk.leaves, walk.runs.len(), walk.patterns);
    }
}
