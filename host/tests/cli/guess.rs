//! `guess` and `offers`: what is asked for, and what is answered when there is no answer.

use std::fs;

use crate::support::{Copy, folder, hex, root, run};

/// A unit with nesting and five levels; and one that takes the tables of the Arm guest as they are.
const VTD: &str = "1:0100000000000000060e38228c00d211420f000400880100";
const SMMU: &str = "2:00000000000000001b10440d10007302000000001414000000000000740000000000000000000000";

#[test]
fn a_guess_needs_no_registers_and_agrees_with_them() {
    for (fixture, format) in [("arm64-s1-4k", "arm-smmuv3/stage1"), ("vtd-sm-fs", "intel-vtd/first-stage")] {
        let mut copy = Copy::new("guess-without-registers", fixture);
        let address = format!("{:#x}", root(copy.path(), "0x38"));
        copy.json["unit"]["registers"] = serde_json::json!({});
        copy.write();
        let report = run(&["guess", copy.path(), "--root", &address, "--format", "json"]).good().json();
        let first = &report["candidates"][0];
        assert_eq!((&first["format"], &first["levels"], &first["root"]), (&format.into(), &4.into(), &address.clone().into()), "{report:#}");
        assert!(report["fits"] == true && first["rank"] == 1 && first["evidence"]["bits"].as_i64().unwrap() > 1000);
        // Tables of the processors' format are those of two architectures.
        assert_eq!(report["equal"], if fixture == "vtd-sm-fs" { 2 } else { 1 });
        let only = run(&["guess", copy.path(), "--root", &address, "--only", "s390-zpci"]);
        assert_eq!(
            (only.status, &*only.stderr),
            (1, &*format!("error: nothing fits: no installed format explains what stands at {address} better than chance\n"))
        );
    }
}

/// Whatever else is missing, memory is enough.
#[test]
fn a_guess_needs_neither_a_unit_nor_devices() {
    let address = format!("{:#x}", root("arm64-s1-4k", "0x38"));
    for missing in [&["unit"][..], &["registers"], &["kind"], &["unit", "devices"]] {
        let mut copy = Copy::new("guess-without-unit", "arm64-s1-4k");
        for name in missing {
            let json = if *name == "registers" || *name == "kind" { &mut copy.json["unit"] } else { &mut copy.json };
            json.as_object_mut().unwrap().remove(*name);
        }
        let report = run(&["guess", copy.write().path(), "--root", &address, "--format", "json"]).good().json();
        let first = &report["candidates"][0];
        assert_eq!((&first["format"], &first["levels"]), (&"arm-smmuv3/stage1".into(), &4.into()), "without {missing:?}");
        assert_eq!(run(&["inspect", copy.path()]).status, 2, "without {missing:?}");
    }
}

/// A dump of memory with the pages of a snapshot at their places, as far as they lie below a bound.
fn dump(name: &str, fixture: &str, first: u64, last: u64) -> String {
    let copy = Copy::new(name, fixture);
    let mut bytes = vec![0_u8; (last - first + 1) as usize];
    for page in copy.json["pages"].as_array().unwrap().iter().map(hex).filter(|page| (first..=last).contains(page)) {
        for offset in (0..4096).step_by(8) {
            let at = (page - first + offset) as usize;
            bytes[at..at + 8].copy_from_slice(&copy.word(page + offset).to_le_bytes());
        }
    }
    let path = folder(&format!("{name}-file")).join("dump");
    fs::write(&path, bytes).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_dump_of_memory_will_do() {
    let address = root("arm64-s1-4k", "0x38");
    let (first, last) = (0x4900_0000, 0x4fff_ffff);
    let path = dump("guess-dump", "arm64-s1-4k", first, last);
    let text = |number: u64| format!("{number:#x}");
    let all = [
        "guess",
        &path,
        "--root",
        &text(address),
        "--base",
        &text(first),
        "--memory",
        "0x40000000-0xbfffffff",
        "--memory",
        "0x8000000000-0xffffffffff",
    ];
    let report = run(&[&all[..], &["--format", "json"]].concat()).good().json();
    assert_eq!((&report["candidates"][0]["format"], &report["candidates"][0]["levels"]), (&"arm-smmuv3/stage1".into(), &4.into()), "{report:#}");
    let refused = |arguments: &[&str], line: &str| {
        let found = run(arguments);
        assert_eq!((found.status, &*found.stderr), (2, &*format!("error: {line}\n")), "{arguments:?}");
    };
    refused(&["guess", &path, "--root", "0x1000", "--base", "0x49000000"], &format!("{path}: there is no page for a root at 0x1000"));
    refused(&["guess", &path, "--root", "0x1000", "--base", "0x10"], &format!("{path}: cannot begin at 0x10: give a multiple of 4096"));
    refused(
        &["guess", &path, "--root", "0", "--base", "0xfffffffffffff000"],
        &format!("{path}: 0x7000000 bytes from 0xfffffffffffff000 do not fit below 2^64"),
    );
    refused(
        &["guess", "arm64-s1-4k", "--root", "0x49d92000", "--base", "0"],
        "arm64-s1-4k: a snapshot says itself where memory is; --base and --memory are for a dump",
    );
    let empty = folder("guess-empty").join("empty");
    fs::write(&empty, "").unwrap();
    let empty = empty.to_str().unwrap();
    refused(&["guess", empty, "--root", "0"], &format!("{empty}: there is nothing in it; give a dump of memory"));
}

#[test]
fn hardware_picks_a_target() {
    let out = folder("convert-for");
    let path = out.join("x");
    let path = path.to_str().unwrap();
    // Bound as they are: nothing is written.
    let found = run(&["convert", "arm64-s1-4k", "--for", SMMU, "--out", path]);
    assert!(found.status == 1 && found.stderr.starts_with("error: nothing to convert: ") && !out.join("x").exists(), "{found:?}");
    let choice = run(&["offers", SMMU, "arm64-s1-4k", "--format", "json"]).good().json();
    assert_eq!(choice["choice"]["kind"], "native");
    run(&["convert", "arm64-s1-4k", "--for", VTD, "--out", path, "--strict"]).good();
    let same = run(&["diff", "arm64-s1-4k", path]);
    assert_eq!(same.status, 0, "{}", same.stdout);
    for (hardware, line) in [
        ("9:00", "no plugin knows hardware information of type 9\n"),
        ("1:00", "plugin intel-vtd: info = 0x1: VT-d's hardware information has 24 bytes\n"),
    ] {
        let found = run(&["offers", hardware]);
        assert_eq!((found.status, &*found.stderr), (2, &*format!("error: {line}")));
    }
    let found = run(&["convert", "arm64-s1-4k", "--for", VTD, "--out", path, "--force", "--set", "levels=5"]);
    assert_eq!((found.status, &*found.stderr), (2, "error: --set: the settings follow from --for; give --to to choose them\n"));
}
