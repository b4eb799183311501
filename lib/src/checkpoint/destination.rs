//! May this folder be written? Everything that can be said before the work.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::files::is_there;
use super::source::is_side_file;
use super::{CONFIG, GGUF, INDEX, JOURNAL, MANIFEST};
use crate::error::{Error, Result};

/// Where an unfinished output for `dst` lies.
pub fn partial_path(dst: &Path) -> PathBuf {
    let mut name = dst.file_name().unwrap_or_default().to_os_string();
    name.push(".partial");
    dst.with_file_name(name)
}

/// The nearest folder at or above `path` that exists.
fn nearest_existing(path: &Path) -> &Path {
    let mut at = path;
    while !at.exists() {
        match at.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => at = parent,
            _ => return Path::new("."),
        }
    }
    at
}

/// `path` without links and `..`, as far as it exists; the rest must be plain names.
fn resolve(path: &Path) -> Result<PathBuf> {
    let full = std::path::absolute(path).map_err(Error::io("resolve", path))?;
    if full.is_symlink() && !full.exists() {
        return Err(Error::Refused(format!("{} is a link to nothing", path.display())));
    }
    let existing = nearest_existing(&full);
    let rest = full.strip_prefix(existing).expect("it was found by going up");
    if rest.components().any(|c| !matches!(c, std::path::Component::Normal(_))) {
        return Err(Error::Refused(format!("{} goes up from a folder that does not exist", path.display())));
    }
    let existing = existing.canonicalize().map_err(Error::io("resolve", existing))?;
    // Joined with nothing it would end in a slash, and a file's name with a slash behind it is no file.
    Ok(if rest.as_os_str().is_empty() { existing } else { existing.join(rest) })
}

/// Refuses a destination that cannot be meant: the source itself, a folder above or below it, a mount point, or a folder
/// with content that `force` does not cover. Writes nothing; gives the path to write, without links.
pub fn check_destination(src: &Path, dst: &Path, force: bool) -> Result<PathBuf> {
    let (source, target) = (resolve(src)?, resolve(dst)?);
    if dst.file_name().is_none() || target.file_name().is_none() {
        return Err(Error::Refused(format!("{} cannot be a destination: it has no name of its own", dst.display())));
    }
    for written in [&target, &partial_path(&target)] {
        if source.starts_with(written) || written.starts_with(&source) || same_folder(&source, written) {
            let (s, d) = (source.display(), written.display());
            return Err(Error::Refused(format!(
                "the destination {d} and the source {s} lie in one another; the source is never written"
            )));
        }
    }
    check_partial(&partial_path(&target))?;
    check_occupant(&target, force)?;
    Ok(target)
}

/// Whether two paths name one folder: with a bind mount they may, without one of them leading through the other.
fn same_folder(a: &Path, b: &Path) -> bool {
    let inode = |p: &Path| std::fs::metadata(p).ok().map(|m| (m.dev(), m.ino()));
    inode(a).is_some_and(|found| inode(b) == Some(found))
}

/// What may stand where unfinished output goes: nothing, or a folder that is there itself.
///
/// # Errors
/// [`Error::Refused`] for a link: what is written there would lie, and be emptied, elsewhere.
pub(super) fn check_partial(partial: &Path) -> Result<()> {
    match std::fs::symlink_metadata(partial) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Error::io("look at", partial)(e)),
        Ok(meta) if meta.is_dir() => Ok(()),
        Ok(meta) => {
            let what = if meta.is_symlink() { "a link" } else { "no folder" };
            let at = partial.display();
            Err(Error::Refused(format!("{at} is {what}: unfinished output goes there; remove it")))
        }
    }
}

/// Refuses a folder for temporary files that lies in the source, or is it.
pub fn check_offload(src: &Path, offload: &Path) -> Result<()> {
    if resolve(offload)?.starts_with(resolve(src)?) {
        let at = offload.display();
        return Err(Error::Refused(format!("--offload-folder {at} lies in the source, which is never written")));
    }
    Ok(())
}

/// What may stand under the final name: nothing, an empty folder, or with `force` a checkpoint and nothing else.
pub(super) fn check_occupant(dst: &Path, force: bool) -> Result<()> {
    let meta = match std::fs::metadata(dst) {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::io("look at", dst)(e)),
    };
    if !meta.is_dir() {
        return Err(Error::Refused(format!("{} exists and is no folder", dst.display())));
    }
    if dst.parent().and_then(|p| p.metadata().ok()).is_some_and(|p| p.dev() != meta.dev()) {
        return Err(Error::Refused(format!(
            "{} is a mount point, which cannot be replaced; give a folder in it",
            dst.display()
        )));
    }
    let inside = contents(dst)?;
    if inside.is_empty() {
        return Ok(());
    }
    if !force {
        return Err(refuse_occupied(dst));
    }
    let there = |name: &str| is_there(&dst.join(name));
    let weights = || Ok::<_, Error>(there(INDEX)? || there("model.safetensors")? || there(GGUF)?);
    if !(there(MANIFEST)? || (there(CONFIG)? && weights()?)) {
        return Err(Error::Refused(format!(
            "{} holds no checkpoint; --force replaces only a checkpoint",
            dst.display()
        )));
    }
    match first_foreign(dst)? {
        Some(other) => Err(Error::Refused(format!(
            "{} is no file of a checkpoint; --force replaces only a checkpoint, so move it away first",
            other.display()
        ))),
        None => Ok(()),
    }
}

/// That something stands at `dst` which nobody said may go.
pub(super) fn refuse_occupied(dst: &Path) -> Error {
    Error::Refused(format!("{} exists and is not empty; --force replaces it", dst.display()))
}

/// What lies in a folder and is no file of a checkpoint.
pub(super) fn first_foreign(dir: &Path) -> Result<Option<PathBuf>> {
    Ok(contents(dir)?.into_iter().find(|p| !is_checkpoint_file(p)))
}

/// True for the files that make a checkpoint, ours or one from the hub.
pub(super) fn is_checkpoint_file(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let known = [CONFIG, INDEX, MANIFEST, JOURNAL, "README.md", ".gitattributes"].contains(&&*name);
    let known = known || name.starts_with(crate::calibrate::STATES_PREFIX);
    path.is_file() && (known || name.ends_with(".safetensors") || name.ends_with(".gguf") || is_side_file(&name))
}

/// Refuses where the output, of `needed` bytes, does not fit.
pub fn check_room(dst: &Path, needed: u64) -> Result<()> {
    // What an unfinished run has taken is ours already.
    let partial = contents(&partial_path(dst)).unwrap_or_default();
    check_free(nearest_existing(dst), needed, partial.iter().map(|p| taken(p)).sum())
}

/// Bytes that a file takes of its disk.
pub fn taken(file: &Path) -> u64 {
    std::fs::metadata(file).map_or(0, |m| m.blocks() * 512)
}

/// Refuses where `needed` bytes do not fit into `dir`, `ours` of which are taken already.
pub fn check_free(dir: &Path, needed: u64, ours: u64) -> Result<()> {
    let stat = rustix::fs::statvfs(dir).map_err(|e| Error::io("ask for the free space of", dir)(e.into()))?;
    let available = stat.f_bavail * stat.f_frsize + ours;
    if needed > available {
        return Err(Error::NoSpace { dir: dir.to_path_buf(), needed, available });
    }
    Ok(())
}

/// Everything in a folder.
pub(super) fn contents(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(dir).map_err(Error::io("list", dir))?;
    entries.map(|e| e.map(|e| e.path()).map_err(Error::io("list", dir))).collect()
}
