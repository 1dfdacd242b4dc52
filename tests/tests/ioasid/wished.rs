//! Host tables of a format, and with settings, that the VMM asks for.

use stagecraft::ioasid::{Error, Property, Request, Restored, Saved, Strategy};
use stagecraft::kernel::sim::{UnitConfig, UnitKind};
use stagecraft::plugin::TableConfig;

use crate::guests::{Arch, Guest};
use crate::rig::{DATA, Rig, unit};

/// What is said when a guest's table is to be one of these in the host; and where 0x1000, which leads to [`DATA`], leads to then.
fn said(arch: Arch, host: &UnitConfig, wish: TableConfig) -> (String, Option<u64>) {
    let rig = Rig::new(std::slice::from_ref(host), &[("nic", &[0])]);
    let guest = Guest::new(arch, &rig.memory);
    guest.map(0x1000, DATA, true);
    let context = rig.context();
    let device = context.connect("nic").unwrap();
    let ioasid = context.allocate(Request::guest(guest.view()).with_host_table(wish)).unwrap();
    let before = ioasid.explain_for(&device, None).unwrap();
    match ioasid.attach(&device, None) {
        Ok(_) => assert_eq!(ioasid.explain(), std::slice::from_ref(&before)),
        Err(Error::Refused(refusal)) => {
            assert_eq!((refusal.property, before.chosen.is_none()), (Property::Strategy, true));
            assert!(before.rejected.iter().all(|rejected| refusal.reason.contains(&rejected.reasons.join("; "))), "{refusal}");
            assert_eq!(ioasid.serves(&device, None).unwrap_err(), refusal);
        }
        Err(error) => panic!("{error}"),
    }
    (before.to_string(), rig.dma("nic", 0x1000))
}

#[test]
fn it_is_what_is_asked_for_or_nothing() {
    let vtd = unit(Arch::Vtd);
    let first_stage = |levels| TableConfig::new("intel-vtd/first-stage", &[("levels", levels)]);
    let there = Some(DATA);
    let foreign = "not bound as it is: the guest's format is arm-smmuv3/stage1, and intel-vtd/first-stage is asked for";
    let short = "note: IOVAs 0x800000000000..=0xffffffffffff are not translated";
    assert_eq!(
        said(Arch::Arm, &vtd, first_stage(4)),
        (format!("device nic: converted, nested: intel-vtd/first-stage levels=0x4\n  {foreign}\n  {short}"), there)
    );
    assert_eq!(
        said(Arch::Arm, &vtd, first_stage(5)),
        (format!("device nic: converted, nested: intel-vtd/first-stage levels=0x5\n  {foreign}"), there)
    );
    let any = TableConfig::new("intel-vtd/first-stage", &[]);
    assert_eq!(said(Arch::Arm, &vtd, any.clone()), (format!("device nic: converted, nested: intel-vtd/first-stage levels=0x5\n  {foreign}"), there));
    // Its own is one of these, or is not.
    let own = "device nic: bound as it is: the guest's intel-vtd/first-stage levels=0x4 root=0x100000".to_owned();
    assert_eq!(said(Arch::Vtd, &vtd, first_stage(4)), (own.clone(), there));
    assert_eq!(said(Arch::Vtd, &vtd, any.clone()), (own, there));
    let other = "not bound as it is: levels is 4 in the guest's table, and 5 is asked for";
    assert_eq!(said(Arch::Vtd, &vtd, first_stage(5)), (format!("device nic: converted, nested: intel-vtd/first-stage levels=0x5\n  {other}"), there));
    // What the unit does not have.
    let mut narrow = vtd.clone();
    if let UnitKind::Vtd { cap, .. } = &mut narrow.kind {
        *cap &= !(1 << 60);
    }
    let rest = "not mapped by the kernel: a table of intel-vtd/first-stage is asked for, and the kernel's own are not\n  \
                not in software: a device's DMA does not go through software";
    let beyond = "not converted, nested: intel-vtd/first-stage: levels is 5, and the unit has 4";
    assert_eq!(said(Arch::Arm, &narrow, first_stage(5)), (format!("device nic: cannot be attached\n  {foreign}\n  {beyond}\n  {rest}"), None));
    assert_eq!(
        said(Arch::Arm, &vtd, TableConfig::new("riscv-iommu/first-stage", &[])),
        (
            "device nic: cannot be attached\n  \
             not bound as it is: the guest's format is arm-smmuv3/stage1, and riscv-iommu/first-stage is asked for\n  \
             not converted, nested: a table of riscv-iommu/first-stage is asked for, and the unit takes intel-vtd/first-stage\n  \
             not mapped by the kernel: a table of riscv-iommu/first-stage is asked for, and the kernel's own are not\n  \
             not in software: a device's DMA does not go through software"
                .to_owned(),
            None
        )
    );
    let deaf = vtd.without_nesting();
    assert_eq!(
        said(Arch::Arm, &deaf, any),
        (
            format!(
                "device nic: cannot be attached\n  {foreign}\n  not converted, nested: unit 1 of the path takes no tables of its users\n  {rest}"
            ),
            None
        )
    );
}

/// Each page size that a unit has, and one that it has not.
#[test]
fn page_sizes_are_what_is_asked_for() {
    let granule = |bytes| TableConfig::new("arm-smmuv3/stage1", &[("granule", bytes)]);
    for (bytes, there) in [(4096, Some(DATA)), (16384, None), (65536, None)] {
        let (said, found) = said(Arch::Vtd, &unit(Arch::Arm), granule(bytes));
        assert!(said.starts_with(&format!("device nic: converted, nested: arm-smmuv3/stage1 granule={bytes:#x} ")), "{said}");
        // Larger pages cannot say what the guest's small ones say.
        assert_eq!(found, there, "{said}");
    }
}

#[test]
fn what_cannot_be_is_refused_at_once() {
    let rig = Rig::new(&[unit(Arch::Vtd)], &[("nic", &[0])]);
    let guest = Guest::new(Arch::Arm, &rig.memory);
    let context = rig.context();
    let allocate = |request: Request, wish: TableConfig| context.allocate(request.with_host_table(wish)).map(|_| ()).unwrap_err();
    let refused = |request: Request, wish: TableConfig| match allocate(request, wish) {
        Error::Refused(refusal) => (refusal.property, refusal.reason),
        error => panic!("{error}"),
    };
    let of_guest = || Request::guest(guest.view());
    let first_stage = |settings: &[(&str, u64)]| TableConfig::new("intel-vtd/first-stage", settings);
    let known = |name: &str| {
        (
            Property::Format,
            format!(
                "intel-vtd/first-stage has no setting `{name}`; there are levels, output-bits, page-1g, write-protect, supervisor, privileged, extended-access, memory-type"
            ),
        )
    };
    assert_eq!(refused(of_guest(), first_stage(&[("granule", 4096)])), known("granule"));
    assert_eq!(refused(of_guest(), first_stage(&[("levels", 4), ("root", 0x1000)])), known("root"));
    assert_eq!(
        refused(Request::managed(), first_stage(&[])),
        (Property::Format, "mappings of the VMM are in the kernel's own tables, and a table of intel-vtd/first-stage is asked for".to_owned())
    );
    assert!(matches!(allocate(of_guest(), first_stage(&[("levels", 7)])), Error::Call(_)));
    assert!(matches!(allocate(of_guest(), TableConfig::new("intel-vtd/third-stage", &[])), Error::Plugins(_)));
    assert!(matches!(allocate(Request::requests(), TableConfig::new("nobody/anything", &[])), Error::Plugins(_)));
    assert_eq!(context.ioasids().len(), 0);
}

#[test]
fn it_is_written_down_and_asked_for_again() {
    let rig = Rig::new(&[unit(Arch::Vtd)], &[("nic", &[0])]);
    let guest = Guest::new(Arch::Arm, &rig.memory);
    let context = rig.context();
    let device = context.connect("nic").unwrap();
    let wish = TableConfig::new("intel-vtd/first-stage", &[("levels", 4)]);
    let requests = context.allocate(Request::requests().with_host_table(wish.clone())).unwrap();
    let ioasid = context.allocate(Request::guest(guest.view()).with_host_table(wish.clone())).unwrap();
    ioasid.attach(&device, None).unwrap();
    let text = serde_json::to_string(&context.save()).unwrap();
    drop((requests, ioasid, device, context));
    let saved: Saved = serde_json::from_str(&text).unwrap();
    let rig = Rig::new(&[unit(Arch::Vtd)], &[("nic", &[0])]);
    let Restored { ioasids, .. } = saved.restore(rig.setup(), |_, _| None).unwrap();
    assert!(ioasids.iter().all(|ioasid| ioasid.request().host_table.as_ref() == Some(&wish)) && ioasids.len() == 2);
    assert_eq!(ioasids[1].strategies(), [Strategy::Nested]);
    assert!(ioasids[1].explain()[0].to_string().contains("intel-vtd/first-stage levels=0x4"));
    // One that was written down before anybody could ask.
    let before: String = text.replace(r#""host_table":{"format":"intel-vtd/first-stage","settings":[["levels",4]]},"#, "");
    assert_ne!(before, text);
    let rig = Rig::new(&[unit(Arch::Vtd)], &[("nic", &[0])]);
    let saved: Saved = serde_json::from_str(&before).unwrap();
    let Restored { ioasids, .. } = saved.restore(rig.setup(), |_, _| None).unwrap();
    assert!(ioasids.iter().all(|ioasid| ioasid.request().host_table.is_none()));
    assert!(ioasids[1].explain()[0].to_string().contains("intel-vtd/first-stage levels=0x5"));
}
