//! QEMU's `intel-iommu`, on the q35 machine.
//!
//! Source: Intel Virtualization Technology for Directed I/O, sections 9.1 to 9.6 (root, context and PASID entries) and 11.4 (registers).

use anyhow::{Result, bail};
use stagecraft_tests::reference::tables::TableConfig;

use crate::machine::DEVICE;
use crate::{Board, FaultRecord, Machine, Model, Tables};

const REGISTERS: u64 = 0xfed9_0000;

/// How translation is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Legacy context entries; second stage.
    Legacy,
    /// Scalable mode; second stage.
    ScalableSecond,
    /// Scalable mode; first stage.
    ScalableFirst,
}

/// The model.
#[derive(Debug)]
pub struct Vtd {
    machine: Machine,
    mode: Mode,
    address_bits: u32,
    table: Option<TableConfig>,
    iotlb: u64,
    faults: u64,
}

impl Vtd {
    /// Starts it. `address_bits` is 39 or 48, or 57 where the model has that: the width of IOVAs and, in this model, also that of physical addresses.
    ///
    /// # Errors
    /// If QEMU does not start, or has no such model.
    pub fn start(mode: Mode, address_bits: u32) -> Result<Vtd> {
        let options = match mode {
            Mode::Legacy => "",
            Mode::ScalableSecond => ",x-scalable-mode=on",
            Mode::ScalableFirst => ",x-scalable-mode=on,x-flts=on",
        };
        let device = format!("intel-iommu,aw-bits={address_bits}{options}");
        let machine = Machine::start(Board::Q35, "", &["-device", &device])?;
        let mut vtd = Vtd { machine, mode, address_bits, table: None, iotlb: 0, faults: 0 };
        vtd.set_up()?;
        Ok(vtd)
    }

    fn structure(&self, index: u64) -> u64 {
        Board::Q35.control() + index * 4096
    }

    fn root(&self) -> u64 {
        self.structure(0)
    }

    fn context(&self) -> u64 {
        self.structure(1)
    }

    fn pasid_directory(&self) -> u64 {
        self.structure(2)
    }

    fn pasid_table(&self) -> u64 {
        self.structure(3)
    }

    fn scalable(&self) -> bool {
        self.mode != Mode::Legacy
    }

    fn set_up(&mut self) -> Result<()> {
        let (root, context, directory, table) = (self.root(), self.context(), self.pasid_directory(), self.pasid_table());
        let scalable = self.scalable();
        let qtest = &mut self.machine.qtest;
        let capabilities = qtest.read8(REGISTERS + 8)?;
        let extended = qtest.read8(REGISTERS + 0x10)?;
        // CAP.FRO 33:24 and ECAP.IRO 17:8, both in 16 bytes. ECAP.PT is bit 6.
        self.faults = REGISTERS + (capabilities >> 24 & 0x3ff) * 16;
        self.iotlb = REGISTERS + (extended >> 8 & 0x3ff) * 16;
        if extended >> 6 & 1 == 0 {
            bail!("the model has no pass-through: ECAP is {extended:#x}");
        }
        // Bus 0; devices 0 to 15 are in the lower table of a scalable-mode root entry.
        qtest.write_words(root, &[context | 1, 0])?;
        if scalable {
            // Scalable-mode context entry: present, PASID directory of 2^7 entries; RID_PASID 0. The directory's first entry: present.
            qtest.write_words(context + DEVICE * 32, &[directory | 1, 0, 0, 0])?;
            qtest.write8(directory, table | 1)?;
        }
        // RTADDR with TTM 11:10, GCMD.SRTP bit 30, GCMD.TE bit 31.
        qtest.write8(REGISTERS + 0x20, root | u64::from(scalable) << 10)?;
        qtest.write4(REGISTERS + 0x18, 1 << 30)?;
        self.write_entry(None)?;
        self.machine.qtest.write4(REGISTERS + 0x18, 1 << 31)?;
        let status = self.machine.qtest.read4(REGISTERS + 0x1c)?;
        if status >> 30 != 3 {
            bail!("translation is not enabled: GSTS is {status:#x}");
        }
        self.invalidate_all()
    }

    /// Context or PASID entry: pass-through, or a table.
    fn write_entry(&mut self, table: Option<TableConfig>) -> Result<()> {
        // AW: 1 is three levels, 2 is four, 3 is five. Pass-through wants the largest width that there is.
        let widest = u64::from(self.address_bits - 30) / 9;
        const DOMAIN: u64 = 1;
        if !self.scalable() {
            // Context entry: present, translation type 3:2 (2 is pass-through), table; AW 66:64, domain 87:72.
            let words = match table {
                None => [1 | 2 << 2, widest | DOMAIN << 8],
                Some(TableConfig::VtdSecond(config)) => [config.root | 1, u64::from(config.levels - 2) | DOMAIN << 8],
                Some(other) => bail!("{} in legacy mode", other.format()),
            };
            return self.machine.qtest.write_words(self.context() + DEVICE * 16, &words);
        }
        // Scalable-mode PASID entry: present, AW 4:2, PGTT 8:6 (1 first stage, 2 second stage, 4 pass-through), second-stage table; domain 79:64; FSPM 131:130
        // (0 is four levels), first-stage table 191:140.
        let words = match table {
            None => [1 | widest << 2 | 4 << 6, DOMAIN, 0],
            Some(TableConfig::VtdSecond(config)) => [config.root | 1 | u64::from(config.levels - 2) << 2 | 2 << 6, DOMAIN, 0],
            Some(TableConfig::VtdFirst(config)) => [1 | widest << 2 | 1 << 6, DOMAIN, config.root | u64::from(config.levels - 4) << 2],
            Some(other) => bail!("{} in scalable mode", other.format()),
        };
        self.machine.qtest.write_words(self.pasid_table(), &words)
    }

    /// Also forgets context and PASID entries. CCMD: go, global.
    fn invalidate_all(&mut self) -> Result<()> {
        self.machine.qtest.write8(REGISTERS + 0x28, 1 << 63 | 1 << 61)?;
        self.invalidate()
    }
}

impl Model for Vtd {
    fn name(&self) -> String {
        format!("intel-iommu {:?}, {} bits", self.mode, self.address_bits)
    }

    fn machine(&mut self) -> &mut Machine {
        &mut self.machine
    }

    fn set_table(&mut self, tables: Tables) -> Result<()> {
        let Tables::Vtd(config) = tables else { bail!("{} does not take {tables:?}", self.name()) };
        match (config, self.mode) {
            (TableConfig::VtdSecond(config), Mode::Legacy | Mode::ScalableSecond)
                if config.levels <= 4 && self.address_bits >= 9 * config.levels + 12 => {}
            (TableConfig::VtdFirst(config), Mode::ScalableFirst) if config.levels == 4 => {}
            _ => bail!("{} does not take {config:?}", self.name()),
        }
        self.table = Some(config);
        Ok(())
    }

    fn kind(&self) -> &'static str {
        "intel-vtd"
    }

    fn registers(&mut self) -> Result<Vec<(&'static str, u64)>> {
        let qtest = &mut self.machine.qtest;
        Ok(vec![
            ("CAP", qtest.read8(REGISTERS + 8)?),
            ("ECAP", qtest.read8(REGISTERS + 0x10)?),
            ("GSTS", qtest.read4(REGISTERS + 0x1c)?.into()),
            ("RTADDR", qtest.read8(REGISTERS + 0x20)?),
        ])
    }

    fn structures(&self) -> Vec<u64> {
        let used = if self.scalable() { 4 } else { 2 };
        (0..used).map(|index| self.structure(index)).collect()
    }

    fn attach(&mut self) -> Result<()> {
        self.write_entry(self.table)?;
        self.invalidate_all()
    }

    fn detach(&mut self) -> Result<()> {
        self.write_entry(None)?;
        self.invalidate_all()
    }

    fn invalidate(&mut self) -> Result<()> {
        // IOTLB: go, global.
        self.machine.qtest.write8(self.iotlb + 8, 1 << 63 | 1 << 60)
    }

    fn fault_record(&mut self) -> Result<Option<FaultRecord>> {
        // There is one record. Upper word: F 63 (writing 1 clears it), reason 39:32. Lower word: the page.
        let upper = self.machine.qtest.read8(self.faults + 8)?;
        if upper >> 63 == 0 {
            return Ok(None);
        }
        let iova = self.machine.qtest.read8(self.faults)?;
        self.machine.qtest.write8(self.faults + 8, 1 << 63)?;
        // FSTS: overflow is bit 0.
        self.machine.qtest.write4(REGISTERS + 0x34, 1)?;
        Ok(Some(FaultRecord { reason: upper >> 32 & 0xff, iova, words: [iova, upper, 0, 0] }))
    }
}
