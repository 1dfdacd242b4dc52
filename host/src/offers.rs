//! What real hardware accepts of its users, and which of it suits a guest's tables best.
//!
//! ```text
//! iommu_hw_info --plugin--> offers: format, limits of its settings --+
//!                                                                    +--> bind as it is, or convert to the offer that loses least, or why none fits
//! guest's tables: configurations, and what they map -----------------+
//! ```
//!
//! A table that has an offered format already, under settings within the limits, is bound as it is. Otherwise the tables are converted to each offer, under
//! settings within its limits, and the results are compared: by what is refused, then by what is narrowed, then by the memory that the tables take. So what is
//! picked is not a promise but a result. An offer that refuses a mapping does not fit.

use std::fmt;

use crate::convert::{Conversion, ConvertError, ConvertedTable, Target, check_whole, convert};
use crate::guest::{Guest, State, StreamState};
use crate::plugin::{CallError, FormatManifest, Offer, Plugins, PluginsError, Refusal, Settings, TableConfig};
use crate::table::{Loss, Need};

/// What the kernel says about a unit: `iommu_hw_info` of iommufd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hardware {
    /// An `iommu_hw_info` data type.
    pub kind: u32,
    /// Its bytes.
    pub info: Vec<u8>,
}

/// Offers cannot be listed, or compared.
#[derive(Debug, thiserror::Error)]
pub enum OffersError {
    /// A plugin cannot be loaded.
    #[error(transparent)]
    Plugins(#[from] PluginsError),
    /// A plugin refuses the information, or fails.
    #[error(transparent)]
    Call(#[from] CallError),
    /// No plugin knows this kind of information.
    #[error("no plugin knows hardware information of type {0}")]
    UnknownKind(u32),
    /// The tables cannot be converted to anything.
    #[error(transparent)]
    Convert(#[from] Box<ConvertError>),
}

/// Which table formats the unit accepts of its users, each with the limits of its settings. None: it has no nesting.
///
/// # Errors
/// No plugin knows the kind of information, or one refuses it.
pub fn offers(plugins: &Plugins, hardware: &Hardware) -> Result<Vec<Offer>, OffersError> {
    let names: Vec<String> = plugins.iter().filter_map(|(manifest, _)| manifest.formats.first().map(|format| format.name.clone())).collect();
    for name in names {
        match plugins.by_format(&name)?.instantiate()?.offers(hardware.kind, &hardware.info) {
            Ok(offers) => return Ok(offers),
            Err(CallError::Refused { refusal: Refusal::Unsupported(_), .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(OffersError::UnknownKind(hardware.kind))
}

/// Why an offer does not fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// The format that is offered.
    pub format: String,
    /// The properties that say no, one sentence each.
    pub reasons: Vec<String>,
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.format, self.reasons.join("; "))
    }
}

/// What to do with a guest's tables.
#[derive(Debug)]
pub enum Choice {
    /// All of them have the format already, under settings that the unit has: bind them as they are.
    Native {
        /// The offer.
        offer: Offer,
    },
    /// Convert them.
    Convert {
        /// The offer.
        offer: Offer,
        /// The target, with the settings that keep within the limits.
        target: Target,
        /// What came out.
        conversion: Box<Conversion>,
        /// Why they are not bound as they are, and why not another offer.
        others: Vec<Rejection>,
    },
    /// Nothing that is offered can say what the tables say.
    Nothing(Vec<Rejection>),
}

/// Whether `value` of a setting keeps within the limit of an offer. Sizes of pages are the settings whose limit is a sum: powers of two, 4,096 and more.
#[must_use]
pub const fn is_within(value: u64, limit: u64) -> bool {
    if value.is_power_of_two() && value >= 4096 && limit >= 4096 { limit & value != 0 } else { value <= limit }
}

/// The settings of `config` that `offer` does not have, in words.
#[must_use]
pub fn beyond(config: &TableConfig, manifest: Option<&FormatManifest>, offer: &Offer) -> Vec<String> {
    let value = |name: &str| {
        let default = || manifest?.settings.iter().find(|setting| setting.name == name)?.default;
        config.settings.get(name).or_else(default)
    };
    let over = |(name, limit): &(String, u64)| {
        let value = value(name).filter(|value| !is_within(*value, *limit))?;
        Some(if *limit == 0 {
            format!("{name} is {value}, which the unit does not have")
        } else {
            format!("{name} is {value}, and the unit has {limit}")
        })
    };
    offer.limits.iter().filter_map(over).collect()
}

/// What suits the tables of `streams` best. `table_bytes`: most bytes of tables that a conversion may build.
///
/// # Errors
/// A plugin fails, or the tables cannot be read.
pub fn pick(guest: &Guest<'_>, streams: &[StreamState], offers: &[Offer], table_bytes: u64) -> Result<Choice, OffersError> {
    check_whole(streams).map_err(|error| OffersError::Convert(Box::new(error)))?;
    let mut rejections = Vec::new();
    for offer in offers {
        match refused_natively(guest, streams, offer) {
            reasons if reasons.is_empty() => return Ok(Choice::Native { offer: offer.clone() }),
            reasons => rejections.push(Rejection { format: offer.format.clone(), reasons: vec![format!("not as they are: {}", reasons.join("; "))] }),
        }
    }
    let mut best: Option<(Cost, usize, Target, Conversion)> = None;
    for (index, offer) in offers.iter().enumerate() {
        let mut failed = Vec::new();
        for target in targets(guest, offer, table_bytes)? {
            let conversion = match convert(guest, streams, &target, &mut |_, _| {}) {
                Ok(conversion) => conversion,
                // Settings that the format refuses, or tables that do not fit: this target is not one.
                Err(error @ (ConvertError::Target(CallError::Refused { .. }) | ConvertError::Build { .. } | ConvertError::NoHole { .. })) => {
                    failed.push(error.to_string());
                    continue;
                }
                Err(error) => return Err(OffersError::Convert(Box::new(error))),
            };
            let reasons = why_not(guest, offer, &conversion);
            if !reasons.is_empty() {
                failed.extend(reasons);
                continue;
            }
            let cost = Cost::new(&conversion);
            if best.as_ref().is_none_or(|(known, ..)| cost < *known) {
                best = Some((cost, index, target, conversion));
            }
        }
        if best.as_ref().is_none_or(|(_, known, ..)| *known != index) {
            failed.dedup();
            let lost = if failed.is_empty() { vec!["more is lost than with another offer".to_owned()] } else { failed };
            if let Some(rejection) = rejections.get_mut(index) {
                rejection.reasons.extend(lost);
            }
        }
    }
    Ok(match best {
        Some((_, index, target, conversion)) => {
            Choice::Convert { offer: offers[index].clone(), target, conversion: Box::new(conversion), others: rejections }
        }
        None => Choice::Nothing(rejections),
    })
}

/// Why not all tables can be bound as they are; empty if they can.
fn refused_natively(guest: &Guest<'_>, streams: &[StreamState], offer: &Offer) -> Vec<String> {
    let mut reasons: Vec<String> = Vec::new();
    let mut tables = 0;
    let mut say = |reason: String| {
        if !reasons.contains(&reason) {
            reasons.push(reason);
        }
    };
    for stream in streams {
        let State::Translated(configs) = &stream.state else { continue };
        tables += 1;
        for intercept in stream.intercepts.iter().filter(|intercept| intercept.is_guests_own()) {
            say(format!("some addresses are for the guest's {}, which the unit does not know", intercept.server));
        }
        let [config] = &configs[..] else {
            say("the guest has two stages, which only become one table by conversion".to_owned());
            continue;
        };
        if config.format != offer.format {
            say(format!("the guest's format is {}", config.format));
            continue;
        }
        let manifest = manifest(guest, &config.format);
        beyond(config, manifest, offer).into_iter().for_each(&mut say);
    }
    if tables == 0 {
        say("no device is translated".to_owned());
    }
    reasons
}

fn manifest<'a>(guest: &Guest<'a>, format: &str) -> Option<&'a FormatManifest> {
    guest.plugins().iter().find_map(|(manifest, _)| manifest.format(format))
}

/// Most targets that are tried for one offer.
const MOST_TARGETS: usize = 16;

/// Targets within the limits of an offer: one for each size in its first set of sizes, largest first, and one if it has no such set.
///
/// A setting is wished for where the format's default, or what it would suggest for the whole address space, is beyond the limit; the others follow from need.
fn targets(guest: &Guest<'_>, offer: &Offer, table_bytes: u64) -> Result<Vec<Target>, OffersError> {
    let (wished, sizes) = wishes(guest.plugins(), offer)?;
    let target = |settings: Settings| Target { settings, table_bytes, ..Target::new(&offer.format) };
    let Some((name, set)) = sizes else { return Ok(vec![target(wished)]) };
    let each = (12..64).rev().map(|log2| 1_u64 << log2).filter(|size| set & size != 0).take(MOST_TARGETS);
    Ok(each
        .map(|size| {
            let mut settings = wished.clone();
            settings.set(&name, size);
            target(settings)
        })
        .collect())
}

/// Settings that keep within an offer where the format's defaults, or what it would suggest, do not; and the first setting that is a set of sizes, with the
/// set.
pub(crate) fn wishes(plugins: &Plugins, offer: &Offer) -> Result<(Settings, Option<(String, u64)>), OffersError> {
    let plugin = plugins.by_format(&offer.format)?;
    let manifest = plugins.iter().find_map(|(manifest, _)| manifest.format(&offer.format));
    let default =
        |name: &str| manifest.and_then(|format| format.settings.iter().find(|setting| setting.name == name)).and_then(|setting| setting.default);
    let largest = plugin.instantiate()?.suggest(&offer.format, &Settings::new(), &Need { last_address: u64::MAX, ..Need::default() });
    let suggested = |name: &str| largest.as_ref().ok().and_then(|settings| settings.get(name));
    let mut wished = Settings::new();
    for (name, limit) in &offer.limits {
        if [default(name), suggested(name)].into_iter().flatten().any(|value| !is_within(value, *limit)) && *limit < 4096 {
            wished.set(name, *limit);
        }
    }
    let is_set = |(name, limit): &&(String, u64)| *limit >= 4096 && default(name).is_some_and(|value| value.is_power_of_two() && value >= 4096);
    Ok((wished, offer.limits.iter().find(is_set).cloned()))
}

/// What a conversion refuses, and which of its settings are beyond the offer after all.
fn why_not(guest: &Guest<'_>, offer: &Offer, conversion: &Conversion) -> Vec<String> {
    let mut reasons = Vec::new();
    for table in &conversion.tables {
        reasons.extend(beyond(&table.table, manifest(guest, &offer.format), offer));
        for (loss, count) in table.built.losses.iter().filter(|(loss, _)| loss.is_refused()) {
            let example = count.examples.first().map_or_else(String::new, |piece| format!(", such as {} ({})", piece.iova, piece.attributes));
            reasons.push(format!("{loss}: {:#x} bytes in {} leaves{example}: {}", count.bytes, count.pieces, loss.describe()));
        }
    }
    for intercept in conversion.tables.iter().flat_map(ConvertedTable::lost_intercepts) {
        reasons.push(format!("some addresses are for the guest's {}, which a converted table does not know", intercept.server));
    }
    reasons.dedup();
    reasons
}

/// What a conversion costs, most important first: bytes that lose something that is seen, bytes that lose anything, and memory for tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Cost {
    refused: u128,
    narrowed: u128,
    bytes: u64,
}

impl Cost {
    fn new(conversion: &Conversion) -> Self {
        let losses = || conversion.tables.iter().flat_map(|table| table.built.losses.iter());
        let sum = |wanted: fn(Loss) -> bool| losses().filter(|(loss, _)| wanted(*loss)).map(|(_, count)| count.bytes).sum();
        let bytes = conversion.tables.iter().map(|table| table.bytes).sum();
        Self { refused: sum(Loss::is_refused), narrowed: sum(|loss| !loss.is_refused()), bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_sets_and_everything_else_is_a_bound() {
        assert!(is_within(4096, 4096 + 65536) && is_within(65536, 4096 + 65536) && !is_within(16384, 4096 + 65536));
        assert!(is_within(4, 5) && is_within(0, 0) && !is_within(1, 0) && !is_within(5, 4) && is_within(48, 48));
    }

    #[test]
    fn settings_beyond_an_offer_are_named() {
        let offer = Offer { format: "x/y".to_owned(), limits: vec![("levels".to_owned(), 4), ("marks".to_owned(), 0)], conditions: Vec::new() };
        let config = TableConfig::new("x/y", &[("levels", 5), ("marks", 1), ("other", 7)]);
        assert_eq!(beyond(&config, None, &offer), ["levels is 5, and the unit has 4", "marks is 1, which the unit does not have"]);
        assert!(beyond(&TableConfig::new("x/y", &[]), None, &offer).is_empty());
    }
}
