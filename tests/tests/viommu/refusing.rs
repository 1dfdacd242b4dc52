//! A kernel that refuses the n-th call in the life of a vIOMMU, or all from there on for a while: devices get what the guest says or nothing, and in the end what it says.

use stagecraft::ioasid::Strategy;
use stagecraft::kernel::Errno;
use stagecraft::kernel::sim::UnitConfig;
use stagecraft::viommu::Handled;

use super::behaviour::{ONE, TWO};
use super::guests::{Arch, DATA};
use super::kernel::{IOVA, Rig};

/// What fails.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Failing {
    Call,
    Step,
    CallsFromThere,
}

/// IOVAs that are tried, and where each device gets from them.
const TRIED: [u64; 3] = [IOVA, IOVA + 0x1000, DATA + 0x4000];
type Wanted = [[Option<u64>; 3]; 2];

struct Life {
    rig: Rig,
    failing: Failing,
    what: String,
}

impl Life {
    fn found(&self) -> Wanted {
        [ONE, TWO].map(|id| TRIED.map(|iova| self.rig.reads(id, iova)))
    }

    /// What came of a call; then whatever could not be done is tried again.
    fn check(&mut self, step: &str, handled: &Handled, wanted: Wanted) {
        let what = format!("{}: {step}", self.what);
        assert!(handled.loose.is_empty(), "{what}: {handled:?}");
        for (found, wanted) in self.found().as_flattened().iter().zip(wanted.as_flattened()) {
            assert!(found.is_none() || found == wanted, "{what}: {found:x?} instead of {wanted:x?}");
        }
        for _ in 0..64 {
            if self.found() == wanted && self.rig.viommu.figures().pending == 0 {
                return;
            }
            if self.failing == Failing::CallsFromThere {
                self.rig.sim.disarm();
            }
            // What the kernel has no memory for is no failure of a call: whoever has some again says so.
            for ioasid in self.rig.viommu.host().context().ioasids() {
                if ioasid.stats().without_memory > 0 {
                    ioasid.synchronise().unwrap();
                }
            }
            let handled = self.rig.viommu.idle();
            assert!(handled.loose.is_empty(), "{what}: {handled:?}");
        }
        panic!("{what}: {:x?} instead of {wanted:x?}, {:?}", self.found(), self.rig.viommu.figures());
    }

    fn live(&mut self) {
        let arch = self.rig.guest.arch;
        let roots = [self.rig.guest.new_table(), self.rig.guest.new_table()];
        for (root, at) in roots.iter().zip([DATA, DATA + 0x1_0000]) {
            for page in 0..2 {
                self.rig.guest.map_page(*root, IOVA + (page << 12), at + (page << 12), true);
            }
        }
        let pages = |at: u64| [Some(at), Some(at + 0x1000), None];
        let (first, second, plain, none) = (pages(DATA), pages(DATA + 0x1_0000), [None, None, Some(TRIED[2])], [None; 3]);
        for (id, wanted) in [(ONE, [first, none]), (TWO, [first; 2])] {
            self.rig.guest.translate(id, roots[0], 7);
            let handled = self.rig.viommu.connect(id, false);
            self.check("a device comes", &handled, wanted);
        }
        self.rig.guest.unmap_page(roots[0], IOVA);
        let handled = self.rig.commands(&[arch.forget_page(7, IOVA)]);
        self.check("unmapped", &handled, [[None, first[1], None]; 2]);
        self.rig.guest.map_page(roots[0], IOVA, DATA, true);
        let handled = self.rig.commands(&[arch.forget_page(7, IOVA)]);
        self.check("mapped", &handled, [first; 2]);
        // One device leaves the address space of both, the other one follows, both go back.
        for (id, wanted) in [(ONE, [second, first]), (TWO, [second; 2])] {
            self.rig.guest.translate(id, roots[1], 8);
            let handled = self.rig.commands(&[arch.forget_device(id, 7)]);
            self.check("another table", &handled, wanted);
        }
        [ONE, TWO].iter().for_each(|id| self.rig.guest.translate(*id, roots[0], 7));
        let handled = self.rig.commands(&[ONE, TWO].map(|id| arch.forget_device(id, 8)));
        self.check("both go back", &handled, [first; 2]);
        self.rig.guest.bypass(TWO);
        let handled = self.rig.commands(&[arch.forget_device(TWO, 7)]);
        self.check("bypass", &handled, [first, plain]);
        self.rig.guest.abort(ONE);
        let handled = self.rig.commands(&[arch.forget_device(ONE, 7)]);
        self.check("abort", &handled, [none, plain]);
        self.rig.guest.translate(ONE, roots[1], 8);
        let handled = self.rig.commands(&[arch.forget_device(ONE, 0)]);
        self.check("and a table again", &handled, [second, plain]);
        let handled = self.rig.viommu.disconnect(TWO);
        self.check("a device goes", &handled, [second, none]);
    }
}

#[test]
fn whatever_the_kernel_refuses_devices_get_what_the_guest_says_or_nothing() {
    let cases = [
        (Arch::Smmu, UnitConfig::vtd("VT-d"), Strategy::Nested),
        (Arch::Riscv, UnitConfig::amd("AMD"), Strategy::Nested),
        (Arch::Amd, UnitConfig::smmuv3("SMMUv3"), Strategy::Nested),
        (Arch::Vtd, UnitConfig::vtd("VT-d without nesting").without_nesting(), Strategy::Areas),
    ];
    for ((arch, host, strategy), failing) in
        cases.iter().flat_map(|case| [Failing::Call, Failing::Step, Failing::CallsFromThere].map(|failing| (case.clone(), failing)))
    {
        for n in 1.. {
            let what = format!("{arch:?} on {}, {strategy}: {failing:?} {n}", host.name);
            let rig = Rig::with(arch, host.clone(), Rig::template().with_strategies(&[strategy]));
            match failing {
                Failing::Call => rig.sim.fail_nth(n, Errno::ENOMEM),
                Failing::Step => rig.sim.fail_step_nth(n, Errno::ENOMEM),
                Failing::CallsFromThere => rig.sim.fail_from(n, Errno::ENOMEM),
            }
            let mut life = Life { rig, failing, what };
            life.live();
            let Life { rig, what, .. } = life;
            let is_over = rig.sim.disarm();
            rig.end(&what);
            if is_over {
                assert!(n > 10, "{what}");
                break;
            }
        }
    }
}
