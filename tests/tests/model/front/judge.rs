//! What devices get, beside what the reference finds in structures and tables.

use std::collections::BTreeSet;

use stagecraft::viommu::StreamState;
use stagecraft_tests::reference::Problem;
use stagecraft_tests::reference::detect::{self, Resolution};
use stagecraft_tests::reference::tables::TableConfig;
use stagecraft_tests::reference::walk::Walker;

use super::structures::id;
use super::{Front, requester};
use crate::compare::{KEPT, Limits, limits, loss, when};
use crate::guest::Guest;
use crate::session::Outcomes;

/// What a requester gets at a moment.
enum Gets<'a> {
    Nothing,
    Everything,
    Tables(Box<Walker<'a>>),
}

impl Front<'_> {
    pub(super) fn samples(&mut self) -> Vec<u64> {
        let mut samples: BTreeSet<u64> = self.recent.iter().copied().take(32).collect();
        let all: Vec<u64> = self.touched.iter().copied().collect();
        samples.extend((0..60.min(all.len())).map(|_| self.rng.pick(&all)));
        for window in self.guests.iter().flatten().flat_map(Guest::windows) {
            samples.extend([window.first, window.last, window.last.wrapping_add(1)]);
        }
        samples.extend([0, u64::MAX, self.rng.below(1 << 40)]);
        // What has an upper half with a PASID has none without.
        let whole: Vec<u64> = samples.iter().filter(|iova| **iova >> 47 == 0x1_ffff).map(|iova| iova & 0xffff_ffff_ffff).collect();
        samples.extend(whole);
        // Interrupts are nobody's DMA.
        samples.into_iter().filter(|iova| iova >> 20 != 0xfee).collect()
    }

    /// The first moment that a requester's DMA may go by.
    pub(super) fn since(&self, device: usize, pasid: Option<u32>) -> usize {
        let roots = self.structures.settings[device].roots(pasid);
        let of_roots = (0..2).filter_map(|stage| Some(self.roots[stage][roots[stage]?].since));
        of_roots.chain([self.since[device]]).min().unwrap_or(0)
    }

    /// Both stages changed: one of them may be as it was with the other as it is.
    fn is_mixed(&self, device: usize, pasid: Option<u32>) -> bool {
        let roots = self.structures.settings[device].roots(pasid);
        (0..2).all(|stage| roots[stage].is_some_and(|root| self.roots[stage][root].changed))
    }

    fn gets(&self, moment: usize, device: usize, pasid: Option<u32>) -> Result<Gets<'_>, String> {
        let snapshot = &self.moments[moment];
        match detect::resolve_pasid(snapshot, id(device), pasid.map(u64::from)) {
            Ok(Resolution::Bypass) => Ok(Gets::Everything),
            Ok(Resolution::Blocked(_)) | Err(Problem::Unreadable(_)) => Ok(Gets::Nothing),
            Ok(Resolution::Tables(stages)) => {
                let stages: Vec<TableConfig> = stages;
                Ok(Gets::Tables(Box::new(Walker::new(&snapshot.memory, &stages).map_err(|problem| problem.to_string())?)))
            }
            other => Err(format!("{:?}: {other:?}", requester(device, pasid))),
        }
    }

    /// Where an access goes.
    fn says(&self, gets: &Gets<'_>, iova: u64, write: bool) -> Option<u64> {
        let address = match gets {
            Gets::Nothing => return None,
            Gets::Everything => iova,
            Gets::Tables(walker) => walker.translate(iova, write).ok()?,
        };
        let there = self.machine.there.has(address) || self.memory_before.is_some_and(|before| before.has(address));
        there.then_some(address)
    }

    pub(super) fn compare(&mut self) -> Outcomes {
        let samples = self.samples();
        let mut compared = 0;
        for device in 0..self.devices.len() {
            for pasid in self.structures.requesters() {
                compared += self.compare_one((device, pasid), &samples)?;
            }
        }
        self.coverage.add_many("vIOMMU: compared".to_owned(), compared);
        self.compare_events(&samples)
    }

    fn compare_one(&self, (device, pasid): (usize, Option<u32>), samples: &[u64]) -> Result<u64, String> {
        if self.is_mixed(device, pasid) {
            self.coverage.add("vIOMMU: not compared: both stages changed".to_owned());
            return Ok(0);
        }
        let (since, now) = (self.since(device, pasid), self.moments.len() - 1);
        let mut gets = (since..=now).map(|moment| self.gets(moment, device, pasid)).collect::<Result<Vec<_>, _>>()?;
        let state = self.viommu.stream(requester(device, pasid));
        let host = self.hardware.hosts()[device];
        if let Some(StreamState::Refused(reason)) = state
            && !self.is_broken
        {
            // Areas for two units can lie where one of them must not translate: it has nothing then.
            self.coverage.add(format!("vIOMMU: refused on {host}: {}", reason.chars().take(400).collect::<String>()));
            gets = vec![Gets::Nothing];
        }
        if !self.is_connected[device] {
            gets = vec![Gets::Nothing];
        }
        let is_settled = gets.len() == 1 && !self.is_broken;
        let ioasid = self.ioasid(device, pasid).filter(|_| !self.is_broken);
        let has_something = !matches!(gets.last(), Some(Gets::Nothing) | None);
        if ioasid.is_none() && has_something && is_settled {
            return Err(format!("device {device} {pasid:?} has {state:?}"));
        }
        let limits = ioasid.map(|ioasid| limits(ioasid, &self.devices[device], pasid)).transpose()?;
        if let (Some(limits), Some(Gets::Tables(_))) = (&limits, gets.last()) {
            self.tell_coverage((device, pasid), limits, host);
        }
        // Few requesters have anything: those without are asked less.
        let step = if has_something { 1 } else { 4 };
        let mut compared = 0;
        for iova in samples.iter().copied().step_by(step) {
            for write in [false, true] {
                let found = self.machine.dma((device, pasid), iova, write);
                let may: Vec<Option<u64>> = gets.iter().map(|gets| self.says(gets, iova, write)).collect();
                compared += 1;
                if may.contains(&found) || found.is_none() && self.is_broken {
                    continue;
                }
                let lost = limits.as_ref().filter(|_| found.is_none()).and_then(|limits| {
                    let says = |gets| loss((&self.devices, device), limits, iova, &|iova, write| self.says(gets, iova, write), false);
                    gets.iter().find_map(says)
                });
                match lost {
                    Some(KEPT) => {}
                    Some(why) => self.coverage.add(format!("vIOMMU: less: {why}")),
                    None => {
                        let verb = if write { "writes" } else { "reads" };
                        let setting = &self.structures.settings[device];
                        return Err(format!(
                            "device {device} {pasid:?} ({setting:?}, {state:?}, {limits:?}) {verb} at {iova:#x}: {found:x?} and not {may:x?} ({})",
                            when(since, now)
                        ));
                    }
                }
            }
        }
        Ok(compared)
    }

    fn tell_coverage(&self, (device, pasid): (usize, Option<u32>), limits: &Limits, host: &str) {
        let roots = self.structures.settings[device].roots(pasid);
        let stages = match roots.map(|root| root.is_some()) {
            [true, true] => " of two stages",
            [false, true] => " of a second stage",
            _ => "",
        };
        let who = if pasid.is_some() { " for a PASID" } else { "" };
        self.coverage.add(format!("vIOMMU: {}{stages}{who} on {host}", limits.strategy));
        if pasid.is_some() {
            self.coverage.add(format!("vIOMMU: {:?}{stages} with PASID", self.structures.arch));
        } else if !stages.is_empty() {
            self.coverage.add(format!("vIOMMU: {:?}{stages}", self.structures.arch));
        }
    }

    /// What a device found that asked for a page.
    pub(super) fn is_served(&self, (device, pasid): (usize, Option<u32>), (iova, write): (u64, bool), found: Option<u64>) -> Outcomes {
        if self.is_mixed(device, pasid) {
            return Ok(());
        }
        let (since, now) = (self.since(device, pasid), self.moments.len() - 1);
        let gets = (since..=now).map(|moment| self.gets(moment, device, pasid)).collect::<Result<Vec<_>, _>>()?;
        let may: Vec<Option<u64>> = gets.iter().map(|gets| self.says(gets, iova, write)).collect();
        let Some(latest) = gets.last() else { return Ok(()) };
        let is_right = match found {
            // What it had before it asked may be old; what it was given is not.
            Some(_) => may.contains(&found),
            None if self.says(latest, iova, write).is_none() => true,
            None => match self.ioasid(device, pasid) {
                None => true,
                Some(ioasid) => {
                    let limits = limits(ioasid, &self.devices[device], pasid)?;
                    loss((&self.devices, device), &limits, iova, &|iova, write| self.says(latest, iova, write), false).is_some()
                }
            },
        };
        if is_right { Ok(()) } else { Err(format!("device {device} {pasid:?} asked for {iova:#x}, and has {found:x?} and not {may:x?}")) }
    }
}
