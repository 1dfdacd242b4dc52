//! What is said about entries with reserved bits: a table from the specification, and properties of all entries.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../../../sdk/testing/findings.rs"]
mod findings;

use findings::{Row, check_format};

use stagecraft_plugin_s390_zpci::dma::Dma;
use stagecraft_sdk::Format;
use stagecraft_sdk::bits::mask;

fn open<F: Format>(settings: &[(&str, u64)]) -> F {
    F::open(&settings.iter().map(|&(name, value)| (name.to_owned(), value)).collect()).unwrap()
}

/// Kind of the table that an entry is in, and which part of the next table exists.
const TYPE: u64 = mask(3, 2);
const PART: u64 = mask(7, 6) | mask(1, 0);

/// SA22-7832 chapter 3, as far as it holds for I/O. The protection bit (9) is a permission; bits 8:0 of a page table entry are free.
#[test]
fn all_tables() {
    for partial in [0, 1] {
        for frames in [0, 1] {
            let mut rows = vec![Row::new("page", 0, 1 << 40).other(1 << 10).warnings(1 << 11)];
            // Bits 8:6, 4 and 1:0 of a segment table entry are not assigned.
            let unassigned = mask(8, 6) | 1 << 4 | mask(1, 0);
            if frames == 1 {
                // Bits 19:11 of a frame mean something to processors only.
                let frame = Row::new("frame of 1 MiB", 1, 1 << 10 | 1 << 40);
                rows.push(frame.other(1 << 5 | 1 << 10 | mask(19, 11)).reserved(TYPE).warnings(unassigned));
                rows.push(Row::new("segment", 1, 1 << 20).other(1 << 5 | 1 << 10).reserved(TYPE).warnings(unassigned));
            } else {
                rows.push(Row::new("segment", 1, 1 << 20).other(1 << 5).reserved(TYPE | 1 << 10).warnings(unassigned));
            }
            for level in 2..5_u8 {
                let entry = u64::from(level - 1) << 2 | 3 | 1 << 20;
                // Bits 13:12 are the origin's where a table may begin at any page.
                let origin = if partial == 1 { 0 } else { mask(13, 12) };
                let region = Row::new("region", level, entry).warnings(origin | mask(11, 10) | 1 << 8 | 1 << 4);
                // With partial tables any offset that is not above the length is good.
                rows.push(if partial == 1 { region.other(1 << 5 | PART).reserved(TYPE) } else { region.other(1 << 5).reserved(TYPE | PART) });
            }
            check_format(&open::<Dma>(&[("levels", 5), ("partial-tables", partial), ("page-1m", frames)]), &rows, &[0, 1], &[TYPE, PART]);
        }
    }
}
