//! One guest for two readers: tables' settings in the plugins' words and in the reference's, and a snapshot as the library loads it.
#![allow(dead_code)]

use std::path::Path;
use std::sync::OnceLock;

use stagecraft::Gpa;
use stagecraft::memory::{EntryLayout, EntryMemory, ReadError};
use stagecraft::plugin::{Config, Engine, Plugins, TableConfig};
use stagecraft::table::{Arena, ByteOrder};
use stagecraft_tests::reference::snapshot::{Memory, Snapshot};
use stagecraft_tests::reference::tables::{self, ArmHalf, ArmStage1, ArmStage2, VtdFirst, VtdSecond};

/// The reference's memory, for the engine.
pub struct View<'a>(pub &'a Memory);

impl EntryMemory for View<'_> {
    fn read_entries(&self, address: Gpa, layout: EntryLayout, entries: &mut [u64]) -> Result<(), ReadError> {
        let (bytes, big) = (u64::from(layout.bytes), layout.order == ByteOrder::Big);
        for (place, entry) in (address.0..).step_by(bytes as usize).zip(entries) {
            let read = if bytes == 8 { self.0.read(place, big) } else { self.0.read4(place, big) };
            *entry = read.map_err(|_| ReadError(Gpa(place)))?;
        }
        Ok(())
    }
}

/// Formats whose tables always have a root named `root`.
const HAS_ONE_ROOT: &[&str] = &["amd-vi/v1", "amd-vi/v2", "riscv-iommu/first-stage", "riscv-iommu/second-stage", "s390-zpci/dma"];

/// The plugins' settings for what the reference found or generated.
pub fn plugin_config(config: &tables::TableConfig) -> TableConfig {
    let mut table = TableConfig::new(config.format(), &[]);
    let mut set = |name: &str, value: u64| table.settings.set(name, value);
    match *config {
        tables::TableConfig::ArmStage1(config) => {
            let any = config.low.or(config.high).expect("a half");
            set("granule", any.granule);
            set("input-bits", any.input_bits.into());
            match config.low {
                Some(low) => {
                    set("root", low.root);
                    set("tbi", low.top_byte_ignored.into());
                    set("hierarchy-disabled", low.hierarchical_disabled.into());
                }
                None => set("low-disabled", 1),
            }
            if let Some(high) = config.high {
                set("granule-high", high.granule);
                set("input-bits-high", high.input_bits.into());
                set("root-high", high.root);
                set("tbi-high", high.top_byte_ignored.into());
                set("hierarchy-disabled-high", high.hierarchical_disabled.into());
            }
            set("output-bits", config.output_bits.into());
            set("mair", config.mair);
            set("hardware-access", config.hardware_access.into());
            set("hardware-dirty", config.hardware_dirty.into());
            set("access-flag-disabled", config.access_flag_disabled.into());
            set("hardware-table-access", config.hardware_tables.into());
            set("big-endian", config.big_endian.into());
            let wide = [config.low, config.high].into_iter().flatten().any(|half| half.granule != 65536);
            set("lpa2", (config.lpa2 && wide).into());
            if config.lpa && config.output_bits != 52 {
                set("lpa", 1);
            }
            set("privileged", config.privileged.into());
        }
        tables::TableConfig::ArmStage2(config) => {
            set("granule", config.granule);
            set("input-bits", config.input_bits.into());
            set("output-bits", config.output_bits.into());
            set("start-level", if config.start_level < 0 { 255 } else { config.start_level as u64 });
            set("root", config.root);
            set("hardware-access", config.hardware_access.into());
            set("hardware-dirty", config.hardware_dirty.into());
            set("access-flag-disabled", config.access_flag_disabled.into());
            set("hardware-table-access", config.hardware_tables.into());
            set("big-endian", config.big_endian.into());
            set("protected-walk", config.protected_walk.into());
            set("lpa2", (config.lpa2 && config.granule != 65536).into());
            if config.lpa && config.output_bits != 52 {
                set("lpa", 1);
            }
        }
        tables::TableConfig::VtdFirst(config) => {
            set("levels", config.levels.into());
            set("root", config.root);
            set("output-bits", config.output_bits.into());
            set("page-1g", config.large_1g.into());
            set("extended-access", config.extended_access.into());
        }
        tables::TableConfig::VtdSecond(config) => {
            set("levels", config.levels.into());
            set("root", config.root);
            set("output-bits", config.output_bits.into());
            set("input-bits", config.input_bits.into());
            set("page-2m", config.large_2m.into());
            set("page-1g", config.large_1g.into());
            set("snoop-control", config.snoop_control.into());
            set("accessed-dirty", config.accessed_dirty.into());
        }
        // The reference has the plugins' own words for the other formats.
        _ => config.settings().into_iter().for_each(|(name, value)| table.settings.set(&name, value)),
    }
    table
}

/// The reference's settings for what a plugin found or a conversion made; none for what the reference does not know.
pub fn reference_config(table: &TableConfig) -> Option<tables::TableConfig> {
    let get = |name: &str, default: u64| table.settings.get(name).unwrap_or(default);
    let flag = |name: &str| get(name, 0) != 0;
    Some(match table.format.as_str() {
        "arm-smmuv3/stage1" => {
            let privileged = flag("privileged") || flag("single-privilege");
            if flag("pan") && privileged {
                return None;
            }
            let half = |suffix: &str, granule: u64, input_bits: u64| {
                let flag = |name: &str| flag(&format!("{name}{suffix}"));
                let half = ArmHalf {
                    root: get(&format!("root{suffix}"), 0),
                    granule,
                    input_bits: input_bits as u32,
                    top_byte_ignored: flag("tbi"),
                    hierarchical_disabled: flag("hierarchy-disabled"),
                };
                // Unprivileged requests fault there, whatever the tables say.
                (!flag("unprivileged-disabled") || privileged).then_some(half)
            };
            let (granule, input_bits) = (get("granule", 4096), get("input-bits", 48));
            let has_high = table.settings.get("root-high").is_some() || table.settings.get("input-bits-high").is_some();
            let low = if flag("low-disabled") { None } else { half("", granule, input_bits) };
            let high = if has_high { half("-high", get("granule-high", granule), get("input-bits-high", input_bits)) } else { None };
            let has_64k = [low, high].into_iter().flatten().any(|half| half.granule == 65536);
            tables::TableConfig::ArmStage1(ArmStage1 {
                low,
                high,
                output_bits: get("output-bits", 48) as u32,
                mair: get("mair", 0),
                hardware_access: flag("hardware-access"),
                hardware_dirty: flag("hardware-dirty"),
                access_flag_disabled: flag("access-flag-disabled"),
                hardware_tables: flag("hardware-table-access"),
                big_endian: flag("big-endian"),
                lpa: has_64k && (flag("lpa") || get("output-bits", 48) == 52),
                lpa2: flag("lpa2"),
                privileged,
            })
        }
        "arm-smmuv3/stage2" => {
            let (granule, input_bits, lpa2) = (get("granule", 4096), get("input-bits", 48), flag("lpa2"));
            let page_bits = granule.trailing_zeros();
            // As few levels as it takes; the 16K granule has a level 0 only with 52-bit addresses.
            let start = 4 - (input_bits as u32 - page_bits).div_ceil(page_bits - 3) as i32;
            let start = if granule == 16384 && start == 0 && !lpa2 { 1 } else { start };
            tables::TableConfig::ArmStage2(ArmStage2 {
                root: get("root", 0),
                granule,
                input_bits: input_bits as u32,
                output_bits: get("output-bits", 48) as u32,
                start_level: match table.settings.get("start-level") {
                    Some(255) => -1,
                    Some(level) => level as i32,
                    None => start,
                },
                hardware_access: flag("hardware-access"),
                hardware_dirty: flag("hardware-dirty"),
                access_flag_disabled: flag("access-flag-disabled"),
                hardware_tables: flag("hardware-table-access"),
                big_endian: flag("big-endian"),
                lpa: granule == 65536 && (flag("lpa") || get("output-bits", 48) == 52),
                lpa2,
                protected_walk: flag("protected-walk"),
            })
        }
        "intel-vtd/first-stage" => {
            if flag("privileged") {
                return None;
            }
            tables::TableConfig::VtdFirst(VtdFirst {
                root: get("root", 0),
                levels: get("levels", 4) as u32,
                output_bits: get("output-bits", 48) as u32,
                large_1g: get("page-1g", 1) != 0,
                execute_disable: true,
                extended_access: flag("extended-access"),
            })
        }
        "intel-vtd/second-stage" => {
            if flag("io-permissions") {
                return None;
            }
            let levels = get("levels", 4) as u32;
            tables::TableConfig::VtdSecond(VtdSecond {
                root: get("root", 0),
                levels,
                input_bits: (get("input-bits", 57) as u32).min(12 + 9 * levels),
                output_bits: get("output-bits", 48) as u32,
                large_2m: get("page-2m", 1) != 0,
                large_1g: get("page-1g", 1) != 0,
                snoop_control: flag("snoop-control"),
                accessed_dirty: flag("accessed-dirty"),
            })
        }
        format => {
            let settings = table.settings.iter().map(|(name, value)| (name.to_owned(), value)).chain([("root".to_owned(), 0)]);
            let mut given = tables::Settings::new();
            for (name, value) in settings {
                given.entry(name).or_insert(value);
            }
            // The roots that a table has are said; the reference needs one where there is only one.
            if !HAS_ONE_ROOT.contains(&format) && table.settings.get("root").is_none() {
                given.remove("root");
            }
            tables::TableConfig::from_settings(format, &given).ok()?
        }
    })
}

/// The built-in plugins, compiled once for all tests of a program.
pub fn plugins() -> &'static Plugins {
    static PLUGINS: OnceLock<Plugins> = OnceLock::new();
    PLUGINS.get_or_init(|| Plugins::builtin(&Engine::new(Config::default()).expect("an engine")).expect("the built-in plugins"))
}

/// The same guest as the engine reads it: through a folder.
pub fn load(snapshot: &Snapshot, folder: &Path) -> stagecraft::snapshot::Snapshot {
    use stagecraft::snapshot::{Source, Stream, StreamEntry};
    use stagecraft_tests::reference::snapshot::TableState;
    snapshot.write_snapshot(folder).expect("a snapshot is written");
    let mut loaded = stagecraft::snapshot::Snapshot::load(folder).expect("what was written can be read");
    if snapshot.registers.is_empty() {
        // The reference has its own names of settings.
        let stream = |state: &TableState| match state {
            TableState::Bypass => Stream::Bypass,
            TableState::Blocked(reason) => Stream::Blocked(reason.clone()),
            TableState::Tables(config) => {
                let table = plugin_config(config);
                let settings = table.settings.iter().map(|(name, value)| (name.to_owned(), value)).collect();
                Stream::Table { format: table.format, settings }
            }
        };
        let entries = snapshot.tables.iter().map(|entry| StreamEntry {
            id: entry.id,
            pasid: entry.pasid.map(|pasid| pasid as u32),
            stream: stream(&entry.state),
        });
        loaded.source = Source::Tables(entries.collect());
    }
    loaded
}

/// The pages of tables that were built, for the reference.
pub fn arena_memory(arena: &Arena) -> Memory {
    let mut memory = Memory::default();
    for (address, words) in arena.pages() {
        let mut page = [0; 4096];
        for (bytes, word) in page.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
        memory.pages.insert(address.0, page.into());
    }
    memory
}
