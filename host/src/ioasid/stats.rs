//! What an IOASID holds.

use super::Ioasid;
use super::part::{Engine, Host};
use super::space::Content;
use crate::sync::Sink;

/// What an IOASID holds at the moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Tables of the guest that are followed, once for each host table, and once for lookups in software.
    pub guest_tables: u64,
    /// Leaves in them, counted in the same way.
    pub leaves: u64,
    /// Entries in them that count as absent because a limit was reached or a format failed, counted in the same way. A [`Report`](crate::sync::Report) says which, unless the
    /// call failed.
    pub blocked_entries: u64,
    /// Patterns of entries whose meaning is remembered, counted in the same way: such entries cost no question.
    pub patterns: u64,
    /// Tables of the host.
    pub host_tables: u64,
    /// Areas that the kernel has for it, where it follows tables or requests with areas.
    pub areas: u64,
    /// Bytes of memory for host tables, which is pinned.
    pub table_bytes: u64,
    /// Mappings that the VMM, or a guest with requests, made.
    pub mappings: u64,
    /// Questions that formats were asked for what it holds.
    pub questions: u64,
    /// Spans in which pieces are not mapped because there was no memory for tables: [`Ioasid::synchronise`] and [`Ioasid::recover`] try them again. What was
    /// beyond a limit of areas or of lookups counts as well, since the beginning.
    pub without_memory: u64,
    /// Spans in which pieces are not mapped because the host's format failed when it was asked how their pages are written: it is asked again with each operation.
    pub unanswered: u64,
    /// Bytes that the hosts' formats refuse, since the beginning.
    pub refused_bytes: u128,
    /// Devices and PASIDs that are attached.
    pub attached: usize,
    /// Devices and PASIDs that were detached because the kernel failed, and that wait for [`Ioasid::recover`].
    pub blocked: usize,
    /// Units, or areas for all of them, that may still reach what was taken away, because invalidations failed: nobody is attached there.
    pub stale: usize,
}

impl Ioasid {
    /// What it holds at the moment.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let blocked = self.0.waiting().len();
        let state = self.0.lock();
        let mut stats = Stats {
            blocked,
            mappings: match &state.content {
                Content::Managed(managed) => managed.mappings().len() as u64,
                Content::Requests(domain) => domain.len(),
                Content::Guest => 0,
            },
            ..Stats::default()
        };
        for part in &state.parts {
            stats.attached += part.users.iter().filter(|(user, _)| user.strong_count() > 0).count();
            stats.stale += usize::from(part.stale);
            if let Host::Areas(engine) = &part.host {
                let areas = engine.sink();
                stats.areas += areas.figures().areas;
                stats.without_memory += areas.figures().pending + areas.figures().without_room + areas.figures().forgotten;
                stats.refused_bytes += areas.losses().refused_bytes();
                stats.follow(engine);
            }
            if let Host::Table(_, engine) = &part.host {
                let table = engine.sink().table();
                let figures = table.figures();
                stats.host_tables += figures.tables;
                stats.table_bytes += table.memory().bytes();
                stats.questions += figures.questions;
                stats.without_memory += table.refused().len() as u64;
                stats.unanswered += table.unanswered().len() as u64;
                stats.refused_bytes += table.losses().refused_bytes();
                stats.follow(engine);
            }
        }
        if let Some(software) = &state.software {
            stats.without_memory += software.sink().failures();
            stats.follow(software);
        }
        stats
    }
}

impl Stats {
    /// What follows a guest's tables.
    fn follow<S: Sink>(&mut self, engine: &Engine<S>) {
        let figures = engine.figures();
        self.guest_tables += figures.tables;
        self.leaves += figures.leaves;
        self.blocked_entries += figures.blocked;
        self.patterns += figures.patterns;
        self.questions += figures.questions;
    }
}
