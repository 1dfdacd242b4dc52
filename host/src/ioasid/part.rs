//! What one unit has of an IOASID.

use std::sync::{Arc, Weak};

use super::commit::KernelCommitter;
use super::context::Inner;
use super::device::{Awaited, Connected, Held, Slot};
use super::dirty::Recording;
use super::left::Left;
use super::metrics::Counters;
use super::nested::Bound;
use super::parent::Parent;
use super::record::Recorder;
use super::strategy::smallest_page_log2;
use super::tables::PoolTables;
use super::{Error, Explanation, GuestMemory, GuestView, Kind, SpaceId, SpaceLimits, Strategy};
use crate::kernel::handle::{Attachment, Hwpt, PageTable, Viommu};
use crate::kernel::{Errno, Pasid};
use crate::memory::MarkMemory;
use crate::plugin::queue::{Effect, Invalidation};
use crate::sync::{Areas, CommitError, Live, LiveError, MarksWritten, Nested, Report, ShadowFigures, Sink, Space, Watcher, Way};
use crate::{Change, Gpa, Iova, Span};

/// A sink, and who tells it what changes: a guest's tables, or whoever has a batch.
#[derive(Debug)]
pub(super) enum Engine<S> {
    /// Follows the guest's tables.
    Live(Box<Live<S>>),
    /// Is told.
    Told(S),
}

impl<S: Sink> Engine<S> {
    /// For what is in an address space, empty at first: [`Engine::fill`].
    pub(super) fn new(context: &Inner, watcher: Box<dyn Watcher>, kind: &Kind, limits: &SpaceLimits, sink: S) -> Result<Self, Error> {
        let Kind::Guest(view) = kind else { return Ok(Self::Told(sink)) };
        let space = Space::open(way(context, view)?, context.memory().map().clone(), limits.shadow, watcher)?;
        Ok(Self::Live(Box::new(Live::new(space, sink, view.tag(), view.id, limits.questions))))
    }

    pub(super) fn sink_mut(&mut self) -> &mut S {
        match self {
            Self::Live(live) => live.sink_mut(),
            Self::Told(sink) => sink,
        }
    }

    pub(super) fn sink(&self) -> &S {
        match self {
            Self::Live(live) => live.sink(),
            Self::Told(sink) => sink,
        }
    }

    /// All that is there: `told` are the maps of an address space that nobody follows.
    pub(super) fn fill(&mut self, memory: &GuestMemory, told: &[Change]) -> Result<Report, LiveError> {
        match self {
            Self::Live(live) => live.synchronise(memory.entries()),
            Self::Told(sink) => {
                sink.apply(told);
                sink.commit()?;
                Ok(Report { changes: told.len() as u64, ..Report::default() })
            }
        }
    }

    fn live(&mut self, act: impl FnOnce(&mut Live<S>) -> Result<Report, LiveError>) -> Result<Report, LiveError> {
        match self {
            Self::Live(live) => act(live),
            Self::Told(_) => Ok(Report::default()),
        }
    }

    pub(super) fn invalidate(&mut self, memory: &GuestMemory, invalidations: &[Invalidation]) -> Result<Report, LiveError> {
        self.live(|live| live.invalidate(memory.entries(), invalidations))
    }

    pub(super) fn table_written(&mut self, memory: &GuestMemory, address: Gpa, length: u64) -> Result<Report, LiveError> {
        self.live(|live| live.table_written(memory.entries(), address, length))
    }

    pub(super) fn synchronise(&mut self, memory: &GuestMemory) -> Result<Report, LiveError> {
        self.live(|live| live.synchronise(memory.entries()))
    }

    /// Marks of hardware go back into the guest's tables.
    pub(super) fn write_marks(&mut self, memory: &(impl MarkMemory + ?Sized), span: Span) -> MarksWritten {
        match self {
            Self::Live(live) => live.write_marks(memory, span),
            Self::Told(_) => MarksWritten::default(),
        }
    }

    /// Guest memory came or went.
    pub(super) fn memory_changed(&mut self, memory: &GuestMemory) -> Result<Report, LiveError> {
        match self {
            Self::Live(live) => live.memory_changed(memory.entries(), memory.map().clone()),
            // Areas of what went go with a commit; elsewhere mappings lead to addresses that nobody serves.
            Self::Told(sink) => {
                sink.commit()?;
                Ok(Report::default())
            }
        }
    }

    /// The guest's structures say something else.
    pub(super) fn switch(&mut self, memory: &GuestMemory, way: Way, view: &GuestView) -> Result<Report, LiveError> {
        self.live(|live| {
            live.set_tag(view.tag());
            live.switch(way, memory.entries())
        })
    }

    pub(super) fn tell(&mut self, batch: &[Change]) -> Result<(), CommitError> {
        match self {
            Self::Live(_) => Ok(()),
            Self::Told(sink) => {
                sink.apply(batch);
                sink.commit()
            }
        }
    }

    /// What is followed of a guest's tables.
    pub(super) fn figures(&self) -> ShadowFigures {
        match self {
            Self::Live(live) => live.space().figures(),
            Self::Told(_) => ShadowFigures::default(),
        }
    }

    pub(super) fn commit(&mut self) -> Result<(), CommitError> {
        match self {
            Self::Live(live) => live.commit(),
            Self::Told(sink) => sink.commit(),
        }
    }

    /// Of an address space that nobody follows: the sink is offered what it wants of `told`.
    pub(super) fn offer(&mut self, told: &[Change]) -> Result<(), CommitError> {
        let Self::Told(sink) = self else { return Ok(()) };
        let mut before = None;
        while let Some(wanted) = sink.wants().filter(|wanted| before != Some(*wanted)) {
            before = Some(wanted);
            let here: Vec<Change> = told.iter().filter(|change| change.span().intersection(wanted).is_some()).copied().collect();
            sink.offer(wanted, &here);
        }
        if before.is_some() { sink.commit() } else { Ok(()) }
    }
}

impl Engine<Nested<PoolTables, KernelCommitter>> {
    /// Marks of leaves whose memory went are kept: the guest's entries are there.
    pub(super) fn leave_gone(&mut self, left: Option<&Left>) {
        let gone = self.sink_mut().take_gone();
        if let (Self::Live(live), Some(left)) = (self, left) {
            let _ = live.mark(left, &gone);
        }
    }
}

/// What a guest's structures give, with its formats opened.
pub(super) fn way(context: &Inner, view: &GuestView) -> Result<Way, Error> {
    Way::of(&view.outcome, |config| context.open(config))
}

/// The host's side, by strategy.
#[derive(Debug)]
pub(super) enum Host {
    /// A page table that the kernel keeps, and what keeps it in step with guest memory if that is in it.
    Kernel { hwpt: Hwpt, of_memory: Option<(Arc<Recorder>, Arc<Parent>)> },
    /// The guest's own table.
    Own(Box<Bound>, Box<KernelCommitter>),
    /// A host table. The page table goes before the memory of what it leads to.
    Table(Box<Bound>, Box<Engine<Nested<PoolTables, KernelCommitter>>>),
    /// Areas, for any number of units: attachments are in there, because areas can need another address space of the kernel's at any moment.
    Areas(Box<Engine<Areas>>),
}

impl Host {
    /// Whether pages are missing because the host's format did not say how they are written.
    pub(super) fn lacks_answers(&self) -> bool {
        matches!(self, Self::Table(_, engine) if !engine.sink().table().unanswered().is_empty())
    }
}

/// Devices and PASIDs of them.
pub(super) type Users = Vec<(Weak<Connected>, Option<Pasid>)>;

/// Users that were looked at, to be dropped without locks: dropping the last handle of a device takes some.
pub(super) type Dropped = Vec<(Arc<Connected>, Option<Slot>)>;

/// How users behind one unit came here from another part.
#[derive(Debug)]
pub(super) struct Came {
    pub(super) unit: usize,
    pub(super) device: String,
    pub(super) was: Strategy,
    /// The rest of a sentence.
    pub(super) why: String,
}

/// What one unit has.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) unit: usize,
    pub(super) host: Host,
    pub(super) explanation: Explanation,
    /// By unit, if it was with another strategy.
    pub(super) came: Vec<Came>,
    /// Page tables of the kernel's are made for PASIDs.
    pub(super) pasids: bool,
    /// Who is attached.
    pub(super) users: Users,
    /// Who was taken off because the kernel failed.
    pub(super) awaited: Vec<Awaited>,
    /// It was made in this call, of what the guest's structures say now.
    pub(super) is_new: bool,
    /// A commit failed, and none has succeeded since: nobody is attached, because what was taken away may still be reached.
    pub(super) stale: bool,
    /// While writes are recorded.
    pub(super) record: Option<Recording>,
    pub(super) counters: Arc<Counters>,
    /// Where marks of hardware go when it goes.
    pub(super) marks_left: Arc<Left>,
    /// Somebody is or was attached.
    pub(super) was_used: bool,
}

impl Part {
    /// What was chosen for its unit.
    pub(super) fn strategy(&self) -> Option<Strategy> {
        self.explanation.chosen.as_ref().map(|chosen| chosen.strategy)
    }

    /// What was chosen and why, and who came here since.
    pub(super) fn explain(&self) -> Explanation {
        let mut explanation = self.explanation.clone();
        explanation.notes.extend(self.came.iter().map(|Came { unit, device, was, why }| match *unit == self.unit {
            true => format!("chosen {why}: was {was} before"),
            false => format!("device {device}, behind another unit, came {why}: was {was} before"),
        }));
        explanation
    }

    const fn bound(&self) -> Option<&Bound> {
        match &self.host {
            Host::Kernel { .. } | Host::Areas(_) => None,
            Host::Own(bound, _) | Host::Table(bound, _) => Some(bound),
        }
    }

    pub(super) fn viommu(&self) -> Option<&Viommu> {
        self.bound().and_then(Bound::viommu)
    }

    /// The page table of guest memory through which everything is written.
    pub(super) fn recorder(&self) -> Option<&Arc<Recorder>> {
        match &self.host {
            Host::Kernel { of_memory, .. } => of_memory.as_ref().map(|(recorder, _)| recorder),
            Host::Own(bound, _) | Host::Table(bound, _) => Some(bound.recorder()),
            Host::Areas(_) => None,
        }
    }

    /// PASIDs can be attached to it.
    pub(super) fn has_pasids(&self) -> bool {
        self.bound().map_or(self.pasids, Bound::has_pasids)
    }

    /// Attaches a device that is attached to nothing.
    pub(super) fn attach(&mut self, device: &Connected, pasid: Option<Pasid>) -> Result<Held, Errno> {
        self.was_used = true;
        if let Host::Areas(engine) = &mut self.host {
            return engine.sink_mut().attach(device.bound(), pasid).map(|()| Held::Areas);
        }
        device.bound().attach(pasid, PageTable::Hwpt(self.hwpt()?)).map(Held::Here)
    }

    /// Puts an attachment here; it comes back as it was if that cannot be.
    pub(super) fn adopt(&mut self, device: &Connected, mut attachment: Attachment, pasid: Option<Pasid>) -> Result<Held, (Attachment, Errno)> {
        self.was_used = true;
        if let Host::Areas(engine) = &mut self.host {
            return engine.sink_mut().adopt(attachment, pasid, &device.capabilities().iova).map(|()| Held::Areas);
        }
        match self.hwpt().and_then(|hwpt| attachment.replace(PageTable::Hwpt(hwpt))) {
            Ok(()) => Ok(Held::Here(attachment)),
            Err(errno) => Err((attachment, errno)),
        }
    }

    /// An attachment that is in areas, still attached; none if it was not, or is not any more.
    pub(super) fn release(&mut self, device: &Connected, pasid: Option<Pasid>) -> Option<Attachment> {
        let Host::Areas(engine) = &mut self.host else { return None };
        engine.sink_mut().release(device.bound().id(), pasid)
    }

    fn hwpt(&self) -> Result<&Hwpt, Errno> {
        match &self.host {
            Host::Kernel { hwpt, .. } => Some(hwpt),
            Host::Own(bound, _) | Host::Table(bound, _) => bound.hwpt(),
            Host::Areas(_) => None,
        }
        .ok_or(Errno::ENOENT)
    }

    pub(super) fn invalidate(&mut self, memory: &GuestMemory, view: &GuestView, invalidations: &[Invalidation]) -> Result<Report, LiveError> {
        match &mut self.host {
            Host::Kernel { .. } => Ok(structures(view, invalidations)),
            Host::Own(_, committer) => own(committer, view, invalidations),
            Host::Table(_, engine) => engine.invalidate(memory, invalidations),
            Host::Areas(engine) => engine.invalidate(memory, invalidations),
        }
    }

    pub(super) fn table_written(&mut self, memory: &GuestMemory, address: Gpa, length: u64) -> Result<Report, LiveError> {
        match &mut self.host {
            // Hardware reads the guest's table by itself.
            Host::Kernel { .. } | Host::Own(..) => Ok(Report::default()),
            Host::Table(_, engine) => engine.table_written(memory, address, length),
            Host::Areas(engine) => engine.table_written(memory, address, length),
        }
    }

    /// It has a description of what the guest's structures give, and is told when that is another.
    pub(super) const fn follows(&self) -> bool {
        matches!(self.host, Host::Table(..) | Host::Areas(_))
    }

    /// The guest's structures say something else; `marks`: hardware is to mark what is accessed.
    pub(super) fn switch(&mut self, memory: &GuestMemory, way: Way, view: &GuestView, marks: bool) -> Result<Report, LiveError> {
        self.leave_marks();
        match &mut self.host {
            Host::Kernel { .. } | Host::Own(..) => Ok(Report::default()),
            Host::Table(_, engine) => {
                engine.sink_mut().track_accessed(marks);
                engine.switch(memory, way, view)
            }
            Host::Areas(engine) => engine.switch(memory, way, view),
        }
    }

    /// Guest memory came or went. The kernel's own tables follow by themselves.
    pub(super) fn memory_changed(&mut self, memory: &GuestMemory) -> Result<Report, LiveError> {
        match &mut self.host {
            Host::Kernel { .. } => Ok(Report::default()),
            // What was cached by way of a table that went with its memory.
            Host::Own(_, committer) => {
                committer.forget_everything()?;
                Ok(Report::default())
            }
            Host::Table(_, engine) => {
                let report = engine.memory_changed(memory);
                engine.leave_gone(self.was_used.then_some(&*self.marks_left));
                report
            }
            Host::Areas(engine) => engine.memory_changed(memory),
        }
    }

    pub(super) fn synchronise(&mut self, memory: &GuestMemory) -> Result<Report, LiveError> {
        match &mut self.host {
            Host::Kernel { .. } => Ok(Report::default()),
            Host::Own(_, committer) => committer.forget_everything().map(|()| Report::default()).map_err(LiveError::Commit),
            Host::Table(_, engine) => engine.synchronise(memory),
            Host::Areas(engine) => engine.synchronise(memory),
        }
    }

    /// A batch of changes that nobody follows.
    pub(super) fn tell(&mut self, batch: &[Change]) -> Result<(), CommitError> {
        match &mut self.host {
            Host::Kernel { .. } | Host::Own(..) => Ok(()),
            Host::Table(_, engine) => engine.tell(batch),
            Host::Areas(engine) => engine.tell(batch),
        }
    }

    /// Questions that formats were asked for its sake.
    pub(super) fn questions(&self) -> u64 {
        match &self.host {
            Host::Kernel { .. } | Host::Own(..) => 0,
            Host::Table(_, engine) => engine.sink().table().figures().questions + engine.figures().questions,
            Host::Areas(engine) => engine.figures().questions,
        }
    }

    /// The smallest page of its own table is larger than one of the guest's, 1 << `finest` bytes: such pages would not be there.
    pub(super) fn is_too_coarse(&self, finest: Option<u8>) -> bool {
        let Host::Table(_, engine) = &self.host else { return false };
        finest.is_some_and(|finest| smallest_page_log2(engine.sink().table().geometry()) > finest)
    }

    /// Whether its unit translates an IOVA that the address space has, as far as that is not somebody else's business.
    pub(super) fn has(&self, iova: Iova) -> bool {
        match &self.host {
            Host::Kernel { .. } | Host::Own(..) => true,
            Host::Table(_, engine) => engine.sink().table().has(iova),
            Host::Areas(engine) => engine.sink().has(iova),
        }
    }

    /// There was no memory, or no room, for something.
    pub(super) fn is_short(&self) -> bool {
        match &self.host {
            Host::Kernel { .. } | Host::Own(..) => false,
            Host::Table(_, engine) => !engine.sink().table().refused().is_empty(),
            Host::Areas(engine) => engine.sink().is_short(),
        }
    }

    /// What there was no memory or room for is tried again; `told` are the maps of an address space that nobody follows.
    pub(super) fn offer(&mut self, told: &[Change]) -> Result<(), CommitError> {
        match &mut self.host {
            Host::Table(_, engine) => engine.offer(told),
            Host::Areas(engine) => engine.offer(told),
            Host::Kernel { .. } | Host::Own(..) => Ok(()),
        }
    }

    /// What failed is tried again: nothing that was taken away is reached through it when this returns without an error.
    pub(super) fn settle(&mut self) -> Result<(), CommitError> {
        match &mut self.host {
            Host::Kernel { .. } => {}
            Host::Own(_, committer) if self.stale => committer.forget_everything()?,
            Host::Own(..) => {}
            Host::Table(_, engine) => engine.commit()?,
            Host::Areas(engine) => engine.commit()?,
        }
        self.stale = false;
        Ok(())
    }

    /// A commit failed: nobody's DMA gets here any more. Who was attached is told.
    pub(super) fn block(&mut self, space: SpaceId, dropped: &mut Dropped) -> Users {
        self.stale = true;
        self.take_off(space, dropped, |_| true)
    }

    /// Takes users off whose attachments are to go: they wait for [`Ioasid::recover`](super::Ioasid::recover). Who that was is told.
    pub(super) fn take_off(&mut self, space: SpaceId, dropped: &mut Dropped, goes: impl Fn(&Held) -> bool) -> Users {
        let mut taken = Users::new();
        for (device, pasid) in std::mem::take(&mut self.users) {
            let Some(connected) = device.upgrade() else { continue };
            let mut slots = connected.slots();
            let held = slots.get(&pasid).filter(|slot| slot.space.id() == space).map(|slot| &slot.held);
            if held.is_some_and(|held| !goes(held)) {
                self.users.push((device, pasid));
                drop(slots);
                dropped.push((connected, None));
                continue;
            }
            let mut slot = held.is_some().then(|| slots.remove(&pasid)).flatten();
            drop(slots);
            if let Some(slot) = &mut slot {
                slot.held = Held::Nowhere;
                drop(self.release(&connected, pasid));
                self.awaited.push(connected.waits_for(pasid, space));
                tracing::error!(device = connected.label(), ioasid = space.0, "detached, because a call of the kernel failed");
                taken.push((device, pasid));
            }
            dropped.push((connected, slot));
        }
        taken
    }

    /// Nobody is attached.
    pub(super) fn is_unused(&self) -> bool {
        self.users.iter().all(|(user, _)| user.strong_count() == 0)
    }

    /// Others than this one were taken off, and still wait to come back.
    pub(super) fn is_awaited_by_others(&self, device: &Connected, pasid: Option<Pasid>) -> bool {
        self.awaited.iter().any(|one| !one.is(device, pasid) && one.is_waiting())
    }

    /// Nobody is attached, and nobody waits to come back.
    pub(super) fn is_free(&self) -> bool {
        self.is_unused() && !self.awaited.iter().any(Awaited::is_waiting)
    }

    /// Somebody is attached.
    pub(super) fn joined(&mut self, device: &Arc<Connected>, pasid: Option<Pasid>) {
        self.was_used = true;
        self.users.retain(|(user, _)| user.strong_count() > 0);
        self.users.push((Arc::downgrade(device), pasid));
        self.awaited.retain(Awaited::is_waiting);
    }

    /// Somebody is not attached any more; false if nobody was.
    pub(super) fn left(&mut self, device: *const Connected, pasid: Option<Pasid>) -> bool {
        let is = |(user, of): &(Weak<Connected>, Option<Pasid>)| user.as_ptr() == device && *of == pasid;
        let place = self.users.iter().position(is);
        // Those who came first stay first: what is chosen for all is chosen for one of them.
        place.map(|place| self.users.remove(place)).is_some()
    }
}

/// What of a batch concerns an address space that nobody has to follow.
fn structures(view: &GuestView, invalidations: &[Invalidation]) -> Report {
    let mut report = Report::default();
    for invalidation in invalidations {
        match invalidation.effect {
            Effect::Structures(scope) => report.structures |= scope.includes(view.tag(), view.id),
            Effect::Illegal(code) => {
                report.illegal = Some(code);
                break;
            }
            Effect::Nothing | Effect::Everything | Effect::Range { .. } | Effect::DeviceTlb { .. } | Effect::Response(_) => {}
        }
    }
    report
}

/// The guest's commands for its own table, in the host's words: one kernel call.
fn own(committer: &mut KernelCommitter, view: &GuestView, invalidations: &[Invalidation]) -> Result<Report, LiveError> {
    let report = structures(view, invalidations);
    let mut spans: Vec<Span> = Vec::new();
    let mut tables = false;
    for invalidation in invalidations {
        match invalidation.effect {
            Effect::Everything => {
                spans.push(Span::ALL);
                tables = true;
            }
            Effect::Range { scope, iova } if scope.includes(view.tag(), view.id) => {
                spans.push(iova.or_all());
                tables |= !scope.leaf;
            }
            Effect::Illegal(_) => break,
            Effect::Nothing | Effect::Range { .. } | Effect::Structures(_) | Effect::DeviceTlb { .. } | Effect::Response(_) => {}
        }
    }
    if spans.contains(&Span::ALL) {
        committer.forget_everything()?;
    } else if !spans.is_empty() {
        spans.sort_unstable();
        spans.dedup_by(|next, last| {
            let touches = last.last.saturating_add(1) >= next.first;
            if touches {
                last.last = last.last.max(next.last);
            }
            touches
        });
        committer.forget(&spans, tables)?;
    }
    Ok(report)
}
