//! A host's format that fails while leaves are to be written: what it said before is still written, the rest waits for an answer.

use std::sync::{Arc, Mutex};

use stagecraft::Attributes;
use stagecraft::plugin::{TableConfig, Tag};
use stagecraft::sync::{Live, Shadow, ShadowLimits, Unwatched};
use stagecraft::table::{Format, Mapping, Table};

use super::guest::{DATA, Guest, PS, RO, RW};
use super::support::{Failing, Host, format, walk};

/// Not used yet.
const FRESH: u64 = 0b111;

/// What a format does not say.
type Unsaid = fn(Attributes) -> bool;

/// That, and how often the format was asked for it.
struct Silence(Arc<Mutex<(Unsaid, u64)>>);

impl Silence {
    fn about(&self, what: Unsaid) {
        self.0.lock().unwrap().0 = what;
    }

    /// A host's format that does not say it.
    fn of(&self, format: Box<dyn Format>) -> Failing {
        let silence = Arc::clone(&self.0);
        Failing::to_write(format, move |attributes| {
            let (is_silent, failures) = &mut *silence.lock().unwrap();
            let fails = is_silent(attributes);
            *failures += u64::from(fails);
            fails
        })
    }

    /// How often it failed since this was asked.
    fn failures(&self) -> u64 {
        std::mem::take(&mut self.0.lock().unwrap().1)
    }
}

const fn no_write(attributes: Attributes) -> bool {
    !attributes.contains(Attributes::WRITE)
}

fn fresh(attributes: Attributes) -> bool {
    attributes.contains(Attributes::WRITE) && !attributes.contains(Attributes::ACCESSED)
}

/// A guest, and a host whose format says everything at first.
struct Rig {
    guest: Guest,
    silence: Silence,
    live: Live<Host>,
}

impl Rig {
    fn new() -> Self {
        let (guest, silence) = (Guest::new(), Silence(Arc::new(Mutex::new((|_| false, 0)))));
        guest.put(0, 0, DATA | RW);
        let config = TableConfig::new("riscv-iommu/first-stage", &[("levels", 4)]);
        let host = Host::of(Box::new(silence.of(format(&config))), &config, 8 << 20);
        let shadow = Shadow::open(format(&guest.config()), Guest::map(), ShadowLimits::default(), Box::new(Unwatched)).unwrap();
        let live = Live::new(shadow, host, Tag::default(), 0, 1 << 10);
        let mut this = Self { guest, silence, live };
        this.look();
        this
    }

    /// Has the host brought in step; how many pieces it was offered again.
    fn look(&mut self) -> u64 {
        let report = self.live.synchronise(&self.guest.view()).unwrap();
        assert_eq!(report.blocked_count, 0, "the guest's format answers");
        report.offered
    }

    fn put(&self, page: u64, bits: u64) {
        self.guest.put(page << 12, 0, if bits == 0 { 0 } else { (DATA + (page << 12)) | bits });
    }

    /// The pages below 2 MiB that the host maps.
    fn shown(&self) -> Vec<u64> {
        let pages = |mapping: &Mapping| mapping.iova.first >> 12..=mapping.iova.last >> 12;
        self.live.sink().walked().iter().flat_map(pages).filter(|page| *page < 512).collect()
    }

    fn unanswered(&self) -> Vec<(u64, u64)> {
        self.live.sink().table.unanswered().iter().map(|span| (span.first >> 12, span.last >> 12)).collect()
    }

    fn assert_in_step(&self) {
        let wanted = walk(&mut Table::open(format(&self.guest.config())).unwrap(), &self.guest.view(), &Guest::map());
        assert_eq!(self.live.sink().walked(), wanted);
        assert!(self.unanswered().is_empty());
    }
}

#[test]
fn what_a_host_format_did_not_say_is_shown_when_it_answers() {
    let mut rig = Rig::new();
    rig.silence.about(no_write);
    for (page, bits) in [(0, RO), (1, RO), (2, RW), (3, RO), (5, RO)] {
        rig.put(page, bits);
    }
    rig.look();
    assert_eq!(rig.shown(), [2], "what is known is written, and a page that becomes unknown goes");
    assert_eq!(rig.unanswered(), [(0, 1), (3, 3), (5, 5)]);
    assert!(rig.live.sink().table.figures().format_failures >= 4);
    rig.silence.failures();
    // Whatever waits, one operation has one question; known pages come and go as ever.
    for (round, bits) in [RW, 0, RW].into_iter().enumerate() {
        rig.put(7, bits);
        rig.look();
        assert_eq!((rig.silence.failures(), rig.shown().contains(&7)), (1, bits != 0), "round {round}");
    }
    // One of them goes before there is an answer, another one becomes known.
    rig.put(1, 0);
    rig.put(3, RW);
    rig.look();
    assert_eq!(rig.shown(), [2, 3, 7]);
    rig.silence.about(|_| false);
    assert!(rig.look() >= 2);
    rig.assert_in_step();
    rig.silence.failures();
    assert_eq!((rig.look(), rig.silence.failures()), (0, 0), "nothing is asked for any more");
}

#[test]
fn an_attribute_that_is_never_said_does_not_keep_others_waiting() {
    let mut rig = Rig::new();
    rig.silence.about(|attributes| no_write(attributes) || fresh(attributes));
    for page in 1..20 {
        rig.put(2 * page, if page == 10 { FRESH } else { RO });
    }
    rig.look();
    assert_eq!(rig.shown(), [0]);
    rig.silence.about(no_write);
    (0..20).for_each(|_| assert!(rig.look() > 0));
    assert_eq!(rig.shown(), [0, 20]);
    rig.silence.about(|_| false);
    rig.look();
    rig.assert_in_step();
}

#[test]
fn a_large_page_that_a_host_format_did_not_say_is_split_and_merged_meanwhile() {
    let mut rig = Rig::new();
    let large = |rig: &Rig| rig.guest.set(1 << 21, 1, 0x100_0000 | RO | PS);
    large(&rig);
    rig.silence.about(no_write);
    rig.look();
    assert_eq!(rig.unanswered(), [(512, 1023)]);
    for round in 0..4 {
        if round % 2 == 0 {
            rig.guest.split(1 << 21);
        } else {
            large(&rig);
        }
        rig.look();
        assert_eq!((rig.unanswered(), rig.shown()), (vec![(512, 1023)], vec![0]), "round {round}");
    }
    rig.silence.about(|_| false);
    rig.look();
    rig.assert_in_step();
}
