//! Many threads at once: nobody waits for ever, and what the guest says is what devices get.

use std::sync::atomic::{AtomicBool, Ordering};

use stagecraft::ioasid::{Ioasid, Request, Strategy, Target};
use stagecraft::kernel::sim::UnitConfig;
use stagecraft::{Access, Gpa, Span};

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
