//! The one error type. Messages are lower-case and name the file, the tensor, the value found and the value wanted.

use std::path::{Path, PathBuf};

/// The library's result.
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong. Every variant ends a program with exit code 2.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused a file operation.
    #[error("cannot {action} {}: {cause}", path.display())]
    Io {
        /// What was tried: `open`, `read`, `write` ...
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// A file is not what its name says: broken JSON, a lying header, an index that contradicts its shards.
    #[error("{}: {reason}", file.display())]
    BadFile {
        /// The file.
        file: PathBuf,
        /// What is wrong, what was wanted.
        reason: String,
    },
    /// A tensor has a wrong type, shape, position or value.
    #[error("{}: tensor {tensor}: {reason}", file.display())]
    BadTensor {
        /// The file that holds the tensor.
        file: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// What is wrong, what was wanted.
        reason: String,
    },
    /// A tensor that the configuration implies is in no file.
    #[error("{}: tensor {tensor} is missing: {reason}", dir.display())]
    MissingTensor {
        /// The checkpoint's folder.
        dir: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Who wants it.
        reason: String,
    },
    /// The job cannot succeed as asked; found in the plan, before any data was read.
    #[error("{0}")]
    Refused(String),
    /// The destination's file system is too small.
    #[error("{}: not enough room: {needed} bytes are needed, {available} are free", dir.display())]
    NoSpace {
        /// The folder that was to be written.
        dir: PathBuf,
        /// Bytes of the whole output.
        needed: u64,
        /// Bytes free for this user.
        available: u64,
    },
    /// The hub did not give what was asked for.
    #[error("{repo}: {reason}")]
    Hub {
        /// Repository id with its revision.
        repo: String,
        /// What happened and what to do.
        reason: String,
    },
    /// The CUDA driver, or cuBLAS, refused something.
    #[error("the GPU cannot {action}: {reason}")]
    Gpu {
        /// What was tried.
        action: String,
        /// What the driver said.
        reason: String,
    },
    /// The tool contradicts itself. What it had finished before stays.
    #[error("{0}; this is a fault of the tool, not of its input: please report it")]
    Fault(String),
    /// A manifest on standard input or in a folder cannot be used.
    #[error("{origin}: {reason}")]
    BadManifest {
        /// Where it came from.
        origin: String,
        /// What is wrong.
        reason: String,
    },
}

impl Error {
    /// Wraps an operating-system error with what was tried and where.
    pub fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |cause| Self::Io { action, path, cause }
    }

    /// A [`Error::BadFile`].
    pub fn file(file: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Self::BadFile { file: file.into(), reason: reason.into() }
    }

    /// A [`Error::BadTensor`].
    pub fn tensor(file: &Path, tensor: &str, reason: impl Into<String>) -> Self {
        Self::BadTensor { file: file.to_path_buf(), tensor: tensor.to_owned(), reason: reason.into() }
    }

    /// True where running the same command again could succeed and would resume: a full disk, a device error.
    /// Bad input stays bad.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Io { .. } | Self::NoSpace { .. } | Self::Fault(_))
    }
}
