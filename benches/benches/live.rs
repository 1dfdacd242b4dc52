//! A running guest, VT-d first stage kept in step in a nested SMMUv3 stage-1 table: one page mapped or unmapped, whatever else is mapped; and a global flush with
//! one change, against `memcpy` of the guest's tables. Without the kernel's call, which is not ours.
#![allow(clippy::unwrap_used, missing_docs)]

use std::cell::RefCell;
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};

use criterion::{Criterion, criterion_group, criterion_main};
use stagecraft::memory::{MemoryMap, VmMemory};
use stagecraft::plugin::queue::{Effect, Invalidation, Scope};
use stagecraft::plugin::{Config, Engine, Plugins, TableConfig, Tag};
use stagecraft::sync::{Live, Shadow, ShadowLimits, Unwatched};
use stagecraft::{Gpa, Span};
use stagecraft_benches::contest::{Contestant, contest};
use stagecraft_benches::nested::{Sink, sink};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, VolatileMemory as _};

/// Present, writable, for users, accessed, dirty.
const LEAF: u64 = 0b110_0111;
const TABLE: u64 = 0b10_0111;
const LARGE: u64 = 1 << 7;
/// Guest memory that holds tables.
const TABLES: u64 = 16 << 20;
/// Changes that one round makes: so many pages go and come as half of it.
const CHANGES: u64 = 512;
/// Where pages come and go: 512 slots in a table of their own.
const PLAYGROUND: u64 = 100 << 40;

struct Guest {
    memory: GuestMemoryMmap,
    next: u64,
    live: Live<Sink>,
}

impl Guest {
    /// `count` leaves of `2^(12 + 9 * height)` bytes, the first at 4 GiB, to scattered addresses.
    fn new(plugins: &Plugins, count: u64, height: u32) -> Self {
        let open = |config: &TableConfig| Box::new(plugins.by_format(&config.format).unwrap().open(config).unwrap());
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), TABLES as usize)]).unwrap();
        let format = open(&TableConfig::new("intel-vtd/first-stage", &[("levels", 4), ("root", 0)]));
        let limits = ShadowLimits::default();
        let shadow = Shadow::open(format, MemoryMap::everything(47), limits, Box::new(Unwatched)).unwrap();
        let live = Live::new(shadow, sink(plugins, TABLES as usize), Tag::default(), 0, 1 << 10);
        let mut guest = Self { memory, next: 4096, live };
        let shift = 12 + 9 * height;
        for index in 0..count {
            let large = if height == 0 { 0 } else { LARGE };
            guest.set((1 << 32) + (index << shift), height, (index.wrapping_mul(0x9e37_79b1) % count) << shift | LEAF | large);
        }
        for index in 0..512 {
            guest.set(PLAYGROUND + (index << 12), 0, index << 12 | LEAF);
        }
        guest.live.synchronise(&VmMemory(&guest.memory)).unwrap();
        guest
    }

    fn slot(&mut self, iova: u64, height: u32) -> u64 {
        let mut table = 0;
        for above in (height + 1..4).rev() {
            let slot = GuestAddress(table + (iova >> (12 + 9 * above) & 0x1ff) * 8);
            let mut entry: u64 = self.memory.load(slot, Ordering::Relaxed).unwrap();
            if entry == 0 {
                entry = self.next | TABLE;
                self.next += 4096;
                assert!(self.next <= TABLES, "no room for the guest's tables");
                self.memory.store(entry, slot, Ordering::Relaxed).unwrap();
            }
            table = entry & !0xfff;
        }
        table + (iova >> (12 + 9 * height) & 0x1ff) * 8
    }

    fn set(&mut self, iova: u64, height: u32, entry: u64) -> u64 {
        let slot = self.slot(iova, height);
        self.memory.store(entry, GuestAddress(slot), Ordering::Relaxed).unwrap();
        slot
    }
}

/// How the engine hears of a change.
#[derive(Clone, Copy, Debug)]
enum Word {
    Leaf,
    Page,
    Written,
    Batch,
    /// The same commands, and nothing changed.
    Quiet,
}

/// Pages of the playground go and come back.
fn churn<'a>(guest: &'a RefCell<Guest>, word: Word) -> impl FnMut() + 'a {
    let table = guest.borrow_mut().slot(PLAYGROUND, 0);
    let mut round = 0_u64;
    let mut commands: Vec<Invalidation> = Vec::new();
    move || {
        let Guest { memory, live, .. } = &mut *guest.borrow_mut();
        let view = VmMemory(&*memory);
        // The guest writes an entry with one store; what `vm-memory` needs to find the place is not part of it.
        let entries = memory.get_slice(GuestAddress(table), 4096).unwrap();
        commands.clear();
        let half = CHANGES / 2;
        let batch = matches!(word, Word::Batch | Word::Quiet);
        for change in 0..CHANGES {
            // In a batch all go first; otherwise each comes back at once.
            let (number, there) = if batch { (change % half, change >= half) } else { (change / 2, change % 2 == 1) };
            let index = (round * 37 + number * 3) % 512;
            let slot = table + index * 8;
            let entry = if there || matches!(word, Word::Quiet) { index << 12 | LEAF } else { 0 };
            entries.get_atomic_ref::<AtomicU64>(index as usize * 8).unwrap().store(entry, Ordering::Relaxed);
            let first = PLAYGROUND + (index << 12);
            let range = |leaf| {
                let scope = Scope { leaf, second_stage: false, domain: None, space: None, id: None };
                Invalidation { index: 0, effect: Effect::Range { scope, iova: Span { first, last: first | 0xfff } } }
            };
            let report = match word {
                Word::Leaf => live.invalidate(&view, &[range(true)]),
                Word::Page => live.invalidate(&view, &[range(false)]),
                Word::Written => live.table_written(&view, Gpa(slot), 8),
                Word::Batch | Word::Quiet => {
                    commands.push(range(true));
                    if change % half == half - 1 {
                        let changes = if matches!(word, Word::Batch) { half } else { 0 };
                        assert_eq!(live.invalidate(&view, &commands).unwrap().changes, changes);
                        commands.clear();
                    }
                    continue;
                }
            };
            assert_eq!(report.unwrap().changes, 1);
        }
        round += 1;
    }
}

fn one_page(criterion: &mut Criterion, plugins: &Plugins) {
    let sizes = [("1 GiB in 4K", 262_144, 0), ("64 GiB in 2M", 32_768, 1), ("16 TiB in 1G", 16_384, 2)];
    let guests: Vec<(&str, RefCell<Guest>)> =
        sizes.iter().map(|(name, count, height)| (*name, RefCell::new(Guest::new(plugins, *count, *height)))).collect();
    // The first page that comes and goes tells what its pattern, and an absent one, mean.
    guests.iter().for_each(|(_, guest)| churn(guest, Word::Leaf)());
    let questions: Vec<u64> = guests.iter().map(|(_, guest)| guest.borrow().live.space().figures().questions).collect();
    let mut contestants = Vec::new();
    for (name, guest) in &guests {
        for word in [Word::Leaf, Word::Page, Word::Written, Word::Batch, Word::Quiet] {
            let label: &'static str = Box::leak(format!("{name}, {word:?}").into_boxed_str());
            contestants.push(Contestant::new(label, churn(guest, word)));
        }
    }
    contest(criterion, "one page comes or goes", CHANGES, 41, &mut contestants);
    drop(contestants);
    let after: Vec<u64> = guests.iter().map(|(_, guest)| guest.borrow().live.space().figures().questions).collect();
    assert_eq!(questions, after, "no question is asked");
}

fn flush(criterion: &mut Criterion, plugins: &Plugins) {
    let guest = RefCell::new(Guest::new(plugins, 262_144, 0));
    let (slot, used) = {
        let guest = &mut *guest.borrow_mut();
        (guest.slot((1 << 32) + (77 << 12), 0), guest.next as usize)
    };
    let source = guest.borrow().memory.clone();
    let mut copy = vec![0_u8; used];
    let mut there = true;
    let everything = [Invalidation { index: 0, effect: Effect::Everything }];
    let mut contestants = vec![
        Contestant::new("global flush, one change", || {
            let Guest { memory, live, .. } = &mut *guest.borrow_mut();
            there = !there;
            memory.store(if there { LEAF } else { 0 }, GuestAddress(slot), Ordering::Relaxed).unwrap();
            assert_eq!(live.invalidate(&VmMemory(&*memory), &everything).unwrap().changes, 1);
        }),
        Contestant::new("memcpy of the tables", || {
            source.get_slice(GuestAddress(0), used).unwrap().copy_to(&mut copy[..]);
            black_box(&copy);
        }),
    ];
    println!("a global flush of {} KiB of tables", used >> 10);
    contest(criterion, "global flush", used as u64 / 4096, 41, &mut contestants);
}

fn live(criterion: &mut Criterion) {
    let plugins = Plugins::builtin(&Engine::new(Config::default()).unwrap()).unwrap();
    one_page(criterion, &plugins);
    flush(criterion, &plugins);
}

criterion_group!(benches, live);
criterion_main!(benches);
