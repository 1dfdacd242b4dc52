//! What a strategy takes, made: for a device's path, the best that can be had.

use std::sync::Arc;

use super::commit::KernelCommitter;
use super::device::Connected;
use super::metrics::Counter;
use super::nested::{Bound, For};
use super::parent::Under;
use super::part::{Engine, Host, Part, Users};
use super::space::{Content, Space, State};
use super::strategy::Candidate;
use super::tables::PoolTables;
use super::{Chosen, Error, Explanation, GuestMemory, Property, Refusal, Strategy};
use crate::kernel::{Errno, HwptFlags};
use crate::plugin::CallError;
use crate::sync::{AreaLimits, Areas, Nested, NestedTable, Report};

/// What is to be chosen, and for whom.
#[derive(Clone, Copy)]
pub(super) struct Wish<'a> {
    /// Whose path decides.
    pub(super) device: &'a Arc<Connected>,
    /// Devices behind the same unit that are to have it as well.
    pub(super) others: &'a [Arc<Connected>],
    /// Page tables of the device itself and of its PASIDs are to be side by side.
    pub(super) company: bool,
    /// Only strategies that are better than this one.
    pub(super) better_than: Option<Strategy>,
    /// Why no table of user space's may be made for this unit.
    pub(super) no_table: Option<&'a str>,
    /// There are areas already that it would share.
    pub(super) has_areas: bool,
}

impl<'a> Wish<'a> {
    /// The best that can be had.
    pub(super) const fn best(device: &'a Arc<Connected>, company: bool) -> Self {
        Self { device, others: &[], company, better_than: None, no_table: None, has_areas: false }
    }
}

/// What became of a wish.
pub(super) enum Built {
    /// It was made, and this was read for it.
    Made(Box<Part>, Report),
    /// Areas that are there already are the best.
    Areas,
    /// There is nothing better: why.
    Nothing(Explanation),
}

impl Space {
    /// Chooses a strategy for a device's path, and makes what it takes. An error if there is none, and none was to be better than another.
    pub(super) fn build(&self, state: &State, wish: &Wish<'_>) -> Result<Built, Error> {
        let device = wish.device;
        let span = tracing::debug_span!("build", ioasid = self.id().0, device = device.label());
        let _entered = span.enter();
        let mut explanation = Explanation::new(device.label());
        let memory = self.context().memory();
        for strategy in Strategy::ALL {
            if wish.better_than == Some(strategy) {
                return Ok(Built::Nothing(explanation));
            }
            let Some((candidate, notes)) = self.suits(state, wish, &memory, strategy, &mut explanation)? else { continue };
            if wish.has_areas && matches!(candidate, Candidate::Areas) {
                return Ok(Built::Areas);
            }
            let what = candidate.what();
            match self.make(state, device, wish.company, candidate) {
                // Nothing takes the place of what is whole before it is whole itself.
                Ok((host, _)) if wish.better_than.is_some() && host.lacks_answers() => {
                    explanation.reject(strategy, vec![Refusal::new(Property::Format, "the host's format failed").to_string()]);
                }
                Ok((host, report)) => {
                    tracing::debug!(%strategy, what, "chosen");
                    self.context().count(Counter::of(strategy), 1);
                    self.context().count(Counter::Blocked, report.blocked_count);
                    explanation.chosen = Some(Chosen { strategy, what });
                    explanation.notes = notes;
                    let pasids = device.pasid_flag() != HwptFlags::NONE;
                    let mut part = Part {
                        unit: device.unit(),
                        host,
                        explanation,
                        came: Vec::new(),
                        pasids,
                        users: Users::new(),
                        awaited: Vec::new(),
                        is_new: true,
                        stale: false,
                        record: None,
                        counters: self.context().counters(),
                        marks_left: Arc::clone(self.context().marks_left()),
                        was_used: false,
                    };
                    if let Some(log) = &state.written {
                        part.begin_record(&state.content, &state.told(), log)?;
                    }
                    return Ok(Built::Made(Box::new(part), report));
                }
                Err(error) if is_no(&error) => explanation.reject(strategy, vec![error.to_string()]),
                Err(error) => return Err(error),
            }
        }
        Err(Refusal::new(Property::Strategy, format!("device {}: {}", device.label(), explanation.why_not())).into())
    }

    /// What would be made for a wish, as far as that can be known without making it; none if nothing is better.
    pub(super) fn foresee(&self, state: &State, wish: &Wish<'_>) -> Result<Option<Candidate>, Error> {
        let memory = self.context().memory();
        let mut explanation = Explanation::new(wish.device.label());
        for strategy in Strategy::ALL.into_iter().take_while(|strategy| wish.better_than != Some(*strategy)) {
            if let Some((candidate, _)) = self.suits(state, wish, &memory, strategy, &mut explanation)? {
                return Ok(Some(candidate));
            }
        }
        Ok(None)
    }

    /// What a strategy would make for all whom a wish is about, and what is to be noted about it; none if something speaks against it, which is in `explanation` then.
    fn suits(
        &self,
        state: &State,
        wish: &Wish<'_>,
        memory: &GuestMemory,
        strategy: Strategy,
        explanation: &mut Explanation,
    ) -> Result<Option<(Candidate, Vec<String>)>, Error> {
        let Some((candidate, notes)) = self.candidate(state, wish.device, wish.company, memory, strategy, explanation)? else { return Ok(None) };
        if let Some(reason) = wish.no_table.filter(|_| candidate.is_users()) {
            explanation.reject(strategy, vec![reason.to_owned()]);
            return Ok(None);
        }
        for other in wish.others {
            if let Some(objection) = self.objection(state, other, wish.company, &candidate)? {
                explanation.reject(strategy, vec![format!("device {}: {objection}", other.label())]);
                return Ok(None);
            }
        }
        Ok(Some((candidate, notes)))
    }

    fn make(&self, state: &State, device: &Arc<Connected>, company: bool, candidate: Candidate) -> Result<(Host, Report), Error> {
        let context = self.context();
        let dirty = self.request().dirty_tracking;
        let records = dirty && matches!(candidate, Candidate::Own(_) | Candidate::Table(..)) && context.records_nested(device)?;
        let whom = For { context, device, faults: state.faults.as_ref(), with_pasids: company, records };
        match candidate {
            Candidate::Memory => {
                // The parent is kept: it hears when memory comes or goes.
                let parent = context.parent(Under::Nothing)?;
                let direct = parent.direct(device, dirty).map_err(Error::kernel("making a page table of guest memory"))?;
                Ok((Host::Kernel { hwpt: direct.hwpt().clone(), of_memory: Some((direct, parent)) }, Report::default()))
            }
            Candidate::Nothing => {
                let empty = context.empty(device).map_err(Error::kernel("making an empty page table"))?;
                Ok((Host::Kernel { hwpt: empty, of_memory: None }, Report::default()))
            }
            Candidate::Own(config) => {
                let mut bound = Bound::new(whom, context.parent(Under::Guest)?, &config, Under::Guest)?;
                let committer = committer(&mut bound)?;
                Ok((Host::Own(Box::new(bound), Box::new(committer)), Report::default()))
            }
            Candidate::Table(mut config, format) => {
                let parent = context.parent(Under::Host)?;
                let limits = &self.request().limits;
                let mut table = NestedTable::new(format, PoolTables::new(Arc::clone(parent.pool()), limits.table_bytes))?;
                // Where its own unit would tell a guest what was accessed, the host's does; elsewhere hardware need not write.
                table.track_accessed(state.marks_accessed);
                for (setting, address) in table.roots() {
                    config.settings.set(setting, address.0);
                }
                let mut bound = Bound::new(whom, parent, &config, Under::Host)?;
                let sink = Nested::new(table, committer(&mut bound)?);
                let mut engine = Engine::new(context, self.watcher(), &state.kind, limits, sink)?;
                let report = engine.fill(&context.memory(), &state.told())?;
                // A device is not attached to half of a table, unless its guest asks for more than it may have.
                let table = engine.sink().table();
                if let Some(errno) = table.memory().failure().filter(|_| table.figures().without_memory > 0) {
                    return Err(Error::kernel("memory for host tables")(errno));
                }
                Ok((Host::Table(Box::new(bound), Box::new(engine)), report))
            }
            Candidate::Areas => self.areas(state, device),
        }
    }

    /// What the kernel keeps in its own tables.
    fn areas(&self, state: &State, device: &Connected) -> Result<(Host, Report), Error> {
        let dirty = if self.request().dirty_tracking { HwptFlags::DIRTY_TRACKING } else { HwptFlags::NONE };
        let flags = device.pasid_flag() | dirty;
        if let Content::Managed(managed) = &state.content {
            let made = managed.ioas().hwpt(device.bound(), flags, state.faults.as_ref());
            return made.map(|hwpt| (Host::Kernel { hwpt, of_memory: None }, Report::default())).map_err(|errno| match errno {
                Errno::EADDRINUSE => Refusal::new(Property::Iova, "areas lie where the unit cannot translate").into(),
                errno => Error::kernel("making a page table for the device's unit")(errno),
            });
        }
        let limits = &self.request().limits;
        let areas = Areas::new(self.context().pins(), AreaLimits { flags, ..limits.areas }).map_err(Error::kernel("making an address space"))?;
        let mut engine = Engine::new(self.context(), self.watcher(), &state.kind, limits, areas)?;
        let report = engine.fill(&self.context().memory(), &state.told())?;
        let failures = engine.sink().figures().failures;
        if engine.sink().figures().pending > 0 {
            // What was refused once is tried again, and then given up. A guest that asks for more areas than it may have has those that it may.
            engine.commit().map_err(Error::Blocked)?;
            let figures = engine.sink().figures();
            if figures.pending > 0 && figures.failures > failures {
                return Err(Error::kernel("mapping guest memory for the device")(Errno::ENOMEM));
            }
        }
        Ok((Host::Areas(Box::new(engine)), report))
    }
}

fn committer(bound: &mut Bound) -> Result<KernelCommitter, Error> {
    bound.take_committer().ok_or_else(|| Refusal::new(Property::Invalidation, "nobody can be told what is gone").into())
}

/// Whether an error says that something cannot be had, and not that it failed this time.
fn is_no(error: &Error) -> bool {
    match error {
        // A plugin that refuses: its format has something that the kernel does not take, and that no limit of an offer says.
        Error::Refused(_) | Error::Call(CallError::Refused { .. }) => true,
        Error::Kernel { errno, .. } => matches!(*errno, Errno::EOPNOTSUPP | Errno::EINVAL | Errno::EIO),
        _ => false,
    }
}
