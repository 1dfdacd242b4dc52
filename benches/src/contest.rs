//! Contestants one after the other under criterion, and then in turn, for ratios that a busy machine does not bend.

use std::time::Duration;

use criterion::{Criterion, Throughput};
use rustix::time::{ClockId, clock_gettime};

/// Something that converts once per call.
pub struct Contestant<'a> {
    name: &'static str,
    run: Box<dyn FnMut() + 'a>,
}

impl std::fmt::Debug for Contestant<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Contestant").field("name", &self.name).finish_non_exhaustive()
    }
}

impl<'a> Contestant<'a> {
    /// A contestant.
    pub fn new(name: &'static str, run: impl FnMut() + 'a) -> Self {
        Self { name, run: Box::new(run) }
    }
}

/// Whether this is a measurement, and not a test that everything still runs.
#[must_use]
pub fn is_measuring() -> bool {
    std::env::args().any(|argument| argument == "--bench")
}

/// Whether the command line asks for this group: names on it are those of groups, of contestants in them (`GROUP/CONTESTANT`), or parts.
#[must_use]
pub fn is_wanted(group: &str) -> bool {
    let names: Vec<String> = std::env::args().skip(1).filter(|argument| argument.parse::<f64>().is_err() && !argument.starts_with('-')).collect();
    names.is_empty() || names.iter().any(|name| group.contains(name.split('/').next().unwrap_or_default()))
}

/// Runs in one turn of a contestant; the first is not counted.
const RUNS: u32 = 4;

/// Measures all contestants under criterion, and then in turn; prints for each the median time per entry, and the median of its ratio to the first one's
/// time in the same round.
pub fn contest(criterion: &mut Criterion, name: &str, entries: u64, rounds: usize, contestants: &mut [Contestant<'_>]) {
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Elements(entries)).sample_size(20);
    group.warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(800));
    for contestant in &mut *contestants {
        group.bench_function(contestant.name, |bencher| bencher.iter(|| (contestant.run)()));
    }
    group.finish();
    if !is_measuring() || std::env::args().any(|argument| argument == "--profile-time") {
        return;
    }
    let rounds: Vec<Vec<f64>> = (0..rounds).map(|_| contestants.iter_mut().map(turn).collect()).collect();
    println!("\n{name}: {entries} entries, medians of {} rounds in turn", rounds.len());
    println!("{:<34}{:>12}{:>14}{:>22}", "", "us", "ns per entry", "times the first");
    for (index, contestant) in contestants.iter().enumerate() {
        let time = median(rounds.iter().map(|round| round[index]));
        let ratio = median(rounds.iter().map(|round| round[index] / round[0]));
        println!("{:<34}{:>12.1}{:>14.3}{:>22.2}", contestant.name, time / 1e3, time / entries as f64, ratio);
    }
    println!();
}

/// For each contestant the median, over some rounds in turn, of its ratio to the first one's time in the same round.
pub fn in_turn(rounds: usize, contestants: &mut [Contestant<'_>]) -> Vec<f64> {
    let rounds: Vec<Vec<f64>> = (0..rounds).map(|_| contestants.iter_mut().map(turn).collect()).collect();
    (0..contestants.len()).map(|index| median(rounds.iter().map(|round| round[index] / round[0]))).collect()
}

/// Nanoseconds of processor time of one run: the machine may have other work.
fn turn(contestant: &mut Contestant<'_>) -> f64 {
    (contestant.run)();
    let start = processor_time();
    (1..RUNS).for_each(|_| (contestant.run)());
    processor_time().saturating_sub(start).as_nanos() as f64 / f64::from(RUNS - 1)
}

/// Processor time that this thread has used.
#[must_use]
pub fn processor_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
