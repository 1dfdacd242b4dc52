//! A guest that runs: what its commands ask for, and how faults are told to it.

use crate::FaultKind;

/// What a command asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing that concerns translation: a wait, a hint, a response.
    Nothing,
    /// Forget all translations.
    Everything,
    /// Forget translations of a range of IOVAs.
    Range(Scope),
    /// Device structures were changed: stream table, context, device or directory entries.
    Structures(Scope),
    /// Forget what device TLBs keep.
    DeviceTlb(Scope),
    /// The command is illegal, and hardware goes no further; with the code that it reports.
    Illegal(u32),
    /// A group of page requests is answered.
    Response(Response),
}

/// The guest's answer to a group of page requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Response {
    /// The requester.
    pub id: u32,
    /// The PASID of the requests.
    pub pasid: Option<u32>,
    /// Which group: 9 bits.
    pub group: u16,
    /// What the device is told.
    pub answer: Answer,
}

/// What a device is told that asked for pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// They are there: it tries again.
    Success,
    /// At least one is not to be had.
    Invalid,
    /// It is not to ask any more.
    Failure,
}

/// One effect of one command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    /// Which command of the batch, counted from zero.
    pub index: u16,
    /// What it asks for.
    pub effect: Effect,
}

/// What is meant: everything that no field limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scope {
    /// Only leaves were changed; of structures, only the last one on the way.
    pub leaf: bool,
    /// The addresses are inputs of the second of two tables.
    pub second_stage: bool,
    /// VMID, domain id, GSCID: 16 bits.
    pub domain: Option<u16>,
    /// ASID, PASID, PSCID: 20 bits. Of structures and device TLBs a PASID.
    pub space: Option<u32>,
    /// The requester.
    pub id: Option<u32>,
    /// Bits of `id` that play no part.
    pub id_ignored: u32,
    /// Lowest IOVA.
    pub first: u64,
    /// Highest IOVA.
    pub last: u64,
}

impl Scope {
    /// All addresses of everybody.
    pub const ALL: Self = Self { leaf: false, second_stage: false, domain: None, space: None, id: None, id_ignored: 0, first: 0, last: u64::MAX };

    /// Only this domain.
    #[must_use]
    pub const fn domain(self, domain: u64) -> Self {
        Self { domain: Some(domain as u16), ..self }
    }

    /// Only this address space, or PASID.
    #[must_use]
    pub const fn space(self, space: u64) -> Self {
        Self { space: Some((space & 0xf_ffff) as u32), ..self }
    }

    /// Only this requester.
    #[must_use]
    pub const fn id(self, id: u64) -> Self {
        Self { id: Some(id as u32), ..self }
    }

    /// Only requesters that differ from the id in these bits at most.
    #[must_use]
    pub const fn ignoring(self, id_ignored: u32) -> Self {
        Self { id_ignored, ..self }
    }

    /// Only these addresses.
    #[must_use]
    pub const fn range(self, first: u64, last: u64) -> Self {
        Self { first, last, ..self }
    }

    /// Only `2^size_log2` bytes, aligned to that, around `address`.
    #[must_use]
    pub const fn around(self, address: u64, size_log2: u32) -> Self {
        let below = if size_log2 >= 64 { u64::MAX } else { (1 << size_log2) - 1 };
        self.range(address & !below, address | below)
    }

    /// Only leaves were changed, if the condition holds.
    #[must_use]
    pub const fn leaf(self, leaf: bool) -> Self {
        Self { leaf, ..self }
    }

    /// Addresses of the second of two tables.
    #[must_use]
    pub const fn second_stage(self) -> Self {
        Self { second_stage: true, ..self }
    }

    /// The four words of the WIT; `kind` is 2, 3 or 4.
    const fn pack(self, kind: u64, index: u16) -> [u64; 4] {
        let (has_domain, domain) = match self.domain {
            Some(domain) => (1, domain as u64),
            None => (0, 0),
        };
        let (has_space, space) = match self.space {
            Some(space) => (1, (space & 0xf_ffff) as u64),
            None => (0, 0),
        };
        let (has_id, id) = match self.id {
            Some(id) => (1, (id & !self.id_ignored) as u64 | (self.id_ignored as u64) << 32),
            None => (0, 0),
        };
        let flags = (self.leaf as u64) << 4 | (self.second_stage as u64) << 5 | has_domain << 6 | has_space << 7 | has_id << 8;
        let (first, last) = if kind == 3 { (0, 0) } else { (self.first, self.last) };
        [kind | flags | space << 12 | domain << 32 | (index as u64) << 48, id, first, last]
    }
}

impl Command {
    /// The four words of the WIT.
    #[must_use]
    pub const fn pack(self) -> [u64; 4] {
        let index = (self.index as u64) << 48;
        match self.effect {
            Effect::Nothing => [index, 0, 0, 0],
            Effect::Everything => [1 | index, 0, 0, 0],
            Effect::Range(scope) => scope.pack(2, self.index),
            Effect::Structures(scope) => scope.pack(3, self.index),
            Effect::DeviceTlb(scope) => scope.pack(4, self.index),
            Effect::Illegal(code) => [5 | index, code as u64, 0, 0],
            Effect::Response(Response { id, pasid, group, answer }) => {
                let space = match pasid {
                    Some(pasid) => 1 << 7 | ((pasid & 0xf_ffff) as u64) << 12,
                    None => 0,
                };
                [6 | 1 << 8 | space | index, id as u64, group as u64, answer as u64]
            }
        }
    }
}

/// The commands of a batch, decoded one by one with `decode` up to the first illegal one; `entry` has `BYTES` bytes.
///
/// # Errors
/// [`Error::Invalid`](crate::Error::Invalid) if the batch does not end with a whole entry.
pub fn decode_each<const BYTES: usize>(
    commands: &[u8],
    section: &str,
    mut decode: impl FnMut(&[u8; BYTES], &mut dyn FnMut(Effect)),
) -> Result<Vec<Command>, crate::Error> {
    let (entries, rest) = commands.as_chunks::<BYTES>();
    if !rest.is_empty() {
        return Err(crate::Error::invalid("commands", commands.len() as u64, section, &format!("a command has {BYTES} bytes")));
    }
    let mut effects: Vec<Command> = Vec::with_capacity(entries.len());
    for (index, entry) in (0_u16..).zip(entries) {
        decode(entry, &mut |effect| effects.push(Command { index, effect }));
        if matches!(effects.last(), Some(Command { effect: Effect::Illegal(_), .. })) {
            break;
        }
    }
    Ok(effects)
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It reads.
    Read,
    /// It writes.
    Write,
    /// It fetches instructions.
    Execute,
}

/// A request that failed, in words of no architecture. The WIT says what each field means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Why.
    pub fault: FaultKind,
    /// The event of the outcome that blocked the request, if one did.
    pub name: Option<String>,
    /// The format of the table that failed: it says which stage that is. None if no table was reached.
    pub format: Option<String>,
    /// The level of the last entry, as the architecture counts it.
    pub level: Option<i8>,
    /// The entries of that table that were looked at, from its root.
    pub entries: Vec<u64>,
    /// Requester id, StreamID or device id.
    pub id: u64,
    /// PASID or SubstreamID.
    pub pasid: Option<u32>,
    /// What the device asked for.
    pub iova: u64,
    /// The second stage's input, where that failed under a first one.
    pub intermediate: Option<u64>,
    /// The second stage failed while a table of the first, or a device structure, was read.
    pub reading_table: bool,
    /// What could not be read.
    pub unreadable: Option<u64>,
    /// What the device did.
    pub access: Access,
    /// The request was privileged.
    pub privileged: bool,
    /// The domain of the address space's tag.
    pub domain: Option<u32>,
}

impl Event {
    /// Whether a table of this format failed.
    #[must_use]
    pub fn is_of(&self, format: &str) -> bool {
        self.format.as_deref() == Some(format)
    }

    /// Whether a request passes, which is to say that no table has a part in it, and its address is more than the host takes.
    #[must_use]
    pub fn passes(&self) -> bool {
        self.name.is_none() && self.format.is_none() && self.fault == FaultKind::AddressSize
    }
}

/// A device asks for a page. The WIT says what each field means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRequest {
    /// Requester id, StreamID or device id.
    pub id: u64,
    /// PASID or SubstreamID.
    pub pasid: Option<u32>,
    /// An address in the page.
    pub address: u64,
    /// It wants to read.
    pub read: bool,
    /// It wants to write.
    pub write: bool,
    /// It wants to execute.
    pub execute: bool,
    /// It asks with privilege.
    pub privileged: bool,
    /// Which group: 9 bits.
    pub group: u16,
    /// The last one of the group.
    pub last: bool,
}

/// A request of a device that a unit of the host's refused. The WIT says what each field means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockedDma {
    /// The device's number in the vIOMMU.
    pub id: u64,
    /// PASID or SubstreamID.
    pub pasid: Option<u32>,
    /// What it asked for; zero where the record does not say.
    pub iova: u64,
    /// What it wanted to do there; to read, where the record does not say.
    pub access: Access,
    /// It asked with privilege.
    pub privileged: bool,
}

/// The bytes of an event record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventRecord {
    /// Where it goes, as the architecture calls it.
    pub queue: String,
    /// The record.
    pub bytes: Vec<u8>,
}

/// The little-endian words of a record that has `N` of them.
///
/// # Errors
/// [`Error::Invalid`](crate::Error::Invalid) for another length.
pub fn record_words<const N: usize>(record: &[u8], section: &str) -> Result<[u64; N], crate::Error> {
    let words = <[u64; N]>::try_from(crate::bits::words(record)).ok().filter(|_| record.len() == N * 8);
    words.ok_or_else(|| crate::Error::invalid("record", record.len() as u64, section, &format!("a record has {} bytes", N * 8)))
}

impl EventRecord {
    /// A record of little-endian words.
    #[must_use]
    pub fn of_words(queue: &str, words: &[u64]) -> Self {
        Self { queue: queue.to_owned(), bytes: words.iter().flat_map(|word| word.to_le_bytes()).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_packed_as_the_wit_says() {
        let pack = |effect| Command { index: 0x1234, effect }.pack();
        assert_eq!(pack(Effect::Nothing), [0x1234 << 48, 0, 0, 0]);
        assert_eq!(pack(Effect::Everything), [0x1234 << 48 | 1, 0, 0, 0]);
        assert_eq!(pack(Effect::Illegal(7)), [0x1234 << 48 | 5, 7, 0, 0]);
        let response = Response { id: 0x12_3456, pasid: Some(0xa_bcde), group: 0x1ff, answer: Answer::Failure };
        assert_eq!(pack(Effect::Response(response)), [0x1234_0000_abcd_e186, 0x12_3456, 0x1ff, 2]);
        assert_eq!(
            pack(Effect::Response(Response { pasid: None, answer: Answer::Success, ..response })),
            [0x1234_0000_0000_0106, 0x12_3456, 0x1ff, 0]
        );
        let scope = Scope::ALL.domain(0xfedc).space(0xa_bcde).leaf(true);
        assert_eq!(pack(Effect::Range(scope.range(0x1000, 0x1fff))), [0x1234_fedc_abcd_e0d2, 0, 0x1000, 0x1fff]);
        assert_eq!(pack(Effect::DeviceTlb(Scope::ALL.id(0x1ff).ignoring(7))), [0x1234_0000_0000_0104, 0x7_0000_01f8, 0, u64::MAX]);
        assert_eq!(pack(Effect::Structures(Scope::ALL.second_stage().space(1))), [0x1234_0000_0000_10a3, 0, 0, 0]);
    }

    #[test]
    fn ranges_are_aligned_to_their_size() {
        let around = |address, size| (Scope::ALL.around(address, size).first, Scope::ALL.around(address, size).last);
        assert_eq!(around(0x1234_5678, 12), (0x1234_5000, 0x1234_5fff));
        assert_eq!(around(u64::MAX, 63), (1 << 63, u64::MAX));
        assert_eq!([around(5, 64), around(5, 70)], [(0, u64::MAX); 2]);
    }

    #[test]
    fn a_batch_ends_with_the_first_illegal_command_and_has_whole_entries() {
        let decode = |bytes: &[u8]| {
            decode_each::<2>(bytes, "section", |entry, push| match entry[0] {
                0 => push(Effect::Illegal(1)),
                2 => [Effect::Everything, Effect::Nothing].into_iter().for_each(push),
                _ => push(Effect::Nothing),
            })
        };
        let effects: Vec<_> = decode(&[1, 0, 2, 0, 0, 0, 1, 0]).expect("whole entries").iter().map(|command| command.index).collect();
        assert_eq!(effects, [0, 1, 1, 2]);
        assert!(decode(&[1]).is_err() && decode(&[]).is_ok_and(|commands| commands.is_empty()));
    }
}
