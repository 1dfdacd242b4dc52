//! Commands as drivers queue them, and event records, in raw words: IHI 0070 chapters 4 and 7.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../../../sdk/testing/event.rs"]
mod event;

use proptest::prelude::*;
use stagecraft_plugin_arm_smmuv3::Smmuv3;
use stagecraft_sdk::queue::Access;
use stagecraft_sdk::{Command, Effect, Error, Event, FaultKind, Registers, Scope, Unit};

/// IDR0: both stages, EL2, ATS, 16-bit ASIDs and VMIDs, page requests; IDR3: invalidation by ranges.
const IDR0: u64 = 0x5_1603;
const IDR3: u64 = 0x400;
const ILLEGAL: Effect = Effect::Illegal(1);

fn decode_with(registers: &[(&str, u64)], commands: &[[u64; 2]]) -> Vec<Command> {
    let registers: Registers = registers.iter().map(|&(name, value)| (name.to_owned(), value)).collect();
    let bytes: Vec<u8> = commands.iter().flatten().flat_map(|word| word.to_le_bytes()).collect();
    Smmuv3::decode_commands(&registers, &bytes).unwrap()
}

fn with(registers: &[(&str, u64)], command: [u64; 2]) -> Effect {
    let [Command { index: 0, effect }] = decode_with(registers, &[command])[..] else { panic!("one effect") };
    effect
}

fn effect(command: [u64; 2]) -> Effect {
    with(&[("IDR0", IDR0), ("IDR3", IDR3)], command)
}

#[test]
fn configuration_commands() {
    let all = Scope::ALL;
    assert_eq!(effect([0x0000_0038_0000_0003, 1]), Effect::Structures(all.id(0x38).leaf(true)));
    assert_eq!(effect([0x0000_0038_0000_0003, 0]), Effect::Structures(all.id(0x38)));
    assert_eq!(effect([4, 31]), Effect::Structures(all), "CFGI_ALL");
    assert_eq!(effect([0x0000_1200_0000_0004, 7]), Effect::Structures(all.id(0x1200).ignoring(0xff)), "256 streams");
    assert_eq!(effect([4, 30]), Effect::Structures(all.id(0).ignoring(0x7fff_ffff)));
    assert_eq!(effect([0x0000_0038_0004_2005, 1]), Effect::Structures(all.id(0x38).space(0x42).leaf(true)));
    assert_eq!(effect([0x0000_0038_0000_0005, 1]), Effect::Structures(all.id(0x38).leaf(true)), "CD 0 may be that of requests without SubstreamID");
    assert_eq!(effect([0x0000_0038_0000_0006, 0]), Effect::Structures(all.id(0x38)));
    for prefetch in [1, 2] {
        assert_eq!(effect([0x38 << 32 | prefetch, 0]), Effect::Nothing);
    }
    // CFGI_VMS_PIDM with IDR3.MPAM, DPTI_ALL and DPTI_PA with IDR3.DPT.
    for (opcode, feature) in [(0x07, 1 << 7), (0x70, 1 << 15), (0x73, 1 << 15)] {
        assert_eq!([with(&[("IDR0", IDR0), ("IDR3", feature)], [opcode, 0]), effect([opcode, 0])], [Effect::Nothing, ILLEGAL], "{opcode:#x}");
    }
}

#[test]
fn stage_1_commands() {
    let vmid = Scope::ALL.domain(0x1234);
    assert_eq!(effect([0xabcd_1234_0000_0010, 0]), Effect::Range(vmid));
    assert_eq!(effect([0xabcd_1234_0000_0011, 0]), Effect::Range(vmid.space(0xabcd)));
    assert_eq!(
        effect([0xabcd_1234_0000_0012, 0xffff_8765_4321_0001]),
        Effect::Range(vmid.space(0xabcd).range(0xffff_8765_4321_0000, 0xffff_8765_4321_0fff).leaf(true))
    );
    assert_eq!(effect([0xabcd_1234_0000_0013, 0x4321_0000]), Effect::Range(vmid.range(0x4321_0000, 0x4321_0fff)));
    // A tag in the top byte.
    assert_eq!(effect([0x13, 0xa500_1234_5678_9000]), Effect::Range(Scope::ALL.domain(0).range(0x1234_5678_9000, 0x1234_5678_9fff)));
    // Eight bits of VMID and ASID, and no stage 2.
    let small = [("IDR0", IDR0 & !0x4_1000), ("IDR3", IDR3)];
    assert_eq!(with(&small, [0xabcd_1234_0000_0011, 0]), Effect::Range(Scope::ALL.domain(0x34).space(0xcd)));
    let first = [("IDR0", IDR0 & !1), ("IDR3", IDR3)];
    assert_eq!(with(&first, [0xabcd_1234_0000_0010, 0]), Effect::Range(Scope::ALL));
    assert_eq!([with(&first, [0x28, 0]), with(&first, [0x2a, 0])], [ILLEGAL; 2]);
    let second = [("IDR0", IDR0 & !2), ("IDR3", IDR3)];
    for opcode in [0x05, 0x06, 0x10, 0x11, 0x12, 0x13] {
        assert_eq!(with(&second, [opcode, 0]), ILLEGAL, "{opcode:#x}");
    }
}

#[test]
fn ranges_cover_num_plus_one_times_two_to_the_scale_granules() {
    let range = |num: u64, scale: u64, tg: u64, address: u64| match effect([num << 12 | scale << 20 | 0x13, address | tg << 10 | 3 << 8]) {
        Effect::Range(scope) => (scope.first, scope.last),
        other => panic!("{other:?}"),
    };
    assert_eq!(range(0, 0, 1, 0x1_0000), (0x1_0000, 0x1_0fff));
    assert_eq!(range(31, 0, 1, 0x1_0000), (0x1_0000, 0x2_ffff));
    assert_eq!(range(1, 9, 1, 0x4000_0000), (0x4000_0000, 0x403f_ffff), "two times 2 MiB");
    assert_eq!(range(2, 1, 2, 0x4000_0000), (0x4000_0000, 0x4001_7fff), "six pages of 16 KiB");
    assert_eq!(range(2, 1, 3, 0x4001_8000), (0x4001_0000, 0x4006_ffff), "six pages of 64 KiB; lower bits of the address play no part");
    assert_eq!(range(31, 31, 3, 0), (0, (1 << 52) - 1));
    assert_eq!(range(0, 33, 1, 0), (0, 0x1fff), "without LPA2, SCALE has five bits");
    let wide = |scale: u64| {
        let registers = [("IDR0", IDR0), ("IDR3", IDR3), ("IDR5", 1 << 7)];
        let Effect::Range(scope) = with(&registers, [scale << 20 | 0x13, 1 << 10 | 3 << 8]) else { panic!() };
        (scope.first, scope.last)
    };
    assert_eq!([wide(1), wide(33), wide(39), wide(63)], [(0, 0x1fff), (0, (1 << 45) - 1), (0, (1 << 51) - 1), (0, (1 << 51) - 1)]);
    assert_eq!(range(31, 31, 3, 0xffff_ffff_0000_0000), (0xffff_ffff_0000_0000, u64::MAX), "not around the end");
    assert_eq!(range(31, 5, 0, 0x1_0000), (0x1_0000, 0x1_0fff), "no granule, no range");
    let without = [("IDR0", IDR0)];
    let Effect::Range(scope) = with(&without, [31 << 12 | 0x13, 0x1_0000 | 1 << 10]) else { panic!() };
    assert_eq!((scope.first, scope.last), (0x1_0000, 0x1_0fff), "a unit without ranges");
}

#[test]
fn el2_and_stage_2_commands() {
    let e2h = [("IDR0", IDR0), ("IDR3", IDR3), ("CR2", 1)];
    assert_eq!([effect([0x20, 0]), effect([0xabcd_0000_0000_0021, 0]), effect([0x30, 0])], [Effect::Everything; 3]);
    assert_eq!(with(&e2h, [0xabcd_0000_0000_0021, 0]), Effect::Range(Scope::ALL.space(0xabcd)));
    let page = Scope::ALL.range(0x5000, 0x5fff).leaf(true);
    assert_eq!([effect([0x22, 0x5001]), effect([0x23, 0x5001])], [Effect::Range(page); 2]);
    assert_eq!(with(&e2h, [0xabcd_0000_0000_0022, 0x5001]), Effect::Range(page.space(0xabcd)));
    for opcode in 0x20..0x24 {
        assert_eq!(with(&[("IDR0", IDR0 & !0x200)], [opcode, 0]), ILLEGAL, "no EL2");
    }
    assert_eq!(effect([0x1234_0000_0028, 0]), Effect::Range(Scope::ALL.domain(0x1234)));
    let ipa = Scope::ALL.domain(0x1234).second_stage().range(0x8_0000_0000_0000, 0x8_0000_0000_0fff).leaf(true);
    assert_eq!(effect([0x1234_0000_002a, 0xfff8_0000_0000_0001]), Effect::Range(ipa), "bits above 51 are no address");
}

#[test]
fn commands_to_devices_and_the_rest() {
    let device = Scope::ALL.id(0x38);
    assert_eq!(effect([0x0000_0038_0004_2840, 0x1234_5000]), Effect::DeviceTlb(device.space(0x42).range(0x1234_5000, 0x1234_5fff)));
    assert_eq!(effect([0x0000_0038_0004_2a40, 0x1234_5004]), Effect::DeviceTlb(device.range(0x1234_0000, 0x1234_ffff)), "global, 16 pages");
    assert_eq!(effect([0x0000_0038_0004_2040, 0x34]), Effect::DeviceTlb(device), "without SubstreamID, everything");
    assert_eq!(with(&[("IDR0", IDR0 & !0x400)], [0x40, 0]), ILLEGAL, "no ATS");
    assert_eq!([effect([0x44, 0]), effect([0x45, 0]), effect([0x1046, 0])], [Effect::Nothing; 3]);
    assert_eq!(with(&[("IDR0", IDR0 & !0x1_0000)], [0x41, 0]), ILLEGAL, "no page requests");
    assert_eq!(with(&[("IDR0", IDR0 | 1 << 24)], [0x44, 0]), ILLEGAL, "no stalls");
    assert_eq!(effect([0x3046, 0]), ILLEGAL, "a reserved way of completion");
    for opcode in [0, 8, 0x14, 0x18, 0x1a, 0x29, 0x47, 0xff] {
        assert_eq!(effect([opcode, 0]), ILLEGAL, "{opcode:#x}");
    }
    for opcode in [0x03, 0x05, 0x40, 0x41, 0x44] {
        assert_eq!(effect([opcode | 1 << 10, 0]), ILLEGAL, "a Secure stream, {opcode:#x}");
    }
}

#[test]
fn a_batch_is_decoded_up_to_the_first_illegal_command() {
    let batch = decode_with(&[("IDR0", IDR0)], &[[0x30, 0], [0x46, 0], [0xff, 0], [0x30, 0]]);
    let expected = [Effect::Everything, Effect::Nothing, ILLEGAL];
    assert_eq!(batch, (0..).zip(expected).map(|(index, effect)| Command { index, effect }).collect::<Vec<_>>());
    let registers: Registers = [("IDR0".to_owned(), IDR0)].into_iter().collect();
    assert!(matches!(Smmuv3::decode_commands(&registers, &[0; 17]), Err(Error::Invalid(_))));
    assert!(matches!(Smmuv3::decode_commands(&Registers::default(), &[0; 16]), Err(Error::Invalid(invalid)) if invalid.field == "IDR0"));
}

fn event() -> Event {
    Event { level: Some(3), ..event::unmapped("arm-smmuv3/stage1", 0x38, 0xffff_8765_4321_0678) }
}

fn record(event: &Event) -> [u64; 4] {
    let record = Smmuv3::encode_event(&Registers::default(), event).unwrap();
    assert_eq!((&*record.queue, record.bytes.len()), ("EVENTQ", 32));
    stagecraft_sdk::bits::words(&record.bytes).try_into().unwrap()
}

#[test]
fn faults_of_walks() {
    let iova = event().iova;
    assert_eq!(record(&event()), [0x38_0000_0010, 0x208_0000_0000, iova, 0]);
    let write = Event { access: Access::Write, fault: FaultKind::Permission, pasid: Some(0x42), ..event() };
    assert_eq!(record(&write), [0x38_0004_2813, 0x200_0000_0000, iova, 0]);
    let fetch = Event { access: Access::Execute, fault: FaultKind::AccessFlag, privileged: true, ..event() };
    assert_eq!(record(&fetch), [0x38_0000_0012, 0x20e_0000_0000, iova, 0]);
    assert_eq!(record(&Event { fault: FaultKind::AddressSize, ..event() })[0], 0x38_0000_0011);
    assert_eq!(record(&Event { fault: FaultKind::Reserved, ..event() })[0], 0x38_0000_0010);
    let second = Event { format: Some("arm-smmuv3/stage2".to_owned()), intermediate: Some(0x8_1234_5678), ..event() };
    assert_eq!(record(&second), [0x38_0000_0010, 0x288_0000_0000, iova, 0x8_1234_5000]);
    assert_eq!(record(&Event { format: Some("arm-smmuv3/stage2".to_owned()), iova: 0x5678, ..event() })[3], 0x5000, "stage 2 alone");
    let table = Event { reading_table: true, ..second.clone() };
    assert_eq!(record(&table), [0x38_0000_0010, 0x188_0000_0000, iova, 0x8_1234_5000]);
    let forbidden = Event { fault: FaultKind::Permission, ..table.clone() };
    assert_eq!(record(&forbidden), [0x38_0000_0013, 0x1188_0000_0000, iova, 0x8_1234_5000], "TTRnW is of this event alone");
    let context = Event { name: Some("F_CD_FETCH".to_owned()), ..table };
    assert_eq!(record(&context), [0x38_0000_0010, 0x88_0000_0000, iova, 0x8_1234_5000]);
    let abort = Event { fault: FaultKind::Unreadable, unreadable: Some(0x9_8765_4008), ..event() };
    assert_eq!(record(&abort), [0x38_0000_000b, 0x108_0000_0000, iova, 0x9_8765_4008], "an entry of stage 1's table is of class TT");
}

#[test]
fn faults_of_structures() {
    let named = |name: &str, pasid| Event {
        fault: FaultKind::Configuration,
        name: Some(name.to_owned()),
        format: None,
        pasid,
        unreadable: Some(0x9_8765_4040),
        ..event()
    };
    assert_eq!(record(&named("C_BAD_STE", None)), [0x38_0000_0004, 0, 0, 0]);
    assert_eq!(record(&named("C_BAD_CD", Some(0xf_ffff))), [0x38_ffff_f80a, 0, 0, 0]);
    assert_eq!(record(&named("C_BAD_STREAMID", None)), [0x38_0000_0002, 0, 0, 0]);
    assert_eq!(record(&named("C_BAD_SUBSTREAMID", Some(1))), [0x38_0000_1008, 0, 0, 0], "without SSV");
    assert_eq!(record(&named("F_STREAM_DISABLED", Some(0))), [0x38_0000_0006, 0, 0, 0]);
    assert_eq!(record(&named("F_STE_FETCH", None)), [0x38_0000_0003, 0, 0, 0x9_8765_4040]);
    assert_eq!(record(&named("F_CD_FETCH", Some(1))), [0x38_0000_1809, 0, 0, 0x9_8765_4040]);
    let refused = |event: Event| Smmuv3::encode_event(&Registers::default(), &event).unwrap_err();
    assert!(matches!(refused(named("ABORT", None)), Error::Unsupported(_)), "no event is recorded");
    assert!(matches!(refused(Event { id: 1 << 32, ..event() }), Error::Invalid(_)));
}

proptest! {
    #[test]
    fn any_commands_have_an_answer(words in proptest::collection::vec(any::<[u64; 2]>(), 0..8), idr0: u64, idr3: u64, idr5: u64, cr2: u64, opcode in 0_u64..0x78) {
        let commands: Vec<[u64; 2]> = words.iter().map(|[low, high]| [low & !0xff | opcode, *high]).collect();
        let registers = [("IDR0", idr0), ("IDR3", idr3), ("IDR5", idr5), ("CR2", cr2)];
        for Command { effect, .. } in decode_with(&registers, &commands) {
            if let Effect::Range(scope) | Effect::DeviceTlb(scope) = effect {
                prop_assert!(scope.first <= scope.last);
            }
        }
    }
}

/// Entries of the PRI queue, chapter 8, and CMD_PRI_RESP, section 4.5.2.
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
        let registers: Registers = [("IDR0".to_owned(), IDR0)].into_iter().collect();
        let record = Smmuv3::encode_page_request(&registers, request).unwrap();
        assert_eq!((record.queue.as_str(), record.bytes.len()), ("PRIQ", 16));
        [0, 8].map(|at| u64::from_le_bytes(record.bytes[at..at + 8].try_into().unwrap()))
    };
    assert_eq!(words(&all), [0xfc00_0042_0000_0038, 0x0000_1234_5678_91a5]);
    let plain = PageRequest { pasid: None, write: false, group: 0, last: false, ..all };
    assert_eq!(words(&plain), [0x1000_0000_0000_0038, 0x0000_1234_5678_9000], "X and Priv are with a SubstreamID only");
    assert_eq!(words(&PageRequest { id: 0xffff_fffe, read: false, write: true, ..plain }), [0x2000_0000_ffff_fffe, 0x0000_1234_5678_9000]);
    let without: Registers = [("IDR0".to_owned(), IDR0 & !0x1_0000)].into_iter().collect();
    assert!(matches!(Smmuv3::encode_page_request(&without, &all), Err(Error::Unsupported(_))));
    assert!(matches!(Smmuv3::encode_page_request(&Registers::default(), &all), Err(Error::Invalid(_))));
    let answer = |pasid, group, answer| Effect::Response(Response { id: 0x38, pasid, group, answer });
    assert_eq!(effect([0x0000_0038_0004_2841, 0x21a5]), answer(Some(0x42), 0x1a5, Answer::Success));
    assert_eq!(effect([0x0000_0038_0004_2041, 0x1003]), answer(None, 3, Answer::Invalid), "a SubstreamID without SSV is none");
    assert_eq!(effect([0x0000_0038_0000_0841, 0x0003]), answer(Some(0), 3, Answer::Failure));
    assert_eq!(effect([0x0000_0038_0000_0041, 0x3003]), ILLEGAL);
    assert_eq!(with(&[("IDR0", IDR0 & !0x1_0000)], [0x41, 0x2000]), ILLEGAL);
}

/// Records that the kernel hands out for a vIOMMU, section 7.3: what they are about.
#[test]
fn records_of_the_host() {
    use stagecraft_sdk::BlockedDma;
    let decode = |words: [u64; 4]| Smmuv3::decode_event(&words.map(u64::to_le_bytes).concat());
    let told = |words| decode(words).unwrap();
    let iova = 0xffff_8765_4321_0678;
    let read = BlockedDma { id: 0x38, pasid: None, iova, access: Access::Read, privileged: false };
    // F_TRANSLATION; RnW 35, class IN.
    assert_eq!(told([0x38_0000_0010, 0x208_0000_0000, iova, 0]), Some(read));
    // F_PERMISSION of SubstreamID 0x42; stage 2 of a write has nothing else to say of the request.
    assert_eq!(told([0x38_0004_2813, 0x280_0000_0000, iova, 0x1000]), Some(BlockedDma { pasid: Some(0x42), access: Access::Write, ..read }));
    // F_ACCESS of a privileged fetch: PnU 33, InD 34, RnW; InD means nothing beside writes.
    assert_eq!(told([0x38_0000_0012, 0x20e_0000_0000, iova, 0]), Some(BlockedDma { access: Access::Execute, privileged: true, ..read }));
    assert_eq!(told([0x38_0000_0012, 0x204_0000_0000, iova, 0]), Some(BlockedDma { access: Access::Write, ..read }));
    // F_UUT, F_TRANSL_FORBIDDEN, F_WALK_EABT, F_ADDR_SIZE, F_TLB_CONFLICT have the address as well.
    for number in [0x01, 0x07, 0x0b, 0x11, 0x20] {
        assert_eq!(told([0x38_0000_0000 | number, 8 << 32, iova, 0]), Some(read), "{number:#x}");
    }
    // Of structures, without an address: what stands in these words is something else.
    let of_stream = BlockedDma { iova: 0, ..read };
    for number in [0x02, 0x03, 0x04, 0x06, 0x09, 0x0a, 0x21] {
        assert_eq!(told([0x38_0000_0000 | number, 2 << 32, iova, iova]), Some(of_stream), "{number:#x}");
    }
    assert_eq!(told([0x38_ffff_f80a, 0, 0, 0]), Some(BlockedDma { pasid: Some(0xf_ffff), ..of_stream }), "C_BAD_CD");
    assert_eq!(told([0x38_0000_1008, 0, 0, 0]), Some(BlockedDma { pasid: Some(1), ..of_stream }), "C_BAD_SUBSTREAMID, without SSV");
    // F_BAD_ATS_TREQ, E_PAGE_REQUEST, and what is nothing.
    for number in [0x05, 0x24, 0x00, 0x0c, 0x14, 0xff] {
        assert_eq!(told([0x38_0000_0000 | number, 0, iova, 0]), None, "{number:#x}");
    }
    for bytes in [0, 31, 33, 64] {
        assert!(matches!(Smmuv3::decode_event(&vec![0x10; bytes]), Err(Error::Invalid(invalid)) if invalid.value == bytes as u64), "{bytes}");
    }
}
