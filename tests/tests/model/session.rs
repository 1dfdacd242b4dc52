//! A guest on a host, through operations; DMA is compared with what the reference reads in the guest's tables.

use std::collections::{BTreeMap, BTreeSet};

use stagecraft::ioasid::{Context, Device, Error, GuestView, Ioasid, Request, SpaceLimits, Strategy};
use stagecraft::lookup::Lookup;
use stagecraft::plugin::queue::{Effect, Invalidation, Scope};
use stagecraft::plugin::{BlockKind, Blocked, Outcome, TableConfig, Tag, Translated};
use stagecraft::sync::Report;
use stagecraft::{Access, Gpa, Iova, Span};
use stagecraft_tests::reference::generate::{Format, Rng, random_config};
use stagecraft_tests::reference::snapshot::Memory;
use stagecraft_tests::reference::tables;
use stagecraft_tests::reference::walk::Walker;

use crate::configs;
use crate::coverage::Coverage;
use crate::guest::{Guest, Stale};
use crate::machine::{HOSTS, Hardware, Machine, label};
use crate::operation::{How, Operation, Setup, Telling};

/// Sets of roots.
const ROOTS: usize = 3;
/// So many IOVAs that were touched are looked at each time, at most.
const LOOKED_AT: usize = 160;

/// Why a device has less than the guest says.
const KEPT: &str = "kept by the unit, or outside of what it can translate";

/// What a requester gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum View {
    Root(usize),
    Everything,
    Nothing,
}

struct Space {
    ioasid: Ioasid,
    lookup: Option<Lookup>,
    view: View,
    tag: Tag,
    stale: Vec<Stale>,
    written: Vec<(u64, u64)>,
    /// The first of the moments that its DMA may still see.
    since: usize,
}

/// Where the host's side of a device may have less than the guest says.
#[derive(Clone, Debug)]
struct Limits {
    strategy: Strategy,
    /// The host table's own IOVAs.
    regions: Option<Vec<tables::Region>>,
}

pub struct Session<'a> {
    what: String,
    coverage: &'a Coverage,
    rng: Rng,
    guest: Guest,
    devices: Vec<(Device, Option<usize>)>,
    spaces: Vec<Space>,
    context: Context,
    machine: Machine,
    hosts: Vec<&'static str>,
    /// Guest memory with tables at moments when it was consistent: the last one is now.
    moments: Vec<Memory>,
    touched: BTreeSet<u64>,
    recent: Vec<u64>,
}

type Outcomes = Result<(), String>;

/// Settings that hardware offers, or that have something that is rare otherwise.
fn plain(format: Format, rng: &mut Rng) -> Option<tables::TableConfig> {
    let config = |name: &str, settings: &[(&str, u64)]| configs::reference_config(&TableConfig::new(name, settings));
    match format {
        Format::ArmStage1 => {
            let granule = rng.pick(&[4096, 4096, 16384, 65536]);
            config("arm-smmuv3/stage1", &[("granule", granule), ("input-bits", 48), ("output-bits", 48), ("mair", 0xff)])
        }
        Format::VtdFirst => config("intel-vtd/first-stage", &[("levels", rng.pick(&[4, 5]))]),
        Format::AmdV2 => config("amd-vi/v2", &[("levels", rng.pick(&[4, 5]))]),
        // The first large page is cut.
        Format::S390 => config("s390-zpci/dma", &[("levels", rng.pick(&[2, 3, 5])), ("first-iova", (1 + rng.below(1000)) << 12)]),
        Format::RiscvFirst => config("riscv-iommu/first-stage", &[("levels", rng.pick(&[3, 4, 5]))]),
        _ => None,
    }
}

impl<'a> Session<'a> {
    pub fn new(format: Format, setup: Setup, coverage: &'a Coverage) -> Result<Self, String> {
        let mut rng = Rng::new(setup.seed);
        let config = setup.plain.then(|| plain(format, &mut rng)).flatten().unwrap_or_else(|| random_config(format, &mut rng));
        coverage.add(format!("format {format:?}"));
        Self::of(config, setup, rng, coverage)
    }

    /// With these settings.
    pub fn of(config: tables::TableConfig, setup: Setup, mut rng: Rng, coverage: &'a Coverage) -> Result<Self, String> {
        let units = (setup.host as usize % 4, setup.second.map(|host| host as usize % 4));
        let machine = Machine::new(Hardware { units, nesting: setup.how != How::Plain, devices: setup.devices as usize });
        let guest = Guest::new(config, machine.memory.clone(), ROOTS, Rng::new(rng.number()));
        let context = machine.context();
        let devices: Vec<(Device, Option<usize>)> =
            (0..setup.devices as usize).map(|device| (context.connect(&label(device)).unwrap(), None)).collect();
        let hosts = (0..devices.len()).map(|device| HOSTS[units.1.filter(|_| device + 1 == devices.len()).unwrap_or(units.0)]).collect();
        let what = format!("{config:?} on {hosts:?}");
        let mut session = Self {
            what,
            coverage,
            rng,
            guest,
            devices,
            spaces: Vec::new(),
            context,
            machine,
            hosts,
            moments: Vec::new(),
            touched: BTreeSet::new(),
            recent: Vec::new(),
        };
        session.moments.push(session.guest.tables());
        for space in 0..setup.spaces as usize {
            let space = session.space(space, setup)?;
            session.spaces.push(space);
        }
        for device in 0..session.devices.len() {
            session.attach(device, device % session.spaces.len())?;
        }
        Ok(session)
    }

    fn space(&self, number: usize, setup: Setup) -> Result<Space, String> {
        let wanted: &[Strategy] = match setup.how {
            How::Best | How::Plain => &Strategy::ALL,
            How::Nested => &[Strategy::Nested, Strategy::Software],
            How::Areas => &[Strategy::Areas, Strategy::Software],
        };
        let tag = Tag { domain: Some(number as u32 + 1), space: Some(number as u32 + 21) };
        let view = View::Root(number % ROOTS);
        let limits = SpaceLimits { questions: 1 << 16, ..SpaceLimits::default() };
        let request = Request::guest(self.view(view, tag)).with_second_table().with_limits(limits);
        let allocate =
            |strategies: &[Strategy]| self.context.allocate(request.clone().with_strategies(strategies)).map_err(|error| error.to_string());
        let mut ioasid = allocate(wanted)?;
        let served = self.devices.iter().all(|(device, _)| ioasid.serves(device).is_ok());
        if !served {
            self.coverage.add("requests with a strategy that cannot be had".to_owned());
            ioasid = allocate(&Strategy::ALL)?;
        }
        let lookup = if setup.lookups { Some(ioasid.lookup().map_err(|error| error.to_string())?) } else { None };
        Ok(Space { ioasid, lookup, view, tag, stale: Vec::new(), written: Vec::new(), since: self.moments.len() - 1 })
    }

    fn view(&self, view: View, tag: Tag) -> GuestView {
        let outcome = match view {
            View::Root(root) => {
                let tables = vec![configs::plugin_config(&self.guest.config(root))];
                Outcome::Tables(Translated { tables, intercepts: Vec::new(), tag })
            }
            View::Everything => Outcome::Bypass,
            View::Nothing => {
                let blocked = |text: &str| text.to_owned();
                Outcome::Blocked(Blocked {
                    kind: BlockKind::Unused,
                    event: blocked("none"),
                    section: blocked("none"),
                    reason: blocked("nobody uses it"),
                })
            }
        };
        GuestView { outcome, id: 7 }
    }

    /// Nothing of what a guest does here is too much.
    fn report(&self, result: Result<Report, Error>, what: &str) -> Outcomes {
        let report = result.map_err(|error| format!("{what}: {error}"))?;
        if report.blocked_count > 0 {
            return Err(format!("{what}: {:?} of {} are blocked", report.blocked, report.blocked_count));
        }
        Ok(())
    }

    fn attach(&mut self, device: usize, space: usize) -> Outcomes {
        let (known, attached) = &self.devices[device];
        let ioasid = &self.spaces[space].ioasid;
        let result = if attached.is_some() { ioasid.replace(known, None) } else { ioasid.attach(known, None) };
        if let Err(Error::Refused(refusal)) = &result {
            self.coverage.add(format!("attachments refused: {:?}", refusal.property));
            return Ok(());
        }
        self.report(result, "attach")?;
        self.devices[device].1 = Some(space);
        Ok(())
    }

    /// Does it, and compares; false: there was nothing to do.
    pub fn run(&mut self, operation: Operation) -> Result<bool, String> {
        if self.guest.hurry && !matches!(operation, Operation::Tell { .. }) {
            self.tell_all()?;
        }
        let done = self.apply(operation).map_err(|error| format!("{}: {error}", self.what))?;
        self.coverage.add(format!("{} {}", if done { "operation" } else { "nothing to do for" }, operation.name()));
        if done {
            self.compare().map_err(|error| format!("{} after {operation:x?}: {error}", self.what))?;
        }
        Ok(done)
    }

    fn apply(&mut self, operation: Operation) -> Result<bool, String> {
        let guest = &mut self.guest;
        let changed = match operation {
            Operation::Map(wish) => guest.map(wish),
            Operation::Unmap { leaf } => guest.unmap(leaf),
            Operation::Again { gone } => guest.again(gone),
            Operation::Permissions { leaf, access } => guest.change(leaf, Some(access), None),
            Operation::MoveLeaf { leaf, target } => guest.change(leaf, None, Some(target)),
            Operation::Split { leaf } => guest.split(leaf),
            Operation::Merge { table, target } => guest.merge(table, target),
            Operation::MoveTable { table } => guest.move_table(table),
            Operation::Share { table, root, place, step } => guest.share(table, root, place, step),
            Operation::Unlink { table } => guest.unlink(table),
            other => return self.manage(other),
        };
        self.note();
        Ok(changed)
    }

    /// The guest's tables are at a new moment.
    fn note(&mut self) {
        let (stale, written) = (self.guest.take_stale(), self.guest.take_written());
        self.recent.clear();
        for Stale { iova: (first, last), .. } in &stale {
            let inside = (0..2).map(|_| first + self.rng.below((last - first).saturating_add(1).max(1)));
            let ends = [*first, *last, first.wrapping_sub(1), last.wrapping_add(1)];
            let recent: Vec<u64> = inside.chain(ends).collect();
            self.recent.extend(&recent);
            self.touched.extend(&recent);
        }
        if written.is_empty() {
            return;
        }
        for space in &mut self.spaces {
            space.stale.extend(stale.iter().filter(|stale| space.view == View::Root(stale.root)));
            space.written.extend(&written);
        }
        self.moments.push(self.guest.tables());
    }

    /// What is not the tables' business.
    fn manage(&mut self, operation: Operation) -> Result<bool, String> {
        let (spaces, devices) = (self.spaces.len(), self.devices.len());
        match operation {
            Operation::Switch { space, view } => {
                let space = space as usize % spaces;
                let view = match view {
                    0..6 => View::Root(view as usize % self.guest.roots()),
                    6 => View::Everything,
                    _ => View::Nothing,
                };
                if self.spaces[space].view == view {
                    return Ok(false);
                }
                self.tell(space, Telling::Ranges, 0)?;
                let described = self.view(view, self.spaces[space].tag);
                let result = self.spaces[space].ioasid.switch(described);
                if let Err(Error::Refused(refusal)) = &result {
                    self.coverage.add(format!("switches refused: {:?}", refusal.property));
                    return Ok(false);
                }
                self.report(result, "switch")?;
                self.coverage.add(format!("switch to {}", if let View::Root(_) = view { "a root" } else { "no table" }));
                self.spaces[space].view = view;
            }
            Operation::Attach { device, space } => {
                let (device, space) = (device as usize % devices, space as usize % spaces);
                if self.devices[device].1 == Some(space) {
                    return Ok(false);
                }
                self.attach(device, space)?;
            }
            Operation::Detach { device } => {
                let device = &mut self.devices[device as usize % devices];
                if device.1.take().is_none() {
                    return Ok(false);
                }
                device.0.detach(None).map_err(|error| format!("detach: {error}"))?;
            }
            Operation::Memory => {
                // Whose tables are read again does not matter then.
                self.tell_all()?;
                self.machine.plugged = !self.machine.plugged;
                let reports = self.context.memory_changed(self.machine.guest_memory()).map_err(|error| format!("memory: {error}"))?;
                for (_, report) in reports {
                    self.report(Ok(report), "memory")?;
                }
            }
            Operation::Reconsider { space } => {
                let result = self.spaces[space as usize % spaces].ioasid.reconsider();
                if let Err(Error::Refused(refusal)) = &result {
                    self.coverage.add(format!("better strategies refused: {:?}", refusal.property));
                    return Ok(false);
                }
                self.report(result, "reconsider")?;
            }
            Operation::Tell { space, telling, shuffle } => {
                let any = self.spaces.iter().any(|space| !space.stale.is_empty());
                match (space as usize).checked_sub(2).filter(|space| *space < spaces) {
                    Some(one) => self.tell(one, telling, shuffle)?,
                    None => (0..spaces).try_for_each(|space| self.tell(space, telling, shuffle))?,
                }
                self.coverage.add(format!("telling {telling:?} {}", if any { "something" } else { "nothing" }));
                return Ok(any);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn tell_all(&mut self) -> Outcomes {
        (0..self.spaces.len()).try_for_each(|space| self.tell(space, Telling::Ranges, 0))
    }

    /// A synchronisation point of one address space: from here on its DMA sees the tables as they are now.
    fn tell(&mut self, number: usize, telling: Telling, shuffle: u64) -> Outcomes {
        let now = self.moments.len() - 1;
        let space = &mut self.spaces[number];
        let (stale, written) = (std::mem::take(&mut space.stale), std::mem::take(&mut space.written));
        if space.since < now {
            let space = &self.spaces[number];
            let mut rng = Rng::new(shuffle);
            // Hardware that walks the guest's own table needs commands.
            let is_native = space.ioasid.strategies().contains(&Strategy::Native);
            match telling {
                Telling::Written if !is_native => {
                    for (address, length) in shuffled(written, &mut rng) {
                        self.report(space.ioasid.table_written(Gpa(address), length), "writes")?;
                    }
                }
                Telling::Synchronise => self.report(space.ioasid.synchronise(), "synchronise")?,
                Telling::Halves => {
                    let commands = self.commands(space, &stale, Telling::Ranges, &mut rng);
                    let (one, other) = commands.split_at(commands.len() / 2);
                    self.report(space.ioasid.invalidate(one), "invalidate")?;
                    self.compare().map_err(|error| format!("half told: {error}"))?;
                    self.report(self.spaces[number].ioasid.invalidate(other), "invalidate")?;
                }
                _ => {
                    let commands = self.commands(space, &stale, telling, &mut rng);
                    self.report(space.ioasid.invalidate(&commands), "invalidate")?;
                }
            }
        }
        self.spaces[number].since = now;
        if self.spaces.iter().all(|space| space.since == now) {
            self.moments.drain(..now);
            self.spaces.iter_mut().for_each(|space| space.since = 0);
            self.guest.settled();
        }
        Ok(())
    }

    fn commands(&self, space: &Space, stale: &[Stale], telling: Telling, rng: &mut Rng) -> Vec<Invalidation> {
        let Tag { domain, space: number } = space.tag;
        let domain = domain.map(|domain| domain as u16);
        let whole = Scope { leaf: false, second_stage: false, domain, space: number, id: None };
        let range = |scope: Scope, first: u64, last: u64| Effect::Range { scope, iova: Span { first, last } };
        let page = self.guest.page();
        let mut effects = match telling {
            Telling::Everything => vec![Effect::Everything],
            Telling::Domain | Telling::Written => vec![range(Scope { space: None, ..whole }, 0, u64::MAX)],
            Telling::Space => vec![range(whole, 0, u64::MAX)],
            _ => {
                let mut effects = Vec::new();
                for Stale { iova: (first, last), leaf_only, .. } in stale {
                    let id = rng.percent(20).then_some((7, 0));
                    let scope = Scope { leaf: *leaf_only && rng.percent(80), id, ..whole };
                    let pages = (last - first) / page + 1;
                    if telling == Telling::Pages && pages <= 64 {
                        let firsts = (0..pages).map(|number| first + number * page);
                        effects.extend(firsts.map(|first| range(scope, first, first.saturating_add(page - 1).min(*last))));
                    } else {
                        effects.push(range(scope, *first, *last));
                    }
                }
                effects
            }
        };
        if rng.percent(20) {
            // Somebody else's, and nothing at all.
            effects.push(range(Scope { domain: Some(999), ..whole }, 0, u64::MAX));
            effects.push(Effect::Nothing);
        }
        let effects = shuffled(effects, rng);
        effects.into_iter().enumerate().map(|(index, effect)| Invalidation { index: index as u16, effect }).collect()
    }

    /// Where an access goes by the guest's tables at some moment.
    fn says(&self, walkers: &BTreeMap<(usize, usize), Walker<'_>>, view: View, moment: usize, iova: u64, write: bool) -> Option<u64> {
        let address = match view {
            View::Root(root) => walkers[&(root, moment)].translate(iova, write).ok()?,
            View::Everything => iova,
            View::Nothing => return None,
        };
        self.machine.has(address).then_some(address)
    }

    fn limits(&self, device: usize, space: &Space) -> Result<Limits, String> {
        let explanation = space.ioasid.explain_for(&self.devices[device].0, None).map_err(|error| error.to_string())?;
        let chosen = explanation.chosen.ok_or("an attached device has a strategy")?;
        let regions = if chosen.strategy == Strategy::Nested {
            let host = parse(&chosen.what);
            let host = configs::reference_config(&host).ok_or_else(|| format!("the reference does not know {}", chosen.what))?;
            Some(host.regions().map_err(|problem| problem.to_string())?)
        } else {
            None
        };
        Ok(Limits { strategy: chosen.strategy, regions })
    }

    /// Why a device may get less there than `says` has, if it may.
    fn loss(&self, device: usize, limits: &Limits, iova: u64, says: &dyn Fn(u64, bool) -> Option<u64>, view: View) -> Option<&'static str> {
        let capabilities = self.devices[device].0.capabilities();
        // The ends of the page are what tells a whole one from a part.
        let of_table = limits.regions.iter().flatten().filter_map(|region| region.steps.last()).map(|step| 1 << step.shift).max();
        let page = of_table.unwrap_or_else(|| capabilities.iova.alignment.max(4096));
        let (first, last) = (iova & !(page - 1), iova | (page - 1));
        let usable = |device: &Device| device.capabilities().iova.ranges.iter().any(|range| range.contains(iova));
        if !usable(&self.devices[device].0) {
            return Some(KEPT);
        }
        if limits.strategy == Strategy::Native {
            return None;
        }
        // Areas are for all devices: no area can be where one of them has none.
        if limits.strategy == Strategy::Areas && !self.devices.iter().all(|(device, _)| usable(device)) {
            return Some("outside of what another device can use");
        }
        if let Some(regions) = &limits.regions {
            let has = |region: &tables::Region| iova >= region.first && region.contains(iova - region.first);
            if !regions.iter().any(has) {
                return Some("outside of the host's table");
            }
        }
        if let View::Root(root) = view
            && self.guest.config(root).effective(iova) != iova
        {
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

    /// Every device, every lookup and the library's own walk: each is what the reference finds, at some moment since its last synchronisation point.
    fn compare(&mut self) -> Outcomes {
        let samples = self.samples();
        let configs: Vec<tables::TableConfig> = (0..self.guest.roots()).map(|root| self.guest.config(root)).collect();
        let mut walkers = BTreeMap::new();
        for (moment, memory) in self.moments.iter().enumerate() {
            for (root, config) in configs.iter().enumerate() {
                walkers.insert((root, moment), Walker::new(memory, std::slice::from_ref(config)).map_err(|problem| problem.to_string())?);
            }
        }
        let now = self.moments.len() - 1;
        let (mut compared, mut lost) = (0, BTreeMap::<&str, u64>::new());
        for (number, space) in self.spaces.iter().enumerate() {
            let attached: Vec<usize> = (0..self.devices.len()).filter(|device| self.devices[*device].1 == Some(number)).collect();
            let limits = attached.iter().map(|device| self.limits(*device, space)).collect::<Result<Vec<_>, _>>()?;
            for (device, limits) in attached.iter().zip(&limits) {
                self.coverage.add(format!("{} on {}", limits.strategy, self.hosts[*device]));
            }
            for (index, iova) in samples.iter().copied().enumerate() {
                for write in [false, true] {
                    let at = |moment: usize| self.says(&walkers, space.view, moment, iova, write);
                    let may: Vec<Option<u64>> = (space.since..=now).map(at).collect();
                    let wrong = |who: &str, found: Option<u64>| {
                        Err(format!(
                            "{who} at {iova:#x} {}: {found:x?} and not {may:x?} ({})",
                            if write { "writes" } else { "reads" },
                            when(space.since, now)
                        ))
                    };
                    for (device, limits) in attached.iter().zip(&limits) {
                        let found = self.machine.dma(*device, iova, write);
                        if may.contains(&found) {
                            compared += 1;
                            continue;
                        }
                        let lossy = (space.since..=now).find_map(|moment| {
                            let says = |iova: u64, write: bool| self.says(&walkers, space.view, moment, iova, write);
                            self.loss(*device, limits, iova, &says, space.view)
                        });
                        match lossy.filter(|_| found.is_none()) {
                            Some(why) => *lost.entry(why).or_default() += 1,
                            None => {
                                let chosen: Vec<String> = space.ioasid.explain().iter().map(ToString::to_string).collect();
                                return wrong(&format!("device {device} of {attached:?} ({}; {chosen:?})", limits.strategy), found);
                            }
                        }
                        // What a unit keeps it keeps, whatever the host's table says.
                        if limits.strategy == Strategy::Nested && lossy != Some(KEPT) && space.ioasid.stats().refused_bytes == 0 {
                            return Err(format!("device {device} at {iova:#x} has less, and no loss was counted"));
                        }
                    }
                    let access = Access { read: !write, write };
                    if let Some(lookup) = &space.lookup {
                        let target =
                            lookup.find(Iova(iova)).filter(|target| target.attributes.access(false).allows(access)).map(|target| target.address.0);
                        let tagged = matches!(space.view, View::Root(root) if configs[root].effective(iova) != iova);
                        let is_right = may.contains(&target) || tagged && target.is_none();
                        if !is_right {
                            return wrong("a lookup", target);
                        }
                        compared += 1;
                    }
                    if index % 8 == 0 {
                        let walked = space.ioasid.translate(Iova(iova), access).map_err(|error| error.to_string())?;
                        let walked = walked.ok().map(|translation| translation.address.0);
                        if walked != at(now) {
                            return wrong("the library's own walk of now", walked);
                        }
                        compared += 1;
                    }
                }
            }
        }
        for device in (0..self.devices.len()).filter(|device| self.devices[*device].1.is_none()) {
            if let Some((iova, found)) = samples.iter().find_map(|iova| Some((iova, self.machine.dma(device, *iova, false)?))) {
                return Err(format!("device {device}, which is attached to nothing, at {iova:#x}: {found:#x}"));
            }
        }
        self.coverage.add_many("compared".to_owned(), compared);
        lost.into_iter().for_each(|(why, count)| self.coverage.add_many(format!("less: {why}"), count));
        Ok(())
    }

    /// The end: all is told, and nothing is left.
    pub fn finish(mut self) -> Outcomes {
        self.tell_all()?;
        self.recent.clear();
        self.compare().map_err(|error| format!("{} at the end: {error}", self.what))?;
        let Self { devices, spaces, context, machine, .. } = self;
        drop((spaces, devices, context));
        let left = (machine.sim.objects(), machine.sim.pinned_pages(), machine.sim.areas());
        if left == (0, 0, 0) { Ok(()) } else { Err(format!("{left:?} are left in the kernel")) }
    }
}

fn when(since: usize, now: usize) -> String {
    if since == now { "after a synchronisation point".to_owned() } else { format!("{} moments since the last synchronisation point", now - since) }
}

fn shuffled<T>(mut items: Vec<T>, rng: &mut Rng) -> Vec<T> {
    (1..items.len()).for_each(|index| items.swap(index, rng.below(index as u64 + 1) as usize));
    items
}

/// A table's format and settings as an explanation says them.
fn parse(what: &str) -> TableConfig {
    let mut words = what.split(' ');
    let format = words.next().unwrap_or_default();
    let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap();
    let settings: Vec<(&str, u64)> = words.filter_map(|word| word.split_once('=')).map(|(name, value)| (name, number(value))).collect();
    TableConfig::new(format, &settings)
}
