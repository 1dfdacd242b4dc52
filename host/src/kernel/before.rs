//! A kernel in front of another one: counts its calls, or changes them.

use super::{
    CopyRange, DeviceId, DirtyRange, Event, EventQueueAlloc, EventQueueId, FaultQueueId, HwInfo, HwptAlloc, HwptId, Invalidate, InvalidateError,
    IoasId, IovaRanges, Kernel, KernelOption, Map, MapFile, ObjectId, PageFault, PageResponse, PageTableId, Pasid, Result, VdeviceId, ViommuAlloc,
    ViommuId,
};
use crate::{Iova, Span};
use std::fmt;

/// Stands before another kernel. Whoever is it is a [`Kernel`] too, whose calls go to the other one.
pub trait Before: fmt::Debug + Send + Sync {
    /// The other one.
    fn behind(&self) -> &dyn Kernel;

    /// A call is about to be passed on.
    fn passes(&self) {}

    /// [`Kernel::hwpt_invalidate`], after [`Before::passes`].
    ///
    /// # Errors
    /// Those of the other one.
    fn invalidate(&self, request: &Invalidate<'_>) -> Result<u32, InvalidateError> {
        self.behind().hwpt_invalidate(request)
    }
}

macro_rules! passed_on {
    ($($name:ident($($argument:ident: $type:ty),*) -> $result:ty;)*) => {
        impl<T: Before> Kernel for T {
            $(fn $name(&self $(, $argument: $type)*) -> $result {
                self.passes();
                self.behind().$name($($argument),*)
            })*

            fn hwpt_invalidate(&self, request: &Invalidate<'_>) -> Result<u32, InvalidateError> {
                self.passes();
                self.invalidate(request)
            }
        }
    };
}

passed_on! {
    bind_device(label: &str) -> Result<DeviceId>;
    unbind_device(device: DeviceId) -> Result<()>;
    hw_info(device: DeviceId) -> Result<HwInfo>;
    path(device: DeviceId) -> Result<Vec<HwInfo>>;
    ioas_alloc() -> Result<IoasId>;
    ioas_iova_ranges(ioas: IoasId) -> Result<IovaRanges>;
    ioas_allow_iovas(ioas: IoasId, ranges: &[Span]) -> Result<()>;
    ioas_map(ioas: IoasId, map: &Map) -> Result<Iova>;
    ioas_map_file(ioas: IoasId, map: &MapFile<'_>) -> Result<Iova>;
    ioas_copy(copy: &CopyRange) -> Result<Iova>;
    ioas_unmap(ioas: IoasId, iova: Iova, length: u64) -> Result<u64>;
    set_option(option: KernelOption, value: u64) -> Result<()>;
    option(option: KernelOption) -> Result<u64>;
    hwpt_alloc(request: &HwptAlloc) -> Result<HwptId>;
    set_dirty_tracking(hwpt: HwptId, enabled: bool) -> Result<()>;
    dirty_bitmap(hwpt: HwptId, range: &DirtyRange) -> Result<Vec<u64>>;
    viommu_alloc(request: &ViommuAlloc) -> Result<ViommuId>;
    vdevice_alloc(viommu: ViommuId, device: DeviceId, virtual_id: u64) -> Result<VdeviceId>;
    fault_queue_alloc() -> Result<FaultQueueId>;
    read_faults(queue: FaultQueueId) -> Result<Vec<PageFault>>;
    respond(queue: FaultQueueId, response: PageResponse) -> Result<()>;
    event_queue_alloc(request: &EventQueueAlloc) -> Result<EventQueueId>;
    read_events(queue: EventQueueId) -> Result<Vec<Event>>;
    attach(device: DeviceId, pasid: Option<Pasid>, to: PageTableId) -> Result<HwptId>;
    detach(device: DeviceId, pasid: Option<Pasid>) -> Result<()>;
    destroy(id: ObjectId) -> Result<()>;
}
