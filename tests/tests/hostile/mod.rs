//! Guests that mean no good, and what the tests of them share: fixtures, seeds, a hang detector, and the reference's view of the same guest.
#![allow(dead_code)]

pub mod compare;
mod files;
mod loops;
pub mod mutate;
pub mod nested;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::{Duration, Instant};

use stagecraft::plugin::{Config, Engine, Plugins};
use stagecraft_tests::reference::snapshot::Snapshot;

/// How long one case may take. It detects hangs and says nothing about speed: cases take some milliseconds.
const PATIENCE: Duration = Duration::from_secs(20);

/// `STAGECRAFT_SEED`, or a fixed one; printed, so that a failure can be had again.
pub fn seed() -> u64 {
    let seed = std::env::var("STAGECRAFT_SEED").map_or(0x5747_6563_7261_6674, |text| match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).expect("STAGECRAFT_SEED is a number"),
        None => text.parse().expect("STAGECRAFT_SEED is a number"),
    });
    println!("STAGECRAFT_SEED={seed:#x}");
    seed
}

/// `STAGECRAFT_ROUNDS`, or `usual`.
pub fn rounds(usual: u64) -> u64 {
    std::env::var("STAGECRAFT_ROUNDS").map_or(usual, |text| text.parse().expect("STAGECRAFT_ROUNDS is a number"))
}

/// The built-in plugins, compiled once for all tests of a program.
pub fn plugins() -> &'static Plugins {
    static PLUGINS: OnceLock<Plugins> = OnceLock::new();
    PLUGINS.get_or_init(|| Plugins::builtin(&Engine::new(Config::default()).expect("an engine")).expect("the built-in plugins"))
}

/// Folders of real guests with an Arm or Intel unit. Says so in one line if there are none.
pub fn fixtures() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut folders: Vec<PathBuf> = Vec::new();
    for parent in [root.join("fixtures"), root.join("../../shared/fixtures")] {
        let Ok(entries) = std::fs::read_dir(&parent) else { continue };
        for path in entries.map(|entry| entry.expect("a folder's entry").path()) {
            let Some(name) = path.file_name().map(|name| name.to_string_lossy().into_owned()) else { continue };
            let known = folders.iter().any(|folder| folder.file_name() == path.file_name());
            if (name.starts_with("arm64-") || name.starts_with("vtd-")) && path.join("snapshot.json").exists() && !known {
                folders.push(path);
            }
        }
    }
    folders.sort();
    if folders.is_empty() {
        println!("skipped: no fixtures, neither in tests/fixtures nor in ../shared/fixtures");
    }
    folders
}

/// The last part of a path.
pub fn name(path: &Path) -> String {
    path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

/// Runs a case, and ends the program with the case's name if it does not come back.
pub fn timed<R>(name: &str, case: impl FnOnce() -> R) -> R {
    let gate = Arc::new((Mutex::new(false), Condvar::new()));
    let watched = Arc::clone(&gate);
    let label = name.to_owned();
    let watchdog = std::thread::spawn(move || {
        let (done, changed) = &*watched;
        let start = Instant::now();
        let mut done = done.lock().expect("nobody panics with this lock");
        while !*done {
            let Some(left) = PATIENCE.checked_sub(start.elapsed()) else {
                println!("{label}: no end after {PATIENCE:?}");
                eprintln!("{label}: no end after {PATIENCE:?}");
                std::process::exit(101);
            };
            done = changed.wait_timeout(done, left).expect("nobody panics with this lock").0;
        }
    });
    /// Ends the watch also when the case panics.
    struct End(Arc<(Mutex<bool>, Condvar)>);
    impl Drop for End {
        fn drop(&mut self) {
            *self.0.0.lock().expect("nobody panics with this lock") = true;
            self.0.1.notify_all();
        }
    }
    let end = End(gate);
    let result = case();
    drop(end);
    watchdog.join().expect("the watchdog sleeps");
    result
}

/// The same guest as the engine reads it: through a folder.
pub fn load(snapshot: &Snapshot, folder: &Path) -> stagecraft::snapshot::Snapshot {
    use stagecraft::snapshot::{Source, Stream, StreamEntry};
    use stagecraft_tests::reference::snapshot::TableState;
    snapshot.write_snapshot(folder).expect("a snapshot is written");
    let mut loaded = stagecraft::snapshot::Snapshot::load(folder).expect("what was written can be read");
    if snapshot.registers.is_empty() {
        // The reference has its own names of settings.
        let stream = |state: &TableState| match state {
            TableState::Bypass => Stream::Bypass,
            TableState::Blocked(reason) => Stream::Blocked(reason.clone()),
            TableState::Tables(config) => {
                let table = compare::plugin_config(config);
                let settings = table.settings.iter().map(|(name, value)| (name.to_owned(), value)).collect();
                Stream::Table { format: table.format, settings }
            }
        };
        let entries = snapshot.tables.iter().map(|entry| StreamEntry {
            id: entry.id,
            pasid: entry.pasid.map(|pasid| pasid as u32),
            stream: stream(&entry.state),
        });
        loaded.source = Source::Tables(entries.collect());
    }
    loaded
}
