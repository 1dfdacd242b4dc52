//! What becomes of an entry that was read: the same as before, or something else with all that hangs from it.

use crate::memory::{EntryMemory, PAGE};
use crate::sync::changes::Reason;
use crate::sync::shadow::Shadow;
use crate::sync::shadow::kind::alike;
use crate::sync::shadow::node::{Node, NodeId, Pages, State, What};
use crate::sync::shadow::pass::{Mode, Pass};
use crate::sync::shadow::replay::parts;
use crate::sync::shadow::words::Swap;
use crate::sync::wanted::Wanted;
use crate::table::{LeafMarks, Meaning, Next, Piece, low_bits};
use crate::{Attributes, Span};

/// What an entry stands for that was just judged.
pub(super) enum Judged {
    /// Nothing, or a leaf.
    Plain(State),
    Blocked(Reason),
    Table(Below),
}

/// The table that an entry points to.
pub(super) struct Below {
    pub(super) level: u8,
    pub(super) table: u64,
    pub(super) base: u64,
    pub(super) inherited: u64,
    pub(super) within: Span,
    pub(super) exists: (u64, u64),
}

/// What became of a node's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moved {
    Not,
    Elsewhere,
    /// Entries have another meaning now.
    OtherWord,
}

impl<M: EntryMemory + ?Sized> Pass<'_, M> {
    fn set(&mut self, node: &mut Node, at: usize, state: State) {
        self.shadow.blocked += u64::from(state == State::BLOCKED);
        self.shadow.blocked -= u64::from(node.states[at] == State::BLOCKED);
        node.set(at, state);
    }

    pub(super) fn unreadable(&mut self, node: &mut Node, at: usize) {
        self.drop_entry(node, at);
        self.set(node, at, State::UNKNOWN);
    }

    /// An entry was read: makes the copy equal, and follows it. `wanted` has what is wanted of its slot.
    #[inline]
    pub(super) fn entry(&mut self, node: &mut Node, at: usize, entry: u64, wanted: &[Wanted], mode: Mode, deep: bool) {
        let old = node.states[at].what();
        if mode != Mode::Judge && node.entries[at] == entry && old != What::Unknown {
            match old {
                What::Table(child) if deep => self.visit(child, wanted, mode),
                What::Empty(shared) if deep => {
                    self.is_still_empty(shared);
                }
                _ => {}
            }
            return;
        }
        if mode == Mode::Judge || !self.exchange(node, at, entry) {
            self.follow(node, at, entry, wanted, mode, deep);
        }
    }

    /// A page comes or goes, as most entries that change are; false: it is not as easy as that, and nothing was done.
    #[inline(always)]
    pub(super) fn exchange(&mut self, node: &mut Node, at: usize, entry: u64) -> bool {
        let Some([old, new]) = self.shadow.words.find(node.level, node.inherited, [node.entries[at], entry]) else { return false };
        let swap = Swap::new(old, new, node.entries[at], entry);
        self.swap(node, at, entry, swap)
    }

    /// The same where it is known what the old entry and the new one stand for.
    #[inline(always)]
    pub(super) fn swap(&mut self, node: &mut Node, at: usize, entry: u64, swap: Swap) -> bool {
        let Swap { old, new, waits, page, attributes } = swap;
        let (was_leaf, is_leaf) = (old != State::NOTHING, new != State::NOTHING);
        // What was told of a blocked entry is something else.
        if old != node.states[at] || was_leaf && is_leaf || is_leaf && self.shadow.leaves >= self.shadow.limits.leaves {
            return false;
        }
        if waits && !self.memory.can_mark(self.shadow.address(node, at)) {
            return false;
        }
        let (slot, below) = (self.shadow.slot(node, at), low_bits(self.shadow.plan.levels[usize::from(node.level)].index_lsb));
        if let Some(address) = page {
            if slot.last - slot.first != below || !self.shadow.is_target(address, below) {
                return false;
            }
            match is_leaf {
                true => self.changes.map(Piece { iova: slot, address, attributes }),
                false => self.changes.unmap(slot),
            }
        }
        self.shadow.leaves = self.shadow.leaves + u64::from(is_leaf) - u64::from(was_leaf);
        (node.entries[at], node.states[at]) = (entry, new);
        true
    }

    /// An entry that must be judged, or that was or is a table.
    #[inline(never)]
    fn follow(&mut self, node: &mut Node, at: usize, entry: u64, wanted: &[Wanted], mode: Mode, deep: bool) {
        let slot = self.shadow.slot(node, at);
        let judged = self.judge(node, at, entry, slot);
        if let Judged::Table(below) = &judged
            && let Some(shared) = self.known_empty(below)
        {
            let state = self.share(shared);
            self.drop_entry(node, at);
            node.entries[at] = entry;
            return self.set(node, at, state);
        }
        match (node.states[at].what(), judged) {
            (What::Leaf(old), Judged::Plain(new)) if let What::Leaf(new) = new.what() => self.replace_leaf(node, at, entry, slot, old, new),
            (What::Table(child), Judged::Table(below)) if self.is_place_of(child, &below) => {
                node.entries[at] = entry;
                self.shadow.scratch.way.forget();
                let (moved, whole) = (self.move_to(child, below.table, below.inherited), [Wanted::whole(below.within)]);
                match moved {
                    Moved::Elsewhere => self.visit(child, &whole, if self.memory.may_refuse_marks() { Mode::Judge } else { mode }),
                    Moved::OtherWord => self.visit(child, &whole, Mode::Judge),
                    Moved::Not if mode == Mode::Judge => self.visit(child, &whole, mode),
                    Moved::Not if deep => self.visit(child, wanted, mode),
                    Moved::Not => {}
                }
            }
            (_, judged) => {
                self.drop_entry(node, at);
                node.entries[at] = entry;
                self.add(node, at, slot, judged);
            }
        }
    }

    fn replace_leaf(&mut self, node: &mut Node, at: usize, entry: u64, slot: Span, old: u32, new: u32) {
        let (before, after) = (self.shadow.piece(node.level, slot, node.entries[at], old), self.shadow.piece(node.level, slot, entry, new));
        // The word that a kind stood for may be another's after a switch, and then this is still what was told.
        if !alike(before, after) {
            self.unmap(before);
            self.map(after);
        }
        node.entries[at] = entry;
        self.set(node, at, State::leaf(new));
    }

    /// What a new entry stands for comes to life.
    pub(super) fn add(&mut self, node: &mut Node, at: usize, slot: Span, judged: Judged) {
        let state = match judged {
            Judged::Plain(state) => return self.add_plain(node, at, slot, state),
            Judged::Blocked(reason) => Err(reason),
            Judged::Table(below) => match self.empty(&below) {
                Some(shared) => Ok(self.share(shared)),
                None => self.create(&below).map(|child| child.map_or(State::NOTHING, State::table)),
            },
        };
        match state {
            Ok(state) => self.set(node, at, state),
            Err(reason) => self.block(node, at, slot, reason),
        }
    }

    #[inline]
    fn add_plain(&mut self, node: &mut Node, at: usize, slot: Span, state: State) {
        if let What::Leaf(kind) = state.what() {
            if self.shadow.leaves >= self.shadow.limits.leaves {
                return self.block(node, at, slot, Reason::Leaves);
            }
            self.shadow.leaves += 1;
            self.map(self.shadow.piece(node.level, slot, node.entries[at], kind));
        }
        self.set(node, at, state);
    }

    #[cold]
    fn block(&mut self, node: &mut Node, at: usize, slot: Span, reason: Reason) {
        self.changes.block(slot, reason);
        self.set(node, at, State::BLOCKED);
    }

    /// What an entry stood for is gone.
    pub(super) fn drop_entry(&mut self, node: &mut Node, at: usize) {
        match node.states[at].what() {
            What::Nothing | What::Unknown => {}
            What::Leaf(kind) => self.drop_leaf(node, at, self.shadow.slot(node, at), kind),
            What::Table(child) => self.remove(child),
            What::Empty(shared) => self.unshare(shared),
        }
        self.set(node, at, State::NOTHING);
    }

    #[inline]
    fn drop_leaf(&mut self, node: &Node, at: usize, slot: Span, kind: u32) {
        self.shadow.leaves -= 1;
        self.unmap(self.shadow.piece(node.level, slot, node.entries[at], kind));
    }

    /// Makes and reads a table that was not there before. No node: no entry of it is in reach.
    pub(super) fn create(&mut self, below: &Below) -> Result<Option<NodeId>, Reason> {
        let Below { level, table, base, inherited, within, exists } = *below;
        let entry_bytes = u64::from(self.shadow.plan.geometry.entry_bytes);
        // What it will cost, before it is paid.
        let lsb = self.shadow.plan.levels[usize::from(level)].index_lsb;
        let entries = (within.length_minus_one() >> lsb).saturating_add(1);
        if self.shadow.pages.count().saturating_add(entries.saturating_mul(entry_bytes) / PAGE) > self.shadow.limits.table_pages {
            return Err(Reason::TablePages);
        }
        let Some(node) = self.shadow.new_node(level, table, base, inherited, within, exists) else { return Ok(None) };
        let Some(bytes) = node.bytes(entry_bytes) else { return Ok(None) };
        if self.shadow.pages.count() + Pages::needed(bytes) > self.shadow.limits.table_pages {
            return Err(Reason::TablePages);
        }
        let span = node.span;
        let id = self.shadow.nodes.insert(node).ok_or(Reason::TablePages)?;
        // Watched before it is read: a write in between is told, and seen.
        self.shadow.pages.add(bytes, id);
        self.visit(id, &[Wanted::whole(span)], Mode::Judge);
        Ok(Some(id))
    }

    /// Drops a table and everything below it.
    pub(super) fn remove(&mut self, id: NodeId) {
        let Some(mut node) = self.shadow.nodes.take(id) else { return };
        self.shadow.scratch.way.forget();
        for at in 0..node.states.len() {
            self.drop_entry(&mut node, at);
        }
        if let Some(bytes) = node.bytes(u64::from(self.shadow.plan.geometry.entry_bytes)) {
            self.shadow.pages.remove(bytes, id);
        }
        self.shadow.nodes.forget(id);
        self.shadow.spare.give(node.entries, node.states, self.shadow.nodes.len());
    }

    /// Whether a node has the entries of this table, wherever it was before.
    pub(super) fn is_place_of(&self, child: NodeId, below: &Below) -> bool {
        let Some(child) = self.shadow.nodes.get(child) else { return false };
        let lsb = self.shadow.plan.levels[usize::from(below.level)].index_lsb;
        let end = self.shadow.plan.levels[usize::from(below.level)].entries() - 1;
        let first = ((below.within.first - below.base) >> lsb).max(below.exists.0);
        let last = ((below.within.last - below.base) >> lsb).min(below.exists.1).min(end);
        let whole = below.table.checked_add((last + 1) * u64::from(self.shadow.plan.geometry.entry_bytes)).is_some();
        whole && (child.level, child.base, child.first, child.first + child.entries.len() as u64) == (below.level, below.base, first, last + 1)
    }

    /// A node's table is at `table` now.
    pub(super) fn move_to(&mut self, id: NodeId, table: u64, inherited: u64) -> Moved {
        let entry_bytes = u64::from(self.shadow.plan.geometry.entry_bytes);
        let Some(mut node) = self.shadow.nodes.take(id) else { return Moved::Not };
        let moved = match (node.table != table, node.inherited != inherited) {
            (_, true) => Moved::OtherWord,
            (true, _) => Moved::Elsewhere,
            _ => Moved::Not,
        };
        if node.table != table {
            let before = node.bytes(entry_bytes);
            node.table = table;
            self.shadow.pages.replace(before, node.bytes(entry_bytes), id);
        }
        node.inherited = inherited;
        self.shadow.nodes.put(id, node);
        moved
    }

    pub(super) fn judge(&mut self, node: &Node, at: usize, entry: u64, slot: Span) -> Judged {
        let mut asked = match self.shadow.meaning(node.level, node.inherited, entry, self.budget) {
            Ok(asked) => asked,
            Err(reason) => return Judged::Blocked(reason),
        };
        // What is so for lack of a mark is so here, and not wherever the same pattern stands.
        let here = match self.without_mark(node, at, entry, asked.meaning) {
            Some(None) => return Judged::Plain(State::NOTHING),
            Some(Some(meaning)) => {
                asked.meaning = meaning;
                true
            }
            None => false,
        };
        let plan = &self.shadow.plan.levels[usize::from(node.level)];
        let kind = match asked.meaning {
            Meaning::Absent | Meaning::Fault(_) => None,
            Meaning::WholeEntry => return Judged::Blocked(Reason::Nonsense),
            Meaning::Table { next, inherited } => {
                let table = plan.field(asked.shape).extract(entry);
                return self.judge_table(node, next, table, inherited, slot);
            }
            Meaning::Leaf { .. } | Meaning::Part { .. } => match self.shadow.leaf(asked) {
                Some(kind) => Some(kind),
                None => return Judged::Blocked(Reason::Questions),
            },
        };
        let Shadow { words, kinds, plan, .. } = &mut *self.shadow;
        let leaf = kind.and_then(|kind| Some((State::leaf(kind), kinds.get(kind)?)));
        if !here {
            words.learn(node.level, plan, node.inherited, &asked, leaf);
        }
        Judged::Plain(leaf.map_or(State::NOTHING, |(state, _)| state))
    }

    /// What an entry means that hardware has to mark and cannot, because it could not write there; none within: nothing. None: no mark is missing, or it can be set.
    #[inline]
    fn without_mark(&self, node: &Node, at: usize, entry: u64, meaning: Meaning) -> Option<Option<Meaning>> {
        let geometry = &self.shadow.plan.geometry;
        let (lacks, attributes) = match meaning {
            Meaning::Table { .. } => (geometry.levels[usize::from(node.level)].table_accessed.is_missing(entry), None),
            Meaning::Leaf { attributes, .. } | Meaning::Part { attributes, .. } => {
                let marks = LeafMarks::of(geometry, node.level, attributes);
                // What only lacks the mark of a write can still be read.
                (!marks.is_none(), (!marks.accessed).then(|| attributes.without(Attributes::WRITE)))
            }
            _ => return None,
        };
        if !lacks || self.memory.can_mark(self.shadow.address(node, at)) {
            return None;
        }
        Some(attributes.map(|attributes| match meaning {
            Meaning::Leaf { size_log2, .. } => Meaning::Leaf { size_log2, attributes },
            Meaning::Part { size_log2, missing, .. } => Meaning::Part { size_log2, attributes, missing },
            other => other,
        }))
    }

    /// The table that an entry points to, if it can be there.
    fn judge_table(&self, node: &Node, next: Next, table: u64, inherited: u64, slot: Span) -> Judged {
        let plan = &self.shadow.plan;
        let Some(below) = plan.levels.get(usize::from(next.level)) else { return Judged::Blocked(Reason::Nonsense) };
        let this = &plan.levels[usize::from(node.level)];
        let top = below.index_lsb + below.index_bits;
        if top > this.index_lsb || below.index_bits > crate::table::MAX_INDEX_BITS {
            return Judged::Blocked(Reason::Nonsense);
        }
        let output = Span::of_log2(0, plan.geometry.output_bits);
        if !output.contains(table) || !table.is_multiple_of(u64::from(plan.geometry.entry_bytes)) {
            return Judged::Plain(State::NOTHING);
        }
        // A level that was skipped: IOVA bits between the two tables must be zero.
        let base = slot.first >> this.index_lsb << this.index_lsb;
        let Some(within) = slot.intersection(Span::of_log2(base, top)) else { return Judged::Plain(State::NOTHING) };
        let last = if next.last == u16::MAX { u64::MAX } else { u64::from(next.last) };
        Judged::Table(Below { level: next.level, table, base, inherited, within, exists: (next.first.into(), last) })
    }

    #[inline]
    fn map(&mut self, piece: Option<Piece>) {
        let Some(piece) = piece else { return };
        match self.shadow.is_target(piece.address, piece.iova.length_minus_one()) {
            true => self.changes.map(piece),
            false => parts(&self.shadow.map, Some(piece)).for_each(|part| self.changes.map(part)),
        }
    }

    #[inline]
    fn unmap(&mut self, piece: Option<Piece>) {
        let Some(piece) = piece else { return };
        match self.shadow.is_target(piece.address, piece.iova.length_minus_one()) {
            true => self.changes.unmap(piece.iova),
            false => parts(&self.shadow.map, Some(piece)).for_each(|part| self.changes.unmap(part.iova)),
        }
    }
}
