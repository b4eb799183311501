//! Rows of f32 -> columns of a stored float type, and two strings of units into one: how experts get into fused tensors.

use half::f16;

use crate::formats::float::{Float, round_bf16};
use crate::ops::for_this_cpu;

/// Rows and columns of a tile: both of its sides stay in the first cache.
const TILE: usize = 32;

for_this_cpu! {
    /// `w`, finite f32 [R, `columns`], as numbers of type `float` [columns, R], little-endian, into `out`.
    pub fn transposed(float: Float, w: &[f32], columns: usize, out: &mut [u8]) = transposed_body
}

for_this_cpu! {
    /// Units of `unit` bytes, one of `a`, one of `b` and so on, into `out`; `a` and `b` have the same length.
    pub fn interleave(unit: usize, a: &[u8], b: &[u8], out: &mut [u8]) = interleave_body
}

#[inline(always)]
fn transposed_body(float: Float, w: &[f32], columns: usize, out: &mut [u8]) {
    match float {
        Float::Bf16 => tiles(w, columns, out, |v| ((round_bf16(v).to_bits() >> 16) as u16).to_le_bytes()),
        Float::F16 => tiles(w, columns, out, |v| f16::from_f32(v).to_le_bytes()),
        Float::F32 => tiles(w, columns, out, f32::to_le_bytes),
    }
}

#[inline(always)]
fn tiles<const N: usize>(w: &[f32], columns: usize, out: &mut [u8], convert: impl Fn(f32) -> [u8; N]) {
    let (rows, out) = (w.len() / columns, out.as_chunks_mut::<N>().0);
    for first in (0..rows).step_by(TILE) {
        let last = rows.min(first + TILE);
        for left in (0..columns).step_by(TILE) {
            for c in left..columns.min(left + TILE) {
                let line = &mut out[c * rows + first..c * rows + last];
                for (o, r) in line.iter_mut().zip(first..last) {
                    *o = convert(w[r * columns + c]);
                }
            }
        }
    }
}

#[inline(always)]
fn interleave_body(unit: usize, a: &[u8], b: &[u8], out: &mut [u8]) {
    match unit {
        2 => pairs::<2>(a, b, out),
        4 => pairs::<4>(a, b, out),
        _ => {
            for ((two, a), b) in out.chunks_exact_mut(2 * unit).zip(a.chunks_exact(unit)).zip(b.chunks_exact(unit)) {
                two[..unit].copy_from_slice(a);
                two[unit..].copy_from_slice(b);
            }
        }
    }
}

#[inline(always)]
fn pairs<const N: usize>(a: &[u8], b: &[u8], out: &mut [u8]) {
    let twos = out.as_chunks_mut::<N>().0.as_chunks_mut::<2>().0;
    for ((two, &a), &b) in twos.iter_mut().zip(a.as_chunks::<N>().0).zip(b.as_chunks::<N>().0) {
        *two = [a, b];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_number_is_where_its_row_and_column_say(
            rows in 1usize..70,
            columns in 1usize..70,
            float in prop_oneof![Just(Float::Bf16), Just(Float::F16), Just(Float::F32)],
        ) {
            let w: Vec<f32> = (0..rows * columns).map(|i| float.round((i as f32 * 0.37).sin())).collect();
            let mut bytes = vec![0; w.len() * float.size()];
            transposed(float, &w, columns, &mut bytes);
            let mut values = vec![0f32; w.len()];
            float.read(&bytes, &mut values);
            for (i, v) in values.into_iter().enumerate() {
                prop_assert_eq!(v, w[i % rows * columns + i / rows]);
            }
        }

        #[test]
        fn units_alternate(unit in 1usize..9, n in 0usize..50) {
            let a: Vec<u8> = (0..unit * n).map(|i| i as u8).collect();
            let b: Vec<u8> = a.iter().map(|v| !v).collect();
            let mut out = vec![0; 2 * a.len()];
            interleave(unit, &a, &b, &mut out);
            for (i, two) in out.chunks_exact(2 * unit).enumerate() {
                prop_assert_eq!(&two[..unit], &a[i * unit..][..unit]);
                prop_assert_eq!(&two[unit..], &b[i * unit..][..unit]);
            }
        }
    }
}
