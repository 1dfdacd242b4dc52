//! `apple-dart/dart1` and `apple-dart/dart2`: up to four roots, and two or three levels of tables below each.
//!
//! * Permissions are inverted: an entry that says nothing allows everything. A leaf may be written and not read.
//! * DART1 has its address in place (bits 35:12), DART2 shifted right by four (bits 37:10 are address bits 41:14).
//! * A leaf may be cut to a range of its page, in units of a 4,096th of a page; requests outside fault. DART1 can turn the range off; drivers do so, and
//!   write whole ranges besides. A range whose end lies before its beginning leaves nothing, and faults as a whole.
//! * Leaves are in the last level only.

use stagecraft_sdk::bits::mask;
use stagecraft_sdk::{
    Attributes, Encoded, Error, FaultKind, Findings, Format, Kind, Level, Mark, MemoryType, Missing, Need, Next, Root, Segment, Settings, Shape,
};

use crate::spec::entry::{ADDRESS_1, ADDRESS_2, FIRST, LAST, NO_CACHE_2, NO_READ_1, NO_READ_2, NO_WRITE_1, NO_WRITE_2, VALID, WHOLE_PAGE_1};

const TABLES: &str = "Linux, Apple DART page tables";

pub(crate) const NAMES: &[&str] = &["granule", "levels", "input-bits", "output-bits", "root", "root-1", "root-2", "root-3"];
/// The settings that hold roots.
pub(crate) const ROOTS: [&str; 4] = ["root", "root-1", "root-2", "root-3"];

/// Units of a page, by which a part of it is named.
const UNITS: u32 = 4096;

/// `apple-dart/dart1`.
pub type Dart1 = Dart<1>;
/// `apple-dart/dart2`.
pub type Dart2 = Dart<2>;

/// Tables of version 1 or 2.
#[derive(Clone, Debug)]
pub struct Dart<const VERSION: u8> {
    granule_log2: u8,
    levels: u8,
    input_bits: u8,
    output_bits: u8,
    roots: [Option<u64>; 4],
}

impl<const VERSION: u8> Dart<VERSION> {
    const FIRST_VERSION: bool = VERSION == 1;
    const NO_READ: u64 = if Self::FIRST_VERSION { NO_READ_1 } else { NO_READ_2 };
    const NO_WRITE: u64 = if Self::FIRST_VERSION { NO_WRITE_1 } else { NO_WRITE_2 };
    /// The widest output address.
    pub(crate) const WIDEST: u64 = if Self::FIRST_VERSION { 36 } else { 42 };

    /// Size of an entry's slot; of what a root covers for the number of levels.
    fn slot_log2(&self, level: u8) -> u8 {
        self.granule_log2 + level * (self.granule_log2 - 3)
    }

    /// Where an entry has its address, that of a table or of a page.
    fn address(&self) -> Segment {
        if Self::FIRST_VERSION { Segment::in_place(ADDRESS_1.0, self.granule_log2) } else { Segment::moved(ADDRESS_2.0, ADDRESS_2.1, ADDRESS_2.2) }
    }

    /// Whether the range of the page that may be used counts.
    fn has_range(pattern: u64) -> bool {
        !Self::FIRST_VERSION || pattern & WHOLE_PAGE_1 == 0
    }
}

impl<const VERSION: u8> Format for Dart<VERSION> {
    const NAME: &'static str = if VERSION == 1 { "apple-dart/dart1" } else { "apple-dart/dart2" };

    fn open(settings: &Settings) -> Result<Self, Error> {
        settings.only(NAMES)?;
        let granules: &[u64] = if Self::FIRST_VERSION { &[4096, 16384] } else { &[16384] };
        let granule = settings.one_of("granule", 16384, granules, TABLES)?;
        let granule_log2 = granule.trailing_zeros() as u8;
        let levels = settings.within("levels", 2, 2, 3, TABLES)? as u8;
        let widest = granule_log2 + levels * (granule_log2 - 3) + 2;
        let mut format = Self {
            granule_log2,
            levels,
            input_bits: settings.within("input-bits", 32.min(widest.into()), granule_log2.into(), widest.into(), TABLES)? as u8,
            output_bits: settings.within("output-bits", Self::WIDEST, 12, Self::WIDEST, TABLES)? as u8,
            roots: [None; 4],
        };
        for (root, name) in format.roots.iter_mut().zip(ROOTS) {
            *root = settings.get(name);
            if let Some(address) = root.filter(|address| address % granule != 0) {
                return Err(Error::invalid(name, address, TABLES, "a table must be aligned to its size, the granule"));
            }
        }
        Ok(format)
    }

    fn suggest(settings: &Settings, need: &Need) -> Result<Settings, Error> {
        let mut settings = settings.clone();
        let bits = if need.first_high.is_some() { 64 } else { need.last_low.map_or(0, |last| u64::from(64 - last.leading_zeros())) };
        settings.set_default("granule", if Self::FIRST_VERSION && need.alignment_log2 < 14 { 4096 } else { 16384 });
        let granule_log2 = u64::from(settings.or("granule", 16384).trailing_zeros().clamp(12, 14));
        let width = |levels: u64| granule_log2 + levels * (granule_log2 - 3) + 2;
        settings.set_default("levels", if bits <= width(2) { 2 } else { 3 });
        settings.set_default("input-bits", bits.clamp(32, width(settings.or("levels", 2).clamp(2, 3))));
        Self::open(&settings)?;
        Ok(NAMES.iter().filter_map(|&name| Some((name.to_owned(), settings.get(name)?))).collect())
    }

    fn candidates() -> Vec<Settings> {
        let granules: &[u64] = if Self::FIRST_VERSION { &[16384, 4096] } else { &[16384] };
        let of = |granule: u64, levels: u64| Settings::of(&[("granule", granule), ("levels", levels)]);
        granules.iter().flat_map(|&granule| [of(granule, 2), of(granule, 3)]).collect()
    }

    fn levels(&self) -> Vec<Level> {
        let level = |level: u8| Level {
            number: self.levels as i8 - level as i8,
            index_lsb: self.slot_log2(level),
            index_bits: self.granule_log2 - 3,
            shapes: vec![Shape { mask: 0, value: 0, address: vec![self.address()] }],
            leaf_sizes: if level == 0 { 1 << self.granule_log2 } else { 0 },
            absent: 0,
            accessed: Mark::default(),
            dirty: Mark::default(),
            table_accessed: Mark::default(),
        };
        (0..self.levels).map(level).collect()
    }

    fn roots(&self) -> Vec<Root> {
        let (span_log2, last) = (self.slot_log2(self.levels), u64::MAX >> (64 - self.input_bits));
        let any = self.roots.iter().any(Option::is_some);
        let root = |(index, (setting, address)): (u64, (&'static str, Option<u64>))| {
            let first = index << span_log2;
            let exists = first <= last && (address.is_some() || !any);
            exists.then(|| Root {
                setting,
                first,
                last: last.min(first + (1 << span_log2) - 1),
                ignored: 0,
                address: address.unwrap_or(0),
                level: self.levels - 1,
                inherited: 0,
            })
        };
        (0..).zip(ROOTS.into_iter().zip(self.roots)).filter_map(root).collect()
    }

    fn output_bits(&self) -> u8 {
        self.output_bits
    }

    fn kind(&self, level: u8, pattern: u64) -> Kind {
        match level {
            _ if pattern & VALID == 0 => Kind::Absent,
            0 => Kind::Leaf,
            _ => Kind::Table,
        }
    }

    fn check(&self, level: u8, kind: Kind, inherited: u64, pattern: u64, findings: &mut Findings) {
        let _ = inherited;
        let ignored = "these bits have no known meaning here";
        match kind {
            Kind::Absent => {}
            Kind::Table => findings.should_be_zero(pattern, !VALID, TABLES, ignored),
            Kind::Leaf => {
                if Self::has_range(pattern) && FIRST.of(pattern) > LAST.of(pattern) {
                    let reason = "the part of the page that may be used ends before it begins";
                    findings.error(FaultKind::Permission, FIRST.mask() | LAST.mask(), TABLES, reason);
                } else if self.missing(level, pattern).is_some() {
                    findings.info(FIRST.mask() | LAST.mask(), TABLES, "only a part of the page may be used");
                }
                let flags = if Self::FIRST_VERSION { WHOLE_PAGE_1 } else { NO_CACHE_2 };
                let known = VALID | Self::NO_READ | Self::NO_WRITE | flags | FIRST.mask() | LAST.mask();
                findings.should_be_zero(pattern & mask(39, 0), !known, TABLES, ignored);
            }
        }
    }

    fn next(&self, level: u8, pattern: u64) -> Next {
        let _ = pattern;
        Next::whole(level.saturating_sub(1))
    }

    fn leaf_size_log2(&self, level: u8, pattern: u64) -> u8 {
        let _ = pattern;
        self.slot_log2(level)
    }

    fn missing(&self, level: u8, pattern: u64) -> Option<Missing> {
        let (first, last) = (FIRST.of(pattern) as u32, LAST.of(pattern) as u32);
        let whole = first == 0 && last == UNITS - 1;
        if level != 0 || !Self::has_range(pattern) || whole {
            return None;
        }
        // Checked: the part does not end before it begins.
        let unit = (1_u32 << self.granule_log2) / UNITS;
        Some(Missing { front: first * unit, back: (UNITS - 1 - last) * unit })
    }

    fn attributes(&self, level: u8, inherited: u64, pattern: u64) -> Attributes {
        let _ = (level, inherited);
        Attributes {
            read: pattern & Self::NO_READ == 0,
            write: pattern & Self::NO_WRITE == 0,
            memory_type: MemoryType::WriteBack,
            coherent: Self::FIRST_VERSION || pattern & NO_CACHE_2 == 0,
            ..Attributes::default()
        }
    }

    fn encode_leaf(&self, level: u8, size_log2: u8, attributes: Attributes) -> Option<Encoded> {
        let nothing_left = !(attributes.read || attributes.write) || attributes.privileged_only;
        if level != 0 || size_log2 != self.granule_log2 || nothing_left {
            return None;
        }
        let mut pattern = VALID | LAST.mask();
        let mut set = |condition, bits| pattern |= if condition { bits } else { 0 };
        set(!attributes.read, Self::NO_READ);
        set(!attributes.write, Self::NO_WRITE);
        set(Self::FIRST_VERSION, WHOLE_PAGE_1);
        set(!Self::FIRST_VERSION && !attributes.coherent, NO_CACHE_2);
        Some(Encoded { pattern, attributes: self.attributes(level, 0, pattern) })
    }

    fn encode_table(&self, level: u8, next: u8) -> Option<u64> {
        (level < self.levels && level.checked_sub(1) == Some(next)).then_some(VALID)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;
    use stagecraft_sdk::{Geometry, Meaning, Severity};

    use super::*;

    fn open<const VERSION: u8>(settings: &[(&str, u64)]) -> Dart<VERSION> {
        Dart::open(&settings.iter().map(|&(name, value)| (name.to_owned(), value)).collect()).unwrap()
    }

    fn leaf(read: bool, write: bool, coherent: bool) -> Meaning {
        Meaning::Leaf { size_log2: 14, attributes: Attributes { read, write, coherent, ..Attributes::default() } }
    }

    /// What Linux writes for a page that may be read and written.
    const PAGE_1: u64 = 0x000f_ff00_0000_0003;
    const PAGE_2: u64 = 0x000f_ff00_0000_0001;

    #[test]
    fn every_bit_of_a_leaf() {
        let (one, two) = (open::<1>(&[]), open::<2>(&[]));
        for bit in (0..64).filter(|bit| !(14..=35).contains(bit)) {
            let expected = match bit {
                0 => Meaning::Absent,
                7 => leaf(true, false, true),
                8 => leaf(false, true, true),
                _ => leaf(true, true, true),
            };
            assert_eq!(one.decode(0, 0, PAGE_1 ^ 1 << bit), expected, "DART1 bit {bit}");
        }
        for bit in (0..64).filter(|bit| !(10..=37).contains(bit)) {
            let expected = match bit {
                0 => Meaning::Absent,
                1 => leaf(true, true, false),
                2 => leaf(true, false, true),
                3 => leaf(false, true, true),
                // The last unit is not the page's last any more, the first one not its first.
                40..52 => part(0, 1 << (bit - 40)),
                52..64 => part(1 << (bit - 52), 0),
                _ => leaf(true, true, true),
            };
            assert_eq!(two.decode(0, 0, PAGE_2 ^ 1 << bit), expected, "DART2 bit {bit}");
        }
    }

    /// A page of 16 KiB that may be read and written, without so many units at its beginning and its end.
    fn part(front: u32, back: u32) -> Meaning {
        let attributes = Attributes { read: true, write: true, coherent: true, ..Attributes::default() };
        Meaning::Part { size_log2: 14, attributes, missing: Missing { front: 4 * front, back: 4 * back } }
    }

    #[test]
    fn a_part_of_a_page_is_named_in_units_unless_the_range_is_off() {
        let (one, two) = (open::<1>(&[]), open::<2>(&[]));
        for (first, last) in [(1, 0xfff), (0, 0xffe), (0x400, 0x7ff), (0, 0), (0xfff, 0xfff)] {
            let range = FIRST.put(first) | LAST.put(last);
            let part = part(first as u32, 0xfff - last as u32);
            assert_eq!(one.decode(0, 0, VALID | range), part);
            assert_eq!(one.decode(0, 0, VALID | WHOLE_PAGE_1 | range), leaf(true, true, true));
            assert_eq!(two.decode(0, 0, VALID | range), part);
            assert_eq!(two.explain(0, 0, VALID | range)[0].severity, Severity::Info);
        }
        assert_eq!(one.decode(0, 0, VALID | LAST.mask()), leaf(true, true, true));
        let nothing = FIRST.put(0x400) | LAST.put(0x3ff);
        assert_eq!(two.decode(0, 0, VALID | nothing), Meaning::Fault(FaultKind::Permission));
        // Pages of 4 KiB have units of one byte.
        let Meaning::Part { missing, .. } = open::<1>(&[("granule", 4096)]).decode(0, 0, VALID | FIRST.put(1) | LAST.put(1)) else { panic!() };
        assert_eq!(missing, Missing { front: 1, back: 0xffe });
    }

    #[test]
    fn every_bit_of_a_table_entry() {
        let format = open::<2>(&[("levels", 3)]);
        for level in 1..3 {
            let table = Meaning::Table { next: Next::whole(level - 1), inherited: 0 };
            assert_eq!(format.decode(level, 0, 0), Meaning::Absent);
            for bit in (1..64).filter(|bit| !(10..=37).contains(bit)) {
                assert_eq!(format.decode(level, 0, VALID | 1 << bit), table, "level {level} bit {bit}");
                assert_eq!(format.explain(level, 0, VALID | 1 << bit)[0].severity, Severity::Warning);
            }
        }
    }

    #[test]
    fn addresses_are_packed_in_two_ways() {
        assert_eq!(open::<1>(&[]).address(), Segment { entry_lsb: 14, address_lsb: 14, width: 22 });
        assert_eq!(open::<1>(&[("granule", 4096)]).address(), Segment { entry_lsb: 12, address_lsb: 12, width: 24 });
        // 0x3ff_ffff_c000 >> 4 is 0x3f_ffff_fc00.
        assert_eq!(open::<2>(&[]).address(), Segment { entry_lsb: 10, address_lsb: 14, width: 28 });
    }

    #[test]
    fn there_are_up_to_four_roots() {
        let ranges = |format: Geometry| format.roots.iter().map(|root| (root.setting, root.first, root.last)).collect::<Vec<_>>();
        let four = |bits: u32| {
            ROOTS.into_iter().zip([0_u64, 1, 2, 3].map(|n| (n << bits, ((n + 1) << bits) - 1))).map(|(n, (a, b))| (n, a, b)).collect::<Vec<_>>()
        };
        assert_eq!(ranges(open::<1>(&[("granule", 4096)]).geometry()), four(30));
        assert_eq!(ranges(open::<1>(&[]).geometry()), [("root", 0, 0xffff_ffff)]);
        assert_eq!(ranges(open::<1>(&[("input-bits", 38)]).geometry()), four(36));
        assert_eq!(ranges(open::<2>(&[("levels", 3), ("input-bits", 42)]).geometry()), [("root", 0, (1 << 42) - 1)]);
        let some = open::<1>(&[("granule", 4096), ("root-1", 0x1000), ("root-3", 0x3000)]).geometry();
        assert_eq!(some.roots.iter().map(|root| root.address).collect::<Vec<_>>(), [0x1000, 0x3000]);
        assert_eq!(ranges(some), [four(30)[1], four(30)[3]]);
        assert_eq!(ranges(open::<1>(&[("granule", 4096), ("input-bits", 31)]).geometry()), four(30)[..2]);
    }

    #[test]
    fn bad_settings_are_refused_by_name() {
        let refused = |result: Result<(), Error>, name: &str, value| match result {
            Err(Error::Invalid(invalid)) => assert_eq!((invalid.field.as_str(), invalid.value), (name, value)),
            other => panic!("{name}: {other:?}"),
        };
        let settings = |name: &str, value| [(name.to_owned(), value)].into_iter().collect();
        for (name, value) in
            [("granule", 65536), ("levels", 1), ("levels", 4), ("input-bits", 39), ("output-bits", 37), ("root", 0x1000), ("root-4", 0)]
        {
            refused(Dart1::open(&settings(name, value)).map(drop), name, value);
        }
        for (name, value) in [("granule", 4096), ("input-bits", 13), ("output-bits", 43), ("root-2", 1)] {
            refused(Dart2::open(&settings(name, value)).map(drop), name, value);
        }
    }

    #[test]
    fn suggestions_are_sensible_and_leave_given_settings_alone() {
        let text = |settings: Settings| settings.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ");
        let need = |last_low, alignment_log2| Need { last_low: Some(last_low), first_high: None, last_address: 0, alignment_log2 };
        let empty = Settings::default();
        assert_eq!(text(Dart1::suggest(&empty, &need(0xffff, 12)).unwrap()), "granule=4096 levels=2 input-bits=32");
        assert_eq!(text(Dart1::suggest(&empty, &need(1 << 32, 13)).unwrap()), "granule=4096 levels=3 input-bits=33");
        assert_eq!(text(Dart1::suggest(&empty, &need(1 << 36, 14)).unwrap()), "granule=16384 levels=2 input-bits=37");
        assert_eq!(text(Dart2::suggest(&empty, &need(1 << 38, 12)).unwrap()), "granule=16384 levels=3 input-bits=39");
        let given = [("levels".to_owned(), 2)].into_iter().collect();
        assert_eq!(text(Dart2::suggest(&given, &need(u64::MAX, 12)).unwrap()), "granule=16384 levels=2 input-bits=38");
    }

    fn encoding<const VERSION: u8>(format: &Dart<VERSION>, level: u8, size: u8, asked: Attributes) -> Result<(), TestCaseError> {
        let Some(encoded) = format.encode_leaf(level, size, asked) else { return Ok(()) };
        let address = format.address();
        prop_assert!(format.levels()[usize::from(level)].leaf_sizes & 1 << size != 0);
        prop_assert_eq!(encoded.pattern & mask(address.entry_lsb + address.width - 1, address.entry_lsb), 0);
        prop_assert_eq!(format.decode(level, 0, encoded.pattern), Meaning::Leaf { size_log2: size, attributes: encoded.attributes });
        let granted = encoded.attributes;
        prop_assert_eq!((granted.read, granted.write), (asked.read, asked.write));
        prop_assert!(!asked.privileged_only && !granted.execute && !granted.grants_nothing());
        prop_assert!(VERSION == 1 || granted.coherent == asked.coherent);
        prop_assert!(format.explain(level, 0, encoded.pattern).is_empty());
        Ok(())
    }

    fn answers<const VERSION: u8>(format: &Dart<VERSION>, level: u8, inherited: u64, pattern: u64) -> Result<(), TestCaseError> {
        let meaning = format.decode(level, inherited, pattern);
        let explained = format.explain(level, inherited, pattern);
        prop_assert_eq!(matches!(meaning, Meaning::Fault(_)), explained.iter().any(|f| f.severity == Severity::Error));
        Ok(())
    }

    proptest! {
        #[test]
        fn encoding_never_grants_more_and_decodes_to_what_it_says(word in 0_u64..1 << 10, level in 0_u8..4, size in 12_u8..16, small: bool) {
            let asked = Attributes::unpack(word);
            encoding(&open::<1>(&[("granule", if small { 4096 } else { 16384 })]), level, size, asked)?;
            encoding(&open::<2>(&[]), level, size, asked)?;
        }

        #[test]
        fn tables_restrict_nothing(level in 0_u8..4, next in 0_u8..4, levels in 2_u64..4) {
            let format = open::<1>(&[("levels", levels)]);
            match format.encode_table(level, next) {
                Some(pattern) => prop_assert_eq!(format.decode(level, 0, pattern), Meaning::Table { next: Next::whole(next), inherited: 0 }),
                None => prop_assert!(level != next + 1 || u64::from(level) >= levels),
            }
        }

        #[test]
        fn any_pattern_at_any_level_has_an_answer(level in 0_u8..3, inherited: u64, pattern: u64) {
            answers(&open::<1>(&[("levels", 3)]), level, inherited, pattern)?;
            answers(&open::<2>(&[("levels", 3)]), level, inherited, pattern)?;
        }
    }
}
