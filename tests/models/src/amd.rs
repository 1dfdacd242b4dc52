//! QEMU's `amd-iommu`, on the q35 machine.
//!
//! Source: AMD I/O Virtualization Technology (IOMMU) Specification, sections 2.2.2 (device table), 2.4 (commands), 2.5 (events) and 3.4 (registers).

use anyhow::{Result, bail};

use crate::machine::DEVICE;
use crate::tables::amd::AmdTable;
use crate::{Board, FaultRecord, Machine, Model, Tables};

const REGISTERS: u64 = 0xfed8_0000;

/// Log2 of the number of commands and of events that the buffers hold.
const QUEUE_BITS: u32 = 8;

/// The model.
#[derive(Debug)]
pub struct Amd {
    machine: Machine,
    table: Option<AmdTable>,
    produced: u64,
}

impl Amd {
    /// Starts it.
    ///
    /// # Errors
    /// If QEMU does not start, or has no such model.
    pub fn start() -> Result<Amd> {
        // With pass-through it would not translate any device's requests.
        let machine = Machine::start(Board::Q35, "", &["-device", "amd-iommu,pt=off"])?;
        let mut amd = Amd { machine, table: None, produced: 0 };
        amd.set_up()?;
        Ok(amd)
    }

    fn structure(index: u64) -> u64 {
        Board::Q35.control() + index * 0x1_0000
    }

    fn device_table() -> u64 {
        Amd::structure(0)
    }

    fn commands() -> u64 {
        Amd::structure(1)
    }

    fn events() -> u64 {
        Amd::structure(2)
    }

    fn set_up(&mut self) -> Result<()> {
        let qtest = &mut self.machine.qtest;
        // Device table base (one page: 128 entries), command buffer base and event log base with the length in 59:56.
        qtest.write8(REGISTERS, Amd::device_table())?;
        qtest.write8(REGISTERS + 8, Amd::commands() | u64::from(QUEUE_BITS) << 56)?;
        qtest.write8(REGISTERS + 0x10, Amd::events() | u64::from(QUEUE_BITS) << 56)?;
        // Control: IommuEn 0, EventLogEn 2, CmdBufEn 12.
        qtest.write8(REGISTERS + 0x18, 1 | 1 << 2 | 1 << 12)?;
        // Heads and tails, once the buffers are enabled.
        for register in [0x2000, 0x2008, 0x2010, 0x2018] {
            qtest.write8(REGISTERS + register, 0)?;
        }
        self.detach()?;
        let head = self.machine.qtest.read8(REGISTERS + 0x2000)?;
        if head != self.produced {
            bail!("commands are not executed: the head is {head:#x}");
        }
        Ok(())
    }

    fn command(&mut self, words: [u64; 2]) -> Result<()> {
        self.machine.qtest.write_words(Amd::commands() + self.produced, &words)?;
        self.produced = (self.produced + 16) % (16 << QUEUE_BITS);
        self.machine.qtest.write8(REGISTERS + 0x2008, self.produced)
    }

    fn write_entry(&mut self, table: Option<AmdTable>) -> Result<()> {
        // V 0, TV 1, mode 11:9 (0 passes untranslated), root 51:12, IR 61, IW 62; domain 79:64.
        let entry = match table {
            None => 3 | 3 << 61,
            Some(config) => {
                3 | u64::from(config.mode) << 9 | config.root | u64::from(config.access.read) << 61 | u64::from(config.access.write) << 62
            }
        };
        self.machine.qtest.write_words(Amd::device_table() + DEVICE * 32, &[entry, 1, 0, 0])?;
        // INVALIDATE_DEVTAB_ENTRY.
        self.command([2 << 60 | DEVICE, 0])?;
        self.invalidate()
    }
}

impl Model for Amd {
    fn name(&self) -> String {
        "amd-iommu".to_string()
    }

    fn machine(&mut self) -> &mut Machine {
        &mut self.machine
    }

    fn set_table(&mut self, tables: Tables) -> Result<()> {
        let Tables::Amd(config) = tables else { bail!("{} does not take {tables:?}", self.name()) };
        if !(1..=6).contains(&config.mode) {
            bail!("mode {}", config.mode);
        }
        self.table = Some(config);
        Ok(())
    }

    // See `known::AMD_EVENTS`.
    fn records(&self) -> bool {
        false
    }

    fn kind(&self) -> &'static str {
        "amd-vi"
    }

    fn registers(&mut self) -> Result<Vec<(&'static str, u64)>> {
        let qtest = &mut self.machine.qtest;
        Ok(vec![
            ("DEVTAB_BASE", qtest.read8(REGISTERS)?),
            ("CONTROL", qtest.read8(REGISTERS + 0x18)?),
            ("EXT_FEATURES", qtest.read8(REGISTERS + 0x30)?),
        ])
    }

    fn structures(&self) -> Vec<u64> {
        vec![Amd::device_table()]
    }

    fn attach(&mut self) -> Result<()> {
        self.write_entry(self.table)
    }

    fn detach(&mut self) -> Result<()> {
        self.write_entry(None)
    }

    fn invalidate(&mut self) -> Result<()> {
        // INVALIDATE_IOMMU_ALL.
        self.command([8 << 60, 0])
    }

    fn fault_record(&mut self) -> Result<Option<FaultRecord>> {
        // See `known::AMD_EVENTS`. The model does not show its event tail, so the log always starts anew: code 63:60 of the first word, address in the second.
        let record = self.machine.qtest.read8(Amd::events())?;
        if record == 0 {
            return Ok(None);
        }
        let iova = self.machine.qtest.read8(Amd::events() + 8)?;
        self.machine.qtest.fill(Amd::events(), 16 << QUEUE_BITS, 0)?;
        self.machine.qtest.write8(REGISTERS + 0x2018, 0)?;
        Ok(Some(FaultRecord { reason: record >> 60, iova, words: [record, iova, 0, 0] }))
    }
}
