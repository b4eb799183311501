//! What an unfinished run has finished: one JSON line a group, appended once the group's bytes are on the disk.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};

#[derive(Serialize, Deserialize)]
struct Head {
    fingerprint: String,
}

#[derive(Serialize, Deserialize)]
struct Line {
    group: usize,
    result: Value,
}

/// Finished groups, each with the result that was noted.
pub type Finished = Vec<(usize, Value)>;

/// An append-only record beside the unfinished output.
pub struct Journal {
    path: PathBuf,
    file: File,
}

impl Journal {
    /// Opens or starts the journal at `path` for the job `fingerprint`; gives the finished groups with their results.
    /// `None` where the journal there belongs to another job.
    pub fn open(path: &Path, fingerprint: &str) -> Result<Option<(Self, Finished)>> {
        let text = match std::fs::read(path) {
            // Bytes that are no text are no line of ours; the rest of the file decides.
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(Error::io("read", path)(e)),
        };
        let mut lines = text.split_inclusive('\n').filter(|l| l.ends_with('\n'));
        let head = lines.next().map(serde_json::from_str::<Head>);
        let fresh = match head {
            Some(Ok(head)) if head.fingerprint == fingerprint => false,
            Some(_) => return Ok(None),
            None => true,
        };
        let done: Finished =
            lines.map_while(|l| serde_json::from_str::<Line>(l).ok()).map(|l| (l.group, l.result)).collect();
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(Error::io("open", path))?;
        // A kill may have cut the last line; what follows must start on its own.
        let whole = text.rfind('\n').map_or(0, |at| at + 1);
        file.set_len(whole as u64).map_err(Error::io("write", path))?;
        let mut journal = Self { path: path.to_path_buf(), file };
        if fresh {
            journal.line(&Head { fingerprint: fingerprint.to_owned() })?;
        }
        Ok(Some((journal, done)))
    }

    /// Forgets every group, durably.
    pub fn restart(&mut self, fingerprint: &str) -> Result<()> {
        self.file.set_len(0).map_err(Error::io("write", &self.path))?;
        self.line(&Head { fingerprint: fingerprint.to_owned() })
    }

    /// Notes that `group` is finished, durably.
    pub fn finished(&mut self, group: usize, result: Value) -> Result<()> {
        self.line(&Line { group, result })
    }

    fn line(&mut self, line: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_string(line).expect("plain data serializes");
        text.push('\n');
        self.file.write_all(text.as_bytes()).map_err(Error::io("write", &self.path))?;
        self.file.sync_data().map_err(Error::io("sync", &self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_line_is_forgotten_and_another_job_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j");
        let (mut j, done) = Journal::open(&path, "a").unwrap().unwrap();
        assert!(done.is_empty());
        j.finished(3, Value::from(1)).unwrap();
        std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"group\":4,\"res").unwrap();
        let (mut j, done) = Journal::open(&path, "a").unwrap().unwrap();
        assert_eq!(done, [(3, Value::from(1))]);
        j.finished(5, Value::Null).unwrap();
        let (_, done) = Journal::open(&path, "a").unwrap().unwrap();
        assert_eq!(done, [(3, Value::from(1)), (5, Value::Null)]);
        assert!(Journal::open(&path, "b").unwrap().is_none());
    }
}
