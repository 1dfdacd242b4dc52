//! What a plugin may use.

use std::time::Duration;

/// Bounds on every plugin of an [`Engine`](super::Engine). The defaults fit plugins of any real format with room to spare.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Bytes of a component file.
    pub component_bytes: usize,
    /// Bytes of one instance's memory; a component whose memory has no maximum, or a higher one, is refused.
    pub memory_bytes: usize,
    /// Instances that exist at the same time: open formats, and instances for `detect`. Their memory is reserved address space until used.
    pub instances: u32,
    /// Processor time of one cold call (`lookup`, `pasids`, `offers`, `bind-data`, `decode-commands`, `encode-event`, `suggest`, `open`, and
    /// instantiation).
    pub cold: Duration,
    /// Processor time of one warm call (`geometry`, `decode`, `decode-entry`, `explain`, `encode-leaf`, `encode-table`).
    pub warm: Duration,
    /// Bytes that one answer may make the host allocate.
    pub answer_bytes: usize,
    /// Messages that one instance may log per second; the rest is counted.
    pub log_messages: u32,
    /// Bytes of native stack that a call may use.
    pub stack_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            component_bytes: 4 << 20,
            memory_bytes: 16 << 20,
            instances: 512,
            cold: Duration::from_millis(100),
            warm: Duration::from_millis(10),
            answer_bytes: 1 << 20,
            log_messages: 64,
            stack_bytes: 256 << 10,
        }
    }
}
