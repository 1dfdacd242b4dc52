//! A second IOAS in the place of the first: what stays the same translates all the while.
//!
//! ```text
//!   new IOAS <- runs of areas that stay, one copy each, from the old one
//!            <- pieces of areas that are cut, one copy each, from guest memory
//!   each attachment: replaced            nothing failed yet: an error here leaves everything as it was
//!   the old IOAS goes, with its areas    unless an attachment could not be moved: that is tried again at each commit
//! ```

use super::book::{Area, AreaMap, Part, Scope, Verdict, judge, overlapping, uncovered};
use super::fill::{copy, copy_range, count_lost};
use super::{Areas, AreasError, Attached, Replaced};
use crate::Span;
use crate::kernel::handle::{Device, Hwpt, Ioas, PageTable};
use crate::kernel::{Errno, IovaRanges, Pasid};
use crate::pins::PAGE;

impl Areas {
    /// Makes an IOAS without the areas in `left_out` (ascending), but with what is wanted of them, and moves all attachments. E2BIG: a guest may not cause so
    /// much work.
    pub(super) fn rebuild(&mut self, left_out: &[u64]) -> Result<(), Errno> {
        let mut all: Vec<u64> = left_out.iter().chain(&self.stale).copied().collect();
        all.sort_unstable();
        all.dedup();
        if self.runs(&all).len() > self.limits.swap {
            return Err(Errno::E2BIG);
        }
        // Declared in this order, so that on an error memory is let go of after the kernel's copies are gone.
        let mut areas = AreaMap::new();
        let next = Ioas::alloc(self.pins.kernel())?;
        self.prepare(&next, &self.scope, &all, &mut areas)?;
        self.swap(areas, next, None)
    }

    /// Attaches a device that must not translate some of what is mapped.
    pub(super) fn attach_narrowing(&mut self, device: &Device, pasid: Option<Pasid>) -> Result<(), Errno> {
        let next = Ioas::alloc(self.pins.kernel())?;
        // Empty, it takes the device and says what that leaves. Nothing is lost: the device was blocked.
        let newcomer = self.put_on(&next, device, pasid, &[])?;
        let usable = self.pins.kernel().ioas_iova_ranges(next.id())?;
        self.narrowed(next, &usable, Some(newcomer))?;
        self.query_ranges();
        Ok(())
    }

    /// Has no areas outside of these any more, for somebody who is about to come.
    pub(super) fn narrow(&mut self, usable: &IovaRanges) -> Result<(), Errno> {
        let next = Ioas::alloc(self.pins.kernel())?;
        self.narrowed(next, usable, None)?;
        // If nobody comes after all, they are what they were.
        self.ranges_unknown = true;
        Ok(())
    }

    /// Has another IOAS, with what is usable for a newcomer, who may be on it, and for all who are attached.
    fn narrowed(&mut self, next: Ioas, usable: &IovaRanges, newcomer: Option<Attached>) -> Result<(), Errno> {
        // Declared in this order, as in `rebuild`.
        let mut areas = AreaMap::new();
        let (next, newcomer) = (next, newcomer);
        let mut scope = Scope { ranges: usable.ranges.clone(), alignment: usable.alignment.max(PAGE), view: self.scope.view.clone() };
        if !self.attached.is_empty() {
            let both = |range: &Span| self.scope.ranges.iter().filter_map(|other| range.intersection(*other)).collect::<Vec<_>>();
            scope.ranges = scope.ranges.iter().flat_map(both).collect();
            scope.alignment = scope.alignment.max(self.scope.alignment);
        }
        let low = scope.alignment - 1;
        let unfit = self.areas.iter().filter(|(first, area)| {
            (**first | area.address | area.span(**first).length_minus_one().wrapping_add(1)) & low != 0
                || judge(**first, area, &self.wanted, &scope.ranges) != Verdict::Keep
        });
        let mut left_out: Vec<u64> = unfit.map(|(first, _)| *first).chain(self.stale.iter().copied()).collect();
        left_out.sort_unstable();
        left_out.dedup();
        self.prepare(&next, &scope, &left_out, &mut areas)?;
        let mut lost: Vec<u64> = Vec::new();
        for first in &left_out {
            let Some(area) = self.areas.get(first) else { continue };
            lost.extend(overlapping(&self.wanted, area.span(*first)).map(|(first, _)| first));
        }
        lost.sort_unstable();
        lost.dedup();
        self.swap(areas, next, newcomer)?;
        self.scope = scope;
        for first in lost {
            let Some(wanted) = self.wanted.get(&first) else { continue };
            let (mut any, mut count) = (false, count_lost(&mut self.losses, wanted.piece(first)));
            self.scope.parts(first, wanted, &mut Vec::new(), &mut |loss, span| {
                any = true;
                count(loss, span);
            });
            drop(count);
            if any {
                self.lost.insert(first);
            }
        }
        Ok(())
    }

    /// Fills a new IOAS.
    fn prepare(&self, next: &Ioas, scope: &Scope, left_out: &[u64], areas: &mut AreaMap) -> Result<(), Errno> {
        for run in &self.runs(left_out) {
            copy_range(&self.pins, (self.ioas.id(), run.iova.first), next.id(), run)?;
        }
        areas.extend(self.staying(left_out).map(|(first, area)| (first, area.clone())));
        let mut last_piece = None;
        for first in left_out {
            let Some(area) = self.areas.get(first) else { continue };
            for (at, wanted) in overlapping(&self.wanted, area.span(*first)) {
                // One that also had the area before this one.
                if last_piece.is_some_and(|last| at <= last) {
                    continue;
                }
                let (mut parts, mut free) = (Vec::new(), Vec::new());
                scope.parts(at, wanted, &mut parts, &mut |_, _| {});
                for part in &parts {
                    uncovered(part, areas, &mut free);
                }
                for part in &free {
                    copy(&self.pins, scope, next.id(), part, areas)?;
                }
                last_piece = Some(at);
            }
        }
        Ok(())
    }

    /// Areas that stay.
    fn staying<'a>(&'a self, left_out: &'a [u64]) -> impl Iterator<Item = (u64, &'a Area)> {
        self.areas.iter().map(|(first, area)| (*first, area)).filter(|(first, _)| left_out.binary_search(first).is_err())
    }

    /// What one copy each takes from the old IOAS, area by area.
    fn runs(&self, left_out: &[u64]) -> Vec<Part> {
        let mut runs: Vec<Part> = Vec::new();
        for (first, area) in self.staying(left_out) {
            match runs.last_mut() {
                Some(run) if run.iova.last.checked_add(1) == Some(first) && run.flags == area.flags => run.iova.last = area.last,
                _ => runs.push(Part { iova: area.span(first), address: area.address, flags: area.flags, joined: false }),
            }
        }
        runs
    }

    /// Moves all attachments to a new IOAS. Fails only if none was moved.
    fn swap(&mut self, areas: AreaMap, next: Ioas, newcomer: Option<Attached>) -> Result<(), Errno> {
        let mut tables: Vec<Option<Hwpt>> = Vec::with_capacity(self.attached.len());
        for index in 0..self.attached.len() {
            let device = self.attached[index].attachment.device();
            let place = self.attached[..index].iter().position(|one| one.attachment.device().id() == device.id());
            let hwpt = match place {
                Some(place) => tables[place].clone(),
                None => self.page_table(&next, device, newcomer.as_slice())?,
            };
            tables.push(hwpt);
        }
        let mut moved = false;
        let old = self.tables();
        for (attached, hwpt) in self.attached.iter_mut().zip(tables) {
            let to = hwpt.as_ref().map_or(PageTable::Ioas(&next), PageTable::Hwpt);
            match attached.attachment.replace(to) {
                Ok(()) => (moved, attached.behind) = (true, false),
                Err(errno) if !moved => return Err(errno),
                Err(_) => {
                    self.figures.failures += 1;
                    attached.behind = true;
                }
            }
            attached.hwpt = hwpt;
        }
        self.attached.extend(newcomer);
        let (ioas, areas) = (std::mem::replace(&mut self.ioas, next), std::mem::replace(&mut self.areas, areas));
        let tables = self.with_left(old);
        self.replaced.push(Replaced { tables, _ioas: ioas, areas, alignment: self.scope.alignment });
        if !self.attached.iter().any(|one| one.behind) {
            self.forget_replaced();
        }
        self.stale.clear();
        self.figures.swaps += 1;
        Ok(())
    }

    /// Moves attachments that could not be moved before.
    pub(super) fn catch_up(&mut self) -> Result<(), AreasError> {
        let mut result = Ok(());
        for attached in self.attached.iter_mut().filter(|one| one.behind) {
            let to = attached.hwpt.as_ref().map_or(PageTable::Ioas(&self.ioas), PageTable::Hwpt);
            match attached.attachment.replace(to) {
                Ok(()) => attached.behind = false,
                Err(errno) => {
                    self.figures.failures += 1;
                    result = Err(AreasError::Replace { device: attached.attachment.device().id(), errno });
                }
            }
        }
        if result.is_ok() {
            self.forget_replaced();
        }
        result
    }
}
