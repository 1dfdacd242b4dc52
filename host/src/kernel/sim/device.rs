//! Devices: DMA through the units on their path.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, RwLock};

use super::domain::Domain;
use super::events;
use super::fault::{DmaAccess, EventQueue, Fault, FaultQueue, Reason, Stage};
use super::lock::{lock, read};
use super::memory::UserMemory;
use super::unit::{Unit, UnitKind};
use super::walk::context::{FirstStage, resolve};
use super::walk::{Context, Failed, Reach, translate};
use crate::kernel::{DeviceId, PageFault, Pasid, ResponseCode};
use crate::{Gpa, Iova};

/// A device to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// What it is bound by.
    pub label: String,
    /// Requester id or StreamID: what real units know it by. Not what a guest calls it.
    pub requester: u32,
    /// Makes requests with PASIDs.
    pub pasids: bool,
    /// Asks for pages that are not there (PRI), if its page table has a fault queue.
    pub page_requests: bool,
    /// IOVAs that nothing may be mapped at for this device's sake, on top of its units'.
    pub reserved: Vec<crate::Span>,
}

impl DeviceConfig {
    /// A device that can do everything.
    #[must_use]
    pub fn new(label: &str, requester: u32) -> Self {
        Self { label: label.to_owned(), requester, pasids: true, page_requests: true, reserved: Vec::new() }
    }
}

/// What a device, or a PASID of it, is attached to.
#[derive(Debug)]
pub(super) struct Binding {
    pub(super) device: DeviceId,
    /// The kernel's tables: one per unit on the path.
    pub(super) parent: Vec<Arc<Domain>>,
    /// The table of user space in front of it.
    pub(super) first: Option<FirstStage>,
    pub(super) faults: Option<Arc<FaultQueue>>,
    pub(super) viommu: Option<Arc<ViommuState>>,
}

/// What a vIOMMU and DMA share.
#[derive(Debug)]
pub(super) struct ViommuState {
    /// Never used again.
    pub(super) serial: u64,
    pub(super) viommu_type: u32,
    pub(super) unit: Arc<Unit>,
    /// Serial numbers of devices by the guest's number.
    pub(super) devices: RwLock<BTreeMap<u64, u64>>,
    pub(super) events: RwLock<Option<Arc<EventQueue>>>,
}

impl ViommuState {
    pub(super) fn virtual_id(&self, device: u64) -> Option<u64> {
        read(&self.devices).iter().find(|(_, serial)| **serial == device).map(|(id, _)| *id)
    }
}

/// Faults that nobody took yet, oldest first.
#[derive(Debug, Default)]
pub(super) struct FaultLog(Mutex<(VecDeque<Fault>, u64)>);

/// So many are kept; older ones go.
const FAULT_LOG: usize = 4096;

impl FaultLog {
    fn push(&self, fault: &Fault) {
        let mut log = lock(&self.0);
        if log.0.len() == FAULT_LOG {
            log.0.pop_front();
        }
        log.0.push_back(fault.clone());
        log.1 += 1;
    }

    pub(super) fn take(&self) -> Vec<Fault> {
        lock(&self.0).0.drain(..).collect()
    }

    pub(super) fn count(&self) -> u64 {
        lock(&self.0).1
    }
}

#[derive(Debug)]
pub(super) struct DeviceState {
    /// Never used again.
    pub(super) serial: u64,
    pub(super) config: DeviceConfig,
    pub(super) path: Vec<Arc<Unit>>,
    pub(super) bindings: RwLock<BTreeMap<Option<u32>, Arc<Binding>>>,
    pub(super) memory: Arc<UserMemory>,
    pub(super) log: Arc<FaultLog>,
    /// Rounds of a millisecond that a page request waits.
    pub(super) patience: std::sync::atomic::AtomicU32,
}

/// A device, for DMA. Clones are the same device; it may be used from many threads at once.
#[derive(Clone, Debug)]
pub struct Device(pub(super) Arc<DeviceState>);

/// Data of a transaction.
#[derive(Debug)]
pub enum Data<'a> {
    /// From memory.
    Read(&'a mut [u8]),
    /// To memory.
    Write(&'a [u8]),
}

/// Where a transaction goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// What stage 1 gave; the IOVA itself where there is none.
    pub address: Gpa,
    /// Where that is in this process.
    pub user_address: u64,
}

/// What a page request is for, and the most that one transaction transfers.
const PAGE: u64 = 4096;
/// So many page requests for one page, before the device gives up.
const REQUESTS: u32 = 8;

impl Device {
    /// The label that it is bound by.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.0.config.label
    }

    /// One transfer, in transactions that do not cross a page. What was transferred before a fault stays so.
    ///
    /// # Errors
    /// The first transaction that did not translate. It is also in the log of the simulation, and in the vIOMMU's event queue if stage 1 refused it.
    pub fn dma(&self, pasid: Option<Pasid>, iova: Iova, data: Data<'_>) -> Result<(), Fault> {
        match data {
            Data::Read(bytes) => self.read(pasid, iova, bytes),
            Data::Write(bytes) => self.write(pasid, iova, bytes),
        }
    }

    /// Reads memory.
    ///
    /// # Errors
    /// As [`Device::dma`].
    pub fn read(&self, pasid: Option<Pasid>, iova: Iova, bytes: &mut [u8]) -> Result<(), Fault> {
        let mut done = 0;
        while done < bytes.len() {
            let at = Iova(iova.0.wrapping_add(done as u64));
            let end = bytes.len().min(done + self.in_page(at));
            self.transaction(pasid, at, DmaAccess::Read, &mut |user| self.0.memory.copy_out(user, &mut bytes[done..end]))?;
            done = end;
        }
        Ok(())
    }

    /// Writes memory.
    ///
    /// # Errors
    /// As [`Device::dma`].
    pub fn write(&self, pasid: Option<Pasid>, iova: Iova, bytes: &[u8]) -> Result<(), Fault> {
        let mut done = 0;
        while done < bytes.len() {
            let at = Iova(iova.0.wrapping_add(done as u64));
            let end = bytes.len().min(done + self.in_page(at));
            self.transaction(pasid, at, DmaAccess::Write, &mut |user| self.0.memory.copy_in(user, &bytes[done..end]))?;
            done = end;
        }
        Ok(())
    }

    /// Where a transaction would go. Caches, accessed and dirty bits change as if it went.
    ///
    /// # Errors
    /// As [`Device::dma`].
    pub fn translate(&self, pasid: Option<Pasid>, iova: Iova, access: DmaAccess) -> Result<Translation, Fault> {
        self.transaction(pasid, iova, access, &mut |_| Some(()))
    }

    /// What stage 1 alone makes of a transaction: the address that the parent would translate. Caches and bits change as if it went.
    ///
    /// # Errors
    /// As [`Device::dma`], but nothing is logged or asked for.
    pub fn first_stage(&self, pasid: Option<Pasid>, iova: Iova, access: DmaAccess) -> Result<Gpa, Fault> {
        let unit = self.0.path.first();
        let _gate = unit.map(|unit| read(&unit.gate));
        let found = self.binding(pasid).and_then(|binding| self.first(&binding, pasid, iova, access == DmaAccess::Write));
        found.map(Gpa).map_err(|failed| self.fault(pasid, iova, access, failed))
    }

    /// Bytes up to where the next entry may say something else: areas can be smaller than 4 KiB where a unit has smaller pages.
    fn in_page(&self, iova: Iova) -> usize {
        let page = self.0.path.iter().map(|unit| unit.config.page_size).fold(PAGE, u64::min);
        usize::try_from(page - iova.0 % page).unwrap_or(1)
    }

    /// One transaction; asks for the page if that may help.
    fn transaction(
        &self,
        pasid: Option<Pasid>,
        iova: Iova,
        access: DmaAccess,
        transfer: &mut dyn FnMut(u64) -> Option<()>,
    ) -> Result<Translation, Fault> {
        for _ in 0..REQUESTS {
            let mut binding = None;
            let failed = match self.attempt(pasid, iova, access, &mut binding, transfer) {
                Ok(translation) => return Ok(translation),
                Err(failed) => failed,
            };
            let queue = binding.as_ref().and_then(|binding| self.recoverable(binding, failed).map(|queue| (binding.device, queue)));
            let Some((device, queue)) = queue else {
                return Err(self.report(binding.as_deref(), self.fault(pasid, iova, access, failed)));
            };
            let (read, write) = (access == DmaAccess::Read, access == DmaAccess::Write);
            let request = PageFault { device, pasid, group: 0, read, write, address: Iova(iova.0 & !(PAGE - 1)), cookie: 0 };
            let reason = match queue.request(request, self.0.patience.load(std::sync::atomic::Ordering::Relaxed)) {
                Some(ResponseCode::Success) => continue,
                Some(ResponseCode::Invalid) => Reason::Refused,
                None => Reason::TimedOut,
            };
            return Err(self.report(None, self.fault(pasid, iova, access, Failed { reason, ..failed })));
        }
        let failed = Failed { reason: Reason::TimedOut, stage: Stage::First, level: None };
        Err(self.report(None, self.fault(pasid, iova, access, failed)))
    }

    /// One transaction, within the gates of all units on the path: from the first look-up to the last byte.
    fn attempt(
        &self,
        pasid: Option<Pasid>,
        iova: Iova,
        access: DmaAccess,
        used: &mut Option<Arc<Binding>>,
        transfer: &mut dyn FnMut(u64) -> Option<()>,
    ) -> Result<Translation, Failed> {
        let (first, others) = self.0.path.split_first().ok_or(not(Reason::NotAttached))?;
        let _first = read(&first.gate);
        // A Vec that stays empty allocates nothing.
        let _others: Vec<_> = others.iter().map(|unit| read(&unit.gate)).collect();
        let writes = access == DmaAccess::Write;
        let binding = used.insert(self.binding(pasid)?);
        let address = self.first(binding, pasid, iova, writes)?;
        let user_address = Reach { memory: &self.0.memory, binding }.second(address, writes)?;
        transfer(user_address).ok_or(Failed { reason: Reason::NoMemory, stage: Stage::Second, level: None })?;
        Ok(Translation { address: Gpa(address), user_address })
    }

    /// A PASID's own attachment, or that of the device if its table has PASIDs.
    fn binding(&self, pasid: Option<Pasid>) -> Result<Arc<Binding>, Failed> {
        let bindings = read(&self.0.bindings);
        if let Some(binding) = bindings.get(&pasid.map(|pasid| pasid.0)) {
            return Ok(Arc::clone(binding));
        }
        let device = bindings.get(&None).ok_or(not(Reason::NotAttached))?;
        let pasids = self.0.config.pasids && device.first.as_ref().is_some_and(|first| first.data.has_pasids());
        if pasids { Ok(Arc::clone(device)) } else { Err(not(Reason::Pasid)) }
    }

    fn first(&self, binding: &Binding, pasid: Option<Pasid>, iova: Iova, writes: bool) -> Result<u64, Failed> {
        let Some(first) = &binding.first else { return Ok(iova.0) };
        let reach = Reach { memory: &self.0.memory, binding };
        let x86 = matches!(reach.unit().config.kind, UnitKind::Vtd { .. } | UnitKind::Amd { .. });
        if x86 && pasid.is_none() && iova.0 >> 20 == 0xfee {
            return Err(not(Reason::InterruptRange));
        }
        match &*resolve(reach, first, self.0.serial, pasid.map(|pasid| pasid.0))? {
            Context::Bypass => Ok(iova.0),
            Context::Tables { space, format } => {
                let leaf = translate(reach, *space, format, iova.0, writes)?;
                Ok(leaf.output + (iova.0 & ((1 << leaf.size_log2) - 1)))
            }
        }
    }

    fn recoverable<'a>(&self, binding: &'a Binding, failed: Failed) -> Option<&'a FaultQueue> {
        let absent = matches!(failed.reason, Reason::NotPresent | Reason::Permission | Reason::AccessFlag);
        let owned_stage = if binding.first.is_some() { Stage::First } else { Stage::Second };
        binding.faults.as_deref().filter(|_| self.0.config.page_requests && absent && failed.stage == owned_stage)
    }

    fn fault(&self, pasid: Option<Pasid>, iova: Iova, access: DmaAccess, failed: Failed) -> Fault {
        let Failed { reason, stage, level } = failed;
        Fault { device: self.0.config.label.clone(), pasid, iova, access, reason, stage, level }
    }

    fn report(&self, binding: Option<&Binding>, fault: Fault) -> Fault {
        self.0.log.push(&fault);
        // The kernel forwards what is the guest's own doing.
        if fault.stage != Stage::Second
            && let Some(viommu) = binding.and_then(|binding| binding.viommu.as_ref())
            && let Some(queue) = read(&viommu.events).as_ref()
            && let Some(id) = viommu.virtual_id(self.0.serial)
        {
            queue.push(events::record(viommu.viommu_type, id, &fault));
        }
        fault
    }
}

fn not(reason: Reason) -> Failed {
    Failed { reason, stage: Stage::Context, level: None }
}
