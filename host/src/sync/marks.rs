//! Accessed and dirty marks on their way back: from the entries that hardware walks to the guest's, and to whoever migrates the guest.
//!
//! A guest entry that is *writable when dirty* is clean, and the guest wants to know of the first write. Where the host's format has such leaves, the host's is
//! clean as well, and hardware marks it; [`Live::write_marks`] then marks the guest's. Where it has not, the host's leaf is writable and counts as written from
//! the moment that it is mapped: the guest is told of a write too many, never of one too few. The same goes for entries that nobody has accessed, and the first
//! access; one that the guest has marked itself is mapped as accessed, so that hardware need not write.
//!
//! What hardware would do at once happens here when the VMM calls. A guest that takes an entry away, and looks at the mark in what it took, may miss an access since
//! the last call; so may one that changes what an entry above others allows, or where a second stage has their pages, of those others. Where that must not be,
//! [`Live::mark_all`] marks entries before they are used. Requests that are refused mark nothing.

use crate::memory::{Budget, Limits, MarkMemory, PAGE};
use crate::sync::live::{Live, LiveError};
use crate::sync::sink::{CommitError, Sink};
use crate::{Change, Span};

/// What hardware did through a leaf of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marked {
    /// The leaf's IOVAs.
    pub iova: Span,
    /// It was used.
    pub accessed: bool,
    /// It was used for writing.
    pub dirty: bool,
}

/// What was written into a guest's tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MarksWritten {
    /// Leaves that were marked as accessed.
    pub accessed: u64,
    /// Leaves that were marked as dirty.
    pub dirty: u64,
    /// Entries that point to tables and were marked as accessed.
    pub tables: u64,
    /// Entries of any kind that were marked for what devices did through host tables that are gone.
    pub earlier: u64,
    /// Entries that were left alone, because the guest has changed them and they have not been looked at since, or because they cannot be written.
    pub skipped: u64,
}

impl MarksWritten {
    /// Adds what was written elsewhere.
    pub(crate) const fn add(&mut self, other: Self) {
        self.accessed += other.accessed;
        self.dirty += other.dirty;
        self.tables += other.tables;
        self.earlier += other.earlier;
        self.skipped += other.skipped;
    }
}

/// A log of writes cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DirtyError {
    /// Nobody records: [`Live::track_dirty`] was not called, or the host's format has no mark for it.
    #[error("writes are not tracked")]
    NotTracked,
    /// Too much at once.
    #[error("{0} has more than the {most} pages that are told at once, or ends before it begins", most = MOST_PAGES)]
    TooLarge(Span),
    /// The marks were taken away, and caches may not know it. The log was taken as well: all of the span must count as written.
    #[error(transparent)]
    Commit(#[from] CommitError),
}

/// Pages of one log: a bitmap of 128 MiB.
pub(crate) const MOST_PAGES: u64 = 1 << 30;

/// Pieces that are mapped anew at once.
const CHUNK: usize = 4096;

impl<S: Sink> Live<S> {
    /// Looks which leaves for IOVAs of `span` hardware marked, and marks the guest's entries: as accessed and as dirty, each where the guest's configuration
    /// promises that hardware does, and dirty only where the entry is clean and waits for it. Before a leaf, the entries that lead to it are marked as accessed, where
    /// hardware marks those as well. Each entry is changed as hardware changes it, with one compare-exchange; one that the guest has changed meanwhile is left alone.
    ///
    /// Where the guest takes the mark of an entry back that points to a table, and not those of the leaves below, the next call sets it again, whether any of these was
    /// used since or not.
    pub fn write_marks<M: MarkMemory + ?Sized>(&mut self, memory: &M, span: Span) -> MarksWritten {
        let budget = Budget::new(Limits { questions: self.questions, ..Limits::default() });
        let (space, mut written) = (&mut self.space, MarksWritten::default());
        if space.has_marks() {
            self.sink.marks(span, &mut |marked| space.mark(memory, marked, &budget, &mut written));
        }
        written
    }

    /// The same of leaves that another sink has or had: one whose place was taken ([`Live::replace_sink`]), once no device uses it any more.
    pub fn write_marks_of<M: MarkMemory + ?Sized>(&mut self, sink: &(impl Sink + ?Sized), memory: &M, span: Span) -> MarksWritten {
        let budget = Budget::new(Limits { questions: self.questions, ..Limits::default() });
        let (space, mut written) = (&mut self.space, MarksWritten::default());
        if space.has_marks() {
            sink.marks(span, &mut |marked| space.mark(memory, marked, &budget, &mut written));
        }
        written
    }

    /// The same as if hardware had marked all leaves for IOVAs of `span`, whether it did or not.
    pub fn mark_all<M: MarkMemory + ?Sized>(&mut self, memory: &M, span: Span) -> MarksWritten {
        self.mark(memory, &[Marked { iova: span, accessed: true, dirty: true }])
    }

    /// The same of leaves that are gone, as whoever had them tells.
    pub fn mark<M: MarkMemory + ?Sized>(&mut self, memory: &M, gone: &[Marked]) -> MarksWritten {
        let budget = Budget::new(Limits { questions: self.questions, ..Limits::default() });
        let mut written = MarksWritten::default();
        gone.iter().for_each(|marked| self.space.mark(memory, *marked, &budget, &mut written));
        written
    }

    /// Begins or ends to record which guest memory is written: maps everything anew, so that hardware marks the first write through each leaf. Translations stay
    /// what they are all the while. False: the host cannot.
    ///
    /// # Errors
    /// [`LiveError::Commit`].
    pub fn track_dirty(&mut self, on: bool) -> Result<bool, LiveError> {
        let before = std::mem::replace(&mut self.tracks_dirty, false);
        if !on && !before || !self.sink.track_dirty(on) {
            return Ok(!on);
        }
        self.tracks_dirty = on;
        let (sink, mut pieces) = (&mut self.sink, Vec::new());
        let mut anew = |pieces: &mut Vec<crate::table::Piece>| {
            let unmaps = pieces.iter().map(|piece| Change::Unmap(piece.iova));
            let batch: Vec<Change> = unmaps.chain(pieces.iter().map(|piece| Change::Map(*piece))).collect();
            sink.remap(&batch);
            pieces.clear();
        };
        self.space.pieces(Span::ALL, &mut |piece| {
            pieces.push(piece);
            if pieces.len() == CHUNK {
                anew(&mut pieces);
            }
        });
        if !pieces.is_empty() {
            anew(&mut pieces);
        }
        self.sink.commit()?;
        Ok(true)
    }

    /// Which pages of guest memory at `targets` devices may have written since the last call that cleared them, or since [`Live::track_dirty`]. Bit `n % 64` of
    /// word `n / 64` is the `n`th page of 4 KiB, counted from the page of the first address. With `clear` they are forgotten; a write after the call is told by
    /// the next one.
    ///
    /// Where a leaf is larger than a page, all of its pages are told. All leaves of the host are looked at, whatever the span.
    ///
    /// # Errors
    /// [`DirtyError`].
    pub fn dirty(&mut self, targets: Span, clear: bool) -> Result<Vec<u64>, DirtyError> {
        if !self.tracks_dirty {
            return Err(DirtyError::NotTracked);
        }
        let first = targets.first / PAGE;
        let pages = pages_of(targets).ok_or(DirtyError::TooLarge(targets))?;
        let mut bitmap = vec![0; pages.div_ceil(64) as usize];
        self.each_dirty(targets, clear, &mut |span| set(&mut bitmap, span.first / PAGE - first, span.last / PAGE - first))?;
        Ok(bitmap)
    }

    /// The same as spans of guest memory, in any order and perhaps more than once, for any number of pages.
    ///
    /// # Errors
    /// [`DirtyError`]; after [`DirtyError::Commit`] what was told up to then is forgotten.
    pub fn each_dirty(&mut self, targets: Span, clear: bool, each: &mut dyn FnMut(Span)) -> Result<(), DirtyError> {
        if !self.tracks_dirty {
            return Err(DirtyError::NotTracked);
        }
        self.sink.dirty(targets, clear, each);
        if clear {
            self.sink.commit()?;
        }
        Ok(())
    }
}

/// How many pages a span is in; none if these are more than are told at once, or it is none.
pub(crate) fn pages_of(targets: Span) -> Option<u64> {
    let pages = (targets.last / PAGE).checked_sub(targets.first / PAGE)? + 1;
    (!targets.is_none() && pages <= MOST_PAGES).then_some(pages)
}

/// Sets the bits `first..=last`.
pub(crate) fn set(bitmap: &mut [u64], first: u64, last: u64) {
    for word in first / 64..=last / 64 {
        let low = if word == first / 64 { first % 64 } else { 0 };
        let high = if word == last / 64 { last % 64 } else { 63 };
        if let Some(word) = bitmap.get_mut(word as usize) {
            *word |= u64::MAX >> (63 - high) & u64::MAX << low;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_of_pages() {
        let mut bitmap = [0; 3];
        set(&mut bitmap, 3, 3);
        set(&mut bitmap, 62, 130);
        assert_eq!(bitmap, [1 << 3 | 3 << 62, u64::MAX, 0b111]);
        set(&mut bitmap, 0, 191);
        assert_eq!(bitmap, [u64::MAX; 3]);
    }
}
