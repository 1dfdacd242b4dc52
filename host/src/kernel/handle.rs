//! Kernel objects as owned values: dropping one destroys it, and a child holds its parents alive.
//!
//! Death is always upwards in the picture of [the module above](super): a nested page table drops before its vIOMMU, that before the parent page
//! table, that before the IOAS. An [`Attachment`] detaches before it lets go of the page table and the device. Nothing here is ever destroyed twice,
//! and nothing can be used after it is gone.

use std::sync::Arc;

use crate::memory::PAGE;
use crate::sync::runs;
use crate::{Iova, Span};

use super::{
    DeviceId, DirtyFlags, DirtyRange, EventQueueAlloc, EventQueueId, FaultQueueId, HwptAlloc, HwptFlags, HwptId, HwptParent, IoasId, Kernel,
    ObjectId, PageTableId, Pasid, Result, VdeviceId, ViommuAlloc, ViommuId,
};

/// Bytes whose pages one call tells: a bitmap of 128 KiB.
const READ_AT_ONCE: u64 = 4 << 30;

/// An object, with those that it was made from.
#[derive(Debug)]
struct Node {
    kernel: Arc<dyn Kernel>,
    id: ObjectId,
    device: bool,
    // Dropped after `Drop::drop` of this node: parents die later than children.
    _parents: Vec<Arc<Node>>,
}

impl Node {
    fn new(kernel: &Arc<dyn Kernel>, id: impl Into<ObjectId>, parents: &[&Arc<Node>]) -> Arc<Self> {
        let parents = parents.iter().map(|parent| Arc::clone(parent)).collect();
        Arc::new(Self { kernel: Arc::clone(kernel), id: id.into(), device: false, _parents: parents })
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // By the contract this fails only for misuse, which ownership rules out; there is nobody to tell.
        let _ = if self.device { self.kernel.unbind_device(DeviceId(self.id.0)) } else { self.kernel.destroy(self.id) };
    }
}

macro_rules! handles {
    ($($(#[$doc:meta])* $name:ident($id:ident);)*) => {
        $($(#[$doc])*
        ///
        /// Clones share one object; it goes with the last of them and of its children.
        #[derive(Clone, Debug)]
        pub struct $name(Arc<Node>);

        impl $name {
            /// For calls of [`Kernel`].
            #[must_use]
            pub fn id(&self) -> $id {
                $id(self.0.id.0)
            }

            /// The kernel that it lives in.
            #[must_use]
            pub fn kernel(&self) -> &Arc<dyn Kernel> {
                &self.0.kernel
            }
        })*
    };
}

handles! {
    /// A bound device.
    Device(DeviceId);
    /// An I/O address space.
    Ioas(IoasId);
    /// A hardware page table.
    Hwpt(HwptId);
    /// A vIOMMU.
    Viommu(ViommuId);
    /// A device's number in its vIOMMU.
    Vdevice(VdeviceId);
    /// A queue of recoverable faults.
    FaultQueue(FaultQueueId);
    /// A queue of events.
    EventQueue(EventQueueId);
}

impl Device {
    /// Binds a device.
    ///
    /// # Errors
    /// As [`Kernel::bind_device`].
    pub fn bind(kernel: &Arc<dyn Kernel>, label: &str) -> Result<Self> {
        let id = kernel.bind_device(label)?;
        Ok(Self(Arc::new(Node { kernel: Arc::clone(kernel), id: id.into(), device: true, _parents: Vec::new() })))
    }

    /// Attaches the device, or a PASID of it; see [`Attachment`].
    ///
    /// # Errors
    /// As [`Kernel::attach`].
    pub fn attach(&self, pasid: Option<Pasid>, to: PageTable<'_>) -> Result<Attachment> {
        let hwpt = self.kernel().attach(self.id(), pasid, to.id())?;
        Ok(Attachment { device: self.clone(), pasid, hwpt, page_table: Arc::clone(to.node()) })
    }
}

impl Ioas {
    /// Makes an empty one.
    ///
    /// # Errors
    /// As [`Kernel::ioas_alloc`].
    pub fn alloc(kernel: &Arc<dyn Kernel>) -> Result<Self> {
        Ok(Self(Node::new(kernel, kernel.ioas_alloc()?, &[])))
    }

    /// A page table for the device's unit that the kernel keeps equal to this IOAS.
    ///
    /// # Errors
    /// As [`Kernel::hwpt_alloc`].
    pub fn hwpt(&self, device: &Device, flags: HwptFlags, faults: Option<&FaultQueue>) -> Result<Hwpt> {
        hwpt(&self.0, device, HwptParent::Ioas(self.id()), flags, (super::hwpt_data::NONE, &[]), faults)
    }
}

impl Hwpt {
    /// A nested page table over this one, from `data` of a type of [`hwpt_data`](super::hwpt_data).
    ///
    /// # Errors
    /// As [`Kernel::hwpt_alloc`].
    pub fn nested(&self, device: &Device, flags: HwptFlags, data: (u32, &[u8]), faults: Option<&FaultQueue>) -> Result<Self> {
        hwpt(&self.0, device, HwptParent::Hwpt(self.id()), flags, data, faults)
    }

    /// Tells which pages of 4 KiB were written, as runs of IOVAs, of a span that is mapped throughout: since [`Kernel::set_dirty_tracking`] or the last time that they
    /// were cleared. It takes a call for each 4 GiB.
    ///
    /// # Errors
    /// As [`Kernel::dirty_bitmap`]. What was told up to then is cleared, if it is to be.
    pub fn written(&self, span: Span, clear: bool, tell: &mut dyn FnMut(Span)) -> Result<()> {
        let flags = if clear { DirtyFlags::NONE } else { DirtyFlags::NO_CLEAR };
        let mut next = Some(span.first & !(PAGE - 1));
        while let Some(first) = next.filter(|first| *first <= span.last) {
            let last = (span.last | (PAGE - 1)).min(first.saturating_add(READ_AT_ONCE - 1));
            let range = DirtyRange { flags, iova: Iova(first), length: last - first + 1, page_size: PAGE };
            runs(&self.kernel().dirty_bitmap(self.id(), &range)?, first, tell);
            next = last.checked_add(1);
        }
        Ok(())
    }

    /// A vIOMMU over this page table.
    ///
    /// # Errors
    /// As [`Kernel::viommu_alloc`].
    pub fn viommu(&self, device: &Device, viommu_type: u32) -> Result<Viommu> {
        let id = self.kernel().viommu_alloc(&ViommuAlloc { flags: 0, viommu_type, device: device.id(), parent: self.id() })?;
        Ok(Viommu(Node::new(self.kernel(), id, &[&self.0])))
    }
}

impl Viommu {
    /// A nested page table in this vIOMMU.
    ///
    /// # Errors
    /// As [`Kernel::hwpt_alloc`].
    pub fn nested(&self, device: &Device, flags: HwptFlags, data: (u32, &[u8]), faults: Option<&FaultQueue>) -> Result<Hwpt> {
        hwpt(&self.0, device, HwptParent::Viommu(self.id()), flags, data, faults)
    }

    /// Tells the vIOMMU the device's number.
    ///
    /// # Errors
    /// As [`Kernel::vdevice_alloc`].
    pub fn vdevice(&self, device: &Device, virtual_id: u64) -> Result<Vdevice> {
        let id = self.kernel().vdevice_alloc(self.id(), device.id(), virtual_id)?;
        Ok(Vdevice(Node::new(self.kernel(), id, &[&self.0, &device.0])))
    }

    /// A queue of `depth` events.
    ///
    /// # Errors
    /// As [`Kernel::event_queue_alloc`].
    pub fn event_queue(&self, queue_type: u32, depth: u32) -> Result<EventQueue> {
        let id = self.kernel().event_queue_alloc(&EventQueueAlloc { flags: 0, viommu: self.id(), queue_type, depth })?;
        Ok(EventQueue(Node::new(self.kernel(), id, &[&self.0])))
    }
}

impl FaultQueue {
    /// Makes one.
    ///
    /// # Errors
    /// As [`Kernel::fault_queue_alloc`].
    pub fn alloc(kernel: &Arc<dyn Kernel>) -> Result<Self> {
        Ok(Self(Node::new(kernel, kernel.fault_queue_alloc()?, &[])))
    }
}

fn hwpt(parent: &Arc<Node>, device: &Device, kind: HwptParent, flags: HwptFlags, data: (u32, &[u8]), faults: Option<&FaultQueue>) -> Result<Hwpt> {
    let flags = if faults.is_some() { flags | HwptFlags::FAULT_ID } else { flags };
    let request =
        HwptAlloc { flags, device: device.id(), parent: kind, data_type: data.0, data: data.1.to_vec(), fault_queue: faults.map(FaultQueue::id) };
    let id = parent.kernel.hwpt_alloc(&request)?;
    let mut parents = vec![parent];
    parents.extend(faults.map(|queue| &queue.0));
    Ok(Hwpt(Node::new(&parent.kernel, id, &parents)))
}

/// What a device can be attached to.
#[derive(Clone, Copy, Debug)]
pub enum PageTable<'a> {
    /// The kernel finds the hardware page table.
    Ioas(&'a Ioas),
    /// This one.
    Hwpt(&'a Hwpt),
}

impl<'a> PageTable<'a> {
    fn id(self) -> PageTableId {
        match self {
            Self::Ioas(ioas) => PageTableId::Ioas(ioas.id()),
            Self::Hwpt(hwpt) => PageTableId::Hwpt(hwpt.id()),
        }
    }

    fn node(self) -> &'a Arc<Node> {
        match self {
            Self::Ioas(ioas) => &ioas.0,
            Self::Hwpt(hwpt) => &hwpt.0,
        }
    }
}

/// A device, or a PASID of it, on a page table. Dropping it detaches: DMA is blocked from then on.
#[derive(Debug)]
pub struct Attachment {
    device: Device,
    pasid: Option<Pasid>,
    hwpt: HwptId,
    page_table: Arc<Node>,
}

impl Attachment {
    /// The hardware page table that is in use.
    #[must_use]
    pub fn hwpt(&self) -> HwptId {
        self.hwpt
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Puts another page table in the place of this one, hitless. On an error the old one stays.
    ///
    /// # Errors
    /// As [`Kernel::attach`].
    pub fn replace(&mut self, to: PageTable<'_>) -> Result<()> {
        self.hwpt = self.device.kernel().attach(self.device.id(), self.pasid, to.id())?;
        self.page_table = Arc::clone(to.node());
        Ok(())
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        // Fails for misuse only.
        let _ = self.device.kernel().detach(self.device.id(), self.pasid);
    }
}
