//! Guests' tables on hosts of every kind: converted, as areas, or bound as they are.

use stagecraft::ioasid::{GuestView, Ioasid, Request, Strategy};
use stagecraft::kernel::sim::{Call, UnitConfig};
use stagecraft::plugin::Outcome;
use stagecraft::table::Intercept;
use stagecraft::{Access, Gpa, Iova};

use crate::guests::{Arch, Guest};
use crate::rig::{DATA, EVERYTHING, Rig, page, range, unit};

/// How the guest's table reaches the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Best,
    Nested,
    Areas,
    Without,
}

impl How {
    const ALL: [Self; 4] = [Self::Best, Self::Nested, Self::Areas, Self::Without];

    fn unit(self, arch: Arch) -> UnitConfig {
        if self == Self::Without { unit(arch).without_nesting() } else { unit(arch) }
    }

    fn request(self, view: GuestView) -> Request {
        match self {
            Self::Best | Self::Without => Request::guest(view),
            Self::Nested => Request::guest(view).with_strategies(&[Strategy::Nested]),
            Self::Areas => Request::guest(view).with_strategies(&[Strategy::Areas]),
        }
    }

    fn strategy(self, guest: Arch, host: Arch) -> Strategy {
        match self {
            // AMD's first format is none that a unit takes of its users.
            Self::Best if guest == host && guest != Arch::Amd => Strategy::Native,
            Self::Best | Self::Nested => Strategy::Nested,
            Self::Areas | Self::Without => Strategy::Areas,
        }
    }
}

fn all(mut each: impl FnMut(Arch, Arch, How)) {
    for guest in Arch::ALL {
        for host in Arch::ALL {
            How::ALL.iter().for_each(|how| each(guest, host, *how));
        }
    }
}

#[test]
fn every_guest_on_every_host_and_never_stale() {
    all(|arch, host, how| {
        let what = format!("{arch:?} on {host:?}, {how:?}");
        let rig = Rig::new(&[how.unit(host)], &[("nic", &[0])]);
        let guest = Guest::new(arch, &rig.memory);
        {
            let context = rig.context();
            let device = context.connect("nic").unwrap();
            guest.map(0x1000, DATA, true);
            guest.map(0x2000, DATA + 0x5000, false);
            guest.map_large(0x4000_0000, 0x100_0000, true);
            let ioasid = context.allocate(how.request(guest.view())).unwrap();
            ioasid.attach(&device, None).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!(ioasid.strategies(), [how.strategy(arch, host)], "{what}: {}", ioasid.explain()[0]);
            check(&rig, &guest, &ioasid, &what);
        }
        rig.assert_clean();
    });
}

/// What an x86 unit serves beside its tables.
fn interrupts() -> Intercept {
    let (server, section) = ("interrupt controller".to_owned(), String::new());
    Intercept { passed: 0, mask: !0xf_ffff, value: 0xfee0_0000, server, address: None, section }
}

#[test]
fn addresses_of_interrupts_are_no_mappings_on_either_side() {
    all(|arch, host, how| {
        let what = format!("{arch:?} on {host:?}, {how:?}");
        let rig = Rig::new(&[how.unit(host)], &[("nic", &[0])]);
        let guest = Guest::new(arch, &rig.memory);
        let is_x86 = |arch: Arch| matches!(arch, Arch::Vtd | Arch::Amd);
        {
            let context = rig.context();
            let device = context.connect("nic").unwrap();
            // Before, among and behind those addresses.
            let pages = [0xfedf_f000, 0xfee0_0000, 0xfee0_1000, 0xfeef_f000, 0xfef0_0000];
            let pages: Vec<(u64, u64)> = pages.into_iter().zip((DATA..).step_by(0x1000)).collect();
            pages.iter().for_each(|(iova, address)| guest.put(*iova, *address, true));
            let mut view = guest.view();
            if let (Outcome::Tables(translated), true) = (&mut view.outcome, is_x86(arch)) {
                translated.intercepts = vec![interrupts()];
            }
            let ioasid = context.allocate(how.request(view)).unwrap();
            ioasid.attach(&device, None).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!(ioasid.strategies(), [how.strategy(arch, host)], "{what}: {}", ioasid.explain()[0]);
            let served = |iova: u64| !(is_x86(arch) || is_x86(host)) || iova >> 20 != 0xfee;
            let check = |moved: u64, when: &str| {
                for (iova, address) in &pages {
                    let wanted = served(*iova).then_some(*address + moved);
                    assert_eq!(rig.dma("nic", *iova), wanted, "{what}, {when}: {iova:#x}");
                }
            };
            check(0, "at first");
            pages.iter().for_each(|(iova, address)| guest.put(*iova, *address + 0x10_0000, true));
            ioasid.invalidate(&[range(0xfed0_0000, 0xfeff_ffff, true)]).unwrap();
            check(0x10_0000, "moved");
            // What the host does not serve is counted, unless the guest's own unit did not serve it.
            let lost = ioasid.stats().refused_bytes;
            let counts = !is_x86(arch) && is_x86(host);
            assert_eq!(lost > 0, counts, "{what}: {lost:#x}");
            // A page of 2 MiB that begins with them.
            pages.iter().for_each(|(iova, _)| guest.remove(*iova));
            guest.map_large(0xfee0_0000, 0x100_0000, true);
            ioasid.invalidate(&[range(0xfed0_0000, 0xfeff_ffff, false)]).unwrap();
            for iova in [0xfee0_0000, 0xfeef_fff0, 0xfef0_0000, 0xfeff_fff0] {
                assert_eq!(rig.dma("nic", iova), served(iova).then_some(0x100_0000 + (iova - 0xfee0_0000)), "{what}, large: {iova:#x}");
            }
            guest.unmap_large(0xfee0_0000);
            ioasid.invalidate(&[range(0xfed0_0000, 0xfeff_ffff, false)]).unwrap();
            assert_eq!(rig.dma("nic", 0xfef0_0000), None, "{what}");
        }
        rig.assert_clean();
    });
}

/// Changes of every kind: caches are filled before each.
pub fn check(rig: &Rig, guest: &Guest, ioasid: &Ioasid, what: &str) {
    let at = |iova: u64| rig.dma("nic", iova);
    assert_eq!((at(0x1010), at(0x2000), at(0x4012_3456)), (Some(DATA + 0x10), Some(DATA + 0x5000), Some(0x112_3456)), "{what}");
    assert_eq!((at(0x3000), at(0)), (None, None), "{what}");
    assert!(rig.writes("nic", 0x1000) && !rig.writes("nic", 0x2000), "{what}");
    // A page goes: leaf only.
    guest.unmap(0x1000);
    ioasid.invalidate(&[page(0x1000)]).unwrap();
    assert_eq!((at(0x1010), at(0x2000)), (None, Some(DATA + 0x5000)), "{what}: unmapped");
    // It comes back elsewhere: what was not there is not cached.
    guest.map(0x1000, DATA + 0x9000, true);
    ioasid.invalidate(&[page(0x1000)]).unwrap();
    assert_eq!(at(0x1010), Some(DATA + 0x9010), "{what}: mapped again");
    // It goes to another place in one step.
    guest.map(0x1000, DATA + 0xa000, true);
    ioasid.invalidate(&[page(0x1000)]).unwrap();
    assert_eq!(at(0x1010), Some(DATA + 0xa010), "{what}: moved");
    // A large page becomes a table of small ones, one of which then goes; then the table goes, and a large page takes its place.
    guest.split(0x4000_0000, 0x100_0000, true);
    ioasid.invalidate(&[range(0x4000_0000, 0x401f_ffff, false)]).unwrap();
    assert_eq!((at(0x4012_3456), at(0x4000_0000)), (Some(0x112_3456), Some(0x100_0000)), "{what}: split");
    guest.unmap(0x4000_3000);
    ioasid.invalidate(&[page(0x4000_3000)]).unwrap();
    assert_eq!((at(0x4000_3000), at(0x4000_4000)), (None, Some(0x100_4000)), "{what}: a part unmapped");
    guest.map_large(0x4000_0000, 0x120_0000, true);
    ioasid.invalidate(&[range(0x4000_0000, 0x401f_ffff, false)]).unwrap();
    assert_eq!((at(0x4000_3000), at(0x4012_3456)), (Some(0x120_3000), Some(0x132_3456)), "{what}: a table went");
    // And a table in its place again, with something else in it: what was cached of the large page, and of the earlier table, must be gone.
    guest.split(0x4000_0000, 0x140_0000, true);
    ioasid.invalidate(&[range(0x4000_0000, 0x401f_ffff, false)]).unwrap();
    assert_eq!((at(0x4000_3000), at(0x4012_3456)), (Some(0x140_3000), Some(0x152_3456)), "{what}: another table");
    // The same, told with a command for one page of it: hardware looks at the table's entry again on the way to that page.
    guest.split(0x4000_0000, 0x160_0000, true);
    ioasid.invalidate(&[range(0x4000_5000, 0x4000_5fff, false)]).unwrap();
    assert_eq!(at(0x4000_5678), Some(0x160_5678), "{what}: another table, by one page");
    // A table that has one page goes with it, and its memory becomes another table: what was cached of tables must be gone, though only one page was unmapped.
    let lonely = |iova: u64, address: u64| {
        guest.map(iova, address, true);
        ioasid.invalidate(&[range(iova, iova | 0xfff, false)]).unwrap();
    };
    lonely(0x8000_0000, DATA + 0xb000);
    assert_eq!(at(0x8000_0000), Some(DATA + 0xb000), "{what}: alone");
    guest.unmap(0x8000_0000);
    ioasid.invalidate(&[range(0x8000_0000, 0x8000_0fff, false)]).unwrap();
    assert_eq!(at(0x8000_0000), None, "{what}: alone, unmapped");
    lonely(0x9000_0000, DATA + 0xc000);
    lonely(0x8000_0000, DATA + 0xd000);
    assert_eq!((at(0x8000_0000), at(0x9000_0000)), (Some(DATA + 0xd000), Some(DATA + 0xc000)), "{what}: in another table");
    guest.unmap(0x8000_0000);
    guest.unmap(0x9000_0000);
    // All goes.
    guest.unmap_large(0x4000_0000);
    guest.unmap(0x1000);
    guest.unmap(0x2000);
    let report = ioasid.invalidate(&[EVERYTHING]).unwrap();
    assert_eq!(report.blocked_count, 0, "{what}");
    assert_eq!((at(0x1010), at(0x2000), at(0x4012_3456)), (None, None, None), "{what}: everything");
}

#[test]
fn a_batch_is_one_call_of_the_kernel() {
    for host in Arch::ALL {
        let rig = Rig::new(&[unit(host)], &[("nic", &[0])]);
        let guest = Guest::new(Arch::Arm, &rig.memory);
        let context = rig.context();
        let device = context.connect("nic").unwrap();
        (0..256).for_each(|index| guest.put(index << 14, DATA + (index << 12), true));
        let ioasid = context.allocate(Request::guest(guest.view()).with_strategies(&[Strategy::Nested])).unwrap();
        ioasid.attach(&device, None).unwrap();
        for pages in [1, 2, 17, 256] {
            (0..pages).for_each(|index| guest.put(index << 14, DATA + (index << 12), true));
            ioasid.synchronise().unwrap();
            (0..pages).for_each(|index| assert_eq!(rig.dma("nic", index << 14), Some(DATA + (index << 12))));
            let before = rig.sim.calls_total();
            (0..pages).for_each(|index| guest.remove(index << 14));
            let commands: Vec<_> = (0..pages).map(|index| page(index << 14)).collect();
            ioasid.invalidate(&commands).unwrap();
            assert_eq!(rig.sim.calls_total() - before, 1, "{host:?}: {pages} pages");
            (0..pages).for_each(|index| assert_eq!(rig.dma("nic", index << 14), None, "{host:?}"));
        }
        // What only came needs no call at all.
        let before = rig.sim.calls();
        guest.map(0x7000_0000, DATA, true);
        ioasid.invalidate(&[page(0x7000_0000)]).unwrap();
        assert_eq!(rig.sim.calls().get(&Call::Invalidate), before.get(&Call::Invalidate));
        assert_eq!(rig.dma("nic", 0x7000_0000), Some(DATA));
    }
}

#[test]
fn guests_that_say_nothing_are_followed_by_their_writes() {
    for host in Arch::ALL {
        let rig = Rig::new(&[unit(host)], &[("nic", &[0])]);
        let guest = Guest::new(Arch::Riscv, &rig.memory);
        let context = rig.context();
        let device = context.connect("nic").unwrap();
        guest.map(0x1000, DATA, true);
        let ioasid = context.allocate(Request::guest(guest.view()).with_strategies(&[Strategy::Nested])).unwrap();
        ioasid.attach(&device, None).unwrap();
        let slot = guest.map(0x2000, DATA + 0x1000, true);
        assert_eq!(rig.dma("nic", 0x2000), None, "{host:?}: nobody was told");
        ioasid.table_written(Gpa(slot), 8).unwrap();
        assert_eq!(rig.dma("nic", 0x2000), Some(DATA + 0x1000), "{host:?}");
    }
}

#[test]
fn emulated_and_real_devices_see_the_same() {
    let rig = Rig::new(&[unit(Arch::Vtd)], &[("nic", &[0])]);
    let guest = Guest::new(Arch::Arm, &rig.memory);
    let context = rig.context();
    let device = context.connect("nic").unwrap();
    guest.map(0x1000, DATA, true);
    let ioasid = context.allocate(Request::guest(guest.view())).unwrap();
    let lookup = ioasid.lookup().unwrap();
    ioasid.attach(&device, None).unwrap();
    let both = |iova: u64| {
        let found = lookup.find(Iova(iova)).map(|target| target.address.0);
        assert_eq!(rig.dma("nic", iova), found);
        let access = Access { read: true, write: false };
        assert_eq!(ioasid.translate(Iova(iova), access).unwrap().ok().map(|translation| translation.address.0), found);
        found
    };
    assert_eq!((both(0x1008), both(0x2000)), (Some(DATA + 8), None));
    guest.unmap(0x1000);
    guest.map(0x2000, DATA + 0x3000, true);
    ioasid.invalidate(&[range(0x1000, 0x2fff, true)]).unwrap();
    assert_eq!((both(0x1008), both(0x2000)), (None, Some(DATA + 0x3000)));
    let other = Guest::at(Arch::Arm, &rig.memory, 0x40_0000);
    other.map(0x9000, DATA, true);
    ioasid.switch(other.view()).unwrap();
    assert_eq!((both(0x2000), both(0x9000)), (None, Some(DATA)));
}
