//! A plugin that fails in the middle of a guest's life, and versions that take its place.

use std::sync::OnceLock;
use std::sync::atomic::Ordering;

use stagecraft::Gpa;
use stagecraft::plugin::{Config, Difference, Engine, Health, Plugin, Policy, ReplaceError, Requester, Supervisor};
use stagecraft::sync::Watcher;
use stagecraft::viommu::{self, Limits, StreamState, UnitConfig, Viommu};
use stagecraft_plugin_hostile::{mode, version};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::behaviour::{ONE, Rig, TWO, without_pasid};
use super::guests::{Arch, DATA, Guest, STRUCTURES};
use super::plain::{Asked, Recorder};

const HOSTILE: &[u8] = include_bytes!("../../hostile/built/hostile.wasm");

/// A version of the plugin; all are on one engine.
pub fn hostile(version: u8) -> Plugin {
    static ENGINE: OnceLock<Engine> = OnceLock::new();
    let engine = ENGINE.get_or_init(|| Engine::new(Config::default()).unwrap());
    let mut bytes = HOSTILE.to_vec();
    let mark = version::MARK;
    let places: Vec<usize> = (0..bytes.len() - mark.len()).filter(|at| bytes[*at..].starts_with(mark)).collect();
    assert_eq!(places.len(), 1, "the version stands in one place");
    bytes[places[0] + mark.len()] = version;
    Plugin::load(engine, &bytes).unwrap()
}

/// Present, writable; a leaf where there could be a table.
const RW: u64 = 0b11;
const RO: u64 = 0b1;
/// What the allergic plugin cannot bear, and a bit that means nothing.
const ALLERGEN: u64 = 1 << 9;
const OTHER: u64 = 1 << 10;
const IOVA: u64 = 0x40_0000_0000 >> 1;

/// A guest with hostile tables of three levels.
struct Hostile {
    rig: Rig,
    root: u64,
}

impl Hostile {
    fn new(lookups: u64, tables: u64, policy: Policy) -> Self {
        let guest = Guest::new(Arch::Riscv);
        let supervisor = Supervisor::new(hostile(version::FIRST), policy);
        let registers = registers(lookups, tables);
        let rig = Rig::with(guest, supervisor, "hostile", registers, Limits::default());
        let root = rig.guest.new_table();
        let this = Self { rig, root };
        this.rig.guest.store(STRUCTURES + 8 * ONE, root);
        this
    }

    /// Where the entry of a page is; tables are made as needed.
    fn slot(&self, iova: u64) -> Gpa {
        let mut table = self.root;
        for height in (1..3).rev() {
            let slot = table + (iova >> (12 + 9 * height) & 0x1ff) * 8;
            if self.rig.guest.load(slot) == 0 {
                self.rig.guest.store(slot, self.rig.guest.new_table() | RW);
            }
            table = self.rig.guest.load(slot) & !0xfff;
        }
        Gpa(table + (iova >> 12 & 0x1ff) * 8)
    }

    fn set(&self, page: u64, entry: u64) -> Gpa {
        let slot = self.slot(IOVA + (page << 12));
        self.rig.guest.store(slot.0, entry);
        slot
    }

    /// Writes an entry, and tells it.
    fn write(&mut self, page: u64, entry: u64) -> viommu::Handled {
        let slot = self.set(page, entry);
        self.rig.viommu.table_written(slot, 8)
    }

    fn reads(&self, page: u64) -> Option<u64> {
        self.rig.reads(ONE, IOVA + (page << 12))
    }

    fn health(&self) -> Health {
        self.rig.viommu.supervisor().health()
    }
}

fn registers(lookups: u64, tables: u64) -> Vec<(String, u64)> {
    [("ROOT", STRUCTURES), ("MODE", lookups), ("EXTRA2", tables)].map(|(name, value)| (name.to_owned(), value)).to_vec()
}

#[test]
fn a_plugin_that_wears_out_is_made_anew_and_what_was_blocked_is_judged() {
    let mut guest = Hostile::new(mode::WELL, mode::WEARS_OUT, Policy::default());
    for page in 0..8 {
        guest.set(page, (DATA + (page << 12)) | if page % 2 == 0 { RW } else { RO });
    }
    let handled = guest.rig.viommu.connect(ONE, false);
    // Three answers from each instance: not enough for all levels.
    assert!(handled.blocked > 0, "{handled:?}");
    assert_eq!((handled.events.len() as u64, guest.reads(0)), (handled.blocked, None), "{handled:?}");
    let failures = guest.rig.viommu.supervisor().figures().failures;
    assert!(failures > 0);
    for _ in 0..200 {
        guest.rig.viommu.idle();
    }
    let figures = guest.rig.viommu.supervisor().figures();
    assert!(figures.recoveries > 0 && figures.quarantines == 0, "{figures:?}");
    (0..8).for_each(|page| assert_eq!(guest.reads(page), Some(DATA + (page << 12)), "page {page}"));
    assert_eq!(guest.rig.viommu.figures().pending, 0);
    // Everything is known by now.
    let asked = figures.instances;
    for page in 8..40 {
        assert_eq!(guest.write(page, (DATA + (page << 12)) | RW).blocked, 0);
        assert_eq!(guest.reads(page), Some(DATA + (page << 12)));
    }
    assert_eq!(guest.rig.viommu.supervisor().figures().instances, asked);
}

#[test]
fn known_patterns_work_while_the_plugin_is_out_of_use() {
    let mut guest = Hostile::new(mode::WELL, mode::ALLERGIC, Policy { first_wait: 1000, longest_wait: 1000, ..Policy::default() });
    guest.set(0, DATA | RW);
    guest.rig.viommu.connect(ONE, false);
    assert_eq!(guest.reads(0), Some(DATA));
    // One pattern makes it fail.
    let handled = guest.write(1, (DATA + 0x1000) | RW | ALLERGEN);
    assert_eq!((handled.blocked, handled.events.len(), guest.reads(1)), (1, 1, None), "{handled:?}");
    assert!(matches!(guest.health(), Health::Waiting(_)), "{:?}", guest.health());
    // Known: mapped and unmapped as ever. Unknown: blocked and reported.
    assert_eq!((guest.write(2, (DATA + 0x2000) | RW).blocked, guest.reads(2)), (0, Some(DATA + 0x2000)));
    assert_eq!((guest.write(2, 0).blocked, guest.reads(2)), (0, None));
    let handled = guest.write(3, (DATA + 0x3000) | RW | OTHER);
    assert_eq!((handled.blocked, handled.events.len(), guest.reads(3)), (1, 1, None), "{handled:?}");
    // An entry that is made unknown is gone, and what it mapped with it.
    assert_eq!((guest.write(0, DATA | RW | OTHER).blocked, guest.reads(0)), (1, None));
    // The killer is gone, and the time is over.
    guest.write(1, 0);
    for _ in 0..3000 {
        guest.rig.viommu.idle();
    }
    assert_eq!(guest.health(), Health::Working);
    assert_eq!((guest.reads(0), guest.reads(3)), (Some(DATA), Some(DATA + 0x3000)), "judged again without another write");
}

#[test]
fn one_deadly_pattern_does_not_take_the_plugin_from_the_others() {
    let mut guest = Hostile::new(mode::WELL, mode::ALLERGIC, Policy::default());
    guest.set(0, DATA | RW);
    guest.rig.viommu.connect(ONE, false);
    for round in 0..100 {
        // The same deadly pattern at other places, and each time a new one that is none.
        guest.write(16 + round, DATA | RW | ALLERGEN);
        guest.rig.viommu.idle();
    }
    let figures = guest.rig.viommu.supervisor().figures();
    assert_eq!((figures.failures, figures.quarantines), (u64::from(Policy::default().attempts), 0), "{figures:?}");
    assert_eq!((guest.write(1, (DATA + 0x1000) | RW | OTHER).blocked, guest.reads(1)), (0, Some(DATA + 0x1000)));
}

#[test]
fn a_plugin_that_keeps_failing_is_put_into_quarantine_until_somebody_lifts_it() {
    let policy = Policy { failures: 4, ..Policy::default() };
    let mut guest = Hostile::new(mode::WELL, mode::ALLERGIC, policy);
    guest.set(0, DATA | RW);
    guest.rig.viommu.connect(ONE, false);
    // Deadly patterns, each another: bits 4 to 8 mean nothing.
    for pattern in 0..32 {
        guest.write(16 + pattern, DATA | RW | ALLERGEN | pattern << 4);
        guest.rig.viommu.idle();
        guest.rig.viommu.idle();
    }
    let figures = guest.rig.viommu.supervisor().figures();
    assert_eq!((guest.health(), figures.failures, figures.quarantines), (Health::Quarantined, 4, 1), "{figures:?}");
    // Nobody makes instances any more; what is known works.
    for page in 1..8 {
        assert_eq!((guest.write(page, (DATA + (page << 12)) | RW).blocked, guest.reads(page)), (0, Some(DATA + (page << 12))));
    }
    assert_eq!((guest.write(8, (DATA + 0x8000) | RW | OTHER).blocked, guest.reads(8)), (1, None));
    for _ in 0..5000 {
        guest.rig.viommu.idle();
    }
    assert_eq!((guest.rig.viommu.supervisor().figures().instances, guest.reads(8)), (figures.instances, None));
    // The guest stops it; the caller forgives.
    (16..48).for_each(|page| drop(guest.write(page, 0)));
    let handled = guest.rig.viommu.lift();
    assert_eq!((guest.health(), guest.reads(8)), (Health::Working, Some(DATA + 0x8000)), "{handled:?}");
}

#[test]
fn a_stream_whose_structures_kill_the_plugin_is_blocked_alone() {
    let mut guest = Hostile::new(mode::ALLERGIC, mode::WELL, Policy::default());
    guest.set(0, DATA | RW);
    guest.rig.guest.store(STRUCTURES + 8 * TWO, guest.root);
    guest.rig.viommu.connect(ONE, false);
    guest.rig.viommu.connect(TWO, false);
    assert_eq!((guest.reads(0), guest.rig.reads(TWO, IOVA)), (Some(DATA), Some(DATA)));
    guest.rig.guest.store(STRUCTURES + 8 * ONE, guest.root | ALLERGEN);
    let handled = guest.rig.viommu.stream_changed(ONE);
    assert_eq!((guest.reads(0), guest.rig.reads(TWO, IOVA)), (None, Some(DATA)), "{handled:?}");
    assert!(matches!(guest.rig.state(ONE), StreamState::Unknown(_)));
    // What has not changed needs no plugin.
    guest.rig.viommu.stream_changed(TWO);
    assert_eq!(guest.rig.reads(TWO, IOVA), Some(DATA));
    guest.rig.guest.store(STRUCTURES + 8 * ONE, guest.root);
    for _ in 0..40 {
        guest.rig.viommu.idle();
    }
    assert_eq!((guest.reads(0), guest.rig.state(ONE)), (Some(DATA), guest.rig.state(TWO)));
    assert_eq!(guest.rig.viommu.supervisor().figures().quarantines, 0);
}

#[test]
fn commands_that_cannot_be_decoded_count_as_everything() {
    let mut guest = Hostile::new(mode::ALLERGIC, mode::WELL, Policy::default());
    for page in 0..2 {
        guest.set(page, (DATA + (page << 12)) | RW);
    }
    guest.rig.guest.store(STRUCTURES + 8 * TWO, guest.root);
    guest.rig.viommu.connect(ONE, false);
    guest.rig.viommu.connect(TWO, false);
    assert_eq!((guest.reads(0), guest.reads(1), guest.rig.reads(TWO, IOVA)), (Some(DATA), Some(DATA + 0x1000), Some(DATA)));
    guest.set(0, 0);
    guest.rig.guest.store(STRUCTURES + 8 * TWO, 0);
    let handled = guest.rig.viommu.commands(&[0xde]).unwrap();
    assert!(handled.undecoded.is_some() && handled.illegal.is_none(), "{handled:?}");
    // The second stream's structure changed, and nobody can say to what.
    assert_eq!((guest.reads(0), guest.reads(1), guest.rig.reads(TWO, IOVA + 0x1000)), (None, Some(DATA + 0x1000), None));
    assert!(matches!(guest.rig.state(TWO), StreamState::Unknown(_)), "{:?}", guest.rig.state(TWO));
    for _ in 0..20 {
        guest.rig.viommu.idle();
    }
    assert!(matches!(guest.rig.state(TWO), StreamState::Blocked(_)), "{:?}", guest.rig.state(TWO));
}

#[test]
fn a_new_version_takes_over_if_it_says_the_same() {
    let mut guest = Hostile::new(mode::WELL, mode::WELL, Policy::default());
    guest.set(0, DATA | RW);
    guest.rig.guest.store(STRUCTURES + 8 * TWO, 0);
    guest.rig.viommu.connect(ONE, false);
    guest.rig.viommu.connect(TWO, false);
    // Otherwise about a pattern that nobody has met, or about leaves that nobody has made.
    for other in [version::DECODES_OTHERWISE, version::ENCODES_OTHERWISE, version::FIRST] {
        guest.rig.viommu.replace_plugin(hostile(other)).unwrap();
        assert_eq!(guest.reads(0), Some(DATA));
    }
    assert_eq!(guest.rig.viommu.supervisor().figures().replacements, 3);
    // Now it is met, and remembered.
    assert_eq!((guest.write(1, (DATA + 0x1000) | RW | OTHER).blocked, guest.reads(1)), (0, Some(DATA + 0x1000)));
    let hash = guest.rig.viommu.supervisor().plugin().content_hash();
    let refused = |guest: &mut Hostile, version: u8| guest.rig.viommu.replace_plugin(hostile(version)).unwrap_err();
    let viommu::ReplaceError::Plugin(ReplaceError::Differs(difference)) = refused(&mut guest, version::DECODES_OTHERWISE) else { panic!() };
    let text = difference.to_string();
    assert!(text.starts_with("hostile/radix: level kind 2, inherited 0x0, pattern 0x403: was Leaf"), "{text}");
    let error = refused(&mut guest, version::OTHER_GEOMETRY);
    assert!(matches!(error, viommu::ReplaceError::Plugin(ReplaceError::Differs(Difference::Geometry { .. }))), "{error}");
    let error = refused(&mut guest, version::LOOKS_UP_OTHERWISE);
    assert!(matches!(error, viommu::ReplaceError::Stream { requester, .. } if requester == without_pasid(TWO)), "{error}");
    let error = refused(&mut guest, version::PANICS);
    assert!(matches!(error, viommu::ReplaceError::Plugin(ReplaceError::Call(_))), "{error}");
    let error = guest.rig.viommu.replace_plugin(super::behaviour::plugin("riscv-iommu")).unwrap_err();
    assert!(matches!(error, viommu::ReplaceError::Plugin(ReplaceError::Name { .. })), "{error}");
    // The old one goes on.
    assert_eq!(guest.rig.viommu.supervisor().plugin().content_hash(), hash);
    assert_eq!((guest.write(2, (DATA + 0x2000) | RO | OTHER).blocked, guest.reads(2)), (0, Some(DATA + 0x2000)));
}

#[test]
fn a_better_version_ends_a_quarantine() {
    let mut guest = Hostile::new(mode::WELL, mode::ALLERGIC, Policy { failures: 1, ..Policy::default() });
    guest.set(0, DATA | RW);
    guest.rig.viommu.connect(ONE, false);
    guest.write(1, (DATA + 0x1000) | RW | ALLERGEN);
    guest.write(2, (DATA + 0x2000) | RW | OTHER);
    assert_eq!((guest.health(), guest.reads(1), guest.reads(2)), (Health::Quarantined, None, None));
    // This one has the same allergy, so that what is deadly stays blocked; the other pattern is judged.
    guest.write(1, 0);
    guest.rig.viommu.replace_plugin(hostile(version::DECODES_OTHERWISE)).unwrap();
    assert_eq!((guest.health(), guest.reads(2), guest.rig.writes(ONE, IOVA + 0x2000)), (Health::Working, Some(DATA + 0x2000), false));
}

/// A guest with a thousand spaces, and a host that writes down what it is asked.
fn many(count: u64) -> (Guest, Viommu<GuestMemoryMmap, Recorder>) {
    let guest = Guest::new(Arch::Riscv);
    let supervisor = Supervisor::new(hostile(version::FIRST), Policy::default());
    let unit = UnitConfig { kind: "hostile".to_owned(), registers: registers(mode::WELL, mode::WELL), map: Guest::map(), limits: Limits::default() };
    let mut viommu = Viommu::new(supervisor, unit, guest.memory.clone(), Recorder::default(), Box::new(super::behaviour::Watched::default()));
    for id in 0..count {
        guest.store(STRUCTURES + 8 * id, 0x1000 * (id + 1));
        viommu.connect(id, false);
    }
    viommu.host_mut().take();
    (guest, viommu)
}

/// Writes a word when its page is to be watched: a guest that is quicker than the watcher, and not reported.
struct Quick {
    memory: GuestMemoryMmap,
    address: u64,
    word: u64,
}

impl Watcher for Quick {
    fn watch(&mut self, page: Gpa) {
        if page.0 == self.address & !0xfff {
            self.memory.store(self.word, GuestAddress(self.address), Ordering::Release).unwrap();
        }
    }

    fn unwatch(&mut self, _: Gpa) {}
}

#[test]
fn a_structure_that_is_written_before_it_is_watched_is_seen() {
    let guest = Guest::new(Arch::Riscv);
    let supervisor = Supervisor::new(hostile(version::FIRST), Policy::default());
    let unit = UnitConfig { kind: "hostile".to_owned(), registers: registers(mode::WELL, mode::WELL), map: Guest::map(), limits: Limits::default() };
    // Bypass, when it was just read as a table.
    let watcher = Quick { memory: guest.memory.clone(), address: STRUCTURES, word: 1 };
    let mut viommu = Viommu::new(supervisor, unit, guest.memory.clone(), Recorder::default(), Box::new(watcher));
    guest.store(STRUCTURES, 0x9000);
    viommu.connect(0, false);
    let Some(StreamState::Space(number)) = viommu.stream(without_pasid(0)) else { panic!() };
    assert_eq!(viommu.space(*number).unwrap().1, &viommu::Way::Bypass);
}

#[test]
fn a_pasid_that_is_set_up_before_it_is_watched_is_seen() {
    let arch = Arch::Smmu;
    let supervisor = Supervisor::new(super::behaviour::plugin(arch.kind()), Policy::default());
    let guest = Guest::new(arch);
    let (root, cds) = (guest.new_table(), guest.new_table());
    guest.write_cd(cds, root, 7);
    guest.write_cd(cds + 2 * 64, root, 9);
    // The word that makes the second one valid is written when all was just read without it.
    let (address, word) = (cds + 2 * 64, guest.load(cds + 2 * 64));
    guest.store(address, 0);
    guest.store(guest.structure(ONE) + 8, 2);
    guest.store(guest.structure(ONE), 1 | 5 << 1 | cds | 2 << 59);
    let watcher = Quick { memory: guest.memory.clone(), address, word };
    let unit = UnitConfig { kind: arch.kind().to_owned(), registers: arch.registers(), map: Guest::map(), limits: Limits::default() };
    let mut viommu = Viommu::new(supervisor, unit, guest.memory.clone(), Recorder::default(), Box::new(watcher));
    viommu.connect(ONE, true);
    assert!(matches!(viommu.stream(Requester { id: ONE, pasid: Some(2) }), Some(StreamState::Space(_))));
}

/// Memory comes or goes, and the host says that an address space may be out of step: its streams leave it, or have another one in its place if they cannot, and nobody
/// else is put there.
#[test]
fn an_address_space_that_memory_took_out_of_step_is_nobodys() {
    for refuse_detach in [false, true] {
        let (guest, mut viommu) = many(3);
        (viommu.host_mut().stale, viommu.host_mut().refuse_detach) = (vec![1], refuse_detach);
        let handled = viommu.memory_changed(guest.memory.clone(), Guest::map(), ());
        assert_eq!(handled.loose.len(), usize::from(refuse_detach));
        guest.store(STRUCTURES + 8 * 3, 0x1000 * 2);
        viommu.connect(3, false);
        let attached = [0, 1, 2, 3].map(|id| viommu.host().attached[&without_pasid(id)]);
        assert_eq!(attached, [0, 3, 2, 3], "refused: {refuse_detach}");
    }
}

#[test]
fn a_thousand_spaces_share_a_few_instances_and_idle_ones_cost_nothing() {
    let (guest, mut viommu) = many(1000);
    assert_eq!((viommu.figures().spaces, viommu.figures().streams), (1000, 1000));
    // One page that belongs to one of them, and one that belongs to nobody.
    viommu.host_mut().watchers.get_mut(&700).unwrap().watch(Gpa(0x60_0000));
    viommu.table_written(Gpa(0x60_0010), 8);
    viommu.table_written(Gpa(0x61_0000), 8);
    assert_eq!(viommu.host_mut().take(), [Asked::Written(700, 0x60_0010, 8)]);
    // One that changes alone.
    guest.store(STRUCTURES + 8 * 5, 0xf0_0000);
    viommu.stream_changed(5);
    assert_eq!(viommu.host_mut().take(), [Asked::Switch(5)]);
    // More than there may be.
    for id in 1000..1030 {
        guest.store(STRUCTURES + 8 * id, 0x1000 * (id + 1));
        viommu.connect(id, false);
    }
    assert_eq!(viommu.figures().spaces, 1024);
    assert!(matches!(viommu.stream(without_pasid(1029)), Some(StreamState::Refused(reason)) if reason.contains("1024")));
    viommu.disconnect(3);
    for _ in 0..5000 {
        viommu.idle();
    }
    assert_eq!(viommu.figures().spaces, 1024, "somebody got the room");
}

#[test]
fn what_the_host_refuses_is_tried_again_and_nothing_is_left_attached() {
    let (guest, mut viommu) = many(1);
    // Another way, and no room for it: blocked, not left behind on the old one.
    guest.store(STRUCTURES, 1);
    viommu.host_mut().refuse_allocate = true;
    viommu.stream_changed(0);
    assert!(viommu.host().attached.is_empty());
    assert!(matches!(viommu.stream(without_pasid(0)), Some(StreamState::Refused(_))));
    viommu.host_mut().refuse_allocate = false;
    viommu.host_mut().refuse_attach = true;
    viommu.idle();
    assert!(viommu.host().attached.is_empty() && viommu.host().watchers.is_empty());
    viommu.host_mut().refuse_attach = false;
    (0..8).for_each(|_| drop(viommu.idle()));
    assert_eq!(viommu.host().attached.len(), 1);
    // It cannot be detached: somebody must stop the device, and is told so.
    guest.store(STRUCTURES, 0);
    viommu.host_mut().refuse_detach = true;
    let handled = viommu.stream_changed(0);
    assert_eq!(handled.loose.iter().map(|(requester, _)| *requester).collect::<Vec<_>>(), [without_pasid(0)]);
    viommu.host_mut().refuse_detach = false;
    (0..8).for_each(|_| drop(viommu.idle()));
    assert!(viommu.host().attached.is_empty() && viommu.host().watchers.is_empty());
    assert_eq!((viommu.figures().pending, viommu.figures().spaces), (0, 0));
    // A space that is out of step, and a device that cannot be detached from it: it is not used for anybody else.
    guest.store(STRUCTURES, 0x9000);
    guest.store(STRUCTURES + 8, 0x9000);
    viommu.stream_changed(0);
    viommu.host_mut().refuse_looks = true;
    viommu.host_mut().refuse_detach = true;
    let handled = viommu.commands(&[1]).unwrap();
    assert_eq!(handled.loose.len(), 1);
    (viommu.host_mut().refuse_looks, viommu.host_mut().refuse_detach) = (false, false);
    let old = viommu.host().attached[&without_pasid(0)];
    viommu.connect(1, false);
    (0..8).for_each(|_| drop(viommu.idle()));
    let attached: Vec<u32> = viommu.host().attached.values().copied().collect();
    assert!(attached.len() == 2 && attached[0] == attached[1] && attached[0] != old, "{attached:?}, not {old}");
    assert_eq!((viommu.figures().pending, viommu.figures().spaces), (0, 1));
}
