//! Many rows of inputs: eight rows of the weight are decoded once, into a panel whose registers hold four columns of each
//! row, and meet all inputs from the first-level cache.

use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

use super::codes::{digits, dot, nibbles, quarters, signed, tripled, unsigned};
use super::{load, scales};
use crate::engine::inputs::Inputs;
use crate::engine::view::{GROUP, Kind, View};

/// Rows of a panel.
pub const HEIGHT: usize = 8;
/// Rows of inputs that meet a panel together: their accumulators and a group of their codes stay in the first-level cache.
const TILE: usize = 64;
/// Bytes of one group of eight rows.
pub const BLOCK: usize = HEIGHT * GROUP;

/// Rows of inputs as panels meet them: by tile, then by group of columns, then by row.
pub struct Batch {
    kind: Kind,
    vnni: bool,
    wide: bool,
    rows: usize,
    groups: usize,
    /// 32 bytes a row and group; twice that where they are 16 bits wide.
    codes: Vec<u8>,
    /// Times the kind's step.
    scales: Vec<f32>,
    /// Sums of the codes, times the kind's offset.
    corrections: Vec<i32>,
}

impl Batch {
    /// The `rows` of `inputs` for weights of `kind`.
    pub fn new(inputs: &Inputs, rows: &[usize], kind: Kind, vnni: bool) -> Self {
        let (groups, bytes) = (inputs.groups(), matches!(kind, Kind::Int8 | Kind::Int8Offset));
        // Without VNNI bytes are 16 bits wide; with it they have lost their sign.
        let wide = bytes && !vnni;
        let offset = kind.offset(vnni);
        let mut b = Self {
            kind,
            vnni,
            wide,
            rows: rows.len(),
            groups,
            codes: Vec::with_capacity(rows.len() * groups * GROUP * if wide { 2 } else { 1 }),
            scales: Vec::with_capacity(rows.len() * groups),
            corrections: Vec::with_capacity(rows.len() * groups),
        };
        for tile in rows.chunks(TILE) {
            for g in 0..groups {
                let of = |row: usize| -> &[i8; GROUP] {
                    inputs.codes[row * inputs.columns + g * GROUP..].first_chunk().expect("a group")
                };
                if wide {
                    // A panel's 16-bit words pair even columns, then odd ones.
                    for odd in 0..2 {
                        for &row in tile {
                            let x = of(row);
                            let words: [[u8; 2]; 16] = std::array::from_fn(|i| i16::from(x[2 * i + odd]).to_le_bytes());
                            b.codes.extend_from_slice(words.as_flattened());
                        }
                    }
                } else {
                    tile.iter().for_each(|&row| b.codes.extend_from_slice(bytemuck::cast_slice(of(row))));
                }
                b.scales.extend(tile.iter().map(|&row| inputs.scales[row * groups + g] * kind.step()));
                b.corrections.extend(tile.iter().map(|&row| inputs.sums[row * groups + g] * offset));
            }
        }
        b
    }
}

/// Where a thread keeps a panel.
#[derive(Default)]
struct Scratch {
    panel: Vec<u8>,
    scales: Vec<f32>,
    four: Vec<f32>,
    chains: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// [`integers`] with this thread's scratch.
pub fn integers_here(view: &View, rows: Range<usize>, batch: &Batch, out: impl FnMut(usize, usize, &[f32; HEIGHT])) {
    SCRATCH.with_borrow_mut(|scratch| integers(view, rows, batch, scratch, out));
}

/// `out(i, r, eight)` gets rows `r..` of the weight times inputs i, for every panel that begins in `rows` and all inputs;
/// of the last panel only those up to `rows.end` count.
///
/// # Panics
/// Where AVX2 is missing, or shapes do not fit.
fn integers(
    view: &View,
    rows: Range<usize>,
    batch: &Batch,
    scratch: &mut Scratch,
    mut out: impl FnMut(usize, usize, &[f32; HEIGHT]),
) {
    assert!(super::is_here(), "the caller has asked for this processor");
    assert!(!batch.vnni || super::has_vnni(), "the same");
    assert!(rows.end <= view.shape().0 && batch.groups == view.groups() && batch.kind == view.kind());
    scratch.panel.resize(view.groups() * BLOCK * if batch.wide { 2 } else { 1 }, 0);
    scratch.scales.resize(view.groups() * HEIGHT, 0.0);
    scratch.four.resize(view.groups() * 4, 0.0);
    for first in rows.clone().step_by(HEIGHT) {
        let eight = std::array::from_fn(|i| (first + i).min(rows.end - 1));
        // SAFETY: the features are there, and shapes were checked here and where views are made.
        unsafe {
            panel_scales(view, eight, &mut scratch.four, &mut scratch.scales);
            match view.kind() {
                Kind::Int8 if batch.wide => decode_bytes::<false>(view, eight, &mut scratch.panel),
                Kind::Int8Offset if batch.wide => decode_bytes::<true>(view, eight, &mut scratch.panel),
                _ => fill(view, eight, &mut scratch.panel),
            }
            for tile in (0..batch.rows).step_by(TILE) {
                let n = TILE.min(batch.rows - tile);
                scratch.chains.clear();
                scratch.chains.resize(2 * n * HEIGHT, 0.0);
                if batch.vnni {
                    narrow::<false, true>(scratch, batch, tile, n);
                } else if batch.wide {
                    wide(scratch, batch, tile, n);
                } else if view.kind().offset(false) > 8 {
                    narrow::<false, false>(scratch, batch, tile, n);
                } else {
                    narrow::<true, false>(scratch, batch, tile, n);
                }
                let (even, odd) = scratch.chains.as_chunks::<HEIGHT>().0.split_at(n);
                for (i, (even, odd)) in even.iter().zip(odd).enumerate() {
                    out(tile + i, first, &std::array::from_fn(|r| even[r] + odd[r]));
                }
            }
        }
    }
}

/// Decodes eight rows into a panel: groups of [`BLOCK`] bytes, registers of four columns of each row,
/// [`Kind::offset`](crate::engine::view::Kind::offset) added as kernels for VNNI have it.
///
/// # Safety
/// AVX2 is there; the rows are the view's, the panel has each group's block.
#[target_feature(enable = "avx2")]
pub unsafe fn fill(view: &View, rows: [usize; HEIGHT], panel: &mut [u8]) {
    // SAFETY: the caller's.
    unsafe {
        match view.kind() {
            Kind::E2m1 => decode::<E2M1>(view, rows, panel),
            Kind::E2m1Halves => decode::<E2M1_HALVES>(view, rows, panel),
            Kind::Int4 => decode::<INT4>(view, rows, panel),
            Kind::Int4Halves => decode::<INT4_HALVES>(view, rows, panel),
            Kind::Int2 | Kind::Ternary => decode::<QUARTERS>(view, rows, panel),
            Kind::Base3 => decode_base3(view, rows, panel),
            Kind::Tq2 => decode_tq2(view, rows, panel),
            Kind::Int8 => decode_unsigned::<false>(view, rows, panel),
            Kind::Int8Offset => decode_unsigned::<true>(view, rows, panel),
            Kind::E4m3 | Kind::Bf16 | Kind::F16 | Kind::F32 => panic!("floats are no integers"),
        }
    }
}

/// The scales of eight rows, group by group, into `scales` [groups, 8]; `scratch` [groups, 4] is needed for it.
///
/// # Safety
/// AVX2 and F16C are there; the rows are the view's.
#[target_feature(enable = "avx2,f16c")]
pub unsafe fn panel_scales(view: &View, rows: [usize; HEIGHT], scratch: &mut [f32], scales: &mut [f32]) {
    for half in 0..2 {
        let four = std::array::from_fn(|i| rows[4 * half + i]);
        // SAFETY: the caller's.
        unsafe { scales::four_rows(view, four, scratch) };
        let to = scales.as_chunks_mut::<HEIGHT>().0;
        for (to, from) in to.iter_mut().zip(scratch.as_chunks::<4>().0) {
            to[4 * half..4 * half + 4].copy_from_slice(from);
        }
    }
}

const E2M1: u8 = 0;
const E2M1_HALVES: u8 = 1;
const INT4: u8 = 2;
const INT4_HALVES: u8 = 3;
const QUARTERS: u8 = 4;

/// The columns of two groups in order, the kind's offset added.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn in_order<const KIND: u8>(first: *const u8, second: *const u8) -> [__m256i; 2] {
    // The first 16 columns of both groups, then the last 16.
    // SAFETY: the caller's.
    let [a, b] = unsafe {
        match KIND {
            E2M1 => zip(nibbles::<true>(first, second)),
            E2M1_HALVES => nibbles::<true>(first, second),
            INT4 => zip(nibbles::<false>(first, second)),
            INT4_HALVES => nibbles::<false>(first, second),
            _ => {
                let eight = |at: *const u8| at.cast::<i64>().read_unaligned();
                let pairs =
                    _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
                let [low, high] = quarters(eight(first), eight(second));
                let (low, high) = (_mm256_shuffle_epi8(low, pairs), _mm256_shuffle_epi8(high, pairs));
                [_mm256_unpacklo_epi16(low, high), _mm256_unpackhi_epi16(low, high)]
            }
        }
    };
    [_mm256_permute2x128_si256::<0x20>(a, b), _mm256_permute2x128_si256::<0x31>(a, b)]
}

#[inline]
#[target_feature(enable = "avx2")]
fn zip([even, odd]: [__m256i; 2]) -> [__m256i; 2] {
    [_mm256_unpacklo_epi8(even, odd), _mm256_unpackhi_epi8(even, odd)]
}

#[target_feature(enable = "avx2")]
unsafe fn decode<const KIND: u8>(view: &View, rows: [usize; HEIGHT], panel: &mut [u8]) {
    let starts = rows.map(|r| view.row_start(r));
    let (step, groups) = (view.step(), view.groups());
    for g in (0..groups).step_by(2) {
        // A last group alone is decoded twice.
        let second = (g + 1).min(groups - 1);
        // SAFETY: units of the rows; the panel has each group's block.
        unsafe {
            // No `map`: what it calls is not compiled for this processor, and so not inlined.
            let (mut one, mut other) = ([_mm256_setzero_si256(); HEIGHT], [_mm256_setzero_si256(); HEIGHT]);
            for (i, s) in starts.iter().enumerate() {
                [one[i], other[i]] = in_order::<KIND>(s.add(g * step), s.add(second * step));
            }
            put(one, panel.as_mut_ptr().add(g * BLOCK));
            put(other, panel.as_mut_ptr().add(second * BLOCK));
        }
    }
}

#[target_feature(enable = "avx2")]
unsafe fn decode_tq2(view: &View, rows: [usize; HEIGHT], panel: &mut [u8]) {
    let starts = rows.map(|r| view.row_start(r));
    for g in 0..view.groups() {
        let (unit, half, part) = (g / 8, g % 8 / 4, g % 4);
        let shift = _mm_cvtsi32_si128(2 * part as i32);
        // SAFETY: as above.
        unsafe {
            let mut rows = [_mm256_setzero_si256(); HEIGHT];
            for (row, s) in rows.iter_mut().zip(starts) {
                let codes = load(s.add(unit * view.step() + half * GROUP));
                *row = _mm256_and_si256(_mm256_srl_epi16(codes, shift), _mm256_set1_epi8(3));
            }
            put(rows, panel.as_mut_ptr().add(g * BLOCK));
        }
    }
}

#[target_feature(enable = "avx2")]
unsafe fn decode_base3(view: &View, rows: [usize; HEIGHT], panel: &mut [u8]) {
    let starts = rows.map(|r| view.row_start(r));
    let zero = [_mm256_setzero_si256(); HEIGHT];
    for unit in 0..view.groups().div_ceil(10) {
        let (mut low, mut high) = (zero, zero);
        for (i, s) in starts.iter().enumerate() {
            // SAFETY: every row has whole units.
            unsafe {
                let codes = s.add(unit * view.step());
                (low[i], high[i]) = (load(codes), load(codes.add(GROUP)));
            }
        }
        for pair in 0..5 {
            let (mut one, mut other) = (zero, zero);
            for i in 0..HEIGHT {
                // The first 16 columns of both groups, then the last 16.
                let (a, b) = (digits(low[i]), digits(high[i]));
                one[i] = _mm256_permute2x128_si256::<0x20>(a, b);
                other[i] = _mm256_permute2x128_si256::<0x31>(a, b);
                (low[i], high[i]) = (tripled(low[i]), tripled(high[i]));
            }
            for (g, columns) in [(unit * 10 + 2 * pair, one), (unit * 10 + 2 * pair + 1, other)] {
                if g < view.groups() {
                    // SAFETY: the panel has each group's block.
                    unsafe { put(columns, panel.as_mut_ptr().add(g * BLOCK)) };
                }
            }
        }
    }
}

/// 16 bits a column: registers of even columns, then registers of odd ones.
#[target_feature(enable = "avx2")]
unsafe fn decode_bytes<const OFFSET: bool>(view: &View, rows: [usize; HEIGHT], panel: &mut [u8]) {
    let starts = rows.map(|r| view.row_start(r));
    for g in 0..view.groups() {
        // SAFETY: as above; a block is twice as long.
        unsafe {
            let mut rows = [_mm256_setzero_si256(); HEIGHT];
            for (row, s) in rows.iter_mut().zip(starts) {
                *row = signed::<OFFSET>(load(s.add(g * view.step())));
            }
            let columns = transpose(rows);
            let to = panel.as_mut_ptr().add(g * 2 * BLOCK).cast::<__m256i>();
            for (j, c) in columns.into_iter().enumerate() {
                _mm256_storeu_si256(to.add(j), _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(c)));
                _mm256_storeu_si256(to.add(HEIGHT + j), _mm256_srai_epi16::<8>(c));
            }
        }
    }
}

/// 8 bits a column, 128 added.
#[target_feature(enable = "avx2")]
unsafe fn decode_unsigned<const OFFSET: bool>(view: &View, rows: [usize; HEIGHT], panel: &mut [u8]) {
    let starts = rows.map(|r| view.row_start(r));
    for g in 0..view.groups() {
        // SAFETY: as above.
        unsafe {
            let mut rows = [_mm256_setzero_si256(); HEIGHT];
            for (row, s) in rows.iter_mut().zip(starts) {
                *row = unsigned::<OFFSET>(load(s.add(g * view.step())));
            }
            put(rows, panel.as_mut_ptr().add(g * BLOCK));
        }
    }
}

/// Stores a group of eight rows, four columns of each row a register.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn put(rows: [__m256i; HEIGHT], to: *mut u8) {
    for (j, columns) in transpose(rows).into_iter().enumerate() {
        // SAFETY: the caller's: a block.
        unsafe { _mm256_storeu_si256(to.add(j * GROUP).cast(), columns) };
    }
}

/// Eight rows of eight numbers of 32 bits -> eight columns.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose(r: [__m256i; 8]) -> [__m256i; 8] {
    let pair = |a, b| [_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b)];
    let four = |a, b| [_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b)];
    let ([a0, a1], [a2, a3]) = (pair(r[0], r[1]), pair(r[2], r[3]));
    let ([a4, a5], [a6, a7]) = (pair(r[4], r[5]), pair(r[6], r[7]));
    let ([b0, b1], [b2, b3]) = (four(a0, a2), four(a1, a3));
    let ([b4, b5], [b6, b7]) = (four(a4, a6), four(a5, a7));
    let low = |a, b| _mm256_permute2x128_si256::<0x20>(a, b);
    let high = |a, b| _mm256_permute2x128_si256::<0x31>(a, b);
    [low(b0, b4), low(b1, b5), low(b2, b6), low(b3, b7), high(b0, b4), high(b1, b5), high(b2, b6), high(b3, b7)]
}

/// Inputs of 8 bits over the whole panel. Where `SMALL`, codes are at most 15 and all of a group's sums fit 16 bits.
#[target_feature(enable = "avx2,fma")]
unsafe fn narrow<const SMALL: bool, const VNNI: bool>(s: &mut Scratch, batch: &Batch, tile: usize, n: usize) {
    let ones = _mm256_set1_epi16(1);
    let first = tile * batch.groups;
    for g in 0..batch.groups {
        let at = first + g * n;
        // SAFETY: the panel has this group, the batch this tile of n rows, the chains 2 n.
        unsafe {
            let panel = s.panel.as_ptr().add(g * BLOCK);
            let w = eight(panel);
            let own = _mm256_loadu_ps(s.scales.as_ptr().add(g * HEIGHT));
            let chains = s.chains.as_mut_ptr().add(g % 2 * n * HEIGHT);
            for t in 0..n {
                let x = batch.codes.as_ptr().add((at + t) * GROUP).cast::<i32>();
                let part = |j: usize| _mm256_maddubs_epi16(w[j], _mm256_set1_epi32(x.add(j).read_unaligned()));
                let four = |j: usize| {
                    _mm256_add_epi16(_mm256_add_epi16(part(j), part(j + 1)), _mm256_add_epi16(part(j + 2), part(j + 3)))
                };
                let sums = if VNNI {
                    let dot = |sums, j: usize| dot(sums, w[j], _mm256_set1_epi32(x.add(j).read_unaligned()));
                    let zero = _mm256_setzero_si256();
                    // Two, so that each need not wait for the one before.
                    _mm256_add_epi32(dot(dot(dot(dot(zero, 0), 1), 2), 3), dot(dot(dot(dot(zero, 4), 5), 6), 7))
                } else if SMALL {
                    _mm256_madd_epi16(_mm256_add_epi16(four(0), four(4)), ones)
                } else {
                    _mm256_add_epi32(_mm256_madd_epi16(four(0), ones), _mm256_madd_epi16(four(4), ones))
                };
                finish(sums, own, batch, at + t, chains.add(t * HEIGHT));
            }
        }
    }
}

/// Inputs of 16 bits.
#[target_feature(enable = "avx2,fma")]
unsafe fn wide(s: &mut Scratch, batch: &Batch, tile: usize, n: usize) {
    let first = tile * batch.groups;
    let mut halves = [_mm256_setzero_si256(); TILE];
    for g in 0..batch.groups {
        let at = first + g * n;
        // SAFETY: as above; codes are twice as long.
        unsafe {
            let own = _mm256_loadu_ps(s.scales.as_ptr().add(g * HEIGHT));
            let chains = s.chains.as_mut_ptr().add(g % 2 * n * HEIGHT);
            for odd in 0..2 {
                let panel = s.panel.as_ptr().add((2 * g + odd) * BLOCK);
                let w = eight(panel);
                for (t, half) in halves.iter_mut().enumerate().take(n) {
                    let x = batch.codes.as_ptr().add((2 * at + odd * n + t) * GROUP).cast::<i32>();
                    let part = |j: usize| _mm256_madd_epi16(w[j], _mm256_set1_epi32(x.add(j).read_unaligned()));
                    let two = |j: usize| _mm256_add_epi32(part(j), part(j + 1));
                    let sums = _mm256_add_epi32(_mm256_add_epi32(two(0), two(2)), _mm256_add_epi32(two(4), two(6)));
                    if odd == 0 {
                        *half = sums;
                    } else {
                        finish(_mm256_add_epi32(*half, sums), own, batch, at + t, chains.add(t * HEIGHT));
                    }
                }
            }
        }
    }
}

/// Eight registers of a panel.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn eight(from: *const u8) -> [__m256i; 8] {
    let mut w = [_mm256_setzero_si256(); 8];
    for (j, w) in w.iter_mut().enumerate() {
        // SAFETY: the caller's.
        *w = unsafe { load(from.add(j * GROUP)) };
    }
    w
}

/// A group's sums behind their chains.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn finish(sums: __m256i, own: __m256, batch: &Batch, at: usize, chains: *mut f32) {
    // SAFETY: the caller's: the batch has this row and group, the chains eight numbers.
    unsafe {
        let correction = _mm256_set1_epi32(*batch.corrections.as_ptr().add(at));
        let scale = _mm256_mul_ps(own, _mm256_set1_ps(*batch.scales.as_ptr().add(at)));
        let sums = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums, correction));
        _mm256_storeu_ps(chains, _mm256_fmadd_ps(sums, scale, _mm256_loadu_ps(chains)));
    }
}
