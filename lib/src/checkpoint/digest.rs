//! SHA-256 of files.

use std::io::{Read, Seek};
use std::path::Path;

use sha2::{Digest, Sha256};

use super::files;
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

/// Length and SHA-256 of a file, read piece by piece: a map would count as this process's memory.
pub fn of_file(path: &Path) -> Result<(u64, String)> {
    let mut file = files::open(path)?;
    let hash = of_reader::<Sha256>(&mut file, &[]).map_err(Error::io("read", path))?;
    let bytes = file.stream_position().map_err(Error::io("read", path))?;
    Ok((bytes, hash))
}

/// The hash of `prefix` and of everything behind it that `file` gives, in hexadecimal.
pub fn of_reader<D: Digest>(mut file: impl Read, prefix: &[u8]) -> std::io::Result<String> {
    let (mut hash, mut buffer) = (D::new_with_prefix(prefix), vec![0u8; 1 << 18]);
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hex(&hash.finalize())),
            Ok(n) => hash.update(&buffer[..n]),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// Size and SHA-256 of the file `dir/name`.
pub fn record(dir: &Path, name: &str) -> Result<FileRecord> {
    let (bytes, sha256) = of_file(&dir.join(name))?;
    Ok(FileRecord { name: name.to_owned(), bytes, sha256 })
}
