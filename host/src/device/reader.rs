//! Guest memory, lent to a plugin while it follows device structures.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use vm_memory::GuestMemory;

use crate::device::Opener;
use crate::device::trace::{Behind, Denied, Read, Trace};
use crate::memory::{Budget, EntryLayout, EntryMemory, Exhausted, Limits, MemoryMap, ReadError, VmMemory, Within, read_bytes};
use crate::plugin::{DetectMemory, TableConfig};
use crate::table::{AddressSpace, Cause, FaultKind, Table, WalkError};
use crate::{Access, Gpa, Iova};

/// Most different tables that one lookup may read through.
const MAX_THROUGH: usize = 4;

pub(super) struct Reader<M> {
    open: Opener,
    memory: M,
    map: Arc<MemoryMap>,
    budget: Budget,
    through: HashMap<TableConfig, AddressSpace>,
    pub(super) missing: Option<Gpa>,
    pub(super) exhausted: Option<Exhausted>,
    /// A format that was needed on the way failed.
    pub(super) failed: bool,
    pub(super) trace: Trace,
}

/// Memory that tells which of its pages are read.
struct Traced<'a, M>(VmMemory<'a, M>, RefCell<&'a mut Trace>);

impl<M: GuestMemory> EntryMemory for Traced<'_, M> {
    fn read_entries(&self, address: Gpa, layout: EntryLayout, entries: &mut [u64]) -> Result<(), ReadError> {
        self.1.borrow_mut().page(address.0);
        self.0.read_entries(address, layout, entries)
    }
}

impl<M: GuestMemory + Send> Reader<M> {
    pub(super) fn new(open: Opener, memory: M, map: Arc<MemoryMap>, limits: Limits) -> Self {
        let budget = Budget::new(limits);
        Self { open, memory, map, budget, through: HashMap::new(), missing: None, exhausted: None, failed: false, trace: Trace::default() }
    }

    /// Reads again what `trace` says.
    pub(super) fn replay(&mut self, trace: &Trace) {
        for Read { through, address, length } in &trace.reads {
            match through.and_then(|index| trace.tables.get(index)) {
                Some(table) => drop(self.read_through(table, *address, *length)),
                None => drop(self.read(*address, *length)),
            }
        }
    }

    fn read_physical(&mut self, address: u64, length: u32) -> Option<Vec<u8>> {
        if let Err(exhausted) = self.budget.charge_bytes(u64::from(length).max(64)) {
            self.exhausted = Some(exhausted);
            return None;
        }
        let last = address.checked_add(u64::from(length).checked_sub(1)?)?;
        self.trace.denied = Some(Denied::Unreadable(address));
        let known = self.map.region(address).is_some() && self.map.region(last).is_some();
        if !known {
            return None;
        }
        self.trace.page(address);
        self.trace.page(last);
        let bytes = read_bytes(&self.memory, Gpa(address), length as usize).ok();
        match bytes {
            None => drop(self.missing.get_or_insert(Gpa(address))),
            Some(_) => self.trace.denied = None,
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
            let opened = (self.open)(table, &mut self.failed)?;
            self.through.insert(table.clone(), AddressSpace::single(Table::open(opened).ok()?));
        }
        let space = self.through.get_mut(table)?;
        let memory = Within(Traced(VmMemory(&self.memory), RefCell::new(&mut self.trace)), &self.map);
        // Where there is no memory the structure cannot be read; the table may say so of it, or not.
        let translated = space.translate(&memory, &MemoryMap::everything(64), Iova(address), Access::READ, &self.budget);
        match translated {
            Ok(Ok(translation)) if !space.tables().all(|table| table.geometry().may_hold_tables(translation.attributes)) => {
                let behind = Behind {
                    format: table.format.clone(),
                    fault: FaultKind::Permission,
                    level: None,
                    address,
                    unreadable: None,
                    entries: Vec::new(),
                };
                self.trace.denied = Some(Denied::Behind(behind));
                None
            }
            Ok(Ok(translation)) => Some(translation.address.0),
            Ok(Err(fault)) => {
                let unreadable = fault.address.filter(|_| matches!(fault.cause, Cause::Missing | Cause::OutsideMemory));
                if let Some(promised) = unreadable.filter(|address| self.map.region(*address).is_some()) {
                    self.missing = self.missing.or(Some(Gpa(promised)));
                }
                let entries = fault.path.iter().filter_map(|step| step.entry).collect();
                let kind = match fault.cause {
                    Cause::Entry(kind) => kind,
                    Cause::OutsideMemory | Cause::Missing => FaultKind::Unreadable,
                    Cause::Intercepted => FaultKind::Translation,
                };
                let behind = Behind { format: table.format.clone(), fault: kind, level: fault.level, address, unreadable, entries };
                self.trace.denied = Some(Denied::Behind(behind));
                None
            }
            Err(WalkError::Exhausted(exhausted)) => {
                self.exhausted = Some(exhausted);
                None
            }
            Err(_) => {
                self.failed = true;
                None
            }
        }
    }

    fn read_translated(&mut self, table: &TableConfig, address: u64, length: u32) -> Option<Vec<u8>> {
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

impl<M: GuestMemory + Send> DetectMemory for Reader<M> {
    fn read(&mut self, address: u64, length: u32) -> Option<Vec<u8>> {
        let bytes = self.read_physical(address, length);
        self.trace.read(None, address, length, bytes.as_deref());
        bytes
    }

    fn read_through(&mut self, table: &TableConfig, address: u64, length: u32) -> Option<Vec<u8>> {
        let bytes = self.read_translated(table, address, length);
        self.trace.read(Some(table), address, length, bytes.as_deref());
        bytes
    }
}
