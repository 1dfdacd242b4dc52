//! Guest memory, made known to the kernel once per context: pinned once, counted once, however many address spaces use it.
//!
//! ```text
//!   guest memory  --map, once per block-->  "GPA" IOAS, at guest-physical addresses  --copy-->  IOAS of an address space
//!                                              |                                     --copy-->  IOAS of another one
//!                                              +-- parent of nested page tables
//! ```
//!
//! A region becomes one area of the GPA IOAS, or several, called *blocks*, because the kernel removes areas only whole: what is to be taken away by
//! itself later (memory hot-plug, ballooning) needs blocks of that size. All copies share the pages of the block that they were made from, so the kernel
//! pins and counts each page once.
//!
//! # When pages are pinned
//!
//! The kernel pins a page when the first area with it stands behind a page table, and lets go of it with the last. Without a page table behind the GPA
//! IOAS only what address spaces have mapped is pinned, which costs time for each mapping. With one, of a nested parent or of [`Pins::hold`], all memory is
//! pinned all the time, and copies cost no pinning. The budget counts all regions from when they are added, so it holds in both cases.
//!
//! # Taking memory away
//!
//! 1. [`Pins::withdraw`]: nobody makes new copies of it.
//! 2. Each address space is committed once and lets go of what it had copied.
//! 3. [`Pins::remove`]: the kernel forgets it. While a copy is left this is refused, because then the device could still reach the memory.
//!
//! Where nothing is copied, `remove` alone is enough. Only when it has returned may the memory be given back or unmapped in this process.

mod block;

pub(crate) use block::{Use, View};

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::kernel::handle::{Device, Hwpt, Ioas};
use crate::kernel::{CopyRange, Errno, HwptFlags, IoasId, Kernel, Map, MapFile, MapFlags};
use crate::{Gpa, Iova, Span};
use block::Block;

/// Regions and blocks begin and end at multiples of this, bytes.
pub const PAGE: u64 = 4096;

/// Where a region's memory is.
#[derive(Clone, Copy, Debug)]
pub enum Backing<'a> {
    /// At this address of the process. It stays mapped there until the region is removed.
    User(u64),
    /// In a file of memory (memfd), from this offset on, bytes.
    File(BorrowedFd<'a>, u64),
    /// The same memory as at another guest-physical address, which is known already: neither pinned nor counted again.
    Alias(Gpa),
}

/// Guest memory.
#[derive(Clone, Copy, Debug)]
pub struct Region<'a> {
    /// Where the guest has it. A multiple of [`PAGE`].
    pub gpa: Gpa,
    /// Bytes. A multiple of [`PAGE`], not 0.
    pub length: u64,
    /// Where it is.
    pub backing: Backing<'a>,
    /// Devices may write to it. What is mapped for reading and writing is narrowed to reading where this is false.
    pub writable: bool,
    /// Bytes that can be removed by themselves, a multiple of [`PAGE`]: blocks begin at multiples of it within the region. None: the region can only be
    /// removed as a whole.
    pub block: Option<u64>,
}

/// Memory could not be added or taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PinError {
    /// More than the context may pin.
    #[error("{asked:#x} bytes of guest memory at {gpa} are more than the {left:#x} that may still be pinned")]
    Budget {
        /// Where the region begins.
        gpa: Gpa,
        /// Bytes of the region.
        asked: u64,
        /// Bytes of the budget that are left.
        left: u64,
    },
    /// Address, length, backing or block size are not multiples of [`PAGE`], or the length is 0.
    #[error("guest memory at {gpa}, {length:#x} bytes, does not consist of whole pages")]
    Pages {
        /// Where the region begins.
        gpa: Gpa,
        /// Its length, bytes.
        length: u64,
    },
    /// The region reaches beyond the last address.
    #[error("{length:#x} bytes of guest memory at {gpa} reach beyond the last address")]
    Beyond {
        /// Where the region begins.
        gpa: Gpa,
        /// Its length, bytes.
        length: u64,
    },
    /// There is memory already.
    #[error("guest memory at {asked} overlaps {present}")]
    Overlap {
        /// The region.
        asked: Span,
        /// A block that is there.
        present: Span,
    },
    /// Nothing is known there.
    #[error("no guest memory is known at {0}")]
    Absent(Span),
    /// A block would be cut.
    #[error("{asked} cuts the block {block}, which can only be taken away as a whole")]
    Cut {
        /// What was asked for.
        asked: Span,
        /// The block.
        block: Span,
    },
    /// An address space, or an alias, still has copies of it.
    #[error("guest memory at {block} is still copied {copies} times: withdraw it and commit the address spaces that use it")]
    InUse {
        /// The block.
        block: Span,
        /// How many areas were copied from it.
        copies: u64,
    },
    /// The kernel refused.
    #[error("the kernel refused guest memory at {span}: {errno}")]
    Kernel {
        /// The block, or the memory that would have been pinned.
        span: Span,
        /// Why. ENOMEM is also the limit of locked memory.
        errno: Errno,
    },
}

/// What a context has pinned, or may pin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PinFigures {
    /// Blocks, aliases included.
    pub blocks: u64,
    /// Bytes that are counted.
    pub bytes: u64,
    /// Bytes that may be.
    pub limit: u64,
    /// Areas that were copied from all blocks.
    pub copies: u64,
}

#[derive(Debug, Default)]
struct State {
    view: Arc<View>,
    /// Bytes that are counted.
    bytes: u64,
    /// Blocks that the kernel has and should not: whoever comes next tries again.
    leftovers: Vec<(Span, u64)>,
}

/// The guest memory of one context: see the [module](self).
///
/// All methods may be called from any thread, while address spaces are in use.
#[derive(Debug)]
pub struct Pins {
    ioas: Ioas,
    limit: u64,
    state: Mutex<State>,
    /// Counts changes of the view.
    generation: AtomicU64,
}

impl Pins {
    /// No memory yet; at most `limit` bytes of it.
    ///
    /// # Errors
    /// As [`Kernel::ioas_alloc`].
    pub fn new(kernel: &Arc<dyn Kernel>, limit: u64) -> Result<Arc<Self>, Errno> {
        Ok(Arc::new(Self { ioas: Ioas::alloc(kernel)?, limit, state: Mutex::default(), generation: AtomicU64::new(0) }))
    }

    /// The IOAS with guest memory at guest-physical addresses: the parent of nested page tables. Only this object changes its areas.
    #[must_use]
    pub const fn ioas(&self) -> &Ioas {
        &self.ioas
    }

    /// The kernel.
    #[must_use]
    pub fn kernel(&self) -> &Arc<dyn Kernel> {
        self.ioas.kernel()
    }

    /// What is pinned, or may be.
    #[must_use]
    pub fn figures(&self) -> PinFigures {
        let state = self.lock();
        let copies = state.view.blocks().iter().map(|block| block.users()).sum();
        PinFigures { blocks: state.view.blocks().len() as u64, bytes: state.bytes, limit: self.limit, copies }
    }

    /// Pins all memory, that which is added later included, as long as the page table lives: for the unit in front of `device`, which need not be attached.
    ///
    /// # Errors
    /// [`PinError::Kernel`]: memory lies where the unit cannot translate (EADDRINUSE), or cannot be pinned.
    pub fn hold(&self, device: &Device) -> Result<Hwpt, PinError> {
        self.ioas.hwpt(device, HwptFlags::NONE, None).map_err(|errno| PinError::Kernel { span: self.lock().view.hull(), errno })
    }

    /// Makes a region known: all of it or, on an error, nothing.
    ///
    /// # Errors
    /// All of [`PinError`] but `InUse`.
    pub fn add(&self, region: &Region<'_>) -> Result<(), PinError> {
        let span = region.check()?;
        let mut state = self.lock();
        self.clear_leftovers(&mut state);
        if let Some(present) = state.view.within(span).first() {
            return Err(PinError::Overlap { asked: span, present: present.span });
        }
        let counted = if matches!(region.backing, Backing::Alias(_)) { 0 } else { region.length };
        let left = self.limit.saturating_sub(state.bytes);
        if counted > left {
            return Err(PinError::Budget { gpa: region.gpa, asked: counted, left });
        }
        let mut blocks = Vec::new();
        for part in region.parts(span, &state.view)? {
            match self.make(region, part, &state.view) {
                Ok(block) => blocks.push(Arc::new(block)),
                Err(error) => {
                    self.take_back(&mut state, &blocks);
                    return Err(error);
                }
            }
        }
        state.bytes += counted;
        let view = state.view.with(&blocks);
        self.publish(&mut state, view);
        Ok(())
    }

    /// Makes no new copies of the blocks within the span, aliases of them aside; address spaces let go of those that they have at their next commit.
    ///
    /// # Errors
    /// [`PinError::Absent`], [`PinError::Cut`].
    pub fn withdraw(&self, span: Span) -> Result<(), PinError> {
        let mut state = self.lock();
        state.view.whole(span)?.iter().for_each(|block| block.close());
        let view = Arc::clone(&state.view);
        self.publish(&mut state, view);
        Ok(())
    }

    /// Takes back [`Pins::withdraw`]: address spaces map at their next commit what they had to let go of.
    ///
    /// # Errors
    /// [`PinError::Absent`], [`PinError::Cut`].
    pub fn restore(&self, span: Span) -> Result<(), PinError> {
        let mut state = self.lock();
        state.view.whole(span)?.iter().for_each(|block| block.open());
        let view = Arc::clone(&state.view);
        self.publish(&mut state, view);
        Ok(())
    }

    /// Removes the blocks within the span, and says how many bytes less are counted.
    ///
    /// # Errors
    /// [`PinError::Absent`], [`PinError::Cut`] and [`PinError::InUse`] change nothing. After [`PinError::Kernel`] what is still there is withdrawn.
    pub fn remove(&self, span: Span) -> Result<u64, PinError> {
        let mut state = self.lock();
        self.clear_leftovers(&mut state);
        let blocks = state.view.whole(span)?.to_vec();
        for (index, block) in blocks.iter().enumerate() {
            if let Err(copies) = block.close_unused() {
                blocks[..index].iter().filter(|block| !block.was_closed()).for_each(|block| block.open());
                return Err(PinError::InUse { block: block.span, copies });
            }
        }
        let (gone, failure) = self.forget(&blocks);
        gone.iter().for_each(|block| block.gone());
        blocks[gone.len()..].iter().for_each(|block| block.close());
        let bytes = gone.iter().map(|block| block.counted).sum();
        state.bytes -= bytes;
        let view = state.view.without(&gone);
        self.publish(&mut state, view);
        failure.map_or(Ok(bytes), Err)
    }

    /// What can be copied now, and the number of this state.
    pub(crate) fn view(&self) -> (u64, Arc<View>) {
        let state = self.lock();
        (self.generation(), Arc::clone(&state.view))
    }

    /// Another number than before: something changed.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, state: &mut State, view: Arc<View>) {
        state.view = view;
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// One area of the GPA IOAS.
    fn make(&self, region: &Region<'_>, span: Span, view: &View) -> Result<Block, PinError> {
        let refused = |errno| PinError::Kernel { span, errno };
        let (kernel, ioas, offset) = (self.kernel(), self.ioas.id(), span.first - region.gpa.0);
        let flags = flags(region.writable);
        let (iova, length) = (Some(Iova(span.first)), span.length_minus_one() + 1);
        let mut origin = None;
        match region.backing {
            Backing::User(address) => kernel.ioas_map(ioas, &Map { flags, iova, user_address: address + offset, length }),
            Backing::File(file, start) => kernel.ioas_map_file(ioas, &MapFile { flags, iova, file, start: start + offset, length }),
            Backing::Alias(gpa) => {
                let source = Span { first: gpa.0 + offset, last: gpa.0 + offset + (length - 1) };
                let block = view.within(source).first().ok_or(PinError::Absent(source))?;
                origin = Some(Use::take(block).ok_or(PinError::Absent(source))?);
                kernel.ioas_copy(&alias(ioas, flags, span.first, source))
            }
        }
        .map_err(refused)?;
        let counted = if origin.is_some() { 0 } else { length };
        Ok(Block::new(span, region.writable, counted, origin))
    }

    /// Undoes what `make` did.
    fn take_back(&self, state: &mut State, blocks: &[Arc<Block>]) {
        for block in blocks.iter().rev() {
            if self.unmap(block.span).is_err() {
                state.bytes += block.counted;
                state.leftovers.push((block.span, block.counted));
            }
        }
    }

    fn clear_leftovers(&self, state: &mut State) {
        let mut given_back = 0;
        state.leftovers.retain(|(span, counted)| {
            let gone = self.unmap_again(*span).is_ok();
            given_back += if gone { *counted } else { 0 };
            !gone
        });
        state.bytes -= given_back;
    }

    /// Unmaps blocks that follow each other, with nothing between: those that are gone, and why not all.
    fn forget(&self, blocks: &[Arc<Block>]) -> (Vec<Arc<Block>>, Option<PinError>) {
        if self.unmap(View::of(blocks).hull()).is_ok() {
            return (blocks.to_vec(), None);
        }
        let mut gone = Vec::new();
        for block in blocks {
            match self.unmap_again(block.span) {
                Ok(()) => gone.push(Arc::clone(block)),
                Err(errno) => return (gone, Some(PinError::Kernel { span: block.span, errno })),
            }
        }
        (gone, None)
    }

    fn unmap(&self, span: Span) -> Result<(), Errno> {
        self.kernel().ioas_unmap(self.ioas.id(), Iova(span.first), span.length_minus_one().saturating_add(1)).map(drop)
    }

    /// After an attempt that failed and may have ended half-way: nothing being there is as good.
    fn unmap_again(&self, span: Span) -> Result<(), Errno> {
        match self.unmap(span) {
            Err(Errno::ENOENT) => Ok(()),
            result => result,
        }
    }
}

fn flags(writable: bool) -> MapFlags {
    if writable { MapFlags::READABLE | MapFlags::WRITEABLE } else { MapFlags::READABLE }
}

fn alias(ioas: IoasId, flags: MapFlags, to: u64, from: Span) -> CopyRange {
    let length = from.length_minus_one() + 1;
    CopyRange { flags, destination: ioas, destination_iova: Some(Iova(to)), source: ioas, source_iova: Iova(from.first), length }
}

impl Region<'_> {
    fn check(&self) -> Result<Span, PinError> {
        let offset = match self.backing {
            Backing::User(address) | Backing::File(_, address) | Backing::Alias(Gpa(address)) => address,
        };
        let (gpa, length, block) = (self.gpa, self.length, self.block.unwrap_or(PAGE));
        if length == 0 || block == 0 || !(gpa.0 | length | offset | block).is_multiple_of(PAGE) {
            return Err(PinError::Pages { gpa, length });
        }
        let last = gpa.0.checked_add(length - 1).filter(|_| offset.checked_add(length - 1).is_some());
        last.map(|last| Span { first: gpa.0, last }).ok_or(PinError::Beyond { gpa, length })
    }

    /// The blocks that it becomes. One of an alias is in one block of what it stands for.
    fn parts(&self, span: Span, view: &View) -> Result<Vec<Span>, PinError> {
        let mut parts = Vec::new();
        let mut first = span.first;
        loop {
            let mut last = self.block.map_or(span.last, |block| first.saturating_add(block - 1).min(span.last));
            if let Backing::Alias(gpa) = self.backing {
                let at = gpa.0 + (first - span.first);
                let block = view.within(Span { first: at, last: at }).first().ok_or(PinError::Absent(Span { first: at, last: at }))?;
                last = last.min(first + (block.span.last - at));
            }
            parts.push(Span { first, last });
            if last == span.last {
                return Ok(parts);
            }
            first = last + 1;
        }
    }
}
