//! What devices wrote: marks on their way back into the guest's tables, and logs of written pages.

use super::part::{Engine, Host, Part};
use super::space::{Content, State};
use super::{Error, GuestMemory, Ioasid, Property, Refusal, Target};
use crate::Span;
use crate::kernel::{DirtyFlags, DirtyRange, Kernel};
use crate::memory::PAGE;
use crate::sync::{DirtyError, MarksWritten};

/// Pages of one log: a bitmap of 128 MiB.
const MOST_PAGES: u64 = 1 << 30;

impl Ioasid {
    /// Looks which leaves for IOVAs of `span` the hosts' hardware marked, and marks the guest's entries, as accessed and as dirty, where the guest's configuration
    /// promises that hardware does. Where a host does not tell, as areas of the kernel, all of them count as marked. Where the unit walks the guest's own table it
    /// sets the marks by itself.
    pub fn write_marks(&self, span: Span) -> MarksWritten {
        let mut state = self.0.lock();
        let memory = self.0.context().memory();
        let mut all = MarksWritten::default();
        for part in &mut state.parts {
            let written = part.write_marks(&memory, span);
            all.accessed += written.accessed;
            all.dirty += written.dirty;
            all.skipped += written.skipped;
        }
        all
    }

    /// Begins or ends to record which guest memory devices write, for migration. Translations stay what they are all the while.
    ///
    /// # Errors
    /// [`Error::Refused`]: a unit that has a part in it cannot; nobody records then. Mappings of the VMM's need [`Request::dirty_tracking`](super::Request).
    /// [`Error::Kernel`]; [`Error::Blocked`].
    pub fn track_dirty(&self, on: bool) -> Result<(), Error> {
        let mut state = self.0.lock();
        let kernel = self.0.context().kernel();
        let is_managed = matches!(state.content, Content::Managed(_));
        for place in 0..state.parts.len() {
            if let Err(error) = track(&mut state.parts[place], &**kernel, is_managed, on) {
                for part in &mut state.parts[..place] {
                    let _ = track(part, &**kernel, is_managed, false);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Which pages of guest memory at `targets` devices may have written since the last call that cleared them, or since [`Ioasid::track_dirty`]. Bit `n % 64` of
    /// word `n / 64` is the `n`th page of 4 KiB, counted from the page of the first address. With `clear` they are forgotten.
    ///
    /// # Errors
    /// [`Error::Refused`]: nobody records, or there are more than 2^30 pages. [`Error::Kernel`]; [`Error::Blocked`]: all of the span must count as written.
    pub fn dirty(&self, targets: Span, clear: bool) -> Result<Vec<u64>, Error> {
        let first = targets.first / PAGE;
        let pages = targets.last / PAGE - first + 1;
        if pages > MOST_PAGES {
            return Err(Refusal::new(Property::Limit, format!("{targets} has more than {MOST_PAGES:#x} pages")).into());
        }
        let mut bitmap = vec![0_u64; pages.div_ceil(64) as usize];
        let mut state = self.0.lock();
        let State { parts, content, .. } = &mut *state;
        for part in parts {
            match &mut part.host {
                Host::Table(_, engine) => match &mut **engine {
                    Engine::Live(live) => {
                        let told = live.dirty(targets, clear).map_err(|error| match error {
                            DirtyError::Commit(error) => Error::Blocked(error),
                            error => Refusal::new(Property::DirtyTracking, error.to_string()).into(),
                        })?;
                        bitmap.iter_mut().zip(told).for_each(|(word, told)| *word |= told);
                    }
                    Engine::Told(_) => return Err(cannot()),
                },
                Host::Kernel { hwpt, .. } => {
                    let Content::Managed(managed) = content else { return Err(cannot()) };
                    for (iova, mapping) in managed.mappings() {
                        let Target::Guest(gpa) = mapping.target else { continue };
                        let Some(memory) = targets.intersection(Span { first: gpa.0, last: gpa.0 + (mapping.last - iova) }) else { continue };
                        let (from, to) = (memory.first & !(PAGE - 1), memory.last | (PAGE - 1));
                        let range = DirtyRange {
                            flags: if clear { DirtyFlags::NONE } else { DirtyFlags::NO_CLEAR },
                            iova: crate::Iova(iova + (from.max(gpa.0) - gpa.0)),
                            length: to - from + 1,
                            page_size: PAGE,
                        };
                        let told =
                            self.0.context().kernel().dirty_bitmap(hwpt.id(), &range).map_err(Error::kernel("reading which pages were written"))?;
                        let is_set = |page: &u64| told.get((page / 64) as usize).is_some_and(|word| word >> (page % 64) & 1 != 0);
                        for page in (0..(to - from).div_ceil(PAGE)).filter(is_set) {
                            let place = from / PAGE + page - first;
                            if let Some(word) = bitmap.get_mut((place / 64) as usize) {
                                *word |= 1 << (place % 64);
                            }
                        }
                    }
                }
                Host::Own(..) | Host::Areas(_) => return Err(cannot()),
            }
        }
        Ok(bitmap)
    }
}

fn cannot() -> Error {
    Refusal::new(Property::DirtyTracking, "what devices write through this strategy is not recorded").into()
}

fn track(part: &mut Part, kernel: &dyn Kernel, is_managed: bool, on: bool) -> Result<(), Error> {
    match &mut part.host {
        Host::Kernel { hwpt, .. } if is_managed => {
            kernel.set_dirty_tracking(hwpt.id(), on).map_err(Error::kernel("recording which pages are written"))
        }
        Host::Table(_, engine) => {
            let Engine::Live(live) = &mut **engine else { return Err(cannot()) };
            if live.track_dirty(on)? { Ok(()) } else { Err(cannot()) }
        }
        Host::Kernel { .. } | Host::Own(..) | Host::Areas(_) => Err(cannot()),
    }
}

impl Part {
    fn write_marks(&mut self, memory: &GuestMemory, span: Span) -> MarksWritten {
        match &mut self.host {
            Host::Kernel { .. } | Host::Own(..) => MarksWritten::default(),
            Host::Table(_, engine) => engine.write_marks(memory, span),
            Host::Areas(engine) => engine.write_marks(memory, span),
        }
    }
}
