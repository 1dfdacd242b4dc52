//! From nothing to the first answer of a plugin: what is paid once per process, once per plugin, and once per table.
#![allow(clippy::unwrap_used, missing_docs)]

use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use stagecraft::plugin::{Config, Engine, Plugin, TableConfig, admit};
use stagecraft::table::Format as _;
use stagecraft_benches::contest::is_measuring;

/// The plugins, and a table of each.
fn plugins() -> [(&'static str, TableConfig); 2] {
    [
        ("arm-smmuv3", TableConfig::new("arm-smmuv3/stage1", &[("root", 0x1000)])),
        ("intel-vtd", TableConfig::new("intel-vtd/first-stage", &[("root", 0x1000)])),
    ]
}

/// Opens a table and asks about one pattern.
fn first_answer(plugin: &Plugin, table: &TableConfig) {
    let mut format = plugin.open(table).unwrap();
    black_box(format.decode(0, 0, 3).unwrap());
}

/// Median of some runs, in microseconds.
fn median(runs: usize, run: &mut dyn FnMut()) -> f64 {
    let mut times: Vec<Duration> = (0..runs)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed()
        })
        .collect();
    times.sort();
    times[runs / 2].as_secs_f64() * 1e6
}

/// A name, how often it is timed, and what it does.
type Step<'a> = (&'static str, usize, Box<dyn FnMut() + 'a>);

fn cold_start(criterion: &mut Criterion) {
    let folder = tempfile::tempdir().unwrap();
    let cached = || Engine::new(Config::default().with_cache(folder.path().join("cache"))).unwrap();
    let uncached = Engine::new(Config::default()).unwrap();
    let two = std::num::NonZeroUsize::new(2).unwrap();
    let threads = Engine::new(Config::default().with_compile_threads(two)).unwrap();
    let engine = cached();
    let mut rows = Vec::new();
    for (name, table) in plugins() {
        let bytes = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../host/builtin/{name}.wasm"))).unwrap();
        let plugin = Plugin::load(&engine, &bytes).unwrap(); // fills the cache
        let mut format = plugin.open(&table).unwrap();
        let mut steps: Vec<Step<'_>> = vec![
            ("compile, without a cache", 10, Box::new(|| drop(black_box(Plugin::load(&uncached, &bytes).unwrap())))),
            ("compile on two threads", 10, Box::new(|| drop(black_box(Plugin::load(&threads, &bytes).unwrap())))),
            ("admission alone", 50, Box::new(|| drop(black_box(admit(&bytes, engine.limits()).unwrap())))),
            ("load from the cache", 50, Box::new(|| drop(black_box(Plugin::load(&engine, &bytes).unwrap())))),
            ("instantiate", 100, Box::new(|| drop(black_box(plugin.instantiate().unwrap())))),
            ("open a table", 100, Box::new(|| drop(black_box(plugin.open(&table).unwrap())))),
            (
                "one answer",
                100,
                Box::new(|| {
                    let _ = black_box(format.decode(0, 0, 3).unwrap());
                }),
            ),
            ("load, open and answer", 50, Box::new(|| first_answer(&Plugin::load(&engine, &bytes).unwrap(), &table))),
            ("engine, load, open and answer", 20, Box::new(|| first_answer(&Plugin::load(&cached(), &bytes).unwrap(), &table))),
        ];
        let mut group = criterion.benchmark_group(format!("cold start of {name}"));
        group.sample_size(10).warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_millis(400));
        for (step, runs, run) in &mut steps {
            group.bench_function(*step, |bencher| bencher.iter(&mut *run));
            if is_measuring() {
                rows.push((name, *step, median(*runs, run)));
            }
        }
        group.finish();
    }
    println!("\nmedians; the goals: compile below 100,000 us, load, open and answer below 1,000 us");
    for (name, step, time) in rows {
        println!("{name:<12} {step:<30} {time:>12.1} us");
    }
}

criterion_group!(benches, cold_start);
criterion_main!(benches);
