//! Whatever call or step of the kernel fails: nothing is leaked, nothing stale is reached, and all goes well the next time.

use stagecraft::ioasid::{Context, Error, Request, Strategy};
use stagecraft::kernel::Errno;

use crate::guests::{Arch, Guest};
use crate::rig::{DATA, EVERYTHING, Rig, page, unit};

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
    // In step, or nothing gets anywhere.
    assert_eq!(rig.dma("nic", 0x1000), None, "{first:?}");
    assert_eq!(rig.dma("nic", 0x2000), first.is_ok().then_some(DATA + 0x1000), "{first:?}");
    if first.is_err() {
        assert!(matches!(first, Err(Error::Blocked(_))));
        assert_eq!((ioasid.stats().blocked, device.attached().len()), (1, 0));
        // The failure is over.
        ioasid.recover()?;
        assert_eq!((rig.dma("nic", 0x1000), rig.dma("nic", 0x2000)), (None, Some(DATA + 0x1000)));
    }
    guest.map(0x1000, DATA + 0x2000, true);
    let second = ioasid.invalidate(&[EVERYTHING]);
    if second.is_err() {
        ioasid.recover()?;
    }
    // What the kernel would not map is tried again.
    ioasid.synchronise()?;
    assert_eq!(rig.dma("nic", 0x1000), Some(DATA + 0x2000));
    let other = context.allocate(Request::guest(guest.view()).with_strategies(&[strategy]))?;
    let replaced = other.replace(&device, None);
    assert_eq!(rig.dma("nic", 0x1000), Some(DATA + 0x2000), "one or the other: {replaced:?}");
    replaced?;
    device.detach(None)?;
    assert_eq!(rig.dma("nic", 0x1000), None);
    first?;
    second.map(drop)
}

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
    let cases = [
        (Arch::Vtd, Arch::Vtd, Strategy::Native),
        (Arch::Arm, Arch::Arm, Strategy::Native),
        (Arch::Arm, Arch::Vtd, Strategy::Nested),
        (Arch::Vtd, Arch::Arm, Strategy::Nested),
        (Arch::Riscv, Arch::Amd, Strategy::Nested),
        (Arch::Amd, Arch::Riscv, Strategy::Nested),
        (Arch::Arm, Arch::Vtd, Strategy::Areas),
    ];
    for (arch, host, strategy) in cases {
        let (calls, steps) = (sweep(arch, host, strategy, false), sweep(arch, host, strategy, true));
        assert!(calls > 15 && steps > 10, "{arch:?} on {host:?}: {calls} calls, {steps} steps");
    }
}
