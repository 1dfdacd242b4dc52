//! A format that tables are made in: the levels below a root, and how leaves are written, both asked and checked against the format's own decoding.

use crate::Attributes;
use crate::table::build::BuildError;
use crate::table::format::{Format, Meaning};
use crate::table::geometry::{AddressField, Level, Nonsense};
use crate::table::loss::{Loss, narrowed};
use crate::table::remember::Plan;

/// A level on the way from a root to the smallest pages.
#[derive(Debug)]
pub(crate) struct Rung {
    pub(crate) kind: u8,
    pub(crate) lsb: u8,
    pub(crate) entries: u64,
    pub(crate) bytes: u64,
    /// What is taken for a table: its bytes, or as many as the addresses of such tables are apart that the rung above can say.
    pub(crate) room: u64,
    pub(crate) absent: u64,
    pub(crate) leaf_sizes: u64,
    /// The entry that points to a table of the next rung, and where its address goes.
    pub(crate) table_pattern: u64,
    pub(crate) table_field: AddressField,
    /// The format's word for entries of this rung in a table that restricts nothing.
    pub(crate) inherited: u64,
}

impl Rung {
    /// The entry that points to a table of the next rung; none if it cannot point there.
    pub(crate) fn link(&self, table: u64) -> Option<u64> {
        self.table_field.insert(table).map(|address| self.table_pattern | address)
    }
}

/// How a leaf of one size with given attributes is written.
#[derive(Clone, Debug)]
pub(crate) struct Leaf {
    pub(crate) pattern: u64,
    pub(crate) field: AddressField,
    /// Highest address byte that can be expressed.
    pub(crate) last_address: u64,
    /// What it grants.
    pub(crate) attributes: Attributes,
    pub(crate) narrowed: Vec<Loss>,
}

impl Leaf {
    /// The entry of such a leaf at `address`; none if it cannot point there.
    #[inline]
    pub(crate) fn entry(&self, address: u64, size_log2: u8) -> Option<u64> {
        if self.reaches(address, size_log2) { self.field.insert(address).map(|address| self.pattern | address) } else { None }
    }

    /// The same for any number of addresses; none where they stand in entries in too many parts. An address that is no multiple of the size has no entry.
    #[inline]
    pub(crate) fn entries(&self, size_log2: u8) -> Option<impl Fn(u64) -> Option<u64> + use<>> {
        let (pattern, in_place, moved, below) = (self.pattern, self.field.in_place, self.field.moved, low_bits(size_log2));
        let (never, highest) = (!self.field.address_mask | below, self.last_address.checked_sub(below)?);
        let entry = move |address| (address & never == 0 && address <= highest).then(|| pattern | address & in_place | moved.undo(address));
        self.field.is_plain().then_some(entry)
    }

    pub(crate) fn reaches(&self, address: u64, size_log2: u8) -> bool {
        address.checked_add(low_bits(size_log2)).is_some_and(|last| last <= self.last_address)
    }
}

/// Bits below a page of `2^size` bytes.
pub(crate) const fn low_bits(size: u8) -> u64 {
    if size >= 64 { u64::MAX } else { (1 << size) - 1 }
}

/// The format.
pub(crate) struct Target {
    format: Box<dyn Format>,
    pub(crate) plan: Plan,
    /// How often it was asked.
    pub(crate) questions: u64,
}

impl Target {
    pub(crate) fn new(mut format: Box<dyn Format>) -> Result<Self, BuildError> {
        let plan = Plan::new(format.geometry().map_err(BuildError::Format)?)?;
        Ok(Self { format, plan, questions: 0 })
    }

    /// What the format says about a kind of table.
    pub(crate) fn level(&self, kind: u8) -> &Level {
        &self.plan.geometry.levels[usize::from(kind)]
    }

    /// IOVA of entry 0 of a root table of this kind that serves IOVAs from `first` on.
    pub(crate) fn base(&self, kind: u8, first: u64) -> u64 {
        first & u64::MAX.checked_shl(self.level(kind).top_bit().into()).unwrap_or(0)
    }

    /// Follows the format from a root down: at each level the first kind of table that it can point to and that fits without a gap.
    pub(crate) fn rungs(&mut self, root: u8, mut inherited: u64) -> Result<Vec<Rung>, BuildError> {
        let mut rungs: Vec<Rung> = Vec::new();
        let (mut next, mut apart) = (Some(root), 1);
        while let Some(kind) = next {
            let (level, bytes) = (self.level(kind), self.plan.geometry.table_bytes(kind));
            let mut rung = Rung {
                kind,
                lsb: level.index_lsb,
                entries: level.entries(),
                bytes,
                room: bytes.max(apart),
                absent: level.absent,
                leaf_sizes: level.leaf_sizes,
                table_pattern: 0,
                table_field: AddressField::default(),
                inherited,
            };
            next = None;
            for below in 0..self.plan.geometry.levels.len() as u8 {
                if self.level(below).top_bit() != rung.lsb {
                    continue;
                }
                self.questions += 1;
                let Some(pattern) = self.format.encode_table(kind, below).map_err(BuildError::Format)? else { continue };
                let plan = &self.plan.levels[usize::from(kind)];
                rung.table_field = plan.field(plan.shape_of(pattern)).clone();
                rung.table_pattern = pattern;
                apart = 1 << rung.table_field.address_mask.trailing_zeros().min(63);
                self.questions += 1;
                match self.format.decode(kind, inherited, pattern).map_err(BuildError::Format)? {
                    Meaning::Table { next, inherited: word } if next.level == below => inherited = word,
                    other => return Err(Nonsense(format!("a table entry {pattern:#x} was encoded and decodes as {other:?}")).into()),
                }
                next = Some(below);
                break;
            }
            rungs.push(rung);
        }
        Ok(rungs)
    }

    /// How a leaf of `2^size` bytes is written in a rung; none if the format cannot say it.
    pub(crate) fn leaf(&mut self, rung: &Rung, size: u8, attributes: Attributes) -> Result<Option<Leaf>, BuildError> {
        self.questions += 1;
        let Some(encoded) = self.format.encode_leaf(rung.kind, size, attributes).map_err(BuildError::Format)? else { return Ok(None) };
        let Some(narrowed) = narrowed(attributes, encoded.attributes) else {
            return match encoded.attributes.within(attributes) {
                true => Ok(None),
                false => Err(Nonsense(format!("asked for `{attributes}`, a leaf was encoded that grants `{}`", encoded.attributes)).into()),
            };
        };
        let plan = &self.plan.levels[usize::from(rung.kind)];
        let field = plan.field(plan.shape_of(encoded.pattern)).clone();
        if field.extract(encoded.pattern) > low_bits(size) || size == rung.lsb && encoded.pattern & field.entry_mask != 0 {
            return Err(Nonsense(format!("the pattern {:#x} of a leaf of 2^{size} bytes has address bits", encoded.pattern)).into());
        }
        // What was encoded must mean what was granted: a format that contradicts itself is caught here, before a device could be.
        match self.meaning(rung, encoded.pattern, &field)? {
            Meaning::Leaf { size_log2, attributes: decoded } if size_log2 == size && decoded.within(encoded.attributes) => {}
            other => {
                let (pattern, granted) = (encoded.pattern, encoded.attributes);
                return Err(Nonsense(format!("a leaf {pattern:#x} of 2^{size} bytes was encoded as `{granted}` and decodes as {other:?}")).into());
            }
        }
        let bits = (!(field.address_mask | low_bits(size))).trailing_zeros().min(u32::from(self.plan.geometry.output_bits));
        Ok(Some(Leaf { pattern: encoded.pattern, field, last_address: low_bits(bits as u8), attributes: encoded.attributes, narrowed }))
    }

    /// Takes away the mark that somebody accessed a leaf as large as a slot, which hardware sets; the leaf stays as it is where that would change more.
    pub(crate) fn take_accessed(&mut self, rung: &Rung, leaf: &mut Leaf) -> Result<(), BuildError> {
        let pattern = self.level(rung.kind).accessed.taken(leaf.pattern);
        if pattern == leaf.pattern {
            return Ok(());
        }
        let field = leaf.field.clone();
        if let Meaning::Leaf { size_log2, attributes } = self.meaning(rung, pattern, &field)? {
            let same = attributes == leaf.attributes.without(Attributes::ACCESSED);
            if size_log2 == rung.lsb && same {
                (leaf.pattern, leaf.attributes) = (pattern, attributes);
            }
        }
        Ok(())
    }

    /// What the format says about an entry that it encoded.
    fn meaning(&mut self, rung: &Rung, pattern: u64, field: &AddressField) -> Result<Meaning, BuildError> {
        self.questions += 1;
        let meaning = self.format.decode(rung.kind, rung.inherited, pattern & !field.entry_mask).map_err(BuildError::Format)?;
        if meaning != Meaning::WholeEntry {
            return Ok(meaning);
        }
        self.questions += 1;
        self.format.decode_entry(rung.kind, rung.inherited, pattern).map_err(BuildError::Format)
    }
}
