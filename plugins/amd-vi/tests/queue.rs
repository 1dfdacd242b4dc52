//! Commands as drivers write them, and event log entries, in raw words: 48882 sections 2.4 and 2.5.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../../../sdk/testing/event.rs"]
mod event;

use proptest::prelude::*;
use stagecraft_plugin_amd_vi::unit::AmdVi;
use stagecraft_sdk::queue::Access;
use stagecraft_sdk::{Command, Effect, Error, Event, FaultKind, Registers, Scope, Unit};

fn decode(commands: &[[u64; 2]]) -> Vec<Command> {
    let bytes: Vec<u8> = commands.iter().flatten().flat_map(|word| word.to_le_bytes()).collect();
    AmdVi::decode_commands(&Registers::default(), &bytes).unwrap()
}

fn effect(command: [u64; 2]) -> Effect {
    let [Command { index: 0, effect }] = decode(&[command])[..] else { panic!("one effect") };
    effect
}

#[test]
fn pages_and_sizes() {
    let domain = Scope::ALL.domain(0x1234);
    let host = domain.second_stage();
    let pages = |high| effect([0x3000_1234_0000_0000, high]);
    assert_eq!(pages(0x5_6789_0002), Effect::Range(host.range(0x5_6789_0000, 0x5_6789_0fff)));
    assert_eq!(pages(0x5_6789_0000), Effect::Range(host.range(0x5_6789_0000, 0x5_6789_0fff).leaf(true)), "no page directory entries");
    assert_eq!(pages(0x1234_4003), Effect::Range(host.range(0x1234_4000, 0x1234_5fff)), "8 KiB");
    assert_eq!(pages(0x1230_7003), Effect::Range(host.range(0x1230_0000, 0x1230_ffff)), "64 KiB");
    // What drivers write for everything.
    assert_eq!(pages(0x7fff_ffff_ffff_f003), Effect::Range(host));
    assert_eq!(pages(0xffff_ffff_ffff_f003), Effect::Range(host));
    let guest = domain.space(0xa_bcde);
    assert_eq!(effect([0x3000_1234_000a_bcde, 0xffff_8000_0000_0006]), Effect::Range(guest.range(0xffff_8000_0000_0000, 0xffff_8000_0000_0fff)));
}

/// Who changes a guest CR3 table entry says that all pages of the PASID are to be forgotten, and nothing else.
#[test]
fn all_pages_of_a_pasid_are_what_leads_to_them_as_well() {
    let guest = Scope::ALL.domain(0x1234).space(0xa_bcde);
    let expected = [Effect::Structures(guest), Effect::Range(guest)].map(|effect| Command { index: 0, effect });
    assert_eq!(decode(&[[0x3000_1234_000a_bcde, 0x7fff_ffff_ffff_f007]]), expected);
    let leaves = [Effect::Structures(guest), Effect::Range(guest.leaf(true))].map(|effect| Command { index: 0, effect });
    assert_eq!(decode(&[[0x3000_1234_000a_bcde, 0x7fff_ffff_ffff_f005]]), leaves);
}

#[test]
fn devices() {
    let device = Scope::ALL.id(0x0138);
    assert_eq!(effect([0x2000_0000_0000_0138, 0]), Effect::Structures(device));
    assert_eq!(effect([0x4000_0138_2000_0138, 0x1234_5000]), Effect::DeviceTlb(device.range(0x1234_5000, 0x1234_5fff)));
    // PASID 0xabcde: bits 19:16, 15:8 and 7:0 in three places.
    assert_eq!(effect([0x4ade_0138_20bc_0138, 0x1234_5004]), Effect::DeviceTlb(device.space(0xa_bcde).range(0x1234_5000, 0x1234_5fff)));
    assert_eq!(effect([0x4000_0138_2000_0138, 0x7fff_ffff_ffff_f001]), Effect::DeviceTlb(device));
}

#[test]
fn the_rest() {
    let all = decode(&[[0x8000_0000_0000_0000, 0], [0x1000_0000_1234_5001, 42]]);
    let expected = [(0, Effect::Structures(Scope::ALL)), (0, Effect::Everything), (1, Effect::Nothing)];
    assert_eq!(all, expected.map(|(index, effect)| Command { index, effect }));
    for code in [5, 6] {
        assert_eq!(effect([code << 60 | 0x138, 0]), Effect::Nothing);
    }
    for code in [0, 9, 0xa, 0xf] {
        assert_eq!(effect([code << 60, 0]), Effect::Illegal(5));
    }
    assert!(matches!(AmdVi::decode_commands(&Registers::default(), &[0; 15]), Err(Error::Invalid(_))));
}

fn event() -> Event {
    Event {
        level: Some(1),
        unreadable: Some(0x9_8765_4018),
        access: Access::Write,
        domain: Some(0x1234),
        ..event::unmapped("amd-vi/v1", 0x0138, 0x1_2345_6789)
    }
}

fn record(event: &Event) -> [u64; 2] {
    let record = AmdVi::encode_event(&Registers::default(), event).unwrap();
    assert_eq!(record.queue, "event log");
    stagecraft_sdk::bits::words(&record.bytes).try_into().unwrap()
}

#[test]
fn page_faults() {
    // Nothing there: PR is clear, and nothing else is said.
    assert_eq!(record(&event()), [0x2000_1234_0000_0138, 0x1_2345_6789]);
    // PR 52, RW 53, PE 54.
    assert_eq!(record(&Event { fault: FaultKind::Permission, ..event() })[0], 0x2070_1234_0000_0138);
    assert_eq!(record(&Event { fault: FaultKind::Permission, access: Access::Read, ..event() })[0], 0x2050_1234_0000_0138);
    // PR, RW, RZ 55.
    assert_eq!(record(&Event { fault: FaultKind::Reserved, ..event() })[0], 0x20b0_1234_0000_0138);
    // GN 48 and the PASID in two parts; US 50; NX 49.
    let guest = Event { pasid: Some(0xa_bcde), fault: FaultKind::Permission, ..event() };
    assert_eq!(record(&guest)[0], 0x2075_bcde_000a_0138);
    assert_eq!(record(&Event { access: Access::Execute, privileged: true, ..guest })[0], 0x2053_bcde_000a_0138);
}

#[test]
fn other_events() {
    let named = |name: &str| Event { name: Some(name.to_owned()), fault: FaultKind::Configuration, ..event() };
    assert_eq!(record(&named("ILLEGAL_DEV_TABLE_ENTRY")), [0x1020_0000_0000_0138, 0x1_2345_6788]);
    let guest = Event { pasid: Some(0xa_bcde), fault: FaultKind::Reserved, ..named("ILLEGAL_DEV_TABLE_ENTRY") };
    assert_eq!(record(&guest)[0], 0x10a1_bcde_000a_0138, "RZ 55");
    assert_eq!(record(&named("DEV_TAB_HARDWARE_ERROR")), [0x3020_0000_0000_0138, 0x9_8765_4010]);
    assert_eq!(record(&named("PAGE_TAB_HARDWARE_ERROR")), [0x4020_1234_0000_0138, 0x9_8765_4010]);
    assert_eq!(record(&Event { fault: FaultKind::Unreadable, ..event() })[0] >> 60, 4);
    assert_eq!(record(&named("IO_PAGE_FAULT"))[0], 0x2000_1234_0000_0138);
    let refused = |event: &Event| AmdVi::encode_event(&Registers::default(), event).unwrap_err();
    assert!(matches!(refused(&named("X")), Error::Unsupported(_)));
    let stranger = Event { pasid: Some(0x1_0042), ..named("INVALID_DEVICE_REQUEST") };
    assert_eq!(record(&stranger), [0x2001_0042_0001_0138, 0x1_2345_6789], "a PASID without tables: nothing is there");
    assert!(matches!(refused(&Event { id: 1 << 16, ..event() }), Error::Invalid(_)));
}

proptest! {
    #[test]
    fn any_commands_have_an_answer(words in proptest::collection::vec(any::<[u64; 2]>(), 0..8)) {
        for Command { effect, .. } in decode(&words) {
            if let Effect::Range(scope) | Effect::DeviceTlb(scope) = effect {
                prop_assert!(scope.first <= scope.last);
            }
        }
    }
}

/// Entries of the PPR log, section 2.6, and COMPLETE_PPR_REQUEST, section 2.4.7.
#[test]
fn page_requests_and_their_answers() {
    use stagecraft_sdk::{Answer, PageRequest, Response};
    let all = stagecraft_sdk::PageRequest {
        id: 0x38,
        pasid: Some(0x5_0042),
        address: 0x1234_5678_9abc,
        read: true,
        write: true,
        execute: true,
        privileged: true,
        group: 0x1a5,
        last: true,
    };
    let with: Registers = [("EXT_FEATURES".to_owned(), 2)].into_iter().collect();
    let words = |request: &PageRequest| {
        let record = AmdVi::encode_page_request(&with, request).unwrap();
        assert_eq!((record.queue.as_str(), record.bytes.len()), ("PPR log", 16));
        [0, 8].map(|at| u64::from_le_bytes(record.bytes[at..at + 8].try_into().unwrap()))
    };
    assert_eq!(words(&all), [0x1126_17a5_0042_0038, 0x0000_1234_5678_9000]);
    let plain = PageRequest { pasid: None, write: false, execute: false, privileged: false, group: 0, last: false, ..all };
    assert_eq!(words(&plain), [0x1044_0000_0000_0038, 0x0000_1234_5678_9000]);
    assert!(matches!(AmdVi::encode_page_request(&Registers::default(), &all), Err(Error::Unsupported(_))));
    assert!(matches!(AmdVi::encode_page_request(&with, &PageRequest { id: 0x1_0000, ..all }), Err(Error::Invalid(_))));
    let effect = |low: u64, high: u64| {
        let bytes: Vec<u8> = [low, high].iter().flat_map(|word| word.to_le_bytes()).collect();
        AmdVi::decode_commands(&Registers::default(), &bytes).unwrap()[0].effect
    };
    let answer = |pasid, group, answer| Effect::Response(Response { id: 0x38, pasid, group, answer });
    assert_eq!(effect(0x7005_0042_0000_0038, 0x0000_01a5_0000_0004), answer(Some(0x5_0042), 0x1a5, Answer::Success));
    assert_eq!(effect(0x7005_0042_0000_0038, 0x0000_11a5_0000_0000), answer(None, 0x1a5, Answer::Invalid), "without GN there is no PASID");
    assert_eq!(effect(0x7000_0000_0000_0038, 0x0000_f001_0000_0000), answer(None, 1, Answer::Failure));
}

/// Entries of the event log that the kernel hands out for a vIOMMU, section 2.5: what they are about.
#[test]
fn records_of_the_host() {
    use stagecraft_sdk::BlockedDma;
    let told = |words: [u64; 2]| AmdVi::decode_event(&words.map(u64::to_le_bytes).concat()).unwrap();
    let iova = 0x1_2345_6789;
    let read = BlockedDma { id: 0x138, pasid: None, iova, access: Access::Read, privileged: false };
    // IO_PAGE_FAULT of a domain, to nothing: what else stands there means nothing.
    assert_eq!(told([0x2000_1234_0000_0138, iova]), Some(read));
    assert_eq!(told([0x2026_1234_0000_0138, iova]), Some(read));
    // PR 52, RW 53, PE 54.
    let write = BlockedDma { access: Access::Write, ..read };
    assert_eq!(told([0x2070_1234_0000_0138, iova]), Some(write));
    // GN 48: a PASID in two parts; NX 49, US 50. PASID 0 is that of requests without one.
    let fetch = BlockedDma { pasid: Some(0xa_bcde), access: Access::Execute, privileged: true, ..read };
    assert_eq!(told([0x2053_bcde_000a_0138, iova]), Some(fetch));
    assert_eq!(told([0x2057_bcde_000a_0138, iova]), Some(BlockedDma { privileged: false, ..fetch }));
    assert_eq!(told([0x2075_0000_0000_0138, iova]), Some(write));
    // TR 56: a device TLB asked. I 51: an interrupt.
    assert_eq!(told([0x2171_bcde_000a_0138, iova]), Some(BlockedDma { pasid: Some(0xa_bcde), ..read }));
    assert_eq!(told([0x2008_1234_0000_0138, iova]), None);
    // ILLEGAL_DEV_TABLE_ENTRY and INVALID_DEVICE_REQUEST have the device's address, hardware errors that of a structure.
    assert_eq!(told([0x1020_0000_0000_0138, iova]), Some(write));
    assert_eq!(told([0x8000_0000_0000_0138, iova]), Some(read));
    assert_eq!(told([0x3020_0000_0000_0138, iova]), Some(BlockedDma { iova: 0, ..write }));
    assert_eq!(told([0x4021_0042_0001_0138, iova]), Some(BlockedDma { iova: 0, pasid: Some(0x1_0042), ..write }));
    // Errors of commands, a device TLB that does not answer, and what is nothing.
    for code in [0, 5, 6, 7, 9, 0xf] {
        assert_eq!(told([code << 60 | 0x138, iova]), None, "{code}");
    }
    for bytes in [0, 15, 17, 32] {
        assert!(matches!(AmdVi::decode_event(&vec![0x20; bytes]), Err(Error::Invalid(invalid)) if invalid.value == bytes as u64), "{bytes}");
    }
}
