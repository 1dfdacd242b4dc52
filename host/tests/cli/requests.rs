//! Guests that asked for their mappings instead of writing tables.

use serde_json::{Value, json};

use crate::support::{folder, run};

/// A guest with a shared domain, a bypass domain and a device that nobody attached.
fn guest() -> Value {
    json!({
        "version": 1,
        "unit": {"kind": "virtio-iommu", "registers": {"features": "0x77", "accepted": "0x77", "bypass": "0x0"}},
        "domains": [
            {"id": 1, "endpoints": ["0x8", "0x10"], "mappings": [
                {"first": "0x1000", "last": "0x1fff", "address": "0x5000", "access": "rw"},
                {"first": "0x2000", "last": "0x3fff", "address": "0x6000", "access": "rw"},
                {"first": "0x8000", "last": "0x8fff", "address": "0x100000000", "access": "w", "mmio": true},
                {"first": "0xa000", "last": "0xafff", "address": "0x9000", "access": "-"},
            ]},
            {"id": "0x2", "bypass": true, "endpoints": ["0x18"]},
        ],
        "memory": [{"kind": "ram", "first": "0x0", "last": "0xffffff"}, {"kind": "device", "first": "0x100000000", "last": "0x10000ffff"}],
        "devices": [{"label": "a", "id": "0x8"}, {"label": "b", "id": "0x10"}, {"label": "c", "id": "0x18"}, {"label": "d", "id": "0x20"}],
        "page_size": 4096,
        "pages": [],
    })
}

fn write(name: &str, guest: &Value) -> String {
    let path = folder(name);
    std::fs::write(path.join("snapshot.json"), guest.to_string()).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn every_question_about_tables_has_an_answer() {
    let path = write("requests", &guest());
    let report = run(&["inspect", &path, "--format", "json"]).good().json();
    let table = json!([{"format": "virtio-iommu/requests", "root": null, "settings": {"domain": 1}}]);
    let mappings = json!([
        {"iova": "0x1000", "address": "0x5000", "size": 0x3000, "access": "rw"},
        {"iova": "0x8000", "address": "0x100000000", "size": 0x1000, "access": "w"},
    ]);
    for (index, state) in ["translated", "translated", "bypass", "blocked"].iter().enumerate() {
        assert_eq!(report["streams"][index]["state"], *state);
    }
    for index in [0, 1] {
        assert_eq!((&report["streams"][index]["tables"], &report["streams"][index]["mappings"]), (&table, &mappings));
    }
    assert_eq!(report["streams"][3]["reason"], "attached to no domain (Virtio 1.3 section 5.13.6)");
    let translate = |device: &str, iova: &str, access: &str| {
        run(&["translate", &path, "--device", device, "--iova", iova, "--access", access, "--format", "json"]).good().json()
    };
    assert_eq!(translate("a", "0x2fff", "w"), json!({"succeeds": true, "address": "0x6fff"}));
    assert_eq!(translate("c", "0x2fff", "w"), json!({"succeeds": true, "address": "0x2fff"}));
    for (device, iova, access, kind, reason) in [
        ("b", "0x8000", "r", "permission", "the mapping does not allow reading"),
        ("b", "0xa000", "w", "permission", "the mapping does not allow writing"),
        ("b", "0x9000", "w", "translation", "nothing is mapped here"),
        ("d", "0x1000", "r", "blocked", "attached to no domain (Virtio 1.3 section 5.13.6)"),
    ] {
        let fault = &translate(device, iova, access)["fault"];
        assert_eq!((&fault["kind"], &fault["reason"]), (&json!(kind), &json!(reason)), "{device} {iova} {access}");
    }
    assert_eq!(run(&["validate", &path, "--format", "json"]).good().json()["errors"], 0, "an endpoint that nobody attached is no error");
    let out = folder("requests-out");
    let converted = out.join("x").to_str().unwrap().to_owned();
    run(&["convert", &path, "--to", "intel-vtd/second-stage", "--out", &converted]).good();
    assert_eq!(run(&["diff", &path, &converted, "--format", "json"]).good().json()["same"], true);
    assert_eq!(run(&["diff", &path, &path]).good().status, 0);
    let picture = out.join("map.svg").to_str().unwrap().to_owned();
    run(&["draw", &path, "--out", &picture]).good();
    assert!(std::fs::read_to_string(picture).unwrap().contains("virtio-iommu/requests domain=1"));
}

#[test]
fn what_leads_out_of_memory_is_a_fault() {
    let mut guest = guest();
    guest["domains"][0]["mappings"][1]["address"] = json!("0xfff000");
    let path = write("requests-outside", &guest);
    let report = run(&["validate", &path, "--format", "json"]);
    assert_eq!(report.status, 1);
    let violation = &report.json()["violations"][0];
    assert_eq!((&violation["kind"], &violation["iova"], &violation["last"]), (&json!("outside-memory"), &json!("0x3000"), &json!("0x3fff")));
    assert_eq!(violation["reason"], "the guest has no memory at address 0x1000000");
    let found = run(&["translate", &path, "--device", "a", "--iova", "0x3000", "--access", "r", "--format", "json"]).good().json();
    assert_eq!(found["fault"]["kind"], "outside-memory");
    let found = run(&["translate", &path, "--device", "a", "--iova", "0x2fff", "--access", "r", "--format", "json"]).good().json();
    assert_eq!(found["address"], "0xffffff");
}

#[test]
fn unattached_devices_bypass_where_the_registers_say_so() {
    let mut guest = guest();
    guest["unit"]["registers"]["bypass"] = json!("0x1");
    let report = run(&["inspect", &write("requests-bypass", &guest), "--format", "json"]).good().json();
    assert_eq!(report["streams"][3]["state"], "bypass");
}

#[test]
fn what_makes_no_sense_is_refused_with_the_thing() {
    let wrong = |name: &str, change: &dyn Fn(&mut Value), expected: &str| {
        let mut guest = guest();
        change(&mut guest);
        let found = run(&["inspect", &write(&format!("requests-{name}"), &guest)]);
        assert_eq!(found.status, 2, "{name}");
        assert!(found.stderr.contains(expected) && found.stderr.lines().count() == 1, "{name}: {}", found.stderr);
    };
    let mapping = |guest: &mut Value, name: &str, value: &str| guest["domains"][0]["mappings"][1][name] = json!(value);
    wrong("overlap", &|guest| mapping(guest, "first", "0x1fff"), "domain 0x1: 0x1fff..=0x3fff overlaps the mapping of 0x1000..=0x1fff");
    wrong("empty", &|guest| mapping(guest, "last", "0x1fff"), "domain 0x1: 0x2000..=0x1fff is empty");
    wrong("end", &|guest| mapping(guest, "address", "0xfffffffffffff000"), "beyond the last address");
    wrong("access", &|guest| mapping(guest, "access", "x"), "access `x`; there are `r`, `w`, `rw` and `-`");
    wrong("twice", &|guest| guest["domains"][1]["id"] = json!(1), "domain 0x1 is listed twice");
    wrong("wide", &|guest| guest["domains"][1]["id"] = json!(1_u64 << 32), "domain 0x100000000 has more than 32 bits");
    wrong("shared", &|guest| guest["domains"][1]["endpoints"][0] = json!("0x10"), "endpoint 0x10 is in domains 0x1 and 0x2");
    wrong("unknown", &|guest| guest["domains"][1]["endpoints"][0] = json!("0x99"), "endpoint 0x99 is not among the devices");
    wrong("bypass", &|guest| guest["domains"][0]["bypass"] = json!(true), "domain 0x1 is a bypass domain and has mappings");
    wrong("kind", &|guest| guest["unit"]["kind"] = json!("intel-vtd"), "a unit of kind `intel-vtd` has no `domains`");
    wrong("unit", &|guest| drop(guest.as_object_mut().unwrap().remove("unit")), "`domains` without a unit of kind `virtio-iommu`");
    wrong("tables", &|guest| guest["tables"] = json!([]), "both `tables` and `domains`");
    wrong("none", &|guest| drop(guest.as_object_mut().unwrap().remove("domains")), "a unit `virtio-iommu` and no `domains`");
    let found = run(&["convert", &write("requests-to", &guest()), "--to", "virtio-iommu/requests", "--out", "/nowhere/x"]);
    assert_eq!(found.status, 2, "no format to convert to");
}
