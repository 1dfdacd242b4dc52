//! What was taken out of a host table, told to the kernel: one call per commit, of entries written by the plugin's recipe.

use std::sync::Arc;

use super::context::Inner;
use super::metrics::{Counter, Counters};
use crate::Span;
use crate::kernel::{Invalidate, InvalidateError, InvalidateTarget, Kernel};
use crate::plugin::recipe::Recipe;
use crate::sync::{CommitError, Committer, Needed};

/// Tells the kernel.
#[derive(Clone, Debug)]
pub(super) struct KernelCommitter {
    kernel: Arc<dyn Kernel>,
    target: InvalidateTarget,
    recipe: Recipe,
    array: Vec<u8>,
    counters: Arc<Counters>,
}

impl KernelCommitter {
    /// Invalidations of `target` by `recipe`, if the kernel knows their type.
    ///
    /// # Errors
    /// It does not, or fails.
    pub(super) fn new(context: &Inner, target: InvalidateTarget, recipe: Recipe) -> Result<Self, InvalidateError> {
        let this = Self { kernel: Arc::clone(context.kernel()), target, recipe, array: Vec::new(), counters: context.counters() };
        // No entry at all asks whether the type is known.
        this.call(&[])?;
        Ok(this)
    }

    /// Of spans that are ascending and do not overlap, and of tables on the way there if `tables`.
    pub(super) fn forget(&mut self, spans: &[Span], tables: bool) -> Result<(), CommitError> {
        let entries = self.recipe.write(spans, tables, &mut self.array);
        tracing::trace!(entries, tables, "invalidate");
        self.counters.add(Counter::InvalidationEntries, entries.into());
        let Err(error) = self.call(&self.array) else { return Ok(()) };
        self.once_more(&error)
    }

    /// All that was cached of the table.
    pub(super) fn forget_everything(&mut self) -> Result<(), CommitError> {
        self.recipe.write_everything(&mut self.array);
        let Err(error) = self.call(&self.array) else { return Ok(()) };
        self.once_more(&error)
    }

    /// Once more, and everything: entries in front of the one that failed are done, and doing them again is no harm.
    fn once_more(&mut self, error: &InvalidateError) -> Result<(), CommitError> {
        tracing::warn!(%error, "an invalidation failed; everything is tried");
        self.counters.add(Counter::InvalidationFailures, 1);
        self.recipe.write_everything(&mut self.array);
        self.call(&self.array).map_err(|error| CommitError(Box::new(error)))
    }

    fn call(&self, entries: &[u8]) -> Result<(), InvalidateError> {
        let (data_type, entry_length) = (self.recipe.data_type, self.recipe.entry_bytes());
        self.kernel.hwpt_invalidate(&Invalidate { target: self.target, data_type, entry_length, entries }).map(drop)
    }
}

impl Committer for KernelCommitter {
    fn invalidate(&mut self, needed: &Needed) -> Result<(), CommitError> {
        self.forget(&needed.spans, needed.tables)
    }
}
