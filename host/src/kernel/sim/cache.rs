//! The IOTLB and the walk caches of a unit.
//!
//! They keep what they saw until an invalidation covers it, and never evict: a forgotten invalidation is a wrong DMA every time, not once in a while.
//! Where entries of different sizes cover an IOVA, the one that was there first is the smaller one, and wins. What is not present is not remembered:
//! none of the stages here may (VT-d's caching mode is for the second stage, which is the kernel's own).

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, RwLock};

use super::lock::{read, write};
use super::walk::context::FirstStage;
use super::walk::{Context, Leaf, Table};
use crate::Span;

/// An address space, as cached entries are tagged with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Space {
    /// The nested page table (VT-d) or the vIOMMU.
    pub(super) owner: u64,
    /// The guest's domain id (AMD), else 0.
    pub(super) domain: u16,
    /// ASID, PASID or PSCID; [`Space::GLOBAL`] holds what is valid in all of an owner's spaces.
    pub(super) tag: u32,
}

impl Space {
    pub(super) const GLOBAL: u32 = u32::MAX;

    pub(super) fn global(self) -> Self {
        Self { tag: Self::GLOBAL, ..self }
    }
}

#[derive(Debug, Default)]
struct Entries {
    /// Bit n: there may be leaves of `2^n` bytes.
    sizes: u64,
    leaves: HashMap<(u8, u64), Leaf>,
    /// Bit n: there may be tables that cover `2^n` bytes.
    table_sizes: u64,
    /// By what the table covers: log2 of the size, and IOVA in such units.
    tables: HashMap<(u8, u64), Table>,
}

/// What a context structure was found to say, by device and PASID.
pub(super) type ContextKey = (u64, Option<u32>);

/// All caches of a unit.
#[derive(Debug)]
pub(super) struct Caches {
    limit: usize,
    count: AtomicUsize,
    spaces: RwLock<HashMap<Space, Entries>>,
    /// Each with what led to it.
    contexts: RwLock<HashMap<ContextKey, (FirstStage, Arc<Context>)>>,
}

/// The caches are at their limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Full;

impl Caches {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, count: AtomicUsize::new(0), spaces: RwLock::default(), contexts: RwLock::default() }
    }

    /// Entries of all kinds.
    pub(super) fn entries(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    pub(super) fn leaf(&self, space: Space, iova: u64) -> Option<Leaf> {
        let spaces = read(&self.spaces);
        [space, space.global()].iter().find_map(|space| {
            let entries = spaces.get(space)?;
            sizes(entries.sizes).find_map(|size| entries.leaves.get(&(size, iova >> size)).copied())
        })
    }

    /// The table nearest to the leaf.
    pub(super) fn table(&self, space: Space, iova: u64) -> Option<Table> {
        let spaces = read(&self.spaces);
        let entries = spaces.get(&space)?;
        sizes(entries.table_sizes).find_map(|size| entries.tables.get(&(size, iova >> size)).copied())
    }

    fn count_one(&self) -> Result<(), Full> {
        let counted = self.count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| (count < self.limit).then_some(count + 1));
        counted.map(|_| ()).map_err(|_| Full)
    }

    /// Remembers a leaf, in place of one of the same size.
    pub(super) fn insert_leaf(&self, space: Space, iova: u64, leaf: Leaf) -> Result<(), Full> {
        let mut spaces = write(&self.spaces);
        let entries = spaces.entry(space).or_default();
        let key = (leaf.size_log2, iova >> leaf.size_log2);
        if !entries.leaves.contains_key(&key) {
            self.count_one()?;
        }
        entries.sizes |= 1 << leaf.size_log2;
        entries.leaves.insert(key, leaf);
        Ok(())
    }

    /// Remembers the table that translates the `2^size` bytes around `iova`.
    pub(super) fn insert_table(&self, space: Space, iova: u64, size: u8, table: Table) -> Result<(), Full> {
        let mut spaces = write(&self.spaces);
        let entries = spaces.entry(space).or_default();
        if let Entry::Vacant(vacant) = entries.tables.entry((size, iova >> size)) {
            self.count_one()?;
            vacant.insert(table);
            entries.table_sizes |= 1 << size;
        }
        Ok(())
    }

    /// What is remembered, if `first` led to it.
    pub(super) fn context(&self, key: ContextKey, first: &FirstStage) -> Option<Arc<Context>> {
        read(&self.contexts).get(&key).filter(|(known, _)| known == first).map(|(_, context)| Arc::clone(context))
    }

    /// Remembers what `first` led to, unless that is known.
    pub(super) fn insert_context(&self, key: ContextKey, first: &FirstStage, context: &Arc<Context>) -> Result<(), Full> {
        let mut contexts = write(&self.contexts);
        match contexts.entry(key) {
            Entry::Vacant(vacant) => {
                self.count_one()?;
                vacant.insert((first.clone(), Arc::clone(context)));
            }
            Entry::Occupied(mut known) if known.get().0 != *first => drop(known.insert((first.clone(), Arc::clone(context)))),
            Entry::Occupied(_) => {}
        }
        Ok(())
    }

    /// Forgets contexts.
    pub(super) fn drop_contexts(&self, of: impl Fn(ContextKey) -> bool) {
        let mut contexts = write(&self.contexts);
        let before = contexts.len();
        contexts.retain(|key, _| !of(*key));
        self.count.fetch_sub(before - contexts.len(), Ordering::Relaxed);
    }

    /// Forgets leaves of some spaces, and tables as well unless `leaf_only`; `leaf` has the last word on a leaf.
    pub(super) fn invalidate(&self, of: impl Fn(&Space) -> bool, range: Option<Span>, leaf_only: bool, leaf: impl Fn(&Leaf) -> bool) {
        let mut dropped = 0;
        let mut spaces = write(&self.spaces);
        for (_, entries) in spaces.iter_mut().filter(|(space, _)| of(space)) {
            let before = entries.leaves.len() + entries.tables.len();
            match range {
                Some(range) if small(range) => drop_each(entries, range, leaf_only, &leaf),
                _ => {
                    let range = range.unwrap_or(Span::ALL);
                    entries.leaves.retain(|key, value| !(covers(*key, range) && leaf(value)));
                    if !leaf_only {
                        entries.tables.retain(|key, _| !covers(*key, range));
                    }
                }
            }
            dropped += before - entries.leaves.len() - entries.tables.len();
        }
        spaces.retain(|_, entries| !entries.leaves.is_empty() || !entries.tables.is_empty());
        self.count.fetch_sub(dropped, Ordering::Relaxed);
    }
}

/// The set bits, lowest first.
fn sizes(mut bits: u64) -> impl Iterator<Item = u8> {
    std::iter::from_fn(move || {
        let size = u8::try_from(bits.trailing_zeros()).ok().filter(|size| *size < 64)?;
        bits &= bits - 1;
        Some(size)
    })
}

/// So few pages that looking for each is cheaper than going through all entries.
fn small(range: Span) -> bool {
    range.length_minus_one() < 64 << 12
}

fn covers((size, index): (u8, u64), range: Span) -> bool {
    range.first >> size <= index && index <= range.last >> size
}

fn drop_each(entries: &mut Entries, range: Span, leaf_only: bool, leaf: &impl Fn(&Leaf) -> bool) {
    for size in sizes(entries.sizes) {
        for index in range.first >> size..=range.last >> size {
            if entries.leaves.get(&(size, index)).is_some_and(leaf) {
                entries.leaves.remove(&(size, index));
            }
        }
    }
    if !leaf_only {
        for size in sizes(entries.table_sizes) {
            for index in range.first >> size..=range.last >> size {
                entries.tables.remove(&(size, index));
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::walk::context::Data;
    use super::*;

    #[test]
    fn contexts_are_of_what_led_to_them() {
        let caches = Caches::new(2);
        let first = |owner| FirstStage { owner, data: Data::Smmu { ste: [owner << 6, 0] } };
        let (one, other) = (Arc::new(Context::Bypass), Arc::new(Context::Bypass));
        let is = |owner, context: &Arc<Context>| caches.context((7, None), &first(owner)).is_some_and(|found| Arc::ptr_eq(&found, context));
        caches.insert_context((7, None), &first(1), &one).unwrap();
        assert!(is(1, &one) && caches.context((7, None), &first(2)).is_none() && caches.context((7, Some(1)), &first(1)).is_none());
        // What is known stays, and what another page table led to takes its place: it is one entry all the while.
        caches.insert_context((7, None), &first(1), &other).unwrap();
        assert!(is(1, &one));
        caches.insert_context((7, None), &first(2), &other).unwrap();
        assert!(is(2, &other) && caches.context((7, None), &first(1)).is_none());
        assert_eq!(caches.entries(), 1);
        caches.drop_contexts(|key| key.0 == 7);
        assert_eq!((caches.context((7, None), &first(2)).is_some(), caches.entries()), (false, 0));
    }
}
