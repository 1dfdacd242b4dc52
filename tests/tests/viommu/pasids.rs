//! PASIDs beside a device's own table, over a context: where they belong to the owner of such a table, it is made anew when the first one comes and when the last one goes. A
//! kernel that fails then may leave the device itself nowhere, in a call that was about its PASID.

use stagecraft::Iova;
use stagecraft::kernel::sim::UnitConfig;
use stagecraft::kernel::{Errno, Pasid};
use stagecraft::plugin::Requester;
use stagecraft::viommu::StreamState;

use super::behaviour::{ONE, TWO};
use super::guests::{Arch, DATA, words};
use super::kernel::{IOVA, Rig};

/// A guest whose first device has context descriptors for its PASIDs, and uses PASID 1 or not; the other device shares its own table.
struct Guest {
    rig: Rig,
    descriptors: u64,
    roots: [u64; 2],
}

impl Guest {
    fn new() -> Self {
        let mut rig = Rig::new(Arch::Smmu, UnitConfig::smmuv3("host"));
        let guest = &rig.guest;
        let roots = [guest.new_table(), guest.new_table()];
        for (root, page) in roots.iter().zip(0..) {
            guest.map_page(*root, IOVA, DATA + (page << 12), true);
        }
        let descriptors = guest.new_table();
        guest.write_cd(descriptors, roots[0], 7);
        // V, Config 5, S1Fmt 0, S1CDMax 2; S1DSS 2: requests without a SubstreamID use CD 0.
        for id in [ONE, TWO] {
            let max = if id == ONE { 2 } else { 0 };
            for (index, word) in [2, 1 | 5 << 1 | descriptors | max << 59].iter().enumerate() {
                guest.store(guest.structure(id) + 8 - index as u64 * 8, *word);
            }
        }
        rig.viommu.connect(ONE, true);
        rig.viommu.connect(TWO, false);
        let this = Self { rig, descriptors, roots };
        this.check("at first");
        assert_eq!((this.reads("one", None), this.reads("two", None)), (Some(DATA), Some(DATA)));
        this
    }

    /// The guest sets PASID 1 up, or takes it away, and says so: CFGI_CD.
    fn pasid(&mut self, on: bool) {
        let at = self.descriptors + 64;
        if on {
            self.rig.guest.write_cd(at, self.roots[1], 8);
        } else {
            self.rig.guest.store(at, 0);
        }
        let handled = self.rig.commands(&[words(&[5 | 1 << 11 | 1 << 12 | ONE << 32, 1])]);
        assert!(handled.loose.is_empty(), "{handled:?}");
    }

    fn reads(&self, label: &str, pasid: Option<u32>) -> Option<u64> {
        let mut bytes = [0; 8];
        self.rig.sim.device(label).unwrap().read(pasid.map(Pasid), Iova(IOVA), &mut bytes).ok()?;
        Some(u64::from_le_bytes(bytes))
    }

    /// What counts as attached is, and nothing else is: how many that are.
    fn check(&self, what: &str) -> usize {
        let viommu = &self.rig.viommu;
        let mut attached = 0;
        for (Requester { id, pasid }, state) in viommu.streams() {
            let label = if id == ONE { "one" } else { "two" };
            let there = viommu.host().context().device(label).unwrap().attached();
            let is_there = there.iter().any(|(known, _)| *known == pasid.map(Pasid));
            assert_eq!(matches!(state, StreamState::Space(_)), is_there, "{what}: {id:#x} {pasid:?} is {state:?}, {there:?}");
            let wanted = is_there.then_some(DATA + u64::from(pasid.is_some()) * 0x1000);
            assert_eq!(self.reads(label, pasid), wanted, "{what}: {id:#x} {pasid:?}");
            attached += usize::from(is_there);
        }
        attached
    }

    /// What failed is tried again, and then all is well.
    fn settle(&mut self, count: usize, what: &str) {
        for _ in 0..16 {
            self.rig.viommu.idle();
        }
        assert_eq!((self.check(what), self.rig.viommu.figures().pending), (count, 0), "{what}");
        let viommu = &self.rig.viommu;
        for id in viommu.host().context().ioasids() {
            assert_eq!(id.stats().blocked, 0, "{what}: nobody waits for a recovery");
        }
    }
}

#[test]
fn a_device_that_is_lost_for_a_pasid_counts_as_blocked_and_comes_back() {
    for comes in [true, false] {
        let mut lost = 0;
        for stays in [false, true] {
            for n in 1.. {
                let mut guest = Guest::new();
                if !comes {
                    guest.pasid(true);
                    assert_eq!((guest.check("with a PASID"), guest.reads("one", Some(1))), (3, Some(DATA + 0x1000)));
                }
                let what = format!("a PASID comes: {comes}, call {n}, stays {stays}");
                if stays {
                    guest.rig.sim.fail_from(n, Errno::ENOMEM);
                } else {
                    guest.rig.sim.fail_nth(n, Errno::ENOMEM);
                }
                guest.pasid(comes);
                let is_over = guest.rig.sim.disarm();
                guest.check(&what);
                lost += usize::from(guest.reads("one", None).is_none() || guest.reads("two", None).is_none());
                guest.settle(2 + usize::from(comes), &what);
                // And the other way round.
                guest.pasid(!comes);
                guest.settle(3 - usize::from(comes), &what);
                if is_over {
                    break;
                }
            }
        }
        assert!(lost > 0, "a PASID comes: {comes}: nobody was lost");
    }
}
