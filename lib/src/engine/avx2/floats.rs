//! Weights that are floats: 16 chains an output, in two registers.

use std::arch::x86_64::*;
use std::ops::Range;

use crate::engine::reference::{CHAINS, sum};
use crate::engine::view::{Kind, View};

/// Columns in the order in which [`two`] decodes them: even ones before odd ones for BF16.
fn order(kind: Kind, j: usize) -> usize {
    if kind == Kind::Bf16 { j % 8 * 2 + j / 8 } else { j }
}

/// One or more rows of inputs [rows, columns], each 16 columns in the order in which a kind meets them.
pub struct Arranged {
    kind: Kind,
    columns: usize,
    values: Vec<f32>,
}

impl Arranged {
    /// `x` [rows, columns] for weights of `kind`.
    pub fn new(x: &[f32], columns: usize, kind: Kind) -> Self {
        let mut values = x.to_vec();
        if order(kind, 1) != 1 {
            for (to, from) in values.as_chunks_mut::<CHAINS>().0.iter_mut().zip(x.as_chunks::<CHAINS>().0) {
                *to = std::array::from_fn(|j| from[order(kind, j)]);
            }
        }
        Self { kind, columns, values }
    }
}

/// `out`[i][r] = row `rows.start + r` of the weight times inputs i.
///
/// # Panics
/// Where AVX2 is missing, or shapes do not fit.
pub fn floats(view: &View, rows: Range<usize>, inputs: &Arranged, out: &mut [&mut [f32]]) {
    assert!(super::is_here(), "the caller has asked for this processor");
    assert!(rows.end <= view.shape().0 && inputs.values.len() == out.len() * inputs.columns);
    assert!(inputs.columns == view.shape().1 && inputs.kind == view.kind());
    // SAFETY: the features are there, and shapes were checked here and where views are made.
    unsafe {
        match view.kind() {
            Kind::E4m3 => all::<E4M3>(view, rows, inputs, out),
            Kind::Bf16 => all::<BF16>(view, rows, inputs, out),
            Kind::F16 => all::<F16>(view, rows, inputs, out),
            Kind::F32 => all::<F32>(view, rows, inputs, out),
            _ => panic!("integers are no floats"),
        }
    }
}

const E4M3: u8 = 0;
const BF16: u8 = 1;
const F16: u8 = 2;
const F32: u8 = 3;

/// 16 columns that begin at column `c` of the row at `from`.
///
/// # Safety
/// The features are there, and so are 16 columns.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn two<const KIND: u8>(from: *const u8, c: usize) -> [__m256; 2] {
    // SAFETY: the caller's.
    unsafe {
        match KIND {
            E4M3 => {
                let codes = _mm_loadu_si128(from.add(c).cast());
                let value = |eight: __m128i| {
                    let wide = _mm_cvtepu8_epi16(eight);
                    let magnitude = _mm_and_si128(wide, _mm_set1_epi16(0x7f));
                    // The bits of an F16 that is 256 times smaller: exponents are biased by 15 there, by 7 here.
                    let sign = _mm_slli_epi16::<8>(_mm_xor_si128(wide, magnitude));
                    let half = _mm_or_si128(_mm_slli_epi16::<7>(magnitude), sign);
                    let nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f));
                    let half = _mm_or_si128(half, _mm_and_si128(nan, _mm_set1_epi16(0x7e00)));
                    _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256.0))
                };
                [value(codes), value(_mm_srli_si128::<8>(codes))]
            }
            BF16 => {
                let pairs = _mm256_loadu_si256(from.add(2 * c).cast());
                let odd = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32 as i32));
                [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs)), _mm256_castsi256_ps(odd)]
            }
            F16 => {
                let eight = |at: usize| _mm256_cvtph_ps(_mm_loadu_si128(from.add(2 * c + at).cast()));
                [eight(0), eight(16)]
            }
            _ => {
                let eight = |at: usize| _mm256_loadu_ps(from.add(4 * c + at).cast());
                [eight(0), eight(32)]
            }
        }
    }
}

/// Rows of inputs that a pass takes.
const INPUTS: usize = 3;
/// Rows of the weight that a pass takes where there are several inputs.
const ROWS: usize = 2;

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn all<const KIND: u8>(view: &View, rows: Range<usize>, inputs: &Arranged, out: &mut [&mut [f32]]) {
    let n = out.len();
    let mut tile = |r: usize, height: usize, i: usize, width: usize| {
        // SAFETY: the caller's: these rows and these inputs are there.
        let sums = unsafe {
            match (height, width) {
                (4, 1) => pass::<KIND, 4, 1>(view, r, inputs, i),
                (2, 3) => pass::<KIND, 2, 3>(view, r, inputs, i),
                (2, 2) => pass::<KIND, 2, 2>(view, r, inputs, i),
                (2, 1) => pass::<KIND, 2, 1>(view, r, inputs, i),
                (1, 3) => pass::<KIND, 1, 3>(view, r, inputs, i),
                (1, 2) => pass::<KIND, 1, 2>(view, r, inputs, i),
                _ => pass::<KIND, 1, 1>(view, r, inputs, i),
            }
        };
        for a in 0..height {
            for b in 0..width {
                out[i + b][r + a - rows.start] = sums[a][b];
            }
        }
    };
    let mut r = rows.start;
    while r < rows.end {
        let most = if n == 1 { 4 } else { ROWS };
        let height = if rows.end - r >= most { most } else { 1 };
        for i in (0..n).step_by(INPUTS) {
            tile(r, height, i, INPUTS.min(n - i));
        }
        r += height;
    }
}

/// `H` rows of the weight from `r` on, `W` rows of the inputs from `i` on.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn pass<const KIND: u8, const H: usize, const W: usize>(
    view: &View,
    r: usize,
    inputs: &Arranged,
    i: usize,
) -> [[f32; 3]; 4] {
    let k = inputs.columns;
    let rows: [*const u8; H] = std::array::from_fn(|a| view.row_start(r + a));
    let x: [*const f32; W] = std::array::from_fn(|b| inputs.values[(i + b) * k..].as_ptr());
    let mut chains = [[[_mm256_setzero_ps(); 2]; W]; H];
    for c in (0..k).step_by(CHAINS) {
        // SAFETY: 16 columns of rows and inputs.
        unsafe {
            let mut inputs = [[_mm256_setzero_ps(); 2]; W];
            for b in 0..W {
                inputs[b] = [_mm256_loadu_ps(x[b].add(c)), _mm256_loadu_ps(x[b].add(c + 8))];
            }
            for a in 0..H {
                let w = two::<KIND>(rows[a], c);
                for b in 0..W {
                    for half in 0..2 {
                        chains[a][b][half] = _mm256_fmadd_ps(inputs[b][half], w[half], chains[a][b][half]);
                    }
                }
            }
        }
    }
    let mut out = [[0f32; 3]; 4];
    for a in 0..H {
        for b in 0..W {
            let mut lanes = [0f32; CHAINS];
            // SAFETY: 16 numbers.
            unsafe {
                _mm256_storeu_ps(lanes.as_mut_ptr(), chains[a][b][0]);
                _mm256_storeu_ps(lanes.as_mut_ptr().add(8), chains[a][b][1]);
            }
            let mut by_column = [0f32; CHAINS];
            lanes.iter().enumerate().for_each(|(j, v)| by_column[order(inputs.kind, j)] = *v);
            out[a][b] = sum(&by_column) * view.scale(r + a, 0);
        }
    }
    out
}
