//! Many threads at once: nobody waits for ever, and what the guest says is what devices get.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::ThreadId;
use std::time::Duration;

use stagecraft::ioasid::{Context, Ioasid, Request, Setup, Strategy, Target};
use stagecraft::kernel::sim::UnitConfig;
use stagecraft::kernel::{Before, Kernel};
use stagecraft::{Access, Gpa, Iova, Span};

use crate::guests::{Arch, Guest};
use crate::rig::{DATA, Rig, Stop, page};

#[test]
fn calls_from_many_threads_end_and_are_right() {
    const ROUNDS: u64 = 150;
    let labels = ["a", "b", "c", "d"];
    let devices: Vec<(&str, &[usize])> = labels.iter().zip([&[0_usize][..], &[0], &[1], &[1]]).map(|(label, path)| (*label, path)).collect();
    let rig = Rig::new(&[UnitConfig::vtd("one"), UnitConfig::smmuv3("other")], &devices);
    {
        let context = rig.context();
        let devices: Vec<_> = labels.iter().map(|label| context.connect(label).unwrap()).collect();
        let guests: Vec<Guest> = (0..4).map(|index| Guest::at(Arch::Riscv, &rig.memory, 0x10_0000 + index * 0x10_0000)).collect();
        let strategies = [Strategy::Nested, Strategy::Areas, Strategy::Nested, Strategy::Areas];
        let own: Vec<Ioasid> = guests
            .iter()
            .zip(strategies)
            .map(|(guest, strategy)| {
                guest.map(DATA, DATA, true);
                context.allocate(Request::guest(guest.view()).with_strategies(&[strategy, Strategy::Software])).unwrap()
            })
            .collect();
        let managed = context.allocate(Request::managed()).unwrap();
        let access = Access { read: true, write: true };
        managed.map(Span { first: DATA, last: DATA | 0xfff }, Target::Guest(Gpa(DATA)), access).unwrap();
        own.iter().zip(&devices).for_each(|(ioasid, device)| drop(ioasid.attach(device, None).unwrap()));
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let _end = Stop(&stop);
            let workers: Vec<_> = (0..4)
                .map(|index| {
                    let (own, managed, device, guest, rig) = (&own[index], &managed, &devices[index], &guests[index], &rig);
                    scope.spawn(move || {
                        for round in 0..ROUNDS {
                            let iova = 0x1000 + (round % 16) * 0x1000;
                            guest.map(iova, DATA + 0x1000, true);
                            own.invalidate(&[page(iova)]).unwrap();
                            assert_eq!(rig.dma(labels[index], iova), Some(DATA + 0x1000));
                            guest.unmap(iova);
                            own.invalidate(&[page(iova)]).unwrap();
                            assert_eq!(rig.dma(labels[index], iova), None);
                            managed.replace(device, None).unwrap();
                            assert_eq!(rig.dma(labels[index], DATA), Some(DATA));
                            own.replace(device, None).unwrap();
                            if round % 8 == 0 {
                                device.detach(None).unwrap();
                                assert_eq!(rig.dma(labels[index], DATA), None);
                                own.attach(device, None).unwrap();
                            }
                            assert_eq!(rig.dma(labels[index], DATA), Some(DATA));
                        }
                    })
                })
                .collect();
            // Somebody who looks after all of it meanwhile.
            let (context, own, managed, stop) = (&context, &own, &managed, &stop);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    context.memory_changed(context.memory()).unwrap();
                    let place = Span { first: 0x7000_0000, last: 0x7000_0fff };
                    managed.map(place, Target::Guest(Gpa(DATA)), access).unwrap();
                    managed.unmap(place).unwrap();
                    own.iter().for_each(|ioasid| {
                        ioasid.synchronise().unwrap();
                        assert!(ioasid.stats().attached <= 1);
                    });
                    assert_eq!(context.save().ioasids(), 5);
                }
            });
            workers.into_iter().for_each(|worker| worker.join().unwrap());
        });
    }
    rig.assert_clean();
}

/// A kernel in which two threads meet: a call of one of them waits for one of the other.
#[derive(Debug)]
struct Meeting {
    kernel: Arc<dyn Kernel>,
    /// Who has come; none: nobody waits.
    come: Mutex<Option<HashSet<ThreadId>>>,
    all: Condvar,
}

impl Before for Meeting {
    fn behind(&self) -> &dyn Kernel {
        &*self.kernel
    }

    fn passes(&self) {
        let mut come = self.come.lock().unwrap();
        let Some(threads) = &mut *come else { return };
        threads.insert(std::thread::current().id());
        self.all.notify_all();
        // One that never comes is missed, and the test fails.
        drop(self.all.wait_timeout_while(come, Duration::from_secs(30), |come| come.as_ref().is_some_and(|threads| threads.len() < 2)).unwrap());
    }
}

type Act = fn(&Ioasid, u64);

const ACTS: [(&str, Act); 5] = [
    ("invalidate", |ioasid, _| drop(ioasid.invalidate(&[page(0x1000)]).unwrap())),
    ("table_written", |ioasid, slot| drop(ioasid.table_written(Gpa(slot), 8).unwrap())),
    ("synchronise", |ioasid, _| drop(ioasid.synchronise().unwrap())),
    ("fault", |ioasid, _| drop(ioasid.fault(Iova(0x1000), Access { read: true, write: false }).unwrap())),
    ("a command of many", |ioasid, _| drop(ioasid.invalidate(&[page(0x1000), page(0x2000), page(0x4000)]).unwrap())),
];

/// While one address space is in the middle of a call of the kernel, another one gets as far: they have no lock in common.
#[test]
fn address_spaces_do_not_wait_for_each_other() {
    for (strategy, (what, act)) in [Strategy::Nested, Strategy::Areas].into_iter().flat_map(|strategy| ACTS.map(|act| (strategy, act))) {
        let rig = Rig::new(&[UnitConfig::vtd("one")], &[("a", &[0]), ("b", &[0])]);
        {
            let meeting = Arc::new(Meeting { kernel: rig.kernel(), come: Mutex::new(None), all: Condvar::new() });
            let context = Context::with(Setup { kernel: Arc::clone(&meeting) as Arc<dyn Kernel>, ..rig.setup() }).unwrap();
            let guests = [0, 1].map(|index| Guest::at(Arch::Arm, &rig.memory, 0x10_0000 + index * 0x10_0000));
            let both = ["a", "b"].map(|label| context.connect(label).unwrap()).into_iter().zip(&guests).map(|(device, guest)| {
                let slot = guest.map(0x1000, DATA, true);
                guest.map(0x3000, DATA, true);
                let ioasid = context.allocate(Request::guest(guest.view()).with_strategies(&[strategy])).unwrap();
                ioasid.attach(&device, None).unwrap();
                guest.unmap(0x1000);
                (device, ioasid, slot)
            });
            let both: Vec<_> = both.collect();
            *meeting.come.lock().unwrap() = Some(HashSet::new());
            std::thread::scope(|scope| {
                let (one, other) = (&both[0], &both[1]);
                scope.spawn(|| ACTS[0].1(&one.1, one.2));
                scope.spawn(|| act(&other.1, other.2));
            });
            let come = meeting.come.lock().unwrap().take().unwrap();
            assert_eq!(come.len(), 2, "{strategy}: {what} waited for an invalidation of another address space");
            assert_eq!((rig.dma("a", 0x1000), rig.dma("b", 0x1000)), (None, None));
            assert_eq!((rig.dma("a", 0x3000), rig.dma("b", 0x3000)), (Some(DATA), Some(DATA)));
        }
        rig.assert_clean();
    }
}
