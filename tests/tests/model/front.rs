//! The same with a vIOMMU in front: the guest writes structures and commands, as bytes, and nobody calls an IOASID.

use std::collections::{BTreeMap, BTreeSet};

use stagecraft::Gpa;
use stagecraft::ioasid::{Device, GuestView, Ioasid, Request, Strategy};
use stagecraft::plugin::{Outcome, Policy, Requester, Supervisors};
use stagecraft::sync::Unwatched;
use stagecraft::viommu::{ContextSpaces, Handled, Limits, StreamState, UnitConfig, Viommu, Way};
use stagecraft_tests::reference::generate::Rng;
use stagecraft_tests::reference::snapshot::Memory;
use stagecraft_tests::reference::walk::Walker;
use vm_memory::GuestMemoryMmap;

use crate::compare::{KEPT, limits, loss, when};
use crate::configs;
use crate::coverage::Coverage;
use crate::guest::{Guest, Stale, TABLES};
use crate::guests::{self, Arch};
use crate::machine::{Hardware, Machine, There, label, plugins};
use crate::operation::{How, Operation, Setup, Telling, Trap};
use crate::session::Outcomes;

/// Roots: the numbers that commands name them by are these and one.
const ROOTS: usize = 3;
/// Where device structures are, and further tables of theirs.
const STRUCTURES: u64 = 0x180_0000;

/// What a device is set up to get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum View {
    Root(usize),
    Everything,
    Nothing,
}

/// A table, as its guest's commands mean it.
#[derive(Default)]
struct Root {
    stale: Vec<Stale>,
    written: Vec<(u64, u64)>,
    /// The first moment that DMA may see.
    since: usize,
}

pub struct Front<'a> {
    what: String,
    coverage: &'a Coverage,
    rng: Rng,
    arch: Arch,
    guest: Guest,
    structures: guests::Guest,
    views: Vec<View>,
    is_connected: Vec<bool>,
    devices: Vec<Device>,
    roots: Vec<Root>,
    viommu: Viommu<GuestMemoryMmap, ContextSpaces>,
    machine: Machine,
    hardware: Hardware,
    moments: Vec<Memory>,
    touched: BTreeSet<u64>,
    recent: Vec<u64>,
    /// What is to fail.
    trap: Option<Trap>,
    /// Calls failed, and not all is tried again.
    is_broken: bool,
    /// What was told to go or to come, and may or may not have: there was this before.
    memory_before: Option<There>,
}

const fn id(device: usize) -> u64 {
    0x18 + 8 * device as u64
}

const fn requester(device: usize) -> Requester {
    Requester { id: id(device), pasid: None }
}

impl<'a> Front<'a> {
    pub fn new(arch: Arch, setup: Setup, coverage: &'a Coverage) -> Result<Self, String> {
        let mut rng = Rng::new(setup.seed);
        let units = (setup.host as usize % 4, setup.second.map(|host| host as usize % 4));
        let hardware = Hardware { units, nesting: setup.how != How::Plain, devices: setup.devices as usize };
        let machine = Machine::new(hardware, There::ALL);
        let mut structures = guests::Guest::new(arch);
        (structures.memory, structures.structures) = (machine.memory.clone(), STRUCTURES);
        structures.tables_from(STRUCTURES + 0x10_0000);
        let supervisors = Supervisors::new(plugins(), Policy::default());
        let context = stagecraft::ioasid::Setup { supervisors: Some(supervisors.clone()), ..machine.setup() };
        let context = stagecraft::ioasid::Context::with(context).map_err(|error| error.to_string())?;
        let view = GuestView { outcome: Outcome::Bypass, id: 0 };
        let mut template = Request::guest(view).with_second_table();
        template.limits.questions = 1 << 16;
        let mut spaces = ContextSpaces::new(context, template);
        let connect = |device| spaces.connect(id(device), &label(device)).map_err(|error| error.to_string());
        let devices = (0..hardware.devices).map(connect).collect::<Result<Vec<_>, _>>()?;
        let unit = UnitConfig {
            kind: arch.kind().to_owned(),
            registers: arch.registers_at(STRUCTURES),
            map: std::sync::Arc::new(machine.guest_memory().map().clone()),
            limits: Limits::default(),
        };
        let supervisor = supervisors.by_unit(arch.kind()).map_err(|error| error.to_string())?;
        let mut viommu = Viommu::new(supervisor, unit, machine.memory.clone(), spaces, Box::new(Unwatched));
        // A table in which nothing is tells what its settings are.
        structures.translate(id(0), structures.new_table(), 9);
        viommu.connect(id(0), false);
        let Some(StreamState::Space(number)) = viommu.stream(requester(0)) else { return Err("the first device has no table".to_owned()) };
        let Some((_, Way::Tables { tables, .. })) = viommu.space(*number) else { return Err("the first device has no table".to_owned()) };
        let config = configs::reference_config(&tables[0]).ok_or_else(|| format!("the reference does not know {}", tables[0]))?;
        let guest = Guest::new(config, machine.memory.clone(), ROOTS, Rng::new(rng.number()), TABLES, &[]);
        let mut front = Self {
            what: format!("{arch:?} behind a vIOMMU on {:?}", hardware.hosts()),
            coverage,
            rng,
            arch,
            guest,
            structures,
            views: vec![View::Nothing; hardware.devices],
            is_connected: vec![true; hardware.devices],
            devices,
            roots: (0..ROOTS).map(|_| Root::default()).collect(),
            viommu,
            machine,
            hardware,
            moments: Vec::new(),
            touched: BTreeSet::new(),
            recent: Vec::new(),
            trap: None,
            is_broken: false,
            memory_before: None,
        };
        front.moments.push(front.guest.tables());
        for device in 0..hardware.devices {
            front.write(device, View::Root(device % 2));
            let handled = if device == 0 { front.viommu.stream_changed(id(0)) } else { front.viommu.connect(id(device), false) };
            front.handled(&handled)?;
        }
        Ok(front)
    }

    /// Nothing that a guest does here is too much for anybody.
    fn handled(&self, handled: &Handled) -> Outcomes {
        let bad = handled.illegal.is_some() || handled.undecoded.is_some() || !handled.loose.is_empty();
        let blocked = handled.blocked > 0 && self.machine.there.hole && !self.is_broken;
        if bad || blocked { Err(format!("{handled:?}")) } else { Ok(()) }
    }

    /// The structure of a device.
    fn write(&mut self, device: usize, view: View) {
        self.views[device] = view;
        match view {
            View::Root(root) => {
                let address = configs::plugin_config(&self.guest.config(root)).settings.get("root").expect("a root");
                self.structures.translate(id(device), address, root as u16 + 1);
            }
            View::Everything => self.structures.bypass(id(device)),
            View::Nothing => self.structures.abort(id(device)),
        }
    }

    pub fn run(&mut self, operation: Operation) -> Outcomes {
        if self.guest.hurry && !matches!(operation, Operation::Tell { .. }) {
            self.tell_all()?;
        }
        if let Operation::Fail(trap) = operation {
            self.trap = Some(trap);
            return Ok(());
        }
        let trap = self.trap.filter(|_| !matches!(operation, Operation::Edit(_) | Operation::Second(_)));
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
            if self.viommu.figures().pending == 0 {
                break;
            }
            let handled = self.viommu.idle();
            self.handled(&handled)?;
        }
        // What there was no memory for is asked for again when anybody looks.
        self.tell(0, Telling::Everything, 0)?;
        self.is_broken = false;
        let (pending, leaving) = (self.viommu.figures().pending, self.viommu.host().context().memory_leaving().len());
        if (pending, leaving) == (0, 0) { Ok(()) } else { Err(format!("{pending} are pending, {leaving} regions are leaving")) }
    }

    fn apply(&mut self, operation: Operation) -> Result<bool, String> {
        let devices = self.views.len();
        let guest = &mut self.guest;
        let done = match operation {
            Operation::Edit(edit) | Operation::Second(edit) => edit.make(guest),
            Operation::Tell { space, telling, shuffle } => {
                for root in 0..ROOTS {
                    if (space as usize).checked_sub(2).is_none_or(|one| one == root) {
                        self.tell(root, telling, shuffle)?;
                    }
                }
                return Ok(true);
            }
            Operation::Switch { space, view } => return self.switch(space as usize % devices, view),
            Operation::Detach { device, .. } => {
                let device = device as usize % devices;
                if std::mem::replace(&mut self.is_connected[device], false) {
                    let handled = self.viommu.disconnect(id(device));
                    self.handled(&handled)?;
                }
                return Ok(true);
            }
            Operation::Attach { device, .. } => {
                let device = device as usize % devices;
                if !std::mem::replace(&mut self.is_connected[device], true) {
                    self.tell_all()?;
                    let handled = self.viommu.connect(id(device), false);
                    self.handled(&handled)?;
                }
                return Ok(true);
            }
            Operation::Memory { which } => {
                self.tell_all()?;
                let there = self.machine.there;
                match which % 4 {
                    0 => self.change_memory(There { slot: !there.slot, ..there })?,
                    1 | 2 => self.change_memory(There { blocks: there.blocks ^ (1 + (which >> 3) % 15), ..there })?,
                    _ => {
                        self.change_memory(There { hole: false, ..there })?;
                        // Until it went it cannot come.
                        if self.memory_before.is_none() {
                            self.change_memory(there)?;
                        }
                        self.machine.there = there;
                    }
                }
                return Ok(true);
            }
            _ => return Ok(false),
        };
        self.note();
        Ok(done)
    }

    fn change_memory(&mut self, there: There) -> Outcomes {
        let before = std::mem::replace(&mut self.machine.there, there);
        let memory = self.machine.guest_memory();
        let map = std::sync::Arc::new(memory.map().clone());
        let handled = self.viommu.memory_changed(self.machine.memory.clone(), map, memory);
        match &handled.memory {
            Some(_) if self.is_broken => self.memory_before = Some(self.memory_before.unwrap_or(before)),
            Some(error) => return Err(error.to_string()),
            None => {}
        }
        // What is there again may have been blocked until now.
        if there.hole && handled.loose.is_empty() { Ok(()) } else { self.handled(&handled) }
    }

    fn note(&mut self) {
        let (stale, written) = (self.guest.take_stale(), self.guest.take_written());
        self.recent.clear();
        for Stale { iova: (first, last), .. } in &stale {
            let inside = (0..2).map(|_| first + self.rng.below((last - first).saturating_add(1).max(1)));
            let recent: Vec<u64> = inside.chain([*first, *last, first.wrapping_sub(1), last.wrapping_add(1)]).collect();
            self.recent.extend(&recent);
            self.touched.extend(&recent);
        }
        if written.is_empty() {
            return;
        }
        for (number, root) in self.roots.iter_mut().enumerate() {
            root.stale.extend(stale.iter().filter(|stale| stale.root == number));
            root.written.extend(&written);
        }
        self.moments.push(self.guest.tables());
    }

    fn switch(&mut self, device: usize, view: u8) -> Result<bool, String> {
        let view = match view {
            0..6 => View::Root(view as usize % ROOTS),
            6 => View::Everything,
            _ => View::Nothing,
        };
        let before = self.views[device];
        if before == view {
            return Ok(false);
        }
        self.tell_all()?;
        self.write(device, view);
        let space = if let View::Root(root) = before { root as u16 + 1 } else { 0 };
        let handled = match self.rng.below(3) {
            0 => self.viommu.stream_changed(id(device)),
            1 => self.viommu.table_written(Gpa(self.structures.structure(id(device))), 64),
            _ => {
                // The number that the context cache has.
                let space = if self.arch == Arch::Vtd && before == View::Everything { 1 } else { space };
                self.commands(&[self.arch.forget_device(id(device), space)])?
            }
        };
        self.handled(&handled)?;
        Ok(true)
    }

    fn commands(&mut self, commands: &[Vec<u8>]) -> Result<Handled, String> {
        let batch = [commands.concat(), self.arch.wait()].concat();
        self.viommu.commands(&batch).map_err(|error| error.to_string())
    }

    fn tell_all(&mut self) -> Outcomes {
        (0..ROOTS).try_for_each(|root| self.tell(root, Telling::Ranges, 0))
    }

    /// The IOASID that a device has.
    fn ioasid(&self, device: usize) -> Option<&Ioasid> {
        let StreamState::Space(number) = self.viommu.stream(requester(device))? else { return None };
        self.viommu.host().ioasid(self.viommu.space(*number)?.0)
    }

    fn tell(&mut self, number: usize, telling: Telling, shuffle: u64) -> Outcomes {
        let now = self.moments.len() - 1;
        let Root { stale, written, since } = std::mem::replace(&mut self.roots[number], Root { since: now, ..Root::default() });
        if since < now || telling == Telling::Everything {
            let mut rng = Rng::new(shuffle);
            let uses = |device: &usize| self.views[*device] == View::Root(number);
            let is_native = (0..self.views.len())
                .filter(uses)
                .filter_map(|device| self.ioasid(device))
                .any(|ioasid| ioasid.strategies().contains(&Strategy::Native));
            if telling == Telling::Written && !is_native {
                for (address, length) in written {
                    let handled = self.viommu.table_written(Gpa(address), length);
                    self.handled(&handled)?;
                }
            } else {
                let commands = self.forget(number as u16 + 1, &stale, telling, &mut rng);
                // A queue of a few commands at a time.
                for batch in commands.chunks(1 + rng.below(16) as usize) {
                    let handled = self.commands(batch)?;
                    self.handled(&handled)?;
                }
            }
        }
        if self.roots.iter().all(|root| root.since == now) {
            self.moments.drain(..now);
            self.roots.iter_mut().for_each(|root| root.since = 0);
            self.guest.settled();
        }
        Ok(())
    }

    /// Commands for what is stale of an address space: pages, or all of it.
    fn forget(&self, space: u16, stale: &[Stale], telling: Telling, rng: &mut Rng) -> Vec<Vec<u8>> {
        let number = u64::from(space);
        let everything = guests::words(&match self.arch {
            // TLBI_NSNH_ALL.
            Arch::Smmu => [0x30, 0],
            // A global flush of the IOTLB.
            Arch::Vtd => [2 | 1 << 4, 0],
            // INVALIDATE_IOMMU_ALL.
            Arch::Amd => [8 << 60, 0],
            // IOTINVAL.VMA without AV and PSCV.
            Arch::Riscv => [1, 0],
        });
        let all = guests::words(&match self.arch {
            // TLBI_NH_ASID.
            Arch::Smmu => [0x11 | number << 48, 0],
            // A domain.
            Arch::Vtd => [2 | 2 << 4 | number << 16, 0],
            // All addresses of a domain, and its tables: S and PDE.
            Arch::Amd => [3 << 60 | number << 32, 0x7fff_ffff_ffff_f003],
            // PSCV.
            Arch::Riscv => [1 | number << 12 | 1 << 32, 0],
        });
        if telling == Telling::Everything {
            return vec![everything];
        }
        let pages = stale.iter().map(|stale| ((stale.iova.1 - stale.iova.0) >> 12) + 1).fold(0, u64::saturating_add);
        if matches!(telling, Telling::Domain | Telling::Space) || pages > 256 {
            return vec![all];
        }
        let mut commands = Vec::new();
        for Stale { iova: (first, last), leaf_only, .. } in stale {
            for iova in (*first..=*last).step_by(4096) {
                let leaf = u64::from(*leaf_only && rng.percent(80));
                commands.push(match self.arch {
                    // TLBI_NH_VA, of leaves or of all.
                    Arch::Smmu => guests::words(&[0x12 | number << 48, iova & !0xfff | leaf]),
                    // IH.
                    Arch::Vtd => guests::words(&[2 | 3 << 4 | number << 16, iova & !0xfff | leaf << 6]),
                    // PDE.
                    Arch::Amd => guests::words(&[3 << 60 | number << 32, iova & !0xfff | (1 - leaf) << 1]),
                    Arch::Riscv => self.arch.forget_page(space, iova & !0xfff),
                });
            }
        }
        if rng.percent(10) {
            commands.push(everything);
        }
        commands
    }

    fn samples(&mut self) -> Vec<u64> {
        let mut samples: BTreeSet<u64> = self.recent.iter().copied().take(32).collect();
        let all: Vec<u64> = self.touched.iter().copied().collect();
        samples.extend((0..80.min(all.len())).map(|_| self.rng.pick(&all)));
        for window in self.guest.windows() {
            samples.extend([window.first, window.last, window.last.wrapping_add(1)]);
        }
        samples.extend([0, u64::MAX, self.rng.below(1 << 40)]);
        // Interrupts are nobody's DMA.
        samples.into_iter().filter(|iova| iova >> 20 != 0xfee).collect()
    }

    fn compare(&mut self) -> Outcomes {
        let samples = self.samples();
        let now = self.moments.len() - 1;
        let configs: Vec<_> = (0..ROOTS).map(|root| self.guest.config(root)).collect();
        let mut walkers = BTreeMap::new();
        for (moment, memory) in self.moments.iter().enumerate() {
            for (root, config) in configs.iter().enumerate() {
                walkers.insert((root, moment), Walker::new(memory, std::slice::from_ref(config)).map_err(|problem| problem.to_string())?);
            }
        }
        let mut compared = 0;
        for device in 0..self.views.len() {
            let state = self.viommu.stream(requester(device));
            let is_refused = matches!(state, Some(StreamState::Refused(_))) && !self.is_broken;
            if is_refused {
                // Areas for two units can lie where one of them must not translate: it has nothing then.
                self.coverage.add(format!("vIOMMU: refused on {}", self.hardware.hosts()[device]));
            }
            let view = if self.is_connected[device] && !is_refused { self.views[device] } else { View::Nothing };
            let ioasid = self.ioasid(device).filter(|_| !self.is_broken && view != View::Nothing);
            if ioasid.is_none() && view != View::Nothing && !self.is_broken {
                return Err(format!("device {device} has {:?}", self.viommu.stream(requester(device))));
            }
            let limits = ioasid.map(|ioasid| limits(ioasid, &self.devices[device], None)).transpose()?;
            if let Some(limits) = &limits {
                self.coverage.add(format!("vIOMMU: {} on {}", limits.strategy, self.hardware.hosts()[device]));
            }
            let since = if let View::Root(root) = view { self.roots[root].since } else { now };
            let says = |moment: usize, iova: u64, write: bool| {
                let address = match view {
                    View::Root(root) => walkers[&(root, moment)].translate(iova, write).ok()?,
                    View::Everything => iova,
                    View::Nothing => return None,
                };
                let there = self.machine.there.has(address) || self.memory_before.is_some_and(|before| before.has(address));
                there.then_some(address)
            };
            for iova in samples.iter().copied() {
                for write in [false, true] {
                    let found = self.machine.dma((device, None), iova, write);
                    let may: Vec<Option<u64>> = (since..=now).map(|moment| says(moment, iova, write)).collect();
                    compared += 1;
                    if may.contains(&found) || found.is_none() && self.is_broken {
                        continue;
                    }
                    let lost = limits.as_ref().filter(|_| found.is_none()).and_then(|limits| {
                        let says = |moment| loss((&self.devices, device), limits, iova, &|iova, write| says(moment, iova, write), false);
                        (since..=now).find_map(says)
                    });
                    match lost {
                        Some(KEPT) => {}
                        Some(why) => self.coverage.add(format!("vIOMMU: less: {why}")),
                        None => {
                            let verb = if write { "writes" } else { "reads" };
                            return Err(format!(
                                "device {device} ({view:?}, {limits:?}) {verb} at {iova:#x}: {found:x?} and not {may:x?} ({})",
                                when(since, now)
                            ));
                        }
                    }
                }
            }
        }
        self.coverage.add_many("vIOMMU: compared".to_owned(), compared);
        Ok(())
    }

    pub fn finish(mut self) -> Outcomes {
        self.tell_all()?;
        self.recent.clear();
        self.compare().map_err(|error| format!("{} at the end: {error}", self.what))?;
        for device in 0..self.views.len() {
            self.viommu.disconnect(id(device));
            self.viommu.host_mut().disconnect(id(device));
        }
        if self.viommu.figures().watched_pages != 0 {
            return Err("pages are still watched".to_owned());
        }
        let Self { viommu, devices, machine, .. } = self;
        drop((viommu, devices));
        machine.is_clean()
    }
}
