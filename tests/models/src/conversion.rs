//! Conversion by the production engine, from any model's tables to any other's, and what may be lost on the way.

use std::ops::Range;

use anyhow::{Result, bail};
use stagecraft::convert::{ConvertedTable, Target, convert};
use stagecraft::plugin::{Settings, TableConfig};
use stagecraft::table::Loss;
use stagecraft_tests::reference::generate::Rng;
use stagecraft_tests::reference::snapshot::{MemoryRange, Snapshot};
use stagecraft_tests::reference::tables::{self as reference, ArmHalf, ArmStage1, ArmStage2, VtdFirst, VtdSecond};
use stagecraft_tests::reference::{Run, merge};

use crate::production::Production;
use crate::riscv::RiscvTables;
use crate::smmu::SmmuTables;
use crate::spaces::INTERRUPTS;
use crate::tables::amd::AmdTable;
use crate::tables::riscv::RiscvTable;
use crate::{Access, Memory, Tables};

/// Where converted tables go: RAM in every machine, and a hole in the memory map that the engine is told of.
pub const CONVERTED: Range<u64> = 0x1_4000_0000..0x1_4400_0000;

/// A format to convert to, with the settings that its model needs, and what it can say.
#[derive(Clone, Debug)]
pub struct Goal {
    /// The format and the settings that are asked for.
    pub target: Target,
    /// IOVAs: the first and the last of each range.
    pub windows: Vec<(u64, u64)>,
    /// Addresses have so many bits.
    pub output_bits: u32,
    /// Bytes of the smallest page.
    pub granule: u64,
    /// Leaves may allow writes and no reads.
    pub write_only: bool,
}

fn goal(format: &str, settings: &[(&str, u64)], windows: Vec<(u64, u64)>) -> Goal {
    let settings: Settings = settings.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
    let target = Target { settings, table_bytes: CONVERTED.end - CONVERTED.start, ..Target::new(format) };
    Goal { target, windows, output_bits: 48, granule: 4096, write_only: false }
}

/// From zero upwards.
fn plain(bits: u32) -> Vec<(u64, u64)> {
    vec![(0, u64::MAX >> (64 - bits))]
}

/// Without the addresses at which an x86 unit has interrupts.
fn x86(windows: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    let part = |first: u64, last: u64| (first <= last).then_some((first, last));
    let parts = |(first, last): (u64, u64)| [part(first, last.min(INTERRUPTS.start - 1)), part(first.max(INTERRUPTS.end), last)];
    windows.into_iter().flat_map(parts).flatten().collect()
}

/// From zero upwards and from the last address downwards.
fn two_halves(bits: u32) -> Vec<(u64, u64)> {
    vec![(0, (1 << bits) - 1), (u64::MAX << bits, u64::MAX)]
}

/// VT-d second stage: three or four levels.
pub fn vtd_second(rng: &mut Rng) -> Goal {
    let levels = rng.pick(&[3, 4, 4]);
    Goal { write_only: true, ..goal("intel-vtd/second-stage", &[("levels", levels)], x86(plain(12 + 9 * levels as u32))) }
}

/// VT-d first stage: four levels.
pub fn vtd_first() -> Goal {
    goal("intel-vtd/first-stage", &[("levels", 4)], x86(two_halves(47)))
}

/// AMD v1: any number of levels, with and without sizes between those of the levels.
pub fn amd(rng: &mut Rng) -> Goal {
    let levels = rng.pick(&[3, 4, 5, 6]);
    let bits = if levels == 6 { 64 } else { 12 + 9 * levels as u32 };
    Goal { output_bits: 52, write_only: true, ..goal("amd-vi/v1", &[("levels", levels), ("next-level-7", rng.below(2))], x86(plain(bits))) }
}

/// SMMUv3 stage 1 with a granule. The model has 44 address bits.
pub fn smmu_first(granule: u64, rng: &mut Rng) -> Goal {
    let output_bits = rng.pick(&[36, 36, 40, 44]);
    let input_bits = rng.pick(&[36, 42, 48, 48]);
    let names = ["granule", "input-bits", "granule-high", "input-bits-high", "output-bits"];
    let values = [granule, input_bits, granule, input_bits, output_bits];
    let settings: Vec<(&str, u64)> = names.into_iter().zip(values).collect();
    Goal { output_bits: output_bits as u32, granule, ..goal("arm-smmuv3/stage1", &settings, two_halves(input_bits as u32)) }
}

/// SMMUv3 stage 2 with a granule.
pub fn smmu_second(granule: u64, rng: &mut Rng) -> Goal {
    let output_bits = rng.pick(&[40, 44, 44]);
    // No wider than the output; and as many levels as it takes without concatenated tables (see `known::SMMU_CONCATENATED`).
    let input_bits = rng.pick(&[36, 40, 44]).min(output_bits);
    let settings = [("granule", granule), ("input-bits", input_bits), ("output-bits", output_bits)];
    let goal = goal("arm-smmuv3/stage2", &settings, plain(input_bits as u32));
    Goal { output_bits: output_bits as u32, granule, write_only: true, ..goal }
}

/// RISC-V first stage.
pub fn riscv_first(levels: u32) -> Goal {
    Goal { output_bits: 56, ..goal("riscv-iommu/first-stage", &[("levels", levels.into())], two_halves(11 + 9 * levels)) }
}

/// RISC-V second stage.
pub fn riscv_second(levels: u32) -> Goal {
    Goal { output_bits: 56, ..goal("riscv-iommu/second-stage", &[("levels", levels.into())], plain(14 + 9 * levels)) }
}

impl Goal {
    /// What the format cannot say of one address, from what is mapped around it.
    pub fn loss(&self, truth: &[Run], iova: u64) -> Option<Loss> {
        let run = truth.iter().find(|run| run.iova <= iova && iova - run.iova < run.size)?;
        if !self.windows.iter().any(|(first, last)| (*first..=*last).contains(&iova)) {
            return Some(Loss::InputRange);
        }
        if run.access == Access::W && !self.write_only {
            return Some(Loss::Permission);
        }
        let address = run.address + (iova - run.iova);
        let (first, last) = (iova & !(self.granule - 1), iova | (self.granule - 1));
        let whole = first >= run.iova && last - run.iova < run.size;
        if !whole || (iova ^ address) & (self.granule - 1) != 0 {
            return Some(Loss::Granule);
        }
        (address >> self.output_bits != 0).then_some(Loss::OutputRange)
    }

    /// How many bytes are lost of each kind, if the smallest page is 4 KiB.
    fn lost_bytes(&self, truth: &[Run]) -> [(Loss, u128); 3] {
        let mut lost = [(Loss::InputRange, 0), (Loss::Permission, 0), (Loss::OutputRange, 0)];
        for run in truth {
            let mut inside = 0;
            for (first, last) in &self.windows {
                let (first, last) = (run.iova.max(*first), (run.iova + (run.size - 1)).min(*last));
                if first > last {
                    continue;
                }
                let size = u128::from(last - first) + 1;
                inside += size;
                if run.access == Access::W && !self.write_only {
                    lost[1].1 += size;
                } else {
                    let address = u128::from(run.address + (first - run.iova));
                    lost[2].1 += (address + size).saturating_sub(address.max(1 << self.output_bits));
                }
            }
            lost[0].1 += u128::from(run.size) - inside;
        }
        lost
    }

    /// Whether the engine counted what is lost, as far as that does not depend on how the source's pages are cut. It may count more than the requests of the
    /// models can notice: pages for execution only or for privileged requests; not so if `exact`.
    ///
    /// # Errors
    /// If it did not.
    pub fn check_losses(&self, table: &ConvertedTable, truth: &[Run], exact: bool) -> Result<()> {
        if self.granule != 4096 {
            return Ok(());
        }
        let lost = self.lost_bytes(truth);
        for (loss, bytes) in lost {
            let counted = table.built.losses.get(loss).map_or(0, |count| count.bytes);
            if counted < bytes || (exact && counted > bytes) {
                bail!("the engine counts {counted:#x} bytes lost as {loss}, and there are {bytes:#x}");
            }
        }
        if exact && table.built.losses.refused_bytes() != lost.iter().map(|(_, bytes)| bytes).sum() {
            bail!("the engine refuses more than that: {:?}", table.built.losses);
        }
        Ok(())
    }

    /// IOVAs that are mapped and lose nothing; or, if `lost`, something.
    pub fn sample(&self, truth: &[Run], lost: bool, rng: &mut Rng, count: usize) -> Vec<u64> {
        let is_wanted = |iova: u64| self.loss(truth, iova).is_some() == lost;
        // The first whole page of the target in each run.
        let starts = truth.iter().map(|run| (*run, run.iova.checked_next_multiple_of(self.granule).unwrap_or(run.iova)));
        let candidates: Vec<(Run, u64)> = starts.filter(|(run, start)| start - run.iova < run.size && is_wanted(*start)).collect();
        if candidates.is_empty() {
            return Vec::new();
        }
        let one = |rng: &mut Rng| {
            let (run, start) = rng.pick(&candidates);
            let inside = run.iova + rng.below(run.size / 8) * 8;
            if is_wanted(inside) { inside } else { start }
        };
        (0..count).map(|_| one(rng)).collect()
    }
}

/// A converted table, for a model.
#[derive(Debug)]
pub struct Converted {
    /// The table.
    pub tables: Tables,
    /// Its pages.
    pub memory: Memory,
    /// What the engine says of it.
    pub table: ConvertedTable,
}

/// Leaves out of a snapshot's RAM what converted tables will take.
pub fn reserve(snapshot: &mut Snapshot) {
    let mut map = Vec::new();
    for range in std::mem::take(&mut snapshot.map) {
        if range.first < CONVERTED.start && range.last >= CONVERTED.end {
            map.push(MemoryRange { last: CONVERTED.start - 1, ..range.clone() });
            map.push(MemoryRange { first: CONVERTED.end, ..range });
        } else {
            map.push(range);
        }
    }
    snapshot.map = map;
}

/// The parts of runs whose addresses are in a snapshot's memory map: no more may be converted.
pub fn in_memory(truth: &[Run], map: &[MemoryRange]) -> Vec<Run> {
    let mut clipped = Vec::new();
    for run in truth {
        for range in map {
            let (first, last) = (run.address.max(range.first), (run.address + (run.size - 1)).min(range.last));
            if first <= last {
                clipped.push(Run { iova: run.iova + (first - run.address), address: first, size: last - first + 1, access: run.access });
            }
        }
    }
    merge(clipped)
}

/// Has the engine convert what a model's device uses.
///
/// # Errors
/// If it finds no tables or cannot convert them.
pub fn converted(production: &Production, snapshot: &stagecraft::snapshot::Snapshot, goal: &Goal) -> Result<Converted> {
    let view = production.view(snapshot)?;
    let conversion = convert(&view.guest, &[view.stream], &goal.target, &mut |_, _| {})?;
    let mut memory = Memory::default();
    for (address, words) in conversion.arena.pages() {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        memory.pages.insert(address.0, std::array::from_fn(|index| bytes[index]).into());
    }
    let Some(table) = conversion.tables.into_iter().next() else { bail!("nothing was converted") };
    Ok(Converted { tables: for_model(&table.table)?, memory, table })
}

/// The settings that the engine chose, in a model's words.
fn for_model(config: &TableConfig) -> Result<Tables> {
    let get = |name: &str| config.settings.get(name);
    let or = |name: &str, default: u64| get(name).unwrap_or(default);
    let root = or("root", 0);
    let output_bits = or("output-bits", 48) as u32;
    let half = |root: u64, granule: &str, input_bits: &str| ArmHalf {
        root,
        granule: or(granule, or("granule", 4096)),
        input_bits: or(input_bits, 48) as u32,
        top_byte_ignored: false,
        hierarchical_disabled: false,
    };
    let levels = or("levels", 4) as u32;
    Ok(match config.format.as_str() {
        "intel-vtd/first-stage" => Tables::Vtd(reference::TableConfig::VtdFirst(VtdFirst {
            root,
            levels,
            output_bits,
            large_1g: true,
            execute_disable: true,
            extended_access: false,
        })),
        "intel-vtd/second-stage" => Tables::Vtd(reference::TableConfig::VtdSecond(VtdSecond {
            root,
            levels,
            input_bits: 12 + 9 * levels,
            output_bits,
            ..VtdSecond::default()
        })),
        "amd-vi/v1" => Tables::Amd(AmdTable { root, mode: levels, access: Access::RW }),
        "arm-smmuv3/stage1" => {
            let low = (or("low-disabled", 0) == 0).then(|| half(root, "granule", "input-bits"));
            let high = get("root-high").map(|root| half(root, "granule-high", "input-bits-high"));
            // The default of the setting.
            let mair = or("mair", 0xffff_ffff_f404_ff44);
            Tables::Smmu(SmmuTables { first: Some(ArmStage1 { low, high, output_bits, mair, ..ArmStage1::default() }), ..SmmuTables::default() })
        }
        "arm-smmuv3/stage2" => {
            let (granule, input_bits) = (or("granule", 4096), or("input-bits", 48) as u32);
            let Some(start_level) = get("start-level") else { bail!("no start level: {config:x?}") };
            let stage = ArmStage2 { root, granule, input_bits, output_bits, start_level: start_level as i32, ..ArmStage2::default() };
            Tables::Smmu(SmmuTables { second: Some(stage), ..SmmuTables::default() })
        }
        "riscv-iommu/first-stage" => Tables::Riscv(RiscvTables { first: Some(RiscvTable { root, levels, second: false }), ..RiscvTables::default() }),
        "riscv-iommu/second-stage" => {
            Tables::Riscv(RiscvTables { second: Some(RiscvTable { root, levels, second: true }), ..RiscvTables::default() })
        }
        other => bail!("no model has {other}"),
    })
}
