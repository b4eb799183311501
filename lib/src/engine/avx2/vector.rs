//! A few rows of inputs: each row of the weight is read once from memory, and four are summed together.

use std::arch::x86_64::*;
use std::ops::Range;

use super::codes::{Bytes, Codes, Fifths, Nibbles, PAIR, Quarters, Tq2};
use super::scales;
use crate::engine::inputs::Inputs;
use crate::engine::view::{GROUP, Kind, ScaleKind, Scales, View};

/// Calls a function with the type that a kind's codes have.
macro_rules! for_kind {
    ($kind:expr, $vnni:literal, $($call:ident)::+($($argument:expr),*)) => {
        match $kind {
            Kind::E2m1 => $($call)::+::<Nibbles<true, false, $vnni>, 1>($($argument),*),
            Kind::E2m1Halves => $($call)::+::<Nibbles<true, true, $vnni>, 1>($($argument),*),
            Kind::Int4 => $($call)::+::<Nibbles<false, false, $vnni>, 1>($($argument),*),
            Kind::Int4Halves => $($call)::+::<Nibbles<false, true, $vnni>, 1>($($argument),*),
            Kind::Int8 => $($call)::+::<Bytes<false, $vnni>, 1>($($argument),*),
            Kind::Int8Offset => $($call)::+::<Bytes<true, $vnni>, 1>($($argument),*),
            Kind::Int2 | Kind::Ternary => $($call)::+::<Quarters<$vnni>, 1>($($argument),*),
            Kind::Base3 => $($call)::+::<Fifths<$vnni>, 5>($($argument),*),
            Kind::Tq2 => $($call)::+::<Tq2<$vnni>, 4>($($argument),*),
            Kind::E4m3 | Kind::Bf16 | Kind::F16 | Kind::F32 => panic!("floats are no integers"),
        }
    };
}

/// A line of the cache: a load that two of them share takes twice as long.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line([u8; 64]);

/// A register.
#[derive(Clone, Copy)]
#[repr(align(32))]
struct Eight<T>([T; 8]);

/// One row of inputs in the order in which a kind's codes meet it.
pub struct Arranged {
    kind: Kind,
    vnni: bool,
    groups: usize,
    /// Codes of each pair of groups.
    codes: Vec<Line>,
    /// The scale of each group of a pair, four times each; times the kind's step.
    scales: Vec<Eight<f32>>,
    /// Sum of the codes of each group times the kind's offset, the same way.
    corrections: Vec<Eight<i32>>,
}

impl Arranged {
    /// Row `i` of `inputs` for weights of `kind`.
    pub fn new(inputs: &Inputs, i: usize, kind: Kind, vnni: bool) -> Self {
        match vnni {
            true => for_kind!(kind, true, Self::of(inputs, i, kind, vnni)),
            false => for_kind!(kind, false, Self::of(inputs, i, kind, vnni)),
        }
    }

    fn of<C: Codes<P>, const P: usize>(inputs: &Inputs, i: usize, kind: Kind, vnni: bool) -> Self {
        let groups = inputs.groups();
        let pairs = pairs(groups, P);
        let mut a = Self {
            kind,
            vnni,
            groups,
            codes: vec![Line([0; 64]); pairs * C::INPUTS / 64],
            scales: vec![Eight([0.0; 8]); pairs],
            corrections: vec![Eight([0; 8]); pairs],
        };
        let x = &inputs.codes[i * inputs.columns..][..inputs.columns];
        let (whole, last) = x.as_chunks::<PAIR>();
        let mut outs = a.codes.chunks_exact_mut(C::INPUTS / 64);
        for (x, out) in whole.iter().zip(&mut outs) {
            arrange::<C, P>(x, out);
        }
        // What is behind the last column meets zeros.
        if let (false, Some(out)) = (last.is_empty(), outs.next()) {
            let mut padded = [0i8; PAIR];
            padded[..last.len()].copy_from_slice(last);
            arrange::<C, P>(&padded, out);
        }
        for g in 0..groups {
            let at = g % 2 * 4..g % 2 * 4 + 4;
            a.scales[g / 2].0[at.clone()].fill(inputs.scales[i * groups + g] * kind.step());
            a.corrections[g / 2].0[at].fill(inputs.sums[i * groups + g] * kind.offset(vnni));
        }
        a
    }
}

/// The inputs of a pair, in one line or two.
#[inline(always)]
fn arrange<C: Codes<P>, const P: usize>(x: &[i8; PAIR], out: &mut [Line]) {
    let mut bytes = [0u8; 128];
    C::arrange(x, &mut bytes[..C::INPUTS]);
    out.iter_mut().zip(bytes.as_chunks::<64>().0).for_each(|(line, bytes)| line.0 = *bytes);
}

/// `out`[i][r] = row `rows.start + r` of the weight times inputs i.
///
/// # Panics
/// Where AVX2 is missing, or shapes do not fit.
pub fn integers(view: &View, rows: Range<usize>, inputs: &[Arranged], out: &mut [&mut [f32]]) {
    assert!(super::is_here(), "the caller has asked for this processor");
    assert!(rows.end <= view.shape().0 && inputs.len() == out.len(), "rows of the weight, one output an input");
    assert!(inputs.iter().all(|a| a.kind == view.kind() && a.groups == view.groups()));
    let vnni = inputs.first().is_some_and(|a| a.vnni);
    assert!(inputs.iter().all(|a| a.vnni == vnni), "all inputs lie alike");
    assert!(!vnni || super::has_vnni(), "the caller has asked for this processor");
    // SAFETY: the features are there, and shapes were checked here and where views are made.
    unsafe {
        match vnni {
            true => for_kind!(view.kind(), true, fours(view, rows, inputs, out)),
            false => for_kind!(view.kind(), false, fours(view, rows, inputs, out)),
        }
    }
}

/// Pairs of groups that hold `groups`, in whole units of `a_unit`.
fn pairs(groups: usize, a_unit: usize) -> usize {
    groups.div_ceil(2).next_multiple_of(a_unit)
}

/// Rows go one after the other, and the next four are asked for meanwhile, evenly over all that is done: asked for in a
/// heap, lines would wait for each other, and the memory for the next heap.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn fours<C: Codes<P>, const P: usize>(
    view: &View,
    rows: Range<usize>,
    inputs: &[Arranged],
    out: &mut [&mut [f32]],
) {
    let beside = |s: &&Scales| P == 1 && s.group == GROUP && Some(s.kind) == C::BESIDE;
    // SAFETY: the caller's.
    unsafe {
        match view.scales().filter(beside) {
            Some(s) => fours_of::<C, P, true>(view, Some(s), rows, inputs, out),
            None => fours_of::<C, P, false>(view, None, rows, inputs, out),
        }
    }
}

/// The same; where `BESIDE`, each row's scales are picked up with its codes, as they are stored.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn fours_of<C: Codes<P>, const P: usize, const BESIDE: bool>(
    view: &View,
    beside: Option<&Scales>,
    rows: Range<usize>,
    inputs: &[Arranged],
    out: &mut [&mut [f32]],
) {
    let pairs = pairs(view.groups(), P);
    let mut raw = vec![[0u16; 8]; if BESIDE { pairs } else { 0 }];
    let mut scratch = vec![0f32; pairs * 8];
    let mut parts = vec![[_mm256_setzero_si256(); 4]; pairs];
    // Three quarters of each row with the codes, the last quarters with the sums. Other rows may lie between these.
    let a_row = view.shape().1.div_ceil(view.kind().unit()) * view.step();
    let (a_pair, last_quarter) = (a_row / pairs, 3 * a_row / 4);
    for first in rows.clone().step_by(4) {
        // A last row stands in for those that are missing.
        let four = std::array::from_fn(|i| (first + i).min(rows.end - 1));
        let next = |r: usize| view.row_start(four[0]).wrapping_add((4 + r) * view.row());
        for (i, (a, out)) in inputs.iter().zip(out.iter_mut()).enumerate() {
            // SAFETY: the caller's; these are rows of the view, and `parts` has every pair. What is asked for need not be
            // there.
            let sums = unsafe {
                for (r, row) in four.into_iter().enumerate() {
                    let ahead = (next(r), 3 * a_pair / 4);
                    let to = parts.as_mut_ptr().cast::<__m256i>().add(r);
                    match beside {
                        Some(s) if BESIDE && i == 0 => {
                            let scales = (s.bytes[row * s.row..].as_ptr(), s.step);
                            let raw = raw.as_mut_ptr().cast::<u16>().add(r);
                            row_parts::<C, P, BESIDE>(view, row, a, to, ahead, (scales.0, scales.1, raw));
                        }
                        _ => row_parts::<C, P, false>(view, row, a, to, ahead, NO_SCALES),
                    }
                }
                if i == 0 && !BESIDE {
                    scales::four_rows(view, four, &mut scratch);
                }
                let mut ahead = [std::ptr::null(); 4];
                ahead.iter_mut().enumerate().for_each(|(r, a)| *a = next(r).wrapping_add(last_quarter));
                sums::<C, P, BESIDE>(&parts, a, &scratch, &raw, (ahead, a_pair))
            };
            let at = first - rows.start;
            let n = out.len().min(at + 4) - at;
            out[at..at + n].copy_from_slice(&sums[..n]);
        }
    }
}

/// Where a row's scales begin, how far they are apart, and where they go: every fourth number.
type Picked = (*const u8, usize, *mut u16);

const NO_SCALES: Picked = (std::ptr::null(), 0, std::ptr::null_mut());

/// The dots of a row: those of pair p go to `to` + 4 p. `ahead` is asked for, so many bytes a pair.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn row_parts<C: Codes<P>, const P: usize, const BESIDE: bool>(
    view: &View,
    row: usize,
    a: &Arranged,
    to: *mut __m256i,
    (mut ahead, a_pair): (*const u8, usize),
    (mut scale, apart, mut raw): Picked,
) {
    let step = view.step();
    // Of single groups the last may be left over; others are padded to whole units.
    let units = if P == 1 { view.groups() / 2 } else { pairs(view.groups(), P) / P };
    // Where a unit is one group, a pair is two of them.
    let stride = if P == 1 { 2 * step } else { step };
    let (mut at, mut x, mut part) = (view.row_start(row), a.codes.as_ptr().cast::<u8>(), to);
    // Two units a turn, so that less is done beside them.
    for _ in 0..units / 2 {
        ahead = ask(ahead, 2 * P * a_pair);
        // SAFETY: the unit lies inside the row, its inputs inside `a`; the caller's.
        unsafe {
            let first = C::dots(at, step, x);
            let second = C::dots(at.add(stride), step, x.add(P * C::INPUTS));
            for p in 0..P {
                _mm256_store_si256(part.add(4 * p), first[p]);
                _mm256_store_si256(part.add(4 * (P + p)), second[p]);
            }
            if BESIDE {
                for group in 0..4 {
                    raw.add(4 * group).write(pick::<C, P>(scale.add(group * apart)));
                }
                (scale, raw) = (scale.add(4 * apart), raw.add(16));
            }
            (at, x, part) = (at.add(2 * stride), x.add(2 * P * C::INPUTS), part.add(8 * P));
        }
    }
    if units % 2 == 1 {
        // SAFETY: as above.
        unsafe {
            for (p, dots) in C::dots(at, step, x).into_iter().enumerate() {
                _mm256_store_si256(part.add(4 * p), dots);
            }
            if BESIDE {
                raw.write(pick::<C, P>(scale));
                raw.add(4).write(pick::<C, P>(scale.add(apart)));
                (scale, raw) = (scale.add(2 * apart), raw.add(8));
            }
        }
    }
    if P == 1 && view.groups() % 2 == 1 {
        // The last group alone; the other half meets inputs of 0.
        let mut both = [0u8; PAIR];
        let unit = view.unit(row, view.groups() - 1);
        both[..unit.len()].copy_from_slice(unit);
        // SAFETY: no unit is longer than the half of 64 bytes; inputs and parts have whole pairs.
        unsafe {
            let dots = C::dots(both.as_ptr(), GROUP, a.codes.as_ptr().cast::<u8>().add(units * C::INPUTS))[0];
            _mm256_storeu_si256(to.add(4 * units), dots);
            if BESIDE {
                raw.write(pick::<C, P>(scale));
            }
        }
    }
}

/// Asks for the lines of the next `bytes`; gives what is behind them.
#[inline]
#[target_feature(enable = "avx2")]
fn ask(at: *const u8, bytes: usize) -> *const u8 {
    for line in (0..bytes).step_by(64) {
        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(line).cast());
    }
    at.wrapping_add(bytes)
}

/// A scale as it is stored.
#[inline]
unsafe fn pick<C: Codes<P>, const P: usize>(at: *const u8) -> u16 {
    // SAFETY: the caller's: a scale of this kind is there.
    unsafe {
        match C::BESIDE {
            Some(ScaleKind::E8m0) => u16::from(*at),
            _ => at.cast::<u16>().read_unaligned(),
        }
    }
}

/// What the parts of four rows come to, with the scales of the scratch, or those that were picked up. The four of `ahead` are
/// asked for one after the other, so many bytes a pair.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn sums<C: Codes<P>, const P: usize, const BESIDE: bool>(
    parts: &[[__m256i; 4]],
    a: &Arranged,
    scales: &[f32],
    raw: &[[u16; 8]],
    (ahead, a_pair): ([*const u8; 4], usize),
) -> [f32; 4] {
    let mut chains = _mm256_setzero_ps();
    let quarter = parts.len().div_ceil(4);
    let (mut row, mut at) = (0, ahead[0]);
    for (pair, parts) in parts.iter().enumerate() {
        if pair == (row + 1) * quarter {
            row += 1;
            at = ahead[row];
        }
        at = ask(at, a_pair);
        // SAFETY: all have every pair.
        unsafe {
            let own = match BESIDE {
                true if C::BESIDE == Some(ScaleKind::E8m0) => {
                    scales::numbers::<{ scales::E8M0 }>(raw.get_unchecked(pair))
                }
                true => scales::numbers::<{ scales::F16 }>(raw.get_unchecked(pair)),
                false => _mm256_loadu_ps(scales.as_ptr().add(8 * pair)),
            };
            chains = add(chains, *parts, a, own, pair);
        }
    }
    let sums = _mm_add_ps(_mm256_castps256_ps128(chains), _mm256_extractf128_ps::<1>(chains));
    let mut out = [0f32; 4];
    // SAFETY: four numbers.
    unsafe { _mm_storeu_ps(out.as_mut_ptr(), sums) };
    out
}

/// The chains behind pair `pair`, whose sums four rows have in `parts`, under the scales `own`.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn add(chains: __m256, parts: [__m256i; 4], a: &Arranged, own: __m256, pair: usize) -> __m256 {
    let [r0, r1, r2, r3] = parts;
    let sums = _mm256_hadd_epi32(_mm256_hadd_epi32(r0, r1), _mm256_hadd_epi32(r2, r3));
    // SAFETY: the caller's: all three have this pair.
    let (corrections, of_inputs) = unsafe {
        (_mm256_load_si256(a.corrections.as_ptr().add(pair).cast()), _mm256_load_ps(a.scales.as_ptr().add(pair).cast()))
    };
    let sums = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums, corrections));
    _mm256_fmadd_ps(sums, _mm256_mul_ps(own, of_inputs), chains)
}
