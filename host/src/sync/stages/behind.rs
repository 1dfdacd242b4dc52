//! The second of two stages, as the tables of the first see it: where they are, and which guest pages that is.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use crate::memory::{EntryLayout, EntryMemory, MarkMemory, PAGE, ReadError, WriteError};
use crate::sync::shadow::Watcher;
use crate::sync::stages::told::overlapping;
use crate::sync::stages::watch::{Shared, lock};
use crate::table::{Piece, may_hold_tables};
use crate::{Gpa, Span};

/// Where bytes of a first-stage table are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    intermediate: Span,
    address: u64,
    /// The second stage lets hardware mark entries there.
    marks: bool,
}

/// What became of a page of first-stage tables when the second stage changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moved {
    Elsewhere,
    /// Hardware can mark entries that it could not, or the other way round; it may be elsewhere as well.
    Marks,
}

impl Place {
    const fn last(&self) -> u64 {
        self.address + self.intermediate.length_minus_one()
    }
}

/// What is remembered of the second stage, and the pages of first-stage tables behind it.
pub(super) struct Behind {
    /// By first intermediate address.
    pieces: BTreeMap<u64, Piece>,
    /// Pages of intermediate addresses that hold first-stage tables, and where they can be read: in parts, if the second stage has it so.
    tables: BTreeMap<u64, Vec<Place>>,
    /// The same the other way round: guest page, intermediate page.
    places: BTreeSet<(u64, u64)>,
    watch: Shared,
    /// Memory types of second-stage leaves through which no table is read.
    closed: u8,
}

pub(super) const fn page_span(page: u64) -> Span {
    Span::of_log2(page * PAGE, PAGE.trailing_zeros() as u8)
}

impl Behind {
    /// `closed` as [`Geometry::no_tables_in`](crate::table::Geometry::no_tables_in).
    pub(super) fn new(watch: Shared, closed: u8) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self { pieces: BTreeMap::new(), tables: BTreeMap::new(), places: BTreeSet::new(), watch, closed }))
    }

    /// The second stage has other rules: what is read through which memory types. Whoever reads next reads where tables are now.
    pub(super) fn close(&mut self, closed: u8) {
        if std::mem::replace(&mut self.closed, closed) != closed {
            let pages: Vec<u64> = self.tables.keys().copied().collect();
            for page in pages {
                self.moved(page);
            }
        }
    }

    pub(super) fn map(&mut self, piece: Piece) {
        self.pieces.insert(piece.iova.first, piece);
    }

    pub(super) fn unmap(&mut self, span: Span) {
        self.pieces.remove(&span.first);
    }

    /// The second stage's pieces for some of its inputs, ascending.
    pub(super) fn pieces(&self, span: Span) -> impl Iterator<Item = Piece> + '_ {
        overlapping(&self.pieces, span)
    }

    /// Pages of intermediate addresses in `span` that hold first-stage tables.
    pub(super) fn tables(&self, span: Span) -> impl Iterator<Item = u64> + '_ {
        self.tables.range(span.first / PAGE..=span.last / PAGE).map(|(page, _)| *page)
    }

    /// Where a page's bytes can be read. Tables are read with the second stage's permission to read.
    fn find(&self, page: u64) -> Vec<Place> {
        let readable = self.pieces(page_span(page)).filter(|piece| may_hold_tables(piece.attributes, self.closed));
        let place = |piece: Piece| {
            let intermediate = piece.iova.intersection(page_span(page))?;
            let marks = piece.attributes.access(true).write;
            Some(Place { intermediate, address: piece.address + (intermediate.first - piece.iova.first), marks })
        };
        readable.filter_map(place).collect()
    }

    fn hold(&mut self, page: u64, places: &[Place]) {
        for place in places {
            for guest in place.address / PAGE..=place.last() / PAGE {
                if self.places.insert((guest, page)) {
                    self.watch.watch(Gpa(guest * PAGE));
                }
            }
        }
    }

    /// Lets go of the guest pages of a page, except those that it still has.
    fn release(&mut self, page: u64, before: &[Place], now: &[Place]) {
        let within = |guest: u64| now.iter().any(|place| (place.address / PAGE..=place.last() / PAGE).contains(&guest));
        for guest in before.iter().flat_map(|place| place.address / PAGE..=place.last() / PAGE) {
            if !within(guest) && self.places.remove(&(guest, page)) {
                self.watch.unwatch(Gpa(guest * PAGE));
            }
        }
    }

    /// Looks where a page of tables is now; none if that is where it was.
    pub(super) fn moved(&mut self, page: u64) -> Option<Moved> {
        let before = self.tables.get(&page).cloned()?;
        let now = self.find(page);
        if before == now {
            return None;
        }
        let marks = |places: &[Place]| places.iter().map(|place| (place.intermediate, place.marks)).collect::<Vec<_>>();
        let moved = if marks(&before) == marks(&now) { Moved::Elsewhere } else { Moved::Marks };
        // Watched before anybody reads.
        self.hold(page, &now);
        self.release(page, &before, &now);
        self.tables.insert(page, now);
        Some(moved)
    }

    /// First-stage tables among guest addresses: as intermediate addresses.
    pub(super) fn written(&self, guest: Span) -> Vec<Span> {
        let pages = self.places.range((guest.first / PAGE, 0)..=(guest.last / PAGE, u64::MAX)).map(|(_, page)| *page).collect::<BTreeSet<_>>();
        let mut found = Vec::new();
        for place in pages.iter().filter_map(|page| self.tables.get(page)).flatten() {
            let Some(here) = guest.intersection(Span { first: place.address, last: place.last() }) else { continue };
            let first = place.intermediate.first + (here.first - place.address);
            found.push(Span { first, last: first + here.length_minus_one() });
        }
        found
    }

    /// Whether hardware can mark an entry at an intermediate address: it does so with the second stage's permission to write.
    fn can_mark(&self, address: Gpa) -> bool {
        self.pieces(Span { first: address.0, last: address.0 }).next().is_some_and(|piece| piece.attributes.access(true).write)
    }

    /// Entries at intermediate addresses.
    fn read<M: EntryMemory + ?Sized>(&self, memory: &M, address: Gpa, layout: EntryLayout, entries: &mut [u64]) -> Result<(), ReadError> {
        let (failed, size) = (ReadError(address), u64::from(layout.bytes));
        let last = (entries.len() as u64 * size).checked_sub(1).and_then(|rest| address.0.checked_add(rest)).ok_or(failed)?;
        let mut next = address.0;
        let mut done = 0;
        for piece in self.pieces(Span { first: address.0, last }) {
            // A hole, or an entry in two pieces: there is nothing that hardware would read at once.
            if piece.iova.first > next || !may_hold_tables(piece.attributes, self.closed) {
                return Err(failed);
            }
            let count = ((piece.iova.last.min(last) - next + 1) / size) as usize;
            let part = entries.get_mut(done..done + count).ok_or(failed)?;
            memory.read_entries(Gpa(piece.address + (next - piece.iova.first)), layout, part).map_err(|_| failed)?;
            next += count as u64 * size;
            done += count;
        }
        if done == entries.len() { Ok(()) } else { Err(failed) }
    }
}

/// Guest memory through the second stage, as it is remembered: a first-stage entry is read where the second stage was seen to put it.
pub(super) struct Through<'a, M: ?Sized> {
    pub(super) behind: &'a Mutex<Behind>,
    pub(super) memory: &'a M,
}

impl<M: EntryMemory + ?Sized> EntryMemory for Through<'_, M> {
    fn read_entries(&self, address: Gpa, layout: EntryLayout, entries: &mut [u64]) -> Result<(), ReadError> {
        lock(self.behind).read(self.memory, address, layout, entries)
    }

    fn can_mark(&self, address: Gpa) -> bool {
        lock(self.behind).can_mark(address)
    }

    fn may_refuse_marks(&self) -> bool {
        true
    }
}

/// The same for marks, and which intermediate addresses were marked.
pub(super) struct Marks<'a, M: ?Sized> {
    pub(super) behind: &'a Mutex<Behind>,
    pub(super) memory: &'a M,
    pub(super) tables: RefCell<Vec<Span>>,
}

impl<M: MarkMemory + ?Sized> MarkMemory for Marks<'_, M> {
    fn compare_exchange_entry(&self, address: Gpa, layout: EntryLayout, old: u64, new: u64) -> Result<bool, WriteError> {
        let entry = Span { first: address.0, last: address.0.saturating_add(u64::from(layout.bytes) - 1) };
        let behind = lock(self.behind);
        let found = behind.pieces(entry).next().filter(|piece| piece.iova.contains(entry.first) && piece.iova.contains(entry.last));
        // Hardware marks with the second stage's permission to write.
        let piece = found.filter(|piece| piece.attributes.access(true).write).ok_or(WriteError(address))?;
        let guest = Gpa(piece.address + (entry.first - piece.iova.first));
        let written = self.memory.compare_exchange_entry(guest, layout, old, new).map_err(|_| WriteError(address))?;
        if written {
            self.tables.borrow_mut().push(entry);
        }
        Ok(written)
    }
}

/// Hears which intermediate pages hold first-stage tables, and has the guest pages watched that they are in.
pub(super) struct TablePages(pub(super) Arc<Mutex<Behind>>);

impl Watcher for TablePages {
    fn watch(&mut self, page: Gpa) {
        let mut behind = lock(&self.0);
        let page = page.0 / PAGE;
        let places = behind.find(page);
        behind.hold(page, &places);
        behind.tables.insert(page, places);
    }

    fn unwatch(&mut self, page: Gpa) {
        let mut behind = lock(&self.0);
        let page = page.0 / PAGE;
        if let Some(places) = behind.tables.remove(&page) {
            behind.release(page, &places, &[]);
        }
    }
}
