//! x W^T, the product that nearly all time goes into: f32 [m, in] times a weight of [out, in] read through [`Rows`].
//!
//! Every output is one chain of fused multiply-adds a block of 256 columns, and the sum of its blocks from the first to
//! the last, then the bias: the same bits for any m, any number of threads and any processor ([`reference()`]). The vector
//! width runs across outputs. The loops are those of Goto and van de Geijn (2008): a piece of the weight [16 outputs, 256
//! columns] is decoded and transposed once and meets all rows of x while it is in the cache.

use std::cell::RefCell;
use std::marker::PhantomData;

use rayon::prelude::*;

use crate::containers::{COLUMNS, Rows};

/// Outputs of a panel: two AVX registers.
pub const WIDTH: usize = 16;
/// Rows of x that one kernel call takes: 12 accumulators, as many as hide the latency of two FMA units.
pub const HEIGHT: usize = 6;
/// Most panels that are decoded together: 96 KiB for one block of columns, which leaves the second-level cache room for x.
const PANELS: usize = 6;
/// Rows of x that meet those panels before the next: 144 KiB for one block of columns.
const TILES: usize = 24;
/// Multiply-adds below which more threads cost more than they bring.
const SERIAL: usize = 1 << 17;

/// x, laid out for the kernel: by block of columns, then by tile of rows, then by column. One array, as long as x.
pub struct Packed {
    values: Vec<f32>,
    rows: usize,
    columns: usize,
}

impl Packed {
    /// Packs `x` [rows, columns].
    pub fn new(x: &[f32], rows: usize, columns: usize) -> Self {
        let mut values = vec![0f32; rows * columns];
        let mut at = 0;
        for start in (0..columns).step_by(COLUMNS) {
            let width = COLUMNS.min(columns - start);
            let block = &mut values[at..at + rows * width];
            at += rows * width;
            let tile = |(t, tile): (usize, &mut [f32])| {
                let height = tile.len() / width;
                for r in 0..height {
                    let row = &x[(t * HEIGHT + r) * columns + start..][..width];
                    tile.iter_mut().skip(r).step_by(height).zip(row).for_each(|(o, &v)| *o = v);
                }
            };
            if rows * width >= SERIAL {
                block.par_chunks_mut(HEIGHT * width).enumerate().for_each(tile);
            } else {
                block.chunks_mut(HEIGHT * width).enumerate().for_each(tile);
            }
        }
        Self { values, rows, columns }
    }

    /// Tile `t` of the block of columns that begins at `start` and is `width` wide: [width, height].
    fn tile(&self, start: usize, width: usize, t: usize) -> (&[f32], usize) {
        let height = HEIGHT.min(self.rows - t * HEIGHT);
        (&self.values[start * self.rows + t * HEIGHT * width..][..height * width], height)
    }
}

/// An output [rows, columns] whose columns different threads write.
pub(crate) struct Columns<'a> {
    first: *mut f32,
    rows: usize,
    columns: usize,
    of: PhantomData<&'a mut [f32]>,
}

// SAFETY: `row` hands out ranges of columns, and its callers promise that nobody else holds them.
unsafe impl Sync for Columns<'_> {}

impl<'a> Columns<'a> {
    /// `out` [rows, columns].
    pub(crate) fn new(out: &'a mut [f32], rows: usize, columns: usize) -> Self {
        assert_eq!(out.len(), rows * columns, "the caller fits shapes to each other");
        Self { first: out.as_mut_ptr(), rows, columns, of: PhantomData }
    }

    /// Columns `from..from + n` of a row.
    ///
    /// # Safety
    /// Nobody else holds any of them.
    #[allow(clippy::mut_from_ref, reason = "the caller promises that the ranges are disjoint")]
    pub(crate) unsafe fn row(&self, row: usize, from: usize, n: usize) -> &mut [f32] {
        assert!(row < self.rows && from + n <= self.columns, "inside the output");
        // SAFETY: inside the array, as was just checked; disjoint by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(row * self.columns + from), n) }
    }
}

/// Where a thread decodes its part of a weight.
#[derive(Default)]
struct Scratch {
    /// [`WIDTH`] rows of one block of columns.
    rows: Vec<f32>,
    /// The same transposed, of [`PANELS`] panels.
    panels: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// `out` [m, out_features] = x W^T + bias, by the threads of the current pool.
///
/// # Panics
/// Where the shapes do not fit each other.
pub fn matmul<R: Rows + ?Sized>(x: &Packed, weight: &R, bias: Option<&[f32]>, out: &mut [f32]) {
    let (n, k) = weight.shape();
    assert_eq!((x.columns, x.rows * n), (k, out.len()), "the caller fits shapes to each other");
    assert!(bias.is_none_or(|b| b.len() == n), "a bias has one value an output");
    let out = Columns::new(out, x.rows, n);
    let panels = n.div_ceil(WIDTH);
    let serial = x.rows * n * k < SERIAL;
    let threads = if serial { 1 } else { rayon::current_num_threads() };
    let share = panels.div_ceil(4 * threads).clamp(1, PANELS);
    let part = |first: usize| {
        SCRATCH.with_borrow_mut(|scratch| {
            let panels = first..panels.min(first + share);
            let columns = panels.start * WIDTH..n.min(panels.end * WIDTH);
            if x.rows == 1 {
                // SAFETY: these columns are this call's alone.
                one_row(&x.values, weight, columns.start, unsafe { out.row(0, columns.start, columns.len()) }, scratch);
            } else {
                part_of(x, weight, &out, panels, scratch);
            }
            add_bias(bias, &out, columns);
        });
    };
    if serial {
        (0..panels).step_by(share).for_each(part);
    } else {
        (0..panels).into_par_iter().step_by(share).for_each(part);
    }
}

fn add_bias(bias: Option<&[f32]>, out: &Columns, columns: std::ops::Range<usize>) {
    let Some(bias) = bias else { return };
    for row in 0..out.rows {
        // SAFETY: these columns are the caller's alone.
        let out = unsafe { out.row(row, columns.start, columns.len()) };
        out.iter_mut().zip(&bias[columns.clone()]).for_each(|(o, b)| *o += b);
    }
}

/// Outputs `first`.. of a single row: a weight that is met once is not worth laying out, so it is transposed in registers.
fn one_row<R: Rows + ?Sized>(x: &[f32], weight: &R, first: usize, out: &mut [f32], scratch: &mut Scratch) {
    let k = x.len();
    scratch.rows.resize(WIDTH * COLUMNS, 0.0);
    for (p, out) in out.chunks_mut(WIDTH).enumerate() {
        let rows = first + p * WIDTH..first + p * WIDTH + out.len();
        for (start, x) in (0..k).step_by(COLUMNS).zip(x.chunks(COLUMNS)) {
            let mut sums = [0f32; WIDTH];
            if let Some(values) = weight.values() {
                dots(x, &values[rows.start * k + start..rows.end * k - (k - start - x.len())], k, out.len(), &mut sums);
            } else {
                let block = &mut scratch.rows[..out.len() * x.len()];
                weight.read(rows.clone(), start..start + x.len(), block);
                dots(x, block, x.len(), out.len(), &mut sums);
            }
            let all = out.iter_mut().zip(sums);
            if start == 0 { all.for_each(|(o, s)| *o = s) } else { all.for_each(|(o, s)| *o += s) }
        }
    }
}

/// `sums`[r] = the chain over k of x[k] * rows[r][k]; row r begins at r * `stride`.
fn dots(x: &[f32], rows: &[f32], stride: usize, height: usize, sums: &mut [f32; WIDTH]) {
    #[cfg(target_arch = "x86_64")]
    if height == WIDTH && is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: AVX2 and FMA are there.
        return unsafe { avx2::dots(x, rows, stride, sums) };
    }
    dots_reference(x, rows, stride, 0, &mut sums[..height]);
}

fn dots_reference(x: &[f32], rows: &[f32], stride: usize, first: usize, sums: &mut [f32]) {
    for (r, sum) in sums.iter_mut().enumerate() {
        let row = &rows[r * stride..][first..x.len()];
        *sum = x[first..].iter().zip(row).fold(*sum, |s, (x, w)| x.mul_add(*w, s));
    }
}

/// The outputs of `panels`, without the bias.
fn part_of<R: Rows + ?Sized>(
    x: &Packed,
    weight: &R,
    out: &Columns,
    panels: std::ops::Range<usize>,
    scratch: &mut Scratch,
) {
    let (n, k) = weight.shape();
    let tiles = x.rows.div_ceil(HEIGHT);
    for start in (0..k).step_by(COLUMNS) {
        let width = COLUMNS.min(k - start);
        scratch.panels.resize(PANELS * WIDTH * COLUMNS, 0.0);
        scratch.rows.resize(WIDTH * COLUMNS, 0.0);
        for (panel, to) in panels.clone().zip(scratch.panels.chunks_exact_mut(WIDTH * COLUMNS)) {
            let rows = panel * WIDTH..n.min((panel + 1) * WIDTH);
            let (height, from) = (rows.len(), &mut scratch.rows[..rows.len() * width]);
            weight.read(rows, start..start + width, from);
            transpose(from, height, width, to);
        }
        for first in (0..tiles).step_by(TILES) {
            for (panel, values) in panels.clone().zip(scratch.panels.chunks_exact(WIDTH * COLUMNS)) {
                let (at, valid) = (panel * WIDTH, WIDTH.min(n - panel * WIDTH));
                for t in first..tiles.min(first + TILES) {
                    let (tile, height) = x.tile(start, width, t);
                    let mut sums = [[0f32; WIDTH]; HEIGHT];
                    kernel(tile, height, &values[..WIDTH * width], &mut sums);
                    for (r, sums) in sums[..height].iter().enumerate() {
                        // SAFETY: these columns are this call's alone.
                        let out = unsafe { out.row(t * HEIGHT + r, at, valid) };
                        let all = out.iter_mut().zip(sums);
                        if start == 0 { all.for_each(|(o, s)| *o = *s) } else { all.for_each(|(o, s)| *o += s) }
                    }
                }
            }
        }
    }
}

/// `from` [height, width] into `to` [width, WIDTH]; rows that are not there are zero.
fn transpose(from: &[f32], height: usize, width: usize, to: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if height == WIDTH && is_x86_feature_detected!("avx2") {
        // SAFETY: AVX2 is there.
        return unsafe { avx2::transpose(from, width, to) };
    }
    transpose_reference(from, height, width, 0, to);
}

fn transpose_reference(from: &[f32], height: usize, width: usize, first: usize, to: &mut [f32]) {
    for (i, column) in to.as_chunks_mut::<WIDTH>().0[..width].iter_mut().enumerate().skip(first) {
        for (r, o) in column.iter_mut().enumerate() {
            *o = if r < height { from[r * width + i] } else { 0.0 };
        }
    }
}

/// `sums`[r][j] goes on as the chain over k of tile[k][r] * panel[k][j], for `tile` [k, height] and `panel` [k, WIDTH].
#[inline]
pub(crate) fn kernel(tile: &[f32], height: usize, panel: &[f32], sums: &mut [[f32; WIDTH]; HEIGHT]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: AVX2 and FMA are there.
        return unsafe {
            match height {
                1 => avx2::kernel::<1>(tile, panel, sums),
                2 => avx2::kernel::<2>(tile, panel, sums),
                3 => avx2::kernel::<3>(tile, panel, sums),
                4 => avx2::kernel::<4>(tile, panel, sums),
                5 => avx2::kernel::<5>(tile, panel, sums),
                _ => avx2::kernel::<6>(tile, panel, sums),
            }
        };
    }
    kernel_reference(tile, height, panel, sums);
}

fn kernel_reference(tile: &[f32], height: usize, panel: &[f32], sums: &mut [[f32; WIDTH]; HEIGHT]) {
    for (x, w) in tile.chunks_exact(height).zip(panel.as_chunks::<WIDTH>().0) {
        for (sums, &x) in sums.iter_mut().zip(x) {
            for (s, &w) in sums.iter_mut().zip(w) {
                *s = x.mul_add(w, *s);
            }
        }
    }
}

/// One output: what [`matmul`] computes for every one.
pub fn reference(x: &[f32], weight: &[f32], bias: Option<f32>) -> f32 {
    let chain = |(x, w): (&[f32], &[f32])| x.iter().zip(w).fold(0f32, |s, (x, w)| x.mul_add(*w, s));
    let blocks = x.chunks(COLUMNS).zip(weight.chunks(COLUMNS)).map(chain);
    let sum = blocks.reduce(|a, b| a + b).unwrap_or(0.0);
    bias.map_or(sum, |b| sum + b)
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::{HEIGHT, WIDTH};

    /// [`super::kernel_reference`] with the sums in registers.
    #[target_feature(enable = "avx2,fma")]
    pub fn kernel<const R: usize>(tile: &[f32], panel: &[f32], sums: &mut [[f32; WIDTH]; HEIGHT]) {
        let mut acc = [[_mm256_setzero_ps(); 2]; R];
        for (acc, sums) in acc.iter_mut().zip(sums.iter()) {
            // SAFETY: 16 values.
            *acc = unsafe { [_mm256_loadu_ps(sums.as_ptr()), _mm256_loadu_ps(sums.as_ptr().add(8))] };
        }
        for (x, w) in tile.as_chunks::<R>().0.iter().zip(panel.as_chunks::<WIDTH>().0) {
            // SAFETY: 16 values.
            let w = unsafe { [_mm256_loadu_ps(w.as_ptr()), _mm256_loadu_ps(w.as_ptr().add(8))] };
            for r in 0..R {
                let x = _mm256_set1_ps(x[r]);
                acc[r][0] = _mm256_fmadd_ps(x, w[0], acc[r][0]);
                acc[r][1] = _mm256_fmadd_ps(x, w[1], acc[r][1]);
            }
        }
        for (sums, acc) in sums.iter_mut().zip(acc) {
            // SAFETY: room for 16 values.
            unsafe {
                _mm256_storeu_ps(sums.as_mut_ptr(), acc[0]);
                _mm256_storeu_ps(sums.as_mut_ptr().add(8), acc[1]);
            }
        }
    }

    /// [`super::transpose_reference`] for full panels, eight rows by eight columns at a time.
    #[target_feature(enable = "avx2")]
    pub fn transpose(from: &[f32], width: usize, to: &mut [f32]) {
        assert!(from.len() >= WIDTH * width && to.len() >= WIDTH * width, "both are whole panels");
        let whole = width - width % 8;
        for half in [0, 8] {
            for at in (0..whole).step_by(8) {
                let mut r = [_mm256_setzero_ps(); 8];
                for (i, r) in r.iter_mut().enumerate() {
                    // SAFETY: row half + i of `from` has 8 values from `at`.
                    *r = unsafe { _mm256_loadu_ps(from.as_ptr().add((half + i) * width + at)) };
                }
                for (i, column) in eight_by_eight(r).into_iter().enumerate() {
                    // SAFETY: column at + i of `to` has 8 values from `half`.
                    unsafe { _mm256_storeu_ps(to.as_mut_ptr().add((at + i) * WIDTH + half), column) };
                }
            }
        }
        super::transpose_reference(from, WIDTH, width, whole, to);
    }

    /// [`super::dots_reference`] for 16 rows: 16 chains in two registers, eight columns at a time.
    #[target_feature(enable = "avx2,fma")]
    pub fn dots(x: &[f32], rows: &[f32], stride: usize, sums: &mut [f32; WIDTH]) {
        assert!(x.len() <= stride && rows.len() >= (WIDTH - 1) * stride + x.len(), "sixteen rows");
        let mut acc = [_mm256_setzero_ps(); 2];
        for (i, x) in x.as_chunks::<8>().0.iter().enumerate() {
            let mut columns = [[_mm256_setzero_ps(); 8]; 2];
            for (half, columns) in columns.iter_mut().enumerate() {
                for (r, row) in columns.iter_mut().enumerate() {
                    // SAFETY: row half * 8 + r has 8 values from 8 * i, as checked above.
                    *row = unsafe { _mm256_loadu_ps(rows.as_ptr().add((half * 8 + r) * stride + 8 * i)) };
                }
                *columns = eight_by_eight(*columns);
            }
            for (j, x) in x.iter().enumerate() {
                let x = _mm256_set1_ps(*x);
                acc[0] = _mm256_fmadd_ps(x, columns[0][j], acc[0]);
                acc[1] = _mm256_fmadd_ps(x, columns[1][j], acc[1]);
            }
        }
        // SAFETY: room for 16 values.
        unsafe {
            _mm256_storeu_ps(sums.as_mut_ptr(), acc[0]);
            _mm256_storeu_ps(sums.as_mut_ptr().add(8), acc[1]);
        }
        super::dots_reference(x, rows, stride, x.len() - x.len() % 8, sums);
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn eight_by_eight(r: [__m256; 8]) -> [__m256; 8] {
        let pair = |a, b| [_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)];
        let [a0, a1] = pair(r[0], r[1]);
        let [a2, a3] = pair(r[2], r[3]);
        let [a4, a5] = pair(r[4], r[5]);
        let [a6, a7] = pair(r[6], r[7]);
        let four = |a, b| [_mm256_shuffle_ps::<0x44>(a, b), _mm256_shuffle_ps::<0xee>(a, b)];
        let [b0, b1] = four(a0, a2);
        let [b2, b3] = four(a1, a3);
        let [b4, b5] = four(a4, a6);
        let [b6, b7] = four(a5, a7);
        let low = |a, b| _mm256_permute2f128_ps::<0x20>(a, b);
        let high = |a, b| _mm256_permute2f128_ps::<0x31>(a, b);
        [low(b0, b4), low(b1, b5), low(b2, b6), low(b3, b7), high(b0, b4), high(b1, b5), high(b2, b6), high(b3, b7)]
    }
}

/// A weight of f32 values in memory, [out, in].
pub struct Dense<'a> {
    /// Row by row.
    pub values: &'a [f32],
    /// (out_features, in_features).
    pub shape: (usize, usize),
}

impl Rows for Dense<'_> {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn float(&self) -> crate::formats::float::Float {
        crate::formats::float::Float::F32
    }

    fn values(&self) -> Option<&[f32]> {
        Some(self.values)
    }

    fn read(&self, rows: std::ops::Range<usize>, columns: std::ops::Range<usize>, out: &mut [f32]) {
        for (row, out) in rows.zip(out.chunks_exact_mut(columns.len().max(1))) {
            out.copy_from_slice(&self.values[row * self.shape.1..][columns.clone()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (m, n, k): single values, edges of tiles, panels and blocks, and more than one group of tiles.
    pub const SHAPES: [(usize, usize, usize); 11] = [
        (1, 1, 1),
        (1, 16, 256),
        (2, 17, 255),
        (3, 15, 257),
        (4, 100, 31),
        (5, 33, 700),
        (6, 16, 8),
        (7, 1, 512),
        (13, 97, 300),
        (150, 40, 260),
        (301, 210, 513),
    ];

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let mut s = seed;
        let next = || {
            s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (s >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        std::iter::repeat_with(next).take(n).collect()
    }

    #[test]
    fn every_output_is_the_reference_bit_for_bit_with_any_number_of_threads() {
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for (m, n, k) in SHAPES {
                let (x, w, b) = (numbers(m * k, 1), numbers(n * k, 2), numbers(n, 3));
                let mut out = vec![f32::NAN; m * n];
                let packed = Packed::new(&x, m, k);
                let bias = (m % 2 == 0).then_some(&b[..]);
                pool.install(|| matmul(&packed, &Dense { values: &w, shape: (n, k) }, bias, &mut out));
                for (i, o) in out.iter().enumerate() {
                    let (r, c) = (i / n, i % n);
                    let want = reference(&x[r * k..][..k], &w[c * k..][..k], bias.map(|b| b[c]));
                    assert_eq!(o.to_bits(), want.to_bits(), "{m}x{n}x{k} at {r}, {c}: {o} and {want}");
                }
            }
        }
    }

    #[test]
    fn kernel_and_transpose_agree_with_their_references() {
        for height in 1..=HEIGHT {
            for width in [1, 7, 8, 255, 256] {
                let (tile, rows) = (numbers(height * width, 4), numbers(WIDTH * width, 5));
                let (mut a, mut b) = (vec![1f32; WIDTH * width], vec![2f32; WIDTH * width]);
                transpose(&rows, WIDTH, width, &mut a);
                transpose_reference(&rows, WIDTH, width, 0, &mut b);
                assert_eq!(a, b);
                let (mut fast, mut plain) = ([[0f32; WIDTH]; HEIGHT], [[0f32; WIDTH]; HEIGHT]);
                kernel(&tile, height, &a, &mut fast);
                kernel_reference(&tile, height, &a, &mut plain);
                assert_eq!(fast, plain);
            }
        }
    }
}
