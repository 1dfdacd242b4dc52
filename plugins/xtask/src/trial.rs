//! A copy of the repository in which the code is changed, built and tried: how the tests of `mutations.rs` are run in little time.
//!
//! Only what depends on the change is built, and only those of a crate's parts that it is in: nothing moves code from one part to another (`-C lto=off`; Cargo's usual
//! way for optimised code would have all of them built again). Tests that take little time are run before those that take much, and the one that found a change the
//! last time before all. What this is about is kept between runs, with what passed as the code stands.

use anyhow::{Context as _, Result, ensure};
use sha2::{Digest as _, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// Tests that take longer than this, and many times what they took, have no end.
const PATIENCE: Duration = Duration::from_secs(5 * 60);
/// As long as nobody knows what they take.
const PATIENCE_AT_FIRST: Duration = Duration::from_secs(60 * 60);
/// Tests are run in groups by what they take, in seconds.
const GROUPS: [f64; 3] = [1.0, 10.0, f64::INFINITY];

/// What became of a change.
pub enum Verdict {
    /// This test failed.
    Found(String),
    /// None did.
    Survived,
    /// It does not compile: what the compiler says.
    NotCompiled(String),
}

/// The copy, and what is known of its tests.
pub struct Trial {
    copy: PathBuf,
    known: Known,
}

/// A test program and the name of a test in it.
type Test = (String, String);

/// What earlier runs told.
#[derive(Default)]
struct Known {
    /// The code whose tests passed, and which did.
    code: String,
    passed: BTreeSet<String>,
    /// How long each took, in seconds.
    seconds: BTreeMap<Test, f64>,
    /// By the names of changes.
    found: BTreeMap<String, Test>,
}

impl Trial {
    pub fn new(root: &Path, copy: &Path) -> Result<Self> {
        let code = copy_to(root, copy)?;
        if !copy.join("target").exists() {
            take_what_is_built(root, copy)?;
        }
        std::fs::write(copy.join("target/rustc"), "#!/bin/sh\nexec \"$@\" -C lto=off -C debuginfo=0\n")?;
        ensure!(Command::new("chmod").args(["+x", "target/rustc"]).current_dir(copy).status().context("chmod")?.success(), "chmod failed");
        let mut known = Known::read(&copy.join("target/known"));
        if known.code != code {
            known.passed.clear();
            known.code = code;
        }
        Ok(Self { copy: copy.to_owned(), known })
    }

    /// The copy, as the code stands.
    pub fn copy(&self) -> &Path {
        &self.copy
    }

    /// Runs all of these as the code stands, but for those that passed before: the first that fails.
    pub fn as_it_stands(&mut self, tests: &BTreeSet<&str>) -> Result<Option<String>> {
        let Ok(programs) = self.build(tests)? else { return Ok(Some("the compiler".to_owned())) };
        for (name, program) in programs {
            if self.known.passed.contains(&name) {
                continue;
            }
            let mut seconds = BTreeMap::new();
            let failed =
                self.first_failure(&program, &[], PATIENCE_AT_FIRST, &mut |test, took| _ = seconds.insert((name.clone(), test.to_owned()), took))?;
            if let Some(failed) = failed {
                return Ok(Some(format!("{name} {failed}")));
            }
            self.known.seconds.retain(|(program, _), _| *program != name);
            self.known.seconds.append(&mut seconds);
            self.known.passed.insert(name);
            self.known.write(&self.copy.join("target/known"))?;
        }
        Ok(None)
    }

    /// Runs these with one file that is `changed`, until one fails.
    pub fn judge(&mut self, change: &str, file: &str, (original, changed): (&str, &str), tests: &BTreeSet<&str>) -> Result<Verdict> {
        let file = self.copy.join(file);
        std::fs::write(&file, changed)?;
        let built = self.build(tests);
        std::fs::write(&file, original)?;
        let programs = match built? {
            Ok(programs) => programs,
            Err(error) => return Ok(Verdict::NotCompiled(error)),
        };
        let Some((name, test)) = self.first_of(change, &programs)? else { return Ok(Verdict::Survived) };
        let said = format!("{name} {test}");
        self.known.found.insert(change.to_owned(), (name, test));
        self.known.write(&self.copy.join("target/known"))?;
        Ok(Verdict::Found(said))
    }

    /// The first that fails of all tests of these programs, in the order that promises to take least.
    fn first_of(&self, change: &str, programs: &[(String, PathBuf)]) -> Result<Option<Test>> {
        let before = self.known.found.get(change).filter(|test| self.known.seconds.contains_key(test));
        let mut groups: Vec<(&String, &PathBuf, Vec<&str>)> = Vec::new();
        if let Some((name, test)) = before {
            groups.extend(programs.iter().filter(|(program, _)| program == name).map(|(name, path)| (name, path, vec![test.as_str()])));
        }
        let mut from = f64::NEG_INFINITY;
        for to in GROUPS {
            for (name, path) in programs {
                let is_here = |(key, seconds): &(&Test, &f64)| key.0 == *name && **seconds >= from && **seconds < to && Some(*key) != before;
                groups.push((name, path, self.known.seconds.iter().filter(is_here).map(|(key, _)| key.1.as_str()).collect()));
            }
            from = to;
        }
        for (name, path, tests) in groups.into_iter().filter(|(_, _, tests)| !tests.is_empty()) {
            let seconds: f64 = tests.iter().filter_map(|test| self.known.seconds.get(&(name.clone(), (*test).to_owned()))).sum();
            if let Some(test) = self.first_failure(path, &tests, PATIENCE + Duration::from_secs_f64(20.0 * seconds), &mut |_, _| {})? {
                return Ok(Some((name.clone(), test)));
            }
        }
        Ok(None)
    }

    /// Builds these tests: their names and programs, or what the compiler says.
    fn build(&self, tests: &BTreeSet<&str>) -> Result<Result<Vec<(String, PathBuf)>, String>> {
        // The whole workspace chooses the features, so that all tests share what is built; but for the library's own package, whose command would be built each time.
        let mut command = Command::new("cargo");
        command.args(["test", "--workspace", "--exclude", "stagecraft", "--no-run"]).current_dir(&self.copy);
        tests.iter().for_each(|test| _ = command.args(["--test", test]));
        command.env("RUSTC_WORKSPACE_WRAPPER", self.copy.join("target/rustc"));
        let built = command.stdin(Stdio::null()).output().context("cargo")?;
        let said = String::from_utf8_lossy(&built.stderr);
        if !built.status.success() {
            let error = said.lines().find(|line| line.starts_with("error")).unwrap_or("no error");
            return Ok(Err(error.to_owned()));
        }
        Ok(Ok(programs(&said)))
    }

    /// Runs `tests` of `program`, or all: the first that fails, after which the others are not waited for. The others are told with what they took, in seconds.
    fn first_failure(&self, program: &Path, tests: &[&str], patience: Duration, passed: &mut dyn FnMut(&str, f64)) -> Result<Option<String>> {
        let folder = self.copy.join("tests");
        let mut child = Command::new(self.copy.join(program))
            .args(tests)
            .args(["--exact", "--report-time", "-Zunstable-options"])
            .current_dir(&folder)
            .env("CARGO_MANIFEST_DIR", &folder)
            .env("STAGECRAFT_FIRST", "1")
            // That a stable test program says what its tests take.
            .env("RUSTC_BOOTSTRAP", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| program.display().to_string())?;
        let output = BufReader::new(child.stdout.take().context("no output")?);
        let (sender, receiver) = channel();
        std::thread::spawn(move || output.lines().map_while(Result::ok).all(|line| sender.send(line).is_ok()));
        let end = Instant::now() + patience;
        let failed = loop {
            match receiver.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) => match outcome(&line) {
                    Some((test, "FAILED", _)) => break Some(test.to_owned()),
                    Some((test, "ok", seconds)) => passed(test, seconds),
                    _ => {}
                },
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
}

impl Known {
    fn read(path: &Path) -> Self {
        let mut known = Self::default();
        for line in std::fs::read_to_string(path).unwrap_or_default().lines() {
            let words: Vec<&str> = line.splitn(4, ' ').collect();
            match words[..] {
                ["code", code] => code.clone_into(&mut known.code),
                ["passed", program] => _ = known.passed.insert(program.to_owned()),
                ["seconds", program, test, seconds] => {
                    known.seconds.extend(seconds.parse().ok().map(|seconds: f64| ((program.to_owned(), test.to_owned()), seconds)));
                }
                ["found", program, test, change] => _ = known.found.insert(change.to_owned(), (program.to_owned(), test.to_owned())),
                _ => {}
            }
        }
        known
    }

    fn write(&self, path: &Path) -> Result<()> {
        let mut lines = vec![format!("code {}", self.code)];
        lines.extend(self.passed.iter().map(|program| format!("passed {program}")));
        lines.extend(self.seconds.iter().map(|((program, test), seconds)| format!("seconds {program} {test} {seconds}")));
        lines.extend(self.found.iter().map(|(change, (program, test))| format!("found {program} {} {change}", test.replace(' ', "-"))));
        std::fs::write(path, lines.join("\n") + "\n").with_context(|| path.display().to_string())
    }
}

/// Of `test space::a_page_goes ... FAILED <1.250s>` the name, the outcome and the seconds.
fn outcome(line: &str) -> Option<(&str, &str, f64)> {
    let (name, outcome) = line.strip_prefix("test ")?.rsplit_once(" ... ")?;
    let (word, seconds) = outcome.split_once(' ').unwrap_or((outcome, ""));
    let seconds = seconds.trim_matches(['<', '>', 's']).parse().unwrap_or(0.0);
    Some((name.split(' ').next()?, word, seconds))
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

/// Copies what is under version control, where it differs, so that what was built is not built again. Which code it is: a hash of all of it that tests can notice.
fn copy_to(root: &Path, copy: &Path) -> Result<String> {
    let listed = Command::new("git").args(["ls-files", "-z"]).current_dir(root).output().context("git")?;
    ensure!(listed.status.success(), "git ls-files failed");
    let mut hash = Sha256::new();
    for name in String::from_utf8(listed.stdout)?.split('\0').filter(|name| !name.is_empty()) {
        let (from, to) = (root.join(name), copy.join(name));
        let Ok(bytes) = std::fs::read(&from) else { continue };
        if name != "tests/mutations.txt" && !name.ends_with(".md") && !name.starts_with("plugins/xtask/") {
            hash.update(name);
            hash.update(Sha256::digest(&bytes));
        }
        if std::fs::read(&to).is_ok_and(|there| there == bytes) {
            continue;
        }
        std::fs::create_dir_all(to.parent().context("no folder")?)?;
        std::fs::write(&to, bytes).with_context(|| to.display().to_string())?;
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// What others' crates were built to has not to be built again: it comes from the repository's own `target`. Its files are linked; the workspace's own are not taken.
fn take_what_is_built(root: &Path, copy: &Path) -> Result<()> {
    let (from, to) = (root.join("target/debug"), copy.join("target/debug"));
    std::fs::create_dir_all(to.join("deps"))?;
    for folder in [".fingerprint", "build"] {
        // What is not there is built.
        _ = Command::new("cp").arg("-a").arg(from.join(folder)).arg(&to).stderr(Stdio::null()).status().context("cp")?;
    }
    let Ok(built) = std::fs::read_dir(from.join("deps")) else { return Ok(()) };
    for file in built {
        let file = file?.path();
        let is_library = file.extension().is_some_and(|extension| ["rlib", "rmeta", "so", "d"].iter().any(|library| extension == *library));
        let name = file.file_name().context("no name")?;
        if is_library && !name.to_string_lossy().contains("stagecraft") {
            std::fs::hard_link(&file, to.join("deps").join(name))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cargo_and_tests_say_is_understood() {
        let said = "   Compiling stagecraft\n  Executable tests/live/main.rs (target/debug/deps/live-90d27014e65ee25b)\n";
        assert_eq!(programs(said), [("live".to_owned(), PathBuf::from("target/debug/deps/live-90d27014e65ee25b"))]);
        assert_eq!(outcome("test space::a_page_goes ... FAILED <1.250s>"), Some(("space::a_page_goes", "FAILED", 1.25)));
        assert_eq!(outcome("test a_page - should panic ... ok <0.004s>"), Some(("a_page", "ok", 0.004)));
        assert_eq!(outcome("test a_page ... ok"), Some(("a_page", "ok", 0.0)));
        assert_eq!(outcome("test result: ok. 92 passed; 0 failed; finished in 13.19s"), None);
        assert_eq!(outcome("test a_page has been running for over 60 seconds"), None);
    }

    #[test]
    fn what_is_known_is_known_the_next_time() -> Result<()> {
        let mut known = Known { code: "0f".to_owned(), ..Known::default() };
        let test = ("live".to_owned(), "space::a_page_goes".to_owned());
        known.passed.insert("live".to_owned());
        known.seconds.insert(test.clone(), 1.25);
        known.found.insert("pages stay".to_owned(), test);
        let file = std::env::temp_dir().join(format!("stagecraft-known-{}", std::process::id()));
        known.write(&file)?;
        let again = Known::read(&file);
        std::fs::remove_file(&file)?;
        assert_eq!((&again.code, &again.passed, &again.seconds, &again.found), (&known.code, &known.passed, &known.seconds, &known.found));
        Ok(())
    }
}
