//! Many commands at once: the same as one after the other, with each entry read once.

use std::cell::RefCell;
use std::collections::BTreeMap;

use stagecraft::Gpa;
use stagecraft::memory::{EntryLayout, EntryMemory, ReadError, VmMemory};
use stagecraft::plugin::queue::Invalidation;
use stagecraft::plugin::{TableConfig, Tag};
use stagecraft::sync::{Live, ShadowLimits, Space, Unwatched, Way};
use stagecraft_tests::reference::generate::Rng;
use vm_memory::GuestMemoryMmap;

use super::behaviour::range;
use super::guest::{DATA, Guest, PS, RO, RW};
use super::support::{Host, format};

/// Guest memory, and how often each entry was read.
struct Counted<'a> {
    memory: VmMemory<'a, GuestMemoryMmap>,
    reads: RefCell<BTreeMap<u64, u64>>,
}

impl EntryMemory for Counted<'_> {
    fn read_entries(&self, address: Gpa, layout: EntryLayout, entries: &mut [u64]) -> Result<(), ReadError> {
        let mut reads = self.reads.borrow_mut();
        (0..entries.len()).for_each(|index| *reads.entry(address.0 + index as u64 * u64::from(layout.bytes)).or_default() += 1);
        self.memory.read_entries(address, layout, entries)
    }
}

fn live(guest: &Guest) -> Live<Host> {
    let host = Host::new(&TableConfig::new("intel-vtd/first-stage", &[("levels", 4)]), 4 << 20);
    let space = Space::open(Way::table(format(&guest.config())), Guest::map(), ShadowLimits::default(), Box::new(Unwatched)).unwrap();
    let mut live = Live::new(space, host, Tag::default(), 0, 1 << 10);
    live.synchronise(&guest.view()).unwrap();
    live
}

/// Three tables of pages side by side, one somewhere else, and large pages between.
const TABLES: [u64; 4] = [0, 1 << 21, 2 << 21, 5 << 30];

fn page(rng: &mut Rng) -> u64 {
    rng.pick(&TABLES) + (rng.below(512) << 12)
}

fn change(guest: &Guest, rng: &mut Rng, iova: u64) {
    let entry = DATA + (rng.below(4096) << 12);
    guest.set(iova, 0, rng.pick(&[0, entry | RW, entry | RO, entry | RW, 0]));
}

fn guest(rng: &mut Rng) -> Guest {
    let guest = Guest::new();
    for table in TABLES {
        for index in 0..512 {
            if rng.percent(70) {
                guest.put(table + (index << 12), 0, (DATA + (rng.below(4096) << 12)) | RW);
            }
        }
    }
    (3..9).for_each(|index| guest.put(index << 21, 1, (DATA + ((index % 8) << 21)) | RW | PS));
    guest
}

/// Pages and ranges, in no order and overlapping; and some commands for leaves only.
fn commands(rng: &mut Rng, changed: &[u64]) -> Vec<Invalidation> {
    let mut commands: Vec<Invalidation> = changed.iter().map(|iova| range(*iova, iova | 0xfff, rng.percent(50))).collect();
    for _ in 0..rng.below(6) {
        let first = page(rng);
        commands.push(range(first, first + (rng.below(700) << 12 | 0xfff), rng.percent(50)));
    }
    for index in (1..commands.len()).rev() {
        commands.swap(index, rng.below(index as u64 + 1) as usize);
    }
    commands
}

#[test]
fn a_batch_says_what_its_commands_say_one_by_one() {
    for seed in 0..60 {
        let mut rng = Rng::new(seed);
        let guest = guest(&mut rng);
        let (mut together, mut apart) = (live(&guest), live(&guest));
        for round in 0..8 {
            let count = rng.pick(&[1, 3, 20, 200]);
            let changed: Vec<u64> = (0..count).map(|_| page(&mut rng)).collect();
            changed.iter().for_each(|iova| change(&guest, &mut rng, *iova));
            // A large page becomes another.
            if rng.percent(30) {
                guest.set(4 << 21, 1, (DATA + (rng.below(4) << 21)) | RW | PS);
            }
            let commands = commands(&mut rng, &changed);
            let calls = together.sink().committer.calls;
            together.invalidate(&guest.view(), &commands).unwrap();
            assert!(together.sink().committer.calls - calls <= 1, "seed {seed}: one call for a batch");
            for command in &commands {
                apart.invalidate(&guest.view(), &[*command]).unwrap();
            }
            let (one, other) = (together.sink().model.mappings(), apart.sink().model.mappings());
            assert!(one == other, "seed {seed}, round {round}: {} commands", commands.len());
            assert!(one == together.sink().walked(), "seed {seed}, round {round}: the host's table");
        }
        together.synchronise(&guest.view()).unwrap();
        apart.synchronise(&guest.view()).unwrap();
        assert!(together.sink().model.mappings() == apart.sink().model.mappings(), "seed {seed}: all that was not told");
    }
}

#[test]
fn what_commands_have_in_common_is_read_once() {
    for seed in 0..60 {
        let mut rng = Rng::new(!seed);
        let guest = guest(&mut rng);
        let mut live = live(&guest);
        for round in 0..8 {
            let count = rng.pick(&[1, 5, 40, 400]);
            let changed: Vec<u64> = (0..count).map(|_| page(&mut rng)).collect();
            changed.iter().for_each(|iova| change(&guest, &mut rng, *iova));
            let memory = Counted { memory: guest.view(), reads: RefCell::default() };
            live.invalidate(&memory, &commands(&mut rng, &changed)).unwrap();
            let reads = memory.reads.into_inner();
            let again = reads.iter().find(|(_, count)| **count > 1);
            assert_eq!(again, None, "seed {seed}, round {round}: an entry that is read again");
            assert!(!reads.is_empty());
        }
    }
}

/// What stands between the entries that commands mean may have been read with them, and is not used: only what was told is seen.
#[test]
fn what_no_command_means_is_not_seen() {
    let guest = guest(&mut Rng::new(1));
    (0..512).for_each(|index| guest.put(index << 12, 0, DATA | RW));
    let mut live = live(&guest);
    (0..512).for_each(|index| guest.put(index << 12, 0, 0));
    let commands: Vec<Invalidation> = (0..512).step_by(3).map(|index| range(index << 12, index << 12 | 0xfff, true)).collect();
    assert_eq!(live.invalidate(&guest.view(), &commands).unwrap().changes, commands.len() as u64);
    let left = live.sink().model.pieces.range(..1 << 21).map(|(first, _)| first >> 12).collect::<Vec<u64>>();
    assert_eq!(left, (0..512).filter(|index| index % 3 != 0).collect::<Vec<u64>>());
    assert_eq!(live.space().figures().blocked, 0);
}
