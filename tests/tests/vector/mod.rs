//! Vectors of table entries, written from the specifications: what they are, how they are read, and how they are judged.

pub mod file;
pub mod judge;
pub mod line;

use std::fmt;

use stagecraft::Attributes;
use stagecraft::table::{ByteOrder, FaultKind};

/// What an entry is, by the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    Absent,
    Leaf {
        size_log2: u8,
        address: u64,
        attributes: Attributes,
    },
    /// A leaf that lacks bytes at its beginning or end.
    Part {
        size_log2: u8,
        address: u64,
        attributes: Attributes,
        front: u64,
        back: u64,
    },
    /// `indices`: the lowest and the highest entry that exist, if not all of them do.
    Table {
        address: u64,
        level: i8,
        indices: Option<(u16, u16)>,
    },
    Fault(FaultKind),
}

impl fmt::Display for Want {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => f.write_str("absent"),
            Self::Leaf { size_log2, address, attributes } => write!(f, "leaf of 2^{size_log2} bytes at {address:#x} {attributes}"),
            Self::Part { size_log2, address, attributes, front, back } => {
                write!(f, "part of 2^{size_log2} bytes at {address:#x} {attributes} without {front} and {back} bytes")
            }
            Self::Table { address, level, indices } => {
                write!(f, "table {address:#x} level {level}")?;
                indices.map_or(Ok(()), |(first, last)| write!(f, " indices {first}..{last}"))
            }
            Self::Fault(kind) => write!(f, "fault {kind}"),
        }
    }
}

/// What an entry is, and where the translation through it ends; the same unless the entry is a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub entry: Want,
    pub end: Want,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.entry == self.end { write!(f, "{}", self.entry) } else { write!(f, "{}, {}", self.entry, self.end) }
    }
}

/// A level of tables as the specification describes it: IOVA bits `high:low` select the entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tables {
    pub level: i8,
    pub high: u8,
    pub low: u8,
}

/// Settings of the format, and the shape that the specification gives tables with these settings.
#[derive(Clone, Debug)]
pub struct Configuration {
    pub settings: Vec<(String, u64)>,
    /// From the root down.
    pub tables: Vec<Tables>,
    /// The setting that holds the address of the root that the blocks use.
    pub root: String,
}

impl Configuration {
    /// The order of an entry's bytes, which some formats have a setting for.
    pub fn order(&self, otherwise: ByteOrder) -> ByteOrder {
        if self.settings.iter().any(|(name, value)| name == "big-endian" && *value == 1) { ByteOrder::Big } else { otherwise }
    }
}

/// An entry above or below the one under test.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    pub level: i8,
    pub entry: u64,
    /// Where the specification finds the next table, if the entry is one.
    pub next: Option<u64>,
}

/// One entry and what it is.
#[derive(Clone, Debug)]
pub struct Vector {
    /// Line in the file.
    pub line: usize,
    /// The bit in which it differs from the block's entry.
    pub bit: Option<u8>,
    pub entry: u64,
    pub outcome: Outcome,
    pub section: String,
}

/// An entry that is as it should be, and all those that differ from it in a bit.
#[derive(Clone, Debug)]
pub struct Block {
    pub line: usize,
    pub title: String,
    /// Index into [`File::configurations`].
    pub configuration: usize,
    /// Not every bit is flipped here.
    pub part: bool,
    pub level: i8,
    pub iova: u64,
    pub above: Vec<Link>,
    pub below: Vec<Link>,
    /// The first is the block's own entry.
    pub vectors: Vec<Vector>,
}

/// An IOVA that no root serves.
#[derive(Clone, Debug)]
pub struct Outside {
    pub line: usize,
    pub configuration: usize,
    pub iova: u64,
    pub section: String,
}

/// A file of vectors.
#[derive(Clone, Debug)]
pub struct File {
    pub name: String,
    pub format: String,
    pub entry_bytes: u8,
    pub order: ByteOrder,
    /// What stands in memory where no vector says anything.
    pub elsewhere: u64,
    pub configurations: Vec<Configuration>,
    pub blocks: Vec<Block>,
    pub outside: Vec<Outside>,
}
