//! Every kernel call of a sequence fails once, and every step inside of calls, with errors that the calls may give and some that they may not: nothing is
//! leaked, nothing is mapped that should not be, and the next commit has everything in step.

use stagecraft::kernel::Errno;
use stagecraft::kernel::sim::DmaAccess;
use stagecraft::pins::PinError;
use stagecraft::sync::{AreaLimits, Areas, Sink};
use stagecraft::{Change, Gpa, Iova, Span};

use super::support::{BASE, BLOCK, Lab, Model, PAGE, READ, ROM, RW, map, piece, unmap};

const LABELS: [&str; 2] = ["dev0", "dev1"];

/// Where the sequence maps something, and around.
fn pages() -> impl Iterator<Item = u64> {
    (0..80).chain(995..1015).map(|page| page * PAGE)
}

/// What both know: after a batch nothing that was taken away is reachable once a commit has succeeded, and nothing else is mapped than what was told.
struct Both<'a> {
    lab: &'a Lab,
    areas: Areas,
    model: Model,
    /// Commits that failed.
    failed: u32,
}

impl Both<'_> {
    fn change(&mut self, batch: &[Change]) {
        self.model.apply(batch);
        self.areas.apply(batch);
        self.commit();
    }

    fn commit(&mut self) {
        while let Err(error) = self.areas.commit() {
            self.failed += 1;
            assert!(self.failed < 5, "{error}");
        }
        self.not_more();
    }

    /// What DMA reaches, the model has. The reverse is only so when nothing failed since.
    fn not_more(&self) {
        for label in LABELS {
            let device = self.lab.dma(label);
            for page in pages() {
                for access in [DmaAccess::Read, DmaAccess::Write] {
                    if let Ok(found) = device.translate(None, Iova(page), access) {
                        assert_eq!(Some(found.user_address), self.model.expected(self.lab, page, access), "{label} {access:?} at {page:#x}");
                    }
                }
            }
        }
    }
}

/// Devices come, large pages are split and merged, neighbours go, memory comes and goes, a device goes and comes back.
fn sequence<'a>(lab: &'a Lab, join: u64) -> Both<'a> {
    // What is refused outright is tried again by whoever asked.
    fn again<T, E: std::fmt::Debug>(mut attempt: impl FnMut() -> Result<T, E>) -> T {
        attempt().or_else(|_| attempt()).unwrap()
    }
    again(|| lab.pins.add(&lab.ram()));
    let devices = LABELS.map(|label| again(|| stagecraft::kernel::handle::Device::bind(&lab.kernel, label)));
    let areas = again(|| Areas::new(&lab.pins, AreaLimits { join, ..AreaLimits::default() }));
    let mut both = Both { lab, areas, model: Model::default(), failed: 0 };
    both.change(&[map(piece(0, 64 * PAGE, BASE, RW)), map(piece(64 * PAGE, PAGE, BASE + 7 * PAGE, READ))]);
    for device in &devices {
        again(|| both.areas.attach(device, None));
        both.not_more();
    }
    // Split with a change; two neighbours in a row.
    let small = |index: u64| map(piece(index * PAGE, PAGE, BASE + index * PAGE, RW));
    let split: Vec<Change> = (0..64).filter(|index| *index != 9).map(small).collect();
    both.change(&[vec![unmap(0, 64 * PAGE)], split].concat());
    both.change(&[unmap(20 * PAGE, PAGE), unmap(22 * PAGE, PAGE), map(piece(22 * PAGE, PAGE, BASE + PAGE, READ))]);
    both.change(&(1000..1008).map(|index| map(piece(index * PAGE, PAGE, BASE + BLOCK + index * PAGE, RW))).collect::<Vec<_>>());
    both.change(&[unmap(1003 * PAGE, PAGE), map(piece(1003 * PAGE, PAGE, BASE, READ))]);
    // Memory goes while it is mapped, and comes back.
    let second = Span { first: BASE + BLOCK, last: BASE + 2 * BLOCK - 1 };
    lab.pins.withdraw(second).unwrap();
    both.model.withdrawn.push(second);
    both.commit();
    again(|| lab.pins.remove(second));
    let region = stagecraft::pins::Region {
        gpa: Gpa(second.first),
        length: BLOCK,
        backing: stagecraft::pins::Backing::User(lab.at(second.first)),
        writable: true,
        block: None,
    };
    again(|| lab.pins.add(&region));
    both.model.withdrawn.clear();
    both.commit();
    both.areas.detach(devices[0].id(), None);
    both.change(&[unmap(64 * PAGE, PAGE)]);
    again(|| both.areas.attach(&devices[0], None));
    both.change(&[map(piece(64 * PAGE, 2 * PAGE, BASE, READ)), map(piece(70 * PAGE, PAGE, ROM, READ))]);
    both
}

/// The kernel did not remove an area, and before that is tried again another one is cut by a swap: what was to go does not go along.
#[test]
fn what_could_not_be_unmapped_does_not_go_along_in_a_swap() {
    let lab = Lab::filled();
    {
        let device = lab.bind("dev0");
        let mut areas = lab.areas(0);
        areas.apply(&[map(piece(0, PAGE, BASE, RW)), map(piece(16 * PAGE, 4 * PAGE, BASE + 16 * PAGE, RW))]);
        areas.commit().unwrap();
        areas.attach(&device, None).unwrap();
        lab.sim.fail_nth(1, Errno::EBUSY);
        areas.apply(&[unmap(0, PAGE)]);
        assert!(!lab.sim.disarm());
        assert_eq!(areas.figures().stale, 1);
        let small = |index: u64| map(piece(index * PAGE, PAGE, BASE + index * PAGE, RW));
        areas.apply(&[unmap(16 * PAGE, 4 * PAGE), small(16), small(18), small(19)]);
        assert_eq!(areas.figures().swaps, 1);
        areas.commit().unwrap();
        let reached = |page: u64| lab.dma("dev0").translate(None, Iova(page * PAGE), DmaAccess::Read).is_ok();
        assert_eq!([0, 16, 17, 18, 19].map(reached), [false, true, false, true, true]);
    }
    lab.assert_clean();
}

#[test]
fn every_call_and_every_step_fails_once() {
    let mut report = Vec::new();
    for (steps, errno, join) in [
        (false, Errno::ENOMEM, 0),
        (false, Errno::EINTR, 8 * PAGE),
        (false, Errno::EEXIST, 0),
        (false, Errno::ENOENT, 8 * PAGE),
        (false, Errno::EADDRINUSE, 0),
        (false, Errno::EINVAL, 0),
        (true, Errno::ENOMEM, 0),
        (true, Errno::ENOMEM, 8 * PAGE),
    ] {
        let mut failed = 0;
        for n in 1.. {
            let lab = Lab::new();
            if steps {
                lab.sim.fail_step_nth(n, errno);
            } else {
                lab.sim.fail_nth(n, errno);
            }
            let mut both = sequence(&lab, join);
            let waiting = lab.sim.disarm();
            // Whatever failed last is made good by the next commit.
            both.commit();
            both.model.no_rom = true;
            both.model.pieces.remove(&(70 * PAGE));
            both.model.check(&lab, &LABELS, pages(), &format!("call {n}, {errno}, steps: {steps}"));
            let figures = both.areas.figures();
            assert_eq!((figures.pending, figures.stale), (0, 0), "call {n}, {errno}, steps: {steps}: {figures:?}");
            failed += both.failed;
            drop(both);
            lab.assert_clean();
            if waiting {
                report.push((n - 1, failed, figures.swaps));
                break;
            }
        }
    }
    for (calls, failed, swaps) in &report {
        // One failure is always made good within the same commit.
        assert!(*calls > 30 && *failed <= 2 * u32::try_from(*calls).unwrap() && *swaps > 0, "{report:?}");
    }
}

/// The kernel refuses to unmap, for as long as it likes: the commit says so, and the area is known until it is gone.
#[test]
fn what_is_not_removed_is_not_forgotten() {
    let lab = Lab::filled();
    let (mut areas, mut model, device) = (lab.areas(0), Model::default(), lab.bind("dev0"));
    areas.attach(&device, None).unwrap();
    let both = [map(piece(0, PAGE, BASE, RW)), map(piece(PAGE, PAGE, BASE + 5 * PAGE, RW))];
    areas.apply(&both);
    areas.commit().unwrap();
    model.apply(&both);
    lab.sim.fail_nth(1, Errno::EINTR);
    let batch = [unmap(0, PAGE), map(piece(0, PAGE, BASE + PAGE, RW))];
    areas.apply(&batch);
    assert_eq!((areas.figures().stale, areas.figures().pending), (1, 1));
    for _ in 0..3 {
        lab.sim.fail_nth(1, Errno::EINTR);
        assert!(areas.commit().unwrap_err().to_string().contains("0x0..=0xfff"));
        assert_eq!(lab.dma("dev0").translate(None, Iova(0), DmaAccess::Read).unwrap().user_address, lab.user);
    }
    let memory = Span { first: BASE, last: BASE + BLOCK - 1 };
    assert_eq!(lab.pins.remove(memory), Err(PinError::InUse { block: memory, copies: 2 }), "it can still be reached");
    areas.commit().unwrap();
    model.apply(&batch);
    model.check(&lab, &["dev0"], (0..3).map(|page| page * PAGE), "in the end");
    // A guest that wants back what could not be removed has it.
    lab.sim.fail_nth(1, Errno::EINTR);
    areas.apply(&[unmap(0, PAGE)]);
    areas.apply(&[map(piece(0, PAGE, BASE + PAGE, RW))]);
    let calls = lab.sim.calls_total();
    areas.commit().unwrap();
    assert_eq!((areas.figures().stale, areas.figures().pending, lab.sim.calls_total()), (0, 0, calls));
    model.check(&lab, &["dev0"], (0..3).map(|page| page * PAGE), "wanted again");
    drop((areas, device));
    lab.assert_clean();
}

/// A device that comes while something is still to be removed does not find it, however it comes.
#[test]
fn a_newcomer_does_not_reach_what_was_not_removed() {
    for adopts in [false, true] {
        let lab = Lab::filled();
        let (mut areas, mut other) = (lab.areas(0), lab.areas(0));
        let devices = LABELS.map(|label| lab.bind(label));
        areas.attach(&devices[0], None).unwrap();
        areas.apply(&[map(piece(0, PAGE, BASE, RW)), map(piece(PAGE, PAGE, BASE + 5 * PAGE, RW))]);
        areas.commit().unwrap();
        other.attach(&devices[1], None).unwrap();
        let usable = lab.kernel.ioas_iova_ranges(other.ioas().id()).unwrap();
        let released = other.release(devices[1].id(), None).unwrap();
        let released = Some(released).filter(|_| adopts);
        lab.sim.fail_nth(1, Errno::EINTR);
        areas.apply(&[unmap(0, PAGE)]);
        assert_eq!(areas.figures().stale, 1);
        lab.sim.fail_nth(1, Errno::EINTR);
        let mut come = |released| match released {
            Some(released) => areas.adopt(released, None, &usable).map_err(|(released, errno)| (Some(released), errno)),
            None => areas.attach(&devices[1], None).map_err(|errno| (None, errno)),
        };
        let (released, errno) = come(released).unwrap_err();
        assert_eq!(errno, Errno::EINTR);
        come(released).map_err(|(_, errno)| errno).unwrap();
        for label in LABELS {
            let at = |page: u64| lab.dma(label).translate(None, Iova(page * PAGE), DmaAccess::Read).ok().map(|found| found.user_address);
            assert_eq!((at(0), at(1)), (None, Some(lab.user + 5 * PAGE)), "{label}");
        }
        areas.commit().unwrap();
        drop((areas, other, devices));
        lab.assert_clean();
    }
}

/// No second IOAS is to be had: what was taken away goes all the same, and what stays comes back.
#[test]
fn without_a_second_ioas_pages_are_gone_for_a_moment() {
    let lab = Lab::filled();
    let (mut areas, mut model, device) = (lab.areas(0), Model::default(), lab.bind("dev0"));
    areas.attach(&device, None).unwrap();
    let batch = [map(piece(0, 4 * PAGE, BASE, RW))];
    areas.apply(&batch);
    areas.commit().unwrap();
    model.apply(&batch);
    let small = |index: u64| map(piece(index * PAGE, PAGE, BASE + index * PAGE, RW));
    let batch = [unmap(0, 4 * PAGE), small(0), small(1), small(3)];
    lab.sim.fail_nth(1, Errno::ENOMEM);
    areas.apply(&batch);
    assert_eq!((areas.figures().stale, areas.figures().swaps), (1, 0));
    lab.sim.fail_nth(1, Errno::ENOMEM);
    areas.commit().unwrap();
    model.apply(&batch);
    assert_eq!((areas.figures().interrupted, areas.figures().swaps, areas.figures().stale), (1, 0, 0));
    model.check(&lab, &["dev0"], (0..5).map(|page| page * PAGE), "interrupted");
    drop((areas, device));
    lab.assert_clean();
}

/// A swap that would take more copies than it may is none.
#[test]
fn swaps_are_bounded() {
    let lab = Lab::filled();
    let device = lab.bind("dev0");
    for (swap, swaps) in [(9, 0), (10, 1)] {
        let (mut areas, mut model) = (Areas::new(&lab.pins, AreaLimits { swap, ..AreaLimits::default() }).unwrap(), Model::default());
        areas.attach(&device, None).unwrap();
        let apart = (0..10).map(|index| map(piece((10 + 2 * index) * PAGE, PAGE, BASE, RW)));
        let first: Vec<Change> = std::iter::once(map(piece(0, 4 * PAGE, BASE, RW))).chain(apart).collect();
        let then = [unmap(0, 4 * PAGE), map(piece(PAGE, PAGE, BASE + PAGE, RW))];
        for batch in [&first[..], &then[..]] {
            areas.apply(batch);
            areas.commit().unwrap();
            model.apply(batch);
        }
        assert_eq!((areas.figures().swaps, areas.figures().interrupted), (swaps, 1 - swaps));
        model.check(&lab, &["dev0"], (0..40).map(|page| page * PAGE), "cut");
    }
    drop(device);
    lab.assert_clean();
}

/// The second of two devices cannot be moved: it is moved by the next commit, and until then the commit fails.
#[test]
fn a_device_that_stays_behind_is_brought_along() {
    let lab = Lab::filled();
    for go in [false, true] {
        let (mut areas, mut model) = (lab.areas(0), Model::default());
        let devices = LABELS.map(|label| lab.bind(label));
        devices.iter().for_each(|device| areas.attach(device, None).unwrap());
        let batch = [map(piece(0, 4 * PAGE, BASE, RW))];
        areas.apply(&batch);
        model.apply(&batch);
        areas.commit().unwrap();
        let batch = [unmap(0, 4 * PAGE), map(piece(0, 2 * PAGE, BASE, RW))];
        model.apply(&batch);
        // Alloc, one copy, two attachments.
        lab.sim.fail_nth(4, Errno::ENOMEM);
        areas.apply(&batch);
        model.check(&lab, &["dev0"], (0..5).map(|page| page * PAGE), "the first");
        lab.sim.fail_nth(1, Errno::ENOMEM);
        assert!(areas.commit().unwrap_err().to_string().contains("could not be moved"));
        if go {
            // One that sees what was taken away is not handed out.
            assert!(areas.release(devices[1].id(), None).is_none());
            assert!(lab.dma("dev1").translate(None, Iova(0), DmaAccess::Read).is_err());
            areas.commit().unwrap();
        } else {
            areas.commit().unwrap();
            model.check(&lab, &LABELS, (0..5).map(|page| page * PAGE), "both");
        }
        drop((areas, devices));
        assert_eq!(lab.pins.figures().copies, 0);
    }
    lab.assert_clean();
}
