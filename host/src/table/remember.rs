//! The transcoder's memory: what the format said about each pattern, asked once.

use std::collections::HashMap;

use crate::Attributes;
use crate::memory::{Budget, Exhausted};
use crate::table::format::{Finding, Format, FormatError, Meaning};
use crate::table::geometry::{AddressField, Geometry, Nonsense, Shape};

/// Most patterns that are remembered for one table: more than any driver writes, and a bound on what a guest can make the host keep.
pub(crate) const MAX_REMEMBERED: usize = 4096;

/// Patterns of one kind of table that are tried before the map: real tables alternate between a few.
const RECENT: usize = 4;

/// A shape, ready for use.
#[derive(Clone, Debug)]
pub(crate) struct ShapePlan {
    mask: u64,
    value: u64,
    pub(crate) field: AddressField,
}

/// A kind of table, ready for use.
#[derive(Clone, Debug)]
pub(crate) struct LevelPlan {
    pub(crate) number: i8,
    pub(crate) index_lsb: u8,
    pub(crate) index_bits: u8,
    shapes: Vec<ShapePlan>,
    /// For entries that match no shape.
    bare: AddressField,
}

impl LevelPlan {
    /// The address field of the shape at `index`; none means "no shape".
    #[inline]
    pub(crate) fn field(&self, shape: Option<u8>) -> &AddressField {
        shape.map_or(&self.bare, |index| &self.shapes[usize::from(index)].field)
    }

    /// The first shape that matches `entry`.
    #[inline]
    pub(crate) fn shape_of(&self, entry: u64) -> Option<u8> {
        self.shapes.iter().position(|shape| entry & shape.mask == shape.value).map(|index| index as u8)
    }

    pub(crate) const fn entries(&self) -> u64 {
        1 << self.index_bits
    }
}

/// Geometry, checked and ready for use.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) geometry: Geometry,
    pub(crate) levels: Vec<LevelPlan>,
}

impl Plan {
    pub(crate) fn new(geometry: Geometry) -> Result<Self, Nonsense> {
        geometry.check()?;
        let shape = |shape: &Shape| ShapePlan { mask: shape.mask, value: shape.value, field: AddressField::new(&shape.address) };
        let levels = geometry
            .levels
            .iter()
            .map(|level| LevelPlan {
                number: level.number,
                index_lsb: level.index_lsb,
                index_bits: level.index_bits,
                shapes: level.shapes.iter().map(shape).collect(),
                bare: AddressField::default(),
            })
            .collect();
        Ok(Self { geometry, levels })
    }
}

/// What is known about all entries with one pattern.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Remembered {
    /// `entry & mask == pattern`: the entry is one of these.
    pub(crate) mask: u64,
    pub(crate) pattern: u64,
    inherited: u64,
    pub(crate) shape: Option<u8>,
    pub(crate) meaning: Meaning,
}

/// Why judging an entry failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JudgeError {
    #[error(transparent)]
    Exhausted(#[from] Exhausted),
    #[error("the format failed: {0}")]
    Format(FormatError),
}

/// A format and what it said so far.
pub(crate) struct Judge {
    format: Box<dyn Format>,
    known: HashMap<(u8, u64, u64), Remembered>,
    whole: HashMap<(u8, u64, u64), Meaning>,
    recent: Vec<[Option<Remembered>; RECENT]>,
    asked: u64,
}

impl std::fmt::Debug for Judge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Judge").field("known", &self.known.len()).field("asked", &self.asked).finish_non_exhaustive()
    }
}

impl Judge {
    pub(crate) fn new(format: Box<dyn Format>, levels: usize) -> Self {
        Self { format, known: HashMap::new(), whole: HashMap::new(), recent: vec![[None; RECENT]; levels], asked: 0 }
    }

    /// Questions that the format was asked.
    pub(crate) const fn asked(&self) -> u64 {
        self.asked
    }

    /// Patterns that it need not be asked about again.
    pub(crate) fn patterns(&self) -> u64 {
        self.known.len() as u64
    }

    /// Asks `format` from now on, and keeps what is remembered: for another instance of the same format with the same settings.
    pub(crate) fn replace(&mut self, format: Box<dyn Format>) {
        self.format = format;
    }

    /// What `entry` is, in a table of kind `level`.
    #[inline]
    pub(crate) fn judge(&mut self, plan: &LevelPlan, level: u8, inherited: u64, entry: u64, budget: &Budget) -> Result<Remembered, JudgeError> {
        for recent in self.recent[usize::from(level)].iter().flatten() {
            if entry & recent.mask == recent.pattern && recent.inherited == inherited {
                return Ok(*recent);
            }
        }
        self.judge_slowly(plan, level, inherited, entry, budget)
    }

    /// Another pattern of leaves in the same tables and of the same shape and size as `known`, if one was met recently.
    #[inline]
    pub(crate) fn companion(&self, level: u8, known: &Remembered) -> Option<(u64, Attributes)> {
        let size = |meaning: Meaning| if let Meaning::Leaf { size_log2, attributes } = meaning { Some((size_log2, attributes)) } else { None };
        let (wanted, _) = size(known.meaning)?;
        self.recent[usize::from(level)].iter().flatten().find_map(|other| {
            let (size_log2, attributes) = size(other.meaning)?;
            let alike = (size_log2, other.mask, other.shape, other.inherited) == (wanted, known.mask, known.shape, known.inherited);
            (alike && other.pattern != known.pattern).then_some((other.pattern, attributes))
        })
    }

    /// An absent entry of the same tables, all of whose bits are pattern, if one was met recently.
    #[inline]
    pub(crate) fn absent(&self, level: u8, inherited: u64) -> Option<u64> {
        let mut recent = self.recent[usize::from(level)].iter().flatten();
        let absent = |known: &&Remembered| known.meaning == Meaning::Absent && known.mask == u64::MAX && known.inherited == inherited;
        recent.find(absent).map(|known| known.pattern)
    }

    #[cold]
    #[inline(never)]
    fn judge_slowly(&mut self, plan: &LevelPlan, level: u8, inherited: u64, entry: u64, budget: &Budget) -> Result<Remembered, JudgeError> {
        let shape = plan.shape_of(entry);
        let mask = !plan.field(shape).entry_mask;
        let key = (level, inherited, entry & mask);
        let remembered = match self.known.get(&key) {
            Some(known) => *known,
            None => {
                budget.charge_question()?;
                self.asked += 1;
                let meaning = self.format.decode(level, inherited, key.2).map_err(JudgeError::Format)?;
                let remembered = Remembered { mask, pattern: key.2, inherited, shape, meaning };
                if self.known.len() < MAX_REMEMBERED {
                    self.known.insert(key, remembered);
                }
                remembered
            }
        };
        let recent = &mut self.recent[usize::from(level)];
        recent.rotate_right(1);
        recent[0] = Some(remembered);
        Ok(remembered)
    }

    /// What an entry is whose pattern does not tell: one question per distinct entry.
    pub(crate) fn judge_whole(&mut self, level: u8, inherited: u64, entry: u64, budget: &Budget) -> Result<Meaning, JudgeError> {
        if let Some(known) = self.whole.get(&(level, inherited, entry)) {
            return Ok(*known);
        }
        budget.charge_question()?;
        self.asked += 1;
        let meaning = self.format.decode_entry(level, inherited, entry).map_err(JudgeError::Format)?;
        if self.whole.len() < MAX_REMEMBERED {
            self.whole.insert((level, inherited, entry), meaning);
        }
        Ok(meaning)
    }

    /// All that is wrong with an entry, of which the format sees as much as it needed to judge it. Not remembered: for messages.
    pub(crate) fn explain(&mut self, level: u8, inherited: u64, pattern: u64, entry: u64) -> Result<Vec<Finding>, FormatError> {
        self.asked += 2;
        let is_whole = self.format.decode(level, inherited, pattern)? == Meaning::WholeEntry;
        self.format.explain(level, inherited, if is_whole { entry } else { pattern })
    }

    /// How many bytes an entry maps, as a power of two; none if it is no leaf. Not remembered: for messages.
    pub(crate) fn leaf_size(&mut self, level: u8, inherited: u64, pattern: u64, entry: u64) -> Result<Option<u8>, FormatError> {
        self.asked += 1;
        let mut meaning = self.format.decode(level, inherited, pattern)?;
        if meaning == Meaning::WholeEntry {
            self.asked += 1;
            meaning = self.format.decode_entry(level, inherited, entry)?;
        }
        Ok(if let Meaning::Leaf { size_log2, .. } = meaning { Some(size_log2) } else { None })
    }
}
