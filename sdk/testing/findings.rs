//! What every format promises about its explanations. Tests of format crates include this file:
//!
//! ```text
//! #[path = "../../../sdk/testing/findings.rs"]
//! mod findings;
//! ```
//!
//! Each format gives a table of good entries, one row for each kind of entry of each level, that says from the specification what becomes of it when one
//! bit is flipped.
#![allow(dead_code, unreachable_pub, missing_docs)]

use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};
use stagecraft_sdk::{FaultKind, Finding, Format, Kind, Meaning, Severity};

/// A good entry, about which nothing is said, and what its bits are. A bit in none of the masks is address, software's or ignored: nothing is said about it
/// either way.
#[derive(Clone, Debug)]
pub struct Row {
    pub what: &'static str,
    pub level: u8,
    pub inherited: u64,
    pub entry: u64,
    /// Flipped, such a bit makes the entry another kind of entry, or another encoding of a field: no business of this table.
    pub other: u64,
    /// Flipped, the request fails for this reason.
    pub faults: Vec<(u64, FaultKind)>,
    /// Flipped, hardware does not mind, and yet it should not be so.
    pub warnings: u64,
}

impl Row {
    pub const fn new(what: &'static str, level: u8, entry: u64) -> Self {
        Self { what, level, inherited: 0, entry, other: 0, faults: Vec::new(), warnings: 0 }
    }

    pub const fn other(mut self, bits: u64) -> Self {
        self.other |= bits;
        self
    }

    pub const fn warnings(mut self, bits: u64) -> Self {
        self.warnings |= bits;
        self
    }

    pub fn reserved(self, bits: u64) -> Self {
        self.faults(bits, FaultKind::Reserved)
    }

    pub fn faults(mut self, bits: u64, kind: FaultKind) -> Self {
        self.faults.push((bits, kind));
        self
    }

    fn check_masks(&self) {
        let masks = self.faults.iter().map(|(bits, _)| *bits).chain([self.other, self.warnings]);
        masks.fold(0, |all, mask| {
            assert_eq!(all & mask, 0, "{}: bits with two meanings", self.what);
            all | mask
        });
    }
}

/// The bits of an entry.
fn width<F: Format>(format: &F) -> u64 {
    if format.entry_bytes() == 4 { 0xffff_ffff } else { u64::MAX }
}

/// The address bits of the shape that `entry` has.
pub fn address_bits<F: Format>(format: &F, level: u8, entry: u64) -> u64 {
    let levels = format.levels();
    let shape = levels[usize::from(level)].shapes.iter().find(|shape| entry & shape.mask == shape.value);
    let bits = |segment: &stagecraft_sdk::Segment| u64::MAX >> (64 - segment.width) << segment.entry_lsb;
    shape.map_or(0, |shape| shape.address.iter().fold(0, |all, segment| all | bits(segment)))
}

/// What an entry is and what is said about it, asked as the host asks: a pattern, or the whole entry where the pattern does not tell.
pub fn ask<F: Format>(format: &F, level: u8, inherited: u64, entry: u64) -> (Meaning, Vec<Finding>) {
    let pattern = entry & !address_bits(format, level, entry);
    match format.decode(level, inherited, pattern) {
        Meaning::WholeEntry => (format.decode_entry(level, inherited, entry), format.explain(level, inherited, entry)),
        meaning => (meaning, format.explain(level, inherited, pattern)),
    }
}

/// What holds for all entries. `fields`: encodings of several bits, of which findings may name all.
pub fn check_entry<F: Format>(format: &F, level: u8, inherited: u64, entry: u64, fields: &[u64]) {
    let name = format!("{} level {level} inherited {inherited:#x} entry {entry:#018x}", F::NAME);
    let (meaning, findings) = ask(format, level, inherited, entry);
    let error = findings.first().filter(|finding| finding.severity == Severity::Error).map(|finding| finding.kind);
    match meaning {
        Meaning::Fault(kind) => assert_eq!(error, Some(kind), "{name}: {findings:?}"),
        Meaning::WholeEntry => panic!("{name}: the whole entry does not tell"),
        _ => assert_eq!(error, None, "{name}: {meaning:?} {findings:?}"),
    }
    if format.kind(level, entry & !address_bits(format, level, entry)) == Kind::Absent {
        assert!(findings.is_empty() && meaning == Meaning::Absent, "{name}: {meaning:?} {findings:?}");
    }
    assert!(findings.is_sorted_by_key(|finding| finding.severity), "{name}: worst first: {findings:?}");
    for finding in &findings {
        check_finding(&name, finding, entry, width(format), fields);
    }
}

fn check_finding(name: &str, finding: &Finding, entry: u64, width: u64, fields: &[u64]) {
    let Finding { bits, section, reason, .. } = finding;
    assert!(*bits != 0 && bits & !width == 0, "{name}: no bits of the entry: {finding:?}");
    let (set, clear) = (bits & !entry == 0, bits & entry == 0);
    assert!(set || clear || fields.contains(bits), "{name}: some of these bits are set and some are not: {finding:?}");
    if clear && !fields.contains(bits) {
        let says = ["clear", "without", "zero", "must be"].iter().any(|word| reason.contains(word));
        assert!(says, "{name}: the bits are clear, and nothing says so: {finding:?}");
    }
    assert!(!section.is_empty(), "{name}: no section: {finding:?}");
    // A sentence in lower case, unless it begins with the name of a field.
    let first = reason.split(' ').next().unwrap_or_default();
    let is_name = first.chars().all(|c| !c.is_lowercase());
    let sentence = !reason.is_empty() && reason.trim() == reason && (is_name || !first.starts_with(char::is_uppercase));
    assert!(sentence && !reason.ends_with('.') && !reason.contains(". ") && !reason.contains('\n'), "{name}: no sentence: {finding:?}");
}

/// What holds for a good entry and for those that differ from it by one bit.
pub fn check_row<F: Format>(format: &F, row: &Row, fields: &[u64]) {
    row.check_masks();
    let ask_about = |entry| ask(format, row.level, row.inherited, entry);
    let (good, findings) = ask_about(row.entry);
    assert!(findings.is_empty(), "{} {}: a good entry: {findings:?}", F::NAME, row.what);
    assert!(!matches!(good, Meaning::Fault(_) | Meaning::Absent), "{} {}: {good:?}", F::NAME, row.what);
    for bit in (0..64).map(|bit| 1_u64 << bit).filter(|bit| bit & width(format) != 0) {
        let entry = row.entry ^ bit;
        check_entry(format, row.level, row.inherited, entry, fields);
        let (meaning, findings) = ask_about(entry);
        let name = format!("{} {}, bit {}: {meaning:?} {findings:?}", F::NAME, row.what, bit.trailing_zeros());
        if let Some((_, kind)) = row.faults.iter().find(|(bits, _)| bits & bit != 0) {
            assert_eq!(meaning, Meaning::Fault(*kind), "{name}");
            assert!(findings.iter().any(|finding| finding.severity == Severity::Error && finding.bits & bit != 0), "{name}");
        } else if row.warnings & bit != 0 {
            assert!(!matches!(meaning, Meaning::Fault(_)), "{name}");
            assert!(findings.iter().any(|finding| finding.severity == Severity::Warning && finding.bits & bit != 0), "{name}");
        } else if row.other & bit == 0 {
            assert!(findings.is_empty() && !matches!(meaning, Meaning::Fault(_)), "{name}");
        }
    }
}

/// All rows of a format, which has at least one for each kind of table; and random entries, half of them near to a row.
pub fn check_format<F: Format + std::fmt::Debug>(format: &F, rows: &[Row], inherited: &[u64], fields: &[u64]) {
    let levels = format.levels().len();
    for level in 0..levels {
        assert!(rows.iter().any(|row| usize::from(row.level) == level), "{} has no row for level {level}", F::NAME);
    }
    for row in rows {
        check_row(format, row, fields);
    }
    let width = width(format);
    let near = (0..rows.len(), any::<u64>(), any::<u64>(), any::<u64>()).prop_map(|(row, a, b, c)| (rows[row].level, rows[row].entry ^ a & b & c));
    let far = (0..levels as u8, any::<u64>());
    let entries = (prop_oneof![near, far], proptest::sample::select(inherited.to_vec()));
    let config = ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let checked = runner.run(&entries, |((level, entry), inherited)| {
        check_entry(format, level, inherited, entry & width, fields);
        Ok(())
    });
    if let Err(error) = checked {
        panic!("{error}");
    }
}
