//! A raw dump of memory: a file whose first byte stands at a known guest-physical address.

use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::path::Path;

use vm_memory::{Bytes as _, VolatileMemory as _};

use super::{PageMemory, SnapshotError, memory};
use crate::Span;
use crate::memory::PAGE;

/// A part of a guest's memory, from a file.
#[derive(Debug)]
pub struct Dump {
    /// The pages.
    pub memory: PageMemory,
    /// Where they are. The last page is filled up with zeroes.
    pub span: Span,
}

/// Bytes that are read at once.
const CHUNK: usize = 1 << 20;

impl Dump {
    /// Reads the file at `path`, whose first byte stands at `base`, a multiple of 4 KiB.
    ///
    /// # Errors
    /// The file cannot be read or is empty, it does not fit below 2^64, or there is no memory for it.
    pub fn load(path: &Path, base: u64) -> Result<Self, SnapshotError> {
        let mut file = File::open(path).map_err(SnapshotError::io(path))?;
        let length = file.metadata().map_err(SnapshotError::io(path))?.len();
        let bytes = length.checked_next_multiple_of(PAGE).filter(|bytes| *bytes > 0);
        let bytes = bytes.ok_or_else(|| SnapshotError::invalid(path, "there is nothing in it; give a dump of memory"))?;
        if !base.is_multiple_of(PAGE) {
            return Err(SnapshotError::invalid(path, format!("cannot begin at {base:#x}: give a multiple of 4096")));
        }
        let last = base.checked_add(bytes - 1);
        let last = last.ok_or_else(|| SnapshotError::invalid(path, format!("{bytes:#x} bytes from {base:#x} do not fit below 2^64")))?;
        let (memory, backing) =
            memory::range(base, bytes).map_err(|error| SnapshotError::invalid(path, format!("no memory for {bytes:#x} bytes: {error}")))?;
        let slice = backing.as_volatile_slice();
        let mut chunk = vec![0; CHUNK];
        let mut at = 0;
        // A file that grows while it is read is cut at the length that it had.
        while at < length as usize {
            let wanted = CHUNK.min(length as usize - at);
            match file.read(&mut chunk[..wanted]) {
                Ok(0) => break,
                Ok(count) => {
                    // Cannot fail: the range has room for the whole file.
                    let _ = slice.write_slice(&chunk[..count], at);
                    at += count;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(SnapshotError::io(path)(error)),
            }
        }
        Ok(Self { memory, span: Span { first: base, last } })
    }
}
