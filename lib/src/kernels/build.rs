//! Compiles the kernels into a folder whose name says what went in. The same sources, compiler and flags give the same bytes in any
//! folder, at any time: sources have no path in them, and are compiled from a folder of their own.

use std::path::{Path, PathBuf};

use super::arch::Target;
use super::store::{Installed, KernelBuild, MANIFEST};
use super::toolkit::Toolkit;
use super::{SOURCES, kernels};
use crate::checkpoint::digest::{record, sha256};
use crate::error::{Error, Result};
use crate::manifest::{FileRecord, Job, Manifest};
use crate::pipeline::executor::map;
use crate::pipeline::progress::{Progress, Unit};

/// Flags of every compilation.
pub const FLAGS: [&str; 2] = ["-std=c++17", "-O3"];

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
        let source = |(name, text): (&str, &str)| FileRecord {
            name: name.into(),
            bytes: text.len() as u64,
            sha256: sha256(text.as_bytes()),
        };
        let mut build = KernelBuild {
            id: String::new(),
            nvcc: self.toolkit.version.clone(),
            flags: FLAGS.map(str::to_owned).to_vec(),
            targets: self.targets.iter().map(Target::to_string).collect(),
            sources: SOURCES.map(source).to_vec(),
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
        if let Some(there) = Installed::open(&path)?
            && there.damage().is_empty()
        {
            progress.note(&format!("kernels: {} is installed already", build.id));
            return Ok(there);
        }
        std::fs::create_dir_all(root).map_err(Error::io("create", root))?;
        let partial = Partial::new(root, &build.id)?;
        build.files = self.compile(&partial.0, threads, progress)?;
        let mut manifest = Manifest::new("gptoss-kernel-install", Job::InstallKernels);
        manifest.kernels = Some(build.clone());
        let text = serde_json::to_string_pretty(&manifest).expect("a manifest is JSON") + "\n";
        write(&partial.0.join(MANIFEST), text.as_bytes())?;
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
        let command = command.env_remove("NVCC_PREPEND_FLAGS").env_remove("NVCC_APPEND_FLAGS");
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

/// A folder in which a build grows; it goes with this, unless it was renamed.
struct Partial(PathBuf);

impl Partial {
    fn new(root: &Path, id: &str) -> Result<Self> {
        // What killed builds left behind: their processes are gone.
        for entry in std::fs::read_dir(root).map_err(Error::io("read", root))?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let process = name.strip_prefix('.').and_then(|n| n.split_once(".partial-")).map(|n| n.1.to_owned());
            if process.is_some_and(|p| !Path::new("/proc").join(p).exists()) {
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
        let path = root.join(format!(".{id}.partial-{}", std::process::id()));
        std::fs::create_dir(&path).map_err(Error::io("create", &path))?;
        Ok(Self(path))
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
