//! What is chosen, and what is said about it.

use stagecraft::ioasid::{Error, Property, Request, Strategy};
use stagecraft::kernel::Errno;
use stagecraft::kernel::sim::{UnitConfig, UnitKind};

use crate::guests::{Arch, Guest};
use crate::rig::{DATA, Rig, unit};

/// What is said of a guest on a host, and after attaching the same again.
fn said(arch: Arch, host: UnitConfig, only: &[Strategy]) -> String {
    let rig = Rig::new(&[host], &[("nic", &[0])]);
    let guest = Guest::new(arch, &rig.memory);
    let context = rig.context();
    let device = context.connect("nic").unwrap();
    let ioasid = context.allocate(Request::guest(guest.view()).with_strategies(only)).unwrap();
    let before = ioasid.explain_for(&device, None).unwrap();
    assert!(ioasid.explain().is_empty());
    ioasid.attach(&device, None).unwrap();
    assert_eq!(ioasid.explain(), std::slice::from_ref(&before), "what was said before is what was done");
    assert_eq!(ioasid.explain_for(&device, None).unwrap(), before);
    before.to_string()
}

#[test]
fn it_says_what_was_chosen_and_why_nothing_better() {
    let all = &Strategy::ALL;
    assert_eq!(said(Arch::Vtd, unit(Arch::Vtd), all), "device nic: bound as it is: the guest's intel-vtd/first-stage levels=0x4 root=0x100000");
    assert_eq!(
        said(Arch::Arm, unit(Arch::Vtd), all),
        "device nic: converted, nested: intel-vtd/first-stage levels=0x5\n  \
         not bound as it is: the guest's format is arm-smmuv3/stage1, and the unit takes intel-vtd/first-stage"
    );
    assert_eq!(
        said(Arch::Arm, unit(Arch::Vtd).without_nesting(), all),
        "device nic: mapped by the kernel: the kernel's own tables\n  \
         not bound as it is: unit 1 of the path takes no tables of its users\n  \
         not converted, nested: unit 1 of the path takes no tables of its users\n  \
         note: a page whose permissions or target change is not there for a moment: the kernel cannot change an area, and a swap for changes was not asked for"
    );
    assert_eq!(
        said(Arch::Arm, unit(Arch::Riscv).without_nesting(), all),
        "device nic: mapped by the kernel: the kernel's own tables\n  \
         not bound as it is: unit 1 of the path is of a kind that no plugin knows (0x0); unit 1 of the path takes no tables of its users\n  \
         not converted, nested: unit 1 of the path is of a kind that no plugin knows (0x0); unit 1 of the path takes no tables of its users\n  \
         note: a page whose permissions or target change is not there for a moment: the kernel cannot change an area, and a swap for changes was not asked for"
    );
    assert_eq!(
        said(Arch::Vtd, unit(Arch::Vtd), &[Strategy::Areas]),
        "device nic: mapped by the kernel: the kernel's own tables\n  \
         not bound as it is: the request does not allow it\n  \
         not converted, nested: the request does not allow it\n  \
         note: a page whose permissions or target change is not there for a moment: the kernel cannot change an area, and a swap for changes was not asked for"
    );
    // The same architecture with less than the guest wants: five levels of tables where the unit has four.
    let mut narrow = unit(Arch::Vtd);
    if let UnitKind::Vtd { cap, .. } = &mut narrow.kind {
        *cap &= !(1 << 60);
    }
    let rig = Rig::new(&[narrow], &[("nic", &[0])]);
    let context = rig.context();
    let device = context.connect("nic").unwrap();
    let mut view = Guest::new(Arch::Vtd, &rig.memory).view();
    if let stagecraft::plugin::Outcome::Tables(translated) = &mut view.outcome {
        translated.tables[0].settings.set("levels", 5);
    }
    let ioasid = context.allocate(Request::guest(view)).unwrap();
    assert_eq!(
        ioasid.explain_for(&device, None).unwrap().to_string(),
        "device nic: converted, nested: intel-vtd/first-stage levels=0x4\n  \
         not bound as it is: levels is 5, and the unit has 4\n  \
         note: IOVAs 0x800000000000..=0xffffffffffffff are not translated\n  \
         note: IOVAs 0xff00000000000000..=0xffff7fffffffffff are not translated"
    );
}

/// Who looks IOVAs up is there besides, or alone.
#[test]
fn lookups_are_explained_as_well() {
    let rig = Rig::new(&[unit(Arch::Vtd)], &[("nic", &[0])]);
    let guest = Guest::new(Arch::Vtd, &rig.memory);
    let context = rig.context();
    let ioasid = context.allocate(Request::guest(guest.view())).unwrap();
    let said = || ioasid.explain().iter().map(ToString::to_string).collect::<Vec<_>>();
    assert!(said().is_empty());
    ioasid.lookup().unwrap();
    let lookups = "in software: lookups of the VMM's own device models".to_owned();
    assert_eq!(said(), std::slice::from_ref(&lookups));
    let device = context.connect("nic").unwrap();
    ioasid.attach(&device, None).unwrap();
    assert_eq!(said(), ["device nic: bound as it is: the guest's intel-vtd/first-stage levels=0x4 root=0x100000".to_owned(), lookups]);
}

#[test]
fn where_nothing_can_be_had_all_reasons_are_said() {
    let rig = Rig::new(&[unit(Arch::Arm).without_nesting()], &[("nic", &[0])]);
    let guest = Guest::new(Arch::Riscv, &rig.memory);
    let context = rig.context();
    let device = context.connect("nic").unwrap();
    let ioasid = context.allocate(Request::guest(guest.view()).with_strategies(&[Strategy::Native, Strategy::Nested, Strategy::Software])).unwrap();
    let Err(Error::Refused(refusal)) = ioasid.attach(&device, None) else { panic!("refused") };
    let expected = "device nic: not bound as it is: unit 1 of the path takes no tables of its users; not converted, nested: unit 1 of the path takes no tables of \
                    its users; not mapped by the kernel: the request does not allow it; not in software: a device's DMA does not go through software";
    assert_eq!((refusal.property, refusal.reason.as_str()), (Property::Strategy, expected));
    assert_eq!(ioasid.serves(&device, None).unwrap_err().property, Property::Strategy);
    assert_eq!(rig.dma("nic", 0), None);
}

/// A kernel that cannot do what the unit could: AMD's takes no invalidations, others have no vIOMMUs.
#[test]
fn what_the_kernel_does_not_support_gives_way_to_the_next() {
    for host in Arch::ALL {
        let mut reasons = Vec::new();
        for n in 1.. {
            let rig = Rig::new(&[unit(host)], &[("nic", &[0])]);
            let guest = Guest::new(Arch::Amd, &rig.memory);
            guest.map(0x1000, DATA, true);
            let context = rig.context();
            let device = context.connect("nic").unwrap();
            let ioasid = context.allocate(Request::guest(guest.view())).unwrap();
            rig.sim.fail_nth(n, Errno::EOPNOTSUPP);
            let attached = ioasid.attach(&device, None);
            if rig.sim.disarm() {
                break;
            }
            assert_eq!(rig.dma("nic", 0x1000), attached.is_ok().then_some(DATA), "{host:?} call {n}: {attached:?}");
            if attached.is_ok() {
                let explanation = &ioasid.explain()[0];
                let rejected = explanation.rejected.iter().find(|rejected| rejected.strategy == Strategy::Nested);
                reasons.extend(rejected.iter().flat_map(|rejected| rejected.reasons.clone()));
            }
        }
        let has = |what: &str| reasons.iter().any(|reason| reason.contains(what) && reason.contains("not supported"));
        assert!(has("asking whether invalidations are taken") && has("making a nested page table"), "{host:?}: {reasons:?}");
        assert_eq!(has("making a vIOMMU"), host != Arch::Vtd, "{reasons:?}");
    }
}
