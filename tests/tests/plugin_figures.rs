//! Figures, not promises: `cargo test --test plugin_figures -- --ignored --nocapture`.

use stagecraft::plugin::{Config, Engine, Plugin, Plugins, TableConfig};
use stagecraft::table::Format as _;
use std::time::{Duration, Instant};

/// Median of some runs.
fn median<R>(runs: usize, mut run: impl FnMut() -> R) -> Duration {
    let mut times: Vec<Duration> = (0..runs)
        .map(|_| {
            let start = Instant::now();
            std::hint::black_box(run());
            start.elapsed()
        })
        .collect();
    times.sort();
    times[times.len() / 2]
}

#[test]
#[ignore = "prints figures and asserts nothing"]
fn figures() {
    let cache = tempfile::tempdir().expect("a folder");
    let cold = Engine::new(Config::default()).expect("an engine");
    let config = || Config::default().with_cache(cache.path().join("cache"));
    println!("engine, no cache: {:?}", median(11, || Engine::new(Config::default()).expect("an engine")));
    println!("manifests of the built-in plugins: {:?}", median(101, || Plugins::builtin(&cold).expect("plugins")));
    let files = [
        ("hostile", "hostile/built/hostile.wasm", TableConfig::new("hostile/radix", &[("root", 0x1000)])),
        ("arm-smmuv3", "../host/builtin/arm-smmuv3.wasm", TableConfig::new("arm-smmuv3/stage1", &[("root", 0x1000)])),
        ("intel-vtd", "../host/builtin/intel-vtd.wasm", TableConfig::new("intel-vtd/first-stage", &[("root", 0x1000)])),
    ];
    for (name, file, table) in files {
        let bytes = std::fs::read(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).expect("a plugin");
        println!("{name}: {} bytes", bytes.len());
        println!("  admission: {:?}", median(101, || stagecraft::plugin::admit(&bytes, cold.limits()).expect("admitted")));
        println!("  compile: {:?}", median(3, || Plugin::load(&cold, &bytes).expect("compiled")));
        let engine = Engine::new(config()).expect("an engine");
        Plugin::load(&engine, &bytes).expect("compiled and kept");
        println!("  load from the cache: {:?}", median(51, || Plugin::load(&engine, &bytes).expect("cached")));
        for file in std::fs::read_dir(cache.path().join("cache")).expect("entries") {
            println!("  entry of {} bytes", file.expect("an entry").metadata().expect("its size").len());
        }
        let plugin = Plugin::load(&engine, &bytes).expect("cached");
        println!("  instantiate: {:?}", median(201, || plugin.instantiate().expect("an instance")));
        println!("  open: {:?}", median(201, || plugin.open(&table).expect("a format")));
        let start = || {
            let engine = Engine::new(config()).expect("an engine");
            let plugin = Plugin::load(&engine, &bytes).expect("cached");
            let mut format = plugin.open(&table).expect("a format");
            format.decode(0, 0, 3).expect("an answer")
        };
        println!("  cold start, engine to first answer: {:?}", median(51, start));
        let without = || {
            let plugin = Plugin::load(&engine, &bytes).expect("cached");
            let mut format = plugin.open(&table).expect("a format");
            format.decode(0, 0, 3).expect("an answer")
        };
        println!("  cold start, cache to first answer: {:?}", median(51, without));
        let mut format = plugin.open(&table).expect("a format");
        let calls = 20_000;
        let many = median(11, || (0..calls).for_each(|n| drop(std::hint::black_box(format.decode(2, 0, n & 0xfff)))));
        println!("  decode: {:?}", many / calls as u32);
    }
}
