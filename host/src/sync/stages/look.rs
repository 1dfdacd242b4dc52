//! One look at a guest: what it reads with, what it may cost, and what it tells.

use crate::Span;
use crate::memory::Budget;
use crate::sync::changes::{Changes, Reason};
use crate::sync::stages::told::Told;
use crate::table::{Compared, FaultAt, Intercept, Intercepted, Piece, Step, Visitor, WalkError};

/// How many tables an address has passed, and which side of a piece it is then.
pub(super) type Rules = [(u8, Compared)];

/// What a look needs.
pub(super) struct Look<'a, M: ?Sized> {
    pub(super) memory: &'a M,
    pub(super) budget: &'a Budget,
    pub(super) changes: &'a mut Changes,
    pub(super) told: &'a mut Told,
    pub(super) intercepts: &'a [Intercept],
    /// Pieces that may be told.
    pub(super) most: u64,
    /// One table's changes go straight on: nothing is intercepted, and nobody compares with what was told.
    pub(super) straight: bool,
}

impl<M: ?Sized> Look<'_, M> {
    /// Tells the parts of a piece that nothing intercepts and that were not told before. False: not all of them, there is no room.
    pub(super) fn tell(&mut self, piece: &Piece, rules: &Rules) -> bool {
        let mut teller = Teller { told: self.told, most: self.most, next: piece.iova.first };
        let result = if self.intercepts.is_empty() {
            teller.piece(piece, &[])
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
}

impl Visitor for Teller<'_> {
    fn piece(&mut self, piece: &Piece, _: &[Step]) -> Result<(), WalkError> {
        if !self.told.has(piece.iova.first) {
            if self.told.len() >= self.most {
                return Err(WalkError::Stopped);
            }
            self.told.add(*piece);
        }
        self.next = piece.iova.last.saturating_add(1);
        Ok(())
    }

    fn fault(&mut self, fault: &FaultAt<'_>) -> Result<(), WalkError> {
        self.next = fault.span.last.saturating_add(1);
        Ok(())
    }
}
