//! Registers of both kinds of units.
#![allow(clippy::unwrap_used, missing_docs)]

use proptest::prelude::*;
use stagecraft_plugin_apple_dart::unit::AppleDart;
use stagecraft_sdk::{BlockKind, Error, GuestMemory, Outcome, PlaceToBind, Registers, Requester, TableConfig, Translated, Unit};

struct NoMemory;

impl GuestMemory for NoMemory {
    fn read(&mut self, address: u64, _: u32) -> Result<Vec<u8>, Error> {
        panic!("{address:#x} was read")
    }

    fn read_through(&mut self, _: &TableConfig, address: u64, _: u32) -> Result<Vec<u8>, Error> {
        panic!("{address:#x} was read")
    }
}

fn ask_of(unit: &str, registers: &[(&str, u64)]) -> Result<Outcome, Error> {
    let registers: Registers = registers.iter().map(|&(name, value)| (name.to_owned(), value)).collect();
    AppleDart::lookup(&registers.of_unit(unit), Requester { id: 0xa, pasid: None }, &mut NoMemory)
}

fn ask(registers: &[(&str, u64)]) -> Result<Outcome, Error> {
    ask_of("apple-dart", registers)
}

fn text(outcome: Result<Outcome, Error>) -> String {
    match outcome {
        Ok(Outcome::Tables(Translated { tables, .. })) => {
            let settings = tables[0].settings.iter().map(|(name, value)| format!(" {name}={value:#x}")).collect::<String>();
            tables[0].format.clone() + &settings
        }
        Ok(Outcome::Blocked(blocked)) => blocked.event,
        Err(Error::Invalid(invalid)) => format!("invalid {}", invalid.field),
        other => format!("{other:?}"),
    }
}

const PAGES_16K: (&str, u64) = ("PARAMS1", 14 << 24);
const PARAMS3: (&str, u64) = ("PARAMS3", 42 << 24 | 42 << 16);

#[test]
fn t8020_has_four_roots() {
    let valid = |address: u64| 1 << 31 | address >> 12;
    let roots = [("TTBR_a_0", valid(0x8_0000_4000)), ("TTBR_a_1", 0x1234), ("TTBR_a_3", valid(0x8000))];
    let with = |tcr, params1| text(ask(&[&[("TCR_a", tcr), ("PARAMS1", params1)], &roots[..]].concat()));
    assert_eq!(with(0x80, 14 << 24), "apple-dart/dart1 granule=0x4000 root=0x800004000 root-3=0x8000");
    assert_eq!(with(0x80, 12 << 24), "apple-dart/dart1 granule=0x1000 root=0x800004000 root-3=0x8000");
    assert_eq!(with(0x100, 0), "Ok(Bypass)");
    assert_eq!([with(0, 0), with(0x180, 0)], ["NO_TTBR", "NO_TTBR"]);
    assert_eq!([with(0x80, 11 << 24), with(0x80, 13 << 24)], ["invalid PARAMS1", "invalid granule"]);
    assert_eq!(text(ask(&[("TCR_a", 0x80), PAGES_16K, ("TTBR_a_0", 0x1234)])), "NO_TTBR");
    assert_eq!(text(ask(&[("TCR_a", 0x80), PAGES_16K, ("TTBR_a_0", valid(0x1000))])), "invalid root");
}

#[test]
fn t8110_has_one_root_and_says_its_widths() {
    let ttbr = ("TTBR_a_0", (0x100_0000_4000_u64 >> 14) << 2 | 1);
    let with = |tcr| text(ask(&[("TCR_a", tcr), PAGES_16K, PARAMS3, ttbr, ("TTBR_a_1", 1)]));
    assert_eq!(with(1), "apple-dart/dart2 granule=0x4000 levels=0x2 input-bits=0x24 output-bits=0x2a root=0x10000004000");
    assert_eq!(with(9), "apple-dart/dart2 granule=0x4000 levels=0x3 input-bits=0x2a output-bits=0x2a root=0x10000004000");
    assert_eq!(with(2), "Ok(Bypass)");
    assert_eq!([with(0), with(3)], ["NO_TTBR", "NO_TTBR"]);
    assert!(with(0x81).contains("Unsupported"));
}

#[test]
fn the_kind_of_unit_says_which_registers_and_tables_there_are() {
    let ttbr = ("TTBR_a_2", 1 << 31 | 0x100_0000_4000_u64 >> 12);
    let with = |unit, tcr, more: &[(&str, u64)]| text(ask_of(unit, &[&[("TCR_a", tcr), PAGES_16K, ttbr], more].concat()));
    assert_eq!(with("apple-dart-t6000", 0x80, &[]), "apple-dart/dart2 granule=0x4000 root-2=0x10000004000");
    assert_eq!(with("apple-dart-t8020", 0x80, &[]), "apple-dart/dart1 granule=0x4000 root-2=0x10000004000");
    // Registers of another kind say nothing.
    assert_eq!(with("apple-dart-t6000", 0x80, &[PARAMS3]), "apple-dart/dart2 granule=0x4000 root-2=0x10000004000");
    assert_eq!(with("apple-dart-t8020", 0x80, &[PARAMS3]), "apple-dart/dart1 granule=0x4000 root-2=0x10000004000");
    assert_eq!(with("apple-dart-t6000", 0x100, &[]), "Ok(Bypass)");
    assert_eq!(with("apple-dart-t8110", 1, &[]), "invalid PARAMS3");
    assert_eq!(with("apple-dart-t8110", 2, &[]), "Ok(Bypass)");
}

#[test]
fn a_stream_that_nobody_set_up_is_unused() {
    let kind = |tcr| match ask(&[("TCR_a", tcr), PAGES_16K]) {
        Ok(Outcome::Blocked(blocked)) => blocked.kind,
        other => panic!("{other:?}"),
    };
    assert_eq!([kind(0), kind(0x180), kind(0x80)], [BlockKind::Unused, BlockKind::Refused, BlockKind::Refused]);
}

#[test]
fn what_is_missing_is_named() {
    assert_eq!(text(ask(&[])), "invalid TCR_a");
    assert_eq!(text(ask(&[("TCR_a", 0x80)])), "invalid PARAMS1");
    let with_pasid = AppleDart::lookup(&Default::default(), Requester { id: 0, pasid: Some(1) }, &mut NoMemory);
    assert!(matches!(with_pasid, Ok(Outcome::Blocked(_))));
    assert!(AppleDart::offers(1, &[]).is_err() && AppleDart::bind_data(&TableConfig::new("apple-dart/dart1", &[]), &PlaceToBind::default()).is_err());
}

proptest! {
    #[test]
    fn any_registers_have_an_answer(tcr: u64, params1: u64, params3 in proptest::option::of(any::<u64>()), ttbr: u64, sane: bool) {
        let (tcr, params1) = if sane { (0x81, 14 << 24) } else { (tcr, params1) };
        let mut registers = vec![("TCR_a", tcr), ("PARAMS1", params1), ("TTBR_a_0", ttbr)];
        registers.extend(params3.map(|params3| ("PARAMS3", params3)));
        let _ = ask(&registers);
    }
}
