//! Converting a frozen guest's tables into another format.
//!
//! Devices of one domain share one table, before and after. The source is walked twice: once to see what the target must be able to say, once to
//! build it; each walk reads every entry once, and what is built is what the second walk checked.

use std::collections::HashMap;

use crate::guest::{Guest, GuestError, State, StreamState};
use crate::memory::{Kind, MemoryMap, Region};
use crate::plugin::{CallError, Plugin, Settings, TableConfig};
use crate::snapshot::{Stream, StreamEntry};
use crate::table::{
    AddressSpace, Arena, BuildError, Builder, Built, Count, FaultAt, Intercept, Loss, Losses, Need, Passed, Piece, Receiver, Root, Run, Step,
    Visitor, WalkError, Window,
};
use crate::{Attributes, Gpa, Span};

/// Where converted tables are put, in a hole of the guest's memory map at or above this address.
const TABLES_FROM: u64 = 1 << 32;

/// What to convert to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Full format name, such as `intel-vtd/first-stage`.
    pub format: String,
    /// Settings that are wished for; the others follow from what the tables need.
    pub settings: Settings,
    /// Most bytes of tables that may be built, for all devices together.
    pub table_bytes: u64,
}

impl Target {
    /// Conversion to `format`, with at most 1 GiB of tables.
    #[must_use]
    pub fn new(format: &str) -> Self {
        Self { format: format.to_owned(), settings: Settings::new(), table_bytes: 1 << 30 }
    }
}

/// A conversion cannot be done.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The guest cannot be looked at.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The snapshot lacks a page that would have been needed.
    #[error("the snapshot lacks page {page:#x}, which the tables of device {id:#x} need")]
    MissingPage {
        /// The page.
        page: u64,
        /// The device.
        id: u64,
    },
    /// The target's settings make no sense.
    #[error(transparent)]
    Target(#[from] CallError),
    /// The target cannot be built.
    #[error("{format}: {error}")]
    Build {
        /// The target format.
        format: String,
        /// Why.
        error: BuildError,
    },
    /// The target format has no such setting.
    #[error("{format} has no setting `{name}`; there are {known}")]
    NoSetting {
        /// The target format.
        format: String,
        /// The setting.
        name: String,
        /// Those that there are.
        known: String,
    },
    /// The device has no address space of its own.
    #[error("device {id:#x} has neither tables nor windows: there is nothing to convert")]
    Nothing {
        /// The device.
        id: u64,
    },
    /// No part of the guest-physical address space is free for the tables.
    #[error("no hole of {bytes:#x} bytes below 2^{bits} in the guest's memory map for the tables")]
    NoHole {
        /// Bytes wanted.
        bytes: u64,
        /// The target's address bits.
        bits: u8,
    },
}

/// One table that was converted.
#[derive(Debug)]
pub struct ConvertedTable {
    /// The streams that use it: id and PASID.
    pub streams: Vec<(u64, Option<u32>)>,
    /// What they used before; none if they had no table.
    pub source: Vec<TableConfig>,
    /// What they reached without any table.
    pub windows: Vec<Window>,
    /// The new table, its roots among the settings.
    pub table: TableConfig,
    /// What was built, and what could not be said.
    pub built: Built,
    /// What else than tables served some addresses of the source, unless the target's units do the same: requests there fault in the target.
    pub intercepts: Vec<Intercept>,
    /// Leaves of the source.
    pub source_leaves: u64,
    /// Bytes of the new table.
    pub bytes: u64,
}

impl ConvertedTable {
    /// The intercepts that are missed: the guest set them up, so that its devices' requests are to reach them. What comes with the source's
    /// architecture is no part of what the guest asked for.
    pub fn lost_intercepts(&self) -> impl Iterator<Item = &Intercept> {
        self.intercepts.iter().filter(|intercept| intercept.is_guests_own())
    }
}

/// Everything that was converted.
#[derive(Debug)]
pub struct Conversion {
    /// The tables, in the order of their first device.
    pub tables: Vec<ConvertedTable>,
    /// What each stream uses now.
    pub streams: Vec<StreamEntry>,
    /// The memory of the new tables.
    pub arena: Arena,
    /// The guest's memory map, with the tables' memory.
    pub map: MemoryMap,
}

/// Learns what a target must be able to say.
struct Survey {
    need: Need,
    leaves: u64,
    missing: Option<u64>,
    tagged: Vec<Tagged>,
}

/// What devices reach through a root that does not look at all bits of an IOVA.
struct Tagged {
    iova: Span,
    ignored: u64,
    mappings: Count,
}

impl Survey {
    fn new(space: &AddressSpace) -> Self {
        // The IOVA is looked at by the first table.
        let roots = space.tables().next().map_or(&[][..], |table| &table.geometry().roots);
        let tagged = roots.iter().filter(|root| root.ignored != 0).map(|root| Tagged {
            iova: Span { first: root.first, last: root.last },
            ignored: root.ignored,
            mappings: Count::default(),
        });
        Self { need: Need { alignment_log2: 63, ..Need::default() }, leaves: 0, missing: None, tagged: tagged.collect() }
    }

    /// Counts the mappings whose aliases a target with these roots does not have.
    fn lose_tags(&self, target: &[Root], losses: &mut Losses) {
        for source in &self.tagged {
            let mut roots = target.iter().filter(|root| source.iova.intersection(Span { first: root.first, last: root.last }).is_some()).peekable();
            let kept = roots.peek().is_some() && roots.all(|root| root.ignored & source.ignored == source.ignored);
            if !kept {
                losses.add_count(Loss::Tagged, &source.mappings);
            }
        }
    }
}

impl Visitor for Survey {
    fn piece(&mut self, piece: &Piece, _: &[Step]) -> Result<(), WalkError> {
        self.leaves += 1;
        if piece.attributes.grants_nothing() {
            return Ok(());
        }
        if let Some(tagged) = self.tagged.iter_mut().find(|tagged| tagged.iova.contains(piece.iova.first)) {
            tagged.mappings.add(*piece);
        }
        let Span { first, last } = piece.iova;
        if last >> 63 == 0 {
            self.need.last_low = Some(self.need.last_low.map_or(last, |known| known.max(last)));
        } else {
            self.need.first_high = Some(self.need.first_high.map_or(first, |known| known.min(first)));
        }
        let last_address = piece.address.saturating_add(piece.iova.length_minus_one());
        self.need.last_address = self.need.last_address.max(last_address);
        let bits = first | piece.address | piece.iova.length_minus_one().wrapping_add(1);
        self.need.alignment_log2 = self.need.alignment_log2.min(bits.trailing_zeros().min(63) as u8);
        Ok(())
    }

    fn fault(&mut self, fault: &FaultAt<'_>) -> Result<(), WalkError> {
        if fault.cause == crate::table::Cause::Missing && self.missing.is_none() {
            self.missing = fault.address;
        }
        Ok(())
    }
}

/// Where all requests count as privileged, leaves for privileged requests only are for all: the target need not say it.
struct AllPrivileged<'a, V>(&'a mut V);

impl<V: Visitor> Visitor for AllPrivileged<'_, V> {
    fn table(&mut self) {
        self.0.table();
    }

    fn takes_gaps(&self) -> bool {
        self.0.takes_gaps()
    }

    fn takes_large(&self) -> bool {
        self.0.takes_large()
    }

    fn receive(&mut self, run: &Run<'_>) -> Option<Receiver<'_>> {
        self.0.receive(&for_all(run))
    }

    fn received(&mut self, run: &Run<'_>, passed: Passed) -> Result<bool, WalkError> {
        self.0.received(&for_all(run), passed)
    }

    fn leaves(&mut self, run: &Run<'_>, path: &[Step]) -> Result<(), WalkError> {
        self.0.leaves(&for_all(run), path)
    }

    fn piece(&mut self, piece: &Piece, path: &[Step]) -> Result<(), WalkError> {
        self.0.piece(&Piece { attributes: piece.attributes.without(Attributes::PRIVILEGED_ONLY), ..*piece }, path)
    }

    fn absent(&mut self, span: Span, path: &[Step]) -> Result<(), WalkError> {
        self.0.absent(span, path)
    }

    fn nothing_below(&mut self, span: Span, entries: u64, path: &[Step]) -> Result<(), WalkError> {
        self.0.nothing_below(span, entries, path)
    }

    fn fault(&mut self, fault: &FaultAt<'_>) -> Result<(), WalkError> {
        self.0.fault(fault)
    }
}

/// The same leaves, for requests with and without privileges.
fn for_all<'a>(run: &Run<'a>) -> Run<'a> {
    Run { kinds: run.kinds.map(|attributes| attributes.without(Attributes::PRIVILEGED_ONLY)), ..*run }
}

/// Converts the tables of all `streams` of `guest`. `progress` hears, before each table, how many are done and how many there are.
///
/// # Errors
/// The source cannot be read whole, a plugin fails, or the target cannot be built. What the target cannot say is no error but counted in
/// [`Built::losses`].
pub fn convert(
    guest: &Guest<'_>,
    streams: &[StreamState],
    target: &Target,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Conversion, ConvertError> {
    let plugin = guest.plugins().by_format(&target.format).map_err(GuestError::from)?;
    check_settings(&plugin, target)?;
    // Refuses settings that make no sense even where there is nothing to convert.
    plugin.instantiate()?.suggest(&target.format, &target.settings, &Need::default())?;
    check_whole(streams)?;
    let groups = groups(streams);
    let format = plugin.open(&suggested(&plugin, target, &Need { last_address: highest(guest.map()), ..Need::default() })?)?;
    let bits = table_bits(format, &target.format)?;
    let hole = |from| guest.map().hole(from, target.table_bytes, Arena::ALIGNMENT, bits);
    let base = hole(TABLES_FROM).or_else(|| hole(Arena::ALIGNMENT)).ok_or(ConvertError::NoHole { bytes: target.table_bytes, bits })?;
    let mut arena = Arena::new(base, target.table_bytes);
    let mut tables = Vec::with_capacity(groups.len());
    let mut entries: Vec<StreamEntry> = Vec::with_capacity(streams.len());
    for (done, group) in groups.iter().enumerate() {
        progress(done, groups.len());
        tables.push(convert_table(guest, group, target, &plugin, &mut arena)?);
    }
    progress(groups.len(), groups.len());
    let users = tables.iter().flat_map(|table: &ConvertedTable| table.streams.iter().map(move |stream| (*stream, table)));
    let of_stream: HashMap<(u64, Option<u32>), &ConvertedTable> = users.collect();
    for stream in streams {
        let converted = match &stream.state {
            State::Bypass => Stream::Bypass,
            State::Blocked(reason) if stream.unused => Stream::Unused(reason.clone()),
            State::Blocked(reason) => Stream::Blocked(reason.clone()),
            State::Direct(_) | State::Translated(_) => match of_stream.get(&(stream.id, stream.pasid)) {
                Some(ConvertedTable { table, .. }) => Stream::Table {
                    format: table.format.clone(),
                    settings: table.settings.iter().map(|(name, value)| (name.to_owned(), value)).collect(),
                },
                None => Stream::Blocked("no table was converted".to_owned()),
            },
        };
        entries.push(StreamEntry { id: stream.id, pasid: stream.pasid, stream: converted });
    }
    let map = with_tables(guest.map(), &arena);
    Ok(Conversion { tables, streams: entries, arena, map })
}

/// Refuses a stream whose own structures lack a page: it is not one that is blocked.
pub(crate) fn check_whole(streams: &[StreamState]) -> Result<(), ConvertError> {
    match streams.iter().find_map(|stream| Some((stream.missing?, stream.id))) {
        Some((page, id)) => Err(ConvertError::MissingPage { page: page.0 & !(crate::memory::PAGE - 1), id }),
        None => Ok(()),
    }
}

/// The first of some streams that go the same way, and all of them: id and PASID.
type Group<'a> = (&'a StreamState, Vec<(u64, Option<u32>)>);

/// Streams that go the same way: through the same tables, or to the same windows.
fn groups(streams: &[StreamState]) -> Vec<Group<'_>> {
    let mut groups: Vec<Group<'_>> = Vec::new();
    let mut places = HashMap::new();
    for stream in streams.iter().filter(|stream| matches!(stream.state, State::Direct(_) | State::Translated(_))) {
        let place = *places.entry(stream.way()).or_insert(groups.len());
        match groups.get_mut(place) {
            Some((_, members)) => members.push((stream.id, stream.pasid)),
            None => groups.push((stream, vec![(stream.id, stream.pasid)])),
        }
    }
    groups
}

fn check_settings(plugin: &Plugin, target: &Target) -> Result<(), ConvertError> {
    let Some(format) = plugin.manifest().format(&target.format) else { return Ok(()) };
    match format.unknown(&target.settings) {
        Some((name, known)) => Err(ConvertError::NoSetting { format: target.format.clone(), name: name.to_owned(), known }),
        None => Ok(()),
    }
}

fn suggested(plugin: &Plugin, target: &Target, need: &Need) -> Result<TableConfig, ConvertError> {
    let settings = plugin.instantiate()?.suggest(&target.format, &target.settings, need)?;
    Ok(TableConfig { format: target.format.clone(), settings })
}

/// Below which power of two tables must stand so that entries can point to them: a format's leaves may have more address bits.
fn table_bits(format: impl crate::table::Format + 'static, name: &str) -> Result<u8, ConvertError> {
    let mut nowhere = Arena::new(0, 0);
    let builder = Builder::new(Box::new(format), &mut nowhere).map_err(|error| ConvertError::Build { format: name.to_owned(), error })?;
    Ok(builder.table_bits())
}

/// The highest address of the memory map.
fn highest(map: &MemoryMap) -> u64 {
    map.regions().last().map_or(0, |region| region.span.last)
}

fn convert_table(
    guest: &Guest<'_>,
    (stream, streams): &Group<'_>,
    target: &Target,
    plugin: &Plugin,
    arena: &mut Arena,
) -> Result<ConvertedTable, ConvertError> {
    let walk = |error: WalkError| ConvertError::Guest(error.into());
    let Some(mut space) = guest.space(stream)? else { return Err(ConvertError::Nothing { id: stream.id }) };
    let mut survey = Survey::new(&space);
    guest.walk(&mut space, &mut survey).map_err(walk)?;
    if let Some(page) = survey.missing {
        return Err(ConvertError::MissingPage { page: page & !(crate::memory::PAGE - 1), id: streams.first().map_or(0, |stream| stream.0) });
    }
    // The tables must be reachable as well, wherever they are.
    survey.need.last_address = survey.need.last_address.max(highest(guest.map())).max(arena.base() + target.table_bytes.saturating_sub(1));
    let mut config = suggested(plugin, target, &survey.need)?;
    let build = |error: BuildError| ConvertError::Build { format: target.format.clone(), error };
    let before = arena.bytes();
    let all_privileged = space.privileged();
    let mut builder = Builder::new(Box::new(plugin.open(&config)?), arena).map_err(build)?;
    // Requests with PASID are looked up everywhere.
    let for_pasids = streams.iter().all(|(_, pasid)| pasid.is_some());
    let untranslated = if for_pasids { Vec::new() } else { builder.geometry().untranslated.clone() };
    let intercepts = stream.intercepts.iter().filter(|intercept| !intercept.is_kept_by(&untranslated)).cloned().collect();
    if for_pasids {
        builder = builder.for_pasids();
    }
    let mut tags = Losses::default();
    survey.lose_tags(&builder.geometry().roots, &mut tags);
    let walked = if all_privileged { guest.walk(&mut space, &mut AllPrivileged(&mut builder)) } else { guest.walk(&mut space, &mut builder) };
    let mut built = builder.finish().map_err(build)?;
    for (loss, count) in tags.iter() {
        built.losses.add_count(loss, count);
    }
    walked.map_err(walk)?;
    for (name, root) in &built.roots {
        config.settings.set(name, root.0);
    }
    let bytes = arena.bytes() - before;
    let windows = if let State::Direct(windows) = &stream.state { windows.clone() } else { Vec::new() };
    let (streams, source) = (streams.clone(), stream.tables().to_vec());
    Ok(ConvertedTable { streams, source, windows, table: config, built, intercepts, source_leaves: survey.leaves, bytes })
}

/// The guest's memory map with the memory that the new tables take.
fn with_tables(map: &MemoryMap, arena: &Arena) -> MemoryMap {
    let mut regions = map.regions().to_vec();
    if let Some((Gpa(last), _)) = arena.pages().last() {
        // Rounded up, as far as the hole is known to reach.
        let last = (last | (Arena::ALIGNMENT - 1)).min(arena.last());
        regions.push(Region { kind: Kind::Table, span: Span { first: arena.base(), last } });
    }
    // The arena stands in a hole of the map.
    MemoryMap::new(regions).unwrap_or_default()
}
