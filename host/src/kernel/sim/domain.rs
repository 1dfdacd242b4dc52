//! The kernel's own table for one unit: from the IOVAs of an IOAS to user memory. It is the kernel's alone, so an interval map will do.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, RwLock};

use super::lock::{lock, read, write};
use super::unit::Unit;
use crate::Span;

/// What dirty pages are counted in, bytes.
const PAGE_LOG2: u32 = 12;

#[derive(Clone, Copy, Debug)]
pub(super) struct Extent {
    pub(super) last: u64,
    pub(super) user_address: u64,
    pub(super) read: bool,
    pub(super) write: bool,
}

/// One unit's copy of an IOAS.
#[derive(Debug)]
pub(super) struct Domain {
    pub(super) unit: Arc<Unit>,
    extents: RwLock<BTreeMap<u64, Extent>>,
    /// Numbers of pages that were written; none while nobody records.
    dirty: Mutex<Option<BTreeSet<u64>>>,
}

/// Why the kernel's table does not translate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    NotPresent,
    Permission,
}

impl Domain {
    pub(super) fn new(unit: &Arc<Unit>) -> Arc<Self> {
        Arc::new(Self { unit: Arc::clone(unit), extents: RwLock::default(), dirty: Mutex::default() })
    }

    pub(super) fn insert(&self, first: u64, extent: Extent) {
        write(&self.extents).insert(first, extent);
    }

    /// The caller drains the unit before it relies on it.
    pub(super) fn remove(&self, first: u64) {
        let removed = write(&self.extents).remove(&first);
        // Nobody can be told any more.
        if let (Some(extent), Some(dirty)) = (removed, lock(&self.dirty).as_mut()) {
            dirty.retain(|page| !(first >> PAGE_LOG2..=extent.last >> PAGE_LOG2).contains(page));
        }
    }

    /// The user address. A write is recorded if somebody wants to know.
    pub(super) fn translate(&self, address: u64, writes: bool) -> Result<u64, Refused> {
        let extent = {
            let extents = read(&self.extents);
            extents.range(..=address).next_back().filter(|(_, extent)| address <= extent.last).map(|(first, extent)| (*first, *extent))
        };
        let (first, extent) = extent.ok_or(Refused::NotPresent)?;
        if writes && !extent.write || !writes && !extent.read {
            return Err(Refused::Permission);
        }
        if writes {
            // Recorded before the write: the page is dirty at the latest when it has changed.
            if let Some(dirty) = lock(&self.dirty).as_mut() {
                dirty.insert(address >> PAGE_LOG2);
            }
        }
        Ok(extent.user_address + (address - first))
    }

    /// How many extents: what a test compares between units.
    pub(super) fn len(&self) -> usize {
        read(&self.extents).len()
    }

    pub(super) fn track_dirty(&self, enabled: bool) {
        *lock(&self.dirty) = enabled.then(BTreeSet::new);
    }

    /// Calls `page` with the address of each page that was written within the span, and forgets them if told to; false if nobody records.
    pub(super) fn dirty_pages(&self, span: Span, clear: bool, mut page: impl FnMut(u64)) -> bool {
        let mut dirty = lock(&self.dirty);
        let Some(dirty) = dirty.as_mut() else { return false };
        let found: Vec<u64> = dirty.range(span.first >> PAGE_LOG2..=span.last >> PAGE_LOG2).copied().collect();
        for number in found {
            if clear {
                dirty.remove(&number);
            }
            page(number << PAGE_LOG2);
        }
        true
    }
}
