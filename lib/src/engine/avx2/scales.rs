//! The scales of four rows, group by group: [groups, 4].

use std::arch::x86_64::*;

use crate::engine::view::{GROUP, ScaleKind, Scales, View};

/// Fills `out` [at least groups, 4] with the scales of `rows`.
///
/// # Safety
/// AVX2 and F16C are there; the rows are the view's.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub unsafe fn four_rows(view: &View, rows: [usize; 4], out: &mut [f32]) {
    let groups = view.groups();
    let out = &mut out.as_chunks_mut::<4>().0[..groups];
    let Some(s) = view.scales() else { return out.fill([1.0; 4]) };
    if s.group >= view.shape().1 {
        return out.fill(rows.map(|r| view.scale(r, 0)));
    }
    if s.kind == ScaleKind::E8m0 && s.step == 1 && s.group == GROUP {
        let bytes = rows.map(|r| &s.bytes[r * s.row..][..groups]);
        // SAFETY: the caller's.
        return unsafe { powers(bytes, out) };
    }
    let first = rows.map(|r| s.bytes[r * s.row..].as_ptr());
    // SAFETY: the view has checked that each row has its scales.
    unsafe {
        match s.kind {
            ScaleKind::E8m0 => each::<E8M0>(s, first, out),
            ScaleKind::Bf16 => each::<BF16>(s, first, out),
            ScaleKind::F16 => each::<F16>(s, first, out),
            ScaleKind::F32 => each::<F32>(s, first, out),
        }
    }
}

pub const E8M0: u8 = 0;
const BF16: u8 = 1;
pub const F16: u8 = 2;
const F32: u8 = 3;

/// The scales of four rows that begin at `first`, wherever a row has them.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn each<const KIND: u8>(s: &Scales, first: [*const u8; 4], out: &mut [[f32; 4]]) {
    if s.group == GROUP {
        for (i, out) in out.iter_mut().enumerate() {
            // SAFETY: the caller's: scale i of each row is there; four numbers.
            unsafe { _mm_storeu_ps(out.as_mut_ptr(), four::<KIND>(first, i * s.step)) };
        }
        return;
    }
    for (i, out) in out.chunks_mut(s.group / GROUP).enumerate() {
        // SAFETY: as above.
        let scales = unsafe { four::<KIND>(first, i * s.step) };
        for out in out {
            // SAFETY: four numbers.
            unsafe { _mm_storeu_ps(out.as_mut_ptr(), scales) };
        }
    }
}

/// The scales of four rows, `at` bytes behind their first ones.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn four<const KIND: u8>(first: [*const u8; 4], at: usize) -> __m128 {
    // SAFETY: the caller's.
    unsafe {
        let [a, b, c, d] = first;
        let [a, b, c, d] = [a.add(at), b.add(at), c.add(at), d.add(at)];
        let two = |at: *const u8| u64::from(at.cast::<u16>().read_unaligned());
        let words = || _mm_cvtsi64_si128((two(a) | two(b) << 16 | two(c) << 32 | two(d) << 48) as i64);
        match KIND {
            E8M0 => {
                let bytes = _mm_cvtsi32_si128(i32::from_le_bytes([*a, *b, *c, *d]));
                _mm256_castps256_ps128(power(_mm256_cvtepu8_epi32(bytes)))
            }
            BF16 => _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), words())),
            F16 => _mm_cvtph_ps(words()),
            _ => {
                let one = |at: *const u8| at.cast::<f32>().read_unaligned();
                _mm_setr_ps(one(a), one(b), one(c), one(d))
            }
        }
    }
}

/// Eight scales of those kinds that stand beside their codes.
#[inline]
#[target_feature(enable = "avx2,f16c")]
pub fn numbers<const KIND: u8>(stored: &[u16; 8]) -> __m256 {
    // SAFETY: eight words.
    let words = unsafe { _mm_loadu_si128(stored.as_ptr().cast()) };
    if KIND == E8M0 { power(_mm256_cvtepu16_epi32(words)) } else { _mm256_cvtph_ps(words) }
}

/// 2^(e - 127).
#[inline]
#[target_feature(enable = "avx2")]
fn power(exponents: __m256i) -> __m256 {
    // A byte of 0 stands for 2^-127, which has no bit of the exponent set, and 255 is no number.
    let last = _mm256_set1_epi32(1 << 22);
    let bits = _mm256_max_epi32(_mm256_slli_epi32::<23>(exponents), last);
    let infinite = _mm256_cmpeq_epi32(bits, _mm256_set1_epi32(0x7f80_0000));
    _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_and_si256(infinite, last)))
}

/// Powers of two, 8 groups at a time.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn powers(bytes: [&[u8]; 4], out: &mut [[f32; 4]]) {
    let (eights, rest) = out.as_chunks_mut::<8>();
    for (i, out) in eights.iter_mut().enumerate() {
        let [a, b, c, d] = bytes;
        let to = out.as_mut_ptr().cast::<f32>();
        // SAFETY: 8 scales of each row are left, and 32 numbers.
        unsafe {
            let eight = |row: &[u8]| _mm_loadl_epi64(row.as_ptr().add(8 * i).cast());
            let put = |two: __m128i, at: usize| _mm256_storeu_ps(to.add(at), power(_mm256_cvtepu8_epi32(two)));
            let (ab, cd) = (_mm_unpacklo_epi8(eight(a), eight(b)), _mm_unpacklo_epi8(eight(c), eight(d)));
            let (low, high) = (_mm_unpacklo_epi16(ab, cd), _mm_unpackhi_epi16(ab, cd));
            put(low, 0);
            put(_mm_srli_si128::<8>(low), 8);
            put(high, 16);
            put(_mm_srli_si128::<8>(high), 24);
        }
    }
    let done = eights.len() * 8;
    for (i, out) in rest.iter_mut().enumerate() {
        *out = bytes.map(|b| ScaleKind::E8m0.read(&b[done + i..]));
    }
}
