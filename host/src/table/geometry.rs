//! The shape of tables: levels, index bits, address fields. Checked once, so that the walk can rely on it.

use std::fmt;

use crate::table::visit::Step;
use crate::{Attributes, Span};

/// Bits `entry_lsb .. entry_lsb + width` of an entry are bits `address_lsb .. address_lsb + width` of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Lowest bit in the entry.
    pub entry_lsb: u8,
    /// Lowest bit in the address.
    pub address_lsb: u8,
    /// Number of bits.
    pub width: u8,
}

/// If `entry & mask == value`, the bits of `address` carry the output address and all others are the pattern.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// Bits that decide. None of them is an address bit of this shape; of a shape that is tried later only if another bit tells the two apart.
    pub mask: u64,
    /// Their value.
    pub value: u64,
    /// Where the address is.
    pub address: Vec<Segment>,
}

/// How hardware marks an entry: `entry & mask == value` means marked; `mask` zero means that there is no such mark.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    /// The bits of the mark.
    pub mask: u64,
    /// Their value when marked.
    pub value: u64,
}

impl Mark {
    /// Whether there is such a mark at all.
    #[must_use]
    pub const fn exists(self) -> bool {
        self.mask != 0
    }

    /// Whether hardware has to mark the entry that it uses.
    #[inline]
    #[must_use]
    pub const fn is_missing(self, entry: u64) -> bool {
        self.mask != 0 && entry & self.mask != self.value
    }

    /// Whether hardware, or somebody else, has marked the entry.
    #[must_use]
    pub const fn is_set(self, entry: u64) -> bool {
        self.mask != 0 && entry & self.mask == self.value
    }

    /// The entry, marked.
    #[must_use]
    pub const fn set(self, entry: u64) -> u64 {
        entry & !self.mask | self.value
    }

    /// The entry, not marked.
    #[must_use]
    pub const fn taken(self, entry: u64) -> u64 {
        entry & !self.mask | !self.value & self.mask
    }
}

/// One kind of table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Level {
    /// As the architecture counts it; for messages.
    pub number: i8,
    /// Lowest IOVA bit that selects an entry.
    pub index_lsb: u8,
    /// Number of IOVA bits that select an entry.
    pub index_bits: u8,
    /// Tried in order; an entry that matches none is all pattern.
    pub shapes: Vec<Shape>,
    /// Bit `n`: leaves of `2^n` bytes can be made here.
    pub leaf_sizes: u64,
    /// What a builder writes into an unused slot.
    pub absent: u64,
    /// Accessed mark of a leaf, if hardware sets it.
    pub accessed: Mark,
    /// Dirty mark of a leaf, if hardware sets it: only leaves that are [`Attributes::WRITABLE_WHEN_DIRTY`] lack it.
    pub dirty: Mark,
    /// Accessed mark of an entry that points to a table, if hardware sets it on the way.
    pub table_accessed: Mark,
}

impl Level {
    /// Number of entries of a whole table.
    #[must_use]
    pub const fn entries(&self) -> u64 {
        1 << self.index_bits
    }

    /// One IOVA bit above the highest that selects an entry.
    #[must_use]
    pub const fn top_bit(&self) -> u8 {
        self.index_lsb + self.index_bits
    }
}

/// Order of an entry's bytes in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ByteOrder {
    /// Least significant byte first.
    #[default]
    Little,
    /// Most significant byte first.
    Big,
}

impl ByteOrder {
    /// Whether it is this processor's.
    pub(crate) const fn is_native(self) -> bool {
        matches!(self, Self::Big) == cfg!(target_endian = "big")
    }
}

/// A table that IOVAs `first..=last` are walked from.
///
/// Roots with the same `setting`, `address` and `level` are one table with several windows (x86's canonical halves).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Root {
    /// The setting that holds the address.
    pub setting: String,
    /// Lowest IOVA, as people read it.
    pub first: u64,
    /// Highest IOVA.
    pub last: u64,
    /// IOVA bits that play no part.
    pub ignored: u64,
    /// Address of the table.
    pub address: u64,
    /// Index into the levels.
    pub level: u8,
    /// The format's own word for the entries of this table.
    pub inherited: u64,
}

/// The shape of all tables of one address space.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Geometry {
    /// Sorted by `first`, not overlapping.
    pub roots: Vec<Root>,
    /// Kinds of table.
    pub levels: Vec<Level>,
    /// 4 or 8.
    pub entry_bytes: u8,
    /// Order of an entry's bytes.
    pub order: ByteOrder,
    /// Addresses are below `2^output_bits`.
    pub output_bits: u8,
    /// All requests count as privileged.
    pub privileged: bool,
    /// IOVAs that units do not look up in such tables for requests without PASID, whatever they say: sorted, not overlapping. Tables that are made for
    /// such requests leave them out.
    pub untranslated: Vec<Span>,
    /// Memory types of leaves through which no table of a first stage, and no device structure, may be read, where this is a second stage: bit `n` for
    /// the memory type with the number `n`.
    pub no_tables_in: u8,
}

/// A geometry that no table can have: what a plugin must never answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("nonsense geometry: {0}")]
pub struct Nonsense(pub String);

/// Most kinds of table in one geometry.
pub const MAX_LEVELS: usize = 32;
/// Most roots in one geometry.
pub const MAX_ROOTS: usize = 8;
/// Most shapes of one kind of table.
pub const MAX_SHAPES: usize = 8;
/// Most index bits of a root table.
pub const MAX_ROOT_INDEX_BITS: u8 = 18;
/// Most index bits of any other table.
pub const MAX_INDEX_BITS: u8 = 16;
/// Numbers of memory types.
const MEMORY_TYPES: u32 = 3;
/// Most spans of IOVAs that are not looked up.
pub const MAX_UNTRANSLATED: usize = 4;

fn refuse<T>(reason: impl fmt::Display) -> Result<T, Nonsense> {
    Err(Nonsense(reason.to_string()))
}

impl Geometry {
    /// Checks everything that the engine relies on.
    ///
    /// # Errors
    /// [`Nonsense`] with what is wrong, in words.
    pub fn check(&self) -> Result<(), Nonsense> {
        if self.entry_bytes != 4 && self.entry_bytes != 8 {
            return refuse(format_args!("entries of {} bytes; there are 4 and 8", self.entry_bytes));
        }
        if !(12..=64).contains(&self.output_bits) {
            return refuse(format_args!("output addresses of {} bits; there are 12 to 64", self.output_bits));
        }
        if self.levels.is_empty() || self.levels.len() > MAX_LEVELS {
            return refuse(format_args!("{} kinds of table; there are 1 to {MAX_LEVELS}", self.levels.len()));
        }
        if self.roots.len() > MAX_ROOTS {
            return refuse(format_args!("{} roots; at most {MAX_ROOTS}", self.roots.len()));
        }
        if self.untranslated.len() > MAX_UNTRANSLATED {
            return refuse(format_args!("{} spans of IOVAs that are not translated; at most {MAX_UNTRANSLATED}", self.untranslated.len()));
        }
        if u32::from(self.no_tables_in) >> MEMORY_TYPES != 0 {
            return refuse(format_args!("memory types {:#x}", self.no_tables_in));
        }
        let empty = self.untranslated.iter().any(|span| span.first > span.last);
        if empty || self.untranslated.windows(2).any(|pair| pair[0].last >= pair[1].first) {
            return refuse("spans of IOVAs that are not translated are empty, overlap or are not sorted");
        }
        for (index, level) in self.levels.iter().enumerate() {
            self.check_level(level).map_err(|Nonsense(reason)| Nonsense(format!("level kind {index}: {reason}")))?;
        }
        for (index, root) in self.roots.iter().enumerate() {
            self.check_root(index, root).map_err(|Nonsense(reason)| Nonsense(format!("root {index}: {reason}")))?;
        }
        Ok(())
    }

    fn check_level(&self, level: &Level) -> Result<(), Nonsense> {
        let bits = self.entry_bytes * 8;
        let is_root = self.roots.iter().any(|root| self.levels.get(usize::from(root.level)) == Some(level));
        let most = if is_root { MAX_ROOT_INDEX_BITS } else { MAX_INDEX_BITS };
        if level.index_bits == 0 || level.index_bits > most {
            return refuse(format_args!("{} index bits; there are 1 to {most}", level.index_bits));
        }
        if level.index_lsb < 8 || u16::from(level.index_lsb) + u16::from(level.index_bits) > 64 {
            return refuse(format_args!("index bits from {} to {}", level.index_lsb, u16::from(level.index_lsb) + u16::from(level.index_bits)));
        }
        if level.shapes.len() > MAX_SHAPES {
            return refuse(format_args!("{} shapes; at most {MAX_SHAPES}", level.shapes.len()));
        }
        let width = if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
        if level.absent & !width != 0 {
            return refuse("the absent entry has more bits than an entry");
        }
        if level.leaf_sizes & 0xff != 0 {
            return refuse("leaves smaller than 256 bytes");
        }
        let address = level.shapes.iter().map(|shape| check_shape(shape, bits)).collect::<Result<Vec<u64>, _>>()?;
        check_told_apart(&level.shapes, &address)
    }

    fn check_root(&self, index: usize, root: &Root) -> Result<(), Nonsense> {
        let Some(level) = self.levels.get(usize::from(root.level)) else {
            return refuse(format_args!("level kind {} of {}", root.level, self.levels.len()));
        };
        if root.first > root.last {
            return refuse(format_args!("empty range {:#x}..={:#x}", root.first, root.last));
        }
        let top = level.top_bit();
        if top < 64 && (root.first >> top) != (root.last >> top) {
            return refuse(format_args!("range {:#x}..={:#x} is wider than its table of {top} bits", root.first, root.last));
        }
        // Ignored bits are above the walked ones; within the range they are constant, so that comparing without them is sound.
        if top < 64 && root.ignored & ((1 << top) - 1) != 0 || top >= 64 && root.ignored != 0 {
            return refuse(format_args!("ignored bits {:#x} take part in the walk", root.ignored));
        }
        if index > 0 && self.roots[index - 1].last >= root.first {
            return refuse("roots overlap or are not sorted");
        }
        let overlap = self.roots[..index].iter().any(|other| {
            let ignored = root.ignored | other.ignored;
            ignored != 0 && root.first & !ignored <= other.last & !ignored && other.first & !ignored <= root.last & !ignored
        });
        if overlap {
            return refuse("roots overlap when ignored bits are left out");
        }
        if !root.address.is_multiple_of(u64::from(self.entry_bytes)) || self.output_bits < 64 && root.address >> self.output_bits != 0 {
            return refuse(format_args!("table at {:#x}", root.address));
        }
        Ok(())
    }

    /// Whether tables of a first stage, and device structures, can be read through a leaf of this second stage.
    #[inline]
    #[must_use]
    pub const fn may_hold_tables(&self, attributes: Attributes) -> bool {
        may_hold_tables(attributes, self.no_tables_in)
    }

    /// Where the entry of a step stands, in the addresses that the tables have.
    #[must_use]
    pub(crate) const fn entry_at(&self, step: &Step) -> u64 {
        step.table.0.wrapping_add(step.index.wrapping_mul(self.entry_bytes as u64))
    }

    /// Whether any IOVA of `span` is one that units do not look up for requests without PASID.
    #[inline]
    #[must_use]
    pub fn leaves_out(&self, span: Span) -> bool {
        self.untranslated.iter().any(|other| other.intersection(span).is_some())
    }

    /// Cuts `span` into parts, in ascending order: whether units look them up for requests without PASID, and the IOVAs.
    pub(crate) fn cut(&self, span: Span) -> impl Iterator<Item = (bool, Span)> + '_ {
        crate::address::cut(&self.untranslated, span)
    }

    /// Bytes of a whole table of kind `level`.
    #[must_use]
    pub fn table_bytes(&self, level: u8) -> u64 {
        self.levels[usize::from(level)].entries() * u64::from(self.entry_bytes)
    }
}

/// Whether a leaf of a second stage lets tables be read that are in memory of any but these types.
#[inline]
pub(crate) const fn may_hold_tables(attributes: Attributes, closed: u8) -> bool {
    attributes.access(true).read && closed >> attributes.memory_type() as u8 & 1 == 0
}

/// Checks that the pattern alone decides which shape matches; `address` has the address bits of each shape.
///
/// What is relied on: for an entry `e` whose first matching shape is `T`, with pattern `p = e & !T.address`, every entry with `e' & !T.address == p` has `T` as
/// its first match, `p` itself among them. Then a pattern that is remembered with its shape stands for entries of that shape only, two shapes never have a
/// pattern in common, and leaves of equal mask can be compared without asking for their shape.
///
/// Why it holds: such an `e'` differs from `e` in bits of `T.address` only, and none of those is in `T.mask`, so `e'` matches `T`. Let `S` be tried before `T`;
/// `e` does not match it. If no bit of `S.mask` is in `T.address`, `S` sees the same bits of `e'` as of `e` and does not match either. Otherwise there is a bit
/// in both masks in which the values differ, and `e'` matches `T`, so it does not match `S`. Entries that match no shape are all pattern: there
/// `e' == e`.
fn check_told_apart(shapes: &[Shape], address: &[u64]) -> Result<(), Nonsense> {
    for (index, (shape, address)) in shapes.iter().zip(address).enumerate() {
        if shape.mask & address != 0 {
            return refuse("a shape is decided by bits that are address bits in it");
        }
        for earlier in &shapes[..index] {
            let told_apart = (earlier.value ^ shape.value) & earlier.mask & shape.mask != 0;
            if earlier.mask & address != 0 && !told_apart {
                return refuse("a shape is decided by address bits of a later one, and no other bit tells the two apart");
            }
        }
    }
    Ok(())
}

/// Checks one shape; its address bits in the entry.
fn check_shape(shape: &Shape, bits: u8) -> Result<u64, Nonsense> {
    if shape.value & !shape.mask != 0 {
        return refuse("a shape's value has bits outside its mask");
    }
    if shape.address.len() > 8 {
        return refuse(format_args!("{} address segments; at most 8", shape.address.len()));
    }
    let (mut in_entry, mut in_address) = (0_u64, 0_u64);
    for segment in &shape.address {
        let end = |lsb: u8| u16::from(lsb) + u16::from(segment.width);
        if segment.width == 0 || end(segment.entry_lsb) > u16::from(bits) || end(segment.address_lsb) > 64 {
            return refuse(format_args!("segment {segment:?}"));
        }
        let ones = u64::MAX >> (64 - segment.width);
        let (entry, address) = (ones << segment.entry_lsb, ones << segment.address_lsb);
        if entry & in_entry != 0 || address & in_address != 0 {
            return refuse("address segments overlap");
        }
        in_entry |= entry;
        in_address |= address;
    }
    Ok(in_entry)
}

/// Bits that move together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Move {
    /// The bits, before they move.
    pub(crate) mask: u64,
    /// They are turned left by so many; what moves right comes around the end.
    pub(crate) turn: u32,
}

impl Move {
    #[inline]
    pub(crate) const fn apply(self, word: u64) -> u64 {
        (word & self.mask).rotate_left(self.turn)
    }

    /// From where [`Move::apply`] brings bits, to where they were.
    #[inline]
    pub(crate) const fn undo(self, word: u64) -> u64 {
        word.rotate_right(self.turn) & self.mask
    }
}

/// An address field, ready for use: one mask for the bits that stay in place, and those that move.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AddressField {
    /// Address bits in the entry.
    pub(crate) entry_mask: u64,
    /// Address bits that can be expressed.
    pub(crate) address_mask: u64,
    /// Bits that stand in the entry where they stand in the address.
    pub(crate) in_place: u64,
    /// The first that move, which are all that do in most formats.
    pub(crate) moved: Move,
    /// Those that move by other distances.
    others: Vec<Move>,
}

impl AddressField {
    /// From checked segments.
    #[must_use]
    pub fn new(segments: &[Segment]) -> Self {
        let mut field = Self::default();
        for segment in segments {
            let ones = u64::MAX >> (64 - segment.width);
            let mask = ones << segment.entry_lsb;
            field.entry_mask |= mask;
            field.address_mask |= ones << segment.address_lsb;
            let turn = (64 + u32::from(segment.address_lsb) - u32::from(segment.entry_lsb)) % 64;
            if turn == 0 {
                field.in_place |= mask;
            } else if field.moved.mask == 0 {
                field.moved = Move { mask, turn };
            } else if let Some(alike) = std::iter::once(&mut field.moved).chain(&mut field.others).find(|other| other.turn == turn) {
                alike.mask |= mask;
            } else {
                field.others.push(Move { mask, turn });
            }
        }
        field
    }

    /// The address in `entry`.
    #[inline]
    #[must_use]
    pub fn extract(&self, entry: u64) -> u64 {
        let address = entry & self.in_place | self.moved.apply(entry);
        self.others.iter().fold(address, |address, other| address | other.apply(entry))
    }

    /// The entry bits for `address`; none if it has bits that the field cannot carry.
    #[inline]
    #[must_use]
    pub fn insert(&self, address: u64) -> Option<u64> {
        if address & !self.address_mask != 0 {
            return None;
        }
        let entry = address & self.in_place | self.moved.undo(address);
        Some(self.others.iter().fold(entry, |entry, other| entry | other.undo(address)))
    }

    /// Whether the address stands in the entry as it is.
    #[must_use]
    pub fn is_in_place(&self) -> bool {
        self.moved.mask == 0
    }

    /// Whether all bits that move do so by the same distance.
    #[inline]
    pub(crate) fn is_plain(&self) -> bool {
        self.others.is_empty()
    }

    fn moves(&self) -> impl Iterator<Item = Move> + '_ {
        let first = [Move { mask: self.in_place, turn: 0 }, self.moved];
        first.into_iter().chain(self.others.iter().copied()).filter(|one| one.mask != 0)
    }

    /// How addresses move from entries with this field to entries with `target`, those bits that both have.
    pub(crate) fn to(&self, target: &Self) -> Vec<Move> {
        let mut moves: Vec<Move> = Vec::new();
        for from in self.moves() {
            for to in target.moves() {
                let mask = from.undo(to.apply(u64::MAX));
                let turn = (64 + from.turn - to.turn) % 64;
                match moves.iter_mut().find(|one| one.turn == turn) {
                    _ if mask == 0 => {}
                    Some(alike) => alike.mask |= mask,
                    None => moves.push(Move { mask, turn }),
                }
            }
        }
        moves
    }
}
