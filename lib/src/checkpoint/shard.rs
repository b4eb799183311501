//! A shard that is being filled and, right behind, hashed.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use memmap2::Mmap;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use rustix::mm::Advice;
use sha2::{Digest, Sha256};
use twox_hash::XxHash3_128;

use super::layout::ShardLayout;
use super::{digest, files};
use crate::error::{Error, Result};

/// Bytes that are read at a time.
const PIECE: usize = 1 << 18;

/// A shard that is being filled and, right behind, hashed.
pub(super) struct OpenShard {
    path: PathBuf,
    file: File,
    map: Mmap,
    /// Ranges that hold their final bytes, merged: start to end.
    written: Mutex<BTreeMap<u64, u64>>,
    hash: Mutex<HashState>,
    /// Whether the system failed to make bytes durable. It says so once, and takes them for written from then on.
    broken: AtomicBool,
}

struct HashState {
    hasher: Sha256,
    at: u64,
}

impl OpenShard {
    /// Opens, or makes, the file of `layout` in `partial`, with its header and its gaps written.
    pub(super) fn open(partial: &Path, layout: &ShardLayout) -> Result<Self> {
        let path = partial.join(&layout.name);
        let file = files::open_own(&path, OpenOptions::new().create(true).truncate(false).read(true).write(true))?;
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
        let hash = HashState { hasher: Sha256::new(), at: 0 };
        let mut shard =
            Self { path, file, map, written: Mutex::default(), hash: Mutex::new(hash), broken: AtomicBool::new(false) };
        shard.forget(layout)?;
        Ok(shard)
    }

    /// Takes nothing for final but the header and the gaps. Nothing was hashed yet.
    pub(super) fn forget(&mut self, layout: &ShardLayout) -> Result<()> {
        self.written = Mutex::new(BTreeMap::from([(0, layout.header.len() as u64)]));
        for &(start, end) in &layout.gaps {
            let zeros = vec![0; (end - start) as usize];
            self.file.write_all_at(&zeros, start).map_err(Error::io("write", &self.path))?;
            self.mark(start, end);
        }
        Ok(())
    }

    /// Writes final bytes.
    pub(super) fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, at).map_err(Error::io("write", &self.path))?;
        // The thread that wrote the pages maps them, for hashing is the slowest link and would stop at each one. The thread
        // that hashes unmaps them, so that the output does not count as this process's memory.
        self.advise(at, bytes.len(), Advice::LinuxPopulateRead);
        self.mark(at, at + bytes.len() as u64);
        Ok(())
    }

    /// Notes that a range holds its final bytes.
    pub(super) fn mark(&self, mut start: u64, mut end: u64) {
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

    /// Whether every byte of a range is final.
    pub(super) fn holds(&self, start: u64, end: u64) -> bool {
        let ranges = self.written.lock().expect("no writer panics while it holds this");
        start == end || ranges.range(..=start).next_back().is_some_and(|(_, &e)| e >= end)
    }

    /// Feeds the bytes of a range to `checksum`. They are read, not mapped: a file that became shorter is an error then.
    pub(super) fn checksum(&self, range: std::ops::Range<u64>, checksum: &mut XxHash3_128) -> Result<()> {
        let mut buffer = vec![0; PIECE.min((range.end - range.start) as usize)];
        let mut at = range.start;
        while at < range.end {
            let piece = buffer.len().min((range.end - at) as usize);
            self.file.read_exact_at(&mut buffer[..piece], at).map_err(Error::io("read", &self.path))?;
            checksum.write(&buffer[..piece]);
            at += piece as u64;
        }
        Ok(())
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
    pub(super) fn advance(&self) {
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

    /// Makes what was written durable. After one failure every later call fails too: the system reports lost bytes once, and
    /// calls them durable the next time.
    pub(super) fn sync(&self) -> Result<()> {
        let synced = if self.broken.load(Ordering::SeqCst) {
            Err(std::io::Error::other("earlier bytes could not be made durable"))
        } else {
            self.file.sync_data()
        };
        synced.map_err(|e| {
            self.broken.store(true, Ordering::SeqCst);
            Error::io("sync", &self.path)(e)
        })
    }

    /// Lets go of what the system has in memory of the file, so that the next look is at the disk: bytes that an earlier
    /// run failed to make durable are in memory still, and pass for written.
    pub(super) fn reread(&self) -> Result<()> {
        self.sync()?;
        // A hint; file systems in memory have nothing else to look at.
        let _ = rustix::fs::fadvise(&self.file, 0, None, rustix::fs::Advice::DontNeed);
        Ok(())
    }

    /// Makes the whole file, of `len` bytes, durable; gives its SHA-256.
    ///
    /// # Errors
    /// [`Error::Fault`] where bytes of it were never written.
    pub(super) fn finish(self, len: u64) -> Result<String> {
        self.advance();
        self.sync()?;
        let state = self.hash.into_inner().expect("no thread panics while it hashes");
        if state.at != len {
            let path = self.path.display();
            return Err(Error::Fault(format!("{path} was never written from byte {} on", state.at)));
        }
        self.file.sync_all().map_err(Error::io("sync", &self.path))?;
        Ok(digest::hex(&state.hasher.finalize()))
    }
}
