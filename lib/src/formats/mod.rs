//! Number formats, one file each: a value table plus a scale rule. A *code* is the stored integer, a *value* the real
//! number it stands for.

pub mod activations;
pub mod float;
pub mod fp8;
pub mod int;
pub mod mxfp4;

use float::Float;
use int::IntFormat;

/// A number format of weights: which codes there are, how a scale is fitted, what a code means under it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NumberFormat {
    /// Integers of 2 to 8 bits.
    Int(IntFormat),
    /// FP8 E4M3.
    Fp8,
    /// E2M1 under a power of two.
    Mxfp4,
}

/// What a group's codes mean: for integers value = (code - zero_point) * scale, for floats value = table(code) * scale.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Params {
    /// Positive, rounded to the type that it is stored in.
    pub scale: f32,
    /// Between qmin and qmax; 0 where symmetric, and for floats.
    pub zero_point: i8,
}

impl NumberFormat {
    /// `int4`, `fp8`, `mxfp4`.
    pub fn name(self) -> String {
        match self {
            Self::Int(int) => format!("int{}", int.num_bits),
            Self::Fp8 => "fp8".into(),
            Self::Mxfp4 => "mxfp4".into(),
        }
    }

    /// Bits of a code.
    pub fn bits(self) -> u8 {
        match self {
            Self::Int(int) => int.num_bits,
            Self::Fp8 => 8,
            Self::Mxfp4 => 4,
        }
    }

    /// True where no zero points are stored.
    pub fn symmetric(self) -> bool {
        match self {
            Self::Int(int) => int.symmetric,
            Self::Fp8 | Self::Mxfp4 => true,
        }
    }

    /// The parameters for weights between `min` and `max`, which are of type `float`.
    #[inline(always)]
    pub fn fit(self, min: f32, max: f32, float: Float) -> Params {
        match self {
            Self::Int(int) => int.fit(min, max, float),
            Self::Fp8 => fp8::fit(min, max, float),
            Self::Mxfp4 => mxfp4::fit(min, max),
        }
    }

    /// The code of `w`: an integer, or the bits of a small float.
    #[inline(always)]
    pub fn quantize(self, w: f32, p: Params, float: Float) -> i8 {
        match self {
            Self::Int(int) => int.quantize(w, p, float),
            Self::Fp8 => fp8::code(fp8::round_e4m3(float.round(w / p.scale))) as i8,
            Self::Mxfp4 => mxfp4::code(mxfp4::round_e2m1(w / p.scale)) as i8,
        }
    }

    /// The value of `code`, rounded to the type `float`.
    #[inline(always)]
    pub fn dequantize(self, code: i8, p: Params, float: Float) -> f32 {
        match self {
            Self::Int(_) => int::dequantize(code, p, float),
            Self::Fp8 => float.round(fp8::value(code as u8) * p.scale),
            Self::Mxfp4 => mxfp4::VALUES[usize::from(code as u8 & 15)] * p.scale,
        }
    }
}
