//! Guest pages that somebody looks at: tables of address spaces, structures that lead to streams. Each is watched once, whoever needs it.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::memory::PAGE;
use crate::plugin::Requester;
use crate::sync::Watcher;
use crate::{Gpa, Span};

/// Who looks at a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Holder {
    /// The PASIDs of a device were found in it.
    Device(u64),
    /// Structures of a stream.
    Stream(Requester),
    /// Tables of an address space.
    Space(u64),
}

/// Most pages have one.
#[derive(Debug)]
enum Holders {
    One(Holder),
    Many(BTreeSet<Holder>),
}

struct Inner {
    holders: HashMap<u64, Holders>,
    watcher: Box<dyn Watcher>,
}

/// All of them. Clones are the same.
#[derive(Clone)]
pub(super) struct Pages(Arc<Mutex<Inner>>);

impl fmt::Debug for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pages").field("watched", &self.watched()).finish_non_exhaustive()
    }
}

impl Pages {
    pub(super) fn new(watcher: Box<dyn Watcher>) -> Self {
        Self(Arc::new(Mutex::new(Inner { holders: HashMap::new(), watcher })))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pages that are watched.
    pub(super) fn watched(&self) -> u64 {
        self.lock().holders.len() as u64
    }

    /// `page` is an address. The watcher is told if nobody looked at it before.
    pub(super) fn add(&self, page: Gpa, holder: Holder) {
        let inner = &mut *self.lock();
        match inner.holders.entry(page.0 / PAGE) {
            Entry::Vacant(vacant) => {
                vacant.insert(Holders::One(holder));
                inner.watcher.watch(page);
            }
            Entry::Occupied(mut occupied) => match occupied.get_mut() {
                Holders::One(other) if *other == holder => {}
                Holders::One(other) => {
                    let both = BTreeSet::from([*other, holder]);
                    occupied.insert(Holders::Many(both));
                }
                Holders::Many(holders) => {
                    holders.insert(holder);
                }
            },
        }
    }

    pub(super) fn remove(&self, page: Gpa, holder: Holder) {
        let inner = &mut *self.lock();
        let Entry::Occupied(mut occupied) = inner.holders.entry(page.0 / PAGE) else { return };
        let is_last = match occupied.get_mut() {
            Holders::One(one) => *one == holder,
            Holders::Many(holders) => {
                holders.remove(&holder);
                holders.is_empty()
            }
        };
        if is_last {
            occupied.remove();
            inner.watcher.unwatch(page);
        }
    }

    /// Who looks at pages of `written`, each once, in order. The cost is that of the pages, or of all that are watched if those are fewer.
    pub(super) fn holders(&self, written: Span, found: &mut Vec<Holder>) {
        found.clear();
        let inner = self.lock();
        let (first, last) = (written.first / PAGE, written.last / PAGE);
        let mut add = |holders: &Holders| match holders {
            Holders::One(one) => found.push(*one),
            Holders::Many(many) => found.extend(many),
        };
        if last - first < inner.holders.len() as u64 {
            (first..=last).filter_map(|page| inner.holders.get(&page)).for_each(&mut add);
        } else {
            inner.holders.iter().filter(|(page, _)| (first..=last).contains(page)).for_each(|(_, holders)| add(holders));
        }
        if found.len() > 1 {
            found.sort_unstable();
            found.dedup();
        }
    }

    /// For the tables of one address space.
    pub(super) fn watcher_of(&self, space: u64) -> Box<dyn Watcher> {
        Box::new(OfSpace { pages: self.clone(), space })
    }
}

/// Hears which pages hold tables of one address space.
struct OfSpace {
    pages: Pages,
    space: u64,
}

impl Watcher for OfSpace {
    fn watch(&mut self, page: Gpa) {
        self.pages.add(page, Holder::Space(self.space));
    }

    fn unwatch(&mut self, page: Gpa) {
        self.pages.remove(page, Holder::Space(self.space));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Heard(Arc<Mutex<Vec<(u64, bool)>>>);

    impl Watcher for Heard {
        fn watch(&mut self, page: Gpa) {
            self.0.lock().expect("no panic").push((page.0, true));
        }

        fn unwatch(&mut self, page: Gpa) {
            self.0.lock().expect("no panic").push((page.0, false));
        }
    }

    #[test]
    fn a_page_is_watched_from_the_first_who_needs_it_to_the_last() {
        let heard = Heard::default();
        let pages = Pages::new(Box::new(heard.clone()));
        let stream = Holder::Stream(Requester { id: 5, pasid: None });
        let (mut one, mut two) = (pages.watcher_of(1), pages.watcher_of(2));
        one.watch(Gpa(0x1000));
        two.watch(Gpa(0x1000));
        two.watch(Gpa(0x1000));
        pages.add(Gpa(0x1000), stream);
        pages.add(Gpa(0x3000), stream);
        let mut found = Vec::new();
        pages.holders(Span { first: 0x1ff8, last: 0x1fff }, &mut found);
        assert_eq!(found, [stream, Holder::Space(1), Holder::Space(2)]);
        pages.holders(Span { first: 0, last: u64::MAX }, &mut found);
        assert_eq!(found, [stream, Holder::Space(1), Holder::Space(2)]);
        pages.holders(Span { first: 0x2000, last: 0x2fff }, &mut found);
        assert_eq!(found, []);
        one.unwatch(Gpa(0x1000));
        two.unwatch(Gpa(0x1000));
        assert_eq!(heard.0.lock().expect("no panic").as_slice(), [(0x1000, true), (0x3000, true)]);
        pages.remove(Gpa(0x1000), stream);
        pages.remove(Gpa(0x1000), stream);
        assert_eq!(heard.0.lock().expect("no panic")[2..], [(0x1000, false)]);
        assert_eq!(pages.watched(), 1);
    }
}
