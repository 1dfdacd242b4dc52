//! Building a table of any format from mappings in ascending order.
//!
//! The result depends on the mappings alone, not on the page sizes they came in: every IOVA is mapped by the largest page that the target format has
//! there. Tables are filled from left to right, each entry written once. A table that turns out to be one contiguous range is given back and becomes a leaf
//! of the level above ("promotion"), so that the common case, pages as large as the source's, is a plain copy with the pattern replaced.

mod runs;

use std::sync::Arc;

use crate::memory::{EntryLayout, EntryMemory};
use crate::table::arena::{Arena, Full, fill_entries, write_entry};
use crate::table::build::runs::{Merging, Prepared, Upcoming};
use crate::table::format::{Format, FormatError};
use crate::table::geometry::{Geometry, Nonsense};
use crate::table::lanes;
use crate::table::leaves::{Piece, Run};
use crate::table::loss::{Loss, Losses};
use crate::table::passage::Receiver;
use crate::table::recode::Passed;
use crate::table::stage::{Page, Stage};
use crate::table::target::{Leaf, Rung, Target, low_bits};
use crate::table::visit::{FaultAt, Step, Visitor};
use crate::table::walk::WalkError;
use crate::{Attributes, Gpa, Span};

/// A table cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The format failed.
    #[error("the format failed: {0}")]
    Format(FormatError),
    /// The format describes a table that cannot be, or contradicts itself.
    #[error(transparent)]
    Nonsense(#[from] Nonsense),
    /// No memory is left for tables.
    #[error(transparent)]
    Full(#[from] Full),
}

/// A table that was built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Built {
    /// For each root, the setting that holds its address, and the address.
    pub roots: Vec<(String, Gpa)>,
    /// What the target could not say.
    pub losses: Losses,
    /// Leaf entries written, those of tables that were promoted left out; a leaf that fills several slots counts once per slot.
    pub leaves: u64,
    /// Questions that the format was asked.
    pub questions: u64,
}

/// A root and the levels below it.
#[derive(Debug)]
struct Chain {
    setting: String,
    rungs: Vec<Rung>,
    /// Page sizes and the rung that has them, largest first.
    sizes: Vec<(u8, usize)>,
    /// The root table, once there is one: offset in the arena, entries written.
    root: Option<(u64, u64)>,
}

/// The IOVAs that a chain serves.
#[derive(Clone, Copy, Debug)]
struct Window {
    span: Span,
    chain: usize,
    /// IOVA of entry 0 of the root table.
    base: u64,
}

impl Window {
    const fn holds(&self, span: Span) -> bool {
        self.span.first <= span.first && span.last <= self.span.last
    }
}

/// The leaves of one chain for given attributes. The format is asked about a size when it matters: some have dozens.
#[derive(Debug)]
struct Encoding {
    chain: usize,
    attributes: Attributes,
    /// The sizes that the format was asked about: bit `n` is for `2^n` bytes.
    asked: u64,
    /// Those that it has, largest first: size, rung and leaf.
    usable: Arc<[(u8, usize, Arc<Leaf>)]>,
}

impl Encoding {
    fn leaf(&self, size: u8) -> Option<&Arc<Leaf>> {
        self.usable.iter().find(|(known, _, _)| *known == size).map(|(_, _, leaf)| leaf)
    }
}

/// Whether a table's entries so far are one contiguous range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Contents {
    Empty,
    Contiguous { attributes: Attributes, pattern: u64, first: u64, next: u64 },
    Mixed,
}

/// A table that is being filled.
#[derive(Clone, Copy, Debug)]
struct Open {
    offset: u64,
    base: u64,
    filled: u64,
    contents: Contents,
    /// Leaves are written past the cache, without a page to be filled first.
    past_cache: bool,
}

/// Builds one table. Mappings come through [`Visitor`] or [`Builder::map`] in ascending order of IOVA; [`Builder::finish`] ends it.
pub struct Builder<'a> {
    target: Target,
    arena: &'a mut Arena,
    layout: EntryLayout,
    chains: Vec<Chain>,
    windows: Vec<Window>,
    /// The window that the open tables belong to.
    window: Option<usize>,
    open: Vec<Open>,
    /// For each open table, the page that it is filled in, if not in place.
    staged: Vec<Option<Box<Page>>>,
    stage: Stage,
    /// Bytes of tables before this one was begun.
    before: u64,
    pending: Option<Piece>,
    encodings: Vec<Encoding>,
    /// For runs like the last one.
    prepared: Option<Box<Prepared>>,
    /// For leaves like the last that were smaller than the target's pages.
    merging: Option<Box<Merging>>,
    /// Where entries were written in advance.
    upcoming: Option<Upcoming>,
    /// The first leaves of pages that several make up.
    merged: Vec<u64>,
    losses: Losses,
    leaves: u64,
    /// All requests have a PASID.
    for_pasids: bool,
    failed: Option<BuildError>,
}

impl std::fmt::Debug for Builder<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Builder").field("chains", &self.chains).field("open", &self.open).field("losses", &self.losses).finish_non_exhaustive()
    }
}

impl<'a> Builder<'a> {
    /// A builder of tables as `format` describes them; the addresses of its roots are not looked at.
    ///
    /// # Errors
    /// The format failed, describes a table that cannot be, or has no way from its root to a page.
    pub fn new(format: Box<dyn Format>, arena: &'a mut Arena) -> Result<Self, BuildError> {
        let target = Target::new(format)?;
        let layout = EntryLayout { bytes: target.plan.geometry.entry_bytes, order: target.plan.geometry.order };
        let before = arena.bytes();
        let mut builder = Self {
            target,
            arena,
            layout,
            chains: Vec::new(),
            windows: Vec::new(),
            window: None,
            open: Vec::new(),
            staged: Vec::new(),
            stage: Stage::default(),
            before,
            pending: None,
            encodings: Vec::new(),
            prepared: None,
            merging: None,
            upcoming: None,
            merged: Vec::new(),
            losses: Losses::default(),
            leaves: 0,
            for_pasids: false,
            failed: None,
        };
        builder.plan_chains()?;
        Ok(builder)
    }

    /// The same for a table that only requests with PASID use: nothing is left out that units do not look up for others
    /// ([`Geometry::untranslated`]).
    #[must_use]
    pub fn for_pasids(self) -> Self {
        Self { for_pasids: true, ..self }
    }

    /// The target's geometry.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.target.plan.geometry
    }

    /// Tables must stand below `2^table_bits` so that entries, and everything that holds a root's address, can point to them.
    #[must_use]
    pub fn table_bits(&self) -> u8 {
        let above = |chain: &'_ Chain| chain.rungs.split_last().map_or(0, |(_, above)| above.len());
        let fields = self.chains.iter().flat_map(|chain| &chain.rungs[..above(chain)]).map(|rung| {
            // Address bits below the lowest one of the field are those of the table's size.
            let field = rung.table_field.address_mask;
            (!(field | field.wrapping_sub(1) & !field)).trailing_zeros() as u8
        });
        fields.chain([self.target.plan.geometry.output_bits]).min().unwrap_or(0)
    }

    fn plan_chains(&mut self) -> Result<(), BuildError> {
        for root in self.target.plan.geometry.roots.clone() {
            let chain = match self.chains.iter().position(|chain| chain.setting == root.setting && chain.rungs[0].kind == root.level) {
                Some(chain) => chain,
                None => {
                    let chain = self.plan_chain(root.setting.clone(), root.level, root.inherited)?;
                    self.chains.push(chain);
                    self.chains.len() - 1
                }
            };
            let base = self.target.base(root.level, root.first);
            self.windows.push(Window { span: Span { first: root.first, last: root.last }, chain, base });
        }
        Ok(())
    }

    fn plan_chain(&mut self, setting: String, root: u8, inherited: u64) -> Result<Chain, BuildError> {
        let rungs = self.target.rungs(root, inherited)?;
        let mut sizes: Vec<(u8, usize)> = Vec::new();
        for (depth, rung) in rungs.iter().enumerate() {
            let top = u32::from(rung.lsb) + rung.entries.trailing_zeros();
            sizes.extend((rung.lsb..64).filter(|size| rung.leaf_sizes >> size & 1 != 0 && u32::from(*size) < top.min(64)).map(|size| (size, depth)));
        }
        sizes.sort_by_key(|(size, depth)| (std::cmp::Reverse(*size), std::cmp::Reverse(*depth)));
        sizes.dedup_by_key(|(size, _)| *size);
        if sizes.is_empty() {
            return Err(Nonsense(format!("no pages can be reached from root `{setting}`")).into());
        }
        Ok(Chain { setting, rungs, sizes, root: None })
    }

    /// Maps `piece`, which lies above everything mapped before.
    ///
    /// # Errors
    /// The format failed or contradicts itself, or no memory is left for tables.
    pub fn map(&mut self, piece: &Piece) -> Result<(), BuildError> {
        if piece.address.checked_add(piece.iova.length_minus_one()).is_none() {
            return Err(Nonsense(format!("{} is mapped to {:#x}, beyond the end of all addresses", piece.iova, piece.address)).into());
        }
        if let Some(pending) = &mut self.pending {
            let continues = pending.iova.last.checked_add(1) == Some(piece.iova.first)
                && pending.address.checked_add(pending.iova.length_minus_one()).and_then(|last| last.checked_add(1)) == Some(piece.address)
                && pending.attributes == piece.attributes;
            if continues {
                pending.iova.last = piece.iova.last;
                return Ok(());
            }
        }
        self.flush()?;
        self.pending = Some(*piece);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), BuildError> {
        let Some(piece) = self.pending.take() else { return Ok(()) };
        if !self.leaves_out(piece.iova) {
            return self.place_all(&piece);
        }
        let parts: Vec<(bool, Span)> = self.geometry().cut(piece.iova).collect();
        for (looked_up, iova) in parts {
            let part = piece.part(iova);
            if looked_up {
                self.place_all(&part)?;
            } else {
                self.lose(Loss::InputRange, &part, iova);
            }
        }
        Ok(())
    }

    /// Whether some of these IOVAs are nobody's who uses the table.
    fn leaves_out(&self, span: Span) -> bool {
        !self.for_pasids && self.geometry().leaves_out(span)
    }

    /// Maps what windows have of a piece.
    fn place_all(&mut self, piece: &Piece) -> Result<(), BuildError> {
        let mut next = Some(piece.iova.first);
        for index in 0..self.windows.len() {
            let Some(part) = self.windows[index].span.intersection(piece.iova) else { continue };
            if let Some(first) = next.filter(|first| *first < part.first) {
                self.lose(Loss::InputRange, piece, Span { first, last: part.first - 1 });
            }
            self.place(index, piece, part)?;
            next = part.last.checked_add(1);
        }
        if let Some(first) = next.filter(|first| *first <= piece.iova.last) {
            self.lose(Loss::InputRange, piece, Span { first, last: piece.iova.last });
        }
        Ok(())
    }

    fn lose(&mut self, loss: Loss, piece: &Piece, part: Span) {
        let example = Piece { iova: part, address: piece.address.wrapping_add(part.first - piece.iova.first), attributes: piece.attributes };
        self.losses.add(loss, || example, 1, u128::from(part.length_minus_one()) + 1);
    }

    /// Maps the part of a piece that lies in a window, with the largest pages that fit.
    fn place(&mut self, window: usize, piece: &Piece, part: Span) -> Result<(), BuildError> {
        let chain = self.windows[window].chain;
        let encoding = self.encoding(chain, piece.attributes);
        let Some(smallest) = self.ask_smallest(encoding)? else {
            self.lose(Loss::Permission, piece, part);
            return Ok(());
        };
        let mut first = part.first;
        loop {
            let address = piece.address + (first - piece.iova.first);
            let left = part.last - first;
            self.ask_what_fits(encoding, (first, address), part.last)?;
            let usable = Arc::clone(&self.encodings[encoding].usable);
            let fits = |size: u8| (first | address) & low_bits(size) == 0 && left >= low_bits(size);
            let reaches = |size: u8, leaf: &Leaf| address.saturating_add(low_bits(size)) <= leaf.last_address;
            let step = match usable.iter().position(|(size, _, leaf)| fits(*size) && reaches(*size, leaf)) {
                Some(choice) => {
                    let (size, depth, leaf) = &usable[choice];
                    // As many pages of this size as there are before a larger one may fit, or the end.
                    let mut last = part.last;
                    if let Some((larger, _, _)) = choice.checked_sub(1).map(|larger| &usable[larger])
                        && (first ^ address) & low_bits(*larger) == 0
                    {
                        last = last.min(first | low_bits(*larger));
                    }
                    let room = (leaf.last_address - address).min(last - first);
                    let count = (room >> size) + u64::from(room & low_bits(*size) == low_bits(*size));
                    self.write_pages(window, *depth, *size, leaf, piece.attributes, (first, address), count.max(1))?
                }
                // Larger pages may have more address bits: up to the next place where one of those may fit.
                None if usable.iter().any(|(size, _, _)| fits(*size)) => {
                    let wider = usable.iter().rev().find(|(size, _, leaf)| reaches(*size, leaf) && (first ^ address) & low_bits(*size) == 0);
                    let last = wider.map_or(part.last, |(size, _, _)| (first | low_bits(*size)).min(part.last));
                    self.lose(Loss::OutputRange, piece, Span { first, last });
                    last - first
                }
                None => {
                    // Up to the next place where the smallest page may fit: never, if IOVA and address disagree below it.
                    let aligned = (first | low_bits(smallest)).min(part.last);
                    let last = if (first ^ address) & low_bits(smallest) == 0 { aligned } else { part.last };
                    self.lose(Loss::Granule, piece, Span { first, last });
                    last - first
                }
            };
            // `step` is the number of bytes done, minus one.
            match first.checked_add(step).filter(|last| *last < part.last) {
                Some(last) => first = last + 1,
                None => return Ok(()),
            }
        }
    }

    /// Writes up to `count` pages of one size into one table; how many bytes that were, minus one.
    #[allow(clippy::too_many_arguments)]
    fn write_pages(
        &mut self,
        window: usize,
        depth: usize,
        size: u8,
        leaf: &Leaf,
        attributes: Attributes,
        (iova, address): (u64, u64),
        count: u64,
    ) -> Result<u64, BuildError> {
        self.open_to(window, depth, iova)?;
        let rung = &self.chains[self.windows[window].chain].rungs[depth];
        let (lsb, entries) = (rung.lsb, rung.entries);
        let slots_log2 = size - lsb;
        let index = self.fill_to(depth, iova)?;
        let count = count.min((entries - index) >> slots_log2).max(1);
        let layout = self.layout;
        let words = self.words(depth);
        let mut slot = index as usize;
        for page in 0..count {
            let insert = leaf.field.insert(address + (page << size)).ok_or_else(|| Nonsense("an address was lost on its way".to_owned()))?;
            for _ in 0..1_u64 << slots_log2 {
                write_entry(words, layout, slot, leaf.pattern | insert);
                slot += 1;
            }
        }
        let slots = count << slots_log2;
        self.leaves += slots;
        let bytes = u128::from(count) << size;
        self.note_narrowed(leaf, attributes, (iova, address), 1, bytes);
        // Pages above their slots differ in pattern from the slot's own: they are promoted only by size, so they count as mixed.
        let pattern = if slots_log2 == 0 { Some(leaf.pattern) } else { None };
        note(&mut self.open[depth], index, slots, attributes, pattern, address, address.wrapping_add(slots << lsb));
        Ok((bytes - 1) as u64)
    }

    fn note_narrowed(&mut self, leaf: &Leaf, attributes: Attributes, (iova, address): (u64, u64), pieces: u64, bytes: u128) {
        for loss in &leaf.narrowed {
            let iova = Span { first: iova, last: iova.saturating_add((bytes - 1) as u64) };
            self.losses.add(*loss, || Piece { iova, address, attributes }, pieces, bytes);
        }
    }

    /// The encodings of `attributes` in a chain.
    fn encoding(&mut self, chain: usize, attributes: Attributes) -> usize {
        if let Some(known) = self.encodings.iter().position(|encoding| encoding.chain == chain && encoding.attributes == attributes) {
            return known;
        }
        self.encodings.push(Encoding { chain, attributes, asked: 0, usable: Arc::default() });
        self.encodings.len() - 1
    }

    /// The leaf of one size, if the format has it: asked once, and checked against the format's own decoding.
    fn ask(&mut self, encoding: usize, size: u8) -> Result<Option<&Arc<Leaf>>, BuildError> {
        let Encoding { chain, attributes, asked, .. } = self.encodings[encoding];
        if asked >> size & 1 == 0 {
            let Some(&(_, depth)) = self.chains[chain].sizes.iter().find(|(known, _)| *known == size) else { return Ok(None) };
            let leaf = self.target.leaf(&self.chains[chain].rungs[depth], size, attributes)?;
            let encoding = &mut self.encodings[encoding];
            encoding.asked |= 1 << size;
            if let Some(leaf) = leaf {
                let new = (size, depth, Arc::new(leaf));
                let (larger, smaller) = encoding.usable.split_at(encoding.usable.partition_point(|(known, _, _)| *known > size));
                encoding.usable = larger.iter().chain([&new]).chain(smaller).cloned().collect();
            }
        }
        Ok(self.encodings[encoding].leaf(size))
    }

    /// The smallest leaf that the format has for these attributes.
    fn ask_smallest(&mut self, encoding: usize) -> Result<Option<u8>, BuildError> {
        let chain = self.encodings[encoding].chain;
        for position in (0..self.chains[chain].sizes.len()).rev() {
            let (size, _) = self.chains[chain].sizes[position];
            if self.ask(encoding, size)?.is_some() {
                return Ok(Some(size));
            }
        }
        Ok(None)
    }

    /// Asks about the leaves that decide how a mapping up to `last` begins: the largest that fits at its beginning, and the next larger one that may
    /// fit later.
    fn ask_what_fits(&mut self, encoding: usize, (first, address): (u64, u64), last: u64) -> Result<(), BuildError> {
        let Encoding { chain, asked, .. } = self.encodings[encoding];
        if self.chains[chain].sizes.iter().all(|(size, _)| asked >> size & 1 != 0) {
            return Ok(());
        }
        let reaches = |leaf: Option<&Arc<Leaf>>, size: u8| leaf.is_some_and(|leaf| address.saturating_add(low_bits(size)) <= leaf.last_address);
        let fits = |size: u8| (first | address) & low_bits(size) == 0 && last - first >= low_bits(size);
        let count = self.chains[chain].sizes.len();
        let mut chosen = None;
        for position in 0..count {
            let (size, _) = self.chains[chain].sizes[position];
            if fits(size) && reaches(self.ask(encoding, size)?, size) {
                chosen = Some(position);
                break;
            }
        }
        for position in (0..chosen.unwrap_or(count)).rev() {
            let (size, _) = self.chains[chain].sizes[position];
            // Where IOVA and address disagree below a size, they do so below all larger ones.
            if (first ^ address) & low_bits(size) != 0 || first | low_bits(size) >= last && chosen.is_some() {
                break;
            }
            let leaf = self.ask(encoding, size)?;
            if if chosen.is_some() { leaf.is_some() } else { reaches(leaf, size) } {
                break;
            }
        }
        Ok(())
    }

    /// The words of an open table.
    #[inline]
    fn words(&mut self, depth: usize) -> &mut [u64] {
        match &mut self.staged[depth] {
            Some(page) => page.words(),
            None => self.arena.words(self.open[depth].offset),
        }
    }

    /// Opens the table of `depth` that serves `iova`, closing those that the cursor leaves.
    fn open_to(&mut self, window: usize, depth: usize, iova: u64) -> Result<(), BuildError> {
        if self.window != Some(window) {
            self.close_to(0)?;
            self.leave_root();
            let Window { chain, base, .. } = self.windows[window];
            let (offset, filled) = match self.chains[chain].root {
                Some(root) => root,
                None => (self.arena.allocate_root(self.chains[chain].rungs[0].bytes)?, 0),
            };
            // A root has no level above: whether it is contiguous is of no interest.
            self.open.push(Open { offset, base, filled, contents: Contents::Mixed, past_cache: false });
            self.staged.push(None);
            self.window = Some(window);
        }
        let chain = self.windows[window].chain;
        while let Some(top) = self.open.len().checked_sub(1).filter(|top| *top > 0) {
            if top <= depth && self.is_in_open(top, iova) {
                break;
            }
            self.close_to(top - 1)?;
        }
        while self.open.len() <= depth {
            let parent = &self.chains[chain].rungs[self.open.len() - 1];
            let base = iova & !low_bits(parent.lsb);
            let Rung { bytes, room, .. } = self.chains[chain].rungs[self.open.len()];
            let before = self.arena.bytes().saturating_sub(self.before);
            let offset = self.arena.allocate_in(bytes, room)?;
            let past_cache = runs::goes_past_cache(bytes, before);
            self.open.push(Open { offset, base, filled: 0, contents: Contents::Empty, past_cache });
            let page = self.stage.page(bytes, before);
            self.staged.push(page);
        }
        Ok(())
    }

    /// Whether the open table of `depth` serves `iova`.
    #[inline]
    fn is_in_open(&self, depth: usize, iova: u64) -> bool {
        let Some(window) = self.window else { return false };
        let parent = depth.checked_sub(1).map(|above| &self.chains[self.windows[window].chain].rungs[above]);
        parent.is_none_or(|parent| iova ^ self.open[depth].base <= low_bits(parent.lsb))
    }

    /// Fills an open table with absent entries up to the one for `iova`, whose index is returned.
    fn fill_to(&mut self, depth: usize, iova: u64) -> Result<u64, BuildError> {
        let Some(window) = self.window else { return Err(Nonsense("no table is open".to_owned()).into()) };
        let rung = &self.chains[self.windows[window].chain].rungs[depth];
        let index = iova.wrapping_sub(self.open[depth].base) >> rung.lsb;
        if index < self.open[depth].filled || index >= rung.entries {
            return Err(Nonsense(format!("mappings are not in ascending order at {iova:#x}")).into());
        }
        let absent = rung.absent;
        self.fill(depth, index, absent);
        Ok(index)
    }

    fn fill(&mut self, depth: usize, index: u64, absent: u64) {
        let filled = self.open[depth].filled;
        if filled < index {
            let layout = self.layout;
            let words = self.words(depth);
            fill_entries(words, layout, filled as usize, index as usize, absent);
            self.open[depth].contents = Contents::Mixed;
            self.open[depth].filled = index;
        }
    }

    /// Closes all tables below `depth`.
    fn close_to(&mut self, depth: usize) -> Result<(), BuildError> {
        let Some(window) = self.window else { return Ok(()) };
        let chain = self.windows[window].chain;
        while self.open.len() > depth + 1 {
            let child = self.open.len() - 1;
            let Rung { entries, absent, bytes, .. } = self.chains[chain].rungs[child];
            self.fill(child, entries, absent);
            let closed = self.open[child];
            let index = self.fill_to(child - 1, closed.base)?;
            let promoted = self.promote(chain, child, &closed)?;
            let rung = &self.chains[chain].rungs[child - 1];
            let lsb = rung.lsb;
            let entry = match &promoted {
                Some((leaf, _, address)) => leaf.field.insert(*address).map(|bits| bits | leaf.pattern),
                None => rung.table_field.insert(self.arena.base() + closed.offset).map(|bits| bits | rung.table_pattern),
            };
            let entry = entry.ok_or_else(|| Nonsense(format!("a table at {:#x} cannot be pointed to", self.arena.base() + closed.offset)))?;
            self.open.pop();
            match self.staged.pop().flatten() {
                Some(page) if promoted.is_some() => self.stage.forget(page),
                Some(page) => self.stage.write(page, self.arena.words(closed.offset), bytes),
                None => {}
            }
            let layout = self.layout;
            write_entry(self.words(child - 1), layout, index as usize, entry);
            let parent = &mut self.open[child - 1];
            match promoted {
                Some((leaf, attributes, address)) => {
                    self.arena.release(closed.offset, self.chains[chain].rungs[child].room);
                    self.leaves = self.leaves + 1 - entries;
                    note(parent, index, 1, attributes, Some(leaf.pattern), address, address.wrapping_add(low_bits(lsb)).wrapping_add(1));
                }
                None => note_table(parent, index),
            }
        }
        Ok(())
    }

    /// The leaf of the level above that says the same as a whole table, if there is one.
    fn promote(&mut self, chain: usize, child: usize, closed: &Open) -> Result<Option<(Arc<Leaf>, Attributes, u64)>, BuildError> {
        let Contents::Contiguous { attributes, first, .. } = closed.contents else { return Ok(None) };
        let size = self.chains[chain].rungs[child - 1].lsb;
        if first & low_bits(size) != 0 || !self.chains[chain].sizes.contains(&(size, child - 1)) {
            return Ok(None);
        }
        let encoding = self.encoding(chain, attributes);
        let leaf = self.ask(encoding, size)?.cloned();
        Ok(leaf.filter(|leaf| first.saturating_add(low_bits(size)) <= leaf.last_address).map(|leaf| (leaf, attributes, first)))
    }

    /// Remembers how far the root table is filled: another window of it may follow.
    fn leave_root(&mut self) {
        if let (Some(window), Some(root)) = (self.window.take(), self.open.pop()) {
            self.staged.pop();
            self.chains[self.windows[window].chain].root = Some((root.offset, root.filled));
        }
    }

    /// Ends the table.
    ///
    /// # Errors
    /// As [`Builder::map`], and whatever ended an earlier call through [`Visitor`].
    pub fn finish(mut self) -> Result<Built, BuildError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        self.flush()?;
        self.close_to(0)?;
        self.leave_root();
        self.arena.wipe_all();
        let mut roots = Vec::with_capacity(self.chains.len());
        for chain in &mut self.chains {
            let rung = &chain.rungs[0];
            let (offset, filled) = match chain.root {
                Some(root) => root,
                None => (self.arena.allocate_root(rung.bytes)?, 0),
            };
            let words = self.arena.words(offset);
            fill_entries(words, self.layout, filled as usize, rung.entries as usize, rung.absent);
            roots.push((chain.setting.clone(), Gpa(self.arena.base() + offset)));
        }
        Ok(Built { roots, losses: self.losses, leaves: self.leaves, questions: self.target.questions })
    }

    fn keep(&mut self, result: Result<(), BuildError>) -> Result<(), WalkError> {
        result.map_err(|error| {
            self.failed = Some(error);
            WalkError::Stopped
        })
    }
}

impl Visitor for Builder<'_> {
    fn leaves(&mut self, run: &Run<'_>, _: &[Step]) -> Result<(), WalkError> {
        let result = self.map_run(run);
        self.keep(result)
    }

    #[inline]
    fn receive(&mut self, run: &Run<'_>) -> Option<Receiver<'_>> {
        self.ready_for(run)
    }

    #[inline]
    fn received(&mut self, run: &Run<'_>, passed: Passed) -> Result<bool, WalkError> {
        match self.map_passed(run, passed) {
            Ok(taken) => Ok(taken),
            Err(error) => {
                self.failed = Some(error);
                Err(WalkError::Stopped)
            }
        }
    }

    fn table(&mut self) {
        if !lanes::STREAMS || self.arena.bytes() < self.before + crate::table::stage::IN_PLACE {
            self.arena.prefetch();
        }
    }

    fn takes_gaps(&self) -> bool {
        true
    }

    fn takes_large(&self) -> bool {
        true
    }

    fn piece(&mut self, piece: &Piece, _: &[Step]) -> Result<(), WalkError> {
        if piece.attributes.grants_nothing() {
            return Ok(());
        }
        let result = self.map(piece);
        self.keep(result)
    }

    fn fault(&mut self, _: &FaultAt<'_>) -> Result<(), WalkError> {
        Ok(()) // what faults for the guest's IOMMU is not mapped, and faults for the host's
    }
}

/// Remembers that `count` slots from `index` map from `address` to below `next`; `pattern` none: not one contiguous range.
fn note(open: &mut Open, index: u64, count: u64, attributes: Attributes, pattern: Option<u64>, address: u64, next: u64) {
    open.contents = match (open.contents, pattern) {
        (Contents::Empty, Some(pattern)) if index == 0 => Contents::Contiguous { attributes, pattern, first: address, next },
        (Contents::Contiguous { attributes, pattern: known, first, next: continues }, Some(pattern)) if known == pattern && continues == address => {
            Contents::Contiguous { attributes, pattern, first, next }
        }
        _ => Contents::Mixed,
    };
    open.filled = index + count;
}

/// Remembers that slot `index`, the next one, leads to a table.
const fn note_table(open: &mut Open, index: u64) {
    open.contents = Contents::Mixed;
    open.filled = index + 1;
}

/// Where tables were built can be walked at once.
impl EntryMemory for &Arena {
    fn read_entries(&self, address: Gpa, layout: EntryLayout, entries: &mut [u64]) -> Result<(), crate::memory::ReadError> {
        (**self).read_entries(address, layout, entries)
    }
}
