//! A model of everything: random guests of every format, of one stage or two, on hosts of every kind map, unmap, split, merge, move and share tables while devices and
//! PASIDs of them come and go, memory comes and goes, the guest moves to another host, there is little room, and calls of the kernel fail. After each synchronisation
//! point simulated DMA, whose caches forget nothing by themselves, gets what an independent reader finds in the guest's tables; between two of them nothing that the
//! tables did not say at some moment since the last one. After a failure nobody gets more than that, and when it is over all get it again.
//!
//! Marks of what devices did get into the guest's tables, into entries that point to tables as well: none is missing there, and nothing else has changed.
//!
//! The same guests have a vIOMMU in a second test: they write structures and commands, and nobody calls an IOASID. Their devices have PASIDs, a first stage, a second one or
//! both, and wait for pages; what each is to get is found in structures and tables alone. What they are refused is told in records of the guest's architecture, as the
//! specification has them: also where a bit of an entry or a structure is not as the guest meant it.
//!
//! `STAGECRAFT_SEEDS=n` runs n seeds per format instead of the few of the short run; a failure names its format and seed, and what proptest shrank it to.
//! `STAGECRAFT_SEED=n` runs that one alone, or with `STAGECRAFT_SEEDS` so many from that one on. `STAGECRAFT_FIRST=1` ends with the first failure, as it was found:
//! for whoever only wants to know whether there is one.
#![allow(clippy::unwrap_used)]

mod compare;
#[path = "../configs/mod.rs"]
mod configs;
mod coverage;
mod failing;
mod fixed;
mod front;
mod guest;
#[allow(dead_code)]
#[path = "../viommu/guests.rs"]
mod guests;
mod machine;
mod manage;
mod marking;
mod operation;
mod session;
mod tell;

use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::test_runner::{Config, RngSeed, TestCaseError, TestError, TestRunner};
use stagecraft::ioasid::Strategy;
use stagecraft_tests::reference::generate::Format;

use crate::coverage::Coverage;
use crate::front::Front;
use crate::guests::Arch;
use crate::machine::HOSTS;
use crate::operation::{Edit, Failing, Operation, Setup, Telling, cases};
use crate::session::Session;

/// Operations of a case, at most.
const OPERATIONS: usize = 120;
/// Seeds of a short run.
const FEW: u64 = 40;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|number| number.parse().ok())
}

fn run(format: Format, setup: Setup, operations: &[Operation], coverage: &Coverage) -> Result<(), String> {
    go_through(Session::new(format, setup, coverage)?, operations)
}

fn go_through(mut session: Session<'_>, operations: &[Operation]) -> Result<(), String> {
    for operation in operations {
        session.run(*operation)?;
    }
    session.finish()
}

/// What a guest goes through with a vIOMMU.
fn queue(arch: Arch, setup: Setup, operations: &[Operation], coverage: &Coverage) -> Result<(), String> {
    let mut front = Front::new(arch, setup, coverage)?;
    operations.iter().try_for_each(|operation| front.run(*operation))?;
    front.finish()
}

/// Whether the first failure is enough, and need not be shrunk.
fn is_first_enough() -> bool {
    number("STAGECRAFT_FIRST").is_some_and(|number| number != 0)
}

/// One seed; what failed, in as few operations as could be found.
fn seed(what: &str, seed: u64, mix: u64, run: impl Fn(Setup, &[Operation]) -> Result<(), String>) -> Result<(), String> {
    let config = Config {
        cases: 1,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(seed ^ mix << 32),
        max_shrink_iters: if is_first_enough() { 0 } else { 2048 },
        max_shrink_time: 60_000,
        ..Config::default()
    };
    let mut runner = TestRunner::new(config);
    let result = runner.run(&cases(OPERATIONS), |(setup, operations)| run(setup, &operations).map_err(TestCaseError::fail));
    result.map_err(|error| match error {
        TestError::Fail(reason, (setup, operations)) => format!("{what}, STAGECRAFT_SEED={seed}: {reason}\n{setup:?}\n{operations:?}"),
        TestError::Abort(reason) => format!("{what}, STAGECRAFT_SEED={seed}: {reason}"),
    })
}

/// Which seeds are run: that which was asked for, as many as were asked for, or a few.
fn seeds(few: u64) -> std::ops::Range<u64> {
    match number("STAGECRAFT_SEED") {
        Some(seed) => seed..seed + number("STAGECRAFT_SEEDS").unwrap_or(1),
        None => 0..number("STAGECRAFT_SEEDS").unwrap_or(few),
    }
}

/// Runs all on two threads; what failed.
fn each<T: Copy + Sync>(all: &[(T, u64)], run: impl Fn(T, u64) -> Result<(), String> + Sync) -> Vec<String> {
    let next = AtomicUsize::new(0);
    let most = if is_first_enough() { 0 } else { 3 };
    let work = || {
        let mut failed = Vec::new();
        while let Some((of, number)) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
            // A long run says it at once.
            failed.extend(run(*of, *number).inspect_err(|error| println!("{error}")).err());
            if failed.len() > most {
                // Nobody begins another one if that was enough.
                next.fetch_add(if most == 0 { all.len() } else { 0 }, Ordering::Relaxed);
                break;
            }
        }
        failed
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..2).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn simulated_hardware_has_what_a_naive_walk_of_the_guests_tables_has() {
    let (coverage, seeds) = (Coverage::default(), seeds(FEW));
    let all: Vec<(Format, u64)> = seeds.clone().flat_map(|seed| Format::ALL.map(|format| (format, seed))).collect();
    let failed = each(&all, |format, number| {
        seed(&format!("{format:?}"), number, format as u64, |setup, operations| run(format, setup, operations, &coverage))
    });
    coverage.print();
    assert!(failed.is_empty(), "{}", failed.join("\n\n"));
    if seeds.end - seeds.start > 1 {
        assert_exercised(&coverage, seeds.end - seeds.start);
    }
}

#[test]
fn hardware_has_it_too_when_all_is_said_in_queues_and_structures() {
    let (coverage, seeds) = (Coverage::default(), seeds(FEW));
    let all: Vec<(Arch, u64)> = seeds.flat_map(|seed| Arch::ALL.map(|arch| (arch, seed))).collect();
    let failed = each(&all, |arch, number| {
        seed(&format!("vIOMMU {arch:?}"), number, 16 + arch as u64, |setup, operations| queue(arch, setup, operations, &coverage))
    });
    coverage.print();
    assert!(failed.is_empty(), "{}", failed.join("\n\n"));
    if all.len() > 4 * 8 {
        assert_front_exercised(&coverage);
    }
}

/// Seeds that found something, in the library or in what it is compared with, beyond those of a short run.
#[test]
fn seeds_that_found_something() {
    let coverage = Coverage::default();
    for (format, number) in [(Format::VtdFirst, 910_288), (Format::VtdFirst, 910_469)] {
        seed(&format!("{format:?}"), number, format as u64, |setup, operations| run(format, setup, operations, &coverage)).unwrap();
    }
    let (smmu, vtd) = (Arch::Smmu, Arch::Vtd);
    for (arch, number) in [(smmu, 900_092), (smmu, 900_157), (smmu, 910_176), (vtd, 900_128), (vtd, 900_224)] {
        seed(&format!("vIOMMU {arch:?}"), number, 16 + arch as u64, |setup, operations| queue(arch, setup, operations, &coverage)).unwrap();
    }
    assert!(coverage.of("compared") > 0 && coverage.of("vIOMMU: compared") > 0);
}

/// Every kind of guest and host, every change of structures and every way of asking for pages was there, and next to nothing was refused.
fn assert_front_exercised(coverage: &Coverage) {
    let often = |what: &str| assert!(coverage.of(&format!("vIOMMU: {what}")) > 0, "{what}: never");
    ["map", "tell", "switch", "attach", "detach", "memory", "failures, sprung"].into_iter().for_each(often);
    ["nothing", "everything", "the first stage", "the second stage", "both stages"].iter().for_each(|to| often(&format!("switch to {to}")));
    ["context added", "context changed", "context cleared", "structures moved", "requests without PASID go otherwise"].into_iter().for_each(often);
    ["command left out", "structures are elsewhere behind the second stage"].into_iter().for_each(often);
    for arch in Arch::ALL {
        [" with PASID", " of two stages", " of two stages with PASID", " of a second stage"]
            .iter()
            .for_each(|kind| often(&format!("{arch:?}{kind}")));
        often(&format!("page request of {arch:?}"));
        ["", " of a damaged entry", " of a damaged structure", " of a stranger"].iter().for_each(|what| often(&format!("event of {arch:?}{what}")));
    }
    for who in ["", " for a PASID"] {
        ["mapped", "not mapped"].iter().for_each(|said| often(&format!("page request{who} asked of the guest, and {said}")));
    }
    often("page request answered by tables");
    for host in HOSTS {
        for stages in ["", " of two stages", " of a second stage"] {
            often(&format!("{}{stages} on {host}", Strategy::Nested));
            often(&format!("{}{stages} on {host}", Strategy::Areas));
        }
        ["", " of two stages"].iter().for_each(|stages| often(&format!("{}{stages} for a PASID on {host}", Strategy::Areas)));
    }
    ["", " of two stages"].iter().for_each(|stages| often(&format!("{}{stages} for a PASID on VT-d", Strategy::Nested)));
    let (compared, refused) = (coverage.of("vIOMMU: compared"), coverage.all("vIOMMU: refused"));
    assert!(refused * 10_000 < compared, "{refused} were refused, {compared} compared");
}

/// Every format, host, strategy, operation and way of telling was there, and next to nothing was passed over.
fn assert_exercised(coverage: &Coverage, seeds: u64) {
    let often = |what: String, least: u64| {
        let count = coverage.of(&what);
        assert!(count >= least, "{what}: {count}, and not {least}");
    };
    Format::ALL.iter().for_each(|format| often(format!("format {format:?}"), seeds));
    // Each strategy on each host that has it: what is native there is one format of thirteen.
    for host in HOSTS {
        often(format!("{} on {host}", Strategy::Native), seeds);
        often(format!("{} on {host}", Strategy::Nested), 20 * seeds);
        often(format!("{} on {host}", Strategy::Areas), 20 * seeds);
    }
    Edit::NAMES.iter().for_each(|name| often(format!("operation {name}"), 3 * seeds));
    Edit::NAMES.iter().for_each(|name| often(format!("operation second stage: {name}"), seeds / 4));
    // What is to fail is counted where it does.
    Operation::NAMES.iter().filter(|name| !matches!(**name, "fail")).for_each(|name| often(format!("operation {name}"), seeds / 2));
    Telling::ALL.iter().for_each(|telling| often(format!("telling {telling:?} something"), seeds));
    ["a root", "no table"].iter().for_each(|what| often(format!("switch to {what}"), seeds));
    // What the host has less of than the guest is a small part.
    let (compared, less) = (coverage.of("compared"), coverage.all("less: "));
    assert!(compared >= 20_000 * seeds && less < compared / 50, "{compared} compared, and {less} are less");
    // A host that the guest moved to may have nothing of what the request allows: nothing else is refused.
    let known = ["attachments refused: Strategy", "switches refused: Strategy"];
    let known = known.map(|what| coverage.of(what)).iter().sum::<u64>();
    let refused = ["attachments refused", "switches refused", "better strategies refused"].map(|what| coverage.all(what)).iter().sum::<u64>();
    assert!(refused == known && refused < seeds, "{refused} refused, of which {known} are known to be");
    // PASIDs need a unit that gives some away beside a user's table, or areas.
    HOSTS.iter().for_each(|host| often(format!("PASIDs on {host}"), seeds / 2));
    often("recovered".to_owned(), 10 * seeds);
    ["leaves marked", "pointers marked", "marked for what is gone", "pages left without marks"]
        .iter()
        .for_each(|what| often((*what).to_owned(), seeds));
    ["moved to another host", "memory with tables went", "page requests served", "for want of room", "entries blocked"]
        .iter()
        .for_each(|what| often((*what).to_owned(), seeds / 2));
    [Failing::Nth, Failing::From, Failing::Step]
        .iter()
        .for_each(|failing| assert!(coverage.all(&format!("failure {failing:?}")) >= 2 * seeds, "{failing:?}"));
    HOSTS.iter().for_each(|host| often(format!("{} of two stages on {host}", Strategy::Nested), seeds));
}
