//! The kernel calls, one method each: arguments are checked as the ioctls do, and in the same order where it shows.

use std::sync::atomic::Ordering;
use std::sync::{Arc, RwLock};

use super::commands;
use super::device::ViommuState;
use super::domain::Domain;
use super::fault::{EventQueue, FaultQueue};
use super::inject::Call;
use super::lock::{lock, write};
use super::nested;
use super::objects::{Bound, Nested, Object, Objects, Paging, Vdevice, Viommu};
use super::pins::{PAGE, Pages};
use super::unit::{Unit, UnitKind};
use super::walk::context::FirstStage;
use super::{Piece, Sim};
use crate::kernel::{
    CopyRange, DeviceId, DirtyFlags, DirtyRange, Errno, Event, EventQueueAlloc, EventQueueId, FaultQueueId, HwInfo, HwptAlloc, HwptFlags, HwptId,
    HwptParent, Invalidate, InvalidateError, InvalidateTarget, IoasId, IovaRanges, Kernel, KernelOption, Map, MapFile, MapFlags, ObjectId, PageFault,
    PageResponse, PageTableId, Pasid, Result, VdeviceId, ViommuAlloc, ViommuId, hwpt_data, invalidate_data, viommu_type,
};
use crate::{Iova, Span};

fn supported(yes: bool) -> Result<()> {
    if yes { Ok(()) } else { Err(Errno::EOPNOTSUPP) }
}

fn valid(yes: bool) -> Result<()> {
    if yes { Ok(()) } else { Err(Errno::EINVAL) }
}

/// A range of IOVAs as the ioctls take it.
fn range(iova: Iova, length: u64) -> Result<Span> {
    if iova.0 == u64::MAX || length == u64::MAX {
        return Err(Errno::EOVERFLOW);
    }
    valid(length != 0)?;
    let last = iova.0.checked_add(length - 1).ok_or(Errno::EOVERFLOW)?;
    Ok(Span { first: iova.0, last })
}

fn check_map(flags: MapFlags, iova: Option<Iova>, length: u64) -> Result<()> {
    supported(flags.within(MapFlags::KNOWN))?;
    if iova.is_some_and(|iova| iova.0 == u64::MAX) || length == u64::MAX {
        return Err(Errno::EOVERFLOW);
    }
    valid(flags != MapFlags::NONE)
}

impl Sim {
    fn map_pages(&self, ioas: IoasId, iova: Option<Iova>, flags: MapFlags, (user_address, length): (u64, u64)) -> Result<Iova> {
        let mut objects = lock(&self.objects);
        let areas = objects.ioas_mut(ioas.0)?;
        valid(length != 0)?;
        user_address.checked_add(length).and_then(|end| end.checked_add(PAGE)).ok_or(Errno::EOVERFLOW)?;
        let pages = Pages::new(user_address, flags.contains(MapFlags::WRITEABLE));
        let piece = Piece { pages, offset: 0, length };
        areas.map(iova.map(|iova| iova.0), &[piece], flags, self.charge()).map(Iova)
    }
}

impl Kernel for Sim {
    fn bind_device(&self, label: &str) -> Result<DeviceId> {
        self.calls.enter(Call::BindDevice)?;
        let device = self.device(label).ok_or(Errno::ENODEV)?;
        let mut objects = lock(&self.objects);
        if objects.iter().any(|(_, object)| matches!(object, Object::Device(bound) if Arc::ptr_eq(&bound.state, &device.0))) {
            return Err(Errno::EBUSY);
        }
        self.steps.step()?;
        let id = objects.next_id()?;
        objects.insert(id, Object::Device(Bound { state: device.0, attached: std::collections::BTreeMap::new(), vdevice: None }));
        Ok(DeviceId(id))
    }

    fn unbind_device(&self, device: DeviceId) -> Result<()> {
        self.calls.enter(Call::UnbindDevice)?;
        let mut objects = lock(&self.objects);
        let bound = objects.device(device.0)?;
        if !bound.attached.is_empty() {
            return Err(Errno::EBUSY);
        }
        if let Some(vdevice) = bound.vdevice {
            remove_vdevice(&mut objects, vdevice)?;
        }
        objects.remove(device.0).map(drop)
    }

    fn hw_info(&self, device: DeviceId) -> Result<HwInfo> {
        self.calls.enter(Call::HwInfo)?;
        let objects = lock(&self.objects);
        let state = &objects.device(device.0)?.state;
        state.path.first().map(|unit| hw_info(unit, state.config.pasids)).ok_or(Errno::ENODEV)
    }

    fn path(&self, device: DeviceId) -> Result<Vec<HwInfo>> {
        self.calls.enter(Call::HwInfo)?;
        let objects = lock(&self.objects);
        let state = &objects.device(device.0)?.state;
        Ok(state.path.iter().map(|unit| hw_info(unit, state.config.pasids)).collect())
    }

    fn ioas_alloc(&self) -> Result<IoasId> {
        self.calls.enter(Call::IoasAlloc)?;
        self.steps.step()?;
        let mut objects = lock(&self.objects);
        let id = objects.next_id()?;
        objects.insert(id, Object::Ioas(super::areas::Areas::default()));
        Ok(IoasId(id))
    }

    fn ioas_iova_ranges(&self, ioas: IoasId) -> Result<IovaRanges> {
        self.calls.enter(Call::IovaRanges)?;
        Ok(lock(&self.objects).ioas(ioas.0)?.ranges())
    }

    fn ioas_allow_iovas(&self, ioas: IoasId, ranges: &[Span]) -> Result<()> {
        self.calls.enter(Call::AllowIovas)?;
        lock(&self.objects).ioas_mut(ioas.0)?.allow(ranges)
    }

    fn ioas_map(&self, ioas: IoasId, map: &Map) -> Result<Iova> {
        self.calls.enter(Call::Map)?;
        check_map(map.flags, map.iova, map.length)?;
        self.map_pages(ioas, map.iova, map.flags, (map.user_address, map.length))
    }

    fn ioas_map_file(&self, ioas: IoasId, map: &MapFile<'_>) -> Result<Iova> {
        self.calls.enter(Call::MapFile)?;
        check_map(map.flags, map.iova, map.length)?;
        valid(map.length != 0)?;
        let user_address = self.memory.of_file(map.file, map.start, map.length)?;
        self.map_pages(ioas, map.iova, map.flags, (user_address, map.length))
    }

    fn ioas_copy(&self, copy: &CopyRange) -> Result<Iova> {
        self.calls.enter(Call::Copy)?;
        check_map(copy.flags, copy.destination_iova, copy.length)?;
        let mut objects = lock(&self.objects);
        let source = objects.ioas(copy.source.0)?;
        let pieces = source.pieces(range(copy.source_iova, copy.length)?)?;
        let destination = objects.ioas_mut(copy.destination.0)?;
        destination.map(copy.destination_iova.map(|iova| iova.0), &pieces, copy.flags, self.charge()).map(Iova)
    }

    fn ioas_unmap(&self, ioas: IoasId, iova: Iova, length: u64) -> Result<u64> {
        self.calls.enter(Call::Unmap)?;
        let mut objects = lock(&self.objects);
        let areas = objects.ioas_mut(ioas.0)?;
        if iova.0 == 0 && length == u64::MAX {
            let bytes = areas.unmap(Span::ALL, &self.locked);
            return Ok(bytes.unwrap_or(0));
        }
        areas.unmap(range(iova, length)?, &self.locked)
    }

    fn set_option(&self, option: KernelOption, value: u64) -> Result<()> {
        self.calls.enter(Call::Option)?;
        let mut objects = lock(&self.objects);
        match option {
            KernelOption::RlimitMode => {
                if !self.privileged.load(Ordering::Relaxed) {
                    return Err(Errno::EPERM);
                }
                if objects.len() != 0 {
                    return Err(Errno::EBUSY);
                }
                valid(value <= 1)?;
                self.rlimit_per_process.store(value == 1, Ordering::Relaxed);
                Ok(())
            }
            KernelOption::HugePages(ioas) => {
                let areas = objects.ioas_mut(ioas.0)?;
                valid(value <= 1)?;
                areas.set_huge_pages(value == 1)
            }
        }
    }

    fn option(&self, option: KernelOption) -> Result<u64> {
        self.calls.enter(Call::Option)?;
        match option {
            KernelOption::RlimitMode => Ok(self.rlimit_per_process.load(Ordering::Relaxed).into()),
            KernelOption::HugePages(ioas) => Ok(lock(&self.objects).ioas(ioas.0)?.huge_pages().into()),
        }
    }

    fn hwpt_alloc(&self, request: &HwptAlloc) -> Result<HwptId> {
        self.calls.enter(Call::HwptAlloc)?;
        supported(request.flags.within(HwptFlags::KNOWN))?;
        valid((request.data_type == hwpt_data::NONE) == request.data.is_empty())?;
        let mut objects = lock(&self.objects);
        objects.device(request.device.0)?;
        let faults = match (request.flags.contains(HwptFlags::FAULT_ID), request.fault_queue) {
            (false, _) => None,
            (true, queue) => {
                let queue = queue.ok_or(Errno::ENOENT)?;
                objects.faults(queue.0)?;
                Some(queue.0)
            }
        };
        let id = match request.parent {
            HwptParent::Ioas(ioas) => {
                objects.ioas(ioas.0).map_err(|_| Errno::EINVAL)?;
                supported(request.data_type == hwpt_data::NONE)?;
                self.paging(&mut objects, request.device.0, ioas.0, (request.flags, false, faults))?
            }
            HwptParent::Hwpt(parent) => self.nested(&mut objects, request, (parent.0, None), faults)?,
            HwptParent::Viommu(viommu) => {
                let parent = objects.viommu(viommu.0).map_err(|_| Errno::EINVAL)?.parent;
                self.nested(&mut objects, request, (parent, Some(viommu.0)), faults)?
            }
        };
        Ok(HwptId(id))
    }

    fn hwpt_invalidate(&self, request: &Invalidate<'_>) -> Result<u32, InvalidateError> {
        let none = |errno| InvalidateError { handled: 0, errno };
        self.calls.enter(Call::Invalidate).map_err(none)?;
        let objects = lock(&self.objects);
        let target = target(&objects, request).map_err(none)?;
        drop(objects); // commands wait for transactions: not with the lock of all objects
        let length = request.entry_length as usize;
        if !request.entries.is_empty() && (length < target.entry_length() || !request.entries.len().is_multiple_of(length)) {
            return Err(none(Errno::EINVAL));
        }
        let mut handled = 0;
        for entry in request.entries.chunks_exact(length.max(1)) {
            // A longer entry is one of a later version: what is unknown must be zero.
            let known = if entry[target.entry_length()..].iter().all(|byte| *byte == 0) { Ok(()) } else { Err(Errno::E2BIG) };
            known.and_then(|()| target.handle(&entry[..target.entry_length()])).map_err(|errno| InvalidateError { handled, errno })?;
            handled += 1;
        }
        Ok(handled)
    }

    fn set_dirty_tracking(&self, hwpt: HwptId, enabled: bool) -> Result<()> {
        self.calls.enter(Call::SetDirtyTracking)?;
        let objects = lock(&self.objects);
        let paging = objects.paging(hwpt.0)?;
        supported(paging.flags.contains(HwptFlags::DIRTY_TRACKING))?;
        for domain in &paging.domains {
            domain.track_dirty(enabled);
            domain.unit.drain();
        }
        Ok(())
    }

    fn dirty_bitmap(&self, hwpt: HwptId, dirty: &DirtyRange) -> Result<Vec<u64>> {
        self.calls.enter(Call::DirtyBitmap)?;
        supported(dirty.flags.within(DirtyFlags::KNOWN))?;
        let objects = lock(&self.objects);
        let paging = objects.paging(hwpt.0)?;
        supported(paging.flags.contains(HwptFlags::DIRTY_TRACKING))?;
        let page = dirty.page_size;
        valid(page.is_power_of_two() && page >= PAGE && (dirty.iova.0 | dirty.length) & (page - 1) == 0)?;
        let span = range(dirty.iova, dirty.length)?;
        // One bit per page: what could not be answered in memory is refused.
        let bits = usize::try_from(dirty.length / page).map_err(|_| Errno::EOVERFLOW)?;
        objects.ioas(paging.ioas)?.pieces(span).map_err(|_| Errno::EINVAL)?;
        let mut bitmap = vec![0u64; bits.div_ceil(64)];
        for domain in &paging.domains {
            let recording = domain.dirty_pages(span, !dirty.flags.contains(DirtyFlags::NO_CLEAR), |address| {
                let bit = usize::try_from((address - span.first) / page).unwrap_or(0);
                bitmap[bit / 64] |= 1 << (bit % 64);
            });
            valid(recording)?;
            // Writes that were recorded before have arrived when this returns.
            domain.unit.drain();
        }
        Ok(bitmap)
    }

    fn viommu_alloc(&self, request: &ViommuAlloc) -> Result<ViommuId> {
        self.calls.enter(Call::ViommuAlloc)?;
        supported(request.flags == 0 && request.viommu_type != 0)?;
        let mut objects = lock(&self.objects);
        let path = objects.device(request.device.0)?.state.path.clone();
        let unit = path.first().ok_or(Errno::ENODEV)?;
        let own = match unit.config.kind {
            UnitKind::Smmuv3 { .. } => request.viommu_type == viommu_type::ARM_SMMUV3,
            // Any number, as the real driver: nothing looks at it.
            UnitKind::Amd { .. } => true,
            UnitKind::Riscv { .. } => request.viommu_type == viommu_type::SIM_RISCV,
            UnitKind::Vtd { .. } => false,
        };
        supported(own && unit.config.nesting)?;
        let parent = objects.paging(request.parent.0)?;
        valid(parent.flags.contains(HwptFlags::NEST_PARENT) && same_units(&parent.domains, &path))?;
        self.steps.step()?;
        let state = Arc::new(ViommuState {
            serial: objects.serial(),
            viommu_type: request.viommu_type,
            unit: Arc::clone(unit),
            devices: RwLock::default(),
            events: RwLock::default(),
        });
        let id = objects.next_id()?;
        objects.insert(id, Object::Viommu(Viommu { parent: request.parent.0, state, event_queue: None }));
        objects.add_user(request.parent.0);
        Ok(ViommuId(id))
    }

    fn vdevice_alloc(&self, viommu: ViommuId, device: DeviceId, virtual_id: u64) -> Result<VdeviceId> {
        self.calls.enter(Call::VdeviceAlloc)?;
        let mut objects = lock(&self.objects);
        let state = Arc::clone(&objects.viommu(viommu.0)?.state);
        let bound = objects.device(device.0)?;
        valid(bound.state.path.first().is_some_and(|unit| Arc::ptr_eq(unit, &state.unit)))?;
        let serial = bound.state.serial;
        if bound.vdevice.is_some() || super::lock::read(&state.devices).contains_key(&virtual_id) {
            return Err(Errno::EEXIST);
        }
        self.steps.step()?;
        let id = objects.next_id()?;
        write(&state.devices).insert(virtual_id, serial);
        objects.insert(id, Object::Vdevice(Vdevice { viommu: viommu.0, device: device.0, virtual_id }));
        objects.add_user(viommu.0);
        objects.device_mut(device.0)?.vdevice = Some(id);
        Ok(VdeviceId(id))
    }

    fn fault_queue_alloc(&self) -> Result<FaultQueueId> {
        self.calls.enter(Call::FaultQueueAlloc)?;
        self.steps.step()?;
        let mut objects = lock(&self.objects);
        let id = objects.next_id()?;
        objects.insert(id, Object::Faults(Arc::new(FaultQueue::default())));
        Ok(FaultQueueId(id))
    }

    fn read_faults(&self, queue: FaultQueueId) -> Result<Vec<PageFault>> {
        self.calls.enter(Call::ReadFaults)?;
        Ok(lock(&self.objects).faults(queue.0)?.read())
    }

    fn respond(&self, queue: FaultQueueId, response: PageResponse) -> Result<()> {
        self.calls.enter(Call::Respond)?;
        let queue = Arc::clone(lock(&self.objects).faults(queue.0)?);
        queue.respond(response)
    }

    fn event_queue_alloc(&self, request: &EventQueueAlloc) -> Result<EventQueueId> {
        self.calls.enter(Call::EventQueueAlloc)?;
        supported(request.flags == 0 && request.queue_type != 0)?;
        valid(request.depth != 0)?;
        let mut objects = lock(&self.objects);
        let viommu = objects.viommu(request.viommu.0)?;
        let state = Arc::clone(&viommu.state);
        if viommu.event_queue.is_some() {
            return Err(Errno::EEXIST);
        }
        supported(request.queue_type == state.viommu_type)?;
        self.steps.step()?;
        let queue = Arc::new(EventQueue::new(usize::try_from(request.depth).unwrap_or(usize::MAX)));
        *write(&state.events) = Some(Arc::clone(&queue));
        let id = objects.next_id()?;
        objects.insert(id, Object::Events(request.viommu.0, queue));
        objects.add_user(request.viommu.0);
        objects.viommu_mut(request.viommu.0)?.event_queue = Some(id);
        Ok(EventQueueId(id))
    }

    fn read_events(&self, queue: EventQueueId) -> Result<Vec<Event>> {
        self.calls.enter(Call::ReadEvents)?;
        Ok(lock(&self.objects).events(queue.0)?.read())
    }

    fn attach(&self, device: DeviceId, pasid: Option<Pasid>, to: PageTableId) -> Result<HwptId> {
        self.calls.enter(Call::Attach)?;
        self.attach_device(&mut lock(&self.objects), device.0, pasid, to).map(HwptId)
    }

    fn detach(&self, device: DeviceId, pasid: Option<Pasid>) -> Result<()> {
        self.calls.enter(Call::Detach)?;
        self.detach_device(&mut lock(&self.objects), device.0, pasid)
    }

    fn destroy(&self, id: ObjectId) -> Result<()> {
        self.calls.enter(Call::Destroy)?;
        let mut objects = lock(&self.objects);
        match objects.get(id.0)? {
            // A device goes by being closed.
            Object::Device(_) => Err(Errno::EBUSY),
            Object::Vdevice(_) => remove_vdevice(&mut objects, id.0),
            _ => self.destroy_object(&mut objects, id.0),
        }
    }
}

fn hw_info(unit: &Unit, pasids: bool) -> HwInfo {
    let info = unit.config.hw_info();
    HwInfo { max_pasid_log2: if pasids { info.max_pasid_log2 } else { 0 }, ..info }
}

/// A page table was made for just this path.
pub(super) fn same_units(domains: &[Arc<Domain>], path: &[Arc<Unit>]) -> bool {
    domains.len() == path.len() && domains.iter().zip(path).all(|(domain, unit)| Arc::ptr_eq(&domain.unit, unit))
}

fn remove_vdevice(objects: &mut Objects, id: u32) -> Result<()> {
    let (viommu, device, virtual_id) = {
        let vdevice = objects.vdevice(id)?;
        (vdevice.viommu, vdevice.device, vdevice.virtual_id)
    };
    objects.remove(id)?;
    let state = Arc::clone(&objects.viommu(viommu)?.state);
    write(&state.devices).remove(&virtual_id);
    objects.device_mut(device)?.vdevice = None;
    objects.drop_user(viommu);
    Ok(())
}

/// What an invalidation array is aimed at.
enum Target {
    Hwpt { unit: Arc<Unit>, owner: u64 },
    Viommu(Arc<ViommuState>),
}

impl Target {
    fn entry_length(&self) -> usize {
        match self {
            Self::Hwpt { .. } => 24,
            Self::Viommu(_) => 16,
        }
    }

    fn handle(&self, entry: &[u8]) -> Result<()> {
        match self {
            Self::Hwpt { unit, owner } => commands::vtd(unit, *owner, entry),
            Self::Viommu(state) => commands::viommu(state, entry),
        }
    }
}

fn target(objects: &Objects, request: &Invalidate<'_>) -> Result<Target> {
    match request.target {
        InvalidateTarget::Hwpt(hwpt) => match objects.get(hwpt.0)? {
            Object::Nested(nested) => {
                let unit = objects.paging(nested.parent)?.domains.first().map(|domain| Arc::clone(&domain.unit)).ok_or(Errno::EINVAL)?;
                // Only VT-d's nested page tables are invalidated by themselves.
                supported(matches!(unit.config.kind, UnitKind::Vtd { .. }))?;
                valid(request.data_type == invalidate_data::VTD_S1)?;
                Ok(Target::Hwpt { unit, owner: nested.first.owner })
            }
            _ => Err(Errno::EINVAL),
        },
        InvalidateTarget::Viommu(viommu) => {
            let state = Arc::clone(&objects.viommu(viommu.0)?.state);
            let wanted = match state.unit.config.kind {
                UnitKind::Smmuv3 { .. } => invalidate_data::ARM_SMMUV3,
                // The real driver can invalidate nothing; the simulated type can.
                UnitKind::Amd { .. } if state.viommu_type == viommu_type::SIM_AMD => invalidate_data::SIM_AMD,
                UnitKind::Riscv { .. } => invalidate_data::SIM_RISCV,
                _ => return Err(Errno::EOPNOTSUPP),
            };
            valid(request.data_type == wanted)?;
            Ok(Target::Viommu(state))
        }
    }
}

impl Sim {
    /// A page table that the kernel keeps equal to an IOAS, filled.
    pub(super) fn paging(
        &self,
        objects: &mut Objects,
        device: u32,
        ioas: u32,
        (flags, automatic, faults): (HwptFlags, bool, Option<u32>),
    ) -> Result<u32> {
        let path = objects.device(device)?.state.path.clone();
        objects.ioas(ioas)?;
        supported(!flags.contains(HwptFlags::NEST_PARENT) || path.first().is_some_and(|unit| unit.config.nesting))?;
        supported(!flags.contains(HwptFlags::DIRTY_TRACKING) || path.iter().all(|unit| unit.config.dirty_tracking))?;
        supported(!flags.contains(HwptFlags::DIRTY_TRACKING | HwptFlags::NEST_PARENT) || path.iter().all(|unit| unit.config.dirty_tracking_nested))?;
        supported(!flags.contains(HwptFlags::PASID) || path.iter().all(|unit| unit.config.pasid_log2 != 0))?;
        self.steps.step()?;
        let domains: Vec<Arc<Domain>> = path.iter().map(Domain::new).collect();
        let id = objects.next_id()?;
        objects.ioas_mut(ioas)?.add_domains(id, domains.clone(), self.charge())?;
        objects.insert(id, Object::Paging(Paging { ioas, domains, flags, automatic, faults }));
        objects.add_user(ioas);
        faults.into_iter().for_each(|queue| objects.add_user(queue));
        Ok(id)
    }

    fn nested(&self, objects: &mut Objects, request: &HwptAlloc, (parent, viommu): (u32, Option<u32>), faults: Option<u32>) -> Result<u32> {
        supported(request.flags.within(HwptFlags::FAULT_ID | HwptFlags::PASID) && !request.data.is_empty())?;
        let path = objects.device(request.device.0)?.state.path.clone();
        let paging = objects.paging(parent).map_err(|_| Errno::EINVAL)?;
        let unit = path.first().ok_or(Errno::ENODEV)?;
        // VT-d nests under the page table, the others under a vIOMMU.
        supported(unit.config.nesting && matches!(unit.config.kind, UnitKind::Vtd { .. }) == viommu.is_none())?;
        valid(!paging.automatic && paging.flags.contains(HwptFlags::NEST_PARENT) && same_units(&paging.domains, &path))?;
        let data = nested::parse(unit, request.data_type, &request.data)?;
        self.steps.step()?;
        let owner = match viommu {
            Some(viommu) => objects.viommu(viommu)?.state.serial,
            None => objects.serial(),
        };
        let id = objects.next_id()?;
        let first = FirstStage { owner, data };
        objects.insert(id, Object::Nested(Nested { parent, viommu, first, flags: request.flags, faults }));
        objects.add_user(parent);
        viommu.into_iter().chain(faults).for_each(|user| objects.add_user(user));
        Ok(id)
    }

    /// Anything but devices and vDEVICEs.
    pub(super) fn destroy_object(&self, objects: &mut Objects, id: u32) -> Result<()> {
        match objects.remove(id)? {
            Object::Ioas(mut areas) => {
                // No page table is left, so nothing is pinned.
                let _ = areas.unmap(Span::ALL, &self.locked);
            }
            Object::Paging(paging) => {
                objects.ioas_mut(paging.ioas)?.remove_domains(id, &self.locked);
                objects.drop_user(paging.ioas);
                paging.faults.into_iter().for_each(|queue| objects.drop_user(queue));
            }
            Object::Nested(nested) => {
                if nested.viommu.is_none()
                    && let Ok(paging) = objects.paging(nested.parent)
                {
                    paging.domains.iter().take(1).for_each(|domain| commands::forget_owner(&domain.unit, nested.first.owner));
                }
                objects.drop_user(nested.parent);
                nested.viommu.into_iter().chain(nested.faults).for_each(|user| objects.drop_user(user));
            }
            Object::Viommu(viommu) => {
                commands::forget_owner(&viommu.state.unit, viommu.state.serial);
                objects.drop_user(viommu.parent);
            }
            Object::Events(viommu, _) => {
                objects.drop_user(viommu);
                let viommu = objects.viommu_mut(viommu)?;
                viommu.event_queue = None;
                *write(&viommu.state.events) = None;
            }
            Object::Faults(_) | Object::Device(_) | Object::Vdevice(_) => {}
        }
        Ok(())
    }
}
