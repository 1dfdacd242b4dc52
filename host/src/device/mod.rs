//! From a unit's registers to what a device's DMA gets: runs a plugin's `detect` over guest memory, within a budget.

mod reader;

use std::sync::{Arc, Mutex, PoisonError};

use vm_memory::GuestMemory;

use crate::Gpa;
use crate::memory::{Exhausted, Limits, MemoryMap};
use crate::plugin::{CallError, Notes, Outcome, Plugin, Requester};

use reader::Reader;

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
}

/// An IOMMU as a guest programmed it: its registers, and the guest memory that its structures stand in.
#[derive(Clone, Debug)]
pub struct Unit<M> {
    plugin: Plugin,
    kind: String,
    registers: Vec<(String, u64)>,
    memory: M,
    map: Arc<MemoryMap>,
    limits: Limits,
}

impl<M: GuestMemory + Clone + Send + 'static> Unit<M> {
    /// A unit of the architecture that `plugin` knows; `kind` is one of the units that its manifest names. `memory` is cloned for each lookup: a handle, as
    /// `vm-memory`'s collections are.
    #[must_use]
    pub fn new(plugin: Plugin, kind: &str, registers: Vec<(String, u64)>, memory: M, map: Arc<MemoryMap>, limits: Limits) -> Self {
        Self { plugin, kind: kind.to_owned(), registers, memory, map, limits }
    }

    /// What requests of `requester` get.
    ///
    /// # Errors
    /// The plugin refuses the registers or fails, or the limits are reached.
    pub fn lookup(&self, requester: Requester) -> Result<Found<Outcome>, LookupError> {
        let reader = self.reader();
        let mut instance = self.plugin.instantiate()?;
        let outcome = instance.lookup(&self.kind, &self.registers, requester, Arc::clone(&reader));
        Ok(Found { notes: instance.notes().clone(), ..finish(&reader, outcome)? })
    }

    /// The PASIDs for which the device `id` has a valid context, without the one that requests without PASID use.
    ///
    /// # Errors
    /// As [`Unit::lookup`].
    pub fn pasids(&self, id: u64) -> Result<Found<Vec<u32>>, LookupError> {
        let reader = self.reader();
        let pasids = self.plugin.instantiate()?.pasids(&self.kind, &self.registers, id, Arc::clone(&reader));
        finish(&reader, pasids)
    }

    fn reader(&self) -> Arc<Mutex<Reader<M>>> {
        Arc::new(Mutex::new(Reader::new(self.plugin.clone(), self.memory.clone(), Arc::clone(&self.map), self.limits)))
    }
}

fn finish<M, T>(reader: &Mutex<Reader<M>>, result: Result<T, CallError>) -> Result<Found<T>, LookupError> {
    let reader = reader.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(exhausted) = reader.exhausted {
        return Err(exhausted.into());
    }
    Ok(Found { value: result?, missing: reader.missing, notes: Notes::default() })
}
