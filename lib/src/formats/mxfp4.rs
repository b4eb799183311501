//! MXFP4 as it is stored: E2M1 codes, two a byte, low nibble first, in blocks of 32 that share an E8M0 scale 2^(e-127).
//! Source: OCP Microscaling Formats (MX) v1.0, sections 5.3.3 and 5.4.1. Scale byte 255 is NaN there.

use half::{bf16, f16};

use super::float::Float;
pub use super::mx::{BLOCK, SCALE_NAN, scale, scale_byte};

/// Bytes of the codes of one block.
pub const BLOCK_BYTES: usize = BLOCK / 2;
/// The value of each code; bit 3 is the sign, so code 8 is -0.
pub const VALUES: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// The value of `code` under the scale byte `e`. Exact, but where it exceeds the range of f32 and becomes infinite.
#[inline(always)]
pub fn value(code: u8, e: u8) -> f32 {
    VALUES[usize::from(code & 15)] * scale(e)
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
