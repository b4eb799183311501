//! Faults of the system, put under a tool from outside: a process is stopped at its system calls by seccomp and ptrace, below
//! std and rustix alike, and killed there, or the call fails. What it had written and not yet made durable can be taken back
//! afterwards, as a power cut would.
//!
//! x86-64 alone, like the seccomp filter. A crash point is the moment before a call that changes a file of the watched folder,
//! so the points are all states that the folder goes through.
#![allow(dead_code, reason = "each test file uses its part")]

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Which system calls are watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Watched {
    /// Those that change a file.
    Changes,
    /// Those that look at one: at its bytes, its size or its names.
    Looks,
}

impl Watched {
    /// Names and numbers.
    fn calls(self) -> &'static [(&'static str, i64)] {
        match self {
            Self::Changes => &CHANGES,
            Self::Looks => &LOOKS,
        }
    }
}

/// Opened to be looked at: without `O_CREAT`.
const LOOKS: [(&str, i64); 16] = [
    ("openat", libc::SYS_openat),
    ("open", libc::SYS_open),
    ("read", libc::SYS_read),
    ("pread64", libc::SYS_pread64),
    ("readv", libc::SYS_readv),
    ("preadv", libc::SYS_preadv),
    ("mmap", libc::SYS_mmap),
    ("statx", libc::SYS_statx),
    ("newfstatat", libc::SYS_newfstatat),
    ("fstat", libc::SYS_fstat),
    ("stat", libc::SYS_stat),
    ("lstat", libc::SYS_lstat),
    ("getdents64", libc::SYS_getdents64),
    ("lseek", libc::SYS_lseek),
    ("readlink", libc::SYS_readlink),
    ("readlinkat", libc::SYS_readlinkat),
];

const CHANGES: [(&str, i64); 21] = [
    ("openat", libc::SYS_openat),
    ("open", libc::SYS_open),
    ("write", libc::SYS_write),
    ("pwrite64", libc::SYS_pwrite64),
    ("writev", libc::SYS_writev),
    ("pwritev", libc::SYS_pwritev),
    ("fsync", libc::SYS_fsync),
    ("fdatasync", libc::SYS_fdatasync),
    ("rename", libc::SYS_rename),
    ("renameat", libc::SYS_renameat),
    ("renameat2", libc::SYS_renameat2),
    ("unlink", libc::SYS_unlink),
    ("unlinkat", libc::SYS_unlinkat),
    ("rmdir", libc::SYS_rmdir),
    ("mkdir", libc::SYS_mkdir),
    ("mkdirat", libc::SYS_mkdirat),
    ("ftruncate", libc::SYS_ftruncate),
    ("fallocate", libc::SYS_fallocate),
    ("chmod", libc::SYS_chmod),
    ("fchmodat", libc::SYS_fchmodat),
    ("copy_file_range", libc::SYS_copy_file_range),
];

/// What is done to a run at a watched call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing: the call is made.
    None,
    /// The process is killed in front of it.
    Kill,
    /// It fails with this errno.
    Fail(i32),
}

/// `fault` at call number `at`, from 0.
pub fn once(at: usize, fault: Fault) -> impl FnMut(usize, &Call) -> Fault {
    move |number, _| if number == at { fault } else { Fault::None }
}

/// `fault` at the call of this name that is about a file of this name for the `nth` time, from 0.
pub fn at_file(name: &'static str, file: &'static str, nth: usize, fault: Fault) -> impl FnMut(usize, &Call) -> Fault {
    let mut seen = 0;
    move |_, call| {
        let is = call.name == name && call.path.ends_with(file);
        seen += usize::from(is);
        if is && seen == nth + 1 { fault } else { Fault::None }
    }
}

/// A watched call: its name and the file that it is about, below the watched folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// `pwrite64`.
    pub name: &'static str,
    /// The file, or the first of two.
    pub path: PathBuf,
}

/// How a run ended.
#[derive(Debug)]
pub struct Traced {
    /// Exit code; -1 for a signal.
    pub code: i32,
    /// Whether the fault came to it; a run may be over before.
    pub struck: bool,
    /// The calls that were watched, in order.
    pub calls: Vec<Call>,
    /// Standard error.
    pub err: String,
    /// What was not durable at the end, oldest first.
    pending: Vec<Pending>,
    /// Where removed files lie until then.
    graves: tempfile::TempDir,
}

/// A change that a power cut may take back.
#[derive(Debug)]
enum Pending {
    /// Bytes of a file: start and length, and the length of the file that was durable.
    Written { file: PathBuf, start: u64, len: u64 },
    /// A file that became shorter or longer: how long it was, and what was cut off.
    Resized { file: PathBuf, len: u64, tail: Vec<u8> },
    /// A file or folder that was made.
    Made { path: PathBuf },
    /// A name that was changed; exchanged where both were there.
    Renamed { from: PathBuf, to: PathBuf },
    /// A file that was removed; it lies here now.
    Removed { path: PathBuf, grave: PathBuf },
}

/// Runs `command`; before each call that changes files below `folder`, `fault` says what is done there. The process stands
/// still meanwhile.
pub fn trace(command: &mut Command, folder: &Path, fault: impl FnMut(usize, &Call) -> Fault) -> Traced {
    trace_calls(command, folder, Watched::Changes, fault)
}

/// [`trace`], of these calls.
pub fn trace_calls(
    command: &mut Command,
    folder: &Path,
    watched: Watched,
    mut fault: impl FnMut(usize, &Call) -> Fault,
) -> Traced {
    let folder = folder.canonicalize().expect("the watched folder is there");
    let graves = tempfile::Builder::new().prefix(".graves-").tempdir_in(folder.parent().expect("it has a parent"));
    let graves = graves.expect("there is room");
    let errors = tempfile::NamedTempFile::new().expect("there is room");
    command.stdout(Stdio::null()).stdin(Stdio::null()).stderr(errors.reopen().expect("it is there"));
    let mut program = stop_at(watched.calls());
    // SAFETY: between fork and exec it makes system calls alone.
    unsafe { command.pre_exec(move || watch_me(&mut program)) };
    #[allow(clippy::zombie_processes, reason = "the tracer waits for it, and for its threads")]
    let child = command.spawn().expect("the tool starts");
    let pid = i32::try_from(child.id()).expect("a pid is an int");
    let mut tracer = Tracer {
        pid,
        watched,
        folder,
        graves: graves.path().to_path_buf(),
        calls: Vec::new(),
        pending: Vec::new(),
        struck: false,
    };
    let code = tracer.run(&mut fault);
    let mut err = String::new();
    errors.reopen().expect("it is there").read_to_string(&mut err).expect("UTF-8");
    Traced { code, struck: tracer.struck, calls: tracer.calls, err, pending: tracer.pending, graves }
}

/// A filter that stops a process at these calls.
fn stop_at(calls: &[(&str, i64)]) -> Vec<libc::sock_filter> {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let filter = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut program = vec![filter(LOAD, 0, 0, 0)];
    for (i, (_, number)) in calls.iter().enumerate() {
        program.push(filter(EQUAL, (calls.len() - i) as u8, 0, *number as u32));
    }
    program.push(filter(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW));
    program.push(filter(RETURN, 0, 0, libc::SECCOMP_RET_TRACE));
    program
}

/// In the child: stop where the filter says.
fn watch_me(program: &mut [libc::sock_filter]) -> std::io::Result<()> {
    let list = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the program outlives the call, which copies it.
    let done = unsafe {
        libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const list) == 0
    };
    if done { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

struct Tracer {
    pid: i32,
    watched: Watched,
    folder: PathBuf,
    graves: PathBuf,
    calls: Vec<Call>,
    pending: Vec<Pending>,
    struck: bool,
}

impl Tracer {
    fn run(&mut self, fault: &mut dyn FnMut(usize, &Call) -> Fault) -> i32 {
        let options = libc::PTRACE_O_TRACESECCOMP
            | libc::PTRACE_O_TRACECLONE
            | libc::PTRACE_O_TRACEFORK
            | libc::PTRACE_O_TRACEVFORK
            | libc::PTRACE_O_EXITKILL;
        let mut status = 0;
        // SAFETY: waits for our own child, which stops at its exec.
        unsafe {
            assert_eq!(libc::waitpid(self.pid, &mut status, 0), self.pid);
            assert!(libc::WIFSTOPPED(status), "it stops at exec");
            assert_eq!(libc::ptrace(libc::PTRACE_SETOPTIONS, self.pid, 0, options), 0, "ptrace is allowed");
            libc::ptrace(libc::PTRACE_CONT, self.pid, 0, 0);
        }
        loop {
            // SAFETY: any child of this thread is one of the traced process's threads: __WNOTHREAD.
            let tid = unsafe { libc::waitpid(-1, &mut status, libc::__WALL | libc::__WNOTHREAD) };
            assert!(tid > 0, "waitpid: {}", std::io::Error::last_os_error());
            if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
                if tid == self.pid {
                    return if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { -1 };
                }
                continue;
            }
            let event = status >> 16;
            let mut signal = 0;
            if event == libc::PTRACE_EVENT_SECCOMP {
                if self.stopped(tid, fault) {
                    // SAFETY: kills our own child.
                    unsafe { libc::kill(self.pid, libc::SIGKILL) };
                    continue;
                }
            } else if event == 0 {
                let stop = libc::WSTOPSIG(status);
                // A new thread begins with a stop that is nobody's signal.
                signal = if stop == libc::SIGSTOP || stop == libc::SIGTRAP { 0 } else { stop };
            }
            // SAFETY: the thread is stopped, or gone, which is an error that does not matter.
            unsafe { libc::ptrace(libc::PTRACE_CONT, tid, 0, signal) };
        }
    }

    /// A thread stands in front of a watched call. True where the process is to be killed.
    fn stopped(&mut self, tid: i32, fault: &mut dyn FnMut(usize, &Call) -> Fault) -> bool {
        // SAFETY: the structure is plain numbers, and the thread is stopped.
        let mut regs: libc::user_regs_struct = unsafe { std::mem::zeroed() };
        // SAFETY: it is as large as what the call writes.
        let got = unsafe { libc::ptrace(libc::PTRACE_GETREGS, tid, 0, (&raw mut regs).cast::<c_void>()) };
        if got != 0 {
            return false;
        }
        let number = regs.orig_rax as i64;
        let name = self.watched.calls().iter().find(|c| c.1 == number).expect("the filter has no other").0;
        let Some((path, second)) = self.about(tid, name, &regs) else { return false };
        let at = self.calls.len();
        self.calls.push(Call { name, path: path.strip_prefix(&self.folder).unwrap_or(&path).to_path_buf() });
        match fault(at, &self.calls[at]) {
            Fault::Kill => {
                self.struck = true;
                return true;
            }
            Fault::Fail(errno) => {
                self.struck = true;
                regs.orig_rax = u64::MAX;
                regs.rax = (-i64::from(errno)) as u64;
                // SAFETY: the thread is stopped; without a call number the kernel skips the call.
                unsafe { libc::ptrace(libc::PTRACE_SETREGS, tid, 0, (&raw mut regs).cast::<c_void>()) };
            }
            Fault::None if self.watched == Watched::Changes => self.note(name, path, second, &regs),
            Fault::None => {}
        }
        false
    }

    /// The file that a call is about, and the second one, where they lie in the folder and the call is one of the watched.
    fn about(&self, tid: i32, name: &str, r: &libc::user_regs_struct) -> Option<(PathBuf, Option<PathBuf>)> {
        let fd = |fd: u64| std::fs::read_link(format!("/proc/{tid}/fd/{}", fd as i32)).ok();
        let text = |at: u64| read_text(tid, at);
        let under = |dir: u64, at: u64| {
            let path = PathBuf::from(text(at)?);
            if path.as_os_str().is_empty() {
                return fd(dir);
            }
            if path.is_absolute() {
                return Some(path);
            }
            let base = if dir as i32 == libc::AT_FDCWD {
                std::fs::read_link(format!("/proc/{tid}/cwd")).ok()
            } else {
                fd(dir)
            };
            Some(base?.join(path))
        };
        let cwd = libc::AT_FDCWD as u64;
        let makes = |flags: u64| (flags as i32 & libc::O_CREAT != 0) == (self.watched == Watched::Changes);
        let (path, second) = match name {
            "openat" if makes(r.rdx) => (under(r.rdi, r.rsi)?, None),
            "open" if makes(r.rsi) => (under(cwd, r.rdi)?, None),
            "openat" | "open" => return None,
            "rename" => (under(cwd, r.rdi)?, under(cwd, r.rsi)),
            "renameat" | "renameat2" => (under(r.rdi, r.rsi)?, under(r.rdx, r.r10)),
            "unlink" | "rmdir" | "mkdir" | "chmod" | "stat" | "lstat" | "readlink" => (under(cwd, r.rdi)?, None),
            "unlinkat" | "mkdirat" | "fchmodat" | "statx" | "newfstatat" | "readlinkat" => (under(r.rdi, r.rsi)?, None),
            "copy_file_range" => (fd(r.rdx)?, None),
            "mmap" => (fd(r.r8)?, None),
            _ => (fd(r.rdi)?, None),
        };
        path.starts_with(&self.folder).then_some((path, second))
    }

    /// What is pending of a file goes with its name.
    fn follow(&mut self, from: &Path, to: &Path, exchanged: bool) {
        let moved = |path: &mut PathBuf| {
            for (a, b) in [(from, to), (to, from)].into_iter().take(1 + usize::from(exchanged)) {
                if let Ok(rest) = path.strip_prefix(a) {
                    *path = if rest.as_os_str().is_empty() { b.to_path_buf() } else { b.join(rest) };
                    return;
                }
            }
        };
        for change in &mut self.pending {
            match change {
                Pending::Written { file: path, .. }
                | Pending::Resized { file: path, .. }
                | Pending::Made { path }
                | Pending::Removed { path, .. } => moved(path),
                Pending::Renamed { .. } => {}
            }
        }
    }

    /// Notes what the call changes, as long as nothing makes it durable.
    fn note(&mut self, name: &str, path: PathBuf, second: Option<PathBuf>, r: &libc::user_regs_struct) {
        let length = |p: &Path| std::fs::metadata(p).map_or(0, |m| m.len());
        match name {
            "openat" | "open" | "mkdir" | "mkdirat" if !path.exists() => self.pending.push(Pending::Made { path }),
            "openat" | "open" if (if name == "open" { r.rsi } else { r.rdx }) as i32 & libc::O_TRUNC != 0 => {
                let tail = std::fs::read(&path).unwrap_or_default();
                self.pending.push(Pending::Resized { file: path, len: tail.len() as u64, tail });
            }
            // Appends: where the file ends.
            "write" | "writev" => {
                let start = length(&path);
                self.pending.push(Pending::Written { file: path, start, len: r.rdx });
            }
            "pwrite64" => self.pending.push(Pending::Written { file: path, start: r.r10, len: r.rdx }),
            "ftruncate" | "fallocate" => {
                let bytes = std::fs::read(&path).unwrap_or_default();
                let new = if name == "ftruncate" { r.rsi } else { (r.rdx + r.r10).max(bytes.len() as u64) };
                if new != bytes.len() as u64 {
                    let tail = bytes.get(new as usize..).unwrap_or_default().to_vec();
                    self.pending.push(Pending::Resized { file: path, len: bytes.len() as u64, tail });
                }
            }
            "rename" | "renameat" | "renameat2" => {
                let to = second.expect("a rename has two names");
                let exchanged = name == "renameat2" && r.r8 as u32 & libc::RENAME_EXCHANGE != 0;
                self.follow(&path, &to, exchanged);
                self.pending.push(Pending::Renamed { from: path, to });
            }
            "unlink" | "unlinkat" => {
                let grave = self.graves.join(self.pending.len().to_string());
                if std::fs::hard_link(&path, &grave).is_ok() {
                    self.pending.push(Pending::Removed { path, grave });
                }
            }
            // A file's bytes.
            "fsync" | "fdatasync" if !path.is_dir() => {
                self.pending.retain(
                    |p| !matches!(p, Pending::Written { file, .. } | Pending::Resized { file, .. } if *file == path),
                );
            }
            // A folder's names.
            "fsync" => self.pending.retain(|p| match p {
                Pending::Made { path: made } => made.parent() != Some(&*path),
                Pending::Renamed { from, to } => from.parent() != Some(&*path) && to.parent() != Some(&*path),
                Pending::Removed { path: gone, .. } => gone.parent() != Some(&*path),
                Pending::Written { .. } | Pending::Resized { .. } => true,
            }),
            _ => {}
        }
    }
}

/// A text in the memory of another process.
fn read_text(tid: i32, at: u64) -> Option<String> {
    let memory = File::open(format!("/proc/{tid}/mem")).ok()?;
    let mut bytes = Vec::new();
    while bytes.len() < 4096 {
        let mut byte = [0];
        memory.read_exact_at(&mut byte, at + bytes.len() as u64).ok()?;
        if byte == [0] {
            return String::from_utf8(bytes).ok();
        }
        bytes.push(byte[0]);
    }
    None
}

impl Traced {
    /// Cuts the power: takes back what was not durable, newest first, each with this probability in 256.
    pub fn cut_power(self, rng: &mut super::random::Random, lost: usize) {
        let _graves = self.graves;
        let mut moved: BTreeMap<PathBuf, PathBuf> = BTreeMap::new();
        for change in self.pending.into_iter().rev() {
            if rng.below(256) >= lost {
                continue;
            }
            match change {
                Pending::Written { file, start, len } => {
                    let file = moved_to(&moved, &file);
                    let Ok(open) = File::options().write(true).open(&file) else { continue };
                    let end = open.metadata().expect("it is open").len();
                    // Blocks that were reserved and never written are zeros; an append that never came is no length.
                    if start + len >= end && !file.extension().is_some_and(|e| e == "safetensors" || e == "gguf") {
                        open.set_len(start.min(end)).expect("it can be cut");
                    } else if start < end {
                        let zeros = vec![0; len.min(end - start) as usize];
                        open.write_all_at(&zeros, start).expect("it can be written");
                    }
                }
                Pending::Resized { file, len, tail } => {
                    let file = moved_to(&moved, &file);
                    let Ok(open) = File::options().write(true).open(&file) else { continue };
                    open.set_len(len).expect("it can be resized");
                    open.write_all_at(&tail, len - tail.len() as u64).expect("it can be written");
                }
                Pending::Made { path } => {
                    let path = moved_to(&moved, &path);
                    if path.is_dir() {
                        let _ = std::fs::remove_dir_all(&path);
                    } else {
                        let _ = std::fs::remove_file(&path);
                    }
                }
                Pending::Renamed { from, to } => {
                    if to.exists() && !from.exists() {
                        std::fs::rename(&to, &from).expect("it can be renamed back");
                    } else if to.exists() {
                        // The two were exchanged.
                        let aside = from.with_extension("aside");
                        std::fs::rename(&from, &aside).expect("it can be renamed");
                        std::fs::rename(&to, &from).expect("it can be renamed");
                        std::fs::rename(&aside, &to).expect("it can be renamed");
                    }
                    moved.insert(to, from);
                }
                Pending::Removed { path, grave } => {
                    let path = moved_to(&moved, &path);
                    if !path.exists() && path.parent().is_some_and(Path::is_dir) {
                        std::fs::rename(grave, path).expect("it can be put back");
                    }
                }
            }
        }
    }
}

/// Where a path that was noted lies after what was taken back.
fn moved_to(moved: &BTreeMap<PathBuf, PathBuf>, path: &Path) -> PathBuf {
    for (to, from) in moved {
        if let Ok(rest) = path.strip_prefix(to) {
            return if rest.as_os_str().is_empty() { from.clone() } else { from.join(rest) };
        }
    }
    path.to_path_buf()
}

/// What the system refuses a program from its start on.
#[derive(Debug, Clone, Copy)]
pub enum Refusal {
    /// To start a thread (EAGAIN).
    Threads,
    /// To map a file that is shared with others (ENOMEM), as sources are.
    Maps,
    /// Files above this size (EFBIG).
    FileSize(u64),
}

/// Makes the system refuse it to `command`.
pub fn refuse(command: &mut Command, refusal: Refusal) {
    let install = move || -> std::io::Result<()> {
        const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
        const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
        const BITS: u16 = (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16;
        const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
        let filter = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
        let error = |errno: i32| filter(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | errno as u32);
        let allow = filter(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW);
        let mut program = match refusal {
            Refusal::FileSize(most) => {
                let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
                // SAFETY: the structure lives here.
                let done = unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) == 0 };
                return if done { Ok(()) } else { Err(std::io::Error::last_os_error()) };
            }
            Refusal::Threads => vec![
                filter(LOAD, 0, 0, 0),
                filter(EQUAL, 1, 0, libc::SYS_clone3 as u32),
                filter(EQUAL, 0, 1, libc::SYS_clone as u32),
                error(libc::EAGAIN),
                allow,
            ],
            // The flags are the fourth of its arguments, which begin at byte 16.
            Refusal::Maps => vec![
                filter(LOAD, 0, 0, 0),
                filter(EQUAL, 0, 3, libc::SYS_mmap as u32),
                filter(LOAD, 0, 0, 16 + 3 * 8),
                filter(BITS, 0, 1, libc::MAP_SHARED as u32),
                error(libc::ENOMEM),
                allow,
            ],
        };
        let list = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
        // SAFETY: the program outlives the call, which copies it.
        let done = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const list) == 0
        };
        if done { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: between fork and exec it calls the system and allocates a few bytes, in a child of a thread that holds no lock.
    unsafe { command.pre_exec(install) };
}
