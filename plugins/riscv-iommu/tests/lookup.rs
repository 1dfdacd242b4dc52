//! Registers and device structures: every way to a table, and every way to be refused.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

#[path = "../../../sdk/testing/notes.rs"]
mod notes;

use std::collections::BTreeMap;

use common::line;
use proptest::prelude::*;
use stagecraft_plugin_riscv_iommu::unit::RiscvIommu;
use stagecraft_sdk::{
    BlockKind, Direct, Error, GuestMemory, Intercept, Outcome, Place, PlaceToBind, Registers, Requester, TableConfig, Tag, Translated, Unit,
};

/// 64-bit words by address, in the byte order given; what was never written reads as zero below `end`, and nothing can be read from there on. Behind a
/// second stage, guest-physical addresses are found `BEHIND` further up.
#[derive(Clone)]
struct Memory {
    words: BTreeMap<u64, u64>,
    end: u64,
    bytes_read: u64,
    through: Option<TableConfig>,
}

const BEHIND: u64 = 1 << 39;

impl Memory {
    fn new(words: &[(u64, u64)]) -> Self {
        Self { words: words.iter().copied().collect(), end: 1 << 40, bytes_read: 0, through: None }
    }

    fn with(&self, words: &[(u64, u64)]) -> Self {
        let mut memory = self.clone();
        memory.words.extend(words.iter().copied());
        memory
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
        assert_eq!(table.format, "riscv-iommu/second-stage");
        self.through = Some(table.clone());
        self.read(address + BEHIND, length)
    }
}

const DIRECTORY: u64 = 0x8000_1000;
const MIDDLE: u64 = 0x8000_2000;
const CONTEXTS: u64 = 0x8000_3000;
const PROCESSES: u64 = 0x8000_4000;
const PROCESS_MIDDLE: u64 = 0x8000_5000;
const PROCESS_LEAF: u64 = 0x8000_6000;
const TABLE: u64 = 0x1234_5000;
const SECOND: u64 = 0x5678_8000;

// capabilities
const SV32: u64 = 1 << 8;
const SV39: u64 = 1 << 9;
const SV48: u64 = 1 << 10;
const SV57: u64 = 1 << 11;
const SVRSW60T59B: u64 = 1 << 14;
const SVPBMT: u64 = 1 << 15;
const SV32X4: u64 = 1 << 16;
const SV39X4: u64 = 1 << 17;
const SV48X4: u64 = 1 << 18;
const SV57X4: u64 = 1 << 19;
const MSI_FLAT: u64 = 1 << 22;
const AMO_HWAD: u64 = 1 << 24;
const ATS: u64 = 1 << 25;
const CAN_T2GPA: u64 = 1 << 26;
const END: u64 = 1 << 27;
const PD8_17_20: u64 = 7 << 38;
const QOSID: u64 = 1 << 41;
const PAS_56: u64 = 56 << 32;
const STAGES: u64 = SV32 | SV39 | SV48 | SV57 | SV32X4 | SV39X4 | SV48X4 | SV57X4;
const CAP: u64 = 0x10 | STAGES | PD8_17_20 | PAS_56;

// ddtp modes
const ONE_LEVEL: u64 = 2;
const TWO_LEVELS: u64 = 3;
const THREE_LEVELS: u64 = 4;

// translation control
const V: u64 = 1;
const EN_ATS: u64 = 1 << 1;
const EN_PRI: u64 = 1 << 2;
const T2GPA: u64 = 1 << 3;
const DTF: u64 = 1 << 4;
const PDTV: u64 = 1 << 5;
const PRPR: u64 = 1 << 6;
const GADE: u64 = 1 << 7;
const SADE: u64 = 1 << 8;
const DPE: u64 = 1 << 9;
const SBE: u64 = 1 << 10;
const SXL: u64 = 1 << 11;

const ENS: u64 = 1 << 1;
const SUM: u64 = 1 << 2;

/// Mode and page number of a stage or a process directory.
const fn atp(mode: u64, address: u64) -> u64 {
    mode << 60 | address >> 12
}

const fn pointer(address: u64) -> u64 {
    address >> 2 | V
}

const SV39_TABLE: u64 = atp(8, TABLE);

fn registers(capabilities: u64, fctl: u64, mode: u64) -> Registers {
    let registers = [("CAPABILITIES", capabilities), ("FCTL", fctl), ("DDTP", DIRECTORY >> 2 | mode)];
    registers.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// A device directory of one level, base format: the words of the context of device 5.
fn base(context: [u64; 4]) -> Memory {
    let mut memory = Memory::new(&[]);
    memory.words.extend((DIRECTORY + 5 * 32..).step_by(8).zip(context));
    memory
}

/// The same in the extended format.
fn extended(context: [u64; 8]) -> Memory {
    let mut memory = Memory::new(&[]);
    memory.words.extend((DIRECTORY + 5 * 64..).step_by(8).zip(context));
    memory
}

fn ask(registers: &Registers, memory: &mut Memory, id: u64, pasid: Option<u32>) -> Outcome {
    RiscvIommu::lookup(registers, Requester { id, pasid }, memory).unwrap()
}

/// What device 5 of a unit with these capabilities gets.
fn plain(capabilities: u64, memory: &Memory) -> Outcome {
    ask(&registers(capabilities, 0, ONE_LEVEL), &mut memory.clone(), 5, None)
}

/// Number of the cause, which must go with its name.
fn cause(outcome: Outcome) -> u16 {
    let Outcome::Blocked(blocked) = outcome else { panic!("not blocked: {outcome:?}") };
    assert!(!blocked.reason.ends_with('.'));
    let names = [
        (21, "Read guest-page fault"),
        (256, "All inbound transactions disallowed"),
        (257, "DDT entry load access fault"),
        (258, "DDT entry not valid"),
        (259, "DDT entry misconfigured"),
        (260, "Transaction type disallowed"),
        (265, "PDT entry load access fault"),
        (266, "PDT entry not valid"),
        (267, "PDT entry misconfigured"),
    ];
    let number = blocked.section.strip_prefix("RISC-V IOMMU 1.0 section 3.2, cause ").unwrap().parse().unwrap();
    assert!(names.contains(&(number, &blocked.event)));
    number
}

fn tables(outcome: Outcome) -> String {
    let Outcome::Tables(Translated { tables, .. }) = outcome else { panic!("no tables: {outcome:?}") };
    let one = |table: TableConfig| format!("{} {}", table.format.trim_start_matches("riscv-iommu/"), line(&table.settings));
    tables.into_iter().map(one).collect::<Vec<_>>().join("; ")
}

#[test]
fn off_blocks_and_bare_bypasses() {
    let memory = Memory { end: 0, ..Memory::new(&[]) };
    let mode = |mode| ask(&registers(0, 0, mode), &mut memory.clone(), 0xff_ffff, Some(1));
    assert_eq!(cause(mode(0)), 256);
    assert_eq!(mode(1), Outcome::Bypass);
    for mode in [0, 1] {
        assert_eq!(RiscvIommu::pasids(&registers(0, 0, mode), 5, &mut memory.clone()), Ok(Vec::new()));
    }
}

#[test]
fn registers_and_ids_must_make_sense() {
    let invalid = |registers: &Registers, id| match RiscvIommu::lookup(registers, Requester { id, pasid: None }, &mut Memory::new(&[])) {
        Err(Error::Invalid(invalid)) => invalid.field,
        other => panic!("{other:?}"),
    };
    for missing in ["CAPABILITIES", "FCTL", "DDTP"] {
        let given = ["CAPABILITIES", "FCTL", "DDTP"].into_iter().filter(|name| *name != missing).map(|name| (name.to_owned(), 0)).collect();
        assert_eq!(invalid(&given, 0), missing);
    }
    for mode in 5..16 {
        assert_eq!(invalid(&registers(CAP, 0, mode), 0), "DDTP");
    }
    assert_eq!(invalid(&registers(CAP & !PAS_56 | 31 << 32, 0, ONE_LEVEL), 0), "CAPABILITIES");
    assert_eq!(invalid(&registers(CAP, 0, THREE_LEVELS), 1 << 24), "id");
}

#[test]
fn device_ids_are_split_by_format_and_levels() {
    let context = [V, 0, 0, SV39_TABLE, 0, 0, 0, 0];
    // capabilities, size of a context, bits of the last index
    for (capabilities, bytes, bits) in [(CAP, 32, 7), (CAP | MSI_FLAT, 64, 6)] {
        let found = |mode, id, words: &[(u64, u64)]| {
            let table = [(ONE_LEVEL, DIRECTORY), (TWO_LEVELS, CONTEXTS), (THREE_LEVELS, CONTEXTS)].iter().find(|(m, _)| *m == mode).unwrap().1;
            let mut memory = Memory::new(words);
            memory.words.extend((table + (id & ((1 << bits) - 1)) * bytes..).step_by(8).zip(context));
            ask(&registers(capabilities, 0, mode), &mut memory, id, None)
        };
        let expected = "first-stage levels=3 root=0x12345000 svnapot=1";
        let last = (1 << bits) - 1;
        assert_eq!(tables(found(ONE_LEVEL, last, &[])), expected);
        assert_eq!(cause(found(ONE_LEVEL, last + 1, &[])), 260);
        let id = 0x1a5 << bits | 3;
        assert_eq!(tables(found(TWO_LEVELS, id, &[(DIRECTORY + 0x1a5 * 8, pointer(CONTEXTS))])), expected);
        assert_eq!(cause(found(TWO_LEVELS, 1 << (bits + 9), &[])), 260);
        let id = 0x7e << (bits + 9) | 0x1ff << bits | last;
        let words = [(DIRECTORY + 0x7e * 8, pointer(MIDDLE)), (MIDDLE + 0x1ff * 8, pointer(CONTEXTS))];
        assert_eq!(tables(found(THREE_LEVELS, id, &words)), expected);
    }
    // the extended format has one bit more in the first index
    let words =
        [(DIRECTORY + 0x1ff * 8, pointer(MIDDLE)), (MIDDLE + 0x1ff * 8, pointer(CONTEXTS)), (CONTEXTS + 63 * 64, V), (CONTEXTS + 127 * 32, V)];
    assert_eq!(ask(&registers(CAP | MSI_FLAT, 0, THREE_LEVELS), &mut Memory::new(&words), 0xff_ffff, None), Outcome::Bypass);
    let words = [(DIRECTORY + 0xff * 8, pointer(MIDDLE)), (MIDDLE + 0x1ff * 8, pointer(CONTEXTS)), (CONTEXTS + 127 * 32, V)];
    assert_eq!(ask(&registers(CAP, 0, THREE_LEVELS), &mut Memory::new(&words), 0xff_ffff, None), Outcome::Bypass);
}

#[test]
fn the_device_directory_refuses() {
    let good = Memory::new(&[(DIRECTORY, pointer(MIDDLE)), (MIDDLE, pointer(CONTEXTS)), (CONTEXTS, V)]);
    let refused = |memory: &Memory| cause(ask(&registers(CAP, 0, THREE_LEVELS), &mut memory.clone(), 0, None));
    for end in [DIRECTORY, MIDDLE, CONTEXTS] {
        assert_eq!(refused(&Memory { end, ..good.clone() }), 257);
    }
    for (address, value) in [(DIRECTORY, pointer(MIDDLE)), (MIDDLE, pointer(CONTEXTS)), (CONTEXTS, V)] {
        assert_eq!(refused(&good.with(&[(address, value & !V)])), 258);
    }
    for bit in (1..10).chain(54..64) {
        assert_eq!(refused(&good.with(&[(DIRECTORY, pointer(MIDDLE) | 1 << bit)])), 259, "bit {bit}");
        assert_eq!(refused(&good.with(&[(MIDDLE, pointer(CONTEXTS) | 1 << bit)])), 259, "bit {bit}");
    }
}

#[test]
fn stages_come_alone_and_together() {
    let of = |iohgatp, fsc| plain(CAP, &base([V | DTF | 0xff00_0000, iohgatp, 0x5_5000, fsc]));
    assert_eq!(of(0xfff << 44 | 77, 99), Outcome::Bypass);
    assert_eq!(tables(of(0, atp(8, TABLE))), "first-stage levels=3 root=0x12345000 svnapot=1");
    assert_eq!(tables(of(0, atp(9, TABLE))), "first-stage levels=4 root=0x12345000 svnapot=1");
    assert_eq!(tables(of(0, atp(10, TABLE))), "first-stage levels=5 root=0x12345000 svnapot=1");
    assert_eq!(tables(of(atp(8, SECOND) | 0xffff << 44, 0)), "second-stage levels=3 root=0x56788000 svnapot=1");
    assert_eq!(tables(of(atp(9, SECOND), 0)), "second-stage levels=4 root=0x56788000 svnapot=1");
    assert_eq!(tables(of(atp(10, SECOND), 0)), "second-stage levels=5 root=0x56788000 svnapot=1");
    let both = "first-stage levels=3 root=0x12345000 svnapot=1; second-stage levels=4 root=0x56788000 svnapot=1";
    assert_eq!(tables(of(atp(9, SECOND), atp(8, TABLE))), both);
}

#[test]
fn capabilities_become_settings_only_when_they_are_not_the_default() {
    let both = |capabilities, tc| tables(plain(capabilities, &base([V | tc, atp(8, SECOND), 0, SV39_TABLE])));
    assert_eq!(
        both(CAP & !PAS_56 | 44 << 32, 0),
        "first-stage levels=3 root=0x12345000 svnapot=1; second-stage levels=3 root=0x56788000 output-bits=44 svnapot=1"
    );
    assert_eq!(
        both(CAP | SVPBMT | SVRSW60T59B, 0),
        "first-stage levels=3 root=0x12345000 svnapot=1 svpbmt=1 svrsw60t59b=1; second-stage levels=3 root=0x56788000 svnapot=1 svpbmt=1 svrsw60t59b=1"
    );
    assert_eq!(
        both(CAP | AMO_HWAD, SADE),
        "first-stage levels=3 root=0x12345000 svnapot=1 hardware-update=1; second-stage levels=3 root=0x56788000 svnapot=1"
    );
    assert_eq!(
        both(CAP | AMO_HWAD, GADE),
        "first-stage levels=3 root=0x12345000 svnapot=1; second-stage levels=3 root=0x56788000 svnapot=1 hardware-update=1"
    );
    let alone = |pas: u64| tables(plain(CAP & !PAS_56 | pas << 32, &base([V, 0, 0, SV39_TABLE])));
    assert_eq!(alone(32), "first-stage levels=3 root=0x12345000 output-bits=32 svnapot=1");
    assert_eq!(alone(63), "first-stage levels=3 root=0x12345000 svnapot=1");
}

#[test]
fn byte_orders() {
    let swapped = |memory: &Memory| {
        let mut memory = memory.clone();
        memory.words.values_mut().for_each(|word| *word = word.swap_bytes());
        memory
    };
    let both = |tc| base([V | tc, atp(8, SECOND), 0, SV39_TABLE]);
    let of = |capabilities, fctl, memory: &Memory| ask(&registers(capabilities, fctl, ONE_LEVEL), &mut memory.clone(), 5, None);
    let big_second = "second-stage levels=3 root=0x56788000 svnapot=1 big-endian=1";
    let big_first = "first-stage levels=3 root=0x12345000 svnapot=1 big-endian=1";
    assert_eq!(tables(of(CAP, 1, &swapped(&both(SBE)))), format!("{big_first}; {big_second}"));
    assert_eq!(cause(of(CAP, 1, &swapped(&both(0)))), 259);
    assert_eq!(cause(of(CAP, 0, &both(SBE))), 259);
    assert_eq!(tables(of(CAP | END, 1, &swapped(&both(0)))), format!("first-stage levels=3 root=0x12345000 svnapot=1; {big_second}"));
    assert_eq!(tables(of(CAP | END, 0, &both(SBE))), format!("{big_first}; second-stage levels=3 root=0x56788000 svnapot=1"));

    // the process directory has the order of the first stage
    let device = base([V | PDTV | SBE, 0, 0, atp(2, PROCESSES)]);
    let processes =
        [(PROCESSES + 3 * 8, pointer(PROCESS_LEAF).swap_bytes()), (PROCESS_LEAF, V.swap_bytes()), (PROCESS_LEAF + 8, SV39_TABLE.swap_bytes())];
    let mut memory = device.with(&processes);
    assert_eq!(tables(ask(&registers(CAP | END, 0, ONE_LEVEL), &mut memory, 5, Some(0x300))), big_first);
    assert_eq!(RiscvIommu::pasids(&registers(CAP | END, 0, ONE_LEVEL), 5, &mut memory), Ok(vec![0x300]));
}

#[test]
fn formats_of_32_bit_software() {
    let of = |gxl: u64, tc, iohgatp, fsc| ask(&registers(CAP | SVPBMT, gxl << 2, ONE_LEVEL), &mut base([V | tc, iohgatp, 0, fsc]), 5, None);
    assert_eq!(tables(of(0, SXL, 0, atp(8, TABLE))), "first-stage levels=2 root=0x12345000");
    assert_eq!(
        tables(of(0, SXL, atp(9, SECOND), atp(8, TABLE))),
        "first-stage levels=2 root=0x12345000; second-stage levels=4 root=0x56788000 svnapot=1 svpbmt=1 input-bits=34"
    );
    assert_eq!(tables(of(1, SXL, atp(8, SECOND), 0)), "second-stage levels=2 root=0x56788000");
    assert_eq!(cause(of(1, 0, 0, 0)), 259);
    for mode in (1..16).filter(|mode| *mode != 8) {
        assert_eq!(cause(of(0, SXL, 0, atp(mode, TABLE))), 259, "{mode}");
        assert_eq!(cause(of(1, SXL, atp(mode, SECOND), 0)), 259, "{mode}");
    }
}

#[test]
fn a_misconfigured_device_context_is_refused() {
    let refused = |capabilities, context| match plain(capabilities, &base(context)) {
        Outcome::Blocked(blocked) => cause(Outcome::Blocked(blocked)) == 259,
        _ => false,
    };
    let good = [V, atp(8, SECOND), 0, SV39_TABLE];
    assert!(!refused(CAP, good));
    let with = |word: usize, bits: u64| {
        let mut context = good;
        context[word] |= bits;
        context
    };
    for bit in 12..64 {
        assert_eq!(refused(CAP, with(0, 1 << bit)), !(24..32).contains(&bit), "tc bit {bit}");
    }
    for bit in 0..64 {
        let space = (12..32).contains(&bit);
        assert_eq!(refused(CAP, with(2, 1 << bit)), !space, "ta bit {bit}");
        assert_eq!(refused(CAP | QOSID, with(2, 1 << bit)), !space && bit < 40, "ta bit {bit}");
    }
    for bit in 44..60 {
        assert!(refused(CAP, with(3, 1 << bit)), "fsc bit {bit}");
        assert!(!refused(CAP, with(1, 1 << bit)), "GSCID bit {bit}");
    }
    let services = ATS | CAN_T2GPA;
    for (bits, needs_services) in [
        (EN_ATS, true),
        (EN_ATS | EN_PRI, true),
        (EN_ATS | EN_PRI | PRPR, true),
        (EN_ATS | T2GPA, true),
        (EN_ATS | EN_PRI | PRPR | T2GPA, true),
        (DTF, false),
    ] {
        assert!(!refused(CAP | services, with(0, bits)), "{bits:#x}");
        assert_eq!(refused(CAP, with(0, bits)), needs_services, "{bits:#x}");
    }
    for bits in [EN_PRI, PRPR, T2GPA, EN_ATS | PRPR, EN_PRI | PRPR, DPE] {
        assert!(refused(CAP | services, with(0, bits)), "{bits:#x}");
    }
    assert!(refused(CAP | ATS, with(0, EN_ATS | T2GPA)));
    assert!(refused(CAP | services, [V | EN_ATS | T2GPA, 0, 0, SV39_TABLE]));
    for bits in [SADE, GADE] {
        assert!(refused(CAP, with(0, bits)) && !refused(CAP | AMO_HWAD, with(0, bits)));
    }
}

#[test]
fn modes_and_addresses_must_be_the_units() {
    let of = |capabilities, iohgatp, fsc| plain(capabilities, &base([V, iohgatp, 0, fsc]));
    for mode in (1..16).filter(|mode| !(8..=10).contains(mode)) {
        assert_eq!(cause(of(CAP, atp(mode, SECOND), 0)), 259, "{mode}");
        assert_eq!(cause(of(CAP, 0, atp(mode, TABLE))), 259, "{mode}");
    }
    for (mode, first, second) in [(8, SV39, SV39X4), (9, SV48, SV48X4), (10, SV57, SV57X4)] {
        assert_eq!(cause(of(CAP & !first, 0, atp(mode, TABLE))), 259, "{mode}");
        assert_eq!(cause(of(CAP & !second, atp(mode, SECOND), 0)), 259, "{mode}");
        assert!(matches!(of(CAP & !STAGES | first, 0, atp(mode, TABLE)), Outcome::Tables(_)));
        assert!(matches!(of(CAP & !STAGES | second, atp(mode, SECOND), 0), Outcome::Tables(_)));
    }
    for low in 1..4 {
        assert_eq!(cause(of(CAP, atp(8, SECOND + (low << 12)), 0)), 259);
    }
    let narrow = CAP & !PAS_56 | 40 << 32;
    assert_eq!(cause(of(narrow, 0, atp(8, 1 << 40))), 259);
    assert_eq!(cause(of(narrow, atp(8, 1 << 40), 0)), 259);
    // behind a second stage it is a guest-physical address
    assert_eq!(
        tables(of(narrow, atp(8, SECOND), atp(8, 1 << 40))),
        "first-stage levels=3 root=0x10000000000 svnapot=1; second-stage levels=3 root=0x56788000 output-bits=40 svnapot=1"
    );
}

#[test]
fn msi_page_tables_are_told() {
    let of = |context| RiscvIommu::lookup(&registers(CAP | MSI_FLAT, 0, ONE_LEVEL), Requester { id: 5, pasid: None }, &mut extended(context));
    let msi = [atp(1, 0x9999_9000), 0xff, 0x2_8000, 0];
    let with = |head: [u64; 4], msi: [u64; 4]| std::array::from_fn(|index| if index < 4 { head[index] } else { msi[index - 4] });
    let first = "first-stage levels=3 root=0x12345000 svnapot=1";
    let second = "second-stage levels=3 root=0x56788000 svnapot=1";
    let caught = |outcome: Outcome| match outcome {
        Outcome::Tables(Translated { intercepts, .. }) | Outcome::Direct(Direct { intercepts, .. }) => intercepts,
        other => panic!("{other:?}"),
    };
    // Which pages: all page number bits but the low eight, from the pattern.
    let intercept = |passed| {
        let address = Some(0x9999_9000);
        let (server, section) = ("MSI page table".to_owned(), "RISC-V IOMMU 1.0 section 2.1.3.6".to_owned());
        vec![Intercept { passed, mask: !0xf_ffff, value: 0x2800_0000, server, address, section }]
    };
    for (head, passed, said) in [
        ([V, atp(8, SECOND), 0, SV39_TABLE], 1, format!("{first}; {second}")),
        ([V, 0, 0, SV39_TABLE], 1, first.to_owned()),
        ([V, atp(8, SECOND), 0, 0], 0, second.to_owned()),
    ] {
        let outcome = of(with(head, msi)).unwrap();
        assert_eq!(caught(outcome.clone()), intercept(passed));
        assert_eq!(tables(outcome), said);
    }
    let outcome = of(with([V, 0, 0, 0], msi)).unwrap();
    assert!(matches!(&outcome, Outcome::Direct(Direct { windows, .. }) if windows.len() == 1 && windows[0].last == u64::MAX));
    assert_eq!(caught(outcome), intercept(0));
    // Pattern bits under the mask play no part.
    let low = of(with([V, 0, 0, SV39_TABLE], [atp(1, 0), 0xff, 0x2_80ff, 0])).unwrap();
    assert_eq!(caught(low)[0].value, 0x2800_0000);
    assert_eq!(caught(of(with([V, 0, 0, SV39_TABLE], [0x999, 0xff, 0x2_8000, 0])).unwrap()), []);
    // off: mask and pattern mean nothing
    assert_eq!(tables(of(with([V, 0, 0, SV39_TABLE], [0x999, 0xff, 0x2_8000, 0])).unwrap()), first);
    let mut wrong = vec![[atp(2, 0), 0, 0, 0], [atp(15, 0), 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1 << 63]];
    wrong.extend((44..60).map(|bit| [1 << bit, 0, 0, 0]));
    wrong.extend((52..64).flat_map(|bit| [[0, 1 << bit, 0, 0], [0, 0, 1 << bit, 0]]));
    for msi in wrong {
        assert_eq!(cause(of(with([V, 0, 0, SV39_TABLE], msi)).unwrap()), 259, "{msi:x?}");
    }
}

/// A process directory of so many levels with the context of process `id`.
fn processes(levels: u64, id: u64, context: [u64; 2]) -> Vec<(u64, u64)> {
    let leaf = if levels == 1 { PROCESSES } else { PROCESS_LEAF };
    let mut words = vec![(leaf + (id & 0xff) * 16, context[0]), (leaf + (id & 0xff) * 16 + 8, context[1])];
    match levels {
        3 => words.extend([(PROCESSES + (id >> 17) * 8, pointer(PROCESS_MIDDLE)), (PROCESS_MIDDLE + (id >> 8 & 0x1ff) * 8, pointer(PROCESS_LEAF))]),
        2 => words.push((PROCESSES + (id >> 8) * 8, pointer(PROCESS_LEAF))),
        _ => {}
    }
    words
}

#[test]
fn processes_have_first_stages_of_their_own() {
    for (levels, id) in [(1, 0xa5), (2, 0x1_a5f3), (3, 0xb_a5f3), (3, 0xf_ffff)] {
        let device = base([V | PDTV, 0, 0, atp(levels, PROCESSES)]);
        let memory = device.with(&processes(levels, id, [V | 0x5_5000, atp(9, TABLE)]));
        let ask = |pasid| ask(&registers(CAP, 0, ONE_LEVEL), &mut memory.clone(), 5, pasid);
        assert_eq!(tables(ask(Some(id as u32))), "first-stage levels=4 root=0x12345000 svnapot=1", "{id:#x}");
        assert_eq!(ask(None), Outcome::Bypass, "no default process");
        assert_eq!(cause(ask(Some(id as u32 ^ 1))), 266);
        let width = [8, 17, 20][levels as usize - 1];
        assert_eq!(cause(ask(Some(1 << width))), 260);
        assert_eq!(cause(ask(Some(u32::MAX))), 260);
    }
}

#[test]
fn requests_without_process_id_use_process_0_if_there_is_a_default() {
    let memory = |tc, iohgatp| base([V | PDTV | tc, iohgatp, 0, atp(1, PROCESSES)]).with(&processes(1, 0, [V | ENS | SUM, SV39_TABLE]));
    let of = |tc, iohgatp, pasid| ask(&registers(CAP, 0, ONE_LEVEL), &mut memory(tc, iohgatp), 5, pasid);
    let first = "first-stage levels=3 root=0x12345000 svnapot=1";
    assert_eq!(tables(of(DPE, 0, None)), first, "they have no privilege");
    assert_eq!(tables(of(DPE, 0, Some(0))), format!("{first} supervisor=1 sum=1"));
    assert_eq!(of(0, 0, None), Outcome::Bypass);
    assert_eq!(tables(of(0, atp(8, SECOND), None)), "second-stage levels=3 root=0x56788000 svnapot=1");
    // a device context without process directory
    let alone = ask(&registers(CAP, 0, ONE_LEVEL), &mut base([V, 0, 0, SV39_TABLE]), 5, Some(0));
    assert_eq!(cause(alone), 260);
    // a process directory that is Bare
    let bare = |pasid| ask(&registers(CAP, 0, ONE_LEVEL), &mut base([V | PDTV | DPE, 0, 0, 0]), 5, pasid);
    assert_eq!((bare(None), bare(Some(7))), (Outcome::Bypass, Outcome::Bypass));
}

#[test]
fn process_contexts_say_who_is_privileged_and_may_be_bare() {
    let of = |context| {
        let mut memory = base([V | PDTV, 0, 0, atp(1, PROCESSES)]).with(&processes(1, 9, context));
        ask(&registers(CAP, 0, ONE_LEVEL), &mut memory, 5, Some(9))
    };
    let first = "first-stage levels=3 root=0x12345000 svnapot=1";
    assert_eq!(tables(of([V | ENS, SV39_TABLE])), format!("{first} supervisor=1"));
    assert_eq!(tables(of([V | ENS | SUM, SV39_TABLE])), format!("{first} supervisor=1 sum=1"));
    assert_eq!(tables(of([V | SUM, SV39_TABLE])), first, "SUM is about privileged requests");
    assert_eq!(of([V, 0]), Outcome::Bypass);
    for bit in (3..12).chain(32..64) {
        assert_eq!(cause(of([V | 1 << bit, SV39_TABLE])), 267, "bit {bit}");
    }
    for bit in 44..60 {
        assert_eq!(cause(of([V, SV39_TABLE | 1 << bit])), 267, "bit {bit}");
    }
    for mode in (1..16).filter(|mode| !(8..=10).contains(mode)) {
        assert_eq!(cause(of([V, atp(mode, TABLE)])), 267, "{mode}");
    }
    assert_eq!(cause(of([0, SV39_TABLE])), 266);
}

#[test]
fn the_process_directory_refuses() {
    let good = base([V | PDTV, 0, 0, atp(3, PROCESSES)]).with(&processes(3, 0x2_0100, [V, SV39_TABLE]));
    let refused = |memory: &Memory| cause(ask(&registers(CAP, 0, ONE_LEVEL), &mut memory.clone(), 5, Some(0x2_0100)));
    for end in [PROCESSES, PROCESS_MIDDLE, PROCESS_LEAF] {
        assert_eq!(refused(&Memory { end, ..good.clone() }), 265);
    }
    for (address, to) in [(PROCESSES + 8, PROCESS_MIDDLE), (PROCESS_MIDDLE + 8, PROCESS_LEAF)] {
        assert_eq!(refused(&good.with(&[(address, 0)])), 266);
        for bit in (1..10).chain(54..64) {
            assert_eq!(refused(&good.with(&[(address, pointer(to) | 1 << bit)])), 267, "bit {bit}");
        }
    }
    let mode = |capabilities, mode| plain(capabilities, &base([V | PDTV, 0, 0, atp(mode, PROCESSES)]));
    for lacking in 0..3 {
        assert_eq!(cause(mode(CAP & !(1 << (38 + lacking)), lacking + 1)), 259);
    }
    for reserved in 4..16 {
        assert_eq!(cause(mode(CAP, reserved)), 259);
    }
}

#[test]
fn process_directories_behind_a_second_stage_are_guest_physical() {
    let device = base([V | PDTV, atp(9, SECOND), 0, atp(2, PROCESSES)]);
    let behind = processes(2, 0x1_23ff, [V, SV39_TABLE]).into_iter().map(|(address, word)| (address + BEHIND, word)).collect::<Vec<_>>();
    let mut memory = device.with(&behind);
    let both = "first-stage levels=3 root=0x12345000 svnapot=1; second-stage levels=4 root=0x56788000 svnapot=1";
    let registers = registers(CAP, 0, ONE_LEVEL);
    assert_eq!(tables(ask(&registers, &mut memory, 5, Some(0x1_23ff))), both);
    assert_eq!(line(&memory.through.take().unwrap().settings), "levels=4 root=0x56788000 svnapot=1");
    assert_eq!(RiscvIommu::pasids(&registers, 5, &mut memory), Ok(vec![0x1_23ff]));
    let mut cut = Memory { end: BEHIND, ..memory };
    assert_eq!(cause(ask(&registers, &mut cut, 5, Some(0x1_23ff))), 21);
}

#[test]
fn pasids_lists_what_is_valid_except_the_default() {
    let mut memory = base([V | PDTV | DPE, 0, 0, atp(3, PROCESSES)]);
    let pages = [0xa_0000, 0xb_0000, 0xc_0000];
    memory.words.extend([(PROCESSES, pointer(PROCESS_MIDDLE)), (PROCESSES + 56, pointer(0xd_0000)), (PROCESSES + 64, pointer(0xe_0000))]);
    memory.words.extend([
        (PROCESS_MIDDLE, pointer(pages[0])),
        (PROCESS_MIDDLE + 8, pointer(pages[1]) & !V),
        (PROCESS_MIDDLE + 16, pointer(pages[1]) | 2),
    ]);
    memory.words.extend([(0xd_0000 + 511 * 8, pointer(pages[2])), (0xe_0000, pointer(pages[2]))]);
    for (page, index) in [(0, 0), (0, 7), (0, 255), (1, 1), (2, 255)] {
        memory.words.insert(pages[page] + index * 16, V);
    }
    memory.words.insert(pages[0] + 8 * 16, 0xffe);
    let list = |memory: &Memory, id| RiscvIommu::pasids(&registers(CAP, 0, ONE_LEVEL), id, &mut memory.clone()).unwrap();
    assert_eq!(list(&memory, 5), [7, 255, 0xf_ffff]);
    assert_eq!(list(&memory, 6), [0; 0]);
    let without_default = memory.with(&[(DIRECTORY + 5 * 32, V | PDTV)]);
    assert_eq!(list(&without_default, 5), [0, 7, 255, 0xf_ffff]);
    assert_eq!(list(&memory.with(&[(DIRECTORY + 5 * 32 + 24, 0)]), 5), [0; 0], "Bare");
    assert_eq!(list(&base([V, 0, 0, SV39_TABLE]), 5), [0; 0]);
}

#[test]
fn pasids_is_bounded_against_a_hostile_directory() {
    // every entry points to the same table: full first, then without a single entry
    let mut memory = base([V | PDTV, 0, 0, atp(3, PROCESSES)]);
    memory.words.extend((0..8).map(|slot| (PROCESSES + slot * 8, pointer(PROCESS_MIDDLE))));
    memory.words.extend((0..512).map(|slot| (PROCESS_MIDDLE + slot * 8, pointer(PROCESS_LEAF))));
    memory.words.extend((0..256).map(|index| (PROCESS_LEAF + index * 16, V)));
    let registers = registers(CAP, 0, ONE_LEVEL);
    let list = RiscvIommu::pasids(&registers, 5, &mut memory).unwrap();
    assert_eq!((list.len(), list[0], list[1023]), (1024, 0, 1023));
    memory.words.extend((0..256).map(|index| (PROCESS_LEAF + index * 16, 0)));
    memory.bytes_read = 0;
    assert_eq!(RiscvIommu::pasids(&registers, 5, &mut memory), Ok(Vec::new()));
    assert!(memory.bytes_read < 5 << 20, "{}", memory.bytes_read);
}

/// What a kernel that nests RISC-V tables would say and take.
const SIMULATED: u32 = 0x5347_0001;

#[test]
fn offers_follow_the_capabilities() {
    let offer = |capabilities: u64| {
        let offers = RiscvIommu::offers(SIMULATED, &capabilities.to_le_bytes()).unwrap();
        offers
            .iter()
            .map(|offer| offer.limits.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" "))
            .collect::<Vec<_>>()
    };
    let all = 0b111 << 9 | 1 << 14 | 1 << 15 | 0b111 << 17 | 1 << 24 | 1 << 27;
    assert_eq!(offer(all), ["levels=5 output-bits=56 svnapot=1 svpbmt=1 svrsw60t59b=1 hardware-update=1 big-endian=1 supervisor=0 sum=0"]);
    assert_eq!(
        offer(1 << 9 | 1 << 17),
        ["levels=3 output-bits=41 svnapot=1 svpbmt=0 svrsw60t59b=0 hardware-update=0 big-endian=0 supervisor=0 sum=0"]
    );
    assert_eq!([offer(1 << 17), offer(1 << 9), offer(0)], [const { Vec::<String>::new() }; 3]);
    assert!(matches!(RiscvIommu::offers(1, &[0; 64]), Err(Error::Unsupported(_))));
    assert!(matches!(RiscvIommu::offers(SIMULATED, &[0; 7]), Err(Error::Invalid(_))));
}

/// IOMMU section 2.1.3 for the device context; section 3.1.1 for IOTINVAL.VMA: opcode 1, AV 10, PSCID 31:12, PSCV 32, NL 34; address 61:10 in pages.
#[test]
fn bind_data_is_a_device_context_and_its_commands() {
    let bind = |settings: &[(&str, u64)], capabilities: u64, space: u32, host_made: bool| {
        let to = PlaceToBind { kind: SIMULATED, info: capabilities.to_le_bytes().to_vec(), context_address: 0x1000, space, host_made };
        RiscvIommu::bind_data(&TableConfig::new("riscv-iommu/first-stage", settings), &to)
    };
    let words = |bytes: &[u8]| bytes.chunks(8).map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap())).collect::<Vec<u64>>();
    let four = bind(&[("levels", 4), ("root", TABLE)], 0, 7, true).unwrap();
    assert_eq!((four.kind, words(&four.data)), (SIMULATED, vec![1, 7 << 12, 9 << 60 | TABLE >> 12]));
    assert_eq!((four.context.len(), four.viommu, four.pasids), (0, Some(0x5347_0002), false));
    let recipe = four.invalidation.unwrap();
    assert_eq!((recipe.page, recipe.everything), (vec![1 << 32 | 7 << 12 | 1 << 10 | 1, 0], vec![1 << 32 | 7 << 12 | 1, 0]));
    assert_eq!((recipe.address, recipe.tables), (Place { word: 1, lsb: 10, width: 52, number_lsb: 12 }, None));
    // With NL tables go by address too; what a guest built may have global entries, which no command for a PSCID drops.
    let guests = bind(&[("root", TABLE), ("hardware-update", 1), ("big-endian", 1)], 1 << 42, 7, false).unwrap();
    assert_eq!(words(&guests.data)[0], 1 | 1 << 8 | 1 << 10);
    let recipe = guests.invalidation.unwrap();
    assert_eq!((recipe.page, recipe.everything, recipe.tables), (vec![1 << 10 | 1, 0], vec![1, 0], Some(vec![1 << 34, 0])));
    assert!(matches!(bind(&[("levels", 4)], 0, 7, true), Err(Error::Invalid(_))));
    assert!(matches!(bind(&[("root", TABLE)], 0, 1 << 20, true), Err(Error::Invalid(_))));
    for settings in [&[("root", TABLE), ("supervisor", 1)][..], &[("root", TABLE), ("levels", 2)]] {
        assert!(matches!(bind(settings, 0, 7, true), Err(Error::Unsupported(_))));
    }
    let second = TableConfig::new("riscv-iommu/second-stage", &[("root", TABLE)]);
    assert!(matches!(RiscvIommu::bind_data(&second, &PlaceToBind::default()), Err(Error::Unsupported(_))));
}

/// Memory in which every word is a function of seed and address. Unless it is wild, most words are made to make sense in the structure that is read,
/// so that walks get far.
struct Hostile {
    seed: u64,
    wild: bool,
    reads: u32,
}

impl Hostile {
    fn word(&self, address: u64, offset: u64, length: u32) -> u64 {
        let mut x = (address.wrapping_add(offset) ^ self.seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        x ^= x >> 29;
        x = x.wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x ^= x >> 32;
        if self.wild || x.count_ones() > 39 {
            return x;
        }
        let number = x & ((1 << 40) - 4);
        let stage = [0, 8, 9, 10][(x >> 62) as usize];
        match (length, offset) {
            (8, _) | (4096, _) => number << 10 | V,
            (16, 0) => x & 0xffff_f006 | V,
            (_, 0) => self.seed & (PDTV | SADE | GADE) | if self.seed & PDTV == 0 { 0 } else { x & DPE } | V,
            (16, _) => stage << 60 | number,
            (_, 8) => stage << 60 | number,
            (_, 24) if self.seed & PDTV == 0 => stage << 60 | number,
            (_, 24 | 32) => (x >> 62) << 60 | number,
            (_, 40 | 48) => x >> 12,
            _ => 0,
        }
    }
}

impl GuestMemory for Hostile {
    fn read(&mut self, address: u64, length: u32) -> Result<Vec<u8>, Error> {
        assert!(length <= 4096 && address.is_multiple_of(8));
        self.reads += 1;
        Ok((0..u64::from(length)).step_by(8).flat_map(|offset| self.word(address, offset, length).to_le_bytes()).collect())
    }

    fn read_through(&mut self, table: &TableConfig, address: u64, length: u32) -> Result<Vec<u8>, Error> {
        use stagecraft_sdk::Format;
        stagecraft_plugin_riscv_iommu::second_stage::SecondStage::open(&table.settings).unwrap();
        self.read(address, length)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn hostile_registers_and_memory_never_panic_and_are_bounded(
        capabilities: u64, fctl: u64, mode in 0_u64..6, id in 0_u64..0x100_0000, pasid in proptest::option::of(0_u32..0x20_0000), seed: u64,
        wild: bool,
    ) {
        let (mut capabilities, mut fctl, mut id, mut pasid) = (capabilities, fctl, id, pasid);
        if !wild {
            capabilities = CAP | ATS | AMO_HWAD | capabilities & (MSI_FLAT | SVPBMT);
            fctl = 0;
            id &= [0x3f, 0x7fff, 0xff_ffff][(mode.clamp(2, 4) - 2) as usize];
            pasid = pasid.filter(|_| seed & PDTV != 0).map(|pasid| pasid & 0xff);
        }
        let mut memory = Hostile { seed, wild, reads: 0 };
        let registers = registers(capabilities, fctl, mode);
        let outcome = RiscvIommu::lookup(&registers, Requester { id, pasid }, &mut memory);
        prop_assert!(memory.reads <= 6);
        if let Ok(Outcome::Tables(Translated { tables, .. })) = outcome {
            for table in tables {
                use stagecraft_plugin_riscv_iommu::{first_stage::FirstStage, second_stage::SecondStage};
                use stagecraft_sdk::Format;
                // what lookup answers can be opened
                let geometry = match table.format.as_str() {
                    FirstStage::NAME => FirstStage::open(&table.settings).unwrap().geometry(),
                    SecondStage::NAME => SecondStage::open(&table.settings).unwrap().geometry(),
                    other => panic!("{other}"),
                };
                common::check_geometry(&geometry);
            }
        }
        memory.reads = 0;
        if let Ok(list) = RiscvIommu::pasids(&registers, id, &mut memory) {
            prop_assert!(list.len() <= 1024 && list.is_sorted() && memory.reads <= 3 + 1 + 8 + 1024);
        }
    }
}

#[test]
fn address_spaces_are_named_by_guest_and_process() {
    let tag = |memory: &Memory, pasid| match ask(&registers(CAP, 0, ONE_LEVEL), &mut memory.clone(), 5, pasid) {
        Outcome::Tables(Translated { tag: Tag { domain, space }, .. }) => (domain, space),
        other => panic!("{other:?}"),
    };
    let (guest, process) = (0x1234 << 44, 0xa_bcde << 12);
    assert_eq!(tag(&base([V, 0, process, SV39_TABLE]), None), (None, Some(0xa_bcde)));
    assert_eq!(tag(&base([V, atp(8, SECOND) | guest, process, 0]), None), (Some(0x1234), None));
    assert_eq!(tag(&base([V, atp(8, SECOND) | guest, process, SV39_TABLE]), None), (Some(0x1234), Some(0xa_bcde)));
    // Processes have ids of their own.
    let device = base([V | PDTV, atp(8, SECOND) | guest, process, 0]);
    assert_eq!(tag(&device, None), (Some(0x1234), None));
    let device = base([V | PDTV, 0, process, atp(1, PROCESSES)]).with(&processes(1, 7, [V | 0x5_4321 << 12, atp(8, TABLE)]));
    assert_eq!(tag(&device, Some(7)), (None, Some(0x5_4321)));
}

#[test]
fn devices_that_nobody_set_up_are_unused() {
    let kind = |memory: &Memory, pasid| match ask(&registers(CAP, 0, ONE_LEVEL), &mut memory.clone(), 5, pasid) {
        Outcome::Blocked(blocked) => blocked.kind,
        other => panic!("{other:?}"),
    };
    assert_eq!(kind(&base([0, 0, 0, 0]), None), BlockKind::Unused);
    assert_eq!(kind(&base([V, 0, 0, 0]), Some(1)), BlockKind::Unused, "no process directory");
    assert_eq!(kind(&base([V, 0, 1, 0]), None), BlockKind::Refused);
    let off = ask(&registers(CAP, 0, 0), &mut base([0; 4]), 5, None);
    assert!(matches!(off, Outcome::Blocked(blocked) if blocked.kind == BlockKind::Unused));
}

#[test]
fn addresses_that_no_mode_uses_are_noted() {
    let warnings = |words: [u64; 8], more: &[(u64, u64)], pasid| {
        let context: Vec<(u64, u64)> = (DIRECTORY..).step_by(8).zip(words).collect();
        let mut memory = notes::Noting::new(Memory::new(&context).with(more));
        let given = registers(CAP | MSI_FLAT, 0, ONE_LEVEL);
        let outcome = RiscvIommu::lookup(&given, Requester { id: 0, pasid }, &mut memory).unwrap();
        assert!(matches!(outcome, Outcome::Tables(_) | Outcome::Bypass), "{outcome:?}");
        memory.warnings()
    };
    assert_eq!(warnings([V, atp(8, SECOND), 0, SV39_TABLE, atp(1, TABLE), 3, 4, 0], &[], None), []);
    let unused = [V, atp(0, SECOND), 0, atp(0, TABLE), atp(0, TABLE), 3, 4, 0];
    assert_eq!(
        warnings(unused, &[], None),
        (1..7).filter(|word| *word != 2).map(|word| (DIRECTORY, word, unused[word as usize])).collect::<Vec<_>>()
    );
    assert_eq!(warnings([V | PDTV, 0, 0, atp(0, PROCESSES), 0, 0, 0, 0], &[], None), [(DIRECTORY, 3, atp(0, PROCESSES))]);

    let process = PROCESSES + 5 * 16;
    let directory = [V | PDTV, 0, 0, atp(1, PROCESSES), 0, 0, 0, 0];
    assert_eq!(warnings(directory, &[(process, V), (process + 8, SV39_TABLE)], Some(5)), []);
    assert_eq!(warnings(directory, &[(process, V), (process + 8, atp(0, TABLE))], Some(5)), [(process, 1, atp(0, TABLE))]);
}
