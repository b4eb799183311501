//! Number formats, one file each: a value table plus a scale rule. A *code* is the stored integer, a *value* the real
//! number it stands for.

pub mod activations;
pub mod float;
pub mod ggml;
pub mod int;
pub mod minifloat;
pub mod mx;
pub mod mxfp4;
pub mod nvfp4;
pub mod ternary;

use float::Float;
use ggml::Ggml;
use int::IntFormat;
use minifloat::Minifloat;
use ternary::Trits;

/// A number format of weights: which codes there are, how a scale is fitted, what a code means under it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NumberFormat {
    /// Integers of 2 to 8 bits.
    Int(IntFormat),
    /// Small floats under a scale of the weights' type.
    Float(Minifloat),
    /// Small floats in blocks of 32 under a power of two.
    Mx(Minifloat),
    /// E2M1 in groups of 16 under E4M3 scales under one number a tensor.
    Nvfp4,
    /// One of ggml's block types.
    Ggml(Ggml),
    /// -1, 0 and 1.
    Ternary(Trits),
    /// Floats of 16 bits, which have no codes and no scales: only values.
    Half(Float),
}

/// FP8 E4M3.
pub const FP8: NumberFormat = NumberFormat::Float(Minifloat::E4M3);
/// E2M1 in MX blocks: what gpt-oss is published in.
pub const MXFP4: NumberFormat = NumberFormat::Mx(Minifloat::E2M1);

/// What a group's codes mean: for integers value = (code - zero_point) * scale, for floats value = table(code) * scale, for
/// ggml's value = code * scale + zero_point.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Params {
    /// Positive, rounded to the type that it is stored in (for NVFP4 that number over the tensor's global scale); for ggml's
    /// types of any sign and rounded where it is used.
    pub scale: f32,
    /// A code between qmin and qmax, or for ggml's the value of code 0; 0 where symmetric, and for floats.
    pub zero_point: f32,
}

impl NumberFormat {
    /// `int4`, `fp8`, `mxfp4`.
    pub fn name(self) -> String {
        let float = |m| match m {
            Minifloat::E2M1 => "fp4",
            Minifloat::E2M3 => "fp6",
            Minifloat::E3M2 => "fp6_e3m2",
            Minifloat::E4M3 => "fp8",
            Minifloat::E5M2 => "fp8_e5m2",
        };
        match self {
            Self::Int(int) => format!("int{}", int.num_bits),
            Self::Float(m) => float(m).into(),
            Self::Mx(m) => format!("mx{}", float(m)),
            Self::Nvfp4 => "nvfp4".into(),
            Self::Ggml(ty) => ty.name().into(),
            Self::Ternary(Trits::Quarters) => "ternary".into(),
            Self::Ternary(Trits::Fifths) => "ternary_b3".into(),
            Self::Half(Float::F16) => "fp16".into(),
            Self::Half(_) => "bf16".into(),
        }
    }

    /// Bits of a code.
    pub fn bits(self) -> u8 {
        match self {
            Self::Int(int) => int.num_bits,
            Self::Float(m) | Self::Mx(m) => m.bits() as u8,
            Self::Nvfp4 => 4,
            Self::Ggml(ty) => ty.bits(),
            Self::Ternary(_) => 2,
            Self::Half(_) => 16,
        }
    }

    /// True where no zero points are stored.
    pub fn symmetric(self) -> bool {
        match self {
            Self::Int(int) => int.symmetric,
            Self::Float(_) | Self::Mx(_) | Self::Nvfp4 | Self::Ggml(_) | Self::Ternary(_) | Self::Half(_) => true,
        }
    }

    /// The parameters for weights between `min` and `max`, which are of type `float`; `global` is the tensor's global scale,
    /// for NVFP4 alone. Ternary scales come from all weights ([`ternary::absmean`]); the extremes alone tell half of theirs.
    #[inline(always)]
    pub fn fit(self, min: f32, max: f32, float: Float, global: f32) -> Params {
        match self {
            Self::Int(int) => int.fit(min, max, float),
            Self::Float(m) => m.fit(min, max, float),
            Self::Mx(m) => mx::fit(m, min, max),
            Self::Nvfp4 => nvfp4::fit(min, max, float, global),
            Self::Ggml(ty) => ty.fit(min, max),
            Self::Ternary(_) => Params { scale: ternary::positive(0.5 * max.max(-min), float), zero_point: 0.0 },
            Self::Half(_) => Params { scale: 1.0, zero_point: 0.0 },
        }
    }

    /// The code of `w`: an integer, or the bits of a small float.
    #[inline(always)]
    pub fn quantize(self, w: f32, p: Params, float: Float) -> i8 {
        match self {
            Self::Int(int) => int.quantize(w, p, float),
            Self::Float(m) => m.code(m.round(float.round(w / p.scale))) as i8,
            Self::Mx(m) => m.code(m.round(w / p.scale)) as i8,
            Self::Nvfp4 => Minifloat::E2M1.code(Minifloat::E2M1.round(w / p.scale)) as i8,
            Self::Ggml(ty) => ty.round(w, p.scale, p.zero_point).0,
            Self::Ternary(_) => float.round(w / p.scale).clamp(-1.0, 1.0).round_ties_even() as i8,
            Self::Half(_) => 0,
        }
    }

    /// The value of `code`, rounded to the type `float`.
    ///
    /// # Panics
    /// For [`Self::Half`], which has no codes.
    #[inline(always)]
    pub fn dequantize(self, code: i8, p: Params, float: Float) -> f32 {
        match self {
            Self::Int(_) | Self::Ternary(_) => int::dequantize(code, p, float),
            Self::Float(m) => float.round(m.value(code as u8) * p.scale),
            // A power of two rounds nothing.
            Self::Mx(m) => m.value(code as u8) * p.scale,
            Self::Nvfp4 => float.round(Minifloat::E2M1.value(code as u8) * p.scale),
            // Their values are f32, whatever the weights were.
            Self::Ggml(ty) => ty.value(code, p.scale, p.zero_point),
            Self::Half(_) => panic!("floats of 16 bits have no codes"),
        }
    }
}
