//! QEMU's IOMMU models as judges of I/O page tables.
//!
//! Nobody who works on Stagecraft wrote these models. A [`Model`] is a QEMU machine without any guest: tables are written into its RAM, the IOMMU's registers are
//! programmed, and the `edu` device does DMA through it. Each [`Outcome`] says which address a request reached, or how it failed.
//!
//! | test | what is judged |
//! |---|---|
//! | `vtd`, `smmu`, `riscv`, `amd` | random address spaces of independent builders ([`spaces`]): the [`production`] engine finds them from the model's registers and memory, and says the same as the model of every request |
//! | `conversions` | every format into every other: the same request has the same outcome on the source's model and, converted, on the target's |
//! | `entries` | every bit of every kind of entry at every level, and random ones ([`entries`]), of one stage and of each of two: where the model faults the engine faults, where it translates the engine has the same address |
//! | `marks` | accessed and dirty marks in entries of all levels, after the same DMA: the model's memory, the engine's and the reference's are the same |
//! | `known` | the errors of the models that the other tests stay away from are still there, every one of them |
//! | `install` | `install-qemu` on machines that are made up |
//!
//! What the models get wrong is one list, [`known`]; whatever is not asked because of that names an entry of it.
//!
//! `install-qemu` beside this crate's manifest installs what is needed. Where QEMU is missing, too old or without the models, the tests say `SKIPPED` and why, and pass;
//! with `CI` in the environment they fail.
//! `STAGECRAFT_SEED` and `STAGECRAFT_ROUNDS` choose the random address spaces; both are printed. A long run, of some hours:
//!
//! ```sh
//! STAGECRAFT_SEED=1000 STAGECRAFT_ROUNDS=1000 cargo test -p stagecraft-models -- --nocapture
//! ```
//!
//! The models are: [`vtd::Vtd`], [`smmu::Smmu`], [`riscv::Riscv`], [`amd::Amd`].

#![forbid(unsafe_code)]

pub mod amd;
pub mod conversion;
pub mod entries;
pub mod judge;
pub mod known;
pub mod machine;
pub mod production;
pub mod qtest;
pub mod riscv;
pub mod smmu;
pub mod spaces;
pub mod tables;
pub mod vtd;

pub use machine::{Board, Machine, available};
pub use stagecraft_tests::reference::Access;
pub use stagecraft_tests::reference::snapshot::Memory;

use anyhow::Result;
use stagecraft_tests::reference::snapshot::{Device, MemoryRange, Snapshot};
use stagecraft_tests::reference::tables::TableConfig;

use riscv::RiscvTables;
use smmu::SmmuTables;
use tables::amd::AmdTable;

/// One request of the device: eight bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Where; a multiple of eight.
    pub iova: u64,
    /// The device writes.
    pub write: bool,
    /// The address that it should reach. Only makes the answer quicker.
    pub expected: Option<u64>,
}

/// What the model says of a request that it refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultRecord {
    /// The architecture's number of the reason or event.
    pub reason: u64,
    /// The IOVA in the record.
    pub iova: u64,
    /// The whole record; words that the architecture's records do not have are zero.
    pub words: [u64; 4],
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It reached this guest-physical address.
    Reached(u64),
    /// It was refused, with a record.
    Fault(FaultRecord),
    /// It was refused without a record: a read gave zeros, a write arrived in no tagged page.
    Nothing,
    /// A read gave this, which is not in any tagged page.
    Elsewhere(u64),
}

/// A device's tables, as each model is told of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tables {
    /// VT-d, either stage.
    Vtd(TableConfig),
    /// SMMUv3.
    Smmu(SmmuTables),
    /// RISC-V.
    Riscv(RiscvTables),
    /// AMD v1.
    Amd(AmdTable),
}

/// An IOMMU model with a device behind it.
pub trait Model {
    /// A name for messages.
    fn name(&self) -> String;

    /// The machine that it lives in.
    fn machine(&mut self) -> &mut Machine;

    /// Says which tables [`Model::attach`] puts in front of the device. Their pages are written with [`Model::write_page`].
    ///
    /// # Errors
    /// If the model cannot be told of such tables.
    fn set_table(&mut self, tables: Tables) -> Result<()>;

    /// Translates the device's requests, with nothing cached from before.
    ///
    /// # Errors
    /// If QEMU is lost; the same for all that follow.
    fn attach(&mut self) -> Result<()>;

    /// Lets the device's requests pass untranslated.
    #[allow(clippy::missing_errors_doc)]
    fn detach(&mut self) -> Result<()>;

    /// Forgets cached translations. Done before every request: a model that finds a cached translation without the permission refuses without a record.
    #[allow(clippy::missing_errors_doc)]
    fn invalidate(&mut self) -> Result<()>;

    /// Takes the oldest fault record.
    #[allow(clippy::missing_errors_doc)]
    fn fault_record(&mut self) -> Result<Option<FaultRecord>>;

    /// Whether every refused request leaves a record.
    fn records(&self) -> bool {
        true
    }

    /// What a snapshot calls such a unit.
    fn kind(&self) -> &'static str;

    /// The registers that decide about translation, by their architectural names, as they stand.
    #[allow(clippy::missing_errors_doc)]
    fn registers(&mut self) -> Result<Vec<(&'static str, u64)>>;

    /// The pages of the device's structures.
    fn structures(&self) -> Vec<u64>;

    /// What a guest with these tables would look like from outside: registers, memory map, and the pages of structures and tables, all read back from the machine.
    #[allow(clippy::missing_errors_doc)]
    fn snapshot(&mut self) -> Result<Snapshot> {
        self.attach()?;
        let mut snapshot = Snapshot { description: self.name(), unit_kind: self.kind().to_string(), ..Snapshot::default() };
        snapshot.registers = self.registers()?.into_iter().map(|(name, value)| (name.to_string(), value)).collect();
        snapshot.devices.push(Device { label: "0000:00:04.0".to_string(), id: machine::DEVICE });
        let pages: Vec<u64> = self.structures().into_iter().chain(self.machine().tables()).collect();
        for page in pages {
            let bytes = self.machine().qtest.read(page, 4096)?;
            snapshot.memory.pages.insert(page, std::array::from_fn(|index| bytes[index]).into());
        }
        self.detach()?;
        let board = self.machine().board();
        let range = |kind: &str, range: std::ops::Range<u64>| MemoryRange { kind: kind.to_string(), first: range.start, last: range.end - 1 };
        snapshot.map = board.ram().into_iter().map(|ram| range("ram", ram)).collect();
        snapshot.map.push(range("device", board.device_memory()));
        Ok(snapshot)
    }

    /// Writes a page of a table at its guest-physical address.
    ///
    /// # Errors
    /// Also if there is no RAM.
    fn write_page(&mut self, address: u64, bytes: &[u8; 4096]) -> Result<()> {
        self.machine().write_page(address, bytes)
    }

    /// Replaces all tables by these pages.
    ///
    /// # Errors
    /// Also if there is no RAM.
    fn write_memory(&mut self, memory: &Memory) -> Result<()> {
        self.machine().clear_pages()?;
        memory.pages.iter().try_for_each(|(address, bytes)| self.write_page(*address, bytes))
    }

    /// Makes a page recognisable as a target. Those that hold tables, or are not RAM, stay as they are.
    #[allow(clippy::missing_errors_doc)]
    fn tag_page(&mut self, address: u64) -> Result<()> {
        self.machine().tag_page(address)
    }

    /// One request.
    #[allow(clippy::missing_errors_doc)]
    fn dma(&mut self, iova: u64, write: bool) -> Result<Outcome> {
        Ok(self.dma_many(&[Probe { iova, write, expected: None }])?[0])
    }

    /// Requests one after the other. The tables are attached meanwhile, and detached afterwards.
    ///
    /// # Errors
    /// If QEMU is lost, or the device does not do what it should when it is not translated.
    fn dma_many(&mut self, probes: &[Probe]) -> Result<Vec<Outcome>> {
        let mut outcomes = Vec::with_capacity(probes.len());
        for chunk in probes.chunks(machine::SLOTS) {
            self.detach()?;
            self.machine().fill_buffer()?;
            self.attach()?;
            while self.fault_record()?.is_some() {}
            let first = outcomes.len();
            let mut lost = false;
            for (slot, probe) in chunk.iter().enumerate() {
                self.invalidate()?;
                if probe.write {
                    self.machine().device_write(probe.iova, slot)?;
                } else {
                    self.machine().device_read(probe.iova, slot)?;
                }
                let record = self.fault_record()?;
                // One request can leave several.
                while record.is_some() && self.fault_record()?.is_some() {}
                let arrived = match probe.expected.filter(|_| probe.write && record.is_none()) {
                    Some(address) => self.machine().has_arrived(slot, address)?,
                    None => false,
                };
                outcomes.push(match (probe.expected, record) {
                    (Some(address), None) if arrived => Outcome::Reached(address),
                    (_, Some(record)) => Outcome::Fault(record),
                    (_, None) => {
                        lost |= probe.write;
                        Outcome::Nothing
                    }
                });
            }
            self.detach()?;
            let written = if lost { self.machine().find_written()? } else { Vec::new() };
            for (slot, address) in written {
                if let Some(outcome) = outcomes.get_mut(first + slot).filter(|outcome| **outcome == Outcome::Nothing) {
                    *outcome = Outcome::Reached(address);
                }
            }
            let words = self.machine().read_buffer()?;
            for ((probe, outcome), word) in chunk.iter().zip(&mut outcomes[first..]).zip(words) {
                if !probe.write && *outcome == Outcome::Nothing {
                    *outcome = match Machine::tag_address(word) {
                        Some(address) => Outcome::Reached(address),
                        None if word == 0 => Outcome::Nothing,
                        None => Outcome::Elsewhere(word),
                    };
                }
            }
        }
        Ok(outcomes)
    }
}
