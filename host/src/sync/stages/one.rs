//! One table, perhaps with addresses that something else serves.

use std::collections::BTreeSet;
use std::fmt;

use crate::memory::{Budget, EntryMemory, MemoryMap};
use crate::sync::changes::Changes;
use crate::sync::shadow::{Prepared, Shadow, ShadowFigures};
use crate::sync::stages::look::{Look, Rules};
use crate::sync::wanted::Wanted;
use crate::table::{Compared, Piece};
use crate::{Change, Gpa, Span};

/// What of a piece is compared with intercepts: its IOVAs, and where they go.
const RULES: &Rules = &[(0, Compared::Iova), (1, Compared::Output)];

/// A guest with one table.
pub(super) struct One {
    pub(super) shadow: Shadow,
    /// First IOVAs of pieces of which not all parts were told.
    wanting: BTreeSet<u64>,
    found: Changes,
}

impl fmt::Debug for One {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("One").field("shadow", &self.shadow).finish_non_exhaustive()
    }
}

impl One {
    pub(super) fn new(shadow: Shadow) -> Self {
        Self { shadow, wanting: BTreeSet::new(), found: Changes::new() }
    }

    pub(super) fn figures(&self) -> ShadowFigures {
        let figures = self.shadow.figures();
        ShadowFigures { blocked: figures.blocked + self.wanting.len() as u64, ..figures }
    }

    /// Whether there are pieces of which not all parts were told.
    pub(super) fn wants(&self) -> bool {
        !self.wanting.is_empty()
    }

    /// Looks at IOVAs that ascend.
    pub(super) fn synchronise<M: EntryMemory + ?Sized>(&mut self, look: &mut Look<'_, M>, wanted: &[Wanted]) {
        self.with(look, |shadow, memory, budget, changes| shadow.synchronise_all(memory, wanted, budget, changes));
        wanted.iter().for_each(|one| self.try_again(look, one.span));
    }

    pub(super) fn table_written<M: EntryMemory + ?Sized>(&mut self, look: &mut Look<'_, M>, address: Gpa, length: u64) {
        self.with(look, |shadow, memory, budget, changes| shadow.table_written(memory, address, length, budget, changes));
    }

    pub(super) fn switch<M: EntryMemory + ?Sized>(&mut self, look: &mut Look<'_, M>, prepared: Prepared) {
        self.with(look, |shadow, memory, budget, changes| shadow.switch_to(prepared, memory, budget, changes));
    }

    pub(super) fn memory_changed<M: EntryMemory + ?Sized>(&mut self, look: &mut Look<'_, M>, map: &MemoryMap) {
        self.with(look, |shadow, memory, budget, changes| shadow.memory_changed(memory, map.clone(), budget, changes));
    }

    /// Does something to the shadow, and tells what changed.
    fn with<M: ?Sized>(&mut self, look: &mut Look<'_, M>, act: impl FnOnce(&mut Shadow, &M, &Budget, &mut Changes)) {
        if look.straight {
            return act(&mut self.shadow, look.memory, look.budget, look.changes);
        }
        act(&mut self.shadow, look.memory, look.budget, &mut self.found);
        look.changes.absorb_blocked(&self.found, 1, |iova, each| {
            each(iova);
        });
        let batch = self.found.batch();
        for change in batch {
            match change {
                Change::Unmap(span) => {
                    look.told.drop_within(*span);
                    self.wanting.remove(&span.first);
                }
                Change::Map(piece) => {
                    let anew = look.is_anew(batch, piece);
                    if !look.tell(piece, RULES, anew) {
                        self.wanting.insert(piece.iova.first);
                    }
                }
            }
        }
        self.found.clear();
    }

    /// All parts of all pieces, after the intercepts changed.
    pub(super) fn tell_all<M: ?Sized>(&mut self, look: &mut Look<'_, M>) {
        let wanting = &mut self.wanting;
        wanting.clear();
        self.shadow.pieces(Span::ALL, &mut |piece| {
            if !look.tell(&piece, RULES, false) {
                wanting.insert(piece.iova.first);
            }
        });
    }

    /// What there was no room for, where it is looked at anyway.
    fn try_again<M: ?Sized>(&mut self, look: &mut Look<'_, M>, span: Span) {
        let wanting: Vec<u64> = self.wanting.range(..=span.last).copied().collect();
        for first in wanting {
            let mut wanted: Option<Piece> = None;
            self.shadow.pieces(Span { first, last: first }, &mut |piece| wanted = Some(piece));
            let Some(piece) = wanted.filter(|piece| piece.iova.intersection(span).is_some()) else { continue };
            if look.tell(&piece, RULES, false) {
                self.wanting.remove(&first);
            }
        }
    }
}
