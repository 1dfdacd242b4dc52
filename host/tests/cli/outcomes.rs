//! What a device's DMA gets besides plain tables: windows without a table, addresses that something else serves, parts of pages, supersections.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::support::{folder, hex, run};

/// A guest that is made up: 64-bit words where structures are, 16 MiB of RAM at 0x80000000, device memory at 0x28000000.
pub struct Guest {
    unit: Value,
    pages: BTreeMap<u64, Vec<u8>>,
    id: u64,
}

impl Guest {
    pub fn new(unit: &Value, id: u64) -> Self {
        Self { unit: unit.clone(), pages: BTreeMap::new(), id }
    }

    pub fn write(mut self, address: u64, bytes: &[u8]) -> Self {
        for (offset, byte) in (address..).zip(bytes) {
            self.pages.entry(offset & !0xfff).or_insert_with(|| vec![0; 4096])[(offset & 0xfff) as usize] = *byte;
        }
        self
    }

    pub fn words(self, address: u64, words: &[u64]) -> Self {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.write(address, &bytes)
    }

    /// A table of 16 KiB.
    fn table(self, address: u64, words: &[u64]) -> Self {
        self.write(address, &[0; 0x4000]).words(address, words)
    }

    pub fn save(&self, test: &str) -> PathBuf {
        let path = folder(test).join("guest");
        fs::create_dir(&path).unwrap();
        let mut snapshot = json!({
            "version": 1,
            "memory": [
                {"kind": "device", "first": "0x28000000", "last": "0x28ffffff"},
                {"kind": "ram", "first": "0x80000000", "last": "0x80ffffff"},
                {"kind": "ram", "first": "0x500000000", "last": "0x500ffffff"},
            ],
            "devices": [{"label": "under-test", "id": self.id}],
            "page_size": 4096,
            "pages": self.pages.keys().map(|page| format!("{page:#x}")).collect::<Vec<_>>(),
        });
        for (name, value) in self.unit.as_object().unwrap() {
            snapshot[name] = value.clone();
        }
        fs::write(path.join("snapshot.json"), snapshot.to_string()).unwrap();
        fs::write(path.join("pages.bin"), self.pages.values().flatten().copied().collect::<Vec<u8>>()).unwrap();
        path
    }
}

fn stream(path: &str) -> Value {
    run(&["inspect", path, "--format", "json"]).good().json()["streams"][0].clone()
}

fn translate(path: &str, iova: &str, access: &str) -> Value {
    run(&["translate", path, "--device", "under-test", "--iova", iova, "--access", access, "--format", "json"]).json()
}

fn mapping(iova: u64, address: u64, size: u64, access: &str) -> Value {
    json!({"iova": format!("{iova:#x}"), "address": format!("{address:#x}"), "size": size, "access": access})
}

fn convert(path: &str, to: &str, out: &str) -> Value {
    run(&["convert", path, "--to", to, "--out", out, "--format", "json"]).good().json()
}

#[test]
fn a_function_without_tables_reaches_memory_at_an_offset() {
    // The guest's memory from zero on is not there; what is there shows at the same offset from the lowest input address.
    let unit = json!({"unit": {"kind": "s390-zpci", "registers": {"IOTA_10000": "0x0", "BASE_10000": "0x100000000", "LIMIT_10000": "0x180ffffff"}}});
    let saved = Guest::new(&unit, 0x1_0000).save("direct");
    let path = saved.to_str().unwrap();
    let found = stream(path);
    assert_eq!((&found["state"], &found["tables"], &found["reason"]), (&json!("bypass"), &json!([]), &json!(null)));
    let expected = [mapping(0x1_2800_0000, 0x2800_0000, 0x100_0000, "rw"), mapping(0x1_8000_0000, 0x8000_0000, 0x100_0000, "rw")];
    assert_eq!(found["mappings"], json!(expected));
    assert_eq!(translate(path, "0x180001234", "w"), json!({"succeeds": true, "address": "0x80001234"}));
    let kind = |iova: &str| translate(path, iova, "r")["fault"]["kind"].clone();
    assert_eq!([kind("0x80001234"), kind("0x181000000"), kind("0x100000000")], [json!("translation"), json!("translation"), json!("outside-memory")]);
    assert!(run(&["inspect", path]).good().stdout.contains("1 window without a table"));
    assert_eq!(run(&["validate", path]).good().status, 0);

    let out = saved.with_file_name("out");
    let out = out.to_str().unwrap();
    let report = convert(path, "intel-vtd/second-stage", out);
    assert_eq!(report["tables"][0]["losses"], json!([]));
    assert_eq!((&report["tables"][0]["source"], &report["tables"][0]["windows"][0]["iova"]), (&json!([]), &json!("0x100000000")));
    let converted = stream(out);
    assert_eq!((&converted["state"], &converted["mappings"]), (&json!("translated"), &json!(expected)));
    assert_eq!(run(&["diff", path, out]).good().status, 0, "both reach the same");

    // A target whose addresses end before says so.
    let out = saved.with_file_name("short");
    let report = convert(path, "arm-v7s/short", out.to_str().unwrap());
    let losses: Vec<&Value> = report["tables"][0]["losses"].as_array().unwrap().iter().map(|loss| &loss["loss"]).collect();
    assert_eq!(losses, ["input-range"]);
}

/// A RISC-V IOMMU with one device context in the extended format at 0x80001000, and an Sv39 table at 0x80002000.
pub fn riscv(context: [u64; 8], first: bool) -> Guest {
    let capabilities = 0x10_u64 | 1 << 9 | 1 << 17 | 1 << 22 | 56 << 32;
    let ddtp = (0x8000_1000_u64 >> 12) << 10 | 2;
    let registers = json!({"CAPABILITIES": format!("{capabilities:#x}"), "FCTL": "0x0", "DDTP": format!("{ddtp:#x}")});
    let unit = json!({"unit": {"kind": "riscv-iommu", "registers": registers}});
    // V R W X U A D: a leaf. The root's first entry leads to a second table, and that to a third.
    let (table, leaf) = (1, 0xdf);
    let entry = |address: u64, flags: u64| address >> 12 << 10 | flags;
    let guest = Guest::new(&unit, 3).words(0x8000_1000 + 3 * 64, &context);
    let guest = guest.words(0x8000_4000, &[entry(0x8000_5000, table)]).words(0x8000_5000, &[entry(0x8000_6000, table)]);
    // Four pages, one of which is where the guest sees interrupt files.
    let pages = [0x8010_0000, 0x2800_0000, 0x2800_1000, 0x8010_3000].map(|address| entry(address, leaf));
    let guest = guest.words(0x8000_6000, &pages);
    if first { guest } else { guest.words(0x8000_6008, &[entry(0x8020_0000, leaf)]) }
}

#[test]
fn msi_addresses_are_not_the_tables_business() {
    let (sv39, bare) = (8 << 60 | 0x8000_4000_u64 >> 12, 0);
    let msi = [1 << 60 | 0x8000_9000_u64 >> 12, 0, 0x2_8000, 0];
    let with = |iohgatp: u64, fsc: u64| [1, iohgatp, 0, fsc, msi[0], msi[1], msi[2], msi[3]];

    // After the first stage: the page that leads to 0x28000000.
    let saved = riscv(with(bare, sv39), true).save("msi-first");
    let path = saved.to_str().unwrap();
    let found = stream(path);
    let intercept = json!([{"passed": 1, "mask": "0xfffffffffffff000", "value": "0x28000000", "server": "MSI page table", "address": "0x80009000",
        "section": "RISC-V IOMMU 1.0 section 2.1.3.6"}]);
    assert_eq!(found["intercepts"], intercept);
    let expected = [mapping(0, 0x8010_0000, 0x1000, "rw"), mapping(0x2000, 0x2800_1000, 0x1000, "rw"), mapping(0x3000, 0x8010_3000, 0x1000, "rw")];
    assert_eq!(found["mappings"], json!(expected));
    assert_eq!(translate(path, "0x2004", "w"), json!({"succeeds": true, "address": "0x28001004"}));
    let fault = translate(path, "0x1004", "w")["fault"].clone();
    assert_eq!((&fault["kind"], &fault["stage"]), (&json!("intercepted"), &json!(1)));
    assert!(fault["reason"].as_str().unwrap().contains("0x28000004 is intercepted: the MSI page table serves it"), "{fault}");
    assert!(run(&["inspect", path]).good().stdout.contains("outputs of the first table with 0x28000000 under mask"));
    let text = run(&["inspect", path]).good().stdout;
    assert!(text.contains("1 range that the tables map; requests there never come to them") && !text.contains("validate"), "{text}");
    let out = saved.with_file_name("out");
    let out = out.to_str().unwrap();
    // What the guest set up is missed in any target, the same format's too.
    for to in ["arm-smmuv3/stage1", "intel-vtd/second-stage", "riscv-iommu/first-stage"] {
        let refused = run(&["convert", path, "--to", to, "--out", out, "--strict"]);
        assert_eq!(refused.status, 1);
        assert!(refused.stderr.contains("1 intercept that the guest set up, and --strict"), "{}", refused.stderr);
        assert!(refused.stdout.contains("refused intercept: outputs of the first table") && !refused.stdout.contains("none"), "{}", refused.stdout);
    }
    let report = convert(path, "arm-smmuv3/stage1", out);
    let mut lost = intercept[0].clone();
    lost["refused"] = json!(true);
    assert_eq!((&report["tables"][0]["losses"], &report["tables"][0]["intercepts"]), (&json!([]), &json!([lost])));
    assert_eq!(stream(out)["mappings"], json!(expected), "an intercepted page is not mapped elsewhere");
    let diff = run(&["diff", path, out, "--format", "json"]);
    assert_eq!(diff.status, 1);
    assert_eq!(diff.json()["differences"][0]["intercepts"], json!({"a": intercept, "b": []}));
    assert!(run(&["diff", path, out]).stdout.contains("intercepted in a: outputs of the first table with 0x28000000"));
    assert_eq!(run(&["diff", path, path]).good().status, 0);

    // Without a first stage the IOVA is compared, before the second stage: 0x28000000 is nowhere in this table.
    let guest = riscv(with(8 << 60 | 0x8002_0000_u64 >> 12, bare), false).table(0x8002_0000, &[0x8000_5000 >> 12 << 10 | 1]);
    let saved = guest.save("msi-second");
    let path = saved.to_str().unwrap();
    assert_eq!(stream(path)["intercepts"][0]["passed"], 0);
    assert_eq!(translate(path, "0x28000004", "w")["fault"]["kind"], "intercepted");
    assert_eq!(translate(path, "0x28001004", "w")["fault"]["kind"], "translation");
    assert_eq!(translate(path, "0x1004", "w"), json!({"succeeds": true, "address": "0x80200004"}));

    // Between two stages: the first one's outputs. Its tables are behind the second, which is the identity here.
    let identity: Vec<u64> = (0..2048).map(|index: u64| (index << 30) >> 12 << 10 | 0xdf).collect();
    let guest = riscv(with(8 << 60 | 0x8001_0000_u64 >> 12, sv39), true).words(0x8001_0000, &identity);
    let saved = guest.save("msi-nested");
    let path = saved.to_str().unwrap();
    assert_eq!(stream(path)["mappings"], json!(expected));
    let fault = translate(path, "0x1004", "w")["fault"].clone();
    assert_eq!((&fault["kind"], &fault["stage"]), (&json!("intercepted"), &json!(2)));

    // No stage at all.
    let saved = riscv(with(bare, bare), true).save("msi-bare");
    let path = saved.to_str().unwrap();
    let found = stream(path);
    assert_eq!((&found["state"], &found["mappings"][0]["iova"]), (&json!("bypass"), &json!("0x28001000")));
    assert_eq!(translate(path, "0x28000fff", "w")["fault"]["kind"], "intercepted");
    assert_eq!(translate(path, "0x80000000", "w"), json!({"succeeds": true, "address": "0x80000000"}));
}

/// A VT-d unit in legacy mode, and a second stage with pages before, among and behind the addresses of interrupts.
fn vtd() -> Guest {
    let cap = 1_u64 << 56 | 0b11 << 34 | 47 << 16 | 0b01110 << 8 | 6;
    let registers = json!({"VER": "0x60", "CAP": format!("{cap:#x}"), "ECAP": "0x0", "GSTS": "0x80000000", "RTADDR": "0x80001000"});
    let unit = json!({"unit": {"kind": "intel-vtd", "registers": registers}});
    let guest = Guest::new(&unit, 0x10).words(0x8000_1000, &[0x8000_2000 | 1]).words(0x8000_2000 + 0x10 * 16, &[0x8000_3000 | 1, 2]);
    let guest = guest.words(0x8000_3000, &[0x8000_4000 | 3]).words(0x8000_4000 + 3 * 8, &[0x8000_5000 | 3]);
    let guest = guest.words(0x8000_5000 + 0x1f6 * 8, &[0x8000_6000 | 3, 0x8000_7000 | 3]);
    let guest = guest.words(0x8000_6000 + 0x1ff * 8, &[0x8010_0000 | 3]).words(0x8000_7000 + 8, &[0x8010_1000 | 3]);
    guest.words(0x8000_7000 + 0xff * 8, &[0x8010_2000 | 3, 0x8010_3000 | 3])
}

#[test]
fn interrupts_of_an_x86_unit_are_not_the_tables_business() {
    let saved = vtd().save("interrupts");
    let path = saved.to_str().unwrap();
    let found = stream(path);
    let intercept = json!([{"passed": 0, "mask": "0xfffffffffff00000", "value": "0xfee00000", "server": "interrupt controller", "address": null,
        "section": "D51397 section 3.15"}]);
    assert_eq!(found["intercepts"], intercept);
    let expected = [mapping(0xfedf_f000, 0x8010_0000, 0x1000, "rw"), mapping(0xfef0_0000, 0x8010_3000, 0x1000, "rw")];
    assert_eq!(found["mappings"], json!(expected));
    for iova in ["0xfee01000", "0xfeeff000", "0xfee00000"] {
        let fault = translate(path, iova, "w")["fault"].clone();
        assert_eq!((&fault["kind"], &fault["stage"]), (&json!("intercepted"), &json!(1)));
        assert!(fault["reason"].as_str().unwrap().contains("the interrupt controller serves it"), "{fault}");
    }
    assert_eq!(translate(path, "0xfef00008", "w"), json!({"succeeds": true, "address": "0x80103008"}));
    let text = run(&["inspect", path]).good().stdout;
    assert!(text.contains("2 ranges that the tables map") && !text.contains("faults"), "{text}");
    assert_eq!(run(&["validate", path]).good().status, 0);

    // It comes with the architecture: no target misses it, those that have the same say nothing of it, and both reach the same memory.
    let out = saved.with_file_name("out");
    let out = out.to_str().unwrap();
    for (to, kept) in [("arm-smmuv3/stage1", false), ("riscv-iommu/first-stage", false), ("amd-vi/v1", true), ("intel-vtd/first-stage", true)] {
        let report = run(&["convert", path, "--to", to, "--out", out, "--force", "--strict", "--format", "json"]).good().json();
        let mut left_out = intercept[0].clone();
        left_out["refused"] = json!(false);
        let table = &report["tables"][0];
        assert_eq!((&table["losses"], &table["intercepts"]), (&json!([]), &if kept { json!(null) } else { json!([left_out]) }), "{to}");
        assert_eq!(stream(out)["mappings"], json!(expected), "{to}");
        assert_eq!(run(&["diff", path, out]).good().status, 0, "{to}");
    }
    let text = run(&["convert", path, "--to", "arm-smmuv3/stage1", "--out", out, "--force"]).good().stdout;
    assert!(text.contains("left out intercept: IOVAs with 0xfee00000 under mask") && text.contains("none"), "{text}");
}

#[test]
fn requests_with_pasid_are_translated_where_others_are_interrupts() {
    let (cap, ecap) = (1_u64 << 56 | 0b11 << 34 | 47 << 16 | 0b01110 << 8 | 6, 1_u64 << 49 | 1 << 47 | 1 << 43 | 1 << 40 | 19 << 35);
    let registers = json!({"VER": "0x60", "CAP": format!("{cap:#x}"), "ECAP": format!("{ecap:#x}"), "GSTS": "0x80000000", "RTADDR": "0x80001400"});
    let unit = json!({"unit": {"kind": "intel-vtd", "registers": registers}});
    // PASID 7 is for requests without one; 9 has the same table.
    let (table, leaf) = (0x27, 0x67);
    let entry = [1 | 1 << 6, 1, 0x8000_5000];
    let guest = Guest::new(&unit, 0x10).words(0x8000_1000, &[0x8000_2000 | 1]).words(0x8000_2000 + 0x10 * 32, &[0x8000_3000 | 1 | 1 << 3, 7]);
    let guest = guest.words(0x8000_3000, &[0x8000_4000 | 1]).words(0x8000_4000 + 7 * 64, &entry).words(0x8000_4000 + 9 * 64, &entry);
    let guest = guest.words(0x8000_5000, &[0x8000_6000 | table]).words(0x8000_6000 + 3 * 8, &[0x8000_7000 | table]);
    let guest = guest.words(0x8000_7000 + 0x1f7 * 8, &[0x8000_8000 | table]);
    let saved = guest.words(0x8000_8000 + 8, &[0x8010_0000 | leaf]).words(0x8000_8000 + 0x100 * 8, &[0x8010_3000 | leaf]).save("interrupts-pasid");
    let path = saved.to_str().unwrap();
    let (page, behind) = (mapping(0xfee0_1000, 0x8010_0000, 0x1000, "rw"), mapping(0xfef0_0000, 0x8010_3000, 0x1000, "rw"));
    let check = |path: &str| {
        let streams = run(&["inspect", path, "--format", "json"]).good().json()["streams"].clone();
        assert_eq!((&streams[0]["pasid"], &streams[0]["mappings"]), (&json!(null), &json!([behind])), "{path}");
        assert_eq!((&streams[1]["pasid"], &streams[1]["mappings"]), (&json!(9), &json!([page, behind])), "{path}");
    };
    check(path);
    for to in ["amd-vi/v2", "intel-vtd/first-stage", "arm-smmuv3/stage1"] {
        let out = saved.with_file_name(to.replace('/', "-"));
        let out = out.to_str().unwrap();
        assert_eq!(run(&["convert", path, "--to", to, "--out", out, "--strict"]).good().status, 0);
        check(out);
        assert_eq!(run(&["diff", path, out]).good().status, 0);
    }
}

#[test]
fn where_x86_units_have_interrupts_a_table_for_them_maps_nothing() {
    // Pages before, among and behind those addresses, in a table that is free to have them.
    let (sv39, leaf) = (8 << 60 | 0x8000_4000_u64 >> 12, 0xdf);
    let entry = |address: u64, flags: u64| address >> 12 << 10 | flags;
    let guest = riscv([1, 0, 0, sv39, 0, 0, 0, 0], true).words(0x8000_4000 + 3 * 8, &[entry(0x8000_7000, 1)]);
    let guest = guest.words(0x8000_7000 + 0x1f6 * 8, &[entry(0x8000_8000, 1), entry(0x8000_9000, 1)]);
    let guest = guest.words(0x8000_8000 + 0x1ff * 8, &[entry(0x8020_0000, leaf)]).words(0x8000_9000, &[entry(0x8020_1000, leaf); 0x100]);
    let saved = guest.words(0x8000_9000 + 0x100 * 8, &[entry(0x8030_1000, leaf)]).save("interrupts-target");
    let (path, out) = (saved.to_str().unwrap(), saved.with_file_name("out"));
    let out = out.to_str().unwrap();
    for to in ["intel-vtd/first-stage", "intel-vtd/second-stage", "amd-vi/v1", "amd-vi/v2"] {
        let refused = run(&["convert", path, "--to", to, "--out", out, "--force", "--strict"]);
        assert_eq!(refused.status, 1, "{to}");
        assert!(refused.stderr.contains("1 MiB of what is mapped"), "{}", refused.stderr);
        let report = run(&["convert", path, "--to", to, "--out", out, "--force", "--format", "json"]).good().json();
        let losses: Vec<&Value> = report["tables"][0]["losses"].as_array().unwrap().iter().filter(|loss| loss["refused"] == true).collect();
        assert_eq!((losses.len(), &losses[0]["loss"], &losses[0]["bytes"]), (1, &json!("input-range"), &json!(0x10_0000)), "{to}");
        assert_eq!(losses[0]["examples"][0]["iova"], "0xfee00000", "{to}");
        let mappings = stream(out)["mappings"].clone();
        let last = mappings.as_array().unwrap().iter().rev().take(2).cloned().collect::<Vec<_>>();
        assert_eq!(last, [mapping(0xfef0_0000, 0x8030_1000, 0x1000, "rw"), mapping(0xfedf_f000, 0x8020_0000, 0x1000, "rw")], "{to}");
    }
    assert_eq!(run(&["convert", path, "--to", "loongarch/paging", "--out", out, "--force", "--strict"]).good().status, 0);
}

#[test]
fn a_part_of_a_page_is_all_that_a_device_reaches() {
    // Units of 4 bytes: 0x010..=0xffe of the first page, all of the second.
    let leaf = |first: u64, last: u64, address: u64| first << 52 | last << 40 | address >> 4 | 1;
    let table = json!({"tables": [{"id": 3, "format": "apple-dart/dart2", "root": "0x80004000", "settings": {}}]});
    let guest = Guest::new(&table, 3).table(0x8000_4000, &[0x8000_8000 >> 4 | 1]);
    let saved = guest.table(0x8000_8000, &[leaf(0x10, 0xffe, 0x8010_0000), leaf(0, 0xfff, 0x8020_0000)]).save("parts");
    let path = saved.to_str().unwrap();
    let expected = [mapping(0x40, 0x8010_0040, 0x3fbc, "rw"), mapping(0x4000, 0x8020_0000, 0x4000, "rw")];
    assert_eq!(stream(path)["mappings"], json!(expected));
    let fault = translate(path, "0x3f", "r")["fault"].clone();
    assert_eq!((&fault["kind"], &fault["stage"]), (&json!("permission"), &json!(1)));
    assert_eq!(
        [translate(path, "0x3ffc", "r")["fault"]["kind"].clone(), translate(path, "0x3ffb", "r")["succeeds"].clone()],
        [json!("permission"), json!(true)]
    );
    let out = saved.with_file_name("out");
    let report = convert(path, "intel-vtd/second-stage", out.to_str().unwrap());
    let loss = &report["tables"][0]["losses"][0];
    // Of the first page 0x1000..=0x2fff is whole in pages of 4 KiB.
    assert_eq!((&loss["loss"], &loss["bytes"]), (&json!("granule"), &json!(0xfc0 + 0xffc)));
    let expected = [mapping(0x1000, 0x8010_1000, 0x2000, "rw"), mapping(0x4000, 0x8020_0000, 0x4000, "rw")];
    assert_eq!(stream(out.to_str().unwrap())["mappings"], json!(expected));
}

#[test]
fn supersections_reach_beyond_32_bits() {
    let table = |bits: u64| json!({"tables": [{"id": 3, "format": "arm-v7s/short", "root": "0x80004000", "settings": {"output-bits": bits}}]});
    let save = |bits: u64, test: &str| {
        // A section, a table entry whose address has bit 18, and a supersection at 0x5_00000000.
        let mut words = vec![0x8010_1c0e_u32, 0x8004_0001];
        words.resize(16, 0);
        words.extend([0x0054_1c0e_u32; 16]);
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        Guest::new(&table(bits), 3).table(0x8000_4000, &[]).write(0x8000_4000, &bytes).write(0x8004_0000, &0x8030_0c7e_u32.to_le_bytes()).save(test)
    };
    let saved = save(40, "supersections");
    let path = saved.to_str().unwrap();
    let expected = [
        mapping(0, 0x8010_0000, 0x10_0000, "rw"),
        mapping(0x10_0000, 0x8030_0000, 0x1000, "rw"),
        mapping(0x100_0000, 0x5_0000_0000, 0x100_0000, "rw"),
    ];
    assert_eq!(stream(path)["mappings"], json!(expected));
    let short = save(32, "supersections-32");
    assert_eq!(translate(short.to_str().unwrap(), "0x1000000", "r")["fault"]["kind"], "address-size");
    // There and back: as a target it makes supersections of what lies above 32 bits, and its tables below.
    let (vtd, back) = (saved.with_file_name("vtd"), saved.with_file_name("back"));
    convert(path, "intel-vtd/first-stage", vtd.to_str().unwrap());
    let (vtd, back) = (vtd.to_str().unwrap(), back.to_str().unwrap());
    let report = run(&["convert", vtd, "--to", "arm-v7s/short", "--set", "output-bits=40", "--out", back, "--format", "json"]).good().json();
    assert_eq!(report["tables"][0]["losses"], json!([]));
    assert!(hex(&report["tables"][0]["root"]) >> 32 == 0);
    assert_eq!(stream(back)["mappings"], json!(expected));
}

#[test]
fn what_nobody_set_up_is_no_violation_before_and_after_conversion() {
    let validate = |path: &str| run(&["validate", path, "--format", "json"]);
    // A device context that is not valid, and one with a reserved bit.
    let (unused, refused) = (riscv([0; 8], true).save("unused"), riscv([1, 0, 1, 0, 0, 0, 0, 0], true).save("refused"));
    for (saved, violations) in [(unused, 0), (refused, 1)] {
        let path = saved.to_str().unwrap();
        assert_eq!(stream(path)["state"], "blocked");
        let found = validate(path);
        assert_eq!((found.status, &found.json()["errors"]), (violations, &json!(violations)));
        let out = saved.with_file_name("out");
        convert(path, "intel-vtd/first-stage", out.to_str().unwrap());
        let stored: Value = serde_json::from_slice(&fs::read(out.join("snapshot.json")).unwrap()).unwrap();
        assert_eq!(stored["tables"][0]["unused"], if violations == 0 { json!(true) } else { json!(null) });
        assert_eq!(validate(out.to_str().unwrap()).status, violations);
    }
}

#[test]
fn a_table_of_the_high_range_alone_has_no_root_beside_its_settings() {
    // VMSAv8-64 for 39 bits: level 1, then blocks of 2 MiB at level 2, accessed and for all.
    let settings = json!({"low-disabled": 1, "input-bits-high": 39, "root-high": "0x80004000"});
    let table = json!({"tables": [{"id": 3, "format": "arm-smmuv3/stage1", "settings": settings}]});
    let guest = Guest::new(&table, 3).words(0x8000_4000, &[0x8000_5003]).words(0x8000_5000, &[0x8020_0741, 0x8060_0741]);
    let saved = guest.save("high-range");
    let path = saved.to_str().unwrap();
    let high = 0xffff_ff80_0000_0000;
    let expected = json!([mapping(high, 0x8020_0000, 0x20_0000, "rw"), mapping(high + 0x20_0000, 0x8060_0000, 0x20_0000, "rw")]);
    let found = stream(path);
    assert_eq!((&found["mappings"], &found["tables"][0]["root"]), (&expected, &json!(null)));

    // What is written is what is read: here and through another format, and a snapshot whose root nobody wrote is refused no more.
    let (out, other) = (saved.with_file_name("out"), saved.with_file_name("other"));
    let (out, other) = (out.to_str().unwrap(), other.to_str().unwrap());
    let to_high = ["--set", "low-disabled=1", "--set", "input-bits-high=39", "--format", "json"];
    let convert_high =
        |from: &str, out: &str| run(&[&["convert", from, "--to", "arm-smmuv3/stage1", "--out", out][..], &to_high].concat()).good().json();
    convert(path, "intel-vtd/first-stage", other);
    for (from, name) in [(path, "same"), (other, "through")] {
        let out = format!("{out}-{name}");
        let report = convert_high(from, &out);
        assert_eq!((&report["tables"][0]["root"], &report["tables"][0]["losses"]), (&json!(null), &json!([])));
        let stored: Value = serde_json::from_slice(&fs::read(format!("{out}/snapshot.json")).unwrap()).unwrap();
        let table = &stored["tables"][0];
        assert_eq!((table.get("root"), table["settings"]["root-high"].is_string()), (None, true));
        assert_eq!(stream(&out)["mappings"], expected);
        run(&["diff", path, &out]).good();
        run(&["validate", &out]).good();
    }

    // The low half of a real guest does not fit: all of it is refused, and what is left can still be read.
    let report = convert_high("arm64-s1-4k", out);
    let all_refused = |table: &Value| {
        let refused = table["losses"].as_array().unwrap().iter().any(|loss| loss["loss"] == "input-range");
        refused == (table["leaves"]["source"] != 0) && table["leaves"]["target"] == 0
    };
    assert!(report["tables"].as_array().unwrap().iter().all(all_refused), "{report:#}");
    assert!(
        run(&["inspect", out, "--format", "json"]).good().json()["streams"].as_array().unwrap().iter().all(|stream| stream["mappings"] == json!([]))
    );

    let table = json!({"tables": [{"id": 3, "format": "arm-smmuv3/stage1", "settings": {"input-bits-high": 39}}]});
    let found = run(&["inspect", Guest::new(&table, 3).save("no-root").to_str().unwrap()]);
    assert!(found.stderr.ends_with("tables: device 0x3 has a format and no root, neither beside its settings nor among them\n"), "{}", found.stderr);
}

/// 2^64 bytes are one more than 64 bits say.
#[test]
fn all_of_an_address_space_has_a_size() {
    let all = json!(2_f64.powi(64));
    // A guest that asked for one mapping of everything.
    let domain = json!({"id": 1, "endpoints": [3], "mappings": [{"first": 0, "last": "0xffffffffffffffff", "address": 0, "access": "rw"}]});
    let unit = json!({
        "unit": {"kind": "virtio-iommu", "registers": {}},
        "domains": [domain],
        "memory": [{"kind": "ram", "first": "0x0", "last": "0xffffffffffffffff"}],
    });
    let saved = Guest::new(&unit, 3).save("all");
    let path = saved.to_str().unwrap();
    let found = stream(path);
    assert_eq!((&found["mappings"][0]["size"], &found["mappings"][0]["iova"]), (&all, &json!("0x0")), "{found}");
    let human = run(&["inspect", path]).good().stdout;
    assert!(human.contains(" 1 x 16 EiB"), "{human}");
    let none = Guest::new(&json!({"tables": [{"id": 3, "state": "blocked"}]}), 3).save("none");
    let diff = run(&["diff", path, none.to_str().unwrap(), "--format", "json"]);
    let difference = &diff.json()["differences"][0];
    assert_eq!((&difference["removed"]["bytes"], &difference["ranges"][0]["size"]), (&all, &all));

    // A device that may only read, without a table: 48882 section 2.2.2.1, Mode 0 with IR alone.
    let registers = json!({"DEVTAB_BASE": "0x80001000", "CONTROL": "0x1", "EXT_FEATURES": "0x0"});
    let saved = Guest::new(&json!({"unit": {"kind": "amd-vi", "registers": registers}}), 1).words(0x8000_1020, &[3 | 1 << 61]).save("window");
    let report = convert(saved.to_str().unwrap(), "amd-vi/v1", saved.with_file_name("out").to_str().unwrap());
    assert_eq!(report["tables"][0]["windows"][0]["size"], all);
}
