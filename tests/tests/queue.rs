//! Commands and events of running guests, through the built-in plugins in their sandbox: the same answers as native code, for whole batches.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use stagecraft::Span;
use stagecraft::plugin::queue::{Answer, Effect, Event, EventAccess, GroupResponse, Invalidation, MAX_COMMAND_BYTES, Scope};
use stagecraft::plugin::{CallError, Config, DetectMemory, Engine, Plugins, Refusal, TableConfig};
use stagecraft::table::FaultKind;
use stagecraft_sdk::{Effect as SdkEffect, Registers, Unit};

type Decode = fn(&Registers, &[u8]) -> Result<Vec<stagecraft_sdk::Command>, stagecraft_sdk::Error>;

/// Unit, registers, bytes of an entry, and the native decoder.
struct Architecture {
    unit: &'static str,
    registers: &'static [(&'static str, u64)],
    bytes: usize,
    decode: Decode,
}

const ARCHITECTURES: [Architecture; 3] = [
    Architecture {
        unit: "arm-smmuv3",
        registers: &[("IDR0", 0x5_1603), ("IDR3", 0x400)],
        bytes: 16,
        decode: stagecraft_plugin_arm_smmuv3::Smmuv3::decode_commands,
    },
    Architecture { unit: "intel-vtd", registers: &[("IQA", 0)], bytes: 16, decode: stagecraft_plugin_intel_vtd::unit::IntelVtd::decode_commands },
    Architecture { unit: "intel-vtd", registers: &[("IQA", 0x800)], bytes: 32, decode: stagecraft_plugin_intel_vtd::unit::IntelVtd::decode_commands },
];

fn plugins() -> Plugins {
    Plugins::builtin(&Engine::new(Config::default()).unwrap()).unwrap()
}

/// No memory: structures add nothing to an event.
struct Nothing;

impl DetectMemory for Nothing {
    fn read(&mut self, _: u64, _: u32) -> Option<Vec<u8>> {
        None
    }

    fn read_through(&mut self, _: &TableConfig, _: u64, _: u32) -> Option<Vec<u8>> {
        None
    }
}

fn named(registers: &[(&str, u64)]) -> Vec<(String, u64)> {
    registers.iter().map(|&(name, value)| (name.to_owned(), value)).collect()
}

/// What the host should understand of a native answer.
fn understood(command: stagecraft_sdk::Command) -> Invalidation {
    let scope = |scope: &stagecraft_sdk::Scope| Scope {
        leaf: scope.leaf,
        second_stage: scope.second_stage,
        domain: scope.domain,
        space: scope.space,
        id: scope.id.map(|id| (id & !scope.id_ignored, scope.id_ignored)),
    };
    let effect = match command.effect {
        SdkEffect::Nothing => Effect::Nothing,
        SdkEffect::Everything => Effect::Everything,
        SdkEffect::Range(range) => Effect::Range { scope: scope(&range), iova: Span { first: range.first, last: range.last } },
        SdkEffect::Structures(range) => Effect::Structures(scope(&range)),
        SdkEffect::DeviceTlb(range) => Effect::DeviceTlb { scope: scope(&range), iova: Span { first: range.first, last: range.last } },
        SdkEffect::Illegal(code) => Effect::Illegal(code),
        SdkEffect::Response(response) => Effect::Response(GroupResponse {
            id: response.id,
            pasid: response.pasid,
            group: response.group,
            answer: match response.answer {
                stagecraft_sdk::Answer::Success => Answer::Success,
                stagecraft_sdk::Answer::Invalid => Answer::Invalid,
                stagecraft_sdk::Answer::Failure => Answer::Failure,
            },
        }),
    };
    Invalidation { index: command.index, effect }
}

#[test]
fn wasm_answers_as_native_code_does() {
    let plugins = plugins();
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    for Architecture { unit, registers, bytes, decode } in ARCHITECTURES {
        let mut instance = plugins.by_unit(unit).unwrap().instantiate().unwrap();
        let registers = named(registers);
        let native: Registers = registers.iter().cloned().collect::<Registers>().of_unit(unit);
        for _ in 0..200 {
            // Random entries with small opcodes: most are legal.
            let batch = prop::collection::vec((0_u8..0x48, prop::collection::vec(any::<u8>(), bytes - 1)), 0..20);
            let batch = proptest::strategy::Strategy::new_tree(&batch, &mut runner).unwrap();
            let entries: Vec<u8> =
                proptest::strategy::ValueTree::current(&batch).into_iter().flat_map(|(code, rest)| [vec![code], rest].concat()).collect();
            let expected: Vec<Invalidation> = decode(&native, &entries).unwrap().into_iter().map(understood).collect();
            assert_eq!(instance.decode_commands(unit, &registers, &entries).unwrap(), expected, "{unit}: {entries:x?}");
        }
        assert_eq!(instance.failed(), None);
    }
}

#[test]
fn the_longest_batch_is_decoded_in_one_call() {
    let plugins = plugins();
    let mut instance = plugins.by_unit("amd-vi").unwrap().instantiate().unwrap();
    // INVALIDATE_IOMMU_ALL, which has two effects each.
    let entries: Vec<u8> = (0..MAX_COMMAND_BYTES / 16).flat_map(|_| [8_u64 << 60, 0]).flat_map(u64::to_le_bytes).collect();
    let found = instance.decode_commands("amd-vi", &[], &entries).unwrap();
    assert_eq!((found.len(), instance.calls()), (2 * MAX_COMMAND_BYTES / 16, 1));
    assert_eq!(found.last(), Some(&Invalidation { index: 4095, effect: Effect::Everything }));
    let error = instance.decode_commands("amd-vi", &[], &entries[..40]).unwrap_err();
    assert!(matches!(error, CallError::Refused { refusal: Refusal::Invalid { .. }, .. }), "{error}");
}

#[test]
fn every_unit_has_an_answer_about_commands_and_events() {
    let plugins = plugins();
    let event = Event {
        fault: FaultKind::Translation,
        name: None,
        format: Some("some/table".to_owned()),
        level: Some(2),
        entries: Vec::new(),
        id: 0x38,
        pasid: None,
        iova: 0x1234_5678,
        intermediate: None,
        reading_table: false,
        unreadable: None,
        access: EventAccess::Write,
        privileged: false,
        domain: Some(7),
    };
    let registers = |unit: &str| match unit {
        "arm-smmuv3" => named(&[("IDR0", 3)]),
        "intel-vtd" => named(&[("IQA", 0), ("RTADDR", 0)]),
        _ => Vec::new(),
    };
    let queues = [("arm-smmuv3", "EVENTQ", 32), ("intel-vtd", "FRCD", 16), ("amd-vi", "event log", 16), ("riscv-iommu", "fault queue", 32)];
    for (unit, queue, bytes) in queues {
        let mut instance = plugins.by_unit(unit).unwrap().instantiate().unwrap();
        let record = instance.encode_event(unit, &registers(unit), &event, Nothing).unwrap();
        assert_eq!((&*record.queue, record.bytes.len()), (queue, bytes));
        assert_eq!(instance.decode_commands(unit, &registers(unit), &[]).unwrap(), []);
        let unknown = Event { name: Some("no such event".to_owned()), ..event.clone() };
        let error = instance.encode_event(unit, &registers(unit), &unknown, Nothing).unwrap_err();
        assert!(matches!(error, CallError::Refused { refusal: Refusal::Unsupported(_), .. }), "{unit}: {error}");
    }
    // What these have no queue for, or no record.
    for unit in ["s390-zpci", "apple-dart"] {
        let mut instance = plugins.by_unit(unit).unwrap().instantiate().unwrap();
        let error = instance.encode_event(unit, &[], &event, Nothing).unwrap_err();
        assert!(matches!(error, CallError::Refused { refusal: Refusal::Unsupported(_), .. }), "{unit}: {error}");
    }
    let mut dart = plugins.by_unit("apple-dart-t6000").unwrap().instantiate().unwrap();
    let error = dart.decode_commands("apple-dart-t6000", &[], &[0; 16]).unwrap_err();
    assert!(matches!(error, CallError::Refused { refusal: Refusal::Unsupported(_), .. }), "{error}");
}

#[test]
fn tags_and_commands_speak_of_the_same_address_spaces() {
    use stagecraft::guest::{Guest, State};
    use stagecraft::snapshot::Snapshot;
    let plugins = plugins();
    for fixture in ["arm64-s1-4k", "vtd-sm-fs"] {
        let snapshot = Snapshot::load(&std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(fixture)).unwrap();
        let guest = Guest::new(&snapshot, &plugins).unwrap();
        let streams: Vec<_> = guest.streams().unwrap().into_iter().filter(|stream| matches!(stream.state, State::Translated(_))).collect();
        assert!(streams.len() > 1);
        for stream in &streams {
            assert!(stream.tag.domain.is_some() || stream.tag.space.is_some(), "{fixture}: {stream:?}");
            for other in &streams {
                let scope = Scope {
                    leaf: false,
                    second_stage: false,
                    domain: stream.tag.domain.map(|domain| domain as u16),
                    space: stream.tag.space,
                    id: None,
                };
                // Streams of one tag share their tables.
                assert_eq!(scope.includes(other.tag, other.id), stream.tag == other.tag);
                assert!(stream.tag != other.tag || stream.way() == other.way(), "{fixture}: {stream:?} and {other:?}");
            }
        }
    }
}
