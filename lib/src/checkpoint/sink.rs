//! A checkpoint that is written. Everything goes into `<destination>.partial`, headers first, each byte at its planned
//! place; the folder gets its final name in one rename when every file is complete and on the disk. A killed run leaves
//! the partial folder with a journal, from which the same command resumes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rustix::fs::{CWD, FlockOperation, OFlags, RenameFlags};
use rustix::io::Errno;
use serde_json::Value;
use twox_hash::XxHash3_128;

use super::destination::{
    check_occupant, check_partial, check_room, contents, first_foreign, is_checkpoint_file, partial_path,
    refuse_occupied,
};
use super::files::sync_dir;
use super::journal::{Finished, Journal};
use super::layout::{Layout, ShardLayout};
use super::shard::OpenShard;
use super::source::SideFile;
use super::{INDEX, JOURNAL, MANIFEST, digest, files};
use crate::error::{Error, Result};
use crate::manifest::FileRecord;

/// An output that is being written.
pub struct Sink {
    dst: PathBuf,
    partial: PathBuf,
    layout: Layout,
    shards: Vec<OpenShard>,
    journal: Mutex<Journal>,
    /// The partial folder itself, locked; the lock goes with it through the rename.
    lock: File,
    force: bool,
    /// Groups that an earlier run finished, with the results that it noted; their bytes were found to be what it wrote.
    pub resumed: BTreeMap<usize, Value>,
    /// Groups that an earlier run finished and whose bytes are no longer what it wrote. They are made again.
    pub damaged: Vec<usize>,
}

/// In which order the groups of an output are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Any: a group is made from the source alone.
    Any,
    /// One after the other: each group depends on those before it, so none is kept behind a damaged one.
    Ascending,
}

impl Sink {
    /// Opens `<dst>.partial`: a fresh one, or the one that an interrupted run of the job `fingerprint` left. `dst` comes
    /// from [`check_destination`].
    pub fn open(dst: &Path, layout: Layout, fingerprint: &str, force: bool, order: Order) -> Result<Self> {
        check_room(dst, layout.total_bytes())?;
        let partial = partial_path(dst);
        check_partial(&partial)?;
        std::fs::create_dir_all(&partial).map_err(Error::io("create", &partial))?;
        let lock = take_lock(&partial)?;
        refuse_foreign(&partial)?;
        let path = partial.join(JOURNAL);
        if !files::is_there(&path)? {
            clear_leftovers(&partial, &layout, force)?;
        }
        let (journal, done) = match Journal::open(&path, fingerprint)? {
            Some(found) => found,
            None if force => {
                clear(&partial)?;
                Journal::open(&path, fingerprint)?.expect("a new journal is ours")
            }
            None => {
                return Err(Error::Refused(format!(
                    "{} holds an unfinished run with another source, other settings or another version; run that again, remove the folder, or give --force",
                    partial.display()
                )));
            }
        };
        let shards = layout.shards.iter().map(|s| OpenShard::open(&partial, s)).collect::<Result<Vec<_>>>()?;
        sync_dir(&partial)?;
        let mut sink = Self {
            dst: dst.to_path_buf(),
            partial,
            layout,
            shards,
            journal: Mutex::new(journal),
            lock,
            force,
            resumed: BTreeMap::new(),
            damaged: Vec::new(),
        };
        sink.resume(done, order)?;
        Ok(sink)
    }

    /// Takes over of `done` what is still as it was written.
    fn resume(&mut self, done: Vec<Finished>, order: Order) -> Result<()> {
        if !done.is_empty() {
            self.shards.iter().try_for_each(OpenShard::reread)?;
        }
        let mut kept = Vec::new();
        for entry in done {
            if self.checksum(entry.group)? == entry.bytes {
                kept.push(entry);
            } else {
                // Somebody, or a power cut, changed it.
                self.damaged.push(entry.group);
            }
        }
        if !self.damaged.is_empty() {
            if order == Order::Ascending {
                // What the groups behind were made from is gone with it.
                kept.clear();
            }
            self.journal.get_mut().expect("not shared yet").keep(&kept)?;
        }
        for entry in kept {
            for (s, range) in self.ranges(entry.group) {
                self.shards[s].mark(range.start, range.end);
            }
            self.resumed.insert(entry.group, entry.result);
        }
        Ok(())
    }

    /// Forgets what an earlier run finished, durably. Only before anything is written.
    pub fn start_over(&mut self) -> Result<()> {
        self.journal.get_mut().expect("not shared yet").keep(&[])?;
        self.resumed.clear();
        self.shards.iter_mut().zip(&self.layout.shards).try_for_each(|(shard, layout)| shard.forget(layout))
    }

    /// Where the bytes of a group lie: shard and range, in the order of the layout.
    fn ranges(&self, group: usize) -> impl Iterator<Item = (usize, std::ops::Range<u64>)> {
        let tensors = self.layout.tensors.iter().zip(&self.layout.places);
        tensors.filter(move |(t, _)| t.group == group).map(|(t, &(s, at))| (s, at..at + t.spec.byte_len() as u64))
    }

    /// The XXH3 of a group's bytes as they are in the files now.
    fn checksum(&self, group: usize) -> Result<String> {
        let mut checksum = XxHash3_128::default();
        for (s, range) in self.ranges(group) {
            self.shards[s].checksum(range, &mut checksum)?;
        }
        Ok(format!("{:032x}", checksum.finish_128()))
    }

    /// Groups of the layout that no earlier run finished.
    pub fn groups_left(&self) -> impl Iterator<Item = usize> {
        let all: BTreeSet<usize> = self.layout.tensors.iter().map(|t| t.group).collect();
        all.into_iter().filter(|g| !self.resumed.contains_key(g))
    }

    /// The plan of this output.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Where the unfinished output lies.
    pub fn partial(&self) -> &Path {
        &self.partial
    }

    /// Writes `bytes` into tensor number `tensor`, `offset` bytes from its start.
    pub fn write(&self, tensor: usize, offset: usize, bytes: &[u8]) -> Result<()> {
        let (s, at) = self.layout.places[tensor];
        debug_assert!(offset + bytes.len() <= self.layout.tensors[tensor].spec.byte_len());
        self.shards[s].write(at + offset as u64, bytes)
    }

    /// Hashes what has become complete; workers call it between two units.
    pub fn advance(&self) {
        for shard in &self.shards {
            shard.advance();
        }
    }

    /// Starts and awaits write-back of what is written so far, so that the last sync has little left to do.
    pub fn flush(&self) -> Result<()> {
        self.shards.iter().try_for_each(OpenShard::sync)
    }

    /// Every byte of `group` is written: makes that durable and notes it with `result`.
    ///
    /// # Errors
    /// [`Error::Fault`] where a byte of it was not written: a run that resumes would take zeros for the group.
    pub fn finish_group(&self, group: usize, result: Value) -> Result<()> {
        if let Some((s, range)) = self.ranges(group).find(|(s, r)| !self.shards[*s].holds(r.start, r.end)) {
            let name = &self.layout.shards[s].name;
            return Err(Error::Fault(format!("group {group} ends before bytes {range:?} of {name} are written")));
        }
        let bytes = self.checksum(group)?;
        let touched: BTreeSet<usize> = self.ranges(group).map(|(s, _)| s).collect();
        touched.into_iter().try_for_each(|s| self.shards[s].sync())?;
        let mut journal = self.journal.lock().expect("no thread panics while it writes a line");
        journal.finished(&Finished { group, bytes, result })
    }

    /// Hashes the rest, writes the small files (`index`, then `files`), and gives the folder its final name. `manifest` is
    /// called with the records of every file and returns the manifest's text.
    pub fn finish(
        self,
        files: Vec<SideFile>,
        manifest: impl FnOnce(&[FileRecord]) -> Result<String>,
    ) -> Result<Vec<FileRecord>> {
        let mut records = Vec::new();
        for (shard, layout) in self.shards.into_iter().zip(&self.layout.shards) {
            let sha256 = shard.finish(layout.len)?;
            records.push(FileRecord { name: layout.name.clone(), bytes: layout.len, sha256 });
        }
        let index = self.layout.index().map(|index| to_text(&index).into_bytes());
        let index = index.map(|bytes| SideFile { name: INDEX.to_owned(), bytes, mode: None });
        for SideFile { name, bytes, mode } in index.into_iter().chain(files) {
            let path = self.partial.join(&name);
            files::write(&path, &bytes)?;
            if let Some(mode) = mode {
                let set = std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode));
                set.map_err(Error::io("set the permissions of", &path))?;
            }
            records.push(FileRecord { bytes: bytes.len() as u64, sha256: digest::sha256(&bytes), name });
        }
        records.sort_by(|a, b| a.name.cmp(&b.name));
        files::write(&self.partial.join(MANIFEST), manifest(&records)?.as_bytes())?;
        // The destination was free when the run began; it may not be now, and the journal is still there to resume from.
        check_occupant(&self.dst, self.force)?;
        let journal = self.partial.join(JOURNAL);
        let noted = files::read(&journal)?;
        std::fs::remove_file(&journal).map_err(Error::io("remove", &journal))?;
        if let Err(error) = put_in_place(&self.partial, &self.dst, self.force) {
            // Without its journal an output that is still here would be nobody's, and the next run would make all of it again.
            if is_at(&self.lock, &self.partial) {
                let _ = files::write(&journal, &noted).and_then(|()| sync_dir(&self.partial));
            }
            return Err(error);
        }
        drop(self.lock);
        Ok(records)
    }

    /// Removes the unfinished output: the files that it made, and the folder if that leaves it empty.
    pub fn discard(self) -> Result<()> {
        let planned = self.layout.shards.iter().map(|s| s.name.as_str());
        for name in planned.chain([JOURNAL]) {
            let path = self.partial.join(name);
            std::fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        }
        let _ = std::fs::remove_dir(&self.partial);
        Ok(())
    }
}

/// JSON for a file that people read: indented, with a newline at its end.
pub fn to_text(value: &impl serde::Serialize) -> String {
    let mut text = serde_json::to_string_pretty(value).expect("plain data serializes");
    text.push('\n');
    text
}

/// Whether an open folder is the one at `path` now.
fn is_at(folder: &File, path: &Path) -> bool {
    let inode = |m: std::io::Result<std::fs::Metadata>| m.ok().map(|m| (m.dev(), m.ino()));
    inode(folder.metadata()) == inode(std::fs::metadata(path))
}

/// Locks the folder for this process. A run that was just killed may still be in the kernel, so it waits a moment.
fn take_lock(partial: &Path) -> Result<File> {
    let busy = || Error::Refused(format!("another run is writing {}", partial.display()));
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = rustix::fs::open(partial, flags, rustix::fs::Mode::empty());
    let lock = File::from(opened.map_err(|e| Error::io("open", partial)(e.into()))?);
    for wait in [0, 50, 200, 500] {
        std::thread::sleep(std::time::Duration::from_millis(wait));
        if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
            // Another run may have renamed the folder away between opening and locking.
            return if is_at(&lock, partial) { Ok(lock) } else { Err(busy()) };
        }
    }
    Err(busy())
}

/// A partial folder with something in it that no run of this tool puts there is somebody's own. An unfinished output has no
/// links in it; a finished one that an exchange left there may have.
fn refuse_foreign(partial: &Path) -> Result<()> {
    let unfinished = files::is_there(&partial.join(JOURNAL))?;
    let foreign = |p: &&PathBuf| !is_checkpoint_file(p) || (unfinished && p.is_symlink());
    match contents(partial)?.iter().find(foreign) {
        Some(foreign) => Err(Error::Refused(format!(
            "{} is in the way: unfinished output goes to {}; move it away",
            foreign.display(),
            partial.display()
        ))),
        None => Ok(()),
    }
}

/// True where a finished shard is one that this layout makes: its length and its header.
fn is_intact(partial: &Path, layout: &ShardLayout) -> bool {
    let mut header = vec![0; layout.header.len()];
    let read = File::open(partial.join(&layout.name)).and_then(|f| {
        f.read_exact_at(&mut header, 0)?;
        f.metadata()
    });
    read.is_ok_and(|m| m.len() == layout.len && header == layout.header)
}

/// A partial folder without a journal was left in the last moments of a run: just before its rename, when it is this very
/// output, or just after an exchange under `force`, with the old checkpoint in it. Any other checkpoint is somebody's.
fn clear_leftovers(partial: &Path, layout: &Layout, force: bool) -> Result<()> {
    let this_output = files::is_there(&partial.join(MANIFEST))? && layout.shards.iter().all(|s| is_intact(partial, s));
    if force || contents(partial)?.is_empty() || this_output {
        return clear(partial);
    }
    Err(Error::Refused(format!(
        "{} holds a checkpoint that is not this run's unfinished output; move it away, or give --force to replace it",
        partial.display()
    )))
}

/// Empties a partial folder that [`refuse_foreign`] has looked at.
fn clear(partial: &Path) -> Result<()> {
    contents(partial)?.iter().try_for_each(|path| std::fs::remove_file(path).map_err(Error::io("remove", path)))
}

/// Removes an old checkpoint whose files [`check_occupant`] has looked at.
fn remove_checkpoint(dir: &Path) -> Result<()> {
    clear(dir)?;
    std::fs::remove_dir(dir).map_err(Error::io("remove", dir))
}

/// Replaces `dst` where two folders cannot be exchanged: for a moment nothing has that name, and if the machine stops
/// then, the old checkpoint lies under `<dst>.replaced`.
fn replace_in_steps(partial: &Path, dst: &Path) -> Result<()> {
    let mut name = dst.file_name().unwrap_or_default().to_os_string();
    name.push(".replaced");
    let aside = dst.with_file_name(name);
    if files::is_there(&aside)? {
        return Err(Error::Refused(format!(
            "{} is in the way: the checkpoint at {} is moved there while the new one takes its place; look at it, and move it away",
            aside.display(),
            dst.display()
        )));
    }
    std::fs::rename(dst, &aside).map_err(Error::io("move aside", dst))?;
    if let Err(e) = std::fs::rename(partial, dst) {
        // The old one is still whole: it gets its name back.
        std::fs::rename(&aside, dst).map_err(Error::io("move back", &aside))?;
        return Err(Error::io("rename the finished output to", dst)(e));
    }
    sync_dir(parent(dst))?;
    if let Some(foreign) = first_foreign(&aside)? {
        return Err(Error::Refused(format!(
            "{} came while the checkpoint was replaced: the new one is in place, and the old one stays with it in {}",
            foreign.display(),
            aside.display()
        )));
    }
    remove_checkpoint(&aside)
}

/// The folder that a path without links lies in.
fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}

/// The one moment at which the output appears. Under `force` an old checkpoint of that name is exchanged in the same step;
/// without it the system itself refuses a folder that is not empty, however late its content came.
fn put_in_place(partial: &Path, dst: &Path, force: bool) -> Result<()> {
    sync_dir(partial)?;
    // The two errors that a system may give for a folder that is not empty (POSIX, rename).
    let occupied = |e: &std::io::Error| matches!(e.kind(), ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists);
    match std::fs::rename(partial, dst) {
        Ok(()) => return sync_dir(parent(dst)),
        Err(e) if occupied(&e) && force => {}
        Err(e) if occupied(&e) => return Err(refuse_occupied(dst)),
        Err(e) => return Err(Error::io("rename the finished output to", dst)(e)),
    }
    let exchange = || rustix::fs::renameat_with(CWD, partial, CWD, dst, RenameFlags::EXCHANGE);
    match exchange() {
        Ok(()) => {
            // What lies there now was looked at before; it may have got more since.
            if let Some(foreign) = first_foreign(partial)? {
                exchange().map_err(|e| Error::io("put back", dst)(e.into()))?;
                let name = foreign.file_name().unwrap_or_default().to_string_lossy();
                return Err(Error::Refused(format!(
                    "{name} came into {} meanwhile, and is no file of a checkpoint; move it away, and the same command resumes",
                    dst.display()
                )));
            }
            // Before the old files go: a power cut could undo the exchange, and the old checkpoint would be half of one.
            sync_dir(parent(dst))?;
            remove_checkpoint(partial)?;
        }
        // Network file systems have no exchange.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => replace_in_steps(partial, dst)?,
        Err(e) => return Err(Error::io("replace", dst)(e.into())),
    }
    sync_dir(parent(dst))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::CONFIG;
    use crate::checkpoint::header::TensorSpec;
    use crate::checkpoint::layout::Planned;
    use safetensors::Dtype;

    fn planned(name: &str, dtype: Dtype, n: usize, group: usize) -> Planned {
        Planned { spec: TensorSpec::new(name, dtype, [n]), group }
    }

    fn small() -> SideFile {
        SideFile { name: CONFIG.into(), bytes: b"{}".to_vec(), mode: Some(0o640) }
    }

    fn layout() -> Layout {
        let list = vec![
            planned("a", Dtype::U8, 3, 0),
            planned("b", Dtype::BF16, 5, 0),
            planned("c", Dtype::I64, 2, 1),
            planned("d", Dtype::BF16, 40, 1),
        ];
        Layout::new(list, 50)
    }

    #[test]
    fn shards_respect_the_size_and_align_every_tensor() {
        let l = layout();
        assert_eq!(l.shard_count(), 2);
        for (t, &(_, at)) in l.tensors.iter().zip(&l.places) {
            assert_eq!(at as usize % (t.spec.dtype.bitsize() / 8), 0, "{}", t.spec.name);
        }
    }

    #[test]
    fn without_an_exchange_the_old_checkpoint_is_replaced_or_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (new, dst) = (dir.path().join("new"), dir.path().join("dst"));
        for (d, text) in [(&new, "new"), (&dst, "old")] {
            std::fs::create_dir(d).unwrap();
            std::fs::write(d.join(CONFIG), text).unwrap();
        }
        assert!(replace_in_steps(&dir.path().join("nowhere"), &dst).is_err());
        assert_eq!(std::fs::read_to_string(dst.join(CONFIG)).unwrap(), "old");
        replace_in_steps(&new, &dst).unwrap();
        assert_eq!(std::fs::read_to_string(dst.join(CONFIG)).unwrap(), "new");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_resumed_output_is_the_same_as_one_in_a_single_run() {
        let dir = tempfile::tempdir().unwrap();
        let fill = |sink: &Sink, group: usize| {
            for (i, t) in sink.layout().tensors.iter().enumerate().filter(|(_, t)| t.group == group) {
                let bytes: Vec<u8> = (0..t.spec.byte_len()).map(|b| (b * 7 + i) as u8).collect();
                // Backwards and in pieces: the hash must not depend on the order.
                let half = bytes.len() / 2;
                sink.write(i, half, &bytes[half..]).unwrap();
                sink.advance();
                sink.write(i, 0, &bytes[..half]).unwrap();
            }
            sink.finish_group(group, Value::from(group)).unwrap();
        };
        let one = dir.path().join("one");
        let sink = Sink::open(&one, layout(), "f", false, Order::Any).unwrap();
        fill(&sink, 1);
        fill(&sink, 0);
        let first = sink.finish(vec![small()], |_| Ok(String::new())).unwrap();

        let two = dir.path().join("two");
        let sink = Sink::open(&two, layout(), "f", false, Order::Any).unwrap();
        fill(&sink, 0);
        assert!(Sink::open(&two, layout(), "f", false, Order::Any).is_err(), "a second writer is refused");
        drop(sink);
        assert!(!two.exists());
        assert!(Sink::open(&two, layout(), "other", false, Order::Any).is_err(), "another job does not resume");
        let sink = Sink::open(&two, layout(), "f", false, Order::Any).unwrap();
        assert_eq!(sink.resumed.keys().collect::<Vec<_>>(), [&0]);
        fill(&sink, 1);
        let second = sink.finish(vec![small()], |_| Ok(String::new())).unwrap();
        assert_eq!(first, second);
        for f in &second {
            assert_eq!(digest::record(&two, &f.name).unwrap(), *f, "the hash made on the way is the file's");
        }
        assert!(!partial_path(&two).exists());
    }
}
