//! Faults as records of the architectures' own event queues, with the guest's number of the device.

use super::fault::{DmaAccess, Fault, Reason, Stage};
use crate::kernel::viommu_type;

/// The raw record, little-endian words.
pub(super) fn record(kind: u32, device: u64, fault: &Fault) -> Vec<u8> {
    let words: &[u64] = match kind {
        viommu_type::ARM_SMMUV3 => &smmuv3(device, fault),
        viommu_type::SIM_AMD => &amd(device, fault),
        _ => &riscv(device, fault),
    };
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn writes(fault: &Fault) -> u64 {
    u64::from(fault.access == DmaAccess::Write)
}

/// IHI 0070 section 7.3: type 7:0, SSV 11, SubstreamID 31:12, StreamID 63:32; RnW 35+64, S2 39+64, class 41:40 of the second word; then the IOVA.
fn smmuv3(device: u64, fault: &Fault) -> [u64; 4] {
    let number: u64 = match fault.reason {
        Reason::Abort | Reason::NotAttached => 0x04, // C_BAD_STE
        Reason::Pasid => 0x08,
        Reason::Context => 0x0a,
        Reason::TableAccess | Reason::NoMemory if fault.stage == Stage::Context => 0x09, // F_CD_FETCH
        Reason::TableAccess | Reason::NoMemory => 0x0b,
        Reason::AddressSize => 0x11,
        Reason::AccessFlag => 0x12,
        Reason::Permission => 0x13,
        _ => 0x10,
    };
    let substream = fault.pasid.map_or(0, |pasid| 1 << 11 | u64::from(pasid.0) << 12);
    // Class: 0 while fetching a CD, 2 for the transaction's own address.
    let class: u64 = if fault.stage == Stage::Context { 0 } else { 2 };
    [number | substream | device << 32, (1 - writes(fault)) << 35 | class << 40, fault.iova.0, 0]
}

/// AMD IOMMU section 2.5.3, IO_PAGE_FAULT: DeviceID 15:0, PASID 19:16, PASID 47:32, GN 48, US 50, PR 52, RW 53, RZ 55, TR 56, code 63:60; then the
/// address.
fn amd(device: u64, fault: &Fault) -> [u64; 2] {
    let pasid = fault.pasid.map_or(0, |pasid| u64::from(pasid.0));
    let present = u64::from(matches!(fault.reason, Reason::Permission | Reason::Reserved));
    let reserved = u64::from(fault.reason == Reason::Reserved);
    let flags = 1 << 48 | 1 << 50 | present << 52 | writes(fault) << 53 | reserved << 55;
    [device & 0xffff | (pasid >> 16 & 0xf) << 16 | (pasid & 0xffff) << 32 | flags | 2 << 60, fault.iova.0]
}

/// RISC-V IOMMU section 4.2: CAUSE 11:0, PID 31:12, PV 32, PRIV 33, TTYP 39:34, DID 63:40; reserved; iotval; iotval2.
fn riscv(device: u64, fault: &Fault) -> [u64; 4] {
    let write = writes(fault);
    let cause = match (fault.stage, fault.reason) {
        (_, Reason::Pasid) => 260,                    // transaction type disallowed
        (Stage::Context, Reason::TableAccess) => 265, // PDT entry load access fault
        (Stage::Context, Reason::Context) => 266,     // PDT entry not valid
        (Stage::Context, _) => 256,                   // all inbound transactions disallowed
        (_, Reason::TableAccess | Reason::NoMemory | Reason::AddressSize) => 5 + 2 * write,
        _ => 13 + 2 * write,
    };
    let pasid = fault.pasid.map_or(0, |pasid| u64::from(pasid.0) << 12 | 1 << 32);
    // TTYP: an untranslated request, for read 2, for write 3.
    [cause | pasid | (2 + write) << 34 | device << 40, 0, fault.iova.0, 0]
}
