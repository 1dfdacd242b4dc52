//! A machine with guest memory, an address space of areas, and a model of what DMA must find.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use stagecraft::kernel::Kernel;
use stagecraft::kernel::handle::Device;
use stagecraft::kernel::sim::{self, DeviceConfig, DmaAccess, Sim, SimBuilder, UnitConfig, UnitIndex};
use stagecraft::pins::{Backing, Pins, Region};
use stagecraft::sync::{AreaLimits, Areas, Sink};
use stagecraft::table::Piece;
use stagecraft::{Attributes, Change, Gpa, Iova, Span};
use vm_memory::MmapRegion;

pub const PAGE: u64 = 4096;
/// Where the guest's memory begins.
pub const BASE: u64 = 0x4000_0000;
/// Bytes of it, in blocks of [`BLOCK`].
pub const SIZE: u64 = 16 << 20;
pub const BLOCK: u64 = 4 << 20;
/// Memory that is read-only, behind the other.
pub const ROM: u64 = BASE + SIZE;
pub const ROM_SIZE: u64 = 1 << 20;

pub const READ: Attributes = Attributes::READ;
pub const RW: Attributes = Attributes::READ.with(Attributes::WRITE);

/// The machine: `dev0` and `twin0` behind the first unit, `dev1` behind the second, `both` behind both.
pub struct Lab {
    pub sim: Arc<Sim>,
    pub kernel: Arc<dyn Kernel>,
    pub pins: Arc<Pins>,
    /// Address of `BASE` in this process; read-only memory follows as in the guest.
    pub user: u64,
    pub units: Vec<UnitConfig>,
}

impl Lab {
    pub fn new() -> Self {
        Self::with(vec![UnitConfig::vtd("vtd").without_nesting(), UnitConfig::smmuv3("smmu").without_nesting()], u64::MAX)
    }

    /// With units, and a budget of bytes.
    pub fn with(units: Vec<UnitConfig>, budget: u64) -> Self {
        let mut builder = SimBuilder::new();
        let indices: Vec<UnitIndex> = units.iter().map(|unit| builder.unit(unit.clone())).collect();
        for (number, index) in (0..).zip(&indices) {
            builder.device(DeviceConfig::new(&format!("dev{number}"), 0x10 + number), &[*index]);
            builder.device(DeviceConfig::new(&format!("twin{number}"), 0x20 + number), &[*index]);
        }
        builder.device(DeviceConfig::new("both", 0x30), &indices);
        let sim = builder.build().unwrap();
        let region = Arc::new(MmapRegion::new((SIZE + ROM_SIZE) as usize).unwrap());
        let user = region.as_ptr() as u64;
        sim.register_region(region).unwrap();
        let kernel: Arc<dyn Kernel> = Arc::clone(&sim) as Arc<dyn Kernel>;
        let pins = Pins::new(&kernel, budget).unwrap();
        Self { sim, kernel, pins, user, units }
    }

    /// With all of the guest's memory known.
    pub fn filled() -> Self {
        let lab = Self::new();
        lab.pins.add(&lab.ram()).unwrap();
        lab.pins.add(&lab.rom()).unwrap();
        lab
    }

    pub fn ram(&self) -> Region<'static> {
        Region { gpa: Gpa(BASE), length: SIZE, backing: Backing::User(self.user), writable: true, block: Some(BLOCK) }
    }

    pub fn rom(&self) -> Region<'static> {
        Region { gpa: Gpa(ROM), length: ROM_SIZE, backing: Backing::User(self.at(ROM)), writable: false, block: None }
    }

    /// The address in this process of a guest-physical address.
    pub fn at(&self, gpa: u64) -> u64 {
        self.user + (gpa - BASE)
    }

    pub fn bind(&self, label: &str) -> Device {
        Device::bind(&self.kernel, label).unwrap()
    }

    pub fn dma(&self, label: &str) -> sim::Device {
        self.sim.device(label).unwrap()
    }

    pub fn areas(&self, join: u64) -> Areas {
        Areas::new(&self.pins, AreaLimits { join, ..AreaLimits::default() }).unwrap()
    }

    /// Nothing is left of what a test made, once guest memory is gone as well.
    pub fn assert_clean(self) {
        assert_eq!(self.pins.figures().copies, 0);
        drop(self.pins);
        assert_eq!((self.sim.objects(), self.sim.pinned_pages(), self.sim.areas()), (0, 0, 0));
    }
}

pub const fn piece(first: u64, length: u64, address: u64, attributes: Attributes) -> Piece {
    Piece { iova: Span { first, last: first + (length - 1) }, address, attributes }
}

/// What was told, and what must follow from it.
#[derive(Clone, Debug, Default)]
pub struct Model {
    pub pieces: BTreeMap<u64, Piece>,
    /// IOVAs that are nobody's.
    pub reserved: Vec<Span>,
    /// Guest memory that was taken away.
    pub withdrawn: Vec<Span>,
    /// Nothing is read-only.
    pub no_rom: bool,
}

impl Model {
    pub fn apply(&mut self, batch: &[Change]) {
        for change in batch {
            match change {
                Change::Unmap(span) => assert_eq!(self.pieces.remove(&span.first).map(|piece| piece.iova), Some(*span)),
                Change::Map(piece) => {
                    assert!(self.at(piece.iova).is_none(), "the test maps {piece:x?} twice");
                    self.pieces.insert(piece.iova.first, *piece);
                }
            }
        }
    }

    /// A piece that has an IOVA of the span.
    pub fn at(&self, span: Span) -> Option<Piece> {
        self.pieces.range(..=span.last).next_back().map(|(_, piece)| *piece).filter(|piece| piece.iova.last >= span.first)
    }

    /// Where in this process an access to a page must go.
    pub fn expected(&self, lab: &Lab, page: u64, access: DmaAccess) -> Option<u64> {
        let page = Span { first: page & !(PAGE - 1), last: page | (PAGE - 1) };
        let piece = self.at(page).filter(|piece| piece.iova.intersection(page) == Some(page))?;
        let granted = piece.attributes.access(false);
        let address = piece.address.checked_add(page.first - piece.iova.first).filter(|address| address.is_multiple_of(PAGE))?;
        let memory = Span { first: address, last: address | (PAGE - 1) };
        let outside = |spans: &[Span]| !spans.iter().any(|span| span.intersection(page).is_some());
        let present = (BASE..BASE + SIZE + ROM_SIZE).contains(&address) && !self.withdrawn.iter().any(|span| span.intersection(memory).is_some());
        let rom = address >= ROM && !self.no_rom;
        let allowed = if access == DmaAccess::Read { granted.read } else { granted.write && !rom };
        // A piece that is nowhere aligned to the memory that it means is not mapped at all.
        (allowed && present && outside(&self.reserved)).then(|| lab.at(address))
    }

    /// DMA to some pages, and beside them.
    pub fn check(&self, lab: &Lab, labels: &[&str], pages: impl IntoIterator<Item = u64>, what: &str) -> usize {
        let devices: Vec<sim::Device> = labels.iter().map(|label| lab.dma(label)).collect();
        let mut translated = 0;
        for page in pages {
            for access in [DmaAccess::Read, DmaAccess::Write] {
                let wanted = self.expected(lab, page, access);
                for device in &devices {
                    let found = device.translate(None, Iova(page), access);
                    let offset = page & (PAGE - 1);
                    assert_eq!(
                        found.as_ref().ok().map(|found| found.user_address),
                        wanted.map(|wanted| wanted + offset),
                        "{what}: {} {access:?} at {page:#x}: {found:?}, piece {:x?}",
                        device.label(),
                        self.at(Span { first: page, last: page })
                    );
                }
                translated += usize::from(wanted.is_some());
            }
        }
        translated
    }

    /// IOVAs worth a look: the edges of all pieces, and of their pages, inside and outside.
    pub fn edges(&self) -> Vec<u64> {
        let around = |piece: &Piece| {
            let Span { first, last } = piece.iova;
            [
                first,
                last,
                first.wrapping_sub(1),
                last.wrapping_add(1),
                first.saturating_add(PAGE).min(last),
                last - (last - first).min(PAGE),
                first + (last - first) / 2,
            ]
        };
        self.pieces.values().flat_map(around).collect()
    }
}

/// One batch for both; the model must be right afterwards.
pub fn change(areas: &mut Areas, model: &mut Model, batch: &[Change]) {
    model.apply(batch);
    areas.apply(batch);
    areas.commit().unwrap();
}

pub fn map(piece: Piece) -> Change {
    Change::Map(piece)
}

pub const fn unmap(first: u64, length: u64) -> Change {
    Change::Unmap(Span { first, last: first + (length - 1) })
}

/// Ends the other threads also when this one fails.
pub struct Stop<'a>(pub &'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
