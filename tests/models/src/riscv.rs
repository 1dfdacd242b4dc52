//! QEMU's `riscv-iommu-pci`, on the virt machine of qemu-system-riscv64.
//!
//! Source: RISC-V IOMMU Architecture Specification 1.0, chapters 2 (device context), 3 (queues) and 5 (registers).

use anyhow::{Result, bail};

use crate::machine::DEVICE;
use crate::tables::riscv::RiscvTable;
use crate::{Board, FaultRecord, Machine, Model, Tables};

const SLOT: u64 = 3;

/// Log2 of the number of commands and of faults that the queues hold.
const QUEUE_BITS: u32 = 7;

/// A device's tables: a first stage, a second stage, or both after each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RiscvTables {
    /// First stage.
    pub first: Option<RiscvTable>,
    /// Second stage.
    pub second: Option<RiscvTable>,
}

/// The model.
#[derive(Debug)]
pub struct Riscv {
    machine: Machine,
    registers: u64,
    /// Bytes in a device context.
    context_size: u64,
    tables: RiscvTables,
    produced: u32,
    consumed: u32,
}

/// PPN 53:10 of queue and directory registers.
fn ppn(address: u64) -> u64 {
    address >> 12 << 10
}

/// iohgatp and fsc: MODE 63:60 (8, 9, 10 are 3, 4, 5 levels), PPN 43:0.
fn table_pointer(table: &RiscvTable) -> u64 {
    u64::from(table.levels + 5) << 60 | table.root >> 12
}

impl Riscv {
    /// Starts it.
    ///
    /// # Errors
    /// If QEMU does not start, or has no such model.
    pub fn start() -> Result<Riscv> {
        let device = format!("riscv-iommu-pci,addr={SLOT}");
        let machine = Machine::start(Board::RiscvVirt, "", &["-device", &device])?;
        let mut riscv = Riscv { machine, registers: 0, context_size: 0, tables: RiscvTables::default(), produced: 0, consumed: 0 };
        riscv.set_up()?;
        Ok(riscv)
    }

    fn structure(index: u64) -> u64 {
        Board::RiscvVirt.control() + index * 0x1_0000
    }

    fn directory() -> u64 {
        Riscv::structure(0)
    }

    fn commands() -> u64 {
        Riscv::structure(1)
    }

    fn faults() -> u64 {
        Riscv::structure(2)
    }

    fn set_up(&mut self) -> Result<()> {
        self.registers = self.machine.enable(SLOT)?;
        let registers = self.registers;
        let qtest = &mut self.machine.qtest;
        // Capabilities: Sv39, Sv48, Sv57 11:9, the same x4 19:17, MSI_FLAT 22 (device contexts have 64 bytes instead of 32).
        let capabilities = qtest.read8(registers)?;
        if capabilities >> 9 & 7 != 7 || capabilities >> 17 & 7 != 7 {
            bail!("the model lacks table formats: capabilities {capabilities:#x}");
        }
        self.context_size = if capabilities >> 22 & 1 == 1 { 64 } else { 32 };
        // CQB, CQT, CQCSR; FQB, FQH, FQCSR. The size is log2, minus one.
        qtest.write8(registers + 0x18, ppn(Riscv::commands()) | u64::from(QUEUE_BITS - 1))?;
        qtest.write4(registers + 0x24, 0)?;
        qtest.write4(registers + 0x48, 1)?;
        qtest.write8(registers + 0x28, ppn(Riscv::faults()) | u64::from(QUEUE_BITS - 1))?;
        qtest.write4(registers + 0x30, 0)?;
        qtest.write4(registers + 0x4c, 1)?;
        // Active is bit 16.
        for register in [0x48, 0x4c] {
            let status = qtest.read4(registers + register)?;
            if status >> 16 & 1 == 0 {
                bail!("a queue is not active: its register at {register:#x} is {status:#x}");
            }
        }
        // DDTP: one level.
        qtest.write8(registers + 0x10, ppn(Riscv::directory()) | 2)?;
        self.detach()?;
        let head = self.machine.qtest.read4(registers + 0x20)?;
        if head != self.produced {
            let status = self.machine.qtest.read4(registers + 0x48)?;
            bail!("commands are not executed: CQH is {head:#x}, CQCSR {status:#x}");
        }
        Ok(())
    }

    fn command(&mut self, words: [u64; 2]) -> Result<()> {
        self.machine.qtest.write_words(Riscv::commands() + u64::from(self.produced) * 16, &words)?;
        self.produced = (self.produced + 1) % (1 << QUEUE_BITS);
        self.machine.qtest.write4(self.registers + 0x24, self.produced)
    }

    fn write_context(&mut self, tables: RiscvTables) -> Result<()> {
        // tc (V is bit 0), iohgatp, ta, fsc.
        let second = tables.second.as_ref().map_or(0, table_pointer);
        let first = tables.first.as_ref().map_or(0, table_pointer);
        self.machine.qtest.write_words(Riscv::directory() + DEVICE * self.context_size, &[1, second, 0, first])?;
        // IODIR.INVAL_DDT for all devices.
        self.command([3, 0])?;
        self.invalidate()
    }
}

impl Model for Riscv {
    fn name(&self) -> String {
        "riscv-iommu-pci".to_string()
    }

    fn machine(&mut self) -> &mut Machine {
        &mut self.machine
    }

    fn set_table(&mut self, tables: Tables) -> Result<()> {
        let Tables::Riscv(config) = tables else { bail!("{} does not take {tables:?}", self.name()) };
        if config.first.is_some_and(|table| table.second) || config.second.is_some_and(|table| !table.second) {
            bail!("the wrong stage: {config:?}");
        }
        self.tables = config;
        Ok(())
    }

    fn kind(&self) -> &'static str {
        "riscv-iommu"
    }

    fn registers(&mut self) -> Result<Vec<(&'static str, u64)>> {
        let (registers, qtest) = (self.registers, &mut self.machine.qtest);
        Ok(vec![("CAPABILITIES", qtest.read8(registers)?), ("FCTL", qtest.read4(registers + 8)?.into()), ("DDTP", qtest.read8(registers + 0x10)?)])
    }

    fn structures(&self) -> Vec<u64> {
        vec![Riscv::directory()]
    }

    fn attach(&mut self) -> Result<()> {
        self.write_context(self.tables)
    }

    fn detach(&mut self) -> Result<()> {
        self.write_context(RiscvTables::default())
    }

    fn invalidate(&mut self) -> Result<()> {
        // IOTINVAL.VMA for all host address spaces, and with GV (33) for the guest's with GSCID 0; IOTINVAL.GVMA for all.
        self.command([1, 0])?;
        self.command([1 | 1 << 33, 0])?;
        self.command([1 | 1 << 7, 0])
    }

    fn fault_record(&mut self) -> Result<Option<FaultRecord>> {
        let produced = self.machine.qtest.read4(self.registers + 0x34)?;
        if produced == self.consumed {
            return Ok(None);
        }
        // CAUSE 11:0 of the first word, iotval in the third.
        let record = Riscv::faults() + u64::from(self.consumed) * 32;
        let mut words = [0; 4];
        for (word, address) in words.iter_mut().zip((record..).step_by(8)) {
            *word = self.machine.qtest.read8(address)?;
        }
        self.consumed = (self.consumed + 1) % (1 << QUEUE_BITS);
        self.machine.qtest.write4(self.registers + 0x30, self.consumed)?;
        Ok(Some(FaultRecord { reason: words[0] & 0xfff, iova: words[2], words }))
    }
}
