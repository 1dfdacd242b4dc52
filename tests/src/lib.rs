//! End-to-end tests of Stagecraft, and the independent reference that they compare it with.
#![allow(clippy::unwrap_used)]

pub mod random;
pub mod reference;
pub mod sides;
