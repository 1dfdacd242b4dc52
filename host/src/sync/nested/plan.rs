//! What a host table is made of: the levels below each root, and how leaves that fill a slot are written.

use std::collections::HashMap;
use std::sync::Arc;

use crate::memory::{EntryLayout, PAGE};
use crate::sync::nested::marks::{Tracks, Writes};
use crate::table::{BuildError, Format, Geometry, Leaf, Level, Nonsense, Rung, Target};
use crate::{Attributes, Span};

/// A root and the levels below it.
#[derive(Debug)]
pub(super) struct Chain {
    pub(super) setting: String,
    pub(super) rungs: Vec<Rung>,
}

impl Chain {
    /// What is allocated for a table of a rung.
    pub(super) fn bytes(&self, depth: usize) -> u64 {
        self.rungs[depth].bytes.next_power_of_two().max(PAGE)
    }
}

/// The IOVAs that a chain serves.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    pub(super) span: Span,
    pub(super) chain: usize,
    /// IOVA of entry 0 of the root table.
    pub(super) base: u64,
}

/// The leaves of all rungs of one chain for given attributes, and what their marks tell.
type OfRungs = Arc<[Option<(Leaf, Tracks)>]>;

/// A host format, and what it said so far.
pub(super) struct HostPlan {
    pub(super) chains: Vec<Arc<Chain>>,
    pub(super) windows: Vec<Window>,
    pub(super) leaves: Leaves,
}

/// How leaves are written.
pub(super) struct Leaves {
    pub(super) target: Target,
    /// Leaves that nobody accessed are written without the mark.
    takes_accessed: bool,
    /// All writable leaves are written clean.
    pub(super) takes_dirty: bool,
    known: HashMap<(usize, Attributes), OfRungs>,
    recent: Option<(usize, Attributes, OfRungs)>,
    /// The format failed in this batch: nobody asks again.
    pub(super) failed: bool,
}

const fn fills_slots(rung: &Rung) -> bool {
    rung.leaf_sizes >> rung.lsb & 1 != 0
}

impl HostPlan {
    pub(super) fn new(format: Box<dyn Format>) -> Result<Self, BuildError> {
        let target = Target::new(format)?;
        let leaves = Leaves { target, takes_accessed: false, takes_dirty: false, known: HashMap::new(), recent: None, failed: false };
        let mut this = Self { chains: Vec::new(), windows: Vec::new(), leaves };
        for root in this.geometry().roots.clone() {
            let same = |chain: &Arc<Chain>| chain.setting == root.setting && chain.rungs[0].kind == root.level;
            let chain = match this.chains.iter().position(same) {
                Some(chain) => chain,
                None => {
                    let rungs = this.leaves.target.rungs(root.level, root.inherited)?;
                    if !rungs.iter().any(fills_slots) {
                        return Err(Nonsense("no pages as large as their slots can be reached from a root".to_owned()).into());
                    }
                    this.chains.push(Arc::new(Chain { setting: root.setting.clone(), rungs }));
                    this.chains.len() - 1
                }
            };
            let base = this.leaves.target.base(root.level, root.first);
            this.windows.push(Window { span: Span { first: root.first, last: root.last }, chain, base });
        }
        Ok(this)
    }

    pub(super) fn geometry(&self) -> &Geometry {
        &self.leaves.target.plan.geometry
    }

    pub(super) fn level(&self, rung: &Rung) -> &Level {
        self.leaves.target.level(rung.kind)
    }

    /// Where a leaf of a rung goes that fills a slot.
    pub(super) fn address(&self, rung: &Rung, entry: u64) -> Span {
        let plan = &self.leaves.target.plan.levels[usize::from(rung.kind)];
        Span::of_log2(plan.field(plan.shape_of(entry)).extract(entry) >> rung.lsb << rung.lsb, rung.lsb)
    }

    pub(super) fn layout(&self) -> EntryLayout {
        EntryLayout { bytes: self.geometry().entry_bytes, order: self.geometry().order }
    }
}

impl Leaves {
    /// Leaves that nobody accessed are written without the mark from now on, or with it.
    pub(super) fn take_accessed(&mut self, on: bool) {
        if std::mem::replace(&mut self.takes_accessed, on) != on {
            self.known.clear();
            self.recent = None;
        }
    }

    /// How leaves with `attributes` are written in each rung of a chain, which has this number: asked once. None: the format failed or contradicted itself, now or earlier in this
    /// batch.
    #[inline]
    pub(super) fn of(&mut self, chain: &Chain, number: usize, attributes: Attributes) -> Option<&[Option<(Leaf, Tracks)>]> {
        let clean = self.takes_dirty && attributes.contains(Attributes::WRITE);
        let asked = if clean { attributes.with(Attributes::WRITABLE_WHEN_DIRTY).without(Attributes::DIRTY) } else { attributes };
        if !matches!(&self.recent, Some((of, known, _)) if *of == number && *known == asked) {
            self.recent = Some((number, asked, self.of_slowly(chain, number, asked)?));
        }
        self.recent.as_ref().map(|(_, _, leaves)| &**leaves)
    }

    #[inline(never)]
    fn of_slowly(&mut self, chain: &Chain, number: usize, asked: Attributes) -> Option<OfRungs> {
        if let Some(known) = self.known.get(&(number, asked)) {
            return Some(Arc::clone(known));
        }
        if self.failed {
            return None;
        }
        let leaves: Result<OfRungs, BuildError> = chain.rungs.iter().map(|rung| self.leaf(rung, asked)).collect();
        let leaves = leaves.inspect_err(|error| {
            tracing::debug!(%error, %asked, "the host's format does not say how pages are written");
            self.failed = true;
        });
        let leaves = leaves.ok()?;
        self.known.insert((number, asked), Arc::clone(&leaves));
        Some(leaves)
    }

    /// A leaf as large as a slot.
    fn leaf(&mut self, rung: &Rung, asked: Attributes) -> Result<Option<(Leaf, Tracks)>, BuildError> {
        if !fills_slots(rung) {
            return Ok(None);
        }
        let Some(mut leaf) = self.target.leaf(rung, rung.lsb, asked)? else { return Ok(None) };
        if self.takes_accessed && !asked.contains(Attributes::ACCESSED) {
            self.target.take_accessed(rung, &mut leaf)?;
        }
        let level = self.target.level(rung.kind);
        let waits = leaf.attributes.contains(Attributes::WRITABLE_WHEN_DIRTY) && level.dirty.exists() && !level.dirty.is_set(leaf.pattern);
        let writes = match leaf.attributes.contains(Attributes::WRITE) {
            false => Writes::Never,
            true if waits => Writes::Marked,
            true => Writes::Unseen,
        };
        let accessed = level.accessed.exists() && !level.accessed.is_set(leaf.pattern);
        Ok(Some((leaf, Tracks { accessed, writes, was_accessed: false, was_dirty: false })))
    }
}
