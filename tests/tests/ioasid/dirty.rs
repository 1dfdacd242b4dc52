//! Marks and logs of what devices wrote.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use stagecraft::ioasid::{Context, Device, Error, GuestView, Ioasid, Property, Request, Strategy, Target};
use stagecraft::kernel::Errno;
use stagecraft::kernel::sim::UnitConfig;
use stagecraft::plugin::Outcome;
use stagecraft::table::Piece;
use stagecraft::{Access, Attributes, Change, Gpa, Iova, Span};
use stagecraft_tests::reference::generate::Rng;
use vm_memory::{Bytes, GuestAddress};

use crate::guests::{Arch, Guest};
use crate::rig::{DATA, MEMORY, Rig, Stop, page, range, unit};

fn pages(bitmap: &[u64]) -> Vec<u64> {
    (0..bitmap.len() as u64 * 64).filter(|page| bitmap[(page / 64) as usize] >> (page % 64) & 1 != 0).collect()
}

const ALL: Span = Span { first: DATA, last: DATA + 0x3_ffff };

#[test]
fn what_devices_write_is_told_and_told_once() {
    for host in Arch::ALL {
        let rig = Rig::new(&[unit(host)], &[("nic", &[0])]);
        let context = rig.context();
        let device = context.connect("nic").unwrap();
        let managed = context.allocate(Request { dirty_tracking: true, ..Request::managed() }).unwrap();
        let access = Access { read: true, write: true };
        managed.map(Span { first: 0x10_0000, last: 0x10_ffff }, Target::Guest(Gpa(DATA + 0x8000)), access).unwrap();
        managed.attach(&device, None).unwrap();
        assert!(managed.dirty(ALL, true).is_err(), "nobody records");
        managed.track_dirty(true).unwrap();
        assert!(rig.writes("nic", 0x10_3000) && rig.dma("nic", 0x10_5000).is_some());
        assert_eq!(pages(&managed.dirty(ALL, false).unwrap()), [11], "{host:?}: the third page of what begins at the eighth");
        assert_eq!(pages(&managed.dirty(ALL, true).unwrap()), [11]);
        assert_eq!(pages(&managed.dirty(ALL, true).unwrap()), [0; 0]);
        assert!(rig.writes("nic", 0x10_3000));
        managed.unmap(Span { first: 0x10_0000, last: 0x10_ffff }).unwrap();
        assert_eq!(pages(&managed.dirty(ALL, true).unwrap()), (8..24).collect::<Vec<u64>>(), "nobody knows what was written last");
        managed.track_dirty(false).unwrap();

        let guest = Guest::new(if host == Arch::Arm { Arch::Vtd } else { Arch::Arm }, &rig.memory);
        (0..8).for_each(|page| guest.put(page << 12, DATA + (page << 12), true));
        let nested = context.allocate(Request::guest(guest.view()).with_strategies(&[Strategy::Nested])).unwrap();
        nested.replace(&device, None).unwrap();
        match nested.track_dirty(true) {
            Ok(()) => {
                assert_eq!(pages(&nested.dirty(ALL, true).unwrap()), [0; 0], "{host:?}");
                assert!(rig.writes("nic", 0x3000) && rig.dma("nic", 0x5000).is_some());
                assert_eq!(pages(&nested.dirty(ALL, true).unwrap()), [3], "{host:?}");
                assert_eq!(pages(&nested.dirty(ALL, true).unwrap()), [0; 0], "{host:?}");
                assert!(rig.writes("nic", 0x3000));
                assert_eq!(pages(&nested.dirty(ALL, true).unwrap()), [3], "{host:?}: written again");
            }
            // Linux nests no SMMUv3 with hardware marks; and a RISC-V table has them where the settings say so.
            Err(Error::Refused(refusal)) => {
                assert!(matches!(host, Arch::Arm | Arch::Riscv), "{host:?}: {refusal}");
                assert_eq!(refusal.property, Property::DirtyTracking);
            }
            Err(error) => panic!("{host:?}: {error}"),
        }
    }
}

/// A guest's address space with four pages, on hosts of every kind, and what is to be chosen for it.
fn cases() -> Vec<(Arch, UnitConfig, Strategy)> {
    let mut cases = Vec::new();
    for host in Arch::ALL {
        let other = if host == Arch::Arm { Arch::Vtd } else { Arch::Arm };
        // The unit walks no tables like those that this guest of AMD's has.
        if host != Arch::Amd {
            cases.push((host, unit(host), Strategy::Native));
        }
        cases.push((other, unit(host), Strategy::Nested));
        cases.push((other, unit(host).without_nesting(), Strategy::Areas));
    }
    cases
}

fn tracked(request: Request) -> Request {
    request.with_dirty_tracking()
}

#[test]
fn every_strategy_tells_what_was_written() {
    for (arch, host, strategy) in cases() {
        let what = format!("{arch:?} on {:?}: {strategy}", host.kind);
        let rig = Rig::new(&[host], &[("nic", &[0]), ("disk", &[0])]);
        {
            let guest = Guest::new(arch, &rig.memory);
            (0..8).for_each(|page| guest.put(page << 12, DATA + (page << 12), true));
            let context = rig.context();
            let [nic, disk] = ["nic", "disk"].map(|label| context.connect(label).unwrap());
            let ioasid = context.allocate(tracked(Request::guest(guest.view()))).unwrap();
            ioasid.attach(&nic, None).unwrap();
            assert_eq!(ioasid.strategies(), [strategy], "{what}");
            let told = |clear| pages(&ioasid.dirty(ALL, clear).unwrap());
            assert!(matches!(ioasid.dirty(ALL, true), Err(Error::Refused(refusal)) if refusal.property == Property::DirtyTracking), "nobody records");
            assert!(rig.writes("nic", 0x1000));
            ioasid.track_dirty(true).unwrap();
            assert_eq!(told(true), [0; 0], "{what}: what was written before");
            assert!(rig.writes("nic", 0x3000) && rig.dma("nic", 0x5000).is_some());
            assert_eq!((told(false), told(false), told(true), told(true)), (vec![3], vec![3], vec![3], vec![]), "{what}");
            // A device that comes later, and writes again where it was told; one that goes.
            ioasid.attach(&disk, None).unwrap();
            assert!(rig.writes("disk", 0x3000) && rig.writes("nic", 0x6000));
            disk.detach(None).unwrap();
            assert_eq!((told(false), told(true), told(true)), (vec![3, 6], vec![3, 6], vec![]), "{what}");
            // A part of what was written.
            assert!(rig.writes("nic", 0x2000) && rig.writes("nic", 0x4000));
            let part = Span { first: DATA + 0x4000, last: DATA + 0x4fff };
            assert_eq!((pages(&ioasid.dirty(part, true).unwrap()), told(true), told(true)), (vec![0], vec![2], vec![]), "{what}");
            // Guest memory as it is, and back: what was written through the table that went is told.
            assert!(rig.writes("nic", 0x7000));
            ioasid.switch(GuestView { outcome: Outcome::Bypass, id: 0 }).unwrap();
            assert!(rig.writes("nic", DATA + 0x1000), "{what}");
            let gone = told(true);
            assert!(gone.contains(&1) && gone.contains(&7) && (strategy == Strategy::Areas || gone == [1, 7]), "{what}: {gone:?}");
            assert!(rig.writes("nic", DATA + 0x2000), "{what}");
            ioasid.switch(guest.view()).unwrap();
            assert!(rig.writes("nic", 0x4000));
            let gone = told(true);
            assert!(gone.contains(&2) && gone.contains(&4), "{what}: {gone:?}");
            ioasid.track_dirty(false).unwrap();
            assert!(ioasid.dirty(ALL, true).is_err());
        }
        rig.assert_clean();
    }
}

#[test]
fn what_a_guest_asked_for_is_recorded_on_every_host() {
    for host in Arch::ALL {
        for strategy in [Strategy::Nested, Strategy::Areas] {
            let rig = Rig::new(&[unit(host)], &[("nic", &[0])]);
            let context = rig.context();
            let device = context.connect("nic").unwrap();
            let ioasid = context.allocate(tracked(Request::requests().with_strategies(&[strategy]))).unwrap();
            let attributes = Attributes::READ.with(Attributes::WRITE);
            let iova = Span { first: 0x1000, last: 0x4fff };
            ioasid.change(&[Change::Map(Piece { iova, address: DATA, attributes })]).unwrap();
            ioasid.attach(&device, None).unwrap();
            ioasid.track_dirty(true).unwrap();
            assert!(rig.writes("nic", 0x3000));
            assert_eq!(pages(&ioasid.dirty(ALL, true).unwrap()), [2], "{host:?} {strategy}");
            assert!(rig.writes("nic", 0x4000));
            ioasid.change(&[Change::Unmap(iova)]).unwrap();
            assert!(pages(&ioasid.dirty(ALL, true).unwrap()).contains(&3), "{host:?} {strategy}");
        }
    }
}

#[test]
fn of_areas_what_is_cut_is_told_exactly_and_what_goes_as_a_whole() {
    let rig = Rig::new(&[unit(Arch::Vtd).without_nesting()], &[("nic", &[0])]);
    let guest = Guest::new(Arch::Arm, &rig.memory);
    guest.map_large(0x20_0000, DATA, true);
    guest.map(0x1000, DATA + 0x30_0000, true);
    guest.map(0x8000, DATA + 0x30_1000, false);
    let context = rig.context();
    let device = context.connect("nic").unwrap();
    let ioasid = context.allocate(tracked(Request::guest(guest.view()))).unwrap();
    ioasid.attach(&device, None).unwrap();
    ioasid.track_dirty(true).unwrap();
    let all = Span { first: DATA, last: DATA + 0x3f_ffff };
    let told = || pages(&ioasid.dirty(all, true).unwrap());
    assert!(rig.writes("nic", 0x20_5000));
    // Another address space of the kernel's takes the place of the first.
    guest.split(0x20_0000, DATA, true);
    guest.unmap(0x20_5000);
    ioasid.invalidate(&[range(0x20_0000, 0x3f_ffff, false)]).unwrap();
    assert!(!rig.writes("nic", 0x20_5000) && rig.writes("nic", 0x20_7000));
    assert_eq!((told(), told()), (vec![5, 7], vec![]));
    // The kernel does not say what was written to what it unmaps.
    guest.unmap(0x1000);
    guest.unmap(0x8000);
    ioasid.invalidate(&[page(0x1000), page(0x8000)]).unwrap();
    assert_eq!((told(), told()), (vec![0x300], vec![]), "what could only be read was not written");
    // On another IOASID, and back.
    assert!(rig.writes("nic", 0x20_9000));
    let other = context.allocate(tracked(Request::managed())).unwrap();
    other.replace(&device, None).unwrap();
    assert_eq!((told(), told()), (vec![9], vec![]));
    ioasid.replace(&device, None).unwrap();
    assert!(rig.writes("nic", 0x20_a000));
    assert_eq!((told(), told()), (vec![10], vec![]));
    // Where the kernel does not answer, all of it may have been written.
    assert!(rig.writes("nic", 0x20_b000));
    rig.sim.fail_nth(1, Errno::ENOMEM);
    let gone = told();
    assert!(gone.len() == 511 && !gone.contains(&5), "{gone:?}");
}

/// Native tables on one unit stand on one page table, which has one record.
#[test]
fn those_who_share_a_record_do_not_take_it_from_each_other() {
    let rig = Rig::new(&[unit(Arch::Vtd)], &[("nic", &[0]), ("disk", &[0])]);
    {
        let guest = Guest::new(Arch::Vtd, &rig.memory);
        (0..8).for_each(|page| guest.put(page << 12, DATA + (page << 12), true));
        let context = rig.context();
        let [nic, disk] = ["nic", "disk"].map(|label| context.connect(label).unwrap());
        let [one, other] = [&nic, &disk].map(|device| {
            let ioasid = context.allocate(tracked(Request::guest(guest.view()))).unwrap();
            ioasid.attach(device, None).unwrap();
            ioasid
        });
        one.track_dirty(true).unwrap();
        assert!(rig.writes("nic", 0x1000));
        other.track_dirty(true).unwrap();
        assert!(rig.writes("disk", 0x2000));
        let told = |ioasid: &Ioasid| pages(&ioasid.dirty(ALL, true).unwrap());
        assert_eq!((told(&other), told(&one), told(&one)), (vec![2], vec![1, 2], vec![]));
        other.track_dirty(false).unwrap();
        assert!(rig.writes("nic", 0x3000));
        assert_eq!(told(&one), [3]);
    }
    rig.assert_clean();
}

#[test]
fn where_it_cannot_be_had_another_strategy_is_taken_or_none() {
    for host in Arch::ALL {
        let units = [UnitConfig { dirty_tracking_nested: false, ..unit(host) }, UnitConfig { dirty_tracking: false, ..unit(host) }];
        let rig = Rig::new(&units, &[("nic", &[0]), ("disk", &[1])]);
        let guest = Guest::new(host, &rig.memory);
        guest.map(0, DATA, true);
        let context = rig.context();
        let [nic, disk] = ["nic", "disk"].map(|label| context.connect(label).unwrap());
        let ioasid = context.allocate(tracked(Request::guest(guest.view()))).unwrap();
        let said = ioasid.explain_for(&nic, None).unwrap();
        ioasid.attach(&nic, None).unwrap();
        assert_eq!(ioasid.explain(), std::slice::from_ref(&said));
        let native = said.rejected.iter().find(|rejected| rejected.strategy == Strategy::Native).unwrap();
        let reason = "dirty tracking: the kernel records no writes in page tables that such a table stands on";
        assert!(native.reasons[0].starts_with(reason) || host == Arch::Amd, "{host:?}: {said}");
        // Hardware marks host tables of these.
        let marks = matches!(host, Arch::Vtd | Arch::Amd);
        assert_eq!(ioasid.strategies(), [if marks { Strategy::Nested } else { Strategy::Areas }], "{host:?}");
        ioasid.track_dirty(true).unwrap();
        assert!(rig.writes("nic", 0));
        assert_eq!(pages(&ioasid.dirty(ALL, true).unwrap()), [0], "{host:?}");
        let refusal = ioasid.serves(&disk, None).unwrap_err();
        assert_eq!((refusal.property, refusal.reason.as_str()), (Property::DirtyTracking, "what device disk writes cannot be recorded"));
        assert!(ioasid.explain_for(&disk, None).unwrap().to_string().contains("what device disk writes cannot be recorded"));
        // Who did not ask is told when it is too late.
        let plain = context.allocate(Request::guest(guest.view()).with_strategies(&[Strategy::Areas])).unwrap();
        plain.replace(&nic, None).unwrap();
        assert!(matches!(plain.track_dirty(true), Err(Error::Refused(refusal)) if refusal.property == Property::DirtyTracking));
        assert!(plain.dirty(ALL, true).is_err());
    }
}

/// A guest that lives while its memory is copied.
struct Life<'a> {
    context: &'a Context,
    device: &'a Device,
    guests: [Guest; 2],
    ioasids: [Ioasid; 2],
    rng: Rng,
}

impl Life<'_> {
    /// One thing that a guest, or a VMM, does.
    fn step(&mut self) {
        let guest = &self.guests[self.rng.below(2) as usize];
        let (small, target) = (self.rng.below(16) << 12, DATA + (self.rng.below(0x800) << 12));
        let command = match self.rng.below(9) {
            0..3 => {
                guest.map(small, target, self.rng.percent(80));
                page(small)
            }
            3 => {
                guest.unmap(small);
                page(small)
            }
            4 => {
                guest.map_large(0x20_0000, DATA + 0x80_0000, true);
                range(0x20_0000, 0x3f_ffff, false)
            }
            5 => {
                guest.split(0x20_0000, DATA + 0x80_0000, true);
                guest.unmap(0x20_0000 + small);
                range(0x20_0000, 0x3f_ffff, false)
            }
            6 => {
                let which = usize::from(self.ioasids[0] == self.context.ioasid(self.device.attached()[0].1).unwrap());
                self.ioasids[which].replace(self.device, None).unwrap();
                return;
            }
            7 => {
                let bypass = GuestView { outcome: Outcome::Bypass, id: 0 };
                let view = if self.rng.percent(20) { bypass } else { guest.view() };
                self.ioasids[self.rng.below(2) as usize].switch(view).unwrap();
                return;
            }
            _ => {
                let on = self.context.ioasid(self.device.attached()[0].1).unwrap();
                self.device.detach(None).unwrap();
                on.attach(self.device, None).unwrap();
                return;
            }
        };
        self.ioasids.iter().for_each(|ioasid| drop(ioasid.invalidate(&[command]).unwrap()));
    }
}

/// Pages that were told are copied, as a migration does. When the devices stand still and the last ones were copied, the copy is equal.
#[test]
fn a_copy_of_pages_that_were_told_is_equal_in_the_end() {
    const AREA: Span = Span { first: DATA, last: MEMORY - 1 };
    for (seed, (arch, host, strategy)) in (1..).zip(cases()) {
        let what = format!("{arch:?} on {:?}: {strategy}", host.kind);
        let rig = Rig::new(&[host], &[("nic", &[0])]);
        {
            let guests = [0x10_0000, 0x40_0000].map(|root| Guest::at(arch, &rig.memory, root));
            let context = rig.context();
            let device = context.connect("nic").unwrap();
            let ioasids = guests.each_ref().map(|guest| context.allocate(tracked(Request::guest(guest.view()))).unwrap());
            ioasids[0].attach(&device, None).unwrap();
            let dma = rig.sim.device("nic").unwrap();
            let (stop, tried, done) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
            let now = || {
                let mut bytes = vec![0_u8; (AREA.last - AREA.first + 1) as usize];
                rig.memory.read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
                bytes
            };
            context.track_dirty(true).unwrap();
            let mut copy = now();
            let mut catch_up = |clear: bool| {
                for page in pages(&context.dirty(AREA, clear).unwrap()) {
                    let bytes = &mut copy[(page << 12) as usize..][..4096];
                    rig.memory.read_slice(bytes, GuestAddress(DATA + (page << 12))).unwrap();
                }
            };
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let mut rng = Rng::new(seed);
                    while !stop.load(Ordering::Relaxed) {
                        let small = rng.below(16) << 12;
                        let iova = [small, 0x20_0000 + small, DATA + (rng.below(64) << 12)][rng.below(3) as usize];
                        if dma.write(None, Iova(iova + rng.below(512) * 8), &rng.number().to_le_bytes()).is_ok() {
                            done.fetch_add(1, Ordering::Relaxed);
                        }
                        tried.fetch_add(1, Ordering::Relaxed);
                    }
                });
                let _end = Stop(&stop);
                let mut life = Life { context: &context, device: &device, guests, ioasids, rng: Rng::new(seed) };
                for step in 0..100 {
                    life.step();
                    if step % 4 == 0 {
                        catch_up(step % 3 != 0);
                    }
                    // In between something is written, if anything can be.
                    let before = tried.load(Ordering::Relaxed);
                    while tried.load(Ordering::Relaxed) < before + 20 {
                        std::thread::yield_now();
                    }
                }
                // The IOASIDs go, with what they know.
                device.detach(None).unwrap();
            });
            catch_up(true);
            assert!(done.load(Ordering::Relaxed) > 100, "{what}: {done:?}");
            let now = now();
            let lost: Vec<usize> = (0..now.len() / 4096).filter(|page| now[page << 12..][..4096] != copy[page << 12..][..4096]).collect();
            assert!(lost.is_empty(), "{what}: pages {lost:x?} of {} writes", done.load(Ordering::Relaxed));
        }
        rig.assert_clean();
    }
}

/// What somebody does who copies a guest's memory; whatever the kernel refuses once is asked for again.
struct Copier<'a> {
    rig: &'a Rig,
    what: String,
    written: BTreeSet<u64>,
}

impl Copier<'_> {
    /// The second time it is well.
    fn twice<T>(&self, act: impl Fn() -> Result<T, Error>) -> T {
        act().unwrap_or_else(|error| {
            assert!(!self.rig.sim.disarm(), "{}: {error}", self.what);
            act().unwrap_or_else(|error| panic!("{}: again: {error}", self.what))
        })
    }

    fn writes(&mut self, label: &str, iova: u64, page: u64) {
        assert!(self.rig.writes(label, iova), "{}: {iova:#x}", self.what);
        self.written.insert(page);
    }

    /// What was written is told, also after a call that failed.
    fn reads(&mut self, context: &Context, clear: bool) {
        let told = pages(&self.twice(|| context.dirty(ALL, clear)));
        let lost: Vec<u64> = self.written.iter().filter(|page| !told.contains(page)).copied().collect();
        assert!(lost.is_empty(), "{}: {lost:?} were written, and {told:?} told", self.what);
        if clear {
            self.written.clear();
        }
    }

    fn copies(&mut self, guest: &Guest) {
        let rig = self.rig;
        (0..8).for_each(|page| guest.put(page << 12, DATA + (page << 12), true));
        let context = self.twice(|| Context::with(rig.setup()));
        let [nic, disk] = ["nic", "disk"].map(|label| self.twice(|| context.connect(label)));
        let [ioasid, other] = [&nic, &disk].map(|device| {
            let ioasid = self.twice(|| context.allocate(tracked(Request::guest(guest.view()))));
            self.twice(|| ioasid.attach(device, None));
            ioasid
        });
        self.twice(|| context.track_dirty(true).inspect_err(|_| assert!(context.dirty(ALL, true).is_err(), "nobody records")));
        self.reads(&context, false);
        self.writes("nic", 0x1000, 1);
        self.writes("disk", 0x6000, 6);
        self.reads(&context, true);
        self.writes("nic", 0x1000, 1);
        self.writes("disk", 0x2000, 2);
        self.reads(&context, false);
        self.twice(|| ioasid.switch(GuestView { outcome: Outcome::Bypass, id: 0 }));
        self.writes("nic", DATA + 0x3000, 3);
        self.reads(&context, true);
        self.writes("nic", DATA + 0x4000, 4);
        self.twice(|| ioasid.switch(guest.view()));
        self.writes("nic", 0x5000, 5);
        self.writes("disk", 0x7000, 7);
        self.twice(|| nic.detach(None));
        drop(ioasid);
        self.reads(&context, true);
        self.twice(|| context.track_dirty(false));
        assert!(context.dirty(ALL, true).is_err(), "{}: nobody records", self.what);
        self.twice(|| disk.detach(None));
        drop(other);
    }
}

#[test]
fn whatever_fails_of_a_copy_nothing_is_lost() {
    for (arch, host, strategy) in cases() {
        let rig = Rig::new(std::slice::from_ref(&host), &[("nic", &[0]), ("disk", &[0])]);
        for steps in [false, true] {
            for n in 1.. {
                let what = format!("{arch:?} on {:?}: {strategy}, {} {n}", host.kind, if steps { "step" } else { "call" });
                match steps {
                    false => rig.sim.fail_nth(n, Errno::ENOMEM),
                    true => rig.sim.fail_step_nth(n, Errno::ENOMEM),
                }
                Copier { rig: &rig, what, written: BTreeSet::new() }.copies(&Guest::new(arch, &rig.memory));
                let is_over = rig.sim.disarm();
                rig.assert_clean();
                if is_over {
                    assert!(n > 8, "{arch:?} on {:?}: {n}", host.kind);
                    break;
                }
            }
        }
    }
}

#[test]
fn marks_of_the_hosts_hardware_get_into_the_guests_entries() {
    let rig = Rig::new(&[unit(Arch::Vtd)], &[("nic", &[0])]);
    let guest = Guest::new(Arch::Arm, &rig.memory);
    // Writable when dirty: DBM (51) and AP[2] (7).
    let clean = guest.map(0x1000, DATA, false);
    guest.set(clean, guest.entry(clean) | 1 << 51);
    let mut view = guest.view();
    if let Outcome::Tables(translated) = &mut view.outcome {
        translated.tables[0].settings.set("hardware-access", 1);
        translated.tables[0].settings.set("hardware-dirty", 1);
    }
    let context = rig.context();
    let device = context.connect("nic").unwrap();
    let ioasid = context.allocate(Request::guest(view).with_strategies(&[Strategy::Nested])).unwrap();
    ioasid.attach(&device, None).unwrap();
    assert_eq!(ioasid.write_marks(Span::ALL).dirty, 0);
    assert_eq!(guest.entry(clean) & 1 << 7, 1 << 7, "clean");
    assert!(rig.writes("nic", 0x1000));
    assert_eq!(ioasid.write_marks(Span::ALL).dirty, 1);
    assert_eq!(guest.entry(clean) & 1 << 7, 0, "dirty");
}
