//! Marking the guest's entries as hardware would.

use crate::memory::{Budget, MarkMemory};
use crate::sync::marks::{Marked, MarksWritten};
use crate::sync::shadow::Shadow;
use crate::sync::shadow::node::{Node, NodeId, State, What};
use crate::{Attributes, Gpa};

impl Shadow {
    /// Marks the guest's leaves for the IOVAs of `marked` that are not marked yet, where the format says that hardware does, and adds what was done to `written`. The
    /// copies are marked as well, so that nobody takes this for a change by the guest. The budget is charged for questions to the format.
    pub fn mark<M: MarkMemory + ?Sized>(&mut self, memory: &M, marked: Marked, budget: &Budget, written: &mut MarksWritten) {
        for index in 0..self.roots.len() {
            if let (Some(root), Some(iova)) = (self.roots[index], self.part_of_root(index, marked.iova)) {
                self.mark_below(memory, root, Marked { iova, ..marked }, budget, written);
            }
        }
    }

    fn mark_below<M: MarkMemory + ?Sized>(&mut self, memory: &M, id: NodeId, marked: Marked, budget: &Budget, written: &mut MarksWritten) {
        let Some(mut node) = self.nodes.take(id) else { return };
        if let Some(part) = node.span.intersection(marked.iova) {
            for at in self.places(&node, part) {
                match node.states[at].what() {
                    What::Nothing | What::Unknown | What::Empty(_) => {}
                    What::Table(below) => self.mark_below(memory, below, marked, budget, written),
                    What::Leaf(kind) => self.mark_leaf(memory, &mut node, at, kind, marked, budget, written),
                }
            }
        }
        self.nodes.put(id, node);
    }

    #[allow(clippy::too_many_arguments)]
    fn mark_leaf<M: MarkMemory + ?Sized>(
        &mut self,
        memory: &M,
        node: &mut Node,
        at: usize,
        kind: u32,
        marked: Marked,
        budget: &Budget,
        written: &mut MarksWritten,
    ) {
        let level = &self.plan.geometry.levels[usize::from(node.level)];
        let waits = self.kinds.get(kind).is_some_and(|kind| kind.attributes.contains(Attributes::WRITABLE_WHEN_DIRTY));
        let entry = node.entries[at];
        let dirty = marked.dirty && waits && level.dirty.exists() && !level.dirty.is_set(entry);
        let accessed = (marked.accessed || dirty) && level.accessed.exists() && !level.accessed.is_set(entry);
        let mut new = if dirty { level.dirty.set(entry) } else { entry };
        new = if accessed { level.accessed.set(new) } else { new };
        if new == entry {
            return;
        }
        let address = Gpa(node.table + (node.first + at as u64) * u64::from(self.plan.geometry.entry_bytes));
        if memory.compare_exchange_entry(address, self.layout(), entry, new) != Ok(true) {
            written.skipped += 1;
            return;
        }
        written.accessed += u64::from(accessed);
        written.dirty += u64::from(dirty);
        node.entries[at] = new;
        // Should the format see something else in it than a marked leaf, what was told stays told until the entry changes.
        let judged = self.meaning(node.level, node.inherited, new, budget).ok();
        let other = judged.and_then(|judged| self.leaf(judged));
        if let Some(other) = other.filter(|other| self.piece_of_kind(node, at, *other) == self.piece_of_kind(node, at, kind)) {
            node.set(at, State::leaf(other));
        }
    }

    /// IOVAs and address of an entry, were it of a kind.
    fn piece_of_kind(&self, node: &Node, at: usize, kind: u32) -> Option<(crate::Span, u64)> {
        self.piece(node.level, self.slot(node, at), node.entries[at], kind).map(|piece| (piece.iova, piece.address))
    }
}
