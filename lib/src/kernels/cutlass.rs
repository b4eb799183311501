//! CUTLASS: headers of NVIDIA's, from which the library for Hopper is built.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::toolkit::{Toolkit, packages};
use crate::checkpoint::digest::sha256;
use crate::error::{Error, Result};

/// Versions that give the committed hashes, pip's first.
pub const PINNED: [&str; 2] = ["4.2.0", "4.2.1"];

/// What a build needs to know of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Cutlass {
    /// Such as "4.2.0".
    pub version: String,
    /// Of the list of all headers' names and SHA-256, by name.
    pub sha256: String,
}

/// The headers that were found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Headers {
    /// The folder that `cutlass/cutlass.h` is in.
    pub include: PathBuf,
    /// What they are.
    pub what: Cutlass,
}

impl Headers {
    /// Those in `named` (a checkout, or its `include`), or the first of `CUTLASS_HOME`'s, pip's in an active virtual environment, and pip's beside
    /// the compiler. `None` where nothing is named and there are none.
    ///
    /// # Errors
    /// [`Error::Refused`] where `named` or `CUTLASS_HOME` has none.
    pub fn find(named: Option<&Path>, toolkit: &Toolkit) -> Result<Option<Self>> {
        let home = std::env::var_os("CUTLASS_HOME").filter(|v| !v.is_empty()).map(PathBuf::from);
        for (place, who) in [(named, "--cutlass"), (home.as_deref(), "CUTLASS_HOME")] {
            let Some(place) = place else { continue };
            return Self::in_folder(place)?.map(Some).ok_or_else(|| {
                Error::Refused(format!("{who}: there is no include/cutlass/version.h in {}", place.display()))
            });
        }
        // `pip install --target DIR` puts both there: DIR/nvidia/cu13/bin/nvcc.
        let beside = toolkit.nvcc.ancestors().nth(4).map(Path::to_path_buf);
        for site in packages().into_iter().chain(beside) {
            if let Some(found) = Self::in_folder(&site.join("cutlass_library/source"))? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    fn in_folder(folder: &Path) -> Result<Option<Self>> {
        let includes = [folder.join("include"), folder.to_path_buf()];
        let Some(include) = includes.into_iter().find(|f| f.join("cutlass/version.h").is_file()) else {
            return Ok(None);
        };
        let file = include.join("cutlass/version.h");
        let text = std::fs::read_to_string(&file).map_err(Error::io("read", &file))?;
        let number = |name: &str| {
            let line = text.lines().find_map(|l| l.strip_prefix("#define ")?.strip_prefix(name));
            line.and_then(|l| l.trim().parse::<u32>().ok())
        };
        let parts = ["CUTLASS_MAJOR", "CUTLASS_MINOR", "CUTLASS_PATCH"].map(number);
        let [Some(major), Some(minor), Some(patch)] = parts else {
            return Err(Error::file(file, "does not say which version of CUTLASS it is of"));
        };
        let mut names = Vec::new();
        for part in ["cutlass", "cute"] {
            headers(&include, Path::new(part), &mut names)?;
        }
        names.sort();
        let mut list = String::new();
        for name in names {
            let path = include.join(&name);
            let bytes = std::fs::read(&path).map_err(Error::io("read", path))?;
            list += &format!("{}  {}\n", sha256(&bytes), name.display());
        }
        let what = Cutlass { version: format!("{major}.{minor}.{patch}"), sha256: sha256(list.as_bytes()) };
        let include = include.canonicalize().map_err(Error::io("find", &include))?;
        Ok(Some(Self { include, what }))
    }
}

/// Every file under `root`/`part`, by its name under `root`.
fn headers(root: &Path, part: &Path, names: &mut Vec<PathBuf>) -> Result<()> {
    let folder = root.join(part);
    for entry in std::fs::read_dir(&folder).map_err(Error::io("read", &folder))? {
        let entry = entry.map_err(Error::io("read", &folder))?;
        let name = part.join(entry.file_name());
        if entry.path().is_dir() {
            headers(root, &name, names)?;
        } else {
            names.push(name);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_found_in_a_checkout_and_their_bytes_count() {
        let dir = tempfile::tempdir().unwrap();
        let toolkit = Toolkit { nvcc: dir.path().join("site/nvidia/cu13/bin/nvcc"), version: "13.0.88".into() };
        let refused = Headers::find(Some(dir.path()), &toolkit).unwrap_err().to_string();
        assert!(refused.contains("--cutlass: there is no include/cutlass/version.h"), "{refused}");
        let source = dir.path().join("site/cutlass_library/source");
        for (name, text) in [
            ("cutlass/version.h", "#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n#define CUTLASS_PATCH 0\n"),
            ("cute/atom/mma.hpp", "int x;\n"),
        ] {
            let file = source.join("include").join(name);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, text).unwrap();
        }
        let beside = Headers::find(None, &toolkit).unwrap().unwrap();
        assert_eq!(beside.what.version, PINNED[0]);
        assert_eq!(Headers::find(Some(&source), &toolkit).unwrap().unwrap(), beside);
        assert_eq!(Headers::find(Some(&source.join("include")), &toolkit).unwrap().unwrap(), beside);
        std::fs::write(source.join("include/cute/atom/mma.hpp"), "int y;\n").unwrap();
        assert_ne!(Headers::find(None, &toolkit).unwrap().unwrap().what.sha256, beside.what.sha256);
    }
}
