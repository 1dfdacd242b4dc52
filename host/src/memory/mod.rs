//! Guest memory as the engine sees it: a map of what exists, entries read once and atomically, and budgets for all work.

mod atomic;
mod budget;
mod entries;
mod map;
mod marks;

pub(crate) use atomic::GuestEntries;
pub use atomic::Nearby;
#[cfg(all(target_arch = "x86_64", not(miri)))]
pub(crate) use atomic::wide::line as guest_line;
pub use budget::{Budget, Exhausted, Limits};
pub(crate) use entries::Within;
pub use entries::{EntryLayout, EntryMemory, LINE, PAGE, ReadError, VmMemory, read_bytes};
pub use map::{Kind, MemoryMap, MemoryMapError, Region};
pub use marks::{MarkMemory, WriteError};
