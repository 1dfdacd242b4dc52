//! A folder of plugin files. Names cannot lead out of it, whatever they are made of.

use cap_std::ambient_authority;
use cap_std::fs::Dir;
use std::io::Read as _;
use std::path::{Path, PathBuf};

/// A file that cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DirectoryError {
    /// The directory cannot be opened or listed.
    #[error("the plugin directory {path}: {error}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The system's answer.
        error: std::io::Error,
    },
    /// Not the name of a plugin file.
    #[error("`{name}` is not the name of a file in the plugin directory {path}: it must be NAME.wasm in UTF-8, without a folder")]
    Name {
        /// The directory.
        path: PathBuf,
        /// What was asked for.
        name: String,
    },
    /// The file cannot be read, or is a link that leads out of the directory.
    #[error("`{name}` in the plugin directory {path} cannot be read: {error}")]
    File {
        /// The directory.
        path: PathBuf,
        /// The file.
        name: String,
        /// The system's answer.
        error: std::io::Error,
    },
    /// The file is larger than a plugin may be.
    #[error("`{name}` in the plugin directory {path} has more than {limit} bytes")]
    TooLarge {
        /// The directory.
        path: PathBuf,
        /// The file.
        name: String,
        /// The limit.
        limit: usize,
    },
}

/// A folder with plugin files `NAME.wasm`. It is opened once; everything after that goes through the open handle and cannot leave it: not by `..`, not
/// by an absolute path, not by a symbolic link.
#[derive(Debug)]
pub struct PluginDirectory {
    directory: Dir,
    path: PathBuf,
}

impl PluginDirectory {
    /// Opens the directory at `path`.
    ///
    /// # Errors
    /// [`DirectoryError::Directory`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, DirectoryError> {
        let path = path.as_ref().to_owned();
        match Dir::open_ambient_dir(&path, ambient_authority()) {
            Ok(directory) => Ok(Self { directory, path }),
            Err(error) => Err(DirectoryError::Directory { path, error }),
        }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of the `*.wasm` files, sorted. Hidden files and everything else is left out.
    ///
    /// # Errors
    /// [`DirectoryError::Directory`], or [`DirectoryError::Name`] for one whose name is not UTF-8.
    pub fn names(&self) -> Result<Vec<String>, DirectoryError> {
        let failed = |error| DirectoryError::Directory { path: self.path.clone(), error };
        let mut names = Vec::new();
        for entry in self.directory.entries().map_err(failed)? {
            match entry.map_err(failed)?.file_name().into_string() {
                Ok(name) if is_plugin_name(&name) => names.push(name),
                Ok(_) => {}
                // A plugin that is meant to be there is not left out in silence.
                Err(name) if is_plugin_name(&name.to_string_lossy()) => {
                    let name = super::error::clean(&name.to_string_lossy());
                    return Err(DirectoryError::Name { path: self.path.clone(), name });
                }
                Err(_) => {}
            }
        }
        names.sort();
        Ok(names)
    }

    /// Reads the file called `name`, of at most `limit` bytes.
    ///
    /// # Errors
    /// [`DirectoryError`], with the name.
    pub fn read(&self, name: &str, limit: usize) -> Result<Vec<u8>, DirectoryError> {
        if !is_plugin_name(name) {
            return Err(DirectoryError::Name { path: self.path.clone(), name: super::error::clean(name) });
        }
        let failed = |error| DirectoryError::File { path: self.path.clone(), name: name.to_owned(), error };
        // Looked at before it is opened: opening a pipe would wait for its writer.
        if !self.directory.metadata(name).map_err(failed)?.is_file() {
            return Err(failed(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a file")));
        }
        let file = self.directory.open(name).map_err(failed)?;
        let mut bytes = Vec::new();
        file.take(limit as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
        if bytes.len() > limit {
            return Err(DirectoryError::TooLarge { path: self.path.clone(), name: name.to_owned(), limit });
        }
        Ok(bytes)
    }
}

fn is_plugin_name(name: &str) -> bool {
    let stem = name.strip_suffix(".wasm").unwrap_or_default();
    !stem.is_empty() && !stem.starts_with('.') && !stem.contains(['/', '\\', '\0'])
}

#[cfg(test)]
mod tests {
    use super::is_plugin_name;

    #[test]
    fn a_plugin_file_is_a_name_without_a_folder() {
        for good in ["a.wasm", "intel-vtd.wasm", "a.b.wasm"] {
            assert!(is_plugin_name(good), "{good}");
        }
        for bad in ["", ".wasm", "..wasm", "a", "a.wasm.txt", "../a.wasm", "/a.wasm", "b/a.wasm", ".a.wasm", "b\\a.wasm"] {
            assert!(!is_plugin_name(bad), "{bad}");
        }
    }
}
