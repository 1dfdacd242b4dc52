//! iommufd's errno contract, row by row.
//!
//! Most rows of mapping, unmapping, copying, allowed ranges, options, allocation and attachment that need one unit and no nesting were tried on Linux
//! 7.3.4, with an emulated VT-d unit and a device behind it; where the answers differed, the simulation was changed. Rows of nesting, vIOMMUs, dirty
//! bitmaps, two units and the limit of locked memory were not tried there.

use super::{BASE, Lab, PAGE, RW, SIZE};
use crate::kernel::handle::{Device, Ioas, PageTable};
use crate::kernel::sim::UnitConfig;
use crate::kernel::{
    CopyRange, DeviceId, DirtyFlags, DirtyRange, Errno, EventQueueAlloc, FaultQueueId, HwptAlloc, HwptFlags, HwptId, HwptParent, Invalidate,
    InvalidateTarget, IoasId, KernelOption, Map, MapFlags, ObjectId, PageResponse, PageTableId, Pasid, ResponseCode, Result, ViommuAlloc, ViommuId,
    hwpt_data, viommu_type,
};
use crate::{Iova, Span};

/// What an array of these words is answered with.
type Array<'a> = (&'static str, &'a [u64], Result<u64, (u32, Errno)>);
type Row = (&'static str, Result<u64>, Result<u64>);

fn check(rows: Vec<Row>) {
    for (name, got, wanted) in rows {
        assert_eq!(got, wanted, "{name}");
    }
}

fn iova(result: Result<Iova>) -> Result<u64> {
    result.map(|iova| iova.0)
}

fn none<T>(result: Result<T>) -> Result<u64> {
    result.map(|_| 0)
}

fn map(lab: &Lab, ioas: IoasId, flags: u32, at: Option<u64>, user_address: u64, length: u64) -> Result<u64> {
    iova(lab.kernel.ioas_map(ioas, &Map { flags: MapFlags(flags), iova: at.map(Iova), user_address, length }))
}

fn copy(lab: &Lab, (to, at): (IoasId, Option<u64>), (from, source): (IoasId, u64), length: u64) -> Result<u64> {
    let copy = CopyRange { flags: RW, destination: to, destination_iova: at.map(Iova), source: from, source_iova: Iova(source), length };
    iova(lab.kernel.ioas_copy(&copy))
}

#[test]
fn mapping() {
    let lab = Lab::new(vec![UnitConfig::vtd("u")]);
    let ioas = lab.kernel.ioas_alloc().unwrap();
    let device = Device::bind(&lab.kernel, "dev0").unwrap();
    let before = map(&lab, ioas, 6, Some(0x123), lab.user + 0x123, 0x10);
    let unmapped = lab.kernel.ioas_unmap(ioas, Iova(0x123), 0x10);
    let attachment = device.attach(None, PageTable::Ioas(&Ioas::alloc(&lab.kernel).unwrap())).unwrap();
    lab.kernel.attach(device.id(), None, PageTableId::Ioas(ioas)).unwrap();
    let user = lab.user;
    check(vec![
        ("without a page table bytes can be mapped", before, Ok(0x123)),
        ("and unmapped", unmapped, Ok(0x10)),
        ("map", map(&lab, ioas, 6, Some(0x10_0000), user, 4 * PAGE), Ok(0x10_0000)),
        ("over all of an area", map(&lab, ioas, 6, Some(0x10_0000), user, 4 * PAGE), Err(Errno::EEXIST)),
        ("over the end of an area", map(&lab, ioas, 6, Some(0x10_3000), user, 4 * PAGE), Err(Errno::EEXIST)),
        ("around an area", map(&lab, ioas, 6, Some(0xf_f000), user, 8 * PAGE), Err(Errno::EEXIST)),
        ("unknown flag", map(&lab, ioas, 16 | 6, Some(0x20_0000), user, PAGE), Err(Errno::EOPNOTSUPP)),
        ("neither readable nor writeable", map(&lab, ioas, 0, Some(0x20_0000), user, PAGE), Err(Errno::EINVAL)),
        ("no length", map(&lab, ioas, 6, Some(0x20_0000), user, 0), Err(Errno::EINVAL)),
        ("length not aligned", map(&lab, ioas, 6, Some(0x20_0000), user, PAGE + 1), Err(Errno::EINVAL)),
        ("IOVA not aligned", map(&lab, ioas, 6, Some(0x20_0010), user, PAGE), Err(Errno::EINVAL)),
        ("memory not aligned", map(&lab, ioas, 6, Some(0x20_0000), user + 8, PAGE), Err(Errno::EINVAL)),
        ("IOVA at the end", map(&lab, ioas, 6, Some(u64::MAX), user, PAGE), Err(Errno::EOVERFLOW)),
        ("length too large", map(&lab, ioas, 6, Some(0), user, u64::MAX), Err(Errno::EOVERFLOW)),
        ("IOVA beyond the aperture", map(&lab, ioas, 6, Some(1 << 57), user, PAGE), Err(Errno::EINVAL)),
        ("IOVA wraps", map(&lab, ioas, 6, Some(u64::MAX - 0xfff), user, 2 * PAGE), Err(Errno::EOVERFLOW)),
        ("user address wraps", map(&lab, ioas, 6, Some(0x20_0000), u64::MAX - 0xfff, 2 * PAGE), Err(Errno::EOVERFLOW)),
        ("reserved window", map(&lab, ioas, 6, Some(0xfee0_0000), user, PAGE), Err(Errno::EINVAL)),
        ("into the reserved window", map(&lab, ioas, 6, Some(0xfedf_f000), user, 2 * PAGE), Err(Errno::EINVAL)),
        ("no such memory", map(&lab, ioas, 6, Some(0x20_0000), 0x1000, PAGE), Err(Errno::EFAULT)),
        ("beyond the memory", map(&lab, ioas, 6, Some(0x20_0000), user + SIZE - PAGE, 2 * PAGE), Err(Errno::EFAULT)),
        ("no such IOAS", map(&lab, IoasId(999), 6, Some(0), user, PAGE), Err(Errno::ENOENT)),
        ("not an IOAS", map(&lab, IoasId(device.id().0), 6, Some(0), user, PAGE), Err(Errno::ENOENT)),
        ("chosen, lowest first, but not 0", map(&lab, ioas, 6, None, user, PAGE), Ok(PAGE)),
        ("chosen again", map(&lab, ioas, 6, None, user, PAGE), Ok(2 * PAGE)),
        ("chosen, aligned as the memory is", map(&lab, ioas, 6, None, user, 2 << 20).map(|at| at % (2 << 20).min(1 << user.trailing_zeros())), Ok(0)),
    ]);
    lab.kernel.ioas_unmap(ioas, Iova(0), u64::MAX).unwrap();
    drop(attachment);
    lab.kernel.destroy(ioas.into()).unwrap();
    drop(device);
    lab.assert_clean();
}

#[test]
fn unmap_and_copy() {
    let lab = Lab::new(vec![UnitConfig::vtd("u")]);
    let (a, b) = (lab.kernel.ioas_alloc().unwrap(), lab.kernel.ioas_alloc().unwrap());
    let unmap = |ioas, iova, length| lab.kernel.ioas_unmap(ioas, Iova(iova), length);
    check(vec![
        ("all of nothing", unmap(a, 0, u64::MAX), Ok(0)),
        ("nothing there", unmap(a, 0x1000, PAGE), Err(Errno::ENOENT)),
        ("no length", unmap(a, 0x1000, 0), Err(Errno::EINVAL)),
        ("wraps", unmap(a, u64::MAX - 0xfff, 2 * PAGE), Err(Errno::EOVERFLOW)),
        ("too long", unmap(a, PAGE, u64::MAX), Err(Errno::EOVERFLOW)),
        ("map", map(&lab, a, 6, Some(0x10_0000), lab.user, 4 * PAGE), Ok(0x10_0000)),
        ("map behind it", map(&lab, a, 6, Some(0x10_4000), lab.user + (1 << 20), 4 * PAGE), Ok(0x10_4000)),
        ("cut in front", unmap(a, 0x10_0000, PAGE), Err(Errno::ENOENT)),
        ("cut at the end", unmap(a, 0x10_7000, PAGE), Err(Errno::ENOENT)),
        ("cut in the middle", unmap(a, 0x10_1000, PAGE), Err(Errno::ENOENT)),
        ("copy", copy(&lab, (b, Some(0x50_0000)), (a, 0x10_0000), 4 * PAGE), Ok(0x50_0000)),
        ("copy a part", copy(&lab, (b, Some(0x60_0000)), (a, 0x10_1000), PAGE), Ok(0x60_0000)),
        ("copy across areas", copy(&lab, (b, Some(0x70_0000)), (a, 0x10_2000), 4 * PAGE), Ok(0x70_0000)),
        ("copy within", copy(&lab, (a, Some(0x80_0000)), (a, 0x10_0000), PAGE), Ok(0x80_0000)),
        ("copy over an area", copy(&lab, (b, Some(0x50_3000)), (a, 0x10_0000), 4 * PAGE), Err(Errno::EEXIST)),
        ("copy of a gap", copy(&lab, (b, Some(0x90_0000)), (a, 0x10_7000), 2 * PAGE), Err(Errno::ENOENT)),
        ("copy of nothing", copy(&lab, (b, Some(0x90_0000)), (a, 0), PAGE), Err(Errno::ENOENT)),
        ("copy without length", copy(&lab, (b, Some(0x90_0000)), (a, 0x10_0000), 0), Err(Errno::EINVAL)),
        ("copy from no IOAS", copy(&lab, (b, Some(0x90_0000)), (IoasId(99), 0), PAGE), Err(Errno::ENOENT)),
        ("copies across areas are two areas", unmap(b, 0x70_0000, 2 * PAGE), Ok(2 * PAGE)),
        ("the source may go", unmap(a, 0x10_0000, 8 * PAGE), Ok(8 * PAGE)),
        ("the copy stays", unmap(b, 0x50_0000, 4 * PAGE), Ok(4 * PAGE)),
    ]);
    // Read-only memory cannot be copied writeable.
    map(&lab, a, 4, Some(0x20_0000), lab.user, PAGE).unwrap();
    assert_eq!(copy(&lab, (b, Some(0xa0_0000)), (a, 0x20_0000), PAGE), Err(Errno::EPERM));
    // Areas in front of one that is cut are gone.
    map(&lab, a, 6, Some(0x30_0000), lab.user, PAGE).unwrap();
    map(&lab, a, 6, Some(0x30_1000), lab.user, 2 * PAGE).unwrap();
    assert_eq!(unmap(a, 0x30_0000, 2 * PAGE), Err(Errno::ENOENT));
    assert_eq!(unmap(a, 0x30_0000, PAGE), Err(Errno::ENOENT));
    assert_eq!(unmap(a, 0x30_1000, 2 * PAGE), Ok(2 * PAGE));
    lab.kernel.destroy(a.into()).unwrap();
    lab.kernel.destroy(b.into()).unwrap();
    lab.assert_clean();
}

#[test]
fn ranges_narrow_and_widen() {
    let mut small = UnitConfig::vtd("small");
    small.aperture = Span { first: 0, last: (1 << 39) - 1 };
    let lab = Lab::new(vec![UnitConfig::vtd("large"), small]);
    let ioas = Ioas::alloc(&lab.kernel).unwrap();
    let ranges = || lab.kernel.ioas_iova_ranges(ioas.id()).unwrap();
    let span = |first, last| Span { first, last };
    assert_eq!((ranges().ranges, ranges().alignment), (vec![Span::ALL], 1));
    let (one, two) = (Device::bind(&lab.kernel, "dev0").unwrap(), Device::bind(&lab.kernel, "dev1").unwrap());
    let first = one.attach(None, PageTable::Ioas(&ioas)).unwrap();
    assert_eq!((ranges().ranges, ranges().alignment), (vec![span(0, 0xfedf_ffff), span(0xfef0_0000, (1 << 57) - 1)], 4096));
    // An area beyond what the second unit can do keeps its device off.
    lab.map(ioas.id(), 1 << 40, BASE, PAGE).unwrap();
    assert_eq!(two.attach(None, PageTable::Ioas(&ioas)).unwrap_err(), Errno::EADDRINUSE);
    assert_eq!(ranges().ranges.last(), Some(&span(0xfef0_0000, (1 << 57) - 1)));
    lab.kernel.ioas_unmap(ioas.id(), Iova(1 << 40), PAGE).unwrap();
    let second = two.attach(None, PageTable::Ioas(&ioas)).unwrap();
    assert_eq!(ranges().ranges.last(), Some(&span(0xfef0_0000, (1 << 39) - 1)));
    assert_eq!(none(lab.map(ioas.id(), 1 << 40, BASE, PAGE)), Err(Errno::EINVAL));
    drop(second);
    assert_eq!(ranges().ranges.last(), Some(&span(0xfef0_0000, (1 << 57) - 1)));
    drop(first);
    assert_eq!((ranges().ranges, ranges().alignment), (vec![Span::ALL], 1));

    // What was allowed must stay allowed.
    lab.kernel.ioas_allow_iovas(ioas.id(), &[span(1 << 40, (1 << 41) - 1)]).unwrap();
    assert_eq!(two.attach(None, PageTable::Ioas(&ioas)).unwrap_err(), Errno::EADDRINUSE);
    let first = one.attach(None, PageTable::Ioas(&ioas)).unwrap();
    assert_eq!(map(&lab, ioas.id(), 6, None, lab.user, PAGE), Ok(1 << 40));
    check(vec![
        ("one byte", none(lab.kernel.ioas_allow_iovas(ioas.id(), &[span(1, 1)])), Err(Errno::EINVAL)),
        ("overlap", none(lab.kernel.ioas_allow_iovas(ioas.id(), &[span(0, 0xfff), span(0xfff, 0x1fff)])), Err(Errno::EINVAL)),
        ("reserved", none(lab.kernel.ioas_allow_iovas(ioas.id(), &[span(0xfee0_0000, 0xfee0_0fff)])), Err(Errno::EADDRINUSE)),
        ("taken back", none(lab.kernel.ioas_allow_iovas(ioas.id(), &[])), Ok(0)),
        ("no aligned room", map(&lab, ioas.id(), 6, None, lab.user, 1 << 58), Err(Errno::ENOSPC)),
    ]);
    drop((first, one, two, ioas));
    lab.assert_clean();
}

#[test]
fn attach_needs_areas_inside_and_memory() {
    let lab = Lab::new(vec![UnitConfig::vtd("u")]);
    let ioas = Ioas::alloc(&lab.kernel).unwrap();
    let device = Device::bind(&lab.kernel, "dev0").unwrap();
    let attach = || device.attach(None, PageTable::Ioas(&ioas)).map(drop);
    // Without a page table nobody looks at the memory.
    assert_eq!(map(&lab, ioas.id(), 6, Some(0x1000), 0x5000, PAGE), Ok(0x1000));
    assert_eq!(attach(), Err(Errno::EFAULT));
    lab.kernel.ioas_unmap(ioas.id(), Iova(0x1000), PAGE).unwrap();
    lab.map(ioas.id(), 0xfee0_0000, BASE, PAGE).unwrap();
    assert_eq!(attach(), Err(Errno::EADDRINUSE));
    lab.kernel.ioas_unmap(ioas.id(), Iova(0xfee0_0000), PAGE).unwrap();
    map(&lab, ioas.id(), 6, Some(0x10), lab.user + 0x10, 8).unwrap();
    assert_eq!(attach(), Err(Errno::EADDRINUSE), "not aligned to the unit's pages");
    lab.kernel.ioas_unmap(ioas.id(), Iova(0), u64::MAX).unwrap();
    assert_eq!(attach(), Ok(()));
    drop((device, ioas));
    lab.assert_clean();
}

#[test]
fn locked_memory_is_limited_and_counted_once() {
    let lab = Lab::new(vec![UnitConfig::vtd("u"), UnitConfig::amd("v")]);
    let (one, two) = (Device::bind(&lab.kernel, "dev0").unwrap(), Device::bind(&lab.kernel, "dev1").unwrap());
    let (gpa, other) = (Ioas::alloc(&lab.kernel).unwrap(), Ioas::alloc(&lab.kernel).unwrap());
    lab.map(gpa.id(), 0, BASE, 16 * PAGE).unwrap();
    assert_eq!(lab.sim.pinned_pages(), 0, "no page table needs it yet");
    let first = one.attach(None, PageTable::Ioas(&gpa)).unwrap();
    assert_eq!(lab.sim.pinned_pages(), 16);
    let second = two.attach(None, PageTable::Ioas(&gpa)).unwrap();
    assert_eq!(lab.sim.pinned_pages(), 16, "two units, one pin");
    copy(&lab, (other.id(), Some(0x1000)), (gpa.id(), 0), 8 * PAGE).unwrap();
    copy(&lab, (other.id(), Some(0x10_1000)), (gpa.id(), 4 * PAGE), 8 * PAGE).unwrap();
    let third = one.attach(Some(Pasid(1)), PageTable::Ioas(&other));
    assert_eq!(third.map(drop), Err(Errno::EINVAL), "the device's own page table is not made for PASIDs");
    drop(first);
    let first = one.attach(None, PageTable::Ioas(&other)).unwrap();
    assert_eq!(lab.sim.pinned_pages(), 16, "copies share pins");
    drop(second);
    assert_eq!(lab.sim.pinned_pages(), 12, "what is copied stays pinned");
    assert_eq!(lab.kernel.ioas_unmap(gpa.id(), Iova(0), 16 * PAGE), Ok(16 * PAGE));
    assert_eq!(lab.sim.pinned_pages(), 12);
    lab.sim.set_locked_limit(14);
    assert_eq!(none(lab.map(other.id(), 0x20_0000, BASE, 3 * PAGE)), Err(Errno::ENOMEM));
    assert_eq!(none(lab.map(other.id(), 0x20_0000, BASE, 2 * PAGE)), Ok(0));
    assert_eq!(lab.sim.pinned_pages(), 14, "another mapping of the same memory is another pages object");
    drop(first);
    assert_eq!(lab.sim.pinned_pages(), 0);
    drop((one, two, gpa, other));
    lab.assert_clean();
}

#[test]
fn objects() {
    let lab = Lab::new(vec![UnitConfig::smmuv3("u"), UnitConfig::vtd("v").without_nesting(), UnitConfig::vtd("w")]);
    let k = &lab.kernel;
    assert_eq!(k.bind_device("nobody"), Err(Errno::ENODEV));
    let device = k.bind_device("dev0").unwrap();
    assert_eq!(k.bind_device("dev0"), Err(Errno::EBUSY));
    let (plain, vtd) = (k.bind_device("dev1").unwrap(), k.bind_device("dev2").unwrap());
    let twin = k.bind_device("twin0").unwrap();
    let ioas = k.ioas_alloc().unwrap();
    let alloc = |flags, device, parent, data_type, data: &[u8]| {
        k.hwpt_alloc(&HwptAlloc { flags: HwptFlags(flags), device, parent, data_type, data: data.to_vec(), fault_queue: None })
    };
    let under = HwptParent::Ioas(ioas);
    let parent = alloc(1, device, under, 0, &[]).unwrap();
    let vtd_parent = alloc(1, vtd, under, 0, &[]).unwrap();
    let not_parent = alloc(0, device, under, 0, &[]).unwrap();
    let viommu_alloc = |flags, viommu_type, device, parent| k.viommu_alloc(&ViommuAlloc { flags, viommu_type, device, parent });
    let viommu = viommu_alloc(0, viommu_type::ARM_SMMUV3, device, parent).unwrap();
    let ste = |low: u64, high: u64| [low.to_ne_bytes(), high.to_ne_bytes()].concat();
    let good = ste(1 | 5 << 1 | BASE, 0);
    let in_viommu = HwptParent::Viommu(viommu);
    let arm = hwpt_data::ARM_SMMUV3;
    let s1 = [0u64, BASE, 48].map(u64::to_ne_bytes).concat();
    check(vec![
        ("unknown flag", none(alloc(16, device, under, 0, &[])), Err(Errno::EOPNOTSUPP)),
        ("data without a type", none(alloc(0, device, under, 0, &[1])), Err(Errno::EINVAL)),
        ("a type without data", none(alloc(0, device, in_viommu, arm, &[])), Err(Errno::EINVAL)),
        ("no such device", none(alloc(0, DeviceId(99), under, 0, &[])), Err(Errno::ENOENT)),
        ("no such IOAS", none(alloc(0, device, HwptParent::Ioas(IoasId(99)), 0, &[])), Err(Errno::EINVAL)),
        ("no such parent", none(alloc(0, vtd, HwptParent::Hwpt(HwptId(99)), 1, &[0; 24])), Err(Errno::EINVAL)),
        ("no such vIOMMU", none(alloc(0, device, HwptParent::Viommu(ViommuId(99)), 2, &[0; 16])), Err(Errno::EINVAL)),
        ("a device as parent", none(alloc(0, device, HwptParent::Ioas(IoasId(device.0)), 0, &[])), Err(Errno::EINVAL)),
        ("data for what is not nested", none(alloc(0, device, under, 1, &[0; 24])), Err(Errno::EOPNOTSUPP)),
        ("a unit without nesting", none(alloc(1, plain, under, 0, &[])), Err(Errno::EOPNOTSUPP)),
        ("fault queue missing", none(alloc(4, device, under, 0, &[])), Err(Errno::ENOENT)),
        ("nested under what is no parent", none(alloc(0, vtd, HwptParent::Hwpt(not_parent), 1, &s1)), Err(Errno::EINVAL)),
        ("nested under another unit's", none(alloc(0, vtd, HwptParent::Hwpt(parent), 1, &s1)), Err(Errno::EINVAL)),
        ("nested as parent", none(alloc(1, vtd, HwptParent::Hwpt(vtd_parent), 1, &s1)), Err(Errno::EOPNOTSUPP)),
        ("nested of another type", none(alloc(0, vtd, HwptParent::Hwpt(vtd_parent), 2, &s1)), Err(Errno::EOPNOTSUPP)),
        (
            "nested, unknown flag in the data",
            none(alloc(0, vtd, HwptParent::Hwpt(vtd_parent), 1, &[8u64, BASE, 48].map(u64::to_ne_bytes).concat())),
            Err(Errno::EOPNOTSUPP),
        ),
        ("nested, data too short", none(alloc(0, vtd, HwptParent::Hwpt(vtd_parent), 1, &s1[..16])), Err(Errno::EINVAL)),
        ("SMMUv3 without a vIOMMU", none(alloc(0, device, HwptParent::Hwpt(parent), arm, &good)), Err(Errno::EOPNOTSUPP)),
        ("STE with stage 2", none(alloc(0, device, in_viommu, arm, &ste(1 | 6 << 1, 0))), Err(Errno::EIO)),
        ("STE with a field of the host", none(alloc(0, device, in_viommu, arm, &ste(1 | 5 << 1, 1 << 44))), Err(Errno::EIO)),
        ("STE with split-stage ATS", none(alloc(0, device, in_viommu, arm, &ste(1 | 5 << 1, 2 << 28))), Err(Errno::EIO)),
        ("VT-d data in an SMMUv3", none(alloc(0, device, in_viommu, 1, &s1)), Err(Errno::EINVAL)),
        ("vIOMMU flag", none(viommu_alloc(1, 1, device, parent)), Err(Errno::EOPNOTSUPP)),
        ("vIOMMU without a type", none(viommu_alloc(0, 0, device, parent)), Err(Errno::EOPNOTSUPP)),
        ("vIOMMU of another type", none(viommu_alloc(0, 2, device, parent)), Err(Errno::EOPNOTSUPP)),
        ("vIOMMU on VT-d", none(viommu_alloc(0, 1, vtd, vtd_parent)), Err(Errno::EOPNOTSUPP)),
        ("vIOMMU over what is no parent", none(viommu_alloc(0, 1, device, not_parent)), Err(Errno::EINVAL)),
        ("vIOMMU over another unit's parent", none(viommu_alloc(0, 1, device, vtd_parent)), Err(Errno::EINVAL)),
        ("vIOMMU over nothing", none(viommu_alloc(0, 1, device, HwptId(99))), Err(Errno::ENOENT)),
        ("vDEVICE", none(k.vdevice_alloc(viommu, device, 0x42)), Ok(0)),
        ("vDEVICE again", none(k.vdevice_alloc(viommu, device, 0x43)), Err(Errno::EEXIST)),
        ("vDEVICE with a number that is taken", none(k.vdevice_alloc(viommu, twin, 0x42)), Err(Errno::EEXIST)),
        ("vDEVICE of another unit", none(k.vdevice_alloc(viommu, vtd, 0x44)), Err(Errno::EINVAL)),
        ("vDEVICE in nothing", none(k.vdevice_alloc(ViommuId(99), twin, 0x44)), Err(Errno::ENOENT)),
        ("event queue of depth 0", none(k.event_queue_alloc(&EventQueueAlloc { flags: 0, viommu, queue_type: 1, depth: 0 })), Err(Errno::EINVAL)),
        (
            "event queue of another type",
            none(k.event_queue_alloc(&EventQueueAlloc { flags: 0, viommu, queue_type: 2, depth: 1 })),
            Err(Errno::EOPNOTSUPP),
        ),
    ]);
    let nested = alloc(0, device, in_viommu, arm, &good).unwrap();
    let queue = k.event_queue_alloc(&EventQueueAlloc { flags: 0, viommu, queue_type: 1, depth: 4 }).unwrap();
    let faults = k.fault_queue_alloc().unwrap();
    let wide = alloc(0, vtd, HwptParent::Hwpt(vtd_parent), 1, &[0u64, BASE, 39].map(u64::to_ne_bytes).concat()).unwrap();
    let dirty = |hwpt, iova, length, page_size| k.dirty_bitmap(hwpt, &DirtyRange { flags: DirtyFlags::NONE, iova: Iova(iova), length, page_size });
    let tracked = alloc(2, device, under, 0, &[]).unwrap();
    lab.map(ioas, 0, BASE, 4 * PAGE).unwrap();
    check(vec![
        ("second event queue", none(k.event_queue_alloc(&EventQueueAlloc { flags: 0, viommu, queue_type: 1, depth: 1 })), Err(Errno::EEXIST)),
        ("attach to nothing", none(k.attach(device, None, PageTableId::Hwpt(HwptId(99)))), Err(Errno::ENOENT)),
        ("attach to what is no page table", none(k.attach(device, None, PageTableId::Hwpt(HwptId(viommu.0)))), Err(Errno::EINVAL)),
        ("attach to another unit's", none(k.attach(vtd, None, PageTableId::Hwpt(parent))), Err(Errno::EINVAL)),
        ("attach without a vDEVICE", none(k.attach(twin, None, PageTableId::Hwpt(nested))), Err(Errno::ENOENT)),
        ("attach with an impossible width", none(k.attach(vtd, None, PageTableId::Hwpt(wide))), Err(Errno::EINVAL)),
        ("attach a PASID to what is not made for it", none(k.attach(device, Some(Pasid(1)), PageTableId::Hwpt(parent))), Err(Errno::EINVAL)),
        ("attach PASID 0", none(k.attach(device, Some(Pasid(0)), PageTableId::Hwpt(parent))), Err(Errno::EINVAL)),
        ("detach what is not attached", none(k.detach(device, None)), Ok(0)),
        ("attach", none(k.attach(device, None, PageTableId::Hwpt(nested))), Ok(0)),
        ("unbind while attached", none(k.unbind_device(device)), Err(Errno::EBUSY)),
        ("destroy what is attached", none(k.destroy(nested.into())), Err(Errno::EBUSY)),
        ("destroy a vIOMMU in use", none(k.destroy(viommu.into())), Err(Errno::EBUSY)),
        ("destroy a parent in use", none(k.destroy(parent.into())), Err(Errno::EBUSY)),
        ("destroy an IOAS in use", none(k.destroy(ioas.into())), Err(Errno::EBUSY)),
        ("destroy a device", none(k.destroy(device.into())), Err(Errno::EBUSY)),
        ("destroy nothing", none(k.destroy(ObjectId(99))), Err(Errno::ENOENT)),
        ("dirty tracking of what cannot", none(k.set_dirty_tracking(parent, true)), Err(Errno::EOPNOTSUPP)),
        ("dirty bitmap of what cannot", none(dirty(parent, 0, PAGE, PAGE)), Err(Errno::EOPNOTSUPP)),
        ("dirty bitmap before tracking", none(dirty(tracked, 0, PAGE, PAGE)), Err(Errno::EINVAL)),
        ("dirty tracking", none(k.set_dirty_tracking(tracked, true)), Ok(0)),
        ("dirty bitmap", none(dirty(tracked, 0, 4 * PAGE, PAGE)), Ok(0)),
        ("dirty bitmap of a gap", none(dirty(tracked, 0, 8 * PAGE, PAGE)), Err(Errno::EINVAL)),
        ("dirty bitmap, odd page size", none(dirty(tracked, 0, 4 * PAGE, PAGE + 1)), Err(Errno::EINVAL)),
        ("dirty bitmap, not aligned", none(dirty(tracked, 8, PAGE, PAGE)), Err(Errno::EINVAL)),
        ("answer to nothing", none(k.respond(faults, PageResponse { cookie: 1, code: ResponseCode::Success })), Err(Errno::EINVAL)),
        ("faults of nothing", none(k.read_faults(FaultQueueId(99))), Err(Errno::ENOENT)),
        ("rlimit mode too late", none(k.set_option(KernelOption::RlimitMode, 1)), Err(Errno::EBUSY)),
        ("huge pages off", none(k.set_option(KernelOption::HugePages(ioas), 0)), Ok(0)),
        ("huge pages, odd value", none(k.set_option(KernelOption::HugePages(ioas), 2)), Err(Errno::EINVAL)),
        ("huge pages are off", k.option(KernelOption::HugePages(ioas)), Ok(0)),
    ]);
    let order: [ObjectId; 10] = [
        queue.into(),
        nested.into(),
        wide.into(),
        tracked.into(),
        viommu.into(),
        parent.into(),
        vtd_parent.into(),
        not_parent.into(),
        faults.into(),
        ioas.into(),
    ];
    k.detach(device, None).unwrap();
    k.unbind_device(device).unwrap(); // takes the vDEVICE with it
    order.into_iter().for_each(|id| k.destroy(id).unwrap());
    [plain, vtd, twin].into_iter().for_each(|device| k.unbind_device(device).unwrap());
    lab.assert_clean();
    lab.sim.set_privileged(false);
    assert_eq!(k.set_option(KernelOption::RlimitMode, 1), Err(Errno::EPERM));
    lab.sim.set_privileged(true);
    assert_eq!(k.set_option(KernelOption::RlimitMode, 1), Ok(()));
    assert_eq!(k.option(KernelOption::RlimitMode), Ok(1));
}

#[test]
fn invalidation_arrays() {
    let lab = Lab::new(vec![UnitConfig::smmuv3("arm"), UnitConfig::vtd("vtd"), UnitConfig::amd("amd"), UnitConfig::riscv("riscv")]);
    let k = &lab.kernel;
    let send = |target, data_type, entry_length, words: &[u64]| {
        let entries: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        k.hwpt_invalidate(&Invalidate { target, data_type, entry_length, entries: &entries })
            .map(u64::from)
            .map_err(|error| (error.handled, error.errno))
    };
    let (device, ioas, parent) = lab.parent("dev0", HwptFlags::NONE);
    let viommu = parent.viommu(&device, viommu_type::ARM_SMMUV3).unwrap();
    let _vdevice = viommu.vdevice(&device, 0x42).unwrap();
    let arm = InvalidateTarget::Viommu(viommu.id());
    let rows: [Array<'_>; 14] = [
        ("probe", &[], Ok(0)),
        ("NSNH_ALL, NH_ALL", &[0x30, 0, 0x10, 0], Ok(2)),
        ("NH_ASID", &[0x11 | 1 << 48, 0], Ok(1)),
        ("NH_VA, NH_VAA", &[0x12 | 1 << 48, 0x1000 | 1, 0x13, 0x1000], Ok(2)),
        ("a range", &[0x12 | 1 << 48 | 3 << 12 | 2 << 20, 0x1000 | 1 << 10 | 3 << 8], Ok(1)),
        ("NUM without TG", &[0x12 | 3 << 12, 0x1000], Err((0, Errno::EIO))),
        ("TTL without TG", &[0x12, 0x1000 | 3 << 8], Err((0, Errno::EIO))),
        ("reserved bits", &[0x12, 0x1000 | 2], Err((0, Errno::EIO))),
        ("an address in NH_ASID", &[0x11, 0x1000], Err((0, Errno::EIO))),
        ("CFGI_CD, CFGI_CD_ALL, ATC_INV", &[0x05 | 0x42 << 32, 1, 0x06 | 0x42 << 32, 0, 0x40 | 0x42 << 32, 52], Ok(3)),
        ("an unknown StreamID, after a good one", &[0x06 | 0x42 << 32, 0, 0x06 | 0x43 << 32, 0], Err((1, Errno::EIO))),
        ("CFGI_STE", &[0x03 | 0x42 << 32, 1], Err((0, Errno::EIO))),
        ("CMD_SYNC", &[0x46, 0], Err((0, Errno::EIO))),
        ("TLBI_EL2_ALL", &[0x20, 0], Err((0, Errno::EIO))),
    ];
    for (name, words, wanted) in rows {
        assert_eq!(send(arm, 1, 16, words), wanted, "{name}");
    }
    assert_eq!(send(arm, 0, 16, &[]), Err((0, Errno::EINVAL)), "VT-d's type");
    assert_eq!(send(arm, 1, 12, &[0x10, 0]), Err((0, Errno::EINVAL)), "short entries");
    assert_eq!(send(arm, 1, 24, &[0x10, 0, 0]), Ok(1), "longer entries that say nothing more");
    assert_eq!(send(arm, 1, 24, &[0x10, 0, 1]), Err((0, Errno::E2BIG)), "longer entries that do");
    assert_eq!(send(InvalidateTarget::Hwpt(parent.id()), 0, 24, &[]), Err((0, Errno::EINVAL)), "not nested");
    assert_eq!(send(InvalidateTarget::Hwpt(HwptId(99)), 0, 24, &[]), Err((0, Errno::ENOENT)));
    let ste = [(1u64 | 5 << 1 | BASE).to_ne_bytes(), [0; 8]].concat();
    let nested = viommu.nested(&device, HwptFlags::NONE, (hwpt_data::ARM_SMMUV3, &ste), None).unwrap();
    assert_eq!(send(InvalidateTarget::Hwpt(nested.id()), 0, 24, &[]), Err((0, Errno::EOPNOTSUPP)), "SMMUv3 is invalidated through its vIOMMU");

    let (vtd_device, vtd_ioas, vtd_parent) = lab.parent("dev1", HwptFlags::NONE);
    let s1 = [0u64, BASE, 48].map(u64::to_ne_bytes).concat();
    let vtd = vtd_parent.nested(&vtd_device, HwptFlags::NONE, (hwpt_data::VTD_S1, &s1), None).unwrap();
    let target = InvalidateTarget::Hwpt(vtd.id());
    let rows: [Array<'_>; 7] = [
        ("probe", &[], Ok(0)),
        ("everything", &[0, u64::MAX, 0], Ok(1)),
        ("two ranges", &[0x1000, 1, 1, 0x10_0000, 512, 0], Ok(2)),
        ("unknown flag", &[0, 1, 2], Err((0, Errno::EOPNOTSUPP))),
        ("reserved field", &[0, 1, 1 << 32], Err((0, Errno::EOPNOTSUPP))),
        ("not aligned, after a good one", &[0, 1, 0, 0x10, 1, 0], Err((1, Errno::EINVAL))),
        ("everything from somewhere", &[0x1000, u64::MAX, 0], Err((0, Errno::EINVAL))),
    ];
    for (name, words, wanted) in rows {
        assert_eq!(send(target, 0, 24, words), wanted, "{name}");
    }
    assert_eq!(send(target, 1, 24, &[]), Err((0, Errno::EINVAL)), "SMMUv3's type");

    // The real AMD driver has a vIOMMU of any number, and nothing to invalidate; the simulation's own type has.
    let (amd_device, amd_ioas, amd_parent) = lab.parent("dev2", HwptFlags::NONE);
    let real = amd_parent.viommu(&amd_device, 77).unwrap();
    assert_eq!(send(InvalidateTarget::Viommu(real.id()), 0x5347_0001, 16, &[]), Err((0, Errno::EOPNOTSUPP)));
    let own = amd_parent.viommu(&amd_device, viommu_type::SIM_AMD).unwrap();
    assert_eq!(send(InvalidateTarget::Viommu(own.id()), 0x5347_0001, 16, &[8 << 60, 0, 3 << 60, 0x7fff_ffff_ffff_f007]), Ok(2));
    assert_eq!(send(InvalidateTarget::Viommu(own.id()), 0x5347_0001, 16, &[1 << 60, 0]), Err((0, Errno::EIO)), "COMPLETION_WAIT");
    drop((real, own, amd_parent, amd_ioas, amd_device));
    drop((vtd, vtd_parent, vtd_ioas, vtd_device));
    drop((nested, _vdevice, viommu, parent, ioas, device));
    lab.assert_clean();
}
