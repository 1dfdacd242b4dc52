//! Compiled plugins on disk, so that a start costs less than a millisecond.
//!
//! Compiled code is trusted like a shared library, so the cache takes only what this user wrote: the directory and every entry must belong to the
//! process's user and be writable by nobody else. An entry carries a checksum; one that is cut off, flipped or of another Wasmtime is
//! compiled anew. Entries appear at once and whole (written beside, then renamed), and are never written again: the code is mapped from the file.

use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use wasmtime::component::Component;

/// Counts up when Wasmtime, the fixed part of the engine's configuration or the admission's policy changes: older entries are not looked at.
const POLICY: u32 = 3;
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
        let mut bytes = Vec::with_capacity(length.min(MAX_BYTES) as usize + 1);
        let file = File::from(file);
        (&file).take(MAX_BYTES).read_to_end(&mut bytes).map_err(io)?;
        let Some(length) = checked(&bytes).map(<[u8]>::len) else {
            tracing::warn!(path = %path.display(), "a damaged entry of the plugin cache is compiled anew");
            return Ok(None);
        };
        bytes.truncate(length);
        let component = super::artefact::deserialize(engine, &OwnEntry { artefact: bytes, file });
        Ok(component.map_err(|error| tracing::debug!(%error, "an entry of the plugin cache is for another engine")).ok())
    }

    /// Keeps a compiled form.
    #[cfg(feature = "compile")]
    pub(super) fn put(&self, content: &[u8; 32], artefact: &[u8]) -> Result<(), CacheError> {
        use std::io::Write as _;
        use std::sync::atomic::{AtomicU32, Ordering};
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = self.entry(content);
        let temporary = format!(".{name}.{}.{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let io = |error| CacheError::Io { path: self.path.join(&name), error };
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        // A rest of a process that died with the same number is in the way.
        let _ = rustix::fs::unlinkat(&self.directory, &*temporary, rustix::fs::AtFlags::empty());
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
    artefact: Vec<u8>,
    file: File,
}

impl OwnEntry {
    /// What Wasmtime made.
    pub(super) fn artefact(&self) -> &[u8] {
        &self.artefact
    }

    /// The file that the bytes were read from; it has a few bytes more than the artefact.
    pub(super) fn file(&self) -> &File {
        &self.file
    }
}

/// The artefact in an entry that is whole.
fn checked(entry: &[u8]) -> Option<&[u8]> {
    let (artefact, sum) = entry.strip_suffix(MAGIC)?.split_last_chunk::<CHECKSUM_BYTES>()?;
    (checksum(artefact) == *sum).then_some(artefact)
}

/// Finds damage, not malice: whoever could write the file could write any sum. A cryptographic one would take half of the time of a start.
fn checksum(bytes: &[u8]) -> [u8; CHECKSUM_BYTES] {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut lanes = [1_u64, 2, 3, 4];
    let mix = |lane: &mut u64, word: [u8; 8]| *lane = (*lane ^ u64::from_le_bytes(word)).wrapping_mul(ODD).rotate_left(29);
    let (blocks, rest) = bytes.as_chunks::<32>();
    for block in blocks {
        lanes.iter_mut().zip(block.as_chunks::<8>().0).for_each(|(lane, word)| mix(lane, *word));
    }
    for (index, byte) in rest.iter().enumerate() {
        mix(&mut lanes[index % 4], [*byte; 8]);
    }
    let fold = |a: u64, b: u64| (a ^ b.rotate_left(32) ^ bytes.len() as u64).wrapping_mul(ODD);
    let mut sum = [0; CHECKSUM_BYTES];
    sum[..8].copy_from_slice(&fold(lanes[0], lanes[1]).to_le_bytes());
    sum[8..].copy_from_slice(&fold(lanes[2], lanes[3]).to_le_bytes());
    sum
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
    use super::{MAGIC, checked, checksum};

    #[test]
    fn damage_anywhere_is_found() {
        let artefact: Vec<u8> = (0..1000_u32).map(|n| (n * 7) as u8).collect();
        let entry = [&artefact[..], &checksum(&artefact), MAGIC].concat();
        assert_eq!(checked(&entry), Some(&*artefact));
        for index in 0..entry.len() {
            let mut damaged = entry.clone();
            damaged[index] ^= 0x10;
            assert_eq!(checked(&damaged), None, "byte {index}");
            assert_eq!(checked(&entry[..index]), None, "cut at {index}");
            assert_eq!(checked(&entry[index + 1..]), None, "begins after {index}");
        }
        assert_eq!(checked(&[&entry[..], &[0]].concat()), None, "one more byte");
    }
}
