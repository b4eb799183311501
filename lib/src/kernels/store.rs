//! Installed builds: a folder each, named after what went in.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::cutlass::Cutlass;
use crate::checkpoint::digest::record;
use crate::error::{Error, Result};
use crate::manifest::{FileRecord, Manifest};

/// The manifest in a build's folder; it is written last.
pub const MANIFEST: &str = "manifest.json";

/// What a build is made of and what came out: no time, no path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct KernelBuild {
    /// The folder's name: a hash of sources, compiler, flags, targets and CUTLASS.
    pub id: String,
    /// The compiler's version, such as "13.0.88".
    pub nvcc: String,
    /// Flags of every compilation.
    pub flags: Vec<String>,
    /// What the library for Hopper is built from; absent where it is not built.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub cutlass: Option<Cutlass>,
    /// Flags of that library's compilation and of its link, beside those above. The link takes code of the host's compiler, so the library's own
    /// bytes depend on that too; its machine code for the GPU does not.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub library_flags: Vec<String>,
    /// Architectures, such as "9.0a" or "8.0+PTX".
    pub targets: Vec<String>,
    /// What was compiled.
    pub sources: Vec<FileRecord>,
    /// What came out.
    pub files: Vec<FileRecord>,
}

/// A build in its folder.
#[derive(Debug)]
pub struct Installed {
    /// The folder.
    pub path: PathBuf,
    /// Its manifest.
    pub manifest: Manifest,
    /// The manifest's part about kernels.
    pub build: KernelBuild,
}

impl Installed {
    /// Reads the build in `path`; `None` where there is no manifest.
    ///
    /// # Errors
    /// [`Error::BadManifest`] where the manifest is none of a build.
    pub fn open(path: &Path) -> Result<Option<Self>> {
        let file = path.join(MANIFEST);
        let text = match std::fs::read_to_string(&file) {
            Ok(text) => text,
            Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
                return Ok(None);
            }
            Err(e) => return Err(Error::io("read", file)(e)),
        };
        let origin = file.display().to_string();
        let manifest = Manifest::parse(&text, &origin)?;
        match manifest.kernels.clone() {
            Some(build) => Ok(Some(Self { path: path.to_path_buf(), manifest, build })),
            None => Err(Error::BadManifest { origin, reason: "is not of a build of kernels".into() }),
        }
    }

    /// What differs from the manifest: files that are missing or have other bytes.
    pub fn damage(&self) -> Vec<String> {
        let look = |wanted: &FileRecord| match record(&self.path, &wanted.name) {
            Ok(have) if have == *wanted => None,
            Ok(have) => Some(format!("{} has SHA-256 {}, wanted {}", wanted.name, have.sha256, wanted.sha256)),
            Err(e) => Some(e.to_string()),
        };
        self.build.files.iter().filter_map(look).collect()
    }
}

/// All builds in `root`, by name. What is none, or has a manifest that cannot be read ([`unreadable`]), is passed over.
pub fn list(root: &Path) -> Result<Vec<Installed>> {
    Ok(folders(root)?.iter().filter_map(|path| Installed::open(path).ok().flatten()).collect())
}

/// Folders in `root` whose manifests cannot be read, and why.
pub fn unreadable(root: &Path) -> Result<Vec<(PathBuf, Error)>> {
    let bad = |path: PathBuf| Installed::open(&path).err().map(|error| (path, error));
    Ok(folders(root)?.into_iter().filter_map(bad).collect())
}

/// What lies in `root` and is not hidden, by name.
fn folders(root: &Path) -> Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(root) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io("read", root)(e)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(Error::io("read", root))?.path();
        let hidden = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'));
        if !hidden {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// Takes away the builds that `id` names, in full or by its beginning; `all` names every one. A build whose manifest cannot be read has its
/// folder's name. Gives the folders that went.
///
/// # Errors
/// [`Error::Refused`] where it names none, or several without saying all.
pub fn uninstall(root: &Path, id: &str) -> Result<Vec<PathBuf>> {
    let mut named: Vec<PathBuf> = list(root)?.into_iter().map(|i| i.path).collect();
    named.extend(unreadable(root)?.into_iter().map(|bad| bad.0));
    if id != "all" {
        let name = |path: &PathBuf| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(id));
        named.retain(|path| !id.is_empty() && name(path));
        if named.len() != 1 {
            let what = if named.is_empty() { "no build in" } else { "more than one build in" };
            return Err(Error::Refused(format!(
                "{what} {} has an id that begins with {id:?}; see --list",
                root.display()
            )));
        }
    }
    for path in &named {
        // First the manifest: a folder without it is no build.
        let manifest = path.join(MANIFEST);
        std::fs::remove_file(&manifest).map_err(Error::io("remove", manifest))?;
        std::fs::remove_dir_all(path).map_err(Error::io("remove", path))?;
    }
    Ok(named)
}
