//! Files that are read through a map. A map of a file that becomes shorter ends the process with SIGBUS where nobody minds
//! it; here the pages that are gone become zeros, and the file is known to be lost: [`Mapped::unchanged`] and [`intact`] say so,
//! and whoever made something of it throws that away.

use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use memmap2::Mmap;

use super::files::{self, Stamp};
use crate::error::{Error, Result};

/// A file mapped for reading.
pub struct Mapped {
    map: Mmap,
    path: PathBuf,
    stamp: Stamp,
    slot: &'static Slot,
}

/// A range of addresses that the signal handler knows.
struct Slot {
    /// 0 where the slot is free.
    start: AtomicUsize,
    end: AtomicUsize,
    lost: AtomicBool,
}

/// As many maps as there may be at once. The handler must not wait for a lock, so their table does not grow.
const SLOTS: usize = 8192;

static TABLE: [Slot; SLOTS] =
    [const { Slot { start: AtomicUsize::new(0), end: AtomicUsize::new(0), lost: AtomicBool::new(false) } }; SLOTS];

/// Whether pages of any map were lost.
static LOST: AtomicBool = AtomicBool::new(false);

/// Checks that no file which this process has, or had, mapped lost pages: what was read since may be zeros.
pub fn intact() -> Result<()> {
    if LOST.load(Ordering::Relaxed) {
        let reason = "a file became shorter while it was read: start again once nobody writes there";
        return Err(Error::Refused(reason.into()));
    }
    Ok(())
}

impl Slot {
    fn take(map: &Mmap) -> Option<&'static Self> {
        let (start, end) = (map.as_ptr() as usize, map.as_ptr() as usize + map.len());
        let slot = TABLE.iter().find(|s| s.start.compare_exchange(0, 1, Ordering::SeqCst, Ordering::SeqCst).is_ok())?;
        slot.lost.store(false, Ordering::SeqCst);
        slot.end.store(end, Ordering::SeqCst);
        slot.start.store(start, Ordering::SeqCst);
        Some(slot)
    }
}

impl Mapped {
    /// Maps a whole file. An empty file gives an empty map.
    ///
    /// # Errors
    /// Where it is no regular file (a device has no end), is a Git LFS pointer, or cannot be opened.
    pub fn open(path: &Path) -> Result<Self> {
        install();
        let file = files::open(path)?;
        let stamp = Stamp::of(&file.metadata().map_err(Error::io("look at", path))?);
        // SAFETY: the map is only ever read as bytes. Pages that another process cuts off become zeros by the handler
        // below; bytes that it changes are seen by `unchanged`, and nothing here relies on them staying the same.
        let map = unsafe { memmap2::MmapOptions::new().map(&file) }.map_err(Error::io("map", path))?;
        let Some(slot) = Slot::take(&map) else {
            return Err(Error::file(path, format!("is file number {SLOTS} that is open at once: too many shards")));
        };
        let mapped = Self { map, path: path.to_path_buf(), stamp, slot };
        files::refuse_lfs(path, &mapped)?;
        Ok(mapped)
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the file was when it was opened.
    pub fn stamp(&self) -> Stamp {
        self.stamp
    }

    /// Checks that the file is still the one that was opened, and was not written since.
    pub fn unchanged(&self) -> Result<()> {
        if self.slot.lost.load(Ordering::Relaxed) {
            return Err(Error::file(&self.path, "was truncated while it was read"));
        }
        self.stamp.check(&self.path)
    }

    /// Lets the pages go that this process has read. They stay in the system's cache while there is room.
    pub fn release(&self) {
        // SAFETY: the map is read-only and of a file, so dropped pages are read again with the same content.
        // A refusal changes nothing but how much memory this process seems to have.
        let _ = unsafe { self.map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
    }
}

impl std::ops::Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        self.slot.start.store(0, Ordering::SeqCst);
    }
}

/// What SIGBUS did before; set once, before the handler is.
static mut BEFORE: std::mem::MaybeUninit<libc::sigaction> = std::mem::MaybeUninit::uninit();

/// Takes SIGBUS for maps of this module; others get what they had.
fn install() {
    static ONCE: Once = Once::new();
    // SAFETY: `act` is zeroed, which is an empty mask, and then says which handler of the right signature to call.
    // `BEFORE` is written here alone, once.
    ONCE.call_once(|| unsafe {
        let mut act: libc::sigaction = std::mem::zeroed();
        act.sa_sigaction = on_bus_error as *const () as usize;
        act.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGBUS, &act, (&raw mut BEFORE).cast());
    });
}

/// Does nothing but atomics and system calls, as a handler may.
extern "C" fn on_bus_error(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the system gives a valid pointer to a handler with SA_SIGINFO.
    let at = unsafe { (*info).si_addr() } as usize;
    let mine = |s: &&Slot| (2..=at).contains(&s.start.load(Ordering::SeqCst)) && at < s.end.load(Ordering::SeqCst);
    if let Some(slot) = TABLE.iter().find(mine) {
        // SAFETY: errno belongs to the thread, and is put back; the rest of its page, of whatever size pages have, lies in
        // the map that was found, which is read-only: a page of zeros in its place breaks nobody's reference.
        let replaced = unsafe {
            let errno = libc::__errno_location();
            let before = *errno;
            let page = libc::sysconf(libc::_SC_PAGESIZE) as usize;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
            let new = libc::mmap((at / page * page) as *mut libc::c_void, page, libc::PROT_READ, flags, -1, 0);
            *errno = before;
            new != libc::MAP_FAILED
        };
        if replaced {
            slot.lost.store(true, Ordering::SeqCst);
            LOST.store(true, Ordering::SeqCst);
            return;
        }
    }
    // SAFETY: `BEFORE` was set before this handler could run. The access is tried again, and ends as it would have.
    unsafe { libc::sigaction(libc::SIGBUS, (&raw const BEFORE).cast(), std::ptr::null_mut()) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_cut_while_it_is_mapped_is_lost_and_no_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, vec![7u8; 3 << 20]).unwrap();
        let map = Mapped::open(&path).unwrap();
        map.unchanged().unwrap();
        assert_eq!(map[0], 7);
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(100).unwrap();
        assert_eq!(map[2 << 20], 0);
        assert_eq!(map[(3 << 20) - 1], 0);
        assert!(intact().is_err());
        let said = map.unchanged().unwrap_err().to_string();
        assert!(said.contains("was truncated while it was read"), "{said}");
    }

    #[test]
    fn a_file_that_is_written_while_it_is_mapped_is_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "one").unwrap();
        let map = Mapped::open(&path).unwrap();
        let stamp = |secs| {
            std::fs::File::open(&path)
                .unwrap()
                .set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(secs))
        };
        stamp(1).unwrap();
        assert!(map.unchanged().unwrap_err().to_string().contains("was changed while it was read"));
        std::fs::remove_file(&path).unwrap();
        assert!(map.unchanged().is_err());
    }

    #[test]
    fn what_is_no_file_is_refused() {
        for path in ["/dev/zero", "/"] {
            assert!(Mapped::open(Path::new(path)).is_err(), "{path}");
        }
    }
}
