//! Devices behind several units, one after the other or side by side: capabilities, re-use, second host tables.

use stagecraft::Iova;
use stagecraft::ioasid::{Error, GuestView, Property, Request, Strategy};
use stagecraft::kernel::sim::{DmaAccess, UnitConfig, UnitKind};
use stagecraft::plugin::Outcome;

use crate::guests::{Arch, Guest};
use crate::rig::{DATA, Rig, page, unit};

fn with_four_levels() -> UnitConfig {
    let mut unit = UnitConfig::vtd("four");
    if let UnitKind::Vtd { cap, .. } = &mut unit.kind {
        *cap &= !(1 << 60);
    }
    UnitConfig { pasid_log2: 8, dirty_tracking: false, ..unit }
}

#[test]
fn capabilities_are_those_of_the_whole_path_and_of_any_device() {
    let units = [UnitConfig::vtd("five"), with_four_levels(), UnitConfig::vtd("none").without_nesting(), UnitConfig::smmuv3("arm")];
    let rig = Rig::new(&units, &[("plain", &[0]), ("narrow", &[0, 1]), ("none", &[0, 2]), ("mixed", &[0, 3]), ("arm", &[3])]);
    {
        let context = rig.context();
        let levels = |label: &str| {
            let device = context.connect(label).unwrap();
            let limits = device.capabilities().offer("intel-vtd/first-stage").map(|offer| offer.limits.clone());
            let levels = limits.and_then(|limits| limits.iter().find(|(name, _)| name == "levels").map(|(_, levels)| *levels));
            (device, levels)
        };
        let (plain, five) = levels("plain");
        let (narrow, four) = levels("narrow");
        let (none, no_levels) = levels("none");
        let (mixed, not_both) = levels("mixed");
        let (arm, _) = levels("arm");
        assert_eq!((five, four, no_levels, not_both), (Some(5), Some(4), None, None));
        assert_eq!((plain.capabilities().pasid_log2, narrow.capabilities().pasid_log2), (20, 8));
        assert_eq!((plain.capabilities().dirty_tracking, narrow.capabilities().dirty_tracking), (true, false));
        assert_eq!(none.capabilities().missing, ["unit 2 of the path takes no tables of its users"]);
        assert_eq!(mixed.capabilities().missing, ["unit 2 of the path does not take intel-vtd/first-stage"]);
        // What an SMMU and a VT-d keep for themselves is closed on a path with both.
        let open = |device: &stagecraft::ioasid::Device, iova: u64| device.capabilities().iova.ranges.iter().any(|range| range.contains(iova));
        assert_eq!(
            [open(&arm, 0xfee0_0000), open(&arm, 0x0800_0000), open(&mixed, 0xfee0_0000), open(&mixed, 0x0800_0000)],
            [true, false, false, false]
        );
        let all = context.capabilities();
        let offers: Vec<(&str, Vec<&str>)> =
            all.formats.iter().map(|offer| (offer.format.as_str(), offer.devices.iter().map(|(label, _)| label.as_str()).collect())).collect();
        assert_eq!(offers, [("arm-smmuv3/stage1", vec!["arm"]), ("intel-vtd/first-stage", vec!["narrow", "plain"])]);
        assert_eq!(all.dirty_tracking, ["arm", "mixed", "none", "plain"]);
        drop(plain);
        assert_eq!(context.capabilities().formats[1].devices.len(), 1, "who is gone offers nothing");
        assert!(context.device("plain").is_none() && context.device("arm").is_some());
        assert!(matches!(context.connect("arm"), Err(Error::Kernel { .. })), "it is connected");
    }
    rig.assert_clean();
}

#[test]
fn a_table_for_one_unit_is_refused_for_another_or_made_twice() {
    let rig = Rig::new(&[UnitConfig::vtd("one"), UnitConfig::amd("other")], &[("nic", &[0]), ("second", &[0]), ("disk", &[1])]);
    {
        let guest = Guest::new(Arch::Arm, &rig.memory);
        guest.map(0x1000, DATA, true);
        let context = rig.context();
        let [nic, second, disk] = ["nic", "second", "disk"].map(|label| context.connect(label).unwrap());
        let once = context.allocate(Request::guest(guest.view())).unwrap();
        once.serves(&disk, None).unwrap();
        once.attach(&nic, None).unwrap();
        context.serves(&once, &second, None).unwrap();
        let before = rig.sim.objects();
        once.attach(&second, None).unwrap();
        assert_eq!(rig.sim.objects(), before, "devices behind one unit share what there is");
        assert_eq!(rig.dma("second", 0x1000), Some(DATA));
        let refused = once.serves(&disk, None).unwrap_err();
        let expected = "device disk is behind another unit than device nic, for which a table was made (converted, nested: intel-vtd/first-stage levels=0x5); \
                        the request does not allow a second one";
        assert_eq!((refused.property, refused.reason.as_str()), (Property::Unit, expected));
        assert!(matches!(once.attach(&disk, None), Err(Error::Refused(refusal)) if refusal == refused));
        second.detach(None).unwrap();
        let twice = context.allocate(Request::guest(guest.view()).with_second_table()).unwrap();
        twice.replace(&nic, None).unwrap();
        twice.attach(&disk, None).unwrap();
        assert_eq!(twice.strategies(), [Strategy::Nested, Strategy::Nested]);
        let both = |iova: u64| {
            let found = rig.dma("nic", iova);
            assert_eq!(rig.dma("disk", iova), found);
            found
        };
        assert_eq!(both(0x1000), Some(DATA));
        guest.unmap(0x1000);
        let calls = rig.sim.calls_total();
        twice.invalidate(&[page(0x1000)]).unwrap();
        assert_eq!(rig.sim.calls_total() - calls, 2, "one call for each unit");
        assert_eq!(both(0x1000), None);
    }
    rig.assert_clean();
}

#[test]
fn areas_are_mirrored_by_the_kernel_for_all_units() {
    let units = [UnitConfig::vtd("one").without_nesting(), UnitConfig::smmuv3("other").without_nesting()];
    let rig = Rig::new(&units, &[("nic", &[0]), ("disk", &[1])]);
    {
        let guest = Guest::new(Arch::Riscv, &rig.memory);
        guest.map(0x1000, DATA, true);
        let context = rig.context();
        let [nic, disk] = ["nic", "disk"].map(|label| context.connect(label).unwrap());
        let ioasid = context.allocate(Request::guest(guest.view())).unwrap();
        ioasid.attach(&nic, None).unwrap();
        ioasid.attach(&disk, None).unwrap();
        assert_eq!(ioasid.strategies(), [Strategy::Areas]);
        assert_eq!((rig.dma("nic", 0x1000), rig.dma("disk", 0x1000)), (Some(DATA), Some(DATA)));
        guest.unmap(0x1000);
        ioasid.invalidate(&[page(0x1000)]).unwrap();
        assert_eq!((rig.dma("nic", 0x1000), rig.dma("disk", 0x1000)), (None, None));
    }
    rig.assert_clean();
}

#[test]
fn a_path_of_two_units_is_mirrored_in_both() {
    let rig = Rig::new(&[UnitConfig::vtd("near"), UnitConfig::vtd("far")], &[("nic", &[0, 1])]);
    let guest = Guest::new(Arch::Arm, &rig.memory);
    guest.map(0x1000, DATA, true);
    let context = rig.context();
    let nic = context.connect("nic").unwrap();
    let ioasid = context.allocate(Request::guest(guest.view())).unwrap();
    ioasid.attach(&nic, None).unwrap();
    assert_eq!((ioasid.strategies()[0], rig.dma("nic", 0x1000)), (Strategy::Nested, Some(DATA)));
    assert_eq!(unit(Arch::Vtd).name, "host");
}

/// What leads to a guest's own table stands where that table may lead, for reading. Devices that see guest memory as it is do not see it, whoever came first.
#[test]
fn devices_in_bypass_reach_guest_memory_and_nothing_else() {
    for (host, turned) in Arch::ALL.into_iter().flat_map(|host| [(host, false), (host, true)]) {
        let rig = Rig::new(&[unit(host)], &[("nic", &[0]), ("disk", &[0])]);
        {
            let guest = Guest::new(host, &rig.memory);
            guest.map(0x1000, DATA, true);
            let context = rig.context();
            let devices = ["nic", "disk"].map(|label| context.connect(label).unwrap());
            let views = [guest.view(), GuestView { outcome: Outcome::Bypass, id: 0 }];
            let ioasids = views.map(|view| context.allocate(Request::guest(view)).unwrap());
            for index in if turned { [1, 0] } else { [0, 1] } {
                ioasids[index].attach(&devices[index], None).unwrap();
            }
            assert_eq!((rig.dma("nic", 0x1000), rig.dma("disk", DATA)), (Some(DATA), Some(DATA)), "{host:?}");
            let (first, disk) = (rig.setup().memory.tables().first, rig.sim.device("disk").unwrap());
            let reached = (0..1 << 10).map(|page| first + page * 4096).find(|iova| disk.translate(None, Iova(*iova), DmaAccess::Read).is_ok());
            assert_eq!(reached, None, "{host:?}: {:x?}", rig.setup().memory.tables());
        }
        rig.assert_clean();
    }
}
