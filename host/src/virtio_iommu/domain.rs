//! A domain: the mappings that a guest asked for, as it asked for them.
//!
//! A mapping is what one MAP request made, and goes as a whole or not at all (Virtio 1.3 section 5.13.6.6); neighbours are never joined.

use std::collections::BTreeMap;

use crate::Span;
use crate::memory::{Budget, MemoryMap};
use crate::table::{Cause, FaultAt, Piece, Source, Visitor, WalkError};

/// The mappings of a domain, by their first IOVA. None overlap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Domain(BTreeMap<u64, Piece>);

/// A mapping cannot be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// Something is mapped there.
    #[error("{0} overlaps the mapping of {1}")]
    Overlap(Span, Span),
    /// Its addresses go on beyond the last one there is.
    #[error("{0} goes to {1:#x} and on beyond the last address")]
    BeyondAddresses(Span, u64),
    /// The last IOVA is before the first.
    #[error("{0:#x}..={1:#x} is empty")]
    Empty(u64, u64),
}

/// An UNMAP that would leave a part of a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{wanted} cuts the mapping of {mapping}")]
pub struct Split {
    /// What was to be unmapped.
    pub wanted: Span,
    /// A mapping that is only partly in it.
    pub mapping: Span,
}

impl Domain {
    /// Nothing is mapped.
    #[must_use]
    pub const fn new() -> Self {
        Self(BTreeMap::new())
    }

    /// How many mappings there are.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.0.len() as u64
    }

    /// Nothing is mapped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The mappings, ascending.
    pub fn iter(&self) -> impl Iterator<Item = &Piece> {
        self.0.values()
    }

    /// The mapping that `iova` is in.
    #[must_use]
    pub fn find(&self, iova: u64) -> Option<&Piece> {
        self.overlap(Span { first: iova, last: iova })
    }

    /// A mapping that has IOVAs of `span`.
    #[must_use]
    pub fn overlap(&self, span: Span) -> Option<&Piece> {
        // Mappings do not overlap, so that the last one to begin in or before the span is the last one to end.
        self.0.range(..=span.last).next_back().map(|(_, piece)| piece).filter(|piece| piece.iova.last >= span.first)
    }

    /// Adds a mapping.
    ///
    /// # Errors
    /// It is empty, something is mapped there, or its addresses go on beyond the last one; nothing has changed then.
    pub fn map(&mut self, piece: Piece) -> Result<(), MapError> {
        let Span { first, last } = piece.iova;
        if first > last {
            return Err(MapError::Empty(first, last));
        }
        if piece.address.checked_add(last - first).is_none() {
            return Err(MapError::BeyondAddresses(piece.iova, piece.address));
        }
        if let Some(other) = self.overlap(piece.iova) {
            return Err(MapError::Overlap(piece.iova, other.iova));
        }
        self.0.insert(first, piece);
        Ok(())
    }

    /// Removes all mappings in `span`, and tells which, ascending; there may be none.
    ///
    /// # Errors
    /// A mapping is partly in it; nothing has changed then.
    pub fn unmap(&mut self, span: Span, mut removed: impl FnMut(Span)) -> Result<(), Split> {
        if span.first > span.last {
            return Ok(());
        }
        let before = self.0.range(..span.first).next_back().map(|(_, piece)| piece.iova).filter(|iova| iova.last >= span.first);
        let at_end = self.0.range(span.first..=span.last).next_back().map(|(_, piece)| piece.iova).filter(|iova| iova.last > span.last);
        if let Some(mapping) = before.or(at_end) {
            return Err(Split { wanted: span, mapping });
        }
        for (_, piece) in self.0.extract_if(span.first..=span.last, |_, _| true) {
            removed(piece.iova);
        }
        Ok(())
    }

    /// A part of a mapping: what of it is in guest memory, and faults for what is not.
    fn part(piece: &Piece, part: Span, map: &MemoryMap, budget: &Budget, visitor: &mut dyn Visitor) -> Result<(), WalkError> {
        let iova_of = |address: u64| piece.iova.first + (address - piece.address);
        let fault = |first: u64, last: u64| FaultAt {
            stage: 1,
            cause: Cause::OutsideMemory,
            span: Span { first, last },
            address: None,
            reading_table: false,
            path: &[],
        };
        let address_of = |iova: u64| piece.address + (iova - piece.iova.first);
        let wanted = Span { first: address_of(part.first), last: address_of(part.last) };
        let mut next = Some(wanted.first);
        for target in map.targets_within(wanted) {
            if let Some(hole) = next.filter(|hole| *hole < target.first) {
                visitor.fault(&FaultAt { address: Some(hole), ..fault(iova_of(hole), iova_of(target.first) - 1) })?;
            }
            // The first part was paid for with the mapping.
            if next != Some(wanted.first) {
                budget.charge_leaves(1)?;
            }
            let iova = Span { first: iova_of(target.first), last: iova_of(target.last) };
            visitor.piece(&Piece { iova, address: target.first, attributes: piece.attributes }, &[])?;
            next = target.last.checked_add(1);
        }
        match next.filter(|hole| *hole <= wanted.last) {
            Some(hole) => visitor.fault(&FaultAt { address: Some(hole), ..fault(iova_of(hole), part.last) }),
            None => Ok(()),
        }
    }
}

impl Source for Domain {
    fn walk(&self, map: &MemoryMap, span: Span, budget: &Budget, visitor: &mut dyn Visitor) -> Result<(), WalkError> {
        let from = self.find(span.first).map_or(span.first, |piece| piece.iova.first);
        let mut next = Some(span.first);
        for piece in self.0.range(from..=span.last).map(|(_, piece)| piece) {
            let Some(part) = piece.iova.intersection(span) else { continue };
            if let Some(hole) = next.filter(|hole| *hole < part.first) {
                visitor.absent(Span { first: hole, last: part.first - 1 }, &[])?;
            }
            budget.charge_leaves(1)?;
            Self::part(piece, part, map, budget, visitor)?;
            next = part.last.checked_add(1);
        }
        match next.filter(|hole| *hole <= span.last) {
            Some(hole) => visitor.absent(Span { first: hole, last: span.last }, &[]),
            None => Ok(()),
        }
    }
}
