//! Calls with numbers that make no sense, and descriptions that somebody wrote by hand: they end, they are refused or do what there is to do, and leave nothing behind.

use std::sync::Arc;

use serde_json::Value;
use stagecraft::ioasid::{Error, Request, Response, Saved, Setup, SpaceLimits, Strategy, Target};
use stagecraft::kernel::sim::UnitConfig;
use stagecraft::sync::{AreaLimits, ShadowLimits, Unwatched};
use stagecraft::table::Piece;
use stagecraft::{Access, Attributes, Change, Gpa, Iova, Span};
use vm_memory::MmapRegion;

use crate::guests::{Arch, Guest, ROOT};
use crate::rig::{DATA, Rig, page, range, unit};

const RW: Access = Access { read: true, write: true };

/// Numbers at the ends of what there is.
const NUMBERS: [u64; 10] = [0, 1, 0xfff, 0x1000, 1 << 31, 1 << 32, 1 << 47, 1 << 63, u64::MAX - 0xfff, u64::MAX];

/// The last is before the first: as the end of a range that wraps, or of one in which there is nothing.
const EMPTY: [Span; 3] = [Span { first: 0x2000, last: 0x1fff }, Span { first: u64::MAX, last: 0 }, Span { first: 0x8000, last: 0x1fff }];

fn hosts(arch: Arch) -> [UnitConfig; 2] {
    [unit(arch), unit(arch).without_nesting()]
}

/// A write of all there is costs what there are tables, and not what there are addresses.
#[test]
fn a_write_of_all_addresses_is_one_of_all_tables() {
    for arch in Arch::ALL {
        for host in hosts(Arch::Vtd) {
            let rig = Rig::new(&[host], &[("nic", &[0])]);
            let guest = Guest::new(arch, &rig.memory);
            {
                let setup = Setup { watcher: Some(Box::new(Unwatched)), ..rig.setup() };
                let context = stagecraft::ioasid::Context::with(setup).unwrap();
                let device = context.connect("nic").unwrap();
                guest.map(0x2000, DATA + 0x2000, true);
                let converted = [Strategy::Nested, Strategy::Areas, Strategy::Software];
                let ioasid = context.allocate(Request::guest(guest.view()).with_strategies(&converted)).unwrap();
                let lookup = ioasid.lookup().unwrap();
                ioasid.attach(&device, None).unwrap();
                for (first, length) in [(0, u64::MAX), (1, u64::MAX), (ROOT, u64::MAX - ROOT), (0, 1 << 63)] {
                    guest.map(0x1000, DATA, true);
                    ioasid.table_written(Gpa(first), length).unwrap();
                    let what = format!("{arch:?}: {length:#x} bytes from {first:#x}");
                    assert_eq!((rig.dma("nic", 0x1000), rig.dma("nic", 0x2000)), (Some(DATA), Some(DATA + 0x2000)), "{what}");
                    guest.unmap(0x1000);
                    context.table_written(Gpa(first), length).unwrap();
                    assert_eq!((rig.dma("nic", 0x1000), lookup.find(Iova(0x1000))), (None, None), "{what}");
                }
                guest.map(0x1000, DATA, true);
                for (first, length) in [(u64::MAX, u64::MAX), (u64::MAX, 1), (1 << 63, 1 << 62), (ROOT, 0)] {
                    ioasid.table_written(Gpa(first), length).unwrap();
                    context.table_written(Gpa(first), length).unwrap();
                    assert_eq!(rig.dma("nic", 0x1000), None, "{arch:?}: {length:#x} bytes from {first:#x}: no table is there");
                }
            }
            rig.assert_clean();
        }
    }
}

/// Whoever computes the end of a range from its length may come out before its beginning.
#[test]
fn ranges_that_end_before_they_begin_are_no_reason_to_stop() {
    let rig = Rig::new(&[unit(Arch::Vtd)], &[("nic", &[0]), ("disk", &[0])]);
    let guest = Guest::new(Arch::Arm, &rig.memory);
    {
        let context = rig.context();
        let (nic, disk) = (context.connect("nic").unwrap(), context.connect("disk").unwrap());
        let managed = context.allocate(Request::managed()).unwrap();
        managed.attach(&nic, None).unwrap();
        let whole = Span { first: 0, last: 0xffff };
        managed.map(whole, Target::Guest(Gpa(DATA)), RW).unwrap();
        let requests = context.allocate(Request::requests()).unwrap();
        let tables = context.allocate(Request::guest(guest.view())).unwrap();
        tables.lookup().unwrap();
        tables.attach(&disk, None).unwrap();
        for span in EMPTY {
            for target in [Target::Guest(Gpa(DATA)), Target::Guest(Gpa(u64::MAX)), Target::User(0x1000)] {
                assert!(managed.map(span, target, RW).is_err(), "{span}");
            }
            assert!(matches!(managed.unmap(span), Err(Error::NotMapped(_))), "{span}");
            let map = Change::Map(Piece { iova: span, address: DATA, attributes: Attributes::READ });
            assert!(requests.change(&[map]).is_err() && requests.change(&[Change::Unmap(span)]).is_err(), "{span}");
            // More is looked at rather than less: it may have wrapped.
            guest.map(0x1000, DATA, true);
            tables.invalidate(&[range(span.first, span.last, false)]).unwrap();
            assert_eq!(rig.dma("disk", 0x1000), Some(DATA), "{span}");
            guest.unmap(0x1000);
            tables.invalidate(&[page(0x5000), range(span.first, span.last, true), page(0x9000)]).unwrap();
            assert_eq!(rig.dma("disk", 0x1000), None, "{span}");
            assert!(tables.lookup().unwrap().pieces(span).count() <= 1);
            tables.write_marks(span);
            assert!(managed.dirty(span, true).is_err() && context.dirty(span, false).is_err(), "{span}");
        }
        assert_eq!((rig.dma("nic", 0xf000), managed.unmap(whole).unwrap()), (Some(DATA + 0xf000), 1));
    }
    rig.assert_clean();
}

#[test]
fn faults_at_any_address_are_answered() {
    for arch in Arch::ALL {
        for host in hosts(Arch::Amd).into_iter().chain([unit(arch)]) {
            let rig = Rig::new(&[host], &[("nic", &[0])]);
            let guest = Guest::new(arch, &rig.memory);
            {
                let context = rig.context();
                let device = context.connect("nic").unwrap();
                guest.map(0x1000, DATA, true);
                let ioasid = context.allocate(Request::guest(guest.view())).unwrap();
                ioasid.lookup().unwrap();
                ioasid.attach(&device, None).unwrap();
                let managed = context.allocate(Request::managed()).unwrap();
                for iova in NUMBERS {
                    for access in [(false, false), (true, false), (false, true), (true, true)].map(|(read, write)| Access { read, write }) {
                        let is_there = iova == 0x1000;
                        let response = ioasid.fault(Iova(iova), access).unwrap();
                        assert_eq!(response == Response::Mapped, is_there, "{arch:?}: {iova:#x}, {access:?}: {response:?}");
                        assert_eq!(managed.fault(Iova(iova), access).unwrap(), Response::Unmapped);
                    }
                }
                assert_eq!(rig.dma("nic", 0x1000), Some(DATA));
            }
            rig.assert_clean();
        }
    }
}

/// Limits of nothing, and of everything.
#[test]
fn limits_at_either_end_hold() {
    for most in [0, usize::MAX] {
        let areas = AreaLimits { areas: most, swap: most, pieces: most, join: most as u64, hitless_changes: most == 0, ..AreaLimits::default() };
        let shadow = ShadowLimits { table_pages: most as u64, leaves: most as u64 };
        let lookup = stagecraft::lookup::Limits { nodes: if most == 0 { 0 } else { 1 << 10 } };
        let limits = SpaceLimits { shadow, questions: most as u64, table_bytes: most as u64, areas, lookup, mappings: most };
        for host in Arch::ALL.into_iter().flat_map(hosts) {
            let rig = Rig::new(&[host], &[("nic", &[0])]);
            let guest = Guest::new(Arch::Riscv, &rig.memory);
            {
                let context = rig.context();
                let device = context.connect("nic").unwrap();
                guest.map(0x1000, DATA, true);
                guest.map_large(0x4000_0000, 0x100_0000, true);
                let ioasid = context.allocate(Request::guest(guest.view()).with_limits(limits)).unwrap();
                let lookup = ioasid.lookup().ok();
                let attached = ioasid.attach(&device, None).is_ok();
                guest.map(0x2000, DATA + 0x2000, true);
                guest.split(0x4000_0000, 0x100_0000, true);
                ioasid.invalidate(&[range(0, u64::MAX, false)]).unwrap();
                if most > 0 {
                    assert!(attached && lookup.is_some());
                    assert_eq!((rig.dma("nic", 0x2000), rig.dma("nic", 0x4000_1000)), (Some(DATA + 0x2000), Some(0x100_1000)));
                } else if !ioasid.strategies().contains(&Strategy::Native) {
                    assert_eq!((rig.dma("nic", 0x2000), rig.dma("nic", 0x4000_1000)), (None, None));
                    assert_eq!(lookup.and_then(|lookup| lookup.find(Iova(0x2000))), None);
                }
            }
            rig.assert_clean();
        }
    }
}

/// All places in a document, as ways to them.
fn places(value: &Value, way: &mut Vec<usize>, found: &mut Vec<Vec<usize>>) {
    found.push(way.clone());
    let below: Vec<&Value> = match value {
        Value::Array(items) => items.iter().collect(),
        Value::Object(fields) => fields.values().collect(),
        _ => Vec::new(),
    };
    for (index, value) in below.into_iter().enumerate() {
        way.push(index);
        places(value, way, found);
        way.pop();
    }
}

fn at<'a>(value: &'a mut Value, way: &[usize]) -> &'a mut Value {
    way.iter().fold(value, |value, index| match value {
        Value::Array(items) => &mut items[*index],
        Value::Object(fields) => fields.values_mut().nth(*index).unwrap(),
        _ => unreachable!("the way leads on"),
    })
}

/// Other things that may stand in a place.
fn others(value: &Value) -> Vec<Value> {
    match value {
        Value::Number(_) => [0, 1, 0xfff, 1 << 32, 1 << 63, u64::MAX - 1, u64::MAX].map(Value::from).into(),
        Value::Bool(is) => vec![Value::from(!is)],
        Value::String(text) => vec![Value::from(""), Value::from(format!("{text}x")), Value::from("x".repeat(300))],
        Value::Null => vec![Value::from(1), Value::from(u64::MAX)],
        Value::Array(items) => {
            let (turned, twice) = (items.iter().rev().cloned().collect(), items.iter().chain(items).cloned().collect());
            vec![Value::Array(Vec::new()), Value::Array(turned), Value::Array(twice)]
        }
        Value::Object(_) => vec![Value::Null],
    }
}

/// Each value of a description in turn is another: it is refused, or what comes of it can be used, and goes without a trace.
#[test]
fn descriptions_that_somebody_wrote_are_refused_or_can_be_used() {
    let first = Rig::new(&[unit(Arch::Vtd)], &[("nic", &[0]), ("disk", &[0]), ("gpu", &[0])]);
    let guest = Guest::new(Arch::Arm, &first.memory);
    let context = first.context();
    let [nic, disk, gpu] = [("nic", 0x10), ("disk", 0x20), ("gpu", 0x30)].map(|(label, id)| context.connect_as(label, id).unwrap());
    guest.map(0x1000, DATA, true);
    let tables = context.allocate(Request::guest(guest.view())).unwrap();
    tables.lookup().unwrap();
    tables.attach(&nic, None).unwrap();
    let managed = context.allocate(Request::managed()).unwrap();
    managed.map(Span { first: 0x5000, last: 0x6fff }, Target::Guest(Gpa(DATA + 0x4000)), RW).unwrap();
    let own = Arc::new(MmapRegion::new(0x1000).unwrap());
    first.sim.register_region(Arc::clone(&own)).unwrap();
    managed.map(Span { first: 0x9000, last: 0x9fff }, Target::User(own.as_ptr() as u64), RW).unwrap();
    managed.attach(&disk, None).unwrap();
    let requests = context.allocate(Request::requests()).unwrap();
    requests.change(&[Change::Map(Piece { iova: Span { first: 0x7000, last: 0x8fff }, address: DATA, attributes: Attributes::READ })]).unwrap();
    requests.attach(&gpu, None).unwrap();
    let saved = serde_json::to_value(context.save()).unwrap();
    let user = |_, _| Some(own.as_ptr() as u64);

    let mut all = Vec::new();
    places(&saved, &mut Vec::new(), &mut all);
    let (mut refused, mut restored) = (0, 0);
    for (number, host) in [unit(Arch::Riscv), unit(Arch::Amd).without_nesting()].into_iter().enumerate() {
        let second = Rig { sim: Rig::new(&[host], &[("nic", &[0]), ("disk", &[0]), ("gpu", &[0])]).sim, memory: Arc::clone(&first.memory) };
        second.sim.register_memory(&second.memory).unwrap();
        second.sim.register_region(Arc::clone(&own)).unwrap();
        // Every second place for each, so that it does not take long.
        for way in all.iter().skip(number).step_by(2) {
            for other in others(at(&mut saved.clone(), way)) {
                let mut document = saved.clone();
                *at(&mut document, way) = other.clone();
                let Ok(document) = serde_json::from_value::<Saved>(document) else { continue };
                match document.restore(second.setup(), user) {
                    Err(_) => refused += 1,
                    Ok(made) => {
                        restored += 1;
                        for ioasid in &made.ioasids {
                            let _ = (ioasid.synchronise(), ioasid.lookup(), ioasid.fault(Iova(0x1000), RW), ioasid.explain());
                        }
                        // Numbers are those of one each.
                        let next = made.context.allocate(Request::managed()).map(|ioasid| ioasid.id());
                        let taken = next.is_ok_and(|next| made.ioasids.iter().any(|ioasid| ioasid.id() == next));
                        assert!(!taken, "{way:?} {other}: a number is given again");
                        let again = serde_json::to_value(made.context.save()).unwrap();
                        let again: Saved = serde_json::from_value(again).unwrap();
                        assert_eq!(again.ioasids(), document.ioasids(), "{way:?} {other}");
                    }
                }
                let left = (second.sim.objects(), second.sim.pinned_pages(), second.sim.areas());
                assert_eq!(left, (0, 0, 0), "{way:?} {other}");
            }
        }
    }
    println!("{refused} refused, {restored} restored");
    assert!(refused > 100 && restored > 100, "{refused} refused, {restored} restored");
}
