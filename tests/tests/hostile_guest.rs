//! Every fixture, and generated guests of every shape, with random damage: an error or a fault report, never a panic, a hang or unbounded memory. What
//! can be said is compared with the independent reference, which reads the same damaged guest.
#![allow(clippy::unwrap_used)]

mod hostile;

use hostile::compare::{self, clip, first_difference, is_orderly, reference_config, same_state, within};
use hostile::mutate::{absurd, mutate};
use hostile::{fixtures, load, name, nested, plugins, rounds, seed, timed};
use stagecraft::convert::{ConvertError, Target, convert};
use stagecraft::guest::{Guest, StreamState};
use stagecraft::memory::MemoryMap;
use stagecraft::plugin::TableConfig;
use stagecraft::table::{AddressSpace, Arena, Cause, Collector, Mapping, Severity, WalkError};
use stagecraft::{Access, Iova, Span};
use stagecraft_tests::reference::detect::{resolve, resolve_pasid};
use stagecraft_tests::reference::generate::{Format, Rng, generate};
use stagecraft_tests::reference::snapshot::{Memory, MemoryRange, Snapshot};
use stagecraft_tests::reference::tables;
use stagecraft_tests::reference::walk::Walker;

const FORMATS: [&str; 4] = ["arm-smmuv3/stage1", "arm-smmuv3/stage2", "intel-vtd/first-stage", "intel-vtd/second-stage"];

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
    /// Where the engine and the reference disagree.
    differences: Vec<String>,
}

impl Seen {
    fn differ(&mut self, label: &str, what: String) {
        if self.differences.len() < 50 {
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
    fn states(&self, seen: &mut Seen) -> (Vec<StreamState>, Vec<(Vec<TableConfig>, Vec<tables::TableConfig>)>) {
        if let Err(error) = self.guest.streams()
            && !is_orderly(&error)
        {
            self.fail(&format!("streams: {error}"));
        }
        let mut streams = Vec::new();
        let mut found: Vec<(Vec<TableConfig>, Vec<tables::TableConfig>)> = Vec::new();
        for device in &self.guest.snapshot().devices {
            for pasid in [None, Some(0), Some(1), Some(77), Some(1 << 19)] {
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
            let (Some(step), Cause::Entry(kind), None) = (fault.path.last(), fault.cause, fault.address) else { continue };
            let findings = space.explain(fault.stage, step).unwrap_or_else(|error| self.fail(&format!("explain: {error}")));
            let worst = findings.first().unwrap_or_else(|| self.fail(&format!("nothing is said about {fault:?} at {span}")));
            assert!(worst.severity == Severity::Error && worst.kind == kind, "{}: {fault:?} is explained by {worst:?}", self.label);
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
        for format in FORMATS {
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
                let converted = clip(&walk.runs, &MemoryMap::everything(52));
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

fn arena_memory(arena: &Arena) -> Memory {
    let mut memory = Memory::default();
    for (address, words) in arena.pages() {
        let mut page = [0; 4096];
        for (bytes, word) in page.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
        memory.pages.insert(address.0, page);
    }
    memory
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
    let fixtures = fixtures();
    for path in &fixtures {
        let pristine = Snapshot::load(path).unwrap();
        let mut rng = Rng::new(seed ^ name(path).len() as u64);
        // Time is for many small guests rather than for one large one.
        let count = rounds(40).div_ceil(1 + pristine.memory.pages.len() as u64 / 500);
        examine(format!("{} as it is", name(path)), &pristine, folder.path(), &mut seen);
        for round in 0..count {
            let mut snapshot = pristine.clone();
            let what = mutate(&mut snapshot, &mut rng, false);
            let label = format!("{}, seed {seed:#x}, round {round}: {what}", name(path));
            timed(&label.clone(), || examine(label, &snapshot, folder.path(), &mut seen));
        }
    }
    seen.check();
    assert!(fixtures.is_empty() || seen.mappings > 1000 && seen.explained > 100 && seen.conversions > 50, "{seen:?}");
}

/// Guests whose settings the fixtures do not have: other granules, both halves, big-endian entries, 52-bit addresses, five levels.
#[test]
fn damaged_generated_guests() {
    let seed = seed();
    let folder = tempfile::tempdir().unwrap();
    let mut seen = Seen::default();
    let mut rng = Rng::new(seed);
    for round in 0..rounds(60) {
        for format in Format::ALL {
            let generated = generate(format, rng.number());
            let mut snapshot = generated.snapshot;
            leave_room(&mut snapshot);
            let what = if round % 4 == 0 { "as it is".to_owned() } else { mutate(&mut snapshot, &mut rng, generated.config.big_endian()) };
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
    for round in 0..rounds(60) {
        for (kind, nested) in [("SMMUv3", nested::smmu(rng.number())), ("VT-d", nested::vtd(rng.number()))] {
            let mut snapshot = nested.snapshot;
            leave_room(&mut snapshot);
            let what = if round % 4 == 0 { "as it is".to_owned() } else { mutate(&mut snapshot, &mut rng, false) };
            let label = format!("{kind} with two stages, seed {seed:#x}, round {round}: {what}");
            timed(&label.clone(), || examine(label, &snapshot, folder.path(), &mut seen));
        }
    }
    seen.check();
    assert!(seen.mappings > 1000 && seen.explained > 100 && seen.conversions > 50, "{seen:?}");
}
