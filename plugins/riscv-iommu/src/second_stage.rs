//! The second stage: Sv32x4, Sv39x4, Sv48x4 and Sv57x4 (Privileged section 8.5).
//!
//! * The root table has four times the entries of the others, 16 KiB in all: two more bits of input address. Bits above must be zero; there is no
//!   upper half.
//! * All requests count as unprivileged, so a leaf without U is a fault, and the global bit means nothing.
//! * Where the first stage's software has 32 bits (SXL), input addresses end after 34 bits whatever the tables would hold: `input-bits`.

use stagecraft_sdk::{Attributes, ByteOrder, Encoded, Error, Findings, Format, Kind, Level, Need, Next, Root, Settings};

use crate::entries::{Entries, Stage, candidates, suggest_levels};
use crate::in_manifest_order;

const WIDTHS: &str = "RISC-V Privileged 1.12 section 8.5.1";
const NAMES: &[&str] = &["levels", "root", "output-bits", "input-bits", "svnapot", "svpbmt", "svrsw60t59b", "hardware-update", "big-endian"];

/// Bytes of the root table, and what it is aligned to.
const ROOT_BYTES: u64 = 16 << 10;
/// Index bits that the root table has more than the others.
const EXTRA_INDEX_BITS: u8 = 2;

/// Input addresses of five levels; fewer levels have fewer whatever `input-bits` says.
pub(crate) const WIDEST: u64 = address_width(5);
/// Input addresses of two levels, and of all others where the first stage's software has 32 bits.
pub(crate) const NARROW: u64 = address_width(2);

/// Input addresses of tables with this many levels have so many bits.
const fn address_width(levels: u64) -> u64 {
    if levels == 2 { 34 } else { 14 + 9 * levels }
}

/// `riscv-iommu/second-stage`.
#[derive(Clone, Debug)]
pub struct SecondStage {
    entries: Entries,
    input_bits: u8,
}

/// Whether tables of so many levels have the input addresses. There is no upper half: few levels are as good as many for it.
fn holds(levels: u64, need: &Need) -> bool {
    need.last_low.is_none_or(|last| last >> address_width(levels) == 0)
}

impl Format for SecondStage {
    const NAME: &'static str = "riscv-iommu/second-stage";

    fn open(settings: &Settings) -> Result<Self, Error> {
        settings.only(NAMES)?;
        let entries = Entries::open(settings, Stage::Second, ROOT_BYTES)?;
        let input_bits = settings.within("input-bits", WIDEST, 12, WIDEST, WIDTHS)?.min(address_width(u64::from(entries.levels))) as u8;
        Ok(Self { entries, input_bits })
    }

    fn suggest(settings: &Settings, need: &Need) -> Result<Settings, Error> {
        let settings = suggest_levels(settings, need, holds);
        Self::open(&settings)?;
        Ok(in_manifest_order(&settings, NAMES))
    }

    fn candidates() -> Vec<Settings> {
        candidates(&[3, 4, 5], &[])
    }

    fn levels(&self) -> Vec<Level> {
        self.entries.levels(EXTRA_INDEX_BITS)
    }

    fn roots(&self) -> Vec<Root> {
        let last = u64::MAX >> (64 - self.input_bits);
        let level = self.entries.levels - 1;
        vec![Root { setting: "root", first: 0, last, ignored: 0, address: self.entries.root, level, inherited: 0 }]
    }

    fn output_bits(&self) -> u8 {
        self.entries.output_bits
    }

    fn entry_bytes(&self) -> u8 {
        self.entries.entry_bytes()
    }

    fn byte_order(&self) -> ByteOrder {
        self.entries.byte_order()
    }

    fn kind(&self, level: u8, pattern: u64) -> Kind {
        Entries::kind(level, pattern)
    }

    fn check(&self, level: u8, kind: Kind, inherited: u64, pattern: u64, findings: &mut Findings) {
        let _ = inherited;
        self.entries.check(level, kind, pattern, findings);
    }

    fn next(&self, level: u8, pattern: u64) -> Next {
        let _ = pattern;
        Next::whole(level.saturating_sub(1))
    }

    fn leaf_size_log2(&self, level: u8, pattern: u64) -> u8 {
        self.entries.leaf_size_log2(level, pattern)
    }

    fn attributes(&self, level: u8, inherited: u64, pattern: u64) -> Attributes {
        let _ = (level, inherited);
        self.entries.attributes(pattern)
    }

    fn encode_leaf(&self, level: u8, size_log2: u8, attributes: Attributes) -> Option<Encoded> {
        let pattern = self.entries.encode_leaf(level, size_log2, attributes)?;
        Some(Encoded { pattern, attributes: self.entries.attributes(pattern) })
    }

    fn encode_table(&self, level: u8, next: u8) -> Option<u64> {
        self.entries.encode_table(level, next)
    }
}
