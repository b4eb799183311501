//! AWQ (Lin et al. 2023, arXiv 2306.00978): input channels that matter are scaled up before rounding, and what feeds them
//! down. The scales are s = x^r / w^(1 - r), x the mean |input| and w the mean weight of a channel beside its group's
//! greatest; the exponent r is the one whose rounding costs the outputs least.

use rayon::prelude::*;

use super::rtn::Target;
use super::scales;
use crate::formats::Params;
use crate::ops::matmul::{Dense, Packed, matmul};
use crate::ops::{math, round};
use crate::recipe::{Awq, Observer};

/// Rows that read the channels.
pub struct Reader {
    /// f32 [rows, columns].
    pub w: Vec<f32>,
    /// How they will be rounded.
    pub target: Target,
}

/// The scales [columns] that cost least, and by what share of the unscaled cost they lower it. `mean` [columns] is the mean
/// |input|, `gram` [columns, columns] the sum of x x^T, `exact` replaces scales by near ones that the norm in front can take
/// up exactly.
pub fn search(
    readers: &[Reader],
    mean: &[f32],
    gram: &[f32],
    settings: &Awq,
    exact: impl Fn(&mut [f32]),
) -> (Vec<f32>, f64) {
    let columns = mean.len();
    let weights = channel_weights(readers, columns);
    let unscaled = cost(readers, &vec![1.0; columns], gram);
    let mut best = (unscaled, vec![1.0; columns]);
    let duo = if settings.duo_scaling { &[true, false][..] } else { &[false] };
    for &duo in duo {
        for step in 0..settings.n_grid {
            let r = step as f32 / settings.n_grid as f32;
            let mut s: Vec<f32> = mean
                .iter()
                .zip(&weights)
                .map(|(x, w)| power(*x, r) / if duo { power(*w, 1.0 - r) + 1e-4 } else { 1.0 })
                .map(|s| s.clamp(1e-4, 1e4))
                .collect();
            let (least, most) = s.iter().fold((f32::MAX, f32::MIN), |(a, b), &s| (a.min(s), b.max(s)));
            let middle = (least * most).sqrt();
            s.iter_mut().for_each(|s| *s /= middle);
            exact(&mut s);
            let found = cost(readers, &s, gram);
            if found < best.0 {
                best = (found, s);
            }
        }
    }
    let gain = if unscaled > 0.0 { 1.0 - best.0 / unscaled } else { 0.0 };
    (best.1, gain)
}

/// x^r for x >= 0, of our own `exp` and `log`: the same bits everywhere.
fn power(x: f32, r: f32) -> f32 {
    if x <= 0.0 { if r == 0.0 { 1.0 } else { 0.0 } } else { math::exp(r * libm::logf(x)) }
}

/// Mean over all rows of |w| beside the greatest of its group.
fn channel_weights(readers: &[Reader], columns: usize) -> Vec<f32> {
    let (mut sums, mut rows) = (vec![0f64; columns], 0usize);
    for reader in readers {
        for row in reader.w.chunks_exact(columns) {
            for (w, sums) in row.chunks(reader.target.group).zip(sums.chunks_mut(reader.target.group)) {
                let (low, high) = round::extremes(w);
                let greatest = high.max(-low) + 1e-6;
                sums.iter_mut().zip(w).for_each(|(s, w)| *s += f64::from(w.abs() / greatest));
            }
            rows += 1;
        }
    }
    sums.iter().map(|s| (s / rows.max(1) as f64) as f32).collect()
}

/// The squared error of all outputs, summed over tokens: tr(D G D^T) with D = Q(W s) / s - W.
fn cost(readers: &[Reader], s: &[f32], gram: &[f32]) -> f64 {
    let columns = s.len();
    let one = |reader: &Reader| {
        let target = reader.target;
        let mut d = reader.w.clone();
        d.par_chunks_exact_mut(columns).for_each(|row| row.iter_mut().zip(s).for_each(|(w, s)| *w *= s));
        let params = scales::fit(&d, columns, target, Observer::Minmax, None);
        let round_off = |((d, w), params): ((&mut [f32], &[f32]), &[Params])| {
            let (scaled, mut unused) = (d.to_vec(), vec![0i8; target.group]);
            for ((scaled, d), p) in scaled.chunks(target.group).zip(d.chunks_mut(target.group)).zip(params) {
                round::values(scaled, (target.format, target.float, true), *p, &mut unused[..scaled.len()], d);
            }
            d.iter_mut().zip(w).zip(s).for_each(|((d, w), s)| *d = *d / s - w);
        };
        d.par_chunks_exact_mut(columns)
            .zip(reader.w.par_chunks_exact(columns))
            .zip(params.par_chunks_exact(target.groups(columns)))
            .for_each(round_off);
        let rows = d.len() / columns;
        let mut through = vec![0f32; d.len()];
        // The sum is symmetric, so it is its own transpose.
        matmul(&Packed::new(&d, rows, columns), &Dense { values: gram, shape: (columns, columns) }, None, &mut through);
        d.iter().zip(&through).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()
    };
    readers.iter().map(one).sum()
}
