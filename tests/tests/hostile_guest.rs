//! Every fixture, and generated guests of every shape, with random damage: an error or a fault report, never a panic, a hang or unbounded memory. What
//! can be said is compared with the independent reference, which reads the same damaged guest.
#![allow(clippy::unwrap_used)]

mod configs;
mod fixtures;
mod hostile;

use std::collections::BTreeMap;

use configs::arena_memory;
use hostile::compare::{self, Found, clip, first_difference, have_reason, is_orderly, reference_config, same_intercepts, same_state, within};
use hostile::mutate::{Words, absurd, mutate};
use hostile::{load, nested, plugins, rounds, seed, timed};
use stagecraft::convert::{ConvertError, Target, convert};
use stagecraft::guest::{Guest, StreamState};
use stagecraft::memory::MemoryMap;
use stagecraft::plugin::TableConfig;
use stagecraft::snapshot::{PageMemory, Source};
use stagecraft::table::{AddressSpace, Cause, Collector, Mapping, WalkError};
use stagecraft::{Access, Iova, Span};
use stagecraft_tests::reference::detect::{resolve, resolve_pasid};
use stagecraft_tests::reference::generate::{Format, Rng, generate};
use stagecraft_tests::reference::snapshot::{Device, MemoryRange, Snapshot};
use stagecraft_tests::reference::tables;
use stagecraft_tests::reference::units;
use stagecraft_tests::reference::walk::Walker;
use stagecraft_tests::reference::{bit, bits};
use vm_memory::{Bytes, GuestAddress};

/// Targets of conversions; each case has some of them.
const TARGETS: [&str; 13] = [
    "arm-smmuv3/stage1",
    "amd-vi/v1",
    "riscv-iommu/second-stage",
    "arm-smmuv3/stage2",
    "loongarch/paging",
    "intel-vtd/first-stage",
    "riscv-iommu/first-stage",
    "s390-zpci/dma",
    "intel-vtd/second-stage",
    "amd-vi/v2",
    "apple-dart/dart1",
    "apple-dart/dart2",
    "arm-v7s/short",
];

/// How many of them.
const TARGETS_OF_A_CASE: usize = 4;

/// Entries that the reference looks at before a comparison is given up.
const REFERENCE_BUDGET: u64 = 400_000;

/// What a run of cases came across: all numbers must be large, or the test proves little.
#[derive(Debug, Default)]
struct Seen {
    states: u64,
    tables: u64,
    mappings: u64,
    faults: u64,
    explained: u64,
    exhausted: u64,
    translations: u64,
    conversions: u64,
    refused_conversions: u64,
    /// What requests with and without PASID got, where that was counted.
    outcomes: BTreeMap<(bool, &'static str), u64>,
    /// Where the engine and the reference disagree.
    differences: Vec<String>,
}

impl Seen {
    fn differ(&mut self, label: &str, what: String) {
        // One of each guest is enough.
        if self.differences.len() < 50 && self.differences.last().is_none_or(|last| !last.starts_with(label)) {
            self.differences.push(format!("{label}: {what}"));
        }
    }

    /// Fails if anything differs, with everything that does.
    fn check(&self) {
        assert!(self.differences.is_empty(), "{} differences:\n{}", self.differences.len(), self.differences.join("\n"));
        println!("{self:?}");
    }
}

/// One damaged guest.
struct Case<'a> {
    label: String,
    guest: Guest<'a>,
    /// As the reference sees it: without the pages that lie outside the memory map.
    reference: Snapshot,
}

impl Case<'_> {
    fn fail(&self, what: &str) -> ! {
        panic!("{}: {what}", self.label);
    }

    /// What every device gets; the tables of each set of tables that is in use, the engine's and the reference's.
    fn states(&self, seen: &mut Seen) -> (Vec<StreamState>, Vec<Found>) {
        if let Err(error) = self.guest.streams()
            && !is_orderly(&error)
        {
            self.fail(&format!("streams: {error}"));
        }
        let mut streams = Vec::new();
        let mut found: Vec<Found> = Vec::new();
        for device in &self.guest.snapshot().devices {
            for pasid in [None, Some(0), Some(1), Some(70), Some(1 << 19)] {
                let stream = self.guest.stream(device.id, pasid);
                if let Err(error) = &stream
                    && !is_orderly(error)
                {
                    self.fail(&format!("device {:#x}: {error}", device.id));
                }
                let expected = match pasid {
                    None => resolve(&self.reference, device.id),
                    Some(pasid) => resolve_pasid(&self.reference, device.id, Some(pasid.into())),
                };
                match same_state(&stream, &expected) {
                    Ok(Some(tables)) if !found.contains(&tables) => found.push(tables),
                    Ok(_) => {}
                    Err(difference) => seen.differ(&self.label, format!("device {:#x}, PASID {pasid:?}: {difference}", device.id)),
                }
                if let Err(difference) = same_intercepts(&stream, &self.reference, device.id, pasid.map(u64::from)) {
                    seen.differ(&self.label, format!("device {:#x}, PASID {pasid:?}: {difference}", device.id));
                }
                seen.states += 1;
                streams.extend(stream.ok());
            }
        }
        (streams, found)
    }

    /// Everything that devices reach through the engine's tables, and the same of the reference's. None if there is too much.
    fn walk(&self, configs: &[TableConfig], expected: &[tables::TableConfig], seen: &mut Seen) -> Option<Vec<Mapping>> {
        let mut space = match self.guest.open(configs) {
            Ok(space) => space,
            Err(error) => self.fail(&format!("a lookup found tables that cannot be opened: {error}")),
        };
        let budget = self.guest.budget();
        let mut collector = Collector::new(space.privileged(), budget.limits().faults);
        let walked = space.walk(&self.guest.memory(), self.guest.map(), Span::ALL, &budget, &mut collector);
        assert!(budget.tables_visited() <= budget.limits().tables && budget.leaves_seen() <= budget.limits().leaves, "{}", self.label);
        assert!(collector.faults().len() <= budget.limits().faults && collector.mappings().len() as u64 <= budget.limits().leaves, "{}", self.label);
        seen.tables += budget.tables_visited();
        seen.faults += collector.fault_count();
        self.explain(&mut space, &collector, seen);
        let whole = match walked {
            Ok(()) => true,
            Err(WalkError::Exhausted(exhausted)) => {
                assert!(exhausted.to_string().starts_with("stopped by budget: more than "), "{}: {exhausted}", self.label);
                seen.exhausted += 1;
                false
            }
            Err(error) => self.fail(&format!("walk: {error}")),
        };
        let walker = Walker::new(&self.reference.memory, expected).unwrap().with_budget(REFERENCE_BUDGET);
        self.translate(&mut space, collector.mappings(), &walker, seen);
        if !whole {
            return None;
        }
        let reference = walker.walk();
        if reference.exhausted {
            return None;
        }
        let expected = clip(&reference.runs, self.guest.map());
        if let Some(difference) = first_difference(collector.mappings(), &expected) {
            seen.differ(&self.label, format!("{}: {difference}", tables_of(configs)));
        }
        seen.mappings += expected.len() as u64;
        Some(expected)
    }

    /// Every fault that an entry caused can be explained, and the worst thing said about it is that fault.
    fn explain(&self, space: &mut AddressSpace, collector: &Collector, seen: &mut Seen) {
        for (span, fault) in collector.faults() {
            let (Some(step), Cause::Entry(_), None) = (fault.path.last(), fault.cause, fault.address) else { continue };
            let findings = space.explain(fault.stage, step).unwrap_or_else(|error| self.fail(&format!("explain: {error}")));
            // What the address bits say of a size is not in the pattern that is explained: AMD's NextLevel 7, RISC-V's N.
            let sized = step.entry.is_some_and(|entry| bits(entry, 11, 9) == 7 || bit(entry, 63));
            if findings.is_empty() && sized {
                continue;
            }
            let worst = findings.first().unwrap_or_else(|| self.fail(&format!("nothing is said about {fault:?} at {span}")));
            assert!(have_reason(space, *span, fault, &findings), "{}: {fault:?} at {span} is explained by {worst:?}", self.label);
            seen.explained += 1;
        }
    }

    /// Single accesses: around the mappings that were found, and anywhere.
    fn translate(&self, space: &mut AddressSpace, mappings: &[Mapping], walker: &Walker<'_>, seen: &mut Seen) {
        let mut rng = Rng::new(self.label.len() as u64 ^ mappings.len() as u64);
        for _ in 0..24 {
            let iova = match mappings.len() {
                0 => absurd(&mut rng),
                count => {
                    let mapping = mappings[rng.below(count as u64) as usize];
                    match rng.below(5) {
                        0 => mapping.iova.first,
                        1 => mapping.iova.last,
                        2 => mapping.iova.first.wrapping_sub(1),
                        3 => mapping.iova.last.wrapping_add(1 + (rng.below(256) << 56)),
                        _ => absurd(&mut rng),
                    }
                }
            };
            for (write, access) in [(false, Access::READ), (true, Access::WRITE)] {
                let found = match self.guest.translate(space, Iova(iova), access) {
                    Ok(found) => found.map(|translation| translation.address.0),
                    Err(error) => self.fail(&format!("translate {iova:#x}: {error}")),
                };
                let expected = walker.translate(iova, write).ok().filter(|address| self.guest.map().target(*address).is_some());
                if found.as_ref().ok() != expected.as_ref() {
                    seen.differ(&self.label, format!("{access} at {iova:#x}: the engine says {found:x?}, the reference {expected:x?}"));
                }
                seen.translations += 1;
            }
        }
    }

    /// Conversion to every format: refused with a reason, or the source's mappings without those that were counted as refused.
    fn convert(&self, streams: &[StreamState], sources: &[(Vec<TableConfig>, Vec<Mapping>)], seen: &mut Seen) {
        let first = self.label.bytes().fold(0, |hash: usize, byte| hash.wrapping_mul(31) ^ usize::from(byte));
        for format in TARGETS.iter().cycle().skip(first % TARGETS.len()).take(TARGETS_OF_A_CASE).copied() {
            let mut target = Target::new(format);
            target.table_bytes = 64 << 20;
            let conversion = match convert(&self.guest, streams, &target, &mut |_, _| {}) {
                Ok(conversion) => conversion,
                Err(ConvertError::Guest(error))
                    if !is_orderly(&error) && !matches!(error, stagecraft::guest::GuestError::Walk(WalkError::Exhausted(_))) =>
                {
                    self.fail(&format!("conversion to {format}: {error}"))
                }
                Err(ConvertError::Build { error: error @ stagecraft::table::BuildError::Nonsense(_), .. }) => {
                    self.fail(&format!("conversion to {format}: {error}"))
                }
                Err(_) => {
                    seen.refused_conversions += 1;
                    continue;
                }
            };
            assert!(conversion.arena.bytes() <= target.table_bytes, "{}", self.label);
            let memory = arena_memory(&conversion.arena);
            for table in &conversion.tables {
                let Some((_, source)) = sources.iter().find(|(configs, _)| *configs == table.source) else { continue };
                let config = reference_config(&table.table).unwrap_or_else(|| self.fail(&format!("conversion made {}", table.table)));
                let walk = Walker::new(&memory, &[config]).unwrap().with_budget(REFERENCE_BUDGET).walk();
                if walk.exhausted {
                    continue;
                }
                assert!(walk.unreadable.is_empty(), "{}: tables outside the converted ones", self.label);
                let converted = clip(&walk.runs, &MemoryMap::everything(64));
                if let Err(what) = compare_converted(source, &converted, table.built.losses.refused_bytes()) {
                    seen.differ(&self.label, format!("{} converted to {format}: {what}", tables_of(&table.source)));
                }
                seen.conversions += 1;
            }
        }
    }
}

/// A conversion maps what its source maps, without what was refused.
fn compare_converted(source: &[Mapping], converted: &[Mapping], refused: u128) -> Result<(), String> {
    if refused == 0 {
        return first_difference(converted, source).map_or(Ok(()), |difference| Err(format!("nothing refused, and {difference}")));
    }
    within(converted, source)?;
    if compare::bytes(source) - compare::bytes(converted) > refused {
        return Err(format!("more is missing than the {refused:#x} bytes that were refused"));
    }
    Ok(())
}

fn tables_of(configs: &[TableConfig]) -> String {
    configs.iter().map(ToString::to_string).collect::<Vec<_>>().join(" then ")
}

/// A hole in the memory map of a generated guest, which is all addresses, for the tables of a conversion.
fn leave_room(snapshot: &mut Snapshot) {
    let hole = (0x10_0000_0000, 0x10_3fff_ffff);
    let [MemoryRange { kind, first: 0, last }] = snapshot.map.as_slice() else { panic!("{:?}", snapshot.map) };
    if *last > hole.1 {
        let range = |first, last| MemoryRange { kind: kind.clone(), first, last };
        snapshot.map = vec![range(0, hole.0 - 1), range(hole.1 + 1, *last)];
    }
}

/// Everything that can be asked about one guest.
fn examine(label: String, snapshot: &Snapshot, folder: &std::path::Path, seen: &mut Seen) {
    let loaded = load(snapshot, folder);
    let mut reference = snapshot.clone();
    reference.memory.pages.retain(|page, _| loaded.map.region(*page).is_some());
    let guest = Guest::new(&loaded, plugins()).unwrap();
    let case = Case { label, guest, reference };
    let (streams, found) = case.states(seen);
    let mut sources = Vec::new();
    for (configs, expected) in found {
        if let Some(mappings) = case.walk(&configs, &expected, seen) {
            sources.push((configs, mappings));
        }
    }
    case.convert(&streams, &sources, seen);
}

#[test]
fn damaged_fixtures() {
    let seed = seed();
    let folder = tempfile::tempdir().unwrap();
    let mut seen = Seen::default();
    for fixture in fixtures::all() {
        let name = &fixture.name;
        let pristine = Snapshot::load(&fixture.path).unwrap();
        let mut rng = Rng::new(seed ^ name.bytes().fold(0, |hash: u64, byte| hash.rotate_left(7) ^ u64::from(byte)));
        // Time is for many small guests rather than for one large one.
        let count = rounds(24).div_ceil(if fixture.big { 12 } else { 1 });
        examine(format!("{name} as it is"), &pristine, folder.path(), &mut seen);
        for round in 0..count {
            let mut snapshot = pristine.clone();
            let what = mutate(&mut snapshot, &mut rng, Words { big_endian: fixture.big_endian(), numbers: name.starts_with("riscv-") });
            let label = format!("{name}, seed {seed:#x}, round {round}: {what}");
            timed(&label.clone(), || examine(label, &snapshot, folder.path(), &mut seen));
        }
    }
    seen.check();
    assert!(seen.mappings > 1000 && seen.explained > 100 && seen.conversions > 50, "{seen:?}");
}

/// Guests whose settings the fixtures do not have: other granules, both halves, big-endian entries, 52-bit addresses, five levels.
#[test]
fn damaged_generated_guests() {
    let seed = seed();
    let folder = tempfile::tempdir().unwrap();
    let mut seen = Seen::default();
    let mut rng = Rng::new(seed);
    for round in 0..rounds(24) {
        for format in Format::ALL {
            let generated = generate(format, rng.number());
            let mut snapshot = generated.snapshot;
            leave_room(&mut snapshot);
            let what = if round % 4 == 0 { "as it is".to_owned() } else { mutate(&mut snapshot, &mut rng, Words::of(&generated.config)) };
            let label = format!("generated {}, seed {seed:#x}, round {round}: {what}", generated.config.format());
            timed(&label.clone(), || examine(label, &snapshot, folder.path(), &mut seen));
        }
    }
    seen.check();
    assert!(seen.mappings > 1000 && seen.explained > 100 && seen.conversions > 50, "{seen:?}");
}

/// Both stages, found through registers, stream tables and PASID tables.
#[test]
fn damaged_guests_with_two_stages() {
    let seed = seed();
    let folder = tempfile::tempdir().unwrap();
    let mut seen = Seen::default();
    let mut rng = Rng::new(seed);
    for round in 0..rounds(40) {
        for (kind, nested) in [
            ("SMMUv3", nested::smmu(rng.number())),
            ("VT-d", nested::vtd(rng.number())),
            ("AMD-Vi", nested::amd(rng.number())),
            ("RISC-V", nested::riscv(rng.number())),
        ] {
            let mut snapshot = nested.snapshot;
            leave_room(&mut snapshot);
            let words = Words { big_endian: false, numbers: kind == "RISC-V" };
            let what = if round % 4 == 0 { "as it is".to_owned() } else { mutate(&mut snapshot, &mut rng, words) };
            let label = format!("{kind} with two stages, seed {seed:#x}, round {round}: {what}");
            timed(&label.clone(), || examine(label, &snapshot, folder.path(), &mut seen));
        }
    }
    seen.check();
    assert!(seen.mappings > 1000 && seen.explained > 100 && seen.conversions > 50, "{seen:?}");
}

/// A unit, and the request that it is made for.
fn own<T>((snapshot, request, _): (Snapshot, units::Request, T)) -> (Snapshot, u64, Option<Option<u64>>) {
    (snapshot, request.id, Some(request.pasid))
}

/// Only what leads to the tables is damaged: stream table entries, context descriptors, context and PASID entries, device table
/// entries, device and process contexts; and what the unit can do is anything.
/// Many more of these, for what a device gets is quickly asked.
#[test]
fn damaged_structures() {
    let seed = seed();
    let folder = tempfile::tempdir().unwrap();
    let mut seen = Seen::default();
    let mut rng = Rng::new(seed);
    for round in 0..rounds(40) {
        let (mut snapshot, id, request) = match round % 10 {
            // The other architectures' units say which request they are made for.
            4 | 9 => own(units::amd_guest(rng.below(1000))),
            5 => own(units::amd_nested(rng.below(1000))),
            6 => own(units::amd_host(rng.below(1000))),
            7 => own(units::riscv_single(false, rng.below(1000))),
            8 => own(units::riscv_nested(rng.below(1000))),
            0 => (units::smmu_single(Format::ArmStage1, rng.below(1000)).0, 0x103, None),
            1 => (units::smmu_single(Format::ArmStage2, rng.below(1000)).0, 0x103, None),
            2 => ((rng.below(1000)..).find_map(units::smmu_nested).unwrap().0, 0x38, None),
            _ => (units::vtd_nested(rng.below(1000)).0, 0x5fe, None),
        };
        snapshot.map = vec![MemoryRange { kind: "ram".to_owned(), first: 0, last: (1 << 52) - 1 }];
        snapshot.devices = vec![Device { label: "0000:00:07.0".to_owned(), id }];
        // Without the tables, except that with two stages a CD, or a directory of processes, is behind the second.
        let is_structure = |page: u64| (units::STRUCTURES..units::STRUCTURES + 0x30_0000).contains(&page);
        let behind = id == 0x38 || matches!(round % 10, 5 | 8);
        let requests: Vec<Option<u64>> = match request {
            Some(pasid) => vec![pasid, pasid, pasid, None, Some(0), Some(70)],
            None => vec![None, None, None, Some(0), Some(70)],
        };
        if !behind {
            snapshot.memory.pages.retain(|page, _| is_structure(*page));
        }
        // The words of structures that are in use.
        let in_use = |page: u64| is_structure(page) || (behind && (0x20_0000_0000..0x20_0100_0000).contains(&page));
        let pages: Vec<u64> = snapshot.memory.pages.keys().copied().filter(|page| in_use(*page)).collect();
        let used = |address: &u64| snapshot.memory.read(*address, false).is_ok_and(|word| word != 0);
        let words: Vec<u64> = pages.iter().flat_map(|page| (0..512).map(move |index| page + index * 8)).filter(used).collect();
        // Written and loaded once; each variant is written into the guest's memory, and taken back.
        let mut loaded = load(&snapshot, folder.path());
        let mut reference = snapshot.clone();
        for variant in 0..400 {
            let mut undo = Vec::new();
            let write = |reference: &mut Snapshot, memory: &PageMemory, at: u64, word: u64| {
                reference.memory.write(at, word, false);
                memory.write_obj(word, GuestAddress(at)).unwrap();
            };
            for _ in 0..rng.below(5) {
                // Structures have up to eight words, of which the first four say most.
                let at = (rng.pick(&words) & !63) + rng.pick(&[0, 0, 1, 1, 2, 2, 3, 4, 5, 7]) * 8;
                let word = reference.memory.read(at, false).unwrap();
                undo.push((at, word));
                write(&mut reference, &loaded.memory, at, word ^ (1 << rng.below(64)));
            }
            // Capabilities that come and go.
            reference.registers = snapshot.registers.clone();
            for name in ["IDR0", "IDR1", "IDR3", "IDR5", "CR2", "CAP", "ECAP", "CONTROL", "EXT_FEATURES", "CAPABILITIES", "FCTL"] {
                let chance = rng.pick(&[0, 0, 2, 5]);
                let Some(register) = reference.registers.get_mut(name) else { continue };
                let damage = (0..64).filter(|_| rng.percent(chance)).fold(0, |bits: u64, bit| bits | 1 << bit);
                // Bits 0 to 3 of IDR0 are the stages and table formats, without which little is left to ask.
                *register ^= if name == "IDR0" && rng.percent(80) { damage & !0xf } else { damage };
            }
            if rng.percent(10) {
                let names: Vec<String> = reference.registers.keys().cloned().collect();
                let name = &names[rng.below(names.len() as u64) as usize];
                reference.registers.insert(name.clone(), absurd(&mut rng));
            }
            let Source::Unit { registers, .. } = &mut loaded.source else { panic!("a unit") };
            *registers = reference.registers.iter().map(|(name, value)| (name.clone(), *value)).collect();
            let guest = Guest::new(&loaded, plugins()).unwrap();
            let pasid = rng.pick(&requests);
            let label = format!("structures, seed {seed:#x}, round {round}.{variant}, PASID {pasid:?}");
            let stream = timed(&label, || guest.stream(id, pasid.map(|pasid| pasid as u32)));
            assert!(stream.as_ref().err().is_none_or(is_orderly), "{label}: {stream:?}");
            let expected = resolve_pasid(&reference, id, pasid);
            if let Err(difference) = same_state(&stream, &expected) {
                seen.differ(&label, difference);
            }
            if let Err(difference) = same_intercepts(&stream, &reference, id, pasid) {
                seen.differ(&label, difference);
            }
            let kind = stream.map_or("refused", |stream| stream.state.as_str());
            *seen.outcomes.entry((pasid.is_some(), kind)).or_insert(0) += 1;
            for (at, word) in undo.into_iter().rev() {
                write(&mut reference, &loaded.memory, at, word);
            }
        }
    }
    seen.check();
    // Not all of them end at the first check.
    for kind in ["translated", "blocked"] {
        assert!(seen.outcomes.get(&(false, kind)).is_some_and(|count| *count > 50), "{:?}", seen.outcomes);
    }
}
