//! What nested tables stand on: an address space of the kernel's with the guest's memory at its guest-physical addresses, and a page table of it for each unit.
//!
//! There are three at most. Under host tables, the memory of these tables is in it as well. Under guests' own tables it is not, because such tables may point
//! anywhere; only the context structures that lead to them are there, and may only be read. Devices that see guest memory as it is see nothing else.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::context::Inner;
use super::device::Connected;
use super::events::{Events, Told};
use super::record::{Mapped, Recorder};
use super::tables::TablePool;
use super::{Error, MemoryRegion, Property, Refusal};
use crate::kernel::handle::{Ioas, Viommu};
use crate::kernel::{CopyRange, Errno, HwptFlags, MapFlags};
use crate::{Iova, Span};

/// Under which tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Under {
    /// The host's.
    Host,
    /// Guests' own.
    Guest,
    /// None.
    Nothing,
}

/// Page tables of one unit, made when they are needed.
#[derive(Debug)]
struct OfUnit {
    unit: usize,
    /// They can record which pages are written.
    records: bool,
    // Dropped before what they stand on.
    viommus: Vec<OfType>,
    /// For nested page tables.
    nest: Option<Arc<Recorder>>,
    /// For devices: without PASIDs, and with.
    direct: [Option<Arc<Recorder>>; 2],
}

/// The vIOMMU of a type.
#[derive(Debug)]
struct OfType {
    viommu_type: u32,
    /// What it tells of refused requests; none if the kernel has no such queue.
    events: Option<Events>,
    viommu: Viommu,
}

impl OfUnit {
    fn nest(&mut self, parent: &Parent, device: &Connected) -> Result<&Arc<Recorder>, Errno> {
        let made = match self.nest.take() {
            Some(known) => known,
            None => parent.make(device, HwptFlags::NEST_PARENT, self.records)?,
        };
        Ok(self.nest.insert(made))
    }
}

/// A parent address space.
#[derive(Debug)]
pub(super) struct Parent {
    units: Mutex<Vec<OfUnit>>,
    pool: Arc<TablePool>,
    numbers: Mutex<Numbers>,
    mapped: Arc<Mapped>,
    told: Arc<Told>,
    ioas: Ioas,
}

/// Numbers of address spaces, from 1 on, the smallest that are free first: some units have few.
#[derive(Debug)]
struct Numbers {
    next: u32,
    free: BTreeSet<u32>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Parent {
    pub(super) fn new(context: &Inner, under: Under) -> Result<Arc<Self>, Error> {
        let ioas = Ioas::alloc(context.kernel()).map_err(Error::kernel("making a parent address space"))?;
        let (memory, mapped) = (context.memory(), Arc::default());
        for region in memory.regions() {
            copy(context, &ioas, region, &mapped)?;
        }
        let flags = match under {
            Under::Host => MapFlags::READABLE | MapFlags::WRITEABLE,
            Under::Guest | Under::Nothing => MapFlags::READABLE,
        };
        let pool = TablePool::new(ioas.clone(), context.supply(), memory.tables(), flags, context.table_budget());
        let numbers = Mutex::new(Numbers { next: 1, free: BTreeSet::new() });
        Ok(Arc::new(Self { units: Mutex::default(), pool, numbers, mapped, told: Arc::clone(context.told()), ioas }))
    }

    /// Memory for tables or context structures.
    pub(super) const fn pool(&self) -> &Arc<TablePool> {
        &self.pool
    }

    /// The page table of a device's unit that nested ones stand on. With `records` it can record which pages are written.
    pub(super) fn nest(&self, device: &Connected, records: bool) -> Result<Arc<Recorder>, Errno> {
        self.of_unit(device, records, |of| of.nest(self, device).cloned())
    }

    fn make(&self, device: &Connected, flags: HwptFlags, records: bool) -> Result<Arc<Recorder>, Errno> {
        let more = if records { HwptFlags::DIRTY_TRACKING } else { HwptFlags::NONE };
        Ok(Recorder::new(self.ioas.hwpt(device.bound(), flags | more, None)?, &self.mapped, records))
    }

    /// A page table of a device's unit for devices that see guest memory as it is.
    pub(super) fn direct(&self, device: &Connected, records: bool) -> Result<Arc<Recorder>, Errno> {
        self.of_unit(device, records, |of| {
            let flags = device.pasid_flag();
            let direct = &mut of.direct[usize::from(flags != HwptFlags::NONE)];
            let made = match direct.take() {
                Some(known) => known,
                None => self.make(device, flags, records)?,
            };
            Ok(direct.insert(made).clone())
        })
    }

    /// The vIOMMU of a type in a device's unit; `format` is one that it has tables of.
    pub(super) fn viommu(&self, device: &Connected, records: bool, viommu_type: u32, format: &str) -> Result<Viommu, Errno> {
        self.of_unit(device, records, |of| {
            if let Some(known) = of.viommus.iter().find(|known| known.viommu_type == viommu_type) {
                return Ok(known.viommu.clone());
            }
            let viommu = of.nest(self, device)?.hwpt().viommu(device.bound(), viommu_type)?;
            let events = Events::new(&viommu, viommu_type, device.unit(), format, &self.told)?;
            of.viommus.push(OfType { viommu_type, events, viommu: viommu.clone() });
            Ok(viommu)
        })
    }

    /// Reads what its vIOMMUs tell, all of them even if one cannot be read; how many records.
    pub(super) fn read_events(&self) -> Result<u64, Errno> {
        let mut units = lock(&self.units);
        let queues = units.iter_mut().flat_map(|of| of.viommus.iter_mut()).filter_map(|of| of.events.as_mut());
        let read: Vec<_> = queues.map(Events::read).collect();
        read.into_iter().sum()
    }

    fn of_unit<T>(&self, device: &Connected, records: bool, act: impl FnOnce(&mut OfUnit) -> Result<T, Errno>) -> Result<T, Errno> {
        let mut units = lock(&self.units);
        if let Some(of) = units.iter_mut().find(|of| of.unit == device.unit() && of.records == records) {
            return act(of);
        }
        let mut of = OfUnit { unit: device.unit(), records, viommus: Vec::new(), nest: None, direct: [None, None] };
        let result = act(&mut of);
        units.push(of);
        result
    }

    /// A number for an address space that no other one has.
    pub(super) fn number(self: &Arc<Self>) -> Result<SpaceNumber, Error> {
        let mut numbers = lock(&self.numbers);
        let number = match numbers.free.pop_first() {
            Some(number) => number,
            None => {
                let next =
                    numbers.next.checked_add(1).ok_or_else(|| Refusal::new(Property::Limit, "there are no more numbers for address spaces"))?;
                std::mem::replace(&mut numbers.next, next)
            }
        };
        Ok(SpaceNumber { parent: Arc::clone(self), number, is_used_up: false })
    }

    /// Memory came, which the kernel knows already.
    pub(super) fn add(&self, context: &Inner, region: &MemoryRegion) -> Result<(), Error> {
        copy(context, &self.ioas, region, &self.mapped)
    }

    /// Memory goes: no host table leads there any more.
    pub(super) fn remove(&self, region: &MemoryRegion) -> Result<(), Error> {
        if region.user_address.is_none() {
            return Ok(());
        }
        let (first, bytes) = range(region.span);
        match self.ioas.kernel().ioas_unmap(self.ioas.id(), first, bytes) {
            Ok(_) | Err(Errno::ENOENT) => {
                self.mapped.remove(region.span);
                lock(&self.units).iter().flat_map(|of| of.nest.iter().chain(of.direct.iter().flatten())).for_each(|one| one.lose(region.span));
                Ok(())
            }
            Err(errno) => Err(Error::kernel("taking memory away from a parent address space")(errno)),
        }
    }
}

fn range(span: Span) -> (Iova, u64) {
    (Iova(span.first), span.length_minus_one().saturating_add(1))
}

fn copy(context: &Inner, ioas: &Ioas, region: &MemoryRegion, mapped: &Mapped) -> Result<(), Error> {
    if region.user_address.is_none() {
        return Ok(());
    }
    let flags = if region.writable { MapFlags::READABLE | MapFlags::WRITEABLE } else { MapFlags::READABLE };
    let (first, length) = range(region.span);
    let request =
        CopyRange { flags, destination: ioas.id(), destination_iova: Some(first), source: context.pins().ioas().id(), source_iova: first, length };
    context.kernel().ioas_copy(&request).map_err(Error::kernel("copying guest memory to a parent address space"))?;
    if region.writable {
        mapped.add(region.span);
    }
    Ok(())
}

/// An address space's number in the unit's caches.
#[derive(Debug)]
pub(super) struct SpaceNumber {
    parent: Arc<Parent>,
    number: u32,
    is_used_up: bool,
}

impl SpaceNumber {
    pub(super) const fn get(&self) -> u32 {
        self.number
    }

    /// Nobody gets it again: something may still be cached under it.
    pub(super) fn use_up(&mut self) {
        self.is_used_up = true;
    }
}

impl Drop for SpaceNumber {
    fn drop(&mut self) {
        if !self.is_used_up {
            lock(&self.parent.numbers).free.insert(self.number);
        }
    }
}
