//! Lookups in software, as a sink: for device models of the VMM.

use crate::lookup::{Limits, Lookup, LookupError, Updater};
use crate::sync::{CommitError, Sink, Spans};
use crate::{Change, Span};

/// What emulated devices look up.
#[derive(Debug)]
pub(super) struct Lookups {
    updater: Updater,
    /// Batches of which something did not fit.
    failures: u64,
    /// Where pieces may be missing, because something did not fit.
    missing: Spans,
    /// Bytes that were in use when that was so last: with fewer there is room for something.
    full: u64,
}

impl Lookups {
    pub(super) fn new(limits: Limits) -> Result<(Self, Lookup), LookupError> {
        let (updater, lookup) = Updater::new(limits)?;
        Ok((Self { updater, failures: 0, missing: Spans::default(), full: 0 }, lookup))
    }

    pub(super) fn lookup(&self) -> Lookup {
        self.updater.lookup()
    }

    pub(super) const fn failures(&self) -> u64 {
        self.failures
    }

    /// Pieces may be missing.
    pub(super) fn is_short(&self) -> bool {
        !self.missing.as_slice().is_empty()
    }

    /// Whatever was to be unmapped is; what did not fit is not there, and false.
    fn take(&mut self, batch: &[Change]) -> bool {
        let Err(error) = self.updater.apply(batch) else { return true };
        tracing::debug!(%error, "a software lookup lacks mappings");
        self.failures += 1;
        self.updater.missing().iter().for_each(|span| self.missing.add(*span));
        false
    }
}

impl Sink for Lookups {
    fn apply(&mut self, batch: &[Change]) {
        let before = self.updater.bytes();
        if !self.take(batch) {
            // What this batch gave back may be used by the next one.
            self.full = before.max(self.updater.bytes());
        }
    }

    fn commit(&mut self) -> Result<(), CommitError> {
        Ok(())
    }

    fn wants(&self) -> Option<Span> {
        self.missing.as_slice().first().copied().filter(|_| self.updater.bytes() < self.full)
    }

    fn offer(&mut self, span: Span, pieces: &[Change]) {
        self.missing.remove(span);
        let within = |change: &Change| match change {
            Change::Map(piece) => piece.within(span).map(Change::Map),
            Change::Unmap(_) => None,
        };
        let pieces: Vec<Change> = pieces.iter().filter_map(within).collect();
        if !self.take(&pieces) {
            self.full = self.updater.bytes();
        }
    }
}
