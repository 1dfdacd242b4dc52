//! Guest memory, lent to a plugin while it follows device structures.

use std::collections::HashMap;
use std::sync::Arc;

use vm_memory::GuestMemory;

use crate::memory::{Budget, Exhausted, Limits, MemoryMap, VmMemory, read_bytes};
use crate::plugin::{DetectMemory, Plugin, TableConfig};
use crate::table::{AddressSpace, Table};
use crate::{Access, Gpa, Iova};

/// Most different tables that one lookup may read through.
const MAX_THROUGH: usize = 4;

pub(super) struct Reader<M> {
    plugin: Plugin,
    memory: M,
    map: Arc<MemoryMap>,
    budget: Budget,
    through: HashMap<TableConfig, AddressSpace>,
    pub(super) missing: Option<Gpa>,
    pub(super) exhausted: Option<Exhausted>,
}

impl<M: GuestMemory> Reader<M> {
    pub(super) fn new(plugin: Plugin, memory: M, map: Arc<MemoryMap>, limits: Limits) -> Self {
        Self { plugin, memory, map, budget: Budget::new(limits), through: HashMap::new(), missing: None, exhausted: None }
    }

    fn read_physical(&mut self, address: u64, length: u32) -> Option<Vec<u8>> {
        if let Err(exhausted) = self.budget.charge_bytes(u64::from(length).max(64)) {
            self.exhausted = Some(exhausted);
            return None;
        }
        let last = address.checked_add(u64::from(length).checked_sub(1)?)?;
        let known = self.map.region(address).is_some() && self.map.region(last).is_some();
        if !known {
            return None;
        }
        let bytes = read_bytes(&self.memory, Gpa(address), length as usize).ok();
        if bytes.is_none() {
            self.missing.get_or_insert(Gpa(address));
        }
        bytes
    }

    /// Where `address` goes through `table`, if it may be read there.
    fn translate(&mut self, table: &TableConfig, address: u64) -> Option<u64> {
        if !self.through.contains_key(table) {
            if self.through.len() >= MAX_THROUGH {
                return None;
            }
            // An instance of its own: the one that asks is busy asking.
            let opened = Table::open(Box::new(self.plugin.open(table).ok()?)).ok()?;
            self.through.insert(table.clone(), AddressSpace::single(opened));
        }
        let space = self.through.get_mut(table)?;
        let memory = VmMemory(&self.memory);
        match space.translate(&memory, &self.map, Iova(address), Access::READ, &self.budget) {
            Ok(Ok(translation)) => Some(translation.address.0),
            Ok(Err(fault)) => {
                if fault.cause == crate::table::Cause::Missing {
                    self.missing = self.missing.or(fault.address.map(Gpa));
                }
                None
            }
            Err(crate::table::WalkError::Exhausted(exhausted)) => {
                self.exhausted = Some(exhausted);
                None
            }
            Err(_) => None,
        }
    }
}

impl<M: GuestMemory + Send> DetectMemory for Reader<M> {
    fn read(&mut self, address: u64, length: u32) -> Option<Vec<u8>> {
        self.read_physical(address, length)
    }

    fn read_through(&mut self, table: &TableConfig, address: u64, length: u32) -> Option<Vec<u8>> {
        let mut bytes = Vec::with_capacity(length as usize);
        let mut at = address;
        let end = address.checked_add(u64::from(length))?;
        while at < end {
            // Page by page: what continues in the table's input need not continue in its output.
            let part = (crate::memory::PAGE - at % crate::memory::PAGE).min(end - at);
            let physical = self.translate(table, at)?;
            bytes.extend(self.read_physical(physical, part as u32)?);
            at += part;
        }
        Some(bytes)
    }
}
