//! The first stage: x86-64 tables of four or five levels (sections 3.6 and 9.7).
//!
//! What differs from a processor's own use of such tables:
//!
//! * Nothing is said about execution: bit 63 is ignored and units refuse execute requests before they walk, so no leaf grants it.
//! * A page without U/S is for requests with supervisor privilege. Without `supervisor` (SRE) the unit refuses those too, so such a page grants
//!   nothing. Without `write-protect` (WPE) they may also write where R/W is 0, which shows as a writable leaf only where nobody else passes.
//! * Hardware sets A and D itself, A in entries that point to tables as well: a clear A is not a fault, and a writable leaf with a clear D is `writable_when_dirty`. With
//!   `extended-access` (EAFE) it sets EA wherever it sets A, so that an entry counts as accessed when it has both.
//! * Memory types are for devices that are part of the processors' coherency domain; all others ignore PAT, PCD and PWT. So they count only when
//!   `memory-type` is set, with the page attribute table as it is after power-on.
//!
//! `inherited` says what the tables above take away: `NO_WRITE`, `SUPERVISOR_ONLY`.

use stagecraft_sdk::{Attributes, Encoded, Error, Findings, Format, Kind, Level, Mark, MemoryType, Need, Next, Root, Segment, Settings, Shape};

use crate::spec::first_stage::{A, D, EA, P, PCD, PS, PWT, RESERVED_1G, RESERVED_2M, RW, US};
use crate::{DEFAULT_OUTPUT_BITS, INTERRUPTS, in_manifest_order, output_bits_for};

const ENTRIES: &str = "D51397 section 9.7";
const PASID_ENTRY: &str = "D51397 section 9.6";
const NAMES: &[&str] = &["levels", "root", "output-bits", "page-1g", "write-protect", "supervisor", "privileged", "extended-access", "memory-type"];

/// `inherited`: a table above has R/W clear.
const NO_WRITE: u64 = 1;
/// `inherited`: a table above has U/S clear.
const SUPERVISOR_ONLY: u64 = 2;

/// Kinds of table by their index into [`Format::levels`], which is the architecture's level minus one.
const PAGE_TABLE: u8 = 0;
const DIRECTORY: u8 = 1;
const DIRECTORY_POINTERS: u8 = 2;

/// `intel-vtd/first-stage`.
#[derive(Clone, Debug)]
#[allow(clippy::struct_excessive_bools)]
pub struct FirstStage {
    levels: u8,
    root: u64,
    output_bits: u8,
    page_1g: bool,
    write_protect: bool,
    supervisor: bool,
    privileged: bool,
    extended_access: bool,
    memory_type: bool,
}

impl FirstStage {
    /// Whether an entry of this table with PS set is a leaf.
    fn large(&self, level: u8) -> bool {
        level == DIRECTORY || (level == DIRECTORY_POINTERS && self.page_1g)
    }

    /// Size of an entry's slot.
    const fn slot_log2(level: u8) -> u8 {
        12 + 9 * level
    }

    /// What hardware sets in every entry that it uses (section 3.6.2).
    const fn accessed(&self) -> u64 {
        if self.extended_access { A | EA } else { A }
    }

    /// Power-on page attribute table: 0 and 4 write-back, 1 and 5 write-through, 2 and 6 uncached unless MTRRs say otherwise, 3 and 7 uncached.
    /// PAT therefore does not matter.
    fn memory_type(&self, pattern: u64) -> MemoryType {
        match (self.memory_type, pattern & (PCD | PWT)) {
            (false, _) | (true, 0) => MemoryType::WriteBack,
            (true, both) if both == PCD | PWT => MemoryType::Device,
            (true, _) => MemoryType::NonCacheable,
        }
    }
}

impl Format for FirstStage {
    const NAME: &'static str = "intel-vtd/first-stage";

    fn open(settings: &Settings) -> Result<Self, Error> {
        settings.only(NAMES)?;
        let format = Self {
            levels: settings.one_of("levels", 4, &[4, 5], PASID_ENTRY)? as u8,
            root: settings.or("root", 0),
            output_bits: settings.within("output-bits", DEFAULT_OUTPUT_BITS, 12, 52, ENTRIES)? as u8,
            page_1g: settings.flag("page-1g", true)?,
            write_protect: settings.flag("write-protect", false)?,
            supervisor: settings.flag("supervisor", false)?,
            privileged: settings.flag("privileged", false)?,
            extended_access: settings.flag("extended-access", false)?,
            memory_type: settings.flag("memory-type", false)?,
        };
        if format.privileged && !format.supervisor {
            return Err(Error::invalid("privileged", 1, PASID_ENTRY, "requests with supervisor privilege are refused unless supervisor is 1"));
        }
        if format.root & 0xfff != 0 {
            return Err(Error::invalid("root", format.root, PASID_ENTRY, "the root table must be aligned to 4096 bytes"));
        }
        Ok(format)
    }

    fn suggest(settings: &Settings, need: &Need) -> Result<Settings, Error> {
        let mut settings = settings.clone();
        let four_levels_hold = need.last_low.is_none_or(|last| last >> 47 == 0) && need.first_high.is_none_or(|first| first >> 47 == u64::MAX >> 47);
        settings.set_default("levels", if four_levels_hold { 4 } else { 5 });
        if output_bits_for(need.last_address) > DEFAULT_OUTPUT_BITS {
            settings.set_default("output-bits", output_bits_for(need.last_address));
        }
        Self::open(&settings)?;
        Ok(in_manifest_order(&settings, NAMES))
    }

    fn candidates() -> Vec<Settings> {
        let of = |levels, output_bits, supervisor| Settings::of(&[("levels", levels), ("output-bits", output_bits), ("supervisor", supervisor)]);
        let mut candidates = vec![Settings::of(&[("levels", 4)]), Settings::of(&[("levels", 5)])];
        candidates
            .extend([(4, 52, 0), (5, 52, 0), (4, 52, 1), (5, 52, 1)].map(|(levels, output_bits, supervisor)| of(levels, output_bits, supervisor)));
        candidates
    }

    fn levels(&self) -> Vec<Level> {
        let address = |low| vec![Segment::in_place(51, low)];
        let accessed = Mark { mask: self.accessed(), value: self.accessed() };
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
                accessed,
                dirty: Mark { mask: D, value: D },
                table_accessed: accessed,
            }
        };
        (0..self.levels).map(level).collect()
    }

    fn roots(&self) -> Vec<Root> {
        // Both canonical halves of the input addresses are walked from one table: the lower half uses its first 256 entries.
        let half = 1_u64 << (11 + 9 * self.levels);
        let root = |first, last| Root { setting: "root", first, last, ignored: 0, address: self.root, level: self.levels - 1, inherited: 0 };
        vec![root(0, half - 1), root(half.wrapping_neg(), u64::MAX)]
    }

    fn output_bits(&self) -> u8 {
        self.output_bits
    }

    fn privileged(&self) -> bool {
        self.privileged
    }

    fn untranslated(&self) -> Vec<(u64, u64)> {
        vec![INTERRUPTS]
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
            Kind::Table if level > DIRECTORY_POINTERS => findings.reserved(pattern, PS, ENTRIES, "the page size bit is reserved at this level"),
            Kind::Table => findings.reserved(pattern, PS, ENTRIES, "the unit has no pages of 1 GiB in its first stage"),
            Kind::Leaf if level == DIRECTORY_POINTERS => {
                findings.reserved(pattern, RESERVED_1G, ENTRIES, "bits 29:13 of a page of 1 GiB are reserved");
            }
            Kind::Leaf if level == DIRECTORY => {
                findings.reserved(pattern, RESERVED_2M, ENTRIES, "bits 20:13 of a page of 2 MiB are reserved");
            }
            Kind::Leaf => {}
        }
    }

    fn next(&self, level: u8, pattern: u64) -> Next {
        let _ = pattern;
        Next::whole(level.saturating_sub(1))
    }

    fn inherit(&self, level: u8, inherited: u64, pattern: u64) -> u64 {
        let _ = level;
        let mut inherited = inherited;
        if pattern & RW == 0 {
            inherited |= NO_WRITE;
        }
        if pattern & US == 0 {
            inherited |= SUPERVISOR_ONLY;
        }
        inherited
    }

    fn leaf_size_log2(&self, level: u8, pattern: u64) -> u8 {
        let _ = pattern;
        Self::slot_log2(level)
    }

    fn attributes(&self, level: u8, inherited: u64, pattern: u64) -> Attributes {
        let path = self.inherit(level, inherited, pattern);
        let supervisor_page = path & SUPERVISOR_ONLY != 0;
        let passes = !supervisor_page || self.supervisor;
        let all_are_privileged = supervisor_page || self.privileged;
        let write = passes && (path & NO_WRITE == 0 || (all_are_privileged && !self.write_protect));
        let memory_type = self.memory_type(pattern);
        Attributes {
            read: passes,
            write,
            execute: false,
            privileged_only: supervisor_page && passes,
            memory_type,
            coherent: memory_type == MemoryType::WriteBack,
            accessed: pattern & self.accessed() == self.accessed(),
            dirty: pattern & D != 0,
            writable_when_dirty: write && pattern & D == 0,
        }
    }

    fn encode_leaf(&self, level: u8, size_log2: u8, attributes: Attributes) -> Option<Encoded> {
        let fits = level == PAGE_TABLE || (level < self.levels && self.large(level));
        let nothing_left = !attributes.read || (attributes.privileged_only && !self.supervisor);
        // Supervisor requests would write all the same.
        let cannot_forbid_writes = !attributes.write && self.supervisor && !self.write_protect;
        if !fits || size_log2 != Self::slot_log2(level) || nothing_left || cannot_forbid_writes {
            return None;
        }
        // A is set beforehand, and D unless somebody waits for it: a unit whose walks do not snoop cannot set them (section 3.10).
        let mut pattern = P | self.accessed();
        let mut set = |condition, bits| pattern |= if condition { bits } else { 0 };
        set(attributes.write, RW);
        set(attributes.write && !attributes.writable_when_dirty, D);
        set(!attributes.privileged_only, US);
        set(level != PAGE_TABLE, PS);
        set(self.memory_type && attributes.memory_type != MemoryType::WriteBack, PCD);
        set(self.memory_type && attributes.memory_type == MemoryType::Device, PWT);
        Some(Encoded { pattern, attributes: self.attributes(level, 0, pattern) })
    }

    fn encode_table(&self, level: u8, next: u8) -> Option<u64> {
        (level < self.levels && level.checked_sub(1) == Some(next)).then_some(P | RW | US | self.accessed())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;
    use stagecraft_sdk::{FaultKind, Meaning};

    use super::*;

    fn open(settings: &[(&str, u64)]) -> FirstStage {
        FirstStage::open(&settings.iter().map(|&(name, value)| (name.to_owned(), value)).collect()).unwrap()
    }

    fn leaf(format: &FirstStage, level: u8, inherited: u64, pattern: u64) -> Attributes {
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
        let format = open(&[("levels", 5)]);
        let full = Attributes { read: true, write: true, coherent: true, dirty: true, ..Attributes::default() };
        // level, base pattern, lowest address bit, reserved bits
        let leaves = [(0, P | RW | US | D, 12, 0), (1, P | RW | US | D | PS, 21, RESERVED_2M), (2, P | RW | US | D | PS, 30, RESERVED_1G)];
        for (level, base, low, reserved) in leaves {
            for bit in (0..64).filter(|bit| !(low..=51).contains(bit)) {
                let flipped = base ^ 1 << bit;
                let expected = match bit {
                    0 => Meaning::Absent,
                    7 if level > 0 => Meaning::Table { next: Next::whole(level - 1), inherited: 0 },
                    _ if 1 << bit & reserved != 0 => Meaning::Fault(FaultKind::Reserved),
                    _ => {
                        let attributes = match bit {
                            1 => Attributes { write: false, ..full },
                            2 => Attributes { read: false, write: false, ..full },
                            5 => Attributes { accessed: true, ..full },
                            6 => Attributes { dirty: false, writable_when_dirty: true, ..full },
                            _ => full,
                        };
                        Meaning::Leaf { size_log2: 12 + 9 * level, attributes }
                    }
                };
                assert_eq!(format.decode(level, 0, flipped), expected, "level {level} bit {bit}");
            }
        }
        for level in 1..5 {
            for bit in (0..64).filter(|bit| !(12..=51).contains(bit)) {
                let expected = match bit {
                    0 => Meaning::Absent,
                    1 => Meaning::Table { next: Next::whole(level - 1), inherited: NO_WRITE },
                    2 => Meaning::Table { next: Next::whole(level - 1), inherited: SUPERVISOR_ONLY },
                    7 if level > 2 => Meaning::Fault(FaultKind::Reserved),
                    7 => continue,
                    _ => Meaning::Table { next: Next::whole(level - 1), inherited: 0 },
                };
                assert_eq!(format.decode(level, 0, (P | RW | US) ^ 1 << bit), expected, "level {level} bit {bit}");
            }
        }
        assert_eq!(open(&[("page-1g", 0)]).decode(2, 0, P | RW | US | PS), Meaning::Fault(FaultKind::Reserved));
    }

    #[test]
    fn restrictions_add_up_down_the_path() {
        let format = open(&[("supervisor", 1), ("write-protect", 1)]);
        let below = |inherited, pattern| format.inherit(1, inherited, pattern);
        assert_eq!(below(0, P | RW | US), 0);
        assert_eq!(below(NO_WRITE, P | RW), NO_WRITE | SUPERVISOR_ONLY);
        let attributes = leaf(&format, 0, NO_WRITE | SUPERVISOR_ONLY, P | RW | US);
        assert!(attributes.read && !attributes.write && attributes.privileged_only);
    }

    #[test]
    fn supervisor_requests_need_sre_and_ignore_read_only_without_wpe() {
        let grants = |settings: &[(&str, u64)], pattern| {
            let a = leaf(&open(settings), 0, 0, pattern);
            (a.read, a.write, a.privileged_only)
        };
        assert_eq!(grants(&[], P | RW), (false, false, false));
        assert_eq!(grants(&[("supervisor", 1), ("write-protect", 1)], P), (true, false, true));
        assert_eq!(grants(&[("supervisor", 1)], P), (true, true, true));
        // user requests cannot write here, so the leaf is read-only, although supervisor ones can
        assert_eq!(grants(&[("supervisor", 1)], P | US), (true, false, false));
        assert_eq!(grants(&[("supervisor", 1), ("privileged", 1)], P | US), (true, true, false));
        assert_eq!(grants(&[("supervisor", 1), ("privileged", 1), ("write-protect", 1)], P | US), (true, false, false));
        assert!(FirstStage::open(&[("privileged".to_owned(), 1)].into_iter().collect()).is_err());
        assert!(open(&[("supervisor", 1), ("privileged", 1)]).geometry().privileged);
    }

    #[test]
    fn memory_types_count_only_when_asked_for() {
        let types = |format: &FirstStage| [0, PWT, PCD, PCD | PWT].map(|bits| leaf(format, 0, 0, P | RW | US | bits).memory_type);
        assert_eq!(types(&open(&[])), [MemoryType::WriteBack; 4]);
        let expected = [MemoryType::WriteBack, MemoryType::NonCacheable, MemoryType::NonCacheable, MemoryType::Device];
        assert_eq!(types(&open(&[("memory-type", 1)])), expected);
        // PAT selects the upper, equal half of the power-on table; in a large page it is bit 12
        assert_eq!(leaf(&open(&[("memory-type", 1)]), 0, 0, P | US | PCD | PWT | 1 << 7).memory_type, MemoryType::Device);
        assert_eq!(leaf(&open(&[("memory-type", 1)]), 1, 0, P | US | PS | PCD | 1 << 12).memory_type, MemoryType::NonCacheable);
    }

    #[test]
    fn the_geometry_has_both_canonical_halves_of_one_table() {
        let geometry = open(&[("levels", 4), ("root", 0x1234_5000)]).geometry();
        let halves: Vec<_> = geometry.roots.iter().map(|root| (root.setting, root.first, root.last, root.address, root.level)).collect();
        assert_eq!(halves, [("root", 0, 0x7fff_ffff_ffff, 0x1234_5000, 3), ("root", 0xffff_8000_0000_0000, u64::MAX, 0x1234_5000, 3)]);
        let five = open(&[("levels", 5)]).geometry();
        assert_eq!((five.roots[0].last, five.roots[1].first), (0xff_ffff_ffff_ffff, 0xff00_0000_0000_0000));
        assert_eq!(
            five.levels.iter().map(|level| (level.number, level.index_lsb)).collect::<Vec<_>>(),
            [(1, 12), (2, 21), (3, 30), (4, 39), (5, 48)]
        );
        assert_eq!(geometry.levels.iter().map(|level| level.leaf_sizes).collect::<Vec<_>>(), [1 << 12, 1 << 21, 1 << 30, 0]);
        assert_eq!(open(&[("page-1g", 0)]).geometry().levels[2].leaf_sizes, 0);
        assert_eq!(geometry.output_bits, 48);
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
        for (name, value) in [("levels", 3), ("output-bits", 53), ("page-1g", 2), ("root", 0x123), ("no-execute", 1)] {
            match FirstStage::open(&[(name.to_owned(), value)].into_iter().collect()) {
                Err(Error::Invalid(invalid)) => assert_eq!((invalid.field.as_str(), invalid.value), (name, value)),
                other => panic!("{name}: {other:?}"),
            }
        }
    }

    #[test]
    fn whatever_is_used_is_marked_pointers_too() {
        for (settings, mark) in [(&[][..], A), (&[("extended-access", 1)], A | EA)] {
            let format = open(settings);
            for level in format.levels() {
                assert_eq!([level.accessed, level.table_accessed, level.dirty], [mark, mark, D].map(|bit| Mark { mask: bit, value: bit }));
            }
            for marks in [0, A, EA, A | EA] {
                let Meaning::Leaf { attributes, .. } = format.decode(0, 0, P | RW | US | marks) else { unreachable!() };
                assert_eq!(attributes.accessed, marks & mark == mark, "{marks:#x} of {mark:#x}");
            }
        }
    }

    #[test]
    fn suggestions_are_the_smallest_that_hold_the_need() {
        let suggest = |given: &[(&str, u64)], need: &Need| {
            let given = given.iter().map(|&(name, value)| (name.to_owned(), value)).collect();
            FirstStage::suggest(&given, need).unwrap().iter().map(|(name, value)| (name.to_owned(), value)).collect::<Vec<_>>()
        };
        let settings = |list: &[(&str, u64)]| list.iter().map(|&(name, value)| (name.to_owned(), value)).collect::<Vec<_>>();
        let need = Need { last_low: Some((1 << 47) - 1), first_high: Some(0xffff_8000_0000_0000), last_address: (1 << 48) - 1, alignment_log2: 12 };
        assert_eq!(suggest(&[], &need), settings(&[("levels", 4)]));
        assert_eq!(suggest(&[], &Need { last_low: Some(1 << 47), ..need }), settings(&[("levels", 5)]));
        assert_eq!(suggest(&[], &Need { first_high: Some(0xffff_7fff_ffff_f000), ..need }), settings(&[("levels", 5)]));
        assert_eq!(suggest(&[], &Need { last_address: 1 << 50, ..need }), settings(&[("levels", 4), ("output-bits", 51)]));
        let given = [("write-protect", 1), ("levels", 4)];
        assert_eq!(suggest(&given, &Need { last_low: Some(1 << 50), ..need }), settings(&[("levels", 4), ("write-protect", 1)]));
    }

    proptest! {
        #[test]
        fn encoding_never_grants_more_and_decodes_to_what_it_says(
            word in 0_u64..1 << 10, level in 0_u8..6, size in 10_u8..40, flags in 0_u64..128, levels in 4_u64..6,
        ) {
            let flag = |position: u32| flags >> position & 1;
            let supervisor = flag(1) | flag(2);
            let format = open(&[
                ("levels", levels), ("write-protect", flag(0)), ("supervisor", supervisor), ("privileged", flag(2)),
                ("page-1g", flag(3)), ("memory-type", flag(4)), ("extended-access", flag(5)),
            ]);
            let asked = Attributes::unpack(word);
            let Some(encoded) = format.encode_leaf(level, size, asked) else { return Ok(()) };
            let geometry = format.geometry();
            let shape = geometry.levels[usize::from(level)].shapes.iter().find(|s| encoded.pattern & s.mask == s.value).unwrap();
            prop_assert!(geometry.levels[usize::from(level)].leaf_sizes & 1 << size != 0);
            prop_assert!(shape.address.iter().all(|s| encoded.pattern & stagecraft_sdk::bits::mask(s.entry_lsb + s.width - 1, s.entry_lsb) == 0));
            prop_assert_eq!(format.decode(level, 0, encoded.pattern), Meaning::Leaf { size_log2: size, attributes: encoded.attributes });
            let granted = encoded.attributes;
            prop_assert!(asked.read >= granted.read && asked.write >= granted.write && asked.execute >= granted.execute);
            prop_assert!(granted.privileged_only >= asked.privileged_only);
            prop_assert!(!granted.grants_nothing());
            if flag(4) == 1 {
                prop_assert_eq!(granted.memory_type, asked.memory_type);
            }
            if asked.write {
                prop_assert_eq!(granted.writable_when_dirty, asked.writable_when_dirty);
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
        fn any_pattern_at_any_level_has_an_answer(level: u8, inherited: u64, pattern: u64, size: u8, word: u64) {
            let format = open(&[]);
            let level = level % 4;
            let meaning = format.decode(level, inherited, pattern);
            let explained = format.explain(level, inherited, pattern);
            prop_assert_eq!(matches!(meaning, Meaning::Fault(_)), explained.iter().any(|f| f.severity == stagecraft_sdk::Severity::Error));
            let _ = format.encode_leaf(level, size, Attributes::unpack(word));
        }
    }
}
