//! The judge judged: with invalidations damaged on their way to the kernel, the test that nothing is stale must find it, on every host.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use stagecraft::ioasid::{Context, Request, Setup, Strategy};
use stagecraft::kernel::{Before, Invalidate, InvalidateError, Kernel, Result};

use crate::converted::check;
use crate::guests::{Arch, Guest};
use crate::rig::{DATA, Rig, unit};

/// What happens to invalidation arrays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Damage {
    None,
    /// Nothing arrives.
    Lost,
    /// Without the last entry.
    Shortened,
    /// All entries are for leaves only.
    LeavesOnly,
    /// Addresses are a page too high.
    Beside,
    /// Ranges are for one page.
    OnePage,
    /// They name another address space, or page table.
    OtherSpace,
}

#[derive(Debug)]
struct Damaging {
    kernel: Arc<dyn Kernel>,
    host: Arch,
    damage: Damage,
}

/// The words of an entry, as the architectures have them.
fn words(entry: &[u8]) -> Vec<u64> {
    entry.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
}

impl Damaging {
    fn entry(&self, entry: &[u8]) -> Vec<u8> {
        let mut words = words(entry);
        let is_all = match self.host {
            Arch::Vtd => words[1] == u64::MAX,
            Arch::Arm => words[0] & 0xff != 0x12,
            Arch::Amd => words[1] | 0x8000_0000_0000_0fff == u64::MAX,
            Arch::Riscv => words[0] & 1 << 10 == 0,
        };
        match (self.damage, self.host) {
            // VT-d flags 0; SMMUv3 word 1 bit 0; AMD PDE word 1 bit 1; RISC-V NL word 0 bit 34.
            (Damage::LeavesOnly, Arch::Vtd) => words[2] |= 1,
            (Damage::LeavesOnly, Arch::Arm) if !is_all => words[1] |= 1,
            (Damage::LeavesOnly, Arch::Amd) => words[1] &= !2,
            (Damage::LeavesOnly, Arch::Riscv) => words[0] &= !(1 << 34),
            (Damage::Beside, Arch::Vtd) if !is_all => words[0] += 0x1000,
            (Damage::Beside, Arch::Riscv) if !is_all => words[1] += 1 << 10,
            (Damage::Beside, Arch::Arm | Arch::Amd) if !is_all => words[1] += 0x1000,
            (Damage::OnePage, Arch::Vtd) if !is_all => words[1] = 1,
            (Damage::OnePage, Arch::Arm) if !is_all => (words[0], words[1]) = (words[0] & !0x01f1_f000, words[1] & !0xf00),
            (Damage::OnePage, Arch::Amd) if !is_all => words[1] &= !1,
            (Damage::OtherSpace, Arch::Arm) => words[0] ^= 1 << 48,
            (Damage::OtherSpace, Arch::Amd) => words[0] ^= 1 << 32,
            (Damage::OtherSpace, Arch::Riscv) => words[0] ^= 1 << 12,
            _ => {}
        }
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }
}

impl Before for Damaging {
    fn behind(&self) -> &dyn Kernel {
        &*self.kernel
    }

    fn invalidate(&self, request: &Invalidate<'_>) -> Result<u32, InvalidateError> {
        let length = request.entry_length as usize;
        if request.entries.is_empty() || self.damage == Damage::None {
            return self.kernel.hwpt_invalidate(request);
        }
        let count = request.entries.len() / length;
        let kept = match self.damage {
            Damage::Lost => 0,
            Damage::Shortened => count - 1,
            _ => count,
        };
        let entries: Vec<u8> = request.entries.chunks(length).take(kept).flat_map(|entry| self.entry(entry)).collect();
        if !entries.is_empty() {
            self.kernel.hwpt_invalidate(&Invalidate { entries: &entries, ..*request })?;
        }
        Ok(count as u32)
    }
}

/// Whether the test of converted tables, or of a guest's own, finds the damage.
fn is_found(guest: Arch, host: Arch, strategy: Strategy, damage: Damage) -> bool {
    let rig = Rig::new(&[unit(host)], &[("nic", &[0])]);
    let guest = Guest::new(guest, &rig.memory);
    guest.map(0x1000, DATA, true);
    guest.map(0x2000, DATA + 0x5000, false);
    guest.map_large(0x4000_0000, 0x100_0000, true);
    let kernel: Arc<dyn Kernel> = Arc::new(Damaging { kernel: rig.kernel(), host, damage });
    let context = Context::with(Setup { kernel, ..rig.setup() }).unwrap();
    let device = context.connect("nic").unwrap();
    let ioasid = context.allocate(Request::guest(guest.view()).with_strategies(&[strategy])).unwrap();
    ioasid.attach(&device, None).unwrap();
    catch_unwind(AssertUnwindSafe(|| check(&rig, &guest, &ioasid, "damaged"))).is_err()
}

#[test]
fn each_damage_to_an_invalidation_is_found() {
    for host in Arch::ALL {
        let others = Arch::ALL.into_iter().filter(|guest| *guest != host);
        for guest in others.take(1) {
            for damage in [Damage::Lost, Damage::Shortened, Damage::LeavesOnly, Damage::Beside, Damage::OnePage, Damage::OtherSpace] {
                // RISC-V says one page at a time, and VT-d's page table is named by itself.
                let is_none = matches!((host, damage), (Arch::Riscv, Damage::OnePage) | (Arch::Vtd, Damage::OtherSpace));
                assert_eq!(is_found(guest, host, Strategy::Nested, damage), !is_none, "{guest:?} on {host:?}: {damage:?}");
            }
            assert!(!is_found(guest, host, Strategy::Nested, Damage::None));
        }
        if host != Arch::Amd {
            for damage in [Damage::Lost, Damage::LeavesOnly, Damage::Beside] {
                assert!(is_found(host, host, Strategy::Native, damage), "{host:?} as it is: {damage:?}");
            }
        }
    }
}
