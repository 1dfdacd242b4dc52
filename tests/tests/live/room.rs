//! Hosts without room for everything, and hosts that take the place of others.

use stagecraft::plugin::{TableConfig, Tag};
use stagecraft::sync::{Live, Shadow, ShadowLimits, Unwatched};
use stagecraft::table::Mapping;
use stagecraft_tests::reference::generate::Rng;

use super::behaviour::range;
use super::guest::{DATA, Guest, PS, RO, RW};
use super::support::{Host, format};

const HOST: (&str, &[(&str, u64)]) = ("intel-vtd/first-stage", &[("levels", 4)]);

/// A guest on a host with memory for so many tables, the root among them.
fn live(guest: &Guest, tables: usize) -> Live<Host> {
    let shadow = Shadow::open(format(&guest.config()), Guest::map(), ShadowLimits::default(), Box::new(Unwatched)).unwrap();
    Live::new(shadow, Host::new(&TableConfig::new(HOST.0, HOST.1), tables << 12), Tag::default(), 0, 1 << 10)
}

/// What is told and not shown.
fn missing(live: &Live<Host>) -> Vec<Mapping> {
    let shown = live.sink().walked();
    let is_shown = |mapping: &Mapping| shown.iter().any(|shown| shown.iova.first <= mapping.iova.first && mapping.iova.last <= shown.iova.last);
    live.sink().model.mappings().into_iter().filter(|mapping| !is_shown(mapping)).collect()
}

#[test]
fn what_was_refused_comes_when_there_is_room() {
    let guest = Guest::new();
    // Each needs a table for 1 GiB and one for 2 MiB.
    (0..6).for_each(|index| guest.put(index << 30, 0, (DATA + (index << 12)) | RW));
    // Root, one table for 512 GiB, and four of the pages.
    let mut live = live(&guest, 10);
    let report = live.synchronise(&guest.view()).unwrap();
    assert_eq!((report.changes, report.offered), (6, 0));
    assert_eq!(missing(&live).len(), 2);
    assert_eq!(live.sink().table.refused().len(), 2);
    // Another page in a table that is there is no reason to ask.
    guest.put(0x1000, 0, DATA | RO);
    assert_eq!(live.invalidate(&guest.view(), &[range(0x1000, 0x1fff, true)]).unwrap().offered, 0);
    // One goes: its two tables are room for one that is missing, in the same call.
    guest.put(1 << 30, 0, 0);
    let report = live.invalidate(&guest.view(), &[range(1 << 30, (1 << 30) + 0xfff, false)]).unwrap();
    assert!(report.offered >= 1, "{report:?}");
    assert_eq!(missing(&live).len(), 1);
    assert_eq!(live.sink().table.refused().len(), 1);
    // Another goes, and nobody invalidates the last one's address.
    guest.put(0, 0, 0);
    guest.put(0x1000, 0, 0);
    assert_eq!(live.invalidate(&guest.view(), &[range(0, 0x1fff, false)]).unwrap().offered, 1);
    assert_eq!(missing(&live), []);
    assert!(live.sink().table.refused().is_empty());
    // What was refused and is unmapped meanwhile does not come back.
    (6..9).for_each(|index| guest.put(index << 30, 0, (DATA + (index << 12)) | RW));
    live.synchronise(&guest.view()).unwrap();
    assert_eq!(missing(&live).len(), 3);
    (6..9).for_each(|index| guest.put(index << 30, 0, 0));
    live.synchronise(&guest.view()).unwrap();
    guest.put(2 << 30, 0, 0);
    assert_eq!(live.synchronise(&guest.view()).unwrap().offered, 0);
    assert_eq!(missing(&live), []);
}

/// A page of 2 MiB that the host needs a table for, and that is refused and offered as a part of a larger piece.
#[test]
fn tables_come_and_go_at_random_on_a_host_that_is_always_full() {
    for seed in 0..20 {
        let guest = Guest::new();
        let mut live = live(&guest, 12);
        let mut rng = Rng::new(seed);
        let mut refused = 0;
        for _ in 0..200 {
            let (block, index) = (rng.below(12), rng.below(3));
            let base = block << 30 | index << 21;
            if rng.percent(30) {
                guest.put(base, 1, if rng.percent(50) { 0 } else { 0x100_0000 | RW | PS });
            } else if guest.load(guest.slot(base, 1).0) & PS == 0 {
                guest.put(base | rng.below(4) << 12, 0, if rng.percent(60) { 0 } else { (DATA + (rng.below(9) << 12)) | RW });
            }
            live.synchronise(&guest.view()).unwrap();
            refused += missing(&live).len();
            // What is missing is remembered, and what is shown was told.
            for mapping in missing(&live) {
                let known = live.sink().table.refused().iter().any(|span| span.intersection(mapping.iova).is_some());
                assert!(known, "seed {seed}: {mapping:x?} is missing and not remembered");
            }
            let told = live.sink().model.mappings();
            for shown in live.sink().walked() {
                assert!(told.iter().any(|told| told.iova.first <= shown.iova.first && shown.iova.last <= told.iova.last), "seed {seed}: {shown:x?}");
            }
        }
        assert!(refused > 100, "seed {seed}: {refused}");
        // All of the others go, and there is room for each that stays.
        (0..12).for_each(|block| (0..3).for_each(|index| guest.put(block << 30 | index << 21, 1, 0)));
        (0..4).for_each(|index| guest.put(5 << 30 | index << 12, 0, (DATA + (index << 12)) | RO));
        live.synchronise(&guest.view()).unwrap();
        assert_eq!(missing(&live), [], "seed {seed}");
        assert!(live.sink().table.refused().is_empty(), "seed {seed}");
    }
}

#[test]
fn a_new_sink_has_everything_before_the_old_one_goes() {
    let guest = Guest::new();
    (0..3 * 4096_u64).for_each(|index| guest.put(index << 12, 0, (DATA + ((index % 512) << 12)) | RW));
    guest.put(7 << 30, 1, 0x100_0000 | RO | PS);
    let mut live = live(&guest, 64);
    live.synchronise(&guest.view()).unwrap();
    let other = TableConfig::new("arm-smmuv3/stage1", &[("granule", 4096), ("input-bits", 48), ("output-bits", 48)]);
    let old = live.replace_sink(Host::new(&other, 1 << 20)).unwrap();
    assert_eq!(live.sink().walked(), old.walked());
    assert_eq!((live.sink().model.pieces.len(), live.sink().commits), (old.model.pieces.len(), 1));
    // The new one is kept in step, the old one is left alone.
    guest.put(0, 0, 0);
    assert_eq!(live.invalidate(&guest.view(), &[range(0, 0xfff, true)]).unwrap().changes, 1);
    assert_eq!(live.sink().walked()[0].iova.first, 0x1000);
    assert_eq!(old.walked()[0].iova.first, 0);
}
