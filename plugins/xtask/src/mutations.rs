//! Takes pieces out of the code, one at a time, and sees whether a test fails: `tests/mutations.txt`.
//!
//! All of it happens in a copy of the repository below `target`. There the tests pass first as the code stands: one that fails anyhow finds nothing.

use anyhow::{Context as _, Result, bail, ensure};
use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// A test that takes longer than this has no end.
const PATIENCE: Duration = Duration::from_secs(20 * 60);

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
    /// This test failed.
    Found(String),
    /// None did.
    Survived,
    /// It does not compile.
    NotCompiled,
}

pub fn run(root: &Path, wanted: &[String]) -> Result<()> {
    let list = std::fs::read_to_string(root.join("tests/mutations.txt")).context("tests/mutations.txt")?;
    let all = parse(&list)?;
    let is_wanted = |mutation: &&Mutation| wanted.is_empty() || wanted.iter().any(|part| mutation.name.contains(part.as_str()));
    let chosen: Vec<&Mutation> = all.iter().filter(is_wanted).collect();
    ensure!(!chosen.is_empty(), "no mutation has any of these in its name: {}", wanted.join(", "));
    let astray: Vec<String> = all.iter().filter_map(|mutation| mutated(root, mutation).err()).map(|error| format!("{error:#}")).collect();
    ensure!(astray.is_empty(), "{}", astray.join("\n"));
    let copy = root.join("target/mutations");
    copy_to(root, &copy)?;

    let tests: BTreeSet<&str> = chosen.iter().flat_map(|mutation| &mutation.tests).map(String::as_str).collect();
    let start = Instant::now();
    match judge(&copy, &tests)? {
        Verdict::Survived => println!("{:<17} as the code stands ({} s)", "passed", start.elapsed().as_secs()),
        Verdict::Found(test) => bail!("{test} fails as the code stands"),
        Verdict::NotCompiled => bail!("the code does not compile"),
    }
    let mut bad = 0;
    for mutation in chosen {
        let start = Instant::now();
        let (original, changed) = mutated(root, mutation)?;
        let file = copy.join(&mutation.file);
        std::fs::write(&file, changed)?;
        let verdict = judge(&copy, &mutation.tests.iter().map(String::as_str).collect());
        std::fs::write(&file, original)?;
        let (word, by) = match verdict? {
            Verdict::Found(test) => ("found", format!(": {test}")),
            Verdict::Survived => ("SURVIVED", String::new()),
            Verdict::NotCompiled => ("DOES NOT COMPILE", String::new()),
        };
        bad += u32::from(word != "found");
        println!("{word:<17} {} ({} s){by}", mutation.name, start.elapsed().as_secs());
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

/// Builds these tests in the copy and runs them, until one fails.
fn judge(copy: &Path, tests: &BTreeSet<&str>) -> Result<Verdict> {
    // The whole workspace chooses the features, so that all tests share what is built; but for the library's own package, whose command would be built each time.
    let mut command = Command::new("cargo");
    command.args(["test", "--workspace", "--exclude", "stagecraft", "--no-run"]).current_dir(copy);
    tests.iter().for_each(|test| _ = command.args(["--test", test]));
    let built = command.stdin(Stdio::null()).output().context("cargo")?;
    if !built.status.success() {
        return Ok(Verdict::NotCompiled);
    }
    for (name, program) in programs(&String::from_utf8_lossy(&built.stderr)) {
        if let Some(failed) = first_failure(copy, &program).with_context(|| program.display().to_string())? {
            return Ok(Verdict::Found(format!("{name} {failed}")));
        }
    }
    Ok(Verdict::Survived)
}

/// What Cargo says that it built: `Executable tests/queue.rs (target/debug/deps/queue-0123456789abcdef)`.
fn programs(said: &str) -> Vec<(String, PathBuf)> {
    let of_line = |line: &str| {
        let (_, path) = line.trim_start().strip_prefix("Executable ")?.strip_suffix(')')?.rsplit_once('(')?;
        let name = Path::new(path).file_name()?.to_str()?.rsplit_once('-')?.0.to_owned();
        Some((name, PathBuf::from(path)))
    };
    said.lines().filter_map(of_line).collect()
}

/// Runs the tests of `program`: the first that fails, after which the others are not waited for.
fn first_failure(copy: &Path, program: &Path) -> Result<Option<String>> {
    let folder = copy.join("tests");
    let mut child = Command::new(copy.join(program))
        .current_dir(&folder)
        .env("CARGO_MANIFEST_DIR", &folder)
        .env("STAGECRAFT_FIRST", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let output = BufReader::new(child.stdout.take().context("no output")?);
    let (sender, receiver) = channel();
    std::thread::spawn(move || output.lines().map_while(Result::ok).all(|line| sender.send(line).is_ok()));
    let end = Instant::now() + PATIENCE;
    let failed = loop {
        match receiver.recv_timeout(end.saturating_duration_since(Instant::now())) {
            // `test space::a_page_goes ... FAILED`
            Ok(line) if line.ends_with("FAILED") && line.starts_with("test ") => break line.split(' ').nth(1).map(str::to_owned),
            Ok(_) => {}
            Err(RecvTimeoutError::Timeout) => break Some("has no end".to_owned()),
            Err(RecvTimeoutError::Disconnected) => break None,
        }
    };
    if failed.is_some() {
        child.kill()?;
    }
    let status = child.wait()?;
    Ok(failed.or_else(|| (!status.success()).then(|| status.to_string())))
}
