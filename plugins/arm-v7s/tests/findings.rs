//! What is said about entries with reserved bits: a table from the specification, and properties of all entries.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../../../sdk/testing/findings.rs"]
mod findings;

use findings::{Row, check_format};

use stagecraft_plugin_arm_v7s::short::Short;
use stagecraft_sdk::bits::mask;
use stagecraft_sdk::{FaultKind, Format};

fn open<F: Format>(settings: &[(&str, u64)]) -> F {
    F::open(&settings.iter().map(|&(name, value)| (name.to_owned(), value)).collect()).unwrap()
}

const TYPE: u64 = 3;
/// TEX, C and B choose a memory type of which some are reserved.
const SECTION_MEMORY: u64 = mask(14, 12) | 3 << 2;
const LARGE_MEMORY: u64 = mask(14, 12) | 3 << 2;
const SMALL_MEMORY: u64 = mask(8, 6) | 3 << 2;
const DOMAIN: u64 = mask(8, 5);

/// DDI 0406 section B3.5.1. Cached memory that all may read, write and execute, in domain 0. nG, S, NS, XN and implementation defined bits are nobody's
/// business here.
#[test]
fn all_entries() {
    for bits in 0..8_u64 {
        let flag = |bit: u64| bits >> bit & 1;
        let settings = [("access-flag", flag(0)), ("execute-never-privileged", flag(1)), ("supersections", flag(2)), ("split", 1)];
        let format: Short = open(&settings);
        let access = |row: Row, ap_0: u64, ap_2: u64| match flag(0) {
            1 => row.faults(ap_0, FaultKind::AccessFlag),
            // Without an access flag AP is an encoding of three bits; 0b111 is read-only.
            _ => row.other(ap_0 | ap_2),
        };
        let mut rows = vec![
            access(Row::new("small page", 0, 0x47e | 1 << 30).other(2 | SMALL_MEMORY), 1 << 4, 1 << 9),
            access(Row::new("large page", 0, 0x143d | 1 << 30).other(TYPE | LARGE_MEMORY), 1 << 4, 1 << 9).warnings(mask(8, 6)),
        ];
        for level in [1, 2] {
            let (pxn_fault, pxn_warning) = if flag(1) == 1 { (0, 0) } else { (1, 1 << 2) };
            let supersection = if flag(2) == 1 { 0 } else { 1 << 18 };
            let section = Row::new("section", level, 0x1_1c0e | 1 << 30).reserved(pxn_fault | supersection);
            rows.push(access(section.other(2 | SECTION_MEMORY), 1 << 10, 1 << 15));
            if flag(2) == 1 {
                // Bits 23:20 and 8:5 are further address bits.
                let large = Row::new("supersection", level, 0x5_1c0e | 1 << 30).reserved(pxn_fault);
                rows.push(access(large.other(2 | SECTION_MEMORY | DOMAIN | mask(23, 20) | 1 << 18), 1 << 10, 1 << 15));
            }
            rows.push(Row::new("table", level, 1 | 1 << 30).other(TYPE).warnings(1 << 4 | pxn_warning));
        }
        check_format(&format, &rows, &[0, 1, 2], &[SECTION_MEMORY, SMALL_MEMORY]);
    }
}

/// Section B3.7.3: domain 1 has no access, 3 is reserved; so is everything in them.
#[test]
fn domains() {
    let format: Short = open(&[("domains", 0x5555_5555 & !0xcc | 2 << 6)]);
    let rows = [
        Row::new("small page", 0, 0x47e).other(u64::MAX),
        Row::new("section", 1, 0x1_1c0e).other(!(1 << 5)).faults(1 << 5, FaultKind::Permission),
        Row::new("table", 1, 1).other(!(1 << 5)).faults(1 << 5, FaultKind::Permission),
    ];
    // Flipped, bit 5 is domain 1.
    check_format(&format, &rows, &[0], &[SECTION_MEMORY, SMALL_MEMORY, DOMAIN]);
    // Domain 0 itself.
    let none: Short = open(&[("domains", 0)]);
    for entry in [1, 0x1_1c0e] {
        findings::check_entry(&none, 1, 0, entry, &[DOMAIN]);
    }
}
