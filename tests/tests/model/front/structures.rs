//! The structures of a guest's unit, word by word from the specifications: what a device gets, and each of its PASIDs.

use std::collections::{BTreeMap, BTreeSet};

use stagecraft_tests::reference::generate::Rng;
use stagecraft_tests::reference::snapshot::Memory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::guest::Bounds;
use crate::guests::Arch;

/// Where devices' structures are.
pub const STRUCTURES: u64 = 0x180_0000;
const STRUCTURES_BYTES: u64 = 0x4000;
/// Where those of their PASIDs are: a second stage has this as it is, at the beginning.
pub const POOL: Bounds = (0x58_0000, 0x60_0000);

/// What a PASID gets, or a device without one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Context {
    /// A table of the first stage.
    Root(usize),
    /// No first stage. Not every architecture can say it.
    Skip,
}

/// What a device gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stages {
    Nothing,
    Everything,
    First,
    /// With a root of the second stage.
    Second(usize),
    Both(usize),
}

impl Stages {
    pub const fn second(self) -> Option<usize> {
        match self {
            Self::Second(root) | Self::Both(root) => Some(root),
            _ => None,
        }
    }

    pub const fn has_first(self) -> bool {
        matches!(self, Self::First | Self::Both(_))
    }
}

/// How a device is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    pub stages: Stages,
    /// Requests without PASID have a first stage: context 0.
    pub own: bool,
    /// By PASID; 0 is for requests without.
    pub contexts: BTreeMap<u32, Context>,
}

/// Roots of both stages.
pub type Roots = [Option<usize>; 2];

impl Setting {
    /// What requests get that have tables.
    pub fn roots(&self, pasid: Option<u32>) -> Roots {
        let second = self.stages.second();
        match (self.stages.has_first(), pasid) {
            (false, Some(_)) => [None, None],
            (false, None) => [None, second],
            (true, None) if !self.own => [None, second],
            (true, pasid) => match self.contexts.get(&pasid.unwrap_or(0)) {
                None => [None, None],
                Some(Context::Root(root)) => [Some(*root), second],
                Some(Context::Skip) => [None, second],
            },
        }
    }

    /// What there is of a context.
    fn context(&self, arch: Arch, pasid: u32) -> Option<Context> {
        match self.stages {
            // A PASID entry says what no structure of the device says.
            Stages::Everything | Stages::Second(_) if arch == Arch::Vtd => (pasid == 0).then_some(Context::Skip),
            Stages::First | Stages::Both(_) => self.contexts.get(&pasid).copied(),
            _ => None,
        }
    }
}

/// A table of contexts, of one level or two.
#[derive(Clone, Debug, Default)]
struct Directory {
    root: u64,
    /// Tables with contexts, by the upper bits of their PASIDs.
    leaves: BTreeMap<u64, u64>,
    pages: Vec<u64>,
}

/// Numbers by which commands mean an address space: domain, and space within it.
pub type Name = (u64, Option<u64>);

pub struct Structures {
    pub arch: Arch,
    /// Devices may have PASIDs.
    pub pasids: bool,
    /// The unit has a queue of page requests.
    pub requests: bool,
    memory: GuestMemoryMmap,
    /// One level of contexts.
    linear: bool,
    /// 39 bits for the second stage, and not 48.
    small: bool,
    /// Faults are recorded: of the first stage and of the second one, or of a device and of a PASID, as the architecture has it.
    recorded: [bool; 2],
    pub settings: Vec<Setting>,
    directories: Vec<Directory>,
    /// Addresses of tables by stage.
    pub roots: [Vec<u64>; 2],
    free: Vec<u64>,
    /// Pages that may be cached still.
    limbo: Vec<u64>,
    used: BTreeSet<u64>,
    written: Vec<(u64, u64)>,
}

pub const fn id(device: usize) -> u64 {
    0x18 + 8 * device as u64
}

impl Structures {
    pub fn new(arch: Arch, memory: GuestMemoryMmap, devices: usize, (pasids, requests): (bool, bool), rng: &mut Rng) -> Self {
        let nothing = Setting { stages: Stages::Nothing, own: true, contexts: BTreeMap::new() };
        let (linear, small) = (rng.percent(40) && arch != Arch::Vtd, rng.percent(50));
        let mut this = Self {
            arch,
            pasids,
            requests,
            memory,
            linear,
            small,
            recorded: [rng.percent(88), rng.percent(88)],
            settings: vec![nothing; devices],
            directories: vec![Directory::default(); devices],
            roots: [Vec::new(), Vec::new()],
            free: (POOL.0..POOL.1).step_by(4096).collect(),
            limbo: Vec::new(),
            used: (STRUCTURES..STRUCTURES + STRUCTURES_BYTES).step_by(4096).collect(),
            written: Vec::new(),
        };
        if arch == Arch::Vtd {
            // The root entry of bus 0.
            this.store(STRUCTURES, &[(STRUCTURES + 0x1000) | 1, 0]);
        }
        this
    }

    /// Legacy mode: a second stage for the device, and nothing else.
    pub fn is_legacy(&self) -> bool {
        self.arch == Arch::Vtd && !self.pasids
    }

    /// Each context says whether it has a first stage.
    pub fn may_skip(&self) -> bool {
        self.pasids && matches!(self.arch, Arch::Vtd | Arch::Riscv)
    }

    pub fn registers(&self) -> Vec<(String, u64)> {
        let mut registers = self.arch.registers_at(STRUCTURES);
        let mut set = |name: &str, bits: u64| registers.iter_mut().filter(|(known, _)| known == name).for_each(|(_, value)| *value |= bits);
        match self.arch {
            Arch::Smmu => {
                set("IDR0", u64::from(self.requests) << 16);
                // RECINVSID.
                set("CR2", u64::from(self.recorded[1]) << 1);
            }
            Arch::Vtd if self.pasids => {
                // ND 6: 16 bits of domains; SLLPS, FS1GP.
                set("CAP", 6 | 1 << 56);
                // DT 2, NEST 26, PRS 29, PSS 39:35, PASID 40, SMTS 43, SSTS 46, FSTS 47.
                set("ECAP", 1 << 2 | 1 << 26 | u64::from(self.requests) << 29 | 19 << 35 | 1 << 40 | 1 << 43 | 1 << 46 | 1 << 47);
                // TTM 1.
                set("RTADDR", 1 << 10);
            }
            Arch::Vtd => {
                set("CAP", 6);
                set("ECAP", u64::from(self.requests) << 29);
            }
            // GTEn.
            Arch::Amd => set("CONTROL", 1 << 16),
            // PD8, PD17, PD20; ATS.
            Arch::Riscv => set("CAPABILITIES", 7 << 38 | u64::from(self.requests) << 25),
        }
        registers
    }

    /// PASIDs that are used: the last one is in another table than the first ones where there are several.
    pub fn pasids(&self) -> [u32; 3] {
        let last = match self.arch {
            Arch::Amd if !self.linear => 0x203,
            Arch::Riscv if !self.linear => 0x103,
            _ => 0x43,
        };
        [1, 2, last]
    }

    /// All who may ask a device's tables: itself, each PASID, and one that nobody sets up.
    pub fn requesters(&self) -> Vec<Option<u32>> {
        let pasids = self.pasids().into_iter().chain([3]).map(Some);
        [None].into_iter().chain(pasids.filter(|_| self.pasids)).collect()
    }

    /// What the guest's memory holds of structures.
    pub fn pages(&self) -> Memory {
        let mut memory = Memory::default();
        for page in &self.used {
            let mut bytes = [0; 4096];
            self.memory.read_slice(&mut bytes, GuestAddress(*page)).expect("structures are in memory");
            memory.pages.insert(*page, bytes.into());
        }
        memory
    }

    pub fn take_written(&mut self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.written)
    }

    /// The word that makes it valid comes last.
    fn store(&mut self, address: u64, words: &[u64]) {
        for (index, word) in words.iter().enumerate().rev() {
            self.memory
                .store(*word, GuestAddress(address + index as u64 * 8), std::sync::atomic::Ordering::Release)
                .expect("structures are in memory");
        }
        self.written.push((address, words.len() as u64 * 8));
    }

    /// Pages with nothing in them, one after the other and aligned to all of them: one, or two.
    fn room(&mut self, pages: u64) -> u64 {
        let is_there = |page: &u64| page.is_multiple_of(pages << 12) && (1..pages).all(|next| self.free.contains(&(page + (next << 12))));
        let page = self.free.iter().rev().copied().find(is_there).expect("room for structures");
        self.free.retain(|other| !(page..page + (pages << 12)).contains(other));
        for page in (page..page + (pages << 12)).step_by(4096) {
            self.used.insert(page);
            self.store(page, &[0; 512]);
        }
        page
    }

    /// Nothing of what went is cached any more: it becomes something else.
    pub fn settled(&mut self) {
        for page in std::mem::take(&mut self.limbo) {
            self.store(page, &[u64::MAX; 512]);
            self.free.push(page);
        }
    }

    /// Log2 of the contexts in a table, and bytes of one.
    const fn shape(&self) -> (u32, u64) {
        match self.arch {
            Arch::Smmu | Arch::Vtd => (6, 64),
            Arch::Amd => (9, 8),
            Arch::Riscv => (8, 16),
        }
    }

    /// A new directory, with what the device's setting says.
    fn new_directory(&mut self, device: usize) {
        let old = std::mem::take(&mut self.directories[device]);
        self.limbo.extend(old.pages);
        let pages = if self.linear && self.arch == Arch::Smmu && self.pasids { 2 } else { 1 };
        let root = self.room(pages);
        self.directories[device] = Directory { root, leaves: BTreeMap::new(), pages: (root..root + (pages << 12)).step_by(4096).collect() };
        let has_one_table = self.linear || self.arch == Arch::Smmu && !self.pasids;
        if has_one_table {
            self.directories[device].leaves.insert(0, root);
        }
        for pasid in [0].into_iter().chain(self.pasids()) {
            if self.settings[device].context(self.arch, pasid).is_some() {
                self.put_context(device, pasid);
            }
        }
    }

    /// Writes one context as the device's setting says.
    fn put_context(&mut self, device: usize, pasid: u32) {
        let (log2, bytes) = self.shape();
        let has_one_table = self.directories[device].leaves.get(&0) == Some(&self.directories[device].root);
        let index = if has_one_table { 0 } else { u64::from(pasid) >> log2 };
        let table = match self.directories[device].leaves.get(&index).copied() {
            Some(table) => table,
            None => {
                let table = self.room(1);
                self.directories[device].leaves.insert(index, table);
                self.directories[device].pages.push(table);
                let entry = if self.arch == Arch::Riscv { table >> 12 << 10 | 1 } else { table | 1 };
                self.store(self.directories[device].root + index * 8, &[entry]);
                table
            }
        };
        let number = if has_one_table { u64::from(pasid) } else { u64::from(pasid) & ((1 << log2) - 1) };
        let mut words = match self.settings[device].context(self.arch, pasid) {
            None => Vec::new(),
            Some(context) => self.context_words(device, pasid, context),
        };
        words.resize(bytes as usize / 8, 0);
        self.store(table + number * bytes, &words);
    }

    fn context_words(&self, device: usize, pasid: u32, context: Context) -> Vec<u64> {
        let setting = &self.settings[device];
        let root = if let Context::Root(root) = context { self.roots[0][root] } else { 0 };
        let (domain, space) = self.name_of(device, Some(pasid).filter(|pasid| *pasid != 0), context);
        let space = space.unwrap_or(0);
        match self.arch {
            // T0SZ 16, 4K, EPD1, V, 48 bits, AArch64, R, A; ASID; MAIR.
            Arch::Smmu => {
                let recorded = u64::from(self.recorded[0]) << 45;
                vec![16 | 1 << 30 | 1 << 31 | 5 << 32 | 1 << 41 | recorded | 1 << 46 | space << 48, root, 0, 0xff]
            }
            // P, FPD, AW, PGTT; DID.
            Arch::Vtd => {
                let (width, second) = setting.stages.second().map_or((0, 0), |second| (self.width(), self.roots[1][second]));
                let kind = match (context, second) {
                    (Context::Root(_), 0) => 1,
                    (Context::Skip, 0) => 4,
                    (Context::Skip, _) => 2,
                    (Context::Root(_), _) => 3,
                };
                vec![1 | u64::from(!self.recorded[1]) << 1 | width << 2 | kind << 6 | second, domain, root]
            }
            Arch::Amd => vec![root | 1],
            // V, PSCID; Sv48.
            Arch::Riscv => vec![1 | space << 12, if root == 0 { 0 } else { 9 << 60 | root >> 12 }],
        }
    }

    /// VT-d's AW: 39 bits, or 48.
    fn width(&self) -> u64 {
        2 - u64::from(self.small)
    }

    /// Writes the device's own structure as its setting says.
    fn put_device(&mut self, device: usize) {
        let id = id(device);
        let Setting { stages, own, contexts } = self.settings[device].clone();
        let directory = self.directories[device].root;
        let second = stages.second().map(|second| self.roots[1][second]);
        let (domain, _) = self.name(device, [None, stages.second()]);
        match self.arch {
            Arch::Smmu => {
                let has = |bit: u64, is: bool| if is { bit } else { 0 };
                let mut words = match stages {
                    Stages::Nothing => [1, 0, 0, 0],
                    Stages::Everything => [1 | 4 << 1, 1 << 44, 0, 0],
                    _ => [1 | 4 << 1 | has(1 << 1, stages.has_first()) | has(2 << 1, second.is_some()), 0, domain, 0],
                };
                if stages.has_first() {
                    // S1Fmt, S1CDMax; S1DSS.
                    words[0] |= directory | has(1 << 4, self.pasids && !self.linear) | has(7 << 59, self.pasids);
                    words[1] |= if self.pasids { 1 + u64::from(own) } else { 0 };
                }
                if let Some(root) = second {
                    // S2T0SZ, S2SL0, S2PS, S2AA64, S2R; S2TTB.
                    words[2] |= if self.small { 25 << 32 | 1 << 38 } else { 16 << 32 | 2 << 38 } | 5 << 48 | 1 << 51 | has(1 << 58, self.recorded[1]);
                    words[3] = root;
                }
                self.store(STRUCTURES + id * 64, &words);
            }
            Arch::Vtd if self.is_legacy() => {
                // FPD, whether the entry is present or not.
                let quiet = u64::from(!self.recorded[0]) << 1;
                let words = match (stages, second) {
                    (_, Some(root)) => [root | 1 | quiet, self.width() | domain << 8],
                    (Stages::Nothing, _) => [quiet, 0],
                    // Pass-through.
                    _ => [1 | quiet | 2 << 2, 2 | 1 << 8],
                };
                self.store(STRUCTURES + 0x1000 + id * 16, &words);
            }
            Arch::Vtd => {
                // P, FPD, PASIDE; DTE and PRE.
                let requests = if self.requests { 1 << 2 | 1 << 4 } else { 0 };
                let quiet = u64::from(!self.recorded[0]) << 1;
                let words = if stages == Stages::Nothing { [quiet, 0, 0, 0] } else { [1 | quiet | 1 << 3 | requests | directory, 0, 0, 0] };
                self.store(STRUCTURES + 0x1000 + id * 32, &words);
            }
            Arch::Amd => {
                // V, TV; IR, IW; SA.
                let mut words = [if stages == Stages::Nothing { 3 } else { 3 | 3 << 61 }, domain | u64::from(!self.recorded[0]) << 34, 0, 0];
                words[0] |= second.map_or(0, |root| root | (4 - u64::from(self.small)) << 9);
                if stages.has_first() {
                    // GIoV, GV, GLX and the parts of the directory's address.
                    words[0] |= u64::from(own) << 54 | 1 << 55 | u64::from(!self.linear) << 56 | (directory >> 12 & 7) << 58;
                    words[1] |= (directory >> 15 & 0xffff) << 16 | (directory >> 31) << 43;
                }
                self.store(STRUCTURES + id * 32, &words);
            }
            Arch::Riscv => {
                // V, DTF; EN_ATS and EN_PRI.
                let mut words = [u64::from(stages != Stages::Nothing) | u64::from(!self.recorded[0]) << 4, 0, 0, 0];
                words[0] |= if self.requests && words[0] & 1 != 0 { 3 << 1 } else { 0 };
                words[1] = second.map_or(0, |root| (9 - u64::from(self.small)) << 60 | domain << 44 | root >> 12);
                if stages.has_first() && self.pasids {
                    // PDTV, DPE; PD8 or PD17.
                    words[0] |= 1 << 5 | u64::from(own) << 9;
                    words[3] = (2 - u64::from(self.linear)) << 60 | directory >> 12;
                } else if let (true, Some(Context::Root(root))) = (stages.has_first(), contexts.get(&0)) {
                    words[2] = self.name(device, [Some(*root), None]).1.unwrap_or(0) << 12;
                    words[3] = 9 << 60 | self.roots[0][*root] >> 12;
                }
                self.store(STRUCTURES + id * 32, &words);
            }
        }
    }

    /// A setting; with other stages, or if `moved`, in another directory.
    pub fn set(&mut self, device: usize, setting: Setting, moved: bool) {
        let before = std::mem::replace(&mut self.settings[device], setting);
        let now = self.settings[device].clone();
        let has_directory = match self.arch {
            Arch::Vtd => self.pasids && now.stages != Stages::Nothing,
            Arch::Riscv => self.pasids && now.stages.has_first(),
            _ => now.stages.has_first(),
        };
        // What a PASID entry says depends on the second stage; and contexts that nobody used may be out of date.
        let stays = before.stages.has_first() && now.stages.has_first() && self.arch != Arch::Vtd || before.stages == now.stages;
        let is_new = moved || !stays || self.directories[device].root == 0;
        if is_new && has_directory {
            self.new_directory(device);
        } else if has_directory {
            for pasid in [0].into_iter().chain(self.pasids()) {
                if before.contexts.get(&pasid) != now.contexts.get(&pasid) {
                    self.put_context(device, pasid);
                }
            }
        }
        if is_new || before.stages != now.stages || before.own != now.own || !self.pasids {
            self.put_device(device);
        }
    }

    /// Numbers of an address space that has tables: of a context, or of the second stage alone.
    fn name_of(&self, device: usize, pasid: Option<u32>, context: Context) -> Name {
        let second = self.settings[device].stages.second();
        let first = if let Context::Root(root) = context { Some(root) } else { None };
        let (domain, space) = self.name(device, [first, second]);
        // By PASID, and not by table.
        let is_by_pasid = matches!(self.arch, Arch::Amd) && first.is_some() || matches!(self.arch, Arch::Vtd);
        (domain, if is_by_pasid { Some(pasid.unwrap_or(0).into()) } else { space })
    }

    fn name(&self, device: usize, [first, second]: Roots) -> Name {
        let (device, root) = (device as u64, first.map_or(7, |root| root as u64));
        match self.arch {
            // VMIDs by the second stage's table, ASIDs by the first's.
            Arch::Smmu => (second.map_or(0, |second| 5 + second as u64), first.map(|root| 1 + root as u64)),
            // Where there is a second stage a domain is one of its tables; both are of one device, so that its PASIDs are nobody else's.
            Arch::Vtd => (second.map_or(1 + device * 8 + root, |second| 64 + device * 4 + second as u64), None),
            Arch::Amd => (1 + device, None),
            Arch::Riscv => (second.map_or(0, |second| 5 + second as u64), first.map(|root| 1 + root as u64)),
        }
    }

    /// By which numbers caches know what a requester gets.
    pub fn name_for(&self, device: usize, pasid: Option<u32>) -> Name {
        let setting = &self.settings[device];
        let context = match setting.roots(pasid) {
            [Some(root), _] => Context::Root(root),
            _ => Context::Skip,
        };
        self.name_of(device, pasid, context)
    }
}
