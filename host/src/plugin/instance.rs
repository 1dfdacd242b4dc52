//! The cold questions: which tables does a device use, what can a real unit do, how is the kernel told.

use std::sync::{Arc, Mutex, PoisonError};

use crate::plugin::bindings::exports::stagecraft::format::{detect, table};
use crate::plugin::bindings::stagecraft::format::types;
use crate::plugin::queue::{BlockedDma, Event, EventRecord, Invalidation, MAX_COMMAND_BYTES, MAX_RECORD_BYTES, PageRequest};
use crate::plugin::recipe::{self, Recipe};
use crate::plugin::store::{Pace, Sandbox};
use crate::plugin::{BlockKind, CallError, Notes, Outcome, Plugin, Settings, TableConfig, error, outcome, queue, words};
use crate::table::Need;

/// Guest memory as a plugin sees it during one call. It is handed over for the call and dropped at its end; [`Arc<Mutex<M>>`] keeps a handle.
///
/// Implementations bound the work: one call may ask 65,536 times, for at most 4,096 bytes at once, and the time spent in here does not count towards the
/// plugin's deadline.
pub trait DetectMemory: Send {
    /// `length` bytes at a guest-physical address; none if any of it lies outside guest memory or the budget is spent. Each byte is read once.
    fn read(&mut self, address: u64, length: u32) -> Option<Vec<u8>>;

    /// The same for an address that `table` translates first. None also if the translation faults or forbids reading.
    fn read_through(&mut self, table: &TableConfig, address: u64, length: u32) -> Option<Vec<u8>>;
}

impl<M: DetectMemory + ?Sized> DetectMemory for Arc<Mutex<M>> {
    fn read(&mut self, address: u64, length: u32) -> Option<Vec<u8>> {
        self.lock().unwrap_or_else(PoisonError::into_inner).read(address, length)
    }

    fn read_through(&mut self, table: &TableConfig, address: u64, length: u32) -> Option<Vec<u8>> {
        self.lock().unwrap_or_else(PoisonError::into_inner).read_through(table, address, length)
    }
}

/// Who asks: a requester id, StreamID or device id, and a PASID if the request has one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Requester {
    /// Requester id, StreamID or device id.
    pub id: u64,
    /// PASID or SubstreamID; 20 bits.
    pub pasid: Option<u32>,
}

/// A table format that a real unit accepts, with the limits of its settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Full name of the format.
    pub format: String,
    /// Setting and largest value; for a set of sizes, their sum.
    pub limits: Vec<(String, u64)>,
    /// What has to be so besides, for people.
    pub conditions: Vec<String>,
}

/// How the kernel is told about a nested table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    /// An `iommu_hwpt_data_type`.
    pub kind: u32,
    /// Its bytes.
    pub data: Vec<u8>,
    /// The structure that must stand at the context address before the table is bound; may be empty.
    pub context: Vec<u8>,
    /// The `iommu_viommu_type` of the vIOMMU that the table is made in; none: it is made directly over its parent.
    pub viommu: Option<u32>,
    /// The kernel attaches such a table to single PASIDs. Otherwise PASIDs are the context structure's business.
    pub pasids: bool,
    /// None: nothing can be invalidated, so that nothing that was mapped can ever be changed.
    pub invalidation: Option<Recipe>,
}

/// What a nested table is bound to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlaceToBind {
    /// What the kernel says of the unit: an `iommu_hw_info` data type, and its bytes.
    pub hardware: (u32, Vec<u8>),
    /// Where [`Binding::context`] would stand; a multiple of 4096.
    pub context_address: u64,
    /// The number by which the unit's caches and invalidations know the address space: 1 and more. No two tables of one vIOMMU have the same.
    pub space: u32,
    /// The host made the table. Otherwise it is a guest's own, and what is cached of it may not be found by `space` alone.
    pub host_made: bool,
}

const MAX_PASIDS: usize = 1024;
const MAX_OFFERS: usize = 64;
const MAX_CANDIDATES: usize = 96;
/// Conditions of an offer that are shown.
const MAX_CONDITIONS: usize = 16;
const MAX_BINDING_BYTES: usize = 4096;
/// Most bytes of hardware information that are handed to a plugin.
const MAX_INFO_BYTES: usize = 4096;

/// An instance of a plugin for the cold questions. When a call fails fatally, every later one answers the same error: make a fresh instance.
#[derive(Debug)]
pub struct Instance {
    plugin: Plugin,
    sandbox: Sandbox,
    notes: Notes,
}

impl std::fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sandbox").field("calls", &self.calls()).field("failed", &self.failed()).finish_non_exhaustive()
    }
}

impl Instance {
    pub(super) fn new(plugin: &Plugin) -> Result<Self, CallError> {
        Ok(Self { plugin: plugin.clone(), sandbox: Sandbox::new(plugin)?, notes: Notes::default() })
    }

    /// The plugin of which this is an instance.
    #[must_use]
    pub fn plugin(&self) -> &Plugin {
        &self.plugin
    }

    /// Why no call works any more.
    #[must_use]
    pub fn failed(&self) -> Option<&CallError> {
        self.sandbox.failed()
    }

    /// Number of calls into the plugin so far.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.sandbox.calls()
    }

    /// What requests of `requester` get from a unit of kind `unit`. What hardware would refuse in guest memory is [`Outcome::Blocked`].
    ///
    /// # Errors
    /// [`CallError::Refused`] if registers are missing or contradict each other, [`CallError::Unknown`] and [`CallError::Twice`] for the kind of unit and for
    /// register names, and everything that can go wrong with a call.
    pub fn lookup(
        &mut self,
        unit: &str,
        registers: &[(String, u64)],
        requester: Requester,
        memory: impl DetectMemory + 'static,
    ) -> Result<Outcome, CallError> {
        let registers = self.registers(unit, registers)?;
        let requester = detect::Requester { id: requester.id, pasid: requester.pasid };
        self.sandbox.store.data_mut().notes = Some(Notes::default());
        let answer = self.with_memory(memory, |sandbox| {
            sandbox.call(Pace::Cold, |exports, store| exports.stagecraft_format_detect().call_lookup(store, unit, &registers, requester))
        });
        self.notes = self.sandbox.store.data_mut().notes.take().unwrap_or_default();
        let answer = answer.and_then(|answer| answer.map_err(|error| self.sandbox.refused(error)));
        let answer = answer.inspect_err(|_| self.notes.settle(false))?;
        let outcome = outcome::outcome(answer, |format| self.plugin.check_format(format).is_ok()).map_err(|what| self.sandbox.nonsense(what));
        self.notes.settle(matches!(&outcome, Ok(Outcome::Blocked(blocked)) if blocked.kind == BlockKind::Refused));
        outcome
    }

    /// What the plugin noted about device structures during the last [`Instance::lookup`].
    #[must_use]
    pub const fn notes(&self) -> &Notes {
        &self.notes
    }

    /// The PASIDs for which `id` has a valid context: ascending, at most 1,024.
    ///
    /// # Errors
    /// As [`Instance::lookup`].
    pub fn pasids(&mut self, unit: &str, registers: &[(String, u64)], id: u64, memory: impl DetectMemory + 'static) -> Result<Vec<u32>, CallError> {
        let registers = self.registers(unit, registers)?;
        let answer = self.with_memory(memory, |sandbox| {
            sandbox.call(Pace::Cold, |exports, store| exports.stagecraft_format_detect().call_pasids(store, unit, &registers, id))
        })?;
        let pasids = answer.map_err(|error| self.sandbox.refused(error))?;
        if pasids.len() > MAX_PASIDS {
            return Err(self.sandbox.nonsense(format!("{} PASIDs; at most {MAX_PASIDS}", pasids.len())));
        }
        if !pasids.is_sorted_by(|a, b| a < b) || pasids.last().is_some_and(|last| last >> 20 != 0) {
            return Err(self.sandbox.nonsense("PASIDs that do not ascend, or of more than 20 bits"));
        }
        Ok(pasids)
    }

    /// What a batch of raw entries of a command queue asks for, in their order; the first illegal command is the last item. `commands` are whole entries, at most
    /// [`MAX_COMMAND_BYTES`].
    ///
    /// # Errors
    /// [`CallError::Refused`] if the plugin does not know the commands, or for a part of an entry; [`CallError::TooLong`] for too many; as
    /// [`Instance::lookup`].
    pub fn decode_commands(&mut self, unit: &str, registers: &[(String, u64)], commands: &[u8]) -> Result<Vec<Invalidation>, CallError> {
        if commands.len() > MAX_COMMAND_BYTES {
            return Err(CallError::TooLong { what: "commands", bytes: commands.len(), limit: MAX_COMMAND_BYTES });
        }
        let registers = self.registers(unit, registers)?;
        let answer = self
            .sandbox
            .call(Pace::Cold, |exports, store| exports.stagecraft_format_queue().call_decode_commands(store, unit, &registers, commands))?;
        let items = answer.map_err(|error| self.sandbox.refused(error))?;
        queue::invalidations(&items, commands.len()).map_err(|what| self.sandbox.nonsense(what))
    }

    /// The architecture's record of a page request, and where it goes.
    ///
    /// # Errors
    /// [`CallError::Refused`] if the unit has no queue for page requests; as [`Instance::lookup`].
    pub fn encode_page_request(&mut self, unit: &str, registers: &[(String, u64)], request: &PageRequest) -> Result<EventRecord, CallError> {
        let registers = self.registers(unit, registers)?;
        let request = queue::page_request_in(request);
        let answer = self
            .sandbox
            .call(Pace::Cold, |exports, store| exports.stagecraft_format_queue().call_encode_page_request(store, unit, &registers, request))?;
        let record = answer.map_err(|error| self.sandbox.refused(error))?;
        queue::record(record).map_err(|what| self.sandbox.nonsense(what))
    }

    /// The architecture's record of a request that failed, and where it goes. The plugin may read what structures in `memory` say of it.
    ///
    /// # Errors
    /// [`CallError::Refused`] with [`Refusal::Unsupported`](super::Refusal::Unsupported) if nothing is told: the architecture has no record of such a thing, or
    /// the guest does not want one; as [`Instance::lookup`].
    pub fn encode_event(
        &mut self,
        unit: &str,
        registers: &[(String, u64)],
        event: &Event,
        memory: impl DetectMemory + 'static,
    ) -> Result<EventRecord, CallError> {
        let registers = self.registers(unit, registers)?;
        let event = queue::event_in(event);
        let answer = self.with_memory(memory, |sandbox| {
            sandbox.call(Pace::Cold, |exports, store| exports.stagecraft_format_queue().call_encode_event(store, unit, &registers, &event))
        })?;
        let record = answer.map_err(|error| self.sandbox.refused(error))?;
        queue::record(record).map_err(|what| self.sandbox.nonsense(what))
    }

    /// The request that a record of the kernel's is about: [`Kernel::read_events`](crate::kernel::Kernel::read_events). Its requester has the device's number in the vIOMMU. None if it is about
    /// no request of a device's own.
    ///
    /// # Errors
    /// [`CallError::Refused`] if the kernel has no vIOMMU of the plugin's architecture, or for a part of a record; [`CallError::TooLong`]; as [`Instance::lookup`].
    pub fn decode_event(&mut self, record: &[u8]) -> Result<Option<BlockedDma>, CallError> {
        if record.len() > MAX_RECORD_BYTES {
            return Err(CallError::TooLong { what: "an event record", bytes: record.len(), limit: MAX_RECORD_BYTES });
        }
        let answer = self.sandbox.call(Pace::Cold, |exports, store| exports.stagecraft_format_queue().call_decode_event(store, record))?;
        let blocked = answer.map_err(|error| self.sandbox.refused(error))?;
        blocked.map(queue::blocked_dma).transpose().map_err(|what| self.sandbox.nonsense(what))
    }

    /// Which table formats a real unit accepts, given the kernel's `iommu_hw_info` data type and bytes.
    ///
    /// # Errors
    /// [`CallError::Refused`] with [`Refusal::Unsupported`](super::Refusal::Unsupported) if the data is another architecture's, and everything that can
    /// go wrong with a call.
    pub fn offers(&mut self, kind: u32, info: &[u8]) -> Result<Vec<Offer>, CallError> {
        let info = &info[..info.len().min(MAX_INFO_BYTES)];
        let answer = self.sandbox.call(Pace::Cold, |exports, store| exports.stagecraft_format_detect().call_offers(store, kind, info))?;
        let offers = answer.map_err(|error| self.sandbox.refused(error))?;
        if offers.len() > MAX_OFFERS {
            return Err(self.sandbox.nonsense(format!("{} offers; at most {MAX_OFFERS}", offers.len())));
        }
        let offer = |offer: detect::Offer| {
            if self.plugin.check_format(&offer.format).is_err() {
                return Err(self.sandbox.nonsense(format!("an offer of `{}`, which its manifest does not name", error::clean(&offer.format))));
            }
            let limits = words::limits(offer.limits).map_err(|what| self.sandbox.nonsense(what))?;
            let conditions = offer.conditions.iter().take(MAX_CONDITIONS).map(|condition| error::clean(condition)).collect();
            Ok(Offer { format: offer.format, limits, conditions })
        };
        offers.into_iter().map(offer).collect()
    }

    /// How the kernel is told about `table` when it is nested, and about what changes in it.
    ///
    /// # Errors
    /// [`CallError::Refused`] if the kernel has no nesting for this format, or the unit not that number; and everything that can go wrong with a call.
    pub fn bind_data(&mut self, table: &TableConfig, to: &PlaceToBind) -> Result<Binding, CallError> {
        self.plugin.check_format(&table.format)?;
        let table = words::table_config_in(table);
        let (kind, info) = &to.hardware;
        let to = detect::PlaceToBind {
            kind: *kind,
            info: info[..info.len().min(MAX_INFO_BYTES)].to_vec(),
            context_address: to.context_address,
            space: to.space,
            host_made: to.host_made,
        };
        let answer = self.sandbox.call(Pace::Cold, |exports, store| exports.stagecraft_format_detect().call_bind_data(store, &table, &to))?;
        let binding = answer.map_err(|error| self.sandbox.refused(error))?;
        let detect::Binding { kind, data, context, viommu, pasids, invalidation } = binding;
        if data.len() > MAX_BINDING_BYTES || context.len() > MAX_BINDING_BYTES {
            return Err(self.sandbox.nonsense(format!("{} and {} bytes for the kernel; at most {MAX_BINDING_BYTES}", data.len(), context.len())));
        }
        let invalidation = invalidation.map(recipe::checked).transpose().map_err(|what| self.sandbox.nonsense(what))?;
        Ok(Binding { kind, data, context, viommu, pasids, invalidation })
    }

    /// `settings` completed so that a table of `format` can say as much of `need` as possible. Roots stay out.
    ///
    /// # Errors
    /// [`CallError::Refused`] for settings that make no sense, [`CallError::Unknown`] for the format, and everything that can go wrong with a call.
    pub fn suggest(&mut self, format: &str, settings: &Settings, need: &Need) -> Result<Settings, CallError> {
        self.plugin.check_format(format)?;
        let settings = words::settings_in(settings);
        let need = table::Need {
            last_low: need.last_low,
            first_high: need.first_high,
            last_address: need.last_address,
            alignment_log2: need.alignment_log2,
        };
        let answer =
            self.sandbox.call(Pace::Cold, |exports, store| exports.stagecraft_format_table().call_suggest(store, format, &settings, need))?;
        let suggested = answer.map_err(|error| self.sandbox.refused(error))?;
        words::settings(suggested).map_err(|what| self.sandbox.nonsense(what))
    }

    /// Configurations that a table of unknown origin may have, usual ones first, without roots; at least one and at most 96.
    ///
    /// # Errors
    /// [`CallError::Unknown`] for the format, and everything that can go wrong with a call.
    pub fn candidates(&mut self, format: &str) -> Result<Vec<Settings>, CallError> {
        self.plugin.check_format(format)?;
        let answer = self.sandbox.call(Pace::Cold, |exports, store| exports.stagecraft_format_table().call_candidates(store, format))?;
        let candidates = answer.map_err(|error| self.sandbox.refused(error))?;
        if candidates.is_empty() || candidates.len() > MAX_CANDIDATES {
            return Err(self.sandbox.nonsense(format!("{} candidates; there are 1 to {MAX_CANDIDATES}", candidates.len())));
        }
        candidates.into_iter().map(|settings| words::settings(settings).map_err(|what| self.sandbox.nonsense(what))).collect()
    }

    /// Registers for the plugin; their names and the kind of unit are checked against the manifest.
    fn registers(&self, unit: &str, registers: &[(String, u64)]) -> Result<Vec<types::Named>, CallError> {
        let manifest = self.plugin.manifest();
        if !manifest.units.iter().any(|known| known == unit) {
            let known = manifest.units.join(", ");
            return Err(CallError::Unknown { plugin: self.sandbox.plugin(), what: "unit", name: unit.to_owned(), known });
        }
        for (index, (name, _)) in registers.iter().enumerate() {
            if !manifest.knows_register(name) {
                let known = manifest.registers.join(", ");
                return Err(CallError::Unknown { plugin: self.sandbox.plugin(), what: "register", name: name.clone(), known });
            }
            if registers[..index].iter().any(|(other, _)| other == name) {
                return Err(CallError::Twice { what: "register", name: name.clone() });
            }
        }
        Ok(registers.iter().map(|(name, value)| types::Named { name: name.clone(), value: *value }).collect())
    }

    /// Lends `memory` to the plugin for one call.
    fn with_memory<R>(&mut self, memory: impl DetectMemory + 'static, call: impl FnOnce(&mut Sandbox) -> R) -> R {
        self.sandbox.store.data_mut().memory = Some(Box::new(memory));
        let result = call(&mut self.sandbox);
        self.sandbox.store.data_mut().memory = None;
        result
    }
}
