//! Accessed and dirty marks: from a device's DMA back into the guest's own entries, where its structures promise that hardware sets them, and nowhere else.

use stagecraft::ioasid::Strategy;
use stagecraft::kernel::sim::UnitConfig;
use stagecraft::{Gpa, Iova};

use super::behaviour::ONE;
use super::contexts::{SCALABLE, entry, guest_cr3_table, scalable_entries};
use super::guests::{Arch, DATA, Guest};
use super::kernel::{IOVA, Rig};

/// Marks that hardware sets.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Promised {
    accessed: bool,
    dirty: bool,
}

const NONE: Promised = Promised { accessed: false, dirty: false };
const ACCESSED: Promised = Promised { accessed: true, dirty: false };
const BOTH: Promised = Promised { accessed: true, dirty: true };

/// Tables of a guest's.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Tables {
    Smmu,
    VtdFirst,
    VtdSecond,
    AmdV1,
    AmdV2,
    RiscvFirst,
    RiscvSecond,
}

/// What guests can say. VT-d's hardware always marks first-stage entries.
const CASES: [(Tables, Promised); 14] = [
    (Tables::Smmu, NONE),
    (Tables::Smmu, ACCESSED),
    (Tables::Smmu, BOTH),
    (Tables::VtdFirst, BOTH),
    (Tables::VtdSecond, NONE),
    (Tables::VtdSecond, BOTH),
    (Tables::AmdV1, NONE),
    (Tables::AmdV1, BOTH),
    (Tables::AmdV2, NONE),
    (Tables::AmdV2, BOTH),
    (Tables::RiscvFirst, NONE),
    (Tables::RiscvFirst, BOTH),
    (Tables::RiscvSecond, NONE),
    (Tables::RiscvSecond, BOTH),
];

impl Tables {
    const fn arch(self) -> Arch {
        match self {
            Self::Smmu => Arch::Smmu,
            Self::VtdFirst | Self::VtdSecond => Arch::Vtd,
            Self::AmdV1 | Self::AmdV2 => Arch::Amd,
            Self::RiscvFirst | Self::RiscvSecond => Arch::Riscv,
        }
    }

    fn registers(self, promised: Promised) -> Vec<(String, u64)> {
        let dis = |promised: bool, bit: u32| u64::from(!promised) << bit;
        match self {
            // HTTU is there.
            Self::Smmu | Self::AmdV1 => self.arch().registers(),
            // SSADS, SSTS.
            Self::VtdFirst | Self::VtdSecond => self.arch().registers_and(&[&SCALABLE[..], &[("ECAP", 1 << 45 | 1 << 46)]].concat()),
            // GTEn; GDUpdateDis, GAUpdateDis.
            Self::AmdV2 => self.arch().registers_and(&[("CONTROL", 1 << 16 | dis(promised.dirty, 48) | dis(promised.accessed, 54))]),
            // AMO_HWAD.
            Self::RiscvFirst | Self::RiscvSecond => self.arch().registers_and(&[("CAPABILITIES", 1 << 24)]),
        }
    }

    /// The first device gets what the table at `root` has.
    fn translate(self, guest: &Guest, root: u64, promised: Promised) {
        let Promised { accessed, dirty } = promised;
        let at = guest.structure(ONE);
        let set = |at: u64, bits: u64| guest.store(at, guest.load(at) | bits);
        match self {
            // HA, HD of the context descriptor.
            Self::Smmu => {
                guest.translate(ONE, root, 7);
                let cd = guest.load(at) & 0x000f_ffff_ffff_ffc0;
                set(cd, u64::from(accessed) << 43 | u64::from(dirty) << 42);
            }
            Self::VtdFirst => entry(guest, scalable_entries(guest), 0, root, 7),
            // P, AW 2, PGTT 2, SSADE; DID.
            Self::VtdSecond => {
                let entries = scalable_entries(guest);
                guest.store(entries + 8, 7);
                guest.store(entries, root | 1 | 2 << 2 | 2 << 6 | u64::from(dirty) << 9);
            }
            // HAD.
            Self::AmdV1 => {
                guest.translate(ONE, root, 7);
                set(at, u64::from(accessed) << 7 | u64::from(dirty) << 8);
            }
            Self::AmdV2 => {
                let directory = guest.new_table();
                guest.store(directory, root | 1);
                guest_cr3_table(guest, directory, 7);
            }
            // SADE.
            Self::RiscvFirst => {
                guest.translate(ONE, root, 7);
                set(at, u64::from(dirty) << 8);
            }
            // Sv48x4, GSCID; V, GADE.
            Self::RiscvSecond => {
                guest.store(at + 8, 9 << 60 | 7 << 44 | root >> 12);
                guest.store(at, 1 | u64::from(dirty) << 7);
            }
        }
    }

    fn slot(self, guest: &Guest, root: u64, iova: u64) -> u64 {
        if self.is_x86() { guest.first_stage_slot(root, iova).0 } else { guest.slot(root, iova).0 }
    }

    const fn is_x86(self) -> bool {
        matches!(self, Self::VtdFirst | Self::AmdV2)
    }

    /// A page that may be read and written, and was neither.
    fn page(self, address: u64) -> u64 {
        match self {
            // Read-only and DBM; no AF.
            Self::Smmu => self.arch().page(address, false) & !(1 << 10) | 1 << 51,
            Self::VtdFirst | Self::AmdV2 => address | 7,
            Self::VtdSecond | Self::AmdV1 => self.arch().page(address, true),
            Self::RiscvFirst | Self::RiscvSecond => self.arch().page(address, true) & !0xc0,
        }
    }

    /// The entry as hardware leaves it that accessed the page.
    const fn accessed(self, entry: u64) -> u64 {
        match self {
            Self::Smmu => entry | 1 << 10,
            Self::VtdFirst | Self::AmdV2 | Self::AmdV1 => entry | 1 << 5,
            Self::VtdSecond => entry | 1 << 8,
            Self::RiscvFirst | Self::RiscvSecond => entry | 1 << 6,
        }
    }

    /// The same for a write.
    const fn dirty(self, entry: u64) -> u64 {
        match self {
            Self::Smmu => entry & !(1 << 7),
            Self::VtdFirst | Self::AmdV2 | Self::AmdV1 => entry | 1 << 6,
            Self::VtdSecond => entry | 1 << 9,
            Self::RiscvFirst | Self::RiscvSecond => entry | 1 << 7,
        }
    }

    /// Marks that hardware does not set are the guest's to set, and permissions.
    const fn marks_are_permissions(self) -> bool {
        matches!(self, Self::Smmu | Self::RiscvFirst | Self::RiscvSecond)
    }

    /// Hardware marks what leads to a page as well.
    const fn marks_pointers(self) -> bool {
        matches!(self, Self::VtdFirst | Self::VtdSecond | Self::AmdV1 | Self::AmdV2)
    }
}

/// What a device does with a page.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Use {
    Nothing,
    Read,
    Write,
}

/// A page, the entry of it as the guest wrote it, and what a device does with it.
struct Page {
    iova: u64,
    slot: u64,
    before: u64,
    is_marked: bool,
    /// Has the mark of a write, or waits for none.
    is_dirty: bool,
    used: Use,
}

impl Page {
    /// Whether what the device does with it is allowed.
    fn passes(&self, tables: Tables, promised: Promised) -> bool {
        let reads = self.is_marked || promised.accessed || !tables.marks_are_permissions();
        let writes = reads && (self.is_dirty || promised.dirty || !tables.marks_are_permissions());
        match self.used {
            Use::Nothing => true,
            Use::Read => reads,
            Use::Write => writes,
        }
    }
}

/// What becomes of the host's leaves between the use of a page and the question for its marks.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Then {
    Nothing,
    /// All are written anew, so that writes are recorded, and once more.
    Recorded,
    /// Their table goes with the device.
    Gone,
}

/// One guest on one host, whose entries are looked at: `exact` says that the host tells which pages were used.
fn follow(tables: Tables, promised: Promised, host: UnitConfig, strategy: Strategy, exact: bool, then: Then) {
    let what = format!("{tables:?}, {promised:?}, on {}: {strategy}, {then:?}", host.name);
    let template = Rig::template().with_strategies(&[strategy]);
    let mut rig = Rig::with_registers(tables.arch(), tables.registers(promised), host, template);
    let guest = &rig.guest;
    // A second stage of RISC-V's has a root of four pages, aligned to its size.
    let root = (0..8).map(|_| guest.new_table()).filter(|page| page.is_multiple_of(0x4000)).last().unwrap();
    // Pages that were never used, the same with the first mark, and with that of a write alone.
    let uses = [Use::Nothing, Use::Read, Use::Write];
    let mut pages: Vec<Page> = (0..9)
        .map(|page| {
            let (iova, clean) = (IOVA + (page << 12), tables.page(DATA + (page << 12)));
            let (slot, is_marked, is_dirty) = (tables.slot(guest, root, iova), page / 3 == 1, page / 3 == 2);
            let before = match page / 3 {
                0 => clean,
                1 => tables.accessed(clean),
                _ => tables.dirty(clean),
            };
            Page { iova, slot, before, is_marked, is_dirty, used: uses[page as usize % 3] }
        })
        .collect();
    pages.iter().for_each(|page| guest.store(page.slot, page.before));
    tables.translate(guest, root, promised);
    let pointer = root + (IOVA >> 39) * 8;
    let leads = guest.load(pointer);
    for round in 0..3 {
        if round == 0 || then == Then::Gone {
            rig.viommu.connect(ONE, false);
        }
        assert_eq!(rig.strategy(ONE), strategy, "{what}");
        // The guest takes all marks back, and other pages are used.
        for page in &mut pages {
            rig.guest.store(page.slot, page.before);
            rig.viommu.table_written(Gpa(page.slot), 8);
            page.used = uses[(uses.iter().position(|used| *used == page.used).unwrap() + 1) % 3];
        }
        let what = format!("{what}, round {round}");
        let check = |rig: &mut Rig, is_used: bool| {
            rig.viommu.host().context().write_marks();
            for page @ Page { iova, slot, before, used, .. } in &pages {
                // What is refused is no use.
                let is_used = is_used && *used != Use::Nothing && page.passes(tables, promised);
                let accessed = if promised.accessed && (is_used || !exact) { tables.accessed(*before) } else { *before };
                let is_written = is_used && *used == Use::Write || !exact;
                let wanted = if promised.dirty && is_written { tables.dirty(accessed) } else { accessed };
                let found = rig.guest.load(*slot);
                assert_eq!(found, wanted, "{what}: {used:?} of {iova:#x}, yet {is_used}: {before:#x} was to be {wanted:#x} and is {found:#x}");
            }
            let wanted = if tables.marks_pointers() && promised.accessed { tables.accessed(leads) } else { leads };
            assert_eq!(rig.guest.load(pointer), wanted, "{what}: what leads to them");
            // The engine's own writes are no changes by the guest.
            assert_eq!(rig.viommu.table_written(Gpa(0), u64::MAX).changes, 0, "{what}");
        };
        check(&mut rig, false);
        let device = rig.sim.device("one").unwrap();
        for page @ Page { iova, used, before, .. } in &pages {
            let passes = match used {
                Use::Nothing => true,
                Use::Read => device.read(None, Iova(*iova), &mut [0; 8]).is_ok(),
                Use::Write => device.write(None, Iova(*iova), &[1; 8]).is_ok(),
            };
            assert_eq!(passes, page.passes(tables, promised), "{what}: {used:?} of {iova:#x}, {before:#x}");
        }
        match then {
            Then::Nothing => {}
            Then::Recorded => [true, false, true, false].iter().for_each(|on| rig.viommu.host().context().track_dirty(*on).unwrap()),
            Then::Gone => drop(rig.viommu.disconnect(ONE)),
        }
        check(&mut rig, true);
    }
    rig.end(&what);
}

#[test]
fn guests_find_the_marks_that_their_structures_promise_and_no_others() {
    for (tables, promised) in CASES {
        for host in [UnitConfig::vtd("VT-d"), UnitConfig::amd("AMD")] {
            for then in [Then::Nothing, Then::Recorded, Then::Gone] {
                follow(tables, promised, host.clone(), Strategy::Nested, true, then);
            }
        }
        // The kernel does not tell what of its areas was written: all of it counts.
        for then in [Then::Nothing, Then::Gone] {
            follow(tables, promised, UnitConfig::vtd("VT-d without nesting").without_nesting(), Strategy::Areas, false, then);
        }
    }
}
