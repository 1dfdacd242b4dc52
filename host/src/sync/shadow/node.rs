//! The tree of tables that the engine saw, and the guest pages that hold them.

use std::collections::hash_map::{Entry, RandomState};
use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher, Hasher};

use crate::memory::PAGE;
use crate::{Gpa, Span};

/// Which node of a shadow. Used again when the node is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct NodeId(pub(super) u32);

/// What an entry stood for when it was last seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct State(u32);

/// The same, unpacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// Nothing is mapped, or requests fault.
    Nothing,
    /// It was not read, or not judged: it counts as absent, and is judged whenever it is read.
    Unknown,
    /// A table.
    Table(NodeId),
    /// A table in which there is nothing, and which other entries share.
    Empty(NodeId),
    /// A leaf of this kind.
    Leaf(u32),
}

impl State {
    pub(super) const NOTHING: Self = Self(0);
    pub(super) const UNKNOWN: Self = Self(1);
    /// Unknown because a limit was reached or the format failed.
    pub(super) const BLOCKED: Self = Self(1 << 2 | 1);
    /// Kinds of leaves and nodes are numbered below this.
    pub(super) const MOST: u32 = (1 << 30) - Self::SHARED;
    /// Above what else an entry can be that is neither a table nor a leaf.
    const SHARED: u32 = 2;

    pub(super) const fn table(id: NodeId) -> Self {
        Self(id.0 << 2 | 2)
    }

    pub(super) const fn empty(id: NodeId) -> Self {
        Self((id.0 + Self::SHARED) << 2 | 1)
    }

    pub(super) const fn leaf(kind: u32) -> Self {
        Self(kind << 2 | 3)
    }

    #[inline]
    pub(super) const fn what(self) -> What {
        match self.0 & 3 {
            0 => What::Nothing,
            1 if self.0 >> 2 < Self::SHARED => What::Unknown,
            1 => What::Empty(NodeId((self.0 >> 2) - Self::SHARED)),
            2 => What::Table(NodeId(self.0 >> 2)),
            _ => What::Leaf(self.0 >> 2),
        }
    }
}

/// What is known of a table in which there is nothing and which several entries share.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shared {
    /// How many entries share it.
    pub(super) users: u64,
    /// The look that it was read in last.
    pub(super) look: u64,
    /// There is something in it.
    pub(super) full: bool,
}

/// One table at one place in the address space. A table that is used twice has two nodes, unless there is nothing in it.
#[derive(Debug)]
pub(super) struct Node {
    /// Kind of table.
    pub(super) level: u8,
    /// Address of entry 0 of the table.
    pub(super) table: u64,
    /// IOVA of entry 0.
    pub(super) base: u64,
    /// The format's word.
    pub(super) inherited: u64,
    /// Index of the first entry that is kept: others do not exist, or are out of reach.
    pub(super) first: u64,
    /// The IOVAs that the entries serve.
    pub(super) span: Span,
    /// The entries as they were last read.
    pub(super) entries: Box<[u64]>,
    /// What they stand for.
    pub(super) states: Box<[State]>,
    /// How many of them are tables.
    pub(super) tables: u32,
    /// How many of them are not known.
    pub(super) unknown: u32,
    /// How many of them share tables in which there is nothing.
    pub(super) empties: u32,
    /// Entries share this table, and it has no place: IOVAs begin at zero.
    pub(super) shared: Option<Shared>,
}

impl Node {
    /// Bytes of the table that are kept: address of the first, and how many. Cut at the end of all addresses.
    pub(super) fn bytes(&self, entry_bytes: u64) -> Option<Span> {
        let first = self.table.checked_add(self.first * entry_bytes)?;
        Some(Span { first, last: first.saturating_add(self.entries.len() as u64 * entry_bytes - 1) })
    }

    /// Sets what an entry stands for, and counts.
    #[inline]
    pub(super) fn set(&mut self, at: usize, state: State) {
        match self.states[at].what() {
            What::Table(_) => self.tables -= 1,
            What::Empty(_) => self.empties -= 1,
            What::Unknown => self.unknown -= 1,
            What::Nothing | What::Leaf(_) => {}
        }
        match state.what() {
            What::Table(_) => self.tables += 1,
            What::Empty(_) => self.empties += 1,
            What::Unknown => self.unknown += 1,
            What::Nothing | What::Leaf(_) => {}
        }
        self.states[at] = state;
    }
}

/// All nodes. One that is being looked at is taken out and put back.
#[derive(Debug, Default)]
pub(super) struct Nodes {
    slots: Vec<Option<Box<Node>>>,
    free: Vec<u32>,
}

impl Nodes {
    pub(super) fn insert(&mut self, node: Box<Node>) -> Option<NodeId> {
        if let Some(id) = self.free.pop() {
            self.slots[id as usize] = Some(node);
            return Some(NodeId(id));
        }
        let id = u32::try_from(self.slots.len()).ok().filter(|id| *id < State::MOST)?;
        self.slots.push(Some(node));
        Some(NodeId(id))
    }

    #[inline]
    pub(super) fn get(&self, id: NodeId) -> Option<&Node> {
        self.slots.get(id.0 as usize)?.as_deref()
    }

    #[inline]
    pub(super) fn take(&mut self, id: NodeId) -> Option<Box<Node>> {
        self.slots.get_mut(id.0 as usize)?.take()
    }

    #[inline]
    pub(super) fn put(&mut self, id: NodeId, node: Box<Node>) {
        if let Some(slot) = self.slots.get_mut(id.0 as usize) {
            *slot = Some(node);
        }
    }

    /// The id of a node that was taken out and will not come back.
    pub(super) fn forget(&mut self, id: NodeId) {
        self.free.push(id.0);
    }

    /// Those that are not taken out, in no order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Node> {
        self.slots.iter().filter_map(|slot| slot.as_deref())
    }

    /// The same, with what they are called.
    pub(super) fn iter_with_ids(&self) -> impl Iterator<Item = (NodeId, &Node)> {
        self.slots.iter().enumerate().filter_map(|(id, slot)| Some((NodeId(id as u32), slot.as_deref()?)))
    }

    /// The first from `from` on, which then is the one behind it: for going through all while they change.
    pub(super) fn next(&self, from: &mut NodeId) -> Option<NodeId> {
        let place = self.slots.iter().skip(from.0 as usize).position(Option::is_some)?;
        let id = NodeId(from.0 + place as u32);
        *from = NodeId(id.0 + 1);
        Some(id)
    }

    /// What is known of a table that is shared.
    pub(super) fn shared(&mut self, id: NodeId) -> Option<&mut Shared> {
        self.slots.get_mut(id.0 as usize)?.as_mut()?.shared.as_mut()
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

/// Hears which guest pages hold tables.
///
/// `watch` is called when the first table comes to a page, before it is read; `unwatch` when the last one has left it. Between the two the page's writes
/// are to be told with [`Shadow::table_written`](super::Shadow::table_written). Pages are of 4 KiB.
pub trait Watcher: Send {
    /// A table is in this page now.
    fn watch(&mut self, page: Gpa);
    /// None is any more.
    fn unwatch(&mut self, page: Gpa);
}

/// For guests that announce everything: nobody watches.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unwatched;

impl Watcher for Unwatched {
    fn watch(&mut self, _: Gpa) {}
    fn unwatch(&mut self, _: Gpa) {}
}

/// The nodes whose tables are in a page, even in part.
#[derive(Debug)]
enum Holders {
    One(NodeId),
    Many(BTreeSet<NodeId>),
}

/// Hashes page numbers by one multiplication, with a key that a guest cannot know: it cannot choose pages that fall together.
#[derive(Clone)]
struct PageHashes {
    key: u64,
}

impl Default for PageHashes {
    fn default() -> Self {
        Self { key: RandomState::new().hash_one(0_u64) }
    }
}

impl BuildHasher for PageHashes {
    type Hasher = PageHash;

    fn build_hasher(&self) -> PageHash {
        PageHash(self.key)
    }
}

struct PageHash(u64);

impl Hasher for PageHash {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64((*byte).into()));
    }

    fn write_u64(&mut self, number: u64) {
        let product = u128::from(self.0 ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835);
        self.0 = (product >> 64) as u64 ^ product as u64;
    }
}

/// Guest pages that hold tables.
pub(super) struct Pages {
    holders: HashMap<u64, Holders, PageHashes>,
    watcher: Box<dyn Watcher>,
    /// A page for each node whose table is in it.
    count: u64,
}

impl std::fmt::Debug for Pages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pages").field("pages", &self.holders.len()).field("count", &self.count).finish_non_exhaustive()
    }
}

/// Pages that `bytes` are in, as numbers.
fn pages_of(bytes: Span) -> std::ops::RangeInclusive<u64> {
    bytes.first / PAGE..=bytes.last / PAGE
}

impl Pages {
    pub(super) fn new(watcher: Box<dyn Watcher>) -> Self {
        Self { holders: HashMap::default(), watcher, count: 0 }
    }

    /// Tells another watcher from now on, which knows what was told to the one before.
    pub(super) fn exchange_watcher(&mut self, watcher: Box<dyn Watcher>) -> Box<dyn Watcher> {
        std::mem::replace(&mut self.watcher, watcher)
    }

    pub(super) fn add(&mut self, bytes: Span, node: NodeId) {
        for page in pages_of(bytes) {
            self.count += 1;
            match self.holders.entry(page) {
                Entry::Vacant(vacant) => {
                    vacant.insert(Holders::One(node));
                    self.watcher.watch(Gpa(page * PAGE));
                }
                Entry::Occupied(mut occupied) => match occupied.get_mut() {
                    Holders::One(other) => {
                        let both = BTreeSet::from([*other, node]);
                        occupied.insert(Holders::Many(both));
                    }
                    Holders::Many(nodes) => {
                        nodes.insert(node);
                    }
                },
            }
        }
    }

    pub(super) fn remove(&mut self, bytes: Span, node: NodeId) {
        self.remove_except(bytes, None, node);
    }

    /// A node's table is somewhere else now. Pages that it was in and is in stay watched.
    pub(super) fn replace(&mut self, before: Option<Span>, after: Option<Span>, node: NodeId) {
        let inside = |bytes: Option<Span>, page: u64| bytes.is_some_and(|bytes| pages_of(bytes).contains(&page));
        for page in after.into_iter().flat_map(pages_of).filter(|page| !inside(before, *page)) {
            self.add(Span::of_log2(page * PAGE, PAGE.trailing_zeros() as u8), node);
        }
        if let Some(before) = before {
            self.remove_except(before, after, node);
        }
    }

    fn remove_except(&mut self, bytes: Span, except: Option<Span>, node: NodeId) {
        for page in pages_of(bytes).filter(|page| !except.is_some_and(|except| pages_of(except).contains(page))) {
            let Entry::Occupied(mut occupied) = self.holders.entry(page) else { continue };
            self.count -= 1;
            let last = match occupied.get_mut() {
                Holders::One(_) => true,
                Holders::Many(nodes) => {
                    nodes.remove(&node);
                    nodes.is_empty()
                }
            };
            if last {
                occupied.remove();
                self.watcher.unwatch(Gpa(page * PAGE));
            }
        }
    }

    /// Nodes whose tables are in this page.
    pub(super) fn holders(&self, page: u64, nodes: &mut Vec<NodeId>) {
        match self.holders.get(&page) {
            None => {}
            Some(Holders::One(node)) => nodes.push(*node),
            Some(Holders::Many(many)) => nodes.extend(many),
        }
    }

    /// Whether fewer pages have tables than this.
    #[inline]
    pub(super) fn are_fewer_than(&self, pages: u64) -> bool {
        (self.holders.len() as u64) < pages
    }

    /// Those of some pages that have tables, ascending.
    pub(super) fn among(&self, pages: std::ops::RangeInclusive<u64>) -> Vec<u64> {
        let mut found: Vec<u64> = self.holders.keys().filter(|page| pages.contains(page)).copied().collect();
        found.sort_unstable();
        found
    }

    /// The nodes of one page, in no order that means anything.
    pub(super) fn some_holders(&self, page: u64) -> impl Iterator<Item = NodeId> + '_ {
        let (one, many) = match self.holders.get(&page) {
            None => (None, None),
            Some(Holders::One(node)) => (Some(*node), None),
            Some(Holders::Many(many)) => (None, Some(many)),
        };
        one.into_iter().chain(many.into_iter().flatten().copied())
    }

    /// The node whose table is in this page, if there is one only.
    #[inline]
    pub(super) fn only_holder(&self, page: u64) -> Option<NodeId> {
        match self.holders.get(&page) {
            Some(Holders::One(node)) => Some(*node),
            _ => None,
        }
    }

    /// Whether there are two nodes in some page.
    pub(super) fn are_shared(&self) -> bool {
        self.count > self.holders.len() as u64
    }

    /// Pages of tables, each as often as there are nodes in it.
    pub(super) const fn count(&self) -> u64 {
        self.count
    }

    /// The pages, in no order.
    pub(super) fn watched(&self) -> impl Iterator<Item = Gpa> + '_ {
        self.holders.keys().map(|page| Gpa(page * PAGE))
    }

    /// Pages that `bytes` take.
    pub(super) const fn needed(bytes: Span) -> u64 {
        bytes.last / PAGE - bytes.first / PAGE + 1
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        for page in self.holders.keys() {
            self.watcher.unwatch(Gpa(page * PAGE));
        }
    }
}
