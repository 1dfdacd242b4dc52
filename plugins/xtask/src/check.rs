//! `cargo xtask test`: everything that must hold before a change goes in, and nothing skipped silently.

use anyhow::{Context as _, Result, bail};
use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

/// A step, and the cargo command that it is.
struct Step {
    name: &'static str,
    arguments: &'static [&'static str],
    environment: &'static [(&'static str, &'static str)],
    /// The cargo subcommand that a minimal toolchain may lack.
    component: Option<&'static str>,
}

const STEPS: [Step; 5] = [
    Step { name: "formatting", arguments: &["fmt", "--all", "--check"], environment: &[], component: Some("fmt") },
    Step {
        name: "lints",
        arguments: &["clippy", "--quiet", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"],
        environment: &[],
        component: Some("clippy"),
    },
    Step {
        name: "the library without its default features",
        arguments: &["clippy", "--quiet", "--locked", "--package", "stagecraft", "--lib", "--no-default-features", "--", "-D", "warnings"],
        environment: &[],
        component: Some("clippy"),
    },
    Step {
        name: "documentation",
        arguments: &["doc", "--quiet", "--locked", "--workspace", "--no-deps"],
        environment: &[("RUSTDOCFLAGS", "-D warnings")],
        component: None,
    },
    Step { name: "tests", arguments: &["test", "--locked", "--workspace"], environment: &[], component: None },
];

/// What may not be missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strict {
    /// Anything may: it is named at the end.
    Nothing,
    /// What a machine can be made to have: components of the toolchain, QEMU. The larger snapshots are no part of the repository, and are named if they are missing.
    Tools,
    /// Nothing may.
    Everything,
}

/// Runs all steps and says at the end what ran and what did not.
pub fn run(root: &Path, strict: Strict) -> Result<()> {
    let mut summary = Vec::new();
    let left_out = root.join("target/skipped.txt");
    std::fs::create_dir_all(root.join("target")).context("target")?;
    std::fs::write(&left_out, "").with_context(|| left_out.display().to_string())?;
    println!("== built plugins");
    crate::check_plugins(root)?;
    summary.push("passed   built plugins".to_owned());
    for step in &STEPS {
        println!("== {}", step.name);
        if let Some(component) = step.component.filter(|component| !has(component)) {
            if strict != Strict::Nothing {
                bail!("cargo {component} is missing: rustup component add rustfmt clippy");
            }
            summary.push(format!("SKIPPED  {}: cargo {component} is not installed (rustup component add rustfmt clippy)", step.name));
            continue;
        }
        let start = Instant::now();
        let environment = step.environment.iter().copied();
        let status = cargo(root).args(step.arguments).envs(environment).env("STAGECRAFT_SKIPPED", &left_out).status().context("running cargo")?;
        if !status.success() {
            bail!("{} failed: cargo {}", step.name, step.arguments.join(" "));
        }
        summary.push(format!("passed   {} ({} s)", step.name, start.elapsed().as_secs()));
    }
    let fixtures = root.join("../shared/fixtures").is_dir();
    summary.push(if fixtures {
        "ran      with all snapshots of real guests".to_owned()
    } else {
        "SKIPPED  the larger snapshots of real guests: they are not beside the repository; the small ones in tests/fixtures ran".to_owned()
    });
    let qemu = usable_qemu();
    summary.push(match &qemu {
        Ok(()) => "ran      with QEMU's IOMMU models".to_owned(),
        Err(reason) => format!("SKIPPED  tables judged by QEMU's IOMMU models: {reason} (tests/models/install-qemu installs it on Debian)"),
    });
    summary.extend(left_out_by_tests(&std::fs::read_to_string(&left_out).with_context(|| left_out.display().to_string())?));
    println!("== what ran");
    for line in &summary {
        println!("{line}");
    }
    match strict {
        Strict::Everything if !fixtures => bail!("--strict: the larger snapshots of real guests are not beside the repository"),
        Strict::Nothing => Ok(()),
        Strict::Everything | Strict::Tools => match qemu {
            Ok(()) => Ok(()),
            Err(reason) => bail!("QEMU's IOMMU models cannot be asked: {reason}; tests/models/install-qemu installs them on Debian"),
        },
    }
}

/// What tests said that they left out, each once.
fn left_out_by_tests(lines: &str) -> Vec<String> {
    match lines.lines().collect::<BTreeSet<&str>>() {
        none if none.is_empty() => vec!["ran      with userfaultfd, and with all that this processor has".to_owned()],
        some => some.into_iter().map(|what| format!("SKIPPED  {what}")).collect(),
    }
}

/// Cargo, as this task was started by.
pub fn cargo(root: &Path) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root);
    command
}

/// Why the tests in `tests/models` cannot ask QEMU, if they cannot: they skip themselves for the same reasons.
fn usable_qemu() -> Result<(), String> {
    for machine in ["x86_64", "aarch64", "riscv64"] {
        let program = format!("qemu-system-{machine}");
        let output = Command::new(&program).arg("--version").output().map_err(|_| format!("{program} is not installed"))?;
        let version = String::from_utf8_lossy(&output.stdout);
        let number = version.strip_prefix("QEMU emulator version ").and_then(|rest| rest.split('.').next()?.parse::<u32>().ok());
        match number {
            None => return Err(format!("{program} does not say its version")),
            Some(number) if number < 10 => return Err(format!("{program} is version {number}, and 10 is needed")),
            Some(_) => {}
        }
    }
    Ok(())
}

fn has(subcommand: &str) -> bool {
    let program = format!("cargo-{subcommand}");
    Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}
