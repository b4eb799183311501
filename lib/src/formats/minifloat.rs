//! Floats of 4, 6 and 8 bits without infinities in use: a sign, an exponent, a fraction. Sources: OCP Microscaling Formats
//! (MX) 1.0, section 5.3, and OCP 8-bit Floating Point (OFP8) 1.0, section 5. `fp4.rs`, `fp6.rs` and `fp8.rs` test each.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Params;
use super::float::Float;

/// A table of values, named by the bits of its exponent and fraction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Minifloat {
    /// FP4, up to 6.
    E2M1,
    /// FP6, up to 7.5.
    E2M3,
    /// FP6, up to 28.
    E3M2,
    /// FP8 without infinities, up to 448.
    E4M3,
    /// FP8, up to 57344.
    E5M2,
}

/// Added to a number below 2^22 and taken away again it leaves the nearest integer, ties to even: 1.5 * 2^23.
const TO_INTEGER: f32 = 12_582_912.0;

impl Minifloat {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::E2M1, Self::E2M3, Self::E3M2, Self::E4M3, Self::E5M2];

    /// Bits of a code, the sign among them.
    #[inline(always)]
    pub const fn bits(self) -> u32 {
        match self {
            Self::E2M1 => 4,
            Self::E2M3 | Self::E3M2 => 6,
            Self::E4M3 | Self::E5M2 => 8,
        }
    }

    /// Bits of the fraction.
    #[inline(always)]
    pub const fn fraction(self) -> u32 {
        match self {
            Self::E2M1 => 1,
            Self::E3M2 | Self::E5M2 => 2,
            Self::E2M3 | Self::E4M3 => 3,
        }
    }

    /// What is added to an exponent before it is stored.
    #[inline(always)]
    pub const fn bias(self) -> u32 {
        match self {
            Self::E2M1 | Self::E2M3 => 1,
            Self::E3M2 => 3,
            Self::E4M3 => 7,
            Self::E5M2 => 15,
        }
    }

    /// Greatest finite value.
    #[inline(always)]
    pub const fn max(self) -> f32 {
        match self {
            Self::E2M1 => 6.0,
            Self::E2M3 => 7.5,
            Self::E3M2 => 28.0,
            Self::E4M3 => 448.0,
            Self::E5M2 => 57344.0,
        }
    }

    /// The scale for weights between `min` and `max`, of type `float`: absmax beside the greatest value, as compressed-tensors
    /// has it.
    #[inline(always)]
    pub fn fit(self, min: f32, max: f32, float: Float) -> Params {
        let scale = float.round(max.max(-min).max(0.0) / self.max());
        Params { scale: if scale == 0.0 { float.epsilon() } else { scale }, zero_point: 0.0 }
    }

    /// The power of two that is the exponent of the greatest value.
    pub const fn max_exponent(self) -> u32 {
        (self.max().to_bits() >> 23) - 127
    }

    /// The least normal value.
    #[inline(always)]
    const fn normal(self) -> f32 {
        f32::from_bits((128 - self.bias()) << 23)
    }

    /// The distance of values below [`Self::normal`].
    #[inline(always)]
    const fn step(self) -> f32 {
        f32::from_bits((128 - self.bias() - self.fraction()) << 23)
    }

    /// `x` rounded to the nearest value, ties to the even code; beyond the greatest value it is that. NaN stays.
    #[inline(always)]
    pub fn round(self, x: f32) -> f32 {
        let x = x.clamp(-self.max(), self.max());
        let lost = 23 - self.fraction();
        let bits = x.to_bits();
        let normal = f32::from_bits((bits + ((1 << (lost - 1)) - 1) + ((bits >> lost) & 1)) & !((1u32 << lost) - 1));
        let shift = TO_INTEGER * self.step();
        let small = (x.abs() + shift - shift).copysign(x);
        if x.abs() < self.normal() { small } else { normal }
    }

    /// The bits of one of the values.
    #[inline(always)]
    pub fn code(self, value: f32) -> u8 {
        let bits = value.abs().to_bits();
        let sign = ((value.to_bits() >> 31) << (self.bits() - 1)) as u8;
        let normal = (bits >> (23 - self.fraction())).wrapping_sub((127 - self.bias()) << self.fraction()) as u8;
        let small = (value.abs() / self.step()) as u8;
        sign | if value.abs() < self.normal() { small } else { normal }
    }

    /// The value of some bits; NaN or infinity where OFP8 says so.
    #[inline(always)]
    pub fn value(self, code: u8) -> f32 {
        let top = 1u32 << (self.bits() - 1);
        let magnitude = u32::from(code) & (top - 1);
        let normal = f32::from_bits((magnitude << (23 - self.fraction())) + ((127 - self.bias()) << 23));
        let value = if magnitude < 1 << self.fraction() { magnitude as f32 * self.step() } else { normal };
        let value = match self {
            Self::E4M3 if magnitude == 0x7f => f32::NAN,
            Self::E5M2 if magnitude == 0x7c => f32::INFINITY,
            Self::E5M2 if magnitude > 0x7c => f32::NAN,
            _ => value,
        };
        f32::from_bits(value.to_bits() | ((u32::from(code) & top) << (32 - self.bits())))
    }
}

#[cfg(test)]
mod tests {
    use super::Minifloat::{self, *};
    use serde_json::Value;

    /// Every code's value and the rounding of midpoints, their neighbours and random numbers, as ml_dtypes has them
    /// (golden/number_formats, whose `make.py` says how).
    fn golden() -> Value {
        serde_json::from_str(include_str!("../../../tests/golden/number_formats/number_formats.json")).unwrap()
    }

    #[test]
    fn every_value_and_rounding_is_ml_dtypes() {
        let golden = golden();
        for (name, format) in
            [("fp4_e2m1fn", E2M1), ("fp6_e2m3fn", E2M3), ("fp6_e3m2fn", E3M2), ("fp8_e4m3fn", E4M3), ("fp8_e5m2", E5M2)]
        {
            let values = golden[name]["values"].as_array().unwrap();
            assert_eq!(values.len(), 1 << format.bits());
            for (code, want) in values.iter().enumerate() {
                let have = format.value(code as u8);
                match want {
                    Value::Null => assert!(have.is_nan(), "{name} {code}"),
                    Value::String(s) => assert_eq!(have, s.parse::<f32>().unwrap(), "{name} {code}"),
                    want => {
                        let want = want.as_f64().unwrap();
                        assert_eq!(f64::from(have).to_bits(), want.to_bits(), "{name} {code}");
                        assert_eq!(format.code(have), code as u8, "{name} {have}");
                        assert!(have.abs() <= format.max());
                    }
                }
            }
            let list =
                |key: &str| golden[name]["round"][key].as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32);
            assert!(list("codes").count() > 512);
            for (bits, code) in list("f32_bits").zip(list("codes")) {
                let x = f32::from_bits(bits);
                assert_eq!(u32::from(format.code(format.round(x))), code, "{name} {x}");
            }
        }
    }

    #[test]
    fn what_is_too_large_becomes_the_greatest_and_nan_stays() {
        for format in Minifloat::ALL {
            assert_eq!(format.round(1e9), format.max());
            assert_eq!(format.round(f32::NEG_INFINITY), -format.max());
            assert!(format.round(f32::NAN).is_nan());
            assert_eq!(
                2f32.powi(format.max_exponent() as i32),
                (1..).map(|e| 2f32.powi(e)).take_while(|p| *p <= format.max()).last().unwrap()
            );
        }
    }
}
