//! Memory for host tables: taken from the caller in chunks, made known to the kernel at guest-physical addresses that are never memory, and handed out.
//!
//! An address space begins with a small chunk, and each further one is twice as large, so that idle address spaces pin little and large ones ask rarely.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vm_memory::MmapRegion;

use super::TableSupply;
use crate::kernel::handle::Ioas;
use crate::kernel::{Errno, Map, MapFlags};
use crate::memory::EntryLayout;
use crate::sync::{RegionTables, TableMemory};
use crate::{Gpa, Iova, Span};

/// Bytes of the first chunk of an address space, and of the largest ones.
const SMALLEST: u64 = 16 << 10;
const LARGEST: u64 = 4 << 20;

/// Guest-physical addresses for chunks: powers of two, aligned to their size.
#[derive(Debug)]
struct Window {
    span: Span,
    /// Where the part begins that was never used; none if there is none.
    next: Option<u64>,
    /// Freed, by size.
    free: BTreeMap<u64, Vec<u64>>,
}

impl Window {
    fn take(&mut self, bytes: u64) -> Option<u64> {
        if let Some(address) = self.free.get_mut(&bytes).and_then(Vec::pop) {
            return Some(address);
        }
        let first = self.next?.checked_next_multiple_of(bytes)?;
        let last = first.checked_add(bytes - 1).filter(|last| *last <= self.span.last)?;
        self.next = last.checked_add(1);
        Some(first)
    }
}

/// Chunks in one parent address space.
#[derive(Debug)]
pub(super) struct TablePool {
    ioas: Ioas,
    supply: Arc<dyn TableSupply>,
    window: Mutex<Window>,
    /// Bytes that all pools of the context have handed out.
    used: Arc<AtomicU64>,
    limit: u64,
    flags: MapFlags,
}

impl TablePool {
    /// Chunks at addresses of `window` in `ioas`, which hardware may read, or read and write. All pools that share `used` have `limit` bytes together.
    pub(super) fn new(ioas: Ioas, supply: Arc<dyn TableSupply>, window: Span, flags: MapFlags, (used, limit): (Arc<AtomicU64>, u64)) -> Arc<Self> {
        let window = Mutex::new(Window { span: window, next: Some(window.first.max(crate::memory::PAGE)), free: BTreeMap::new() });
        Arc::new(Self { ioas, supply, window, used, limit, flags })
    }

    /// A chunk; `bytes` is a power of two, 4096 or more.
    ///
    /// # Errors
    /// ENOMEM: there is no memory, no address, or the limit is reached; as [`Kernel::ioas_map`](crate::kernel::Kernel::ioas_map).
    pub(super) fn chunk(self: &Arc<Self>, bytes: u64) -> Result<Chunk, Errno> {
        let within = |used: u64| used.checked_add(bytes).filter(|used| *used <= self.limit);
        self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within).map_err(|_| Errno::ENOMEM)?;
        let made = self.make(bytes);
        if made.is_err() {
            self.used.fetch_sub(bytes, Ordering::Relaxed);
        }
        made
    }

    fn make(self: &Arc<Self>, bytes: u64) -> Result<Chunk, Errno> {
        let region = usize::try_from(bytes).ok().and_then(|bytes| self.supply.region(bytes)).ok_or(Errno::ENOMEM)?;
        let Some(base) = self.window().take(bytes) else {
            self.supply.release(region);
            return Err(Errno::ENOMEM);
        };
        let map = Map { flags: self.flags, iova: Some(Iova(base)), user_address: region.as_ptr() as u64, length: bytes };
        match self.ioas.kernel().ioas_map(self.ioas.id(), &map) {
            Ok(_) => Ok(Chunk { pool: Arc::clone(self), region: Some(region), base, bytes }),
            Err(errno) => {
                self.supply.release(region);
                self.window().free.entry(bytes).or_default().push(base);
                Err(errno)
            }
        }
    }

    fn window(&self) -> std::sync::MutexGuard<'_, Window> {
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Memory that the hardware reaches. It goes when no page table leads there any more.
#[derive(Debug)]
pub(super) struct Chunk {
    pool: Arc<TablePool>,
    region: Option<Arc<MmapRegion>>,
    base: u64,
    bytes: u64,
}

impl Chunk {
    /// Where hardware finds it.
    pub(super) const fn base(&self) -> Gpa {
        Gpa(self.base)
    }

    /// A part of it, to be filled with tables.
    pub(super) fn tables(&self) -> Option<RegionTables> {
        self.region.as_ref().map(|region| RegionTables::new(Arc::clone(region), Gpa(self.base)))
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        let kernel = self.pool.ioas.kernel();
        let unmap = || kernel.ioas_unmap(self.pool.ioas.id(), Iova(self.base), self.bytes);
        // What the kernel does not let go of is neither given back nor used again: hardware could still get there.
        if let Err(errno) = unmap().or_else(|_| unmap()) {
            tracing::warn!(%errno, address = self.base, bytes = self.bytes, "the kernel keeps memory of host tables");
            std::mem::forget(self.region.take());
            return;
        }
        if let Some(region) = self.region.take() {
            self.pool.supply.release(region);
        }
        self.pool.used.fetch_sub(self.bytes, Ordering::Relaxed);
        self.pool.window().free.entry(self.bytes).or_default().push(self.base);
    }
}

/// The tables of one address space.
#[derive(Debug)]
pub(super) struct PoolTables {
    pool: Arc<TablePool>,
    /// By address.
    chunks: Vec<(Chunk, RegionTables)>,
    /// The chunk that was used last.
    recent: usize,
    bytes: u64,
    limit: u64,
    next: u64,
    /// Why the kernel, or the context, last gave no memory.
    failure: Option<Errno>,
    /// What was refused last was refused by them, and not for the limit: it may be had another time.
    may_come: bool,
}

impl PoolTables {
    /// None yet, and at most `limit` bytes.
    pub(super) const fn new(pool: Arc<TablePool>, limit: u64) -> Self {
        Self { pool, chunks: Vec::new(), recent: 0, bytes: 0, limit, next: SMALLEST, failure: None, may_come: false }
    }

    /// Bytes of all chunks.
    pub(super) const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Why there was no memory although the limit was not reached, if that has happened.
    pub(super) const fn failure(&self) -> Option<Errno> {
        self.failure
    }

    fn grow(&mut self, least: u64) -> Option<()> {
        let bytes = self.next.max(least.checked_next_power_of_two()?);
        if self.bytes.checked_add(bytes)? > self.limit {
            self.may_come = false;
            return None;
        }
        let chunk = match self.pool.chunk(bytes) {
            Ok(chunk) => chunk,
            Err(errno) => {
                tracing::warn!(%errno, bytes, "no memory for host tables");
                (self.failure, self.may_come) = (Some(errno), true);
                return None;
            }
        };
        let tables = chunk.tables()?;
        self.bytes += bytes;
        self.next = (bytes * 2).min(LARGEST);
        self.recent = self.chunks.partition_point(|(other, _)| other.base < chunk.base);
        self.chunks.insert(self.recent, (chunk, tables));
        Some(())
    }

    fn of(&mut self, address: Gpa) -> Option<&mut RegionTables> {
        if !self.chunks.get(self.recent).is_some_and(|chunk| is_within(chunk, address)) {
            self.recent = self.chunks.partition_point(|(chunk, _)| chunk.base <= address.0).checked_sub(1)?;
        }
        self.chunks.get_mut(self.recent).filter(|chunk| is_within(chunk, address)).map(|(_, tables)| tables)
    }
}

impl TableMemory for PoolTables {
    fn allocate(&mut self, bytes: u64) -> Option<Gpa> {
        let recent = self.chunks.get_mut(self.recent).and_then(|(_, tables)| tables.allocate(bytes));
        let found = recent.or_else(|| self.chunks.iter_mut().find_map(|(_, tables)| tables.allocate(bytes)));
        found.or_else(|| {
            self.grow(bytes)?;
            self.chunks.get_mut(self.recent)?.1.allocate(bytes)
        })
    }

    fn may_come(&self) -> bool {
        self.may_come
    }

    fn release(&mut self, table: Gpa, bytes: u64) {
        if let Some(tables) = self.of(table) {
            tables.release(table, bytes);
        }
    }

    fn fill(&mut self, table: Gpa, layout: EntryLayout, entries: &[u64]) {
        if let Some(tables) = self.of(table) {
            tables.fill(table, layout, entries);
        }
    }

    fn store(&mut self, table: Gpa, layout: EntryLayout, index: u64, entry: u64) {
        if let Some(tables) = self.of(table) {
            tables.store(table, layout, index, entry);
        }
    }

    fn store_all(&mut self, table: Gpa, layout: EntryLayout, entries: impl Iterator<Item = (u64, u64)>) -> usize {
        match self.of(table) {
            Some(tables) => tables.store_all(table, layout, entries),
            None => entries.count(),
        }
    }

    fn load(&self, table: Gpa, layout: EntryLayout, index: u64) -> u64 {
        let chunk = self.chunks.partition_point(|(chunk, _)| chunk.base <= table.0).checked_sub(1).and_then(|index| self.chunks.get(index));
        chunk.filter(|chunk| is_within(chunk, table)).map_or(0, |(_, tables)| tables.load(table, layout, index))
    }

    fn compare_exchange(&mut self, table: Gpa, layout: EntryLayout, index: u64, old: u64, new: u64) -> u64 {
        self.of(table).map_or(0, |tables| tables.compare_exchange(table, layout, index, old, new))
    }
}

/// Whether a chunk has this address.
fn is_within((chunk, _): &(Chunk, RegionTables), address: Gpa) -> bool {
    address.0.checked_sub(chunk.base).is_some_and(|offset| offset < chunk.bytes)
}
