//! Guest memory that comes and goes.

use crate::memory::{Budget, EntryMemory, MemoryMap, PAGE};
use crate::sync::changes::Changes;
use crate::sync::shadow::Shadow;
use crate::sync::shadow::node::What;
use crate::sync::shadow::pass::{Mode, Pass};
use crate::sync::shadow::replay::parts;
use crate::table::Piece;
use crate::{Gpa, Span};

impl Shadow {
    /// The guest's memory is what `map` says from now on. Leaves, or parts of leaves, whose target is gone are unmapped and those whose target came are mapped; tables
    /// in memory that is gone are dropped with everything below them, and tables in memory that came are read.
    ///
    /// Guest memory is read where it came or went, and nowhere else: `memory` must have what came. All leaves are gone through once, without reading them
    /// again, if anything changed that a leaf may point to: a few nanoseconds for each. The budget is charged as by [`Shadow::synchronise`].
    pub fn memory_changed<M: EntryMemory + ?Sized>(&mut self, memory: &M, map: MemoryMap, budget: &Budget, changes: &mut Changes) {
        let targets = differences(self.map.targets().iter().chain(map.targets()).copied());
        if !targets.is_empty() {
            self.targets_changed(&map, &targets, changes);
        }
        let tables = differences(self.map.regions().iter().chain(map.regions()).map(|region| region.span));
        (self.map, self.target) = (map, None);
        let whole = |page: Gpa| Span::of_log2(page.0, PAGE.trailing_zeros() as u8);
        let mut pages: Vec<Span> = self.pages.watched().map(whole).filter(|page| meets(&tables, *page)).collect();
        pages.sort_unstable();
        self.empties.begin();
        for page in pages {
            Pass::new(self, memory, budget, changes).written(page, Mode::Compare);
        }
        Pass::new(self, memory, budget, changes).settle();
    }

    /// Tells what of all leaves came and went, of those that point to `targets`.
    fn targets_changed(&self, map: &MemoryMap, targets: &[Span], changes: &mut Changes) {
        for node in self.nodes.iter() {
            for (at, state) in node.states.iter().enumerate() {
                let What::Leaf(kind) = state.what() else { continue };
                let Some(piece) = self.piece(node.level, self.slot(node, at), node.entries[at], kind) else { continue };
                if meets(targets, Span { first: piece.address, last: piece.address + piece.iova.length_minus_one() }) {
                    tell(&self.map, map, piece, changes);
                }
            }
        }
    }
}

/// Tells which parts of a piece one map has and the other has not.
fn tell(before: &MemoryMap, after: &MemoryMap, piece: Piece, changes: &mut Changes) {
    let (mut before, mut after) = (parts(before, Some(piece)).peekable(), parts(after, Some(piece)).peekable());
    loop {
        match (before.peek(), after.peek()) {
            (Some(old), Some(new)) if old.iova == new.iova => {
                before.next();
                after.next();
            }
            (Some(old), new) if new.is_none_or(|new| old.iova.first <= new.iova.first) => {
                changes.unmap(old.iova);
                before.next();
            }
            (_, Some(new)) => {
                changes.map(*new);
                after.next();
            }
            (_, None) => return,
        }
    }
}

/// Of the spans of two lists, neither of which overlaps with itself: the addresses that are in one list and not in the other, ascending.
fn differences(spans: impl Iterator<Item = Span>) -> Vec<Span> {
    let mut borders: Vec<u128> = spans.flat_map(|span| [u128::from(span.first), u128::from(span.last) + 1]).collect();
    borders.sort_unstable();
    // From the first border to the second one of the lists has begun a span and not ended it, and so on.
    let between = borders.chunks_exact(2).filter(|pair| pair[0] < pair[1]);
    between.map(|pair| Span { first: pair[0] as u64, last: (pair[1] - 1) as u64 }).collect()
}

/// Whether a span has addresses in common with one of these, which ascend.
fn meets(spans: &[Span], span: Span) -> bool {
    spans.get(spans.partition_point(|other| other.last < span.first)).is_some_and(|other| other.first <= span.last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_one_of_two() {
        let span = |first, last| Span { first, last };
        let one = [span(0, 9), span(10, 19), span(30, u64::MAX)];
        let other = [span(5, 19), span(25, 29), span(30, 40)];
        assert_eq!(differences(one.into_iter().chain(other)), [span(0, 4), span(25, 29), span(41, u64::MAX)]);
        assert!(differences(one.into_iter().chain([span(0, 19), span(30, u64::MAX)])).is_empty());
        let spans = [span(5, 9), span(20, 29)];
        assert!(meets(&spans, span(9, 19)) && meets(&spans, span(10, 20)) && meets(&spans, span(0, 100)));
        assert!(!meets(&spans, span(0, 4)) && !meets(&spans, span(10, 19)) && !meets(&spans, span(30, 40)));
    }
}
