//! Bad input: one line that names the thing and what would be right, exit status 2, and nothing half-written.

use std::fs;

use serde_json::json;

use crate::support::{Copy, command, folder, names, root, run};

/// Asserts that the command fails with this line alone, and leaves nothing behind in `out`.
fn refused(arguments: &[&str], line: &str) {
    let found = run(arguments);
    assert_eq!(found.stderr, format!("error: {line}\n"), "{arguments:?}");
    assert_eq!((found.status, &*found.stdout), (2, ""), "{arguments:?}");
}

/// The same where only the line's beginning is known here.
fn refused_with(arguments: &[&str], start: &str) {
    let found = run(arguments);
    assert!(found.stderr.starts_with(&format!("error: {start}")) && found.stderr.lines().count() == 1, "{}", found.stderr);
    assert_eq!((found.status, &*found.stdout), (2, ""), "{arguments:?}");
}

const DEVICES: &str = "0x0 (0000:00:00.0), 0x18 (0000:00:03.0), 0x28 (0000:00:05.0), 0x30 (0000:00:06.0), 0x38 (0000:00:07.0), 0x40 (0000:00:08.0)";

#[test]
fn a_device_that_is_not_there() {
    let line = |device: &str| format!("no device `{device}` in this snapshot; there are {DEVICES}");
    refused(&["inspect", "arm64-s1-4k", "--device", "0x39"], &line("0x39"));
    refused(&["validate", "arm64-s1-4k", "--device", "0000:00:09.0"], &line("0000:00:09.0"));
    refused(&["translate", "arm64-s1-4k", "--device", "57", "--iova", "0", "--access", "r"], &line("57"));
    let out = folder("no-device");
    let path = out.join("x").to_str().unwrap().to_owned();
    refused(&["convert", "arm64-s1-4k", "--to", "intel-vtd/first-stage", "--out", &path, "--device", "57"], &line("57"));
    refused(&["draw", "arm64-s1-4k", "--out", &path, "--device", "57"], &line("57"));
    assert_eq!(names(&out), [""; 0], "nothing is written");
}

#[test]
fn a_snapshot_that_is_none() {
    let out = folder("no-snapshot");
    refused(&["inspect", "nothing-here"], "nothing-here: no such snapshot; give a folder with snapshot.json and pages.bin");
    refused(&["diff", "arm64-s1-4k", "nothing-here"], "nothing-here: no such snapshot; give a folder with snapshot.json and pages.bin");
    let path = out.to_str().unwrap();
    refused(&["validate", path], &format!("{path}: not a snapshot: there is no snapshot.json in it"));
    refused_with(&["inspect", "arm64-s1-4k/pages.bin"], "arm64-s1-4k/pages.bin: not a folder; give the one with snapshot.json and pages.bin");
    fs::write(out.join("snapshot.json"), "{\"version\":1,").unwrap();
    refused_with(&["inspect", path], &format!("{path}/snapshot.json: "));
}

#[test]
fn an_unknown_target_format_or_setting() {
    let out = folder("no-format");
    let path = out.join("x").to_str().unwrap().to_owned();
    let convert = |rest: &[&'static str]| -> Vec<String> {
        let all = [&["convert", "arm64-s1-4k", "--out"][..], &[&*path], rest].concat();
        all.into_iter().map(str::to_owned).collect()
    };
    let refused_with = |rest: &[&'static str], start: &str| {
        let arguments = convert(rest);
        refused_with(&arguments.iter().map(String::as_str).collect::<Vec<_>>(), start);
    };
    refused_with(&["--to", "arm-smmuv3/stage7"], "no plugin knows the table format `arm-smmuv3/stage7`; there are ");
    let known = "levels, output-bits, page-1g, write-protect, supervisor, privileged, extended-access, memory-type";
    refused_with(
        &["--to", "intel-vtd/first-stage", "--set", "level=4"],
        &format!("intel-vtd/first-stage has no setting `level`; there are {known}\n"),
    );
    refused_with(&["--to", "intel-vtd/first-stage", "--set", "levels=6"], "plugin intel-vtd: levels = 0x6: ");
    refused_with(&["--to", "intel-vtd/first-stage", "--set", "levels=4", "--set", "levels=5"], "--set levels: given twice\n");
    refused_with(
        &["--to", "intel-vtd/first-stage", "--set", "levels=four"],
        "invalid value 'levels=four' for '--set <NAME=VALUE>': `four` is not a value: a number such as 4096 or 0x1000, true or false\n",
    );
    assert_eq!(names(&out), [""; 0], "nothing is written");
}

#[test]
fn an_output_that_exists() {
    let out = folder("exists");
    let (taken, picture) = (out.join("taken"), out.join("map.svg"));
    fs::create_dir(&taken).unwrap();
    fs::write(taken.join("notes"), "mine").unwrap();
    fs::write(&picture, "mine").unwrap();
    let (taken, picture) = (taken.to_str().unwrap(), picture.to_str().unwrap());
    let exists = |path: &str| format!("{path} exists already; remove it or allow overwriting with --force");
    refused(&["convert", "arm64-s1-4k", "--to", "intel-vtd/first-stage", "--out", taken], &exists(taken));
    refused(&["draw", "arm64-s1-4k", "--out", picture], &exists(picture));
    assert_eq!((names(&out.join("taken")), fs::read_to_string(picture).unwrap()), (vec!["notes".to_owned()], "mine".to_owned()));

    run(&["convert", "arm64-s1-4k", "--to", "intel-vtd/first-stage", "--out", taken, "--force"]).good();
    run(&["draw", "arm64-s1-4k", "--out", picture, "--force"]).good();
    assert_eq!(names(&out.join("taken")), ["notes", "pages.bin", "snapshot.json"], "other files are left alone");
    assert!(fs::read_to_string(picture).unwrap().starts_with("<?xml"));
    assert_eq!(names(&out), ["map.svg", "taken"], "and nothing else is left behind");

    refused_with(&["convert", taken, "--to", "intel-vtd/first-stage", "--out", taken, "--force"], &format!("{taken}: the snapshot that is read; "));
    refused_with(
        &["convert", "arm64-s1-4k", "--to", "intel-vtd/first-stage", "--out", &format!("{taken}/a/b")],
        &format!("{taken}/a: no such folder"),
    );
    refused_with(&["draw", "arm64-s1-4k", "--out", &format!("{taken}/a/b")], &format!("{taken}/a: no such folder"));
}

#[test]
fn an_unknown_register() {
    let mut copy = Copy::new("register", "arm64-s1-4k");
    copy.json["unit"]["registers"]["FOO"] = json!("0x1");
    refused_with(&["inspect", copy.write().path()], "plugin arm-smmuv3 knows no register `FOO`; there are IDR0, IDR1, ");
    copy.json["unit"]["registers"].as_object_mut().unwrap().retain(|name, _| name != "FOO" && name != "STRTAB_BASE");
    refused_with(&["inspect", copy.write().path()], "device 0x0 (0000:00:00.0): plugin arm-smmuv3: STRTAB_BASE = 0x0: ");
}

#[test]
fn a_plugin_that_is_not_there() {
    let mut copy = Copy::new("plugin", "arm64-s1-4k");
    copy.json["unit"]["kind"] = json!("no-such-unit");
    refused_with(&["inspect", copy.write().path()], "no plugin knows the unit `no-such-unit`; there are ");
    let out = folder("plugins");
    let path = out.to_str().unwrap();
    refused(&["formats", "--plugins", &format!("{path}/none")], &format!("the plugin directory {path}/none: No such file or directory (os error 2)"));
    fs::write(out.join("broken.wasm"), "broken").unwrap();
    let start = format!("plugin broken.wasm ({path}/broken.wasm): not a WebAssembly component");
    refused_with(&["formats", "--plugins", path], &start);
    let output = command(&["formats"]).env("STAGECRAFT_PLUGINS", path).output().unwrap();
    assert!(String::from_utf8(output.stderr).unwrap().starts_with(&format!("error: {start}")), "the environment names the folder too");
    refused_with(&["formats", "no-such/format"], "no plugin knows the table format `no-such/format`; there are ");
}

/// The report is printed as far as it goes; what changes the snapshot into another refuses.
#[test]
fn a_missing_page() {
    let mut copy = Copy::new("page", "arm64-s1-4k");
    let page = copy.entry(root(copy.path(), "0x30"), 0xffff_f000, 4) & !0xfff;
    copy.remove_page(page);
    copy.write();
    let line = format!("error: the snapshot is not complete: it lacks page {page:#x}, which the tables of device 0x30 (0000:00:06.0) need\n");
    for arguments in [&["inspect", copy.path(), "--format", "json"][..], &["inspect", copy.path()], &["validate", copy.path()]] {
        let found = run(arguments);
        assert_eq!((found.status, &found.stderr), (2, &line), "{arguments:?}");
        assert!(!found.stdout.is_empty());
    }
    let report = run(&["inspect", copy.path(), "--format", "json"]).json();
    assert_eq!(report["streams"][3]["reason"], format!("the snapshot lacks page {page:#x}"));
    assert_eq!(report["streams"][3]["state"], "translated");
    assert_eq!(report["streams"][4]["reason"], json!(null), "another device's table is whole");

    let translated = run(&["translate", copy.path(), "--device", "0x30", "--iova", "0xfffff000", "--access", "r", "--format", "json"]);
    assert_eq!((translated.status, &translated.stderr), (2, &line));
    assert_eq!(translated.json()["fault"]["kind"], "missing-page");

    let out = copy.path.join("../out").to_str().unwrap().to_owned();
    refused_with(&["convert", copy.path(), "--to", "intel-vtd/first-stage", "--out", &out], &format!("the snapshot lacks page {page:#x}"));
    refused(&["diff", copy.path(), "arm64-s1-4k"], &format!("{}: {}", copy.path(), line.trim().strip_prefix("error: ").unwrap()));
    refused(&["draw", copy.path(), "--out", &out], line.trim().strip_prefix("error: ").unwrap());
    assert_eq!(names(copy.path.parent().unwrap()), ["arm64-s1-4k"], "nothing is written");
}

/// A unit that takes first-stage tables, as `offers` is told of it.
const VTD: &str = "1:ffffffffffffffffffffffffffffffffffffffffffffffff";

/// A device's own structures, too: a device whose stream table entry is missing is not one that is blocked.
#[test]
fn a_missing_page_of_a_device() {
    let mut copy = Copy::new("device-page", "vtd-sm-fs");
    let rtaddr = copy.register("RTADDR");
    copy.remove_page(rtaddr & !0xfff);
    copy.write();
    let found = run(&["inspect", copy.path(), "--device", "0x38", "--format", "json"]);
    let page = rtaddr & !0xfff;
    assert_eq!(
        found.stderr,
        format!("error: the snapshot is not complete: it lacks page {page:#x}, which the tables of device 0x38 (0000:00:07.0) need\n")
    );
    assert_eq!(found.status, 2);
    assert!(found.json()["streams"][0]["reason"].as_str().unwrap().contains("the snapshot lacks page"));
    let out = copy.path.join("../out").to_str().unwrap().to_owned();
    let line = format!("the snapshot is not complete: it lacks page {page:#x}, which the tables of device 0x0 (0000:00:00.0) need");
    refused(&["convert", copy.path(), "--to", "arm-smmuv3/stage1", "--out", &out], &line);
    refused(&["offers", VTD, copy.path()], &line);
    assert_eq!(names(copy.path.parent().unwrap()), ["vtd-sm-fs"]);
}

/// What would be right is said in the words of docs/snapshot.md.
#[test]
fn a_member_of_the_wrong_kind() {
    let members = [
        ("devices", json!(["0x38"]), "devices[0]: invalid type: string \"0x38\", expected a device: an object with `label` and `id` at line "),
        ("memory", json!([7]), "memory[0]: invalid type: integer `7`, expected a memory range: an object with `kind`, `first` and `last` at line "),
        ("unit", json!("arm-smmuv3"), "unit: invalid type: string \"arm-smmuv3\", expected a unit: an object with `kind` and `registers` at line "),
        (
            "tables",
            json!([null]),
            "tables[0]: invalid type: null, expected a stream: an object with `id`, and `format`, `root` and `settings`, or a `state` at line ",
        ),
        (
            "domains",
            json!([1.5]),
            "domains[0]: invalid type: floating point `1.5`, expected a domain: an object with `id`, `endpoints` and `mappings` at line ",
        ),
        ("unit", json!({"registers": {}}), "`unit` without a `kind`, such as `intel-vtd`"),
        ("devices", json!(null), "missing field `devices`: a list of `label` and `id`"),
    ];
    for (name, value, message) in members {
        let mut copy = Copy::new("member", "arm64-s1-4k");
        copy.json[name] = value;
        refused_with(&["inspect", copy.write().path()], &format!("{}/snapshot.json: {message}", copy.path()));
    }
}

#[test]
fn negative_numbers() {
    let translate = |iova| run(&["translate", "arm64-s1-4k", "--device", "0x38", "--access", "r", "--iova", iova]);
    assert_eq!(translate("-5").stderr, "error: invalid value '-5' for '--iova <X>': a number below 2^64 is expected, such as 4096 or 0x1000\n");
    refused_with(
        &["inspect", "arm64-s1-4k", "--budget-tables", "-1"],
        "invalid value '-1' for '--budget-tables <N>': a number below 2^64 is expected",
    );
}

#[test]
fn a_command_line_that_makes_no_sense() {
    refused(&["inspct", "x"], "unrecognized subcommand 'inspct'; a similar subcommand exists: 'inspect'");
    refused(&["inspect"], "the following required arguments were not provided: <SNAPSHOT>");
    let translate = |iova: &'static str, access: &'static str| ["translate", "arm64-s1-4k", "--device", "0x38", "--iova", iova, "--access", access];
    refused(&translate("0x1g", "r"), "invalid value '0x1g' for '--iova <X>': a number below 2^64 is expected, such as 4096 or 0x1000");
    refused(&translate("0", "x"), "invalid value 'x' for '--access <r|w>' [possible values: r, w]");
    refused(
        &["inspect", "arm64-s1-4k", "--budget-tables", "many"],
        "invalid value 'many' for '--budget-tables <N>': a number below 2^64 is expected, such as 4096 or 0x1000",
    );
}
