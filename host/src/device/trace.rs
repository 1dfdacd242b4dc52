//! What a lookup read: a lookup is a function of registers and of that. Where all of it still reads the same, the answer is still the same.

use std::collections::BTreeSet;

use sha2::{Digest as _, Sha256};

use crate::Gpa;
use crate::memory::PAGE;
use crate::plugin::TableConfig;
use crate::table::FaultKind;

/// Most reads of one lookup that are kept.
const MAX_READS: usize = 4096;
/// Most guest pages of one lookup that are kept.
const MAX_PAGES: usize = 4096;

/// One read of a plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Read {
    /// Which of [`Trace::tables`] translated the address, if one did.
    pub(super) through: Option<usize>,
    pub(super) address: u64,
    pub(super) length: u32,
}

/// A table on the way to a structure that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Behind {
    /// Full name of its format.
    pub format: String,
    /// How it failed.
    pub fault: FaultKind,
    /// The level of the last entry that was looked at, as the architecture counts it.
    pub level: Option<i8>,
    /// The structure's address, before the table.
    pub address: u64,
    /// An entry of the table that could not be read: its address.
    pub unreadable: Option<u64>,
    /// The entries of the table that were looked at, from its root.
    pub entries: Vec<u64>,
}

/// Why a plugin did not get what it asked for last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Denied {
    /// There is no memory at this address, or it cannot be read.
    Unreadable(u64),
    /// A table stood before it.
    Behind(Behind),
}

/// What one lookup read of guest memory.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    pub(super) reads: Vec<Read>,
    pub(super) tables: Vec<TableConfig>,
    pages: BTreeSet<u64>,
    /// There was more than is kept.
    cut: bool,
    digest: Sha256,
    pub(super) denied: Option<Denied>,
}

impl Trace {
    /// The guest pages that were read: device structures, and tables that lead to device structures.
    pub fn pages(&self) -> impl Iterator<Item = Gpa> + '_ {
        self.pages.iter().map(|page| Gpa(page * PAGE))
    }

    /// All reads and pages are in it. Of more than 4,096 of either those beyond are missing, and then the trace cannot tell that nothing changed.
    #[must_use]
    pub const fn is_complete(&self) -> bool {
        !self.cut
    }

    /// Whether the same was read, with the same answers; where the last one was none, for the same reason.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        let digest = |trace: &Self| trace.digest.clone().finalize();
        self.is_complete() && other.is_complete() && self.reads == other.reads && self.denied == other.denied && digest(self) == digest(other)
    }

    /// Why the last read gave nothing, if it gave nothing: for the event of a requester that is blocked because of it.
    #[must_use]
    pub const fn denied(&self) -> Option<&Denied> {
        self.denied.as_ref()
    }

    /// A guest page is about to be read.
    pub(super) fn page(&mut self, address: u64) {
        let page = address / PAGE;
        if self.pages.len() < MAX_PAGES {
            self.pages.insert(page);
        } else if !self.pages.contains(&page) {
            self.cut = true;
        }
    }

    /// A plugin asked, and got this.
    pub(super) fn read(&mut self, through: Option<&TableConfig>, address: u64, length: u32, answer: Option<&[u8]>) {
        if self.reads.len() >= MAX_READS {
            self.cut = true;
            return;
        }
        let through = through.map(|table| {
            self.tables.iter().position(|known| known == table).unwrap_or_else(|| {
                self.tables.push(table.clone());
                self.tables.len() - 1
            })
        });
        self.reads.push(Read { through, address, length });
        // The lengths are those of the reads; an answer and none differ in their first byte.
        self.digest.update([u8::from(answer.is_some())]);
        self.digest.update(answer.unwrap_or_default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(reads: &[(u64, Option<&[u8]>)]) -> Trace {
        let mut trace = Trace::default();
        for (address, answer) in reads {
            trace.page(*address);
            trace.read(None, *address, 8, *answer);
        }
        trace
    }

    #[test]
    fn traces_are_the_same_if_all_answers_are() {
        let one = trace(&[(0x1008, Some(&[1; 8])), (0x5000, None)]);
        assert!(one.is_same(&trace(&[(0x1008, Some(&[1; 8])), (0x5000, None)])));
        assert!(!one.is_same(&trace(&[(0x1008, Some(&[2; 8])), (0x5000, None)])));
        assert!(!one.is_same(&trace(&[(0x1008, Some(&[1; 8])), (0x5000, Some(&[0; 8]))])));
        assert!(!one.is_same(&trace(&[(0x1008, Some(&[1; 8])), (0x6000, None)])), "another place");
        assert!(!one.is_same(&trace(&[(0x1008, Some(&[1; 8]))])));
        assert_eq!(one.pages().collect::<Vec<_>>(), [Gpa(0x1000), Gpa(0x5000)]);
    }

    #[test]
    fn a_trace_that_was_cut_is_the_same_as_none() {
        let reads: Vec<(u64, Option<&[u8]>)> = (0..4097).map(|index| (index * 8, None)).collect();
        let cut = trace(&reads);
        assert!(!cut.is_complete() && !cut.is_same(&cut.clone()));
        assert!(trace(&reads[..4096]).is_complete());
    }
}
