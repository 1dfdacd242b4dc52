//! What the reports say, checked against what others know about the same guests; and how the command behaves in a pipe, on a terminal, within a budget.

use std::fs;
use std::io::Read as _;
use std::process::Stdio;

use serde_json::{Value, json};

use crate::support::{Copy, command, fixtures, folder, hex, names, root, run};

fn read_json(fixture: &str, file: &str) -> Value {
    serde_json::from_slice(&fs::read(fixtures().join(fixture).join(file)).unwrap()).unwrap()
}

#[test]
fn inspect_says_what_the_kernel_mapped() {
    for fixture in ["arm64-s1-4k", "vtd-sm-fs"] {
        let (snapshot, expected) = (read_json(fixture, "snapshot.json"), read_json(fixture, "expected.json"));
        let report = run(&["inspect", fixture, "--format", "json"]).good().json();
        assert_eq!(report["version"], 1);
        let streams = report["streams"].as_array().unwrap();
        assert_eq!(streams.len(), snapshot["devices"].as_array().unwrap().len(), "one element per device");
        assert!(streams.is_sorted_by_key(|stream| hex(&stream["id"])));
        for known in expected["streams"].as_array().unwrap() {
            let stream = streams.iter().find(|stream| stream["id"] == known["id"]).unwrap();
            assert_eq!((&stream["label"], &stream["pasid"]), (&known["label"], &json!(null)));
            assert_eq!((&stream["state"], &stream["reason"]), (&json!("translated"), &json!(null)));
            assert_eq!(stream["mappings"], known["mappings"], "{fixture} device {}", known["id"]);
        }
    }
}

#[test]
fn the_shape_of_inspect_is_fixed() {
    let report = run(&["inspect", "arm64-s1-4k", "--device", "0000:00:03.0", "--format", "json"]).good();
    let settings = json!({"granule": 4096, "input-bits": 48, "output-bits": 44});
    let table = json!({"format": "arm-smmuv3/stage1", "root": format!("{:#x}", root("arm64-s1-4k", "0x18")), "settings": settings});
    let mapping = json!({"iova": "0xfffff000", "address": "0x8090000", "size": 4096, "access": "rw"});
    let stream = json!({
        "label": "0000:00:03.0", "id": "0x18", "pasid": null, "state": "translated", "reason": null, "tables": [table], "mappings": [mapping],
    });
    assert_eq!(report.json(), json!({"version": 1, "streams": [stream]}));
    // The order of fields is part of what people see.
    assert!(
        report
            .stdout
            .starts_with("{\"version\":1,\"streams\":[\n{\"label\":\"0000:00:03.0\",\"id\":\"0x18\",\"pasid\":null,\"state\":\"translated\"")
    );
}

#[test]
fn bypass_and_blocked_have_no_tables_and_no_mappings() {
    let mut copy = Copy::new("bypass", "arm64-s1-4k");
    // SMMUEN off: GBPA decides, and it is not abort.
    copy.json["unit"]["registers"]["CR0"] = json!("0x0");
    copy.json["unit"]["registers"]["GBPA"] = json!("0x0");
    let stream = |copy: &Copy| run(&["inspect", copy.path(), "--device", "0x38", "--format", "json"]).good().json()["streams"][0].clone();
    let found = stream(copy.write());
    assert_eq!((&found["state"], &found["reason"], &found["tables"], &found["mappings"]), (&json!("bypass"), &json!(null), &json!([]), &json!([])));
    let translate = |copy: &Copy, iova: &str| {
        run(&["translate", copy.path(), "--device", "0x38", "--iova", iova, "--access", "w", "--format", "json"]).good().json()
    };
    assert_eq!(translate(&copy, "0x40001234"), json!({"succeeds": true, "address": "0x40001234"}));
    assert_eq!(translate(&copy, "0x1000")["fault"]["kind"], "outside-memory");

    copy.json["unit"]["registers"]["GBPA"] = json!("0x100000");
    let found = stream(copy.write());
    assert_eq!((&found["state"], &found["tables"], &found["mappings"]), (&json!("blocked"), &json!([]), &json!([])));
    let reason = found["reason"].as_str().unwrap();
    assert!(reason.contains("GBPA"), "{reason}");
    let fault = &translate(&copy, "0x40001234")["fault"];
    assert_eq!(*fault, json!({"kind": "blocked", "stage": null, "level": null, "reason": reason}));
    assert_eq!(run(&["validate", copy.path()]).status, 0, "a unit that is off is no violation");
}

#[test]
fn translate_answers_as_the_emulated_unit_did() {
    let probes = read_json("vtd-sm-fs", "dma.json");
    let mut answers = [0, 0];
    for probe in probes.as_array().unwrap() {
        // A read of the probing module's own buffer was recorded as failing although the kernel had mapped it.
        let expected = if probe["iova"] == "0x5023000" && probe["access"] == "r" { &json!(true) } else { &probe["succeeds"] };
        let [id, iova, access] = ["id", "iova", "access"].map(|field| probe[field].as_str().unwrap());
        let answer = run(&["translate", "vtd-sm-fs", "--device", id, "--iova", iova, "--access", access, "--format", "json"]).good().json();
        assert_eq!(&answer["succeeds"], expected, "{probe}");
        answers[usize::from(answer["succeeds"] == true)] += 1;
        match answer["succeeds"].as_bool() {
            Some(true) => assert!(answer["address"].as_str().unwrap().starts_with("0x")),
            _ => assert!(answer["fault"]["reason"].is_string() && answer["fault"]["stage"] == 1, "{answer}"),
        }
    }
    assert!(answers.iter().all(|count| *count > 20), "both answers are checked: {answers:?}");
}

#[test]
fn formats_lists_settings_and_limits() {
    let report = run(&["formats", "intel-vtd", "--format", "json"]).good().json();
    let formats = report["plugins"][0]["formats"].as_array().unwrap();
    assert_eq!(formats[0]["name"], "intel-vtd/first-stage");
    assert_eq!(
        formats[0]["settings"][0],
        json!({"name": "levels", "default": 4, "allowed": "4, 5", "description": formats[0]["settings"][0]["description"]})
    );
    assert_eq!(formats[0]["limits"]["page-sizes"], json!([4096, 1 << 21, 1 << 30]));
    assert_eq!(formats[0]["limits"]["input"][0], json!({"first": "0x0", "last": "0x7fffffffffff"}));
    assert_eq!(report["limits"]["memory-bytes"], 16 << 20);
}

#[test]
fn a_spent_budget_is_said_and_the_report_is_printed() {
    let found = run(&["inspect", "arm64-s1-4k", "--device", "0x38", "--format", "json", "--budget-tables", "10"]);
    let line = "error: device 0x38 (0000:00:07.0): stopped by budget: more than 10 tables visited; --budget-tables allows more\n";
    assert_eq!((found.status, &*found.stderr), (1, line));
    let stream = &found.json()["streams"][0];
    assert_eq!(stream["reason"], "stopped by budget: more than 10 tables visited");
    assert!(!stream["mappings"].as_array().unwrap().is_empty());
    assert_eq!(run(&["validate", "arm64-s1-4k", "--budget-leaves", "10"]).status, 1);
    let out = folder("budget");
    let path = out.join("x").to_str().unwrap().to_owned();
    let found = run(&["convert", "arm64-s1-4k", "--to", "intel-vtd/first-stage", "--out", &path, "--budget-leaves", "10"]);
    assert_eq!(
        (found.status, &*found.stdout, &*found.stderr),
        (1, "", "error: stopped by budget: more than 10 leaves; --budget-leaves allows more\n")
    );
    assert_eq!(names(&out), [""; 0]);
}

/// What cannot be compared whole is neither the same nor different, and nothing is wrong with the snapshots.
#[test]
fn a_spent_budget_ends_a_comparison() {
    let found = run(&["diff", "arm64-s1-4k", "vtd-sm-fs", "--budget-tables", "10"]);
    let line = "error: arm64-s1-4k: device 0x38 (0000:00:07.0): stopped by budget: more than 10 tables visited; --budget-tables allows more\n";
    assert_eq!((found.status, &*found.stdout, found.stderr.lines().next().unwrap()), (1, "", line.trim_end()));
    let mut copy = Copy::new("budget-page", "arm64-s1-4k");
    copy.remove_page(copy.entry(root(copy.path(), "0x30"), 0xffff_f000, 4) & !0xfff);
    let found = run(&["diff", "vtd-sm-fs", copy.write().path(), "--budget-tables", "10"]);
    assert_eq!(found.status, 2, "a snapshot that is not complete is the worse: {}", found.stderr);
}

/// A hint names the option that helps, and the option helps.
#[test]
fn what_would_help_is_said_only_where_it_helps() {
    let stopped = |option: &'static str, few: &'static str, enough: &'static str, what: &str| {
        let found = run(&["inspect", "arm64-s1-4k", "--device", "0x38", option, few]);
        let line = format!("error: device 0x38 (0000:00:07.0): stopped by budget: more than {few} {what}; {option} allows more\n");
        assert_eq!((found.status, &*found.stderr), (1, &*line));
        run(&["inspect", "arm64-s1-4k", "--device", "0x38", option, enough]).good();
    };
    stopped("--budget-tables", "10", "1000", "tables visited");
    stopped("--budget-leaves", "100", "10000", "leaves");
    stopped("--budget-questions", "2", "100", "different patterns asked about");
}

#[test]
fn a_broken_pipe_ends_quietly() {
    for arguments in [&["inspect", "arm64-s1-4k", "--all"][..], &["inspect", "arm64-s1-4k", "--format", "json"], &["formats", "--all"]] {
        let mut child = command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let mut stderr = String::new();
        child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        assert_eq!((child.wait().unwrap().code(), &*stderr), (Some(0), ""), "{arguments:?}");
    }
}

#[test]
fn colours_are_for_terminals_and_for_those_who_ask() {
    let coloured = |arguments: &[&str], variables: &[(&str, &str)]| {
        let output = command(arguments).envs(variables.iter().copied()).output().unwrap();
        output.stdout.contains(&0x1b)
    };
    let inspect = |when: &'static str| ["inspect", "arm64-s1-4k", "--color", when];
    assert!(!coloured(&inspect("auto"), &[]), "a pipe is no terminal");
    assert!(coloured(&inspect("always"), &[]));
    assert!(!coloured(&inspect("never"), &[("CLICOLOR_FORCE", "1")]));
    assert!(!coloured(&["inspect", "arm64-s1-4k", "--color", "always", "--format", "json"], &[]), "JSON has no colours");
}

#[test]
fn nothing_in_a_snapshot_reaches_the_terminal_as_a_command() {
    let mut copy = Copy::new("escape", "arm64-s1-4k");
    copy.json["description"] = json!("a\u{1b}]0;owned\u{7}\u{1b}[2J");
    copy.json["devices"][0]["label"] = json!("\u{1b}[31m<b>&");
    let path = copy.write().path();
    let picture = copy.path.join("../map.svg").to_str().unwrap().to_owned();
    for arguments in [&["inspect", path][..], &["validate", path], &["draw", path, "--out", &picture]] {
        let found = run(arguments).good();
        assert!(!found.stdout.contains('\u{1b}'), "{arguments:?}");
    }
    let svg = fs::read_to_string(&picture).unwrap();
    assert!(svg.contains("&lt;b&gt;&amp;") && !svg.contains('\u{1b}') && !svg.contains("<b>"));
}

#[test]
fn a_picture_is_bounded_and_well_formed() {
    let out = folder("draw");
    let path = out.join("map.svg").to_str().unwrap().to_owned();
    let report = run(&["draw", "arm64-s1-4k", "--out", &path, "--format", "json"]).good().json();
    assert_eq!((&report["tables"], &report["out"]), (&json!(5), &json!(path)));
    let svg = fs::read_to_string(&path).unwrap();
    // Every element that is opened is closed, in order.
    let mut open: Vec<&str> = Vec::new();
    for tag in svg.split('<').skip(1).filter(|tag| !tag.starts_with('?')) {
        let (tag, _) = tag.split_once('>').unwrap();
        match (tag.strip_prefix('/'), tag.strip_suffix('/')) {
            (Some(name), _) => assert_eq!(open.pop(), Some(name)),
            (None, Some(_)) => {}
            (None, None) => open.push(tag.split_whitespace().next().unwrap()),
        }
    }
    assert_eq!(open, [""; 0]);
    let elements = svg.matches("<rect").count() + svg.matches("<text").count() + svg.matches("<line").count();
    assert!(elements < 2000, "{elements}");
    assert!(elements as u64 >= report["elements"].as_u64().unwrap());
    for text in ["0x4000000000", "hole of ~170.7 TiB", "rw 2 GiB in 1 GiB pages", "used by 0x38 (0000:00:07.0), 0x40 (0000:00:08.0)"] {
        assert!(svg.contains(text), "{text}");
    }
    assert_eq!(names(&out), ["map.svg"]);
}

#[test]
fn completions_and_manual_pages_are_made() {
    for (shell, word) in [("bash", "_stagecraft()"), ("zsh", "#compdef stagecraft"), ("fish", "complete -c stagecraft")] {
        assert!(run(&["completions", shell]).good().stdout.contains(word), "{shell}");
    }
    assert!(run(&["man"]).good().stdout.contains(".TH stagecraft 1"));
    let out = folder("man");
    run(&["man", "--out", out.to_str().unwrap()]).good();
    let pages = names(&out);
    assert!(pages.contains(&"stagecraft.1".to_owned()) && pages.contains(&"stagecraft-inspect.1".to_owned()), "{pages:?}");
    let page = fs::read_to_string(out.join("stagecraft-inspect.1")).unwrap();
    assert!(page.contains(".TH stagecraft-inspect 1") && page.contains("budget\\-tables"), "{page}");
}
