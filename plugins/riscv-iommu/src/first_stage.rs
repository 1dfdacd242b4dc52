//! The first stage: Sv32, Sv39, Sv48 and Sv57 (Privileged sections 4.3 to 4.6).
//!
//! What differs from a processor's own use of such tables:
//!
//! * Only requests with a process id can ask for supervisor privilege, and only where the process context allows it (`supervisor`, ENS). Elsewhere a
//!   leaf without U lets nobody pass and is a fault.
//! * Where it is allowed, requests with that privilege do not pass leaves with U unless `sum` is set, and never fetch instructions there. The normal
//!   form has no "unprivileged only": such leaves show as open to all. Nobody else gets more than hardware grants.
//! * Shadow stack pages stay a reserved encoding.
//!
//! Sv32 takes 32 bits of input address. The others are sign-extended: both halves are walked from one table.

use stagecraft_sdk::{Attributes, ByteOrder, Encoded, Error, Findings, Format, Kind, Level, Need, Next, Root, Settings};

use crate::entries::{Entries, Stage, candidates, suggest_levels};
use crate::in_manifest_order;

const PROCESS: &str = "RISC-V IOMMU 1.0 section 2.2.3.1";
const NAMES: &[&str] = &["levels", "root", "output-bits", "svnapot", "svpbmt", "svrsw60t59b", "hardware-update", "big-endian", "supervisor", "sum"];

/// `riscv-iommu/first-stage`.
#[derive(Clone, Debug)]
pub struct FirstStage {
    entries: Entries,
}

/// Whether tables of so many levels, of 8-byte entries, have the input addresses.
fn holds(levels: u64, need: &Need) -> bool {
    let half = 11 + 9 * levels;
    need.last_low.is_none_or(|last| last >> half == 0) && need.first_high.is_none_or(|first| first >> half == u64::MAX >> half)
}

impl Format for FirstStage {
    const NAME: &'static str = "riscv-iommu/first-stage";

    fn open(settings: &Settings) -> Result<Self, Error> {
        settings.only(NAMES)?;
        let supervisor = settings.flag("supervisor", false)?;
        if settings.flag("sum", false)? && !supervisor {
            return Err(Error::invalid("sum", 1, PROCESS, "means nothing unless supervisor is 1"));
        }
        Ok(Self { entries: Entries::open(settings, Stage::First { supervisor }, 4096)? })
    }

    fn suggest(settings: &Settings, need: &Need) -> Result<Settings, Error> {
        let settings = suggest_levels(settings, need, holds);
        Self::open(&settings)?;
        Ok(in_manifest_order(&settings, NAMES))
    }

    fn candidates() -> Vec<Settings> {
        candidates(&[3, 4, 5], &["supervisor"])
    }

    fn levels(&self) -> Vec<Level> {
        self.entries.levels(0)
    }

    fn roots(&self) -> Vec<Root> {
        let (levels, address) = (self.entries.levels, self.entries.root);
        let root = |first, last| Root { setting: "root", first, last, ignored: 0, address, level: levels - 1, inherited: 0 };
        if levels == 2 {
            return vec![root(0, 0xffff_ffff)];
        }
        let half = 1_u64 << (11 + 9 * levels);
        vec![root(0, half - 1), root(half.wrapping_neg(), u64::MAX)]
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
