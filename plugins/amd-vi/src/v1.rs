//! Host tables, the units' own format (section 2.2.3): one to six levels with permissions of their own.
//!
//! * An entry names the level of the table that follows, and levels may be skipped: the address bits that would have selected an entry there must then be
//!   zero. Nothing is sign-extended, and input addresses beyond the highest level fault.
//! * A leaf has its level's size, or with next level 7 one that its low address bits code: any power of two between the level's own size and that of the
//!   level above. Such a leaf stands in every slot that it covers, and each of these entries serves its own slot only.
//! * Reads and writes must be allowed by every entry on the way, and by the device table entry (`read`, `write`). Write-only leaves are legal.
//! * The highest level's entries cover more than an address can say and are never leaves.
//! * Accesses snoop the processors' caches unless the request itself asks not to, so every leaf is coherent; FC, which is set for leaves that are to be
//!   coherent, also overrules such requests. Execution, privilege and memory types cannot be said.
//! * With `update-accessed` (HAD) hardware sets A in every entry that it uses, pointers too; with `update-dirty` D in leaves.
//! * U is for devices with a TLB of their own, and has no effect on the requests that reach the unit untranslated.
//! * Pages of 512 GiB are understood but not made: units are known on which they do not work.
//!
//! `inherited` says what the device table entry and the tables above take away: `NO_READ`, `NO_WRITE`.

use stagecraft_sdk::{
    Attributes, Encoded, Error, FaultKind, Findings, Format, Kind, Level, Mark, Meaning, MemoryType, Need, Next, Root, Segment, Settings, Severity,
    Shape,
};

use crate::spec::v1::{A, ADDRESS, D, FC, IR, IW, LEAF, NEXT_LEVEL, PR, RESERVED, SIZED_LEAF, U, coded_size_log2, size_code};
use crate::{ADDRESS_BITS, INTERRUPTS, NO_READ, NO_WRITE, in_manifest_order, root_address, root_permissions};

const ENTRIES: &str = "48882 section 2.2.3";
pub(crate) const NAMES: &[&str] = &["levels", "root", "output-bits", "next-level-7", "read", "write", "update-accessed", "update-dirty"];

/// Kind of table of the highest level. Kinds are the architecture's levels minus one.
const HIGHEST: u8 = 5;
/// Page size that is not made, in log2 bytes: 512 GiB.
const BROKEN_SIZE: u8 = 39;

/// `amd-vi/v1`.
#[derive(Clone, Debug)]
pub struct V1 {
    levels: u8,
    root: u64,
    output_bits: u8,
    /// Leaves of every power of two are made.
    sized_leaves: bool,
    /// `inherited` of the root.
    permissions: u64,
    update_accessed: bool,
    update_dirty: bool,
}

/// Bits of input addresses of tables with so many levels.
pub(crate) const fn input_bits(levels: u64) -> u64 {
    if levels >= 6 { 64 } else { 12 + 9 * levels }
}

/// Size of an entry's slot.
const fn slot_log2(level: u8) -> u8 {
    12 + 9 * level
}

/// The sizes of leaves that are made at `level`, as a set of log2 bytes.
const fn leaf_sizes(level: u8, sized_leaves: bool) -> u64 {
    if level >= HIGHEST {
        return 0;
    }
    let own = 1_u64 << slot_log2(level);
    // Up to below the slot of the level above, and up to half of all addresses.
    let all = if sized_leaves { ((own << 9) - own) & ((1 << ADDRESS_BITS) - 1) } else { own };
    all & !(1 << BROKEN_SIZE)
}

impl Format for V1 {
    const NAME: &'static str = "amd-vi/v1";

    fn open(settings: &Settings) -> Result<Self, Error> {
        settings.only(NAMES)?;
        Ok(Self {
            levels: settings.within("levels", 4, 1, 6, "48882 section 2.2.2, Mode")? as u8,
            root: root_address(settings, "48882 section 2.2.2, Host Page Table Root Pointer")?,
            output_bits: settings.within("output-bits", ADDRESS_BITS, 12, ADDRESS_BITS, ENTRIES)? as u8,
            sized_leaves: settings.flag("next-level-7", false)?,
            permissions: root_permissions(settings)?,
            update_accessed: settings.flag("update-accessed", false)?,
            update_dirty: settings.flag("update-dirty", false)?,
        })
    }

    fn suggest(settings: &Settings, need: &Need) -> Result<Settings, Error> {
        let mut settings = settings.clone();
        // Six levels hold all addresses, the upper half included. Fewer than three would hold next to nothing.
        let last = if need.first_high.is_some() { u64::MAX } else { need.last_low.unwrap_or(0) };
        let levels = (3..6).find(|&levels| last >> input_bits(levels) == 0).unwrap_or(6);
        settings.set_default("levels", levels);
        Self::open(&settings)?;
        Ok(in_manifest_order(&settings, NAMES))
    }

    fn candidates() -> Vec<Settings> {
        [3, 4, 5, 6, 2, 1].map(|levels| Settings::of(&[("levels", levels)])).to_vec()
    }

    fn levels(&self) -> Vec<Level> {
        let mark = |enabled, bit| if enabled { Mark { mask: bit, value: bit } } else { Mark::default() };
        let shape = |mask, low| Shape { mask, value: PR, address: vec![Segment::in_place(51, low)] };
        let level = |level: u8| {
            // Leaves of the level's own size ignore the address bits below it; all other entries use them.
            let own_size = (1..HIGHEST).contains(&level).then(|| shape(PR | NEXT_LEVEL.mask(), slot_log2(level)));
            Level {
                number: level as i8 + 1,
                index_lsb: slot_log2(level),
                index_bits: if level == HIGHEST { 7 } else { 9 },
                shapes: own_size.into_iter().chain([shape(PR, 12)]).collect(),
                leaf_sizes: leaf_sizes(level, self.sized_leaves),
                absent: 0,
                accessed: mark(self.update_accessed, A),
                dirty: mark(self.update_dirty, D),
                table_accessed: mark(self.update_accessed, A),
            }
        };
        (0..self.levels).map(level).collect()
    }

    fn roots(&self) -> Vec<Root> {
        let last = u64::MAX >> (64 - input_bits(self.levels.into()));
        vec![Root { setting: "root", first: 0, last, ignored: 0, address: self.root, level: self.levels - 1, inherited: self.permissions }]
    }

    fn output_bits(&self) -> u8 {
        self.output_bits
    }

    fn untranslated(&self) -> Vec<(u64, u64)> {
        vec![INTERRUPTS]
    }

    fn kind(&self, level: u8, pattern: u64) -> Kind {
        let _ = level;
        match NEXT_LEVEL.of(pattern) {
            _ if pattern & PR == 0 => Kind::Absent,
            LEAF | SIZED_LEAF => Kind::Leaf,
            _ => Kind::Table,
        }
    }

    fn check(&self, level: u8, kind: Kind, inherited: u64, pattern: u64, findings: &mut Findings) {
        let _ = inherited;
        match kind {
            Kind::Absent => return,
            Kind::Table if NEXT_LEVEL.of(pattern) > u64::from(level) => {
                findings.error(FaultKind::Reserved, NEXT_LEVEL.in_place(pattern), ENTRIES, "the next level must be lower than this one");
            }
            Kind::Table => findings.reserved(pattern, U | FC, ENTRIES, "bits 60:59 are reserved in an entry that points to a table"),
            Kind::Leaf if level >= HIGHEST => {
                findings.error(FaultKind::Reserved, NEXT_LEVEL.in_place(pattern) | PR, ENTRIES, "the highest level has no leaves");
            }
            Kind::Leaf => {
                let below = if NEXT_LEVEL.of(pattern) == LEAF { ((1 << slot_log2(level)) - 1) & ADDRESS.mask() } else { 0 };
                findings.should_be_zero(pattern, below, ENTRIES, "address bits below the page size are ignored");
                // A leaf with a size of its own comes whole.
                if NEXT_LEVEL.of(pattern) == SIZED_LEAF && !(slot_log2(level) + 1..slot_log2(level + 1)).contains(&coded_size_log2(pattern)) {
                    let bits = NEXT_LEVEL.mask() | size_code(coded_size_log2(pattern).min(ADDRESS_BITS as u8)) & pattern;
                    let reason = "the address bits code a size that is not above this level's own and below that of the level above";
                    findings.error(FaultKind::Reserved, bits, ENTRIES, reason);
                }
            }
        }
        findings.reserved(pattern, RESERVED, ENTRIES, "bits 58:52 are reserved");
    }

    fn next(&self, level: u8, pattern: u64) -> Next {
        let _ = level;
        Next::whole((NEXT_LEVEL.of(pattern) as u8).saturating_sub(1))
    }

    fn inherit(&self, level: u8, inherited: u64, pattern: u64) -> u64 {
        let _ = level;
        let mut inherited = inherited;
        if pattern & IR == 0 {
            inherited |= NO_READ;
        }
        if pattern & IW == 0 {
            inherited |= NO_WRITE;
        }
        inherited
    }

    fn leaf_size_log2(&self, level: u8, pattern: u64) -> u8 {
        let _ = pattern;
        slot_log2(level)
    }

    fn attributes(&self, level: u8, inherited: u64, pattern: u64) -> Attributes {
        let path = self.inherit(level, inherited, pattern);
        let write = path & NO_WRITE == 0;
        let dirty = self.update_dirty && pattern & D != 0;
        Attributes {
            read: path & NO_READ == 0,
            write,
            execute: false,
            privileged_only: false,
            memory_type: MemoryType::WriteBack,
            coherent: true,
            accessed: self.update_accessed && pattern & A != 0,
            dirty,
            writable_when_dirty: self.update_dirty && write && !dirty,
        }
    }

    fn needs_whole_entry(&self, level: u8, pattern: u64) -> bool {
        level < HIGHEST && NEXT_LEVEL.of(pattern) == SIZED_LEAF
    }

    fn decode_entry(&self, level: u8, inherited: u64, entry: u64) -> Meaning {
        let mut findings = Findings::default();
        self.check(level, Kind::Leaf, inherited, entry, &mut findings);
        match findings.into_vec().first().filter(|finding| finding.severity == Severity::Error) {
            Some(finding) => Meaning::Fault(finding.kind),
            None => Meaning::Leaf { size_log2: coded_size_log2(entry), attributes: self.attributes(level, inherited, entry) },
        }
    }

    fn encode_leaf(&self, level: u8, size_log2: u8, attributes: Attributes) -> Option<Encoded> {
        if level >= self.levels || size_log2 >= 64 || leaf_sizes(level, self.sized_leaves) & 1 << size_log2 == 0 || attributes.privileged_only {
            return None;
        }
        let mut pattern = PR;
        let mut set = |condition, bits| pattern |= if condition { bits } else { 0 };
        set(attributes.read, IR);
        set(attributes.write, IW);
        set(attributes.coherent, FC);
        set(self.update_accessed, A);
        set(self.update_dirty && attributes.write && !attributes.writable_when_dirty, D);
        set(size_log2 != slot_log2(level), NEXT_LEVEL.put(SIZED_LEAF) | size_code(size_log2));
        let granted = self.attributes(level, self.permissions, pattern);
        (!granted.grants_nothing()).then_some(Encoded { pattern, attributes: granted })
    }

    fn encode_table(&self, level: u8, next: u8) -> Option<u64> {
        let accessed = if self.update_accessed { A } else { 0 };
        (next < level && level < self.levels).then(|| PR | IR | IW | accessed | NEXT_LEVEL.put(u64::from(next) + 1))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;
    use stagecraft_sdk::bits::mask;

    use super::*;

    fn open(settings: &[(&str, u64)]) -> V1 {
        V1::open(&settings.iter().map(|&(name, value)| (name.to_owned(), value)).collect()).unwrap()
    }

    fn plain(read: bool, write: bool) -> Attributes {
        Attributes { read, write, coherent: true, ..Attributes::default() }
    }

    fn next_level(level: u64) -> u64 {
        NEXT_LEVEL.put(level)
    }

    /// The address bits of the shape that `entry` has.
    fn address_bits(format: &V1, level: u8, entry: u64) -> u64 {
        let shapes = format.levels()[usize::from(level)].shapes.clone();
        let shape = shapes.iter().find(|shape| entry & shape.mask == shape.value);
        shape.iter().flat_map(|shape| &shape.address).fold(0, |bits, s| bits | mask(s.entry_lsb + s.width - 1, s.entry_lsb))
    }

    /// As the host asks.
    fn meaning(format: &V1, level: u8, inherited: u64, entry: u64) -> Meaning {
        match format.decode(level, inherited, entry & !address_bits(format, level, entry)) {
            Meaning::WholeEntry => format.decode_entry(level, inherited, entry),
            meaning => meaning,
        }
    }

    const RESERVED_FAULT: Meaning = Meaning::Fault(FaultKind::Reserved);

    #[test]
    fn only_bit_0_makes_an_entry_present() {
        let format = open(&[("levels", 6)]);
        for level in 0..6 {
            assert_eq!(format.decode(level, 0, !PR), Meaning::Absent);
            assert!(format.explain(level, 0, !PR).is_empty());
            assert_ne!(format.decode(level, 0, PR), Meaning::Absent);
        }
    }

    #[test]
    fn every_bit_of_every_leaf() {
        let format = open(&[("levels", 6)]);
        for level in 0..5 {
            let size_log2 = 12 + 9 * level;
            let leaf = |read, write| Meaning::Leaf { size_log2, attributes: plain(read, write) };
            for bit in (0..64).filter(|bit| !(12..=51).contains(bit) && !(9..=11).contains(bit)) {
                let expected = match bit {
                    0 => Meaning::Absent,
                    52..=58 => RESERVED_FAULT,
                    61 => leaf(false, true),
                    62 => leaf(true, false),
                    _ => leaf(true, true),
                };
                assert_eq!(meaning(&format, level, 0, (PR | IR | IW) ^ 1 << bit), expected, "level {level} bit {bit}");
            }
            // bits below the page are ignored, and should not be there
            for bit in 12..size_log2 {
                let entry = PR | IR | IW | 1 << bit;
                assert_eq!(address_bits(&format, level, entry) >> bit & 1, 0);
                assert_eq!(meaning(&format, level, 0, entry), leaf(true, true));
                let explained = format.explain(level, 0, entry);
                assert_eq!((explained.len(), explained[0].severity, explained[0].bits), (1, Severity::Warning, 1 << bit));
            }
            for bit in size_log2..52 {
                assert_eq!(address_bits(&format, level, PR) >> bit & 1, 1);
            }
        }
    }

    #[test]
    fn every_bit_of_every_entry_that_points_to_a_table() {
        let format = open(&[("levels", 6)]);
        for level in 1..6 {
            for below in 0..level {
                let base = PR | IR | IW | next_level(u64::from(below) + 1);
                let table = |inherited| Meaning::Table { next: Next::whole(below), inherited };
                assert_eq!(address_bits(&format, level, base), ADDRESS.mask());
                for bit in (0..64).filter(|bit| !(12..=51).contains(bit) && !(9..=11).contains(bit)) {
                    let expected = match bit {
                        0 => Meaning::Absent,
                        52..=60 => RESERVED_FAULT,
                        61 => table(NO_READ),
                        62 => table(NO_WRITE),
                        _ => table(0),
                    };
                    assert_eq!(meaning(&format, level, 0, base ^ 1 << bit), expected, "level {level} to {below} bit {bit}");
                }
            }
        }
    }

    #[test]
    fn the_next_level_is_lower_than_this_one() {
        let format = open(&[("levels", 6)]);
        for level in 0..6 {
            for next in 1..7 {
                let expected =
                    if next <= u64::from(level) { Meaning::Table { next: Next::whole(next as u8 - 1), inherited: 0 } } else { RESERVED_FAULT };
                assert_eq!(meaning(&format, level, 0, PR | IR | IW | next_level(next)), expected, "level {level} next {next}");
            }
        }
    }

    #[test]
    fn the_highest_level_has_no_leaves() {
        let format = open(&[("levels", 6)]);
        for next in [LEAF, SIZED_LEAF] {
            let entry = PR | IR | IW | next_level(next) | size_code(40);
            assert_eq!(format.decode(5, 0, entry & !ADDRESS.mask()), RESERVED_FAULT);
            assert_eq!(format.explain(5, 0, entry & !ADDRESS.mask())[0].reason, "the highest level has no leaves");
            assert_eq!(format.decode_entry(5, 0, entry), RESERVED_FAULT);
        }
    }

    #[test]
    fn a_leafs_size_is_coded_in_its_address_bits() {
        let format = open(&[("levels", 6)]);
        for level in 0..5 {
            for size in 13..=53 {
                // 53: no zero in the address bits
                let code = if size == 53 { ADDRESS.mask() } else { size_code(size) };
                let entry = PR | IR | next_level(7) | code;
                assert_eq!(address_bits(&format, level, entry), ADDRESS.mask());
                assert_eq!(format.decode(level, 0, entry & !ADDRESS.mask()), Meaning::WholeEntry);
                let between = size > slot_log2(level) && size < slot_log2(level + 1);
                let expected = if between { Meaning::Leaf { size_log2: size, attributes: plain(true, false) } } else { RESERVED_FAULT };
                assert_eq!(meaning(&format, level, 0, entry), expected, "level {level} size {size}");
            }
        }
        // address bits above the code do not matter, reserved bits and what was inherited do
        let entry = PR | IR | IW | FC | next_level(7) | 0x1234_5678_8000 | size_code(15);
        assert_eq!(meaning(&format, 0, 0, entry), Meaning::Leaf { size_log2: 15, attributes: plain(true, true) });
        assert_eq!(meaning(&format, 0, NO_READ, entry), Meaning::Leaf { size_log2: 15, attributes: plain(false, true) });
        assert_eq!(meaning(&format, 0, 0, entry | 1 << 52), RESERVED_FAULT);
        assert_eq!(format.decode(0, 0, next_level(7)), Meaning::Absent);
    }

    #[test]
    fn permissions_are_those_that_every_level_and_the_device_table_entry_grant() {
        let format = open(&[("write", 0)]);
        let root = format.geometry().roots[0].inherited;
        assert_eq!(root, NO_WRITE);
        let below = format.inherit(2, format.inherit(3, root, PR | IR | IW), PR | IR);
        assert_eq!(meaning(&format, 0, below, PR | IR | IW), Meaning::Leaf { size_log2: 12, attributes: plain(true, false) });
        assert_eq!(meaning(&format, 0, below, PR | IW), Meaning::Leaf { size_log2: 12, attributes: plain(false, false) });
        assert_eq!(open(&[("read", 0), ("write", 0)]).geometry().roots[0].inherited, NO_READ | NO_WRITE);
        // encoding knows the limits of the device table entry
        assert_eq!(format.encode_leaf(0, 12, plain(true, true)).unwrap().attributes, plain(true, false));
        assert_eq!(format.encode_leaf(0, 12, plain(false, true)), None);
    }

    #[test]
    fn flags_count_if_hardware_sets_them() {
        let attributes = |settings: &[(&str, u64)], pattern| match open(settings).decode(0, 0, pattern) {
            Meaning::Leaf { attributes, .. } => (attributes.accessed, attributes.dirty, attributes.writable_when_dirty),
            other => panic!("{other:?}"),
        };
        let both = [("update-accessed", 1), ("update-dirty", 1)];
        assert_eq!(attributes(&[], PR | IR | IW | A | D), (false, false, false));
        assert_eq!(attributes(&both, PR | IR | IW), (false, false, true));
        assert_eq!(attributes(&both, PR | IR | IW | A | D), (true, true, false));
        assert_eq!(attributes(&both, PR | IR), (false, false, false));
        assert_eq!(attributes(&both[..1], PR | IR | IW | A | D), (true, false, false));
        let level = &open(&both).levels()[0];
        assert_eq!((level.accessed.mask, level.dirty.mask, open(&[]).levels()[0].dirty.mask), (A, D, 0));
        assert_eq!((open(&both).levels()[1].table_accessed.mask, open(&[]).levels()[1].table_accessed.mask), (A, 0), "in pointers too");
        let waiting = Attributes { writable_when_dirty: true, ..plain(true, true) };
        assert_eq!(open(&both).encode_leaf(0, 12, waiting).unwrap().pattern, PR | A | FC | IR | IW);
        assert_eq!(open(&both).encode_leaf(0, 12, plain(true, true)).unwrap().pattern, PR | A | D | FC | IR | IW);
        assert_eq!(open(&both).encode_table(1, 0), Some(PR | A | IR | IW | 0x200));
    }

    #[test]
    fn the_geometry_follows_the_levels() {
        let lasts = [0x1f_ffff, 0x3fff_ffff, 0x7f_ffff_ffff, 0xffff_ffff_ffff, 0x1ff_ffff_ffff_ffff, u64::MAX];
        for (levels, last) in (1..).zip(lasts) {
            let geometry = open(&[("levels", levels), ("root", 0xabc_d000)]).geometry();
            let root = &geometry.roots[0];
            assert_eq!((geometry.roots.len(), root.first, root.last, root.address, root.setting), (1, 0, last, 0xabc_d000, "root"));
            assert_eq!((u64::from(root.level) + 1, geometry.levels.len() as u64, geometry.output_bits), (levels, levels, 52));
            for level in &geometry.levels {
                let deciding = level.shapes.iter().fold(0, |bits, shape| bits | shape.mask);
                for shape in &level.shapes {
                    assert_eq!(shape.value & !shape.mask, 0);
                    for segment in &shape.address {
                        assert_eq!(mask(segment.entry_lsb + segment.width - 1, segment.entry_lsb) & deciding, 0);
                    }
                }
            }
        }
        let six = open(&[("levels", 6)]).levels();
        let expected = [(1, 12, 9), (2, 21, 9), (3, 30, 9), (4, 39, 9), (5, 48, 9), (6, 57, 7)];
        assert_eq!(six.iter().map(|level| (level.number, level.index_lsb, level.index_bits)).collect::<Vec<_>>(), expected);
        let sizes = |format: &V1| format.levels().iter().map(|level| level.leaf_sizes).collect::<Vec<_>>();
        assert_eq!(sizes(&open(&[("levels", 6)])), [1 << 12, 1 << 21, 1 << 30, 0, 1 << 48, 0]);
        let all = sizes(&open(&[("levels", 6), ("next-level-7", 1)]));
        assert_eq!(all, [mask(20, 12), mask(29, 21), mask(38, 30), mask(47, 40), mask(51, 48), 0]);
    }

    #[test]
    fn bad_settings_are_refused_by_name() {
        let bad = [
            ("levels", 0),
            ("levels", 7),
            ("output-bits", 11),
            ("output-bits", 53),
            ("next-level-7", 2),
            ("read", 2),
            ("root", 8),
            ("root", 1 << 52),
            ("page-1g", 1),
        ];
        for (name, value) in bad {
            match V1::open(&[(name.to_owned(), value)].into_iter().collect()) {
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
            V1::suggest(&given, &need).unwrap().iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(suggest(&[], None, None), "levels=3");
        assert_eq!(suggest(&[], Some((1 << 39) - 1), None), "levels=3");
        assert_eq!(suggest(&[], Some(1 << 39), None), "levels=4");
        assert_eq!(suggest(&[], Some(1 << 48), None), "levels=5");
        assert_eq!(suggest(&[], Some(1 << 57), None), "levels=6");
        assert_eq!(suggest(&[], Some(0), Some(0xffff_8000_0000_0000)), "levels=6");
        assert_eq!(suggest(&[("next-level-7", 1), ("levels", 4)], Some(1 << 57), None), "levels=4 next-level-7=1");
    }

    proptest! {
        #[test]
        fn encoding_never_grants_more_and_decodes_to_what_it_says(
            word in 0_u64..1 << 10, level in 0_u8..7, size in 10_u8..60, flags in 0_u64..32, levels in 1_u64..7, address: u64,
        ) {
            let flag = |position: u32| flags >> position & 1;
            let format = open(&[
                ("levels", levels), ("next-level-7", flag(0)), ("read", flag(1)), ("write", flag(2)), ("update-accessed", flag(3)),
                ("update-dirty", flag(4)),
            ]);
            let asked = Attributes::unpack(word);
            let geometry = format.geometry();
            let Some(encoded) = format.encode_leaf(level, size, asked) else {
                let offered = geometry.levels.get(usize::from(level)).is_some_and(|level| level.leaf_sizes & 1 << size != 0);
                let left = (asked.read && flag(1) == 1) || (asked.write && flag(2) == 1);
                prop_assert!(!offered || asked.privileged_only || !left);
                return Ok(());
            };
            prop_assert!(geometry.levels[usize::from(level)].leaf_sizes & 1 << size != 0);
            // what is in the address bits codes the size: it lies below it
            let field = address_bits(&format, level, encoded.pattern);
            prop_assert_eq!(encoded.pattern & field & !((1 << size) - 1), 0);
            prop_assert!(size != slot_log2(level) || encoded.pattern & field == 0);
            // the host puts an aligned address there
            let entry = encoded.pattern | address & field & !((1 << size) - 1);
            let expected = Meaning::Leaf { size_log2: size, attributes: encoded.attributes };
            prop_assert_eq!(meaning(&format, level, geometry.roots[0].inherited, entry), expected);
            let granted = encoded.attributes;
            prop_assert_eq!((granted.read, granted.write), (asked.read && flag(1) == 1, asked.write && flag(2) == 1));
            prop_assert!(!granted.execute && !asked.privileged_only && !granted.grants_nothing());
            prop_assert_eq!(encoded.pattern & FC != 0, asked.coherent);
            prop_assert_eq!(granted.writable_when_dirty, flag(4) == 1 && granted.write && asked.writable_when_dirty);
        }

        #[test]
        fn tables_restrict_nothing(level in 0_u8..7, next in 0_u8..7, levels in 1_u64..7, accessed in 0_u64..2) {
            let format = open(&[("levels", levels), ("update-accessed", accessed)]);
            match format.encode_table(level, next) {
                Some(pattern) => prop_assert_eq!(format.decode(level, 0, pattern), Meaning::Table { next: Next::whole(next), inherited: 0 }),
                None => prop_assert!(next >= level || u64::from(level) >= levels),
            }
        }

        #[test]
        fn any_entry_at_any_level_has_an_answer(level in 0_u8..6, inherited: u64, entry: u64, size: u8, word: u64) {
            let format = open(&[("levels", 6), ("next-level-7", 1)]);
            let meaning = format.decode(level, inherited, entry);
            let explained = format.explain(level, inherited, entry);
            if meaning != Meaning::WholeEntry {
                prop_assert_eq!(matches!(meaning, Meaning::Fault(_)), explained.iter().any(|f| f.severity == Severity::Error));
            }
            prop_assert_ne!(format.decode_entry(level, inherited, entry), Meaning::WholeEntry);
            let _ = format.encode_leaf(level, size, Attributes::unpack(word));
        }
    }
}
