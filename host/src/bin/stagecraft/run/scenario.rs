//! A scenario: what a file says, and whether it makes sense.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, Visitor};
use stagecraft::ioasid::{Strategies, Strategy};
use stagecraft::kernel::sim;
use stagecraft::virtio_iommu;

use super::unit::{self, Architecture};
use crate::output::size;

/// Most bytes of a scenario file.
const MOST_BYTES: u64 = 1 << 16;
/// Most units and devices: each device has an address space and a table of its own.
const MOST: usize = 16;
/// Most operations of a run: their latencies are kept one by one.
pub const MOST_OPERATIONS: u64 = 10_000_000;
/// Longest run.
pub const MOST_SECONDS: f64 = 3600.0;
/// Least and most guest memory.
const MEMORY: (u64, u64) = (64 << 20, 2 << 30);
/// Most characters of a title or a name.
const MOST_CHARACTERS: usize = 120;

/// What is to be played.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// For people.
    pub title: String,
    /// Where chance begins.
    #[serde(default = "one")]
    pub seed: u64,
    /// How many operations; this or `seconds`.
    pub operations: Option<u64>,
    /// For how long.
    pub seconds: Option<f64>,
    /// The guest.
    pub guest: Guest,
    /// The host.
    #[serde(default)]
    pub host: Host,
    /// IOMMUs of the host.
    #[serde(default, rename = "unit")]
    pub units: Vec<Unit>,
    /// What does DMA.
    #[serde(rename = "device")]
    pub devices: Vec<Device>,
    /// What the guest's drivers do.
    pub workload: Workload,
}

const fn one() -> u64 {
    1
}

/// The guest.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guest {
    /// Full name of the format of its tables, or `virtio-iommu`.
    pub format: String,
    /// Settings of the format; what is left out is suggested by the plugin.
    #[serde(default)]
    pub settings: BTreeMap<String, Number>,
    /// Its RAM.
    #[serde(default = "memory")]
    pub memory: Size,
    /// What its driver announces. Not for virtio-iommu, whose requests say everything.
    pub announces: Option<Announces>,
    /// How it announces it. Not for virtio-iommu either.
    pub commands: Option<Commands>,
}

/// How a guest's driver announces what it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Commands {
    /// By commands of its architecture, in a queue in its memory, to a unit whose structures lead to its tables.
    Raw,
    /// As somebody has decoded them already, to an address space whose table is given.
    Typed,
}

const fn memory() -> Size {
    Size(256 << 20)
}

/// What the guest's driver announces by invalidation commands, and how the VMM hears of the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Announces {
    /// Every change, as under VT-d's caching mode.
    Changes,
    /// What was unmapped or replaced, as the architectures want it; the VMM watches the pages of tables for what was mapped.
    Removals,
    /// Nothing: the VMM watches the pages of tables.
    Nothing,
    /// Nothing, and nobody watches: what a bug would look like.
    Never,
}

impl Announces {
    /// As in the file.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Changes => "changes",
            Self::Removals => "removals",
            Self::Nothing => "nothing",
            Self::Never => "never",
        }
    }

    /// Whether there are commands.
    pub const fn is_announced(self) -> bool {
        matches!(self, Self::Changes | Self::Removals)
    }

    /// Whether the VMM watches the pages of tables.
    pub const fn is_watched(self) -> bool {
        matches!(self, Self::Removals | Self::Nothing)
    }
}

/// The host.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// How devices may get the guest's mappings; all if it is left out.
    strategies: Option<Vec<StrategyName>>,
}

impl Host {
    /// How devices may get the guest's mappings.
    pub fn strategies(&self) -> Strategies {
        let strategy = |name: &StrategyName| match name {
            StrategyName::Native => Strategy::Native,
            StrategyName::Nested => Strategy::Nested,
            StrategyName::Areas => Strategy::Areas,
            StrategyName::Software => Strategy::Software,
        };
        self.strategies.as_ref().map_or(Strategies::ALL, |names| Strategies::of(&names.iter().map(strategy).collect::<Vec<_>>()))
    }
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum StrategyName {
    Native,
    Nested,
    Areas,
    Software,
}

/// An IOMMU of the host.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Unit {
    /// What devices call it.
    pub name: String,
    /// Which architecture the simulation plays.
    pub kind: UnitKind,
    /// Whether it takes tables that user space owns.
    #[serde(default = "yes")]
    pub nesting: bool,
}

const fn yes() -> bool {
    true
}

/// The simulated units.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UnitKind {
    /// Intel VT-d.
    Vtd,
    /// Arm SMMUv3.
    Smmuv3,
    /// AMD.
    Amd,
    /// RISC-V.
    Riscv,
}

impl Unit {
    /// For the simulation.
    pub fn config(&self) -> sim::UnitConfig {
        let config = match self.kind {
            UnitKind::Vtd => sim::UnitConfig::vtd(&self.name),
            UnitKind::Smmuv3 => sim::UnitConfig::smmuv3(&self.name),
            UnitKind::Amd => sim::UnitConfig::amd(&self.name),
            UnitKind::Riscv => sim::UnitConfig::riscv(&self.name),
        };
        if self.nesting { config } else { config.without_nesting() }
    }
}

/// A device.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Its name.
    pub label: String,
    /// The unit that a passed-through one is behind.
    pub unit: Option<String>,
    /// A device model of the VMM's, which looks IOVAs up in software.
    #[serde(default)]
    pub emulated: bool,
}

/// What the guest's drivers do.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Workload {
    /// Rings of buffers of one page, each mapped before its use and unmapped after it.
    Network {
        /// Buffers that are mapped at a time.
        #[serde(default = "ring")]
        ring: u64,
    },
    /// Bursts of buffers of mixed sizes, which are unmapped together.
    Storage {
        /// Buffers of a burst.
        #[serde(default = "burst")]
        burst: u64,
        /// Largest buffer.
        #[serde(default = "largest")]
        largest: Size,
    },
    /// Large pages that become tables of small ones and large pages again; permissions that change; tables that move.
    Churn {
        /// Large pages.
        #[serde(default = "regions")]
        regions: u64,
    },
}

const fn ring() -> u64 {
    256
}

const fn burst() -> u64 {
    32
}

const fn largest() -> Size {
    Size(256 << 10)
}

const fn regions() -> u64 {
    8
}

impl Workload {
    /// As in the file.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Network { .. } => "network",
            Self::Storage { .. } => "storage",
            Self::Churn { .. } => "churn",
        }
    }
}

/// Bytes: a number, or a number and a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Sizes;
        impl Visitor<'_> for Sizes {
            type Value = Size;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as \"256 MiB\"")
            }

            fn visit_i64<E: serde::de::Error>(self, bytes: i64) -> Result<Size, E> {
                u64::try_from(bytes).map(Size).map_err(|_| E::custom(format!("{bytes} is not a size; it would be such as \"256 MiB\"")))
            }

            fn visit_u64<E: serde::de::Error>(self, bytes: u64) -> Result<Size, E> {
                Ok(Size(bytes))
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Size, E> {
                parse_size(text).map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Sizes)
    }
}

fn parse_size(text: &str) -> Result<Size, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim() {
        "" | "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        other => return Err(format!("`{other}` is not a unit of size; there are B, KiB, MiB and GiB")),
    };
    let number: u64 = number.parse().map_err(|_| format!("`{text}` is not a size; it would be such as \"256 MiB\""))?;
    number.checked_mul(1 << shift).map(Size).ok_or_else(|| format!("`{text}` is too large"))
}

/// The value of a setting: a number, or true or false.
#[derive(Clone, Copy, Debug)]
pub struct Number(pub u64);

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Value {
            Number(u64),
            Truth(bool),
        }
        match Value::deserialize(deserializer) {
            Ok(Value::Number(number)) => Ok(Self(number)),
            Ok(Value::Truth(truth)) => Ok(Self(truth.into())),
            Err(_) => Err(D::Error::custom("a setting's value is a number such as 4096 or 0x1000, true or false")),
        }
    }
}

/// Reads a scenario, and checks what can be checked without plugins.
pub fn load(path: &Path) -> Result<Scenario> {
    let place = || path.display().to_string();
    let metadata = fs::metadata(path).with_context(place)?;
    ensure!(metadata.is_file(), "{}: not a file; give a scenario such as scenarios/arm-on-x86.toml", path.display());
    let mut text = String::new();
    fs::File::open(path).and_then(|file| file.take(MOST_BYTES + 1).read_to_string(&mut text)).with_context(place)?;
    ensure!(text.len() as u64 <= MOST_BYTES, "{}: longer than {}; a scenario is a page of text", path.display(), size(MOST_BYTES.into()));
    let scenario = parse(&text).with_context(place)?;
    scenario.check().with_context(place)?;
    Ok(scenario)
}

fn parse(text: &str) -> Result<Scenario> {
    toml::from_str(text).map_err(|error| match error.span() {
        Some(span) => {
            let line = 1 + text.get(..span.start).unwrap_or_default().matches('\n').count();
            anyhow::anyhow!("line {line}: {}", error.message())
        }
        None => anyhow::anyhow!("{}", error.message()),
    })
}

impl Scenario {
    /// Whether the guest asks for mappings instead of writing tables.
    pub fn is_requests(&self) -> bool {
        self.guest.format == virtio_iommu::UNIT
    }

    /// The guest's own unit, if its driver works with one: unless the scenario says otherwise, wherever there is one.
    pub fn unit(&self) -> Option<&'static dyn Architecture> {
        unit::of(&self.guest.format).filter(|_| self.guest.commands != Some(Commands::Typed))
    }

    fn check(&self) -> Result<()> {
        self.check_words()?;
        self.check_length()?;
        let memory = self.guest.memory.0;
        let (least, most) = (size(MEMORY.0.into()), size(MEMORY.1.into()));
        ensure!((MEMORY.0..=MEMORY.1).contains(&memory), "memory: {}; a guest has {least} to {most}", size(memory.into()));
        ensure!(memory.is_multiple_of(1 << 20), "memory: {memory} bytes are not whole MiB");
        match (self.is_requests(), self.guest.announces) {
            (true, Some(_)) => bail!("announces: not for virtio-iommu, whose requests say everything; leave it out"),
            (true, None) if !self.guest.settings.is_empty() => bail!("settings: virtio-iommu has none; leave them out"),
            (false, None) => bail!("announces is missing: `changes`, `removals`, `nothing` or `never`"),
            _ => {}
        }
        match self.guest.commands {
            Some(_) if self.is_requests() => bail!("commands: not for virtio-iommu, whose requests say everything; leave it out"),
            Some(Commands::Raw) if self.unit().is_none() => {
                bail!("commands: units with tables of {} have none that are known here; leave it out", self.guest.format)
            }
            _ => {}
        }
        self.check_devices()?;
        self.check_workload()
    }

    fn check_words(&self) -> Result<()> {
        let labels = self.devices.iter().map(|device| ("label", &device.label));
        let names = self.units.iter().map(|unit| ("name", &unit.name));
        for (key, text) in labels.chain(names).chain([("title", &self.title)]) {
            ensure!(!text.trim().is_empty(), "{key}: empty");
            ensure!(text.chars().count() <= MOST_CHARACTERS, "{key}: longer than {MOST_CHARACTERS} characters");
        }
        Ok(())
    }

    /// Bounds of the length, also for one from the command line.
    pub fn check_length(&self) -> Result<()> {
        match (self.operations, self.seconds) {
            (Some(operations), None) => {
                ensure!((1..=MOST_OPERATIONS).contains(&operations), "operations: {operations}; a run has 1 to {MOST_OPERATIONS}");
            }
            (None, Some(seconds)) => {
                ensure!(seconds > 0.0 && seconds <= MOST_SECONDS, "seconds: {seconds}; a run has more than 0 and at most {MOST_SECONDS}");
            }
            (Some(_), Some(_)) => bail!("operations and seconds are both given; one of them says how long the run is"),
            (None, None) => bail!("operations or seconds is missing: how long the run is"),
        }
        Ok(())
    }

    fn check_devices(&self) -> Result<()> {
        ensure!((1..=MOST).contains(&self.devices.len()), "{} devices; there are 1 to {MOST}", self.devices.len());
        ensure!(self.units.len() <= MOST, "{} units; there are at most {MOST}", self.units.len());
        let units: Vec<&str> = self.units.iter().map(|unit| unit.name.as_str()).collect();
        for (index, name) in units.iter().enumerate() {
            ensure!(!units[..index].contains(name), "there are two units `{name}`");
        }
        for (index, device) in self.devices.iter().enumerate() {
            let label = &device.label;
            ensure!(self.devices[..index].iter().all(|other| other.label != *label), "there are two devices `{label}`");
            match (&device.unit, device.emulated) {
                (Some(unit), false) => ensure!(units.contains(&unit.as_str()), "device `{label}`: no unit `{unit}`; there are {}", list(&units)),
                (None, true) => ensure!(
                    self.host.strategies().contains(Strategy::Software),
                    "device `{label}` is emulated, and strategies lack `software`, which is how device models get mappings"
                ),
                (Some(_), true) => bail!("device `{label}`: an emulated device is behind no unit; leave out one of unit and emulated"),
                (None, false) => bail!("device `{label}`: unit is missing; it names the unit that a passed-through device is behind"),
            }
        }
        Ok(())
    }

    fn check_workload(&self) -> Result<()> {
        match self.workload {
            Workload::Network { ring } => ensure!((1..=16_384).contains(&ring), "ring: {ring} buffers; there are 1 to 16384"),
            Workload::Storage { burst, largest } => {
                ensure!((1..=1024).contains(&burst), "burst: {burst} buffers; there are 1 to 1024");
                ensure!((1..=4 << 20).contains(&largest.0), "largest: {} bytes; a buffer has 1 B to 4 MiB", largest.0);
            }
            Workload::Churn { regions } => ensure!((1..=64).contains(&regions), "regions: {regions}; there are 1 to 64"),
        }
        Ok(())
    }
}

fn list(names: &[&str]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}
