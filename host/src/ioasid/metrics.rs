//! Counters, with the feature `metrics`; without it nothing is counted, and nothing costs anything.

use std::sync::Arc;
#[cfg(feature = "metrics")]
use std::sync::atomic::{AtomicU64, Ordering};

use super::Strategy;
use crate::kernel::Kernel;

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(feature = "metrics"), allow(dead_code))]
pub(super) enum Counter {
    KernelCalls,
    Native,
    Nested,
    Areas,
    Changes,
    Blocked,
    Invalidations,
    InvalidationEntries,
    InvalidationFailures,
    Detached,
    Faults,
    /// Those for what is gone.
    Questions,
}

#[cfg(feature = "metrics")]
const COUNTERS: usize = Counter::Questions as usize + 1;

impl Counter {
    /// What became of a path.
    pub(super) const fn of(strategy: Strategy) -> Self {
        match strategy {
            Strategy::Native => Self::Native,
            Strategy::Nested => Self::Nested,
            Strategy::Areas | Strategy::Software => Self::Areas,
        }
    }
}

/// The counters of a context.
#[derive(Debug, Default)]
pub(super) struct Counters {
    #[cfg(feature = "metrics")]
    values: [AtomicU64; COUNTERS],
}

#[cfg(not(feature = "metrics"))]
impl Counters {
    /// The kernel, as it is.
    pub(super) fn watch(kernel: Arc<dyn Kernel>) -> (Arc<dyn Kernel>, Arc<Self>) {
        (kernel, Arc::default())
    }

    #[allow(clippy::unused_self)]
    pub(super) const fn add(&self, _: Counter, _: u64) {}
}

#[cfg(feature = "metrics")]
pub use counted::Metrics;

#[cfg(feature = "metrics")]
mod counted {
    use super::{Arc, AtomicU64, Counter, Counters, Kernel, Ordering};
    use crate::ioasid::Stats;
    use crate::kernel::Before;

    /// What a context has counted since it was made, and what its IOASIDs hold.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Metrics {
        /// Calls of the kernel.
        pub kernel_calls: u64,
        /// Units that walk a guest's table as it is.
        pub native: u64,
        /// Host tables that were made.
        pub nested: u64,
        /// Address spaces of the kernel's that were given to a unit.
        pub areas: u64,
        /// Pieces that were mapped or unmapped because guests' tables changed.
        pub changes: u64,
        /// Entries that were not followed, because a budget was spent or a format failed.
        pub blocked: u64,
        /// Commands of guests.
        pub invalidations: u64,
        /// Entries of invalidation arrays that the kernel was given.
        pub invalidation_entries: u64,
        /// Arrays that it did not take to the end.
        pub invalidation_failures: u64,
        /// Devices and PASIDs that were detached for that.
        pub detached: u64,
        /// Faults: recoverable ones that the kernel was asked for, those that [`Ioasid::fault`](crate::ioasid::Ioasid::fault) was told, and what
        /// [`Context::host_events`](crate::ioasid::Context::host_events) read.
        pub faults: u64,
        /// IOASIDs.
        pub ioasids: u64,
        /// Questions that formats were asked to follow guests' tables, and to make host tables.
        pub questions: u64,
        /// Patterns of guests' entries whose meaning is remembered: such entries cost no question.
        pub patterns: u64,
        /// Spans in which pieces are not mapped because a host's format failed: it is asked again with each operation.
        pub unanswered: u64,
        /// Leaves of guests that are followed.
        pub leaves: u64,
        /// Bytes of guest memory that count as pinned.
        pub pinned_bytes: u64,
        /// Bytes that may be.
        pub pinned_limit: u64,
        /// Bytes of memory for host tables.
        pub table_bytes: u64,
    }

    impl Counters {
        /// The kernel, with its calls counted.
        pub(in super::super) fn watch(kernel: Arc<dyn Kernel>) -> (Arc<dyn Kernel>, Arc<Self>) {
            let counters = Arc::<Self>::default();
            (Arc::new(Counted { kernel, counters: Arc::clone(&counters) }), counters)
        }

        pub(in super::super) fn add(&self, counter: Counter, by: u64) {
            self.values[counter as usize].fetch_add(by, Ordering::Relaxed);
        }

        pub(in super::super) fn metrics(&self, stats: &[Stats], (pinned_bytes, pinned_limit): (u64, u64), table_bytes: u64) -> Metrics {
            let of = |counter: Counter| self.values.get(counter as usize).map_or(0, |value: &AtomicU64| value.load(Ordering::Relaxed));
            Metrics {
                kernel_calls: of(Counter::KernelCalls),
                native: of(Counter::Native),
                nested: of(Counter::Nested),
                areas: of(Counter::Areas),
                changes: of(Counter::Changes),
                blocked: of(Counter::Blocked),
                invalidations: of(Counter::Invalidations),
                invalidation_entries: of(Counter::InvalidationEntries),
                invalidation_failures: of(Counter::InvalidationFailures),
                detached: of(Counter::Detached),
                faults: of(Counter::Faults),
                ioasids: stats.len() as u64,
                questions: of(Counter::Questions) + stats.iter().map(|stats| stats.questions).sum::<u64>(),
                patterns: stats.iter().map(|stats| stats.patterns).sum(),
                unanswered: stats.iter().map(|stats| stats.unanswered).sum(),
                leaves: stats.iter().map(|stats| stats.leaves).sum(),
                pinned_bytes,
                pinned_limit,
                table_bytes,
            }
        }
    }

    /// A kernel whose calls are counted.
    #[derive(Debug)]
    struct Counted {
        kernel: Arc<dyn Kernel>,
        counters: Arc<Counters>,
    }

    impl Before for Counted {
        fn behind(&self) -> &dyn Kernel {
            &*self.kernel
        }

        fn passes(&self) {
            self.counters.add(Counter::KernelCalls, 1);
        }
    }
}
