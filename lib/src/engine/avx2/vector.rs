//! A few rows of inputs: four rows of the weight at a time, read once from memory and met by each row of inputs.

use std::arch::x86_64::*;
use std::ops::Range;

use super::codes::{Bytes, Codes, Fifths, Nibbles, PAIR, Quarters, Tq2};
use super::scales;
use crate::engine::inputs::Inputs;
use crate::engine::view::{GROUP, Kind, View};

/// One row of inputs in the order in which a kind's codes meet it.
pub struct Arranged {
    kind: Kind,
    groups: usize,
    /// Codes of each pair of groups.
    codes: Vec<u8>,
    /// The scale of each group of a pair, four times each [pairs, 8]; times the kind's step.
    scales: Vec<f32>,
    /// Sum of the codes of each group times the kind's offset, the same way.
    corrections: Vec<i32>,
}

impl Arranged {
    /// Row `i` of `inputs` for weights of `kind`.
    pub fn new(inputs: &Inputs, i: usize, kind: Kind) -> Self {
        match kind {
            Kind::E2m1 => Self::of::<Nibbles<true, false>, 1>(inputs, i, kind),
            Kind::E2m1Halves => Self::of::<Nibbles<true, true>, 1>(inputs, i, kind),
            Kind::Int4 => Self::of::<Nibbles<false, false>, 1>(inputs, i, kind),
            Kind::Int4Halves => Self::of::<Nibbles<false, true>, 1>(inputs, i, kind),
            Kind::Int8 => Self::of::<Bytes<false>, 1>(inputs, i, kind),
            Kind::Int8Offset => Self::of::<Bytes<true>, 1>(inputs, i, kind),
            Kind::Int2 | Kind::Ternary => Self::of::<Quarters, 1>(inputs, i, kind),
            Kind::Base3 => Self::of::<Fifths, 5>(inputs, i, kind),
            Kind::Tq2 => Self::of::<Tq2, 4>(inputs, i, kind),
            Kind::E4m3 | Kind::Bf16 | Kind::F16 | Kind::F32 => panic!("floats are no integers"),
        }
    }

    fn of<C: Codes<P>, const P: usize>(inputs: &Inputs, i: usize, kind: Kind) -> Self {
        let groups = inputs.groups();
        let pairs = pairs(groups, P);
        let mut a = Self {
            kind,
            groups,
            codes: vec![0; pairs * C::INPUTS],
            scales: vec![0.0; pairs * 8],
            corrections: vec![0; pairs * 8],
        };
        let x = &inputs.codes[i * inputs.columns..][..inputs.columns];
        let (whole, last) = x.as_chunks::<PAIR>();
        let mut outs = a.codes.chunks_exact_mut(C::INPUTS);
        for (x, out) in whole.iter().zip(&mut outs) {
            C::arrange(x, out);
        }
        // What is behind the last column meets zeros.
        if let (false, Some(out)) = (last.is_empty(), outs.next()) {
            let mut padded = [0i8; PAIR];
            padded[..last.len()].copy_from_slice(last);
            C::arrange(&padded, out);
        }
        for g in 0..groups {
            let at = g * 4..g * 4 + 4;
            a.scales[at.clone()].fill(inputs.scales[i * groups + g] * kind.step());
            a.corrections[at].fill(inputs.sums[i * groups + g] * kind.offset());
        }
        a
    }
}

/// `out`[i][r] = row `rows.start + r` of the weight times inputs i.
///
/// # Panics
/// Where AVX2 is missing, or shapes do not fit.
pub fn integers(view: &View, rows: Range<usize>, inputs: &[Arranged], out: &mut [&mut [f32]]) {
    assert!(super::is_here(), "the caller has asked for this processor");
    assert!(rows.end <= view.shape().0 && inputs.len() == out.len(), "rows of the weight, one output an input");
    assert!(inputs.iter().all(|a| a.kind == view.kind() && a.groups == view.groups()));
    // SAFETY: the features are there, and shapes were checked here and where views are made.
    unsafe {
        match view.kind() {
            Kind::E2m1 => fours::<Nibbles<true, false>, 1>(view, rows, inputs, out),
            Kind::E2m1Halves => fours::<Nibbles<true, true>, 1>(view, rows, inputs, out),
            Kind::Int4 => fours::<Nibbles<false, false>, 1>(view, rows, inputs, out),
            Kind::Int4Halves => fours::<Nibbles<false, true>, 1>(view, rows, inputs, out),
            Kind::Int8 => fours::<Bytes<false>, 1>(view, rows, inputs, out),
            Kind::Int8Offset => fours::<Bytes<true>, 1>(view, rows, inputs, out),
            Kind::Int2 | Kind::Ternary => fours::<Quarters, 1>(view, rows, inputs, out),
            Kind::Base3 => fours::<Fifths, 5>(view, rows, inputs, out),
            Kind::Tq2 => fours::<Tq2, 4>(view, rows, inputs, out),
            Kind::E4m3 | Kind::Bf16 | Kind::F16 | Kind::F32 => panic!("floats are no integers"),
        }
    }
}

/// Pairs of groups that hold `groups`, in whole units of `a_unit`.
fn pairs(groups: usize, a_unit: usize) -> usize {
    groups.div_ceil(2).next_multiple_of(a_unit)
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn fours<C: Codes<P>, const P: usize>(
    view: &View,
    rows: Range<usize>,
    inputs: &[Arranged],
    out: &mut [&mut [f32]],
) {
    let mut scratch = vec![0f32; pairs(view.groups(), P) * 8];
    for first in rows.clone().step_by(4) {
        // A last row stands in for those that are missing.
        let four = std::array::from_fn(|i| (first + i).min(rows.end - 1));
        // SAFETY: the caller's; these are rows of the view.
        unsafe { scales::four_rows(view, four, &mut scratch) };
        for (a, out) in inputs.iter().zip(out.iter_mut()) {
            // SAFETY: the same.
            let sums = unsafe { four_rows::<C, P>(view, four, a, &scratch) };
            let at = first - rows.start;
            let n = out.len().min(at + 4) - at;
            out[at..at + n].copy_from_slice(&sums[..n]);
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn four_rows<C: Codes<P>, const P: usize>(
    view: &View,
    rows: [usize; 4],
    a: &Arranged,
    scales: &[f32],
) -> [f32; 4] {
    let step = view.step();
    // Of single groups the last may be left over; others are padded to whole units.
    let units = if P == 1 { view.groups() / 2 } else { pairs(view.groups(), P) / P };
    // Where a unit is one group, a pair is two of them.
    let stride = if P == 1 { 2 * step } else { step };
    let starts = rows.map(|r| view.row_start(r));
    // The next four rows are asked for while these are met; the scales come first, and would wait for each line.
    let ahead = 4 * view.row();
    let mut chains = _mm256_setzero_ps();
    for u in 0..units {
        // SAFETY: unit u lies inside each row, its inputs inside `a`, its scales inside `scales`.
        unsafe {
            let x = a.codes.as_ptr().add(u * P * C::INPUTS);
            // No `map`: what it calls is not compiled for this processor, and so not inlined.
            let [r0, r1, r2, r3] = starts;
            let at = u * stride;
            for r in starts {
                _mm_prefetch::<_MM_HINT_T0>(r.wrapping_add(at + ahead).cast());
            }
            let r0 = C::dots(r0.add(at), step, x);
            let r1 = C::dots(r1.add(at), step, x);
            let r2 = C::dots(r2.add(at), step, x);
            let r3 = C::dots(r3.add(at), step, x);
            for p in 0..P {
                chains = add(chains, [r0[p], r1[p], r2[p], r3[p]], a, scales, u * P + p);
            }
        }
    }
    if P == 1 && view.groups() % 2 == 1 {
        // The last group alone; the other half meets inputs of 0.
        let mut both = [[0u8; PAIR]; 4];
        for (both, r) in both.iter_mut().zip(rows) {
            let unit = view.unit(r, view.groups() - 1);
            both[..unit.len()].copy_from_slice(unit);
        }
        // SAFETY: no unit is longer than the half of 64 bytes; inputs and scales have whole pairs.
        unsafe {
            let x = a.codes.as_ptr().add(units * C::INPUTS);
            let mut parts = [_mm256_setzero_si256(); 4];
            for (part, both) in parts.iter_mut().zip(&both) {
                *part = C::dots(both.as_ptr(), GROUP, x)[0];
            }
            chains = add(chains, parts, a, scales, units);
        }
    }
    let sums = _mm_add_ps(_mm256_castps256_ps128(chains), _mm256_extractf128_ps::<1>(chains));
    let mut out = [0f32; 4];
    // SAFETY: four numbers.
    unsafe { _mm_storeu_ps(out.as_mut_ptr(), sums) };
    out
}

/// The chains behind pair `pair`, whose sums four rows have in `parts`.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn add(chains: __m256, parts: [__m256i; 4], a: &Arranged, scales: &[f32], pair: usize) -> __m256 {
    let [r0, r1, r2, r3] = parts;
    let sums = _mm256_hadd_epi32(_mm256_hadd_epi32(r0, r1), _mm256_hadd_epi32(r2, r3));
    // SAFETY: the caller's: all three have this pair.
    let (corrections, own, of_inputs) = unsafe {
        (
            _mm256_loadu_si256(a.corrections.as_ptr().add(8 * pair).cast()),
            _mm256_loadu_ps(scales.as_ptr().add(8 * pair)),
            _mm256_loadu_ps(a.scales.as_ptr().add(8 * pair)),
        )
    };
    let sums = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums, corrections));
    _mm256_fmadd_ps(sums, _mm256_mul_ps(own, of_inputs), chains)
}
