//! A checkpoint that is written. Everything goes into `<destination>.partial`, headers first, each byte at its planned
//! place; the folder gets its final name in one rename when every file is complete and on the disk. A killed run leaves
//! the partial folder with a journal, from which the same command resumes.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use memmap2::Mmap;
use rustix::fs::{CWD, FallocateFlags, FlockOperation, RenameFlags};
use rustix::io::Errno;
use rustix::mm::Advice;
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::destination::{check_occupant, check_room, contents, is_checkpoint_file, partial_path};
use super::journal::Journal;
use super::layout::{Layout, ShardLayout};
use super::{INDEX, JOURNAL, MANIFEST, digest};
use crate::error::{Error, Result};
use crate::manifest::FileRecord;

/// A shard that is being filled and, right behind, hashed.
struct OpenShard {
    path: PathBuf,
    file: File,
    map: Mmap,
    /// Ranges that hold their final bytes, merged: start to end.
    written: Mutex<BTreeMap<u64, u64>>,
    hash: Mutex<HashState>,
}

struct HashState {
    hasher: Sha256,
    at: u64,
}

impl OpenShard {
    /// Notes that a range holds its final bytes.
    fn mark(&self, mut start: u64, mut end: u64) {
        let mut ranges = self.written.lock().expect("no writer panics while it holds this");
        if let Some((&s, &e)) = ranges.range(..=start).next_back()
            && e >= start
        {
            ranges.remove(&s);
            (start, end) = (s, end.max(e));
        }
        if let Some(e) = ranges.remove(&end) {
            end = e;
        }
        ranges.insert(start, end);
    }

    /// Tells the system about the map's pages in a range. Only a hint: older kernels do not know all of them.
    fn advise(&self, at: u64, len: usize, advice: Advice) {
        const PAGE: usize = 4096;
        let start = at as usize / PAGE * PAGE;
        let end = (at as usize + len).min(self.map.len());
        // SAFETY: the range lies inside the map of a shared file: pages that go out of the map come back from the file.
        let _ = unsafe {
            let from = self.map.as_ptr().add(start).cast_mut().cast();
            rustix::mm::madvise(from, end - start, advice)
        };
    }

    /// Hashes what has become contiguous. One thread at a time; the others go on with their own work.
    fn advance(&self) {
        let Ok(mut state) = self.hash.try_lock() else { return };
        loop {
            let ready = self.prefix();
            if ready == state.at {
                return;
            }
            let bytes = &self.map[state.at as usize..ready as usize];
            state.hasher.update(bytes);
            self.advise(state.at, bytes.len(), Advice::LinuxDontNeed);
            state.at = ready;
        }
    }

    fn prefix(&self) -> u64 {
        self.written.lock().expect("no writer panics while it holds this").get(&0).copied().unwrap_or(0)
    }
}

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
    /// Groups that an earlier run finished, with the results that it noted.
    pub resumed: BTreeMap<usize, Value>,
}

impl Sink {
    /// Opens `<dst>.partial`: a fresh one, or the one that an interrupted run of the job `fingerprint` left. `dst` comes
    /// from [`check_destination`].
    pub fn open(dst: &Path, layout: Layout, fingerprint: &str, force: bool) -> Result<Self> {
        check_room(dst, layout.total_bytes())?;
        let partial = partial_path(dst);
        std::fs::create_dir_all(&partial).map_err(Error::io("create", &partial))?;
        let lock = take_lock(&partial)?;
        refuse_foreign(&partial)?;
        let path = partial.join(JOURNAL);
        if !path.exists() {
            clear_leftovers(&partial, &layout, force)?;
        }
        let (mut journal, mut done) = match Journal::open(&path, fingerprint)? {
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
        if !done.is_empty() && !layout.shards.iter().all(|s| is_intact(&partial, s)) {
            // Somebody, or a power cut, took a shard away: what the journal says of it is no longer so.
            journal.restart(fingerprint)?;
            done.clear();
        }
        let shards = layout.shards.iter().map(|s| open_shard(&partial, s)).collect::<Result<Vec<_>>>()?;
        sync_dir(&partial)?;
        let resumed: BTreeMap<usize, Value> = done.into_iter().collect();
        let sink = Self {
            dst: dst.to_path_buf(),
            partial,
            layout,
            shards,
            journal: Mutex::new(journal),
            lock,
            force,
            resumed,
        };
        for (i, t) in sink.layout.tensors.iter().enumerate() {
            if sink.resumed.contains_key(&t.group) {
                let (s, at) = sink.layout.places[i];
                sink.shards[s].mark(at, at + t.spec.byte_len() as u64);
            }
        }
        Ok(sink)
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
        let shard = &self.shards[s];
        let at = at + offset as u64;
        shard.file.write_all_at(bytes, at).map_err(Error::io("write", &shard.path))?;
        // Mapped by the thread that wrote them, so that the one that hashes, the slowest link, does not stop at each
        // page; it lets them go behind itself, so that the output does not count as this process's memory.
        shard.advise(at, bytes.len(), Advice::LinuxPopulateRead);
        shard.mark(at, at + bytes.len() as u64);
        Ok(())
    }

    /// Hashes what has become complete; workers call it between two units.
    pub fn advance(&self) {
        for shard in &self.shards {
            shard.advance();
        }
    }

    /// Starts and awaits write-back of what is written so far, so that the last sync has little left to do.
    pub fn flush(&self) -> Result<()> {
        self.shards.iter().try_for_each(|s| s.file.sync_data().map_err(Error::io("sync", &s.path)))
    }

    /// Every byte of `group` is written: makes that durable and notes it with `result`.
    pub fn finish_group(&self, group: usize, result: Value) -> Result<()> {
        let mut touched: Vec<usize> = self
            .layout
            .tensors
            .iter()
            .zip(&self.layout.places)
            .filter(|(t, _)| t.group == group)
            .map(|(_, &(s, _))| s)
            .collect();
        touched.sort_unstable();
        touched.dedup();
        for s in touched {
            let shard = &self.shards[s];
            shard.file.sync_data().map_err(Error::io("sync", &shard.path))?;
        }
        self.journal.lock().expect("no thread panics while it writes a line").finished(group, result)
    }

    /// Hashes the rest, writes the small files (`index`, then `files`), and gives the folder its final name. `manifest` is
    /// called with the records of every file and returns the manifest's text.
    pub fn finish(
        self,
        files: Vec<(String, Vec<u8>)>,
        manifest: impl FnOnce(&[FileRecord]) -> Result<String>,
    ) -> Result<Vec<FileRecord>> {
        self.advance();
        let mut records = Vec::new();
        for (shard, layout) in self.shards.into_iter().zip(&self.layout.shards) {
            let state = shard.hash.into_inner().expect("no thread panics while it hashes");
            assert_eq!(state.at, layout.len, "every byte of a finished shard was written");
            shard.file.sync_all().map_err(Error::io("sync", &shard.path))?;
            records.push(FileRecord {
                name: layout.name.clone(),
                bytes: layout.len,
                sha256: digest::hex(&state.hasher.finalize()),
            });
        }
        let index = self.layout.index().map(|index| (INDEX.to_owned(), to_text(&index).into_bytes()));
        for (name, text) in index.into_iter().chain(files) {
            write_file(&self.partial.join(&name), &text)?;
            records.push(FileRecord { bytes: text.len() as u64, sha256: digest::sha256(&text), name });
        }
        records.sort_by(|a, b| a.name.cmp(&b.name));
        write_file(&self.partial.join(MANIFEST), manifest(&records)?.as_bytes())?;
        // The destination was free when the run began; it may not be now, and the journal is still there to resume from.
        check_occupant(&self.dst, self.force)?;
        let journal = self.partial.join(JOURNAL);
        std::fs::remove_file(&journal).map_err(Error::io("remove", &journal))?;
        put_in_place(&self.partial, &self.dst)?;
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

/// Locks the folder for this process. A run that was just killed may still be in the kernel, so it waits a moment.
fn take_lock(partial: &Path) -> Result<File> {
    let busy = || Error::Refused(format!("another run is writing {}", partial.display()));
    let lock = File::open(partial).map_err(Error::io("open", partial))?;
    for wait in [0, 50, 200, 500] {
        std::thread::sleep(std::time::Duration::from_millis(wait));
        if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
            // Another run may have renamed the folder away between opening and locking.
            let inode = |m: std::io::Result<std::fs::Metadata>| m.ok().map(|m| (m.dev(), m.ino()));
            let same = inode(lock.metadata()) == inode(std::fs::metadata(partial));
            return if same { Ok(lock) } else { Err(busy()) };
        }
    }
    Err(busy())
}

/// A partial folder with something in it that no run of this tool puts there is somebody's own.
fn refuse_foreign(partial: &Path) -> Result<()> {
    match contents(partial)?.iter().find(|p| !is_checkpoint_file(p)) {
        Some(foreign) => Err(Error::Refused(format!(
            "{} is in the way: unfinished output goes to {}; move it away",
            foreign.display(),
            partial.display()
        ))),
        None => Ok(()),
    }
}

/// A partial folder without a journal was left in the last moments of a run: just before its rename, when it is this very
/// output, or just after an exchange under `force`, with the old checkpoint in it. Any other checkpoint is somebody's.
fn clear_leftovers(partial: &Path, layout: &Layout, force: bool) -> Result<()> {
    let this_output = || partial.join(MANIFEST).exists() && layout.shards.iter().all(|s| is_intact(partial, s));
    if force || contents(partial)?.is_empty() || this_output() {
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

/// True where an earlier run's shard is still as that run made it: its length and its header.
fn is_intact(partial: &Path, layout: &ShardLayout) -> bool {
    let mut header = vec![0; layout.header.len()];
    let read = File::open(partial.join(&layout.name)).and_then(|f| {
        f.read_exact_at(&mut header, 0)?;
        f.metadata()
    });
    read.is_ok_and(|m| m.len() == layout.len && header == layout.header)
}

fn open_shard(partial: &Path, layout: &ShardLayout) -> Result<OpenShard> {
    let path = partial.join(&layout.name);
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)
        .map_err(Error::io("create", &path))?;
    // Reserving the blocks now turns a full disk into an error before any work is done.
    match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, layout.len) {
        Ok(()) => {}
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
            file.set_len(layout.len).map_err(Error::io("size", &path))?;
        }
        Err(e) => return Err(Error::io("reserve room for", &path)(e.into())),
    }
    file.set_len(layout.len).map_err(Error::io("size", &path))?;
    file.write_all_at(&layout.header, 0).map_err(Error::io("write", &path))?;
    // SAFETY: the folder is locked, so nobody else truncates the file; it is read only where it was written before.
    let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", &path))?;
    let written = BTreeMap::from([(0, layout.header.len() as u64)]);
    let hash = HashState { hasher: Sha256::new(), at: 0 };
    let shard = OpenShard { path, file, map, written: Mutex::new(written), hash: Mutex::new(hash) };
    for &(start, end) in &layout.gaps {
        let zeros = vec![0; (end - start) as usize];
        shard.file.write_all_at(&zeros, start).map_err(Error::io("write", &shard.path))?;
        shard.mark(start, end);
    }
    Ok(shard)
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    std::fs::write(path, bytes).map_err(Error::io("write", path))?;
    File::open(path).and_then(|f| f.sync_all()).map_err(Error::io("sync", path))
}

fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|f| f.sync_all()).map_err(Error::io("sync", dir))
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
    std::fs::rename(dst, &aside).map_err(Error::io("move aside", dst))?;
    if let Err(e) = std::fs::rename(partial, dst) {
        // The old one is still whole: it gets its name back.
        std::fs::rename(&aside, dst).map_err(Error::io("move back", &aside))?;
        return Err(Error::io("rename the finished output to", dst)(e));
    }
    remove_checkpoint(&aside)
}

/// The one moment at which the output appears. An old checkpoint under that name is exchanged in the same step.
fn put_in_place(partial: &Path, dst: &Path) -> Result<()> {
    sync_dir(partial)?;
    let occupied = std::fs::read_dir(dst).is_ok_and(|mut d| d.next().is_some());
    if occupied {
        match rustix::fs::renameat_with(CWD, partial, CWD, dst, RenameFlags::EXCHANGE) {
            Ok(()) => remove_checkpoint(partial)?,
            // Network file systems have no exchange.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => replace_in_steps(partial, dst)?,
            Err(e) => return Err(Error::io("replace", dst)(e.into())),
        }
    } else {
        std::fs::rename(partial, dst).map_err(Error::io("rename the finished output to", dst))?;
    }
    sync_dir(dst.parent().unwrap_or(Path::new("/")))
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
        let sink = Sink::open(&one, layout(), "f", false).unwrap();
        fill(&sink, 1);
        fill(&sink, 0);
        let first = sink.finish(vec![("config.json".into(), b"{}".to_vec())], |_| Ok(String::new())).unwrap();

        let two = dir.path().join("two");
        let sink = Sink::open(&two, layout(), "f", false).unwrap();
        fill(&sink, 0);
        assert!(Sink::open(&two, layout(), "f", false).is_err(), "a second writer is refused");
        drop(sink);
        assert!(!two.exists());
        assert!(Sink::open(&two, layout(), "other", false).is_err(), "another job does not resume");
        let sink = Sink::open(&two, layout(), "f", false).unwrap();
        assert_eq!(sink.resumed.keys().collect::<Vec<_>>(), [&0]);
        fill(&sink, 1);
        let second = sink.finish(vec![("config.json".into(), b"{}".to_vec())], |_| Ok(String::new())).unwrap();
        assert_eq!(first, second);
        for f in &second {
            assert_eq!(digest::record(&two, &f.name).unwrap(), *f, "the hash made on the way is the file's");
        }
        assert!(!partial_path(&two).exists());
    }
}
