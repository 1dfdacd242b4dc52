//! Which part of an address space stands in which row, and what a row shows at the width that it has.
//!
//! Address spaces are sparse: a row each for the parts that are in use, and the holes between them in words. A part is cut at its largest hole as long as that
//! hole takes a good part of it, largest holes first, until there are rows enough.

use stagecraft::memory::Kind;
use stagecraft::{Access, Span};

use super::areas::Area;

/// A hole that takes this part of a row, or more, is cut out: one in so many.
const CUT: u128 = 5;

/// Areas that stand in one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row<'a> {
    /// Ascending, never empty.
    pub areas: &'a [Area],
}

impl Row<'_> {
    /// From the first byte to the last.
    pub fn span(&self) -> Span {
        let (first, last) = (self.areas[0].iova.first, self.areas[self.areas.len() - 1].iova.last);
        Span { first, last }
    }

    /// Bytes from the first to the last.
    pub fn extent(&self) -> u128 {
        u128::from(self.span().length_minus_one()) + 1
    }

    /// Bytes that are mapped.
    pub fn mapped(&self) -> u128 {
        self.areas.iter().map(Area::bytes).sum()
    }

    /// The largest hole: its size, and the index of the area behind it.
    fn largest_hole(&self) -> Option<(u64, usize)> {
        let holes = self.areas.windows(2).enumerate().map(|(index, pair)| (pair[1].iova.first - pair[0].iova.last - 1, index + 1));
        holes.filter(|(bytes, _)| *bytes > 0).max_by_key(|(bytes, index)| (*bytes, usize::MAX - index))
    }
}

/// Rows for `areas`, at most `most`.
pub fn rows(areas: &[Area], most: usize) -> Vec<Row<'_>> {
    if areas.is_empty() {
        return Vec::new();
    }
    let mut rows = vec![Row { areas }];
    let mut holes = vec![rows[0].largest_hole()];
    while rows.len() < most {
        let worth = |row: &Row<'_>, bytes: u64| u128::from(bytes) * CUT >= row.extent();
        let candidates = rows.iter().zip(&holes).enumerate().filter_map(|(index, (row, hole))| {
            let (bytes, behind) = (*hole)?;
            worth(row, bytes).then_some((bytes, index, behind))
        });
        let Some((_, index, behind)) = candidates.max_by_key(|(bytes, index, _)| (*bytes, usize::MAX - index)) else { break };
        let (before, after) = rows[index].areas.split_at(behind);
        let (before, after) = (Row { areas: before }, Row { areas: after });
        holes.splice(index..=index, [before.largest_hole(), after.largest_hole()]);
        rows.splice(index..=index, [before, after]);
    }
    rows
}

/// A rectangle of a row: one area, or several that are too small to stand apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// First column.
    pub first: u32,
    /// Last column.
    pub last: u32,
    /// From the first byte of the first area to the last byte of the last.
    pub iova: Span,
    /// Bytes that are mapped.
    pub mapped: u128,
    /// How many areas.
    pub areas: u64,
    /// What a device may do; none if that differs.
    pub access: Option<Access>,
    /// Smallest and largest pages.
    pub pages: (u8, u8),
    /// What they lead to; none if that differs.
    pub kind: Option<Kind>,
}

impl Block {
    fn new(area: &Area, first: u32, last: u32) -> Self {
        let Area { iova, access, page_log2, kind } = *area;
        Self { first, last, iova, mapped: area.bytes(), areas: 1, access: Some(access), pages: (page_log2, page_log2), kind: Some(kind) }
    }

    fn merge(&mut self, other: &Self) {
        self.last = self.last.max(other.last);
        self.iova.last = other.iova.last;
        self.mapped += other.mapped;
        self.areas += other.areas;
        self.access = self.access.filter(|access| Some(*access) == other.access);
        self.pages = (self.pages.0.min(other.pages.0), self.pages.1.max(other.pages.1));
        self.kind = self.kind.filter(|kind| Some(*kind) == other.kind);
    }

    /// The part of the block that is mapped, 0 to 1.
    pub fn density(&self) -> f64 {
        let extent = u128::from(self.iova.length_minus_one()) + 1;
        self.mapped as f64 / extent as f64
    }
}

/// What `row` shows in `columns` columns: areas that share a column are one block.
pub fn blocks(row: &Row<'_>, columns: u32) -> Vec<Block> {
    let (first, extent) = (row.span().first, row.extent());
    let column = |iova: u64| (u128::from(iova - first) * u128::from(columns) / extent) as u32;
    let mut blocks: Vec<Block> = Vec::new();
    for area in row.areas {
        let block = Block::new(area, column(area.iova.first), column(area.iova.last));
        let Some(last) = blocks.last_mut().filter(|last| last.last >= block.first) else {
            blocks.push(block);
            continue;
        };
        // A column that two share is the smaller one's, so that one page at the edge does not change the looks of the gigabyte beside it.
        if block.last > last.last {
            let first = last.last + 1;
            blocks.push(Block { first, ..block });
        } else if last.last > last.first {
            last.last -= 1;
            blocks.push(block);
        } else {
            last.merge(&block);
        }
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(first: u64, bytes: u64) -> Area {
        Area { iova: Span { first, last: first + (bytes - 1) }, access: Access::READ, page_log2: 12, kind: Kind::Ram }
    }

    #[test]
    fn rows_are_cut_at_the_largest_holes_first() {
        let areas = [area(0, 0x1000), area(0x2000, 0x1000), area(1 << 30, 0x1000), area(1 << 47, 0x1000)];
        let cut = |most| rows(&areas, most).iter().map(|row| row.areas.len()).collect::<Vec<_>>();
        assert_eq!(cut(1), [4]);
        assert_eq!(cut(2), [3, 1]);
        assert_eq!(cut(3), [2, 1, 1]);
        assert_eq!(cut(100), [1, 1, 1, 1], "and no more rows than areas");
    }

    #[test]
    fn small_holes_stay_in_the_row() {
        let areas = [area(0, 0x10000), area(0x11000, 0x10000)];
        assert_eq!(rows(&areas, 10).len(), 1);
    }

    #[test]
    fn what_shares_a_column_is_one_block_and_nothing_is_lost() {
        let areas: Vec<Area> = (0..1000).map(|index| area(index * 0x3000, 0x1000)).collect();
        let row = Row { areas: &areas };
        let found = blocks(&row, 100);
        assert!(found.len() <= 100);
        assert!(found.windows(2).all(|pair| pair[0].last < pair[1].first), "side by side");
        assert_eq!(found.iter().map(|block| block.areas).sum::<u64>(), 1000);
        assert_eq!(found.iter().map(|block| block.mapped).sum::<u128>(), 1000 * 0x1000);
    }

    #[test]
    fn a_page_beside_a_gigabyte_is_a_block_of_its_own() {
        let areas = [area(0, 0x1000), area(0x1000, 1 << 30), area((1 << 30) + 0x1000, 0x1000)];
        let found = blocks(&Row { areas: &areas }, 100);
        let columns: Vec<(u32, u32)> = found.iter().map(|block| (block.first, block.last)).collect();
        assert_eq!(columns, [(0, 0), (1, 98), (99, 99)]);
    }

    #[test]
    fn the_whole_address_space_fits_a_row() {
        let areas = [area(0, 0x1000), area(u64::MAX - 0xfff, 0x1000)];
        let found = blocks(&Row { areas: &areas }, 10);
        assert_eq!((found[0].first, found[1].last), (0, 9));
    }
}
