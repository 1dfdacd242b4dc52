//! The plugins of a host: built in, from a directory, from bytes.

use std::os::unix::fs::symlink;
use std::path::Path;

use stagecraft::plugin::{Config, DirectoryError, Engine, LoadError, Origin, PluginDirectory, Plugins, PluginsError, TableConfig};

const HOSTILE: &[u8] = include_bytes!("../hostile/built/hostile.wasm");

fn engine() -> Engine {
    Engine::new(Config::default()).expect("an engine")
}

/// A folder with `plugins/hostile.wasm` and, beside `plugins`, `secret.wasm`.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::create_dir(folder.path().join("plugins")).expect("a folder");
    std::fs::write(folder.path().join("plugins/hostile.wasm"), HOSTILE).expect("written");
    std::fs::write(folder.path().join("secret.wasm"), HOSTILE).expect("written");
    folder
}

fn open(folder: &Path) -> PluginDirectory {
    PluginDirectory::open(folder.join("plugins")).expect("opens")
}

const MANY: usize = 1 << 20;

#[test]
fn a_directory_lists_and_reads_its_plugins() {
    let folder = folder();
    let plugins = folder.path().join("plugins");
    for other in ["readme.txt", ".hidden.wasm", "a.wasm"] {
        std::fs::write(plugins.join(other), "x").expect("written");
    }
    let directory = open(folder.path());
    assert_eq!(directory.names().expect("names"), ["a.wasm", "hostile.wasm"]);
    assert_eq!(directory.read("hostile.wasm", MANY).expect("bytes"), HOSTILE);
    assert!(matches!(directory.read("hostile.wasm", 100), Err(DirectoryError::TooLarge { limit: 100, .. })));
    assert!(matches!(directory.read("missing.wasm", MANY), Err(DirectoryError::File { .. })));
}

#[test]
fn names_do_not_lead_out() {
    let folder = folder();
    let directory = open(folder.path());
    let absolute = folder.path().join("secret.wasm").display().to_string();
    for name in ["../secret.wasm", "../plugins/hostile.wasm", "./hostile.wasm", &absolute, "..", ".wasm", "", "a\0.wasm"] {
        let error = directory.read(name, MANY).expect_err("refused");
        assert!(matches!(&error, DirectoryError::Name { name: named, .. } if named.len() == name.len().max(named.len())), "{error:?}");
        assert!(error.to_string().contains("is not the name of a file in the plugin directory"), "{error}");
    }
}

#[test]
fn links_do_not_lead_out() {
    let folder = folder();
    let plugins = folder.path().join("plugins");
    symlink("../secret.wasm", plugins.join("relative.wasm")).expect("a link");
    symlink(folder.path().join("secret.wasm"), plugins.join("absolute.wasm")).expect("a link");
    symlink("hostile.wasm", plugins.join("inside.wasm")).expect("a link");
    let directory = open(folder.path());
    for name in ["relative.wasm", "absolute.wasm"] {
        let error = directory.read(name, MANY).expect_err("refused");
        assert!(matches!(&error, DirectoryError::File { name: named, .. } if named == name), "{error:?}");
        assert!(error.to_string().contains(name), "{error}");
    }
    assert_eq!(directory.read("inside.wasm", MANY).expect("a link inside is fine"), HOSTILE);
    let error = Plugins::empty(&engine()).with_directory(&directory).expect_err("refused");
    assert!(error.to_string().contains("absolute.wasm"), "{error}");
}

#[test]
fn what_is_no_file_is_not_read() {
    let folder = folder();
    std::fs::create_dir(folder.path().join("plugins/folder.wasm")).expect("a folder");
    let error = open(folder.path()).read("folder.wasm", MANY).expect_err("refused");
    assert!(error.to_string().contains("not a file"), "{error}");
    assert!(matches!(PluginDirectory::open(folder.path().join("none")), Err(DirectoryError::Directory { .. })));
}

#[test]
fn the_built_in_plugins_are_found_by_unit_and_by_format() {
    let plugins = Plugins::builtin(&engine()).expect("plugins");
    let names: Vec<&str> = plugins.iter().map(|(manifest, _)| &*manifest.name).collect();
    assert!(names.is_sorted() && ["arm-smmuv3", "intel-vtd"].iter().all(|name| names.contains(name)), "{names:?}");
    assert!(plugins.iter().all(|(_, origin)| *origin == Origin::Builtin));
    let by_unit = plugins.by_unit("intel-vtd").expect("a plugin");
    let by_format = plugins.by_format("intel-vtd/second-stage").expect("a plugin");
    assert_eq!(by_unit.content_hash(), by_format.content_hash());
    for (manifest, _) in plugins.iter() {
        for format in &manifest.formats {
            let plugin = plugins.by_format(&format.name).expect("a plugin");
            plugin.open(&TableConfig::new(&format.name, &[("root", 0x1_0000)])).expect("the manifest's defaults and a root are a configuration");
        }
    }
}

#[test]
fn what_is_not_there_is_answered_with_what_there_is() {
    let plugins = Plugins::builtin(&engine()).expect("plugins");
    let units: Vec<&str> = plugins.iter().flat_map(|(manifest, _)| &manifest.units).map(String::as_str).collect();
    let error = plugins.by_unit("via-agp").expect_err("unknown");
    assert_eq!(error.to_string(), format!("no plugin knows the unit `via-agp`; there are {}", units.join(", ")));
    let error = plugins.by_format("intel-vtd/third-stage").expect_err("unknown");
    let formats: Vec<&str> = plugins.iter().flat_map(|(manifest, _)| &manifest.formats).map(|format| format.name.as_str()).collect();
    assert!(formats.contains(&"arm-smmuv3/stage1"));
    assert_eq!(error.to_string(), format!("no plugin knows the table format `intel-vtd/third-stage`; there are {}", formats.join(", ")));
    assert!(Plugins::empty(&engine()).by_unit("x").expect_err("unknown").to_string().ends_with("there are none"));
}

/// A copy of the hostile plugin that calls itself `intel-vt*`, its unit included; lengths have to stay.
fn renamed(name: &str) -> Vec<u8> {
    assert_eq!(name.len(), "hostile".len());
    let mut bytes = HOSTILE.to_vec();
    let start = bytes.windows(12).position(|at| at == b"\"contract\": ").expect("the manifest");
    for at in start..start + 700 {
        if bytes[at..].starts_with(b"hostile") {
            bytes[at..at + 7].copy_from_slice(name.as_bytes());
        }
    }
    bytes
}

#[test]
fn a_directorys_plugins_join_and_conflicts_are_named() {
    let folder = folder();
    let engine = engine();
    let builtin = Plugins::builtin(&engine).expect("plugins").iter().len();
    let plugins = Plugins::builtin(&engine).expect("plugins").with_directory(&open(folder.path())).expect("plugins");
    assert_eq!(plugins.iter().len(), builtin + 1);
    let file = folder.path().join("plugins/hostile.wasm");
    assert!(plugins.iter().any(|(manifest, origin)| manifest.name == "hostile" && *origin == Origin::File(file.clone())));
    plugins.by_format("hostile/radix").expect("a plugin");

    let plugins = plugins.with_plugin(&renamed("hustler")).expect("another name");
    assert!(plugins.by_unit("hustler").is_ok());
    match plugins.with_plugin(HOSTILE) {
        Err(PluginsError::Conflict { name, first, second }) => {
            assert_eq!((&*name, first, second), ("hostile", Origin::File(file), Origin::Bytes));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_file_of_a_built_in_plugins_name_replaces_it() {
    let folder = folder();
    let plugins = folder.path().join("plugins");
    std::fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("../host/builtin/intel-vtd.wasm"), plugins.join("vendor.wasm")).expect("copied");
    std::fs::remove_file(plugins.join("hostile.wasm")).expect("removed");
    let all = Plugins::builtin(&engine()).expect("plugins").with_directory(&open(folder.path())).expect("plugins");
    assert_eq!(all.iter().len(), Plugins::builtin(&engine()).expect("plugins").iter().len());
    let vendor = Origin::File(plugins.join("vendor.wasm"));
    assert!(all.iter().all(|(manifest, origin)| *origin == if manifest.name == "intel-vtd" { vendor.clone() } else { Origin::Builtin }));
}

#[test]
fn a_broken_file_in_the_directory_is_named() {
    let folder = folder();
    std::fs::write(folder.path().join("plugins/broken.wasm"), "no").expect("written");
    match Plugins::empty(&engine()).with_directory(&open(folder.path())) {
        Err(PluginsError::Load { plugin, error: LoadError::NotAComponent { .. }, .. }) => assert_eq!(plugin, "broken.wasm"),
        other => panic!("{other:?}"),
    }
}
