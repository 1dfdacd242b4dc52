//! One look at a guest: what it reads with, what it may cost, and what it tells.

use crate::address::cut;
use crate::memory::Budget;
use crate::sync::changes::{Changes, Reason};
use crate::sync::stages::told::Told;
use crate::table::{Compared, FaultAt, Intercept, Intercepted, Piece, Step, Visitor, WalkError};
use crate::{Change, Span};

/// How many tables an address has passed, and which side of a piece it is then.
pub(super) type Rules = [(u8, Compared)];

/// What a look needs.
pub(super) struct Look<'a, M: ?Sized> {
    pub(super) memory: &'a M,
    pub(super) budget: &'a Budget,
    pub(super) changes: &'a mut Changes,
    pub(super) told: &'a mut Told,
    pub(super) intercepts: &'a [Intercept],
    /// The IOVAs that are intercepted, if nothing else is and there is one table.
    pub(super) holes: Option<&'a [Span]>,
    /// Pieces that may be told.
    pub(super) most: u64,
    /// One table's changes go straight on: at most IOVAs are intercepted, and nobody compares with what was told.
    pub(super) straight: bool,
    /// One thing takes another's place: what a table says now and said before is compared byte by byte, whatever became of the entries.
    pub(super) switching: bool,
}

impl<M: ?Sized> Look<'_, M> {
    /// Whether a piece that a table's batch maps is to be told although it may be as it was: the batch unmaps it as well, so that the guest took a mark away, and
    /// wants to know of the next use.
    pub(super) fn is_anew(&self, batch: &[Change], piece: &Piece) -> bool {
        let unmaps = batch.partition_point(|change| matches!(change, Change::Unmap(_)));
        !self.switching && batch[..unmaps].binary_search_by_key(&piece.iova, Change::span).is_ok()
    }

    /// Tells the parts of a piece that nothing intercepts and that were not told before. False: not all of them, there is no room.
    pub(super) fn tell(&mut self, piece: &Piece, rules: &Rules, anew: bool) -> bool {
        let mut teller = Teller { told: self.told, most: self.most, next: piece.iova.first, anew };
        let result = if self.intercepts.is_empty() {
            teller.piece(piece, &[])
        } else if let Some(holes) = self.holes {
            // There are few of them: the parts need no budget.
            cut(holes, piece.iova).filter(|(outside, _)| *outside).try_for_each(|(_, part)| teller.piece(&piece.part(part), &[]))
        } else {
            Intercepted { intercepts: self.intercepts, rules, tables: 2, budget: self.budget, visitor: &mut teller }.piece(piece, &[])
        };
        let next = teller.next;
        if result.is_err() {
            self.changes.block(Span { first: next, last: piece.iova.last }, Reason::Leaves);
        }
        result.is_ok()
    }
}

/// Adds pieces to what is told, up to a limit.
pub(super) struct Teller<'a> {
    pub(super) told: &'a mut Told,
    pub(super) most: u64,
    /// The first IOVA that was not decided on.
    pub(super) next: u64,
    pub(super) anew: bool,
}

impl Visitor for Teller<'_> {
    fn piece(&mut self, piece: &Piece, _: &[Step]) -> Result<(), WalkError> {
        if !self.told.has(piece.iova.first) {
            if self.told.len() >= self.most {
                return Err(WalkError::Stopped);
            }
            self.told.add(*piece, self.anew);
        }
        self.next = piece.iova.last.saturating_add(1);
        Ok(())
    }

    fn fault(&mut self, fault: &FaultAt<'_>) -> Result<(), WalkError> {
        self.next = fault.span.last.saturating_add(1);
        Ok(())
    }
}
