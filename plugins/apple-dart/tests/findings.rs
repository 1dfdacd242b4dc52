//! What is said about entries with reserved bits: a table from the specification, and properties of all entries.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../../../sdk/testing/findings.rs"]
mod findings;

use findings::{Row, check_format};

use stagecraft_plugin_apple_dart::table::{Dart1, Dart2};
use stagecraft_sdk::Format;
use stagecraft_sdk::bits::mask;

fn open<F: Format>(settings: &[(&str, u64)]) -> F {
    F::open(&settings.iter().map(|&(name, value)| (name.to_owned(), value)).collect()).unwrap()
}

/// The first and the last part of a page that may be used.
const PART: u64 = mask(63, 40);

/// Drivers know these bits and no others: what else is set should not be. Nothing is known to fault.
#[test]
fn first_version() {
    for granule in [4096, 16384_u64] {
        let low = granule.trailing_zeros() as u8;
        // Valid, the whole page; reads and writes are refused by bits 8 and 7.
        let unknown = mask(39, 36) | mask(low - 1, 9) | mask(6, 2);
        let mut rows = vec![Row::new("page", 0, 3 | mask(51, 40) | 1 << 30).other(1 | 1 << 1).warnings(unknown)];
        for level in 1..3 {
            rows.push(Row::new("table", level, 1 | 1 << 30).other(1).warnings(mask(63, 36) | mask(low - 1, 1)));
        }
        check_format(&open::<Dart1>(&[("granule", granule), ("levels", 3)]), &rows, &[0], &[PART]);
    }
}

#[test]
fn second_version() {
    // Bits 3:1 are permissions and caching.
    let mut rows = vec![Row::new("page", 0, 1 | mask(51, 40) | 1 << 30).other(1 | PART).warnings(mask(39, 38) | mask(9, 4))];
    for level in 1..3 {
        rows.push(Row::new("table", level, 1 | 1 << 30).other(1).warnings(mask(63, 38) | mask(9, 1)));
    }
    check_format(&open::<Dart2>(&[("levels", 3)]), &rows, &[0], &[PART]);
}
