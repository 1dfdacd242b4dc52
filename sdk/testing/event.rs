//! Faults of walks, as the host tells a unit of them. Tests of format crates include this file:
//!
//! ```text
//! #[path = "../../../sdk/testing/event.rs"]
//! mod event;
//! ```
#![allow(unreachable_pub, missing_docs)]

use stagecraft_sdk::queue::Access;
use stagecraft_sdk::{Event, FaultKind};

/// A table of `format` does not map what an unprivileged request without PASID reads.
pub fn unmapped(format: &str, id: u64, iova: u64) -> Event {
    Event {
        fault: FaultKind::Translation,
        name: None,
        format: Some(format.to_owned()),
        level: None,
        entries: Vec::new(),
        id,
        pasid: None,
        iova,
        intermediate: None,
        reading_table: false,
        unreadable: None,
        access: Access::Read,
        privileged: false,
        domain: None,
    }
}
