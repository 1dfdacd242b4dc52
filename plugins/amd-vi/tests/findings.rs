//! What is said about entries with reserved bits: a table from the specification, and properties of all entries.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../../../sdk/testing/findings.rs"]
mod findings;

use findings::{Row, check_format};

use stagecraft_plugin_amd_vi::v1::V1;
use stagecraft_plugin_amd_vi::v2::V2;
use stagecraft_sdk::Format;
use stagecraft_sdk::bits::mask;

fn open<F: Format>(settings: &[(&str, u64)]) -> F {
    F::open(&settings.iter().map(|&(name, value)| (name.to_owned(), value)).collect()).unwrap()
}

/// 48882 section 2.2.3: PR, and IR and IW.
const PRESENT: u64 = 1 | 3 << 61;
const NEXT_LEVEL: u64 = mask(11, 9);

/// Host tables. Bits 63, 8:7 and 4:1 are ignored; A and D (6:5) are marks or nothing. IR and IW are permissions.
#[test]
fn host_tables() {
    for settings in [&[("levels", 6)][..], &[("levels", 6), ("update-accessed", 1), ("update-dirty", 1), ("next-level-7", 1)]] {
        let mut rows = Vec::new();
        for level in 0..5_u8 {
            let slot = 12 + 9 * level;
            // The address of a leaf of the level's own size begins at that size; bits below are not looked at.
            let below = if level == 0 { 0 } else { mask(slot - 1, 12) };
            rows.push(Row::new("leaf", level, PRESENT | 1 << 51).other(1 | NEXT_LEVEL).reserved(mask(58, 52)).warnings(below));
            // A size that the address bits code: here twice the level's own, with zeroes from bit `slot` upwards.
            let sized = PRESENT | 7 << 9 | below;
            rows.push(Row::new("leaf with a size of its own", level, sized).other(1 | NEXT_LEVEL | mask(51, 12)).reserved(mask(58, 52)));
        }
        for level in 1..6_u8 {
            for next in 1..=u64::from(level) {
                let entry = PRESENT | next << 9 | 1 << 20;
                rows.push(Row::new("table", level, entry).other(1 | NEXT_LEVEL).reserved(mask(60, 52)));
            }
        }
        check_format(&open::<V1>(settings), &rows, &[0, 1, 2, 3], &[NEXT_LEVEL | mask(51, 12)]);
    }
}

/// Guest tables, section 2.2.6: as processors have them.
#[test]
fn guest_tables() {
    for settings in [&[("levels", 5)][..], &[("levels", 5), ("no-execute", 1), ("update-accessed", 0)], &[("levels", 5), ("page-1g", 0)]] {
        let page_1g = !settings.contains(&("page-1g", 0));
        let mut rows = vec![Row::new("page", 0, 0x67 | 1 << 40).other(1)];
        // PS makes a table a page where there are such pages, and the other way round.
        rows.push(Row::new("page of 2 MiB", 1, 0xe7 | 1 << 40).other(1 | 1 << 7).reserved(mask(20, 13)));
        rows.push(Row::new("table", 1, 0x27 | 1 << 20).other(1 | 1 << 7));
        if page_1g {
            rows.push(Row::new("page of 1 GiB", 2, 0xe7 | 1 << 40).other(1 | 1 << 7).reserved(mask(29, 13)));
            rows.push(Row::new("table", 2, 0x27 | 1 << 20).other(1 | 1 << 7));
        } else {
            rows.push(Row::new("table", 2, 0x27 | 1 << 20).other(1).reserved(1 << 7));
        }
        for level in 3..5 {
            rows.push(Row::new("table", level, 0x27 | 1 << 20).other(1).reserved(mask(8, 7)));
        }
        check_format(&open::<V2>(settings), &rows, &[0, 1, 2, 4, 8, 15], &[]);
    }
}
