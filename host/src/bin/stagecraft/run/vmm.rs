//! The guest's IOMMU as a VMM drives it: the driver's commands come out of its queue in guest memory, and event records go back there.

use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use stagecraft::device::Unit;
use stagecraft::ioasid::{Context, Request};
use stagecraft::memory::{Limits, MemoryMap, PAGE};
use stagecraft::plugin::queue::EventAccess;
use stagecraft::plugin::{Outcome, Requester, Supervisors, TableConfig};
use stagecraft::sync::Watcher;
use stagecraft::viommu::{self, BlockedDma, ContextSpaces, Handled, StreamState, Viommu};
use stagecraft::{Gpa, Iova, Span};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use super::unit::{Architecture, Described, Forget, Memory, Refused};

/// Bytes of guest memory for structures and queues.
pub const BYTES: u64 = 1 << 20;
/// Of these, from the end on: the event queue, and before it the command queue.
const EVENTS: u64 = 4 << 10;
const COMMANDS: u64 = 64 << 10;
/// Commands of one batch; with more the driver has everything of a device forgotten.
const MOST_COMMANDS: usize = 256;

/// A ring in guest memory.
#[derive(Clone, Copy, Debug)]
struct Ring {
    span: Span,
    /// Bytes that were ever written to it.
    written: u64,
}

impl Ring {
    const fn new(first: u64, bytes: u64) -> Self {
        Self { span: Span { first, last: first + (bytes - 1) }, written: 0 }
    }

    /// Where the next `bytes` bytes are: at its end, and then at its beginning.
    fn advance(&mut self, bytes: u64) -> Vec<Span> {
        let size = self.span.length_minus_one() + 1;
        let at = self.written % size;
        self.written += bytes;
        let here = bytes.min(size - at);
        let first = self.span.first + at;
        let parts = [(first, here), (self.span.first, bytes - here)];
        parts.iter().filter_map(|(first, bytes)| Some(Span { first: *first, last: first + bytes.checked_sub(1)? })).collect()
    }
}

/// The unit, its driver's queues, and the VMM's side of both.
#[derive(Debug)]
pub struct Vmm {
    viommu: Viommu<GuestMemoryMmap, ContextSpaces>,
    architecture: &'static dyn Architecture,
    memory: GuestMemoryMmap,
    devices: Vec<Described>,
    commands: Ring,
    events: Ring,
    /// Where the batch stands that was queued last.
    queued: Vec<Span>,
    /// The same where there is no queue.
    instructions: Vec<u8>,
    /// What was sent and read back.
    pub figures: Figures,
}

/// What went through the queues.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    /// Bytes of commands.
    pub command_bytes: u64,
    /// Batches of commands.
    pub batches: u64,
    /// Event records that the driver read.
    pub events: u64,
}

/// What a driver's structures say of a device's table: asked of the plugin, as the VMM will.
///
/// # Errors
/// They say something else than a table of this format.
pub fn detect(
    context: &Context,
    architecture: &dyn Architecture,
    (memory, span): (&GuestMemoryMmap, Span),
    described: &Described,
) -> Result<TableConfig> {
    let mut structures = Memory::new(memory.clone(), span);
    let registers = architecture.set_up(&mut structures, std::slice::from_ref(described))?;
    let plugin = context.plugins().by_unit(architecture.kind())?;
    let map = Arc::new(context.memory().map().clone());
    let unit = Unit::new(plugin, architecture.kind(), registers, memory.clone(), map, Limits::default());
    let found = unit.lookup(Requester { id: described.id, pasid: None })?.value;
    // It is written again when all devices are known.
    memory.write_slice(&vec![0; (span.length_minus_one() + 1) as usize], GuestAddress(span.first))?;
    match found {
        Outcome::Tables(translated) if translated.tables.len() == 1 && translated.tables[0].format == described.config.format => {
            Ok(translated.tables[0].clone())
        }
        Outcome::Blocked(blocked) => bail!("the guest's structures: {} ({}): {}", blocked.reason, blocked.event, blocked.section),
        other => bail!("the guest's structures give {other:?} instead of a table of {}", described.config.format),
    }
}

impl Vmm {
    /// A unit that its driver has set up for all devices, none of which is connected. `span` is guest memory for structures and queues.
    pub fn new(
        context: &Context,
        template: Request,
        architecture: &'static dyn Architecture,
        (memory, span): (GuestMemoryMmap, Span),
        devices: Vec<Described>,
        watcher: Box<dyn Watcher>,
    ) -> Result<Self> {
        let events = Ring::new(span.last + 1 - EVENTS, EVENTS);
        let commands = Ring::new(events.span.first - COMMANDS, COMMANDS);
        let mut structures = Memory::new(memory.clone(), Span { first: span.first, last: commands.span.first - 1 });
        let registers = architecture.set_up(&mut structures, &devices)?;
        let supervisors: &Supervisors = context.supervisors();
        let supervisor = supervisors.by_unit(architecture.kind())?;
        let map: Arc<MemoryMap> = Arc::new(context.memory().map().clone());
        let unit = viommu::UnitConfig { kind: architecture.kind().to_owned(), registers, map, limits: viommu::Limits::default() };
        let viommu = Viommu::new(supervisor, unit, memory.clone(), ContextSpaces::new(context.clone(), template), watcher);
        Ok(Self {
            viommu,
            architecture,
            memory,
            devices,
            commands,
            events,
            queued: Vec::new(),
            instructions: Vec::new(),
            figures: Figures::default(),
        })
    }

    /// The host's side.
    pub const fn spaces(&mut self) -> &mut ContextSpaces {
        self.viommu.host_mut()
    }

    /// A device is plugged in; the number of its address space.
    pub fn connect(&mut self, id: u64) -> Result<stagecraft::ioasid::SpaceId> {
        check(&self.viommu.connect(id, false))?;
        match self.viommu.stream(Requester { id, pasid: None }) {
            Some(StreamState::Space(number)) => Ok(self.viommu.space(*number).context("its address space is gone")?.0),
            Some(StreamState::Refused(reason) | StreamState::Unknown(reason)) => bail!("{reason}"),
            Some(StreamState::Blocked(blocked)) => bail!("{}", blocked.reason),
            None => bail!("the vIOMMU does not know it"),
        }
    }

    /// The driver announces what it maps, whatever it was told.
    pub fn announces_maps(&self) -> bool {
        self.architecture.announces_maps()
    }

    /// The driver queues commands that forget these translations of a device, and one that waits for them.
    pub fn queue(&mut self, device: usize, forget: &[Forget]) -> Result<()> {
        self.queued.clear();
        self.instructions.clear();
        let described = self.devices.get(device).context("no such device")?;
        let mut commands = Vec::new();
        for what in forget {
            self.architecture.forget(described, *what, &mut commands);
        }
        let mut wait = Vec::new();
        self.architecture.wait(&mut wait);
        let bytes = wait.len().max(16);
        if commands.len() > MOST_COMMANDS * bytes {
            commands.clear();
            self.architecture.forget_all(described, &mut commands);
        }
        if commands.is_empty() {
            return Ok(());
        }
        commands.extend(wait);
        self.figures.command_bytes += commands.len() as u64;
        self.figures.batches += 1;
        if !self.architecture.has_queue() {
            self.instructions = commands;
            return Ok(());
        }
        self.queued = self.commands.advance(commands.len() as u64);
        let mut rest = &commands[..];
        for part in &self.queued {
            let (here, beyond) = rest.split_at(part.length_minus_one() as usize + 1);
            self.memory.write_slice(here, GuestAddress(part.first))?;
            rest = beyond;
        }
        Ok(())
    }

    /// The driver rings the doorbell: the VMM has the commands handled.
    pub fn doorbell(&mut self) -> Result<()> {
        if !self.queued.is_empty() {
            check(&self.viommu.commands_at(&self.queued)?)?;
        } else if !self.instructions.is_empty() {
            check(&self.viommu.commands(&self.instructions)?)?;
        }
        Ok(())
    }

    /// The guest wrote to a page that is watched.
    pub fn trap(&mut self, span: Span) -> Result<()> {
        check(&self.viommu.table_written(Gpa(span.first), span.length_minus_one() + 1))
    }

    /// The host refused a request: the VMM writes the event to the guest's queue, and the driver reads it. None where the architecture has no records.
    ///
    /// # Errors
    /// The record is missing, or says something else: in one sentence.
    pub fn refused(&mut self, device: usize, iova: u64, write: bool) -> Result<()> {
        let id = self.devices.get(device).context("no such device")?.id;
        let access = if write { EventAccess::Write } else { EventAccess::Read };
        let request = BlockedDma { requester: Requester { id, pasid: None }, iova: Iova(iova), access, privileged: false };
        let events = self.viommu.faults(&[request]);
        let Some(bytes) = self.architecture.record_bytes() else { return Ok(()) };
        let [record] = &events.records[..] else { bail!("the guest is not told of it") };
        ensure!(record.bytes.len() as u64 == bytes, "the guest's {} has records of {bytes} bytes, and got {}", record.queue, record.bytes.len());
        // The VMM's part: into the queue.
        let parts = self.events.advance(bytes);
        let [place] = &parts[..] else { bail!("a record was cut") };
        self.memory.write_slice(&record.bytes, GuestAddress(place.first))?;
        // The driver's: out of it.
        let mut bytes = vec![0; bytes as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(place.first))?;
        self.figures.events += 1;
        let Some(read) = self.architecture.event(&bytes) else { bail!("the guest's {} got a record of something else: {bytes:02x?}", record.queue) };
        let is_it = |read: Refused| read.id == id && read.iova / PAGE == iova / PAGE && read.write.is_none_or(|wrote| wrote == write);
        ensure!(is_it(read), "the guest's {} got a record of another request: {read:x?}", record.queue);
        Ok(())
    }
}

/// What every call hands back, and a VMM has to look at.
fn check(handled: &Handled) -> Result<()> {
    if let Some(illegal) = handled.illegal {
        bail!("command {} is illegal for the guest's unit (code {:#x})", illegal.index, illegal.code);
    }
    if let Some(error) = &handled.undecoded {
        bail!("commands could not be decoded: {error}");
    }
    if let Some((requester, error)) = handled.loose.first() {
        bail!("device {:#x} could not be kept from DMA: {error}", requester.id);
    }
    ensure!(handled.blocked == 0, "{} entries of the guest's tables are blocked", handled.blocked);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_turns_over() {
        let mut ring = Ring::new(0x1000, 0x40);
        let mut next = |bytes| ring.advance(bytes).iter().map(|span| (span.first, span.last)).collect::<Vec<_>>();
        assert_eq!(next(0x30), [(0x1000, 0x102f)]);
        assert_eq!(next(0x20), [(0x1030, 0x103f), (0x1000, 0x100f)]);
        assert_eq!(next(0x30), [(0x1010, 0x103f)]);
        assert_eq!(next(0x40), [(0x1000, 0x103f)]);
    }
}
