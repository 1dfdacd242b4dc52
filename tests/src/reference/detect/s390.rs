//! s390 zPCI: a function's anchor and range.
//!
//! Source: facts about what Linux gives the function: the address of its table, ored with a designation before it is registered, and the lowest and the highest
//! address. A tracer may see the address without the designation.

use super::{Resolution, Window, blocked, illegal};
use crate::reference::snapshot::Snapshot;
use crate::reference::tables::{S390, TableConfig};
use crate::reference::{Access, Problem, bit, bits};

/// The highest address that tables of so many levels hold.
fn last_of(levels: u32) -> u64 {
    if levels == 1 { (1 << 20) - 1 } else { u64::MAX >> (64 - (9 + 11 * levels)) }
}

pub(super) fn s390(snapshot: &Snapshot, id: u64, pasid: Option<u64>) -> Result<Resolution, Problem> {
    let get = |name: &str| snapshot.registers.get(&format!("{name}_{id:x}")).copied();
    let need = |name: &str| get(name).ok_or_else(|| Problem::Illegal(format!("no {name}")));
    if pasid.is_some() {
        return blocked("there are no PASIDs");
    }
    if get("IOTA").unwrap_or(0) == 0 && get("LIMIT").unwrap_or(0) == 0 {
        return blocked("nothing is registered");
    }
    let (base, limit) = (need("BASE")?, need("LIMIT")?);
    let (first, last) = (base - base % 4096, limit | 0xfff);
    if first > last {
        return illegal("LIMIT below BASE");
    }
    let anchor = need("IOTA")?;
    if anchor == 0 {
        // Without an anchor the lowest address is address zero, and the others follow.
        let all = first == 0 && last == u64::MAX;
        return Ok(if all { Resolution::Bypass } else { Resolution::Direct(Window { first, last, address: 0, access: Access::RW }) });
    }
    // 0x800 enables translation; 4:2 is the designation: 0 to 3 segment table to region-first table, 7 page table, 4 and 5 memory; 1:0 frame size; 0x200 read-only.
    let levels = match (bit(anchor, 11), bits(anchor, 4, 2), bits(anchor, 1, 0)) {
        // The address alone: drivers take the smallest table that reaches to the limit, of three levels at least.
        (false, ..) if anchor % 16384 == 0 => (3..=5).find(|levels| last <= last_of(*levels)).unwrap_or(5),
        (false, ..) => return illegal("IOTA"),
        (true, kind @ 0..=3, _) => kind as u32 + 2,
        (true, 7, 0) => 1,
        // One frame of 4 KiB, 1 MiB or 2 GiB, and no table. Bounds other than the frame's are nothing that is known.
        (true, 4 | 5, size @ 0..=2) => {
            let bits = [12, 20, 31][size as usize];
            let address = anchor >> bits << bits;
            if first % (1 << bits) != 0 || first >> bits != last >> bits {
                return Err(Problem::Unsupported("bounds that are not the frame's".to_string()));
            }
            let access = Access { read: true, write: !bit(anchor, 9) };
            return Ok(Resolution::Direct(Window { first, last, address, access }));
        }
        (true, 7, 1..) => return Err(Problem::Unsupported("a page table of large frames".to_string())),
        (true, ..) => return illegal("IOTA"),
    };
    if first > last_of(levels) {
        return illegal("BASE");
    }
    let root = if bit(anchor, 11) { anchor - anchor % 4096 } else { anchor };
    let config = S390 {
        root,
        levels,
        first_iova: first,
        last_iova: Some(last.min(last_of(levels))),
        output_bits: 64,
        read_only: bit(anchor, 11) && bit(anchor, 9),
        page_1m: true,
        partial_tables: false,
    };
    Ok(Resolution::Tables(vec![TableConfig::S390(config)]))
}
