//! What the engine saw of one guest table, and what changed since.
//!
//! A shadow is a tree with a node for each table of the guest, at each place that it is used. A node has a private copy of the entries as they were last
//! read, and beside each what it stood for. To synchronise is to read again, each entry once and atomically, to compare with the copy, and to look closer
//! at what differs. An entry is used as it was read, so a guest that writes at the same moment gets the translations of some moment, and nothing else.
//!
//! ```text
//!    Everything:  read pages, compare with copies (at the speed of memory), look at entries that differ
//!    some spans:  in ascending order, as one list: one entry per level on the way down to several of them, then the entries of the spans
//!    leaf only:   tables on the way down are taken from the copies
//!    a write:     guest page -> nodes in it -> the entries that were written
//! ```
//!
//! Tables in which there is nothing and that many entries point to are shared by these ([`empty`]), and become nodes when there is something in them.
//!
//! What cannot be followed, because a limit is reached or the format failed, is *blocked*: it counts as absent, is told as such, and is judged again
//! whenever it is read.

mod empty;
mod entry;
mod hooks;
mod hotplug;
mod kind;
mod many;
mod mark;
mod node;
mod pass;
mod replay;
mod spare;
mod words;

pub(in crate::sync) use hooks::Prepared;
pub(in crate::sync) use kind::alike;
pub use node::{Unwatched, Watcher};

use std::fmt;

use crate::memory::{Budget, EntryLayout, EntryMemory, MemoryMap};
use crate::sync::changes::Changes;
use crate::sync::wanted::{Wanted, join, within};
use crate::table::{Format, FormatError, Geometry, Judge, OpenError, Plan};
use crate::{Gpa, Span};
use empty::Empties;
use kind::Kinds;
use node::{Node, NodeId, Nodes, Pages};
use pass::{Mode, Pass, Scratch};
use spare::Spare;
use words::Words;

/// How much a guest may make the engine keep for one address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShadowLimits {
    /// Pages of 4 KiB of tables; a page that is used in several places counts as often, unless there is nothing in it: then twice. Each costs the host 6 KiB, or 12 with small entries.
    pub table_pages: u64,
    /// Entries that are leaves.
    pub leaves: u64,
}

impl Default for ShadowLimits {
    /// Enough for 128 GiB in 4K pages.
    fn default() -> Self {
        Self { table_pages: 1 << 16, leaves: 1 << 25 }
    }
}

/// What a shadow holds at the moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShadowFigures {
    /// Tables, one for each place that they are used at.
    pub tables: u64,
    /// Pages of tables, counted in the same way.
    pub table_pages: u64,
    /// Entries that are leaves.
    pub leaves: u64,
    /// Entries that count as absent because a limit was reached or the format failed.
    pub blocked: u64,
    /// Questions that formats were asked, since the beginning.
    pub questions: u64,
    /// Patterns of entries whose meaning is remembered: such entries cost no question.
    pub patterns: u64,
}

/// The format that a shadow is to be given does not describe its tables.
#[derive(Debug, thiserror::Error)]
pub enum ReopenError {
    /// The format failed.
    #[error("the format failed: {0}")]
    Format(FormatError),
    /// It has another geometry.
    #[error("the format describes tables of another geometry")]
    Geometry,
}

/// What the engine saw of one guest table.
pub struct Shadow {
    plan: Plan,
    judge: Judge,
    kinds: Kinds,
    words: Words,
    nodes: Nodes,
    pages: Pages,
    /// The node of each root, once it was read.
    roots: Vec<Option<NodeId>>,
    map: MemoryMap,
    /// Of the map, where the last leaf pointed to: other leaves point there as well.
    target: Option<Span>,
    limits: ShadowLimits,
    leaves: u64,
    blocked: u64,
    scratch: Scratch,
    spare: Spare,
    empties: Empties,
    /// Questions that formats before this one were asked.
    asked_before: u64,
}

impl fmt::Debug for Shadow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shadow").field("figures", &self.figures()).field("limits", &self.limits).finish_non_exhaustive()
    }
}

impl Shadow {
    /// A shadow that saw nothing yet, of tables that `format` explains. `map` says what exists of the guest's memory; `watcher` hears which pages hold
    /// tables.
    ///
    /// # Errors
    /// The format failed, or describes a table that cannot be.
    pub fn open(mut format: Box<dyn Format>, map: MemoryMap, limits: ShadowLimits, watcher: Box<dyn Watcher>) -> Result<Self, OpenError> {
        let plan = Plan::new(format.geometry().map_err(OpenError::Format)?)?;
        let judge = Judge::new(format, plan.levels.len());
        let (roots, words) = (vec![None; plan.geometry.roots.len()], Words::new(plan.levels.len()));
        Ok(Self {
            plan,
            judge,
            kinds: Kinds::default(),
            words,
            nodes: Nodes::default(),
            pages: Pages::new(watcher),
            roots,
            map,
            target: None,
            limits,
            leaves: 0,
            blocked: 0,
            scratch: Scratch::default(),
            spare: Spare::default(),
            empties: Empties::default(),
            asked_before: 0,
        })
    }

    /// The table's geometry.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.plan.geometry
    }

    /// What is held.
    #[must_use]
    pub fn figures(&self) -> ShadowFigures {
        ShadowFigures {
            tables: self.nodes.len() as u64,
            table_pages: self.pages.count(),
            leaves: self.leaves,
            blocked: self.blocked,
            questions: self.asked_before + self.judge.asked(),
            patterns: self.judge.patterns(),
        }
    }

    /// The guest pages that hold tables, in no order.
    pub fn watched_pages(&self) -> impl Iterator<Item = Gpa> + '_ {
        self.pages.watched()
    }

    /// Reads the tables of `span` again and adds what changed to `changes`. With `leaf_only`, entries that were tables are taken to be the same tables.
    ///
    /// A table that was not there before is read whole. The budget is charged for questions to the format alone: what else there is to do is bounded by
    /// the limits.
    pub fn synchronise<M: EntryMemory + ?Sized>(&mut self, memory: &M, span: Span, leaf_only: bool, budget: &Budget, changes: &mut Changes) {
        self.synchronise_all(memory, &[Wanted { span, leaf_only }], budget, changes);
    }

    /// The same for IOVAs that ascend, in one pass: what serves several of them is looked at once.
    pub(in crate::sync) fn synchronise_all<M: EntryMemory + ?Sized>(
        &mut self,
        memory: &M,
        wanted: &[Wanted],
        budget: &Budget,
        changes: &mut Changes,
    ) {
        self.empties.begin();
        if !Pass::new(self, memory, budget, changes).near(wanted) {
            self.synchronise_roots(memory, wanted, budget, changes);
        }
        Pass::new(self, memory, budget, changes).settle();
        // What is blocked may have room if others need less of it.
        if self.blocked > 0 && wanted == [Wanted::whole(Span::ALL)] && Pass::new(self, memory, budget, changes).gather() {
            self.synchronise_roots(memory, wanted, budget, changes);
            Pass::new(self, memory, budget, changes).settle();
        }
    }

    fn synchronise_roots<M: EntryMemory + ?Sized>(&mut self, memory: &M, wanted: &[Wanted], budget: &Budget, changes: &mut Changes) {
        for root in 0..self.roots.len() {
            if self.plan.geometry.roots[root].ignored == 0 {
                let here = within(wanted, self.root_span(root));
                if !here.is_empty() {
                    Pass::new(self, memory, budget, changes).root(root, here);
                }
                continue;
            }
            let mut canonical = std::mem::take(&mut self.scratch.canonical);
            canonical.clear();
            canonical.extend(wanted.iter().filter_map(|one| Some(Wanted { span: self.part_of_root(root, one.span)?, ..*one })));
            join(&mut canonical);
            if !canonical.is_empty() {
                Pass::new(self, memory, budget, changes).root(root, &canonical);
            }
            self.scratch.canonical = canonical;
        }
    }

    /// `length` bytes of guest memory from `address` on were written: reads the entries among them again, and adds what changed to `changes`.
    ///
    /// The cost is that of one look-up per page, or of going through all pages with tables if those are fewer, and of the entries.
    pub fn table_written<M: EntryMemory + ?Sized>(&mut self, memory: &M, address: Gpa, length: u64, budget: &Budget, changes: &mut Changes) {
        let Some(last) = length.checked_sub(1).map(|rest| address.0.saturating_add(rest)) else { return };
        self.look_at_entries(memory, Span { first: address.0, last }, Mode::Compare, budget, changes);
    }

    fn look_at_entries<M: EntryMemory + ?Sized>(&mut self, memory: &M, bytes: Span, mode: Mode, budget: &Budget, changes: &mut Changes) {
        self.empties.begin();
        let mut pass = Pass::new(self, memory, budget, changes);
        pass.written(bytes, mode);
        pass.settle();
    }

    /// Asks another instance of the same format from now on; blocked entries are judged again when they are read next.
    ///
    /// # Errors
    /// The format failed, or describes other tables. The shadow is then as it was.
    pub fn reopen(&mut self, mut format: Box<dyn Format>) -> Result<(), ReopenError> {
        if format.geometry().map_err(ReopenError::Format)? != self.plan.geometry {
            return Err(ReopenError::Geometry);
        }
        self.judge.replace(format);
        Ok(())
    }

    /// The guest's registers or structures name other roots, or other settings: `format` explains the tables from now on. Everything is read again, and
    /// `changes` has what differs.
    ///
    /// # Errors
    /// The format failed, or describes a table that cannot be. The shadow is then as it was.
    pub fn switch<M: EntryMemory + ?Sized>(
        &mut self,
        format: Box<dyn Format>,
        memory: &M,
        budget: &Budget,
        changes: &mut Changes,
    ) -> Result<(), OpenError> {
        self.switch_to(Prepared::new(format)?, memory, budget, changes);
        Ok(())
    }

    fn root_span(&self, root: usize) -> Span {
        let root = &self.plan.geometry.roots[root];
        Span { first: root.first, last: root.last }
    }

    /// The IOVAs of `span` that a root serves, in the form that the root has them. Where bits are ignored, more rather than less.
    fn part_of_root(&self, index: usize, span: Span) -> Option<Span> {
        let (whole, root) = (self.root_span(index), &self.plan.geometry.roots[index]);
        if root.ignored == 0 {
            return whole.intersection(span);
        }
        let canonical = |iova: u64| iova & !root.ignored | root.first & root.ignored;
        let (first, last) = (canonical(span.first), canonical(span.last));
        if last.checked_sub(first) == Some(span.length_minus_one()) {
            return whole.intersection(Span { first, last });
        }
        Some(whole)
    }

    /// Whether leaves may point to all of `first..=first + beyond`, in one of the map's targets.
    #[inline(always)]
    fn is_target(&mut self, first: u64, beyond: u64) -> bool {
        let has = |target: &Span| target.contains(first) && target.last - first >= beyond;
        self.target.as_ref().is_some_and(has) || {
            self.target = self.find_target(first);
            self.target.as_ref().is_some_and(has)
        }
    }

    #[inline(never)]
    fn find_target(&self, first: u64) -> Option<Span> {
        self.map.target(first)
    }

    /// Where an entry stands.
    #[inline]
    fn address(&self, node: &Node, at: usize) -> Gpa {
        Gpa(node.table + (node.first + at as u64) * u64::from(self.plan.geometry.entry_bytes))
    }

    #[inline]
    fn layout(&self) -> EntryLayout {
        EntryLayout { bytes: self.plan.geometry.entry_bytes, order: self.plan.geometry.order }
    }

    /// A node for a table of kind `level` whose entries `exists` exist; none of them was read. None: there is no room, or nothing to keep.
    fn new_node(&mut self, level: u8, table: u64, base: u64, inherited: u64, within: Span, exists: (u64, u64)) -> Option<Box<Node>> {
        let plan = &self.plan.levels[usize::from(level)];
        let lsb = plan.index_lsb;
        let first = ((within.first - base) >> lsb).max(exists.0);
        let last = ((within.last - base) >> lsb).min(exists.1).min(plan.entries() - 1);
        let mut count = last.checked_sub(first)? + 1;
        // A table at the end of all addresses may be longer than what is left.
        let bytes = u64::from(self.plan.geometry.entry_bytes);
        count = count.min((u64::MAX - table.checked_add(first * bytes)?) / bytes);
        if count == 0 {
            return None;
        }
        let span = Span {
            first: within.first.max(base + (first << lsb)),
            last: within.last.min(Span::of_log2(base + ((first + count - 1) << lsb), lsb).last),
        };
        let (entries, states) = self.spare.take(count as usize, self.nodes.len());
        Some(Box::new(Node {
            level,
            table,
            base,
            inherited,
            first,
            span,
            entries,
            states,
            tables: 0,
            unknown: count as u32,
            empties: 0,
            shared: None,
        }))
    }
}

/// Whether tables of one geometry can be compared with those of the other, entry by entry.
fn same_shape(one: &Geometry, other: &Geometry) -> bool {
    let rooted = one.roots.iter().zip(&other.roots).all(|(one, other)| (one.first, one.last, one.level) == (other.first, other.last, other.level));
    let entries =
        (one.entry_bytes, one.order, one.output_bits, one.privileged) == (other.entry_bytes, other.order, other.output_bits, other.privileged);
    one.roots.len() == other.roots.len() && rooted && entries && one.levels == other.levels
}
