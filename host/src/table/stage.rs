//! Tables on their way out: filled in a page that stays in the cache, and then written to memory at once.
//!
//! A large conversion writes tables that nobody reads soon. Written in place, each line of them is first fetched from memory, to be overwritten whole; staged,
//! they go past the cache. A small conversion is better off in place: what it wrote is still in the cache when it is needed.

use crate::memory::PAGE;
use crate::table::lanes;

/// Words of a staged table.
const WORDS: usize = (PAGE / 8) as usize;

/// So many bytes of tables a conversion writes in place.
pub(crate) const IN_PLACE: u64 = 64 << 10;

/// A table that is being filled.
#[repr(align(64))]
pub(crate) struct Page([u64; WORDS]);

impl Page {
    pub(crate) const fn words(&mut self) -> &mut [u64] {
        &mut self.0
    }
}

/// Whether a table of `bytes` bytes, after `before` bytes of tables, is filled in a page of its own and then written past the cache.
pub(super) const fn is_staged(bytes: u64, before: u64) -> bool {
    bytes <= PAGE && before >= IN_PLACE && lanes::STREAMS
}

/// Pages for tables that are being filled.
#[derive(Default)]
pub(crate) struct Stage {
    spare: Vec<Box<Page>>,
    written: bool,
}

impl std::fmt::Debug for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Stage")
    }
}

impl Stage {
    /// A page for a table of `bytes` bytes, after `before` bytes of tables; none if it is to be filled in place.
    pub(crate) fn page(&mut self, bytes: u64, before: u64) -> Option<Box<Page>> {
        if !is_staged(bytes, before) {
            return None;
        }
        Some(self.spare.pop().unwrap_or_else(|| Box::new(Page([0; WORDS]))))
    }

    /// Writes a table of `bytes` bytes to where it belongs: the first words of `target`.
    pub(crate) fn write(&mut self, page: Box<Page>, target: &mut [u64], bytes: u64) {
        let words = WORDS.min((bytes / 8) as usize);
        lanes::stream(&page.0[..words], &mut target[..words]);
        self.written = true;
        self.spare.push(page);
    }

    /// Somebody else writes past the cache now, whether that is of use or not.
    pub(crate) const fn expect_writes(&mut self) {
        self.written = true;
    }

    /// Takes back the page of a table that was written past the cache by somebody else.
    pub(crate) fn skip(&mut self, page: Option<Box<Page>>) {
        self.written = true;
        self.spare.extend(page);
    }

    /// Takes back the page of a table that is not needed.
    pub(crate) fn forget(&mut self, page: Box<Page>) {
        self.spare.push(page);
    }
}

/// What went past the cache is in memory before anybody else looks.
impl Drop for Stage {
    fn drop(&mut self) {
        if self.written {
            lanes::fence();
        }
    }
}
