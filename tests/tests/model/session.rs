//! A guest on a host, through operations; after each of them everything is compared.

use std::collections::{BTreeMap, BTreeSet};

use stagecraft::ioasid::{Context, Device, Error, GuestView, Ioasid, Request, SpaceLimits, Strategy};
use stagecraft::lookup::Lookup;
use stagecraft::plugin::{BlockKind, Blocked, Outcome, TableConfig, Tag, Translated};
use stagecraft::sync::Report;
use stagecraft_tests::reference::generate::{Format, Rng, random_config};
use stagecraft_tests::reference::snapshot::Memory;
use stagecraft_tests::reference::tables;

use crate::configs;
use crate::coverage::Coverage;
use crate::guest::{COVERED, DATA, Guest, SECOND_TABLES, Stale, TABLES, Wish};
use crate::machine::{BALLOON, Hardware, Machine, SLOT, There, label};
use crate::operation::{Edit, How, Operation, Setup, Telling, Trap};

/// Sets of roots.
const ROOTS: usize = 3;
/// Leaves of a second stage at the beginning, if there is room for them.
const SOME_LEAVES: usize = 24;
/// Roots of a second stage.
const SECOND_ROOTS: usize = 2;

/// What a requester gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum View {
    Root(usize),
    /// A root of the first stage behind one of the second.
    Behind(usize, usize),
    /// The second stage alone.
    Second(usize),
    Everything,
    Nothing,
}

impl View {
    /// Its root of a stage, by index.
    pub const fn root(self, stage: usize) -> Option<usize> {
        match (self, stage) {
            (Self::Root(root) | Self::Behind(root, _), 0) | (Self::Second(root) | Self::Behind(_, root), 1) => Some(root),
            _ => None,
        }
    }
}

/// A device, or a PASID of it.
pub type Who = (usize, Option<u32>);

pub struct Space {
    pub ioasid: Ioasid,
    pub lookup: Option<Lookup>,
    pub view: View,
    /// It may have this view instead: a switch failed in the middle.
    pub other: Option<View>,
    pub tag: Tag,
    /// By stage.
    pub stale: [Vec<Stale>; 2],
    pub written: Vec<(u64, u64)>,
    /// The first of the moments that its DMA may still see.
    pub since: usize,
    /// Which stages changed since then.
    pub changed: [bool; 2],
    /// Something was blocked, or had no room.
    pub is_short: bool,
}

pub struct Session<'a> {
    pub what: String,
    pub coverage: &'a Coverage,
    pub rng: Rng,
    pub setup: Setup,
    pub guest: Guest,
    /// The tables of a second stage.
    pub second: Option<Guest>,
    pub devices: Vec<Device>,
    /// What is attached where, or is to be.
    pub attached: BTreeMap<Who, usize>,
    pub spaces: Vec<Space>,
    pub context: Context,
    pub machine: Machine,
    pub hardware: Hardware,
    /// Guest memory with tables at moments when it was consistent: the last one is now.
    pub moments: Vec<Memory>,
    pub touched: BTreeSet<u64>,
    pub recent: Vec<u64>,
    /// What is to fail.
    pub trap: Option<Trap>,
    /// Calls that failed in this operation.
    pub failed: Vec<String>,
    /// Something failed, and nobody has seen to it.
    pub is_broken: bool,
    /// What was told to go or to come, and may or may not have: there was this before.
    pub memory_before: Option<There>,
    /// What each requester had last: only where room is scarce.
    pub had: BTreeMap<(Who, u64, bool), u64>,
    /// IOVAs that were told since.
    pub told: Vec<(u64, u64)>,
}

pub type Outcomes = Result<(), String>;

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

/// The format of a second stage behind tables of a first one.
fn second_of(config: &tables::TableConfig) -> Option<Format> {
    Some(match config {
        tables::TableConfig::ArmStage1(_) => Format::ArmStage2,
        tables::TableConfig::VtdFirst(_) => Format::VtdSecond,
        tables::TableConfig::AmdV2(_) => Format::AmdV1,
        tables::TableConfig::RiscvFirst(_) => Format::RiscvSecond,
        _ => return None,
    })
}

/// Limits with very little of something.
fn scarce(which: u8) -> SpaceLimits {
    let mut limits = SpaceLimits::default();
    let some = u64::from(which / 5);
    match which % 5 {
        0 => limits.shadow.table_pages = 4 + some % 12,
        1 => limits.shadow.leaves = 4 + some,
        2 => limits.table_bytes = (4 + some % 16) << 13,
        3 => limits.areas.areas = 2 + some as usize % 16,
        _ => limits.lookup.nodes = 16 + some as u32 * 4,
    }
    limits
}

impl<'a> Session<'a> {
    pub fn new(format: Format, setup: Setup, coverage: &'a Coverage) -> Result<Self, String> {
        let mut rng = Rng::new(setup.seed);
        let config = setup.plain.then(|| plain(format, &mut rng)).flatten().unwrap_or_else(|| random_config(format, &mut rng));
        coverage.add(format!("format {format:?}"));
        let second = second_of(&config).filter(|_| setup.stages).map(|format| (random_config(format, &mut rng), SOME_LEAVES));
        Self::of(config, second, setup, rng, coverage)
    }

    /// With these settings, and those of a second stage, in which so many leaves are at the beginning.
    pub fn of(
        config: tables::TableConfig,
        second: Option<(tables::TableConfig, usize)>,
        setup: Setup,
        mut rng: Rng,
        coverage: &'a Coverage,
    ) -> Result<Self, String> {
        let units = (setup.host as usize % 4, setup.second.map(|host| host as usize % 4));
        let hardware = Hardware { units, nesting: setup.how != How::Plain, devices: setup.devices as usize };
        let machine = Machine::new(hardware, There::ALL);
        let tables = if second.is_some() { COVERED } else { TABLES };
        let guest = Guest::new(config, machine.memory.clone(), ROOTS, Rng::new(rng.number()), tables, &[]);
        let mut what = format!("{config:?} on {:?}", hardware.hosts());
        let second = second.map(|(config, leaves)| {
            what = format!("behind {config:?}, {what}");
            second_stage(config, leaves, &machine, &mut rng)
        });
        let context = machine.context();
        let devices: Vec<Device> = (0..setup.devices as usize).map(|device| context.connect(&label(device)).unwrap()).collect();
        let mut session = Self {
            what,
            coverage,
            rng,
            setup,
            guest,
            second,
            devices,
            attached: BTreeMap::new(),
            spaces: Vec::new(),
            context,
            machine,
            hardware,
            moments: Vec::new(),
            touched: BTreeSet::new(),
            recent: Vec::new(),
            trap: None,
            failed: Vec::new(),
            is_broken: false,
            memory_before: None,
            had: BTreeMap::new(),
            told: Vec::new(),
        };
        session.moments.push(session.tables());
        for number in 0..setup.spaces as usize {
            let tag = Tag { domain: Some(number as u32 + 1), space: Some(number as u32 + 21) };
            let root = number % ROOTS;
            let view = if session.second.is_some() { View::Behind(root, 0) } else { View::Root(root) };
            let space = session.space(view, tag)?.ok_or("an address space at the beginning")?;
            session.spaces.push(space);
        }
        for device in 0..session.devices.len() {
            session.attach((device, None), device % session.spaces.len())?;
        }
        session.nothing_failed()?;
        Ok(session)
    }

    fn nothing_failed(&mut self) -> Outcomes {
        self.failed.pop().map_or(Ok(()), Err)
    }

    /// All tables as they stand in memory.
    pub fn tables(&self) -> Memory {
        let mut memory = self.guest.tables();
        memory.pages.extend(self.second.iter().flat_map(|second| second.tables().pages));
        memory
    }

    /// Settings of the stages of a view; none if it has no tables.
    pub fn stages(&self, view: View) -> Vec<tables::TableConfig> {
        let first = view.root(0).map(|root| self.guest.config(root));
        let second = view.root(1).zip(self.second.as_ref()).map(|(root, second)| second.config(root));
        first.into_iter().chain(second).collect()
    }

    /// An address space; none if that failed.
    pub fn space(&mut self, view: View, tag: Tag) -> Result<Option<Space>, String> {
        let wanted: &[Strategy] = match self.setup.how {
            How::Best | How::Plain => &Strategy::ALL,
            How::Nested => &[Strategy::Nested, Strategy::Software],
            How::Areas => &[Strategy::Areas, Strategy::Software],
        };
        let limits = SpaceLimits { questions: 1 << 16, ..self.setup.scarce.map_or_else(SpaceLimits::default, scarce) };
        let request = Request::guest(self.view(view, tag)).with_second_table().with_limits(limits);
        let with = |strategies: &[Strategy], page_requests: bool| Request { page_requests, ..request.clone() }.with_strategies(strategies);
        let mut made = self.context.allocate(with(wanted, self.setup.requests));
        let served = |ioasid: &Ioasid| self.devices.iter().all(|device| ioasid.serves(device, None).is_ok());
        if made.as_ref().is_ok_and(|ioasid| !served(ioasid)) {
            self.coverage.add("requests with a strategy that cannot be had".to_owned());
            made = self.context.allocate(with(&Strategy::ALL, false));
        }
        let ioasid = match made {
            Ok(ioasid) => ioasid,
            Err(error) => {
                self.failed.push(format!("allocate: {error}"));
                return Ok(None);
            }
        };
        let lookup = if self.setup.lookups { Some(ioasid.lookup().map_err(|error| error.to_string())?) } else { None };
        let now = self.moments.len() - 1;
        Ok(Some(Space {
            ioasid,
            lookup,
            view,
            other: None,
            tag,
            stale: [Vec::new(), Vec::new()],
            written: Vec::new(),
            since: now,
            changed: [false; 2],
            // Nobody is told what was blocked when lookups were made.
            is_short: self.setup.scarce.is_some() && self.setup.lookups,
        }))
    }

    pub fn view(&self, view: View, tag: Tag) -> GuestView {
        let outcome = match view {
            View::Root(_) | View::Behind(..) | View::Second(_) => {
                let tables = self.stages(view).iter().map(configs::plugin_config).collect();
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

    /// Nothing of what a guest does here is too much, unless there is little room. Whether an error is one is seen when it is known what was to fail.
    pub fn report(&mut self, space: Option<usize>, result: Result<Report, Error>, what: &str) -> Outcomes {
        match result {
            Err(error) => self.failed.push(format!("{what}: {error}")),
            Ok(report) if report.blocked_count == 0 => {}
            Ok(report) if self.setup.scarce.is_none() && self.machine.there.hole => {
                return Err(format!("{what}: {:?} of {} are blocked", report.blocked, report.blocked_count));
            }
            Ok(_) => {
                self.coverage.add("entries blocked".to_owned());
                space.into_iter().for_each(|space| self.spaces[space].is_short = true);
            }
        }
        Ok(())
    }

    /// Does it, and compares; false: there was nothing to do.
    pub fn run(&mut self, operation: Operation) -> Result<bool, String> {
        let hurry = self.guest.hurry || self.second.as_ref().is_some_and(|second| second.hurry);
        if hurry && !matches!(operation, Operation::Tell { .. }) {
            self.recover()?;
            self.tell_all()?;
            self.nothing_failed()?;
        }
        let done = self.do_one(operation).map_err(|error| format!("{} at {operation:x?}: {error}", self.what))?;
        self.coverage.add(format!("{} {}", if done { "operation" } else { "nothing to do for" }, operation.name()));
        if matches!(operation, Operation::Tell { shuffle, .. } if shuffle.is_multiple_of(3)) && !self.is_broken && self.memory_before.is_none() {
            self.write_marks().map_err(|error| format!("{} after {operation:x?}: {error}", self.what))?;
        }
        if done {
            self.compare().map_err(|error| format!("{} after {operation:x?}: {error}", self.what))?;
        }
        Ok(done)
    }

    fn do_one(&mut self, operation: Operation) -> Result<bool, String> {
        match operation {
            Operation::Fail(trap) => {
                self.trap = Some(trap);
                Ok(false)
            }
            Operation::Edit(edit) => self.edit(0, edit),
            Operation::Second(edit) => self.edit(1, edit),
            _ => self.within_reach_of_failures(operation),
        }
    }

    /// Of one stage's tables.
    fn edit(&mut self, stage: usize, edit: Edit) -> Result<bool, String> {
        let guest = if stage == 0 { Some(&mut self.guest) } else { self.second.as_mut() };
        let Some(guest) = guest else { return Ok(false) };
        let changed = edit.make(guest);
        self.note(stage);
        Ok(changed)
    }

    /// The guest's tables are at a new moment.
    fn note(&mut self, stage: usize) {
        let Some(guest) = (if stage == 0 { Some(&mut self.guest) } else { self.second.as_mut() }) else { return };
        let (stale, written) = (guest.take_stale(), guest.take_written());
        self.recent.clear();
        let mut places: Vec<(u64, u64)> = stale.iter().map(|stale| stale.iova).collect();
        if stage == 1 {
            places.extend(self.guest.leading_to(&places.clone()).into_iter().take(16));
        }
        for (first, last) in places {
            let inside = (0..2).map(|_| first + self.rng.below((last - first).saturating_add(1).max(1)));
            let ends = [first, last, first.wrapping_sub(1), last.wrapping_add(1)];
            let recent: Vec<u64> = inside.chain(ends).collect();
            self.recent.extend(&recent);
            self.touched.extend(&recent);
        }
        if written.is_empty() {
            return;
        }
        for space in &mut self.spaces {
            space.stale[stage].extend(stale.iter().filter(|stale| space.view.root(stage) == Some(stale.root)));
            space.written.extend(&written);
            space.changed[stage] = true;
        }
        self.moments.push(self.tables());
    }

    /// The end: all is told, and nothing is left.
    pub fn finish(mut self) -> Outcomes {
        self.recover().map_err(|error| format!("{} at the end: {error}", self.what))?;
        self.trap = None;
        self.tell_all()?;
        self.nothing_failed()?;
        self.recent.clear();
        self.compare().map_err(|error| format!("{} at the end: {error}", self.what))?;
        let Self { devices, spaces, context, machine, .. } = self;
        drop((spaces, devices, context));
        machine.is_clean()
    }

    pub fn tell_all(&mut self) -> Outcomes {
        (0..self.spaces.len()).try_for_each(|space| self.tell(space, Telling::Ranges, 0))
    }
}

/// A second stage that has where the first one's tables are, and some of what they lead to.
pub fn second_stage(config: tables::TableConfig, leaves: usize, machine: &Machine, rng: &mut Rng) -> Guest {
    // Places behind those of the ends: tables, and targets.
    let near = [TABLES.0, DATA, SLOT, BALLOON, TABLES.0 + 0x20_0000];
    let mut second = Guest::new(config, machine.memory.clone(), SECOND_ROOTS, Rng::new(rng.number()), SECOND_TABLES, &near);
    for root in 0..SECOND_ROOTS as u8 {
        second.cover(root, COVERED);
        for _ in 0..leaves {
            let (place, target) = (5 + rng.below(3) as u8, rng.below(1 << 16) as u16);
            let (step, size) = (rng.below(8) as u8, rng.below(2) as u8);
            second.map(Wish { root, place, step, size, target, access: 0, restricted: false, skip: false, replace: false });
        }
    }
    second.take_stale();
    second.take_written();
    second.settled();
    second
}
