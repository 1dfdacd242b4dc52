//! Preallocated table memory for the rivals: pages handed out one after the other.

/// A page of table memory.
#[repr(C, align(4096))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page(pub [u64; 512]);

/// Table memory at `base` of the address space that the built table's entries speak of. Pages are not zeroed when the pool is used again.
#[derive(Debug)]
pub struct Pool {
    base: u64,
    pages: Vec<Page>,
    used: usize,
}

impl Pool {
    /// Room for `pages` tables, touched, so that no page fault is measured.
    #[must_use]
    pub fn new(base: u64, pages: usize) -> Self {
        Self { base, pages: vec![Page([1; 512]); pages], used: 0 }
    }

    /// Address of the first page.
    #[must_use]
    pub const fn base(&self) -> u64 {
        self.base
    }

    /// Forgets all tables.
    pub const fn reset(&mut self) {
        self.used = 0;
    }

    /// Index of a page that is free.
    pub fn allocate(&mut self) -> usize {
        assert!(self.used < self.pages.len(), "the pool is as large as the table to be built");
        self.used += 1;
        self.used - 1
    }

    /// Address of the page at `index`.
    #[must_use]
    pub const fn address(&self, index: usize) -> u64 {
        self.base + index as u64 * 4096
    }

    /// The words of the page at `index`.
    pub fn words(&mut self, index: usize) -> &mut [u64; 512] {
        &mut self.pages[index].0
    }

    /// The pages in use.
    #[must_use]
    pub fn pages(&self) -> &[Page] {
        &self.pages[..self.used]
    }

    /// All pages, used or not.
    pub fn all(&mut self) -> &mut [Page] {
        &mut self.pages
    }
}
