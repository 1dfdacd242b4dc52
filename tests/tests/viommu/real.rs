//! Guests that unmodified Linux drivers set up: registers and memory as they stood, and every device reaches what the kernel's own trace says.

use std::path::Path;
use std::sync::Arc;

use stagecraft::Iova;
use stagecraft::kernel::sim::DmaAccess;
use stagecraft::memory::Kind;
use stagecraft::plugin::{Policy, Supervisor};
use stagecraft::snapshot::{Snapshot, Source};
use stagecraft::viommu::{Limits, StreamState, UnitConfig, Viommu};
use stagecraft_tests::reference;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::behaviour::{Watched, plugin, without_pasid};
use super::guests::words;
use super::host::Host;

#[test]
fn devices_of_real_guests_reach_what_their_drivers_mapped() {
    // Everything is to be forgotten: TLBI_NSNH_ALL; a global flush of the IOTLB.
    for (fixture, flush) in [("arm64-s1-4k", words(&[0x30, 0])), ("vtd-sm-fs", words(&[2 | 1 << 4, 0, 0, 0]))] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(fixture);
        let snapshot = Snapshot::load(&folder).unwrap();
        let Source::Unit { kind, mut registers } = snapshot.source.clone() else { panic!() };
        // In scalable mode the driver has descriptors of 256 bits (DW); the snapshot does not have the register.
        if kind == "intel-vtd" {
            registers.push(("IQA".to_owned(), 1 << 11));
        }
        let ram = snapshot.map.regions().iter().filter(|region| region.kind == Kind::Ram);
        let ranges: Vec<_> = ram.map(|region| (GuestAddress(region.span.first), region.span.length_minus_one() as usize + 1)).collect();
        let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        for (page, content) in &reference::snapshot::Snapshot::load(&folder).unwrap().memory.pages {
            memory.write_slice(content.as_slice(), GuestAddress(*page)).unwrap();
        }
        let streams = reference::snapshot::load_expected(&folder).unwrap();
        let ids: Vec<u64> = streams.iter().map(|stream| stream.id).collect();
        let host = Host::new(&memory, &snapshot.map, &ids, Supervisor::new(plugin("intel-vtd"), Policy::default()));
        let unit = UnitConfig { kind: kind.clone(), registers, map: Arc::new(snapshot.map.clone()), limits: Limits::default() };
        let supervisor = Supervisor::new(plugin(&kind), Policy::default());
        let mut viommu = Viommu::new(supervisor, unit, memory, host, Box::new(Watched::default()));
        for id in &ids {
            let handled = viommu.connect(*id, false);
            assert_eq!((handled.blocked, handled.loose.len()), (0, 0), "{fixture} {id:#x}");
        }
        let mut compared = 0;
        for round in 0..2 {
            for stream in &streams {
                let device = viommu.host().device(stream.id);
                let reaches = |iova: u64, access: DmaAccess| device.first_stage(None, Iova(iova), access).ok().map(|gpa| gpa.0);
                // The host is a VT-d unit, which has interrupts at 0xfee.
                for run in stream.runs.iter().filter(|run| run.iova >> 20 != 0xfee) {
                    for offset in [0, run.size / 2, run.size - 1] {
                        for (access, allowed) in [(DmaAccess::Read, run.access.read), (DmaAccess::Write, run.access.write)] {
                            let wanted = allowed.then_some(run.address + offset);
                            assert_eq!(reaches(run.iova + offset, access), wanted, "{fixture} {:#x}: {:#x} {access:?}", stream.id, run.iova + offset);
                            compared += 1;
                        }
                    }
                    let beyond = run.iova + run.size;
                    if !stream.runs.iter().any(|run| run.iova <= beyond && beyond - run.iova < run.size) {
                        assert_eq!(reaches(beyond, DmaAccess::Read), None, "{fixture} {:#x}: {beyond:#x}", stream.id);
                    }
                }
            }
            if round == 0 {
                let handled = viommu.commands(&flush).unwrap();
                assert_eq!((handled.illegal, handled.changes), (None, 0), "{fixture}: nothing had changed");
                assert!(handled.spaces > 0);
            }
        }
        assert!(compared > 100, "{fixture}: {compared}");
        // The device under test, and the one in its domain.
        let space = |id: u64| viommu.stream(without_pasid(id)).cloned();
        assert!(matches!(space(0x38), Some(StreamState::Space(_))), "{fixture}");
        assert_eq!(space(0x38), space(0x40), "{fixture}");
    }
}
