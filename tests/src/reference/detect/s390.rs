//! s390 zPCI: a function's designation and range.
//!
//! Source: facts about what Linux gives the function: the address of its table, ored with a designation type before it is registered.

use super::{Resolution, blocked};
use crate::reference::snapshot::Snapshot;
use crate::reference::tables::{S390, TableConfig};
use crate::reference::{Problem, bits};

pub(super) fn s390(snapshot: &Snapshot, id: u64, pasid: Option<u64>) -> Result<Resolution, Problem> {
    let get = |name: &str| snapshot.registers.get(&format!("{name}_{id:x}")).copied();
    if pasid.is_some() {
        return blocked("there are no PASIDs");
    }
    let Some(designation) = get("IOTA") else { return blocked("no table is registered") };
    // Designation type 4:2, translation enabled 0x800. Without any of these it is a region-third table: that is what the driver ors in.
    let levels = match bits(designation, 11, 0) {
        0 => 3,
        flags => match bits(flags, 4, 2) {
            kind @ 0..=3 => kind as u32 + 2,
            _ => return Err(Problem::Unsupported("designation type".to_string())),
        },
    };
    Ok(Resolution::Tables(vec![TableConfig::S390(S390 {
        root: designation - designation % 4096,
        levels,
        first_iova: get("BASE").unwrap_or(0),
        last_iova: get("LIMIT"),
        output_bits: 64,
        read_only: false,
        page_1m: true,
        partial_tables: false,
    })]))
}
