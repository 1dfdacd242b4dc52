//! The machine that a scenario describes: a simulated host, a guest's memory on it, and for each device an address space and a driver.

use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use stagecraft::ioasid::{Context, Device, GuestMemory, GuestView, Ioasid, Request, Setup, Stats, Strategy, TableSupply};
use stagecraft::kernel::Kernel;
use stagecraft::kernel::sim::{self, DeviceConfig, DmaAccess, Sim, SimBuilder, UnitIndex};
use stagecraft::lookup::Lookup;
use stagecraft::plugin::{Outcome, Plugins, Requester, TableConfig};
use stagecraft::sync::{Unwatched, Watcher};
use stagecraft::{Gpa, Iova, Span};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::guest::{Driver, Requests, Tables, Watched, settings};
use super::scenario::{Announces, Scenario};
use super::unit::{Architecture, Described};
use super::vmm::{self, Vmm, detect};
use super::workload::{Layout, Workload};

/// Where guest memory begins: above the windows that real units keep for themselves there, and never where an IOVA would be the same.
const BASE: u64 = 0x4000_0000;

/// How a device's DMA can be looked at.
#[derive(Debug)]
enum Reach {
    /// Through the simulated hardware.
    Hardware { device: sim::Device, _connected: Device },
    /// As a device model does.
    Software(Lookup),
}

/// A device with its driver.
#[derive(Debug)]
pub struct Seat {
    /// The device's name.
    pub label: String,
    /// Its address space.
    pub ioasid: Ioasid,
    /// The guest's side.
    pub driver: Driver,
    /// What the driver does.
    pub workload: Workload,
    /// The host's tables and how it was chosen, in words.
    pub explanation: String,
    reach: Reach,
}

impl Seat {
    /// Where an access of the device goes: a guest-physical address; none if it is refused.
    pub fn dma(&self, machine: &Machine, iova: u64, writes: bool) -> Option<u64> {
        match &self.reach {
            Reach::Hardware { device, .. } => {
                let access = if writes { DmaAccess::Write } else { DmaAccess::Read };
                let found = device.translate(None, Iova(iova), access).ok()?;
                // What is no guest memory at all is worse than any wrong address.
                Some(machine.guest_address(found.user_address).unwrap_or(u64::MAX))
            }
            Reach::Software(lookup) => {
                let target = lookup.find(Iova(iova))?;
                let access = target.attributes.access(false);
                (if writes { access.write } else { access.read }).then_some(target.address.0)
            }
        }
    }
}

/// The machine.
#[derive(Debug)]
pub struct Machine {
    /// The simulated host.
    pub sim: Arc<Sim>,
    /// Devices and drivers.
    pub seats: Vec<Seat>,
    /// What owns the address spaces.
    pub context: Context,
    /// The guest's tables, in words.
    pub tables: String,
    /// The guest's own IOMMU, if its driver works with one.
    pub vmm: Option<Vmm>,
    memory: GuestMemoryMmap,
}

impl Machine {
    /// Builds it: every device has an empty address space in the end.
    pub fn new(scenario: &Scenario, plugins: &Arc<Plugins>) -> Result<Self> {
        let sim = host(scenario)?;
        let Regions { memory, data, control } = guest_memory(scenario)?;
        sim.register_memory(&memory).map_err(|errno| anyhow::anyhow!("the simulated kernel cannot be told of guest memory: {errno}"))?;
        let announces = scenario.guest.announces.unwrap_or(Announces::Changes);
        let watched = Watched::default();
        let kernel: Arc<dyn Kernel> = Arc::clone(&sim) as Arc<dyn Kernel>;
        let mut setup = Setup::new(kernel, Arc::clone(plugins), GuestMemory::of_mmap(&memory)?);
        setup.tables = Arc::clone(&sim) as Arc<dyn TableSupply>;
        let unit = scenario.unit();
        if announces.is_watched() && unit.is_none() {
            setup.watcher = Some(Box::new(watched.clone()));
        }
        let context = Context::with(setup)?;
        let mut machine = Self { sim, seats: Vec::new(), context, tables: String::new(), vmm: None, memory };
        match unit {
            Some(architecture) => machine.seats_of_unit(scenario, architecture, (data, control), (announces, &watched))?,
            None => {
                for index in 0..scenario.devices.len() {
                    let seat = machine.seat(scenario, index, data, (announces, &watched))?;
                    machine.seats.push(seat);
                }
            }
        }
        Ok(machine)
    }

    /// Devices behind the guest's own unit: its driver sets up structures for all of them, and they get what the VMM finds there.
    fn seats_of_unit(
        &mut self,
        scenario: &Scenario,
        architecture: &'static dyn Architecture,
        (data, control): (Span, Span),
        (announces, watched): (Announces, &Watched),
    ) -> Result<()> {
        let (mut drivers, mut described) = (Vec::new(), Vec::new());
        for index in 0..scenario.devices.len() {
            let (tables, structures) = self.described(scenario, index, architecture, control, (announces, watched))?;
            drivers.push(tables);
            described.push(structures);
        }
        let template = Request { strategies: scenario.host.strategies(), ..Request::guest(GuestView { outcome: Outcome::Bypass, id: 0 }) };
        let watcher: Box<dyn Watcher> = if announces.is_watched() { Box::new(watched.clone()) } else { Box::new(Unwatched) };
        let ids: Vec<u64> = described.iter().map(|device| device.id).collect();
        let mut vmm = Vmm::new(&self.context, template, architecture, (self.memory.clone(), control), described, watcher)?;
        for ((device, tables), id) in scenario.devices.iter().zip(drivers).zip(ids) {
            let place = || format!("device {}", device.label);
            let layout = Layout::new(Some(tables.geometry()), data);
            let workload = Workload::new(&scenario.workload, layout)?;
            if device.emulated {
                vmm.spaces().emulate(id);
            } else {
                vmm.spaces().connect(id, &device.label).with_context(place)?;
            }
            let space = vmm.connect(id).with_context(place)?;
            let ioasid = vmm.spaces().ioasid(space).context("the address space is gone")?.clone();
            let lookup = vmm.spaces().lookup(Requester { id, pasid: None }).cloned();
            let connected = self.context.device(&device.label);
            let (reach, explanation) = self.reach(&device.label, (connected, lookup), &ioasid)?;
            self.check_announces(&device.label, announces, &ioasid)?;
            let driver = Driver::Tables(Box::new(tables));
            self.seats.push(Seat { label: device.label.clone(), ioasid, driver, workload, explanation, reach });
        }
        self.vmm = Some(vmm);
        Ok(())
    }

    /// A driver's empty tables, of the kind that its device structures can describe, and what these are to say.
    fn described(
        &mut self,
        scenario: &Scenario,
        index: usize,
        architecture: &dyn Architecture,
        control: Span,
        (announces, watched): (Announces, &Watched),
    ) -> Result<(Tables, Described)> {
        let (tables, config) = self.tables(scenario, index, None, announces, watched)?;
        // Numbers of address spaces begin at 1; device ids are those of the host's devices, which is as good as any.
        let mut described = Described { id: 8 + index as u64, space: 1 + index as u16, geometry: tables.geometry().clone(), config };
        let place = || format!("device {}", scenario.devices[index].label);
        let found = detect(&self.context, architecture, (&self.memory, control), &described).with_context(place)?;
        for (name, value) in &scenario.guest.settings {
            let says = found.settings.get(name).or_else(|| self.default_of(&found.format, name));
            ensure!(
                says == Some(value.0),
                "setting `{name}`: the guest's device structures say {}; with commands = \"typed\" there are none",
                says.map_or("nothing".to_owned(), |says| format!("{says:#x}"))
            );
        }
        if found.settings == described.config.settings {
            return Ok((tables, described));
        }
        // What the unit has besides, the tables may use.
        drop(tables);
        let (tables, config) = self.tables(scenario, index, Some(&found), announces, watched)?;
        let roots =
            |config: &TableConfig| config.settings.iter().filter(|(name, _)| name.starts_with("root")).map(|(_, value)| value).collect::<Vec<_>>();
        ensure!(roots(&config) == roots(&described.config), "the guest's tables stand elsewhere when they are made as its structures say");
        described.geometry = tables.geometry().clone();
        described.config = config;
        Ok((tables, described))
    }

    /// A setting that was not given.
    fn default_of(&self, format: &str, name: &str) -> Option<u64> {
        let plugin = self.context.plugins().by_format(format).ok()?;
        let setting = plugin.manifest().format(format)?.settings.iter().find(|setting| setting.name == name)?;
        setting.default
    }

    fn seat(&mut self, scenario: &Scenario, index: usize, data: Span, (announces, watched): (Announces, &Watched)) -> Result<Seat> {
        let place = || format!("device {}", scenario.devices[index].label);
        let (driver, request, layout) = if scenario.is_requests() {
            let driver = Requests::new(Arc::new(self.context.memory().map().clone()))?;
            self.tables = format!("{}: requests", scenario.guest.format);
            (Driver::Requests(Box::new(driver)), Request::requests(), Layout::new(None, data))
        } else {
            let (tables, config) = self.tables(scenario, index, None, announces, watched)?;
            let layout = Layout::new(Some(tables.geometry()), data);
            (Driver::Tables(Box::new(tables)), Request::guest(GuestView::table(config)), layout)
        };
        let workload = Workload::new(&scenario.workload, layout)?;
        let ioasid = self.context.allocate(Request { strategies: scenario.host.strategies(), ..request }).with_context(place)?;
        let label = scenario.devices[index].label.clone();
        let (device, lookup) = if scenario.devices[index].emulated {
            (None, Some(ioasid.lookup().with_context(place)?))
        } else {
            let device = self.context.connect(&label).with_context(place)?;
            drop(ioasid.attach(&device, None).with_context(place)?);
            (Some(device), None)
        };
        let (reach, explanation) = self.reach(&label, (device, lookup), &ioasid).with_context(place)?;
        self.check_announces(&label, announces, &ioasid)?;
        Ok(Seat { label, ioasid, driver, workload, explanation, reach })
    }

    fn check_announces(&self, label: &str, announces: Announces, ioasid: &Ioasid) -> Result<()> {
        if announces == Announces::Nothing && ioasid.strategies().contains(&Strategy::Native) {
            bail!(
                "device {label}: its unit walks the guest's own table and is not told what goes: a guest that announces nothing needs strategies without `native`"
            );
        }
        Ok(())
    }

    /// The guest's empty tables for a device, in the guest's memory.
    fn tables(
        &mut self,
        scenario: &Scenario,
        index: usize,
        config: Option<&TableConfig>,
        announces: Announces,
        watched: &Watched,
    ) -> Result<(Tables, TableConfig)> {
        let format = &scenario.guest.format;
        let plugin = self.context.plugins().by_format(format)?;
        let given: Vec<(String, u64)> = scenario.guest.settings.iter().map(|(name, value)| (name.clone(), value.0)).collect();
        let last_address = self.memory.last_addr().0;
        let config = match config {
            Some(config) => config.clone(),
            None => TableConfig { format: format.clone(), settings: settings(&plugin, format, &given, last_address)? },
        };
        let region = self.memory.iter().nth(index).context("no guest memory for tables")?;
        let place = (region.get_mmap(), Gpa(region.start_addr().0));
        let without_roots = config.settings.iter().filter(|(name, _)| !name.starts_with("root"));
        self.tables =
            TableConfig { format: format.clone(), settings: without_roots.map(|(name, value)| (name.to_owned(), value)).collect() }.to_string();
        Tables::new(&plugin, &config, place, announces, watched.clone())
    }

    /// How the DMA of a device that is attached, or looks up, can be looked at.
    fn reach(&self, label: &str, (device, lookup): (Option<Device>, Option<Lookup>), ioasid: &Ioasid) -> Result<(Reach, String)> {
        if let Some(lookup) = lookup {
            return Ok((Reach::Software(lookup), format!("device {label}: in software: lookups for the VMM's device model")));
        }
        let device = device.context("it is not connected")?;
        let explanation: Vec<String> = ioasid.explain().iter().map(ToString::to_string).collect();
        let hardware = self.sim.device(label).context("the simulated host does not have it")?;
        Ok((Reach::Hardware { device: hardware, _connected: device }, explanation.join("\n")))
    }

    /// The guest-physical address of what is at an address of this process; none if it is no guest memory.
    fn guest_address(&self, user_address: u64) -> Option<u64> {
        self.memory.iter().find_map(|region| {
            let offset = user_address.checked_sub(region.get_mmap().as_ptr() as u64)?;
            (offset < region.len()).then(|| region.start_addr().0 + offset)
        })
    }

    /// What all address spaces hold together.
    pub fn stats(&self) -> Stats {
        let mut all = Stats::default();
        for stats in self.seats.iter().map(|seat| seat.ioasid.stats()) {
            all.areas += stats.areas;
            all.host_tables += stats.host_tables;
            all.table_bytes += stats.table_bytes;
            all.questions += stats.questions;
        }
        all
    }

    /// Takes everything down; how many objects, pinned pages and areas are left in the kernel: none should be.
    pub fn end(self) -> (usize, u64, usize) {
        let Self { sim, seats, context, vmm, .. } = self;
        drop(vmm);
        drop(seats);
        drop(context);
        (sim.objects(), sim.pinned_pages(), sim.areas())
    }
}

/// The simulated host.
fn host(scenario: &Scenario) -> Result<Arc<Sim>> {
    let mut builder = SimBuilder::new();
    let units: Vec<(&str, UnitIndex)> = scenario.units.iter().map(|unit| (unit.name.as_str(), builder.unit(unit.config()))).collect();
    for (device, requester) in scenario.devices.iter().zip(8..) {
        if let Some((_, unit)) = units.iter().find(|(name, _)| device.unit.as_deref() == Some(name)) {
            builder.device(DeviceConfig::new(&device.label, requester), &[*unit]);
        }
    }
    Ok(builder.build()?)
}

/// Guest memory and its uses.
struct Regions {
    memory: GuestMemoryMmap,
    /// For buffers.
    data: Span,
    /// For device structures and queues.
    control: Span,
}

/// The guest's memory: for each device a region for tables, and the rest for buffers, of which the guest's IOMMU takes the end.
fn guest_memory(scenario: &Scenario) -> Result<Regions> {
    let bytes = scenario.guest.memory.0;
    let devices = scenario.devices.len() as u64;
    let tables = (bytes / (4 * devices)).next_power_of_two() / 2;
    let regions = (0..devices).map(|index| (GuestAddress(BASE + index * tables), tables as usize));
    let rest = Span { first: BASE + devices * tables, last: BASE + (bytes - 1) };
    let all: Vec<_> = regions.chain([(GuestAddress(rest.first), (rest.length_minus_one() + 1) as usize)]).collect();
    let control = Span { first: rest.last - (vmm::BYTES - 1), last: rest.last };
    let data = if scenario.unit().is_some() { Span { last: control.first - 1, ..rest } } else { rest };
    Ok(Regions { memory: GuestMemoryMmap::from_ranges(&all).context("memory for the guest")?, data, control })
}
