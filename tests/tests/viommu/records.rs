//! What is told of refused DMA, and what is not: by the guest's own structures, which say whether it wants to hear of it.

use stagecraft::Iova;
use stagecraft::plugin::queue::EventAccess;
use stagecraft::plugin::{Policy, Requester, Supervisor};
use stagecraft::viommu::{BlockedDma, Events, Limits};

use super::behaviour::{ONE, Rig, TWO, plugin, without_pasid};
use super::guests::{Arch, DATA, Guest};

const IOVA: u64 = 0x12_3456_7000;
/// Where the guest has no memory.
const NOWHERE: u64 = 0x4000_0000;

fn read(id: u64, iova: u64) -> BlockedDma {
    BlockedDma { requester: without_pasid(id), iova: Iova(iova), access: EventAccess::Read, privileged: false }
}

fn write(id: u64, iova: u64) -> BlockedDma {
    BlockedDma { access: EventAccess::Write, ..read(id, iova) }
}

fn told(rig: &mut Rig, request: BlockedDma) -> Events {
    rig.viommu.faults(&[request])
}

/// The one record.
fn record(rig: &mut Rig, request: BlockedDma) -> Vec<u64> {
    let events = told(rig, request);
    assert_eq!((events.records.len(), events.lost, events.silent), (1, 0, 0), "{request:?}");
    events.records[0].bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
}

fn is_silent(rig: &mut Rig, request: BlockedDma) {
    let events = told(rig, request);
    assert_eq!((events.records.len(), events.lost, events.silent), (0, 0, 1), "{request:?}: {events:x?}");
    assert_eq!(rig.viommu.figures().lost_events, 0);
}

/// A device with a table of its own; what is read of its structure's words is `or`ed into them.
fn guest(arch: Arch, or: &[u64]) -> (Rig, u64) {
    let mut rig = Rig::new(arch, Limits::default());
    let root = rig.guest.new_table();
    rig.guest.map_page(root, IOVA, DATA, false);
    rig.guest.translate(ONE, root, 7);
    for (index, word) in (0..).zip(or) {
        let at = rig.guest.structure(ONE) + index * 8;
        rig.guest.store(at, rig.guest.load(at) | word);
    }
    rig.viommu.connect(ONE, false);
    (rig, root)
}

/// CD.R, FPD, SA and DTF are clear, or set: a guest that does not want to be told is not, and nothing is lost.
#[test]
fn a_guest_that_does_not_want_records_gets_none() {
    for arch in Arch::ALL {
        let quiet: &[u64] = match arch {
            // In the CD: below.
            Arch::Smmu => &[],
            Arch::Vtd => &[1 << 1],
            Arch::Amd => &[0, 1 << 34],
            Arch::Riscv => &[1 << 4],
        };
        let (mut loud, _) = guest(arch, &[]);
        let expected = arch.nothing_mapped(ONE, 7, IOVA + 0x1000, true);
        assert_eq!(told(&mut loud, write(ONE, IOVA + 0x1000)).records[0].bytes, expected, "{arch:?}");
        let (mut rig, _) = guest(arch, quiet);
        if arch == Arch::Smmu {
            let cd = rig.guest.load(rig.guest.structure(ONE)) & 0x000f_ffff_ffff_ffc0;
            rig.guest.store(cd, rig.guest.load(cd) & !(1 << 45));
        }
        is_silent(&mut rig, write(ONE, IOVA + 0x1000));
        is_silent(&mut rig, write(ONE, IOVA));
    }
}

/// What may not be done is found before anybody sees that there is no memory.
#[test]
fn permissions_are_told_of_pages_that_are_nowhere() {
    for arch in Arch::ALL {
        let (mut rig, root) = guest(arch, &[]);
        rig.guest.map_page(root, IOVA + 0x2000, NOWHERE, false);
        is_silent(&mut rig, read(ONE, IOVA + 0x2000));
        let found = record(&mut rig, write(ONE, IOVA + 0x2000));
        let expected = match arch {
            Arch::Smmu => [0x13 | ONE << 32, 2 << 40],
            Arch::Vtd => [IOVA + 0x2000, ONE | 5 << 32 | 1 << 63],
            // PR, RW, PE.
            Arch::Amd => [2 << 60 | 7 << 52 | ONE | 7 << 32, IOVA + 0x2000],
            Arch::Riscv => [15 | 3 << 34 | ONE << 40, 0],
        };
        assert_eq!(found[..2], expected, "{arch:?}");
    }
}

/// A table that is nowhere: at the root by the pointer to it, and further down by an entry.
#[test]
fn tables_that_are_nowhere_are_told_as_such() {
    for arch in Arch::ALL {
        let (mut rig, root) = guest(arch, &[]);
        let slot = rig.guest.slot_at(root, IOVA, 3).0;
        let pointer = rig.guest.load(slot);
        // By so much the address is another.
        let other = if arch == Arch::Riscv { NOWHERE >> 2 } else { NOWHERE };
        rig.guest.store(slot, pointer + other);
        let table = (if arch == Arch::Riscv { pointer >> 10 << 12 } else { pointer & 0x000f_ffff_ffff_f000 }) + NOWHERE;
        let at = table + (IOVA >> 30 & 0x1ff) * 8;
        let found = record(&mut rig, read(ONE, IOVA));
        match arch {
            // F_WALK_EABT of class TT; RnW.
            Arch::Smmu => assert_eq!(found, [0x0b | ONE << 32, 1 << 35 | 1 << 40, IOVA, at]),
            Arch::Vtd => assert_eq!(found, [IOVA, ONE | 7 << 32 | 1 << 62 | 1 << 63]),
            Arch::Amd => assert_eq!(found, [4 << 60 | ONE | 7 << 32, at & !0xf]),
            // A read access fault.
            Arch::Riscv => assert_eq!(found, [5 | 2 << 34 | ONE << 40, 0, IOVA, 0]),
        }
    }
    // LCT.4.3.
    let (mut rig, _) = guest(Arch::Vtd, &[]);
    let entry = rig.guest.structure(ONE);
    rig.guest.store(entry, rig.guest.load(entry) + NOWHERE);
    rig.commands(&[Arch::Vtd.forget_device(ONE, 7)]);
    assert_eq!(record(&mut rig, read(ONE, IOVA)), [IOVA, ONE | 3 << 32 | 1 << 62 | 1 << 63]);
}

/// An STE that aborts has no event; a StreamID beyond the table has one if CR2.RECINVSID says so; C_BAD_SUBSTREAMID has no SSV.
#[test]
fn streams_that_have_no_event_and_such_that_have() {
    let (mut rig, _) = guest(Arch::Smmu, &[]);
    rig.guest.abort(TWO);
    is_silent(&mut rig, read(TWO, IOVA));
    is_silent(&mut rig, read(0x1000, IOVA));
    let substream = BlockedDma { requester: Requester { id: ONE, pasid: Some(3) }, ..read(ONE, IOVA) };
    assert_eq!(record(&mut rig, substream), [0x08 | 3 << 12 | ONE << 32, 0, 0, 0]);
    let mut registers = Arch::Smmu.registers();
    registers.iter_mut().filter(|(name, _)| name == "CR2").for_each(|(_, value)| *value |= 1 << 1);
    let supervisor = Supervisor::new(plugin("arm-smmuv3"), Policy::default());
    let mut rig = Rig::with(Guest::new(Arch::Smmu), supervisor, "arm-smmuv3", registers, Limits::default());
    assert_eq!(record(&mut rig, read(0x1000, IOVA)), [0x02 | 0x1000 << 32, 0, 0, 0]);
}

/// Nothing translates: an address with more bits than the unit has is told all the same.
#[test]
fn addresses_that_pass_may_be_too_large() {
    let mut rig = Rig::new(Arch::Smmu, Limits::default());
    rig.guest.bypass(ONE);
    rig.viommu.connect(ONE, false);
    is_silent(&mut rig, read(ONE, NOWHERE));
    assert_eq!(record(&mut rig, read(ONE, 1 << 48)), [0x11 | ONE << 32, 1 << 35 | 2 << 40, 1 << 48, 0]);
    for arch in [Arch::Amd, Arch::Riscv] {
        let mut rig = Rig::new(arch, Limits::default());
        rig.guest.bypass(ONE);
        rig.viommu.connect(ONE, false);
        is_silent(&mut rig, read(ONE, 1 << 60));
    }
}

/// Reserved bits and levels that there are not: of AMD's device table entry (RZ), and of host tables.
#[test]
fn reserved_bits_are_no_levels() {
    let (mut rig, root) = guest(Arch::Amd, &[1 << 2]);
    assert_eq!(record(&mut rig, write(ONE, IOVA)), [1 << 60 | 1 << 55 | 1 << 53 | ONE, IOVA]);
    // Mode 7.
    let entry = rig.guest.structure(ONE);
    rig.guest.store(entry, rig.guest.load(entry) & !(1 << 2) | 7 << 9);
    rig.commands(&[Arch::Amd.forget_device(ONE, 7)]);
    assert_eq!(record(&mut rig, write(ONE, IOVA)), [1 << 60 | 1 << 53 | ONE, IOVA]);
    rig.guest.store(entry, rig.guest.load(entry) & !(7 << 9) | 4 << 9);
    rig.commands(&[Arch::Amd.forget_device(ONE, 7)]);
    let slot = rig.guest.slot_at(root, IOVA, 2).0;
    let pointer = rig.guest.load(slot);
    // PR, RW; RZ for bit 52, and not for a level that is no lower one.
    for (bits, reserved) in [(1_u64 << 52, 1_u64), (7 << 9, 0)] {
        rig.guest.store(slot, pointer | bits);
        if reserved == 0 {
            rig.guest.store(slot, pointer & !(7 << 9) | 5 << 9);
        }
        assert_eq!(record(&mut rig, write(ONE, IOVA)), [2 << 60 | reserved << 55 | 3 << 52 | ONE | 7 << 32, IOVA]);
    }
}

/// A PASID that no host has, with a table that the guest set up: what that says is told.
#[test]
fn pasids_that_the_host_does_not_have_are_told_what_their_tables_say() {
    let mut registers = Arch::Riscv.registers();
    // PD8.
    registers.iter_mut().filter(|(name, _)| name == "CAPABILITIES").for_each(|(_, value)| *value |= 1 << 38);
    let supervisor = Supervisor::new(plugin("riscv-iommu"), Policy::default());
    let mut rig = Rig::with(Guest::new(Arch::Riscv), supervisor, "riscv-iommu", registers, Limits::default());
    let (root, directory) = (rig.guest.new_table(), rig.guest.new_table());
    rig.guest.map_page(root, IOVA, DATA, false);
    // Context 0: V, PSCID 7; Sv48.
    for (index, word) in [1 | 7 << 12, 9 << 60 | root >> 12].into_iter().enumerate() {
        rig.guest.store(directory + index as u64 * 8, word);
    }
    // V, PDTV, DPE; PD8.
    for (index, word) in [1 | 1 << 5 | 1 << 9, 0, 0, 1 << 60 | directory >> 12].into_iter().enumerate().rev() {
        rig.guest.store(rig.guest.structure(ONE) + index as u64 * 8, word);
    }
    rig.viommu.connect(ONE, true);
    assert_eq!(rig.reads(ONE, IOVA), Some(DATA));
    let zero = BlockedDma { requester: Requester { id: ONE, pasid: Some(0) }, ..write(ONE, IOVA) };
    // Write page fault; PV, PID 0.
    assert_eq!(record(&mut rig, zero), [15 | 1 << 32 | 3 << 34 | ONE << 40, 0, IOVA, 0]);
}
