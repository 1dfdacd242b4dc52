//! Registers and device structures: every way to a table, and every way to be refused.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../../../sdk/testing/notes.rs"]
mod notes;

use std::collections::BTreeMap;

use proptest::prelude::*;
use stagecraft_plugin_amd_vi::{unit::AmdVi, v1::V1, v2::V2};
use stagecraft_sdk::{
    BlockKind, Direct, Error, Extent, Format, GuestMemory, Intercept, InvalidationTarget, Outcome, PlaceToBind, Registers, Requester, TableConfig,
    Tag, Translated, Unit, Window,
};

/// 64-bit words by address; what was never written reads as zero below `end`, and nothing can be read from there on. What is read through a host table
/// stands at `OFFSET` above its guest-physical address.
#[derive(Clone)]
struct Memory {
    words: BTreeMap<u64, u64>,
    end: u64,
    bytes_read: u64,
    through: Option<TableConfig>,
}

const OFFSET: u64 = 1 << 32;

impl Memory {
    fn new(words: &[(u64, u64)]) -> Self {
        Self { words: words.iter().copied().collect(), end: 1 << 40, bytes_read: 0, through: None }
    }
}

impl GuestMemory for Memory {
    fn read(&mut self, address: u64, length: u32) -> Result<Vec<u8>, Error> {
        assert!(length <= 4096 && address.is_multiple_of(8));
        self.bytes_read += u64::from(length);
        if address >= self.end {
            return Err(Error::Unreadable(address));
        }
        let word = |offset| self.words.get(&(address + offset)).copied().unwrap_or(0).to_le_bytes();
        Ok((0..u64::from(length)).step_by(8).flat_map(word).collect())
    }

    fn read_through(&mut self, table: &TableConfig, address: u64, length: u32) -> Result<Vec<u8>, Error> {
        assert_eq!(self.through.get_or_insert_with(|| table.clone()), table);
        self.read(address + OFFSET, length)
    }
}

const TABLE: u64 = 0x10_0000;
const HOST: u64 = 0x12_3456_7000;
const GCR3: u64 = 0x3_0880_4000;
const GUEST: u64 = 0x56_789a_b000;

// Device under test: bus 2, device 7, function 1.
const ID: u64 = 0x0239;
const ENTRY: u64 = TABLE + ID * 32;

const ON: u64 = 1;
const GT: u64 = 1 << 16;
const MARC: u64 = 1 << 40;
const TRP_MODE: u64 = 1 << 58;

const VALID: u64 = 0b11;
const IR: u64 = 1 << 61;
const IW: u64 = 1 << 62;
const RW: u64 = IR | IW;
const GIOV: u64 = 1 << 54;
const GV: u64 = 1 << 55;

fn mode(levels: u64) -> u64 {
    levels << 9
}

fn glx(value: u64) -> u64 {
    value << 56
}

/// Words 0 and 1 of an entry with this guest CR3 table.
fn gcr3(root: u64) -> [u64; 2] {
    [(root >> 12 & 7) << 58, (root >> 15 & 0xffff) << 16 | (root >> 31) << 43]
}

fn registers(given: &[(&str, u64)]) -> Registers {
    let mut all = BTreeMap::from([("DEVTAB_BASE", TABLE | 0x1ff), ("CONTROL", ON | GT), ("EXT_FEATURES", 0)]);
    all.extend(given.iter().copied());
    all.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

fn entry(words: [u64; 3]) -> Memory {
    Memory::new(&[(ENTRY, words[0]), (ENTRY + 8, words[1]), (ENTRY + 16, words[2])])
}

/// An entry with a guest CR3 table of one level in which `pasid` has a guest table.
fn guest(word: u64, pasid: u64) -> Memory {
    let [low, high] = gcr3(GCR3);
    let mut memory = entry([VALID | GV | word | low, high, 0]);
    memory.words.insert(GCR3 + pasid * 8, GUEST | 1);
    memory
}

fn ask(given: &[(&str, u64)], memory: &Memory, pasid: Option<u32>) -> Outcome {
    AmdVi::lookup(&registers(given), Requester { id: ID, pasid }, &mut memory.clone()).unwrap()
}

fn event(outcome: Outcome) -> String {
    match outcome {
        Outcome::Blocked(blocked) => {
            assert!(blocked.section.starts_with("48882 section 2.5.") && !blocked.reason.ends_with('.') && !blocked.reason.is_empty());
            blocked.event
        }
        other => panic!("not blocked: {other:?}"),
    }
}

fn unsupported(given: &[(&str, u64)], memory: &Memory) -> String {
    match AmdVi::lookup(&registers(given), Requester { id: ID, pasid: None }, &mut memory.clone()) {
        Err(Error::Unsupported(what)) => what,
        other => panic!("{other:?}"),
    }
}

fn settings(outcome: Outcome) -> String {
    let Outcome::Tables(Translated { tables, .. }) = outcome else { panic!("no tables: {outcome:?}") };
    let one = |table: TableConfig| {
        let list: Vec<_> =
            table.settings.iter().map(|(name, value)| if name == "root" { format!("root={value:#x}") } else { format!("{name}={value}") }).collect();
        format!("{} {}", table.format.trim_start_matches("amd-vi/"), list.join(" "))
    };
    tables.into_iter().map(one).collect::<Vec<_>>().join("; ")
}

/// What no tables serve, and no bypass.
fn interrupts() -> Intercept {
    let (server, section) = ("interrupt controller".to_owned(), "48882 section 2.2.5".to_owned());
    Intercept { passed: 0, mask: 0xffff_ffff_fff0_0000, value: 0xfee0_0000, server, address: None, section }
}

const ILLEGAL: &str = "ILLEGAL_DEV_TABLE_ENTRY";
const PAGE_FAULT: &str = "IO_PAGE_FAULT";

#[test]
fn a_unit_that_is_off_bypasses() {
    let memory = entry([VALID | RW | mode(3) | HOST, 0, 0]);
    for control in [0, !ON] {
        assert_eq!(ask(&[("CONTROL", control)], &memory, None), Outcome::Bypass);
        assert_eq!(AmdVi::pasids(&registers(&[("CONTROL", control)]), ID, &mut memory.clone()), Ok(Vec::new()));
    }
}

#[test]
fn two_registers_are_needed_and_ids_have_16_bits() {
    for missing in ["DEVTAB_BASE", "CONTROL"] {
        let given = ["DEVTAB_BASE", "CONTROL"].into_iter().filter(|name| *name != missing).map(|name| (name.to_owned(), 0)).collect();
        let Err(Error::Invalid(invalid)) = AmdVi::lookup(&given, Requester { id: 0, pasid: None }, &mut Memory::new(&[])) else { panic!() };
        assert_eq!(invalid.field, missing);
    }
    let requester = Requester { id: 0x1_0000, pasid: None };
    assert!(matches!(AmdVi::lookup(&registers(&[]), requester, &mut Memory::new(&[])), Err(Error::Invalid(_))));
    assert!(matches!(AmdVi::pasids(&registers(&[]), 0x1_0000, &mut Memory::new(&[])), Err(Error::Invalid(_))));
}

#[test]
fn an_entry_that_is_not_valid_bypasses_whatever_else_it_says() {
    for word in [0, !1] {
        assert_eq!(ask(&[], &entry([word, u64::MAX, u64::MAX]), None), Outcome::Bypass);
    }
    assert_eq!(ask(&[], &entry([0, 0, 0]), Some(7)), Outcome::Bypass);
}

#[test]
fn an_entry_without_translation_fields_blocks() {
    assert_eq!(event(ask(&[], &entry([1 | RW | mode(3) | HOST, 0, 0]), None)), PAGE_FAULT);
}

#[test]
fn mode_0_goes_by_the_entrys_permissions() {
    assert_eq!(ask(&[], &entry([VALID | RW, 0, 0]), None), Outcome::Bypass);
    assert_eq!(event(ask(&[], &entry([VALID, 0, 0]), None)), PAGE_FAULT);
    for alone in [IR, IW] {
        let Outcome::Direct(Direct { windows, intercepts }) = ask(&[], &entry([VALID | alone, 0, 0]), None) else { panic!("not direct") };
        let [Window { first: 0, last: u64::MAX, address: 0, attributes }] = windows[..] else { panic!("{windows:?}") };
        assert_eq!((attributes.read, attributes.write), (alone == IR, alone == IW));
        assert_eq!(intercepts, [interrupts()]);
    }
}

#[test]
fn host_tables_have_one_to_six_levels() {
    for levels in 1..7 {
        let found = settings(ask(&[], &entry([VALID | RW | mode(levels) | HOST, 0x55, 0]), None));
        assert_eq!(found, format!("v1 levels={levels} root=0x1234567000"));
    }
    assert_eq!(event(ask(&[], &entry([VALID | RW | mode(7) | HOST, 0, 0]), None)), ILLEGAL);
    // the highest and the lowest bit of the address; page request and interrupt fields do not matter
    let all = entry([VALID | RW | mode(4) | 0xf_ffff_ffff_f000 | 0b11 << 52, !(1 << 39), u64::MAX]);
    assert_eq!(settings(ask(&[], &all, None)), "v1 levels=4 root=0xffffffffff000");
    let none = [("EXT_FEATURES", 0b11 << 10)];
    assert_eq!(event(ask(&none, &entry([VALID | RW | mode(3) | HOST, 0, 0]), None)), ILLEGAL);
    assert_eq!(event(ask(&none, &entry([VALID | RW | HOST, 0, 0]), None)), ILLEGAL);
    assert_eq!(event(ask(&none, &entry([VALID | RW | mode(3), 0, 0]), None)), ILLEGAL);
    assert_eq!(ask(&none, &entry([VALID | RW, 0, 0]), None), Outcome::Bypass);
}

#[test]
fn permissions_and_flags_of_the_entry_become_settings() {
    let host = |word| settings(ask(&[], &entry([VALID | mode(3) | HOST | word, 0, 0]), None));
    assert_eq!(host(IR), "v1 levels=3 root=0x1234567000 write=0");
    assert_eq!(host(IW), "v1 levels=3 root=0x1234567000 read=0");
    assert_eq!(host(RW | 1 << 7), "v1 levels=3 root=0x1234567000 update-accessed=1");
    assert_eq!(host(RW | 0b11 << 7), "v1 levels=3 root=0x1234567000 update-accessed=1 update-dirty=1");
    assert_eq!(event(ask(&[], &entry([VALID | mode(3) | HOST, 0, 0]), None)), PAGE_FAULT);
}

#[test]
fn reserved_bits_of_the_entry_block() {
    for bit in [2, 3, 4, 5, 6, 63] {
        assert_eq!(event(ask(&[], &entry([VALID | RW | mode(3) | HOST | 1 << bit, 0, 0]), None)), ILLEGAL, "bit {bit}");
    }
}

#[test]
fn the_device_table_ends_where_its_size_says() {
    let memory = entry([VALID | RW, 0, 0]);
    // DeviceID 239h is in the fifth page
    assert_eq!(ask(&[("DEVTAB_BASE", TABLE | 4)], &memory, None), Outcome::Bypass);
    assert_eq!(event(ask(&[("DEVTAB_BASE", TABLE | 3)], &memory, None)), ILLEGAL);
    let last = Memory::new(&[(TABLE + 0xffff * 32, VALID | RW | mode(2) | HOST)]);
    let requester = Requester { id: 0xffff, pasid: None };
    assert_eq!(settings(AmdVi::lookup(&registers(&[]), requester, &mut last.clone()).unwrap()), "v1 levels=2 root=0x1234567000");
    assert_eq!(event(ask(&[], &Memory { end: TABLE, ..memory }, None)), "DEV_TAB_HARDWARE_ERROR");
}

#[test]
fn the_highest_bits_of_an_id_select_the_segment() {
    for (log2, segment, id) in [(1, 1, 0x8005_u64), (2, 3, 0xc005), (2, 2, 0x8005), (3, 7, 0xe005), (3, 0, 5)] {
        let name = if segment == 0 { "DEVTAB_BASE".to_owned() } else { format!("DEVTAB_SEG{segment}_BASE") };
        let names: Vec<String> = (1..8).map(|segment| format!("DEVTAB_SEG{segment}_BASE")).collect();
        let mut given: Vec<(&str, u64)> = names.iter().map(|name| (name.as_str(), 0x9000)).collect();
        given.extend([("CONTROL", ON | log2 << 34), (name.as_str(), 0x40_0000)]);
        let mut memory = Memory::new(&[(0x40_0000 + 5 * 32, VALID | RW | mode(3) | HOST)]);
        let found = AmdVi::lookup(&registers(&given), Requester { id, pasid: None }, &mut memory).unwrap();
        assert_eq!(settings(found), "v1 levels=3 root=0x1234567000", "{name}");
    }
    let failed = |control: u64| match AmdVi::lookup(&registers(&[("CONTROL", control)]), Requester { id: 0, pasid: None }, &mut Memory::new(&[])) {
        Err(Error::Invalid(invalid)) => invalid.field,
        other => panic!("{other:?}"),
    };
    assert_eq!(failed(ON | 1 << 34), "DEVTAB_SEG1_BASE");
    assert_eq!(failed(ON | 4 << 34), "CONTROL");
}

#[test]
fn what_passes_beside_the_tables_is_not_supported() {
    let host = |word_1| entry([VALID | RW | mode(3) | HOST, word_1, 0]);
    let found = |base, memory: &Memory| settings(ask(&[("EXCL_BASE", base)], memory, None));
    assert_eq!(found(0x8000_0000, &host(1 << 39)), "v1 levels=3 root=0x1234567000");
    assert_eq!(found(0x8000_0001, &host(0)), "v1 levels=3 root=0x1234567000");
    assert!(unsupported(&[("EXCL_BASE", 0x8000_0001)], &host(1 << 39)).contains("exclusion"));
    assert!(unsupported(&[("EXCL_BASE", 0x8000_0003)], &host(0)).contains("exclusion"));
    assert!(unsupported(&[("CONTROL", ON | MARC)], &host(0)).contains("MARC"));
    assert_eq!(ask(&[("CONTROL", ON | MARC), ("EXCL_BASE", 3)], &entry([0, 0, 0]), None), Outcome::Bypass);
}

#[test]
fn guest_tables_are_found_by_pasid_and_without() {
    assert_eq!(settings(ask(&[], &guest(RW | GIOV, 0), None)), "v2 levels=4 root=0x56789ab000 sign-extended=0");
    assert_eq!(settings(ask(&[], &guest(RW | GIOV, 0), Some(0))), "v2 levels=4 root=0x56789ab000 sign-extended=0");
    assert_eq!(settings(ask(&[], &guest(RW, 511), Some(511))), "v2 levels=4 root=0x56789ab000");
    // without GIoV, requests without PASID do not use guest tables
    assert_eq!(ask(&[], &guest(RW, 0), None), Outcome::Bypass);
    assert_eq!(settings(ask(&[], &guest(RW | mode(3) | HOST, 0), None)), "v1 levels=3 root=0x1234567000");
    // permissions of an entry without host table are the guest table's
    assert_eq!(settings(ask(&[], &guest(IR, 5), Some(5))), "v2 levels=4 root=0x56789ab000 write=0");
    assert_eq!(settings(ask(&[], &guest(IW, 5), Some(5))), "v2 levels=4 root=0x56789ab000 read=0");
    assert_eq!(event(ask(&[], &guest(0, 5), Some(5))), PAGE_FAULT);
}

#[test]
fn guest_translation_can_be_off() {
    let off = [("CONTROL", ON)];
    assert_eq!(ask(&off, &guest(RW | GIOV, 0), None), Outcome::Bypass);
    assert_eq!(settings(ask(&off, &guest(RW | GIOV | mode(3) | HOST, 0), None)), "v1 levels=3 root=0x1234567000");
    assert_eq!(event(ask(&off, &guest(RW | GIOV, 0), Some(0))), "INVALID_DEVICE_REQUEST");
    assert_eq!(event(ask(&[], &entry([VALID | RW | mode(3) | HOST, 0, 0]), Some(1))), "INVALID_DEVICE_REQUEST");
}

#[test]
fn registers_and_the_guest_paging_mode_become_settings() {
    let [low, high] = gcr3(GCR3);
    let with = |given: &[(&str, u64)], paging_mode: u64| {
        let mut memory = entry([VALID | GV | RW | low, high, paging_mode << 54]);
        memory.words.insert(GCR3 + 9 * 8, GUEST | 1);
        ask(given, &memory, Some(9))
    };
    assert_eq!(settings(with(&[], 1)), "v2 levels=5 root=0x56789ab000");
    assert_eq!(event(with(&[], 2)), ILLEGAL);
    assert_eq!(event(with(&[], 3)), ILLEGAL);
    assert_eq!(settings(with(&[("EXT_FEATURES", 1 << 3)], 0)), "v2 levels=4 root=0x56789ab000 no-execute=1");
    let control = [("CONTROL", ON | GT | 1 << 48 | 1 << 54)];
    assert_eq!(settings(with(&control, 0)), "v2 levels=4 root=0x56789ab000 update-accessed=0 update-dirty=0");
}

#[test]
fn guest_cr3_tables_have_one_to_three_levels() {
    let [low, high] = gcr3(GCR3);
    let base = |value| entry([VALID | GV | RW | glx(value) | low, high, 0]);
    let mut two = base(1);
    two.words.extend([(GCR3 + 0x1ff * 8, 0x7000 | 1), (0x7000 + 0xab * 8, GUEST | 1)]);
    assert_eq!(settings(ask(&[], &two, Some(0x3_feab))), "v2 levels=4 root=0x56789ab000");
    assert_eq!(event(ask(&[], &two, Some(0x4_0000))), PAGE_FAULT);
    let mut three = base(2);
    three.words.extend([(GCR3 + 3 * 8, 0x6000 | 1), (0x6000 + 0x1ff * 8, 0x7000 | 1), (0x7000 + 0xab * 8, GUEST | 1)]);
    assert_eq!(settings(ask(&[], &three, Some(0xf_feab))), "v2 levels=4 root=0x56789ab000");
    assert_eq!(event(ask(&[], &three, Some(0x10_0000))), PAGE_FAULT);
    assert_eq!(event(ask(&[], &three, Some(0xb_feab))), PAGE_FAULT);
    assert_eq!(event(ask(&[], &base(3), Some(0))), ILLEGAL);
    assert_eq!(event(ask(&[], &guest(RW, 0), Some(512))), PAGE_FAULT);
}

#[test]
fn guest_cr3_table_entries_are_checked() {
    let with = |word| {
        let mut memory = guest(RW, 5);
        memory.words.insert(GCR3 + 5 * 8, word);
        ask(&[], &memory, Some(5))
    };
    assert_eq!(event(with(GUEST)), PAGE_FAULT);
    for bit in 52..64 {
        assert_eq!(event(with(GUEST | 1 | 1 << bit)), PAGE_FAULT);
    }
    // cache control bits of a processor's CR3 do not matter
    assert_eq!(settings(with(GUEST | 0b11001)), "v2 levels=4 root=0x56789ab000");
    assert_eq!(event(ask(&[], &Memory { end: GCR3, ..guest(RW, 5) }, Some(5))), "PAGE_TAB_HARDWARE_ERROR");
}

#[test]
fn guest_and_host_table_together_are_nested() {
    // the first guest CR3 table by its physical address, or by its guest-physical one
    for (control, first) in [(ON | GT, GCR3), (ON | GT | TRP_MODE, GCR3 + OFFSET)] {
        let [low, high] = gcr3(GCR3);
        let mut memory = entry([VALID | GV | GIOV | glx(1) | IR | mode(3) | HOST | low, high, 0]);
        memory.words.extend([(first, 0x7000 | 1), (OFFSET + 0x7000, GUEST | 1)]);
        let expected = "v2 levels=4 root=0x56789ab000 output-bits=39 sign-extended=0; v1 levels=3 root=0x1234567000 write=0";
        let outcome = AmdVi::lookup(&registers(&[("CONTROL", control)]), Requester { id: ID, pasid: None }, &mut memory).unwrap();
        assert_eq!(settings(outcome), expected);
        assert_eq!(memory.through, Some(TableConfig::new("amd-vi/v1", &[("levels", 3), ("root", HOST), ("write", 0)])));
    }
    // without host table there is nothing to read through
    assert_eq!(settings(ask(&[("CONTROL", ON | GT | TRP_MODE)], &guest(RW, 5), Some(5))), "v2 levels=4 root=0x56789ab000");
    // five levels and more hold all physical addresses
    let deep = guest(RW | mode(5) | HOST, 5);
    let mut through = deep.clone();
    through.words.insert(GCR3 + OFFSET + 5 * 8, GUEST | 1);
    let found = settings(ask(&[("CONTROL", ON | GT | TRP_MODE)], &through, Some(5)));
    assert_eq!(found, "v2 levels=4 root=0x56789ab000; v1 levels=5 root=0x1234567000");
}

#[test]
fn pasids_lists_what_is_valid_except_the_one_of_requests_without() {
    let [low, high] = gcr3(GCR3);
    let mut memory = entry([VALID | GV | GIOV | RW | glx(1) | low, high, 0]);
    memory.words.extend([(GCR3, 0x7001), (GCR3 + 0x1ff * 8, 0x8001), (GCR3 + 5 * 8, 0x8000), (GCR3 + 6 * 8, 0x8001 | 1 << 60)]);
    memory.words.extend([(0x7000, 1), (0x7000 + 8, 1), (0x7000 + 511 * 8, 1), (0x7000 + 16, GUEST), (0x8000, 1), (0x8000 + 8, 1 | 1 << 52)]);
    let list = |given: &[(&str, u64)], memory: &Memory| AmdVi::pasids(&registers(given), ID, &mut memory.clone()).unwrap();
    assert_eq!(list(&[], &memory), [1, 511, 0x1ff << 9]);
    assert_eq!(list(&[("CONTROL", ON)], &memory), [0; 0]);
    let word = memory.words[&ENTRY];
    memory.words.insert(ENTRY, word & !GIOV);
    assert_eq!(list(&[], &memory), [0, 1, 511, 0x1ff << 9]);
    for broken in [word & !1, word & !2, word & !RW, word | 4, word | 0b11 << 56, word | mode(7), word & !GV] {
        memory.words.insert(ENTRY, broken);
        assert_eq!(list(&[], &memory), [0; 0], "{broken:#x}");
    }
    // three levels: two bits select an entry of the first table
    memory.words.insert(ENTRY, VALID | GV | RW | glx(2) | low);
    memory.words.extend([(GCR3, 0), (GCR3 + 3 * 8, 0x6001), (GCR3 + 4 * 8, 0x6001), (0x6000 + 8, 0x7001)]);
    assert_eq!(list(&[], &memory), [0, 1, 511].map(|pasid| 3 << 18 | 1 << 9 | pasid));
}

#[test]
fn pasids_are_read_through_the_host_table() {
    let mut memory = guest(RW | mode(4) | HOST, 5);
    memory.words.insert(GCR3 + OFFSET + 7 * 8, GUEST | 1);
    let mut list = |control| AmdVi::pasids(&registers(&[("CONTROL", control)]), ID, &mut memory).unwrap();
    assert_eq!(list(ON | GT), [5]);
    assert_eq!(list(ON | GT | TRP_MODE), [7]);
}

#[test]
fn pasids_is_bounded_against_a_hostile_table() {
    // every entry points to the same table: full first, then without a single entry
    let [low, high] = gcr3(GCR3);
    let mut memory = entry([VALID | GV | GIOV | RW | glx(2) | low, high, 0]);
    memory.words.extend((0..512).map(|slot| (GCR3 + slot * 8, GCR3 | 1)));
    let list = AmdVi::pasids(&registers(&[]), ID, &mut memory).unwrap();
    assert_eq!((list.len(), list[0], list[1023]), (1024, 1, 1024));
    memory.words.extend((0..512).map(|slot| (GCR3 + slot * 8, 0x7_0001)));
    memory.words.extend((0..512).map(|slot| (0x7_0000 + slot * 8, 0x8_0001)));
    memory.bytes_read = 0;
    assert_eq!(AmdVi::pasids(&registers(&[]), ID, &mut memory), Ok(Vec::new()));
    assert!(memory.bytes_read < 5 << 20, "{}", memory.bytes_read);
}

const GT_SUP: u64 = 1 << 4;
const GIO_SUP: u64 = 1 << 48;
const NX_SUP: u64 = 1 << 3;

#[test]
fn only_the_guest_table_of_a_nesting_unit_is_offered() {
    let offer = |features: u64, features2: u64| {
        let info: Vec<u8> = [features, features2].iter().flat_map(|word| word.to_le_bytes()).collect();
        let offers = AmdVi::offers(4, &info).unwrap();
        let one = |offer: stagecraft_sdk::Offer| {
            let limits: Vec<_> = offer.limits.iter().map(|(name, value)| format!("{name}={value}")).collect();
            format!("{} {}", offer.format, limits.join(" "))
        };
        offers.into_iter().map(one).collect::<Vec<_>>()
    };
    let four =
        "amd-vi/v2 levels=4 output-bits=52 sign-extended=0 page-1g=1 no-execute=0 privileged=0 read=1 write=1 update-accessed=1 update-dirty=1";
    assert_eq!(offer(GT_SUP | GIO_SUP, 1 << 3), [four]);
    let five = four.replace("levels=4", "levels=5").replace("execute=0", "execute=1");
    assert_eq!(offer(GT_SUP | GIO_SUP | NX_SUP | 1 << 12, !0), [five]);
    assert_eq!(offer(!GT_SUP & !(0b11 << 10), !0), [""; 0]);
    assert_eq!(offer(!GIO_SUP & !(0b11 << 10), !0), [""; 0]);
    assert_eq!(offer(GT_SUP | GIO_SUP, !(1 << 3)), [""; 0]);
    assert_eq!(offer(GT_SUP | GIO_SUP | 0b11 << 10, 1 << 3), [""; 0]);
    assert!(matches!(AmdVi::offers(1, &[0; 24]), Err(Error::Unsupported(_))));
    assert!(matches!(AmdVi::offers(4, &[0; 15]), Err(Error::Invalid(_))));
    assert!(AmdVi::offers(4, &[0; 64]).unwrap().is_empty());
}

#[test]
fn bind_data_is_a_guests_device_table_entry() {
    let bind = |settings: &[(&str, u64)], context| {
        let to = PlaceToBind { context_address: context, ..PlaceToBind::default() };
        AmdVi::bind_data(&TableConfig::new("amd-vi/v2", settings), &to)
    };
    let good = [("levels", 4), ("root", GUEST), ("sign-extended", 0)];
    let four = bind(&good, GCR3).unwrap();
    let words = stagecraft_sdk::bits::words(&four.data);
    let [low, high] = gcr3(GCR3);
    assert_eq!((four.kind, words.as_slice()), (3, [VALID | GV | GIOV | RW | low, high, 0, 0].as_slice()));
    let context = stagecraft_sdk::bits::words(&four.context);
    assert_eq!((context.len(), context[0]), (512, GUEST | 1));
    assert!(context[1..].iter().all(|word| *word == 0));
    // INVALIDATE_IOMMU_PAGES of PASID 0: operation 63:60, domain 47:32; S 0, PDE 1, GN 2
    let to = PlaceToBind { context_address: GCR3, space: 0x1234, ..PlaceToBind::default() };
    let tagged = AmdVi::bind_data(&TableConfig::new("amd-vi/v2", &good), &to).unwrap();
    assert_eq!(stagecraft_sdk::bits::words(&tagged.data)[1], high | 0x1234);
    let recipe = tagged.invalidation.unwrap();
    assert_eq!((recipe.target, tagged.viommu, tagged.pasids), (InvalidationTarget::Viommu, Some(0x5347_0001), false));
    assert_eq!((recipe.page, recipe.leaf, recipe.tables), (vec![3 << 60 | 0x1234 << 32, 4], vec![0, 0], Some(vec![0, 2])));
    assert_eq!(recipe.everything, [3 << 60 | 0x1234 << 32, 0x7fff_ffff_ffff_f007]);
    assert_eq!(recipe.range.map(|range| (range.words[1], range.extent)), Some((5, Extent::Block)));
    let wide = PlaceToBind { space: 1 << 16, ..to };
    assert!(matches!(AmdVi::bind_data(&TableConfig::new("amd-vi/v2", &good), &wide), Err(Error::Invalid(_))));
    let five = bind(&[("levels", 5), ("root", GUEST), ("sign-extended", 0), ("no-execute", 1)], GCR3).unwrap();
    assert_eq!(stagecraft_sdk::bits::words(&five.data)[2], 1 << 54);
    // the unit under a guest with this entry and this table in memory finds the same table again
    let mut memory = entry([words[0], words[1], words[2]]);
    memory.words.extend((0..512).map(|slot| (GCR3 + slot * 8, context[slot as usize])));
    assert_eq!(
        ask(&[], &memory, None),
        Outcome::Tables(Translated {
            tables: vec![TableConfig::new("amd-vi/v2", &good)],
            intercepts: vec![interrupts()],
            tag: Tag { domain: Some(0), space: Some(0) }
        })
    );

    let refused = |name: &str, value| {
        let mut settings: BTreeMap<&str, u64> = good.into_iter().collect();
        settings.insert(name, value);
        bind(&settings.into_iter().collect::<Vec<_>>(), GCR3)
    };
    for (name, value) in [("sign-extended", 1), ("privileged", 1), ("read", 0), ("write", 0), ("update-accessed", 0), ("update-dirty", 0)] {
        assert!(matches!(refused(name, value), Err(Error::Unsupported(_))), "{name}");
    }
    assert!(matches!(refused("levels", 6), Err(Error::Invalid(_))));
    assert!(matches!(bind(&[("sign-extended", 0)], GCR3), Err(Error::Invalid(_))));
    for context in [0, 64, 1 << 52, GCR3 | 8] {
        assert!(matches!(bind(&good, context), Err(Error::Invalid(_))), "{context:#x}");
    }
    assert!(matches!(AmdVi::bind_data(&TableConfig::new("amd-vi/v1", &[("root", 0)]), &PlaceToBind::default()), Err(Error::Unsupported(_))));
}

/// Memory in which every word is a function of seed and address, with bits forced so that walks get far.
struct Hostile {
    seed: u64,
    set: u64,
    clear: u64,
    reads: u32,
}

impl GuestMemory for Hostile {
    fn read(&mut self, address: u64, length: u32) -> Result<Vec<u8>, Error> {
        assert!(length <= 4096 && address.is_multiple_of(8) && address >> 52 == 0);
        self.reads += 1;
        let word = |offset: u64| {
            let mut x = (address.wrapping_add(offset) ^ self.seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            x ^= x >> 29;
            x = x.wrapping_mul(0xbf58_476d_1ce4_e5b9);
            (x ^ x >> 32 | self.set) & !self.clear
        };
        Ok((0..u64::from(length)).step_by(8).flat_map(|offset| word(offset).to_le_bytes()).collect())
    }

    fn read_through(&mut self, table: &TableConfig, address: u64, length: u32) -> Result<Vec<u8>, Error> {
        // what is read through can be opened
        V1::open(&table.settings).unwrap();
        self.read(address, length)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn hostile_registers_and_memory_never_panic_and_are_bounded(
        devtab: u64, control: u64, features: u64, exclusion: u64, id in 0_u64..0x1_0000, pasid in proptest::option::of(0_u32..0x20_0000), seed: u64,
        tame: bool, far: bool,
    ) {
        let mut given = vec![("DEVTAB_BASE", devtab), ("CONTROL", control), ("EXT_FEATURES", features), ("EXCL_BASE", exclusion)];
        let names: Vec<String> = (1..8).map(|segment| format!("DEVTAB_SEG{segment}_BASE")).collect();
        given.extend(names.iter().map(|name| (name.as_str(), devtab.rotate_left(name.len() as u32))));
        if far {
            given[0].1 |= 0x1ff;
            given[1].1 = given[1].1 & !(MARC | 0b111 << 34) | ON | GT;
            given[2].1 &= !(0b11 << 10);
            given[3].1 = 0;
        }
        // tame memory has few reserved bits set, so that later structures are reached
        let clear = if tame { 0x8000_0000_0000_007c } else { 0 };
        let mut memory = Hostile { seed, set: if tame { VALID } else { 0 }, clear, reads: 0 };
        let outcome = AmdVi::lookup(&registers(&given), Requester { id, pasid }, &mut memory);
        prop_assert!(memory.reads <= 4);
        match outcome {
            Ok(Outcome::Tables(Translated { tables, .. })) => {
                prop_assert!(!tables.is_empty() && tables.len() <= 2);
                for table in tables {
                    // what lookup answers can be opened
                    match table.format.as_str() {
                        V1::NAME => { V1::open(&table.settings).unwrap(); }
                        V2::NAME => { V2::open(&table.settings).unwrap(); }
                        other => panic!("{other}"),
                    }
                }
            }
            Ok(_) | Err(Error::Unsupported(_)) => {}
            Err(Error::Invalid(invalid)) => prop_assert_eq!(invalid.field, "CONTROL"),
            Err(other) => panic!("{other:?}"),
        }
        memory.reads = 0;
        let list = AmdVi::pasids(&registers(&given), id, &mut memory).unwrap_or_default();
        prop_assert!(list.len() <= 1024 && list.is_sorted() && memory.reads <= 1 + 1024);
    }
}

#[test]
fn address_spaces_are_named_by_domain_and_pasid() {
    let tag = |memory: &Memory, pasid| match ask(&[], memory, pasid) {
        Outcome::Tables(Translated { tag: Tag { domain, space }, .. }) => (domain, space),
        other => panic!("{other:?}"),
    };
    assert_eq!(tag(&entry([VALID | RW | mode(3) | HOST, 0xffff_0000_1234, u64::MAX]), None), (Some(0x1234), None));
    let [low, high] = gcr3(GCR3);
    let mut guest = entry([VALID | GV | GIOV | RW | low, high | 0x4321, 0]);
    guest.words.extend([(GCR3, GUEST | 1), (GCR3 + 9 * 8, GUEST | 1)]);
    assert_eq!((tag(&guest, None), tag(&guest, Some(9))), ((Some(0x4321), Some(0)), (Some(0x4321), Some(9))));
}

#[test]
fn devices_that_nobody_set_up_are_unused() {
    let kind = |memory: &Memory| match ask(&[], memory, None) {
        Outcome::Blocked(blocked) => blocked.kind,
        other => panic!("{other:?}"),
    };
    assert_eq!(kind(&entry([1, 0, 0])), BlockKind::Unused, "no translation fields");
    assert_eq!(kind(&entry([VALID, 0, 0])), BlockKind::Unused, "neither reads nor writes");
    assert_eq!(kind(&entry([VALID | RW | mode(7), 0, 0])), BlockKind::Refused);
    assert_eq!(kind(&entry([VALID | RW | 4, 0, 0])), BlockKind::Refused);
}

#[test]
fn interrupts_are_intercepted_for_requests_without_pasid() {
    let caught = |outcome| match outcome {
        Outcome::Tables(Translated { intercepts, .. }) => intercepts,
        other => panic!("no tables: {other:?}"),
    };
    assert_eq!(caught(ask(&[], &entry([VALID | RW | mode(3) | HOST, 0, 0]), None)), [interrupts()]);
    // with GIoV the guest table of PASID 0 is for requests with and without a PASID
    assert_eq!(caught(ask(&[], &guest(RW | GIOV, 0), None)), [interrupts()]);
    assert_eq!(caught(ask(&[], &guest(RW | GIOV, 0), Some(0))), []);
    assert_eq!(caught(ask(&[], &guest(RW, 5), Some(5))), []);
    for geometry in [V1::open(&Default::default()).unwrap().geometry(), V2::open(&Default::default()).unwrap().geometry()] {
        assert_eq!(geometry.untranslated, [(0xfee0_0000, 0xfeef_ffff)]);
    }
}

#[test]
fn what_an_entry_asks_for_beyond_the_features_is_noted() {
    let warnings = |features: Option<u64>, memory: Memory, pasid| {
        let known = features.map(|features| ("EXT_FEATURES".to_owned(), features));
        let registers = [("DEVTAB_BASE".to_owned(), TABLE | 0x1ff), ("CONTROL".to_owned(), ON | GT)].into_iter().chain(known).collect();
        let mut memory = notes::Noting::new(memory);
        let outcome = AmdVi::lookup(&registers, Requester { id: ID, pasid }, &mut memory).unwrap();
        assert!(matches!(outcome, Outcome::Tables(_)), "{outcome:?}");
        memory.warnings()
    };
    let host = |levels| entry([VALID | RW | mode(levels) | HOST, 0, 0]);
    let too_many = [(ENTRY, 0, 7 << 9)];
    for (hats, most) in [(0, 4), (1, 5), (2, 6)] {
        for levels in 1..7 {
            let expected = if levels > most { &too_many[..] } else { &[] };
            assert_eq!(warnings(Some(hats << 10), host(levels), None), expected, "HATS {hats}, {levels} levels");
        }
    }
    assert_eq!(warnings(None, host(6), None), [], "nobody knows");

    let mut memory = guest(RW | GIOV | glx(1), 0);
    memory.words.extend([(GCR3, 0x7000 | 1), (0x7000, GUEST | 1), (ENTRY + 16, 1 << 54)]);
    let (glx_bits, paging_mode) = ((ENTRY, 0, 3 << 56), (ENTRY, 2, 3 << 54));
    let (two_levels, five_levels) = (1 << 14, 1 << 12);
    assert_eq!(warnings(Some(0), memory.clone(), None), [glx_bits, paging_mode]);
    assert_eq!(warnings(Some(two_levels), memory.clone(), None), [paging_mode]);
    assert_eq!(warnings(Some(five_levels), memory.clone(), Some(0)), [glx_bits]);
    // GIoV without GIOSup is what Linux does where firmware says so.
    assert_eq!(warnings(Some(two_levels | five_levels), memory.clone(), None), []);
    assert_eq!(warnings(None, memory, None), [], "nobody knows");
}

#[test]
fn reserved_bits_that_no_walk_looks_at_are_noted() {
    let warnings = |memory: Memory, pasid| {
        let mut memory = notes::Noting::new(memory);
        let outcome = AmdVi::lookup(&registers(&[]), Requester { id: ID, pasid }, &mut memory).unwrap();
        assert!(matches!(outcome, Outcome::Tables(_) | Outcome::Bypass), "{outcome:?}");
        memory.warnings()
    };
    let host = VALID | RW | mode(3) | HOST;
    assert_eq!(warnings(entry([host, 0, 0]), None), []);
    let mut memory = entry([host, 0, u64::MAX]);
    memory.words.insert(ENTRY + 24, u64::MAX);
    let reserved = [(ENTRY, 2, 3 << 52), (ENTRY, 3, 0x7fff | 0x3f << 48)];
    assert_eq!(warnings(memory.clone(), None), reserved);
    memory.words.insert(ENTRY, 0);
    assert_eq!(warnings(memory, None), [], "nothing in an entry that is not valid");

    let mut memory = guest(RW, 5);
    assert_eq!(warnings(memory.clone(), Some(5)), []);
    memory.words.insert(GCR3 + 5 * 8, GUEST | 0xfff);
    assert_eq!(warnings(memory, Some(5)), [(GCR3 + 5 * 8, 0, 0xffe)]);
}
