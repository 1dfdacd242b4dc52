//! Snapshots, folders and command lines that mean no good: one line, status 2, and nothing touched that was not named.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::json;

use crate::support::{Copy, Run, command, fixtures, folder, names, root, run};

/// All subcommands that read a snapshot.
fn readers(path: &str, out: &Path) -> Vec<Vec<String>> {
    let out = out.join("out");
    let out = out.to_str().unwrap();
    let lines = [
        format!("inspect {path}"),
        format!("validate {path}"),
        format!("translate {path} --device 0x38 --iova 0 --access r"),
        format!("convert {path} --to intel-vtd/first-stage --out {out}"),
        format!("diff {path} arm64-s1-4k"),
        format!("diff arm64-s1-4k {path}"),
        format!("draw {path} --out {out}"),
    ];
    lines.iter().map(|line| line.split(' ').map(str::to_owned).collect()).collect()
}

/// Asserts that every subcommand refuses the snapshot, with this line.
fn all_refuse(path: &Path, line: &str) {
    let out = folder(&format!("out-{}", path.parent().unwrap().file_name().unwrap().to_str().unwrap()));
    let path = path.to_str().unwrap();
    for arguments in readers(path, &out) {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let found = run(&arguments);
        assert_eq!((&*found.stderr, found.status, &*found.stdout), (&*format!("error: {line}\n"), 2, ""), "{arguments:?}");
        assert_eq!(names(&out), [""; 0], "{arguments:?}");
    }
}

fn mkfifo(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

/// A pipe would be waited for, and a device never ends.
#[test]
fn files_that_are_none() {
    for file in ["snapshot.json", "pages.bin"] {
        let copy = Copy::new("no-files", "arm64-s1-4k");
        let path = copy.path.join(file);
        let line = format!("{}: not a file", path.display());
        fs::remove_file(&path).unwrap();
        mkfifo(&path);
        all_refuse(&copy.path, &line);
        fs::remove_file(&path).unwrap();
        symlink("/dev/zero", &path).unwrap();
        all_refuse(&copy.path, &line);
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        all_refuse(&copy.path, &line);
        fs::remove_dir(&path).unwrap();
        symlink("nowhere", &path).unwrap();
        all_refuse(&copy.path, &format!("{}: No such file or directory (os error 2)", path.display()));
        fs::remove_file(&path).unwrap();
        symlink(file, &path).unwrap();
        all_refuse(&copy.path, &format!("{}: Too many levels of symbolic links (os error 40)", path.display()));
        // A link to a file is as good as the file.
        fs::remove_file(&path).unwrap();
        symlink(fixtures().join("arm64-s1-4k").join(file), &path).unwrap();
        run(&["inspect", copy.path()]).good();
    }
}

#[test]
fn pages_that_do_not_fit() {
    let copy = Copy::new("pages", "arm64-s1-4k");
    let (path, bytes) = (copy.path.join("pages.bin"), fs::read(copy.path.join("pages.bin")).unwrap());
    let pages = bytes.len() / 4096;
    for length in [0, 1, bytes.len() - 1, bytes.len() + 1, bytes.len() + 4096] {
        let mut other = bytes.clone();
        other.resize(length, 0);
        fs::write(&path, other).unwrap();
        all_refuse(&copy.path, &format!("{}: {length} bytes; the {pages} pages of snapshot.json need {}", path.display(), bytes.len()));
    }
    // Larger than memory, and no bytes on the disk.
    fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
    all_refuse(&copy.path, &format!("{}: {} bytes; the {pages} pages of snapshot.json need {}", path.display(), 1_u64 << 40, bytes.len()));
}

#[test]
fn documents_that_make_no_sense() {
    let mut copy = Copy::new("documents", "arm64-s1-4k");
    let plain = copy.json.clone();
    let path = copy.path.join("snapshot.json");
    for (change, line) in [
        (json!({"version": 2}), "format version 2; this program reads version 1"),
        (json!({"page_size": 16384}), "page_size 16384; it must be 4096"),
        (json!({"pages": ["0x1001"]}), "page 0x1001 is not a multiple of 4096"),
        (json!({"pages": ["0x1000", "0x1000"]}), "page 0x1000 is listed twice"),
        (json!({"devices": [{"label": "a", "id": "0x38"}, {"label": "b", "id": 56}]}), "devices `a` and `b` have the same id 0x38"),
        (json!({"memory": [{"kind": "ram", "first": "0x10", "last": "0xf"}]}), "memory range 0x10..=0xf is empty"),
        (json!({"memory": [{"kind": "rom", "first": "0x0", "last": "0xf"}]}), "memory of kind `rom`; there are `ram`, `device` and `table`"),
        (
            json!({"memory": [{"kind": "ram", "first": "0x0", "last": "0xfff"}, {"kind": "ram", "first": "0xfff", "last": "0x1fff"}]}),
            "memory ranges 0x0..=0xfff and 0xfff..=0x1fff overlap",
        ),
        (json!({"unit": null}), "neither `unit.registers` nor `tables`: one of them must say where the tables are"),
        (json!({"tables": [{"id": 56, "state": "bypass"}, {"id": "0x38", "state": "blocked"}]}), "tables: device 0x38 is listed twice"),
    ] {
        copy.json = plain.clone();
        copy.json.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        copy.write();
        all_refuse(&copy.path, &format!("{}: {line}", path.display()));
    }
    // Where the text itself is wrong, the line and the column are named.
    let deep = "[".repeat(100_000);
    let huge = plain.to_string().replacen("4096", &"9".repeat(400), 1);
    for text in [b"".to_vec(), b"{\"version\": 1".to_vec(), vec![0xff; 100], deep.into_bytes(), huge.into_bytes(), b"\"\xc3\x28\"".to_vec()] {
        fs::write(&path, &text).unwrap();
        let found = run(&["inspect", copy.path()]);
        let line = &found.stderr;
        assert!(line.starts_with(&format!("error: {}: ", path.display())) && line.lines().count() == 1 && line.len() < 1000, "{line}");
        assert!(line.contains("line 1 column"), "{line}");
        assert_eq!((found.status, &*found.stdout), (2, ""));
    }
}

/// More devices than there can be, and lists whose length would cost its square.
#[test]
fn very_many_of_everything() {
    let mut copy = Copy::new("many", "arm64-s1-4k");
    let path = copy.path.join("snapshot.json");
    let device = |id: u64| json!({"label": format!("d{id}"), "id": id});
    copy.json["devices"] = (0..=1 << 16).map(device).collect();
    copy.write();
    all_refuse(&copy.path, &format!("{}: 65537 devices; there may be 65536, as many as a PCI segment has", path.display()));
    copy.json["devices"] = json!([device(7)]);
    copy.json["tables"] = (0..200_000_u64).map(|id| json!({"id": id, "state": "bypass"})).collect();
    copy.write();
    let report = run(&["inspect", copy.path(), "--format", "json"]).good().json();
    assert_eq!(report["streams"].as_array().unwrap().len(), 1);
}

/// Each of very many streams has tables that never end: all together are bounded as well.
#[test]
fn very_many_tables_that_never_end() {
    let mut copy = Copy::new("endless", "arm64-s1-4k");
    let page = 0x4_0000_0000_u64;
    copy.json["memory"] = json!([{"kind": "ram", "first": "0x0", "last": "0xffffffffff"}]);
    copy.add_page(page);
    (0..512).for_each(|index| copy.set_word(page + 8 * index, page | 0x743));
    copy.json["devices"] = (0..500_u64).map(|id| json!({"label": format!("d{id}"), "id": id})).collect();
    let table = |id: u64| json!({"id": id, "format": "arm-smmuv3/stage1", "root": format!("{page:#x}"), "settings": {"mair": id}});
    copy.json["tables"] = (0..500).map(table).collect();
    copy.write();
    let found = run(&["inspect", copy.path(), "--format", "json", "--budget-leaves", "1000"]);
    assert_eq!(found.status, 1, "{}", found.stderr);
    let report = found.json();
    let reason = report["streams"][499]["reason"].as_str().unwrap();
    assert_eq!(reason, "stopped by budget: more than 16000 leaves for all streams together");
    let mappings = |id: usize| report["streams"][id]["mappings"].as_array().unwrap().len();
    assert!(mappings(0) > 0 && mappings(499) == 0);
    let found = run(&["convert", copy.path(), "--to", "intel-vtd/first-stage", "--out", copy.path.join("../out").to_str().unwrap()]);
    assert_eq!(found.status, 1, "{}", found.stderr);
    assert!(found.stderr.contains("stopped by budget") && found.stderr.contains("--budget-tables"), "{}", found.stderr);
    assert_eq!(names(copy.path.parent().unwrap()), ["arm64-s1-4k"]);
}

/// Devices that share a table each show all that it maps: as often as real guests have it, and not as often as anybody likes.
#[test]
fn very_many_devices_that_share_a_table() {
    let shared = |copy: &mut Copy, devices: u64, root: u64| {
        copy.json["devices"] = (0..devices).map(|id| json!({"label": format!("d{id}"), "id": id})).collect();
        let table = |id: u64| json!({"id": id, "format": "arm-smmuv3/stage1", "root": format!("{root:#x}"), "settings": {"output-bits": 44}});
        copy.json["tables"] = (0..devices).map(table).collect();
        copy.write();
    };
    let mut copy = Copy::new("shared", "arm64-s1-4k");
    shared(&mut copy, 1000, root("arm64-s1-4k", "0x38"));
    let known = run(&["inspect", "arm64-s1-4k", "--device", "0x38", "--format", "json"]).good().json()["streams"][0]["mappings"].clone();
    let found = run(&["inspect", copy.path(), "--format", "json"]).good();
    assert_eq!(found.stdout.matches("{\"iova\"").count(), 1000 * known.as_array().unwrap().len(), "all of them, for each device");
    assert!(!found.stdout.contains("budget"));

    // A page of 512 leaves, not one of which continues another, and few are allowed: as many devices as can share all of that, and some more.
    let page = 0x4_0000_0000_u64;
    copy.json["memory"] = json!([{"kind": "ram", "first": "0x0", "last": "0xffffffffff"}]);
    [page, page + 0x1000, page + 0x2000, page + 0x3000].iter().for_each(|page| copy.add_page(*page));
    (0..3).for_each(|level| copy.set_word(page + 0x1000 * level, (page + 0x1000 * (level + 1)) | 3));
    (0..100).for_each(|index| copy.set_word(page + 0x3000 + 16 * index, (page + 0x1000 * index) | 0x743));
    shared(&mut copy, 1100, page);
    let found = run(&["inspect", copy.path(), "--format", "json", "--budget-leaves", "100"]);
    let line = "error: device 0x400 (d1024): stopped by budget: more than 102400 mappings in one report; --device ID asks for one device\n";
    assert_eq!((found.status, &*found.stderr), (1, line));
    let streams = found.json()["streams"].as_array().unwrap().clone();
    let mappings = |id: usize| streams[id]["mappings"].as_array().unwrap().len();
    assert_eq!((streams.len(), [0, 1023, 1024, 1099].map(mappings)), (1100, [100, 100, 0, 0]));
    assert_eq!(
        (&streams[1023]["reason"], &streams[1024]["reason"]),
        (&json!(null), &json!("stopped by budget: more than 102400 mappings in one report"))
    );
    let report = run(&["inspect", copy.path(), "--format", "json", "--device", "d1099", "--budget-leaves", "100"]).good().json();
    assert_eq!(report["streams"][0]["mappings"].as_array().unwrap().len(), 100);
    run(&["inspect", copy.path(), "--all", "--budget-leaves", "100"]).good();
}

/// Each violation names all streams that it concerns: a thousand times very many.
#[test]
fn very_many_devices_that_share_violations() {
    let mut copy = Copy::new("violations", "arm64-s1-4k");
    let page = 0x4_0000_0000_u64;
    copy.json["memory"] = json!([{"kind": "ram", "first": "0x0", "last": "0xffffffffff"}]);
    copy.add_page(page);
    copy.add_page(page + 0x1000);
    copy.set_word(page + 0x1000, page | 3);
    // Not accessed, and hardware does not mark it.
    (0..512).for_each(|index| copy.set_word(page + 8 * index, page | 0x343));
    copy.json["devices"] = (0..1 << 12).map(|id| json!({"label": "", "id": id})).collect();
    let settings = json!({"granule": 4096, "input-bits": 25});
    let table = |id: u64| json!({"id": id, "format": "arm-smmuv3/stage1", "root": format!("{:#x}", page + 0x1000), "settings": settings});
    copy.json["tables"] = (0..1 << 12).map(table).collect();
    let found = run(&["validate", copy.write().path(), "--format", "json"]);
    let line = "error: stopped by budget: more than 1048576 names of streams in one report; --device ID asks for one device\n";
    assert_eq!((found.status, &*found.stderr), (1, line));
    // One line per violation: the first 256 times 4095 streams are named.
    let shared: Vec<usize> = found
        .stdout
        .lines()
        .filter(|line| line.starts_with('{') && line.contains("access-flag"))
        .map(|line| line.matches("{\"id\"").count())
        .collect();
    assert_eq!(shared.len(), 512);
    assert!(shared[..256].iter().all(|streams| *streams >= 4095) && shared[256..].iter().all(|streams| *streams <= 1), "{shared:?}");
    assert!(found.stdout.ends_with("],\"errors\":512,\"warnings\":0}\n"));
}

/// Tables are compared pair by pair, and a guest may pair its tables in as many ways as it has devices.
#[test]
fn very_many_pairs_of_tables() {
    let guest = |test: &str, devices: u64, table_of: fn(u64) -> u64| {
        let mut copy = Copy::new(test, "arm64-s1-4k");
        let (roots, page) = (0x4_0000_0000_u64, 0x4_0000_1000_u64);
        copy.json["memory"] = json!([{"kind": "ram", "first": "0x0", "last": "0xffffffffff"}]);
        copy.add_page(roots);
        copy.add_page(page);
        // Sixteen roots of 128 bytes, all of which lead to ten pages with holes between them.
        (0..16).for_each(|table| copy.set_word(roots + 128 * table, page | 3));
        (0..10).for_each(|index| copy.set_word(page + 16 * index, page | 0x743));
        copy.json["devices"] = (0..devices).map(|id| json!({"label": "", "id": id})).collect();
        let table = |id: u64| {
            let root = format!("{:#x}", roots + 128 * (table_of(id) % 16));
            json!({"id": id, "format": "arm-smmuv3/stage1", "root": root, "settings": {"granule": 4096, "input-bits": 25}})
        };
        copy.json["tables"] = (0..devices).map(table).collect();
        copy.write();
        copy
    };
    for (devices, status) in [(16, 0), (17, 1)] {
        let (a, b) = (guest("pairs-a", devices, |id| id), guest("pairs-b", devices, |id| id + id / 16));
        let found = run(&["diff", a.path(), b.path(), "--budget-leaves", "10"]);
        let line = "error: stopped by budget: more than 320 mappings to compare; --budget-leaves allows more\n";
        assert_eq!((found.status, &*found.stderr), (status, if status == 0 { "" } else { line }), "{devices} devices: {}", found.stdout);
        run(&["diff", a.path(), b.path()]).good();
    }
}

const CONVERT: [&str; 4] = ["convert", "arm64-s1-4k", "--to", "intel-vtd/first-stage"];

fn convert(more: &[&str]) -> Run {
    run(&[&CONVERT[..], more].concat())
}

#[test]
fn output_that_cannot_be_written_leaves_everything_as_it_was() {
    let out = folder("no-room");
    let taken = out.join("taken");
    fs::create_dir(&taken).unwrap();
    fs::write(taken.join("pages.bin"), "old pages").unwrap();
    let as_it_was = |what: &str| {
        assert_eq!(fs::read_to_string(taken.join("pages.bin")).unwrap(), "old pages", "{what}");
        assert_eq!(names(&out), ["taken"], "{what}");
    };
    // A folder where a file should be.
    fs::create_dir(taken.join("snapshot.json")).unwrap();
    let found = convert(&["--out", taken.to_str().unwrap(), "--force"]);
    let line = format!("error: {}: exists and is not a file: it is not replaced\n", taken.join("snapshot.json").display());
    assert_eq!((found.stderr, found.status), (line, 2));
    as_it_was("a folder");
    assert_eq!(names(&taken), ["pages.bin", "snapshot.json"]);
    fs::remove_dir(taken.join("snapshot.json")).unwrap();
    mkfifo(&taken.join("snapshot.json"));
    assert_eq!(convert(&["--out", taken.to_str().unwrap(), "--force"]).status, 2);
    as_it_was("a pipe");
    fs::remove_file(taken.join("snapshot.json")).unwrap();

    // A disk that is full: files end after 8 KiB. Wasmtime's memory is a file as well, so pages of it must fit.
    for (path, force) in [("new", ""), ("taken", "--force")] {
        let target = out.join(path);
        let script = "trap '' XFSZ; ulimit -f 64; exec \"$0\" \"$@\"";
        let line = [&["-c", script, env!("CARGO_BIN_EXE_stagecraft")][..], &CONVERT, &["--out", target.to_str().unwrap()]].concat();
        let mut limited = Command::new("bash");
        limited.args(line).args(Some(force).filter(|force| !force.is_empty())).current_dir(fixtures()).stdin(Stdio::null());
        limited.env("XDG_CACHE_HOME", Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache"));
        let output = limited.output().unwrap();
        let line = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), line.lines().count()), (Some(2), 1), "{line}");
        assert!(line.contains("File too large"), "{line}");
        as_it_was(path);
        assert_eq!(names(&taken), ["pages.bin"]);
    }
}

#[test]
fn with_force_links_are_replaced_and_not_followed() {
    let out = folder("links");
    let (taken, outside) = (out.join("taken"), out.join("outside"));
    fs::create_dir(&taken).unwrap();
    fs::write(&outside, "mine").unwrap();
    for file in ["snapshot.json", "pages.bin", "map.svg"] {
        symlink("../outside", taken.join(file)).unwrap();
    }
    convert(&["--out", taken.to_str().unwrap(), "--force"]).good();
    run(&["draw", "arm64-s1-4k", "--out", taken.join("map.svg").to_str().unwrap(), "--force"]).good();
    assert_eq!(fs::read_to_string(&outside).unwrap(), "mine");
    assert_eq!((names(&taken), names(&out)), (["map.svg", "pages.bin", "snapshot.json"].map(str::to_owned).to_vec(), names(&out)));
    assert!(names(&taken).iter().all(|name| fs::symlink_metadata(taken.join(name)).unwrap().is_file()));
    run(&["inspect", taken.to_str().unwrap()]).good();
    // What is no file is no place for a picture: a device would be gone.
    let pipe = out.join("pipe");
    mkfifo(&pipe);
    let found = run(&["draw", "arm64-s1-4k", "--out", pipe.to_str().unwrap(), "--force"]);
    assert_eq!((found.stderr, found.status), (format!("error: {}: exists and is not a file: it is not replaced\n", pipe.display()), 2));
    assert!(!fs::symlink_metadata(&pipe).unwrap().is_file());
}

#[test]
fn room_for_tables_that_is_too_small_or_too_large() {
    let out = folder("table-bytes").join("out");
    let out = out.to_str().unwrap();
    for (bytes, line) in [
        ("0", "intel-vtd/first-stage: no room for another table: there may be 0x0 bytes of them, from 0x100000000; --table-bytes allows more"),
        ("4095", "intel-vtd/first-stage: no room for another table: there may be 0xfff bytes of them, from 0x100000000; --table-bytes allows more"),
        (
            "0xffffffffffffffff",
            "no hole of 0xffffffffffffffff bytes below 2^48 in the guest's memory map for the tables; --table-bytes N asks for less",
        ),
    ] {
        let found = convert(&["--out", out, "--table-bytes", bytes]);
        assert_eq!((found.stderr, found.status), (format!("error: {line}\n"), 2));
    }
    assert!(!Path::new(out).exists());
}

#[test]
fn settings_that_make_no_sense() {
    let out = folder("settings").join("out");
    let out = out.to_str().unwrap();
    for (settings, line) in [
        (&["levels"][..], "invalid value 'levels' for '--set <NAME=VALUE>': name=value is expected, such as granule=4096"),
        (&["=4"], "invalid value '=4' for '--set <NAME=VALUE>': name=value is expected, such as granule=4096"),
        (&["levels="], "invalid value 'levels=' for '--set <NAME=VALUE>': `` is not a value: a number such as 4096 or 0x1000, true or false"),
        (&["levels=-1"], "invalid value 'levels=-1' for '--set <NAME=VALUE>': `-1` is not a value: a number such as 4096 or 0x1000, true or false"),
        (&["levels=4", "levels=5"], "--set levels: given twice"),
        (&["levels=3"], "plugin intel-vtd: levels = 0x3: must be one of 4, 5 (D51397 section 9.6)"),
    ] {
        let more: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
        let found = convert(&[&["--out", out][..], &more].concat());
        assert_eq!((found.stderr, found.status), (format!("error: {line}\n"), 2));
    }
    assert!(!Path::new(out).exists());
}

#[test]
fn plugin_folders_with_junk() {
    let out = folder("junk");
    let path = out.to_str().unwrap();
    let refused = |line: &str| {
        let found = run(&["formats", "--plugins", path]);
        assert_eq!((found.stderr, found.status), (format!("error: {line}\n"), 2));
        names(&out).iter().for_each(|name| drop(fs::remove_file(out.join(name)).or_else(|_| fs::remove_dir(out.join(name)))));
    };
    mkfifo(&out.join("a.wasm"));
    refused(&format!("`a.wasm` in the plugin directory {path} cannot be read: not a file"));
    fs::create_dir(out.join("a.wasm")).unwrap();
    refused(&format!("`a.wasm` in the plugin directory {path} cannot be read: not a file"));
    symlink("/dev/zero", out.join("a.wasm")).unwrap();
    refused(&format!("`a.wasm` in the plugin directory {path} cannot be read: a path led outside of the filesystem"));
    fs::write(out.join("a.wasm"), "").unwrap();
    let what = "not a WebAssembly component but empty: build it with the component linker (`cargo xtask plugins` shows how)";
    refused(&format!("plugin a.wasm ({path}/a.wasm): {what}"));
    // What does not call itself a plugin is left alone.
    fs::write(out.join("readme.txt"), "junk").unwrap();
    fs::write(out.join(".a.wasm"), "junk").unwrap();
    run(&["formats", "--plugins", path]).good();
    let found = run(&["formats", "--plugins", out.join("readme.txt").to_str().unwrap()]);
    assert_eq!((found.stderr, found.status), (format!("error: the plugin directory {path}/readme.txt: Not a directory (os error 20)\n"), 2));
}

#[test]
fn a_reader_that_goes_away_and_one_that_is_full() {
    for arguments in [&["inspect", "arm64-s1-4k", "--all"][..], &["inspect", "arm64-s1-4k", "--format", "json"], &["formats"], &["man"]] {
        let mut child = command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!((output.status.code(), String::from_utf8(output.stderr).unwrap()), (Some(0), String::new()), "{arguments:?}");
    }
    for arguments in [&["inspect", "arm64-s1-4k"][..], &["validate", "arm64-s1-4k"], &["formats"]] {
        let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let output = command(arguments).stdout(full).output().unwrap();
        let line = "error: standard output: No space left on device (os error 28)\n";
        assert_eq!((output.status.code(), &*String::from_utf8(output.stderr).unwrap()), (Some(2), line), "{arguments:?}");
    }
}

/// Names as long as a file may have them: columns do not follow them, and messages stay readable.
#[test]
fn labels_and_values_without_end() {
    let mut copy = Copy::new("long-label", "arm64-s1-4k");
    copy.json["devices"][0]["label"] = json!("x".repeat(100_000));
    let found = run(&["inspect", copy.write().path(), "--all"]).good();
    assert!(found.stdout.len() < 1_000_000, "{}", found.stdout.len());
    assert!(found.stdout.lines().any(|line| line.contains("0000:00:07.0") && line.len() < 400), "other rows are not moved");
    copy.json["devices"][1]["id"] = json!("y".repeat(100_000));
    let found = run(&["inspect", copy.write().path()]);
    assert!(found.status == 2 && found.stderr.lines().count() == 1 && found.stderr.len() < 1100, "{}", found.stderr);
    assert!(found.stderr.contains(" characters] ") && found.stderr.contains("a number such as"), "{}", found.stderr);
}

/// Sizes that are only promised: holes of a file take no memory, and there are bounds.
#[test]
fn sizes_without_contents() {
    let mut copy = Copy::new("sizes", "arm64-s1-4k");
    let pages = |count: u64| -> serde_json::Value { (0..count).map(|index| format!("{:#x}", index << 12)).collect() };
    copy.json["pages"] = pages((1 << 21) + 1);
    copy.write();
    let file = fs::File::options().write(true).truncate(true).open(copy.path.join("pages.bin")).unwrap();
    file.set_len(((1 << 21) + 1) * 4096).unwrap();
    all_refuse(&copy.path, &format!("{}: 2097153 pages; there may be 2097152", copy.path.join("pages.bin").display()));

    // 256 MiB of zeroes within less memory.
    let count = 1 << 16;
    copy.json["pages"] = pages(count);
    copy.json["memory"] = json!([{"kind": "ram", "first": "0x0", "last": "0xffffffff"}]);
    copy.set_register("STRTAB_BASE", 0);
    copy.write();
    let file = fs::File::options().write(true).truncate(true).open(copy.path.join("pages.bin")).unwrap();
    file.set_len(count * 4096).unwrap();
    run(&["inspect", copy.path()]).good();

    copy.json["pages"] = pages(167);
    copy.json["memory"] = (0..65_537_u64).map(|index| json!({"kind": "ram", "first": index << 13, "last": (index << 13) + 4095})).collect();
    all_refuse(&copy.write().path, &format!("{}: 65537 memory ranges; there may be 65536", copy.path.join("snapshot.json").display()));
}

/// Dumps too: their holes take no memory, and what is too large for a guess is refused before it is read.
#[test]
fn dumps_without_contents() {
    let path = folder("dumps").join("dump");
    let file = fs::File::create(&path).unwrap();
    file.set_len((8 << 30) + 1).unwrap();
    let found = run(&["guess", path.to_str().unwrap(), "--root", "0"]);
    let line = "larger than 8 GiB; give the part that has the tables, and with --base where it begins";
    assert_eq!((&*found.stderr, found.status), (&*format!("error: {}: {line}\n", path.display()), 2));
    let found = run(&["guess", "/dev/zero", "--root", "0"]);
    let line = "error: /dev/zero: neither a file nor a folder; give a dump of memory, or a snapshot\n";
    assert_eq!((&*found.stderr, found.status), (line, 2));
}

/// Instances of plugins reserve address space; where there is little, there are fewer of them.
#[test]
fn little_address_space() {
    let program = command(&[]).get_program().to_str().unwrap().to_owned();
    for line in ["inspect arm64-s1-4k", "guess arm64-s1-4k --root 0x49d92000"] {
        let script = format!("ulimit -v 1500000; exec {program} {line}");
        let mut shell = Command::new("sh");
        let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache");
        let output = shell.args(["-c", &script]).current_dir(fixtures()).env("XDG_CACHE_HOME", cache).output().unwrap();
        assert_eq!((output.status.code(), String::from_utf8(output.stderr).unwrap()), (Some(0), String::new()), "{line}");
    }
}

/// Where there is not even room for that, a line says so. An allocation that fails ends the process, and a thread that cannot start is done without.
#[test]
fn very_little_address_space() {
    let program = command(&[]).get_program().to_str().unwrap().to_owned();
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache");
    run(&["inspect", "arm64-s1-4k"]).good();
    let mut statuses = [0; 3];
    for kilobytes in (200_000..=600_000).step_by(5_000) {
        let script = format!("ulimit -v {kilobytes}; exec {program} inspect arm64-s1-4k");
        let output = Command::new("sh").args(["-c", &script]).current_dir(fixtures()).env("XDG_CACHE_HOME", &cache).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        let Some(status) = output.status.code() else { continue };
        assert!([0, 2].contains(&status) && stderr.lines().count() == usize::from(status == 2), "{kilobytes} KiB: {status}, {stderr}");
        statuses[status as usize] += 1;
    }
    assert!(statuses[0] > 0 && statuses[2] > 0, "{statuses:?}");
}
