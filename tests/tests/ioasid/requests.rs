//! Address spaces whose mappings a guest asks for, on hosts of every kind.

use stagecraft::ioasid::{Error, Request, Strategy};
use stagecraft::table::Piece;
use stagecraft::{Attributes, Change, Iova, Span};

use crate::guests::Arch;
use crate::rig::{DATA, Rig, unit};

fn map(first: u64, bytes: u64, address: u64) -> Change {
    let attributes = Attributes::READ.with(Attributes::WRITE).with(Attributes::COHERENT);
    Change::Map(Piece { iova: Span { first, last: first + bytes - 1 }, address, attributes })
}

fn unmap(first: u64, bytes: u64) -> Change {
    Change::Unmap(Span { first, last: first + bytes - 1 })
}

#[test]
fn what_a_guest_asks_for_is_there_and_what_it_gives_up_is_not() {
    for host in Arch::ALL {
        for strategy in [Strategy::Nested, Strategy::Areas] {
            let rig = Rig::new(&[unit(host)], &[("nic", &[0])]);
            {
                let context = rig.context();
                let device = context.connect("nic").unwrap();
                let ioasid = context.allocate(Request::requests().with_strategies(&[strategy, Strategy::Software])).unwrap();
                ioasid.change(&[map(0x1000, 0x1000, DATA), map(0x20_0000, 0x20_0000, 0x100_0000)]).unwrap();
                let lookup = ioasid.lookup().unwrap();
                ioasid.attach(&device, None).unwrap();
                assert_eq!(ioasid.strategies(), [strategy]);
                let at = |iova: u64| {
                    let found = rig.dma("nic", iova);
                    assert_eq!(lookup.find(Iova(iova)).map(|target| target.address.0), found, "{host:?} {strategy:?} at {iova:#x}");
                    found
                };
                assert_eq!((at(0x1008), at(0x2f_f010), at(0x5000)), (Some(DATA + 8), Some(0x10f_f010), None));
                ioasid.change(&[unmap(0x1000, 0x1000), map(0x1000, 0x2000, DATA + 0x8000)]).unwrap();
                assert_eq!((at(0x1008), at(0x2000)), (Some(DATA + 0x8008), Some(DATA + 0x9000)));
                // What cannot be done whole changes nothing.
                for bad in [
                    vec![map(0x5000, 0x1000, DATA), map(0x20_3000, 0x1000, DATA)],
                    vec![map(0x5000, 0x1000, DATA), unmap(0x1000, 0x1000)],
                    vec![unmap(0x6000, 0x1000)],
                ] {
                    assert!(matches!(ioasid.change(&bad), Err(Error::Mapped(_) | Error::NotMapped(_))));
                    assert_eq!((at(0x1008), at(0x5000)), (Some(DATA + 0x8008), None));
                }
                ioasid.change(&[unmap(0x1000, 0x2000), unmap(0x20_0000, 0x20_0000)]).unwrap();
                assert_eq!((at(0x1008), at(0x2f_f010)), (None, None));
                assert_eq!(ioasid.stats().mappings, 0);
            }
            rig.assert_clean();
        }
    }
}

/// Requests of one kick of a queue, as they come: each follows the one before, whatever IOVAs they are for.
#[test]
fn requests_of_a_batch_are_made_one_after_the_other() {
    for (host, strategy) in Arch::ALL.into_iter().flat_map(|host| [(host, Strategy::Nested), (host, Strategy::Areas)]) {
        let rig = Rig::new(&[unit(host)], &[("nic", &[0])]);
        {
            let context = rig.context();
            let device = context.connect("nic").unwrap();
            let ioasid = context.allocate(Request::requests().with_strategies(&[strategy, Strategy::Software])).unwrap();
            let lookup = ioasid.lookup().unwrap();
            ioasid.attach(&device, None).unwrap();
            let is = |wanted: &[(u64, Option<u64>)]| {
                for (iova, address) in wanted {
                    let found = [rig.dma("nic", *iova), lookup.find(Iova(*iova)).map(|target| target.address.0)];
                    assert_eq!(found, [*address; 2], "{host:?} {strategy}: {iova:#x}");
                }
            };
            let page = |iova: u64, page: u64| map(iova, 0x1000, DATA + (page << 12));
            ioasid.change(&[page(0x4020_0000, 3), page(0x9000, 2), page(0x1000, 1), page(0x8000, 7)]).unwrap();
            is(&[(0x4020_0000, Some(DATA + 0x3000)), (0x9000, Some(DATA + 0x2000)), (0x1000, Some(DATA + 0x1000)), (0x8000, Some(DATA + 0x7000))]);
            // Something comes before something goes; another page comes and goes, and is there in the end; one is gone in the end, and one that went is there again.
            let batch = [
                page(0x2000, 4),
                unmap(0x9000, 0x1000),
                page(0x5000, 5),
                unmap(0x1000, 0x1000),
                unmap(0x5000, 0x1000),
                page(0x5000, 6),
                page(0x6000, 6),
                unmap(0x6000, 0x1000),
                page(0x1000, 8),
                unmap(0x1000, 0x1000),
                page(0x1000, 9),
                unmap(0x8000, 0x1000),
            ];
            ioasid.change(&batch).unwrap();
            is(&[
                (0x2000, Some(DATA + 0x4000)),
                (0x9000, None),
                (0x5000, Some(DATA + 0x6000)),
                (0x6000, None),
                (0x1000, Some(DATA + 0x9000)),
                (0x8000, None),
            ]);
            is(&[(0x4020_0000, Some(DATA + 0x3000))]);
            assert_eq!(ioasid.stats().mappings, 4);
        }
        rig.assert_clean();
    }
}
