//! From a unit's registers to what a device's DMA gets: runs a plugin's `detect` over guest memory, within a budget.

mod reader;
mod trace;

pub use trace::{Behind, Denied, Trace};

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use vm_memory::GuestMemory;

use crate::Gpa;
use crate::memory::{Exhausted, Limits, MemoryMap};
use crate::plugin::queue::{Event, EventRecord};
use crate::plugin::{CallError, Instance, Notes, Outcome, Plugin, Requester, SuperviseError, Supervisor, TableConfig};
use crate::table::Format;

use reader::Reader;

/// Opens a format that a lookup needs on its way, or says that it failed.
type Opener = Arc<dyn Fn(&TableConfig, &mut bool) -> Option<Box<dyn Format>> + Send + Sync>;

/// What a lookup found, and what it could not read on the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found<T> {
    /// What was found.
    pub value: T,
    /// The first page that the memory map promises and that could not be read. A unit with real memory reports the fault that is in `value`; for a
    /// snapshot it means that the snapshot is not complete.
    pub missing: Option<Gpa>,
    /// What the plugin noted about the structures on the way; nothing where it was asked for PASIDs.
    pub notes: Notes,
}

/// A lookup failed.
#[derive(Debug, thiserror::Error)]
pub enum LookupError {
    /// The plugin refused the registers, or failed.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The device structures are larger, or more circular, than the limits allow.
    #[error(transparent)]
    Exhausted(#[from] Exhausted),
    /// The plugin failed before, or failed for a table on the way, and is not asked at the moment.
    #[error(transparent)]
    Supervised(SuperviseError),
    /// A format that was needed on the way failed: what was found has no meaning.
    #[error("a table on the way to device structures could not be read because its format failed")]
    Format,
}

impl LookupError {
    /// The plugin is at fault or out of use: another try later may have an answer.
    #[must_use]
    pub fn is_failure(&self) -> bool {
        match self {
            Self::Supervised(error) => error.is_failure(),
            Self::Call(error) => SuperviseError::from(error.clone()).is_failure(),
            Self::Format => true,
            Self::Exhausted(_) => false,
        }
    }
}

impl From<SuperviseError> for LookupError {
    fn from(error: SuperviseError) -> Self {
        match error {
            SuperviseError::Call(error) => Self::Call(error),
            other => Self::Supervised(other),
        }
    }
}

/// An IOMMU as a guest programmed it: its registers, and the guest memory that its structures stand in.
#[derive(Clone)]
pub struct Unit<M> {
    plugin: Plugin,
    open: Opener,
    kind: String,
    registers: Vec<(String, u64)>,
    memory: M,
    map: Arc<MemoryMap>,
    limits: Limits,
}

impl<M> fmt::Debug for Unit<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unit").field("plugin", &self.plugin).field("kind", &self.kind).field("registers", &self.registers).finish_non_exhaustive()
    }
}

impl<M: GuestMemory + Clone + Send + 'static> Unit<M> {
    /// A unit of the architecture that `plugin` knows; `kind` is one of the units that its manifest names. `memory` is cloned for each lookup: a handle, as
    /// `vm-memory`'s collections are.
    #[must_use]
    pub fn new(plugin: Plugin, kind: &str, registers: Vec<(String, u64)>, memory: M, map: Arc<MemoryMap>, limits: Limits) -> Self {
        let of = plugin.clone();
        let open: Opener = Arc::new(move |table, failed| {
            let opened = of.open(table);
            *failed |= opened.as_ref().is_err_and(|error| SuperviseError::from(error.clone()).is_failure());
            opened.ok().map(|format| Box::new(format) as Box<dyn Format>)
        });
        Self { plugin, open, kind: kind.to_owned(), registers, memory, map, limits }
    }

    /// The same for a guest that runs: formats that are needed on the way are the supervisor's.
    #[must_use]
    pub fn supervised(supervisor: &Supervisor, kind: &str, registers: Vec<(String, u64)>, memory: M, map: Arc<MemoryMap>, limits: Limits) -> Self {
        let of = supervisor.clone();
        let open: Opener = Arc::new(move |table, failed| {
            let opened = of.open(table);
            *failed |= opened.as_ref().is_err_and(SuperviseError::is_failure);
            opened.ok().map(|format| Box::new(format) as Box<dyn Format>)
        });
        Self { plugin: supervisor.plugin(), open, kind: kind.to_owned(), registers, memory, map, limits }
    }

    /// Which kind of unit.
    #[must_use]
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// Its registers, as they are known.
    #[must_use]
    pub fn registers(&self) -> &[(String, u64)] {
        &self.registers
    }

    /// The guest wrote registers.
    pub fn set_registers(&mut self, registers: Vec<(String, u64)>) {
        self.registers = registers;
    }

    /// The guest's memory is another.
    pub fn set_memory(&mut self, memory: M, map: Arc<MemoryMap>) {
        (self.memory, self.map) = (memory, map);
    }

    /// What requests of `requester` get.
    ///
    /// # Errors
    /// The plugin refuses the registers or fails, or the limits are reached.
    pub fn lookup(&self, requester: Requester) -> Result<Found<Outcome>, LookupError> {
        let mut instance = self.plugin.instantiate()?;
        self.lookup_in(&mut instance, requester).0
    }

    /// The PASIDs for which the device `id` has a valid context, without the one that requests without PASID use.
    ///
    /// # Errors
    /// As [`Unit::lookup`].
    pub fn pasids(&self, id: u64) -> Result<Found<Vec<u32>>, LookupError> {
        let mut instance = self.plugin.instantiate()?;
        self.pasids_in(&mut instance, id).0
    }

    /// The same as [`Unit::lookup`] in an instance that is there already, and what was read; `instance` is of this unit's plugin, of whatever version.
    pub fn lookup_in(&self, instance: &mut Instance, requester: Requester) -> (Result<Found<Outcome>, LookupError>, Trace) {
        let reader = self.reader();
        let outcome = instance.lookup(&self.kind, &self.registers, requester, Arc::clone(&reader));
        let notes = instance.notes().clone();
        let (found, trace) = finish(&reader, outcome);
        (found.map(|found| Found { notes, ..found }), trace)
    }

    /// The same as [`Unit::pasids`] in an instance that is there already, and what was read.
    pub fn pasids_in(&self, instance: &mut Instance, id: u64) -> (Result<Found<Vec<u32>>, LookupError>, Trace) {
        let reader = self.reader();
        let pasids = instance.pasids(&self.kind, &self.registers, id, Arc::clone(&reader));
        finish(&reader, pasids)
    }

    /// The record of a request that failed, from an instance of this unit's plugin.
    ///
    /// # Errors
    /// As [`Instance::encode_event`].
    pub fn encode_event_in(&self, instance: &mut Instance, event: &Event) -> Result<EventRecord, CallError> {
        instance.encode_event(&self.kind, &self.registers, event, self.reader())
    }

    /// Reads again what a lookup read: whether it would find the same, as long as the registers are the same. No plugin is asked, except for a table on the
    /// way.
    #[must_use]
    pub fn is_unchanged(&self, trace: &Trace) -> bool {
        if !trace.is_complete() {
            return false;
        }
        let reader = self.reader();
        let mut reader = reader.lock().unwrap_or_else(PoisonError::into_inner);
        reader.replay(trace);
        reader.exhausted.is_none() && !reader.failed && reader.trace.is_same(trace)
    }

    fn reader(&self) -> Arc<Mutex<Reader<M>>> {
        Arc::new(Mutex::new(Reader::new(Arc::clone(&self.open), self.memory.clone(), Arc::clone(&self.map), self.limits)))
    }
}

fn finish<M, T>(reader: &Mutex<Reader<M>>, result: Result<T, CallError>) -> (Result<Found<T>, LookupError>, Trace) {
    let mut reader = reader.lock().unwrap_or_else(PoisonError::into_inner);
    let trace = std::mem::take(&mut reader.trace);
    let found = match (reader.exhausted, reader.failed) {
        (Some(exhausted), _) => Err(exhausted.into()),
        (None, true) => Err(LookupError::Format),
        (None, false) => result.map(|value| Found { value, missing: reader.missing, notes: Notes::default() }).map_err(LookupError::from),
    };
    (found, trace)
}
