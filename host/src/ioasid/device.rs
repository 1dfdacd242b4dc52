//! A connected device, and what its whole path can do.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

#[cfg(doc)]
use super::Ioasid;
use super::context::Inner;
use super::space::{Space, SpaceId};
use super::{Error, Property, Refusal};
use crate::Span;
use crate::kernel::handle::{Attachment, Device as Bound, Vdevice, Viommu};
use crate::kernel::{Errno, HwCapabilities, HwInfo, HwptFlags, IovaRanges, Pasid};
use crate::offers::{Hardware, OffersError, offers};
use crate::plugin::{Offer, Plugins};

/// What all units on a device's path can do together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Formats of tables that user space may own, with the limits that all units keep.
    pub formats: Vec<Offer>,
    /// Why a unit takes none, or one format less than the unit before it; sentences in lower case without a full stop.
    pub missing: Vec<String>,
    /// Units on the path, the nearest first, as the kernel tells of them.
    pub path: Vec<HwInfo>,
    /// Log2 of the number of PASIDs; 0 is none.
    pub pasid_log2: u8,
    /// Pages that the device writes can be recorded.
    pub dirty_tracking: bool,
    /// IOVAs that the device can use in the kernel's own tables, and what areas are aligned to.
    pub iova: IovaRanges,
}

impl Capabilities {
    /// The offer of a format, if there is one.
    #[must_use]
    pub fn offer(&self, format: &str) -> Option<&Offer> {
        self.formats.iter().find(|offer| offer.format == format)
    }

    /// What all units of a path offer.
    pub(super) fn of_path(plugins: &Plugins, path: Vec<HwInfo>, iova: IovaRanges) -> Result<Self, Error> {
        let mut missing = Vec::new();
        let mut formats: Option<Vec<Offer>> = None;
        for (number, info) in (1..).zip(&path) {
            let here = match offers(plugins, &Hardware { kind: info.data_type, info: info.data.clone() }) {
                Ok(here) => here,
                Err(OffersError::UnknownKind(kind)) => {
                    missing.push(format!("unit {number} of the path is of a kind that no plugin knows ({kind:#x})"));
                    Vec::new()
                }
                Err(error) => return Err(error.into()),
            };
            if here.is_empty() {
                missing.push(format!("unit {number} of the path takes no tables of its users"));
            }
            formats = Some(match formats {
                None => here,
                Some(before) => common(before, &here, number, &mut missing),
            });
        }
        let pasid_log2 = path.iter().map(|info| info.max_pasid_log2).min().unwrap_or(0);
        let dirty_tracking = path.iter().all(|info| info.capabilities.contains(HwCapabilities::DIRTY_TRACKING));
        Ok(Self { formats: formats.unwrap_or_default(), missing, path, pasid_log2, dirty_tracking, iova })
    }
}

/// The offers of `before` that `here` has as well, with the limits that both keep.
fn common(before: Vec<Offer>, here: &[Offer], number: usize, missing: &mut Vec<String>) -> Vec<Offer> {
    let both = |mut offer: Offer| {
        let Some(other) = here.iter().find(|other| other.format == offer.format) else {
            if !here.is_empty() {
                missing.push(format!("unit {number} of the path does not take {}", offer.format));
            }
            return None;
        };
        for (name, limit) in &other.limits {
            match offer.limits.iter_mut().find(|(known, _)| known == name) {
                // Sets of sizes are sums of powers of two; everything else is a bound.
                Some((_, known)) if *known >= 4096 && *limit >= 4096 => *known &= limit,
                Some((_, known)) => *known = (*known).min(*limit),
                None => offer.limits.push((name.clone(), *limit)),
            }
        }
        offer.conditions.extend(other.conditions.iter().filter(|condition| !offer.conditions.contains(condition)).cloned().collect::<Vec<_>>());
        Some(offer)
    };
    before.into_iter().filter_map(both).collect()
}

/// Where an attachment is.
#[derive(Debug)]
pub(super) enum Held {
    /// Here.
    Here(Attachment),
    /// In the areas of the IOASID.
    Areas,
    /// On its way, or gone.
    Nowhere,
}

/// What a device, or a PASID of it, is attached to.
#[derive(Debug)]
pub(super) struct Slot {
    // Dropped first: nothing that it uses goes before it.
    pub(super) held: Held,
    pub(super) space: Arc<Space>,
}

/// By PASID.
pub(super) type Slots = BTreeMap<Option<Pasid>, Slot>;

/// IOASIDs that a device, or a PASID of it, is to be attached to again.
pub(super) type Waits = Mutex<BTreeMap<Option<Pasid>, SpaceId>>;

/// A device on the context's side.
#[derive(Debug)]
pub(super) struct Connected {
    slots: Mutex<Slots>,
    /// IOASIDs that it, or a PASID of it, was detached from because the kernel failed, and that it is to be attached to again.
    waits: Arc<Waits>,
    /// Its number in one vIOMMU: the kernel lets it have one at a time.
    vdevice: Mutex<Option<(Viommu, Vdevice)>>,
    label: String,
    virtual_id: u64,
    unit: usize,
    capabilities: Capabilities,
    /// Whether it can ask for pages, once that is known.
    asks: OnceLock<bool>,
    /// It was connected by a context that was restored, and no vIOMMU has it yet.
    restored: AtomicBool,
    bound: Bound,
    context: Arc<Inner>,
}

impl Connected {
    pub(super) const fn unit(&self) -> usize {
        self.unit
    }

    pub(super) const fn bound(&self) -> &Bound {
        &self.bound
    }

    pub(super) fn label(&self) -> &str {
        &self.label
    }

    pub(super) const fn virtual_id(&self) -> u64 {
        self.virtual_id
    }

    pub(super) const fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    pub(super) const fn context(&self) -> &Arc<Inner> {
        &self.context
    }

    /// With it, page tables can be attached to PASIDs, if the device has any.
    pub(super) const fn pasid_flag(&self) -> HwptFlags {
        if self.capabilities.pasid_log2 > 0 { HwptFlags::PASID } else { HwptFlags::NONE }
    }

    /// The nearest unit, in the kernel's words.
    pub(super) fn hardware(&self) -> (u32, Vec<u8>) {
        self.capabilities.path.first().map_or((0, Vec::new()), |info| (info.data_type, info.data.clone()))
    }

    pub(super) fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn waits(&self) -> MutexGuard<'_, BTreeMap<Option<Pasid>, SpaceId>> {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It is to be attached to this IOASID again. Who keeps it need not keep the device.
    pub(super) fn waits_for(&self, pasid: Option<Pasid>, space: SpaceId) -> Awaited {
        self.waits().insert(pasid, space);
        Awaited { waits: Arc::downgrade(&self.waits), pasid, space }
    }

    /// Whether it is.
    pub(super) fn is_waiting(&self, pasid: Option<Pasid>, space: SpaceId) -> bool {
        self.waits().get(&pasid) == Some(&space)
    }

    /// It is attached, or not to be any more; false if it was not waiting, for this IOASID if one is given.
    pub(super) fn waits_no_more(&self, pasid: Option<Pasid>, space: Option<SpaceId>) -> bool {
        let mut waits = self.waits();
        let waited = waits.get(&pasid).is_some_and(|known| space.is_none_or(|space| space == *known));
        waited && waits.remove(&pasid).is_some()
    }

    /// Whether it can ask for pages. Only an attachment to a page table with a queue of faults tells: one in which nothing is serves. A device that is attached
    /// is not bothered; it counts as one that can, as long as nobody knows better.
    pub(super) fn asks_for_pages(&self) -> Result<bool, Error> {
        if let Some(known) = self.asks.get() {
            return Ok(*known);
        }
        let slots = self.slots();
        if slots.contains_key(&None) {
            return Ok(true);
        }
        let asks = self.context.takes_faults(self)?;
        drop(slots);
        Ok(*self.asks.get_or_init(|| asks))
    }

    /// The vIOMMU that knows it.
    pub(super) fn vdevice(&self) -> Option<Viommu> {
        self.in_viommu().as_ref().map(|(viommu, _)| viommu.clone())
    }

    fn in_viommu(&self) -> MutexGuard<'_, Option<(Viommu, Vdevice)>> {
        self.vdevice.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the vIOMMU the device's number, and any other one no more.
    pub(super) fn enter(&self, viommu: &Viommu) -> Result<(), Errno> {
        let mut known = self.in_viommu();
        if known.as_ref().is_some_and(|(known, _)| known.id() == viommu.id()) {
            return Ok(());
        }
        let before = known.take().map(|(viommu, _)| viommu);
        match viommu.vdevice(&self.bound, self.virtual_id) {
            Ok(vdevice) => *known = Some((viommu.clone(), vdevice)),
            Err(errno) => {
                drop(known);
                self.restore(before);
                return Err(errno);
            }
        }
        Ok(())
    }

    /// Only this vIOMMU knows it, or none.
    pub(super) fn restore(&self, before: Option<Viommu>) {
        let mut known = self.in_viommu();
        if known.as_ref().map(|(known, _)| known.id()) == before.as_ref().map(Viommu::id) {
            return;
        }
        *known = None;
        if let Some(viommu) = before {
            match viommu.vdevice(&self.bound, self.virtual_id) {
                Ok(vdevice) => *known = Some((viommu, vdevice)),
                // Its commands and events are nobody's until it is attached again; its DMA is as it was.
                Err(errno) => tracing::warn!(%errno, device = self.label, "the vIOMMU has lost the device's number"),
            }
        }
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        let slots = std::mem::take(self.slots.get_mut().unwrap_or_else(PoisonError::into_inner));
        for (pasid, slot) in slots {
            if matches!(slot.held, Held::Areas) {
                slot.space.release(self, pasid);
            }
        }
    }
}

/// Somebody who was attached, and may wait to be so again.
#[derive(Debug)]
pub(super) struct Awaited {
    waits: Weak<Waits>,
    pasid: Option<Pasid>,
    space: SpaceId,
}

impl Awaited {
    /// Whether the device still waits.
    pub(super) fn is_waiting(&self) -> bool {
        let waits = self.waits.upgrade();
        waits.is_some_and(|waits| waits.lock().unwrap_or_else(PoisonError::into_inner).get(&self.pasid) == Some(&self.space))
    }

    pub(super) fn is(&self, device: &Connected, pasid: Option<Pasid>) -> bool {
        self.pasid == pasid && std::ptr::eq(self.waits.as_ptr(), Arc::as_ptr(&device.waits))
    }
}

/// A connected device. Clones are the same device; it is detached from everything and let go of when the last one is dropped.
#[derive(Clone)]
pub struct Device(pub(super) Arc<Connected>);

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("label", &self.label()).finish_non_exhaustive()
    }
}

impl PartialEq for Device {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Device {}

impl Device {
    pub(super) fn connect(context: &Arc<Inner>, label: &str, virtual_id: u64) -> Result<Self, Error> {
        let kernel = context.kernel();
        let bound = Bound::bind(kernel, label).map_err(Error::kernel("binding the device"))?;
        let path = kernel.path(bound.id()).map_err(Error::kernel("asking for the device's path"))?;
        let (unit, iova) = context.unit_of(&bound, &path)?;
        let capabilities = Capabilities::of_path(context.plugins(), path, iova)?;
        Ok(Self(Arc::new(Connected {
            slots: Mutex::default(),
            waits: Arc::default(),
            vdevice: Mutex::default(),
            label: label.to_owned(),
            virtual_id,
            unit,
            capabilities,
            asks: OnceLock::new(),
            restored: AtomicBool::new(false),
            bound,
            context: Arc::clone(context),
        })))
    }

    pub(super) fn restored(self) -> Self {
        self.0.restored.store(true, Ordering::Relaxed);
        self
    }

    pub(crate) fn is_restored(&self) -> bool {
        self.0.restored.load(Ordering::Relaxed)
    }

    /// A vIOMMU has it now.
    pub(crate) fn taken_over(self) -> Self {
        self.0.restored.store(false, Ordering::Relaxed);
        self
    }

    /// The label that it was connected by.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.0.label
    }

    /// The number that the guest knows it by: StreamID, requester id, device id.
    #[must_use]
    pub fn virtual_id(&self) -> u64 {
        self.0.virtual_id
    }

    /// What its whole path can do.
    #[must_use]
    pub fn capabilities(&self) -> &Capabilities {
        &self.0.capabilities
    }

    /// Whether it can ask for pages and wait for them, which [`Request::page_requests`](super::Request::page_requests) is about. The kernel tells by an attempt only: the first time, a device that
    /// is attached to nothing is attached for a moment to where nothing is. One that is attached is not bothered, and counts as one that can.
    ///
    /// # Errors
    /// [`Error::Kernel`].
    pub fn asks_for_pages(&self) -> Result<bool, Error> {
        self.0.asks_for_pages()
    }

    /// The kernel's handle, for what this library does not do.
    #[must_use]
    pub fn bound(&self) -> &Bound {
        &self.0.bound
    }

    /// Which IOASIDs it is attached to, by PASID.
    #[must_use]
    pub fn attached(&self) -> Vec<(Option<Pasid>, SpaceId)> {
        self.0.slots().iter().map(|(pasid, slot)| (*pasid, slot.space.id())).collect()
    }

    /// Detaches the device, or a PASID of it: its DMA is blocked from then on. Without the last PASID the device itself may get a better strategy, see [`Ioasid::reconsider`].
    /// One that was detached because the kernel failed is not attached again by [`Ioasid::recover`] then.
    ///
    /// # Errors
    /// [`Error::Refused`]: it is not attached.
    pub fn detach(&self, pasid: Option<Pasid>) -> Result<(), Error> {
        let _span = tracing::debug_span!("detach", device = self.label()).entered();
        loop {
            let space = self.0.slots().get(&pasid).map(|slot| Arc::clone(&slot.space));
            let Some(space) = space else {
                if self.0.waits_no_more(pasid, None) {
                    self.went(pasid);
                    return Ok(());
                }
                return Err(Refusal::new(Property::Attachment, format!("{} is not attached", Who(self.label(), pasid))).into());
            };
            // False: it was put on another one meanwhile.
            if space.detach(&self.0, pasid) {
                tracing::debug!(device = self.label(), ioasid = space.id().0, "detached");
                self.went(pasid);
                return Ok(());
            }
        }
    }

    /// It was detached, or a PASID of it, which may have been the last.
    pub(super) fn went(&self, pasid: Option<Pasid>) {
        let own = self.0.slots().get(&None).map(|slot| Arc::clone(&slot.space));
        if let Some(own) = own.filter(|_| pasid.is_some() && self.0.slots().len() == 1) {
            own.without_company(&self.0);
        }
    }
}

/// A device and a PASID, for messages.
pub(super) struct Who<'a>(pub(super) &'a str, pub(super) Option<Pasid>);

impl fmt::Display for Who<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.1 {
            None => write!(f, "device {}", self.0),
            Some(pasid) => write!(f, "PASID {:#x} of device {}", pasid.0, self.0),
        }
    }
}

/// The parts of `spans` that a path cannot use, as areas of the kernel; none if it can use all.
pub(super) fn outside(iova: &IovaRanges, span: Span) -> bool {
    !iova.ranges.iter().any(|range| range.intersection(span) == Some(span))
}
