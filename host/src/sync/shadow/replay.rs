//! What is mapped, told again from what was seen: nothing is read and nobody is asked.

use std::ops::ControlFlow;

use crate::Span;
use crate::memory::MemoryMap;
use crate::sync::shadow::Shadow;
use crate::sync::shadow::node::{Node, NodeId, What};
use crate::table::{Piece, low_bits};

impl Shadow {
    /// Tells `each` every piece that is mapped at some IOVA of `span`, in ascending order, as the last changes left it.
    ///
    /// Pieces are told as they were when they were mapped: the first and the last may reach beyond `span`. The cost is that of the entries that were seen of the span's
    /// tables, present or not.
    pub fn pieces(&self, span: Span, each: &mut dyn FnMut(Piece)) {
        let _ = self.pieces_until(span, &mut |piece| {
            each(piece);
            ControlFlow::Continue(())
        });
    }

    /// The same, until `each` has had enough.
    pub(in crate::sync) fn pieces_until(&self, span: Span, each: &mut dyn FnMut(Piece) -> ControlFlow<()>) -> ControlFlow<()> {
        for (index, root) in self.roots.iter().enumerate() {
            if let (Some(root), Some(part)) = (*root, self.part_of_root(index, span)) {
                self.pieces_of(root, part, each)?;
            }
        }
        ControlFlow::Continue(())
    }

    fn pieces_of(&self, id: NodeId, span: Span, each: &mut dyn FnMut(Piece) -> ControlFlow<()>) -> ControlFlow<()> {
        let Some((node, part)) = self.nodes.get(id).and_then(|node| Some((node, node.span.intersection(span)?))) else {
            return ControlFlow::Continue(());
        };
        for at in self.places(node, part) {
            match node.states[at].what() {
                What::Nothing | What::Unknown | What::Empty(_) => {}
                What::Table(below) => self.pieces_of(below, part, each)?,
                What::Leaf(kind) => {
                    let piece = self.piece(node.level, self.slot(node, at), node.entries[at], kind);
                    for part in parts(&self.map, piece).filter(|part| part.iova.intersection(span).is_some()) {
                        each(part)?;
                    }
                }
            }
        }
        ControlFlow::Continue(())
    }

    /// Where the entries for `part`, which the node serves, are among those that are kept.
    #[inline]
    pub(super) fn places(&self, node: &Node, part: Span) -> std::ops::RangeInclusive<usize> {
        self.place(node, part.first)..=self.place(node, part.last)
    }

    /// Where the entry for an IOVA is.
    #[inline]
    pub(super) fn place(&self, node: &Node, iova: u64) -> usize {
        (((iova - node.base) >> self.plan.levels[usize::from(node.level)].index_lsb) - node.first) as usize
    }

    /// The IOVAs of an entry, as far as the node serves them.
    #[inline]
    pub(super) fn slot(&self, node: &Node, at: usize) -> Span {
        let lsb = self.plan.levels[usize::from(node.level)].index_lsb;
        let first = node.base + ((node.first + at as u64) << lsb);
        // No slot is beyond the end of all addresses.
        Span { first: first.max(node.span.first), last: (first | low_bits(lsb)).min(node.span.last) }
    }

    /// What an entry of a kind shows, before anybody asks which of that exists.
    #[inline]
    pub(super) fn piece(&self, level: u8, slot: Span, entry: u64, kind: u32) -> Option<Piece> {
        let output = Span { first: 0, last: low_bits(self.plan.geometry.output_bits) };
        let kind = self.kinds.get(kind)?;
        kind.piece(&self.plan.levels[usize::from(level)], slot, entry, output).filter(|piece| !piece.attributes.grants_nothing())
    }
}

/// The parts of a piece that are in guest memory, ascending.
#[inline]
pub(super) fn parts(map: &MemoryMap, piece: Option<Piece>) -> impl Iterator<Item = Piece> + '_ {
    piece.into_iter().flat_map(|piece| {
        let targets = Span { first: piece.address, last: piece.address + piece.iova.length_minus_one() };
        map.targets_within(targets).map(move |target| {
            let first = piece.iova.first + (target.first - targets.first);
            Piece { iova: Span { first, last: first + target.length_minus_one() }, address: target.first, attributes: piece.attributes }
        })
    })
}
