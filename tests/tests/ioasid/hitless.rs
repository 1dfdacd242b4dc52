//! Devices and device models use pages that stay, all the while a guest changes what is beside them, splits and merges the blocks that they are in, moves its root, and
//! devices go from one kind of host's side to another: not one transaction is missed, and each gets where it should. Whoever the guest is, and whatever its host takes.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use stagecraft::ioasid::{Context, Device, Ioasid, Request, Setup, SpaceLimits, Strategy};
use stagecraft::kernel::sim::DmaAccess;
use stagecraft::kernel::{Before, Invalidate, InvalidateError, InvalidateTarget, Kernel};
use stagecraft::lookup::{Limits, Lookup, LookupIommu, Miss};
use stagecraft::{Gpa, Iova};
use stagecraft_tests::reference::generate::Rng;
use vm_memory::{GuestAddress, Iommu as _, Permissions};

use crate::guests::{Arch, Guest};
use crate::rig::{DATA, EVERYTHING, Rig, Stop, page, range, unit};

const PAGE: u64 = 0x1000;
const BLOCK: u64 = 2 << 20;
/// A block that is split and merged; one of its pages says something else meanwhile.
const SPLIT: u64 = 0;
const OTHER: u64 = 100;
/// Small pages: the odd ones come and go.
const SMALL: u64 = BLOCK;
/// A block that comes and goes, whole or as a table.
const WHOLE: u64 = 2 * BLOCK;

/// Where an IOVA of the first two blocks goes, if it stays.
const fn target(iova: u64) -> u64 {
    DATA + iova
}

/// Pages that stay: in the block, and between those that come and go.
fn stay() -> Vec<u64> {
    let split = [0, 1, OTHER - 1, OTHER + 1, 255, 510, 511].map(|index| SPLIT + index * PAGE);
    split.into_iter().chain((0..16).map(|index| SMALL + index * 2 * PAGE)).collect()
}

/// An array of invalidations, kept.
#[derive(Debug)]
struct Kept {
    target: InvalidateTarget,
    data_type: u32,
    entry_length: u32,
    entries: Vec<u8>,
}

/// A kernel whose units forget what they know whenever they are asked to: each transaction after that walks.
#[derive(Debug)]
struct Forgetting {
    kernel: Arc<dyn Kernel>,
    /// The first for each target, which is for all that the guest has.
    first: Mutex<Vec<Kept>>,
}

impl Forgetting {
    fn forget(&self) {
        for Kept { target, data_type, entry_length, entries } in &*self.first.lock().unwrap() {
            // A target that is gone has nothing to forget.
            let _ = self.kernel.hwpt_invalidate(&Invalidate { target: *target, data_type: *data_type, entry_length: *entry_length, entries });
        }
    }
}

impl Before for Forgetting {
    fn behind(&self) -> &dyn Kernel {
        &*self.kernel
    }

    fn invalidate(&self, request: &Invalidate<'_>) -> Result<u32, InvalidateError> {
        let mut first = self.first.lock().unwrap();
        if !request.entries.is_empty() && first.iter().all(|kept| kept.target != request.target) {
            let Invalidate { target, data_type, entry_length, entries } = *request;
            first.push(Kept { target, data_type, entry_length, entries: entries.to_vec() });
        }
        drop(first);
        self.kernel.hwpt_invalidate(request)
    }
}

/// A guest, and who uses its memory by its tables.
struct Scene<'a> {
    guest: Guest,
    ioasids: Vec<Ioasid>,
    lookups: Vec<Lookup>,
    device: Option<Device>,
    rig: &'a Rig,
    /// What the guest says of pages that do not stay.
    says: BTreeMap<u64, Option<u64>>,
    /// A unit walks the guest's own table: nothing counts for it but commands.
    native: bool,
    is_split: bool,
}

impl<'a> Scene<'a> {
    fn new(rig: &'a Rig, context: &Context, arch: Arch, strategies: &[Strategy]) -> Self {
        let guest = Guest::new(arch, &rig.memory);
        let of = |strategy: &Strategy| {
            // So few nodes that they are used again and again.
            let lookup = Limits { nodes: 12 };
            let request = Request::guest(guest.view()).with_limits(SpaceLimits { lookup, ..SpaceLimits::default() });
            context.allocate(request.with_strategies(&[*strategy, Strategy::Software])).unwrap()
        };
        let ioasids: Vec<Ioasid> = strategies.iter().map(of).collect();
        // Where nothing else is looked at, devices are looked at more often.
        let looked_up = ioasids.iter().filter(|_| strategies != [Strategy::Nested]);
        let lookups = looked_up.map(|ioasid| ioasid.lookup().unwrap()).collect();
        let device = (strategies != [Strategy::Software]).then(|| context.connect("nic").unwrap());
        let native = strategies.contains(&Strategy::Native);
        let this = Self { guest, ioasids, lookups, device, rig, says: BTreeMap::new(), native, is_split: false };
        // All of it comes, goes and comes: what is invalidated first of each table is all of it.
        for (index, ioasid) in this.ioasids.iter().enumerate() {
            this.fill();
            ioasid.synchronise().unwrap();
            if let Some(device) = &this.device {
                if index == 0 { ioasid.attach(device, None) } else { ioasid.replace(device, None) }.unwrap();
                assert_eq!(ioasid.strategies(), strategies[index..=index]);
            }
            for iova in [SPLIT, SMALL, WHOLE] {
                this.guest.unmap_large(iova);
            }
            this.ioasids[..=index].iter().for_each(|ioasid| drop(ioasid.invalidate(&[EVERYTHING]).unwrap()));
        }
        this.fill();
        this.ioasids.iter().for_each(|ioasid| drop(ioasid.invalidate(&[EVERYTHING]).unwrap()));
        this
    }

    fn fill(&self) {
        self.guest.map_large(SPLIT, target(SPLIT), true);
        self.guest.split(SMALL, target(SMALL), true);
        self.guest.map_large(WHOLE, target(SPLIT), true);
    }

    /// Changes something beside what stays; where entries were written, and the IOVAs that it concerns.
    fn change(&mut self, rng: &mut Rng) -> (Vec<u64>, u64, u64) {
        let elsewhere = DATA + 2 * BLOCK + (rng.below(512) << 12);
        match rng.below(4) {
            0 | 1 => {
                let other = SPLIT + OTHER * PAGE;
                self.is_split ^= true;
                let (slot, says) = if self.is_split {
                    let says = rng.pick(&[None, Some(elsewhere), Some(target(other))]);
                    let entry = says.map_or(0, |address| self.guest.arch.leaf(address, 0, rng.percent(50)));
                    (self.guest.split_but(SPLIT, target(SPLIT), true, Some((OTHER, entry))), says)
                } else {
                    (self.guest.map_large(SPLIT, target(SPLIT), true), Some(target(other)))
                };
                self.says.insert(other, says);
                (vec![slot], SPLIT, SPLIT + BLOCK - 1)
            }
            2 => {
                let odd = SMALL + (rng.below(16) * 2 + 1) * PAGE;
                let says = rng.pick(&[None, Some(elsewhere), Some(target(odd))]);
                let slot = match says {
                    Some(address) => self.guest.map(odd, address, rng.percent(50)),
                    None => self.guest.unmap(odd),
                };
                self.says.insert(odd, says);
                (vec![slot], odd, odd | (PAGE - 1))
            }
            _ => {
                let says = rng.pick(&[None, Some(DATA + BLOCK), Some(DATA + 2 * BLOCK)]);
                let slot = match says {
                    Some(address) if rng.percent(50) => self.guest.map_large(WHOLE, address, true),
                    Some(address) => self.guest.split_but(WHOLE, address, true, None),
                    None => self.guest.unmap_large(WHOLE),
                };
                self.says.insert(WHOLE + 5 * PAGE, says.map(|address| address + 5 * PAGE));
                (vec![slot], WHOLE, WHOLE + BLOCK - 1)
            }
        }
    }

    /// One change, told in some way to all.
    fn step(&mut self, round: u64, rng: &mut Rng) {
        let (slots, first, last) = self.change(rng);
        let how = rng.below(if self.native { 2 } else { 4 });
        for ioasid in &self.ioasids {
            match how {
                0 if first | (PAGE - 1) == last => drop(ioasid.invalidate(&[page(first)]).unwrap()),
                0 => drop(ioasid.invalidate(&[range(first, last, false)]).unwrap()),
                1 => drop(ioasid.invalidate(&[EVERYTHING]).unwrap()),
                2 => slots.iter().for_each(|slot| drop(ioasid.table_written(Gpa(*slot), 8).unwrap())),
                _ => drop(ioasid.synchronise().unwrap()),
            }
        }
        if rng.percent(10) {
            self.guest.move_root();
            self.ioasids.iter().for_each(|ioasid| drop(ioasid.switch(self.guest.view()).unwrap()));
        }
        if let Some(device) = self.device.as_ref().filter(|_| rng.percent(20)) {
            let to = rng.pick(&[0, 1, 2]) % self.ioasids.len();
            self.ioasids[to].replace(device, None).unwrap();
            self.ioasids[to].reconsider().unwrap();
        }
        for (iova, says) in self.says.range(first..=last) {
            assert!(self.device.is_none() || self.rig.dma("nic", *iova) == *says, "round {round}, told by {how}: {iova:#x} is not {says:x?}");
            for lookup in &self.lookups {
                assert_eq!(lookup.find(Iova(*iova)).map(|target| target.address.0), *says, "round {round}, told by {how}: {iova:#x}");
            }
        }
    }
}

/// Changes, so many; meanwhile all that stays is used.
fn nobody_misses(host: Arch, arch: Arch, strategies: &[Strategy], rounds: u64) {
    let what = format!("{arch:?} on {host:?}, {strategies:?}");
    let unit = if strategies == [Strategy::Areas] { unit(host).without_nesting() } else { unit(host) };
    let rig = Rig::new(&[unit], &[("nic", &[0])]);
    {
        let forgetting = Arc::new(Forgetting { kernel: rig.kernel(), first: Mutex::default() });
        let context = Context::with(Setup { kernel: Arc::clone(&forgetting) as Arc<dyn Kernel>, ..rig.setup() }).unwrap();
        let mut scene = Scene::new(&rig, &context, arch, strategies);
        let models: Vec<_> = scene.lookups.iter().map(|lookup| LookupIommu::new(lookup.clone(), |_: &Miss| Err("it is a miss".to_owned()))).collect();
        let device = scene.device.is_some().then(|| rig.sim.device("nic").unwrap());
        let memory = rig.memory_at();
        let (stop, done, stay) = (AtomicBool::new(false), AtomicU64::new(0), stay());
        std::thread::scope(|scope| {
            let uses = scope.spawn(|| {
                let mut forgets = false;
                while !stop.load(Ordering::Relaxed) {
                    // Units that know where tables were, and such that know nothing.
                    forgets = !forgets;
                    for iova in &stay {
                        if forgets {
                            forgetting.forget();
                        }
                        if let Some(device) = &device {
                            let found = device.translate(None, Iova(*iova), DmaAccess::Write).unwrap_or_else(|fault| panic!("{what}: {fault}"));
                            assert_eq!(found.user_address - memory, target(*iova), "{what}: {iova:#x}");
                            if !forgets {
                                device.write(None, Iova(*iova), &[1, 2, 3]).unwrap_or_else(|fault| panic!("{what}: {fault}"));
                            }
                        }
                        for model in &models {
                            let found = model.translate(GuestAddress(*iova), 8, Permissions::ReadWrite);
                            let found: Vec<_> = found.unwrap_or_else(|error| panic!("{what}: {error}")).map(|range| range.base.0).collect();
                            assert_eq!(found, [target(*iova)], "{what}: {iova:#x}");
                        }
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
            let end = Stop(&stop);
            let mut rng = Rng::new(rounds);
            for round in 0..rounds {
                let before = done.load(Ordering::Relaxed);
                scene.step(round, &mut rng);
                // Nothing changes unseen.
                while done.load(Ordering::Relaxed) == before && !uses.is_finished() {
                    std::thread::yield_now();
                }
                if uses.is_finished() {
                    break;
                }
            }
            drop(end);
            uses.join().unwrap();
        });
        assert!(scene.ioasids.iter().all(|ioasid| ioasid.stats().attached <= 1));
    }
    rig.assert_clean();
}

#[test]
fn on_nested_tables() {
    for host in Arch::ALL {
        Arch::ALL.into_iter().for_each(|guest| nobody_misses(host, guest, &[Strategy::Nested], 200));
    }
}

#[test]
fn on_areas_of_units_that_nest_nothing() {
    for (host, guest) in Arch::ALL.into_iter().zip(Arch::ALL.into_iter().rev()) {
        nobody_misses(host, guest, &[Strategy::Areas], 60);
    }
}

#[test]
fn in_software() {
    Arch::ALL.into_iter().for_each(|guest| nobody_misses(Arch::Vtd, guest, &[Strategy::Software], 400));
}

#[test]
fn while_devices_go_from_one_kind_to_another() {
    for host in Arch::ALL {
        let foreign = if host == Arch::Arm { Arch::Vtd } else { Arch::Arm };
        nobody_misses(host, foreign, &[Strategy::Nested, Strategy::Areas], 60);
        // AMD's second table of its own is the kernel's.
        if host != Arch::Amd {
            nobody_misses(host, host, &[Strategy::Native, Strategy::Areas, Strategy::Nested], 60);
        }
    }
}
