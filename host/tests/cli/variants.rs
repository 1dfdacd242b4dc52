//! Guests of every kind of unit, few words each: `tests/variants`, whose README says who made them. What the command says about each is what is expected of it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::support::{fixtures, folder, hex, run};

/// IOVA, address, size, access.
type Mapping = (u64, u64, u64, String);

/// A guest, expanded into a snapshot.
struct Variant {
    name: String,
    json: Value,
    path: String,
}

fn number(text: &str) -> u64 {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).unwrap(),
        None => text.parse().unwrap(),
    }
}

fn list(value: &Value) -> impl Iterator<Item = &str> {
    value.as_array().unwrap().iter().map(|element| element.as_str().unwrap())
}

/// Pages by address.
fn pages(json: &Value) -> BTreeMap<u64, Vec<u8>> {
    let mut pages = BTreeMap::new();
    for range in list(&json["pages"]) {
        let (first, last) = range.split_once('-').unwrap();
        pages.extend((number(first)..=number(last)).step_by(4096).map(|page| (page, vec![0; 4096])));
    }
    for line in list(&json["words"]) {
        let numbers: Vec<u64> = line.split(' ').map(number).collect();
        let [address, word, rest @ ..] = &*numbers else { panic!("{line}") };
        let (count, step) = if let [count, step] = rest { (*count, *step) } else { (1, 0) };
        for index in 0..count {
            let place = address + index * 8;
            let at = (place & 0xfff) as usize;
            let word = word.wrapping_add(step.wrapping_mul(index));
            pages.get_mut(&(place & !0xfff)).unwrap()[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
    }
    pages
}

/// All variants, as snapshots in a folder for this test.
fn variants(test: &str) -> Vec<Variant> {
    let mut files: Vec<_> = fs::read_dir(fixtures().join("../variants")).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    files.sort();
    let out = folder(&format!("variants-{test}"));
    let expand = |file: &Path| {
        let json: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
        let name = file.file_stem().unwrap().to_str().unwrap().to_owned();
        let (path, pages) = (out.join(&name), pages(&json));
        let addresses: Vec<String> = pages.keys().map(|page| format!("{page:#x}")).collect();
        let snapshot = json!({
            "version": 1, "unit": json["unit"], "memory": json["memory"], "devices": json["devices"], "page_size": 4096, "pages": addresses,
        });
        fs::create_dir(&path).unwrap();
        fs::write(path.join("snapshot.json"), snapshot.to_string()).unwrap();
        fs::write(path.join("pages.bin"), pages.into_values().collect::<Vec<_>>().concat()).unwrap();
        Variant { name, json, path: path.to_str().unwrap().to_owned() }
    };
    let variants: Vec<Variant> = files.iter().map(|file| expand(file)).collect();
    assert!(variants.len() > 60, "{}", variants.len());
    variants
}

impl Variant {
    /// Streams whose state is known: id and PASID, state, and what they reach.
    fn expected(&self) -> impl Iterator<Item = (&Value, &str, Vec<Mapping>)> {
        self.json["expected"].as_array().unwrap().iter().flat_map(|group| {
            let mappings: Vec<Mapping> = list(&group["mappings"])
                .map(|line| {
                    let [iova, address, size, access] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
                    (number(iova), number(address), number(size), access.to_owned())
                })
                .collect();
            let state = group["state"].as_str().unwrap();
            group["streams"].as_array().unwrap().iter().map(move |stream| (stream, state, mappings.clone()))
        })
    }
}

/// What `inspect` says of all streams of a snapshot.
fn inspect(path: &str) -> Vec<Value> {
    run(&["inspect", path, "--format", "json"]).good().json()["streams"].as_array().unwrap().clone()
}

fn mappings(stream: &Value) -> Vec<Mapping> {
    let mapping = |mapping: &Value| {
        let access = mapping["access"].as_str().unwrap().to_owned();
        (hex(&mapping["iova"]), hex(&mapping["address"]), mapping["size"].as_u64().unwrap(), access)
    };
    stream["mappings"].as_array().unwrap().iter().map(mapping).collect()
}

fn bytes(mappings: &[Mapping]) -> u128 {
    mappings.iter().map(|(_, _, size, _)| u128::from(*size)).sum()
}

#[test]
fn each_is_read_as_it_was_made() {
    let mut translated = 0;
    for variant in variants("inspect") {
        let streams = inspect(&variant.path);
        for (stream, state, wanted) in variant.expected() {
            let name = format!("{} {stream}", variant.name);
            let found = streams.iter().find(|found| found["id"] == stream["id"] && found["pasid"] == stream["pasid"]);
            let found = found.unwrap_or_else(|| panic!("{name}: not there"));
            assert_eq!(found["state"], state, "{name}: {}", found["reason"]);
            if state == "translated" {
                assert_eq!(found["reason"], Value::Null, "{name}");
                translated += 1;
            }
            assert_eq!(mappings(found), wanted, "{name}");
        }
    }
    assert!(translated > 120, "{translated}");
}

/// Drivers make no mistakes here, and neither did the generator.
#[test]
fn nothing_is_wrong_with_them() {
    for variant in variants("validate") {
        let report = run(&["validate", &variant.path, "--format", "json"]).good().json();
        assert_eq!(report, json!({"version": 1, "violations": [], "errors": 0, "warnings": 0}), "{}", variant.name);
    }
}

/// The edges of what is mapped, and what lies before and after it.
#[test]
fn single_accesses_end_where_they_should() {
    for variant in variants("translate") {
        for (stream, _, wanted) in variant.expected().filter(|(_, _, wanted)| !wanted.is_empty()).step_by(3) {
            let (iova, _, size, _) = &wanted[wanted.len() / 2];
            for place in [*iova, iova + (size - 1), iova.wrapping_sub(1), iova.wrapping_add(*size)] {
                let hit = wanted.iter().find(|(iova, _, size, _)| place >= *iova && place - iova < *size);
                for access in ["r", "w"] {
                    let (text, id) = (format!("{place:#x}"), stream["id"].as_str().unwrap());
                    let mut line = vec!["translate", &variant.path, "--device", id, "--iova", &text, "--access", access, "--format", "json"];
                    let pasid = stream["pasid"].as_u64().map(|pasid| pasid.to_string());
                    line.extend(pasid.iter().flat_map(|pasid| ["--pasid", pasid]));
                    let answer = run(&line).good().json();
                    let wanted = hit.filter(|(_, _, _, allowed)| allowed.contains(access)).map(|(iova, address, _, _)| address + (place - iova));
                    let found = answer["succeeds"].as_bool().unwrap().then(|| hex(&answer["address"]));
                    assert_eq!(found, wanted, "{} {stream} {text} {access}: {answer}", variant.name);
                }
            }
        }
    }
}

/// With the unit withheld, tables with many leaves are told by what they look like.
#[test]
fn their_formats_are_guessed() {
    let mut guessed = 0;
    for mut variant in variants("guess") {
        let file = Path::new(&variant.path).join("snapshot.json");
        let mut snapshot: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        snapshot["unit"]["registers"] = json!({});
        fs::write(file, snapshot.to_string()).unwrap();
        for table in variant.json["tables"].as_array_mut().unwrap() {
            let report = run(&["guess", &variant.path, "--root", table["root"].as_str().unwrap(), "--format", "json"]).good().json();
            let first = &report["candidates"][0];
            assert_eq!((&first["format"], &first["levels"]), (&table["format"], &table["levels"]), "{}", variant.name);
            if !table["granule"].is_null() {
                assert_eq!(first["granule"], table["granule"], "{}", variant.name);
            }
            guessed += 1;
        }
    }
    assert!(guessed > 25, "{guessed}");
}

/// Formats that variants are converted to, in turn.
const TARGETS: [&str; 13] = [
    "intel-vtd/second-stage",
    "arm-smmuv3/stage1",
    "amd-vi/v1",
    "riscv-iommu/first-stage",
    "s390-zpci/dma",
    "arm-smmuv3/stage2",
    "amd-vi/v2",
    "loongarch/paging",
    "intel-vtd/first-stage",
    "apple-dart/dart2",
    "riscv-iommu/second-stage",
    "arm-v7s/short",
    "apple-dart/dart1",
];

/// Nothing is reached after a conversion that was not before, and what is not reached any more is what the report says.
#[test]
fn converted_they_reach_the_same() {
    for (index, variant) in variants("convert").iter().enumerate() {
        let before = inspect(&variant.path);
        for target in [TARGETS[index % 13], TARGETS[(index * 5 + 3) % 13]] {
            let name = format!("{} to {target}", variant.name);
            let out = format!("{}-out", variant.path);
            let report = run(&["convert", &variant.path, "--to", target, "--out", &out, "--force", "--format", "json"]).good().json();
            let mut refused = BTreeMap::new();
            for table in report["tables"].as_array().unwrap() {
                let losses = table["losses"].as_array().unwrap().iter().filter(|loss| loss["refused"] == true);
                let bytes: u128 = losses.map(|loss| u128::from(loss["bytes"].as_u64().unwrap())).sum();
                let streams = table["streams"].as_array().unwrap();
                refused.extend(streams.iter().map(|stream| ((hex(&stream["id"]), stream["pasid"].as_u64()), bytes)));
            }
            let after = inspect(&out);
            assert_eq!(before.len(), after.len(), "{name}");
            for (a, b) in before.iter().zip(&after) {
                let refused = refused.get(&(hex(&a["id"]), a["pasid"].as_u64())).copied().unwrap_or(0);
                let (ours, theirs) = (mappings(a), mappings(b));
                assert_eq!(bytes(&ours), bytes(&theirs) + refused, "{name} {}", a["id"]);
                assert!(refused != 0 || ours == theirs, "{name} {}", a["id"]);
            }
            let differs = run(&["diff", &variant.path, &out]).status;
            assert_eq!(differs, i32::from(refused.values().any(|bytes| *bytes != 0)), "{name}");
        }
    }
}

/// A page of a size between two levels stands in several slots, and hardware looks at any of them: each counts for itself, and `validate` says if they differ.
#[test]
fn slots_of_one_leaf_that_differ() {
    let all = variants("replicas");
    let variant = all.iter().find(|variant| variant.name == "amd-v1-4").unwrap();
    let file = Path::new(&variant.path).join("pages.bin");
    let pages = fs::read(&file).unwrap();
    let word = |place: usize| u64::from_le_bytes(pages[place..place + 8].try_into().unwrap());
    // NextLevel 7 (48882 section 2.2.3): a page of at least two slots.
    let slots: Vec<usize> = (0..pages.len()).step_by(8).filter(|place| word(*place) & 0xe01 == 0xe01).collect();
    assert!(slots.len() > 100, "{}", slots.len());
    for (place, bit) in [(slots[0], 0), (slots[slots.len() / 2], 61), (slots[slots.len() - 1], 30)] {
        let mut damaged = pages.clone();
        damaged[place..place + 8].copy_from_slice(&(word(place) ^ 1 << bit).to_le_bytes());
        fs::write(&file, damaged).unwrap();
        let report = run(&["validate", &variant.path, "--format", "json"]).json();
        let warnings: Vec<&Value> = report["violations"].as_array().unwrap().iter().filter(|violation| violation["kind"] == "replica").collect();
        assert!(!warnings.is_empty(), "bit {bit} of the word at {place:#x}: {report:#}");
        assert!(warnings[0]["reason"].as_str().unwrap().ends_with("say the same; all of them should"), "{}", warnings[0]);
        assert_eq!(run(&["validate", &variant.path, "--strict"]).status, 1);
    }
}
