//! Plays a scenario: operation by operation, each of them measured and checked.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use stagecraft::kernel::sim::Call;
use stagecraft::table::Piece;
use stagecraft::{Attributes, Change};

use super::chance::Chance;
use super::figures::{Course, Latencies};
use super::machine::{Machine, Seat};
use super::scenario::{MOST_OPERATIONS, Scenario};
use super::workload::Kind;

/// Granularity of checks: the smallest page that there is.
const STEP: u64 = 4096;

/// What came of it.
#[derive(Debug)]
pub struct Played {
    /// Operations that were done.
    pub operations: u64,
    /// From the first operation to the last, with the guest's part and the checks.
    pub elapsed: Duration,
    /// The host's part of each operation.
    pub latencies: BTreeMap<Kind, Latencies>,
    /// Over time.
    pub course: Course,
    /// Kernel calls before the first operation.
    pub calls_before: u64,
    /// Kernel calls of the operations.
    pub calls: BTreeMap<Call, u64>,
    /// Questions that plugins were asked before, and by the operations.
    pub questions: (u64, u64),
    /// The most that there was at a time.
    pub most: Most,
    /// DMAs that were looked at.
    pub checks: u64,
    /// What went wrong first: the run ends with it.
    pub violation: Option<String>,
}

/// The most that there was at a time. All but the first are looked at now and then, and at the end.
#[derive(Clone, Copy, Debug, Default)]
pub struct Most {
    /// Bytes that were mapped.
    pub mapped: u64,
    /// Bytes of the guest's tables.
    pub guest_tables: u64,
    /// Bytes for host tables.
    pub host_tables: u64,
    /// Areas of the kernel's.
    pub areas: u64,
    /// Pages of 4 KiB that are pinned.
    pub pinned: u64,
}

/// So many operations are between two looks at memory.
const LOOK: u64 = 64;

/// What is mapped for a device, as the guest's driver means it.
type Truth = BTreeMap<u64, Piece>;

/// Plays it to its end, or to the first violation.
pub fn play(scenario: &Scenario, machine: &mut Machine) -> Result<Played> {
    let mut chance = Chance::new(scenario.seed);
    let mut truths = vec![Truth::new(); machine.seats.len()];
    let before = (machine.sim.calls(), machine.stats().questions);
    let mut played = Played {
        operations: 0,
        elapsed: Duration::ZERO,
        latencies: BTreeMap::new(),
        course: Course::new(),
        calls_before: before.0.values().sum(),
        calls: BTreeMap::new(),
        questions: (before.1, 0),
        most: Most::default(),
        checks: 0,
        violation: None,
    };
    let (most, limit) = (scenario.operations.unwrap_or(MOST_OPERATIONS), scenario.seconds.map(Duration::from_secs_f64));
    let mut mapped = 0;
    let start = Instant::now();
    while played.operations < most && limit.is_none_or(|limit| start.elapsed() < limit) && played.violation.is_none() {
        let index = (played.operations % truths.len() as u64) as usize;
        let seat = &mut machine.seats[index];
        let (kind, changes) = seat.workload.next(&mut chance);
        let place = || format!("operation {} ({}) of device {}", played.operations + 1, kind.as_str(), seat.label);
        seat.driver.write(&changes, machine.vmm.as_mut().map(|vmm| (vmm, index))).with_context(place)?;
        let calls = machine.sim.calls_total();
        let told = Instant::now();
        let result = seat.driver.tell(&machine.context, &seat.ioasid, machine.vmm.as_mut());
        let latency = told.elapsed();
        result.with_context(place)?;
        seat.driver.done();
        let calls = machine.sim.calls_total() - calls;
        mapped = remember(&mut truths[index], &changes, mapped);
        played.operations += 1;
        played.latencies.entry(kind).or_default().add(latency);
        played.course.add(start.elapsed(), kind, latency, calls, mapped);
        played.most.mapped = played.most.mapped.max(mapped);
        if played.operations % LOOK == 1 {
            look(machine, &mut played.most);
        }
        let mut check = Check { machine, seat: &machine.seats[index], truth: &truths[index], checks: 0, refused: None };
        let mut wrong = check.operation(&changes, &mut chance);
        played.checks += check.checks;
        // What the guest is told of the first DMA that was refused.
        if let (None, Some((iova, writes)), Some(vmm)) = (&wrong, check.refused, &mut machine.vmm) {
            let what = if writes { "write" } else { "read" };
            wrong = vmm.refused(index, iova, writes).err().map(|error| format!("a {what} at IOVA {iova:#x} was refused, and {error}"));
        }
        played.violation =
            wrong.map(|wrong| format!("operation {} ({}), device {}: {wrong}", played.operations, kind.as_str(), machine.seats[index].label));
    }
    played.elapsed = start.elapsed();
    look(machine, &mut played.most);
    for (call, count) in machine.sim.calls() {
        let during = count - before.0.get(&call).copied().unwrap_or(0);
        if during > 0 {
            played.calls.insert(call, during);
        }
    }
    played.questions.1 = machine.stats().questions - before.1;
    Ok(played)
}

fn look(machine: &Machine, most: &mut Most) {
    let stats = machine.stats();
    most.guest_tables = most.guest_tables.max(machine.seats.iter().map(|seat| seat.driver.table_bytes()).sum());
    most.host_tables = most.host_tables.max(stats.table_bytes);
    most.areas = most.areas.max(stats.areas);
    most.pinned = most.pinned.max(machine.sim.pinned_pages());
}

/// Makes the changes, and says how many bytes are mapped then.
fn remember(truth: &mut Truth, changes: &[Change], mut mapped: u64) -> u64 {
    for change in changes {
        let bytes = change.span().length_minus_one() + 1;
        match change {
            Change::Map(piece) => {
                truth.insert(piece.iova.first, *piece);
                mapped += bytes;
            }
            Change::Unmap(span) => {
                truth.remove(&span.first);
                mapped -= bytes;
            }
        }
    }
    mapped
}

/// Looks at what a device reaches.
struct Check<'a> {
    machine: &'a Machine,
    seat: &'a Seat,
    truth: &'a Truth,
    checks: u64,
    /// The first DMA that was refused as it is to be: its IOVA, and whether it wrote.
    refused: Option<(u64, bool)>,
}

impl Check<'_> {
    /// Every page that the operation touched, and one at random among the others: what is wrong first.
    fn operation(&mut self, changes: &[Change], chance: &mut Chance) -> Option<String> {
        let touched = changes.iter().map(Change::span).flat_map(|span| (span.first..=span.last).step_by(STEP as usize));
        let ends = self.truth.first_key_value().zip(self.truth.last_key_value());
        let other = ends.map(|((first, _), (last, _))| (first + chance.below(last - first + STEP)) & !(STEP - 1));
        touched.chain(other).find_map(|iova| self.page(iova))
    }

    fn page(&mut self, iova: u64) -> Option<String> {
        let piece = self.truth.range(..=iova).next_back().map(|(_, piece)| piece).filter(|piece| piece.iova.contains(iova));
        let expected = |flag| piece.filter(|piece| piece.attributes.contains(flag)).map(|piece| piece.address + (iova - piece.iova.first));
        for (writes, what, flag) in [(false, "read", Attributes::READ), (true, "write", Attributes::WRITE)] {
            self.checks += 1;
            let (expected, found) = (expected(flag), self.seat.dma(self.machine, iova, writes));
            if expected != found {
                let expected = expected.map_or("is to be refused".to_owned(), |address| format!("is to reach guest memory at {address:#x}"));
                let found = match found {
                    None => "was refused".to_owned(),
                    Some(u64::MAX) => "reached what is no memory of the guest".to_owned(),
                    Some(address) => format!("reached {address:#x}"),
                };
                return Some(format!("a {what} at IOVA {iova:#x} {expected}, and {found}"));
            }
            if found.is_none() {
                self.refused.get_or_insert((iova, writes));
            }
        }
        None
    }
}
