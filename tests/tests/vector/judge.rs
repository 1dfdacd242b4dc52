//! Asks the production plugin and the production engine about each vector, and says where they disagree.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, ensure};
use stagecraft::memory::{Budget, EntryLayout, EntryMemory, Limits, MemoryMap, ReadError};
use stagecraft::plugin::{PluginFormat, Plugins, TableConfig};
use stagecraft::table::{AddressField, AddressSpace, Cause, FaultKind, Format as _, Geometry, Meaning, Severity, Table};
use stagecraft::{Access, Gpa, Iova};

use super::{Block, Configuration, File, Link, Tables, Vector, Want};

/// A guest's memory that holds one path of tables, and the same entry everywhere else.
struct Memory {
    entries: BTreeMap<u64, u64>,
    elsewhere: u64,
    /// How the guest wrote the entries.
    layout: EntryLayout,
}

impl EntryMemory for Memory {
    fn read_entries(&self, address: Gpa, layout: EntryLayout, entries: &mut [u64]) -> Result<(), ReadError> {
        for (index, entry) in entries.iter_mut().enumerate() {
            let address = address.0 + index as u64 * u64::from(layout.bytes);
            let written = self.entries.get(&address).copied().unwrap_or(self.elsewhere);
            // Who reads them in another order than they were written in gets something else.
            let swapped = written.swap_bytes() >> (64 - u32::from(layout.bytes) * 8);
            *entry = if layout.order == self.layout.order { written } else { swapped };
        }
        Ok(())
    }
}

/// A configuration, opened: once for the engine, and once to be asked directly.
struct Opened {
    space: AddressSpace,
    format: PluginFormat,
    geometry: Geometry,
    root: u64,
}

/// A vector that the production code does not agree with.
#[derive(Debug)]
pub struct Deviation {
    pub line: usize,
    pub text: String,
}

/// An entry kind: level, lowest IOVA bit of an entry, and `absent`, `table` or the size of a leaf.
pub type Kind = (i8, u8, Option<Option<u8>>);

/// What a run found out.
#[derive(Debug, Default)]
pub struct Report {
    pub vectors: usize,
    pub deviations: Vec<Deviation>,
    /// Entry kinds that the formats have under these configurations.
    pub kinds: BTreeSet<Kind>,
}

/// Asks about all vectors of a file.
///
/// # Errors
/// A configuration that does not open, or a question that the plugin fails at.
pub fn judge(file: &File, plugins: &Plugins) -> Result<Report> {
    let mut report = Report::default();
    let mut opened = Vec::new();
    for configuration in &file.configurations {
        let settings: Vec<String> = configuration.settings.iter().map(|(name, value)| format!("{name}={value:#x}")).collect();
        let mut one = open(file, configuration, plugins).with_context(|| format!("{} {}", file.format, settings.join(" ")))?;
        report.kinds.extend(one.kinds()?);
        opened.push(one);
    }
    for block in &file.blocks {
        let (one, configuration) = (&mut opened[block.configuration], &file.configurations[block.configuration]);
        for vector in &block.vectors {
            report.vectors += 1;
            let question = Question { file, configuration, block, vector };
            for text in question.ask(one).with_context(|| format!("{}:{}", file.name, vector.line))? {
                let flipped = vector.bit.map_or(String::new(), |bit| format!(" bit {bit}"));
                let text = format!("{} level {}{flipped}, entry {:#x}: {text} [{}]", block.title, block.level, vector.entry, vector.section);
                report.deviations.push(Deviation { line: vector.line, text });
            }
        }
    }
    for outside in &file.outside {
        report.vectors += 1;
        let one = &mut opened[outside.configuration];
        if one.space.tables().any(|table| table.root(Iova(outside.iova)).is_some()) {
            let text = format!("{:#x} is served by a root [{}]", outside.iova, outside.section);
            report.deviations.push(Deviation { line: outside.line, text });
        }
    }
    Ok(report)
}

fn open(file: &File, configuration: &Configuration, plugins: &Plugins) -> Result<Opened> {
    let settings: Vec<(&str, u64)> = configuration.settings.iter().map(|(name, value)| (&**name, *value)).collect();
    let config = TableConfig::new(&file.format, &settings);
    let plugin = plugins.by_format(&file.format)?;
    let (format, mut asked) = (plugin.open(&config)?, plugin.open(&config)?);
    let geometry = asked.geometry().map_err(anyhow::Error::from_boxed)?;
    ensure!(geometry.entry_bytes == file.entry_bytes, "entries of {} bytes", geometry.entry_bytes);
    ensure!(geometry.order == configuration.order(file.order), "byte order {:?}", geometry.order);
    let root = config.settings.get(&configuration.root).with_context(|| format!("no setting `{}`", configuration.root))?;
    Ok(Opened { space: AddressSpace::single(Table::open(Box::new(format))?), format: asked, geometry, root })
}

impl Opened {
    /// The entry kinds that there are: absent ones, leaves of each size that can be made, tables.
    fn kinds(&mut self) -> Result<Vec<Kind>> {
        let mut kinds = Vec::new();
        for (index, level) in self.geometry.levels.iter().enumerate() {
            let key = |kind| (level.number, level.index_lsb, kind);
            kinds.push(key(None));
            kinds.extend((0..64).filter(|size| level.leaf_sizes >> size & 1 != 0).map(|size| key(Some(Some(size)))));
            for next in 0..self.geometry.levels.len() {
                if self.format.encode_table(index as u8, next as u8).map_err(anyhow::Error::from_boxed)?.is_some() {
                    kinds.push(key(Some(None)));
                    break;
                }
            }
        }
        Ok(kinds)
    }

    /// What the plugin says about an entry; an address if it has one.
    fn decode(&mut self, level: u8, inherited: u64, entry: u64) -> Result<(Meaning, u64)> {
        let shapes = &self.geometry.levels[usize::from(level)].shapes;
        let segments = shapes.iter().find(|shape| entry & shape.mask == shape.value).map_or(&[][..], |shape| &shape.address);
        let address = AddressField::new(segments).extract(entry);
        let pattern = segments.iter().fold(entry, |rest, segment| rest & !(u64::MAX >> (64 - segment.width) << segment.entry_lsb));
        let mut meaning = self.format.decode(level, inherited, pattern).map_err(anyhow::Error::from_boxed)?;
        let whole = meaning == Meaning::WholeEntry;
        if whole {
            meaning = self.format.decode_entry(level, inherited, entry).map_err(anyhow::Error::from_boxed)?;
        }
        let findings = self.format.explain(level, inherited, pattern).map_err(anyhow::Error::from_boxed)?;
        let error = findings.iter().find(|finding| finding.severity == Severity::Error);
        let explained = match meaning {
            _ if whole => true,
            Meaning::Fault(kind) => error.is_some_and(|error| error.kind == kind),
            Meaning::Leaf { attributes, .. } if attributes.grants_nothing() => true,
            Meaning::Leaf { .. } | Meaning::Part { .. } | Meaning::Table { .. } => error.is_none(),
            Meaning::Absent | Meaning::WholeEntry => true,
        };
        ensure!(explained, "{meaning:?} is explained by {findings:?}");
        match meaning {
            Meaning::Leaf { size_log2, .. } if whole => Ok((meaning, address & u64::MAX << size_log2)),
            _ => Ok((meaning, address)),
        }
    }
}

struct Question<'a> {
    file: &'a File,
    configuration: &'a Configuration,
    block: &'a Block,
    vector: &'a Vector,
}

impl Question<'_> {
    fn ask(&self, opened: &mut Opened) -> Result<Vec<String>> {
        let (wanted, mut deviations) = (self.vector.outcome, Vec::new());
        match self.decoded(opened)? {
            Ok(found) if agree(found, wanted.entry, opened.geometry.output_bits) => {}
            Ok(found) => deviations.push(format!("decodes as {found}, not {}", wanted.entry)),
            Err(text) => deviations.push(text),
        }
        let memory = self.memory(opened.root)?;
        let slot = self.slot(self.block.level)?;
        let mask = (1 << slot.low) - 1;
        // The whole slot translates alike; below a table only one entry is there.
        let iovas = match wanted.entry {
            Want::Table { .. } => vec![self.block.iova],
            _ => vec![self.block.iova, self.block.iova & !mask, self.block.iova | mask],
        };
        if !deviations.is_empty() {
            return Ok(deviations);
        }
        for iova in iovas {
            for access in [Access::default(), Access::READ, Access::WRITE] {
                // One is enough: the others say the same again.
                if let Some(text) = self.translated(opened, &memory, iova, access)? {
                    return Ok(vec![text]);
                }
            }
        }
        Ok(deviations)
    }

    /// What the plugin itself says about the entry, or why it was not reached.
    fn decoded(&self, opened: &mut Opened) -> Result<std::result::Result<Want, String>> {
        let Some((index, _)) = opened.space.tables().next().and_then(|table| table.root(Iova(self.block.iova))) else {
            return Ok(Err(format!("no root for {:#x}", self.block.iova)));
        };
        let (mut level, mut inherited) = (opened.geometry.roots[index].level, opened.geometry.roots[index].inherited);
        for link in &self.block.above {
            match opened.decode(level, inherited, link.entry)? {
                (Meaning::Table { next, inherited: word }, address) if Some(address) == link.next => (level, inherited) = (next.level, word),
                (meaning, address) => return Ok(Err(format!("the entry {:#x} above is {meaning:?} at {address:#x}", link.entry))),
            }
        }
        let number = opened.geometry.levels[usize::from(level)].number;
        if number != self.block.level {
            return Ok(Err(format!("the table is of level {number}, not {}", self.block.level)));
        }
        let (meaning, address) = opened.decode(level, inherited, self.vector.entry)?;
        Ok(Ok(match meaning {
            Meaning::Absent => Want::Absent,
            Meaning::Leaf { size_log2, attributes } => Want::Leaf { size_log2, address, attributes },
            Meaning::Part { size_log2, attributes, missing } => {
                Want::Part { size_log2, address, attributes, front: missing.front.into(), back: missing.back.into() }
            }
            Meaning::Table { next, .. } => {
                let below = &opened.geometry.levels[usize::from(next.level)];
                let last = u64::from(next.last).min(below.entries() - 1);
                let whole = next.first == 0 && last == below.entries() - 1;
                Want::Table { address, level: below.number, indices: (!whole).then_some((next.first, last as u16)) }
            }
            Meaning::Fault(kind) => Want::Fault(kind),
            Meaning::WholeEntry => return Ok(Err("wants to see the whole entry again".to_owned())),
        }))
    }

    fn slot(&self, level: i8) -> Result<&Tables> {
        self.configuration.tables.iter().find(|table| table.level == level).with_context(|| format!("there is no level {level}"))
    }

    /// The tables of the path, where the specification says that they are.
    fn memory(&self, root: u64) -> Result<Memory> {
        let layout = EntryLayout { bytes: self.file.entry_bytes, order: self.configuration.order(self.file.order) };
        let mut memory = Memory { entries: BTreeMap::new(), elsewhere: self.file.elsewhere, layout };
        let next = match self.vector.outcome.entry {
            Want::Table { address, .. } => Some(address),
            _ => None,
        };
        let tested = Link { level: self.block.level, entry: self.vector.entry, next };
        let mut table = Some(root);
        for link in self.block.above.iter().chain([&tested]).chain(&self.block.below) {
            let Some(address) = table else { break };
            let slot = self.slot(link.level)?;
            let index = self.block.iova >> slot.low & ((1 << (slot.high - slot.low + 1)) - 1);
            memory.entries.insert(address + index * u64::from(self.file.entry_bytes), link.entry);
            table = link.next;
        }
        Ok(memory)
    }

    /// Deviations of what the engine makes of an access.
    fn translated(&self, opened: &mut Opened, memory: &Memory, iova: u64, access: Access) -> Result<Option<String>> {
        let privileged = opened.geometry.privileged;
        let budget = Budget::new(Limits::default());
        let found = opened.space.translate(memory, &MemoryMap::everything(64), Iova(iova), access, &budget)?;
        let wanted = self.vector.outcome.end;
        let text = match &found {
            Ok(found) => format!("{iova:#x} ({access}) goes to {} {}", found.address, found.attributes),
            Err(fault) => {
                let level = fault.level.map_or(String::new(), |level| format!(" at level {level}"));
                format!("{iova:#x} ({access}) is refused{level}: {}", fault.cause.as_str())
            }
        };
        // A part translates as the whole does where it exists.
        let (wanted, missing) = match wanted {
            Want::Part { size_log2, address, attributes, front, back } => {
                let (offset, bytes) = (iova & ((1 << size_log2) - 1), 1 << size_log2);
                (Want::Leaf { size_log2, address, attributes }, offset < front || offset >= bytes - back)
            }
            wanted => (wanted, false),
        };
        let right = match (wanted, &found) {
            (Want::Leaf { .. }, found) if missing => matches!(found, Err(fault) if fault.cause == Cause::Entry(FaultKind::Permission)),
            (Want::Leaf { size_log2, address, attributes }, Ok(found)) => {
                let offset = iova & ((1 << size_log2) - 1);
                let same = attributes == found.attributes && attributes.access(privileged).allows(access);
                found.address.0 == address | offset && same
            }
            (Want::Leaf { attributes, .. }, Err(fault)) => {
                let forbidden = !attributes.access(privileged).allows(access) || attributes.grants_nothing();
                fault.cause == Cause::Entry(FaultKind::Permission) && forbidden
            }
            (Want::Fault(kind), Err(fault)) => {
                let here = self.vector.outcome.entry != wanted || fault.level == Some(self.block.level);
                fault.cause == Cause::Entry(kind) && here
            }
            (Want::Fault(FaultKind::Permission), Ok(found)) => found.attributes.grants_nothing(),
            (Want::Absent, Err(fault)) => fault.cause == Cause::Entry(FaultKind::Translation),
            _ => false,
        };
        Ok((!right).then(|| format!("{text}, not {wanted}")))
    }
}

/// Addresses beyond the unit's and misaligned ones are for the engine to refuse; a leaf that allows nothing is a permission fault.
fn agree(found: Want, wanted: Want, output_bits: u8) -> bool {
    let nothing = |want: Want| match want {
        Want::Leaf { attributes, .. } => attributes.grants_nothing(),
        want => want == Want::Fault(FaultKind::Permission),
    };
    if nothing(found) && nothing(wanted) {
        return true;
    }
    let address = match found {
        Want::Leaf { address, .. } | Want::Table { address, .. } => address,
        _ => 0,
    };
    match wanted {
        Want::Fault(FaultKind::AddressSize) => found == wanted || output_bits < 64 && address >> output_bits != 0,
        Want::Fault(FaultKind::Misaligned) => {
            let misaligned = |size_log2: u8| address & ((1 << size_log2) - 1) != 0;
            found == wanted || matches!(found, Want::Leaf { size_log2, .. } if misaligned(size_log2))
        }
        _ => found == wanted,
    }
}
