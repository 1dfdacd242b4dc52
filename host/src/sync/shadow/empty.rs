//! Tables in which there is nothing, and which many entries share.
//!
//! Where a table entry has no valid bit, drivers fill the slots that they do not use with pointers to one empty table, at each level another one. With a node for each
//! place that such a table is used at there would be as many nodes as the product of the slots. The first place has its node like any other; from the second on, entries
//! that point to the same table share one copy of it, which is in no place of its own, as long as there is nothing in it: no leaf, and no table but such ones.
//!
//! The copy is compared whenever the guest's table may have changed: when its page is written, and when anybody looks at an entry that shares it, once in each
//! look. Should there be something in it, then every entry that shares it gets a table of its own when the look is over, as far as the limits allow.

use std::collections::HashMap;
use std::ops::ControlFlow;

use crate::Span;
use crate::memory::{EntryMemory, LINE, PAGE};
use crate::sync::shadow::Shadow;
use crate::sync::shadow::entry::{Below, Judged};
use crate::sync::shadow::node::{Node, NodeId, Pages, Shared, State, What};
use crate::sync::shadow::pass::Pass;

/// All that decides what is in a table: level, address, the format's word, first entry that exists, how many.
type Key = (u8, u64, u64, u64, u64);

/// Tables of one page that are looked at for one that is the same.
const NEIGHBOURS: usize = 16;

/// The tables that are shared.
#[derive(Debug, Default)]
pub(super) struct Empties {
    by_key: HashMap<Key, NodeId>,
    /// Counts looks at the guest's tables.
    look: u64,
    /// There is something in one that entries still share.
    full: bool,
}

impl Empties {
    /// A look begins.
    pub(super) const fn begin(&mut self) {
        self.look += 1;
    }

    pub(super) fn is_none(&self) -> bool {
        self.by_key.is_empty()
    }

    /// The format's answers are others: what there is is not shared with more entries.
    pub(super) fn forget(&mut self) {
        self.by_key.clear();
    }
}

fn key(node: &Node) -> Key {
    (node.level, node.table, node.inherited, node.first, node.entries.len() as u64)
}

impl Shadow {
    /// What a table is, if entries may share it: wherever it stands, all of it is in reach.
    fn key(&self, below: &Below) -> Option<Key> {
        let plan = &self.plan.levels[usize::from(below.level)];
        if below.within != Span::of_log2(below.base, plan.index_lsb + plan.index_bits) {
            return None;
        }
        let (first, last) = (below.exists.0, below.exists.1.min(plan.entries() - 1));
        below.table.checked_add((last + 1) * u64::from(self.plan.geometry.entry_bytes))?;
        Some((below.level, below.table, below.inherited, first, (last + 1).checked_sub(first).filter(|count| *count > 0)?))
    }

    /// Tells `each` the IOVAs of entries that share a table, until it says false.
    pub(super) fn shared_by(&self, id: NodeId, each: &mut dyn FnMut(Span) -> bool) -> ControlFlow<()> {
        for (other, node) in self.nodes.iter_with_ids().filter(|(_, node)| node.empties > 0) {
            for at in (0..node.states.len()).filter(|at| node.states[*at].what() == What::Empty(id)) {
                if node.shared.is_some() {
                    self.shared_by(other, each)?;
                    break;
                }
                if !each(self.slot(node, at)) {
                    return ControlFlow::Break(());
                }
            }
        }
        ControlFlow::Continue(())
    }
}

impl<M: EntryMemory + ?Sized> Pass<'_, M> {
    /// The table that is shared by entries that point to `below`, if there is one, and there is still nothing in it.
    pub(super) fn known_empty(&mut self, below: &Below) -> Option<NodeId> {
        if self.shadow.empties.is_none() {
            return None;
        }
        let id = *self.shadow.empties.by_key.get(&self.shadow.key(below)?)?;
        self.is_still_empty(id).then_some(id)
    }

    /// The same; a table that is in another place already is shared from now on if there is nothing in it.
    pub(super) fn empty(&mut self, below: &Below) -> Option<NodeId> {
        if let Some(known) = self.known_empty(below) {
            return Some(known);
        }
        let key = self.shadow.key(below)?;
        let entry_bytes = u64::from(self.shadow.plan.geometry.entry_bytes);
        let same = |id: NodeId| self.shadow.nodes.get(id).is_some_and(|node| node.shared.is_none() && self::key(node) == key);
        let page = (below.table + key.3 * entry_bytes) / PAGE;
        if !self.shadow.pages.some_holders(page).take(NEIGHBOURS).any(same) {
            return None;
        }
        let plan = &self.shadow.plan.levels[usize::from(below.level)];
        let anywhere = Span::of_log2(0, plan.index_lsb + plan.index_bits);
        let mut node = self.shadow.new_node(below.level, below.table, 0, below.inherited, anywhere, below.exists)?;
        let bytes = node.bytes(entry_bytes)?;
        if self.shadow.pages.count() + Pages::needed(bytes) > self.shadow.limits.table_pages {
            return None;
        }
        node.shared = Some(Shared { users: 0, look: self.shadow.empties.look, full: false });
        let id = self.shadow.nodes.insert(node)?;
        // Its pages are watched already.
        self.shadow.pages.add(bytes, id);
        if !self.read_shared(id) {
            self.remove(id);
            return None;
        }
        self.shadow.empties.by_key.insert(key, id);
        Some(id)
    }

    /// One more entry shares a table.
    pub(super) fn share(&mut self, id: NodeId) -> State {
        if let Some(shared) = self.shadow.nodes.shared(id) {
            shared.users += 1;
        }
        State::empty(id)
    }

    /// An entry that shared a table does not any more.
    pub(super) fn unshare(&mut self, id: NodeId) {
        let Some(shared) = self.shadow.nodes.shared(id) else { return };
        shared.users -= 1;
        if shared.users == 0 {
            self.forget_key(id);
            self.remove(id);
        }
    }

    /// After there was something in a table that was shared, and is not any more: tables of one address in which there is nothing share one again. Called
    /// where everything was looked at and something is blocked, perhaps by these. False: there are none.
    pub(super) fn gather(&mut self) -> bool {
        // Those below come first: a table is empty once it leads to none of its own.
        let levels = self.shadow.plan.levels.len();
        self.shadow.pages.are_shared() && (0..levels).take_while(|_| self.gather_once()).count() > 0
    }

    fn gather_once(&mut self) -> bool {
        let (mut next, mut gathered) = (NodeId(0), false);
        while let Some(id) = self.shadow.nodes.next(&mut next) {
            let Some(mut node) = self.shadow.nodes.take(id) else { continue };
            for at in 0..if node.tables > 0 && node.shared.is_none() { node.states.len() } else { 0 } {
                let What::Table(child) = node.states[at].what() else { continue };
                if !self.is_one_of_several(child) {
                    continue;
                }
                let (entry, slot) = (node.entries[at], self.shadow.slot(&node, at));
                self.drop_entry(&mut node, at);
                let judged = self.judge(&node, at, entry, slot);
                self.add(&mut node, at, slot, judged);
                gathered |= matches!(node.states[at].what(), What::Empty(_));
            }
            self.shadow.nodes.put(id, node);
        }
        gathered
    }

    /// Whether there is nothing in a table, and it is used in another place as well.
    fn is_one_of_several(&self, id: NodeId) -> bool {
        let Some(node) = self.shadow.nodes.get(id).filter(|node| node.tables == 0 && node.unknown == 0) else { return false };
        let nothing = |state: &State| matches!(state.what(), What::Nothing | What::Empty(_));
        let page = (node.table + node.first * u64::from(self.shadow.plan.geometry.entry_bytes)) / PAGE;
        let other = |other: NodeId| other != id && self.shadow.nodes.get(other).is_some_and(|other| key(other) == key(node));
        self.shadow.pages.some_holders(page).take(NEIGHBOURS).any(other) && node.states.iter().all(nothing)
    }

    fn forget_key(&mut self, id: NodeId) {
        if let Some(key) = self.shadow.nodes.get(id).map(key)
            && self.shadow.empties.by_key.get(&key) == Some(&id)
        {
            self.shadow.empties.by_key.remove(&key);
        }
    }

    /// Whether there is still nothing in a table that is shared. It is read once in each look.
    pub(super) fn is_still_empty(&mut self, id: NodeId) -> bool {
        match self.shadow.nodes.shared(id) {
            Some(shared) if shared.full => false,
            Some(shared) if shared.look == self.shadow.empties.look => true,
            Some(_) => self.look_at_shared(id),
            None => false,
        }
    }

    /// Reads a table that is shared again; false: there is something in it.
    pub(super) fn look_at_shared(&mut self, id: NodeId) -> bool {
        let look = self.shadow.empties.look;
        let empty = self.read_shared(id);
        if let Some(shared) = self.shadow.nodes.shared(id) {
            shared.look = look;
        }
        if !empty {
            self.fill(id);
        }
        empty
    }

    /// There is something in a table that is shared, or may be: nothing else is to share it, and what does is told when the look is over.
    pub(super) fn fill(&mut self, id: NodeId) {
        self.forget_key(id);
        if let Some(shared) = self.shadow.nodes.shared(id) {
            self.shadow.empties.full = true;
            shared.full = true;
        }
    }

    /// Makes the copy of a table equal, as long as there is nothing in it; false: there is something.
    fn read_shared(&mut self, id: NodeId) -> bool {
        let Some(mut node) = self.shadow.nodes.take(id) else { return false };
        let mut buffer = self.buffer();
        let bytes = u64::from(self.shadow.plan.geometry.entry_bytes);
        let (mut at, mut empty) = (0, true);
        while empty && at < node.entries.len() {
            let address = node.table + (node.first + at as u64) * bytes;
            let count = (((PAGE - address % PAGE) >> bytes.trailing_zeros()) as usize).min(node.entries.len() - at);
            match self.read(&node, at, &mut buffer.0[..count]) {
                Some(changed) => empty = self.judge_shared(&mut node, at, changed, &buffer.0[..count]),
                None => (at..at + count).for_each(|at| self.unreadable(&mut node, at)),
            }
            at += count;
        }
        self.give_back(buffer);
        self.shadow.nodes.put(id, node);
        empty
    }

    /// The same for entries of one page, which begin at the place `from`.
    fn judge_shared(&mut self, node: &mut Node, from: usize, changed: u128, fresh: &[u64]) -> bool {
        for (offset, fresh) in fresh.iter().enumerate() {
            let at = from + offset;
            let entry = if changed >> (offset / LINE) & 1 != 0 { *fresh } else { node.entries[at] };
            if entry == node.entries[at] {
                match node.states[at].what() {
                    What::Nothing => continue,
                    What::Empty(below) if self.is_still_empty(below) => continue,
                    _ => {}
                }
            }
            let slot = self.shadow.slot(node, at);
            let state = match self.judge(node, at, entry, slot) {
                Judged::Plain(State::NOTHING) => State::NOTHING,
                Judged::Table(below) => match self.known_empty(&below) {
                    Some(below) => self.share(below),
                    None => return false,
                },
                Judged::Plain(_) | Judged::Blocked(_) => return false,
            };
            self.drop_entry(node, at);
            node.entries[at] = entry;
            node.set(at, state);
        }
        true
    }

    /// A look is over: entries that share a table in which there is something now get tables of their own.
    #[inline]
    pub(super) fn settle(&mut self) {
        while std::mem::take(&mut self.shadow.empties.full) {
            self.settle_once();
        }
    }

    #[cold]
    #[inline(never)]
    fn settle_once(&mut self) {
        let mut next = NodeId(0);
        while let Some(id) = self.shadow.nodes.next(&mut next) {
            let Some(mut node) = self.shadow.nodes.take(id) else { continue };
            let mut leads_there = false;
            for at in 0..if node.empties > 0 { node.states.len() } else { 0 } {
                let What::Empty(below) = node.states[at].what() else { continue };
                if !self.shadow.nodes.shared(below).is_some_and(|shared| shared.full) {
                    continue;
                }
                if node.shared.is_some() {
                    leads_there = true;
                    break;
                }
                let (entry, slot) = (node.entries[at], self.shadow.slot(&node, at));
                self.drop_entry(&mut node, at);
                let judged = self.judge(&node, at, entry, slot);
                self.add(&mut node, at, slot, judged);
            }
            let was_full = node.shared.as_ref().is_some_and(|shared| shared.full);
            self.shadow.nodes.put(id, node);
            if leads_there && !was_full {
                self.fill(id);
            }
        }
    }
}
