//! The list of questions that a table format answers.

use crate::{Error, Settings};

/// Bits `entry_lsb .. entry_lsb + width` of an entry are bits `address_lsb .. address_lsb + width` of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Lowest bit in the entry.
    pub entry_lsb: u8,
    /// Lowest bit in the address.
    pub address_lsb: u8,
    /// Number of bits.
    pub width: u8,
}

impl Segment {
    /// Address bits `high..=low` that stand in the entry where they stand in the address.
    #[must_use]
    pub const fn in_place(high: u8, low: u8) -> Self {
        Self { entry_lsb: low, address_lsb: low, width: high - low + 1 }
    }

    /// Entry bits `high..=low` that carry address bits from `address_lsb` upwards.
    #[must_use]
    pub const fn moved(high: u8, low: u8, address_lsb: u8) -> Self {
        Self { entry_lsb: low, address_lsb, width: high - low + 1 }
    }
}

/// If `entry & mask == value`, the bits of `address` carry the output address and all others are the pattern.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// Bits that decide; none of them is an address bit of this shape. One that is an address bit of a later shape needs another to tell the two apart:
    /// in both masks, with different values.
    pub mask: u64,
    /// Their value.
    pub value: u64,
    /// Where the address is.
    pub address: Vec<Segment>,
}

/// How hardware marks an entry: `entry & mask == value` means marked; `mask` zero means that there is no such mark.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    /// The bits of the mark.
    pub mask: u64,
    /// Their value when marked.
    pub value: u64,
}

/// One kind of table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Level {
    /// As the architecture counts it; for messages.
    pub number: i8,
    /// Lowest IOVA bit that selects an entry.
    pub index_lsb: u8,
    /// Number of IOVA bits that select an entry.
    pub index_bits: u8,
    /// Tried in order; an entry that matches none is all pattern.
    pub shapes: Vec<Shape>,
    /// Bit `n`: leaves of `2^n` bytes can be made here.
    pub leaf_sizes: u64,
    /// What stands in an unused slot of a new table.
    pub absent: u64,
    /// Accessed mark of a leaf, if hardware sets it.
    pub accessed: Mark,
    /// Dirty mark of a leaf, if hardware sets it.
    pub dirty: Mark,
    /// Accessed mark of an entry that points to a table, if hardware sets it on the way.
    pub table_accessed: Mark,
}

/// Order of an entry's bytes in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ByteOrder {
    /// Least significant byte first.
    #[default]
    Little,
    /// Most significant byte first.
    Big,
}

/// A table that IOVAs `first..=last` are walked from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Root {
    /// The setting that holds the address.
    pub setting: &'static str,
    /// Lowest IOVA, as people read it.
    pub first: u64,
    /// Highest IOVA.
    pub last: u64,
    /// IOVA bits that play no part.
    pub ignored: u64,
    /// Address of the table.
    pub address: u64,
    /// Index into the levels.
    pub level: u8,
    /// The format's own word for the entries of this table.
    pub inherited: u64,
}

/// The shape of all tables of one address space.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Geometry {
    /// Sorted by `first`, not overlapping.
    pub roots: Vec<Root>,
    /// Kinds of table.
    pub levels: Vec<Level>,
    /// 4 or 8.
    pub entry_bytes: u8,
    /// Order of an entry's bytes.
    pub order: ByteOrder,
    /// Addresses are below `2^output_bits`.
    pub output_bits: u8,
    /// All requests count as privileged.
    pub privileged: bool,
    /// IOVAs, `first` and `last`, that units do not look up in these tables for requests without PASID: at most 4, sorted.
    pub untranslated: Vec<(u64, u64)>,
    /// Memory types through which no table of a first stage, and no device structure, may be read.
    pub no_tables_in: &'static [MemoryType],
}

/// How memory is to be treated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MemoryType {
    /// Normal, write-back cacheable.
    #[default]
    WriteBack,
    /// Normal, not cacheable.
    NonCacheable,
    /// Device.
    Device,
}

impl MemoryType {
    /// The number that the WIT gives it.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::WriteBack => 0,
            Self::NonCacheable => 1,
            Self::Device => 2,
        }
    }
}

/// What a leaf allows: the closed normal form. See `attributes` in the WIT for the packed word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools)]
pub struct Attributes {
    /// Reads pass.
    pub read: bool,
    /// Writes pass.
    pub write: bool,
    /// Instruction fetches pass.
    pub execute: bool,
    /// Only privileged requests pass.
    pub privileged_only: bool,
    /// Memory type.
    pub memory_type: MemoryType,
    /// Accesses snoop the processors' caches.
    pub coherent: bool,
    /// Marked as accessed.
    pub accessed: bool,
    /// Marked as dirty.
    pub dirty: bool,
    /// Clean, and hardware marks it dirty at the first write; `write` is set too.
    pub writable_when_dirty: bool,
}

impl Attributes {
    /// The packed word of the WIT.
    #[must_use]
    pub const fn pack(self) -> u64 {
        let memory_type = self.memory_type.number() as u64;
        (self.read as u64)
            | (self.write as u64) << 1
            | (self.execute as u64) << 2
            | (self.privileged_only as u64) << 3
            | memory_type << 4
            | (self.coherent as u64) << 6
            | (self.accessed as u64) << 7
            | (self.dirty as u64) << 8
            | (self.writable_when_dirty as u64) << 9
    }

    /// From the packed word; bits without a meaning are dropped.
    #[must_use]
    pub const fn unpack(word: u64) -> Self {
        Self {
            read: word & 1 != 0,
            write: word & 1 << 1 != 0,
            execute: word & 1 << 2 != 0,
            privileged_only: word & 1 << 3 != 0,
            memory_type: match word >> 4 & 3 {
                0 => MemoryType::WriteBack,
                1 => MemoryType::NonCacheable,
                _ => MemoryType::Device,
            },
            coherent: word & 1 << 6 != 0,
            accessed: word & 1 << 7 != 0,
            dirty: word & 1 << 8 != 0,
            writable_when_dirty: word & 1 << 9 != 0,
        }
    }

    /// No request passes at all.
    #[must_use]
    pub const fn grants_nothing(self) -> bool {
        !self.read && !self.write && !self.execute
    }
}

/// What the type bits of an entry say, before anything is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing.
    Absent,
    /// A table.
    Table,
    /// A leaf.
    Leaf,
}

/// The table that a table entry points to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Next {
    /// Index into the levels.
    pub level: u8,
    /// Lowest index that exists.
    pub first: u16,
    /// Highest index that exists; beyond the table's end means the end.
    pub last: u16,
}

impl Next {
    /// A whole table of kind `level`.
    #[must_use]
    pub const fn whole(level: u8) -> Self {
        Self { level, first: 0, last: u16::MAX }
    }
}

/// Bytes of a leaf that do not exist. At least one byte is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missing {
    /// How many at its beginning.
    pub front: u32,
    /// How many at its end.
    pub back: u32,
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// Nothing is mapped.
    Absent,
    /// A table, and the format's word for the entries below.
    Table {
        /// Which kind of table, and which part of it exists.
        next: Next,
        /// For the entries below.
        inherited: u64,
    },
    /// A leaf of `2^size_log2` bytes.
    Leaf {
        /// Size.
        size_log2: u8,
        /// What it allows.
        attributes: Attributes,
    },
    /// A leaf of `2^size_log2` bytes that shows only a part of them; requests elsewhere fault. At most 4 GiB.
    Part {
        /// Size of the whole.
        size_log2: u8,
        /// What the part allows.
        attributes: Attributes,
        /// Bytes that do not exist.
        missing: Missing,
    },
    /// Hardware would report this.
    Fault(FaultKind),
    /// Size or validity depend on address bits.
    WholeEntry,
}

impl Meaning {
    /// The packed words of the WIT: `word` and `inherited`.
    #[must_use]
    pub const fn pack(self) -> (u64, u64) {
        match self {
            Self::Absent => (0, 0),
            Self::Table { next, inherited } => (1 | (next.level as u64) << 8 | (next.first as u64) << 16 | (next.last as u64) << 32, inherited),
            Self::Leaf { size_log2, attributes } => (2 | (size_log2 as u64) << 8 | attributes.pack() << 16, 0),
            Self::Part { size_log2, attributes, missing: Missing { front, back } } => {
                (2 | (size_log2 as u64) << 8 | attributes.pack() << 16, front as u64 | (back as u64) << 32)
            }
            Self::Fault(kind) => (3 | (kind as u64) << 8, 0),
            Self::WholeEntry => (4, 0),
        }
    }
}

/// Why a request fails. The order is the WIT's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FaultKind {
    /// No translation is there.
    Translation,
    /// The leaf or a table above it forbids this access.
    Permission,
    /// The entry needs an accessed mark.
    AccessFlag,
    /// An address with more bits than the unit has.
    AddressSize,
    /// A bit that must be zero is set, or an encoding is reserved.
    Reserved,
    /// An address is not aligned to its size.
    Misaligned,
    /// Reading the entry failed.
    Unreadable,
    /// A structure that leads to the table is wrong.
    Configuration,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Hardware faults.
    Error,
    /// Should not be so, and hardware does not mind.
    Warning,
    /// Worth knowing.
    Info,
}

/// One thing that is wrong, or odd, about an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// Why a request would fail.
    pub kind: FaultKind,
    /// The bits that show it.
    pub bits: u64,
    /// Document and section.
    pub section: &'static str,
    /// One sentence in lower case without a full stop.
    pub reason: String,
}

/// Collects what is wrong with one entry.
#[derive(Debug, Default)]
pub struct Findings(Vec<Finding>);

impl Findings {
    /// Hardware faults because of `bits`.
    pub fn error(&mut self, kind: FaultKind, bits: u64, section: &'static str, reason: &str) {
        self.add(Severity::Error, kind, bits, section, reason);
    }

    /// Hardware does not mind `bits`, and yet they should not be so.
    pub fn warning(&mut self, bits: u64, section: &'static str, reason: &str) {
        self.add(Severity::Warning, FaultKind::Reserved, bits, section, reason);
    }

    /// Worth knowing about `bits`, and nothing is wrong.
    pub fn info(&mut self, bits: u64, section: &'static str, reason: &str) {
        self.add(Severity::Info, FaultKind::Permission, bits, section, reason);
    }

    /// `pattern` has bits of `reserved` and hardware faults: names the bits that are set.
    pub fn reserved(&mut self, pattern: u64, reserved: u64, section: &'static str, reason: &str) {
        if pattern & reserved != 0 {
            self.error(FaultKind::Reserved, pattern & reserved, section, reason);
        }
    }

    /// The same for bits that hardware ignores.
    pub fn should_be_zero(&mut self, pattern: u64, reserved: u64, section: &'static str, reason: &str) {
        if pattern & reserved != 0 {
            self.warning(pattern & reserved, section, reason);
        }
    }

    /// Errors first, otherwise in the order found.
    #[must_use]
    pub fn into_vec(self) -> Vec<Finding> {
        self.0
    }

    /// Behind those that are as bad. There are a few: a sort would be five kilobytes of every plugin.
    fn add(&mut self, severity: Severity, kind: FaultKind, bits: u64, section: &'static str, reason: &str) {
        let place = self.0.partition_point(|finding| finding.severity <= severity);
        self.0.insert(place, Finding { severity, kind, bits, section, reason: reason.to_owned() });
    }

    fn first_error(&self) -> Option<FaultKind> {
        self.0.first().filter(|finding| finding.severity == Severity::Error).map(|finding| finding.kind)
    }
}

/// A leaf's pattern, and what it grants once narrowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// Zeroes where the shape has address bits, except those that code the size.
    pub pattern: u64,
    /// Differs from what was asked for where the format cannot say it; never more.
    pub attributes: Attributes,
}

/// What a table must be able to say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Need {
    /// Highest IOVA of the lower half.
    pub last_low: Option<u64>,
    /// Lowest IOVA of the upper half.
    pub first_high: Option<u64>,
    /// Highest output address.
    pub last_address: u64,
    /// All mappings start, end and point at multiples of `2^alignment_log2`.
    pub alignment_log2: u8,
}

/// A table format: what its entries mean under one configuration.
///
/// All functions are pure. The required ones are small; [`Format::decode`] and [`Format::explain`] are made from them, so that a fault and its explanation
/// cannot drift apart. `level` is an index into [`Format::levels`]; `inherited` is the format's own word, from [`Root::inherited`] or [`Format::inherit`].
/// `pattern` has zeroes where the matching shape has address bits.
///
/// | order | question |
/// |---|---|
/// | 1 | [`open`](Format::open): is this configuration consistent? [`suggest`](Format::suggest): which one can say what is needed? |
/// | 2 | [`levels`](Format::levels), [`roots`](Format::roots), [`output_bits`](Format::output_bits) ...: what do the tables look like? |
/// | 3 | [`kind`](Format::kind): what do the type bits say? |
/// | 4 | [`check`](Format::check): is anything wrong with it? |
/// | 5 | [`next`](Format::next) and [`inherit`](Format::inherit) for a table; [`leaf_size_log2`](Format::leaf_size_log2), [`attributes`](Format::attributes) and [`missing`](Format::missing) for a leaf |
/// | 6 | [`encode_leaf`](Format::encode_leaf), [`encode_table`](Format::encode_table): the other direction |
pub trait Format: Sized {
    /// Full name: plugin, slash, table format.
    const NAME: &'static str;

    /// A format with these settings.
    ///
    /// # Errors
    /// Settings that are unknown, out of range or inconsistent.
    fn open(settings: &Settings) -> Result<Self, Error>;

    /// Completes `settings` so that the table can say as much of `need` as possible. Leaves out the roots.
    ///
    /// # Errors
    /// As [`Format::open`].
    fn suggest(settings: &Settings, need: &Need) -> Result<Settings, Error>;

    /// Configurations that a table of unknown origin may have, usual ones first, at most 96, without roots. Settings that change neither what entries mean
    /// nor how tables nest need not be varied.
    #[must_use]
    fn candidates() -> Vec<Settings> {
        vec![Settings::default()]
    }

    /// Kinds of table; `level` everywhere else is an index into this.
    fn levels(&self) -> Vec<Level>;

    /// Where walks start.
    fn roots(&self) -> Vec<Root>;

    /// Addresses are below `2^output_bits`.
    fn output_bits(&self) -> u8;

    /// 4 or 8.
    fn entry_bytes(&self) -> u8 {
        8
    }

    /// Order of an entry's bytes.
    fn byte_order(&self) -> ByteOrder {
        ByteOrder::Little
    }

    /// All requests count as privileged.
    fn privileged(&self) -> bool {
        false
    }

    /// IOVAs, `first` and `last`, that units do not look up in tables of this format for requests without PASID, whatever the tables say: at most 4, sorted.
    /// Nothing is mapped there in tables that are made for such requests. For tables that are read, [`Unit::lookup`](crate::Unit::lookup) says it by
    /// intercepts.
    fn untranslated(&self) -> Vec<(u64, u64)> {
        Vec::new()
    }

    /// Memory types of leaves through which no table of a first stage, and no device structure, may be read, where these tables are a second stage.
    fn no_tables_in(&self) -> &'static [MemoryType] {
        &[]
    }

    /// What the type bits say. `Leaf` where a reserved encoding is neither: [`Format::check`] refuses it.
    fn kind(&self, level: u8, pattern: u64) -> Kind;

    /// All that is wrong with an entry of this kind; the first error is the fault that hardware reports. An entry that [`Format::needs_whole_entry`]
    /// comes whole.
    fn check(&self, level: u8, kind: Kind, inherited: u64, pattern: u64, findings: &mut Findings);

    /// The table that a table entry points to.
    fn next(&self, level: u8, pattern: u64) -> Next;

    /// The word for the entries below a table entry.
    fn inherit(&self, level: u8, inherited: u64, pattern: u64) -> u64 {
        let _ = (level, pattern);
        inherited
    }

    /// The size of a leaf.
    fn leaf_size_log2(&self, level: u8, pattern: u64) -> u8;

    /// The bytes that a leaf does not show; none, if it shows all of them.
    fn missing(&self, level: u8, pattern: u64) -> Option<Missing> {
        let _ = (level, pattern);
        None
    }

    /// What a leaf allows, restrictions from above included.
    fn attributes(&self, level: u8, inherited: u64, pattern: u64) -> Attributes;

    /// Whether an entry's size or validity depends on address bits, so that [`Format::decode_entry`] must see it whole.
    fn needs_whole_entry(&self, level: u8, pattern: u64) -> bool {
        let _ = (level, pattern);
        false
    }

    /// The meaning of an entry that [`Format::needs_whole_entry`], address bits included.
    fn decode_entry(&self, level: u8, inherited: u64, entry: u64) -> Meaning {
        let _ = (level, inherited, entry);
        Meaning::Fault(FaultKind::Reserved)
    }

    /// A leaf of `2^size_log2` bytes at `level` that grants at most `attributes`.
    fn encode_leaf(&self, level: u8, size_log2: u8, attributes: Attributes) -> Option<Encoded>;

    /// An entry at `level` that points to a table of kind `next` and restricts nothing.
    fn encode_table(&self, level: u8, next: u8) -> Option<u64>;

    /// The shape of all tables.
    fn geometry(&self) -> Geometry {
        Geometry {
            roots: self.roots(),
            levels: self.levels(),
            entry_bytes: self.entry_bytes(),
            order: self.byte_order(),
            output_bits: self.output_bits(),
            privileged: self.privileged(),
            untranslated: self.untranslated(),
            no_tables_in: self.no_tables_in(),
        }
    }

    /// What an entry with this pattern is.
    fn decode(&self, level: u8, inherited: u64, pattern: u64) -> Meaning {
        let kind = self.kind(level, pattern);
        if kind == Kind::Absent {
            return Meaning::Absent;
        }
        if self.needs_whole_entry(level, pattern) {
            return Meaning::WholeEntry;
        }
        let mut findings = Findings::default();
        self.check(level, kind, inherited, pattern, &mut findings);
        if let Some(fault) = findings.first_error() {
            return Meaning::Fault(fault);
        }
        match kind {
            Kind::Table => Meaning::Table { next: self.next(level, pattern), inherited: self.inherit(level, inherited, pattern) },
            _ => {
                let (size_log2, attributes) = (self.leaf_size_log2(level, pattern), self.attributes(level, inherited, pattern));
                match self.missing(level, pattern) {
                    Some(missing) => Meaning::Part { size_log2, attributes, missing },
                    None => Meaning::Leaf { size_log2, attributes },
                }
            }
        }
    }

    /// All that is wrong with an entry with this pattern, or with this whole entry if it [`Format::needs_whole_entry`]; worst first.
    fn explain(&self, level: u8, inherited: u64, pattern: u64) -> Vec<Finding> {
        let mut findings = Findings::default();
        self.check(level, self.kind(level, pattern), inherited, pattern, &mut findings);
        findings.into_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bit 0: valid; bit 1: table; bit 2: reserved; bit 3: reserved and ignored.
    struct Small;

    impl Format for Small {
        const NAME: &'static str = "small/table";
        fn open(_: &Settings) -> Result<Self, Error> {
            Ok(Self)
        }
        fn suggest(settings: &Settings, _: &Need) -> Result<Settings, Error> {
            Ok(settings.clone())
        }
        fn levels(&self) -> Vec<Level> {
            Vec::new()
        }
        fn roots(&self) -> Vec<Root> {
            Vec::new()
        }
        fn output_bits(&self) -> u8 {
            48
        }
        fn kind(&self, _: u8, pattern: u64) -> Kind {
            match pattern & 3 {
                0 | 2 => Kind::Absent,
                1 => Kind::Leaf,
                _ => Kind::Table,
            }
        }
        fn check(&self, _: u8, _: Kind, inherited: u64, pattern: u64, findings: &mut Findings) {
            findings.should_be_zero(pattern, 1 << 3, "section 1", "bit 3 should be zero");
            findings.reserved(pattern, 1 << 2, "section 1", "bit 2 must be zero");
            if inherited == 7 {
                findings.error(FaultKind::Permission, 0, "section 2", "forbidden from above");
            }
        }
        fn next(&self, level: u8, _: u64) -> Next {
            Next::whole(level + 1)
        }
        fn inherit(&self, _: u8, inherited: u64, _: u64) -> u64 {
            inherited + 1
        }
        fn leaf_size_log2(&self, _: u8, _: u64) -> u8 {
            12
        }
        fn attributes(&self, _: u8, _: u64, _: u64) -> Attributes {
            Attributes { read: true, ..Attributes::default() }
        }
        fn encode_leaf(&self, _: u8, _: u8, _: Attributes) -> Option<Encoded> {
            None
        }
        fn encode_table(&self, _: u8, _: u8) -> Option<u64> {
            Some(3)
        }
    }

    #[test]
    fn decode_and_explain_cannot_disagree() {
        assert_eq!(Small.decode(0, 0, 0b0110), Meaning::Absent, "an absent entry has no reserved bits");
        assert_eq!(Small.decode(0, 0, 0b0101), Meaning::Fault(FaultKind::Reserved));
        assert_eq!(Small.decode(0, 0, 0b1001), Meaning::Leaf { size_log2: 12, attributes: Attributes { read: true, ..Attributes::default() } });
        assert_eq!(Small.decode(3, 6, 0b0011), Meaning::Table { next: Next::whole(4), inherited: 7 });
        let findings = Small.explain(0, 7, 0b1101);
        let seen: Vec<_> = findings.iter().map(|finding| (finding.severity, finding.kind, finding.bits)).collect();
        assert_eq!(
            seen,
            [(Severity::Error, FaultKind::Reserved, 4), (Severity::Error, FaultKind::Permission, 0), (Severity::Warning, FaultKind::Reserved, 8)]
        );
    }

    #[test]
    fn meanings_are_packed_as_the_wit_says() {
        assert_eq!(Meaning::Absent.pack(), (0, 0));
        let next = Next { level: 0x12, first: 0x3456, last: 0x789a };
        assert_eq!(Meaning::Table { next, inherited: u64::MAX }.pack(), (0x789a_3456_1201, u64::MAX));
        let attributes = Attributes { write: true, writable_when_dirty: true, memory_type: MemoryType::Device, ..Attributes::default() };
        assert_eq!(attributes.pack(), 0b10_0010_0010);
        assert_eq!(Meaning::Leaf { size_log2: 0x15, attributes }.pack(), (0x222 << 16 | 0x1502, 0));
        let missing = Missing { front: 0x1234, back: 0x5678 };
        assert_eq!(Meaning::Part { size_log2: 0x15, attributes, missing }.pack(), (0x222 << 16 | 0x1502, 0x5678_0000_1234));
        assert_eq!(Meaning::Fault(FaultKind::Configuration).pack(), (0x703, 0));
        assert_eq!(Meaning::WholeEntry.pack(), (4, 0));
    }

    #[test]
    fn attributes_survive_packing() {
        for word in 0..1 << 10 {
            if word >> 4 & 3 != 3 {
                assert_eq!(Attributes::unpack(word).pack(), word);
            }
        }
    }

    #[test]
    fn findings_come_with_the_worst_first_and_otherwise_as_found() {
        let mut findings = Findings::default();
        findings.info(1, "", "first info");
        findings.warning(2, "", "first warning");
        findings.error(FaultKind::Reserved, 4, "", "first error");
        findings.should_be_zero(0b1000, 0b1000, "", "second warning");
        findings.error(FaultKind::Translation, 16, "", "second error");
        findings.info(32, "", "second info");
        assert_eq!(findings.first_error(), Some(FaultKind::Reserved));
        assert_eq!(findings.into_vec().iter().map(|finding| finding.bits).collect::<Vec<_>>(), [4, 16, 2, 8, 1, 32]);
    }
}
