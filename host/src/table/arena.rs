//! Memory for tables that Stagecraft builds.

use std::collections::BTreeMap;

use crate::Gpa;
use crate::memory::{EntryLayout, EntryMemory, PAGE, ReadError};
use crate::table::{ByteOrder, lanes};

/// Words of one chunk: 2 MiB.
const CHUNK: usize = 1 << 18;

/// Bytes of the smallest table: a cache line.
const SMALLEST: u64 = 64;

/// Table memory from `base` upwards, handed out in pages of 4 KiB, which small tables share, and never moved; used again after [`Arena::reset`].
#[derive(Debug)]
pub struct Arena {
    base: u64,
    limit: u64,
    /// Each covers `CHUNK` words of the address range; a table larger than that is refused with the geometry.
    chunks: Vec<Chunk>,
    /// Pages handed out so far, from the base.
    used: u64,
    /// Tables given back, by bytes: their offsets.
    free: BTreeMap<u64, Vec<u64>>,
    /// For each page that was handed out: the size of the table that starts there, as a power of two, or zero. Pages of small tables count as one table.
    live: Vec<u8>,
    /// For each page of the chunks: which of its lines may hold something. The others are zero.
    written: Vec<u64>,
    /// Bytes of all tables in use.
    bytes: u64,
    /// The processor was told that this page will be written.
    expected: Option<u64>,
}

/// Words of table memory that begin at a page of the host: tables are shared with hardware by the page, and written by the cache line.
#[derive(Debug)]
struct Chunk {
    memory: Box<[u64]>,
    first: usize,
}

impl Chunk {
    fn new() -> Self {
        let memory = vec![0; CHUNK + (PAGE / 8) as usize].into_boxed_slice();
        let first = memory.as_ptr().align_offset(PAGE as usize);
        Self { memory, first }
    }

    /// The words from `word` to the end.
    #[inline]
    fn words(&self, word: usize) -> &[u64] {
        &self.memory[self.first + word..self.first + CHUNK]
    }

    #[inline]
    fn words_mut(&mut self, word: usize) -> &mut [u64] {
        &mut self.memory[self.first + word..self.first + CHUNK]
    }
}

/// No memory is left for tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no room for another table: there may be {limit:#x} bytes of them, from {base:#x}")]
pub struct Full {
    /// Where the arena starts.
    pub base: u64,
    /// Its size, in bytes.
    pub limit: u64,
}

impl Arena {
    /// Table memory at `base`, a multiple of 2 MiB, of at most `limit` bytes.
    ///
    /// # Panics
    /// If `base` is not a multiple of 2 MiB.
    #[must_use]
    pub fn new(base: u64, limit: u64) -> Self {
        assert!(base.is_multiple_of(Self::ALIGNMENT), "an arena starts at a multiple of 2 MiB");
        Self {
            base,
            limit: limit.min(u64::MAX - base),
            chunks: Vec::new(),
            used: 0,
            free: BTreeMap::new(),
            live: Vec::new(),
            written: Vec::new(),
            bytes: 0,
            expected: None,
        }
    }

    /// What `base` is a multiple of: no table is larger.
    pub const ALIGNMENT: u64 = (CHUNK * 8) as u64;

    /// Forgets all tables and keeps the memory.
    pub fn reset(&mut self) {
        self.used = 0;
        self.free.clear();
        self.live.clear();
        self.bytes = 0;
        self.expected = None;
    }

    /// Address of the first table.
    #[must_use]
    pub const fn base(&self) -> u64 {
        self.base
    }

    /// The highest address that a table may take, if any may.
    #[must_use]
    pub const fn last(&self) -> u64 {
        self.base + self.limit.saturating_sub(1)
    }

    /// Bytes of all tables in use; of small tables, those of the pages that they are in.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of memory that the arena holds.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.chunks.len() as u64 * Self::ALIGNMENT
    }

    /// The pages in use, ascending: address, and its 512 words in the byte order of memory.
    pub fn pages(&self) -> impl Iterator<Item = (Gpa, &[u64])> + '_ {
        let tables = self.live.iter().enumerate().filter(|(_, size_log2)| **size_log2 != 0);
        tables.map(|(page, size_log2)| (page as u64 * PAGE, 1_u64 << size_log2)).flat_map(move |(offset, bytes)| {
            (offset..offset + bytes).step_by(PAGE as usize).map(move |page| {
                let word = (page / 8) as usize;
                (Gpa(self.base + page), &self.chunks[word / CHUNK].words(word % CHUNK)[..(PAGE / 8) as usize])
            })
        })
    }

    /// A root table of `bytes` bytes, aligned to its size and to 4 KiB: registers hold no less. As [`Arena::allocate_in`].
    pub(crate) fn allocate_root(&mut self, bytes: u64) -> Result<u64, Full> {
        self.allocate_in(bytes, bytes.max(PAGE))
    }

    /// A table of `bytes` bytes that has `room` bytes for itself, and is aligned to that. Its contents are whatever was there; what follows it in its room is zero.
    pub(crate) fn allocate_in(&mut self, bytes: u64, room: u64) -> Result<u64, Full> {
        let offset = self.allocate(room)?;
        if bytes < room {
            self.words(offset)[(bytes / 8) as usize..(room / 8) as usize].fill(0);
        }
        Ok(offset)
    }

    /// A table of `bytes` bytes, aligned to its size. Its contents are whatever was there.
    fn allocate(&mut self, bytes: u64) -> Result<u64, Full> {
        let offset = self.claim(bytes)?;
        self.expect_writes(offset, bytes);
        Ok(offset)
    }

    /// The same where all was written in advance, and an account kept of it: see [`Arena::room_ahead`].
    #[inline]
    pub(crate) fn claim(&mut self, bytes: u64) -> Result<u64, Full> {
        let bytes = bytes.next_power_of_two().max(SMALLEST);
        if bytes < PAGE {
            if let Some(offset) = self.free.get_mut(&bytes).and_then(Vec::pop) {
                return Ok(offset);
            }
            // A page of such tables, which stays one until all tables are forgotten. The first is handed out, the next ones follow it.
            let first = self.allocate(PAGE)?;
            self.free.entry(bytes).or_default().extend((1..PAGE / bytes).rev().map(|table| first + table * bytes));
            return Ok(first);
        }
        if let Some(offset) = self.free.get_mut(&bytes).and_then(Vec::pop) {
            self.keep(offset, bytes);
            return Ok(offset);
        }
        let full = Full { base: self.base, limit: self.limit };
        let offset = self.used.next_multiple_of(bytes);
        let end = offset.checked_add(bytes).filter(|end| *end <= self.limit && bytes <= Self::ALIGNMENT).ok_or(full)?;
        while self.capacity() < end {
            self.chunks.push(Chunk::new());
            self.written.resize((self.capacity() / PAGE) as usize, 0);
        }
        self.used = end;
        self.keep(offset, bytes);
        Ok(offset)
    }

    /// Remembers a table that was handed out.
    #[inline]
    fn keep(&mut self, offset: u64, bytes: u64) {
        self.bytes += bytes;
        let page = (offset / PAGE) as usize;
        if self.live.len() <= page {
            self.live.resize(page + 1, 0);
        }
        self.live[page] = bytes.trailing_zeros() as u8;
    }

    /// The offset of the table of `bytes` bytes that [`Arena::allocate`] would hand out next, if there is memory for it.
    #[inline]
    pub(crate) fn upcoming(&self, bytes: u64) -> Option<u64> {
        let bytes = bytes.next_power_of_two().max(SMALLEST);
        if let Some(offset) = self.free.get(&bytes).and_then(|free| free.last()) {
            return Some(*offset);
        }
        if bytes < PAGE {
            return self.upcoming(PAGE);
        }
        let offset = self.used.next_multiple_of(bytes);
        (offset + bytes <= self.limit.min(self.capacity())).then_some(offset)
    }

    /// Any line of the table of `bytes` bytes at `offset` may hold something from now on.
    fn expect_writes(&mut self, offset: u64, bytes: u64) {
        let first = (offset / PAGE) as usize;
        self.written[first] = u64::MAX;
        if bytes > PAGE {
            self.written[first + 1..first + bytes.div_ceil(PAGE) as usize].fill(u64::MAX);
        }
    }

    /// Where the table of `bytes` bytes can be written that is handed out next, at [`Arena::upcoming`]. With `keeps_account`, and if it is one page: also which of
    /// its 64 lines may hold something, the first in the lowest bit, for the caller to keep.
    #[inline(always)]
    pub(crate) fn room_ahead(&mut self, offset: u64, bytes: u64, keeps_account: bool) -> (&mut [u64], Option<&mut u64>) {
        let keeps_account = keeps_account && bytes == PAGE;
        if !keeps_account {
            self.expect_writes(offset, bytes);
        }
        let word = (offset / 8) as usize;
        let account = if keeps_account { self.written.get_mut((offset / PAGE) as usize) } else { None };
        (self.chunks[word / CHUNK].words_mut(word % CHUNK), account)
    }

    /// Clears all small tables that are not handed out, to which something may have been written all the same: the pages that they share are.
    pub(crate) fn wipe_all(&mut self) {
        let free = std::mem::take(&mut self.free);
        for (bytes, offsets) in free.range(..PAGE) {
            offsets.iter().for_each(|offset| self.words(*offset)[..(*bytes / 8) as usize].fill(0));
        }
        self.free = free;
    }

    /// Tells the processor that the table after the last one will be written soon, once.
    pub(crate) fn prefetch(&mut self) {
        if self.expected == Some(self.used) {
            return;
        }
        self.expected = Some(self.used);
        let word = (self.used / 8) as usize;
        if let Some(chunk) = self.chunks.get_mut(word / CHUNK) {
            lanes::prefetch(&mut chunk.words_mut(word % CHUNK)[..(PAGE / 8) as usize]);
        }
    }

    /// Takes back a table of `bytes` bytes.
    pub(crate) fn release(&mut self, offset: u64, bytes: u64) {
        let small = bytes.next_power_of_two().max(SMALLEST);
        if small < PAGE {
            self.free.entry(small).or_default().push(offset);
            return;
        }
        let size_log2 = self.live.get_mut((offset / PAGE) as usize).map_or(0, std::mem::take);
        if size_log2 != 0 {
            let bytes = 1 << size_log2;
            self.bytes -= bytes;
            self.free.entry(bytes).or_default().push(offset);
        }
    }

    /// The words from `offset` to the end of its chunk: at least the table that starts there.
    #[inline]
    pub(crate) fn words(&mut self, offset: u64) -> &mut [u64] {
        let word = (offset / 8) as usize;
        self.chunks[word / CHUNK].words_mut(word % CHUNK)
    }
}

impl EntryMemory for Arena {
    fn read_entries(&self, address: Gpa, layout: EntryLayout, entries: &mut [u64]) -> Result<(), ReadError> {
        let error = ReadError(address);
        let offset = address.0.checked_sub(self.base).filter(|offset| *offset < self.used).ok_or(error)?;
        let word = (offset / 8) as usize;
        let words = self.chunks.get(word / CHUNK).map(|chunk| chunk.words(word % CHUNK)).ok_or(error)?;
        match layout.bytes {
            8 => {
                let source = words.get(..entries.len()).ok_or(error)?;
                for (entry, word) in entries.iter_mut().zip(source) {
                    *entry = if layout.order == ByteOrder::Big { word.to_le().swap_bytes() } else { u64::from_le(*word) };
                }
            }
            _ => {
                for (index, entry) in entries.iter_mut().enumerate() {
                    let at = (offset % 8 / 4) as usize + index;
                    let bytes = words.get(at / 2).ok_or(error)?.to_ne_bytes();
                    let half = [bytes[at % 2 * 4], bytes[at % 2 * 4 + 1], bytes[at % 2 * 4 + 2], bytes[at % 2 * 4 + 3]];
                    *entry = u64::from(if layout.order == ByteOrder::Big { u32::from_be_bytes(half) } else { u32::from_le_bytes(half) });
                }
            }
        }
        Ok(())
    }
}

/// Writes the same into the entries `first..next` of a table that starts at `words[0]`.
pub(crate) fn fill_entries(words: &mut [u64], layout: EntryLayout, first: usize, next: usize, entry: u64) {
    let word = layout.word(entry);
    if layout.bytes == 8 {
        words[first..next].fill(word);
        return;
    }
    // One that shares its word with another at either end, and pairs.
    let pairs = first.next_multiple_of(2)..next / 2 * 2;
    if pairs.start >= pairs.end {
        (first..next).for_each(|slot| write_entry(words, layout, slot, entry));
        return;
    }
    (first..pairs.start).chain(pairs.end..next).for_each(|slot| write_entry(words, layout, slot, entry));
    words[pairs.start / 2..pairs.end / 2].fill(word | word << 32);
}

/// Writes entry `index` of a table that starts at `words[0]`.
#[inline]
pub(crate) fn write_entry(words: &mut [u64], layout: EntryLayout, index: usize, entry: u64) {
    match (layout.bytes, layout.order) {
        (8, ByteOrder::Little) => words[index] = entry.to_le(),
        (8, ByteOrder::Big) => words[index] = entry.to_be(),
        (_, order) => {
            let half = if order == ByteOrder::Big { (entry as u32).to_be_bytes() } else { (entry as u32).to_le_bytes() };
            let mut bytes = words[index / 2].to_ne_bytes();
            bytes[index % 2 * 4..index % 2 * 4 + 4].copy_from_slice(&half);
            words[index / 2] = u64::from_ne_bytes(bytes);
        }
    }
}
