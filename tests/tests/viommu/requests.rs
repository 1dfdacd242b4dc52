//! Devices that ask for pages: answered by the guest's tables, or by the guest, in its own architecture's records and commands.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use stagecraft::ioasid::{Context, GuestMemory, GuestView, Request, Setup, Strategy, TableSupply};
use stagecraft::kernel::Kernel;
use stagecraft::kernel::sim::{DeviceConfig, SimBuilder, UnitConfig};
use stagecraft::plugin::queue::{Answer, PageRequest};
use stagecraft::plugin::{Outcome, Policy, Supervisor, Supervisors};
use stagecraft::viommu::{ContextSpaces, Limits, PageResponse, UnitConfig as ViommuConfig, Viommu};
use stagecraft::{Access, Iova};

use super::behaviour::{ONE, Rig, TWO, Watched, plugin, without_pasid};
use super::guests::{Arch, DATA, Guest};
use super::kernel::plugins;

const IOVA: u64 = 0x12_3456_7000;

fn rig(arch: Arch, limits: Limits) -> (Rig, u64) {
    let supervisor = Supervisor::new(plugin(arch.kind()), Policy::default());
    let mut rig = Rig::with(Guest::new(arch), supervisor, arch.kind(), arch.registers_with_requests(), limits);
    let root = rig.guest.new_table();
    rig.guest.map_page(root, IOVA, DATA, true);
    rig.guest.translate(ONE, root, 7);
    rig.viommu.connect(ONE, false);
    (rig, root)
}

fn request(id: u64, iova: u64, write: bool, group: u16, last: bool) -> PageRequest {
    let access = Access { read: !write, write };
    PageRequest { requester: without_pasid(id), address: Iova(iova), access, execute: false, privileged: false, group, last }
}

fn answered(id: u64, group: u16, answer: Answer) -> PageResponse {
    PageResponse { requester: without_pasid(id), group, answer }
}

#[test]
fn the_guest_is_asked_for_what_its_tables_lack_and_answers_by_command() {
    for arch in Arch::ALL {
        let (mut rig, root) = rig(arch, Limits::default());
        // A page that the guest mapped and did not announce: nobody asks it.
        rig.guest.map_page(root, IOVA + 0x1000, DATA + 0x1000, false);
        assert_eq!(rig.reads(ONE, IOVA + 0x1000), None, "{arch:?}");
        let handled = rig.viommu.page_requests(&[request(ONE, IOVA + 0x1008, false, 3, true)]);
        assert_eq!((handled.responses, handled.page_requests.len()), (vec![answered(ONE, 3, Answer::Success)], 0), "{arch:?}");
        assert_eq!(rig.reads(ONE, IOVA + 0x1000), Some(DATA + 0x1000), "{arch:?}");
        // A group of a page that is there and one that may not be written: nothing happens before the last one, and then the guest hears of both.
        let group = [request(ONE, IOVA + 0x20, true, 0x1a5, false), request(ONE, IOVA + 0x1234, true, 0x1a5, true)];
        let handled = rig.viommu.page_requests(&group[..1]);
        assert_eq!((handled.responses.len(), handled.page_requests.len(), handled.spaces), (0, 0, 0), "{arch:?}");
        let handled = rig.viommu.page_requests(&group[1..]);
        let read: Vec<_> = handled.page_requests.iter().map(|record| arch.requested(&record.bytes)).collect();
        assert_eq!(read, [(ONE, IOVA, true, 0x1a5, false), (ONE, IOVA + 0x1000, true, 0x1a5, true)], "{arch:?}");
        assert_eq!((handled.responses.len(), handled.events.len()), (0, 0), "{arch:?}: it waits");
        // Answers to other groups, and of other devices, are nobody's.
        let others = [arch.answer(ONE, 0x1a4, true), arch.answer(TWO, 0x1a5, true)];
        assert_eq!(rig.commands(&others).responses, [], "{arch:?}");
        // It maps the page and answers: by then the host has it, announced or not.
        rig.guest.map_page(root, IOVA + 0x1000, DATA + 0x1000, true);
        assert!(!rig.writes(ONE, IOVA + 0x1000), "{arch:?}");
        let handled = rig.commands(&[arch.answer(ONE, 0x1a5, true)]);
        assert_eq!((handled.illegal, handled.responses), (None, vec![answered(ONE, 0x1a5, Answer::Success)]), "{arch:?}");
        assert!(rig.writes(ONE, IOVA + 0x1000), "{arch:?}");
        assert_eq!(rig.commands(&[arch.answer(ONE, 0x1a5, true)]).responses, [], "{arch:?}: it was answered");
        // One that it refuses.
        let handled = rig.viommu.page_requests(&[request(ONE, IOVA + 0x5000, false, 0, true)]);
        assert_eq!(handled.page_requests.len(), 1, "{arch:?}");
        let handled = rig.commands(&[arch.answer(ONE, 0, false)]);
        assert_eq!(handled.responses, [answered(ONE, 0, Answer::Invalid)], "{arch:?}");
        assert_eq!(rig.reads(ONE, IOVA + 0x5000), None, "{arch:?}");
        assert_eq!((rig.viommu.figures().page_requests, rig.viommu.figures().refused_requests), (3, 0), "{arch:?}");
    }
}

#[test]
fn devices_cannot_make_anybody_wait_without_end() {
    let arch = Arch::Riscv;
    let (mut rig, _) = rig(arch, Limits { page_requests: 2, ..Limits::default() });
    let ask = |rig: &mut Rig, group, last| rig.viommu.page_requests(&[request(ONE, IOVA + 0x5000, false, group, last)]);
    assert_eq!(ask(&mut rig, 0, true).page_requests.len(), 1);
    assert_eq!(ask(&mut rig, 1, true).page_requests.len(), 1);
    // Full: the device is to try again, and nothing is kept.
    assert_eq!(ask(&mut rig, 2, false).responses, []);
    assert_eq!(ask(&mut rig, 2, true).responses, [answered(ONE, 2, Answer::Success)]);
    // The same group again, while the guest thinks about it.
    assert_eq!(ask(&mut rig, 1, true).responses, [answered(ONE, 1, Answer::Success)]);
    assert_eq!(ask(&mut rig, 512, true).responses, [answered(ONE, 512, Answer::Invalid)]);
    assert_eq!(rig.viommu.figures().refused_requests, 4);
    // There is room again.
    rig.commands(&[arch.answer(ONE, 0, false)]);
    assert_eq!(ask(&mut rig, 2, true).page_requests.len(), 1);
    // A device that goes waits for nothing.
    rig.viommu.disconnect(ONE);
    assert_eq!(rig.commands(&[arch.answer(ONE, 1, true)]).responses, []);
    rig.viommu.connect(ONE, false);
    assert_eq!(ask(&mut rig, 1, true).page_requests.len(), 1);
}

/// A unit without such a queue: its tables are the answer, and what they refuse is an event.
#[test]
fn a_guest_without_page_requests_is_told_of_a_fault() {
    let mut rig = Rig::new(Arch::Smmu, Limits::default());
    let root = rig.guest.new_table();
    rig.guest.map_page(root, IOVA, DATA, true);
    rig.guest.translate(ONE, root, 7);
    rig.viommu.connect(ONE, false);
    rig.guest.map_page(root, IOVA + 0x1000, DATA + 0x1000, false);
    let handled = rig.viommu.page_requests(&[request(ONE, IOVA + 0x1000, false, 1, true)]);
    assert_eq!((handled.responses, handled.events.len()), (vec![answered(ONE, 1, Answer::Success)], 0));
    assert_eq!(rig.reads(ONE, IOVA + 0x1000), Some(DATA + 0x1000));
    let handled = rig.viommu.page_requests(&[request(ONE, IOVA + 0x1000, true, 1, true)]);
    assert_eq!((handled.responses, handled.events.len()), (vec![answered(ONE, 1, Answer::Invalid)], 1), "read-only");
    let handled = rig.viommu.page_requests(&[request(ONE, IOVA + 0x2000, false, 1, true)]);
    assert_eq!(handled.responses, [answered(ONE, 1, Answer::Invalid)]);
    assert_eq!(handled.events[0].bytes, Arch::Smmu.nothing_mapped(ONE, 7, IOVA + 0x2000, false));
    assert_eq!(rig.viommu.page_requests(&[request(TWO, IOVA, false, 1, true)]).responses, [answered(TWO, 1, Answer::Invalid)], "nobody connected it");
}

/// From a device's DMA to the guest's driver and back, over a kernel: every guest on every unit that can wait.
#[test]
fn a_device_waits_for_a_page_that_the_guest_maps_when_it_is_asked() {
    for arch in Arch::ALL {
        for host in [UnitConfig::vtd("host"), UnitConfig::smmuv3("host"), UnitConfig::riscv("host")] {
            let what = format!("{arch:?} on {:?}", host.kind);
            let guest = Guest::new(arch);
            let root = guest.new_table();
            guest.map_page(root, IOVA, DATA, true);
            guest.translate(ONE, root, 7);
            let mut builder = SimBuilder::new();
            let unit = builder.unit(host);
            builder.device(DeviceConfig::new("one", 1), &[unit]);
            let sim = builder.build().unwrap();
            sim.set_patience(20_000);
            sim.register_memory(&Arc::new(guest.memory.clone())).unwrap();
            let kernel: Arc<dyn Kernel> = Arc::clone(&sim) as Arc<dyn Kernel>;
            let supervisors = Supervisors::new(plugins(), Policy::default());
            let setup = Setup {
                tables: Arc::clone(&sim) as Arc<dyn TableSupply>,
                supervisors: Some(supervisors.clone()),
                ..Setup::new(kernel, plugins(), GuestMemory::of_mmap(&guest.memory).unwrap())
            };
            let template = Request::guest(GuestView { outcome: Outcome::Bypass, id: 0 }).with_page_requests().with_strategies(&[Strategy::Nested]);
            let mut spaces = ContextSpaces::new(Context::with(setup).unwrap(), template);
            spaces.connect(ONE, "one").unwrap();
            let unit = ViommuConfig {
                kind: arch.kind().to_owned(),
                registers: arch.registers_with_requests(),
                map: Guest::map(),
                limits: Limits::default(),
            };
            let supervisor = supervisors.by_unit(arch.kind()).unwrap();
            let mut viommu = Viommu::new(supervisor, unit, guest.memory.clone(), spaces, Box::new(Watched::default()));
            viommu.connect(ONE, false);
            let device = sim.device("one").unwrap();
            // Pages that the driver maps, does not map, and has mapped without a word.
            for (page, maps) in [(1, true), (2, false), (3, true), (4, true)] {
                let iova = IOVA + (page << 12);
                let done = AtomicBool::new(false);
                let mut asked = 0;
                if page == 4 {
                    guest.map_page(root, iova, DATA + (page << 12), true);
                }
                let reached = std::thread::scope(|scope| {
                    let dma = scope.spawn(|| {
                        let reached = device.write(None, Iova(iova + 8), &[page as u8]).is_ok();
                        done.store(true, Ordering::Release);
                        reached
                    });
                    while !done.load(Ordering::Acquire) {
                        let handled = viommu.serve_page_requests().unwrap();
                        assert!(handled.unanswered.is_none(), "{what}");
                        // The guest's driver.
                        for record in handled.page_requests {
                            let (id, page, write, group, last) = arch.requested(&record.bytes);
                            assert_eq!((id, page, write, last), (ONE, iova, true, true), "{what}");
                            asked += 1;
                            if maps {
                                guest.map_page(root, iova, DATA + (iova - IOVA), true);
                            }
                            let commands = [arch.answer(id, group, maps), arch.wait()].concat();
                            let handled = viommu.commands(&commands).unwrap();
                            assert_eq!((handled.illegal, handled.responses.len(), handled.unanswered.is_none()), (None, 1, true), "{what}");
                        }
                        std::thread::yield_now();
                    }
                    dma.join().unwrap()
                });
                assert_eq!((reached, asked), (maps, u64::from(page != 4)), "{what}, page {page}");
                if maps {
                    assert_eq!(guest.load(DATA + (page << 12) + 8) & 0xff, page, "{what}");
                }
            }
            viommu.disconnect(ONE);
            viommu.host_mut().disconnect(ONE);
            drop(viommu);
            assert_eq!((sim.objects(), sim.pinned_pages(), sim.areas()), (0, 0, 0), "{what}: nothing is left in the kernel");
        }
    }
}
