//! QEMU's SMMUv3, on the virt machine of qemu-system-aarch64.
//!
//! Source: Arm IHI 0070, sections 3.5 (queues), 4 (commands), 5.2 and 5.4 (STE, CD), 6.3 (registers), 7.3 (events).

use anyhow::{Result, bail};
use stagecraft_tests::reference::tables::{ArmStage1, ArmStage2};

use crate::machine::DEVICE;
use crate::{Board, FaultRecord, Machine, Model, Tables};

const REGISTERS: u64 = 0x0905_0000;

/// Log2 of the number of commands and of events that the queues hold.
const QUEUE_BITS: u32 = 7;

/// Which stages are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stages {
    /// Stage 1 only.
    First,
    /// Stage 2 only.
    Second,
    /// Both, or one of them.
    Nested,
}

/// A device's tables: stage 1, stage 2, or both after each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SmmuTables {
    /// Stage 1.
    pub first: Option<ArmStage1>,
    /// Stage 2.
    pub second: Option<ArmStage2>,
    /// Where stage 1's context descriptor is; with two stages an address that stage 2 translates. Without it, the model writes the descriptor to a place of its own.
    pub context: Option<u64>,
}

/// The model.
#[derive(Debug)]
pub struct Smmu {
    machine: Machine,
    stages: Stages,
    tables: SmmuTables,
    produced: u32,
    consumed: u32,
}

fn size_code(bits: u32) -> Result<u64> {
    match [32, 36, 40, 42, 44, 48, 52].iter().position(|size| *size == bits) {
        Some(code) => Ok(code as u64),
        None => bail!("{bits} output bits"),
    }
}

/// TG0 and S2TG.
fn granule_code(granule: u64) -> u64 {
    match granule {
        4096 => 0,
        65536 => 1,
        _ => 2,
    }
}

/// The first four words of a context descriptor (section 5.4); the other four are zero.
///
/// # Errors
/// If a size has no encoding.
pub fn context_descriptor(config: &ArmStage1) -> Result<[u64; 4]> {
    let flag = |value: bool, position: u32| u64::from(value) << position;
    // V 31, IPS 34:32, AFFD 35, AA64 41, HD 42, HA 43, R 45, A 46, ASET 47, ASID 63:48.
    let mut cd = [1 << 31 | size_code(config.output_bits)? << 32 | 1 << 41 | 1 << 45 | 1 << 46 | 1 << 47 | 1 << 48, 0, 0, config.mair];
    cd[0] |= flag(config.big_endian, 15) | flag(config.access_flag_disabled, 35) | flag(config.hardware_dirty, 42) | flag(config.hardware_access, 43);
    match config.low {
        // EPD0.
        None => cd[0] |= 1 << 14,
        // T0SZ 5:0, TG0 7:6, SH0 13:12, TBI0 38; HAD0 and TTB0 in the second word.
        Some(half) => {
            cd[0] |= u64::from(64 - half.input_bits) | granule_code(half.granule) << 6 | 3 << 12 | flag(half.top_byte_ignored, 38);
            cd[1] = half.root | flag(half.hierarchical_disabled, 1);
        }
    }
    match config.high {
        // EPD1.
        None => cd[0] |= 1 << 30,
        // T1SZ 21:16, TG1 23:22 with an encoding of its own, SH1 29:28, TBI1 39; HAD1 and TTB1 in the third word.
        Some(half) => {
            let granule = match half.granule {
                16384 => 1,
                4096 => 2,
                _ => 3,
            };
            cd[0] |= u64::from(64 - half.input_bits) << 16 | granule << 22 | 3 << 28 | flag(half.top_byte_ignored, 39);
            cd[2] = half.root | flag(half.hierarchical_disabled, 1);
        }
    }
    // DS.
    cd[2] |= flag(config.lpa2, 58);
    Ok(cd)
}

/// The third and fourth word of an STE (section 5.2).
fn stage2_words(config: &ArmStage2) -> Result<[u64; 2]> {
    let flag = |value: bool, position: u32| u64::from(value) << position;
    // S2SL0 counts downwards from level 2 (4K) or 3 (16K, 64K); 4K's fourth value is level 3.
    let start = match (config.granule, config.start_level) {
        (4096, 3) => 3,
        (4096, level) => 2 - level,
        (_, level) => 3 - level,
    };
    if !(0..=3).contains(&start) || config.lpa2 {
        bail!("stage 2 from level {}", config.start_level);
    }
    // S2VMID 15:0, S2T0SZ 37:32, S2SL0 39:38, S2IR0 41:40, S2OR0 43:42, S2SH0 45:44, S2TG 47:46, S2PS 50:48, S2AA64 51, S2ENDI 52, S2AFFD 53, S2HD 55, S2HA 56,
    // S2R 58.
    let mut word =
        1 | u64::from(64 - config.input_bits) << 32 | (start as u64) << 38 | 1 << 40 | 1 << 42 | 3 << 44 | granule_code(config.granule) << 46;
    word |= size_code(config.output_bits)? << 48 | 1 << 51 | flag(config.big_endian, 52) | flag(config.access_flag_disabled, 53);
    word |= flag(config.hardware_dirty, 55) | flag(config.hardware_access, 56) | 1 << 58;
    Ok([word, config.root])
}

impl Smmu {
    /// Starts it.
    ///
    /// # Errors
    /// If QEMU does not start, or has no such model.
    pub fn start(stages: Stages) -> Result<Smmu> {
        // The machine gives it both stages, whatever `-global arm-smmuv3.stage` says.
        let machine = Machine::start(Board::ArmVirt, ",iommu=smmuv3", &[])?;
        let mut smmu = Smmu { machine, stages, tables: SmmuTables::default(), produced: 0, consumed: 0 };
        smmu.set_up()?;
        Ok(smmu)
    }

    fn structure(index: u64) -> u64 {
        Board::ArmVirt.control() + index * 0x1_0000
    }

    fn stream_table() -> u64 {
        Smmu::structure(0)
    }

    fn commands() -> u64 {
        Smmu::structure(1)
    }

    fn events() -> u64 {
        Smmu::structure(2)
    }

    fn context() -> u64 {
        Smmu::structure(3)
    }

    fn set_up(&mut self) -> Result<()> {
        let qtest = &mut self.machine.qtest;
        // IDR0: S2P 0, S1P 1.
        let stages = qtest.read4(REGISTERS)? & 3;
        let wanted = match self.stages {
            Stages::First => 2,
            Stages::Second => 1,
            Stages::Nested => 3,
        };
        if stages & wanted != wanted {
            bail!("IDR0.S1P and S2P are {stages:#b}, not {wanted:#b}");
        }
        // CMDQ_BASE, CMDQ_PROD, CMDQ_CONS; EVENTQ_BASE; EVENTQ_PROD and _CONS on page 1.
        qtest.write8(REGISTERS + 0x90, Smmu::commands() | u64::from(QUEUE_BITS))?;
        qtest.write4(REGISTERS + 0x98, 0)?;
        qtest.write4(REGISTERS + 0x9c, 0)?;
        qtest.write8(REGISTERS + 0xa0, Smmu::events() | u64::from(QUEUE_BITS))?;
        qtest.write4(REGISTERS + 0x1_00a8, 0)?;
        qtest.write4(REGISTERS + 0x1_00ac, 0)?;
        // STRTAB_BASE; STRTAB_BASE_CFG: linear, 2^8 entries.
        qtest.write8(REGISTERS + 0x80, Smmu::stream_table())?;
        qtest.write4(REGISTERS + 0x88, 8)?;
        // CR0: SMMUEN 0, EVENTQEN 2, CMDQEN 3.
        qtest.write4(REGISTERS + 0x20, 0b1101)?;
        let acknowledged = qtest.read4(REGISTERS + 0x24)?;
        if acknowledged != 0b1101 {
            bail!("CR0ACK is {acknowledged:#x}");
        }
        self.detach()?;
        // CMDQ_CONS: error 30:24, and nothing may be left over.
        let consumed = self.machine.qtest.read4(REGISTERS + 0x9c)?;
        if consumed != self.produced {
            bail!("commands are not executed: CMDQ_CONS is {consumed:#x}");
        }
        Ok(())
    }

    fn command(&mut self, words: [u64; 2]) -> Result<()> {
        let index = u64::from(self.produced) % (1 << QUEUE_BITS);
        self.machine.qtest.write_words(Smmu::commands() + index * 16, &words)?;
        // The bit above the index is the wrap bit.
        self.produced = (self.produced + 1) % (2 << QUEUE_BITS);
        self.machine.qtest.write4(REGISTERS + 0x98, self.produced)
    }

    fn write_entry(&mut self, tables: Option<SmmuTables>) -> Result<()> {
        // STE: V 0, Config 3:1 (4 bypass, bit 0 stage 1, bit 1 stage 2), S1ContextPtr 51:6. The second word's attributes: SHCFG 45:44 1, use incoming.
        let mut ste = [1 | 4 << 1, 1 << 44, 0, 0];
        if let Some(SmmuTables { first, second, context }) = tables {
            if let Some(config) = first {
                let descriptor = context_descriptor(&config)?;
                ste[0] |= 1 << 1 | context.unwrap_or(Smmu::context());
                if context.is_none() {
                    self.machine.qtest.write_words(Smmu::context(), &descriptor)?;
                }
            }
            if let Some(config) = second {
                ste[0] |= 2 << 1;
                [ste[2], ste[3]] = stage2_words(&config)?;
            }
        }
        self.machine.qtest.write_words(Smmu::stream_table() + DEVICE * 64, &ste)?;
        // CFGI_ALL.
        self.command([4, 31])?;
        self.invalidate()
    }
}

impl Model for Smmu {
    fn name(&self) -> String {
        format!("SMMUv3 {:?}", self.stages)
    }

    fn machine(&mut self) -> &mut Machine {
        &mut self.machine
    }

    fn set_table(&mut self, tables: Tables) -> Result<()> {
        let Tables::Smmu(config) = tables else { bail!("{} does not take {tables:?}", self.name()) };
        let possible = match self.stages {
            Stages::First => config.second.is_none(),
            Stages::Second => config.first.is_none(),
            Stages::Nested => config.first.is_none() || config.second.is_none() || config.context.is_some(),
        };
        if !possible {
            bail!("{} does not take {config:?}", self.name());
        }
        self.tables = config;
        Ok(())
    }

    fn kind(&self) -> &'static str {
        "arm-smmuv3"
    }

    fn registers(&mut self) -> Result<Vec<(&'static str, u64)>> {
        let qtest = &mut self.machine.qtest;
        let mut registers = Vec::new();
        let words = [("IDR0", 0), ("IDR1", 4), ("IDR3", 0xc), ("IDR5", 0x14), ("CR0", 0x20), ("CR2", 0x2c), ("STRTAB_BASE_CFG", 0x88)];
        for (name, offset) in words {
            registers.push((name, qtest.read4(REGISTERS + offset)?.into()));
        }
        registers.push(("STRTAB_BASE", qtest.read8(REGISTERS + 0x80)?));
        Ok(registers)
    }

    fn structures(&self) -> Vec<u64> {
        // 2^8 entries of 64 bytes, and the context descriptor.
        let stream_table = Smmu::stream_table();
        (stream_table..stream_table + 0x4000).step_by(4096).chain([Smmu::context()]).collect()
    }

    fn attach(&mut self) -> Result<()> {
        self.write_entry(Some(self.tables))
    }

    fn detach(&mut self) -> Result<()> {
        self.write_entry(None)
    }

    fn invalidate(&mut self) -> Result<()> {
        // TLBI_NSNH_ALL.
        self.command([0x30, 0])
    }

    fn fault_record(&mut self) -> Result<Option<FaultRecord>> {
        let produced = self.machine.qtest.read4(REGISTERS + 0x1_00a8)? & 0x7fff_ffff;
        if produced == self.consumed {
            return Ok(None);
        }
        // Event type 7:0 of the first word, input address in the third.
        let record = Smmu::events() + u64::from(self.consumed) % (1 << QUEUE_BITS) * 32;
        let mut words = [0; 4];
        for (word, address) in words.iter_mut().zip((record..).step_by(8)) {
            *word = self.machine.qtest.read8(address)?;
        }
        self.consumed = (self.consumed + 1) % (2 << QUEUE_BITS);
        self.machine.qtest.write4(REGISTERS + 0x1_00ac, self.consumed)?;
        Ok(Some(FaultRecord { reason: words[0] & 0xff, iova: words[2], words }))
    }
}
