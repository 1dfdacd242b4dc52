//! Devices and IOASIDs, joined.

use std::sync::Arc;

use super::commit::KernelCommitter;
use super::device::{Connected, Slot, Who, outside};
use super::nested::{Bound, For};
use super::parent::Under;
use super::part::{Engine, Host, Part};
use super::space::{Content, Space, State};
use super::strategy::{Candidate, Choice};
use super::tables::PoolTables;
use super::{Chosen, Device, Error, Explanation, Ioasid, Kind, Property, Refusal, Strategy};
use crate::kernel::handle::{Hwpt, PageTable};
use crate::kernel::{Errno, HwptFlags, Pasid};
use crate::sync::{Nested, NestedTable};

impl Ioasid {
    /// Attaches a device, or a PASID of it. The first device behind a unit has a strategy chosen for its path; further ones share what was made.
    ///
    /// # Errors
    /// [`Error::Refused`] with the property that says no. Nothing has changed then, and the device's DMA is blocked as before.
    pub fn attach(&self, device: &Device, pasid: Option<Pasid>) -> Result<(), Error> {
        self.0.join(&device.0, pasid, false)
    }

    /// Attaches a device, or a PASID of it, in the place of the IOASID that it is attached to: each of its transactions sees either the one or the other.
    ///
    /// # Errors
    /// As [`Ioasid::attach`]; the old attachment stays.
    pub fn replace(&self, device: &Device, pasid: Option<Pasid>) -> Result<(), Error> {
        self.0.join(&device.0, pasid, true)
    }

    /// Detaches a device, or a PASID of it, from this IOASID: its DMA is blocked from then on.
    ///
    /// # Errors
    /// [`Error::Refused`]: it is not attached to it.
    pub fn detach(&self, device: &Device, pasid: Option<Pasid>) -> Result<(), Error> {
        if !device.0.slots().get(&pasid).is_some_and(|slot| Arc::ptr_eq(&slot.space, &self.0)) {
            let reason = format!("{} is not attached to {}", Who(device.label(), pasid), self.id());
            return Err(Refusal::new(Property::Attachment, reason).into());
        }
        device.detach(pasid)
    }

    /// What would be chosen for a device, without making anything.
    ///
    /// # Errors
    /// A plugin fails.
    pub fn explain_for(&self, device: &Device) -> Result<Explanation, Error> {
        let state = self.0.lock();
        if let Some(part) = state.parts.iter().find(|part| part.unit == device.0.unit()) {
            return Ok(part.explanation.clone());
        }
        let mut explanation = Explanation::new(device.label());
        for strategy in Strategy::ALL {
            match self.0.choice(&state, &device.0, &self.0.context().memory()).judge(strategy)? {
                Err(reasons) => explanation.reject(strategy, reasons),
                Ok((candidate, notes)) => {
                    explanation.chosen = Some(Chosen { strategy, what: candidate.what() });
                    explanation.notes = notes;
                    break;
                }
            }
        }
        Ok(explanation)
    }

    /// Whether it serves a device too: whether attaching would succeed, as far as that can be known without doing it.
    ///
    /// # Errors
    /// The property that says no.
    pub fn serves(&self, device: &Device) -> Result<(), Refusal> {
        let device = &device.0;
        self.0.check(device, None)?;
        let state = self.0.lock();
        if let Content::Managed(managed) = &state.content {
            let span = |(first, mapping): (&u64, &super::managed::Mapping)| crate::Span { first: *first, last: mapping.last };
            if let Some(span) = managed.mappings().iter().map(span).find(|span| outside(&device.capabilities().iova, *span)) {
                return Err(Refusal::new(Property::Iova, format!("{span} is mapped, and device {} cannot use all of it", device.label())));
            }
        }
        if state.parts.iter().any(|part| part.unit == device.unit()) {
            return Ok(());
        }
        self.0.check_unit(&state, device)?;
        let mut reasons = Explanation::new(device.label());
        for strategy in Strategy::ALL {
            match self.0.choice(&state, device, &self.0.context().memory()).judge(strategy) {
                Ok(Ok(_)) => return Ok(()),
                Ok(Err(why)) => reasons.reject(strategy, why),
                Err(error) => reasons.reject(strategy, vec![error.to_string()]),
            }
        }
        Err(Refusal::new(Property::Strategy, reasons.why_not()))
    }
}

impl Space {
    fn choice<'a>(&'a self, state: &'a State, device: &'a Connected, memory: &'a super::GuestMemory) -> Choice<'a> {
        Choice {
            request: self.request(),
            kind: &state.kind,
            geometry: state.geometry.as_ref(),
            capabilities: device.capabilities(),
            plugins: self.context().plugins(),
            memory,
        }
    }

    /// What can be said of a device without looking at strategies.
    fn check(&self, device: &Connected, pasid: Option<Pasid>) -> Result<(), Refusal> {
        if !Arc::ptr_eq(self.context(), device.context()) {
            return Err(Refusal::new(Property::Context, format!("device {} is connected to another context", device.label())));
        }
        let log2 = device.capabilities().pasid_log2;
        if let Some(pasid) = pasid
            && (log2 == 0 || pasid.0 == 0 || u64::from(pasid.0) >> log2 != 0)
        {
            let can = if log2 == 0 { "has no PASIDs".to_owned() } else { format!("has PASIDs 0x1..={:#x}", (1_u64 << log2) - 1) };
            return Err(Refusal::new(Property::Pasid, format!("device {} {can}", device.label())));
        }
        if self.request().dirty_tracking && !device.capabilities().dirty_tracking {
            return Err(Refusal::new(Property::DirtyTracking, format!("what device {} writes cannot be recorded", device.label())));
        }
        Ok(())
    }

    /// Whether a further unit may have a part of its own.
    fn check_unit(&self, state: &State, device: &Connected) -> Result<(), Refusal> {
        let Some(first) = state.parts.first() else { return Ok(()) };
        if matches!(state.content, Content::Managed(_)) || self.request().second_table || matches!(first.host, Host::Kernel(_)) {
            return Ok(());
        }
        let what = first.explanation.chosen.as_ref().map_or_else(String::new, |chosen| format!(" ({}: {})", chosen.strategy, chosen.what));
        let reason = format!(
            "device {} is behind another unit than device {}, for which a table was made{what}; the request does not allow a second one",
            device.label(),
            first.explanation.device
        );
        Err(Refusal::new(Property::Unit, reason))
    }

    fn join(self: &Arc<Self>, device: &Arc<Connected>, pasid: Option<Pasid>, replace: bool) -> Result<(), Error> {
        self.check(device, pasid)?;
        let mut state = self.lock();
        let mut slots = device.slots();
        let attached = |slot: &Slot| Refusal::new(Property::Attachment, format!("{} is attached to {}", Who(device.label(), pasid), slot.space.id()));
        match (slots.get(&pasid), replace) {
            (Some(slot), true) if Arc::ptr_eq(&slot.space, self) => return Ok(()),
            (Some(slot), false) => return Err(attached(slot).into()),
            (None, true) => {
                return Err(Refusal::new(Property::Attachment, format!("{} is not attached", Who(device.label(), pasid))).into());
            }
            (Some(_), true) | (None, false) => {}
        }
        let known = state.parts.iter().position(|part| part.unit == device.unit());
        let place = match known {
            Some(place) => place,
            None => {
                self.check_unit(&state, device)?;
                let part = self.build(&mut state, device, pasid)?;
                state.parts.push(part);
                state.parts.len() - 1
            }
        };
        let old = match self.attach_to(&state.parts[place], device, pasid, slots.get_mut(&pasid)) {
            Ok(Some(attachment)) => {
                slots.insert(pasid, Slot { attachment, space: Arc::clone(self) });
                None
            }
            // Replaced in place.
            Ok(None) => slots.get_mut(&pasid).map(|slot| std::mem::replace(&mut slot.space, Arc::clone(self))),
            Err(error) => {
                if known.is_none() {
                    state.parts.pop();
                }
                return Err(error);
            }
        };
        state.parts[place].joined(device, pasid);
        tracing::debug!(device = device.label(), ioasid = self.id().0, replace, "attached");
        drop(slots);
        drop(state);
        if let Some(old) = old {
            old.left(device, pasid);
        }
        Ok(())
    }

    /// Attaches to a part; the attachment, unless one that was there was changed.
    fn attach_to(
        &self,
        part: &Part,
        device: &Arc<Connected>,
        pasid: Option<Pasid>,
        slot: Option<&mut Slot>,
    ) -> Result<Option<crate::kernel::handle::Attachment>, Error> {
        if pasid.is_some() && !part.has_pasids() {
            let reason = format!("the unit of device {} takes PASIDs with structures of the guest's only, not one by one", device.label());
            return Err(Refusal::new(Property::Pasid, reason).into());
        }
        let before = device.vdevice();
        if let Some(viommu) = part.viommu() {
            device.enter(viommu).map_err(Error::kernel("telling the vIOMMU of the device"))?;
        }
        let to = PageTable::Hwpt(part.hwpt()?);
        let result = match slot {
            Some(slot) => slot.attachment.replace(to).map(|()| None),
            None => device.bound().attach(pasid, to).map(Some),
        };
        result.map_err(|errno| {
            device.restore(before);
            refused(errno, device, pasid)
        })
    }

    /// Chooses a strategy for a device's path, and makes what it takes.
    fn build(&self, state: &mut State, device: &Arc<Connected>, pasid: Option<Pasid>) -> Result<Part, Error> {
        let span = tracing::debug_span!("build", ioasid = self.id().0, device = device.label());
        let _entered = span.enter();
        let mut explanation = Explanation::new(device.label());
        let memory = self.context().memory();
        for strategy in Strategy::ALL {
            let (candidate, notes) = match self.choice(state, device, &memory).judge(strategy)? {
                Ok(candidate) => candidate,
                Err(reasons) => {
                    explanation.reject(strategy, reasons);
                    continue;
                }
            };
            let what = candidate.what();
            match self.make(state, device, pasid.is_some(), candidate) {
                Ok(host) => {
                    tracing::debug!(%strategy, what, "chosen");
                    explanation.chosen = Some(Chosen { strategy, what });
                    explanation.notes = notes;
                    return Ok(Part { unit: device.unit(), host, explanation, users: Vec::new(), blocked: Vec::new() });
                }
                Err(error) if is_no(&error) => explanation.reject(strategy, vec![error.to_string()]),
                Err(error) => return Err(error),
            }
        }
        Err(Refusal::new(Property::Strategy, format!("device {}: {}", device.label(), explanation.why_not())).into())
    }

    fn make(&self, state: &State, device: &Arc<Connected>, with_pasid: bool, candidate: Candidate) -> Result<Host, Error> {
        let context = self.context();
        let whom = For { context, device, faults: state.faults.as_ref(), with_pasid };
        match candidate {
            Candidate::Memory => {
                let direct = context.parent(Under::Guest)?.direct(device);
                direct.map(Host::Kernel).map_err(Error::kernel("making a page table of guest memory"))
            }
            Candidate::Nothing => {
                let empty = context.empty(device.unit());
                empty.map(Host::Kernel).ok_or_else(|| Refusal::new(Property::Unit, "the unit is not known").into())
            }
            Candidate::Own(config) => {
                let mut bound = Bound::new(whom, context.parent(Under::Guest)?, &config, Under::Guest)?;
                let committer = committer(&mut bound)?;
                Ok(Host::Own(bound, committer))
            }
            Candidate::Table(mut config, format) => {
                let parent = context.parent(Under::Host)?;
                let limits = &self.request().limits;
                let table = NestedTable::new(format, PoolTables::new(Arc::clone(parent.pool()), limits.table_bytes))?;
                for (setting, address) in table.roots() {
                    config.settings.set(setting, address.0);
                }
                let mut bound = Bound::new(whom, parent, &config, Under::Host)?;
                let sink = Nested::new(table, committer(&mut bound)?);
                let mut engine = Engine::new(context, self.id(), &state.kind, limits, sink)?;
                engine.fill(&context.memory(), &state.told())?;
                Ok(Host::Table(bound, Box::new(engine)))
            }
            Candidate::Areas => self.areas(state, device).map(Host::Kernel),
        }
    }

    /// A page table of the kernel's, for the unit.
    fn areas(&self, state: &State, device: &Connected) -> Result<Hwpt, Error> {
        let Content::Managed(managed) = &state.content else {
            let what = if matches!(state.kind, Kind::Requests) { "a guest's requests" } else { "a guest's tables" };
            return Err(Refusal::new(Property::Strategy, format!("{what} are not mapped by the kernel")).into());
        };
        let dirty = if self.request().dirty_tracking { HwptFlags::DIRTY_TRACKING } else { HwptFlags::NONE };
        let made = managed.ioas().hwpt(device.bound(), device.pasid_flag() | dirty, state.faults.as_ref());
        made.map_err(|errno| match errno {
            Errno::EADDRINUSE => Refusal::new(Property::Iova, "areas lie where the unit cannot translate").into(),
            errno => Error::kernel("making a page table for the device's unit")(errno),
        })
    }
}

fn committer(bound: &mut Bound) -> Result<KernelCommitter, Error> {
    bound.take_committer().ok_or_else(|| Refusal::new(Property::Invalidation, "nobody can be told what is gone").into())
}

/// Whether an error says that something cannot be had, and not that it failed this time.
fn is_no(error: &Error) -> bool {
    match error {
        Error::Refused(_) => true,
        Error::Kernel { errno, .. } => matches!(*errno, Errno::EOPNOTSUPP | Errno::EINVAL | Errno::EIO),
        _ => false,
    }
}

fn refused(errno: Errno, device: &Connected, pasid: Option<Pasid>) -> Error {
    let who = Who(device.label(), pasid);
    let (property, reason) = match errno {
        Errno::EADDRINUSE => (Property::Iova, format!("areas lie where {who} must not translate")),
        Errno::ENODEV => (Property::PageRequests, format!("{who} cannot ask for pages")),
        Errno::EINVAL if pasid.is_some() => (Property::Pasid, format!("the page table cannot be attached to {who}")),
        Errno::EINVAL => (Property::Unit, format!("the page table cannot be attached to {who}")),
        errno => return Error::kernel("attaching the device")(errno),
    };
    Refusal::new(property, reason).into()
}
