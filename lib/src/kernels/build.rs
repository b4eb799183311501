//! Compiles the kernels into a folder whose name says what went in. The same sources, compiler and flags give the same bytes in any
//! folder, at any time: sources have no path in them, and are compiled from a folder of their own.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::arch::Target;
use super::cutlass::Headers;
use super::store::{Installed, KernelBuild, MANIFEST};
use super::toolkit::Toolkit;
use super::{HOPPER, HOPPER_LIBRARY, SOURCES, kernels};
use crate::checkpoint::digest::{record, sha256};
use crate::checkpoint::sink::to_text;
use crate::error::{Error, Result};
use crate::manifest::{FileRecord, Job, Manifest};
use crate::pipeline::executor::map;
use crate::pipeline::progress::{Progress, Unit};

/// Flags of every compilation. Products and sums are fused where a source says so, nowhere else: their order is stated.
pub const FLAGS: [&str; 3] = ["-std=c++17", "-O3", "-fmad=false"];

/// What the library for Hopper has beside them.
const LIBRARY_FLAGS: [&str; 3] = ["--expt-relaxed-constexpr", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden"];

/// How it is linked: nothing but its own functions is seen, and nothing but the C library is needed.
const LINK_FLAGS: [&str; 7] = [
    "-shared",
    "-s",
    "-static-libstdc++",
    "-static-libgcc",
    "-Wl,--gc-sections",
    "-Wl,--exclude-libs,ALL",
    "-Wl,-z,noexecstack",
];

/// Lines of a compiler's message that are shown.
const MESSAGE_LINES: usize = 30;

/// What is to be built.
#[derive(Debug, Clone)]
pub struct Request {
    /// With which compiler.
    pub toolkit: Toolkit,
    /// With which CUTLASS; the library for Hopper is built where there is one and 9.0a is a target.
    pub cutlass: Option<Headers>,
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
            cutlass: self.hopper().map(|(headers, _)| headers.what.clone()),
            library_flags: match self.hopper() {
                Some(_) => LIBRARY_FLAGS.iter().chain(&LINK_FLAGS).map(|&flag| flag.to_owned()).collect(),
                None => Vec::new(),
            },
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
        // The library takes longest.
        let mut jobs: Vec<(&str, &Target)> = self.hopper().map(|(_, t)| (HOPPER, t)).into_iter().collect();
        jobs.extend(kernels().flat_map(|k| self.targets.iter().map(move |t| (k, t))));
        progress.start_counting("kernels", jobs.len() as u64, Unit::Work);
        let one = |(kernel, target): &(&str, &Target)| {
            let made = match self.hopper().filter(|_| *kernel == HOPPER) {
                Some((headers, target)) => self.library(&sources, headers, target)?,
                None => vec![self.kernel(&sources, kernel, target)?],
            };
            progress.note(&format!("kernels: {kernel} for {target}"));
            progress.advance(1);
            made.iter().map(|name| record(folder, name)).collect::<Result<Vec<FileRecord>>>()
        };
        let made = map(&jobs, threads, one);
        if made.is_ok() {
            progress.finish()
        } else {
            progress.clear()
        }
        let mut made: Vec<FileRecord> = made?.into_iter().flatten().collect();
        made.sort_by(|a, b| a.name.cmp(&b.name));
        std::fs::remove_dir_all(&sources).map_err(Error::io("remove", &sources))?;
        Ok(made)
    }

    /// CUTLASS and the target that it is for, where the library for Hopper is built.
    fn hopper(&self) -> Option<(&Headers, &Target)> {
        self.cutlass.as_ref().zip(self.targets.iter().find(|t| t.is_hopper()))
    }

    /// Compiles a kernel into the folder above `sources`, and gives its file's name.
    fn kernel(&self, sources: &Path, kernel: &str, target: &Target) -> Result<String> {
        let file = target.file(kernel);
        let mut words: Vec<String> = FLAGS.map(str::to_owned).to_vec();
        words.extend(target.flags());
        words.extend(["-o".into(), format!("../{file}"), format!("{kernel}.cu")]);
        run(&self.toolkit.nvcc, words, sources, &format!("{kernel} does not compile for {target}"))?;
        Ok(file)
    }

    /// Builds the library for Hopper, and gives the names of it and of its machine code.
    fn library(&self, sources: &Path, headers: &Headers, target: &Target) -> Result<Vec<String>> {
        let source = format!("{HOPPER}.cu");
        let failed = format!("{HOPPER} does not compile for {target} with CUTLASS {}", headers.what.version);
        let mut words: Vec<String> = FLAGS.map(str::to_owned).to_vec();
        words.extend(target.flags().into_iter().filter(|f| f != "-cubin"));
        words.extend(LIBRARY_FLAGS.map(str::to_owned));
        // Names of CUTLASS's symbols have a hash of the source's path in them: it is the same one everywhere.
        for part in ["-Xcudafe", "-Xcicc"] {
            words.extend([part.into(), "--orig_src_path_name".into(), part.into(), format!("/gptoss/{source}")]);
        }
        words.extend(["-isystem".into(), headers.include.display().to_string()]);
        words.extend(["--keep", "--keep-dir", ".", "-c", "-o"].map(str::to_owned));
        words.extend([format!("{HOPPER}.o"), source]);
        run(&self.toolkit.nvcc, words, sources, &failed)?;
        // nvcc would write its own folders into the library; the runtime lies beside it.
        let home = self.toolkit.nvcc.ancestors().nth(2).unwrap_or(Path::new("/"));
        let folders = ["lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"].map(|f| home.join(f));
        let runtime = folders.iter().map(|f| f.join("libcudart_static.a")).find(|f| f.is_file());
        let runtime = runtime.ok_or_else(|| {
            Error::Refused(format!("libcudart_static.a is missing in {} (lib64 or lib)", home.display()))
        })?;
        let mut words: Vec<String> = LINK_FLAGS.map(str::to_owned).to_vec();
        words.extend([
            "-o".into(),
            format!("../{HOPPER_LIBRARY}"),
            format!("{HOPPER}.o"),
            runtime.display().to_string(),
        ]);
        words.extend(["-ldl", "-lrt", "-lpthread"].map(str::to_owned));
        run(Path::new("g++"), words, sources, &format!("{HOPPER_LIBRARY} does not link"))?;
        let code = target.file(HOPPER);
        let (kept, wanted) = (sources.join(format!("{HOPPER}.cubin")), sources.join("..").join(&code));
        std::fs::rename(&kept, &wanted).map_err(Error::io("rename", kept))?;
        Ok(vec![code, HOPPER_LIBRARY.into()])
    }
}

/// Runs a compiler in `folder`; where it fails, its message is the error's.
fn run(program: &Path, words: Vec<String>, folder: &Path, failed: &str) -> Result<()> {
    // As a name, not as a path: g++ is looked for in PATH.
    let command = duct::cmd(program.as_os_str(), words).dir(folder).stdin_null().stderr_to_stdout().stdout_capture();
    // Flags from outside would change the bits.
    let outside = ["NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN", "CPATH", "CPLUS_INCLUDE_PATH"];
    let command = outside.iter().fold(command, |c, name| c.env_remove(name));
    // What a killed compiler leaves goes with the folder.
    let command = command.env("TMPDIR", folder);
    let ran = command.unchecked().run().map_err(Error::io("run", program))?;
    if ran.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&ran.stdout);
    let lines: Vec<&str> = text.lines().take(MESSAGE_LINES).collect();
    Err(Error::Refused(format!("{failed} with {} ({}):\n{}", program.display(), ran.status, lines.join("\n"))))
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
