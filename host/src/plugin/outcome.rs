//! What a plugin finds out about a requester: everything is checked, nothing is trusted.

use crate::plugin::bindings::exports::stagecraft::format::detect;
use crate::plugin::error::clean;
use crate::plugin::{TableConfig, words};
use crate::table::{Intercept, Window};
use crate::{Attributes, Span};

/// Why a requester is blocked at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockKind {
    /// Nobody set anything up for it, or it is set up to be refused: drivers leave devices that nobody uses so.
    Unused,
    /// Something was set up, and hardware refuses it.
    Refused,
}

/// Every DMA of a requester is refused, and what the architecture would report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocked {
    /// Whether anybody wanted something else.
    pub kind: BlockKind,
    /// The event or fault reason, such as `C_BAD_STE`.
    pub event: String,
    /// Document and section.
    pub section: String,
    /// One sentence in lower case without a full stop.
    pub reason: String,
}

/// By which numbers invalidation commands name an address space; none where the architecture has no such number for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag {
    /// VMID, domain id, GSCID.
    pub domain: Option<u32>,
    /// ASID, PASID, PSCID: within the domain.
    pub space: Option<u32>,
}

/// DMA of some addresses goes to guest-physical memory without any table.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Direct {
    /// Sorted and not overlapping; IOVAs in none of them fault.
    pub windows: Vec<Window>,
    /// Addresses that something else serves.
    pub intercepts: Vec<Intercept>,
}

/// The tables of a requester.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Translated {
    /// One table, or two: the outputs of the first are the inputs of the second.
    pub tables: Vec<TableConfig>,
    /// Addresses that something else serves.
    pub intercepts: Vec<Intercept>,
    /// The name of the address space in invalidation commands.
    pub tag: Tag,
}

impl Translated {
    /// Tables without intercepts, and without a name.
    #[must_use]
    pub fn of(tables: Vec<TableConfig>) -> Self {
        Self { tables, intercepts: Vec::new(), tag: Tag::default() }
    }
}

/// What a requester's DMA gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Guest-physical memory as it is.
    Bypass,
    /// The same for some addresses, at an offset or with less access.
    Direct(Direct),
    /// Nothing.
    Blocked(Blocked),
    /// What tables say.
    Tables(Translated),
}

/// Most windows of one requester.
const MAX_WINDOWS: usize = 16;
/// Most intercepts of one requester.
const MAX_INTERCEPTS: usize = 16;

/// The answer of `lookup`; the reason if it makes no sense. `knows` tells the formats of the plugin's manifest.
pub(super) fn outcome(outcome: detect::Outcome, knows: impl Fn(&str) -> bool) -> Result<Outcome, String> {
    match outcome {
        detect::Outcome::Bypass => Ok(Outcome::Bypass),
        detect::Outcome::Direct(detect::Direct { windows, intercepts }) => {
            Ok(Outcome::Direct(Direct { windows: self::windows(windows)?, intercepts: self::intercepts(intercepts, 0)? }))
        }
        detect::Outcome::Blocked(detect::Blocked { kind, event, section, reason }) => {
            let kind = match kind {
                detect::BlockKind::Unused => BlockKind::Unused,
                detect::BlockKind::Refused => BlockKind::Refused,
            };
            Ok(Outcome::Blocked(Blocked { kind, event: clean(&event), section: clean(&section), reason: clean(&reason) }))
        }
        detect::Outcome::Tables(detect::Translated { tables, intercepts, tag: detect::Tag { domain, space } }) => {
            if tables.is_empty() || tables.len() > 2 {
                return Err(format!("{} tables for one requester; there are 1 and 2", tables.len()));
            }
            let intercepts = self::intercepts(intercepts, tables.len())?;
            let mut configs = Vec::with_capacity(tables.len());
            for table in tables {
                let config = words::table_config(table)?;
                if !knows(&config.format) {
                    return Err(format!("a table of format `{}`, which its manifest does not name", config.format));
                }
                configs.push(config);
            }
            Ok(Outcome::Tables(Translated { tables: configs, intercepts, tag: Tag { domain, space } }))
        }
    }
}

fn windows(windows: Vec<detect::Window>) -> Result<Vec<Window>, String> {
    if windows.is_empty() || windows.len() > MAX_WINDOWS {
        return Err(format!("{} windows for one requester; there are 1 to {MAX_WINDOWS}", windows.len()));
    }
    let mut checked: Vec<Window> = Vec::with_capacity(windows.len());
    for detect::Window { first, last, address, attributes } in windows {
        let Some(iova) = Span::new(first, last) else { return Err(format!("the empty window {first:#x}..={last:#x}")) };
        if address.checked_add(iova.length_minus_one()).is_none() {
            return Err(format!("window {iova} at {address:#x}, beyond the end of all addresses"));
        }
        if checked.last().is_some_and(|before| before.iova.last >= first) {
            return Err("windows that overlap or are not sorted".to_owned());
        }
        let attributes: Attributes = words::attributes(attributes)?;
        checked.push(Window { iova, address, attributes });
    }
    Ok(checked)
}

fn intercepts(intercepts: Vec<detect::Intercept>, tables: usize) -> Result<Vec<Intercept>, String> {
    if intercepts.len() > MAX_INTERCEPTS {
        return Err(format!("{} intercepts for one requester; at most {MAX_INTERCEPTS}", intercepts.len()));
    }
    let check = |detect::Intercept { passed, mask, value, server, address, section }| {
        if usize::from(passed) > tables {
            return Err(format!("an intercept behind {passed} tables; there are {tables}"));
        }
        if value & !mask != 0 {
            return Err(format!("an intercept whose value {value:#x} has bits outside its mask {mask:#x}"));
        }
        Ok(Intercept { passed, mask, value, server: clean(&server), address, section: clean(&section) })
    };
    intercepts.into_iter().map(check).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(first: u64, last: u64, address: u64) -> detect::Window {
        detect::Window { first, last, address, attributes: 3 }
    }

    fn intercept(passed: u8, mask: u64, value: u64) -> detect::Intercept {
        detect::Intercept { passed, mask, value, server: "x".to_owned(), address: None, section: String::new() }
    }

    fn direct(windows: Vec<detect::Window>, intercepts: Vec<detect::Intercept>) -> Result<Outcome, String> {
        outcome(detect::Outcome::Direct(detect::Direct { windows, intercepts }), |_| true)
    }

    #[test]
    fn windows_are_checked() {
        let Ok(Outcome::Direct(found)) = direct(vec![window(0, 0xfff, 0x8000), window(0x1000, u64::MAX, 0)], Vec::new()) else { panic!("refused") };
        assert_eq!(found.windows[0].address, 0x8000);
        let refused = |windows: Vec<detect::Window>, reason: &str| {
            let error = direct(windows, Vec::new()).expect_err("refused");
            assert!(error.contains(reason), "{error}");
        };
        refused(Vec::new(), "0 windows");
        refused((0..17).map(|n| window(n, n, 0)).collect(), "17 windows");
        refused(vec![window(1, 0, 0)], "empty window");
        refused(vec![window(0, 0xfff, u64::MAX - 0xffe)], "beyond the end");
        refused(vec![window(0, 5, 0), window(5, 6, 0)], "overlap");
        refused(vec![detect::Window { attributes: 1 << 10, ..window(0, 5, 0) }], "have no meaning");
    }

    #[test]
    fn intercepts_are_checked() {
        let with = |intercepts| direct(vec![window(0, 5, 0)], intercepts);
        assert!(with(vec![intercept(0, !0xfff, 0x1000); 16]).is_ok());
        assert!(with(vec![intercept(0, !0xfff, 0x1000); 17]).expect_err("refused").contains("17 intercepts"));
        assert!(with(vec![intercept(1, !0xfff, 0x1000)]).expect_err("refused").contains("behind 1 tables; there are 0"));
        assert!(with(vec![intercept(0, !0xfff, 0x1001)]).expect_err("refused").contains("outside its mask"));
    }
}
