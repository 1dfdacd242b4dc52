//! The guest's IOMMU as its own driver sees it: registers, structures in guest memory, commands, event records, each in its architecture's format.
//!
//! This is the guest's side: like the simulated hardware, it is written from the architectures' manuals and shares no code with the plugins, which read what is
//! written here. Whether they read it as it was meant is checked when a scenario begins.

mod amd;
mod riscv;
mod smmu;
mod vtd;
mod zpci;

use std::fmt;
use std::sync::atomic::Ordering;

use anyhow::{Context as _, Result};
use stagecraft::Span;
use stagecraft::plugin::TableConfig;
use stagecraft::table::Geometry;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// A device with a table of its own.
#[derive(Clone, Debug)]
pub struct Described {
    /// Requester id, StreamID, device id, function id.
    pub id: u64,
    /// The number by which commands name its address space: ASID, domain id and so on.
    pub space: u16,
    /// The table, with its roots.
    pub config: TableConfig,
    /// The table's geometry.
    pub geometry: Geometry,
}

impl Described {
    /// A setting of the table; 0 if it has none.
    fn setting(&self, name: &str) -> u64 {
        self.config.settings.get(name).unwrap_or(0)
    }

    /// A bit, if a setting that is a flag is set.
    fn flag(&self, name: &str, bit: u32) -> u64 {
        u64::from(self.setting(name) != 0) << bit
    }

    /// Address of the root table.
    fn root(&self) -> u64 {
        self.setting("root")
    }
}

/// Which translations a driver wants forgotten.
#[derive(Clone, Copy, Debug)]
pub struct Forget {
    /// IOVAs; whole pages.
    pub iova: Span,
    /// Only leaves were changed.
    pub leaf: bool,
}

/// What an event record says of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Whose it was.
    pub id: u64,
    /// The IOVA, or its page.
    pub iova: u64,
    /// Whether it wrote; not all records tell.
    pub write: Option<bool>,
}

/// A driver's knowledge of its unit.
pub trait Architecture: fmt::Debug + Sync {
    /// The unit's name, as plugins have it.
    fn kind(&self) -> &'static str;

    /// Writes the structures of all devices, and says what is in the registers then.
    ///
    /// # Errors
    /// There is no room for them.
    fn set_up(&self, memory: &mut Memory, devices: &[Described]) -> Result<Vec<(String, u64)>>;

    /// The command queue is in guest memory. Otherwise commands are instructions.
    fn has_queue(&self) -> bool {
        true
    }

    /// Adds commands that forget translations of a device.
    fn forget(&self, device: &Described, what: Forget, commands: &mut Vec<u8>);

    /// Adds commands that forget all translations of a device.
    fn forget_all(&self, device: &Described, commands: &mut Vec<u8>);

    /// Adds the command that waits for those before it, if there is one.
    fn wait(&self, commands: &mut Vec<u8>);

    /// The driver also has to announce what it maps.
    fn announces_maps(&self) -> bool {
        false
    }

    /// Reads an event record; none if it is of something else. Without records, requests are refused silently.
    fn event(&self, record: &[u8]) -> Option<Refused>;

    /// Bytes of an event record; none if there are none.
    fn record_bytes(&self) -> Option<u64>;
}

/// The unit whose tables have this format; none if it has no commands.
pub fn of(format: &str) -> Option<&'static dyn Architecture> {
    match format {
        "arm-smmuv3/stage1" => Some(&smmu::Smmu { second: false }),
        "arm-smmuv3/stage2" => Some(&smmu::Smmu { second: true }),
        "intel-vtd/first-stage" => Some(&vtd::Vtd { scalable: true }),
        "intel-vtd/second-stage" => Some(&vtd::Vtd { scalable: false }),
        "amd-vi/v1" => Some(&amd::Amd { guest: false }),
        "amd-vi/v2" => Some(&amd::Amd { guest: true }),
        "riscv-iommu/first-stage" => Some(&riscv::Riscv { second: false }),
        "riscv-iommu/second-stage" => Some(&riscv::Riscv { second: true }),
        "s390-zpci/dma" => Some(&zpci::Zpci),
        _ => None,
    }
}

/// Guest memory for device structures.
#[derive(Debug)]
pub struct Memory {
    memory: GuestMemoryMmap,
    next: u64,
    last: u64,
}

/// Bytes of a page of structures.
const PAGE: u64 = 4096;

impl Memory {
    /// These bytes, which are zero.
    pub const fn new(memory: GuestMemoryMmap, span: Span) -> Self {
        Self { memory, next: span.first, last: span.last }
    }

    /// Room for structures, zeroed, aligned to its size: a power of two, a page at least.
    fn take(&mut self, bytes: u64) -> Result<u64> {
        let bytes = bytes.next_power_of_two().max(PAGE);
        let first = self.next.next_multiple_of(bytes);
        anyhow::ensure!(first + (bytes - 1) <= self.last, "the guest has no memory left for device structures");
        self.next = first + bytes;
        Ok(first)
    }

    /// Writes little-endian words, the first one last: it is the one that makes a structure valid.
    fn write(&self, address: u64, words: &[u64]) -> Result<()> {
        for (index, word) in words.iter().enumerate().rev() {
            self.memory.store(word.to_le(), GuestAddress(address + index as u64 * 8), Ordering::Release).context("writing device structures")?;
        }
        Ok(())
    }
}

/// Adds a command of little-endian words.
fn push(commands: &mut Vec<u8>, words: &[u64]) {
    commands.extend(words.iter().flat_map(|word| word.to_le_bytes()));
}

/// The little-endian words of a record of `N` words; none if it has another length.
fn words<const N: usize>(record: &[u8]) -> Option<[u64; N]> {
    let (words, rest) = record.as_chunks::<8>();
    let words: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
    words.try_into().ok().filter(|_| rest.is_empty())
}

/// Registers with names.
fn named(registers: &[(&str, u64)]) -> Vec<(String, u64)> {
    registers.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect()
}

/// Blocks of `2^n` pages, aligned to their size, that are a span of whole pages together: address and n.
fn blocks(span: Span) -> impl Iterator<Item = (u64, u32)> {
    let mut next = Some(span.first);
    std::iter::from_fn(move || {
        let first = next.filter(|first| *first <= span.last)?;
        let left = ((span.last - first) >> 12) + 1;
        let log2 = (first >> 12).trailing_zeros().min(left.ilog2()).min(51);
        next = first.checked_add(1 << (12 + log2));
        Some((first, log2))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_make_up_a_span() {
        let of = |first, last| blocks(Span { first, last }).collect::<Vec<_>>();
        assert_eq!(of(0x1000, 0x1fff), [(0x1000, 0)]);
        assert_eq!(of(0x3000, 0xafff), [(0x3000, 0), (0x4000, 2), (0x8000, 1), (0xa000, 0)]);
        assert_eq!(of(u64::MAX - 0xfff, u64::MAX), [(u64::MAX - 0xfff, 0)]);
        let all = of(0, u64::MAX);
        assert_eq!(all.len(), 2, "{all:?}");
    }
}
