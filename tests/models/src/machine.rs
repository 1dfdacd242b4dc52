//! A machine around a model: RAM, device memory, PCI configuration, and the `edu` device that does DMA.
//!
//! `edu` (PCI 1234:11e8) copies between RAM and its own 4 KiB buffer. Registers in BAR0: 0x80 source, 0x88 destination, 0x90 count, 0x98 command (bit 0 start and
//! busy, bit 1 direction: 0 from RAM to the device). The buffer is at 0x40000 of the device.

use std::collections::BTreeSet;
use std::env;
use std::ops::Range;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Result, bail};

use crate::qtest::{Qtest, TIMEOUT};

/// The buffer, in the device's own addresses.
const BUFFER: u64 = 0x40000;

/// Words of eight bytes in the buffer: as many questions can be asked between two looks at it.
pub const SLOTS: usize = 512;

/// The device's place on the root bus: its requester id, StreamID or device_id.
pub const DEVICE: u64 = EDU_SLOT << 3;

const EDU_SLOT: u64 = 4;

/// `ivshmem-plain`: a device whose BAR2 is nothing but memory, of which DMA may reach every byte.
const MEMORY_SLOT: u64 = 5;

/// The top byte of a word in a tagged page; below it is the word's own address.
const TAG: u64 = 0x5a << 56;

/// The top byte of a word that only a device write brings to RAM.
const NONCE: u64 = 0xa5 << 56;

/// Which machine a model lives in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Board {
    /// `q35` of qemu-system-x86_64.
    Q35,
    /// `virt` of qemu-system-aarch64, with the PCI configuration space below 4 GiB.
    ArmVirt,
    /// `virt` of qemu-system-riscv64.
    RiscvVirt,
}

/// RAM of every machine: sparse, so that leaves of every size have a place in it.
const RAM_SIZE: u64 = 513 << 30;

impl Board {
    fn binary(self) -> &'static str {
        match self {
            Board::Q35 => "qemu-system-x86_64",
            Board::ArmVirt => "qemu-system-aarch64",
            Board::RiscvVirt => "qemu-system-riscv64",
        }
    }

    /// The devices that a QEMU of this board must have; the SMMU is a part of its machine.
    fn devices(self) -> &'static [&'static str] {
        match self {
            Board::Q35 => &["edu", "ivshmem-plain", "intel-iommu", "amd-iommu"],
            Board::ArmVirt => &["edu", "ivshmem-plain"],
            Board::RiscvVirt => &["edu", "ivshmem-plain", "riscv-iommu-pci"],
        }
    }

    /// Instructions that halt for ever.
    fn halt(self) -> &'static [u8] {
        match self {
            Board::Q35 => &[0xf4],
            // wfi; b .-4
            Board::ArmVirt => &[0x7f, 0x20, 0x03, 0xd5, 0xff, 0xff, 0xff, 0x17],
            // wfi; j .-4
            Board::RiscvVirt => &[0x73, 0x00, 0x50, 0x10, 0x6f, 0xf0, 0xdf, 0xff],
        }
    }

    /// RAM, ascending.
    #[allow(clippy::single_range_in_vec_init)]
    pub fn ram(self) -> Vec<Range<u64>> {
        match self {
            // q35 leaves holes: for video memory and firmware below 1 MiB, and from 2 GiB to 4 GiB.
            Board::Q35 => vec![0..0xa_0000, 1 << 20..2 << 30, 4 << 30..RAM_SIZE + (2 << 30)],
            Board::ArmVirt => vec![1 << 30..RAM_SIZE + (1 << 30)],
            Board::RiscvVirt => vec![2 << 30..RAM_SIZE + (2 << 30)],
        }
    }

    /// Where the driver keeps what the models need besides tables. One MiB; tables and targets stay away from it.
    pub fn control(self) -> u64 {
        match self {
            Board::Q35 => 0x100_0000,
            Board::ArmVirt | Board::RiscvVirt => 0x1_0000_0000,
        }
    }

    /// Where BARs may be.
    fn bars(self) -> u64 {
        match self {
            Board::Q35 => 0xe000_0000,
            Board::ArmVirt => 0x1000_0000,
            Board::RiscvVirt => 0x4000_0000,
        }
    }

    /// A BAR address for the n-th device.
    fn bar(self, index: u64) -> u64 {
        self.bars() + (index << 20)
    }

    /// Device memory: 64 MiB in a BAR.
    pub fn device_memory(self) -> Range<u64> {
        let first = self.bars() + (64 << 20);
        first..first + (64 << 20)
    }

    /// The configuration space of the root bus, where it is memory-mapped from the start.
    fn ecam(self) -> Option<u64> {
        match self {
            Board::Q35 => None,
            Board::ArmVirt => Some(0x3f00_0000),
            Board::RiscvVirt => Some(0x3000_0000),
        }
    }
}

/// Length of the range at [`Board::control`].
pub const CONTROL_SIZE: u64 = 1 << 20;

/// A machine with a device that does DMA.
#[derive(Debug)]
pub struct Machine {
    /// Its process.
    pub qtest: Qtest,
    board: Board,
    edu: u64,
    bars: u64,
    /// What must not be overwritten by tags or by the device: pages of tables.
    reserved: BTreeSet<u64>,
    tagged: BTreeSet<u64>,
    /// Pages to clear before the next tables.
    written: BTreeSet<u64>,
    nonce: u64,
}

impl Machine {
    /// Starts a machine; the arguments bring the IOMMU.
    ///
    /// # Errors
    /// If QEMU does not start, or has no such device.
    pub fn start(board: Board, machine_options: &str, arguments: &[&str]) -> Result<Machine> {
        let machine = match board {
            Board::Q35 => "q35",
            Board::ArmVirt => "virt,gic-version=3,highmem-ecam=off",
            Board::RiscvVirt => "virt",
        };
        let machine = format!("{machine},memory-backend=ram{machine_options}");
        // Shared memory: private memory would get huge pages, and clearing 2 MiB for every page that is touched costs more than all the rest.
        let ram = format!("memory-backend-memfd,id=ram,size={RAM_SIZE},share=on,reserve=off");
        let size = format!("size={RAM_SIZE}B");
        let edu = format!("edu,addr={EDU_SLOT},dma_mask=0xffffffffffffffff");
        let memory = format!("ivshmem-plain,addr={MEMORY_SLOT},memdev=bar");
        let mut all = vec!["-machine", machine.as_str(), "-m", size.as_str(), "-object", ram.as_str()];
        all.extend(["-object", "memory-backend-memfd,id=bar,size=64M,share=on"]);
        if board == Board::ArmVirt {
            // Enough physical address bits for the RAM.
            all.extend(["-cpu", "cortex-a57"]);
        }
        all.extend(arguments);
        all.extend(["-device", &edu, "-device", &memory]);
        let qtest = Qtest::start(board.binary(), &all, board.halt())?;
        let mut machine =
            Machine { qtest, board, edu: 0, bars: 0, reserved: BTreeSet::new(), tagged: BTreeSet::new(), written: BTreeSet::new(), nonce: 0 };
        machine.edu = machine.enable(EDU_SLOT)?;
        let identification = machine.qtest.read4(machine.edu)?;
        if identification & 0xff != 0xed {
            bail!("no edu device: its identification reads {identification:#x}");
        }
        machine.enable_memory()?;
        Ok(machine)
    }

    /// Which machine this is.
    pub fn board(&self) -> Board {
        self.board
    }

    /// Reads the configuration space of a device on the root bus (function 0).
    ///
    /// # Errors
    /// If QEMU is lost; the same for all that follow.
    pub fn config_read4(&mut self, slot: u64, offset: u64) -> Result<u32> {
        match self.board.ecam() {
            Some(base) => self.qtest.read4(base + (slot << 15) + offset),
            None => {
                self.qtest.port_write4(0xcf8, (0x8000_0000 + (slot << 11) + offset) as u32)?;
                self.qtest.port_read4(0xcfc)
            }
        }
    }

    /// Writes the configuration space of a device on the root bus.
    #[allow(clippy::missing_errors_doc)]
    pub fn config_write4(&mut self, slot: u64, offset: u64, value: u32) -> Result<()> {
        match self.board.ecam() {
            Some(base) => self.qtest.write4(base + (slot << 15) + offset, value),
            None => {
                self.qtest.port_write4(0xcf8, (0x8000_0000 + (slot << 11) + offset) as u32)?;
                self.qtest.port_write4(0xcfc, value)
            }
        }
    }

    /// Gives a device an address for its BAR0, of up to one MiB, and lets it answer and do DMA. Returns the address.
    #[allow(clippy::missing_errors_doc)]
    pub fn enable(&mut self, slot: u64) -> Result<u64> {
        let bar = self.board.bar(self.bars);
        self.bars += 1;
        // Bits 2:1 of a memory BAR: 2 is one of 64 bits.
        let wide = self.config_read4(slot, 0x10)? & 0b110 == 0b100;
        self.config_write4(slot, 0x10, bar as u32)?;
        if wide {
            self.config_write4(slot, 0x14, 0)?;
        }
        // Memory space and bus master.
        self.config_write4(slot, 4, 6)?;
        Ok(bar)
    }

    /// Gives the device memory its address.
    fn enable_memory(&mut self) -> Result<()> {
        let first = self.board.device_memory().start;
        self.config_write4(MEMORY_SLOT, 0x18, first as u32)?;
        self.config_write4(MEMORY_SLOT, 0x1c, 0)?;
        self.config_write4(MEMORY_SLOT, 4, 2)?;
        self.qtest.write8(first, TAG)?;
        let word = self.qtest.read8(first)?;
        if word != TAG {
            bail!("no device memory: {first:#x} reads {word:#x}");
        }
        self.qtest.write8(first, 0)
    }

    /// Whether a page is memory that DMA may read and write: no table, nothing of the driver's.
    pub fn is_target(&self, page: u64) -> bool {
        let control = self.board.control();
        self.is_memory(page) && !(control..control + CONTROL_SIZE).contains(&page) && !self.reserved.contains(&(page - page % 4096))
    }

    /// Whether an address is RAM or device memory.
    pub fn is_memory(&self, address: u64) -> bool {
        self.is_ram(address) || self.board.device_memory().contains(&address)
    }

    /// The pages of tables that were written, ascending.
    pub fn tables(&self) -> impl Iterator<Item = u64> + '_ {
        self.reserved.iter().copied()
    }

    /// Whether a page is filled with its own addresses.
    pub fn is_tagged(&self, page: u64) -> bool {
        self.tagged.contains(&(page - page % 4096))
    }

    /// Whether an address is RAM.
    pub fn is_ram(&self, address: u64) -> bool {
        self.board.ram().iter().any(|range| range.contains(&address))
    }

    /// Writes a page of a table; DMA keeps away from it.
    ///
    /// # Errors
    /// If the page is not RAM, or is the driver's, or QEMU is lost.
    pub fn write_page(&mut self, page: u64, bytes: &[u8; 4096]) -> Result<()> {
        let control = self.board.control();
        if !page.is_multiple_of(4096) || !self.is_ram(page) || (control..control + CONTROL_SIZE).contains(&page) {
            bail!("{page:#x} is no place for a page of a table");
        }
        self.reserved.insert(page);
        self.tagged.remove(&page);
        self.written.insert(page);
        self.qtest.write(page, bytes)
    }

    /// Clears every page that was written or tagged.
    #[allow(clippy::missing_errors_doc)]
    pub fn clear_pages(&mut self) -> Result<()> {
        for page in std::mem::take(&mut self.written) {
            self.qtest.fill(page, 4096, 0)?;
        }
        self.reserved.clear();
        self.tagged.clear();
        Ok(())
    }

    /// Fills a page with its own addresses, if it is one that DMA may touch and is not filled yet.
    #[allow(clippy::missing_errors_doc)]
    pub fn tag_page(&mut self, page: u64) -> Result<()> {
        let page = page - page % 4096;
        if !self.is_target(page) || !self.tagged.insert(page) {
            return Ok(());
        }
        self.written.insert(page);
        let bytes: Vec<u8> = (page..page + 4096).step_by(8).flat_map(|address| (TAG | address).to_le_bytes()).collect();
        self.qtest.write(page, &bytes)
    }

    /// The address in a word of a tagged page.
    pub fn tag_address(word: u64) -> Option<u64> {
        (word >> 56 == TAG >> 56).then_some(word ^ TAG)
    }

    /// One transfer between a device address (`device`, an offset into the buffer) and an address on the bus.
    ///
    /// # Errors
    /// If the device does not finish.
    fn transfer(&mut self, bus: u64, device: u64, count: u64, to_ram: bool) -> Result<()> {
        let (source, destination) = if to_ram { (BUFFER + device, bus) } else { (bus, BUFFER + device) };
        self.qtest.write8(self.edu + 0x80, source)?;
        self.qtest.write8(self.edu + 0x88, destination)?;
        self.qtest.write8(self.edu + 0x90, count)?;
        self.qtest.write8(self.edu + 0x98, 1 | u64::from(to_ram) << 1)?;
        let mut started = None;
        while self.qtest.read8(self.edu + 0x98)? & 1 != 0 {
            if started.get_or_insert_with(Instant::now).elapsed() > TIMEOUT {
                bail!("a DMA transfer does not end");
            }
        }
        Ok(())
    }

    fn scratch(&self) -> u64 {
        self.board.control() + CONTROL_SIZE - 4096
    }

    /// Fills the device's buffer with words that are nowhere else. DMA must be untranslated.
    ///
    /// # Errors
    /// If the buffer does not hold them afterwards.
    pub fn fill_buffer(&mut self) -> Result<()> {
        self.nonce += 1;
        let scratch = self.scratch();
        let bytes: Vec<u8> = (0..SLOTS).flat_map(|slot| self.nonce_of(slot).to_le_bytes()).collect();
        self.qtest.write(scratch, &bytes)?;
        self.transfer(scratch, 0, 4096, false)?;
        let words = self.read_buffer()?;
        match words.iter().enumerate().find(|(slot, word)| **word != self.nonce_of(*slot)) {
            None => Ok(()),
            Some((slot, word)) => bail!("untranslated DMA does not work: word {slot} of the buffer is {word:#x}"),
        }
    }

    fn nonce_of(&self, slot: usize) -> u64 {
        NONCE | (self.nonce & 0xffff_ffff) << 16 | slot as u64
    }

    /// The device's buffer, word by word. DMA must be untranslated.
    #[allow(clippy::missing_errors_doc)]
    pub fn read_buffer(&mut self) -> Result<Vec<u64>> {
        let scratch = self.scratch();
        self.qtest.fill(scratch, 4096, 0)?;
        self.transfer(scratch, 0, 4096, true)?;
        let bytes = self.qtest.read(scratch, 4096)?;
        Ok(bytes.chunks_exact(8).map(|word| u64::from_le_bytes(std::array::from_fn(|index| word[index]))).collect())
    }

    /// The device reads eight bytes at this IOVA into a word of its buffer.
    #[allow(clippy::missing_errors_doc)]
    pub fn device_read(&mut self, iova: u64, slot: usize) -> Result<()> {
        self.transfer(iova, slot as u64 * 8, 8, false)
    }

    /// The device writes a word of its buffer, as [`Machine::fill_buffer`] left it, to this IOVA.
    #[allow(clippy::missing_errors_doc)]
    pub fn device_write(&mut self, iova: u64, slot: usize) -> Result<()> {
        self.transfer(iova, slot as u64 * 8, 8, true)
    }

    /// Whether the word that was written from a slot is at this address. The tag there is restored.
    #[allow(clippy::missing_errors_doc)]
    pub fn has_arrived(&mut self, slot: usize, address: u64) -> Result<bool> {
        let arrived = self.is_target(address) && self.qtest.read8(address)? == self.nonce_of(slot);
        if arrived {
            self.qtest.write8(address, TAG | address)?;
        }
        Ok(arrived)
    }

    /// Looks for words that were written and have not been found yet, in all tagged pages: slots and addresses. Tags are restored.
    #[allow(clippy::missing_errors_doc)]
    pub fn find_written(&mut self) -> Result<Vec<(usize, u64)>> {
        let mut found = Vec::new();
        for page in self.tagged.clone() {
            let bytes = self.qtest.read(page, 4096)?;
            for (index, word) in bytes.chunks_exact(8).enumerate() {
                let word = u64::from_le_bytes(std::array::from_fn(|index| word[index]));
                let slot = (word & 0xffff) as usize;
                if word == self.nonce_of(slot) {
                    let address = page + index as u64 * 8;
                    self.qtest.write8(address, TAG | address)?;
                    found.push((slot, address));
                }
            }
        }
        Ok(found)
    }
}

/// The first version whose models are those that these tests know; `install-qemu` and `cargo xtask test` name it as well.
const FIRST_VERSION: u32 = 10;

/// Whether to run at all: QEMU is there, new enough, and has the devices. If not, prints why; where the environment has `CI`, that is an error.
///
/// # Panics
/// Without such a QEMU in a continuous integration run.
pub fn available(board: Board) -> bool {
    let Err(reason) = usable(board.binary(), board.devices()) else { return true };
    let message = format!("SKIPPED: {reason}; tests/models/install-qemu installs what is needed");
    assert!(env::var_os("CI").is_none(), "{message}");
    eprintln!("{message}");
    false
}

/// Why a QEMU cannot be asked, if it cannot.
fn usable(binary: &str, devices: &[&str]) -> Result<(), String> {
    let output = |arguments: &[&str]| match Command::new(binary).args(arguments).stdin(Stdio::null()).output() {
        Ok(output) => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        Err(error) => Err(format!("no {binary} ({error})")),
    };
    // Without a machine the list of devices needs nothing else.
    suffices(&output(&["--version"])?, &output(&["-machine", "none", "-device", "help"])?, devices).map_err(|reason| format!("{binary} {reason}"))
}

/// What is missing, by what `--version` and `-device help` print.
fn suffices(version: &str, all: &str, devices: &[&str]) -> Result<(), String> {
    let rest = version.strip_prefix("QEMU emulator version ").unwrap_or_default();
    match rest.split(|character: char| !character.is_ascii_digit()).next().unwrap_or_default().parse::<u32>() {
        Err(_) => return Err("does not say its version".to_owned()),
        Ok(major) if major < FIRST_VERSION => return Err(format!("is of version {major}, older than {FIRST_VERSION}")),
        Ok(_) => {}
    }
    match devices.iter().find(|device| !all.contains(&format!("name \"{device}\""))) {
        Some(device) => Err(format!("has no {device}")),
        None => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_qemu_that_is_missing_old_or_incomplete_is_not_asked() {
        let all = "Misc devices:\nname \"edu\", bus PCI\nname \"amd-iommu\", bus System, desc \"AMD IOMMU (AMD-Vi) DMA Remapping device\"\n";
        let [old, new, newer] = [
            "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright",
            "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright",
            "QEMU emulator version 11.1.3\nCopyright",
        ];
        assert_eq!(suffices(old, all, &["edu"]), Err("is of version 7, older than 10".to_owned()));
        assert_eq!(suffices("", all, &["edu"]), Err("does not say its version".to_owned()));
        assert_eq!(suffices(new, all, &["edu", "intel-iommu"]), Err("has no intel-iommu".to_owned()));
        assert_eq!(suffices(new, all, &["edu", "amd-iommu"]), Ok(()));
        assert_eq!(suffices(newer, all, &["edu"]), Ok(()));
        assert!(usable("/no/such/qemu", &[]).unwrap_err().starts_with("no /no/such/qemu (No such file"));
    }
}
