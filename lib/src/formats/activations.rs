//! What a scheme does to the inputs of a linear layer at run time, computed here as compressed-tensors computes it: one
//! symmetric scale a token, fitted to that token (`dynamic`), rounded to, and multiplied back.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::float::Float;
use super::int::IntFormat;
use crate::ops::for_this_cpu;
use crate::ops::round::extremes;

/// What happens to the inputs of a linear layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Activations {
    /// They stay floats.
    Float,
    /// The runtime rounds each token to int8 with a scale of its own: absmax / 127.5, half to even, -128 to 127.
    DynamicTokenInt8,
    /// The runtime rounds each token to FP8 E4M3 with a scale of its own: absmax / 448, half to even.
    DynamicTokenFp8,
}

/// Greatest finite E4M3 value.
const E4M3_MAX: f32 = 448.0;

impl Activations {
    /// The name in manifests.
    pub fn name(self) -> &'static str {
        match self {
            Self::Float => "f32",
            Self::DynamicTokenInt8 => "int8 per token",
            Self::DynamicTokenFp8 => "fp8 per token",
        }
    }

    /// Replaces one token's values by those that the runtime computes with.
    pub fn quantize_token(self, x: &mut [f32]) {
        match self {
            Self::Float => {}
            Self::DynamicTokenInt8 => {
                let (low, high) = extremes(x);
                let p = IntFormat { num_bits: 8, symmetric: true }.fit(low, high, Float::F32);
                int8(x, p.scale);
            }
            Self::DynamicTokenFp8 => {
                let (low, high) = extremes(x);
                let scale = high.max(-low) / E4M3_MAX;
                fp8(x, if scale == 0.0 { f32::EPSILON } else { scale });
            }
        }
    }
}

for_this_cpu! {
    /// Rounds to multiples of `scale` from -128 to 127.
    pub fn int8(x: &mut [f32], scale: f32) = int8_body
}

for_this_cpu! {
    /// Rounds to E4M3 values times `scale`.
    pub fn fp8(x: &mut [f32], scale: f32) = fp8_body
}

#[inline(always)]
fn int8_body(x: &mut [f32], scale: f32) {
    for v in x {
        let q = (*v / scale).clamp(-128.0, 127.0);
        *v = (q + TO_INTEGER - TO_INTEGER) * scale;
    }
}

#[inline(always)]
fn fp8_body(x: &mut [f32], scale: f32) {
    for v in x {
        *v = round_e4m3(*v / scale) * scale;
    }
}

/// Added to a number below 2^22 and taken away again it leaves the nearest integer, ties to even: 1.5 * 2^23.
const TO_INTEGER: f32 = 12_582_912.0;

/// `x` rounded to E4M3 (no infinities; larger values become 448), ties to even. Source: OCP 8-bit floating point, 5.2.
#[inline(always)]
pub fn round_e4m3(x: f32) -> f32 {
    let x = x.clamp(-E4M3_MAX, E4M3_MAX);
    // Normal from 2^-6: 3 of the 23 fraction bits stay. Below, multiples of 2^-9, found by the rounding of an addition.
    let bits = x.to_bits();
    let normal = f32::from_bits((bits + 0x7_ffff + ((bits >> 20) & 1)) & 0xfff0_0000);
    let step = TO_INTEGER / 512.0;
    let small = (x.abs() + step - step).copysign(x);
    if x.abs() < 1.0 / 64.0 { small } else { normal }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_values_stay_and_midpoints_go_to_even() {
        let mut values = vec![0f32];
        values.extend((1..8).map(|m| m as f32 / 512.0));
        for e in -6..=8 {
            values.extend((8..16).map(|m| m as f32 / 8.0 * 2f32.powi(e)));
        }
        values.pop(); // 480 is the code of NaN
        assert_eq!(values.len(), 127);
        for (i, two) in values.windows(2).enumerate() {
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
    fn int8_tokens_reach_both_ends_and_zeros_stay() {
        let mut x = [0.0, 127.5, -127.5, 64.4, 0.5, 1.5, -0.3];
        Activations::DynamicTokenInt8.quantize_token(&mut x); // with a scale of 1
        assert_eq!(x, [0.0, 127.0, -128.0, 64.0, 0.0, 2.0, 0.0]);
        let mut zeros = [0f32; 9];
        Activations::DynamicTokenInt8.quantize_token(&mut zeros);
        Activations::DynamicTokenFp8.quantize_token(&mut zeros);
        assert_eq!(zeros, [0f32; 9]);
    }
}
