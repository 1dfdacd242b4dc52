//! `arm-v7s/short`: 32-bit addresses, 4-byte entries, two levels.
//!
//! * First-level entries cover 1 MiB: a table of 256 small pages, a section, or a sixteenth of a supersection. Second-level entries cover 4 KiB: a small
//!   page, or a sixteenth of a large one. Each of the sixteen entries says the whole leaf's address. Supersections alone may have 40 bits of address
//!   (`output-bits`); where the unit has less, an address beyond is an address-size fault.
//! * TTBCR.N (`split`) cuts the input range in two. The low range's table is as short as the range, the high range's is whole though
//!   its beginning is never used.
//! * First-level entries belong to one of 16 domains: no access, permissions count, or they do not. A domain without access faults at the first level.
//! * Permissions are `AP[2:0]`, or `AP[2:1]` with an access flag in `AP[0]`. Writes by privileged requests alone, of what others may read, are no
//!   attribute of the contract's: they are left out unless all requests are privileged.
//!
//! `inherited` says what the first level adds: `NO_CHECKS` and `PXN`.

use stagecraft_sdk::{
    Attributes, Encoded, Error, FaultKind, Findings, Format, Kind, Level, Mark, MemoryType, Need, Next, Root, Segment, Settings, Shape,
};

use crate::memory::{Code, Scheme};
use crate::spec::{B, C, TYPE, first, second};

const ENTRIES: &str = "DDI 0406 section B3.5.1";
const RANGES: &str = "DDI 0406 section B3.5.4";
const ACCESS: &str = "DDI 0406 section B3.7.1";
const DOMAINS: &str = "DDI 0406 section B3.7.3";
const MEMORY: &str = "DDI 0406 section B3.8";

pub(crate) const NAMES: &[&str] = &[
    "split",
    "root",
    "root-high",
    "access-flag",
    "tex-remap",
    "prrr",
    "nmrr",
    "domains",
    "execute-never-privileged",
    "supersections",
    "output-bits",
    "privileged",
];

/// Type 1 device, 4 and 7 normal; memory with S set is shareable.
pub(crate) const LINUX_PRRR: u64 = 0x8008_8204;
/// Type 7 is cached.
pub(crate) const LINUX_NMRR: u64 = 0x4000_4000;
/// Permissions count in all domains.
const ALL_CLIENTS: u64 = 0x5555_5555;

/// Domain access: permissions count.
const CLIENT: u64 = 1;
/// Domain access: they do not.
const MANAGER: u64 = 3;

/// `inherited`: permissions do not count.
const NO_CHECKS: u64 = 1;
/// `inherited`: no instruction fetches by privileged requests.
const PXN: u64 = 2;

/// Kinds of table by their index into [`Format::levels`].
const SECOND: u8 = 0;
const FIRST_LOW: u8 = 1;
const FIRST_HIGH: u8 = 2;

const SMALL_LOG2: u8 = 12;
const LARGE_LOG2: u8 = 16;
const SECTION_LOG2: u8 = 20;
const SUPERSECTION_LOG2: u8 = 24;

/// `arm-v7s/short`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools)]
pub struct Short {
    split: u8,
    low: Option<u64>,
    high: Option<u64>,
    access_flag: bool,
    scheme: Scheme,
    domains: u64,
    pxn: bool,
    supersections: bool,
    output_bits: u8,
    privileged: bool,
}

/// What all leaves say, each in its own places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Leaf {
    size_log2: u8,
    /// AP[2:0].
    ap: u64,
    code: Code,
    xn: bool,
    pxn: bool,
}

impl Leaf {
    fn unpack(level: u8, pattern: u64) -> Self {
        let code = |tex, s| Code { tex, c: C.of(pattern), b: B.of(pattern), s };
        if level != SECOND {
            return Self {
                size_log2: if pattern & first::SUPERSECTION != 0 { SUPERSECTION_LOG2 } else { SECTION_LOG2 },
                ap: first::AP_HIGH.of(pattern) << 2 | first::AP.of(pattern),
                code: code(first::TEX.of(pattern), first::S.of(pattern)),
                xn: pattern & first::XN != 0,
                pxn: pattern & first::PXN != 0,
            };
        }
        let small = pattern & second::SMALL != 0;
        let (size_log2, tex, xn) =
            if small { (SMALL_LOG2, second::SMALL_TEX, second::SMALL_XN) } else { (LARGE_LOG2, second::LARGE_TEX, second::LARGE_XN) };
        Self {
            size_log2,
            ap: second::AP_HIGH.of(pattern) << 2 | second::AP.of(pattern),
            code: code(tex.of(pattern), second::S.of(pattern)),
            xn: pattern & xn != 0,
            pxn: false,
        }
    }

    /// The entry, in domain 0.
    fn pack(self) -> u64 {
        let Code { tex, c, b, s } = self.code;
        let common = C.put(c) | B.put(b);
        let when = |condition, bits| if condition { bits } else { 0 };
        let pages = second::AP.put(self.ap) | second::AP_HIGH.put(self.ap >> 2) | second::S.put(s);
        common
            | match self.size_log2 {
                SMALL_LOG2 => second::SMALL | pages | second::SMALL_TEX.put(tex) | when(self.xn, second::SMALL_XN),
                LARGE_LOG2 => second::LARGE | pages | second::LARGE_TEX.put(tex) | when(self.xn, second::LARGE_XN),
                _ => {
                    let size = when(self.size_log2 == SUPERSECTION_LOG2, first::SUPERSECTION);
                    let flags = when(self.xn, first::XN) | when(self.pxn, first::PXN) | size;
                    let permissions = first::AP.put(self.ap) | first::AP_HIGH.put(self.ap >> 2);
                    first::SECTION | flags | permissions | first::TEX.put(tex) | first::S.put(s)
                }
            }
    }
}

impl Short {
    /// What the domain of a first-level entry allows. Supersections are in domain 0.
    fn domain_access(&self, pattern: u64) -> u64 {
        let supersection = TYPE.of(pattern) != first::TABLE && pattern & first::SUPERSECTION != 0;
        let domain = if supersection { 0 } else { first::DOMAIN.of(pattern) };
        self.domains >> (2 * domain) & 3
    }
}

impl Format for Short {
    const NAME: &'static str = "arm-v7s/short";

    fn open(settings: &Settings) -> Result<Self, Error> {
        settings.only(NAMES)?;
        let register = |name, default| settings.within(name, default, 0, 0xffff_ffff, MEMORY);
        let (prrr, nmrr) = (register("prrr", LINUX_PRRR)?, register("nmrr", LINUX_NMRR)?);
        let format = Self {
            split: settings.within("split", 0, 0, 7, RANGES)? as u8,
            low: settings.get("root"),
            high: settings.get("root-high"),
            access_flag: settings.flag("access-flag", true)?,
            scheme: if settings.flag("tex-remap", true)? { Scheme::Remap { prrr, nmrr } } else { Scheme::Direct },
            domains: settings.within("domains", ALL_CLIENTS, 0, 0xffff_ffff, DOMAINS)?,
            pxn: settings.flag("execute-never-privileged", false)?,
            supersections: settings.flag("supersections", true)?,
            output_bits: settings.within("output-bits", 32, 32, 40, ENTRIES)? as u8,
            privileged: settings.flag("privileged", false)?,
        };
        for (name, root, size) in [("root", format.low, 0x4000 >> format.split), ("root-high", format.high, 0x4000)] {
            if let Some(root) = root.filter(|root| root % size != 0 || root >> 32 != 0) {
                return Err(Error::invalid(name, root, RANGES, "a first-level table has a 32-bit address and is aligned to its size"));
            }
        }
        if format.split == 0 && format.high.is_some() && format.low.is_none() {
            return Err(Error::invalid("root-high", format.high.unwrap_or(0), RANGES, "without a split there is no high range"));
        }
        Ok(format)
    }

    fn suggest(settings: &Settings, need: &Need) -> Result<Settings, Error> {
        let _ = need;
        Self::open(settings)?;
        Ok(NAMES.iter().filter_map(|&name| Some((name.to_owned(), settings.get(name)?))).collect())
    }

    fn candidates() -> Vec<Settings> {
        let of = |split, access_flag, tex_remap| Settings::of(&[("split", split), ("access-flag", access_flag), ("tex-remap", tex_remap)]);
        let mut candidates = vec![Settings::default()];
        candidates.extend((1..=7).map(|split| Settings::of(&[("split", split)])));
        candidates.extend([of(0, 0, 1), of(0, 1, 0), of(0, 0, 0)]);
        candidates
    }

    fn levels(&self) -> Vec<Level> {
        let shape = |mask, value, (high, low)| Shape { mask, value, address: vec![Segment::in_place(high, low)] };
        let level = |number, index_lsb, index_bits, shapes, leaf_sizes| Level {
            number,
            index_lsb,
            index_bits,
            shapes,
            leaf_sizes,
            absent: 0,
            accessed: Mark::default(),
            dirty: Mark::default(),
            table_accessed: Mark::default(),
        };
        let first_level = |index_bits| {
            let mut shapes = vec![
                shape(first::SECTION, first::SECTION, first::ADDRESS),
                // Tables, and what is left of them in absent entries.
                shape(first::SECTION, 0, first::TABLE_ADDRESS),
            ];
            if self.supersections {
                let moved = |(high, low), lsb| Segment::moved(high, low, lsb);
                let mut supersection = shape(first::SECTION | first::SUPERSECTION, first::SECTION | first::SUPERSECTION, first::SUPERSECTION_ADDRESS);
                supersection.address.extend([moved(first::ADDRESS_35_32, 32), moved(first::ADDRESS_39_36, 36)]);
                shapes.insert(0, supersection);
            }
            let supersections = if self.supersections { 1 << SUPERSECTION_LOG2 } else { 0 };
            level(1, SECTION_LOG2, index_bits, shapes, 1 << SECTION_LOG2 | supersections)
        };
        let pages = vec![
            shape(second::SMALL, second::SMALL, second::SMALL_ADDRESS),
            shape(TYPE.mask(), second::LARGE, second::LARGE_ADDRESS),
            shape(TYPE.mask(), 0, second::SMALL_ADDRESS),
        ];
        let mut levels = vec![level(2, SMALL_LOG2, 8, pages, 1 << SMALL_LOG2 | 1 << LARGE_LOG2), first_level(12 - self.split)];
        if self.split > 0 {
            levels.push(first_level(12));
        }
        levels
    }

    fn roots(&self) -> Vec<Root> {
        let last = (1 << (32 - self.split)) - 1;
        let root = |setting, first, last, address: Option<u64>, level| Root {
            setting,
            first,
            last,
            ignored: 0,
            address: address.unwrap_or(0),
            level,
            inherited: 0,
        };
        let low = root("root", 0, last, self.low, FIRST_LOW);
        if self.split == 0 {
            return vec![low];
        }
        let high = root("root-high", last + 1, 0xffff_ffff, self.high, FIRST_HIGH);
        match (self.low, self.high) {
            (Some(_), None) => vec![low],
            (None, Some(_)) => vec![high],
            _ => vec![low, high],
        }
    }

    fn output_bits(&self) -> u8 {
        self.output_bits
    }

    fn entry_bytes(&self) -> u8 {
        4
    }

    fn privileged(&self) -> bool {
        self.privileged
    }

    fn kind(&self, level: u8, pattern: u64) -> Kind {
        match TYPE.of(pattern) {
            0 => Kind::Absent,
            first::TABLE if level != SECOND => Kind::Table,
            _ => Kind::Leaf,
        }
    }

    fn check(&self, level: u8, kind: Kind, inherited: u64, pattern: u64, findings: &mut Findings) {
        let _ = inherited;
        if kind == Kind::Absent {
            return;
        }
        if level != SECOND {
            if !matches!(self.domain_access(pattern), CLIENT | MANAGER) {
                findings.error(FaultKind::Permission, first::DOMAIN.mask(), DOMAINS, "the entry's domain has no access");
            }
            if kind == Kind::Table {
                let pxn = if self.pxn { 0 } else { first::TABLE_PXN };
                findings.should_be_zero(pattern, first::TABLE_UNUSED | pxn, ENTRIES, "these bits should be zero");
                return;
            }
            if !self.pxn {
                findings.reserved(pattern, first::PXN, ENTRIES, "entries of type 3 are reserved where there is no PXN");
            }
            if !self.supersections {
                findings.reserved(pattern, first::SUPERSECTION, ENTRIES, "there are no supersections here");
            }
        } else if TYPE.of(pattern) == second::LARGE {
            findings.should_be_zero(pattern, second::LARGE_UNUSED, ENTRIES, "these bits should be zero");
        }
        let leaf = Leaf::unpack(level, pattern);
        if self.access_flag && leaf.ap & 1 == 0 {
            let bits = if level == SECOND { second::AP.put(1) } else { first::AP.put(1) };
            findings.error(FaultKind::AccessFlag, bits, ACCESS, "the access flag AP[0] is zero");
        }
        if !self.access_flag && leaf.ap == 4 {
            let bits = if level == SECOND { second::AP_HIGH.mask() } else { first::AP_HIGH.mask() };
            findings.error(FaultKind::Reserved, bits, ACCESS, "AP 0b100 is reserved");
        }
        if self.scheme.decode(leaf.code).is_none() {
            let tex = match leaf.size_log2 {
                SMALL_LOG2 => second::SMALL_TEX,
                LARGE_LOG2 => second::LARGE_TEX,
                _ => first::TEX,
            };
            let bits = tex.mask() | C.mask() | B.mask();
            findings.error(FaultKind::Reserved, bits, MEMORY, "this memory type (TEX, C and B) is reserved or implementation defined");
        }
    }

    fn next(&self, level: u8, pattern: u64) -> Next {
        let _ = (level, pattern);
        Next::whole(SECOND)
    }

    fn inherit(&self, level: u8, inherited: u64, pattern: u64) -> u64 {
        if level == SECOND {
            return inherited;
        }
        let no_checks = if self.domain_access(pattern) == MANAGER { NO_CHECKS } else { 0 };
        let pxn = if self.pxn && TYPE.of(pattern) == first::TABLE && pattern & first::TABLE_PXN != 0 { PXN } else { 0 };
        no_checks | pxn
    }

    fn leaf_size_log2(&self, level: u8, pattern: u64) -> u8 {
        Leaf::unpack(level, pattern).size_log2
    }

    fn attributes(&self, level: u8, inherited: u64, pattern: u64) -> Attributes {
        let leaf = Leaf::unpack(level, pattern);
        let inherited = self.inherit(level, inherited, pattern);
        let (memory_type, coherent) = self.scheme.decode(leaf.code).unwrap_or((MemoryType::Device, false));
        // Access of privileged requests, then of others: none, read, read and write.
        let (privileged, others) = match leaf.ap & if self.access_flag { 6 } else { 7 } {
            _ if inherited & NO_CHECKS != 0 => (2, 2),
            0 if !self.access_flag => (0, 0),
            0 | 1 => (2, 0),
            2 if !self.access_flag => (2, 1),
            2 | 3 => (2, 2),
            4 | 5 => (1, 0),
            _ => (1, 1),
        };
        let privileged_only = privileged > 0 && others == 0;
        let granted = if self.privileged || privileged_only { privileged } else { others };
        let pxn = leaf.pxn || inherited & PXN != 0;
        let execute_never = leaf.xn || (pxn && (self.privileged || privileged_only));
        Attributes {
            read: granted > 0,
            write: granted > 1,
            execute: granted > 0 && (!execute_never || inherited & NO_CHECKS != 0),
            privileged_only,
            memory_type,
            coherent,
            accessed: self.access_flag,
            ..Attributes::default()
        }
    }

    fn encode_leaf(&self, level: u8, size_log2: u8, attributes: Attributes) -> Option<Encoded> {
        let fits = match (level, size_log2) {
            (SECOND, SMALL_LOG2 | LARGE_LOG2) => true,
            (FIRST_LOW | FIRST_HIGH, SECTION_LOG2) => true,
            (FIRST_LOW | FIRST_HIGH, SUPERSECTION_LOG2) => self.supersections,
            _ => false,
        };
        // What may be written or executed may be read. New entries are in domain 0, whose permissions must count.
        if !fits || (level == FIRST_HIGH && self.split == 0) || !attributes.read || self.domains & 3 != CLIENT {
            return None;
        }
        let leaf = Leaf {
            size_log2,
            ap: 1 | if attributes.privileged_only { 0 } else { 2 } | if attributes.write { 0 } else { 4 },
            code: self.scheme.encode(attributes.memory_type, attributes.coherent)?,
            xn: !attributes.execute,
            pxn: false,
        };
        let pattern = leaf.pack();
        Some(Encoded { pattern, attributes: self.attributes(level, 0, pattern) })
    }

    fn encode_table(&self, level: u8, next: u8) -> Option<u64> {
        let first = level == FIRST_LOW || (level == FIRST_HIGH && self.split > 0);
        (first && next == SECOND && self.domains & 3 == CLIENT).then_some(first::TABLE)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;
    use stagecraft_sdk::bits::mask;
    use stagecraft_sdk::{Meaning, Severity};

    use super::*;

    fn open(settings: &[(&str, u64)]) -> Short {
        Short::open(&settings.iter().map(|&(name, value)| (name.to_owned(), value)).collect()).unwrap()
    }

    fn address_bits(shape: &Shape) -> u64 {
        shape.address.iter().fold(0, |bits, segment| bits | mask(segment.entry_lsb + segment.width - 1, segment.entry_lsb))
    }

    fn rwx() -> Attributes {
        Attributes { read: true, write: true, execute: true, coherent: true, accessed: true, ..Attributes::default() }
    }

    fn leaf(size_log2: u8, attributes: Attributes) -> Meaning {
        Meaning::Leaf { size_log2, attributes }
    }

    const RESERVED: Meaning = Meaning::Fault(FaultKind::Reserved);
    const FLAG: Meaning = Meaning::Fault(FaultKind::AccessFlag);
    const DENIED: Meaning = Meaning::Fault(FaultKind::Permission);

    /// What Linux writes for memory that may be read, written and executed: TEX 1, C, B, S, not global, AP 0b011.
    const SECTION: u64 = 0x3_1c0e;
    const SMALL: u64 = 0xc7e;
    const LARGE: u64 = 0x1c3d;

    #[test]
    fn every_bit_of_a_section() {
        let format = open(&[]);
        for level in [FIRST_LOW, FIRST_HIGH] {
            for bit in 0..20 {
                let expected = match bit {
                    0 => RESERVED,
                    1 => Meaning::Absent,
                    // TEX 1 and C alone is implementation defined, B alone is nothing in Linux's registers: strongly-ordered.
                    2 => RESERVED,
                    3 => leaf(20, Attributes { memory_type: MemoryType::Device, coherent: false, ..rwx() }),
                    4 => leaf(20, Attributes { execute: false, ..rwx() }),
                    10 => FLAG,
                    11 => leaf(20, Attributes { privileged_only: true, ..rwx() }),
                    // TEX 0 with C and B: strongly-ordered in Linux's registers.
                    12 => leaf(20, Attributes { memory_type: MemoryType::Device, coherent: false, ..rwx() }),
                    15 => leaf(20, Attributes { write: false, ..rwx() }),
                    16 => leaf(20, Attributes { coherent: false, ..rwx() }),
                    18 => leaf(24, rwx()),
                    // Domain, implementation defined, TEX[2:1], nG, NS.
                    _ => leaf(20, rwx()),
                };
                assert_eq!(format.decode(level, 0, SECTION ^ 1 << bit), expected, "bit {bit}");
            }
        }
    }

    #[test]
    fn every_bit_of_a_page() {
        let format = open(&[]);
        for bit in 0..12 {
            let expected = match bit {
                0 => leaf(12, Attributes { execute: false, ..rwx() }),
                1 => Meaning::Absent,
                2 => RESERVED,
                3 | 6 => leaf(12, Attributes { memory_type: MemoryType::Device, coherent: false, ..rwx() }),
                4 => FLAG,
                5 => leaf(12, Attributes { privileged_only: true, ..rwx() }),
                9 => leaf(12, Attributes { write: false, ..rwx() }),
                10 => leaf(12, Attributes { coherent: false, ..rwx() }),
                _ => leaf(12, rwx()),
            };
            assert_eq!(format.decode(SECOND, 0, SMALL ^ 1 << bit), expected, "small page, bit {bit}");
        }
        for bit in 0..16 {
            let expected = match bit {
                0 => Meaning::Absent,
                // A small page: TEX is elsewhere, and bit 0 is XN.
                1 => leaf(12, Attributes { execute: false, memory_type: MemoryType::Device, coherent: false, ..rwx() }),
                2 => RESERVED,
                3 | 12 => leaf(16, Attributes { memory_type: MemoryType::Device, coherent: false, ..rwx() }),
                4 => FLAG,
                5 => leaf(16, Attributes { privileged_only: true, ..rwx() }),
                9 => leaf(16, Attributes { write: false, ..rwx() }),
                10 => leaf(16, Attributes { coherent: false, ..rwx() }),
                15 => leaf(16, Attributes { execute: false, ..rwx() }),
                _ => leaf(16, rwx()),
            };
            assert_eq!(format.decode(SECOND, 0, LARGE ^ 1 << bit), expected, "large page, bit {bit}");
        }
    }

    #[test]
    fn every_bit_of_a_table_entry() {
        let table = |inherited| Meaning::Table { next: Next::whole(SECOND), inherited };
        let (plain, pxn) = (open(&[]), open(&[("execute-never-privileged", 1)]));
        for bit in 2..10 {
            assert_eq!(plain.decode(FIRST_LOW, 0, 1 | 1 << bit), table(0), "bit {bit}");
            assert_eq!(pxn.decode(FIRST_LOW, 0, 1 | 1 << bit), table(if bit == 2 { PXN } else { 0 }), "bit {bit}");
        }
        assert_eq!(plain.decode(FIRST_LOW, 0, 0x3fc), Meaning::Absent);
        assert_eq!(plain.decode(SECOND, 0, 0xffc), Meaning::Absent);
    }

    #[test]
    fn permissions_without_access_flag() {
        let ap = |settings: &[(&str, u64)], ap: u64| {
            let settings = [&[("access-flag", 0)], settings].concat();
            match open(&settings).decode(SECOND, 0, SMALL & !0x230 | (ap & 3) << 4 | (ap >> 2) << 9) {
                Meaning::Leaf { attributes: a, .. } => format!(
                    "{}{}{}{}",
                    [".", "r"][usize::from(a.read)],
                    [".", "w"][usize::from(a.write)],
                    [".", "x"][usize::from(a.execute)],
                    ["", " privileged"][usize::from(a.privileged_only)]
                ),
                other => format!("{other:?}"),
            }
        };
        let all = |settings: &[(&str, u64)]| (0..8).map(|code| ap(settings, code)).collect::<Vec<_>>();
        let expected = ["...", "rwx privileged", "r.x", "rwx", "Fault(Reserved)", "r.x privileged", "r.x", "r.x"];
        assert_eq!(all(&[]), expected);
        let expected = ["...", "rwx privileged", "rwx", "rwx", "Fault(Reserved)", "r.x privileged", "r.x", "r.x"];
        assert_eq!(all(&[("privileged", 1)]), expected);
    }

    #[test]
    fn domains() {
        // Domain 1 has no access, 2 does not check, 3 is reserved.
        let format = open(&[("domains", 0x5555_5555 & !0xfc | 0b10_11_00_00)]);
        let read_only = SECTION | 1 << 15 | 1 << 4;
        let section = |domain: u64| format.decode(FIRST_LOW, 0, read_only | domain << 5);
        assert_eq!(section(0), leaf(20, Attributes { write: false, execute: false, ..rwx() }));
        assert_eq!((section(1), section(2), section(3)), (DENIED, leaf(20, rwx()), DENIED));
        let table = |domain: u64| format.decode(FIRST_LOW, 0, 1 | domain << 5);
        assert_eq!(table(2), Meaning::Table { next: Next::whole(SECOND), inherited: NO_CHECKS });
        assert_eq!((table(1), table(3)), (DENIED, DENIED));
        assert_eq!(format.decode(SECOND, NO_CHECKS, SMALL | 0x201), leaf(12, rwx()));
        assert_eq!(format.decode(SECOND, NO_CHECKS, SMALL & !0x10), FLAG);
        // Supersections are in domain 0, whatever stands there.
        assert_eq!(format.decode(FIRST_LOW, 0, SECTION | 1 << 18), leaf(24, rwx()));
        let none = open(&[("domains", 0)]);
        assert_eq!((none.decode(FIRST_LOW, 0, SECTION | 1 << 18), none.encode_table(FIRST_LOW, SECOND)), (DENIED, None));
        assert_eq!(none.encode_leaf(SECOND, 12, rwx()), None);
    }

    #[test]
    fn privileged_requests_may_be_kept_from_executing() {
        let format = open(&[("execute-never-privileged", 1)]);
        let privileged = SECTION & !0x800;
        let execute = |format: &Short, level, inherited, pattern| match format.decode(level, inherited, pattern) {
            Meaning::Leaf { attributes, .. } => attributes.execute,
            other => panic!("{other:?}"),
        };
        assert!(execute(&format, FIRST_LOW, 0, SECTION | 1));
        assert!(!execute(&format, FIRST_LOW, 0, privileged | 1) && execute(&format, FIRST_LOW, 0, privileged));
        assert!(!execute(&format, SECOND, PXN, SMALL & !0x20) && execute(&format, SECOND, PXN, SMALL));
        assert!(!execute(&open(&[("execute-never-privileged", 1), ("privileged", 1)]), FIRST_LOW, 0, SECTION | 1));
    }

    #[test]
    fn supersections() {
        let (with, without) = (open(&[]), open(&[("supersections", 0)]));
        assert_eq!(without.decode(FIRST_LOW, 0, SECTION | 1 << 18), RESERVED);
        // Address bits 35:32 and 39:36 stand where a section has its lowest, and its domain.
        let shapes = &with.levels()[1].shapes;
        assert_eq!(shapes.iter().map(address_bits).collect::<Vec<_>>(), [0xfff0_01e0, 0xfff0_0000, 0xffff_fc00]);
        let moved: Vec<_> = shapes[0].address.iter().map(|segment| (segment.entry_lsb, segment.address_lsb, segment.width)).collect();
        assert_eq!(moved, [(24, 24, 8), (20, 32, 4), (5, 36, 4)]);
        assert_eq!(without.levels()[1].shapes.len(), 2);
        assert_eq!((with.output_bits(), open(&[("output-bits", 40)]).output_bits()), (32, 40));
        assert_eq!(without.levels()[1].leaf_sizes, 1 << 20);
        assert_eq!(with.encode_leaf(FIRST_LOW, 24, rwx()).unwrap().pattern, SECTION & !(1 << 17) | 1 << 18);
        assert_eq!(without.encode_leaf(FIRST_LOW, 24, rwx()), None);
    }

    #[test]
    fn what_is_written_is_what_linux_writes() {
        let format = open(&[]);
        // All but nG, which is of no concern to one address space.
        assert_eq!(format.encode_leaf(FIRST_LOW, 20, rwx()).unwrap().pattern, SECTION & !(1 << 17));
        assert_eq!(format.encode_leaf(SECOND, 12, rwx()).unwrap().pattern, SMALL & !(1 << 11));
        assert_eq!(format.encode_leaf(SECOND, 16, rwx()).unwrap().pattern, LARGE & !(1 << 11));
        assert_eq!(format.encode_leaf(SECOND, 12, Attributes { read: false, ..rwx() }), None);
    }

    #[test]
    fn the_split_makes_two_ranges() {
        let ranges = |settings: &[(&str, u64)]| {
            let geometry = open(settings).geometry();
            assert_eq!((geometry.entry_bytes, geometry.output_bits), (4, 32));
            for level in &geometry.levels {
                assert!(level.shapes.iter().all(|shape| address_bits(shape) & shape.mask == 0 && shape.value & !shape.mask == 0));
            }
            let range = |root: &Root| (root.setting, root.first, root.last, geometry.levels[usize::from(root.level)].index_bits);
            geometry.roots.iter().map(range).collect::<Vec<_>>()
        };
        assert_eq!(ranges(&[]), [("root", 0, 0xffff_ffff, 12)]);
        assert_eq!(ranges(&[("split", 1)]), [("root", 0, 0x7fff_ffff, 11), ("root-high", 0x8000_0000, 0xffff_ffff, 12)]);
        assert_eq!(ranges(&[("split", 7)]), [("root", 0, 0x1ff_ffff, 5), ("root-high", 0x200_0000, 0xffff_ffff, 12)]);
        assert_eq!(ranges(&[("split", 7), ("root", 0x80)]), [("root", 0, 0x1ff_ffff, 5)]);
        assert_eq!(ranges(&[("split", 7), ("root-high", 0x4000)]), [("root-high", 0x200_0000, 0xffff_ffff, 12)]);
    }

    #[test]
    fn bad_settings_are_refused_by_name() {
        for (name, value) in [
            ("split", 8),
            ("root", 0x2000),
            ("root", 1 << 32),
            ("root-high", 0x2000),
            ("root-high", 0x4000),
            ("prrr", 1 << 32),
            ("domains", 1 << 32),
            ("access-flag", 2),
            ("output-bits", 31),
            ("output-bits", 41),
            ("levels", 2),
        ] {
            match Short::open(&[(name.to_owned(), value)].into_iter().collect()) {
                Err(Error::Invalid(invalid)) => assert_eq!((invalid.field.as_str(), invalid.value), (name, value)),
                other => panic!("{name}: {other:?}"),
            }
        }
        let given: Settings = [("privileged".to_owned(), 1), ("split".to_owned(), 2)].into_iter().collect();
        let suggested = Short::suggest(&given, &Need::default()).unwrap();
        assert_eq!(suggested.iter().collect::<Vec<_>>(), [("split", 2), ("privileged", 1)]);
    }

    fn any_format() -> impl Strategy<Value = Short> {
        (0_u64..8, 0_u64..32).prop_map(|(split, flags)| {
            let flag = |position: u32| flags >> position & 1;
            open(&[
                ("split", split),
                ("access-flag", flag(0)),
                ("tex-remap", flag(1)),
                ("execute-never-privileged", flag(2)),
                ("supersections", flag(3)),
                ("privileged", flag(4)),
            ])
        })
    }

    proptest! {
        #[test]
        fn encoding_never_grants_more_and_decodes_to_what_it_says(word in 0_u64..1 << 10, level in 0_u8..3, size in 0_usize..5, format in any_format()) {
            let (asked, size) = (Attributes::unpack(word), [12, 16, 20, 24, 32][size]);
            let Some(encoded) = format.encode_leaf(level, size, asked) else { return Ok(()) };
            let kind = &format.levels()[usize::from(level)];
            let shape = kind.shapes.iter().find(|s| encoded.pattern & s.mask == s.value).unwrap();
            prop_assert!(kind.leaf_sizes & 1 << size != 0);
            prop_assert_eq!(encoded.pattern & (address_bits(shape) | !0xffff_ffff), 0);
            prop_assert_eq!(format.decode(level, 0, encoded.pattern), leaf(size, encoded.attributes));
            let granted = encoded.attributes;
            prop_assert_eq!((granted.read, granted.write, granted.execute), (asked.read, asked.write, asked.execute));
            prop_assert_eq!((granted.privileged_only, granted.memory_type), (asked.privileged_only, asked.memory_type));
            prop_assert_eq!(granted.coherent, asked.coherent && asked.memory_type == MemoryType::WriteBack);
            prop_assert!(format.explain(level, 0, encoded.pattern).is_empty());
        }

        #[test]
        fn tables_restrict_nothing(level in 0_u8..4, next in 0_u8..4, format in any_format()) {
            if let Some(pattern) = format.encode_table(level, next) {
                prop_assert_eq!(format.decode(level, 0, pattern), Meaning::Table { next: Next::whole(next), inherited: 0 });
                prop_assert!(format.explain(level, 0, pattern).is_empty());
            } else {
                prop_assert!(level == SECOND || next != SECOND || usize::from(level) >= format.levels().len());
            }
        }

        #[test]
        fn any_pattern_at_any_level_has_an_answer(level in 0_u8..3, inherited: u64, pattern: u64, domains: u32, format in any_format()) {
            let format = Short { domains: domains.into(), ..format };
            let meaning = format.decode(level, inherited, pattern);
            let explained = format.explain(level, inherited, pattern);
            prop_assert_eq!(matches!(meaning, Meaning::Fault(_)), explained.iter().any(|f| f.severity == Severity::Error));
        }

        #[test]
        fn leaves_unpack_to_what_was_packed(size in 0_usize..4, ap in 0_u64..8, code in 0_u64..64, xn: bool, pxn: bool) {
            let size_log2 = [12, 16, 20, 24][size];
            let level = if size < 2 { SECOND } else { FIRST_LOW };
            let code = Code { tex: code >> 3, c: code >> 2 & 1, b: code >> 1 & 1, s: code & 1 };
            let leaf = Leaf { size_log2, ap, code, xn, pxn: pxn && size >= 2 };
            prop_assert_eq!(Leaf::unpack(level, leaf.pack()), leaf);
        }
    }
}
