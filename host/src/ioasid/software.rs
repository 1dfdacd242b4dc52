//! Lookups in software, as a sink: for device models of the VMM.

use crate::Change;
use crate::lookup::{Limits, Lookup, LookupError, Updater};
use crate::sync::{CommitError, Sink};

/// What emulated devices look up.
#[derive(Debug)]
pub(super) struct Lookups {
    updater: Updater,
    /// Batches of which something did not fit.
    failures: u64,
}

impl Lookups {
    pub(super) fn new(limits: Limits) -> Result<(Self, Lookup), LookupError> {
        let (updater, lookup) = Updater::new(limits)?;
        Ok((Self { updater, failures: 0 }, lookup))
    }

    pub(super) fn lookup(&self) -> Lookup {
        self.updater.lookup()
    }

    pub(super) const fn failures(&self) -> u64 {
        self.failures
    }
}

impl Sink for Lookups {
    fn apply(&mut self, batch: &[Change]) {
        // Whatever was to be unmapped is; what did not fit is not there.
        if let Err(error) = self.updater.apply(batch) {
            tracing::debug!(%error, "a software lookup lacks mappings");
            self.failures += 1;
        }
    }

    fn commit(&mut self) -> Result<(), CommitError> {
        Ok(())
    }
}
