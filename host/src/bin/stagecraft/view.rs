//! All streams of a snapshot and what each reaches. Devices of one domain share tables: equal configurations are walked once.

use std::collections::HashMap;

use anyhow::{Result, bail};
use stagecraft::Access;
use stagecraft::device::LookupError;
use stagecraft::guest::{Collected, Guest, GuestError, State, StreamState};
use stagecraft::memory::PAGE;
use stagecraft::plugin::CallError;
use stagecraft::snapshot::{Device, Source};
use stagecraft::table::Mapping;

use crate::failure::{IN_ONE_REPORT, Status, complain, more};
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
    /// Why looking for its tables ended early, or why not all of its mappings are shown, if so.
    pub stopped: Option<String>,
    /// How many of its mappings are shown at most, see [`View::bound`].
    pub shown: usize,
}

/// What devices reach through one table, or through two.
pub struct Reach {
    /// The first stream that goes this way.
    pub stream: StreamState,
    /// Which streams do, as indices into the streams.
    users: Vec<usize>,
    /// Mappings and faults.
    pub collected: Collected,
    /// Bytes that are mapped.
    pub bytes: u128,
}

impl View {
    /// Looks at all streams of `guest`, or at those of one device.
    pub fn new(guest: &Guest<'_>, only: Option<&Device>) -> Result<Self> {
        let streams = streams(guest, only)?;
        let mut view = Self { streams: Vec::with_capacity(streams.len()), tables: Vec::new() };
        let (mut known, mut places) = (Vec::<(StreamState, Vec<usize>)>::new(), HashMap::new());
        for (stream, stopped) in streams {
            let table = matches!(stream.state, State::Translated(_) | State::Direct(_)).then(|| {
                let place = *places.entry(stream.way()).or_insert_with(|| {
                    known.push((stream.clone(), Vec::new()));
                    known.len() - 1
                });
                known[place].1.push(view.streams.len());
                place
            });
            view.streams.push(Seen { stream, table, stopped, shown: usize::MAX });
        }
        let progress = Progress::new("walking tables", guest);
        let all = known.len();
        for (done, (stream, users)) in known.into_iter().enumerate() {
            progress.at(done, all);
            // Only streams with an address space are known.
            let Some(mut space) = guest.space(&stream)? else { continue };
            let collected = guest.collect(&mut space, 0)?;
            let bytes = mapped(collected.collector.mappings(), None);
            view.tables.push(Reach { stream, users, collected, bytes });
        }
        Ok(view)
    }

    /// Bounds a report that says for each stream what it reaches: tables are walked once, but may be shared by as many streams as a guest likes. From
    /// the stream on that would be shown mapping number `most` and one more, they are cut, and say so.
    pub fn bound(&mut self, most: u64) {
        let mut left = most;
        for seen in &mut self.streams {
            let mappings = seen.table.map_or(0, |table| self.tables[table].collected.collector.mappings().len() as u64);
            if mappings > left {
                seen.shown = left as usize;
                let cut = in_one_report("mappings", most);
                seen.stopped = Some(seen.stopped.take().map_or_else(|| cut.clone(), |other| format!("{other}; {cut}")));
            }
            left = left.saturating_sub(mappings);
        }
    }

    /// The streams that use a table.
    pub fn users(&self, table: usize) -> impl Iterator<Item = &StreamState> {
        self.tables[table].users.iter().map(|place| &self.streams[*place].stream)
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

/// Streams that may share all tables of a guest before [`View::bound`] cuts what is said about them.
const SHARING: u64 = 1 << 10;
/// Mappings that are said in any case, whatever number of streams reach them: some gigabytes of JSON.
const MOST_SAID: u64 = 1 << 25;
/// What all walks of a guest together may find, in walks.
const ALL_WALKS: u64 = 16;

/// How many mappings all walks of a guest together may find.
pub fn all_walks(guest: &Guest<'_>) -> u64 {
    guest.budget().limits().mappings.saturating_mul(ALL_WALKS)
}

/// How many mappings one report about a guest may have, all streams together: what is in as many entries as there are for each of many streams, and
/// in any case what all walks may find.
pub fn most_mappings(guest: &Guest<'_>) -> u64 {
    let (snapshot, limit) = (guest.snapshot(), guest.budget().limits().mappings);
    let entries = match &snapshot.source {
        Source::Domains(_) => limit,
        Source::Unit { .. } | Source::Tables(_) => limit.min(snapshot.pages.saturating_mul(PAGE / 8)),
    };
    entries.saturating_mul(SHARING).min(MOST_SAID).max(all_walks(guest))
}

/// That a report ends early because streams share so much.
pub fn in_one_report(what: &str, limit: u64) -> String {
    format!("stopped by budget: more than {limit} {what} {IN_ONE_REPORT}")
}

/// Bytes that are mapped, all together or with one access.
pub fn mapped(mappings: &[Mapping], access: Option<Access>) -> u128 {
    let counts = |mapping: &&Mapping| access.is_none_or(|access| mapping.access == access);
    mappings.iter().filter(counts).map(|mapping| u128::from(mapping.iova.length_minus_one()) + 1).sum()
}

/// The line that says why what is known of a stream is not all, and what would help.
pub fn stopped_at(stopped: &str, stream: &StreamState) -> String {
    format!("device {}: {stopped}{}", stream_name(stream), more(stopped))
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
    match only {
        Some(device) => streams_of(guest, [device]),
        None => streams_of(guest, &guest.snapshot().devices),
    }
}

/// All streams of `devices`, for whoever cannot do with some of them; or how the command ends where not all are known, which is said.
pub fn whole_streams<'a>(guest: &Guest<'_>, devices: impl IntoIterator<Item = &'a Device>) -> Result<std::result::Result<Vec<StreamState>, Status>> {
    let streams = streams_of(guest, devices)?;
    if let Some((page, stream)) = streams.iter().find_map(|(stream, _)| Some((stream.missing?, stream))) {
        bail!(missing_page(page.0 & !(PAGE - 1), stream));
    }
    if let Some((stopped, stream)) = streams.iter().find_map(|(stream, stopped)| Some((stopped.as_deref()?, stream))) {
        complain(&stopped_at(stopped, stream));
        return Ok(Err(Status::Found));
    }
    Ok(Ok(streams.into_iter().map(|(stream, _)| stream).collect()))
}

fn streams_of<'a>(guest: &Guest<'_>, devices: impl IntoIterator<Item = &'a Device>) -> Result<Vec<(StreamState, Option<String>)>> {
    let mut streams = Vec::new();
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
