//! What is checked before a component is compiled: everything that a compiler should not be bothered with.
//!
//! This reads section headers, names, memories and tables; function bodies are left to Wasmtime, which validates them. It never recurses.

use wasmparser::{Encoding, Parser, Payload};

use crate::plugin::{CONTRACT, Limits, LoadError, Manifest};

/// What a plugin may import.
pub(super) const IMPORTS: [&str; 4] =
    ["stagecraft:format/types@0.1.0", "stagecraft:format/guest-memory@0.1.0", "stagecraft:format/log@0.1.0", "stagecraft:format/notes@0.1.0"];
/// What a plugin must export, and nothing else.
pub(super) const EXPORTS: [&str; 3] = ["stagecraft:format/detect@0.1.0", "stagecraft:format/table@0.1.0", "stagecraft:format/queue@0.1.0"];

const MANIFEST_SECTION: &str = "stagecraft:manifest";
const PACKAGE: &str = "stagecraft:format/";

const MAX_DEPTH: usize = 4;
/// Core modules, nested components, instances, tables, memories, functions: several times what `wasm-component-ld` makes.
const MAX_MODULES: u64 = 8;
const MAX_COMPONENTS: u64 = 8;
const MAX_INSTANCES: u64 = 32;
const MAX_TABLES: u64 = 8;
const MAX_TABLE_ENTRIES: u64 = 10_000;
const MAX_FUNCTIONS: u64 = 20_000;

/// Core instances that one component may make; the pool is sized for it.
pub(super) const MAX_CORE_INSTANCES: u32 = MAX_INSTANCES as u32;
/// Tables that one component may have.
pub(super) const MAX_CORE_TABLES: u32 = MAX_TABLES as u32;
/// Entries of one table.
pub(super) const MAX_CORE_TABLE_ENTRIES: usize = MAX_TABLE_ENTRIES as usize;

/// Refuses what is not a plugin, and reads the manifest of what is.
///
/// # Errors
/// Any [`LoadError`] up to and including [`LoadError::TooMany`].
pub fn admit(component: &[u8], limits: &Limits) -> Result<Manifest, LoadError> {
    if component.len() > limits.component_bytes {
        return Err(LoadError::TooLarge { bytes: component.len() as u64, limit: limits.component_bytes as u64 });
    }
    check_magic(component)?;
    let mut inspection = Inspection::new(limits);
    let mut nesting: Vec<Encoding> = Vec::new();
    for payload in Parser::new(0).parse_all(component) {
        inspection.payload(&payload.map_err(malformed)?, &mut nesting)?;
    }
    inspection.finish()
}

fn malformed(error: wasmparser::BinaryReaderError) -> LoadError {
    LoadError::Malformed { reason: error.to_string() }
}

fn check_magic(component: &[u8]) -> Result<(), LoadError> {
    let what = match component {
        [0, b'a', b's', b'm', 1, 0, 0, 0, ..] => "a core module",
        [0, b'a', b's', b'm', _, _, 1, 0, ..] => return Ok(()),
        [0, b'a', b's', b'm', ..] => "WebAssembly of an unknown version",
        [0x7f, b'E', b'L', b'F', ..] => "a native or precompiled file",
        [] => "empty",
        _ => "something else",
    };
    Err(LoadError::NotAComponent { what })
}

struct Inspection<'a> {
    limits: &'a Limits,
    exports: Vec<String>,
    manifest: Option<Manifest>,
    modules: u64,
    components: u64,
    instances: u64,
    tables: u64,
    memories: u64,
    functions: u64,
}

impl<'a> Inspection<'a> {
    fn new(limits: &'a Limits) -> Self {
        Self { limits, exports: Vec::new(), manifest: None, modules: 0, components: 0, instances: 0, tables: 0, memories: 0, functions: 0 }
    }

    fn payload(&mut self, payload: &Payload<'_>, nesting: &mut Vec<Encoding>) -> Result<(), LoadError> {
        match payload {
            Payload::Version { encoding, .. } => {
                let count = if *encoding == Encoding::Module { &mut self.modules } else { &mut self.components };
                *count += 1;
                nesting.push(*encoding);
                at_most("levels of nesting", nesting.len() as u64, MAX_DEPTH as u64)?;
                at_most("core modules", self.modules, MAX_MODULES)?;
                at_most("components", self.components, MAX_COMPONENTS)
            }
            Payload::End(_) => {
                nesting.pop();
                Ok(())
            }
            Payload::ComponentImportSection(imports) if nesting.len() == 1 => {
                imports.clone().into_iter().try_for_each(|import| check_import(import.map_err(malformed)?.name.name))
            }
            Payload::ComponentExportSection(exports) if nesting.len() == 1 => {
                exports.clone().into_iter().try_for_each(|export| self.export(export.map_err(malformed)?.name.name))
            }
            Payload::InstanceSection(instances) => self.instances(instances.count()),
            Payload::ComponentInstanceSection(instances) => self.instances(instances.count()),
            Payload::ComponentStartSection { .. } => Err(LoadError::Malformed { reason: "a component start function".to_owned() }),
            Payload::FunctionSection(functions) => {
                self.functions += u64::from(functions.count());
                at_most("functions", self.functions, MAX_FUNCTIONS)
            }
            Payload::MemorySection(memories) => memories.clone().into_iter().try_for_each(|memory| self.memory(memory.map_err(malformed)?)),
            Payload::TableSection(tables) => tables.clone().into_iter().try_for_each(|table| self.table(table.map_err(malformed)?.ty)),
            Payload::CustomSection(section) if section.name() == MANIFEST_SECTION => self.manifest(section.data()),
            _ => Ok(()),
        }
    }

    fn export(&mut self, name: &str) -> Result<(), LoadError> {
        check_version(name)?;
        if !EXPORTS.contains(&name) {
            return Err(LoadError::ForeignExport { name: super::error::clean(name) });
        }
        self.exports.push(name.to_owned());
        Ok(())
    }

    fn instances(&mut self, count: u32) -> Result<(), LoadError> {
        self.instances += u64::from(count);
        at_most("instances", self.instances, MAX_INSTANCES)
    }

    fn memory(&mut self, memory: wasmparser::MemoryType) -> Result<(), LoadError> {
        let refuse = |what: String| Err(LoadError::Memory { what, limit: self.limits.memory_bytes });
        self.memories += 1;
        at_most("memories", self.memories, 1)?;
        if memory.memory64 || memory.shared || memory.page_size_log2.is_some() {
            return refuse("is not an ordinary one of 32 bits".to_owned());
        }
        match memory.maximum {
            None => refuse("has no maximum".to_owned()),
            Some(pages) if pages.max(memory.initial) > (self.limits.memory_bytes >> 16) as u64 => {
                refuse(format!("may grow to {} bytes", u128::from(pages.max(memory.initial)) << 16))
            }
            Some(_) => Ok(()),
        }
    }

    fn table(&mut self, table: wasmparser::TableType) -> Result<(), LoadError> {
        self.tables += 1;
        at_most("tables", self.tables, MAX_TABLES)?;
        at_most("entries of one table", table.initial, MAX_TABLE_ENTRIES)
    }

    fn manifest(&mut self, json: &[u8]) -> Result<(), LoadError> {
        if self.manifest.is_some() {
            return Err(LoadError::BadManifest { reason: "there are two".to_owned() });
        }
        self.manifest = Some(Manifest::parse(json)?);
        Ok(())
    }

    fn finish(self) -> Result<Manifest, LoadError> {
        if let Some(name) = EXPORTS.iter().find(|name| !self.exports.iter().any(|export| export == *name)) {
            return Err(LoadError::MissingExport { name: (*name).to_owned() });
        }
        self.manifest.ok_or(LoadError::NoManifest)
    }
}

fn at_most(what: &'static str, count: u64, limit: u64) -> Result<(), LoadError> {
    if count > limit { Err(LoadError::TooMany { what, count, limit }) } else { Ok(()) }
}

/// Refuses an interface of our package in another version than ours.
fn check_version(name: &str) -> Result<(), LoadError> {
    match name.strip_prefix(PACKAGE).and_then(|rest| rest.split_once('@')) {
        Some((_, version)) if version != CONTRACT => Err(LoadError::WrongVersion { found: super::error::clean(version), expected: CONTRACT }),
        _ => Ok(()),
    }
}

fn check_import(name: &str) -> Result<(), LoadError> {
    check_version(name)?;
    if IMPORTS.contains(&name) { Ok(()) } else { Err(LoadError::ForeignImport { name: super::error::clean(name) }) }
}
