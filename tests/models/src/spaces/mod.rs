//! Random address spaces in each model's formats, from builders that share no code with the production engine, and what the models get wrong about them.

pub mod amd;
pub mod riscv;
pub mod smmu;
pub mod vtd;

use std::fmt;
use std::ops::Range;

use stagecraft_tests::reference::detect;
use stagecraft_tests::reference::generate::Rng;
use stagecraft_tests::reference::tables::TableConfig;
use stagecraft_tests::reference::{Run, merge};

use crate::judge::lookup;
use crate::known::KnownError;
use crate::smmu::SmmuTables;
use crate::{Access, Memory, Tables};

/// Where the tables of the builders in [`crate::tables`] go: RAM in every machine that they are for.
pub const PLACES: Range<u64> = 0x8010_0000..0xb000_0000;

/// Interrupts on the q35 machine, which no IOMMU there translates.
pub const INTERRUPTS: Range<u64> = detect::INTERRUPTS.0..detect::INTERRUPTS.1 + 1;

/// Which error of the model concerns a request, if one does.
type Excuse = Box<dyn Fn(u64, bool) -> Option<KnownError>>;

/// An address space with known content.
pub struct Space {
    /// For the model.
    pub tables: Tables,
    /// The formats of its tables, first stage first.
    pub formats: Vec<&'static str>,
    /// The pages of the tables, and what else stands beside them.
    pub memory: Memory,
    /// What requests get: sorted maximal runs.
    pub truth: Vec<Run>,
    /// What the tables say, if that is more: at addresses of interrupts.
    pub beneath: Vec<Run>,
    /// IOVAs of entries that look like something and do not translate.
    pub decoys: Vec<u64>,
    /// IOVAs that are worth asking about for another reason.
    pub corners: Vec<u64>,
    excuse: Excuse,
}

impl fmt::Debug for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Space").field("tables", &self.tables).field("truth", &self.truth.len()).finish_non_exhaustive()
    }
}

impl Space {
    /// The known error because of which the model cannot be asked about a request.
    pub fn excuse(&self, iova: u64, write: bool) -> Option<KnownError> {
        (self.excuse)(self.canonical(iova), write)
    }

    /// The address that a request should reach.
    pub fn lookup(&self, iova: u64, write: bool) -> Option<u64> {
        lookup(&self.truth, self.canonical(iova), write)
    }

    /// An IOVA without what is ignored of it.
    fn canonical(&self, iova: u64) -> u64 {
        match self.tables {
            Tables::Smmu(SmmuTables { first: Some(config), .. }) => TableConfig::ArmStage1(config).effective(iova),
            _ => iova,
        }
    }

    /// Whether IOVAs with other top bytes are the same.
    pub fn has_tags(&self) -> bool {
        self.canonical(1 << 56) == 0
    }
}

/// What address spaces are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contents {
    /// Restrictions in table entries, bits without effect, leaves that need a second look. Without, an address space says nothing but what [`Space::truth`] says.
    pub variety: bool,
}

/// Gives some leaves a target in device memory.
fn into_device_memory(leaves: &mut [Run], device: &Range<u64>, rng: &mut Rng) {
    for leaf in leaves {
        if leaf.size <= 32 << 20 && rng.percent(10) {
            leaf.address = device.start + rng.below((device.end - device.start) / leaf.size) * leaf.size;
        }
    }
}

/// Adds 64 KiB in pages of `page` bytes that every format can say, in the place of whatever is there.
fn add_common(leaves: &mut Vec<Run>, page: u64, rng: &mut Rng) {
    let iova = (1 + rng.below(30)) << 16;
    let address = (8 << 30) + (rng.below(24 << 30) >> 16 << 16);
    let end = iova + (1 << 16);
    leaves.retain(|leaf| leaf.iova >= end || leaf.iova + (leaf.size - 1) < iova);
    for offset in (0..1 << 16).step_by(page as usize) {
        leaves.push(Run { iova: iova + offset, address: address + offset, size: page, access: Access::RW });
    }
    leaves.sort_by_key(|leaf| leaf.iova);
}

/// Adds some of four times 64 KiB, in pages of `page` bytes: on either side of both ends of [`INTERRUPTS`]. Some pages are not there.
fn add_interrupts(leaves: &mut Vec<Run>, page: u64, rng: &mut Rng) {
    for iova in [INTERRUPTS.start - (1 << 16), INTERRUPTS.start, INTERRUPTS.end - (1 << 16), INTERRUPTS.end] {
        let end = iova + (1 << 16);
        if rng.percent(25) || leaves.iter().any(|leaf| leaf.iova < end && leaf.iova + (leaf.size - 1) >= iova) {
            continue;
        }
        let address = (8 << 30) + (rng.below(24 << 30) >> 16 << 16);
        let there: Vec<u64> = (0..1 << 16).step_by(page as usize).filter(|_| rng.percent(80)).collect();
        leaves.extend(there.into_iter().map(|offset| Run { iova: iova + offset, address: address + offset, size: page, access: Access::RW }));
    }
    leaves.sort_by_key(|leaf| leaf.iova);
}

/// Interesting addresses of interrupts, and on either side.
fn around_interrupts(rng: &mut Rng) -> Vec<u64> {
    let ends = [INTERRUPTS.start, INTERRUPTS.end];
    let near = ends.into_iter().flat_map(|end| [end - 8, end, end - (1 << 16), end + (1 << 16)]).collect::<Vec<_>>();
    let anywhere = (0..12).map(|_| INTERRUPTS.start - (1 << 16) + rng.below(0x12_0000 / 8) * 8);
    near.into_iter().chain(anywhere).collect()
}

/// IOVAs where both stages have something: `leaves` are the second one's.
fn crossings(truth: &[Run], leaves: &[Run], rng: &mut Rng) -> Vec<u64> {
    let mut iovas = Vec::new();
    for _ in 0..60 {
        let leaf = rng.pick(leaves);
        if let Some(run) = truth.iter().find(|run| run.address <= leaf.iova && leaf.iova - run.address < run.size) {
            iovas.push(run.iova + (leaf.iova - run.address) + rng.below(512) * 8);
        }
    }
    iovas
}

/// Two stages after each other: the parts of the first one's runs that the second maps.
fn compose(first: &[Run], second: &[Run]) -> Vec<Run> {
    let mut runs = Vec::new();
    for run in first {
        let last = run.address + (run.size - 1);
        let start = second.partition_point(|other| other.iova + (other.size - 1) < run.address);
        for other in second[start..].iter().take_while(|other| other.iova <= last) {
            let begin = run.address.max(other.iova);
            let size = last.min(other.iova + (other.size - 1)) - begin + 1;
            let access = run.access.and(other.access);
            if access != Access::NONE {
                runs.push(Run { iova: run.iova + (begin - run.address), address: other.address + (begin - other.iova), size, access });
            }
        }
    }
    merge(runs)
}
