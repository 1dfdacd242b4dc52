//! A table that user space owns, walked by the unit: made, and bound.
//!
//! ```text
//!   Parent: kernel's address space with guest memory, and with memory for tables
//!     |          |
//!     |          +-- NestedTable (host tables) or the guest's own, and a context structure where the architecture has one
//!     +-- page table of the unit -- vIOMMU, where the architecture has one -- nested page table
//! ```
//!
//! Death is upwards: the nested page table, then what was cached under its number, then the number, the vIOMMU and the memory of tables.

use std::sync::Arc;

use super::commit::KernelCommitter;
use super::context::Inner;
use super::device::Connected;
use super::parent::{Parent, SpaceNumber, Under};
use super::record::Recorder;
use super::tables::Chunk;
use super::{Error, Property, Refusal};
use crate::kernel::handle::{FaultQueue, Hwpt, Viommu};
use crate::kernel::{HwptFlags, InvalidateTarget};
use crate::memory::{EntryLayout, PAGE};
use crate::plugin::recipe::Target;
use crate::plugin::{Binding, PlaceToBind, TableConfig};
use crate::sync::TableMemory;
use crate::table::ByteOrder;

/// A nested page table with all that it stands on.
#[derive(Debug)]
pub(super) struct Bound {
    hwpt: Option<Hwpt>,
    /// Tells the kernel what is gone; taken by whoever keeps the table in step.
    committer: Option<KernelCommitter>,
    /// For the end, where numbers are shared.
    last_words: Option<KernelCommitter>,
    viommu: Option<Viommu>,
    number: SpaceNumber,
    pasids: bool,
    /// What it stands on.
    recorder: Arc<Recorder>,
    _context: Option<Chunk>,
    _parent: Arc<Parent>,
}

/// For whom a nested page table is made.
#[derive(Clone, Copy, Debug)]
pub(super) struct For<'a> {
    pub(super) context: &'a Inner,
    pub(super) device: &'a Connected,
    pub(super) faults: Option<&'a FaultQueue>,
    /// Page tables are to be attached to PASIDs, or are already.
    pub(super) with_pasids: bool,
    /// What it stands on is to be able to record which pages are written.
    pub(super) records: bool,
}

/// Why a table of user space's cannot be had for a single PASID, nor beside others: SMMUv3's context descriptors, AMD's guest CR3 table and RISC-V's process
/// directory are reached from the structure that is bound with the table, so that all PASIDs of the device are its owner's. The kernel has none to give away then.
pub(super) const OWNERS_PASIDS: &str = "PASIDs of the device belong to the owner of such a table on this unit, and none can be attached by itself";

/// Whether the kernel attaches such a table to single PASIDs, or has some beside it. The table need not have an address yet.
pub(super) fn takes_pasids(context: &Inner, device: &Connected, table: &TableConfig, under: Under) -> Result<bool, Error> {
    let mut instance = context.plugins().by_format(&table.format)?.instantiate()?;
    let place = PlaceToBind { hardware: device.hardware(), context_address: PAGE, space: 1, host_made: under == Under::Host };
    Ok(instance.bind_data(table, &place)?.pasids)
}

impl Bound {
    /// Binds `table`, which has its roots: a host's, or a guest's own.
    pub(super) fn new(whom: For<'_>, parent: Arc<Parent>, table: &TableConfig, under: Under) -> Result<Self, Error> {
        let For { context, device, faults, with_pasids, records } = whom;
        let number = parent.number()?;
        let mut instance = context.plugins().by_format(&table.format)?.instantiate()?;
        let mut place = PlaceToBind { hardware: device.hardware(), context_address: PAGE, space: number.get(), host_made: under == Under::Host };
        let mut binding = instance.bind_data(table, &place)?;
        let mut context_structure = None;
        if !binding.context.is_empty() {
            // Now that there has to be one: where it really is.
            let bytes = (binding.context.len() as u64).next_power_of_two().max(PAGE);
            let chunk = parent.pool().chunk(bytes).map_err(Error::kernel("memory for a context structure"))?;
            place.context_address = chunk.base().0;
            binding = instance.bind_data(table, &place)?;
            write(&chunk, &binding.context);
            context_structure = Some(chunk);
        }
        let Binding { kind, data, viommu, pasids, invalidation, .. } = binding;
        // For a device without PASIDs the page table is not made for them, and others behind the unit cannot have it beside theirs.
        let pasids = pasids && device.pasid_flag() != HwptFlags::NONE;
        if with_pasids && !pasids {
            return Err(Refusal::new(Property::Pasid, OWNERS_PASIDS).into());
        }
        let recipe = invalidation.ok_or_else(|| Refusal::new(Property::Invalidation, "nothing that is cached of such a table can be dropped"))?;
        let viommu = viommu
            .map(|viommu_type| parent.viommu(device, records, viommu_type, &table.format))
            .transpose()
            .map_err(Error::kernel("making a vIOMMU"))?;
        let flags = if pasids { device.pasid_flag() } else { HwptFlags::NONE };
        let recorder = parent.nest(device, records).map_err(Error::kernel("making a page table for nested ones"))?;
        let hwpt = match &viommu {
            Some(viommu) => viommu.nested(device.bound(), flags, (kind, &data), faults),
            None => recorder.hwpt().nested(device.bound(), flags, (kind, &data), faults),
        };
        let hwpt = hwpt.map_err(Error::kernel("making a nested page table"))?;
        let target = match (recipe.target, &viommu) {
            (Target::PageTable, _) => InvalidateTarget::Hwpt(hwpt.id()),
            (Target::Viommu, Some(viommu)) => InvalidateTarget::Viommu(viommu.id()),
            (Target::Viommu, None) => {
                return Err(Refusal::new(Property::Invalidation, "what is cached is to be dropped from a vIOMMU, and there is none").into());
            }
        };
        let probed = KernelCommitter::new(context, target, recipe.clone());
        let committer = probed.map_err(|error| Error::kernel("asking whether invalidations are taken")(error.errno))?;
        // A page table that is destroyed takes what was cached of it along; a vIOMMU stays.
        let last_words = matches!(target, InvalidateTarget::Viommu(_)).then(|| committer.clone());
        Ok(Self {
            hwpt: Some(hwpt),
            committer: Some(committer),
            last_words,
            viommu,
            number,
            pasids,
            recorder,
            _context: context_structure,
            _parent: parent,
        })
    }

    /// The page table, for devices.
    pub(super) const fn hwpt(&self) -> Option<&Hwpt> {
        self.hwpt.as_ref()
    }

    /// The vIOMMU that devices have to be in.
    pub(super) const fn viommu(&self) -> Option<&Viommu> {
        self.viommu.as_ref()
    }

    /// The page table that it stands on.
    pub(super) const fn recorder(&self) -> &Arc<Recorder> {
        &self.recorder
    }

    /// Single PASIDs can be attached.
    pub(super) const fn has_pasids(&self) -> bool {
        self.pasids
    }

    pub(super) const fn take_committer(&mut self) -> Option<KernelCommitter> {
        self.committer.take()
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        self.hwpt = None;
        if let Some(committer) = &mut self.last_words
            && committer.forget_everything().is_err()
        {
            self.number.use_up();
        }
    }
}

/// Writes a structure, padded with zeroes, at the beginning of a chunk.
fn write(chunk: &Chunk, bytes: &[u8]) {
    let mut words: Vec<u64> = bytes.chunks(8).map(|bytes| bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte))).collect();
    words.resize(words.len().next_multiple_of(PAGE as usize / 8), 0);
    if let Some(mut tables) = chunk.tables() {
        tables.fill(chunk.base(), EntryLayout { bytes: 8, order: ByteOrder::Little }, &words);
    }
}
