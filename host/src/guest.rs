//! A frozen guest: a snapshot, looked at through plugins.

use std::sync::Arc;

use crate::device::{Found, LookupError, Unit};
use crate::memory::{Budget, Limits, MemoryMap, VmMemory};
use crate::plugin::{BlockKind, CallError, Outcome, Plugins, PluginsError, Refusal, Requester, Settings, TableConfig, Tag};
use crate::snapshot::{Domains, PageMemory, Snapshot, Source, Stream};
use crate::table::{AddressSpace, Collector, Fault, FormatError, Intercept, OpenError, Table, Translation, WalkError, Window};
use crate::virtio_iommu;
use crate::{Access, Gpa, Iova, Span};

/// What a requester's DMA gets.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// Addresses that something else than the tables serves.
    pub intercepts: Vec<Intercept>,
    /// The name of its address space in invalidation commands.
    pub tag: Tag,
    /// A page that the snapshot lacks and that would have been needed.
    pub missing: Option<Gpa>,
}

impl StreamState {
    /// A stream that gets `state`, and of which nothing else is known.
    #[must_use]
    pub fn new(label: &str, id: u64, pasid: Option<u32>, state: State) -> Self {
        Self { label: label.to_owned(), id, pasid, state, unused: false, intercepts: Vec::new(), tag: Tag::default(), missing: None }
    }

    /// Whether its DMA goes the same way as another's.
    #[must_use]
    pub fn shares(&self, other: &Self) -> bool {
        self.state == other.state && self.intercepts == other.intercepts
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

/// A snapshot and the plugins that explain it.
#[derive(Debug)]
pub struct Guest<'a> {
    snapshot: &'a Snapshot,
    plugins: &'a Plugins,
    limits: Limits,
    unit: Option<Unit<PageMemory>>,
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
        Ok(Self { snapshot, plugins, limits, unit })
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

    /// A fresh budget.
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

    /// All streams: each device, and after it its PASIDs, sorted by id.
    ///
    /// # Errors
    /// A plugin refuses the registers or fails, or a budget is spent.
    pub fn streams(&self) -> Result<Vec<StreamState>, GuestError> {
        let mut streams = Vec::new();
        for device in &self.snapshot.devices {
            streams.push(self.stream(device.id, None)?);
            let pasids = self.pasids(device.id)?.value;
            for pasid in pasids {
                streams.push(self.stream(device.id, Some(pasid))?);
            }
        }
        Ok(streams)
    }

    /// The PASIDs for which a device has a context, ascending, without the one that requests without PASID use.
    ///
    /// # Errors
    /// As [`Guest::streams`].
    pub fn pasids(&self, id: u64) -> Result<Found<Vec<u32>>, GuestError> {
        match (&self.unit, &self.snapshot.source) {
            (Some(unit), _) => match unit.pasids(id) {
                Err(LookupError::Call(CallError::Refused { refusal: Refusal::Unsupported(_), .. })) => Ok(Found { value: Vec::new(), missing: None }),
                result => Ok(result?),
            },
            (None, Source::Tables(entries)) => {
                let mut value: Vec<u32> = entries.iter().filter(|entry| entry.id == id).filter_map(|entry| entry.pasid).collect();
                value.sort_unstable();
                Ok(Found { value, missing: None })
            }
            (None, Source::Unit { .. } | Source::Domains(_)) => Ok(Found { value: Vec::new(), missing: None }),
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
                Ok(Found { value, missing }) => Ok(StreamState { missing, ..found(stream, value) }),
                // One device that uses a rare feature does not hide the others.
                Err(LookupError::Call(CallError::Refused { plugin, refusal: Refusal::Unsupported(what) })) => {
                    Ok(stream(State::Blocked(format!("not known: plugin {plugin} does not support {what}"))))
                }
                Err(error) => Err(error.into()),
            },
            (None, Source::Tables(entries)) => Ok(listed(stream, entries, id, pasid)),
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
            State::Translated(tables) => self.open(tables)?,
        };
        Ok(Some(space.with_intercepts(stream.intercepts.clone())))
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

    /// All that a device reaches through `space`, and the first `keep_faults` faults. `stopped` says why the walk ended early, if it did.
    ///
    /// # Errors
    /// The format failed.
    pub fn collect(&self, space: &mut AddressSpace, keep_faults: usize) -> Result<Collected, GuestError> {
        let mut collector = Collector::new(space.privileged(), keep_faults).at_most(self.limits.mappings);
        match space.walk(&self.memory(), self.map(), Span::ALL, &self.budget(), &mut collector) {
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
            StreamState { unused: blocked.kind == BlockKind::Unused, ..stream(State::Blocked(reason)) }
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

fn listed(stream: impl Fn(State) -> StreamState, entries: &[crate::snapshot::StreamEntry], id: u64, pasid: Option<u32>) -> StreamState {
    let unused = |reason: String| StreamState { unused: true, ..stream(State::Blocked(reason)) };
    match entries.iter().find(|entry| (entry.id, entry.pasid) == (id, pasid)).map(|entry| &entry.stream) {
        Some(Stream::Bypass) => stream(State::Bypass),
        Some(Stream::Blocked(reason)) => stream(State::Blocked(reason.clone())),
        Some(Stream::Unused(reason)) => unused(reason.clone()),
        Some(Stream::Table { format, settings }) => {
            stream(State::Translated(vec![TableConfig { format: format.clone(), settings: settings.iter().cloned().collect::<Settings>() }]))
        }
        None => unused("the snapshot lists no table for this device".to_owned()),
    }
}
