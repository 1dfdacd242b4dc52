//! What is not a plugin is refused before anything is compiled, and the error says what would be right.

use stagecraft::plugin::{Config, Engine, Limits, LoadError, Plugin, admit};

const HOSTILE: &[u8] = include_bytes!("../hostile/built/hostile.wasm");
const COMPONENT: &[u8] = b"\0asm\x0d\0\x01\0";
const MODULE: &[u8] = b"\0asm\x01\0\0\0";

fn refused(bytes: &[u8]) -> LoadError {
    admit(bytes, &Limits::default()).expect_err("refused")
}

/// The hostile plugin with every `from` replaced by a `to` of the same length.
fn replaced(from: &str, to: &str) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let mut bytes = HOSTILE.to_vec();
    let places: Vec<usize> = (0..bytes.len() - from.len()).filter(|&at| bytes[at..].starts_with(from.as_bytes())).collect();
    assert!(!places.is_empty(), "{from} is not in there");
    places.iter().for_each(|&at| bytes[at..at + to.len()].copy_from_slice(to.as_bytes()));
    bytes
}

/// A section: id, length, content. Lengths below 128 only.
fn section(id: u8, content: &[u8]) -> Vec<u8> {
    [&[id, u8::try_from(content.len()).expect("short")][..], content].concat()
}

/// A component around a core module with one section.
fn around_module(module_section: &[u8]) -> Vec<u8> {
    [COMPONENT, &section(1, &[MODULE, module_section].concat())].concat()
}

#[test]
fn the_built_plugin_is_admitted() {
    let manifest = admit(HOSTILE, &Limits::default()).expect("admitted");
    assert_eq!((&*manifest.name, &*manifest.contract), ("hostile", "stagecraft:format@0.1.0"));
    assert!(manifest.knows_register("EXTRA5") && !manifest.knows_register("EXTRA"));
}

#[test]
fn what_is_no_component_is_named() {
    let what = |bytes: &[u8]| match refused(bytes) {
        LoadError::NotAComponent { what } => what,
        other => panic!("{other:?}"),
    };
    assert_eq!(what(b""), "empty");
    assert_eq!(what(b"hello"), "something else");
    assert_eq!(what(MODULE), "a core module");
    assert_eq!(what(b"\0asm\x0e\0\x02\0"), "WebAssembly of an unknown version");
    assert_eq!(what(b"\x7fELF\x02\x01\x01"), "a native or precompiled file");
    let engine = Engine::new(Config::default()).expect("an engine");
    assert!(matches!(Plugin::load(&engine, MODULE), Err(LoadError::NotAComponent { .. })));
}

#[test]
fn compiled_code_from_outside_is_never_taken() {
    let cache = tempfile::tempdir().expect("a folder");
    let engine = Engine::new(Config::default().with_cache(cache.path())).expect("an engine");
    Plugin::load(&engine, HOSTILE).expect("compiled and kept");
    let entry = std::fs::read_dir(cache.path()).expect("entries").next().expect("one").expect("an entry");
    let kept = std::fs::read(entry.path()).expect("read");
    let start = kept.windows(4).position(|bytes| bytes == b"\x7fELF").expect("Wasmtime's artefacts are ELF files");
    for bytes in [&kept[..], &kept[start..]] {
        assert!(matches!(Plugin::load(&engine, bytes), Err(LoadError::NotAComponent { .. })));
    }
}

#[test]
fn another_version_of_the_contract_says_what_to_rebuild() {
    let wrong = |bytes: &[u8]| match refused(bytes) {
        error @ LoadError::WrongVersion { .. } => error.to_string(),
        other => panic!("{other:?}"),
    };
    let text = wrong(&replaced("stagecraft:format/table@0.1.0", "stagecraft:format/table@0.2.0"));
    assert_eq!(text, "the plugin speaks stagecraft:format@0.2.0 and this host 0.1.0: rebuild the plugin with the stagecraft-sdk of this host");
    wrong(&replaced("stagecraft:format/log@0.1.0", "stagecraft:format/log@0.1.1"));
    wrong(&replaced("\"contract\": \"stagecraft:format@0.1.0\"", "\"contract\": \"stagecraft:format@9.9.9\""));
}

#[test]
fn foreign_imports_are_named() {
    let bytes = replaced("stagecraft:format/log@0.1.0", "wasi:cli/environments@0.2.0");
    match refused(&bytes) {
        LoadError::ForeignImport { name } => assert_eq!(name, "wasi:cli/environments@0.2.0"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn missing_and_foreign_exports_are_named() {
    assert!(matches!(refused(COMPONENT), LoadError::MissingExport { name } if name == "stagecraft:format/detect@0.1.0"));
    let bytes = replaced("stagecraft:format/detect@0.1.0", "stagecraft:format/defect@0.1.0");
    assert!(matches!(refused(&bytes), LoadError::ForeignExport { name } if name == "stagecraft:format/defect@0.1.0"));
}

#[test]
fn a_manifest_is_needed_and_must_make_sense() {
    assert!(matches!(refused(&replaced("stagecraft:manifest", "stagecraft:manisest")), LoadError::NoManifest));
    let reason = |bytes: &[u8]| match refused(bytes) {
        LoadError::BadManifest { reason } => reason,
        other => panic!("{other:?}"),
    };
    assert!(reason(&replaced("\"contract\"", "\"kontract\"")).contains("missing field `contract`"));
    assert!(reason(&replaced("\"name\": \"hostile/radix\"", "\"name\": \"another/radix\"")).contains("must begin with `hostile/`"));
    let second = section(0, b"\x13stagecraft:manifest{}");
    assert!(reason(&[HOSTILE, &second].concat()).contains("there are two"));
}

#[test]
fn memories_are_bounded_before_they_exist() {
    let memory = |content: &[u8]| match refused(&around_module(&section(5, content))) {
        LoadError::Memory { what, limit } => (what, limit),
        other => panic!("{other:?}"),
    };
    assert_eq!(memory(&[1, 0, 1]), ("has no maximum".to_owned(), 16 << 20));
    assert_eq!(memory(&[1, 1, 1, 0x81, 2]).0, format!("may grow to {} bytes", 257 << 16));
    assert_eq!(memory(&[1, 1, 0x81, 2, 1]).0, format!("may grow to {} bytes", 257 << 16), "the initial size counts too");
    assert_eq!(memory(&[1, 5, 1, 2]).0, "is not an ordinary one of 32 bits");
    assert_eq!(memory(&[1, 3, 1, 2]).0, "is not an ordinary one of 32 bits");
    let two = refused(&around_module(&section(5, &[2, 1, 1, 2, 1, 1, 2])));
    assert!(matches!(two, LoadError::TooMany { what: "memories", count: 2, limit: 1 }), "{two:?}");
}

#[test]
fn counts_are_bounded() {
    let module = section(1, MODULE);
    let modules = refused(&[COMPONENT, &module.repeat(9)].concat());
    assert!(matches!(modules, LoadError::TooMany { what: "core modules", count: 9, .. }), "{modules:?}");
    let deep = (0..8).fold(COMPONENT.to_vec(), |inner, _| [COMPONENT, &section(4, &inner)].concat());
    assert!(matches!(refused(&deep), LoadError::TooMany { what: "levels of nesting", .. }));
    let table = refused(&around_module(&section(4, &[1, 0x70, 0, 0x91, 0x4e])));
    assert!(matches!(table, LoadError::TooMany { what: "entries of one table", count: 10_001, .. }), "{table:?}");
    let mut limits = Limits::default();
    limits.component_bytes = 1000;
    assert!(matches!(admit(HOSTILE, &limits), Err(LoadError::TooLarge { limit: 1000, .. })));
}

#[test]
fn types_that_differ_are_found_when_linking() {
    let engine = Engine::new(Config::default()).expect("an engine");
    let error = Plugin::load(&engine, &replaced("[method]format.encode-table", "[method]format.encode-fable")).expect_err("refused");
    assert!(matches!(&error, LoadError::Contract { .. }), "{error:?}");
    assert!(error.to_string().contains("encode-table") && error.to_string().contains("rebuild"), "{error}");
}

#[test]
fn cut_and_broken_files_are_refused_without_a_panic() {
    // What follows the last export is names and hashes, which may be missing.
    let export = b"stagecraft:format/table@0.1.0";
    let last = HOSTILE.windows(export.len()).rposition(|bytes| bytes == export).expect("an export");
    for length in (8..last).step_by(97).chain(last - 100..last) {
        refused(&HOSTILE[..length]);
    }
    for length in last..HOSTILE.len() {
        let _ = admit(&HOSTILE[..length], &Limits::default());
    }
    let engine = Engine::new(Config::default()).expect("an engine");
    assert!(Plugin::load(&engine, &HOSTILE[..HOSTILE.len() / 2]).is_err());
    // Any single bit may flip: a refusal or another plugin, never a panic.
    let mut bytes = HOSTILE.to_vec();
    for at in (0..bytes.len()).step_by(11) {
        bytes[at] ^= 1 << (at % 8);
        let _ = admit(&bytes, &Limits::default());
        bytes[at] ^= 1 << (at % 8);
    }
    for at in (40..bytes.len()).step_by(bytes.len() / 12) {
        bytes[at] ^= 1 << (at % 8);
        let _ = Plugin::load(&engine, &bytes).map(|plugin| plugin.instantiate().map(drop));
        bytes[at] ^= 1 << (at % 8);
    }
}
