//! A QEMU process that runs no guest code, and its qtest protocol: one command a line, one answer a line.
//!
//! Debian's QEMU is built without the qtest accelerator; with TCG, an instruction counter that never sleeps and firmware that only halts, virtual time jumps to the
//! next timer whenever the machine is idle, so devices that wait for a timer answer at once.

use std::env;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{self, Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

/// How long an answer may take, start of the process included.
pub const TIMEOUT: Duration = Duration::from_secs(30);

/// Commands without a result that may be under way at once.
const POSTED_LIMIT: usize = 64;

/// Runs QEMU, with its standard output, a socket, for both directions, and ends it when nobody holds the other end of the shell's own standard input any longer: also
/// when the test process is killed.
const GUARD: &str = r#""$@" <&1 & qemu=$!; exec >/dev/null; cat; kill -9 "$qemu"; wait "$qemu" 2>/dev/null"#;

/// Bytes in one bulk command.
const BULK: usize = 16384;

/// A running QEMU. The process ends when this is dropped.
#[derive(Debug)]
pub struct Qtest {
    child: Child,
    stream: UnixStream,
    folder: PathBuf,
    received: Vec<u8>,
    /// Where the next line starts in `received`.
    consumed: usize,
    outgoing: Vec<u8>,
    /// Commands in `outgoing` or sent, whose answers were not read yet.
    posted: usize,
    /// The last of them, for messages.
    last_posted: String,
}

impl Qtest {
    /// Starts a QEMU binary with the machine's own arguments and with firmware that repeats `halt`.
    ///
    /// # Errors
    /// If the process cannot be started, or does not answer.
    pub fn start(binary: &str, arguments: &[&str], halt: &[u8]) -> Result<Qtest> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let folder = env::temp_dir().join(format!("stagecraft-models-{}-{}", process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        let firmware = folder.join("firmware");
        let image: Vec<u8> = halt.iter().copied().cycle().take(65536).collect();
        fs::write(&firmware, image)?;
        let messages = File::create(folder.join("messages"))?;
        let (stream, theirs) = UnixStream::pair()?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        let child = Command::new("/bin/sh")
            .args(["-c", GUARD, "sh", binary])
            .args(arguments)
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg", "-icount", "shift=0,sleep=off"])
            .arg("-bios")
            .arg(&firmware)
            .args(["-qtest", "stdio", "-qtest-log", "none"])
            .stdin(Stdio::piped())
            .stdout(OwnedFd::from(theirs))
            .stderr(messages)
            .spawn()
            .with_context(|| format!("cannot start {binary}"))?;
        let mut qtest =
            Qtest { child, stream, folder, received: Vec::new(), consumed: 0, outgoing: Vec::new(), posted: 0, last_posted: String::new() };
        qtest.ask("endianness").with_context(|| format!("{binary} {}", arguments.join(" ")))?;
        Ok(qtest)
    }

    /// What QEMU wrote to its standard error so far.
    pub fn messages(&self) -> String {
        fs::read_to_string(self.folder.join("messages")).unwrap_or_default()
    }

    /// Sends a command later, at the latest with the next one that has a result. Its answer is checked then.
    ///
    /// # Errors
    /// Those of earlier posted commands.
    pub fn post(&mut self, command: String) -> Result<()> {
        self.outgoing.extend_from_slice(command.as_bytes());
        self.outgoing.push(b'\n');
        self.posted += 1;
        self.last_posted = command;
        if self.posted >= POSTED_LIMIT { self.flush() } else { Ok(()) }
    }

    /// Sends what was posted, and waits for the answers.
    ///
    /// # Errors
    /// If QEMU ended, refuses a command, or does not answer in time.
    pub fn flush(&mut self) -> Result<()> {
        if !self.outgoing.is_empty() {
            if let Err(error) = self.stream.write_all(&self.outgoing) {
                return Err(self.lost(&error.to_string()));
            }
            self.outgoing.clear();
        }
        while self.posted > 0 {
            self.posted -= 1;
            self.answer().with_context(|| format!("one of the commands before and including {}", shorten(&self.last_posted)))?;
        }
        Ok(())
    }

    /// Sends a command and returns the words after `OK`.
    ///
    /// # Errors
    /// As [`Qtest::flush`].
    pub fn ask(&mut self, command: &str) -> Result<String> {
        self.outgoing.extend_from_slice(command.as_bytes());
        self.outgoing.push(b'\n');
        if let Err(error) = self.stream.write_all(&self.outgoing) {
            return Err(self.lost(&error.to_string()));
        }
        self.outgoing.clear();
        self.flush()?;
        self.answer().with_context(|| shorten(command))
    }

    fn answer(&mut self) -> Result<String> {
        loop {
            let line = self.line()?;
            if let Some(rest) = line.strip_prefix("OK") {
                return Ok(rest.trim().to_string());
            }
            // Interrupts are reported between answers.
            if !line.starts_with("IRQ") {
                bail!("QEMU answered {line:?}");
            }
        }
    }

    fn line(&mut self) -> Result<String> {
        let mut searched = self.consumed;
        loop {
            if let Some(length) = self.received[searched..].iter().position(|byte| *byte == b'\n') {
                let end = searched + length;
                let line = String::from_utf8_lossy(&self.received[self.consumed..end]).into_owned();
                self.consumed = end + 1;
                return Ok(line);
            }
            self.received.drain(..self.consumed);
            self.consumed = 0;
            searched = self.received.len();
            let mut buffer = [0; 65536];
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(self.lost("it closed the connection")),
                Ok(count) => self.received.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return Err(self.lost(&format!("no answer within {} s", TIMEOUT.as_secs())));
                }
                Err(error) => return Err(self.lost(&error.to_string())),
            }
        }
    }

    fn lost(&mut self, reason: &str) -> anyhow::Error {
        // An answer that comes too late would be taken for another command's.
        self.end();
        anyhow!("QEMU is lost: {reason}; its messages: {:?}", self.messages())
    }

    fn end(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }

    fn number(&mut self, command: &str) -> Result<u64> {
        let answer = self.ask(command)?;
        let digits = answer.strip_prefix("0x").unwrap_or(&answer);
        u64::from_str_radix(digits, 16).with_context(|| format!("{command}: {answer:?}"))
    }

    /// Reads eight bytes of physical address space.
    ///
    /// # Errors
    /// As [`Qtest::flush`]; the same for all that follow.
    pub fn read8(&mut self, address: u64) -> Result<u64> {
        self.number(&format!("readq {address:#x}"))
    }

    /// Reads four bytes of physical address space.
    #[allow(clippy::missing_errors_doc)]
    pub fn read4(&mut self, address: u64) -> Result<u32> {
        Ok(self.number(&format!("readl {address:#x}"))? as u32)
    }

    /// Writes eight bytes of physical address space.
    #[allow(clippy::missing_errors_doc)]
    pub fn write8(&mut self, address: u64, value: u64) -> Result<()> {
        self.post(format!("writeq {address:#x} {value:#x}"))
    }

    /// Writes four bytes of physical address space.
    #[allow(clippy::missing_errors_doc)]
    pub fn write4(&mut self, address: u64, value: u32) -> Result<()> {
        self.post(format!("writel {address:#x} {value:#x}"))
    }

    /// Writes eight-byte words one after the other.
    #[allow(clippy::missing_errors_doc)]
    pub fn write_words(&mut self, address: u64, words: &[u64]) -> Result<()> {
        words.iter().zip(0..).try_for_each(|(word, index)| self.write8(address + index * 8, *word))
    }

    /// Writes four bytes to an x86 port.
    #[allow(clippy::missing_errors_doc)]
    pub fn port_write4(&mut self, port: u16, value: u32) -> Result<()> {
        self.post(format!("outl {port:#x} {value:#x}"))
    }

    /// Reads four bytes from an x86 port.
    #[allow(clippy::missing_errors_doc)]
    pub fn port_read4(&mut self, port: u16) -> Result<u32> {
        Ok(self.number(&format!("inl {port:#x}"))? as u32)
    }

    /// Writes any number of bytes.
    #[allow(clippy::missing_errors_doc)]
    pub fn write(&mut self, address: u64, bytes: &[u8]) -> Result<()> {
        for (chunk, index) in bytes.chunks(BULK).zip(0..) {
            self.post(format!("b64write {:#x} {:#x} {}", address + index * BULK as u64, chunk.len(), base64(chunk)))?;
            // Not many of these long lines at once: QEMU must be able to send its answers meanwhile.
            self.flush()?;
        }
        Ok(())
    }

    /// Reads any number of bytes.
    #[allow(clippy::missing_errors_doc)]
    pub fn read(&mut self, address: u64, length: usize) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(length);
        while bytes.len() < length {
            let count = (length - bytes.len()).min(BULK);
            let answer = self.ask(&format!("b64read {:#x} {count:#x}", address + bytes.len() as u64))?;
            let chunk = from_base64(&answer).with_context(|| format!("malformed bytes: {}", shorten(&answer)))?;
            if chunk.len() != count {
                bail!("{count} bytes asked for, {} received", chunk.len());
            }
            bytes.extend(chunk);
        }
        Ok(bytes)
    }

    /// Fills with a byte.
    #[allow(clippy::missing_errors_doc)]
    pub fn fill(&mut self, address: u64, length: u64, value: u8) -> Result<()> {
        self.post(format!("memset {address:#x} {length:#x} {value:#x}"))
    }
}

impl Drop for Qtest {
    fn drop(&mut self) {
        self.end();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn shorten(text: &str) -> String {
    text.chars().take(100).collect()
}

const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

fn base64(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let value = (0..3).fold(0u32, |value, index| value << 8 | u32::from(group.get(index).copied().unwrap_or(0)));
        for index in 0..4 {
            let digit = DIGITS[(value >> (18 - 6 * index) & 63) as usize];
            text.push(if index <= group.len() { char::from(digit) } else { '=' });
        }
    }
    text
}

fn from_base64(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut value, mut bits) = (0u32, 0);
    for character in text.trim_end_matches('=').bytes() {
        let digit = match character {
            b'A'..=b'Z' => character - b'A',
            b'a'..=b'z' => character - b'a' + 26,
            b'0'..=b'9' => character - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        value = value << 6 | u32::from(digit);
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push((value >> bits) as u8);
            value &= (1 << bits) - 1;
        }
    }
    Some(bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_ends_at_once_is_an_error_with_its_messages() {
        for (binary, hint) in [("/bin/ls", "-nodefaults"), ("/no/such/program", "/no/such/program")] {
            let text = format!("{:#}", Qtest::start(binary, &["-nodefaults"], &[0]).unwrap_err());
            assert!(text.contains("QEMU is lost") && text.contains(hint), "{text}");
        }
    }

    #[test]
    fn what_is_not_an_answer_is_an_error() {
        // It repeats its arguments for ever.
        let text = format!("{:#}", Qtest::start("/usr/bin/yes", &["--", "FAIL"], &[0]).unwrap_err());
        assert!(text.contains("answered \"FAIL"), "{text}");
    }

    #[test]
    fn base64_is_that_of_rfc_4648() {
        for (plain, encoded) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("fooba", "Zm9vYmE="), ("foobar", "Zm9vYmFy")]
        {
            assert_eq!(base64(plain.as_bytes()), encoded);
            assert_eq!(from_base64(encoded).as_deref(), Some(plain.as_bytes()));
        }
        assert_eq!(from_base64("Zm9*"), None);
    }
}
