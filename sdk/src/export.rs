//! The bridge between the traits and the component's exports. Used by [`export_format!`](crate::export_format) only.

#[allow(
    missing_docs,
    missing_debug_implementations,
    unsafe_code,
    clippy::all,
    clippy::pedantic,
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    clippy::unwrap_used,
    unreachable_pub
)]
mod bindings {
    wit_bindgen::generate!({
        path: "../wit/0.1.0",
        world: "plugin",
        pub_export_macro: true,
        export_macro_name: "export_bindings",
        default_bindings_module: "stagecraft_sdk::export",
        generate_all,
    });
}

pub use bindings::exports::stagecraft::format::{detect, queue, table};
pub use bindings::stagecraft::format::{guest_memory, log, notes, types};
#[doc(hidden)]
pub use bindings::*;

use crate::queue::Access;
use crate::unit::lookup_and_refuse;
use crate::{
    Attributes, BlockKind, Blocked, BlockedDma, ByteOrder, Command, Direct, Error, Event, EventRecord, Extent, FaultKind, Format, GuestMemory,
    Intercept, InvalidationTarget, Meaning, Need, Note, Outcome, PageRequest, Place, RangeEntry, Recipe, Registers, Requester, Settings, Severity,
    TableConfig, Tag, Translated, Unit, Window,
};

/// [`GuestMemory`] through the component's import.
#[derive(Debug)]
pub struct Imported;

impl GuestMemory for Imported {
    fn read(&mut self, address: u64, length: u32) -> Result<Vec<u8>, Error> {
        guest_memory::read(address, length).ok_or(Error::Unreadable(address))
    }

    fn read_through(&mut self, table: &TableConfig, address: u64, length: u32) -> Result<Vec<u8>, Error> {
        guest_memory::read_through(&config_out(table), address, length).ok_or(Error::Unreadable(address))
    }

    fn note(&mut self, note: Note) {
        let Note { severity, address, word, bits, section, reason } = note;
        let severity = severity_out(severity);
        notes::add(&notes::Note { severity, address, word, bits, section: section.to_owned(), reason: reason.to_owned() });
    }

    fn refuse(&mut self, address: u64, blocked: &Blocked) {
        let Blocked { word, bits, section, reason, .. } = blocked.clone();
        notes::add(&notes::Note { severity: types::Severity::Error, address, word, bits, section, reason });
    }
}

/// Makes a panic say its text through `log` before it traps.
pub fn install_panic_hook() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| std::panic::set_hook(Box::new(|panic| log::write(log::Level::Panic, &panic.to_string()))));
}

fn named_in(list: Vec<types::Named>) -> impl Iterator<Item = (String, u64)> {
    list.into_iter().map(|named| (named.name, named.value))
}

fn settings_out(settings: &Settings) -> Vec<types::Named> {
    settings.iter().map(|(name, value)| types::Named { name: name.to_owned(), value }).collect()
}

fn config_in(config: types::TableConfig) -> TableConfig {
    TableConfig { format: config.format, settings: named_in(config.settings).collect() }
}

fn config_out(config: &TableConfig) -> types::TableConfig {
    types::TableConfig { format: config.format.clone(), settings: settings_out(&config.settings) }
}

fn error_out(error: Error) -> types::Error {
    match error {
        Error::Unsupported(what) => types::Error::Unsupported(what),
        Error::Unreadable(address) => types::Error::Unreadable(address),
        Error::Invalid(crate::Invalid { field, value, section, reason }) => {
            types::Error::Invalid(types::InvalidField { field, value, section, reason })
        }
    }
}

fn meaning_out(meaning: Meaning) -> types::Meaning {
    let (word, inherited) = meaning.pack();
    types::Meaning { word, inherited }
}

fn mark_out(mark: crate::Mark) -> types::Mark {
    types::Mark { mask: mark.mask, value: mark.value }
}

fn registers_in(unit: &str, registers: Vec<types::Named>) -> Registers {
    named_in(registers).collect::<Registers>().of_unit(unit)
}

fn intercept_out(intercept: Intercept) -> detect::Intercept {
    let Intercept { passed, mask, value, server, address, section } = intercept;
    detect::Intercept { passed, mask, value, server, address, section }
}

fn outcome_out(outcome: Outcome) -> detect::Outcome {
    match outcome {
        Outcome::Bypass => detect::Outcome::Bypass,
        Outcome::Direct(Direct { windows, intercepts }) => {
            let window = |Window { first, last, address, attributes }| detect::Window { first, last, address, attributes: attributes.pack() };
            detect::Outcome::Direct(detect::Direct {
                windows: windows.into_iter().map(window).collect(),
                intercepts: intercepts.into_iter().map(intercept_out).collect(),
            })
        }
        Outcome::Blocked(Blocked { kind, event, section, reason, .. }) => {
            let kind = match kind {
                BlockKind::Unused => detect::BlockKind::Unused,
                BlockKind::Refused => detect::BlockKind::Refused,
            };
            detect::Outcome::Blocked(detect::Blocked { kind, event, section, reason })
        }
        Outcome::Tables(Translated { tables, intercepts, tag: Tag { domain, space } }) => detect::Outcome::Tables(detect::Translated {
            tables: tables.iter().map(config_out).collect(),
            intercepts: intercepts.into_iter().map(intercept_out).collect(),
            tag: detect::Tag { domain, space },
        }),
    }
}

/// `detect.lookup` of unit `U`.
///
/// # Errors
/// As [`Unit::lookup`].
pub fn lookup<U: Unit>(unit: &str, registers: Vec<types::Named>, requester: detect::Requester) -> Result<detect::Outcome, types::Error> {
    install_panic_hook();
    let requester = Requester { id: requester.id, pasid: requester.pasid };
    lookup_and_refuse::<U>(&registers_in(unit, registers), requester, &mut Imported).map(outcome_out).map_err(error_out)
}

/// `detect.pasids` of unit `U`.
///
/// # Errors
/// As [`Unit::pasids`].
pub fn pasids<U: Unit>(unit: &str, registers: Vec<types::Named>, id: u64) -> Result<Vec<u32>, types::Error> {
    install_panic_hook();
    U::pasids(&registers_in(unit, registers), id, &mut Imported).map_err(error_out)
}

/// `queue.decode-commands` of unit `U`.
///
/// # Errors
/// As [`Unit::decode_commands`].
pub fn decode_commands<U: Unit>(unit: &str, registers: Vec<types::Named>, commands: &[u8]) -> Result<Vec<u64>, types::Error> {
    install_panic_hook();
    let commands = U::decode_commands(&registers_in(unit, registers), commands).map_err(error_out)?;
    Ok(commands.into_iter().flat_map(Command::pack).collect())
}

/// `queue.encode-event` of unit `U`.
///
/// # Errors
/// As [`Unit::review_event`] and [`Unit::encode_event`].
pub fn encode_event<U: Unit>(unit: &str, registers: Vec<types::Named>, event: queue::Event) -> Result<queue::EventRecord, types::Error> {
    install_panic_hook();
    let event = Event {
        fault: fault_kind_in(event.fault),
        name: event.name,
        format: event.format,
        level: event.level,
        entries: event.entries,
        id: event.id,
        pasid: event.pasid,
        iova: event.iova,
        intermediate: event.intermediate,
        reading_table: event.reading_table,
        unreadable: event.unreadable,
        access: match event.access {
            queue::Access::Read => Access::Read,
            queue::Access::Write => Access::Write,
            queue::Access::Execute => Access::Execute,
        },
        privileged: event.privileged,
        domain: event.domain,
    };
    let registers = registers_in(unit, registers);
    let unwanted = || Error::Unsupported("the guest does not want a record of this".to_owned());
    let reviewed = U::review_event(&registers, event, &mut Imported).and_then(|event| event.ok_or_else(unwanted)).map_err(error_out)?;
    let EventRecord { queue, bytes } = U::encode_event(&registers, &reviewed).map_err(error_out)?;
    Ok(queue::EventRecord { queue, bytes })
}

/// `queue.encode-page-request` of unit `U`.
///
/// # Errors
/// As [`Unit::encode_page_request`].
pub fn encode_page_request<U: Unit>(
    unit: &str,
    registers: Vec<types::Named>,
    request: &queue::PageRequest,
) -> Result<queue::EventRecord, types::Error> {
    install_panic_hook();
    let queue::PageRequest { id, pasid, address, read, write, execute, privileged, group, last } = *request;
    let request = PageRequest { id, pasid, address, read, write, execute, privileged, group, last };
    let EventRecord { queue, bytes } = U::encode_page_request(&registers_in(unit, registers), &request).map_err(error_out)?;
    Ok(queue::EventRecord { queue, bytes })
}

/// `queue.decode-event` of unit `U`.
///
/// # Errors
/// As [`Unit::decode_event`].
pub fn decode_event<U: Unit>(record: &[u8]) -> Result<Option<queue::BlockedDma>, types::Error> {
    install_panic_hook();
    let blocked = U::decode_event(record).map_err(error_out)?;
    Ok(blocked.map(|BlockedDma { id, pasid, iova, access, privileged }| {
        let access = match access {
            Access::Read => queue::Access::Read,
            Access::Write => queue::Access::Write,
            Access::Execute => queue::Access::Execute,
        };
        queue::BlockedDma { id, pasid, iova, access, privileged }
    }))
}

/// `detect.offers` of unit `U`.
///
/// # Errors
/// As [`Unit::offers`].
pub fn offers<U: Unit>(kind: u32, info: &[u8]) -> Result<Vec<detect::Offer>, types::Error> {
    install_panic_hook();
    let offer = |offer: crate::Offer| detect::Offer {
        format: offer.format,
        limits: offer.limits.into_iter().map(|(name, value)| types::Named { name, value }).collect(),
        conditions: offer.conditions,
    };
    Ok(U::offers(kind, info).map_err(error_out)?.into_iter().map(offer).collect())
}

/// `detect.bind-data` of unit `U`.
///
/// # Errors
/// As [`Unit::bind_data`].
pub fn bind_data<U: Unit>(table: types::TableConfig, to: detect::PlaceToBind) -> Result<detect::Binding, types::Error> {
    install_panic_hook();
    let detect::PlaceToBind { kind, info, context_address, space, host_made } = to;
    let to = crate::PlaceToBind { kind, info, context_address, space, host_made };
    let crate::Binding { kind, data, context, viommu, pasids, invalidation } = U::bind_data(&config_in(table), &to).map_err(error_out)?;
    Ok(detect::Binding { kind, data, context, viommu, pasids, invalidation: invalidation.map(recipe_out) })
}

fn recipe_out(recipe: Recipe) -> detect::Recipe {
    let place = |Place { word, lsb, width, number_lsb }| detect::Place { word, lsb, width, number_lsb };
    let range = |RangeEntry { words, extent }| detect::RangeEntry {
        words,
        extent: match extent {
            Extent::Count(count) => detect::Extent::Count(place(count)),
            Extent::Scaled { number, scale } => detect::Extent::Scaled((place(number), place(scale))),
            Extent::Block => detect::Extent::Block,
        },
    };
    let Recipe { data_type, target, page_log2, page, address, range: several, leaf, tables, everything, most } = recipe;
    let target = match target {
        InvalidationTarget::PageTable => detect::InvalidationTarget::PageTable,
        InvalidationTarget::Viommu => detect::InvalidationTarget::Viommu,
    };
    let (address, range) = (place(address), several.map(range));
    detect::Recipe { data_type, target, page_log2, page, address, range, leaf, tables, everything, most }
}

/// An open format, its type forgotten: what the component's resource holds.
pub trait Opened {
    /// See [`Format::geometry`].
    fn geometry(&self) -> table::Geometry;
    /// See [`Format::decode`].
    fn decode(&self, level: u8, inherited: u64, pattern: u64) -> types::Meaning;
    /// See [`Format::decode_entry`].
    fn decode_entry(&self, level: u8, inherited: u64, entry: u64) -> types::Meaning;
    /// See [`Format::explain`].
    fn explain(&self, level: u8, inherited: u64, pattern: u64) -> Vec<types::Finding>;
    /// See [`Format::encode_leaf`].
    fn encode_leaf(&self, level: u8, size_log2: u8, attributes: u64) -> Option<table::Encoded>;
    /// See [`Format::encode_table`].
    fn encode_table(&self, level: u8, next: u8) -> Option<u64>;
}

impl std::fmt::Debug for dyn Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Opened")
    }
}

impl<F: Format> Opened for F {
    fn geometry(&self) -> table::Geometry {
        let geometry = Format::geometry(self);
        let root = |root: crate::Root| types::Root {
            setting: root.setting.to_owned(),
            first: root.first,
            last: root.last,
            ignored: root.ignored,
            address: root.address,
            level: root.level,
            inherited: root.inherited,
        };
        let segment = |s: crate::Segment| types::Segment { entry_lsb: s.entry_lsb, address_lsb: s.address_lsb, width: s.width };
        let shape = |s: crate::Shape| types::Shape { mask: s.mask, value: s.value, address: s.address.into_iter().map(segment).collect() };
        let level = |level: crate::Level| types::Level {
            number: level.number,
            index_lsb: level.index_lsb,
            index_bits: level.index_bits,
            shapes: level.shapes.into_iter().map(shape).collect(),
            leaf_sizes: level.leaf_sizes,
            absent: level.absent,
            accessed: mark_out(level.accessed),
            dirty: mark_out(level.dirty),
            table_accessed: mark_out(level.table_accessed),
        };
        table::Geometry {
            roots: geometry.roots.into_iter().map(root).collect(),
            levels: geometry.levels.into_iter().map(level).collect(),
            entry_bytes: geometry.entry_bytes,
            order: match geometry.order {
                ByteOrder::Little => types::ByteOrder::Little,
                ByteOrder::Big => types::ByteOrder::Big,
            },
            output_bits: geometry.output_bits,
            privileged: geometry.privileged,
            untranslated: geometry.untranslated.into_iter().map(|(first, last)| types::Span { first, last }).collect(),
            no_tables_in: geometry.no_tables_in.iter().fold(0, |types, memory_type| types | 1 << memory_type.number()),
        }
    }

    fn decode(&self, level: u8, inherited: u64, pattern: u64) -> types::Meaning {
        meaning_out(Format::decode(self, level, inherited, pattern))
    }

    fn decode_entry(&self, level: u8, inherited: u64, entry: u64) -> types::Meaning {
        meaning_out(Format::decode_entry(self, level, inherited, entry))
    }

    fn explain(&self, level: u8, inherited: u64, pattern: u64) -> Vec<types::Finding> {
        let finding = |finding: crate::Finding| types::Finding {
            severity: severity_out(finding.severity),
            kind: fault_kind_out(finding.kind),
            bits: finding.bits,
            section: finding.section.to_owned(),
            reason: finding.reason,
        };
        Format::explain(self, level, inherited, pattern).into_iter().map(finding).collect()
    }

    fn encode_leaf(&self, level: u8, size_log2: u8, attributes: u64) -> Option<table::Encoded> {
        let encoded = Format::encode_leaf(self, level, size_log2, Attributes::unpack(attributes))?;
        Some(table::Encoded { pattern: encoded.pattern, attributes: encoded.attributes.pack() })
    }

    fn encode_table(&self, level: u8, next: u8) -> Option<u64> {
        Format::encode_table(self, level, next)
    }
}

fn severity_out(severity: Severity) -> types::Severity {
    match severity {
        Severity::Error => types::Severity::Error,
        Severity::Warning => types::Severity::Warning,
        Severity::Info => types::Severity::Info,
    }
}

fn fault_kind_in(kind: types::FaultKind) -> FaultKind {
    use types::FaultKind as From;
    match kind {
        From::Translation => FaultKind::Translation,
        From::Permission => FaultKind::Permission,
        From::AccessFlag => FaultKind::AccessFlag,
        From::AddressSize => FaultKind::AddressSize,
        From::Reserved => FaultKind::Reserved,
        From::Misaligned => FaultKind::Misaligned,
        From::Unreadable => FaultKind::Unreadable,
        From::Configuration => FaultKind::Configuration,
    }
}

fn fault_kind_out(kind: FaultKind) -> types::FaultKind {
    use FaultKind as From;
    match kind {
        From::Translation => types::FaultKind::Translation,
        From::Permission => types::FaultKind::Permission,
        From::AccessFlag => types::FaultKind::AccessFlag,
        From::AddressSize => types::FaultKind::AddressSize,
        From::Reserved => types::FaultKind::Reserved,
        From::Misaligned => types::FaultKind::Misaligned,
        From::Unreadable => types::FaultKind::Unreadable,
        From::Configuration => types::FaultKind::Configuration,
    }
}

/// Opens format `F` if `config` names it; the name of the format that is not there otherwise.
pub fn open_if<F: Format + 'static>(config: &TableConfig) -> Option<Result<Box<dyn Opened>, types::Error>> {
    (config.format == F::NAME).then(|| match F::open(&config.settings).and_then(|format| check_roots(&format).map(|()| format)) {
        Ok(format) => Ok(Box::new(format) as Box<dyn Opened>),
        Err(error) => Err(error_out(error)),
    })
}

/// Refuses a root that no entry could point to: what a snapshot says is not the plugin's mistake.
fn check_roots<F: Format>(format: &F) -> Result<(), Error> {
    let bits = format.output_bits();
    match format.roots().iter().find(|root| bits < 64 && root.address >> bits != 0) {
        Some(root) => Err(Error::invalid(root.setting, root.address, "", &format!("the root table must lie below 2^{bits} (output-bits)"))),
        None => Ok(()),
    }
}

/// Suggests settings for format `F` if `format` names it.
pub fn suggest_if<F: Format>(format: &str, settings: &Settings, need: &table::Need) -> Option<Result<Vec<types::Named>, types::Error>> {
    (format == F::NAME).then(|| {
        let need =
            Need { last_low: need.last_low, first_high: need.first_high, last_address: need.last_address, alignment_log2: need.alignment_log2 };
        F::suggest(settings, &need).map(|settings| settings_out(&settings)).map_err(error_out)
    })
}

/// The candidates of format `F` if `format` names it.
pub fn candidates_if<F: Format>(format: &str) -> Option<Vec<Vec<types::Named>>> {
    install_panic_hook();
    (format == F::NAME).then(|| F::candidates().iter().map(settings_out).collect())
}

/// See [`export_format!`](crate::export_format).
#[must_use]
pub fn table_config(config: types::TableConfig) -> TableConfig {
    install_panic_hook();
    config_in(config)
}

/// See [`export_format!`](crate::export_format).
#[must_use]
pub fn settings(settings: Vec<types::Named>) -> Settings {
    install_panic_hook();
    named_in(settings).collect()
}

/// See [`export_format!`](crate::export_format).
#[must_use]
pub fn no_such_format(name: &str) -> types::Error {
    types::Error::Unsupported(format!("this plugin has no table format `{name}`"))
}

/// Makes the crate a plugin: exports the unit and the formats, and carries the manifest in a custom section.
///
/// ```ignore
/// stagecraft_sdk::export_format! {
///     manifest: "../manifest.json",
///     unit: MyUnit,
///     formats: [FirstStage, SecondStage],
/// }
/// ```
#[macro_export]
macro_rules! export_format {
    (manifest: $manifest:literal, unit: $unit:ty, formats: [$($format:ty),+ $(,)?] $(,)?) => {
        #[cfg(target_arch = "wasm32")]
        #[allow(unsafe_code, missing_docs, missing_debug_implementations, clippy::undocumented_unsafe_blocks)]
        mod stagecraft_exports {
            use super::*;
            use $crate::export::{self, detect, queue, table, types};

            // A custom section of the module, read by the host before it compiles anything. `#[used]` would keep a second copy in the data.
            #[unsafe(link_section = "stagecraft:manifest")]
            static MANIFEST: [u8; include_bytes!($manifest).len()] = *include_bytes!($manifest);

            struct Plugin;
            struct Resource(Box<dyn export::Opened>);

            impl detect::Guest for Plugin {
                fn lookup(unit: String, registers: Vec<types::Named>, requester: detect::Requester) -> Result<detect::Outcome, types::Error> {
                    export::lookup::<$unit>(&unit, registers, requester)
                }
                fn pasids(unit: String, registers: Vec<types::Named>, id: u64) -> Result<Vec<u32>, types::Error> {
                    export::pasids::<$unit>(&unit, registers, id)
                }
                fn offers(kind: u32, info: Vec<u8>) -> Result<Vec<detect::Offer>, types::Error> {
                    export::offers::<$unit>(kind, &info)
                }
                fn bind_data(table: types::TableConfig, to: detect::PlaceToBind) -> Result<detect::Binding, types::Error> {
                    export::bind_data::<$unit>(table, to)
                }
            }

            impl queue::Guest for Plugin {
                fn decode_commands(unit: String, registers: Vec<types::Named>, commands: Vec<u8>) -> Result<Vec<u64>, types::Error> {
                    export::decode_commands::<$unit>(&unit, registers, &commands)
                }
                fn encode_event(unit: String, registers: Vec<types::Named>, event: queue::Event) -> Result<queue::EventRecord, types::Error> {
                    export::encode_event::<$unit>(&unit, registers, event)
                }
                fn encode_page_request(
                    unit: String,
                    registers: Vec<types::Named>,
                    request: queue::PageRequest,
                ) -> Result<queue::EventRecord, types::Error> {
                    export::encode_page_request::<$unit>(&unit, registers, &request)
                }
                fn decode_event(bytes: Vec<u8>) -> Result<Option<queue::BlockedDma>, types::Error> {
                    export::decode_event::<$unit>(&bytes)
                }
            }

            impl table::Guest for Plugin {
                type Format = Resource;
                fn suggest(format: String, settings: Vec<types::Named>, need: table::Need) -> Result<Vec<types::Named>, types::Error> {
                    let settings = export::settings(settings);
                    $(if let Some(answer) = export::suggest_if::<$format>(&format, &settings, &need) { return answer; })+
                    Err(export::no_such_format(&format))
                }
                fn candidates(format: String) -> Result<Vec<Vec<types::Named>>, types::Error> {
                    $(if let Some(answer) = export::candidates_if::<$format>(&format) { return Ok(answer); })+
                    Err(export::no_such_format(&format))
                }
            }

            impl table::GuestFormat for Resource {
                fn open(config: types::TableConfig) -> Result<table::Format, types::Error> {
                    let config = export::table_config(config);
                    $(if let Some(answer) = export::open_if::<$format>(&config) { return answer.map(|opened| table::Format::new(Resource(opened))); })+
                    Err(export::no_such_format(&config.format))
                }
                fn geometry(&self) -> table::Geometry { self.0.geometry() }
                fn decode(&self, level: u8, inherited: u64, pattern: u64) -> types::Meaning { self.0.decode(level, inherited, pattern) }
                fn decode_entry(&self, level: u8, inherited: u64, entry: u64) -> types::Meaning { self.0.decode_entry(level, inherited, entry) }
                fn explain(&self, level: u8, inherited: u64, pattern: u64) -> Vec<types::Finding> { self.0.explain(level, inherited, pattern) }
                fn encode_leaf(&self, level: u8, size_log2: u8, attributes: u64) -> Option<table::Encoded> { self.0.encode_leaf(level, size_log2, attributes) }
                fn encode_table(&self, level: u8, next: u8) -> Option<u64> { self.0.encode_table(level, next) }
            }

            $crate::export::export_bindings!(Plugin with_types_in $crate::export);
        }
    };
}
