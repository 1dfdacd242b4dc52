//! Which guest pages hold tables, and whose: the caller's watcher hears of each page once, whoever uses it.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::SpaceId;
use crate::Gpa;
use crate::memory::PAGE;
use crate::sync::Watcher;

struct State {
    watcher: Box<dyn Watcher>,
    /// By page: IOASIDs with tables there, each as often as it has host tables.
    users: HashMap<u64, Vec<SpaceId>>,
}

/// The pages of a context.
pub(super) struct Watched(Mutex<State>);

impl fmt::Debug for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watched").field("pages", &self.lock().users.len()).finish_non_exhaustive()
    }
}

impl Watched {
    pub(super) fn new(watcher: Box<dyn Watcher>) -> Self {
        Self(Mutex::new(State { watcher, users: HashMap::new() }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// IOASIDs with tables in these bytes.
    pub(super) fn users(&self, address: Gpa, length: u64) -> BTreeSet<SpaceId> {
        let state = self.lock();
        let Some(last) = length.checked_sub(1).map(|rest| address.0.saturating_add(rest) / PAGE) else { return BTreeSet::new() };
        let first = address.0 / PAGE;
        if last - first < state.users.len() as u64 {
            return (first..=last).filter_map(|page| state.users.get(&page)).flatten().copied().collect();
        }
        state.users.iter().filter(|(page, _)| (first..=last).contains(*page)).flat_map(|(_, users)| users).copied().collect()
    }

    /// For one host table of an IOASID.
    pub(super) fn of(self: &Arc<Self>, space: SpaceId) -> Watching {
        Watching { watched: Arc::clone(self), space, pages: BTreeSet::new() }
    }

    fn watch(&self, page: u64, space: SpaceId) {
        let mut state = self.lock();
        let users = state.users.entry(page).or_default();
        users.push(space);
        if users.len() == 1 {
            state.watcher.watch(Gpa(page * PAGE));
        }
    }

    fn unwatch(&self, page: u64, space: SpaceId) {
        let mut state = self.lock();
        let Some(users) = state.users.get_mut(&page) else { return };
        if let Some(place) = users.iter().position(|user| *user == space) {
            users.swap_remove(place);
        }
        if users.is_empty() {
            state.users.remove(&page);
            state.watcher.unwatch(Gpa(page * PAGE));
        }
    }
}

/// The pages of one host table; watched no more when it is dropped.
#[derive(Debug)]
pub(super) struct Watching {
    watched: Arc<Watched>,
    space: SpaceId,
    pages: BTreeSet<u64>,
}

impl Watcher for Watching {
    fn watch(&mut self, page: Gpa) {
        if self.pages.insert(page.0 / PAGE) {
            self.watched.watch(page.0 / PAGE, self.space);
        }
    }

    fn unwatch(&mut self, page: Gpa) {
        if self.pages.remove(&(page.0 / PAGE)) {
            self.watched.unwatch(page.0 / PAGE, self.space);
        }
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        for page in &self.pages {
            self.watched.unwatch(*page, self.space);
        }
    }
}
