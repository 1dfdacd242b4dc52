//! A small guest: memory made of pages, and a walker that knows geometry and meanings and nothing of Arm.
#![allow(dead_code, unreachable_pub)]

use std::collections::BTreeMap;

use stagecraft_plugin_arm_smmuv3::Stage2;
use stagecraft_sdk::{
    Attributes, ByteOrder, Error, FaultKind, Format, Geometry, GuestMemory, Level, Meaning, Next, Registers, Settings, TableConfig,
};

/// Settings from pairs.
pub fn settings(pairs: &[(&str, u64)]) -> Settings {
    pairs.iter().map(|&(name, value)| (name.to_owned(), value)).collect()
}

/// Registers from pairs.
pub fn registers(pairs: &[(&str, u64)]) -> Registers {
    pairs.iter().map(|&(name, value)| (name.to_owned(), value)).collect()
}

/// Guest memory: pages that are there, and a count of the reads.
#[derive(Clone, Debug, Default)]
pub struct Guest {
    pages: BTreeMap<u64, Vec<u8>>,
    pub reads: u32,
    pub reads_through: u32,
}

impl Guest {
    pub fn page(&mut self, address: u64) -> &mut Vec<u8> {
        self.pages.entry(address & !0xfff).or_insert_with(|| vec![0; 4096])
    }

    /// Writes 64-bit little-endian words; makes the pages.
    pub fn write(&mut self, address: u64, words: &[u64]) {
        for (i, word) in words.iter().enumerate() {
            let address = address + 8 * i as u64;
            let offset = (address & 0xfff) as usize;
            self.page(address)[offset..offset + 8].copy_from_slice(&word.to_le_bytes());
        }
    }

    fn bytes(&self, address: u64, length: u64) -> Option<Vec<u8>> {
        (address..address.checked_add(length)?).map(|a| self.pages.get(&(a & !0xfff)).map(|page| page[(a & 0xfff) as usize])).collect()
    }

    pub fn entry(&self, address: u64, order: ByteOrder) -> Option<u64> {
        let bytes: [u8; 8] = self.bytes(address, 8)?.try_into().ok()?;
        Some(if order == ByteOrder::Big { u64::from_be_bytes(bytes) } else { u64::from_le_bytes(bytes) })
    }
}

impl GuestMemory for Guest {
    fn read(&mut self, address: u64, length: u32) -> Result<Vec<u8>, Error> {
        assert!(length <= 4096, "the host answers at most 4,096 bytes");
        self.reads += 1;
        self.bytes(address, length.into()).ok_or(Error::Unreadable(address))
    }

    fn read_through(&mut self, table: &TableConfig, address: u64, length: u32) -> Result<Vec<u8>, Error> {
        assert!(length <= 4096, "the host answers at most 4,096 bytes");
        self.reads_through += 1;
        let stage2 = Stage2::open(&table.settings)?;
        (0..u64::from(length))
            .map(|offset| {
                let (address, attributes) = walk(&stage2, self, address + offset).map_err(|_| Error::Unreadable(address))?;
                let byte = if attributes.read { self.bytes(address, 1) } else { None };
                byte.map(|bytes| bytes[0]).ok_or(Error::Unreadable(address))
            })
            .collect()
    }
}

/// An entry in its two parts: pattern and address.
pub fn split(level: &Level, entry: u64) -> (u64, u64) {
    let Some(shape) = level.shapes.iter().find(|shape| entry & shape.mask == shape.value) else { return (entry, 0) };
    shape.address.iter().fold((entry, 0), |(pattern, address), segment| {
        let bits = u64::MAX >> (64 - segment.width);
        (pattern & !(bits << segment.entry_lsb), address | ((entry >> segment.entry_lsb) & bits) << segment.address_lsb)
    })
}

/// The other way.
pub fn join(level: &Level, pattern: u64, address: u64) -> u64 {
    let shape = level.shapes.iter().find(|shape| pattern & shape.mask == shape.value).expect("a shape");
    let entry = shape.address.iter().fold(pattern, |entry, segment| {
        let bits = u64::MAX >> (64 - segment.width);
        entry | ((address >> segment.address_lsb) & bits) << segment.entry_lsb
    });
    assert_eq!(split(level, entry), (pattern, address), "the address fits");
    entry
}

/// What one IOVA translates to.
pub fn walk(format: &impl Format, guest: &Guest, iova: u64) -> Result<(u64, Attributes), FaultKind> {
    let geometry = format.geometry();
    let inside = |root: &&stagecraft_sdk::Root| {
        let bits = !root.ignored;
        (root.first & bits..=root.last & bits).contains(&(iova & bits))
    };
    let root = geometry.roots.iter().find(inside).ok_or(FaultKind::Translation)?;
    let (mut table, mut next, mut inherited) = (root.address, Next::whole(root.level), root.inherited);
    loop {
        let level = &geometry.levels[usize::from(next.level)];
        let index = (iova >> level.index_lsb) & ((1 << level.index_bits) - 1);
        let entry = guest.entry(table + 8 * index, geometry.order).ok_or(FaultKind::Unreadable)?;
        let (pattern, address) = split(level, entry);
        match format.decode(next.level, inherited, pattern) {
            Meaning::Absent => return Err(FaultKind::Translation),
            Meaning::Fault(kind) => return Err(kind),
            Meaning::Part { .. } | Meaning::WholeEntry => panic!("Arm has no such entries"),
            _ if address >> geometry.output_bits != 0 => return Err(FaultKind::AddressSize),
            Meaning::Table { next: below, inherited: word } => (table, next, inherited) = (address, below, word),
            Meaning::Leaf { size_log2, attributes } => return Ok((address | (iova & ((1 << size_log2) - 1)), attributes)),
        }
    }
}

/// A leaf of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    pub iova: u64,
    pub address: u64,
    pub size: u64,
    pub attributes: Attributes,
}

/// All leaves of all roots, ascending.
pub fn leaves(format: &impl Format, guest: &Guest) -> Vec<Leaf> {
    let geometry = format.geometry();
    let mut found = Vec::new();
    for root in &geometry.roots {
        descend(format, &geometry, guest, root.level, root.inherited, root.address, root.first, &mut found);
    }
    found
}

#[allow(clippy::too_many_arguments)]
fn descend(format: &impl Format, geometry: &Geometry, guest: &Guest, kind: u8, inherited: u64, table: u64, first: u64, found: &mut Vec<Leaf>) {
    let level = &geometry.levels[usize::from(kind)];
    for index in 0..1_u64 << level.index_bits {
        let iova = first + (index << level.index_lsb);
        let entry = guest.entry(table + 8 * index, geometry.order).expect("a page of the table is missing");
        let (pattern, address) = split(level, entry);
        match format.decode(kind, inherited, pattern) {
            Meaning::Absent => {}
            Meaning::Table { next, inherited } => descend(format, geometry, guest, next.level, inherited, address, iova, found),
            Meaning::Leaf { size_log2, attributes } => found.push(Leaf { iova, address, size: 1 << size_log2, attributes }),
            other => panic!("{iova:#x}: entry {entry:#x} is {other:?}"),
        }
    }
}
