//! `stagecraft offers`: which table formats a real unit accepts, and which of them suits a guest.

use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde_json::{Map, Value, json};
use stagecraft::convert::Target;
use stagecraft::guest::{Guest, StreamState};
use stagecraft::offers::{Choice, Hardware, Rejection, offers, pick};
use stagecraft::plugin::Offer;

use crate::failure::{Status, complain};
use crate::json;
use crate::numbers::number;
use crate::options::Global;
use crate::output::{BAD, Cell, Columns, DIM, GOOD, HEAD, WARN, human, printable, raw};
use crate::session::{Session, load};
use crate::view::whole_streams;

/// List the table formats that a real IOMMU accepts of its users, and say which suits a guest
///
/// The kernel describes a unit as a type and some bytes (`iommu_hw_info` of iommufd). Given a snapshot as well, its tables are compared with what is offered:
/// bound as they are if they have the format already, else converted to the offer that loses least.
///
/// Exit status 1 if nothing is offered, or nothing that is offered fits.
#[derive(Args, Debug)]
pub struct Arguments {
    /// The unit: type and bytes of its iommu_hw_info, as TYPE:HEX or TYPE:@FILE
    #[arg(value_name = "HARDWARE", value_parser = hardware)]
    hardware: Hardware,
    /// Folder with snapshot.json and pages.bin: the guest that looks for a unit
    snapshot: Option<PathBuf>,
}

/// Most bytes of a unit's description.
const MOST_BYTES: usize = 4096;

/// `type:hex`, or `type:@file` with the bytes in a file.
pub fn hardware(text: &str) -> Result<Hardware, String> {
    let Some((kind, info)) = text.split_once(':') else {
        return Err("TYPE:HEX or TYPE:@FILE is expected, such as 1:00000000...".to_owned());
    };
    let kind = number(kind).ok().and_then(|kind| u32::try_from(kind).ok()).ok_or_else(|| format!("`{kind}` is no iommu_hw_info type"))?;
    let info = match info.strip_prefix('@') {
        Some(path) => read(path).map_err(|error| format!("{path}: {error}"))?,
        None => bytes(info)?,
    };
    if info.len() > MOST_BYTES {
        return Err(format!("more than {MOST_BYTES} bytes, and a unit's description has at most so many"));
    }
    Ok(Hardware { kind, info })
}

/// Reads a file as far as its length is looked at. A pipe would be waited for, and a device may never end.
fn read(path: &str) -> std::io::Result<Vec<u8>> {
    if !std::fs::metadata(path)?.is_file() {
        return Err(std::io::Error::other("not a file"));
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(MOST_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn bytes(text: &str) -> Result<Vec<u8>, String> {
    let digits: Option<Vec<u8>> = text.strip_prefix("0x").unwrap_or(text).chars().map(|digit| digit.to_digit(16).map(|digit| digit as u8)).collect();
    match digits {
        Some(digits) if digits.len().is_multiple_of(2) => Ok(digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect()),
        _ => Err("pairs of hex digits are expected, in the order in which the bytes stand in memory".to_owned()),
    }
}

/// Runs the command.
pub fn run(global: &Global, arguments: &Arguments) -> Result<Status> {
    let session = Session::new(global)?;
    let offered = offers(&session.plugins, &arguments.hardware)?;
    let choice = match &arguments.snapshot {
        Some(path) => {
            let snapshot = load(path)?;
            let guest = session.guest(&snapshot)?;
            let streams = match whole_streams(&guest, &snapshot.devices)? {
                Ok(streams) => streams,
                Err(status) => return Ok(status),
            };
            Some(choose(&guest, &streams, &offered, Target::new("").table_bytes)?)
        }
        None => None,
    };
    if global.json() {
        let mut out = raw();
        writeln!(out, "{:#}", report(&offered, choice.as_ref()))?;
        out.flush()?;
    } else {
        write_human(&mut human(), &offered, choice.as_ref())?;
    }
    Ok(status(&offered, choice.as_ref()))
}

/// Picks among offers.
pub fn choose(guest: &Guest<'_>, streams: &[StreamState], offered: &[Offer], table_bytes: u64) -> Result<Choice> {
    Ok(pick(guest, streams, offered, table_bytes)?)
}

/// Complains if there is nothing to pick.
pub fn status(offered: &[Offer], choice: Option<&Choice>) -> Status {
    match choice {
        _ if offered.is_empty() => complain("this unit takes no tables of its users: it has no nesting that the kernel supports"),
        Some(Choice::Nothing(rejections)) => {
            let reasons: Vec<String> = rejections.iter().map(Rejection::to_string).collect();
            complain(&format!("nothing that is offered fits: {}", reasons.join("; ")));
        }
        _ => return Status::Good,
    }
    Status::Found
}

fn report(offered: &[Offer], choice: Option<&Choice>) -> Value {
    let limit = |(name, value): &(String, u64)| (name.clone(), Value::from(*value));
    let offer = |offer: &Offer| json!({"format": offer.format, "limits": offer.limits.iter().map(limit).collect::<Map<_, _>>(), "conditions": offer.conditions});
    json!({"version": json::VERSION, "offers": offered.iter().map(offer).collect::<Vec<_>>(), "choice": choice.map(choice_json)})
}

fn choice_json(choice: &Choice) -> Value {
    let rejections = |rejections: &[Rejection]| -> Value {
        rejections.iter().map(|rejection| json!({"format": rejection.format, "reasons": rejection.reasons})).collect()
    };
    match choice {
        Choice::Native { offer } => json!({"kind": "native", "format": offer.format, "settings": {}, "tables": 0, "narrowed": [], "rejections": []}),
        Choice::Convert { offer, target, conversion, others } => {
            let losses = conversion.tables.iter().flat_map(|table| table.built.losses.iter().map(|(loss, _)| loss.as_str()));
            let mut narrowed: Vec<&str> = losses.collect();
            narrowed.sort_unstable();
            narrowed.dedup();
            json!({
                "kind": "convert",
                "format": offer.format,
                "settings": json::settings(&target.settings),
                "tables": conversion.tables.len(),
                "narrowed": narrowed,
                "rejections": rejections(others),
            })
        }
        Choice::Nothing(all) => {
            json!({"kind": "nothing", "format": null, "settings": {}, "tables": 0, "narrowed": [], "rejections": rejections(all)})
        }
    }
}

fn write_human(out: &mut impl Write, offered: &[Offer], choice: Option<&Choice>) -> Result<()> {
    for offer in offered {
        writeln!(out, "{HEAD}{}{HEAD:#}", offer.format)?;
        let mut rows = Columns::new(2, &["SETTING", "LIMIT"]).right(&[1]);
        for (name, value) in &offer.limits {
            let sizes: Vec<String> = (12..64).map(|log2| 1_u64 << log2).filter(|size| value & size != 0).map(|size| size.to_string()).collect();
            let text = if *value >= 4096 { sizes.join(", ") } else { value.to_string() };
            rows.row([name.as_str().into(), Cell::from(text)]);
        }
        rows.write(out)?;
        for condition in &offer.conditions {
            writeln!(out, "  {WARN}note{WARN:#} {}", printable(condition))?;
        }
    }
    match choice {
        None | Some(Choice::Nothing(_)) => {}
        Some(Choice::Native { offer }) => {
            writeln!(out, "\n{GOOD}bind as it is{GOOD:#}: the guest's tables have the format {} already, within these limits", offer.format)?;
        }
        Some(Choice::Convert { offer, target, others, .. }) => {
            let settings: Vec<String> = target.settings.iter().map(|(name, value)| format!("--set {name}={value}")).collect();
            writeln!(out, "\n{GOOD}convert{GOOD:#} --to {} {}", offer.format, printable(&settings.join(" ")))?;
            for rejection in others {
                writeln!(out, "  {DIM}{}{DIM:#}", printable(&rejection.to_string()))?;
            }
        }
    }
    if let Some(Choice::Nothing(rejections)) = choice {
        writeln!(out, "\n{BAD}nothing fits{BAD:#}")?;
        for rejection in rejections {
            writeln!(out, "  {}", printable(&rejection.to_string()))?;
        }
    }
    Ok(out.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_is_a_type_and_bytes() {
        let found = hardware("4:0001fe").expect("good");
        assert_eq!((found.kind, &*found.info), (4, &[0, 1, 0xfe][..]));
        for bad in ["4", "x:00", "4:0", "4:0g", "4:@/no/such/file", "4294967296:00"] {
            assert!(hardware(bad).is_err(), "{bad}");
        }
    }
}
