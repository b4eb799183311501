//! Wanda (Sun et al. 2023, arXiv 2306.11695): the numbers of a row whose |w| times the norm of their inputs is least become
//! zero; the others stay.

use rayon::prelude::*;

use crate::recipe::Mask;

/// True for the numbers of `w` [rows, columns] that become zero. `squares` [columns] are the sums of squared inputs; `None`
/// goes by magnitude. The share of zeros is for [`Mask::Unstructured`].
pub fn zeros(w: &[f32], columns: usize, squares: Option<&[f32]>, mask: Mask, share: f64) -> Vec<bool> {
    let norms: Vec<f32> = squares.map_or_else(|| vec![1.0; columns], |s| s.iter().map(|s| s.sqrt()).collect());
    let mut zeros = vec![false; w.len()];
    let block = match mask {
        Mask::Structured { of, .. } => of,
        Mask::Unstructured => columns,
    };
    let one = |(w, zeros): (&[f32], &mut [bool])| {
        let mut ranked: Vec<usize> = Vec::with_capacity(block);
        for first in (0..columns).step_by(block) {
            let len = block.min(columns - first);
            let count = match mask {
                Mask::Structured { zeros, of } => zeros * len / of,
                Mask::Unstructured => (share * len as f64).round() as usize,
            };
            ranked.clear();
            ranked.extend(first..first + len);
            let score = |j: usize| w[j].abs() * norms[j];
            ranked.sort_by(|&a, &b| score(a).total_cmp(&score(b)).then(a.cmp(&b)));
            ranked[..count].iter().for_each(|&j| zeros[j] = true);
        }
    };
    w.par_chunks_exact(columns).zip(zeros.par_chunks_exact_mut(columns)).for_each(one);
    zeros
}
