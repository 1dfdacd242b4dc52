//! Puts sections, rows and blocks where they belong.
//!
//! ```text
//!   Table #1  format and settings
//!   first IOVA | access, with sizes where there is room   | last IOVA
//!              | page sizes                               | how much of it is mapped
//!              | RAM or device memory                     |
//!                       hole of so much
//!   first IOVA | ...
//! ```
//!
//! Each row has its own scale; longer strips are larger parts of the address space (logarithmically), so that 4 KiB do not look like 4 GiB.

use stagecraft::Access;
use stagecraft::guest::State;
use stagecraft::memory::Kind;
use stagecraft::plugin::Plugins;

use super::Section;
use super::rows::{Block, Row, blocks, rows};
use crate::inspect::{describe, describe_windows};
use crate::output::{count, counted, printable, size};
use crate::svg::Svg;

const WIDTH: u32 = 1200;
const LEFT: f64 = 24.0;
/// Where strips start, and the widest one's width.
const STRIP: (f64, f64) = (196.0, 780.0);
const NARROWEST: f64 = 90.0;
/// Heights of the three strips.
const ACCESS: f64 = 22.0;
const PAGES: f64 = 8.0;
const TARGET: f64 = 5.0;
/// Between rows: room for the size of the hole.
const BETWEEN: f64 = 24.0;
/// Rows of one table.
const MAX_ROWS: usize = 24;
/// Pixels of the narrowest block.
const COLUMN: f64 = 2.0;
/// No further table is begun beyond this: a browser still opens the picture at once.
const MAX_ELEMENTS: u64 = 20_000;
/// Lines for streams without a table.
const MAX_OTHERS: usize = 20;

/// A picture.
pub struct Drawing {
    /// The document.
    pub svg: String,
    /// SVG elements in it.
    pub elements: u64,
    /// Areas that are not drawn one by one.
    pub merged: u64,
    /// Tables that are drawn.
    pub tables: usize,
}

const DEFINITIONS: &str = r##"<style>
text { font-family: "DejaVu Sans", "Segoe UI", Helvetica, Arial, sans-serif; font-size: 11px; fill: #222 }
.title { font-size: 19px; font-weight: bold }
.heading { font-size: 14px; font-weight: bold }
.small { font-size: 11px; fill: #555 }
.first { font-family: "DejaVu Sans Mono", Consolas, monospace; text-anchor: end }
.last { font-family: "DejaVu Sans Mono", Consolas, monospace }
.inside { fill: #fff; text-anchor: middle }
.gap { fill: #777; text-anchor: middle; font-size: 10px }
.hole { fill: #777; font-style: italic }
.rule { stroke: #bbb; stroke-width: 1 }
.empty { fill: #f4f4f4; stroke: #cfcfcf; stroke-width: 0.6 }
</style>
<defs><pattern id="several" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect width="5" height="5" fill="#b8b8b8"/><rect width="2" height="5" fill="#4d4d4d"/></pattern></defs>
<rect width="100%" height="100%" fill="#fff"/>"##;

/// Colours that people with any colour vision can tell apart.
const fn access_fill(access: Option<Access>) -> &'static str {
    match access {
        Some(Access { read: true, write: true }) => "#0072b2",
        Some(Access { read: true, write: false }) => "#009e73",
        Some(Access { write: true, .. }) => "#c77700",
        _ => "url(#several)",
    }
}

/// Classes of page sizes: smallest log2 of each, colour.
const PAGE_CLASSES: [(u8, &str, &str); 4] = [
    (0, "#d8cdea", "pages below 64 KiB"),
    (16, "#b393d3", "64 KiB to 1 MiB"),
    (20, "#7b4fa8", "1 MiB to 512 MiB"),
    (30, "#351a57", "1 GiB and more"),
];

fn page_class(log2: u8) -> usize {
    PAGE_CLASSES.iter().rposition(|(from, ..)| log2 >= *from).unwrap_or(0)
}

fn page_fill((smallest, largest): (u8, u8)) -> &'static str {
    let class = page_class(smallest);
    if class == page_class(largest) { PAGE_CLASSES[class].1 } else { "url(#several)" }
}

const fn kind_fill(kind: Option<Kind>) -> &'static str {
    match kind {
        Some(Kind::Ram) => "#7fc4ee",
        Some(Kind::Device) => "#d9501e",
        Some(Kind::Table) | None => "url(#several)",
    }
}

/// Draws `sections`, and says in words what `others` get.
pub fn draw(description: &str, sections: &[Section], others: &[String], plugins: &Plugins) -> Drawing {
    let mut svg = Svg::new(WIDTH);
    let title = if description.is_empty() { "I/O address spaces".to_owned() } else { printable(description) };
    svg.text((LEFT, 36.0), "title", &clip(&title, 105));
    let mut y = legend(&mut svg, 62.0);
    let (mut merged, mut tables) = (0, 0);
    for (index, section) in sections.iter().enumerate() {
        if svg.elements > MAX_ELEMENTS {
            break;
        }
        tables += 1;
        y = heading(&mut svg, y, index, section, plugins);
        let all = rows(&section.areas, MAX_ROWS);
        let mut before: Option<Row<'_>> = None;
        for row in &all {
            if let Some(before) = before {
                let hole = row.span().first - before.span().last - 1;
                svg.text((STRIP.0, y - 8.0), "hole", &format!("hole of {}", size(hole.into())));
            }
            merged += strip(&mut svg, y, row);
            y += ACCESS + PAGES + TARGET + BETWEEN;
            before = Some(*row);
        }
    }
    if sections.len() > tables {
        y += 16.0;
        svg.text((LEFT, y), "heading", &format!("and {}", counted((sections.len() - tables) as u64, "more table", "more tables")));
        y += 12.0;
    }
    y = list(&mut svg, y, others);
    Drawing { elements: svg.elements, svg: svg.finish(y + 16.0, &title, DEFINITIONS), merged, tables }
}

fn legend(svg: &mut Svg, y: f64) -> f64 {
    let mut swatches = |y: f64, name: &str, all: &[(&str, &str)]| {
        svg.text((LEFT, y + 10.0), "small", name);
        let mut x = 110.0;
        for (fill, text) in all {
            let style = if *fill == "empty" { "class=\"empty\"".to_owned() } else { format!("fill=\"{fill}\"") };
            svg.rect((x, y), (20.0, 12.0), style, "");
            svg.text((x + 26.0, y + 10.0), "label", text);
            x += 52.0 + 6.6 * text.chars().count() as f64;
        }
    };
    let access = [(Some(Access { read: true, write: true }), "read, write"), (Some(Access::READ), "read only"), (Some(Access::WRITE), "write only")];
    let mut first: Vec<(&str, &str)> = access.iter().map(|(access, text)| (access_fill(*access), *text)).collect();
    first.extend([("url(#several)", "several (in any strip)"), ("empty", "hole")]);
    swatches(y, "upper strip", &first);
    swatches(y + 20.0, "middle strip", &PAGE_CLASSES.map(|(_, fill, text)| (fill, text)));
    swatches(y + 40.0, "lower strip", &[(kind_fill(Some(Kind::Ram)), "to RAM"), (kind_fill(Some(Kind::Device)), "to device memory")]);
    let note = "Each row has its own scale; longer strips are larger parts of the address space. Paler: areas too small to stand apart, with holes between them.";
    svg.text((LEFT, y + 74.0), "small", note);
    y + 90.0
}

fn heading(svg: &mut Svg, y: f64, index: usize, section: &Section, plugins: &Plugins) -> f64 {
    svg.line((LEFT, y), (f64::from(WIDTH) - LEFT, y), "rule");
    let mut configs: Vec<String> = section.stream.tables().iter().map(|config| describe(config, plugins)).collect();
    if let State::Direct(windows) = &section.stream.state {
        configs.push(format!("no table, {}", describe_windows(windows)));
    }
    svg.text((LEFT, y + 24.0), "heading", &clip(&format!("Table #{}: {}", index + 1, configs.join(" through ")), 140));
    svg.text((LEFT, y + 42.0), "small", &clip(&format!("used by {}", printable(&section.users.join(", "))), 180));
    let mapped: u128 = section.areas.iter().map(super::areas::Area::bytes).sum();
    let leaves = section.leaves.iter().enumerate().filter(|(_, leaves)| **leaves > 0);
    let leaves: Vec<String> = leaves.map(|(log2, leaves)| format!("{} x {}", count(*leaves), size(1_u128 << log2))).collect();
    let mut text = if leaves.is_empty() { "nothing is mapped".to_owned() } else { format!("{} mapped by {}", size(mapped), leaves.join(", ")) };
    if section.faults > 0 {
        text.push_str(&format!("; {}", counted(section.faults, "entry or range faults", "entries or ranges fault")));
    }
    if let Some(stopped) = &section.stopped {
        text.push_str(&format!("; not all: {stopped}"));
    }
    svg.text((LEFT, y + 58.0), "small", &clip(&text, 180));
    y + if section.areas.is_empty() { 76.0 } else { 84.0 }
}

/// One row; how many areas are not drawn one by one.
fn strip(svg: &mut Svg, y: f64, row: &Row<'_>) -> u64 {
    let (left, widest) = STRIP;
    // 4 KiB are the narrowest strip, 1 TiB and more the widest.
    let scale = ((row.extent() as f64).log2() - 12.0) / (40.0 - 12.0);
    let columns = ((NARROWEST + (widest - NARROWEST) * scale.clamp(0.0, 1.0)) / COLUMN).floor();
    let width = columns * COLUMN;
    let x = |column: u32| left + f64::from(column) * COLUMN;
    let baseline = y + 15.0;
    svg.text((left - 8.0, baseline), "first", &format!("{:#x}", row.span().first));
    svg.rect((left, y), (width, ACCESS + PAGES + TARGET), "class=\"empty\"", "");
    let all = blocks(row, columns as u32);
    let mut before: Option<(u32, u64)> = None;
    for block in &all {
        let (from, wide) = (x(block.first), x(block.last + 1) - x(block.first));
        let opacity = if block.areas > 1 { 0.4 + 0.6 * block.density() } else { 1.0 };
        svg.rect((from, y), (wide, ACCESS), format_args!("fill=\"{}\" fill-opacity=\"{opacity:.2}\"", access_fill(block.access)), &tooltip(block));
        if let Some(text) = inside(block, wide) {
            svg.text((from + wide / 2.0, baseline), "inside", &text);
        }
        if let Some((from, last)) = before {
            let (start, hole) = (x(from), x(block.first) - x(from));
            let text = format!("hole of {}", size(u128::from(block.iova.first - last - 1)));
            if width_of(&text) < hole {
                svg.text((start + hole / 2.0, baseline), "gap", &text);
            }
        }
        before = Some((block.last + 1, block.iova.last));
    }
    thin(svg, &all, y + ACCESS, PAGES, |block| page_fill(block.pages));
    thin(svg, &all, y + ACCESS + PAGES, TARGET, |block| kind_fill(block.kind));
    let right = left + width + 8.0;
    svg.text((right, y + 12.0), "last", &format!("{:#x}", row.span().last));
    let (mapped, extent) = (row.mapped(), row.extent());
    let share = if mapped == extent { size(extent) } else { format!("{} of {} mapped", size(mapped), size(extent)) };
    svg.text((right, y + 28.0), "small", &share);
    all.iter().filter(|block| block.areas > 1).map(|block| block.areas).sum()
}

/// A thin strip: neighbours of one colour are one rectangle.
fn thin(svg: &mut Svg, blocks: &[Block], y: f64, height: f64, fill: impl Fn(&Block) -> &'static str) {
    for run in blocks.chunk_by(|one, next| one.last + 1 == next.first && fill(one) == fill(next)) {
        let (first, last) = (run[0].first, run[run.len() - 1].last);
        let (from, wide) = (STRIP.0 + f64::from(first) * COLUMN, f64::from(last + 1 - first) * COLUMN);
        svg.rect((from, y), (wide, height), format_args!("fill=\"{}\"", fill(&run[0])), "");
    }
}

fn inside(block: &Block, wide: f64) -> Option<String> {
    let access = block.access?.as_str();
    let pages = if block.pages.0 == block.pages.1 { format!(" in {} pages", size(1 << block.pages.0)) } else { String::new() };
    let long = format!("{access} {}{pages}", size(block.mapped));
    let short = format!("{access} {}", size(block.mapped));
    // White on pale would not be readable.
    let readable = block.areas == 1 || block.density() > 0.6;
    [long, short].into_iter().find(|text| readable && width_of(text) < wide)
}

/// Pixels that a label takes, with some air.
fn width_of(text: &str) -> f64 {
    text.chars().count() as f64 * 6.8 + 8.0
}

fn tooltip(block: &Block) -> String {
    let access = block.access.map_or("several accesses", Access::as_str);
    let pages = match block.pages {
        (smallest, largest) if smallest == largest => format!("{} pages", size(1 << smallest)),
        (smallest, largest) => format!("pages of {} to {}", size(1 << smallest), size(1 << largest)),
    };
    let kind = block.kind.map_or("several kinds of memory", Kind::as_str);
    let areas = if block.areas > 1 { format!(", {} areas", count(block.areas)) } else { String::new() };
    format!("{}: {access}, {}, {pages}, {kind}{areas}", block.iova, size(block.mapped))
}

/// The streams that have no table.
fn list(svg: &mut Svg, mut y: f64, others: &[String]) -> f64 {
    if others.is_empty() {
        return y;
    }
    svg.line((LEFT, y), (f64::from(WIDTH) - LEFT, y), "rule");
    svg.text((LEFT, y + 24.0), "heading", "Without a table");
    y += 42.0;
    for other in others.iter().take(MAX_OTHERS) {
        svg.text((LEFT, y), "small", &clip(&printable(other), 180));
        y += 16.0;
    }
    if others.len() > MAX_OTHERS {
        svg.text((LEFT, y), "small", &format!("and {} more", count((others.len() - MAX_OTHERS) as u64)));
        y += 16.0;
    }
    y
}

/// `text`, cut to what fits.
fn clip(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    let mut cut: String = text.chars().take(most - 1).collect();
    cut.push('\u{2026}');
    cut
}
