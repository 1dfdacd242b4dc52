//! Golden tests: each file in `tests/golden` carries its own command line, and what the command says to it. `BLESS=1` rewrites what it says.
//!
//! `{tmp}` stands for an empty folder. Everything is relative to `tests/fixtures`.

use std::fs;
use std::path::Path;

use crate::support::{folder, run};

/// A case as it is written down.
fn render(line: &str, tmp: &Path) -> String {
    let tmp = tmp.to_str().unwrap();
    let words: Vec<String> = line.split_whitespace().map(|word| word.replace("{tmp}", tmp)).collect();
    assert_eq!(words[0], "stagecraft", "a case begins with `$ stagecraft`");
    let arguments: Vec<&str> = words[1..].iter().map(String::as_str).collect();
    let found = run(&arguments);
    let part = |name: &str, text: &str| if text.is_empty() { String::new() } else { format!("--- {name}\n{}", text.replace(tmp, "{tmp}")) };
    format!("$ {line}\n--- status {}\n{}{}", found.status, part("stdout", &found.stdout), part("stderr", &found.stderr))
}

#[test]
fn the_command_says_what_is_written_down() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
    let mut files: Vec<_> = fs::read_dir(golden).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() > 15, "the cases are there");
    let mut wrong = Vec::new();
    for file in files {
        let name = file.file_stem().unwrap().to_str().unwrap().to_owned();
        let text = fs::read_to_string(&file).unwrap();
        let line = text.lines().next().and_then(|line| line.strip_prefix("$ ")).unwrap_or_else(|| panic!("{name}: no command line"));
        let found = render(line, &folder(&format!("golden-{name}")));
        if std::env::var_os("BLESS").is_some() {
            fs::write(&file, &found).unwrap();
        } else if found != text {
            println!("==== {name}: written down\n{text}\n==== {name}: found\n{found}");
            wrong.push(name);
        }
    }
    assert!(wrong.is_empty(), "not as written down: {wrong:?}; if that is right, run again with BLESS=1 and read the difference");
}
