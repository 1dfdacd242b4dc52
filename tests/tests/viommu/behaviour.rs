//! What a device reaches follows what the guest says: by commands, by writes, and by structures.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use stagecraft::kernel::Pasid;
use stagecraft::kernel::sim::DmaAccess;
use stagecraft::plugin::queue::{Effect, EventAccess, Invalidation, Scope};
use stagecraft::plugin::{Policy, Requester, Supervisor};
use stagecraft::sync::{ShadowLimits, Watcher};
use stagecraft::viommu::{BlockedDma, Handled, Illegal, Limits, StreamState, UnitConfig, Viommu};
use stagecraft::{Gpa, Iova, Span};
use stagecraft_tests::reference::generate::Rng;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::guests::{Arch, DATA, Guest, words};
use super::host::Host;

/// Pages that are watched at the moment; insists that nobody watches twice.
#[derive(Clone, Default)]
pub struct Watched(pub Arc<Mutex<BTreeSet<u64>>>);

impl Watcher for Watched {
    fn watch(&mut self, page: Gpa) {
        assert!(self.0.lock().unwrap().insert(page.0), "{page} is watched already");
    }

    fn unwatch(&mut self, page: Gpa) {
        assert!(self.0.lock().unwrap().remove(&page.0), "{page} is not watched");
    }
}

/// A guest, its vIOMMU, and devices.
pub struct Rig {
    pub guest: Guest,
    pub viommu: Viommu<GuestMemoryMmap, Host>,
    pub watched: Watched,
}

pub const ONE: u64 = 0x18;
pub const TWO: u64 = 0x20;

pub fn without_pasid(id: u64) -> Requester {
    Requester { id, pasid: None }
}

impl Rig {
    pub fn new(arch: Arch, limits: Limits) -> Self {
        let guest = Guest::new(arch);
        let supervisor = Supervisor::new(plugin(arch.kind()), Policy::default());
        Self::with(guest, supervisor, arch.kind(), arch.registers(), limits)
    }

    pub fn with(guest: Guest, supervisor: Supervisor, kind: &str, registers: Vec<(String, u64)>, limits: Limits) -> Self {
        for page in 0..64 {
            guest.store(DATA + (page << 12), DATA + (page << 12));
        }
        let vtd = Supervisor::new(plugin("intel-vtd"), Policy::default());
        let host = Host::new(&guest.memory, &Guest::map(), &[ONE, TWO], vtd);
        let unit = UnitConfig { kind: kind.to_owned(), registers, map: Guest::map(), limits };
        let watched = Watched::default();
        let viommu = Viommu::new(supervisor, unit, guest.memory.clone(), host, Box::new(watched.clone()));
        Self { guest, viommu, watched }
    }

    /// Both devices get what a table has, as one domain, and are connected.
    pub fn connect_both(&mut self, root: u64) {
        for id in [ONE, TWO] {
            self.guest.translate(id, root, 7);
            self.viommu.connect(id, false);
        }
    }

    /// Commands as one batch, with a wait behind them.
    pub fn commands(&mut self, commands: &[Vec<u8>]) -> Handled {
        let batch = [commands.concat(), self.guest.arch.wait()].concat();
        self.viommu.commands(&batch).unwrap()
    }

    /// What a device reads at the beginning of a page: the page's own address, or nothing.
    pub fn reads(&self, id: u64, iova: u64) -> Option<u64> {
        self.reads_with(id, None, iova)
    }

    pub fn reads_with(&self, id: u64, pasid: Option<u32>, iova: u64) -> Option<u64> {
        let mut bytes = [0; 8];
        self.viommu.host().device(id).read(pasid.map(Pasid), Iova(iova), &mut bytes).ok()?;
        Some(u64::from_le_bytes(bytes))
    }

    pub fn writes(&self, id: u64, iova: u64) -> bool {
        self.viommu.host().device(id).translate(None, Iova(iova), DmaAccess::Write).is_ok()
    }

    pub fn state(&self, id: u64) -> StreamState {
        self.viommu.stream(without_pasid(id)).unwrap().clone()
    }

    fn written(&mut self, slot: Gpa) -> Handled {
        self.viommu.table_written(slot, 8)
    }
}

/// A built-in plugin.
pub fn plugin(unit: &str) -> stagecraft::plugin::Plugin {
    use std::sync::OnceLock;
    static PLUGINS: OnceLock<stagecraft::plugin::Plugins> = OnceLock::new();
    let engine = || stagecraft::plugin::Engine::new(stagecraft::plugin::Config::default()).unwrap();
    PLUGINS.get_or_init(|| stagecraft::plugin::Plugins::builtin(&engine()).unwrap()).by_unit(unit).unwrap()
}

fn request(id: u64, iova: u64, access: EventAccess) -> BlockedDma {
    BlockedDma { requester: without_pasid(id), iova: Iova(iova), access, privileged: false }
}

const IOVA: u64 = 0x12_3456_7000;

#[test]
fn commands_take_effect_on_dma_and_nothing_else_does() {
    for arch in Arch::ALL {
        let mut rig = Rig::new(arch, Limits::default());
        let root = rig.guest.new_table();
        rig.guest.map_page(root, IOVA, DATA, true);
        rig.guest.map_page(root, IOVA + 0x1000, DATA + 0x1000, false);
        rig.guest.translate(ONE, root, 7);
        assert_eq!(rig.reads(ONE, IOVA), None, "{arch:?}: not connected");
        rig.viommu.connect(ONE, false);
        assert_eq!(rig.state(ONE), StreamState::Space(0), "{arch:?}");
        assert_eq!((rig.reads(ONE, IOVA), rig.writes(ONE, IOVA)), (Some(DATA), true), "{arch:?}");
        assert_eq!((rig.reads(ONE, IOVA + 0x1000), rig.writes(ONE, IOVA + 0x1000)), (Some(DATA + 0x1000), false), "{arch:?}");
        assert_eq!(rig.reads(ONE, IOVA + 0x2000), None, "{arch:?}");
        // Unmapped: until the command is there, hardware may use what it knows.
        rig.guest.unmap_page(root, IOVA);
        assert_eq!(rig.reads(ONE, IOVA), Some(DATA), "{arch:?}");
        rig.viommu.host().take_counts();
        let other = rig.commands(&[arch.forget_page(8, IOVA)]);
        assert_eq!((other.spaces, rig.reads(ONE, IOVA)), (0, Some(DATA)), "{arch:?}: another space is meant");
        let handled = rig.commands(&[arch.forget_page(7, IOVA)]);
        assert_eq!((handled.illegal, handled.changes, handled.spaces, handled.lookups), (None, 1, 1, 0), "{arch:?}");
        assert_eq!(rig.reads(ONE, IOVA), None, "{arch:?}");
        assert_eq!(rig.reads(ONE, IOVA + 0x1000), Some(DATA + 0x1000), "{arch:?}: its neighbour stays");
        // 64 commands, one call.
        for page in 0..64 {
            rig.guest.map_page(root, IOVA + (page << 12), DATA + (page << 12), true);
        }
        let batch: Vec<Vec<u8>> = (0..64).map(|page| arch.forget_page(7, IOVA + (page << 12))).collect();
        rig.commands(&batch);
        for page in 0..64 {
            rig.guest.unmap_page(root, IOVA + (page << 12));
        }
        assert_eq!(rig.reads(ONE, IOVA + 0x3f000), Some(DATA + 0x3f000), "{arch:?}");
        rig.viommu.host().take_counts();
        rig.commands(&batch);
        let counts = rig.viommu.host().take_counts();
        assert_eq!((counts.looks, counts.invalidations), (1, 1), "{arch:?}: once per space and batch");
        assert!((0..64).all(|page| rig.reads(ONE, IOVA + (page << 12)).is_none()), "{arch:?}");
    }
}

#[test]
fn guests_that_only_write_tables_are_followed_by_their_writes() {
    for arch in [Arch::Smmu, Arch::Riscv] {
        let mut rig = Rig::new(arch, Limits::default());
        let root = rig.guest.new_table();
        rig.guest.translate(ONE, root, 7);
        rig.viommu.connect(ONE, false);
        let calls = rig.viommu.supervisor().figures();
        let slot = rig.guest.map_page(root, IOVA, DATA, true);
        assert_eq!(rig.reads(ONE, IOVA), None, "{arch:?}: nobody was told");
        // The write to the root leads to the other tables, which are watched from then on.
        let handled = rig.written(Gpa(root + (IOVA >> 39 & 0x1ff) * 8));
        assert_eq!((handled.changes, rig.reads(ONE, IOVA)), (1, Some(DATA)), "{arch:?}");
        assert!(rig.watched.0.lock().unwrap().contains(&(slot.0 & !0xfff)), "{arch:?}");
        let slot = rig.guest.map_page(root, IOVA + 0x1000, DATA + 0x1000, true);
        assert_eq!(rig.reads(ONE, IOVA + 0x1000), None, "{arch:?}");
        let before = rig.viommu.supervisor().figures();
        let handled = rig.written(slot);
        assert_eq!((handled.changes, handled.lookups, handled.spaces), (1, 0, 1), "{arch:?}");
        assert_eq!(rig.reads(ONE, IOVA + 0x1000), Some(DATA + 0x1000), "{arch:?}");
        assert_eq!(rig.viommu.supervisor().figures(), before, "{arch:?}: no plugin is asked about known patterns");
        assert_ne!(before, calls, "{arch:?}");
        // What nobody looks at concerns nobody.
        assert_eq!(rig.viommu.table_written(Gpa(DATA), 4096).spaces, 0, "{arch:?}");
        // A write that may have been anywhere is one look at all tables.
        rig.guest.unmap_page(root, IOVA);
        let handled = rig.viommu.table_written(Gpa(0), u64::MAX);
        assert_eq!((handled.spaces, rig.reads(ONE, IOVA), rig.reads(ONE, IOVA + 0x1000)), (1, None, Some(DATA + 0x1000)), "{arch:?}");
    }
}

#[test]
fn a_stream_goes_where_its_structures_say() {
    for arch in Arch::ALL {
        let mut rig = Rig::new(arch, Limits::default());
        let (first, second) = (rig.guest.new_table(), rig.guest.new_table());
        for (root, target) in [(first, DATA), (second, DATA + 0x1_0000)] {
            rig.guest.map_page(root, IOVA, target, true);
            // A page that is the same in both.
            rig.guest.map_page(root, IOVA + 0x5000, DATA + 0x5000, true);
        }
        rig.guest.translate(ONE, first, 7);
        rig.viommu.connect(ONE, false);
        assert_eq!(rig.reads(ONE, IOVA), Some(DATA), "{arch:?}");
        // Nothing changed: nothing is done, and no plugin is asked.
        let before = rig.viommu.figures();
        let handled = rig.commands(&[arch.forget_device(ONE, 7)]);
        assert_eq!((handled.lookups, handled.spaces, handled.changes), (0, 0, 0), "{arch:?}");
        assert_eq!(rig.viommu.figures().unchanged, before.unchanged + 1, "{arch:?}");
        // Other roots: the space is the same, with other tables. A page that is alike is not touched.
        rig.guest.translate(ONE, second, 9);
        assert_eq!(rig.reads(ONE, IOVA), Some(DATA), "{arch:?}");
        let handled = rig.commands(&[arch.forget_device(ONE, 7)]);
        assert_eq!((rig.reads(ONE, IOVA), rig.reads(ONE, IOVA + 0x5000)), (Some(DATA + 0x1_0000), Some(DATA + 0x5000)), "{arch:?}");
        assert_eq!((rig.state(ONE), rig.viommu.figures().switches, handled.changes), (StreamState::Space(0), 1, 2), "{arch:?}");
        // It has another name now.
        rig.guest.unmap_page(second, IOVA);
        assert_eq!(rig.commands(&[arch.forget_page(7, IOVA)]).spaces, 0, "{arch:?}");
        assert_eq!(rig.commands(&[arch.forget_page(9, IOVA)]).spaces, 1, "{arch:?}");
        assert_eq!(rig.reads(ONE, IOVA), None, "{arch:?}");
        // Bypass, abort, and back.
        rig.guest.bypass(ONE);
        rig.commands(&[arch.forget_device(ONE, 9)]);
        assert_eq!((rig.reads(ONE, DATA), rig.reads(ONE, IOVA + 0x5000)), (Some(DATA), None), "{arch:?}");
        rig.guest.abort(ONE);
        rig.commands(&[arch.forget_device(ONE, 9)]);
        assert_eq!(rig.reads(ONE, DATA), None, "{arch:?}");
        assert!(matches!(rig.state(ONE), StreamState::Blocked(_)), "{arch:?}: {:?}", rig.state(ONE));
        assert_eq!(rig.viommu.figures().spaces, 0, "{arch:?}: nobody needs any");
        // A structure that is written and not announced is noticed by its page.
        rig.guest.translate(ONE, first, 7);
        let at = rig.guest.structure(ONE);
        rig.viommu.table_written(Gpa(at), 32);
        assert_eq!(rig.reads(ONE, IOVA), Some(DATA), "{arch:?}");
        // Gone: so is everything that was watched for it.
        rig.viommu.disconnect(ONE);
        assert_eq!(rig.reads(ONE, IOVA), None, "{arch:?}");
        assert!(rig.watched.0.lock().unwrap().is_empty(), "{arch:?}");
        let figures = rig.viommu.figures();
        assert_eq!((figures.streams, figures.spaces, figures.watched_pages, figures.pending), (0, 0, 0, 0), "{arch:?}");
    }
}

/// A command for a page that names a requester, or several at once by bits that play no part, is for their address spaces and for nobody else's.
#[test]
fn commands_may_name_requesters() {
    for arch in Arch::ALL {
        for (id, ignored, one, two) in
            [(ONE, 0, true, false), (TWO, 0, false, true), (ONE, ONE ^ TWO, true, true), (TWO, 7, false, true), (0x100, 7, false, false)]
        {
            let mut rig = Rig::new(arch, Limits::default());
            for (device, space) in [(ONE, 7), (TWO, 8)] {
                let root = rig.guest.new_table();
                rig.guest.map_page(root, IOVA, DATA, true);
                rig.guest.translate(device, root, space);
                rig.viommu.connect(device, false);
                assert_eq!(rig.reads(device, IOVA), Some(DATA), "{arch:?}");
                rig.guest.unmap_page(root, IOVA);
            }
            let scope = Scope { leaf: true, second_stage: false, domain: None, space: None, id: Some((id as u32, ignored as u32)) };
            let effect = Effect::Range { scope, iova: Span { first: IOVA, last: IOVA | 0xfff } };
            let handled = rig.viommu.invalidate(&[Invalidation { index: 0, effect }]);
            let gone = [ONE, TWO].map(|device| rig.reads(device, IOVA).is_none());
            assert_eq!((gone, handled.spaces), ([one, two], u64::from(one) + u64::from(two)), "{arch:?}: {id:#x} {ignored:#x}");
        }
    }
}

/// An address space that has no number within its domain is meant by a command for any of them.
#[test]
fn commands_with_a_number_are_for_those_without_one_as_well() {
    for arch in [Arch::Vtd, Arch::Amd] {
        let mut rig = Rig::new(arch, Limits::default());
        let root = rig.guest.new_table();
        rig.guest.map_page(root, IOVA, DATA, true);
        rig.guest.translate(ONE, root, 7);
        rig.viommu.connect(ONE, false);
        rig.guest.unmap_page(root, IOVA);
        for (domain, is_meant) in [(8, false), (7, true)] {
            assert_eq!(rig.reads(ONE, IOVA), Some(DATA), "{arch:?}");
            let scope = Scope { leaf: true, second_stage: false, domain: Some(domain), space: Some(3), id: None };
            let effect = Effect::Range { scope, iova: Span { first: IOVA, last: IOVA | 0xfff } };
            assert_eq!(rig.viommu.invalidate(&[Invalidation { index: 0, effect }]).spaces, u64::from(is_meant), "{arch:?}");
        }
        assert_eq!(rig.reads(ONE, IOVA), None, "{arch:?}");
    }
}

/// What is not present is cached under no domain's number, or under 0 (VT-d in caching mode, section 6.1), whichever domain was there before: a driver that puts a structure there says so.
#[test]
fn a_structure_takes_the_place_of_nothing_whichever_domain_was_there_before() {
    for arch in Arch::ALL {
        let mut rig = Rig::new(arch, Limits::default());
        let root = rig.guest.new_table();
        rig.guest.map_page(root, IOVA, DATA, true);
        rig.guest.translate(ONE, root, 7);
        rig.viommu.connect(ONE, false);
        for (before, now) in [(7, 9), (9, 7)] {
            assert_eq!(rig.reads(ONE, IOVA), Some(DATA), "{arch:?}");
            rig.guest.abort(ONE);
            rig.commands(&[arch.forget_device(ONE, before)]);
            assert!(matches!(rig.state(ONE), StreamState::Blocked(_)), "{arch:?}: {:?}", rig.state(ONE));
            rig.guest.translate(ONE, root, now);
            rig.commands(&[arch.forget_device(ONE, 0)]);
            assert!(matches!(rig.state(ONE), StreamState::Space(_)), "{arch:?}: {:?}", rig.state(ONE));
        }
        assert_eq!(rig.reads(ONE, IOVA), Some(DATA), "{arch:?}");
    }
}

#[test]
fn devices_of_one_domain_share_a_space() {
    for arch in Arch::ALL {
        let mut rig = Rig::new(arch, Limits::default());
        let (first, second) = (rig.guest.new_table(), rig.guest.new_table());
        rig.guest.map_page(first, IOVA, DATA, true);
        rig.guest.map_page(second, IOVA, DATA + 0x1000, true);
        rig.connect_both(first);
        assert_eq!(rig.viommu.figures().spaces, 1, "{arch:?}");
        assert_eq!((rig.reads(ONE, IOVA), rig.reads(TWO, IOVA)), (Some(DATA), Some(DATA)), "{arch:?}");
        // One moves: it gets another space, and the other one keeps its own.
        rig.guest.translate(ONE, second, 8);
        let unchanged = rig.viommu.figures().unchanged;
        rig.commands(&[arch.forget_device(ONE, 7)]);
        assert_eq!((rig.reads(ONE, IOVA), rig.reads(TWO, IOVA)), (Some(DATA + 0x1000), Some(DATA)), "{arch:?}");
        assert_eq!(rig.viommu.figures().unchanged, unchanged, "{arch:?}: nobody looks at the other one's structures");
        assert_eq!((rig.viommu.figures().spaces, rig.viommu.figures().switches), (2, 0), "{arch:?}");
        // It comes back, to the space that is there.
        rig.guest.translate(ONE, first, 7);
        rig.commands(&[arch.forget_device(ONE, 8)]);
        assert_eq!((rig.reads(ONE, IOVA), rig.state(ONE)), (Some(DATA), rig.state(TWO)), "{arch:?}");
        assert_eq!(rig.viommu.figures().spaces, 1, "{arch:?}");
        // Both move in one batch: the space is the same, with other tables.
        let allocations = rig.viommu.figures().allocations;
        rig.guest.translate(ONE, second, 8);
        rig.guest.translate(TWO, second, 8);
        rig.commands(&[arch.forget_device(ONE, 7), arch.forget_device(TWO, 7)]);
        assert_eq!((rig.reads(ONE, IOVA), rig.reads(TWO, IOVA)), (Some(DATA + 0x1000), Some(DATA + 0x1000)), "{arch:?}");
        let figures = rig.viommu.figures();
        assert_eq!((figures.spaces, figures.switches, figures.allocations), (1, 1, allocations), "{arch:?}");
        // One unmap is for both.
        rig.guest.unmap_page(second, IOVA);
        let handled = rig.commands(&[arch.forget_page(8, IOVA)]);
        assert_eq!((handled.spaces, rig.reads(ONE, IOVA), rig.reads(TWO, IOVA)), (1, None, None), "{arch:?}");
    }
}

#[test]
fn blocked_requests_are_told_in_the_guests_own_records() {
    for arch in Arch::ALL {
        let mut rig = Rig::new(arch, Limits { events: 3, ..Limits::default() });
        let root = rig.guest.new_table();
        rig.guest.map_page(root, IOVA, DATA, false);
        rig.guest.translate(ONE, root, 7);
        rig.viommu.connect(ONE, false);
        let nothing = IOVA + 0x3000;
        assert_eq!(rig.reads(ONE, nothing), None);
        let requests = [request(ONE, nothing, EventAccess::Read), request(ONE, nothing, EventAccess::Write), request(ONE, IOVA, EventAccess::Write)];
        let events = rig.viommu.faults(&requests);
        let bytes: Vec<&[u8]> = events.records.iter().map(|record| &record.bytes[..]).collect();
        assert_eq!(bytes[0], arch.nothing_mapped(ONE, 7, nothing, false), "{arch:?}");
        assert_eq!(bytes[1], arch.nothing_mapped(ONE, 7, nothing, true), "{arch:?}");
        // A refused write is no missing page; but legacy VT-d has one reason for both, and RISC-V one cause.
        let alike = matches!(arch, Arch::Vtd | Arch::Riscv);
        assert_eq!(bytes[2] == arch.nothing_mapped(ONE, 7, IOVA, true), alike, "{arch:?}");
        assert_eq!((events.lost, events.silent), (0, 0), "{arch:?}");
        // A flood is counted.
        let events = rig.viommu.faults(&[requests[0]; 1000]);
        assert_eq!((events.records.len(), events.lost), (3, 997), "{arch:?}");
        // A stream that was set up to be refused.
        rig.guest.abort(ONE);
        rig.commands(&[arch.forget_device(ONE, 7)]);
        let StreamState::Blocked(blocked) = rig.state(ONE) else { panic!("{arch:?}") };
        let events = rig.viommu.faults(&[request(ONE, IOVA, EventAccess::Read)]);
        // A Config of STE that aborts records nothing.
        let told = usize::from(arch != Arch::Smmu);
        let seen = (events.records.len(), events.lost, events.silent as usize);
        assert_eq!(seen, (told, 0, 1 - told), "{arch:?}: {blocked:?} {events:?}");
    }
}

#[test]
fn an_illegal_command_ends_its_batch() {
    for arch in Arch::ALL {
        let mut rig = Rig::new(arch, Limits::default());
        let root = rig.guest.new_table();
        for page in 0..2 {
            rig.guest.map_page(root, IOVA + (page << 12), DATA + (page << 12), true);
        }
        rig.guest.translate(ONE, root, 7);
        rig.viommu.connect(ONE, false);
        for page in 0..2 {
            rig.guest.unmap_page(root, IOVA + (page << 12));
        }
        let illegal = words(&match arch {
            Arch::Smmu => [0xff, 0],
            Arch::Vtd => [0xf, 0],
            Arch::Amd => [0xf << 60, 0],
            Arch::Riscv => [0x7f, 0],
        });
        let batch = [arch.forget_page(7, IOVA), illegal, arch.forget_page(7, IOVA + 0x1000)];
        let handled = rig.viommu.commands(&batch.concat()).unwrap();
        assert!(matches!(handled.illegal, Some(Illegal { index: 1, code }) if code != 0), "{arch:?}: {:?}", handled.illegal);
        assert_eq!((rig.reads(ONE, IOVA), rig.reads(ONE, IOVA + 0x1000)), (None, Some(DATA + 0x1000)), "{arch:?}");
        assert!(rig.viommu.commands(&batch.concat()[..23]).is_err(), "{arch:?}: half an entry");
        assert!(rig.viommu.commands(&vec![0; 1 << 20]).is_err(), "{arch:?}: too many");
    }
}

#[test]
fn random_commands_do_no_harm() {
    for arch in Arch::ALL {
        let mut rig = Rig::new(arch, Limits::default());
        let root = rig.guest.new_table();
        rig.guest.map_page(root, IOVA, DATA, true);
        rig.connect_both(root);
        let mut rng = Rng::new(1);
        for _ in 0..500 {
            let mut batch: Vec<u8> = (0..16 * (1 + rng.below(8))).map(|_| rng.below(256) as u8).collect();
            for entry in batch.chunks_mut(16) {
                // Mostly legal ones.
                match arch {
                    Arch::Amd => entry[7] = (rng.below(10) << 4) as u8,
                    _ => entry[0] = rng.below(0x48) as u8,
                }
            }
            rig.viommu.commands(&batch).unwrap();
        }
        assert_eq!((rig.reads(ONE, IOVA), rig.reads(TWO, IOVA)), (Some(DATA), Some(DATA)), "{arch:?}: nothing had changed");
        assert_eq!(rig.viommu.supervisor().figures().failures, 0, "{arch:?}");
    }
}

/// SMMUv3, which has a table of context descriptors by SubstreamID.
#[test]
fn pasids_come_and_go() {
    let arch = Arch::Smmu;
    let mut rig = Rig::new(arch, Limits { pasids: 2, ..Limits::default() });
    let roots: Vec<u64> = (0..4).map(|_| rig.guest.new_table()).collect();
    for (root, page) in roots.iter().zip(0..) {
        rig.guest.map_page(*root, IOVA, DATA + (page << 12), true);
    }
    let cds = rig.guest.new_table();
    rig.guest.write_cd(cds, roots[0], 7);
    rig.guest.write_cd(cds + 2 * 64, roots[2], 9);
    // V, Config 5, S1Fmt 0, S1CDMax 2; S1DSS 2: requests without a SubstreamID use CD 0.
    for (index, word) in [2, 1 | 5 << 1 | cds | 2 << 59].iter().enumerate() {
        rig.guest.store(rig.guest.structure(ONE) + 8 - index as u64 * 8, *word);
    }
    rig.viommu.connect(ONE, true);
    assert_eq!(
        (rig.reads(ONE, IOVA), rig.reads_with(ONE, Some(2), IOVA), rig.reads_with(ONE, Some(1), IOVA)),
        (Some(DATA), Some(DATA + 0x2000), None)
    );
    // Another one, announced: CFGI_CD of SubstreamID 1.
    rig.guest.write_cd(cds + 64, roots[1], 8);
    assert_eq!(rig.reads_with(ONE, Some(1), IOVA), None);
    let cfgi_cd = |pasid: u64| words(&[5 | 1 << 11 | pasid << 12 | ONE << 32, 1]);
    rig.commands(&[cfgi_cd(1)]);
    assert_eq!((rig.reads_with(ONE, Some(1), IOVA), rig.viommu.figures().streams), (Some(DATA + 0x1000), 3));
    // One more than the limit is not served. What is told about its requests is told.
    rig.guest.write_cd(cds + 3 * 64, roots[3], 10);
    rig.commands(&[cfgi_cd(3)]);
    assert_eq!((rig.reads_with(ONE, Some(3), IOVA), rig.viommu.figures().refused_pasids), (None, 1));
    // Invalid, and not announced: the page is watched.
    rig.guest.store(cds + 64, 0);
    rig.viommu.table_written(Gpa(cds + 64), 8);
    assert_eq!(rig.reads_with(ONE, Some(1), IOVA), None);
    assert_eq!(rig.reads_with(ONE, Some(3), IOVA), Some(DATA + 0x3000), "and there is room for another");
    let stranger = BlockedDma { requester: Requester { id: ONE, pasid: Some(1) }, ..request(ONE, IOVA, EventAccess::Read) };
    let events = rig.viommu.faults(&[stranger]);
    // C_BAD_CD of SubstreamID 1.
    assert_eq!(events.records[0].bytes, words(&[0x0a | 1 << 11 | 1 << 12 | ONE << 32, 0, 0, 0]));
    rig.guest.unmap_page(roots[2], IOVA);
    rig.commands(&[arch.forget_page(9, IOVA)]);
    assert_eq!((rig.reads_with(ONE, Some(2), IOVA), rig.reads(ONE, IOVA)), (None, Some(DATA)));
    rig.viommu.disconnect(ONE);
    assert!(rig.watched.0.lock().unwrap().is_empty());
}

#[test]
fn registers_that_move_everything_move_everything() {
    let mut rig = Rig::new(Arch::Riscv, Limits::default());
    let root = rig.guest.new_table();
    rig.guest.map_page(root, IOVA, DATA, true);
    rig.guest.translate(ONE, root, 7);
    rig.viommu.connect(ONE, false);
    assert_eq!(rig.reads(ONE, IOVA), Some(DATA));
    let with_ddtp = |ddtp: u64| {
        let set = |(name, value): (String, u64)| if name == "DDTP" { (name, ddtp) } else { (name, value) };
        Arch::Riscv.registers().into_iter().map(set).collect::<Vec<_>>()
    };
    // Off, bare, and as before.
    rig.viommu.registers_changed(with_ddtp(0));
    assert_eq!((rig.reads(ONE, IOVA), rig.reads(ONE, DATA)), (None, None));
    rig.viommu.registers_changed(with_ddtp(1));
    assert_eq!((rig.reads(ONE, IOVA), rig.reads(ONE, DATA)), (None, Some(DATA)));
    rig.viommu.registers_changed(Arch::Riscv.registers());
    assert_eq!(rig.reads(ONE, IOVA), Some(DATA));
    assert_eq!(rig.viommu.registers_changed(Arch::Riscv.registers()).lookups, 0, "the same registers");
}

/// Registers that name other structures: PASIDs are those that are set up there.
#[test]
fn registers_that_name_other_structures_name_other_pasids() {
    let arch = Arch::Smmu;
    let mut rig = Rig::new(arch, Limits::default());
    // A linear table of 256 STEs is aligned to its size.
    let there = (0..8).map(|_| rig.guest.new_table()).find(|page: &u64| page.is_multiple_of(0x4000)).unwrap();
    for (structures, pasid) in [(rig.guest.structures, 1), (there, 2)] {
        let (root, cds) = (rig.guest.new_table(), rig.guest.new_table());
        rig.guest.map_page(root, IOVA, DATA + (pasid << 12), true);
        rig.guest.write_cd(cds, root, 7);
        rig.guest.write_cd(cds + pasid * 64, root, 8);
        // As above, CD 0 is for requests without a SubstreamID.
        rig.guest.store(structures + ONE * 64 + 8, 2);
        rig.guest.store(structures + ONE * 64, 1 | 5 << 1 | cds | 2 << 59);
    }
    rig.viommu.connect(ONE, true);
    let read = |rig: &Rig| [1, 2].map(|pasid| rig.reads_with(ONE, Some(pasid), IOVA));
    assert_eq!(read(&rig), [Some(DATA + 0x1000), None]);
    rig.viommu.registers_changed(arch.registers_at(there));
    assert_eq!(read(&rig), [None, Some(DATA + 0x2000)]);
    rig.viommu.registers_changed(arch.registers());
    assert_eq!(read(&rig), [Some(DATA + 0x1000), None]);
}

#[test]
fn a_guest_at_its_limit_gets_an_event_and_others_go_on() {
    for arch in Arch::ALL {
        let mut rig = Rig::new(arch, Limits::default());
        rig.viommu.host_mut().limits = ShadowLimits { table_pages: 6, leaves: 64 };
        let (first, second) = (rig.guest.new_table(), rig.guest.new_table());
        rig.guest.map_page(first, IOVA, DATA, true);
        rig.guest.map_page(second, IOVA, DATA + 0x1000, true);
        rig.guest.translate(ONE, first, 7);
        rig.guest.translate(TWO, second, 8);
        rig.viommu.connect(ONE, false);
        rig.viommu.connect(TWO, false);
        // More tables than there is room for.
        for block in 1..40 {
            rig.guest.map_page(first, IOVA + (block << 21), DATA, true);
        }
        let everything: Vec<Vec<u8>> = (1..40).map(|block| arch.forget_page(7, IOVA + (block << 21))).collect();
        let handled = rig.commands(&everything);
        assert!(handled.blocked >= 30, "{arch:?}: {handled:?}");
        assert_eq!(handled.events.len(), 16, "{arch:?}: {handled:?}");
        assert_eq!(handled.events.len() as u64 + handled.lost_events, handled.blocked, "{arch:?}");
        assert_eq!((rig.reads(ONE, IOVA), rig.reads(ONE, IOVA + (39 << 21))), (Some(DATA), None), "{arch:?}: what was there stays");
        // The other space neither sees nor pays for it.
        rig.guest.map_page(second, IOVA + 0x1000, DATA + 0x2000, true);
        rig.viommu.host().take_counts();
        let handled = rig.commands(&[arch.forget_page(8, IOVA + 0x1000)]);
        assert_eq!(rig.reads(TWO, IOVA + 0x1000), Some(DATA + 0x2000), "{arch:?}");
        assert!(handled.spaces <= 2, "{arch:?}: its own, and one that is tried again: {handled:?}");
        // Once there is room, what was blocked is found without another command: in so many calls.
        (1..39).for_each(|block| rig.guest.store(rig.guest.slot_at(first, IOVA + (block << 21), 1).0, 0));
        for _ in 0..64 {
            rig.viommu.idle();
        }
        assert_eq!(rig.reads(ONE, IOVA + (39 << 21)), Some(DATA), "{arch:?}");
        assert_eq!(rig.viommu.figures().pending, 0, "{arch:?}");
    }
}

/// A batch with more ranges than are kept apart: all of the space is looked at, what was named first and what was named last among it.
#[test]
fn a_batch_of_very_many_ranges_counts_for_all_of_them() {
    const RANGES: u64 = 5000;
    let mut rig = Rig::new(Arch::Vtd, Limits::default());
    let root = rig.guest.new_table();
    // The last one is in no range.
    let pages = [0, 1, 4095, 4096, 4097, RANGES - 1].map(|range| IOVA + range * 0x2000).into_iter().chain([IOVA + 0x1000]);
    for iova in pages.clone() {
        rig.guest.map_page(root, iova, DATA, true);
    }
    rig.guest.translate(ONE, root, 7);
    rig.viommu.connect(ONE, false);
    for iova in pages.clone() {
        assert_eq!(rig.reads(ONE, iova), Some(DATA));
        rig.guest.unmap_page(root, iova);
    }
    let scope = Scope { leaf: true, second_stage: false, domain: Some(7), space: None, id: None };
    let range = |range: u64| {
        let first = IOVA + range * 0x2000;
        Invalidation { index: 0, effect: Effect::Range { scope, iova: Span { first, last: first | 0xfff } } }
    };
    let handled = rig.viommu.invalidate(&(0..RANGES).map(range).collect::<Vec<_>>());
    assert_eq!((handled.spaces, handled.changes), (1, 7));
    for iova in pages {
        assert_eq!(rig.reads(ONE, iova), None, "{iova:#x}");
    }
}

#[test]
fn a_kernel_that_does_not_invalidate_gets_the_device_detached() {
    let arch = Arch::Vtd;
    let mut rig = Rig::new(arch, Limits::default());
    let root = rig.guest.new_table();
    rig.guest.map_page(root, IOVA, DATA, true);
    rig.guest.map_page(root, IOVA + 0x1000, DATA + 0x1000, true);
    rig.connect_both(root);
    assert_eq!((rig.reads(ONE, IOVA), rig.reads(TWO, IOVA)), (Some(DATA), Some(DATA)));
    rig.guest.unmap_page(root, IOVA);
    rig.viommu.host().counts.lock().unwrap().failing = 1;
    let handled = rig.commands(&[arch.forget_page(7, IOVA)]);
    assert!(handled.loose.is_empty());
    assert_eq!((rig.reads(ONE, IOVA), rig.reads(ONE, IOVA + 0x1000), rig.reads(TWO, IOVA)), (None, None, None), "what may be stale is not used");
    assert!(matches!(rig.state(ONE), StreamState::Refused(_)));
    rig.viommu.idle();
    assert_eq!(
        (rig.reads(ONE, IOVA), rig.reads(ONE, IOVA + 0x1000), rig.reads(TWO, IOVA + 0x1000)),
        (None, Some(DATA + 0x1000), Some(DATA + 0x1000))
    );
    assert_eq!((rig.viommu.figures().spaces, rig.viommu.figures().pending), (1, 0));
}

/// The guest changes structures while the unit reads them: what is used is what stood there at some moment, and what stands there in the end is found.
#[test]
fn structures_that_change_all_the_time_end_well() {
    let mut rig = Rig::new(Arch::Riscv, Limits::default());
    let roots = [rig.guest.new_table(), rig.guest.new_table()];
    rig.guest.map_page(roots[0], IOVA, DATA, true);
    rig.guest.map_page(roots[1], IOVA, DATA + 0x1000, true);
    rig.guest.translate(ONE, roots[0], 7);
    rig.viommu.connect(ONE, false);
    let at = rig.guest.structure(ONE);
    let stop = std::sync::atomic::AtomicBool::new(false);
    let memory = rig.guest.memory.clone();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut turn = 0_u64;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                turn += 1;
                let root = roots[(turn % 2) as usize];
                memory.store(9 << 60 | root >> 12, GuestAddress(at + 24), std::sync::atomic::Ordering::Release).unwrap();
            }
        });
        for _ in 0..300 {
            rig.viommu.table_written(Gpa(at), 32);
            let reads = rig.reads(ONE, IOVA);
            assert!([None, Some(DATA), Some(DATA + 0x1000)].contains(&reads), "{reads:x?}");
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    rig.guest.translate(ONE, roots[1], 8);
    rig.viommu.table_written(Gpa(at), 32);
    assert_eq!(rig.reads(ONE, IOVA), Some(DATA + 0x1000));
}
