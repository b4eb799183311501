//! The parameters of every group of a matrix, fitted to its weights.

use rayon::prelude::*;

use super::rtn::Target;
use crate::formats::float::Float;
use crate::formats::{NumberFormat, Params, fp8};
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

/// Parameters [rows, groups] for `w` [rows, columns]. Where `blocks` say what its inputs look like, the error of outputs is
/// searched, and not that of weights.
pub fn fit(w: &[f32], columns: usize, target: Target, observer: Observer, blocks: Option<&Blocks>) -> Vec<Params> {
    let groups = columns / target.group;
    let one = |(i, w): (usize, &[f32])| match (observer, blocks) {
        (Observer::Mse, Some(blocks)) => {
            exact(w, target).unwrap_or_else(|| least_for_outputs(w, target, blocks, i % groups * target.group))
        }
        _ => fit_group(w, target, observer),
    };
    w.par_chunks_exact(target.group).with_min_len(64).enumerate().map(one).collect()
}

/// Parameters for one group.
pub fn fit_group(w: &[f32], target: Target, observer: Observer) -> Params {
    if let Some(exact) = exact(w, target) {
        return exact;
    }
    match observer {
        Observer::Minmax => {
            let (min, max) = round::extremes(w);
            target.format.fit(min, max, target.float)
        }
        Observer::Mse => least(w, target, |p| round::cost(w, target.format, p, target.float)),
    }
}

/// The parameters that cost the outputs of columns `first`.. least.
fn least_for_outputs(w: &[f32], target: Target, blocks: &Blocks, first: usize) -> Params {
    let width = blocks.width;
    let (mut d, mut through) = (vec![0f32; width], vec![0f32; width]);
    let rule = (target.format, target.float, true);
    least(w, target, |p| {
        let grams = blocks.values[first * width..].chunks_exact(width * width);
        w.chunks_exact(width).zip(grams).map(|(w, g)| round::output_cost(w, g, rule, p, &mut d, &mut through)).sum()
    })
}

/// The power of two under which every weight is a code's value, where there is one: what MXFP4 held often fits FP8 and the
/// wider integers without loss. The least one that reaches the extremes is the only candidate: others cut or are coarser.
fn exact(w: &[f32], target: Target) -> Option<Params> {
    let most = match target.format {
        NumberFormat::Int(int) if int.symmetric => int.qmax() as f32,
        NumberFormat::Fp8 => fp8::MAX,
        _ => return None,
    };
    let least = |x: f32| f32::from_bits((x.to_bits() + 0x7f_ffff) & 0xff80_0000);
    let (min, max) = round::extremes(w);
    let absmax = max.max(-min);
    let scale = least(absmax / most);
    // Powers of two beyond this are subnormal, infinite, or not in every type.
    if !(1e-7..1e4).contains(&scale) {
        return None;
    }
    let p = Params { scale, zero_point: 0 };
    let fits = |&w: &f32| target.format.dequantize(target.format.quantize(w, p, Float::F32), p, Float::F32) == w;
    w.iter().all(fits).then_some(p)
}

/// The shrunken range that costs least; the widest of equals.
fn least(w: &[f32], target: Target, mut cost: impl FnMut(Params) -> f64) -> Params {
    let (min, max) = round::extremes(w);
    let mut best = (f64::INFINITY, target.format.fit(min, max, target.float));
    // A scale that is a power of two changes only with a power of two.
    let factors: Vec<f32> = match target.format {
        NumberFormat::Mxfp4 => vec![1.0, 0.5, 2.0],
        _ => (0..STEPS).map(|i| 1.0 - i as f32 * STEP).collect(),
    };
    for factor in factors {
        let p = target.format.fit(min * factor, max * factor, target.float);
        let cost = cost(p);
        if cost < best.0 {
            best = (cost, p);
        }
    }
    best.1
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
            let target = Target { format: NumberFormat::Int(IntFormat { num_bits, symmetric }), group, float: Float::F32 };
            let blocks = Blocks::of(&gram, group, group);
            let [outputs, weights, widest] = [(Observer::Mse, Some(&blocks)), (Observer::Mse, None), (Observer::Minmax, None)]
                .map(|(observer, blocks)| lost(&w, &fit(&w, group, target, observer, blocks), target, &gram));
            // Groups beyond a block are searched block by block, which is not quite what they lose.
            if group <= WIDEST {
                let bound = 1.0 + 1e-4;
                prop_assert!(outputs <= weights * bound && outputs <= widest * bound, "{} {} {}", outputs, weights, widest);
            }
            prop_assert!(outputs.is_finite());
        }
    }
}
