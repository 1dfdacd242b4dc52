//! Where changes go.

use crate::Change;
use crate::sync::nested::Needed;

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
pub trait Sink: Send {
    /// Makes the changes of one batch.
    fn apply(&mut self, batch: &[Change]);

    /// Makes sure that what the batches since the last commit took away is out of use.
    ///
    /// # Errors
    /// The kernel refused. Nothing is lost: what must be invalidated is remembered.
    fn commit(&mut self) -> Result<(), CommitError>;
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
