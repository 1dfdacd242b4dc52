//! One candidate tried: a walk from the root, table by table and level by level, in which every word is weighed.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

use crate::memory::{EntryLayout, EntryMemory, Kind, MemoryMap, PAGE};
use crate::plugin::TableConfig;
use crate::table::{AddressField, Format, FormatError, Geometry, Level, Meaning, Next};
use crate::{Attributes, Gpa, MemoryType, Span};

use super::evidence::{AGAIN, Class, EMPTY, Evidence, HOLE, ODD, PARTLY, REMAINS, Roles, SKIP, UNUSUAL, WRONG, as_anything, choice};
use super::{HOPELESS, Missing, Subject};

/// How tables nest, whatever the width of the root: lowest index bits of the levels from the root down, and the size of entries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Nest {
    index_lsbs: Vec<u8>,
    entry_bytes: u8,
}

impl Nest {
    fn new(geometry: &Geometry, root: u8) -> Self {
        let top = geometry.levels[usize::from(root)].index_lsb;
        let mut index_lsbs: Vec<u8> = geometry.levels.iter().map(|level| level.index_lsb).filter(|lsb| *lsb <= top).collect();
        index_lsbs.sort_unstable_by(|a, b| b.cmp(a));
        index_lsbs.dedup();
        Self { index_lsbs, entry_bytes: geometry.entry_bytes }
    }

    /// Levels from the root to the last.
    pub(super) fn levels(&self) -> u8 {
        self.index_lsbs.len() as u8
    }

    /// Smallest page in bytes.
    pub(super) fn granule(&self) -> u64 {
        1 << self.index_lsbs.last().copied().unwrap_or(0)
    }

    /// How far below the root a level is.
    fn depth(&self, level: &Level) -> usize {
        self.index_lsbs.iter().position(|lsb| *lsb == level.index_lsb).unwrap_or(0)
    }
}

/// A candidate that was tried.
#[derive(Debug)]
pub(super) struct Scored {
    pub(super) config: TableConfig,
    pub(super) nest: Nest,
    pub(super) evidence: Evidence,
}

/// A table that is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Place {
    level: u8,
    address: u64,
    inherited: u64,
    exists: (u64, u64),
}

/// What an entry is, as far as its pattern says.
#[derive(Clone, Copy, Debug)]
struct Judged {
    meaning: Meaning,
    /// Index into [`Scorer::classes`], for leaves and tables.
    class: usize,
}

/// A word, taken apart.
struct Looked {
    shape: Option<u8>,
    /// Address bits.
    mask: u64,
    address: u64,
    pattern: u64,
    judged: Judged,
    meaning: Meaning,
}

/// Patterns of absent entries that are told apart.
const MOST_REMAINS: usize = 4096;

/// Which entries share a [`Class`]: kind of table, shape, and whether they are tables.
type ClassKey = (u8, Option<u8>, bool);

struct LevelShapes {
    shapes: Vec<(u64, u64, AddressField)>,
    bare: AddressField,
}

impl LevelShapes {
    fn new(level: &Level) -> Self {
        let shapes = level.shapes.iter().map(|shape| (shape.mask, shape.value, AddressField::new(&shape.address))).collect();
        Self { shapes, bare: AddressField::default() }
    }

    fn find(&self, entry: u64) -> Option<u8> {
        self.shapes.iter().position(|(mask, value, _)| entry & mask == *value).map(|index| index as u8)
    }

    fn field(&self, shape: Option<u8>) -> &AddressField {
        shape.map_or(&self.bare, |index| &self.shapes[usize::from(index)].2)
    }
}

/// Tries one candidate.
pub(super) struct Scorer<'a, M: ?Sized> {
    format: Box<dyn Format>,
    config: TableConfig,
    subject: &'a Subject<'a, M>,
    geometry: Geometry,
    nest: Nest,
    shapes: Vec<LevelShapes>,
    judged: HashMap<(u8, u64, u64), Judged>,
    classes: Vec<Class>,
    class_of: HashMap<ClassKey, usize>,
    /// Patterns of absent entries that are not empty, by level.
    remains: HashSet<(u8, u64)>,
    /// Ranges that were reached as tables: first to last byte, and as what.
    claimed: BTreeMap<u64, (u64, u8, u64)>,
    queue: VecDeque<Place>,
    /// Tables that several neighbours point to: whether they lead to nothing.
    nowhere: HashMap<Place, bool>,
    evidence: Evidence,
    pages_left: u64,
    /// The same, for finding out whether tables lead to nothing.
    nowhere_pages_left: u64,
    questions_left: u64,
    /// Bytes of the memory map that leaves may point to.
    mapped: f64,
}

/// Where a walk inside one table is.
struct Cursor {
    place: Place,
    index: u64,
    previous: u64,
    /// Where the leaf before ended.
    end: Option<u64>,
    /// What the last word was.
    last: Last,
}

/// What a word was, as far as it matters for one that is equal.
#[derive(Clone, Copy, Debug)]
enum Last {
    /// Absent or a fault.
    Nothing,
    /// A table, or a leaf of its slot's size.
    Whole,
    /// A leaf that is larger than its slot.
    Replica,
    /// A table that leads to nothing.
    Nowhere,
}

impl<'a, M: EntryMemory + ?Sized> Scorer<'a, M> {
    /// A candidate that is ready to be tried; none if it has no root.
    pub(super) fn new(
        mut format: Box<dyn Format>,
        config: TableConfig,
        subject: &'a Subject<'a, M>,
        pages: u64,
        questions: u64,
    ) -> Result<Option<Self>, FormatError> {
        let geometry = format.geometry()?;
        let Some(root) = geometry.roots.iter().find(|root| root.address == subject.root) else { return Ok(None) };
        let root = Place { level: root.level, address: root.address, inherited: root.inherited, exists: (0, u64::MAX) };
        let nest = Nest::new(&geometry, root.level);
        let mapped = subject.map.targets().iter().map(|span| span.length_minus_one() as f64 + 1.0).sum();
        let mut scorer = Self {
            format,
            config,
            subject,
            shapes: geometry.levels.iter().map(LevelShapes::new).collect(),
            evidence: Evidence { tables_by_level: vec![0; usize::from(nest.levels())], ..Evidence::default() },
            nest,
            geometry,
            judged: HashMap::new(),
            classes: Vec::new(),
            class_of: HashMap::new(),
            remains: HashSet::new(),
            claimed: BTreeMap::new(),
            queue: VecDeque::new(),
            nowhere: HashMap::new(),
            pages_left: pages,
            nowhere_pages_left: pages,
            questions_left: questions,
            mapped,
        };
        scorer.claim(root);
        Ok(Some(scorer))
    }

    /// Weighs every word that can be reached, as far as the budget goes.
    pub(super) fn run(mut self) -> Result<Scored, FormatError> {
        while let Some(place) = self.queue.pop_front() {
            if self.evidence.stopped.is_some() {
                break;
            }
            self.table(place)?;
            if self.evidence.bits <= HOPELESS {
                self.stop("hopeless");
            }
        }
        self.evidence.patterns = self.classes.iter().map(Class::different).sum();
        Ok(Scored { config: self.config, nest: self.nest, evidence: self.evidence })
    }

    fn stop(&mut self, why: &'static str) {
        self.evidence.stopped.get_or_insert(why);
    }

    fn bytes(&self, level: u8) -> u64 {
        self.geometry.table_bytes(level)
    }

    fn claim(&mut self, place: Place) {
        let last = place.address.saturating_add(self.bytes(place.level) - 1);
        self.claimed.insert(place.address, (last, place.level, place.inherited));
        self.queue.push_back(place);
    }

    /// What a range is already: none, the same table, or something else.
    fn claimed_as(&self, place: Place) -> Option<bool> {
        let last = place.address.saturating_add(self.bytes(place.level) - 1);
        let (first, (end, level, inherited)) = self.claimed.range(..=last).next_back()?;
        (*end >= place.address).then_some((*first, *level, *inherited) == (place.address, place.level, place.inherited))
    }

    /// Reads one table, page by page.
    fn table(&mut self, place: Place) -> Result<(), FormatError> {
        let size = u64::from(self.geometry.entry_bytes);
        let entries = self.geometry.levels[usize::from(place.level)].entries();
        let (first, last) = (place.exists.0, place.exists.1.min(entries - 1));
        let depth = self.nest.depth(&self.geometry.levels[usize::from(place.level)]);
        self.evidence.tables += 1;
        self.evidence.tables_by_level[depth] += 1;
        let before = self.evidence.good() + self.evidence.bad();
        let mut cursor = Cursor { place, index: first, previous: 0, end: None, last: Last::Nothing };
        let mut buffer = [0; (PAGE / 4) as usize];
        while cursor.index <= last {
            let Some(left) = self.pages_left.checked_sub(1) else {
                self.stop("as many pages of tables as a candidate is tried on");
                return Ok(());
            };
            self.pages_left = left;
            let address = place.address.wrapping_add(cursor.index * size);
            let count = ((PAGE - address % PAGE) / size).min(last - cursor.index + 1);
            let words = &mut buffer[..count as usize];
            if !self.read(address, words) {
                if self.subject.missing == Missing::Against {
                    self.evidence.bits -= HOLE;
                }
                cursor.index += count;
                continue;
            }
            for &word in buffer[..count as usize].iter() {
                let weight = self.entry(&mut cursor, word)?;
                self.evidence.bits += if word == cursor.previous { self.again(&cursor, weight) } else { weight };
                cursor.previous = word;
                cursor.index += 1;
                if self.evidence.stopped.is_some() || self.evidence.bits <= HOPELESS {
                    return Ok(());
                }
            }
        }
        if self.evidence.good() + self.evidence.bad() == before && depth > 0 {
            self.evidence.empty_tables += 1;
            self.evidence.bits -= EMPTY;
        }
        Ok(())
    }

    /// The weight of a word that stands beside an equal one. It is no evidence for anything: memory is full of repetitions. Where the leaf is larger than
    /// its slot it has to be so, and slots that are not used may all lead to one table with nothing in it; but neighbours that point to the same page or table
    /// are rare otherwise.
    fn again(&self, cursor: &Cursor, weight: f64) -> f64 {
        match cursor.last {
            Last::Replica | Last::Nowhere | Last::Nothing => weight.min(0.0),
            Last::Whole => weight.min(AGAIN),
        }
    }

    /// Reads entries of one page; false: they are not there.
    fn read(&self, address: u64, words: &mut [u64]) -> bool {
        let layout = EntryLayout { bytes: self.geometry.entry_bytes, order: self.geometry.order };
        self.exists(address, words.len() as u64 * u64::from(layout.bytes)) && self.subject.memory.read_entries(Gpa(address), layout, words).is_ok()
    }

    fn exists(&self, address: u64, bytes: u64) -> bool {
        self.subject.map.region(address).is_some() && self.subject.map.region(address.saturating_add(bytes - 1)).is_some()
    }

    /// Takes one word of a table apart.
    fn look(&mut self, level: u8, inherited: u64, word: u64) -> Result<Looked, FormatError> {
        let shapes = &self.shapes[usize::from(level)];
        let shape = shapes.find(word);
        let (mask, address) = (shapes.field(shape).entry_mask, shapes.field(shape).extract(word));
        let pattern = word & !mask;
        let judged = self.judge(level, inherited, shape, pattern)?;
        let meaning = match judged.meaning {
            Meaning::WholeEntry if self.charge() => self.format.decode_entry(level, inherited, word)?,
            meaning => meaning,
        };
        Ok(Looked { shape, mask, address, pattern, judged, meaning })
    }

    /// Whether a table leads to nothing: each of its entries is absent, or a table that leads to nothing. It may be read once more later, to be weighed.
    fn leads_nowhere(&mut self, place: Place) -> Result<bool, FormatError> {
        if let Some(known) = self.nowhere.get(&place) {
            return Ok(*known);
        }
        let size = u64::from(self.geometry.entry_bytes);
        let last = place.exists.1.min(self.geometry.levels[usize::from(place.level)].entries() - 1);
        let mut buffer = [0; (PAGE / 4) as usize];
        let (mut index, mut previous, mut nowhere) = (place.exists.0, None, true);
        while nowhere && index <= last {
            let Some(left) = self.nowhere_pages_left.checked_sub(1) else { return Ok(false) };
            self.nowhere_pages_left = left;
            let address = place.address.wrapping_add(index * size);
            let count = ((PAGE - address % PAGE) / size).min(last - index + 1);
            nowhere = self.read(address, &mut buffer[..count as usize]);
            for &word in &buffer[..count as usize] {
                if nowhere && previous != Some(word) {
                    nowhere = self.is_nowhere(place, word)?;
                    previous = Some(word);
                }
            }
            index += count;
        }
        self.nowhere.insert(place, nowhere);
        Ok(nowhere)
    }

    /// The same for one word of a table.
    fn is_nowhere(&mut self, place: Place, word: u64) -> Result<bool, FormatError> {
        let looked = self.look(place.level, place.inherited, word)?;
        match looked.meaning {
            Meaning::Absent => Ok(true),
            // Each level is below the one before, so that this comes to an end.
            Meaning::Table { next, inherited } => match self.below(place.level, next, inherited, looked.address) {
                Some(below) => self.leads_nowhere(below),
                None => Ok(false),
            },
            _ => Ok(false),
        }
    }

    /// The table that an entry of a table of kind `level` points to; none if that kind cannot stand there.
    fn below(&self, level: u8, next: Next, inherited: u64, address: u64) -> Option<Place> {
        let below = self.geometry.levels.get(usize::from(next.level))?;
        let fits = below.top_bit() <= self.geometry.levels[usize::from(level)].index_lsb;
        let last = if u64::from(next.last) >= below.entries() { u64::MAX } else { u64::from(next.last) };
        fits.then_some(Place { level: next.level, address, inherited, exists: (next.first.into(), last) })
    }

    /// The weight of one word.
    fn entry(&mut self, cursor: &mut Cursor, word: u64) -> Result<f64, FormatError> {
        let Place { level, inherited, .. } = cursor.place;
        let Looked { shape, mask, address, pattern, judged, meaning } = self.look(level, inherited, word)?;
        let whole = judged.meaning == Meaning::WholeEntry;
        let slot = self.geometry.levels[usize::from(level)].index_lsb;
        cursor.last = match meaning {
            Meaning::Leaf { size_log2, .. } if size_log2 > slot => Last::Replica,
            Meaning::Leaf { .. } | Meaning::Part { .. } | Meaning::Table { .. } => Last::Whole,
            _ => Last::Nothing,
        };
        match meaning {
            Meaning::Absent => Ok(self.absent(level, word, pattern)),
            Meaning::Fault(kind) => {
                self.evidence.faults[kind as usize] += 1;
                cursor.end = None;
                Ok(WRONG)
            }
            Meaning::WholeEntry => Ok(0.0),
            Meaning::Table { next, inherited } => {
                cursor.end = None;
                let class = self.class(judged, whole, (level, shape, true), cursor.place.inherited, pattern)?;
                let Some(place) = self.below(level, next, inherited, address) else {
                    self.evidence.tables_outside += 1;
                    return Ok(WRONG);
                };
                if word == cursor.previous && self.leads_nowhere(place)? {
                    cursor.last = Last::Nowhere;
                }
                self.pointer(level, place, class, word, pattern)
            }
            Meaning::Leaf { size_log2, attributes } | Meaning::Part { size_log2, attributes, .. } => {
                let class = self.class(judged, whole, (level, shape, false), inherited, pattern)?;
                if size_log2 < slot || size_log2 >= 64 {
                    self.evidence.faults[crate::table::FaultKind::Reserved as usize] += 1;
                    return Ok(WRONG);
                }
                let below = Span::of_log2(0, size_log2).last;
                let address = if whole { address & !below } else { address };
                let piece = address.wrapping_add((cursor.index << slot) & below);
                // A size that is coded in address bits is not an address, nor a pattern that says anything new.
                let coded = if whole { pattern | word & mask & below } else { pattern };
                Ok(self.leaf(cursor, piece, (slot, size_log2), attributes, class, word, coded))
            }
        }
    }

    /// Asks the format about a pattern, once.
    fn judge(&mut self, level: u8, inherited: u64, shape: Option<u8>, pattern: u64) -> Result<Judged, FormatError> {
        if let Some(judged) = self.judged.get(&(level, inherited, pattern)) {
            return Ok(*judged);
        }
        if !self.charge() {
            return Ok(Judged { meaning: Meaning::WholeEntry, class: usize::MAX });
        }
        let meaning = self.format.decode(level, inherited, pattern)?;
        let class = match meaning {
            Meaning::Table { .. } => self.class_index((level, shape, true), inherited, pattern)?,
            Meaning::Leaf { .. } => self.class_index((level, shape, false), inherited, pattern)?,
            _ => usize::MAX,
        };
        let judged = Judged { meaning, class };
        self.judged.insert((level, inherited, pattern), judged);
        Ok(judged)
    }

    fn charge(&mut self) -> bool {
        match self.questions_left.checked_sub(1) {
            Some(left) => self.questions_left = left,
            None => self.stop("as many questions as a candidate may cost"),
        }
        self.evidence.stopped.is_none()
    }

    fn class(&mut self, judged: Judged, whole: bool, key: ClassKey, inherited: u64, pattern: u64) -> Result<usize, FormatError> {
        if whole { self.class_index(key, inherited, pattern) } else { Ok(judged.class) }
    }

    /// The class of entries of this kind; the first of them shows what each bit does.
    fn class_index(&mut self, key: ClassKey, inherited: u64, pattern: u64) -> Result<usize, FormatError> {
        if let Some(index) = self.class_of.get(&key) {
            return Ok(*index);
        }
        let roles = self.roles(key, inherited, pattern)?;
        self.classes.push(Class::new(roles));
        self.class_of.insert(key, self.classes.len() - 1);
        Ok(self.classes.len() - 1)
    }

    /// What each bit does: flips it and asks again.
    fn roles(&mut self, (level, shape, _): ClassKey, inherited: u64, pattern: u64) -> Result<Roles, FormatError> {
        let meaning = self.format.decode(level, inherited, pattern)?;
        let shapes = &self.shapes[usize::from(level)];
        let mask = shapes.field(shape).entry_mask;
        let mut roles = Roles::default();
        for bit in (0..u32::from(self.geometry.entry_bytes) * 8).map(|bit| 1_u64 << bit) {
            if mask & bit != 0 || shapes.find(pattern ^ bit) != shape || self.questions_left == 0 {
                continue;
            }
            self.questions_left -= 1;
            let flipped = self.format.decode(level, inherited, pattern ^ bit)?;
            if flipped == meaning && meaning != Meaning::WholeEntry {
                roles.idle |= bit;
            } else if std::mem::discriminant(&flipped) == std::mem::discriminant(&meaning) {
                roles.effective |= bit;
            }
        }
        roles.usual = roles.idle & self.usual(level, meaning)?;
        Ok(roles)
    }

    /// How the format itself would say this.
    fn usual(&mut self, level: u8, meaning: Meaning) -> Result<u64, FormatError> {
        Ok(match meaning {
            Meaning::Leaf { size_log2, attributes } => self.format.encode_leaf(level, size_log2, attributes)?.map_or(0, |encoded| encoded.pattern),
            Meaning::Table { next, .. } => self.format.encode_table(level, next.level)?.unwrap_or(0),
            _ => 0,
        })
    }

    /// An entry that is absent: zeroes say nothing, nor does what an unused slot holds. What drivers leave behind has few patterns; garbage has many.
    fn absent(&mut self, level: u8, word: u64, pattern: u64) -> f64 {
        if word == 0 || word == self.geometry.levels[usize::from(level)].absent || self.remains.contains(&(level, pattern)) {
            return 0.0;
        }
        if self.remains.len() < MOST_REMAINS {
            self.remains.insert((level, pattern));
        }
        REMAINS
    }

    /// Bits to say that a word is not zero.
    fn present(&self) -> f64 {
        f64::from(self.geometry.entry_bytes) / 4.0
    }

    fn pointer(&mut self, level: u8, place: Place, class: usize, word: u64, pattern: u64) -> Result<f64, FormatError> {
        let Place { address, exists, .. } = place;
        let size = self.geometry.entry_bytes;
        let skips = self.geometry.levels[usize::from(place.level)].top_bit() < self.geometry.levels[usize::from(level)].index_lsb;
        let bytes = self.bytes(place.level);
        let anything = as_anything(word, size);
        match self.claimed_as(place) {
            // Tables may be shared. That one is said nothing about the format that its first use did not say. One with nothing in it may serve several levels.
            Some(same) if same || self.claimed.contains_key(&address) && self.leads_nowhere(place)? => {
                self.evidence.pointers += 1;
                return Ok(0.0);
            }
            Some(_) => {
                self.evidence.overlaps += 1;
                return Ok(WRONG);
            }
            None => {}
        }
        let in_memory = address >> self.geometry.output_bits.min(63) == 0 && self.exists(address, bytes.min(PAGE));
        let readable = in_memory && self.is_readable(address + exists.0 * u64::from(size));
        if !in_memory || (!readable && self.subject.missing == Missing::Against) {
            self.evidence.tables_outside += 1;
            return Ok(WRONG);
        }
        let (pattern, _) = self.pattern(class, pattern);
        let among = if readable { self.subject.readable as f64 } else { self.mapped };
        let weight = anything - self.present() - 1.0 - pattern - choice(among / bytes.min(PAGE) as f64) - if skips { SKIP } else { 0.0 };
        self.evidence.skips += u64::from(skips);
        if readable {
            self.evidence.pointers += 1;
            self.claim(place);
        } else {
            self.evidence.unknown_tables += 1;
        }
        Ok(weight)
    }

    fn is_readable(&self, address: u64) -> bool {
        let layout = EntryLayout { bytes: self.geometry.entry_bytes, order: self.geometry.order };
        self.subject.memory.read_entries(Gpa(address), layout, &mut [0]).is_ok()
    }

    /// Bits to say a pattern, and whether it is new.
    fn pattern(&mut self, class: usize, pattern: u64) -> (f64, bool) {
        let Some(class) = self.classes.get_mut(class) else { return (0.0, false) };
        let (bits, new) = class.cost(pattern);
        if new {
            self.evidence.idle_bits += u64::from(class.odd(pattern).count_ones());
        }
        (bits, new)
    }

    #[allow(clippy::too_many_arguments)]
    fn leaf(&mut self, cursor: &mut Cursor, piece: u64, sizes: (u8, u8), attributes: Attributes, class: usize, word: u64, pattern: u64) -> f64 {
        let (slot, size_log2) = sizes;
        let span = Span::of_log2(piece, slot);
        let target =
            self.subject.map.target(span.first).filter(|_| span.last >> self.geometry.output_bits.min(63) == 0 || self.geometry.output_bits == 64);
        let end = cursor.end.replace(span.last.wrapping_add(1));
        let Some(target) = target else {
            self.evidence.leaves_outside += 1;
            return WRONG;
        };
        self.evidence.leaves += 1;
        let continues = end == Some(span.first);
        self.evidence.continued += u64::from(continues);
        let (bits, new) = self.pattern(class, pattern);
        let oddness = if new { oddness(attributes, self.geometry.privileged, self.subject.map, span.first) } else { 0.0 };
        let place = if continues { 1.0 } else { 1.0 + choice(self.mapped / 2_f64.powi(i32::from(size_log2))) };
        let partly = if target.last < span.last { PARTLY } else { 0.0 };
        let weight = as_anything(word, self.geometry.entry_bytes) - self.present() - 1.0 - bits - oddness - place - partly;
        if attributes.grants_nothing() {
            // Nobody writes such an entry: it might as well be anything.
            self.evidence.useless_leaves += 1;
            return weight.min(0.0);
        }
        weight
    }
}

/// What is odd about leaves with these attributes.
fn oddness(attributes: Attributes, privileged: bool, map: &MemoryMap, target: u64) -> f64 {
    let in_ram = map.region(target).is_some_and(|region| region.kind == Kind::Ram);
    let memory_type = match attributes.memory_type() {
        MemoryType::Device if in_ram => ODD,
        MemoryType::NonCacheable if in_ram => UNUSUAL,
        _ => 0.0,
    };
    let privileged_only = attributes.contains(Attributes::PRIVILEGED_ONLY) && !privileged && !attributes.grants_nothing();
    memory_type + if privileged_only { ODD } else { 0.0 }
}
