//! Settings by name: read into a table's configuration, and written again.

use super::{AmdV1, AmdV2, ArmStage1, ArmStage2, Dart, LoongArch, RiscvFirst, RiscvSecond, S390, Settings, TableConfig, V7s, VtdFirst, VtdSecond};
use crate::reference::Problem;

/// The settings of one table.
pub(super) struct Reader<'a> {
    format: &'a str,
    settings: &'a Settings,
}

impl Reader<'_> {
    /// Refuses settings other than zero that are not known, so that none goes unnoticed.
    pub(super) fn know(&self, known: &[&str]) -> Result<(), Problem> {
        match self.settings.iter().find(|(key, value)| **value != 0 && !known.contains(&key.as_str())) {
            Some((key, _)) => Err(Problem::Unsupported(format!("setting {key} of {}", self.format))),
            None => Ok(()),
        }
    }

    pub(super) fn get(&self, key: &str) -> Option<u64> {
        self.settings.get(key).copied()
    }

    pub(super) fn need(&self, key: &str) -> Result<u64, Problem> {
        self.get(key).ok_or_else(|| Problem::Illegal(format!("{} without {key}", self.format)))
    }

    pub(super) fn flag(&self, key: &str, default: bool) -> bool {
        self.get(key).map_or(default, |value| value != 0)
    }

    /// A small number between two others.
    pub(super) fn number(&self, key: &str, default: u64, lowest: u64, highest: u64) -> Result<u32, Problem> {
        match self.get(key).unwrap_or(default) {
            value if (lowest..=highest).contains(&value) && value <= u64::from(u32::MAX) => Ok(value as u32),
            value => Err(Problem::Illegal(format!("{key} {value}"))),
        }
    }
}

/// A setting's name, its value, and the value that need not be said.
pub(super) type Said = (&'static str, u64, u64);

/// A value that is always said.
pub(super) const ALWAYS: u64 = u64::MAX;

/// A setting that is always said.
pub(super) fn said(name: &'static str, value: impl Into<u64>) -> Said {
    (name, value.into(), ALWAYS)
}

impl TableConfig {
    /// Reads a format's name and settings; `root` is one of the settings. Unknown settings other than zero are refused, so that none goes unnoticed.
    ///
    /// # Errors
    /// [`Problem::Unsupported`] for an unknown format or setting, [`Problem::Illegal`] for a missing or impossible one.
    pub fn from_settings(format: &str, settings: &Settings) -> Result<TableConfig, Problem> {
        let reader = &Reader { format, settings };
        let config = match format {
            "arm-smmuv3/stage1" => TableConfig::ArmStage1(ArmStage1::read(reader)?),
            "arm-smmuv3/stage2" => TableConfig::ArmStage2(ArmStage2::read(reader)?),
            "intel-vtd/first-stage" => TableConfig::VtdFirst(VtdFirst::read(reader)?),
            "intel-vtd/second-stage" => TableConfig::VtdSecond(VtdSecond::read(reader)?),
            "amd-vi/v1" => TableConfig::AmdV1(AmdV1::read(reader)?),
            "amd-vi/v2" => TableConfig::AmdV2(AmdV2::read(reader)?),
            "riscv-iommu/first-stage" => TableConfig::RiscvFirst(RiscvFirst::read(reader)?),
            "riscv-iommu/second-stage" => TableConfig::RiscvSecond(RiscvSecond::read(reader)?),
            "s390-zpci/dma" => TableConfig::S390(S390::read(reader)?),
            "loongarch/paging" => TableConfig::LoongArch(LoongArch::read(reader)?),
            "apple-dart/dart1" | "apple-dart/dart2" => TableConfig::Dart(Dart::read(reader, format)?),
            "arm-v7s/short" => TableConfig::V7s(V7s::read(reader)?),
            _ => return Err(Problem::Unsupported(format!("format {format}"))),
        };
        config.regions()?;
        Ok(config)
    }

    /// The format's name.
    pub fn format(&self) -> &'static str {
        match self {
            TableConfig::ArmStage1(_) => "arm-smmuv3/stage1",
            TableConfig::ArmStage2(_) => "arm-smmuv3/stage2",
            TableConfig::VtdFirst(_) => "intel-vtd/first-stage",
            TableConfig::VtdSecond(_) => "intel-vtd/second-stage",
            TableConfig::AmdV1(_) => "amd-vi/v1",
            TableConfig::AmdV2(_) => "amd-vi/v2",
            TableConfig::RiscvFirst(_) => "riscv-iommu/first-stage",
            TableConfig::RiscvSecond(_) => "riscv-iommu/second-stage",
            TableConfig::S390(_) => "s390-zpci/dma",
            TableConfig::LoongArch(_) => "loongarch/paging",
            TableConfig::Dart(config) => config.format(),
            TableConfig::V7s(_) => "arm-v7s/short",
        }
    }

    /// The settings, `root` among them; those that have their default value may be left out.
    pub fn settings(&self) -> Settings {
        let all = match self {
            TableConfig::ArmStage1(config) => config.said(),
            TableConfig::ArmStage2(config) => config.said(),
            TableConfig::VtdFirst(config) => config.said(),
            TableConfig::VtdSecond(config) => config.said(),
            TableConfig::AmdV1(config) => config.said(),
            TableConfig::AmdV2(config) => config.said(),
            TableConfig::RiscvFirst(config) => config.said(),
            TableConfig::RiscvSecond(config) => config.said(),
            TableConfig::S390(config) => config.said(),
            TableConfig::LoongArch(config) => config.said(),
            TableConfig::Dart(config) => config.said(),
            TableConfig::V7s(config) => config.said(),
        };
        all.into_iter().filter(|(_, value, default)| value != default).map(|(key, value, _)| (key.to_string(), value)).collect()
    }
}
