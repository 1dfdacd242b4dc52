//! A guest that sets its devices up in another way: stages, contexts of PASIDs, and where these are.

use stagecraft_tests::reference::detect;
use stagecraft_tests::reference::generate::Rng;

use super::structures::{Context, Name, Setting, Stages, id};
use super::{Extent, Front, snapshot};
use crate::guests::Arch;
use crate::operation::Operation;
use crate::session::Outcomes;

/// A requester, what caches know it by, and which stages it has.
type Known = (Option<u32>, Name, [bool; 2]);

impl Front<'_> {
    pub(super) fn rearrange(&mut self, operation: Operation) -> Result<bool, String> {
        let devices = self.devices.len();
        let has_pasids = self.structures.pasids;
        match operation {
            Operation::Switch { space, view } => {
                let device = space as usize % devices;
                self.switch(device, view)
            }
            Operation::Attach { device, pasid, space } => {
                let device = device as usize % devices;
                let may_skip = self.structures.may_skip() && space % 5 == 4;
                let context = if may_skip { Context::Skip } else { Context::Root(space as usize % super::ROOTS) };
                if !self.is_connected[device] {
                    self.tell_all()?;
                    self.is_connected[device] = true;
                    let handled = self.viommu.connect(id(device), has_pasids);
                    self.handled(&handled)?;
                    return Ok(true);
                }
                if pasid == 0 || has_pasids { self.set_context(device, pasid, Some(context)) } else { Ok(false) }
            }
            Operation::Detach { device, pasid } => {
                let device = device as usize % devices;
                if pasid == 0 || !has_pasids {
                    if std::mem::replace(&mut self.is_connected[device], false) {
                        let handled = self.viommu.disconnect(id(device));
                        self.handled(&handled)?;
                    }
                    return Ok(true);
                }
                self.set_context(device, pasid, None)
            }
            Operation::Reconsider { space } | Operation::Migrate { host: space, .. } => {
                let device = space as usize % devices;
                let setting = self.structures.settings[device].clone();
                if !setting.stages.has_first() || !has_pasids {
                    return Ok(false);
                }
                self.coverage.add("vIOMMU: structures moved".to_owned());
                self.set(device, setting, (true, None), None)?;
                Ok(true)
            }
            // Requests without PASID have a first stage, or have not.
            Operation::Allocate { space } => {
                let device = space as usize % devices;
                let mut setting = self.structures.settings[device].clone();
                if !setting.stages.has_first() || !has_pasids {
                    return Ok(false);
                }
                if self.structures.arch == Arch::Vtd {
                    return self.set_context(device, 0, Some(Context::Skip));
                }
                setting.own = !setting.own;
                self.coverage.add("vIOMMU: requests without PASID go otherwise".to_owned());
                self.set(device, setting, (false, None), None)?;
                Ok(true)
            }
            // A device's own context goes.
            Operation::Drop { space } if has_pasids => self.set_context(space as usize % devices, 0, None),
            _ => Ok(false),
        }
    }

    /// Other stages.
    fn switch(&mut self, device: usize, view: u8) -> Result<bool, String> {
        let mut setting = self.structures.settings[device].clone();
        let view_of = usize::from(view);
        setting.stages = match (view, &self.guests) {
            (6, _) => Stages::Everything,
            (7.., _) => Stages::Nothing,
            (0..3, [Some(_), Some(_)]) => Stages::Both(view_of % 2),
            (3, [Some(_), Some(_)]) => Stages::Second(0),
            (_, [Some(_), _]) => Stages::First,
            (_, [None, _]) => Stages::Second(view_of % super::ROOTS),
        };
        if !self.structures.pasids && setting.stages.has_first() {
            // One context, and another one with it.
            setting.contexts.insert(0, Context::Root(view_of % super::ROOTS));
        }
        if setting == self.structures.settings[device] {
            return Ok(false);
        }
        let name = match setting.stages {
            Stages::Nothing => "nothing",
            Stages::Everything => "everything",
            Stages::First => "the first stage",
            Stages::Second(_) => "the second stage",
            Stages::Both(_) => "both stages",
        };
        self.coverage.add(format!("vIOMMU: switch to {name}"));
        let moved = self.rng.percent(30);
        self.set(device, setting, (moved, None), None)?;
        Ok(true)
    }

    /// Another context of a device: by a number of its PASID, 0 for requests without.
    fn set_context(&mut self, device: usize, number: u8, context: Option<Context>) -> Result<bool, String> {
        let pasid = match number {
            0 => 0,
            number => self.structures.pasids()[(number as usize - 1) % 3],
        };
        let mut setting = self.structures.settings[device].clone();
        let before = setting.contexts.get(&pasid).copied();
        if before == context || !setting.stages.has_first() || !self.structures.pasids && context.is_none() {
            return Ok(false);
        }
        match context {
            Some(context) => setting.contexts.insert(pasid, context),
            None => setting.contexts.remove(&pasid),
        };
        let what = match (before, context) {
            (None, _) => "added",
            (_, None) => "cleared",
            _ => "changed",
        };
        self.coverage.add(format!("vIOMMU: context {what}"));
        self.set(device, setting, (false, Some(pasid)), before)?;
        Ok(true)
    }

    /// What a device's requests are known by.
    fn names(&self, device: usize) -> Vec<Known> {
        let requesters = self.structures.requesters().into_iter();
        let setting = &self.structures.settings[device];
        let known = requesters.map(|pasid| (pasid, self.structures.name_for(device, pasid), setting.roots(pasid).map(|root| root.is_some())));
        known.filter(|(.., has)| has.iter().any(|has| *has)).collect()
    }

    /// Writes structures, has their caches forget what changed, and then what was translated by it. `context` is the one that changed alone.
    fn set(&mut self, device: usize, setting: Setting, (moved, context): (bool, Option<u32>), before: Option<Context>) -> Outcomes {
        self.tell_all()?;
        let names = self.names(device);
        let old_name = context.filter(|_| before.is_some()).map(|pasid| self.own_name(device, pasid));
        self.structures.set(device, setting, moved);
        let is_watched = self.structures_written(device)?;
        if self.rng.percent(50) {
            self.compare().map_err(|error| format!("before the caches forget: {error}"))?;
        }
        let number = self.rng.number();
        // What was not valid is in no cache, and whoever watches has seen it.
        if is_watched && context.is_some() && before.is_none() && number.is_multiple_of(2) {
            self.coverage.add("vIOMMU: command left out".to_owned());
        } else {
            // What was there is known by its own numbers; what was not, by the new ones.
            let context = context.map(|pasid| (pasid, old_name.unwrap_or_else(|| self.own_name(device, pasid))));
            let commands = self.forget_setting(device, &names, context, number >> 8);
            self.batches(&commands, &mut Rng::new(number))?;
        }
        self.since[device] = self.moments.len() - 1;
        self.structures.settled();
        let written = self.structures.take_written();
        if let (Some(last), false) = (self.moments.last_mut(), written.is_empty()) {
            // Pages that hold nothing any more are written, and lead nowhere.
            *last = snapshot(&self.structures, &self.guests);
            self.report(&written)?;
        }
        self.forget_moments();
        Ok(())
    }

    /// What caches know a context by.
    fn own_name(&self, device: usize, pasid: u32) -> Name {
        self.structures.name_for(device, Some(pasid).filter(|pasid| *pasid != 0))
    }

    /// Structures of a device are at a new moment, which its DMA may see from now on; whether that was told.
    fn structures_written(&mut self, device: usize) -> Result<bool, String> {
        let written = self.structures.take_written();
        let last = self.moments.len() - 1;
        self.moments.push(snapshot(&self.structures, &self.guests));
        // Tables stay as they are, and so do others' structures.
        self.roots.iter_mut().flatten().for_each(|root| root.since += 1);
        self.since.iter_mut().for_each(|since| *since += 1);
        self.since[device] = last;
        let is_watched = self.report(&written)?;
        if is_watched {
            self.since[device] += 1;
        }
        Ok(is_watched)
    }

    /// Commands for structures that were written, of one context by its name or of the device, and for what was translated by them.
    fn forget_setting(&self, device: usize, names: &[Known], context: Option<(u32, Name)>, number: u64) -> Vec<Vec<u8>> {
        let structures = match context.filter(|_| self.structures.pasids) {
            Some((pasid, name)) => vec![self.structures.forget_context(device, pasid, name, number)],
            None => {
                let mut domains: Vec<u64> = names.iter().map(|(_, (domain, _), _)| *domain).collect();
                domains.dedup();
                self.structures.forget_device(device, &domains, number)
            }
        };
        let is_meant = |pasid: &Option<u32>| context.is_none_or(|(context, _)| pasid.unwrap_or(0) == context);
        let translations = names.iter().filter(|(pasid, ..)| is_meant(pasid)).flat_map(|(_, name, [first, second])| match (first, second) {
            (true, second) => vec![self.structures.forget_first(*name, *second, Extent::All)],
            (false, _) => self.structures.forget_second(name.0, false, Extent::All),
        });
        structures.into_iter().chain(translations).collect()
    }

    /// Whether structures of a device say something else than they did at a moment, because the second stage puts something else there.
    pub(super) fn leads_elsewhere(&self, device: usize, moment: usize) -> bool {
        let now = self.moments.len() - 1;
        if !matches!(self.structures.settings[device].stages, Stages::Both(_)) {
            return false;
        }
        let says = |moment: usize, pasid: Option<u32>| detect::resolve_pasid(&self.moments[moment], id(device), pasid.map(u64::from)).ok();
        self.structures.requesters().into_iter().any(|pasid| says(moment, pasid) != says(now, pasid))
    }
}
