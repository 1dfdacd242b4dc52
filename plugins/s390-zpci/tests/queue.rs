//! Refreshes, as records of three big-endian words.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../../../sdk/testing/event.rs"]
mod event;

use stagecraft_plugin_s390_zpci::unit::S390Zpci;
use stagecraft_sdk::{Command, Effect, Error, Registers, Scope, Unit};

fn decode(records: &[[u64; 3]]) -> Vec<Effect> {
    let bytes: Vec<u8> = records.iter().flatten().flat_map(|word| word.to_be_bytes()).collect();
    let commands = S390Zpci::decode_commands(&Registers::default(), &bytes).unwrap();
    commands.iter().map(|Command { effect, .. }| *effect).collect()
}

#[test]
fn a_refresh_means_one_function_and_one_range() {
    let function = Scope::ALL.id(0x1_00a0);
    assert_eq!(decode(&[[0x1_00a0, 0x1_0000_0000, 0x3000]]), [Effect::Range(function.range(0x1_0000_0000, 0x1_0000_2fff))]);
    assert_eq!(decode(&[[0x1_00a0, 0xffff_ffff_ffff_f000, 0x1000]]), [Effect::Range(function.range(0xffff_ffff_ffff_f000, u64::MAX))]);
    assert_eq!(decode(&[[1 << 32, 0, 0x1000]]), [Effect::Range(Scope::ALL.range(0, 0xfff))], "an id that does not fit");
    for wrong in [[1, 0x1000, 0], [1, 0x1001, 0x1000], [1, 0x1000, 0x800], [1, 0xffff_ffff_ffff_f000, 0x2000]] {
        assert_eq!(decode(&[wrong, [1, 0, 0x1000]]), [Effect::Illegal(16)], "{wrong:x?}");
    }
    assert!(matches!(S390Zpci::decode_commands(&Registers::default(), &[0; 16]), Err(Error::Invalid(_))));
}

#[test]
fn an_error_event_cannot_be_written_without_the_handle() {
    let event = event::unmapped("s390-zpci/dma", 1, 0);
    assert!(matches!(S390Zpci::encode_event(&Registers::default(), &event), Err(Error::Unsupported(_))));
}
