//! A walk that keeps faults, and one entry of each pattern.

use std::collections::BTreeMap;

use stagecraft::Span;
use stagecraft::table::{AddressField, Cause, FaultAt, Geometry, Piece, Run, Step, Visitor, WalkError};

use super::replicas::Candidates;

/// A fault that was met.
pub struct FaultSeen {
    /// Which stage.
    pub stage: u8,
    /// Why.
    pub cause: Cause,
    /// The IOVAs.
    pub span: Span,
    /// The address that is at fault, if one is.
    pub address: Option<u64>,
    /// From the root to the entry.
    pub path: Vec<Step>,
}

/// The first entry of a pattern.
pub struct Entry {
    /// Which stage.
    pub stage: u8,
    /// From the root to it.
    pub path: Vec<Step>,
    /// The IOVAs where it was met.
    pub span: Span,
    /// How many entries have the pattern.
    pub count: u64,
}

/// What makes entries equal to a format: stage, kind of table, the format's word for the table, pattern.
type Pattern = (u8, u8, u64, u64);

/// What is address in the entries of one kind of table.
struct Shapes(Vec<(u64, u64, AddressField)>);

impl Shapes {
    /// `entry` with zeroes where the address is.
    fn pattern(&self, entry: u64) -> u64 {
        let shape = self.0.iter().find(|(mask, value, _)| entry & mask == *value);
        shape.and_then(|(_, _, field)| field.insert(field.extract(entry))).map_or(entry, |address| entry & !address)
    }
}

/// The visitor.
pub struct Examine {
    first_stage: u8,
    stages: Vec<Vec<Shapes>>,
    keep: usize,
    /// Different patterns that are kept: more than the walk's budget lets a guest show.
    most_patterns: usize,
    /// Faults that were kept.
    pub faults: Vec<FaultSeen>,
    /// Faults beyond those.
    pub more: u64,
    /// The first page that the memory map promises and that could not be read.
    pub missing: Option<u64>,
    /// One entry of each pattern, tables and leaves.
    pub entries: BTreeMap<Pattern, Entry>,
    /// Slots of leaves that may be larger than those.
    pub candidates: Candidates,
    /// The tables on the way to the last entry: those are counted already.
    last_path: Vec<(u64, u64)>,
}

impl Examine {
    /// Examines the entries of tables with these geometries, of `first_stage` and the next; keeps up to `keep` faults. A walk asks about
    /// `questions` patterns at most.
    pub fn new<'a>(geometries: impl Iterator<Item = &'a Geometry>, first_stage: u8, keep: usize, questions: u64) -> Self {
        let geometries: Vec<&Geometry> = geometries.collect();
        let candidates = Candidates::new(geometries.first().copied());
        let shapes = |level: &stagecraft::table::Level| {
            Shapes(level.shapes.iter().map(|shape| (shape.mask, shape.value, AddressField::new(&shape.address))).collect())
        };
        let stages = geometries.iter().map(|geometry| geometry.levels.iter().map(shapes).collect()).collect();
        let entries = BTreeMap::new();
        let most_patterns = usize::try_from(questions.saturating_mul(2)).unwrap_or(usize::MAX);
        Self { first_stage, stages, keep, most_patterns, faults: Vec::new(), more: 0, missing: None, entries, candidates, last_path: Vec::new() }
    }

    /// Counts `count` entries like the last one of `path`, and the table entries that lead there if they are new.
    fn entry(&mut self, span: Span, path: &[Step], count: u64) {
        let Some((last, tables)) = path.split_last() else { return };
        self.tables(span, tables);
        self.count(last, path, span, count);
    }

    /// Counts the table entries on a path that are not on the one before.
    fn tables(&mut self, span: Span, tables: &[Step]) {
        let same = tables.iter().zip(&self.last_path).take_while(|(step, known)| (step.table.0, step.index) == **known).count();
        self.last_path.truncate(same);
        for (depth, step) in tables.iter().enumerate().skip(same) {
            self.last_path.push((step.table.0, step.index));
            self.count(step, &tables[..=depth], span, 1);
        }
    }

    fn count(&mut self, step: &Step, path: &[Step], span: Span, count: u64) {
        let Some(entry) = step.entry else { return };
        // Leaves and tables of the walk belong to its first stage: leaves of a second one come out flattened.
        let stage = self.first_stage;
        let shapes = self.stages.first().and_then(|levels| levels.get(usize::from(step.level)));
        let pattern = shapes.map_or(entry, |shapes| shapes.pattern(entry));
        let key = (stage, step.level, step.inherited, pattern);
        if self.entries.len() >= self.most_patterns && !self.entries.contains_key(&key) {
            return;
        }
        self.entries.entry(key).or_insert_with(|| Entry { stage, path: path.to_vec(), span, count: 0 }).count += count;
    }
}

impl Visitor for Examine {
    fn leaves(&mut self, run: &Run<'_>, path: &[Step]) -> Result<(), WalkError> {
        if run.kinds.is_one() {
            self.entry(Span::of_log2(run.iova.0, run.size_log2), path, run.entries.len() as u64);
            return Ok(());
        }
        // Leaves of two patterns: each is looked at for itself.
        let mut path = path.to_vec();
        for (index, entry) in run.entries.iter().enumerate() {
            if let Some(step) = path.last_mut() {
                step.index += u64::from(index > 0);
                step.entry = Some(*entry);
            }
            self.entry(Span::of_log2(run.iova.0 + ((index as u64) << run.size_log2), run.size_log2), &path, 1);
        }
        Ok(())
    }

    fn piece(&mut self, piece: &Piece, path: &[Step]) -> Result<(), WalkError> {
        self.entry(piece.iova, path, 1);
        self.candidates.add(path, piece.iova);
        Ok(())
    }

    fn absent(&mut self, span: Span, path: &[Step]) -> Result<(), WalkError> {
        // What is absent has no pattern to warn about; the tables that lead there have.
        if let Some((_, tables)) = path.split_last() {
            self.tables(span, tables);
        }
        Ok(())
    }

    fn nothing_below(&mut self, span: Span, entries: u64, path: &[Step]) -> Result<(), WalkError> {
        // Their table was looked at when it was met first; they themselves are entries like others.
        self.entry(span, path, entries);
        Ok(())
    }

    fn fault(&mut self, fault: &FaultAt<'_>) -> Result<(), WalkError> {
        if fault.cause == Cause::Missing {
            self.missing = self.missing.or(fault.address);
            return Ok(());
        }
        if self.faults.len() >= self.keep {
            self.more += 1;
            return Ok(());
        }
        let FaultAt { stage, cause, span, address, path, .. } = *fault;
        self.faults.push(FaultSeen { stage, cause, span, address, path: path.to_vec() });
        Ok(())
    }
}
