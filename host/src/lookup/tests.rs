//! Against a model that keeps every byte, with small and huge spans; and readers that look while the writer works.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use proptest::prelude::*;
use vm_memory::{GuestAddress, Iommu as _, Permissions};

use super::{Limits, Lookup, LookupError, LookupIommu, Miss, Updater};
use crate::table::Piece;
use crate::{Attributes, Change, Gpa, Iova, Span};

const PAGE: u64 = 4096;

fn read_write() -> Attributes {
    Attributes::READ.with(Attributes::WRITE)
}

fn map(first: u64, last: u64, address: u64) -> Change {
    Change::Map(Piece { iova: Span { first, last }, address, attributes: read_write() })
}

fn unmap(first: u64, last: u64) -> Change {
    Change::Unmap(Span { first, last })
}

fn open() -> (Updater, Lookup) {
    Updater::new(Limits { nodes: 4096 }).unwrap()
}

fn address(lookup: &Lookup, iova: u64) -> Option<u64> {
    lookup.find(Iova(iova)).map(|target| target.address.0)
}

/// Extents by their first IOVA, split and never joined: a model without a tree.
#[derive(Default)]
struct Model(BTreeMap<u64, (u64, u64, Attributes)>);

impl Model {
    fn unmap(&mut self, span: Span) {
        let hit: Vec<u64> =
            self.0.iter().filter(|(first, (last, ..))| **first <= span.last && *last >= span.first).map(|(first, _)| *first).collect();
        for first in hit {
            let (last, address, attributes) = self.0.remove(&first).unwrap();
            if first < span.first {
                self.0.insert(first, (span.first - 1, address, attributes));
            }
            if last > span.last {
                self.0.insert(span.last + 1, (last, address.wrapping_add(span.last + 1 - first), attributes));
            }
        }
    }

    fn apply(&mut self, change: &Change) {
        self.unmap(change.span());
        if let Change::Map(piece) = change {
            self.0.insert(piece.iova.first, (piece.iova.last, piece.address, piece.attributes));
        }
    }

    fn find(&self, iova: u64) -> Option<(u64, Attributes)> {
        let (first, (last, address, attributes)) = self.0.range(..=iova).next_back()?;
        (iova <= *last).then(|| (address.wrapping_add(iova - first), *attributes))
    }
}

/// Where spans begin: near zero, near two far places, at the end of the space; aligned to pages and blocks, or not.
fn place() -> impl Strategy<Value = u64> {
    let near = prop_oneof![Just(0_u64), Just(0x40_0000_0000), Just(0xffff_ff80_0000_0000), Just(0x7fff_ffff_ffe0_0000), Just(u64::MAX - 0x7f_ffff)];
    let offset = prop_oneof![(0_u64..64).prop_map(|page| page * PAGE), (0_u64..8).prop_map(|block| block << 21), 0_u64..0x80_0000];
    (near, offset).prop_map(|(near, offset)| near.saturating_add(offset))
}

fn length() -> impl Strategy<Value = u64> {
    prop_oneof![
        (1_u64..20).prop_map(|pages| pages * PAGE),
        Just(1_u64 << 21),
        Just(1_u64 << 30),
        (1_u64..3).prop_map(|blocks| (blocks << 21) + PAGE),
        1_u64..3 * PAGE,
        (10_u32..63).prop_map(|bits| 1 << bits)
    ]
}

fn change() -> impl Strategy<Value = Change> {
    let attributes = prop_oneof![Just(Attributes::READ), Just(read_write()), Just(Attributes::WRITE.with(Attributes::DIRTY))];
    // Spans of many pages that begin at another place of a page than their targets would need a list for each page.
    let target = prop_oneof![8 => (0_u64..1 << 30).prop_map(|page| page << 12), 1 => 0_u64..1 << 40];
    (place(), length(), target, attributes, 0..5).prop_map(|(first, length, target, attributes, kind)| {
        let span = Span { first, last: first.saturating_add(length - 1) };
        if kind < 2 {
            return Change::Unmap(span);
        }
        let address = if length < 20 * PAGE { target } else { (target & !(PAGE - 1)) + first % PAGE };
        Change::Map(Piece { iova: span, address, attributes })
    })
}

fn compare(lookup: &Lookup, model: &Model, probes: &[u64]) -> Result<(), TestCaseError> {
    for probe in probes {
        let found = lookup.find(Iova(*probe)).map(|target| (target.address.0, target.attributes));
        prop_assert_eq!(found, model.find(*probe), "at {:#x}", probe);
        let piece = lookup.piece(Iova(*probe)).map(|piece| (piece.address.wrapping_add(probe - piece.iova.first), piece.attributes));
        prop_assert_eq!(piece, found, "piece at {:#x}", probe);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn it_finds_what_the_model_finds(batches in proptest::collection::vec(proptest::collection::vec(change(), 1..4), 1..12)) {
        let (mut updater, lookup) = open();
        let mut model = Model::default();
        let mut probes = vec![0, u64::MAX];
        for batch in &batches {
            prop_assert_eq!(updater.apply(batch), Ok(()));
            for change in batch {
                model.apply(change);
                let Span { first, last } = change.span();
                let middle = first + (last - first) / 2;
                probes.extend([first, first.saturating_sub(1), first.saturating_add(1), last, last.saturating_add(1), middle, middle & !(PAGE - 1), middle | 0xfff]);
            }
            compare(&lookup, &model, &probes)?;
        }
        // All of it in order, holes included, and nothing twice.
        let mut next = Some(0);
        for found in lookup.pieces(Span::ALL) {
            let span = found.map_or_else(|hole| hole, |piece| piece.iova);
            prop_assert_eq!(Some(span.first), next);
            for iova in [span.first, span.last] {
                let expected = found.ok().map(|piece| (piece.address.wrapping_add(iova - piece.iova.first), piece.attributes));
                prop_assert_eq!(model.find(iova), expected, "at {:#x}", iova);
            }
            next = span.last.checked_add(1);
        }
        prop_assert_eq!(next, None);
        // Nothing is left when everything is unmapped.
        prop_assert_eq!(updater.apply(&[unmap(0, u64::MAX)]), Ok(()));
        compare(&lookup, &Model::default(), &probes)?;
        prop_assert_eq!(updater.bytes(), 0);
    }
}

#[test]
fn the_last_byte_of_the_space() {
    let (mut updater, lookup) = open();
    updater.apply(&[map(u64::MAX - 0xfff, u64::MAX, 0x5000)]).unwrap();
    assert_eq!(address(&lookup, u64::MAX), Some(0x5fff));
    assert_eq!(address(&lookup, u64::MAX - 0x1000), None);
    updater.apply(&[map(0, 0, 0x7)]).unwrap();
    assert_eq!((address(&lookup, 0), address(&lookup, 1)), (Some(7), None));
    updater.apply(&[unmap(u64::MAX, u64::MAX)]).unwrap();
    assert_eq!((address(&lookup, u64::MAX), address(&lookup, u64::MAX - 1)), (None, Some(0x5ffe)));
    updater.apply(&[map(0, u64::MAX, 0)]).unwrap();
    assert_eq!(address(&lookup, u64::MAX), Some(u64::MAX));
}

#[test]
fn a_limit_unmaps_rather_than_it_lets_pass() {
    let (mut updater, lookup) = Updater::new(Limits { nodes: 2 }).unwrap();
    updater.apply(&[map(0, (1 << 30) - 1, 1 << 40)]).unwrap();
    // A hole of one page in a block of 1 GiB takes a node; there is one. The next one has no room.
    updater.apply(&[unmap(0x5000, 0x5fff)]).unwrap();
    assert_eq!(
        (address(&lookup, 0x4fff), address(&lookup, 0x5000), address(&lookup, 0x6000)),
        (Some((1 << 40) + 0x4fff), None, Some((1 << 40) + 0x6000))
    );
    let refused = updater.apply(&[unmap(0x20_0000, 0x20_0fff)]);
    assert!(matches!(refused, Err(LookupError::Full { span: Span { first: 0x20_0000, last: 0x3f_ffff }, limit: 2 })), "{refused:?}");
    assert_eq!((address(&lookup, 0x20_0000), address(&lookup, 0x40_0000)), (None, Some((1 << 40) + 0x40_0000)));
    // A mapping that does not fit is not there at all, and costs no more than the limit.
    let refused = updater.apply(&[unmap(0, u64::MAX), map(0, 1 << 45, 1)]);
    assert!(matches!(refused, Err(LookupError::Full { .. })), "{refused:?}");
    assert!(lookup.pieces(Span { first: 0, last: 1 << 45 }).all(|found| found.is_err()));
    assert_eq!(updater.bytes(), 0);
    updater.apply(&[map(0, 0xfff, 0)]).unwrap();
    assert_eq!(address(&lookup, 0), Some(0));
}

/// Readers are in it until the batch is done.
#[test]
fn a_node_that_a_batch_gives_up_does_not_serve_the_same_batch() {
    let (mut updater, lookup) = Updater::new(Limits { nodes: 2 }).unwrap();
    updater.apply(&[map(0, 0x20_0fff, 1 << 40)]).unwrap();
    let batch = [unmap(0x20_0000, 0x3f_ffff), map(0x40_0000, 0x40_0fff, 0x7000)];
    assert!(matches!(updater.apply(&batch), Err(LookupError::Full { .. })));
    assert_eq!((address(&lookup, 0x20_0000), address(&lookup, 0x40_0000)), (None, None));
    updater.apply(&batch).unwrap();
    assert_eq!(address(&lookup, 0x40_0000), Some(0x7000));
}

#[test]
fn a_page_of_too_many_parts_is_not_mapped() {
    let (mut updater, lookup) = open();
    let parts: Vec<Change> = (0..512).map(|part| map(part * 8, part * 8 + 3, 0x9000 + part)).collect();
    assert!(matches!(updater.apply(&parts), Err(LookupError::TooFine { page: Span { first: 0, last: 0xfff } })));
    updater.apply(&[unmap(0, 0xfff)]).unwrap();
    updater.apply(&parts[..256]).unwrap();
    assert_eq!((address(&lookup, 255 * 8 + 3), address(&lookup, 255 * 8 + 4)), (Some(0x9000 + 255 + 3), None));
}

/// Runs `read` in a thread again and again while `write` runs; how often it ran.
fn meanwhile(read: impl Fn() + Sync, write: impl FnOnce()) -> u64 {
    let (done, turns) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                read();
                turns.fetch_add(1, Ordering::Release);
            }
        });
        // A reader that did not begin yet proves nothing.
        while turns.load(Ordering::Acquire) == 0 && !reader.is_finished() {
            std::thread::yield_now();
        }
        write();
        done.store(true, Ordering::Release);
    });
    turns.into_inner()
}

/// Blocks are split into pages and joined again, neighbours come and go, nodes are used again: what does not change is found by every lookup, at its place.
#[test]
fn what_does_not_change_is_always_found() {
    let (mut updater, lookup) = Updater::new(Limits { nodes: 80 }).unwrap();
    const BLOCK: u64 = 1 << 21;
    let (kept, target) = (0x4000_0000_u64, 0x1_0000_0000_u64);
    let whole = map(kept, kept + BLOCK - 1, target);
    let split: Vec<Change> = std::iter::once(unmap(kept, kept + BLOCK - 1))
        .chain((0..512).map(|page| map(kept + page * PAGE, kept + page * PAGE + 0xfff, target + page * PAGE)))
        .collect();
    let join: Vec<Change> = (0..512).map(|page| unmap(kept + page * PAGE, kept + page * PAGE + 0xfff)).chain([whole]).collect();
    updater.apply(&[whole]).unwrap();
    let read = || {
        for page in [0, 1, 255, 511] {
            assert_eq!(address(&lookup, kept + page * PAGE + 5), Some(target + page * PAGE + 5));
        }
    };
    meanwhile(read, || {
        for round in 0..2000_u64 {
            updater.apply(&split).unwrap();
            // Scattered neighbours take and free nodes; far ones raise the root.
            let far = if round % 500 == 499 { 1 << 50 } else { 0x8000_0000 };
            let others: Vec<Change> = (0..8).map(|other| map(far + other * BLOCK, far + other * BLOCK + 0xfff, round << 12)).collect();
            updater.apply(&others).unwrap();
            updater.apply(&join).unwrap();
            updater.apply(&[unmap(far, far + 8 * BLOCK)]).unwrap();
        }
    });
}

/// A lookup that begins after an update finds what the update left; one that runs meanwhile finds one of both; nobody finds what never was.
#[test]
fn nothing_stale_and_nothing_that_never_was() {
    let (mut updater, lookup) = Updater::new(Limits { nodes: 70 }).unwrap();
    let now = AtomicU64::new(0);
    let iova = |slot: u64| 0x10_0000_0000 + (slot << 21);
    let read = || {
        for slot in 0..16 {
            // The low bit says that an update is on its way.
            let before = now.load(Ordering::Acquire);
            let found = address(&lookup, iova(slot) + 0x123);
            let after = now.load(Ordering::Acquire);
            if let Some(found) = found {
                assert_eq!((found & 0xfff, found >> 12 & 0xff), (0x123, slot), "an address that nobody mapped");
                let round = found >> 20;
                assert!(before / 2 <= round && round <= after.div_ceil(2), "{round} is not between {before} and {after}");
            }
            assert!(found.is_some() || before != after || before & 1 == 1, "nothing found at {before}");
        }
    };
    updater.apply(&(0..16).map(|slot| map(iova(slot), iova(slot) + 0xfff, slot << 12)).collect::<Vec<_>>()).unwrap();
    meanwhile(read, || {
        for round in 1..=5000_u64 {
            now.store(round * 2 - 1, Ordering::Release);
            // In another order each time, and every node is freed in between, so that nodes serve other slots.
            let order = || (0..16).map(|slot| (slot + round) % 16);
            updater.apply(&order().map(|slot| unmap(iova(slot), iova(slot) + 0xfff)).collect::<Vec<_>>()).unwrap();
            updater.apply(&order().map(|slot| map(iova(slot), iova(slot) + 0xfff, round << 20 | slot << 12)).collect::<Vec<_>>()).unwrap();
            now.store(round * 2, Ordering::Release);
        }
    });
}

#[test]
fn an_access_of_vm_memory() {
    let (mut updater, lookup) = open();
    updater.apply(&[map(0x1000, 0x2fff, 0x9000), map(0x3000, 0x3fff, 0x8_0000)]).unwrap();
    let read_only = Piece { iova: Span { first: 0x4000, last: 0x4fff }, address: 0x8_1000, attributes: Attributes::READ };
    updater.apply(&[Change::Map(read_only)]).unwrap();
    let iommu = LookupIommu::new(lookup, |miss: &Miss| Err(format!("{} at {}", miss.access, miss.iova)));
    let ranges = |first, length, access| {
        let found = iommu.translate(GuestAddress(first), length, access).map_err(|error| error.to_string())?;
        Ok(found.map(|range| (range.base.0, range.length)).collect::<Vec<_>>())
    };
    assert_eq!(ranges(0x1800, 0x2000, Permissions::ReadWrite), Ok(vec![(0x9800, 0x1800), (0x8_0000, 0x800)]));
    assert_eq!(ranges(0x3ff0, 0x20, Permissions::Read), Ok(vec![(0x8_0ff0, 0x20)]), "one fragment, whatever the permissions");
    assert_eq!(ranges(0x1000, 0, Permissions::Read), Ok(vec![]));
    assert_eq!(ranges(0x7777_0000, 0, Permissions::Read), Ok(vec![]));
    let refused: Result<Vec<_>, String> = ranges(0x3ff0, 0x20, Permissions::Write);
    assert!(refused.is_err_and(|reason| reason.contains("w at 0x4000..=0x400f")));
    assert!(ranges(0x4fff, 2, Permissions::Read).is_err_and(|reason| reason.contains("r at 0x5000..=0x5000")));
    assert!(ranges(u64::MAX, 1, Permissions::Read).is_err());
    assert!(ranges(u64::MAX - 3, usize::MAX, Permissions::Read).is_err());
    let few = LookupIommu::new(iommu.lookup().clone(), |_: &Miss| Ok(())).with_most_fragments(1);
    assert!(few.translate(GuestAddress(0x2fff), 2, Permissions::Read).is_err());
    assert!(few.translate(GuestAddress(0x1000), 0x2000, Permissions::Read).is_ok());
}

#[test]
fn a_miss_is_asked_about_once() {
    let (updater, lookup) = open();
    let (updater, asked) = (std::sync::Mutex::new(updater), AtomicU64::new(0));
    let resolve = |miss: &Miss| {
        asked.fetch_add(1, Ordering::Relaxed);
        let first = miss.iova.first & !0xfff;
        updater.lock().unwrap().apply(&[map(first, first + 0xfff, 0x10_0000 + first)]).map_err(|error| error.to_string())
    };
    let iommu = LookupIommu::new(lookup.clone(), resolve);
    assert!(iommu.translate(GuestAddress(0x5100), 8, Permissions::Read).is_ok());
    assert_eq!((asked.load(Ordering::Relaxed), address(&lookup, 0x5100)), (1, Some(0x10_5100)));
    assert!(iommu.translate(GuestAddress(0x5200), 8, Permissions::Read).is_ok());
    assert_eq!(asked.load(Ordering::Relaxed), 1, "a hit asks nobody");
    let half = iommu.translate(GuestAddress(0x6ff8), 16, Permissions::Read);
    assert!(half.is_err(), "the page behind is missing still");
    assert_eq!(asked.load(Ordering::Relaxed), 2);
    assert_eq!(lookup.find(Iova(0x6000)).map(|target| target.address), Some(Gpa(0x10_6000)));
}
