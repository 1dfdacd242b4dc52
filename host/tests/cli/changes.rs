//! Converting, comparing, and finding what is wrong: each against a snapshot that was changed in a known place.

use serde_json::{Value, json};

use crate::support::{Copy, folder, root, run};

/// Device 0x30's second page, in a table of 4K pages.
const IOVA: u64 = 0xfffe_1000;

#[test]
fn what_was_converted_reaches_the_same() {
    let out = folder("same");
    for (fixture, format, set) in [
        ("arm64-s1-4k", "intel-vtd/first-stage", "levels=5"),
        ("arm64-s1-4k", "intel-vtd/second-stage", "levels=5"),
        ("vtd-sm-fs", "arm-smmuv3/stage1", "granule=4096"),
        ("vtd-sm-fs", "arm-smmuv3/stage2", "granule=4096"),
    ] {
        let path = out.join(format!("{fixture}-{}", format.replace('/', "-"))).to_str().unwrap().to_owned();
        let report = run(&["convert", fixture, "--to", format, "--set", set, "--out", &path, "--format", "json"]).good().json();
        assert_eq!(report["out"], json!(path));
        let tables = report["tables"].as_array().unwrap();
        assert!(tables.iter().all(|table| table["format"] == format && table["root"].is_string() && table["bytes"].as_u64().unwrap() > 0));
        let refused = |table: &Value| table["losses"].as_array().unwrap().iter().any(|loss| loss["refused"] == true);
        assert!(!tables.iter().any(refused), "{fixture} to {format}: {tables:?}");
        let diff = run(&["diff", fixture, &path, "--format", "json"]).good().json();
        assert_eq!((&diff["same"], &diff["differences"]), (&json!(true), &json!([])), "{fixture} to {format}");
        assert_eq!(run(&["validate", &path]).status, 0);
    }
}

#[test]
fn only_the_device_that_was_asked_for_is_converted() {
    let path = folder("one").join("x").to_str().unwrap().to_owned();
    run(&["convert", "arm64-s1-4k", "--to", "intel-vtd/first-stage", "--out", &path, "--device", "0000:00:06.0", "--device", "0x30"]).good();
    let report = run(&["inspect", &path, "--format", "json"]).good().json();
    assert_eq!(report["streams"].as_array().unwrap().len(), 1);
    assert_eq!(report["streams"][0]["id"], "0x30");
}

#[test]
fn strict_refuses_what_would_not_be_mapped() {
    let out = folder("strict");
    let path = out.join("x").to_str().unwrap().to_owned();
    let convert = ["convert", "vtd-sm-fs", "--to", "arm-smmuv3/stage1", "--set", "granule=65536", "--out", &path, "--format", "json"];
    let found = run(&[&convert[..], &["--strict"]].concat());
    assert_eq!(found.status, 1);
    assert!(found.stderr.starts_with("error: arm-smmuv3/stage1 cannot say ") && found.stderr.ends_with("--strict was given: nothing was written\n"));
    assert_eq!(found.json()["out"], json!(null));
    assert_eq!(crate::support::names(&out), [""; 0]);
    let report = run(&convert).good().json();
    let losses: Vec<&Value> = report["tables"].as_array().unwrap().iter().flat_map(|table| table["losses"].as_array().unwrap()).collect();
    let refused = losses.iter().find(|loss| loss["loss"] == "granule").unwrap();
    assert_eq!(refused["refused"], true);
    assert!(!refused["examples"].as_array().unwrap().is_empty() && refused["bytes"].as_u64().unwrap() > 0);
}

#[test]
fn diff_finds_exactly_what_was_changed() {
    let mut copy = Copy::new("diff", "arm64-s1-4k");
    let table = root(copy.path(), "0x30");
    let entry = copy.entry(table, IOVA, 4);
    let leaf = copy.word(entry);
    let diff = |copy: &Copy| {
        let found = run(&["diff", "arm64-s1-4k", copy.path(), "--format", "json"]);
        assert_eq!((found.status, &*found.stderr), (1, ""));
        let report = found.json();
        assert_eq!((&report["same"], report["differences"].as_array().unwrap().len()), (&json!(false), 1));
        assert_eq!(report["differences"][0]["streams"], json!([{"id": "0x30", "pasid": null}]));
        report["differences"][0]["ranges"].clone()
    };
    let was = format!("{:#x}", leaf & 0xffff_ffff_f000);
    let before = json!({"address": was, "access": "rw"});
    // The page goes away, goes elsewhere, and becomes read-only (AP[2]).
    copy.set_word(entry, 0);
    assert_eq!(diff(copy.write()), json!([{"change": "removed", "iova": "0xfffe1000", "size": 4096, "a": before, "b": null}]));
    copy.set_word(entry, leaf & !0xffff_ffff_f000 | 0x4123_4000);
    let moved = json!({"address": "0x41234000", "access": "rw"});
    assert_eq!(diff(copy.write()), json!([{"change": "changed", "iova": "0xfffe1000", "size": 4096, "a": before, "b": moved}]));
    copy.set_word(entry, leaf | 1 << 7);
    let narrowed = json!({"address": was, "access": "r"});
    assert_eq!(diff(copy.write()), json!([{"change": "changed", "iova": "0xfffe1000", "size": 4096, "a": before, "b": narrowed}]));
    copy.set_word(entry, leaf);
    run(&["diff", "arm64-s1-4k", copy.write().path()]).good();
}

#[test]
fn validate_names_the_entry_the_bits_and_the_section() {
    let mut copy = Copy::new("validate", "arm64-s1-4k");
    let table = root(copy.path(), "0x30");
    let entry = copy.entry(table, IOVA, 4);
    let leaf = copy.word(entry);
    // The Access flag is clear, and hardware does not set it.
    copy.set_word(entry, leaf & !(1 << 10));
    let found = run(&["validate", copy.write().path(), "--format", "json"]);
    assert_eq!((found.status, &*found.stderr), (1, ""));
    let report = found.json();
    assert_eq!((&report["errors"], &report["warnings"]), (&json!(1), &json!(0)));
    let violation = &report["violations"][0];
    let path = violation["path"].as_array().unwrap();
    assert_eq!(path.len(), 4, "from the root to the entry");
    assert_eq!(path[0]["table"], format!("{table:#x}"));
    let last =
        json!({"level": 3, "table": format!("{:#x}", entry & !0xfff), "index": (entry & 0xfff) / 8, "entry": format!("{:#x}", leaf & !(1 << 10))});
    assert_eq!(path[3], last);
    let expected = json!({
        "id": "0x30", "pasid": null, "shared": [], "severity": "error", "kind": "access-flag", "stage": 1, "iova": "0xfffe1000", "last": "0xfffe1fff",
        "level": 3, "path": path, "entry": last["entry"], "bits": "0x400", "section": "DDI 0487 section D8.5.1",
        "reason": "the Access flag is clear and hardware does not set it", "count": 1,
    });
    assert_eq!(*violation, expected);
    let human = run(&["validate", copy.path(), "--device", "0x30"]);
    assert_eq!(human.status, 1);
    for text in [
        "1 stream, 1 table: 1 error, no warnings",
        "error: access-flag  device 0x30 (0000:00:06.0), IOVA 0xfffe1000..=0xfffe1fff",
        "(DDI 0487 section D8.5.1)",
    ] {
        assert!(human.stdout.contains(text), "{}", human.stdout);
    }
    // The same entry, asked for by a device.
    let fault = run(&["translate", copy.path(), "--device", "0x30", "--iova", "0xfffe1abc", "--access", "r", "--format", "json"]).good().json();
    let reason = "the Access flag is clear and hardware does not set it (DDI 0487 section D8.5.1)";
    assert_eq!(fault, json!({"succeeds": false, "fault": {"kind": "access-flag", "stage": 1, "level": 3, "reason": reason}}));
}

#[test]
fn warnings_are_counted_per_pattern_and_change_nothing_unless_strict() {
    let mut copy = Copy::new("warnings", "arm64-s1-4k");
    let table = root(copy.path(), "0x30");
    let first = copy.entry(table, IOVA, 4);
    for entry in [first, first + 8, first + 16] {
        // Shareability 0b01 is reserved, and hardware takes it as non-shareable.
        let leaf = copy.word(entry);
        copy.set_word(entry, leaf & !(3 << 8) | 1 << 8);
    }
    let report = run(&["validate", copy.write().path(), "--format", "json"]).good().json();
    assert_eq!((&report["errors"], &report["warnings"]), (&json!(0), &json!(1)));
    let violation = &report["violations"][0];
    assert_eq!((&violation["severity"], &violation["count"], &violation["iova"]), (&json!("warning"), &json!(3), &json!("0xfffe1000")));
    assert_eq!(run(&["validate", copy.path(), "--strict"]).status, 1);
}

#[test]
fn violations_beyond_the_maximum_are_counted() {
    let mut copy = Copy::new("many", "arm64-s1-4k");
    let first = copy.entry(root(copy.path(), "0x30"), IOVA, 4);
    for entry in (0..5).map(|index| first + 8 * index) {
        let leaf = copy.word(entry);
        copy.set_word(entry, leaf & !(1 << 10));
    }
    let report = run(&["validate", copy.write().path(), "--format", "json", "--max", "2"]).json();
    assert_eq!((&report["errors"], report["violations"].as_array().unwrap().len()), (&json!(5), 2));
}

#[test]
fn a_broken_device_structure_is_a_violation() {
    let mut copy = Copy::new("context", "vtd-sm-fs");
    // The root entry of bus 0: a reserved bit.
    let rtaddr = copy.register("RTADDR") & !0xfff;
    let entry = copy.word(rtaddr);
    copy.set_word(rtaddr, entry | 1 << 3);
    let found = run(&["validate", copy.write().path(), "--device", "0x38", "--format", "json"]);
    assert_eq!(found.status, 1);
    let violation = &found.json()["violations"][0];
    assert_eq!((&violation["kind"], &violation["stage"], &violation["path"]), (&json!("blocked"), &json!(null), &json!([])));
    assert_eq!((&violation["structure"], &violation["bits"]), (&json!({"address": format!("{rtaddr:#x}"), "word": 0}), &json!("0x8")));
    assert_eq!(violation["section"], "D51397 section 7.1.3, fault reason 3Ah");
    assert_eq!(violation["reason"], "SRT.3: the scalable-mode root entry has a reserved bit");
}
