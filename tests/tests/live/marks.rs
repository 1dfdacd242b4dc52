//! Accessed and dirty marks: set by the simulated hardware in the host's table, written back into the guest's, and told as a log of writes.

use std::collections::BTreeSet;

use stagecraft::kernel::sim::DmaAccess;
use stagecraft::memory::{Kind, MemoryMap, Region};
use stagecraft::plugin::{TableConfig, Tag};
use stagecraft::sync::{
    CommitError, DirtyError, Live, Marked, MarksWritten, Nested, NestedTable, RegionTables, Shadow, ShadowLimits, Sink, Unwatched,
};
use stagecraft::{Change, Gpa, Iova, Span};
use stagecraft_tests::reference::generate::Rng;
use stagecraft_tests::reference::walk::Walker;
use vm_memory::MmapRegion;

use super::behaviour::range;
use super::guest::{DATA, Guest, MEMORY, PS, RO, RW};
use super::hardware::{Arch, Forgotten, Rig};
use super::support::{Counting, HOST_BASE, format};

/// A VT-d entry's marks.
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;

fn written(accessed: u64, dirty: u64) -> MarksWritten {
    MarksWritten { accessed, dirty, ..MarksWritten::default() }
}

fn uses(rig: &Rig, iova: u64, access: DmaAccess) {
    assert!(rig.device.first_stage(None, Iova(iova), access).is_ok(), "{iova:#x}");
}

#[test]
fn what_a_device_does_is_marked_in_the_guests_entries() {
    for arch in [Arch::Vtd, Arch::Smmu] {
        let mut rig = Rig::with(arch, Forgotten::Nothing, true);
        // Clean and not accessed: two writable pages, one that is not, a large one; and one that the guest has marked.
        for index in 0..4 {
            rig.guest.put(index << 12, 0, (DATA + (index << 12)) | if index == 2 { RO & !A & !D } else { RW & !A & !D });
        }
        rig.guest.put(4 << 12, 0, (DATA + 0x4000) | RW);
        rig.guest.put(1 << 21, 1, 0x100_0000 | RW & !A & !D | PS);
        rig.live.synchronise(&rig.guest.view()).unwrap();
        let load = |rig: &Rig, iova: u64, height: u32| rig.guest.load(rig.guest.slot(iova, height).0) & (A | D);
        assert_eq!(rig.live.write_marks(&rig.guest.view(), Span::ALL), written(0, 0), "{arch:?}: nobody did anything");

        uses(&rig, 0, DmaAccess::Read);
        uses(&rig, 0x1008, DmaAccess::Write);
        uses(&rig, 0x2008, DmaAccess::Read);
        uses(&rig, 0x4000, DmaAccess::Write);
        uses(&rig, 1 << 21 | 0x12_3450, DmaAccess::Write);
        assert_eq!(load(&rig, 0x1000, 0), 0, "not before it is asked for");
        assert_eq!(rig.live.write_marks(&rig.guest.view(), Span { first: 0x1000, last: 0x1fff }), written(1, 1), "{arch:?}");
        assert_eq!(rig.live.write_marks(&rig.guest.view(), Span::ALL), written(3, 1), "{arch:?}");
        let marks: Vec<u64> = (0..5).map(|index| load(&rig, index << 12, 0)).collect();
        assert_eq!((marks, load(&rig, 1 << 21, 1)), (vec![A, A | D, A, 0, A | D], A | D), "{arch:?}");
        // The engine's own writes are no changes by the guest.
        assert_eq!(rig.live.synchronise(&rig.guest.view()).unwrap().changes, 0, "{arch:?}");
        assert_eq!(rig.live.write_marks(&rig.guest.view(), Span::ALL), written(0, 0), "{arch:?}");

        // The guest takes marks back, and is told of the next use, not of the last one.
        rig.guest.put(0x1000, 0, (DATA + 0x1000) | RW & !D);
        rig.guest.put(0x2000, 0, (DATA + 0x2000) | RO & !A & !D);
        rig.live.invalidate(&rig.guest.view(), &[range(0x1000, 0x2fff, true)]).unwrap();
        assert_eq!(rig.live.write_marks(&rig.guest.view(), Span::ALL), written(0, 0), "{arch:?}");
        uses(&rig, 0x1000, DmaAccess::Read);
        assert_eq!(rig.live.write_marks(&rig.guest.view(), Span::ALL), written(0, 0), "{arch:?}");
        uses(&rig, 0x1000, DmaAccess::Write);
        uses(&rig, 0x2000, DmaAccess::Read);
        assert_eq!(rig.live.write_marks(&rig.guest.view(), Span::ALL), written(1, 1), "{arch:?}");

        // What the guest changed meanwhile is never overwritten.
        uses(&rig, 0x3000, DmaAccess::Write);
        rig.guest.put(0x3000, 0, 0);
        assert_eq!(rig.live.write_marks(&rig.guest.view(), Span::ALL), MarksWritten { skipped: 1, ..MarksWritten::default() }, "{arch:?}");
        assert_eq!(rig.guest.load(rig.guest.slot(0x3000, 0).0), 0);
    }
}

/// A host whose hardware marks nothing, and one whose leaves are made accessed.
/// Requests through the host's table leave in the guest's tables what they would leave there if the guest's were walked.
#[test]
fn what_a_device_does_is_marked_on_the_way_as_well() {
    for arch in [Arch::Vtd, Arch::Smmu] {
        for seed in 0..4 {
            let (mut rig, mut rng) = (Rig::with(arch, Forgotten::Nothing, true), Rng::new(seed));
            let iovas: Vec<u64> = (0..12).map(|_| rng.below(2) << 39 | rng.below(2) << 30 | rng.below(3) << 21 | rng.below(4) << 12).collect();
            for iova in &iovas {
                let marks = rng.pick(&[0, A, A | D]);
                rig.guest.put(*iova, 0, (DATA + (rng.below(64) << 12)) | (RW & !A & !D) | marks);
                for height in 1..4 {
                    let slot = rig.guest.slot(*iova, height).0;
                    rig.guest.store(slot, rig.guest.load(slot) & !A | if rng.percent(40) { A } else { 0 });
                }
            }
            rig.live.synchronise(&rig.guest.view()).unwrap();
            // Leaves that were marked before count as used.
            let mut expected = rig.guest.snapshot();
            let config = rig.guest.reference();
            let apply = |expected: &mut stagecraft_tests::reference::snapshot::Memory, iova: u64, write: bool| {
                let marks = Walker::new(expected, &[config]).unwrap().marks(iova, write).unwrap();
                marks.iter().for_each(|marked| expected.write(marked.address, marked.new, false));
                marks.len()
            };
            for iova in &iovas {
                if rig.guest.load(rig.guest.slot(*iova, 0).0) & A != 0 {
                    apply(&mut expected, *iova, false);
                }
            }
            rig.live.write_marks(&rig.guest.view(), Span::ALL);
            assert!(rig.guest.snapshot() == expected, "{arch:?} seed {seed}: before any use");
            let mut marks = 0;
            for _ in 0..6 {
                let (iova, write) = (rng.pick(&iovas), rng.percent(50));
                uses(&rig, iova, if write { DmaAccess::Write } else { DmaAccess::Read });
                marks += apply(&mut expected, iova, write);
            }
            let written = rig.live.write_marks(&rig.guest.view(), Span::ALL);
            assert!(rig.guest.snapshot() == expected, "{arch:?} seed {seed}");
            assert_eq!((written.skipped, marks > 0), (0, true), "{arch:?} seed {seed}: {written:?}");
        }
    }
}

#[test]
fn what_hardware_does_not_mark_counts_as_marked() {
    let guest = Guest::new();
    (0..3).for_each(|index| guest.put(index << 12, 0, (DATA + (index << 12)) | [RW, RO, RW][index as usize] & !A & !D));
    for (host, settings) in
        [("arm-smmuv3/stage1", [("granule", 4096), ("input-bits", 48)]), ("intel-vtd/second-stage", [("levels", 4), ("output-bits", 48)])]
    {
        let region = std::sync::Arc::new(MmapRegion::new(1 << 20).unwrap());
        let table = NestedTable::new(format(&TableConfig::new(host, &settings)), RegionTables::new(region, Gpa(HOST_BASE))).unwrap();
        let shadow = Shadow::open(format(&guest.config()), Guest::map(), ShadowLimits::default(), Box::new(Unwatched)).unwrap();
        let mut live = Live::new(shadow, Nested::new(table, Counting::default()), Tag::default(), 0, 1 << 10);
        live.synchronise(&guest.view()).unwrap();
        assert!(!live.track_dirty(true).unwrap(), "{host}");
        assert!(matches!(live.dirty(Span::ALL, true), Err(DirtyError::NotTracked)));
        assert_eq!(live.write_marks(&guest.view(), Span { first: 0, last: 0x1fff }), written(2, 1), "{host}");
        assert_eq!(live.mark_all(&guest.view(), Span::ALL), written(1, 1), "{host}");
        assert_eq!(live.synchronise(&guest.view()).unwrap().changes, 0, "{host}");
        (0..3).for_each(|index| guest.put(index << 12, 0, (DATA + (index << 12)) | [RW, RO, RW][index as usize] & !A & !D));
    }
}

/// A host that tells some marks.
struct Telling(Vec<Marked>);

impl Sink for Telling {
    fn apply(&mut self, _: &[Change]) {}

    fn commit(&mut self) -> Result<(), CommitError> {
        Ok(())
    }

    fn marks(&self, span: Span, each: &mut dyn FnMut(Marked)) {
        self.0.iter().filter(|marked| marked.iova.intersection(span).is_some()).for_each(|marked| each(*marked));
    }
}

#[test]
fn a_sink_whose_place_was_taken_tells_its_marks() {
    let guest = Guest::new();
    (0..3).for_each(|index| guest.put(index << 12, 0, (DATA + (index << 12)) | RW & !A & !D));
    let marked = |page: u64, dirty: bool| Marked { iova: Span { first: page << 12, last: page << 12 | 0xfff }, accessed: true, dirty };
    let shadow = Shadow::open(format(&guest.config()), Guest::map(), ShadowLimits::default(), Box::new(Unwatched)).unwrap();
    let mut live = Live::new(shadow, Telling(vec![marked(0, true), marked(2, false)]), Tag::default(), 0, 1 << 10);
    live.synchronise(&guest.view()).unwrap();
    let old = live.replace_sink(Telling(vec![marked(1, false)])).unwrap();
    assert_eq!(live.write_marks(&guest.view(), Span::ALL), written(1, 0));
    assert_eq!(live.write_marks_of(&old, &guest.view(), Span { first: 0x1000, last: 0x2fff }), written(1, 0));
    assert_eq!(live.write_marks_of(&old, &guest.view(), Span::ALL), written(1, 1));
    assert_eq!([0, 1, 2].map(|page| guest.load(guest.slot(page << 12, 0).0) & (A | D)), [A | D, A, A]);
    assert_eq!(live.synchronise(&guest.view()).unwrap().changes, 0);
}

/// The pages that a log tells, as numbers.
fn pages(live: &mut Live<impl stagecraft::sync::Sink>, clear: bool) -> BTreeSet<u64> {
    let bitmap = live.dirty(Span { first: 0, last: MEMORY - 1 }, clear).unwrap();
    (0..MEMORY >> 12).filter(|page| bitmap[*page as usize / 64] >> (page % 64) & 1 != 0).collect()
}

#[test]
fn writes_are_logged_while_the_guest_lives() {
    for arch in [Arch::Vtd, Arch::Smmu] {
        let mut rig = Rig::with(arch, Forgotten::Nothing, true);
        let data = |page: u64| (DATA >> 12) + page;
        // Dirty already, as drivers write them; one is clean.
        (0..16).for_each(|index| rig.guest.put(index << 12, 0, (DATA + (index << 12)) | if index == 7 { RW & !D } else { RW }));
        rig.guest.put(1 << 21, 1, 0x100_0000 | RW | PS);
        rig.live.synchronise(&rig.guest.view()).unwrap();
        uses(&rig, 0x5000, DmaAccess::Write);
        uses(&rig, 0x7000, DmaAccess::Write);
        assert!(rig.live.track_dirty(true).unwrap());
        assert_eq!(pages(&mut rig.live, false), BTreeSet::new(), "{arch:?}: from now on");
        // What is cached as dirty from before counts again, at once.
        uses(&rig, 0x5000, DmaAccess::Write);
        uses(&rig, 0x6000, DmaAccess::Read);
        assert_eq!(pages(&mut rig.live, false), [data(5)].into(), "{arch:?}");
        assert_eq!(pages(&mut rig.live, true), [data(5)].into(), "{arch:?}");
        assert_eq!(pages(&mut rig.live, true), BTreeSet::new(), "{arch:?}");
        uses(&rig, 0x5000, DmaAccess::Write);
        assert_eq!(pages(&mut rig.live, true), [data(5)].into(), "{arch:?}: after it was cleared");
        // A page that is taken away, alone and with its table, was written before.
        uses(&rig, 0x1000, DmaAccess::Write);
        uses(&rig, 1 << 21 | 0x3000, DmaAccess::Write);
        rig.guest.put(0x1000, 0, 0);
        rig.live.invalidate(&rig.guest.view(), &[range(0x1000, 0x1fff, true)]).unwrap();
        rig.guest.put(1 << 21, 1, 0);
        rig.live.synchronise(&rig.guest.view()).unwrap();
        uses(&rig, 0x2000, DmaAccess::Write);
        rig.guest.put(0, 1, 0);
        rig.live.synchronise(&rig.guest.view()).unwrap();
        // Small pages whose table goes at once, because a large one stands there.
        (0..4).for_each(|index| rig.guest.put(3 << 21 | index << 12, 0, (DATA + ((40 + index) << 12)) | RW));
        rig.live.synchronise(&rig.guest.view()).unwrap();
        uses(&rig, 3 << 21 | 0x1000, DmaAccess::Write);
        rig.guest.put(3 << 21, 1, 0x140_0000 | RW | PS);
        rig.live.synchronise(&rig.guest.view()).unwrap();
        let large = 0x100_0000 >> 12..(0x120_0000 >> 12);
        let wanted: BTreeSet<u64> = [data(1), data(2), data(41)].into_iter().chain(large).collect();
        assert_eq!(pages(&mut rig.live, true), wanted, "{arch:?}");
        assert_eq!(pages(&mut rig.live, true), BTreeSet::new(), "{arch:?}");
    }
}

#[test]
fn the_guests_marks_survive_the_log() {
    for arch in [Arch::Vtd, Arch::Smmu] {
        let mut rig = Rig::with(arch, Forgotten::Nothing, true);
        (0..5).for_each(|index| rig.guest.put(index << 12, 0, (DATA + (index << 12)) | RW & !A & !D));
        rig.live.synchronise(&rig.guest.view()).unwrap();
        uses(&rig, 0, DmaAccess::Write);
        uses(&rig, 0x4000, DmaAccess::Read);
        assert!(rig.live.track_dirty(true).unwrap());
        uses(&rig, 0x1000, DmaAccess::Write);
        assert_eq!(pages(&mut rig.live, true).len(), 1);
        uses(&rig, 0x2000, DmaAccess::Write);
        // Of a page of 1 GiB memory is there for a part, which becomes smaller: no reason to forget either.
        rig.guest.put(1 << 30, 2, RW & !A & !D | PS);
        rig.live.synchronise(&rig.guest.view()).unwrap();
        uses(&rig, 1 << 30 | 0x40_0000, DmaAccess::Write);
        let half = Region { kind: Kind::Ram, span: Span { first: 0, last: MEMORY / 2 - 1 } };
        assert_eq!(rig.live.memory_changed(&rig.guest.view(), MemoryMap::new(vec![half]).unwrap()).unwrap().changes, 2);
        assert!(rig.live.track_dirty(false).unwrap());
        assert_eq!(rig.live.write_marks(&rig.guest.view(), Span::ALL), written(5, 4), "{arch:?}: not the fourth of the small ones");
        let marks = [0x3000, 0x4000].map(|iova| rig.guest.load(rig.guest.slot(iova, 0).0) & (A | D));
        assert_eq!(marks, [0, A], "{arch:?}");
    }
}

/// A guest that lives at random, against a count of what was written.
#[test]
fn no_write_is_missing_in_the_log() {
    let misses = |arch: Arch, forgotten: Forgotten, seed: u64| {
        let mut rig = Rig::with(arch, forgotten, true);
        let mut rng = Rng::new(seed);
        let mut mapped = [None::<u64>; 24];
        assert!(rig.live.track_dirty(true).unwrap());
        let (mut wrote, mut told) = (BTreeSet::new(), BTreeSet::new());
        for _ in 0..400 {
            let index = rng.below(24) as usize;
            let iova = (index as u64 / 8) << 21 | (index as u64 % 8) << 12;
            match rng.below(8) {
                0 => {
                    mapped[index] = rng.percent(70).then(|| DATA + (rng.below(64) << 12));
                    rig.guest.put(iova, 0, mapped[index].map_or(0, |address| address | if rng.percent(50) { RW } else { RW & !D }));
                    rig.live.invalidate(&rig.guest.view(), &[range(iova, iova | 0xfff, false)]).unwrap();
                }
                1 => told.extend(pages(&mut rig.live, rng.percent(70))),
                2 => drop(rig.live.write_marks(&rig.guest.view(), Span::ALL)),
                _ => {
                    if let Some(address) = mapped[index] {
                        uses(&rig, iova, DmaAccess::Write);
                        // A page that was told before it was written is not told.
                        told.remove(&(address >> 12));
                        wrote.insert(address >> 12);
                    }
                }
            }
        }
        told.extend(pages(&mut rig.live, true));
        !wrote.is_subset(&told)
    };
    for arch in [Arch::Vtd, Arch::Smmu] {
        assert!((0..6).all(|seed| !misses(arch, Forgotten::Nothing, seed)), "{arch:?}");
        // Were caches not invalidated, writes would be missed: the test sees that.
        assert!((0..6).any(|seed| misses(arch, Forgotten::FirstSpan, seed)), "{arch:?}");
    }
}
