//! The loops of rounding a group of weights to integers, and of measuring the error. One body, compiled for the baseline
//! processor and for AVX2, with the same bits.

use crate::algorithms::rtn::{ErrorSums, LANES};
use crate::formats::float::{Float, round_bf16, round_f16};
use crate::formats::ggml::Ggml;
use crate::formats::minifloat::Minifloat;
use crate::formats::{NumberFormat, Params};
use crate::ops::for_this_cpu;

for_this_cpu! {
    /// Least and greatest of `w`, 0 for an empty slice.
    pub fn extremes(w: &[f32]) -> (f32, f32) = extremes_body
}

for_this_cpu! {
    /// Rounds one group `w` to codes `q` with parameters `p`, and adds the error to `sums`.
    pub fn group(w: &[f32], format: NumberFormat, p: Params, float: Float, q: &mut [i8], sums: &mut ErrorSums) = group_body
}

for_this_cpu! {
    /// Rounds one group `w` to codes `q` and their `values`, by the `rule` that [`lanes`] has.
    pub fn values(w: &[f32], rule: (NumberFormat, Float, bool), p: Params, q: &mut [i8], values: &mut [f32]) = values_body
}

for_this_cpu! {
    /// Adds the error of `values` against `reference` to `sums`.
    pub fn measure(values: &[f32], reference: &[f32], sums: &mut ErrorSums) = measure_body
}

for_this_cpu! {
    /// The squared error of rounding `w` with parameters `p`; nothing is kept of the codes.
    pub fn cost(w: &[f32], format: NumberFormat, p: Params, float: Float) -> f64 = cost_body
}

for_this_cpu! {
    /// The squared error of what the columns of `w` add to an output, summed over tokens: d G d^T for the error d that
    /// rounding by `rule` makes, G = `gram` [n, n] the sum of x x^T. `d` [n] and `through` [n] are room to work in.
    pub fn output_cost(
        w: &[f32],
        gram: &[f32],
        rule: (NumberFormat, Float, bool),
        p: Params,
        d: &mut [f32],
        through: &mut [f32],
    ) -> f64 = output_cost_body
}

/// Weights that are rounded at a time.
const BLOCK: usize = 32;

/// Codes and values of at most [`BLOCK`] weights that share `p`; behind the last stands what 0 becomes.
#[inline(always)]
fn block(w: &[f32], rule: (NumberFormat, Float, bool), p: Params) -> ([i8; BLOCK], [f32; BLOCK]) {
    let (mut whole, mut codes, mut values) = ([0f32; BLOCK], [0i8; BLOCK], [0f32; BLOCK]);
    whole[..w.len()].copy_from_slice(w);
    lanes(rule, &whole, &[p.scale; BLOCK], &[p.zero_point; BLOCK], &mut codes, &mut values);
    (codes, values)
}

#[inline(always)]
fn cost_body(w: &[f32], format: NumberFormat, p: Params, float: Float) -> f64 {
    let mut sums = [0f32; BLOCK];
    for w in w.chunks(BLOCK) {
        let (_, values) = block(w, (format, float, false), p);
        for (l, w) in w.iter().enumerate() {
            let error = w - values[l];
            sums[l] = error.mul_add(error, sums[l]);
        }
    }
    sums.iter().map(|&s| f64::from(s)).sum()
}

#[inline(always)]
fn output_cost_body(
    w: &[f32],
    gram: &[f32],
    rule: (NumberFormat, Float, bool),
    p: Params,
    d: &mut [f32],
    through: &mut [f32],
) -> f64 {
    for (w, d) in w.chunks(BLOCK).zip(d.chunks_mut(BLOCK)) {
        let (_, values) = block(w, rule, p);
        for (l, d) in d.iter_mut().enumerate() {
            *d = values[l] - w[l];
        }
    }
    through.fill(0.0);
    for (d, row) in d.iter().zip(gram.chunks_exact(w.len())) {
        for (t, g) in through.iter_mut().zip(row) {
            *t = d.mul_add(*g, *t);
        }
    }
    d.iter().zip(through).map(|(d, t)| f64::from(*d) * f64::from(*t)).sum()
}

#[inline(always)]
fn extremes_body(w: &[f32]) -> (f32, f32) {
    let first = w.first().copied().unwrap_or(0.0);
    let (mut low, mut high) = ([first; 2 * LANES], [first; 2 * LANES]);
    let (chunks, rest) = w.as_chunks::<{ 2 * LANES }>();
    for c in chunks {
        for i in 0..2 * LANES {
            low[i] = if c[i] < low[i] { c[i] } else { low[i] };
            high[i] = if c[i] > high[i] { c[i] } else { high[i] };
        }
    }
    let least = |a: f32, &b: &f32| if b < a { b } else { a };
    let greatest = |a: f32, &b: &f32| if b > a { b } else { a };
    let low = low.iter().chain(rest).fold(first, least);
    let high = high.iter().chain(rest).fold(first, greatest);
    (low, high)
}

#[inline(always)]
fn group_body(w: &[f32], format: NumberFormat, p: Params, float: Float, q: &mut [i8], sums: &mut ErrorSums) {
    for (w, q) in w.chunks(BLOCK).zip(q.chunks_mut(BLOCK)) {
        let (codes, values) = block(w, (format, float, false), p);
        q.copy_from_slice(&codes[..w.len()]);
        measure_body(&values[..w.len()], w, sums);
    }
}

#[inline(always)]
fn values_body(w: &[f32], rule: (NumberFormat, Float, bool), p: Params, q: &mut [i8], values: &mut [f32]) {
    for ((w, q), out) in w.chunks(BLOCK).zip(q.chunks_mut(BLOCK)).zip(values.chunks_mut(BLOCK)) {
        let (codes, values) = block(w, rule, p);
        q.copy_from_slice(&codes[..w.len()]);
        out.copy_from_slice(&values[..w.len()]);
    }
}

/// Rounds N weights, each with its own scale and zero point: [`NumberFormat::quantize`] and [`NumberFormat::dequantize`]
/// without calls, so that it vectorizes. `exact` is for numbers that are not of type `float` themselves: their quotients
/// are not rounded to it, only the values are.
#[inline(always)]
pub fn lanes<const N: usize>(
    rule: (NumberFormat, Float, bool),
    w: &[f32; N],
    scale: &[f32; N],
    zero: &[f32; N],
    codes: &mut [i8; N],
    values: &mut [f32; N],
) {
    // Types are constants in each arm: the loop inside has no choices left.
    let (format, float, exact) = rule;
    match (float, exact) {
        (Float::Bf16, false) => lanes_of(format, (Float::Bf16, Float::Bf16), w, scale, zero, codes, values),
        (Float::Bf16, true) => lanes_of(format, (Float::F32, Float::Bf16), w, scale, zero, codes, values),
        (Float::F16, false) => lanes_of(format, (Float::F16, Float::F16), w, scale, zero, codes, values),
        (Float::F16, true) => lanes_of(format, (Float::F32, Float::F16), w, scale, zero, codes, values),
        (Float::F32, _) => lanes_of(format, (Float::F32, Float::F32), w, scale, zero, codes, values),
    }
}

/// Added to a number below 2^22 it leaves the nearest integer, ties to even, in the low bits: 1.5 * 2^23.
const TO_INTEGER: f32 = 12_582_912.0;

#[inline(always)]
fn lanes_of<const N: usize>(
    format: NumberFormat,
    (quotient, float): (Float, Float),
    w: &[f32; N],
    scale: &[f32; N],
    zero: &[f32; N],
    codes: &mut [i8; N],
    values: &mut [f32; N],
) {
    match format {
        NumberFormat::Int(int) => {
            let (low, high) = (int.qmin() as f32, int.qmax() as f32);
            for i in 0..N {
                let scaled = quotient.round(w[i] / scale[i]);
                let shifted = if int.symmetric { scaled } else { quotient.round(scaled + zero[i]) };
                let above = if shifted > low { shifted } else { low };
                let clamped = if above < high { above } else { high };
                let integer = clamped + TO_INTEGER;
                codes[i] = integer.to_bits() as i8;
                values[i] = float.round((integer - TO_INTEGER - zero[i]) * scale[i]);
            }
        }
        NumberFormat::Ternary(_) => {
            for i in 0..N {
                let scaled = quotient.round(w[i] / scale[i]);
                let above = if scaled > -1.0 { scaled } else { -1.0 };
                let integer = if above < 1.0 { above } else { 1.0 } + TO_INTEGER;
                codes[i] = integer.to_bits() as i8;
                values[i] = float.round((integer - TO_INTEGER) * scale[i]);
            }
        }
        // Quotients of a power of two are exact; those of NVFP4 are f32 whatever the weights are.
        NumberFormat::Float(Minifloat::E2M1) => {
            floats::<N>(Minifloat::E2M1, (quotient, float), w, scale, codes, values)
        }
        NumberFormat::Float(Minifloat::E2M3) => {
            floats::<N>(Minifloat::E2M3, (quotient, float), w, scale, codes, values)
        }
        NumberFormat::Float(Minifloat::E3M2) => {
            floats::<N>(Minifloat::E3M2, (quotient, float), w, scale, codes, values)
        }
        NumberFormat::Float(Minifloat::E4M3) => {
            floats::<N>(Minifloat::E4M3, (quotient, float), w, scale, codes, values)
        }
        NumberFormat::Float(Minifloat::E5M2) => {
            floats::<N>(Minifloat::E5M2, (quotient, float), w, scale, codes, values)
        }
        NumberFormat::Mx(Minifloat::E2M1) => floats::<N>(Minifloat::E2M1, EXACT, w, scale, codes, values),
        NumberFormat::Mx(Minifloat::E2M3) => floats::<N>(Minifloat::E2M3, EXACT, w, scale, codes, values),
        NumberFormat::Mx(Minifloat::E3M2) => floats::<N>(Minifloat::E3M2, EXACT, w, scale, codes, values),
        NumberFormat::Mx(Minifloat::E4M3) => floats::<N>(Minifloat::E4M3, EXACT, w, scale, codes, values),
        NumberFormat::Mx(Minifloat::E5M2) => floats::<N>(Minifloat::E5M2, EXACT, w, scale, codes, values),
        NumberFormat::Nvfp4 => floats::<N>(Minifloat::E2M1, (Float::F32, float), w, scale, codes, values),
        NumberFormat::Half(half) => {
            let round = if half == Float::F16 { round_f16 } else { round_bf16 };
            for i in 0..N {
                (codes[i], values[i]) = (0, round(w[i]));
            }
        }
        NumberFormat::Ggml(Ggml::Q4_0) => ggml::<N>(Ggml::Q4_0, w, scale, zero, codes, values),
        NumberFormat::Ggml(Ggml::Q4_1) => ggml::<N>(Ggml::Q4_1, w, scale, zero, codes, values),
        NumberFormat::Ggml(Ggml::Q5_0) => ggml::<N>(Ggml::Q5_0, w, scale, zero, codes, values),
        NumberFormat::Ggml(Ggml::Q5_1) => ggml::<N>(Ggml::Q5_1, w, scale, zero, codes, values),
        NumberFormat::Ggml(Ggml::Q8_0) => ggml::<N>(Ggml::Q8_0, w, scale, zero, codes, values),
        NumberFormat::Ggml(Ggml::Tq1_0) => ggml::<N>(Ggml::Tq1_0, w, scale, zero, codes, values),
        NumberFormat::Ggml(Ggml::Tq2_0) => ggml::<N>(Ggml::Tq2_0, w, scale, zero, codes, values),
        NumberFormat::Ggml(Ggml::Mxfp4) => ggml::<N>(Ggml::Mxfp4, w, scale, zero, codes, values),
    }
}

/// Quotient and value as they come.
const EXACT: (Float, Float) = (Float::F32, Float::F32);

#[inline(always)]
fn floats<const N: usize>(
    table: Minifloat,
    (quotient, float): (Float, Float),
    w: &[f32; N],
    scale: &[f32; N],
    codes: &mut [i8; N],
    values: &mut [f32; N],
) {
    for i in 0..N {
        let value = table.round(quotient.round(w[i] / scale[i]));
        codes[i] = table.code(value) as i8;
        values[i] = float.round(value * scale[i]);
    }
}

#[inline(always)]
fn ggml<const N: usize>(
    ty: Ggml,
    w: &[f32; N],
    scale: &[f32; N],
    zero: &[f32; N],
    codes: &mut [i8; N],
    values: &mut [f32; N],
) {
    for i in 0..N {
        (codes[i], values[i]) = ty.round(w[i], scale[i], zero[i]);
    }
}

#[inline(always)]
fn measure_body(values: &[f32], reference: &[f32], sums: &mut ErrorSums) {
    let (v, v_rest) = values.as_chunks::<LANES>();
    let (r, r_rest) = reference.as_chunks::<LANES>();
    let mut max = [sums.max_error; LANES];
    for (v, r) in v.iter().zip(r) {
        for i in 0..LANES {
            let error = v[i] - r[i];
            max[i] = if error.abs() > max[i] { error.abs() } else { max[i] };
            sums.squared_error[i] += f64::from(error) * f64::from(error);
            sums.squared_weight[i] += f64::from(r[i]) * f64::from(r[i]);
        }
    }
    for (i, (v, r)) in v_rest.iter().zip(r_rest).enumerate() {
        let error = v - r;
        max[i] = if error.abs() > max[i] { error.abs() } else { max[i] };
        sums.squared_error[i] += f64::from(error) * f64::from(error);
        sums.squared_weight[i] += f64::from(*r) * f64::from(*r);
    }
    sums.max_error = max.iter().fold(0.0, |a, &b| if b > a { b } else { a });
    sums.count += reference.len() as u64;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::int::IntFormat;
    use proptest::prelude::*;

    fn formats() -> impl Strategy<Value = NumberFormat> {
        let float = prop::sample::select(&Minifloat::ALL[..]);
        prop_oneof![
            4 => (2u8..=8, any::<bool>())
                .prop_map(|(num_bits, symmetric)| NumberFormat::Int(IntFormat { num_bits, symmetric })),
            2 => float.clone().prop_map(NumberFormat::Float),
            2 => float.prop_map(NumberFormat::Mx),
            1 => Just(NumberFormat::Nvfp4),
            3 => prop::sample::select(&Ggml::ALL[..]).prop_map(NumberFormat::Ggml),
            1 => Just(NumberFormat::Ternary(crate::formats::ternary::Trits::Quarters)),
        ]
    }

    proptest! {
        #[test]
        fn a_group_is_rounded_as_the_format_says(
            w in prop::collection::vec(prop_oneof![-8f32..8.0, any::<f32>().prop_filter("finite", |x| x.abs() < 1e30)], 1..80),
            format in formats(),
            which in 0usize..3,
        ) {
            let float = [Float::Bf16, Float::F16, Float::F32][which];
            let w: Vec<f32> = w.into_iter().map(|x| float.round(x)).filter(|x| x.is_finite()).collect();
            let (min, max) = extremes(&w);
            let p = format.fit(min, max, float, 3.5);
            prop_assume!(format.dequantize(1, p, float).is_finite());
            let (mut q, mut sums) = (vec![0; w.len()], ErrorSums::default());
            group(&w, format, p, float, &mut q, &mut sums);
            let want: Vec<i8> = w.iter().map(|&w| format.quantize(w, p, float)).collect();
            prop_assert_eq!(&q, &want);
            let worst = w.iter().zip(&want).map(|(&w, &q)| (format.dequantize(q, p, float) - w).abs()).fold(0.0, f32::max);
            prop_assert_eq!(sums.max_error, worst);
            let mut stood_for = vec![0.0; w.len()];
            values(&w, (format, float, false), p, &mut q, &mut stood_for);
            prop_assert_eq!(&q, &want);
            let means: Vec<f32> = want.iter().map(|&q| format.dequantize(q, p, float)).collect();
            prop_assert_eq!(stood_for, means);
        }
    }
    use crate::ops::dequantize::SHAPES;

    #[test]
    fn fast_and_baseline_bodies_agree_over_the_shapes() {
        for (rows, groups) in SHAPES {
            let n = rows + groups;
            let w: Vec<f32> = (0..n).map(|i| ((i * 7919 % 1000) as f32 - 500.0) * 1e-3).collect();
            assert_eq!(extremes(&w), extremes_body(&w));
            for (num_bits, symmetric) in [(4, true), (4, false), (8, true), (8, false)] {
                for float in [Float::Bf16, Float::F16, Float::F32] {
                    let format = NumberFormat::Int(IntFormat { num_bits, symmetric });
                    let (min, max) = extremes(&w);
                    let p = format.fit(min, max, float, 3.5);
                    let (mut a, mut b) = (vec![0; n], vec![0; n]);
                    let (mut sa, mut sb) = (ErrorSums::default(), ErrorSums::default());
                    group(&w, format, p, float, &mut a, &mut sa);
                    group_body(&w, format, p, float, &mut b, &mut sb);
                    assert_eq!(a, b);
                    assert_eq!(sa.squared_error.map(f64::to_bits), sb.squared_error.map(f64::to_bits));
                    let bound = p.scale * 0.51 + 0.01 * max.abs().max(min.abs());
                    assert!(sa.max_error <= bound, "{} > {bound}", sa.max_error);
                }
            }
        }
    }
}
