//! An IOASID: what is in it, and the calls that keep every host's side of it in step.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::context::Inner;
use super::device::{Connected, Held};
use super::managed::{self, Managed, Target};
use super::metrics::Counter;
use super::part::{self, Dropped, Engine, Part, Users};
use super::record::{Log, lock};
use super::recover::note;
use super::request::check_host_table;
use super::software::Lookups;
use super::watch::Watched;
use super::{Error, Explanation, GuestMemory, GuestView, Kind, Property, Refusal, Request, Strategy};
use crate::kernel::Pasid;
use crate::kernel::handle::FaultQueue;
use crate::lookup::Lookup;
use crate::plugin::queue::Invalidation;
use crate::plugin::{Outcome, Translated};
use crate::sync::{LiveError, Report, Unwatched, Watcher};
use crate::table::{AddressSpace, Geometry, OpenError, Piece};
use crate::virtio_iommu::Domain;
use crate::{Access, Change, Gpa, Span};

/// Number of an IOASID in its context; never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpaceId(pub u64);

impl fmt::Display for SpaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IOASID {}", self.0)
    }
}

/// What is in an address space.
#[derive(Debug)]
pub(super) enum Content {
    /// Mappings in an address space of the kernel's.
    Managed(Box<Managed>),
    /// What a guest asked for.
    Requests(Domain),
    /// Tables of the guest.
    Guest,
}

/// Lookups in software.
pub(super) type Software = Engine<Lookups>;

#[derive(Debug)]
pub(super) struct State {
    pub(super) parts: Vec<Part>,
    /// Who was detached because the kernel failed, as far as [`Connected::is_waiting`] still says so.
    pub(super) blocked: Users,
    pub(super) software: Option<Software>,
    /// Opened when it is first needed: translates for faults.
    pub(super) translator: Option<Box<AddressSpace>>,
    pub(super) content: Content,
    /// What the guest's structures say now.
    pub(super) kind: Kind,
    /// Geometry of the guest's first table.
    pub(super) geometry: Option<Geometry>,
    /// Hardware would mark in one of the guest's tables what is accessed.
    pub(super) marks_accessed: bool,
    pub(super) faults: Option<FaultQueue>,
    /// While writes are recorded: those that parts knew of that are gone.
    pub(super) written: Option<Log>,
}

#[derive(Debug)]
pub(super) struct Space {
    state: Mutex<State>,
    id: SpaceId,
    request: Request,
    /// Instead of the context's.
    watched: Option<Arc<Watched>>,
    context: Arc<Inner>,
}

impl Space {
    pub(super) fn new(context: &Arc<Inner>, id: SpaceId, request: Request, watcher: Option<Box<dyn Watcher>>) -> Result<Arc<Self>, Error> {
        check_host_table(context, &request)?;
        let content = match &request.kind {
            Kind::Managed => Content::Managed(Box::new(Managed::new(context, request.limits.mappings)?)),
            Kind::Requests => Content::Requests(Domain::new()),
            Kind::Guest(_) => Content::Guest,
        };
        let (geometry, marks_accessed) = geometry(context, &request.kind)?;
        let faults =
            if request.page_requests { Some(FaultQueue::alloc(context.kernel()).map_err(Error::kernel("making a queue of faults"))?) } else { None };
        let kind = request.kind.clone();
        let state = State {
            parts: Vec::new(),
            blocked: Users::new(),
            software: None,
            translator: None,
            content,
            kind,
            geometry,
            marks_accessed,
            faults,
            written: None,
        };
        let watched = watcher.map(|watcher| Arc::new(Watched::new(watcher)));
        Ok(Arc::new(Self { state: Mutex::new(state), id, request, watched, context: Arc::clone(context) }))
    }

    /// For one host table.
    pub(super) fn watcher(&self) -> Box<dyn Watcher> {
        match self.watched.as_ref().or_else(|| self.context.watched()) {
            Some(watched) => Box::new(watched.of(self.id)),
            None => Box::new(Unwatched),
        }
    }

    pub(super) const fn id(&self) -> SpaceId {
        self.id
    }

    pub(super) const fn request(&self) -> &Request {
        &self.request
    }

    pub(super) const fn context(&self) -> &Arc<Inner> {
        &self.context
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Detaches a device, or a PASID of it; false if it is not attached here.
    pub(super) fn detach(self: &Arc<Self>, device: &Arc<Connected>, pasid: Option<Pasid>) -> bool {
        let mut state = self.lock();
        let slot = {
            let mut slots = device.slots();
            match slots.get(&pasid) {
                Some(slot) if Arc::ptr_eq(&slot.space, self) => slots.remove(&pasid),
                _ => return false,
            }
        };
        if let Some(mut slot) = slot {
            slot.held = Held::Nowhere;
        }
        state.parts.iter_mut().for_each(|part| drop(part.release(device, pasid)));
        let _ = state.parts.iter_mut().any(|part| part.left(Arc::as_ptr(device), pasid));
        true
    }

    /// A device that is about to go is on areas: it is not any more.
    pub(super) fn release(&self, device: &Connected, pasid: Option<Pasid>) {
        let mut state = self.lock();
        state.parts.iter_mut().for_each(|part| drop(part.release(device, pasid)));
    }

    /// Does something to each host's side. If one of them could not be brought in step, its devices are blocked; `detached` is to be dropped after the lock.
    pub(super) fn each(
        &self,
        state: &mut State,
        detached: &mut Dropped,
        mut part: impl FnMut(&mut Part) -> Result<Report, LiveError>,
        software: impl FnOnce(&mut Software) -> Result<Report, LiveError>,
    ) -> Result<Report, Error> {
        let mut all: Option<Report> = None;
        let mut failed: Option<Error> = None;
        let context = &self.context;
        let mut take = |result: Result<Report, LiveError>| match (result.inspect(|report| context.count_report(report)), &mut all) {
            (Ok(report), None) => all = Some(report),
            (Ok(report), Some(all)) => {
                // All look at the same tables: of each figure the largest counts, since some units walk these themselves.
                all.changes = all.changes.max(report.changes);
                all.offered = all.offered.max(report.offered);
                if report.blocked_count > all.blocked_count {
                    (all.blocked, all.blocked_count) = (report.blocked, report.blocked_count);
                }
                all.lacks |= report.lacks;
                all.structures |= report.structures;
                all.illegal = all.illegal.or(report.illegal);
            }
            (Err(error), _) => failed = Some(failed.take().unwrap_or_else(|| error.into())),
        };
        for one in &mut state.parts {
            let result = part(one);
            if result.is_err() {
                let users = one.block(self.id, detached);
                self.context.count_lost(users.len());
                note(&mut state.blocked, users);
            }
            take(result);
        }
        if let Some(engine) = &mut state.software {
            take(software(engine));
        }
        failed.map_or_else(|| Ok(all.unwrap_or_default()), Err)
    }

    pub(super) fn memory_changed(&self, memory: &GuestMemory) -> Result<Report, Error> {
        let _span = tracing::debug_span!("memory_changed", ioasid = self.id.0).entered();
        let mut detached = Dropped::new();
        let mut state = self.lock();
        state.translator = None;
        let State { content, software, .. } = &mut *state;
        let mut lost = Vec::new();
        let unmapped = match content {
            Content::Managed(managed) => managed.memory_changed(memory.map(), &mut lost),
            Content::Requests(_) | Content::Guest => Ok(()),
        };
        if let Some(software) = software {
            software.tell(&lost).map_err(Error::Blocked)?;
        }
        let report = self.each(&mut state, &mut detached, |part| part.memory_changed(memory), |software| software.memory_changed(memory));
        unmapped.and(report)
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(software) = state.software.take() {
            self.context.count(Counter::Questions, software.figures().questions);
        }
        let parts = std::mem::take(&mut state.parts);
        if let Some(written) = state.written.take() {
            // What they know goes there.
            drop(parts);
            if let Some(log) = lock(self.context.record()).as_ref() {
                lock(log).join(&lock(&written));
            }
        }
        self.context.forget_space(self.id);
    }
}

/// Makes all changes of a batch in a domain, or none.
fn take_all(domain: &mut Domain, batch: &[Change], most: u64) -> Result<(), Error> {
    let mut unmapped = Vec::new();
    for (index, change) in batch.iter().enumerate() {
        let Err(error) = take(domain, change, most, &mut unmapped) else { continue };
        for change in batch[..index].iter().rev() {
            // What was just mapped can be unmapped, and the reverse.
            match change {
                Change::Map(piece) => drop(domain.unmap(piece.iova, |_| {})),
                Change::Unmap(_) => drop(unmapped.pop().map(|piece| domain.map(piece))),
            }
        }
        return Err(error);
    }
    Ok(())
}

/// Makes one change; a mapping that goes is added to `unmapped`.
fn take(domain: &mut Domain, change: &Change, most: u64, unmapped: &mut Vec<Piece>) -> Result<(), Error> {
    match change {
        Change::Map(_) if domain.len() >= most => Err(Refusal::new(Property::Limit, format!("the address space has {most} mappings already")).into()),
        Change::Map(piece) => domain.map(*piece).map_err(|_| Error::Mapped(piece.iova)),
        Change::Unmap(span) => {
            let known = domain.find(span.first).copied().filter(|piece| piece.iova == *span).ok_or(Error::NotMapped(*span))?;
            domain.unmap(*span, |_| {}).map_err(|_| Error::NotMapped(*span))?;
            unmapped.push(known);
            Ok(())
        }
    }
}

/// Whether changes come as [`Change`] promises.
fn is_ordered(batch: &[Change]) -> bool {
    let rank = |change: &Change| (matches!(change, Change::Map(_)), change.span().first);
    batch.is_sorted_by_key(rank)
}

/// What changes that were made one after the other come to, as [`Change`] promises.
fn in_order(batch: &[Change]) -> Vec<Change> {
    let (mut unmaps, mut maps) = (BTreeMap::new(), BTreeMap::new());
    for change in batch {
        let first = change.span().first;
        match change {
            Change::Map(_) => drop(maps.insert(first, *change)),
            // What this batch mapped was not there before.
            Change::Unmap(_) if maps.remove(&first).is_some() => {}
            Change::Unmap(_) => drop(unmaps.insert(first, *change)),
        }
    }
    unmaps.into_values().chain(maps.into_values()).collect()
}

/// Opens the guest's first table to see what it is, and others to see whether hardware would mark in any what is accessed; an error if that cannot be.
fn geometry(context: &Inner, kind: &Kind) -> Result<(Option<Geometry>, bool), Error> {
    let Kind::Guest(GuestView { outcome: Outcome::Tables(Translated { tables, .. }), .. }) = kind else { return Ok((None, false)) };
    let (mut first, mut marks) = (None, false);
    for table in tables {
        if first.is_none() || !marks {
            let geometry = context.open(table)?.geometry().map_err(OpenError::Format)?;
            marks |= geometry.levels.iter().any(|level| level.accessed.exists());
            first = first.or(Some(geometry));
        }
    }
    Ok((first, marks))
}

/// An I/O address space: see the [module](super). Clones are the same one.
#[derive(Clone, Debug)]
pub struct Ioasid(pub(super) Arc<Space>);

impl PartialEq for Ioasid {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Ioasid {}

impl Ioasid {
    /// Its number in the context.
    #[must_use]
    pub fn id(&self) -> SpaceId {
        self.0.id
    }

    /// What it was made from.
    #[must_use]
    pub fn request(&self) -> &Request {
        &self.0.request
    }

    /// What was chosen for the units of the devices that are or were attached, in the order in which they came, and why nothing better was; last, that device models
    /// look IOVAs up, once anybody asked for [`Ioasid::lookup`].
    #[must_use]
    pub fn explain(&self) -> Vec<Explanation> {
        let state = self.0.lock();
        let lookups = state.has_lookups().then(Explanation::of_lookups);
        state.parts.iter().map(Part::explain).chain(lookups).collect()
    }

    /// Which strategy each unit has that devices are or were attached to.
    #[must_use]
    pub fn strategies(&self) -> Vec<Strategy> {
        self.0.lock().parts.iter().filter_map(Part::strategy).collect()
    }

    /// Maps `span` to what `target` leads to, in the tables of all units or in none.
    ///
    /// # Errors
    /// [`Error::Mapped`], [`Error::NotMemory`], [`Error::Kernel`]; [`Error::Refused`] by [`SpaceLimits::mappings`](super::SpaceLimits::mappings), because the span ends
    /// before it begins, or because it is not a [`Kind::Managed`] one.
    pub fn map(&self, span: Span, target: Target, access: Access) -> Result<(), Error> {
        let _span = tracing::debug_span!("map", ioasid = self.id().0, iova = %span).entered();
        let mut state = self.0.lock();
        let State { content: Content::Managed(managed), software, .. } = &mut *state else { return Err(self.wrong_kind("map")) };
        managed.map(&self.0.context, span, target, access)?;
        let piece = managed::piece(span.first, &managed::Mapping { last: span.last, target, access });
        if let (Some(software), Some(piece)) = (software, piece) {
            software.tell(&[Change::Map(piece)]).map_err(Error::Blocked)?;
        }
        Ok(())
    }

    /// Unmaps all mappings in `span`, in the tables of all units or in none; how many there were. When it returns without an error, no DMA uses them.
    ///
    /// # Errors
    /// [`Error::NotMapped`]: a mapping would be cut, or there is none. [`Error::Kernel`]: all are there. A kernel that fails when it has removed some is told to
    /// map these again; one that it does not map again is unmapped everywhere. As for [`Ioasid::map`].
    pub fn unmap(&self, span: Span) -> Result<u64, Error> {
        let _span = tracing::debug_span!("unmap", ioasid = self.id().0, iova = %span).entered();
        let mut state = self.0.lock();
        let State { content: Content::Managed(managed), software, .. } = &mut *state else { return Err(self.wrong_kind("unmap")) };
        if span.is_none() {
            return Err(Error::NotMapped(span));
        }
        let before: Vec<Span> =
            managed.mappings().range(span.first..=span.last).map(|(first, mapping)| Span { first: *first, last: mapping.last }).collect();
        let result = managed.unmap(&self.0.context, span);
        if let Some(software) = software {
            let gone = before.into_iter().filter(|span| !managed.mappings().contains_key(&span.first)).map(Change::Unmap);
            software.tell(&gone.collect::<Vec<_>>()).map_err(Error::Blocked)?;
        }
        result
    }

    /// Makes the changes that a guest asked for, one after the other, in all host tables: at once, and in any order.
    ///
    /// # Errors
    /// [`Error::Mapped`], [`Error::NotMapped`], [`Error::Refused`] by [`SpaceLimits::mappings`](super::SpaceLimits::mappings), or because it is not a
    /// [`Kind::Requests`] one: nothing changed. [`Error::Blocked`].
    pub fn change(&self, batch: &[Change]) -> Result<(), Error> {
        let _span = tracing::trace_span!("change", ioasid = self.id().0, changes = batch.len()).entered();
        let mut detached = Dropped::new();
        let mut state = self.0.lock();
        let Content::Requests(domain) = &mut state.content else { return Err(self.wrong_kind("change")) };
        take_all(domain, batch, self.0.request.limits.mappings as u64)?;
        let ordered = (!is_ordered(batch)).then(|| in_order(batch));
        let batch = ordered.as_deref().unwrap_or(batch);
        let tell = |result: Result<(), crate::sync::CommitError>| result.map(|()| Report::default()).map_err(LiveError::Commit);
        self.0.each(&mut state, &mut detached, |part| tell(part.tell(batch)), |software| tell(software.tell(batch))).map(drop)
    }

    /// The guest's commands, decoded. When this returns, no DMA uses what the guest took away in the address spaces and ranges that they mean. The kernel is
    /// called at most once for each unit, unless that call fails.
    ///
    /// # Errors
    /// [`Error::Blocked`].
    pub fn invalidate(&self, invalidations: &[Invalidation]) -> Result<Report, Error> {
        let _span = tracing::trace_span!("invalidate", ioasid = self.id().0, commands = invalidations.len()).entered();
        let mut detached = Dropped::new();
        let mut state = self.0.lock();
        if !matches!(state.kind, Kind::Guest(_)) {
            return Ok(Report::default());
        }
        let memory = self.0.context.memory();
        self.0.context.count(Counter::Invalidations, invalidations.len() as u64);
        // Lent out for the time being: to copy it would cost more than a small invalidation.
        let kind = std::mem::replace(&mut state.kind, Kind::Managed);
        let result = self.0.each(
            &mut state,
            &mut detached,
            |part| match &kind {
                Kind::Guest(view) => part.invalidate(&memory, view, invalidations),
                _ => Ok(Report::default()),
            },
            |software| software.invalidate(&memory, invalidations),
        );
        state.kind = kind;
        result
    }

    /// `length` bytes of guest memory from `address` on were written, and may hold tables. The same promise as for [`Ioasid::invalidate`].
    ///
    /// # Errors
    /// [`Error::Blocked`].
    pub fn table_written(&self, address: Gpa, length: u64) -> Result<Report, Error> {
        let _span = tracing::trace_span!("table_written", ioasid = self.id().0, %address, length).entered();
        let mut detached = Dropped::new();
        let mut state = self.0.lock();
        let memory = self.0.context.memory();
        self.0.each(
            &mut state,
            &mut detached,
            |part| part.table_written(&memory, address, length),
            |software| software.table_written(&memory, address, length),
        )
    }

    /// The guest's structures say something else: `view` is what the requester gets from now on. Where the unit walks the guest's own table, devices are put on
    /// another page table, so that each transaction sees either the one or the other; host tables follow, and a byte whose translation is the same before
    /// and after translates all the while.
    ///
    /// A strategy that cannot be had any more gives way to the next one, and one that can be had now is taken up, for each unit as by [`Ioasid::reconsider`].
    ///
    /// # Errors
    /// [`Error::Refused`] because it is not a [`Kind::Guest`] one, or no strategy is left for a unit; [`Error::Kernel`], [`Error::Open`], [`Error::Call`]:
    /// nothing changed in any unit. [`Error::Detached`]: nor did it, or it did in all, which [`Ioasid::translate`] tells; devices that could stay neither here
    /// nor there wait for [`Ioasid::recover`]. [`Error::Blocked`]: it changed, and who could not follow waits as well.
    pub fn switch(&self, view: GuestView) -> Result<Report, Error> {
        if !matches!(self.0.request.kind, Kind::Guest(_)) {
            return Err(self.wrong_kind("switch"));
        }
        let _span = tracing::debug_span!("switch", ioasid = self.id().0).entered();
        let kind = Kind::Guest(view.clone());
        let (geometry, marks_accessed) = geometry(&self.0.context, &kind)?;
        let _memory = self.0.context.hold_memory();
        let mut detached = Dropped::new();
        let mut state = self.0.lock();
        let memory = self.0.context.memory();
        // All formats are opened before anything changes.
        let followers = state.parts.len() + usize::from(state.software.is_some());
        let mut ways = (0..followers).map(|_| part::way(&self.0.context, &view)).collect::<Result<Vec<_>, _>>()?;
        if state.software.is_some() || state.parts.iter().any(Part::follows) {
            // Nor does anything if those who follow could not: hardware may walk what they cannot.
            let way = part::way(&self.0.context, &view)?;
            drop(crate::sync::Space::open(way, memory.map().clone(), self.0.request.limits.shadow, Box::new(Unwatched))?);
        }
        let before = (std::mem::replace(&mut state.kind, kind), std::mem::replace(&mut state.geometry, geometry), state.marks_accessed);
        state.marks_accessed = marks_accessed;
        state.translator = None;
        let (mut report, moved) = match self.0.rebuild(&mut state, &mut detached) {
            Ok(rebuilt) => rebuilt,
            Err(error) => {
                (state.kind, state.geometry, state.marks_accessed) = before;
                return Err(error);
            }
        };
        let software = state.software.is_some().then(|| ways.pop()).flatten();
        let marks = state.marks_accessed;
        let mut left_behind = Vec::new();
        let switched = self.0.each(
            &mut state,
            &mut detached,
            |part| match part.follows() && !part.is_new {
                true => {
                    let Some(way) = ways.pop() else { return Ok(Report::default()) };
                    part.switch(&memory, way, &view, marks)
                        .inspect_err(|error| left_behind.extend(matches!(error, LiveError::Open(_)).then_some(part.unit)))
                }
                // What was made just now has read the new tables.
                false => Ok(Report::default()),
            },
            |engine| software.map_or(Ok(Report::default()), |way| engine.switch(&memory, way, &view)),
        );
        // A plugin failed after all: whoever waits gets another part.
        state.parts.retain(|part| !left_behind.contains(&part.unit));
        report.join(switched.map_err(|error| if left_behind.is_empty() { error } else { Error::Detached(Box::new(error)) })?);
        moved.map(|()| report)
    }

    /// Reads the guest's tables again, all of them, and tries to map what there was no memory for, or no room in lookups in software.
    ///
    /// # Errors
    /// [`Error::Blocked`].
    pub fn synchronise(&self) -> Result<Report, Error> {
        let _span = tracing::debug_span!("synchronise", ioasid = self.id().0).entered();
        let mut detached = Dropped::new();
        let mut state = self.0.lock();
        let (memory, told) = (self.0.context.memory(), state.missing());
        let again = |part: &mut Part| {
            let report = part.synchronise(&memory)?;
            part.offer(&told)?;
            Ok(report)
        };
        let looked_up = |software: &mut Software| {
            let report = software.synchronise(&memory)?;
            software.offer(&told)?;
            Ok(report)
        };
        self.0.each(&mut state, &mut detached, again, looked_up)
    }

    /// Lookups in software, for the VMM's device models; made when they are first asked for, and in step from then on. Clones and further calls give the
    /// same ones.
    ///
    /// # Errors
    /// [`Error::Refused`]: the request does not allow [`Strategy::Software`]. [`Error::Lookup`]; [`Error::Open`] and [`Error::Call`] for the guest's tables.
    pub fn lookup(&self) -> Result<Lookup, Error> {
        self.look_up().map(|(lookup, _)| lookup)
    }

    /// The same with what was read for it, if they were made.
    pub(crate) fn look_up(&self) -> Result<(Lookup, Report), Error> {
        let mut state = self.0.lock();
        if let Some(software) = &state.software {
            return Ok((software.sink().lookup(), Report::default()));
        }
        if !self.0.request.strategies.contains(Strategy::Software) {
            return Err(Refusal::new(Property::Strategy, "the request does not allow software").into());
        }
        let (lookups, lookup) = Lookups::new(self.0.request.limits.lookup)?;
        let mut software = Engine::new(&self.0.context, self.0.watcher(), &state.kind, &self.0.request.limits, lookups)?;
        let report = software.fill(&self.0.context.memory(), &state.told())?;
        state.software = Some(software);
        Ok((lookup, report))
    }

    pub(super) fn wrong_kind(&self, call: &str) -> Error {
        let kind = match self.0.request.kind {
            Kind::Managed => "what the VMM maps",
            Kind::Requests => "what a guest asks for",
            Kind::Guest(_) => "what the guest's tables say",
        };
        Refusal::new(Property::Kind, format!("`{call}` is not for an address space of {kind}")).into()
    }
}

impl State {
    /// Somebody looks things up in software.
    pub(super) const fn has_lookups(&self) -> bool {
        self.software.is_some()
    }

    /// The same, if there was no memory for some of it; nothing for an address space whose tables are followed.
    pub(super) fn missing(&self) -> Vec<Change> {
        let lookups_are = self.software.as_ref().is_some_and(|software| software.sink().is_short());
        if lookups_are || self.parts.iter().any(Part::is_short) { self.told() } else { Vec::new() }
    }

    /// Maps of what is there, for a new host's side that does not follow tables.
    pub(super) fn told(&self) -> Vec<Change> {
        match &self.content {
            Content::Managed(managed) => managed.pieces().collect(),
            Content::Requests(domain) => domain.iter().map(|piece| Change::Map(*piece)).collect(),
            Content::Guest => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Attributes;

    fn piece(first: u64, address: u64) -> Piece {
        Piece { iova: Span { first, last: first + 0xfff }, address, attributes: Attributes::READ }
    }

    #[test]
    fn a_batch_is_taken_whole_or_not_at_all() {
        let mut domain = Domain::new();
        let (one, two, three) = (piece(0x1000, 0x8000), piece(0x2000, 0x4000), piece(0x1000, 0x5000));
        take_all(&mut domain, &[Change::Map(one), Change::Map(two)], 3).expect("two mappings");
        let before: Vec<Piece> = domain.iter().copied().collect();
        let half = Span { first: 0x2000, last: 0x27ff };
        let batch = [Change::Unmap(one.iova), Change::Map(three), Change::Unmap(half)];
        assert!(matches!(take_all(&mut domain, &batch, 3), Err(Error::NotMapped(span)) if span == half));
        assert_eq!(domain.iter().copied().collect::<Vec<_>>(), before);
        assert!(matches!(take_all(&mut domain, &[Change::Map(piece(0x3000, 0)), Change::Map(piece(0x4000, 0))], 3), Err(Error::Refused(_))));
        assert_eq!(domain.iter().copied().collect::<Vec<_>>(), before);
        take_all(&mut domain, &batch[..2], 3).expect("one for another");
        assert_eq!(domain.find(0x1000), Some(&three));
    }
}
