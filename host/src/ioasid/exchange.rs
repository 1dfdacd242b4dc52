//! Users of an address space who go from parts of it to other parts, all of them or none.
//!
//! ```text
//!   all that is needed is made -> users are handed over, one by one -> parts that nobody is left in go, those that were made take their places
//!                                   an error: those who were handed over go back; who cannot is detached, and waits for `recover`
//! ```

use std::sync::{Arc, Weak};

use super::attach::refused;
use super::device::{Connected, Held};
use super::part::{Came, Dropped, Host, Part};
use super::plan::Group;
use super::space::{Space, State};
use super::{Error, Explanation};
use crate::kernel::Pasid;
use crate::sync::Report;

/// Where users go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum To {
    /// To one of the parts that were made for it.
    Made(usize),
    /// To another part that is there.
    There(usize),
}

/// A user who goes.
struct Move {
    device: Arc<Connected>,
    pasid: Option<Pasid>,
    from: usize,
    to: To,
}

/// Users behind one unit who stay where they are.
struct Stay {
    place: usize,
    unit: usize,
    /// Why there is nothing better for them.
    explanation: Explanation,
    /// If it is for the sake of other units.
    for_others: Option<String>,
}

/// Parts that are made to take users over, and who goes where.
#[derive(Default)]
pub(super) struct Exchange {
    made: Vec<Part>,
    moves: Vec<Move>,
    /// So many of them are there already.
    moved: usize,
    stays: Vec<Stay>,
    report: Report,
}

impl Exchange {
    pub(super) fn made(&self) -> &[Part] {
        &self.made
    }

    /// A group goes to a part that was made for it.
    pub(super) fn make(&mut self, part: Part, report: Report, group: &Group) {
        self.made.push(part);
        self.report.join(report);
        self.send(group, To::Made(self.made.len() - 1));
    }

    pub(super) fn send(&mut self, group: &Group, to: To) {
        let goes = |(device, pasid): &(Arc<Connected>, Option<Pasid>)| Move { device: Arc::clone(device), pasid: *pasid, from: group.place, to };
        self.moves.extend(group.users.iter().map(goes));
    }

    pub(super) fn leave(&mut self, group: &Group, unit: usize, explanation: Explanation, for_others: Option<&str>) {
        self.stays.push(Stay { place: group.place, unit, explanation, for_others: for_others.map(str::to_owned) });
    }

    /// Whether all users of a part go.
    fn empties(&self, state: &State, place: usize) -> bool {
        // Nobody is held here: dropping the last handle of a device takes locks.
        let goes = |(user, pasid): &(Weak<Connected>, Option<Pasid>)| {
            self.moves.iter().any(|one| one.from == place && Arc::as_ptr(&one.device) == user.as_ptr() && one.pasid == *pasid)
        };
        state.parts[place].users.iter().filter(|(user, _)| user.strong_count() > 0).all(goes)
    }

    /// How many tables there are when all who go are there.
    pub(super) fn tables_after(&self, state: &State, is_table: impl Fn(&Part) -> bool) -> usize {
        let stays = (0..state.parts.len()).filter(|place| is_table(&state.parts[*place]) && !self.empties(state, *place)).count();
        stays + self.made.iter().filter(|part| !matches!(part.host, Host::Kernel { .. })).count()
    }

    /// All who go are there: parts that were made take the places of those that nobody is left in.
    fn seat(mut self, state: &mut State, why: &str) -> Report {
        self.say(state, why);
        let homes: Vec<Option<usize>> =
            (0..self.made.len()).map(|index| self.moves.iter().find(|one| one.to == To::Made(index)).map(|one| one.from)).collect();
        let mut left: Vec<usize> = self.moves.iter().map(|one| one.from).filter(|place| self.empties(state, *place)).collect();
        left.sort_unstable();
        left.dedup();
        for Move { device, pasid, from, to } in &self.moves {
            state.parts[*from].left(Arc::as_ptr(device), *pasid);
            match to {
                To::Made(index) => self.made[*index].joined(device, *pasid),
                To::There(place) => state.parts[*place].joined(device, *pasid),
            }
        }
        for (part, home) in self.made.into_iter().zip(homes) {
            match left.iter().position(|place| Some(*place) == home) {
                Some(index) => state.parts[left.remove(index)] = part,
                None => state.parts.push(part),
            }
        }
        left.iter().rev().for_each(|place| drop(state.parts.remove(*place)));
        self.report
    }

    /// Says in the explanations what happened, and why others stay.
    fn say(&mut self, state: &mut State, why: &str) {
        let mut said: Vec<(usize, usize)> = Vec::new();
        for Move { device, from, to, .. } in &self.moves {
            let unit = device.unit();
            if said.contains(&(*from, unit)) {
                continue;
            }
            said.push((*from, unit));
            let was = state.parts[*from].strategy();
            state.parts[*from].came.retain(|came| came.unit != unit);
            let part = match to {
                To::Made(index) => &mut self.made[*index],
                To::There(place) => &mut state.parts[*place],
            };
            part.came.retain(|came| came.unit != unit);
            if let Some(was) = was.filter(|was| Some(*was) != part.strategy()) {
                part.came.push(Came { unit, device: device.label().to_owned(), was, why: why.to_owned() });
            }
        }
        let mut owners: Vec<usize> = Vec::new();
        for Stay { place, unit, explanation, for_others } in std::mem::take(&mut self.stays) {
            let part = &mut state.parts[place];
            if !owners.contains(&place) {
                owners.push(place);
                // The others may be gone.
                part.unit = unit;
                (part.explanation.device, part.explanation.rejected) = (explanation.device, explanation.rejected);
                continue;
            }
            // The same areas, for another unit: what that could have had.
            for rejected in explanation.rejected.iter().filter(|rejected| for_others.as_ref().is_some_and(|why| rejected.reasons.contains(why))) {
                if let Some(known) = part.explanation.rejected.iter_mut().find(|known| known.strategy == rejected.strategy) {
                    known.reasons.extend(for_others.iter().map(|why| format!("for device {}: {why}", explanation.device)));
                }
            }
        }
    }
}

/// The part that a user leaves, and the one where it goes.
fn both<'a>(state: &'a mut State, made: &'a mut [Part], from: usize, to: To) -> Option<(&'a mut Part, &'a mut Part)> {
    match to {
        To::Made(index) => Some((state.parts.get_mut(from)?, made.get_mut(index)?)),
        To::There(place) => state.parts.get_disjoint_mut([from, place]).ok().map(|[from, to]| (from, to)),
    }
}

impl Space {
    /// Moves all who go, and seats what was made; on an error nobody was moved, and nothing changed. Those who could not stay either are taken off.
    pub(super) fn carry_out(self: &Arc<Self>, state: &mut State, mut exchange: Exchange, dropped: &mut Dropped, why: &str) -> Result<Report, Error> {
        let Exchange { made, moves, moved, .. } = &mut exchange;
        for Move { device, pasid, from, to } in moves.iter() {
            let Some((from, to)) = both(state, made, *from, *to) else { continue };
            if let Err(error) = self.hand_over(from, to, device, *pasid) {
                self.put_back(state, &mut exchange);
                return Err(if state.take_off_lost(self, dropped) { Error::Detached(Box::new(error)) } else { error });
            }
            *moved += 1;
        }
        Ok(exchange.seat(state, why))
    }

    /// After an error: those who were moved go back. Who cannot be put back is nowhere.
    fn put_back(self: &Arc<Self>, state: &mut State, exchange: &mut Exchange) {
        let Exchange { made, moves, moved, .. } = exchange;
        for Move { device, pasid, from, to } in moves[..*moved].iter().rev() {
            let Some((from, to)) = both(state, made, *from, *to) else { continue };
            if self.hand_over(to, from, device, *pasid).is_ok() {
                continue;
            }
            if let Some(slot) = device.slots().get_mut(pasid).filter(|slot| Arc::ptr_eq(&slot.space, self)) {
                // Nobody looks after where it is.
                drop(to.release(device, *pasid));
                slot.held = Held::Nowhere;
            }
        }
        *moved = 0;
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
            Ok(()) => to.adopt(device, attachment, pasid).map_err(|(attachment, errno)| (attachment, refused(errno, device, pasid))),
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
                slot.held = if was_areas { from.adopt(device, attachment, pasid).unwrap_or(Held::Nowhere) } else { Held::Here(attachment) };
                Err(error)
            }
        }
    }
}
