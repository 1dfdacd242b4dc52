//! Takes pieces out of the code, one at a time, and sees whether a test fails: `tests/mutations.txt`.
//!
//! All of it happens in a copy of the repository below `target`.

use anyhow::{Context as _, Result, bail, ensure};
use std::path::Path;
use std::process::{Command, Stdio};

/// One change of the code.
#[derive(Debug, Default)]
struct Mutation {
    name: String,
    file: String,
    from: String,
    to: String,
    tests: Vec<String>,
}

/// What became of one.
enum Verdict {
    /// A test failed.
    Found,
    /// None did.
    Survived,
    /// It does not compile.
    NotCompiled,
}

pub fn run(root: &Path, wanted: Option<&str>) -> Result<()> {
    let list = std::fs::read_to_string(root.join("tests/mutations.txt")).context("tests/mutations.txt")?;
    let all = parse(&list)?;
    let chosen: Vec<&Mutation> = all.iter().filter(|mutation| wanted.is_none_or(|wanted| mutation.name.contains(wanted))).collect();
    ensure!(!chosen.is_empty(), "no mutation has `{}` in its name", wanted.unwrap_or_default());
    let copy = root.join("target/mutations");
    copy_to(root, &copy)?;
    let mut bad = 0;
    for mutation in chosen {
        let verdict = judge(root, &copy, mutation)?;
        let word = match verdict {
            Verdict::Found => "found",
            Verdict::Survived => "SURVIVED",
            Verdict::NotCompiled => "DOES NOT COMPILE",
        };
        bad += u32::from(!matches!(verdict, Verdict::Found));
        println!("{word:<17} {}", mutation.name);
    }
    ensure!(bad == 0, "{bad} mutations were not found");
    Ok(())
}

fn parse(list: &str) -> Result<Vec<Mutation>> {
    let mut all: Vec<Mutation> = Vec::new();
    for line in list.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        match (line.split_once(' '), all.last_mut()) {
            (Some(("@", file)), Some(last)) => file.clone_into(&mut last.file),
            (Some(("-", from)), Some(last)) => from.clone_into(&mut last.from),
            (Some(("+", to)), Some(last)) => to.clone_into(&mut last.to),
            (Some(("=", tests)), Some(last)) => last.tests = tests.split(' ').map(str::to_owned).collect(),
            _ => all.push(Mutation { name: line.to_owned(), ..Mutation::default() }),
        }
    }
    let whole =
        |mutation: &Mutation| ![&mutation.file, &mutation.from, &mutation.to].iter().any(|part| part.is_empty()) && !mutation.tests.is_empty();
    if let Some(part) = all.iter().find(|mutation| !whole(mutation)) {
        bail!("`{}` lacks a line", part.name);
    }
    Ok(all)
}

/// Copies what is under version control, where it differs, so that what was built is not built again.
fn copy_to(root: &Path, copy: &Path) -> Result<()> {
    let listed = Command::new("git").args(["ls-files", "-z"]).current_dir(root).output().context("git")?;
    ensure!(listed.status.success(), "git ls-files failed");
    for name in String::from_utf8(listed.stdout)?.split('\0').filter(|name| !name.is_empty()) {
        let (from, to) = (root.join(name), copy.join(name));
        let Ok(bytes) = std::fs::read(&from) else { continue };
        if std::fs::read(&to).is_ok_and(|there| there == bytes) {
            continue;
        }
        std::fs::create_dir_all(to.parent().context("no folder")?)?;
        std::fs::write(&to, bytes).with_context(|| to.display().to_string())?;
    }
    Ok(())
}

fn judge(root: &Path, copy: &Path, mutation: &Mutation) -> Result<Verdict> {
    let original = std::fs::read_to_string(root.join(&mutation.file)).with_context(|| mutation.file.clone())?;
    let times = original.matches(&mutation.from).count();
    ensure!(times == 1, "`{}`: `{}` stands {times} times in {}", mutation.name, mutation.from, mutation.file);
    let file = copy.join(&mutation.file);
    std::fs::write(&file, original.replace(&mutation.from, &mutation.to))?;
    let cargo = |more: &[&str]| -> Result<bool> {
        let mut command = Command::new("cargo");
        command.args(["test", "--quiet", "--package", "stagecraft-tests"]).current_dir(copy);
        for test in &mutation.tests {
            command.args(["--test", test]);
        }
        let status = command.args(more).stdout(Stdio::null()).stderr(Stdio::null()).status().context("cargo")?;
        Ok(status.success())
    };
    let verdict = if !cargo(&["--no-run"])? {
        Verdict::NotCompiled
    } else if cargo(&[])? {
        Verdict::Survived
    } else {
        Verdict::Found
    };
    std::fs::write(&file, original)?;
    Ok(verdict)
}
