//! NVFP4: E2M1 codes in groups of 16 under an E4M3 scale, and these under one f32 number a tensor, the global scale, which
//! uses up E4M3's range: value = code * scale / global. Source: compressed-tensors' `generate_gparam` and
//! `calculate_qparams` (the quotient absmax / 6 has the weights' type, everything behind it is f32).

use super::Params;
use super::float::Float;
use super::minifloat::Minifloat::{E2M1, E4M3};

/// Values that share one scale.
pub const GROUP: usize = 16;

/// What a zero scale becomes: E4M3's distance from 1 to the next number.
const EPSILON: f32 = 0.125;

/// The global scale of a tensor of type `float` between `min` and `max`.
pub fn global(min: f32, max: f32, float: Float) -> f32 {
    let global = float.round(E4M3.max() * E2M1.max() / max.max(-min).max(f32::MIN_POSITIVE));
    if global.is_finite() { global } else { 1.0 }
}

/// The parameters of a group between `min` and `max`: the scale that is stored, beside `global`.
#[inline(always)]
pub fn fit(min: f32, max: f32, float: Float, global: f32) -> Params {
    let stored = E4M3.round(global * float.round(max.max(-min).max(0.0) / E2M1.max()));
    Params { scale: (if stored == 0.0 { EPSILON } else { stored }) / global, zero_point: 0.0 }
}

/// The bits of the scale that [`fit`] divided by `global`.
#[inline(always)]
pub fn scale_byte(scale: f32, global: f32) -> u8 {
    // The quotient is a rounding away from the scale; the next E4M3 number is at least 2^18 of these away.
    E4M3.code(E4M3.round(scale * global))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_scale_comes_back_from_its_quotient() {
        for global in [1.0f32, 1792.0, 0.3, 7.1e8, 3.3e-9] {
            for code in 1..127u8 {
                assert_eq!(scale_byte(E4M3.value(code) / global, global), code);
            }
        }
    }

    #[test]
    fn globals_fill_the_range_and_zeros_have_scales() {
        assert_eq!(global(-1.5, 1.0, Float::Bf16), 1792.0);
        assert_eq!(global(0.0, 0.0, Float::F32), 1.0);
        let p = fit(0.0, 0.0, Float::Bf16, 1792.0);
        assert_eq!(p.scale, 0.125 / 1792.0);
    }
}
