//! What is measured: latencies, and how things went over time.

use std::time::Duration;

use super::workload::Kind;

/// Latencies of one kind of operation, in nanoseconds.
#[derive(Clone, Debug, Default)]
pub struct Latencies(Vec<u32>);

impl Latencies {
    /// One more; longer ones than 4 seconds count as that.
    pub fn add(&mut self, latency: Duration) {
        self.0.push(nanoseconds(latency));
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.0.len() as u64
    }

    /// All of them together.
    pub fn total(&self) -> Duration {
        Duration::from_nanos(self.0.iter().map(|nanoseconds| u64::from(*nanoseconds)).sum())
    }

    /// Median, 99th percentile and worst; none if there are none.
    pub fn quantiles(&self) -> Option<[Duration; 3]> {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let last = sorted.len().checked_sub(1)?;
        let at = |percent: usize| Duration::from_nanos(sorted[last * percent / 100].into());
        Some([at(50), at(99), at(100)])
    }
}

fn nanoseconds(latency: Duration) -> u32 {
    u32::try_from(latency.as_nanos()).unwrap_or(u32::MAX)
}

/// Classes of latencies in an octave: an edge is 9 percent above the one before.
const CLASSES: usize = 8;

/// How many latencies there are of each class.
#[derive(Clone, Debug, Default)]
struct Classes(Vec<u32>);

impl Classes {
    fn add(&mut self, latency: Duration) {
        let class = (f64::from(nanoseconds(latency).max(1)).log2() * CLASSES as f64) as usize;
        if self.0.len() <= class {
            self.0.resize(class + 1, 0);
        }
        self.0[class] += 1;
    }

    fn join(&mut self, other: &Self) {
        self.0.resize(self.0.len().max(other.0.len()), 0);
        self.0.iter_mut().zip(&other.0).for_each(|(count, other)| *count += other);
    }

    /// The middle of the class that the median is in, in nanoseconds.
    fn median(&self) -> Option<f64> {
        let all: u64 = self.0.iter().map(|count| u64::from(*count)).sum();
        let mut before = 0;
        let class = self.0.iter().position(|count| {
            before += u64::from(*count);
            before * 2 >= all && all > 0
        })?;
        Some(((class as f64 + 0.5) / CLASSES as f64).exp2())
    }
}

/// A stretch of time.
#[derive(Clone, Debug, Default)]
pub struct Stretch {
    /// Operations that ended in it.
    pub operations: u64,
    /// Kernel calls of them.
    pub kernel_calls: u64,
    /// Most bytes that were mapped.
    pub mapped: u64,
    /// The longest latency.
    pub worst: Duration,
    kinds: [Classes; Kind::ALL.len()],
}

impl Stretch {
    /// The median latency of a kind of operations, in nanoseconds.
    pub fn median(&self, kind: Kind) -> Option<f64> {
        self.kinds[kind as usize].median()
    }

    fn join(&mut self, other: &Self) {
        self.operations += other.operations;
        self.kernel_calls += other.kernel_calls;
        self.mapped = self.mapped.max(other.mapped);
        self.worst = self.worst.max(other.worst);
        self.kinds.iter_mut().zip(&other.kinds).for_each(|(kind, other)| kind.join(other));
    }
}

/// Most stretches; when there would be more, two become one.
const MOST: usize = 240;
/// The first length of a stretch.
const SHORTEST: Duration = Duration::from_micros(250);

/// How things went over time, in stretches of the same length.
#[derive(Clone, Debug)]
pub struct Course {
    /// How long each is.
    pub length: Duration,
    /// From the beginning on.
    pub stretches: Vec<Stretch>,
}

impl Course {
    /// Nothing yet.
    pub const fn new() -> Self {
        Self { length: SHORTEST, stretches: Vec::new() }
    }

    /// An operation ended at `time` since the beginning.
    pub fn add(&mut self, time: Duration, kind: Kind, latency: Duration, kernel_calls: u64, mapped: u64) {
        let stretch = loop {
            let index = (time.as_nanos() / self.length.as_nanos()) as usize;
            if index < MOST {
                break index;
            }
            self.halve();
        };
        if self.stretches.len() <= stretch {
            self.stretches.resize(stretch + 1, Stretch::default());
        }
        let stretch = &mut self.stretches[stretch];
        stretch.operations += 1;
        stretch.kernel_calls += kernel_calls;
        stretch.mapped = stretch.mapped.max(mapped);
        stretch.worst = stretch.worst.max(latency);
        stretch.kinds[kind as usize].add(latency);
    }

    fn halve(&mut self) {
        self.length *= 2;
        let joined = self.stretches.chunks(2).map(|pair| {
            let mut first = pair[0].clone();
            pair[1..].iter().for_each(|second| first.join(second));
            first
        });
        self.stretches = joined.collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_what_was_added() {
        let mut latencies = Latencies::default();
        assert_eq!(latencies.quantiles(), None);
        (0..=100).rev().for_each(|nanoseconds| latencies.add(Duration::from_nanos(nanoseconds)));
        assert_eq!(latencies.quantiles(), Some([50, 99, 100].map(Duration::from_nanos)));
        latencies.add(Duration::from_secs(10));
        assert_eq!(latencies.quantiles().map(|all| all[2]), Some(Duration::from_nanos(u32::MAX.into())));
        assert_eq!((latencies.count(), latencies.total()), (102, Duration::from_nanos(5050 + u64::from(u32::MAX))));
    }

    #[test]
    fn a_long_course_has_few_stretches_and_loses_nothing() {
        let mut course = Course::new();
        for index in 0..10_000_u64 {
            course.add(Duration::from_micros(index * 97), Kind::Map, Duration::from_nanos(900 + index % 200), 2, index);
        }
        assert!(course.stretches.len() <= MOST && course.stretches.len() > MOST / 3, "{}", course.stretches.len());
        let sum = |of: fn(&Stretch) -> u64| course.stretches.iter().map(of).sum::<u64>();
        assert_eq!((sum(|stretch| stretch.operations), sum(|stretch| stretch.kernel_calls)), (10_000, 20_000));
        assert_eq!(course.stretches.last().map(|stretch| (stretch.mapped, stretch.worst)), Some((9999, Duration::from_nanos(1099))));
        let median = course.stretches[1].median(Kind::Map).unwrap_or(0.0);
        assert!((900.0..1100.0).contains(&median), "{median}");
        assert_eq!(course.stretches[0].median(Kind::Move), None);
    }
}
