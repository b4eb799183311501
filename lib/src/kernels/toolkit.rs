//! The CUDA compiler.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// A compiler that answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Toolkit {
    /// Its real path: behind a symbolic link it would not find its headers.
    pub nvcc: PathBuf,
    /// Such as "13.0.88".
    pub version: String,
}

/// The pinned compiler, which the committed hashes are of.
pub const PINNED: &str = "13.0.88";

impl Toolkit {
    /// The compiler at `named`, or the first of CUDA_HOME's, that in PATH, and one that pip has installed into an active virtual
    /// environment.
    ///
    /// # Errors
    /// [`Error::Refused`] where there is none, with the places that were looked at, or where it does not answer.
    pub fn find(named: Option<&Path>) -> Result<Self> {
        if let Some(path) = named {
            return Self::at(path);
        }
        let places = places();
        match places.iter().find_map(|(_, path)| path.as_deref()) {
            Some(path) => Self::at(path),
            None => {
                let looked: Vec<&str> = places.iter().map(|(place, _)| &place[..]).collect();
                Err(Error::Refused(format!(
                    "no CUDA compiler: looked in {}. Install CUDA {PINNED}, or `pip install --no-deps nvidia-cuda-nvcc=={PINNED} \
                     nvidia-nvvm=={PINNED} nvidia-cuda-crt=={PINNED} nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85` in a \
                     virtual environment, or say --nvcc PATH. It needs g++ beside it",
                    looked.join(", ")
                )))
            }
        }
    }

    fn at(path: &Path) -> Result<Self> {
        let nvcc = path.canonicalize().map_err(Error::io("find the compiler", path))?;
        let text = duct::cmd!(&nvcc, "--version").stderr_to_stdout().unchecked().read();
        let text = text.map_err(Error::io("run", &nvcc))?;
        // "Cuda compilation tools, release 13.0, V13.0.88"
        let version = text.split(", V").nth(1).and_then(|v| v.split_whitespace().next());
        match version {
            Some(version) => Ok(Self { nvcc, version: version.to_owned() }),
            None => Err(Error::Refused(format!(
                "{} is no CUDA compiler: to --version it says {:?}",
                nvcc.display(),
                text.lines().next().unwrap_or_default()
            ))),
        }
    }
}

/// Places that a compiler is looked for in, by the name that people know, and the one that is there.
fn places() -> Vec<(String, Option<PathBuf>)> {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let mut places = vec![match set("CUDA_HOME") {
        Some(home) => (format!("CUDA_HOME ({})", home.display()), Some(home.join("bin/nvcc")).filter(|p| p.is_file())),
        None => ("CUDA_HOME (not set)".into(), None),
    }];
    places.push(("PATH".into(), which::which("nvcc").ok()));
    if let Some(venv) = set("VIRTUAL_ENV") {
        let found = packages().into_iter().map(|site| site.join("nvidia/cu13/bin/nvcc")).find(|p| p.is_file());
        places.push((format!("the virtual environment {}", venv.display()), found));
    }
    places
}

/// The folders that an active virtual environment has its packages in.
pub fn packages() -> Vec<PathBuf> {
    let Some(venv) = std::env::var_os("VIRTUAL_ENV").filter(|v| !v.is_empty()) else { return Vec::new() };
    let pythons = std::fs::read_dir(PathBuf::from(venv).join("lib")).into_iter().flatten().flatten();
    let mut sites: Vec<PathBuf> = pythons.map(|e| e.path().join("site-packages")).filter(|p| p.is_dir()).collect();
    sites.sort();
    sites
}
