//! One row of f32 inputs and the values that codes stand for: eight rows of the weight are decoded into a panel, whose lanes
//! run across outputs, and become values in registers.

use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

use super::panels::{BLOCK, HEIGHT, fill, panel_scales};
use crate::containers::COLUMNS;
use crate::engine::view::{GROUP, Kind, ScaleKind, View};
use crate::formats::float::Float;

/// Panels that meet the inputs together: a chain a panel, so that none waits for itself.
const PANELS: usize = 2;
/// Outputs of these.
const OUTPUTS: usize = PANELS * HEIGHT;

/// Products are values.
const UNROUNDED: u8 = 0;
/// Products are rounded to BF16.
const BF16: u8 = 1;
/// Products are rounded to F16.
const F16: u8 = 2;

/// Where a thread keeps panels.
#[derive(Default)]
struct Scratch {
    panels: [Vec<u8>; PANELS],
    scales: [Vec<f32>; PANELS],
    four: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// `out`[r] = row `rows.start + r` of the weight, its values rounded to `float`, times `x`: the chains of
/// [`matmul`](crate::ops::matmul).
///
/// # Panics
/// Where AVX2 is missing, or shapes do not fit.
pub fn outputs(view: &View, float: Float, x: &[f32], rows: Range<usize>, out: &mut [f32]) {
    assert!(super::is_here(), "the caller has asked for this processor");
    assert!(rows.end <= view.shape().0 && rows.len() == out.len() && x.len() == view.shape().1, "shapes fit");
    // A code of 8 bits under a power of two, and a scale in BF16 times 1 or 2, are what they are in BF16.
    let small = matches!(view.kind(), Kind::Int2 | Kind::Ternary | Kind::Base3);
    let fits = view.scales().is_some_and(|s| s.kind == ScaleKind::E8m0 || small && s.kind == ScaleKind::Bf16);
    SCRATCH.with_borrow_mut(|s| {
        s.four.resize(view.groups() * 4, 0.0);
        s.panels.iter_mut().for_each(|p| p.resize(view.groups() * BLOCK, 0));
        s.scales.iter_mut().for_each(|p| p.resize(view.groups() * HEIGHT, 0.0));
        // SAFETY: the features are there, and shapes were checked here and where views are made.
        unsafe {
            match float {
                Float::F32 => all::<UNROUNDED>(view, x, rows, s, out),
                Float::Bf16 if fits => all::<UNROUNDED>(view, x, rows, s, out),
                Float::Bf16 => all::<BF16>(view, x, rows, s, out),
                Float::F16 => all::<F16>(view, x, rows, s, out),
            }
        }
    });
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn all<const ROUND: u8>(view: &View, x: &[f32], rows: Range<usize>, s: &mut Scratch, out: &mut [f32]) {
    for (first, out) in rows.clone().step_by(OUTPUTS).zip(out.chunks_mut(OUTPUTS)) {
        for p in 0..PANELS {
            // A last row stands in for those that are missing.
            let eight = std::array::from_fn(|i| (first + p * HEIGHT + i).min(rows.end - 1));
            // SAFETY: the caller's.
            unsafe {
                fill(view, eight, &mut s.panels[p]);
                panel_scales(view, eight, &mut s.four, &mut s.scales[p]);
            }
            let step = view.kind().step();
            s.scales[p].iter_mut().for_each(|s| *s *= step);
        }
        // SAFETY: the caller's; the panels are full.
        let sums = unsafe { sums::<ROUND>(view, x, s, view.row_start(first).wrapping_add(OUTPUTS * view.row())) };
        out.copy_from_slice(&sums.as_flattened()[..out.len()]);
    }
}

/// The outputs of the panels. The rows from `next` on are asked for meanwhile.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn sums<const ROUND: u8>(view: &View, x: &[f32], s: &Scratch, next: *const u8) -> [[f32; HEIGHT]; PANELS] {
    let kind = view.kind();
    let offset = _mm256_set1_epi32(kind.offset(true));
    // Shuffles, because shifts would take the places of products.
    let byte = |k: i8| {
        let n = -1;
        let places = _mm_setr_epi8(k, n, n, n, 4 + k, n, n, n, 8 + k, n, n, n, 12 + k, n, n, n);
        _mm256_broadcastsi128_si256(places)
    };
    let bytes = [byte(0), byte(1), byte(2), byte(3)];
    let mut totals = [_mm256_setzero_ps(); PANELS];
    let mut asked = 0;
    for (block, x) in x.chunks(COLUMNS).enumerate() {
        let mut chains = [_mm256_setzero_ps(); PANELS];
        for (g, x) in x.as_chunks::<GROUP>().0.iter().enumerate() {
            let g = block * (COLUMNS / GROUP) + g;
            let at = g * GROUP / kind.unit() * view.step();
            if at >= asked {
                for row in 0..OUTPUTS {
                    _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(row * view.row() + at).cast());
                }
                asked = at + 64;
            }
            for (j, x) in x.as_chunks::<4>().0.iter().enumerate() {
                for (p, chain) in chains.iter_mut().enumerate() {
                    // SAFETY: panels and scales have every group, and a block is eight registers.
                    let (codes, scales) = unsafe {
                        let codes = super::load(s.panels[p].as_ptr().add(g * BLOCK + j * GROUP));
                        (codes, _mm256_loadu_ps(s.scales[p].as_ptr().add(g * HEIGHT)))
                    };
                    for (x, byte) in x.iter().zip(bytes) {
                        let code = _mm256_sub_epi32(_mm256_shuffle_epi8(codes, byte), offset);
                        let value = round::<ROUND>(_mm256_mul_ps(_mm256_cvtepi32_ps(code), scales));
                        *chain = _mm256_fmadd_ps(_mm256_set1_ps(*x), value, *chain);
                    }
                }
            }
        }
        for (total, chain) in totals.iter_mut().zip(chains) {
            *total = if block == 0 { chain } else { _mm256_add_ps(*total, chain) };
        }
    }
    let mut out = [[0f32; HEIGHT]; PANELS];
    for (out, total) in out.iter_mut().zip(totals) {
        // SAFETY: eight numbers.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), total) };
    }
    out
}

/// [`Float::round`] of eight products.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn round<const TO: u8>(value: __m256) -> __m256 {
    match TO {
        BF16 => {
            let bits = _mm256_castps_si256(value);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let bits = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
            _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(0xffff_0000_u32 as i32)))
        }
        F16 => _mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value)),
        _ => value,
    }
}
