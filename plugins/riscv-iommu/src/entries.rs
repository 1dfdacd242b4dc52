//! What the entries of both stages have in common.
//!
//! * R, W and X together say what an entry is: all zero points to the next table, W without R is reserved, anything else is a leaf. Restrictions are
//!   not handed down: a pointer grants everything.
//! * The page number of a leaf above the last level must be aligned to its size. Those bits are therefore pattern, not address.
//! * N makes 64 KiB out of sixteen slots of the last level, each of which holds the same entry; the low four bits of the page number say so and are
//!   pattern.
//! * With hardware update, a clear A is not a fault, and a writable leaf with a clear D is `writable_when_dirty`. Without, a clear A is a fault and
//!   a clear D forbids writes.
//! * Addresses in entries of 8 bytes have 56 bits, and in those of 4 bytes 34. Root tables may be anywhere below the unit's address size.

use stagecraft_sdk::bits::mask;
use stagecraft_sdk::{Attributes, ByteOrder, Error, FaultKind, Findings, Kind, Level, Mark, MemoryType, Need, Segment, Settings, Shape};

use crate::spec::entry::{A, D, G, IO, N, NAPOT, NAPOT_64K, NC, PBMT, PMA, PPN_HIGH, PPN_HIGH_32, PPN_LOW, R, RESERVED, SOFTWARE, U, V, W, X};

const ENTRIES: &str = "RISC-V Privileged 1.12 section 4.3.1";
const WALK: &str = "RISC-V Privileged 1.12 section 4.3.2";
const WIDE_ENTRIES: &str = "RISC-V Privileged 1.12 section 4.4.1";
const SVNAPOT: &str = "RISC-V Privileged 1.12 chapter 5";
const SVPBMT: &str = "RISC-V Privileged 1.12 chapter 6";
const UPDATE: &str = "RISC-V IOMMU 1.0 section 2.1.3.1";
const CAPABILITIES: &str = "RISC-V IOMMU 1.0 section 5.3";

/// Page numbers have 44 bits.
pub(crate) const WIDEST_OUTPUT: u64 = 56;

/// The only kind of table whose entries can have N; kinds are the architecture's levels.
const PAGE_TABLE: u8 = 0;
/// What an entry with N covers.
const NAPOT_LOG2: u8 = 16;

/// Which stage the entries are of, as far as they differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Leaves without U are for requests with supervisor privilege, if there are any.
    First { supervisor: bool },
    /// All requests count as unprivileged.
    Second,
}

/// The settings that both stages have.
#[derive(Clone, Debug)]
#[allow(clippy::struct_excessive_bools)]
pub(crate) struct Entries {
    pub(crate) levels: u8,
    pub(crate) root: u64,
    pub(crate) output_bits: u8,
    stage: Stage,
    svnapot: bool,
    svpbmt: bool,
    svrsw60t59b: bool,
    hardware_update: bool,
    big_endian: bool,
}

impl Entries {
    pub(crate) fn open(settings: &Settings, stage: Stage, root_bytes: u64) -> Result<Self, Error> {
        let entries = Self {
            levels: settings.one_of("levels", 3, &[2, 3, 4, 5], WALK)? as u8,
            root: settings.or("root", 0),
            output_bits: settings.within("output-bits", WIDEST_OUTPUT, 12, WIDEST_OUTPUT, CAPABILITIES)? as u8,
            stage,
            svnapot: settings.flag("svnapot", false)?,
            svpbmt: settings.flag("svpbmt", false)?,
            svrsw60t59b: settings.flag("svrsw60t59b", false)?,
            hardware_update: settings.flag("hardware-update", false)?,
            big_endian: settings.flag("big-endian", false)?,
        };
        for (name, set) in [("svnapot", entries.svnapot), ("svpbmt", entries.svpbmt), ("svrsw60t59b", entries.svrsw60t59b)] {
            if set && entries.is_narrow() {
                return Err(Error::invalid(name, 1, ENTRIES, "the entries of two levels have 4 bytes and none of these bits"));
            }
        }
        if entries.root & (root_bytes - 1) != 0 || entries.root >> entries.output_bits != 0 {
            let reason = format!("the root table must be aligned to {root_bytes} bytes and lie below 2^{}", entries.output_bits);
            return Err(Error::invalid("root", entries.root, WALK, &reason));
        }
        Ok(entries)
    }

    /// Sv32 and Sv32x4: entries of 4 bytes.
    fn is_narrow(&self) -> bool {
        self.levels == 2
    }

    pub(crate) fn entry_bytes(&self) -> u8 {
        if self.is_narrow() { 4 } else { 8 }
    }

    pub(crate) fn byte_order(&self) -> ByteOrder {
        if self.big_endian { ByteOrder::Big } else { ByteOrder::Little }
    }

    /// Index bits of each level, the extra ones of the second stage's root left out.
    fn index_bits(&self) -> u8 {
        if self.is_narrow() { 10 } else { 9 }
    }

    /// Size of an entry's slot.
    pub(crate) fn slot_log2(&self, level: u8) -> u8 {
        12 + self.index_bits() * level
    }

    /// Address bits from `low` upwards.
    fn address(&self, low: u8) -> Vec<Segment> {
        let high = if self.is_narrow() { PPN_HIGH_32 } else { PPN_HIGH };
        vec![Segment::moved(high, low - 12 + PPN_LOW, low)]
    }

    /// Page number bits that a leaf of this level must have zero.
    fn unaligned(&self, level: u8) -> u64 {
        if level == PAGE_TABLE { 0 } else { mask(PPN_LOW - 1 + self.index_bits() * level, PPN_LOW) }
    }

    /// A shape cannot say "readable or executable", so leaves take two. The last one is for pointers and the reserved writable-only.
    fn shapes(&self, level: u8) -> Vec<Shape> {
        let slot = self.slot_log2(level);
        let leaves = |extra, low| {
            [
                Shape { mask: extra | V | R, value: extra | V | R, address: self.address(low) },
                Shape { mask: extra | V | R | X, value: extra | V | X, address: self.address(low) },
            ]
        };
        let mut shapes = Vec::new();
        if level == PAGE_TABLE && self.svnapot {
            shapes.extend(leaves(N, NAPOT_LOG2));
        }
        shapes.extend(leaves(0, slot));
        shapes.push(Shape { mask: V | R | X, value: V, address: self.address(12) });
        shapes
    }

    /// The kinds of table, of which the root has so many extra index bits.
    pub(crate) fn levels(&self, extra_index_bits: u8) -> Vec<Level> {
        let mark = |bit| if self.hardware_update { Mark { mask: bit, value: bit } } else { Mark::default() };
        let level = |level: u8| {
            let slot = self.slot_log2(level);
            let napot = if level == PAGE_TABLE && self.svnapot { 1 << NAPOT_LOG2 } else { 0 };
            Level {
                number: level as i8,
                index_lsb: slot,
                index_bits: self.index_bits() + if level + 1 == self.levels { extra_index_bits } else { 0 },
                shapes: self.shapes(level),
                leaf_sizes: 1 << slot | napot,
                absent: 0,
                accessed: mark(A),
                dirty: mark(D),
                table_accessed: Mark::default(),
            }
        };
        (0..self.levels).map(level).collect()
    }

    pub(crate) fn kind(level: u8, pattern: u64) -> Kind {
        if pattern & V == 0 {
            Kind::Absent
        } else if pattern & (R | W | X) == 0 && level != PAGE_TABLE {
            Kind::Table
        } else {
            Kind::Leaf
        }
    }

    pub(crate) fn check(&self, level: u8, kind: Kind, pattern: u64, findings: &mut Findings) {
        if kind == Kind::Absent {
            return;
        }
        if !self.is_narrow() {
            let reserved = if self.svrsw60t59b { RESERVED & !SOFTWARE } else { RESERVED };
            findings.reserved(pattern, reserved, WIDE_ENTRIES, "bits 60:54 are reserved, 60:59 unless they are software's");
        }
        if self.stage == Stage::Second {
            findings.should_be_zero(pattern, G, "RISC-V Privileged 1.12 section 8.5.1", "the global bit means nothing in the second stage");
        }
        match kind {
            Kind::Table => self.check_table(pattern, findings),
            _ => self.check_leaf(level, pattern, findings),
        }
    }

    fn check_table(&self, pattern: u64, findings: &mut Findings) {
        findings.reserved(pattern, U | A | D, ENTRIES, "the user, accessed and dirty bits are reserved in an entry that points to a table");
        if !self.is_narrow() {
            findings.reserved(pattern, N, SVNAPOT, "bit 63 is reserved in an entry that points to a table");
            findings.reserved(pattern, PBMT.mask(), SVPBMT, "the memory type is reserved in an entry that points to a table");
        }
    }

    fn check_leaf(&self, level: u8, pattern: u64, findings: &mut Findings) {
        if pattern & (R | W | X) == 0 {
            findings.error(FaultKind::Reserved, V, WALK, "an entry of the last level cannot point to a table");
            return;
        }
        if pattern & (R | W) == W {
            findings.error(FaultKind::Reserved, W, ENTRIES, "writable and not readable is a reserved encoding");
        }
        if !self.is_narrow() {
            match pattern & N != 0 {
                true if !self.svnapot => findings.error(FaultKind::Reserved, N, SVNAPOT, "bit 63 is reserved without Svnapot"),
                true if level != PAGE_TABLE => findings.error(FaultKind::Reserved, N, SVNAPOT, "bit 63 is reserved above the last level"),
                true if NAPOT.of(pattern) != NAPOT_64K => {
                    let reason = "the low bits of the page number code a reserved size; 1000 for 64 KiB is the only one";
                    findings.error(FaultKind::Reserved, N | NAPOT.mask(), SVNAPOT, reason);
                }
                _ => {}
            }
            if !self.svpbmt {
                findings.reserved(pattern, PBMT.mask(), SVPBMT, "the memory type is reserved without Svpbmt");
            } else if PBMT.of(pattern) > IO {
                findings.error(FaultKind::Reserved, PBMT.mask(), SVPBMT, "memory type 3 is reserved");
            }
        }
        if pattern & self.unaligned(level) != 0 {
            findings.error(
                FaultKind::Misaligned,
                pattern & self.unaligned(level),
                WALK,
                "the page number of a large page is not aligned to its size",
            );
        }
        if pattern & U == 0 {
            match self.stage {
                Stage::First { supervisor: true } => {}
                Stage::First { supervisor: false } => {
                    let reason = "without the user bit only supervisor privilege passes, which requests do not have here";
                    findings.error(FaultKind::Permission, U, WALK, reason);
                }
                Stage::Second => {
                    let reason = "without the user bit nothing passes in the second stage";
                    findings.error(FaultKind::Permission, U, "RISC-V Privileged 1.12 section 8.5.1", reason);
                }
            }
        }
        if pattern & A == 0 && !self.hardware_update {
            findings.error(FaultKind::AccessFlag, A, UPDATE, "the accessed bit is clear and hardware does not set it");
        }
    }

    pub(crate) fn leaf_size_log2(&self, level: u8, pattern: u64) -> u8 {
        if level == PAGE_TABLE && self.svnapot && pattern & N != 0 { NAPOT_LOG2 } else { self.slot_log2(level) }
    }

    pub(crate) fn attributes(&self, pattern: u64) -> Attributes {
        let dirty = pattern & D != 0;
        let write = pattern & W != 0 && (dirty || self.hardware_update);
        let memory_type = match PBMT.of(pattern) {
            _ if !self.svpbmt => MemoryType::WriteBack,
            PMA => MemoryType::WriteBack,
            NC => MemoryType::NonCacheable,
            _ => MemoryType::Device,
        };
        Attributes {
            read: pattern & R != 0,
            write,
            execute: pattern & X != 0,
            privileged_only: pattern & U == 0,
            memory_type,
            coherent: memory_type == MemoryType::WriteBack,
            accessed: pattern & A != 0,
            dirty,
            writable_when_dirty: write && !dirty,
        }
    }

    pub(crate) fn encode_leaf(&self, level: u8, size_log2: u8, attributes: Attributes) -> Option<u64> {
        let napot = level == PAGE_TABLE && self.svnapot && size_log2 == NAPOT_LOG2;
        let fits = level < self.levels && (napot || size_log2 == self.slot_log2(level));
        let nobody_passes = attributes.privileged_only && self.stage != Stage::First { supervisor: true };
        let cannot_be_said = attributes.write && !attributes.read;
        if !fits || attributes.grants_nothing() || nobody_passes || cannot_be_said {
            return None;
        }
        // A is set beforehand, and D unless somebody waits for it: without hardware update both would be faults.
        let mut pattern = V | A;
        let mut set = |condition, bits| pattern |= if condition { bits } else { 0 };
        set(attributes.read, R);
        set(attributes.write, W);
        set(attributes.execute, X);
        set(!attributes.privileged_only, U);
        set(attributes.write && !(attributes.writable_when_dirty && self.hardware_update), D);
        set(napot, N | NAPOT.put(NAPOT_64K));
        if self.svpbmt {
            let memory_type = match attributes.memory_type {
                MemoryType::WriteBack => PMA,
                MemoryType::NonCacheable => NC,
                MemoryType::Device => IO,
            };
            pattern |= PBMT.put(memory_type);
        }
        Some(pattern)
    }

    pub(crate) fn encode_table(&self, level: u8, next: u8) -> Option<u64> {
        (level < self.levels && level.checked_sub(1) == Some(next)).then_some(V)
    }
}

/// Configurations of tables of unknown origin: each number of levels alone, with the extensions that entries show, and with everything that is rare;
/// then Sv32's entries of 4 bytes. `rare` names flags of one stage alone.
pub(crate) fn candidates(levels: &[u64], rare: &[&str]) -> Vec<Settings> {
    let with = |levels: u64, flags: &[&str]| {
        let flags = flags.iter().map(|&name| (name.to_owned(), 1));
        std::iter::once(("levels".to_owned(), levels)).chain(flags).collect::<Settings>()
    };
    let extensions = ["svnapot", "svpbmt", "hardware-update", "svrsw60t59b"];
    let sets: [Vec<&str>; 5] = [vec!["svnapot"], vec![], vec!["svnapot", "svpbmt"], extensions[..3].to_vec(), [&extensions[..], rare].concat()];
    let mut all: Vec<Settings> = sets.iter().flat_map(|flags| levels.iter().map(|&levels| with(levels, flags))).collect();
    all.extend([with(2, &[]), with(2, &[&["hardware-update"], rare].concat())]);
    all.extend(levels.iter().map(|&levels| with(levels, &["svnapot", "svpbmt", "big-endian"])));
    all
}

/// `settings` with as many levels as `holds` wants, of 8-byte entries.
pub(crate) fn suggest_levels(settings: &Settings, need: &Need, holds: impl Fn(u64, &Need) -> bool) -> Settings {
    let mut settings = settings.clone();
    settings.set_default("levels", (3..5).find(|levels| holds(*levels, need)).unwrap_or(5));
    settings
}
