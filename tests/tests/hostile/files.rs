//! Snapshot folders that make no sense: an error that names the file, never a panic.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use stagecraft::guest::Guest;
use stagecraft::snapshot::Snapshot;
use stagecraft_tests::reference::generate::Rng;

use super::{plugins, rounds, seed, timed};

/// A snapshot that is fine: one page of zeroes.
fn document() -> Value {
    json!({
        "version": 1,
        "description": "a guest",
        "unit": {"kind": "intel-vtd", "registers": {"CAP": "0x0", "ECAP": "0x0", "GSTS": "0x80000000", "RTADDR": "0x1000"}},
        "memory": [{"kind": "ram", "first": "0x0", "last": "0xffff"}],
        "devices": [{"label": "0000:00:01.0", "id": "0x8"}],
        "page_size": 4096,
        "pages": ["0x1000"],
    })
}

fn write(folder: &Path, json: &[u8], pages: &[u8]) {
    fs::write(folder.join("snapshot.json"), json).unwrap();
    fs::write(folder.join("pages.bin"), pages).unwrap();
}

fn load(json: &[u8], pages: &[u8]) -> Result<Snapshot, String> {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), json, pages);
    Snapshot::load(folder.path()).map_err(|error| error.to_string())
}

/// The error's one line, which begins with `file`.
fn refused(json: &[u8], pages: &[u8], file: &str) -> String {
    let shown = String::from_utf8_lossy(&json[..json.len().min(200)]).into_owned();
    let error = load(json, pages).expect_err(&shown);
    let (path, what) = error.split_once(": ").expect("a path and a text");
    assert_eq!(Path::new(path).file_name().unwrap().to_str().unwrap(), file, "{error}");
    assert!(!what.is_empty() && !error.contains('\n'), "{error}");
    error
}

#[test]
fn the_plain_document_is_read() {
    assert_eq!(load(document().to_string().as_bytes(), &[0; 4096]).unwrap().pages, 1);
}

#[test]
fn files_that_are_not_there_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let error = Snapshot::load(folder.path()).unwrap_err().to_string();
    assert!(error.contains(folder.path().to_str().unwrap()) && error.contains("snapshot.json"), "{error}");
    let error = Snapshot::load(&folder.path().join("nowhere")).unwrap_err().to_string();
    assert!(error.contains("nowhere"), "{error}");
    fs::write(folder.path().join("snapshot.json"), document().to_string()).unwrap();
    let error = Snapshot::load(folder.path()).unwrap_err().to_string();
    assert!(error.contains("pages.bin"), "{error}");
    // Folders where files should be, and a file where the folder should be.
    fs::create_dir(folder.path().join("pages.bin")).unwrap();
    assert!(Snapshot::load(folder.path()).unwrap_err().to_string().contains("pages.bin"));
    assert!(Snapshot::load(&folder.path().join("snapshot.json")).is_err());
}

#[test]
fn pages_of_the_wrong_length_are_refused_with_both_lengths() {
    let json = document().to_string();
    for length in [0, 1, 4095, 4097, 8192] {
        let error = refused(json.as_bytes(), &vec![0; length], "pages.bin");
        assert!(error.contains(&format!("{length} bytes")) && error.contains("need 4096"), "{error}");
    }
}

#[test]
fn text_that_is_no_snapshot_is_refused() {
    let plain = document().to_string();
    let mut texts: Vec<Vec<u8>> =
        ["", "{", "[]", "null", "42", "\"text\"", "{\"version\": 1}", "\u{feff}{}"].map(|text| text.as_bytes().to_vec()).into();
    // Cut anywhere, not UTF-8, two documents, and nested more deeply than any stack.
    texts.extend((1..plain.len()).step_by(7).map(|length| plain.as_bytes()[..length].to_vec()));
    texts.push(plain.replace("a guest", "a \u{1}guest").into_bytes());
    texts.push([plain.as_bytes(), b"{}"].concat());
    let mut broken = plain.clone().into_bytes();
    broken.splice(30..30, [0xff, 0xfe]);
    texts.push(broken);
    for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
        let deep = format!("{}1{}", open.repeat(200_000), close.repeat(200_000));
        texts.push(deep.clone().into_bytes());
        texts.push(plain.replace("\"a guest\"", &deep).into_bytes());
        // What is unknown is passed over, however deep.
        let _ = load(format!("{{\"unknown\": {deep}, {}", &plain[1..]).as_bytes(), &[0; 4096]);
    }
    for text in texts {
        refused(&text, &[0; 4096], "snapshot.json");
    }
}

/// Puts `value` at a path of names and indexes.
fn with(path: &[&str], value: Value) -> Vec<u8> {
    let mut document = document();
    let mut at = &mut document;
    for name in path {
        at = match name.parse::<usize>() {
            Ok(index) => &mut at[index],
            Err(_) => &mut at[*name],
        };
    }
    *at = value;
    document.to_string().into_bytes()
}

#[test]
fn values_of_the_wrong_kind_are_refused() {
    let paths: [&[&str]; 13] = [
        &["version"],
        &["unit"],
        &["unit", "kind"],
        &["unit", "registers"],
        &["unit", "registers", "CAP"],
        &["memory"],
        &["memory", "0"],
        &["memory", "0", "first"],
        &["devices"],
        &["devices", "0", "id"],
        &["page_size"],
        &["pages"],
        &["pages", "0"],
    ];
    for path in paths {
        let own = path.iter().fold(&document(), |at, name| name.parse::<usize>().map_or_else(|_| &at[*name], |index| &at[index])).clone();
        for value in [
            json!(null),
            json!(true),
            json!(1.5),
            json!(-1),
            json!("text"),
            json!("0x"),
            json!("0x+1"),
            json!("0x1_0"),
            json!([[]]),
            json!({"a": "b"}),
        ] {
            let fits = own.is_string() && value.is_string() && path.last() == Some(&"kind");
            // A unit that is not there needs tables instead; a kind is any text.
            if !fits {
                refused(&with(path, value), &[0; 4096], "snapshot.json");
            }
        }
    }
    // Numbers that are too large.
    for (path, value) in [
        (&["pages", "0"][..], json!("0x10000000000000000")),
        (&["memory", "0", "last"], json!("0xfffffffffffffffff")),
        (&["devices", "0", "id"], json!("0xffffffffffffffffffffffffffffffffffffffffffffff")),
        (&["page_size"], json!(18446744073709551615_u64)),
        (&["version"], json!(2)),
    ] {
        refused(&with(path, value), &[0; 4096], "snapshot.json");
    }
    let huge = String::from_utf8(with(&["version"], json!(77))).unwrap().replace("77", &"9".repeat(5000));
    refused(huge.as_bytes(), &[0; 4096], "snapshot.json");
}

#[test]
fn contradictions_are_refused_with_the_thing() {
    let cases: [(&[&str], Value, &str); 10] = [
        (&["pages"], json!(["0x1000", "0x1000"]), "listed twice"),
        (&["pages"], json!(["0x1001"]), "not a multiple of 4096"),
        (&["memory"], json!([{"kind": "ram", "first": "0x0", "last": "0xfff"}, {"kind": "device", "first": "0xfff", "last": "0x1fff"}]), "overlap"),
        (&["memory", "0", "last"], json!("0x0"), ""),
        (&["memory", "0", "first"], json!("0x10000"), "empty"),
        (&["memory", "0", "kind"], json!("rom"), "rom"),
        (&["devices"], json!([{"label": "a", "id": 1}, {"label": "b", "id": "0x1"}]), "same id"),
        (&["page_size"], json!(16384), "16384"),
        (&["version"], json!(0), "version 0"),
        (&["unit", "registers"], json!(null), "registers"),
    ];
    for (path, value, what) in cases {
        if what.is_empty() {
            assert!(load(&with(path, value), &[0; 4096]).is_ok());
            continue;
        }
        let error = refused(&with(path, value), &[0; 8192][..if path == ["pages"] { 8192 } else { 4096 }], "snapshot.json");
        assert!(error.contains(what), "{error}");
    }
    // Names given twice: in the document, in a record, among registers.
    let plain = document().to_string();
    for (once, twice) in [
        ("\"version\":1", "\"version\":1,\"version\":1"),
        ("\"first\":\"0x0\"", "\"first\":\"0x0\",\"first\":\"0x0\""),
        ("\"CAP\":\"0x0\"", "\"CAP\":\"0x0\",\"CAP\":\"0x0\""),
    ] {
        assert!(plain.contains(once), "{plain}");
        refused(plain.replace(once, twice).as_bytes(), &[0; 4096], "snapshot.json");
    }
    let many: serde_json::Map<String, Value> = (0..600).map(|index| (format!("R{index}"), json!(0))).collect();
    refused(&with(&["unit", "registers"], many.into()), &[0; 4096], "snapshot.json");
}

/// Memory that reaches to the last byte of the address space, and pages in no order.
#[test]
fn pages_may_be_anywhere() {
    let last = "0xfffffffffffff000";
    let mut document = document();
    document["pages"] = json!([last, "0x1000", "0xffffffffffffe000", "0x0"]);
    document["memory"] = json!([{"kind": "ram", "first": "0x0", "last": "0xffffffffffffffff"}]);
    // The root table is the last page: every lookup reads around the end of the address space.
    document["unit"]["registers"]["RTADDR"] = json!(last);
    let mut pages = vec![0xff; 4 * 4096];
    pages[4096..8192].fill(0);
    let snapshot = load(document.to_string().as_bytes(), &pages).unwrap();
    assert_eq!(snapshot.pages, 4);
    let guest = Guest::new(&snapshot, plugins()).unwrap();
    for (id, pasid) in [(8, None), (8, Some(7))] {
        let stream = guest.stream(id, pasid).unwrap();
        assert_ne!(stream.state.as_str(), "translated", "{stream:?}");
        assert_eq!(stream.missing, None, "all pages are there");
    }
}

/// A tables section with nonsense in it.
#[test]
fn tables_that_make_no_sense_are_refused() {
    let with_tables = |tables: Value| {
        let mut document = document();
        document["tables"] = tables;
        document.to_string().into_bytes()
    };
    let plain = json!({"id": "0x8", "format": "intel-vtd/second-stage", "root": "0x1000", "settings": {"levels": 4}});
    assert!(load(&with_tables(json!([plain])), &[0; 4096]).is_ok());
    for entry in [
        json!({"format": "x", "root": 0}),
        json!({"id": "0x8"}),
        json!({"id": "0x8", "format": "x"}),
        json!({"id": "0x8", "format": "x", "root": 0, "settings": {"root": 0}}),
        json!({"id": "0x8", "state": "asleep"}),
        json!({"id": "0x8", "state": "bypass", "format": "x", "root": 0}),
        json!({"id": "0x8", "pasid": 4294967296_u64, "state": "bypass"}),
        json!({"id": "0x8", "format": 7, "root": 0}),
        json!({"id": "0x8", "format": "x", "root": 0, "settings": [1]}),
        json!({"id": "0x8", "format": "x", "root": 0, "settings": {"a": {"b": 1}}}),
    ] {
        refused(&with_tables(json!([entry])), &[0; 4096], "snapshot.json");
    }
    refused(&with_tables(json!([plain, plain])), &[0; 4096], "snapshot.json");
    // What only the plugin knows to be nonsense is refused when it is looked at.
    for (format, settings) in [
        ("no/such", json!({})),
        ("intel-vtd/second-stage", json!({"levels": 99})),
        ("intel-vtd/second-stage", json!({"no-such-setting": 1})),
        ("arm-smmuv3/stage1", json!({"input-bits": "0xffffffffffffffff"})),
        ("arm-smmuv3/stage2", json!({"start-level": 7})),
        ("intel-vtd/first-stage", json!({"output-bits": 0})),
    ] {
        let json = with_tables(json!([{"id": "0x8", "format": format, "root": "0x1000", "settings": settings}]));
        let snapshot = load(&json, &[0; 4096]).unwrap();
        let guest = Guest::new(&snapshot, plugins()).unwrap();
        let stagecraft::guest::State::Translated(configs) = guest.stream(8, None).unwrap().state else { panic!("{format}") };
        let error = guest.open(&configs).unwrap_err().to_string();
        assert!(!error.is_empty() && !error.contains("trapped"), "{error}");
    }
}

/// Bytes changed, removed and repeated anywhere in both files.
#[test]
fn damaged_files_are_read_or_refused() {
    let mut rng = Rng::new(seed());
    let plain = document().to_string().into_bytes();
    let folder = tempfile::tempdir().unwrap();
    for round in 0..rounds(40) * 50 {
        let mut json = plain.clone();
        for _ in 0..=rng.below(4) {
            let at = rng.below(json.len() as u64) as usize;
            match rng.below(5) {
                0 => json[at] ^= 1 << rng.below(8),
                1 => json[at] = rng.pick(b"0123456789\"{}[],:xeE-+.\\ \n"),
                2 => drop(json.remove(at)),
                3 => json.insert(at, rng.pick(b"0123456789\"{}[],:xfF-+.\\ \n")),
                _ => {
                    let end = (at + 1 + rng.below(20) as usize).min(json.len());
                    let part = json[at..end].to_vec();
                    json.splice(at..at, part);
                }
            }
        }
        let pages = vec![rng.number() as u8; (4096 * rng.pick(&[1, 1, 1, 1, 2])) as usize - usize::from(rng.percent(5))];
        write(folder.path(), &json, &pages);
        timed(&format!("damaged files, round {round}"), || match Snapshot::load(folder.path()) {
            Err(error) => {
                let error = error.to_string();
                assert!(error.contains("snapshot.json") || error.contains("pages.bin"), "{error}");
            }
            Ok(snapshot) => {
                if let Ok(guest) = Guest::new(&snapshot, plugins()) {
                    let _ = guest.streams();
                }
            }
        });
    }
}
