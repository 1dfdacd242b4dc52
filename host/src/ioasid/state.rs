//! What there is in a context, written down, and made again from that: on another host with another IOMMU, from the guest's memory.
//!
//! Descriptions are written, and no tables: strategies are chosen anew, host tables are built from the guest's, and the kernel's mappings are made again. Devices
//! are known by their labels and the guest's numbers of them.
//!
//! A vIOMMU is not written down: what it knows follows from the guest's memory and its registers. A VMM restores the context, connects the devices to a new
//! [`ContextSpaces`](crate::viommu::ContextSpaces) over it, makes the [`Viommu`](crate::viommu::Viommu) with the registers as they were, and connects the devices there: each is put from
//! what was restored on the vIOMMU's own address spaces. [`Restored`] may be dropped then.

use serde::{Deserialize, Serialize};

use super::device::Device;
use super::managed::Target;
use super::space::Content;
use super::{Context, Error, GuestView, Ioasid, Kind, Property, Refusal, Request, Setup, SpaceId, SpaceLimits, Strategies, Strategy};
use crate::kernel::{HwptFlags, Pasid};
use crate::lookup;
use crate::plugin::{BlockKind, Blocked, Direct, Outcome, Settings, TableConfig, Tag, Translated};
use crate::sync::{AreaLimits, ShadowLimits, Watcher};
use crate::table::{Intercept, Piece, Window};
use crate::{Access, Attributes, Change, Gpa, Span};

/// The version that [`Context::save`] writes, and the only one that [`Saved::restore`] reads.
const VERSION: u32 = 1;

/// IOASIDs that were written down have numbers up to here, so that there are others for those that are made later: nobody made so many.
const HIGHEST: u64 = u64::MAX >> 1;

/// A context, written down. Its fields are between one version of this library and the next: keep it as what `serde` makes of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    version: u32,
    devices: Vec<SavedDevice>,
    ioasids: Vec<SavedIoasid>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedDevice {
    label: String,
    virtual_id: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedIoasid {
    id: u64,
    content: SavedContent,
    strategies: Vec<SavedStrategy>,
    #[serde(default)]
    host_table: Option<SavedTable>,
    second_table: bool,
    page_requests: bool,
    dirty_tracking: bool,
    limits: SavedLimits,
    /// Labels and PASIDs.
    attached: Vec<(String, Option<u32>)>,
    lookups: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum SavedStrategy {
    Native,
    Nested,
    Areas,
    Software,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedLimits {
    table_pages: u64,
    leaves: u64,
    questions: u64,
    table_bytes: u64,
    areas: usize,
    swap: usize,
    pieces: usize,
    join: u64,
    #[serde(default)]
    hitless_changes: bool,
    lookup_nodes: u32,
    mappings: usize,
}

/// `first..=last` of IOVAs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedMapping {
    first: u64,
    last: u64,
    /// Guest-physical; none: memory of the process that saved.
    address: Option<u64>,
    attributes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum SavedContent {
    Managed(Vec<SavedMapping>),
    Requests(Vec<SavedMapping>),
    Guest { id: u64, outcome: SavedOutcome },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum SavedOutcome {
    Bypass,
    Direct { windows: Vec<SavedMapping>, intercepts: Vec<SavedIntercept> },
    Blocked { unused: bool, event: String, section: String, reason: String },
    Tables { tables: Vec<SavedTable>, intercepts: Vec<SavedIntercept>, domain: Option<u32>, space: Option<u32> },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedTable {
    format: String,
    settings: Vec<(String, u64)>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedIntercept {
    passed: u8,
    mask: u64,
    value: u64,
    server: String,
    address: Option<u64>,
    section: String,
}

/// A context that was made again, with handles for all that was in it.
#[derive(Debug)]
pub struct Restored {
    /// The context.
    pub context: Context,
    /// Its devices, by label.
    pub devices: Vec<Device>,
    /// Its IOASIDs, by number: they have the numbers that they had.
    pub ioasids: Vec<Ioasid>,
}

impl Context {
    /// Writes down what devices and IOASIDs there are, what is in them, and who is attached where. Nothing may change meanwhile: the guest is to stand still.
    /// Marks that hardware has set are not written down: [`Context::write_marks`] has them written into the guest's memory before that is copied for the last time.
    #[must_use]
    pub fn save(&self) -> Saved {
        let _span = tracing::debug_span!("save").entered();
        let devices = self.devices();
        let attached = |id: SpaceId| {
            let of = |device: &Device| {
                let here = device.attached().into_iter().filter(|(_, space)| *space == id);
                here.map(|(pasid, _)| (device.label().to_owned(), pasid.map(|pasid| pasid.0))).collect::<Vec<_>>()
            };
            devices.iter().flat_map(of).collect()
        };
        let ioasids = self.ioasids().iter().map(|ioasid| SavedIoasid::of(ioasid, attached(ioasid.id()))).collect();
        let device = |device: &Device| SavedDevice { label: device.label().to_owned(), virtual_id: device.virtual_id() };
        Saved { version: VERSION, devices: devices.iter().map(device).collect(), ioasids }
    }
}

impl Saved {
    /// How many IOASIDs are written down.
    #[must_use]
    pub const fn ioasids(&self) -> usize {
        self.ioasids.len()
    }

    /// Makes the context again from `setup`, whose guest memory has what it had; `user` says where memory of the process is now that a mapping leads to
    /// which was not made from guest memory.
    ///
    /// # Errors
    /// [`Error::Refused`]: it is of another version, makes no sense, or `user` does not know a mapping. Otherwise as [`Context::with`], [`Context::connect_as`],
    /// [`Context::allocate`], [`Ioasid::map`] and [`Ioasid::attach`]. Nothing is left then.
    pub fn restore(&self, setup: Setup, user: impl FnMut(SpaceId, Span) -> Option<u64>) -> Result<Restored, Error> {
        self.restore_watched(setup, user, |_| None)
    }

    /// The same with watchers of their own for some IOASIDs, as [`Context::allocate_watched`] has them: they are written down with nobody. Each is asked for before its IOASID's
    /// tables are read.
    ///
    /// # Errors
    /// As [`Saved::restore`].
    pub fn restore_watched(
        &self,
        setup: Setup,
        mut user: impl FnMut(SpaceId, Span) -> Option<u64>,
        mut watcher: impl FnMut(SpaceId) -> Option<Box<dyn Watcher>>,
    ) -> Result<Restored, Error> {
        let _span = tracing::debug_span!("restore", ioasids = self.ioasids.len()).entered();
        if self.version != VERSION {
            return Err(no_sense(&format!("it is of version {}, and this is {VERSION}", self.version)));
        }
        let context = Context::with(setup)?;
        let connect = |device: &SavedDevice| context.connect_as(&device.label, device.virtual_id).map(Device::restored);
        let devices = self.devices.iter().map(connect).collect::<Result<Vec<_>, _>>()?;
        let mut ioasids: Vec<Ioasid> = Vec::new();
        for saved in &self.ioasids {
            if ioasids.iter().any(|ioasid| ioasid.id().0 >= saved.id) {
                return Err(no_sense("its IOASIDs are not in the order of their numbers"));
            }
            if saved.id > HIGHEST {
                return Err(no_sense(&format!("{} is a number after which there are none for others", saved.id)));
            }
            let ioasid = context.allocate_as(SpaceId(saved.id), saved.request()?, watcher(SpaceId(saved.id)))?;
            saved.fill(&ioasid, &mut user)?;
            for (label, pasid) in &saved.attached {
                let device = devices.iter().find(|device| device.label() == label);
                let device = device.ok_or_else(|| no_sense(&format!("device {label} is attached, and not there")))?;
                drop(ioasid.attach(device, pasid.map(Pasid))?);
            }
            if saved.lookups {
                ioasid.lookup()?;
            }
            ioasids.push(ioasid);
        }
        Ok(Restored { context, devices, ioasids })
    }
}

fn no_sense(reason: &str) -> Error {
    Refusal::new(Property::Kind, format!("what was saved cannot be restored: {reason}")).into()
}

impl SavedIoasid {
    fn of(ioasid: &Ioasid, mut attached: Vec<(String, Option<u32>)>) -> Self {
        let waiting = ioasid.0.waiting();
        let state = ioasid.0.lock();
        let request = ioasid.0.request();
        let piece = |piece: &Piece| SavedMapping {
            first: piece.iova.first,
            last: piece.iova.last,
            address: Some(piece.address),
            attributes: piece.attributes.bits(),
        };
        let content = match (&state.content, &state.kind) {
            (Content::Managed(managed), _) => {
                let mappings = managed.mappings().iter();
                SavedContent::Managed(
                    mappings
                        .map(|(first, mapping)| {
                            let address = match mapping.target {
                                Target::Guest(gpa) => Some(gpa.0),
                                Target::User(_) => None,
                            };
                            SavedMapping { first: *first, last: mapping.last, address, attributes: attributes(mapping.access).bits() }
                        })
                        .collect(),
                )
            }
            (Content::Requests(domain), _) => SavedContent::Requests(domain.iter().map(piece).collect()),
            (Content::Guest, Kind::Guest(view)) => SavedContent::Guest { id: view.id, outcome: SavedOutcome::of(&view.outcome) },
            // There is no such pair.
            (Content::Guest, Kind::Managed | Kind::Requests) => SavedContent::Requests(Vec::new()),
        };
        // Who was detached because the kernel failed is to be there again.
        attached.extend(waiting.iter().map(|(device, pasid)| (device.label().to_owned(), pasid.map(|pasid| pasid.0))));
        Self {
            id: ioasid.id().0,
            content,
            strategies: request.strategies.iter().map(SavedStrategy::of).collect(),
            host_table: request.host_table.as_ref().map(SavedTable::of),
            second_table: request.second_table,
            page_requests: request.page_requests,
            dirty_tracking: request.dirty_tracking,
            limits: SavedLimits::of(&request.limits),
            attached,
            lookups: state.has_lookups(),
        }
    }

    fn request(&self) -> Result<Request, Error> {
        let kind = match &self.content {
            SavedContent::Managed(_) => Kind::Managed,
            SavedContent::Requests(_) => Kind::Requests,
            SavedContent::Guest { id, outcome } => Kind::Guest(GuestView { outcome: outcome.outcome()?, id: *id }),
        };
        let strategies: Vec<Strategy> = self.strategies.iter().map(|strategy| strategy.strategy()).collect();
        Ok(Request {
            kind,
            strategies: Strategies::of(&strategies),
            host_table: self.host_table.as_ref().map(SavedTable::table),
            second_table: self.second_table,
            page_requests: self.page_requests,
            dirty_tracking: self.dirty_tracking,
            limits: self.limits.limits(),
        })
    }

    fn fill(&self, ioasid: &Ioasid, user: &mut impl FnMut(SpaceId, Span) -> Option<u64>) -> Result<(), Error> {
        match &self.content {
            SavedContent::Managed(mappings) => {
                for mapping in mappings {
                    let (span, access) = (mapping.span()?, mapping.attributes()?.access(true));
                    let target = match mapping.address {
                        Some(address) => Target::Guest(Gpa(address)),
                        None => {
                            let address = user(ioasid.id(), span);
                            Target::User(address.ok_or_else(|| no_sense(&format!("nobody knows where the memory at {span} is now")))?)
                        }
                    };
                    ioasid.map(span, target, access)?;
                }
                Ok(())
            }
            SavedContent::Requests(mappings) => {
                let batch = mappings.iter().map(|mapping| mapping.piece().map(Change::Map)).collect::<Result<Vec<_>, _>>()?;
                ioasid.change(&batch)
            }
            SavedContent::Guest { .. } => Ok(()),
        }
    }
}

fn attributes(access: Access) -> Attributes {
    let of = |wanted, flag| if wanted { flag } else { Attributes::none() };
    of(access.read, Attributes::READ).with(of(access.write, Attributes::WRITE))
}

impl SavedMapping {
    fn span(&self) -> Result<Span, Error> {
        Span::new(self.first, self.last).ok_or_else(|| no_sense("a mapping is empty"))
    }

    fn attributes(&self) -> Result<Attributes, Error> {
        Attributes::from_bits(self.attributes).ok_or_else(|| no_sense("a mapping has attributes without a meaning"))
    }

    fn piece(&self) -> Result<Piece, Error> {
        let address = self.address.ok_or_else(|| no_sense("a mapping leads nowhere"))?;
        Ok(Piece { iova: self.span()?, address, attributes: self.attributes()? })
    }
}

impl SavedStrategy {
    const fn of(strategy: Strategy) -> Self {
        match strategy {
            Strategy::Native => Self::Native,
            Strategy::Nested => Self::Nested,
            Strategy::Areas => Self::Areas,
            Strategy::Software => Self::Software,
        }
    }

    const fn strategy(self) -> Strategy {
        match self {
            Self::Native => Strategy::Native,
            Self::Nested => Strategy::Nested,
            Self::Areas => Strategy::Areas,
            Self::Software => Strategy::Software,
        }
    }
}

impl SavedLimits {
    const fn of(limits: &SpaceLimits) -> Self {
        let SpaceLimits { shadow, questions, table_bytes, areas, lookup, mappings } = *limits;
        Self {
            table_pages: shadow.table_pages,
            leaves: shadow.leaves,
            questions,
            table_bytes,
            areas: areas.areas,
            swap: areas.swap,
            pieces: areas.pieces,
            join: areas.join,
            hitless_changes: areas.hitless_changes,
            lookup_nodes: lookup.nodes,
            mappings,
        }
    }

    const fn limits(&self) -> SpaceLimits {
        SpaceLimits {
            shadow: ShadowLimits { table_pages: self.table_pages, leaves: self.leaves },
            questions: self.questions,
            table_bytes: self.table_bytes,
            areas: AreaLimits {
                areas: self.areas,
                swap: self.swap,
                pieces: self.pieces,
                join: self.join,
                hitless_changes: self.hitless_changes,
                flags: HwptFlags::NONE,
            },
            lookup: lookup::Limits { nodes: self.lookup_nodes },
            mappings: self.mappings,
        }
    }
}

impl SavedTable {
    fn of(table: &TableConfig) -> Self {
        Self { format: table.format.clone(), settings: table.settings.iter().map(|(name, value)| (name.to_owned(), value)).collect() }
    }

    fn table(&self) -> TableConfig {
        TableConfig { format: self.format.clone(), settings: self.settings.iter().cloned().collect::<Settings>() }
    }
}

impl SavedOutcome {
    fn of(outcome: &Outcome) -> Self {
        let window = |window: &Window| SavedMapping {
            first: window.iova.first,
            last: window.iova.last,
            address: Some(window.address),
            attributes: window.attributes.bits(),
        };
        match outcome {
            Outcome::Bypass => Self::Bypass,
            Outcome::Direct(Direct { windows, intercepts }) => {
                Self::Direct { windows: windows.iter().map(window).collect(), intercepts: intercepts.iter().map(SavedIntercept::of).collect() }
            }
            Outcome::Blocked(Blocked { kind, event, section, reason }) => {
                Self::Blocked { unused: *kind == BlockKind::Unused, event: event.clone(), section: section.clone(), reason: reason.clone() }
            }
            Outcome::Tables(Translated { tables, intercepts, tag }) => Self::Tables {
                tables: tables.iter().map(SavedTable::of).collect(),
                intercepts: intercepts.iter().map(SavedIntercept::of).collect(),
                domain: tag.domain,
                space: tag.space,
            },
        }
    }

    fn outcome(&self) -> Result<Outcome, Error> {
        let window = |saved: &SavedMapping| saved.piece().map(|Piece { iova, address, attributes }| Window { iova, address, attributes });
        Ok(match self {
            Self::Bypass => Outcome::Bypass,
            Self::Direct { windows, intercepts } => Outcome::Direct(Direct {
                windows: windows.iter().map(window).collect::<Result<_, _>>()?,
                intercepts: intercepts.iter().map(SavedIntercept::intercept).collect(),
            }),
            Self::Blocked { unused, event, section, reason } => Outcome::Blocked(Blocked {
                kind: if *unused { BlockKind::Unused } else { BlockKind::Refused },
                event: event.clone(),
                section: section.clone(),
                reason: reason.clone(),
            }),
            Self::Tables { tables, intercepts, domain, space } => {
                if tables.is_empty() || tables.len() > 2 {
                    return Err(no_sense("a requester has one table or two"));
                }
                Outcome::Tables(Translated {
                    tables: tables.iter().map(SavedTable::table).collect(),
                    intercepts: intercepts.iter().map(SavedIntercept::intercept).collect(),
                    tag: Tag { domain: *domain, space: *space },
                })
            }
        })
    }
}

impl SavedIntercept {
    fn of(intercept: &Intercept) -> Self {
        let Intercept { passed, mask, value, server, address, section } = intercept.clone();
        Self { passed, mask, value, server, address, section }
    }

    fn intercept(&self) -> Intercept {
        let Self { passed, mask, value, server, address, section } = self.clone();
        Intercept { passed, mask, value, server, address, section }
    }
}
