//! SHA-256 of files.

use std::fs::File;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::manifest::FileRecord;

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut s, b| {
        let _ = write!(s, "{b:02x}");
        s
    })
}

/// SHA-256 of `bytes`, in hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Maps a whole file for reading. An empty file gives an empty map.
pub fn map(path: &Path) -> Result<memmap2::Mmap> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    // SAFETY: the map is only ever read as bytes. Another process that truncates a checkpoint while it is read
    // would end this one with SIGBUS; safetensors' own readers accept the same.
    let map = unsafe { memmap2::MmapOptions::new().map(&file) }.map_err(Error::io("map", path))?;
    Ok(map)
}

/// Size and SHA-256 of the file `dir/name`.
pub fn record(dir: &Path, name: &str) -> Result<FileRecord> {
    let path = dir.join(name);
    let map = map(&path)?;
    Ok(FileRecord { name: name.to_owned(), bytes: map.len() as u64, sha256: sha256(&map) })
}
