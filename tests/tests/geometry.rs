//! Shapes that no real format has: the engine walks and builds whatever a checked geometry says, and refuses what cannot be.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use stagecraft::memory::{Budget, Limits, MemoryMap};
use stagecraft::table::{
    Arena, Builder, ByteOrder, Collector, Encoded, FaultKind, Finding, Format, FormatError, Geometry, Level, Mapping, Mark, Meaning, Next, Piece,
    Root, Segment, Shape, Table,
};
use stagecraft::{Access, Attributes, Span};

/// A format made up from its geometry. Pattern bits stand right below the address field: 0 leaf, 1 table (none: absent), 2 write, 3 size above the slot.
#[derive(Clone, Debug)]
struct Toy {
    geometry: Geometry,
    /// Pages of this many slots (log2) can be made, and are told by bit 3 or only by the address bits.
    group_log2: u8,
    by_address: bool,
}

const LEAF: u64 = 1;
const TABLE: u64 = 2;
const WRITE: u64 = 4;
const GROUP: u64 = 8;

impl Toy {
    /// `widths` index bits per level from the root; the lowest page has `2^page` bytes; addresses of `output_bits` bits.
    fn new(widths: &[u8], page: u8, entry_bytes: u8, order: ByteOrder, group_log2: u8, by_address: bool) -> Self {
        let output_bits = if entry_bytes == 4 { 27 + page.min(12) - 12 } else { 52 };
        let mut levels = Vec::new();
        let mut lsb = page;
        for width in widths.iter().rev() {
            // The address stands shifted down by four, so that it has to be moved, and is cut in two where entries are wide.
            let down = |low: u8, high: u8| Segment { entry_lsb: low - 8 + 4, address_lsb: low, width: high - low };
            let address = |low: u8| {
                if entry_bytes == 8 && low < 40 {
                    vec![down(low, 40), Segment { entry_lsb: 50, address_lsb: 40, width: output_bits - 40 }]
                } else {
                    vec![down(low, output_bits)]
                }
            };
            let table_low = 12.min(page);
            let mut shapes = vec![Shape { mask: LEAF | TABLE, value: TABLE, address: address(table_low) }];
            if lsb < output_bits {
                shapes.push(Shape { mask: LEAF | TABLE, value: LEAF, address: address(lsb) });
            }
            let leaf_sizes =
                if lsb < output_bits { 1_u64 << lsb | if group_log2 > 0 && lsb == page { 1 << (lsb + group_log2) } else { 0 } } else { 0 };
            levels.insert(
                0,
                Level {
                    number: 0,
                    index_lsb: lsb,
                    index_bits: *width,
                    shapes,
                    leaf_sizes,
                    absent: 0,
                    accessed: Mark::default(),
                    dirty: Mark::default(),
                    table_accessed: Mark::default(),
                },
            );
            lsb += width;
        }
        for (number, level) in levels.iter_mut().enumerate() {
            level.number = number as i8;
        }
        let root = Root { setting: "root".to_owned(), first: 0, last: (1 << lsb) - 1, ..Root::default() };
        Self {
            geometry: Geometry {
                roots: vec![root],
                levels,
                entry_bytes,
                order,
                output_bits,
                privileged: false,
                untranslated: Vec::new(),
                no_tables_in: 0,
            },
            group_log2,
            by_address,
        }
    }

    fn at(&self, root: u64) -> Self {
        let mut toy = self.clone();
        toy.geometry.roots[0].address = root;
        toy
    }

    fn meaning(&self, level: u8, pattern: u64, whole: bool) -> Meaning {
        let attributes = if pattern & WRITE != 0 { Attributes::READ.with(Attributes::WRITE) } else { Attributes::READ };
        let lsb = self.geometry.levels[usize::from(level)].index_lsb;
        match pattern & (LEAF | TABLE) {
            0 => Meaning::Absent,
            LEAF if pattern & GROUP == 0 => Meaning::Leaf { size_log2: lsb, attributes },
            LEAF if self.by_address && !whole => Meaning::WholeEntry,
            LEAF => Meaning::Leaf { size_log2: lsb + self.group_log2, attributes },
            TABLE => Meaning::Table { next: Next { level: level + 1, first: 0, last: u16::MAX }, inherited: 0 },
            _ => Meaning::Fault(FaultKind::Reserved),
        }
    }
}

impl Format for Toy {
    fn geometry(&mut self) -> Result<Geometry, FormatError> {
        Ok(self.geometry.clone())
    }

    fn decode(&mut self, level: u8, _: u64, pattern: u64) -> Result<Meaning, FormatError> {
        Ok(self.meaning(level, pattern, false))
    }

    fn decode_entry(&mut self, level: u8, _: u64, entry: u64) -> Result<Meaning, FormatError> {
        Ok(self.meaning(level, entry, true))
    }

    fn explain(&mut self, _: u8, _: u64, _: u64) -> Result<Vec<Finding>, FormatError> {
        Ok(Vec::new())
    }

    fn encode_leaf(&mut self, level: u8, size_log2: u8, attributes: Attributes) -> Result<Option<Encoded>, FormatError> {
        if !attributes.contains(Attributes::READ) {
            return Ok(None);
        }
        let write = attributes.contains(Attributes::WRITE);
        let granted = if write { Attributes::READ.with(Attributes::WRITE) } else { Attributes::READ };
        let group = size_log2 != self.geometry.levels[usize::from(level)].index_lsb;
        let pattern = LEAF | if write { WRITE } else { 0 } | if group { GROUP } else { 0 };
        Ok(Some(Encoded { pattern, attributes: granted }))
    }

    fn encode_table(&mut self, level: u8, next: u8) -> Result<Option<u64>, FormatError> {
        Ok((next == level + 1).then_some(TABLE))
    }
}

fn toys() -> impl Strategy<Value = Toy> {
    (prop::collection::vec(1_u8..=9, 1..=6), 12_u8..=16, any::<bool>(), any::<bool>(), 0_u8..=3, any::<bool>()).prop_filter_map(
        "fits 64 bits",
        |(widths, page, wide, big, group, by_address)| {
            let entry_bytes = if wide { 8 } else { 4 };
            let order = if big { ByteOrder::Big } else { ByteOrder::Little };
            let total: u8 = widths.iter().sum::<u8>() + page;
            let group = group.min(*widths.last().expect("one level"));
            let page = if wide { page } else { 12 };
            (total < 60).then(|| Toy::new(&widths, page, entry_bytes, order, group, by_address))
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_geometry_is_built_and_walked(toy in toys(), seeds in prop::collection::vec((any::<u64>(), any::<u64>(), 1_u64..40, any::<bool>()), 1..30)) {
        let page = toy.geometry.levels.last().unwrap().index_lsb;
        let last = toy.geometry.roots[0].last;
        let out = (1_u64 << toy.geometry.output_bits) - 1;
        let mut pieces: Vec<Piece> = seeds
            .iter()
            .filter_map(|(iova, address, pages, write)| {
                let (first, address) = (iova & last & !((1 << page) - 1), address & out & !((1 << page) - 1));
                let end = first.checked_add((pages << page) - 1).filter(|end| *end <= last)?;
                (address + (end - first) <= out).then(|| {
                    let attributes = if *write { Attributes::READ.with(Attributes::WRITE) } else { Attributes::READ };
                    Piece { iova: Span { first, last: end }, address, attributes }
                })
            })
            .collect();
        pieces.sort_by_key(|piece| piece.iova.first);
        let mut next = 0;
        pieces.retain(|piece| {
            let keep = piece.iova.first >= next;
            if keep {
                next = piece.iova.last + 1;
            }
            keep
        });
        let mut arena = Arena::new(0x20_0000, 0x400_0000);
        let mut builder = Builder::new(Box::new(toy.clone()), &mut arena).unwrap();
        for piece in &pieces {
            builder.map(piece).unwrap();
        }
        let built = builder.finish().unwrap();
        prop_assert!(built.losses.is_empty());
        let mut table = Table::open(Box::new(toy.at(built.roots[0].1.0))).unwrap();
        let mut collector = Collector::new(false, 4);
        table.walk(&arena, &MemoryMap::everything(52), Span::ALL, &Budget::new(Limits::default()), &mut collector).unwrap();
        prop_assert_eq!(collector.faults(), &[][..]);
        let mut expected: Vec<Mapping> = Vec::new();
        for piece in &pieces {
            let mapping = Mapping { iova: piece.iova, address: piece.address, access: Access { read: true, write: piece.attributes.contains(Attributes::WRITE) } };
            match expected.last_mut() {
                Some(last) if last.iova.last + 1 == piece.iova.first && last.access == mapping.access && last.address + (last.iova.last - last.iova.first) + 1 == piece.address => {
                    last.iova.last = piece.iova.last;
                }
                _ => expected.push(mapping),
            }
        }
        prop_assert_eq!(collector.mappings(), &expected[..]);
    }

    /// Tables full of anything end within the budget and never panic.
    #[test]
    fn any_memory_is_walked(toy in toys(), words in prop::collection::vec(any::<u64>(), 64), sparse in any::<bool>()) {
        struct Noise(Vec<u64>, bool);
        impl stagecraft::memory::EntryMemory for Noise {
            fn read_entries(&self, address: stagecraft::Gpa, _: stagecraft::memory::EntryLayout, entries: &mut [u64]) -> Result<(), stagecraft::memory::ReadError> {
                for (index, entry) in entries.iter_mut().enumerate() {
                    let word = self.0[(address.0 as usize / 8 + index) % self.0.len()].rotate_left((address.0 % 61) as u32);
                    *entry = if self.1 && index % 7 != 0 { 0 } else { word };
                }
                Ok(())
            }
        }
        let mut table = Table::open(Box::new(toy.at(0x1000))).unwrap();
        let limits = Limits { tables: 2_000, leaves: 200_000, ..Limits::default() };
        let budget = Budget::new(limits);
        let mut collector = Collector::new(false, 4);
        let _ = table.walk(&Noise(words, sparse), &MemoryMap::everything(52), Span::ALL, &budget, &mut collector);
        prop_assert!(budget.tables_visited() <= limits.tables && budget.leaves_seen() <= limits.leaves);
    }
}

#[test]
fn a_missing_replica_is_a_hole() {
    let toy = Toy::new(&[4, 9], 12, 8, ByteOrder::Little, 3, true);
    let mut arena = Arena::new(0x20_0000, 0x400_0000);
    let mut builder = Builder::new(Box::new(toy.clone()), &mut arena).unwrap();
    builder.map(&Piece { iova: Span { first: 0x8000, last: 0xffff }, address: 0x10_0000, attributes: Attributes::READ }).unwrap();
    let built = builder.finish().unwrap();
    assert_eq!(built.leaves, 8, "one page of eight slots, in every slot");
    /// Memory in which one entry reads as absent.
    struct Without<'a>(&'a Arena, u64);
    impl stagecraft::memory::EntryMemory for Without<'_> {
        fn read_entries(
            &self,
            address: stagecraft::Gpa,
            layout: stagecraft::memory::EntryLayout,
            entries: &mut [u64],
        ) -> Result<(), stagecraft::memory::ReadError> {
            self.0.read_entries(address, layout, entries)?;
            for (index, entry) in entries.iter_mut().enumerate() {
                if address.0 + index as u64 * 8 == self.1 {
                    *entry = 0;
                }
            }
            Ok(())
        }
    }
    let walk = |hole: u64| {
        let mut table = Table::open(Box::new(toy.at(built.roots[0].1.0))).unwrap();
        let mut collector = Collector::new(false, 4);
        table.walk(&Without(&arena, hole), &MemoryMap::everything(52), Span::ALL, &Budget::new(Limits::default()), &mut collector).unwrap();
        collector.into_mappings()
    };
    assert_eq!(walk(0).len(), 1);
    let leaf_table = arena.pages().map(|(address, _)| address.0).find(|address| *address != built.roots[0].1.0).unwrap();
    let holed = walk(leaf_table + 11 * 8);
    assert_eq!(holed.len(), 2);
    assert_eq!((holed[0].iova, holed[1].iova), (Span { first: 0x8000, last: 0xafff }, Span { first: 0xc000, last: 0xffff }));
    assert_eq!(holed[1].address, 0x10_4000);
}

#[test]
fn nonsense_is_refused() {
    let good = Toy::new(&[9, 9], 12, 8, ByteOrder::Little, 0, false).geometry;
    assert_eq!(good.check(), Ok(()));
    let refuse = |what: &str, change: &dyn Fn(&mut Geometry)| {
        let mut geometry = good.clone();
        change(&mut geometry);
        assert!(geometry.check().is_err(), "{what} was accepted");
    };
    refuse("entries of 5 bytes", &|g| g.entry_bytes = 5);
    refuse("no levels", &|g| g.levels.clear());
    refuse("33 levels", &|g| g.levels = vec![g.levels[0].clone(); 33]);
    refuse("9 roots", &|g| g.roots = vec![g.roots[0].clone(); 9]);
    refuse("a root of a level that is not there", &|g| g.roots[0].level = 2);
    refuse("a root wider than its table", &|g| g.roots[0].last = 1 << 40);
    refuse("an empty root", &|g| g.roots[0].first = g.roots[0].last + 1);
    refuse("overlapping roots", &|g| g.roots.push(g.roots[0].clone()));
    refuse("a root beyond the output", &|g| g.roots[0].address = 1 << 52);
    refuse("a misaligned root", &|g| g.roots[0].address = 4);
    refuse("ignored bits that are walked", &|g| g.roots[0].ignored = 1 << 20);
    refuse("no index bits", &|g| g.levels[1].index_bits = 0);
    refuse("too many index bits", &|g| g.levels[1].index_bits = 17);
    refuse("index bits beyond 64", &|g| g.levels[1].index_lsb = 60);
    refuse("nine shapes", &|g| g.levels[1].shapes = vec![Shape::default(); 9]);
    refuse("a value outside its mask", &|g| g.levels[1].shapes[0].value = 1 << 63);
    refuse("a shape decided by its address", &|g| g.levels[1].shapes[0].mask |= 1 << 20);
    refuse("a shape decided by a later one's address", &|g| g.levels[1].shapes.insert(0, Shape { mask: 1 << 20, value: 0, address: Vec::new() }));
    // An earlier shape may be decided by address bits of a later one if another bit tells the two apart, and not otherwise.
    let with = |mask, value| {
        let mut geometry = good.clone();
        geometry.levels[1].shapes.insert(0, Shape { mask, value, address: Vec::new() });
        geometry.check()
    };
    assert!(with(1 << 20 | LEAF | TABLE, 1 << 20).is_ok(), "neither leaf nor table");
    let mut last = good.clone();
    last.levels[1].shapes.push(Shape { mask: 1 << 20, value: 0, address: Vec::new() });
    assert_eq!(last.check(), Ok(()), "an earlier one has matched what has its address there");
    assert!(with(1 << 20 | TABLE, 1 << 20).is_err(), "the leaf's address, and no bit that leaves do not have");
    assert!(with(1 << 20 | LEAF | TABLE, 1 << 20 | LEAF).is_err());
    assert!(with(1 << 20 | LEAF, 1 << 20 | LEAF).is_err());
    refuse("a segment without width", &|g| g.levels[1].shapes[0].address[0].width = 0);
    refuse("a segment that leaves the entry", &|g| g.levels[1].shapes[0].address[0].entry_lsb = 60);
    refuse("segments that overlap", &|g| g.levels[1].shapes[0].address = vec![Segment { entry_lsb: 12, address_lsb: 12, width: 8 }; 2]);
    refuse("tiny leaves", &|g| g.levels[1].leaf_sizes |= 1);
    refuse("13 bits too few of output", &|g| g.output_bits = 11);
}

/// The first shape that matches, and the rest of the entry.
fn matched(shapes: &[Shape], entry: u64) -> (Option<usize>, u64, u64) {
    let shape = shapes.iter().position(|shape| entry & shape.mask == shape.value);
    let address = shape.map_or(0, |index| shapes[index].address.iter().fold(0, |bits, s| bits | (u64::MAX >> (64 - s.width)) << s.entry_lsb));
    (shape, entry & !address, address)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]

    /// Shapes over eight bits, all of whose entries are tried: where the check passes, a pattern never stands for entries of two shapes.
    #[test]
    fn patterns_of_checked_shapes_tell_the_shape(words in prop::collection::vec((0_u64..256, 0_u64..256, 0_u8..7, 1_u8..4), 1..5)) {
        let shapes: Vec<Shape> = words
            .iter()
            .map(|&(mask, value, lsb, width)| {
                let segment = Segment { entry_lsb: lsb, address_lsb: lsb + 12, width: width.min(8 - lsb) };
                let address = (u64::MAX >> (64 - segment.width)) << lsb;
                Shape { mask: mask & !address, value: value & mask & !address, address: vec![segment] }
            })
            .collect();
        let mut geometry = Toy::new(&[9], 12, 8, ByteOrder::Little, 0, false).geometry;
        geometry.levels[0].shapes.clone_from(&shapes);
        let sound = (0..256).all(|entry| {
            let (shape, pattern, address) = matched(&shapes, entry);
            // What the engine does with a remembered pattern: compare under its mask.
            (0..256).filter(|other| other & !address == pattern).all(|other| matched(&shapes, other).0 == shape)
        });
        if geometry.check().is_ok() {
            prop_assert!(sound, "{shapes:x?}");
        }
    }
}

#[test]
fn a_shape_decided_by_address_bits_of_another_is_walked_right() {
    // One level; bit 18 tells large leaves from small ones, and is an address bit of neither but of what has bit 1 clear.
    struct Sections(Geometry);
    impl Format for Sections {
        fn geometry(&mut self) -> Result<Geometry, FormatError> {
            Ok(self.0.clone())
        }
        fn decode(&mut self, _: u8, _: u64, pattern: u64) -> Result<Meaning, FormatError> {
            Ok(match pattern & (1 << 18 | 2) {
                2 => Meaning::Leaf { size_log2: 20, attributes: Attributes::READ },
                0 => Meaning::Fault(if pattern == 1 { FaultKind::Reserved } else { FaultKind::Translation }),
                _ => Meaning::Leaf { size_log2: 24, attributes: Attributes::READ.with(Attributes::WRITE) },
            })
        }
        fn decode_entry(&mut self, _: u8, _: u64, _: u64) -> Result<Meaning, FormatError> {
            Ok(Meaning::Absent)
        }
        fn explain(&mut self, _: u8, _: u64, _: u64) -> Result<Vec<Finding>, FormatError> {
            Ok(Vec::new())
        }
        fn encode_leaf(&mut self, _: u8, _: u8, _: Attributes) -> Result<Option<Encoded>, FormatError> {
            Ok(None)
        }
        fn encode_table(&mut self, _: u8, _: u8) -> Result<Option<u64>, FormatError> {
            Ok(None)
        }
    }
    struct Words(Vec<u64>);
    impl stagecraft::memory::EntryMemory for Words {
        fn read_entries(
            &self,
            address: stagecraft::Gpa,
            _: stagecraft::memory::EntryLayout,
            entries: &mut [u64],
        ) -> Result<(), stagecraft::memory::ReadError> {
            for (index, entry) in entries.iter_mut().enumerate() {
                *entry = self.0.get((address.0 - 0x4000) as usize / 4 + index).copied().unwrap_or(0);
            }
            Ok(())
        }
    }
    let in_place = |lsb: u8, width: u8| Segment { entry_lsb: lsb, address_lsb: lsb, width };
    let large = vec![in_place(24, 8), Segment { entry_lsb: 20, address_lsb: 32, width: 4 }, Segment { entry_lsb: 5, address_lsb: 36, width: 4 }];
    let shapes = vec![
        Shape { mask: 1 << 18 | 2, value: 1 << 18 | 2, address: large },
        Shape { mask: 2, value: 2, address: vec![in_place(20, 12)] },
        Shape { mask: 2, value: 0, address: vec![in_place(10, 22)] },
    ];
    let level = Level { index_lsb: 20, index_bits: 6, shapes, ..Level::default() };
    let root = Root { setting: "root".to_owned(), last: (1 << 26) - 1, address: 0x4000, ..Root::default() };
    let geometry = Geometry {
        roots: vec![root],
        levels: vec![level],
        entry_bytes: 4,
        order: ByteOrder::Little,
        output_bits: 40,
        privileged: false,
        untranslated: Vec::new(),
        no_tables_in: 0,
    };
    geometry.check().unwrap();
    // A table's address with bit 18, small leaves, a large one of 40 bits in all its slots, and the same entries again in another order.
    let mut words = vec![0x0004_0001, 0x1230_0002, 0x1240_0002, 0x1250_0002];
    words.resize(16, 0x0004_0001);
    words.extend([0x5674_0002 | 0xa << 20 & 0xf0_0000 | 0x9 << 5; 16]);
    words.extend([0x1230_0002, 0x0004_0001, 0x5674_0002 | 0x9 << 5]);
    let mut table = Table::open(Box::new(Sections(geometry))).unwrap();
    let mut collector = Collector::new(false, 64);
    table.walk(&Words(words.clone()), &MemoryMap::everything(40), Span::ALL, &Budget::new(Limits::default()), &mut collector).unwrap();
    let high = |entry: u64| (entry & 0xff00_0000) | (entry >> 20 & 0xf) << 32 | (entry >> 5 & 0xf) << 36;
    let mapping = |first: u64, size: u64, address, write| Mapping {
        iova: Span { first, last: first + size - 1 },
        address,
        access: Access { read: true, write },
    };
    let expected = [
        mapping(0x10_0000, 0x30_0000, 0x1230_0000, false),
        mapping(0x100_0000, 0x100_0000, high(words[16]), true),
        mapping(0x200_0000, 0x10_0000, 0x1230_0000, false),
        mapping(0x220_0000, 0x10_0000, high(words[34]) + 0x20_0000, true),
    ];
    assert_eq!(collector.mappings(), expected);
}

#[test]
fn tables_that_cannot_follow_are_refused_while_walking() {
    /// A format whose tables lead to themselves: the same kind again, as large as its own slot's table.
    struct Loop(Toy);
    impl Format for Loop {
        fn geometry(&mut self) -> Result<Geometry, FormatError> {
            self.0.geometry()
        }
        fn decode(&mut self, _: u8, _: u64, _: u64) -> Result<Meaning, FormatError> {
            Ok(Meaning::Table { next: Next { level: 0, first: 0, last: u16::MAX }, inherited: 0 })
        }
        fn decode_entry(&mut self, _: u8, _: u64, _: u64) -> Result<Meaning, FormatError> {
            Ok(Meaning::Absent)
        }
        fn explain(&mut self, _: u8, _: u64, _: u64) -> Result<Vec<Finding>, FormatError> {
            Ok(Vec::new())
        }
        fn encode_leaf(&mut self, _: u8, _: u8, _: Attributes) -> Result<Option<Encoded>, FormatError> {
            Ok(None)
        }
        fn encode_table(&mut self, _: u8, _: u8) -> Result<Option<u64>, FormatError> {
            Ok(None)
        }
    }
    let mut arena = Arena::new(0x20_0000, 0x400_0000);
    let toy = Toy::new(&[9, 9], 12, 8, ByteOrder::Little, 0, false);
    let mut builder = Builder::new(Box::new(toy.clone()), &mut arena).unwrap();
    builder.map(&Piece { iova: Span { first: 0, last: 0xfff }, address: 0x5000, attributes: Attributes::READ }).unwrap();
    let built = builder.finish().unwrap();
    let mut table = Table::open(Box::new(Loop(toy.at(built.roots[0].1.0)))).unwrap();
    let error =
        table.walk(&arena, &MemoryMap::everything(52), Span::ALL, &Budget::new(Limits::default()), &mut Collector::new(false, 1)).unwrap_err();
    assert!(error.to_string().contains("is followed by level kind 0"), "{error}");
}
