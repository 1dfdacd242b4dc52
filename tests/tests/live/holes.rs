//! IOVAs that something else serves than a guest's only table: its changes go straight on, without them.

use std::collections::BTreeMap;

use stagecraft::Span;
use stagecraft::plugin::Tag;
use stagecraft::sync::{Live, ShadowLimits, Space, Unwatched, Way};
use stagecraft::table::Intercept;
use stagecraft_tests::reference::generate::Rng;

use super::behaviour::range;
use super::equality::seeds;
use super::guest::{DATA, Guest, PS, RW};
use super::space::{Heard, intercept};
use super::support::format;

/// Three large pages, the second of which begins with the addresses of interrupts.
const FIRST: u64 = 0xfec0_0000;
const LARGE: u64 = 2 << 20;
const INTERRUPTS: u64 = 0xfee0_0000;

/// What of the three is intercepted: nothing, interrupts, parts of pages and neighbours, or outputs as well.
fn random_intercepts(rng: &mut Rng) -> Vec<Intercept> {
    let interrupts = intercept(0, !0xf_ffff, INTERRUPTS);
    match rng.below(5) {
        0 => Vec::new(),
        1 | 2 => vec![interrupts],
        3 => vec![intercept(0, !0x3fff, INTERRUPTS + 0x4000), interrupts, intercept(0, !0xfff, INTERRUPTS + 0x10_0000), intercept(0, !0x7f, FIRST)],
        _ => vec![interrupts, intercept(1, !0xfff, DATA + 0x3000)],
    }
}

/// What the guest wrote: a large page, or pages.
enum Slot {
    Large(u64),
    Pages(BTreeMap<u64, u64>),
}

#[test]
fn a_table_is_followed_without_them() {
    for seed in 0..seeds() {
        let mut rng = Rng::new(seed);
        let guest = Guest::new();
        let mut slots: Vec<Slot> = (0..3).map(|_| Slot::Pages(BTreeMap::new())).collect();
        let mut intercepts = random_intercepts(&mut rng);
        let way = |intercepts: &[Intercept]| Way::table(format(&guest.config())).with_intercepts(intercepts.to_vec());
        let space = Space::open(way(&intercepts), Guest::map(), ShadowLimits::default(), Box::new(Unwatched)).unwrap();
        let mut live = Live::new(space, Heard::default(), Tag::default(), 0, 1 << 10);
        for round in 0..60 {
            // The guest writes once or a few times before it says so.
            for _ in 0..1 + rng.below(4) {
                let number = rng.below(3);
                let base = FIRST + number * LARGE;
                let slot = &mut slots[number as usize];
                match (&mut *slot, rng.below(8)) {
                    (_, 0) => {
                        let address = (4 + rng.below(6)) * LARGE;
                        guest.put(base, 1, address | RW | PS);
                        *slot = Slot::Large(address);
                    }
                    (Slot::Large(_), _) | (_, 1) => {
                        guest.put(base, 1, 0);
                        *slot = Slot::Pages(BTreeMap::new());
                    }
                    (Slot::Pages(pages), change) => {
                        // Near the ends of what is intercepted.
                        let iova = base + rng.pick(&[0, 0x3000, 0x7000, 0xff000, 0x10_0000, 0x1f_f000]) + rng.below(2) * 0x1000;
                        let iova = iova.min(base + LARGE - 0x1000);
                        let address = DATA + rng.below(8) * 0x1000;
                        guest.put(iova, 0, if change < 4 { 0 } else { address | RW });
                        if change < 4 {
                            pages.remove(&iova)
                        } else {
                            pages.insert(iova, address)
                        };
                    }
                }
                if rng.percent(30) {
                    let scope = if rng.percent(50) { base } else { FIRST };
                    live.invalidate(&guest.view(), &[range(scope, base + LARGE - 1, false), range(base, base + LARGE - 1, false)]).unwrap();
                }
            }
            if rng.percent(15) {
                intercepts = random_intercepts(&mut rng);
                live.switch(way(&intercepts), &guest.view()).unwrap();
            }
            live.synchronise(&guest.view()).unwrap();
            let caught = |passed: u8, address: u64| intercepts.iter().any(|one| one.passed == passed && address & one.mask == one.value);
            for iova in (FIRST..FIRST + 3 * LARGE).step_by(0x1000).flat_map(|page| [page, page + 0x40, page + 0x80, page + 0xfff]) {
                let (page, offset) = (iova & !0xfff, iova & 0xfff);
                let address = match &slots[((iova - FIRST) / LARGE) as usize] {
                    Slot::Large(address) => Some(address + (iova & (LARGE - 1))),
                    Slot::Pages(pages) => pages.get(&page).map(|address| address + offset),
                };
                let wanted = address.filter(|address| !caught(0, iova) && !caught(1, *address));
                let piece = live.sink().0.pieces.range(..=iova).next_back().map(|(_, piece)| *piece).filter(|piece| piece.iova.contains(iova));
                assert_eq!(
                    piece.map(|piece| piece.address + (iova - piece.iova.first)),
                    wanted,
                    "seed {seed}, round {round}: {iova:#x}, {intercepts:x?}"
                );
            }
            // Who joins later hears the same.
            let mut told = Vec::new();
            live.space().pieces(Span::ALL, &mut |piece| told.push((piece.iova, piece.address)));
            let kept: Vec<_> = live.sink().0.pieces.values().map(|piece| (piece.iova, piece.address)).collect();
            assert_eq!(told, kept, "seed {seed}, round {round}");
        }
    }
}

/// Where outputs are intercepted as well, changes do not go straight on. They are found all the same, by what was written and by what was said.
#[test]
fn what_goes_is_found_whatever_is_intercepted() {
    for intercepts in [Vec::new(), vec![intercept(0, !0xf_ffff, INTERRUPTS)], vec![intercept(1, !0xfff, DATA + 0x3000)]] {
        let guest = Guest::new();
        (0..3).for_each(|index| guest.put(index << 12, 0, (DATA + (index << 12)) | RW));
        let way = Way::table(format(&guest.config())).with_intercepts(intercepts.clone());
        let space = Space::open(way, Guest::map(), ShadowLimits::default(), Box::new(Unwatched)).unwrap();
        let mut live = Live::new(space, Heard::default(), Tag::default(), 0, 1 << 10);
        assert_eq!(live.synchronise(&guest.view()).unwrap().changes, 3);
        let slot = guest.set(0, 0, 0);
        assert_eq!(live.table_written(&guest.view(), slot, 8).unwrap().changes, 1, "{intercepts:x?}");
        guest.set(0x1000, 0, 0);
        assert_eq!(live.invalidate(&guest.view(), &[range(0x1000, 0x1fff, true)]).unwrap().changes, 1, "{intercepts:x?}");
        assert_eq!(live.sink().0.pieces.keys().copied().collect::<Vec<_>>(), [0x2000], "{intercepts:x?}");
    }
}
