//! `cargo xtask plugins` builds the plugins that are checked in as `host/builtin/*.wasm`; `cargo xtask check-plugins` refuses stale ones.
//!
//! `cargo xtask test` runs everything that must hold; `cargo xtask demo` shows the main job.
//!
//! A built plugin carries the hash of its sources in a custom section, so that checking needs neither the Wasm target nor a build.

mod build;
mod check;
mod demo;
mod mutations;
mod section;
mod sources;
mod trial;

use anyhow::{Context as _, Result, bail};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// A plugin crate of this workspace.
#[derive(Debug)]
pub struct PluginCrate {
    /// Name of the built file, without `.wasm`.
    pub name: &'static str,
    /// Name of the package.
    pub package: &'static str,
    /// Folder of the crate, from the root of the workspace.
    pub folder: &'static str,
    /// Folder of the built file, from the root of the workspace.
    pub output: &'static str,
}

impl PluginCrate {
    /// The built file, from the root of the workspace.
    #[must_use]
    pub fn file(&self) -> PathBuf {
        Path::new(self.output).join(format!("{}.wasm", self.name))
    }
}

/// Every plugin that is built here.
pub const PLUGINS: [PluginCrate; 9] = [
    PluginCrate { name: "apple-dart", package: "stagecraft-plugin-apple-dart", folder: "plugins/apple-dart", output: "host/builtin" },
    PluginCrate { name: "arm-smmuv3", package: "stagecraft-plugin-arm-smmuv3", folder: "plugins/arm-smmuv3", output: "host/builtin" },
    PluginCrate { name: "arm-v7s", package: "stagecraft-plugin-arm-v7s", folder: "plugins/arm-v7s", output: "host/builtin" },
    PluginCrate { name: "intel-vtd", package: "stagecraft-plugin-intel-vtd", folder: "plugins/intel-vtd", output: "host/builtin" },
    PluginCrate { name: "loongarch", package: "stagecraft-plugin-loongarch", folder: "plugins/loongarch", output: "host/builtin" },
    PluginCrate { name: "riscv-iommu", package: "stagecraft-plugin-riscv-iommu", folder: "plugins/riscv-iommu", output: "host/builtin" },
    PluginCrate { name: "amd-vi", package: "stagecraft-plugin-amd-vi", folder: "plugins/amd-vi", output: "host/builtin" },
    PluginCrate { name: "s390-zpci", package: "stagecraft-plugin-s390-zpci", folder: "plugins/s390-zpci", output: "host/builtin" },
    PluginCrate { name: "hostile", package: "stagecraft-plugin-hostile", folder: "tests/hostile", output: "tests/hostile/built" },
];

/// Name of the custom section with the hash of a plugin's sources.
pub const SOURCE_HASH_SECTION: &str = "stagecraft:source-hash";
/// The hash of everything before it: a built file that somebody changed is not the one that the sources made.
const BUILT_HASH_SECTION: &str = "stagecraft:built-hash";

const USAGE: &str = "usage: cargo xtask plugins [NAME ...]    build the plugins into host/builtin (needs the target wasm32-unknown-unknown)
       cargo xtask check-plugins         refuse built plugins that do not match their sources
       cargo xtask test [--strict]       formatting, lints, documentation, plugins and all tests; says at the end what was skipped. --strict
                                         refuses to skip anything; with CI in the environment, missing tools are refused
       cargo xtask demo                  inspect, convert, draw and guess the snapshot of a real guest
       cargo xtask mutations [TEXT ...]  take pieces out of the code, those whose names have one of TEXT, or with =TEST those that this test is
                                         for: some test must fail each time. Long";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let root = workspace_root()?;
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        Some("plugins") => plugins(&root, &arguments.collect::<Vec<_>>()),
        Some("check-plugins") => check_plugins(&root),
        Some("test") => {
            let strict = match arguments.next().as_deref() {
                Some("--strict") => check::Strict::Everything,
                Some(other) => bail!("no such option `{other}`\n{USAGE}"),
                None if std::env::var_os("CI").is_some() => check::Strict::Tools,
                None => check::Strict::Nothing,
            };
            check::run(&root, strict)
        }
        Some("demo") => demo::run(&root),
        Some("mutations") => mutations::run(&root, &arguments.collect::<Vec<_>>()),
        Some(other) => bail!("no such task `{other}`\n{USAGE}"),
        None => bail!("which task?\n{USAGE}"),
    }
}

fn workspace_root() -> Result<PathBuf> {
    // Cargo says it at run time: target folders are copied from one clone to another.
    let here = std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    Ok(here.ancestors().nth(2).context("the xtask lies in plugins/xtask")?.to_owned())
}

fn plugins(root: &Path, names: &[String]) -> Result<()> {
    if let Some(unknown) = names.iter().find(|name| !PLUGINS.iter().any(|plugin| plugin.name == **name)) {
        bail!("no plugin `{unknown}`; there are {}", PLUGINS.map(|plugin| plugin.name).join(", "));
    }
    let toolchain = build::Toolchain::find(root)?;
    for plugin in PLUGINS.iter().filter(|plugin| names.is_empty() || names.iter().any(|name| name == plugin.name)) {
        let hash = sources::hash(root, plugin.folder)?;
        let mut component = toolchain.build(root, plugin).with_context(|| format!("plugin {}", plugin.name))?;
        section::append(&mut component, SOURCE_HASH_SECTION, hash.as_bytes());
        let built = sources::of_bytes(&component);
        section::append(&mut component, BUILT_HASH_SECTION, built.as_bytes());
        let file = root.join(plugin.file());
        std::fs::create_dir_all(root.join(plugin.output))?;
        std::fs::write(&file, &component).with_context(|| format!("writing {}", file.display()))?;
        println!("{}: {} bytes, sources {}", plugin.file().display(), component.len(), &hash[..12]);
    }
    Ok(())
}

fn check_plugins(root: &Path) -> Result<()> {
    let mut stale = 0;
    for plugin in &PLUGINS {
        if let Err(reason) = check(root, plugin) {
            eprintln!("{}: {reason:#}; rebuild it: cargo xtask plugins {}", plugin.file().display(), plugin.name);
            stale += 1;
        }
    }
    if stale > 0 {
        bail!("{stale} of {} built plugins are not what their sources make", PLUGINS.len());
    }
    println!("{} built plugins match their sources", PLUGINS.len());
    Ok(())
}

fn check(root: &Path, plugin: &PluginCrate) -> Result<()> {
    let component = std::fs::read(root.join(plugin.file())).context("not built yet")?;
    check_component(&component, &sources::hash(root, plugin.folder)?)
}

/// Whether a component was built from sources with the hash `now`, and is as it was built.
fn check_component(component: &[u8], now: &str) -> Result<()> {
    let built = section::find(component, SOURCE_HASH_SECTION).context("has no source hash")?;
    if built != now.as_bytes() {
        bail!("stale: built from {:.12}, the sources are {:.12}", String::from_utf8_lossy(built), now);
    }
    let (before, built) = section::last(component, BUILT_HASH_SECTION).context("does not end with a hash of its bytes")?;
    if built != sources::of_bytes(before).as_bytes() {
        bail!("changed since it was built");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_built_plugin_that_was_changed_is_refused() {
        let mut component = b"\0asm\x0d\0\x01\0".to_vec();
        section::append(&mut component, "code", &[1, 2, 3]);
        section::append(&mut component, SOURCE_HASH_SECTION, b"sources");
        let unsealed = component.clone();
        let built = sources::of_bytes(&component);
        section::append(&mut component, BUILT_HASH_SECTION, built.as_bytes());
        assert!(check_component(&component, "sources").is_ok());
        let refused = |component: &[u8], now: &str| check_component(component, now).err().map(|error| error.to_string());
        assert_eq!(refused(&component, "others").as_deref(), Some("stale: built from sources, the sources are others"));
        assert_eq!(refused(&unsealed, "sources").as_deref(), Some("does not end with a hash of its bytes"));
        for index in 8..component.len() {
            let mut changed = component.clone();
            changed[index] ^= 4;
            assert!(refused(&changed, "sources").is_some(), "byte {index}");
        }
        section::append(&mut component, "more", b"");
        assert_eq!(refused(&component, "sources").as_deref(), Some("does not end with a hash of its bytes"));
    }
}
