//! How each kind's codes meet the inputs. Two groups of 32 columns go together, a half of a register each, so that one
//! tree of additions sums two groups of four rows.

use std::arch::asm;
use std::arch::x86_64::*;

use super::{load, two_halves};
use crate::engine::view::{GROUP, ScaleKind};

/// Columns that go together.
pub const PAIR: usize = 2 * GROUP;

/// A kind's codes. A unit here is `PAIRS` pairs of groups.
pub trait Codes<const PAIRS: usize> {
    /// Bytes of the inputs of a pair, as [`Self::arrange`] leaves them.
    const INPUTS: usize;

    /// The scales that ggml's blocks of this kind have beside their codes.
    const BESIDE: Option<ScaleKind> = None;

    /// Lays out the inputs `x` of the 64 columns of one pair of groups, in the order in which [`Self::dots`] meets them.
    fn arrange(x: &[i8; PAIR], out: &mut [u8]);

    /// For each pair of groups the products' sums, with [`Kind::offset`](crate::engine::view::Kind::offset) still in the
    /// codes: four parts of the first group, four of the second.
    ///
    /// # Safety
    /// AVX2 is there, and AVX-VNNI for those that use it; `codes` has a unit, whose second half begins `step` bytes behind the
    /// first where groups stand alone; `x` has its inputs.
    unsafe fn dots(codes: *const u8, step: usize, x: *const u8) -> [__m256i; PAIRS];
}

/// `sums` and, four by four, the products of codes without sign and inputs with it. None of it saturates.
///
/// # Safety
/// AVX-VNNI is there.
#[inline]
#[target_feature(enable = "avx2")]
pub unsafe fn dot(sums: __m256i, codes: __m256i, x: __m256i) -> __m256i {
    let mut sums = sums;
    // No intrinsic: what one calls for must be compiled for AVX-VNNI as a whole, twice.
    // SAFETY: the caller's; registers alone are touched.
    unsafe {
        asm!(
            "{{vex}} vpdpbusd {sums}, {codes}, {x}",
            sums = inout(ymm_reg) sums, codes = in(ymm_reg) codes, x = in(ymm_reg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// The same for two registers of codes of at most 6 bits.
///
/// # Safety
/// AVX2 is there, and AVX-VNNI where `VNNI`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn two<const VNNI: bool>([low, high]: [__m256i; 2], x: [__m256i; 2]) -> __m256i {
    if VNNI {
        // SAFETY: the caller's.
        return unsafe { dot(dot(_mm256_setzero_si256(), low, x[0]), high, x[1]) };
    }
    // 4 products of at most 24 * 128 fit 16 bits.
    let sums = _mm256_add_epi16(_mm256_maddubs_epi16(low, x[0]), _mm256_maddubs_epi16(high, x[1]));
    _mm256_madd_epi16(sums, _mm256_set1_epi16(1))
}

/// 4 bits: E2M1 where `TABLE`, integers otherwise; ggml's order where `HALVES`.
pub struct Nibbles<const TABLE: bool, const HALVES: bool, const VNNI: bool>;

/// Twice the values of E2M1 codes, 12 added.
pub const DOUBLED: [u8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];

/// The low and the high nibbles of two groups at `first` and `second`, decoded.
///
/// # Safety
/// AVX2 is there, and 16 bytes at both.
#[inline]
#[target_feature(enable = "avx2")]
pub unsafe fn nibbles<const TABLE: bool>(first: *const u8, second: *const u8) -> [__m256i; 2] {
    // SAFETY: the caller's.
    let codes = unsafe { two_halves(first, second) };
    let mask = _mm256_set1_epi8(15);
    let (low, high) = (_mm256_and_si256(codes, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(codes), mask));
    if !TABLE {
        return [low, high];
    }
    // SAFETY: 16 bytes.
    let table = _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(DOUBLED.as_ptr().cast()) });
    [_mm256_shuffle_epi8(table, low), _mm256_shuffle_epi8(table, high)]
}

impl<const TABLE: bool, const HALVES: bool, const VNNI: bool> Codes<1> for Nibbles<TABLE, HALVES, VNNI> {
    const INPUTS: usize = 64;
    const BESIDE: Option<ScaleKind> = match (HALVES, TABLE) {
        (false, _) => None,
        (true, true) => Some(ScaleKind::E8m0),
        (true, false) => Some(ScaleKind::F16),
    };

    #[inline(always)]
    fn arrange(x: &[i8; PAIR], out: &mut [u8]) {
        let out = &mut out[..64];
        for i in 0..16 {
            let (low, high) = if HALVES { (i, i + 16) } else { (2 * i, 2 * i + 1) };
            out[i] = x[low] as u8;
            out[16 + i] = x[GROUP + low] as u8;
            out[32 + i] = x[high] as u8;
            out[48 + i] = x[GROUP + high] as u8;
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn dots(codes: *const u8, step: usize, x: *const u8) -> [__m256i; 1] {
        // SAFETY: the caller's.
        unsafe { [two::<VNNI>(nibbles::<TABLE>(codes, codes.add(step)), [load(x), load(x.add(32))])] }
    }
}

/// 8 bits, with 128 added where `OFFSET`. Without VNNI inputs are 16 bits wide, so that -128 times -128 is no exception.
pub struct Bytes<const OFFSET: bool, const VNNI: bool>;

/// Codes of 8 bits with their sign.
#[inline]
#[target_feature(enable = "avx2")]
pub fn signed<const OFFSET: bool>(codes: __m256i) -> __m256i {
    if OFFSET { _mm256_xor_si256(codes, _mm256_set1_epi8(-128)) } else { codes }
}

/// Codes of 8 bits with 128 added.
#[inline]
#[target_feature(enable = "avx2")]
pub fn unsigned<const OFFSET: bool>(codes: __m256i) -> __m256i {
    if OFFSET { codes } else { _mm256_xor_si256(codes, _mm256_set1_epi8(-128)) }
}

impl<const OFFSET: bool, const VNNI: bool> Codes<1> for Bytes<OFFSET, VNNI> {
    const INPUTS: usize = if VNNI { 64 } else { 128 };
    const BESIDE: Option<ScaleKind> = Some(ScaleKind::F16);

    #[inline(always)]
    fn arrange(x: &[i8; PAIR], out: &mut [u8]) {
        if VNNI {
            let out = &mut out[..64];
            for (part, first) in [0, GROUP, 16, GROUP + 16].into_iter().enumerate() {
                out[16 * part..16 * part + 16].iter_mut().zip(&x[first..]).for_each(|(o, x)| *o = *x as u8);
            }
            return;
        }
        let out = out[..128].as_chunks_mut::<2>().0;
        for i in 0..8 {
            // Even columns of the first halves of both groups, odd ones; the same of the second halves.
            for (part, first) in [(0, 0), (1, 1), (2, 16), (3, 17)] {
                out[part * 16 + i] = i16::from(x[first + 2 * i]).to_le_bytes();
                out[part * 16 + 8 + i] = i16::from(x[GROUP + first + 2 * i]).to_le_bytes();
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn dots(codes: *const u8, step: usize, x: *const u8) -> [__m256i; 1] {
        if VNNI {
            // SAFETY: the caller's.
            unsafe {
                let second = codes.add(step);
                let (a, b) = (two_halves(codes, second), two_halves(codes.add(16), second.add(16)));
                let first = dot(_mm256_setzero_si256(), unsigned::<OFFSET>(a), load(x));
                return [dot(first, unsigned::<OFFSET>(b), load(x.add(32)))];
            }
        }
        // SAFETY: the caller's.
        let (a, b, x) = unsafe {
            let second = codes.add(step);
            (
                two_halves(codes, second),
                two_halves(codes.add(16), second.add(16)),
                [load(x), load(x.add(32)), load(x.add(64)), load(x.add(96))],
            )
        };
        let (a, b) = (signed::<OFFSET>(a), signed::<OFFSET>(b));
        // A 16-bit word holds an even column below an odd one. Shifted up, the even one is 256 times itself, and so is its
        // product; that is taken back behind the sum.
        let even = _mm256_add_epi32(
            _mm256_madd_epi16(_mm256_slli_epi16::<8>(a), x[0]),
            _mm256_madd_epi16(_mm256_slli_epi16::<8>(b), x[2]),
        );
        let odd = _mm256_add_epi32(
            _mm256_madd_epi16(_mm256_srai_epi16::<8>(a), x[1]),
            _mm256_madd_epi16(_mm256_srai_epi16::<8>(b), x[3]),
        );
        [_mm256_add_epi32(_mm256_srai_epi32::<8>(even), odd)]
    }
}

/// 2 bits, four columns a byte.
pub struct Quarters<const VNNI: bool>;

impl<const VNNI: bool> Codes<1> for Quarters<VNNI> {
    const INPUTS: usize = 64;

    #[inline(always)]
    fn arrange(x: &[i8; PAIR], out: &mut [u8]) {
        let out = &mut out[..64];
        for i in 0..8 {
            for part in 0..4 {
                let at = part / 2 * 32 + part % 2 * 8 + i;
                out[at] = x[4 * i + part] as u8;
                out[at + 16] = x[GROUP + 4 * i + part] as u8;
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn dots(codes: *const u8, step: usize, x: *const u8) -> [__m256i; 1] {
        // SAFETY: the caller's.
        let (first, second, x) = unsafe {
            let eight = |at: *const u8| at.cast::<i64>().read_unaligned();
            (eight(codes), eight(codes.add(step)), [load(x), load(x.add(32))])
        };
        // SAFETY: the caller's.
        unsafe { [two::<VNNI>(quarters(first, second), x)] }
    }
}

/// The codes of two groups: columns 4 i, then 4 i + 1 of each in its half of the first register, 4 i + 2 and 4 i + 3 in the
/// second.
#[inline]
#[target_feature(enable = "avx2")]
pub fn quarters(first: i64, second: i64) -> [__m256i; 2] {
    let codes = _mm256_set_epi64x(second, second, first, first);
    let shifted = _mm256_srlv_epi64(codes, _mm256_set_epi64x(2, 0, 2, 0));
    let mask = _mm256_set1_epi8(3);
    [_mm256_and_si256(shifted, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(shifted), mask)]
}

/// ggml's TQ2_0: a register has a quarter of the columns of half a block, a group.
pub struct Tq2<const VNNI: bool>;

impl<const VNNI: bool> Codes<4> for Tq2<VNNI> {
    const INPUTS: usize = 64;

    #[inline(always)]
    fn arrange(x: &[i8; PAIR], out: &mut [u8]) {
        out[..64].iter_mut().zip(x).for_each(|(o, x)| *o = *x as u8);
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn dots(codes: *const u8, _step: usize, x: *const u8) -> [__m256i; 4] {
        let (mask, ones) = (_mm256_set1_epi8(3), _mm256_set1_epi16(1));
        // SAFETY: the caller's: 64 bytes of codes, 256 inputs.
        let (halves, x) = unsafe { ([load(codes), load(codes.add(32))], |group: usize| load(x.add(group * GROUP))) };
        let sums = |codes, group| match VNNI {
            // SAFETY: the caller's.
            true => unsafe { dot(_mm256_setzero_si256(), _mm256_and_si256(codes, mask), x(group)) },
            false => _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_and_si256(codes, mask), x(group)), ones),
        };
        let both =
            |a, b| _mm256_add_epi32(_mm256_permute2x128_si256::<0x20>(a, b), _mm256_permute2x128_si256::<0x31>(a, b));
        let pair = |h: __m256i, group| both(sums(h, group), sums(_mm256_srli_epi16::<2>(h), group + 1));
        let next = |h| _mm256_srli_epi16::<4>(h);
        [pair(halves[0], 0), pair(next(halves[0]), 2), pair(halves[1], 4), pair(next(halves[1]), 6)]
    }
}

/// Base 3: a byte's digits belong to five pairs of groups.
pub struct Fifths<const VNNI: bool>;

impl<const VNNI: bool> Codes<5> for Fifths<VNNI> {
    const INPUTS: usize = 64;

    #[inline(always)]
    fn arrange(x: &[i8; PAIR], out: &mut [u8]) {
        Nibbles::<false, true, VNNI>::arrange(x, out);
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn dots(codes: *const u8, _step: usize, x: *const u8) -> [__m256i; 5] {
        // SAFETY: the caller's: 64 bytes of codes, 320 inputs.
        let (mut low, mut high) = unsafe { (load(codes), load(codes.add(32))) };
        let mut sums = [_mm256_setzero_si256(); 5];
        for (p, sum) in sums.iter_mut().enumerate() {
            // SAFETY: as above.
            *sum = unsafe {
                let x = [load(x.add(64 * p)), load(x.add(64 * p + 32))];
                two::<VNNI>([digits(low), digits(high)], x)
            };
            (low, high) = (tripled(low), tripled(high));
        }
        sums
    }
}

/// The first digit of each byte: the integer part of 3 / 256 of it.
#[inline]
#[target_feature(enable = "avx2")]
pub fn digits(bytes: __m256i) -> __m256i {
    // It is 1 from 86 on, 2 from 171 on; a comparison gives -1.
    let from = |least: i8| _mm256_cmpeq_epi8(_mm256_max_epu8(bytes, _mm256_set1_epi8(least)), bytes);
    let both = _mm256_add_epi8(from(86), from(171_u8 as i8));
    _mm256_sub_epi8(_mm256_setzero_si256(), both)
}

/// What the next digit is the first of.
#[inline]
#[target_feature(enable = "avx2")]
pub fn tripled(bytes: __m256i) -> __m256i {
    _mm256_add_epi8(bytes, _mm256_add_epi8(bytes, bytes))
}
