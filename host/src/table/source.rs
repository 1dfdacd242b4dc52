//! A second source beside the walk: mappings that stand in no table, and tell the same visitors the same things.

use std::fmt;

use crate::Span;
use crate::memory::{Budget, MemoryMap};
use crate::table::visit::Visitor;
use crate::table::walk::WalkError;

/// An address space without tables.
///
/// It keeps the promises of [`Table::walk`](crate::table::Table::walk): pieces, holes and faults in ascending order of IOVA; every piece's target in guest
/// memory, and what is not there a fault; each piece charged to the budget. Paths are empty, since there are no entries.
pub trait Source: fmt::Debug + Send + Sync {
    /// Tells `visitor` what is mapped in `span`.
    ///
    /// # Errors
    /// The budget is spent, or the visitor stopped it.
    fn walk(&self, map: &MemoryMap, span: Span, budget: &Budget, visitor: &mut dyn Visitor) -> Result<(), WalkError>;
}
