//! The parameters of every group of a matrix, fitted to its weights.

use rayon::prelude::*;

use super::rtn::Target;
use crate::formats::float::Float;
use crate::formats::ggml::Ggml;
use crate::formats::{NumberFormat, Params, ternary};
use crate::ops::round;
use crate::recipe::Observer;

/// Steps by which [`Observer::Mse`] shrinks a range, in hundredths of it; and how many it tries. compressed-tensors stops at
/// 0.8; the best scale of an int2 group lies lower.
const STEP: f32 = 0.02;
const STEPS: usize = 32;

/// Widest block that [`Blocks`] holds.
const WIDEST: usize = 128;

/// The blocks on the diagonal of a sum of x x^T [columns, columns], as wide as a group or a part of one.
pub struct Blocks {
    width: usize,
    /// f32 [columns / width, width, width].
    values: Vec<f32>,
}

impl Blocks {
    /// Those of `gram` for groups of this size.
    pub fn of(gram: &[f32], columns: usize, group: usize) -> Self {
        let width = (1..=WIDEST.min(group)).rev().find(|w| group.is_multiple_of(*w)).unwrap_or(1);
        let rows = gram.chunks_exact(columns).enumerate();
        let values = rows.flat_map(|(i, row)| &row[i / width * width..][..width]).copied().collect();
        Self { width, values }
    }
}

/// Parameters [rows, groups] for `w` [rows, columns], whole strips of rows that share them. Where `blocks` say what its inputs
/// look like, the error of outputs is searched, and not that of weights.
pub fn fit(w: &[f32], columns: usize, target: Target, observer: Observer, blocks: Option<&Blocks>) -> Vec<Params> {
    let (rows, groups) = (w.len() / columns, target.groups(columns));
    let strip = target.rows.min(rows).max(1);
    let mut params = vec![Params::default(); rows * groups];
    let strips = params.par_chunks_mut(strip * groups).zip(w.par_chunks(strip * columns));
    strips.for_each(|(params, w)| {
        let (first, others) = params.split_at_mut(groups);
        fit_rows(w, columns, target, observer, blocks, first);
        others.chunks_exact_mut(groups).for_each(|p| p.copy_from_slice(first));
    });
    params
}

/// Parameters [groups] for rows that share them.
pub fn fit_rows(
    w: &[f32],
    columns: usize,
    target: Target,
    observer: Observer,
    blocks: Option<&Blocks>,
    params: &mut [Params],
) {
    if target.rows == Target::ALL {
        // A scale for everything is that of the extremes; the rows here may be a part.
        params.fill(target.fit(target.extremes.0, target.extremes.1));
        return;
    }
    for (g, p) in params.iter_mut().enumerate() {
        let group = g * target.group..columns.min((g + 1) * target.group);
        let parts = w.chunks_exact(columns).map(|row| &row[group.clone()]);
        *p = exact(parts.clone(), target).unwrap_or_else(|| match (observer, blocks) {
            (Observer::Minmax, _) if matches!(target.format, NumberFormat::Ternary(_)) => {
                Params { scale: ternary::absmean(parts, target.float), zero_point: 0.0 }
            }
            (Observer::Minmax, _) => {
                let (min, max) = extremes(parts);
                target.fit(min, max)
            }
            (Observer::Mse, Some(blocks)) => least_for_outputs(parts, target, blocks, group.start),
            (Observer::Mse, None) => {
                let cost = |p| parts.clone().map(|w| round::cost(w, target.format, p, target.float)).sum();
                least(parts.clone(), target, false, cost)
            }
        });
    }
}

/// Least and greatest of all.
fn extremes<'w>(parts: impl Iterator<Item = &'w [f32]>) -> (f32, f32) {
    parts.map(round::extremes).reduce(|a, b| (a.0.min(b.0), a.1.max(b.1))).unwrap_or_default()
}

/// The parameters that cost the outputs of columns `first`.. least.
fn least_for_outputs<'w>(
    parts: impl Iterator<Item = &'w [f32]> + Clone,
    target: Target,
    blocks: &Blocks,
    first: usize,
) -> Params {
    let width = blocks.width;
    let (mut d, mut through) = (vec![0f32; width], vec![0f32; width]);
    let rule = (target.format, target.float, true);
    least(parts.clone(), target, true, |p| {
        let mut sum = 0.0;
        for w in parts.clone() {
            let grams = blocks.values[first * width..].chunks_exact(width * width);
            for (w, gram) in w.chunks_exact(width).zip(grams) {
                sum += round::output_cost(w, gram, rule, p, &mut d, &mut through);
            }
        }
        sum
    })
}

/// The power of two under which every weight is a code's value, where there is one: what MXFP4 held often fits FP8 and the
/// wider integers without loss. The least one that reaches the extremes is the only candidate: others cut or are coarser.
fn exact<'w>(mut parts: impl Iterator<Item = &'w [f32]> + Clone, target: Target) -> Option<Params> {
    let most = match target.format {
        NumberFormat::Int(int) if int.symmetric => int.qmax() as f32,
        NumberFormat::Float(table) => table.max(),
        _ => return None,
    };
    let least = |x: f32| f32::from_bits((x.to_bits() + 0x7f_ffff) & 0xff80_0000);
    let (min, max) = extremes(parts.clone());
    let absmax = max.max(-min);
    let scale = least(absmax / most);
    // Powers of two beyond this are subnormal, infinite, or not in every type.
    if !(1e-7..1e4).contains(&scale) {
        return None;
    }
    let p = Params { scale, zero_point: 0.0 };
    let fits = |&w: &f32| target.format.dequantize(target.format.quantize(w, p, Float::F32), p, Float::F32) == w;
    parts.all(|w| w.iter().all(fits)).then_some(p)
}

/// The shrunken range that costs least; the widest of equals. Of ternary formats a scale near the mean, of ggml's where `wide`.
fn least<'w>(
    parts: impl Iterator<Item = &'w [f32]>,
    target: Target,
    wide: bool,
    mut cost: impl FnMut(Params) -> f64,
) -> Params {
    if matches!(target.format, NumberFormat::Ternary(_)) || wide && is_ternary(target.format) {
        return least_ternary(parts, target, cost);
    }
    let (min, max) = extremes(parts);
    let mut best = (f64::INFINITY, target.fit(min, max));
    // A scale that is a power of two changes only with a power of two.
    let factors: Vec<f32> = match target.format {
        NumberFormat::Mx(_) | NumberFormat::Ggml(Ggml::Mxfp4) => vec![1.0, 0.5, 2.0],
        _ => (0..STEPS).map(|i| 1.0 - i as f32 * STEP).collect(),
    };
    for factor in factors {
        let p = target.fit(min * factor, max * factor);
        let cost = cost(p);
        if cost < best.0 {
            best = (cost, p);
        }
    }
    best.1
}

/// Whether codes are -1, 0 and 1.
pub fn is_ternary(format: NumberFormat) -> bool {
    matches!(format, NumberFormat::Ternary(_) | NumberFormat::Ggml(Ggml::Tq1_0 | Ggml::Tq2_0))
}

/// The scale between 0.7 and 2.25 times the mean of |w| that costs least: there lie the best ones of weights from evenly
/// spread to long-tailed.
fn least_ternary<'w>(
    parts: impl Iterator<Item = &'w [f32]>,
    target: Target,
    mut cost: impl FnMut(Params) -> f64,
) -> Params {
    let mean = ternary::absmean(parts, Float::F32);
    let candidates = (0..STEPS).map(|i| 0.7 + 0.05 * i as f32);
    let stored = |f: f32| {
        if matches!(target.format, NumberFormat::Ggml(_)) {
            mean * f
        } else {
            ternary::positive(mean * f, target.float)
        }
    };
    let candidates = candidates.map(|f| Params { scale: stored(f), zero_point: 0.0 });
    let best = candidates.map(|p| (cost(p), p)).min_by(|a, b| a.0.total_cmp(&b.0));
    best.expect("there are candidates").1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::NumberFormat;
    use crate::formats::int::IntFormat;
    use crate::ops::moments;
    use proptest::prelude::*;

    /// d G d^T over all columns, in f64.
    fn lost(w: &[f32], params: &[Params], target: Target, gram: &[f32]) -> f64 {
        let value = |(i, &w): (usize, &f32)| {
            let p = params[i / target.group];
            target.format.dequantize(target.format.quantize(w, p, Float::F32), p, target.float)
        };
        let d: Vec<f64> = w.iter().enumerate().map(|(i, w)| f64::from(value((i, w)) - w)).collect();
        let row = |(d_i, g): (&f64, &[f32])| d_i * g.iter().zip(&d).map(|(g, d)| f64::from(*g) * d).sum::<f64>();
        d.iter().zip(gram.chunks_exact(w.len())).map(row).sum()
    }

    proptest! {
        #[test]
        fn what_outputs_lose_is_what_is_searched(
            seed in prop::collection::vec(-1f32..1.0, 97),
            num_bits in 2u8..5,
            symmetric: bool,
            group in prop::sample::select(vec![32usize, 48, 160]),
        ) {
            let at = |i: usize| seed[(i * 31 + i / 97) % 97] * (1.0 + (i % 7) as f32);
            let (w, x): (Vec<f32>, Vec<f32>) = ((0..group).map(at).collect(), (0..300 * group).map(|i| at(i + 5)).collect());
            let mut gram = vec![0f32; group * group];
            moments::add_gram(&x, group, &mut gram);
            moments::mirror(&mut gram, group);
            let target = Target::new(NumberFormat::Int(IntFormat { num_bits, symmetric }), group, Float::F32);
            let blocks = Blocks::of(&gram, group, group);
            // Wider groups are searched block by block: what lies outside the blocks is not seen.
            for (at, g) in gram.iter_mut().enumerate() {
                if at / group / blocks.width != at % group / blocks.width {
                    *g = 0.0;
                }
            }
            let [outputs, weights, widest] = [(Observer::Mse, Some(&blocks)), (Observer::Mse, None), (Observer::Minmax, None)]
                .map(|(observer, blocks)| lost(&w, &fit(&w, group, target, observer, blocks), target, &gram));
            let bound = 1.0 + 1e-4;
            prop_assert!(outputs <= weights * bound && outputs <= widest * bound, "{} {} {}", outputs, weights, widest);
        }
    }
}
