//! Who hears what a walk finds, and in which words: the way to an entry, a fault, its cause.

use std::fmt;

use crate::table::format::FaultKind;
use crate::table::leaves::{Piece, Run};
use crate::table::passage::Receiver;
use crate::table::recode::Passed;
use crate::table::walk::WalkError;
use crate::{Gpa, Span};

/// One table on the way to an entry, and the entry.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Kind of table: index into the geometry's levels.
    pub level: u8,
    /// The level as the architecture counts it.
    pub number: i8,
    /// The table.
    pub table: Gpa,
    /// Which entry.
    pub index: u64,
    /// The entry as it was read; none if it could not be.
    pub entry: Option<u64>,
    /// The format's word for this table.
    pub inherited: u64,
}

impl fmt::Debug for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "level {} table {} entry {}", self.number, self.table, self.index)?;
        self.entry.map_or(Ok(()), |entry| write!(f, " = {entry:#018x}"))
    }
}

/// Why a request fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cause {
    /// The entry says so.
    Entry(FaultKind),
    /// An address outside the guest's memory map.
    OutsideMemory,
    /// A page that the memory map promises and that cannot be read.
    Missing,
    /// Something else than the tables serves this address: an [`Intercept`](crate::table::Intercept).
    Intercepted,
}

impl Cause {
    /// A short name with hyphens.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Entry(kind) => kind.as_str(),
            Self::OutsideMemory => "outside-memory",
            Self::Missing => "missing-page",
            Self::Intercepted => "intercepted",
        }
    }
}

/// A fault, as the walk meets it.
#[derive(Clone, Copy, Debug)]
pub struct FaultAt<'a> {
    /// Which stage: 1, or 2 for the second of two.
    pub stage: u8,
    /// Why.
    pub cause: Cause,
    /// The IOVAs that fault. For stage 2 of two: the intermediate addresses.
    pub span: Span,
    /// The address that is at fault, if one is.
    pub address: Option<u64>,
    /// The second stage failed while a table of the first was read.
    pub reading_table: bool,
    /// From the root to the entry; empty if no root covers the IOVA.
    pub path: &'a [Step],
}

/// Hears what a walk finds, in ascending order of IOVA.
pub trait Visitor {
    /// Whether runs of leaves may have gaps, about which [`Visitor::absent`] is then not told.
    fn takes_gaps(&self) -> bool {
        false
    }

    /// Whether runs may be of leaves that fill several slots each, with one entry for each leaf.
    fn takes_large(&self) -> bool {
        false
    }

    /// Leaves that are alike, each as large as its slot, or filling several. `path` leads to the first one's entry.
    ///
    /// # Errors
    /// [`WalkError::Stopped`] ends the walk.
    fn leaves(&mut self, run: &Run<'_>, path: &[Step]) -> Result<(), WalkError> {
        for piece in run.pieces() {
            self.piece(&piece, path)?;
        }
        Ok(())
    }

    /// Entries that nobody has looked at, all of a page, are probably like those of `run`: how they can be written while they are looked at, and where. None: they
    /// are told as always. `run` has the entries, which may be anything.
    fn receive(&mut self, run: &Run<'_>) -> Option<Receiver<'_>> {
        let _ = run;
        None
    }

    /// The entries that the last [`Visitor::receive`] was about were written, gaps at both ends included, and `passed` says what they are.
    /// False: that is of no use, and they are told as always.
    ///
    /// # Errors
    /// [`WalkError::Stopped`] ends the walk.
    fn received(&mut self, run: &Run<'_>, passed: Passed) -> Result<bool, WalkError> {
        let _ = (run, passed);
        Ok(false)
    }

    /// Entries are about to be read: a moment to get ready for them, and nothing more.
    fn table(&mut self) {}

    /// Any other leaf, or the part of one that is in the span and in guest memory. `path` leads to its entry.
    ///
    /// # Errors
    /// [`WalkError::Stopped`] ends the walk.
    fn piece(&mut self, piece: &Piece, path: &[Step]) -> Result<(), WalkError>;

    /// Nothing is mapped here. `path` leads to the entry that says so, if there is one.
    ///
    /// # Errors
    /// [`WalkError::Stopped`] ends the walk.
    fn absent(&mut self, span: Span, path: &[Step]) -> Result<(), WalkError> {
        let _ = (span, path);
        Ok(())
    }

    /// Nothing is mapped here: so many entries side by side, the first of which `path` leads to, are equal and point to a table that this walk has seen, and
    /// in which there was nothing. It is not gone through again.
    ///
    /// # Errors
    /// [`WalkError::Stopped`] ends the walk.
    fn nothing_below(&mut self, span: Span, entries: u64, path: &[Step]) -> Result<(), WalkError> {
        let _ = entries;
        self.absent(span, path)
    }

    /// A request here faults, for another reason than that nothing is mapped.
    ///
    /// # Errors
    /// [`WalkError::Stopped`] ends the walk.
    fn fault(&mut self, fault: &FaultAt<'_>) -> Result<(), WalkError> {
        let _ = fault;
        Ok(())
    }
}
