//! Whatever call or step of the kernel fails, once or from then on: nothing is leaked, nothing stale is reached, and all goes well the next time.

use std::fmt::Debug;
use std::sync::Arc;

use stagecraft::Iova;
use stagecraft::ioasid::{Context, Device, Error, Ioasid, Request, Setup, Strategy};
use stagecraft::kernel::Errno;
use stagecraft::kernel::sim::Reason;

use crate::guests::{Arch, Guest};
use crate::rig::{DATA, Deaf, EVERYTHING, Rig, page, unit};

/// What a VMM does in the life of a device, up to the first error.
fn life(rig: &Rig, guest: &Guest, strategy: Strategy) -> Result<(), Error> {
    guest.map(0x1000, DATA, true);
    guest.map(0x2000, DATA + 0x1000, true);
    let context = Context::with(rig.setup())?;
    let device = context.connect("nic")?;
    let ioasid = context.allocate(Request::guest(guest.view()).with_strategies(&[strategy]))?;
    ioasid.attach(&device, None)?;
    assert_eq!((rig.dma("nic", 0x1000), rig.dma("nic", 0x2000)), (Some(DATA), Some(DATA + 0x1000)));
    guest.unmap(0x1000);
    let first = ioasid.invalidate(&[page(0x1000)]);
    // One failure is made up for.
    assert_eq!((rig.dma("nic", 0x1000), rig.dma("nic", 0x2000)), (None, Some(DATA + 0x1000)), "{first:?}");
    first?;
    guest.map(0x1000, DATA + 0x2000, true);
    ioasid.invalidate(&[EVERYTHING])?;
    // What the kernel would not map is tried again.
    ioasid.synchronise()?;
    assert_eq!(rig.dma("nic", 0x1000), Some(DATA + 0x2000));
    let other = context.allocate(Request::guest(guest.view()).with_strategies(&[strategy]))?;
    let replaced = other.replace(&device, None);
    assert_eq!(rig.dma("nic", 0x1000), Some(DATA + 0x2000), "one or the other: {replaced:?}");
    replaced?;
    device.detach(None)?;
    assert_eq!(rig.dma("nic", 0x1000), None);
    Ok(())
}

/// Guest, host, strategy.
const CASES: [(Arch, Arch, Strategy); 8] = [
    (Arch::Vtd, Arch::Vtd, Strategy::Native),
    (Arch::Arm, Arch::Arm, Strategy::Native),
    (Arch::Riscv, Arch::Riscv, Strategy::Native),
    (Arch::Arm, Arch::Vtd, Strategy::Nested),
    (Arch::Vtd, Arch::Arm, Strategy::Nested),
    (Arch::Riscv, Arch::Amd, Strategy::Nested),
    (Arch::Amd, Arch::Riscv, Strategy::Nested),
    (Arch::Arm, Arch::Vtd, Strategy::Areas),
];

fn sweep(arch: Arch, host: Arch, strategy: Strategy, steps: bool) -> u64 {
    let rig = Rig::new(&[unit(host)], &[("nic", &[0])]);
    for n in 1.. {
        let guest = Guest::at(arch, &rig.memory, 0x10_0000);
        if steps {
            rig.sim.fail_step_nth(n, Errno::ENOMEM);
        } else {
            rig.sim.fail_nth(n, Errno::ENOMEM);
        }
        let result = life(&rig, &guest, strategy);
        let is_over = rig.sim.disarm();
        rig.assert_clean();
        if is_over {
            result.unwrap();
            return n;
        }
        // And once more without a failure, in the same machine.
        if n % 8 == 0 {
            life(&rig, &guest, strategy).unwrap();
            rig.assert_clean();
        }
    }
    0
}

#[test]
fn the_nth_failure_leaves_nothing_behind() {
    for (arch, host, strategy) in CASES {
        let (calls, steps) = (sweep(arch, host, strategy, false), sweep(arch, host, strategy, true));
        assert!(calls > 15 && steps > 10, "{arch:?} on {host:?}: {calls} calls, {steps} steps");
    }
}

/// What fails from some call on.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Failing {
    Invalidations,
    Calls,
}

/// A life in which the kernel fails from the n-th call on until somebody says otherwise.
struct Hard<'a> {
    rig: &'a Rig,
    deaf: Arc<Deaf>,
    guest: &'a Guest,
    what: String,
    /// Where each of the pages leads by the guest's tables.
    wanted: [Option<u64>; 2],
    /// How often devices were blocked.
    blocked: usize,
}

const LABELS: [&str; 2] = ["nic", "two"];

impl Hard<'_> {
    /// A step; after one that failed nobody reaches what is not there. Then the kernel works again, and so does `again`.
    fn step<T>(&mut self, act: impl FnOnce() -> Result<T, Error>, again: impl FnOnce(bool) -> Result<T, Error>) -> T
    where
        T: Debug,
    {
        match act() {
            Ok(done) => {
                self.check(&"well");
                done
            }
            Err(error) => {
                self.check(&error);
                self.deaf.hears();
                self.rig.sim.disarm();
                again(matches!(error, Error::Blocked(_) | Error::Detached(_))).unwrap_or_else(|error| panic!("{}: {error}", self.what))
            }
        }
    }

    /// A page leads where the guest says, or nowhere.
    fn check(&self, why: &dyn Debug) {
        for label in LABELS {
            for (iova, wanted) in [0x1000, 0x2000].into_iter().zip(self.wanted) {
                let found = self.rig.dma(label, iova);
                assert!(found.is_none() || found == wanted, "{}: {label} gets from {iova:#x} to {found:x?}: {why:?}", self.what);
            }
        }
    }

    /// All that is attached gets where the guest says; what the kernel would not map is tried again when it works again.
    fn equal(&self, devices: &[&Device], ioasids: &[&Ioasid]) {
        for ioasid in ioasids.iter().filter(|ioasid| ioasid.stats().without_memory > 0) {
            self.deaf.hears();
            self.rig.sim.disarm();
            ioasid.synchronise().unwrap();
        }
        for device in devices {
            let found = [0x1000, 0x2000].map(|iova| self.rig.dma(device.label(), iova));
            assert_eq!(found, self.wanted, "{}: {}", self.what, device.label());
        }
    }

    /// Invalidates until it is well; a device that was blocked reaches nothing, and no other one can be attached, until it is over.
    fn invalidate(&mut self, ioasid: &Ioasid, devices: &[&Device], newcomer: Option<&Device>, all: bool) {
        let commands = if all { [EVERYTHING] } else { [page(0x1000)] };
        let told = ioasid.invalidate(&commands);
        self.check(&told);
        if let Err(error) = &told {
            assert!(matches!(error, Error::Blocked(_)), "{}: {error}", self.what);
            assert_eq!((ioasid.stats().attached, ioasid.stats().blocked), (0, devices.len()), "{}", self.what);
            for label in devices.iter().map(|device| device.label()) {
                assert_eq!([0x1000, 0x2000].map(|iova| self.rig.dma(label, iova)), [None; 2], "{}: {label}", self.what);
            }
            let still = ioasid.recover();
            self.check(&still);
            if let Some(newcomer) = newcomer {
                let attached = ioasid.attach(newcomer, None);
                self.check(&attached);
                if attached.is_ok() {
                    newcomer.detach(None).unwrap();
                }
            }
            self.blocked += 1;
            self.deaf.hears();
            self.rig.sim.disarm();
            ioasid.recover().unwrap_or_else(|error| panic!("{}: {error}", self.what));
            assert_eq!((ioasid.stats().attached, ioasid.stats().blocked, ioasid.stats().stale), (devices.len(), 0, 0), "{}", self.what);
        }
    }

    fn live(&mut self, strategy: Strategy) {
        let (rig, guest) = (self.rig, self.guest);
        guest.map(0x1000, DATA, true);
        guest.map(0x2000, DATA + 0x1000, true);
        let kernel = Arc::clone(&self.deaf);
        let context = || Context::with(Setup { kernel: Arc::clone(&kernel) as _, ..rig.setup() });
        let context = self.step(context, |_| context());
        let connect = |label| context.connect(label);
        let (nic, two) = (self.step(|| connect("nic"), |_| connect("nic")), self.step(|| connect("two"), |_| connect("two")));
        let request = || Request::guest(guest.view()).with_strategies(&[strategy]);
        let ioasid = self.step(|| context.allocate(request()), |_| context.allocate(request()));
        self.wanted = [Some(DATA), Some(DATA + 0x1000)];
        self.step(|| ioasid.attach(&nic, None), |_| ioasid.attach(&nic, None));
        self.equal(&[&nic], &[&ioasid]);
        guest.unmap(0x1000);
        self.wanted[0] = None;
        self.invalidate(&ioasid, &[&nic], Some(&two), false);
        self.equal(&[&nic], &[&ioasid]);
        self.step(|| ioasid.attach(&two, None), |_| ioasid.attach(&two, None));
        self.equal(&[&nic, &two], &[&ioasid]);
        guest.map(0x1000, DATA + 0x2000, true);
        guest.unmap(0x2000);
        self.wanted = [Some(DATA + 0x2000), None];
        self.invalidate(&ioasid, &[&nic, &two], None, true);
        let again = |detached: bool| if detached { ioasid.recover().and_then(|()| ioasid.synchronise()) } else { ioasid.synchronise() };
        self.step(|| ioasid.synchronise(), again);
        self.equal(&[&nic, &two], &[&ioasid]);
        let other = self.step(|| context.allocate(request()), |_| context.allocate(request()));
        let again = |detached: bool| if detached { ioasid.recover().and_then(|()| other.replace(&nic, None)) } else { other.replace(&nic, None) };
        let (what, wanted) = (self.what.clone(), self.wanted[0]);
        let stays = |error: &Error| {
            let is_there = !matches!(error, Error::Detached(_));
            let found = (nic.attached().len(), ioasid.stats().blocked, rig.dma("nic", 0x1000));
            assert_eq!(found, (usize::from(is_there), usize::from(!is_there), wanted.filter(|_| is_there)), "{what}: {error}");
        };
        self.step(|| other.replace(&nic, None).inspect_err(stays), again);
        self.equal(&[&nic, &two], &[&ioasid, &other]);
        guest.map(0x2000, DATA + 0x3000, true);
        self.wanted[1] = Some(DATA + 0x3000);
        self.invalidate(&ioasid, &[&two], None, true);
        self.invalidate(&other, &[&nic], None, true);
        let both = || ioasid.synchronise().and_then(|_| other.synchronise());
        self.step(both, |_| ioasid.recover().and_then(|()| other.recover()).and_then(|()| both()));
        self.equal(&[&nic, &two], &[&ioasid, &other]);
        self.step(|| nic.detach(None), |_| Ok(()));
        self.step(|| two.detach(None), |_| Ok(()));
        self.wanted = [None; 2];
        self.check(&"detached");
    }
}

/// All lives of a machine: how many there were, and in how many of them devices were blocked.
fn hard_sweep(arch: Arch, host: Arch, strategy: Strategy, failing: Failing) -> (u64, usize) {
    let rig = Rig::new(&[unit(host)], &[("nic", &[0]), ("two", &[0])]);
    let mut blocked = 0;
    for n in 1.. {
        let guest = Guest::at(arch, &rig.memory, 0x10_0000);
        let deaf = Deaf::before(rig.kernel());
        match failing {
            Failing::Invalidations => deaf.takes(n - 1),
            Failing::Calls => rig.sim.fail_from(n, Errno::ENOMEM),
        }
        let what = format!("{arch:?} on {host:?}, {strategy}, {failing:?} from {n} on");
        let mut hard = Hard { rig: &rig, deaf, guest: &guest, what, wanted: [None; 2], blocked: 0 };
        hard.live(strategy);
        blocked += usize::from(hard.blocked > 0);
        let is_over = match failing {
            Failing::Invalidations => !hard.deaf.hears(),
            Failing::Calls => rig.sim.disarm(),
        };
        drop(hard);
        rig.assert_clean();
        if is_over {
            return (n, blocked);
        }
    }
    (0, 0)
}

#[test]
fn a_kernel_that_fails_from_the_nth_call_on_keeps_devices_from_what_is_gone() {
    for (arch, host, strategy) in CASES {
        for failing in [Failing::Invalidations, Failing::Calls] {
            let (lives, blocked) = hard_sweep(arch, host, strategy, failing);
            println!("{arch:?} on {host:?}, {strategy}, {failing:?}: {lives} lives, devices blocked in {blocked}");
            if strategy == Strategy::Areas && failing == Failing::Invalidations {
                continue;
            }
            assert!(lives > 4 && blocked >= 2, "{arch:?} on {host:?}, {strategy}, {failing:?}: {lives} lives, devices blocked in {blocked}");
        }
    }
}

/// A device waits for a page, and the kernel refuses the n-th call of whoever serves it: nobody waits for ever, nothing is left, and the next time it is served.
#[test]
fn a_page_request_whose_answer_fails_leaves_nothing() {
    for (arch, host) in [(Arch::Arm, Arch::Vtd), (Arch::Vtd, Arch::Arm), (Arch::Riscv, Arch::Vtd)] {
        let rig = Rig::new(&[unit(host)], &[("nic", &[0])]);
        rig.sim.set_patience(5_000);
        let dma = rig.sim.device("nic").unwrap();
        for n in 1.. {
            let (guest, mut fired) = (Guest::new(arch, &rig.memory), false);
            {
                guest.map(0x2000, DATA, false);
                let context = rig.context();
                let device = context.connect("nic").unwrap();
                let request = Request::guest(guest.view()).with_page_requests().with_strategies(&[Strategy::Nested]);
                let ioasid = context.allocate(request).unwrap();
                ioasid.attach(&device, None).unwrap();
                assert_eq!(rig.dma("nic", 0x2000), Some(DATA));
                // Another page in its place, and nobody says so.
                guest.map(0x2000, DATA + 0x1000, true);
                std::thread::scope(|scope| {
                    let write = scope.spawn(|| dma.write(None, Iova(0x2000), &[1]));
                    while !write.is_finished() {
                        if !fired {
                            rig.sim.fail_nth(n, Errno::ENOMEM);
                        }
                        let served = ioasid.serve_faults();
                        fired |= !rig.sim.disarm();
                        let found = rig.dma("nic", 0x2000);
                        assert!([None, Some(DATA), Some(DATA + 0x1000)].contains(&found), "{served:?}");
                        if served.is_err() {
                            // What was read and not answered is refused when the device goes.
                            ioasid.serve_faults().unwrap();
                            device.detach(None).unwrap();
                            ioasid.attach(&device, None).unwrap();
                        }
                        std::thread::yield_now();
                    }
                    let written = write.join().unwrap();
                    assert!(written.is_ok() || fired, "{arch:?} on {host:?}: refused, and nothing had failed");
                    let waited = written.is_err_and(|fault| fault.reason == Reason::TimedOut);
                    assert!(!waited, "{arch:?} on {host:?}: nobody answered, or said so: call {n}");
                });
                assert!(rig.writes("nic", 0x2000), "{arch:?} on {host:?}: call {n}");
                assert_eq!((rig.dma("nic", 0x2000), ioasid.stats().blocked), (Some(DATA + 0x1000), 0));
            }
            rig.assert_clean();
            if !fired {
                assert!(n > 2, "{arch:?} on {host:?}: {n}");
                break;
            }
        }
    }
}
