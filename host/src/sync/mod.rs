//! Address spaces that stay in step with a running guest.
//!
//! ```text
//!   guest's tables --- Space -----> Changes -----> Sink -------> host
//!        |               ^  what differs   one batch   |  nested: a table of any format, in memory that hardware reads
//!        |               |                             |  areas: what the kernel maps and unmaps
//!        |               |                             |  lookups in software
//!   invalidations, written pages                       +--> Committer: what the kernel must be told, once per batch
//! ```
//!
//! A [`Space`] is what a requester's DMA gets: nothing, windows, one table or two, and addresses that something else serves; it may become another of these
//! at any moment. A [`Shadow`] is what was seen of one table. [`Live`] joins a space and a sink. When one of its calls returns, no translation that the guest
//! removed is in the host's table, and none is in the hardware's caches if the committer kept its promise.
//!
//! What the host has no memory for is remembered, and offered again when there is some ([`Sink::wants`]). What hardware marks in the host's entries is written
//! back into the guest's, or told as a log of writes ([`Live::write_marks`], [`Live::dirty`]). Guest memory may come and go ([`Live::memory_changed`]).
//!
//! # What is missing
//!
//! Entries that are blocked are judged again only when they are read; nobody reads them because a limit is not reached any longer. Marks are not written at the
//! moment of the access but when [`Live::write_marks`] is called.

mod areas;
mod changes;
mod live;
mod marks;
mod nested;
mod pages;
mod shadow;
mod sink;
mod spans;
mod stages;
mod wanted;

pub use areas::{AreaLimits, Areas, AreasError, AreasFigures};
pub use changes::{Blocked, Changes, Reason};
pub use live::{Live, LiveError, ReplaceError, Report};
pub use marks::{DirtyError, Marked, MarksWritten};
pub(crate) use marks::{MOST_PAGES, pages_of, set as set_bits};
pub use nested::{Needed, Nested, NestedFigures, NestedTable, RegionTables, TableMemory};
pub(crate) use pages::{PageSet, runs};
pub use shadow::{ReopenError, Shadow, ShadowFigures, ShadowLimits, Unwatched, Watcher};
pub use sink::{CommitError, Committer, Sink};
pub(crate) use spans::Spans;
pub use stages::{Space, Way};
