//! What devices write behind a vIOMMU, told to somebody who copies the guest's memory while the guest goes on.

use std::collections::{BTreeMap, BTreeSet};

use stagecraft::ioasid::Strategy;
use stagecraft::kernel::sim::UnitConfig;
use stagecraft::{Gpa, Iova, Span};
use stagecraft_tests::reference::generate::Rng;

use super::behaviour::{ONE, TWO};
use super::guests::{Arch, DATA};
use super::kernel::{IOVA, Rig};

/// Pages that devices write, and pages of each table.
const PAGES: u64 = 64;
const MAPPED: u64 = 12;
const ALL: Span = Span { first: DATA, last: DATA + (PAGES << 12) - 1 };

/// What the guest lets a device do.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Abort,
    Bypass,
    Table(usize),
}

impl Way {
    /// What commands call it.
    const fn domain(self) -> u16 {
        match self {
            Self::Abort => 0,
            Self::Bypass => 1,
            Self::Table(table) => 7 + table as u16,
        }
    }
}

/// A guest, and in plain words what it has set up and what its devices did.
struct Life {
    rig: Rig,
    rng: Rng,
    roots: [u64; 2],
    /// Of each table: where a page leads, and whether it may be written.
    tables: [BTreeMap<u64, (u64, bool)>; 2],
    ways: [Way; 2],
    /// Pages that were written since they were told the last time.
    written: BTreeSet<u64>,
    /// The guest has changed nothing since then.
    is_quiet: bool,
    writes: u64,
    /// How often something was told of which all had been written.
    exact: u64,
    what: String,
}

impl Life {
    fn new(arch: Arch, host: UnitConfig, strategy: Strategy, seed: u64) -> Self {
        let what = format!("{arch:?} on {}, {strategy}", host.name);
        let template = Rig::template().with_dirty_tracking().with_strategies(&[strategy]);
        let mut rig = Rig::with(arch, host, template);
        let roots = [rig.guest.new_table(), rig.guest.new_table()];
        for (id, way) in [(ONE, 0), (TWO, 1)] {
            rig.guest.translate(id, roots[way], Way::Table(way).domain());
            rig.viommu.connect(id, false);
            assert_eq!(rig.strategy(id), strategy, "{what}");
        }
        let ways = [Way::Table(0), Way::Table(1)];
        Self {
            rig,
            rng: Rng::new(seed),
            roots,
            tables: Default::default(),
            ways,
            written: BTreeSet::new(),
            is_quiet: true,
            writes: 0,
            exact: 0,
            what,
        }
    }

    /// Where a page of a device's leads, for writing.
    fn target(&self, device: usize, page: u64) -> Option<u64> {
        match self.ways[device] {
            Way::Abort => None,
            Way::Bypass => Some(page),
            Way::Table(table) => self.tables[table].get(&page).filter(|(_, writes)| *writes).map(|(target, _)| *target),
        }
    }

    /// A device writes somewhere, and gets where it should, or nowhere.
    fn write(&mut self) {
        let (device, page) = (self.rng.below(2) as usize, self.rng.below(MAPPED));
        let base = if self.ways[device] == Way::Bypass { DATA } else { IOVA };
        let at = self.rng.below(512) * 8;
        let done = self.rig.device([ONE, TWO][device]).write(None, Iova(base + (page << 12) + at), &(self.writes + 1).to_le_bytes()).is_ok();
        let target = self.target(device, page);
        assert_eq!(done, target.is_some(), "{}: page {page} of {:?}", self.what, self.ways[device]);
        if let Some(target) = target {
            self.writes += 1;
            assert_eq!(self.rig.guest.load(DATA + (target << 12) + at), self.writes, "{}", self.what);
            self.written.insert(target);
        }
    }

    /// The guest changes its mind; devices write before it says so and after.
    fn step(&mut self) {
        let arch = self.rig.guest.arch;
        self.is_quiet = false;
        if self.rng.percent(75) {
            let (table, page, target) = (self.rng.below(2) as usize, self.rng.below(MAPPED), self.rng.below(PAGES));
            let (root, iova) = (self.roots[table], IOVA + (page << 12));
            let entry = self.rng.percent(70).then(|| (target, self.rng.percent(80)));
            match entry {
                Some((target, writes)) => self.rig.guest.map_page(root, iova, DATA + (target << 12), writes),
                None => self.rig.guest.unmap_page(root, iova),
            };
            (0..2).for_each(|_| self.write());
            self.rig.commands(&[arch.forget_page(Way::Table(table).domain(), iova)]);
            match entry {
                Some(entry) => drop(self.tables[table].insert(page, entry)),
                None => drop(self.tables[table].remove(&page)),
            }
        } else {
            let device = self.rng.below(2) as usize;
            let (id, was) = ([ONE, TWO][device], self.ways[device]);
            let way = [Way::Abort, Way::Bypass, Way::Table(0), Way::Table(1)][self.rng.below(4) as usize];
            match way {
                Way::Abort => self.rig.guest.abort(id),
                Way::Bypass => self.rig.guest.bypass(id),
                Way::Table(table) => self.rig.guest.translate(id, self.roots[table], way.domain()),
            }
            (0..2).for_each(|_| self.write());
            let handled = match self.rng.percent(50) {
                true => self.rig.commands(&[arch.forget_device(id, was.domain())]),
                false => {
                    let at = self.rig.guest.structure(id);
                    self.rig.viommu.table_written(Gpa(at), 32)
                }
            };
            assert!(handled.loose.is_empty(), "{}: {handled:?}", self.what);
            self.ways[device] = way;
        }
        (0..3).for_each(|_| self.write());
    }

    /// Somebody asks which pages were written.
    fn read(&mut self, clear: bool) {
        let bitmap = self.rig.viommu.host().context().dirty(ALL, clear).unwrap();
        let told: BTreeSet<u64> = (0..PAGES).filter(|page| bitmap[(page / 64) as usize] >> (page % 64) & 1 != 0).collect();
        let lost: Vec<u64> = self.written.difference(&told).copied().collect();
        assert!(lost.is_empty(), "{}: pages {lost:?} were written, and {told:?} told", self.what);
        // A large page of guest memory as it is counts as a whole, and so may what went with a change.
        let is_exact = self.is_quiet && !self.ways.contains(&Way::Bypass);
        assert!(!is_exact || told == self.written, "{}: {told:?} were told, and {:?} written", self.what, self.written);
        self.exact += u64::from(is_exact && !told.is_empty());
        if clear {
            self.written.clear();
            self.is_quiet = true;
        }
    }
}

/// Hosts on which writes are recorded by the kernel, by marks in host tables, and by areas.
fn hosts(arch: Arch) -> [(UnitConfig, Strategy); 4] {
    let other = if arch == Arch::Vtd { UnitConfig::riscv("RISC-V") } else { UnitConfig::vtd("VT-d") };
    let areas = other.clone().without_nesting();
    // Where the kernel keeps no record behind a table, its entries are marked.
    let marking = UnitConfig { dirty_tracking_nested: false, ..UnitConfig::amd("AMD, by its marks") };
    [(other, Strategy::Nested), (marking, Strategy::Nested), (areas, Strategy::Areas), (UnitConfig::smmuv3("SMMUv3"), Strategy::Areas)]
}

#[test]
fn no_write_is_missing_while_the_guest_goes_on() {
    for arch in Arch::ALL {
        for ((host, strategy), seed) in hosts(arch).into_iter().zip(1..) {
            let mut life = Life::new(arch, host, strategy, seed);
            // Something happens before anybody asks.
            (0..20).for_each(|_| life.step());
            life.rig.viommu.host().context().track_dirty(true).unwrap();
            (life.written, life.is_quiet) = (BTreeSet::new(), true);
            life.read(false);
            for round in 0..120 {
                // Most looks are after a change or several, some after none.
                match round % 6 {
                    0 => (0..4).for_each(|_| life.write()),
                    _ => (0..round % 3 + 1).for_each(|_| life.step()),
                }
                life.read(round % 4 != 3);
            }
            assert!(life.writes > 300 && life.exact > 2, "{}: {} writes, {} times exact", life.what, life.writes, life.exact);
            // Devices go, and with them address spaces: what these know is told after them.
            for (device, id) in [(0, ONE), (1, TWO)] {
                (0..8).for_each(|_| life.write());
                life.rig.viommu.disconnect(id);
                (life.ways[device], life.is_quiet) = (Way::Abort, false);
            }
            life.read(true);
            life.read(true);
            life.rig.viommu.host().context().track_dirty(false).unwrap();
            let Life { rig, what, .. } = life;
            assert!(rig.viommu.host().context().dirty(ALL, true).is_err(), "{what}: nobody records");
            assert_eq!(rig.viommu.figures().host_errors, 0, "{what}");
            rig.end(&what);
        }
    }
}
