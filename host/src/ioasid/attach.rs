//! Devices and IOASIDs, joined.

use std::sync::Arc;

use super::build::{Built, Wish};
use super::device::{Connected, Held, Slot, Who};
use super::nested::OWNERS_PASIDS;
use super::part::{Dropped, Host, Part};
use super::space::{Space, State};
use super::strategy::Candidate;
use super::{Device, Error, Ioasid, Property, Refusal, Strategy};
use crate::kernel::{Errno, Pasid};
use crate::sync::Report;

impl Ioasid {
    /// Attaches a device, or a PASID of it. The first device behind a unit has a strategy chosen for its path; further ones share what was made. What was read
    /// of the guest's tables, if something was made, is told: entries that are blocked among it.
    ///
    /// If invalidations of it failed before, they are tried again first.
    ///
    /// # Errors
    /// [`Error::Refused`] with the property that says no; [`Error::Blocked`]: what was taken away may still be reached. Nothing has changed then, and the device's
    /// DMA is blocked as before. [`Error::Detached`]: to make room for a PASID, the device itself was to be moved, which failed twice.
    pub fn attach(&self, device: &Device, pasid: Option<Pasid>) -> Result<Report, Error> {
        let _span = tracing::debug_span!("attach", ioasid = self.id().0, device = device.label()).entered();
        self.0.join_with_company(&device.0, pasid, false)
    }

    /// Attaches a device, or a PASID of it, in the place of the IOASID that it is attached to: each of its transactions sees either the one or the other.
    ///
    /// # Errors
    /// As [`Ioasid::attach`]; the old attachment stays. [`Error::Detached`]: the kernel failed, and failed to leave it where it was.
    pub fn replace(&self, device: &Device, pasid: Option<Pasid>) -> Result<Report, Error> {
        let _span = tracing::debug_span!("replace", ioasid = self.id().0, device = device.label()).entered();
        self.0.join_with_company(&device.0, pasid, true)
    }

    /// Chooses strategies again, for each unit: where a better one can be had now, another page table or host table is made and filled, and devices are put on it, so that
    /// each of their transactions sees either the one or the other. What was read for that. It happens by itself when the guest's structures change
    /// ([`Ioasid::switch`]), and when the last PASID of a device is detached.
    ///
    /// Areas that serve several units stay for those that have nothing better; where the request does not allow a second table
    /// ([`Request::second_table`](super::Request::second_table)), they stay for all. [`Ioasid::explain`] says so.
    ///
    /// # Errors
    /// The kernel or a plugin failed in the middle: all units and devices stay as they are, but for [`Error::Detached`]: those that could neither go nor stay
    /// wait for [`Ioasid::recover`].
    pub fn reconsider(&self) -> Result<Report, Error> {
        let _span = tracing::debug_span!("reconsider", ioasid = self.id().0).entered();
        let _memory = self.0.context().hold_memory();
        let mut detached = Vec::new();
        let mut state = self.0.lock();
        self.0.improve(&mut state, &mut detached, "because somebody asked", |_| true)
    }

    /// Detaches a device, or a PASID of it, from this IOASID: its DMA is blocked from then on. One that was detached because the kernel failed is not attached
    /// again by [`Ioasid::recover`] then.
    ///
    /// # Errors
    /// [`Error::Refused`]: it is not attached to it.
    pub fn detach(&self, device: &Device, pasid: Option<Pasid>) -> Result<(), Error> {
        if device.0.waits_no_more(pasid, Some(self.id())) {
            device.went(pasid);
            return Ok(());
        }
        if !device.0.slots().get(&pasid).is_some_and(|slot| Arc::ptr_eq(&slot.space, &self.0)) {
            let reason = format!("{} is not attached to {}", Who(device.label(), pasid), self.id());
            return Err(Refusal::new(Property::Attachment, reason).into());
        }
        device.detach(pasid)
    }
}

impl Space {
    /// [`Space::join`]; where a table stands in the way of a device's PASIDs, its own or one of others that it would share, that one is made anew so that it does not.
    fn join_with_company(self: &Arc<Self>, device: &Arc<Connected>, pasid: Option<Pasid>, replace: bool) -> Result<Report, Error> {
        let error = match self.join(device, pasid, replace) {
            Err(Error::Refused(refusal)) if refusal.property == Property::Pasid => refusal,
            joined => return joined,
        };
        let own = device.slots().get(&None).map(|slot| Arc::clone(&slot.space));
        let own = own.filter(|own| pasid.is_some() && !Arc::ptr_eq(own, self));
        let mut is_made = self.make_room_for_pasids(device)?;
        if let Some(own) = own {
            is_made |= own.make_room_for_pasids(device)?;
        }
        if is_made { self.join(device, pasid, replace) } else { Err(error.into()) }
    }

    /// What can be said of a device without looking at strategies.
    pub(super) fn check(&self, device: &Connected, pasid: Option<Pasid>) -> Result<(), Refusal> {
        if !Arc::ptr_eq(self.context(), device.context()) {
            return Err(Refusal::new(Property::Context, format!("device {} is connected to another context", device.label())));
        }
        let log2 = device.capabilities().pasid_log2;
        if let Some(pasid) = pasid
            && (log2 == 0 || pasid.0 == 0 || u64::from(pasid.0) >> log2 != 0)
        {
            // A guest may give 0 a meaning of its own (SubstreamID 0, process 0, entry 0 of a GCR3 table); the kernel has no other for it than this one.
            let can = match (log2, pasid.0) {
                (0, _) => "has no PASIDs".to_owned(),
                (_, 0) => "has no PASID 0 beside its requests without PASID, which the kernel knows by that number".to_owned(),
                _ => format!("has PASIDs 0x1..={:#x}", (1_u64 << log2) - 1),
            };
            return Err(Refusal::new(Property::Pasid, format!("device {} {can}", device.label())));
        }
        if self.request().dirty_tracking && !device.capabilities().dirty_tracking {
            return Err(Refusal::new(Property::DirtyTracking, format!("what device {} writes cannot be recorded", device.label())));
        }
        Ok(())
    }

    /// A table for another unit that somebody uses, or waits to use again, where the request does not allow a second one.
    fn only_table<'a>(&self, state: &'a State, device: &Connected) -> Option<&'a Part> {
        let mut parts = state.parts.iter().filter(|_| self.takes_one_table(state));
        parts.find(|part| part.unit != device.unit() && !matches!(part.host, Host::Kernel { .. }) && !part.is_free())
    }

    /// Whether a device's unit may have a part of its own.
    pub(super) fn check_unit(&self, state: &State, device: &Arc<Connected>, company: bool) -> Result<(), Error> {
        let Some(other) = self.only_table(state, device) else { return Ok(()) };
        // The kernel's own are no tables in this sense.
        if matches!(self.foresee(state, &Wish::best(device, company))?, Some(Candidate::Memory | Candidate::Nothing)) {
            return Ok(());
        }
        Err(second_table(other, device).into())
    }

    /// The part that a device would share with others; and those that nobody uses, and that are not for it.
    pub(super) fn shared(
        &self,
        state: &State,
        device: &Connected,
        pasid: Option<Pasid>,
        company: bool,
    ) -> Result<(Option<usize>, Vec<usize>), Error> {
        let mut given_up = Vec::new();
        loop {
            let find = |is: &dyn Fn(&Part) -> bool| (0..state.parts.len()).find(|place| !given_up.contains(place) && is(&state.parts[*place]));
            let place = find(&|part| part.unit == device.unit()).or_else(|| find(&Part::is_for_all_units));
            match place {
                Some(place) if self.gives_way(state, place, (device, pasid), company)? => given_up.push(place),
                _ => return Ok((place, given_up)),
            }
        }
    }

    /// The part that a device gets, made if there is none; and what was read for it if it was made.
    fn part_for(&self, state: &mut State, device: &Arc<Connected>, pasid: Option<Pasid>, company: bool) -> Result<(usize, Option<Report>), Error> {
        let (shared, given_up) = self.shared(state, device, pasid, company)?;
        if shared.is_none() {
            self.check_unit(state, device, company)?;
        }
        let one_table = shared.is_none() && self.takes_one_table(state);
        // What was made for another unit would be a second table if somebody came back to it.
        let is_second = |part: &Part| one_table && part.is_free() && !matches!(part.host, Host::Kernel { .. });
        let mut places = 0..;
        state.parts.retain(|part| places.next().is_some_and(|place| !given_up.contains(&place)) && !is_second(part));
        if let Some(place) = shared {
            return Ok((place - given_up.iter().filter(|gone| **gone < place).count(), None));
        }
        let Built::Made(part, report) = self.build(state, &Wish::best(device, company))? else {
            return Err(Refusal::new(Property::Strategy, format!("device {}: there is no strategy", device.label())).into());
        };
        if let Some(other) = self.only_table(state, device).filter(|_| !matches!(part.host, Host::Kernel { .. })) {
            // The kernel refused what was foreseen.
            return Err(second_table(other, device).into());
        }
        state.parts.push(*part);
        Ok((state.parts.len() - 1, Some(report)))
    }

    /// Whether a part is not for a device: nobody uses it any more, and it was chosen for others, or would be a second table. Those who wait to come back to it all do.
    fn gives_way(&self, state: &State, place: usize, (device, pasid): (&Connected, Option<Pasid>), company: bool) -> Result<bool, Error> {
        let part = &state.parts[place];
        if !part.is_unused() || company && !part.has_pasids() {
            return Ok(part.is_unused());
        }
        let is_second = || !matches!(part.host, Host::Kernel { .. }) && self.only_table(state, device).is_some();
        Ok(!part.is_awaited_by_others(device, pasid) && (is_second() || self.has_better(state, place, device, company)?))
    }

    /// Whether a better strategy than a part's would be chosen for a device, as far as that can be known without making it.
    fn has_better(&self, state: &State, place: usize, device: &Connected, company: bool) -> Result<bool, Error> {
        let chosen = state.parts[place].strategy();
        let memory = self.context().memory();
        for strategy in Strategy::ALL.into_iter().take_while(|strategy| chosen != Some(*strategy)) {
            if let Ok((candidate, _)) = self.choice(state, device, &memory).judge(strategy)?
                && self.objection(state, device, company, &candidate)?.is_none()
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn join(self: &Arc<Self>, device: &Arc<Connected>, pasid: Option<Pasid>, replace: bool) -> Result<Report, Error> {
        self.check(device, pasid)?;
        let _memory = self.context().hold_memory();
        let not_attached = || Refusal::new(Property::Attachment, format!("{} is not attached", Who(device.label(), pasid)));
        let mut dropped = Dropped::new();
        loop {
            let before = device.slots().get(&pasid).map(|slot| Arc::clone(&slot.space));
            match (&before, replace) {
                (Some(space), false) => {
                    let reason = format!("{} is attached to {}", Who(device.label(), pasid), space.id());
                    return Err(Refusal::new(Property::Attachment, reason).into());
                }
                (None, true) => return Err(not_attached().into()),
                (Some(space), true) if Arc::ptr_eq(space, self) => return Ok(Report::default()),
                (Some(_), true) | (None, false) => {}
            }
            // Locks in the order of numbers.
            let (mut state, mut other) = match &before {
                Some(space) if space.id() < self.id() => {
                    let other = space.lock();
                    (self.lock(), Some(other))
                }
                Some(space) => {
                    let state = self.lock();
                    (state, Some(space.lock()))
                }
                None => (self.lock(), None),
            };
            let mut slots = device.slots();
            let now = slots.get(&pasid).map(|slot| Arc::as_ptr(&slot.space));
            if now != before.as_ref().map(Arc::as_ptr) {
                // Somebody else was faster.
                continue;
            }
            // Whether PASIDs and the device itself are to have page tables side by side.
            let company = pasid.is_some() || slots.keys().any(Option::is_some);
            let (place, made) = self.part_for(&mut state, device, pasid, company)?;
            let part = &mut state.parts[place];
            if company && !part.has_pasids() {
                return Err(Refusal::new(Property::Pasid, format!("device {}: {OWNERS_PASIDS}", device.label())).into());
            }
            let moved = match (slots.get_mut(&pasid), &mut other) {
                (Some(slot), Some(other)) => Self::move_to(part, device, pasid, slot, other).map(|()| slot.space = Arc::clone(self)),
                _ => Self::attach_to(part, device, pasid).map(|held| {
                    slots.insert(pasid, Slot { held, space: Arc::clone(self) });
                }),
            };
            drop(slots);
            if let Err(error) = moved {
                if made.is_some() {
                    state.parts.pop();
                }
                let is_lost = before.as_ref().zip(other.as_mut()).is_some_and(|(space, other)| other.take_off_lost(space, &mut dropped));
                return Err(if is_lost { Error::Detached(Box::new(error)) } else { error });
            }
            device.waits_no_more(pasid, None);
            state.parts[place].joined(device, pasid);
            if let Some(other) = &mut other {
                let _ = other.parts.iter_mut().any(|part| part.left(Arc::as_ptr(device), pasid));
            }
            tracing::debug!(device = device.label(), ioasid = self.id().0, replace, "attached");
            return Ok(made.unwrap_or_default());
        }
    }

    /// Attaches a device that is attached to nothing.
    pub(super) fn attach_to(part: &mut Part, device: &Arc<Connected>, pasid: Option<Pasid>) -> Result<Held, Error> {
        Self::within(part, device, pasid, |part| part.attach(device, pasid).map_err(|errno| refused(errno, device, pasid)))
    }

    /// Moves an attachment from another IOASID's part; it stays there if that cannot be.
    fn move_to(part: &mut Part, device: &Arc<Connected>, pasid: Option<Pasid>, slot: &mut Slot, other: &mut State) -> Result<(), Error> {
        let held = Self::within(part, device, pasid, |part| {
            let (attachment, was_areas) = match std::mem::replace(&mut slot.held, Held::Nowhere) {
                Held::Here(attachment) => (Some(attachment), false),
                Held::Areas | Held::Nowhere => (other.parts.iter_mut().find_map(|part| part.release(device, pasid)), true),
            };
            // One that a swap left behind is detached by now.
            let Some(attachment) = attachment else { return part.attach(device, pasid).map_err(|errno| refused(errno, device, pasid)) };
            part.adopt(device, attachment, pasid).map_err(|(attachment, errno)| {
                let back = other.parts.iter_mut().find(|part| was_areas && matches!(part.host, Host::Areas(_)));
                slot.held = match back {
                    None => Held::Here(attachment),
                    // If that fails its DMA would go where nobody looks after it: better nothing.
                    Some(part) => part.adopt(device, attachment, pasid).unwrap_or(Held::Nowhere),
                };
                refused(errno, device, pasid)
            })
        })?;
        slot.held = held;
        Ok(())
    }

    /// With the device known to the part's vIOMMU, and with nothing there that was taken away; as before on an error.
    fn within<T>(
        part: &mut Part,
        device: &Arc<Connected>,
        pasid: Option<Pasid>,
        act: impl FnOnce(&mut Part) -> Result<T, Error>,
    ) -> Result<T, Error> {
        if pasid.is_some() && !part.has_pasids() {
            return Err(Refusal::new(Property::Pasid, format!("device {}: {OWNERS_PASIDS}", device.label())).into());
        }
        if part.stale {
            part.settle().map_err(Error::Blocked)?;
        }
        let before = device.vdevice();
        if let Some(viommu) = part.viommu() {
            device.enter(viommu).map_err(Error::kernel("telling the vIOMMU of the device"))?;
        }
        act(part).inspect_err(|_| device.restore(before))
    }
}

/// A table for a device would be a second one.
fn second_table(other: &Part, device: &Connected) -> Refusal {
    let what = other.explanation.chosen.as_ref().map_or_else(String::new, |chosen| format!(" ({}: {})", chosen.strategy, chosen.what));
    let reason = format!(
        "device {} is behind another unit than device {}, for which a table was made{what}; the request does not allow a second one",
        device.label(),
        other.explanation.device
    );
    Refusal::new(Property::Unit, reason)
}

pub(super) fn refused(errno: Errno, device: &Connected, pasid: Option<Pasid>) -> Error {
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
