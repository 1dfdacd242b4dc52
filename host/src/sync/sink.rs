//! Where changes go.

use crate::sync::marks::Marked;
use crate::sync::nested::Needed;
use crate::{Change, Span};

/// A host's side of one address space, kept in step by whoever finds the changes.
///
/// # Who calls
///
/// One caller at a time. For each batch [`Sink::apply`] once, then [`Sink::commit`] once; if that fails, `commit` again until it succeeds or the sink is
/// dropped. Further batches may be applied in between.
///
/// # What the caller promises
///
/// A batch is as [`Change`] says: unmaps first, each exactly one piece that was mapped by an earlier batch; then maps, of IOVAs at which nothing is mapped
/// after those unmaps; both in ascending order. An address that a piece maps to is in the guest's memory.
///
/// # What a sink promises
///
/// * A byte whose translation is the same before and after a batch, unmapped and mapped again included, translates all the while (*hitless*).
/// * A byte that is translated differently after a batch is translated in the old way, in the new one, or not at all, while `apply` runs.
/// * When `apply` returns, the new translations are live, and whoever looks for the first time finds no old one.
/// * When `commit` returns without an error, nobody uses an old one any more, whatever was cached; whatever was only needed for them is free.
/// * What cannot be said in the host is not mapped, and counted. Nothing is ever allowed that the piece does not allow.
/// * After an error of `commit`, old translations may still be in caches. A caller that cannot try again must block the device.
///
/// # What there was no room for
///
/// A sink that could not take in pieces for want of room, and has room now, says so in [`Sink::wants`]. Its caller asks after each commit, offers the pieces
/// again, asks again, and commits once more when no more is wanted.
pub trait Sink: Send {
    /// Makes the changes of one batch.
    fn apply(&mut self, batch: &[Change]);

    /// Makes sure that what the batches since the last commit took away is out of use.
    ///
    /// # Errors
    /// The kernel refused. Nothing is lost: what must be invalidated is remembered.
    fn commit(&mut self) -> Result<(), CommitError>;

    /// IOVAs at which pieces of earlier batches may be missing, and could be taken in now. None: there is nothing to offer.
    fn wants(&self) -> Option<Span> {
        None
    }

    /// Pieces are missing that nothing but another try brings: there was no memory for them, or a host's format failed.
    fn lacks(&self) -> bool {
        false
    }

    /// Pieces that are mapped, offered again: all those at IOVAs of `span`, which is what was wanted or its beginning. All are maps, in ascending order; those
    /// that are shown already stay as they are. Afterwards `span` is wanted again only when something changes: what is still missing there is remembered.
    fn offer(&mut self, span: Span, pieces: &[Change]) {
        let _ = (span, pieces);
    }

    /// As [`Sink::apply`], for a batch that the guest did not cause: of a piece that is unmapped and mapped again, the marks are kept.
    fn remap(&mut self, batch: &[Change]) {
        self.apply(batch);
    }

    /// Tells which leaves for IOVAs of `span` hardware has marked, in ascending order; the first and the last may reach beyond it. What hardware does not mark counts as
    /// marked. A mark stays told until the guest's entry changes.
    fn marks(&self, span: Span, each: &mut dyn FnMut(Marked)) {
        each(Marked { iova: span, accessed: true, dirty: true });
    }

    /// Begins or ends to record writes. The caller maps everything anew afterwards; what was written before then may be lost. False: this cannot be done.
    fn track_dirty(&mut self, on: bool) -> bool {
        let _ = on;
        false
    }

    /// Tells which guest-physical addresses in `targets` were written since writes are recorded, in any order and perhaps more than once. With `clear` they are
    /// forgotten; after the next [`Sink::commit`] a further write is recorded again.
    fn dirty(&mut self, targets: Span, clear: bool, each: &mut dyn FnMut(Span)) {
        let _ = clear;
        each(targets);
    }
}

impl<S: Sink + ?Sized> Sink for Box<S> {
    fn apply(&mut self, batch: &[Change]) {
        (**self).apply(batch);
    }

    fn commit(&mut self) -> Result<(), CommitError> {
        (**self).commit()
    }

    fn wants(&self) -> Option<Span> {
        (**self).wants()
    }

    fn lacks(&self) -> bool {
        (**self).lacks()
    }

    fn offer(&mut self, span: Span, pieces: &[Change]) {
        (**self).offer(span, pieces);
    }

    fn remap(&mut self, batch: &[Change]) {
        (**self).remap(batch);
    }

    fn marks(&self, span: Span, each: &mut dyn FnMut(Marked)) {
        (**self).marks(span, each);
    }

    fn track_dirty(&mut self, on: bool) -> bool {
        (**self).track_dirty(on)
    }

    fn dirty(&mut self, targets: Span, clear: bool, each: &mut dyn FnMut(Span)) {
        (**self).dirty(targets, clear, each);
    }
}

/// A commit failed.
#[derive(Debug, thiserror::Error)]
#[error("the host's caches could not be invalidated: {0}")]
pub struct CommitError(#[source] pub Box<dyn std::error::Error + Send + Sync>);

/// Drops what hardware has cached of a host table: for a nested one, a call of [`Kernel::hwpt_invalidate`](crate::kernel::Kernel::hwpt_invalidate).
pub trait Committer: Send {
    /// Returns when no DMA uses what `needed` covers any more. Called at most once per commit, and not if nothing is needed.
    ///
    /// # Errors
    /// The kernel refused; it is called again with at least as much.
    fn invalidate(&mut self, needed: &Needed) -> Result<(), CommitError>;
}
