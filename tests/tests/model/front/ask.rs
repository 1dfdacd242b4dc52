//! Devices that ask for pages: from DMA that waits to the guest's record of it, and from the guest's command to the device.

use super::Front;
use super::structures::id;
use crate::guests::Arch;
use crate::session::Outcomes;

/// What a driver reads of a record.
#[derive(Debug, PartialEq, Eq)]
struct Asked {
    id: u64,
    pasid: Option<u32>,
    page: u64,
    write: bool,
    group: u64,
}

impl Arch {
    /// The PASID of a page request.
    fn pasid_of(self, record: &[u8]) -> Option<u32> {
        let low = u64::from_le_bytes(record[..8].try_into().unwrap());
        let (is_there, pasid) = match self {
            Self::Smmu => (low >> 63, low >> 32),
            Self::Vtd => (low >> 8, low >> 32),
            // GN; 15:0 and 19:16 apart.
            Self::Amd => (low >> 56, low >> 16 & 0xffff | (low >> 42 & 0xf) << 16),
            Self::Riscv => (low >> 32, low >> 12),
        };
        (is_there & 1 == 1).then_some((pasid & 0xf_ffff) as u32)
    }

    /// The answer to a group of a PASID.
    fn answer_to(self, asked: &Asked, success: bool) -> Vec<u8> {
        let mut command = self.answer(asked.id, asked.group, success);
        let Some(pasid) = asked.pasid.map(u64::from) else { return command };
        // SSV and SubstreamID; PP and PASID; PASID and GN; PSCV and PID.
        let bits: [u64; 2] = match self {
            Self::Smmu => [1 << 11 | pasid << 12, 0],
            Self::Vtd => [1 << 4 | pasid << 32, 0],
            Self::Amd => [pasid << 32, 1 << 2],
            Self::Riscv => [1 << 32 | pasid << 12, 0],
        };
        for (bytes, bits) in command.chunks_exact_mut(8).zip(bits) {
            let word = u64::from_le_bytes((&*bytes).try_into().unwrap()) | bits;
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        command
    }
}

impl Front<'_> {
    pub(super) fn ask(&mut self, device: usize, place: u16, write: bool) -> Result<bool, String> {
        let device = device % self.devices.len();
        let requesters = self.structures.requesters();
        let known = |pasid: &&Option<u32>| self.ioasid(device, **pasid).is_some_and(|ioasid| ioasid.request().page_requests);
        let known: Vec<Option<u32>> = requesters.iter().filter(known).copied().collect();
        let Some(pasid) = known.get(place as usize % known.len().max(1)).copied() else { return Ok(false) };
        // The first stage that it has: whoever maps a page there is asked.
        let roots = self.structures.settings[device].roots(pasid);
        let stage = usize::from(roots[0].is_none());
        let Some(root) = roots[stage] else { return Ok(false) };
        // Rather what nobody was told of.
        let stale: Vec<(u64, u64)> = self.roots[stage][root].stale.iter().map(|stale| stale.iova).collect();
        let number = place as usize / 8;
        let iova = match (stale.len(), self.touched.len()) {
            (0, 0) => return Ok(false),
            (stale_count, _) if stale_count > 0 && place & 6 != 0 => {
                let (first, last) = stale[number % stale_count];
                first + self.rng.below((last - first).saturating_add(1).max(1))
            }
            (_, 0) => return Ok(false),
            (_, count) => self.touched.iter().nth(number % count).copied().unwrap_or(0),
        };
        if iova >> 20 == 0xfee {
            return Ok(false);
        }
        let maps = self.rng.percent(70);
        let found = self.wait_for((device, pasid), (iova, write), (stage, root, maps))?;
        self.note(stage)?;
        self.is_served((device, pasid), (iova, write), found)?;
        Ok(true)
    }

    /// DMA, and a driver that answers what it causes.
    fn wait_for(
        &mut self,
        (device, pasid): (usize, Option<u32>),
        (iova, write): (u64, bool),
        (stage, root, maps): (usize, usize, bool),
    ) -> Result<Option<u64>, String> {
        let arch = self.structures.arch;
        let Self { machine, viommu, guests, coverage, rng, .. } = self;
        let Some(guest) = &mut guests[stage] else { return Ok(None) };
        machine.sim.set_patience(1000);
        let machine = &*machine;
        let mut failed = None;
        let found = std::thread::scope(|scope| {
            let dma = scope.spawn(|| machine.dma((device, pasid), iova, write));
            while !dma.is_finished() {
                let handled = viommu.serve_page_requests().map_err(|error| error.to_string());
                let serve = || -> Outcomes {
                    let handled = handled?;
                    if let Some(error) = handled.unanswered {
                        return Err(error.to_string());
                    }
                    if !handled.responses.is_empty() {
                        coverage.add("vIOMMU: page request answered by tables".to_owned());
                    }
                    for record in handled.page_requests {
                        let (id, page, writes, group, last) = arch.requested(&record.bytes);
                        let asked = Asked { id: id & 0xff_ffff, pasid: arch.pasid_of(&record.bytes), page, write: writes, group };
                        let wanted = Asked { id: super::id(device), pasid, page: iova & !0xfff, write, group };
                        if asked != wanted || !last {
                            return Err(format!("{asked:x?} and not {wanted:x?}"));
                        }
                        let is_mapped = maps && guest.serve(root as u8, iova, rng.number() as u16);
                        let success = is_mapped || rng.percent(20);
                        let said = if is_mapped { "mapped" } else { "not mapped" };
                        let who = if pasid.is_some() { " for a PASID" } else { "" };
                        coverage.add(format!("vIOMMU: page request{who} asked of the guest, and {said}"));
                        let batch = [arch.answer_to(&asked, success), arch.wait()].concat();
                        let handled = viommu.commands(&batch).map_err(|error| error.to_string())?;
                        if handled.responses.len() != 1 || handled.illegal.is_some() || handled.unanswered.is_some() {
                            return Err(format!("{asked:x?} was answered: {handled:?}"));
                        }
                        coverage.add(format!("vIOMMU: page request of {arch:?}{who}"));
                    }
                    Ok(())
                };
                if let Err(error) = serve() {
                    failed = Some(error);
                }
                std::thread::yield_now();
            }
            dma.join()
        });
        machine.sim.set_patience(0);
        match failed {
            Some(error) => Err(format!("device {:#x} {pasid:?} asks for {iova:#x}: {error}", id(device))),
            None => found.map_err(|_| "the thread of DMA panicked".to_owned()),
        }
    }
}
