//! Invalidation arrays: what the kernel accepts, and what the unit's caches do with it.
//!
//! Semantics are the architectures' at their strictest: what a command need not drop stays. A leaf-only command keeps walk caches, RISC-V's commands
//! with an address are leaf-only unless NL is set, a command for one ASID keeps global entries, a TTL keeps leaves of other levels, context
//! structures are dropped by their own commands only. Entries take effect one by one, so that those in front of a bad one are done; when the call
//! returns, no transaction uses what was dropped.

use std::sync::Arc;

use super::cache::Space;
use super::device::ViommuState;
use super::lock::{read, write};
use super::unit::{Unit, UnitKind};
use super::walk::Leaf;
use crate::Span;
use crate::kernel::{Errno, Result};

/// Words of an entry.
pub(super) fn words<const N: usize>(entry: &[u8]) -> [u64; N] {
    let mut words = [0; N];
    for (word, bytes) in words.iter_mut().zip(entry.chunks_exact(8)) {
        *word = bytes.try_into().map_or(0, u64::from_ne_bytes);
    }
    words
}

fn everything(_: &Leaf) -> bool {
    true
}

/// Drops cached entries with no transaction on its way: those that saw the old ones have ended, and later ones look again.
fn exclusively(unit: &Unit, act: impl FnOnce(&Unit)) {
    let _gate = write(&unit.gate);
    act(unit);
}

/// `struct iommu_hwpt_vtd_s1_invalidate` for the nested page table with this serial number.
pub(super) fn vtd(unit: &Unit, owner: u64, entry: &[u8]) -> Result<()> {
    let [address, pages, tail] = words::<3>(entry);
    let (flags, reserved) = (tail.to_ne_bytes(), 0u32.to_ne_bytes());
    let leaf_only = flags[..4] == 1u32.to_ne_bytes();
    if flags[4..] != reserved || !leaf_only && flags[..4] != reserved {
        return Err(Errno::EOPNOTSUPP);
    }
    let all = pages == u64::MAX;
    if address % 4096 != 0 || all && address != 0 {
        return Err(Errno::EINVAL);
    }
    let range = if all {
        None
    } else {
        Some(Span { first: address, last: address.saturating_add(pages.saturating_mul(4096)).saturating_sub(1).max(address) })
    };
    exclusively(unit, |unit| unit.caches.invalidate(|space| space.owner == owner, range, leaf_only, everything));
    Ok(())
}

/// Raw commands of 128 bits, as the vIOMMU's architecture has them.
pub(super) fn viommu(state: &ViommuState, entry: &[u8]) -> Result<()> {
    let command = words::<2>(entry);
    match state.unit.config.kind {
        UnitKind::Smmuv3 { idr, .. } => smmuv3(state, command, idr[3] & 1 << 10 != 0),
        UnitKind::Amd { .. } => amd(state, command),
        UnitKind::Riscv { capabilities } => riscv(state, command, capabilities & 1 << 42 != 0),
        UnitKind::Vtd { .. } => Err(Errno::EOPNOTSUPP),
    }
}

/// The serial number of a device that the guest names; EIO if there is none.
fn device(state: &ViommuState, id: u64) -> Result<u64> {
    read(&state.devices).get(&id).copied().ok_or(Errno::EIO)
}

fn drop_contexts(state: &ViommuState, device: u64, pasid: Option<Option<u32>>) {
    exclusively(&state.unit, |unit| unit.caches.drop_contexts(|key| key.0 == device && pasid.is_none_or(|pasid| key.1 == pasid)));
}

/// IHI 0070 section 4: operation 7:0; what each may have set besides.
fn smmuv3(state: &ViommuState, [low, high]: [u64; 2], ranges: bool) -> Result<()> {
    // NUM 16:12, SCALE 24:20, VMID 47:32, ASID 63:48; Leaf 0, TTL 9:8, TG 11:10, address 63:12.
    const OPERATION: u64 = 0xff;
    const RANGE: u64 = 0x1f << 12 | 0x1f << 20;
    const VMID: u64 = 0xffff << 32;
    const ASID: u64 = 0xffff << 48;
    const ADDRESS: [u64; 2] = [0xffff_ffff_ffff_f001, 0xf00];
    let (allowed_low, allowed_high) = match low & OPERATION {
        0x10 | 0x30 => (VMID, 0),
        0x11 => (VMID | ASID, 0),
        0x12 => (VMID | ASID | if ranges { RANGE } else { 0 }, ADDRESS[0] | if ranges { ADDRESS[1] } else { 0 }),
        0x13 => (VMID | if ranges { RANGE } else { 0 }, ADDRESS[0] | if ranges { ADDRESS[1] } else { 0 }),
        // CFGI_CD: SSec 10, SubstreamID 31:12, StreamID 63:32; Leaf 0. CFGI_CD_ALL: StreamID.
        0x05 => (0xffff_ffff_ffff_f000, 1),
        0x06 => (0xffff_ffff_0000_0000, 0),
        // ATC_INV: SSV 11, G 9, SubstreamID, StreamID; size 5:0, address.
        0x40 => (0xffff_ffff_ffff_fa00, 0xffff_ffff_ffff_f03f),
        _ => return Err(Errno::EIO),
    };
    let no_granule = (high >> 10) & 3 == 0 && matches!(low & OPERATION, 0x12 | 0x13);
    if low & !OPERATION & !allowed_low != 0 || high & !allowed_high != 0 || no_granule && (low & RANGE != 0 || high & 0x300 != 0) {
        return Err(Errno::EIO);
    }
    let asid = u32::try_from(low >> 48).unwrap_or(0);
    let owner = state.serial;
    let own = move |space: &Space| space.owner == owner;
    match low & OPERATION {
        // The VMID is the vIOMMU's, whatever the guest wrote.
        0x10 | 0x30 => exclusively(&state.unit, |unit| unit.caches.invalidate(own, None, false, everything)),
        0x11 => exclusively(&state.unit, |unit| unit.caches.invalidate(|space| own(space) && space.tag == asid, None, false, everything)),
        operation @ (0x12 | 0x13) => {
            let (range, only_level) = smmuv3_range(low, high);
            let of = |space: &Space| own(space) && (operation == 0x13 || space.tag == asid || space.tag == Space::GLOBAL);
            let leaf = |leaf: &Leaf| only_level.is_none_or(|level| leaf.level == level);
            exclusively(&state.unit, |unit| unit.caches.invalidate(of, Some(range), high & 1 != 0, leaf));
        }
        0x05 => {
            let substream = u32::try_from(low >> 12 & 0xf_ffff).unwrap_or(0);
            let device = device(state, low >> 32)?;
            drop_contexts(state, device, Some(Some(substream)));
            if substream == 0 {
                drop_contexts(state, device, Some(None));
            }
        }
        0x06 => drop_contexts(state, device(state, low >> 32)?, None),
        // No device here has an ATC: with a valid StreamID there is nothing to do.
        _ => drop(device(state, low >> 32)?),
    }
    Ok(())
}

/// The IOVAs of a TLBI by address, and the level if it says that only leaves of that one need go (TTL).
fn smmuv3_range(low: u64, high: u64) -> (Span, Option<i8>) {
    let address = high & !0xfff;
    let granule_log2 = match (high >> 10) & 3 {
        0 => return (Span { first: address, last: address | 0xfff }, None),
        1 => 12,
        2 => 14,
        _ => 16,
    };
    let (number, scale) = ((low >> 12) & 0x1f, (low >> 20) & 0x1f);
    let bytes = u128::from(number + 1) << (scale + granule_log2);
    let first = address & !((1 << granule_log2) - 1);
    let last = u64::try_from(u128::from(first) + bytes - 1).unwrap_or(u64::MAX);
    let level = match (high >> 8) & 3 {
        0 => None,
        level => i8::try_from(level).ok(),
    };
    (Span { first, last }, level)
}

/// AMD IOMMU section 2.4: operation 63:60. Only what guest translation needs; GN must be set. These are the simulated kernel's own: the real one
/// takes none.
fn amd(state: &ViommuState, [low, high]: [u64; 2]) -> Result<()> {
    let owner = state.serial;
    let (pasid, domain) = (u32::try_from(low & 0xf_ffff).unwrap_or(0), u16::try_from((low >> 32) & 0xffff).unwrap_or(0));
    match low >> 60 {
        // INVALIDATE_DEVTAB_ENTRY: DeviceID 15:0.
        2 => drop_contexts(state, device(state, low & 0xffff)?, None),
        // INVALIDATE_IOMMU_PAGES: PASID 19:0, DomainID 47:32; S 0, PDE 1, GN 2, address 63:12.
        3 if high & 4 != 0 => {
            let range = amd_range(high);
            let leaf_only = high & 2 == 0;
            exclusively(&state.unit, |unit| {
                unit.caches.invalidate(|space| (space.owner, space.domain, space.tag) == (owner, domain, pasid), range, leaf_only, everything);
                if range.is_none() && !leaf_only {
                    // The GCR3 entry of the PASID goes with all that it leads to.
                    let devices: Vec<u64> = read(&state.devices).values().copied().collect();
                    unit.caches.drop_contexts(|key| devices.contains(&key.0) && key.1.unwrap_or(0) == pasid);
                }
            });
        }
        // INVALIDATE_IOTLB_PAGES: no device here has an IOTLB of its own.
        4 => drop(device(state, low & 0xffff)?),
        // INVALIDATE_IOMMU_ALL, of this vIOMMU.
        8 => exclusively(&state.unit, |unit| {
            let devices: Vec<u64> = read(&state.devices).values().copied().collect();
            unit.caches.invalidate(|space| space.owner == owner, None, false, everything);
            unit.caches.drop_contexts(|key| devices.contains(&key.0));
        }),
        _ => return Err(Errno::EIO),
    }
    Ok(())
}

/// With S, the lowest bit of the address from 12 on that is zero is half the size; without, one page. None is all.
fn amd_range(high: u64) -> Option<Span> {
    let address = high & !0xfff;
    if high & 1 == 0 {
        return Some(Span { first: address, last: address | 0xfff });
    }
    let size_log2 = (12..63).find(|bit| address & 1 << bit == 0).map(|bit| bit + 1)?;
    if size_log2 >= 63 {
        return None;
    }
    let first = address >> size_log2 << size_log2;
    Some(Span::of_log2(first, size_log2))
}

/// RISC-V IOMMU section 4.1: opcode 6:0, function 9:7. The simulated kernel's own: the real one has no nesting there.
fn riscv(state: &ViommuState, [low, high]: [u64; 2], non_leaf: bool) -> Result<()> {
    let owner = state.serial;
    match (low & 0x7f, (low >> 7) & 7) {
        // IOTINVAL.VMA: AV 10, PSCID 31:12, PSCV 32, GV 33, NL 34; address 61:10 in pages.
        (1, 0) => {
            let by_address = low & 1 << 10 != 0;
            let tag = (low & 1 << 32 != 0).then(|| u32::try_from(low >> 12 & 0xf_ffff).unwrap_or(0));
            if low & 1 << 34 != 0 && !non_leaf {
                return Err(Errno::EIO);
            }
            let address = high << 2 & !0xfff;
            let range = by_address.then_some(Span { first: address, last: address | 0xfff });
            // With an address only leaf entries are dropped, unless NL says otherwise. With a PSCID global entries stay.
            let leaf_only = by_address && low & 1 << 34 == 0;
            let of = |space: &Space| space.owner == owner && tag.is_none_or(|tag| space.tag == tag);
            exclusively(&state.unit, |unit| unit.caches.invalidate(of, range, leaf_only, everything));
        }
        // IODIR.INVAL_DDT and .INVAL_PDT: PID 31:12, DV 33, DID 63:40.
        (3, 0) if low & 1 << 33 != 0 => drop_contexts(state, device(state, low >> 40)?, None),
        (3, 0) => {
            let devices: Vec<u64> = read(&state.devices).values().copied().collect();
            exclusively(&state.unit, |unit| unit.caches.drop_contexts(|key| devices.contains(&key.0)));
        }
        (3, 1) if low & 1 << 33 != 0 => {
            let pasid = u32::try_from(low >> 12 & 0xf_ffff).unwrap_or(0);
            let device = device(state, low >> 40)?;
            drop_contexts(state, device, Some(Some(pasid)));
            if pasid == 0 {
                drop_contexts(state, device, Some(None));
            }
        }
        _ => return Err(Errno::EIO),
    }
    Ok(())
}

/// Everything that a unit cached for an owner of tags: its ids are given up.
pub(super) fn forget_owner(unit: &Arc<Unit>, owner: u64) {
    exclusively(unit, |unit| unit.caches.invalidate(|space| space.owner == owner, None, false, everything));
}

/// What was cached for a device's stream: its entry in the unit's own tables changed.
pub(super) fn forget_stream(unit: &Arc<Unit>, device: u64) {
    exclusively(unit, |unit| unit.caches.drop_contexts(|key| key.0 == device));
}

/// What was cached for a PASID of an owner (VT-d's PASID-selective flush when a PASID entry changes).
pub(super) fn forget_tag(unit: &Arc<Unit>, owner: u64, tag: u32) {
    exclusively(unit, |unit| unit.caches.invalidate(|space| space.owner == owner && space.tag == tag, None, false, everything));
}
