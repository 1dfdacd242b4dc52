//! Page commands without a leaf hint, of which one goes the way of the one before if it is what it was: also after it was something else meanwhile.

use stagecraft::kernel::sim::DmaAccess;
use stagecraft::plugin::{TableConfig, Tag};
use stagecraft::sync::{Live, ShadowLimits, Space, Unwatched, Way};
use stagecraft::{Attributes, Gpa, Iova, Span};

use super::behaviour::range;
use super::guest::{DATA, Guest, RO, RW};
use super::hardware::{Arch, Forgotten, Rig};
use super::support::{Host, format};

/// The mark of an access.
const A: u64 = 1 << 5;

/// An address space of two tables of pages for the same IOVAs, of which the first leads to [`DATA`] and the second elsewhere; what the entry above says for each of them.
struct Two {
    guest: Guest,
    live: Live<Host>,
    slot: Gpa,
    entries: [u64; 2],
}

impl Two {
    fn new() -> Self {
        let guest = Guest::new();
        guest.put(0, 0, DATA | RW);
        let slot = guest.slot(0, 1);
        let first = guest.load(slot.0);
        let second = guest.table();
        guest.store(second, (DATA + 0x5000) | RW);
        let host = Host::new(&TableConfig::new("intel-vtd/first-stage", &[("levels", 4)]), 4 << 20);
        let space = Space::open(Way::table(format(&guest.config())), Guest::map(), ShadowLimits::default(), Box::new(Unwatched)).unwrap();
        let mut live = Live::new(space, host, Tag::default(), 0, 1 << 10);
        live.synchronise(&guest.view()).unwrap();
        let mut two = Self { guest, live, slot, entries: [first, second | first & 0xfff] };
        // The way is gone twice: as it is found, and as it is known.
        (0..2).for_each(|_| assert_eq!(two.looks(), Some(DATA)));
        two
    }

    /// The entry above, and whether anybody hears of it.
    fn points(&mut self, entry: u64, told: bool) {
        self.guest.store(self.slot.0, entry);
        if told {
            self.live.table_written(&self.guest.view(), self.slot, 8).unwrap();
        }
    }

    /// Where the page leads to after a command for it.
    fn looks(&mut self) -> Option<u64> {
        self.live.invalidate(&self.guest.view(), &[range(0, 0xfff, false)]).unwrap();
        assert!(self.live.sink().walked() == self.live.sink().model.mappings());
        self.live.sink().model.pieces.get(&0).map(|piece| piece.address)
    }
}

#[test]
fn a_way_that_led_elsewhere_meanwhile_is_looked_at_again() {
    let mut two = Two::new();
    let [first, second] = two.entries;
    two.points(second, true);
    two.points(first, false);
    assert_eq!(two.looks(), Some(DATA));
    two.points(second, false);
    assert_eq!(two.looks(), Some(DATA + 0x5000));
    // Allowed less meanwhile, by the same table.
    two.points(second & !2, true);
    two.points(second, false);
    two.looks();
    assert!(two.live.sink().model.pieces[&0].attributes.contains(Attributes::WRITE));
}

#[test]
fn a_way_on_which_nothing_was_meanwhile_is_looked_at_again() {
    let mut two = Two::new();
    let [first, second] = two.entries;
    two.points(0, true);
    assert!(two.live.sink().model.pieces.is_empty());
    // Another table, in the place of the first and with its number.
    two.points(second, true);
    two.points(first, false);
    assert_eq!(two.looks(), Some(DATA));
    two.points(0, false);
    assert_eq!(two.looks(), None);
    two.points(first, false);
    assert_eq!(two.looks(), Some(DATA));
}

/// A root that is another's, with the same tables below it at first.
#[test]
fn a_way_from_a_root_that_is_another_is_not_gone() {
    let mut two = Two::new();
    let [_, second] = two.entries;
    let root = two.guest.table();
    two.guest.store(root, two.guest.load(two.guest.root()));
    two.guest.set_root(root);
    two.live.switch(Way::table(format(&two.guest.config())), &two.guest.view()).unwrap();
    assert_eq!(two.looks(), Some(DATA));
    // Only the new root leads there.
    let (above, below) = (two.guest.table(), two.guest.table());
    let bits = second & 0xfff;
    two.guest.store(below, second);
    two.guest.store(above, below | bits);
    two.guest.store(root, above | bits);
    assert_eq!(two.looks(), Some(DATA + 0x5000));
}

/// An entry of the way that was marked, and whose mark the guest has taken away again: it is marked anew.
#[test]
fn a_way_that_was_marked_meanwhile_is_looked_at_again() {
    let mut rig = Rig::with(Arch::Vtd, Forgotten::Nothing, true);
    rig.guest.put(0, 0, DATA | (RO & !A));
    let slot = rig.guest.slot(0, 1);
    let without = rig.guest.load(slot.0) & !A;
    rig.guest.store(slot.0, without);
    rig.live.synchronise(&rig.guest.view()).unwrap();
    let looks = |rig: &mut Rig| drop(rig.live.invalidate(&rig.guest.view(), &[range(0, 0xfff, false)]).unwrap());
    looks(&mut rig);
    looks(&mut rig);
    for _ in 0..2 {
        assert!(rig.device.first_stage(None, Iova(0), DmaAccess::Read).is_ok());
        assert_eq!(rig.live.write_marks(&rig.guest.view(), Span::ALL).tables, 1);
        assert_eq!(rig.guest.load(slot.0), without | A);
        rig.guest.store(slot.0, without);
        looks(&mut rig);
    }
}
