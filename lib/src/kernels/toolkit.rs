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
        match places.iter().find(|(_, path)| path.is_file()) {
            Some((_, path)) => Self::at(path),
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

/// Places where a compiler may be, and what to call them.
fn places() -> Vec<(String, PathBuf)> {
    let mut places = Vec::new();
    if let Some(home) = std::env::var_os("CUDA_HOME").filter(|h| !h.is_empty()) {
        places.push((format!("CUDA_HOME ({})", Path::new(&home).display()), Path::new(&home).join("bin/nvcc")));
    } else {
        places.push(("CUDA_HOME (not set)".into(), PathBuf::new()));
    }
    places.push(("PATH".into(), which::which("nvcc").unwrap_or_default()));
    if let Some(venv) = std::env::var_os("VIRTUAL_ENV").filter(|h| !h.is_empty()) {
        let lib = Path::new(&venv).join("lib");
        let mut pythons: Vec<PathBuf> =
            std::fs::read_dir(&lib).into_iter().flatten().flatten().map(|e| e.path()).collect();
        pythons.sort();
        let wheel = |python: &PathBuf| python.join("site-packages/nvidia/cu13/bin/nvcc");
        let found = pythons.iter().map(wheel).find(|p| p.is_file()).unwrap_or_default();
        places.push((format!("the virtual environment {}", Path::new(&venv).display()), found));
    }
    places
}
