//! What came of a run, in words and as JSON.

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde_json::{Map, Value, json};
use stagecraft::kernel::sim::Call;

use super::machine::Machine;
use super::play::Played;
use super::scenario::Scenario;
use super::vmm;
use super::workload::Kind;
use crate::json;
use crate::output::{BAD, Columns, DIM, GOOD, HEAD, count, counted, human, printable, raw, size};

/// A run, for whoever prints or draws it.
#[derive(Debug)]
pub struct Report {
    title: String,
    seed: u64,
    guest: String,
    workload: &'static str,
    strategies: Vec<(String, Vec<String>, String)>,
    /// What went through the guest's queues, if its driver works with a unit.
    queues: Option<vmm::Figures>,
    out: Option<String>,
    /// The figures.
    pub played: Played,
}

impl Report {
    /// While the machine is still there.
    pub fn new(scenario: &Scenario, machine: &Machine, played: Played, out: Option<&Path>) -> Self {
        let typed = if scenario.unit().is_none() && !scenario.is_requests() { " (typed)" } else { "" };
        let announces = scenario.guest.announces.map_or(String::new(), |announces| format!(", announces {}{typed}", announces.as_str()));
        let strategies = machine.seats.iter().map(|seat| {
            let strategies = seat.ioasid.strategies().iter().map(|strategy| format!("{strategy:?}").to_lowercase()).collect();
            (seat.label.clone(), strategies, seat.explanation.clone())
        });
        Self {
            title: scenario.title.clone(),
            seed: scenario.seed,
            guest: format!("{}, {} of memory{announces}", machine.tables, size(scenario.guest.memory.0.into())),
            workload: scenario.workload.as_str(),
            strategies: strategies.collect(),
            queues: machine.vmm.as_ref().map(|vmm| vmm.figures),
            out: out.map(|out| out.display().to_string()),
            played,
        }
    }

    /// How each device gets the guest's mappings: the first line of each explanation.
    pub fn strategies(&self) -> Vec<&str> {
        self.strategies.iter().filter_map(|(_, _, explanation)| explanation.lines().next()).collect()
    }

    /// Time that the host's part took, of all operations.
    fn host_time(&self) -> Duration {
        self.played.latencies.values().map(super::figures::Latencies::total).sum()
    }

    fn per_second(&self, time: Duration) -> f64 {
        let seconds = time.as_secs_f64();
        if seconds > 0.0 { self.played.operations as f64 / seconds } else { 0.0 }
    }

    /// Kernel calls of the operations.
    fn calls(&self) -> u64 {
        self.played.calls.values().sum()
    }

    /// Prints it.
    pub fn print(&self, as_json: bool) -> Result<()> {
        if as_json {
            let mut out = raw();
            writeln!(out, "{:#}", self.json())?;
            return Ok(out.flush()?);
        }
        self.write(&mut human())
    }

    fn write(&self, out: &mut impl Write) -> Result<()> {
        let Played { operations, elapsed, checks, most, questions, .. } = &self.played;
        writeln!(out, "{HEAD}{}{HEAD:#} {DIM}(seed {}){DIM:#}", printable(&self.title), self.seed)?;
        writeln!(out, "guest {}; {}", printable(&self.guest), self.workload)?;
        for (_, _, explanation) in &self.strategies {
            for line in explanation.lines() {
                let indent = if line.starts_with(' ') { "  " } else { "" };
                writeln!(out, "{indent}{}", printable(line))?;
            }
        }
        writeln!(out)?;
        let mut rows = Columns::new(0, &["OPERATION", "COUNT", "MEDIAN", "99TH", "WORST"]).right(&[1, 2, 3, 4]);
        for (kind, latencies) in &self.played.latencies {
            let Some([median, high, worst]) = latencies.quantiles() else { continue };
            let cells = [kind.as_str().to_owned(), count(latencies.count()), time(median), time(high), time(worst)];
            rows.row(cells.map(Into::into));
        }
        rows.write(out)?;
        let rates = [self.host_time(), *elapsed].map(|time| count(self.per_second(time) as u64));
        writeln!(out)?;
        writeln!(out, "{} operations in {}: {}/s, with the guest's part and all checks", count(*operations), time(*elapsed), rates[1])?;
        writeln!(out, "host          {} for its part: {}/s", time(self.host_time()), rates[0])?;
        let calls: Vec<String> = self.played.calls.iter().map(|(call, number)| format!("{} {}", count(*number), name(*call))).collect();
        let calls = if calls.is_empty() { "none".to_owned() } else { calls.join(", ") };
        let per_operation = self.calls() as f64 / (*operations).max(1) as f64;
        writeln!(out, "kernel calls  {calls}: {per_operation:.3} per operation; {} before", self.played.calls_before)?;
        if let Some(queues) = &self.queues {
            let (batches, events) = (counted(queues.batches, "batch", "batches"), counted(queues.events, "event record", "event records"));
            writeln!(out, "guest queues  {batches} of commands, {} in all, and {events} read", size(queues.command_bytes.into()))?;
        }
        writeln!(out, "plugin calls  {}; {} before", counted(questions.1, "question", "questions"), questions.0)?;
        writeln!(
            out,
            "memory        at most {} mapped, {} of guest tables, {} for host tables, {}, {} pinned",
            size(most.mapped.into()),
            size(most.guest_tables.into()),
            size(most.host_tables.into()),
            counted(most.areas, "area", "areas"),
            size(u128::from(most.pinned) << 12)
        )?;
        match &self.played.violation {
            None => writeln!(out, "{GOOD}checks        {} DMAs, each as it should be{GOOD:#}", count(*checks))?,
            Some(_) => writeln!(out, "{BAD}checks        {} DMAs, the last one not as it should be{BAD:#}", count(*checks))?,
        }
        if let Some(path) = &self.out {
            writeln!(out, "{GOOD}written: {}{GOOD:#}", printable(path))?;
        }
        Ok(out.flush()?)
    }

    fn json(&self) -> Value {
        let played = &self.played;
        let kind = |kind: &Kind| {
            let latencies = played.latencies.get(kind)?;
            let [median, high, worst] = latencies.quantiles()?.map(|time| time.as_nanos() as u64);
            let value = json!({"count": latencies.count(), "median_ns": median, "p99_ns": high, "worst_ns": worst});
            Some((kind.as_str().to_owned(), value))
        };
        let devices = self
            .strategies
            .iter()
            .map(|(label, strategies, explanation)| json!({"label": label, "strategies": strategies, "explanation": explanation}));
        let calls: Map<String, Value> = played.calls.iter().map(|(call, number)| (name(*call), Value::from(*number))).collect();
        json!({
            "version": json::VERSION,
            "title": self.title,
            "seed": self.seed,
            "guest": self.guest,
            "workload": self.workload,
            "commands": if self.queues.is_some() { "raw" } else { "typed" },
            "queues": self.queues.map(|queues| json!({"batches": queues.batches, "command_bytes": queues.command_bytes, "events": queues.events})),
            "devices": devices.collect::<Vec<_>>(),
            "operations": played.operations,
            "seconds": played.elapsed.as_secs_f64(),
            "host_seconds": self.host_time().as_secs_f64(),
            "kinds": Kind::ALL.iter().filter_map(kind).collect::<Map<_, _>>(),
            "kernel_calls": {"before": played.calls_before, "during": self.calls(), "by_kind": calls},
            "questions": {"before": played.questions.0, "during": played.questions.1},
            "memory": {
                "mapped": played.most.mapped,
                "guest_tables": played.most.guest_tables,
                "host_tables": played.most.host_tables,
                "areas": played.most.areas,
                "pinned": played.most.pinned << 12,
            },
            "checks": played.checks,
            "violation": played.violation,
            "out": self.out,
        })
    }
}

/// A kernel call as the kernel's interface names it.
fn name(call: Call) -> String {
    let mut name = String::new();
    for c in format!("{call:?}").chars() {
        if c.is_ascii_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(c.to_ascii_lowercase());
    }
    name
}

/// A time with three digits.
pub fn time(time: Duration) -> String {
    let nanoseconds = time.as_nanos() as f64;
    let (value, unit) = match nanoseconds {
        ..1e3 => return format!("{nanoseconds} ns"),
        ..1e6 => (nanoseconds / 1e3, "us"),
        ..1e9 => (nanoseconds / 1e6, "ms"),
        _ => (nanoseconds / 1e9, "s"),
    };
    let digits = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
    format!("{value:.digits$} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_three_digits() {
        let text = |nanoseconds| time(Duration::from_nanos(nanoseconds));
        assert_eq!(
            [0, 999, 1000, 12_345, 123_456, 7_654_321, 65_000_000_000].map(text),
            ["0 ns", "999 ns", "1.00 us", "12.3 us", "123 us", "7.65 ms", "65.0 s"]
        );
    }

    #[test]
    fn calls_have_the_kernels_names() {
        assert_eq!([name(Call::Map), name(Call::HwptAlloc)], ["map", "hwpt_alloc"]);
    }
}
