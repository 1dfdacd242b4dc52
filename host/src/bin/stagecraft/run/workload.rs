//! What the guest's drivers do, operation by operation.

use std::collections::{BTreeMap, VecDeque};

use anyhow::{Result, ensure};
use stagecraft::table::{Geometry, Piece};
use stagecraft::{Attributes, Change, Span};

use super::chance::Chance;
use super::scenario;
use crate::output::size;

/// Kinds of operations, as the guest's driver sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A buffer or region is mapped.
    Map,
    /// A buffer is unmapped, or a burst of them.
    Unmap,
    /// A large page becomes small ones.
    Split,
    /// Small pages become a large one.
    Merge,
    /// Permissions change.
    Protect,
    /// A region is mapped at other IOVAs.
    Move,
}

impl Kind {
    /// All.
    pub const ALL: [Self; 6] = [Self::Map, Self::Unmap, Self::Split, Self::Merge, Self::Protect, Self::Move];

    /// In one word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Map => "map",
            Self::Unmap => "unmap",
            Self::Split => "split",
            Self::Merge => "merge",
            Self::Protect => "protect",
            Self::Move => "move",
        }
    }
}

/// Where things may be.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// The lowest IOVA that is used.
    pub iova: u64,
    /// The highest.
    pub last_iova: u64,
    /// Bytes of the guest's smallest page.
    pub page: u64,
    /// Bytes of a large one, or of what is cut and moved together where there is none.
    pub large: u64,
    /// Guest memory for buffers.
    pub data: Span,
}

/// The largest part of memory that is cut and moved as one.
const LARGEST: u64 = 64 << 20;
/// Pages of a large one where the format has none.
const PAGES: u64 = 512;
/// Where IOVAs begin, if the format goes so far: above all windows that real units keep for themselves below 4 GiB.
const IOVA: u64 = 1 << 32;
/// For formats with 32 bits: below it is a window of RISC-V's, above the last one are those of x86.
const IOVA_32: Span = Span { first: 0x4000_0000, last: 0xfdff_ffff };

impl Layout {
    /// From the guest's tables; without any, as for 4 KiB pages.
    pub fn new(geometry: Option<&Geometry>, data: Span) -> Self {
        let sizes = geometry.map_or(1 << 12 | 1 << 21, |geometry| geometry.levels.iter().fold(0, |sizes, level| sizes | level.leaf_sizes));
        let page = 1 << sizes.trailing_zeros().clamp(12, 20);
        let large = (0..64).map(|log2| 1_u64 << log2).find(|size| sizes & size != 0 && *size >= 16 * page && *size <= LARGEST);
        let lows = geometry.map(|geometry| geometry.roots.iter().filter(|root| root.first <= IOVA_32.first).map(|root| root.last).max().unwrap_or(0));
        let last = lows.unwrap_or((1 << 48) - 1);
        let (iova, last_iova) = if last > IOVA + (IOVA - 1) { (IOVA, last) } else { (IOVA_32.first, last.min(IOVA_32.last)) };
        Self { iova, last_iova, page, large: large.unwrap_or(PAGES * page), data }
    }

    /// `length` bytes of guest memory somewhere, at a multiple of `alignment`.
    fn target(&self, chance: &mut Chance, length: u64, alignment: u64) -> u64 {
        let first = self.data.first.next_multiple_of(alignment);
        let places = (self.data.last + 1).saturating_sub(first + length) / alignment + 1;
        first + chance.below(places) * alignment
    }

    fn check(&self, iovas: u64, largest: u64, alignment: u64) -> Result<()> {
        let room = self.data.last.saturating_sub(self.data.first.next_multiple_of(alignment)).saturating_add(1);
        ensure!(largest <= room, "memory: the guest has {} for buffers, and the largest has {}", size(room.into()), size(largest.into()));
        let room = self.last_iova.saturating_sub(self.iova).saturating_add(1);
        let (needed, room_text) = (size(iovas.into()), size(room.into()));
        ensure!(iovas <= room, "the workload needs {needed} of IOVAs, and the guest's format has {room_text} for it");
        Ok(())
    }
}

/// What one device's driver does.
#[derive(Debug)]
pub struct Workload {
    layout: Layout,
    what: What,
}

#[derive(Debug)]
enum What {
    Network(Ring),
    Storage(Burst),
    /// Places, and how many of them are to be mapped.
    Churn(Vec<Region>, usize),
}

/// Buffers of one page in the order in which they were mapped.
#[derive(Debug)]
struct Ring {
    mapped: VecDeque<u64>,
    free: Vec<u64>,
    size: usize,
    /// The next operation is an unmap if the ring is full.
    full: bool,
}

/// Buffers of mixed sizes.
#[derive(Debug)]
struct Burst {
    mapped: Vec<Span>,
    size: u64,
    largest: u64,
}

/// A large page, or what became of it; none where nothing is mapped.
#[derive(Debug)]
struct Region {
    iova: u64,
    /// What is mapped there, ascending: one piece, or one per small page.
    pieces: Vec<Piece>,
}

const READS: Attributes = Attributes::READ.with(Attributes::COHERENT).with(Attributes::ACCESSED);
const WRITES: Attributes = READS.with(Attributes::WRITE).with(Attributes::DIRTY);

fn piece(iova: u64, length: u64, address: u64, attributes: Attributes) -> Piece {
    Piece { iova: Span { first: iova, last: iova + (length - 1) }, address, attributes }
}

/// Reads only, or reads and writes.
const fn some(chance: &mut Chance) -> Attributes {
    if chance.below(2) == 0 { READS } else { WRITES }
}

impl Workload {
    /// As the scenario says.
    pub fn new(workload: &scenario::Workload, layout: Layout) -> Result<Self> {
        let Layout { iova, page, large, .. } = layout;
        let what = match *workload {
            scenario::Workload::Network { ring } => {
                layout.check(2 * ring * page, page, page)?;
                let free = (0..2 * ring).map(|slot| iova + slot * page).collect();
                What::Network(Ring { mapped: VecDeque::new(), free, size: ring as usize, full: false })
            }
            scenario::Workload::Storage { burst, largest } => {
                let largest = largest.0.next_multiple_of(page);
                layout.check(burst * largest, largest, page)?;
                What::Storage(Burst { mapped: Vec::new(), size: burst, largest })
            }
            scenario::Workload::Churn { regions } => {
                // A place more than there are regions, so that each can move.
                layout.check((regions + regions.div_ceil(2)) * large, large, large)?;
                let place = |index| Region { iova: iova.next_multiple_of(large) + index * large, pieces: Vec::new() };
                What::Churn((0..regions + regions.div_ceil(2)).map(place).collect(), regions as usize)
            }
        };
        Ok(Self { layout, what })
    }

    /// The next operation: removals first, both in ascending order.
    pub fn next(&mut self, chance: &mut Chance) -> (Kind, Vec<Change>) {
        match &mut self.what {
            What::Network(ring) => ring.next(&self.layout, chance),
            What::Storage(burst) => burst.next(&self.layout, chance),
            What::Churn(places, regions) => churn(places, *regions, &self.layout, chance),
        }
    }
}

impl Ring {
    fn next(&mut self, layout: &Layout, chance: &mut Chance) -> (Kind, Vec<Change>) {
        if self.full
            && let Some(iova) = self.mapped.pop_front()
        {
            self.full = false;
            self.free.push(iova);
            return (Kind::Unmap, vec![Change::Unmap(Span { first: iova, last: iova + (layout.page - 1) })]);
        }
        let place = chance.below(self.free.len() as u64) as usize;
        let iova = self.free.swap_remove(place);
        self.mapped.push_back(iova);
        self.full = self.mapped.len() == self.size;
        let address = layout.target(chance, layout.page, layout.page);
        (Kind::Map, vec![Change::Map(piece(iova, layout.page, address, some(chance)))])
    }
}

impl Burst {
    fn next(&mut self, layout: &Layout, chance: &mut Chance) -> (Kind, Vec<Change>) {
        let place = self.mapped.len() as u64;
        if place == self.size {
            return (Kind::Unmap, std::mem::take(&mut self.mapped).into_iter().map(Change::Unmap).collect());
        }
        let length = layout.page * (1 + chance.below(self.largest / layout.page));
        let buffer = piece(layout.iova + place * self.largest, length, layout.target(chance, length, layout.page), some(chance));
        self.mapped.push(buffer.iova);
        (Kind::Map, vec![Change::Map(buffer)])
    }
}

/// Some operation on some region.
fn churn(regions: &mut [Region], mapped: usize, layout: &Layout, chance: &mut Chance) -> (Kind, Vec<Change>) {
    let Layout { page, large, .. } = *layout;
    let occupied: Vec<usize> = (0..regions.len()).filter(|index| !regions[*index].pieces.is_empty()).collect();
    let empty: Vec<usize> = (0..regions.len()).filter(|index| regions[*index].pieces.is_empty()).collect();
    let pick = |from: &[usize], chance: &mut Chance| from[chance.below(from.len() as u64) as usize];
    if occupied.len() < mapped {
        let region = &mut regions[pick(&empty, chance)];
        region.pieces = vec![piece(region.iova, large, layout.target(chance, large, large), WRITES)];
        return (Kind::Map, region.pieces.iter().copied().map(Change::Map).collect());
    }
    let index = pick(&occupied, chance);
    let before = regions[index].pieces.clone();
    let iova = regions[index].iova;
    let (kind, after) = match (chance.below(4), &before[..]) {
        (0, _) => {
            let to = pick(&empty, chance);
            let distance = regions[to].iova.wrapping_sub(iova);
            let moved = |piece: &Piece| Piece {
                iova: Span { first: piece.iova.first.wrapping_add(distance), last: piece.iova.last.wrapping_add(distance) },
                ..*piece
            };
            regions[to].pieces = before.iter().map(moved).collect();
            regions[index].pieces.clear();
            return (Kind::Move, changes(&before, &regions[to].pieces));
        }
        (1, [whole]) => {
            let small = |offset| piece(iova + offset, page, whole.address + offset, whole.attributes);
            (Kind::Split, (0..large / page).map(|index| small(index * page)).collect())
        }
        (1, [first, ..]) => (Kind::Merge, vec![piece(iova, large, first.address, some(chance))]),
        _ => {
            let mut after = before.clone();
            let place = chance.below(after.len() as u64) as usize;
            let writes = after[place].attributes.contains(Attributes::WRITE);
            after[place].attributes = if writes { READS } else { WRITES };
            (Kind::Protect, after)
        }
    };
    let changes = changes(&before, &after);
    regions[index].pieces = after;
    (kind, changes)
}

/// Removes what is not there any more, and maps what was not.
fn changes(before: &[Piece], after: &[Piece]) -> Vec<Change> {
    let others = |these: &[Piece], those: &[Piece]| -> Vec<Piece> {
        let those: BTreeMap<u64, &Piece> = those.iter().map(|piece| (piece.iova.first, piece)).collect();
        these.iter().filter(|piece| those.get(&piece.iova.first) != Some(piece)).copied().collect()
    };
    let removed = others(before, after).into_iter().map(|piece| Change::Unmap(piece.iova));
    removed.chain(others(after, before).into_iter().map(Change::Map)).collect()
}
