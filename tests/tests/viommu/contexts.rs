//! What a driver says of the structures of PASIDs, and no more: entries that come, change and go, in the words that each architecture has for it.

use stagecraft::plugin::{Policy, Supervisor};
use stagecraft::viommu::Limits;

use super::behaviour::{ONE, Rig, plugin};
use super::guests::{Arch, DATA, Guest, words};

const IOVA: u64 = 0x1234_5000;

/// A unit whose devices have PASIDs: these bits are set in its registers.
fn rig(arch: Arch, bits: &[(&str, u64)]) -> Rig {
    Rig::with(Guest::new(arch), Supervisor::new(plugin(arch.kind()), Policy::default()), arch.kind(), arch.registers_and(bits), Limits::default())
}

/// A first-stage table of x86, which AMD's guests and Intel's have, of one page: present, writable, a user's, accessed and dirty.
fn table(guest: &Guest, address: u64) -> u64 {
    let root = guest.new_table();
    guest.store(guest.first_stage_slot(root, IOVA).0, address | 0x67);
    root
}

/// AMD: the first device's requests go by the guest CR3 table at `directory`, those without PASID by its first entry.
pub fn guest_cr3_table(guest: &Guest, directory: u64, domain: u64) {
    // V, TV, GIoV, GV, IR, IW; GLX 0; the directory's address in three parts.
    let at = guest.structure(ONE);
    guest.store(at + 8, domain | (directory >> 15 & 0xffff) << 16 | (directory >> 31) << 43);
    guest.store(at, 3 | 3 << 61 | 1 << 54 | 1 << 55 | (directory >> 12 & 7) << 58);
}

/// AMD: a guest CR3 table entry is changed, and all pages of its PASID are to be forgotten. There is no other command for it but that for the whole device.
#[test]
fn a_guest_cr3_table_entry_goes_with_the_pages_of_its_pasid() {
    let arch = Arch::Amd;
    // GTEn.
    let mut rig = rig(arch, &[("CONTROL", 1 << 16)]);
    let guest = &rig.guest;
    let (directory, domain) = (guest.new_table(), 5);
    let roots = [DATA, DATA + 0x1000].map(|address| table(guest, address));
    guest.store(directory, roots[0] | 1);
    guest.store(directory + 8, roots[0] | 1);
    guest_cr3_table(guest, directory, domain);
    rig.viommu.connect(ONE, true);
    let reads = |rig: &Rig| [None, Some(1), Some(2)].map(|pasid| rig.reads_with(ONE, pasid, IOVA));
    assert_eq!(reads(&rig), [Some(DATA), Some(DATA), None]);
    let forget = |pasid: u64| words(&[3 << 60 | domain << 32 | pasid, 0x7fff_ffff_ffff_f007]);
    // Another table, none, and one for a PASID that had none.
    rig.guest.store(directory + 8, roots[1] | 1);
    rig.commands(&[forget(1)]);
    assert_eq!(reads(&rig), [Some(DATA), Some(DATA + 0x1000), None]);
    rig.guest.store(directory + 8, 0);
    rig.commands(&[forget(1)]);
    assert_eq!(reads(&rig), [Some(DATA), None, None]);
    rig.guest.store(directory + 16, roots[1] | 1);
    rig.commands(&[forget(2)]);
    assert_eq!(reads(&rig), [Some(DATA), None, Some(DATA + 0x1000)]);
}

/// ND, FS1GP; DT, PASID, PSS, SMTS, FSTS; TTM 1.
pub const SCALABLE: [(&str, u64); 3] = [("CAP", 6 | 1 << 56), ("ECAP", 1 << 2 | 19 << 35 | 1 << 40 | 1 << 43 | 1 << 47), ("RTADDR", 1 << 10)];

/// A unit in scalable mode: its directory, and a table for each PASID and the device itself.
fn scalable() -> (Rig, u64, [u64; 2]) {
    let rig = rig(Arch::Vtd, &SCALABLE);
    let guest = &rig.guest;
    let roots = [DATA, DATA + 0x1000].map(|address| table(guest, address));
    let entries = scalable_entries(guest);
    entry(guest, entries, 0, roots[0], 3);
    (rig, entries, roots)
}

/// The PASID entries of the first device, in scalable mode.
pub fn scalable_entries(guest: &Guest) -> u64 {
    let (contexts, directory, entries) = (guest.new_table(), guest.new_table(), guest.new_table());
    guest.store(guest.structures, contexts | 1);
    // P, PASIDE.
    guest.store(contexts + ONE * 32, directory | 1 | 1 << 3);
    guest.store(directory, entries | 1);
    entries
}

/// A PASID entry: P, PGTT 1; DID; the table.
pub fn entry(guest: &Guest, entries: u64, pasid: u64, root: u64, domain: u64) {
    guest.store(entries + pasid * 64 + 16, root);
    guest.store(entries + pasid * 64 + 8, domain);
    guest.store(entries + pasid * 64, 1 | 1 << 6);
}

/// VT-d: a PASID that is new is in a domain in which its device has nothing yet. The PASID cache is told of domain and PASID, and nobody names the device.
#[test]
fn a_new_pasid_may_be_of_any_domain() {
    let (mut rig, entries, roots) = scalable();
    rig.viommu.connect(ONE, true);
    assert_eq!((rig.reads(ONE, IOVA), rig.reads_with(ONE, Some(1), IOVA)), (Some(DATA), None));
    entry(&rig.guest, entries, 1, roots[1], 4);
    rig.commands(&[words(&[7 | 1 << 4 | 4 << 16 | 1 << 32, 0])]);
    assert_eq!((rig.reads(ONE, IOVA), rig.reads_with(ONE, Some(1), IOVA)), (Some(DATA), Some(DATA + 0x1000)));
}

/// VT-d in scalable mode: context entries have no domain, and drivers name 0 where they have one changed.
#[test]
fn a_context_entry_of_scalable_mode_has_no_domain() {
    let (mut rig, ..) = scalable();
    rig.viommu.connect(ONE, true);
    assert_eq!(rig.reads(ONE, IOVA), Some(DATA));
    let contexts = rig.guest.load(rig.guest.structures) & !0xfff;
    rig.guest.store(contexts + ONE * 32, 0);
    rig.commands(&[words(&[1 | 3 << 4 | ONE << 32, 0])]);
    assert_eq!(rig.reads(ONE, IOVA), None);
}
