//! Areas are made and removed in the IOAS that is in use.

use std::ops::Bound;

use super::book::{Area, AreaMap, Part, Scope, Wanted, overlapping, uncovered};
use super::{Areas, AreasError, Doomed};
use crate::kernel::{CopyRange, Errno, IoasId};
use crate::pins::{Pins, Use};
use crate::table::{Loss, Losses, Piece, narrowed};
use crate::{Attributes, Change, Iova, Span};

/// Attempts that may fail in one commit, for pieces that were refused before.
const RETRIES: usize = 64;

/// Copies guest memory: all areas of a part or none.
pub(super) fn copy(pins: &Pins, scope: &Scope, to: IoasId, part: &Part, areas: &mut AreaMap) -> Result<(), Errno> {
    let memory = part.memory();
    let blocks = scope.view.within(memory);
    // Held before the kernel copies, so that the memory cannot go between the two.
    let held: Option<Vec<Use>> = blocks.iter().map(Use::take).collect();
    let held = held.ok_or(Errno::ENOENT)?;
    let source = (pins.ioas().id(), memory.first);
    copy_range(pins, source, to, part)?;
    for held in held {
        let Some(inside) = held.block().span.intersection(memory) else { continue };
        let at = |address: u64| part.iova.first + (address - memory.first);
        let area = Area { last: at(inside.last), address: inside.first, flags: part.flags, joined: part.joined, held };
        areas.insert(at(inside.first), area);
    }
    Ok(())
}

/// The call: what `source` has from an IOVA on becomes what the part says.
pub(super) fn copy_range(pins: &Pins, (source, from): (IoasId, u64), to: IoasId, part: &Part) -> Result<(), Errno> {
    let copy = CopyRange {
        flags: part.flags,
        destination: to,
        destination_iova: Some(Iova(part.iova.first)),
        source,
        source_iova: Iova(from),
        length: part.iova.length_minus_one().checked_add(1).ok_or(Errno::EOVERFLOW)?,
    };
    pins.kernel().ioas_copy(&copy).map(drop)
}

impl Areas {
    /// Forgets what the guest took away.
    pub(super) fn forget(&mut self, unmaps: &[Change]) {
        for change in unmaps {
            let first = change.span().first;
            if self.wanted.remove(&first).is_some() {
                self.lost.remove(&first);
                self.refused.remove(&first);
            }
        }
    }

    /// Remembers what the guest wants.
    pub(super) fn want(&mut self, maps: &[Change]) {
        for piece in maps.iter().filter_map(piece_of) {
            if self.wanted.len() < self.limits.pieces {
                self.wanted.insert(piece.iova.first, Wanted::of(piece));
            } else {
                self.figures.forgotten += 1;
                self.forgotten.add(piece.iova);
            }
        }
    }

    /// Removes areas. Where one must be cut, everything is swapped, or, if nobody is attached, what stays is made anew.
    pub(super) fn let_go(&mut self, doomed: &Doomed) {
        // What is behind memory that was withdrawn is lost until that is back.
        for first in &doomed.gone {
            let Some(area) = self.areas.get(first).filter(|area| area.held.block().is_closed()) else { continue };
            self.lost.extend(overlapping(&self.wanted, area.span(*first)).map(|(first, _)| first));
        }
        let changed = if self.limits.hitless_changes && !self.attached.is_empty() { self.changed(&doomed.gone) } else { 0 };
        if doomed.cut.is_empty() && changed == 0 {
            return self.unmap_areas(&doomed.gone);
        }
        if doomed.cut.iter().any(|first| self.areas.get(first).is_some_and(|area| area.joined)) {
            self.joining = false;
        }
        if self.attached.is_empty() {
            return self.interrupt(doomed);
        }
        let mut all: Vec<u64> = doomed.gone.iter().chain(&doomed.cut).copied().collect();
        all.sort_unstable();
        match self.rebuild(&all) {
            Ok(()) => {}
            Err(Errno::E2BIG) => {
                self.figures.interrupted += doomed.cut.len() as u64 + changed;
                self.interrupt(doomed);
            }
            Err(_) => {
                self.figures.failures += 1;
                self.figures.interrupted += changed;
                self.unmap_areas(&doomed.gone);
                self.stale.extend(&doomed.cut);
            }
        }
    }

    /// How many of these areas have others in their place: what is wanted there allows something else, or leads elsewhere.
    fn changed(&self, gone: &[u64]) -> u64 {
        let is_changed = |first: &&u64| {
            let area = self.areas.get(first).filter(|area| !area.held.block().is_closed());
            area.is_some_and(|area| overlapping(&self.wanted, area.span(**first)).next().is_some())
        };
        gone.iter().filter(is_changed).count() as u64
    }

    /// Removes areas with pages that should stay, and maps those again.
    pub(super) fn interrupt(&mut self, doomed: &Doomed) {
        let mut all: Vec<u64> = doomed.gone.iter().chain(&doomed.cut).copied().collect();
        all.sort_unstable();
        let spans: Vec<Span> = doomed.cut.iter().filter_map(|first| self.areas.get(first).map(|area| area.span(*first))).collect();
        self.unmap_areas(&all);
        for span in spans {
            let pieces: Vec<u64> = overlapping(&self.wanted, span).map(|(first, _)| first).collect();
            pieces.into_iter().for_each(|first| self.fill_again(first));
        }
    }

    /// Unmaps areas, ascending: one call for those that have no other area between them. What fails is stale.
    pub(super) fn unmap_areas(&mut self, firsts: &[u64]) {
        let mut done = 0;
        while let Some(first) = firsts.get(done) {
            let present = self.areas.range(*first..).map(|(first, area)| (*first, area.last));
            let run: Vec<(u64, u64)> = present.zip(&firsts[done..]).take_while(|((there, _), wanted)| there == *wanted).map(|(one, _)| one).collect();
            done += run.len().max(1);
            let Some((_, last)) = run.last() else { continue };
            let gone = self.unmap_span(Span { first: *first, last: *last }).is_ok();
            for (first, _) in run {
                if gone {
                    self.remove_area(first);
                    self.stale.remove(&first);
                } else {
                    self.stale.insert(first);
                }
            }
        }
    }

    fn unmap_span(&mut self, span: Span) -> Result<(), Errno> {
        let length = span.length_minus_one().saturating_add(1);
        let unmapped = self.pins.kernel().ioas_unmap(self.ioas.id(), Iova(span.first), length);
        self.figures.failures += u64::from(unmapped.is_err());
        unmapped.map(drop)
    }

    /// Tries again what could not be removed or cut.
    pub(super) fn remove_stale(&mut self) -> Result<(), AreasError> {
        if self.stale.is_empty() {
            return Ok(());
        }
        let firsts = std::mem::take(&mut self.stale);
        let doomed = self.judge(firsts.iter().copied());
        if !doomed.cut.is_empty() && !self.attached.is_empty() {
            let mut all: Vec<u64> = doomed.gone.iter().chain(&doomed.cut).copied().collect();
            all.sort_unstable();
            if self.rebuild(&all).is_ok() {
                return Ok(());
            }
            // Nobody may reach what was taken away: that comes before the pages that should not be interrupted.
            self.figures.failures += 1;
            self.figures.interrupted += doomed.cut.len() as u64;
        }
        let mut result = Ok(());
        for first in doomed.gone.iter().chain(&doomed.cut) {
            let Some(area) = self.areas.get(first).map(|area| area.span(*first)) else { continue };
            match self.unmap_span(area) {
                // The call before may have come half-way.
                Ok(()) | Err(Errno::ENOENT) => self.remove_area(*first),
                Err(errno) => {
                    self.stale.insert(*first);
                    result = Err(AreasError::Unmap { area, errno });
                }
            }
            let pieces: Vec<u64> = overlapping(&self.wanted, area).map(|(first, _)| first).collect();
            self.refused.extend(pieces);
        }
        result
    }

    /// Maps what was just told, as far as there is no area yet.
    pub(super) fn fill_told(&mut self, maps: &[Change]) {
        let (mut parts, mut free, mut todo) = (Vec::new(), Vec::new(), Vec::<Part>::new());
        for piece in maps.iter().filter_map(piece_of) {
            let first = piece.iova.first;
            let Some(wanted) = self.wanted.get(&first).copied() else { continue };
            parts.clear();
            let lost = self.parts(first, &wanted, piece, &mut parts);
            if lost {
                self.lost.insert(first);
            }
            for part in &parts {
                if uncovered(part, &self.areas, &mut free) {
                    self.refused.insert(first);
                }
            }
            for part in free.drain(..) {
                let limit = if self.joining { self.limits.join } else { 0 };
                if !todo.last_mut().is_some_and(|last| last.join(&part, limit)) {
                    todo.push(part);
                }
            }
        }
        let mut full = false;
        for part in todo {
            if !full && let Err(errno) = self.copy_here(&part) {
                full = errno == Errno::ENOMEM;
            } else if !full {
                continue;
            }
            let pieces: Vec<u64> = overlapping(&self.wanted, part.iova).map(|(first, _)| first).collect();
            self.refused.extend(pieces);
        }
    }

    /// The parts of a piece that was told; what is lost is counted. True if something is.
    fn parts(&mut self, first: u64, wanted: &Wanted, piece: &Piece, parts: &mut Vec<Part>) -> bool {
        let (mut any, mut count) = (false, count_lost(&mut self.losses, *piece));
        self.scope.parts(first, wanted, parts, &mut |loss, span| {
            any = true;
            count(loss, span);
        });
        drop(count);
        if !parts.is_empty() {
            count_narrowed(&mut self.losses, piece);
            self.figures.read_only += u64::from(parts.iter().any(|part| part.flags != wanted.flags));
        }
        any
    }

    /// Copies into the IOAS that is in use.
    pub(super) fn copy_here(&mut self, part: &Part) -> Result<(), Errno> {
        if self.areas.len() + self.scope.view.within(part.memory()).len() > self.limits.areas {
            self.figures.without_room += 1;
            return Err(Errno::ENOMEM);
        }
        let copied = copy(&self.pins, &self.scope, self.ioas.id(), part, &mut self.areas);
        if let Err(errno) = copied {
            self.figures.failures += 1;
            // The ranges may have changed behind our back.
            self.ranges_unknown |= errno == Errno::EINVAL;
        }
        copied
    }

    /// Maps what is missing of a piece that was told before.
    pub(super) fn fill_again(&mut self, first: u64) {
        if let Err(Some(_)) = self.try_again(first) {
            self.refused.insert(first);
        } else {
            self.refused.remove(&first);
        }
    }

    /// None in the error: the piece is not wanted any more.
    fn try_again(&mut self, first: u64) -> Result<(), Option<Errno>> {
        let wanted = *self.wanted.get(&first).ok_or(None)?;
        let (mut parts, mut free, mut lost, mut blocked) = (Vec::new(), Vec::new(), false, false);
        self.scope.parts(first, &wanted, &mut parts, &mut |_, _| lost = true);
        if lost {
            self.lost.insert(first);
        } else {
            self.lost.remove(&first);
        }
        for part in &parts {
            blocked |= uncovered(part, &self.areas, &mut free);
        }
        for part in free {
            self.copy_here(&part)?;
        }
        if blocked { Err(Some(Errno::EEXIST)) } else { Ok(()) }
    }

    /// Looks again at what was lost: memory or ranges are not what they were.
    pub(super) fn fill_lost(&mut self) {
        let firsts: Vec<u64> = self.lost.iter().copied().collect();
        firsts.into_iter().for_each(|first| self.fill_again(first));
    }

    /// Tries again what the kernel refused, beginning where the last attempt ended.
    pub(super) fn retry(&mut self) {
        let mut failures = 0;
        for _ in 0..self.refused.len() {
            let behind = self.refused.range((Bound::Included(self.retry_from), Bound::Unbounded)).next();
            let Some(first) = behind.or_else(|| self.refused.first()).copied() else { return };
            let result = self.try_again(first);
            self.retry_from = first.wrapping_add(1);
            match result {
                Ok(()) | Err(None) => {
                    self.refused.remove(&first);
                }
                Err(Some(errno)) => {
                    failures += 1;
                    if failures == RETRIES || errno == Errno::ENOMEM {
                        return;
                    }
                }
            }
        }
    }
}

pub(super) const fn piece_of(change: &Change) -> Option<&Piece> {
    match change {
        Change::Map(piece) => Some(piece),
        Change::Unmap(_) => None,
    }
}

/// Counts what cannot be mapped of a piece.
pub(super) fn count_lost(losses: &mut Losses, piece: Piece) -> impl FnMut(Loss, Span) {
    move |loss, span| {
        let example = Piece { iova: span, address: piece.address.wrapping_add(span.first - piece.iova.first), ..piece };
        losses.add(loss, || example, 1, u128::from(span.length_minus_one()) + 1);
    }
}

/// Counts what areas do not say of a piece that is mapped.
pub(super) fn count_narrowed(losses: &mut Losses, piece: &Piece) {
    let access = piece.attributes.access(false);
    let of = |yes, attribute| if yes { attribute } else { Attributes::none() };
    // The kernel maps memory write-back, and lets devices snoop.
    let granted = of(access.read, Attributes::READ).with(of(access.write, Attributes::WRITE)).with(Attributes::COHERENT);
    for loss in narrowed(piece.attributes, granted).unwrap_or_default() {
        losses.add(loss, || *piece, 1, u128::from(piece.iova.length_minus_one()) + 1);
    }
}
