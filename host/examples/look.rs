//! Looks at a snapshot through the library: what each device reaches.
use stagecraft::guest::{Guest, State};
use stagecraft::plugin::{Config, Engine, Plugins};
use stagecraft::snapshot::Snapshot;
use std::time::Instant;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args_os().nth(1).ok_or("usage: look SNAPSHOT")?;
    let snapshot = Snapshot::load(path.as_ref())?;
    let engine = Engine::new(Config::default())?;
    let plugins = Plugins::builtin(&engine)?;
    let guest = Guest::new(&snapshot, &plugins)?;
    for stream in guest.streams()? {
        match &stream.state {
            State::Translated(tables) => {
                let start = Instant::now();
                let mut space = guest.open(tables)?;
                let collected = guest.collect(&mut space, 10)?;
                let tables: Vec<String> = tables.iter().map(ToString::to_string).collect();
                println!(
                    "{} {:#x}: {} runs, {} faults, {} questions, {:?}: {}",
                    stream.label,
                    stream.id,
                    collected.collector.mappings().len(),
                    collected.collector.fault_count(),
                    space.questions(),
                    start.elapsed(),
                    tables.join(" through ")
                );
            }
            other => println!("{} {:#x}: {other:?}", stream.label, stream.id),
        }
    }
    Ok(())
}
