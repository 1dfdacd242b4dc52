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
//! # What is missing
//!
//! There is no committer for a real kernel. Memory that comes and goes while an address space lives is not covered. What is refused
//! because the host's table memory is full comes back only when the guest maps it anew. `tests/tests/live/equality.rs` names guests for which the live table
//! differs from a naive walk.

mod areas;
mod changes;
mod live;
mod nested;
mod shadow;
mod sink;
mod stages;

pub use areas::{AreaLimits, Areas, AreasError, AreasFigures, Managed, MapError, Mirror, UnmapError};
pub use changes::{Blocked, Changes, Reason};
pub use live::{Live, LiveError, Report};
pub use nested::{Needed, Nested, NestedFigures, NestedTable, RegionTables, TableMemory};
pub use shadow::{ReopenError, Shadow, ShadowFigures, ShadowLimits, Unwatched, Watcher};
pub use sink::{CommitError, Committer, Sink};
pub use stages::{Space, Way};
