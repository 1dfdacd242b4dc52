//! Leaves that come, go and become other leaves, each in one slot of a table that stays: most of what a running guest does.

use crate::memory::EntryLayout;
use crate::sync::nested::plan::{Chain, Leaves};
use crate::sync::nested::slots::{One, Place, Slots, piece_of};
use crate::sync::nested::{HostTable, Slot, TableMemory};
use crate::table::{Leaf, Loss, Losses, Piece, low_bits};
use crate::{Attributes, Change, Span};

/// What is needed to write leaves into a table.
pub(super) struct Writer<'a, M> {
    pub(super) chain: &'a Chain,
    pub(super) number: usize,
    pub(super) depth: usize,
    pub(super) leaves: &'a mut Leaves,
    pub(super) losses: &'a mut Losses,
    pub(super) memory: &'a mut M,
    pub(super) layout: EntryLayout,
}

impl<M: TableMemory> Writer<'_, M> {
    /// Makes the next few changes of a table, as long as they are such.
    #[inline]
    pub(super) fn exchange(&mut self, table: &mut HostTable, slots: &mut Slots<'_, '_>) {
        self.take(table, slots);
        self.give(table, slots);
        while let Some(one) = slots.peek() {
            if !self.put(table, one) {
                return;
            }
            slots.made(&one);
        }
    }

    /// Pages that go, where nothing comes: most batches are of one kind.
    #[inline(never)]
    fn take(&mut self, table: &mut HostTable, slots: &mut Slots<'_, '_>) {
        let (lsb, absent, base) = (self.chain.rungs[self.depth].lsb, self.chain.rungs[self.depth].absent, slots.place.base);
        let Some(unmaps) = slots.only_unmaps() else { return };
        let (host, mut rest) = (&mut table.slots, unmaps.iter());
        let gone = std::iter::from_fn(move || {
            // What is no slot of this table may begin before it.
            let span = rest.next().map(Change::span).filter(|span| is_slot(*span, lsb))?;
            let index = (span.first - base) >> lsb;
            let slot = host.get_mut(index as usize).filter(|slot| matches!(slot, Slot::Leaf(_)))?;
            *slot = Slot::Absent;
            Some((index, absent))
        });
        let count = self.memory.store_all(table.address, self.layout, gone);
        *unmaps = &unmaps[count..];
        table.live -= count as u64;
    }

    /// Pages that come, where nothing goes, and of whose losses there are examples enough.
    #[inline(never)]
    fn give(&mut self, table: &mut HostTable, slots: &mut Slots<'_, '_>) {
        let (lsb, base) = (self.chain.rungs[self.depth].lsb, slots.place.base);
        let Some(maps) = slots.only_maps() else { return };
        let Some(first) = maps.first().and_then(piece_of) else { return };
        let leaves = self.leaves.of(self.chain, self.number, first.attributes);
        let Some((leaf, tracks)) = leaves.and_then(|leaves| leaves.get(self.depth)?.as_ref()) else { return };
        if !narrowed(leaf, first.attributes).all(|loss| self.losses.has_examples(*loss)) {
            return;
        }
        let (host, mut rest, attributes, new) = (&mut table.slots, maps.iter(), first.attributes, Slot::Leaf(*tracks));
        let Some(entry) = leaf.entries(lsb) else { return };
        let given = std::iter::from_fn(move || {
            let piece = rest.next().and_then(piece_of).filter(|piece| is_slot(piece.iova, lsb))?;
            let index = (piece.iova.first - base) >> lsb;
            let slot = host.get_mut(index as usize).filter(|slot| **slot == Slot::Absent)?;
            let entry = entry(piece.address).filter(|_| piece.attributes == attributes)?;
            *slot = new;
            Some((index, entry))
        });
        let count = self.memory.store_all(table.address, self.layout, given);
        *maps = &maps[count..];
        table.live += count as u64;
        let bytes = (u128::from(low_bits(lsb)) + 1) * count as u128;
        narrowed(leaf, first.attributes).for_each(|loss| self.losses.add(*loss, || *first, count as u64, bytes));
    }

    /// Makes a change of one slot; false: it is another kind of change, and nothing was done.
    #[inline]
    pub(super) fn put(&mut self, table: &mut HostTable, One { index, unmap, map }: One<'_>) -> bool {
        let Some(slot) = table.slots.get_mut(index as usize) else { return false };
        let was_leaf = matches!(slot, Slot::Leaf(_));
        if unmap != was_leaf || !was_leaf && *slot != Slot::Absent {
            return false;
        }
        let (new, entry) = match map {
            None => (Slot::Absent, self.chain.rungs[self.depth].absent),
            Some(piece) => match page(self.leaves, self.losses, (self.chain, self.number, self.depth), piece, piece.address) {
                Some(leaf) => leaf,
                None => return false,
            },
        };
        self.memory.store(table.address, self.layout, index, entry);
        *slot = new;
        table.live = table.live + u64::from(map.is_some()) - u64::from(was_leaf);
        true
    }
}

/// What a leaf loses of these attributes.
#[inline]
fn narrowed(leaf: &Leaf, attributes: Attributes) -> impl Iterator<Item = &Loss> {
    let marks = attributes.contains(Attributes::WRITABLE_WHEN_DIRTY);
    leaf.narrowed.iter().filter(move |loss| **loss != Loss::DirtyTracking || marks)
}

/// Whether a span is a slot of `2^lsb` bytes.
#[inline]
const fn is_slot(span: Span, lsb: u8) -> bool {
    span.first & low_bits(lsb) == 0 && span.last == span.first | low_bits(lsb)
}

/// The entry of a leaf that fills a slot, if the piece has one there.
#[inline]
pub(super) fn leaf(leaves: &mut Leaves, losses: &mut Losses, slot: Place<'_>, piece: &Piece) -> Option<(Slot, u64)> {
    let whole = slot.whole();
    if whole != slot.span || piece.iova.first > whole.first || piece.iova.last < whole.last {
        return None;
    }
    page(leaves, losses, (slot.chain, slot.number, slot.depth), piece, piece.address + (whole.first - piece.iova.first))
}

/// The same for a piece that has all of a slot, and the address that this goes to.
#[inline]
fn page(
    leaves: &mut Leaves,
    losses: &mut Losses,
    (chain, number, depth): (&Chain, usize, usize),
    piece: &Piece,
    address: u64,
) -> Option<(Slot, u64)> {
    let size = chain.rungs[depth].lsb;
    if address & low_bits(size) != 0 {
        return None;
    }
    let (leaf, tracks) = leaves.of(chain, number, piece.attributes)?.get(depth)?.as_ref()?;
    let entry = leaf.entry(address, size)?;
    for loss in narrowed(leaf, piece.attributes) {
        let iova = Span::of_log2((piece.iova.first + (address - piece.address)) >> size << size, size);
        losses.add(*loss, || Piece { iova, address, attributes: piece.attributes }, 1, u128::from(low_bits(size)) + 1);
    }
    Some((Slot::Leaf(*tracks), entry))
}
