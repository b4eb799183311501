//! Files that the tools make themselves: never through a link, never half of one under its final name.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;

use crate::error::{Error, Result};

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
