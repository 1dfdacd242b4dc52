//! Guest tables, the processors' format (section 2.2.6): x86-64 tables of four or five levels, one for each PASID.
//!
//! What differs from a processor's own use of such tables:
//!
//! * Requests without PASID, and those with PASID 0, have no upper half: all 48 or 57 bits select entries, and nothing is sign-extended (`sign-extended`
//!   is 0). The specification does not say so; Linux reports it of real units, and avoids the addresses where it would matter.
//! * A page without U/S is for requests that come with privilege. Read-only pages are read-only for these, too.
//! * Execution is told from reading only on units with no-execute support (`no-execute`). On others bit 63 is ignored and no leaf grants execution.
//! * Hardware sets A and D itself unless it was told not to: a clear A is not a fault.
//! * PWT, PCD and PAT do not choose a memory type, and G is ignored.
//!
//! `inherited` says what the device table entry and the tables above take away: `NO_READ`, `NO_WRITE`, `PRIVILEGED_ONLY`, `NO_EXECUTE`.

use stagecraft_sdk::{Attributes, Encoded, Error, Findings, Format, Kind, Level, Mark, MemoryType, Need, Next, Root, Segment, Settings, Shape};

use crate::spec::v2::{A, D, NX, P, PS, RESERVED_1G, RESERVED_2M, RESERVED_TOP, RW, US};
use crate::{ADDRESS_BITS, INTERRUPTS, NO_READ, NO_WRITE, in_manifest_order, root_address, root_permissions};

const ENTRIES: &str = "48882 section 2.2.6";
const TOP: &str = "24593 section 5.3.3";
pub(crate) const NAMES: &[&str] =
    &["levels", "root", "output-bits", "sign-extended", "page-1g", "no-execute", "privileged", "read", "write", "update-accessed", "update-dirty"];

/// `inherited`: a table above has U/S clear.
const PRIVILEGED_ONLY: u64 = 4;
/// `inherited`: a table above has NX set.
const NO_EXECUTE: u64 = 8;

/// Kinds of table by their index into [`Format::levels`], which is the architecture's level minus one.
const PAGE_TABLE: u8 = 0;
const DIRECTORY: u8 = 1;
const DIRECTORY_POINTERS: u8 = 2;

/// `amd-vi/v2`.
#[derive(Clone, Debug)]
#[allow(clippy::struct_excessive_bools)]
pub struct V2 {
    levels: u8,
    root: u64,
    output_bits: u8,
    sign_extended: bool,
    page_1g: bool,
    no_execute: bool,
    privileged: bool,
    /// `inherited` of the root.
    permissions: u64,
    update_accessed: bool,
    update_dirty: bool,
}

impl V2 {
    /// Whether an entry of this table with PS set is a leaf.
    fn large(&self, level: u8) -> bool {
        level == DIRECTORY || (level == DIRECTORY_POINTERS && self.page_1g)
    }

    /// Size of an entry's slot.
    const fn slot_log2(level: u8) -> u8 {
        12 + 9 * level
    }
}

impl Format for V2 {
    const NAME: &'static str = "amd-vi/v2";

    fn open(settings: &Settings) -> Result<Self, Error> {
        settings.only(NAMES)?;
        Ok(Self {
            levels: settings.one_of("levels", 4, &[4, 5], "48882 section 2.2.2, Guest Paging Mode")? as u8,
            root: root_address(settings, ENTRIES)?,
            output_bits: settings.within("output-bits", ADDRESS_BITS, 12, ADDRESS_BITS, ENTRIES)? as u8,
            sign_extended: settings.flag("sign-extended", true)?,
            page_1g: settings.flag("page-1g", true)?,
            no_execute: settings.flag("no-execute", false)?,
            privileged: settings.flag("privileged", false)?,
            permissions: root_permissions(settings)?,
            update_accessed: settings.flag("update-accessed", true)?,
            update_dirty: settings.flag("update-dirty", true)?,
        })
    }

    fn suggest(settings: &Settings, need: &Need) -> Result<Settings, Error> {
        let mut settings = settings.clone();
        let four_levels_hold = if settings.flag("sign-extended", true)? {
            need.last_low.is_none_or(|last| last >> 47 == 0) && need.first_high.is_none_or(|first| first >> 47 == u64::MAX >> 47)
        } else {
            // There is no upper half: four levels are as good as five for it.
            need.last_low.is_none_or(|last| last >> 48 == 0)
        };
        settings.set_default("levels", if four_levels_hold { 4 } else { 5 });
        Self::open(&settings)?;
        Ok(in_manifest_order(&settings, NAMES))
    }

    fn candidates() -> Vec<Settings> {
        let of = |levels, no_execute| Settings::of(&[("levels", levels), ("sign-extended", 0), ("no-execute", no_execute)]);
        vec![Settings::of(&[("levels", 4), ("sign-extended", 0)]), Settings::of(&[("levels", 5), ("sign-extended", 0)]), of(4, 1), of(5, 1)]
    }

    fn levels(&self) -> Vec<Level> {
        let mark = |enabled, bit| if enabled { Mark { mask: bit, value: bit } } else { Mark::default() };
        let address = |low| vec![Segment::in_place(51, low)];
        let level = |level: u8| {
            let slot = Self::slot_log2(level);
            let shapes = if self.large(level) {
                vec![Shape { mask: P | PS, value: P | PS, address: address(slot) }, Shape { mask: P | PS, value: P, address: address(12) }]
            } else {
                vec![Shape { mask: P, value: P, address: address(12) }]
            };
            Level {
                number: level as i8 + 1,
                index_lsb: slot,
                index_bits: 9,
                shapes,
                leaf_sizes: if level == PAGE_TABLE || self.large(level) { 1 << slot } else { 0 },
                absent: 0,
                accessed: mark(self.update_accessed, A),
                dirty: mark(self.update_dirty, D),
                table_accessed: mark(self.update_accessed, A),
            }
        };
        (0..self.levels).map(level).collect()
    }

    fn roots(&self) -> Vec<Root> {
        let bits = 12 + 9 * self.levels;
        let root =
            |first, last| Root { setting: "root", first, last, ignored: 0, address: self.root, level: self.levels - 1, inherited: self.permissions };
        if self.sign_extended {
            // Both canonical halves of the input addresses are walked from one table: the lower half uses its first 256 entries.
            let half = 1_u64 << (bits - 1);
            vec![root(0, half - 1), root(half.wrapping_neg(), u64::MAX)]
        } else {
            vec![root(0, (1 << bits) - 1)]
        }
    }

    fn output_bits(&self) -> u8 {
        self.output_bits
    }

    fn untranslated(&self) -> Vec<(u64, u64)> {
        vec![INTERRUPTS]
    }

    fn privileged(&self) -> bool {
        self.privileged
    }

    fn kind(&self, level: u8, pattern: u64) -> Kind {
        if pattern & P == 0 {
            Kind::Absent
        } else if level == PAGE_TABLE || (pattern & PS != 0 && self.large(level)) {
            Kind::Leaf
        } else {
            Kind::Table
        }
    }

    fn check(&self, level: u8, kind: Kind, inherited: u64, pattern: u64, findings: &mut Findings) {
        let _ = inherited;
        match kind {
            Kind::Absent => {}
            Kind::Table if level > DIRECTORY_POINTERS => {
                findings.reserved(pattern, RESERVED_TOP, TOP, "bits 8:7 of the two highest levels must be zero");
            }
            Kind::Table => findings.reserved(pattern, PS, ENTRIES, "there are no pages of 1 GiB"),
            Kind::Leaf => match level {
                DIRECTORY => findings.reserved(pattern, RESERVED_2M, ENTRIES, "bits 20:13 of a page of 2 MiB must be zero"),
                DIRECTORY_POINTERS => findings.reserved(pattern, RESERVED_1G, ENTRIES, "bits 29:13 of a page of 1 GiB must be zero"),
                _ => {}
            },
        }
    }

    fn next(&self, level: u8, pattern: u64) -> Next {
        let _ = pattern;
        Next::whole(level.saturating_sub(1))
    }

    fn inherit(&self, level: u8, inherited: u64, pattern: u64) -> u64 {
        let _ = level;
        let mut inherited = inherited;
        let mut take = |condition, what| inherited |= if condition { what } else { 0 };
        take(pattern & RW == 0, NO_WRITE);
        take(pattern & US == 0, PRIVILEGED_ONLY);
        take(self.no_execute && pattern & NX != 0, NO_EXECUTE);
        inherited
    }

    fn leaf_size_log2(&self, level: u8, pattern: u64) -> u8 {
        let _ = pattern;
        Self::slot_log2(level)
    }

    fn attributes(&self, level: u8, inherited: u64, pattern: u64) -> Attributes {
        let path = self.inherit(level, inherited, pattern);
        let read = path & NO_READ == 0;
        let write = path & NO_WRITE == 0;
        let dirty = self.update_dirty && pattern & D != 0;
        Attributes {
            read,
            write,
            execute: self.no_execute && read && path & NO_EXECUTE == 0,
            privileged_only: path & PRIVILEGED_ONLY != 0,
            memory_type: MemoryType::WriteBack,
            coherent: true,
            accessed: self.update_accessed && pattern & A != 0,
            dirty,
            writable_when_dirty: self.update_dirty && write && !dirty,
        }
    }

    fn encode_leaf(&self, level: u8, size_log2: u8, attributes: Attributes) -> Option<Encoded> {
        let fits = level == PAGE_TABLE || (level < self.levels && self.large(level));
        if !fits || size_log2 != Self::slot_log2(level) {
            return None;
        }
        // A and D are set beforehand, as Linux does, unless somebody waits for D.
        let mut pattern = P | A;
        let mut set = |condition, bits| pattern |= if condition { bits } else { 0 };
        set(attributes.write, RW);
        set(attributes.write && !attributes.writable_when_dirty, D);
        set(!attributes.privileged_only, US);
        set(self.no_execute && !attributes.execute, NX);
        set(level != PAGE_TABLE, PS);
        let granted = self.attributes(level, self.permissions, pattern);
        // A present entry can be read, unless the device can read nothing at all.
        let widened = granted.read && !attributes.read;
        (!widened && !granted.grants_nothing()).then_some(Encoded { pattern, attributes: granted })
    }

    fn encode_table(&self, level: u8, next: u8) -> Option<u64> {
        (level < self.levels && level.checked_sub(1) == Some(next)).then_some(P | RW | US | A)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;
    use stagecraft_sdk::{FaultKind, Meaning};

    use super::*;

    fn open(settings: &[(&str, u64)]) -> V2 {
        V2::open(&settings.iter().map(|&(name, value)| (name.to_owned(), value)).collect()).unwrap()
    }

    fn leaf(format: &V2, level: u8, inherited: u64, pattern: u64) -> Attributes {
        match format.decode(level, inherited, pattern) {
            Meaning::Leaf { size_log2, attributes } => {
                assert_eq!(size_log2, 12 + 9 * level);
                attributes
            }
            other => panic!("{pattern:#x}: {other:?}"),
        }
    }

    #[test]
    fn only_bit_0_makes_an_entry_present() {
        let format = open(&[("levels", 5)]);
        for level in 0..5 {
            assert_eq!(format.decode(level, 0, !P), Meaning::Absent);
            assert!(format.explain(level, 0, !P).is_empty());
            assert_ne!(format.decode(level, 0, P), Meaning::Absent);
        }
    }

    #[test]
    fn every_bit_of_every_kind_of_entry() {
        for no_execute in [0, 1] {
            let format = open(&[("levels", 5), ("no-execute", no_execute)]);
            let execute = no_execute == 1;
            let full = Attributes { read: true, write: true, execute, coherent: true, dirty: true, ..Attributes::default() };
            // level, base pattern, lowest address bit, reserved bits
            let leaves = [(0, P | RW | US | D, 12, 0), (1, P | RW | US | D | PS, 21, RESERVED_2M), (2, P | RW | US | D | PS, 30, RESERVED_1G)];
            for (level, base, low, reserved) in leaves {
                for bit in (0..64).filter(|bit| !(low..=51).contains(bit)) {
                    let expected = match bit {
                        0 => Meaning::Absent,
                        7 if level > 0 => Meaning::Table { next: Next::whole(level - 1), inherited: 0 },
                        _ if 1 << bit & reserved != 0 => Meaning::Fault(FaultKind::Reserved),
                        _ => {
                            let attributes = match bit {
                                1 => Attributes { write: false, ..full },
                                2 => Attributes { privileged_only: true, ..full },
                                5 => Attributes { accessed: true, ..full },
                                6 => Attributes { dirty: false, writable_when_dirty: true, ..full },
                                63 => Attributes { execute: false, ..full },
                                _ => full,
                            };
                            Meaning::Leaf { size_log2: 12 + 9 * level, attributes }
                        }
                    };
                    assert_eq!(format.decode(level, 0, base ^ 1 << bit), expected, "level {level} bit {bit}");
                }
            }
            for level in 1..5 {
                for bit in (0..64).filter(|bit| !(12..=51).contains(bit)) {
                    let table = |inherited| Meaning::Table { next: Next::whole(level - 1), inherited };
                    let expected = match bit {
                        0 => Meaning::Absent,
                        1 => table(NO_WRITE),
                        2 => table(PRIVILEGED_ONLY),
                        63 if execute => table(NO_EXECUTE),
                        7 | 8 if level > 2 => Meaning::Fault(FaultKind::Reserved),
                        7 => continue,
                        _ => table(0),
                    };
                    assert_eq!(format.decode(level, 0, (P | RW | US) ^ 1 << bit), expected, "level {level} bit {bit}");
                }
            }
        }
        assert_eq!(open(&[("page-1g", 0)]).decode(2, 0, P | RW | US | PS), Meaning::Fault(FaultKind::Reserved));
    }

    #[test]
    fn restrictions_add_up_down_the_path() {
        let format = open(&[("no-execute", 1), ("read", 0)]);
        let root = format.geometry().roots[0].inherited;
        assert_eq!(root, NO_READ);
        let below = |inherited, pattern| format.inherit(1, inherited, pattern);
        assert_eq!(below(root, P | RW | US), NO_READ);
        assert_eq!(below(NO_WRITE, P | RW | NX), NO_WRITE | PRIVILEGED_ONLY | NO_EXECUTE);
        let attributes = leaf(&format, 0, NO_WRITE | PRIVILEGED_ONLY | NO_EXECUTE, P | RW | US);
        assert!(attributes.read && !attributes.write && attributes.privileged_only && !attributes.execute);
        // what cannot be read cannot be executed
        let attributes = leaf(&format, 0, NO_READ, P | RW | US);
        assert!(!attributes.read && attributes.write && !attributes.execute);
        assert!(open(&[("privileged", 1)]).geometry().privileged);
    }

    #[test]
    fn write_only_needs_a_device_that_cannot_read() {
        let asked = Attributes { write: true, coherent: true, ..Attributes::default() };
        assert_eq!(open(&[]).encode_leaf(0, 12, asked), None);
        assert_eq!(open(&[("read", 0)]).encode_leaf(0, 12, asked).unwrap().attributes, Attributes { accessed: true, dirty: true, ..asked });
        assert_eq!(open(&[("read", 0), ("write", 0)]).encode_leaf(0, 12, asked), None);
    }

    #[test]
    fn flags_count_if_hardware_sets_them() {
        let flags = |settings: &[(&str, u64)], pattern| {
            let attributes = leaf(&open(settings), 0, 0, pattern);
            (attributes.accessed, attributes.dirty, attributes.writable_when_dirty)
        };
        assert_eq!(flags(&[], P | US | RW), (false, false, true));
        assert_eq!(flags(&[], P | US | RW | A | D), (true, true, false));
        assert_eq!(flags(&[], P | US), (false, false, false));
        assert_eq!(flags(&[("update-dirty", 0)], P | US | RW | A), (true, false, false));
        assert_eq!(flags(&[("update-accessed", 0)], P | US | RW | A | D), (false, true, false));
        let level = &open(&[("update-accessed", 0)]).levels()[0];
        assert_eq!((level.accessed.mask, level.dirty.mask), (0, D));
    }

    #[test]
    fn the_geometry_has_both_canonical_halves_or_one_plain_range() {
        let roots = |settings: &[(&str, u64)]| {
            let roots = open(settings).geometry().roots;
            roots.iter().map(|root| (root.setting, root.first, root.last, root.address, root.level)).collect::<Vec<_>>()
        };
        let halves = [("root", 0, 0x7fff_ffff_ffff, 0x1234_5000, 3), ("root", 0xffff_8000_0000_0000, u64::MAX, 0x1234_5000, 3)];
        assert_eq!(roots(&[("root", 0x1234_5000)]), halves);
        let halves = [("root", 0, 0xff_ffff_ffff_ffff, 0, 4), ("root", 0xff00_0000_0000_0000, u64::MAX, 0, 4)];
        assert_eq!(roots(&[("levels", 5)]), halves);
        assert_eq!(roots(&[("sign-extended", 0)]), [("root", 0, 0xffff_ffff_ffff, 0, 3)]);
        assert_eq!(roots(&[("sign-extended", 0), ("levels", 5)]), [("root", 0, 0x1ff_ffff_ffff_ffff, 0, 4)]);
        let geometry = open(&[("levels", 5)]).geometry();
        let levels = geometry.levels.iter().map(|level| (level.number, level.index_lsb, level.index_bits)).collect::<Vec<_>>();
        assert_eq!(levels, [(1, 12, 9), (2, 21, 9), (3, 30, 9), (4, 39, 9), (5, 48, 9)]);
        assert_eq!(geometry.levels.iter().map(|level| level.leaf_sizes).collect::<Vec<_>>(), [1 << 12, 1 << 21, 1 << 30, 0, 0]);
        assert_eq!((open(&[("page-1g", 0)]).geometry().levels[2].leaf_sizes, geometry.output_bits), (0, 52));
        for level in &geometry.levels {
            for shape in &level.shapes {
                assert_eq!(shape.value & !shape.mask, 0);
                for segment in &shape.address {
                    assert_eq!(stagecraft_sdk::bits::mask(segment.entry_lsb + segment.width - 1, segment.entry_lsb) & shape.mask, 0);
                }
            }
        }
    }

    #[test]
    fn bad_settings_are_refused_by_name() {
        let bad = [
            ("levels", 3),
            ("levels", 6),
            ("output-bits", 53),
            ("page-1g", 2),
            ("sign-extended", 9),
            ("root", 0x123),
            ("root", 1 << 52),
            ("mode", 1),
        ];
        for (name, value) in bad {
            match V2::open(&[(name.to_owned(), value)].into_iter().collect()) {
                Err(Error::Invalid(invalid)) => assert_eq!((invalid.field.as_str(), invalid.value), (name, value)),
                other => panic!("{name}: {other:?}"),
            }
        }
    }

    #[test]
    fn suggestions_are_the_smallest_that_hold_the_need() {
        let suggest = |given: &[(&str, u64)], last_low, first_high| {
            let given = given.iter().map(|&(name, value)| (name.to_owned(), value)).collect();
            let need = Need { last_low, first_high, last_address: 1 << 51, alignment_log2: 12 };
            V2::suggest(&given, &need).unwrap().iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(suggest(&[], Some((1 << 47) - 1), Some(0xffff_8000_0000_0000)), "levels=4");
        assert_eq!(suggest(&[], Some(1 << 47), None), "levels=5");
        assert_eq!(suggest(&[], None, Some(0xffff_7fff_ffff_f000)), "levels=5");
        assert_eq!(suggest(&[("sign-extended", 0)], Some((1 << 48) - 1), Some(1 << 63)), "levels=4 sign-extended=0");
        assert_eq!(suggest(&[("sign-extended", 0)], Some(1 << 48), None), "levels=5 sign-extended=0");
        assert_eq!(suggest(&[("no-execute", 1), ("levels", 4)], Some(1 << 50), None), "levels=4 no-execute=1");
        assert!(V2::suggest(&[("sign-extended".to_owned(), 2)].into_iter().collect(), &Need::default()).is_err());
    }

    proptest! {
        #[test]
        fn encoding_never_grants_more_and_decodes_to_what_it_says(
            word in 0_u64..1 << 10, level in 0_u8..6, size in 10_u8..40, flags in 0_u64..64, levels in 4_u64..6,
        ) {
            let flag = |position: u32| flags >> position & 1;
            let format = open(&[
                ("levels", levels), ("page-1g", flag(0)), ("no-execute", flag(1)), ("read", flag(2)), ("write", flag(3)), ("update-accessed", flag(4)),
                ("update-dirty", flag(5)),
            ]);
            let asked = Attributes::unpack(word);
            let Some(encoded) = format.encode_leaf(level, size, asked) else { return Ok(()) };
            let geometry = format.geometry();
            let shape = geometry.levels[usize::from(level)].shapes.iter().find(|s| encoded.pattern & s.mask == s.value).unwrap();
            prop_assert!(geometry.levels[usize::from(level)].leaf_sizes & 1 << size != 0);
            prop_assert!(shape.address.iter().all(|s| encoded.pattern & stagecraft_sdk::bits::mask(s.entry_lsb + s.width - 1, s.entry_lsb) == 0));
            let expected = Meaning::Leaf { size_log2: size, attributes: encoded.attributes };
            prop_assert_eq!(format.decode(level, geometry.roots[0].inherited, encoded.pattern), expected);
            let granted = encoded.attributes;
            prop_assert!(asked.read >= granted.read && asked.write >= granted.write && asked.execute >= granted.execute);
            prop_assert_eq!(granted.privileged_only, asked.privileged_only);
            prop_assert!(!granted.grants_nothing());
            prop_assert_eq!(granted.writable_when_dirty, flag(5) == 1 && granted.write && asked.writable_when_dirty);
            if flag(1) == 1 && granted.read {
                prop_assert_eq!(granted.execute, asked.execute);
            }
        }

        #[test]
        fn a_plain_leaf_can_always_be_said(write: bool, level in 0_u8..3) {
            let asked = Attributes { read: true, write, coherent: true, ..Attributes::default() };
            let encoded = open(&[]).encode_leaf(level, 12 + 9 * level, asked).unwrap();
            prop_assert_eq!((encoded.attributes.read, encoded.attributes.write), (true, write));
        }

        #[test]
        fn tables_restrict_nothing(level in 1_u8..5, next in 0_u8..6) {
            let format = open(&[("levels", 5)]);
            match format.encode_table(level, next) {
                Some(pattern) => prop_assert_eq!(format.decode(level, 0, pattern), Meaning::Table { next: Next::whole(next), inherited: 0 }),
                None => prop_assert_ne!(level, next + 1),
            }
        }

        #[test]
        fn any_pattern_at_any_level_has_an_answer(level in 0_u8..5, inherited: u64, pattern: u64, size: u8, word: u64) {
            let format = open(&[("levels", 5)]);
            let meaning = format.decode(level, inherited, pattern);
            let explained = format.explain(level, inherited, pattern);
            prop_assert_eq!(matches!(meaning, Meaning::Fault(_)), explained.iter().any(|f| f.severity == stagecraft_sdk::Severity::Error));
            let _ = format.encode_leaf(level, size, Attributes::unpack(word));
        }
    }
}
