//! The hash of everything that a built plugin is made from.

use anyhow::{Context as _, Result};
use sha2::{Digest as _, Sha256};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// What all plugins share: the SDK, the contract, the build profile, and the way this task builds.
const SHARED: [&str; 5] = ["Cargo.toml", "sdk/Cargo.toml", "sdk/src", "wit", "plugins/xtask/src/build.rs"];

/// The crate whose dependencies are those of all plugins.
const SDK: &str = "stagecraft-sdk";

/// Hex SHA-256 of `bytes`.
pub fn of_bytes(bytes: &[u8]) -> String {
    hex(Sha256::digest(bytes).as_slice())
}

fn hex(digest: &[u8]) -> String {
    digest.iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

/// Hex SHA-256 over the sorted paths and contents of the plugin in `folder`, the SDK, the WIT and the workspace's manifest, and over what the lock file says of the
/// SDK's dependencies.
pub fn hash(root: &Path, folder: &str) -> Result<String> {
    let mut files = Vec::new();
    for shared in SHARED {
        collect(root, Path::new(shared), &mut files)?;
    }
    for part in ["Cargo.toml", "manifest.json", "src"] {
        collect(root, &Path::new(folder).join(part), &mut files)?;
    }
    files.sort();
    files.dedup();
    let mut hash = Sha256::new();
    for file in &files {
        let content = std::fs::read(root.join(file)).with_context(|| format!("reading {}", file.display()))?;
        let content = if file == Path::new("Cargo.toml") { relevant(&content) } else { content };
        let path = file.components().map(|part| part.as_os_str().to_string_lossy()).collect::<Vec<_>>().join("/");
        // Lengths in front keep one file's end apart from the next one's start.
        hash.update((path.len() as u64).to_le_bytes());
        hash.update(path.as_bytes());
        hash.update((content.len() as u64).to_le_bytes());
        hash.update(&content);
    }
    let lock = root.join("Cargo.lock");
    if lock.is_file() {
        hash.update(locked(&std::fs::read_to_string(&lock).context("reading Cargo.lock")?, SDK));
    }
    Ok(hex(hash.finalize().as_slice()))
}

/// Names, versions and checksums of all that `package` depends on, by the lock file `lock`.
fn locked(lock: &str, package: &str) -> String {
    let blocks: Vec<Vec<&str>> = lock.split("[[package]]").skip(1).map(|block| block.lines().map(str::trim).collect()).collect();
    let value = |block: &[&str], name: &str| {
        let line = block.iter().find_map(|line| line.strip_prefix(name)?.strip_prefix(" = \""));
        line.and_then(|line| line.strip_suffix('"')).unwrap_or_default().to_owned()
    };
    // A dependency is a name, and a version where there are several.
    let is = |block: &[&str], dependency: &str| {
        let (name, version) = dependency.split_once(' ').unwrap_or((dependency, ""));
        value(block, "name") == name && (version.is_empty() || value(block, "version") == version)
    };
    let mut wanted = vec![package.to_owned()];
    let mut found = std::collections::BTreeSet::new();
    while let Some(dependency) = wanted.pop() {
        let Some(block) = blocks.iter().find(|block| is(block, &dependency)) else { continue };
        let ours = value(block, "source").is_empty();
        let line = ["name", "version", "checksum"].map(|name| value(block, name)).join(" ");
        // The version of our own crates is in the workspace's manifest.
        if (ours || found.insert(line)) && (!ours || dependency == package) {
            let listed = block.iter().skip_while(|line| **line != "dependencies = [").skip(1).take_while(|line| **line != "]");
            wanted.extend(listed.map(|line| line.trim_matches(|c| c == '"' || c == ',').to_owned()));
        }
    }
    found.into_iter().collect::<Vec<_>>().join("\n")
}

/// Of the workspace's manifest only the plugins' profile and the SDK's dependency matter: other changes must not make plugins stale.
fn relevant(manifest: &[u8]) -> Vec<u8> {
    let manifest = String::from_utf8_lossy(manifest);
    let mut section = "";
    let mut kept = String::new();
    for line in manifest.lines() {
        if line.starts_with('[') {
            section = line;
        }
        let profile = section.starts_with("[profile.plugin") || section.starts_with("[profile.release");
        if profile || section == "[workspace.package]" || line.starts_with("wit-bindgen") {
            kept.push_str(line);
            kept.push('\n');
        }
    }
    kept.into_bytes()
}

fn collect(root: &Path, path: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let full = root.join(path);
    if full.is_dir() {
        for entry in std::fs::read_dir(&full).with_context(|| format!("reading {}", path.display()))? {
            collect(root, &path.join(entry?.file_name()), files)?;
        }
    } else if full.is_file() {
        files.push(path.to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_shapes_a_plugin_counts() {
        let before = b"[workspace]\nmembers = []\n[workspace.dependencies]\nserde = \"1\"\nwit-bindgen = \"0.61\"\n[profile.plugin]\nlto = \"fat\"\n";
        let other =
            b"[workspace]\nmembers = [\"a\"]\n[workspace.dependencies]\nserde = \"2\"\nwit-bindgen = \"0.61\"\n[profile.plugin]\nlto = \"fat\"\n";
        let changed = b"[workspace.dependencies]\nwit-bindgen = \"0.62\"\n[profile.plugin]\nlto = \"fat\"\n";
        assert_eq!(relevant(before), relevant(other));
        assert_ne!(relevant(before), relevant(changed));
    }

    #[test]
    fn what_the_sdk_depends_on_counts_and_nothing_else_of_the_lock_file() {
        let package = |name: &str, version: &str, sum: &str, dependencies: &[&str]| {
            let source = if sum.is_empty() { String::new() } else { format!("source = \"registry\"\nchecksum = \"{sum}\"\n") };
            let list: String = dependencies.iter().map(|name| format!(" \"{name}\",\n")).collect();
            format!("[[package]]\nname = \"{name}\"\nversion = \"{version}\"\n{source}dependencies = [\n{list}]\n\n")
        };
        let lock = |parser: &str, other: &str| {
            let sdk = package(SDK, "0.1.0", "", &["wit-bindgen"]) + &package("wit-bindgen", "0.61.0", "aa", &["wit-parser 0.61.0", "wit-bindgen"]);
            let parsers = package("wit-parser", "0.254.2", other, &[]) + &package("wit-parser", "0.61.0", parser, &[]);
            format!("version = 4\n\n{sdk}{parsers}{}", package("host", "0.1.0", "", &["wit-parser 0.254.2", SDK]))
        };
        assert_eq!(locked(&lock("bb", "cc"), SDK), "wit-bindgen 0.61.0 aa\nwit-parser 0.61.0 bb");
        assert_eq!(locked(&lock("bb", "cc"), SDK), locked(&lock("bb", "dd"), SDK));
        assert_ne!(locked(&lock("bb", "cc"), SDK), locked(&lock("ee", "cc"), SDK));
    }

    #[test]
    fn every_part_of_a_plugin_counts() {
        let folder = std::env::temp_dir().join(format!("stagecraft-xtask-{}", std::process::id()));
        let write = |path: &str, text: &str| {
            let file = folder.join(path);
            std::fs::create_dir_all(file.parent().expect("a folder")).expect("a folder");
            std::fs::write(file, text).expect("written");
        };
        write("plugins/one/src/lib.rs", "a");
        write("plugins/one/manifest.json", "{}");
        write("plugins/two/src/lib.rs", "other");
        let first = hash(&folder, "plugins/one").expect("hash");
        write("plugins/two/src/lib.rs", "changed");
        assert_eq!(hash(&folder, "plugins/one").expect("hash"), first, "another plugin does not count");
        for (path, text) in [("plugins/one/src/lib.rs", "b"), ("plugins/one/manifest.json", "{ }"), ("sdk/src/lib.rs", "x"), ("wit/a.wit", "y")] {
            let before = hash(&folder, "plugins/one").expect("hash");
            write(path, text);
            assert_ne!(hash(&folder, "plugins/one").expect("hash"), before, "{path}");
        }
        std::fs::remove_dir_all(&folder).expect("removed");
    }
}
