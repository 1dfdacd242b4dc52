//! An SMMUv3 guest with two stages: its context descriptor and its first stage's tables are themselves behind the second.

use stagecraft::Gpa;
use stagecraft::Iova;
use stagecraft::plugin::queue::EventAccess;
use stagecraft::viommu::{BlockedDma, Limits, StreamState};

use super::behaviour::{ONE, Rig, without_pasid};
use super::guests::{Arch, DATA, words};

const IOVA: u64 = 0x12_3456_7000;
/// Inputs of the second stage where the data is.
const BEHIND: u64 = 0x4000_0000;
const VMID: u64 = 5;

/// Read, write, write-back, inner shareable, accessed.
const S2: u64 = 0xf << 2 | 3 << 6 | 3 << 8 | 1 << 10;

struct Nested {
    rig: Rig,
    /// The stage 2 table whose entries are the pages from [`BEHIND`] on.
    pages: u64,
}

impl Nested {
    /// Stage 2 of 39 bits: the lowest 8 MiB as they are, and pages of data from [`BEHIND`] on. The context descriptor is the sixth of them.
    fn new() -> Self {
        let rig = Rig::new(Arch::Smmu, Limits::default());
        let (root, low, high, pages) = (rig.guest.new_table(), rig.guest.new_table(), rig.guest.new_table(), rig.guest.new_table());
        rig.guest.store(root, low | 3);
        rig.guest.store(root + 8, high | 3);
        rig.guest.store(high, pages | 3);
        for block in 0..4 {
            rig.guest.store(low + block * 8, block << 21 | S2 | 1);
        }
        let this = Self { rig, pages };
        for page in 0..8 {
            this.put(page, DATA + (page << 12));
        }
        // V, Config 7, CD; S2VMID, S2T0SZ 25, S2SL0 1, S2PS 48, S2AA64, S2R.
        let at = this.rig.guest.structure(ONE);
        for (index, word) in
            [root, VMID | 25 << 32 | 1 << 38 | 5 << 48 | 1 << 51 | 1 << 58, 0, 1 | 7 << 1 | (BEHIND + 0x5000)].into_iter().enumerate()
        {
            this.rig.guest.store(at + (3 - index as u64) * 8, word);
        }
        this
    }

    /// Where the second stage has a page of data from now on; its entry.
    fn put(&self, page: u64, address: u64) -> Gpa {
        self.rig.guest.store(self.pages + page * 8, address | S2 | 3);
        Gpa(self.pages + page * 8)
    }

    fn request(&self, iova: u64, access: EventAccess) -> BlockedDma {
        BlockedDma { requester: without_pasid(ONE), iova: Iova(iova), access, privileged: false }
    }
}

#[test]
fn both_stages_and_what_leads_to_them_are_followed() {
    let mut nested = Nested::new();
    let guest = &nested.rig.guest;
    let (first, second) = (guest.new_table(), guest.new_table());
    for page in 0..4 {
        guest.map_page(first, IOVA + (page << 12), BEHIND + (page << 12), true);
    }
    guest.map_page(first, IOVA + 0x10_0000, BEHIND + 0x10_0000, true);
    guest.map_page(second, IOVA, BEHIND + 0x7000, true);
    guest.write_cd(DATA + 0x5000, first, 7);
    nested.rig.viommu.connect(ONE, false);
    assert_eq!(nested.rig.state(ONE), StreamState::Space(0));
    assert_eq!((nested.rig.reads(ONE, IOVA), nested.rig.reads(ONE, IOVA + 0x1000)), (Some(DATA), Some(DATA + 0x1000)));
    // The second stage moves a page: TLBI_S2_IPA.
    let entry = nested.put(0, DATA + 0x3000);
    assert_eq!(nested.rig.reads(ONE, IOVA), Some(DATA));
    let other = nested.rig.commands(&[words(&[0x2a | (VMID + 1) << 32, BEHIND])]);
    assert_eq!((other.spaces, nested.rig.reads(ONE, IOVA)), (0, Some(DATA)), "another guest's");
    nested.rig.commands(&[words(&[0x2a | VMID << 32, BEHIND])]);
    assert_eq!((nested.rig.reads(ONE, IOVA), nested.rig.reads(ONE, IOVA + 0x1000)), (Some(DATA + 0x3000), Some(DATA + 0x1000)));
    // And back, without a word.
    nested.put(0, DATA);
    nested.rig.viommu.table_written(entry, 8);
    assert_eq!(nested.rig.reads(ONE, IOVA), Some(DATA));
    // The first stage unmaps: TLBI_NH_VA.
    nested.rig.guest.unmap_page(first, IOVA + 0x2000);
    nested.rig.commands(&[words(&[0x12 | VMID << 32 | 7 << 48, (IOVA + 0x2000) | 1])]);
    assert_eq!((nested.rig.reads(ONE, IOVA + 0x2000), nested.rig.reads(ONE, IOVA + 0x3000)), (None, Some(DATA + 0x3000)));
    // Which stage failed, and at which address, is told: F_TRANSLATION; S2 39, class IN, the IPA.
    let events = nested.rig.viommu.faults(&[nested.request(IOVA + 0x10_0008, EventAccess::Read), nested.request(IOVA + 0x2000, EventAccess::Write)]);
    assert_eq!(events.records[0].bytes, words(&[0x10 | ONE << 32, 1 << 35 | 1 << 39 | 2 << 40, IOVA + 0x10_0008, BEHIND + 0x10_0000]));
    assert_eq!(events.records[1].bytes, words(&[0x10 | ONE << 32, 2 << 40, IOVA + 0x2000, 0]));
    // The page with the context descriptor moves: what the lookup read of stage 2 is watched as well.
    nested.rig.guest.write_cd(DATA + 0x6000, second, 8);
    let lookups = nested.rig.viommu.figures().lookups;
    let entry = nested.put(5, DATA + 0x6000);
    nested.rig.viommu.table_written(entry, 8);
    assert_eq!((nested.rig.reads(ONE, IOVA), nested.rig.reads(ONE, IOVA + 0x1000)), (Some(DATA + 0x7000), None));
    assert_eq!(nested.rig.viommu.figures().lookups, lookups + 1);
    // A page of the first stage's tables is nowhere: the second stage failed for a table.
    let low = nested.rig.guest.load(nested.rig.guest.load(nested.rig.guest.structure(ONE) + 24)) & !0xfff;
    let block = (second >> 21) * 8;
    let was = nested.rig.guest.load(low + block);
    nested.rig.guest.store(low + block, 0);
    let events = nested.rig.viommu.faults(&[nested.request(IOVA, EventAccess::Read)]);
    // Class TT.
    assert_eq!(events.records[0].bytes, words(&[0x10 | ONE << 32, 1 << 35 | 1 << 39 | 1 << 40, IOVA, second]));
    nested.rig.guest.store(low + block, was);
    // So is the page with the context descriptor: class CD.
    let entry = nested.put(5, 0);
    nested.rig.guest.store(entry.0, 0);
    nested.rig.viommu.table_written(entry, 8);
    assert_eq!(nested.rig.reads(ONE, IOVA), None);
    assert!(matches!(nested.rig.state(ONE), StreamState::Blocked(_)), "{:?}", nested.rig.state(ONE));
    let events = nested.rig.viommu.faults(&[nested.request(IOVA, EventAccess::Write)]);
    assert_eq!(events.records[0].bytes, words(&[0x10 | ONE << 32, 1 << 39, IOVA, BEHIND + 0x5000]));
    // Back again, by the write alone.
    nested.put(5, DATA + 0x6000);
    nested.rig.viommu.table_written(entry, 8);
    assert_eq!(nested.rig.reads(ONE, IOVA), Some(DATA + 0x7000));
    nested.rig.viommu.disconnect(ONE);
    assert!(nested.rig.watched.0.lock().unwrap().is_empty());
}
