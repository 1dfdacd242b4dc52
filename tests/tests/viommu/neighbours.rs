//! A guest's device at its limits, and another one beside it: what that one's changes cost is the same, whatever its neighbour does.

use std::collections::BTreeMap;
use std::sync::Arc;

use stagecraft::ioasid::{Context, GuestMemory, Setup, Stats};
use stagecraft::kernel::sim::{Call, UnitConfig};
use stagecraft::sync::ShadowLimits;
use stagecraft::viommu::Handled;
use stagecraft::{Gpa, Span};

use super::behaviour::{ONE, TWO};
use super::guests::{Arch, DATA, Guest};
use super::kernel::{Counting, IOVA, Rig};

/// Tables of the second device are from here on.
const TABLES: u64 = 0x60_0000;
/// Of each address space.
const LIMITS: ShadowLimits = ShadowLimits { table_pages: 10, leaves: 64 };

/// What a change of the second device's cost, whoever did it.
#[derive(Debug, PartialEq)]
struct Work {
    step: &'static str,
    calls: BTreeMap<Call, u64>,
    /// Reads of its tables.
    reads: u64,
    changes: u64,
    lookups: u64,
    /// What its address space holds, and what plugins were asked for it.
    stats: Stats,
}

struct Life {
    rig: Rig,
    memory: Arc<Counting>,
    root: u64,
    /// The first device's driver asks for more than there may be, before each change of the second's.
    is_loud: bool,
    work: Vec<Work>,
    /// Most reads of other tables for a change of the second device's.
    elsewhere: u64,
}

impl Life {
    fn new(arch: Arch, host: UnitConfig, is_loud: bool) -> Self {
        let mut template = Rig::template();
        template.limits.shadow = LIMITS;
        let guest = Guest::new(arch);
        let memory = Arc::new(Counting::new(&guest.memory, Span { first: TABLES, last: DATA - 1 }));
        let mut rig = Rig::over(guest, host, template, |setup| {
            let memory = GuestMemory::new(Arc::clone(&memory), setup.memory.regions().to_vec()).unwrap();
            Context::with(Setup { memory, ..setup }).unwrap()
        });
        let root = rig.guest.new_table();
        rig.guest.map_page(root, IOVA, DATA, true);
        rig.guest.translate(ONE, root, 7);
        rig.viommu.connect(ONE, false);
        Self { rig, memory, root, is_loud, work: Vec::new(), elsewhere: 0 }
    }

    /// Tables without end, one page in each, and a command for each.
    fn hammer(&mut self) {
        let blocks = 1..40;
        let guest = &self.rig.guest;
        let here = guest.tables_from(0x30_0000);
        for block in blocks.clone() {
            guest.map_page(self.root, IOVA + (block << 21), DATA, true);
        }
        guest.tables_from(here);
        let commands: Vec<Vec<u8>> = blocks.map(|block| guest.arch.forget_page(7, IOVA + (block << 21))).collect();
        for _ in 0..4 {
            assert!(self.rig.commands(&commands).blocked >= 25);
        }
        assert_eq!((self.rig.reads(ONE, IOVA).is_some(), self.rig.reads(ONE, IOVA + (39 << 21))), (true, None));
    }

    fn step(&mut self, step: &'static str, act: impl FnOnce(&mut Rig) -> Handled) {
        if self.is_loud {
            self.hammer();
        }
        let before = self.rig.sim.calls();
        self.memory.take();
        let handled = act(&mut self.rig);
        let (reads, elsewhere) = self.memory.take();
        self.elsewhere = self.elsewhere.max(elsewhere);
        let mut calls = self.rig.sim.calls();
        calls.iter_mut().for_each(|(call, count)| *count -= before.get(call).copied().unwrap_or_default());
        calls.retain(|_, count| *count > 0);
        assert_eq!(handled.lost_events, 0);
        let stats = self.rig.space(TWO).map(stagecraft::ioasid::Ioasid::stats).unwrap_or_default();
        self.work.push(Work { step, calls, reads, changes: handled.changes, lookups: handled.lookups, stats });
    }

    fn live(&mut self) {
        let arch = self.rig.guest.arch;
        self.rig.guest.tables_from(TABLES);
        let roots = [self.rig.guest.new_table(), self.rig.guest.new_table()];
        for (root, at) in roots.iter().zip([DATA, DATA + 0x1000]) {
            self.rig.guest.map_page(*root, IOVA, at, true);
        }
        let forget = |iova| arch.forget_page(8, iova);
        self.step("it comes", |rig| {
            rig.guest.translate(TWO, roots[0], 8);
            rig.viommu.connect(TWO, false)
        });
        self.step("a page", |rig| {
            rig.guest.map_page(roots[0], IOVA + 0x1000, DATA, false);
            rig.commands(&[forget(IOVA + 0x1000)])
        });
        self.step("a page in another table, written and not announced", |rig| {
            rig.guest.map_page(roots[0], IOVA + (1 << 21), DATA, true);
            let slot = rig.guest.slot_at(roots[0], IOVA + (1 << 21), 1);
            rig.viommu.table_written(slot, 8)
        });
        self.step("a page goes", |rig| {
            rig.guest.unmap_page(roots[0], IOVA);
            rig.commands(&[forget(IOVA)])
        });
        self.step("another root", |rig| {
            rig.guest.translate(TWO, roots[1], 9);
            rig.commands(&[arch.forget_device(TWO, 8)])
        });
        self.step("bypass", |rig| {
            rig.guest.bypass(TWO);
            rig.commands(&[arch.forget_device(TWO, 9)])
        });
        self.step("and back", |rig| {
            rig.guest.translate(TWO, roots[0], 8);
            let at = rig.guest.structure(TWO);
            rig.viommu.table_written(Gpa(at), 32)
        });
        assert_eq!((self.rig.reads(TWO, IOVA), self.rig.reads(TWO, IOVA + (1 << 21)).is_some()), (None, true));
    }
}

#[test]
fn a_neighbour_at_its_limits_costs_others_nothing() {
    for arch in Arch::ALL {
        for host in [UnitConfig::vtd("VT-d"), UnitConfig::vtd("VT-d without nesting").without_nesting()] {
            let what = format!("{arch:?} on {}", host.name);
            let [quiet, loud] = [false, true].map(|is_loud| {
                let mut life = Life::new(arch, host.clone(), is_loud);
                life.live();
                life
            });
            assert!(quiet.work.iter().any(|work| work.reads > 0) && quiet.work.iter().any(|work| !work.calls.is_empty()), "{what}");
            for (quiet, loud) in quiet.work.iter().zip(&loud.work) {
                assert_eq!(quiet, loud, "{what}");
            }
            // What was blocked is looked at once more now and then: no more than there may be of it.
            assert_eq!(quiet.elsewhere, 0, "{what}");
            assert!(loud.elsewhere <= 2 * LIMITS.table_pages, "{what}: {}", loud.elsewhere);
            [quiet, loud].into_iter().for_each(|life| life.rig.end(&what));
        }
    }
}
