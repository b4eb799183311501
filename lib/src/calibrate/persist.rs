//! Hidden states on the disk, so that an interrupted run goes on where it was. Two files take turns: the one that the journal
//! speaks of is never the one that is being written. Nobody waits for the disk: what a killed process wrote is there, and
//! what a power cut tore is known by its hash.

use std::fs::OpenOptions;
use std::io::{BufReader, Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::checkpoint::{destination, digest, files};
use crate::error::{Error, Result};
use crate::evaluate::States;

/// How the files' names begin.
pub const PREFIX: &str = "hidden-states-";

/// Bytes in front of the states: the layer's number and a SHA-256.
const HEAD: usize = 8 + 32;

/// The two files.
pub struct Saved {
    files: [PathBuf; 2],
    fingerprint: String,
}

impl Saved {
    /// In `folder`, for the run that writes `partial` and has this fingerprint. The names depend on `partial` alone, so
    /// that a run which starts over takes the files of the one that was given up.
    pub fn new(folder: &Path, partial: &Path, fingerprint: &str) -> Self {
        let whole = std::path::absolute(partial).unwrap_or_else(|_| partial.to_path_buf());
        let key = digest::sha256(whole.as_os_str().as_encoded_bytes());
        let name = |i: usize| folder.join(format!("{PREFIX}{}.{i}", &key[..16]));
        Self { files: [name(0), name(1)], fingerprint: fingerprint.into() }
    }

    /// Of these states, kept by this run.
    fn hash(&self, states: &[f32]) -> [u8; 32] {
        Sha256::new().chain_update(&self.fingerprint).chain_update(bytemuck::cast_slice(states)).finalize().into()
    }

    /// Keeps the states in front of `layer`.
    pub fn save(&self, layer: usize, states: &[f32]) -> Result<()> {
        let path = &self.files[layer % 2];
        let mut file = files::open_own(path, OpenOptions::new().create(true).write(true))?;
        let mut write = || {
            file.set_len(0)?;
            file.write_all(&(layer as u64).to_le_bytes())?;
            file.write_all(&self.hash(states))?;
            file.write_all(bytemuck::cast_slice(states))
        };
        write().map_err(Error::io("write hidden states to", path))
    }

    /// Reads the states in front of `layer`, a row at a time; false where they are not there as they were kept.
    pub fn load(&self, layer: usize, states: &mut States) -> Result<bool> {
        let path = &self.files[layer % 2];
        if !files::is_there(path)? {
            return Ok(false);
        }
        let file = files::open(path)?;
        let read = Error::io("read hidden states from", path);
        if file.metadata().map_err(read)?.len() != (HEAD + 4 * states.len()) as u64 {
            return Ok(false);
        }
        let mut file = BufReader::new(file);
        let mut head = [0u8; HEAD];
        file.read_exact(&mut head).map_err(Error::io("read hidden states from", path))?;
        for row in 0..states.rows() {
            let row = bytemuck::cast_slice_mut(states.row_mut(row));
            file.read_exact(row).map_err(Error::io("read hidden states from", path))?;
        }
        Ok(head[..8] == (layer as u64).to_le_bytes() && head[8..] == self.hash(states))
    }

    /// The error for states that a run needs to go on and does not have.
    pub fn gone(&self, layer: usize) -> Error {
        let cause = "the interrupted run's hidden states are not there as it kept them; give the --offload-folder that it \
                     had, or --force to start over";
        // No bad input: nothing of the unfinished output may go for it.
        Error::io("resume from", &self.files[layer % 2])(std::io::Error::other(cause))
    }

    /// Bytes that both take of their disk.
    pub fn taken(&self) -> u64 {
        self.files.iter().map(|f| destination::taken(f)).sum()
    }

    /// Removes both.
    pub fn remove(&self) -> Result<()> {
        for path in &self.files {
            match std::fs::remove_file(path) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io("remove", path)(e)),
                _ => {}
            }
        }
        Ok(())
    }
}
