//! A host's side made of areas: for units that take no tables of user space, and for kernels that only map and unmap.
//!
//! ```text
//!   Pins: guest memory, once --copy--> IOAS of this address space <--attached-- devices, PASIDs
//!                                         |  the kernel keeps a page table per unit equal to it
//!          an area would have to be cut:  |
//!                                      second IOAS  <-- replacing attach, device by device; then the first one goes
//! ```
//!
//! The kernel removes areas only whole, and maps nothing where an area is. So areas follow the pieces that were told, and what is unmapped and mapped again
//! with the same translation costs no kernel call: a large page that becomes small ones keeps its area, small pages that become a large one keep theirs.
//! What is known of both is in `book`; how areas are cut without a gap, in `swap`.

mod book;
mod dirty;
mod fill;
mod swap;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::kernel::handle::{Attachment, Device, Hwpt, Ioas, PageTable};
use crate::kernel::{DeviceId, Errno, HwptFlags, HwptId, IovaRanges, Pasid};
use crate::pins::{PAGE, Pins};
use crate::sync::sink::{CommitError, Sink};
use crate::sync::spans::Spans;
use crate::table::Losses;
use crate::{Change, Iova, Span};
use book::{AreaMap, Scope, Verdict, Wanted, judge, overlapping};
use dirty::Record;

/// Bounds of one address space that is made of areas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AreaLimits {
    /// Areas that it may have; in a swap there are twice as many for a moment.
    pub areas: usize,
    /// Copies that a swap may take for what stays, one for each run of areas without a gap. Where it would take more, the area is cut without a swap, and
    /// its pages are gone for a moment. This bounds what a guest can cause with one change.
    pub swap: usize,
    /// Pieces that are remembered. What is told beyond them is not mapped until there is room, and it is told anew or offered ([`Sink::wants`]).
    pub pieces: usize,
    /// Neighbouring pieces of one batch become one area of up to so many bytes; 0: never.
    pub join: u64,
    /// Pages that allow something else, or lead elsewhere, are changed by a swap as well while somebody is attached: each transaction sees what was there before or
    /// what is there after. That is a second IOAS for each batch with such a change, as [`AreaLimits::swap`] allows. Otherwise such pages are gone for a moment.
    pub hitless_changes: bool,
    /// What page tables must be good for. With [`HwptFlags::NONE`] the kernel chooses them, otherwise they are made with these flags:
    /// [`HwptFlags::PASID`] for a device that is attached by itself and with PASIDs, [`HwptFlags::DIRTY_TRACKING`] for [`Sink::track_dirty`].
    pub flags: HwptFlags,
}

impl Default for AreaLimits {
    /// A million areas and pieces, 65,536 copies in a swap; 2 MiB are joined; changes are gone for a moment.
    fn default() -> Self {
        Self { areas: 1 << 20, swap: 1 << 16, pieces: 1 << 20, join: 2 << 20, hitless_changes: false, flags: HwptFlags::NONE }
    }
}

/// What an address space is made of, and what happened to it. Of the second group counts only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AreasFigures {
    /// Pieces that are wanted.
    pub pieces: u64,
    /// Areas that the kernel has.
    pub areas: u64,
    /// Pieces that the kernel refused to map all of, and that are tried again.
    pub pending: u64,
    /// Areas that the kernel refused to remove.
    pub stale: u64,
    /// Times that a second IOAS took the place of the first.
    pub swaps: u64,
    /// Areas that were cut, or changed, without the swap that they were to have: their pages were gone for a moment.
    pub interrupted: u64,
    /// Kernel calls that failed.
    pub failures: u64,
    /// Attempts to map that ended at [`AreaLimits::areas`].
    pub without_room: u64,
    /// Pieces that were told beyond [`AreaLimits::pieces`].
    pub forgotten: u64,
    /// Pieces that may only be read although the guest lets them be written, because the memory is read-only.
    pub read_only: u64,
}

/// Not all of the host is in step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AreasError {
    /// The kernel did not remove an area.
    #[error("the area at {area} could not be unmapped: {errno}")]
    Unmap {
        /// Its IOVAs.
        area: Span,
        /// Why not.
        errno: Errno,
    },
    /// A device stays on the IOAS that was to be replaced.
    #[error("device {} could not be moved to the new IOAS: {errno}", device.0)]
    Replace {
        /// The device.
        device: DeviceId,
        /// Why not.
        errno: Errno,
    },
}

impl From<AreasError> for CommitError {
    fn from(error: AreasError) -> Self {
        Self(Box::new(error))
    }
}

/// A device, or a PASID of it, on this address space.
#[derive(Debug)]
struct Attached {
    attachment: Attachment,
    pasid: Option<Pasid>,
    /// The page table that was made for it in the present IOAS, if the kernel does not choose.
    hwpt: Option<Hwpt>,
    /// It could not be moved when the IOAS was replaced.
    behind: bool,
}

impl Attached {
    fn is(&self, device: DeviceId, pasid: Option<Pasid>) -> bool {
        self.attachment.device().id() == device && self.pasid == pasid
    }
}

/// An IOAS that has been replaced, with attachments that are still on it. Areas let go of memory after the kernel.
#[derive(Debug)]
struct Replaced {
    tables: Vec<Hwpt>,
    _ioas: Ioas,
    areas: AreaMap,
    /// Of the host's pages, in bytes, as it was then.
    alignment: u64,
}

/// A host's side made of areas: an IOAS of the kernel's, with copies of guest memory that [`Pins`] knows.
///
/// The kernel removes areas only whole, and maps nothing where an area is. So areas follow the pieces that were told, and what is unmapped and mapped again with
/// the same translation costs no kernel call.
///
/// # Cutting
///
/// When a page of an area changes and the rest of the area must stay, a second IOAS is filled and every attachment is replaced, so that no transaction
/// misses. A copy between the two takes one call for areas that follow each other without a gap and allow the same, whatever their number, so a swap
/// costs one call for each such run, one for each piece of the area that is cut, and one for each attachment. In return, for a moment, the kernel holds two
/// page tables per unit; memory stays pinned once. Without an attachment nobody can notice, and the area is simply made anew. Merging needs no swap.
///
/// A page that leads elsewhere or allows something else after a batch is gone for a moment, because the kernel cannot change an area, unless a swap is asked for
/// ([`AreaLimits::hitless_changes`]).
///
/// # Joining
///
/// Pieces of one batch that are neighbours in IOVAs and memory become one area, up to [`AreaLimits::join`] bytes. Guests whose drivers unmap what they have
/// mapped never notice. When the first such area is cut, joining ends for this address space, so that it costs at most one swap for each area joined before.
///
/// # What cannot be mapped
///
/// IOVAs that a unit or device reserves, pieces that are no whole pages, privileged-only pages, and addresses without memory are [`Losses`]. They are looked
/// at again when memory comes and goes and when devices are attached and detached. Writing to memory that is read-only is narrowed to reading. Write-only is
/// told to the kernel as it is; where its tables cannot say so, reading passes as well, as for every other user of the kernel.
///
/// What the kernel refused for the moment is remembered and tried again at each commit, a bounded number each time. An area that the kernel would not remove
/// stays known until it is gone, and [`Sink::commit`] fails as long.
///
/// # What devices wrote
///
/// With [`HwptFlags::DIRTY_TRACKING`] among the flags, [`Sink::track_dirty`] has the kernel record writes in its page tables, and [`Sink::dirty`] tells them as guest
/// memory, across swaps and detachments. When an area that may be written is removed, all of it counts as written: the kernel does not say what came before it was.
#[derive(Debug)]
pub struct Areas {
    pins: Arc<Pins>,
    limits: AreaLimits,
    // Devices are detached first, then the areas go, then memory is let go of.
    attached: Vec<Attached>,
    replaced: Vec<Replaced>,
    ioas: Ioas,
    areas: AreaMap,
    wanted: BTreeMap<u64, Wanted>,
    scope: Scope,
    /// Of the pins that `scope` shows.
    generation: u64,
    /// The kernel did not say what the ranges are now.
    ranges_unknown: bool,
    /// Areas may be of memory that was withdrawn.
    memory_changed: bool,
    /// What was lost may not be any more.
    look_again: bool,
    /// Where pieces were told that there was no room for.
    forgotten: Spans,
    /// Pieces of which something cannot be mapped as things are.
    lost: BTreeSet<u64>,
    /// Pieces of which the kernel refused something.
    refused: BTreeSet<u64>,
    /// Where the next attempt begins.
    retry_from: u64,
    /// Areas that the kernel did not remove, or that are to be cut.
    stale: BTreeSet<u64>,
    joining: bool,
    record: Option<Record>,
    losses: Losses,
    figures: AreasFigures,
}

impl Areas {
    /// An empty address space over guest memory that `pins` knows.
    ///
    /// # Errors
    /// As [`Kernel::ioas_alloc`](crate::kernel::Kernel::ioas_alloc).
    pub fn new(pins: &Arc<Pins>, limits: AreaLimits) -> Result<Self, Errno> {
        let ioas = Ioas::alloc(pins.kernel())?;
        let (generation, view) = pins.view();
        Ok(Self {
            pins: Arc::clone(pins),
            limits,
            attached: Vec::new(),
            replaced: Vec::new(),
            ioas,
            areas: AreaMap::new(),
            wanted: BTreeMap::new(),
            scope: Scope { ranges: vec![Span::ALL], alignment: PAGE, view },
            generation,
            ranges_unknown: false,
            memory_changed: false,
            look_again: false,
            forgotten: Spans::default(),
            lost: BTreeSet::new(),
            refused: BTreeSet::new(),
            retry_from: 0,
            stale: BTreeSet::new(),
            joining: limits.join != 0,
            record: None,
            losses: Losses::default(),
            figures: AreasFigures::default(),
        })
    }

    /// What it is made of.
    #[must_use]
    pub fn figures(&self) -> AreasFigures {
        let (pieces, areas) = (self.wanted.len() as u64, self.areas.len() as u64);
        AreasFigures { pieces, areas, pending: self.refused.len() as u64, stale: self.stale.len() as u64, ..self.figures }
    }

    /// What could not be mapped as it was told, since the beginning.
    #[must_use]
    pub const fn losses(&self) -> &Losses {
        &self.losses
    }

    /// Pieces that were told are not known.
    pub(crate) fn is_short(&self) -> bool {
        !self.forgotten.as_slice().is_empty()
    }

    /// Whether an area has an IOVA.
    #[must_use]
    pub fn has(&self, iova: Iova) -> bool {
        overlapping(&self.areas, Span { first: iova.0, last: iova.0 }).next().is_some()
    }

    /// Nothing that is wanted is missing: neither lost as things are, nor refused by the kernel.
    pub(crate) fn is_whole(&self) -> bool {
        self.lost.is_empty() && self.refused.is_empty()
    }

    /// The IOAS that is in use now. A swap puts another one in its place.
    #[must_use]
    pub const fn ioas(&self) -> &Ioas {
        &self.ioas
    }

    /// Where areas may be: what all attached devices and their units leave free.
    #[must_use]
    pub fn ranges(&self) -> &[Span] {
        &self.scope.ranges
    }

    /// Who is attached, and the page table that each is on.
    pub fn attachments(&self) -> impl Iterator<Item = (DeviceId, Option<Pasid>, HwptId)> + '_ {
        self.attached.iter().map(|one| (one.attachment.device().id(), one.pasid, one.attachment.hwpt()))
    }

    /// Attaches a device, or a PASID of it, that is attached to nothing. It sees what is mapped at once.
    ///
    /// Where the device must not translate what is mapped already, that is unmapped for all devices, without a gap for the rest, and counted as lost; it
    /// comes back with the commit after the device was detached. Areas that the kernel did not remove are tried again first.
    ///
    /// # Errors
    /// As [`Kernel::attach`](crate::kernel::Kernel::attach) and [`Kernel::hwpt_alloc`](crate::kernel::Kernel::hwpt_alloc), and as
    /// [`Kernel::ioas_unmap`](crate::kernel::Kernel::ioas_unmap) for what is still to be removed; EBUSY: it is on this address space already. Nothing changed.
    pub fn attach(&mut self, device: &Device, pasid: Option<Pasid>) -> Result<(), Errno> {
        if self.attached.iter().any(|one| one.is(device.id(), pasid)) {
            return Err(Errno::EBUSY);
        }
        self.without_stale()?;
        match self.put_on(&self.ioas, device, pasid, &self.attached) {
            Ok(attached) => {
                self.attached.push(attached);
                self.query_ranges();
                Ok(())
            }
            Err(Errno::EADDRINUSE) => self.attach_narrowing(device, pasid),
            Err(errno) => Err(errno),
        }
    }

    /// Takes over what is attached to another page table, hitless where both translate the same. `usable` is where the device may have areas: the kernel only tells of
    /// those that are attached already.
    ///
    /// Where the device must not translate what is mapped already, that is unmapped for all devices, as by [`Areas::attach`].
    ///
    /// # Errors
    /// As [`Areas::attach`], and the attachment as it was; what was unmapped for its sake comes back with the next commit. EADDRINUSE: areas lie outside of `usable`, or
    /// the kernel has other ideas of it.
    pub fn adopt(&mut self, mut attachment: Attachment, pasid: Option<Pasid>, usable: &IovaRanges) -> Result<(), (Attachment, Errno)> {
        if let Err(errno) = self.without_stale() {
            return Err((attachment, errno));
        }
        let moved = match self.take_over(&mut attachment) {
            Err(Errno::EADDRINUSE) => self.narrow(usable).and_then(|()| self.take_over(&mut attachment)),
            moved => moved,
        };
        match moved {
            Ok(hwpt) => {
                self.attached.push(Attached { attachment, pasid, hwpt, behind: false });
                self.query_ranges();
                Ok(())
            }
            Err(errno) => Err((attachment, errno)),
        }
    }

    /// Puts an attachment on the IOAS that is in use; the page table that was made for it.
    fn take_over(&self, attachment: &mut Attachment) -> Result<Option<Hwpt>, Errno> {
        let hwpt = self.page_table(&self.ioas, attachment.device(), &self.attached)?;
        attachment.replace(hwpt.as_ref().map_or(PageTable::Ioas(&self.ioas), PageTable::Hwpt))?;
        Ok(hwpt)
    }

    /// Detaches: DMA of the device, or of its PASID, is blocked when this returns. False if it was not attached.
    pub fn detach(&mut self, device: DeviceId, pasid: Option<Pasid>) -> bool {
        let before = self.attached.len();
        drop(self.release(device, pasid));
        self.attached.len() < before
    }

    /// Hands an attachment out, still on this address space, to be put on another one without a gap. Until then it sees what is mapped now and later, as
    /// long as nothing is swapped. One that the last swap could not move is detached instead: it may see what was taken away.
    pub fn release(&mut self, device: DeviceId, pasid: Option<Pasid>) -> Option<Attachment> {
        let place = self.attached.iter().position(|one| one.is(device, pasid))?;
        let attached = self.attached.swap_remove(place);
        // The ranges widen when it goes, which may be after this.
        self.ranges_unknown = true;
        self.leaves(attached.hwpt.filter(|_| !attached.behind));
        let released = (!attached.behind).then_some(attached.attachment);
        if !self.attached.iter().any(|one| one.behind) {
            self.forget_replaced();
        }
        released
    }

    /// A newcomer finds no area that was to be removed.
    fn without_stale(&mut self) -> Result<(), Errno> {
        self.remove_stale().map_err(|error| match error {
            AreasError::Unmap { errno, .. } | AreasError::Replace { errno, .. } => errno,
        })
    }

    /// The page table for a device in an IOAS; none if the kernel is to choose.
    fn page_table(&self, ioas: &Ioas, device: &Device, others: &[Attached]) -> Result<Option<Hwpt>, Errno> {
        if self.limits.flags == HwptFlags::NONE {
            return Ok(None);
        }
        // One for each PASID of a device is enough.
        let same = others.iter().find(|one| one.attachment.device().id() == device.id()).and_then(|one| one.hwpt.clone());
        same.map_or_else(|| self.make_page_table(ioas, device), Ok).map(Some)
    }

    fn put_on(&self, ioas: &Ioas, device: &Device, pasid: Option<Pasid>, others: &[Attached]) -> Result<Attached, Errno> {
        let hwpt = self.page_table(ioas, device, others)?;
        let to = hwpt.as_ref().map_or(PageTable::Ioas(ioas), PageTable::Hwpt);
        Ok(Attached { attachment: device.attach(pasid, to)?, pasid, hwpt, behind: false })
    }

    /// Asks where areas may be.
    fn query_ranges(&mut self) {
        let answer = self.pins.kernel().ioas_iova_ranges(self.ioas.id());
        self.ranges_unknown = answer.is_err();
        match answer {
            Ok(answer) => {
                let alignment = answer.alignment.max(PAGE);
                self.look_again |= answer.ranges != self.scope.ranges || alignment != self.scope.alignment;
                (self.scope.ranges, self.scope.alignment) = (answer.ranges, alignment);
            }
            Err(_) => self.figures.failures += 1,
        }
    }

    /// Looks whether memory came or went.
    fn refresh(&mut self) {
        if self.pins.generation() != self.generation {
            (self.generation, self.scope.view) = self.pins.view();
            (self.memory_changed, self.look_again) = (true, true);
        }
    }

    /// Judges areas, which are told in ascending order.
    fn judge(&self, firsts: impl Iterator<Item = u64>) -> Doomed {
        let mut doomed = Doomed::default();
        for first in firsts {
            let Some(area) = self.areas.get(&first) else { continue };
            match judge(first, area, &self.wanted, &self.scope.ranges) {
                Verdict::Keep => {}
                Verdict::Drop => doomed.gone.push(first),
                Verdict::Cut => doomed.cut.push(first),
            }
        }
        doomed
    }

    /// Areas that have an IOVA of changes, ascending, each once.
    fn touched(&self, changes: &[Change]) -> Vec<u64> {
        let mut firsts = Vec::with_capacity(changes.len());
        for change in changes {
            for (first, _) in overlapping(&self.areas, change.span()) {
                if firsts.last() != Some(&first) {
                    firsts.push(first);
                }
            }
        }
        firsts
    }
}

/// Areas that cannot stay as they are, ascending.
#[derive(Debug, Default)]
struct Doomed {
    gone: Vec<u64>,
    cut: Vec<u64>,
}

impl Sink for Areas {
    fn apply(&mut self, batch: &[Change]) {
        self.refresh();
        let (unmaps, maps) = batch.split_at(batch.partition_point(|change| matches!(change, Change::Unmap(_))));
        let touched = self.touched(unmaps);
        self.forget(unmaps);
        self.want(maps);
        let doomed = self.judge(touched.into_iter());
        self.let_go(&doomed);
        self.fill_told(maps);
    }

    fn commit(&mut self) -> Result<(), CommitError> {
        Ok(self.try_commit()?)
    }

    fn wants(&self) -> Option<Span> {
        self.forgotten.as_slice().first().copied().filter(|_| self.wanted.len() < self.limits.pieces)
    }

    fn lacks(&self) -> bool {
        !self.refused.is_empty()
    }

    fn offer(&mut self, span: Span, pieces: &[Change]) {
        self.forgotten.remove(span);
        let unknown: Vec<Change> = pieces.iter().filter(|piece| !self.wanted.contains_key(&piece.span().first)).copied().collect();
        self.apply(&unknown);
    }

    fn track_dirty(&mut self, on: bool) -> bool {
        self.record(on)
    }

    fn dirty(&mut self, targets: Span, clear: bool, each: &mut dyn FnMut(Span)) {
        self.tell_written(targets, clear, each);
    }
}

impl Areas {
    /// As [`Sink::commit`], with a typed error.
    ///
    /// # Errors
    /// [`AreasError`]: what was taken away can still be reached. Nothing is lost: the next commit tries again.
    pub fn try_commit(&mut self) -> Result<(), AreasError> {
        self.refresh();
        if self.ranges_unknown {
            self.query_ranges();
        }
        let behind = self.catch_up();
        if std::mem::take(&mut self.memory_changed) {
            let doomed = self.judge(self.areas.keys().copied());
            self.let_go(&doomed);
        }
        let stale = self.remove_stale();
        if std::mem::take(&mut self.look_again) {
            self.fill_lost();
        }
        self.retry();
        behind.and(stale)
    }
}
