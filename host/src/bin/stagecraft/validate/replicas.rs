//! Leaves that are larger than their slots: every slot that they cover should say the same. Hardware looks at one of them, and nobody knows which.

use std::collections::{BTreeMap, HashMap};

use stagecraft::Span;
use stagecraft::table::{AddressSpace, FormatError, Geometry, Step};

/// Slots that are kept: more than tables of real guests have.
const MOST_SLOTS: usize = 1 << 16;

/// Slots of one table that may belong to larger leaves.
#[derive(Default)]
pub struct Slots {
    /// From the root to the first of them that was met.
    path: Vec<Step>,
    /// Where the table's first byte of IOVA space is.
    base: u64,
    /// By index: the entry.
    entries: BTreeMap<u64, u64>,
}

/// All slots that may belong to larger leaves, by table.
#[derive(Default)]
pub struct Candidates {
    /// For each kind of table: the slot's size as a power of two, and the bits that are no marks of hardware.
    levels: Vec<(u8, u64)>,
    tables: BTreeMap<(u64, u8, u64), Slots>,
    kept: usize,
}

/// A leaf whose slots are not alike.
pub struct Unlike {
    /// From the root to one of its slots.
    pub path: Vec<Step>,
    /// All that it maps.
    pub span: Span,
    /// Its slots.
    pub slots: u64,
    /// How many of them say the same.
    pub alike: u64,
}

impl Candidates {
    /// For tables of this geometry.
    pub fn new(geometry: Option<&Geometry>) -> Self {
        let level = |level: &stagecraft::table::Level| (level.index_lsb, !(level.accessed.mask | level.dirty.mask));
        Self { levels: geometry.map(|geometry| geometry.levels.iter().map(level).collect()).unwrap_or_default(), ..Self::default() }
    }

    /// Remembers the slot that `path` leads to, if it may belong to a larger leaf. `span`: what was met of it.
    pub fn add(&mut self, path: &[Step], span: Span) {
        let Some(step) = path.last() else { return };
        let (Some(entry), Some((lsb, _))) = (step.entry, self.levels.get(usize::from(step.level))) else { return };
        if self.kept >= MOST_SLOTS {
            return;
        }
        let slots = self.tables.entry((step.table.0, step.level, step.inherited)).or_default();
        if slots.path.is_empty() {
            let base = (span.first >> lsb << lsb).wrapping_sub(step.index << lsb);
            *slots = Slots { path: path.to_vec(), base, entries: BTreeMap::new() };
        }
        self.kept += usize::from(slots.entries.insert(step.index, entry).is_none());
    }

    /// Leaves whose slots are not alike, each once. Marks of hardware do not count: it marks the slot that it looked at.
    pub fn unlike(&self, space: &mut AddressSpace) -> Result<Vec<Unlike>, FormatError> {
        let (mut unlike, mut sizes) = (Vec::new(), HashMap::new());
        for slots in self.tables.values() {
            let Some(step) = slots.path.last() else { continue };
            let Some((lsb, says)) = self.levels.get(usize::from(step.level)) else { continue };
            let mut next = 0;
            for (&index, &entry) in &slots.entries {
                if index < next {
                    continue;
                }
                let step = Step { index, entry: Some(entry), ..*step };
                let size = match sizes.get(&(step.level, step.inherited, entry)) {
                    Some(size) => *size,
                    None => *sizes.entry((step.level, step.inherited, entry)).or_insert(space.leaf_size(1, &step)?),
                };
                let Some(repeats) = size.and_then(|size| size.checked_sub(*lsb)).filter(|repeats| (1..16).contains(repeats)) else { continue };
                let first = index >> repeats << repeats;
                next = first + (1 << repeats);
                let alike = slots.entries.range(first..next).filter(|(_, other)| (**other ^ entry) & says == 0).count() as u64;
                if alike != 1 << repeats {
                    let mut path = slots.path.clone();
                    path.pop();
                    path.push(step);
                    let span = Span::of_log2(slots.base.wrapping_add(first << lsb), lsb + repeats);
                    unlike.push(Unlike { path, span, slots: 1 << repeats, alike });
                }
            }
        }
        Ok(unlike)
    }
}
