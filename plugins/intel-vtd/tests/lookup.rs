//! Registers and device structures: every way to a table, and every way to be refused.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../../../sdk/testing/notes.rs"]
mod notes;

#[path = "../../../sdk/testing/event.rs"]
mod event;

use std::collections::BTreeMap;

use proptest::prelude::*;
use stagecraft_plugin_intel_vtd::{first_stage::FirstStage, second_stage::SecondStage, unit::IntelVtd};
use stagecraft_sdk::{
    BlockKind, Error, Event, Extent, FaultKind, Format, GuestMemory, Intercept, InvalidationTarget, Outcome, Place, PlaceToBind, RangeEntry,
    Registers, Requester, TableConfig, Tag, Translated, Unit,
};

/// 64-bit words by address; what was never written reads as zero below `end`, and nothing can be read from there on.
#[derive(Clone)]
struct Memory {
    words: BTreeMap<u64, u64>,
    end: u64,
    bytes_read: u64,
}

impl Memory {
    fn new(words: &[(u64, u64)]) -> Self {
        Self { words: words.iter().copied().collect(), end: 1 << 40, bytes_read: 0 }
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

    fn read_through(&mut self, _: &TableConfig, _: u64, _: u32) -> Result<Vec<u8>, Error> {
        unreachable!("VT-d's structures are all in host-physical memory")
    }
}

const ROOT: u64 = 0x1_0000;
const CONTEXT: u64 = 0x2_0000;
const DIRECTORY: u64 = 0x4_0000;
const PASIDS: u64 = 0x8_0000;
const TABLE: u64 = 0x1234_5000;
const SECOND: u64 = 0x5678_9000;

// Device under test: bus 2, device 7, function 1.
const ID: u64 = 0x0239;
const ROOT_ENTRY: u64 = ROOT + 2 * 16;
const LEGACY_ENTRY: u64 = CONTEXT + 0x39 * 16;
const SCALABLE_ENTRY: u64 = CONTEXT + 0x39 * 32;

/// ND 6, SAGAW 3, 4 and 5 levels, MGAW 48, pages of 2M and 1G in both stages.
const CAP: u64 = 1 << 56 | 0b11 << 34 | 47 << 16 | 0b01110 << 8 | 6;
const DT: u64 = 1 << 2;
const PT: u64 = 1 << 6;
const SC: u64 = 1 << 7;
const NEST: u64 = 1 << 26;
const SRS: u64 = 1 << 31;
const EAFS: u64 = 1 << 34;
const PSS: u64 = 19 << 35;
const PASID: u64 = 1 << 40;
const SMTS: u64 = 1 << 43;
const SSADS: u64 = 1 << 45;
const SSTS: u64 = 1 << 46;
const FSTS: u64 = 1 << 47;
const RPS: u64 = 1 << 49;
const ADMS: u64 = 1 << 52;
const RPRIVS: u64 = 1 << 53;
const SSIRWS: u64 = 1 << 57;
const SCALABLE: u64 = SMTS | SSTS | FSTS | NEST | PT | PASID | PSS | RPS;

fn registers(cap: u64, ecap: u64, rtaddr: u64) -> Registers {
    let registers = [("CAP", cap), ("ECAP", ecap), ("GSTS", 1 << 31), ("RTADDR", rtaddr)];
    registers.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

fn ask(registers: &Registers, memory: &Memory, pasid: Option<u32>) -> Outcome {
    IntelVtd::lookup(registers, Requester { id: ID, pasid }, &mut memory.clone()).unwrap()
}

fn event(outcome: Outcome) -> String {
    match outcome {
        Outcome::Blocked(blocked) => {
            assert!(blocked.section.starts_with("D51397 section 7.1.3, fault reason ") && !blocked.reason.ends_with('.'));
            blocked.event
        }
        other => panic!("not blocked: {other:?}"),
    }
}

fn settings(outcome: Outcome) -> String {
    let Outcome::Tables(Translated { tables, .. }) = outcome else { panic!("no tables: {outcome:?}") };
    let one = |table: TableConfig| {
        let list: Vec<_> =
            table.settings.iter().map(|(name, value)| if name == "root" { format!("root={value:#x}") } else { format!("{name}={value}") }).collect();
        format!("{} {}", table.format.trim_start_matches("intel-vtd/"), list.join(" "))
    };
    tables.into_iter().map(one).collect::<Vec<_>>().join("; ")
}

/// Legacy mode; the two words of the context entry.
fn legacy(low: u64, high: u64) -> Memory {
    Memory::new(&[(ROOT_ENTRY, CONTEXT | 1), (LEGACY_ENTRY, low), (LEGACY_ENTRY + 8, high)])
}

/// Scalable mode; the first two words of the context entry (its directory is added), and the first three of the entry of `pasid`.
fn scalable(context: [u64; 2], pasid: u64, entry: [u64; 3]) -> Memory {
    let mut memory = Memory::new(&[(ROOT_ENTRY, CONTEXT | 1), (SCALABLE_ENTRY, DIRECTORY | context[0]), (SCALABLE_ENTRY + 8, context[1])]);
    memory.words.insert(DIRECTORY + (pasid >> 6) * 8, PASIDS | 1);
    for (offset, word) in (0_u64..).step_by(8).zip(entry) {
        memory.words.insert(PASIDS + (pasid & 0x3f) * 64 + offset, word);
    }
    memory
}

const FIRST_ONLY: u64 = 1 << 6;
const SECOND_ONLY: u64 = 2 << 6;
const NESTED: u64 = 3 << 6;
const PASS: u64 = 4 << 6;
const AW_3: u64 = 1 << 2;
const AW_4: u64 = 2 << 2;
const AW_5: u64 = 3 << 2;
const SSADE: u64 = 1 << 9;

#[test]
fn a_unit_that_does_not_translate_bypasses() {
    let off = [("CAP", CAP), ("ECAP", 0), ("GSTS", 0x7fff_ffff), ("RTADDR", ROOT)];
    let off: Registers = off.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    assert_eq!(ask(&off, &Memory::new(&[]), None), Outcome::Bypass);
    assert_eq!(IntelVtd::pasids(&off, ID, &mut Memory::new(&[])), Ok(Vec::new()));
}

#[test]
fn the_four_registers_are_needed_and_ids_have_16_bits() {
    for missing in ["CAP", "ECAP", "GSTS", "RTADDR"] {
        let given = ["CAP", "ECAP", "GSTS", "RTADDR"].into_iter().filter(|name| *name != missing).map(|name| (name.to_owned(), 0)).collect();
        let Err(Error::Invalid(invalid)) = IntelVtd::lookup(&given, Requester { id: 0, pasid: None }, &mut Memory::new(&[])) else { panic!() };
        assert_eq!(invalid.field, missing);
    }
    let requester = Requester { id: 0x1_0000, pasid: None };
    assert!(matches!(IntelVtd::lookup(&registers(CAP, 0, ROOT), requester, &mut Memory::new(&[])), Err(Error::Invalid(_))));
}

#[test]
fn translation_table_modes() {
    let memory = legacy(TABLE | 1, 2);
    let mode = |ecap, rtaddr| event(ask(&registers(CAP, ecap, rtaddr), &memory, None));
    assert_eq!(mode(0, ROOT | 0b10 << 10), "RTA.1.2");
    assert_eq!(mode(0, ROOT | 0b01 << 10), "RTA.1.3");
    assert_eq!(mode(0, ROOT | 0b11 << 10), "RTA.1.1");
    assert_eq!(mode(ADMS, ROOT | 0b11 << 10), "RTA.4");
    assert_eq!(mode(SSIRWS, ROOT | 1 << 7), "RTA.1.4");
}

#[test]
fn legacy_mode_finds_the_second_stage() {
    let plain = |high| settings(ask(&registers(CAP, DT, ROOT), &legacy(TABLE | 1, high), None));
    assert_eq!(plain(0x5501), "second-stage levels=3 root=0x12345000");
    assert_eq!(plain(0x5502), "second-stage levels=4 root=0x12345000");
    assert_eq!(plain(0x5503), "second-stage levels=5 root=0x12345000 input-bits=48");
    // with device TLBs, fault processing disabled, ignored bits set
    assert_eq!(settings(ask(&registers(CAP, DT, ROOT), &legacy(TABLE | 0b0111, 0x7a), None)), "second-stage levels=4 root=0x12345000");
    assert_eq!(ask(&registers(CAP, PT, ROOT), &legacy(0b1001, 2), None), Outcome::Bypass);
}

#[test]
fn capabilities_become_settings_only_when_they_are_not_the_default() {
    let second = |cap, ecap| settings(ask(&registers(cap, ecap, ROOT), &legacy(TABLE | 1, 2), None));
    assert_eq!(second(CAP & !(0b10 << 34), SC), "second-stage levels=4 root=0x12345000 page-1g=0 snoop-control=1");
    assert_eq!(second(CAP & !(0b11 << 34), 0), "second-stage levels=4 root=0x12345000 page-2m=0 page-1g=0");
    let guest_bits = |mgaw: u64| second(CAP & !(0x3f << 16) | (mgaw - 1) << 16, 0);
    assert_eq!(guest_bits(39), "second-stage levels=4 root=0x12345000 input-bits=39");
    assert_eq!(guest_bits(52), "second-stage levels=4 root=0x12345000 output-bits=52");
    assert_eq!(guest_bits(57), "second-stage levels=4 root=0x12345000 output-bits=52");
    assert_eq!(guest_bits(1), "second-stage levels=4 root=0x12345000 input-bits=12");
}

#[test]
fn legacy_mode_refuses() {
    let registers = registers(CAP & !(0b100 << 8) & !7 | 2, PT, ROOT);
    let refused = |memory: &Memory| event(ask(&registers, memory, None));
    let good = legacy(TABLE | 1, 1);
    assert_eq!(settings(ask(&registers, &good, None)), "second-stage levels=3 root=0x12345000");
    assert_eq!(event(ask(&registers, &good, Some(1))), "RTA.2");
    let end = |end| Memory { end, ..good.clone() };
    assert_eq!(refused(&end(ROOT)), "LRT.1");
    assert_eq!(refused(&end(CONTEXT)), "LCT.1");
    let root = |low, high| {
        let mut memory = good.clone();
        memory.words.extend([(ROOT_ENTRY, low), (ROOT_ENTRY + 8, high)]);
        refused(&memory)
    };
    assert_eq!(root(CONTEXT, 0), "LRT.2");
    for (low, high) in [(CONTEXT | 3, 0), (CONTEXT | 0x801, 0), (CONTEXT | 1 | 1 << 48, 0), (CONTEXT | 1, 1), (CONTEXT | 1, 1 << 63)] {
        assert_eq!(root(low, high), "LRT.3");
    }
    assert_eq!(refused(&legacy(TABLE, 1)), "LCT.2");
    // reserved: 11:4, beyond the host's address width, 71, 127:88, and domain bits that the unit lacks (ND 2: 8 bits)
    for (low, high) in [(0x10, 1), (0x800, 1), (1 << 48, 1), (1 << 63, 1), (0, 0x81), (0, 1 << 24 | 1), (0, 1 << 63 | 1), (0, 1 << 16 | 1)] {
        assert_eq!(refused(&legacy(TABLE | 1 | low, high)), "LCT.3", "{low:#x} {high:#x}");
    }
    for aw in [0, 2, 4, 5, 6, 7] {
        assert_eq!(refused(&legacy(TABLE | 1, aw)), "LCT.4.1");
    }
    assert_eq!(refused(&legacy(TABLE | 0b0101, 1)), "LCT.4.2");
    assert_eq!(refused(&legacy(TABLE | 0b1101, 1)), "LCT.4.2");
    let without_pass_through = self::registers(CAP, 0, ROOT);
    assert_eq!(event(ask(&without_pass_through, &legacy(TABLE | 0b1001, 1), None)), "LCT.4.2");
}

#[test]
fn scalable_mode_finds_every_kind_of_translation() {
    let ask = |ecap, entry, pasid| {
        ask(&registers(CAP, ecap, ROOT | 1 << 10), &scalable([1 | 1 << 3, 0], u64::from(pasid), entry), (pasid > 0).then_some(pasid))
    };
    for pasid in [0, 77] {
        let first = [1 | FIRST_ONLY | AW_4, 0x55, TABLE];
        assert_eq!(settings(ask(SCALABLE, first, pasid)), "first-stage levels=4 root=0x12345000");
        let second = [1 | SECOND_ONLY | AW_4 | SECOND, 0x55, 0];
        assert_eq!(settings(ask(SCALABLE, second, pasid)), "second-stage levels=4 root=0x56789000 snoop-control=1");
        let nested = [1 | NESTED | AW_3 | SECOND, 0x55, TABLE];
        assert_eq!(
            settings(ask(SCALABLE, nested, pasid)),
            "first-stage levels=4 root=0x12345000 output-bits=39; second-stage levels=3 root=0x56789000 snoop-control=1"
        );
        assert_eq!(ask(SCALABLE, [1 | PASS, 0x55, 0], pasid), Outcome::Bypass);
    }
    let flagged = [1 | FIRST_ONLY, 0, TABLE | 1 << 7 | 1 << 4 | 0b11 << 5 | 1];
    assert_eq!(
        settings(ask(SCALABLE | EAFS | SRS, flagged, 0)),
        "first-stage levels=4 root=0x12345000 write-protect=1 supervisor=1 extended-access=1"
    );
    let dirty = [1 | SECOND_ONLY | AW_4 | SSADE | SECOND, 0, 0];
    assert_eq!(settings(ask(SCALABLE | SSADS, dirty, 0)), "second-stage levels=4 root=0x56789000 snoop-control=1 accessed-dirty=1");
    // what the other stage would have used is ignored
    assert_eq!(settings(ask(SCALABLE & !SSTS, [1 | FIRST_ONLY | AW_4 | SSADE, 0, TABLE], 0)), "first-stage levels=4 root=0x12345000");
    assert_eq!(settings(ask(SCALABLE, [1 | SECOND_ONLY | AW_4 | SECOND, 0, 0b1101], 0)), "second-stage levels=4 root=0x56789000 snoop-control=1");

    let five = registers(CAP & !(0x3f << 16) & !(1 << 56) | 1 << 60 | 56 << 16, SCALABLE, ROOT | 1 << 10);
    let nested = scalable([1, 0], 0, [1 | NESTED | AW_5 | SECOND, 0, TABLE | 0b01 << 2]);
    let expected =
        "first-stage levels=5 root=0x12345000 output-bits=52 page-1g=0; second-stage levels=5 root=0x56789000 output-bits=52 snoop-control=1";
    assert_eq!(settings(self::ask(&five, &nested, None)), expected);

    let io = registers(CAP, SCALABLE | SSIRWS, ROOT | 1 << 10 | 1 << 7);
    let second = scalable([1, 0], 0, [1 | SECOND_ONLY | AW_4 | SECOND, 0, 0]);
    assert_eq!(settings(self::ask(&io, &second, None)), "second-stage levels=4 root=0x56789000 snoop-control=1 io-permissions=1");
}

#[test]
fn the_upper_half_of_a_bus_has_a_context_table_of_its_own() {
    let mut memory = scalable([1, 0], 0, [1 | PASS, 0, 0]);
    memory.words.insert(ROOT_ENTRY + 8, 0x9_0001);
    memory.words.insert(0x9_0000 + 0x39 * 32, DIRECTORY | 1);
    let registers = registers(CAP, SCALABLE, ROOT | 1 << 10);
    let upper = Requester { id: ID | 0x80, pasid: None };
    assert_eq!(IntelVtd::lookup(&registers, upper, &mut memory), Ok(Outcome::Bypass));
    memory.words.remove(&(0x9_0000 + 0x39 * 32));
    assert_eq!(event(IntelVtd::lookup(&registers, upper, &mut memory).unwrap()), "SCT.2");
    assert_eq!(ask(&registers, &memory, None), Outcome::Bypass);
    memory.words.insert(ROOT_ENTRY + 8, 0x9_0000);
    assert_eq!(event(IntelVtd::lookup(&registers, upper, &mut memory).unwrap()), "SRT.2");
    memory.words.insert(ROOT_ENTRY + 8, 0x9_0003);
    assert_eq!(event(ask(&registers, &memory, None)), "SRT.3");
}

#[test]
fn requests_without_pasid_use_rid_pasid_and_rid_priv() {
    let unit = registers(CAP, SCALABLE | SRS | RPRIVS, ROOT | 1 << 10);
    let context = |rid_pasid: u64, rid_priv: u64| [1, rid_priv << 20 | rid_pasid];
    let entry = [1 | FIRST_ONLY, 0, TABLE | 1];
    assert_eq!(settings(ask(&unit, &scalable(context(0x1abc, 0), 0x1abc, entry), None)), "first-stage levels=4 root=0x12345000 supervisor=1");
    assert_eq!(settings(ask(&unit, &scalable(context(0, 1), 0, entry), None)), "first-stage levels=4 root=0x12345000 supervisor=1 privileged=1");
    assert_eq!(event(ask(&unit, &scalable(context(0, 1), 0, [1 | FIRST_ONLY, 0, TABLE]), None)), "SPT.6");
    assert_eq!(event(ask(&unit, &scalable(context(0x2000, 0), 0x2000, entry), None)), "SCT.4.2");
    // a request with PASID has a privilege of its own
    let with_pasid = scalable([1 | 1 << 3, 1 << 20 | 9], 4, entry);
    assert_eq!(settings(ask(&unit, &with_pasid, Some(4))), "first-stage levels=4 root=0x12345000 supervisor=1");
    assert_eq!(event(ask(&unit, &with_pasid, Some(9))), "SCT.9");
    let without = registers(CAP, SCALABLE & !RPS, ROOT | 1 << 10);
    assert_eq!(event(ask(&without, &with_pasid, None)), "SCT.3");
}

#[test]
fn scalable_mode_refuses() {
    let unit = registers(CAP, SCALABLE, ROOT | 1 << 10);
    let good = scalable([1 | 1 << 3, 0], 0, [1 | SECOND_ONLY | AW_4 | SECOND, 0, 0]);
    let refused = |memory: &Memory| event(ask(&unit, memory, None));
    for (end, expected) in [(ROOT, "SRT.1"), (CONTEXT, "SCT.1"), (DIRECTORY, "SPD.1"), (PASIDS, "SPT.1")] {
        assert_eq!(refused(&Memory { end, ..good.clone() }), expected);
    }
    let with = |address, word| {
        let mut memory = good.clone();
        memory.words.insert(address, word);
        refused(&memory)
    };
    assert_eq!(with(ROOT_ENTRY, CONTEXT), "SRT.2");
    assert_eq!(with(ROOT_ENTRY, CONTEXT | 1 | 1 << 11), "SRT.3");
    assert_eq!(with(ROOT_ENTRY, CONTEXT | 1 | 1 << 50), "SRT.3");
    assert_eq!(with(SCALABLE_ENTRY, DIRECTORY), "SCT.2");
    // DTE, PRE, HPTE, EPTR, 8:7 and the address beyond the host's width
    for bit in [2, 4, 5, 6, 7, 8, 48, 63] {
        assert_eq!(with(SCALABLE_ENTRY, DIRECTORY | 1 | 1 << bit), "SCT.3", "bit {bit}");
    }
    for (word, bit) in [(1, 20), (1, 21), (1, 63), (2, 0), (3, 63)] {
        assert_eq!(with(SCALABLE_ENTRY + 8 * word, 1 << bit), "SCT.3", "word {word} bit {bit}");
    }
    assert_eq!(with(DIRECTORY, PASIDS), "SPD.2");
    for bit in [2, 11, 48] {
        assert_eq!(with(DIRECTORY, PASIDS | 1 | 1 << bit), "SPD.3", "bit {bit}");
    }
    assert_eq!(with(PASIDS, 0), "SPT.2");
    let entry = 1 | SECOND_ONLY | AW_4 | SECOND;
    for bit in [5, 10, 11, 48, 63] {
        assert_eq!(with(PASIDS, entry | 1 << bit), "SPT.3", "bit {bit}");
    }
    // PWSNP, CD, EMTE, PAT without the capability; then what is reserved for good
    for (word, bits) in [(1, 16..24), (1, 25..64), (2, 1..2), (2, 8..12), (2, 48..64), (3, 0..64), (4, 0..64), (5, 0..64), (6, 0..64), (7, 0..64)] {
        for bit in bits {
            assert_eq!(with(PASIDS + 8 * word, 1 << bit), "SPT.3", "word {word} bit {bit}");
        }
    }
    assert_eq!(with(PASIDS, entry | SSADE), "SPT.3");
    for aw in [0, 4, 5, 6, 7] {
        assert_eq!(with(PASIDS, 1 | SECOND_ONLY | aw << 2 | SECOND), "SPT.4.1");
    }
    for kind in [0, 5, 6, 7] {
        assert_eq!(with(PASIDS, 1 | kind << 6 | AW_4), "SPT.4.2");
    }
    for (capability, kind) in [(FSTS, FIRST_ONLY), (SSTS, SECOND_ONLY), (NEST, NESTED), (PT, PASS)] {
        let unit = registers(CAP, SCALABLE & !capability, ROOT | 1 << 10);
        assert_eq!(event(ask(&unit, &scalable([1, 0], 0, [1 | kind | AW_4, 0, 0]), None)), "SPT.4.2");
    }
    let first = |word| event(ask(&unit, &scalable([1, 0], 0, [1 | FIRST_ONLY, 0, TABLE | word]), None));
    assert_eq!([first(0b0100), first(0b1000), first(0b1100)], ["SPT.4.3", "SPT.4.3", "SPT.4.3"]);
    assert_eq!([first(1), first(1 << 7)], ["SPT.3", "SPT.3"]);
    let nested = scalable([1, 0], 0, [1 | NESTED | AW_3 | SECOND, 0, 1 << 39]);
    assert_eq!(refused(&nested), "SPT.4.4");
}

#[test]
fn context_entries_must_be_consistent() {
    let all = SCALABLE | DT | 1 << 29 | 1 << 56;
    let event = |bits: u64| event(ask(&registers(CAP, all, ROOT | 1 << 10), &scalable([1 | bits, 0], 0, [1 | PASS, 0, 0]), None));
    assert_eq!(event(1 << 4), "SCT.4.1");
    assert_eq!(event(1 << 6), "SCT.4.3");
    let good = scalable([1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 6, 0], 0, [1 | PASS, 0, 0]);
    assert_eq!(ask(&registers(CAP, all, ROOT | 1 << 10), &good, None), Outcome::Bypass);
}

#[test]
fn pasids_are_limited_by_enable_directory_and_unit() {
    let entry = [1 | FIRST_ONLY, 0, TABLE];
    let event =
        |ecap, context, pasid: u32| event(ask(&registers(CAP, ecap, ROOT | 1 << 10), &scalable([context, 0], u64::from(pasid), entry), Some(pasid)));
    assert_eq!(event(SCALABLE, 1, 5), "SCT.6");
    assert_eq!(event(SCALABLE, 1 | 1 << 3, 1 << 13), "SCT.7");
    assert_eq!(event(SCALABLE, 1 | 1 << 3 | 7 << 9, 1 << 20), "SGN.10");
    assert_eq!(event(SCALABLE & !PSS | 6 << 35, 1 | 1 << 3, 128), "SGN.10");
    let widest = scalable([1 | 1 << 3 | 7 << 9, 0], 0xf_ffff, entry);
    let outcome = ask(&registers(CAP, SCALABLE, ROOT | 1 << 10), &widest, Some(0xf_ffff));
    assert_eq!(settings(outcome), "first-stage levels=4 root=0x12345000");
}

#[test]
fn pasids_lists_what_is_present_except_the_devices_own() {
    let mut memory = scalable([1 | 1 << 3, 3], 3, [1 | PASS, 0, 0]);
    memory.words.extend([(DIRECTORY + 127 * 8, 0xa_0001), (DIRECTORY + 5 * 8, 0xb_0000), (DIRECTORY + 6 * 8, 0xc_0000 | 0x11)]);
    for (address, word) in
        [(PASIDS + 64, 1), (PASIDS + 63 * 64, 1), (0xa_0000, 1), (0xa_0000 + 63 * 64, 0xff), (0xa_0000 + 62 * 64, 2), (0xb_0000, 1), (0xc_0000, 1)]
    {
        memory.words.insert(address, word);
    }
    let list = |ecap| IntelVtd::pasids(&registers(CAP, ecap, ROOT | 1 << 10), ID, &mut memory.clone()).unwrap();
    assert_eq!(list(SCALABLE), [1, 63, 127 * 64, 127 * 64 + 63]);
    assert_eq!(list(SCALABLE & !PSS | 5 << 35), [1, 63]);
    assert_eq!(list(SCALABLE & !PSS), [1]);
    assert_eq!(list(SCALABLE & !PASID), [0; 0]);
    assert_eq!(IntelVtd::pasids(&registers(CAP, SCALABLE, ROOT), ID, &mut memory), Ok(Vec::new()));
}

#[test]
fn pasids_is_bounded_against_a_hostile_directory() {
    // every directory entry points to the same table: full first, then without a single entry
    let mut memory = scalable([1 | 1 << 3 | 7 << 9, 0], 0, [1, 0, 0]);
    memory.words.extend((0..1 << 14).map(|slot| (DIRECTORY + slot * 8, 0x1000_0000 | 1)));
    memory.words.extend((0..64).map(|index| (0x1000_0000 + index * 64, 1)));
    let registers = registers(CAP, SCALABLE, ROOT | 1 << 10);
    let list = IntelVtd::pasids(&registers, ID, &mut memory).unwrap();
    assert_eq!((list.len(), list[0], list[1023]), (1024, 1, 1024));
    memory.words.extend((0..64).map(|index| (0x1000_0000 + index * 64, 0)));
    memory.bytes_read = 0;
    assert_eq!(IntelVtd::pasids(&registers, ID, &mut memory), Ok(Vec::new()));
    assert!(memory.bytes_read < 5 << 20, "{}", memory.bytes_read);
}

fn hw_info(cap: u64, ecap: u64) -> Vec<u8> {
    [1_u64, cap, ecap].iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[test]
fn only_the_first_stage_of_a_nesting_unit_is_offered() {
    let offer = |cap, ecap| {
        let offers = IntelVtd::offers(1, &hw_info(cap, ecap)).unwrap();
        offers
            .into_iter()
            .map(|offer| {
                let limits: Vec<_> = offer.limits.iter().map(|(name, value)| format!("{name}={value}")).collect();
                format!("{} {}", offer.format, limits.join(" "))
            })
            .collect::<Vec<_>>()
    };
    assert_eq!(offer(CAP, SCALABLE & !NEST), [""; 0]);
    assert_eq!(offer(CAP, NEST), [""; 0]);
    let plain = "intel-vtd/first-stage levels=4 output-bits=48 page-1g=1 write-protect=1 supervisor=0 privileged=0 extended-access=0 memory-type=0";
    assert_eq!(offer(CAP, SCALABLE), [plain]);
    let big = "intel-vtd/first-stage levels=5 output-bits=52 page-1g=0 write-protect=1 supervisor=1 privileged=0 extended-access=1 memory-type=0";
    assert_eq!(offer(CAP & !(0x3f << 16) & !(1 << 56) | 1 << 60 | 56 << 16, SCALABLE | SRS | EAFS), [big]);
    assert!(matches!(IntelVtd::offers(2, &hw_info(0, 0)), Err(Error::Unsupported(_))));
    assert!(matches!(IntelVtd::offers(1, &[0; 23]), Err(Error::Invalid(_))));
    assert!(IntelVtd::offers(1, &[0; 64]).unwrap().is_empty());
}

#[test]
fn bind_data_is_the_kernels_structure() {
    let bind = |format: &str, settings: &[(&str, u64)]| IntelVtd::bind_data(&TableConfig::new(format, settings), &PlaceToBind::default());
    let four = bind("intel-vtd/first-stage", &[("levels", 4), ("root", TABLE), ("output-bits", 39)]).unwrap();
    let expected = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x34, 0x12, 0, 0, 0, 0, 48, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!((four.kind, four.data.as_slice(), four.context.len()), (1, expected.as_slice(), 0));
    let all = [("levels", 5), ("root", TABLE), ("supervisor", 1), ("extended-access", 1), ("write-protect", 1)];
    let five = bind("intel-vtd/first-stage", &all).unwrap();
    assert_eq!((five.data[0], five.data[16]), (0b111, 57));
    // addr, npages, flags (1 leaves only) of the page table itself; all ones are all pages
    let recipe = five.invalidation.unwrap();
    assert_eq!((recipe.data_type, recipe.target, five.viommu, five.pasids), (0, InvalidationTarget::PageTable, None, true));
    assert_eq!((recipe.page, recipe.leaf, recipe.everything), (vec![0, 1, 0], vec![0, 0, 1], vec![0, u64::MAX, 0]));
    let count = Extent::Count(Place { word: 1, lsb: 0, width: 52, number_lsb: 0 });
    assert_eq!((recipe.tables, recipe.range), (Some(vec![0; 3]), Some(RangeEntry { words: vec![0; 3], extent: count })));
    assert!(matches!(bind("intel-vtd/second-stage", &[("root", TABLE)]), Err(Error::Unsupported(_))));
    assert!(matches!(bind("intel-vtd/first-stage", &[("levels", 4)]), Err(Error::Invalid(_))));
    assert!(matches!(bind("intel-vtd/first-stage", &[("root", TABLE), ("memory-type", 1)]), Err(Error::Unsupported(_))));
    assert!(matches!(bind("intel-vtd/first-stage", &[("root", TABLE), ("levels", 6)]), Err(Error::Invalid(_))));
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
        assert!(length <= 4096 && address.is_multiple_of(8));
        self.reads += 1;
        let word = |offset: u64| {
            let mut x = (address.wrapping_add(offset) ^ self.seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            x ^= x >> 29;
            x = x.wrapping_mul(0xbf58_476d_1ce4_e5b9);
            (x ^ x >> 32 | self.set) & !self.clear
        };
        Ok((0..u64::from(length)).step_by(8).flat_map(|offset| word(offset).to_le_bytes()).collect())
    }

    fn read_through(&mut self, _: &TableConfig, address: u64, _: u32) -> Result<Vec<u8>, Error> {
        Err(Error::Unreadable(address))
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn hostile_registers_and_memory_never_panic_and_are_bounded(
        cap: u64, ecap: u64, rtaddr: u64, id in 0_u64..0x1_0000, pasid in proptest::option::of(0_u32..0x20_0000), seed: u64,
        tame: bool, far: bool,
    ) {
        let rtaddr = if far { rtaddr & !0xc00 | 0x400 } else { rtaddr };
        let ecap = if far { u64::MAX } else { ecap };
        // tame memory has few reserved bits set, so that later structures are reached
        let clear = if tame { !0xff_ffff_f0df } else { 0 };
        let mut memory = Hostile { seed, set: u64::from(tame), clear, reads: 0 };
        let outcome = IntelVtd::lookup(&registers(cap, ecap, rtaddr), Requester { id, pasid }, &mut memory).unwrap();
        prop_assert!(memory.reads <= 4);
        if let Outcome::Tables(Translated { tables, .. }) = outcome {
            for table in tables {
                use stagecraft_plugin_intel_vtd::{first_stage::FirstStage, second_stage::SecondStage};
                use stagecraft_sdk::Format;
                // what lookup answers can be opened
                match table.format.as_str() {
                    FirstStage::NAME => { FirstStage::open(&table.settings).unwrap(); }
                    SecondStage::NAME => { SecondStage::open(&table.settings).unwrap(); }
                    other => panic!("{other}"),
                }
            }
        }
        memory.reads = 0;
        let list = IntelVtd::pasids(&registers(cap, ecap, rtaddr), id, &mut memory).unwrap();
        prop_assert!(list.len() <= 1024 && list.is_sorted() && memory.reads <= 2 + 32 + 1024);
    }
}

#[test]
fn address_spaces_are_named_by_domain_and_pasid() {
    let tag = |outcome: Outcome| match outcome {
        Outcome::Tables(Translated { tag: Tag { domain, space }, .. }) => (domain, space),
        other => panic!("{other:?}"),
    };
    assert_eq!(tag(ask(&registers(CAP, DT, ROOT), &legacy(TABLE | 1, 0x12_3402), None)), (Some(0x1234), None));
    for kind in [FIRST_ONLY | AW_4, SECOND_ONLY | AW_4, NESTED | AW_4] {
        let memory = scalable([1 | 1 << 3, 77], 77, [1 | kind | SECOND, 0x4321, TABLE]);
        assert_eq!(tag(ask(&registers(CAP, SCALABLE, ROOT | 1 << 10), &memory, None)), (Some(0x4321), Some(77)), "RID_PASID");
        let memory = scalable([1 | 1 << 3, 0], 88, [1 | kind | SECOND, 0x4321, TABLE]);
        assert_eq!(tag(ask(&registers(CAP, SCALABLE, ROOT | 1 << 10), &memory, Some(88))), (Some(0x4321), Some(88)));
    }
}

#[test]
fn devices_that_nobody_set_up_are_unused() {
    let kind = |outcome: Outcome| match outcome {
        Outcome::Blocked(blocked) => blocked.kind,
        other => panic!("{other:?}"),
    };
    let legacy = |memory: &Memory| kind(ask(&registers(CAP, 0, ROOT), memory, None));
    assert_eq!(legacy(&Memory::new(&[(ROOT_ENTRY, 0)])), BlockKind::Unused);
    assert_eq!(legacy(&self::legacy(0, 0)), BlockKind::Unused);
    assert_eq!(legacy(&self::legacy(TABLE | 1, 0)), BlockKind::Refused);
    let scalable = |entry| kind(ask(&registers(CAP, SCALABLE, ROOT | 1 << 10), &self::scalable([1, 0], 0, entry), None));
    assert_eq!(scalable([0, 0, 0]), BlockKind::Unused);
    assert_eq!(scalable([1, 0, 0]), BlockKind::Refused);
    let off = registers(CAP, ADMS, ROOT | 0b11 << 10);
    assert_eq!(kind(ask(&off, &Memory::new(&[]), None)), BlockKind::Unused);
}

#[test]
fn reserved_bits_of_a_stage_that_is_not_used_are_noted() {
    let warnings = |ecap: u64, entry: [u64; 3]| {
        let mut memory = notes::Noting::new(scalable([1, 0], 0, entry));
        let outcome = IntelVtd::lookup(&registers(CAP, ecap, ROOT | 1 << 10), Requester { id: ID, pasid: None }, &mut memory).unwrap();
        assert!(matches!(outcome, Outcome::Tables(_) | Outcome::Bypass), "{outcome:?}");
        memory.warnings()
    };
    let first = [TABLE | FIRST_ONLY | AW_4 | 1, 0, TABLE];
    let second = [TABLE | SECOND_ONLY | AW_4 | 1, 0, 0];
    assert_eq!(warnings(SCALABLE, first), [], "AW is filled in by Linux");
    assert_eq!(warnings(SCALABLE, second), []);
    assert_eq!(warnings(SCALABLE, [first[0] | SSADE, 0, TABLE]), [(PASIDS, 0, SSADE)]);
    assert_eq!(warnings(SCALABLE | SSADS, [first[0] | SSADE, 0, TABLE]), []);
    let (sre, fspm, eafe) = (1, 1 << 2, 1 << 7);
    assert_eq!(warnings(SCALABLE, [second[0], 0, sre | fspm | eafe]), [(PASIDS, 2, sre | eafe), (PASIDS, 2, fspm)]);
    assert_eq!(warnings(SCALABLE | SRS | EAFS, [second[0], 0, sre | eafe]), []);
    assert_eq!(warnings(SCALABLE, [first[0], 0, TABLE | 3 << 5]), [(PASIDS, 2, 3 << 5)]);
    assert_eq!(warnings(SCALABLE, [PASS | AW_4 | 1, 0, 0]), []);
    // PGSNP: Linux 5.13 to 5.17 sets it whatever the unit can do, as it does with SNP in the leaves.
    assert_eq!(warnings(SCALABLE, [first[0], 1 << 24, TABLE]), [(PASIDS, 1, 1 << 24)]);
    assert_eq!(warnings(SCALABLE | SC, [first[0], 1 << 24, TABLE]), []);
}

/// FPD keeps the faults of a structure, and of what is behind it, from being recorded; but not those of structures that cannot be read.
#[test]
fn faults_are_recorded_unless_a_structure_forbids_it() {
    let event = |name: Option<&str>, pasid, privileged| Event {
        fault: FaultKind::Permission,
        name: name.map(str::to_owned),
        format: name.is_none().then(|| "intel-vtd/second-stage".to_owned()),
        entries: vec![1],
        pasid,
        privileged,
        ..event::unmapped("intel-vtd/second-stage", ID, 0x1000)
    };
    let told = |ecap, memory: &Memory, event: Event| {
        IntelVtd::review_event(&registers(CAP, ecap, ROOT | 1 << 10), event, &mut memory.clone()).unwrap().map(|event| event.name)
    };
    let entry = 1 | SECOND_ONLY | AW_4 | SECOND;
    let quiet = scalable([1 | 1 << 1 | 1 << 3, 0], 77, [entry, 0, 0]);
    for (name, recorded) in [("SRT.1", true), ("SCT.1", true), ("SPD.1", true), ("SPT.1", true), ("SCT.3", false), ("SPD.2", false), ("SPT.2", false)]
    {
        assert_eq!(told(SCALABLE, &quiet, event(Some(name), Some(77), false)).is_some(), recorded, "{name}");
    }
    // SPT.6: SRE counts with any translation type.
    let loud = |kind: u64, sre: u64| scalable([1 | 1 << 3, 0], 77, [1 | kind | AW_4 | SECOND, 0, TABLE | sre]);
    for kind in [FIRST_ONLY, SECOND_ONLY, NESTED] {
        assert_eq!(told(SCALABLE | SRS, &loud(kind, 0), event(None, Some(77), true)), Some(Some("SPT.6".to_owned())));
        assert_eq!(told(SCALABLE | SRS, &loud(kind, 1), event(None, Some(77), true)), Some(None));
        assert_eq!(told(SCALABLE | SRS, &loud(kind, 0), event(None, Some(77), false)), Some(None));
    }
    // A request that passes, to an address that nobody has: SGN.4, unless the structures are quiet.
    let passing = |pasid| Event { fault: FaultKind::AddressSize, format: None, iova: 1 << 48, entries: Vec::new(), ..event(None, pasid, false) };
    let pass = |fpd: u64| scalable([1 | fpd << 1 | 1 << 3, 0], 77, [1 | PASS | AW_4, 0, 0]);
    assert_eq!(told(SCALABLE, &pass(0), passing(Some(77))), Some(Some("SGN.4".to_owned())));
    assert_eq!(told(SCALABLE, &pass(1), passing(Some(77))), None);
    assert_eq!(told(SCALABLE, &pass(0), Event { iova: (1 << 48) - 1, ..passing(Some(77)) }), None, "it has an address");
    // A PASID whose directory entry is beyond the last address.
    let mut far = scalable([1 | 1 << 3 | 7 << 9, 0], 77, [entry, 0, 0]);
    far.words.insert(SCALABLE_ENTRY, !0xfff | 1 | 1 << 3 | 7 << 9);
    assert_eq!(told(SCALABLE, &far, event(Some("SPD.1"), Some(0xf_ffff), false)), Some(Some("SPD.1".to_owned())));
}

#[test]
fn interrupts_are_intercepted_for_requests_without_pasid() {
    let caught = |outcome| match outcome {
        Outcome::Tables(Translated { intercepts, .. }) => intercepts,
        other => panic!("no tables: {other:?}"),
    };
    let (server, section) = ("interrupt controller".to_owned(), "D51397 section 3.15".to_owned());
    let interrupts = Intercept { passed: 0, mask: 0xffff_ffff_fff0_0000, value: 0xfee0_0000, server, address: None, section };
    assert_eq!(caught(ask(&registers(CAP, 0, ROOT), &legacy(TABLE | 1, 2), None)), std::slice::from_ref(&interrupts));
    let scalable_mode = registers(CAP, SCALABLE, ROOT | 1 << 10);
    for entry in [[FIRST_ONLY | 1, 0, TABLE], [SECOND_ONLY | AW_4 | SECOND | 1, 0, 0], [NESTED | AW_4 | SECOND | 1, 0, TABLE]] {
        let context = [1 | 1 << 3, 7];
        assert_eq!(caught(ask(&scalable_mode, &scalable(context, 7, entry), None)), std::slice::from_ref(&interrupts));
        assert_eq!(caught(ask(&scalable_mode, &scalable(context, 9, entry), Some(9))), []);
    }
    for geometry in [FirstStage::open(&Default::default()).unwrap().geometry(), SecondStage::open(&Default::default()).unwrap().geometry()] {
        assert_eq!(geometry.untranslated, [(0xfee0_0000, 0xfeef_ffff)]);
    }
}
