//! A format crate compiled natively, behind the engine's trait: what the engine sees through Wasm, without Wasm.
#![allow(dead_code)]

use stagecraft::table::{self, Encoded, Finding, FormatError, Geometry, Level, Mark, Meaning, Next, Root, Segment, Shape};
use stagecraft_sdk as sdk;

pub struct Native<F>(pub F);

fn mark(mark: sdk::Mark) -> Mark {
    Mark { mask: mark.mask, value: mark.value }
}

pub fn attributes(attributes: sdk::Attributes) -> Result<stagecraft::Attributes, FormatError> {
    stagecraft::Attributes::from_bits(attributes.pack()).ok_or_else(|| format!("attributes {attributes:?}").into())
}

pub fn fault(kind: sdk::FaultKind) -> table::FaultKind {
    table::FaultKind::ALL[kind as usize]
}

fn meaning(meaning: sdk::Meaning) -> Result<Meaning, FormatError> {
    Ok(match meaning {
        sdk::Meaning::Absent => Meaning::Absent,
        sdk::Meaning::Table { next, inherited } => Meaning::Table { next: Next { level: next.level, first: next.first, last: next.last }, inherited },
        sdk::Meaning::Leaf { size_log2, attributes: allowed } => Meaning::Leaf { size_log2, attributes: attributes(allowed)? },
        sdk::Meaning::Part { size_log2, attributes: allowed, missing } => {
            let missing = table::Missing { front: missing.front, back: missing.back };
            Meaning::Part { size_log2, attributes: attributes(allowed)?, missing }
        }
        sdk::Meaning::Fault(kind) => Meaning::Fault(fault(kind)),
        sdk::Meaning::WholeEntry => Meaning::WholeEntry,
    })
}

impl<F: sdk::Format + Send> table::Format for Native<F> {
    fn geometry(&mut self) -> Result<Geometry, FormatError> {
        let geometry = self.0.geometry();
        let segment = |s: &sdk::Segment| Segment { entry_lsb: s.entry_lsb, address_lsb: s.address_lsb, width: s.width };
        let shape = |s: &sdk::Shape| Shape { mask: s.mask, value: s.value, address: s.address.iter().map(segment).collect() };
        Ok(Geometry {
            roots: geometry
                .roots
                .into_iter()
                .map(|root| Root {
                    setting: root.setting.to_owned(),
                    first: root.first,
                    last: root.last,
                    ignored: root.ignored,
                    address: root.address,
                    level: root.level,
                    inherited: root.inherited,
                })
                .collect(),
            levels: geometry
                .levels
                .into_iter()
                .map(|level| Level {
                    number: level.number,
                    index_lsb: level.index_lsb,
                    index_bits: level.index_bits,
                    shapes: level.shapes.iter().map(shape).collect(),
                    leaf_sizes: level.leaf_sizes,
                    absent: level.absent,
                    accessed: mark(level.accessed),
                    dirty: mark(level.dirty),
                    table_accessed: mark(level.table_accessed),
                })
                .collect(),
            entry_bytes: geometry.entry_bytes,
            order: match geometry.order {
                sdk::ByteOrder::Little => table::ByteOrder::Little,
                sdk::ByteOrder::Big => table::ByteOrder::Big,
            },
            output_bits: geometry.output_bits,
            privileged: geometry.privileged,
            untranslated: geometry.untranslated.into_iter().map(|(first, last)| stagecraft::Span { first, last }).collect(),
            no_tables_in: geometry.no_tables_in.iter().fold(0, |types, memory_type| types | 1 << memory_type.number()),
        })
    }

    fn decode(&mut self, level: u8, inherited: u64, pattern: u64) -> Result<Meaning, FormatError> {
        meaning(self.0.decode(level, inherited, pattern))
    }

    fn decode_entry(&mut self, level: u8, inherited: u64, entry: u64) -> Result<Meaning, FormatError> {
        meaning(self.0.decode_entry(level, inherited, entry))
    }

    fn explain(&mut self, level: u8, inherited: u64, pattern: u64) -> Result<Vec<Finding>, FormatError> {
        let finding = |finding: sdk::Finding| Finding {
            severity: match finding.severity {
                sdk::Severity::Error => table::Severity::Error,
                sdk::Severity::Warning => table::Severity::Warning,
                sdk::Severity::Info => table::Severity::Info,
            },
            kind: fault(finding.kind),
            bits: finding.bits,
            section: finding.section.to_owned(),
            reason: finding.reason,
        };
        Ok(self.0.explain(level, inherited, pattern).into_iter().map(finding).collect())
    }

    fn encode_leaf(&mut self, level: u8, size_log2: u8, allowed: stagecraft::Attributes) -> Result<Option<Encoded>, FormatError> {
        let encoded = self.0.encode_leaf(level, size_log2, sdk::Attributes::unpack(allowed.bits()));
        encoded.map(|encoded| Ok(Encoded { pattern: encoded.pattern, attributes: attributes(encoded.attributes)? })).transpose()
    }

    fn encode_table(&mut self, level: u8, next: u8) -> Result<Option<u64>, FormatError> {
        Ok(self.0.encode_table(level, next))
    }
}
