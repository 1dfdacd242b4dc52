//! Parts that take other parts' places: because the guest's structures changed, because something better can be had, or to make room for PASIDs.
//!
//! ```text
//!   all that is needed is made -> users are handed over, one by one -> the new parts take the places, and the old ones go
//!                                   an error: those who were handed over go back; who cannot is detached, and waits for `recover`
//! ```

use std::sync::Arc;

use super::attach::refused;
use super::device::{Connected, Held};
use super::part::{Dropped, Part};
use super::space::{Space, State};
use super::strategy::finest;
use super::{Error, Property, Refusal, Strategy};
use crate::kernel::Pasid;
use crate::sync::Report;

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

/// A part that is to take another one's place, and whom it takes over.
struct Next {
    place: usize,
    part: Part,
    users: Vec<(Arc<Connected>, Option<Pasid>)>,
    /// So many of them are there already.
    moved: usize,
    report: Report,
}

impl Next {
    /// All users are there: it takes the place.
    fn seat(self, state: &mut State, why: &str) -> Report {
        let Self { place, mut part, report, .. } = self;
        let before = &mut state.parts[place];
        let was = before.explanation.chosen.as_ref().map(|chosen| chosen.strategy);
        let is_other = was != part.explanation.chosen.as_ref().map(|chosen| chosen.strategy);
        if let Some(was) = was.filter(|_| is_other) {
            part.explanation.notes.push(format!("chosen {why}: was {was} before"));
        }
        part.users = std::mem::take(&mut before.users);
        state.parts[place] = part;
        report
    }
}

impl Space {
    /// A PASID of a device is to be attached, and the device's own table is one that its PASIDs belong to: makes it anew as one that leaves them alone. False: that is not
    /// what stands in the way.
    pub(super) fn make_room_for_pasids(self: &Arc<Self>, device: &Arc<Connected>) -> Result<bool, Error> {
        let _memory = self.context().hold_memory();
        let mut dropped = Vec::new();
        let mut state = self.lock();
        let Some(place) = state.parts.iter().position(|part| part.is_used_by(device) && !part.has_pasids()) else { return Ok(false) };
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

    /// Makes a part anew and moves its users there. None if nobody uses it, or there is nothing better. On an error nobody was moved; those who could not stay
    /// either are taken off.
    fn make_anew(self: &Arc<Self>, state: &mut State, place: usize, anew: Anew<'_>, dropped: &mut Dropped) -> Result<Option<Report>, Error> {
        let Some(mut next) = self.next(state, place, anew, dropped)? else { return Ok(None) };
        match self.take_over(state, &mut next) {
            Ok(()) => Ok(Some(next.seat(state, anew.why))),
            Err(error) => Err(self.put_back(state, &mut [next], dropped, error)),
        }
    }

    /// Makes a part that is to take another one's place, which does not change. None if nobody uses that, or there is nothing better.
    fn next(self: &Arc<Self>, state: &mut State, place: usize, anew: Anew<'_>, dropped: &mut Dropped) -> Result<Option<Next>, Error> {
        let users: Vec<(Arc<Connected>, Option<Pasid>)> =
            state.parts[place].users.iter().filter_map(|(user, pasid)| Some((user.upgrade()?, *pasid))).collect();
        dropped.extend(users.iter().map(|(user, _)| (Arc::clone(user), None)));
        let Some((device, _)) = users.first() else { return Ok(None) };
        // The address space of a PASID, or of a device that uses PASIDs elsewhere.
        let company = anew.company || users.iter().any(|(user, pasid)| pasid.is_some() || user.slots().keys().any(Option::is_some));
        let made = self.build(state, device, company, anew.better_than)?;
        Ok(made.map(|(part, report)| Next { place, part, users, moved: 0, report }))
    }

    /// Moves the users of a part to the one that is to take its place, up to the first that cannot be moved.
    fn take_over(self: &Arc<Self>, state: &mut State, next: &mut Next) -> Result<(), Error> {
        for (device, pasid) in &next.users {
            self.hand_over(&mut state.parts[next.place], &mut next.part, device, *pasid)?;
            next.moved += 1;
        }
        Ok(())
    }

    /// After an error: those who were moved go back. Who cannot be put back is taken off, and then that is the error.
    fn put_back(self: &Arc<Self>, state: &mut State, nexts: &mut [Next], dropped: &mut Dropped, error: Error) -> Error {
        for next in nexts.iter_mut().rev() {
            for (device, pasid) in next.users[..next.moved].iter().rev() {
                if self.hand_over(&mut next.part, &mut state.parts[next.place], device, *pasid).is_ok() {
                    continue;
                }
                if let Some(slot) = device.slots().get_mut(pasid).filter(|slot| Arc::ptr_eq(&slot.space, self)) {
                    // Nobody looks after where it is.
                    drop(next.part.release(device, *pasid));
                    slot.held = Held::Nowhere;
                }
            }
            next.moved = 0;
        }
        if state.take_off_lost(self, dropped) { Error::Detached(Box::new(error)) } else { error }
    }

    /// The guest's structures say something else: parts whose units walk the guest's own table, or a table of the kernel's, are made anew, and those who use
    /// them are moved, in all units or in none. On an error nobody was. Others follow, unless something better can be had now; if somebody was detached by trying
    /// that, it is told beside the report. What is in `dropped` then is to be dropped without locks.
    pub(super) fn rebuild(self: &Arc<Self>, state: &mut State, dropped: &mut Dropped) -> Result<(Report, Result<(), Error>), Error> {
        const WHY: &str = "because the guest's structures changed";
        let anew = Anew { better_than: None, company: false, why: WHY };
        state.parts.iter_mut().for_each(|part| part.is_new = false);
        let finest = finest(self.context().supervisors(), &state.kind, state.geometry.as_ref())?;
        let mut nexts = Vec::new();
        for place in 0..state.parts.len() {
            if !state.parts[place].follows() || state.parts[place].is_too_coarse(finest) {
                nexts.extend(self.next(state, place, anew, dropped)?);
            }
        }
        for index in 0..nexts.len() {
            if let Err(error) = self.take_over(state, &mut nexts[index]) {
                return Err(self.put_back(state, &mut nexts[..=index], dropped, error));
            }
        }
        let (mut all, mut detached) = (Report::default(), Ok(()));
        nexts.into_iter().for_each(|next| all.join(next.seat(state, WHY)));
        for place in 0..state.parts.len() {
            let Some(chosen) = state.parts[place].explanation.chosen.as_ref().map(|chosen| chosen.strategy) else { continue };
            if !state.parts[place].follows() || state.parts[place].is_new {
                continue;
            }
            match self.make_anew(state, place, Anew { better_than: Some(chosen), ..anew }, dropped) {
                Ok(report) => all.join(report.unwrap_or_default()),
                Err(error @ Error::Detached(_)) => detached = detached.and(Err(error)),
                // It follows as it is.
                Err(error) => tracing::debug!(%error, ioasid = self.id().0, "a better strategy was not to be had"),
            }
        }
        // Of what nobody uses nothing is kept: it would have to be made anew.
        state.parts.retain(|part| part.follows() && !part.is_too_coarse(finest) || !part.is_unused());
        Ok((all, detached))
    }

    /// Moves an attachment of this IOASID from one part of it to another; on an error it stays, or is nowhere.
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
}
