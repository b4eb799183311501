//! MXFP4: E2M1 codes, two a byte, low nibble first, in blocks of 32 that share an E8M0 scale 2^(e-127).
//! Source: OCP Microscaling Formats (MX) v1.0, sections 5.3.3 and 5.4.1. Scale byte 255 is NaN there.

use half::{bf16, f16};

use super::Params;
use super::float::Float;

/// Values that share one scale.
pub const BLOCK: usize = 32;
/// Bytes of the codes of one block.
pub const BLOCK_BYTES: usize = BLOCK / 2;
/// Added to a number below 2^22 and taken away again it leaves the nearest integer, ties to even: 1.5 * 2^23.
const TO_INTEGER: f32 = 12_582_912.0;
/// The scale byte that stands for NaN.
pub const SCALE_NAN: u8 = 255;

/// The value of each code; bit 3 is the sign, so code 8 is -0.
pub const VALUES: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// 2^(e-127) exactly, subnormal for e = 0, NaN for e = 255.
#[inline(always)]
pub fn scale(e: u8) -> f32 {
    match e {
        0 => f32::from_bits(0x0040_0000),
        SCALE_NAN => f32::NAN,
        _ => f32::from_bits(u32::from(e) << 23),
    }
}

/// The value of `code` under the scale byte `e`. Exact, but where it exceeds the range of f32 and becomes infinite.
#[inline(always)]
pub fn value(code: u8, e: u8) -> f32 {
    VALUES[usize::from(code & 15)] * scale(e)
}

/// The scale for weights between `min` and `max`: absmax is rounded to a power of two, up from a fraction of 1.75, and
/// divided by 4, as compressed-tensors does; a group of zeros gets the least scale there is.
#[inline(always)]
pub fn fit(min: f32, max: f32) -> Params {
    // Half a step of E2M1's one fraction bit, added to absmax.
    let bits = max.max(-min).max(0.0).to_bits() + (1 << 21);
    let exponent = (bits >> 23).saturating_sub(2);
    Params { scale: scale(exponent as u8), zero_point: 0 }
}

/// The scale byte of a scale that [`fit`] or [`scale`] made.
#[inline(always)]
pub fn scale_byte(scale: f32) -> u8 {
    (scale.to_bits() >> 23) as u8
}

/// `x` rounded to E2M1 (larger values become 6), ties to the even code.
#[inline(always)]
pub fn round_e2m1(x: f32) -> f32 {
    // Multiples of 0.5 up to 2, of 1 up to 4, of 2 up to 6; an even multiple has an even code.
    let a = x.abs().min(6.0);
    let step = if a < 2.0 { 0.5 } else { 1.0 };
    let step = if a < 4.0 { step } else { 2.0 };
    let shift = TO_INTEGER * step;
    (a + shift - shift).copysign(x)
}

/// The bits of an E2M1 value.
#[inline(always)]
pub fn code(value: f32) -> u8 {
    let a = value.abs();
    let normal = ((a.to_bits() >> 22).wrapping_sub(252)) as u8;
    let magnitude = if a < 1.0 { (a * 2.0) as u8 } else { normal };
    magnitude | ((value.to_bits() >> 28) & 8) as u8
}

/// Packs codes, two a byte, low nibble first; whole blocks, so no byte is shared between rows.
pub fn pack(codes: &[i8]) -> Vec<u8> {
    codes.as_chunks::<2>().0.iter().map(|&[low, high]| (low as u8 & 15) | (high as u8) << 4).collect()
}

/// Decodes one row: `codes` [in/2], `scales` [in/32], `out` [in].
pub fn decode_row(codes: &[u8], scales: &[u8], out: &mut [f32]) {
    for ((block, &e), out) in codes.as_chunks::<BLOCK_BYTES>().0.iter().zip(scales).zip(out.as_chunks_mut::<BLOCK>().0)
    {
        let s = scale(e);
        for (pair, byte) in out.as_chunks_mut::<2>().0.iter_mut().zip(block) {
            *pair = [VALUES[usize::from(byte & 15)] * s, VALUES[usize::from(byte >> 4)] * s];
        }
    }
}

/// What became of a number that had to fit a 16-bit float.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Exact and normal, or zero.
    Exact,
    /// Smaller than the smallest normal number; F16 may have lost bits.
    Subnormal,
    /// Became zero.
    Underflow,
    /// Became infinite.
    Overflow,
    /// The scale was NaN.
    Nan,
}

/// `code` under scale byte `e` as bits of the 16-bit float `to`, and what became of it.
///
/// # Panics
/// For [`Float::F32`], which has 32 bits.
pub fn half_bits(code: u8, e: u8, to: Float) -> (u16, Fate) {
    let v = value(code, e);
    let (bits, infinite, normal) = match to {
        Float::Bf16 => (bf16::from_f32(v).to_bits(), bf16::from_f32(v).is_infinite(), bf16::from_f32(v).is_normal()),
        Float::F16 => (f16::from_f32(v).to_bits(), f16::from_f32(v).is_infinite(), f16::from_f32(v).is_normal()),
        Float::F32 => panic!("half_bits is for 16-bit floats"),
    };
    let fate = if e == SCALE_NAN {
        Fate::Nan
    } else if infinite {
        Fate::Overflow
    } else if normal || v == 0.0 {
        Fate::Exact
    } else if bits & 0x7fff == 0 {
        Fate::Underflow
    } else {
        Fate::Subnormal
    };
    (bits, fate)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `code` times 2^(e-127) in integers: mantissa (in halves) and exponent. No floating point is involved.
    fn exact(code: u8, e: u8) -> (bool, u64, i32) {
        let halves = [0u64, 1, 2, 3, 4, 6, 8, 12][usize::from(code & 7)];
        (code & 8 != 0, halves, i32::from(e) - 128)
    }

    /// `mantissa` * 2^`exp` rounded to nearest even with `fraction` stored bits and the exponent range of `max_exp`.
    fn round_to(negative: bool, mantissa: u64, exp: i32, fraction: i32, max_exp: i32) -> u16 {
        let sign = if negative { 0x8000u16 } else { 0 };
        if mantissa == 0 {
            return sign;
        }
        let top = 63 - mantissa.leading_zeros() as i32 + exp;
        let least = (top.max(1 - max_exp)) - fraction;
        // mantissa * 2^exp = q * 2^least, rounded.
        let shift = exp - least;
        let q = if shift >= 0 {
            mantissa << shift
        } else if -shift > 60 {
            0
        } else {
            let (d, half) = (-shift as u32, 1u64 << (-shift as u32 - 1));
            let (q, r) = (mantissa >> d, mantissa & ((1 << d) - 1));
            q + u64::from(r > half || (r == half && q & 1 == 1))
        };
        // The stored fields add up: a carry out of the fraction raises the exponent.
        let biased = (top.max(1 - max_exp) + max_exp - 1).max(0) as u64;
        let bits = (biased << fraction) + q;
        let infinite = ((2 * max_exp + 1) as u64) << fraction;
        sign | bits.min(infinite) as u16
    }

    #[test]
    fn every_code_under_every_scale_is_exact_in_both_halves() {
        for e in 0..=254u8 {
            for code in 0..16u8 {
                let (negative, mantissa, exp) = exact(code, e);
                let bf = round_to(negative, mantissa, exp, 7, 127);
                assert_eq!(half_bits(code, e, Float::Bf16).0, bf, "bf16 code {code} scale {e}");
                let hf = round_to(negative, mantissa, exp, 10, 15);
                assert_eq!(half_bits(code, e, Float::F16).0, hf, "f16 code {code} scale {e}");
            }
        }
    }

    #[test]
    fn e2m1_values_stay_and_midpoints_go_to_even_codes() {
        for c in 0..8u8 {
            let v = VALUES[usize::from(c)];
            assert_eq!((round_e2m1(v), code(v), code(-v)), (v, c, c | 8));
            if c < 7 {
                let next = VALUES[usize::from(c) + 1];
                let middle = (v + next) / 2.0;
                assert_eq!(round_e2m1(middle), if c % 2 == 0 { v } else { next });
                assert_eq!(round_e2m1(f32::from_bits(middle.to_bits() + 1)), next);
                assert_eq!(round_e2m1(-f32::from_bits(middle.to_bits() - 1)), -v);
            }
        }
        assert_eq!(round_e2m1(1e9), 6.0);
    }

    #[test]
    fn scales_are_powers_of_two_that_leave_absmax_below_seven_steps() {
        for (absmax, want) in
            [(4.0, 1.0), (6.9, 1.0), (7.0, 2.0), (3.0, 0.5), (1e-30, 0.0), (0.0, scale(0)), (1e-45, scale(0))]
        {
            let s = fit(-absmax, absmax / 2.0).scale;
            assert_eq!(scale(scale_byte(s)), s);
            if want > 0.0 {
                assert_eq!(s, want, "{absmax}");
            }
        }
        assert_eq!(scale_byte(fit(f32::MIN, f32::MAX).scale), 253);
    }

    #[test]
    fn scale_255_is_nan_for_every_code() {
        for code in 0..16 {
            for to in [Float::Bf16, Float::F16] {
                let (bits, fate) = half_bits(code, SCALE_NAN, to);
                assert_eq!(fate, Fate::Nan);
                assert!(bits & 0x7fff > if to == Float::Bf16 { 0x7f80 } else { 0x7c00 });
            }
        }
    }

    #[test]
    fn fates_are_named_at_the_edges() {
        assert_eq!(half_bits(7, 140, Float::F16).1, Fate::Exact);
        assert_eq!(half_bits(7, 141, Float::F16).1, Fate::Overflow);
        assert_eq!(half_bits(1, 114, Float::F16).1, Fate::Exact);
        assert_eq!(half_bits(1, 113, Float::F16).1, Fate::Subnormal);
        assert_eq!(half_bits(1, 102, Float::F16).1, Fate::Underflow);
        assert_eq!(half_bits(0, 0, Float::F16).1, Fate::Exact);
        assert_eq!(half_bits(1, 0, Float::Bf16).1, Fate::Subnormal);
        assert_eq!(half_bits(7, 253, Float::Bf16).1, Fate::Overflow);
    }
}
