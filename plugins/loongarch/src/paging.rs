//! `loongarch/paging`: directories, and page tables of one granule.
//!
//! * A directory entry has no valid bit: without HUGE it points to a table, whatever else it says. Hardware that finds zero goes to address 0, and
//!   drivers therefore fill directories with pointers to an empty table. What is written here into an unused slot is a huge page that is not valid.
//! * What points to a table is aligned to the table's size. The manual shows no format for it, says of undefined bits of *pages* alone that they are ignored
//!   (section 5.4.5), and not whether the index is added to the address or takes the place of its low bits: such entries are refused, as such roots are.
//! * In pages, address bits below the size are ignored: of the page number in a TLB entry, into which they go as they are, they may be anything (section 5.4.2).
//! * Bits 63:48 of a directory entry play no part: kernels store their own, virtual addresses there.
//! * In a huge page HUGE stands where page tables have G, and G stands in bit 12, the lowest address bit of a page: the address
//!   begins at the page's size only.
//! * Without `hardware-update` V and D are what counts, and P and W are software's own. With it P and W are what may be, and V and D are the marks that hardware
//!   sets: accessed and dirty.
//! * PLV says from which level on requests pass: a leaf of user level (3) is open to all, others to privileged requests only.

use stagecraft_sdk::bits::mask;
use stagecraft_sdk::{Attributes, Encoded, Error, Findings, Format, Kind, Level, Mark, MemoryType, Need, Next, Root, Segment, Settings, Shape};

use crate::spec::{
    ADDRESS_HIGH, CACHED, D, HUGE, HUGE_G, MAT, NR, NX, P, PLV, RPLV, STRONGLY_ORDERED, TABLE_LOW, UNASSIGNED, USER, V, W, WEAKLY_ORDERED,
};

const ENTRIES: &str = "LoongArch volume 1 section 5.4.5";
const PAGE_NUMBER: &str = "LoongArch volume 1 section 5.4.2, PPN";
const TABLES: &str = "LoongArch volume 1 section 5.4";

pub(crate) const NAMES: &[&str] = &["granule", "levels", "input-bits", "output-bits", "root", "root-high", "hardware-update"];

/// Kind of table by its index into [`Format::levels`]; above it are the directories.
const PAGE_TABLE: u8 = 0;

/// `loongarch/paging`.
#[derive(Clone, Debug)]
pub struct Paging {
    granule_log2: u8,
    levels: u8,
    input_bits: u8,
    output_bits: u8,
    low: Option<u64>,
    high: Option<u64>,
    hardware_update: bool,
}

impl Paging {
    /// Size of an entry's slot.
    fn slot_log2(&self, level: u8) -> u8 {
        self.granule_log2 + level * (self.granule_log2 - 3)
    }

    /// Whether huge pages are made at this level: not in a root, unless there is but one directory.
    fn makes_leaves(&self, level: u8) -> bool {
        level <= 1 || level + 1 < self.levels
    }

    /// The bit without which a leaf is not there.
    fn present(&self) -> u64 {
        if self.hardware_update { P } else { V }
    }
}

impl Format for Paging {
    const NAME: &'static str = "loongarch/paging";

    fn open(settings: &Settings) -> Result<Self, Error> {
        settings.only(NAMES)?;
        let granule = settings.one_of("granule", 16384, &[4096, 16384, 65536], TABLES)?;
        let granule_log2 = granule.trailing_zeros() as u8;
        let levels = settings.within("levels", 3, 2, 4, TABLES)? as u8;
        let widest = u64::from((granule_log2 + levels * (granule_log2 - 3)).min(63));
        let format = Self {
            granule_log2,
            levels,
            input_bits: settings.within("input-bits", widest.min(47), 12, widest, TABLES)? as u8,
            output_bits: settings.within("output-bits", 48, 12, 48, TABLES)? as u8,
            low: settings.get("root"),
            high: settings.get("root-high"),
            hardware_update: settings.flag("hardware-update", false)?,
        };
        for (name, root) in [("root", format.low), ("root-high", format.high)] {
            if let Some(root) = root.filter(|root| root % granule != 0) {
                return Err(Error::invalid(name, root, TABLES, "a table must be aligned to its size, the granule"));
            }
        }
        Ok(format)
    }

    fn suggest(settings: &Settings, need: &Need) -> Result<Settings, Error> {
        let mut settings = settings.clone();
        let granule = if need.alignment_log2 >= 14 { 16384 } else { 4096 };
        settings.set_default("granule", granule);
        let bits_of = |address: u64| u64::from(64 - address.leading_zeros());
        let bits = need.last_low.map_or(0, bits_of).max(need.first_high.map_or(0, |first| bits_of(!first)));
        let granule_log2 = u64::from(settings.or("granule", granule).trailing_zeros().clamp(12, 16));
        settings.set_default("levels", (3..4).find(|levels| bits <= (granule_log2 + levels * (granule_log2 - 3)).min(47)).unwrap_or(4));
        Self::open(&settings)?;
        Ok(NAMES.iter().filter_map(|&name| Some((name.to_owned(), settings.get(name)?))).collect())
    }

    fn candidates() -> Vec<Settings> {
        let of = |granule, levels, update| Settings::of(&[("granule", granule), ("levels", levels), ("hardware-update", update)]);
        let usual = [(16384, 3), (4096, 3), (4096, 4), (16384, 2), (65536, 2), (65536, 3)];
        let plain = usual.map(|(granule, levels)| Settings::of(&[("granule", granule), ("levels", levels)]));
        plain.into_iter().chain(usual.map(|(granule, levels)| of(granule, levels, 1))).collect()
    }

    fn levels(&self) -> Vec<Level> {
        let mark = |bit| if self.hardware_update { Mark { mask: bit, value: bit } } else { Mark::default() };
        let address = |low| vec![Segment::in_place(ADDRESS_HIGH, low)];
        let level = |level: u8| {
            let slot = self.slot_log2(level);
            let shapes = if level == PAGE_TABLE {
                vec![Shape { mask: 0, value: 0, address: address(slot) }]
            } else {
                // A huge page above all addresses has none: its slot is larger than what can be said.
                let huge = if slot <= ADDRESS_HIGH { address(slot) } else { Vec::new() };
                vec![Shape { mask: HUGE, value: HUGE, address: huge }, Shape { mask: HUGE, value: 0, address: address(self.granule_log2) }]
            };
            Level {
                number: level as i8,
                index_lsb: slot,
                index_bits: (self.granule_log2 - 3).min(64 - slot),
                shapes,
                leaf_sizes: if self.makes_leaves(level) { 1 << slot } else { 0 },
                absent: if level == PAGE_TABLE { 0 } else { HUGE },
                accessed: mark(V),
                dirty: mark(D),
                table_accessed: Mark::default(),
            }
        };
        (0..self.levels).map(level).collect()
    }

    fn roots(&self) -> Vec<Root> {
        let size_mask = u64::MAX >> (64 - self.input_bits);
        let root = |setting, first, last, address: Option<u64>| Root {
            setting,
            first,
            last,
            ignored: 0,
            address: address.unwrap_or(0),
            level: self.levels - 1,
            inherited: 0,
        };
        let low = root("root", 0, size_mask, self.low);
        let high = root("root-high", !size_mask, u64::MAX, self.high);
        match (self.low, self.high) {
            (Some(_), None) => vec![low],
            (None, Some(_)) => vec![high],
            _ => vec![low, high],
        }
    }

    fn output_bits(&self) -> u8 {
        self.output_bits
    }

    fn kind(&self, level: u8, pattern: u64) -> Kind {
        if level != PAGE_TABLE && pattern & HUGE == 0 {
            Kind::Table
        } else if pattern & self.present() != 0 {
            Kind::Leaf
        } else {
            Kind::Absent
        }
    }

    fn check(&self, level: u8, kind: Kind, inherited: u64, pattern: u64, findings: &mut Findings) {
        let _ = inherited;
        match kind {
            Kind::Absent => {}
            Kind::Table => {
                findings.reserved(pattern, TABLE_LOW, ENTRIES, "bits below the address of the next table are not zero");
                // LDDIR puts the index into the address, and is not said to add it: what such an entry leads to is anybody's guess.
                let inside = mask(self.granule_log2, 0) >> 1 & !mask(11, 0);
                findings.reserved(pattern, inside, ENTRIES, "the next table is not aligned to its size, the granule");
            }
            Kind::Leaf => {
                if MAT.of(pattern) == 3 {
                    findings.reserved(pattern, MAT.mask(), ENTRIES, "memory access type 3 is reserved");
                }
                if self.slot_log2(level) > ADDRESS_HIGH {
                    findings.reserved(pattern, HUGE, ENTRIES, "a page of this size has no address");
                }
                // Everything between the flags and the address: nothing in a page of 4 KiB. A TLB entry may have anything there.
                let below = (1_u64 << self.slot_log2(level).min(ADDRESS_HIGH + 1)) - (1 << 12);
                let g = if level == PAGE_TABLE { 0 } else { HUGE_G };
                findings.should_be_zero(pattern, below & !g, PAGE_NUMBER, "address bits below the size of the page are ignored");
                findings.should_be_zero(pattern, UNASSIGNED, ENTRIES, "bits 60:48 of a page are not assigned, and ignored");
                if pattern & RPLV != 0 && PLV.of(pattern) == USER {
                    findings.warning(RPLV, ENTRIES, "a page for user level only: privileged requests are not told apart from others");
                }
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

    fn attributes(&self, level: u8, inherited: u64, pattern: u64) -> Attributes {
        let _ = (level, inherited);
        let has = |bit| pattern & bit != 0;
        let plv = PLV.of(pattern);
        // Levels 1 and 2 are in use nowhere: a leaf for exactly one of them is for nobody.
        let nobody = has(RPLV) && plv != 0 && plv != USER;
        let write = has(if self.hardware_update { W } else { D }) && !nobody;
        let dirty = self.hardware_update && has(D);
        let memory_type = match MAT.of(pattern) {
            CACHED => MemoryType::WriteBack,
            WEAKLY_ORDERED => MemoryType::NonCacheable,
            _ => MemoryType::Device,
        };
        Attributes {
            read: !has(NR) && !nobody,
            write,
            execute: !has(NX) && !nobody,
            privileged_only: plv != USER,
            memory_type,
            coherent: memory_type == MemoryType::WriteBack,
            accessed: self.hardware_update && has(V),
            dirty,
            writable_when_dirty: self.hardware_update && write && !dirty,
        }
    }

    fn encode_leaf(&self, level: u8, size_log2: u8, attributes: Attributes) -> Option<Encoded> {
        if level >= self.levels || !self.makes_leaves(level) || size_log2 != self.slot_log2(level) || attributes.grants_nothing() {
            return None;
        }
        let mut pattern = V | P;
        let mut set = |condition, bits| pattern |= if condition { bits } else { 0 };
        set(level != PAGE_TABLE, HUGE);
        set(!attributes.read, NR);
        set(!attributes.execute, NX);
        set(attributes.write, W);
        set(attributes.write && !(self.hardware_update && attributes.writable_when_dirty), D);
        set(!attributes.privileged_only, PLV.put(USER));
        pattern |= MAT.put(match attributes.memory_type {
            MemoryType::WriteBack => CACHED,
            MemoryType::NonCacheable => WEAKLY_ORDERED,
            MemoryType::Device => STRONGLY_ORDERED,
        });
        Some(Encoded { pattern, attributes: self.attributes(level, 0, pattern) })
    }

    fn encode_table(&self, level: u8, next: u8) -> Option<u64> {
        (level < self.levels && level.checked_sub(1) == Some(next)).then_some(0)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;
    use stagecraft_sdk::{FaultKind, Meaning, Severity};

    use super::*;

    fn open(settings: &[(&str, u64)]) -> Paging {
        Paging::open(&settings.iter().map(|&(name, value)| (name.to_owned(), value)).collect()).unwrap()
    }

    fn address_bits(shape: &Shape) -> u64 {
        shape.address.iter().fold(0, |bits, segment| bits | mask(segment.entry_lsb + segment.width - 1, segment.entry_lsb))
    }

    const RESERVED: Meaning = Meaning::Fault(FaultKind::Reserved);
    /// A kernel's page for user level: present, valid, written to, cached.
    const USER_PAGE: u64 = 0x39f;

    fn rwx() -> Attributes {
        Attributes { read: true, write: true, execute: true, coherent: true, ..Attributes::default() }
    }

    fn leaf(size_log2: u8, attributes: Attributes) -> Meaning {
        Meaning::Leaf { size_log2, attributes }
    }

    #[test]
    fn every_bit_of_a_page() {
        let format = open(&[]);
        for bit in (0..64).filter(|bit| !(14..=47).contains(bit)) {
            let device = Attributes { memory_type: MemoryType::Device, coherent: false, ..rwx() };
            let expected = match bit {
                0 => Meaning::Absent,
                1 => leaf(14, Attributes { write: false, ..rwx() }),
                2 | 3 => leaf(14, Attributes { privileged_only: true, ..rwx() }),
                4 => leaf(14, device),
                5 => RESERVED,
                61 => leaf(14, Attributes { read: false, ..rwx() }),
                62 => leaf(14, Attributes { execute: false, ..rwx() }),
                // G, P, W and software's bits, address bits below the size, bits that are not assigned, and RPLV of the user level.
                _ => leaf(14, rwx()),
            };
            assert_eq!(format.decode(0, 0, USER_PAGE ^ 1 << bit), expected, "bit {bit}");
        }
        let uncached = USER_PAGE & !0x30 | 0x20;
        assert_eq!(format.decode(0, 0, uncached), leaf(14, Attributes { memory_type: MemoryType::NonCacheable, coherent: false, ..rwx() }));
    }

    #[test]
    fn every_bit_of_a_huge_page() {
        let format = open(&[]);
        let base = USER_PAGE | 0x40;
        assert_eq!(format.decode(1, 0, base), leaf(25, rwx()));
        for bit in (7..64).filter(|bit| !(25..=47).contains(bit)) {
            let expected = match bit {
                61 => leaf(25, Attributes { read: false, ..rwx() }),
                62 => leaf(25, Attributes { execute: false, ..rwx() }),
                // Bit 12 is G and no part of the address, and neither are the bits up to the page's size.
                _ => leaf(25, rwx()),
            };
            assert_eq!(format.decode(1, 0, base ^ 1 << bit), expected, "bit {bit}");
        }
        assert_eq!(format.decode(1, 0, base & !1), Meaning::Absent);
        let shapes = &format.levels()[1].shapes;
        assert_eq!(shapes.iter().map(address_bits).collect::<Vec<_>>(), [mask(47, 25), mask(47, 14)]);
        // 4 KiB pages: a page of 2 MiB begins at bit 21, and bit 12 is still G.
        let small = open(&[("granule", 4096)]);
        assert_eq!(small.decode(1, 0, base | 0x1000), leaf(21, rwx()));
        assert_eq!(small.decode(1, 0, base | 0x2000), leaf(21, rwx()));
        assert_eq!(small.explain(1, 0, base | 0x2000)[0].severity, Severity::Warning);
    }

    #[test]
    fn a_directory_entry_without_huge_is_a_table() {
        let format = open(&[]);
        for level in 1..3 {
            let table = Meaning::Table { next: Next::whole(level - 1), inherited: 0 };
            assert_eq!(format.decode(level, 0, 0), table);
            for bit in (0..64).filter(|bit| !(14..=47).contains(bit)) {
                let expected = match bit {
                    6 => Meaning::Absent,
                    0..14 => RESERVED,
                    _ => table,
                };
                assert_eq!(format.decode(level, 0, 1 << bit), expected, "level {level} bit {bit}");
            }
            assert_eq!(open(&[("granule", 4096)]).decode(level, 0, 0), table);
            let absent = format.levels()[usize::from(level)].absent;
            assert_eq!((absent, format.decode(level, 0, absent)), (0x40, Meaning::Absent));
        }
    }

    #[test]
    fn hardware_that_updates_entries_looks_at_p_and_w() {
        let format = open(&[("hardware-update", 1)]);
        let attributes = |pattern| match format.decode(0, 0, pattern) {
            Meaning::Leaf { attributes: a, .. } => (a.write, a.accessed, a.dirty, a.writable_when_dirty),
            other => panic!("{other:?}"),
        };
        let base = USER_PAGE & !0x103;
        assert_eq!(format.decode(0, 0, USER_PAGE & !P), Meaning::Absent);
        assert_eq!(attributes(base), (false, false, false, false));
        assert_eq!(attributes(base | V), (false, true, false, false));
        assert_eq!(attributes(base | W), (true, false, false, true));
        assert_eq!(attributes(base | V | W | D), (true, true, true, false));
        assert_eq!(attributes(base | V | D), (false, true, true, false), "D is a mark, and W the permission");
        assert_eq!((format.levels()[0].accessed.mask, format.levels()[0].dirty.mask), (V, D));
        assert_eq!(open(&[]).levels()[0].dirty.mask, 0);
        let asked = Attributes { writable_when_dirty: true, ..rwx() };
        assert_eq!(format.encode_leaf(0, 14, asked).unwrap().pattern, V | P | W | 0x1c);
    }

    #[test]
    fn privilege_levels() {
        let format = open(&[]);
        let page = |plv: u64, rplv: u64| match format.decode(0, 0, USER_PAGE & !0xc | plv << 2 | rplv << 63) {
            Meaning::Leaf { attributes, .. } => (attributes.read, attributes.privileged_only),
            other => panic!("{other:?}"),
        };
        assert_eq!([page(0, 0), page(1, 0), page(2, 0), page(3, 0)], [(true, true), (true, true), (true, true), (true, false)]);
        assert_eq!([page(0, 1), page(1, 1), page(2, 1), page(3, 1)], [(true, true), (false, true), (false, true), (true, false)]);
        assert_eq!(format.explain(0, 0, USER_PAGE | RPLV)[0].severity, Severity::Warning);
    }

    #[test]
    fn the_geometry_follows_granule_and_levels() {
        for (granule, levels, bits, slots) in [
            (4096, 3, 39, vec![12, 21, 30]),
            (4096, 4, 47, vec![12, 21, 30, 39]),
            (16384, 2, 36, vec![14, 25]),
            (16384, 3, 47, vec![14, 25, 36]),
            (65536, 2, 42, vec![16, 29]),
            (65536, 3, 47, vec![16, 29, 42]),
            (65536, 4, 47, vec![16, 29, 42, 55]),
        ] {
            let geometry = open(&[("granule", granule), ("levels", levels)]).geometry();
            assert_eq!(geometry.levels.iter().map(|level| level.index_lsb).collect::<Vec<_>>(), slots);
            let ranges: Vec<_> = geometry.roots.iter().map(|root| (root.setting, root.first, root.last)).collect();
            let size = 1_u64 << bits;
            assert_eq!(ranges, [("root", 0, size - 1), ("root-high", 0_u64.wrapping_sub(size), u64::MAX)]);
            for level in &geometry.levels {
                assert!(level.index_lsb + level.index_bits <= 64);
                let deciding = level.shapes.iter().fold(0, |bits, shape| bits | shape.mask);
                assert!(level.shapes.iter().all(|shape| address_bits(shape) & deciding == 0));
            }
        }
        let one = |name| open(&[(name, 0x4000)]).geometry().roots.iter().map(|root| (root.setting, root.address)).collect::<Vec<_>>();
        assert_eq!((one("root"), one("root-high")), (vec![("root", 0x4000)], vec![("root-high", 0x4000)]));
        assert_eq!(open(&[("input-bits", 40)]).roots()[0].last, (1 << 40) - 1);
        assert_eq!(open(&[("levels", 2)]).levels()[1].leaf_sizes, 1 << 25);
        assert_eq!(open(&[]).levels().iter().map(|level| level.leaf_sizes).collect::<Vec<_>>(), [1 << 14, 1 << 25, 0]);
    }

    #[test]
    fn bad_settings_are_refused_by_name() {
        for (name, value) in
            [("granule", 8192), ("levels", 1), ("levels", 5), ("input-bits", 48), ("output-bits", 49), ("root", 0x1000), ("root-high", 1), ("tbi", 1)]
        {
            match Paging::open(&[(name.to_owned(), value)].into_iter().collect()) {
                Err(Error::Invalid(invalid)) => assert_eq!((invalid.field.as_str(), invalid.value), (name, value)),
                other => panic!("{name}: {other:?}"),
            }
        }
    }

    #[test]
    fn suggestions_are_sensible_and_leave_given_settings_alone() {
        let suggest = |given: &[(&str, u64)], last_low, first_high, alignment_log2| {
            let given = given.iter().map(|&(name, value)| (name.to_owned(), value)).collect();
            let need = Need { last_low, first_high, last_address: 0, alignment_log2 };
            Paging::suggest(&given, &need).unwrap().iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(suggest(&[], Some(1), None, 14), "granule=16384 levels=3");
        assert_eq!(suggest(&[], Some(1), None, 12), "granule=4096 levels=3");
        assert_eq!(suggest(&[], Some(1 << 39), None, 12), "granule=4096 levels=4");
        assert_eq!(suggest(&[], None, Some(!0 << 40), 13), "granule=4096 levels=4");
        assert_eq!(suggest(&[("levels", 2)], Some(1 << 39), None, 16), "granule=16384 levels=2");
    }

    fn any_format() -> impl Strategy<Value = Paging> {
        (0_usize..3, 2_u64..5, 0_u64..2).prop_map(|(granule, levels, update)| {
            open(&[("granule", [4096, 16384, 65536][granule]), ("levels", levels), ("hardware-update", update)])
        })
    }

    proptest! {
        #[test]
        fn encoding_never_grants_more_and_decodes_to_what_it_says(word in 0_u64..1 << 10, level in 0_u8..5, size in 10_u8..60, format in any_format()) {
            let asked = Attributes::unpack(word);
            let Some(encoded) = format.encode_leaf(level, size, asked) else { return Ok(()) };
            let kind = &format.levels()[usize::from(level)];
            let shape = kind.shapes.iter().find(|s| encoded.pattern & s.mask == s.value).unwrap();
            prop_assert!(kind.leaf_sizes & 1 << size != 0);
            prop_assert_eq!(encoded.pattern & address_bits(shape), 0);
            prop_assert_eq!(format.decode(level, 0, encoded.pattern), leaf(size, encoded.attributes));
            let granted = encoded.attributes;
            prop_assert_eq!((granted.read, granted.write, granted.execute), (asked.read, asked.write, asked.execute));
            prop_assert_eq!((granted.privileged_only, granted.memory_type), (asked.privileged_only, asked.memory_type));
            prop_assert_eq!(granted.writable_when_dirty, format.hardware_update && asked.write && asked.writable_when_dirty);
            prop_assert!(format.explain(level, 0, encoded.pattern).is_empty());
        }

        #[test]
        fn tables_restrict_nothing(level in 0_u8..5, next in 0_u8..5, format in any_format()) {
            match format.encode_table(level, next) {
                Some(pattern) => prop_assert_eq!(format.decode(level, 0, pattern), Meaning::Table { next: Next::whole(next), inherited: 0 }),
                None => prop_assert!(level != next + 1 || level >= format.levels),
            }
        }

        #[test]
        fn any_pattern_at_any_level_has_an_answer(level: u8, inherited: u64, pattern: u64, size: u8, word: u64, format in any_format()) {
            let level = level % format.levels;
            let meaning = format.decode(level, inherited, pattern);
            let explained = format.explain(level, inherited, pattern);
            prop_assert_eq!(matches!(meaning, Meaning::Fault(_)), explained.iter().any(|f| f.severity == Severity::Error));
            let _ = format.encode_leaf(level, size, Attributes::unpack(word));
        }
    }
}
