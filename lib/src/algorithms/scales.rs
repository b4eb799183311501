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

/// Parameters [rows, groups] for `w` [rows, columns]. `importance` [columns] weighs a column's squared error, where a text
/// says how large its inputs are.
pub fn fit(w: &[f32], columns: usize, target: Target, observer: Observer, importance: Option<&[f32]>) -> Vec<Params> {
    let groups = columns / target.group;
    let one = |(i, w): (usize, &[f32])| {
        let at = i % groups * target.group;
        fit_group(w, target, observer, importance.map(|all| &all[at..at + target.group]))
    };
    w.par_chunks_exact(target.group).with_min_len(64).enumerate().map(one).collect()
}

/// Parameters for one group.
pub fn fit_group(w: &[f32], target: Target, observer: Observer, importance: Option<&[f32]>) -> Params {
    if let Some(exact) = exact(w, target) {
        return exact;
    }
    match observer {
        Observer::Minmax => {
            let (min, max) = round::extremes(w);
            target.format.fit(min, max, target.float)
        }
        Observer::Mse => mse(w, target, importance),
    }
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

/// The shrunken range whose rounding costs least; the widest of equals.
fn mse(w: &[f32], target: Target, importance: Option<&[f32]>) -> Params {
    let (min, max) = round::extremes(w);
    let mut best = (f64::INFINITY, target.format.fit(min, max, target.float));
    // A scale that is a power of two changes only with a power of two.
    let factors: Vec<f32> = match target.format {
        NumberFormat::Mxfp4 => vec![1.0, 0.5, 2.0],
        _ => (0..STEPS).map(|i| 1.0 - i as f32 * STEP).collect(),
    };
    for factor in factors {
        let p = target.format.fit(min * factor, max * factor, target.float);
        let cost = round::cost(w, importance, target.format, p, target.float);
        if cost < best.0 {
            best = (cost, p);
        }
    }
    best.1
}
