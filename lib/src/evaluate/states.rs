//! Hidden states of a whole text: in memory while they fit, else in a file that nobody else sees and that is gone with
//! this process.

use std::ops::{Deref, DerefMut, Range};
use std::path::Path;

use memmap2::MmapMut;

use crate::error::{Error, Result};

/// f32 [rows, width]: hidden states, or sums that are to be out of the way.
pub struct States {
    values: Values,
    width: usize,
}

enum Values {
    Memory(Vec<f32>),
    File(MmapMut),
}

impl States {
    /// Zeros; in a file in `folder` where they take more than `memory` bytes.
    pub fn new(rows: usize, width: usize, memory: u64, folder: &Path) -> Result<Self> {
        let bytes = (rows * width * 4) as u64;
        // A file of no bytes cannot be mapped.
        let values = if bytes <= memory || bytes == 0 {
            Values::Memory(vec![0.0; rows * width])
        } else {
            let file = tempfile::tempfile_in(folder).map_err(Error::io("write hidden states to", folder))?;
            // Blocks are reserved now: a full disk is an error here and no signal later.
            rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes)
                .map_err(|e| Error::io("reserve room for hidden states in", folder)(e.into()))?;
            // SAFETY: the file has no name, so nobody else changes it.
            let map = unsafe { MmapMut::map_mut(&file) };
            Values::File(map.map_err(Error::io("map hidden states in", folder))?)
        };
        Ok(Self { values, width })
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.len() / self.width
    }

    /// Some rows.
    pub fn get(&self, rows: Range<usize>) -> &[f32] {
        &self[rows.start * self.width..rows.end * self.width]
    }

    /// One row, to be changed.
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        let width = self.width;
        &mut self[row * width..][..width]
    }

    /// Replaces some rows.
    pub fn put(&mut self, rows: Range<usize>, values: &[f32]) {
        let width = self.width;
        self[rows.start * width..rows.end * width].copy_from_slice(values);
    }
}

impl Deref for States {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &self.values {
            Values::Memory(v) => v,
            Values::File(map) => bytemuck::cast_slice(map),
        }
    }
}

impl DerefMut for States {
    fn deref_mut(&mut self) -> &mut [f32] {
        match &mut self.values {
            Values::Memory(v) => v,
            Values::File(map) => bytemuck::cast_slice_mut(map),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_and_file_hold_the_same() {
        let dir = tempfile::tempdir().unwrap();
        for memory in [1 << 20, 0] {
            let mut states = States::new(10, 3, memory, dir.path()).unwrap();
            assert_eq!(matches!(states.values, Values::File(_)), memory == 0);
            states.put(4..6, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
            assert_eq!(states.get(3..6), [0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let missing = dir.path().join("missing");
        assert!(States::new(10, 3, 0, &missing).is_err());
    }
}
