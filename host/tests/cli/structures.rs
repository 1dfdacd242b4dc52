//! `validate` on device structures with bits that are reserved and that hardware ignores, and on what real guests leave in them.

use std::path::Path;

use serde_json::{Value, json};

use crate::outcomes::{Guest, riscv};
use crate::support::{Copy, fixtures, run};

/// Warnings about structures that `validate` finds, and nothing else.
fn warnings(path: &str) -> Vec<Value> {
    let report = run(&["validate", path, "--format", "json"]).good().json();
    let violations = report["violations"].as_array().unwrap().clone();
    assert_eq!((&report["errors"], &report["warnings"]), (&json!(0), &json!(violations.len())), "{report:#}");
    for violation in &violations {
        assert_eq!((&violation["severity"], &violation["kind"], &violation["path"]), (&json!("warning"), &json!("structure"), &json!([])));
        assert!(!violation["section"].as_str().unwrap().is_empty() && !violation["reason"].as_str().unwrap().is_empty(), "{violation:#}");
    }
    violations
}

fn place(address: u64, word: u64) -> Value {
    json!({"address": format!("{address:#x}"), "word": word})
}

#[test]
fn a_structure_that_several_devices_share_is_warned_of_once() {
    let mut copy = Copy::new("structures-arm", "arm64-s1-4k");
    // IHI 0070 section 5.1: a level 1 descriptor for 256 streams, whose bit 5 is reserved; and section 5.2: bits 58:56 of an entry.
    let first = copy.register("STRTAB_BASE") & 0x000f_ffff_ffff_ffc0;
    let entry = (copy.word(first) & 0x000f_ffff_ffff_ffc0) + 0x30 * 64;
    copy.set_word(first, copy.word(first) | 1 << 5);
    copy.set_word(entry, copy.word(entry) | 3 << 56);
    let path = copy.write().path();

    let found = warnings(path);
    assert_eq!(found.len(), 2);
    assert_eq!((&found[0]["structure"], &found[0]["bits"], &found[0]["section"]), (&place(first, 0), &json!("0x20"), &json!("IHI 0070 section 5.1")));
    assert_eq!(found[0]["id"], "0x0");
    let shared: Vec<&Value> = found[0]["shared"].as_array().unwrap().iter().map(|stream| &stream["id"]).collect();
    assert_eq!(shared, ["0x18", "0x28", "0x30", "0x38", "0x40"]);
    assert_eq!((&found[1]["id"], &found[1]["shared"]), (&json!("0x30"), &json!([])));
    assert_eq!((&found[1]["structure"], &found[1]["bits"]), (&place(entry, 0), &json!("0x300000000000000")));
    let reached = |snapshot: &str| run(&["inspect", snapshot, "--format", "json"]).good().json();
    assert_eq!(reached(path), reached("arm64-s1-4k"), "hardware does not mind");

    assert_eq!(run(&["validate", path, "--strict"]).status, 1);
    let human = run(&["validate", path]).good().stdout;
    let lines = format!("bits 0x0300000000000000 of 64-bit word 0 of the structure at {entry:#x}");
    assert!(human.contains("no errors, 2 warnings") && human.contains("warning: structure") && human.contains(&lines), "{human}");
    let one: Value = run(&["validate", path, "--device", "0x40", "--strict", "--format", "json"]).json();
    assert_eq!((&one["warnings"], &one["violations"][0]["id"], &one["violations"][0]["shared"]), (&json!(1), &json!("0x40"), &json!([])));
    let one: Value = run(&["validate", path, "--max", "1", "--format", "json"]).json();
    assert_eq!((one["violations"].as_array().unwrap().len(), &one["warnings"]), (1, &json!(2)));
}

#[test]
fn a_field_without_its_capability_is_warned_of_only_where_nothing_uses_it() {
    let mut copy = Copy::new("structures-vtd", "vtd-sm-fs");
    let pointer = |word: u64| word & !0xfff;
    let context = copy.word(pointer(copy.register("RTADDR")));
    // D51397 sections 9.4 to 9.6, for device 0x38 and requests without PASID.
    let context_entry = pointer(context) + 0x38 * 32;
    let pasid = copy.word(context_entry + 8) & 0xf_ffff;
    let directory = copy.word(pointer(copy.word(context_entry)) + (pasid >> 6) * 8);
    let entry = pointer(directory) + (pasid & 0x3f) * 64;
    assert_eq!(copy.word(entry) >> 6 & 7, 1, "first stage");
    // SSADE: the unit has no second stage.
    copy.set_word(entry, copy.word(entry) | 1 << 9);
    let found = warnings(copy.write().path());
    assert_eq!((found.len(), &found[0]["structure"], &found[0]["bits"]), (1, &place(entry, 0), &json!("0x200")));
}

/// A device table entry of AMD's, 48882 section 2.2.2, of device 1.
fn amd(test: &str, entry: [u64; 4]) -> String {
    const TABLE: u64 = 0x8000_1000;
    let unit = json!({"unit": {"kind": "amd-vi", "registers": {"DEVTAB_BASE": format!("{TABLE:#x}"), "CONTROL": "0x1", "EXT_FEATURES": "0x0"}}});
    Guest::new(&unit, 1).words(TABLE + 32, &entry).save(test).to_str().unwrap().to_owned()
}

#[test]
fn a_device_that_may_neither_read_nor_write_is_unused() {
    for entry in [[0b11, 0, 0, 0], [0b11 | 4 << 9 | 0x8000_2000, 5, 0, 0]] {
        let path = amd("structures-amd-unused", entry);
        assert_eq!(warnings(&path), [] as [Value; 0]);
        let stream = run(&["inspect", &path, "--format", "json"]).good().json()["streams"][0].clone();
        assert_eq!(stream["state"], "blocked");
        assert!(stream["reason"].as_str().unwrap().contains("IR, IW"), "{stream:#}");
    }
    // Also if there are guest tables: nothing of what they say can pass.
    let path = amd("structures-amd-guest", [0b11 | 1 << 55, 5, 0, 0]);
    assert_eq!(warnings(&path), [] as [Value; 0]);
}

#[test]
fn reserved_bits_beside_the_tables_of_an_amd_unit_are_warned_of() {
    let path = amd("structures-amd", [0b11 | 3 << 61, 5, 1 << 52, 1 << 48]);
    let found = warnings(&path);
    let places: Vec<(&Value, &Value)> = found.iter().map(|warning| (&warning["structure"], &warning["bits"])).collect();
    let (second, third) = (place(0x8000_1020, 2), place(0x8000_1020, 3));
    assert_eq!(places, [(&second, &json!("0x10000000000000")), (&third, &json!("0x1000000000000"))]);
}

/// What blocks the one device of a snapshot: structure, bits, section and reason. All other fields say that there is no entry of a table.
fn blocked(path: &str, device: &str) -> [Value; 4] {
    let found = run(&["validate", path, "--device", device, "--format", "json"]);
    let report = found.json();
    assert_eq!((found.status, &report["errors"], &report["warnings"]), (1, &json!(1), &json!(0)), "{report:#}");
    let mut violation = report["violations"][0].clone();
    let taken = ["structure", "bits", "section", "reason"].map(|name| violation.as_object_mut().unwrap().remove(name).unwrap_or_default());
    let others = json!({
        "id": violation["id"], "pasid": null, "shared": [], "severity": "error", "kind": "blocked", "stage": null, "iova": null, "last": null, "level": null,
        "path": [], "entry": null, "count": 1,
    });
    assert_eq!(violation, others);
    taken
}

/// Which structure, which field of it, and where the specification says so: each as a field of its own, for every architecture that has structures.
#[test]
fn what_hardware_refuses_is_named_to_the_bit() {
    // IHI 0070 section 5.4: T0SZ of the context descriptor of device 0x30, which is behind a stream table entry of section 5.2.
    let mut copy = Copy::new("refused-arm", "arm64-s1-4k");
    let first = copy.register("STRTAB_BASE") & 0x000f_ffff_ffff_ffc0;
    let entry = (copy.word(first) & 0x000f_ffff_ffff_ffc0) + 0x30 * 64;
    let context = copy.word(entry) & 0x000f_ffff_ffff_ffc0;
    let (entry_was, context_was) = (copy.word(entry), copy.word(context));
    copy.set_word(context, context_was | 0x3f);
    let reason = "C_BAD_CD: the input address size is out of range";
    assert_eq!(blocked(copy.write().path(), "0x30"), [place(context, 0), json!("0x3f"), json!("IHI 0070 section 5.4, TxSZ"), json!(reason)]);
    let human = run(&["validate", copy.path(), "--device", "0x30"]).stdout;
    let lines = format!("bits 0x000000000000003f of 64-bit word 0 of the structure at {context:#x}");
    assert!(human.contains(&lines) && human.contains(&format!("{reason} (IHI 0070 section 5.4, TxSZ)")), "{human}");
    copy.set_word(context, context_was);
    // S1CDMax: there are no SubstreamIDs of 31 bits.
    copy.set_register("IDR1", copy.register("IDR1") & !(0x1f << 6) | 1 << 6);
    copy.set_word(entry, entry_was | 0x1f << 59);
    let [structure, bits, section, _] = blocked(copy.write().path(), "0x30");
    assert_eq!([structure, bits, section], [place(entry, 0), json!("0xf800000000000000"), json!("IHI 0070 section 5.2, S1CDMax")]);
    // A context where there is no memory: a structure as a whole.
    copy.set_word(entry, entry_was & !0x000f_ffff_ffff_ffc0 | 0x90_0000_0000);
    let [structure, bits, _, reason] = blocked(copy.write().path(), "0x30");
    assert_eq!([structure, bits], [place(0x90_0000_0000, 0), json!(null)]);
    assert_eq!(reason, "F_CD_FETCH: the context descriptor at 0x9000000000 cannot be read");
    assert!(run(&["validate", copy.path(), "--device", "0x30"]).stdout.contains("\n  the structure at 0x9000000000\n"));

    // D51397 section 9.6: bit 1 of word 2 of the PASID table entry.
    let mut copy = Copy::new("refused-vtd", "vtd-sm-fs");
    let pointer = |word: u64| word & !0xfff;
    let context_entry = pointer(copy.word(pointer(copy.register("RTADDR")))) + 0x38 * 32;
    let pasid = copy.word(context_entry + 8) & 0xf_ffff;
    let directory = copy.word(pointer(copy.word(context_entry)) + (pasid >> 6) * 8);
    let entry = pointer(directory) + (pasid & 0x3f) * 64;
    copy.set_word(entry + 16, copy.word(entry + 16) | 2);
    let reason = "SPT.3: the PASID table entry has a reserved bit";
    let section = "D51397 section 7.1.3, fault reason 5Ah";
    assert_eq!(blocked(copy.write().path(), "0x38"), [place(entry, 2), json!("0x2"), json!(section), json!(reason)]);

    // 48882 section 2.2.2: mode 7.
    let [structure, bits, _, reason] = blocked(&amd("refused-amd", [0b11 | 7 << 9 | 3 << 61, 5, 0, 0]), "1");
    assert_eq!([structure, bits], [place(0x8000_1020, 0), json!("0xe00")]);
    assert!(reason.as_str().unwrap().ends_with(": paging mode 7 is reserved"), "{reason}");

    // RISC-V IOMMU section 2.1.3: a reserved bit of the translation attributes.
    let saved = riscv([1, 0, 1, 0, 0, 0, 0, 0], true).save("refused-riscv");
    let [structure, bits, section, _] = blocked(saved.to_str().unwrap(), "3");
    assert_eq!([structure, bits, section], [place(0x8000_1000 + 3 * 64, 2), json!("0x1"), json!("RISC-V IOMMU 1.0 section 3.2, cause 259")]);
}

/// Real drivers do nothing that hardware refuses, and set no bit that is reserved.
#[test]
fn nothing_is_wrong_with_real_guests() {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/fixtures");
    let folder = if beside.is_dir() { beside } else { fixtures() };
    let mut checked = 0;
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        if !path.join("snapshot.json").exists() {
            continue;
        }
        let found = run(&["validate", path.to_str().unwrap(), "--strict"]);
        assert_eq!((found.status, &*found.stderr), (0, ""), "{}: {}", path.display(), found.stdout);
        assert!(found.stdout.contains("no errors, no warnings"), "{}: {}", path.display(), found.stdout);
        checked += 1;
    }
    eprintln!("{checked} snapshots of {}", folder.display());
    assert!(checked >= 3);
}
