//! Files that are read: regular ones, and the same from the first look to the last. Files that the tools make themselves:
//! never through a link, never half of one under its final name.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;

use crate::error::{Error, Result};

/// Opens a file that is to be read, where it is a regular file: a device has no end, and a named pipe may never begin.
pub fn open(path: &Path) -> Result<File> {
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).expect("the system's flags are ints");
    let opened = OpenOptions::new().read(true).custom_flags(flags).open(path);
    let file = opened.map_err(Error::io("open", path))?;
    let meta = file.metadata().map_err(Error::io("look at", path))?;
    if !meta.is_file() {
        let what = if meta.is_dir() { "a folder" } else { "a device or pipe" };
        return Err(Error::file(path, format!("is {what}, wanted a file")));
    }
    Ok(file)
}

/// Largest file that is read as a whole. A tokenizer of 262,000 words has 33 MB.
pub const LARGEST: u64 = 256 << 20;

/// Refuses a file of this length that would be read as a whole.
pub fn refuse_large(path: &Path, len: u64) -> Result<()> {
    if len > LARGEST {
        let most = LARGEST >> 20;
        return Err(Error::file(
            path,
            format!("has {len} bytes; a file of its name has at most {most} MiB: move it away"),
        ));
    }
    Ok(())
}

/// Reads a whole file that is no pointer to one, and no larger than [`LARGEST`].
pub fn read(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?.take(LARGEST + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    refuse_large(path, bytes.len() as u64)?;
    refuse_lfs(path, &bytes)?;
    Ok(bytes)
}

/// Reads a whole file of text, where it is there.
pub fn read_text_if_there(path: &Path) -> Result<Option<String>> {
    if !is_there(path)? {
        return Ok(None);
    }
    let text = String::from_utf8(read(path)?);
    text.map(Some).map_err(|_| Error::file(path, "is no UTF-8 text"))
}

/// Refuses what `git clone` leaves in the place of a large file where Git LFS is not installed.
pub fn refuse_lfs(path: &Path, bytes: &[u8]) -> Result<()> {
    if bytes.len() < 1024 && bytes.starts_with(b"version https://git-lfs.github.com/spec/") {
        return Err(Error::file(
            path,
            "is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder, or download it with `hf download`",
        ));
    }
    Ok(())
}

/// Whether there is something at `path`. Only its absence is no error: a link to nothing, or a folder that may not be
/// searched, is one.
pub fn is_there(path: &Path) -> Result<bool> {
    match std::fs::metadata(path) {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && !path.is_symlink() => Ok(false),
        Err(e) if path.is_symlink() => Err(Error::io("follow the link", path)(e)),
        Err(e) => Err(Error::io("look at", path)(e)),
    }
}

/// What tells whether a file was written or replaced: device, inode, length, and when the system says it was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp([u64; 3], [i64; 2]);

impl Stamp {
    /// Of a file with this metadata.
    pub fn of(meta: &std::fs::Metadata) -> Self {
        Self([meta.dev(), meta.ino(), meta.len()], [meta.mtime(), meta.mtime_nsec()])
    }

    /// Length, and seconds and nanoseconds of the last change: what a copy under another name or on another disk keeps.
    pub fn dated(&self) -> (u64, i64, i64) {
        (self.0[2], self.1[0], self.1[1])
    }

    /// Of the file at `path`.
    pub fn at(path: &Path) -> Result<Self> {
        Ok(Self::of(&std::fs::metadata(path).map_err(Error::io("look at", path))?))
    }

    /// Checks that `path` is still the file that this was taken of.
    pub fn check(&self, path: &Path) -> Result<()> {
        let changed =
            |how: &str| Error::file(path, format!("{how} while it was read: start again once nobody writes there"));
        match std::fs::metadata(path) {
            Ok(meta) if Self::of(&meta) == *self => Ok(()),
            Ok(_) => Err(changed("was changed")),
            Err(_) => Err(changed("went away")),
        }
    }
}

impl std::fmt::Display for Stamp {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let ([device, inode, len], [seconds, nanos]) = (self.0, self.1);
        write!(f, "{device} {inode} {len} {seconds} {nanos}")
    }
}

/// Opens a file that is to be written, as `options` say, where it is a file of its own: a link would lead to somebody else's,
/// and so would a second name of the same file.
pub fn open_own(path: &Path, options: &mut OpenOptions) -> Result<File> {
    // Without NONBLOCK a named pipe would be waited for.
    let flags = i32::try_from((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits()).expect("the system's flags are ints");
    let file = match options.custom_flags(flags).open(path) {
        Err(_) if path.is_symlink() => {
            return Err(Error::Refused(format!("{} is a link; it is not written through", path.display())));
        }
        opened => opened.map_err(Error::io("open", path))?,
    };
    let meta = file.metadata().map_err(Error::io("look at", path))?;
    if !meta.is_file() {
        return Err(Error::Refused(format!("{} is in the way: it is no file", path.display())));
    }
    if meta.nlink() > 1 {
        return Err(Error::Refused(format!(
            "{} has {} names (hard links): what is written there would change the others; remove it",
            path.display(),
            meta.nlink()
        )));
    }
    Ok(file)
}

/// Writes a whole file, durably. It must be one of a folder that nobody reads yet.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = open_own(path, OpenOptions::new().create(true).write(true))?;
    file.set_len(0).and_then(|()| file.write_all(bytes)).map_err(Error::io("write", path))?;
    file.sync_all().map_err(Error::io("sync", path))
}

/// Gives `path` new content in one step: readers, and a power cut, find the old file or the new one.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".partial");
    let new = Path::new(&name);
    write(new, bytes)?;
    std::fs::rename(new, path).map_err(Error::io("rename a new file to", path))?;
    sync_dir(path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")))
}

/// Makes the names in a folder durable.
pub fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|f| f.sync_all()).map_err(Error::io("sync", dir))
}

/// Makes a file that outgrows a limit (`ulimit -f`) an error of the write, as a full disk is one; by default the system kills the program.
pub fn limits_are_errors() {
    // SAFETY: a signal is ignored, which no other code here relies on.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_not_written_through() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("mine"), "mine").unwrap();
        std::os::unix::fs::symlink(at("mine"), at("soft")).unwrap();
        std::fs::hard_link(at("mine"), at("hard")).unwrap();
        std::os::unix::fs::symlink(at("nothing"), at("dangling")).unwrap();
        for name in ["soft", "hard", "dangling"] {
            assert!(write(&at(name), b"x").is_err(), "{name}");
        }
        assert_eq!(std::fs::read_to_string(at("mine")).unwrap(), "mine");
        assert!(!at("nothing").exists());
        // A replacement takes the link's place; what it led to stays.
        replace(&at("soft"), b"new").unwrap();
        assert_eq!(std::fs::read_to_string(at("mine")).unwrap(), "mine");
        assert_eq!(std::fs::read_to_string(at("soft")).unwrap(), "new");
    }
}
