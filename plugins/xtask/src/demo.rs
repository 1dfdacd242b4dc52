//! `cargo xtask demo`: the main job on a real guest's tables.

use anyhow::{Context as _, Result, bail};
use std::path::Path;

/// Inspects a snapshot of a real arm64 guest, converts it to x86 tables, inspects those, draws the address space, and guesses the
/// format of a table without registers.
pub fn run(root: &Path) -> Result<()> {
    let source = "tests/fixtures/arm64-s1-4k";
    let (out, picture) = ("target/demo/x86", "target/demo/map.svg");
    std::fs::create_dir_all(root.join("target/demo")).context("creating target/demo")?;
    let steps: [&[&str]; 5] = [
        &["inspect", source],
        &["convert", source, "--to", "intel-vtd/first-stage", "--out", out, "--force"],
        &["inspect", out],
        &["draw", out, "--out", picture, "--force"],
        &["guess", source, "--root", "0x49d92000"],
    ];
    for arguments in steps {
        println!("\n$ stagecraft {}", arguments.join(" "));
        let status = crate::check::cargo(root)
            .args(["run", "--quiet", "--locked", "--package", "stagecraft", "--"])
            .args(arguments)
            .status()
            .context("running cargo")?;
        if !status.success() {
            bail!("stagecraft {} failed", arguments.join(" "));
        }
    }
    println!("\nThe picture: {picture}");
    Ok(())
}
