//! Compiled plugins are kept, and only what this user alone could have written is taken back.

use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use stagecraft::plugin::{CacheError, Config, Engine, EngineError, Limits, LoadError, Plugin, TableConfig};
use stagecraft::table::Format as _;

const HOSTILE: &[u8] = include_bytes!("../hostile/built/hostile.wasm");

fn engine(cache: &Path) -> Engine {
    Engine::new(Config::default().with_cache(cache)).expect("an engine")
}

fn load(cache: &Path) -> Result<Plugin, LoadError> {
    Plugin::load(&engine(cache), HOSTILE)
}

fn works(plugin: &Plugin) {
    let mut format = plugin.open(&TableConfig::new("hostile/radix", &[])).expect("opens");
    format.decode(2, 0, 5).expect("an answer");
}

/// A cache with the hostile plugin in it, and the entry's path.
fn filled() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let cache = folder.path().join("deep/cache");
    works(&load(&cache).expect("compiled"));
    let entries: Vec<PathBuf> = std::fs::read_dir(&cache).expect("entries").map(|entry| entry.expect("an entry").path()).collect();
    assert_eq!(entries.len(), 1, "one entry and nothing temporary: {entries:?}");
    let entry = entries[0].clone();
    (folder, cache, entry)
}

fn mode(path: &Path) -> u32 {
    path.metadata().expect("metadata").permissions().mode() & 0o777
}

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("chmod");
}

fn written(path: &Path) -> std::time::SystemTime {
    path.metadata().expect("metadata").modified().expect("a time")
}

#[test]
fn an_entry_is_private_and_used_again() {
    let (_folder, cache, entry) = filled();
    assert_eq!((mode(&cache), mode(&entry)), (0o700, 0o600));
    let before = written(&entry);
    works(&load(&cache).expect("from the cache"));
    assert_eq!(written(&entry), before, "nothing was compiled and written");
}

#[test]
fn a_damaged_entry_is_compiled_anew() {
    let (_folder, cache, entry) = filled();
    let good = std::fs::read(&entry).expect("read");
    let middle = good.len() / 2;
    let mut flipped = good.clone();
    flipped[middle] ^= 1;
    for damaged in [&flipped[..], &good[..middle], b"", &[&good[..], b"x"].concat()] {
        std::fs::write(&entry, damaged).expect("written");
        works(&load(&cache).expect("compiled anew"));
        assert!(std::fs::read(&entry).expect("read").len() > middle, "and kept again");
    }
}

fn foreign(result: Result<Plugin, LoadError>, path: &Path, reason: &str) {
    match result {
        Err(LoadError::Cache(CacheError::Foreign { path: found, what })) => {
            assert_eq!(found, path);
            assert!(what.contains(reason), "{what}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_entry_that_others_could_have_written_is_refused() {
    let (_folder, cache, entry) = filled();
    for bits in [0o620, 0o602, 0o666] {
        set_mode(&entry, bits);
        foreign(load(&cache), &entry, "can be written by others");
    }
    set_mode(&entry, 0o600);
    works(&load(&cache).expect("fit again"));
    // Only root can give a file away; elsewhere this part has nothing to try.
    if std::os::unix::fs::chown(&entry, Some(12345), None).is_ok() {
        foreign(load(&cache), &entry, "belongs to user 12345");
    }
}

#[test]
fn an_entry_that_is_no_file_is_refused() {
    let (folder, cache, entry) = filled();
    let elsewhere = folder.path().join("elsewhere");
    std::fs::rename(&entry, &elsewhere).expect("moved");
    symlink(&elsewhere, &entry).expect("a link");
    foreign(load(&cache), &entry, "is a symbolic link");
}

#[test]
fn a_directory_that_others_can_write_is_refused() {
    let (_folder, cache, _entry) = filled();
    set_mode(&cache, 0o770);
    let refused = || match Engine::new(Config::default().with_cache(&cache)) {
        Err(EngineError::Cache(CacheError::Foreign { path, what })) => (path, what),
        other => panic!("{other:?}"),
    };
    let (path, what) = refused();
    assert_eq!((path, &*what), (cache.clone(), "can be written by others (mode 770)"));
    set_mode(&cache, 0o700);
    if std::os::unix::fs::chown(&cache, Some(12345), None).is_ok() {
        assert!(refused().1.contains("belongs to user 12345"));
    }
}

#[test]
fn a_cache_that_cannot_be_made_is_an_error_with_its_path() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("file");
    std::fs::write(&file, "").expect("written");
    let error = Engine::new(Config::default().with_cache(file.join("cache"))).expect_err("refused");
    assert!(matches!(error, EngineError::Cache(CacheError::Io { .. })) && error.to_string().contains("file/cache"), "{error}");
}

#[test]
fn many_at_once_fill_it_once_and_all_are_served() {
    let folder = tempfile::tempdir().expect("a folder");
    let cache = folder.path().join("cache");
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| works(&load(&cache).expect("a plugin")));
        }
    });
    assert_eq!(std::fs::read_dir(&cache).expect("entries").count(), 1, "nothing temporary is left");
}

#[test]
fn compiled_code_is_mapped_from_its_entry_and_not_copied() {
    let (_folder, cache, entry) = filled();
    let mapped =
        || std::fs::read_to_string("/proc/self/maps").expect("Linux").lines().filter(|line| line.ends_with(&*entry.to_string_lossy())).count();
    let plugin = load(&cache).expect("from the cache");
    assert!(mapped() > 0, "{} is not mapped", entry.display());
    works(&plugin);
    // What replaces an entry is another file: the code that runs is not touched.
    std::fs::remove_file(&entry).expect("removed");
    std::fs::write(&entry, b"something else").expect("written");
    works(&plugin);
}

#[test]
fn engines_that_compile_in_other_forms_share_a_directory() {
    let folder = tempfile::tempdir().expect("a folder");
    let cache = folder.path().join("cache");
    let entries = || -> std::collections::BTreeMap<PathBuf, std::fs::Metadata> {
        let entries = std::fs::read_dir(&cache).expect("entries").map(|entry| entry.expect("an entry").path());
        entries.map(|path| (path.clone(), std::fs::metadata(path).expect("a file"))).collect()
    };
    let mut larger = Limits::default();
    larger.memory_bytes *= 2;
    let forms = || [Config::default(), Config::default().with_optimisation(true), Config::default().with_limits(larger.clone())];
    for (index, form) in forms().into_iter().enumerate() {
        let plugin = Plugin::load(&Engine::new(form.with_cache(&cache)).expect("an engine"), HOSTILE).expect("compiled");
        works(&plugin);
        assert_eq!(entries().len(), index + 1);
    }
    let before = entries();
    for form in forms() {
        works(&Plugin::load(&Engine::new(form.with_cache(&cache)).expect("an engine"), HOSTILE).expect("from the cache"));
    }
    let inode = |(path, status): (&PathBuf, &std::fs::Metadata)| (path.clone(), std::os::unix::fs::MetadataExt::ino(status));
    assert_eq!(entries().iter().map(inode).collect::<Vec<_>>(), before.iter().map(inode).collect::<Vec<_>>(), "none was compiled again");
}

#[test]
fn threads_that_compile_end_with_the_compilation() {
    let threads = || {
        let names = std::fs::read_dir("/proc/self/task").expect("Linux").flatten().map(|task| task.path().join("comm"));
        names.filter_map(|name| std::fs::read_to_string(name).ok()).filter(|name| name.starts_with("stagecraft-comp")).count()
    };
    let three = std::num::NonZeroUsize::new(3).expect("not zero");
    works(&Plugin::load(&Engine::new(Config::default().with_compile_threads(three)).expect("an engine"), HOSTILE).expect("compiled"));
    // They were told to end; the system takes its time.
    let patience = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while threads() > 0 && std::time::Instant::now() < patience {
        std::thread::yield_now();
    }
    assert_eq!(threads(), 0);
}
