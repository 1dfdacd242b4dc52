//! `install-qemu` on machines that are made up: what it has the package manager do, and which source of packages it adds. Nothing is installed, and no other machine
//! is asked.
#![allow(clippy::unwrap_used)]

use std::env;
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// What the script may use besides the package manager.
const TOOLS: [&str; 10] = ["sh", "sed", "awk", "tr", "tee", "find", "head", "env", "cat", "chmod"];

const RISCV: &str = "qemu-system-x86 qemu-system-arm qemu-system-misc qemu-system-riscv";
const NO_RISCV: &str = "qemu-system-x86 qemu-system-arm qemu-system-misc";

const STANZAS: &str = "\
# Written by hand.
Types: deb-src
URIs: http://sources.example/debian
Suites: bookworm
Components: main

Types: deb
Enabled: no
URIs: http://disabled.example/debian
Suites: bookworm
Components: main

Types: deb deb-src
# A comment.
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/example.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
";

const LINES: &str = "\
# deb http://old.example/debian bookworm main
deb-src http://sources.example/debian bookworm main
deb [arch=amd64 signed-by=/usr/share/keyrings/example.gpg] http://mirror.example/debian bookworm main contrib
deb http://other.example/debian bookworm main
";

/// A machine: its `/etc`, its programs, and the version that its packages of QEMU have.
struct Made {
    folder: TempDir,
    version: &'static str,
    riscv: &'static str,
}

impl Made {
    fn new(release: &str, version: &'static str, riscv: &'static str) -> Self {
        let made = Self { folder: tempfile::tempdir().unwrap(), version, riscv };
        fs::create_dir_all(made.path("etc/apt/sources.list.d")).unwrap();
        fs::create_dir(made.path("bin")).unwrap();
        fs::write(made.path("etc/os-release"), format!("ID=debian\nVERSION_CODENAME={release}\n")).unwrap();
        for tool in TOOLS {
            let paths = env::var_os("PATH").unwrap();
            let found = env::split_paths(&paths).map(|folder| folder.join(tool)).find(|path| path.is_file()).unwrap();
            symlink(found, made.path("bin").join(tool)).unwrap();
        }
        made.program("id", "echo 0");
        made.program(
            "apt-cache",
            r#"case $2 in *riscv) version=$RISCV ;; *) version=$VERSION ;; esac; printf '%s:\n  Candidate: %s\n' "$2" "$version""#,
        );
        // What is installed is of version 10, and answers.
        let qemu = r"for name in x86_64 aarch64 riscv64; do
            printf '#!/bin/sh\necho QEMU emulator version 10.0.2\n' >$BIN/qemu-system-$name; chmod +x $BIN/qemu-system-$name
        done";
        made.program("apt-get", &format!("echo \"$*\" >>$BIN/../log\ncase $* in install*) {qemu} ;; esac"));
        made
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn program(&self, name: &str, text: &str) {
        let path = self.path("bin").join(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn source(&self, name: &str, text: &str) {
        fs::write(self.path("etc/apt").join(name), text).unwrap();
    }

    /// Whether the script succeeds, what it prints, and what the package manager was told.
    fn run(&self, arguments: &[&str]) -> (bool, String, Vec<String>) {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("install-qemu");
        let mut command = Command::new("/bin/sh");
        command.arg(script).args(arguments).env_clear().env("PATH", self.path("bin")).env("BIN", self.path("bin"));
        let output = command.env("STAGECRAFT_ETC", self.path("etc")).env("VERSION", self.version).env("RISCV", self.riscv).output().unwrap();
        let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
        let log = fs::read_to_string(self.path("log")).unwrap_or_default();
        (output.status.success(), text, log.lines().map(str::to_owned).collect())
    }

    /// Source files that were not there before.
    fn added(&self, before: &[&str]) -> Vec<(String, String)> {
        let entries = fs::read_dir(self.path("etc/apt/sources.list.d")).unwrap().map(|entry| entry.unwrap().path());
        let named = entries.map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read_to_string(&path).unwrap()));
        named.filter(|(name, _)| !before.contains(&name.as_str())).collect()
    }
}

fn install(suite: &str, packages: &str) -> String {
    format!("install -q -y --no-install-recommends {suite}{packages}")
}

/// One test: programs are written here, which no other thread may start a process beside.
#[test]
fn each_machine_is_told_what_it_lacks() {
    const BACKPORTS: &str = "-t bookworm-backports ";
    const OLD: &str = "1:7.2+dfsg-7+deb12u18";
    const NEW: &str = "1:10.0.2+ds-2+deb13u1";

    // The distribution has it: no other source.
    let made = Made::new("trixie", NEW, NEW);
    made.source("sources.list.d/debian.sources", &STANZAS.replace("bookworm", "trixie"));
    let (succeeds, _, log) = made.run(&[]);
    assert_eq!((succeeds, log), (true, vec!["update -q".to_owned(), install("", RISCV)]));
    assert_eq!(made.added(&["debian.sources"]), []);
    // And now it is there: nothing to do.
    let (succeeds, text, log) = made.run(&[]);
    assert_eq!((succeeds, text.as_str(), log.len()), (true, "", 2));

    // Stanzas without backports.
    let made = Made::new("bookworm", OLD, "(none)");
    made.source("sources.list.d/any.sources", STANZAS);
    let stanza = "Types: deb deb-src\nURIs: http://mirror.example/debian\nSuites: bookworm-backports\nComponents: main contrib\n\
         Signed-By: /usr/share/keyrings/example.gpg\n";
    let (succeeds, text, log) = made.run(&["-s"]);
    assert_eq!((succeeds, text.as_str(), log.len(), made.added(&["any.sources"]).len()), (true, stanza, 0, 0));
    let (succeeds, _, log) = made.run(&[]);
    assert_eq!((succeeds, log), (true, vec!["update -q".to_owned(), "update -q".to_owned(), install(BACKPORTS, NO_RISCV)]));
    assert_eq!(made.added(&["any.sources"]), [("bookworm-backports.sources".to_owned(), stanza.to_owned())]);

    // With them.
    let made = Made::new("bookworm", OLD, "(none)");
    made.source("sources.list.d/any.sources", &STANZAS.replace("bookworm-updates", "bookworm-updates bookworm-backports"));
    let (succeeds, _, log) = made.run(&[]);
    assert_eq!((succeeds, log), (true, vec!["update -q".to_owned(), install(BACKPORTS, NO_RISCV)]));
    assert_eq!(made.added(&["any.sources"]), []);

    // Lines, with and without.
    let made = Made::new("bookworm", OLD, "(none)");
    made.source("sources.list", LINES);
    let line = "deb [arch=amd64 signed-by=/usr/share/keyrings/example.gpg] http://mirror.example/debian bookworm-backports main contrib\n";
    let (succeeds, _, log) = made.run(&[]);
    assert_eq!((succeeds, log), (true, vec!["update -q".to_owned(), "update -q".to_owned(), install(BACKPORTS, NO_RISCV)]));
    assert_eq!(made.added(&[]), [("bookworm-backports.list".to_owned(), line.to_owned())]);
    let made = Made::new("bookworm", OLD, "(none)");
    made.source("sources.list", &format!("{LINES}{line}"));
    assert_eq!(made.run(&[]).2, ["update -q".to_owned(), install(BACKPORTS, NO_RISCV)]);
    assert_eq!(made.added(&[]), []);

    // No source to make one like, and an installation that does not help.
    let made = Made::new("bookworm", OLD, "(none)");
    let (succeeds, text, log) = made.run(&[]);
    assert!(!succeeds && text.contains("no source of packages names the suite bookworm"), "{text}");
    assert_eq!(log, ["update -q"]);
    let made = Made::new("trixie", NEW, NEW);
    made.program("apt-get", "echo \"$*\" >>$BIN/../log");
    let (succeeds, text, _) = made.run(&[]);
    assert!(!succeeds && text.contains("QEMU 10 or newer is still missing"), "{text}");
}
