//! Attaching, replacing and detaching: everything is checked and made first, then one swap, then the units are drained, and only then the old page
//! table is let go.

use std::sync::Arc;

use super::Sim;
use super::calls::same_units;
use super::commands;
use super::device::Binding;
use super::lock::write;
use super::nested;
use super::objects::{Object, Objects};
use super::unit::UnitKind;
use crate::Span;
use crate::kernel::{DeviceId, Errno, HwptFlags, PageTableId, Pasid, Result};

impl Sim {
    /// The hardware page table.
    pub(super) fn attach_device(&self, objects: &mut Objects, device: u32, pasid: Option<Pasid>, to: PageTableId) -> Result<u32> {
        check_pasid(objects, device, pasid)?;
        let (hwpt, made) = match to {
            PageTableId::Hwpt(hwpt) => (hwpt.0, false),
            PageTableId::Ioas(ioas) => self.automatic(objects, device, ioas.0, pasid)?,
        };
        let attached = self.attach_hwpt(objects, device, pasid, hwpt);
        if attached.is_err() && made {
            self.destroy_object(objects, hwpt)?;
        }
        attached.map(|()| hwpt)
    }

    /// The page table that an earlier attachment made for this path, or a new one; true if it is new.
    fn automatic(&self, objects: &mut Objects, device: u32, ioas: u32, pasid: Option<Pasid>) -> Result<(u32, bool)> {
        objects.ioas(ioas)?;
        let path = objects.device(device)?.state.path.clone();
        let flags = if pasid.is_some() { HwptFlags::PASID } else { HwptFlags::NONE };
        let found = objects.iter().find(|(_, object)| {
            matches!(object, Object::Paging(paging)
                if paging.automatic && paging.ioas == ioas && paging.flags.contains(flags) && same_units(&paging.domains, &path))
        });
        match found {
            Some((id, _)) => Ok((id, false)),
            None => Ok((self.paging(objects, device, ioas, (flags, true, None))?, true)),
        }
    }

    fn attach_hwpt(&self, objects: &mut Objects, device: u32, pasid: Option<Pasid>, hwpt: u32) -> Result<()> {
        let binding = Arc::new(binding(objects, device, pasid, hwpt)?);
        let ioas = ioas_of(objects, hwpt)?;
        let key = pasid.map(|pasid| pasid.0);
        let old = objects.device(device)?.attached.get(&key).copied();
        let old_ioas = old.and_then(|old| ioas_of(objects, old).ok());
        // Windows belong to the device's own requests; those with a PASID are never interrupts.
        let reserve = pasid.is_none() && old_ioas != Some(ioas);
        if reserve {
            let spans = reserved(objects, device)?;
            objects.ioas_mut(ioas)?.reserve(device, &spans)?;
        }
        if let Err(errno) = self.steps.step() {
            if reserve {
                objects.ioas_mut(ioas)?.unreserve(device);
            }
            return Err(errno);
        }
        objects.add_user(hwpt);
        let bound = objects.device_mut(device)?;
        bound.attached.insert(key, hwpt);
        let state = Arc::clone(&bound.state);
        let replaced = write(&state.bindings).insert(key, binding);
        self.left(objects, device, pasid, (old, replaced))?;
        if let Some(old_ioas) = old_ioas.filter(|_| reserve)
            && let Ok(areas) = objects.ioas_mut(old_ioas)
        {
            areas.unreserve(device);
        }
        Ok(())
    }

    pub(super) fn detach_device(&self, objects: &mut Objects, device: u32, pasid: Option<Pasid>) -> Result<()> {
        let key = pasid.map(|pasid| pasid.0);
        let bound = objects.device_mut(device)?;
        let Some(old) = bound.attached.remove(&key) else { return Ok(()) };
        let state = Arc::clone(&bound.state);
        let ioas = ioas_of(objects, old)?;
        let replaced = write(&state.bindings).remove(&key);
        if pasid.is_none() {
            objects.ioas_mut(ioas)?.unreserve(device);
        }
        self.left(objects, device, pasid, (Some(old), replaced))
    }

    /// After the swap: nothing uses the old attachment any more when this returns.
    fn left(&self, objects: &mut Objects, device: u32, pasid: Option<Pasid>, (old, binding): (Option<u32>, Option<Arc<Binding>>)) -> Result<()> {
        let state = Arc::clone(&objects.device(device)?.state);
        if let Some(queue) = binding.as_ref().and_then(|binding| binding.faults.as_ref()) {
            queue.give_up(DeviceId(device), pasid);
        }
        state.path.iter().for_each(|unit| unit.drain());
        if let Some(unit) = state.path.first() {
            // The device's entry in the unit's own tables changed: the driver flushes what hangs on it, and on VT-d the PASID's translations.
            commands::forget_stream(unit, state.serial);
            if let Some(first) = binding.as_ref().and_then(|binding| binding.first.as_ref())
                && matches!(unit.config.kind, UnitKind::Vtd { .. })
            {
                commands::forget_tag(unit, first.owner, pasid.map_or(0, |pasid| pasid.0));
            }
        }
        let Some(old) = old else { return Ok(()) };
        objects.drop_user(old);
        if objects.paging(old).is_ok_and(|paging| paging.automatic) && !objects.is_used(old) {
            self.destroy_object(objects, old)?;
        }
        Ok(())
    }
}

fn check_pasid(objects: &Objects, device: u32, pasid: Option<Pasid>) -> Result<()> {
    let bound = objects.device(device)?;
    let Some(pasid) = pasid else { return Ok(()) };
    let log2 = bound.state.path.iter().map(|unit| unit.config.pasid_log2).min().unwrap_or(0);
    let in_range = bound.state.config.pasids && log2 != 0 && u64::from(pasid.0) < 1 << log2 && pasid.0 != 0;
    // What the device itself is attached to must be made for company.
    let compatible = bound.attached.get(&None).is_none_or(|hwpt| flags_of(objects, *hwpt).is_ok_and(|flags| flags.contains(HwptFlags::PASID)));
    if in_range && compatible { Ok(()) } else { Err(Errno::EINVAL) }
}

fn flags_of(objects: &Objects, hwpt: u32) -> Result<HwptFlags> {
    objects.paging(hwpt).map(|paging| paging.flags).or_else(|_| objects.nested(hwpt).map(|nested| nested.flags))
}

fn ioas_of(objects: &Objects, hwpt: u32) -> Result<u32> {
    let paging = objects.nested(hwpt).map_or(hwpt, |nested| nested.parent);
    objects.paging(paging).map(|paging| paging.ioas)
}

/// What the device and all units on its path keep for themselves.
fn reserved(objects: &Objects, device: u32) -> Result<Vec<Span>> {
    let state = &objects.device(device)?.state;
    let units = state.path.iter().flat_map(|unit| unit.config.reserved.iter());
    Ok(units.chain(&state.config.reserved).copied().collect())
}

/// Checks that the device can use the page table, and joins all that its DMA will need.
fn binding(objects: &Objects, device: u32, pasid: Option<Pasid>, hwpt: u32) -> Result<Binding> {
    let bound = objects.device(device)?;
    let object = objects.get(hwpt)?;
    let (paging, nested) = match object {
        Object::Paging(paging) => (paging, None),
        Object::Nested(nested) => (objects.paging(nested.parent)?, Some(nested)),
        _ => return Err(Errno::EINVAL),
    };
    let flags = nested.map_or(paging.flags, |nested| nested.flags);
    let pasids = bound.attached.keys().any(Option::is_some);
    if !same_units(&paging.domains, &bound.state.path) || (pasid.is_some() || pasids) && !flags.contains(HwptFlags::PASID) {
        return Err(Errno::EINVAL);
    }
    let mut viommu = None;
    if let Some(nested) = nested {
        if let Some(unit) = bound.state.path.first() {
            nested::check_attach(unit, &nested.first.data)?;
        }
        if let Some(id) = nested.viommu {
            let state = &objects.viommu(id)?.state;
            // Without its number in this vIOMMU the device's commands and events would go astray.
            state.virtual_id(bound.state.serial).ok_or(Errno::ENOENT)?;
            viommu = Some(Arc::clone(state));
        }
    }
    let faults = match nested.map_or(paging.faults, |nested| nested.faults) {
        Some(_) if !bound.state.config.page_requests => return Err(Errno::ENODEV),
        Some(queue) => Some(Arc::clone(objects.faults(queue)?)),
        None => None,
    };
    Ok(Binding { device: DeviceId(device), parent: paging.domains.clone(), first: nested.map(|nested| nested.first.clone()), faults, viommu })
}
