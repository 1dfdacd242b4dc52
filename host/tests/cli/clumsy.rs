//! Slips of people at the keyboard: files in the wrong place, numbers in the wrong form, names of what is no file.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::support::{Copy, command, folder, names, root, run};

/// The command fails with this line alone.
fn refused(arguments: &[&str], line: &str) {
    let found = run(arguments);
    assert_eq!((found.stderr, found.status, &*found.stdout), (format!("error: {line}\n"), 2, ""), "{arguments:?}");
}

fn mkfifo(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

/// A line of ten thousand characters has many columns: the member is named as well.
#[test]
fn members_of_a_snapshot_are_named() {
    let mut copy = Copy::new("named", "arm64-s1-4k");
    let plain = copy.json.clone();
    let number = "expected a number such as \"0x1000\" or 4096, below 2^64";
    for (place, value, line) in [
        ("/version", json!(1.5), format!("version: invalid type: floating point `1.5`, {number}")),
        ("/page_size", json!(null), format!("page_size: invalid type: null, {number}")),
        ("/pages/3", json!("1000"), format!("pages[3]: invalid value: string \"1000\", {number}")),
        ("/devices/2/id", json!(-1), format!("devices[2].id: invalid type: integer `-1`, {number}")),
        ("/memory/1", json!({"kind": "ram", "first": 0}), "memory[1]: missing field `last`".to_owned()),
        ("/unit/registers/CR0", json!([]), format!("unit.registers.CR0: invalid type: sequence, {number}")),
        ("/memory", json!(7), "memory: invalid type: integer `7`, expected a sequence".to_owned()),
    ] {
        copy.json = plain.clone();
        *copy.json.pointer_mut(place).unwrap() = value;
        let found = run(&["inspect", copy.write().path()]);
        let start = format!("error: {}/snapshot.json: {line} at line 1 column ", copy.path());
        assert!(found.stderr.starts_with(&start) && found.stderr.lines().count() == 1, "{place}: {}", found.stderr);
        assert_eq!(found.status, 2);
    }
    let text = plain.to_string();
    for (text, line) in [
        (text.replacen("\"version\"", "\"verson\"", 1), "missing field `version`"),
        (format!("{}, \"pages\": []}}", &text[..text.len() - 1]), "duplicate field `pages`"),
    ] {
        fs::write(copy.path.join("snapshot.json"), text).unwrap();
        let found = run(&["inspect", copy.path()]);
        assert!(found.stderr.starts_with(&format!("error: {}/snapshot.json: {line} at line 1 column ", copy.path())), "{}", found.stderr);
    }
}

/// A table of device 0x38, and others like it.
fn listed(copy: &Copy) -> Value {
    let root = format!("{:#x}", root(copy.path(), "0x38"));
    json!({"id": "0x38", "format": "arm-smmuv3/stage1", "root": root, "settings": {"granule": 4096, "input-bits": 48}})
}

/// Every number of a snapshot may be written in hex.
#[test]
fn numbers_in_hex_everywhere() {
    let mut copy = Copy::new("hex", "arm64-s1-4k");
    let table = listed(&copy);
    let mut other = table.clone();
    other["pasid"] = json!("0xfffff");
    copy.json["tables"] = json!([table, other]);
    copy.json["version"] = json!("0x1");
    copy.json["page_size"] = json!("0x1000");
    let report = run(&["inspect", copy.write().path(), "--device", "0x38", "--format", "json"]).good().json();
    assert_eq!((&report["streams"][0]["pasid"], &report["streams"][1]["pasid"]), (&json!(null), &json!(0xfffff)));
    copy.json["tables"][1]["pasid"] = json!(1 << 20);
    let line = "tables: device 0x38 has PASID 0x100000; a PASID has 20 bits: 0 to 0xfffff";
    refused(&["inspect", copy.write().path()], &format!("{}/snapshot.json: {line}", copy.path()));
}

/// Among many tables the one that is wrong is named, whatever is asked.
#[test]
fn a_listed_table_that_is_wrong() {
    let mut copy = Copy::new("listed", "arm64-s1-4k");
    let (table, out) = (listed(&copy), copy.path.join("../out").to_str().unwrap().to_owned());
    let mut wrong = table.clone();
    wrong["id"] = json!("0x40");
    wrong["settings"]["granule"] = json!(4097);
    copy.json["tables"] = json!([table, wrong]);
    copy.write();
    let line = "the table of device 0x40: plugin arm-smmuv3: granule = 0x1001: must be one of 4096, 16384, 65536 (DDI 0487 section D8.2)";
    for arguments in [
        &["inspect", copy.path()][..],
        &["validate", copy.path()],
        &["draw", copy.path(), "--out", &out],
        &["convert", copy.path(), "--to", "intel-vtd/first-stage", "--out", &out],
        &["translate", copy.path(), "--device", "0x40", "--iova", "0", "--access", "r"],
    ] {
        refused(arguments, line);
    }
    refused(&["diff", "arm64-s1-4k", copy.path()], &format!("{}: {line}", copy.path()));
    copy.json["tables"][1] = json!({"id": "0x40", "pasid": 5, "format": "no/such", "root": "0x1000"});
    let found = run(&["inspect", copy.write().path()]);
    assert!(
        found.stderr.starts_with("error: the table of device 0x40 PASID 0x5: no plugin knows the table format `no/such`; there are "),
        "{}",
        found.stderr
    );
    assert_eq!(names(copy.path.parent().unwrap()), ["arm64-s1-4k"]);
}

#[test]
fn negative_numbers_are_values() {
    for device in [&["inspect", "arm64-s1-4k", "--device", "-1"][..], &["validate", "arm64-s1-4k", "--device", "-1"]] {
        let found = run(device);
        assert!(found.stderr.starts_with("error: no device `-1` in this snapshot; there are 0x0 "), "{}", found.stderr);
        assert_eq!(found.status, 2);
    }
    let expected = "a number below 2^64 is expected, such as 4096 or 0x1000";
    refused(&["validate", "arm64-s1-4k", "--max", "-1"], &format!("invalid value '-1' for '--max <N>': {expected}"));
    refused(&["run", "x.toml", "--operations", "-1"], &format!("invalid value '-1' for '--operations <N>': {expected}"));
    refused(&["run", "x.toml", "--seed", "-1"], &format!("invalid value '-1' for '--seed <N>': {expected}"));
}

/// A unit's description comes from a file, of which no more is read than it may have.
#[test]
fn descriptions_of_hardware() {
    let out = folder("hardware");
    let path = |name: &str| out.join(name).to_str().unwrap().to_owned();
    fs::File::create(path("large")).unwrap().set_len(1 << 40).unwrap();
    mkfifo(&out.join("pipe"));
    fs::write(path("vtd"), [0; 24]).unwrap();
    let argument = |name: &str| format!("1:@{name}");
    for (file, what) in [
        (path("large"), "more than 4096 bytes, and a unit's description has at most so many".to_owned()),
        (path("pipe"), format!("{}: not a file", path("pipe"))),
        ("/dev/zero".to_owned(), "/dev/zero: not a file".to_owned()),
        (path("none"), format!("{}: No such file or directory (os error 2)", path("none"))),
    ] {
        refused(&["offers", &argument(&file)], &format!("invalid value '1:@{file}' for '<HARDWARE>': {what}"));
        let convert = ["convert", "arm64-s1-4k", "--out", &path("out"), "--for", &argument(&file)];
        refused(&convert, &format!("invalid value '1:@{file}' for '--for <HARDWARE>': {what}"));
    }
    assert_eq!(run(&["offers", &argument(&path("vtd"))]).status, 1, "it is read, and takes no tables");
    let digits = "pairs of hex digits are expected, in the order in which the bytes stand in memory";
    refused(&["offers", "1:0x0x00"], &format!("invalid value '1:0x0x00' for '<HARDWARE>': {digits}"));
}

/// A picture takes the place of what is there: not of what it is made of, and not of names that the system needs.
#[test]
fn pictures_in_the_wrong_place() {
    let copy = Copy::new("pictures", "arm64-s1-4k");
    let out = folder("wrong-place");
    let path = |name: &str| out.join(name).to_str().unwrap().to_owned();
    let draw = |to: &str| ["draw", copy.path(), "--force", "--out", to].map(str::to_owned);
    let draw = |to: &str, line: &str| refused(&draw(to).each_ref().map(String::as_str), line);
    symlink(copy.path.join("pages.bin"), path("link")).unwrap();
    for file in ["pages.bin", "snapshot.json"].map(|file| copy.path.join(file).to_str().unwrap().to_owned()).iter().chain([&path("link")]) {
        draw(file, &format!("{file}: a file that is read; give another one for the picture"));
    }
    run(&["inspect", copy.path()]).good();
    mkfifo(&out.join("pipe"));
    symlink("/proc/self/fd/1", path("stdout")).unwrap();
    symlink("/dev/null", path("null")).unwrap();
    symlink("pipe", path("to-pipe")).unwrap();
    for name in ["stdout", "null", "to-pipe", "pipe"] {
        draw(&path(name), &format!("{}: exists and is not a file: it is not replaced", path(name)));
    }
    // Standard output that goes to a file makes no file of its name.
    let mut redirected = command(&["draw", copy.path(), "--force", "--out", &path("stdout")]);
    assert_eq!(redirected.stdout(fs::File::create(path("text")).unwrap()).output().unwrap().status.code(), Some(2));
    assert_eq!(names(&out), ["link", "null", "pipe", "stdout", "text", "to-pipe"]);
    assert!(fs::symlink_metadata(path("stdout")).unwrap().is_symlink());

    let scenario = path("scenario.toml");
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../scenarios/arm-on-x86.toml")).unwrap();
    fs::write(&scenario, &text).unwrap();
    let line = format!("{scenario}: a file that is read; give another one for the picture");
    refused(&["run", &scenario, "--operations", "1", "--out", &scenario, "--force"], &line);
    assert_eq!(fs::read_to_string(&scenario).unwrap(), text);
}

/// All pages of the manual, or none: and nobody waits for a pipe.
#[test]
fn a_manual_that_has_no_room() {
    let out = folder("manual");
    fs::create_dir(out.join("stagecraft-run.1")).unwrap();
    let path = |name: &str| out.join(name).to_str().unwrap().to_owned();
    let refuses = |name: &str| refused(&["man", "--out", &path("")], &format!("{}: exists and is not a file: it is not replaced", path(name)));
    refuses("stagecraft-run.1");
    fs::remove_dir(out.join("stagecraft-run.1")).unwrap();
    mkfifo(&out.join("stagecraft.1"));
    refuses("stagecraft.1");
    assert_eq!(names(&out), ["stagecraft.1"]);
    fs::remove_file(out.join("stagecraft.1")).unwrap();
    run(&["man", "--out", &path("")]).good();
    run(&["man", "--out", &path("")]).good();
    assert_eq!(names(&out).len(), 13);
}

#[test]
fn a_plugin_whose_name_is_no_text() {
    let out = folder("no-text");
    fs::write(out.join(OsStr::from_bytes(b"\xff.wasm")), "x").unwrap();
    fs::write(out.join(OsStr::from_bytes(b"\xff.txt")), "x").unwrap();
    let path = out.to_str().unwrap();
    let line = format!("`\u{fffd}.wasm` is not the name of a file in the plugin directory {path}: it must be NAME.wasm in UTF-8, without a folder");
    refused(&["formats", "--plugins", path], &line);
    fs::remove_file(out.join(OsStr::from_bytes(b"\xff.wasm"))).unwrap();
    run(&["formats", "--plugins", path]).good();
}

/// A guest without tables needs no file of pages, however it says so.
#[test]
fn a_guest_without_tables_has_no_pages() {
    let out = folder("no-pages");
    let path = out.to_str().unwrap();
    let guest = |member: &str, value: Value| {
        let mut guest = json!({"version": 1, "memory": [{"kind": "ram", "first": 0, "last": "0xffff"}], "devices": [{"label": "a", "id": 8}]});
        guest.as_object_mut().unwrap().extend([("page_size".to_owned(), json!(4096)), ("pages".to_owned(), json!([])), (member.to_owned(), value)]);
        fs::write(out.join("snapshot.json"), guest.to_string()).unwrap();
        run(&["inspect", path, "--format", "json"]).good().json()["streams"][0]["state"].clone()
    };
    assert_eq!(guest("tables", json!([{"id": 8, "state": "bypass"}])), "bypass");
    assert_eq!(guest("tables", json!([])), "blocked");
    // Disabled, and requests pass by GBPA's reset value.
    let registers = json!({"IDR0": 0x2, "IDR1": 8, "IDR5": 0x75, "CR0": 0, "STRTAB_BASE": 0, "STRTAB_BASE_CFG": 0, "GBPA": 0});
    assert_eq!(guest("unit", json!({"kind": "arm-smmuv3", "registers": registers})), "bypass");
    symlink("nowhere", out.join("pages.bin")).unwrap();
    refused(&["inspect", path], &format!("{path}/pages.bin: No such file or directory (os error 2)"));
}
