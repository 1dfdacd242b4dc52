//! What is said about entries with reserved bits: a table from the specification, and properties of all entries.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../../../sdk/testing/findings.rs"]
mod findings;

use findings::{Row, check_format};

use stagecraft_plugin_loongarch::paging::Paging;
use stagecraft_sdk::Format;
use stagecraft_sdk::bits::mask;

fn open<F: Format>(settings: &[(&str, u64)]) -> F {
    F::open(&settings.iter().map(|&(name, value)| (name.to_owned(), value)).collect()).unwrap()
}

/// Volume 1 section 5.4.5. A user's page: valid, dirty, cached, present, writable. PLV (3:2) and MAT (5:4) are encodings, of which MAT 3 is reserved.
#[test]
fn all_tables() {
    for granule in [4096, 16384, 65536_u64] {
        for update in [0, 1] {
            let log2 = granule.trailing_zeros() as u8;
            let slot = |level: u8| log2 + level * (log2 - 3);
            let levels = 3;
            let format: Paging = open(&[("granule", granule), ("levels", levels.into()), ("hardware-update", update)]);
            let present = if update == 1 { 1 << 7 } else { 1 };
            // Bits between the highest address bit and NR, which nobody has assigned.
            let unassigned = mask(60, 48);
            let between = if log2 > 12 { mask(log2 - 1, 12) } else { 0 };
            // RPLV with user level is nothing that hardware minds; with one of the memory type's bits flipped there is none or another.
            let page = Row::new("page", 0, 0x19f | 1 << 40).other(present | mask(5, 4)).warnings(between | unassigned | 1 << 63);
            let mut rows = vec![page];
            for level in 1..levels {
                if slot(level) <= 40 {
                    // Bit 12 is where G went.
                    let huge = Row::new("huge page", level, 0x1df | 1 << 47).other(present | 1 << 6 | mask(5, 4));
                    rows.push(huge.warnings(mask(slot(level) - 1, 13) | unassigned | 1 << 63));
                }
                // Without HUGE it is a table, whatever else; kernels keep their own addresses in bits 63:48.
                rows.push(Row::new("table", level, 1 << 20).other(1 << 6).reserved(mask(log2 - 1, 0) & !(1 << 6)));
            }
            check_format(&format, &rows, &[0], &[mask(5, 4)]);
        }
    }
}
