//! Compiled plugins on disk, so that a start costs less than a millisecond.
//!
//! Compiled code is trusted like a shared library, so the cache takes only what this user wrote: the directory and every entry must belong to the
//! process's user and be writable by nobody else. An entry carries a checksum; one that is cut off, flipped or of another Wasmtime is
//! compiled anew. Entries appear at once and whole (written beside, then renamed), and are never written again: the code is mapped from the file.

use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use wasmtime::component::Component;

/// Counts up when Wasmtime, the fixed part of the engine's configuration, the admission's policy or an entry's checksum changes: older entries are not looked at.
const POLICY: u32 = 4;
/// An entry is the artefact as Wasmtime made it, so that it can be mapped; the sum and these bytes come after it.
const MAGIC: &[u8; 16] = b"stagecraft-aot2\n";
const CHECKSUM_BYTES: usize = 16;
const MAX_BYTES: u64 = 256 << 20;

/// A cache that is not fit for use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// The directory or an entry could not be made or read.
    #[error("the plugin cache {path}: {error}")]
    Io {
        /// What was touched.
        path: PathBuf,
        /// The system's answer.
        error: std::io::Error,
    },
    /// Somebody else could have written it.
    #[error("the plugin cache {path} {what}: compiled code is trusted like a shared library, so it must be yours alone (chmod go-w, chown)")]
    Foreign {
        /// The directory or entry.
        path: PathBuf,
        /// Who could have.
        what: String,
    },
}

/// A directory of compiled plugins.
#[derive(Debug)]
pub(super) struct Cache {
    directory: OwnedFd,
    path: PathBuf,
    /// The end of every name: engines that compile in other forms can share a directory.
    suffix: String,
}

impl Cache {
    /// Opens the directory, and creates it for this user alone if it is missing. `form` names what of the engine's configuration is in compiled code.
    pub(super) fn open(path: &Path, form: &str) -> Result<Self, CacheError> {
        use std::os::unix::fs::DirBuilderExt as _;
        let io = |error| CacheError::Io { path: path.to_owned(), error };
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io)?;
        let directory =
            rustix::fs::open(path, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(|error| io(error.into()))?;
        check_owner(&directory, path)?;
        Ok(Self { directory, path: path.to_owned(), suffix: format!("p{POLICY}-{}-{form}.aot", std::env::consts::ARCH) })
    }

    /// File name of the component with this content.
    fn entry(&self, content: &[u8; 32]) -> String {
        format!("{}-{}", super::hex(content), self.suffix)
    }

    /// The compiled form, if there is one that fits this engine.
    pub(super) fn get(&self, engine: &wasmtime::Engine, content: &[u8; 32]) -> Result<Option<Component>, CacheError> {
        let name = self.entry(content);
        let path = self.path.join(&name);
        let io = |error| CacheError::Io { path: path.clone(), error };
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = match rustix::fs::openat(&self.directory, &*name, flags, Mode::empty()) {
            Ok(file) => file,
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            Err(rustix::io::Errno::LOOP) => return Err(CacheError::Foreign { path, what: "is a symbolic link".to_owned() }),
            Err(error) => return Err(io(error.into())),
        };
        let length = check_owner(&file, &path)?;
        let file = File::from(file);
        let Some(length) = checked(&file, length).map_err(io)? else {
            tracing::warn!(path = %path.display(), "a damaged entry of the plugin cache is compiled anew");
            return Ok(None);
        };
        let component = super::artefact::deserialize(engine, &OwnEntry { file, length });
        Ok(component.map_err(|error| tracing::debug!(%error, "an entry of the plugin cache is for another engine")).ok())
    }

    /// Keeps a compiled form.
    #[cfg(feature = "compile")]
    pub(super) fn put(&self, content: &[u8; 32], artefact: &[u8]) -> Result<(), CacheError> {
        use std::hash::BuildHasher as _;
        use std::io::Write as _;
        use std::sync::atomic::{AtomicU32, Ordering};
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = self.entry(content);
        // A name that nobody else has: processes of two containers may have the same number.
        let number = std::hash::RandomState::new().hash_one((std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
        let temporary = format!(".{name}.{number:016x}");
        let io = |error| CacheError::Io { path: self.path.join(&name), error };
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = rustix::fs::openat(&self.directory, &*temporary, flags, Mode::RUSR | Mode::WUSR).map_err(|error| io(error.into()))?;
        let mut file = File::from(file);
        let written = [artefact, &checksum(artefact), MAGIC].iter().try_for_each(|part| file.write_all(part));
        let renamed = written.and_then(|()| Ok(rustix::fs::renameat(&self.directory, &*temporary, &self.directory, &*name)?));
        renamed.map_err(|error| {
            let _ = rustix::fs::unlinkat(&self.directory, &*temporary, rustix::fs::AtFlags::empty());
            io(error)
        })
    }
}

/// An entry that only this user can have written, and that is whole.
pub(super) struct OwnEntry {
    file: File,
    /// Bytes of the artefact, from the beginning.
    length: u64,
}

impl OwnEntry {
    /// The artefact, copied; none if the file is no longer what it was.
    pub(super) fn artefact(&self) -> Option<Vec<u8>> {
        use std::os::unix::fs::FileExt as _;
        let mut bytes = vec![0; self.length as usize + CHECKSUM_BYTES + MAGIC.len()];
        self.file.read_exact_at(&mut bytes, 0).ok()?;
        let artefact = checked(&*bytes, bytes.len() as u64).ok()??;
        bytes.truncate(artefact as usize);
        Some(bytes)
    }

    /// The file that it is in, from its beginning.
    pub(super) fn file(&self) -> &File {
        &self.file
    }
}

/// Bytes that are read at once: they stay in the cache, and no memory for all of them is asked for.
const PART: usize = 64 << 10;

/// How many bytes of an entry of `length` bytes are the artefact; none if it is damaged.
fn checked(mut entry: impl Read, length: u64) -> std::io::Result<Option<u64>> {
    let Some(artefact) = length.checked_sub((CHECKSUM_BYTES + MAGIC.len()) as u64).filter(|_| length <= MAX_BYTES) else { return Ok(None) };
    let (mut sum, mut part, mut left) = (Checksum::default(), vec![0; PART], artefact);
    let mut end = [0; CHECKSUM_BYTES + MAGIC.len()];
    let mut read = || {
        while left > 0 {
            let part = &mut part[..PART.min(left as usize)];
            entry.read_exact(part)?;
            sum.add(part);
            left -= part.len() as u64;
        }
        entry.read_exact(&mut end)
    };
    match read() {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let whole = end.strip_suffix(MAGIC).is_some_and(|end| end == sum.sum());
    Ok(whole.then_some(artefact))
}

/// Words that are mixed at once: a processor multiplies several at a time.
const LANES: usize = 8;

/// Finds damage, not malice: whoever could write the file could write any sum. A cryptographic one would take half of the time of a start.
struct Checksum {
    lanes: [u64; LANES],
    length: u64,
}

impl Default for Checksum {
    fn default() -> Self {
        Self { lanes: std::array::from_fn(|lane| lane as u64 + 1), length: 0 }
    }
}

impl Checksum {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;

    /// The next bytes: a multiple of `8 * LANES`, or the last.
    fn add(&mut self, bytes: &[u8]) {
        let mix = |lane: &mut u64, word: [u8; 8]| *lane = (*lane ^ u64::from_le_bytes(word)).wrapping_mul(Self::ODD).rotate_left(29);
        let mut lanes = self.lanes;
        let (words, rest) = bytes.as_chunks::<8>();
        let (blocks, last) = words.as_chunks::<LANES>();
        for block in blocks {
            lanes.iter_mut().zip(block).for_each(|(lane, word)| mix(lane, *word));
        }
        let last = last.iter().copied().chain(rest.iter().map(|byte| [*byte; 8]));
        last.enumerate().for_each(|(index, word)| mix(&mut lanes[index % LANES], word));
        self.lanes = lanes;
        self.length += bytes.len() as u64;
    }

    fn sum(&self) -> [u8; CHECKSUM_BYTES] {
        let fold = |lanes: &[u64]| lanes.iter().fold(self.length, |sum, lane| (sum ^ lane).wrapping_mul(Self::ODD).rotate_left(32));
        let (front, back) = self.lanes.split_at(LANES / 2);
        let mut sum = [0; CHECKSUM_BYTES];
        sum[..8].copy_from_slice(&fold(front).to_le_bytes());
        sum[8..].copy_from_slice(&fold(back).to_le_bytes());
        sum
    }
}

#[cfg(any(feature = "compile", test))]
fn checksum(bytes: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut sum = Checksum::default();
    sum.add(bytes);
    sum.sum()
}

/// Refuses what somebody else could have written. `file` is open, so what is checked is what is read. Answers its length.
fn check_owner(file: &OwnedFd, path: &Path) -> Result<u64, CacheError> {
    let status = rustix::fs::fstat(file).map_err(|error| CacheError::Io { path: path.to_owned(), error: error.into() })?;
    let foreign = |what: String| Err(CacheError::Foreign { path: path.to_owned(), what });
    let us = rustix::process::geteuid().as_raw();
    if status.st_uid != us {
        return foreign(format!("belongs to user {} and not to {us}", status.st_uid));
    }
    if status.st_mode & 0o022 != 0 {
        return foreign(format!("can be written by others (mode {:o})", status.st_mode & 0o7777));
    }
    match rustix::fs::FileType::from_raw_mode(status.st_mode) {
        rustix::fs::FileType::RegularFile | rustix::fs::FileType::Directory => Ok(status.st_size.unsigned_abs()),
        _ => foreign("is not a regular file".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::{MAGIC, PART, checked, checksum};

    fn length(entry: &[u8]) -> Option<u64> {
        checked(entry, entry.len() as u64).expect("bytes can be read")
    }

    #[test]
    fn damage_anywhere_is_found() {
        let artefact: Vec<u8> = (0..1000_u32).map(|n| (n * 7) as u8).collect();
        let entry = [&artefact[..], &checksum(&artefact), MAGIC].concat();
        assert_eq!(length(&entry), Some(1000));
        for index in 0..entry.len() {
            let mut damaged = entry.clone();
            damaged[index] ^= 0x10;
            assert_eq!(length(&damaged), None, "byte {index}");
            assert_eq!(length(&entry[..index]), None, "cut at {index}");
            assert_eq!(length(&entry[index + 1..]), None, "begins after {index}");
        }
        assert_eq!(length(&[&entry[..], &[0]].concat()), None, "one more byte");
        assert_eq!(checked(&entry[..], entry.len() as u64 + 1).expect("bytes"), None, "shorter than the file was");
    }

    /// What is read part by part has the checksum of the whole.
    #[test]
    fn parts_are_as_good_as_the_whole() {
        for bytes in [0, 1, PART - 1, PART, PART + 1, 3 * PART + 33] {
            let artefact: Vec<u8> = (0..bytes as u32).map(|n| (n.wrapping_mul(0x9e37_79b9) >> 13) as u8).collect();
            let mut entry = [&artefact[..], &checksum(&artefact), MAGIC].concat();
            assert_eq!(length(&entry), Some(bytes as u64), "{bytes} bytes");
            if let Some(last) = bytes.checked_sub(1) {
                entry[last] ^= 1;
                assert_eq!(length(&entry), None, "the last of {bytes} bytes");
            }
        }
    }
}
