//! `stagecraft run`: plays a scenario on a simulated host.
//!
//! | module | idea |
//! |---|---|
//! | `scenario` | the file |
//! | `machine` | the simulated host, the guest's memory, address spaces |
//! | `guest` | the guest's driver: tables in guest memory, or requests; and what it announces |
//! | `unit` | what the driver knows of its IOMMU: registers, structures, commands, event records |
//! | `vmm` | that IOMMU as a VMM drives it |
//! | `workload` | what the driver does, by chance |
//! | `play` | one operation after the other, measured and checked |
//! | `figures` | latencies, and how things went over time |
//! | `report` | in words and as JSON |
//! | `timeline` | as a picture |

mod chance;
mod figures;
mod guest;
mod machine;
mod play;
mod report;
mod scenario;
mod timeline;
mod unit;
mod vmm;
mod workload;

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use clap::Args;

use crate::draw::{check_out, write_whole};
use crate::failure::{Status, complain};
use crate::numbers::number;
use crate::options::Global;
use crate::output::counted;
use crate::session::Session;

use machine::Machine;
use report::Report;

/// Play a scenario on a simulated host: a guest whose drivers map and unmap, while devices do DMA
///
/// The kernel and its IOMMUs are simulated in this process; everything else is what a VMM uses. After each operation every page that it touched is tried with
/// DMA through the simulated hardware: what is mapped must be reached, and what is not must be refused. Times are of this machine, without a real kernel's.
///
/// Exit status 1 if a DMA went wrong, with the seed that shows it again.
#[derive(Args, Debug)]
pub struct Arguments {
    /// What to play, such as scenarios/arm-on-x86.toml
    scenario: PathBuf,
    /// Draw how it went over time: the SVG file to write
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Replace a picture that exists
    #[arg(long)]
    force: bool,
    /// So many operations, whatever the scenario says
    #[arg(long, value_name = "N", value_parser = number, conflicts_with = "seconds", allow_negative_numbers = true)]
    operations: Option<u64>,
    /// For so many seconds, whatever the scenario says
    #[arg(long, value_name = "S", allow_negative_numbers = true)]
    seconds: Option<f64>,
    /// Where chance begins, whatever the scenario says
    #[arg(long, value_name = "N", value_parser = number, allow_negative_numbers = true)]
    seed: Option<u64>,
}

/// Runs the command.
pub fn run(global: &Global, arguments: &Arguments) -> Result<Status> {
    let mut scenario = scenario::load(&arguments.scenario)?;
    if arguments.operations.is_some() || arguments.seconds.is_some() {
        (scenario.operations, scenario.seconds) = (arguments.operations, arguments.seconds);
        scenario.check_length()?;
    }
    scenario.seed = arguments.seed.unwrap_or(scenario.seed);
    if let Some(out) = &arguments.out {
        check_out(out, arguments.force, &[&arguments.scenario])?;
    }
    let plugins = Arc::new(Session::for_running(global)?.plugins);
    let place = || arguments.scenario.display().to_string();
    let mut machine = Machine::new(&scenario, &plugins).with_context(place)?;
    let played = play::play(&scenario, &mut machine).with_context(|| format!("{}, seed {}", place(), scenario.seed))?;
    let report = Report::new(&scenario, &machine, played, arguments.out.as_deref());
    let (objects, pinned, areas) = machine.end();
    if let Some(out) = &arguments.out {
        write_whole(out, timeline::draw(&scenario, &report))?;
    }
    report.print(global.json())?;
    if let Some(violation) = &report.played.violation {
        complain(&format!("{violation}; seed {} shows it again", scenario.seed));
        return Ok(Status::Found);
    }
    if (objects, pinned, areas) != (0, 0, 0) {
        let objects = counted(objects as u64, "object", "objects");
        complain(&format!(
            "at the end the kernel has {objects}, {pinned} pinned pages and {areas} areas left; seed {} shows it again",
            scenario.seed
        ));
        return Ok(Status::Found);
    }
    Ok(Status::Good)
}
