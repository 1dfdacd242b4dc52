//! What a host table is made of: the levels below each root, and how leaves are written.

use std::collections::HashMap;
use std::sync::Arc;

use crate::memory::EntryLayout;
use crate::table::{AddressField, BuildError, Format, Geometry, Loss, Meaning, Nonsense, Plan, narrowed};
use crate::{Attributes, Span};

/// A level on the way from a root to the smallest pages.
#[derive(Debug)]
pub(super) struct Rung {
    kind: u8,
    pub(super) lsb: u8,
    pub(super) entries: u64,
    pub(super) bytes: u64,
    pub(super) absent: u64,
    /// Leaves as large as a slot can be made.
    has_leaves: bool,
    /// The entry that points to a table of the next rung, and where its address goes.
    table_pattern: u64,
    table_field: AddressField,
    inherited: u64,
}

impl Rung {
    /// The entry that points to a table of the next rung; none if it cannot point there.
    pub(super) fn link(&self, table: u64) -> Option<u64> {
        self.table_field.insert(table).map(|address| self.table_pattern | address)
    }
}

/// A root and the levels below it.
#[derive(Debug)]
pub(super) struct Chain {
    pub(super) setting: String,
    pub(super) rungs: Vec<Rung>,
}

/// The IOVAs that a chain serves.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    pub(super) span: Span,
    pub(super) chain: usize,
    /// IOVA of entry 0 of the root table.
    pub(super) base: u64,
}

/// How a leaf of one rung with given attributes is written.
#[derive(Debug)]
pub(super) struct Leaf {
    pattern: u64,
    field: AddressField,
    last_address: u64,
    pub(super) narrowed: Vec<Loss>,
}

impl Leaf {
    /// The entry of a leaf of `2^size_log2` bytes at `address`; none if it cannot point there.
    #[inline]
    pub(super) fn entry(&self, address: u64, size_log2: u8) -> Option<u64> {
        let last = address.checked_add(low_bits(size_log2))?;
        if last > self.last_address { None } else { self.field.insert(address).map(|address| self.pattern | address) }
    }

    pub(super) fn reaches(&self, address: u64, size_log2: u8) -> bool {
        address.checked_add(low_bits(size_log2)).is_some_and(|last| last <= self.last_address)
    }
}

/// The leaves of all rungs of one chain for given attributes.
pub(super) type Leaves = Arc<[Option<Leaf>]>;

/// A host format, and what it said so far.
pub(super) struct HostPlan {
    format: Box<dyn Format>,
    plan: Plan,
    pub(super) chains: Vec<Arc<Chain>>,
    pub(super) windows: Vec<Window>,
    known: HashMap<(usize, Attributes), Leaves>,
    recent: Option<(usize, Attributes, Leaves)>,
    pub(super) questions: u64,
}

pub(super) const fn low_bits(bits: u8) -> u64 {
    if bits >= 64 { u64::MAX } else { (1 << bits) - 1 }
}

impl HostPlan {
    pub(super) fn new(mut format: Box<dyn Format>) -> Result<Self, BuildError> {
        let plan = Plan::new(format.geometry().map_err(BuildError::Format)?)?;
        let mut this = Self { format, plan, chains: Vec::new(), windows: Vec::new(), known: HashMap::new(), recent: None, questions: 0 };
        for root in this.plan.geometry.roots.clone() {
            let same = |chain: &Arc<Chain>| chain.setting == root.setting && chain.rungs[0].kind == root.level;
            let chain = match this.chains.iter().position(same) {
                Some(chain) => chain,
                None => {
                    let rungs = this.rungs(root.level, root.inherited)?;
                    this.chains.push(Arc::new(Chain { setting: root.setting.clone(), rungs }));
                    this.chains.len() - 1
                }
            };
            let top = this.plan.geometry.levels[usize::from(root.level)].top_bit();
            let base = root.first & u64::MAX.checked_shl(top.into()).unwrap_or(0);
            this.windows.push(Window { span: Span { first: root.first, last: root.last }, chain, base });
        }
        Ok(this)
    }

    pub(super) fn geometry(&self) -> &Geometry {
        &self.plan.geometry
    }

    pub(super) fn layout(&self) -> EntryLayout {
        EntryLayout { bytes: self.plan.geometry.entry_bytes, order: self.plan.geometry.order }
    }

    /// Follows the format from a root down: at each level the first kind of table that it can point to and that fits without a gap.
    fn rungs(&mut self, root: u8, mut inherited: u64) -> Result<Vec<Rung>, BuildError> {
        let mut rungs: Vec<Rung> = Vec::new();
        let mut next = Some(root);
        while let Some(kind) = next.take() {
            let level = self.plan.geometry.levels[usize::from(kind)].clone();
            let mut rung = Rung {
                kind,
                lsb: level.index_lsb,
                entries: level.entries(),
                bytes: self.plan.geometry.table_bytes(kind).next_power_of_two().max(crate::memory::PAGE),
                absent: level.absent,
                has_leaves: level.leaf_sizes >> level.index_lsb & 1 != 0,
                table_pattern: 0,
                table_field: AddressField::default(),
                inherited,
            };
            let below = (0..self.plan.geometry.levels.len()).filter(|below| self.plan.geometry.levels[*below].top_bit() == level.index_lsb);
            for below in below.collect::<Vec<_>>() {
                self.questions += 1;
                let Some(pattern) = self.format.encode_table(kind, below as u8).map_err(BuildError::Format)? else { continue };
                let plan = &self.plan.levels[usize::from(kind)];
                (rung.table_field, rung.table_pattern) = (plan.field(plan.shape_of(pattern)).clone(), pattern);
                self.questions += 1;
                match self.format.decode(kind, inherited, pattern).map_err(BuildError::Format)? {
                    Meaning::Table { next, inherited: word } if usize::from(next.level) == below => inherited = word,
                    other => return Err(Nonsense(format!("a table entry {pattern:#x} was encoded and decodes as {other:?}")).into()),
                }
                next = Some(below as u8);
                break;
            }
            rungs.push(rung);
        }
        if rungs.iter().any(|rung| rung.has_leaves) {
            return Ok(rungs);
        }
        Err(Nonsense("no pages as large as their slots can be reached from a root".to_owned()).into())
    }

    /// How leaves with `attributes` are written in each rung of a chain: asked once.
    #[inline]
    pub(super) fn leaves(&mut self, chain: usize, attributes: Attributes) -> Result<Leaves, BuildError> {
        match &self.recent {
            Some((of, known, leaves)) if *of == chain && *known == attributes => Ok(Arc::clone(leaves)),
            _ => self.leaves_slowly(chain, attributes),
        }
    }

    fn leaves_slowly(&mut self, chain: usize, attributes: Attributes) -> Result<Leaves, BuildError> {
        let leaves = match self.known.get(&(chain, attributes)) {
            Some(known) => Arc::clone(known),
            None => {
                let rungs = Arc::clone(&self.chains[chain]);
                let leaves: Leaves = rungs.rungs.iter().map(|rung| self.encode(rung, attributes)).collect::<Result<_, _>>()?;
                self.known.insert((chain, attributes), Arc::clone(&leaves));
                leaves
            }
        };
        self.recent = Some((chain, attributes, Arc::clone(&leaves)));
        Ok(leaves)
    }

    /// A leaf as large as a slot, checked against the format's own decoding.
    fn encode(&mut self, rung: &Rung, attributes: Attributes) -> Result<Option<Leaf>, BuildError> {
        if !rung.has_leaves {
            return Ok(None);
        }
        self.questions += 1;
        let Some(encoded) = self.format.encode_leaf(rung.kind, rung.lsb, attributes).map_err(BuildError::Format)? else { return Ok(None) };
        let Some(narrowed) = narrowed(attributes, encoded.attributes) else {
            return match encoded.attributes.within(attributes) {
                true => Ok(None),
                false => Err(Nonsense(format!("asked for `{attributes}`, a leaf was encoded that grants `{}`", encoded.attributes)).into()),
            };
        };
        let plan = &self.plan.levels[usize::from(rung.kind)];
        let field = plan.field(plan.shape_of(encoded.pattern)).clone();
        if encoded.pattern & field.entry_mask != 0 {
            return Err(Nonsense(format!("the pattern {:#x} of a leaf of 2^{} bytes has address bits", encoded.pattern, rung.lsb)).into());
        }
        self.questions += 1;
        let mut meaning = self.format.decode(rung.kind, rung.inherited, encoded.pattern).map_err(BuildError::Format)?;
        if meaning == Meaning::WholeEntry {
            self.questions += 1;
            meaning = self.format.decode_entry(rung.kind, rung.inherited, encoded.pattern).map_err(BuildError::Format)?;
        }
        match meaning {
            Meaning::Leaf { size_log2, attributes: decoded } if size_log2 == rung.lsb && decoded.within(encoded.attributes) => {}
            other => return Err(Nonsense(format!("a leaf {:#x} of 2^{} bytes decodes as {other:?}", encoded.pattern, rung.lsb)).into()),
        }
        let bits = (!(field.address_mask | low_bits(rung.lsb))).trailing_zeros().min(u32::from(self.plan.geometry.output_bits));
        Ok(Some(Leaf { pattern: encoded.pattern, field, last_address: low_bits(bits as u8), narrowed }))
    }
}
