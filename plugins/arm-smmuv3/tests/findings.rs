//! What is said about entries with reserved bits: a table from the specification, and properties of all entries.
#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../../../sdk/testing/findings.rs"]
mod findings;

use findings::{Row, check_format};

use stagecraft_plugin_arm_smmuv3::{Stage1, Stage2};
use stagecraft_sdk::bits::mask;
use stagecraft_sdk::{FaultKind, Format};

fn open<F: Format>(settings: &[(&str, u64)]) -> F {
    F::open(&settings.iter().map(|&(name, value)| (name.to_owned(), value)).collect()).unwrap()
}

const AF: u64 = 1 << 10;
const SH: u64 = mask(9, 8);

/// A granule, whether addresses have 52 bits, and the settings for it; the first level and the levels that have blocks.
struct Shape {
    granule: u64,
    lpa2: bool,
    output_bits: u64,
    input_bits: u64,
    first: i8,
    blocks: &'static [i8],
}

const SHAPES: [Shape; 6] = [
    Shape { granule: 4096, lpa2: false, output_bits: 48, input_bits: 48, first: 0, blocks: &[1, 2] },
    Shape { granule: 4096, lpa2: true, output_bits: 52, input_bits: 52, first: -1, blocks: &[0, 1, 2] },
    Shape { granule: 16384, lpa2: false, output_bits: 48, input_bits: 47, first: 1, blocks: &[2] },
    Shape { granule: 16384, lpa2: true, output_bits: 52, input_bits: 52, first: 0, blocks: &[1, 2] },
    Shape { granule: 65536, lpa2: false, output_bits: 48, input_bits: 48, first: 1, blocks: &[2] },
    Shape { granule: 65536, lpa2: false, output_bits: 52, input_bits: 52, first: 1, blocks: &[1, 2] },
];

impl Shape {
    fn settings(&self) -> Vec<(&'static str, u64)> {
        let mut list = vec![("granule", self.granule), ("output-bits", self.output_bits), ("input-bits", self.input_bits)];
        if self.lpa2 {
            list.push(("lpa2", 1));
        }
        list
    }

    /// DDI 0487 section D8.3.1, tables D8-50 to D8-53: reserved bits around the address of a block or page of level `number`. Bit 50 of stage 1 is GP,
    /// bit 16 of a block nT. With LPA2 bits 49:48 and 9:8 are address; with 64K bits 15:12 are.
    fn around(&self, number: i8, table: bool) -> u64 {
        let log2 = self.granule.trailing_zeros() as u8;
        let slot = if table { log2 } else { log2 + (3 - number) as u8 * (log2 - 3) };
        let high = if self.lpa2 { 0 } else { mask(49, 48) };
        let below = if slot > 12 { mask(slot - 1, 12) } else { 0 };
        let below = if log2 == 16 { below & !mask(15, 12) } else { below };
        high | if table || number == 3 { below } else { below & !(1 << 16) }
    }

    /// All rows: `leaf` a good page without its type, `encodings` its fields of several bits, `table` the reserved bits of a table besides those around
    /// the address.
    fn rows(&self, leaf: u64, encodings: u64, flags: bool, table: u64) -> Vec<Row> {
        let mut rows = Vec::new();
        for number in self.first..=3 {
            let level = (number - self.first) as u8;
            let sh = if self.lpa2 { 0 } else { SH };
            let leaf = if self.lpa2 { leaf & !SH } else { leaf };
            let access = |row: Row| if flags { row } else { row.faults(AF, FaultKind::AccessFlag) };
            if number == 3 {
                // 0b01 at level 3 is invalid.
                let page = Row::new("page", level, leaf | 3).faults(2, FaultKind::Translation);
                rows.push(access(page.other(1 | encodings | sh).warnings(self.around(3, false))));
                continue;
            }
            let row = Row::new("table", level, 3).warnings(self.around(number, true) | 1 << 50 | table);
            // A block where there is none is invalid.
            if self.blocks.contains(&number) {
                rows.push(row.other(3));
                rows.push(access(Row::new("block", level, leaf | 1).other(3 | encodings | sh).warnings(self.around(number, false))));
            } else {
                rows.push(row.other(1).faults(2, FaultKind::Translation));
            }
        }
        rows
    }
}

/// What findings may name whole: the type, a memory attribute, shareability.
const FIELDS: &[u64] = &[3, mask(4, 2), mask(5, 2), SH];

#[test]
fn stage_1() {
    for shape in &SHAPES {
        for flags in [0, 1] {
            let mut settings = shape.settings();
            settings.extend([("hardware-access", flags), ("hardware-dirty", flags)]);
            // Write-back, inner shareable, accessed. All of MAIR's bytes are good.
            let rows = shape.rows(AF | SH, 0, flags == 1, 0);
            check_format(&open::<Stage1>(&settings), &rows, &[0, 1, 2, 4, 8, 15], FIELDS);
        }
    }
}

/// IHI 0070 section 5.4: byte 0 of this MAIR is write-back, all others are reserved values.
#[test]
fn reserved_memory_attributes() {
    let format: Stage1 = open(&[("mair", 0x0102_0370_f010_80ff)]);
    for index in 0..8_u64 {
        let entry = AF | SH | 3 | index << 2;
        findings::check_entry(&format, 3, 0, entry, FIELDS);
        let (_, said) = findings::ask(&format, 3, 0, entry);
        assert_eq!(said.len(), usize::from(index != 0), "{index}: {said:?}");
    }
}

#[test]
fn stage_2() {
    for shape in &SHAPES {
        for flags in [0, 1] {
            let mut settings = shape.settings();
            settings.extend([("hardware-access", flags), ("hardware-dirty", flags)]);
            // Write-back, readable and writable. MemAttr is an encoding. A table restricts nothing: bits 63:59 are reserved.
            let rows = shape.rows(AF | SH | 0xfc, mask(5, 2), flags == 1, mask(63, 59));
            check_format(&open::<Stage2>(&settings), &rows, &[0], FIELDS);
        }
    }
}
