//! One test per rule, one assertion per status.

use stagecraft::memory::Kind;
use stagecraft::table::{Collector, Piece, Source};
use stagecraft::virtio_iommu::{
    Config, ConfigError, Device, DomainRange, Effect, EndpointError, Features, Landing, MapFlags, Reach, Reason, Report, Request, RequestLimits,
    Reserved, ReservedKind, Status, attach_flags,
};
use stagecraft::{Access, Attributes, Change, MemoryType, Span};

use crate::{device, memory};

const RW: MapFlags = MapFlags(3);

/// RAM at 0 to 16 MiB, a device at 4 GiB, endpoints 1, 2 and 3 (this one with reserved regions).
fn plain(config: Config, limits: RequestLimits) -> Device {
    let map = memory(&[(Kind::Ram, 0, 0xff_ffff), (Kind::Device, 1 << 32, (1 << 32) + 0xffff), (Kind::Table, 2 << 32, (2 << 32) + 0xffff)]);
    let mut device = device(config, map, limits);
    device.add_endpoint(1, &[]).unwrap();
    device.add_endpoint(2, &[]).unwrap();
    let msi = Reserved { kind: ReservedKind::Msi, span: Span { first: 0xfee0_0000, last: 0xfeef_ffff } };
    let hole = Reserved { kind: ReservedKind::Reserved, span: Span { first: 0x7000, last: 0x7fff } };
    device.add_endpoint(3, &[msi, hole]).unwrap();
    device
}

fn usual() -> Device {
    plain(Config::default(), RequestLimits::default())
}

fn ask(device: &mut Device, request: Request) -> (Status, Vec<Effect>) {
    let mut effects = Vec::new();
    let before = device.clone();
    let status = device.handle(&request, &mut effects);
    if status != Status::Ok {
        assert_eq!(effects, [], "{request:?}");
        assert_eq!(format!("{before:?}"), format!("{device:?}"), "{request:?} was refused and changed something");
    }
    (status, effects)
}

fn attach(domain: u32, endpoint: u32) -> Request {
    Request::Attach { domain, endpoint, flags: 0 }
}

fn bypass(domain: u32, endpoint: u32) -> Request {
    Request::Attach { domain, endpoint, flags: attach_flags::BYPASS }
}

fn map(domain: u32, first: u64, last: u64, address: u64) -> Request {
    Request::Map { domain, first, last, address, flags: RW }
}

fn unmap(domain: u32, first: u64, last: u64) -> Request {
    Request::Unmap { domain, first, last }
}

fn unmapped(effects: &[Effect]) -> Vec<(u64, u64)> {
    let span = |effect: &Effect| match effect {
        Effect::Changed { change: Change::Unmap(span), .. } => (span.first, span.last),
        other => panic!("{other:?}"),
    };
    effects.iter().map(span).collect()
}

#[test]
fn attach_refuses_what_it_must() {
    let mut device = usual();
    assert_eq!(ask(&mut device, Request::Attach { domain: 1, endpoint: 1, flags: 2 }).0, Status::Inval, "an unknown flag");
    assert_eq!(ask(&mut device, attach(1, 9)).0, Status::NoEnt, "no such endpoint");
    assert_eq!(ask(&mut device, attach(1, 1)).0, Status::Ok);
    assert_eq!(ask(&mut device, bypass(1, 2)).0, Status::Inval, "not a bypass domain");
    assert_eq!(ask(&mut device, bypass(1, 1)).0, Status::Inval, "the same for its own endpoint");
    assert_eq!(ask(&mut device, bypass(2, 2)).0, Status::Ok);
    assert_eq!(ask(&mut device, attach(2, 1)).0, Status::Inval, "a bypass domain");
    assert_eq!(ask(&mut device, map(1, 0x7000, 0x7fff, 0x1000)).0, Status::Ok);
    assert_eq!(ask(&mut device, attach(1, 3)).0, Status::Unsupp, "what is mapped is reserved for this endpoint");
    let mut old = Device::new(Features::MAP_UNMAP.with(Features::BYPASS), Config::default(), memory(&[]), RequestLimits::default()).unwrap();
    old.add_endpoint(1, &[]).unwrap();
    assert_eq!(ask(&mut old, bypass(1, 1)).0, Status::Inval, "the flag belongs to a feature that is not there");
    let config = Config { domain_range: DomainRange { first: 5, last: 6 }, ..Config::default() };
    let mut device = plain(config, RequestLimits::default());
    for (domain, status) in [(4, Status::Range), (5, Status::Ok), (6, Status::Ok), (7, Status::Range)] {
        assert_eq!(ask(&mut device, attach(domain, 1)).0, status, "domain {domain}");
    }
}

#[test]
fn domains_begin_with_their_first_endpoint_and_end_with_their_last() {
    let mut device = usual();
    let (_, effects) = ask(&mut device, attach(7, 1));
    assert_eq!(effects, [Effect::Created { domain: 7, bypass: false }, Effect::Moved { endpoint: 1, reach: Reach::Domain(7) }]);
    assert_eq!(ask(&mut device, attach(7, 2)).1, [Effect::Moved { endpoint: 2, reach: Reach::Domain(7) }]);
    assert_eq!(ask(&mut device, attach(7, 2)), (Status::Ok, Vec::new()), "attached already");
    assert_eq!(ask(&mut device, map(7, 0x1000, 0x1fff, 0)).0, Status::Ok);
    // Elsewhere: as if it were detached first, in one step.
    let (_, effects) = ask(&mut device, attach(8, 1));
    assert_eq!(effects, [Effect::Created { domain: 8, bypass: false }, Effect::Moved { endpoint: 1, reach: Reach::Domain(8) }]);
    assert!(device.domain(7).is_some_and(|domain| domain.len() == 1), "endpoint 2 still has it");
    let (_, effects) = ask(&mut device, Request::Detach { domain: 7, endpoint: 2 });
    assert_eq!(effects, [Effect::Moved { endpoint: 2, reach: Reach::Blocked }, Effect::Destroyed { domain: 7 }]);
    assert_eq!((device.mappings(), device.domain(7)), (0, None));
    assert_eq!(ask(&mut device, attach(7, 2)).0, Status::Ok);
    assert!(device.domain(7).is_some_and(stagecraft::virtio_iommu::Domain::is_empty), "a new domain with an old id has nothing in it");
    // The last endpoint of a domain moves: the domain ends.
    let (_, effects) = ask(&mut device, attach(8, 2));
    assert_eq!(effects, [Effect::Moved { endpoint: 2, reach: Reach::Domain(8) }, Effect::Destroyed { domain: 7 }]);
}

#[test]
fn detach_refuses_what_it_must() {
    let mut device = usual();
    ask(&mut device, attach(1, 1));
    ask(&mut device, attach(2, 2));
    assert_eq!(ask(&mut device, Request::Detach { domain: 1, endpoint: 9 }).0, Status::NoEnt);
    assert_eq!(ask(&mut device, Request::Detach { domain: 9, endpoint: 1 }).0, Status::Inval, "no such domain");
    assert_eq!(ask(&mut device, Request::Detach { domain: 2, endpoint: 1 }).0, Status::Inval, "another domain");
    assert_eq!(ask(&mut device, Request::Detach { domain: 1, endpoint: 3 }).0, Status::Inval, "attached to none");
}

#[test]
fn map_refuses_what_it_must() {
    let config = Config { input_range: Span { first: 0x1000, last: 0xf_ffff }, ..Config::default() };
    let mut device = plain(config, RequestLimits::default());
    ask(&mut device, attach(1, 1));
    ask(&mut device, bypass(2, 2));
    let mut status = |request| ask(&mut device, request).0;
    assert_eq!(status(map(9, 0x1000, 0x1fff, 0)), Status::NoEnt);
    assert_eq!(status(map(2, 0x1000, 0x1fff, 0)), Status::Inval, "a bypass domain");
    assert_eq!(status(Request::Map { domain: 1, first: 0x1000, last: 0x1fff, address: 0, flags: MapFlags(8) }), Status::Inval);
    assert_eq!(status(map(1, 0x2000, 0x1fff, 0)), Status::Inval, "the end before the beginning");
    for (first, last, address, what) in
        [(0x1001, 0x1fff, 0, "first"), (0x1000, 0x1ffe, 0, "last"), (0x1000, 0x1fff, 0x10, "address"), (0x1000, 0x1000, 0, "one byte")]
    {
        assert_eq!(status(map(1, first, last, address)), Status::Range, "{what} is not aligned");
    }
    assert_eq!(status(map(1, 0, 0xfff, 0)), Status::Range, "below the input range");
    assert_eq!(status(map(1, 0xf_f000, 0x10_0fff, 0)), Status::Range, "its end above the input range");
    assert_eq!(status(map(1, 0x1000, 0x1fff, 0x100_0000)), Status::Fault, "no memory there");
    assert_eq!(status(map(1, 0x1000, 0x2fff, 0xff_f000)), Status::Fault, "no memory behind the first page");
    assert_eq!(status(map(1, 0x1000, 0x2fff, u64::MAX - 0xfff)), Status::Fault, "beyond all addresses");
    assert_eq!(status(map(1, 0x1000, 0x1fff, 2 << 32)), Status::Fault, "tables of the host are no target");
    assert_eq!(status(map(1, 0x2000, 0x3fff, 0x1000)), Status::Ok);
    for (first, last) in [(0x2000, 0x3fff), (0x1000, 0x2fff), (0x3000, 0x4fff), (0x1000, 0x4fff), (0x2000, 0x2fff)] {
        assert_eq!(status(map(1, first, last, 0x8000)), Status::Inval, "{first:#x} overlaps");
    }
    assert_eq!(status(map(1, 0x1000, 0x1fff, 0x1000)), Status::Ok, "just before it, to the same address");
    assert_eq!(status(map(1, 0x4000, 0x4fff, 1 << 32)), Status::Ok, "device memory");
}

#[test]
fn a_mapping_may_end_with_the_last_address_there_is() {
    let mut device = usual();
    ask(&mut device, attach(1, 1));
    assert_eq!(ask(&mut device, map(1, u64::MAX - 0xfff, u64::MAX, 0x3000)).0, Status::Ok);
    assert_eq!(ask(&mut device, map(1, u64::MAX - 0x1fff, u64::MAX, 0x3000)).0, Status::Inval);
    let found = device.translate(1, u64::MAX, Access::WRITE).unwrap();
    assert!(matches!(found, Landing::Memory(translation) if translation.address.0 == 0x3fff), "{found:?}");
    assert_eq!(unmapped(&ask(&mut device, unmap(1, 0, u64::MAX)).1), [(u64::MAX - 0xfff, u64::MAX)]);
}

#[test]
fn flags_are_permissions_and_a_memory_type() {
    let mut device = usual();
    ask(&mut device, attach(1, 1));
    for flags in 0..8_u32 {
        let request =
            Request::Map { domain: 1, first: u64::from(flags) << 12, last: (u64::from(flags) << 12) + 0xfff, address: 0, flags: MapFlags(flags) };
        let (status, effects) = ask(&mut device, request);
        assert_eq!(status, Status::Ok);
        let [Effect::Changed { domain: 1, change: Change::Map(Piece { attributes, .. }) }] = effects[..] else { panic!("{effects:?}") };
        let access = attributes.access(false);
        assert_eq!((access.read, access.write), (flags & 1 != 0, flags & 2 != 0));
        assert_eq!(attributes.memory_type(), if flags & 4 != 0 { MemoryType::Device } else { MemoryType::WriteBack });
        assert!(!attributes.contains(Attributes::EXECUTE) && attributes.contains(Attributes::COHERENT) == (flags & 4 == 0));
        for wanted in [Access::READ, Access::WRITE] {
            let found = device.translate(1, u64::from(flags) << 12, wanted);
            assert_eq!(found.is_ok(), access.allows(wanted), "flags {flags}, {wanted}");
        }
    }
    let mut effects = Vec::new();
    device.accept(Features::ALL.without(Features::MMIO), &mut effects).unwrap();
    let request = Request::Map { domain: 1, first: 0x10_0000, last: 0x10_0fff, address: 0, flags: MapFlags(5) };
    assert_eq!(ask(&mut device, request).0, Status::Inval, "the flag without the feature");
}

/// The seven examples of section 5.13.6.6, in bytes as they stand there.
#[test]
fn the_examples_of_the_specification() {
    let fresh = || {
        let mut device = plain(Config { page_size_mask: 1, ..Config::default() }, RequestLimits::default());
        ask(&mut device, attach(1, 1));
        device
    };
    let a = (0, 4);
    for (maps, range, removed) in [
        (&[][..], (0, 4), Some(&[][..])),
        (&[(0, 9)], (0, 9), Some(&[(0, 9)])),
        (&[a, (5, 9)], (0, 9), Some(&[a, (5, 9)])),
        (&[(0, 9)], (0, 4), None),
        (&[a, (5, 9)], (0, 4), Some(&[a])),
        (&[a], (0, 9), Some(&[a])),
        (&[a, (10, 14)], (0, 14), Some(&[a, (10, 14)])),
        // And what the examples leave out: cut at the beginning, in the middle, at both ends.
        (&[(0, 9)], (5, 9), None),
        (&[(0, 9)], (3, 6), None),
        (&[a, (5, 9)], (4, 5), None),
        (&[a, (5, 9)], (0, 8), None),
        (&[a, (5, 9)], (1, 9), None),
    ] {
        let mut device = fresh();
        for (first, last) in maps {
            assert_eq!(ask(&mut device, map(1, *first, *last, *first)).0, Status::Ok);
        }
        let (status, effects) = ask(&mut device, unmap(1, range.0, range.1));
        match removed {
            Some(removed) => assert_eq!((status, &*unmapped(&effects)), (Status::Ok, removed), "{maps:?} {range:?}"),
            None => assert_eq!(status, Status::Range, "{maps:?} {range:?}"),
        }
        assert_eq!(device.mappings(), (maps.len() - removed.map_or(0, <[_]>::len)) as u64);
    }
}

#[test]
fn unmap_refuses_what_it_must() {
    let mut device = usual();
    ask(&mut device, attach(1, 1));
    ask(&mut device, bypass(2, 2));
    assert_eq!(ask(&mut device, unmap(9, 0, 0xfff)).0, Status::NoEnt);
    assert_eq!(ask(&mut device, unmap(2, 0, 0xfff)).0, Status::Inval);
    assert_eq!(ask(&mut device, unmap(1, 1, 0)).0, Status::Inval);
    assert_eq!(ask(&mut device, unmap(1, 1, 1)), (Status::Ok, Vec::new()), "nothing is there, so nothing is cut");
}

#[test]
fn requests_that_were_not_negotiated_are_not_done() {
    let mut device = usual();
    ask(&mut device, attach(1, 1));
    device.accept(Features::default(), &mut Vec::new()).unwrap();
    assert_eq!(ask(&mut device, map(1, 0, 0xfff, 0)).0, Status::Unsupp);
    assert_eq!(ask(&mut device, unmap(1, 0, 0xfff)).0, Status::Unsupp);
    assert_eq!(device.accept(Features::BYPASS, &mut Vec::new()), Err(ConfigError::NotOffered(8)));
}

#[test]
fn reserved_regions_refuse_mappings_of_all_who_share_a_domain() {
    let mut device = usual();
    ask(&mut device, attach(1, 1));
    ask(&mut device, attach(1, 3));
    for (first, last) in [(0x7000, 0x7fff), (0x6000, 0x7fff), (0x7000, 0x8fff), (0, 0xf_ffff), (0xfee0_0000, 0xfee0_0fff), (0xfeef_f000, 0xfef0_0fff)]
    {
        assert_eq!(ask(&mut device, map(1, first, last, 0)).0, Status::Inval, "{first:#x}");
    }
    assert_eq!(ask(&mut device, map(1, 0x6000, 0x6fff, 0)).0, Status::Ok);
    assert_eq!(ask(&mut device, map(1, 0x8000, 0x8fff, 0)).0, Status::Ok);
    assert_eq!(ask(&mut device, Request::Detach { domain: 1, endpoint: 3 }).0, Status::Ok);
    assert_eq!(ask(&mut device, map(1, 0x7000, 0x7fff, 0)).0, Status::Ok, "nobody minds any more");
    // A doorbell is rung by writing, and nothing else of a reserved region can be reached.
    ask(&mut device, attach(2, 3));
    assert_eq!(device.translate(3, 0xfee0_1000, Access::WRITE), Ok(Landing::Doorbell));
    let report = device.translate(3, 0xfee0_1000, Access::READ).unwrap_err();
    assert_eq!(report.reason, Reason::Mapping);
    assert_eq!(device.translate(3, 0x7000, Access::WRITE).unwrap_err().reason, Reason::Mapping);
}

#[test]
fn endpoints_that_cannot_be_are_refused() {
    let mut device = usual();
    let region = |kind, first, last| Reserved { kind, span: Span { first, last } };
    assert_eq!(device.add_endpoint(1, &[]), Err(EndpointError::Exists(1)));
    let (msi, other) = (region(ReservedKind::Msi, 0, 9), region(ReservedKind::Reserved, 9, 12));
    assert_eq!(device.add_endpoint(4, &[other, msi]), Err(EndpointError::Overlap(msi.span, other.span)));
    assert_eq!(device.add_endpoint(4, &[msi, region(ReservedKind::Msi, 20, 29)]), Err(EndpointError::Doorbells));
    let many: Vec<Reserved> = (0..22).map(|index| region(ReservedKind::Reserved, index * 10, index * 10 + 5)).collect();
    assert_eq!(device.add_endpoint(4, &many), Err(EndpointError::ProbeSize { needed: 528, size: 512 }));
    assert_eq!(device.add_endpoint(4, &many[..21]), Ok(Reach::Blocked));
}

#[test]
fn what_a_guest_can_make_us_remember_is_bounded() {
    let mut device = plain(Config::default(), RequestLimits { domains: 2, mappings: 3 });
    ask(&mut device, attach(1, 1));
    ask(&mut device, attach(2, 2));
    assert_eq!(ask(&mut device, attach(3, 3)).0, Status::NoMem);
    assert_eq!(ask(&mut device, attach(3, 2)).0, Status::Ok, "domain 2 ends with it and makes room");
    for (domain, first) in [(1, 0), (1, 0x1000), (3, 0)] {
        assert_eq!(ask(&mut device, map(domain, first, first + 0xfff, 0)).0, Status::Ok);
    }
    assert_eq!(ask(&mut device, map(3, 0x1000, 0x1fff, 0)).0, Status::NoMem);
    assert_eq!(ask(&mut device, Request::Detach { domain: 1, endpoint: 1 }).0, Status::Ok);
    assert_eq!(ask(&mut device, map(3, 0x1000, 0x1fff, 0)).0, Status::Ok, "a domain that ends gives back what it had");
}

#[test]
fn bypass_is_what_the_features_and_the_field_say() {
    let config = Config { bypass: true, ..Config::default() };
    let mut device = plain(config, RequestLimits::default());
    assert_eq!(device.reach(1), Some(Reach::Bypass));
    assert!(matches!(device.translate(1, 0x1234, Access::WRITE), Ok(Landing::Memory(found)) if found.address.0 == 0x1234));
    assert_eq!(device.translate(1, 0x100_0000, Access::READ).unwrap_err().reason, Reason::Unknown, "bypass does not lead out of memory");
    ask(&mut device, attach(1, 1));
    let mut effects = Vec::new();
    device.write_config(36, &[2], &mut effects);
    device.write_config(32, &[0; 4], &mut effects);
    assert_eq!(effects, [], "neither another value nor another field");
    device.write_config(36, &[0], &mut effects);
    let blocked = |endpoint| Effect::Moved { endpoint, reach: Reach::Blocked };
    assert_eq!(effects, [blocked(2), blocked(3)], "those without a domain");
    assert_eq!(device.translate(2, 0, Access::READ).unwrap_err().reason, Reason::Domain);
    // Within a write of the whole space the field is found as well.
    let mut space = device.config().to_bytes();
    space[36] = 1;
    device.write_config(0, &space, &mut effects);
    assert_eq!(device.reach(2), Some(Reach::Bypass));
    effects.clear();
    device.write_config(36, &[0], &mut effects);
    effects.clear();
    device.reset(&mut effects);
    assert_eq!(effects, [blocked(1), Effect::Destroyed { domain: 1 }]);
    effects.clear();
    device.reset_system(&mut effects);
    assert_eq!(effects.len(), 3, "the field is what it was at first, for everybody");
    assert!(device.config().bypass);
    // The older feature has to be negotiated.
    let mut old =
        Device::new(Features::MAP_UNMAP.with(Features::BYPASS), config, memory(&[(Kind::Ram, 0, 0xffff)]), RequestLimits::default()).unwrap();
    assert_eq!(old.add_endpoint(1, &[]), Ok(Reach::Blocked));
    old.accept(Features::MAP_UNMAP.with(Features::BYPASS), &mut effects).unwrap();
    assert_eq!(old.reach(1), Some(Reach::Bypass));
    assert_eq!(Device::new(Features(0x48), config, memory(&[]), RequestLimits::default()).unwrap_err(), ConfigError::BothBypasses);
    assert_eq!(Device::new(Features(0x80), config, memory(&[]), RequestLimits::default()).unwrap_err(), ConfigError::UnknownFeatures(0x80));
}

#[test]
fn an_endpoint_that_is_unplugged_takes_its_domain_with_it() {
    let mut device = usual();
    ask(&mut device, attach(1, 1));
    ask(&mut device, map(1, 0, 0xfff, 0));
    let mut effects = Vec::new();
    device.remove_endpoint(1, &mut effects);
    assert_eq!(effects, [Effect::Moved { endpoint: 1, reach: Reach::Blocked }, Effect::Destroyed { domain: 1 }]);
    assert_eq!((device.reach(1), device.mappings()), (None, 0));
    assert_eq!(ask(&mut device, attach(1, 1)).0, Status::NoEnt);
}

#[test]
fn reports_are_the_bytes_that_a_driver_reads() {
    let mut device = usual();
    ask(&mut device, attach(1, 1));
    let report = device.translate(1, 0x1_2345_6789, Access::WRITE).unwrap_err();
    assert_eq!(report, Report { reason: Reason::Mapping, endpoint: 1, access: Access::WRITE, address: Some(0x1_2345_6789) });
    let bytes = [2, 0, 0, 0, 2, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0x89, 0x67, 0x45, 0x23, 1, 0, 0, 0];
    assert_eq!(report.to_bytes(), bytes);
    let mut buffer = [0xaa; 26];
    assert_eq!(report.write(&mut buffer), 24);
    assert_eq!((&buffer[..24], &buffer[24..]), (&bytes[..], &[0xaa, 0xaa][..]));
    assert_eq!((report.write(&mut buffer[..23]), Report { address: None, ..report }.to_bytes()[4..8] == [2, 0, 0, 0]), (0, true));
}

/// What was mapped and is not in memory any more is a fault of a walk, and never a piece.
#[test]
fn a_walk_stays_in_memory_and_in_its_span() {
    let mut device = usual();
    ask(&mut device, attach(1, 1));
    ask(&mut device, map(1, 0x1000, 0x4fff, 0x1000));
    ask(&mut device, map(1, 0x8000, 0x8fff, 0x8000));
    let smaller = memory(&[(Kind::Ram, 0x2000, 0x2fff), (Kind::Ram, 0x4000, 0x47ff)]);
    let budget = stagecraft::memory::Budget::new(stagecraft::memory::Limits::default());
    let mut seen = Collector::new(false, 10);
    device.domain(1).unwrap().walk(&smaller, Span { first: 0x1800, last: 0x8800 }, &budget, &mut seen).unwrap();
    let runs: Vec<(u64, u64, u64)> = seen.mappings().iter().map(|run| (run.iova.first, run.iova.last, run.address)).collect();
    assert_eq!(runs, [(0x2000, 0x2fff, 0x2000), (0x4000, 0x47ff, 0x4000)]);
    let faults: Vec<(u64, u64)> = seen.faults().iter().map(|(span, _)| (span.first, span.last)).collect();
    assert_eq!(faults, [(0x1800, 0x1fff), (0x3000, 0x3fff), (0x4800, 0x4fff), (0x8000, 0x8800)]);
    let spent = stagecraft::memory::Budget::new(stagecraft::memory::Limits { leaves: 1, ..Default::default() });
    assert!(device.domain(1).unwrap().walk(&smaller, Span::ALL, &spent, &mut Collector::new(false, 0)).is_err(), "a budget ends it");
}
