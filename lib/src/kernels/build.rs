//! Compiles the kernels into a folder whose name says what went in. The same sources, compiler and flags give the same bytes in any
//! folder, at any time: sources have no path in them, and are compiled from a folder of their own.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::arch::Target;
use super::store::{Installed, KernelBuild, MANIFEST};
use super::toolkit::Toolkit;
use super::{SOURCES, kernels};
use crate::checkpoint::digest::{record, sha256};
use crate::checkpoint::sink::to_text;
use crate::error::{Error, Result};
use crate::manifest::{FileRecord, Job, Manifest};
use crate::pipeline::executor::map;
use crate::pipeline::progress::{Progress, Unit};

/// Flags of every compilation. Products and sums are fused where a source says so, nowhere else: their order is stated.
pub const FLAGS: [&str; 3] = ["-std=c++17", "-O3", "-fmad=false"];

/// Lines of a compiler's message that are shown.
const MESSAGE_LINES: usize = 30;

/// What is to be built.
#[derive(Debug, Clone)]
pub struct Request {
    /// With which compiler.
    pub toolkit: Toolkit,
    /// For what.
    pub targets: Vec<Target>,
}

impl Request {
    /// What the build will be, but for its files.
    pub fn planned(&self) -> KernelBuild {
        let mut build = KernelBuild {
            id: String::new(),
            nvcc: self.toolkit.version.clone(),
            flags: FLAGS.map(str::to_owned).to_vec(),
            targets: self.targets.iter().map(Target::to_string).collect(),
            sources: sources(),
            files: Vec::new(),
        };
        let all = serde_json::to_vec(&build).expect("a build is JSON");
        build.id = sha256(&all)[..16].to_owned();
        build
    }

    /// Compiles every kernel for every target into `root`, by so many compilers at once. What is installed already, and undamaged, stays.
    ///
    /// # Errors
    /// [`Error::Refused`] with the compiler's message where it fails; nothing is left then.
    pub fn install(&self, root: &Path, threads: usize, progress: &Progress) -> Result<Installed> {
        let mut build = self.planned();
        let path = root.join(&build.id);
        if let Some(there) = sound(&path) {
            progress.note(&format!("kernels: {} is installed already", build.id));
            return Ok(there);
        }
        std::fs::create_dir_all(root).map_err(Error::io("create", root))?;
        let partial = Partial::new(root, &build.id)?;
        build.files = self.compile(&partial.0, threads, progress)?;
        let mut manifest = Manifest::new("gptoss-kernel-install", Job::InstallKernels);
        manifest.kernels = Some(build.clone());
        write(&partial.0.join(MANIFEST), to_text(&manifest).as_bytes())?;
        let _alone = lock(root, true)?;
        // Another process may have been faster, with the same bytes.
        if let Some(there) = sound(&path) {
            return Ok(there);
        }
        if path.exists() {
            std::fs::remove_dir_all(&path).map_err(Error::io("remove the damaged", &path))?;
        }
        std::fs::rename(&partial.0, &path).map_err(Error::io("rename the new build to", &path))?;
        Ok(Installed { path, manifest, build })
    }

    /// Every kernel for every target; the files lie in `folder`.
    fn compile(&self, folder: &Path, threads: usize, progress: &Progress) -> Result<Vec<FileRecord>> {
        let sources = folder.join("src");
        std::fs::create_dir(&sources).map_err(Error::io("create", &sources))?;
        for (name, text) in SOURCES {
            write(&sources.join(name), text.as_bytes())?;
        }
        let jobs: Vec<(&str, &Target)> = kernels().flat_map(|k| self.targets.iter().map(move |t| (k, t))).collect();
        progress.start_counting("kernels", jobs.len() as u64, Unit::Work);
        let one = |(kernel, target): &(&str, &Target)| {
            self.run(&sources, kernel, target)?;
            progress.note(&format!("kernels: {kernel} for {target}"));
            progress.advance(1);
            record(folder, &target.file(kernel))
        };
        let made = map(&jobs, threads, one);
        if made.is_ok() {
            progress.finish()
        } else {
            progress.clear()
        }
        let mut made = made?;
        made.sort_by(|a, b| a.name.cmp(&b.name));
        std::fs::remove_dir_all(&sources).map_err(Error::io("remove", &sources))?;
        Ok(made)
    }

    fn run(&self, sources: &Path, kernel: &str, target: &Target) -> Result<()> {
        let mut words: Vec<String> = FLAGS.map(str::to_owned).to_vec();
        words.extend(target.flags());
        words.extend(["-o".into(), format!("../{}", target.file(kernel)), format!("{kernel}.cu")]);
        let command =
            duct::cmd(&self.toolkit.nvcc, words).dir(sources).stdin_null().stderr_to_stdout().stdout_capture();
        // Flags from outside would change the bits.
        let outside = ["NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN", "CPATH", "CPLUS_INCLUDE_PATH"];
        let command = outside.iter().fold(command, |c, name| c.env_remove(name));
        // What a killed compiler leaves goes with the folder.
        let command = command.env("TMPDIR", sources);
        let ran = command.unchecked().run().map_err(Error::io("run", &self.toolkit.nvcc))?;
        if ran.status.success() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&ran.stdout);
        let lines: Vec<&str> = text.lines().take(MESSAGE_LINES).collect();
        Err(Error::Refused(format!(
            "{kernel} does not compile for {target} with {} ({}):\n{}",
            self.toolkit.nvcc.display(),
            ran.status,
            lines.join("\n")
        )))
    }
}

/// What this program would compile.
pub fn sources() -> Vec<FileRecord> {
    let source = |(name, text): (&str, &str)| FileRecord {
        name: name.into(),
        bytes: text.len() as u64,
        sha256: sha256(text.as_bytes()),
    };
    SOURCES.map(source).to_vec()
}

/// The build in `path`, where there is one with nothing amiss.
fn sound(path: &Path) -> Option<Installed> {
    Installed::open(path).ok().flatten().filter(|i| i.damage().is_empty())
}

/// Locks a folder for as long as the result lives; `None` where another process has it and `wait` is false.
fn lock(folder: &Path, wait: bool) -> Result<Option<File>> {
    use rustix::fs::FlockOperation::{LockExclusive, NonBlockingLockExclusive};
    let file = File::open(folder).map_err(Error::io("open", folder))?;
    match rustix::fs::flock(&file, if wait { LockExclusive } else { NonBlockingLockExclusive }) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(e) => Err(Error::io("lock", folder)(e.into())),
    }
}

/// A folder in which a build grows; it goes with this, unless it was renamed.
struct Partial(PathBuf, #[allow(dead_code, reason = "the lock says that the folder is in use")] Option<File>);

impl Partial {
    fn new(root: &Path, id: &str) -> Result<Self> {
        let _alone = lock(root, true)?;
        // What killed builds left behind: nobody holds it.
        for entry in std::fs::read_dir(root).map_err(Error::io("read", root))?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let left = name.starts_with('.') && name.contains(".partial-");
            if left && let Ok(Some(_held)) = lock(&entry.path(), false) {
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
        let folder = tempfile::Builder::new().prefix(&format!(".{id}.partial-")).tempdir_in(root);
        let path = folder.map_err(Error::io("create a folder in", root))?.keep();
        let held = lock(&path, true)?;
        Ok(Self(path, held))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    std::fs::write(path, bytes).map_err(Error::io("write", path))
}
