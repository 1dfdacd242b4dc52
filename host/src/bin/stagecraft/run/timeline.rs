//! Draws how a run went over time: four strips over one axis of time.
//!
//! ```text
//!   operations   per second
//!   latency      median of each kind of operation, and the worst of all; logarithmic
//!   kernel calls per operation
//!   mapped       bytes
//! ```

use std::fmt::Write as _;
use std::time::Duration;

use super::figures::Stretch;
use super::report::{Report, time};
use super::scenario::Scenario;
use super::workload::Kind;
use crate::output::{count, printable, size};
use crate::svg::Svg;

const WIDTH: u32 = 1000;
/// Where strips are, from left to right.
const LEFT: f64 = 120.0;
const RIGHT: f64 = 970.0;
/// Where the first strip begins, and how high each is, and the room between two.
const TOP: f64 = 118.0;
const HEIGHT: f64 = 120.0;
const BETWEEN: f64 = 46.0;

const DEFINITIONS: &str = r##"<style>
text { font-family: "DejaVu Sans", "Segoe UI", Helvetica, Arial, sans-serif; font-size: 11px; fill: #222 }
.title { font-size: 17px; font-weight: bold }
.heading { font-size: 13px; font-weight: bold }
.small { fill: #555 }
.tick { fill: #555; text-anchor: end }
.time { fill: #555; text-anchor: middle }
.axis { stroke: #555; stroke-width: 1 }
.grid { stroke: #e2e2e2; stroke-width: 1 }
polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round }
</style>
<rect width="100%" height="100%" fill="#fff"/>"##;

/// Colours that people with any colour vision can tell apart, by kind of operation.
const COLOURS: [&str; Kind::ALL.len()] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9"];
/// What is the same for all kinds.
const PLAIN: &str = "#444";
const WORST: &str = "#999";

/// One strip: from its values to places on the paper.
struct Strip {
    top: f64,
    least: f64,
    most: f64,
    logarithmic: bool,
}

impl Strip {
    fn y(&self, value: f64) -> f64 {
        let (least, most, value) =
            if self.logarithmic { (self.least.log10(), self.most.log10(), value.max(self.least).log10()) } else { (self.least, self.most, value) };
        self.top + HEIGHT * (1.0 - (value - least) / (most - least))
    }
}

/// The picture.
pub fn draw(scenario: &Scenario, report: &Report) -> String {
    let played = &report.played;
    let mut svg = Svg::new(WIDTH);
    let title = printable(&scenario.title);
    svg.text((24.0, 34.0), "title", &title);
    let strategies = report.strategies().join("; ");
    svg.text(
        (24.0, 54.0),
        "small",
        &printable(&format!("{}, {} workload, seed {}", scenario.guest.format, scenario.workload.as_str(), scenario.seed)),
    );
    svg.text((24.0, 70.0), "small", &printable(&strategies));
    let stretches = &played.course.stretches;
    let length = played.course.length.as_secs_f64();
    let rates: Vec<f64> = stretches.iter().map(|stretch| stretch.operations as f64 / length).collect();
    // The last stretch is not over when the run is.
    let rates = &rates[..rates.len().saturating_sub(1).max(1).min(rates.len())];
    let mut paper = Paper { svg, seconds: length * stretches.len().max(1) as f64, length };
    let strip = linear(0, rates.iter().copied());
    paper.frame(&strip, "operations per second, with the guest's part and all checks", &|value| count(value as u64));
    paper.curve(&strip, rates.iter().map(|rate| Some(*rate)), PLAIN);
    let strip = latency(stretches);
    paper.frame(&strip, "latency of the host's part", &|nanoseconds| time(Duration::from_nanos(nanoseconds as u64)));
    paper.curve(&strip, stretches.iter().map(|stretch| Some(stretch.worst.as_nanos() as f64).filter(|worst| *worst > 0.0)), WORST);
    for (kind, colour) in Kind::ALL.into_iter().zip(COLOURS).filter(|(kind, _)| played.latencies.contains_key(kind)) {
        paper.curve(&strip, stretches.iter().map(|stretch| stretch.median(kind)), colour);
    }
    let kinds = Kind::ALL.into_iter().zip(COLOURS).filter(|(kind, _)| played.latencies.contains_key(kind));
    let legend: Vec<(String, &str)> = kinds.map(|(kind, colour)| (format!("{}, median", kind.as_str()), colour)).collect();
    paper.legend(strip.top - 8.0, &[&legend[..], &[("worst of all".to_owned(), WORST)]].concat());
    let per_operation = |stretch: &Stretch| (stretch.operations > 0).then(|| stretch.kernel_calls as f64 / stretch.operations as f64);
    let strip = linear(2, stretches.iter().filter_map(per_operation));
    paper.frame(&strip, "kernel calls per operation", &|value| format!("{value:.2}"));
    paper.curve(&strip, stretches.iter().map(per_operation), PLAIN);
    let mapped = |stretch: &Stretch| (stretch.operations > 0).then_some(stretch.mapped as f64);
    let most = stretches.iter().filter_map(mapped).fold(1.0, f64::max);
    // Bytes are counted in powers of two.
    let strip = Strip { top: top(3), least: 0.0, most: most.log2().ceil().exp2().max(4096.0), logarithmic: false };
    paper.frame(&strip, "mapped memory", &|bytes| size(bytes as u128));
    paper.curve(&strip, stretches.iter().map(mapped), PLAIN);
    paper.times(strip.top + HEIGHT);
    paper.svg.finish(strip.top + HEIGHT + 54.0, &title, DEFINITIONS)
}

fn top(place: usize) -> f64 {
    TOP + place as f64 * (HEIGHT + BETWEEN)
}

/// From zero to a round number above all values.
fn linear(place: usize, values: impl Iterator<Item = f64>) -> Strip {
    let most = values.fold(0.0, f64::max);
    Strip { top: top(place), least: 0.0, most: round_up(most), logarithmic: false }
}

/// From a power of ten below all values to one above.
fn latency(stretches: &[Stretch]) -> Strip {
    let medians = || stretches.iter().flat_map(|stretch| Kind::ALL.into_iter().filter_map(|kind| stretch.median(kind)));
    let least = medians().fold(f64::INFINITY, f64::min).clamp(1.0, 1e9);
    let most = stretches.iter().map(|stretch| stretch.worst.as_nanos() as f64).fold(10.0 * least, f64::max);
    let power = |value: f64, whole: fn(f64) -> f64| 10_f64.powf(whole(value.log10()));
    Strip { top: top(1), least: power(least, f64::floor), most: power(most, f64::ceil), logarithmic: true }
}

/// The next of 1, 2, 4, 8 times a power of ten, so that halves and quarters are round as well.
fn round_up(value: f64) -> f64 {
    if value <= 0.0 {
        return 1.0;
    }
    let power = 10_f64.powf(value.log10().floor());
    [1.0, 2.0, 4.0, 8.0, 10.0].map(|times| times * power).into_iter().find(|round| *round >= value).unwrap_or(value)
}

struct Paper {
    svg: Svg,
    /// What the axis of time covers.
    seconds: f64,
    /// Of one stretch.
    length: f64,
}

impl Paper {
    fn x(&self, seconds: f64) -> f64 {
        LEFT + (RIGHT - LEFT) * seconds / self.seconds
    }

    /// The axes of a strip, with its name and values.
    fn frame(&mut self, strip: &Strip, name: &str, value: &dyn Fn(f64) -> String) {
        self.svg.text((24.0, strip.top - 8.0), "heading", name);
        let values: Vec<f64> = if strip.logarithmic {
            let powers = (strip.most / strip.least).log10().round() as i32;
            (0..=powers).map(|power| strip.least * 10_f64.powi(power)).collect()
        } else {
            (0..=4).map(|quarter| strip.most * f64::from(quarter) / 4.0).collect()
        };
        for at in values {
            let y = strip.y(at);
            self.svg.line((LEFT, y), (RIGHT, y), "grid");
            self.svg.text((LEFT - 6.0, y + 4.0), "tick", &value(at));
        }
        self.svg.line((LEFT, strip.top), (LEFT, strip.top + HEIGHT), "axis");
        self.svg.line((LEFT, strip.top + HEIGHT), (RIGHT, strip.top + HEIGHT), "axis");
    }

    /// A value for each stretch, in its middle; none where nothing happened.
    fn curve(&mut self, strip: &Strip, values: impl Iterator<Item = Option<f64>>, colour: &str) {
        let places = values.enumerate().filter_map(|(index, value)| Some((self.x((index as f64 + 0.5) * self.length), strip.y(value?))));
        let places: Vec<(f64, f64)> = places.collect();
        if let [(x, y)] = places[..] {
            // A line of one point would not be seen.
            self.svg.rect((x - 2.0, y - 2.0), (4.0, 4.0), format!("fill=\"{colour}\""), "");
        }
        let mut points = String::new();
        places.iter().for_each(|(x, y)| {
            let _ = write!(points, "{x:.1},{y:.1} ");
        });
        self.svg.polyline(points.trim_end(), colour);
    }

    /// What the colours mean, from the right.
    fn legend(&mut self, y: f64, entries: &[(String, &str)]) {
        let width = |text: &str| 30.0 + 6.4 * text.chars().count() as f64;
        let mut x = RIGHT - entries.iter().map(|(text, _)| width(text)).sum::<f64>();
        for (text, colour) in entries {
            self.svg.rect((x, y - 5.0), (16.0, 3.0), format!("fill=\"{colour}\""), "");
            self.svg.text((x + 20.0, y), "small", text);
            x += width(text);
        }
    }

    /// The axis of time, below everything.
    fn times(&mut self, bottom: f64) {
        let rough = self.seconds / 8.0;
        let power = 10_f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|times| times * power).into_iter().find(|step| *step >= rough).unwrap_or(rough);
        let (unit, name) = if self.seconds < 0.002 {
            (1e6, "us")
        } else if self.seconds < 2.0 {
            (1e3, "ms")
        } else {
            (1.0, "s")
        };
        let mut at = 0.0;
        while at <= self.seconds * 1.000_001 {
            let x = self.x(at);
            self.svg.line((x, bottom), (x, bottom + 5.0), "axis");
            let value = at * unit;
            let digits = usize::from(step * unit < 1.0);
            self.svg.text((x, bottom + 18.0), "time", &format!("{value:.digits$}"));
            at += step;
        }
        self.svg.text((f64::midpoint(LEFT, RIGHT), bottom + 38.0), "time", &format!("time since the first operation, {name}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_end_at_round_numbers() {
        assert_eq!([0.0, 0.3, 1.0, 1.1, 4.5, 9.0, 130.0].map(round_up), [1.0, 0.4, 1.0, 2.0, 8.0, 10.0, 200.0]);
    }

    #[test]
    fn places_are_within_the_strip() {
        let strip = Strip { top: 100.0, least: 100.0, most: 10_000.0, logarithmic: true };
        assert_eq!([10.0, 100.0, 1000.0, 10_000.0].map(|value| strip.y(value)), [220.0, 220.0, 160.0, 100.0]);
        let strip = Strip { logarithmic: false, least: 0.0, most: 4.0, ..strip };
        assert_eq!([0.0, 4.0].map(|value| strip.y(value)), [220.0, 100.0]);
    }
}
