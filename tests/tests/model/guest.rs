//! A guest of any format that changes its tables: what it knows of them, and what it would tell its IOMMU of each change.

use std::collections::{BTreeMap, BTreeSet};

use stagecraft_tests::reference::Run;
use stagecraft_tests::reference::generate::Rng;
use stagecraft_tests::reference::generate::pen::{Child, Pen, Window};
use stagecraft_tests::reference::snapshot::Memory;
use stagecraft_tests::reference::tables::TableConfig;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::machine::{BALLOON, BALLOON_BYTES, SLOT, SLOT_BYTES};

/// Where tables are.
pub const TABLES: Bounds = (0x10_0000, 0x100_0000);
/// As far as a second stage has them.
pub const COVERED: Bounds = (TABLES.0, 0x60_0000);
/// Where those of a second stage are.
pub const SECOND_TABLES: Bounds = (0x100_0000, 0x180_0000);
/// Where pages begin that leaves point to; some of them have tables.
pub const DATA: u64 = 0x80_0000;
/// Nothing is there.
const NOWHERE: u64 = 0x1000_0000;

/// Inclusive.
pub type Bounds = (u64, u64);

/// A leaf, in one slot or repeated in several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Leaf {
    /// The first of its slots.
    first: u64,
    count: u64,
    run: Run,
}

/// A table, which may be linked in several places.
#[derive(Clone, Debug)]
struct Node {
    tree: usize,
    height: u32,
    address: u64,
    /// By slot.
    tables: BTreeMap<u64, Link>,
    leaves: BTreeMap<u64, Leaf>,
    /// What the pen told of the entry that points here.
    word: u64,
}

#[derive(Clone, Copy, Debug)]
struct Link {
    node: usize,
    /// It forbids something to what is behind it, or leaves out a part.
    restricted: bool,
}

/// Something that a walk from some root must not use any more.
#[derive(Clone, Copy, Debug)]
pub struct Stale {
    /// Which set of roots.
    pub root: usize,
    pub iova: Bounds,
    /// No table came or went.
    pub leaf_only: bool,
}

/// A place where mappings are made again and again.
#[derive(Clone, Copy, Debug)]
struct Place {
    tree: usize,
    position: u64,
    /// Further ones are below it.
    down: bool,
}

/// How a mapping is made.
#[derive(Clone, Copy, Debug)]
pub struct Wish {
    pub root: u8,
    pub place: u8,
    pub step: u8,
    pub size: u8,
    pub target: u16,
    pub access: u8,
    pub restricted: bool,
    pub skip: bool,
    pub replace: bool,
}

pub struct Guest {
    pen: Pen,
    memory: GuestMemoryMmap,
    rng: Rng,
    bytes: u64,
    big_endian: bool,
    nodes: BTreeMap<usize, Node>,
    /// Sets of roots, one root for each tree.
    roots: Vec<Vec<usize>>,
    trees: Vec<usize>,
    windows: Vec<Window>,
    places: Vec<Place>,
    next_node: usize,
    tables: Bounds,
    next_address: u64,
    free: Vec<(u64, u64)>,
    /// Tables that hardware may still walk.
    limbo: Vec<(u64, u64)>,
    pages: BTreeSet<u64>,
    /// Since they were taken: what is stale, and what was written.
    stale: Vec<Stale>,
    written: Vec<(u64, u64)>,
    /// What was unmapped: the table, and the leaf.
    gone: Vec<(usize, Leaf)>,
    /// What hardware may have cached of tables leads to something that goes on living elsewhere: a careful guest tells its IOMMU before it goes on.
    pub hurry: bool,
}

impl Guest {
    /// Tables are in `tables`. Mappings are made at the ends of what has IOVAs, at some places between, and at those of `near` that there are.
    pub fn new(config: TableConfig, memory: GuestMemoryMmap, roots: usize, mut rng: Rng, tables: Bounds, near: &[u64]) -> Self {
        let pen = Pen::new(config, Rng::new(rng.number()));
        let windows = pen.windows();
        let mut places = Vec::new();
        for window in &windows {
            let length = window.last - window.first;
            let first = Place { tree: window.tree, position: window.position, down: false };
            let last = Place { position: window.position + length, down: true, ..first };
            let middle = Place { position: window.position + rng.below(length.saturating_add(1).max(1)), ..first };
            let nearby = Place { position: window.position + (rng.below(1 << 32) & length), ..first };
            places.extend([first, last, middle, nearby]);
            let here = near.iter().filter(|iova| (window.first..=window.last).contains(*iova));
            places.extend(here.map(|iova| Place { position: window.position + (iova - window.first), ..first }));
        }
        let trees = pen.trees();
        let mut guest = Self {
            bytes: config.entry_bytes(),
            big_endian: config.big_endian(),
            pen,
            memory,
            rng,
            nodes: BTreeMap::new(),
            roots: Vec::new(),
            windows,
            places,
            next_node: 0,
            tables,
            next_address: tables.0,
            free: Vec::new(),
            limbo: Vec::new(),
            pages: BTreeSet::new(),
            stale: Vec::new(),
            written: Vec::new(),
            gone: Vec::new(),
            hurry: false,
            trees: trees.clone(),
        };
        for _ in 0..roots {
            let root = trees.iter().map(|tree| guest.table(*tree, guest.pen.top(*tree), 0).expect("room for roots")).collect();
            guest.roots.push(root);
        }
        guest
    }

    /// The settings of a set of roots.
    pub fn config(&self, root: usize) -> TableConfig {
        let roots: Vec<u64> = self.roots[root].iter().map(|node| self.nodes[node].address).collect();
        self.pen.with_roots(&roots)
    }

    pub fn roots(&self) -> usize {
        self.roots.len()
    }

    /// Bytes of the smallest page.
    pub fn page(&self) -> u64 {
        self.windows.iter().map(|window| 1 << self.pen.shift(window.tree, 0)).min().expect("a window")
    }

    pub fn windows(&self) -> &[Window] {
        &self.windows
    }

    /// All pages that have or had tables, as they stand in memory.
    pub fn tables(&self) -> Memory {
        let mut memory = Memory::default();
        for page in &self.pages {
            let mut bytes = [0; 4096];
            self.memory.read_slice(&mut bytes, GuestAddress(*page)).expect("tables are in memory");
            memory.pages.insert(*page, bytes.into());
        }
        memory
    }

    /// The guest is in another machine's memory, which has the same.
    pub fn moved(&mut self, memory: GuestMemoryMmap) {
        for page in &self.pages {
            let mut bytes = [0; 4096];
            self.memory.read_slice(&mut bytes, GuestAddress(*page)).expect("tables are in memory");
            memory.write_slice(&bytes, GuestAddress(*page)).expect("tables are in memory");
        }
        self.memory = memory;
    }

    /// IOVAs of every root whose leaves lead to one of these addresses.
    pub fn leading_to(&self, targets: &[Bounds]) -> Vec<Bounds> {
        let mut found = Vec::new();
        for (at, node) in &self.nodes {
            let paths = if node.leaves.is_empty() { Vec::new() } else { self.paths(*at) };
            for leaf in node.leaves.values() {
                let (size, shift) = (leaf.run.size, self.pen.shift(node.tree, node.height));
                for (low, high) in targets {
                    let (first, last) = ((*low).max(leaf.run.address), (*high).min(leaf.run.address + (size - 1)));
                    if first <= last {
                        let part = |base: u64| base + (leaf.first << shift) + (first - leaf.run.address);
                        let iovas = paths.iter().flat_map(|(_, base)| self.iovas(node.tree, (part(*base), part(*base) + (last - first))));
                        found.extend(iovas);
                    }
                }
            }
        }
        found
    }

    pub fn take_stale(&mut self) -> Vec<Stale> {
        std::mem::take(&mut self.stale)
    }

    pub fn take_written(&mut self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.written)
    }

    /// Nothing is cached any more of what was stale: memory of tables that went is used again.
    pub fn settled(&mut self) {
        self.free.append(&mut self.limbo);
        self.hurry = false;
    }

    fn store(&mut self, address: u64, entry: u64) {
        let entry = if self.big_endian { entry.to_be_bytes() } else { entry.to_le_bytes() };
        // A walk reads an entry in one piece.
        if self.bytes == 8 {
            self.memory.store(u64::from_ne_bytes(entry), GuestAddress(address), std::sync::atomic::Ordering::Release).expect("tables are in memory");
        } else {
            let half = if self.big_endian { &entry[4..] } else { &entry[..4] };
            let word = u32::from_ne_bytes(half.try_into().expect("four bytes"));
            self.memory.store(word, GuestAddress(address), std::sync::atomic::Ordering::Release).expect("tables are in memory");
        }
        self.written.push((address, self.bytes));
    }

    /// A table with nothing in it; none if there is no room.
    fn table(&mut self, tree: usize, height: u32, word: u64) -> Option<usize> {
        let address = self.room(tree, height)?;
        let absent = self.pen.absent(height);
        let before = self.written.len();
        for index in 0..self.pen.entries(tree, height) {
            self.store(address + index * self.bytes, absent);
        }
        self.written.truncate(before);
        self.written.push((address, self.pen.entries(tree, height) * self.bytes));
        let node = self.next_node;
        self.next_node += 1;
        self.nodes.insert(node, Node { tree, height, address, tables: BTreeMap::new(), leaves: BTreeMap::new(), word });
        Some(node)
    }

    /// Memory that was given back last is used first.
    fn room(&mut self, tree: usize, height: u32) -> Option<u64> {
        let (size, alignment) = self.pen.table_size(tree, height);
        let fits = |(address, bytes): &(u64, u64)| *bytes == size && address.is_multiple_of(alignment);
        if let Some(place) = self.free.iter().rposition(fits) {
            return Some(self.free.remove(place).0);
        }
        let address = self.next_address.next_multiple_of(alignment);
        if address + size > self.tables.1 {
            return None;
        }
        self.next_address = address + size;
        self.pages.extend((address & !0xfff..address + size).step_by(4096));
        Some(address)
    }

    /// Where a node is, from every root: offsets into what that covers.
    fn paths(&self, wanted: usize) -> Vec<(usize, u64)> {
        let mut paths = Vec::new();
        for (root, nodes) in self.roots.iter().enumerate() {
            nodes.iter().for_each(|node| self.search(*node, 0, wanted, &mut |base| paths.push((root, base))));
        }
        paths
    }

    fn search(&self, at: usize, base: u64, wanted: usize, found: &mut dyn FnMut(u64)) {
        if at == wanted {
            return found(base);
        }
        let node = &self.nodes[&at];
        let shift = self.pen.shift(node.tree, node.height);
        node.tables.iter().for_each(|(index, link)| self.search(link.node, base + (index << shift), wanted, found));
    }

    /// What of a tree's positions has IOVAs.
    fn iovas(&self, tree: usize, (first, last): Bounds) -> Vec<Bounds> {
        let windows = self.windows.iter().filter(|window| window.tree == tree);
        let part = windows.filter_map(|window| {
            let (low, high) = (first.max(window.position), last.min(window.position + (window.last - window.first)));
            (low <= high).then(|| (window.first + (low - window.position), window.first + (high - window.position)))
        });
        part.collect()
    }

    /// What some slots of a table say is not what they said.
    fn changed(&mut self, at: usize, (first, last): Bounds, leaf_only: bool) {
        let tree = self.nodes[&at].tree;
        for (root, base) in self.paths(at) {
            let iovas = self.iovas(tree, (base + first, base + last));
            self.stale.extend(iovas.into_iter().map(|iova| Stale { root, iova, leaf_only }));
        }
    }

    /// Whether something of these slots of a table has IOVAs, wherever the table is linked: what lies before the first IOVA cannot be told.
    fn has_iovas(&self, at: usize, (first, last): Bounds) -> bool {
        let tree = self.nodes[&at].tree;
        self.paths(at).into_iter().all(|(_, base)| !self.iovas(tree, (base + first, base + last)).is_empty())
    }

    /// The slots from `index` on, as offsets into what the table covers.
    fn slots(&self, at: usize, index: u64, count: u64) -> Bounds {
        let node = &self.nodes[&at];
        let shift = self.pen.shift(node.tree, node.height);
        (index << shift, ((index + count) << shift).wrapping_sub(1))
    }

    /// What hardware may have cached of a table and of all below it, as offsets from where the table begins: its leaves, and a page of tables that have none.
    fn extents(&self, at: usize, base: u64, extents: &mut Vec<Bounds>) {
        let node = &self.nodes[&at];
        let shift = self.pen.shift(node.tree, node.height);
        for leaf in node.leaves.values() {
            let first = base + (leaf.first << shift);
            extents.push((first, first + ((leaf.count << shift) - 1)));
        }
        node.tables.iter().for_each(|(index, link)| self.extents(link.node, base + (index << shift), extents));
        if node.leaves.is_empty() && node.tables.is_empty() {
            extents.push((base, base + (self.page() - 1)));
        }
    }

    /// A link in a slot of a table came, went or became another one.
    fn relinked(&mut self, at: usize, index: u64, child: usize) {
        let (first, last) = self.slots(at, index, 1);
        let mut extents = Vec::new();
        self.extents(child, first, &mut extents);
        if extents.len() > 16 || self.rng.percent(50) || !extents.iter().all(|extent| self.has_iovas(at, *extent)) {
            extents = vec![(first, last)];
        }
        extents.into_iter().for_each(|extent| self.changed(at, extent, false));
    }

    fn write_leaf(&mut self, at: usize, leaf: Leaf) {
        let Node { tree, height, address, word, .. } = self.nodes[&at];
        let entry = self.pen.leaf(tree, height, &leaf.run, word);
        for index in leaf.first..leaf.first + leaf.count {
            self.store(address + index * self.bytes, entry);
        }
        self.nodes.get_mut(&at).expect("it is there").leaves.insert(leaf.first, leaf);
    }

    fn write_link(&mut self, at: usize, index: u64, child: usize, restricted: bool) {
        let Node { tree, height, address, .. } = self.nodes[&at];
        let to = Child { height: self.nodes[&child].height, address: self.nodes[&child].address, restricted };
        let (entry, word) = self.pen.pointer(tree, height, to);
        self.store(address + index * self.bytes, entry);
        let node = self.nodes.get_mut(&child).expect("it is there");
        self.hurry |= node.word != word && !node.leaves.is_empty();
        node.word = word;
        self.nodes.get_mut(&at).expect("it is there").tables.insert(index, Link { node: child, restricted });
    }

    fn clear(&mut self, at: usize, index: u64, count: u64) {
        let Node { height, address, .. } = self.nodes[&at];
        let absent = self.pen.absent(height);
        (index..index + count).for_each(|index| self.store(address + index * self.bytes, absent));
    }

    fn reachable(&self, from: usize, found: &mut BTreeSet<usize>) {
        if found.insert(from) {
            self.nodes[&from].tables.values().for_each(|link| self.reachable(link.node, found));
        }
    }

    /// Nothing in some slots leads to `gone` any more: tables that nothing leads to are to be free when nobody can have cached them.
    fn collect(&mut self, gone: &[usize]) {
        let (mut alive, mut below) = (BTreeSet::new(), BTreeSet::new());
        self.roots.iter().flatten().for_each(|root| self.reachable(*root, &mut alive));
        gone.iter().for_each(|gone| self.reachable(*gone, &mut below));
        for node in below {
            if alive.contains(&node) {
                self.hurry = true;
            } else if let Some(node) = self.nodes.remove(&node) {
                self.limbo.push((node.address, self.pen.table_size(node.tree, node.height).0));
            }
        }
    }

    /// The place of a step from a place, for something of `size`.
    fn position(&self, place: u8, step: u8, size: u64) -> (usize, u64) {
        let Place { tree, position, down } = self.places[place as usize % self.places.len()];
        let offset = u64::from(step).saturating_mul(size);
        let position = if down { position.saturating_sub(offset) } else { position.saturating_add(offset) };
        (tree, position & !(size - 1))
    }

    /// Where a page of `size` bytes may be: in memory, in memory that comes and goes, or nowhere.
    fn target(target: u16, size: u64) -> u64 {
        let number = u64::from(target >> 3);
        match target % 8 {
            _ if size > SLOT_BYTES => (number % 2 * SLOT) & !(size - 1),
            0..=4 => (DATA + number * size % 0x100_0000) & !(size - 1),
            5 => (SLOT + number * size % SLOT_BYTES) & !(size - 1),
            6 => (BALLOON + number * size % BALLOON_BYTES) & !(size - 1),
            // Not beyond what any format can say.
            _ => (NOWHERE + number % 16 * size) & !(size - 1),
        }
    }

    /// The table at a height on the way to a position; those that are not there yet are made. None if something else is there.
    fn descend(&mut self, root: u8, (tree, position): (usize, u64), to: u32, restricted: bool, skip: bool) -> Option<(usize, bool)> {
        let which = self.trees.iter().position(|known| *known == tree)?;
        let (mut at, mut is_new) = (self.roots[root as usize % self.roots.len()][which], false);
        loop {
            let height = self.nodes[&at].height;
            if height == to {
                return Some((at, is_new));
            }
            let shift = self.pen.shift(tree, height);
            let (index, rest) = ((position >> shift) % self.pen.entries(tree, height), position & ((1 << shift) - 1));
            let covers = |height: u32| self.pen.shift(tree, height) + self.pen.entries(tree, height).trailing_zeros();
            if self.nodes[&at].leaves.values().any(|leaf| (leaf.first..leaf.first + leaf.count).contains(&index)) {
                return None;
            }
            if let Some(link) = self.nodes[&at].tables.get(&index) {
                at = link.node;
                // Levels that were left out: zeros.
                if self.nodes[&at].height < to || rest >> covers(self.nodes[&at].height) != 0 {
                    return None;
                }
                continue;
            }
            let next = if skip && self.pen.may_skip() && rest >> covers(to) == 0 { to } else { height - 1 };
            let child = self.table(tree, next, 0)?;
            // The first one that is new may restrict.
            self.write_link(at, index, child, restricted && !is_new);
            if !is_new {
                let page = (index << shift) + (rest & !(self.page() - 1));
                self.changed(at, (page, page + (self.page() - 1)), false);
            }
            (at, is_new) = (child, true);
        }
    }

    /// Maps a page where nothing is; what is there becomes the page if it may.
    pub fn map(&mut self, wish: Wish) -> bool {
        let tree = self.places[wish.place as usize % self.places.len()].tree;
        let sizes = self.pen.leaf_sizes(tree);
        let size = sizes[wish.size as usize % sizes.len()];
        let (tree, position) = self.position(wish.place, wish.step, 1 << size);
        let last = position.saturating_add((1 << size) - 1);
        let iovas = self.iovas(tree, (position, last));
        if iovas.is_empty() || iovas.iter().any(|(first, last)| !self.pen.allows(*first, (last - first).saturating_add(1))) {
            return false;
        }
        let height = self.pen.leaf_height(tree, size);
        let Some((at, is_new)) = self.descend(wish.root, (tree, position), height, wish.restricted, wish.skip) else { return false };
        let shift = self.pen.shift(tree, height);
        let (first, count) = ((position >> shift) % self.pen.entries(tree, height), 1 << (size - shift));
        let accesses = self.pen.accesses();
        let run =
            Run { iova: 0, address: Self::target(wish.target, 1 << size), size: 1 << size, access: accesses[wish.access as usize % accesses.len()] };
        let slots = first..first + count;
        let node = &self.nodes[&at];
        let others = node
            .leaves
            .values()
            .any(|leaf| leaf.first < slots.end && slots.start < leaf.first + leaf.count && (leaf.first, leaf.count) != (first, count));
        let tables: Vec<u64> = node.tables.range(slots).map(|(index, _)| *index).collect();
        if others || (node.leaves.contains_key(&first) || !tables.is_empty()) && !wish.replace {
            return false;
        }
        let gone: Vec<usize> = tables.iter().filter_map(|index| self.nodes.get_mut(&at)?.tables.remove(index)).map(|link| link.node).collect();
        self.write_leaf(at, Leaf { first, count, run });
        let bounds = self.slots(at, first, count);
        self.changed(at, bounds, !is_new && gone.is_empty());
        self.collect(&gone);
        true
    }

    /// Maps addresses to themselves, with as few leaves as possible; where there are IOVAs for them.
    pub fn cover(&mut self, root: u8, (first, end): Bounds) {
        let Some(window) = self.windows.iter().find(|window| (window.first..=window.last).contains(&first)).copied() else { return };
        let (sizes, access) = (self.pen.leaf_sizes(window.tree), self.pen.accesses()[0]);
        let mut at = first;
        while at < end && at < window.last {
            let position = window.position + (at - window.first);
            let fits = |size: &&u32| (at | position).is_multiple_of(1 << **size) && at + (1 << **size) <= end;
            let Some(size) = sizes.iter().rev().find(fits).copied() else { return };
            let height = self.pen.leaf_height(window.tree, size);
            let Some((node, _)) = self.descend(root, (window.tree, position), height, false, false) else { return };
            let shift = self.pen.shift(window.tree, height);
            let index = (position >> shift) % self.pen.entries(window.tree, height);
            let run = Run { iova: 0, address: at, size: 1 << size, access };
            self.write_leaf(node, Leaf { first: index, count: 1 << (size - shift), run });
            at += 1 << size;
        }
    }

    /// Maps the smallest page that has an IOVA, where nothing is: whoever is asked for it.
    pub fn serve(&mut self, root: u8, iova: u64, target: u16) -> bool {
        let Some(window) = self.windows.iter().find(|window| (window.first..=window.last).contains(&iova)).copied() else { return false };
        let size = self.pen.leaf_sizes(window.tree)[0];
        let position = (window.position + (iova - window.first)) & !((1 << size) - 1);
        let height = self.pen.leaf_height(window.tree, size);
        let Some((at, is_new)) = self.descend(root, (window.tree, position), height, false, false) else { return false };
        let shift = self.pen.shift(window.tree, height);
        let (first, count) = ((position >> shift) % self.pen.entries(window.tree, height), 1 << (size - shift));
        let slots = first..first + count;
        let mut leaves = self.nodes[&at].leaves.values();
        if leaves.any(|leaf| leaf.first < slots.end && slots.start < leaf.first + leaf.count) {
            return false;
        }
        let run = Run { iova: 0, address: Self::target(target & !7, 1 << size), size: 1 << size, access: self.pen.accesses()[0] };
        self.write_leaf(at, Leaf { first, count, run });
        let bounds = self.slots(at, first, count);
        self.changed(at, bounds, !is_new);
        true
    }

    /// Whether pages may be in these slots of a table, wherever that is linked.
    fn allows(&self, at: usize, (first, last): Bounds) -> bool {
        let tree = self.nodes[&at].tree;
        let iovas = self.paths(at).into_iter().flat_map(|(_, base)| self.iovas(tree, (base + first, base + last)));
        iovas.into_iter().all(|(first, last)| self.pen.allows(first, (last - first).saturating_add(1)))
    }

    /// One of all leaves.
    fn leaf(&self, number: u16) -> Option<(usize, Leaf)> {
        let count: usize = self.nodes.values().map(|node| node.leaves.len()).sum();
        let mut rest = number as usize % count.max(1);
        for (at, node) in &self.nodes {
            if rest < node.leaves.len() {
                return node.leaves.values().nth(rest).map(|leaf| (*at, *leaf));
            }
            rest -= node.leaves.len();
        }
        None
    }

    /// One of all links.
    fn link(&self, number: u16) -> Option<(usize, u64, Link)> {
        let links: Vec<(usize, u64, Link)> =
            self.nodes.iter().flat_map(|(at, node)| node.tables.iter().map(|(index, link)| (*at, *index, *link))).collect();
        links.get(number as usize % links.len().max(1)).copied()
    }

    pub fn unmap(&mut self, number: u16) -> bool {
        let Some((at, leaf)) = self.leaf(number) else { return false };
        self.nodes.get_mut(&at).expect("it is there").leaves.remove(&leaf.first);
        self.gone.push((at, leaf));
        self.clear(at, leaf.first, leaf.count);
        let bounds = self.slots(at, leaf.first, leaf.count);
        self.changed(at, bounds, true);
        true
    }

    /// What was unmapped is mapped again, if its slots are free.
    pub fn again(&mut self, number: u16) -> bool {
        let recent = self.gone.len().min(4);
        let Some(place) = self.gone.len().checked_sub(1 + number as usize % recent.max(1)) else { return false };
        let (at, leaf) = self.gone.remove(place);
        let slots = leaf.first..leaf.first + leaf.count;
        let is_free = self.nodes.get(&at).is_some_and(|node| {
            let mut leaves = node.leaves.values();
            node.tables.range(slots.clone()).next().is_none()
                && !leaves.any(|other| other.first < slots.end && slots.start < other.first + other.count)
        });
        if is_free {
            self.write_leaf(at, leaf);
            let bounds = self.slots(at, leaf.first, leaf.count);
            self.changed(at, bounds, true);
        }
        is_free
    }

    /// Other permissions, or another target, in one step.
    pub fn change(&mut self, number: u16, access: Option<u8>, target: Option<u16>) -> bool {
        let Some((at, mut leaf)) = self.leaf(number) else { return false };
        let accesses = self.pen.accesses();
        if let Some(access) = access {
            leaf.run.access = accesses[access as usize % accesses.len()];
        }
        if let Some(target) = target {
            leaf.run.address = Self::target(target, leaf.run.size);
        }
        self.write_leaf(at, leaf);
        let bounds = self.slots(at, leaf.first, leaf.count);
        self.changed(at, bounds, true);
        true
    }

    /// A large page becomes small ones that say the same.
    pub fn split(&mut self, number: u16) -> bool {
        // Large ones are few.
        let large: Vec<(usize, Leaf)> = (self.nodes.iter())
            .flat_map(|(at, node)| node.leaves.values().map(|leaf| (*at, *leaf)))
            .filter(|(at, leaf)| leaf.count > 1 || self.nodes[at].height > 0)
            .collect();
        let Some((at, leaf)) = large.get(number as usize % large.len().max(1)).copied() else { return false };
        let Node { tree, height, .. } = self.nodes[&at];
        let bounds = self.slots(at, leaf.first, leaf.count);
        let small = |shift: u32, index: u64, first: u64| {
            let size = 1 << shift;
            Leaf { first: first + index, count: 1, run: Run { address: leaf.run.address + index * size, size, ..leaf.run } }
        };
        if leaf.count > 1 {
            self.nodes.get_mut(&at).expect("it is there").leaves.remove(&leaf.first);
            let shift = self.pen.shift(tree, height);
            (0..leaf.count).for_each(|index| self.write_leaf(at, small(shift, index, leaf.first)));
            self.changed(at, bounds, true);
            return true;
        }
        let shift = self.pen.shift(tree, height - 1);
        let count = 1 << (self.pen.shift(tree, height) - shift);
        let possible = self.pen.leaf_sizes(tree).contains(&shift) && self.pen.entries(tree, height - 1) == count;
        let Some(child) = possible.then(|| self.table(tree, height - 1, 0)).flatten() else { return false };
        let before = self.written.len();
        (0..count).for_each(|index| self.write_leaf(child, small(shift, index, 0)));
        // The table is told as a whole.
        self.written.truncate(before);
        self.nodes.get_mut(&at).expect("it is there").leaves.remove(&leaf.first);
        self.write_link(at, leaf.first, child, false);
        self.changed(at, bounds, false);
        true
    }

    /// A large page takes the place of a table: of small ones that continue each other, or of whatever it holds.
    pub fn merge(&mut self, number: u16, target: u16) -> bool {
        let Some((at, index, link)) = self.link(number) else { return false };
        let Node { tree, height, .. } = self.nodes[&at];
        let shift = self.pen.shift(tree, height);
        if !self.pen.leaf_sizes(tree).contains(&shift) || self.pen.leaf_height(tree, shift) != height {
            return false;
        }
        let bounds = self.slots(at, index, 1);
        if !self.allows(at, bounds) {
            return false;
        }
        let first = self.nodes[&link.node].leaves.get(&0).map(|leaf| leaf.run);
        let same = first.filter(|run| run.address.is_multiple_of(1 << shift));
        let run = same.unwrap_or(Run { iova: 0, address: Self::target(target, 1 << shift), size: 0, access: self.pen.accesses()[0] });
        self.nodes.get_mut(&at).expect("it is there").tables.remove(&index);
        self.write_leaf(at, Leaf { first: index, count: 1, run: Run { size: 1 << shift, ..run } });
        self.changed(at, bounds, false);
        self.collect(&[link.node]);
        true
    }

    /// A table goes to another page, and all entries that point to it follow.
    pub fn move_table(&mut self, number: u16) -> bool {
        let Some((_, _, link)) = self.link(number) else { return false };
        let Node { tree, height, address, .. } = self.nodes[&link.node];
        let Some(new) = self.room(tree, height) else { return false };
        let (size, _) = self.pen.table_size(tree, height);
        let mut bytes = vec![0; size as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).expect("tables are in memory");
        self.memory.write_slice(&bytes, GuestAddress(new)).expect("tables are in memory");
        self.written.push((new, size));
        self.limbo.push((address, size));
        self.nodes.get_mut(&link.node).expect("it is there").address = new;
        let parents: Vec<(usize, u64, bool)> = (self.nodes.iter())
            .flat_map(|(at, node)| node.tables.iter().map(|(index, link)| (*at, *index, *link)))
            .filter(|(_, _, other)| other.node == link.node)
            .map(|(at, index, link)| (at, index, link.restricted))
            .collect();
        for (at, index, restricted) in parents {
            self.hurry |= restricted;
            self.write_link(at, index, link.node, false);
            // What the table says is as before: one page is enough to have its entry read again, unless that allows more than before.
            let bounds = self.slots(at, index, 1);
            let page = (bounds.0, bounds.0 + (self.page() - 1));
            if restricted || self.rng.percent(70) || !self.has_iovas(at, page) {
                self.changed(at, bounds, false);
            } else {
                self.changed(at, page, false);
            }
        }
        true
    }

    /// A table is linked at one more place, of any root.
    pub fn share(&mut self, number: u16, root: u8, place: u8, step: u8) -> bool {
        let Some((parent, _, link)) = self.link(number) else { return false };
        let Node { tree, height, .. } = self.nodes[&parent];
        let shift = self.pen.shift(tree, height);
        let (other, position) = self.position(place, step, 1 << shift);
        if other != tree {
            return false;
        }
        let Some((at, _)) = self.descend(root, (tree, position), height, false, false) else { return false };
        let index = (position >> shift) % self.pen.entries(tree, height);
        let node = &self.nodes[&at];
        let taken = node.tables.contains_key(&index) || node.leaves.values().any(|leaf| (leaf.first..leaf.first + leaf.count).contains(&index));
        let bounds = self.slots(at, index, 1);
        if taken || !self.allows(at, bounds) {
            return false;
        }
        self.write_link(at, index, link.node, false);
        self.relinked(at, index, link.node);
        true
    }

    /// A table is linked at one place less.
    pub fn unlink(&mut self, number: u16) -> bool {
        let Some((at, index, link)) = self.link(number) else { return false };
        self.relinked(at, index, link.node);
        self.nodes.get_mut(&at).expect("it is there").tables.remove(&index);
        self.clear(at, index, 1);
        self.collect(&[link.node]);
        true
    }
}
