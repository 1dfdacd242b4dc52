//! What devices, lookups and the library's own walk find, beside what the reference finds.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use stagecraft::Access;
use stagecraft::Iova;
use stagecraft::ioasid::{Device, Ioasid, Strategy};
use stagecraft::kernel::Pasid;
use stagecraft::plugin::TableConfig;
use stagecraft_tests::reference::snapshot::Memory;
use stagecraft_tests::reference::tables;
use stagecraft_tests::reference::walk::Walker;

use crate::configs;
use crate::machine::{HOLE, HOLE_BYTES};
use crate::manage::PASIDS;
use crate::session::{Outcomes, Session, Space, View, Who};

/// So many IOVAs that were touched are looked at each time, at most.
const LOOKED_AT: usize = 120;

/// Why a device has less than the guest says.
pub const KEPT: &str = "kept by the unit, or outside of what it can translate";

/// Where the host's side of a device may have less than the guest says.
#[derive(Clone, Debug)]
pub struct Limits {
    pub strategy: Strategy,
    /// The host table's own IOVAs.
    regions: Option<Vec<tables::Region>>,
}

/// By view and moment; none for views without tables.
type Walkers<'a> = BTreeMap<(View, usize), Option<Walker<'a>>>;

impl Session<'_> {
    /// Where an access goes by the guest's tables at some moment.
    fn says(&self, walkers: &Walkers<'_>, view: View, moment: usize, iova: u64, write: bool) -> Option<u64> {
        let address = match view {
            View::Everything => iova,
            View::Nothing => return None,
            _ => walkers[&(view, moment)].as_ref()?.translate(iova, write).ok()?,
        };
        let there = self.machine.there.has(address) || self.memory_before.is_some_and(|before| before.has(address));
        there.then_some(address)
    }

    /// An IOVA has something that the first table does not look at.
    fn is_tagged(&self, view: View, iova: u64) -> bool {
        self.stages(view).first().is_some_and(|config| config.effective(iova) != iova)
    }

    /// All that is looked at now.
    fn samples(&mut self) -> Vec<u64> {
        let mut samples: BTreeSet<u64> = self.recent.iter().copied().take(48).collect();
        let most = LOOKED_AT.min(self.touched.len());
        if self.touched.len() <= LOOKED_AT {
            samples.extend(&self.touched);
        } else {
            let all: Vec<u64> = self.touched.iter().copied().collect();
            samples.extend((0..most).map(|_| self.rng.pick(&all)));
        }
        for window in self.guest.windows().to_vec() {
            samples.extend([window.first, window.last, window.first.wrapping_sub(1), window.last.wrapping_add(1)]);
            samples.extend((0..3).map(|_| window.first + self.rng.below((window.last - window.first).saturating_add(1).max(1))));
        }
        samples.extend([0, u64::MAX, self.rng.number(), self.rng.below(1 << 40)]);
        samples.into_iter().collect()
    }

    /// Every device, every PASID, every lookup and the library's own walk: each is what the reference finds, at some moment since its last synchronisation point.
    pub fn compare(&mut self) -> Outcomes {
        let samples = self.samples();
        let without_hole = !self.machine.there.hole && self.memory_before.is_none();
        let moments: Vec<Cow<'_, Memory>> = (self.moments.iter())
            .map(|memory| {
                if !without_hole {
                    return Cow::Borrowed(memory);
                }
                let mut memory = memory.clone();
                memory.pages.retain(|page, _| !(HOLE..HOLE + HOLE_BYTES).contains(page));
                Cow::Owned(memory)
            })
            .collect();
        let views: BTreeSet<View> = self.spaces.iter().flat_map(|space| [Some(space.view), space.other]).flatten().collect();
        let stages: BTreeMap<View, Vec<tables::TableConfig>> = views.into_iter().map(|view| (view, self.stages(view))).collect();
        let mut walkers = Walkers::new();
        for (view, stages) in &stages {
            for (moment, memory) in moments.iter().enumerate() {
                let walker = if stages.is_empty() { None } else { Some(Walker::new(memory, stages).map_err(|problem| problem.to_string())?) };
                walkers.insert((*view, moment), walker);
            }
        }
        let (mut counts, mut had) = (Counts::default(), BTreeMap::new());
        for (number, space) in self.spaces.iter().enumerate() {
            self.compare_space(number, space, &samples, &walkers, &mut counts, &mut had)?;
        }
        for device in 0..self.devices.len() {
            for pasid in [None].into_iter().chain((1..=PASIDS).map(Some)).filter(|pasid| !self.attached.contains_key(&(device, *pasid))) {
                let found = samples.iter().step_by(4).find_map(|iova| Some((iova, self.machine.dma((device, pasid), *iova, false)?)));
                if let Some((iova, found)) = found {
                    return Err(format!("{:?}, which is attached to nothing, at {iova:#x}: {found:#x}", (device, pasid)));
                }
            }
        }
        if self.setup.scarce.is_some() {
            self.had = had;
            self.told.clear();
        }
        self.coverage.add_many("compared".to_owned(), counts.compared);
        self.coverage.add_many("compared after a failure".to_owned(), counts.after_failures);
        self.coverage.add_many("for want of room".to_owned(), counts.short);
        counts.lost.into_iter().for_each(|(why, count)| self.coverage.add_many(format!("less: {why}"), count));
        Ok(())
    }

    fn compare_space(
        &self,
        number: usize,
        space: &Space,
        samples: &[u64],
        walkers: &Walkers<'_>,
        counts: &mut Counts,
        had: &mut BTreeMap<(Who, u64, bool), u64>,
    ) -> Outcomes {
        let now = self.moments.len() - 1;
        if space.changed == [true; 2] && matches!(space.view, View::Behind(..)) {
            // One stage as it was with the other as it is.
            self.coverage.add("not compared: both stages changed".to_owned());
            return Ok(());
        }
        let attached: Vec<Who> = self.attached.iter().filter(|(_, of)| **of == number).map(|(who, _)| *who).collect();
        // Who waits for the kernel has nothing that limits anything.
        let limits_of = |who: &Who| if self.is_broken { Ok(None) } else { limits(&space.ioasid, &self.devices[who.0], who.1).map(Some) };
        let limits = attached.iter().map(limits_of).collect::<Result<Vec<_>, _>>()?;
        for (who, limits) in attached.iter().zip(&limits) {
            if let Some(limits) = limits {
                let stages = if matches!(space.view, View::Behind(..)) { " of two stages" } else { "" };
                self.coverage.add(format!("{}{stages} on {}", limits.strategy, self.hardware.hosts()[who.0]));
            }
        }
        let (since, views) = (space.since, [Some(space.view), space.other]);
        for (index, iova) in samples.iter().copied().enumerate() {
            for write in [false, true] {
                let at = |view: View, moment: usize| self.says(walkers, view, moment, iova, write);
                let may: Vec<Option<u64>> = views.into_iter().flatten().flat_map(|view| (since..=now).map(move |moment| at(view, moment))).collect();
                let wrong = |who: &str, found: Option<u64>| {
                    let verb = if write { "writes" } else { "reads" };
                    Err(format!("{who} at {iova:#x} {verb}: {found:x?} and not {may:x?} ({})", when(since, now)))
                };
                for (who, limits) in attached.iter().zip(&limits) {
                    let found = self.machine.dma(*who, iova, write);
                    had.extend(found.map(|found| ((*who, iova, write), found)));
                    if may.contains(&found) {
                        counts.add(self.is_broken);
                        continue;
                    }
                    if found.is_none() && self.is_broken {
                        counts.add(true);
                        continue;
                    }
                    let lossy = limits.as_ref().filter(|_| found.is_none()).and_then(|limits| {
                        let mut moments = since..=now;
                        moments.find_map(|moment| {
                            let says = |iova: u64, write: bool| self.says(walkers, space.view, moment, iova, write);
                            loss((&self.devices, who.0), limits, iova, &says, self.is_tagged(space.view, iova))
                        })
                    });
                    let is_nested = limits.as_ref().is_some_and(|limits| limits.strategy == Strategy::Nested);
                    match lossy {
                        Some(why) => *counts.lost.entry(why).or_default() += 1,
                        None if found.is_none() && self.is_short(space) => {
                            self.is_as_before(*who, (iova, write), &may)?;
                            counts.short += 1;
                            continue;
                        }
                        None => {
                            let chosen: Vec<String> = space.ioasid.explain().iter().map(ToString::to_string).collect();
                            return wrong(&format!("{who:?} of {attached:?} ({chosen:?})"), found);
                        }
                    }
                    // What a unit keeps it keeps, whatever the host's table says.
                    if is_nested && lossy != Some(KEPT) && space.ioasid.stats().refused_bytes == 0 && !self.is_short(space) {
                        return Err(format!("{who:?} at {iova:#x} has less, and no loss was counted"));
                    }
                }
                let access = Access { read: !write, write };
                if let Some(lookup) = &space.lookup {
                    let target =
                        lookup.find(Iova(iova)).filter(|target| target.attributes.access(false).allows(access)).map(|target| target.address.0);
                    let is_less = target.is_none() && (self.is_broken || self.is_short(space) || self.is_tagged(space.view, iova));
                    if !may.contains(&target) && !is_less {
                        return wrong("a lookup", target);
                    }
                    counts.add(self.is_broken);
                }
                if index % 8 == 0 && self.memory_before.is_none() {
                    let walked = space.ioasid.translate(Iova(iova), access).map_err(|error| error.to_string())?;
                    let walked = walked.ok().map(|translation| translation.address.0);
                    if !views.into_iter().flatten().any(|view| walked == at(view, now)) {
                        return wrong("the library's own walk of now", walked);
                    }
                    counts.add(self.is_broken);
                }
            }
        }
        Ok(())
    }

    /// Something had no room. What was blocked in a call that failed is not told.
    pub fn is_short(&self, space: &Space) -> bool {
        let some = || {
            let stats = space.ioasid.stats();
            stats.without_memory > 0 || stats.blocked_entries > 0
        };
        self.setup.scarce.is_some() && (space.is_short || some())
    }

    /// What was there before, and is still to be there, does not go for want of room.
    fn is_as_before(&self, who: Who, (iova, write): (u64, bool), may: &[Option<u64>]) -> Outcomes {
        let before = self.had.get(&(who, iova, write)).copied();
        let was_told = self.told.iter().any(|(first, last)| (*first..=*last).contains(&iova));
        let is_same = before.is_some() && may.iter().all(|may| *may == before);
        if is_same && !was_told { Err(format!("{who:?} at {iova:#x} had {before:x?}, and nobody has touched that")) } else { Ok(()) }
    }

    /// What a device found that asked for its page.
    pub fn is_served(&self, who: Who, number: usize, iova: u64, write: bool, found: Option<u64>) -> Outcomes {
        let space = &self.spaces[number];
        let now = self.moments.len() - 1;
        let stages = self.stages(space.view);
        let mut walkers = Walkers::new();
        for moment in space.since..=now {
            let walker =
                if stages.is_empty() { None } else { Some(Walker::new(&self.moments[moment], &stages).map_err(|problem| problem.to_string())?) };
            walkers.insert((space.view, moment), walker);
        }
        let at = |moment: usize| self.says(&walkers, space.view, moment, iova, write);
        let says = |iova: u64, write: bool| self.says(&walkers, space.view, now, iova, write);
        let is_less = found.is_none()
            && (self.is_short(space)
                || loss((&self.devices, who.0), &limits(&space.ioasid, &self.devices[who.0], who.1)?, iova, &says, self.is_tagged(space.view, iova))
                    .is_some());
        // What it had before it asked may be old; what it was given is not.
        let may: Vec<Option<u64>> = (space.since..=now).map(at).collect();
        let is_right = if found.is_some() { may.contains(&found) } else { at(now).is_none() || is_less || space.changed == [true; 2] };
        if is_right { Ok(()) } else { Err(format!("{who:?} asked for {iova:#x}, and has {found:x?} and not {may:x?}")) }
    }
}

/// Where a device, or a PASID of it, that is attached to an IOASID may have less than the guest says.
pub fn limits(ioasid: &Ioasid, device: &Device, pasid: Option<u32>) -> Result<Limits, String> {
    let explanation = ioasid.explain_for(device, pasid.map(Pasid)).map_err(|error| error.to_string())?;
    let chosen = explanation.chosen.as_ref().ok_or_else(|| format!("an attached device has no strategy: {explanation}"))?;
    let regions = if chosen.strategy == Strategy::Nested {
        let host = parse(&chosen.what);
        let host = configs::reference_config(&host).ok_or_else(|| format!("the reference does not know {}", chosen.what))?;
        Some(host.regions().map_err(|problem| problem.to_string())?)
    } else {
        None
    };
    Ok(Limits { strategy: chosen.strategy, regions })
}

/// Why one of `devices` may get less there than `says` has, if it may.
pub fn loss(
    (devices, device): (&[Device], usize),
    limits: &Limits,
    iova: u64,
    says: &dyn Fn(u64, bool) -> Option<u64>,
    is_tagged: bool,
) -> Option<&'static str> {
    let capabilities = devices[device].capabilities();
    // The ends of the page are what tells a whole one from a part.
    let of_table = limits.regions.iter().flatten().filter_map(|region| region.steps.last()).map(|step| 1 << step.shift).max();
    let page = of_table.unwrap_or_else(|| capabilities.iova.alignment.max(4096));
    let (first, last) = (iova & !(page - 1), iova | (page - 1));
    let usable = |device: &Device| device.capabilities().iova.ranges.iter().any(|range| range.contains(iova));
    if !usable(&devices[device]) {
        return Some(KEPT);
    }
    if limits.strategy == Strategy::Native {
        return None;
    }
    // Areas are for all devices: no area can be where one of them has none.
    if limits.strategy == Strategy::Areas && !devices.iter().all(usable) {
        return Some("outside of what another device can use");
    }
    if let Some(regions) = &limits.regions {
        let has = |region: &tables::Region| iova >= region.first && region.contains(iova - region.first);
        if !regions.iter().any(has) {
            return Some("outside of the host's table");
        }
    }
    if is_tagged {
        return Some("with a tag in the top byte");
    }
    for write in [false, true] {
        let here = says(iova, write);
        let ends = [first, last].map(|end| here.map(|here| here.wrapping_sub(iova).wrapping_add(end)) == says(end, write));
        if ends != [true; 2] {
            return Some("a part of a page");
        }
    }
    // A host table may have no page that can only be written.
    (limits.regions.is_some() && says(iova, false).is_none()).then_some("only written")
}

#[derive(Default)]
struct Counts {
    compared: u64,
    after_failures: u64,
    short: u64,
    lost: BTreeMap<&'static str, u64>,
}

impl Counts {
    fn add(&mut self, is_broken: bool) {
        if is_broken { self.after_failures += 1 } else { self.compared += 1 }
    }
}

pub fn when(since: usize, now: usize) -> String {
    if since == now { "after a synchronisation point".to_owned() } else { format!("{} moments since the last synchronisation point", now - since) }
}

/// A table's format and settings as an explanation says them.
fn parse(what: &str) -> TableConfig {
    let mut words = what.split(' ');
    let format = words.next().unwrap_or_default();
    let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap();
    let settings: Vec<(&str, u64)> = words.filter_map(|word| word.split_once('=')).map(|(name, value)| (name, number(value))).collect();
    TableConfig::new(format, &settings)
}
