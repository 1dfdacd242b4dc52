//! A frozen guest: a snapshot, looked at through plugins.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::device::{Found, LookupError, Unit};
use crate::memory::{Budget, Exhausted, Limits, MemoryMap, VmMemory};
use crate::plugin::{BlockKind, Blocked, CallError, Notes, Outcome, Plugins, PluginsError, Refusal, Requester, Settings, TableConfig, Tag};
use crate::snapshot::{Domains, PageMemory, Snapshot, Source, Stream, StreamEntry};
use crate::table::{
    AddressSpace, Collector, Fault, FaultAt, FormatError, Intercept, OpenError, Passed, Piece, Receiver, Run, Step, Table, Translation, Visitor,
    WalkError, Window,
};
use crate::virtio_iommu;
use crate::{Access, Gpa, Iova, Span};

/// What a requester's DMA gets.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Guest-physical memory as it is.
    Bypass,
    /// The same for some addresses, at an offset or with less access.
    Direct(Vec<Window>),
    /// Nothing, for this reason.
    Blocked(String),
    /// One table, or two of which the second translates the outputs of the first; for a guest that asked for its mappings, what stands for its domain.
    Translated(Vec<TableConfig>),
}

impl State {
    /// `translated`, `bypass` or `blocked`.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Bypass | Self::Direct(_) => "bypass",
            Self::Blocked(_) => "blocked",
            Self::Translated(_) => "translated",
        }
    }
}

/// A device's DMA, without or with a PASID.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamState {
    /// What people call the device.
    pub label: String,
    /// Its id.
    pub id: u64,
    /// The PASID, if the requests have one.
    pub pasid: Option<u32>,
    /// What it gets.
    pub state: State,
    /// Blocked because nobody set anything up for it.
    pub unused: bool,
    /// What a plugin said about a stream that is blocked, in parts.
    pub blocked: Option<Blocked>,
    /// Addresses that something else than the tables serves.
    pub intercepts: Vec<Intercept>,
    /// The name of its address space in invalidation commands.
    pub tag: Tag,
    /// A page that the snapshot lacks and that would have been needed.
    pub missing: Option<Gpa>,
    /// What the plugin noted about the device structures that lead to its tables.
    pub notes: Notes,
}

impl StreamState {
    /// A stream that gets `state`, and of which nothing else is known.
    #[must_use]
    pub fn new(label: &str, id: u64, pasid: Option<u32>, state: State) -> Self {
        let (intercepts, tag, notes) = (Vec::new(), Tag::default(), Notes::default());
        Self { label: label.to_owned(), id, pasid, state, unused: false, blocked: None, intercepts, tag, missing: None, notes }
    }

    /// Which way its DMA goes: streams for which this is equal share all their tables.
    #[must_use]
    pub fn way(&self) -> (State, Vec<Intercept>) {
        (self.state.clone(), self.intercepts.clone())
    }

    /// The tables that it uses; none if it uses none.
    #[must_use]
    pub fn tables(&self) -> &[TableConfig] {
        match &self.state {
            State::Translated(tables) => tables,
            _ => &[],
        }
    }
}

/// A guest cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// No plugin knows the unit or the table format, or it cannot be loaded.
    #[error(transparent)]
    Plugins(#[from] PluginsError),
    /// A plugin refused or failed.
    #[error(transparent)]
    Call(#[from] CallError),
    /// Following device structures failed.
    #[error(transparent)]
    Lookup(#[from] LookupError),
    /// A table cannot be opened.
    #[error("{format}: {error}")]
    Open {
        /// Its format.
        format: String,
        /// Why.
        error: OpenError,
    },
    /// The same of a table that the snapshot lists for a device.
    #[error("the table of device {id:#x}{}: {error}", pasid.map_or(String::new(), |pasid| format!(" PASID {pasid:#x}")))]
    Listed {
        /// The device.
        id: u64,
        /// The PASID.
        pasid: Option<u32>,
        /// What is wrong with its table.
        error: Box<GuestError>,
    },
    /// A walk ended early.
    #[error(transparent)]
    Walk(#[from] WalkError),
    /// The format failed while explaining an entry.
    #[error("the format failed: {0}")]
    Format(FormatError),
    /// The device is not in the snapshot.
    #[error("no device {id:#x} in this snapshot; there are {known}")]
    NoDevice {
        /// Its id.
        id: u64,
        /// Those that there are.
        known: String,
    },
}

/// All walks of one guest together may take so many times what a single one may. Real guests' tables are walked once each, and a single walk may
/// take four times the pages that there are.
const ALL_WALKS: u64 = 16;
/// Most PASIDs of all devices together that are looked up.
const ALL_PASIDS: u64 = 1 << 14;

/// What looking at a guest has taken so far, whatever the number of its streams: a guest chooses how many PASIDs it has, and where each one's tables are.
#[derive(Debug, Default)]
struct Spent {
    tables: Cell<u64>,
    leaves: Cell<u64>,
    questions: Cell<u64>,
    pasids: Cell<u64>,
}

impl Spent {
    /// What is left of all walks' limits, and no more than one walk may take.
    fn left(&self, limits: Limits) -> Limits {
        let left = |spent: &Cell<u64>, limit: u64| limit.min(limit.saturating_mul(ALL_WALKS).saturating_sub(spent.get()));
        Limits {
            tables: left(&self.tables, limits.tables),
            leaves: left(&self.leaves, limits.leaves),
            questions: left(&self.questions, limits.questions),
            ..limits
        }
    }

    fn add(&self, budget: &Budget) {
        let add = |spent: &Cell<u64>, more: u64| spent.set(spent.get().saturating_add(more));
        add(&self.tables, budget.tables_visited());
        add(&self.leaves, budget.leaves_seen());
        add(&self.questions, budget.questions_asked());
    }

    /// `exhausted`, or the limit of all walks if that is what ended a walk.
    fn name(limits: Limits, exhausted: Exhausted) -> Exhausted {
        let all = [
            ("tables visited", "tables visited for all streams together", limits.tables),
            ("leaves", "leaves for all streams together", limits.leaves),
            ("different patterns asked about", "patterns asked about for all streams together", limits.questions),
        ];
        let of_all = all.into_iter().find(|(what, _, limit)| *what == exhausted.what && exhausted.limit < *limit);
        of_all.map_or(exhausted, |(_, what, limit)| Exhausted { what, limit: limit.saturating_mul(ALL_WALKS) })
    }
}

/// A visitor that counts the tables that are read, for whoever waits.
struct Counted<'a, V> {
    visitor: &'a mut V,
    tables: &'a AtomicU64,
}

impl<V: Visitor> Visitor for Counted<'_, V> {
    fn table(&mut self) {
        self.tables.fetch_add(1, Ordering::Relaxed);
        self.visitor.table();
    }

    fn takes_gaps(&self) -> bool {
        self.visitor.takes_gaps()
    }

    fn takes_large(&self) -> bool {
        self.visitor.takes_large()
    }

    fn receive(&mut self, run: &Run<'_>) -> Option<Receiver<'_>> {
        self.visitor.receive(run)
    }

    fn received(&mut self, run: &Run<'_>, passed: Passed) -> Result<bool, WalkError> {
        self.visitor.received(run, passed)
    }

    fn leaves(&mut self, run: &Run<'_>, path: &[Step]) -> Result<(), WalkError> {
        self.visitor.leaves(run, path)
    }

    fn piece(&mut self, piece: &Piece, path: &[Step]) -> Result<(), WalkError> {
        self.visitor.piece(piece, path)
    }

    fn absent(&mut self, span: Span, path: &[Step]) -> Result<(), WalkError> {
        self.visitor.absent(span, path)
    }

    fn nothing_below(&mut self, span: Span, entries: u64, path: &[Step]) -> Result<(), WalkError> {
        self.visitor.nothing_below(span, entries, path)
    }

    fn fault(&mut self, fault: &FaultAt<'_>) -> Result<(), WalkError> {
        self.visitor.fault(fault)
    }
}

/// A snapshot and the plugins that explain it.
#[derive(Debug)]
pub struct Guest<'a> {
    snapshot: &'a Snapshot,
    plugins: &'a Plugins,
    limits: Limits,
    unit: Option<Unit<PageMemory>>,
    /// Where a stream stands in a list of tables.
    listed: BTreeMap<(u64, Option<u32>), usize>,
    spent: Spent,
    tables_read: Arc<AtomicU64>,
}

impl<'a> Guest<'a> {
    /// Looks at `snapshot` through `plugins`, within limits that follow from its size.
    ///
    /// # Errors
    /// No plugin knows the snapshot's unit.
    pub fn new(snapshot: &'a Snapshot, plugins: &'a Plugins) -> Result<Self, GuestError> {
        Self::with_limits(snapshot, plugins, snapshot.limits())
    }

    /// The same with other limits.
    ///
    /// # Errors
    /// No plugin knows the snapshot's unit.
    pub fn with_limits(snapshot: &'a Snapshot, plugins: &'a Plugins, limits: Limits) -> Result<Self, GuestError> {
        let unit = match &snapshot.source {
            Source::Unit { kind, registers } => {
                let map = Arc::new(snapshot.map.clone());
                Some(Unit::new(plugins.by_unit(kind)?, kind, registers.clone(), snapshot.memory.clone(), map, limits))
            }
            Source::Tables(_) | Source::Domains(_) => None,
        };
        let listed = match &snapshot.source {
            Source::Tables(entries) => entries.iter().enumerate().map(|(index, entry)| ((entry.id, entry.pasid), index)).collect(),
            Source::Unit { .. } | Source::Domains(_) => BTreeMap::new(),
        };
        Ok(Self { snapshot, plugins, limits, unit, listed, spent: Spent::default(), tables_read: Arc::default() })
    }

    /// How many tables all walks have read so far, those of a walk that is under way included: for a thread that shows how it gets on.
    #[must_use]
    pub fn tables_read(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.tables_read)
    }

    /// The snapshot.
    #[must_use]
    pub const fn snapshot(&self) -> &'a Snapshot {
        self.snapshot
    }

    /// The plugins.
    #[must_use]
    pub const fn plugins(&self) -> &'a Plugins {
        self.plugins
    }

    /// A fresh budget, for a single walk or question. Where a guest decides how many there are, [`Guest::walk`] bounds all of them.
    #[must_use]
    pub const fn budget(&self) -> Budget {
        Budget::new(self.limits)
    }

    /// The memory that tables are read from.
    #[must_use]
    pub const fn memory(&self) -> VmMemory<'a, PageMemory> {
        VmMemory(&self.snapshot.memory)
    }

    /// The guest's memory map.
    #[must_use]
    pub const fn map(&self) -> &'a MemoryMap {
        &self.snapshot.map
    }

    /// All streams: each device, and after it its PASIDs, sorted by id; as many as a plugin lists for a device. Where a page of that list is missing, it
    /// is missing for the device.
    ///
    /// # Errors
    /// A plugin refuses the registers or fails, or a budget is spent.
    pub fn streams(&self) -> Result<Vec<StreamState>, GuestError> {
        let mut streams = Vec::new();
        for device in &self.snapshot.devices {
            let (mut stream, pasids) = (self.stream(device.id, None)?, self.pasids(device.id)?);
            // Nobody takes the list for a whole one if a page of it is missing.
            stream.missing = stream.missing.or(pasids.missing);
            streams.push(stream);
            for pasid in pasids.value {
                streams.push(self.stream(device.id, Some(pasid))?);
            }
        }
        Ok(streams)
    }

    /// The PASIDs for which a device has a context, ascending, without the one that requests without PASID use.
    ///
    /// # Errors
    /// As [`Guest::streams`]; and [`Exhausted`] when the devices asked about so far have more PASIDs together than are looked at.
    pub fn pasids(&self, id: u64) -> Result<Found<Vec<u32>>, GuestError> {
        let found = self.find_pasids(id)?;
        let all = self.spent.pasids.get() + found.value.len() as u64;
        if all > ALL_PASIDS {
            return Err(LookupError::Exhausted(Exhausted { what: "PASIDs of all devices together", limit: ALL_PASIDS }).into());
        }
        self.spent.pasids.set(all);
        Ok(found)
    }

    fn find_pasids(&self, id: u64) -> Result<Found<Vec<u32>>, GuestError> {
        match (&self.unit, &self.snapshot.source) {
            (Some(unit), _) => match unit.pasids(id) {
                Err(LookupError::Call(CallError::Refused { refusal: Refusal::Unsupported(_), .. })) => {
                    Ok(Found { value: Vec::new(), missing: None, notes: Notes::default() })
                }
                result => Ok(result?),
            },
            (None, Source::Tables(_)) => {
                let value = self.listed.range((id, None)..=(id, Some(u32::MAX))).filter_map(|((_, pasid), _)| *pasid).collect();
                Ok(Found { value, missing: None, notes: Notes::default() })
            }
            (None, Source::Unit { .. } | Source::Domains(_)) => Ok(Found { value: Vec::new(), missing: None, notes: Notes::default() }),
        }
    }

    /// One stream.
    ///
    /// # Errors
    /// The device is not in the snapshot; as [`Guest::streams`].
    pub fn stream(&self, id: u64, pasid: Option<u32>) -> Result<StreamState, GuestError> {
        let Some(device) = self.snapshot.device(id) else {
            let known: Vec<String> = self.snapshot.devices.iter().map(|device| format!("{:#x} ({})", device.id, device.label)).collect();
            return Err(GuestError::NoDevice { id, known: if known.is_empty() { "none".to_owned() } else { known.join(", ") } });
        };
        let stream = |state| StreamState::new(&device.label, id, pasid, state);
        match (&self.unit, &self.snapshot.source) {
            (Some(unit), _) => match unit.lookup(Requester { id, pasid }) {
                Ok(Found { value, missing, notes }) => Ok(StreamState { missing, notes, ..found(stream, value) }),
                // One device that uses a rare feature does not hide the others.
                Err(LookupError::Call(CallError::Refused { plugin, refusal: Refusal::Unsupported(what) })) => {
                    Ok(stream(State::Blocked(format!("not known: plugin {plugin} does not support {what}"))))
                }
                Err(error) => Err(error.into()),
            },
            (None, Source::Tables(entries)) => Ok(listed(stream, self.listed.get(&(id, pasid)).and_then(|index| entries.get(*index)))),
            (None, Source::Domains(domains)) => Ok(attached(stream, domains, id, pasid)),
            (None, Source::Unit { .. }) => Ok(stream(State::Blocked("no unit".to_owned()))),
        }
    }

    /// The address space of a stream that has one of its own: tables, or windows that go to memory directly. None for one that is bypassed or blocked.
    ///
    /// # Errors
    /// As [`Guest::open`].
    pub fn space(&self, stream: &StreamState) -> Result<Option<AddressSpace>, GuestError> {
        let space = match &stream.state {
            State::Bypass | State::Blocked(_) => return Ok(None),
            State::Direct(windows) => AddressSpace::direct(windows.clone()),
            State::Translated(tables) => self.open_for(stream, tables)?,
        };
        Ok(Some(space.with_intercepts(stream.intercepts.clone())))
    }

    /// Opens tables of `stream`: those that it has, or the second one alone. What is wrong with a table that a snapshot lists is told with the device.
    ///
    /// # Errors
    /// As [`Guest::open`].
    pub fn open_for(&self, stream: &StreamState, tables: &[TableConfig]) -> Result<AddressSpace, GuestError> {
        let listed = matches!(self.snapshot.source, Source::Tables(_));
        let StreamState { id, pasid, .. } = *stream;
        self.open(tables).map_err(|error| if listed { GuestError::Listed { id, pasid, error: Box::new(error) } } else { error })
    }

    /// Opens the table, or the two tables, of a stream.
    ///
    /// # Errors
    /// No plugin knows the format, or it refuses the settings.
    pub fn open(&self, configs: &[TableConfig]) -> Result<AddressSpace, GuestError> {
        if let (Source::Domains(domains), [config]) = (&self.snapshot.source, configs)
            && let Some(domain) = config.settings.get("domain").filter(|_| config.format == virtio_iommu::FORMAT).and_then(|id| domains.get(id))
        {
            return Ok(AddressSpace::of(domain));
        }
        let mut tables = configs.iter().map(|config| self.open_table(config));
        match (tables.next(), tables.next()) {
            (Some(inner), Some(outer)) => Ok(AddressSpace::nested(inner?, outer?)),
            (Some(table), None) => Ok(AddressSpace::single(table?)),
            (None, _) => Err(CallError::Twice { what: "no table, and", name: "a table".to_owned() }.into()),
        }
    }

    fn open_table(&self, config: &TableConfig) -> Result<Table, GuestError> {
        let format = self.plugins.by_format(&config.format)?.open(config)?;
        Table::open(Box::new(format)).map_err(|error| GuestError::Open { format: config.format.clone(), error })
    }

    /// Tells `visitor` all that a device reaches through `space`, within what a single walk may take and what is left for all walks of this guest.
    ///
    /// # Errors
    /// The budget is spent, a format failed, or the visitor stopped the walk.
    pub fn walk<V: Visitor>(&self, space: &mut AddressSpace, visitor: &mut V) -> Result<(), WalkError> {
        let budget = Budget::new(self.spent.left(self.limits));
        let mut counted = Counted { visitor, tables: &self.tables_read };
        let walked = space.walk(&self.memory(), self.map(), Span::ALL, &budget, &mut counted);
        self.spent.add(&budget);
        walked.map_err(|error| match error {
            WalkError::Exhausted(exhausted) => Spent::name(self.limits, exhausted).into(),
            error => error,
        })
    }

    /// All that a device reaches through `space`, and the first `keep_faults` faults. `stopped` says why the walk ended early, if it did.
    ///
    /// # Errors
    /// The format failed.
    pub fn collect(&self, space: &mut AddressSpace, keep_faults: usize) -> Result<Collected, GuestError> {
        let mut collector = Collector::new(space.privileged(), keep_faults).at_most(self.limits.mappings);
        match self.walk(space, &mut collector) {
            Ok(()) => Ok(Collected { collector, stopped: None }),
            Err(WalkError::Exhausted(stopped)) => Ok(Collected { collector, stopped: Some(stopped.to_string()) }),
            Err(error) => Err(error.into()),
        }
    }

    /// Where an access of one byte goes, or the device's fault.
    ///
    /// # Errors
    /// A budget is spent or the format failed.
    pub fn translate(&self, space: &mut AddressSpace, iova: Iova, access: Access) -> Result<Result<Translation, Fault>, GuestError> {
        Ok(space.translate(&self.memory(), self.map(), iova, access, &self.budget())?)
    }
}

/// What was collected from an address space.
#[derive(Debug)]
pub struct Collected {
    /// Mappings and faults.
    pub collector: Collector,
    /// Why the walk ended early, if it did.
    pub stopped: Option<String>,
}

fn found(stream: impl Fn(State) -> StreamState, outcome: Outcome) -> StreamState {
    match outcome {
        Outcome::Bypass => stream(State::Bypass),
        Outcome::Direct(direct) => StreamState { intercepts: direct.intercepts, ..stream(State::Direct(direct.windows)) },
        Outcome::Blocked(blocked) => {
            let section = if blocked.section.is_empty() { String::new() } else { format!(" ({})", blocked.section) };
            let reason = format!("{}: {}{section}", blocked.event, blocked.reason);
            StreamState { unused: blocked.kind == BlockKind::Unused, blocked: Some(blocked), ..stream(State::Blocked(reason)) }
        }
        Outcome::Tables(found) => StreamState { intercepts: found.intercepts, tag: found.tag, ..stream(State::Translated(found.tables)) },
    }
}

/// What an endpoint's domain is among tables.
fn attached(stream: impl Fn(State) -> StreamState, domains: &Domains, id: u64, pasid: Option<u32>) -> StreamState {
    if pasid.is_some() {
        return stream(State::Blocked("requests with a PASID are not part of the specification (Virtio 1.3 section 5.13)".to_owned()));
    }
    match domains.of(id) {
        Some(domain) if domain.contents.is_none() => stream(State::Bypass),
        Some(domain) => {
            let settings = std::iter::once(("domain".to_owned(), u64::from(domain.id))).collect::<Settings>();
            stream(State::Translated(vec![TableConfig { format: virtio_iommu::FORMAT.to_owned(), settings }]))
        }
        None if domains.bypass() => stream(State::Bypass),
        None => StreamState { unused: true, ..stream(State::Blocked("attached to no domain (Virtio 1.3 section 5.13.6)".to_owned())) },
    }
}

fn listed(stream: impl Fn(State) -> StreamState, entry: Option<&StreamEntry>) -> StreamState {
    let unused = |reason: String| StreamState { unused: true, ..stream(State::Blocked(reason)) };
    match entry.map(|entry| &entry.stream) {
        Some(Stream::Bypass) => stream(State::Bypass),
        Some(Stream::Blocked(reason)) => stream(State::Blocked(reason.clone())),
        Some(Stream::Unused(reason)) => unused(reason.clone()),
        Some(Stream::Table { format, settings }) => {
            stream(State::Translated(vec![TableConfig { format: format.clone(), settings: settings.iter().cloned().collect::<Settings>() }]))
        }
        None => unused("the snapshot lists no table for this device".to_owned()),
    }
}
