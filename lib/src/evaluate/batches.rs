//! Sequences in batches that go through a layer together.

use std::ops::Range;

use crate::device::{Attention, Device};

/// Rows that go through a layer together: sequences, or pieces of one that is too long.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Batch {
    /// First row, counted through the whole text.
    pub(crate) first: usize,
    /// Position of each piece's first row in its sequence.
    pub(crate) starts: Vec<usize>,
    /// Rows of each piece.
    pub(crate) lengths: Vec<usize>,
}

impl Batch {
    pub(crate) fn rows(&self) -> Range<usize> {
        self.first..self.first + self.lengths.iter().sum::<usize>()
    }
}

/// Sequences of these lengths, cut into batches of at most `most` rows. A piece that goes on with a sequence is the first of
/// its batch.
pub(crate) fn batches(lengths: impl Iterator<Item = usize>, most: usize) -> Vec<Batch> {
    let mut all = vec![Batch::default()];
    let mut row = 0;
    for length in lengths {
        let mut start = 0;
        while start < length {
            let last = all.last_mut().expect("there is one from the beginning");
            let room = most - last.rows().len();
            // A sequence is not cut to fill a batch that others have begun.
            if room == 0 || (start == 0 && length > room && !last.lengths.is_empty()) {
                all.push(Batch { first: row, ..Batch::default() });
                continue;
            }
            let n = room.min(length - start);
            last.starts.push(start);
            last.lengths.push(n);
            (start, row) = (start + n, row + n);
        }
    }
    all
}

/// Caches for a batch: the one of a sequence that goes on from the batch before, and fresh ones.
pub(crate) fn caches<D: Device>(
    device: &D,
    attention: &Attention<D::Tensor>,
    batch: &Batch,
    past: Option<D::Cache>,
) -> Vec<D::Cache> {
    let going_on = past.filter(|_| batch.starts.first().is_some_and(|&s| s > 0));
    let fresh = batch.lengths.len() - usize::from(going_on.is_some());
    going_on.into_iter().chain((0..fresh).map(|_| device.cache(attention))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(lengths: &[usize], most: usize) -> Vec<(usize, Vec<usize>, Vec<usize>)> {
        let all = batches(lengths.iter().copied(), most);
        all.into_iter().map(|b| (b.first, b.starts, b.lengths)).collect()
    }

    #[test]
    fn batches_hold_whole_sequences_where_they_fit() {
        assert_eq!(cut(&[3, 4, 2], 10), [(0, vec![0, 0, 0], vec![3, 4, 2])]);
        assert_eq!(cut(&[3, 4, 2], 7), [(0, vec![0, 0], vec![3, 4]), (7, vec![0], vec![2])]);
        assert_eq!(cut(&[3, 4], 4), [(0, vec![0], vec![3]), (3, vec![0], vec![4])]);
        let long = [(0, vec![0], vec![2]), (2, vec![0], vec![4]), (6, vec![4], vec![4]), (10, vec![8, 0], vec![1, 3])];
        assert_eq!(cut(&[2, 9, 3], 4), long);
        assert_eq!(cut(&[1, 1], 1), [(0, vec![0], vec![1]), (1, vec![0], vec![1])]);
    }
}
