//! Integers of 2 to 8 bits with a scale and, where asymmetric, a zero point: value = (code - zero_point) * scale.
//! The rules are compressed-tensors': scale = absmax / ((qmax - qmin) / 2) or (max - min) / (qmax - qmin) over a range
//! that includes 0; every intermediate result is rounded to the type that the weights have, and round half to even.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Params;
use super::float::Float;

/// Width and kind of an integer format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct IntFormat {
    /// Bits of a code, 2 to 8.
    pub num_bits: u8,
    /// True where the zero point is 0.
    pub symmetric: bool,
}

impl IntFormat {
    /// Least code.
    pub fn qmin(self) -> i32 {
        -(1 << (self.num_bits - 1))
    }

    /// Greatest code.
    pub fn qmax(self) -> i32 {
        (1 << (self.num_bits - 1)) - 1
    }

    /// The parameters for weights between `min` and `max`, which are of type `float`.
    #[inline(always)]
    pub fn fit(self, min: f32, max: f32, float: Float) -> Params {
        let (min, max) = (min.min(0.0), max.max(0.0));
        let range = (self.qmax() - self.qmin()) as f32;
        let (scale, zero_point) = if self.symmetric {
            (float.round(max.max(-min) / (range / 2.0)), 0.0)
        } else {
            let scale = float.round(float.round(max - min) / range);
            // A group of zeros has scale 0 here; 0/0 is the NaN that turns into zero point 0.
            let zero = float.round(self.qmin() as f32 - float.round(min / scale));
            let zero = zero.max(self.qmin() as f32).min(self.qmax() as f32);
            (scale, if scale == 0.0 { 0.0 } else { zero.round_ties_even() })
        };
        Params { scale: if scale == 0.0 { float.epsilon() } else { scale }, zero_point }
    }

    /// The code of `w`.
    #[inline(always)]
    pub fn quantize(self, w: f32, p: Params, float: Float) -> i8 {
        let scaled = float.round(w / p.scale);
        let shifted = if self.symmetric { scaled } else { float.round(scaled + p.zero_point) };
        shifted.max(self.qmin() as f32).min(self.qmax() as f32).round_ties_even() as i8
    }
}

/// The value of `code`, rounded to the type `float` of its scale.
#[inline(always)]
pub fn dequantize(code: i8, p: Params, float: Float) -> f32 {
    float.round((f32::from(code) - p.zero_point) * p.scale)
}
