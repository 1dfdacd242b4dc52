//! Why parts are made anew: because the guest's structures changed, because something better can be had, or to make room for PASIDs. Who goes where then is found out in
//! `plan`, and done in `exchange`.

use std::sync::Arc;

use super::device::Connected;
use super::part::{Dropped, Part};
use super::plan::{Group, groups};
use super::space::{Space, State};
use super::strategy::finest;
use super::{Error, Property, Refusal};
use crate::sync::Report;

impl Space {
    /// A device is to be attached beside PASIDs of it, and the table that it has or is to share is one that its PASIDs belong to: makes that anew as one that leaves them
    /// alone, for all who use it. False: that is not what stands in the way.
    pub(super) fn make_room_for_pasids(self: &Arc<Self>, device: &Arc<Connected>) -> Result<bool, Error> {
        let _memory = self.context().hold_memory();
        let mut dropped = Dropped::new();
        let mut state = self.lock();
        let stands_in_the_way = |part: &Part| part.can_make_room_for(device) && !part.has_pasids();
        let Some(place) = state.parts.iter().position(stands_in_the_way) else { return Ok(false) };
        let why = format!("because device {} uses PASIDs, which belong to such a table's owner on this unit", device.label());
        let groups = groups(&state, place, None, Some(device), &mut dropped);
        match self.put_elsewhere(&mut state, groups, &mut dropped, &why) {
            Ok(_) => Ok(true),
            Err(Error::Refused(refusal)) => Err(Refusal::new(Property::Pasid, format!("{}: {}", self.id(), refusal.reason)).into()),
            Err(error) => Err(error),
        }
    }

    /// The last PASID of a device was detached: its own table may be a better one again.
    pub(super) fn without_company(self: &Arc<Self>, device: &Connected) {
        let _memory = self.context().hold_memory();
        let mut dropped = Dropped::new();
        let mut state = self.lock();
        let why = format!("because device {} uses no PASIDs any more", device.label());
        if let Err(error) = self.improve(&mut state, &mut dropped, &why, |_| true) {
            tracing::debug!(%error, ioasid = self.id().0, "a better strategy was not to be had");
        }
    }

    /// Chooses better strategies for units whose devices can have them now, among those of some parts. On an error nobody was moved, but those who could not stay either
    /// are taken off.
    pub(super) fn improve(
        self: &Arc<Self>,
        state: &mut State,
        dropped: &mut Dropped,
        why: &str,
        is_among: impl Fn(&Part) -> bool,
    ) -> Result<Report, Error> {
        let mut all: Vec<Group> = Vec::new();
        for place in 0..state.parts.len() {
            let chosen = state.parts[place].strategy();
            if chosen.is_some() && is_among(&state.parts[place]) {
                all.extend(groups(state, place, chosen, None, dropped));
            }
        }
        self.put_elsewhere(state, all, dropped, why)
    }

    fn put_elsewhere(self: &Arc<Self>, state: &mut State, groups: Vec<Group>, dropped: &mut Dropped, why: &str) -> Result<Report, Error> {
        let too_many = self.are_too_many(state, &groups)?;
        let exchange = self.plan(state, groups, too_many)?;
        self.carry_out(state, exchange, dropped, why)
    }

    /// The guest's structures say something else: parts whose units walk the guest's own table, or a table of the kernel's, are made anew, and those who use
    /// them are moved, in all units or in none. On an error nobody was. Others follow, unless something better can be had now; if somebody was detached by trying
    /// that, it is told beside the report. What is in `dropped` then is to be dropped without locks.
    pub(super) fn rebuild(self: &Arc<Self>, state: &mut State, dropped: &mut Dropped) -> Result<(Report, Result<(), Error>), Error> {
        const WHY: &str = "because the guest's structures changed";
        state.parts.iter_mut().for_each(|part| part.is_new = false);
        let finest = finest(self.context().supervisors(), &state.kind, state.geometry.as_ref())?;
        // Where the guest's pages became smaller than a host table's, it follows no more.
        let follows = |part: &Part| part.follows() && !part.is_too_coarse(finest);
        let some = |state: &State, dropped: &mut Dropped, goes: &dyn Fn(&Part) -> bool| -> Vec<Group> {
            let places = (0..state.parts.len()).filter(|place| goes(&state.parts[*place]));
            places.flat_map(|place| groups(state, place, None, None, dropped)).collect()
        };
        let mut must = some(state, dropped, &|part| !follows(part));
        let too_many = self.are_too_many(state, &must)?;
        if too_many {
            // Not those for one unit either, which would follow.
            must.extend(some(state, dropped, &|part| follows(part) && !part.is_for_all_units()));
        }
        let exchange = self.plan(state, must, too_many)?;
        let mut all = self.carry_out(state, exchange, dropped, WHY)?;
        let mut detached = Ok(());
        match self.improve(state, dropped, WHY, |part| part.follows() && !part.is_new) {
            Ok(report) => all.join(report),
            Err(error @ Error::Detached(_)) => detached = Err(error),
            // They follow as they are.
            Err(error) => tracing::debug!(%error, ioasid = self.id().0, "a better strategy was not to be had"),
        }
        // Of what nobody uses nothing is kept: it would have to be made anew.
        state.parts.retain(|part| follows(part) || !part.is_unused());
        Ok((all, detached))
    }
}
