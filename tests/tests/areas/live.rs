//! A running guest with tables of its own, on a host that takes only areas: the whole way from its entries to DMA.

use stagecraft::kernel::sim::{Call, DmaAccess};
use stagecraft::plugin::Tag;
use stagecraft::plugin::queue::{Effect, Invalidation, Scope};
use stagecraft::sync::{Areas, Live, Shadow, ShadowLimits, Unwatched};
use stagecraft::{Gpa, Iova, Span};
use stagecraft_tests::reference::generate::Rng;
use vm_memory::GuestMemoryBackend;

use super::configs;
use super::guest::{DATA, Guest, MEMORY, PS, RO, RW};
use stagecraft::kernel::Kernel;
use stagecraft::kernel::handle::Device;
use stagecraft::kernel::sim::{DeviceConfig, Sim, SimBuilder, UnitConfig};
use stagecraft::pins::{Backing, Pins, Region};
use std::sync::Arc;

struct Machine {
    sim: Arc<Sim>,
    live: Live<Areas>,
    guest: Guest,
    user: u64,
}

impl Machine {
    fn new(join: u64) -> Self {
        let guest = Guest::new();
        let mut builder = SimBuilder::new();
        let units = ["one", "two"].map(|name| builder.unit(UnitConfig::riscv(name).without_nesting()));
        builder.device(DeviceConfig::new("dev", 1), &units[..1]).device(DeviceConfig::new("other", 2), &units[1..]);
        let sim = builder.build().unwrap();
        sim.register_memory(&guest.memory).unwrap();
        let user = guest.memory.iter().next().unwrap().get_mmap().as_ptr() as u64;
        let kernel: Arc<dyn Kernel> = Arc::clone(&sim) as Arc<dyn Kernel>;
        let pins = Pins::new(&kernel, MEMORY).unwrap();
        let backing = Backing::User(user);
        pins.add(&Region { gpa: Gpa(0), length: MEMORY, backing, writable: true, block: None }).unwrap();
        let mut areas = Areas::new(&pins, stagecraft::sync::AreaLimits { join, ..stagecraft::sync::AreaLimits::default() }).unwrap();
        for label in ["dev", "other"] {
            areas.attach(&Device::bind(&kernel, label).unwrap(), None).unwrap();
        }
        let config = guest.config();
        let format = Box::new(configs::plugins().by_format(&config.format).unwrap().open(&config).unwrap());
        let shadow = Shadow::open(format, Guest::map(), ShadowLimits::default(), Box::new(Unwatched)).unwrap();
        Self { sim, live: Live::new(shadow, areas, Tag::default(), 0, 1 << 10), guest, user }
    }

    /// What the guest's tables say of a page, read naively.
    fn expected(&self, iova: u64, write: bool) -> Option<u64> {
        let mut table = self.guest.root();
        for height in (0..4).rev() {
            let entry = self.guest.load(table + (iova >> (12 + 9 * height) & 0x1ff) * 8);
            if entry & 1 == 0 || write && entry & 2 == 0 {
                return None;
            }
            if height == 0 || height < 3 && entry & PS != 0 {
                let low = (1_u64 << (12 + 9 * height)) - 1;
                let target = (entry & 0x000f_ffff_ffff_f000 & !low) + (iova & low);
                return (target < MEMORY).then(|| self.user + target);
            }
            table = entry & 0x000f_ffff_ffff_f000;
        }
        None
    }

    fn check(&self, pages: impl IntoIterator<Item = u64>) -> usize {
        let devices = ["dev", "other"].map(|label| self.sim.device(label).unwrap());
        let mut translated = 0;
        for page in pages {
            for (write, access) in [(false, DmaAccess::Read), (true, DmaAccess::Write)] {
                let wanted = self.expected(page, write);
                for device in &devices {
                    let found = device.translate(None, Iova(page), access);
                    assert_eq!(found.as_ref().ok().map(|found| found.user_address), wanted, "{access:?} at {page:#x}: {found:?}");
                }
                translated += usize::from(wanted.is_some());
            }
        }
        translated
    }
}

fn range(first: u64, last: u64) -> Invalidation {
    let scope = Scope { leaf: false, second_stage: false, domain: None, space: None, id: None };
    Invalidation { index: 0, effect: Effect::Range { scope, iova: Span { first, last } } }
}

#[test]
fn a_guest_on_a_host_without_nesting() {
    for (seed, join) in [(1, 0), (2, 2 << 20), (3, 16 << 12)] {
        let mut machine = Machine::new(join);
        let mut rng = Rng::new(seed);
        for index in 0..4 {
            machine.guest.put(index << 21, 1, (DATA + (index << 21)) | RW | PS);
        }
        (0..512).for_each(|index| machine.guest.put(4 << 21 | index << 12, 0, (DATA + (index << 12)) | RW));
        machine.live.synchronise(&machine.guest.view()).unwrap();
        let mut translated = machine.check((0..5 << 9).map(|index| index << 12));
        for round in 0..150_u32 {
            let index = rng.below(4);
            match rng.below(4) {
                0 if machine.guest.load(machine.guest.slot(index << 21, 1).0) & PS != 0 => machine.guest.split(index << 21),
                1 => machine.guest.put(index << 21, 1, (DATA + (rng.below(4) << 21)) | RW | PS),
                _ => {}
            }
            for _ in 0..rng.below(6) {
                let page = if machine.guest.load(machine.guest.slot(index << 21, 1).0) & PS == 0 { index << 9 } else { 4 << 9 } + rng.below(512);
                // Beyond memory now and then.
                let target = rng.below(MEMORY + (1 << 20)) & !0xfff;
                machine.guest.put(page << 12, 0, rng.pick(&[0, target | RW, target | RO]));
            }
            machine.live.invalidate(&machine.guest.view(), &[range(0, 0xff_ffff)]).unwrap();
            let others: Vec<u64> = (0..60).map(|_| rng.below(6 << 9) << 12).collect();
            translated += machine.check(others);
            if round % 30 == 29 {
                translated += machine.check((0..5 << 9).map(|index| index << 12));
            }
        }
        let figures = machine.live.sink().figures();
        assert!(translated > 4000 && figures.swaps > 0 && figures.failures == 0 && figures.interrupted == 0, "{figures:?}, {translated} translated");
        assert!(machine.sim.calls()[&Call::Map] == 1, "memory is pinned once");
    }
}
