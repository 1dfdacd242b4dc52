//! `s390-zpci/dma`: up to three region tables, a segment table and page tables.
//!
//! * All entries are big-endian. They are valid while their invalid bit is *zero*: bit 10 in page tables, bit 5 in all others. Drivers leave the
//!   address in an entry that they invalidate.
//! * Region and segment entries name the kind of the table that they are in; a wrong one faults. Page tables have 256 entries (2 KiB), all others 2,048
//!   (16 KiB).
//! * A region entry says which quarters of the next table exist. zPCI as it is known wants all four, in a table that is aligned to its size; with
//!   `partial-tables` the processor's rules hold, and a table begins at any page.
//! * Protection forbids writes, at every level and in the anchor (`read-only`). Reads cannot be forbidden, so there is nothing that only writes.
//! * A segment entry with the format control is a frame of 1 MiB.
//!
//! `inherited` says what the anchor and the tables above take away: `NO_WRITE`.

use stagecraft_sdk::{
    Attributes, ByteOrder, Encoded, Error, FaultKind, Findings, Format, Kind, Level, Mark, MemoryType, Need, Next, Root, Segment, Settings, Shape,
};

use crate::spec::entry::{PROTECTED, page, region, segment, table};

const TABLES: &str = "SA22-7832 chapter 3, translation tables";
const REGION_ENTRIES: &str = "SA22-7832 chapter 3, region-table entries";
const SEGMENT_ENTRIES: &str = "SA22-7832 chapter 3, segment-table entries";
const PAGE_ENTRIES: &str = "SA22-7832 chapter 3, page-table entries";

pub(crate) const NAMES: &[&str] = &["levels", "root", "first-iova", "last-iova", "output-bits", "read-only", "page-1m", "partial-tables"];

/// `inherited`: the anchor or a table above forbids writes.
const NO_WRITE: u64 = 1;

/// Kinds of table by their index into [`Format::levels`]. Above [`SEGMENT_TABLE`] are the region tables: third, second, first.
const PAGE_TABLE: u8 = 0;
const SEGMENT_TABLE: u8 = 1;

/// `s390-zpci/dma`.
#[derive(Clone, Debug)]
#[allow(clippy::struct_excessive_bools)]
pub struct Dma {
    levels: u8,
    root: u64,
    first_iova: u64,
    last_iova: u64,
    output_bits: u8,
    read_only: bool,
    page_1m: bool,
    partial_tables: bool,
}

/// The highest input address of tables with this many levels, 1 to 5.
pub(crate) const fn last_iova(levels: u8) -> u64 {
    u64::MAX >> (64 - slot_log2(levels) as u32)
}

/// Size of an entry's slot; of the whole table one level below.
const fn slot_log2(level: u8) -> u8 {
    match level {
        PAGE_TABLE => 12,
        _ => 20 + 11 * (level - 1),
    }
}

/// What entries of this table must have as their type.
const fn table_type(level: u8) -> u64 {
    table::TYPE.put(level.saturating_sub(SEGMENT_TABLE) as u64)
}

impl Dma {
    /// The word for entries of the root.
    fn root_inherited(&self) -> u64 {
        if self.read_only { NO_WRITE } else { 0 }
    }
}

impl Format for Dma {
    const NAME: &'static str = "s390-zpci/dma";

    fn open(settings: &Settings) -> Result<Self, Error> {
        settings.only(NAMES)?;
        let levels = settings.within("levels", 3, 1, 5, TABLES)? as u8;
        let widest = last_iova(levels);
        let format = Self {
            levels,
            root: settings.or("root", 0),
            first_iova: settings.or("first-iova", 0),
            last_iova: settings.or("last-iova", widest),
            output_bits: settings.within("output-bits", 64, 12, 64, TABLES)? as u8,
            read_only: settings.flag("read-only", false)?,
            page_1m: settings.flag("page-1m", true)?,
            partial_tables: settings.flag("partial-tables", false)?,
        };
        let refuse = |name, value, reason| Err(Error::invalid(name, value, TABLES, reason));
        if format.root & 0xfff != 0 {
            return refuse("root", format.root, "the root table must be aligned to 4096 bytes");
        }
        if format.first_iova & 0xfff != 0 || format.first_iova > widest {
            return refuse("first-iova", format.first_iova, "must be the first byte of a page that the tables can hold");
        }
        if format.last_iova & 0xfff != 0xfff || format.last_iova < format.first_iova {
            return refuse("last-iova", format.last_iova, "must be the last byte of a page, not below first-iova");
        }
        Ok(Self { last_iova: format.last_iova.min(widest), ..format })
    }

    fn suggest(settings: &Settings, need: &Need) -> Result<Settings, Error> {
        let mut settings = settings.clone();
        // As Linux does: no more levels than needed, and never less than a region-third table.
        let last = if need.first_high.is_some() { u64::MAX } else { need.last_low.unwrap_or(0) };
        settings.set_default("levels", (3..5).find(|levels| last <= last_iova(*levels)).unwrap_or(5).into());
        Self::open(&settings)?;
        Ok(NAMES.iter().filter_map(|&name| Some((name.to_owned(), settings.get(name)?))).collect())
    }

    fn candidates() -> Vec<Settings> {
        let whole = [3, 4, 5, 2, 1].map(|levels| Settings::of(&[("levels", levels)]));
        let partial = [3, 4, 5].map(|levels| Settings::of(&[("levels", levels), ("partial-tables", 1)]));
        whole.into_iter().chain(partial).collect()
    }

    fn levels(&self) -> Vec<Level> {
        let in_place = |(high, low)| vec![Segment::in_place(high, low)];
        let level = |level: u8| {
            // The address is one also in an invalid entry: drivers leave it there, and it must not make a pattern of its own.
            let shapes = match level {
                PAGE_TABLE => vec![Shape { mask: 0, value: 0, address: in_place(page::FRAME_ORIGIN) }],
                SEGMENT_TABLE => vec![
                    Shape { mask: segment::FRAME, value: segment::FRAME, address: in_place(segment::FRAME_ORIGIN) },
                    Shape { mask: segment::FRAME, value: 0, address: in_place(segment::ORIGIN) },
                ],
                _ => vec![Shape { mask: 0, value: 0, address: in_place(if self.partial_tables { region::ORIGIN } else { region::WHOLE_ORIGIN }) }],
            };
            let has_leaves = level == PAGE_TABLE || (level == SEGMENT_TABLE && self.page_1m);
            Level {
                // The type of its entries; page tables have none.
                number: level as i8 - SEGMENT_TABLE as i8,
                index_lsb: slot_log2(level),
                index_bits: if level == PAGE_TABLE { 8 } else { 11 },
                shapes,
                leaf_sizes: if has_leaves { 1 << slot_log2(level) } else { 0 },
                absent: if level == PAGE_TABLE { page::INVALID } else { table::INVALID },
                accessed: Mark::default(),
                dirty: Mark::default(),
                table_accessed: Mark::default(),
            }
        };
        (0..self.levels).map(level).collect()
    }

    fn roots(&self) -> Vec<Root> {
        vec![Root {
            setting: "root",
            first: self.first_iova,
            last: self.last_iova,
            ignored: 0,
            address: self.root,
            level: self.levels - 1,
            inherited: self.root_inherited(),
        }]
    }

    fn output_bits(&self) -> u8 {
        self.output_bits
    }

    fn byte_order(&self) -> ByteOrder {
        ByteOrder::Big
    }

    fn kind(&self, level: u8, pattern: u64) -> Kind {
        let invalid = if level == PAGE_TABLE { page::INVALID } else { table::INVALID };
        if pattern & invalid != 0 {
            Kind::Absent
        } else if level == PAGE_TABLE || (level == SEGMENT_TABLE && pattern & segment::FRAME != 0) {
            Kind::Leaf
        } else {
            Kind::Table
        }
    }

    fn check(&self, level: u8, kind: Kind, inherited: u64, pattern: u64, findings: &mut Findings) {
        let _ = inherited;
        let ignored = "these bits are not assigned, and ignored";
        if kind == Kind::Absent {
            return;
        }
        if level == PAGE_TABLE {
            findings.should_be_zero(pattern, page::UNASSIGNED, PAGE_ENTRIES, ignored);
            return;
        }
        let section = if level == SEGMENT_TABLE { SEGMENT_ENTRIES } else { REGION_ENTRIES };
        if level > SEGMENT_TABLE {
            let (offset, length) = (region::OFFSET.of(pattern), region::LENGTH.of(pattern));
            let bits = region::OFFSET.mask() | region::LENGTH.mask();
            if !self.partial_tables && (offset != 0 || length != region::WHOLE) {
                findings.error(FaultKind::Reserved, bits, section, "the next table must be whole: offset 0 and length 3 (INVALTL)");
            } else if offset > length {
                findings.error(FaultKind::Reserved, bits, section, "the next table ends before it begins: its offset is above its length (INVALTL)");
            }
        }
        if table::TYPE.in_place(pattern) != table_type(level) {
            findings.error(FaultKind::Reserved, table::TYPE.mask(), section, "the type of the entry is not that of its table (TT)");
        }
        if kind == Kind::Leaf && !self.page_1m {
            findings.reserved(pattern, segment::FRAME, section, "there are no frames of 1 MiB here");
        }
        let unassigned = match level {
            SEGMENT_TABLE => segment::UNASSIGNED,
            _ if self.partial_tables => region::UNASSIGNED,
            _ => region::WHOLE_UNASSIGNED,
        };
        findings.should_be_zero(pattern, unassigned, section, ignored);
    }

    fn next(&self, level: u8, pattern: u64) -> Next {
        let below = level.saturating_sub(1);
        let (offset, length) = (region::OFFSET.of(pattern) as u16, region::LENGTH.of(pattern) as u16);
        if level <= SEGMENT_TABLE || (offset == 0 && u64::from(length) == region::WHOLE) {
            return Next::whole(below);
        }
        Next { level: below, first: offset * region::QUARTER, last: length * region::QUARTER + (region::QUARTER - 1) }
    }

    fn inherit(&self, level: u8, inherited: u64, pattern: u64) -> u64 {
        let _ = level;
        if pattern & PROTECTED != 0 { inherited | NO_WRITE } else { inherited }
    }

    fn leaf_size_log2(&self, level: u8, pattern: u64) -> u8 {
        let _ = pattern;
        slot_log2(level)
    }

    fn attributes(&self, level: u8, inherited: u64, pattern: u64) -> Attributes {
        Attributes {
            read: true,
            write: self.inherit(level, inherited, pattern) & NO_WRITE == 0,
            memory_type: MemoryType::WriteBack,
            coherent: true,
            ..Attributes::default()
        }
    }

    fn encode_leaf(&self, level: u8, size_log2: u8, attributes: Attributes) -> Option<Encoded> {
        let fits = level < self.levels && (level == PAGE_TABLE || (level == SEGMENT_TABLE && self.page_1m));
        // What may be written may be read.
        if !fits || size_log2 != slot_log2(level) || !attributes.read || attributes.privileged_only {
            return None;
        }
        let format_control = if level == SEGMENT_TABLE { table_type(level) | segment::FRAME } else { 0 };
        let pattern = format_control | if attributes.write && !self.read_only { 0 } else { PROTECTED };
        Some(Encoded { pattern, attributes: self.attributes(level, self.root_inherited(), pattern) })
    }

    fn encode_table(&self, level: u8, next: u8) -> Option<u64> {
        let whole = if level > SEGMENT_TABLE { region::LENGTH.put(region::WHOLE) } else { 0 };
        (level < self.levels && level.checked_sub(1) == Some(next)).then_some(table_type(level) | whole)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;
    use stagecraft_sdk::bits::mask;
    use stagecraft_sdk::{Meaning, Severity};

    use super::*;

    /// Address bits of a shape.
    fn address_bits(shape: &Shape) -> u64 {
        shape.address.iter().fold(0, |bits, segment| bits | mask(segment.entry_lsb + segment.width - 1, segment.entry_lsb))
    }

    fn open(settings: &[(&str, u64)]) -> Dma {
        Dma::open(&settings.iter().map(|&(name, value)| (name.to_owned(), value)).collect()).unwrap()
    }

    fn leaf(size_log2: u8, write: bool) -> Meaning {
        Meaning::Leaf { size_log2, attributes: Attributes { read: true, write, coherent: true, ..Attributes::default() } }
    }

    fn table_to(level: u8, inherited: u64) -> Meaning {
        Meaning::Table { next: Next::whole(level), inherited }
    }

    const RESERVED: Meaning = Meaning::Fault(FaultKind::Reserved);

    /// Entries as a driver writes them: level by level.
    const DRIVER: [u64; 5] = [0, 0, 0x7, 0xb, 0xf];

    #[test]
    fn every_bit_of_every_kind_of_entry() {
        let format = open(&[("levels", 5)]);
        for bit in 0..12 {
            let expected = match bit {
                10 => Meaning::Absent,
                9 => leaf(12, false),
                _ => leaf(12, true),
            };
            assert_eq!(format.decode(0, 0, 1 << bit), expected, "page bit {bit}");
        }
        for bit in 0..11 {
            let expected = match bit {
                2 | 3 => RESERVED,
                5 => Meaning::Absent,
                9 => table_to(0, NO_WRITE),
                10 => leaf(20, true),
                _ => table_to(0, 0),
            };
            assert_eq!(format.decode(1, 0, 1 << bit), expected, "segment bit {bit}");
        }
        for bit in 0..20 {
            let expected = match bit {
                2 | 3 => RESERVED,
                5 => Meaning::Absent,
                9 => leaf(20, false),
                10 => table_to(0, 0),
                _ => leaf(20, true),
            };
            assert_eq!(format.decode(1, 0, 0x400 ^ 1 << bit), expected, "frame of 1 MiB, bit {bit}");
        }
        for level in 2..5 {
            for bit in 0..14 {
                let expected = match bit {
                    0..=3 | 6 | 7 => RESERVED,
                    5 => Meaning::Absent,
                    9 => table_to(level - 1, NO_WRITE),
                    _ => table_to(level - 1, 0),
                };
                assert_eq!(format.decode(level, 0, DRIVER[usize::from(level)] ^ 1 << bit), expected, "region level {level} bit {bit}");
            }
        }
    }

    #[test]
    fn unused_slots_are_absent_and_hold_what_drivers_write() {
        let format = open(&[("levels", 5)]);
        let absent: Vec<u64> = format.levels().iter().map(|level| level.absent).collect();
        assert_eq!(absent, [0x400, 0x20, 0x20, 0x20, 0x20]);
        for (level, entry) in (0..5).zip(absent) {
            assert_eq!(format.decode(level, 0, entry), Meaning::Absent);
            assert!(format.explain(level, 0, entry).is_empty());
        }
    }

    #[test]
    fn the_type_must_be_that_of_the_table() {
        let format = open(&[("levels", 5)]);
        for level in 1..5_u8 {
            for kind in 0..4_u64 {
                let entry = DRIVER[usize::from(level)] & !0xc | kind << 2;
                let expected = if kind == u64::from(level) - 1 { table_to(level - 1, 0) } else { RESERVED };
                assert_eq!(format.decode(level, 0, entry), expected, "level {level} type {kind}");
            }
        }
    }

    #[test]
    fn region_entries_say_which_quarters_exist() {
        let (whole, partial) = (open(&[("levels", 5)]), open(&[("levels", 5), ("partial-tables", 1)]));
        for (level, base) in [(2, 0x4), (3, 0x8), (4, 0xc)] {
            for (offset, length) in (0..4).flat_map(|offset| (0..4).map(move |length| (offset, length))) {
                let entry = base | offset << 6 | length;
                let all = (offset, length) == (0, 3);
                assert_eq!(whole.decode(level, 0, entry), if all { table_to(level - 1, 0) } else { RESERVED });
                let part = Next { level: level - 1, first: offset as u16 * 512, last: if all { u16::MAX } else { length as u16 * 512 + 511 } };
                let expected = if offset <= length { Meaning::Table { next: part, inherited: 0 } } else { RESERVED };
                assert_eq!(partial.decode(level, 0, entry), expected);
            }
        }
        // Such tables begin at any page, whole ones at a multiple of their size.
        let origin = |format: &Dma| format.levels()[2..].iter().map(|level| address_bits(&level.shapes[0])).collect::<Vec<_>>();
        assert_eq!((origin(&whole), origin(&partial)), (vec![!0x3fff; 3], vec![!0xfff; 3]));
        // Segment entries have no such fields.
        assert_eq!(partial.decode(1, 0, 0xc3), table_to(0, 0));
    }

    #[test]
    fn protection_comes_from_every_level_and_from_the_anchor() {
        let format = open(&[]);
        for protected in 0..8_u64 {
            let entry = |level: u8| DRIVER[usize::from(level)] | ((protected >> level & 1) * 0x200);
            let below = format.inherit(1, format.inherit(2, 0, entry(2)), entry(1));
            assert_eq!(format.decode(0, below, entry(0)), leaf(12, protected == 0));
        }
        let read_only = open(&[("read-only", 1)]);
        assert_eq!(read_only.decode(0, read_only.roots()[0].inherited, 0), leaf(12, false));
        assert_eq!(format.roots()[0].inherited, 0);
    }

    #[test]
    fn frames_of_1_mib_are_an_option() {
        let without = open(&[("page-1m", 0)]);
        assert_eq!(without.decode(1, 0, 0x400), RESERVED);
        assert_eq!(without.decode(1, 0, 0x420), Meaning::Absent);
        assert_eq!(without.levels().iter().map(|level| level.leaf_sizes).collect::<Vec<_>>(), [1 << 12, 0, 0]);
        assert_eq!(open(&[]).levels().iter().map(|level| level.leaf_sizes).collect::<Vec<_>>(), [1 << 12, 1 << 20, 0]);
        assert_eq!(without.encode_leaf(1, 20, Attributes { read: true, ..Attributes::default() }), None);
    }

    #[test]
    fn what_is_written_is_what_drivers_write() {
        let format = open(&[("levels", 5)]);
        let asked = |read, write| Attributes { read, write, coherent: true, ..Attributes::default() };
        assert_eq!(format.encode_leaf(0, 12, asked(true, true)).unwrap().pattern, 0);
        assert_eq!(format.encode_leaf(0, 12, asked(true, false)).unwrap().pattern, 0x200);
        assert_eq!(format.encode_leaf(0, 12, asked(false, true)), None);
        assert_eq!(format.encode_leaf(0, 12, asked(false, false)), None);
        assert_eq!(format.encode_leaf(0, 12, Attributes { privileged_only: true, ..asked(true, true) }), None);
        assert_eq!(format.encode_leaf(1, 20, asked(true, true)).unwrap().pattern, 0x400);
        assert_eq!(format.encode_leaf(2, 31, asked(true, true)), None);
        assert_eq!((1..5).map(|level| format.encode_table(level, level - 1).unwrap()).collect::<Vec<_>>(), DRIVER[1..]);
        assert_eq!(open(&[]).encode_table(3, 2), None);
        // What the anchor forbids is not promised.
        let granted = open(&[("read-only", 1)]).encode_leaf(0, 12, asked(true, true)).unwrap();
        assert_eq!((granted.pattern, granted.attributes), (0x200, asked(true, false)));
    }

    #[test]
    fn the_geometry_follows_levels_and_bounds() {
        let widths = [20, 31, 42, 53, 64];
        for (levels, width) in (1..=5).zip(widths) {
            let geometry = open(&[("levels", levels), ("root", 0xabc_d000)]).geometry();
            assert_eq!((geometry.entry_bytes, geometry.order, geometry.output_bits), (8, ByteOrder::Big, 64));
            let root = &geometry.roots[0];
            assert_eq!((root.first, root.last, root.address, root.setting), (0, u64::MAX >> (64 - width), 0xabc_d000, "root"));
            assert_eq!((u64::from(root.level) + 1, geometry.levels.len() as u64), (levels, levels));
            for (level, top) in geometry.levels.iter().zip(widths) {
                assert_eq!(u32::from(level.index_lsb + level.index_bits), top);
                let deciding = level.shapes.iter().fold(0, |bits, shape| bits | shape.mask);
                for shape in &level.shapes {
                    assert_eq!((shape.value & !shape.mask, address_bits(shape) & deciding), (0, 0));
                }
            }
        }
        let bounded = open(&[("first-iova", 0x1_0000_0000), ("last-iova", 0x1_37ff_ffff)]).geometry();
        assert_eq!((bounded.roots[0].first, bounded.roots[0].last), (0x1_0000_0000, 0x1_37ff_ffff));
        assert_eq!(open(&[("last-iova", u64::MAX)]).geometry().roots[0].last, (1 << 42) - 1);
    }

    #[test]
    fn bad_settings_are_refused_by_name() {
        for (name, value) in [
            ("levels", 0),
            ("levels", 6),
            ("root", 0x800),
            ("first-iova", 1),
            ("first-iova", 1 << 42),
            ("last-iova", 0x1000),
            ("output-bits", 11),
            ("output-bits", 65),
            ("read-only", 2),
            ("page-1m", 2),
            ("partial-tables", 2),
            ("designation", 1),
        ] {
            match Dma::open(&[(name.to_owned(), value)].into_iter().collect()) {
                Err(Error::Invalid(invalid)) => assert_eq!((invalid.field.as_str(), invalid.value), (name, value)),
                other => panic!("{name}: {other:?}"),
            }
        }
        let crossed = [("first-iova".to_owned(), 0x2000), ("last-iova".to_owned(), 0x1fff)];
        assert!(Dma::open(&crossed.into_iter().collect()).is_err());
    }

    #[test]
    fn suggestions_are_sensible_and_leave_given_settings_alone() {
        let suggest = |given: &[(&str, u64)], last_low, first_high| {
            let given = given.iter().map(|&(name, value)| (name.to_owned(), value)).collect();
            let need = Need { last_low, first_high, last_address: u64::MAX, alignment_log2: 12 };
            Dma::suggest(&given, &need).unwrap().iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(suggest(&[], None, None), "levels=3");
        assert_eq!(suggest(&[], Some((1 << 42) - 1), None), "levels=3");
        assert_eq!(suggest(&[], Some(1 << 42), None), "levels=4");
        assert_eq!(suggest(&[], Some(1 << 53), None), "levels=5");
        assert_eq!(suggest(&[], Some(0), Some(u64::MAX << 47)), "levels=5");
        assert_eq!(suggest(&[("page-1m", 0), ("levels", 2)], Some(1 << 53), None), "levels=2 page-1m=0");
    }

    proptest! {
        #[test]
        fn encoding_never_grants_more_and_decodes_to_what_it_says(
            word in 0_u64..1 << 10, level in 0_u8..6, size in 10_u8..40, levels in 1_u64..6, flags in 0_u64..8,
        ) {
            let flag = |position: u32| flags >> position & 1;
            let format = open(&[("levels", levels), ("page-1m", flag(0)), ("read-only", flag(1)), ("partial-tables", flag(2))]);
            let asked = Attributes::unpack(word);
            let Some(encoded) = format.encode_leaf(level, size, asked) else { return Ok(()) };
            let geometry = format.geometry();
            let kind = &geometry.levels[usize::from(level)];
            let shape = kind.shapes.iter().find(|s| encoded.pattern & s.mask == s.value).unwrap();
            prop_assert!(kind.leaf_sizes & 1 << size != 0);
            prop_assert_eq!(encoded.pattern & address_bits(shape), 0);
            let inherited = geometry.roots[0].inherited;
            prop_assert_eq!(format.decode(level, inherited, encoded.pattern), Meaning::Leaf { size_log2: size, attributes: encoded.attributes });
            let granted = encoded.attributes;
            prop_assert!(asked.read && granted.read && !granted.execute && !asked.privileged_only && !granted.writable_when_dirty);
            prop_assert_eq!(granted.write, asked.write && flag(1) == 0);
            prop_assert!(format.explain(level, inherited, encoded.pattern).is_empty());
        }

        #[test]
        fn tables_restrict_nothing(level in 0_u8..6, next in 0_u8..6, levels in 1_u64..6, partial in 0_u64..2) {
            let format = open(&[("levels", levels), ("partial-tables", partial)]);
            match format.encode_table(level, next) {
                Some(pattern) => {
                    prop_assert_eq!(format.decode(level, 0, pattern), table_to(next, 0));
                    prop_assert!(format.explain(level, 0, pattern).is_empty());
                }
                None => prop_assert!(level != next + 1 || u64::from(level) >= levels),
            }
        }

        #[test]
        fn any_pattern_at_any_level_has_an_answer(level: u8, inherited: u64, pattern: u64, size: u8, word: u64, partial in 0_u64..2) {
            let format = open(&[("levels", 5), ("partial-tables", partial)]);
            let level = level % 5;
            let meaning = format.decode(level, inherited, pattern);
            let explained = format.explain(level, inherited, pattern);
            prop_assert_eq!(matches!(meaning, Meaning::Fault(_)), explained.iter().any(|f| f.severity == Severity::Error));
            if let Meaning::Table { next, .. } = meaning {
                prop_assert!(next.level + 1 == level && next.first <= next.last);
            }
            let _ = format.encode_leaf(level, size, Attributes::unpack(word));
            let _ = format.encode_table(level, size);
        }

        #[test]
        fn a_driver_that_invalidates_an_entry_makes_no_new_pattern(level in 0_u8..5, address: u64) {
            let format = open(&[("levels", 5)]);
            let kind = &format.levels()[usize::from(level)];
            let entry = address & !0xfff | kind.absent;
            let shape = kind.shapes.iter().find(|s| entry & s.mask == s.value).unwrap();
            let pattern = entry & !address_bits(shape);
            prop_assert_eq!(format.decode(level, 0, pattern), Meaning::Absent);
            prop_assert_eq!(pattern & !0x3fff, 0);
        }
    }
}
