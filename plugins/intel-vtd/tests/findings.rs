//! What is said about entries with reserved bits: a table from the specification, and properties of all entries.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../../../sdk/testing/findings.rs"]
mod findings;

use findings::{Row, check_format};

use stagecraft_plugin_intel_vtd::first_stage::FirstStage;
use stagecraft_plugin_intel_vtd::second_stage::SecondStage;
use stagecraft_sdk::Format;
use stagecraft_sdk::bits::mask;

fn open<F: Format>(settings: &[(&str, u64)]) -> F {
    F::open(&settings.iter().map(|&(name, value)| (name.to_owned(), value)).collect()).unwrap()
}

/// D51397 section 9.7, tables 34 to 40.
#[test]
fn first_stage() {
    for settings in [&[("levels", 5)][..], &[("levels", 5), ("extended-access", 1), ("memory-type", 1)], &[("levels", 5), ("page-1g", 0)]] {
        let page_1g = !settings.contains(&("page-1g", 0));
        let mut rows = vec![
            Row::new("page", 0, 0x67 | 1 << 40).other(1),
            Row::new("page of 2 MiB", 1, 0xe7 | 1 << 40).other(1 | 1 << 7).reserved(mask(20, 13)),
            Row::new("table", 1, 0x27 | 1 << 20).other(1 | 1 << 7),
        ];
        if page_1g {
            rows.push(Row::new("page of 1 GiB", 2, 0xe7 | 1 << 40).other(1 | 1 << 7).reserved(mask(29, 13)));
            rows.push(Row::new("table", 2, 0x27 | 1 << 20).other(1 | 1 << 7));
        } else {
            rows.push(Row::new("table", 2, 0x27 | 1 << 20).other(1).reserved(1 << 7));
        }
        for level in 3..5 {
            rows.push(Row::new("table", level, 0x27 | 1 << 20).other(1).reserved(1 << 7));
        }
        check_format(&open::<FirstStage>(settings), &rows, &[0, 1, 2, 3], &[]);
    }
}

/// D51397 section 9.8, tables 41 to 47. An entry is present if it allows anything; one of two permissions may be flipped.
#[test]
fn second_stage() {
    for snoop in [0, 1] {
        for io in [0, 1] {
            for large in [0, 1] {
                let settings = [
                    ("levels", 5),
                    ("snoop-control", snoop),
                    ("io-permissions", io),
                    ("accessed-dirty", snoop),
                    ("page-2m", large),
                    ("page-1g", large),
                ];
                let allowed = if io == 1 { 3 << 61 } else { 3 };
                // Bit 62 is a permission with I/O permissions only, and reserved otherwise; bit 61 is ignored then.
                let io_write = if io == 1 { 0 } else { 1 << 62 };
                let snoop_bit = if snoop == 1 { 0 } else { 1 << 11 };
                let mut rows = vec![Row::new("page", 0, allowed | 1 << 40).reserved(io_write | snoop_bit)];
                for (level, low) in [(1, 20), (2, 29)] {
                    let table = Row::new("table", level, allowed | 1 << 20);
                    if large == 1 {
                        let leaf = Row::new("large page", level, allowed | 1 << 7 | 1 << 40).other(1 << 7);
                        rows.push(leaf.reserved(io_write | snoop_bit | mask(low, 12)));
                        rows.push(table.other(1 << 7).reserved(io_write | 1 << 11));
                    } else {
                        rows.push(table.reserved(io_write | 1 << 11 | 1 << 7));
                    }
                }
                for level in 3..5 {
                    rows.push(Row::new("table", level, allowed | 1 << 20).reserved(io_write | 1 << 11 | 1 << 7));
                }
                check_format(&open::<SecondStage>(&settings), &rows, &[0, 1, 2, 3], &[]);
            }
        }
    }
}
