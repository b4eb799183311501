//! MX formats: blocks of 32 numbers of a small float under one power of two, stored as E8M0, the exponent's byte.
//! Source: OCP Microscaling Formats (MX) 1.0, sections 5.2 and 5.4.1 (scale byte 255 is NaN); the rule that fits a scale is
//! compressed-tensors' (`quantization/utils/mxfp_utils.py`).

use super::Params;
use super::minifloat::Minifloat;

/// Values that share one scale.
pub const BLOCK: usize = 32;
/// The scale byte that stands for NaN.
pub const SCALE_NAN: u8 = 255;

/// 2^(e-127) exactly, subnormal for e = 0, NaN for e = 255.
#[inline(always)]
pub fn scale(e: u8) -> f32 {
    match e {
        0 => f32::from_bits(0x0040_0000),
        SCALE_NAN => f32::NAN,
        _ => f32::from_bits(u32::from(e) << 23),
    }
}

/// The scale byte of a scale that [`fit`] or [`scale`] made.
#[inline(always)]
pub fn scale_byte(scale: f32) -> u8 {
    (scale.to_bits() >> 23) as u8
}

/// The scale for weights between `min` and `max`: absmax is rounded to a power of two and divided by that of the greatest
/// value. Rounding goes up from a fraction of 1.75, but for E2M3, whose greatest value is 1.875 times its power of two, from
/// 1.9375. A group of zeros gets the least scale there is.
#[inline(always)]
pub fn fit(values: Minifloat, min: f32, max: f32) -> Params {
    let half_step = match values {
        Minifloat::E2M3 => 1 << 19,
        _ => 1 << 21,
    };
    let bits = max.max(-min).max(0.0).to_bits() + half_step;
    let exponent = (bits >> 23).saturating_sub(values.max_exponent());
    Params { scale: scale(exponent as u8), zero_point: 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_powers_of_two_that_leave_absmax_near_the_greatest_value() {
        for (values, absmax, want) in [
            (Minifloat::E2M1, 4.0, 1.0),
            (Minifloat::E2M1, 6.9, 1.0),
            (Minifloat::E2M1, 7.0, 2.0),
            (Minifloat::E2M1, 3.0, 0.5),
            (Minifloat::E2M1, 1e-30, 0.0),
            (Minifloat::E2M1, 0.0, scale(0)),
            (Minifloat::E2M1, 1e-45, scale(0)),
            (Minifloat::E2M3, 7.7, 1.0),
            (Minifloat::E2M3, 7.75, 2.0),
            (Minifloat::E3M2, 16.0, 1.0),
            (Minifloat::E4M3, 447.0, 1.0),
            (Minifloat::E4M3, 448.0, 2.0),
            (Minifloat::E5M2, 32768.0, 1.0),
        ] {
            let s = fit(values, -absmax, absmax / 2.0).scale;
            assert_eq!(scale(scale_byte(s)), s);
            if want > 0.0 {
                assert_eq!(s, want, "{values:?} {absmax}");
            }
        }
        assert_eq!(scale_byte(fit(Minifloat::E2M1, f32::MIN, f32::MAX).scale), 253);
    }

    #[test]
    fn every_scale_is_ml_dtypes() {
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../../../tests/golden/number_formats/number_formats.json")).unwrap();
        let values = golden["e8m0"]["values"].as_array().unwrap();
        assert_eq!(values.len(), 256);
        for (e, want) in values.iter().enumerate() {
            match want.as_f64() {
                Some(want) => assert_eq!(f64::from(scale(e as u8)), want, "{e}"),
                None => assert!(scale(e as u8).is_nan(), "{e}"),
            }
        }
    }
}
