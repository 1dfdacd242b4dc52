//! Tables that are judged and rewritten in one pass.
//!
//! Most tables are like the one before: the same kinds of leaves, perhaps with gaps. Entries of such a table are compared with what is expected and written to
//! where they will probably be needed at the same time, past the cache. If any entry is not as expected, what was written is nothing, and the entries are looked
//! at as always.

use crate::Span;
use crate::memory::GuestEntries;
use crate::table::recode::{Expected, Form, Group, Judged, Onto, Passed, merge, recode_expected, recode_guests, recode_sparse};

/// So many bytes of the next table are asked for early. The processor sees by itself how a table goes on; what it does not see is where it starts.
pub(super) const START: u64 = 1024;

/// A table that does not follow in memory is asked for in three parts: where the first ends, in eighths of its bytes,
pub(super) const FIRST: u64 = 2;

/// where the second does,
pub(super) const SECOND: u64 = 5;

/// and the third.
pub(super) const ALL: u64 = 8;

/// Fewer entries than this are not worth a try.
pub(super) const FEWEST: usize = 64;

/// What the leaves of a table were like.
#[derive(Clone, Copy)]
pub(super) struct Usual {
    pub(super) level: u8,
    pub(super) inherited: u64,
    pub(super) shape: Option<u8>,
    pub(super) expected: Expected,
    pub(super) within: Span,
}

/// Tables that were not like the last: the more of them in a row, the more are not tried.
#[derive(Clone, Copy, Default)]
pub(super) struct Misses {
    in_a_row: u32,
    skip: u32,
}

impl Misses {
    pub(super) fn miss(&mut self) {
        self.in_a_row = (self.in_a_row + 1).min(6);
        self.skip = (1 << self.in_a_row) - 2;
    }

    /// Whether the next table is not tried.
    pub(super) const fn are_skipped(&self) -> bool {
        self.skip > 0
    }

    pub(super) fn skips(&mut self) -> bool {
        let skips = self.are_skipped();
        self.skip = self.skip.saturating_sub(1);
        skips
    }
}

/// What is to become of entries, and where it is written.
#[derive(Debug)]
pub struct Receiver<'a> {
    pub(super) form: Form<'a>,
    /// The words of a table, and the slot in it for the first entry.
    pub(super) table: &'a mut [u64],
    pub(super) slot: usize,
    /// So many entries, not more, have a place there.
    pub(super) count: usize,
    /// Several of them become one.
    pub(super) merging: Option<Merged<'a>>,
    /// If the entries are all of a table: which of its lines may hold something. The others are absent entries already.
    pub(super) written: Option<&'a mut u64>,
}

/// How entries become fewer.
#[derive(Debug)]
pub struct Merged<'a> {
    pub(super) group: &'a Group,
    /// Bytes of a page that follow those of its first leaf.
    pub(super) more: u64,
    /// Where the first leaf of each page is put.
    pub(super) firsts: &'a mut Vec<u64>,
}

/// Entries that are read, and what is to become of them if all are as usual.
#[derive(Debug)]
pub struct Passing<'a, 'b> {
    receiver: &'a mut Receiver<'b>,
    expected: &'a Expected,
    /// So many entries, not more and not fewer.
    count: usize,
    /// What they turned out to be, once they were written.
    pub(super) judged: Option<Judged>,
}

impl<'a, 'b> Passing<'a, 'b> {
    /// None: such entries are read first.
    pub(super) fn new(receiver: &'a mut Receiver<'b>, usual: &'a Usual, count: usize) -> Option<Self> {
        let is_plain = receiver.merging.is_none();
        is_plain.then_some(Self { receiver, expected: &usual.expected, count, judged: None })
    }

    /// Reads a guest's entries, each once, into as many of the reader's, and writes what becomes of them. False: this cannot be done, and nothing was read. All of
    /// the entries are read at once, or none in this way.
    #[inline]
    pub(crate) fn read(&mut self, from: &GuestEntries<'_>, entries: &mut [u64]) -> bool {
        if entries.len() != self.count || self.judged.is_some() {
            self.judged = Some(Judged::UNLIKE);
            return false;
        }
        let Receiver { form, table, slot, written, .. } = &mut *self.receiver;
        let onto = match written.as_deref_mut() {
            Some(written) => Onto::Sparse(table, written),
            None => Onto::Slots(table, *slot),
        };
        self.judged = recode_guests(from, entries, self.expected, onto, form);
        self.judged.is_some()
    }
}

impl Receiver<'_> {
    /// Writes what becomes of `entries` if all of them are as usual. None: this processor cannot do it, or not with these.
    #[inline]
    pub(super) fn pass(&mut self, entries: &[u64], usual: &Usual) -> Option<Judged> {
        let Some(Merged { group, more, firsts }) = &mut self.merging else {
            return match self.written.as_deref_mut() {
                Some(written) => recode_sparse(entries, &usual.expected, self.table, written, &self.form),
                None => recode_expected(entries, &usual.expected, self.table, self.slot, &self.form),
            };
        };
        if !merge(entries, usual.expected.pattern.kinds, group, firsts) {
            return Some(Judged::UNLIKE);
        }
        let expected = Expected { room: usual.expected.room.checked_sub(*more)?, ..usual.expected };
        let judged = recode_expected(firsts, &expected, self.table, self.slot, &self.form)?;
        let times = group.len() as u64;
        let all = |Passed { others, gaps }| Judged::alike(Passed { others: others * times, gaps: gaps * times });
        Some(judged.passed().map_or(Judged::UNLIKE, all))
    }
}
