//! Takes pieces out of the code, one at a time, and sees whether a test fails: `tests/mutations.txt`.
//!
//! All of it happens in a copy of the repository below `target`. There the tests pass first as the code stands: one that fails anyhow finds nothing.

use anyhow::{Context as _, Result, bail, ensure};
use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::Path;
use std::time::Instant;

use crate::trial::{Trial, Verdict};

/// One change of the code.
#[derive(Debug, Default)]
struct Mutation {
    name: String,
    file: String,
    from: String,
    to: String,
    tests: Vec<String>,
}

impl Mutation {
    /// Whether `wanted` means it: `=TEST`, or a part of its name.
    fn is_meant(&self, wanted: &str) -> bool {
        wanted.strip_prefix('=').map_or_else(|| self.name.contains(wanted), |test| self.tests.iter().any(|own| own == test))
    }
}

pub fn run(root: &Path, wanted: &[String]) -> Result<()> {
    let list = std::fs::read_to_string(root.join("tests/mutations.txt")).context("tests/mutations.txt")?;
    let all = parse(&list)?;
    let chosen: Vec<&Mutation> = all.iter().filter(|mutation| wanted.is_empty() || wanted.iter().any(|part| mutation.is_meant(part))).collect();
    ensure!(!chosen.is_empty(), "no mutation has any of these in its name, or is for such a test: {}", wanted.join(", "));
    let astray: Vec<String> = all.iter().filter_map(|mutation| mutated(root, mutation).err()).map(|error| format!("{error:#}")).collect();
    ensure!(astray.is_empty(), "{}", astray.join("\n"));
    let mut trial = Trial::new(root, &root.join("target/mutations"))?;

    let start = Instant::now();
    if let Some(test) = trial.as_it_stands(&chosen.iter().flat_map(|mutation| &mutation.tests).map(String::as_str).collect())? {
        bail!("{test} fails as the code stands");
    }
    println!("{:<17} as the code stands ({} s)", "passed", start.elapsed().as_secs());
    let mut bad = 0;
    for mutation in chosen {
        let start = Instant::now();
        // Whoever works on the repository meanwhile changes nothing here.
        let (original, changed) = mutated(trial.copy(), mutation)?;
        let tests: BTreeSet<&str> = mutation.tests.iter().map(String::as_str).collect();
        let (word, by) = match trial.judge(&mutation.name, &mutation.file, (&original, &changed), &tests)? {
            Verdict::Found(test) => ("found", test),
            Verdict::Survived => ("SURVIVED", String::new()),
            Verdict::NotCompiled(error) => ("DOES NOT COMPILE", error),
        };
        bad += u32::from(word != "found");
        println!("{word:<17} {} ({} s): {by}", mutation.name, start.elapsed().as_secs());
        std::io::stdout().flush()?;
    }
    ensure!(bad == 0, "{bad} mutations were not found");
    Ok(())
}

fn parse(list: &str) -> Result<Vec<Mutation>> {
    let mut all: Vec<Mutation> = Vec::new();
    for line in list.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        match (line.split_once(' '), all.last_mut()) {
            (Some(("@", file)), Some(last)) => file.clone_into(&mut last.file),
            (Some(("-", from)), Some(last)) => add_line(&mut last.from, from),
            (Some(("+", to)), Some(last)) => add_line(&mut last.to, to),
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

/// Of several lines each but the first has to be indented as it is in the file.
fn add_line(text: &mut String, line: &str) {
    if !text.is_empty() {
        text.push('\n');
    }
    text.push_str(line);
}

/// The file as it stands, and with the change.
fn mutated(root: &Path, mutation: &Mutation) -> Result<(String, String)> {
    let original = std::fs::read_to_string(root.join(&mutation.file)).with_context(|| mutation.file.clone())?;
    let times = original.matches(&mutation.from).count();
    ensure!(times == 1, "`{}`: `{}` stands {times} times in {}", mutation.name, mutation.from, mutation.file);
    let changed = original.replace(&mutation.from, &mutation.to);
    Ok((original, changed))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Code that was moved or reworded leaves no change behind that nobody can try.
    #[test]
    fn each_change_is_one_of_the_code_as_it_stands() -> Result<()> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).context("no root")?;
        let all = parse(&std::fs::read_to_string(root.join("tests/mutations.txt"))?)?;
        let astray: Vec<String> = all.iter().filter_map(|mutation| mutated(root, mutation).err()).map(|error| format!("{error:#}")).collect();
        assert!(astray.is_empty(), "{}", astray.join("\n"));
        let names: BTreeSet<&str> = all.iter().map(|mutation| mutation.name.as_str()).collect();
        assert_eq!(names.len(), all.len(), "a name stands there twice");
        Ok(())
    }
}
