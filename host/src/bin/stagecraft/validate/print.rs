//! The report, for people and for programs.

use std::io::Write;

use anyhow::Result;
use serde_json::{Value, json};
use stagecraft::table::{Severity, Step};

use super::{Report, Violation};
use crate::json::{self, Separator};
use crate::output::{BAD, DIM, FEW, GOOD, HEAD, WARN, count, counted, printable};
use crate::translate::write_path;
use crate::view::stream_name;

const fn word(severity: Severity) -> &'static str {
    match severity {
        Severity::Error => "error",
        Severity::Warning => "warning",
        Severity::Info => "info",
    }
}

/// The fixed form.
pub fn json(out: &mut impl Write, report: &Report<'_>) -> Result<()> {
    write!(out, "{{\"version\":{},\"violations\":[", json::VERSION)?;
    let mut separator = Separator::default();
    for violation in &report.violations {
        write!(out, "{}{}", separator.next(), object(violation))?;
    }
    writeln!(out, "],\"errors\":{},\"warnings\":{}}}", report.errors, report.warnings)?;
    Ok(out.flush()?)
}

fn object(violation: &Violation<'_>) -> Value {
    let step = |step: &Step| json!({"level": step.number, "table": json::hex(step.table.0), "index": step.index, "entry": step.entry.map(json::hex)});
    let last = violation.path.last();
    let mut object = json!({
        "id": json::hex(violation.stream.id),
        "pasid": violation.stream.pasid,
        "shared": violation.shared.iter().map(|stream| json::stream((stream.id, stream.pasid))).collect::<Vec<_>>(),
        "severity": word(violation.severity),
        "kind": violation.kind,
        "stage": violation.stage,
        "iova": violation.span.map(|span| json::hex(span.first)),
        "last": violation.span.map(|span| json::hex(span.last)),
        "level": last.map(|step| step.number),
        "path": violation.path.iter().map(step).collect::<Vec<_>>(),
        "entry": last.and_then(|step| step.entry).map(json::hex),
        "bits": violation.bits.map(json::hex),
        "section": violation.section,
        "reason": violation.reason,
        "count": violation.count,
    });
    if let Some((address, word)) = violation.structure {
        object["structure"] = json!({"address": json::hex(address.0), "word": word});
    }
    object
}

/// The summary first, then one paragraph per violation.
pub fn human(out: &mut impl Write, report: &Report<'_>, all: bool) -> Result<()> {
    let (streams, tables) = (counted(report.streams as u64, "stream", "streams"), counted(report.tables as u64, "table", "tables"));
    let errors =
        if report.errors == 0 { format!("{GOOD}no errors{GOOD:#}") } else { format!("{BAD}{}{BAD:#}", counted(report.errors, "error", "errors")) };
    let warnings = match report.warnings {
        0 => "no warnings".to_owned(),
        warnings => format!("{WARN}{}{WARN:#}", counted(warnings, "warning", "warnings")),
    };
    writeln!(out, "{HEAD}{streams}, {tables}{HEAD:#}: {errors}, {warnings}")?;
    let mut order: Vec<&Violation<'_>> = report.violations.iter().collect();
    order.sort_by_key(|violation| violation.severity);
    let shown = if all { order.len() } else { order.len().min(FEW) };
    for violation in &order[..shown] {
        writeln!(out)?;
        paragraph(out, violation)?;
    }
    if order.len() > shown {
        writeln!(out, "\n{DIM}and {} more (--all){DIM:#}", count((order.len() - shown) as u64))?;
    }
    let unrecorded = (report.errors + report.warnings).saturating_sub(order.len() as u64);
    if unrecorded > 0 {
        writeln!(out, "\n{DIM}{} more were counted and not recorded (--max){DIM:#}", count(unrecorded))?;
    }
    Ok(out.flush()?)
}

fn paragraph(out: &mut impl Write, violation: &Violation<'_>) -> Result<()> {
    let style = if violation.severity == Severity::Error { BAD } else { WARN };
    write!(out, "{style}{}: {}{style:#}  device {}", word(violation.severity), violation.kind, printable(&stream_name(violation.stream)))?;
    match violation.shared.len() {
        0 => {}
        others => write!(out, " and {others} more")?,
    }
    if let Some(span) = violation.span {
        write!(out, ", IOVA {span}")?;
    }
    writeln!(out)?;
    let section = violation.section.as_ref().map_or(String::new(), |section| format!(" ({section})"));
    writeln!(out, "  {}", printable(&format!("{}{section}", violation.reason)))?;
    match (violation.bits, violation.structure) {
        (Some(bits), Some((address, word))) => writeln!(out, "  bits {bits:#018x} of 64-bit word {word} of the structure at {:#x}", address.0)?,
        (Some(bits), None) => writeln!(out, "  bits {bits:#018x} of the entry")?,
        (None, Some((address, _))) => writeln!(out, "  the structure at {:#x}", address.0)?,
        (None, None) => {}
    }
    if violation.count > 1 {
        writeln!(out, "  {}, of which the first:", counted(violation.count, "entry", "entries"))?;
    }
    write_path(out, violation.stage, &violation.path)
}
