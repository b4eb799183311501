//! The one error type. Messages are lower-case and name the file, the tensor, the value found and the value wanted.

use std::fmt::Write;
use std::path::{Path, PathBuf};

/// The library's result.
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong. Every variant ends a program with exit code 2.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused a file operation.
    #[error("cannot {action} {}: {cause}", shown(path))]
    Io {
        /// What was tried: `open`, `read`, `write` ...
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// A file is not what its name says: broken JSON, a lying header, an index that contradicts its shards.
    #[error("{}: {}", shown(file), printable(reason))]
    BadFile {
        /// The file.
        file: PathBuf,
        /// What is wrong, what was wanted.
        reason: String,
    },
    /// A tensor has a wrong type, shape, position or value.
    #[error("{}: tensor {}: {}", shown(file), printable(tensor), printable(reason))]
    BadTensor {
        /// The file that holds the tensor.
        file: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// What is wrong, what was wanted.
        reason: String,
    },
    /// A tensor that the configuration implies is in no file.
    #[error("{}: tensor {} is missing: {}", shown(dir), printable(tensor), printable(reason))]
    MissingTensor {
        /// The checkpoint's folder.
        dir: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Who wants it.
        reason: String,
    },
    /// The job cannot succeed as asked; found in the plan, before any data was read. Its lines stand as they are: a compiler's message has several.
    #[error("{}", lines(.0))]
    Refused(String),
    /// The destination's file system is too small.
    #[error("{}: not enough room: {needed} bytes are needed, {available} are free", shown(dir))]
    NoSpace {
        /// The folder that was to be written.
        dir: PathBuf,
        /// Bytes of the whole output.
        needed: u64,
        /// Bytes free for this user.
        available: u64,
    },
    /// The hub did not give what was asked for.
    #[error("{}: {}", printable(repo), printable(reason))]
    Hub {
        /// Repository id with its revision.
        repo: String,
        /// What happened and what to do.
        reason: String,
    },
    /// The operating system starts no thread.
    #[error(
        "cannot start a thread: {0}; a limit on processes (ulimit -u, or a container's) or on memory may be too low"
    )]
    Thread(std::io::Error),
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
    #[error("{}: {}", printable(origin), printable(reason))]
    BadManifest {
        /// Where it came from.
        origin: String,
        /// What is wrong.
        reason: String,
    },
}

/// `text` in one line that moves no cursor and colours nothing, whatever it holds: control characters, and what ends a line or turns its
/// direction, are written as Rust escapes them. Names and values of files that strangers wrote go through this.
pub fn printable(text: &str) -> String {
    escaped(text, |_| false)
}

/// The same, but lines stay lines.
fn lines(text: &str) -> String {
    escaped(text, |c| c == '\n')
}

fn shown(path: &Path) -> String {
    printable(&path.to_string_lossy())
}

fn escaped(text: &str, stays: impl Fn(char) -> bool) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        let moves =
            c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if moves && !stays(c) {
            let _ = write!(out, "{}", c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
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
        matches!(self, Self::Io { .. } | Self::NoSpace { .. } | Self::Thread(_) | Self::Fault(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_one_line_whatever_the_input_holds() {
        let nasty = "a\nb\u{1b}[31m\tc\u{202e}d\u{85}";
        let all = [
            Error::file(nasty, nasty),
            Error::tensor(Path::new(nasty), nasty, nasty),
            Error::MissingTensor { dir: nasty.into(), tensor: nasty.into(), reason: nasty.into() },
            Error::io("read", nasty)(std::io::Error::other("broken")),
            Error::NoSpace { dir: nasty.into(), needed: 1, available: 0 },
            Error::Hub { repo: nasty.into(), reason: nasty.into() },
            Error::BadManifest { origin: nasty.into(), reason: nasty.into() },
        ];
        for error in all {
            let text = error.to_string();
            assert!(!text.chars().any(char::is_control) && !text.contains('\u{202e}'), "{text:?}");
            assert!(text.contains(r"a\nb\u{1b}[31m\tc\u{202e}d\u{85}"), "{text}");
        }
        assert_eq!(Error::Refused("one\ntwo\u{1b}".into()).to_string(), "one\ntwo\\u{1b}");
    }
}
