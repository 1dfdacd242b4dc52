//! What goes into kernel calls and comes out of them: the structs of `linux/iommufd.h` in typed form.
//!
//! Sizes, reserved fields and pointers are the backend's business; everything else is here under the kernel's names. Numbers that the kernel may
//! extend (types of data, flags) stay numbers, so that an unknown one can be asked for and refused.

use std::os::fd::BorrowedFd;

use crate::{Iova, Span};

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        $($(#[$doc])*
        ///
        /// Valid until it is destroyed; ids of all kinds of objects come from one number space per kernel fd.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u32);

        impl From<$name> for ObjectId {
            fn from(id: $name) -> Self {
                Self(id.0)
            }
        })*
    };
}

/// The id of any object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId(pub u32);

ids! {
    /// A device that is bound to the fd (`out_devid`).
    DeviceId,
    /// An I/O address space that the kernel manages: areas of user memory at IOVAs.
    IoasId,
    /// A hardware page table: one that the kernel keeps for an IOAS, or one that user space owns (nested).
    HwptId,
    /// What one virtual IOMMU needs of one real one.
    ViommuId,
    /// A device as its vIOMMU numbers it.
    VdeviceId,
    /// A queue of recoverable faults.
    FaultQueueId,
    /// A queue of a vIOMMU's events.
    EventQueueId,
}

/// What a device can be attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PageTableId {
    /// The kernel finds or makes a hardware page table for the device.
    Ioas(IoasId),
    /// This one.
    Hwpt(HwptId),
}

impl From<PageTableId> for ObjectId {
    fn from(id: PageTableId) -> Self {
        match id {
            PageTableId::Ioas(id) => id.into(),
            PageTableId::Hwpt(id) => id.into(),
        }
    }
}

/// A process address space ID, 20 bits; a device's requests without one are `None` wherever this is optional.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pasid(pub u32);

impl Pasid {
    /// PCIe has 20 bits.
    pub const MAX: Self = Self(0xf_ffff);
}

macro_rules! flags {
    ($(#[$doc:meta])* $name:ident { $($(#[$flag_doc:meta])* $flag:ident = $value:expr,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        pub struct $name(pub u32);

        impl $name {
            /// None.
            pub const NONE: Self = Self(0);
            $($(#[$flag_doc])* pub const $flag: Self = Self($value);)*
            /// All that have a name.
            pub const KNOWN: Self = Self(0 $(| $value)*);

            /// Whether all of these are set.
            #[must_use]
            pub const fn contains(self, flags: Self) -> bool {
                self.0 & flags.0 == flags.0
            }

            /// Whether only these are set.
            #[must_use]
            pub const fn within(self, flags: Self) -> bool {
                self.0 & !flags.0 == 0
            }
        }

        impl std::ops::BitOr for $name {
            type Output = Self;

            fn bitor(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }
        }
    };
}

flags! {
    /// `IOMMU_HWPT_ALLOC_*`.
    HwptFlags {
        /// May be the parent of nested page tables.
        NEST_PARENT = 1,
        /// Can record which pages devices wrote.
        DIRTY_TRACKING = 2,
        /// Recoverable faults go to the fault queue in the request.
        FAULT_ID = 4,
        /// May be attached to a device with a PASID.
        PASID = 8,
    }
}

flags! {
    /// `IOMMU_HW_CAP_*`.
    HwCapabilities {
        /// Pages that devices wrote can be recorded.
        DIRTY_TRACKING = 1,
        /// PASIDs may carry execute requests.
        PCI_PASID_EXEC = 2,
        /// PASIDs may carry privileged requests.
        PCI_PASID_PRIV = 4,
        /// The device must not use address translation services.
        PCI_ATS_NOT_SUPPORTED = 8,
    }
}

flags! {
    /// `IOMMU_IOAS_MAP_*` without FIXED_IOVA, which is `iova: Some(..)`.
    MapFlags {
        /// Devices may write.
        WRITEABLE = 2,
        /// Devices may read.
        READABLE = 4,
    }
}

flags! {
    /// `IOMMU_HWPT_GET_DIRTY_BITMAP_*`.
    DirtyFlags {
        /// Leave the record as it is.
        NO_CLEAR = 1,
    }
}

/// Numbers for the type of hardware information, `IOMMU_HW_INFO_TYPE_*`.
pub mod hw_info_type {
    /// Nothing is known.
    pub const NONE: u32 = 0;
    /// `flags: u32, reserved: u32, cap: u64, ecap: u64`.
    pub const INTEL_VTD: u32 = 1;
    /// `flags: u32, reserved: u32, idr: [u32; 6], iidr: u32, aidr: u32`.
    pub const ARM_SMMUV3: u32 = 2;
    /// `efr: u64, efr2: u64`.
    pub const AMD: u32 = 4;
    /// Only the simulated kernel: `capabilities: u64`. The real one says nothing of RISC-V.
    pub const SIM_RISCV: u32 = 0x5347_0001;
}

/// Numbers for the data of nested page tables, `IOMMU_HWPT_DATA_*`.
pub mod hwpt_data {
    /// No data: not nested.
    pub const NONE: u32 = 0;
    /// `flags: u64 (1 SRE, 2 EAFE, 4 WPE), pgtbl_addr: u64, addr_width: u32, reserved: u32`.
    pub const VTD_S1: u32 = 1;
    /// `ste: [u64; 2]`.
    pub const ARM_SMMUV3: u32 = 2;
    /// `dte: [u64; 4]`.
    pub const AMD_GUEST: u32 = 3;
    /// Only the simulated kernel: `tc: u64, ta: u64, fsc: u64`, of a RISC-V device context. The real one has no nesting there.
    pub const SIM_RISCV: u32 = 0x5347_0001;
}

/// Numbers for the entries of an invalidation array, `IOMMU_(HWPT|VIOMMU)_INVALIDATE_DATA_*`.
pub mod invalidate_data {
    /// Aimed at a nested page table: `addr: u64, npages: u64, flags: u32 (1 LEAF), reserved: u32`.
    pub const VTD_S1: u32 = 0;
    /// Aimed at a vIOMMU: raw commands, 128 bits each.
    pub const ARM_SMMUV3: u32 = 1;
    /// Only the simulated kernel, aimed at a vIOMMU: raw AMD commands, 128 bits each.
    pub const SIM_AMD: u32 = 0x5347_0001;
    /// Only the simulated kernel, aimed at a vIOMMU: raw RISC-V commands, 128 bits each.
    pub const SIM_RISCV: u32 = 0x5347_0002;
}

/// Numbers for the type of vIOMMU, `IOMMU_VIOMMU_TYPE_*`. The same numbers are used for event queues, `IOMMU_VEVENTQ_TYPE_*`.
pub mod viommu_type {
    /// SMMUv3. Events are records of its event queue, 256 bits each.
    pub const ARM_SMMUV3: u32 = 1;
    /// Only the simulated kernel: AMD. Events are records of its event log, 128 bits each. (The real kernel takes any number for AMD, and can
    /// invalidate nothing.)
    pub const SIM_AMD: u32 = 0x5347_0001;
    /// Only the simulated kernel: RISC-V. Events are records of its fault queue, 256 bits each.
    pub const SIM_RISCV: u32 = 0x5347_0002;
}

/// What a unit says of itself (IOMMU_GET_HW_INFO).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HwInfo {
    /// One of [`hw_info_type`].
    pub data_type: u32,
    /// The struct of that type, in the machine's byte order.
    pub data: Vec<u8>,
    /// Generic capabilities.
    pub capabilities: HwCapabilities,
    /// Log2 of the number of PASIDs; 0 is none.
    pub max_pasid_log2: u8,
}

/// Where areas may be (IOMMU_IOAS_IOVA_RANGES).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IovaRanges {
    /// Sorted and disjoint.
    pub ranges: Vec<Span>,
    /// IOVAs, lengths and offsets must be multiples of this, in bytes.
    pub alignment: u64,
}

/// Maps user memory (IOMMU_IOAS_MAP).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Map {
    /// What devices may do.
    pub flags: MapFlags,
    /// Where, or anywhere in the allowed ranges.
    pub iova: Option<Iova>,
    /// Address in this process.
    pub user_address: u64,
    /// Bytes.
    pub length: u64,
}

/// Maps a file's pages (IOMMU_IOAS_MAP_FILE).
#[derive(Clone, Copy, Debug)]
pub struct MapFile<'a> {
    /// What devices may do.
    pub flags: MapFlags,
    /// Where, or anywhere in the allowed ranges.
    pub iova: Option<Iova>,
    /// A memfd.
    pub file: BorrowedFd<'a>,
    /// Offset into the file, bytes.
    pub start: u64,
    /// Bytes.
    pub length: u64,
}

/// Maps what another IOAS maps, without pinning it again (IOMMU_IOAS_COPY).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyRange {
    /// What devices may do.
    pub flags: MapFlags,
    /// To.
    pub destination: IoasId,
    /// Where, or anywhere in the allowed ranges.
    pub destination_iova: Option<Iova>,
    /// From; may be the same IOAS.
    pub source: IoasId,
    /// From where: anywhere within areas that follow each other without a gap.
    pub source_iova: Iova,
    /// Bytes.
    pub length: u64,
}

/// IOMMU_OPTION.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelOption {
    /// Locked memory counts against the process (1) and not the user (0). Only while nothing exists, and privileged.
    RlimitMode,
    /// Use large pages in this IOAS (1, as at first), or never (0).
    HugePages(IoasId),
}

/// What a hardware page table is made under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HwptParent {
    /// The kernel keeps it equal to this IOAS.
    Ioas(IoasId),
    /// Nested: user space owns it; its output goes through this one.
    Hwpt(HwptId),
    /// Nested, through the vIOMMU's parent.
    Viommu(ViommuId),
}

/// IOMMU_HWPT_ALLOC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HwptAlloc {
    /// What it must be good for.
    pub flags: HwptFlags,
    /// A device whose unit it is made for.
    pub device: DeviceId,
    /// Kernel-managed or nested.
    pub parent: HwptParent,
    /// One of [`hwpt_data`].
    pub data_type: u32,
    /// The struct of that type.
    pub data: Vec<u8>,
    /// Goes with [`HwptFlags::FAULT_ID`].
    pub fault_queue: Option<FaultQueueId>,
}

/// Whose caches an invalidation array is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvalidateTarget {
    /// A nested page table.
    Hwpt(HwptId),
    /// A vIOMMU.
    Viommu(ViommuId),
}

/// IOMMU_HWPT_INVALIDATE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Invalidate<'a> {
    /// Whose caches.
    pub target: InvalidateTarget,
    /// One of [`invalidate_data`].
    pub data_type: u32,
    /// Bytes of one entry.
    pub entry_length: u32,
    /// Entries, one after the other. None at all asks whether the type is supported.
    pub entries: &'a [u8],
}

/// An invalidation array was not handled to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{errno} after {handled} entries")]
pub struct InvalidateError {
    /// So many entries were.
    pub handled: u32,
    /// What is wrong with the next.
    pub errno: super::Errno,
}

/// IOMMU_VIOMMU_ALLOC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ViommuAlloc {
    /// Must be 0.
    pub flags: u32,
    /// One of [`viommu_type`].
    pub viommu_type: u32,
    /// A device behind the real unit.
    pub device: DeviceId,
    /// A page table made with [`HwptFlags::NEST_PARENT`].
    pub parent: HwptId,
}

/// IOMMU_HWPT_GET_DIRTY_BITMAP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyRange {
    /// Read, and clear unless told not to.
    pub flags: DirtyFlags,
    /// First IOVA; a multiple of the page size.
    pub iova: Iova,
    /// Bytes; a multiple of the page size.
    pub length: u64,
    /// What one bit stands for, bytes: a power of two.
    pub page_size: u64,
}

/// A recoverable fault (`struct iommu_hwpt_pgfault`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFault {
    /// Of the device.
    pub device: DeviceId,
    /// With a PASID, or without.
    pub pasid: Option<Pasid>,
    /// Page request group.
    pub group: u32,
    /// The device wants to read.
    pub read: bool,
    /// The device wants to write.
    pub write: bool,
    /// Where.
    pub address: Iova,
    /// Goes with the answer.
    pub cookie: u32,
}

/// The answer to a recoverable fault (`enum iommufd_page_response_code`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseCode {
    /// Handled: the device tries again.
    Success,
    /// Could not be handled: the device gives up.
    Invalid,
}

/// One answer (`struct iommu_hwpt_page_response`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageResponse {
    /// From the fault.
    pub cookie: u32,
    /// What to do.
    pub code: ResponseCode,
}

/// IOMMU_VEVENTQ_ALLOC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventQueueAlloc {
    /// Must be 0.
    pub flags: u32,
    /// Whose events.
    pub viommu: ViommuId,
    /// One of [`viommu_type`]; must be the vIOMMU's.
    pub queue_type: u32,
    /// How many events it can hold; not 0.
    pub depth: u32,
}

/// What comes out of an event queue (`struct iommufd_vevent_header`, and the record).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Counts up by one with each event; what is missing was lost.
    pub sequence: u32,
    /// The record, raw; none in the header that says that events were lost at the end.
    pub record: Option<Vec<u8>>,
}
