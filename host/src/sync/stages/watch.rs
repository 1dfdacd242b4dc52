//! One watcher for several tables: a page that two of them are in is watched once.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::Gpa;
use crate::sync::shadow::{Unwatched, Watcher};

/// Locks; whoever panicked with the lock held left nothing half done.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A watcher that all tables of an address space share, those that come next included: while they take turns, pages that both have stay watched.
#[derive(Clone)]
pub(super) struct Shared(Arc<Mutex<Counted>>);

struct Counted {
    watcher: Box<dyn Watcher>,
    /// How many hold each page.
    pages: HashMap<Gpa, u32>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("pages", &lock(&self.0).pages.len()).finish_non_exhaustive()
    }
}

impl Shared {
    pub(super) fn new(watcher: Box<dyn Watcher>) -> Self {
        Self(Arc::new(Mutex::new(Counted { watcher, pages: HashMap::new() })))
    }

    /// Takes a watcher over from whoever holds `pages` with it; `exchange` gives them this one and says which they had.
    pub(super) fn adopt(pages: impl Iterator<Item = Gpa>, exchange: impl FnOnce(Box<dyn Watcher>) -> Box<dyn Watcher>) -> Self {
        let shared = Self::new(Box::new(Unwatched));
        let before = exchange(Box::new(shared.clone()));
        let mut counted = lock(&shared.0);
        counted.watcher = before;
        counted.pages.extend(pages.map(|page| (page, 1)));
        drop(counted);
        shared
    }

    /// The pages that are watched, in no order.
    pub(super) fn pages(&self) -> Vec<Gpa> {
        lock(&self.0).pages.keys().copied().collect()
    }
}

impl Watcher for Shared {
    fn watch(&mut self, page: Gpa) {
        let mut counted = lock(&self.0);
        let count = counted.pages.entry(page).or_insert(0);
        *count += 1;
        if *count == 1 {
            counted.watcher.watch(page);
        }
    }

    fn unwatch(&mut self, page: Gpa) {
        let mut counted = lock(&self.0);
        let Some(count) = counted.pages.get_mut(&page) else { return };
        *count -= 1;
        if *count == 0 {
            counted.pages.remove(&page);
            counted.watcher.unwatch(page);
        }
    }
}
