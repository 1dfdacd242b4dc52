//! What is said about entries with reserved bits: a table from the specification, and properties of all entries.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../../../sdk/testing/findings.rs"]
mod findings;

use findings::{Row, check_format};

use stagecraft_plugin_riscv_iommu::first_stage::FirstStage;
use stagecraft_plugin_riscv_iommu::second_stage::SecondStage;
use stagecraft_sdk::bits::mask;
use stagecraft_sdk::{FaultKind, Format};

fn open<F: Format>(settings: &[(&str, u64)]) -> F {
    F::open(&settings.iter().map(|&(name, value)| (name.to_owned(), value)).collect()).unwrap()
}

const U: u64 = 1 << 4;
const G: u64 = 1 << 5;
const A: u64 = 1 << 6;
const D: u64 = 1 << 7;
/// Valid, readable, writable, executable, for users, accessed and dirty.
const LEAF: u64 = 0xdf;
/// R, W and X choose what an entry is.
const KIND: u64 = 0xf;

/// Privileged sections 4.3.1 and 4.4.1, chapters 5 and 6: rows for entries of 8 bytes. Bits 9:8 are software's.
fn rows(napot: bool, memory_types: bool, software: bool, update: bool, second: bool, supervisor: bool) -> Vec<Row> {
    let reserved = if software { mask(58, 54) } else { mask(60, 54) };
    let global = if second { G } else { 0 };
    let mut rows = Vec::new();
    for level in 0..5_u8 {
        let unaligned = if level == 0 { 0 } else { mask(9 + 9 * level, 10) };
        // At the last level N chooses a size, if there is Svnapot: with these address bits it is a reserved one.
        let napot_bit = 1 << 63;
        let memory_type = mask(62, 61);
        let mut leaf = Row::new("leaf", level, LEAF | 1 << 52).reserved(reserved | napot_bit).warnings(global);
        // Either value alone is a memory type, if there is Svpbmt.
        leaf = if memory_types { leaf } else { leaf.reserved(memory_type) };
        leaf = leaf.faults(unaligned, FaultKind::Misaligned);
        leaf = if supervisor { leaf } else { leaf.faults(U, FaultKind::Permission) };
        leaf = if update { leaf } else { leaf.faults(A, FaultKind::AccessFlag) };
        rows.push(leaf.other(KIND));
        if level > 0 {
            let table = Row::new("table", level, 1 | 1 << 20);
            rows.push(table.other(KIND).reserved(reserved | napot_bit | memory_type | U | A | D).warnings(global));
        }
    }
    if napot {
        let leaf = Row::new("leaf of 64 KiB", 0, LEAF | 1 << 63 | 8 << 10).other(KIND | 1 << 63 | U | A | mask(62, 61));
        rows.push(leaf.reserved(reserved | mask(13, 10)).warnings(global));
    }
    rows
}

const FIELDS: &[u64] = &[1 << 63 | mask(13, 10)];

#[test]
fn eight_bytes() {
    for bits in 0..32_u64 {
        let flag = |bit: u64| bits >> bit & 1;
        let common = [("levels", 5), ("svnapot", flag(0)), ("svpbmt", flag(1)), ("svrsw60t59b", flag(2)), ("hardware-update", flag(3))];
        let rows = |second, supervisor| rows(flag(0) == 1, flag(1) == 1, flag(2) == 1, flag(3) == 1, second, supervisor);
        check_format(&open::<SecondStage>(&common), &rows(true, false), &[0], FIELDS);
        let first = [&common[..], &[("supervisor", flag(4))]].concat();
        check_format(&open::<FirstStage>(&first), &rows(false, flag(4) == 1), &[0], FIELDS);
    }
}

/// Sv32: bits 31:10 are the page number.
#[test]
fn four_bytes() {
    let rows = |global: u64| {
        vec![
            Row::new("leaf", 0, LEAF | 1 << 30).other(KIND).faults(U, FaultKind::Permission).faults(A, FaultKind::AccessFlag).warnings(global),
            Row::new("leaf of 4 MiB", 1, LEAF | 1 << 30)
                .other(KIND)
                .faults(mask(19, 10), FaultKind::Misaligned)
                .faults(U, FaultKind::Permission)
                .faults(A, FaultKind::AccessFlag)
                .warnings(global),
            Row::new("table", 1, 1 | 1 << 20).other(KIND).reserved(U | A | D).warnings(global),
        ]
    };
    check_format(&open::<FirstStage>(&[("levels", 2)]), &rows(0), &[0], &[]);
    check_format(&open::<SecondStage>(&[("levels", 2)]), &rows(G), &[0], &[]);
}
