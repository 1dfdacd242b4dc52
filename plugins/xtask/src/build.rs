//! Building a plugin crate straight into a component, with the linker that comes with the toolchain.

use crate::PluginCrate;
use anyhow::{Context as _, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "wasm32-unknown-unknown";
const RUSTFLAGS: &str = "CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_RUSTFLAGS";

/// 64 KiB of shadow stack instead of 1 MiB: an instance then fits a few pages.
const STACK_BYTES: u32 = 64 << 10;
/// The most memory that a plugin of ours says it wants; the host refuses a memory without a maximum.
const MEMORY_BYTES: u32 = 4 << 20;

const MANIFEST_SECTION: &str = "stagecraft:manifest";

/// Where the toolchain keeps what is needed.
#[derive(Debug)]
pub struct Toolchain {
    component_linker: PathBuf,
    wasm_linker: PathBuf,
    sysroot: PathBuf,
    target_folder: PathBuf,
}

impl Toolchain {
    /// Looks for the linkers that come with `rustc`.
    pub fn find(root: &Path) -> Result<Self> {
        let sysroot = PathBuf::from(rustc(&["--print", "sysroot"])?.trim());
        let version = rustc(&["-vV"])?;
        let host = version.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc does not say its host")?;
        let tools = sysroot.join("lib/rustlib").join(host).join("bin");
        let component_linker = tools.join("wasm-component-ld");
        if !component_linker.is_file() {
            bail!("no wasm-component-ld in {}; it comes with rustup's toolchain", tools.display());
        }
        let wasm_linker = [tools.join("gcc-ld/wasm-ld"), PathBuf::from("wasm-ld")].into_iter().find(|path| path.is_file());
        let target_folder = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target/plugins"), PathBuf::from);
        Ok(Self { component_linker, wasm_linker: wasm_linker.unwrap_or_else(|| "wasm-ld".into()), sysroot, target_folder })
    }

    /// Builds one plugin and reads the component.
    pub fn build(&self, root: &Path, plugin: &PluginCrate) -> Result<Vec<u8>> {
        let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .current_dir(root)
            .args(["build", "--quiet", "--locked", "--profile", "plugin", "--target", TARGET, "--package", plugin.package])
            .arg("--target-dir")
            .arg(&self.target_folder)
            .env(RUSTFLAGS, self.rust_flags(root))
            // Flags for the host's code would take the place of the target's.
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .status()
            .context("running cargo")?;
        if !status.success() {
            bail!("cargo failed; if the target is missing: rustup target add {TARGET}");
        }
        let file = self.target_folder.join(TARGET).join("plugin").join(format!("{}.wasm", plugin.package.replace('-', "_")));
        let component = std::fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
        if !component.windows(MANIFEST_SECTION.len()).any(|bytes| bytes == MANIFEST_SECTION.as_bytes()) {
            bail!("the linker dropped the custom section {MANIFEST_SECTION}");
        }
        Ok(component)
    }

    /// The caller's flags for the target, and ours.
    fn rust_flags(&self, root: &Path) -> String {
        let mut flags: Vec<String> = std::env::var(RUSTFLAGS).ok().into_iter().filter(|flags| !flags.is_empty()).collect();
        flags.push(format!("-Clinker={}", self.component_linker.display()));
        flags.push("-Clinker-flavor=wasm-ld".to_owned());
        flags.push(format!("-Clink-arg=--wasm-ld-path={}", self.wasm_linker.display()));
        flags.push(format!("-Clink-arg=-zstack-size={STACK_BYTES}"));
        flags.push(format!("-Clink-arg=--max-memory={MEMORY_BYTES}"));
        // Panic messages name files; without this they name the builder's folders, and the result depends on where it was built.
        let mut remap = vec![(root.to_owned(), "."), (self.sysroot.clone(), "rust")];
        remap.extend(registry_folders().into_iter().map(|folder| (folder, "crates")));
        flags.extend(remap.iter().map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display())));
        flags.join(" ")
    }
}

/// Where cargo unpacks the sources of dependencies.
fn registry_folders() -> Vec<PathBuf> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from).or_else(|| Some(std::env::home_dir()?.join(".cargo")));
    let entries = home.and_then(|home| std::fs::read_dir(home.join("registry/src")).ok());
    entries.into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())).collect()
}

fn rustc(arguments: &[&str]) -> Result<String> {
    let output = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into())).args(arguments).output().context("running rustc")?;
    if !output.status.success() {
        bail!("rustc {} failed", arguments.join(" "));
    }
    Ok(String::from_utf8(output.stdout)?)
}
