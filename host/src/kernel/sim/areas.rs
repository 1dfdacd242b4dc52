//! An IOAS: areas of user memory at IOVAs, mirrored into the kernel's table of every unit that needs them.
//!
//! An area goes into all tables or into none. Whatever is taken away is first removed from all tables, then the units are drained, and only then is
//! memory unpinned.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::domain::{Domain, Extent};
use super::inject::Steps;
use super::memory::UserMemory;
use super::pins::{Locked, PAGE, Pages};
use super::unit::Unit;
use crate::Span;
use crate::kernel::{Errno, IovaRanges, MapFlags, Result};

/// What the tables are filled from and charged to.
#[derive(Clone, Copy)]
pub(super) struct Charge<'a> {
    pub(super) memory: &'a UserMemory,
    pub(super) locked: &'a Locked,
    pub(super) steps: &'a Steps,
}

/// Part of a pages object.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub(super) pages: Arc<Pages>,
    /// Bytes from the beginning of the pages object.
    pub(super) offset: u64,
    pub(super) length: u64,
}

#[derive(Clone, Debug)]
struct Area {
    last: u64,
    piece: Piece,
    flags: MapFlags,
}

impl Area {
    fn extent(&self) -> Extent {
        Extent {
            last: self.last,
            user_address: self.piece.pages.user_address + self.piece.offset,
            read: self.flags.contains(MapFlags::READABLE),
            write: self.flags.contains(MapFlags::WRITEABLE),
        }
    }
}

/// An IOAS.
#[derive(Debug)]
pub(super) struct Areas {
    areas: BTreeMap<u64, Area>,
    /// The tables of each hardware page table, by its id.
    domains: BTreeMap<u32, Vec<Arc<Domain>>>,
    /// By who keeps them: a hardware page table (its aperture) or a device.
    reserved: Vec<(u32, Span)>,
    allowed: Vec<Span>,
    alignment: u64,
    huge_pages: bool,
}

impl Default for Areas {
    fn default() -> Self {
        Self { areas: BTreeMap::new(), domains: BTreeMap::new(), reserved: Vec::new(), allowed: Vec::new(), alignment: 1, huge_pages: true }
    }
}

fn overlaps(one: Span, other: Span) -> bool {
    one.intersection(other).is_some()
}

impl Areas {
    fn overlapping(&self, span: Span) -> Option<(u64, &Area)> {
        self.areas.range(..=span.last).next_back().filter(|(_, area)| area.last >= span.first).map(|(first, area)| (*first, area))
    }

    /// How many areas there are.
    pub(super) fn len(&self) -> usize {
        self.areas.len()
    }

    pub(super) fn huge_pages(&self) -> bool {
        self.huge_pages
    }

    /// EADDRINUSE if an area is not aligned to pages.
    pub(super) fn set_huge_pages(&mut self, enabled: bool) -> Result<()> {
        let alignment = self.alignment_with(None, enabled);
        self.check_alignment(alignment)?;
        (self.huge_pages, self.alignment) = (enabled, alignment);
        Ok(())
    }

    fn alignment_with(&self, more: Option<&[Arc<Domain>]>, huge_pages: bool) -> u64 {
        let domains = self.domains.values().map(Vec::as_slice).chain(more).flatten();
        let smallest = if huge_pages { 1 } else { PAGE };
        domains.map(|domain| domain.unit.config.page_size).fold(smallest, u64::max)
    }

    fn check_alignment(&self, alignment: u64) -> Result<()> {
        let misaligned = |(first, area): (&u64, &Area)| {
            let user = area.piece.pages.user_address + area.piece.offset;
            (first | user | area.piece.length) & (alignment - 1) != 0
        };
        if alignment > self.alignment && self.areas.iter().any(misaligned) { Err(Errno::EADDRINUSE) } else { Ok(()) }
    }

    // Ranges.

    /// Sorted gaps between the reserved spans.
    pub(super) fn ranges(&self) -> IovaRanges {
        let mut reserved: Vec<Span> = self.reserved.iter().map(|(_, span)| *span).collect();
        reserved.sort_unstable();
        let mut ranges = Vec::new();
        let mut next = Some(0);
        for span in reserved {
            let Some(first) = next else { break };
            if span.first > first {
                ranges.extend(Span::new(first, span.first - 1));
            }
            next = span.last.checked_add(1).map(|after| after.max(first));
        }
        ranges.extend(next.and_then(|first| Span::new(first, u64::MAX)));
        IovaRanges { ranges, alignment: self.alignment }
    }

    pub(super) fn allow(&mut self, ranges: &[Span]) -> Result<()> {
        let mut sorted = ranges.to_vec();
        sorted.sort_unstable();
        if sorted.iter().any(|span| span.first == span.last) || sorted.windows(2).any(|pair| overlaps(pair[0], pair[1])) {
            return Err(Errno::EINVAL);
        }
        if sorted.iter().any(|span| self.reserved.iter().any(|(_, reserved)| overlaps(*span, *reserved))) {
            return Err(Errno::EADDRINUSE);
        }
        self.allowed = sorted;
        Ok(())
    }

    /// Keeps spans free for an owner, all or none.
    pub(super) fn reserve(&mut self, owner: u32, spans: &[Span]) -> Result<()> {
        let in_use = |span: &Span| self.overlapping(*span).is_some() || self.allowed.iter().any(|allowed| overlaps(*allowed, *span));
        if spans.iter().any(in_use) {
            return Err(Errno::EADDRINUSE);
        }
        self.reserved.extend(spans.iter().map(|span| (owner, *span)));
        Ok(())
    }

    pub(super) fn unreserve(&mut self, owner: u32) {
        self.reserved.retain(|(other, _)| *other != owner);
    }

    // Hardware page tables.

    /// Fills the tables of a new hardware page table with all areas, or leaves everything as it was.
    pub(super) fn add_domains(&mut self, id: u32, domains: Vec<Arc<Domain>>, charge: Charge<'_>) -> Result<()> {
        charge.steps.step()?;
        let alignment = self.alignment_with(Some(&domains), self.huge_pages);
        self.check_alignment(alignment)?;
        let outside: Vec<Span> = domains.iter().flat_map(|domain| outside(domain.unit.config.aperture)).collect();
        self.reserve(id, &outside)?;
        let first = self.domains.is_empty();
        let mut pinned = Vec::new();
        for area in self.areas.values().filter(|_| first) {
            if let Err(errno) = area.piece.pages.pin(area.piece.offset, area.piece.length, charge.memory, charge.locked, charge.steps) {
                unpin(&pinned, charge.locked);
                self.unreserve(id);
                return Err(errno);
            }
            pinned.push(area.piece.clone());
        }
        for domain in &domains {
            if let Err(errno) = charge.steps.step() {
                unpin(&pinned, charge.locked);
                self.unreserve(id);
                return Err(errno); // nothing is attached to the new tables yet: what was filled just goes
            }
            for (first, area) in &self.areas {
                domain.insert(*first, area.extent());
            }
        }
        self.alignment = alignment;
        self.domains.insert(id, domains);
        Ok(())
    }

    /// The hardware page table is gone: nothing is attached to it any more.
    pub(super) fn remove_domains(&mut self, id: u32, locked: &Locked) {
        self.unreserve(id);
        if self.domains.remove(&id).is_some() && self.domains.is_empty() {
            for area in self.areas.values() {
                area.piece.pages.unpin(area.piece.offset, area.piece.length, locked);
            }
        }
        self.alignment = self.alignment_with(None, self.huge_pages);
    }

    /// Each unit that holds a table of this IOAS, once.
    fn units(&self) -> Vec<Arc<Unit>> {
        let mut units: Vec<Arc<Unit>> = Vec::new();
        for domain in self.domains.values().flatten() {
            if !units.iter().any(|unit| Arc::ptr_eq(unit, &domain.unit)) {
                units.push(Arc::clone(&domain.unit));
            }
        }
        units
    }

    // Areas.

    /// Maps pieces one after the other from `iova`, or from where there is room: all or none.
    pub(super) fn map(&mut self, iova: Option<u64>, pieces: &[Piece], flags: MapFlags, charge: Charge<'_>) -> Result<u64> {
        let length = pieces.iter().try_fold(0u64, |sum, piece| sum.checked_add(piece.length)).ok_or(Errno::EOVERFLOW)?;
        if length == 0 || pieces.iter().any(|piece| piece.length & (self.alignment - 1) != 0) {
            return Err(Errno::EINVAL);
        }
        if flags.contains(MapFlags::WRITEABLE) && pieces.iter().any(|piece| !piece.pages.writeable) {
            return Err(Errno::EPERM);
        }
        let first = match iova {
            Some(iova) => self.check(iova, length)?,
            None => self.choose(length, pieces).ok_or(Errno::ENOSPC)?,
        };
        if pieces.iter().any(|piece| ((piece.pages.user_address + piece.offset) % PAGE) & (self.alignment - 1) != 0) {
            return Err(Errno::EINVAL);
        }
        charge.steps.step()?;
        let mut at = first;
        let mut made = Vec::new();
        for piece in pieces {
            let area = Area { last: at + (piece.length - 1), piece: piece.clone(), flags };
            if let Err(errno) = self.fill(at, &area, charge) {
                self.take_away(made, charge.locked);
                return Err(errno);
            }
            at = area.last.wrapping_add(1);
            made.push((area.last - (piece.length - 1), area));
        }
        self.areas.extend(made);
        Ok(first)
    }

    fn check(&self, iova: u64, length: u64) -> Result<u64> {
        if iova & (self.alignment - 1) != 0 {
            return Err(Errno::EINVAL);
        }
        let last = iova.checked_add(length - 1).ok_or(Errno::EOVERFLOW)?;
        let span = Span { first: iova, last };
        if self.reserved.iter().any(|(_, reserved)| overlaps(span, *reserved)) {
            return Err(Errno::EINVAL);
        }
        if self.overlapping(span).is_some() { Err(Errno::EEXIST) } else { Ok(iova) }
    }

    /// The lowest room, but not at 0, aligned as far as the memory is so that large pages can be used, and with the offset into a page that the
    /// memory has.
    fn choose(&self, length: u64, pieces: &[Piece]) -> Option<u64> {
        let piece = pieces.first()?;
        let user = piece.pages.user_address + piece.offset;
        let offset = user % PAGE;
        let alignment = (1u64 << length.ilog2().min(user.trailing_zeros()).min(30)).max(PAGE).max(self.alignment);
        let allowed = if self.allowed.is_empty() { vec![Span::ALL] } else { self.allowed.clone() };
        let free = self.ranges().ranges;
        for range in allowed.iter().flat_map(|allowed| free.iter().filter_map(|range| range.intersection(*allowed))) {
            let mut first = range.first.max(1).checked_next_multiple_of(alignment)?.checked_add(offset)?;
            while let Some(last) = first.checked_add(length - 1).filter(|last| *last <= range.last) {
                match self.areas.range(..=last).next_back().filter(|(_, area)| area.last >= first) {
                    None => return Some(first),
                    Some((_, area)) => first = area.last.checked_add(1)?.checked_next_multiple_of(alignment)?.checked_add(offset)?,
                }
            }
        }
        None
    }

    /// Pins an area if anybody needs it, and puts it into every table or into none.
    fn fill(&self, first: u64, area: &Area, charge: Charge<'_>) -> Result<()> {
        if self.domains.is_empty() {
            return Ok(());
        }
        area.piece.pages.pin(area.piece.offset, area.piece.length, charge.memory, charge.locked, charge.steps)?;
        let mut filled: Vec<&Arc<Domain>> = Vec::new();
        for domain in self.domains.values().flatten() {
            if let Err(errno) = charge.steps.step() {
                for domain in filled {
                    domain.remove(first);
                    domain.unit.drain();
                }
                area.piece.pages.unpin(area.piece.offset, area.piece.length, charge.locked);
                return Err(errno);
            }
            domain.insert(first, area.extent());
            filled.push(domain);
        }
        Ok(())
    }

    /// Removes areas from the tables, waits for the units, unpins.
    fn take_away(&self, areas: Vec<(u64, Area)>, locked: &Locked) {
        if self.domains.is_empty() {
            return;
        }
        for (first, _) in &areas {
            for domain in self.domains.values().flatten() {
                domain.remove(*first);
            }
        }
        self.units().iter().for_each(|unit| unit.drain());
        for (_, area) in areas {
            area.piece.pages.unpin(area.piece.offset, area.piece.length, locked);
        }
    }

    /// Removes the areas within the span; ENOENT if there are none or one is cut, and then those in front of it are gone.
    pub(super) fn unmap(&mut self, span: Span, locked: &Locked) -> Result<u64> {
        let mut gone = Vec::new();
        let mut cut = self.overlapping(Span { first: span.first, last: span.first }).is_some_and(|(first, _)| first < span.first);
        if !cut {
            for (first, area) in self.areas.range(span.first..=span.last) {
                if area.last > span.last {
                    cut = true;
                    break;
                }
                gone.push((*first, area.clone()));
            }
        }
        let bytes = gone.iter().fold(0u64, |sum, (_, area)| sum.saturating_add(area.piece.length));
        let none = gone.is_empty();
        for (first, _) in &gone {
            self.areas.remove(first);
        }
        self.take_away(gone, locked);
        if cut || none { Err(Errno::ENOENT) } else { Ok(bytes) }
    }

    /// What maps a span, piece by piece; ENOENT if there is a gap.
    pub(super) fn pieces(&self, span: Span) -> Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        let mut at = span.first;
        loop {
            let (first, area) = self.overlapping(Span { first: at, last: at }).ok_or(Errno::ENOENT)?;
            let last = area.last.min(span.last);
            pieces.push(Piece { pages: Arc::clone(&area.piece.pages), offset: area.piece.offset + (at - first), length: last - at + 1 });
            if last == span.last {
                return Ok(pieces);
            }
            at = last + 1;
        }
    }
}

/// What is not in a unit's aperture.
fn outside(aperture: Span) -> impl Iterator<Item = Span> {
    let below = aperture.first.checked_sub(1).map(|last| Span { first: 0, last });
    let above = aperture.last.checked_add(1).map(|first| Span { first, last: u64::MAX });
    below.into_iter().chain(above)
}

fn unpin(pieces: &[Piece], locked: &Locked) {
    for piece in pieces {
        piece.pages.unpin(piece.offset, piece.length, locked);
    }
}
