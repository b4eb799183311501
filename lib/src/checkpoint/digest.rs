//! SHA-256 of files.

use std::io::Read;
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
    let (mut hash, mut buffer, mut bytes) = (Sha256::new(), vec![0u8; 1 << 18], 0);
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok((bytes, hex(&hash.finalize()))),
            Ok(n) => {
                hash.update(&buffer[..n]);
                bytes += n as u64;
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::io("read", path)(e)),
        }
    }
}

/// Size and SHA-256 of the file `dir/name`.
pub fn record(dir: &Path, name: &str) -> Result<FileRecord> {
    let (bytes, sha256) = of_file(&dir.join(name))?;
    Ok(FileRecord { name: name.to_owned(), bytes, sha256 })
}
