//! Invalidation descriptors as drivers queue them, and fault records, in raw words: D51397 sections 6.5.2 and 11.4.14.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../../../sdk/testing/event.rs"]
mod event;

use proptest::prelude::*;
use stagecraft_plugin_intel_vtd::unit::IntelVtd;
use stagecraft_sdk::queue::Access;
use stagecraft_sdk::{Command, Effect, Error, Event, FaultKind, Registers, Scope, Unit};

fn registers(list: &[(&str, u64)]) -> Registers {
    list.iter().map(|&(name, value)| (name.to_owned(), value)).collect()
}

fn decode(descriptors: &[[u64; 2]]) -> Vec<Command> {
    let bytes: Vec<u8> = descriptors.iter().flatten().flat_map(|word| word.to_le_bytes()).collect();
    IntelVtd::decode_commands(&registers(&[("IQA", 0x1000)]), &bytes).unwrap()
}

fn scalable(descriptor: [u64; 2]) -> Effect {
    let bytes: Vec<u8> = descriptor.iter().flat_map(|word| word.to_le_bytes()).collect();
    // TTM 1.
    IntelVtd::decode_commands(&registers(&[("IQA", 0x1000), ("RTADDR", 0x1400)]), &bytes).unwrap()[0].effect
}

fn effect(descriptor: [u64; 2]) -> Effect {
    let [Command { index: 0, effect }] = decode(&[descriptor])[..] else { panic!("one effect") };
    effect
}

const ILLEGAL: Effect = Effect::Illegal(0x10);

#[test]
fn context_and_pasid_caches() {
    let all = Scope::ALL;
    assert_eq!(effect([0x11, 0]), Effect::Structures(all));
    assert_eq!(effect([0x1234_0021, 0]), Effect::Structures(all.domain(0x1234)));
    let device = all.domain(0x1234).id(0xabcd);
    assert_eq!(effect([0xabcd_1234_0031, 0]), Effect::Structures(device));
    for (mask, ignored) in [(1, 4), (2, 6), (3, 7)] {
        assert_eq!(effect([mask << 48 | 0xabcd_1234_0031, 0]), Effect::Structures(device.ignoring(ignored)));
    }
    // Context entries of scalable mode have no domain.
    assert_eq!(scalable([0x1234_0021, 0]), Effect::Structures(all));
    assert_eq!(scalable([0xabcd_0000_0031, 0]), Effect::Structures(all.id(0xabcd)));
    assert_eq!(scalable([0x1234_0007, 0]), Effect::Structures(all.domain(0x1234)));
    assert_eq!(effect([0x1234_0007, 0]), Effect::Structures(all.domain(0x1234)));
    assert_eq!(effect([0xa_bcde_1234_0017, 0]), Effect::Structures(all.domain(0x1234).space(0xa_bcde)));
    assert_eq!(effect([0x37, 0]), Effect::Structures(all));
    assert_eq!([effect([0x01, 0]), effect([0x27, 0])], [ILLEGAL; 2], "reserved granularities");
}

#[test]
fn translations() {
    let domain = Scope::ALL.domain(0x1234);
    assert_eq!(effect([0x12, 0]), Effect::Everything);
    assert_eq!(effect([0x1234_00e2, 0]), Effect::Range(domain), "with DR and DW");
    let pages = domain.second_stage();
    assert_eq!(effect([0x1234_0032, 0x5_6789_0000]), Effect::Range(pages.range(0x5_6789_0000, 0x5_6789_0fff)));
    assert_eq!(effect([0x1234_0032, 0x5_6789_0049]), Effect::Range(pages.range(0x5_6780_0000, 0x5_679f_ffff).leaf(true)), "2 MiB, leaves only");
    assert_eq!(effect([0x1234_0032, 0x3f]), Effect::Range(pages), "more than there is");
    let space = domain.space(0xa_bcde);
    assert_eq!(effect([0xa_bcde_1234_0026, 0]), Effect::Range(space));
    assert_eq!(
        effect([0xa_bcde_1234_0036, 0xffff_8000_0000_0042]),
        Effect::Range(space.range(0xffff_8000_0000_0000, 0xffff_8000_0000_3fff).leaf(true))
    );
    assert_eq!([effect([0x02, 0]), effect([0x06, 0]), effect([0x16, 0])], [ILLEGAL; 3], "reserved granularities");
}

#[test]
fn device_tlbs() {
    let device = Scope::ALL.id(0xabcd);
    assert_eq!(effect([0xabcd_0000_0003, 0x1234_5000]), Effect::DeviceTlb(device.range(0x1234_5000, 0x1234_5fff)));
    assert_eq!(effect([0xabcd_0000_0003, 0x1234_4001]), Effect::DeviceTlb(device.range(0x1234_4000, 0x1234_5fff)), "two pages");
    assert_eq!(effect([0xabcd_0000_0003, 0x1230_7001]), Effect::DeviceTlb(device.range(0x1230_0000, 0x1230_ffff)), "sixteen");
    assert_eq!(effect([0xabcd_0000_0003, 0xffff_ffff_ffff_f001]), Effect::DeviceTlb(device));
    assert_eq!(effect([0xabcd_0000_0003, 0x7fff_ffff_ffff_f001]), Effect::DeviceTlb(device));
    let pasid = device.space(0x1_2345);
    assert_eq!(effect([0x1_2345_abcd_0008, 0x1234_5000]), Effect::DeviceTlb(pasid.range(0x1234_5000, 0x1234_5fff)));
    assert_eq!(effect([0x1_2345_abcd_0008, 0x1230_7800]), Effect::DeviceTlb(pasid.range(0x1230_0000, 0x1230_ffff)));
    assert_eq!(effect([0x1_2345_abcd_0008, 0x1234_5001]), Effect::DeviceTlb(device.range(0x1234_5000, 0x1234_5fff)), "of all PASIDs");
}

#[test]
fn the_rest() {
    assert_eq!([effect([0x4, 0]), effect([0x14, 0]), effect([0x25, 0x1234_5678])], [Effect::Nothing; 3]);
    for other in [0x0, 0xa, 0xf, 0x202, 0xe12] {
        assert_eq!(effect([other, 0]), ILLEGAL, "{other:#x}");
    }
    let batch: Vec<Effect> = decode(&[[0x12, 0], [0, 0], [0x12, 0]]).iter().map(|command| command.effect).collect();
    assert_eq!(batch, [Effect::Everything, ILLEGAL]);
}

#[test]
fn the_queue_register_says_how_long_descriptors_are() {
    let mut bytes = [0; 64];
    (bytes[0], bytes[32]) = (0x12, 0x25);
    let wide = IntelVtd::decode_commands(&registers(&[("IQA", 0x1800)]), &bytes).unwrap();
    assert_eq!(wide, [Command { index: 0, effect: Effect::Everything }, Command { index: 1, effect: Effect::Nothing }]);
    assert!(matches!(IntelVtd::decode_commands(&registers(&[("IQA", 0x1800)]), &bytes[..48]), Err(Error::Invalid(_))));
    assert!(matches!(IntelVtd::decode_commands(&registers(&[]), &bytes), Err(Error::Invalid(invalid)) if invalid.field == "IQA"));
}

fn event() -> Event {
    Event { level: Some(1), domain: Some(1), ..event::unmapped("intel-vtd/second-stage", 0x0138, 0x1_2345_6789) }
}

fn record(rtaddr: u64, event: &Event) -> [u64; 2] {
    let record = IntelVtd::encode_event(&registers(&[("RTADDR", rtaddr)]), event).unwrap();
    assert_eq!(record.queue, "FRCD");
    stagecraft_sdk::bits::words(&record.bytes).try_into().unwrap()
}

#[test]
fn faults_in_legacy_mode() {
    let legacy = |event: &Event| record(0x1000, event);
    assert_eq!(legacy(&event()), [0x1_2345_6000, 0xc000_0006_0000_0138]);
    assert_eq!(legacy(&Event { access: Access::Write, ..event() }), [0x1_2345_6000, 0x8000_0005_0000_0138]);
    let reason = |event: Event| legacy(&event)[1] >> 32 & 0xff;
    assert_eq!(reason(Event { level: None, ..event() }), 4, "beyond the width");
    assert_eq!(reason(Event { fault: FaultKind::Reserved, ..event() }), 0xc);
    assert_eq!(reason(Event { fault: FaultKind::Unreadable, ..event() }), 7);
    for (name, number) in [("LRT.2", 1), ("LCT.2", 2), ("LCT.4.1", 3), ("LRT.1", 8), ("LCT.1", 9), ("LRT.3", 0xa), ("LCT.3", 0xb)] {
        assert_eq!(reason(Event { name: Some(name.to_owned()), ..event() }), number, "{name}");
    }
    assert!(matches!(IntelVtd::encode_event(&registers(&[]), &Event { name: Some("X".to_owned()), ..event() }), Err(Error::Unsupported(_))));
    assert!(matches!(IntelVtd::encode_event(&registers(&[("RTADDR", 0)]), &Event { id: 0x1_0000, ..event() }), Err(Error::Invalid(_))));
}

#[test]
fn faults_in_scalable_mode() {
    let scalable = |event: &Event| record(0x1400, event);
    let first = Event { format: Some("intel-vtd/first-stage".to_owned()), pasid: Some(0xa_bcde), access: Access::Write, ..event() };
    assert_eq!(scalable(&first), [0x1_2345_6000, 0x8abc_de71_8000_0138]);
    let fetch = Event { access: Access::Execute, privileged: true, fault: FaultKind::Permission, ..first.clone() };
    assert_eq!(scalable(&fetch), [0x1_2345_6000, 0xcabc_de82_e000_0138]);
    let reason = |event: Event| scalable(&event)[1] >> 32 & 0xff;
    assert_eq!(reason(Event { fault: FaultKind::Permission, ..first.clone() }), 0x85);
    assert_eq!(reason(Event { fault: FaultKind::Reserved, ..first.clone() }), 0x72);
    assert_eq!(reason(Event { fault: FaultKind::Unreadable, ..first.clone() }), 0x70);
    assert_eq!(reason(Event { level: None, ..first.clone() }), 0x80, "not canonical");
    assert_eq!(reason(Event { fault: FaultKind::Permission, ..event() }), 0x86);
    assert_eq!(reason(Event { fault: FaultKind::Reserved, ..event() }), 0x7a);
    assert_eq!(reason(Event { reading_table: true, ..event() }), 0x79, "neither R nor W");
    assert_eq!(reason(Event { reading_table: true, fault: FaultKind::Permission, ..event() }), 0x76);
    for (name, number) in [("SRT.2", 0x39), ("SCT.2", 0x41), ("SPD.2", 0x51), ("SPT.2", 0x59), ("SPT.4.2", 0x5b), ("SGN.10", 0x89)] {
        assert_eq!(reason(Event { name: Some(name.to_owned()), ..first.clone() }), number, "{name}");
    }
}

proptest! {
    #[test]
    fn any_descriptors_have_an_answer(words in proptest::collection::vec(any::<[u64; 2]>(), 0..8), kind in 0_u64..16) {
        let descriptors: Vec<[u64; 2]> = words.iter().map(|[low, high]| [low & !0xe0f | kind, *high]).collect();
        for Command { effect, .. } in decode(&descriptors) {
            if let Effect::Range(scope) | Effect::DeviceTlb(scope) = effect {
                prop_assert!(scope.first <= scope.last);
            }
        }
    }
}

/// Page request descriptors, and page group response descriptors: chapter 7.
#[test]
fn page_requests_and_their_answers() {
    use stagecraft_sdk::{Answer, PageRequest, Response};
    let all = stagecraft_sdk::PageRequest {
        id: 0x38,
        pasid: Some(0x42),
        address: 0x1234_5678_9abc,
        read: true,
        write: true,
        execute: true,
        privileged: true,
        group: 0x1a5,
        last: true,
    };
    let words = |request: &PageRequest| {
        let record = IntelVtd::encode_page_request(&registers(&[("ECAP", 1 << 29)]), request).unwrap();
        assert_eq!((record.queue.as_str(), record.bytes.len()), ("PRQ", 32));
        [0, 8, 16, 24].map(|at| u64::from_le_bytes(record.bytes[at..at + 8].try_into().unwrap()))
    };
    assert_eq!(words(&all), [0x0030_0042_0038_0101, 0x0000_1234_5678_9d2f, 0, 0]);
    let plain = PageRequest { pasid: None, write: false, group: 0, last: false, ..all };
    assert_eq!(words(&plain), [0x0000_0000_0038_0001, 0x0000_1234_5678_9001, 0, 0], "execution and privilege are with a PASID only");
    assert!(matches!(IntelVtd::encode_page_request(&registers(&[("ECAP", !(1 << 29))]), &all), Err(Error::Unsupported(_))));
    assert!(matches!(IntelVtd::encode_page_request(&registers(&[("ECAP", 1 << 29)]), &PageRequest { id: 0x1_0000, ..all }), Err(Error::Invalid(_))));
    let effect = |low: u64, high: u64| {
        let bytes: Vec<u8> = [low, high, 0, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
        let commands = IntelVtd::decode_commands(&registers(&[("IQA", 0x1800)]), &bytes).unwrap();
        commands[0].effect
    };
    let answer = |pasid, group, answer| Effect::Response(Response { id: 0x38, pasid, group, answer });
    assert_eq!(effect(0x0000_0042_0038_0019, 0xd2c), answer(Some(0x42), 0x1a5, Answer::Success));
    assert_eq!(effect(0x0000_0042_0038_1019, 0xd28), answer(Some(0x42), 0x1a5, Answer::Invalid));
    assert_eq!(effect(0x0000_0042_0038_f009, 0x8), answer(None, 1, Answer::Failure));
}
