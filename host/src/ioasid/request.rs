//! What a VMM asks for.

use std::fmt;

use super::context::Inner;
use super::{Error, Property, Refusal, SpaceLimits};
use crate::plugin::{Direct, Outcome, TableConfig, Tag, Translated};
use crate::table::{AddressSpace, Need, Table, Window};
use crate::{Attributes, Span};

/// How a device gets what is in an address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Strategy {
    /// The unit walks the guest's own table.
    Native,
    /// The unit walks a table in its own format, in memory of the host, that is kept in step with the guest's.
    Nested,
    /// The kernel maps and unmaps, in its own tables.
    Areas,
    /// Lookups in software, for the VMM's own device models.
    Software,
}

impl Strategy {
    /// All, best first.
    pub const ALL: [Self; 4] = [Self::Native, Self::Nested, Self::Areas, Self::Software];

    /// A few words.
    #[must_use]
    pub const fn describe(self) -> &'static str {
        match self {
            Self::Native => "bound as it is",
            Self::Nested => "converted, nested",
            Self::Areas => "mapped by the kernel",
            Self::Software => "in software",
        }
    }

    const fn bit(self) -> u8 {
        1 << self as u8
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.describe())
    }
}

/// Some strategies.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Strategies(u8);

impl Strategies {
    /// All of them.
    pub const ALL: Self = Self(0b1111);

    /// These.
    #[must_use]
    pub fn of(strategies: &[Strategy]) -> Self {
        Self(strategies.iter().fold(0, |bits, strategy| bits | strategy.bit()))
    }

    /// Whether this one is among them.
    #[must_use]
    pub const fn contains(self, strategy: Strategy) -> bool {
        self.0 & strategy.bit() != 0
    }

    /// Without this one.
    #[must_use]
    pub const fn without(self, strategy: Strategy) -> Self {
        Self(self.0 & !strategy.bit())
    }

    /// Those that are there, best first.
    pub fn iter(self) -> impl Iterator<Item = Strategy> {
        Strategy::ALL.into_iter().filter(move |strategy| self.contains(*strategy))
    }
}

impl Default for Strategies {
    fn default() -> Self {
        Self::ALL
    }
}

impl fmt::Debug for Strategies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// What a guest's structures give to a requester: what [`device::Unit::lookup`](crate::device::Unit::lookup) found, or the same from elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestView {
    /// What its DMA gets.
    pub outcome: Outcome,
    /// The requester's number in the guest: commands that name it concern this address space.
    pub id: u64,
}

impl GuestView {
    /// One table, without a tag: every command concerns it.
    #[must_use]
    pub fn table(config: TableConfig) -> Self {
        Self { outcome: Outcome::Tables(Translated::of(vec![config])), id: 0 }
    }

    /// What it says, to be walked as it stands in memory.
    pub(super) fn open(&self, context: &Inner) -> Result<AddressSpace, Error> {
        let table = |config: &TableConfig| -> Result<Table, Error> { Ok(Table::open(context.open(config)?)?) };
        let everything = Window { iova: Span::ALL, address: 0, attributes: Attributes::READ.with(Attributes::WRITE).with(Attributes::COHERENT) };
        Ok(match &self.outcome {
            Outcome::Bypass => AddressSpace::direct(vec![everything]),
            Outcome::Direct(Direct { windows, intercepts }) => AddressSpace::direct(windows.clone()).with_intercepts(intercepts.clone()),
            Outcome::Blocked(_) => AddressSpace::direct(Vec::new()),
            Outcome::Tables(Translated { tables, intercepts, .. }) => {
                let space = match &tables[..] {
                    [one] => AddressSpace::single(table(one)?),
                    [inner, outer] => AddressSpace::nested(table(inner)?, table(outer)?),
                    _ => AddressSpace::direct(Vec::new()),
                };
                space.with_intercepts(intercepts.clone())
            }
        })
    }

    /// How commands name the address space.
    #[must_use]
    pub const fn tag(&self) -> Tag {
        match &self.outcome {
            Outcome::Tables(translated) => translated.tag,
            Outcome::Bypass | Outcome::Direct(_) | Outcome::Blocked(_) => Tag { domain: None, space: None },
        }
    }
}

/// Refuses a host table that cannot be, whichever the unit is.
pub(super) fn check_host_table(context: &Inner, request: &Request) -> Result<(), Error> {
    let Some(TableConfig { format, settings }) = &request.host_table else { return Ok(()) };
    let refuse = |reason: String| Err(Refusal::new(Property::Format, reason).into());
    if request.kind == Kind::Managed {
        return refuse(format!("mappings of the VMM are in the kernel's own tables, and a table of {format} is asked for"));
    }
    let plugin = context.plugins().by_format(format)?;
    if let Some((name, known)) = plugin.manifest().format(format).and_then(|format| format.unknown(settings)) {
        return refuse(format!("{format} has no setting `{name}`; there are {known}"));
    }
    plugin.instantiate()?.suggest(format, settings, &Need::default())?;
    Ok(())
}

/// What is in an address space, and who says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// What the VMM maps and unmaps.
    Managed,
    /// What a guest asks for (virtio-iommu): changes are told with [`Ioasid::change`](super::Ioasid::change).
    Requests,
    /// What the guest's structures and tables say.
    Guest(GuestView),
}

/// An IOASID to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// What is in it.
    pub kind: Kind,
    /// How devices may get it.
    pub strategies: Strategies,
    /// Host tables are of this format, with these settings; those that it leaves out are chosen by what is needed. A guest's table that is bound as it is counts as
    /// one, and the kernel's own tables do not. None: what a unit offers first and can be had. Not for [`Kind::Managed`].
    pub host_table: Option<TableConfig>,
    /// For a device behind another unit than the first one's a second host table may be made. (The kernel's own tables are mirrored in any case.)
    pub second_table: bool,
    /// Faults are to be recoverable: only devices that can ask for pages can be attached, and [`Ioasid::serve_faults`](super::Ioasid::serve_faults) answers.
    pub page_requests: bool,
    /// It is to be possible to record which pages are written ([`Ioasid::track_dirty`](super::Ioasid::track_dirty)): devices and strategies with which it is not are not taken.
    pub dirty_tracking: bool,
    /// How much it may take.
    pub limits: SpaceLimits,
}

impl Request {
    /// Any strategy, one host table of any format, no page requests, default limits.
    #[must_use]
    pub fn new(kind: Kind) -> Self {
        Self {
            kind,
            strategies: Strategies::ALL,
            host_table: None,
            second_table: false,
            page_requests: false,
            dirty_tracking: false,
            limits: SpaceLimits::default(),
        }
    }

    /// What the VMM maps and unmaps.
    #[must_use]
    pub fn managed() -> Self {
        Self::new(Kind::Managed)
    }

    /// What a guest asks for.
    #[must_use]
    pub fn requests() -> Self {
        Self::new(Kind::Requests)
    }

    /// What a guest's structures give.
    #[must_use]
    pub fn guest(view: GuestView) -> Self {
        Self::new(Kind::Guest(view))
    }

    /// The same, with only these strategies.
    #[must_use]
    pub fn with_strategies(self, strategies: &[Strategy]) -> Self {
        Self { strategies: Strategies::of(strategies), ..self }
    }

    /// The same, with host tables of this format, and with these settings.
    #[must_use]
    pub fn with_host_table(self, table: TableConfig) -> Self {
        Self { host_table: Some(table), ..self }
    }

    /// The same, and a second host table may be made.
    #[must_use]
    pub fn with_second_table(self) -> Self {
        Self { second_table: true, ..self }
    }

    /// The same, with recoverable faults.
    #[must_use]
    pub fn with_page_requests(self) -> Self {
        Self { page_requests: true, ..self }
    }

    /// The same, and it can be recorded which pages are written.
    #[must_use]
    pub fn with_dirty_tracking(self) -> Self {
        Self { dirty_tracking: true, ..self }
    }

    /// The same, with other limits.
    #[must_use]
    pub fn with_limits(self, limits: SpaceLimits) -> Self {
        Self { limits, ..self }
    }
}
