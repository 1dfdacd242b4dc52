//! From registers to tables: every shape of stream table, stream table entry and context descriptor, and every way to be refused.
#![allow(clippy::unwrap_used)]

mod common;

#[path = "../../../sdk/testing/event.rs"]
mod event;

#[path = "../../../sdk/testing/notes.rs"]
mod notes;

use common::{Guest, registers, settings};
use proptest::prelude::*;
use stagecraft_plugin_arm_smmuv3::{Smmuv3, Stage1, Stage2};
use stagecraft_sdk::queue::Access;
use stagecraft_sdk::{
    BlockKind, Error, Event, Extent, FaultKind, Format, InvalidationTarget, Outcome, Place, PlaceToBind, RangeEntry, Registers, Requester, Settings,
    TableConfig, Tag, Translated, Unit,
};

/// Stages 1 and 2, AArch64, HTTU with dirty marks, hypervisor contexts, ATS, 16-bit ids, two-level tables, everything configurable.
const IDR0: u64 = 0b11 | 2 << 2 | 2 << 6 | 1 << 9 | 1 << 10 | 1 << 12 | 1 << 18 | 1 << 19 | 1 << 27;
/// 16 StreamID bits, 20 SubstreamID bits, attributes can be overridden.
const IDR1: u64 = 16 | 20 << 6 | 1 << 26;
/// HAD, XNX, FWB, E0PD.
const IDR3: u64 = 1 << 2 | 1 << 4 | 1 << 8 | 1 << 13;
/// 48-bit output, all granules.
const IDR5: u64 = 5 | 7 << 4;
/// The same with 52 bits everywhere and LPA2.
const IDR5_WIDE: u64 = 6 | 7 << 4 | 1 << 7 | 1 << 10;

const STREAMS: u64 = 0x4000_0000;
const CONTEXTS: u64 = 0x4010_0000;
const TABLE: u64 = 0x4020_0000;

/// A CD as Linux writes it: 4K, 48 bits, 44-bit output, TTB1 off.
const CD: [u64; 4] = [0x0001_e204_c000_3510, TABLE, 0, 0xffff_ffff_f404_ff44];
/// Words 2 and 3 of an STE as Linux writes them for stage 2: 4K, 44 bits, start at level 0.
const S2: [u64; 2] = [0x044c_3594_0000_0001, TABLE];

/// One stream with StreamID 5 in a linear table of 64.
struct Case {
    registers: Vec<(&'static str, u64)>,
    ste: [u64; 8],
    guest: Guest,
    id: u64,
    pasid: Option<u32>,
}

fn case(ste: [u64; 4]) -> Case {
    let registers = vec![
        ("CR0", 0xd),
        ("IDR0", IDR0),
        ("IDR1", IDR1),
        ("IDR3", IDR3),
        ("IDR5", IDR5),
        ("STRTAB_BASE", 1 << 62 | STREAMS),
        ("STRTAB_BASE_CFG", 6),
    ];
    let mut words = [0; 8];
    words[..4].copy_from_slice(&ste);
    Case { registers, ste: words, guest: Guest::default(), id: 5, pasid: None }
}

/// Stage 1 through one CD.
fn stage1(cd: [u64; 4]) -> Case {
    let mut case = case([0xb | CONTEXTS, 0xd6, 0, 0]);
    case.guest.write(CONTEXTS, &cd);
    case
}

impl Case {
    fn set(mut self, name: &'static str, value: u64) -> Self {
        self.registers.retain(|(n, _)| *n != name);
        self.registers.push((name, value));
        self
    }

    fn without(mut self, name: &str) -> Self {
        self.registers.retain(|(n, _)| *n != name);
        self
    }

    fn pasid(mut self, pasid: u32) -> Self {
        self.pasid = Some(pasid);
        self
    }

    fn registers(&self) -> Registers {
        registers(&self.registers)
    }

    fn place(&mut self) {
        self.guest.write(STREAMS + 5 * 64, &self.ste);
    }

    fn lookup(mut self) -> Result<Outcome, Error> {
        self.place();
        Smmuv3::lookup(&self.registers(), Requester { id: self.id, pasid: self.pasid }, &mut self.guest)
    }

    fn tables(self) -> Vec<TableConfig> {
        match self.lookup() {
            Ok(Outcome::Tables(Translated { tables, .. })) => tables,
            other => panic!("{other:?}"),
        }
    }

    /// The settings of the only table.
    fn settings(self) -> Settings {
        let [table] = self.tables().try_into().unwrap();
        table.settings
    }

    fn event(self) -> String {
        match self.lookup() {
            Ok(Outcome::Blocked(blocked)) => {
                assert!(blocked.section.starts_with("IHI 0070") && !blocked.reason.ends_with('.'), "{blocked:?}");
                blocked.event
            }
            other => panic!("{other:?}"),
        }
    }

    fn unsupported(self) -> bool {
        matches!(self.lookup(), Err(Error::Unsupported(_)))
    }

    fn pasids(mut self) -> Vec<u32> {
        self.place();
        Smmuv3::pasids(&self.registers(), self.id, &mut self.guest).unwrap()
    }
}

#[test]
fn a_disabled_smmu_bypasses_or_refuses() {
    assert_eq!(case([0; 4]).set("CR0", 0).lookup(), Ok(Outcome::Bypass));
    assert_eq!(case([0; 4]).set("CR0", 0).set("GBPA", 1 << 20).event(), "ABORT");
    assert_eq!(case([0; 4]).set("CR0", 0).without("STRTAB_BASE").without("IDR0").lookup(), Ok(Outcome::Bypass));
    assert_eq!(case([0; 4]).set("CR0", 0).pasids(), [0_u32; 0]);
    for name in ["CR0", "IDR0", "IDR1", "IDR5", "STRTAB_BASE", "STRTAB_BASE_CFG"] {
        match stage1(CD).without(name).lookup() {
            Err(Error::Invalid(invalid)) => assert_eq!(invalid.field, name),
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn linear_stream_tables() {
    let bypass = || case([0x9, 0, 0, 0]);
    assert_eq!(bypass().lookup(), Ok(Outcome::Bypass));
    assert_eq!(bypass().set("STRTAB_BASE", STREAMS + 0xfc0).lookup(), Ok(Outcome::Bypass), "aligned to its size");
    assert_eq!(bypass().set("STRTAB_BASE_CFG", 6 | 1 << 16 | 6 << 6).set("IDR0", IDR0 & !(3 << 27)).lookup(), Ok(Outcome::Bypass), "FMT is RES0");
    assert_eq!(bypass().set("STRTAB_BASE_CFG", 6 | 2 << 16).lookup(), Ok(Outcome::Bypass), "a reserved FMT is linear");
    assert_eq!(bypass().set("STRTAB_BASE_CFG", 2).event(), "C_BAD_STREAMID");
    assert_eq!(bypass().set("IDR1", 2).event(), "C_BAD_STREAMID", "LOG2SIZE is no more than SIDSIZE");
    assert_eq!(bypass().set("STRTAB_BASE", 0x9000_0000).event(), "F_STE_FETCH");
    for id in [64, u64::MAX, 1 << 32] {
        let mut case = bypass();
        case.id = id;
        assert_eq!(case.event(), "C_BAD_STREAMID");
    }
    let mut zero = bypass().set("STRTAB_BASE_CFG", 0);
    zero.id = 0;
    zero.guest.write(STREAMS, &[0x9]);
    assert_eq!(zero.lookup(), Ok(Outcome::Bypass), "a table of one entry");
}

#[test]
fn two_level_stream_tables() {
    // StreamID 0x1234: index 0x12 and 0x34 with SPLIT 8.
    let entries = 0x4001_0000;
    let make = |split: u64, id: u64, descriptor: u64| {
        let mut case = case([0; 4]).set("STRTAB_BASE_CFG", 16 | split << 6 | 1 << 16);
        case.id = id;
        let split = if split == 8 || split == 10 { split } else { 6 };
        case.guest.write(STREAMS + (id >> split) * 8, &[descriptor]);
        case.guest.write(entries + (id & ((1 << split) - 1)) * 64, &[0x9]);
        // The descriptor's table lies on its own: the entry of the linear form is not there.
        match Smmuv3::lookup(&case.registers(), Requester { id, pasid: None }, &mut case.guest).unwrap() {
            Outcome::Bypass => "bypass".to_owned(),
            Outcome::Blocked(blocked) => blocked.event,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(make(8, 0x1234, entries | 9), "bypass");
    assert_eq!(make(6, 0x1234, entries | 7), "bypass");
    assert_eq!(make(10, 0x1234, entries | 11), "bypass");
    assert_eq!(make(7, 0x1234, entries | 7), "bypass", "a reserved SPLIT is 6");
    assert_eq!(make(8, 0x1200, entries | 1), "bypass", "a span of one entry");
    assert_eq!(make(8, 0x1234, entries | 0x3000 | 9), "bypass", "aligned to the span");
    assert_eq!(make(8, 0x1201, entries | 1), "C_BAD_STREAMID", "beyond the span");
    assert_eq!(make(8, 0x1234, entries | 6), "C_BAD_STREAMID", "beyond the span");
    assert_eq!(make(8, 0x1234, entries), "C_BAD_STREAMID", "span 0");
    assert_eq!(make(8, 0x1234, entries | 12), "C_BAD_STREAMID", "reserved span");
    assert_eq!(make(8, 0x1234, entries | 10), "C_BAD_STREAMID", "span beyond the split");
    assert_eq!(make(8, 0x1234, 0x9000_0000 | 9), "F_STE_FETCH");
    // 256 descriptors of 8 bytes: 2 KiB. With 8 of them 64 bytes are the least.
    for (log2size, base, table) in [(16, STREAMS + 0xfc0, STREAMS + 0x800), (11, STREAMS + 0x40, STREAMS + 0x40)] {
        let mut aligned = case([0; 4]).set("STRTAB_BASE_CFG", log2size | 8 << 6 | 1 << 16).set("STRTAB_BASE", base);
        aligned.guest.write(table, &[entries | 9]);
        aligned.guest.write(entries + 5 * 64, &[0x9]);
        let found = Smmuv3::lookup(&aligned.registers(), Requester { id: 5, pasid: None }, &mut aligned.guest);
        assert_eq!(found, Ok(Outcome::Bypass));
    }
    let mut missing = case([0; 4]).set("STRTAB_BASE_CFG", 16 | 8 << 6 | 1 << 16).set("STRTAB_BASE", 0x9000_0000);
    missing.id = 0x1234;
    assert_eq!(missing.event(), "F_STE_FETCH");
}

#[test]
fn configurations_of_a_stream() {
    assert_eq!(case([0x8, 0, 0, 0]).event(), "C_BAD_STE", "not valid");
    for config in 0..4 {
        assert_eq!(case([1 | config << 1, 0, 0, 0]).event(), "ABORT", "0b0xx");
    }
    assert_eq!(case([0x9, 0, 0, 0]).lookup(), Ok(Outcome::Bypass));
    assert_eq!(case([0x9, 0, 0, 0]).pasid(1).event(), "C_BAD_SUBSTREAMID");
    assert_eq!(case([0xd, 0, S2[0], S2[1]]).pasid(1).event(), "C_BAD_SUBSTREAMID");
    assert_eq!(stage1(CD).set("IDR0", IDR0 & !2).event(), "C_BAD_STE", "no stage 1");
    assert_eq!(case([0xd, 0, S2[0], S2[1]]).set("IDR0", IDR0 & !1).event(), "C_BAD_STE", "no stage 2");
    let with = |word1: u64| case([0xb | CONTEXTS, 0xd6 | word1, 0, 0]);
    assert_eq!(with(1 << 30).event(), "C_BAD_STE", "reserved STRW");
    assert_eq!(with(1 << 30).set("IDR0", IDR0 & !(1 << 9)).event(), "F_CD_FETCH", "STRW is RES0 without Hyp");
    assert_eq!(with(2 << 28).event(), "C_BAD_STE", "split-stage ATS needs both stages");
    assert_eq!(with(1 << 27).set("IDR0", IDR0 | 1 << 24).event(), "C_BAD_STE", "S1STALLD where stalls cannot be configured");
    assert_eq!(case([0xb | 1 << 48, 0, 0, 0]).event(), "C_BAD_STE", "S1ContextPtr beyond 48 bits");
    assert_eq!(case([0xb | CONTEXTS, 0, 0x100, 0]).set("IDR0", IDR0 & !(1 << 18)).event(), "C_BAD_STE", "16-bit VMID");
    assert_eq!(case([0xb | 0x9000_0000, 0, 0, 0]).event(), "F_CD_FETCH");
}

#[test]
fn a_plain_context_descriptor() {
    let expected = settings(&[("granule", 4096), ("input-bits", 48), ("output-bits", 44), ("root", TABLE)]);
    assert_eq!(stage1(CD).tables(), [TableConfig { format: Stage1::NAME.to_owned(), settings: expected }]);
    let mair = stage1([CD[0], CD[1], CD[2], 0xff]).settings();
    assert_eq!(mair.get("mair"), Some(0xff));
}

#[test]
fn everything_a_context_descriptor_says() {
    // Granules: TG0 and TG1 code them differently.
    let granule = |tg: u64| stage1([CD[0] | tg << 6, CD[1], 0, 0]).settings().get("granule");
    assert_eq!([0, 1, 2].map(granule), [Some(4096), Some(65536), Some(16384)]);
    assert_eq!(stage1([CD[0] | 3 << 6, CD[1], 0, 0]).event(), "C_BAD_CD");
    // The high range: EPD1 off, T1SZ 25.
    let high = |tg: u64| stage1([CD[0] & !(1 << 30) | 25 << 16 | tg << 22, CD[1], TABLE + 0x10000, CD[3]]);
    let found = high(2).settings();
    let pairs = [("granule", 4096), ("input-bits", 48), ("output-bits", 44), ("root", TABLE), ("granule-high", 4096), ("input-bits-high", 39)];
    assert_eq!(found, settings(&[&pairs[..], &[("root-high", TABLE + 0x10000)]].concat()));
    assert_eq!([1, 3].map(|tg| high(tg).settings().get("granule-high")), [Some(16384), Some(65536)]);
    assert_eq!(high(0).event(), "C_BAD_CD");
    // The low range off.
    let high_only = stage1([(CD[0] & !(1 << 30)) | 1 << 14 | 16 << 16 | 2 << 22, u64::MAX << 4, TABLE, CD[3]]).settings();
    assert_eq!(high_only.get("low-disabled"), Some(1));
    assert_eq!((high_only.get("root"), high_only.get("root-high"), high_only.get("granule")), (None, Some(TABLE), Some(4096)));
    assert_eq!(stage1([CD[0] | 1 << 14, CD[1], 0, 0]).event(), "F_TRANSLATION", "both off");

    let flag = |word: usize, bits: u64| {
        let mut cd = CD;
        cd[word] |= bits;
        let names: Vec<String> = stage1(cd).settings().iter().skip(4).map(|(name, value)| format!("{name}={value}")).collect();
        names.join(" ")
    };
    assert_eq!(flag(0, 1 << 15), "big-endian=1");
    assert_eq!(flag(0, 1 << 35), "access-flag-disabled=1");
    assert_eq!(flag(0, 1 << 36), "wxn=1");
    assert_eq!(flag(0, 1 << 37), "", "UWXN means nothing to AArch64 tables");
    assert_eq!(flag(0, 1 << 38), "tbi=1");
    assert_eq!(flag(0, 1 << 39), "", "TBI1 without a high range");
    assert_eq!(flag(0, 1 << 40), "pan=1");
    assert_eq!(flag(0, 1 << 43), "hardware-access=1");
    assert_eq!(flag(0, 1 << 43 | 1 << 35), "hardware-access=1", "AFFD is ignored with HA");
    assert_eq!(flag(0, 3 << 42), "hardware-access=1 hardware-dirty=1");
    assert_eq!(flag(0, 1 << 42), "", "HD without HA is neither");
    let haft = |ha: u64, idr0: u64| stage1([CD[0] | ha << 43, CD[1] | 1 << 3, 0, CD[3]]).set("IDR0", idr0);
    assert_eq!(haft(1, IDR0 | 3 << 6).settings().get("hardware-table-access"), Some(1));
    assert_eq!(haft(1, IDR0).settings().get("hardware-table-access"), None, "HAFT is not there");
    assert_eq!(haft(0, IDR0 | 3 << 6).event(), "C_BAD_CD", "HAFT without HA");
    assert_eq!(flag(1, 1 << 1), "hierarchy-disabled=1");
    assert_eq!(flag(1, 1 << 2), "unprivileged-disabled=1");
    assert_eq!(flag(2, 1 << 58), "", "DS without LPA2");
    assert_eq!(flag(1, 0xc0), "", "the address is aligned to the table's size");
    let both = stage1([CD[0] & !(1 << 30) | 25 << 16 | 2 << 22 | 3 << 38, CD[1] | 2, TABLE | 6, CD[3]]).settings();
    let names: Vec<&str> = both.iter().skip(3).map(|(name, _)| name).collect();
    let expected = ["root", "tbi", "hierarchy-disabled", "granule-high", "input-bits-high", "root-high", "tbi-high", "hierarchy-disabled-high"];
    assert_eq!(names, [&expected[..], &["unprivileged-disabled-high"]].concat());
    assert_eq!(stage1([CD[0], CD[1] | 6, 0, CD[3]]).set("IDR3", 0).settings().get("hierarchy-disabled"), None, "HAD and E0PD are not there");
}

#[test]
fn sizes_are_what_the_implementation_has() {
    let ips = |ips: u64, idr5| stage1([CD[0] & !(7 << 32) | ips << 32, 0x1000, 0, 0]).set("IDR5", idr5).settings().get("output-bits");
    assert_eq!([0, 1, 2, 3, 4, 5, 6, 7].map(|code| ips(code, IDR5).unwrap()), [32, 36, 40, 42, 44, 48, 48, 48]);
    assert_eq!([5, 6, 7].map(|code| ips(code, IDR5_WIDE).unwrap()), [48, 52, 52]);
    let t0sz = |t0sz: u64| stage1([CD[0] & !0x3f | t0sz, CD[1], 0, 0]);
    assert_eq!([16, 25, 39].map(|size| t0sz(size).settings().get("input-bits").unwrap()), [48, 39, 25]);
    assert_eq!([0, 12, 15, 40, 48, 63].map(|size| t0sz(size).event()), ["C_BAD_CD"; 6]);
    assert_eq!(t0sz(48).set("IDR3", IDR3 | 1 << 9).settings().get("input-bits"), Some(16), "small translation tables");
    assert_eq!(t0sz(49).set("IDR3", IDR3 | 1 << 9).event(), "C_BAD_CD");
    assert_eq!(t0sz(12).set("IDR5", IDR5_WIDE).event(), "C_BAD_CD", "52 bits with 4K need DS");
    let wide = |cd0: u64, ds: u64| stage1([CD[0] & !(0x3f | 7 << 32) | 6 << 32 | 12 | cd0, CD[1], ds << 58, CD[3]]).set("IDR5", IDR5_WIDE);
    let lpa2 = wide(0, 1).settings();
    assert_eq!((lpa2.get("input-bits"), lpa2.get("lpa2"), lpa2.get("output-bits")), (Some(52), Some(1), Some(52)));
    let k64 = wide(1 << 6, 1).settings();
    assert_eq!((k64.get("input-bits"), k64.get("lpa2")), (Some(52), None), "DS means nothing to 64K");
    assert_eq!(wide(1 << 6, 0).set("IDR5", IDR5_WIDE & !(3 << 10)).event(), "C_BAD_CD", "VAX: 48 bits only");
    let mut unshared = CD;
    unshared[0] &= !(3 << 12);
    unshared[2] = 1 << 58;
    let settings = stage1(unshared).set("IDR5", IDR5_WIDE).settings();
    assert_eq!((settings.get("lpa2"), settings.get("non-shareable")), (Some(1), Some(1)));

    let granules = |idr5| [0_u64, 1, 2].map(|tg| matches!(stage1([CD[0] | tg << 6, CD[1], 0, 0]).set("IDR5", idr5).lookup(), Ok(Outcome::Tables(_))));
    assert_eq!(granules(5 | 1 << 4), [true, false, false]);
    assert_eq!(granules(5 | 1 << 5), [false, false, true]);
    assert_eq!(granules(5 | 1 << 6), [false, true, false]);
}

#[test]
fn context_descriptors_that_are_refused() {
    let with = |word: usize, set: u64, clear: u64| {
        let mut cd = CD;
        cd[word] = (cd[word] | set) & !clear;
        stage1(cd)
    };
    assert_eq!(with(0, 0, 1 << 31).event(), "C_BAD_CD", "V");
    assert_eq!(with(1, 1 << 44, 0).event(), "C_BAD_CD", "TTB0 beyond IPS");
    assert_eq!(with(1, 1 << 50, 0).set("IDR5", IDR5_WIDE).event(), "C_BAD_CD", "TTB0 beyond 48 bits");
    assert_eq!(with(0, 0, 1 << 46).set("IDR0", IDR0 | 1 << 26).event(), "C_BAD_CD", "A");
    assert_eq!(with(0, 0, 1 << 46).tables().len(), 1);
    assert_eq!(with(0, 1 << 44, 0).set("IDR0", IDR0 | 1 << 24).event(), "C_BAD_CD", "S: no stalls");
    assert_eq!(with(0, 0, 0).set("IDR0", IDR0 | 2 << 24).event(), "C_BAD_CD", "S: only stalls");
    let mut stalls = with(0, 1 << 44, 0);
    stalls.ste[1] |= 1 << 27;
    assert_eq!(stalls.event(), "C_BAD_CD", "S1STALLD");
    assert_eq!(with(0, 1 << 15, 0).set("IDR0", IDR0 | 2 << 21).event(), "C_BAD_CD", "ENDI");
    assert_eq!(with(0, 0, 0).set("IDR0", IDR0 | 3 << 21).event(), "C_BAD_CD", "ENDI");
    assert_eq!(with(0, 1 << 43, 0).set("IDR0", IDR0 & !(3 << 6)).event(), "C_BAD_CD", "HA");
    assert_eq!(with(0, 3 << 42, 0).set("IDR0", IDR0 & !(3 << 6) | 1 << 6).event(), "C_BAD_CD", "HD");
    assert_eq!(with(0, 1 << 56, 0).set("IDR0", IDR0 & !(1 << 12)).event(), "C_BAD_CD", "ASID");
    let mut el2 = with(0, 1 << 56, 0).set("IDR0", IDR0 & !(1 << 12));
    el2.ste[1] |= 2 << 30;
    assert_eq!(el2.tables().len(), 1, "EL2 ignores the ASID");
    assert_eq!(with(0, 0, 1 << 41).event(), "C_BAD_CD", "no AArch32");
    assert!(with(0, 0, 1 << 41).set("IDR0", IDR0 | 1 << 2).unsupported(), "AArch32");
    assert!(with(0, 0, 1 << 41).set("IDR5", IDR5 | 1 << 8).unsupported(), "128-bit descriptors");
    assert_eq!(with(0, 0, 0).set("IDR0", IDR0 & !(2 << 2)).event(), "C_BAD_CD", "no AArch64");
    let mut indirect = with(2, 1 << 59, 0).set("IDR3", IDR3 | 1 << 18);
    indirect.ste[1] |= 1 << 24;
    assert!(indirect.unsupported(), "permission indirection");
    assert!(with(2, 1 << 3, 0).set("IDR3", IDR3 | 1 << 23).unsupported(), "attribute index extension");
}

#[test]
fn privileges_of_a_stream() {
    let with = |word1: u64, cd0: u64| {
        let mut case = stage1([CD[0] | cd0, CD[1], 0, CD[3]]);
        case.ste[1] |= word1;
        case
    };
    assert_eq!(with(3 << 48, 0).settings().get("privileged"), Some(1));
    assert_eq!(with(2 << 48, 0).settings().get("privileged"), None);
    assert_eq!(with(3 << 48, 0).set("IDR1", 16 | 20 << 6).settings().get("privileged"), None, "cannot be overridden");
    let el2 = with(2 << 30, 1 << 14).settings();
    assert_eq!((el2.get("single-privilege"), el2.get("low-disabled"), el2.get("root")), (Some(1), None, Some(TABLE)), "EL2 ignores EPD0");
    assert_eq!(with(2 << 30, 0).set("CR2", 1).settings().get("single-privilege"), None, "EL2-E2H has two levels");
    let mut nested = with(2 << 30, 0);
    nested.ste[0] |= 4;
    nested.ste[2..4].copy_from_slice(&S2);
    assert_eq!(nested.event(), "F_CD_FETCH", "with stage 2 STRW is ignored");
}

#[test]
fn substreams_in_a_linear_table() {
    let make = |s1dss: u64| {
        let mut case = case([0xb | CONTEXTS | 3 << 59, 0xd4 | s1dss, 0, 0]);
        for (ssid, valid) in [(0, true), (1, true), (3, true), (4, false), (7, true)] {
            case.guest.write(CONTEXTS + 64 * ssid, &[CD[0] & !(u64::from(!valid) << 31), TABLE + 0x1000 * ssid, 0, CD[3]]);
        }
        case
    };
    let root = |case: Case| case.settings().get("root").unwrap() - TABLE;
    assert_eq!(root(make(2)), 0, "requests without PASID use substream 0");
    assert_eq!(root(make(2).pasid(3)), 0x3000);
    assert_eq!(make(2).pasid(0).event(), "F_STREAM_DISABLED", "which is taken");
    assert_eq!(make(2).pasid(4).event(), "C_BAD_CD");
    assert_eq!(make(2).pasid(8).event(), "C_BAD_SUBSTREAMID");
    assert_eq!(make(2).pasid(u32::MAX).event(), "C_BAD_SUBSTREAMID");
    assert_eq!(make(1).lookup(), Ok(Outcome::Bypass), "requests without PASID bypass stage 1");
    assert_eq!(root(make(1).pasid(0)), 0);
    assert_eq!([0, 3].map(|s1dss| make(s1dss).event()), ["F_STREAM_DISABLED"; 2]);
    assert_eq!(root(make(0).pasid(7)), 0x7000);
    let mut reserved = make(2).pasid(7);
    reserved.ste[0] |= 3 << 4;
    assert_eq!(root(reserved), 0x7000, "a reserved S1Fmt is linear");
    let mut unaligned = make(2).pasid(1);
    unaligned.ste[0] |= 0x1c0;
    assert_eq!(root(unaligned), 0x1000, "the table is aligned to its size");

    assert_eq!(make(2).pasids(), [1, 3, 7]);
    assert_eq!(make(0).pasids(), [0, 1, 3, 7]);
    assert_eq!(make(2).set("IDR1", 16).pasids(), [0_u32; 0], "without substreams");
    assert_eq!(root(make(2).set("IDR1", 16)), 0);
    assert_eq!(make(2).set("IDR1", 16).pasid(1).event(), "C_BAD_SUBSTREAMID");
    assert_eq!(make(2).set("IDR1", 16 | 2 << 6).event(), "C_BAD_STE", "S1CDMax beyond SSIDSIZE");
    assert_eq!(stage1(CD).pasid(0).event(), "C_BAD_SUBSTREAMID", "S1CDMax 0");
    assert_eq!(stage1(CD).pasids(), [0_u32; 0]);
}

#[test]
fn substreams_in_a_two_level_table() {
    for (format, leaf) in [(1_u64, 6), (2, 10)] {
        let make = |max: u64| {
            let mut case = case([0xb | CONTEXTS | format << 4 | max << 59, 0xd6, 0, 0]);
            let leaves = 0x4030_0000;
            case.guest.page(CONTEXTS);
            for ssid in [0_u64, 5, 1 << leaf, (3 << leaf) | 17] {
                let table = leaves + (ssid >> leaf) * 0x10000;
                case.guest.write(CONTEXTS + (ssid >> leaf) * 8, &[table | 1]);
                case.guest.write(table + (ssid & ((1 << leaf) - 1)) * 64, &[CD[0], TABLE + 0x1000 * ssid, 0, CD[3]]);
            }
            case
        };
        let root = |case: Case| (case.settings().get("root").unwrap() - TABLE) >> 12;
        let far = (3_u32 << leaf) | 17;
        assert_eq!(root(make(12)), 0);
        assert_eq!([5, 1 << leaf, far].map(|ssid| root(make(12).pasid(ssid))), [5, 1 << leaf, u64::from(far)]);
        assert_eq!(make(12).pasid(2 << leaf).event(), "C_BAD_SUBSTREAMID", "V of the level 1 descriptor");
        assert_eq!(make(12).pasid(6).event(), "C_BAD_CD");
        assert_eq!(make(12).pasids(), [5, 1 << leaf, far]);
        assert_eq!(make(3).pasid(5).set("IDR0", IDR0).settings().get("root").map(|root| root - TABLE), Some(0x5000), "S1CDMax below a leaf");
        let mut few = make(3);
        few.guest.write(0x4030_0000 + 9 * 64, &CD);
        assert_eq!(few.pasids(), [5], "a context descriptor beyond S1CDMax is none");
        // The level 1 table has 64 or 4 descriptors: 512 bytes suffice for its alignment.
        let mut elsewhere = make(12);
        elsewhere.ste[0] += 0x200;
        elsewhere.guest.write(CONTEXTS, &[0; 64]);
        elsewhere.guest.write(CONTEXTS + 0x200, &[0x4030_0001]);
        assert_eq!(root(elsewhere.pasid(5)), 5);
        assert_eq!(make(12).set("IDR0", IDR0 & !(1 << 19)).event(), "C_BAD_STE", "no two-level tables");
        let mut beyond = make(12);
        beyond.guest.write(CONTEXTS, &[1 << 50 | 1]);
        assert_eq!(beyond.event(), "C_BAD_SUBSTREAMID");
        let mut missing = make(12);
        missing.guest.write(CONTEXTS, &[0x9000_0001]);
        assert_eq!(missing.event(), "F_CD_FETCH");
    }
}

#[test]
fn listing_pasids_is_bounded() {
    let mut linear = case([0xb | CONTEXTS | 20 << 59, 0xd6, 0, 0]);
    for page in 0..100 {
        for slot in 0..64 {
            linear.guest.write(0x4000_0000 + page * 4096 + slot * 64, &CD);
        }
    }
    linear.ste[0] = 0xb | 0x4000_0000 | 20 << 59;
    linear = linear.set("STRTAB_BASE", 0x6000_0000);
    linear.guest.write(0x6000_0000 + 5 * 64, &linear.ste.clone());
    let registers = linear.registers();
    let pasids = Smmuv3::pasids(&registers, 5, &mut linear.guest).unwrap();
    assert_eq!(pasids, (1..=1024).collect::<Vec<u32>>(), "at most 1,024");

    let mut empty = case([0xb | 0x5000_0000 | 20 << 59, 0xd6, 0, 0]);
    empty.place();
    assert_eq!(Smmuv3::pasids(&empty.registers(), 5, &mut empty.guest).unwrap(), [0_u32; 0]);
    assert!(empty.guest.reads <= 4200, "{} reads", empty.guest.reads);

    // A level 1 table that leads to itself.
    let mut loops = case([0xb | CONTEXTS | 1 << 4 | 20 << 59, 0xd6, 0, 0]);
    for i in 0..32 {
        loops.guest.write(CONTEXTS + i * 4096, &[CONTEXTS | 1; 512]);
    }
    loops.place();
    Smmuv3::pasids(&loops.registers(), 5, &mut loops.guest).unwrap();
    assert!(loops.guest.reads <= 4200, "{} reads", loops.guest.reads);
}

#[test]
fn stage_2_alone() {
    let expected = settings(&[("granule", 4096), ("input-bits", 44), ("output-bits", 44), ("root", TABLE)]);
    let config = TableConfig { format: Stage2::NAME.to_owned(), settings: expected };
    assert_eq!(case([0xd, 0, S2[0], S2[1]]).tables(), [config]);
    let with = |word: usize, set: u64, clear: u64| {
        let mut words = [0xd, 0, S2[0], S2[1]];
        words[word] = (words[word] & !clear) | set;
        case(words)
    };
    let rest = |case: Case| {
        let names: Vec<String> = case.settings().iter().skip(3).filter(|(name, _)| *name != "root").map(|(n, v)| format!("{n}={v}")).collect();
        names.join(" ")
    };
    assert_eq!(rest(with(2, 1 << 52, 0)), "big-endian=1");
    assert_eq!(rest(with(2, 1 << 53, 0)), "access-flag-disabled=1");
    assert_eq!(rest(with(2, 1 << 56, 0)), "hardware-access=1");
    assert_eq!(rest(with(2, 3 << 55, 0)), "hardware-access=1 hardware-dirty=1");
    assert_eq!(rest(with(2, 1 << 55, 0)), "");
    assert_eq!(rest(with(2, 1 << 56 | 1 << 59, 0).set("IDR0", IDR0 | 3 << 6)), "hardware-access=1 hardware-table-access=1");
    assert_eq!(rest(with(2, 1 << 56 | 1 << 59, 0)), "hardware-access=1", "S2HAFT is not there");
    assert_eq!(rest(with(1, 1 << 25, 0)), "force-write-back=1");
    assert_eq!(rest(with(1, 1 << 25, 0).set("IDR3", 0)), "");
    assert_eq!(rest(with(2, 24 << 32 | 1 << 38, 0xff << 32)), "start-level=1", "40 bits, two tables");
    assert_eq!(rest(with(2, 1 << 54, 3 << 44)), "", "S2SH0 says nothing about the table, and S2PTW nothing without stage 1");
}

#[test]
fn stage_2_start_levels() {
    // S2TG, S2SL0, input bits -> start level, if it is legal; DDI 0487 tables D8-20 to D8-41.
    let start = |tg: u64, sl0: u64, bits: u64, more: u64, idr3: u64, idr5: u64| {
        let word2 = S2[0] & !(0xffff << 32 | 7 << 48) | (64 - bits) << 32 | sl0 << 38 | 3 << 44 | tg << 46 | 6 << 48;
        let case = case([0xd, 0, word2, TABLE | more]).set("IDR3", IDR3 | idr3).set("IDR5", idr5);
        match case.lookup() {
            Ok(Outcome::Tables(Translated { tables, .. })) => Some(Stage2::open(&tables[0].settings).unwrap().levels()[0].number),
            Ok(Outcome::Blocked(blocked)) if blocked.event == "C_BAD_STE" => None,
            other => panic!("{other:?}"),
        }
    };
    let plain = |tg, sl0, bits| start(tg, sl0, bits, 0, 0, IDR5);
    assert_eq!([plain(0, 2, 48), plain(0, 2, 40), plain(0, 2, 39)], [Some(0), Some(0), None]);
    assert_eq!([plain(0, 1, 43), plain(0, 1, 31), plain(0, 1, 44)], [Some(1), Some(1), None]);
    assert_eq!([plain(0, 0, 34), plain(0, 0, 25), plain(0, 0, 35)], [Some(2), Some(2), None]);
    assert_eq!([plain(0, 3, 25), start(0, 3, 25, 0, 1 << 9, IDR5)], [None, Some(3)]);
    assert_eq!([plain(2, 2, 48), plain(2, 2, 37), plain(2, 3, 48)], [Some(1), Some(1), None]);
    assert_eq!([plain(2, 1, 40), plain(2, 1, 41), plain(2, 0, 29)], [Some(2), None, Some(3)]);
    assert_eq!([plain(1, 2, 48), plain(1, 1, 46), plain(1, 0, 33), plain(1, 3, 48)], [Some(1), Some(2), Some(3), None]);
    assert_eq!([plain(3, 2, 48), plain(0, 2, 49), plain(0, 0, 24)], [None, None, None]);
    // The larger first tables are for units with larger addresses: OAS 3 is 42 bits, 4 is 44. `AArch64.S2InvalidSL`.
    let small = |oas: u64| IDR5 & !7 | oas;
    assert_eq!([start(0, 2, 42, 0, 0, small(3)), start(0, 2, 42, 0, 0, small(4))], [None, Some(0)]);
    assert_eq!([start(2, 2, 40, 0, 0, small(2)), start(2, 2, 40, 0, 0, small(3))], [None, Some(1)]);
    assert_eq!([start(1, 2, 42, 0, 0, small(3)), start(1, 2, 43, 0, 0, small(4))], [None, Some(1)]);
    assert_eq!([start(0, 1, 42, 0, 0, small(3)), start(2, 1, 40, 0, 0, small(2)), start(1, 1, 42, 0, 0, small(3))], [Some(1), Some(2), Some(2)]);
    // LPA2: S2DS is bit 3 of word 3 and S2SL0_2 bit 2.
    assert_eq!(start(0, 0, 52, 0xc, 0, IDR5_WIDE), Some(-1));
    assert_eq!(start(0, 1, 52, 0xc, 0, IDR5_WIDE), None);
    assert_eq!(start(0, 2, 52, 0x8, 0, IDR5_WIDE), Some(0), "sixteen tables at level 0");
    assert_eq!(start(2, 3, 52, 0x8, 0, IDR5_WIDE), Some(0));
    assert_eq!(start(0, 0, 52, 0xc, 0, IDR5), None, "without LPA2 the bits are reserved");
    assert_eq!(start(1, 2, 52, 0, 0, IDR5_WIDE), Some(1));
    assert_eq!(start(1, 2, 52, 0, 0, IDR5), None, "the input is no wider than the output");
}

#[test]
fn stage_2_that_is_refused() {
    let with = |word: usize, set: u64, clear: u64| {
        let mut words = [0xd, 0, S2[0], S2[1]];
        words[word] = (words[word] & !clear) | set;
        case(words)
    };
    assert_eq!(with(3, 1 << 44, 0).event(), "C_BAD_STE", "S2TTB beyond S2PS");
    assert_eq!(with(2, 0, 1 << 51).event(), "C_BAD_STE", "no AArch32");
    assert!(with(2, 0, 1 << 51).set("IDR0", IDR0 | 1 << 2).unsupported());
    assert!(with(2, 0, 1 << 51).set("IDR5", IDR5 | 1 << 8).unsupported());
    assert_eq!(with(2, 0, 0).set("IDR0", IDR0 & !(2 << 2) | 1 << 2).event(), "C_BAD_STE", "no AArch64");
    assert_eq!(with(2, 1 << 57, 0).set("IDR0", IDR0 | 1 << 24).event(), "C_BAD_STE", "S2S");
    assert_eq!(with(2, 0, 0).set("IDR0", IDR0 | 2 << 24).event(), "C_BAD_STE", "stalls are forced");
    assert_eq!(with(2, 1 << 52, 0).set("IDR0", IDR0 | 2 << 21).event(), "C_BAD_STE", "S2ENDI");
    assert_eq!(with(2, 1 << 56, 0).set("IDR0", IDR0 & !(3 << 6)).event(), "C_BAD_STE", "S2HA");
    assert_eq!(with(2, 3 << 55, 0).set("IDR0", IDR0 & !(3 << 6) | 1 << 6).event(), "C_BAD_STE", "S2HD");
    assert!(with(2, 1 << 60, 0).set("IDR3", IDR3 | 1 << 19).unsupported(), "permission indirection");
    let overlays = IDR3 | 1 << 19 | 1 << 20;
    assert_eq!(with(2, 1 << 61, 0).set("IDR3", overlays).event(), "C_BAD_STE", "S2POE without S2PIE");
    assert!(with(2, 3 << 60, 0).set("IDR3", overlays).unsupported(), "permission overlays");
    assert_eq!(with(2, 1 << 61, 0).tables().len(), 1, "S2POE of a unit without them");
    for bit in [329 - 320, 330 - 320, 331 - 320] {
        let hardened = || {
            let mut case = with(2, 0, 0);
            case.ste[5] = 1 << bit;
            case
        };
        assert!(hardened().set("IDR3", IDR3 | 1 << 21).unsupported(), "translation hardening");
        assert_eq!(hardened().tables().len(), 1, "of a unit without it");
    }
    assert!(with(1, 3 << 50, 0).unsupported(), "reads that are instruction fetches");
    assert_eq!(with(1, 2 << 50, 0).tables().len(), 1, "fetches that are reads");
    assert_eq!(with(1, 3 << 50, 0).set("IDR1", IDR1 & !(1 << 26)).tables().len(), 1, "INSTCFG of a unit that does not have it");
    assert_eq!(with(1, 1 << 28, 0).tables().len(), 1, "full ATS");
    let mut stalling = with(1, 1 << 28, 0);
    stalling.ste[2] |= 1 << 57;
    assert_eq!(stalling.event(), "C_BAD_STE", "ATS with stalls");
    // With a device permission table, IDR3.DPT. Otherwise the value behaves as no ATS.
    let mut checked = with(1, 3 << 28, 0);
    checked.ste[2] |= 1 << 57;
    assert_eq!(checked.set("IDR3", IDR3 | 1 << 15).event(), "C_BAD_STE", "the same with a device permission table");
    let mut unchecked = with(1, 3 << 28, 0);
    unchecked.ste[2] |= 1 << 57;
    assert_eq!(unchecked.tables().len(), 1);
    let hypervisor = |word: u64| {
        let mut case = stage1(CD);
        case.ste[1] |= word | 3 << 28;
        case
    };
    assert_eq!(hypervisor(2 << 30).set("IDR3", IDR3 | 1 << 15).event(), "C_BAD_STE", "a device permission table for EL2");
    assert_eq!(hypervisor(0).set("IDR3", IDR3 | 1 << 15).tables().len(), 1);
    assert_eq!(hypervisor(2 << 30).tables().len(), 1);
}

/// Addresses in structures have as many bits as the unit has, which may be more than tables can have.
#[test]
fn addresses_of_56_bits() {
    let far = 0x00ab_0000_4010_0000;
    let with = |oas: u64| {
        let mut case = case([0xb | far, 0xd6, 0, 0]).set("IDR5", IDR5 & !7 | oas);
        case.guest.write(far, &CD);
        case
    };
    assert_eq!(with(7).tables().len(), 1);
    assert_eq!(with(6).event(), "C_BAD_STE", "S1ContextPtr");
    // VMSPtr, bits 375:332, with both stages, S1MPAM and IDR3.MPAM.
    let partitioned = |address: u64, s1mpam: u64| {
        let mut case = nested();
        case.ste[1] |= s1mpam << 26;
        case.ste[5] = address;
        case
    };
    assert_eq!(partitioned(1 << 48, 1).set("IDR3", IDR3 | 1 << 7).event(), "C_BAD_STE", "VMSPtr");
    assert_eq!(partitioned(1 << 47, 1).set("IDR3", IDR3 | 1 << 7).tables().len(), 2);
    assert_eq!(partitioned(1 << 48, 0).set("IDR3", IDR3 | 1 << 7).tables().len(), 2);
    assert_eq!(partitioned(1 << 48, 1).tables().len(), 2, "of a unit without partitions");
}

/// With 64K pages, blocks of 4T are there where the unit has 52-bit addresses, whatever size a structure says.
#[test]
fn the_largest_blocks_depend_on_the_unit() {
    let lpa = |settings: Settings| (settings.get("output-bits"), settings.get("lpa"));
    // TG0 1; IPS 5.
    let with = |tg0: u64, ips: u64| stage1([CD[0] & !(3 << 6 | 7 << 32) | tg0 << 6 | ips << 32, CD[1], CD[2], CD[3]]);
    assert_eq!(lpa(with(1, 5).set("IDR5", IDR5_WIDE).settings()), (Some(48), Some(1)));
    assert_eq!(lpa(with(1, 6).set("IDR5", IDR5_WIDE).settings()), (Some(52), None), "that goes without saying");
    assert_eq!(lpa(with(0, 5).set("IDR5", IDR5_WIDE).settings()), (Some(48), None));
    assert_eq!(lpa(with(1, 5).settings()), (Some(48), None));
    let with = |tg: u64, ps: u64| case([0xd, 0, S2[0] & !(3 << 46 | 7 << 48) | tg << 46 | ps << 48, TABLE]);
    assert_eq!(lpa(with(1, 5).set("IDR5", IDR5_WIDE).settings()), (Some(48), Some(1)));
    assert_eq!(lpa(with(1, 6).set("IDR5", IDR5_WIDE).settings()), (Some(52), None));
    assert_eq!(lpa(with(0, 5).set("IDR5", IDR5_WIDE).settings()), (Some(48), None));
    assert_eq!(lpa(with(1, 5).settings()), (Some(48), None));
}

/// A request that no stage translates: beyond OAS, or behind a stage 1 that it bypasses beyond IAS, it is an address size fault; IHI 0070 section 3.4.
#[test]
fn addresses_of_requests_that_pass() {
    let told = |mut case: Case, iova: u64| {
        case.place();
        let event = Event { fault: FaultKind::AddressSize, format: None, iova, ..walk(FaultKind::AddressSize, Stage1::NAME) };
        Smmuv3::review_event(&case.registers(), event, &mut case.guest).unwrap().map(|event| event.name)
    };
    let fault = Some(Some("F_ADDR_SIZE".to_owned()));
    // OAS of 36 bits, and AArch32 tables: IAS has 40.
    let small = |case: Case| case.set("IDR5", IDR5 & !7 | 1).set("IDR0", IDR0 | 1 << 2);
    let plain = || small(case([9, 0, 0, 0]));
    assert_eq!([told(plain(), 1 << 35), told(plain(), 1 << 36), told(plain(), 1 << 40)], [None, fault.clone(), fault.clone()]);
    let bypasses = || small(case([0xb | CONTEXTS | 3 << 59, 0xd5, 0, 0]));
    assert_eq!([told(bypasses(), 1 << 36), told(bypasses(), 1 << 40)], [None, fault.clone()]);
    let gone = || plain().set("STRTAB_BASE_CFG", 0);
    assert_eq!([told(gone(), 1 << 36), told(gone(), 1 << 40)], [None, fault], "what no entry allows");
    assert_eq!(told(plain().set("CR0", 0), 1 << 40), None, "a disabled unit tells nothing");
}

/// The event of a walk of stream 5.
fn walk(fault: FaultKind, format: &str) -> Event {
    Event { fault, level: Some(3), entries: vec![1], ..event::unmapped(format, 5, 0x1000) }
}

/// E0PD0 and E0PD1: what unprivileged requests are told is a translation fault of stage 1, before any walk; IHI 0070 section 5.4.
#[test]
fn a_range_that_unprivileged_requests_may_not_use() {
    let review = |mut case: Case, event: Event| {
        case.place();
        Smmuv3::review_event(&case.registers(), event, &mut case.guest).unwrap().map(|event| (event.name, event.format))
    };
    let closed = |low: u64, high: u64| stage1([CD[0], CD[1] | low << 2, CD[2] | high << 2, CD[3]]);
    let told = Some((Some("F_TRANSLATION".to_owned()), Some(Stage1::NAME.to_owned())));
    let as_it_was = Some((None, Some(Stage1::NAME.to_owned())));
    let of = |fault| walk(fault, Stage1::NAME);
    for fault in [FaultKind::Permission, FaultKind::AccessFlag, FaultKind::AddressSize, FaultKind::Unreadable] {
        assert_eq!(review(closed(1, 0), of(fault)), told, "{fault:?}");
        assert_eq!(review(closed(0, 1), of(fault)), as_it_was, "{fault:?}: the other range");
        assert_eq!(review(closed(1, 0).set("IDR3", 0), of(fault)), as_it_was, "{fault:?}: not implemented");
        assert_eq!(review(closed(1, 0), Event { privileged: true, ..of(fault) }), as_it_was, "{fault:?}: privileged");
        assert_eq!(review(closed(0, 1), Event { iova: 0xffff_0000_0000_1000, ..of(fault) }), told, "{fault:?}");
    }
    let overridden = |privcfg: u64| {
        let mut case = closed(1, 0);
        case.ste[1] |= privcfg << 48;
        case
    };
    assert_eq!(review(overridden(2), Event { privileged: true, ..of(FaultKind::Permission) }), told, "PRIVCFG: none is privileged");
    assert_eq!(review(overridden(3), of(FaultKind::Permission)), as_it_was, "PRIVCFG: all are");
    // PnU and InD are those of the stream, whatever the request said (section 7.3).
    let of_request = |ste: u64, idr1: u64, event: Event| {
        let mut case = stage1(CD).set("IDR1", idr1);
        case.ste[1] |= ste;
        case.place();
        let event = Smmuv3::review_event(&case.registers(), event, &mut case.guest).unwrap().unwrap();
        (event.privileged, event.access)
    };
    let fetch = || Event { access: Access::Execute, privileged: true, ..of(FaultKind::Translation) };
    assert_eq!(of_request(0, IDR1, fetch()), (true, Access::Execute));
    assert_eq!(of_request(2 << 48, IDR1, fetch()), (false, Access::Execute));
    assert_eq!(of_request(3 << 48, IDR1, of(FaultKind::Translation)), (true, Access::Read));
    assert_eq!(of_request(2 << 50, IDR1, fetch()), (true, Access::Read));
    assert_eq!(of_request(2 << 50 | 2 << 48, IDR1 & !(1 << 26), fetch()), (true, Access::Execute), "nothing is overridden there");
    // R 45.
    let silent = stage1([CD[0] & !(1 << 45), CD[1] | 4, CD[2], CD[3]]);
    assert_eq!(review(silent, of(FaultKind::Unreadable)), None, "which is not recorded without R");
    // Stage 2 was never asked for a table.
    let mut both = nested();
    both.guest.write(CONTEXTS, &[CD[0], 0x8030_0004, 0, CD[3]]);
    let second = Event { reading_table: true, intermediate: Some(0x8030_0000), ..walk(FaultKind::Translation, Stage2::NAME) };
    assert_eq!(review(both, second), told);
}

/// Stage 2 that maps 1 GiB of IPA at 0x8000_0000 to 0x4000_0000, with a 1G block. Returns an STE with both stages, its CD at the IPA.
fn nested() -> Case {
    let mut case = case([0xf | 0x8010_0000, 0xd6, S2[0] & !(0xff << 32) | 25 << 32 | 1 << 38, TABLE]);
    case.guest.write(TABLE, &[0, 0, 0x4000_07fd]);
    case.guest.write(TABLE + 0x1000, &[0]);
    case.guest.write(CONTEXTS, &[CD[0], 0x8030_0000, 0, CD[3]]);
    case
}

#[test]
fn both_stages() {
    let [one, two] = nested().tables().try_into().unwrap();
    assert_eq!((one.format.as_str(), one.settings.get("root")), (Stage1::NAME, Some(0x8030_0000)), "stage 1 first");
    assert_eq!((two.format.as_str(), two.settings.get("root")), (Stage2::NAME, Some(TABLE)));
    let mut case = nested();
    case.place();
    Smmuv3::lookup(&case.registers(), Requester { id: 5, pasid: None }, &mut case.guest).unwrap();
    assert_eq!(case.guest.reads_through, 1, "the context descriptor is behind stage 2");

    let mut hole = nested();
    hole.guest.write(TABLE, &[0, 0, 0]);
    assert_eq!(hole.event(), "F_CD_FETCH");
    let mut unreadable = nested();
    unreadable.guest.write(TABLE, &[0, 0, 0x4000_07fd & !0x40]);
    assert_eq!(unreadable.event(), "F_CD_FETCH", "stage 2 forbids reading");

    let mut two_levels = nested();
    two_levels.ste[0] |= 1 << 4 | 8 << 59;
    two_levels.guest.write(CONTEXTS, &[0x8010_1001]);
    two_levels.guest.write(CONTEXTS + 0x1000 + 64 * 7, &CD);
    two_levels.place();
    let registers = two_levels.registers();
    assert_eq!(Smmuv3::pasids(&registers, 5, &mut two_levels.guest).unwrap(), [7]);
    assert_eq!(two_levels.pasid(7).tables().len(), 2);

    let mut bypass = nested();
    bypass.ste[0] |= 3 << 59;
    bypass.ste[1] = 0xd5;
    let [only] = bypass.tables().try_into().unwrap();
    assert_eq!(only.format, Stage2::NAME, "requests without PASID bypass stage 1 and not stage 2");
}

#[test]
fn offers_of_a_real_unit() {
    let info = |idr0: u32, idr5: u32| -> Vec<u8> { [0, 0, idr0, 0, 0, 0, 0, idr5, 0, 0].iter().flat_map(|word: &u32| word.to_le_bytes()).collect() };
    let limit = |idr0, idr5, name: &str| {
        let [offer] = Smmuv3::offers(2, &info(idr0, idr5)).unwrap().try_into().unwrap();
        assert_eq!(offer.format, Stage1::NAME, "stage 2 belongs to the kernel");
        offer.limits.iter().find(|(n, _)| n == name).map(|(_, value)| *value)
    };
    assert_eq!(limit(11, 0x54, "granule"), Some(4096 + 65536));
    assert_eq!((limit(11, 0x74, "input-bits"), limit(11, 0x476, "input-bits")), (Some(48), Some(52)));
    assert_eq!((limit(11, 0x74, "output-bits"), limit(11, 0x476, "output-bits")), (Some(44), Some(52)));
    assert_eq!((limit(11, 0x74, "big-endian"), limit(11 | 2 << 21, 0x74, "big-endian")), (Some(1), Some(0)));
    assert_eq!((limit(11, 0x74, "lpa"), limit(11, 0x476, "lpa")), (Some(0), Some(1)));
    assert_eq!((limit(11, 0x74, "lpa2"), limit(11, 0x74, "hardware-dirty")), (Some(0), Some(0)));
    assert_eq!(Smmuv3::offers(2, &info(7, 0x74)), Ok(vec![]), "AArch32 only");
    assert_eq!(Smmuv3::offers(2, &info(0x0d44_1019, 0x74)), Ok(vec![]), "no stage 1");
    let conditions = |idr0, flags: u32| {
        let mut info = info(idr0, 0x74);
        info[..4].copy_from_slice(&flags.to_le_bytes());
        Smmuv3::offers(2, &info).unwrap()[0].conditions.len()
    };
    assert_eq!([conditions(0x0d44_101b, 0), conditions(0x0d44_101b, 1), conditions(0x0d44_100b, 1)], [0, 1, 2], "coherent; the erratum; neither");
    assert!(matches!(Smmuv3::offers(1, &info(8, 0x74)), Err(Error::Unsupported(_))));
    assert!(matches!(Smmuv3::offers(2, &info(8, 0x74)[..39]), Err(Error::Invalid(_))));
    assert!(matches!(Smmuv3::offers(2, &[]), Err(Error::Invalid(_))));
}

#[test]
fn what_the_kernel_is_told_leads_back_to_the_table() {
    let pairs: &[&[(&str, u64)]] = &[
        &[("granule", 4096), ("input-bits", 48), ("output-bits", 44), ("root", TABLE)],
        &[
            ("granule", 65536),
            ("input-bits", 42),
            ("output-bits", 48),
            ("root", TABLE),
            ("granule-high", 16384),
            ("input-bits-high", 36),
            ("root-high", 0x5000_0000),
            ("tbi-high", 1),
            ("hierarchy-disabled-high", 1),
            ("mair", 0x44ff),
            ("lpa", 1),
            ("wxn", 1),
        ],
        &[
            ("granule", 4096),
            ("input-bits", 52),
            ("output-bits", 52),
            ("root", TABLE),
            ("non-shareable", 1),
            ("hardware-access", 1),
            ("hardware-dirty", 1),
            ("big-endian", 1),
            ("lpa2", 1),
            ("pan", 1),
        ],
        &[
            ("granule", 16384),
            ("input-bits", 47),
            ("output-bits", 40),
            ("low-disabled", 1),
            ("granule-high", 16384),
            ("input-bits-high", 47),
            ("root-high", TABLE),
            ("unprivileged-disabled-high", 1),
            ("access-flag-disabled", 1),
        ],
    ];
    for pairs in pairs {
        let table = TableConfig::new(Stage1::NAME, pairs);
        let binding = Smmuv3::bind_data(&table, &place(CONTEXTS, 0)).unwrap();
        assert_eq!((binding.kind, binding.data.len(), binding.context.len()), (2, 16, 64));
        let words = |bytes: &[u8]| bytes.chunks(8).map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap())).collect::<Vec<u64>>();
        let ste = words(&binding.data);
        assert_eq!(ste, [0xb | CONTEXTS, 0xd6], "only bits that the kernel takes");
        let mut case = case([ste[0], ste[1], 0, 0]).set("IDR5", IDR5_WIDE);
        case.guest.write(CONTEXTS, &words(&binding.context));
        assert_eq!(case.settings(), table.settings, "lookup finds what was bound");
    }
    let asid = Smmuv3::bind_data(&TableConfig::new(Stage1::NAME, &[]), &place(CONTEXTS, 0x1234)).unwrap();
    assert_eq!(asid.context[6..8], [0x34, 0x12]);
    for address in [CONTEXTS + 32, 1 << 52] {
        assert!(matches!(Smmuv3::bind_data(&TableConfig::new(Stage1::NAME, &[]), &place(address, 0)), Err(Error::Invalid(_))));
    }
    for (format, pairs) in [(Stage2::NAME, &[][..]), ("other/table", &[]), (Stage1::NAME, &[("privileged", 1)])] {
        assert!(matches!(Smmuv3::bind_data(&TableConfig::new(format, pairs), &place(CONTEXTS, 0)), Err(Error::Unsupported(_))));
    }
}

fn place(context_address: u64, space: u32) -> PlaceToBind {
    PlaceToBind { context_address, space, ..PlaceToBind::default() }
}

/// IHI 0070 section 4.4: CMD_TLBI_NH_VA 0x12, NH_ASID 0x11, NH_ALL 0x10; ASID 63:48, NUM 16:12, SCALE 24:20; Leaf 0, TG 11:10.
#[test]
fn invalidations_are_commands_that_the_kernel_takes() {
    let recipe = |idr0: u32, idr3: u32, space: u32, host_made: bool, settings: &[(&str, u64)]| {
        let mut info = [0_u32; 10];
        (info[2], info[5]) = (idr0, idr3);
        let info = info.iter().flat_map(|word| word.to_le_bytes()).collect();
        let to = PlaceToBind { kind: 2, info, context_address: CONTEXTS, space, host_made };
        Smmuv3::bind_data(&TableConfig::new(Stage1::NAME, settings), &to).map(|binding| binding.invalidation.unwrap())
    };
    let plain = recipe(1 << 12, 0, 0x1234, true, &[]).unwrap();
    assert_eq!((plain.data_type, plain.target, plain.page_log2), (1, InvalidationTarget::Viommu, 12));
    assert_eq!((plain.page, plain.address), (vec![0x1234_0000_0000_0012, 0], Place { word: 1, lsb: 12, width: 52, number_lsb: 12 }));
    assert_eq!((plain.leaf, plain.tables), (vec![0, 1], Some(vec![0, 0])));
    assert_eq!((plain.everything, plain.range), (vec![0x1234_0000_0000_0011, 0], None));
    // Global entries stay where an ASID is named: a guest's own table can have some.
    assert_eq!(recipe(1 << 12, 0, 5, false, &[]).unwrap().everything, [0x10, 0]);
    let ranges = recipe(1 << 12, 1 << 10, 5, true, &[("granule", 65536)]).unwrap();
    let (number, scale) = (Place { word: 0, lsb: 12, width: 5, number_lsb: 0 }, Place { word: 0, lsb: 20, width: 5, number_lsb: 0 });
    assert_eq!(ranges.range, Some(RangeEntry { words: vec![5 << 48 | 0x12, 3 << 10], extent: Extent::Scaled { number, scale } }));
    assert_eq!((ranges.page_log2, ranges.address.lsb), (16, 16));
    // Two halves with different granules have no common one to give.
    let mixed = recipe(1 << 12, 1 << 10, 5, true, &[("granule", 65536), ("input-bits-high", 48), ("root-high", TABLE), ("granule-high", 4096)]);
    assert_eq!(mixed.map(|mixed| (mixed.page_log2, mixed.range)), Ok((12, None)));
    assert!(matches!(recipe(0, 0, 0x100, true, &[]), Err(Error::Invalid(_))), "8-bit ASIDs");
    assert!(recipe(0, 0, 0xff, true, &[]).is_ok() && recipe(1 << 12, 0, 0x1_0000, true, &[]).is_err());
}

/// Bits that decide much, and noise in all others.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![any::<u64>(), (any::<u64>(), any::<u64>()).prop_map(|(a, b)| a & b), Just(0), Just(u64::MAX)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Hostile structures lead to an answer, and every table of an answer opens.
    #[test]
    fn any_structures_have_an_answer(
        ste in prop::array::uniform8(word()), cd in prop::array::uniform8(word()), config in 4_u64..8, idr in prop::array::uniform4(word()), pasid in any::<Option<u32>>(),
        wild in any::<bool>(),
    ) {
        let mut case = nested();
        let keep = 0x000f_ffff_ffff_ffc0;
        case.ste = ste;
        case.ste[0] = (ste[0] & !keep & !0xf) | 1 | config << 1 | if config & 2 != 0 { 0x8010_0000 } else { CONTEXTS };
        if config & 2 != 0 && !wild { case.ste[2..4].copy_from_slice(&nested().ste[2..4]) }
        let cd0 = if wild { cd[0] } else { cd[0] & !(0x3f | 0x3f << 16) | 1 << 31 | 1 << 41 | 25 | 30 << 16 };
        case.guest.write(CONTEXTS, &cd);
        case.guest.write(CONTEXTS, &[cd0]);
        if wild {
            for (name, value) in ["IDR0", "IDR1", "IDR3", "IDR5"].into_iter().zip(idr) { case = case.set(name, value) }
        }
        case.place();
        let registers = case.registers();
        if let Ok(Outcome::Tables(Translated { tables, .. })) = Smmuv3::lookup(&registers, Requester { id: 5, pasid }, &mut case.guest) {
            for table in tables {
                let opened = if table.format == Stage1::NAME { Stage1::open(&table.settings).map(|f| f.geometry()) } else { Stage2::open(&table.settings).map(|f| f.geometry()) };
                prop_assert!(opened.is_ok(), "{:?} {:?}", opened, table);
            }
        }
        let pasids = Smmuv3::pasids(&registers, 5, &mut case.guest);
        prop_assert!(pasids.is_err() || pasids.unwrap().len() <= 1024);
        prop_assert!(case.guest.reads + case.guest.reads_through <= 4300);
    }

    /// Registers are the VMM's, and yet none of them makes the plugin panic.
    #[test]
    fn any_registers_have_an_answer(values in prop::array::uniform8(word()), id in word(), pasid in any::<Option<u32>>()) {
        let names = ["IDR0", "IDR1", "IDR3", "IDR5", "STRTAB_BASE", "STRTAB_BASE_CFG", "CR2", "GBPA"];
        let mut guest = nested().guest;
        let registers = names.into_iter().zip(values).chain([("CR0", 1)]).map(|(name, value)| (name.to_owned(), value)).collect();
        let _ = Smmuv3::lookup(&registers, Requester { id, pasid }, &mut guest);
        let _ = Smmuv3::pasids(&registers, id, &mut guest);
    }

    /// What the kernel says about its hardware is taken or refused.
    #[test]
    fn any_information_has_an_answer(kind in 0_u32..4, info in prop::collection::vec(any::<u8>(), 0..80)) {
        let _ = Smmuv3::offers(kind, &info);
    }
}

#[test]
fn address_spaces_are_named_by_vmid_and_asid() {
    let tag = |case: Case| match case.lookup() {
        Ok(Outcome::Tables(Translated { tag: Tag { domain, space }, .. })) => (domain, space),
        other => panic!("{other:?}"),
    };
    let cd = |asid: u64| [CD[0] & !(0xffff << 48) | asid << 48, CD[1], CD[2], CD[3]];
    let with_vmid = |mut case: Case, vmid| {
        case.ste[2] = case.ste[2] & !0xffff | vmid;
        case
    };
    let both_stages = IDR0 | 3 | 1 << 12 | 1 << 18;
    assert_eq!(tag(with_vmid(stage1(cd(0x1234)), 0x56).set("IDR0", both_stages)), (Some(0x56), Some(0x1234)));
    assert_eq!(tag(with_vmid(stage1(cd(0x12)), 0x56).set("IDR0", both_stages & !1)), (None, Some(0x12)), "no stage 2, no VMID");
    let second = case([0xd, 0, S2[0] & !0xffff | 0x789, S2[1]]).set("IDR0", both_stages);
    assert_eq!(tag(second), (Some(0x789), None));
    // EL2 has one privilege level and no ASID, EL2-E2H has.
    let el2 = |cr2| {
        let mut case = stage1(cd(0x1234)).set("IDR0", both_stages | 1 << 9).set("CR2", cr2);
        case.ste[1] |= 2 << 30;
        tag(case)
    };
    assert_eq!((el2(0), el2(1)), ((None, None), (None, Some(0x1234))));
}

#[test]
fn streams_that_nobody_set_up_are_unused() {
    let kind = |case: Case| match case.lookup() {
        Ok(Outcome::Blocked(blocked)) => blocked.kind,
        other => panic!("{other:?}"),
    };
    assert_eq!(kind(case([0; 4])), BlockKind::Unused, "not valid");
    assert_eq!(kind(case([1, 0, 0, 0])), BlockKind::Unused, "Config abort");
    assert_eq!(kind(case([0; 4]).set("CR0", 0).set("GBPA", 1 << 20)), BlockKind::Unused, "off");
    assert_eq!(kind(case([0; 4]).set("STRTAB_BASE_CFG", 2)), BlockKind::Unused, "beyond the stream table");
    assert_eq!(kind(stage1([CD[0] & !(1 << 31), 0, 0, 0])), BlockKind::Unused, "no context descriptor");
    assert_eq!(kind(stage1([CD[0] & !(1 << 41), CD[1], CD[2], CD[3]])), BlockKind::Refused, "AArch32");
    assert_eq!(kind(case([0xb | 1 << 55, 0xd6, 0, 0])), BlockKind::Refused, "an address beyond the address size");
}

impl Case {
    fn warnings(mut self) -> Vec<(u64, u8, u64)> {
        self.place();
        let registers = self.registers();
        let mut memory = notes::Noting::new(self.guest);
        let outcome = Smmuv3::lookup(&registers, Requester { id: self.id, pasid: self.pasid }, &mut memory);
        assert!(matches!(outcome, Ok(Outcome::Tables(_))), "{outcome:?}");
        memory.warnings()
    }
}

const STE: u64 = STREAMS + 5 * 64;

#[test]
fn nothing_is_noted_about_what_linux_writes() {
    assert_eq!(stage1(CD).warnings(), []);
    assert_eq!(case([0xd, 0, S2[0], S2[1]]).warnings(), []);
}

#[test]
fn reserved_bits_of_stream_table_entries_are_noted() {
    let word = |word: usize, bits: u64| {
        let mut case = stage1(CD);
        case.ste[word] |= bits;
        case
    };
    for (index, bits) in [(0, 7 << 56), (1, 7 << 41), (3, 0xfff << 52)] {
        assert_eq!(word(index, bits).warnings(), [(STE, index as u8, bits)]);
    }
    assert_eq!(word(3, 0xfff << 52).set("IDR5", IDR5).warnings().len(), 1);

    // Fields of features that the unit does not have, and the same with the feature.
    let (s1pie, fwb, eats) = (1 << 24, 1 << 25, 1 << 28);
    assert_eq!(word(1, s1pie | fwb).set("IDR3", IDR3 & !(1 << 8)).warnings(), [(STE, 1, s1pie | fwb)]);
    assert_eq!(word(1, fwb).warnings(), []);
    assert_eq!(word(1, eats).warnings(), []);
    assert_eq!(word(1, eats).set("IDR0", IDR0 & !(1 << 10)).warnings(), [(STE, 1, eats)]);
    let lpa2 = 1 << 2 | 1 << 3;
    assert_eq!(word(3, lpa2).warnings(), [(STE, 3, lpa2)]);
    assert_eq!(word(3, lpa2).set("IDR5", IDR5_WIDE).warnings(), []);
    let tables = 1 << 59;
    assert_eq!(word(2, tables).warnings(), [(STE, 2, tables)]);
}

#[test]
fn fields_of_context_descriptors_without_their_feature_are_noted() {
    let [w0, w1, w2, w3] = CD;
    // HAD and E0PD are there; HAFT, EPAN, AIE, DS and PIE are not.
    let word1 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 59;
    let word2 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 58 | 1 << 59;
    let expected = [(CONTEXTS, 1, 1 << 3 | 1 << 59), (CONTEXTS, 2, 1 << 3 | 1 << 58 | 1 << 59)];
    assert_eq!(stage1([w0, w1 | word1, w2 | word2, w3]).warnings(), expected);
    let expected = [(CONTEXTS, 1, word1), (CONTEXTS, 2, word2)];
    assert_eq!(stage1([w0, w1 | word1, w2 | word2, w3]).set("IDR3", 0).warnings(), expected);
}

#[test]
fn reserved_bits_of_level_1_descriptors_are_noted() {
    // Two levels of both: the stream's entry is found through a descriptor of the stream table, its CD through one of the CD table.
    let (streams, contexts) = (0x4030_0000, 0x4040_0000);
    let (odd_stream, odd_context) = (1 << 5 | 0xff << 56, 0x7ff << 1 | 0xff << 56);
    let mut case = stage1(CD).set("STRTAB_BASE", streams).set("STRTAB_BASE_CFG", 8 | 1 << 16 | 6 << 6);
    case.ste[0] = contexts | 1 << 59 | 1 << 4 | 0xb;
    case.ste[0] |= 6 << 59;
    case.ste[1] |= 2;
    case.guest.write(streams, &[STREAMS | 7 | odd_stream]);
    case.guest.write(contexts, &[CONTEXTS | 1 | odd_context]);
    assert_eq!(case.warnings(), [(streams, 0, odd_stream), (contexts, 0, odd_context)]);
}
