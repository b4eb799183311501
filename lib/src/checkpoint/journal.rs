//! What an unfinished run has finished: one JSON line a group, appended once the group's bytes are on the disk. A line
//! carries its own checksum and one of the group's bytes, so that a run which resumes believes neither the journal nor the
//! shards beyond what it can check.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use super::files;
use crate::error::{Error, Result};

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    fingerprint: String,
}

/// A finished group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Finished {
    /// Its number.
    pub group: usize,
    /// The checksum of its tensors' bytes, in the order of the layout.
    pub bytes: String,
    /// What its units found.
    pub result: Value,
}

/// A line: an entry as it was written, and the XXH3 of that text.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    entry: Box<RawValue>,
    xxh3: String,
}

fn checksum(text: &str) -> String {
    format!("{:016x}", twox_hash::XxHash3_64::oneshot(text.as_bytes()))
}

fn line_of(entry: &impl Serialize) -> String {
    let text = serde_json::to_string(entry).expect("plain data serializes");
    let xxh3 = checksum(&text);
    let entry = RawValue::from_string(text).expect("it was just made");
    let mut line = serde_json::to_string(&Line { entry, xxh3 }).expect("plain data serializes");
    line.push('\n');
    line
}

/// The entry of a line; `None` where the line is not as it was written.
fn entry_of<T: for<'de> Deserialize<'de>>(line: &[u8]) -> Option<T> {
    let line: Line = serde_json::from_slice(line).ok()?;
    (checksum(line.entry.get()) == line.xxh3).then(|| serde_json::from_str(line.entry.get()).ok())?
}

/// An append-only record beside the unfinished output.
pub struct Journal {
    path: PathBuf,
    file: File,
    fingerprint: String,
    /// Groups that are in it.
    groups: BTreeSet<usize>,
}

impl Journal {
    /// Opens or starts the journal at `path` for the job `fingerprint`; gives the finished groups with their results.
    /// `None` where the journal there belongs to another job. What follows the first damaged line is cut off.
    pub fn open(path: &Path, fingerprint: &str) -> Result<Option<(Self, Vec<Finished>)>> {
        let text = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(Error::io("read", path)(e)),
        };
        let mut lines = text.split_inclusive(|b| *b == b'\n').filter(|l| l.ends_with(b"\n"));
        let mut whole = 0;
        let fresh = match lines.next() {
            Some(line) => match entry_of::<Head>(line) {
                Some(head) if head.fingerprint == fingerprint => {
                    whole = line.len();
                    false
                }
                _ => return Ok(None),
            },
            None => true,
        };
        let (mut done, mut groups) = (Vec::new(), BTreeSet::new());
        for line in lines {
            let Some(entry) = entry_of::<Finished>(line) else { break };
            if !groups.insert(entry.group) {
                break;
            }
            whole += line.len();
            done.push(entry);
        }
        let file = files::open_own(path, OpenOptions::new().create(true).append(true))?;
        // A kill may have cut the last line; what follows must start on its own.
        file.set_len(whole as u64).map_err(Error::io("write", path))?;
        let mut journal = Self { path: path.to_path_buf(), file, fingerprint: fingerprint.to_owned(), groups };
        if fresh {
            journal.append(&line_of(&Head { fingerprint: fingerprint.to_owned() }))?;
        }
        Ok(Some((journal, done)))
    }

    /// Forgets every group but these, durably. A kill in between leaves an empty journal, which is a run that starts over.
    pub fn keep(&mut self, groups: &[Finished]) -> Result<()> {
        self.file.set_len(0).map_err(Error::io("write", &self.path))?;
        let head = line_of(&Head { fingerprint: self.fingerprint.clone() });
        self.append(&std::iter::once(head).chain(groups.iter().map(line_of)).collect::<String>())?;
        self.groups = groups.iter().map(|g| g.group).collect();
        Ok(())
    }

    /// Notes a finished group, durably.
    ///
    /// # Errors
    /// [`Error::Fault`] where it is noted already: whoever closes a group twice has closed it too early once.
    pub fn finished(&mut self, entry: &Finished) -> Result<()> {
        if !self.groups.insert(entry.group) {
            return Err(Error::Fault(format!("group {} is finished a second time", entry.group)));
        }
        self.append(&line_of(entry))
    }

    fn append(&mut self, text: &str) -> Result<()> {
        self.file.write_all(text.as_bytes()).map_err(Error::io("write", &self.path))?;
        self.file.sync_data().map_err(Error::io("sync", &self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(group: usize, result: impl Into<Value>) -> Finished {
        Finished { group, bytes: "0f".into(), result: result.into() }
    }

    #[test]
    fn a_cut_line_is_forgotten_and_another_job_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j");
        let (mut j, done) = Journal::open(&path, "a").unwrap().unwrap();
        assert!(done.is_empty());
        j.finished(&entry(3, 1)).unwrap();
        std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"entry\":{\"group").unwrap();
        let (mut j, done) = Journal::open(&path, "a").unwrap().unwrap();
        assert_eq!(done, [entry(3, 1)]);
        j.finished(&entry(5, 0.1)).unwrap();
        let (_, done) = Journal::open(&path, "a").unwrap().unwrap();
        assert_eq!(done, [entry(3, 1), entry(5, 0.1)]);
        assert!(Journal::open(&path, "b").unwrap().is_none());
    }

    #[test]
    fn a_group_is_finished_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j");
        let (mut j, _) = Journal::open(&path, "a").unwrap().unwrap();
        j.finished(&entry(3, 1)).unwrap();
        assert!(matches!(j.finished(&entry(3, 2)), Err(Error::Fault(_))));
        let (mut j, _) = Journal::open(&path, "a").unwrap().unwrap();
        assert!(matches!(j.finished(&entry(3, 2)), Err(Error::Fault(_))), "not in a later run either");
        j.keep(&[]).unwrap();
        j.finished(&entry(3, 2)).unwrap();
    }

    #[test]
    fn whatever_byte_changes_only_lines_before_it_count() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j");
        let (mut j, _) = Journal::open(&path, "a").unwrap().unwrap();
        let all = [entry(0, "x"), entry(1, 0.25), entry(2, Value::Null)];
        all.iter().for_each(|e| j.finished(e).unwrap());
        let good = std::fs::read(&path).unwrap();
        let ends: Vec<usize> = (0..good.len()).filter(|&i| good[i] == b'\n').collect();
        for at in 0..good.len() {
            for bit in [1, 0x20, 0x80] {
                let mut bad = good.clone();
                bad[at] ^= bit;
                std::fs::write(&path, bad).unwrap();
                let line = ends.iter().filter(|&&e| e < at).count();
                match Journal::open(&path, "a").unwrap() {
                    None => assert_eq!(line, 0, "byte {at}"),
                    // A head that lost its newline is a head that was being written.
                    Some((_, done)) if line == 0 => assert!(done.is_empty() && at == ends[0], "byte {at}"),
                    Some((_, done)) => assert_eq!(done, all[..line - 1], "byte {at}"),
                }
            }
        }
    }
}
