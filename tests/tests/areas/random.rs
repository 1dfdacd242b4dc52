//! Random guests: after each commit DMA finds exactly what was told, whatever was cached before; and between any two kernel calls on the way it finds the
//! old translation or the new one, and where the two are the same nothing else.

use std::sync::{Arc, Mutex};

use stagecraft::kernel::Errno;
use stagecraft::kernel::sim::{self, Call, DmaAccess};
use stagecraft::sync::{AreaLimits, Areas, Sink};
use stagecraft::table::Piece;
use stagecraft::{Attributes, Change, Iova, Span};
use stagecraft_tests::reference::generate::Rng;

use super::support::{BASE, Lab, Model, PAGE, READ, ROM_SIZE, RW, SIZE};

fn seeds() -> u64 {
    std::env::var("STAGECRAFT_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(60)
}

/// Where pieces are: at the bottom, around what the SMMU and x86 keep for interrupts, and at the end of what units translate.
const PLACES: [u64; 5] = [0, 0x0800_0000 - 0x2_0000, 0xfee0_0000 - 0x2_0000, (1 << 48) - 0x8_0000, u64::MAX - 0xf_ffff];
/// Pages at each place.
const PAGES: u64 = 256;

/// Somewhere in a place, beginning with a page.
fn place(rng: &mut Rng) -> u64 {
    PLACES[rng.below(PLACES.len() as u64) as usize] + rng.below(PAGES) * PAGE
}

fn attributes(rng: &mut Rng) -> Attributes {
    let marks = rng.pick(&[Attributes::none(), Attributes::ACCESSED, Attributes::DIRTY, Attributes::EXECUTE, Attributes::COHERENT]);
    rng.pick(&[RW, RW, RW, READ, READ, Attributes::WRITE, RW.with(Attributes::PRIVILEGED_ONLY), Attributes::none()]).with(marks)
}

/// Memory, mostly; beside it and badly aligned now and then.
fn address(rng: &mut Rng) -> u64 {
    let page = BASE + rng.below((SIZE + ROM_SIZE) / PAGE) * PAGE;
    match rng.below(20) {
        0 => BASE - 4 * PAGE + rng.below(8) * PAGE,
        1 => page + 0x800,
        2 => u64::MAX - rng.below(0x4000),
        _ => page,
    }
}

/// Adds a piece unless something is in its way.
fn put(model: &Model, maps: &mut Vec<Piece>, piece: Piece) {
    let free = |other: &Piece| other.iova.intersection(piece.iova).is_none();
    if model.at(piece.iova).is_none() && maps.iter().all(free) {
        maps.push(piece);
    }
}

/// What a guest may do between two looks: pages come and go, change their permissions or marks, large ones are split and small ones merged.
fn batch(rng: &mut Rng, model: &Model) -> Vec<Change> {
    let mut after = model.clone();
    let (mut unmaps, mut maps) = (Vec::new(), Vec::new());
    let present: Vec<Piece> = model.pieces.values().copied().collect();
    for _ in 0..rng.below(12).min(present.len() as u64) {
        let piece = present[rng.below(present.len() as u64) as usize];
        if after.pieces.remove(&piece.iova.first).is_none() {
            continue;
        }
        unmaps.push(piece.iova);
        let length = piece.iova.length_minus_one() + 1;
        match rng.below(6) {
            0 | 1 => {}
            2 => put(&after, &mut maps, Piece { attributes: attributes(rng), ..piece }),
            3 => put(&after, &mut maps, Piece { attributes: piece.attributes.with(Attributes::ACCESSED.with(Attributes::DIRTY)), ..piece }),
            4 if length > PAGE => {
                // Split; some of its pages become something else, or nothing.
                for offset in (0..length).step_by(PAGE as usize) {
                    let iova = Span { first: piece.iova.first + offset, last: (piece.iova.first + offset + (PAGE - 1)).min(piece.iova.last) };
                    match rng.below(8) {
                        0 => {}
                        1 => put(&after, &mut maps, Piece { iova, address: address(rng), attributes: piece.attributes }),
                        _ => put(&after, &mut maps, Piece { iova, address: piece.address.saturating_add(offset), attributes: piece.attributes }),
                    }
                }
            }
            _ => {
                // Merge with what follows, if it does in memory as well.
                let mut merged = piece;
                while let Some(first) = merged.iova.last.checked_add(1)
                    && let Some(next) = after.pieces.get(&first).copied()
                    && merged.address.checked_add(first - merged.iova.first) == Some(next.address)
                    && next.attributes.access(false) == merged.attributes.access(false)
                {
                    after.pieces.remove(&first);
                    unmaps.push(next.iova);
                    merged.iova.last = next.iova.last;
                }
                put(&after, &mut maps, merged);
            }
        }
    }
    for _ in 0..rng.below(10) {
        let (first, most) = (place(rng), rng.pick(&[1, 4, 24]));
        let pages = 1 + rng.below(most);
        let odd = if rng.percent(4) { 0x400 } else { 0 };
        let Some(iova) = first.checked_add(pages * PAGE - 1 - odd).and_then(|last| Span::new(first, last)) else { continue };
        let whole = Piece { iova, address: address(rng), attributes: attributes(rng) };
        let kind = rng.below(3);
        if kind == 0 {
            put(&after, &mut maps, whole);
        } else {
            // In small pages: neighbours in memory, or in IOVAs alone.
            for offset in (0..=iova.length_minus_one()).step_by(PAGE as usize) {
                let iova = Span { first: first + offset, last: (first + offset + (PAGE - 1)).min(iova.last) };
                let address = if kind == 1 { whole.address.saturating_add(offset) } else { address(rng) };
                put(&after, &mut maps, Piece { iova, address, ..whole });
            }
        }
    }
    unmaps.sort_unstable();
    maps.sort_unstable_by_key(|piece| piece.iova);
    unmaps.into_iter().map(Change::Unmap).chain(maps.into_iter().map(Change::Map)).collect()
}

/// What the attached devices leave free.
fn reserved(lab: &Lab, units: &[usize]) -> Vec<Span> {
    let mut spans = Vec::new();
    for unit in units.iter().map(|unit| &lab.units[*unit]) {
        spans.extend(&unit.reserved);
        spans.extend(unit.aperture.last.checked_add(1).map(|first| Span { first, last: u64::MAX }));
    }
    spans
}

fn check(lab: &Lab, model: &Model, labels: &[&str], rng: &mut Rng, what: &str) -> usize {
    let mut pages = model.edges();
    pages.extend((0..60).map(|_| place(rng) + rng.below(PAGE)));
    pages.extend((0..10).map(|_| rng.number()));
    model.check(lab, labels, pages, what)
}

/// All pages of all places, so that whatever can remember something has seen it.
fn warm(lab: &Lab, labels: &[&str]) {
    for label in labels {
        let device = lab.dma(label);
        for page in PLACES.iter().flat_map(|place| (0..PAGES).map(move |page| place + page * PAGE)) {
            let _ = device.translate(None, Iova(page), DmaAccess::Read);
        }
    }
}

/// A page that somebody looks at between any two kernel calls: where it leads before a batch, and after.
struct Watched {
    device: sim::Device,
    page: u64,
    access: DmaAccess,
    before: Option<u64>,
    after: Option<u64>,
    /// Something about the page changes: where it leads, or what it allows.
    changes: bool,
}

impl Watched {
    /// The old translation or the new one; none at all only where the two differ. What is wrong otherwise.
    fn look(&self, call: Call) -> Option<String> {
        let found = self.device.translate(None, Iova(self.page), self.access).ok().map(|found| found.user_address & !(PAGE - 1));
        let allowed = found == self.before || found == self.after || found.is_none() && self.changes;
        let Self { page, access, before, after, .. } = self;
        (!allowed).then(|| format!("before {call:?}: {access:?} at {page:#x}: {found:x?}, before {before:x?}, after {after:x?}"))
    }
}

/// All pages that a batch touches, and around.
fn watched(lab: &Lab, (before, after): (&Model, &Model), labels: &[&str]) -> Vec<Watched> {
    let mut pages: Vec<u64> = before.edges().into_iter().chain(after.edges()).map(|iova| iova & !(PAGE - 1)).collect();
    pages.sort_unstable();
    pages.dedup();
    let mut watched = Vec::new();
    for (page, label) in pages.iter().flat_map(|page| labels.iter().map(move |label| (*page, *label))) {
        let both = |access| (access, before.expected(lab, page, access), after.expected(lab, page, access));
        let both = [DmaAccess::Read, DmaAccess::Write].map(both);
        let changes = both.iter().any(|(_, before, after)| before != after);
        watched.extend(both.map(|(access, before, after)| Watched { device: lab.dma(label), page, access, before, after, changes }));
    }
    watched
}

/// What happened to all guests.
#[derive(Debug, Default)]
struct Seen {
    translated: usize,
    swaps: u64,
    interrupted: u64,
    failures: u64,
    watched: usize,
}

/// The kernel fails now and then: one call of the next few, or a step in one.
fn arm(lab: &Lab, rng: &mut Rng) {
    let errno = rng.pick(&[Errno::ENOMEM, Errno::EINTR, Errno::EINVAL, Errno::EBUSY]);
    let n = 1 + rng.below(6);
    match rng.below(3) {
        0 => lab.sim.fail_nth(n, errno),
        1 => lab.sim.fail_step_nth(n, Errno::ENOMEM),
        _ => {}
    }
}

fn play(seed: u64, fails: bool, seen: &mut Seen) {
    let (lab, mut rng) = (Lab::filled(), Rng::new(seed));
    let mut model = Model::default();
    let limits = AreaLimits { join: rng.pick(&[0, 2 * PAGE, 2 << 20]), ..AreaLimits::default() };
    let mut areas = Areas::new(&lab.pins, limits).unwrap();
    // Devices come while much is mapped, and what they reserve goes.
    let mut units = Vec::new();
    let mut labels: Vec<&str> = Vec::new();
    let (dev0, dev1, both) = (lab.bind("dev0"), lab.bind("dev1"), lab.bind("both"));
    for round in 0..40 {
        let what = format!("seed {seed}, round {round}");
        let arrival = [(3, &dev0, "dev0", 0), (12, &dev1, "dev1", 1), (20, &both, "both", 1)].into_iter().find(|(when, ..)| *when == round);
        if let Some((_, device, label, unit)) = arrival {
            areas.attach(device, None).unwrap();
            units.extend(if label == "both" { vec![0, 1] } else { vec![unit] });
            labels.push(label);
        }
        if round == 30 {
            assert!(areas.detach(dev0.id(), None) && areas.detach(both.id(), None) && !areas.detach(both.id(), None));
            (units, labels) = (vec![1], vec!["dev1"]);
            areas.commit().unwrap();
        }
        model.reserved = reserved(&lab, &units);
        seen.translated += check(&lab, &model, &labels, &mut rng, &format!("{what}, attached"));
        warm(&lab, &labels);
        let batch = batch(&mut rng, &model);
        let before = model.clone();
        model.apply(&batch);
        let (watched, wrong) = (watched(&lab, (&before, &model), &labels), Arc::new(Mutex::new(None)));
        seen.watched += watched.len();
        let first_wrong = Arc::clone(&wrong);
        lab.sim.observe(Some(Arc::new(move |call| {
            let mut wrong = first_wrong.lock().unwrap();
            *wrong = wrong.take().or_else(|| watched.iter().find_map(|page| page.look(call)));
        })));
        if fails {
            arm(&lab, &mut rng);
        }
        areas.apply(&batch);
        let first = areas.commit();
        lab.sim.observe(None);
        // Pages are interrupted only where a swap failed twice.
        let interrupted = std::mem::replace(&mut seen.interrupted, areas.figures().interrupted) != seen.interrupted;
        assert!(interrupted || wrong.lock().unwrap().is_none(), "{what}: {wrong:?}");
        if fails {
            let waiting = lab.sim.disarm();
            assert!(first.is_ok() || !waiting, "{what}: {first:?}");
            areas.commit().unwrap();
        } else {
            first.unwrap();
        }
        seen.translated += check(&lab, &model, &labels, &mut rng, &what);
        let figures = areas.figures();
        let in_order = figures.pending == 0 && figures.stale == 0 && (fails || figures.failures == 0 && figures.interrupted == 0);
        assert!(in_order && figures.pieces == model.pieces.len() as u64, "{what}: {figures:?}");
    }
    let figures = areas.figures();
    (seen.swaps, seen.failures, seen.interrupted) = (seen.swaps + figures.swaps, seen.failures + figures.failures, 0);
    assert!(!areas.losses().is_empty());
    let everything: Vec<Change> = model.pieces.values().map(|piece| Change::Unmap(piece.iova)).collect();
    areas.apply(&everything);
    areas.commit().unwrap();
    assert_eq!((areas.figures().areas, areas.figures().pieces), (0, 0), "seed {seed}");
    drop((areas, dev0, dev1, both));
    lab.assert_clean();
}

#[test]
fn random_guests_with_every_limit_of_joining() {
    let mut seen = Seen::default();
    (0..seeds()).for_each(|seed| play(seed, false, &mut seen));
    assert!(seen.translated > 1000 && seen.swaps > seeds() && seen.watched > 1000, "{seen:?}");
}

#[test]
fn random_guests_on_a_kernel_that_fails() {
    let mut seen = Seen::default();
    (0..seeds()).for_each(|seed| play(1000 + seed, true, &mut seen));
    assert!(seen.translated > 1000 && seen.swaps > seeds() && seen.failures > seeds(), "{seen:?}");
}
