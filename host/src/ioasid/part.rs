//! What one unit has of an IOASID.

use std::sync::{Arc, Weak};

use super::commit::KernelCommitter;
use super::context::Inner;
use super::device::Connected;
use super::nested::Bound;
use super::tables::PoolTables;
use super::{Error, Explanation, GuestMemory, GuestView, Kind, Property, Refusal, SpaceId, SpaceLimits};
use crate::kernel::Pasid;
use crate::kernel::handle::{Hwpt, Viommu};
use crate::plugin::queue::{Effect, Invalidation};
use crate::plugin::{Outcome, Translated};
use crate::sync::{CommitError, Live, LiveError, Nested, Report, Shadow, Sink, Unwatched, Watcher};
use crate::{Change, Gpa, Span};

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
    pub(super) fn new(context: &Inner, id: SpaceId, kind: &Kind, limits: &SpaceLimits, sink: S) -> Result<Self, Error> {
        let Kind::Guest(view) = kind else { return Ok(Self::Told(sink)) };
        let watcher: Box<dyn Watcher> = match context.watched() {
            Some(watched) => Box::new(watched.of(id)),
            None => Box::new(Unwatched),
        };
        let format = Box::new(open(context, view)?);
        let shadow = Shadow::open(format, context.memory().map().clone(), limits.shadow, watcher)?;
        Ok(Self::Live(Box::new(Live::new(shadow, sink, view.tag(), view.id, limits.questions))))
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

    pub(super) fn live(&mut self) -> Option<&mut Live<S>> {
        match self {
            Self::Live(live) => Some(live),
            Self::Told(_) => None,
        }
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

    pub(super) fn commit(&mut self) -> Result<(), CommitError> {
        match self {
            Self::Live(live) => live.commit(),
            Self::Told(sink) => sink.commit(),
        }
    }
}

/// The one table that a guest's structures lead to.
fn open(context: &Inner, view: &GuestView) -> Result<crate::plugin::PluginFormat, Error> {
    match &view.outcome {
        Outcome::Tables(Translated { tables, intercepts, .. }) if tables.len() == 1 && intercepts.is_empty() => {
            Ok(context.plugins().by_format(&tables[0].format)?.open(&tables[0])?)
        }
        _ => Err(Refusal::new(Property::Format, "only one table without intercepts can be followed").into()),
    }
}

/// The host's side, by strategy.
#[derive(Debug)]
pub(super) enum Host {
    /// A page table that the kernel keeps.
    Kernel(Hwpt),
    /// The guest's own table.
    Own(Bound, KernelCommitter),
    /// A host table. The page table goes before the memory of what it leads to.
    Table(Bound, Box<Engine<Nested<PoolTables, KernelCommitter>>>),
}

/// What one unit has.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) unit: usize,
    pub(super) host: Host,
    pub(super) explanation: Explanation,
    /// Who is attached.
    pub(super) users: Vec<(Weak<Connected>, Option<Pasid>)>,
    /// Who was, until invalidations failed.
    pub(super) blocked: Vec<(Weak<Connected>, Option<Pasid>)>,
}

impl Part {
    /// The page table for devices.
    pub(super) fn hwpt(&self) -> Result<&Hwpt, Error> {
        let hwpt = match &self.host {
            Host::Kernel(hwpt) => Some(hwpt),
            Host::Own(bound, _) | Host::Table(bound, _) => bound.hwpt(),
        };
        hwpt.ok_or_else(|| Refusal::new(Property::Attachment, "the page table is gone").into())
    }

    pub(super) const fn viommu(&self) -> Option<&Viommu> {
        match &self.host {
            Host::Kernel(_) => None,
            Host::Own(bound, _) | Host::Table(bound, _) => bound.viommu(),
        }
    }

    /// PASIDs can be attached to it.
    pub(super) const fn has_pasids(&self) -> bool {
        match &self.host {
            Host::Kernel(_) => true,
            Host::Own(bound, _) | Host::Table(bound, _) => bound.has_pasids(),
        }
    }

    pub(super) fn invalidate(&mut self, memory: &GuestMemory, view: &GuestView, invalidations: &[Invalidation]) -> Result<Report, LiveError> {
        match &mut self.host {
            Host::Kernel(_) => Ok(structures(view, invalidations)),
            Host::Own(_, committer) => own(committer, view, invalidations),
            Host::Table(_, engine) => engine.live().map_or(Ok(Report::default()), |live| live.invalidate(memory.entries(), invalidations)),
        }
    }

    pub(super) fn table_written(&mut self, memory: &GuestMemory, address: Gpa, length: u64) -> Result<Report, LiveError> {
        match &mut self.host {
            // Hardware reads the guest's table by itself.
            Host::Kernel(_) | Host::Own(..) => Ok(Report::default()),
            Host::Table(_, engine) => engine.live().map_or(Ok(Report::default()), |live| live.table_written(memory.entries(), address, length)),
        }
    }

    pub(super) fn synchronise(&mut self, memory: &GuestMemory) -> Result<Report, LiveError> {
        match &mut self.host {
            Host::Kernel(_) => Ok(Report::default()),
            Host::Own(_, committer) => {
                committer.forget_everything()?;
                Ok(Report::default())
            }
            Host::Table(_, engine) => engine.live().map_or(Ok(Report::default()), |live| live.synchronise(memory.entries())),
        }
    }

    /// A batch of changes that nobody follows.
    pub(super) fn tell(&mut self, batch: &[Change]) -> Result<(), CommitError> {
        match &mut self.host {
            Host::Kernel(_) | Host::Own(..) => Ok(()),
            Host::Table(_, engine) => engine.tell(batch),
        }
    }

    /// What failed is tried again.
    pub(super) fn commit(&mut self) -> Result<(), CommitError> {
        match &mut self.host {
            Host::Kernel(_) => Ok(()),
            Host::Own(_, committer) => committer.forget_everything(),
            Host::Table(_, engine) => engine.commit(),
        }
    }

    /// Nobody's DMA gets here any more. `is_mine` says whether a device's slot is of this IOASID.
    pub(super) fn block(&mut self, is_mine: impl Fn(&super::device::Slot) -> bool) {
        for (device, pasid) in self.users.drain(..) {
            let Some(connected) = device.upgrade() else { continue };
            let mut slots = connected.slots();
            if slots.get(&pasid).is_some_and(&is_mine)
                && let Some(slot) = slots.remove(&pasid)
            {
                drop(slots);
                drop(slot);
                tracing::error!(device = connected.label(), "detached: invalidations fail");
                self.blocked.push((device, pasid));
            }
        }
    }

    /// Somebody is attached.
    pub(super) fn joined(&mut self, device: &Arc<Connected>, pasid: Option<Pasid>) {
        self.users.retain(|(user, _)| user.strong_count() > 0);
        self.users.push((Arc::downgrade(device), pasid));
    }

    /// Somebody is not attached any more; false if nobody was.
    pub(super) fn left(&mut self, device: &Arc<Connected>, pasid: Option<Pasid>) -> bool {
        let is = |(user, of): &(Weak<Connected>, Option<Pasid>)| user.as_ptr() == Arc::as_ptr(device) && *of == pasid;
        let place = self.users.iter().position(is);
        place.map(|place| self.users.swap_remove(place)).is_some()
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
            Effect::Nothing | Effect::Everything | Effect::Range { .. } | Effect::DeviceTlb { .. } => {}
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
                spans.push(iova);
                tables |= !scope.leaf;
            }
            Effect::Illegal(_) => break,
            Effect::Nothing | Effect::Range { .. } | Effect::Structures(_) | Effect::DeviceTlb { .. } => {}
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
