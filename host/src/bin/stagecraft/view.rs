//! All streams of a snapshot and what each reaches. Devices of one domain share tables: equal configurations are walked once.

use std::collections::HashMap;

use anyhow::Result;
use stagecraft::device::LookupError;
use stagecraft::guest::{Collected, Guest, GuestError, State, StreamState};
use stagecraft::memory::PAGE;
use stagecraft::plugin::CallError;
use stagecraft::snapshot::{Device, Source};

use crate::failure::{Status, complain};
use crate::progress::Progress;
use crate::session::name;

/// What to look at.
pub struct View {
    /// Each device, and after it its PASIDs, sorted by id.
    pub streams: Vec<Seen>,
    /// What streams with an address space of their own use, in the order of the first stream.
    pub tables: Vec<Reach>,
}

/// A stream.
pub struct Seen {
    /// What it gets.
    pub stream: StreamState,
    /// Index into the tables if it has an address space of its own.
    pub table: Option<usize>,
    /// Why looking for its tables ended early, if it did.
    pub stopped: Option<String>,
}

/// What devices reach through one table, or through two.
pub struct Reach {
    /// The first stream that goes this way.
    pub stream: StreamState,
    /// Mappings and faults.
    pub collected: Collected,
}

impl View {
    /// Looks at all streams of `guest`, or at those of one device.
    pub fn new(guest: &Guest<'_>, only: Option<&Device>) -> Result<Self> {
        let streams = streams(guest, only)?;
        let mut view = Self { streams: Vec::with_capacity(streams.len()), tables: Vec::new() };
        let (mut known, mut places) = (Vec::<StreamState>::new(), HashMap::new());
        for (stream, stopped) in streams {
            let table = matches!(stream.state, State::Translated(_) | State::Direct(_)).then(|| {
                *places.entry(stream.way()).or_insert_with(|| {
                    known.push(stream.clone());
                    known.len() - 1
                })
            });
            view.streams.push(Seen { stream, table, stopped });
        }
        let progress = Progress::new("walking tables");
        let all = known.len();
        for (done, stream) in known.into_iter().enumerate() {
            progress.at(done, all);
            // Only streams with an address space are known.
            let Some(mut space) = guest.space(&stream)? else { continue };
            let collected = guest.collect(&mut space, 0)?;
            view.tables.push(Reach { stream, collected });
        }
        Ok(view)
    }

    /// The streams that use a table.
    pub fn users(&self, table: usize) -> impl Iterator<Item = &StreamState> {
        self.streams.iter().filter(move |seen| seen.table == Some(table)).map(|seen| &seen.stream)
    }

    /// Why a stream is blocked, or why what is known about it is not all.
    pub fn reason(&self, seen: &Seen) -> Option<String> {
        let blocked = match &seen.stream.state {
            State::Blocked(reason) => Some(reason.clone()),
            _ => None,
        };
        let stopped = seen.stopped.clone().or_else(|| self.tables[seen.table?].collected.stopped.clone());
        let reasons = [blocked, stopped, self.missing(seen).map(|page| format!("the snapshot lacks page {page:#x}"))];
        let reasons: Vec<String> = reasons.into_iter().flatten().collect();
        (!reasons.is_empty()).then(|| reasons.join("; "))
    }

    /// The page that is missing for a stream.
    pub fn missing(&self, seen: &Seen) -> Option<u64> {
        let in_table = || self.tables[seen.table?].collected.collector.missing();
        seen.stream.missing.map(|page| page.0).or_else(in_table).map(|address| address & !(PAGE - 1))
    }

    /// What is not known, in one line, if anything is not, and which status that is.
    pub fn incomplete(&self) -> Option<(Status, String)> {
        let found = self.streams.iter().find_map(|seen| Some((seen, self.missing(seen)?)));
        if let Some((seen, page)) = found {
            return Some((Status::Trouble, missing_page(page, &seen.stream)));
        }
        let stopped = |seen: &Seen| seen.stopped.clone().or_else(|| self.tables[seen.table?].collected.stopped.clone());
        let (seen, stopped) = self.streams.iter().find_map(|seen| Some((seen, stopped(seen)?)))?;
        Some((Status::Found, stopped_at(&stopped, &seen.stream)))
    }

    /// Says what is not known, and which status that is.
    pub fn completeness(&self) -> Status {
        self.incomplete().map_or(Status::Good, |(status, what)| {
            complain(&what);
            status
        })
    }
}

/// PASIDs of one device that a plugin lists at most: `pasids` of the contract.
const MOST_PASIDS: usize = 1024;

/// The line that says why what is known of a stream is not all, and what would help.
pub fn stopped_at(stopped: &str, stream: &StreamState) -> String {
    let hint = if stopped.starts_with("stopped by budget") { "; --budget-tables and --budget-leaves allow more" } else { "" };
    format!("device {}: {stopped}{hint}", stream_name(stream))
}

/// The line that says that the snapshot is not complete.
pub fn missing_page(page: u64, stream: &StreamState) -> String {
    format!("the snapshot is not complete: it lacks page {page:#x}, which the tables of device {} need", stream_name(stream))
}

/// Id, label and PASID of a stream.
pub fn stream_name(stream: &StreamState) -> String {
    let device = name(&Device { label: stream.label.clone(), id: stream.id });
    stream.pasid.map_or(device.clone(), |pasid| format!("{device} PASID {pasid:#x}"))
}

/// All streams, or those of one device; and why looking for one's tables ended early.
pub fn streams(guest: &Guest<'_>, only: Option<&Device>) -> Result<Vec<(StreamState, Option<String>)>> {
    let mut streams = Vec::new();
    let devices = guest.snapshot().devices.iter().filter(|device| only.is_none_or(|only| only.id == device.id));
    for device in devices {
        streams.push(stream(guest, device, None)?);
        let pasids = match guest.pasids(device.id) {
            Ok(found) => {
                if let Some((stream, stopped)) = streams.last_mut() {
                    stream.missing = stream.missing.or(found.missing);
                    if found.value.len() >= MOST_PASIDS && matches!(guest.snapshot().source, Source::Unit { .. }) {
                        stopped.get_or_insert(format!("{MOST_PASIDS} PASIDs are listed, and it may have more; `translate --pasid` asks about any"));
                    }
                }
                found.value
            }
            Err(GuestError::Lookup(LookupError::Exhausted(exhausted))) => {
                if let Some((_, stopped)) = streams.last_mut() {
                    stopped.get_or_insert(exhausted.to_string());
                }
                Vec::new()
            }
            Err(error) => return Err(of_device(error, device)),
        };
        for pasid in pasids {
            streams.push(stream(guest, device, Some(pasid))?);
        }
    }
    Ok(streams)
}

/// One stream. Where looking for its tables takes more than the budget, it is blocked for that reason.
fn stream(guest: &Guest<'_>, device: &Device, pasid: Option<u32>) -> Result<(StreamState, Option<String>)> {
    match guest.stream(device.id, pasid) {
        Ok(stream) => Ok((stream, None)),
        Err(GuestError::Lookup(LookupError::Exhausted(exhausted))) => {
            let stream = StreamState::new(&device.label, device.id, pasid, State::Blocked("not known".to_owned()));
            Ok((stream, Some(exhausted.to_string())))
        }
        Err(error) => Err(of_device(error, device)),
    }
}

/// Names the device whose structures a plugin refuses.
pub fn of_device(error: GuestError, device: &Device) -> anyhow::Error {
    let refused = matches!(error, GuestError::Lookup(LookupError::Call(CallError::Refused { .. })));
    let error = anyhow::Error::new(error);
    if refused { error.context(format!("device {}", name(device))) } else { error }
}
