//! The pieces of a first stage, and which of them pass through given inputs of the second.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

use crate::Span;
use crate::sync::stages::told::overlapping;
use crate::table::Piece;

/// Sizes: a piece of class `n` has more than `2^(n-1)` bytes and at most `2^n`.
const CLASSES: usize = 65;

/// Pieces from IOVAs to intermediate addresses.
#[derive(Debug)]
pub(super) struct Passing {
    /// By first IOVA.
    pieces: BTreeMap<u64, Piece>,
    /// Class, first intermediate address, first IOVA. Pieces may overlap there, so that those of each size are found by where they begin.
    index: BTreeSet<(u8, u64, u64)>,
    /// How many there are of each class.
    classes: [u64; CLASSES],
}

impl Default for Passing {
    fn default() -> Self {
        Self { pieces: BTreeMap::new(), index: BTreeSet::new(), classes: [0; CLASSES] }
    }
}

const fn class(piece: &Piece) -> u8 {
    (64 - piece.iova.length_minus_one().leading_zeros()) as u8
}

/// The outputs of a piece.
pub(super) const fn outputs(piece: &Piece) -> Span {
    Span { first: piece.address, last: piece.address.saturating_add(piece.iova.length_minus_one()) }
}

/// The part of a piece whose outputs are in `span`.
pub(super) fn part(piece: &Piece, span: Span) -> Option<Piece> {
    let outputs = outputs(piece);
    let here = outputs.intersection(span)?;
    let first = piece.iova.first + (here.first - outputs.first);
    Some(Piece { iova: Span { first, last: first + here.length_minus_one() }, address: here.first, ..*piece })
}

impl Passing {
    pub(super) fn insert(&mut self, piece: Piece) {
        let class = class(&piece);
        if self.pieces.insert(piece.iova.first, piece).is_none() {
            self.classes[usize::from(class)] += 1;
            self.index.insert((class, piece.address, piece.iova.first));
        }
    }

    pub(super) fn remove(&mut self, first: u64) {
        let Some(piece) = self.pieces.remove(&first) else { return };
        let class = class(&piece);
        self.classes[usize::from(class)] -= 1;
        self.index.remove(&(class, piece.address, first));
    }

    /// The piece that begins at an IOVA.
    pub(super) fn get(&self, first: u64) -> Option<&Piece> {
        self.pieces.get(&first)
    }

    /// Pieces that have an IOVA of `span`, ascending.
    pub(super) fn pieces(&self, span: Span) -> impl Iterator<Item = Piece> + '_ {
        overlapping(&self.pieces, span)
    }

    /// All pieces, ascending.
    pub(super) fn all(&self) -> impl Iterator<Item = &Piece> {
        self.pieces.values()
    }

    /// Tells `each` every piece that passes through `span`, and the part of it that does.
    pub(super) fn through(&self, span: Span, mut each: impl FnMut(&Piece, Piece)) {
        let _ = self.through_until(span, |piece, part| {
            each(piece, part);
            ControlFlow::Continue(())
        });
    }

    /// The same, until `each` has had enough.
    pub(super) fn through_until(&self, span: Span, mut each: impl FnMut(&Piece, Piece) -> ControlFlow<()>) -> ControlFlow<()> {
        for (class, _) in self.classes.iter().enumerate().filter(|(_, count)| **count > 0) {
            let reach = Span::of_log2(0, class as u8).last;
            let (class, from) = (class as u8, span.first.saturating_sub(reach));
            for (_, _, iova) in self.index.range((class, from, 0)..=(class, span.last, u64::MAX)) {
                let Some(piece) = self.pieces.get(iova) else { continue };
                if let Some(part) = part(piece, span) {
                    each(piece, part)?;
                }
            }
        }
        ControlFlow::Continue(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Attributes;

    fn piece(first: u64, bytes: u64, address: u64) -> Piece {
        Piece { iova: Span { first, last: first + (bytes - 1) }, address, attributes: Attributes::READ }
    }

    #[test]
    fn pieces_of_all_sizes_are_found_by_what_they_pass_through() {
        let mut passing = Passing::default();
        let whole = Piece { iova: Span { first: 1 << 63, last: u64::MAX }, address: 1 << 62, attributes: Attributes::READ };
        let pieces = [
            piece(0, 0x1000, 0x5000),
            piece(0x1000, 0x1000, 0x5000),
            piece(0x2000, 0x1800, 0x4000),
            piece(0x20_0000, 0x20_0000, 0),
            piece(7, 1, 0x57ff),
            whole,
        ];
        pieces.iter().for_each(|piece| passing.insert(*piece));
        let through = |passing: &Passing, first, last| {
            let mut found = Vec::new();
            passing.through(Span { first, last }, |piece, part| found.push((piece.iova.first, part.iova.first, part.iova.last)));
            found.sort_unstable();
            found
        };
        assert_eq!(through(&passing, 0x5800, 0x5fff), [(0, 0x800, 0xfff), (0x1000, 0x1800, 0x1fff), (0x20_0000, 0x20_5800, 0x20_5fff)]);
        assert_eq!(through(&passing, 0x57ff, 0x57ff).len(), 5);
        assert_eq!(through(&passing, 0x20_0000, 0x20_0000), []);
        assert_eq!(through(&passing, (1 << 62) - 1, 1 << 62), [(1 << 63, 1 << 63, 1 << 63)]);
        assert_eq!(through(&passing, 0, u64::MAX).len(), 6);
        pieces.iter().for_each(|piece| passing.remove(piece.iova.first));
        assert!(through(&passing, 0, u64::MAX).is_empty() && passing.index.is_empty());
    }
}
