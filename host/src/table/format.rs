//! What the engine asks a table format, and what the answers mean. The engine does not know where the answers come from.

use std::fmt;

use crate::Attributes;
use crate::table::geometry::Geometry;

/// The table that a table entry points to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Next {
    /// Index into [`Geometry::levels`].
    pub level: u8,
    /// Lowest index that exists in that table.
    pub first: u16,
    /// Highest index that exists; beyond the table's end means the end.
    pub last: u16,
}

/// Bytes of a leaf that do not exist. At least one byte is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
    /// A table, and the format's word for the entries below it.
    Table {
        /// Which kind of table.
        next: Next,
        /// Handed back with every entry below.
        inherited: u64,
    },
    /// A leaf.
    Leaf {
        /// It maps `2^size_log2` bytes; more than its slot means that the slot shows the piece under it.
        size_log2: u8,
        /// What it allows, restrictions from above included.
        attributes: Attributes,
    },
    /// A leaf of at most 4 GiB that shows only a part of its bytes; requests to the others are [`FaultKind::Permission`] faults.
    Part {
        /// The whole would map `2^size_log2` bytes.
        size_log2: u8,
        /// What the part allows, restrictions from above included.
        attributes: Attributes,
        /// What it does not show.
        missing: Missing,
    },
    /// Hardware would report this.
    Fault(FaultKind),
    /// Size or validity depend on address bits.
    WholeEntry,
}

/// Why a request fails: the WIT's `fault-kind`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
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

impl FaultKind {
    /// All kinds, in the WIT's order.
    pub const ALL: [Self; 8] = [
        Self::Translation,
        Self::Permission,
        Self::AccessFlag,
        Self::AddressSize,
        Self::Reserved,
        Self::Misaligned,
        Self::Unreadable,
        Self::Configuration,
    ];

    /// The WIT's name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Translation => "translation",
            Self::Permission => "permission",
            Self::AccessFlag => "access-flag",
            Self::AddressSize => "address-size",
            Self::Reserved => "reserved",
            Self::Misaligned => "misaligned",
            Self::Unreadable => "unreadable",
            Self::Configuration => "configuration",
        }
    }
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How bad a finding is, worst first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
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
    /// The bits of the entry that show it.
    pub bits: u64,
    /// Document and section.
    pub section: String,
    /// One sentence in lower case without a full stop.
    pub reason: String,
}

/// The pattern of a leaf to be made, and what it grants once narrowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// Zeroes where the shape has address bits, except those that code the size.
    pub pattern: u64,
    /// What it grants.
    pub attributes: Attributes,
}

/// The format cannot answer: its plugin trapped, ran out of time or memory, or answered nonsense. Fails closed.
pub type FormatError = Box<dyn std::error::Error + Send + Sync>;

/// A table format under one configuration: pure functions that may fail only as a whole.
///
/// The engine remembers answers, so each question is asked once per distinct pattern. `level` is an index into [`Geometry::levels`]; `pattern` has zeroes
/// where the matching shape has address bits.
pub trait Format: Send {
    /// The shape of all tables. The same at every call; the engine asks once.
    ///
    /// # Errors
    /// The format failed.
    fn geometry(&mut self) -> Result<Geometry, FormatError>;

    /// What an entry with this pattern is.
    ///
    /// # Errors
    /// The format failed or answered a word that has no meaning.
    fn decode(&mut self, level: u8, inherited: u64, pattern: u64) -> Result<Meaning, FormatError>;

    /// The same for an entry that [`Format::decode`] wants to see whole. Never answers [`Meaning::WholeEntry`].
    ///
    /// # Errors
    /// As [`Format::decode`].
    fn decode_entry(&mut self, level: u8, inherited: u64, entry: u64) -> Result<Meaning, FormatError>;

    /// All that is wrong with an entry with this pattern, worst first. For messages.
    ///
    /// # Errors
    /// The format failed.
    fn explain(&mut self, level: u8, inherited: u64, pattern: u64) -> Result<Vec<Finding>, FormatError>;

    /// A leaf of `2^size_log2` bytes that grants at most `attributes`; none if the format cannot say it.
    ///
    /// # Errors
    /// The format failed.
    fn encode_leaf(&mut self, level: u8, size_log2: u8, attributes: Attributes) -> Result<Option<Encoded>, FormatError>;

    /// An entry that points to a table of kind `next`.
    ///
    /// # Errors
    /// The format failed.
    fn encode_table(&mut self, level: u8, next: u8) -> Result<Option<u64>, FormatError>;
}

/// What a table must be able to say, for choosing its settings.
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
