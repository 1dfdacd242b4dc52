//! Address spaces without tables: windows of IOVAs that go to guest memory at an offset.

use crate::memory::{Budget, MemoryMap};
use crate::table::leaves::Piece;
use crate::table::source::Source;
use crate::table::visit::{Cause, FaultAt, Visitor};
use crate::table::walk::WalkError;
use crate::{Attributes, Span};

/// IOVAs that go to guest-physical memory without any table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Window {
    /// The IOVAs.
    pub iova: Span,
    /// Where the first of them goes; the others follow.
    pub address: u64,
    /// What is allowed.
    pub attributes: Attributes,
}

/// Windows, sorted and not overlapping.
#[derive(Debug)]
pub(super) struct Windows(pub(super) Vec<Window>);

impl Source for Windows {
    fn walk(&self, map: &MemoryMap, span: Span, budget: &Budget, visitor: &mut dyn Visitor) -> Result<(), WalkError> {
        let mut next = Some(span.first);
        for window in &self.0 {
            let Some(part) = window.iova.intersection(span) else { continue };
            if let Some(first) = next.filter(|first| *first < part.first) {
                visitor.absent(Span { first, last: part.first - 1 }, &[])?;
            }
            show(window, part, map, budget, visitor)?;
            next = part.last.checked_add(1);
        }
        match next {
            Some(first) if first <= span.last => visitor.absent(Span { first, last: span.last }, &[]),
            _ => Ok(()),
        }
    }
}

/// The part of a window that is wanted.
fn show(window: &Window, part: Span, map: &MemoryMap, budget: &Budget, visitor: &mut dyn Visitor) -> Result<(), WalkError> {
    // No address overflows: windows are checked when they arrive.
    let address = |iova: u64| window.address.wrapping_add(iova - window.iova.first);
    let iova = |address: u64| window.iova.first.wrapping_add(address.wrapping_sub(window.address));
    let wanted = Span { first: address(part.first), last: address(part.last) };
    let outside = |first: u64, last: u64, visitor: &mut dyn Visitor| {
        let span = Span { first: iova(first), last: iova(last) };
        visitor.fault(&FaultAt { stage: 1, cause: Cause::OutsideMemory, span, address: Some(first), reading_table: false, path: &[] })
    };
    let mut next = Some(wanted.first);
    for target in map.targets_within(wanted) {
        if let Some(hole) = next.filter(|hole| *hole < target.first) {
            outside(hole, target.first - 1, visitor)?;
        }
        budget.charge_leaves(1)?;
        let span = Span { first: iova(target.first), last: iova(target.last) };
        visitor.piece(&Piece { iova: span, address: target.first, attributes: window.attributes }, &[])?;
        next = target.last.checked_add(1);
    }
    match next {
        Some(hole) if hole <= wanted.last => outside(hole, wanted.last, visitor),
        _ => Ok(()),
    }
}
