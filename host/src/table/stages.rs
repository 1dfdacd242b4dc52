//! One stage or two: an address space as a device sees it.
//!
//! With two stages the first stage's tables are themselves behind the second, and its leaves are flattened through it: what comes out is what a DMA
//! gets, and a fault carries the stage that failed.

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use crate::memory::{Budget, EntryLayout, EntryMemory, MemoryMap, PAGE, ReadError};
use crate::table::direct::{Window, Windows};
use crate::table::geometry::{Geometry, may_hold_tables};
use crate::table::intercept::{Compared, Intercept, Intercepted};
use crate::table::leaves::Piece;
use crate::table::marking::{LeafMarks, unmarked};
use crate::table::source::Source;
use crate::table::visit::{Cause, FaultAt, Step, Visitor};
use crate::table::walk::{Table, WalkError};
use crate::table::{FaultKind, Finding, FormatError};
use crate::{Access, Attributes, Gpa, Iova, Span};

/// A device's I/O address space: one table, a first stage whose outputs a second stage translates, or mappings that are in no table.
#[derive(Debug)]
pub struct AddressSpace {
    kind: Kind,
    intercepts: Vec<Intercept>,
}

// There is one of these per address space, and hardly ever the small one.
#[allow(clippy::large_enum_variant)]
#[derive(Debug)]
enum Kind {
    Tables { inner: Box<Table>, outer: Option<Box<Table>> },
    Source(Arc<dyn Source>),
}

/// A DMA's target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// Guest-physical address of the byte.
    pub address: Gpa,
    /// What the leaf, or the two leaves together, allow.
    pub attributes: Attributes,
}

/// Why a DMA fails.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Which stage failed: 1, or 2 for the second of two.
    pub stage: u8,
    /// Why.
    pub cause: Cause,
    /// The level as the architecture counts it; none if no table was reached.
    pub level: Option<i8>,
    /// What was being translated: the IOVA, or at stage 2 the intermediate address.
    pub input: u64,
    /// The address that is at fault, if one is.
    pub address: Option<u64>,
    /// The second stage failed while a table of the first was read.
    pub reading_table: bool,
    /// From the root of the failing stage to the entry.
    pub path: Vec<Step>,
}

impl AddressSpace {
    /// An address space of one table.
    #[must_use]
    pub fn single(table: Table) -> Self {
        Self { kind: Kind::Tables { inner: Box::new(table), outer: None }, intercepts: Vec::new() }
    }

    /// An address space of two: `outer` translates what `inner` puts out, and where `inner`'s tables are.
    #[must_use]
    pub fn nested(inner: Table, outer: Table) -> Self {
        Self { kind: Kind::Tables { inner: Box::new(inner), outer: Some(Box::new(outer)) }, intercepts: Vec::new() }
    }

    /// An address space without tables. Windows are sorted, do not overlap, and end below 2^64 on both sides.
    #[must_use]
    pub fn direct(windows: Vec<Window>) -> Self {
        Self::of(Arc::new(Windows(windows)))
    }

    /// An address space whose mappings are in no table.
    #[must_use]
    pub fn of(source: Arc<dyn Source>) -> Self {
        Self { kind: Kind::Source(source), intercepts: Vec::new() }
    }

    /// The same, with addresses that something else serves: requests there are faults of [`Cause::Intercepted`].
    #[must_use]
    pub fn with_intercepts(self, intercepts: Vec<Intercept>) -> Self {
        Self { intercepts, ..self }
    }

    /// The tables, first stage first; none if there are no tables.
    pub fn tables(&self) -> impl Iterator<Item = &Table> {
        let tables = match &self.kind {
            Kind::Source(_) => [None, None],
            Kind::Tables { inner, outer } => [Some(&**inner), outer.as_deref()],
        };
        tables.into_iter().flatten()
    }

    /// Whether requests count as privileged whatever they say.
    #[must_use]
    pub fn privileged(&self) -> bool {
        self.tables().next().is_some_and(|table| table.geometry().privileged)
    }

    /// How often the formats were asked anything.
    #[must_use]
    pub fn questions(&self) -> u64 {
        self.tables().map(Table::questions).sum()
    }

    /// All that the format of `stage` finds wrong with an entry.
    ///
    /// # Errors
    /// The format failed.
    pub fn explain(&mut self, stage: u8, step: &Step) -> Result<Vec<Finding>, FormatError> {
        match (&mut self.kind, stage) {
            (Kind::Source(_), _) => Ok(Vec::new()),
            (Kind::Tables { outer: Some(outer), .. }, 2) => outer.explain(step),
            (Kind::Tables { inner, .. }, _) => inner.explain(step),
        }
    }

    /// How many bytes an entry of `stage` maps, as a power of two, which may be more than its slot; none if it is no leaf.
    ///
    /// # Errors
    /// The format failed.
    pub fn leaf_size(&mut self, stage: u8, step: &Step) -> Result<Option<u8>, FormatError> {
        match (&mut self.kind, stage) {
            (Kind::Source(_), _) => Ok(None),
            (Kind::Tables { outer: Some(outer), .. }, 2) => outer.leaf_size(step),
            (Kind::Tables { inner, .. }, _) => inner.leaf_size(step),
        }
    }

    /// Tells `visitor` what devices reach in `span`, in ascending order, all stages together.
    ///
    /// # Errors
    /// The budget is spent, a format failed, or the visitor stopped the walk.
    pub fn walk<M: EntryMemory + ?Sized, V: Visitor>(
        &mut self,
        memory: &M,
        map: &MemoryMap,
        span: Span,
        budget: &Budget,
        visitor: &mut V,
    ) -> Result<(), WalkError> {
        if self.intercepts.is_empty() {
            return self.walk_unfiltered(memory, map, span, budget, visitor);
        }
        let tables = self.tables().count() as u8;
        let intercepts = std::mem::take(&mut self.intercepts);
        // Between two tables there is another place to compare.
        let rules = [(0, Compared::Iova), (tables.max(1), Compared::Output)];
        let mut filter = Intercepted { intercepts: &intercepts, rules: &rules, tables, budget, visitor };
        let result = match &mut self.kind {
            Kind::Tables { inner, outer: Some(outer) } => {
                let between = [(1, Compared::Output)];
                flatten(inner, outer, memory, map, span, budget, &mut filter, Some((&intercepts, &between)))
            }
            _ => self.walk_unfiltered(memory, map, span, budget, &mut filter),
        };
        self.intercepts = intercepts;
        result
    }

    fn walk_unfiltered<M: EntryMemory + ?Sized, V: Visitor>(
        &mut self,
        memory: &M,
        map: &MemoryMap,
        span: Span,
        budget: &Budget,
        visitor: &mut V,
    ) -> Result<(), WalkError> {
        match &mut self.kind {
            Kind::Source(source) => source.walk(map, span, budget, visitor),
            Kind::Tables { inner, outer: None } => inner.walk(memory, map, span, budget, visitor),
            Kind::Tables { inner, outer: Some(outer) } => flatten(inner, outer, memory, map, span, budget, visitor, None),
        }
    }

    /// Where an access of one byte at `iova` goes.
    ///
    /// # Errors
    /// The outer error ends the question (budget, format); the inner one is the device's fault.
    pub fn translate<M: EntryMemory + ?Sized>(
        &mut self,
        memory: &M,
        map: &MemoryMap,
        iova: Iova,
        access: Access,
        budget: &Budget,
    ) -> Result<Result<Translation, Fault>, WalkError> {
        let privileged = self.privileged();
        let intercepts = &self.intercepts;
        let caught = |passed: u8, address: u64| intercepts.iter().any(|intercept| intercept.passed == passed && intercept.matches(address));
        if caught(0, iova.0) {
            return Ok(Err(intercepted(1, iova.0)));
        }
        let (inner, outer) = match &mut self.kind {
            Kind::Source(source) => {
                let mut probe = Probe::new(1, iova.0);
                source.walk(map, Span { first: iova.0, last: iova.0 }, budget, &mut probe)?;
                return Ok(probe.allowed(access, privileged).map(|(address, attributes)| Translation { address: Gpa(address), attributes }));
            }
            Kind::Tables { inner, outer } => (inner, outer),
        };
        let Some((_, canonical)) = inner.root(iova) else { return Ok(Err(no_translation(1, iova.0))) };
        let here = Span { first: canonical.0, last: canonical.0 };
        let Some(outer) = outer else {
            let mut probe = Probe::new(1, iova.0);
            inner.walk(memory, map, here, budget, &mut probe)?;
            return Ok(match probe.allowed(access, privileged) {
                Ok((address, _)) if caught(1, address) => Err(intercepted(1, address)),
                allowed => allowed.map(|(address, attributes)| Translation { address: Gpa(address), attributes }),
            });
        };
        let (address, attributes) = match through_first(inner, outer, memory, map, iova, here, access, privileged, budget)? {
            Ok(found) => found,
            Err(fault) => return Ok(Err(fault)),
        };
        if caught(1, address) {
            return Ok(Err(intercepted(2, address)));
        }
        let mut probe = Probe::new(2, address);
        outer.walk_stage(2, memory, map, Span { first: address, last: address }, budget, &mut probe)?;
        Ok(match probe.allowed(access, true) {
            Ok((address, _)) if caught(2, address) => Err(intercepted(2, address)),
            allowed => allowed.map(|(address, outer)| Translation { address: Gpa(address), attributes: attributes.through(outer) }),
        })
    }
}

/// Where the first of two tables puts an access, and what its leaf allows.
#[allow(clippy::too_many_arguments)]
fn through_first<M: EntryMemory + ?Sized>(
    inner: &mut Table,
    outer: &mut Table,
    memory: &M,
    map: &MemoryMap,
    iova: Iova,
    here: Span,
    access: Access,
    privileged: bool,
    budget: &Budget,
) -> Result<Result<(u64, Attributes), Fault>, WalkError> {
    let mut probe = Probe::new(1, iova.0);
    let outer = Outer::new(outer, memory, map, budget);
    let result = inner.walk_stage(1, &outer, &MemoryMap::everything(64), here, budget, &mut probe);
    outer.finish(result)?;
    // What is further up is read first, and marked before what is below it is read.
    let read = outer.failed.take();
    let path = match &probe.found {
        Some(Ok((_, _, path))) | Some(Err(Fault { path, .. })) => path.as_slice(),
        None => &[],
    };
    if let Some(fault) = outer.refused_table(inner.geometry(), path)? {
        return Ok(Err(fault));
    }
    if let Some(fault) = read {
        // Where no entry of the second stage failed, that leads to where nothing is: an entry of the first one is missing.
        let of_first = fault.cause == Cause::Missing && fault.path.is_empty();
        let (level, path) = (path.last().map(|step| step.number), path.to_vec());
        let missing = Fault { stage: 1, cause: Cause::Missing, level, input: iova.0, address: fault.address, reading_table: false, path };
        return Ok(Err(if of_first { missing } else { fault }));
    }
    let leaf = path.last().copied();
    let allowed = probe.allowed(access, privileged);
    if let (Ok((_, attributes)), Some(leaf)) = (&allowed, leaf) {
        let marks = LeafMarks::of(inner.geometry(), leaf.level, *attributes);
        if (marks.accessed || marks.dirty && access.write)
            && let Some(fault) = outer.refused(inner.geometry().entry_at(&leaf))?
        {
            return Ok(Err(fault));
        }
    }
    Ok(allowed)
}

/// Intercepts, and which of them count where.
type Filter<'a> = (&'a [Intercept], &'a [(u8, Compared)]);

/// Walks two tables as one. `between` is what is compared after the first.
#[allow(clippy::too_many_arguments)]
fn flatten<M: EntryMemory + ?Sized, V: Visitor>(
    inner: &mut Table,
    outer: &mut Table,
    memory: &M,
    map: &MemoryMap,
    span: Span,
    budget: &Budget,
    visitor: &mut V,
    between: Option<Filter<'_>>,
) -> Result<(), WalkError> {
    let intermediate = MemoryMap::everything(64);
    let outer = Outer::new(outer, memory, map, budget);
    let geometry = inner.geometry().clone();
    let mut flatten = Flatten { outer: &outer, geometry: &geometry, visitor };
    let result = match between {
        None => inner.walk_stage(1, &outer, &intermediate, span, budget, &mut flatten),
        Some((intercepts, rules)) => {
            let mut filter = Intercepted { intercepts, rules, tables: 2, budget, visitor: &mut flatten };
            inner.walk_stage(1, &outer, &intermediate, span, budget, &mut filter)
        }
    };
    outer.finish(result)
}

/// The fault of an address that something else serves.
fn intercepted(stage: u8, address: u64) -> Fault {
    Fault { stage, cause: Cause::Intercepted, level: None, input: address, address: Some(address), reading_table: false, path: Vec::new() }
}

fn no_translation(stage: u8, input: u64) -> Fault {
    Fault { stage, cause: Cause::Entry(FaultKind::Translation), level: None, input, address: None, reading_table: false, path: Vec::new() }
}

/// Output address, what the leaf allows, and the way to it.
type FoundLeaf = (u64, Attributes, Vec<Step>);

/// Finds out about a single address.
struct Probe {
    stage: u8,
    input: u64,
    found: Option<Result<FoundLeaf, Fault>>,
}

impl Probe {
    const fn new(stage: u8, input: u64) -> Self {
        Self { stage, input, found: None }
    }

    fn failed(&self, cause: Cause, address: Option<u64>, path: &[Step]) -> Fault {
        let level = path.last().map(|step| step.number);
        Fault { stage: self.stage, cause, level, input: self.input, address, reading_table: false, path: path.to_vec() }
    }

    /// The output address and what the leaf allows, if it allows `access`.
    fn allowed(self, access: Access, privileged: bool) -> Result<(u64, Attributes), Fault> {
        match self.found {
            None => Err(no_translation(self.stage, self.input)),
            Some(Err(fault)) => Err(fault),
            Some(Ok((address, attributes, _))) if attributes.access(privileged).allows(access) => Ok((address, attributes)),
            Some(Ok((_, _, ref path))) => Err(self.failed(Cause::Entry(FaultKind::Permission), None, path)),
        }
    }
}

impl Visitor for Probe {
    fn piece(&mut self, piece: &Piece, path: &[Step]) -> Result<(), WalkError> {
        self.found = Some(Ok((piece.address, piece.attributes, path.to_vec())));
        Ok(())
    }

    fn absent(&mut self, _: Span, path: &[Step]) -> Result<(), WalkError> {
        self.found = Some(Err(self.failed(Cause::Entry(FaultKind::Translation), None, path)));
        Ok(())
    }

    fn fault(&mut self, fault: &FaultAt<'_>) -> Result<(), WalkError> {
        self.found = Some(Err(self.failed(fault.cause, fault.address, fault.path)));
        Ok(())
    }
}

/// The second stage, as the first stage's tables and leaves see it.
struct Outer<'a, M: ?Sized> {
    table: RefCell<&'a mut Table>,
    memory: &'a M,
    map: &'a MemoryMap,
    budget: &'a Budget,
    /// The second stage's fault while a table of the first was read.
    failed: RefCell<Option<Fault>>,
    /// Why a walk of the second stage ended early.
    stopped: RefCell<Option<WalkError>>,
    /// Intermediate addresses of which is known that marks can be set there.
    marked: Cell<Option<Span>>,
}

impl<'a, M: EntryMemory + ?Sized> Outer<'a, M> {
    const fn new(table: &'a mut Table, memory: &'a M, map: &'a MemoryMap, budget: &'a Budget) -> Self {
        Self { table: RefCell::new(table), memory, map, budget, failed: RefCell::new(None), stopped: RefCell::new(None), marked: Cell::new(None) }
    }

    /// Why hardware cannot mark an entry of the first stage's tables at this intermediate address, if it cannot.
    fn refused(&self, address: u64) -> Result<Option<Fault>, WalkError> {
        if self.marked.get().is_some_and(|span| span.contains(address)) {
            return Ok(None);
        }
        let mut table = self.table.borrow_mut();
        let mut targets = Targets::new(table.geometry().no_tables_in, true);
        let page = Span::of_log2(address & !(PAGE - 1), PAGE.trailing_zeros() as u8);
        table.walk_stage(2, self.memory, self.map, page, self.budget, &mut targets)?;
        if targets.failed.is_none() {
            self.marked.set(Some(page));
            return Ok(None);
        }
        // The page may have parts: an entry does not.
        targets = Targets::new(table.geometry().no_tables_in, true);
        table.walk_stage(2, self.memory, self.map, Span { first: address, last: address }, self.budget, &mut targets)?;
        Ok(targets.failed)
    }

    /// Why hardware cannot mark one of the entries on the way to the last of `path`, if it has to and cannot.
    fn refused_table(&self, geometry: &Geometry, path: &[Step]) -> Result<Option<Fault>, WalkError> {
        for step in unmarked(geometry, path) {
            if let Some(fault) = self.refused(geometry.entry_at(step))? {
                return Ok(Some(fault));
            }
        }
        Ok(None)
    }

    /// The first stage's result, or why the second ended it.
    fn finish(&self, result: Result<(), WalkError>) -> Result<(), WalkError> {
        self.stopped.take().map_or(result, Err)
    }
}

impl<M: EntryMemory + ?Sized> EntryMemory for Outer<'_, M> {
    fn read_entries(&self, address: Gpa, layout: EntryLayout, entries: &mut [u64]) -> Result<(), ReadError> {
        if self.stopped.borrow().is_some() {
            return Err(ReadError(address));
        }
        // Whoever could not read several tables at once tries them one by one: only the last failure is one.
        self.failed.take();
        let size = u64::from(layout.bytes);
        let span = Span { first: address.0, last: address.0.saturating_add(entries.len() as u64 * size - 1) };
        let mut table = self.table.borrow_mut();
        let mut found = Targets::new(table.geometry().no_tables_in, false);
        let result = table.walk_stage(2, self.memory, self.map, span, self.budget, &mut found);
        drop(table);
        if let Err(error) = result {
            self.stopped.replace(Some(error));
            return Err(ReadError(address));
        }
        let fail = |fault: Fault| {
            self.failed.replace(Some(Fault { reading_table: true, ..fault }));
            ReadError(address)
        };
        if let Some(fault) = found.failed {
            return Err(fail(fault));
        }
        let mut done = 0;
        for piece in &found.pieces {
            let count = ((piece.iova.length_minus_one() + 1) / size) as usize;
            let part = entries.get_mut(done..done + count).ok_or(ReadError(address))?;
            self.memory.read_entries(Gpa(piece.address), layout, part).map_err(|_| {
                let input = piece.iova.first;
                fail(Fault {
                    stage: 2,
                    cause: Cause::Missing,
                    level: None,
                    input,
                    address: Some(piece.address),
                    reading_table: true,
                    path: Vec::new(),
                })
            })?;
            done += count;
        }
        if done == entries.len() { Ok(()) } else { Err(fail(no_translation(2, address.0))) }
    }
}

/// Where the second stage puts the pages of a first-stage table, if all of them can be read, and written where that is asked for.
struct Targets {
    /// Memory types in which no table may be.
    closed: u8,
    write: bool,
    pieces: Vec<Piece>,
    failed: Option<Fault>,
}

impl Targets {
    const fn new(closed: u8, write: bool) -> Self {
        Self { closed, write, pieces: Vec::new(), failed: None }
    }

    fn fail(&mut self, cause: Cause, input: u64, address: Option<u64>, path: &[Step]) -> Result<(), WalkError> {
        let level = path.last().map(|step| step.number);
        self.failed.get_or_insert(Fault { stage: 2, cause, level, input, address, reading_table: true, path: path.to_vec() });
        Ok(())
    }
}

impl Visitor for Targets {
    fn piece(&mut self, piece: &Piece, path: &[Step]) -> Result<(), WalkError> {
        let may_hold = may_hold_tables(piece.attributes, self.closed);
        if !may_hold || self.write && !piece.attributes.access(true).write {
            return self.fail(Cause::Entry(FaultKind::Permission), piece.iova.first, None, path);
        }
        self.pieces.push(*piece);
        Ok(())
    }

    fn absent(&mut self, span: Span, path: &[Step]) -> Result<(), WalkError> {
        self.fail(Cause::Entry(FaultKind::Translation), span.first, None, path)
    }

    fn fault(&mut self, fault: &FaultAt<'_>) -> Result<(), WalkError> {
        self.fail(fault.cause, fault.span.first, fault.address, fault.path)
    }
}

/// Hears the first stage, and hands on what the second makes of it.
struct Flatten<'a, 'b, M: ?Sized, V> {
    outer: &'a Outer<'b, M>,
    /// The first stage's.
    geometry: &'a Geometry,
    visitor: &'a mut V,
}

impl<M: EntryMemory + ?Sized, V: Visitor> Flatten<'_, '_, M, V> {
    /// Tells of `span` that nothing gets through, if an entry on the way to the last of `path` has to be marked and cannot be; whether that is so.
    fn refused(&mut self, span: Span, path: &[Step]) -> Result<bool, WalkError> {
        let refused = self.outer.refused_table(self.geometry, path)?;
        if let Some(fault) = &refused {
            self.refuse(span, fault)?;
        }
        Ok(refused.is_some())
    }

    fn refuse(&mut self, span: Span, fault: &Fault) -> Result<(), WalkError> {
        let Fault { cause, address, path, .. } = fault;
        self.visitor.fault(&FaultAt { stage: 2, cause: *cause, span, address: *address, reading_table: true, path })
    }
}

impl<M: EntryMemory + ?Sized, V: Visitor> Visitor for Flatten<'_, '_, M, V> {
    fn table(&mut self) {
        self.visitor.table();
    }

    fn piece(&mut self, piece: &Piece, path: &[Step]) -> Result<(), WalkError> {
        if self.refused(piece.iova, path)? {
            return Ok(());
        }
        let outer = self.outer;
        let mut attributes = piece.attributes;
        if let Some(leaf) = path.last() {
            let marks = LeafMarks::of(self.geometry, leaf.level, attributes);
            if !marks.is_none()
                && let Some(fault) = outer.refused(self.geometry.entry_at(leaf))?
            {
                if marks.accessed {
                    return self.refuse(piece.iova, &fault);
                }
                // Reads go through, and writes do not.
                attributes = attributes.without(Attributes::WRITE);
            }
        }
        let piece = &Piece { attributes, ..*piece };
        let intermediate = Span { first: piece.address, last: piece.address + piece.iova.length_minus_one() };
        let mut second = Second { piece, path, visitor: self.visitor };
        outer.table.borrow_mut().walk_stage(2, outer.memory, outer.map, intermediate, outer.budget, &mut second)
    }

    fn absent(&mut self, span: Span, path: &[Step]) -> Result<(), WalkError> {
        if self.refused(span, path)? { Ok(()) } else { self.visitor.absent(span, path) }
    }

    fn nothing_below(&mut self, span: Span, entries: u64, path: &[Step]) -> Result<(), WalkError> {
        if self.refused(span, path)? { Ok(()) } else { self.visitor.nothing_below(span, entries, path) }
    }

    fn fault(&mut self, fault: &FaultAt<'_>) -> Result<(), WalkError> {
        if self.outer.stopped.borrow().is_some() {
            return Err(WalkError::Stopped);
        }
        let read = self.outer.failed.take();
        if self.refused(fault.span, fault.path)? {
            return Ok(());
        }
        match read {
            // Reading a table of the first stage failed in the second: that is the fault to report, for the IOVAs below that table.
            Some(Fault { cause, address, path, .. }) => {
                let address = address.or(fault.address);
                self.visitor.fault(&FaultAt { stage: 2, cause, span: fault.span, address, reading_table: true, path: &path })
            }
            None => self.visitor.fault(fault),
        }
    }
}

/// Hears what the second stage makes of one leaf of the first, in intermediate addresses, and says it in IOVAs.
struct Second<'a, V> {
    piece: &'a Piece,
    path: &'a [Step],
    visitor: &'a mut V,
}

impl<V> Second<'_, V> {
    fn iova(&self, intermediate: Span) -> Span {
        let from = |address: u64| self.piece.iova.first + (address - self.piece.address);
        Span { first: from(intermediate.first), last: from(intermediate.last) }
    }
}

impl<V: Visitor> Visitor for Second<'_, V> {
    fn piece(&mut self, piece: &Piece, _: &[Step]) -> Result<(), WalkError> {
        let iova = self.iova(piece.iova);
        self.visitor.piece(&Piece { iova, address: piece.address, attributes: self.piece.attributes.through(piece.attributes) }, self.path)
    }

    fn absent(&mut self, span: Span, path: &[Step]) -> Result<(), WalkError> {
        let cause = Cause::Entry(FaultKind::Translation);
        self.visitor.fault(&FaultAt { stage: 2, cause, span: self.iova(span), address: Some(span.first), reading_table: false, path })
    }

    fn fault(&mut self, fault: &FaultAt<'_>) -> Result<(), WalkError> {
        self.visitor.fault(&FaultAt { span: self.iova(fault.span), ..*fault })
    }
}
