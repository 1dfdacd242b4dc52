//! `stagecraft run`: scenarios end without a wrong DMA, say the same for the same seed, and bad ones are refused by name.

use std::fs;
use std::path::PathBuf;

use serde_json::Value;

use crate::support::{folder, run};

fn scenario(name: &str) -> String {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../scenarios").join(name).to_str().unwrap().to_owned()
}

/// A scenario in a file of its own.
fn written(test: &str, text: &str) -> String {
    let path = folder(test).join("scenario.toml");
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

/// What a scenario is without its times, which no two runs share.
fn counts(mut report: Value) -> Value {
    for time in ["seconds", "host_seconds", "out"] {
        report.as_object_mut().unwrap().remove(time);
    }
    for kind in report["kinds"].as_object_mut().unwrap().values_mut() {
        *kind = kind["count"].clone();
    }
    report
}

const GOOD: &str = "title = \"small\"\noperations = 40\n[guest]\nformat = \"intel-vtd/first-stage\"\nannounces = \"changes\"\n\
                    [[unit]]\nname = \"one\"\nkind = \"vtd\"\n[[device]]\nlabel = \"card\"\nunit = \"one\"\n[workload]\nkind = \"network\"\nring = 8\n";

#[test]
fn every_scenario_of_the_repository_is_played_without_a_wrong_dma() {
    let strategies = [("arm-on-x86.toml", "nested"), ("vtd-without-nesting.toml", "areas"), ("riscv-churn.toml", "nested")];
    let names = fs::read_dir(scenario("")).unwrap().count();
    assert_eq!(names, strategies.len(), "each is named here");
    for (name, strategy) in strategies {
        let path = scenario(name);
        let play = |seed: &str| run(&["run", &path, "--operations", "200", "--seed", seed, "--format", "json"]).good().json();
        let report = play("7");
        assert_eq!((&report["operations"], &report["violation"], &report["seed"]), (&200.into(), &Value::Null, &7.into()), "{name}");
        let devices = report["devices"].as_array().unwrap();
        assert!(devices.iter().any(|device| device["strategies"][0] == strategy), "{name}: {devices:?}");
        let kinds = report["kinds"].as_object().unwrap();
        assert_eq!(kinds.values().map(|kind| kind["count"].as_u64().unwrap()).sum::<u64>(), 200, "{name}");
        for kind in kinds.values() {
            assert!(kind["median_ns"].as_u64() <= kind["p99_ns"].as_u64() && kind["p99_ns"].as_u64() <= kind["worst_ns"].as_u64(), "{name}: {kind}");
        }
        let calls = &report["kernel_calls"];
        assert_eq!(calls["by_kind"].as_object().unwrap().values().map(|count| count.as_u64().unwrap()).sum::<u64>(), calls["during"], "{name}");
        assert_eq!(counts(report.clone()), counts(play("7")), "{name}: the same seed says the same");
        assert_ne!(counts(report)["checks"], Value::Null);
    }
    let checks =
        |seed| run(&["run", &scenario("riscv-churn.toml"), "--operations", "60", "--seed", seed, "--format", "json"]).good().json()["checks"].clone();
    assert_ne!(checks("1"), checks("2"), "chance begins at the seed");
}

/// Guests of every format, on units of each kind, with and without nesting, and in software.
#[test]
fn guests_of_every_format_are_followed() {
    let report = run(&["formats", "--format", "json"]).good().json();
    let plugins = report["plugins"].as_array().unwrap();
    let formats = plugins.iter().flat_map(|plugin| plugin["formats"].as_array().unwrap()).map(|format| format["name"].as_str().unwrap().to_owned());
    let formats: Vec<String> = formats.chain(["virtio-iommu".to_owned()]).collect();
    assert!(formats.len() > 12, "{formats:?}");
    let mut strategies = std::collections::BTreeSet::new();
    for (index, format) in formats.iter().enumerate() {
        // Where nothing is announced, no unit can walk the guest's own table.
        let nothing = "announces = \"nothing\"\n[host]\nstrategies = [\"nested\", \"areas\", \"software\"]";
        let workloads = ["kind = \"network\"\nring = 8", "kind = \"storage\"\nburst = 5", "kind = \"churn\"\nregions = 2"];
        for (offset, workload) in workloads.iter().enumerate() {
            let announces = ["announces = \"removals\"", nothing, "announces = \"changes\""][(index + offset) % 3];
            let announces = if format == "virtio-iommu" { "" } else { announces };
            // Formats of units with commands are told raw, and sometimes typed; the others can only be typed.
            let has_commands = ["arm-smmuv3/", "intel-vtd/", "amd-vi/", "riscv-iommu/", "s390-zpci/"].iter().any(|unit| format.starts_with(unit));
            let typed = has_commands && (index + offset) % 4 == 3;
            let announces = if typed { announces.replacen('\n', "\ncommands = \"typed\"\n", 1) } else { announces.to_owned() };
            let announces = if typed && !announces.contains("commands") { format!("{announces}\ncommands = \"typed\"") } else { announces };
            let text = format!(
                "title = \"t\"\noperations = 60\nseed = {index}\n[guest]\nformat = \"{format}\"\n{announces}\n[workload]\n{workload}\n\
                 [[unit]]\nname = \"a\"\nkind = \"vtd\"\n[[unit]]\nname = \"b\"\nkind = \"smmuv3\"\n[[unit]]\nname = \"c\"\nkind = \"amd\"\n[[unit]]\nname = \"d\"\n\
                 kind = \"riscv\"\nnesting = false\n[[device]]\nlabel = \"e\"\nunit = \"a\"\n[[device]]\nlabel = \"f\"\nunit = \"b\"\n[[device]]\nlabel = \"g\"\n\
                 unit = \"c\"\n[[device]]\nlabel = \"h\"\nunit = \"d\"\n[[device]]\nlabel = \"i\"\nemulated = true\n"
            );
            let report = run(&["run", &written("run-formats", &text), "--format", "json"]).good().json();
            assert_eq!((&report["violation"], &report["operations"]), (&Value::Null, &60.into()), "{format} {workload}");
            let is_raw = has_commands && !typed;
            assert_eq!((report["commands"] == "raw", report["queues"].is_object()), (is_raw, is_raw), "{format} {announces}");
            if is_raw {
                let [batches, bytes, events] = ["batches", "command_bytes", "events"].map(|name| report["queues"][name].as_u64().unwrap());
                assert_eq!((batches > 0, bytes >= 16 * batches), (!announces.contains("nothing"), true), "{format} {workload} {announces}");
                assert_eq!(events > 10, !format.starts_with("s390"), "{format} {workload}: {events} events");
            }
            for device in report["devices"].as_array().unwrap() {
                strategies.extend(device["strategies"].as_array().unwrap().iter().map(|strategy| strategy.as_str().unwrap().to_owned()));
            }
        }
    }
    assert_eq!(strategies.into_iter().collect::<Vec<_>>(), ["areas", "native", "nested"]);
}

/// What a scenario asks for must be what the guest's structures say, where it has any.
#[test]
fn settings_are_what_the_guests_structures_can_say() {
    for (format, settings, raw) in [
        ("arm-smmuv3/stage1", "granule = 0x4000, input-bits = 47", true),
        ("arm-smmuv3/stage1", "granule = 0x10000, output-bits = 52, input-bits = 52", true),
        ("arm-smmuv3/stage1", "granule = 4096, lpa2 = true, input-bits = 52, output-bits = 52", true),
        ("arm-smmuv3/stage1", "tbi = true, hardware-access = true, hardware-dirty = true, hierarchy-disabled = true", true),
        ("arm-smmuv3/stage1", "hardware-access = true, hardware-table-access = true", true),
        ("arm-smmuv3/stage1", "granule = 0x10000, input-bits = 48, lpa = true", true),
        ("arm-smmuv3/stage1", "big-endian = true, mair = 0xff", true),
        ("arm-smmuv3/stage2", "input-bits = 40, granule = 4096", true),
        ("arm-smmuv3/stage2", "input-bits = 42, granule = 0x10000, hardware-access = true", true),
        ("arm-smmuv3/stage2", "input-bits = 42, granule = 0x10000, hardware-access = true, hardware-table-access = true, lpa = true", true),
        ("intel-vtd/first-stage", "levels = 4, write-protect = true", true),
        ("intel-vtd/first-stage", "page-1g = false", false),
        ("intel-vtd/second-stage", "levels = 3, snoop-control = true", true),
        ("intel-vtd/second-stage", "levels = 4, page-2m = false", false),
        ("amd-vi/v1", "levels = 3", true),
        ("amd-vi/v1", "levels = 6", true),
        ("amd-vi/v2", "levels = 5", true),
        ("riscv-iommu/first-stage", "levels = 3, hardware-update = true", true),
        ("riscv-iommu/first-stage", "levels = 2", true),
        ("riscv-iommu/second-stage", "levels = 4, svpbmt = true", true),
        ("riscv-iommu/first-stage", "big-endian = true", false),
        ("s390-zpci/dma", "levels = 4", true),
    ] {
        let text = GOOD.replace("intel-vtd/first-stage", format).replace("\"changes\"", &format!("\"changes\"\nsettings = {{ {settings} }}"));
        let found = run(&["run", &written("run-settings", &text), "--format", "json"]);
        if raw {
            assert_eq!(found.status, 0, "{format} {settings}: {}", found.stderr);
            assert_eq!(found.json()["commands"], "raw");
            continue;
        }
        let name = settings.rsplit(", ").next().unwrap().split(' ').next().unwrap();
        assert_eq!(found.status, 2, "{format} {settings}");
        assert!(found.stderr.contains(&format!("setting `{name}`: the guest's device structures say ")), "{}", found.stderr);
        let typed = text.replace("\"changes\"", "\"changes\"\ncommands = \"typed\"");
        let report = run(&["run", &written("run-settings", &typed), "--format", "json"]).good().json();
        assert_eq!((&report["commands"], &report["queues"]), (&"typed".into(), &Value::Null));
    }
}

/// Nobody tells the host: the first page is missed, and that is an error with the seed.
#[test]
fn a_dma_that_goes_wrong_is_an_error_with_the_seed() {
    let text = GOOD.replace("\"changes\"", "\"never\"");
    let strategies = "[host]\nstrategies = [\"nested\"]\n";
    let found = run(&["run", &written("run-never", &format!("{text}{strategies}")), "--seed", "5", "--format", "json"]);
    assert_eq!(found.status, 1, "{}", found.stderr);
    assert!(found.stderr.starts_with("error: operation 1 (map), device card: a read at IOVA 0x1000"), "{}", found.stderr);
    assert!(found.stderr.ends_with(", and was refused; seed 5 shows it again\n"), "{}", found.stderr);
    assert!(found.json()["violation"].as_str().unwrap().contains("is to reach guest memory at 0x"));
    // A unit that walks the guest's own table sees what is mapped, and keeps what was cached until somebody tells it.
    let found = run(&["run", &written("run-stale", &format!("{text}[host]\nstrategies = [\"native\"]\n"))]);
    assert_eq!(found.status, 1, "{}", found.stderr);
    assert!(found.stderr.contains("(unmap)") && found.stderr.contains("is to be refused, and reached 0x"), "{}", found.stderr);
    assert!(found.stdout.contains("the last one not as it should be"), "{}", found.stdout);
}

#[test]
fn a_picture_is_drawn() {
    let out = folder("run-picture").join("run.svg");
    let (path, svg) = (scenario("arm-on-x86.toml"), out.to_str().unwrap());
    let found = run(&["run", &path, "--operations", "300", "--out", svg]).good();
    assert!(found.stdout.contains(&format!("written: {svg}")), "{}", found.stdout);
    let text = fs::read_to_string(&out).unwrap();
    let document = Elements::read(&text);
    assert_eq!(document.open, Vec::<String>::new(), "every element ends");
    for words in [
        "operations per second",
        "map, median",
        "unmap, median",
        "worst of all",
        "kernel calls per operation",
        "mapped memory",
        "time since the first",
    ] {
        assert!(text.contains(words), "{words}");
    }
    assert!(document.names.iter().filter(|name| *name == "polyline").count() >= 5, "{:?}", document.names);
    let again = run(&["run", &path, "--operations", "10", "--out", svg]);
    assert_eq!((again.status, again.stderr), (2, format!("error: {svg} exists already; remove it or allow overwriting with --force\n")));
    run(&["run", &path, "--operations", "1", "--out", svg, "--force"]).good();
}

/// The elements of an XML document, as far as this command writes any.
struct Elements {
    names: Vec<String>,
    /// Those that do not end.
    open: Vec<String>,
}

impl Elements {
    fn read(text: &str) -> Self {
        let mut this = Self { names: Vec::new(), open: Vec::new() };
        for tag in text.split('<').skip(1).filter(|tag| !tag.starts_with('?')) {
            let (tag, _) = tag.split_once('>').expect("a tag ends");
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(this.open.pop().as_deref(), Some(name));
                continue;
            }
            let name: String = tag.chars().take_while(char::is_ascii_alphanumeric).collect();
            assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
            assert!(!tag.contains("NaN") && !tag.contains("inf"), "{tag}");
            if !tag.ends_with('/') {
                this.open.push(name.clone());
            }
            this.names.push(name);
        }
        this
    }
}

/// What is wrong with a file, in one line that begins with its name, and status 2.
#[test]
fn bad_scenarios_are_refused() {
    run(&["run", &written("run-good", GOOD)]).good();
    let refused = |text: &str, line: &str| {
        let path = written("run-bad", text);
        let found = run(&["run", &path]);
        assert_eq!((found.status, found.stdout.as_str()), (2, ""), "{line}: {}", found.stderr);
        assert!(
            found.stderr.starts_with(&format!("error: {path}: {line}")) && found.stderr.lines().count() == 1,
            "wanted {line}\nfound {}",
            found.stderr
        );
    };
    refused(
        &GOOD.replace("operations", "operation"),
        "line 2: unknown field `operation`, expected one of `title`, `seed`, `operations`, `seconds`, ",
    );
    refused(&GOOD.replace("ring", "rings"), "line 12: unknown field `rings`, expected `ring`");
    refused(&GOOD.replace("\"vtd\"", "\"vt-d\""), "line 8: unknown variant `vt-d`, expected one of `vtd`, `smmuv3`, `amd`, `riscv`");
    refused(&GOOD.replace("\"network\"", "\"games\""), "line 13: unknown variant `games`, expected one of `network`, `storage`, `churn`");
    refused(&GOOD.replace("first-stage", "third-stage"), "no plugin knows the table format `intel-vtd/third-stage`; there are ");
    refused(
        &GOOD.replace("\"changes\"", "\"changes\"\nsettings = { level = 4 }"),
        "intel-vtd/first-stage has no setting `level`; there are levels, ",
    );
    refused(&GOOD.replace("\"changes\"", "\"changes\"\nsettings = { levels = 9 }"), "plugin intel-vtd: levels = 0x9: ");
    refused(
        &GOOD.replace("\"changes\"", "\"changes\"\nsettings = { levels = \"four\" }"),
        "line 6: a setting's value is a number such as 4096 or 0x1000",
    );
    refused(&GOOD.replace("\"changes\"", "\"changes\"\nmemory = \"1 GB\""), "line 6: `GB` is not a unit of size; there are B, KiB, MiB and GiB");
    refused(&GOOD.replace("\"changes\"", "\"changes\"\nmemory = \"1 TiB\""), "line 6: `TiB` is not a unit of size");
    refused(&GOOD.replace("\"changes\"", "\"changes\"\nmemory = \"4 GiB\""), "memory: 4 GiB; a guest has 64 MiB to 2 GiB");
    refused(&GOOD.replace("announces = \"changes\"", ""), "announces is missing: `changes`, `removals`, `nothing` or `never`");
    refused(&GOOD.replace("intel-vtd/first-stage", "virtio-iommu"), "announces: not for virtio-iommu");
    refused(
        &GOOD.replace("intel-vtd/first-stage", "virtio-iommu").replace("announces = \"changes\"", "commands = \"typed\""),
        "commands: not for virtio-iommu",
    );
    refused(
        &GOOD.replace("intel-vtd/first-stage", "loongarch/paging").replace("\"changes\"", "\"changes\"\ncommands = \"raw\""),
        "commands: units with tables of loongarch/paging have none",
    );
    refused(&GOOD.replace("\"changes\"", "\"changes\"\ncommands = \"cooked\""), "line 6: unknown variant `cooked`, expected `raw` or `typed`");
    refused(&GOOD.replace("unit = \"one\"", "unit = \"two\""), "device `card`: no unit `two`; there are one");
    refused(&GOOD.replace("unit = \"one\"\n", ""), "device `card`: unit is missing");
    refused(&GOOD.replace("unit = \"one\"", "unit = \"one\"\nemulated = true"), "device `card`: an emulated device is behind no unit");
    refused(&GOOD.replace("operations = 40\n", ""), "operations or seconds is missing");
    refused(&GOOD.replace("operations = 40", "operations = 40\nseconds = 1"), "operations and seconds are both given");
    refused(&GOOD.replace("operations = 40", "seconds = nan"), "seconds: NaN; a run has more than 0 and at most 3600");
    refused(&GOOD.replace("ring = 8", "ring = 0"), "ring: 0 buffers; there are 1 to 16384");
    refused(&GOOD.replace("operations = 40", "operations = 99_000_000"), "operations: 99000000; a run has 1 to 10000000");
    refused(&GOOD.replace("[workload]", "[[unit]]\nname = \"one\"\nkind = \"amd\"\n[workload]"), "there are two units `one`");
    refused(
        &GOOD.replace("[workload]", "[host]\nstrategies = [\"magic\"]\n[workload]"),
        "line 13: unknown variant `magic`, expected one of `native`, ",
    );
    refused(&GOOD.replace("[workload]", "[host]\nstrategies = [\"software\"]\n[workload]"), "device card: ");
    let line = "device card: its unit walks the guest's own table and is not told what goes: ";
    refused(&GOOD.replace("\"changes\"", "\"nothing\""), line);
    refused("title = \"x", "line 1: ");
    refused("", "line 1: missing field `title`");
    let long = format!("{GOOD}#{}", "x".repeat(1 << 16));
    refused(&long, "longer than 64 KiB; a scenario is a page of text");
    let missing = run(&["run", "/no/such.toml"]);
    assert_eq!((missing.status, missing.stderr.as_str()), (2, "error: /no/such.toml: No such file or directory (os error 2)\n"));
    let found = run(&["run", &scenario("")]);
    assert!(found.status == 2 && found.stderr.contains("not a file; give a scenario such as scenarios/arm-on-x86.toml"), "{}", found.stderr);
}
