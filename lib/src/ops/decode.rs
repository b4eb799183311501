//! Stored numbers -> f32, in place: what the quantizer, comparisons and the forward read. The references are
//! [`mxfp4::decode_row`], [`Float::read`] and [`crate::formats::NumberFormat::dequantize`].

use crate::formats::Params;
use crate::formats::float::Float;
use crate::formats::ggml::Ggml;
use crate::formats::minifloat::Minifloat;
use crate::formats::{int, mxfp4};
use crate::ops::for_this_cpu;

for_this_cpu! {
    /// Reads `out.len()` little-endian numbers of type `float` from `bytes`.
    pub fn floats(float: Float, bytes: &[u8], out: &mut [f32]) = floats_body
}

for_this_cpu! {
    /// The values of `codes` that share the parameters `p`.
    pub fn integers(codes: &[i8], p: Params, float: Float, out: &mut [f32]) = integers_body
}

for_this_cpu! {
    /// Codes of 4 bits, two a byte, low bits first, stored with 8 added.
    pub fn nibbles(packed: &[u8], codes: &mut [i8]) = nibbles_body
}

for_this_cpu! {
    /// The values of E4M3 `codes` that share `scale`, rounded to `float`.
    pub fn e4m3(codes: &[u8], scale: f32, float: Float, out: &mut [f32]) = e4m3_body
}

for_this_cpu! {
    /// The values of E2M1 codes, two a byte, low bits first, that share `scale`, rounded to `float`.
    pub fn e2m1(packed: &[u8], scale: f32, float: Float, out: &mut [f32]) = e2m1_body
}

for_this_cpu! {
    /// The values of E2M3 codes, four in three bytes, low bits first, that share `scale`, rounded to `float`.
    pub fn e2m3(packed: &[u8], scale: f32, float: Float, out: &mut [f32]) = e2m3_body
}

for_this_cpu! {
    /// Codes of 2 to 7 bits, eight in as many bytes as a code has bits, stored with half their range added.
    pub fn eights(bits: u32, packed: &[u8], codes: &mut [i8]) = eights_body
}

/// The values of whole `blocks` of ggml's type `ty`.
pub fn ggml(ty: Ggml, blocks: &[u8], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if matches!(ty, Ggml::Mxfp4 | Ggml::Q4_0) && is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c") {
        // SAFETY: AVX2 and F16C are there.
        return unsafe { avx2::ggml(ty, blocks, out) };
    }
    ggml_blocks(ty, blocks, out);
}

for_this_cpu! {
    /// The same for any type.
    fn ggml_blocks(ty: Ggml, blocks: &[u8], out: &mut [f32]) = ggml_body
}

/// A row's values of integers of 4 bits without zero points, two a byte, low bits first, stored with 8 added. `scales` are of
/// type `float`, the first for `first` values, each other for `group`; all but the last values are whole pairs.
pub fn int4(packed: &[u8], scales: &[u8], (first, group): (usize, usize), float: Float, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: AVX2 is there.
        return unsafe { avx2::int4(packed, scales, (first, group), float, out) };
    }
    int4_body(packed, scales, (first, group), float, out, sixteen_reference);
}

#[inline(always)]
fn int4_body(
    packed: &[u8],
    scales: &[u8],
    (first, group): (usize, usize),
    float: Float,
    out: &mut [f32],
    look_up: impl Fn(&[f32; 16], &[u8], &mut [f32]),
) {
    let (mut at, mut end) = (0, first.min(out.len()));
    for scale in scales.chunks_exact(float.size()) {
        let (mut scale_value, mut table) = ([0f32], [0f32; 16]);
        float.read(scale, &mut scale_value);
        let p = Params { scale: scale_value[0], zero_point: 0.0 };
        integers_body(&[-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7], p, float, &mut table);
        look_up(&table, &packed[at / 2..], &mut out[at..end]);
        (at, end) = (end, (end + group).min(out.len()));
    }
}

/// The values in `table` of codes of 4 bits, two a byte, low bits first.
fn sixteen(table: &[f32; 16], packed: &[u8], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: AVX2 is there.
        return unsafe { avx2::all_sixteen(table, packed, out) };
    }
    sixteen_reference(table, packed, out);
}

#[inline(always)]
fn sixteen_reference(table: &[f32; 16], packed: &[u8], out: &mut [f32]) {
    for (pair, &b) in out.chunks_mut(2).zip(packed) {
        pair[0] = table[usize::from(b & 15)];
        if let Some(second) = pair.get_mut(1) {
            *second = table[usize::from(b >> 4)];
        }
    }
}

/// Asks for bytes that will be read soon.
#[inline]
pub fn prefetch(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    for line in bytes.chunks(64) {
        // SAFETY: a hint about an address inside the slice; it reads nothing.
        unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = bytes;
}

#[inline(always)]
fn nibbles_body(packed: &[u8], codes: &mut [i8]) {
    let (pairs, last) = codes.as_chunks_mut::<2>();
    for (pair, &b) in pairs.iter_mut().zip(packed) {
        *pair = [(b & 15) as i8 - 8, (b >> 4) as i8 - 8];
    }
    let odd = pairs.len();
    last.iter_mut().for_each(|c| *c = (packed[odd] & 15) as i8 - 8);
}

#[inline(always)]
fn ggml_body(ty: Ggml, blocks: &[u8], out: &mut [f32]) {
    // The type is a constant in each arm, so that loops have no choices left.
    match ty {
        Ggml::Q4_0 => blocks_of(Ggml::Q4_0, blocks, out),
        Ggml::Q4_1 => blocks_of(Ggml::Q4_1, blocks, out),
        Ggml::Q5_0 => blocks_of(Ggml::Q5_0, blocks, out),
        Ggml::Q5_1 => blocks_of(Ggml::Q5_1, blocks, out),
        Ggml::Q8_0 => blocks_of(Ggml::Q8_0, blocks, out),
        Ggml::Tq1_0 => blocks_of(Ggml::Tq1_0, blocks, out),
        Ggml::Tq2_0 => blocks_of(Ggml::Tq2_0, blocks, out),
        Ggml::Mxfp4 => blocks_of(Ggml::Mxfp4, blocks, out),
    }
}

#[inline(always)]
fn blocks_of(ty: Ggml, blocks: &[u8], out: &mut [f32]) {
    let mut codes = [0i8; 256];
    let codes = &mut codes[..ty.group()];
    for (block, out) in blocks.chunks_exact(ty.bytes()).zip(out.chunks_exact_mut(ty.group())) {
        let p = ty.unpack(block, codes);
        for (o, &c) in out.iter_mut().zip(&*codes) {
            *o = ty.value(c, p.scale, p.zero_point);
        }
    }
}

#[inline(always)]
fn floats_body(float: Float, bytes: &[u8], out: &mut [f32]) {
    float.read(bytes, out);
}

#[inline(always)]
fn integers_body(codes: &[i8], p: Params, float: Float, out: &mut [f32]) {
    // The type is a constant in each arm, so that the loop vectorizes.
    let mut all = |float: Float| {
        for (o, &c) in out.iter_mut().zip(codes) {
            *o = int::dequantize(c, p, float);
        }
    };
    match float {
        Float::Bf16 => all(Float::Bf16),
        Float::F16 => all(Float::F16),
        Float::F32 => all(Float::F32),
    }
}

#[inline(always)]
fn e4m3_body(codes: &[u8], scale: f32, float: Float, out: &mut [f32]) {
    let mut all = |float: Float| {
        for (o, &c) in out.iter_mut().zip(codes) {
            *o = float.round(Minifloat::E4M3.value(c) * scale);
        }
    };
    match float {
        Float::Bf16 => all(Float::Bf16),
        Float::F16 => all(Float::F16),
        Float::F32 => all(Float::F32),
    }
}

/// The value of each E2M3 code.
const E2M3: [f32; 64] = {
    let mut values = [0f32; 64];
    let mut code = 0;
    while code < 32 {
        // Eighths below 1; above, the exponent and three bits of the fraction as f32 has them.
        let normal = f32::from_bits(((code as u32) << 20) + (126 << 23));
        values[code] = if code < 8 { code as f32 / 8.0 } else { normal };
        values[code + 32] = -values[code];
        code += 1;
    }
    values
};

/// The values of a table under a scale: few beside the codes that look them up.
#[inline(always)]
fn scaled<const N: usize>(table: &[f32; N], scale: f32, float: Float) -> [f32; N] {
    let mut out = [0f32; N];
    match float {
        Float::Bf16 => (0..N).for_each(|i| out[i] = Float::Bf16.round(table[i] * scale)),
        Float::F16 => (0..N).for_each(|i| out[i] = Float::F16.round(table[i] * scale)),
        Float::F32 => (0..N).for_each(|i| out[i] = table[i] * scale),
    }
    out
}

#[inline(always)]
fn e2m1_body(packed: &[u8], scale: f32, float: Float, out: &mut [f32]) {
    sixteen(&scaled(&mxfp4::VALUES, scale, float), packed, out);
}

#[inline(always)]
fn e2m3_body(packed: &[u8], scale: f32, float: Float, out: &mut [f32]) {
    let table = scaled(&E2M3, scale, float);
    for (four, three) in out.chunks_mut(4).zip(packed.as_chunks::<3>().0) {
        let word = u32::from_le_bytes([three[0], three[1], three[2], 0]) as usize;
        four.iter_mut().enumerate().for_each(|(i, v)| *v = table[(word >> (6 * i)) & 63]);
    }
}

#[inline(always)]
fn eights_body(bits: u32, packed: &[u8], codes: &mut [i8]) {
    match bits {
        2 => eights_of::<2>(packed, codes),
        3 => eights_of::<3>(packed, codes),
        4 => eights_of::<4>(packed, codes),
        5 => eights_of::<5>(packed, codes),
        6 => eights_of::<6>(packed, codes),
        7 => eights_of::<7>(packed, codes),
        _ => unreachable!("a code of 8 bits is a byte"),
    }
}

#[inline(always)]
fn eights_of<const BITS: usize>(packed: &[u8], codes: &mut [i8]) {
    for (eight, bytes) in codes.as_chunks_mut::<8>().0.iter_mut().zip(packed.as_chunks::<BITS>().0) {
        let mut word = [0u8; 8];
        word[..BITS].copy_from_slice(bytes);
        let word = u64::from_le_bytes(word);
        for (i, code) in eight.iter_mut().enumerate() {
            *code = ((word >> (i * BITS)) as i8 & ((1 << BITS) - 1)) - (1 << (BITS - 1));
        }
    }
}

/// Decodes `codes` [in/2] under `scales` [in/32] into `out` [in].
pub fn decode_row(codes: &[u8], scales: &[u8], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: AVX2 is there.
        return unsafe { avx2::decode_row(codes, scales, out) };
    }
    mxfp4::decode_row(codes, scales, out);
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    //! Eight magnitudes fit one vector, so a code is looked up by a permutation and its sign bit put on top.

    use std::arch::x86_64::*;

    use crate::formats::float::Float;
    use crate::formats::ggml::Ggml;
    use crate::formats::mxfp4::{BLOCK, BLOCK_BYTES, VALUES, scale};

    /// A block of [`super::sixteen`], or where `HALVES` one of ggml's, whose first half has the low bits: a table of sixteen is
    /// two of eight, and a code's highest bit says which.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn sixteen<const HALVES: bool>(table: &[f32; 16], packed: &[u8; 16], out: &mut [f32; 32]) {
        // SAFETY: 16 values, and 16 bytes.
        let (tables, bytes) = unsafe {
            let tables = [_mm256_loadu_ps(table.as_ptr()), _mm256_loadu_ps(table.as_ptr().add(8))];
            (tables, _mm_loadu_si128(packed.as_ptr().cast()))
        };
        let nibble = _mm_set1_epi8(15);
        let (low, high) = (_mm_and_si128(bytes, nibble), _mm_and_si128(_mm_srli_epi16::<4>(bytes), nibble));
        let halves = if HALVES { [low, high] } else { [_mm_unpacklo_epi8(low, high), _mm_unpackhi_epi8(low, high)] };
        for (i, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let eight = if i % 2 == 0 { halves[i / 2] } else { _mm_srli_si128::<8>(halves[i / 2]) };
            let code = _mm256_cvtepu8_epi32(eight);
            let [first, second] =
                [_mm256_permutevar8x32_ps(tables[0], code), _mm256_permutevar8x32_ps(tables[1], code)];
            let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(code));
            // SAFETY: room for 8 values.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), _mm256_blendv_ps(first, second, upper)) };
        }
    }

    /// [`super::sixteen`].
    #[inline]
    #[target_feature(enable = "avx2")]
    pub fn all_sixteen(table: &[f32; 16], packed: &[u8], out: &mut [f32]) {
        let whole = out.len() / 32;
        let (blocks, rest) = out.split_at_mut(32 * whole);
        let (bytes, rest_bytes) = packed.split_at(16 * whole);
        for (bytes, out) in bytes.as_chunks::<16>().0.iter().zip(blocks.as_chunks_mut::<32>().0) {
            sixteen::<false>(table, bytes, out);
        }
        super::sixteen_reference(table, rest_bytes, rest);
    }

    #[target_feature(enable = "avx2")]
    pub fn int4(packed: &[u8], scales: &[u8], groups: (usize, usize), float: Float, out: &mut [f32]) {
        super::int4_body(packed, scales, groups, float, out, |table, packed, out| all_sixteen(table, packed, out));
    }

    /// [`super::ggml`] for Q4_0 and MXFP4.
    #[target_feature(enable = "avx2,f16c")]
    pub fn ggml(ty: Ggml, blocks: &[u8], out: &mut [f32]) {
        let mxfp4 = ty == Ggml::Mxfp4;
        let codes: [f32; 16] = if mxfp4 { VALUES } else { std::array::from_fn(|i| i as f32 - 8.0) };
        let (size, mut table) = (ty.bytes(), [0f32; 16]);
        for (block, out) in blocks.chunks_exact(size).zip(out.as_chunks_mut::<32>().0) {
            let by = match mxfp4 {
                true => scale(block[0]),
                // The scale is F16 already, so nothing of it is rounded.
                false => _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(block[0]) | i32::from(block[1]) << 8))),
            };
            table.iter_mut().zip(codes).for_each(|(t, c)| *t = by * c);
            sixteen::<true>(&table, block[size - 16..].first_chunk().expect("16 bytes of codes"), out);
        }
    }

    #[target_feature(enable = "avx2")]
    pub fn decode_row(codes: &[u8], scales: &[u8], out: &mut [f32]) {
        // SAFETY: 8 of the 16 values.
        let magnitudes = unsafe { _mm256_loadu_ps(VALUES.as_ptr()) };
        let nibble = _mm_set1_epi8(15);
        let sign = _mm256_set1_epi32(i32::MIN);
        for ((block, &e), out) in
            codes.as_chunks::<BLOCK_BYTES>().0.iter().zip(scales).zip(out.as_chunks_mut::<BLOCK>().0)
        {
            let table = _mm256_mul_ps(magnitudes, _mm256_set1_ps(scale(e)));
            // SAFETY: a block has 16 bytes.
            let bytes = unsafe { _mm_loadu_si128(block.as_ptr().cast()) };
            let low = _mm_and_si128(bytes, nibble);
            let high = _mm_and_si128(_mm_srli_epi16::<4>(bytes), nibble);
            let halves = [_mm_unpacklo_epi8(low, high), _mm_unpackhi_epi8(low, high)];
            for (i, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                let eight = if i % 2 == 0 { halves[i / 2] } else { _mm_srli_si128::<8>(halves[i / 2]) };
                let code = _mm256_cvtepu8_epi32(eight);
                let minus = _mm256_and_si256(_mm256_slli_epi32::<28>(code), sign);
                let value = _mm256_xor_ps(_mm256_permutevar8x32_ps(table, code), _mm256_castsi256_ps(minus));
                // SAFETY: room for 8 values.
                unsafe { _mm256_storeu_ps(out.as_mut_ptr(), value) };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_hold_every_code() {
        for code in 0..64u8 {
            assert_eq!(E2M3[usize::from(code)].to_bits(), Minifloat::E2M3.value(code).to_bits(), "{code}");
        }
        for code in 0..16u8 {
            assert_eq!(mxfp4::VALUES[usize::from(code)].to_bits(), Minifloat::E2M1.value(code).to_bits(), "{code}");
        }
    }

    #[test]
    fn tables_of_sixteen_are_looked_up_at_every_length() {
        let table: [f32; 16] = std::array::from_fn(|i| (i * i) as f32 - 40.5);
        let packed: Vec<u8> = (0..256).map(|i| (i * 7 + i / 16) as u8).collect();
        for length in [1, 2, 31, 32, 33, 95, 96, 512] {
            let (mut fast, mut plain) = (vec![0f32; length], vec![1f32; length]);
            sixteen(&table, &packed, &mut fast);
            sixteen_reference(&table, &packed, &mut plain);
            assert_eq!(fast, plain, "{length}");
        }
    }

    /// Every code under scales of every kind, against the rule itself.
    #[test]
    fn four_bits_have_the_values_of_their_formats() {
        let packed: Vec<u8> = (0..=255).collect();
        let code = |i: usize| (packed[i / 2] >> (i % 2 * 4) & 15) as i8 - 8;
        let scales = [0.0123, -3e-39, 1e38, f32::NAN, 0.75, 1.0, 3e-7, 0.0, 2.0];
        for float in [Float::Bf16, Float::F16, Float::F32] {
            let mut stored = Vec::new();
            scales.iter().for_each(|s| float.write(*s, &mut stored));
            // The first group is cut at the front, the last at the end.
            for (first, group, length) in [(64, 64, 512), (32, 64, 500), (2, 128, 511), (512, 512, 512)] {
                let mut values = vec![0f32; length];
                int4(&packed, &stored, (first, group), float, &mut values);
                for (i, v) in values.iter().enumerate() {
                    let scale = scales[if i < first { 0 } else { 1 + (i - first) / group }];
                    let p = Params { scale: float.round(scale), zero_point: 0.0 };
                    let want = crate::formats::int::dequantize(code(i), p, float);
                    assert!(v.to_bits() == want.to_bits() || (v.is_nan() && want.is_nan()), "{i}: {v} and {want}");
                }
            }
        }
        for ty in [Ggml::Mxfp4, Ggml::Q4_0, Ggml::Q4_1] {
            let blocks: Vec<u8> = (0..64 * ty.bytes()).map(|i| (i * 37 + i / 11) as u8).collect();
            let (mut fast, mut plain) = (vec![0f32; 64 * 32], vec![1f32; 64 * 32]);
            ggml(ty, &blocks, &mut fast);
            ggml_blocks(ty, &blocks, &mut plain);
            for (a, b) in fast.iter().zip(&plain) {
                assert!(a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()), "{ty:?}: {a} and {b}");
            }
        }
    }

    #[test]
    fn fast_and_reference_agree_for_every_code_under_every_scale() {
        // A row of 256 blocks, one a scale, each with all 16 codes in both nibbles.
        let codes: Vec<u8> = (0..256).flat_map(|_| (0..16u8).map(|j| j | (15 - j) << 4)).collect();
        let scales: Vec<u8> = (0..=255).collect();
        let (mut fast, mut plain) = (vec![0f32; 8192], vec![1f32; 8192]);
        decode_row(&codes, &scales, &mut fast);
        mxfp4::decode_row(&codes, &scales, &mut plain);
        for (i, (a, b)) in fast.iter().zip(&plain).enumerate() {
            assert!(a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()), "value {i}: {a} and {b}");
        }
    }
}
