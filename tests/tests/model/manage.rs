//! Operations that are not the tables' business: who is attached where, which memory there is, which host it is.

use stagecraft::ioasid::{Error, Restored, Saved};
use stagecraft::kernel::Pasid;
use stagecraft::plugin::Tag;

use crate::machine::{HOSTS, Hardware, Machine, There};
use crate::operation::{Operation, Telling};
use crate::session::{Outcomes, Session, View, Who};

/// PASIDs that are used: from 1 on.
pub const PASIDS: u32 = 3;
/// Address spaces at a time, at most.
const SPACES: usize = 4;

const fn pasid(number: u8) -> Option<u32> {
    if number == 0 { None } else { Some((number as u32 - 1) % PASIDS + 1) }
}

impl Session<'_> {
    pub fn manage(&mut self, operation: Operation) -> Result<bool, String> {
        let (spaces, devices) = (self.spaces.len(), self.devices.len());
        match operation {
            Operation::Switch { space, view } => self.switch(space as usize % spaces, view),
            Operation::Attach { device, pasid: number, space } => {
                let (who, space) = ((device as usize % devices, pasid(number)), space as usize % spaces);
                if self.attached.get(&who) == Some(&space) {
                    return Ok(false);
                }
                self.attach(who, space)?;
                Ok(true)
            }
            Operation::Detach { device, pasid: number } => {
                let who = (device as usize % devices, pasid(number));
                if self.attached.remove(&who).is_none() {
                    return Ok(false);
                }
                self.devices[who.0].detach(who.1.map(Pasid)).map_err(|error| format!("detach: {error}"))?;
                // The device may have got a better strategy.
                self.had.clear();
                Ok(true)
            }
            Operation::Memory { which } => self.memory(which).map(|()| true),
            Operation::Reconsider { space } => {
                let space = space as usize % spaces;
                let result = self.spaces[space].ioasid.reconsider();
                if let Err(Error::Refused(refusal)) = &result {
                    self.coverage.add(format!("better strategies refused: {:?}", refusal.property));
                    return Ok(false);
                }
                self.report(Some(space), result, "reconsider")?;
                self.had.clear();
                Ok(true)
            }
            Operation::Allocate { space } => {
                if spaces == SPACES {
                    return Ok(false);
                }
                let (view, tag) = (self.spaces[space as usize % spaces].view, self.spaces[space as usize % spaces].tag);
                let Some(space) = self.space(view, Tag { domain: tag.domain.map(|domain| domain + 4), space: tag.space })? else { return Ok(true) };
                self.spaces.push(space);
                Ok(true)
            }
            Operation::Drop { space } => self.drop_space(space as usize % spaces),
            Operation::Migrate { host, second } => self.migrate(host, second),
            Operation::Ask { device, place, write } => self.ask(device as usize % devices, place, write),
            Operation::Tell { space, telling, shuffle } => {
                let any = self.spaces.iter().any(|space| space.since + 1 < self.moments.len());
                match (space as usize).checked_sub(2).filter(|space| *space < spaces) {
                    Some(one) => self.tell(one, telling, shuffle)?,
                    None => (0..spaces).try_for_each(|space| self.tell(space, telling, shuffle))?,
                }
                self.coverage.add(format!("telling {telling:?} {}", if any { "something" } else { "nothing" }));
                Ok(any)
            }
            Operation::Edit(_) | Operation::Second(_) | Operation::Fail(_) => Ok(false),
        }
    }

    /// An error because of a property, or for want of room where it is scarce, is none.
    fn refuses(&self, error: &Error, what: &str) -> bool {
        match error {
            Error::Refused(refusal) => self.coverage.add(format!("{what} refused: {:?}", refusal.property)),
            Error::Kernel { .. } | Error::Build(_) if self.setup.scarce.is_some() => self.coverage.add(format!("no room: {what}")),
            _ => return false,
        }
        true
    }

    pub fn attach(&mut self, who: Who, space: usize) -> Outcomes {
        let (known, pasid) = (&self.devices[who.0], who.1.map(Pasid));
        let ioasid = &self.spaces[space].ioasid;
        let is_there = known.attached().iter().any(|(of, _)| *of == pasid);
        let result = if is_there { ioasid.replace(known, pasid) } else { ioasid.attach(known, pasid) };
        match result {
            Err(error) if self.refuses(&error, if self.has_pasids(who) { "PASIDs" } else { "attachments" }) => {}
            Err(error) => self.failed.push(format!("attach: {error}")),
            Ok(report) => {
                self.attached.insert(who, space);
                // What is made anew has room for other things, of who else had to make room as well.
                self.had.clear();
                self.report(Some(space), Ok(report), "attach")?;
                if who.1.is_some() {
                    self.coverage.add(format!("PASIDs on {}", self.hardware.hosts()[who.0]));
                }
            }
        }
        self.is_attached_or_waits()
    }

    /// It is a PASID, or has some.
    fn has_pasids(&self, (device, pasid): Who) -> bool {
        pasid.is_some() || self.attached.keys().any(|(other, pasid)| *other == device && pasid.is_some())
    }

    /// While something fails nobody can say more.
    fn is_attached_or_waits(&mut self) -> Outcomes {
        let was = self.is_broken;
        self.is_broken |= self.trap.is_some();
        let result = self.is_attached_as_expected();
        self.is_broken = was;
        result
    }

    fn switch(&mut self, space: usize, view: u8) -> Result<bool, String> {
        let roots = self.guest.roots();
        let view = match (view, &self.second) {
            (6, _) => View::Everything,
            (7.., _) => View::Nothing,
            (_, None) => View::Root(view as usize % roots),
            (0..3, Some(_)) => View::Behind(view as usize, 0),
            (3, Some(_)) => View::Behind(0, 1),
            (4, Some(_)) => View::Second(0),
            (_, Some(_)) => View::Root(1),
        };
        if self.spaces[space].view == view {
            return Ok(false);
        }
        self.tell(space, Telling::Ranges, 0)?;
        let described = self.view(view, self.spaces[space].tag);
        let result = self.spaces[space].ioasid.switch(described);
        match result {
            Err(error) if self.refuses(&error, "switches") => return Ok(false),
            // It is the one or the other.
            Err(error @ Error::Detached(_)) => {
                let before = std::mem::replace(&mut self.spaces[space].view, view);
                self.spaces[space].other = Some(before);
                self.failed.push(format!("switch: {error}"));
            }
            Err(error @ Error::Blocked(_)) => {
                self.spaces[space].view = view;
                self.failed.push(format!("switch: {error}"));
            }
            Err(error) => self.failed.push(format!("switch: {error}")),
            Ok(report) => {
                self.report(Some(space), Ok(report), "switch")?;
                self.coverage.add(format!("switch to {}", if view.root(0).or(view.root(1)).is_some() { "a root" } else { "no table" }));
                self.spaces[space].view = view;
            }
        }
        self.had.clear();
        self.is_attached_or_waits()?;
        Ok(true)
    }

    fn memory(&mut self, which: u8) -> Outcomes {
        // Whose tables are read again does not matter then.
        self.tell_all()?;
        let there = self.machine.there;
        self.had.clear();
        match which % 8 {
            0..3 => self.change_memory(There { slot: !there.slot, ..there }),
            3..6 => self.change_memory(There { blocks: there.blocks ^ (1 + (which >> 3) % 15), ..there }),
            _ => {
                self.change_memory(There { hole: false, ..there })?;
                self.coverage.add("memory with tables went".to_owned());
                if self.trap.is_none() {
                    self.compare().map_err(|error| format!("without a page with tables: {error}"))?;
                }
                self.change_memory(there)
            }
        }
    }

    fn change_memory(&mut self, there: There) -> Outcomes {
        let before = std::mem::replace(&mut self.machine.there, there);
        match self.context.memory_changed(self.machine.guest_memory()) {
            Ok(reports) => {
                for (id, report) in reports {
                    let space = self.spaces.iter().position(|space| space.ioasid.id() == id);
                    // What was blocked is told when it is there again, or was when it went.
                    let report = stagecraft::sync::Report { blocked_count: if before.hole { report.blocked_count } else { 0 }, ..report };
                    self.report(space, Ok(report), "memory")?;
                }
            }
            Err(error) => {
                self.memory_before = Some(before);
                self.failed.push(format!("memory: {error}"));
            }
        }
        Ok(())
    }

    fn drop_space(&mut self, space: usize) -> Result<bool, String> {
        if self.spaces.len() == 1 {
            return Ok(false);
        }
        let users: Vec<Who> = self.attached.iter().filter(|(_, of)| **of == space).map(|(who, _)| *who).collect();
        for who in users {
            self.attached.remove(&who);
            self.devices[who.0].detach(who.1.map(Pasid)).map_err(|error| format!("detach: {error}"))?;
        }
        drop(self.spaces.remove(space));
        self.attached.values_mut().filter(|of| **of > space).for_each(|of| *of -= 1);
        self.had.clear();
        self.forget_moments();
        Ok(true)
    }

    /// Writes down all that there is, and makes it again on another host.
    fn migrate(&mut self, host: u8, second: Option<u8>) -> Result<bool, String> {
        let units = (host as usize % HOSTS.len(), second.map(|host| host as usize % HOSTS.len()));
        let hardware = Hardware { units, ..self.hardware };
        let machine = Machine::new(hardware, self.machine.there);
        let text = serde_json::to_string(&self.context.save()).map_err(|error| error.to_string())?;
        let saved: Saved = serde_json::from_str(&text).map_err(|error| error.to_string())?;
        self.guest.moved(machine.memory.clone());
        self.second.iter_mut().for_each(|second| second.moved(machine.memory.clone()));
        if let Some(trap) = self.trap {
            trap.arm(&machine.sim);
        }
        match saved.restore(machine.setup(), |_, _| None) {
            Ok(Restored { context, devices, ioasids }) => {
                if context.save() != saved {
                    return Err("what was restored is not what was saved".to_owned());
                }
                let before = (std::mem::replace(&mut self.context, context), std::mem::replace(&mut self.devices, devices));
                for number in 0..self.spaces.len() {
                    let space = &mut self.spaces[number];
                    let ioasid = ioasids.iter().find(|ioasid| ioasid.id() == space.ioasid.id()).ok_or("an IOASID is not there any more")?.clone();
                    space.lookup = space.lookup.is_some().then(|| ioasid.lookup()).transpose().map_err(|error| error.to_string())?;
                    space.ioasid = ioasid;
                    // A limit may have been reached on the way.
                    space.is_short |= self.setup.scarce.is_some();
                    self.is_told(number);
                }
                drop(before);
                let old = std::mem::replace(&mut self.machine, machine);
                old.sim.disarm();
                old.is_clean().map_err(|error| format!("where it came from {error}"))?;
                self.hardware = hardware;
                self.had.clear();
                self.coverage.add("moved to another host".to_owned());
                self.is_attached_or_waits()?;
                Ok(true)
            }
            Err(error) => {
                let sprung = self.trap.is_some() && !machine.sim.disarm();
                self.machine.sim.disarm();
                machine.is_clean().map_err(|left| format!("after {error} {left}"))?;
                self.guest.moved(self.machine.memory.clone());
                self.second.iter_mut().for_each(|second| second.moved(self.machine.memory.clone()));
                if sprung {
                    self.trap = None;
                    self.coverage.add("failure in a move".to_owned());
                } else if !self.refuses(&error, "moves") {
                    return Err(format!("restore: {error}"));
                }
                Ok(false)
            }
        }
    }

    /// A device does DMA at a place, and its page request is served: from there on it has what the tables say now.
    fn ask(&mut self, device: usize, place: u16, write: bool) -> Result<bool, String> {
        let who = self.attached.keys().filter(|(number, _)| *number == device).nth(place as usize % 2).copied();
        let Some((who, space)) = who.and_then(|who| Some((who, *self.attached.get(&who)?))) else { return Ok(false) };
        let ioasid = self.spaces[space].ioasid.clone();
        if !ioasid.request().page_requests || self.touched.is_empty() {
            return Ok(false);
        }
        // Rather what it was not told of.
        let stale: Vec<(u64, u64)> = self.spaces[space].stale[0].iter().map(|stale| stale.iova).collect();
        let iova = if stale.is_empty() || place & 6 == 0 {
            let all: Vec<u64> = self.touched.iter().copied().collect();
            all[place as usize / 8 % all.len()]
        } else {
            let (first, last) = stale[place as usize / 8 % stale.len()];
            first + self.rng.below((last - first).saturating_add(1).max(1))
        };
        let sim = &self.machine.sim;
        sim.set_patience(1000);
        let mut failed = Vec::new();
        let mut served = 0_u64;
        let found = std::thread::scope(|scope| {
            let dma = scope.spawn(|| self.machine.dma(who, iova, write));
            while !dma.is_finished() {
                match ioasid.serve_faults() {
                    Ok(faults) => served += faults.len() as u64,
                    Err(error) => failed.push(format!("faults: {error}")),
                }
                std::thread::yield_now();
            }
            dma.join()
        });
        sim.set_patience(0);
        self.failed.extend(failed);
        let found = found.map_err(|_| "the thread of DMA panicked")?;
        self.coverage.add_many("page requests served".to_owned(), served);
        if self.failed.is_empty() {
            self.is_served(who, space, iova, write, found)?;
        }
        Ok(served > 0)
    }
}
