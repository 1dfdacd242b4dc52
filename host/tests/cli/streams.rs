//! What real guests of the fixtures do not have: PASIDs, and two stages. Made from one of them, in its own device structures.

use serde_json::{Value, json};

use crate::support::{Copy, names, root, run};

/// A unit that takes first-stage tables, as `offers` is told of it.
const VTD: &str = "1:ffffffffffffffffffffffffffffffffffffffffffffffff";

/// Address of the stream table entry of device 0x30, by IHI 0070 section 5.1: two levels.
fn stream_table_entry(copy: &Copy) -> u64 {
    assert_eq!(copy.register("STRTAB_BASE_CFG") >> 16 & 3, 1, "two levels");
    let first = copy.register("STRTAB_BASE") & 0x000f_ffff_ffff_ffc0;
    (copy.word(first) & 0x000f_ffff_ffff_ffc0) + 0x30 * 64
}

fn streams(copy: &Copy) -> Vec<Value> {
    let report = run(&["inspect", copy.path(), "--device", "0x30", "--format", "json"]).good().json();
    report["streams"].as_array().unwrap().clone()
}

#[test]
fn pasids_follow_their_device() {
    let mut copy = Copy::new("pasids", "arm64-s1-4k");
    let entry = stream_table_entry(&copy);
    let contexts = copy.word(entry) & 0x000f_ffff_ffff_ffc0;
    // The unit takes SubstreamIDs of one bit (SSIDSIZE), the entry has two contexts (S1CDMax), and requests without one use the first (S1DSS).
    copy.set_register("IDR1", copy.register("IDR1") | 1 << 6);
    copy.set_word(entry, copy.word(entry) | 1 << 59);
    copy.set_word(entry + 8, copy.word(entry + 8) & !3 | 2);
    for word in 0..8 {
        copy.set_word(contexts + 64 + 8 * word, copy.word(contexts + 8 * word));
    }
    let found = streams(copy.write());
    assert_eq!(found.len(), 2);
    assert_eq!((&found[0]["pasid"], &found[1]["pasid"]), (&json!(null), &json!(1)));
    assert_eq!((&found[1]["id"], &found[1]["state"]), (&json!("0x30"), &json!("translated")));
    assert_eq!(found[0]["mappings"], found[1]["mappings"], "the same context twice");
    let translate = ["translate", copy.path(), "--device", "0x30", "--iova", "0xfffe0000", "--access", "r", "--format", "json", "--pasid"];
    assert_eq!(run(&[&translate[..], &["1"]].concat()).good().json()["succeeds"], true);
    assert_eq!(run(&[&translate[..], &["2"]].concat()).good().json()["fault"]["kind"], "blocked");
    // One table, used twice: whatever is wrong with it is said once.
    let leaf = copy.entry(root(copy.path(), "0x30"), 0xfffe_1000, 4);
    copy.set_word(leaf, copy.word(leaf) & !(1 << 10));
    let report = run(&["validate", copy.write().path(), "--format", "json"]).json();
    assert_eq!(report["errors"], 1);
    assert_eq!(report["violations"][0]["shared"], json!([{"id": "0x30", "pasid": 1}]));
}

/// A list that is cut says so; a device has 2^20 PASIDs at most.
#[test]
fn more_pasids_than_are_listed() {
    const TABLE: u64 = 0x7000_0000;
    for (bits, status) in [(9, 0), (11, 1)] {
        let mut copy = Copy::new("many-pasids", "arm64-s1-4k");
        let entry = stream_table_entry(&copy);
        let contexts = copy.word(entry) & 0x000f_ffff_ffff_ffc0;
        (0..1 << bits >> 6).for_each(|page| copy.add_page(TABLE + page * 4096));
        for place in (0..8 << bits).map(|word| word * 8) {
            copy.set_word(TABLE + place, copy.word(contexts + place % 64));
        }
        copy.set_register("IDR1", copy.register("IDR1") | bits << 6);
        copy.set_word(entry, copy.word(entry) & !0x000f_ffff_ffff_ffc0 | TABLE | bits << 59);
        copy.set_word(entry + 8, copy.word(entry + 8) & !3 | 2);
        let found = run(&["inspect", copy.write().path(), "--device", "0x30", "--format", "json"]);
        let line = "error: device 0x30 (0000:00:06.0): 1024 PASIDs are listed, and it may have more; `translate --pasid` asks about any\n";
        assert_eq!((found.status, &*found.stderr), (status, if status == 0 { "" } else { line }));
        assert_eq!(found.json()["streams"].as_array().unwrap().len(), if status == 0 { 512 } else { 1025 });
        assert_eq!(run(&["validate", copy.path(), "--device", "0x30"]).status, status);
        // Half of what a device reaches is not converted, and nothing is said to suit it.
        let out = copy.path.join("../out").to_str().unwrap().to_owned();
        let convert = run(&["convert", copy.path(), "--to", "intel-vtd/first-stage", "--out", &out]);
        assert_eq!((convert.status, &*convert.stderr), (status, if status == 0 { "" } else { line }));
        assert_eq!(names(copy.path.parent().unwrap()).len(), if status == 0 { 2 } else { 1 });
        let offers = run(&["offers", VTD, copy.path()]);
        assert_eq!((offers.status, &*offers.stderr), (status, if status == 0 { "" } else { line }));
    }
}

/// A page of the list of contexts that is not there hides what devices reach: that is said, and nothing is made of the rest.
#[test]
fn pasids_in_a_missing_page() {
    const TABLES: u64 = 0x7000_0000;
    let mut copy = Copy::new("missing-pasids", "arm64-s1-4k");
    let entry = stream_table_entry(&copy);
    let contexts = copy.word(entry) & 0x000f_ffff_ffff_ffc0;
    // Two levels of contexts with leaves of 4 KiB (S1Fmt): the first leaf has the one that there was, and the second one is missing.
    copy.add_page(TABLES);
    copy.add_page(TABLES + 0x1000);
    copy.set_word(TABLES, (TABLES + 0x1000) | 1);
    copy.set_word(TABLES + 8, (TABLES + 0x2000) | 1);
    (0..8).for_each(|word| copy.set_word(TABLES + 0x1000 + 8 * word, copy.word(contexts + 8 * word)));
    copy.set_register("IDR0", copy.register("IDR0") | 1 << 19);
    copy.set_register("IDR1", copy.register("IDR1") & !(0x1f << 6) | 7 << 6);
    copy.set_word(entry, copy.word(entry) & !0x000f_ffff_ffff_fff0 | TABLES | 1 << 4 | 7 << 59);
    copy.set_word(entry + 8, copy.word(entry + 8) & !3 | 2);
    let out = copy.write().path.join("../out").to_str().unwrap().to_owned();
    let line = "error: the snapshot is not complete: it lacks page 0x70002000, which the tables of device 0x30 (0000:00:06.0) need\n";
    for arguments in [
        &["inspect", copy.path()][..],
        &["validate", copy.path()],
        &["draw", copy.path(), "--out", &out],
        &["convert", copy.path(), "--to", "intel-vtd/first-stage", "--out", &out],
        &["convert", copy.path(), "--to", "intel-vtd/first-stage", "--out", &out, "--device", "0x30"],
        &["offers", VTD, copy.path()],
    ] {
        let found = run(arguments);
        assert_eq!((found.status, &*found.stderr), (2, line), "{arguments:?}");
    }
    assert_eq!(names(copy.path.parent().unwrap()), ["arm64-s1-4k"]);
    run(&["convert", copy.path(), "--to", "intel-vtd/first-stage", "--out", &out, "--device", "0x38"]).good();
}

/// No option allows more of them, and none is named.
#[test]
fn device_structures_without_end() {
    let mut copy = Copy::new("endless-contexts", "arm64-s1-4k");
    let entry = stream_table_entry(&copy);
    // A list of 2^20 contexts where there is no memory.
    copy.set_register("IDR1", copy.register("IDR1") & !(0x1f << 6) | 20 << 6);
    copy.set_word(entry, copy.word(entry) & !0x000f_ffff_ffff_ffc0 | 0x90_0000_0000 | 20 << 59);
    copy.set_word(entry + 8, copy.word(entry + 8) & !3 | 2);
    let found = run(&["inspect", copy.write().path(), "--device", "0x30"]);
    let most = (1 << 20) + copy.json["pages"].as_array().unwrap().len() * (16 << 12);
    let line = format!("error: device 0x30 (0000:00:06.0): stopped by budget: more than {most} bytes of device structures\n");
    assert_eq!((found.status, found.stderr), (1, line));
}

/// A level 1 table of stage 2 that maps gigabyte to gigabyte, and what is changed in it.
fn nested(test: &str, change: impl Fn(&mut Copy, u64)) -> Copy {
    const TABLE: u64 = 0x7000_0000;
    let mut copy = Copy::new(test, "arm64-s1-4k");
    copy.add_page(TABLE);
    for gigabyte in 0..512 {
        // Block, normal write-back memory, read and write, inner shareable, accessed.
        copy.set_word(TABLE + 8 * gigabyte, gigabyte << 30 | 0x7fd);
    }
    change(&mut copy, TABLE);
    let entry = stream_table_entry(&copy);
    // Both stages; 39 bits of intermediate address from level 1 of 4K tables, 44 bits of output, AArch64.
    copy.set_word(entry, copy.word(entry) & !0xe | 0xe);
    copy.set_word(entry + 16, copy.word(entry + 16) & 0xfff0_0000_0000_0000 | 25 << 32 | 1 << 38 | 4 << 48 | 1 << 51 | 1);
    copy.set_word(entry + 24, TABLE);
    copy.write();
    copy
}

#[test]
fn two_stages_are_two_tables_and_one_set_of_mappings() {
    let copy = nested("nested", |_, _| {});
    let found = streams(&copy);
    let tables: Vec<&Value> = found[0]["tables"].as_array().unwrap().iter().map(|table| &table["format"]).collect();
    assert_eq!(tables, ["arm-smmuv3/stage1", "arm-smmuv3/stage2"]);
    let plain = run(&["inspect", "arm64-s1-4k", "--device", "0x30", "--format", "json"]).good().json();
    assert_eq!(found[0]["mappings"], plain["streams"][0]["mappings"], "the second stage changes nothing");
    run(&["diff", "arm64-s1-4k", copy.path()]).good();
    run(&["validate", copy.path()]).good();
    let human = run(&["inspect", copy.path(), "--device", "0x30"]).good();
    assert!(human.stdout.contains("arm-smmuv3/stage1 through arm-smmuv3/stage2"), "{}", human.stdout);
}

#[test]
fn what_is_wrong_with_the_second_stage_is_found_there() {
    let copy = nested("nested-broken", |copy, table| {
        // The doorbell below 1 GiB: not accessed. Gigabyte 9, which no IOVA leads to: the same.
        for gigabyte in [0, 9] {
            let entry = table + 8 * gigabyte;
            copy.set_word(entry, copy.word(entry) & !(1 << 10));
        }
    });
    let report = run(&["validate", copy.path(), "--format", "json"]);
    assert_eq!(report.status, 1);
    let violations = report.json()["violations"].as_array().unwrap().clone();
    let of = |violation: &Value| [&violation["stage"], &violation["kind"], &violation["iova"], &violation["path"][0]["index"]].map(Value::clone);
    assert_eq!(
        violations.iter().map(of).collect::<Vec<_>>(),
        [[json!(2), json!("access-flag"), json!("0xfffff000"), json!(0)], [json!(2), json!("access-flag"), json!(null), json!(9)],]
    );
    let fault = run(&["translate", copy.path(), "--device", "0x30", "--iova", "0xfffff000", "--access", "w", "--format", "json"]).good().json();
    assert_eq!((&fault["fault"]["stage"], &fault["fault"]["kind"]), (&json!(2), &json!("access-flag")));
}
