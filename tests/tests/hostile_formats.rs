//! Guests of every architecture, and tables of every format, damaged in bulk: looked at, translated, explained and converted to every format, all of it within
//! budgets and without a panic.
//!
//! `STAGECRAFT_ROUNDS=1000 cargo test -p stagecraft-tests --test hostile_formats` is a long run; `STAGECRAFT_SEED` chooses another one.
#![allow(clippy::unwrap_used)]

mod configs;
mod fixtures;
mod hostile;

use std::path::Path;

use hostile::compare::{have_reason, is_orderly};
use hostile::mutate::absurd;
use hostile::{plugins, rounds, seed, timed};
use serde_json::{Value, json};
use stagecraft::convert::{ConvertError, Target, convert};
use stagecraft::guest::{Guest, GuestError, State, StreamState};
use stagecraft::memory::Limits;
use stagecraft::snapshot::{Snapshot, store};
use stagecraft::table::{BuildError, Cause, Collector, WalkError};
use stagecraft::{Access, Iova, Span};
use stagecraft_tests::reference::generate::Rng;

/// All table formats that there are.
fn formats() -> Vec<String> {
    plugins().iter().flat_map(|(manifest, _)| manifest.formats.iter().map(|format| format.name.clone())).collect()
}

/// A guest as files hold it.
#[derive(Clone)]
struct Files {
    name: String,
    json: Value,
    pages: Vec<u8>,
    big: bool,
}

impl Files {
    fn read(name: &str, path: &Path, big: bool) -> Self {
        let json = serde_json::from_slice(&std::fs::read(path.join("snapshot.json")).unwrap()).unwrap();
        Self { name: name.to_owned(), json, pages: std::fs::read(path.join("pages.bin")).unwrap(), big }
    }

    fn load(&self, folder: &Path) -> Result<Snapshot, stagecraft::snapshot::SnapshotError> {
        std::fs::write(folder.join("snapshot.json"), self.json.to_string()).unwrap();
        std::fs::write(folder.join("pages.bin"), &self.pages).unwrap();
        Snapshot::load(folder)
    }

    fn count(&self) -> u64 {
        self.pages.len() as u64 / 4096
    }

    /// A few kinds of damage at once; which, in words.
    fn damage(&mut self, rng: &mut Rng) -> String {
        (0..=rng.below(3)).map(|_| self.damage_once(rng)).collect::<Vec<_>>().join(", ")
    }

    fn damage_once(&mut self, rng: &mut Rng) -> String {
        let pages = self.count();
        if pages == 0 {
            return "nothing left".to_owned();
        }
        let page = |rng: &mut Rng| (rng.below(pages) * 4096) as usize;
        match rng.below(9) {
            0..=2 => {
                // Where something stands: entries, not the zeroes between them.
                let used: Vec<usize> = (0..self.pages.len()).filter(|at| self.pages[*at] != 0).collect();
                let count = 1 + rng.below(64);
                for _ in 0..count {
                    let at = if used.is_empty() || rng.percent(10) { rng.below(self.pages.len() as u64) as usize } else { rng.pick(&used) };
                    self.pages[at] ^= 1 << rng.below(8);
                }
                format!("{count} bits flipped")
            }
            3 => {
                let (one, other) = (page(rng), page(rng));
                for at in 0..4096 {
                    self.pages.swap(one + at, other + at);
                }
                "pages exchanged".to_owned()
            }
            4 => {
                let place = page(rng);
                self.pages.drain(place..place + 4096);
                self.json["pages"].as_array_mut().unwrap().remove(place / 4096);
                "a page is missing".to_owned()
            }
            5 => {
                let (place, from) = (page(rng), rng.below(4096) as usize);
                self.pages[place + from..place + 4096].fill(0);
                format!("a page ends at byte {from}")
            }
            // All entries of a page are one of its entries, which points to that page or another one often enough.
            6 => {
                let (place, size) = (page(rng), rng.pick(&[4, 8, 8, 16]));
                let entry = place + (rng.below(4096 / size as u64) as usize) * size;
                let entry = self.pages[entry..entry + size].to_vec();
                self.pages[place..place + 4096].chunks_exact_mut(size).for_each(|slot| slot.copy_from_slice(&entry));
                "a page is full of one of its entries".to_owned()
            }
            7 => self.damage_numbers(rng),
            _ => {
                let memory = self.json["memory"].as_array_mut().unwrap();
                let first = rng.below(1 << 34);
                let range = match rng.below(4) {
                    // The end of all addresses, single bytes, everything.
                    0 => json!([{"kind": "ram", "first": "0xfffffffffffff000", "last": "0xffffffffffffffff"}]),
                    1 => (0..64).map(|byte| json!({"kind": "ram", "first": first + byte * 3, "last": first + byte * 3})).collect(),
                    2 => json!([{"kind": "ram", "first": 0, "last": "0xffffffffffffffff"}]),
                    _ => json!([{"kind": "ram", "first": 1, "last": "0x7ffffffffffffffe"}]),
                };
                if rng.percent(50) {
                    *memory = range.as_array().unwrap().clone();
                } else {
                    memory.truncate(1);
                }
                "another memory map".to_owned()
            }
        }
    }

    /// A register, or a setting of a table.
    fn damage_numbers(&mut self, rng: &mut Rng) -> String {
        let numbers = match self.json["tables"].as_array_mut() {
            Some(tables) if !tables.is_empty() => {
                let index = rng.below(tables.len() as u64) as usize;
                if rng.percent(30) && tables[index]["root"].is_string() {
                    tables[index]["root"] = json!(format!("{:#x}", absurd(rng) & !0xfff));
                    return "another root".to_owned();
                }
                tables[index]["settings"].as_object_mut()
            }
            _ => self.json["unit"]["registers"].as_object_mut(),
        };
        let Some(numbers) = numbers.filter(|numbers| !numbers.is_empty()) else { return "no numbers".to_owned() };
        let name = numbers.keys().nth(rng.below(numbers.len() as u64) as usize).unwrap().clone();
        let old = match &numbers[&name] {
            Value::String(text) => u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap(),
            number => number.as_u64().unwrap(),
        };
        let value = if rng.percent(60) { old ^ 1 << rng.below(64) } else { absurd(rng) };
        numbers.insert(name.clone(), json!(format!("{value:#x}")));
        format!("{name} is {value:#x}")
    }
}

/// What was met: all numbers must be large, or the test proves little.
#[derive(Debug, Default)]
struct Seen {
    refused: u64,
    streams: u64,
    walks: u64,
    exhausted: u64,
    mappings: u64,
    explained: u64,
    translations: u64,
    conversions: u64,
}

/// Everything that the library can be asked about a guest.
fn examine(label: &str, snapshot: &Snapshot, seen: &mut Seen) {
    let guest = Guest::new(snapshot, plugins()).unwrap();
    let mut streams: Vec<StreamState> = Vec::new();
    for device in &snapshot.devices {
        for pasid in [None, Some(0), Some(1), Some((1 << 20) - 1)] {
            match guest.stream(device.id, pasid) {
                Ok(stream) => streams.push(stream),
                Err(error) => assert!(is_orderly(&error), "{label}: {error}"),
            }
        }
        match guest.pasids(device.id) {
            Ok(found) => {
                assert!(found.value.len() <= 1024 && found.value.is_sorted(), "{label}");
                streams.extend(found.value.iter().take(4).filter_map(|pasid| guest.stream(device.id, Some(*pasid)).ok()));
            }
            Err(error) => assert!(is_orderly(&error), "{label}: {error}"),
        }
    }
    seen.streams += streams.len() as u64;
    let mut known = Vec::new();
    for stream in &streams {
        let State::Translated(configs) = &stream.state else { continue };
        if known.contains(configs) {
            continue;
        }
        known.push(configs.clone());
        walk(label, &guest, configs, seen);
    }
    for format in formats() {
        let mut target = Target::new(&format);
        target.table_bytes = 16 << 20;
        match convert(&guest, &streams, &target, &mut |_, _| {}) {
            Ok(conversion) => {
                assert!(conversion.arena.bytes() <= target.table_bytes, "{label}");
                seen.conversions += 1;
            }
            Err(ConvertError::Build { error: error @ (BuildError::Nonsense(_) | BuildError::Format(_)), .. }) => {
                panic!("{label}, converted to {format}: {error}")
            }
            Err(ConvertError::Guest(GuestError::Walk(error @ (WalkError::Nonsense(_) | WalkError::Format(_))))) => {
                panic!("{label}, converted to {format}: {error}")
            }
            Err(_) => seen.refused += 1,
        }
    }
}

fn walk(label: &str, guest: &Guest<'_>, configs: &[stagecraft::plugin::TableConfig], seen: &mut Seen) {
    let mut space = match guest.open(configs) {
        Ok(space) => space,
        // What a snapshot names can be anything; what a lookup found cannot.
        Err(error) => {
            assert!(matches!(guest.snapshot().source, stagecraft::snapshot::Source::Tables(_)) && is_orderly(&error), "{label}: {error}");
            seen.refused += 1;
            return;
        }
    };
    let budget = guest.budget();
    let Limits { tables, leaves, questions, faults, .. } = *budget.limits();
    let mut collector = Collector::new(space.privileged(), faults);
    match space.walk(&guest.memory(), guest.map(), Span::ALL, &budget, &mut collector) {
        Ok(()) => {}
        Err(WalkError::Exhausted(_)) => seen.exhausted += 1,
        Err(error) => panic!("{label}: {error}"),
    }
    assert!(budget.tables_visited() <= tables && budget.leaves_seen() <= leaves && budget.questions_asked() <= questions, "{label}");
    assert!(collector.faults().len() <= faults && collector.mappings().len() as u64 <= leaves, "{label}");
    for mapping in collector.mappings() {
        let last = mapping.address.checked_add(mapping.iova.length_minus_one()).unwrap_or_else(|| panic!("{label}: {mapping:?}"));
        assert!(guest.map().target(mapping.address).is_some_and(|target| target.contains(last)), "{label}: {mapping:?} leaves memory");
    }
    for (span, fault) in collector.faults() {
        let (Some(step), Cause::Entry(_), None) = (fault.path.last(), fault.cause, fault.address) else { continue };
        let findings = space.explain(fault.stage, step).unwrap();
        let worst = findings.first().unwrap_or_else(|| panic!("{label}: nothing is said about {fault:?}"));
        assert!(have_reason(&space, *span, fault, &findings) && worst.bits != 0, "{label}: {fault:?} at {span}: {worst:?}");
        seen.explained += 1;
    }
    let ends = collector.mappings().iter().flat_map(|mapping| [mapping.iova.first, mapping.iova.last, mapping.iova.last.wrapping_add(1)]);
    for iova in ends.take(60).chain([0, u64::MAX, 1 << 63, 0xffff_ffff]) {
        for access in [Access::READ, Access::WRITE] {
            if let Err(error) = guest.translate(&mut space, Iova(iova), access) {
                assert!(matches!(error, GuestError::Walk(WalkError::Exhausted(_))), "{label}: {error}");
            }
            seen.translations += 1;
        }
    }
    seen.walks += 1;
    seen.mappings += collector.mappings().len() as u64;
}

fn run(all: &[Files], count: u64) -> Seen {
    let seed = seed();
    let folder = tempfile::tempdir().unwrap();
    let mut seen = Seen::default();
    for (index, pristine) in all.iter().enumerate() {
        let mut rng = Rng::new(seed ^ (index as u64) << 32);
        examine(&format!("{} as it is", pristine.name), &pristine.load(folder.path()).unwrap(), &mut seen);
        for round in 0..count.div_ceil(if pristine.big { 8 } else { 1 }) {
            let mut files = pristine.clone();
            let what = files.damage(&mut rng);
            let label = format!("{}, seed {seed:#x}, round {round}: {what}", pristine.name);
            timed(&label, || match files.load(folder.path()) {
                Ok(snapshot) => examine(&label, &snapshot, &mut seen),
                Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
            });
        }
    }
    println!("{seen:?}");
    seen
}

/// Snapshots of real guests of all architectures.
#[test]
fn real_guests() {
    let all: Vec<Files> = fixtures::all().into_iter().map(|f| Files::read(&f.name, &f.path, f.big)).collect();
    // Where only the small snapshots are there, each is damaged as often as all would be together.
    let seen = run(&all, rounds((6 * 13 / all.len() as u64).max(6)));
    assert!(seen.walks > 20 && seen.mappings > 1000 && seen.explained > 20 && seen.conversions > 100, "{seen:?}");
}

/// Tables of every format, made from a small guest's.
#[test]
fn tables_of_every_format() {
    let folder = tempfile::tempdir().unwrap();
    let small = fixtures::small();
    let snapshot = Snapshot::load(&small.path).unwrap();
    let guest = Guest::new(&snapshot, plugins()).unwrap();
    let streams = guest.streams().unwrap();
    let make = |format: String| {
        let mut target = Target::new(&format);
        target.table_bytes = 64 << 20;
        let made = convert(&guest, &streams, &target, &mut |_, _| {}).unwrap();
        let path = folder.path().join(format.replace('/', "-"));
        store(&path, false, "", &made.map, &snapshot.devices, &made.streams, &made.arena).unwrap();
        Files::read(&format, &path, false)
    };
    let all: Vec<Files> = formats().into_iter().map(make).collect();
    assert_eq!(all.len(), 13);
    let seen = run(&all, rounds(10));
    assert!(seen.walks > 100 && seen.mappings > 1000 && seen.explained > 20 && seen.conversions > 500, "{seen:?}");
}
