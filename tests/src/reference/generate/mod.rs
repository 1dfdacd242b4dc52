//! Tables with known content.
//!
//! [`generate`] picks settings and mappings from a seed and writes the tables the plain way, one leaf after the other; the truth is kept beside them. Where the
//! entries of a path restrict what is behind them, the truth follows at the moment of writing, so nothing is ever read back from a table. The geometry is worked
//! out here once more, in heights above the last level, and not taken from [`crate::reference::tables`].
//!
//! Arm's and Intel's tables are written by `ladder` and `ladder_build`, those of the other formats by `radix` with a module for each architecture. `pen` writes single
//! entries of all of them.

use std::collections::BTreeMap;
use std::path::Path;

use super::snapshot::{Device, Memory, MemoryRange, Snapshot, Stream, TableEntry, TableState, write_expected};
use super::tables::{Packing, TableConfig};
use super::{Run, merge};

mod amd;
mod dart;
mod ladder;
mod ladder_build;
mod loongarch;
pub mod pen;
mod radix;
mod riscv;
mod s390;
mod shared;
#[cfg(test)]
mod tests;
mod v7s;

pub use shared::share_empty_tables;

/// The id of the only device in a generated snapshot.
pub const DEVICE: u64 = 0x38;

/// SplitMix64.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A generator; equal seeds give equal numbers.
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    /// A number below `end`, which is not zero.
    pub fn below(&mut self, end: u64) -> u64 {
        self.number() % end
    }

    /// True in so many cases out of a hundred.
    pub fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }

    /// One of the items.
    pub fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len() as u64) as usize]
    }
}

/// The formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `arm-smmuv3/stage1`
    ArmStage1,
    /// `arm-smmuv3/stage2`
    ArmStage2,
    /// `intel-vtd/first-stage`
    VtdFirst,
    /// `intel-vtd/second-stage`
    VtdSecond,
    /// `amd-vi/v1`
    AmdV1,
    /// `amd-vi/v2`
    AmdV2,
    /// `riscv-iommu/first-stage`
    RiscvFirst,
    /// `riscv-iommu/second-stage`
    RiscvSecond,
    /// `s390-zpci/dma`
    S390,
    /// `loongarch/paging`
    LoongArch,
    /// `apple-dart/dart1`
    Dart1,
    /// `apple-dart/dart2`
    Dart2,
    /// `arm-v7s/short`
    V7s,
}

impl Format {
    /// All of them.
    pub const ALL: [Format; 13] = [
        Format::ArmStage1,
        Format::ArmStage2,
        Format::VtdFirst,
        Format::VtdSecond,
        Format::AmdV1,
        Format::AmdV2,
        Format::RiscvFirst,
        Format::RiscvSecond,
        Format::S390,
        Format::LoongArch,
        Format::Dart1,
        Format::Dart2,
        Format::V7s,
    ];
}

/// What the tables hold besides plain leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// How many groups of mappings are tried.
    pub clusters: u64,
    /// Table entries that forbid some or all access to what is behind them; leaves of which only a part can be reached.
    pub restrictions: bool,
    /// Entries that look like something and must not translate: invalid, reserved, misaligned, without access flag, beyond the output size, empty tables.
    pub decoys: bool,
    /// Bits that hardware ignores have random values.
    pub noise: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options { clusters: 10, restrictions: true, decoys: true, noise: true }
    }
}

/// A generated guest.
#[derive(Clone, Debug)]
pub struct Generated {
    /// The snapshot, in the converted form, with the one device [`DEVICE`].
    pub snapshot: Snapshot,
    /// What the tables map: sorted maximal runs.
    pub truth: Vec<Run>,
    /// The format with its settings; also in the snapshot.
    pub config: TableConfig,
}

impl Generated {
    /// Writes `snapshot.json`, `pages.bin` and, from the truth, `expected.json`.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write_snapshot(&self, folder: &Path) -> std::io::Result<()> {
        self.snapshot.write_snapshot(folder)?;
        let label = self.snapshot.devices[0].label.clone();
        write_expected(folder, &[Stream { label, id: DEVICE, runs: self.truth.clone() }])
    }
}

/// Tables of a format, all from one seed.
pub fn generate(format: Format, seed: u64) -> Generated {
    generate_with(format, seed, Options::default())
}

/// The same with options.
pub fn generate_with(format: Format, seed: u64, options: Options) -> Generated {
    let mut rng = Rng::new(seed);
    let config = random_config(format, &mut rng);
    let leaves = random_leaves(&config, &mut rng, options);
    build(config, &leaves, &mut rng, options)
}

/// Random settings that the architecture allows. Roots are zero until [`build`].
pub fn random_config(format: Format, rng: &mut Rng) -> TableConfig {
    match format {
        Format::ArmStage1 | Format::ArmStage2 | Format::VtdFirst | Format::VtdSecond => ladder::random_config(format, rng),
        Format::AmdV1 => TableConfig::AmdV1(amd::random_v1(rng)),
        Format::AmdV2 => TableConfig::AmdV2(amd::random_v2(rng)),
        Format::RiscvFirst => TableConfig::RiscvFirst(riscv::random_first(rng)),
        Format::RiscvSecond => TableConfig::RiscvSecond(riscv::random_second(rng)),
        Format::S390 => TableConfig::S390(s390::random(rng)),
        Format::LoongArch => TableConfig::LoongArch(loongarch::random(rng)),
        Format::Dart1 => TableConfig::Dart(dart::random(Packing::Dart1, rng)),
        Format::Dart2 => TableConfig::Dart(dart::random(Packing::Dart2, rng)),
        Format::V7s => TableConfig::V7s(v7s::random(rng)),
    }
}

/// Random leaves that do not overlap: groups of pages and large leaves, at the ends of the input range and between, with holes and mixed access.
pub fn random_leaves(config: &TableConfig, rng: &mut Rng, options: Options) -> Vec<Run> {
    match radix::of(config) {
        Some(format) => radix::random_leaves(format, rng, options),
        None => ladder::random_leaves(config, rng, options),
    }
}

/// Whether the format has leaves that can be written and not read.
pub fn says_write_only(config: &TableConfig) -> bool {
    match radix::of(config) {
        Some(format) => format.accesses().contains(&super::Access::W),
        None => !matches!(config, TableConfig::ArmStage1(_) | TableConfig::VtdFirst(_)),
    }
}

/// Writes the tables of a config for leaves that do not overlap: each a legal leaf of its window, `size` and alignment included. Write-only leaves become
/// read-write ones where the format has no write-only. The config's roots are set.
pub fn build(config: TableConfig, leaves: &[Run], rng: &mut Rng, options: Options) -> Generated {
    match radix::of(&config) {
        Some(format) => {
            let built = radix::build(format, leaves, rng, options);
            let address_bits = format.leaf_sizes().into_iter().map(|size| format.leaf_address_bits(size)).fold(format.address_bits(), u32::max);
            generated(radix::with_roots(config, &built.roots), built.memory, built.truth, address_bits)
        }
        None => ladder_build::build(config, leaves, rng, options),
    }
}

fn generated(config: TableConfig, memory: Memory, truth: Vec<Run>, address_bits: u32) -> Generated {
    let last = if address_bits >= 64 { u64::MAX } else { (1 << address_bits) - 1 };
    let snapshot = Snapshot {
        description: format!("generated {}", config.format()),
        unit_kind: String::new(),
        registers: BTreeMap::new(),
        tables: vec![TableEntry { id: DEVICE, pasid: None, state: TableState::Tables(config) }],
        map: vec![MemoryRange { kind: "ram".to_string(), first: 0, last }],
        devices: vec![Device { label: "0000:00:07.0".to_string(), id: DEVICE }],
        memory,
    };
    Generated { snapshot, truth: merge(truth), config }
}
