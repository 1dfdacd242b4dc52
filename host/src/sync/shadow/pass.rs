//! One pass over tables: reading, comparing, and following what differs.

use crate::memory::{Budget, EntryMemory, PAGE};
use crate::sync::changes::{Changes, Reason};
use crate::sync::shadow::Shadow;
use crate::sync::shadow::kind::alike;
use crate::sync::shadow::node::{Node, NodeId, Pages, State, What};
use crate::sync::shadow::replay::parts;
use crate::table::{Meaning, Next, Piece};
use crate::{Gpa, Span};

/// Entries that are read at once: a page of the smallest entries.
const BUFFER: usize = (PAGE / 4) as usize;

/// Begins at a cache line, for wide registers.
#[repr(align(64))]
struct Buffer([u64; BUFFER]);

/// Memory that passes use again.
#[derive(Default)]
pub(super) struct Scratch {
    buffers: Vec<Box<Buffer>>,
    written: Vec<NodeId>,
}

/// How a node is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// Entries that are the same as before are the same.
    Compare,
    /// So are tables, without reading their entries.
    LeafOnly,
    /// Every entry is judged: the words on the way to it are others.
    Judge,
}

/// What an entry stands for that was just judged.
enum Judged {
    Nothing,
    Blocked(Reason),
    Leaf(u32),
    Table(Below),
}

/// The table that an entry points to.
struct Below {
    level: u8,
    table: u64,
    base: u64,
    inherited: u64,
    within: Span,
    exists: (u64, u64),
}

pub(super) struct Pass<'a, M: ?Sized> {
    shadow: &'a mut Shadow,
    memory: &'a M,
    budget: &'a Budget,
    changes: &'a mut Changes,
}

impl<'a, M: EntryMemory + ?Sized> Pass<'a, M> {
    pub(super) fn new(shadow: &'a mut Shadow, memory: &'a M, budget: &'a Budget, changes: &'a mut Changes) -> Self {
        Self { shadow, memory, budget, changes }
    }

    /// Looks at the part of a root's tables that is wanted.
    pub(super) fn root(&mut self, root: usize, part: Span, leaf_only: bool) {
        match self.shadow.roots[root] {
            Some(node) => self.visit(node, part, if leaf_only { Mode::LeafOnly } else { Mode::Compare }),
            None => self.root_anew(root, self.shadow.root_span(root)),
        }
    }

    /// Looks at all of a root's tables, and judges every entry.
    pub(super) fn root_anew(&mut self, root: usize, whole: Span) {
        let wanted = &self.shadow.plan.geometry.roots[root];
        let (level, table, inherited) = (wanted.level, wanted.address, wanted.inherited);
        let plan = &self.shadow.plan.levels[usize::from(level)];
        let base = whole.first & u64::MAX.checked_shl(u32::from(plan.index_lsb + plan.index_bits)).unwrap_or(0);
        let below = Below { level, table, base, inherited, within: whole, exists: (0, u64::MAX) };
        if let Some(node) = self.shadow.roots[root].take() {
            if self.is_place_of(node, &below) {
                self.shadow.roots[root] = Some(node);
                self.move_to(node, table, inherited);
                return self.visit(node, whole, Mode::Judge);
            }
            self.remove(node);
        }
        match self.create(&below) {
            Ok(node) => self.shadow.roots[root] = node,
            Err(reason) => self.changes.block(whole, reason),
        }
    }

    /// Looks at the entries of all tables among bytes that were written.
    pub(super) fn written(&mut self, bytes: Span) {
        let mut nodes = std::mem::take(&mut self.shadow.scratch.written);
        for page in bytes.first / PAGE..=bytes.last / PAGE {
            nodes.clear();
            self.shadow.pages.holders(page, &mut nodes);
            let here = Span { first: bytes.first.max(page * PAGE), last: bytes.last.min(page * PAGE + (PAGE - 1)) };
            if nodes.len() > 1 {
                // Those that others hang from come first; what they drop is then gone.
                let key = |node: &Node| (u8::MAX - self.shadow.plan.levels[usize::from(node.level)].index_lsb, node.span);
                nodes.sort_by_key(|id| self.shadow.nodes.get(*id).map(key));
            }
            for node in &nodes {
                self.written_in(*node, here);
            }
        }
        nodes.clear();
        self.shadow.scratch.written = nodes;
    }

    fn written_in(&mut self, id: NodeId, written: Span) {
        let entry_bytes = u64::from(self.shadow.plan.geometry.entry_bytes);
        // A node that went meanwhile, or whose number is another's by now, is in other pages.
        let Some(node) = self.shadow.nodes.get(id) else { return };
        let Some(here) = node.bytes(entry_bytes).and_then(|bytes| bytes.intersection(written)) else { return };
        let (first, last) = ((here.first - node.table) / entry_bytes, (here.last - node.table) / entry_bytes);
        let lsb = self.shadow.plan.levels[usize::from(node.level)].index_lsb;
        let slots = Span { first: node.base + (first << lsb), last: Span::of_log2(node.base + (last << lsb), lsb).last };
        if let Some(part) = node.span.intersection(slots) {
            self.entries_of(id, part, Mode::Compare, false);
        }
    }

    /// Looks at a part of a table, and at what is below it.
    fn visit(&mut self, id: NodeId, part: Span, mode: Mode) {
        let id = if mode == Mode::LeafOnly { self.lowest(id, part) } else { id };
        self.entries_of(id, part, mode, true);
    }

    /// The lowest table below one of which all other entries play no part in `part`, going by what was seen.
    fn lowest(&self, mut id: NodeId, part: Span) -> NodeId {
        while let Some(node) = self.shadow.nodes.get(id) {
            let Some(part) = node.span.intersection(part) else { break };
            let places = self.shadow.places(node, part);
            match node.states[*places.start()].what() {
                What::Table(child) if places.start() == places.end() => id = child,
                _ => break,
            }
        }
        id
    }

    /// Looks at the entries of a table for `part`; at the tables below that did not move only if `deep`.
    fn entries_of(&mut self, id: NodeId, part: Span, mode: Mode, deep: bool) {
        let Some(mut node) = self.shadow.nodes.take(id) else { return };
        if let Some(part) = node.span.intersection(part) {
            let lsb = self.shadow.plan.levels[usize::from(node.level)].index_lsb;
            let (first, last) = ((part.first - node.base) >> lsb, (part.last - node.base) >> lsb);
            if first == last {
                self.one_entry(&mut node, first, part, mode, deep);
            } else {
                self.pages_of(&mut node, (first, last), part, mode, deep);
            }
        }
        self.shadow.nodes.put(id, node);
    }

    fn one_entry(&mut self, node: &mut Node, index: u64, part: Span, mode: Mode, deep: bool) {
        let at = (index - node.first) as usize;
        if mode == Mode::LeafOnly
            && let What::Table(child) = node.states[at].what()
        {
            return self.visit(child, part, mode);
        }
        let mut entry = [0];
        match self.read(node.table + index * u64::from(self.shadow.plan.geometry.entry_bytes), &mut entry) {
            true => self.entry(node, at, entry[0], part, mode, deep),
            false => self.unreadable(node, at),
        }
    }

    /// Entries by the page, as they are read.
    fn pages_of(&mut self, node: &mut Node, (first, last): (u64, u64), part: Span, mode: Mode, deep: bool) {
        let mut buffer = self.shadow.scratch.buffers.pop().unwrap_or_else(|| Box::new(Buffer([0; BUFFER])));
        let bytes = u64::from(self.shadow.plan.geometry.entry_bytes);
        let mut index = first;
        while index <= last {
            let address = node.table + index * bytes;
            let count = ((PAGE - address % PAGE) / bytes).min(last - index + 1) as usize;
            let from = (index - node.first) as usize;
            let fresh = &mut buffer.0[..count];
            if self.read(address, fresh) {
                self.compare(node, from, fresh, part, mode, deep);
            } else {
                (from..from + count).for_each(|at| self.unreadable(node, at));
            }
            index += count as u64;
        }
        self.shadow.scratch.buffers.push(buffer);
    }

    /// Goes through entries that were read; `from` is the place of the first.
    fn compare(&mut self, node: &mut Node, from: usize, fresh: &[u64], part: Span, mode: Mode, deep: bool) {
        /// Entries that are compared at once.
        const BLOCK: usize = 16;
        let plain = |node: &Node| mode != Mode::Judge && node.unknown == 0 && (node.tables == 0 || !deep);
        if plain(node) && node.entries[from..from + fresh.len()] == *fresh {
            return;
        }
        for start in (0..fresh.len()).step_by(BLOCK) {
            let block = &fresh[start..fresh.len().min(start + BLOCK)];
            if plain(node) && node.entries[from + start..from + start + block.len()] == *block {
                continue;
            }
            for (offset, entry) in block.iter().enumerate() {
                let at = from + start + offset;
                let state = node.states[at];
                if state == State::NOTHING && node.entries[at] == *entry && mode != Mode::Judge {
                    continue;
                }
                let slot = self.shadow.slot(node, at).intersection(part).unwrap_or(part);
                match state.what() {
                    What::Table(child) if mode == Mode::LeafOnly => self.visit(child, slot, mode),
                    _ => self.entry(node, at, *entry, slot, mode, deep),
                }
            }
        }
    }

    /// Reads entries within one page; false if they are not there.
    fn read(&self, address: u64, entries: &mut [u64]) -> bool {
        let layout = self.shadow.layout();
        let last = address.saturating_add(entries.len() as u64 * u64::from(layout.bytes) - 1);
        let exists = self.shadow.map.region(address).is_some_and(|region| region.span.contains(last) || self.shadow.map.region(last).is_some());
        exists && self.memory.read_entries(Gpa(address), layout, entries).is_ok()
    }

    fn set(&mut self, node: &mut Node, at: usize, state: State) {
        self.shadow.blocked += u64::from(state == State::BLOCKED);
        self.shadow.blocked -= u64::from(node.states[at] == State::BLOCKED);
        node.set(at, state);
    }

    fn unreadable(&mut self, node: &mut Node, at: usize) {
        self.drop_entry(node, at);
        self.set(node, at, State::UNKNOWN);
    }

    /// An entry was read: makes the copy equal, and follows it. `part` is what is wanted of its slot.
    fn entry(&mut self, node: &mut Node, at: usize, entry: u64, part: Span, mode: Mode, deep: bool) {
        let old = node.states[at].what();
        if mode != Mode::Judge && node.entries[at] == entry && old != What::Unknown {
            if deep && let What::Table(child) = old {
                self.visit(child, part, mode);
            }
            return;
        }
        let slot = self.shadow.slot(node, at);
        let judged = self.judge(node, entry, slot);
        match (old, judged) {
            (What::Leaf(old), Judged::Leaf(new)) => self.replace_leaf(node, at, entry, slot, old, new),
            (What::Table(child), Judged::Table(below)) if self.is_place_of(child, &below) => {
                node.entries[at] = entry;
                let moved = self.move_to(child, below.table, below.inherited);
                match moved {
                    Moved::Elsewhere => self.visit(child, below.within, if mode == Mode::Judge { mode } else { Mode::Compare }),
                    Moved::OtherWord => self.visit(child, below.within, Mode::Judge),
                    Moved::Not if mode == Mode::Judge => self.visit(child, below.within, mode),
                    Moved::Not if deep => self.visit(child, part, mode),
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
    fn add(&mut self, node: &mut Node, at: usize, slot: Span, judged: Judged) {
        let state = match judged {
            Judged::Nothing => Ok(State::NOTHING),
            Judged::Blocked(reason) => Err(reason),
            Judged::Leaf(_) if self.shadow.leaves >= self.shadow.limits.leaves => Err(Reason::Leaves),
            Judged::Leaf(kind) => {
                self.shadow.leaves += 1;
                self.map(self.shadow.piece(node.level, slot, node.entries[at], kind));
                Ok(State::leaf(kind))
            }
            Judged::Table(below) => self.create(&below).map(|child| child.map_or(State::NOTHING, State::table)),
        };
        match state {
            Ok(state) => self.set(node, at, state),
            Err(reason) => {
                self.changes.block(slot, reason);
                self.set(node, at, State::BLOCKED);
            }
        }
    }

    /// What an entry stood for is gone.
    fn drop_entry(&mut self, node: &mut Node, at: usize) {
        match node.states[at].what() {
            What::Nothing | What::Unknown => {}
            What::Leaf(kind) => {
                self.shadow.leaves -= 1;
                self.unmap(self.shadow.piece(node.level, self.shadow.slot(node, at), node.entries[at], kind));
            }
            What::Table(child) => self.remove(child),
        }
        self.set(node, at, State::NOTHING);
    }

    /// Makes and reads a table that was not there before. No node: no entry of it is in reach.
    fn create(&mut self, below: &Below) -> Result<Option<NodeId>, Reason> {
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
        self.visit(id, span, Mode::Judge);
        Ok(Some(id))
    }

    /// Drops a table and everything below it.
    pub(super) fn remove(&mut self, id: NodeId) {
        let Some(mut node) = self.shadow.nodes.take(id) else { return };
        for at in 0..node.states.len() {
            self.drop_entry(&mut node, at);
        }
        if let Some(bytes) = node.bytes(u64::from(self.shadow.plan.geometry.entry_bytes)) {
            self.shadow.pages.remove(bytes, id);
        }
        self.shadow.nodes.forget(id);
    }

    /// Whether a node has the entries of this table, wherever it was before.
    fn is_place_of(&self, child: NodeId, below: &Below) -> bool {
        let Some(child) = self.shadow.nodes.get(child) else { return false };
        let lsb = self.shadow.plan.levels[usize::from(below.level)].index_lsb;
        let end = self.shadow.plan.levels[usize::from(below.level)].entries() - 1;
        let first = ((below.within.first - below.base) >> lsb).max(below.exists.0);
        let last = ((below.within.last - below.base) >> lsb).min(below.exists.1).min(end);
        let whole = below.table.checked_add((last + 1) * u64::from(self.shadow.plan.geometry.entry_bytes)).is_some();
        whole && (child.level, child.base, child.first, child.first + child.entries.len() as u64) == (below.level, below.base, first, last + 1)
    }

    /// A node's table is at `table` now.
    fn move_to(&mut self, id: NodeId, table: u64, inherited: u64) -> Moved {
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

    fn judge(&mut self, node: &Node, entry: u64, slot: Span) -> Judged {
        let asked = match self.shadow.meaning(node.level, node.inherited, entry, self.budget) {
            Ok(asked) => asked,
            Err(reason) => return Judged::Blocked(reason),
        };
        match asked.meaning {
            Meaning::Absent | Meaning::Fault(_) => Judged::Nothing,
            Meaning::WholeEntry => Judged::Blocked(Reason::Nonsense),
            Meaning::Table { next, inherited } => {
                let table = self.shadow.plan.levels[usize::from(node.level)].field(asked.shape).extract(entry);
                self.judge_table(node, next, table, inherited, slot)
            }
            Meaning::Leaf { .. } | Meaning::Part { .. } => self.shadow.leaf(asked).map_or(Judged::Blocked(Reason::Questions), Judged::Leaf),
        }
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
            return Judged::Nothing;
        }
        // A level that was skipped: IOVA bits between the two tables must be zero.
        let base = slot.first >> this.index_lsb << this.index_lsb;
        let Some(within) = slot.intersection(Span::of_log2(base, top)) else { return Judged::Nothing };
        let last = if next.last == u16::MAX { u64::MAX } else { u64::from(next.last) };
        Judged::Table(Below { level: next.level, table, base, inherited, within, exists: (next.first.into(), last) })
    }

    fn map(&mut self, piece: Option<Piece>) {
        parts(&self.shadow.map, piece).for_each(|part| self.changes.map(part));
    }

    fn unmap(&mut self, piece: Option<Piece>) {
        parts(&self.shadow.map, piece).for_each(|part| self.changes.unmap(part.iova));
    }
}

/// What became of a node's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moved {
    Not,
    Elsewhere,
    /// Entries have another meaning now.
    OtherWord,
}
