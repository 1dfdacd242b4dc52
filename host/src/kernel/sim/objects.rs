//! The kernel's objects by id, and how many users each has.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::areas::Areas;
use super::device::{DeviceState, ViommuState};
use super::domain::Domain;
use super::fault::{EventQueue, FaultQueue};
use super::walk::context::FirstStage;
use crate::kernel::{Errno, HwptFlags, Result};

/// A bound device.
#[derive(Debug)]
pub(super) struct Bound {
    pub(super) state: Arc<DeviceState>,
    /// What it and its PASIDs are attached to.
    pub(super) attached: BTreeMap<Option<u32>, u32>,
    pub(super) vdevice: Option<u32>,
}

/// A page table that the kernel keeps.
#[derive(Debug)]
pub(super) struct Paging {
    pub(super) ioas: u32,
    pub(super) domains: Vec<Arc<Domain>>,
    pub(super) flags: HwptFlags,
    /// Made by an attachment to the IOAS, and gone with the last.
    pub(super) automatic: bool,
    pub(super) faults: Option<u32>,
}

/// A page table that user space owns.
#[derive(Debug)]
pub(super) struct Nested {
    pub(super) parent: u32,
    pub(super) viommu: Option<u32>,
    pub(super) first: FirstStage,
    pub(super) flags: HwptFlags,
    pub(super) faults: Option<u32>,
}

/// A vIOMMU.
#[derive(Debug)]
pub(super) struct Viommu {
    pub(super) parent: u32,
    pub(super) state: Arc<ViommuState>,
    pub(super) event_queue: Option<u32>,
}

/// A device in a vIOMMU.
#[derive(Debug)]
pub(super) struct Vdevice {
    pub(super) viommu: u32,
    pub(super) device: u32,
    pub(super) virtual_id: u64,
}

#[derive(Debug)]
pub(super) enum Object {
    Device(Bound),
    Ioas(Areas),
    Paging(Paging),
    Nested(Nested),
    Viommu(Viommu),
    Vdevice(Vdevice),
    Faults(Arc<FaultQueue>),
    Events(u32, Arc<EventQueue>),
}

#[derive(Debug)]
struct Slot {
    object: Object,
    users: u32,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Objects {
    slots: BTreeMap<u32, Slot>,
    last_id: u32,
    last_serial: u64,
}

macro_rules! getters {
    ($($name:ident, $name_mut:ident: $variant:ident($type:ty);)*) => {
        $(
            #[allow(dead_code)]
            pub(super) fn $name(&self, id: u32) -> Result<&$type> {
                match self.slots.get(&id) {
                    Some(Slot { object: Object::$variant(object), .. }) => Ok(object),
                    _ => Err(Errno::ENOENT),
                }
            }

            #[allow(dead_code)]
            pub(super) fn $name_mut(&mut self, id: u32) -> Result<&mut $type> {
                match self.slots.get_mut(&id) {
                    Some(Slot { object: Object::$variant(object), .. }) => Ok(object),
                    _ => Err(Errno::ENOENT),
                }
            }
        )*
    };
}

impl Objects {
    getters! {
        device, device_mut: Device(Bound);
        ioas, ioas_mut: Ioas(Areas);
        paging, paging_mut: Paging(Paging);
        nested, nested_mut: Nested(Nested);
        viommu, viommu_mut: Viommu(Viommu);
        vdevice, vdevice_mut: Vdevice(Vdevice);
        faults, faults_mut: Faults(Arc<FaultQueue>);
    }

    pub(super) fn events(&self, id: u32) -> Result<&Arc<EventQueue>> {
        match self.get(id) {
            Ok(Object::Events(_, queue)) => Ok(queue),
            _ => Err(Errno::ENOENT),
        }
    }

    pub(super) fn get(&self, id: u32) -> Result<&Object> {
        self.slots.get(&id).map(|slot| &slot.object).ok_or(Errno::ENOENT)
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &Object)> {
        self.slots.iter().map(|(id, slot)| (*id, &slot.object))
    }

    /// A number that is never used again, for tags of hardware.
    pub(super) fn serial(&mut self) -> u64 {
        self.last_serial += 1;
        self.last_serial
    }

    /// ENOSPC after four billion objects.
    pub(super) fn next_id(&mut self) -> Result<u32> {
        self.last_id = self.last_id.checked_add(1).ok_or(Errno::ENOSPC)?;
        Ok(self.last_id)
    }

    /// Under an id from [`Objects::next_id`].
    pub(super) fn insert(&mut self, id: u32, object: Object) {
        self.slots.insert(id, Slot { object, users: 0 });
    }

    pub(super) fn add_user(&mut self, id: u32) {
        if let Some(slot) = self.slots.get_mut(&id) {
            slot.users += 1;
        }
    }

    pub(super) fn drop_user(&mut self, id: u32) {
        if let Some(slot) = self.slots.get_mut(&id) {
            slot.users = slot.users.saturating_sub(1);
        }
    }

    pub(super) fn is_used(&self, id: u32) -> bool {
        self.slots.get(&id).is_some_and(|slot| slot.users != 0)
    }

    /// EBUSY while it has users.
    pub(super) fn remove(&mut self, id: u32) -> Result<Object> {
        self.get(id)?;
        if self.is_used(id) {
            return Err(Errno::EBUSY);
        }
        self.slots.remove(&id).map(|slot| slot.object).ok_or(Errno::ENOENT)
    }
}
