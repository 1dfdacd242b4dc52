//! A real watcher for a vIOMMU: what it reports is armed again and told, in the order that loses no write.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::GuestMemory;

use super::{AddressSpaces, Handled, Viommu};
use crate::memory::PAGE;
use crate::watch::{self, WatchError};
use crate::{Gpa, sync};

/// A watcher of [`watch`], for a [`Viommu`]: one handle goes to [`Viommu::new`], one to whoever else watches pages of the same guest, and one stays with whoever
/// calls [`Watching::serve`]. Clones are the same; a page is watched as long as one of them needs it.
#[derive(Debug)]
pub struct Watching<W>(Arc<Mutex<Inner<W>>>);

#[derive(Debug)]
struct Inner<W> {
    watcher: W,
    /// How many need a page.
    users: HashMap<u64, u32>,
    /// The first page that could not be watched.
    failed: Option<WatchError>,
}

impl<W> Clone for Watching<W> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<W: watch::Watcher> Watching<W> {
    /// Watches by `watcher`.
    #[must_use]
    pub fn new(watcher: W) -> Self {
        Self(Arc::new(Mutex::new(Inner { watcher, users: HashMap::new(), failed: None })))
    }

    /// The watcher, locked: for its file descriptor.
    pub fn with<R>(&self, look: impl FnOnce(&mut W) -> R) -> R {
        look(&mut self.lock().watcher)
    }

    /// The guest's memory is another, of which `change` tells the watcher, such as [`UffdWatcher::memory_changed`](watch::UffdWatcher::memory_changed). Pages that somebody needs and that came are watched from
    /// now on: before [`Viommu::memory_changed`] for memory that comes, after it for memory that goes.
    ///
    /// # Errors
    /// Those of `change`, or a page that came cannot be watched.
    pub fn memory_changed(&self, change: impl FnOnce(&mut W) -> Result<(), WatchError>) -> Result<(), WatchError> {
        let inner = &mut *self.lock();
        change(&mut inner.watcher)?;
        inner.users.keys().try_for_each(|page| watch_if_there(&mut inner.watcher, Gpa(*page)))
    }

    /// Tells `viommu` about all writes that are known now; what came of each. Never waits.
    ///
    /// # Errors
    /// A page could not be watched, or not again: the guest can write to it unnoticed. What was reported before was told.
    pub fn serve<M, A>(&self, viommu: &mut Viommu<M, A>) -> Result<Vec<Handled>, WatchError>
    where
        M: GuestMemory + Clone + Send + 'static,
        A: AddressSpaces,
    {
        let mut written = Vec::new();
        let mut first = {
            let mut inner = self.lock();
            let served = inner.watcher.serve(&mut |address, length| written.push((address, length)));
            let mut first = inner.failed.take().or(served.err());
            // Watched again before it is read: a write before this is seen, one after it is reported.
            for (address, length) in &written {
                for page in (address.0 / PAGE..=address.0.saturating_add(length.saturating_sub(1)) / PAGE).map(|page| Gpa(page * PAGE)) {
                    match inner.watcher.rearm(page) {
                        // Nobody needs it any more, or a report covers more than was asked for.
                        Ok(()) | Err(WatchError::NotWatched(_)) => {}
                        Err(error) => first = first.or(Some(error)),
                    }
                }
            }
            first
        };
        let handled = written.into_iter().map(|(address, length)| viommu.table_written(address, length)).collect();
        first = first.or(self.lock().failed.take());
        first.map_or(Ok(handled), Err)
    }

    fn lock(&self) -> MutexGuard<'_, Inner<W>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<W: watch::Watcher + Send> sync::Watcher for Watching<W> {
    fn watch(&mut self, page: Gpa) {
        let mut inner = self.lock();
        let users = inner.users.entry(page.0).or_default();
        *users += 1;
        if *users == 1
            && let Err(error) = watch_if_there(&mut inner.watcher, page)
        {
            inner.failed.get_or_insert(error);
        }
    }

    fn unwatch(&mut self, page: Gpa) {
        let mut inner = self.lock();
        let Some(users) = inner.users.get_mut(&page.0) else { return };
        *users -= 1;
        if *users == 0 {
            inner.users.remove(&page.0);
            match inner.watcher.unwatch(page) {
                Ok(()) | Err(WatchError::NoPage(_)) => {}
                Err(error) => drop(inner.failed.get_or_insert(error)),
            }
        }
    }
}

/// Where there is no memory nobody writes: a guest's table may point there, and memory may come.
fn watch_if_there<W: watch::Watcher>(watcher: &mut W, page: Gpa) -> Result<(), WatchError> {
    match watcher.watch(page) {
        Err(WatchError::NoPage(_)) => Ok(()),
        watched => watched,
    }
}
