//! Marking the guest's entries as hardware would: those that point to tables as it passes them, from the root down, and then the leaf.
//!
//! Each entry is changed as it was read, with one compare-exchange. That somebody else has marked it meanwhile is no change by the guest: another address space may
//! follow the same table, or the same table stand in two places.

use crate::memory::{Budget, EntryLayout, MarkMemory};
use crate::sync::marks::{Marked, MarksWritten};
use crate::sync::shadow::Shadow;
use crate::sync::shadow::kind::Kind;
use crate::sync::shadow::node::{Node, NodeId, State, What};
use crate::table::Mark;
use crate::{Attributes, Gpa, Span};

/// Hears where entries are that hardware reads on its way to a leaf, that leaf's among them, each before it is marked.
pub(in crate::sync) type Read<'a> = &'a mut dyn FnMut(Gpa);

/// What is to be marked, and where that is counted.
struct Marking<'a, M: ?Sized> {
    memory: &'a M,
    layout: EntryLayout,
    marked: Marked,
    budget: &'a Budget,
    written: &'a mut MarksWritten,
    read: Option<Read<'a>>,
}

impl<M: MarkMemory + ?Sized> Marking<'_, M> {
    fn reads(&mut self, address: Gpa) {
        if let Some(read) = &mut self.read {
            read(address);
        }
    }

    /// Sets `wanted` in the entry at `address` that was read as `entry`, and in which others may have set `marks`. Tells what stood there and what stands there now;
    /// none: the guest has changed it, or it cannot be written.
    fn set(&self, address: Gpa, entry: u64, marks: [Mark; 2], wanted: &[Mark]) -> Option<(u64, u64)> {
        let [one, other] = marks;
        let may_stand = [entry, one.set(entry), other.set(entry), other.set(one.set(entry))];
        for (index, stood) in may_stand.iter().enumerate() {
            if may_stand[..index].contains(stood) {
                continue;
            }
            let new = wanted.iter().fold(*stood, |entry, mark| mark.set(entry));
            match self.memory.compare_exchange_entry(address, self.layout, *stood, new) {
                Ok(true) => return Some((*stood, new)),
                Ok(false) => {}
                Err(_) => break,
            }
        }
        None
    }
}

impl Shadow {
    /// Marks the guest's leaves for the IOVAs of `marked` that are not marked yet, and before them the entries on the way there, where the format says that hardware does;
    /// adds what was done to `written`. The copies are marked as well, so that nobody takes this for a change by the guest. The budget is charged for questions to the
    /// format.
    pub fn mark<M: MarkMemory + ?Sized>(&mut self, memory: &M, marked: Marked, budget: &Budget, written: &mut MarksWritten) {
        self.mark_reading(memory, marked, budget, written, None);
    }

    /// The same; `read` hears which entries hardware read for it.
    pub(in crate::sync) fn mark_reading<'a, M: MarkMemory + ?Sized>(
        &mut self,
        memory: &'a M,
        marked: Marked,
        budget: &'a Budget,
        written: &'a mut MarksWritten,
        read: Option<Read<'a>>,
    ) {
        if !marked.accessed && !marked.dirty {
            return;
        }
        let mut marking = Marking { memory, layout: self.layout(), marked, budget, written, read };
        for index in 0..self.roots.len() {
            if let (Some(root), Some(iova)) = (self.roots[index], self.part_of_root(index, marked.iova)) {
                self.mark_below(root, iova, &mut marking);
            }
        }
    }

    fn mark_below<M: MarkMemory + ?Sized>(&mut self, id: NodeId, iova: Span, marking: &mut Marking<'_, M>) {
        let Some(mut node) = self.nodes.take(id) else { return };
        if let Some(part) = node.span.intersection(iova) {
            for at in self.places(&node, part) {
                match node.states[at].what() {
                    What::Nothing | What::Unknown | What::Empty(_) => {}
                    What::Table(below) => {
                        self.mark_table(&mut node, at, below, iova, marking);
                        self.mark_below(below, iova, marking);
                    }
                    What::Leaf(kind) if self.is_usable(kind) => self.mark_leaf(&mut node, at, kind, marking),
                    What::Leaf(_) => {}
                }
            }
        }
        self.nodes.put(id, node);
    }

    /// Requests pass a leaf of this kind.
    fn is_usable(&self, kind: u32) -> bool {
        self.kinds.get(kind).is_some_and(|kind| !kind.attributes.grants_nothing())
    }

    /// Whether a table leads to a leaf that requests pass: nobody is said to have used the others.
    fn leads_to_leaf(&self, id: NodeId, iova: Span) -> bool {
        let Some((node, part)) = self.nodes.get(id).and_then(|node| Some((node, node.span.intersection(iova)?))) else { return false };
        self.places(node, part).any(|at| match node.states[at].what() {
            What::Nothing | What::Unknown | What::Empty(_) => false,
            What::Table(below) => self.leads_to_leaf(below, iova),
            What::Leaf(kind) => self.is_usable(kind),
        })
    }

    /// What a guest finds in a leaf it finds in all entries above it, so that these come first.
    fn mark_table<M: MarkMemory + ?Sized>(&mut self, node: &mut Node, at: usize, below: NodeId, iova: Span, marking: &mut Marking<'_, M>) {
        let (entry, mark) = (node.entries[at], self.plan.geometry.levels[usize::from(node.level)].table_accessed);
        let lacks = mark.is_missing(entry);
        if !lacks && marking.read.is_none() || !self.leads_to_leaf(below, iova) {
            return;
        }
        let address = self.address(node, at);
        marking.reads(address);
        // If the guest has changed this entry, hardware may still use what it has cached of it: what is below is marked.
        if !lacks {
            return;
        }
        let Some((stood, new)) = marking.set(address, entry, [mark, Mark::default()], &[mark]) else {
            marking.written.skipped += 1;
            return;
        };
        marking.written.tables += u64::from(stood != new);
        node.entries[at] = new;
        self.scratch.way.forget();
    }

    fn mark_leaf<M: MarkMemory + ?Sized>(&mut self, node: &mut Node, at: usize, kind: u32, marking: &mut Marking<'_, M>) {
        let level = &self.plan.geometry.levels[usize::from(node.level)];
        let (of_access, of_write) = (level.accessed, level.dirty);
        let (entry, address, marked) = (node.entries[at], self.address(node, at), marking.marked);
        marking.reads(address);
        let waits = self.kinds.get(kind).is_some_and(|kind| kind.attributes.contains(Attributes::WRITABLE_WHEN_DIRTY));
        let dirty = marked.dirty && waits && of_write.is_missing(entry);
        let accessed = (marked.accessed || dirty) && of_access.is_missing(entry);
        let wanted: &[Mark] = match (accessed, dirty) {
            (false, false) => return,
            (true, false) => &[of_access],
            (false, true) => &[of_write],
            (true, true) => &[of_access, of_write],
        };
        // Of a leaf that waits for no write, the mark of one may be a permission, or that of who comes another way, on which entries allow more.
        let marks = [of_access, if waits { of_write } else { Mark::default() }];
        let mut found = marking.set(address, entry, marks, wanted);
        if found.is_none() && !waits && self.is_only_mark(node, kind, of_write.set(entry), marking.budget) {
            found = marking.set(address, entry, [of_access, of_write], wanted);
        }
        let Some((stood, new)) = found else {
            marking.written.skipped += 1;
            return;
        };
        marking.written.accessed += u64::from(accessed && of_access.is_missing(stood));
        marking.written.dirty += u64::from(dirty && of_write.is_missing(stood));
        node.entries[at] = new;
        // Should the format see something else in it than a marked leaf, what was told stays told until the entry changes.
        let other = self.kind_of(node, new, marking.budget);
        if let Some(other) = other.filter(|other| self.piece_of_kind(node, at, *other) == self.piece_of_kind(node, at, kind)) {
            node.set(at, State::leaf(other));
        }
    }

    /// Whether `written`, a leaf of a kind with the mark of a write, allows what that kind does.
    fn is_only_mark(&mut self, node: &Node, kind: u32, written: u64, budget: &Budget) -> bool {
        let other = self.kind_of(node, written, budget).and_then(|other| self.kinds.get(other));
        let unmarked = |kind: &Kind| Kind { attributes: kind.attributes.without(Attributes::ACCESSED.with(Attributes::DIRTY)), ..*kind };
        other.zip(self.kinds.get(kind)).is_some_and(|(other, kind)| unmarked(other) == unmarked(kind))
    }

    /// What kind of leaf `entry` is in this table; none if it is no leaf, or nobody can say.
    fn kind_of(&mut self, node: &Node, entry: u64, budget: &Budget) -> Option<u32> {
        let judged = self.meaning(node.level, node.inherited, entry, budget).ok()?;
        self.leaf(judged)
    }

    /// IOVAs and address of an entry, were it of a kind.
    fn piece_of_kind(&self, node: &Node, at: usize, kind: u32) -> Option<(Span, u64)> {
        self.piece(node.level, self.slot(node, at), node.entries[at], kind).map(|piece| (piece.iova, piece.address))
    }
}
