//! Inputs of linear layers as kernels take them: int8 with a scale for each 32 columns, or as the layer's scheme says.

use super::view::GROUP;
use crate::formats::Params;
use crate::formats::activations::Activations;
use crate::formats::float::Float;
use crate::formats::int::IntFormat;
use crate::ops::for_this_cpu;
use crate::ops::round::extremes;

/// Rows of inputs [rows, columns] in int8. `columns` is a multiple of [`GROUP`].
#[derive(Debug, Clone, PartialEq)]
pub struct Inputs {
    /// [rows, columns].
    pub codes: Vec<i8>,
    /// [rows, columns / 32].
    pub scales: Vec<f32>,
    /// Sum of the codes of each group [rows, columns / 32].
    pub sums: Vec<i32>,
    /// Width of a row.
    pub columns: usize,
}

impl Inputs {
    /// Rounds `x` [rows, columns]: each group of 32 columns to -127..=127 under absmax / 127, half to even; where the scheme
    /// has int8 inputs of its own, as it says.
    pub fn new(x: &[f32], columns: usize, activations: Activations) -> Self {
        assert!(columns.is_multiple_of(GROUP) && x.len().is_multiple_of(columns), "rows of whole groups");
        let mut inputs = Self {
            codes: vec![0; x.len()],
            scales: vec![0.0; x.len() / GROUP],
            sums: vec![0; x.len() / GROUP],
            columns,
        };
        let groups = columns / GROUP;
        let rows = x.chunks_exact(columns).zip(inputs.codes.chunks_exact_mut(columns));
        let parameters = inputs.scales.chunks_exact_mut(groups).zip(inputs.sums.chunks_exact_mut(groups));
        for ((x, codes), (scales, sums)) in rows.zip(parameters) {
            match activations {
                Activations::DynamicTokenInt8 => token(x, codes, scales, sums),
                Activations::Float => blocks(x, codes, scales, sums),
                other => panic!("{} inputs meet no integers", other.name()),
            }
        }
        inputs
    }

    /// Some of the rows.
    pub fn select(&self, rows: &[usize]) -> Self {
        fn pick<T: Copy>(all: &[T], width: usize, rows: &[usize]) -> Vec<T> {
            rows.iter().flat_map(|&i| &all[i * width..(i + 1) * width]).copied().collect()
        }
        Self {
            codes: pick(&self.codes, self.columns, rows),
            scales: pick(&self.scales, self.groups(), rows),
            sums: pick(&self.sums, self.groups(), rows),
            columns: self.columns,
        }
    }

    /// How many there are.
    pub fn rows(&self) -> usize {
        self.codes.len() / self.columns
    }

    /// Groups of a row.
    pub fn groups(&self) -> usize {
        self.columns / GROUP
    }
}

/// compressed-tensors' int8: one scale a token, absmax / 127.5, so -128 is a code too.
fn token(x: &[f32], codes: &mut [i8], scales: &mut [f32], sums: &mut [i32]) {
    let (low, high) = extremes(x);
    let Params { scale, .. } = IntFormat { num_bits: 8, symmetric: true }.fit(low, high, Float::F32);
    // What is not finite must not look like a number.
    scales.fill(scale + x.iter().map(|v| v * 0.0).sum::<f32>());
    token_codes(x, scale, codes, sums);
}

for_this_cpu! {
    fn blocks(x: &[f32], codes: &mut [i8], scales: &mut [f32], sums: &mut [i32]) = blocks_body
}

for_this_cpu! {
    fn token_codes(x: &[f32], scale: f32, codes: &mut [i8], sums: &mut [i32]) = token_body
}

/// Added to a number below 2^22 it puts the nearest integer, ties to even, into the low bits: 1.5 * 2^23.
const TO_INTEGER: f32 = 12_582_912.0;

#[inline(always)]
fn nearest(v: f32) -> i8 {
    ((v + TO_INTEGER).to_bits() & 0xff) as i8
}

#[inline(always)]
fn blocks_body(x: &[f32], codes: &mut [i8], scales: &mut [f32], sums: &mut [i32]) {
    let groups = x.as_chunks::<GROUP>().0.iter().zip(codes.as_chunks_mut::<GROUP>().0);
    for ((x, codes), (scale, sum)) in groups.zip(scales.iter_mut().zip(sums)) {
        let (mut most, mut none) = ([0f32; 8], [0f32; 8]);
        for x in x.as_chunks::<8>().0 {
            for j in 0..8 {
                let v = x[j].abs();
                most[j] = if v > most[j] { v } else { most[j] };
                // 0, or NaN where the input is infinite or no number: what is not finite must not look like a number.
                none[j] += v * 0.0;
            }
        }
        let most = most.into_iter().fold(0f32, f32::max);
        *scale = most / 127.0 + none.into_iter().sum::<f32>();
        let factor = if most > 0.0 { 127.0 / most } else { 0.0 };
        // Below 2^-120 or so the factor is infinite; those inputs are as good as 0.
        let factor = if factor < f32::INFINITY { factor } else { 0.0 };
        let mut total = [0i32; 8];
        for (x, codes) in x.as_chunks::<8>().0.iter().zip(codes.as_chunks_mut::<8>().0) {
            for j in 0..8 {
                codes[j] = nearest(x[j] * factor);
                total[j] += i32::from(codes[j]);
            }
        }
        *sum = total.into_iter().sum();
    }
}

#[inline(always)]
fn token_body(x: &[f32], scale: f32, codes: &mut [i8], sums: &mut [i32]) {
    let groups = x.as_chunks::<GROUP>().0.iter().zip(codes.as_chunks_mut::<GROUP>().0);
    for ((x, codes), sum) in groups.zip(sums) {
        let mut total = 0;
        for (c, x) in codes.iter_mut().zip(x) {
            *c = nearest((x / scale).clamp(-128.0, 127.0));
            total += i32::from(*c);
        }
        *sum = total;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_reach_both_ends_and_tokens_reach_minus_128() {
        let mut x = vec![0f32; 64];
        (x[0], x[1], x[2], x[33]) = (2.0, -1.0, -2.0, -0.5);
        let i = Inputs::new(&x, 64, Activations::Float);
        assert_eq!(i.codes[..3], [127, -64, -127]);
        assert_eq!((i.codes[33], i.scales[1], i.sums[0], i.sums[1]), (-127, 0.5 / 127.0, -64, -127));
        x[0] = -127.5; // a scale of 1
        let i = Inputs::new(&x, 64, Activations::DynamicTokenInt8);
        assert_eq!((i.codes[0], i.codes[2], i.scales[0], i.scales[1]), (-128, -2, 1.0, 1.0));
    }

    #[test]
    fn what_is_no_number_stays_none() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = vec![1f32; 32];
            x[7] = bad;
            for activations in [Activations::Float, Activations::DynamicTokenInt8] {
                assert!(!Inputs::new(&x, 32, activations).scales[0].is_finite());
            }
        }
        let zeros = Inputs::new(&[0.0; 32], 32, Activations::Float);
        assert_eq!((zeros.scales[0], zeros.sums[0]), (0.0, 0));
        let tiny = Inputs::new(&[1e-44; 32], 32, Activations::Float);
        assert!(tiny.scales[0].is_finite() && tiny.codes.iter().all(|c| (-127..=127).contains(c)));
    }
}
