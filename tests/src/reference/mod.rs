//! A second reader of I/O page tables, which shares no code with the rest of the project.
//!
//! It is small, slow and written from the specifications alone, so that a mistake in the production engine is not repeated here: one table entry at a time, plain
//! integers, no caches. [`snapshot`] loads a guest, [`detect`] finds a device's tables from the unit's registers, [`tables`] says what one entry means in each
//! format, [`walk`] follows the entries, and [`generate`] writes tables whose content is known beforehand.

pub mod detect;
pub mod faults;
pub mod generate;
pub mod snapshot;
pub mod tables;
pub mod units;
pub mod walk;

#[cfg(test)]
mod fixture_tests;
#[cfg(test)]
mod nested_tests;

use std::fmt;

/// What an unprivileged device request may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Access {
    /// Reads are allowed.
    pub read: bool,
    /// Writes are allowed.
    pub write: bool,
}

impl Access {
    /// Nothing is allowed.
    pub const NONE: Access = Access { read: false, write: false };
    /// Only reads.
    pub const R: Access = Access { read: true, write: false };
    /// Only writes.
    pub const W: Access = Access { read: false, write: true };
    /// Reads and writes.
    pub const RW: Access = Access { read: true, write: true };

    /// What both sides allow.
    pub fn and(self, other: Access) -> Access {
        Access { read: self.read && other.read, write: self.write && other.write }
    }

    /// Whether a read (`write` false) or a write (`write` true) is allowed.
    pub fn allows(self, write: bool) -> bool {
        if write { self.write } else { self.read }
    }

    /// Reads `r`, `w`, `rw` or the empty string.
    pub fn parse(text: &str) -> Option<Access> {
        match text {
            "" => Some(Access::NONE),
            "r" => Some(Access::R),
            "w" => Some(Access::W),
            "rw" => Some(Access::RW),
            _ => None,
        }
    }
}

impl fmt::Display for Access {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}{}", if self.read { "r" } else { "" }, if self.write { "w" } else { "" })
    }
}

/// A stretch of IOVAs that goes to a stretch of addresses with one access.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Run {
    /// First IOVA, in bytes; sign-extended where the format says so.
    pub iova: u64,
    /// First output address, in bytes.
    pub address: u64,
    /// Length in bytes. The last byte is `iova + (size - 1)`: a run may end with the last IOVA there is.
    pub size: u64,
    /// What the device may do there; never [`Access::NONE`] in a result.
    pub access: Access,
}

impl fmt::Debug for Run {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{:#x}+{:#x} -> {:#x} {}", self.iova, self.size, self.address, self.access)
    }
}

/// Sorts by IOVA and joins neighbours that continue each other in IOVA and address with the same access.
pub fn merge(mut runs: Vec<Run>) -> Vec<Run> {
    runs.sort_by_key(|run| run.iova);
    let mut merged: Vec<Run> = Vec::new();
    for run in runs {
        append(&mut merged, run);
    }
    merged
}

/// Adds a run at the end, as part of the last one where it continues it.
pub fn append(runs: &mut Vec<Run>, run: Run) {
    if let Some(last) = runs.last_mut() {
        // Not across the last IOVA: `wrapping_add` gives zero there and no run that is sorted behind another starts at zero.
        let continues = last.iova.wrapping_add(last.size) == run.iova && last.address.wrapping_add(last.size) == run.address;
        if continues && run.iova != 0 && last.access == run.access {
            last.size += run.size;
            return;
        }
    }
    runs.push(run);
}

/// Why something could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// The snapshot does not hold the page at this physical address.
    Unreadable(u64),
    /// The tables have more entries than the visit budget allows.
    Budget,
    /// Settings or structures that the architecture forbids.
    Illegal(String),
    /// Something that this reference does not know.
    Unsupported(String),
    /// A file of the snapshot is missing or malformed.
    File(String),
}

impl fmt::Display for Problem {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Problem::Unreadable(address) => write!(out, "the snapshot does not hold the page at {address:#x}"),
            Problem::Budget => write!(out, "more table entries than the visit budget allows"),
            Problem::Illegal(text) => write!(out, "illegal: {text}"),
            Problem::Unsupported(text) => write!(out, "unsupported: {text}"),
            Problem::File(text) => write!(out, "{text}"),
        }
    }
}

impl std::error::Error for Problem {}

/// Bits `high..=low` of a value, moved to bit 0.
pub fn bits(value: u64, high: u32, low: u32) -> u64 {
    assert!(low <= high && high < 64);
    let width = high - low + 1;
    let shifted = value >> low;
    if width == 64 { shifted } else { shifted % (1u64 << width) }
}

/// One bit of a value.
pub fn bit(value: u64, position: u32) -> bool {
    bits(value, position, position) == 1
}
