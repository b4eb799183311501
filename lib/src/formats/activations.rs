//! What a scheme does to the inputs of a linear layer at run time, computed here as compressed-tensors computes it: one
//! symmetric scale a token, fitted to that token (`dynamic`), rounded to, and multiplied back.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::float::Float;
use super::int::IntFormat;
use super::minifloat::Minifloat::E4M3;
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
    /// The same, with a scale for each 128 columns of a token.
    DynamicGroupFp8,
    /// The runtime rounds all tokens to FP8 E4M3 with one scale, which calibration found.
    StaticFp8,
}

/// Columns of a token that share a scale under [`Activations::DynamicGroupFp8`].
pub const GROUP: usize = 128;

impl Activations {
    /// The name in manifests.
    pub fn name(self) -> &'static str {
        match self {
            Self::Float => "f32",
            Self::DynamicTokenInt8 => "int8 per token",
            Self::DynamicTokenFp8 => "fp8 per token",
            Self::DynamicGroupFp8 => "fp8 per 128 columns of a token",
            Self::StaticFp8 => "fp8, one scale",
        }
    }

    /// Replaces one token's values by those that the runtime computes with. `scale` is that of [`Self::StaticFp8`].
    pub fn quantize_token(self, x: &mut [f32], scale: f32) {
        match self {
            Self::Float => {}
            Self::DynamicTokenInt8 => {
                let (low, high) = extremes(x);
                let p = IntFormat { num_bits: 8, symmetric: true }.fit(low, high, Float::F32);
                to_int8(x, p.scale);
            }
            Self::DynamicTokenFp8 => fit_and_round(x),
            Self::DynamicGroupFp8 => x.chunks_mut(GROUP).for_each(fit_and_round),
            Self::StaticFp8 => to_fp8(x, scale),
        }
    }
}

/// To FP8 with the scale that the values ask for.
fn fit_and_round(x: &mut [f32]) {
    let (low, high) = extremes(x);
    to_fp8(x, E4M3.fit(low, high, Float::F32).scale);
}

for_this_cpu! {
    /// Rounds to multiples of `scale` from -128 to 127.
    pub fn to_int8(x: &mut [f32], scale: f32) = int8_body
}

for_this_cpu! {
    /// Rounds to E4M3 values times `scale`.
    pub fn to_fp8(x: &mut [f32], scale: f32) = fp8_body
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
        *v = E4M3.round(*v / scale) * scale;
    }
}

/// Added to a number below 2^22 and taken away again it leaves the nearest integer, ties to even: 1.5 * 2^23.
const TO_INTEGER: f32 = 12_582_912.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn int8_tokens_reach_both_ends_and_zeros_stay() {
        let mut x = [0.0, 127.5, -127.5, 64.4, 0.5, 1.5, -0.3];
        Activations::DynamicTokenInt8.quantize_token(&mut x, 1.0); // with a scale of 1
        assert_eq!(x, [0.0, 127.0, -128.0, 64.0, 0.0, 2.0, 0.0]);
        let mut zeros = [0f32; 9];
        Activations::DynamicTokenInt8.quantize_token(&mut zeros, 1.0);
        Activations::DynamicTokenFp8.quantize_token(&mut zeros, 1.0);
        Activations::DynamicGroupFp8.quantize_token(&mut zeros, 1.0);
        assert_eq!(zeros, [0f32; 9]);
    }
}
