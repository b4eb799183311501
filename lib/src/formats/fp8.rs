//! FP8 E4M3 (no infinities, greatest value 448) with a scale. Source: OCP 8-bit Floating Point Specification 1.0, section 5;
//! the scale rule, absmax / 448 in the weights' type, is compressed-tensors'.

use super::Params;
use super::float::Float;

/// Greatest finite value.
pub const MAX: f32 = 448.0;

/// Added to a number below 2^22 and taken away again it leaves the nearest integer, ties to even: 1.5 * 2^23.
const TO_INTEGER: f32 = 12_582_912.0;

/// The scale for weights between `min` and `max`, of type `float`.
#[inline(always)]
pub fn fit(min: f32, max: f32, float: Float) -> Params {
    let scale = float.round(max.max(-min).max(0.0) / MAX);
    Params { scale: if scale == 0.0 { float.epsilon() } else { scale }, zero_point: 0 }
}

/// `x` rounded to E4M3 (larger values become 448), ties to even.
#[inline(always)]
pub fn round_e4m3(x: f32) -> f32 {
    let x = x.clamp(-MAX, MAX);
    // Normal from 2^-6: 3 of the 23 fraction bits stay. Below, multiples of 2^-9, found by the rounding of an addition.
    let bits = x.to_bits();
    let normal = f32::from_bits((bits + 0x7_ffff + ((bits >> 20) & 1)) & 0xfff0_0000);
    let step = TO_INTEGER / 512.0;
    let small = (x.abs() + step - step).copysign(x);
    if x.abs() < 1.0 / 64.0 { small } else { normal }
}

/// The bits of an E4M3 value.
#[inline(always)]
pub fn code(value: f32) -> u8 {
    let bits = value.abs().to_bits();
    let sign = ((value.to_bits() >> 24) & 0x80) as u8;
    // Exponent bias 7 instead of 127, and 3 fraction bits; below 2^-6 the code counts multiples of 2^-9.
    let normal = (bits >> 20).wrapping_sub(120 << 3) as u8;
    let small = (value.abs() * 512.0) as u8;
    sign | if value.abs() < 1.0 / 64.0 { small } else { normal }
}

/// The value of E4M3 bits; codes 0x7f and 0xff are NaN.
#[inline(always)]
pub fn value(code: u8) -> f32 {
    let magnitude = u32::from(code & 0x7f);
    let normal = f32::from_bits((magnitude << 20) + (120 << 23));
    let small = magnitude as f32 / 512.0;
    let value = if magnitude < 8 { small } else { normal };
    let value = if magnitude == 0x7f { f32::NAN } else { value };
    f32::from_bits(value.to_bits() | u32::from(code & 0x80) << 24)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The 127 finite magnitudes in the order of their codes, from the specification's formula.
    fn magnitudes() -> Vec<f32> {
        let mut values = vec![0f32];
        values.extend((1..8).map(|m| m as f32 / 512.0));
        for e in -6..=8 {
            values.extend((8..16).map(|m| m as f32 / 8.0 * 2f32.powi(e)));
        }
        values.pop(); // 480 is the code of NaN
        assert_eq!(values.len(), 127);
        values
    }

    #[test]
    fn e4m3_values_stay_and_midpoints_go_to_even() {
        for (i, two) in magnitudes().windows(2).enumerate() {
            assert_eq!(round_e4m3(two[0]), two[0]);
            assert_eq!(round_e4m3(-two[1]), -two[1]);
            let middle = (two[0] + two[1]) / 2.0;
            assert_eq!(round_e4m3(middle), two[i % 2], "between {} and {}", two[0], two[1]);
            assert_eq!(round_e4m3(f32::from_bits(middle.to_bits() + 1)), two[1]);
            assert_eq!(round_e4m3(f32::from_bits(middle.to_bits() - 1)), two[0]);
        }
        assert_eq!(round_e4m3(1e9), 448.0);
        assert!(round_e4m3(f32::NAN).is_nan());
    }

    #[test]
    fn codes_and_values_are_each_others_inverse() {
        for (c, v) in magnitudes().into_iter().enumerate() {
            for sign in [0u8, 0x80] {
                let signed = if sign == 0 { v } else { -v };
                assert_eq!(value(c as u8 | sign).to_bits(), signed.to_bits());
                assert_eq!(code(signed), c as u8 | sign);
            }
        }
        assert!(value(0x7f).is_nan() && value(0xff).is_nan());
    }
}
