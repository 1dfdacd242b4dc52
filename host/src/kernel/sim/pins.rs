//! Pinned pages: each page of a pages object once, however many areas and page tables use it, and a limit for the process.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::inject::Steps;
use super::lock::lock;
use super::memory::UserMemory;
use crate::kernel::{Errno, Result};

/// What memory is locked in, bytes.
pub(super) const PAGE: u64 = 4096;

/// The process's count of pinned pages, against its limit (RLIMIT_MEMLOCK).
#[derive(Debug)]
pub(super) struct Locked {
    pages: AtomicU64,
    limit: AtomicU64,
}

impl Default for Locked {
    fn default() -> Self {
        Self { pages: AtomicU64::new(0), limit: AtomicU64::new(u64::MAX) }
    }
}

impl Locked {
    pub(super) fn pages(&self) -> u64 {
        self.pages.load(Ordering::SeqCst)
    }

    pub(super) fn set_limit(&self, pages: u64) {
        self.limit.store(pages, Ordering::SeqCst);
    }

    fn take(&self, count: u64) -> Result<()> {
        let limit = self.limit.load(Ordering::SeqCst);
        let taken =
            self.pages.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |pages| pages.checked_add(count).filter(|sum| count == 0 || *sum <= limit));
        taken.map(|_| ()).map_err(|_| Errno::ENOMEM)
    }

    fn give_back(&self, count: u64) {
        self.pages.fetch_sub(count, Ordering::SeqCst);
    }
}

/// User memory that was mapped by one call (the kernel's `iopt_pages`). Areas and their copies share it.
#[derive(Debug)]
pub(super) struct Pages {
    pub(super) user_address: u64,
    pub(super) writeable: bool,
    /// How many users each page has: from each key to the next. Page numbers count from the page that `user_address` lies in.
    users: Mutex<BTreeMap<u64, u64>>,
}

impl Pages {
    pub(super) fn new(user_address: u64, writeable: bool) -> Arc<Self> {
        Arc::new(Self { user_address, writeable, users: Mutex::new(BTreeMap::new()) })
    }

    fn page_numbers(&self, offset: u64, length: u64) -> (u64, u64) {
        let start = self.user_address % PAGE + offset;
        (start / PAGE, (start + length).div_ceil(PAGE))
    }

    /// Pins what of `length` bytes from `offset` is not pinned yet.
    pub(super) fn pin(&self, offset: u64, length: u64, memory: &UserMemory, locked: &Locked, steps: &Steps) -> Result<()> {
        steps.step()?;
        if !memory.covers(self.user_address + offset, length, self.writeable) {
            return Err(Errno::EFAULT);
        }
        let (first, end) = self.page_numbers(offset, length);
        let mut users = lock(&self.users);
        let fresh = pages_with(&users, first, end, 0);
        locked.take(fresh)?;
        change(&mut users, first, end, |count| count + 1);
        Ok(())
    }

    /// Unpins what nobody else has pinned.
    pub(super) fn unpin(&self, offset: u64, length: u64, locked: &Locked) {
        let (first, end) = self.page_numbers(offset, length);
        let mut users = lock(&self.users);
        let last_user = pages_with(&users, first, end, 1);
        change(&mut users, first, end, |count| count.saturating_sub(1));
        locked.give_back(last_user);
    }
}

/// Makes a key at `page`, so that a change can begin there.
fn split(users: &mut BTreeMap<u64, u64>, page: u64) {
    let count = users.range(..=page).next_back().map_or(0, |(_, count)| *count);
    users.entry(page).or_insert(count);
}

fn change(users: &mut BTreeMap<u64, u64>, first: u64, end: u64, to: impl Fn(u64) -> u64) {
    split(users, first);
    split(users, end);
    for (_, count) in users.range_mut(first..end) {
        *count = to(*count);
    }
    // Keys that repeat what stands before them go, so that the map does not grow with time.
    let mut before = users.range(..first).next_back().map_or(0, |(_, count)| *count);
    let seen: Vec<(u64, u64)> = users.range(first..=end).map(|(page, count)| (*page, *count)).collect();
    for (page, count) in seen {
        if count == before {
            users.remove(&page);
        }
        before = count;
    }
}

/// How many pages in `first..end` have exactly so many users.
fn pages_with(users: &BTreeMap<u64, u64>, first: u64, end: u64, wanted: u64) -> u64 {
    let mut sum = 0;
    let mut at = first;
    let mut count = users.range(..=first).next_back().map_or(0, |(_, count)| *count);
    for (page, next) in users.range(first + 1..end) {
        if count == wanted {
            sum += page - at;
        }
        (at, count) = (*page, *next);
    }
    if count == wanted { sum + (end - at) } else { sum }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_counts_once() {
        let mut users = BTreeMap::new();
        change(&mut users, 10, 20, |count| count + 1);
        assert_eq!(pages_with(&users, 5, 25, 0), 10);
        change(&mut users, 15, 30, |count| count + 1);
        assert_eq!(pages_with(&users, 0, 40, 1), 15);
        assert_eq!(pages_with(&users, 0, 40, 2), 5);
        change(&mut users, 10, 20, |count| count - 1);
        assert_eq!(pages_with(&users, 0, 40, 1), 15);
        change(&mut users, 15, 30, |count| count - 1);
        assert!(users.is_empty(), "{users:?}");
    }
}
