//! What a sink was told of an address space whose pieces are not simply those of one table, and what it is to be told next.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::Span;
use crate::sync::changes::Changes;
use crate::sync::shadow::alike;
use crate::table::Piece;

/// All pieces that are mapped, by their first IOVA. While a look goes on they come and go; what the two ends of the look differ in is what is told.
#[derive(Debug, Default)]
pub(super) struct Told {
    mapped: BTreeMap<u64, Piece>,
    /// Mapped when the look began, and not now.
    dropped: HashMap<u64, Piece>,
    /// Mapped now, and not when the look began.
    fresh: HashSet<u64>,
    /// First IOVAs of pieces that are told even if they are as they were.
    anew: HashSet<u64>,
}

impl Told {
    /// Pieces that are mapped now.
    pub(super) fn len(&self) -> u64 {
        self.mapped.len() as u64
    }

    /// Whether a piece begins here.
    pub(super) fn has(&self, first: u64) -> bool {
        self.mapped.contains_key(&first)
    }

    /// Maps a piece where nothing is mapped. With `anew` it is told even if it is as it was when the look began.
    pub(super) fn add(&mut self, piece: Piece, anew: bool) {
        let first = piece.iova.first;
        if anew {
            // Whatever else becomes of it in this look, by another stage perhaps.
            self.anew.insert(first);
        }
        // The same as before is no news, also if somebody looked at the page meanwhile: then what was told stays.
        let anew = &self.anew;
        let same = |before: &Piece| !anew.contains(&first) && alike(Some(*before), Some(piece));
        if let Some(before) = self.dropped.get(&first).copied().filter(same) {
            self.dropped.remove(&first);
            self.mapped.insert(first, before);
            return;
        }
        self.fresh.insert(first);
        self.mapped.insert(first, piece);
    }

    fn forget(&mut self, piece: Piece) {
        if !self.fresh.remove(&piece.iova.first) {
            self.dropped.insert(piece.iova.first, piece);
        }
    }

    /// Unmaps all pieces that begin in `span`.
    pub(super) fn drop_within(&mut self, span: Span) {
        while let Some((&first, &piece)) = self.mapped.range(span.first..=span.last).next() {
            self.mapped.remove(&first);
            self.forget(piece);
        }
    }

    /// Unmaps everything.
    pub(super) fn drop_all(&mut self) {
        for piece in std::mem::take(&mut self.mapped).into_values() {
            self.forget(piece);
        }
    }

    /// Takes in what was told without this.
    pub(super) fn remember(&mut self, piece: Piece) {
        self.mapped.insert(piece.iova.first, piece);
    }

    /// The look is over: tells what it changed.
    pub(super) fn settle(&mut self, changes: &mut Changes) {
        self.anew.clear();
        if self.dropped.is_empty() && self.fresh.is_empty() {
            return;
        }
        // First what went: a map of the same batch must not be taken for what is unmapped.
        self.dropped.drain().for_each(|(_, piece)| changes.unmap(piece.iova));
        for first in self.fresh.drain() {
            if let Some(piece) = self.mapped.get(&first) {
                changes.map(*piece);
            }
        }
    }

    /// Pieces that have an IOVA of `span`, ascending.
    pub(super) fn pieces(&self, span: Span) -> impl Iterator<Item = Piece> + '_ {
        overlapping(&self.mapped, span)
    }
}

/// Of pieces that do not overlap, by their first input: those with an input in `span`, ascending.
pub(super) fn overlapping(pieces: &BTreeMap<u64, Piece>, span: Span) -> impl Iterator<Item = Piece> + '_ {
    let before = pieces.range(..span.first).next_back().map(|(_, piece)| *piece).filter(|piece| piece.iova.last >= span.first);
    before.into_iter().chain(pieces.range(span.first..=span.last).map(|(_, piece)| *piece))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Attributes, Change};

    fn piece(first: u64, address: u64) -> Piece {
        Piece { iova: Span { first, last: first + 0xfff }, address, attributes: Attributes::READ }
    }

    #[test]
    fn only_what_differs_between_the_ends_of_a_look_is_told() {
        let (mut told, mut changes) = (Told::default(), Changes::new());
        [0x1000, 0x2000, 0x3000].iter().for_each(|first| told.add(piece(*first, 0x9000), false));
        told.settle(&mut changes);
        assert_eq!(changes.batch().len(), 3);
        changes.clear();
        told.drop_all();
        told.add(piece(0x1000, 0x9000), false);
        told.add(piece(0x2000, 0xa000), false);
        told.drop_within(piece(0x2000, 0).iova);
        told.add(piece(0x2000, 0xb000), false);
        told.add(piece(0x4000, 0x9000), false);
        told.drop_within(piece(0x4000, 0).iova);
        let marked = Piece { attributes: Attributes::READ.with(Attributes::ACCESSED), ..piece(0x3000, 0x9000) };
        told.add(marked, false);
        told.settle(&mut changes);
        assert_eq!(changes.batch(), [Change::Unmap(piece(0x2000, 0).iova), Change::Map(piece(0x2000, 0xb000))]);
        assert_eq!(told.pieces(Span { first: 0x1fff, last: 0x2000 }).count(), 2);
        // What was marked and is not, is told although nothing else is different.
        changes.clear();
        told.drop_within(piece(0x1000, 0).iova);
        told.add(piece(0x1000, 0x9000), true);
        told.settle(&mut changes);
        assert_eq!(changes.batch().len(), 2);
        // Also if another stage has it again in the same look.
        changes.clear();
        told.drop_within(piece(0x1000, 0).iova);
        told.add(piece(0x1000, 0x9000), true);
        told.drop_all();
        told.add(piece(0x1000, 0x9000), false);
        told.settle(&mut changes);
        assert!(changes.batch().contains(&Change::Map(piece(0x1000, 0x9000))));
    }
}
