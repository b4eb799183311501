//! Exact numerics for one row of inputs, straight from codes: the sums of [`matmul`](crate::ops::matmul), to the bit, over values
//! that are in registers alone. More rows share what is decoded once, and go through `matmul`.

use rayon::prelude::*;

use super::view::View;
use crate::formats::float::Float;

/// Outputs of one piece of work.
const PIECE: usize = 64;
/// Codes that are worth waking a thread for.
const SERIAL: usize = 1 << 16;

/// `out` [out_features] = x W^T + bias, the weight's values rounded to `float`. False, and nothing is done, where there is no
/// kernel for it: for stored floats, which need none, and without AVX2.
pub fn row(view: &View, float: Float, x: &[f32], bias: Option<&[f32]>, out: &mut [f32]) -> bool {
    #[cfg(target_arch = "x86_64")]
    if !view.kind().is_float() && super::avx2::is_here() {
        assert_eq!((out.len(), x.len()), view.shape(), "the caller fits shapes to each other");
        assert!(bias.is_none_or(|b| b.len() == out.len()), "a bias has one value an output");
        let piece = |(i, out): (usize, &mut [f32])| {
            let first = i * PIECE;
            super::avx2::exact::outputs(view, float, x, first..first + out.len(), out);
            if let Some(bias) = bias {
                out.iter_mut().zip(&bias[first..]).for_each(|(o, b)| *o += b);
            }
        };
        if view.shape().0 * view.shape().1 < SERIAL {
            out.chunks_mut(PIECE).enumerate().for_each(piece);
        } else {
            out.par_chunks_mut(PIECE).enumerate().for_each(piece);
        }
        return true;
    }
    let _ = (view, float, x, bias, out);
    false
}
