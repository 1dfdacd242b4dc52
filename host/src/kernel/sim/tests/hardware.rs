//! Devices and the kernel's own tables: mirroring, paths, recoverable faults, events.

use super::{BASE, Lab, PAGE, RW};
use crate::Iova;
use crate::kernel::handle::{Device, FaultQueue, Ioas, PageTable};
use crate::kernel::sim::{Data, DmaAccess, Reason, Stage, UnitConfig};
use crate::kernel::{CopyRange, Errno, HwptFlags, Map, MapFile, MapFlags, PageResponse, ResponseCode};

#[test]
fn areas_reach_memory() {
    let lab = Lab::new(vec![UnitConfig::riscv("u").without_nesting()]);
    let device = Device::bind(&lab.kernel, "dev0").unwrap();
    let ioas = Ioas::alloc(&lab.kernel).unwrap();
    let dma = lab.sim.device("dev0").unwrap();
    let reason = |iova, access| dma.translate(None, Iova(iova), access).map(|found| found.user_address).map_err(|fault| (fault.reason, fault.stage));
    assert_eq!(reason(0, DmaAccess::Read), Err((Reason::NotAttached, Stage::Context)));
    let attachment = device.attach(None, PageTable::Ioas(&ioas)).unwrap();
    lab.map(ioas.id(), 0x1000, BASE, 2 * PAGE).unwrap();
    lab.kernel.ioas_map(ioas.id(), &Map { flags: MapFlags::READABLE, iova: Some(Iova(0x8000)), user_address: lab.user, length: PAGE }).unwrap();
    lab.kernel.ioas_map(ioas.id(), &Map { flags: MapFlags::WRITEABLE, iova: Some(Iova(0x9000)), user_address: lab.user, length: PAGE }).unwrap();
    assert_eq!(reason(0x2ffc, DmaAccess::Write), Ok(lab.user + 0x1ffc));
    assert_eq!(reason(0x3000, DmaAccess::Read), Err((Reason::NotPresent, Stage::Second)));
    assert_eq!(reason(0x8000, DmaAccess::Read), Ok(lab.user));
    assert_eq!(reason(0x8000, DmaAccess::Write), Err((Reason::Permission, Stage::Second)));
    assert_eq!(reason(0x9000, DmaAccess::Read), Err((Reason::Permission, Stage::Second)));
    dma.dma(None, Iova(0x1ffe), Data::Write(&[1, 2, 3, 4])).unwrap();
    let mut bytes = [0; 4];
    dma.dma(None, Iova(0x1ffe), Data::Read(&mut bytes)).unwrap();
    assert_eq!(bytes, [1, 2, 3, 4]);
    // Memory that is taken away under a mapping is a fault and nothing worse.
    lab.sim.unregister_region(lab.user).unwrap();
    assert_eq!(dma.read(None, Iova(0x1000), &mut bytes).unwrap_err().reason, Reason::NoMemory);
    drop((attachment, ioas));
    assert_eq!(reason(0x1000, DmaAccess::Read), Err((Reason::NotAttached, Stage::Context)));
    drop(device);
    lab.assert_clean();
}

#[test]
fn files_map_by_what_they_are() {
    use std::io::Write;
    use std::os::fd::AsFd;
    use vm_memory::{FileOffset, MmapRegion};
    let lab = Lab::new(vec![UnitConfig::vtd("u")]);
    let name = std::env::temp_dir().join(format!("stagecraft-sim-{}", std::process::id()));
    let mut file = std::fs::OpenOptions::new().read(true).write(true).create_new(true).open(&name).unwrap();
    std::fs::remove_file(&name).unwrap();
    file.write_all(&[7; 8192]).unwrap();
    let region = std::sync::Arc::new(MmapRegion::from_file(FileOffset::new(file.try_clone().unwrap(), 0), 8192).unwrap());
    lab.sim.register_region(region).unwrap();
    let ioas = Ioas::alloc(&lab.kernel).unwrap();
    let map = |file, start, length| lab.kernel.ioas_map_file(ioas.id(), &MapFile { flags: RW, iova: Some(Iova(0x1000)), file, start, length });
    let other = std::fs::File::open("/dev/null").unwrap();
    assert_eq!(map(other.as_fd(), 0, PAGE), Err(Errno::EINVAL));
    assert_eq!(map(file.as_fd(), PAGE, 2 * PAGE), Err(Errno::EINVAL));
    assert_eq!(map(file.as_fd(), PAGE, PAGE), Ok(Iova(0x1000)));
    let device = Device::bind(&lab.kernel, "dev0").unwrap();
    let attachment = device.attach(None, PageTable::Ioas(&ioas)).unwrap();
    let mut byte = [0];
    lab.sim.device("dev0").unwrap().read(None, Iova(0x1000), &mut byte).unwrap();
    assert_eq!((byte, lab.sim.pinned_pages()), ([7], 1));
    drop((attachment, device, ioas));
    lab.assert_clean();
}

#[test]
fn two_units_hold_the_same_all_or_nothing() {
    let lab = Lab::new(vec![UnitConfig::vtd("one"), UnitConfig::amd("two"), UnitConfig::smmuv3("three")]);
    let devices: Vec<Device> = ["dev0", "dev1", "dev2", "both"].iter().map(|label| Device::bind(&lab.kernel, label).unwrap()).collect();
    let (ioas, source) = (Ioas::alloc(&lab.kernel).unwrap(), Ioas::alloc(&lab.kernel).unwrap());
    lab.map(source.id(), 0x1000, BASE, PAGE).unwrap();
    lab.map(source.id(), 0x2000, BASE + 8 * PAGE, PAGE).unwrap();
    let attachments: Vec<_> = devices.iter().map(|device| device.attach(None, PageTable::Ioas(&ioas)).unwrap()).collect();
    let counts = || lab.sim.mirrored().into_iter().map(|(_, count)| count).collect::<Vec<_>>();
    assert_eq!(counts(), [0; 6], "a table for each unit, and three more for the path through all of them");
    lab.map(ioas.id(), 0x10_0000, BASE, PAGE).unwrap();
    assert_eq!(counts(), [1; 6]);
    let copy = CopyRange {
        flags: RW,
        destination: ioas.id(),
        destination_iova: Some(Iova(0x20_0000)),
        source: source.id(),
        source_iova: Iova(0x1000),
        length: 2 * PAGE,
    };
    // Each step on the way fails once: no unit has anything of it then, and no page stays pinned.
    for step in 1.. {
        let pinned = lab.sim.pinned_pages();
        lab.sim.fail_step_nth(step, Errno::ENOMEM);
        let result = lab.kernel.ioas_copy(&copy);
        if !lab.sim.disarm() {
            assert_eq!(result, Err(Errno::ENOMEM), "step {step}");
            assert_eq!((counts(), lab.sim.pinned_pages()), (vec![1; 6], pinned), "step {step}");
            assert_eq!(lab.sim.areas(), 3);
            continue;
        }
        assert_eq!(result, Ok(Iova(0x20_0000)));
        assert!(step > 12, "two areas in six tables: {step}");
        break;
    }
    assert_eq!(counts(), [3; 6]);
    for label in ["dev0", "dev1", "dev2", "both"] {
        let found = lab.sim.device(label).unwrap().translate(None, Iova(0x20_1004), DmaAccess::Write).unwrap();
        assert_eq!(found.user_address, lab.at(BASE + 8 * PAGE + 4));
    }
    lab.kernel.ioas_unmap(ioas.id(), Iova(0x20_0000), 2 * PAGE).unwrap();
    assert_eq!(counts(), [1; 6]);
    drop(attachments);
    assert!(counts().is_empty(), "page tables that attachments made go with them");
    drop((devices, ioas, source));
    lab.assert_clean();
}

#[test]
fn page_tables_are_found_again() {
    let lab = Lab::new(vec![UnitConfig::vtd("u")]);
    let (one, two) = (Device::bind(&lab.kernel, "dev0").unwrap(), Device::bind(&lab.kernel, "twin0").unwrap());
    let ioas = Ioas::alloc(&lab.kernel).unwrap();
    let first = one.attach(None, PageTable::Ioas(&ioas)).unwrap();
    let second = two.attach(None, PageTable::Ioas(&ioas)).unwrap();
    assert_eq!(first.hwpt(), second.hwpt());
    let own = ioas.hwpt(&one, HwptFlags::NONE, None).unwrap();
    let third = one.attach(None, PageTable::Hwpt(&own)).unwrap();
    assert_eq!(third.hwpt(), own.id());
    assert_eq!(lab.kernel.destroy(own.id().into()), Err(Errno::EBUSY));
    drop((third, first, second, own, one, two, ioas));
    lab.assert_clean();
}

#[test]
fn recoverable_faults() {
    let lab = Lab::new(vec![UnitConfig::vtd("u")]);
    let device = Device::bind(&lab.kernel, "dev0").unwrap();
    let (ioas, queue) = (Ioas::alloc(&lab.kernel).unwrap(), FaultQueue::alloc(&lab.kernel).unwrap());
    let hwpt = ioas.hwpt(&device, HwptFlags::NONE, Some(&queue)).unwrap();
    let attachment = device.attach(None, PageTable::Hwpt(&hwpt)).unwrap();
    let dma = lab.sim.device("dev0").unwrap();
    let next_fault = || {
        loop {
            if let Some(fault) = lab.kernel.read_faults(queue.id()).unwrap().first() {
                return *fault;
            }
            std::thread::yield_now();
        }
    };
    let respond = |cookie, code| lab.kernel.respond(queue.id(), PageResponse { cookie, code });
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| dma.write(None, Iova(0x5008), &[1; 4]));
        let fault = next_fault();
        assert_eq!((fault.address, fault.read, fault.write, fault.device), (Iova(0x5000), false, true, device.id()));
        assert_eq!(respond(fault.cookie + 1, ResponseCode::Success), Err(Errno::EINVAL));
        lab.map(ioas.id(), 0x5000, BASE, PAGE).unwrap();
        respond(fault.cookie, ResponseCode::Success).unwrap();
        assert_eq!(waiting.join().unwrap(), Ok(()));
        assert_eq!(respond(fault.cookie, ResponseCode::Success), Err(Errno::EINVAL), "answered already");

        let refused = scope.spawn(|| dma.write(None, Iova(0x6000), &[1; 4]));
        respond(next_fault().cookie, ResponseCode::Invalid).unwrap();
        assert_eq!(refused.join().unwrap().unwrap_err().reason, Reason::Refused);

        let in_vain = scope.spawn(|| dma.write(None, Iova(0x6000), &[1; 4]));
        for _ in 0..8 {
            respond(next_fault().cookie, ResponseCode::Success).unwrap();
        }
        assert_eq!(in_vain.join().unwrap().unwrap_err().reason, Reason::TimedOut);

        let detached = scope.spawn(|| dma.write(None, Iova(0x6000), &[1; 4]));
        next_fault();
        drop(attachment);
        assert_eq!(detached.join().unwrap().unwrap_err().reason, Reason::Refused, "detaching answers what waits");
    });
    let attachment = device.attach(None, PageTable::Hwpt(&hwpt)).unwrap();
    lab.sim.set_patience(2);
    assert_eq!(dma.write(None, Iova(0x6000), &[1; 4]).unwrap_err().reason, Reason::TimedOut);
    assert_eq!(lab.kernel.read_faults(queue.id()), Ok(vec![]), "nobody waits for an answer any more");
    assert_eq!(lab.kernel.destroy(queue.id().into()), Err(Errno::EBUSY));
    drop((attachment, hwpt, queue, ioas, device));
    lab.assert_clean();
}

#[test]
fn events_are_records_of_the_architecture() {
    use super::nested::{Arch, Rig};
    for (arch, kind, wanted) in [
        // F_TRANSLATION, StreamID 0x42; RnW, class input.
        (Arch::Arm, 1, vec![0x10 | 0x42 << 32, 1 << 35 | 2 << 40, 0x1000, 0]),
        // IO_PAGE_FAULT; GN, US.
        (Arch::Amd, 0x5347_0001, vec![0x42 | 1 << 48 | 1 << 50 | 2 << 60, 0x1000]),
        // Page fault on a read; untranslated read.
        (Arch::Riscv, 0x5347_0002, vec![13 | 2 << 34 | 0x42 << 40, 0, 0x1000, 0]),
    ] {
        let rig = Rig::new(arch);
        let queue = rig.event_queue(kind, 2);
        let words = || {
            let events = rig.lab.kernel.read_events(queue.id()).unwrap();
            let words = |record: Vec<u8>| record.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect::<Vec<_>>();
            events.into_iter().map(|event| (event.sequence, event.record.map(words))).collect::<Vec<_>>()
        };
        assert_eq!(words(), []);
        rig.reached(0x1000).unwrap_err();
        assert_eq!(words(), [(0, Some(wanted.clone()))], "{arch:?}");
        // The host's own faults are not the guest's.
        rig.leaf(0x2000, BASE - PAGE);
        rig.reached(0x2000).unwrap_err();
        assert_eq!(words(), []);
        for _ in 0..4 {
            rig.reached(0x1000).unwrap_err();
        }
        assert_eq!(words(), [(1, Some(wanted.clone())), (2, Some(wanted.clone())), (4, None)], "{arch:?}: two of four were lost");
        rig.reached(0x1000).unwrap_err();
        assert_eq!(words(), [(5, Some(wanted))], "{arch:?}");
        drop(queue);
        rig.finish();
    }
}

#[test]
fn nesting_on_a_path_of_two_units() {
    use super::nested::Arch;
    let lab = Lab::new(vec![UnitConfig::vtd("near"), UnitConfig::amd("far")]);
    let (device, ioas, parent) = lab.parent("both", HwptFlags::NONE);
    assert_eq!(lab.kernel.path(device.id()).unwrap().len(), 2);
    let root = BASE + 0x20_0000;
    for level in 0..3 {
        lab.store(root + level * PAGE, (root + (level + 1) * PAGE) | 7);
    }
    lab.store(root + 3 * PAGE, (BASE + 0x40_0000) | 7);
    let nested = Arch::Vtd.nested(&parent, None, &device, root);
    let attachment = device.attach(None, PageTable::Hwpt(&nested)).unwrap();
    let dma = lab.sim.device("both").unwrap();
    assert_eq!(dma.translate(None, Iova(0), DmaAccess::Read).unwrap().user_address, lab.at(BASE + 0x40_0000));
    // A unit that was forgotten, as no kernel call would: the path leads nowhere then.
    {
        let objects = crate::kernel::sim::lock::lock(&lab.sim.objects);
        let far = &objects.paging(parent.id().0).unwrap().domains[1];
        far.remove(BASE);
        let fault = dma.translate(None, Iova(8), DmaAccess::Read).unwrap_err();
        assert_eq!((fault.reason, fault.stage), (Reason::NotPresent, Stage::Second));
        let elsewhere = crate::kernel::sim::domain::Extent { last: u64::MAX, user_address: 0, read: true, write: true };
        far.insert(BASE, elsewhere);
        assert_eq!(dma.translate(None, Iova(8), DmaAccess::Read).unwrap_err().reason, Reason::PathDisagrees);
    }
    // The interrupt windows of both units count.
    let last = lab.kernel.ioas_iova_ranges(ioas.id()).unwrap().ranges.last().copied().unwrap();
    assert_eq!(last, crate::Span { first: 1 << 40, last: (1 << 57) - 1 });
    drop((attachment, nested, parent, ioas, device));
    lab.assert_clean();
}
