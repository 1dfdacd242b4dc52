//! Which strategy a path gets, and why none that is better.

use std::fmt;

use super::device::Capabilities;
use super::{Error, GuestMemory, GuestView, Kind, Request, Strategy};
use crate::offers::{beyond, is_within, wishes};
use crate::plugin::{FormatManifest, Offer, Outcome, Plugins, Supervised, Supervisors, TableConfig, Translated};
use crate::table::{Geometry, Need};

/// What was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// How the device gets it.
    pub strategy: Strategy,
    /// What the unit walks, in words: a table's format and settings where it is one.
    pub what: String,
}

/// A better strategy that was not chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// Which.
    pub strategy: Strategy,
    /// The properties that say no: sentences in lower case without a full stop.
    pub reasons: Vec<String>,
}

/// What was chosen for a device's path, or would be, and why. [`fmt::Display`] says it in words, one line each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// The device for which it was chosen; those behind the same unit share it. Empty: device models of the VMM's, for which nothing better is to be had.
    pub device: String,
    /// None: no strategy that the request allows can be had.
    pub chosen: Option<Chosen>,
    /// Better ones, best first.
    pub rejected: Vec<Rejected>,
    /// What the chosen one does not do, or needs besides.
    pub notes: Vec<String>,
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.chosen {
            Some(Chosen { strategy, what }) if self.device.is_empty() => write!(f, "{strategy}: {what}")?,
            Some(Chosen { strategy, what }) => write!(f, "device {}: {strategy}: {what}", self.device)?,
            None => write!(f, "device {}: cannot be attached", self.device)?,
        }
        for Rejected { strategy, reasons } in &self.rejected {
            write!(f, "\n  not {strategy}: {}", reasons.join("; "))?;
        }
        self.notes.iter().try_for_each(|note| write!(f, "\n  note: {note}"))
    }
}

impl Explanation {
    pub(super) fn new(device: &str) -> Self {
        Self { device: device.to_owned(), chosen: None, rejected: Vec::new(), notes: Vec::new() }
    }

    pub(super) fn of_lookups() -> Self {
        let chosen = Chosen { strategy: Strategy::Software, what: "lookups of the VMM's own device models".to_owned() };
        Self { chosen: Some(chosen), ..Self::new("") }
    }

    pub(super) fn reject(&mut self, strategy: Strategy, reasons: Vec<String>) {
        self.rejected.push(Rejected { strategy, reasons });
    }

    /// All reasons, in one sentence.
    pub(super) fn why_not(&self) -> String {
        let reason = |rejected: &Rejected| format!("not {}: {}", rejected.strategy, rejected.reasons.join("; "));
        self.rejected.iter().map(reason).collect::<Vec<_>>().join("; ")
    }
}

/// A strategy that may be had, and what it takes.
#[derive(Debug)]
pub(super) enum Candidate {
    /// The kernel's own table of guest memory.
    Memory,
    /// A table in which nothing is.
    Nothing,
    /// The guest's table.
    Own(TableConfig),
    /// A host table of this format.
    Table(TableConfig, Box<Supervised>),
    /// An address space of the kernel's.
    Areas,
}

impl Candidate {
    /// A table of user space's, which is for one unit.
    pub(super) const fn is_users(&self) -> bool {
        matches!(self, Self::Own(_) | Self::Table(..))
    }

    /// What the unit walks.
    pub(super) fn what(&self) -> String {
        match self {
            Self::Memory => "the kernel's table of guest memory".to_owned(),
            Self::Nothing => "an empty table".to_owned(),
            Self::Own(config) => format!("the guest's {config}"),
            Self::Table(config, _) => config.to_string(),
            Self::Areas => "the kernel's own tables".to_owned(),
        }
    }
}

/// What a choice is made from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Choice<'a> {
    pub(super) request: &'a Request,
    /// What the guest's structures say now; it may have changed since the request.
    pub(super) kind: &'a Kind,
    /// Geometry of the table that sees IOVAs, if there is one.
    pub(super) geometry: Option<&'a Geometry>,
    pub(super) capabilities: &'a Capabilities,
    pub(super) plugins: &'a Plugins,
    pub(super) supervisors: &'a Supervisors,
    pub(super) memory: &'a GuestMemory,
}

/// A candidate and what is to be noted about it, or the reasons against.
type Judged = Result<(Candidate, Vec<String>), Vec<String>>;

impl Choice<'_> {
    /// Judges one strategy. [`Strategy::Software`] is for nobody's DMA.
    pub(super) fn judge(&self, strategy: Strategy) -> Result<Judged, Error> {
        if !self.request.strategies.contains(strategy) {
            return Ok(Err(vec!["the request does not allow it".to_owned()]));
        }
        match strategy {
            Strategy::Native => Ok(self.native()),
            Strategy::Nested => self.nested(),
            Strategy::Areas => Ok(match &self.request.host_table {
                None => Ok((Candidate::Areas, self.about_areas())),
                Some(wish) => Err(vec![format!("a table of {} is asked for, and the kernel's own are not", wish.format)]),
            }),
            Strategy::Software => Ok(Err(vec!["a device's DMA does not go through software".to_owned()])),
        }
    }

    fn native(&self) -> Judged {
        let one = |reason: &str| Err(vec![reason.to_owned()]);
        let Kind::Guest(view) = self.kind else { return one("there is no table of the guest's") };
        match &view.outcome {
            Outcome::Bypass => Ok((Candidate::Memory, Vec::new())),
            Outcome::Blocked(_) => Ok((Candidate::Nothing, Vec::new())),
            Outcome::Direct(_) => one("the guest's windows are no table"),
            Outcome::Tables(Translated { tables, intercepts, .. }) => {
                let [config] = &tables[..] else { return one("the guest has two stages, which only become one table by conversion") };
                // What the architecture serves beside the tables, a unit that takes them serves as well.
                let kept = self.geometry.map_or(&[][..], |geometry| &geometry.untranslated);
                if let Some(intercept) = intercepts.iter().find(|intercept| !intercept.is_kept_by(kept)) {
                    return Err(vec![format!("some addresses are for the guest's {}, which the unit does not know", intercept.server)]);
                }
                if let Some(reasons) = self.request.host_table.as_ref().map(|wish| unlike(config, manifest(self.plugins, &config.format), wish))
                    && !reasons.is_empty()
                {
                    return Err(reasons);
                }
                let Some(offer) = self.capabilities.offer(&config.format) else {
                    return Err(self.no_offer(&format!("the guest's format is {}", config.format)));
                };
                match &beyond(config, manifest(self.plugins, &config.format), offer)[..] {
                    [] => Ok((Candidate::Own(config.clone()), offer.conditions.clone())),
                    reasons => Err(reasons.to_vec()),
                }
            }
        }
    }

    /// What areas do not do for a guest.
    fn about_areas(&self) -> Vec<String> {
        if *self.kind == Kind::Managed || self.request.limits.areas.hitless_changes {
            return Vec::new();
        }
        vec!["a page whose permissions or target change is not there for a moment: the kernel cannot change an area, and a swap for changes was not asked for".to_owned()]
    }

    /// Why no table of a user's is taken, or which ones are.
    fn no_offer(&self, otherwise: &str) -> Vec<String> {
        let formats: Vec<&str> = self.capabilities.formats.iter().map(|offer| offer.format.as_str()).collect();
        if formats.is_empty() { self.capabilities.missing.clone() } else { vec![format!("{otherwise}, and the unit takes {}", formats.join(", "))] }
    }

    fn nested(&self) -> Result<Judged, Error> {
        if *self.kind == Kind::Managed {
            return Ok(Err(vec!["mappings of the VMM are the kernel's own business".to_owned()]));
        }
        let mut reasons = Vec::new();
        let wish = self.request.host_table.as_ref();
        if let Some(wish) = wish.filter(|wish| self.capabilities.offer(&wish.format).is_none()) {
            return Ok(Err(self.no_offer(&format!("a table of {} is asked for", wish.format))));
        }
        for offer in self.capabilities.formats.iter().filter(|offer| wish.is_none_or(|wish| wish.format == offer.format)) {
            match self.host_table(offer)? {
                Ok(candidate) => return Ok(Ok(candidate)),
                Err(more) => reasons.extend(more.into_iter().map(|reason| format!("{}: {reason}", offer.format))),
            }
        }
        Ok(Err(if reasons.is_empty() { self.no_offer("") } else { reasons }))
    }

    /// A host table within the limits of an offer, that can say as much of the guest's as possible.
    fn host_table(&self, offer: &Offer) -> Result<Judged, Error> {
        let need = self.need()?;
        let (mut settings, sizes) = wishes(self.plugins, offer)?;
        let asked: Vec<(&str, u64)> = self.request.host_table.iter().flat_map(|wish| wish.settings.iter()).collect();
        asked.iter().for_each(|(name, value)| settings.set(name, *value));
        if let Some((name, set)) = sizes.filter(|(size, _)| asked.iter().all(|(name, _)| name != size)) {
            // The largest pages that are not larger than the guest's: tables are smallest then.
            let fits = (12..=need.alignment_log2.min(63)).rev().map(|log2| 1_u64 << log2).find(|size| set & size != 0);
            let Some(size) = fits else {
                let smallest = 1_u64 << set.trailing_zeros();
                return Ok(Err(vec![format!(
                    "its pages have {smallest:#x} bytes at least, and the guest's have {:#x}",
                    1_u64 << need.alignment_log2
                )]));
            };
            settings.set(&name, size);
        }
        let plugin = self.plugins.by_format(&offer.format)?;
        let mut instance = plugin.instantiate()?;
        let mut suggested = instance.suggest(&offer.format, &settings, &need)?;
        let over = |(name, limit): &&(String, u64)| {
            let is_asked = asked.iter().any(|(asked, _)| asked == name);
            !is_asked && *limit < 4096 && suggested.get(name).is_some_and(|value| !is_within(value, *limit))
        };
        let over: Vec<&(String, u64)> = offer.limits.iter().filter(over).collect();
        if !over.is_empty() {
            over.iter().for_each(|(name, limit)| settings.set(name, *limit));
            suggested = instance.suggest(&offer.format, &settings, &need)?;
        }
        let config = TableConfig { format: offer.format.clone(), settings: suggested };
        let reasons = beyond(&config, manifest(self.plugins, &config.format), offer);
        if !reasons.is_empty() {
            return Ok(Err(reasons));
        }
        let format = self.supervisors.open(&config)?;
        let mut notes = offer.conditions.clone();
        let host = format.geometry_ref();
        notes.extend(self.geometry.into_iter().flat_map(|guest| uncovered(guest, host)));
        if need.last_address >> (host.output_bits.min(63)) != 0 {
            notes.push(format!("guest memory beyond {} address bits is not reached", host.output_bits));
        }
        Ok(Ok((Candidate::Table(config, Box::new(format)), notes)))
    }

    fn need(&self) -> Result<Need, Error> {
        let last_address = self.memory.last_address();
        let Some(geometry) = self.geometry else {
            return Ok(Need { last_low: Some(REQUESTED_IOVAS), first_high: None, last_address, alignment_log2: 12 });
        };
        let high = |first: u64| first >> 63 == 1;
        let lows = geometry.roots.iter().filter(|root| !high(root.first)).map(|root| root.last);
        let highs = geometry.roots.iter().filter(|root| high(root.first)).map(|root| root.first);
        let alignment_log2 = finest(self.supervisors, self.kind, self.geometry)?.unwrap_or(12);
        Ok(Need { last_low: lows.max(), first_high: highs.min(), last_address, alignment_log2 })
    }
}

/// Log2 of the smallest page of a table, 12 at least.
pub(super) fn smallest_page_log2(geometry: &Geometry) -> u8 {
    let sizes = geometry.levels.iter().fold(0, |sizes, level| sizes | level.leaf_sizes);
    if sizes == 0 { 12 } else { sizes.trailing_zeros().max(12) as u8 }
}

/// The same of the guest's tables, `first` and what is behind it; none if it has none.
pub(super) fn finest(supervisors: &Supervisors, kind: &Kind, first: Option<&Geometry>) -> Result<Option<u8>, Error> {
    let Some(first) = first.map(smallest_page_log2) else { return Ok(None) };
    let Kind::Guest(GuestView { outcome: Outcome::Tables(Translated { tables, .. }), .. }) = kind else { return Ok(Some(first)) };
    let behind = tables.iter().skip(1).map(|table| Ok(smallest_page_log2(supervisors.open(table)?.geometry_ref())));
    behind.collect::<Result<Vec<_>, Error>>().map(|behind| behind.into_iter().chain([first]).min())
}

/// The highest IOVA of an address space whose mappings a guest asks for: 48 bits, which all units have.
const REQUESTED_IOVAS: u64 = (1 << 48) - 1;

pub(super) fn manifest<'a>(plugins: &'a Plugins, format: &str) -> Option<&'a FormatManifest> {
    plugins.iter().find_map(|(manifest, _)| manifest.format(format))
}

/// In what a table is not the one that is asked for, in words.
fn unlike(config: &TableConfig, manifest: Option<&FormatManifest>, wish: &TableConfig) -> Vec<String> {
    if config.format != wish.format {
        return vec![format!("the guest's format is {}, and {} is asked for", config.format, wish.format)];
    }
    let default = |name: &str| manifest?.settings.iter().find(|setting| setting.name == name)?.default;
    let other = |(name, asked): (&str, u64)| match config.settings.get(name).or_else(|| default(name)) {
        Some(value) if value == asked => None,
        Some(value) => Some(format!("{name} is {value} in the guest's table, and {asked} is asked for")),
        None => Some(format!("the guest's table has no {name}, and {asked} is asked for")),
    };
    wish.settings.iter().filter_map(other).collect()
}

/// IOVAs of the guest's tables that the host's do not have.
fn uncovered(guest: &Geometry, host: &Geometry) -> Vec<String> {
    let mut notes = Vec::new();
    for root in &guest.roots {
        let mut next = Some(root.first);
        let mut spans: Vec<(u64, u64)> = host.roots.iter().map(|host| (host.first, host.last)).collect();
        spans.sort_unstable();
        for (first, last) in spans {
            let Some(from) = next.filter(|from| *from <= root.last) else { break };
            if last < from {
                continue;
            }
            if first > from {
                notes.push(format!("IOVAs {from:#x}..={:#x} are not translated", (first - 1).min(root.last)));
            }
            next = last.checked_add(1);
        }
        if let Some(from) = next.filter(|from| *from <= root.last) {
            notes.push(format!("IOVAs {from:#x}..={:#x} are not translated", root.last));
        }
    }
    notes
}
