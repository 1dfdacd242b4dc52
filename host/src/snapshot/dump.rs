//! A raw dump of memory: a file whose first byte stands at a known guest-physical address.

use std::fs::File;
use std::path::Path;

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
/// Largest file that is read.
const MAX_BYTES: u64 = 8 << 30;

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
        if length > MAX_BYTES {
            let most = MAX_BYTES >> 30;
            return Err(SnapshotError::invalid(
                path,
                format!("larger than {most} GiB; give the part that has the tables, and with --base where it begins"),
            ));
        }
        if !base.is_multiple_of(PAGE) {
            return Err(SnapshotError::invalid(path, format!("cannot begin at {base:#x}: give a multiple of 4096")));
        }
        let last = base.checked_add(bytes - 1);
        let last = last.ok_or_else(|| SnapshotError::invalid(path, format!("{bytes:#x} bytes from {base:#x} do not fit below 2^64")))?;
        let (memory, backing) =
            memory::range(base, bytes).map_err(|error| SnapshotError::invalid(path, format!("no memory for {bytes:#x} bytes: {error}")))?;
        let mut chunk = vec![0; CHUNK];
        // A file that grows while it is read is cut at the length that it had.
        for at in (0..length as usize).step_by(CHUNK) {
            let wanted = CHUNK.min(length as usize - at);
            let read = memory::read_up_to(&mut file, &mut chunk[..wanted]).map_err(SnapshotError::io(path))?;
            for (index, page) in chunk[..read].chunks(PAGE as usize).enumerate() {
                memory::write_unless_zero(Some(&backing), page, at + index * PAGE as usize);
            }
            if read < wanted {
                break;
            }
        }
        Ok(Self { memory, span: Span { first: base, last } })
    }
}
