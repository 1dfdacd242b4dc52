//! Which guest memory was written through areas: what the kernel records in its page tables, told as guest memory.
//!
//! No write gets lost. A page table that attachments have left, by a swap or one by one, is read when nobody is on it any more. Of an area that is removed nobody
//! could say when the last write came, because the kernel tells nothing as it unmaps: if it may be written, all of it counts as written.

use super::Areas;
use super::book::{Area, AreaMap, overlapping};
use crate::Span;
use crate::kernel::handle::{Device, Hwpt, Ioas};
use crate::kernel::{Errno, HwptFlags, MapFlags};
use crate::sync::pages::PageSet;

/// While writes are recorded: what page tables and areas knew that are gone.
#[derive(Debug, Default)]
pub(super) struct Record {
    pages: PageSet,
    /// Page tables of the present IOAS that attachments have left.
    left: Vec<Hwpt>,
}

impl Area {
    fn memory(&self, first: u64) -> Span {
        Span { first: self.address, last: self.address + (self.last - first) }
    }
}

/// Tells what page tables recorded of guest memory at `targets`, or of the host's pages there; how many could not be read: all of it counts as written then.
fn read(tables: &[Hwpt], (areas, alignment): (&AreaMap, u64), targets: Span, clear: bool, tell: &mut dyn FnMut(Span)) -> u64 {
    let low = alignment - 1;
    let mut runs: Vec<Span> = Vec::new();
    for (first, area) in areas.iter().filter(|(_, area)| area.flags.contains(MapFlags::WRITEABLE)) {
        let memory = area.memory(*first);
        let Some(inside) = memory.intersection(targets) else { continue };
        let at = |address: u64| first + (address - memory.first);
        let part = Span { first: at((inside.first & !low).max(memory.first)), last: at((inside.last | low).min(memory.last)) };
        match runs.last_mut() {
            Some(last) if last.last.checked_add(1) == Some(part.first) => last.last = part.last,
            _ => runs.push(part),
        }
    }
    let mut in_memory = |iova: Span| {
        for (first, area) in overlapping(areas, iova) {
            let Some(inside) = area.span(first).intersection(iova) else { continue };
            let address = area.address + (inside.first - first);
            tell(Span { first: address, last: address + inside.length_minus_one() });
        }
    };
    let mut failures = 0;
    for table in tables {
        if runs.iter().try_for_each(|run| table.written(*run, clear, &mut in_memory)).is_err() {
            failures += 1;
            runs.iter().for_each(|run| in_memory(*run));
        }
    }
    failures
}

impl Areas {
    /// Begins or ends to record; false if that cannot be had, and nobody records then.
    pub(super) fn record(&mut self, on: bool) -> bool {
        self.record = None;
        let kernel = self.pins.kernel();
        let tables: Vec<Hwpt> = self.tables().into_iter().chain(self.replaced.iter().flat_map(|replaced| replaced.tables.iter().cloned())).collect();
        let set = |on: bool| tables.iter().try_for_each(|table| kernel.set_dirty_tracking(table.id(), on));
        if !on || !self.limits.flags.contains(HwptFlags::DIRTY_TRACKING) {
            let _ = set(false);
            return !on;
        }
        if set(true).is_err() {
            let _ = set(false);
            return false;
        }
        self.record = Some(Record::default());
        true
    }

    /// Page tables that attachments are on in the present IOAS, each once.
    pub(super) fn tables(&self) -> Vec<Hwpt> {
        let mut tables: Vec<Hwpt> = Vec::new();
        for hwpt in self.attached.iter().filter(|one| !one.behind).filter_map(|one| one.hwpt.as_ref()) {
            if !tables.iter().any(|known| known.id() == hwpt.id()) {
                tables.push(hwpt.clone());
            }
        }
        tables
    }

    /// A page table for a device in an IOAS; it records before anybody is on it.
    pub(super) fn make_page_table(&self, ioas: &Ioas, device: &Device) -> Result<Hwpt, Errno> {
        let flags = self.limits.flags;
        let made = match ioas.hwpt(device, flags, None) {
            // A unit without PASIDs: its devices have none that could be attached.
            Err(Errno::EOPNOTSUPP) if flags.contains(HwptFlags::PASID) => ioas.hwpt(device, HwptFlags(flags.0 & !HwptFlags::PASID.0), None)?,
            made => made?,
        };
        if self.record.is_some() {
            self.pins.kernel().set_dirty_tracking(made.id(), true)?;
        }
        Ok(made)
    }

    /// An attachment is about to leave its page table.
    pub(super) fn leaves(&mut self, hwpt: Option<Hwpt>) {
        // Those that left before are elsewhere by now.
        self.settle();
        if let Some(record) = &mut self.record {
            record.left.extend(hwpt);
        }
    }

    /// Page tables that were left are read, and let go.
    pub(super) fn settle(&mut self) {
        let Some(record) = self.record.as_mut().filter(|record| !record.left.is_empty()) else { return };
        let left = std::mem::take(&mut record.left);
        self.figures.failures += read(&left, (&self.areas, self.scope.alignment), Span::ALL, true, &mut |span| record.pages.add(span));
    }

    /// Page tables that a swap took out of use, and those that were left before.
    pub(super) fn with_left(&mut self, mut tables: Vec<Hwpt>) -> Vec<Hwpt> {
        if let Some(record) = &mut self.record {
            tables.append(&mut record.left);
        }
        tables
    }

    /// Nobody is on IOASes any more that were replaced: what was written through them up to now is all.
    pub(super) fn forget_replaced(&mut self) {
        for replaced in std::mem::take(&mut self.replaced) {
            let Some(record) = &mut self.record else { continue };
            self.figures.failures +=
                read(&replaced.tables, (&replaced.areas, replaced.alignment), Span::ALL, false, &mut |span| record.pages.add(span));
        }
    }

    /// An area was removed.
    pub(super) fn remove_area(&mut self, first: u64) {
        let Some(area) = self.areas.remove(&first) else { return };
        if let Some(record) = self.record.as_mut().filter(|_| area.flags.contains(MapFlags::WRITEABLE)) {
            record.pages.add(area.memory(first));
        }
    }

    /// As [`Sink::dirty`](crate::sync::Sink::dirty) says. All areas are looked at, whatever the span.
    pub(super) fn tell_written(&mut self, targets: Span, clear: bool, each: &mut dyn FnMut(Span)) {
        self.settle();
        let tables = self.tables();
        let Some(record) = &mut self.record else { return each(targets) };
        let replaced = self.replaced.iter().map(|replaced| (&replaced.tables, (&replaced.areas, replaced.alignment)));
        let mut failures = 0;
        for (tables, map) in std::iter::once((&tables, (&self.areas, self.scope.alignment))).chain(replaced) {
            failures += read(tables, map, targets, clear, &mut |span| {
                if clear {
                    // The host's pages may be larger, and reach beyond what was asked for.
                    record.pages.add(span);
                } else if let Some(inside) = span.intersection(targets) {
                    each(inside);
                }
            });
        }
        self.figures.failures += failures;
        record.pages.each(targets, each);
        if clear {
            record.pages.remove(targets);
        }
    }
}
