//! From the contract's packed words and records to the host's types: everything is checked, nothing is trusted.

use crate::plugin::bindings::exports::stagecraft::format::table as wit;
use crate::plugin::bindings::stagecraft::format::types;
use crate::plugin::error::clean;
use crate::plugin::{Refusal, Settings, TableConfig};
use crate::table::{ByteOrder, FaultKind, Finding, Geometry, Level, Mark, Meaning, Missing, Next, Root, Segment, Severity, Shape};
use crate::{Attributes, Span};

/// Most settings of one configuration.
const MAX_SETTINGS: usize = 64;
/// Most bytes of a name.
const MAX_NAME: usize = 64;

/// Bits that are named for each kind of word, by the kind's number.
const NAMED_BITS: [u64; 5] = [0x7, 0x0000_ffff_ffff_ff07, !0xc0f8, 0xff07, 0x7];

/// Unpacks the answer of `decode` and `decode-entry`; the reason if it has no meaning.
pub(super) fn meaning(meaning: types::Meaning, levels: usize) -> Result<Meaning, String> {
    let types::Meaning { word, inherited } = meaning;
    let kind = (word & 7) as usize;
    let Some(named) = NAMED_BITS.get(kind) else {
        return Err(format!("word {word:#x} is of kind {kind}; there are 0 to 4"));
    };
    if word & !named != 0 {
        return Err(format!("word {word:#x} has bits {:#x}, which have no meaning", word & !named));
    }
    if inherited != 0 && kind != 1 && kind != 2 {
        return Err(format!("word {word:#x} is neither a table nor a leaf and yet something is inherited ({inherited:#x})"));
    }
    let byte = (word >> 8 & 0xff) as u8;
    Ok(match kind {
        0 => Meaning::Absent,
        1 => {
            let next = Next { level: byte, first: (word >> 16 & 0xffff) as u16, last: (word >> 32 & 0xffff) as u16 };
            if usize::from(next.level) >= levels {
                return Err(format!("word {word:#x} names level kind {}; there are {levels}", next.level));
            }
            if next.first > next.last {
                return Err(format!("word {word:#x} names the empty range of indexes {}..={}", next.first, next.last));
            }
            Meaning::Table { next, inherited }
        }
        2 => {
            let attributes = attributes(word >> 16)?;
            if byte < 8 {
                return Err(format!("word {word:#x} is a leaf of {} bytes", 1_u32 << byte));
            }
            let missing = Missing { front: inherited as u32, back: (inherited >> 32) as u32 };
            let bytes = 1_u128 << byte;
            if inherited != 0 && (byte > 32 || u128::from(missing.front) + u128::from(missing.back) >= bytes) {
                return Err(format!("a leaf of 2^{byte} bytes lacks {:#x} bytes at its beginning and {:#x} at its end", missing.front, missing.back));
            }
            match inherited {
                0 => Meaning::Leaf { size_log2: byte, attributes },
                _ => Meaning::Part { size_log2: byte, attributes, missing },
            }
        }
        3 => match FaultKind::ALL.get(usize::from(byte)) {
            Some(kind) => Meaning::Fault(*kind),
            None => return Err(format!("word {word:#x} is fault {byte}; there are {}", FaultKind::ALL.len())),
        },
        _ => Meaning::WholeEntry,
    })
}

/// Attributes with a meaning.
pub(super) fn attributes(word: u64) -> Result<Attributes, String> {
    Attributes::from_bits(word).ok_or_else(|| format!("attributes {word:#x} have no meaning"))
}

/// The geometry as it is; [`Geometry::check`] judges it.
pub(super) fn geometry(geometry: wit::Geometry) -> Geometry {
    let segment = |s: types::Segment| Segment { entry_lsb: s.entry_lsb, address_lsb: s.address_lsb, width: s.width };
    let mark = |mark: types::Mark| Mark { mask: mark.mask, value: mark.value };
    let shape = |s: types::Shape| Shape { mask: s.mask, value: s.value, address: s.address.into_iter().map(segment).collect() };
    let level = |level: types::Level| Level {
        number: level.number,
        index_lsb: level.index_lsb,
        index_bits: level.index_bits,
        shapes: level.shapes.into_iter().map(shape).collect(),
        leaf_sizes: level.leaf_sizes,
        absent: level.absent,
        accessed: mark(level.accessed),
        dirty: mark(level.dirty),
        table_accessed: mark(level.table_accessed),
    };
    let root = |root: types::Root| Root {
        setting: clean(&root.setting),
        first: root.first,
        last: root.last,
        ignored: root.ignored,
        address: root.address,
        level: root.level,
        inherited: root.inherited,
    };
    Geometry {
        roots: geometry.roots.into_iter().map(root).collect(),
        levels: geometry.levels.into_iter().map(level).collect(),
        entry_bytes: geometry.entry_bytes,
        order: match geometry.order {
            types::ByteOrder::Little => ByteOrder::Little,
            types::ByteOrder::Big => ByteOrder::Big,
        },
        output_bits: geometry.output_bits,
        privileged: geometry.privileged,
        untranslated: geometry.untranslated.into_iter().map(|types::Span { first, last }| Span { first, last }).collect(),
        no_tables_in: geometry.no_tables_in,
    }
}

/// Most findings about one entry; the rest is dropped.
const MAX_FINDINGS: usize = 64;

/// Findings, cut and cleaned.
pub(super) fn findings(findings: Vec<types::Finding>) -> Vec<Finding> {
    let finding = |finding: types::Finding| Finding {
        severity: match finding.severity {
            types::Severity::Error => Severity::Error,
            types::Severity::Warning => Severity::Warning,
            types::Severity::Info => Severity::Info,
        },
        kind: fault_kind(finding.kind),
        bits: finding.bits,
        section: clean(&finding.section),
        reason: clean(&finding.reason),
    };
    findings.into_iter().take(MAX_FINDINGS).map(finding).collect()
}

const fn fault_kind(kind: types::FaultKind) -> FaultKind {
    match kind {
        types::FaultKind::Translation => FaultKind::Translation,
        types::FaultKind::Permission => FaultKind::Permission,
        types::FaultKind::AccessFlag => FaultKind::AccessFlag,
        types::FaultKind::AddressSize => FaultKind::AddressSize,
        types::FaultKind::Reserved => FaultKind::Reserved,
        types::FaultKind::Misaligned => FaultKind::Misaligned,
        types::FaultKind::Unreadable => FaultKind::Unreadable,
        types::FaultKind::Configuration => FaultKind::Configuration,
    }
}

/// A plugin's refusal, cut and cleaned.
pub(super) fn refusal(error: types::Error) -> Refusal {
    match error {
        types::Error::Unsupported(what) => Refusal::Unsupported(clean(&what)),
        types::Error::Invalid(types::InvalidField { field, value, section, reason }) => {
            Refusal::Invalid { field: clean(&field), value, section: clean(&section), reason: clean(&reason) }
        }
        types::Error::Unreadable(address) => Refusal::Unreadable(address),
    }
}

fn named(list: Vec<types::Named>) -> Result<Vec<(String, u64)>, String> {
    if list.len() > MAX_SETTINGS {
        return Err(format!("{} named numbers; at most {MAX_SETTINGS}", list.len()));
    }
    for (index, types::Named { name, .. }) in list.iter().enumerate() {
        if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
            return Err(format!("a name of {} bytes, or with control characters", name.len()));
        }
        if list[..index].iter().any(|other| other.name == *name) {
            return Err(format!("`{name}` is given twice"));
        }
    }
    Ok(list.into_iter().map(|named| (named.name, named.value)).collect())
}

/// Settings from a plugin.
pub(super) fn settings(list: Vec<types::Named>) -> Result<Settings, String> {
    Ok(named(list)?.into_iter().collect())
}

/// Limits from a plugin.
pub(super) fn limits(list: Vec<types::Named>) -> Result<Vec<(String, u64)>, String> {
    named(list)
}

/// A configuration from a plugin.
pub(super) fn table_config(config: types::TableConfig) -> Result<TableConfig, String> {
    Ok(TableConfig { format: clean(&config.format), settings: settings(config.settings)? })
}

/// Settings for a plugin.
pub(super) fn settings_in(settings: &Settings) -> Vec<types::Named> {
    settings.iter().map(|(name, value)| types::Named { name: name.to_owned(), value }).collect()
}

/// A configuration for a plugin.
pub(super) fn table_config_in(config: &TableConfig) -> types::TableConfig {
    types::TableConfig { format: config.format.clone(), settings: settings_in(&config.settings) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unpack(word: u64, inherited: u64) -> Result<Meaning, String> {
        meaning(types::Meaning { word, inherited }, 4)
    }

    #[test]
    fn every_kind_of_word_has_its_meaning() {
        assert_eq!(unpack(0, 0), Ok(Meaning::Absent));
        let table = Meaning::Table { next: Next { level: 3, first: 5, last: 0x1ff }, inherited: 9 };
        assert_eq!(unpack(1 | 3 << 8 | 5 << 16 | 0x1ff << 32, 9), Ok(table));
        let attributes = Attributes::READ.with(Attributes::COHERENT);
        assert_eq!(unpack(2 | 21 << 8 | 0x41 << 16, 0), Ok(Meaning::Leaf { size_log2: 21, attributes }));
        let missing = Missing { front: 0x800, back: 0x7ff };
        assert_eq!(unpack(2 | 12 << 8 | 1 << 16, 0x7ff_0000_0800), Ok(Meaning::Part { size_log2: 12, attributes: Attributes::READ, missing }));
        assert_eq!(unpack(3 | 4 << 8, 0), Ok(Meaning::Fault(FaultKind::Reserved)));
        assert_eq!(unpack(4, 0), Ok(Meaning::WholeEntry));
    }

    #[test]
    fn words_without_a_meaning_are_refused_with_the_reason() {
        let refused = |word, inherited, reason: &str| {
            let error = unpack(word, inherited).expect_err("refused");
            assert!(error.contains(reason), "{error}");
        };
        refused(5, 0, "kind 5; there are 0 to 4");
        refused(0x10, 0, "bits 0x10, which have no meaning");
        refused(1 << 48 | 1, 0, "which have no meaning");
        refused(2 | 0x55 << 8, 0, "bits 0x4000, which");
        refused(4, 1, "inherited (0x1)");
        refused(2 | 12 << 8, 0x800_0000_0800, "lacks 0x800 bytes at its beginning and 0x800 at its end");
        refused(2 | 33 << 8, 1, "a leaf of 2^33 bytes lacks 0x1 bytes");
        refused(1 | 4 << 8 | 1 << 32, 0, "level kind 4; there are 4");
        refused(1 | 2 << 16 | 1 << 32, 0, "empty range of indexes 2..=1");
        refused(2 | 7 << 8, 0, "a leaf of 128 bytes");
        refused(2 | 12 << 8 | 1 << 26, 0, "attributes 0x400 have no meaning");
        refused(3 | 8 << 8, 0, "fault 8; there are 8");
    }

    #[test]
    fn settings_from_a_plugin_are_bounded() {
        let named = |name: &str| types::Named { name: name.to_owned(), value: 1 };
        assert!(settings(vec![named("a"), named("b")]).is_ok());
        assert!(settings(vec![named("a"), named("a")]).expect_err("twice").contains("`a` is given twice"));
        assert!(settings(vec![named(&"a".repeat(65))]).is_err());
        assert!(settings((0..65).map(|n| named(&n.to_string())).collect()).is_err());
    }
}
