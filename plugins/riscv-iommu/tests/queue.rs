//! Commands as drivers queue them, and fault records, in raw words: IOMMU sections 3.1 and 3.2.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../../../sdk/testing/event.rs"]
mod event;

use proptest::prelude::*;
use stagecraft_plugin_riscv_iommu::unit::RiscvIommu;
use stagecraft_sdk::queue::Access;
use stagecraft_sdk::{Command, Effect, Error, Event, FaultKind, Registers, Scope, Unit};

fn decode(commands: &[[u64; 2]]) -> Vec<Command> {
    let bytes: Vec<u8> = commands.iter().flatten().flat_map(|word| word.to_le_bytes()).collect();
    RiscvIommu::decode_commands(&Registers::default(), &bytes).unwrap()
}

fn effect(command: [u64; 2]) -> Effect {
    let [Command { index: 0, effect }] = decode(&[command])[..] else { panic!("one effect") };
    effect
}

const ILLEGAL: Effect = Effect::Illegal(0x400);
/// AV, PSCV, GV.
const AV: u64 = 1 << 10;
const PSCV: u64 = 1 << 32;
const GV: u64 = 1 << 33;
/// GSCID 0x1234 and PSCID 0xabcde.
const GSCID: u64 = 0x1234 << 44;
const PSCID: u64 = 0xa_bcde << 12;

#[test]
fn first_stage() {
    let (all, guest) = (Scope::ALL, Scope::ALL.domain(0x1234));
    let with = |flags: u64, page: u64| effect([1 | GSCID | PSCID | flags, page << 10]);
    assert_eq!(with(0, 0x1_2345), Effect::Range(all));
    assert_eq!(with(AV, 0x1_2345), Effect::Range(all.range(0x1234_5000, 0x1234_5fff)));
    assert_eq!(with(PSCV, 0), Effect::Range(all.space(0xa_bcde)));
    assert_eq!(with(GV, 0), Effect::Range(guest));
    assert_eq!(with(GV | PSCV, 0), Effect::Range(guest.space(0xa_bcde)));
    assert_eq!(with(GV | PSCV | AV, 0xf_ffff_ffff_ffff), Effect::Range(guest.space(0xa_bcde).range(u64::MAX - 0xfff, u64::MAX)));
    // S: 0x12347 is sixteen pages from 0x12340.
    assert_eq!(effect([1 | AV, 0x1_2347 << 10 | 1 << 9]), Effect::Range(all.range(0x1234_0000, 0x1234_ffff)));
}

#[test]
fn second_stage() {
    let (all, guest) = (Scope::ALL.second_stage(), Scope::ALL.domain(0x1234).second_stage());
    let with = |flags: u64| effect([0x81 | GSCID | PSCID | flags, 0x1_2345 << 10]);
    assert_eq!([with(0), with(AV)], [Effect::Range(all); 2], "without a guest there is no address");
    assert_eq!(with(GV), Effect::Range(guest));
    assert_eq!(with(GV | AV), Effect::Range(guest.range(0x1234_5000, 0x1234_5fff)));
    assert_eq!([with(PSCV), with(GV | PSCV | AV)], [ILLEGAL; 2]);
}

#[test]
fn directories_devices_and_the_rest() {
    let device = Scope::ALL.id(0xab_cdef);
    let did = 0xab_cdef << 40 | 1 << 33;
    assert_eq!(effect([3, 0]), Effect::Structures(Scope::ALL));
    assert_eq!(effect([3 | did, 0]), Effect::Structures(device));
    assert_eq!(effect([0x83 | did | 0x5_4321 << 12, 0]), Effect::Structures(device.space(0x5_4321)));
    assert_eq!(effect([0x83 | 0x5_4321 << 12, 0]), ILLEGAL, "a process without a device");
    assert_eq!([effect([2, 0]), effect([0x402, 0])], [Effect::Nothing; 2]);
    // ATS.INVAL: requester 0xcdef of segment 0xab; G bit 0 and S bit 11 of the payload.
    assert_eq!(effect([4 | did, 0x1234_5000]), Effect::DeviceTlb(device.range(0x1234_5000, 0x1234_5fff)));
    assert_eq!(effect([4 | 0xab_cdef << 40, 0x1230_7800]), Effect::DeviceTlb(Scope::ALL.id(0xcdef).range(0x1230_0000, 0x1230_ffff)));
    assert_eq!(effect([4 | did | PSCV | 0x5_4321 << 12, 0x1000]), Effect::DeviceTlb(device.space(0x5_4321).range(0x1000, 0x1fff)));
    assert_eq!(effect([4 | did | PSCV | 0x5_4321 << 12, 0x1001]), Effect::DeviceTlb(device.range(0x1000, 0x1fff)));
    for other in [0, 5, 0x7f, 0x101, 0x82, 0x103, 0x104] {
        assert_eq!(effect([other, 0]), ILLEGAL, "{other:#x}");
    }
    let batch: Vec<Effect> = decode(&[[2, 0], [0, 0], [2, 0]]).iter().map(|command| command.effect).collect();
    assert_eq!(batch, [Effect::Nothing, ILLEGAL]);
}

fn event() -> Event {
    Event { level: Some(0), ..event::unmapped("riscv-iommu/first-stage", 0xab_cdef, 0xffff_ff87_6543_2108) }
}

fn record(event: &Event) -> [u64; 4] {
    let record = RiscvIommu::encode_event(&Registers::default(), event).unwrap();
    assert_eq!(record.queue, "fault queue");
    stagecraft_sdk::bits::words(&record.bytes).try_into().unwrap()
}

#[test]
fn records() {
    let iova = event().iova;
    assert_eq!(record(&event()), [0xabcd_ef08_0000_000d, 0, iova, 0]);
    assert_eq!(record(&Event { access: Access::Write, ..event() }), [0xabcd_ef0c_0000_000f, 0, iova, 0]);
    let process = Event { access: Access::Execute, pasid: Some(0x5_4321), privileged: true, ..event() };
    assert_eq!(record(&process), [0xabcd_ef07_5432_100c, 0, iova, 0]);
    let guest = Event { format: Some("riscv-iommu/second-stage".to_owned()), intermediate: Some(0x8_1234_567b), ..event() };
    assert_eq!(record(&guest), [0xabcd_ef08_0000_0015, 0, iova, 0x8_1234_5678]);
    assert_eq!(record(&Event { access: Access::Write, ..guest.clone() }), [0xabcd_ef0c_0000_0017, 0, iova, 0x8_1234_5678]);
    assert_eq!(record(&Event { access: Access::Execute, ..guest.clone() })[0] & 0xfff, 20);
    assert_eq!(record(&Event { reading_table: true, ..guest.clone() })[3], 0x8_1234_5679);
    assert_eq!(record(&Event { intermediate: None, ..guest })[3], iova & !3, "a second stage alone");
    let unreadable = Event { fault: FaultKind::Unreadable, ..event() };
    assert_eq!([Access::Execute, Access::Read, Access::Write].map(|access| record(&Event { access, ..unreadable.clone() })[0] & 0xfff), [1, 5, 7]);
    for (name, number) in [("DDT entry not valid", 258), ("PDT entry misconfigured", 267), ("Transaction type disallowed", 260)] {
        assert_eq!(record(&Event { name: Some(name.to_owned()), ..event() })[0] & 0xfff, number);
    }
    let refused = |event: &Event| RiscvIommu::encode_event(&Registers::default(), event).unwrap_err();
    assert!(matches!(refused(&Event { name: Some("X".to_owned()), ..event() }), Error::Unsupported(_)));
    assert!(matches!(refused(&Event { id: 1 << 24, ..event() }), Error::Invalid(_)));
}

proptest! {
    #[test]
    fn any_commands_have_an_answer(words in proptest::collection::vec(any::<[u64; 2]>(), 0..8), opcode in 0_u64..6) {
        let commands: Vec<[u64; 2]> = words.iter().map(|[low, high]| [low & !0x7f | opcode, *high]).collect();
        for Command { effect, .. } in decode(&commands) {
            if let Effect::Range(scope) | Effect::DeviceTlb(scope) = effect {
                prop_assert!(scope.first <= scope.last);
            }
        }
    }
}

/// Page requests, IOMMU section 3.3, and ATS.PRGR, section 3.1.4.
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
    let with: Registers = [("CAPABILITIES".to_owned(), 1 << 25)].into_iter().collect();
    let words = |request: &PageRequest| {
        let record = RiscvIommu::encode_page_request(&with, request).unwrap();
        assert_eq!((record.queue.as_str(), record.bytes.len()), ("page-request queue", 16));
        [0, 8].map(|at| u64::from_le_bytes(record.bytes[at..at + 8].try_into().unwrap()))
    };
    assert_eq!(words(&all), [0x0000_3807_0004_2000, 0x0000_1234_5678_9d2f]);
    let plain = PageRequest { pasid: None, write: false, group: 0, last: false, ..all };
    assert_eq!(words(&plain), [0x0000_3800_0000_0000, 0x0000_1234_5678_9001], "execution and privilege are with a process id only");
    let without: Registers = [("CAPABILITIES".to_owned(), !(1 << 25))].into_iter().collect();
    assert!(matches!(RiscvIommu::encode_page_request(&without, &all), Err(Error::Unsupported(_))));
    assert!(matches!(RiscvIommu::encode_page_request(&with, &PageRequest { id: 1 << 24, ..all }), Err(Error::Invalid(_))));
    let effect = |low: u64, high: u64| {
        let bytes: Vec<u8> = [low, high].iter().flat_map(|word| word.to_le_bytes()).collect();
        RiscvIommu::decode_commands(&Registers::default(), &bytes).unwrap()[0].effect
    };
    let answer = |id, pasid, group, answer| Effect::Response(Response { id, pasid, group, answer });
    assert_eq!(effect(0x0000_3801_0004_2084, 0x0038_01a5_0000_0000), answer(0x38, Some(0x42), 0x1a5, Answer::Success));
    assert_eq!(
        effect(0x0200_3802_0004_2084, 0x0038_11a5_0000_0000),
        answer(0x2_0038, None, 0x1a5, Answer::Invalid),
        "of segment 2, without a process id"
    );
    assert_eq!(effect(0x0000_3800_0000_0084, 0x0038_f001_0000_0000), answer(0x38, None, 1, Answer::Failure));
}

/// Records that the kernel hands out for a vIOMMU, section 3.2: what they are about.
#[test]
fn records_of_the_host() {
    use stagecraft_sdk::BlockedDma;
    let told = |words: [u64; 4]| RiscvIommu::decode_event(&words.map(u64::to_le_bytes).concat()).unwrap();
    let iova = event().iova;
    let read = BlockedDma { id: 0xab_cdef, pasid: None, iova, access: Access::Read, privileged: false };
    // TTYP 39:34: untranslated 1 to 3, translated 5 to 7: to fetch, to read, to write.
    for (kind, access) in [(1, Access::Execute), (2, Access::Read), (3, Access::Write), (5, Access::Execute), (6, Access::Read), (7, Access::Write)] {
        let words = [0xabcd_ef00_0000_000d | kind << 34, 0, iova, 0x8_1234_5679];
        assert_eq!(told(words), Some(BlockedDma { access, ..read }), "{kind}");
    }
    // PV 32, PID 31:12, PRIV 33, which means nothing without a process id; cause 260.
    assert_eq!(told([0xabcd_ef0b_5432_1104, 0, iova, 0]), Some(BlockedDma { pasid: Some(0x5_4321), privileged: true, ..read }));
    assert_eq!(told([0xabcd_ef0a_0000_0104, 0, iova, 0]), Some(read));
    // The unit's own accesses, a translation request, a message.
    for kind in [0, 4, 8, 9, 31] {
        assert_eq!(told([0xabcd_ef00_0000_000d | kind << 34, 0, iova, 0]), None, "{kind}");
    }
    for bytes in [0, 31, 33] {
        assert!(matches!(RiscvIommu::decode_event(&vec![8; bytes]), Err(Error::Invalid(invalid)) if invalid.value == bytes as u64), "{bytes}");
    }
}
