//! What the two stages share of VMSAv8-64: granules, levels, where addresses stand, and the Access flag.
//!
//! ```text
//!            4K granule        16K granule       64K granule
//! level -1   [51:48]           -                 -              52-bit input, LPA2 only
//! level  0   [47:39] 512G *    [51:47]           -              * blocks with LPA2 only
//! level  1   [38:30] 1G        [46:36] 64G *     [51:42] 4T +   + blocks where the unit has 52-bit output only
//! level  2   [29:21] 2M        [35:25] 32M       [41:29] 512M
//! level  3   [20:12] 4K        [24:14] 16K       [28:16] 64K
//! ```
//!
//! The first table that a walk reads is as wide as the input addresses need: narrower than above, or in stage 2 up to 16 times wider.

use stagecraft_sdk::bits::mask;
use stagecraft_sdk::{Error, FaultKind, Findings, Kind, Level, Mark, MemoryType, Next, Segment, Settings, Shape};

use crate::spec::descriptor::{self, BLOCK, TABLE_OR_PAGE, TYPE, VALID};

const GRANULES: &[u64] = &[4096, 16384, 65536];
const OUTPUT_BITS: &[u64] = &[32, 36, 40, 42, 44, 48, 52];

/// The granule in setting `name`.
pub(crate) fn granule(settings: &Settings, name: &'static str, default: Granule) -> Result<Granule, Error> {
    let bytes = settings.one_of(name, default.bytes(), GRANULES, "DDI 0487 section D8.2")?;
    Ok(Granule(bytes.trailing_zeros() as u8))
}

/// The setting `output-bits`.
pub(crate) fn output_bits(settings: &Settings) -> Result<u8, Error> {
    Ok(settings.one_of("output-bits", 48, OUTPUT_BITS, "IHI 0070 section 3.4")? as u8)
}

/// The setting `lpa`: the unit has 52-bit output addresses, whatever `output-bits` says. `wide` if a range has the 64K granule, which needs no LPA2 for them.
pub(crate) fn lpa(settings: &Settings, output_bits: u8, wide: bool) -> Result<bool, Error> {
    let section = "IHI 0070 section 6.3.6, OAS";
    let reached = wide && output_bits == 52;
    let lpa = settings.flag("lpa", reached)?;
    match (lpa, wide) {
        (true, false) => Err(Error::invalid("lpa", 1, section, "has no meaning without the 64K granule")),
        (false, _) if reached => Err(Error::invalid("lpa", 0, section, "52 output bits are not there without")),
        _ => Ok(lpa),
    }
}

/// The smallest output size that reaches `last`, 48 bits if that will do.
pub(crate) fn suggest_output_bits(last: u64, at_most: u8) -> u64 {
    u64::from(at_most.min(if last >> 48 == 0 { 48 } else { 52 }))
}

/// Input bits of the range that setting `name` describes.
pub(crate) fn input_bits(settings: &Settings, name: &'static str, default: u8, granule: Granule, lpa2: bool) -> Result<u8, Error> {
    let last = if granule == Granule::K64 || lpa2 { 52 } else { 48 };
    let first = if granule == Granule::K64 { 17 } else { 16 };
    Ok(settings.within(name, u64::from(default), first, last, "IHI 0070 section 5.4, T0SZ")? as u8)
}

/// Number of low address bits that `value` needs.
pub(crate) fn bits_of(value: u64) -> u8 {
    (64 - value.leading_zeros()) as u8
}

/// `address` with its low `log2` bits zero.
pub(crate) const fn align_down(address: u64, log2: u8) -> u64 {
    if log2 >= 64 { 0 } else { address & (u64::MAX << log2) }
}

/// A granule, as log2: 12, 14 or 16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Granule(u8);

impl Granule {
    pub(crate) const K4: Self = Self(12);
    pub(crate) const K64: Self = Self(16);

    /// From what `granule0` and `granule1` of the CD's layout give.
    pub(crate) const fn from_log2(log2: u8) -> Self {
        Self(log2)
    }

    pub(crate) const fn log2(self) -> u8 {
        self.0
    }

    pub(crate) const fn bytes(self) -> u64 {
        1 << self.0
    }

    /// Input address bits that one level resolves.
    const fn stride(self) -> u8 {
        self.0 - 3
    }

    /// Lowest input address bit that selects an entry at level `number`.
    const fn index_lsb(self, number: i8) -> u8 {
        self.0 + (3 - number) as u8 * self.stride()
    }

    /// The level that a walk starts at without concatenation.
    pub(crate) const fn start(self, input_bits: u8) -> i8 {
        4 - input_bits.saturating_sub(self.0).div_ceil(self.stride()) as i8
    }

    /// Index bits of the first table, if a walk of `input_bits` may start at `number` with at most `concatenated` bits more than a table has.
    pub(crate) const fn first_index_bits(self, input_bits: u8, number: i8, concatenated: u8) -> Option<u8> {
        match input_bits.checked_sub(self.index_lsb(number)) {
            Some(bits) if bits >= 1 && bits <= self.stride() + concatenated => Some(bits),
            _ => None,
        }
    }

    /// Input sizes that people use, ascending: whole numbers of levels, 48 and 52 bits.
    pub(crate) const fn usual_input_bits(self) -> &'static [u8] {
        match self.0 {
            12 => &[39, 48, 52],
            14 => &[36, 47, 48, 52],
            _ => &[42, 48, 52],
        }
    }

    /// The highest address bit plus one that descriptors can carry, input and output alike.
    pub(crate) const fn widest(self, lpa2: bool) -> u8 {
        if self.0 == 16 || lpa2 { 52 } else { 48 }
    }

    /// The smallest usual input size that holds `last`, or the largest one there is.
    pub(crate) fn suggest_input_bits(self, last: u64, lpa2: bool) -> u64 {
        let mut usual = self.usual_input_bits().iter().copied().filter(|&bits| bits <= self.widest(lpa2));
        u64::from(usual.find(|&bits| bits >= bits_of(last)).unwrap_or(self.widest(lpa2)))
    }
}

/// Log2 of what the address of a first table is aligned to: its size, and with 52-bit output 64 bytes at least (DDI 0487 section D8.2.5.2).
pub(crate) const fn root_alignment(index_bits: u8, output_bits: u8) -> u8 {
    let least = if output_bits == 52 { 6 } else { 4 };
    if index_bits + 3 > least { index_bits + 3 } else { least }
}

/// Refuses the address of a first table that the hardware would not use as it is.
pub(crate) fn check_root(name: &str, address: u64, index_bits: u8, output_bits: u8, granule: Granule, lpa2: bool) -> Result<(), Error> {
    let section = "IHI 0070 section 5.4, TTB0";
    if address >> output_bits.min(granule.widest(lpa2)) != 0 {
        return Err(Error::invalid(name, address, section, "lies beyond the output address size"));
    }
    let alignment = root_alignment(index_bits, output_bits);
    if align_down(address, alignment) != address {
        return Err(Error::invalid(name, address, section, &format!("must be a multiple of {}, the size of the table", 1_u64 << alignment)));
    }
    Ok(())
}

/// How the tables of an unknown origin may nest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidate {
    pub(crate) granule: u64,
    pub(crate) input_bits: u64,
    /// The setting `start-level`, of stage 2 alone.
    pub(crate) start: Option<u64>,
    pub(crate) lpa2: bool,
}

impl Candidate {
    fn settings(self, flags: &[&str]) -> Settings {
        let mut settings = Settings::of(&[("granule", self.granule), ("input-bits", self.input_bits)]);
        if let Some(start) = self.start {
            settings.set("start-level", start);
        }
        if self.lpa2 || self.input_bits == 52 {
            settings.set("output-bits", 52);
        }
        for flag in flags.iter().copied().chain(self.lpa2.then_some("lpa2")) {
            settings.set(flag, 1);
        }
        settings
    }
}

/// Configurations of tables of unknown origin: `usual` and `narrow` ones plain; then with 52-bit descriptors, which only the `wide` ones have, with hardware
/// marks (which stand for a disabled Access flag as well: any value of it is right), and with the bytes of a big-endian table. What else a context says changes what leaves grant, and not which entries are right.
pub(crate) fn candidates(usual: &[Candidate], narrow: &[Candidate], wide: &[Candidate]) -> Vec<Settings> {
    let marks = ["hardware-access", "hardware-dirty"];
    let big = ["big-endian"];
    let both = ["hardware-access", "hardware-dirty", "big-endian"];
    let with = |candidates: &[Candidate], flags: &[&str]| candidates.iter().map(|candidate| candidate.settings(flags)).collect::<Vec<_>>();
    let plain = [with(usual, &[]), with(narrow, &[]), with(wide, &[])].concat();
    [plain, with(usual, &marks), with(usual, &big), with(wide, &marks), with(usual, &both), with(narrow, &marks)].concat()
}

/// One kind of table, and with it everything that decides what its descriptors look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) number: i8,
    index_bits: u8,
    granule: Granule,
    lpa2: bool,
    blocks: bool,
}

/// The tables of a walk, from the first to level 3.
pub(crate) fn tables(granule: Granule, start: i8, first_index_bits: u8, lpa2: bool, lpa: bool) -> Vec<Table> {
    let lpa2 = lpa2 && granule != Granule::K64;
    let blocks = |number| match (granule.log2(), number) {
        (_, 2) | (12, 1) => true,
        (12, 0) | (14, 1) => lpa2,
        (16, 1) => lpa,
        _ => false,
    };
    let index_bits = |number| if number == start { first_index_bits } else { granule.stride() };
    (start..=3).map(|number| Table { number, index_bits: index_bits(number), granule, lpa2, blocks: blocks(number) }).collect()
}

impl Table {
    const fn index_lsb(&self) -> u8 {
        self.granule.index_lsb(self.number)
    }

    const fn is_last(&self) -> bool {
        self.number == 3
    }

    pub(crate) const fn lpa2(&self) -> bool {
        self.lpa2
    }

    /// Where an address stands whose lowest bit is `low`: DDI 0487 tables D8-50 to D8-53.
    fn address(&self, low: u8) -> Vec<Segment> {
        if self.granule == Granule::K64 {
            vec![Segment::in_place(47, low), Segment::moved(15, 12, 48)]
        } else if self.lpa2 {
            vec![Segment::in_place(49, low), Segment::moved(9, 8, 50)]
        } else {
            vec![Segment::in_place(47, low)]
        }
    }

    /// For the geometry. Reserved encodings have the shape of the leaf that they are not, so that their address bits do not make new patterns.
    pub(crate) fn level(&self, hardware: Hardware, dirty: Mark) -> Level {
        let leaf = self.address(self.index_lsb());
        let shapes = if self.is_last() {
            vec![Shape { mask: VALID, value: VALID, address: leaf }]
        } else {
            let table = self.address(self.granule.log2());
            vec![Shape { mask: TYPE, value: TABLE_OR_PAGE, address: table }, Shape { mask: TYPE, value: BLOCK, address: leaf }]
        };
        let af = descriptor::stage1::AF.mask();
        Level {
            number: self.number,
            index_lsb: self.index_lsb(),
            index_bits: self.index_bits,
            shapes,
            leaf_sizes: if self.is_last() || self.blocks { 1 << self.index_lsb() } else { 0 },
            absent: 0,
            accessed: if hardware.access { Mark { mask: af, value: af } } else { Mark::default() },
            dirty: if hardware.dirty { dirty } else { Mark::default() },
            table_accessed: if hardware.tables && !self.is_last() { Mark { mask: af, value: af } } else { Mark::default() },
        }
    }

    pub(crate) const fn kind(&self, pattern: u64) -> Kind {
        if pattern & VALID == 0 {
            Kind::Absent
        } else if pattern & TYPE == TABLE_OR_PAGE && !self.is_last() {
            Kind::Table
        } else {
            Kind::Leaf
        }
    }

    /// Whether a leaf of this size can be made here, and then its type bits.
    pub(crate) const fn leaf_type(&self, size_log2: u8) -> Option<u64> {
        if size_log2 != self.index_lsb() {
            None
        } else if self.is_last() {
            Some(TABLE_OR_PAGE)
        } else if self.blocks {
            Some(BLOCK)
        } else {
            None
        }
    }

    pub(crate) const fn leaf_size_log2(&self) -> u8 {
        self.index_lsb()
    }

    /// A table entry at index `level` of the levels; tables follow each other in the list.
    pub(crate) const fn encode_table(&self, hardware: Hardware, level: u8, next: u8) -> Option<u64> {
        let accessed = if hardware.tables { descriptor::stage1::AF.mask() } else { 0 };
        if !self.is_last() && next == level.saturating_add(1) { Some(TABLE_OR_PAGE | accessed) } else { None }
    }

    pub(crate) const fn next(level: u8) -> Next {
        Next::whole(level.saturating_add(1))
    }

    /// What is wrong with the type bits and the bits around the address. False if nothing else counts.
    pub(crate) fn check(&self, kind: Kind, hardware: Hardware, pattern: u64, findings: &mut Findings) -> bool {
        let section = "DDI 0487 section D8.3.1";
        let high = if self.lpa2 { 0 } else { mask(49, 48) };
        let low = if self.granule.log2() == 14 { mask(13, 12) } else { 0 };
        match kind {
            Kind::Absent => return false,
            Kind::Table => {
                findings.should_be_zero(pattern, high | low | mask(50, 50), section, "reserved bits of a table descriptor are set");
            }
            Kind::Leaf if self.is_last() && pattern & TYPE != TABLE_OR_PAGE => {
                findings.error(FaultKind::Translation, TYPE, section, "0b01 is reserved at level 3 and counts as invalid");
                return false;
            }
            Kind::Leaf if !self.is_last() && !self.blocks => {
                findings.error(FaultKind::Translation, TYPE, "DDI 0487 section D8.2", "there are no blocks at this level: counts as invalid");
                return false;
            }
            Kind::Leaf => {
                // Bit 16 is nT, a hint for changing block sizes.
                let below = if self.is_last() { low } else { mask(self.index_lsb() - 1, 12) & !mask(16, 16) };
                let below = if self.granule == Granule::K64 { below & !mask(15, 12) } else { below };
                findings.should_be_zero(pattern, high | below, section, "reserved bits around the output address are set");
                if hardware.access_flag_faults(pattern) {
                    let reason = "the Access flag is clear and hardware does not set it";
                    findings.error(FaultKind::AccessFlag, descriptor::stage1::AF.mask(), "DDI 0487 section D8.5.1", reason);
                }
            }
        }
        true
    }
}

/// What the hardware does about accessed and dirty marks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Hardware {
    /// HA: sets the Access flag.
    pub(crate) access: bool,
    /// HD: makes a clean leaf dirty.
    pub(crate) dirty: bool,
    /// AFFD: without HA, takes the Access flag as 1.
    pub(crate) access_flag_disabled: bool,
    /// HAFT: with HA, sets an Access flag of tables, which is where that of leaves is (DDI 0487 section D8.5).
    pub(crate) tables: bool,
}

impl Hardware {
    pub(crate) const NAMES: [&'static str; 4] = ["hardware-access", "hardware-dirty", "access-flag-disabled", "hardware-table-access"];

    pub(crate) fn open(settings: &Settings) -> Result<Self, Error> {
        let hardware = Self {
            access: settings.flag(Self::NAMES[0], false)?,
            dirty: settings.flag(Self::NAMES[1], false)?,
            access_flag_disabled: settings.flag(Self::NAMES[2], false)?,
            tables: settings.flag(Self::NAMES[3], false)?,
        };
        if hardware.dirty && !hardware.access {
            let reason = "hardware that marks dirty must mark accessed too";
            return Err(Error::invalid(Self::NAMES[1], 1, "IHI 0070 section 5.4, HA", reason));
        }
        if hardware.tables && !hardware.access {
            let reason = "hardware that marks tables must mark leaves too";
            return Err(Error::invalid(Self::NAMES[3], 1, "IHI 0070 section 5.4, HAFT", reason));
        }
        Ok(hardware)
    }

    const fn access_flag_faults(self, pattern: u64) -> bool {
        !self.access && !self.access_flag_disabled && pattern & descriptor::stage1::AF.mask() == 0
    }

    /// Whether a leaf counts as accessed.
    pub(crate) const fn accessed(self, pattern: u64) -> bool {
        pattern & descriptor::stage1::AF.mask() != 0 || (self.access_flag_disabled && !self.access)
    }

    /// The Access flag of a new leaf: clear only where hardware sets it.
    pub(crate) const fn encode_access_flag(self, accessed: bool) -> u64 {
        if self.access && !accessed { 0 } else { descriptor::stage1::AF.mask() }
    }
}

/// Shareability bits [9:8] of a leaf: inner, outer and non-shareable.
pub(crate) const INNER: u64 = 3;
pub(crate) const OUTER: u64 = 2;
pub(crate) const NON_SHAREABLE: u64 = 0;

/// Whether accesses of this memory type and shareability snoop the processors' caches.
pub(crate) const fn is_coherent(memory_type: MemoryType, shareability: u64) -> bool {
    matches!(memory_type, MemoryType::WriteBack) && shareability >= OUTER
}

/// What stands in bits [9:8] of a leaf: memory that is not cached is outer shareable whatever stands there.
pub(crate) const fn encode_shareability(memory_type: MemoryType, coherent: bool) -> u64 {
    match memory_type {
        MemoryType::WriteBack => {
            if coherent {
                INNER
            } else {
                NON_SHAREABLE
            }
        }
        _ => OUTER,
    }
}

/// Complains about the reserved shareability.
pub(crate) fn check_shareability(lpa2: bool, pattern: u64, findings: &mut Findings) {
    if !lpa2 && descriptor::stage1::SH.of(pattern) == 1 {
        let reason = "shareability 0b01 is reserved: taken as non-shareable";
        findings.warning(descriptor::stage1::SH.mask(), "DDI 0487 section D8.6.2", reason);
    }
}
