//! The kernel's side of I/O address spaces, behind a trait.
//!
//! [`Kernel`] is the part of the iommufd uAPI that this library needs, in typed form: one method per ioctl, the same objects, the same errors.
//! [`sim`] is a kernel and IOMMU hardware inside this process. [`handle`] makes owned handles out of ids. [`Before`] stands in front of another kernel.
//!
//! ```text
//!    BIND_IOMMUFD        IOAS_ALLOC             FAULT_QUEUE_ALLOC
//!         |                   |                        |
//!      device               IOAS                  fault queue
//!         |   \               |                     /
//!         |    \--------- HWPT, paging ------------/      (parent: NEST_PARENT)
//!         |               /          \            /
//!         |           vIOMMU ----- HWPT, nested -/
//!         |          /     \              |
//!       vDEVICE ----    event queue   attached to device, or to (device, PASID)
//! ```
//!
//! Birth is downwards in this picture: device, IOAS, fault queue; paging HWPT; vIOMMU; vDEVICE, event queue, nested HWPT; then the attachment. Death
//! is upwards: detach; nested HWPT, event queue, vDEVICE; vIOMMU; paging HWPT; fault queue, IOAS; unbind. Whatever is out of order is refused with
//! EBUSY and changes nothing. Handles of [`handle`] keep that order by themselves: a child holds its parents alive.

mod before;
mod errno;
pub mod handle;
pub mod sim;
mod types;

pub use before::Before;
pub use errno::{Errno, Result};
pub use types::*;

use std::fmt;

use crate::{Iova, Span};

/// A kernel: one open `/dev/iommu` with the devices that are bound to it, or something that behaves like it.
///
/// # Who calls
///
/// The owner of the I/O address spaces, from any thread, in any order that the picture in the [module](self) allows. Calls on different objects run
/// in parallel; a call that would race with the destruction of an object that it uses gets ENOENT or EBUSY. No method calls back.
///
/// # What a caller can rely on
///
/// * An error changes nothing, with the exceptions that the methods name (`ioas_unmap` and `hwpt_invalidate` can stop half-way, and say where).
/// * Destroying, detaching and unbinding fail for misuse only (ENOENT, EBUSY, EINVAL), never for lack of memory.
/// * After `ioas_unmap`, `hwpt_invalidate`, `attach` (as replacement) or `detach` have returned, no DMA uses what was there before.
/// * Replacing an attachment is hitless: each transaction sees the old one or the new one.
/// * Memory is pinned from when an area is first behind a page table until it is behind none; COPY shares the pins of its source.
///
/// # What a caller must do
///
/// * Keep user memory mapped while it is mapped in an IOAS, and mapped at the same address.
/// * Query [`ioas_iova_ranges`](Kernel::ioas_iova_ranges) again after each attachment: ranges narrow, and widen with a detachment.
/// * Invalidate after changes in tables that it owns, before it re-uses what they mapped.
///
/// # Errors
///
/// Those of iommufd. For all calls: ENOENT for an id that does not exist or is of another kind, EOPNOTSUPP for flags and types that are not known,
/// ENOMEM. The methods name the others.
pub trait Kernel: Send + Sync + fmt::Debug {
    /// Binds the device with this label: a VFIO device's cdev (VFIO_DEVICE_BIND_IOMMUFD). Until it is attached, its DMA is blocked.
    ///
    /// # Errors
    /// ENODEV: no such device. EBUSY: bound already.
    fn bind_device(&self, label: &str) -> Result<DeviceId>;

    /// Closes the device. Its vDEVICE goes with it.
    ///
    /// # Errors
    /// EBUSY: it is attached.
    fn unbind_device(&self, device: DeviceId) -> Result<()>;

    /// What the unit in front of the device can do (IOMMU_GET_HW_INFO).
    #[allow(clippy::missing_errors_doc)]
    fn hw_info(&self, device: DeviceId) -> Result<HwInfo>;

    /// The same of every unit on the device's path, the nearest first. The kernel knows of one.
    #[allow(clippy::missing_errors_doc)]
    fn path(&self, device: DeviceId) -> Result<Vec<HwInfo>> {
        Ok(vec![self.hw_info(device)?])
    }

    /// Makes an empty IOAS (IOMMU_IOAS_ALLOC).
    #[allow(clippy::missing_errors_doc)]
    fn ioas_alloc(&self) -> Result<IoasId>;

    /// Where areas may be (IOMMU_IOAS_IOVA_RANGES).
    #[allow(clippy::missing_errors_doc)]
    fn ioas_iova_ranges(&self, ioas: IoasId) -> Result<IovaRanges>;

    /// Promises that IOVAs will be chosen from these ranges only; in return an attachment that would forbid any of them is refused
    /// (IOMMU_IOAS_ALLOW_IOVAS). An empty list takes the promise back.
    ///
    /// # Errors
    /// EINVAL: ranges overlap, or have one byte only. EADDRINUSE: a range is reserved already.
    fn ioas_allow_iovas(&self, ioas: IoasId, ranges: &[Span]) -> Result<()>;

    /// Makes an area of user memory (IOMMU_IOAS_MAP), in every page table of the IOAS or in none.
    ///
    /// # Errors
    /// EINVAL: neither readable nor writeable, length zero or not aligned, IOVA not aligned or reserved. EEXIST: there is an area already, even in
    /// part. ENOSPC: no IOVA is free. EFAULT: no such user memory, or writeable where it is not; with no page table to fill nobody looks, and the
    /// first one that is made or attached gets the error. EPERM: a copy is writeable, but its source is not. EOVERFLOW. ENOMEM: also the limit of
    /// locked memory.
    fn ioas_map(&self, ioas: IoasId, map: &Map) -> Result<Iova>;

    /// Makes an area of a file's pages (IOMMU_IOAS_MAP_FILE).
    ///
    /// # Errors
    /// As [`Kernel::ioas_map`]. EBADF: not a file. EINVAL: not a file of memory.
    fn ioas_map_file(&self, ioas: IoasId, map: &MapFile<'_>) -> Result<Iova>;

    /// Makes areas of what another IOAS maps (IOMMU_IOAS_COPY), in every page table or in none. The source need not start or end where its areas do.
    ///
    /// The memory stays pinned and counted once. The copies are areas of their own, one per source area, and live on when the source is unmapped.
    ///
    /// # Errors
    /// As [`Kernel::ioas_map`]. ENOENT: the source is not mapped throughout.
    fn ioas_copy(&self, copy: &CopyRange) -> Result<Iova>;

    /// Removes the areas within `length` bytes from `iova`, and says how many bytes that were (IOMMU_IOAS_UNMAP). `0` and `u64::MAX` stand for all
    /// there are, and succeed even if there are none.
    ///
    /// # Errors
    /// ENOENT: nothing is mapped there, or an area is cut; the areas in front of the one that is cut are then gone. EINVAL: length zero. EOVERFLOW.
    fn ioas_unmap(&self, ioas: IoasId, iova: Iova, length: u64) -> Result<u64>;

    /// Sets an option (IOMMU_OPTION).
    ///
    /// # Errors
    /// EPERM: not privileged. EBUSY: too late. EINVAL: no such value. EADDRINUSE: an area is not aligned for it.
    fn set_option(&self, option: KernelOption, value: u64) -> Result<()>;

    /// Reads an option.
    #[allow(clippy::missing_errors_doc)]
    fn option(&self, option: KernelOption) -> Result<u64>;

    /// Makes a hardware page table (IOMMU_HWPT_ALLOC).
    ///
    /// # Errors
    /// EOPNOTSUPP: the unit lacks what the flags or data ask for. EINVAL: data without a type or the reverse, a parent that is not there,
    /// cannot be one or belongs to another unit. EIO:
    /// the nested data are not valid. EADDRINUSE: areas lie where the unit cannot translate.
    fn hwpt_alloc(&self, request: &HwptAlloc) -> Result<HwptId>;

    /// Drops cached translations of tables that user space owns (IOMMU_HWPT_INVALIDATE), and says how many entries were handled: all.
    ///
    /// # Errors
    /// EINVAL: wrong type for the target, entries of a wrong length. EOPNOTSUPP: the target has nothing to invalidate, or unknown flags. EIO: a
    /// command is not valid. Entries before the bad one were handled.
    fn hwpt_invalidate(&self, request: &Invalidate<'_>) -> Result<u32, InvalidateError>;

    /// Starts or stops recording which pages devices write (IOMMU_HWPT_SET_DIRTY_TRACKING). Starting begins with an empty record.
    ///
    /// # Errors
    /// EOPNOTSUPP: not made with [`HwptFlags::DIRTY_TRACKING`].
    fn set_dirty_tracking(&self, hwpt: HwptId, enabled: bool) -> Result<()>;

    /// Which pages were written since the last time, one bit each, lowest bit first (IOMMU_HWPT_GET_DIRTY_BITMAP).
    ///
    /// # Errors
    /// EINVAL: not aligned, not mapped throughout, or not recording. EOPNOTSUPP as in [`Kernel::set_dirty_tracking`].
    fn dirty_bitmap(&self, hwpt: HwptId, range: &DirtyRange) -> Result<Vec<u64>>;

    /// Makes a vIOMMU (IOMMU_VIOMMU_ALLOC).
    ///
    /// # Errors
    /// EINVAL: the parent cannot be one, or belongs to another unit. EOPNOTSUPP: the unit has no vIOMMU of this type.
    fn viommu_alloc(&self, request: &ViommuAlloc) -> Result<ViommuId>;

    /// Tells a vIOMMU the number that the guest knows a device by: StreamID, requester id, device_id (IOMMU_VDEVICE_ALLOC).
    ///
    /// # Errors
    /// EINVAL: another unit's device. EEXIST: the number is taken, or the device has one.
    fn vdevice_alloc(&self, viommu: ViommuId, device: DeviceId, virtual_id: u64) -> Result<VdeviceId>;

    /// Makes a queue of recoverable faults (IOMMU_FAULT_QUEUE_ALLOC).
    #[allow(clippy::missing_errors_doc)]
    fn fault_queue_alloc(&self) -> Result<FaultQueueId>;

    /// Takes the faults that are there; never waits.
    #[allow(clippy::missing_errors_doc)]
    fn read_faults(&self, queue: FaultQueueId) -> Result<Vec<PageFault>>;

    /// Answers a fault.
    ///
    /// # Errors
    /// EINVAL: no fault with this cookie waits for an answer.
    fn respond(&self, queue: FaultQueueId, response: PageResponse) -> Result<()>;

    /// Makes a queue of a vIOMMU's events (IOMMU_VEVENTQ_ALLOC).
    ///
    /// # Errors
    /// EINVAL: depth 0. EEXIST: there is one. EOPNOTSUPP: not the vIOMMU's type.
    fn event_queue_alloc(&self, request: &EventQueueAlloc) -> Result<EventQueueId>;

    /// Takes the events that are there; never waits. Events beyond the depth are lost: the sequence shows it.
    #[allow(clippy::missing_errors_doc)]
    fn read_events(&self, queue: EventQueueId) -> Result<Vec<Event>>;

    /// Attaches a device, or a PASID of it, or replaces what it is attached to, hitless (VFIO_DEVICE_ATTACH_IOMMUFD_PT). Returns the hardware page
    /// table: for an IOAS the one that the kernel found or made, which goes away with its last attachment.
    ///
    /// # Errors
    /// EINVAL: the page table belongs to another unit, or is not made for PASIDs, or the unit cannot do what its data ask for. EADDRINUSE: areas lie
    /// where the device must not translate. ENOENT: a nested page table of a vIOMMU whose vDEVICE is missing.
    fn attach(&self, device: DeviceId, pasid: Option<Pasid>, to: PageTableId) -> Result<HwptId>;

    /// Detaches (VFIO_DEVICE_DETACH_IOMMUFD_PT): DMA is blocked. Faults that wait are answered as invalid. What is not attached stays so, without an
    /// error.
    #[allow(clippy::missing_errors_doc)]
    fn detach(&self, device: DeviceId, pasid: Option<Pasid>) -> Result<()>;

    /// Destroys an object (IOMMU_DESTROY).
    ///
    /// # Errors
    /// EBUSY: something uses it. ENOENT: there is no such object.
    fn destroy(&self, id: ObjectId) -> Result<()>;
}
