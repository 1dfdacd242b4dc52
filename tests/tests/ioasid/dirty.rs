//! Marks and logs of what devices wrote.

use stagecraft::ioasid::{Error, Property, Request, Strategy, Target};
use stagecraft::plugin::Outcome;
use stagecraft::{Access, Gpa, Span};

use crate::guests::{Arch, Guest};
use crate::rig::{DATA, Rig, unit};

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
