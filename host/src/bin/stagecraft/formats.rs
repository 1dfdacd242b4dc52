//! `stagecraft formats`: the plugins that there are, their table formats, settings and limits.

use std::io::Write;

use anyhow::{Result, bail};
use clap::Args;
use serde_json::{Value, json};
use stagecraft::plugin::{FormatManifest, Limits, Manifest, Origin, TableConfig};
use stagecraft::table::{Format as _, Geometry};

use crate::failure::Status;
use crate::json;
use crate::options::Global;
use crate::output::{Cell, Columns, DIM, HEAD, counted, human, printable, raw, size};
use crate::session::Session;

/// List the plugins, their table formats, settings and limits
///
/// For each format: what its tables can say with the settings at their defaults. The settings themselves are listed for formats that are named, and with
/// --all.
#[derive(Args, Debug)]
pub struct Arguments {
    /// Only these formats, such as intel-vtd/first-stage, or the formats of these plugins, such as intel-vtd
    names: Vec<String>,
    /// List the settings of all formats
    #[arg(long)]
    all: bool,
}

/// A plugin, and those of its formats that were asked for, each with its geometry at the defaults.
struct Listed<'a> {
    manifest: &'a Manifest,
    origin: &'a Origin,
    formats: Vec<(&'a FormatManifest, Geometry)>,
}

/// Runs the command.
pub fn run(global: &Global, arguments: &Arguments) -> Result<Status> {
    let session = Session::new(global)?;
    let listed = listed(&session, &arguments.names)?;
    let limits = session.plugins.engine().limits();
    if global.json() {
        let mut out = raw();
        writeln!(out, "{:#}", report(&listed, limits))?;
        out.flush()?;
    } else {
        write_human(&mut human(), &listed, limits, arguments.all || !arguments.names.is_empty())?;
    }
    Ok(Status::Good)
}

fn listed<'a>(session: &'a Session, names: &[String]) -> Result<Vec<Listed<'a>>> {
    for name in names {
        if !session.plugins.iter().any(|(manifest, _)| manifest.name == *name || manifest.format(name).is_some()) {
            // The error lists the formats that there are.
            session.plugins.by_format(name)?;
            bail!("no format `{}`", printable(name));
        }
    }
    let mut listed = Vec::new();
    for (manifest, origin) in session.plugins.iter() {
        let wanted = |format: &&FormatManifest| names.is_empty() || names.iter().any(|name| *name == manifest.name || *name == format.name);
        let mut formats = Vec::new();
        for format in manifest.formats.iter().filter(wanted) {
            let mut opened = session.plugins.by_format(&format.name)?.open(&TableConfig::new(&format.name, &[]))?;
            let geometry = opened.geometry().map_err(|error| anyhow::anyhow!("{}: {error}", format.name))?;
            formats.push((format, geometry));
        }
        if !formats.is_empty() {
            listed.push(Listed { manifest, origin, formats });
        }
    }
    Ok(listed)
}

/// Sizes of pages that a builder can make, smallest first.
fn page_sizes(geometry: &Geometry) -> Vec<u64> {
    let all = geometry.levels.iter().fold(0, |all, level| all | level.leaf_sizes);
    (0..64).filter(|log2| all >> log2 & 1 != 0).map(|log2| 1 << log2).collect()
}

fn report(listed: &[Listed<'_>], limits: &Limits) -> Value {
    let format = |(format, geometry): &(&FormatManifest, Geometry)| {
        let setting = |setting: &stagecraft::plugin::SettingManifest| {
            let default = setting.default.map(|value| if value >> 53 != 0 { json::hex(value) } else { Value::from(value) });
            json!({"name": setting.name, "default": default, "allowed": setting.allowed, "description": setting.description})
        };
        let range = |root: &stagecraft::table::Root| json!({"first": json::hex(root.first), "last": json::hex(root.last)});
        json!({
            "name": format.name,
            "description": format.description,
            "section": format.section,
            "settings": format.settings.iter().map(setting).collect::<Vec<_>>(),
            "limits": {
                "input": geometry.roots.iter().map(range).collect::<Vec<_>>(),
                "output-bits": geometry.output_bits,
                "page-sizes": page_sizes(geometry),
                "entry-bytes": geometry.entry_bytes,
            },
        })
    };
    let plugin = |listed: &Listed<'_>| {
        json!({
            "name": listed.manifest.name,
            "version": listed.manifest.version,
            "description": listed.manifest.description,
            "origin": listed.origin.to_string(),
            "contract": listed.manifest.contract,
            "registers": listed.manifest.registers,
            "formats": listed.formats.iter().map(format).collect::<Vec<_>>(),
        })
    };
    json!({
        "version": json::VERSION,
        "limits": {
            "component-bytes": limits.component_bytes,
            "memory-bytes": limits.memory_bytes,
            "cold-call-ms": limits.cold.as_millis() as u64,
            "warm-call-ms": limits.warm.as_millis() as u64,
            "instances": limits.instances,
        },
        "plugins": listed.iter().map(plugin).collect::<Vec<_>>(),
    })
}

fn write_human(out: &mut impl Write, listed: &[Listed<'_>], limits: &Limits, settings: bool) -> Result<()> {
    for Listed { manifest, origin, formats } in listed {
        let name = &manifest.name;
        writeln!(out, "{HEAD}{name}{HEAD:#} {} ({origin})  {}", manifest.version, printable(&manifest.description))?;
        for (format, geometry) in formats {
            write_format(out, format, geometry, settings)?;
        }
        writeln!(out)?;
    }
    if listed.is_empty() {
        writeln!(out, "no plugins; --plugins names a folder with some")?;
    }
    let (memory, cold, warm) = (size(limits.memory_bytes as u128), limits.cold, limits.warm);
    writeln!(out, "{DIM}Each instance of a plugin: {memory} of memory, {cold:?} for a cold call, {warm:?} for a warm one.{DIM:#}")?;
    if !settings {
        writeln!(out, "{DIM}Limits are those of the default settings; `stagecraft formats NAME` lists the settings.{DIM:#}")?;
    }
    Ok(out.flush()?)
}

fn write_format(out: &mut impl Write, format: &FormatManifest, geometry: &Geometry, settings: bool) -> Result<()> {
    writeln!(out, "  {HEAD}{}{HEAD:#}", format.name)?;
    writeln!(out, "    {}", printable(&format.description))?;
    if !format.section.is_empty() {
        writeln!(out, "    {DIM}{}{DIM:#}", printable(&format.section))?;
    }
    let mut rows = Columns::new(4, &[]);
    let ranges: Vec<String> = geometry.roots.iter().map(|root| format!("{:#x}..={:#x}", root.first, root.last)).collect();
    rows.row([Cell::styled("IOVA", DIM), ranges.join(", ").into()]);
    rows.row([Cell::styled("addresses", DIM), format!("below 2^{}", geometry.output_bits).into()]);
    let sizes: Vec<String> = page_sizes(geometry).into_iter().map(|bytes| size(bytes.into())).collect();
    rows.row([Cell::styled("pages", DIM), sizes.join(", ").into()]);
    if !settings {
        rows.row([Cell::styled("settings", DIM), counted(format.settings.len() as u64, "setting", "settings").into()]);
    }
    rows.write(out)?;
    if settings {
        let mut columns = Columns::new(4, &["SETTING", "DEFAULT", "ALLOWED", "MEANING"]).right(&[1]);
        for setting in &format.settings {
            let default = match setting.default {
                Some(value) if value >> 32 != 0 => format!("{value:#x}"),
                Some(value) => value.to_string(),
                None => "-".to_owned(),
            };
            columns.row([setting.name.as_str().into(), default.into(), printable(&setting.allowed).into(), printable(&setting.description).into()]);
        }
        columns.write(out)?;
    }
    Ok(())
}
