//! The same with a vIOMMU in front: the guest writes structures and commands, as bytes, and nobody calls an IOASID. Devices have PASIDs, one stage or two, and ask for
//! pages; what each of them is to get is what the reference finds in structures and tables, and nothing here knows better.

mod arrange;
mod ask;
mod events;
mod forget;
mod judge;
mod structures;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use stagecraft::Gpa;
use stagecraft::ioasid::{Device, GuestView, Ioasid, Request, Strategy};
use stagecraft::plugin::{Outcome, Policy, Requester, Supervisors};
use stagecraft::sync::{Unwatched, Watcher};
use stagecraft::viommu::{ContextSpaces, Handled, Limits, StreamState, UnitConfig, Viommu};
use stagecraft_tests::reference::detect::{self, Resolution};
use stagecraft_tests::reference::generate::Rng;
use stagecraft_tests::reference::snapshot::Snapshot;
use stagecraft_tests::reference::tables::TableConfig;
use vm_memory::GuestMemoryMmap;

use crate::coverage::Coverage;
use crate::guest::{Bounds, Guest, Stale, TABLES};
use crate::guests::Arch;
use crate::machine::{HOSTS, Hardware, Machine, There, label, plugins};
use crate::operation::{How, Operation, Setup, Telling, Trap};
use crate::session::{Outcomes, second_stage};

use forget::Extent;
use structures::{Context, POOL, Setting, Stages, Structures, id};

/// Roots of a stage that has no other behind it.
const ROOTS: usize = 3;
/// Where tables are that the guest has no others beside.
const OWN_TABLES: Bounds = (TABLES.0, POOL.0);
/// Leaves that a second stage begins with.
const SOME_LEAVES: usize = 24;

/// A table, as its guest's commands mean it.
#[derive(Default)]
struct Root {
    stale: Vec<Stale>,
    written: Vec<(u64, u64)>,
    /// The first moment that DMA may see.
    since: usize,
    /// Tables of its stage changed since then.
    changed: bool,
}

/// Pages that the library watches.
#[derive(Clone, Default)]
struct Watched(Arc<Mutex<BTreeSet<u64>>>);

impl Watcher for Watched {
    fn watch(&mut self, page: Gpa) {
        assert!(self.0.lock().unwrap().insert(page.0), "{page} is watched already");
    }

    fn unwatch(&mut self, page: Gpa) {
        assert!(self.0.lock().unwrap().remove(&page.0), "{page} is not watched");
    }
}

pub struct Front<'a> {
    what: String,
    coverage: &'a Coverage,
    rng: Rng,
    /// Tables by stage.
    guests: [Option<Guest>; 2],
    structures: Structures,
    is_connected: Vec<bool>,
    devices: Vec<Device>,
    roots: [Vec<Root>; 2],
    /// By device, the first moment whose structures DMA may go by.
    since: Vec<usize>,
    viommu: Viommu<GuestMemoryMmap, ContextSpaces>,
    machine: Machine,
    hardware: Hardware,
    /// Writes to watched pages are told.
    watched: Option<Watched>,
    moments: Vec<Snapshot>,
    touched: BTreeSet<u64>,
    recent: Vec<u64>,
    /// What is to fail.
    trap: Option<Trap>,
    /// Calls failed, and not all is tried again.
    is_broken: bool,
    /// What was told to go or to come, and may or may not have: there was this before.
    memory_before: Option<There>,
}

const fn requester(device: usize, pasid: Option<u32>) -> Requester {
    Requester { id: id(device), pasid }
}

/// What the reference finds of a table of a stage, in structures that point to a page with nothing in it.
fn config(structures: &mut Structures, stage: usize) -> Result<TableConfig, String> {
    let stages = if stage == 0 { Stages::First } else { Stages::Second(0) };
    // Without a PASID an AMD table has no upper half.
    let pasid = (stage == 0 && structures.pasids).then_some(1);
    let contexts = [(pasid.unwrap_or(0), Context::Root(0))].into();
    let before = std::mem::replace(&mut structures.roots[stage], vec![POOL.1 - 0x4000]);
    structures.set(0, Setting { stages, own: true, contexts }, true);
    structures.roots[stage] = before;
    let snapshot = snapshot(structures, &[None, None]);
    match detect::resolve_pasid(&snapshot, id(0), pasid.map(u64::from)) {
        Ok(Resolution::Tables(tables)) => Ok(tables[0]),
        other => Err(format!("{:?} of stage {stage}: {other:?}", structures.arch)),
    }
}

/// What stands in guest memory now.
fn snapshot(structures: &Structures, guests: &[Option<Guest>; 2]) -> Snapshot {
    let mut memory = structures.pages();
    guests.iter().flatten().for_each(|guest| memory.pages.extend(guest.tables().pages));
    let registers = structures.registers().into_iter().collect();
    Snapshot { unit_kind: structures.arch.kind().to_owned(), registers, memory, ..Snapshot::default() }
}

impl<'a> Front<'a> {
    pub fn new(arch: Arch, setup: Setup, coverage: &'a Coverage) -> Result<Self, String> {
        let mut rng = Rng::new(setup.seed);
        let units = (setup.host as usize % 4, setup.second.map(|host| host as usize % 4));
        let hardware = Hardware { units, nesting: setup.how != How::Plain, devices: setup.devices as usize };
        let machine = Machine::new(hardware, There::ALL);
        // AMD's units have no device that waits.
        let can_wait = hardware.nesting && !hardware.hosts().contains(&HOSTS[2]) && setup.how != How::Areas;
        // Nor have units of two kinds that share an address space.
        let requests = (setup.requests || rng.percent(40)) && can_wait && hardware.units.1.is_none_or(|second| second == hardware.units.0);
        // Where PASIDs belong to the owner of a table, they have areas; and nobody waits for areas.
        let has_pasids = rng.percent(70) && !(requests && units.0 != 0);
        let mut structures = Structures::new(arch, machine.memory.clone(), hardware.devices, (has_pasids, requests), &mut rng);
        // One stage alone: for AMD without PASIDs it is the second one.
        let is_second_alone = structures.is_legacy() || arch == Arch::Amd && !has_pasids && !setup.stages;
        let has = [!is_second_alone, is_second_alone || setup.stages];
        let mut guests = [None, None];
        if has[0] {
            let config = config(&mut structures, 0)?;
            guests[0] = Some(Guest::new(config, machine.memory.clone(), ROOTS, Rng::new(rng.number()), OWN_TABLES, &[]));
        }
        if has[1] {
            let config = config(&mut structures, 1)?;
            guests[1] = Some(match has[0] {
                true => second_stage(config, SOME_LEAVES, &machine, &mut rng),
                false => Guest::new(config, machine.memory.clone(), ROOTS, Rng::new(rng.number()), OWN_TABLES, &[]),
            });
        }
        for (roots, guest) in structures.roots.iter_mut().zip(&guests) {
            let root = |guest: &Guest, number| guest.config(number).regions().map(|regions| regions[0].root).expect("a root");
            *roots = guest.iter().flat_map(|guest| (0..guest.roots()).map(|number| root(guest, number))).collect();
        }
        structures.set(0, Setting { stages: Stages::Nothing, own: true, contexts: Default::default() }, true);
        structures.take_written();

        let supervisors = Supervisors::new(plugins(), Policy::default());
        let context = stagecraft::ioasid::Setup { supervisors: Some(supervisors.clone()), ..machine.setup() };
        let context = stagecraft::ioasid::Context::with(context).map_err(|error| error.to_string())?;
        let view = GuestView { outcome: Outcome::Bypass, id: 0 };
        let strategies: &[Strategy] = match setup.how {
            How::Areas => &[Strategy::Areas, Strategy::Software],
            How::Nested if !has_pasids || requests => &[Strategy::Nested, Strategy::Software],
            How::Nested => &[Strategy::Nested, Strategy::Areas],
            How::Best | How::Plain => &Strategy::ALL,
        };
        let mut template = Request { page_requests: requests, ..Request::guest(view).with_second_table().with_strategies(strategies) };
        template.limits.questions = 1 << 16;
        let mut spaces = ContextSpaces::new(context, template);
        let connect = |device| spaces.connect(id(device), &label(device)).map_err(|error| error.to_string());
        let devices = (0..hardware.devices).map(connect).collect::<Result<Vec<_>, _>>()?;
        let unit = UnitConfig {
            kind: arch.kind().to_owned(),
            registers: structures.registers(),
            map: Arc::new(machine.guest_memory().map().clone()),
            limits: Limits::default(),
        };
        let supervisor = supervisors.by_unit(arch.kind()).map_err(|error| error.to_string())?;
        let watched = rng.percent(30).then(Watched::default);
        let watcher: Box<dyn Watcher> = watched.clone().map_or_else(|| Box::new(Unwatched) as Box<dyn Watcher>, |watched| Box::new(watched));
        let viommu = Viommu::new(supervisor, unit, machine.memory.clone(), spaces, watcher);
        let kind = match (has_pasids, has) {
            (true, [_, true]) => "with PASIDs and two stages",
            (true, _) => "with PASIDs",
            (false, [true, true]) => "with two stages",
            (false, _) => "without PASIDs",
        };
        coverage.add(format!("vIOMMU: {arch:?} {kind}"));
        let mut front = Self {
            what: format!("{arch:?} {kind} behind a vIOMMU{} on {:?}", if watched.is_some() { " that watches" } else { "" }, hardware.hosts()),
            coverage,
            rng,
            roots: [0, 1].map(|stage| structures.roots[stage].iter().map(|_| Root::default()).collect()),
            since: vec![0; hardware.devices],
            moments: vec![snapshot(&structures, &guests)],
            guests,
            structures,
            is_connected: vec![true; hardware.devices],
            devices,
            viommu,
            machine,
            hardware,
            watched,
            touched: BTreeSet::new(),
            recent: Vec::new(),
            trap: None,
            is_broken: false,
            memory_before: None,
        };
        for device in 0..hardware.devices {
            let setting = front.first_setting(device);
            front.structures.set(device, setting, true);
            front.structures.take_written();
            let handled = front.viommu.connect(id(device), has_pasids);
            front.handled(&handled)?;
        }
        front.moments = vec![snapshot(&front.structures, &front.guests)];
        Ok(front)
    }

    /// What a device begins with.
    fn first_setting(&self, device: usize) -> Setting {
        let stages = match (&self.guests[0], &self.guests[1]) {
            (Some(_), Some(_)) => Stages::Both(0),
            (Some(_), None) => Stages::First,
            (None, _) => Stages::Second(device % 2),
        };
        let mut contexts: std::collections::BTreeMap<u32, Context> = [(0, Context::Root(device % 2))].into();
        if self.structures.pasids {
            contexts.insert(1, Context::Root((device + 1) % ROOTS));
        }
        Setting { stages, own: true, contexts }
    }

    /// Nothing that a guest does here is too much for anybody.
    fn handled(&self, handled: &Handled) -> Outcomes {
        let bad = handled.illegal.is_some() || handled.undecoded.is_some() || !handled.loose.is_empty();
        let blocked = handled.blocked > 0 && self.machine.there.hole && !self.is_broken;
        if bad || blocked { Err(format!("{handled:?}")) } else { Ok(()) }
    }

    pub fn run(&mut self, operation: Operation) -> Outcomes {
        if self.guests.iter().flatten().any(|guest| guest.hurry) && !matches!(operation, Operation::Tell { .. }) {
            self.tell_all()?;
        }
        if let Operation::Fail(trap) = operation {
            self.trap = Some(trap);
            return Ok(());
        }
        let trap = self.trap.filter(|_| !matches!(operation, Operation::Edit(_) | Operation::Second(_) | Operation::Ask { .. }));
        if let Some(trap) = trap {
            trap.arm(&self.machine.sim);
            self.is_broken = true;
        }
        let done = self.apply(operation).map_err(|error| format!("{} at {operation:x?}: {error}", self.what))?;
        if let Some(trap) = trap {
            self.compare().map_err(|error| format!("{} after {trap:?} in {operation:x?}: {error}", self.what))?;
            let sprung = !self.machine.sim.disarm();
            self.recover().map_err(|error| format!("{} after {trap:?} in {operation:x?}: {error}", self.what))?;
            // Sooner or later it is so many.
            self.trap = if sprung { None } else { Some(Trap { n: trap.n / 2, ..trap }) };
            self.coverage.add(format!("vIOMMU: failures, {}", if sprung { "sprung" } else { "not sprung" }));
        }
        if done || trap.is_some() {
            self.coverage.add(format!("vIOMMU: {}", operation.name()));
            self.compare().map_err(|error| format!("{} after {operation:x?}: {error}", self.what))?;
        }
        Ok(())
    }

    /// What failed is tried again by itself, after so many calls.
    fn recover(&mut self) -> Outcomes {
        if self.memory_before.take().is_some() {
            self.change_memory(self.machine.there)?;
            if self.memory_before.is_some() {
                return Err("memory did not change without a failure".to_owned());
            }
        }
        for _ in 0..4096 {
            if self.viommu.figures().pending == self.refused() {
                break;
            }
            let handled = self.viommu.idle();
            self.handled(&handled)?;
        }
        // What there was no memory for is asked for again when anybody looks.
        self.tell_all()?;
        let everything = self.structures.forget_everything();
        let handled = self.commands(&everything)?;
        self.handled(&handled)?;
        self.is_broken = false;
        // What cannot be had is asked for again and again.
        let refused = self.refused();
        let (pending, leaving) = (self.viommu.figures().pending, self.viommu.host().context().memory_leaving().len());
        if (pending, leaving) == (refused, 0) {
            Ok(())
        } else {
            Err(format!("{pending} are pending, {refused} refused, {leaving} regions are leaving: {:?}", self.viommu.streams().collect::<Vec<_>>()))
        }
    }

    /// Streams that cannot have what they are to have, whether anything fails or not.
    fn refused(&self) -> u64 {
        let fails = |reason: &str| ["EIO", "ENOMEM"].iter().any(|errno| reason.contains(errno));
        // The kernel has no PASID 0 beside a device's own requests; a guest may.
        let is_permanent = |reason: &str| reason.starts_with("strategy") || reason.starts_with("PASID");
        let is_refused = |state: &StreamState| matches!(state, StreamState::Refused(reason) if is_permanent(reason) && !fails(reason));
        self.viommu.streams().filter(|(_, state)| is_refused(state)).count() as u64
    }

    fn apply(&mut self, operation: Operation) -> Result<bool, String> {
        match operation {
            Operation::Edit(edit) | Operation::Second(edit) => {
                let wanted = usize::from(matches!(operation, Operation::Second(_)));
                // Of one stage, what is said of either.
                let stage = if self.guests[wanted].is_some() { wanted } else { 1 - wanted };
                let Some(guest) = &mut self.guests[stage] else { return Ok(false) };
                let done = edit.make(guest);
                self.note(stage)?;
                Ok(done)
            }
            Operation::Tell { space, telling, shuffle } => {
                let one = (space as usize).checked_sub(2).filter(|one| *one < self.roots[0].len());
                // What one command means may be nowhere without those of the other stage.
                match one.filter(|_| self.roots[1].iter().all(|root| !root.changed)) {
                    Some(root) => self.tell(0, root, telling, shuffle)?,
                    None => self.tell_each(telling, shuffle)?,
                }
                Ok(true)
            }
            Operation::Memory { which } => self.memory(which).map(|()| true),
            Operation::Ask { device, place, write } => self.ask(device as usize, place, write),
            other => self.rearrange(other),
        }
    }

    fn memory(&mut self, which: u8) -> Outcomes {
        self.tell_all()?;
        let there = self.machine.there;
        match which % 4 {
            0 => self.change_memory(There { slot: !there.slot, ..there })?,
            1 | 2 => self.change_memory(There { blocks: there.blocks ^ (1 + (which >> 3) % 15), ..there })?,
            _ => {
                self.change_memory(There { hole: false, ..there })?;
                self.recent.clear();
                self.compare_events_of_hole()?;
                // Until it went it cannot come.
                if self.memory_before.is_none() {
                    self.change_memory(there)?;
                }
                self.machine.there = there;
            }
        }
        Ok(())
    }

    fn change_memory(&mut self, there: There) -> Outcomes {
        let before = std::mem::replace(&mut self.machine.there, there);
        let memory = self.machine.guest_memory();
        let map = Arc::new(memory.map().clone());
        let handled = self.viommu.memory_changed(self.machine.memory.clone(), map, memory);
        match &handled.memory {
            Some(_) if self.is_broken => self.memory_before = Some(self.memory_before.unwrap_or(before)),
            Some(error) => return Err(error.to_string()),
            None => {}
        }
        // What is there again may have been blocked until now.
        if there.hole && handled.loose.is_empty() { Ok(()) } else { self.handled(&handled) }
    }

    /// Tables of a stage were edited.
    fn note(&mut self, stage: usize) -> Outcomes {
        let Some(guest) = &mut self.guests[stage] else { return Ok(()) };
        let (stale, written) = (guest.take_stale(), guest.take_written());
        self.recent.clear();
        let mut places: Vec<Bounds> = stale.iter().map(|stale| stale.iova).collect();
        if let (1, Some(first)) = (stage, &self.guests[0]) {
            places.extend(first.leading_to(&places.clone()).into_iter().take(16));
        }
        for (first, last) in places {
            let inside = (0..2).map(|_| first + self.rng.below((last - first).saturating_add(1).max(1)));
            let recent: Vec<u64> = inside.chain([first, last, first.wrapping_sub(1), last.wrapping_add(1)]).collect();
            self.recent.extend(&recent);
            self.touched.extend(&recent);
        }
        if written.is_empty() {
            return Ok(());
        }
        for (number, root) in self.roots[stage].iter_mut().enumerate() {
            root.stale.extend(stale.iter().filter(|stale| stale.root == number));
            root.written.extend(&written);
            root.changed = true;
        }
        let before = self.moments.len() - 1;
        self.moments.push(snapshot(&self.structures, &self.guests));
        let is_elsewhere = stage == 1 && (0..self.devices.len()).any(|device| self.leads_elsewhere(device, before));
        if self.report(&written)? {
            for root in 0..self.roots[stage].len() {
                if !self.is_native(stage, root) {
                    self.is_told(stage, root);
                }
            }
        }
        // Structures that are behind the second stage are elsewhere: their caches know nothing of it.
        if is_elsewhere {
            self.coverage.add("vIOMMU: structures are elsewhere behind the second stage".to_owned());
            self.tell_all()?;
        }
        Ok(())
    }

    /// Where pages are watched, writes to them are told; whether they are.
    fn report(&mut self, written: &[(u64, u64)]) -> Result<bool, String> {
        let Some(watched) = &self.watched else { return Ok(false) };
        let pages: BTreeSet<u64> = written.iter().flat_map(|(address, length)| (address & !0xfff..address + length).step_by(4096)).collect();
        let pages: Vec<u64> = pages.intersection(&watched.0.lock().unwrap()).copied().collect();
        for page in pages {
            let handled = self.viommu.table_written(Gpa(page), 4096);
            self.handled(&handled)?;
        }
        Ok(true)
    }

    fn commands(&mut self, commands: &[Vec<u8>]) -> Result<Handled, String> {
        let batch = [commands.concat(), self.structures.arch.wait()].concat();
        self.viommu.commands(&batch).map_err(|error| error.to_string())
    }

    /// Commands of a few at a time.
    fn batches(&mut self, commands: &[Vec<u8>], rng: &mut Rng) -> Outcomes {
        for batch in commands.chunks(1 + rng.below(16) as usize) {
            let handled = self.commands(batch)?;
            self.handled(&handled)?;
        }
        Ok(())
    }

    fn tell_all(&mut self) -> Outcomes {
        self.tell_each(Telling::Ranges, 0)
    }

    fn tell_each(&mut self, telling: Telling, shuffle: u64) -> Outcomes {
        // Where the second stage puts something else, that is read before the first stage's tables are.
        for stage in [1, 0] {
            for root in 0..self.roots[stage].len() {
                self.tell(stage, root, telling, shuffle)?;
            }
        }
        Ok(())
    }

    /// The IOASID that a requester has.
    fn ioasid(&self, device: usize, pasid: Option<u32>) -> Option<&Ioasid> {
        let StreamState::Space(number) = self.viommu.stream(requester(device, pasid))? else { return None };
        self.viommu.host().ioasid(self.viommu.space(*number)?.0)
    }

    /// Who uses a root of a stage.
    fn users(&self, stage: usize, root: usize) -> Vec<(usize, Option<u32>)> {
        let requesters = self.structures.requesters();
        let all = (0..self.devices.len()).flat_map(|device| requesters.iter().map(move |pasid| (device, *pasid)));
        all.filter(|(device, pasid)| self.structures.settings[*device].roots(*pasid)[stage] == Some(root)).collect()
    }

    /// Hardware walks the guest's own table, and needs commands.
    fn is_native(&self, stage: usize, root: usize) -> bool {
        let users = self.users(stage, root);
        users.into_iter().filter_map(|(device, pasid)| self.ioasid(device, pasid)).any(|ioasid| ioasid.strategies().contains(&Strategy::Native))
    }

    fn tell(&mut self, stage: usize, number: usize, telling: Telling, shuffle: u64) -> Outcomes {
        let now = self.moments.len() - 1;
        let Root { stale, written, since, .. } = std::mem::take(&mut self.roots[stage][number]);
        if since < now || telling == Telling::Everything {
            let mut rng = Rng::new(shuffle);
            if telling == Telling::Written && !self.is_native(stage, number) {
                for (address, length) in written {
                    let handled = self.viommu.table_written(Gpa(address), length);
                    self.handled(&handled)?;
                }
            } else {
                let commands = self.forget(stage, number, &stale, telling, &mut rng);
                self.batches(&commands, &mut rng)?;
            }
        }
        self.is_told(stage, number);
        Ok(())
    }

    fn is_told(&mut self, stage: usize, number: usize) {
        self.roots[stage][number] = Root { since: self.moments.len() - 1, ..Root::default() };
        self.forget_moments();
    }

    /// Moments that nobody can see any more.
    fn forget_moments(&mut self) {
        let now = self.moments.len() - 1;
        if self.roots.iter().flatten().all(|root| root.since == now) && self.since.iter().all(|since| *since == now) {
            self.moments.drain(..now);
            self.roots.iter_mut().flatten().for_each(|root| root.since = 0);
            self.since.fill(0);
            self.guests.iter_mut().flatten().for_each(Guest::settled);
        }
    }

    /// Commands for what is stale of a root's address spaces: pages, or all of them.
    fn forget(&self, stage: usize, root: usize, stale: &[Stale], telling: Telling, rng: &mut Rng) -> Vec<Vec<u8>> {
        if telling == Telling::Everything {
            // What caches of structures read through the second stage they keep.
            return [self.structures.forget_everything(), self.forget_structures_behind(stage, root)].concat();
        }
        let pages = stale.iter().map(|stale| ((stale.iova.1 - stale.iova.0) >> 12) + 1).fold(0, u64::saturating_add);
        let extents: Vec<Extent> = if matches!(telling, Telling::Domain | Telling::Space) || pages > 256 {
            vec![Extent::All]
        } else {
            let extents = stale.iter().flat_map(|Stale { iova: (first, last), leaf_only, .. }| {
                (*first..=*last).step_by(4096).map(move |iova| Extent::Page(iova, *leaf_only))
            });
            extents.collect()
        };
        let mut commands = Vec::new();
        let mut names: Vec<_> = self
            .users(stage, root)
            .into_iter()
            .map(|(device, pasid)| {
                let behind = self.structures.settings[device].roots(pasid)[1 - stage].is_some();
                (self.structures.name_for(device, pasid), behind)
            })
            .collect();
        names.sort_unstable();
        names.dedup();
        for (name, behind) in names {
            for extent in &extents {
                let extent = match *extent {
                    Extent::Page(page, leaf) => Extent::Page(page, leaf && rng.percent(80)),
                    Extent::All => Extent::All,
                };
                if stage == 0 {
                    commands.push(self.structures.forget_first(name, behind, extent));
                } else {
                    commands.extend(self.structures.forget_second(name.0, behind, extent));
                }
            }
        }
        if !commands.is_empty() {
            commands.extend(self.forget_structures_behind(stage, root));
        }
        if rng.percent(5) {
            commands.extend(self.structures.forget_everything());
        }
        commands
    }

    /// Structures that were read through a root of the second stage may be others now.
    fn forget_structures_behind(&self, stage: usize, root: usize) -> Vec<Vec<u8>> {
        let devices = (0..self.devices.len()).filter(|device| stage == 1 && self.structures.settings[*device].stages == Stages::Both(root));
        devices.flat_map(|device| self.structures.forget_device(device, &[], 0)).collect()
    }

    pub fn finish(mut self) -> Outcomes {
        self.tell_all()?;
        self.recent.clear();
        self.compare().map_err(|error| format!("{} at the end: {error}", self.what))?;
        for device in 0..self.devices.len() {
            self.viommu.disconnect(id(device));
            self.viommu.host_mut().disconnect(id(device));
        }
        let watched = self.watched.as_ref().map_or(0, |watched| watched.0.lock().unwrap().len());
        if self.viommu.figures().watched_pages != 0 || watched != 0 {
            return Err("pages are still watched".to_owned());
        }
        let Self { viommu, devices, machine, .. } = self;
        drop((viommu, devices));
        machine.is_clean()
    }
}
