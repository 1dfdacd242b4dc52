//! The second stage: tables of three to five levels with permissions of their own (sections 3.7 and 9.8).
//!
//! * There is no present bit: an entry that allows neither reads nor writes is absent. Write-only leaves are legal.
//! * Reads and writes must be allowed by every entry on the way. With `io-permissions` (SSIRWE) bits 61 and 62 say so and 0 and 1 mean nothing.
//! * Accesses snoop the processors' caches unless the request itself asks not to, so every leaf is coherent; SNP, where the unit has
//!   `snoop-control`, also overrules such requests. Execution, privilege and memory types cannot be said.
//! * With `accessed-dirty` (SSADE) hardware sets A in every entry that it uses, pointers too, and D in leaves.
//! * Input addresses end where the tables or the unit (MGAW, `input-bits`) end.
//! * Requests without PASID to 0xfee0_0000..=0xfeef_ffff are interrupts and never walk: [`Format::untranslated`] says so of tables that are made, and `unit`
//!   of those that are read. Leaves that point there (fault LGN.4 or SGN.8) are not refused here: the memory map does.
//!
//! `inherited` says what the tables above take away: `NO_READ`, `NO_WRITE`.

use stagecraft_sdk::{Attributes, Encoded, Error, Findings, Format, Kind, Level, Mark, MemoryType, Need, Next, Root, Segment, Settings, Shape};

use crate::spec::second_stage::{A, D, IR, IW, PS, R, RESERVED_1G, RESERVED_2M, SNP, W};
use crate::{DEFAULT_OUTPUT_BITS, INTERRUPTS, in_manifest_order, output_bits_for};

const ENTRIES: &str = "D51397 section 9.8";
const WIDTHS: &str = "D51397 section 3.7";
const NAMES: &[&str] = &["levels", "root", "output-bits", "input-bits", "page-2m", "page-1g", "snoop-control", "accessed-dirty", "io-permissions"];

/// `inherited`: a table above forbids reads.
const NO_READ: u64 = 1;
/// `inherited`: a table above forbids writes.
const NO_WRITE: u64 = 2;

/// Kinds of table by their index into [`Format::levels`], which is the architecture's level minus one.
const PAGE_TABLE: u8 = 0;
const DIRECTORY: u8 = 1;
const DIRECTORY_POINTERS: u8 = 2;

/// `intel-vtd/second-stage`.
#[derive(Clone, Debug)]
#[allow(clippy::struct_excessive_bools)]
pub struct SecondStage {
    levels: u8,
    root: u64,
    output_bits: u8,
    input_bits: u8,
    page_2m: bool,
    page_1g: bool,
    snoop_control: bool,
    accessed_dirty: bool,
    read_bit: u64,
    write_bit: u64,
}

/// Input addresses of five levels; fewer levels have fewer whatever `input-bits` says.
pub(crate) const WIDEST: u64 = address_width(5);

/// Input addresses of tables with this many levels have so many bits.
pub(crate) const fn address_width(levels: u64) -> u64 {
    12 + 9 * levels
}

impl SecondStage {
    /// Whether an entry of this table with PS set is a leaf.
    fn large(&self, level: u8) -> bool {
        (level == DIRECTORY && self.page_2m) || (level == DIRECTORY_POINTERS && self.page_1g)
    }

    /// Size of an entry's slot.
    const fn slot_log2(level: u8) -> u8 {
        12 + 9 * level
    }

    /// One shape for readable entries and one for the rest of the writable ones: a shape cannot say "either".
    fn shapes(&self, mask: u64, value: u64, low: u8) -> [Shape; 2] {
        let address = || vec![Segment::in_place(51, low)];
        [
            Shape { mask: mask | self.read_bit, value: value | self.read_bit, address: address() },
            Shape { mask: mask | self.read_bit | self.write_bit, value: value | self.write_bit, address: address() },
        ]
    }
}

impl Format for SecondStage {
    const NAME: &'static str = "intel-vtd/second-stage";

    fn open(settings: &Settings) -> Result<Self, Error> {
        settings.only(NAMES)?;
        let levels = settings.one_of("levels", 4, &[3, 4, 5], ENTRIES)?;
        let io_permissions = settings.flag("io-permissions", false)?;
        let format = Self {
            levels: levels as u8,
            root: settings.or("root", 0),
            output_bits: settings.within("output-bits", DEFAULT_OUTPUT_BITS, 12, 52, ENTRIES)? as u8,
            input_bits: settings.within("input-bits", WIDEST, 12, WIDEST, WIDTHS)?.min(address_width(levels)) as u8,
            page_2m: settings.flag("page-2m", true)?,
            page_1g: settings.flag("page-1g", true)?,
            snoop_control: settings.flag("snoop-control", false)?,
            accessed_dirty: settings.flag("accessed-dirty", false)?,
            read_bit: if io_permissions { IR } else { R },
            write_bit: if io_permissions { IW } else { W },
        };
        if format.root & 0xfff != 0 {
            return Err(Error::invalid("root", format.root, ENTRIES, "the root table must be aligned to 4096 bytes"));
        }
        Ok(format)
    }

    fn suggest(settings: &Settings, need: &Need) -> Result<Settings, Error> {
        let mut settings = settings.clone();
        // There is no upper half: four levels are as good as five for it.
        settings.set_default("levels", if need.last_low.is_none_or(|last| last >> 48 == 0) { 4 } else { 5 });
        if output_bits_for(need.last_address) > DEFAULT_OUTPUT_BITS {
            settings.set_default("output-bits", output_bits_for(need.last_address));
        }
        Self::open(&settings)?;
        Ok(in_manifest_order(&settings, NAMES))
    }

    fn candidates() -> Vec<Settings> {
        let levels = [4, 3, 5];
        let plain = levels.map(|levels| Settings::of(&[("levels", levels)]));
        let snooping = levels.map(|levels| Settings::of(&[("levels", levels), ("output-bits", 52), ("snoop-control", 1)]));
        let marked = levels.map(|levels| Settings::of(&[("levels", levels), ("output-bits", 52), ("snoop-control", 1), ("accessed-dirty", 1)]));
        let wide = levels.map(|levels| Settings::of(&[("levels", levels), ("output-bits", 52)]));
        let io = levels.map(|levels| {
            Settings::of(&[("levels", levels), ("output-bits", 52), ("snoop-control", 1), ("accessed-dirty", 1), ("io-permissions", 1)])
        });
        [plain, snooping, marked, wide, io].concat()
    }

    fn levels(&self) -> Vec<Level> {
        let mark = |bit| if self.accessed_dirty { Mark { mask: bit, value: bit } } else { Mark::default() };
        let level = |level: u8| {
            let slot = Self::slot_log2(level);
            let mut shapes = Vec::new();
            if self.large(level) {
                shapes.extend(self.shapes(PS, PS, slot));
                shapes.extend(self.shapes(PS, 0, 12));
            } else {
                shapes.extend(self.shapes(0, 0, 12));
            }
            Level {
                number: level as i8 + 1,
                index_lsb: slot,
                index_bits: 9,
                shapes,
                leaf_sizes: if level == PAGE_TABLE || self.large(level) { 1 << slot } else { 0 },
                absent: 0,
                accessed: mark(A),
                dirty: mark(D),
                table_accessed: mark(A),
            }
        };
        (0..self.levels).map(level).collect()
    }

    fn roots(&self) -> Vec<Root> {
        let last = u64::MAX >> (64 - self.input_bits);
        vec![Root { setting: "root", first: 0, last, ignored: 0, address: self.root, level: self.levels - 1, inherited: 0 }]
    }

    fn output_bits(&self) -> u8 {
        self.output_bits
    }

    fn untranslated(&self) -> Vec<(u64, u64)> {
        vec![INTERRUPTS]
    }

    fn kind(&self, level: u8, pattern: u64) -> Kind {
        if pattern & (self.read_bit | self.write_bit) == 0 {
            Kind::Absent
        } else if level == PAGE_TABLE || (pattern & PS != 0 && self.large(level)) {
            Kind::Leaf
        } else {
            Kind::Table
        }
    }

    fn check(&self, level: u8, kind: Kind, inherited: u64, pattern: u64, findings: &mut Findings) {
        let _ = inherited;
        if kind == Kind::Absent {
            return;
        }
        if self.write_bit != IW {
            findings.reserved(pattern, IW, ENTRIES, "bit 62 is reserved unless I/O permissions are enabled");
        }
        match kind {
            Kind::Table => {
                findings.reserved(pattern, SNP, ENTRIES, "the snoop bit is reserved in an entry that points to a table");
                let reason = match level {
                    DIRECTORY => "the unit has no pages of 2 MiB in its second stage",
                    DIRECTORY_POINTERS => "the unit has no pages of 1 GiB in its second stage",
                    _ => "the page size bit is reserved at this level",
                };
                findings.reserved(pattern, PS, ENTRIES, reason);
            }
            _ => {
                if !self.snoop_control {
                    findings.reserved(pattern, SNP, ENTRIES, "the snoop bit is reserved on a unit without snoop control");
                }
                match level {
                    DIRECTORY => findings.reserved(pattern, RESERVED_2M, ENTRIES, "bits 20:12 of a page of 2 MiB are reserved"),
                    DIRECTORY_POINTERS => findings.reserved(pattern, RESERVED_1G, ENTRIES, "bits 29:12 of a page of 1 GiB are reserved"),
                    _ => {}
                }
            }
        }
    }

    fn next(&self, level: u8, pattern: u64) -> Next {
        let _ = pattern;
        Next::whole(level.saturating_sub(1))
    }

    fn inherit(&self, level: u8, inherited: u64, pattern: u64) -> u64 {
        let _ = level;
        let mut inherited = inherited;
        if pattern & self.read_bit == 0 {
            inherited |= NO_READ;
        }
        if pattern & self.write_bit == 0 {
            inherited |= NO_WRITE;
        }
        inherited
    }

    fn leaf_size_log2(&self, level: u8, pattern: u64) -> u8 {
        let _ = pattern;
        Self::slot_log2(level)
    }

    fn attributes(&self, level: u8, inherited: u64, pattern: u64) -> Attributes {
        let path = self.inherit(level, inherited, pattern);
        let write = path & NO_WRITE == 0;
        let dirty = self.accessed_dirty && pattern & D != 0;
        Attributes {
            read: path & NO_READ == 0,
            write,
            execute: false,
            privileged_only: false,
            memory_type: MemoryType::WriteBack,
            coherent: true,
            accessed: self.accessed_dirty && pattern & A != 0,
            dirty,
            writable_when_dirty: self.accessed_dirty && write && !dirty,
        }
    }

    fn encode_leaf(&self, level: u8, size_log2: u8, attributes: Attributes) -> Option<Encoded> {
        let fits = level == PAGE_TABLE || (level < self.levels && self.large(level));
        let nothing_left = (!attributes.read && !attributes.write) || attributes.privileged_only;
        if !fits || size_log2 != Self::slot_log2(level) || nothing_left {
            return None;
        }
        let mut pattern = 0;
        let mut set = |condition, bits| pattern |= if condition { bits } else { 0 };
        set(attributes.read, self.read_bit);
        set(attributes.write, self.write_bit);
        set(level != PAGE_TABLE, PS);
        set(self.snoop_control && attributes.coherent, SNP);
        set(self.accessed_dirty, A);
        set(self.accessed_dirty && attributes.write && !attributes.writable_when_dirty, D);
        Some(Encoded { pattern, attributes: self.attributes(level, 0, pattern) })
    }

    fn encode_table(&self, level: u8, next: u8) -> Option<u64> {
        let accessed = if self.accessed_dirty { A } else { 0 };
        (level < self.levels && level.checked_sub(1) == Some(next)).then_some(self.read_bit | self.write_bit | accessed)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;
    use stagecraft_sdk::{FaultKind, Meaning};

    use super::*;

    fn open(settings: &[(&str, u64)]) -> SecondStage {
        SecondStage::open(&settings.iter().map(|&(name, value)| (name.to_owned(), value)).collect()).unwrap()
    }

    fn plain(read: bool, write: bool) -> Attributes {
        Attributes { read, write, coherent: true, ..Attributes::default() }
    }

    const RESERVED: Meaning = Meaning::Fault(FaultKind::Reserved);

    #[test]
    fn an_entry_is_present_if_it_allows_anything() {
        let format = open(&[("levels", 5)]);
        for level in 0..5 {
            assert_eq!(format.decode(level, 0, !(R | W)), Meaning::Absent);
            assert!(format.explain(level, 0, !(R | W)).is_empty());
            assert_ne!(format.decode(level, 0, R), Meaning::Absent);
            assert_ne!(format.decode(level, 0, W), Meaning::Absent);
        }
        assert_eq!(format.decode(0, 0, W), Meaning::Leaf { size_log2: 12, attributes: plain(false, true) });
    }

    #[test]
    fn every_bit_of_every_kind_of_entry() {
        let format = open(&[("levels", 5)]);
        let leaves = [(0, R | W, 12, 0), (1, R | W | PS, 21, RESERVED_2M), (2, R | W | PS, 30, RESERVED_1G)];
        for (level, base, low, reserved) in leaves {
            for bit in (0..64).filter(|bit| !(low..=51).contains(bit)) {
                let expected = match bit {
                    0 => Meaning::Leaf { size_log2: 12 + 9 * level, attributes: plain(false, true) },
                    1 => Meaning::Leaf { size_log2: 12 + 9 * level, attributes: plain(true, false) },
                    7 if level > 0 => Meaning::Table { next: Next::whole(level - 1), inherited: 0 },
                    11 | 62 => RESERVED,
                    _ if 1 << bit & reserved != 0 => RESERVED,
                    _ => Meaning::Leaf { size_log2: 12 + 9 * level, attributes: plain(true, true) },
                };
                assert_eq!(format.decode(level, 0, base ^ 1 << bit), expected, "level {level} bit {bit}");
            }
        }
        for level in 1..5 {
            for bit in (0..64).filter(|bit| !(12..=51).contains(bit)) {
                let expected = match bit {
                    0 => Meaning::Table { next: Next::whole(level - 1), inherited: NO_READ },
                    1 => Meaning::Table { next: Next::whole(level - 1), inherited: NO_WRITE },
                    7 if level > 2 => RESERVED,
                    7 => continue,
                    11 | 62 => RESERVED,
                    _ => Meaning::Table { next: Next::whole(level - 1), inherited: 0 },
                };
                assert_eq!(format.decode(level, 0, (R | W) ^ 1 << bit), expected, "level {level} bit {bit}");
            }
        }
    }

    #[test]
    fn settings_decide_about_page_sizes_snoop_and_flags() {
        assert_eq!(open(&[("page-2m", 0)]).decode(1, 0, R | PS), RESERVED);
        assert_eq!(open(&[("page-1g", 0)]).decode(2, 0, R | PS), RESERVED);
        let snooped = Meaning::Leaf { size_log2: 12, attributes: plain(true, false) };
        assert_eq!(open(&[("snoop-control", 1)]).decode(0, 0, R | SNP), snooped);
        assert_eq!(open(&[("snoop-control", 1)]).decode(1, 0, R | SNP), RESERVED);
        assert_eq!(open(&[]).decode(0, 0, R | A | D), snooped);
        let flags = open(&[("accessed-dirty", 1)]);
        let attributes = |pattern| match flags.decode(0, 0, pattern) {
            Meaning::Leaf { attributes, .. } => (attributes.accessed, attributes.dirty, attributes.writable_when_dirty),
            other => panic!("{other:?}"),
        };
        assert_eq!(attributes(R | W), (false, false, true));
        assert_eq!(attributes(R | W | A | D), (true, true, false));
        assert_eq!(attributes(R), (false, false, false));
        assert_eq!((flags.levels()[0].accessed.mask, flags.levels()[0].dirty.mask, open(&[]).levels()[0].dirty.mask), (A, D, 0));
        assert_eq!((flags.levels()[1].table_accessed.mask, open(&[]).levels()[1].table_accessed.mask), (A, 0), "in pointers too");
    }

    #[test]
    fn io_permissions_replace_the_others() {
        let format = open(&[("io-permissions", 1)]);
        assert_eq!(format.decode(0, 0, R | W), Meaning::Absent);
        assert_eq!(format.decode(0, 0, IW), Meaning::Leaf { size_log2: 12, attributes: plain(false, true) });
        assert_eq!(format.decode(1, 0, IR | R | W), Meaning::Table { next: Next::whole(0), inherited: NO_WRITE });
        assert_eq!(format.encode_table(1, 0), Some(IR | IW));
    }

    #[test]
    fn permissions_are_those_that_every_level_grants() {
        let format = open(&[]);
        let below = format.inherit(2, format.inherit(3, 0, R | W), R);
        assert_eq!(format.decode(0, below, R | W), Meaning::Leaf { size_log2: 12, attributes: plain(true, false) });
        assert_eq!(format.decode(0, below, W), Meaning::Leaf { size_log2: 12, attributes: plain(false, false) });
    }

    #[test]
    fn the_geometry_follows_levels_and_input_bits() {
        for (levels, last) in [(3, 0x7f_ffff_ffff), (4, 0xffff_ffff_ffff), (5, 0x1ff_ffff_ffff_ffff)] {
            let geometry = open(&[("levels", levels), ("root", 0xabc_d000)]).geometry();
            assert_eq!(geometry.roots.len(), 1);
            assert_eq!((geometry.roots[0].first, geometry.roots[0].last, geometry.roots[0].address), (0, last, 0xabc_d000));
            assert_eq!((u64::from(geometry.roots[0].level) + 1, geometry.levels.len() as u64), (levels, levels));
            for level in &geometry.levels {
                assert!(level.shapes.len() <= 8);
                for shape in &level.shapes {
                    assert_eq!(shape.value & !shape.mask, 0);
                    for segment in &shape.address {
                        assert_eq!(stagecraft_sdk::bits::mask(segment.entry_lsb + segment.width - 1, segment.entry_lsb) & shape.mask, 0);
                    }
                }
            }
        }
        assert_eq!(open(&[("levels", 4), ("input-bits", 39)]).geometry().roots[0].last, 0x7f_ffff_ffff);
        assert_eq!(open(&[("levels", 3), ("input-bits", 48)]).geometry().roots[0].last, 0x7f_ffff_ffff);
        assert_eq!(open(&[("page-2m", 0)]).levels().iter().map(|l| l.leaf_sizes).collect::<Vec<_>>(), [1 << 12, 0, 1 << 30, 0]);
    }

    #[test]
    fn bad_settings_are_refused_by_name() {
        for (name, value) in [("levels", 2), ("levels", 6), ("output-bits", 11), ("input-bits", 58), ("page-2m", 7), ("root", 8), ("supervisor", 1)] {
            match SecondStage::open(&[(name.to_owned(), value)].into_iter().collect()) {
                Err(Error::Invalid(invalid)) => assert_eq!((invalid.field.as_str(), invalid.value), (name, value)),
                other => panic!("{name}: {other:?}"),
            }
        }
    }

    #[test]
    fn suggestions_are_sensible_and_leave_given_settings_alone() {
        let suggest = |given: &[(&str, u64)], last_low, last_address| {
            let given = given.iter().map(|&(name, value)| (name.to_owned(), value)).collect();
            let need = Need { last_low: Some(last_low), first_high: None, last_address, alignment_log2: 12 };
            SecondStage::suggest(&given, &need).unwrap().iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(suggest(&[], 0xffff_ffff, 0xffff_ffff), "levels=4");
        assert_eq!(suggest(&[], 1 << 48, 1 << 51), "levels=5 output-bits=52");
        assert_eq!(suggest(&[("snoop-control", 1), ("levels", 3)], 1 << 48, 0), "levels=3 snoop-control=1");
    }

    proptest! {
        #[test]
        fn encoding_never_grants_more_and_decodes_to_what_it_says(
            word in 0_u64..1 << 10, level in 0_u8..6, size in 10_u8..40, flags in 0_u64..32, levels in 3_u64..6,
        ) {
            let flag = |position: u32| flags >> position & 1;
            let format = open(&[
                ("levels", levels), ("page-2m", flag(0)), ("page-1g", flag(1)), ("snoop-control", flag(2)), ("accessed-dirty", flag(3)),
                ("io-permissions", flag(4)),
            ]);
            let asked = Attributes::unpack(word);
            let Some(encoded) = format.encode_leaf(level, size, asked) else { return Ok(()) };
            let geometry = format.geometry();
            let shape = geometry.levels[usize::from(level)].shapes.iter().find(|s| encoded.pattern & s.mask == s.value).unwrap();
            prop_assert!(geometry.levels[usize::from(level)].leaf_sizes & 1 << size != 0);
            prop_assert!(shape.address.iter().all(|s| encoded.pattern & stagecraft_sdk::bits::mask(s.entry_lsb + s.width - 1, s.entry_lsb) == 0));
            prop_assert_eq!(format.decode(level, 0, encoded.pattern), Meaning::Leaf { size_log2: size, attributes: encoded.attributes });
            let granted = encoded.attributes;
            prop_assert_eq!((granted.read, granted.write), (asked.read, asked.write));
            prop_assert!(!granted.execute && !asked.privileged_only && !granted.grants_nothing());
            prop_assert_eq!(encoded.pattern & SNP != 0, flag(2) == 1 && asked.coherent);
            prop_assert_eq!(granted.writable_when_dirty, flag(3) == 1 && asked.write && asked.writable_when_dirty);
        }

        #[test]
        fn tables_restrict_nothing(level in 1_u8..5, next in 0_u8..6, flags in 0_u64..4) {
            let format = open(&[("levels", 5), ("accessed-dirty", flags & 1), ("io-permissions", flags >> 1)]);
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
