//! What the tests of live address spaces share: guests whose memory can be changed, a model of what was told, and hosts.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};

use stagecraft::memory::{Budget, EntryMemory, Limits, MemoryMap};
use stagecraft::plugin::TableConfig;
use stagecraft::sync::{CommitError, Committer, Needed, NestedTable, RegionTables, Sink};
use stagecraft::table::{Collector, Encoded, Finding, Format, FormatError, Geometry, Mapping, Meaning, Piece, Table, WalkError};
use stagecraft::{Attributes, Change, Gpa, Span};
use stagecraft_tests::reference::snapshot::Memory;
use vm_memory::{MmapRegion, VolatileMemory};

use crate::configs;
pub use crate::configs::View;

/// What was told of an address space, kept as pieces; insists on everything that a batch promises.
#[derive(Clone, Debug, Default)]
pub struct Model {
    pub pieces: BTreeMap<u64, Piece>,
}

impl Model {
    pub fn apply(&mut self, batch: &[Change]) {
        let unmaps = batch.iter().take_while(|change| matches!(change, Change::Unmap(_))).count();
        assert!(batch[unmaps..].iter().all(|change| matches!(change, Change::Map(_))), "unmaps come first");
        for part in [&batch[..unmaps], &batch[unmaps..]] {
            assert!(part.windows(2).all(|pair| pair[0].span().last < pair[1].span().first), "ascending, and apart");
        }
        for change in batch {
            match change {
                Change::Unmap(span) => {
                    let piece = self.pieces.remove(&span.first);
                    assert_eq!(piece.map(|piece| piece.iova), Some(*span), "exactly one piece is unmapped");
                }
                Change::Map(piece) => {
                    let before = self.pieces.range(..=piece.iova.last).next_back();
                    assert!(before.is_none_or(|(_, before)| before.iova.last < piece.iova.first), "nothing is mapped at {piece:x?}: {before:x?}");
                    self.pieces.insert(piece.iova.first, *piece);
                }
            }
        }
    }

    /// What is offered again is what is mapped there, neither more nor less.
    pub fn insist_on(&self, span: Span, offered: &[Change]) {
        let here = self.pieces.values().filter(|piece| piece.iova.intersection(span).is_some());
        let wanted: Vec<(Span, u64)> = here.map(|piece| (piece.iova, piece.address)).collect();
        let offered = offered.iter().map(|change| match change {
            Change::Map(piece) => (piece.iova, piece.address),
            Change::Unmap(span) => panic!("{span} is unmapped by an offer"),
        });
        assert_eq!(offered.collect::<Vec<_>>(), wanted);
    }

    /// Maximal runs for a request without privileges.
    pub fn mappings(&self) -> Vec<Mapping> {
        self.mappings_of(1)
    }

    /// The same, without pieces of less than so many bytes.
    pub fn mappings_of(&self, least: u64) -> Vec<Mapping> {
        let mut mappings = Vec::new();
        for piece in self.pieces.values().filter(|piece| piece.iova.length_minus_one() >= least - 1) {
            let access = piece.attributes.access(false);
            if !access.is_none() {
                append(&mut mappings, Mapping { iova: piece.iova, address: piece.address, access });
            }
        }
        mappings
    }
}

/// Adds a mapping behind all others, as a part of the last one where it continues it.
pub fn append(mappings: &mut Vec<Mapping>, mapping: Mapping) {
    if let Some(last) = mappings.last_mut()
        && last.access == mapping.access
        && last.iova.last.checked_add(1) == Some(mapping.iova.first)
        && last.address.checked_add(last.iova.length_minus_one()).and_then(|address| address.checked_add(1)) == Some(mapping.address)
    {
        last.iova.last = mapping.iova.last;
    } else {
        mappings.push(mapping);
    }
}

/// A format of the built-in plugins.
pub fn format(config: &TableConfig) -> Box<dyn Format> {
    Box::new(configs::plugins().by_format(&config.format).unwrap().open(config).unwrap())
}

/// Counts what it is called for, and invalidates nothing: for hosts that no hardware looks at.
#[derive(Debug, Default)]
pub struct Counting {
    pub calls: u64,
    pub last: Needed,
}

impl Committer for Counting {
    fn invalidate(&mut self, needed: &Needed) -> Result<(), CommitError> {
        assert!(!needed.is_empty());
        self.calls += 1;
        self.last = needed.clone();
        Ok(())
    }
}

/// Where host tables are.
pub const HOST_BASE: u64 = 1 << 30;

/// A host table, the model beside it, and a count of commits.
pub struct Host {
    pub config: TableConfig,
    pub table: NestedTable<RegionTables>,
    pub model: Model,
    pub committer: Counting,
    pub commits: u64,
    /// Held by who walks the tables as hardware does: an invalidation waits until the walks that have begun are over.
    pub walking: Arc<RwLock<()>>,
    region: Arc<MmapRegion>,
}

impl Host {
    pub fn new(config: &TableConfig, bytes: usize) -> Self {
        Self::of(format(config), config, bytes)
    }

    /// The same with another format, which writes the same tables.
    pub fn of(format: Box<dyn Format>, config: &TableConfig, bytes: usize) -> Self {
        let region = Arc::new(MmapRegion::new(bytes).unwrap());
        let table = NestedTable::new(format, RegionTables::new(Arc::clone(&region), Gpa(HOST_BASE))).unwrap();
        let mut config = config.clone();
        for (setting, address) in table.roots() {
            config.settings.set(setting, address.0);
        }
        Self { config, table, model: Model::default(), committer: Counting::default(), commits: 0, walking: Arc::default(), region }
    }

    /// Where the tables are.
    pub fn region(&self) -> Arc<MmapRegion> {
        Arc::clone(&self.region)
    }

    /// What the engine reads in the host's table.
    pub fn walked(&self) -> Vec<Mapping> {
        let mut table = Table::open(format(&self.config)).unwrap();
        walk(&mut table, self.table.memory(), &MemoryMap::everything(64))
    }

    /// The host's tables for the reference.
    pub fn memory(&self) -> Memory {
        let mut memory = Memory::default();
        for offset in (0..self.region.size()).step_by(4096) {
            let mut page = [0; 4096];
            self.region.get_slice(offset, 4096).unwrap().copy_to(&mut page[..]);
            if page != [0; 4096] {
                memory.pages.insert(HOST_BASE + offset as u64, page.into());
            }
        }
        // What an entry can point to in the region and is zero is there, too.
        memory.add_zeroed(HOST_BASE, self.region.size() as u64);
        memory
    }
}

impl Sink for Host {
    fn apply(&mut self, batch: &[Change]) {
        self.model.apply(batch);
        self.table.apply(batch);
    }

    fn commit(&mut self) -> Result<(), CommitError> {
        self.commits += 1;
        if !self.table.needed().is_empty() {
            let needed = self.table.needed().clone();
            self.committer.invalidate(&needed)?;
        }
        drop(self.walking.write().unwrap());
        self.table.completed();
        Ok(())
    }

    fn wants(&self) -> Option<Span> {
        self.table.wants()
    }

    fn offer(&mut self, span: Span, pieces: &[Change]) {
        self.model.insist_on(span, pieces);
        self.table.offer(span, pieces);
    }
}

/// A format that fails: asked what an entry is, or for a leaf with attributes.
pub struct Failing {
    format: Box<dyn Format>,
    fails: Box<dyn FnMut(Option<Attributes>) -> bool + Send>,
}

impl Failing {
    /// One that cannot read entries from when it is told to.
    pub fn to_read(format: Box<dyn Format>, fails: Arc<AtomicBool>) -> Self {
        Self { format, fails: Box::new(move |leaf| leaf.is_none() && fails.load(Ordering::Relaxed)) }
    }

    /// One that cannot write some leaves.
    pub fn to_write(format: Box<dyn Format>, mut fails: impl FnMut(Attributes) -> bool + Send + 'static) -> Self {
        Self { format, fails: Box::new(move |leaf| leaf.is_some_and(&mut fails)) }
    }

    fn check(&mut self, leaf: Option<Attributes>) -> Result<(), FormatError> {
        if (self.fails)(leaf) { Err("it trapped".into()) } else { Ok(()) }
    }
}

impl Format for Failing {
    fn geometry(&mut self) -> Result<Geometry, FormatError> {
        self.check(None)?;
        self.format.geometry()
    }
    fn decode(&mut self, level: u8, inherited: u64, pattern: u64) -> Result<Meaning, FormatError> {
        self.check(None)?;
        self.format.decode(level, inherited, pattern)
    }
    fn decode_entry(&mut self, level: u8, inherited: u64, entry: u64) -> Result<Meaning, FormatError> {
        self.check(None)?;
        self.format.decode_entry(level, inherited, entry)
    }
    fn explain(&mut self, level: u8, inherited: u64, pattern: u64) -> Result<Vec<Finding>, FormatError> {
        self.check(None)?;
        self.format.explain(level, inherited, pattern)
    }
    fn encode_leaf(&mut self, level: u8, size_log2: u8, attributes: Attributes) -> Result<Option<Encoded>, FormatError> {
        self.check(Some(attributes))?;
        self.format.encode_leaf(level, size_log2, attributes)
    }
    fn encode_table(&mut self, level: u8, next: u8) -> Result<Option<u64>, FormatError> {
        self.format.encode_table(level, next)
    }
}

/// What the engine finds in tables.
pub fn walk<M: EntryMemory + ?Sized>(table: &mut Table, memory: &M, map: &MemoryMap) -> Vec<Mapping> {
    walk_within(1 << 18, table, memory, map).unwrap()
}

/// The same, if so many tables are enough.
pub fn walk_within<M: EntryMemory + ?Sized>(tables: u64, table: &mut Table, memory: &M, map: &MemoryMap) -> Result<Vec<Mapping>, WalkError> {
    let mut collector = Collector::new(table.geometry().privileged, 0);
    let budget = Budget::new(Limits { tables, ..Limits::default() });
    table.walk(memory, map, Span::ALL, &budget, &mut collector)?;
    Ok(collector.into_mappings())
}
