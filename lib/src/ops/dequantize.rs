//! MXFP4 blocks -> 16-bit floats, transposed to the layout that transformers loads.
//!
//! Dimension letters: R rows (out_features), G groups of 32 along in_features, K = 32 G columns.
//! Blocks are u8 [R, G, 16], scales u8 [R, G]; the output is u16 [K, R].

use std::ops::{AddAssign, Range};
use std::sync::LazyLock;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::formats::float::Float;
use crate::formats::mxfp4::{self, BLOCK, BLOCK_BYTES, Fate};

/// Rows and columns of a tile: one block wide, and two cache lines of 16-bit floats high.
const TILE: usize = 32;

/// Numbers that did not come through unchanged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HalfCounts {
    /// Became infinite.
    pub overflows: u64,
    /// Are smaller than the smallest normal number.
    pub subnormals: u64,
    /// Became zero.
    pub underflows: u64,
    /// Were NaN.
    pub nans: u64,
}

impl HalfCounts {
    /// Counts one number.
    pub fn add(&mut self, fate: Fate) {
        match fate {
            Fate::Exact => {}
            Fate::Subnormal => self.subnormals += 1,
            Fate::Underflow => self.underflows += 1,
            Fate::Overflow => self.overflows += 1,
            Fate::Nan => self.nans += 1,
        }
    }
}

impl AddAssign for HalfCounts {
    fn add_assign(&mut self, other: Self) {
        self.overflows += other.overflows;
        self.subnormals += other.subnormals;
        self.underflows += other.underflows;
        self.nans += other.nans;
    }
}

/// One matrix of MXFP4 blocks.
#[derive(Clone, Copy)]
pub struct Blocks<'a> {
    /// u8 [R, G, 16].
    pub codes: &'a [u8],
    /// u8 [R, G].
    pub scales: &'a [u8],
    /// R.
    pub rows: usize,
    /// G.
    pub groups: usize,
}

/// The scales of one matrix by column block: u8 [G, R]. In the file they lie [R, G], so that a chunk of columns would read
/// every line of them again; turned once, they are read in order.
#[derive(Debug, Default)]
pub struct ScalesByGroup(Vec<u8>);

impl ScalesByGroup {
    /// Turns the scales of `src`; the buffer is used again.
    pub fn fill(&mut self, src: Blocks) {
        const ROWS: usize = 64;
        self.0.resize(src.rows * src.groups, 0);
        for first in (0..src.rows).step_by(ROWS) {
            let n = ROWS.min(src.rows - first);
            let rows = &src.scales[first * src.groups..][..n * src.groups];
            for group in 0..src.groups {
                let out = &mut self.0[group * src.rows + first..][..n];
                for (o, e) in out.iter_mut().zip(rows[group..].iter().step_by(src.groups)) {
                    *o = *e;
                }
            }
        }
    }
}

impl Blocks<'_> {
    fn block(&self, row: usize, group: usize) -> (&[u8; BLOCK_BYTES], u8) {
        let at = row * self.groups + group;
        let codes = self.codes[at * BLOCK_BYTES..].first_chunk().expect("the plan checked the blocks' length");
        (codes, self.scales[at])
    }
}

/// Every (scale, code) as bits of one 16-bit float: 256 x 16.
struct Table {
    bits: Vec<[u16; 16]>,
    /// True where all 16 codes come through unchanged.
    plain: Vec<bool>,
}

fn table(to: Float) -> &'static Table {
    static BF16: LazyLock<Table> = LazyLock::new(|| Table::new(Float::Bf16));
    static F16: LazyLock<Table> = LazyLock::new(|| Table::new(Float::F16));
    if to == Float::F16 { &F16 } else { &BF16 }
}

impl Table {
    fn new(to: Float) -> Self {
        let entry = |e: u8, code: u8| mxfp4::half_bits(code, e, to);
        let bits = (0..=255).map(|e| std::array::from_fn(|c| entry(e, c as u8).0)).collect();
        let plain = (0..=255).map(|e| (0..16).all(|c| entry(e, c).1 == Fate::Exact)).collect();
        Self { bits, plain }
    }
}

/// Columns `32 * groups.start ..` of the transposed matrix into `out`, u16 [32 * groups.len(), R]; `to` is BF16 or F16.
/// `scales` are those of `src`.
pub fn transposed(src: Blocks, scales: &ScalesByGroup, groups: Range<usize>, to: Float, out: &mut [u16]) -> HalfCounts {
    assert_eq!(out.len(), groups.len() * BLOCK * src.rows, "the caller sizes the output");
    assert!(groups.end <= src.groups && src.codes.len() >= src.rows * src.groups * BLOCK_BYTES);
    assert_eq!(scales.0.len(), src.rows * src.groups, "the scales are of another matrix");
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: AVX2 is there; lengths were checked right above.
        return unsafe { avx2::transposed(src, &scales.0, groups, to, out) };
    }
    transposed_reference(src, groups, to, out)
}

/// [`transposed`], tile by tile through the table: short, exact, and the path for scales at the edge of the range.
pub fn transposed_reference(src: Blocks, groups: Range<usize>, to: Float, out: &mut [u16]) -> HalfCounts {
    let mut counts = HalfCounts::default();
    for group in groups.clone() {
        for row in (0..src.rows).step_by(TILE) {
            let k = (group - groups.start) * BLOCK;
            counts += tile(src, row..src.rows.min(row + TILE), group, to, &mut out[k * src.rows..][..BLOCK * src.rows]);
        }
    }
    counts
}

/// One tile: `rows` of one `group` into `out`, u16 [32, R].
fn tile(src: Blocks, rows: Range<usize>, group: usize, to: Float, out: &mut [u16]) -> HalfCounts {
    let table = table(to);
    let mut counts = HalfCounts::default();
    for row in rows {
        let (codes, e) = src.block(row, group);
        let bits = &table.bits[usize::from(e)];
        for (j, byte) in codes.iter().enumerate() {
            let (low, high) = (byte & 15, byte >> 4);
            out[2 * j * src.rows + row] = bits[usize::from(low)];
            out[(2 * j + 1) * src.rows + row] = bits[usize::from(high)];
            if !table.plain[usize::from(e)] {
                counts.add(mxfp4::half_bits(low, e, to).1);
                counts.add(mxfp4::half_bits(high, e, to).1);
            }
        }
    }
    counts
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    //! 32 rows x 32 columns at a time: the 16 x 16 bytes of each half are transposed by unpacking, nibbles become bits
    //! through byte shuffles, and the scale is an integer added to the exponent field. Scales for which that addition
    //! would leave the normal range take the table instead.

    use std::arch::x86_64::*;

    use super::*;

    /// How a 16-bit float is put together from a code.
    struct Fields {
        /// High and low byte of each code's bits under scale 2^0.
        high: [u8; 16],
        low: [u8; 16],
        /// Bits of the fraction field: the exponent is added this far left.
        shift: i32,
        /// Scale bytes for which every code stays normal.
        safe: Range<u8>,
    }

    fn fields(to: Float) -> Fields {
        let unit = table(to).bits[127];
        let plain = &table(to).plain;
        let first = plain.iter().position(|&p| p).expect("2^0 is in range");
        let last = plain.iter().rposition(|&p| p).expect("2^0 is in range");
        Fields {
            high: unit.map(|b| (b >> 8) as u8),
            low: unit.map(|b| b as u8),
            shift: if to == Float::F16 { 10 } else { 7 },
            safe: first as u8..last as u8 + 1,
        }
    }

    #[target_feature(enable = "avx2")]
    fn twice(bytes: [u8; 16]) -> __m256i {
        // SAFETY: 16 readable bytes.
        let half = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
        _mm256_broadcastsi128_si256(half)
    }

    /// # Safety
    /// AVX2; `src`, `scales` and `out` have the lengths that [`super::transposed`] checks.
    #[target_feature(enable = "avx2")]
    pub unsafe fn transposed(
        src: Blocks,
        scales: &[u8],
        groups: Range<usize>,
        to: Float,
        out: &mut [u16],
    ) -> HalfCounts {
        let fields = fields(to);
        let mut counts = HalfCounts::default();
        let full = src.rows - src.rows % TILE;
        let stride = src.groups * BLOCK_BYTES;
        // Rows outside, groups inside: the groups of one row lie side by side, so each cache line is read once.
        for row in (0..full).step_by(TILE) {
            for ahead in 0..TILE {
                // A line a row, too far apart for the processor to foresee; past the end it does no harm.
                let next = src.codes.as_ptr().wrapping_add((row + TILE + ahead) * stride + groups.start * BLOCK_BYTES);
                _mm_prefetch::<_MM_HINT_T0>(next.cast());
            }
            for group in groups.clone() {
                let out = &mut out[(group - groups.start) * BLOCK * src.rows..][..BLOCK * src.rows];
                let e: &[u8; TILE] = scales[group * src.rows + row..].first_chunk().expect("checked by the caller");
                // SAFETY: rows `row..row + 32` and all 32 columns of `out` exist.
                if !unsafe { tile(&src, row, group, &fields, e, out) } {
                    counts += super::tile(src, row..row + TILE, group, to, out);
                }
            }
        }
        if full < src.rows {
            for group in groups.clone() {
                let k = (group - groups.start) * BLOCK;
                counts += super::tile(src, full..src.rows, group, to, &mut out[k * src.rows..][..BLOCK * src.rows]);
            }
        }
        counts
    }

    /// False, with nothing written, where a scale is outside [`Fields::safe`].
    ///
    /// # Safety
    /// AVX2; `out` is u16 [32, R] and `row + 32 <= R`.
    #[target_feature(enable = "avx2")]
    unsafe fn tile(src: &Blocks, row: usize, group: usize, fields: &Fields, e: &[u8; TILE], out: &mut [u16]) -> bool {
        // SAFETY: 32 readable bytes.
        let e = unsafe { _mm256_loadu_si256(e.as_ptr().cast()) };
        let above = _mm256_sub_epi8(e, _mm256_set1_epi8(fields.safe.start as i8));
        let span = _mm256_set1_epi8((fields.safe.end - 1 - fields.safe.start) as i8);
        if _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(above, span), span)) != -1 {
            return false;
        }
        let delta = [_mm256_castsi256_si128(e), _mm256_extracti128_si256::<1>(e)].map(|e| {
            let e = _mm256_sub_epi16(_mm256_cvtepu8_epi16(e), _mm256_set1_epi16(127));
            _mm256_sll_epi16(e, _mm_cvtsi32_si128(fields.shift))
        });
        let stride = src.groups * BLOCK_BYTES;
        let base = src.codes[row * stride + group * BLOCK_BYTES..].as_ptr();
        let mut v = [_mm256_setzero_si256(); 16];
        for (i, v) in v.iter_mut().enumerate() {
            // Lanes hold rows 0-7, 16-23 and 8-15, 24-31, so that unpacking to 16 bits below leaves 16 rows in order.
            let r = i + (i & 8);
            // SAFETY: row + r + 8 < row + 32 <= R, and each row has `stride` bytes.
            let (low, high) = unsafe {
                (_mm_loadu_si128(base.add(r * stride).cast()), _mm_loadu_si128(base.add((r + 8) * stride).cast()))
            };
            *v = _mm256_set_m128i(high, low);
        }
        transpose(&mut v);
        let (high, low) = (twice(fields.high), twice(fields.low));
        // The exponent is added to every code but the two zeros.
        let nonzero = twice(std::array::from_fn(|c| if c & 7 == 0 { 0 } else { 0xff }));
        let nibble = _mm256_set1_epi8(15);
        for (j, &bytes) in v.iter().enumerate() {
            for n in 0..2 {
                let codes = if n == 0 { bytes } else { _mm256_srli_epi16::<4>(bytes) };
                let codes = _mm256_and_si256(codes, nibble);
                let h = _mm256_shuffle_epi8(high, codes);
                let l = _mm256_shuffle_epi8(low, codes);
                let m = _mm256_shuffle_epi8(nonzero, codes);
                let a = _mm256_add_epi16(
                    _mm256_unpacklo_epi8(l, h),
                    _mm256_and_si256(_mm256_unpacklo_epi8(m, m), delta[0]),
                );
                let b = _mm256_add_epi16(
                    _mm256_unpackhi_epi8(l, h),
                    _mm256_and_si256(_mm256_unpackhi_epi8(m, m), delta[1]),
                );
                // SAFETY: column 2j + n < 32 of `out`, rows `row..row + 32`.
                unsafe {
                    let to = out.as_mut_ptr().add((2 * j + n) * src.rows + row);
                    _mm256_storeu_si256(to.cast(), a);
                    _mm256_storeu_si256(to.add(16).cast(), b);
                }
            }
        }
        true
    }

    /// Transposes the 16 x 16 bytes of each 128-bit half: byte j of vector i becomes byte i of vector j.
    #[target_feature(enable = "avx2")]
    fn transpose(v: &mut [__m256i; 16]) {
        let mut t = *v;
        // Four rounds; each interleaves vector i with vector i + 8.
        for _ in 0..4 {
            let mut next = t;
            for i in 0..8 {
                next[2 * i] = _mm256_unpacklo_epi8(t[i], t[i + 8]);
                next[2 * i + 1] = _mm256_unpackhi_epi8(t[i], t[i + 8]);
            }
            t = next;
        }
        *v = t;
    }
}

/// The list of shapes (rows, groups) that tests and benchmarks share: edges of the tile, odd sizes, gpt-oss's own.
pub const SHAPES: [(usize, usize); 7] = [(1, 1), (31, 2), (32, 1), (33, 3), (64, 4), (256, 8), (2880, 2)];

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Straight from the format: one number at a time, no table.
    fn plain(src: Blocks, groups: Range<usize>, to: Float) -> (Vec<u16>, HalfCounts) {
        let mut out = vec![0; groups.len() * BLOCK * src.rows];
        let mut counts = HalfCounts::default();
        for row in 0..src.rows {
            for group in groups.clone() {
                let (codes, e) = src.block(row, group);
                for k in 0..BLOCK {
                    let code = if k % 2 == 0 { codes[k / 2] & 15 } else { codes[k / 2] >> 4 };
                    let (bits, fate) = mxfp4::half_bits(code, e, to);
                    out[((group - groups.start) * BLOCK + k) * src.rows + row] = bits;
                    counts.add(fate);
                }
            }
        }
        (out, counts)
    }

    fn check(rows: usize, groups: usize, range: Range<usize>, codes: &[u8], scales: &[u8]) {
        for to in [Float::Bf16, Float::F16] {
            let src = Blocks { codes, scales, rows, groups };
            let want = plain(src, range.clone(), to);
            let mut got = vec![1u16; want.0.len()];
            let mut by_group = ScalesByGroup::default();
            by_group.fill(src);
            assert_eq!(transposed(src, &by_group, range.clone(), to, &mut got), want.1, "{rows} x {groups} {to:?}");
            assert!(got == want.0, "fast: {rows} x {groups} {to:?}");
            assert_eq!(transposed_reference(src, range.clone(), to, &mut got), want.1);
            assert!(got == want.0, "reference: {rows} x {groups} {to:?}");
        }
    }

    fn noise(n: usize, seed: u32) -> Vec<u8> {
        let mut s = seed | 1;
        (0..n)
            .map(|_| {
                s ^= s << 13;
                s ^= s >> 17;
                s ^= s << 5;
                (s >> 11) as u8
            })
            .collect()
    }

    #[test]
    fn fast_and_reference_agree_over_the_shapes_with_every_scale_byte() {
        for (rows, groups) in SHAPES {
            let codes = noise(rows * groups * BLOCK_BYTES, 7);
            check(rows, groups, 0..groups, &codes, &noise(rows * groups, 3));
            // Scales of trained weights, where the fast path is taken throughout.
            let usual: Vec<u8> = noise(rows * groups, 5).iter().map(|b| 115 + b % 12).collect();
            check(rows, groups, 0..groups, &codes, &usual);
            check(rows, groups, groups / 2..groups, &codes, &usual);
        }
    }

    #[test]
    fn every_scale_and_code_pair_comes_through_the_fast_path() {
        // 256 rows, one scale each; the 32 columns run over all 16 codes twice.
        let codes: Vec<u8> = (0..256).flat_map(|_| (0..16).map(|j| (2 * j % 16) | ((2 * j + 1) % 16) << 4)).collect();
        let scales: Vec<u8> = (0..=255).collect();
        check(256, 1, 0..1, &codes, &scales);
        for e in 0..=255u8 {
            check(32, 1, 0..1, &codes[..512], &[e; 32]);
        }
    }

    proptest! {
        #[test]
        fn any_blocks(rows in 1usize..70, groups in 1usize..4, seed in any::<u32>(), low in 0u8..200) {
            let codes = noise(rows * groups * BLOCK_BYTES, seed);
            let scales: Vec<u8> = noise(rows * groups, seed ^ 9).iter().map(|b| low.saturating_add(b % 50)).collect();
            check(rows, groups, 0..groups, &codes, &scales);
        }
    }
}
