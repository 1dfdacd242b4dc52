//! One pass over tables: which entries are looked at, and how they are read.
//!
//! All that is wanted of an address space at once is one list of IOVAs that ascend. A table is gone to with those it serves, each entry with those of its slot, so
//! that nothing on the way is read once for each of them.

use crate::memory::{Budget, EntryMemory, LINE, PAGE};
use crate::sync::changes::Changes;
use crate::sync::shadow::Shadow;
use crate::sync::shadow::entry::Below;
use crate::sync::shadow::node::{Node, NodeId, State, What};
use crate::sync::wanted::{Wanted, extent, within};
use crate::{Gpa, Span};

/// Entries that are read at once: a page of the smallest entries.
pub(super) const BUFFER: usize = (PAGE / 4) as usize;

/// Entries on the way down that are read at once: no table of a guest is deeper.
const DEEPEST: usize = 6;

/// Begins at a cache line, for wide registers.
#[repr(align(64))]
pub(super) struct Buffer(pub(super) [u64; BUFFER]);

/// Memory that passes use again.
#[derive(Default)]
pub(super) struct Scratch {
    pub(super) buffers: Vec<Box<Buffer>>,
    written: Vec<NodeId>,
    /// What is wanted, in the form that a root has IOVAs.
    pub(super) canonical: Vec<Wanted>,
    /// The table that was looked at last by itself. It may be gone, and its number another's: whoever goes there looks what it serves.
    near: Option<NodeId>,
    /// The entries of tables that led from a root to a table that was looked at by itself, perhaps that one.
    pub(super) way: Way,
}

/// Entries that lead from a root to a table. As long as they are what they were, this table is where it was, with what is known of it: whatever else becomes of one of
/// these tables, or of what exists of the guest's memory, ends with [`Way::forget`].
#[derive(Default)]
pub(super) struct Way {
    to: Option<NodeId>,
    entries: [(Gpa, u64); DEEPEST],
    count: usize,
}

impl Way {
    fn learn(&mut self, to: NodeId, entries: &[(Gpa, u64)]) {
        (self.to, self.count) = (Some(to), entries.len());
        self.entries[..entries.len()].copy_from_slice(entries);
    }

    /// It is not known any more.
    pub(super) const fn forget(&mut self) {
        self.to = None;
    }

    /// The entries on the way to this table.
    #[inline]
    fn to(&self, to: NodeId) -> Option<&[(Gpa, u64)]> {
        (self.to == Some(to)).then(|| &self.entries[..self.count.min(DEEPEST)])
    }
}

/// How a node is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// Entries that are the same as before are the same.
    Compare,
    /// Every entry is judged: the words on the way to it are others.
    Judge,
}

/// What plays a part of the lowest table below another.
enum Lowest {
    /// Several entries, or none.
    Entries,
    /// One, which is no table and was not read yet.
    One(usize),
    /// One that was a table, and is something else, as it was read, or is not there.
    Other(usize, Option<u64>),
}

pub(super) struct Pass<'a, M: ?Sized> {
    pub(super) shadow: &'a mut Shadow,
    pub(super) memory: &'a M,
    pub(super) budget: &'a Budget,
    pub(super) changes: &'a mut Changes,
}

impl<'a, M: EntryMemory + ?Sized> Pass<'a, M> {
    pub(super) fn new(shadow: &'a mut Shadow, memory: &'a M, budget: &'a Budget, changes: &'a mut Changes) -> Self {
        Self { shadow, memory, budget, changes }
    }

    /// Looks at what is wanted of a root's tables; `wanted` ascends.
    pub(super) fn root(&mut self, root: usize, wanted: &[Wanted]) {
        match self.shadow.roots[root] {
            Some(node) => self.visit(node, wanted, Mode::Compare),
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
                return self.visit(node, &[Wanted::whole(whole)], Mode::Judge);
            }
            self.remove(node);
        }
        match self.create(&below) {
            Ok(node) => self.shadow.roots[root] = node,
            Err(reason) => self.changes.block(whole, reason),
        }
    }

    /// Looks at the entries of all tables among bytes that were written; with [`Mode::Judge`] at those as well that are the same, because they mean something else.
    pub(super) fn written(&mut self, bytes: Span, mode: Mode) {
        if bytes.first / PAGE == bytes.last / PAGE
            && let Some(node) = self.shadow.pages.only_holder(bytes.first / PAGE)
        {
            return self.written_in(node, bytes, mode);
        }
        let (first, last) = (bytes.first / PAGE, bytes.last / PAGE);
        if self.shadow.pages.are_fewer_than(last - first) {
            self.shadow.pages.among(first..=last).into_iter().for_each(|page| self.written_page(page, bytes, mode));
        } else {
            (first..=last).for_each(|page| self.written_page(page, bytes, mode));
        }
    }

    /// The same for what is in one page.
    fn written_page(&mut self, page: u64, bytes: Span, mode: Mode) {
        let mut nodes = std::mem::take(&mut self.shadow.scratch.written);
        self.shadow.pages.holders(page, &mut nodes);
        let here = Span { first: bytes.first.max(page * PAGE), last: bytes.last.min(page * PAGE + (PAGE - 1)) };
        if nodes.len() > 1 {
            // Those that others hang from come first; what they drop is then gone.
            let key = |node: &Node| (u8::MAX - self.shadow.plan.levels[usize::from(node.level)].index_lsb, node.span);
            nodes.sort_by_key(|id| self.shadow.nodes.get(*id).map(key));
        }
        for node in &nodes {
            self.written_in(*node, here, mode);
        }
        nodes.clear();
        self.shadow.scratch.written = nodes;
    }

    #[inline]
    fn written_in(&mut self, id: NodeId, written: Span, mode: Mode) {
        let layout = self.shadow.layout();
        // A node that went meanwhile, or whose number is another's by now, is in other pages.
        let Some(bytes) = self.shadow.nodes.get(id).and_then(|node| node.bytes(layout.bytes.into())) else { return };
        let Some(here) = bytes.intersection(written) else { return };
        if self.shadow.nodes.shared(id).is_some() {
            match mode {
                Mode::Compare => drop(self.look_at_shared(id)),
                Mode::Judge => self.fill(id),
            }
            return;
        }
        let Some(mut node) = self.shadow.nodes.take(id) else { return };
        let place = |address: u64| ((address - bytes.first) >> layout.bytes.trailing_zeros()) as usize;
        let (from, to, whole) = (place(here.first), place(here.last), Wanted::whole(node.span));
        match from == to {
            true => self.one_entry(&mut node, from, &[whole], mode, false),
            false => self.pages_of(&mut node, (from, to), whole, mode, false),
        }
        self.shadow.nodes.put(id, node);
    }

    /// Looks at what is wanted, if tables on the way are not looked at, or are the same, and the table that was looked at last serves all of it; false: nothing was done.
    #[inline]
    pub(super) fn near(&mut self, wanted: &[Wanted]) -> bool {
        // One table at each level serves an IOVA, so that this one is on the way from a root.
        let Some((id, all)) = self.shadow.scratch.near.zip(extent(wanted)) else { return false };
        let is_here = |node: &Node| node.shared.is_none() && node.span.first <= all.first && all.last <= node.span.last;
        let serves = self.shadow.nodes.get(id).is_some_and(is_here);
        let near = serves && (wanted.iter().all(|one| one.leaf_only) || self.way_is_same(id));
        if near {
            match self.only_place(id, all) {
                Some(at) => self.only_entry(id, at, wanted),
                None => self.visit(id, wanted, Mode::Compare),
            }
        }
        near
    }

    /// The place of an entry of a table that serves all of a span by itself, and is no table.
    #[inline]
    fn only_place(&self, id: NodeId, all: Span) -> Option<usize> {
        let node = self.shadow.nodes.get(id)?;
        let at = self.shadow.place(node, all.first);
        (at == self.shadow.place(node, all.last) && !matches!(node.states[at].what(), What::Table(_))).then_some(at)
    }

    #[inline]
    fn only_entry(&mut self, id: NodeId, at: usize, wanted: &[Wanted]) {
        let Some(mut node) = self.shadow.nodes.take(id) else { return };
        self.one_entry(&mut node, at, wanted, Mode::Compare, true);
        self.shadow.nodes.put(id, node);
    }

    /// Whether the entries on the way that was gone last lead from a root to this table, and are what they were.
    #[inline]
    fn way_is_same(&self, to: NodeId) -> bool {
        self.shadow.scratch.way.to(to).is_some_and(|known| self.memory.first_changed(self.shadow.layout(), known).is_none())
    }

    /// Looks at what is wanted of a table, and of what is below it.
    pub(super) fn visit(&mut self, id: NodeId, wanted: &[Wanted], mode: Mode) {
        let is_whole = |node: &Node| matches!(wanted, [one] if one.span.first <= node.span.first && node.span.last <= one.span.last);
        if self.shadow.nodes.get(id).is_some_and(is_whole) {
            return self.visit_all(id, wanted[0], mode);
        }
        let (id, place) = if mode == Mode::Compare { self.lowest(id, wanted) } else { (id, Lowest::Entries) };
        let Some(mut node) = self.shadow.nodes.take(id) else { return };
        match place {
            Lowest::Entries => self.entries_of(&mut node, wanted, mode, true),
            Lowest::One(at) => self.one_entry(&mut node, at, wanted, mode, true),
            Lowest::Other(at, Some(entry)) => self.entry(&mut node, at, entry, wanted, mode, true),
            Lowest::Other(at, None) => self.unreadable(&mut node, at),
        }
        self.shadow.nodes.put(id, node);
    }

    /// Looks at all entries of a table, and at what is below it.
    fn visit_all(&mut self, id: NodeId, wanted: Wanted, mode: Mode) {
        let Some(mut node) = self.shadow.nodes.take(id) else { return };
        let last = node.entries.len() - 1;
        self.pages_of(&mut node, (0, last), wanted, mode, true);
        self.shadow.nodes.put(id, node);
    }

    /// The lowest table below one of which all other entries play no part in what is wanted, as long as the entries on the way are as they were.
    #[inline]
    fn lowest(&mut self, from: NodeId, wanted: &[Wanted]) -> (NodeId, Lowest) {
        let mut id = from;
        let leaf_only = wanted.iter().all(|one| one.leaf_only);
        let Some(all) = extent(wanted) else { return (id, Lowest::Entries) };
        let (entry_bytes, mut lowest) = (u64::from(self.shadow.plan.geometry.entry_bytes), Lowest::Entries);
        // What is read on the way: whose entries, and which.
        let (mut way, mut known, mut count) = ([(id, 0); DEEPEST], [(Gpa(0), 0); DEEPEST], 0);
        while let Some(node) = self.shadow.nodes.get(id) {
            let Some(part) = node.span.intersection(all) else { break };
            let at = self.shadow.place(node, part.first);
            if at != self.shadow.place(node, part.last) {
                break;
            }
            let What::Table(child) = node.states[at].what() else {
                lowest = Lowest::One(at);
                break;
            };
            if !leaf_only {
                let address = node.table + (node.first + at as u64) * entry_bytes;
                // What does not exist any more, or is too deep, is looked at by itself.
                if count == DEEPEST || !self.shadow.map.has_both(address, address + (entry_bytes - 1)) {
                    lowest = Lowest::One(at);
                    break;
                }
                (way[count], known[count]) = ((id, at), (Gpa(address), node.entries[at]));
                count += 1;
            }
            id = child;
        }
        if count > 0
            && let Some((place, entry)) = self.memory.first_changed(self.shadow.layout(), &known[..count])
        {
            let (id, at) = way[place];
            return (id, Lowest::Other(at, entry));
        }
        self.shadow.scratch.near = Some(id);
        if count > 0 && self.shadow.roots.contains(&Some(from)) {
            self.shadow.scratch.way.learn(id, &known[..count]);
        }
        (id, lowest)
    }

    /// Looks at the entries of a table for what is wanted of it, each once; at the tables below that did not move only if `deep`.
    fn entries_of(&mut self, node: &mut Node, wanted: &[Wanted], mode: Mode, deep: bool) {
        let mut rest = within(wanted, node.span);
        let mut next = 0;
        while let [first, ..] = rest {
            let Some(part) = node.span.intersection(first.span) else { return };
            let (from, to) = self.shadow.places(node, part).into_inner();
            let from = from.max(next);
            let run = if to.saturating_sub(from) < LINE { self.run(node, rest) } else { None };
            if from < to && run.is_none() {
                // Its last slot may be another's, too.
                let shared = rest.get(1).is_some_and(|second| self.shadow.place(node, second.span.first) == to);
                next = if shared { to } else { to + 1 };
                self.pages_of(node, (from, next - 1), Wanted { span: part, ..*first }, mode, deep);
                rest = if shared { rest } else { &rest[1..] };
            } else if let Some(run) = run {
                rest = &rest[run.len()..];
                let beyond = rest.first().map_or(node.entries.len(), |second| self.shadow.place(node, second.span.first));
                next = self.many(node, run, next..beyond, mode, deep);
            } else {
                let last = self.shadow.slot(node, from).last;
                let count = count(rest, |one| one.span.first <= last);
                self.one_entry(node, from, &rest[..count], mode, deep);
                // What goes on behind the slot is looked at there.
                rest = if rest[count - 1].span.last.min(node.span.last) <= last { &rest[count..] } else { &rest[count - 1..] };
                next = from + 1;
            }
        }
    }

    #[inline]
    pub(super) fn one_entry(&mut self, node: &mut Node, at: usize, wanted: &[Wanted], mode: Mode, deep: bool) {
        if let What::Table(child) = node.states[at].what()
            && mode == Mode::Compare
            && wanted.iter().all(|one| one.leaf_only)
        {
            return self.visit(child, wanted, mode);
        }
        match self.read_one(node, at) {
            Some(entry) => self.entry(node, at, entry, wanted, mode, deep),
            None => self.unreadable(node, at),
        }
    }

    /// Entries by the page, as they are read; `wanted` has the part of the table that these serve.
    fn pages_of(&mut self, node: &mut Node, (from, to): (usize, usize), wanted: Wanted, mode: Mode, deep: bool) {
        let mut buffer = self.buffer();
        let bytes = u64::from(self.shadow.plan.geometry.entry_bytes);
        let mut at = from;
        while at <= to {
            let address = node.table + (node.first + at as u64) * bytes;
            let count = (((PAGE - address % PAGE) >> bytes.trailing_zeros()) as usize).min(to - at + 1);
            let fresh = &mut buffer.0[..count];
            match self.read(node, at, fresh) {
                Some(changed) => self.compare(node, at, (changed, fresh), wanted, mode, deep),
                None => (at..at + count).for_each(|at| self.unreadable(node, at)),
            }
            at += count;
        }
        self.shadow.scratch.buffers.push(buffer);
    }

    /// Goes through entries that were read, `from` is the place of the first: lines that are `changed` are in `fresh`.
    fn compare(&mut self, node: &mut Node, from: usize, (changed, fresh): (u128, &[u64]), wanted: Wanted, mode: Mode, deep: bool) {
        let plain = mode != Mode::Judge && node.unknown == 0 && (node.tables + node.empties == 0 || !deep);
        let mut lines = if plain { changed } else { u128::MAX >> (u128::BITS as usize - fresh.len().div_ceil(LINE)) };
        while lines != 0 {
            let line = lines.trailing_zeros() as usize;
            lines &= lines - 1;
            let is_new = changed >> line & 1 != 0;
            for (offset, fresh) in fresh.iter().enumerate().skip(line * LINE).take(LINE) {
                let (at, state) = (from + offset, node.states[from + offset]);
                let entry = if is_new { *fresh } else { node.entries[at] };
                if state == State::NOTHING && node.entries[at] == entry && mode != Mode::Judge {
                    continue;
                }
                let slot = self.shadow.slot(node, at).intersection(wanted.span).unwrap_or(wanted.span);
                let here = [Wanted { span: slot, ..wanted }];
                match state.what() {
                    What::Table(child) if mode == Mode::Compare && wanted.leaf_only => self.visit(child, &here, mode),
                    _ => self.entry(node, at, entry, &here, mode, deep),
                }
            }
        }
    }

    pub(super) fn give_back(&mut self, buffer: Box<Buffer>) {
        self.shadow.scratch.buffers.push(buffer);
    }

    pub(super) fn buffer(&mut self) -> Box<Buffer> {
        self.shadow.scratch.buffers.pop().unwrap_or_else(|| Box::new(Buffer([0; BUFFER])))
    }

    /// Reads an entry; none if it is not there.
    #[inline]
    fn read_one(&self, node: &Node, at: usize) -> Option<u64> {
        let layout = self.shadow.layout();
        let address = node.table + (node.first + at as u64) * u64::from(layout.bytes);
        let exists = self.shadow.map.has_both(address, address + (u64::from(layout.bytes) - 1));
        if exists { self.memory.read_entry(Gpa(address), layout).ok() } else { None }
    }

    /// Reads entries within one page, the first of which is at the place `from`, as [`EntryMemory::read_changed`] does; none if they are not there.
    pub(super) fn read(&self, node: &Node, from: usize, fresh: &mut [u64]) -> Option<u128> {
        let layout = self.shadow.layout();
        let address = node.table + (node.first + from as u64) * u64::from(layout.bytes);
        let exists = self.shadow.map.has_both(address, address + (fresh.len() as u64 * u64::from(layout.bytes) - 1));
        let known = &node.entries[from..from + fresh.len()];
        if exists { self.memory.read_changed(Gpa(address), layout, known, fresh).ok() } else { None }
    }
}

/// How many from the first one on are as `is` says.
#[inline]
pub(super) fn count(wanted: &[Wanted], is: impl Fn(&Wanted) -> bool) -> usize {
    wanted.iter().take_while(|one| is(one)).count()
}
