//! Many threads at once: nobody waits for ever, and what the guest says is what devices get.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::ThreadId;
use std::time::Duration;

use stagecraft::ioasid::{Context, Device, GuestMemory, Ioasid, Request, Setup, Shared, Strategy, Target};
use stagecraft::kernel::sim::UnitConfig;
use stagecraft::kernel::{Before, Kernel};
use stagecraft::memory::{EntryLayout, EntryMemory, MarkMemory, ReadError, WriteError};
use stagecraft::table::Piece;
use stagecraft::{Access, Attributes, Change, Gpa, Iova, Span};
use vm_memory::GuestMemoryMmap;

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

/// What one of two VMMs in one process has.
struct Side<'a> {
    guest: &'a Guest,
    /// An entry of its table.
    slot: u64,
    ioasid: Ioasid,
    managed: Ioasid,
    requests: Ioasid,
    /// A device that is attached nowhere.
    spare: Device,
    _attached: [Device; 3],
}

/// Where something stands in all of them and stays.
const KEPT: u64 = 0x3000;

impl<'a> Side<'a> {
    const LABELS: [&'static str; 8] = ["a", "am", "ar", "as", "b", "bm", "br", "bs"];

    fn rig() -> Rig {
        let devices = Self::LABELS.map(|label| (label, &[0][..]));
        Rig::new(&[UnitConfig::vtd("one")], &devices)
    }

    /// The guest has taken a page away, and has not said so.
    fn new(context: &Context, guest: &'a Guest, strategy: Strategy, labels: &[&str]) -> Self {
        let [device, of_managed, of_requests, spare] = [0, 1, 2, 3].map(|index| context.connect(labels[index]).unwrap());
        let slot = guest.map(0x1000, DATA, true);
        guest.map(KEPT, DATA, true);
        let ioasid = context.allocate(Request::guest(guest.view()).with_strategies(&[strategy, Strategy::Software])).unwrap();
        let managed = context.allocate(Request::managed()).unwrap();
        let requests = context.allocate(Request::requests().with_strategies(&[strategy, Strategy::Software])).unwrap();
        for iova in [0x1000, KEPT] {
            managed.map(span(iova), Target::Guest(Gpa(DATA)), Access { read: true, write: true }).unwrap();
            requests.change(&[asked(iova)]).unwrap();
        }
        ioasid.attach(&device, None).unwrap();
        managed.attach(&of_managed, None).unwrap();
        requests.attach(&of_requests, None).unwrap();
        guest.unmap(0x1000);
        Self { guest, slot, ioasid, managed, requests, spare, _attached: [device, of_managed, of_requests] }
    }
}

const fn span(iova: u64) -> Span {
    Span { first: iova, last: iova | 0xfff }
}

fn asked(iova: u64) -> Change {
    Change::Map(Piece { iova: span(iova), address: DATA, attributes: Attributes::READ.with(Attributes::WRITE) })
}

type Act = fn(&Side<'_>);

/// Calls that call the kernel. The first five read the guest's tables as well.
const ACTS: [(&str, Act); 9] = [
    ("invalidate", |side| drop(side.ioasid.invalidate(&[page(0x1000)]).unwrap())),
    ("table_written", |side| drop(side.ioasid.table_written(Gpa(side.slot), 8).unwrap())),
    ("synchronise", |side| drop(side.ioasid.synchronise().unwrap())),
    ("fault", |side| drop(side.ioasid.fault(Iova(0x1000), Access { read: true, write: false }).unwrap())),
    ("a command of many", |side| drop(side.ioasid.invalidate(&[page(0x1000), page(0x2000), page(0x4000)]).unwrap())),
    ("map", |side| side.managed.map(span(0x5000), Target::Guest(Gpa(DATA)), Access { read: true, write: true }).unwrap()),
    ("unmap", |side| assert_eq!(side.managed.unmap(span(0x1000)).unwrap(), 1)),
    ("change", |side| side.requests.change(&[Change::Unmap(span(0x1000)), asked(0x5000)]).unwrap()),
    ("attach", |side| drop(side.ioasid.attach(&side.spare, None).unwrap())),
];

const BOTH: [Strategy; 2] = [Strategy::Nested, Strategy::Areas];

/// While one address space is in the middle of a call of the kernel, another one gets as far: they have no lock in common.
#[test]
fn address_spaces_do_not_wait_for_each_other() {
    let pairs = ACTS.map(|act| (ACTS[0], act)).into_iter().chain(ACTS.map(|act| (act, act)));
    for (strategy, (of_one, of_other)) in BOTH.into_iter().flat_map(|strategy| pairs.clone().map(move |pair| (strategy, pair))) {
        let rig = Side::rig();
        {
            let meeting = Arc::new(Meeting { kernel: rig.kernel(), come: Mutex::new(None), all: Condvar::new() });
            let context = Context::with(Setup { kernel: Arc::clone(&meeting) as Arc<dyn Kernel>, ..rig.setup() }).unwrap();
            let guests = [0, 1].map(|index| Guest::at(Arch::Arm, &rig.memory, 0x10_0000 + index * 0x10_0000));
            let [one, other] = [0, 1].map(|side| Side::new(&context, &guests[side], strategy, &Side::LABELS[side * 4..][..4]));
            *meeting.come.lock().unwrap() = Some(HashSet::new());
            std::thread::scope(|scope| {
                scope.spawn(|| of_one.1(&one));
                scope.spawn(|| of_other.1(&other));
            });
            let come = meeting.come.lock().unwrap().take().unwrap();
            assert_eq!(come.len(), 2, "{strategy}: {} waited for {} of another address space", of_other.0, of_one.0);
            [&one, &other].into_iter().for_each(ACTS[0].1);
            assert_eq!((rig.dma("a", 0x1000), rig.dma("b", 0x1000)), (None, None));
            assert_eq!((rig.dma("a", KEPT), rig.dma("b", KEPT)), (Some(DATA), Some(DATA)));
        }
        rig.assert_clean();
    }
}

/// A place where a thread is held up.
#[derive(Debug, Default)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum GateState {
    #[default]
    Open,
    /// Whoever comes next is held up.
    Shut,
    Holds,
}

impl Gate {
    fn set(&self, state: GateState) {
        *self.state.lock().unwrap() = state;
        self.changed.notify_all();
    }

    fn is(&self, state: GateState) -> bool {
        *self.state.lock().unwrap() == state
    }

    /// Waits while it is so; for ever nobody does.
    fn wait_while(&self, state: GateState) {
        drop(self.changed.wait_timeout_while(self.state.lock().unwrap(), Duration::from_secs(20), |now| *now == state).unwrap());
    }

    fn pass(&self) {
        if self.is(GateState::Shut) {
            self.set(GateState::Holds);
            self.wait_while(GateState::Holds);
            self.set(GateState::Open);
        }
    }
}

/// A kernel with a gate.
#[derive(Debug)]
struct Gated(Arc<dyn Kernel>, Arc<Gate>);

impl Before for Gated {
    fn behind(&self) -> &dyn Kernel {
        &*self.0
    }

    fn passes(&self) {
        self.1.pass();
    }
}

/// Guest memory with a gate before its tables.
struct GatedMemory(Shared<GuestMemoryMmap>, Arc<Gate>);

impl EntryMemory for GatedMemory {
    fn read_entries(&self, address: Gpa, layout: EntryLayout, entries: &mut [u64]) -> Result<(), ReadError> {
        self.1.pass();
        self.0.read_entries(address, layout, entries)
    }
}

impl MarkMemory for GatedMemory {
    fn compare_exchange_entry(&self, address: Gpa, layout: EntryLayout, old: u64, new: u64) -> Result<bool, WriteError> {
        self.0.compare_exchange_entry(address, layout, old, new)
    }
}

/// While a call of an address space stands still, in the kernel or in the guest's tables, lookups in that one and in all others go on.
#[test]
fn lookups_wait_for_nobody() {
    let held = ACTS.map(|act| (false, act)).into_iter().chain(ACTS[..5].iter().map(|act| (true, *act)));
    for (strategy, (in_tables, (what, act))) in BOTH.into_iter().flat_map(|strategy| held.clone().map(move |held| (strategy, held))) {
        let what = format!("{strategy}: {what}, held up in {}", if in_tables { "tables" } else { "the kernel" });
        let rig = Side::rig();
        {
            let gates = [(); 2].map(|()| Arc::new(Gate::default()));
            let kernel = Arc::new(Gated(rig.kernel(), Arc::clone(&gates[0])));
            let plain = rig.setup();
            let regions = plain.memory.regions().to_vec();
            let memory = GuestMemory::new(Arc::new(GatedMemory(Shared((*rig.memory).clone()), Arc::clone(&gates[1]))), regions).unwrap();
            let context = Context::with(Setup { kernel: kernel as Arc<dyn Kernel>, memory, ..plain }).unwrap();
            let guests = [0, 1].map(|index| Guest::at(Arch::Arm, &rig.memory, 0x10_0000 + index * 0x10_0000));
            let sides = [0, 1].map(|side| Side::new(&context, &guests[side], strategy, &Side::LABELS[side * 4..][..4]));
            let lookups = sides.each_ref().map(|side| [&side.ioasid, &side.managed, &side.requests].map(|ioasid| ioasid.lookup().unwrap()));
            // Tables are read and changed once more, when there are lookups.
            sides[0].guest.unmap(0x1000);
            let gate = &gates[usize::from(in_tables)];
            gate.set(GateState::Shut);
            std::thread::scope(|scope| {
                scope.spawn(|| act(&sides[0]));
                gate.wait_while(GateState::Shut);
                assert!(gate.is(GateState::Holds), "{what}: nobody came by");
                for lookup in lookups.as_flattened() {
                    for _ in 0..100 {
                        assert_eq!(lookup.find(Iova(KEPT)).map(|target| target.address.0), Some(DATA), "{what}");
                    }
                }
                let is_held = gate.is(GateState::Holds);
                gate.set(GateState::Open);
                assert!(is_held, "{what}: a lookup waited");
            });
        }
        rig.assert_clean();
    }
}
