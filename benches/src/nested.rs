//! A host table in another format than the guest's, kept in step; nobody is told of what has to be invalidated, so that no kernel's time is measured.

use std::hint::black_box;
use std::sync::Arc;

use stagecraft::Gpa;
use stagecraft::plugin::{Plugins, TableConfig};
use stagecraft::sync::{CommitError, Committer, Needed, Nested, NestedTable, RegionTables};
use vm_memory::MmapRegion;

/// Nobody is told.
#[derive(Debug)]
pub struct Untold;

impl Committer for Untold {
    fn invalidate(&mut self, needed: &Needed) -> Result<(), CommitError> {
        black_box(needed);
        Ok(())
    }
}

/// What live address spaces of the benches end in.
pub type Sink = Nested<RegionTables, Untold>;

/// An empty SMMUv3 stage 1 table in memory of so many bytes.
#[must_use]
pub fn sink(plugins: &Plugins, bytes: usize) -> Sink {
    let config = TableConfig::new("arm-smmuv3/stage1", &[("granule", 4096), ("input-bits", 48), ("output-bits", 48)]);
    let format = Box::new(plugins.by_format(&config.format).unwrap().open(&config).unwrap());
    let region = Arc::new(MmapRegion::new(bytes).unwrap());
    Nested::new(NestedTable::new(format, RegionTables::new(region, Gpa(1 << 46))).unwrap(), Untold)
}
