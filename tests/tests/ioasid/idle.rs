//! A thousand address spaces, most of which do nothing.

use stagecraft::ioasid::{Ioasid, Request, Strategy};
use stagecraft::kernel::Pasid;
use stagecraft::kernel::sim::UnitConfig;

use crate::guests::{Arch, Guest};
use crate::rig::{DATA, Rig, page};

#[test]
fn a_thousand_address_spaces_of_a_hundred_devices() {
    const DEVICES: usize = 100;
    const EACH: u32 = 10;
    let labels: Vec<String> = (0..DEVICES).map(|index| format!("device{index}")).collect();
    let devices: Vec<(&str, &[usize])> = labels.iter().map(|label| (label.as_str(), &[0][..])).collect();
    let rig = Rig::new(&[UnitConfig::vtd("one")], &devices);
    {
        let guest = Guest::new(Arch::Arm, &rig.memory);
        guest.map(0x1000, DATA, true);
        let context = rig.context();
        let request = Request::guest(guest.view()).with_strategies(&[Strategy::Nested]);
        let devices: Vec<_> = labels.iter().map(|label| context.connect(label).unwrap()).collect();
        let mut ioasids: Vec<Ioasid> = Vec::new();
        for device in &devices {
            for pasid in 1..=EACH {
                let ioasid = context.allocate(request.clone()).unwrap();
                ioasid.attach(device, Some(Pasid(pasid))).unwrap();
                ioasids.push(ioasid);
            }
        }
        assert_eq!(ioasids.len(), 1000);
        // What one of them does costs no call for the others.
        let calls = rig.sim.calls_total();
        assert_eq!(rig.dma_of("device7", Some(Pasid(3)), 0x1000), Some(DATA));
        guest.unmap(0x1000);
        ioasids[72].invalidate(&[page(0x1000)]).unwrap();
        assert_eq!(rig.sim.calls_total() - calls, 1);
        assert_eq!((rig.dma_of("device7", Some(Pasid(3)), 0x1000), rig.dma_of("device7", Some(Pasid(4)), 0x1000)), (None, Some(DATA)));
    }
    rig.assert_clean();
}
