//! Devices and IOASIDs, joined.

use std::sync::Arc;

use super::commit::KernelCommitter;
use super::device::{Connected, Held, Slot, Who, outside};
use super::metrics::Counter;
use super::nested::{Bound, For, OWNERS_PASIDS, takes_pasids};
use super::parent::Under;
use super::part::{Engine, Host, Part};
use super::space::{Content, Space, State};
use super::strategy::{Candidate, Choice};
use super::tables::PoolTables;
use super::{Chosen, Device, Error, Explanation, Ioasid, Kind, Property, Refusal, Strategy};
use crate::kernel::{Errno, HwptFlags, Pasid};
use crate::plugin::CallError;
use crate::sync::{AreaLimits, Areas, Nested, NestedTable, Report};

/// Users that were looked at, to be dropped without locks.
type Dropped = Vec<(Arc<Connected>, Option<Slot>)>;

impl Ioasid {
    /// Attaches a device, or a PASID of it. The first device behind a unit has a strategy chosen for its path; further ones share what was made. What was read
    /// of the guest's tables, if something was made, is told: entries that are blocked among it.
    ///
    /// # Errors
    /// [`Error::Refused`] with the property that says no. Nothing has changed then, and the device's DMA is blocked as before.
    pub fn attach(&self, device: &Device, pasid: Option<Pasid>) -> Result<Report, Error> {
        self.0.join_with_company(&device.0, pasid, false)
    }

    /// Attaches a device, or a PASID of it, in the place of the IOASID that it is attached to: each of its transactions sees either the one or the other.
    ///
    /// # Errors
    /// As [`Ioasid::attach`]; the old attachment stays.
    pub fn replace(&self, device: &Device, pasid: Option<Pasid>) -> Result<Report, Error> {
        self.0.join_with_company(&device.0, pasid, true)
    }

    /// Chooses strategies again: where a better one can be had now, another page table or host table is made and filled, and devices are put on it, so that each
    /// of their transactions sees either the one or the other. What was read for that. It happens by itself when the guest's structures change
    /// ([`Ioasid::switch`]), and when the last PASID of a device is detached.
    ///
    /// # Errors
    /// The kernel or a plugin failed in the middle: units that were not moved stay as they are, and so does whoever is attached there.
    pub fn reconsider(&self) -> Result<Report, Error> {
        let _memory = self.0.context().hold_memory();
        let mut detached = Vec::new();
        let mut state = self.0.lock();
        self.0.improve(&mut state, &mut detached, "because somebody asked")
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

    /// What would be chosen for a device, or for a PASID of it, without making anything. Where a part for its unit is there that it would share, what was chosen for that.
    ///
    /// # Errors
    /// A plugin fails.
    pub fn explain_for(&self, device: &Device, pasid: Option<Pasid>) -> Result<Explanation, Error> {
        let company = pasid.is_some() || device.0.slots().keys().any(Option::is_some);
        let state = self.0.lock();
        let shared = state.parts.iter().position(|part| part.unit == device.0.unit() && (!company || part.has_pasids()));
        if let Some(place) = shared
            && !(state.parts[place].is_unused() && self.0.has_better(&state, place, &device.0, company)?)
        {
            return Ok(state.parts[place].explanation.clone());
        }
        let mut explanation = Explanation::new(device.label());
        for strategy in Strategy::ALL {
            match self.0.choice(&state, &device.0, &self.0.context().memory()).judge(strategy)? {
                Err(reasons) => explanation.reject(strategy, reasons),
                Ok((candidate, _)) if company && !self.0.takes_pasids(&device.0, &candidate)? => {
                    explanation.reject(strategy, vec![Error::from(Refusal::new(Property::Pasid, OWNERS_PASIDS)).to_string()]);
                }
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

/// Why a part is made anew.
#[derive(Clone, Copy)]
struct Anew<'a> {
    /// Only strategies that are better than this one.
    better_than: Option<Strategy>,
    /// A PASID is to be attached beside its users.
    company: bool,
    /// For [`Explanation::notes`]: the rest of a sentence.
    why: &'a str,
}

impl Space {
    /// [`Space::join`]; where a device's own table stands in the way of its PASIDs, that one is made anew so that it does not.
    fn join_with_company(self: &Arc<Self>, device: &Arc<Connected>, pasid: Option<Pasid>, replace: bool) -> Result<Report, Error> {
        let error = match self.join(device, pasid, replace) {
            Err(Error::Refused(refusal)) if pasid.is_some() && refusal.property == Property::Pasid => refusal,
            joined => return joined,
        };
        let own = device.slots().get(&None).map(|slot| Arc::clone(&slot.space));
        let Some(own) = own else { return Err(error.into()) };
        if !own.make_room_for_pasids(device)? {
            return Err(error.into());
        }
        self.join(device, pasid, replace)
    }

    /// A PASID of a device is to be attached, and the device's own table is one that its PASIDs belong to: makes it anew as one that leaves them alone. False: that is not
    /// what stands in the way.
    fn make_room_for_pasids(self: &Arc<Self>, device: &Arc<Connected>) -> Result<bool, Error> {
        let _memory = self.context().hold_memory();
        let mut dropped = Vec::new();
        let mut state = self.lock();
        let is_user = |part: &Part| part.users.iter().any(|(user, pasid)| pasid.is_none() && std::ptr::eq(user.as_ptr(), Arc::as_ptr(device)));
        let Some(place) = state.parts.iter().position(|part| is_user(part) && !part.has_pasids()) else { return Ok(false) };
        let why = format!("because device {} uses PASIDs, which belong to such a table's owner on this unit", device.label());
        let anew = Anew { better_than: None, company: true, why: &why };
        match self.make_anew(&mut state, place, anew, &mut dropped) {
            Ok(made) => Ok(made.is_some()),
            Err(Error::Refused(refusal)) => Err(Refusal::new(Property::Pasid, format!("{}: {}", self.id(), refusal.reason)).into()),
            Err(error) => Err(error),
        }
    }

    /// The last PASID of a device was detached: its own table may be a better one again.
    pub(super) fn without_company(self: &Arc<Self>, device: &Connected) {
        let _memory = self.context().hold_memory();
        let mut dropped = Vec::new();
        let mut state = self.lock();
        let why = format!("because device {} uses no PASIDs any more", device.label());
        if let Err(error) = self.improve(&mut state, &mut dropped, &why) {
            tracing::debug!(%error, ioasid = self.id().0, "a better strategy was not to be had");
        }
    }

    /// Chooses better strategies for units whose devices can have them now.
    pub(super) fn improve(self: &Arc<Self>, state: &mut State, dropped: &mut Dropped, why: &str) -> Result<Report, Error> {
        let mut all = Report::default();
        for place in 0..state.parts.len() {
            let Some(chosen) = state.parts[place].explanation.chosen.as_ref().map(|chosen| chosen.strategy) else { continue };
            let anew = Anew { better_than: Some(chosen), company: false, why };
            if let Some(report) = self.make_anew(state, place, anew, dropped)? {
                all.join(report);
            }
        }
        Ok(all)
    }

    /// Makes a part anew and moves its users there. None if nobody uses it, or there is nothing better. On an error nobody was moved.
    fn make_anew(self: &Arc<Self>, state: &mut State, place: usize, anew: Anew<'_>, dropped: &mut Dropped) -> Result<Option<Report>, Error> {
        let users: Vec<(Arc<Connected>, Option<Pasid>)> =
            state.parts[place].users.iter().filter_map(|(user, pasid)| Some((user.upgrade()?, *pasid))).collect();
        dropped.extend(users.iter().map(|(user, _)| (Arc::clone(user), None)));
        let Some((device, _)) = users.first() else { return Ok(None) };
        // The address space of a PASID, or of a device that uses PASIDs elsewhere.
        let company = anew.company || users.iter().any(|(user, pasid)| pasid.is_some() || user.slots().keys().any(Option::is_some));
        let Some((mut part, report)) = self.build(state, device, company, anew.better_than)? else { return Ok(None) };
        let mut moved = Vec::new();
        for (device, pasid) in &users {
            match self.hand_over(&mut state.parts[place], &mut part, device, *pasid) {
                Ok(()) => moved.push((device, *pasid)),
                Err(error) => {
                    for (device, pasid) in moved {
                        let _ = self.hand_over(&mut part, &mut state.parts[place], device, pasid);
                    }
                    return Err(error);
                }
            }
        }
        let before = &mut state.parts[place];
        let was = before.explanation.chosen.as_ref().map(|chosen| chosen.strategy);
        let is_other = was != part.explanation.chosen.as_ref().map(|chosen| chosen.strategy);
        if let Some(was) = was.filter(|_| is_other) {
            part.explanation.notes.push(format!("chosen {}: was {was} before", anew.why));
        }
        part.users = std::mem::take(&mut before.users);
        part.blocked = std::mem::take(&mut before.blocked);
        state.parts[place] = part;
        Ok(Some(report))
    }

    /// Whether single PASIDs can be attached to what a candidate makes.
    fn takes_pasids(&self, device: &Connected, candidate: &Candidate) -> Result<bool, Error> {
        match candidate {
            Candidate::Memory | Candidate::Nothing | Candidate::Areas => Ok(true),
            Candidate::Own(config) => takes_pasids(self.context(), device, config, Under::Guest),
            Candidate::Table(config, format) => {
                let mut config = config.clone();
                format.geometry_ref().roots.iter().for_each(|root| config.settings.set(&root.setting, 0));
                takes_pasids(self.context(), device, &config, Under::Host)
            }
        }
    }

    fn choice<'a>(&'a self, state: &'a State, device: &'a Connected, memory: &'a super::GuestMemory) -> Choice<'a> {
        Choice {
            request: self.request(),
            kind: &state.kind,
            geometry: state.geometry.as_ref(),
            capabilities: device.capabilities(),
            plugins: self.context().plugins(),
            supervisors: self.context().supervisors(),
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
        if matches!(state.content, Content::Managed(_)) || self.request().second_table || matches!(first.host, Host::Kernel { .. }) {
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

    /// The part that a device gets, made if there is none; and what was read for it if it was made.
    fn part_for(&self, state: &mut State, device: &Arc<Connected>, company: bool) -> Result<(usize, Option<Report>), Error> {
        // Areas are for all units: the kernel keeps a table for each of them.
        let is_shared = |part: &Part| matches!(part.host, Host::Areas(_));
        let same = state.parts.iter().position(|part| part.unit == device.unit());
        // What nobody uses any more was chosen for others.
        if let Some(place) = same.filter(|place| state.parts[*place].is_unused())
            && self.has_better(state, place, device, company)?
        {
            state.parts.remove(place);
            return self.part_for(state, device, company);
        }
        if let Some(place) = same.or_else(|| state.parts.iter().position(is_shared)) {
            return Ok((place, None));
        }
        self.check_unit(state, device)?;
        let Some((part, report)) = self.build(state, device, company, None)? else {
            return Err(Refusal::new(Property::Strategy, format!("device {}: there is no strategy", device.label())).into());
        };
        state.parts.push(part);
        Ok((state.parts.len() - 1, Some(report)))
    }

    /// Whether a better strategy than a part's would be chosen for a device, as far as that can be known without making it.
    fn has_better(&self, state: &State, place: usize, device: &Connected, company: bool) -> Result<bool, Error> {
        let chosen = state.parts[place].explanation.chosen.as_ref().map(|chosen| chosen.strategy);
        let memory = self.context().memory();
        for strategy in Strategy::ALL.into_iter().take_while(|strategy| chosen != Some(*strategy)) {
            if let Ok((candidate, _)) = self.choice(state, device, &memory).judge(strategy)?
                && (!company || self.takes_pasids(device, &candidate)?)
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
            let (place, made) = self.part_for(&mut state, device, company)?;
            let part = &mut state.parts[place];
            let moved = match (slots.get_mut(&pasid), &mut other) {
                (Some(slot), Some(other)) => Self::move_to(part, device, pasid, slot, other).map(|()| slot.space = Arc::clone(self)),
                _ => Self::attach_to(part, device, pasid).map(|held| {
                    slots.insert(pasid, Slot { held, space: Arc::clone(self) });
                }),
            };
            if let Err(error) = moved {
                if made.is_some() {
                    state.parts.pop();
                }
                return Err(error);
            }
            let part = &mut state.parts[place];
            part.joined(device, pasid);
            part.is_new = false;
            if let Some(other) = &mut other {
                let _ = other.parts.iter_mut().any(|part| part.left(Arc::as_ptr(device), pasid));
            }
            tracing::debug!(device = device.label(), ioasid = self.id().0, replace, "attached");
            return Ok(made.unwrap_or_default());
        }
    }

    /// The guest's structures say something else: parts whose units walk the guest's own table, or a table of the kernel's, are made anew, and those who use
    /// them are moved. On an error nobody was. Others follow, unless something better can be had now. What is in `dropped` then is to be dropped without locks.
    pub(super) fn rebuild(self: &Arc<Self>, state: &mut State, dropped: &mut Dropped) -> Result<Report, Error> {
        const WHY: &str = "because the guest's structures changed";
        let mut all = Report::default();
        for place in 0..state.parts.len() {
            if !state.parts[place].follows() {
                let anew = Anew { better_than: None, company: false, why: WHY };
                all.join(self.make_anew(state, place, anew, dropped)?.unwrap_or_default());
            }
        }
        for place in 0..state.parts.len() {
            let Some(chosen) = state.parts[place].explanation.chosen.as_ref().map(|chosen| chosen.strategy) else { continue };
            if !state.parts[place].follows() || state.parts[place].is_new {
                continue;
            }
            let anew = Anew { better_than: Some(chosen), company: false, why: WHY };
            match self.make_anew(state, place, anew, dropped) {
                Ok(report) => all.join(report.unwrap_or_default()),
                // It follows as it is.
                Err(error) => tracing::debug!(%error, ioasid = self.id().0, "a better strategy was not to be had"),
            }
        }
        // Of what nobody uses nothing is kept: it would have to be made anew.
        let Kind::Guest(_) = state.kind else { return Ok(all) };
        state.parts.retain(|part| part.follows() || part.users.iter().any(|(user, _)| user.strong_count() > 0) || !part.blocked.is_empty());
        Ok(all)
    }

    /// Moves an attachment of this IOASID from one part of it to another; on an error it stays.
    fn hand_over(self: &Arc<Self>, from: &mut Part, to: &mut Part, device: &Arc<Connected>, pasid: Option<Pasid>) -> Result<(), Error> {
        let mut slots = device.slots();
        let Some(slot) = slots.get_mut(&pasid).filter(|slot| Arc::ptr_eq(&slot.space, self)) else { return Ok(()) };
        let (attachment, was_areas) = match std::mem::replace(&mut slot.held, Held::Nowhere) {
            Held::Here(attachment) => (attachment, false),
            Held::Areas => match from.release(device, pasid) {
                Some(attachment) => (attachment, true),
                // A swap left it behind: it is detached by now, and has to be attached anew.
                None => {
                    slot.held = Self::attach_to(to, device, pasid)?;
                    return Ok(());
                }
            },
            Held::Nowhere => return Ok(()),
        };
        let before = device.vdevice();
        let entered = to.viommu().map_or(Ok(()), |viommu| device.enter(viommu)).map_err(Error::kernel("telling the vIOMMU of the device"));
        let result = match entered {
            Ok(()) => to.adopt(attachment, pasid).map_err(|(attachment, errno)| (attachment, refused(errno, device, pasid))),
            Err(error) => Err((attachment, error)),
        };
        match result {
            Ok(held) => {
                slot.held = held;
                Ok(())
            }
            Err((attachment, error)) => {
                device.restore(before);
                // If areas do not take it back its DMA would go where nobody looks after it: better nothing.
                slot.held = if was_areas { from.adopt(attachment, pasid).unwrap_or(Held::Nowhere) } else { Held::Here(attachment) };
                Err(error)
            }
        }
    }

    /// Attaches a device that is attached to nothing.
    fn attach_to(part: &mut Part, device: &Arc<Connected>, pasid: Option<Pasid>) -> Result<Held, Error> {
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
            part.adopt(attachment, pasid).map_err(|(attachment, errno)| {
                let back = other.parts.iter_mut().find(|part| was_areas && matches!(part.host, Host::Areas(_)));
                slot.held = match back {
                    None => Held::Here(attachment),
                    // If that fails its DMA would go where nobody looks after it: better nothing.
                    Some(part) => part.adopt(attachment, pasid).unwrap_or(Held::Nowhere),
                };
                refused(errno, device, pasid)
            })
        })?;
        slot.held = held;
        Ok(())
    }

    /// With the device known to the part's vIOMMU; as before on an error.
    fn within<T>(
        part: &mut Part,
        device: &Arc<Connected>,
        pasid: Option<Pasid>,
        act: impl FnOnce(&mut Part) -> Result<T, Error>,
    ) -> Result<T, Error> {
        if pasid.is_some() && !part.has_pasids() {
            return Err(Refusal::new(Property::Pasid, format!("device {}: {OWNERS_PASIDS}", device.label())).into());
        }
        let before = device.vdevice();
        if let Some(viommu) = part.viommu() {
            device.enter(viommu).map_err(Error::kernel("telling the vIOMMU of the device"))?;
        }
        act(part).inspect_err(|_| device.restore(before))
    }

    /// Chooses a strategy for a device's path, and makes what it takes; what was read for that. None if there is none that is better than the given one. With `company`
    /// page tables of the device itself and of its PASIDs are to be side by side.
    fn build(
        &self,
        state: &mut State,
        device: &Arc<Connected>,
        company: bool,
        better_than: Option<Strategy>,
    ) -> Result<Option<(Part, Report)>, Error> {
        let span = tracing::debug_span!("build", ioasid = self.id().0, device = device.label());
        let _entered = span.enter();
        let mut explanation = Explanation::new(device.label());
        let memory = self.context().memory();
        for strategy in Strategy::ALL {
            if better_than == Some(strategy) {
                return Ok(None);
            }
            let (candidate, notes) = match self.choice(state, device, &memory).judge(strategy)? {
                Ok(candidate) => candidate,
                Err(reasons) => {
                    explanation.reject(strategy, reasons);
                    continue;
                }
            };
            let what = candidate.what();
            match self.make(state, device, company, candidate) {
                Ok((host, report)) => {
                    tracing::debug!(%strategy, what, "chosen");
                    self.context().count(Counter::of(strategy), 1);
                    explanation.chosen = Some(Chosen { strategy, what });
                    explanation.notes = notes;
                    let part = Part { unit: device.unit(), host, explanation, users: Vec::new(), is_new: true, blocked: Vec::new() };
                    return Ok(Some((part, report)));
                }
                Err(error) if is_no(&error) => explanation.reject(strategy, vec![error.to_string()]),
                Err(error) => return Err(error),
            }
        }
        Err(Refusal::new(Property::Strategy, format!("device {}: {}", device.label(), explanation.why_not())).into())
    }

    fn make(&self, state: &State, device: &Arc<Connected>, company: bool, candidate: Candidate) -> Result<(Host, Report), Error> {
        let context = self.context();
        let whom = For { context, device, faults: state.faults.as_ref(), with_pasids: company };
        match candidate {
            Candidate::Memory => {
                // The parent is kept: it hears when memory comes or goes.
                let parent = context.parent(Under::Guest)?;
                let direct = parent.direct(device).map_err(Error::kernel("making a page table of guest memory"))?;
                Ok((Host::Kernel { hwpt: direct, _parent: Some(parent) }, Report::default()))
            }
            Candidate::Nothing => {
                let empty = context.empty(device.unit()).map(|hwpt| Host::Kernel { hwpt, _parent: None });
                empty.map(|host| (host, Report::default())).ok_or_else(|| Refusal::new(Property::Unit, "the unit is not known").into())
            }
            Candidate::Own(config) => {
                let mut bound = Bound::new(whom, context.parent(Under::Guest)?, &config, Under::Guest)?;
                let committer = committer(&mut bound)?;
                Ok((Host::Own(Box::new(bound), Box::new(committer)), Report::default()))
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
            return made.map(|hwpt| (Host::Kernel { hwpt, _parent: None }, Report::default())).map_err(|errno| match errno {
                Errno::EADDRINUSE => Refusal::new(Property::Iova, "areas lie where the unit cannot translate").into(),
                errno => Error::kernel("making a page table for the device's unit")(errno),
            });
        }
        if state.faults.is_some() {
            return Err(Refusal::new(Property::PageRequests, "faults in areas that follow a guest are not recoverable").into());
        }
        let limits = &self.request().limits;
        let areas = Areas::new(self.context().pins(), AreaLimits { flags, ..limits.areas }).map_err(Error::kernel("making an address space"))?;
        let mut engine = Engine::new(self.context(), self.watcher(), &state.kind, limits, areas)?;
        let report = engine.fill(&self.context().memory(), &state.told())?;
        if engine.sink().figures().pending > 0 {
            // What was refused once is tried again, and then given up.
            engine.commit().map_err(Error::Blocked)?;
            if engine.sink().figures().pending > 0 {
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
