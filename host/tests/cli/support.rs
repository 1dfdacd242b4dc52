//! Runs the command, and makes snapshots to run it on.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

/// What the command did.
#[derive(Debug)]
pub struct Run {
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Run {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {}", self.stdout))
    }

    /// Asserts that all went well.
    pub fn good(self) -> Self {
        assert_eq!((self.status, &*self.stderr), (0, ""), "{}", self.stdout);
        self
    }
}

/// Where the snapshots of real guests are.
pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures")
}

/// The command, run where the fixtures are, with nothing of this machine's configuration but a cache for compiled plugins.
pub fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_stagecraft"));
    command.args(arguments).current_dir(fixtures()).stdin(Stdio::null());
    command.env_remove("STAGECRAFT_PLUGINS").env_remove("NO_COLOR").env_remove("CLICOLOR_FORCE");
    command.env("XDG_CACHE_HOME", Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache")).env("COLUMNS", "110");
    command
}

pub fn run(arguments: &[&str]) -> Run {
    let output = command(arguments).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Run { status: output.status.code().expect("not killed by a signal"), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// An empty folder for one test.
pub fn folder(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cli").join(name);
    let _ = fs::remove_dir_all(&path);
    fs::create_dir_all(&path).unwrap();
    path
}

/// Names of everything in a folder, hidden files included.
pub fn names(path: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A copy of a fixture that can be damaged.
pub struct Copy {
    pub path: PathBuf,
    pub json: Value,
    pages: Vec<u8>,
    places: HashMap<u64, usize>,
}

impl Copy {
    pub fn new(test: &str, fixture: &str) -> Self {
        let (source, path) = (fixtures().join(fixture), folder(test).join(fixture));
        let json: Value = serde_json::from_slice(&fs::read(source.join("snapshot.json")).unwrap()).unwrap();
        let address = |page: &Value| u64::from_str_radix(page.as_str().unwrap().strip_prefix("0x").unwrap(), 16).unwrap();
        let places = json["pages"].as_array().unwrap().iter().enumerate().map(|(index, page)| (address(page), index * 4096)).collect();
        let copy = Self { path, json, pages: fs::read(source.join("pages.bin")).unwrap(), places };
        fs::create_dir(&copy.path).unwrap();
        copy.write();
        copy
    }

    pub fn write(&self) -> &Self {
        fs::write(self.path.join("snapshot.json"), self.json.to_string()).unwrap();
        fs::write(self.path.join("pages.bin"), &self.pages).unwrap();
        self
    }

    pub fn path(&self) -> &str {
        self.path.to_str().unwrap()
    }

    /// Leaves out a page.
    pub fn remove_page(&mut self, address: u64) {
        let place = self.places.remove(&address).expect("there is such a page");
        self.pages.drain(place..place + 4096);
        self.json["pages"].as_array_mut().unwrap().remove(place / 4096);
        for other in self.places.values_mut().filter(|other| **other > place) {
            *other -= 4096;
        }
    }

    /// Adds a page of zeroes, in RAM and not there yet.
    pub fn add_page(&mut self, address: u64) {
        assert!(self.places.insert(address, self.pages.len()).is_none(), "there is such a page already");
        self.pages.resize(self.pages.len() + 4096, 0);
        self.json["pages"].as_array_mut().unwrap().push(Value::from(format!("{address:#x}")));
    }

    pub fn register(&self, name: &str) -> u64 {
        hex(&self.json["unit"]["registers"][name])
    }

    pub fn set_register(&mut self, name: &str, value: u64) {
        self.json["unit"]["registers"][name] = Value::from(format!("{value:#x}"));
    }

    fn place(&self, address: u64) -> usize {
        self.places[&(address & !0xfff)] + (address & 0xfff) as usize
    }

    pub fn word(&self, address: u64) -> u64 {
        let place = self.place(address);
        u64::from_le_bytes(self.pages[place..place + 8].try_into().unwrap())
    }

    pub fn set_word(&mut self, address: u64, value: u64) {
        let place = self.place(address);
        self.pages[place..place + 8].copy_from_slice(&value.to_le_bytes());
    }

    /// Address of the last entry for `iova` of a table with four levels of 9 bits below `root`, as far down as tables go.
    pub fn entry(&self, root: u64, iova: u64, levels: u32) -> u64 {
        let mut table = root;
        for level in 0..levels {
            let index = iova >> (39 - 9 * level) & 0x1ff;
            let entry = table + 8 * index;
            if level + 1 == levels {
                return entry;
            }
            table = self.word(entry) & 0x0000_ffff_ffff_f000;
        }
        unreachable!("there is a last level")
    }
}

/// The root of the table that a device uses.
pub fn root(snapshot: &str, device: &str) -> u64 {
    let report = run(&["inspect", snapshot, "--device", device, "--format", "json"]).json();
    hex(&report["streams"][0]["tables"][0]["root"])
}

/// A number in a hex string.
pub fn hex(value: &Value) -> u64 {
    u64::from_str_radix(value.as_str().unwrap().strip_prefix("0x").unwrap(), 16).unwrap()
}
