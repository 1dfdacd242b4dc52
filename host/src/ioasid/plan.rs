//! Who is to go where when parts are made anew: unit by unit, as each of them would be served if it came now.
//!
//! A table of user space's serves one unit, areas serve all. So areas can be made anew for one of their units and stay for the others, and parts of several units can end
//! in the same areas. Where the request allows one table, several units have areas, or what they have stays.

use std::sync::Arc;

use super::build::{Built, Wish};
use super::device::Connected;
use super::exchange::{Exchange, To};
use super::part::{Dropped, Host, Part};
use super::space::{Content, Space, State};
use super::strategy::Candidate;
use super::{Error, Property, Refusal, Strategy};
use crate::kernel::{HwptFlags, Pasid};

/// Users of a part that are behind one unit.
pub(super) struct Group {
    /// The part.
    pub(super) place: usize,
    pub(super) users: Vec<(Arc<Connected>, Option<Pasid>)>,
    /// Whose path decides.
    lead: Arc<Connected>,
    others: Vec<Arc<Connected>>,
    /// Among them, or of their devices elsewhere, are PASIDs.
    company: bool,
    /// They stay unless there is something better than this.
    better_than: Option<Strategy>,
}

impl Group {
    fn wish(&self) -> Wish<'_> {
        Wish { others: &self.others, better_than: self.better_than, ..Wish::best(&self.lead, self.company) }
    }
}

/// The users of a part by unit. `newcomer` is a device whose PASID is to be attached beside them: its unit comes first.
pub(super) fn groups(
    state: &State,
    place: usize,
    better_than: Option<Strategy>,
    newcomer: Option<&Arc<Connected>>,
    dropped: &mut Dropped,
) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for (user, pasid) in state.parts[place].users.iter().filter_map(|(user, pasid)| Some((user.upgrade()?, *pasid))) {
        dropped.push((Arc::clone(&user), None));
        let known = groups.iter().position(|group| group.lead.unit() == user.unit()).unwrap_or_else(|| {
            groups.push(Group { place, users: Vec::new(), lead: Arc::clone(&user), others: Vec::new(), company: false, better_than });
            groups.len() - 1
        });
        groups[known].users.push((user, pasid));
    }
    for group in &mut groups {
        let asks = newcomer.filter(|device| device.unit() == group.lead.unit());
        group.company = asks.is_some() || group.users.iter().any(|(user, pasid)| pasid.is_some() || user.slots().keys().any(Option::is_some));
        let has_pasids = |(user, _): &&(Arc<Connected>, Option<Pasid>)| user.pasid_flag() != HwptFlags::NONE;
        // What is made for a device without PASIDs is not good for those of others.
        let lead = asks.or_else(|| group.users.iter().find(has_pasids).filter(|_| group.company).map(|(user, _)| user)).map(Arc::clone);
        group.lead = lead.unwrap_or_else(|| Arc::clone(&group.lead));
        for (user, _) in &group.users {
            if !Arc::ptr_eq(user, &group.lead) && !group.others.iter().any(|known| Arc::ptr_eq(known, user)) {
                group.others.push(Arc::clone(user));
            }
        }
    }
    groups.sort_by_key(|group| newcomer.is_some_and(|device| device.unit() != group.lead.unit()));
    groups
}

/// A table of user space's, or areas, that somebody uses. The kernel's own tables are mirrored for each unit.
fn is_table(part: &Part) -> bool {
    !matches!(part.host, Host::Kernel { .. }) && !part.is_unused()
}

impl Space {
    /// Devices behind several units share areas, or are refused.
    pub(super) fn takes_one_table(&self, state: &State) -> bool {
        !self.request().second_table && !matches!(state.content, Content::Managed(_))
    }

    /// Whether each unit would get the best for itself, and that is more tables than the request allows.
    pub(super) fn are_too_many(&self, state: &State, groups: &[Group]) -> Result<bool, Error> {
        if !self.takes_one_table(state) {
            return Ok(false);
        }
        let is_here = |place: usize| groups.iter().any(|group| group.place == place);
        let rest: Vec<&Part> =
            state.parts.iter().enumerate().filter(|(place, part)| !is_here(*place) && is_table(part)).map(|(_, part)| part).collect();
        if groups.len() + rest.len() < 2 {
            return Ok(false);
        }
        let mut areas = rest.iter().any(|part| part.is_for_all_units());
        let mut tables = rest.iter().filter(|part| !part.is_for_all_units()).count();
        for group in groups {
            match self.foresee(state, &group.wish())? {
                Some(Candidate::Areas) => areas = true,
                Some(candidate) => tables += usize::from(candidate.is_users()),
                None => {
                    let stays = &state.parts[group.place];
                    areas |= stays.is_for_all_units();
                    tables += usize::from(is_table(stays) && !stays.is_for_all_units());
                }
            }
        }
        Ok(tables + usize::from(areas) > 1)
    }

    /// Makes what groups are to have: all of them, or an error. With `too_many`, no table is made that is for one unit.
    pub(super) fn plan(&self, state: &State, groups: Vec<Group>, too_many: bool) -> Result<Exchange, Error> {
        let labels: Vec<(usize, String)> = groups.iter().map(|group| (group.lead.unit(), group.lead.label().to_owned())).collect();
        let others = state.parts.iter().filter(|part| is_table(part)).map(|part| (part.unit, part.explanation.device.clone()));
        let labels: Vec<(usize, String)> = labels.into_iter().chain(others).collect();
        let places: Vec<usize> = groups.iter().map(|group| group.place).collect();
        let mut exchange = Exchange::default();
        for group in groups {
            let unit = group.lead.unit();
            let other = labels.iter().find(|(other, _)| too_many && *other != unit);
            let no_table =
                other.map(|(_, label)| format!("device {label} is behind another unit, and the request does not allow a table for each of them"));
            let shared = areas_for(state, &exchange, &group, &places, too_many);
            let wish = Wish { no_table: no_table.as_deref(), has_areas: shared.is_some(), ..group.wish() };
            match (self.build(state, &wish)?, shared) {
                (Built::Made(part, report), _) => exchange.make(*part, report, &group),
                (Built::Areas, Some(to)) => exchange.send(&group, to),
                (Built::Areas, None) => {}
                (Built::Nothing(explanation), _) => exchange.leave(&group, unit, explanation, no_table.as_deref()),
            }
        }
        // What the kernel refused is not what was foreseen.
        let (before, after) = (state.parts.iter().filter(|part| is_table(part)).count(), exchange.tables_after(state, is_table));
        if self.takes_one_table(state) && after > before.max(1) {
            let reason = "devices are behind several units, and need a table for each of them; the request does not allow a second one";
            return Err(Refusal::new(Property::Unit, reason).into());
        }
        Ok(exchange)
    }
}

/// Areas that a group can share: those that were just made, or those of a part that stays. Unless there must be no others, none of which something is missing that this
/// unit may have.
fn areas_for(state: &State, exchange: &Exchange, group: &Group, leaving: &[usize], must_be: bool) -> Option<To> {
    let suits = |part: &Part| {
        let Host::Areas(engine) = &part.host else { return false };
        !part.stale && (!group.company || part.has_pasids()) && (must_be || engine.sink().is_whole())
    };
    let made = exchange.made().iter().position(suits).map(To::Made);
    made.or_else(|| (0..state.parts.len()).find(|place| !leaving.contains(place) && suits(&state.parts[*place])).map(To::There))
}
