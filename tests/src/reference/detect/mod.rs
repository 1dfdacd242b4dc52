//! From the unit's registers to a device's tables.
//!
//! One module for each architecture that has device structures, each with its sources.

use super::snapshot::{Snapshot, TableState};
use super::tables::TableConfig;
use super::{Access, Problem, Run, bits};

mod amd;
mod arm;
mod riscv;
mod s390;
mod vtd;

/// What happens to a device's requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// They pass untranslated.
    Bypass,
    /// They fail; the reason.
    Blocked(String),
    /// They pass without tables, but only some of them, or with an offset.
    Direct(Window),
    /// One table, or two: the one that the IOVA enters first.
    Tables(Vec<TableConfig>),
}

/// IOVAs that go to memory without a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// The lowest IOVA.
    pub first: u64,
    /// The highest one.
    pub last: u64,
    /// Where the lowest one goes; the others follow.
    pub address: u64,
    /// What is allowed.
    pub access: Access,
}

impl Window {
    /// Every IOVA is its own address.
    fn everything(access: Access) -> Window {
        Window { first: 0, last: u64::MAX, address: 0, access }
    }
}

/// RISC-V's MSI page table: accesses to pages whose number is `pattern`, without regard to the bits of `mask`, go where it says and nowhere else. The
/// addresses are those that the first stage puts out; without one, the IOVAs (IOMMU Architecture Specification 1.0 section 2.1.3.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MessageTable {
    /// Its address.
    pub root: u64,
    /// `msi_addr_mask`, page numbers.
    pub mask: u64,
    /// `msi_addr_pattern`, a page number.
    pub pattern: u64,
}

/// The MSI page table of a device whose requests are translated or pass.
///
/// # Errors
/// As [`resolve`].
pub fn messages(snapshot: &Snapshot, id: u64) -> Result<Option<MessageTable>, Problem> {
    if snapshot.unit_kind == "riscv-iommu" { riscv::messages(snapshot, id) } else { Ok(None) }
}

/// Where x86 machines have interrupts: the first address and the last.
pub const INTERRUPTS: (u64, u64) = (0xfee0_0000, 0xfeef_ffff);

/// Whether an address in a request is an interrupt to the unit, and never looked up: in x86 units, without a PASID. VT-d D51397 section 3.15 (with a PASID they are
/// "translated normally"); AMD 48882 section 2.2.5, interrupts have no PASID.
pub fn is_interrupt(unit_kind: &str, pasid: Option<u64>, address: u64) -> bool {
    let is_x86 = unit_kind == "intel-vtd" || unit_kind == "amd-vi";
    is_x86 && pasid.is_none() && (INTERRUPTS.0..=INTERRUPTS.1).contains(&address)
}

/// What is left of runs where interrupts are no part of them.
pub fn without_interrupts(runs: &[Run]) -> Vec<Run> {
    let mut left = Vec::new();
    for run in runs {
        let last = run.iova + (run.size - 1);
        if run.iova < INTERRUPTS.0 {
            left.push(Run { size: last.min(INTERRUPTS.0 - 1) - run.iova + 1, ..*run });
        }
        if last > INTERRUPTS.1 {
            let iova = run.iova.max(INTERRUPTS.1 + 1);
            left.push(Run { iova, address: run.address + (iova - run.iova), size: last - iova + 1, ..*run });
        }
    }
    left
}

fn blocked(reason: &str) -> Result<Resolution, Problem> {
    Ok(Resolution::Blocked(reason.to_string()))
}

/// What happens to requests without a PASID.
///
/// # Errors
/// [`Problem::Unreadable`] if a structure is not in the snapshot, [`Problem::Unsupported`] for what this reference does not know.
pub fn resolve(snapshot: &Snapshot, id: u64) -> Result<Resolution, Problem> {
    resolve_pasid(snapshot, id, None)
}

/// What happens to requests with a PASID, or without one.
///
/// # Errors
/// As [`resolve`].
pub fn resolve_pasid(snapshot: &Snapshot, id: u64, pasid: Option<u64>) -> Result<Resolution, Problem> {
    if snapshot.registers.is_empty() {
        return match snapshot.tables.iter().find(|entry| entry.id == id && entry.pasid == pasid).map(|entry| &entry.state) {
            None => blocked("not listed"),
            Some(TableState::Bypass) => Ok(Resolution::Bypass),
            Some(TableState::Blocked(reason)) => blocked(reason),
            Some(TableState::Tables(config)) => Ok(Resolution::Tables(vec![*config])),
        };
    }
    match snapshot.unit_kind.as_str() {
        "arm-smmuv3" => arm::smmu(snapshot, id, pasid),
        "intel-vtd" => vtd::vtd(snapshot, id, pasid),
        "amd-vi" => amd::amd(snapshot, id, pasid),
        "riscv-iommu" => riscv::riscv(snapshot, id, pasid),
        "s390-zpci" => s390::s390(snapshot, id, pasid),
        other => Err(Problem::Unsupported(format!("unit {other}"))),
    }
}

fn register(snapshot: &Snapshot, name: &str) -> Result<u64, Problem> {
    snapshot.registers.get(name).copied().ok_or_else(|| Problem::File(format!("no register {name}")))
}

fn illegal<T>(reason: &str) -> Result<T, Problem> {
    Err(Problem::Illegal(reason.to_string()))
}

/// Whether any of these bits is set.
fn any(word: u64, high: u32, low: u32) -> bool {
    bits(word, high, low) != 0
}
