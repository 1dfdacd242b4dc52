//! The transcoder against direct calls: the format in Wasm answers as the same code compiled natively, for every pattern, level and attribute word; the
//! engine makes of a page of random entries what a plain loop with direct questions makes of it.
#![allow(clippy::unwrap_used)]

mod native;

use std::collections::BTreeMap;

use native::Native;
use proptest::prelude::*;
use stagecraft::memory::{Budget, EntryLayout, EntryMemory, Limits, MemoryMap, ReadError};
use stagecraft::plugin::{Config, Engine, PluginFormat, Plugins, TableConfig};
use stagecraft::table::{Cause, Encoded, FaultAt, FaultKind, Format, Geometry, Level, Meaning, Piece, Root, Shape, Step, Table, Visitor, WalkError};
use stagecraft::{Attributes, Gpa, Span};
use stagecraft_plugin_arm_smmuv3::{Stage1, Stage2};
use stagecraft_plugin_intel_vtd::first_stage::FirstStage;
use stagecraft_plugin_intel_vtd::second_stage::SecondStage;
use stagecraft_sdk as sdk;
use stagecraft_tests::reference::generate::Rng;

type Settings = &'static [(&'static str, u64)];

/// Settings of each format that differ in what entries look like.
const STAGE1: &[Settings] = &[
    &[],
    &[("granule", 16384), ("hardware-access", 1), ("hardware-dirty", 1), ("hardware-table-access", 1), ("wxn", 1)],
    &[("granule", 65536), ("input-bits", 52), ("output-bits", 52), ("privileged", 1), ("pan", 1), ("hierarchy-disabled", 1)],
    &[("lpa2", 1), ("input-bits", 52), ("output-bits", 52), ("non-shareable", 1), ("big-endian", 1)],
    &[("input-bits", 39), ("input-bits-high", 36), ("granule-high", 16384), ("tbi", 1), ("hierarchy-disabled-high", 1), ("unprivileged-disabled", 1)],
    &[("single-privilege", 1), ("access-flag-disabled", 1), ("output-bits", 40), ("mair", 0x0044_04f0_0f40_bbff)],
];
const STAGE2: &[Settings] = &[
    &[],
    &[("input-bits", 40), ("output-bits", 44), ("start-level", 1), ("hardware-access", 1), ("hardware-dirty", 1)],
    &[("granule", 16384), ("input-bits", 40), ("force-write-back", 1)],
    &[("granule", 65536), ("input-bits", 48), ("output-bits", 48), ("lpa", 1), ("access-flag-disabled", 1)],
    &[("lpa2", 1), ("input-bits", 52), ("output-bits", 52), ("start-level", 255), ("non-shareable", 1), ("big-endian", 1)],
];
const FIRST: &[Settings] = &[
    &[],
    &[("levels", 5), ("output-bits", 52), ("page-1g", 0), ("supervisor", 1)],
    &[("supervisor", 1), ("write-protect", 1), ("privileged", 1), ("extended-access", 1), ("memory-type", 1)],
];
const SECOND: &[Settings] = &[
    &[],
    &[("levels", 3), ("page-2m", 0), ("snoop-control", 1)],
    &[("levels", 5), ("output-bits", 52), ("page-1g", 0), ("accessed-dirty", 1)],
    &[("io-permissions", 1), ("input-bits", 40), ("accessed-dirty", 1), ("snoop-control", 1)],
];

/// The same format twice: as the host sees it, and compiled natively.
struct Pair {
    name: String,
    wasm: PluginFormat,
    native: Box<dyn Format>,
    geometry: Geometry,
}

fn pairs_of<F: sdk::Format + Send + 'static>(plugins: &Plugins, all: &[Settings]) -> Vec<Pair> {
    let pair = |settings: &Settings| {
        let config = TableConfig::new(F::NAME, settings);
        let native = F::open(&settings.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect()).unwrap();
        let mut native: Box<dyn Format> = Box::new(Native(native));
        let wasm = plugins.by_format(F::NAME).unwrap().open(&config).unwrap();
        let geometry = native.geometry().unwrap();
        Pair { name: config.to_string(), wasm, native, geometry }
    };
    all.iter().map(pair).collect()
}

fn pairs() -> Vec<Pair> {
    let plugins = Plugins::builtin(&Engine::new(Config::default()).unwrap()).unwrap();
    let mut pairs = pairs_of::<Stage1>(&plugins, STAGE1);
    pairs.extend(pairs_of::<Stage2>(&plugins, STAGE2));
    pairs.extend(pairs_of::<FirstStage>(&plugins, FIRST));
    pairs.extend(pairs_of::<SecondStage>(&plugins, SECOND));
    pairs
}

fn shape(level: &Level, entry: u64) -> Option<&Shape> {
    level.shapes.iter().find(|shape| entry & shape.mask == shape.value)
}

/// The address of an entry, bit by bit as the geometry says.
fn address_of(level: &Level, entry: u64) -> u64 {
    let mut address = 0;
    for segment in shape(level, entry).map_or(&[][..], |shape| &shape.address) {
        for bit in 0..segment.width {
            if entry >> (segment.entry_lsb + bit) & 1 == 1 {
                address |= 1 << (segment.address_lsb + bit);
            }
        }
    }
    address
}

/// An entry without its address bits.
fn pattern_of(level: &Level, entry: u64) -> u64 {
    let mut pattern = entry;
    for segment in shape(level, entry).map_or(&[][..], |shape| &shape.address) {
        for bit in 0..segment.width {
            pattern &= !(1 << (segment.entry_lsb + bit));
        }
    }
    pattern
}

/// Entries to ask about: nothing, everything, single bits and pairs set and cleared, what the format itself writes with each bit flipped, and anything.
fn entries(format: &mut dyn Format, level: u8, geometry: &Geometry, rng: &mut Rng) -> Vec<u64> {
    let mut entries = vec![0, u64::MAX, geometry.levels[usize::from(level)].absent];
    for one in 0..64 {
        entries.extend([1 << one, !(1 << one)]);
        entries.extend((0..one).flat_map(|other| [1 << one | 1 << other, 1 << one | 1 << other | 0b11]));
    }
    let mut own: Vec<u64> = (0..geometry.levels.len() as u8).filter_map(|next| format.encode_table(level, next).unwrap()).collect();
    for attributes in
        [Attributes::READ, Attributes::READ.with(Attributes::WRITE), Attributes::READ.with(Attributes::WRITE).with(Attributes::PRIVILEGED_ONLY)]
    {
        let leaves = (12..53).filter_map(|size| format.encode_leaf(level, size, attributes).unwrap());
        own.extend(leaves.map(|encoded| encoded.pattern));
    }
    for entry in own {
        entries.push(entry);
        entries.extend((0..64).map(|bit| entry ^ 1 << bit));
        entries.extend((0..100).map(|_| entry ^ (1 << rng.below(64)) ^ (1 << rng.below(64)) ^ (1 << rng.below(64))));
    }
    entries.extend((0..600).map(|_| rng.number()));
    entries.extend((0..200).map(|_| rng.number() | 0b11));
    entries
}

#[test]
fn wasm_and_native_decode_alike() {
    let mut rng = Rng::new(0x7472_616e);
    let (mut asked, mut kinds) = (0_u64, BTreeMap::new());
    for Pair { name, mut wasm, mut native, geometry } in pairs() {
        assert_eq!(wasm.geometry().unwrap(), geometry, "{name}");
        for (index, level) in geometry.levels.iter().enumerate() {
            let kind = index as u8;
            for entry in entries(&mut *native, kind, &geometry, &mut rng) {
                let pattern = pattern_of(level, entry);
                // What a table above may have handed down: anything at all.
                for inherited in [0, rng.below(16), rng.number()] {
                    let meaning = native.decode(kind, inherited, pattern).unwrap();
                    assert_eq!(wasm.decode(kind, inherited, pattern).unwrap(), meaning, "{name}: level {index}, {inherited:#x}, {pattern:#x}");
                    let discriminant = format!("{meaning:?}").split([' ', '(']).next().unwrap_or_default().to_owned();
                    *kinds.entry(discriminant).or_insert(0_u64) += 1;
                    asked += 1;
                }
                if asked % 16 == 0 {
                    let (one, other) = (native.explain(kind, 0, pattern).unwrap(), wasm.explain(kind, 0, pattern).unwrap());
                    assert_eq!(one, other, "{name}: level {index}, {pattern:#x}");
                    let (one, other) = (native.decode_entry(kind, 0, entry).unwrap(), wasm.decode_entry(kind, 0, entry).unwrap());
                    assert_eq!(one, other, "{name}: level {index}, {entry:#x}");
                }
            }
        }
        assert!(wasm.failed().is_none());
    }
    println!("{asked} patterns: {kinds:?}");
    assert!(["Absent", "Table", "Leaf", "Fault"].iter().all(|kind| kinds.get(*kind).is_some_and(|count| *count > 10_000)), "{kinds:?}");
}

#[test]
fn wasm_and_native_encode_alike_and_neither_widens() {
    let all: Vec<Attributes> = (0..1 << 10).filter_map(Attributes::from_bits).collect();
    let (mut made, mut refused) = (0_u64, 0_u64);
    for Pair { name, mut wasm, mut native, geometry } in pairs() {
        let levels = geometry.levels.len() as u8;
        for level in 0..levels {
            for next in 0..levels + 2 {
                let entry = native.encode_table(level, next).unwrap();
                assert_eq!(wasm.encode_table(level, next).unwrap(), entry, "{name}: level {level} to {next}");
                // A table entry that was made is one, of that kind, and restricts nothing: a leaf below means what it means by itself.
                let Some(entry) = entry else { continue };
                assert_eq!(entry, pattern_of(&geometry.levels[usize::from(level)], entry), "{name}: level {level} to {next}");
                match native.decode(level, 0, entry).unwrap() {
                    Meaning::Table { next: found, inherited } => assert_eq!((found.level, inherited), (next, 0), "{name}: level {level} to {next}"),
                    other => panic!("{name}: level {level} to {next} is {other:?}"),
                }
            }
            let sizes = geometry.levels[usize::from(level)].leaf_sizes;
            for size in (0..64).filter(|size| sizes >> size & 1 != 0 || [0, 8, 11, 12, 13, 14, 16, 21, 25, 30, 39, 63].contains(size)) {
                for attributes in &all {
                    let encoded = native.encode_leaf(level, size, *attributes).unwrap();
                    assert_eq!(wasm.encode_leaf(level, size, *attributes).unwrap(), encoded, "{name}: level {level}, 2^{size} bytes, {attributes}");
                    match encoded {
                        None => refused += 1,
                        Some(encoded) => {
                            made += 1;
                            assert!(sizes >> size & 1 != 0, "{name}: level {level} has no leaves of 2^{size} bytes");
                            check_leaf(&name, &mut *native, (&geometry, level), size, *attributes, encoded);
                        }
                    }
                }
            }
        }
    }
    println!("{made} leaves made, {refused} refused");
    assert!(made > 10_000 && refused > 10_000);
}

/// What was made grants no more than was asked for, says of itself what it grants, and is no address.
fn check_leaf(name: &str, native: &mut dyn Format, (geometry, level): (&Geometry, u8), size: u8, asked: Attributes, encoded: Encoded) {
    let what = || format!("{name}: level {level}, 2^{size} bytes, {asked}, {encoded:x?}");
    assert!(encoded.attributes.within(asked), "{}", what());
    let place = &geometry.levels[usize::from(level)];
    assert_eq!(pattern_of(place, encoded.pattern), encoded.pattern, "{}", what());
    match native.decode(level, 0, encoded.pattern).unwrap() {
        Meaning::Leaf { size_log2, attributes } => {
            assert_eq!(size_log2, size, "{}", what());
            assert!(attributes.within(encoded.attributes) && attributes.within(asked), "{} decodes as {attributes}", what());
            // Permissions are said exactly; marks may be set beforehand.
            let permissions = |attributes: Attributes| attributes.bits() & 0b1111;
            assert_eq!(permissions(attributes), permissions(encoded.attributes), "{} decodes as {attributes}", what());
        }
        other => panic!("{} decodes as {other:?}", what()),
    }
    let explained = native.explain(level, 0, encoded.pattern).unwrap();
    assert!(explained.iter().all(|finding| finding.severity == stagecraft::table::Severity::Info), "{}: {explained:?}", what());
}

/// Pages of 512 entries, in the order of the machine.
struct Pages(BTreeMap<u64, [u64; 512]>);

impl EntryMemory for Pages {
    fn read_entries(&self, address: Gpa, layout: EntryLayout, entries: &mut [u64]) -> Result<(), ReadError> {
        assert!(layout.bytes == 8 && address.0 % 4096 + entries.len() as u64 * 8 <= 4096, "reads stay within a page");
        let page = self.0.get(&(address.0 & !0xfff)).ok_or(ReadError(address))?;
        let first = (address.0 % 4096 / 8) as usize;
        entries.copy_from_slice(&page[first..first + entries.len()]);
        Ok(())
    }
}

/// What a walk finds: leaves with their attributes, and why the rest faults.
#[derive(Debug, Default, PartialEq)]
struct Found {
    leaves: Vec<(u64, u64, u64, Attributes)>,
    faults: Vec<(u64, u64, Cause)>,
}

impl Found {
    fn fault(&mut self, cause: Cause, first: u64, last: u64) {
        match self.faults.last_mut() {
            Some((_, end, known)) if end.checked_add(1) == Some(first) && *known == cause => *end = last,
            _ => self.faults.push((first, last, cause)),
        }
    }
}

impl Visitor for Found {
    fn piece(&mut self, piece: &Piece, _: &[Step]) -> Result<(), WalkError> {
        self.leaves.push((piece.iova.first, piece.iova.last, piece.address, piece.attributes));
        Ok(())
    }

    fn fault(&mut self, fault: &FaultAt<'_>) -> Result<(), WalkError> {
        self.fault(fault.cause, fault.span.first, fault.span.last);
        Ok(())
    }
}

/// The walk in its plainest form: every entry by itself, one direct question each.
struct Naive<'a> {
    format: &'a mut dyn Format,
    geometry: Geometry,
    pages: &'a Pages,
    found: Found,
}

impl Naive<'_> {
    fn root(&mut self, root: &Root) {
        let level = &self.geometry.levels[usize::from(root.level)];
        let top = u32::from(level.index_lsb + level.index_bits);
        let base = if top < 64 { root.first >> top << top } else { 0 };
        self.table(root.level, root.address, base, root.inherited, (root.first, root.last));
    }

    fn table(&mut self, kind: u8, table: u64, base: u64, inherited: u64, (from, to): (u64, u64)) {
        let level = self.geometry.levels[usize::from(kind)].clone();
        let size = 1_u64 << level.index_lsb;
        for index in 0..1_u64 << level.index_bits {
            let first = base + (index << level.index_lsb);
            let last = first + (size - 1);
            if last < from || first > to {
                continue;
            }
            let mut entry = [0];
            if self.pages.read_entries(Gpa(table + index * 8), EntryLayout { bytes: 8, order: self.geometry.order }, &mut entry).is_err() {
                self.found.fault(Cause::Missing, first, last);
                continue;
            }
            let [entry] = entry;
            let address = address_of(&level, entry);
            let too_large = self.geometry.output_bits < 64 && address >> self.geometry.output_bits != 0;
            match self.format.decode(kind, inherited, pattern_of(&level, entry)).unwrap() {
                Meaning::Absent => {}
                Meaning::Fault(fault) => self.found.fault(Cause::Entry(fault), first, last),
                Meaning::Leaf { .. } | Meaning::Table { .. } if too_large => self.found.fault(Cause::Entry(FaultKind::AddressSize), first, last),
                Meaning::Leaf { size_log2, attributes } => {
                    assert_eq!(1 << size_log2, size, "these formats have no leaves above their slots");
                    self.found.leaves.push((first, last, address, attributes));
                }
                Meaning::Table { next, inherited } => self.table(next.level, address, first, inherited, (from.max(first), to.min(last))),
                Meaning::Part { .. } | Meaning::WholeEntry => panic!("these formats have no such entries"),
            }
        }
    }
}

/// Pages of random entries: what the format would write and anything else, with the address of another such page in one of `links` entries.
fn random_pages(format: &mut dyn Format, geometry: &Geometry, rng: &mut Rng, roots: &[u64], links: u64) -> Pages {
    const TABLES: u64 = 0x4000_0000;
    let mut own = vec![0, 0, 0];
    for level in 0..geometry.levels.len() as u8 {
        own.extend((0..geometry.levels.len() as u8).filter_map(|next| format.encode_table(level, next).unwrap()));
        for attributes in [Attributes::READ, Attributes::READ.with(Attributes::WRITE), Attributes::READ.with(Attributes::PRIVILEGED_ONLY)] {
            own.extend((12..53).filter_map(|size| format.encode_leaf(level, size, attributes).unwrap()).map(|encoded| encoded.pattern));
        }
    }
    let mut entry = |_| {
        let address = match rng.below(19) {
            _ if rng.below(links) == 0 => TABLES + rng.below(16) * 4096,
            0..11 => rng.number() >> rng.below(40) & 0x0000_ffff_ffff_f000,
            11..15 => rng.number() & 0x0000_00ff_c000_0000,
            _ => rng.number() & 0x000f_ffff_ffff_f000,
        };
        match rng.below(10) {
            0..5 => rng.pick(&own) | address,
            5..8 => (rng.pick(&own) | address) ^ 1 << rng.below(64),
            8 => rng.number(),
            // A run of equal patterns is made below.
            _ => 0,
        }
    };
    let mut page = || {
        let mut page: [u64; 512] = std::array::from_fn(&mut entry);
        // Runs of equal patterns with different addresses, as real tables have.
        for start in (0..512).step_by(64) {
            let pattern = page[start] & 0xfff0_0000_0000_0fff;
            for offset in 1..(start / 64) * 8 + 1 {
                page[start + offset] = pattern | page[start + offset] & 0x000f_ffff_ffff_f000;
            }
        }
        page
    };
    let mut pages = BTreeMap::new();
    for index in 0..16 {
        pages.insert(TABLES + index * 4096, page());
    }
    for (root, bytes) in roots.iter().zip(geometry.roots.iter().map(|root| (1_u64 << geometry.levels[usize::from(root.level)].index_bits) * 8)) {
        for offset in (0..bytes.max(4096)).step_by(4096) {
            pages.insert((root & !0xfff) + offset, page());
        }
    }
    Pages(pages)
}

/// One format with random tables: the engine and the plain loop.
fn compare<F: sdk::Format + Send + 'static>(settings: Settings, seed: u64) -> Result<(usize, usize), TestCaseError> {
    let mut rng = Rng::new(seed);
    let open = |roots: &[(&'static str, u64)]| {
        let all: sdk::Settings = settings.iter().chain(roots).map(|(name, value)| ((*name).to_owned(), *value)).collect();
        Native(F::open(&all).unwrap())
    };
    let wanted: Vec<(&'static str, u64)> = [("root", 0x1000_0000), ("root-high", 0x2000_0000)].to_vec();
    let has_high = settings.iter().any(|(name, _)| *name == "input-bits-high");
    let roots = &wanted[..if has_high { 2 } else { 1 }];
    let mut direct = open(roots);
    let geometry = direct.geometry().unwrap();
    let addresses: Vec<u64> = geometry.roots.iter().map(|root| root.address).collect();
    let map = MemoryMap::everything(geometry.output_bits);
    let limits = Limits { tables: 2000, ..Limits::default() };
    // Tables that lead to too many others are made again with fewer links.
    let mut walk = |links| {
        let pages = random_pages(&mut direct, &geometry, &mut rng, &addresses, links);
        let mut found = Found::default();
        match Table::open(Box::new(open(roots))).unwrap().walk(&pages, &map, Span::ALL, &Budget::new(limits), &mut found) {
            Err(WalkError::Exhausted(_)) => None,
            walked => Some((walked.unwrap(), pages, found)),
        }
    };
    let Some((_, pages, found)) = [20, 60, 180, 540].into_iter().find_map(&mut walk) else { return Ok((0, 0)) };
    let mut naive = Naive { format: &mut direct, geometry: geometry.clone(), pages: &pages, found: Found::default() };
    for root in &geometry.roots {
        naive.root(root);
    }
    let expected = naive.found;
    for (index, leaf) in expected.leaves.iter().enumerate() {
        prop_assert_eq!(found.leaves.get(index), Some(leaf), "{} {:?}, leaf {}", F::NAME, settings, index);
    }
    prop_assert_eq!(found.leaves.len(), expected.leaves.len());
    prop_assert_eq!(&found.faults, &expected.faults, "{} {:?}", F::NAME, settings);
    Ok((found.leaves.len(), found.faults.len()))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_engine_makes_of_random_entries_what_a_plain_loop_makes(seed: u64) {
        let mut total = (0, 0);
        let mut add = |(leaves, faults): (usize, usize)| total = (total.0 + leaves, total.1 + faults);
        for settings in STAGE1 {
            add(compare::<Stage1>(settings, seed)?);
        }
        for settings in STAGE2 {
            add(compare::<Stage2>(settings, seed)?);
        }
        for settings in FIRST {
            add(compare::<FirstStage>(settings, seed)?);
        }
        for settings in SECOND {
            add(compare::<SecondStage>(settings, seed)?);
        }
        prop_assert!(total.0 > 500 && total.1 > 500, "{total:?}: too little to mean anything");
    }
}
