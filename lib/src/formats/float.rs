//! The IEEE-like floats that checkpoints store: F32, BF16, F16. Rounding is to nearest, ties to even, everywhere.

use half::{bf16, f16};
use safetensors::Dtype;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A float type that weights are stored and rounded in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Float {
    /// IEEE binary32.
    F32,
    /// The upper half of binary32.
    Bf16,
    /// IEEE binary16.
    F16,
}

impl Float {
    /// The type of a safetensors dtype, where it is one of these.
    pub fn of(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F32 => Some(Self::F32),
            Dtype::BF16 => Some(Self::Bf16),
            Dtype::F16 => Some(Self::F16),
            _ => None,
        }
    }

    /// As safetensors spells it.
    pub fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::Bf16 => Dtype::BF16,
            Self::F16 => Dtype::F16,
        }
    }

    /// As config.json spells it.
    pub fn config_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
        }
    }

    /// Bytes of one number.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// The distance from 1 to the next number.
    pub fn epsilon(self) -> f32 {
        match self {
            Self::F32 => f32::EPSILON,
            Self::Bf16 => bf16::EPSILON.to_f32(),
            Self::F16 => f16::EPSILON.to_f32(),
        }
    }

    /// `x` rounded to this type.
    #[inline(always)]
    pub fn round(self, x: f32) -> f32 {
        match self {
            Self::F32 => x,
            Self::Bf16 => round_bf16(x),
            Self::F16 => round_f16(x),
        }
    }

    /// Reads `out.len()` little-endian numbers from `bytes`.
    ///
    /// # Panics
    /// Where `bytes` is not exactly as long as `out` needs: callers slice by element counts.
    #[inline(always)]
    pub fn read(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(bytes.len(), out.len() * self.size(), "the caller slices whole numbers");
        match self {
            Self::F32 => zip2(bytes, out, f32::from_le_bytes),
            Self::Bf16 => zip2(bytes, out, |b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)),
            Self::F16 => zip2(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
        }
    }

    /// Appends `x`, rounded, in little-endian bytes.
    pub fn write(self, x: f32, out: &mut Vec<u8>) {
        match self {
            Self::F32 => out.extend_from_slice(&x.to_le_bytes()),
            Self::Bf16 => out.extend_from_slice(&bf16::from_f32(x).to_le_bytes()),
            Self::F16 => out.extend_from_slice(&f16::from_f32(x).to_le_bytes()),
        }
    }

    /// Position of the first NaN or infinity among the little-endian numbers in `bytes`.
    pub fn first_non_finite(self, bytes: &[u8]) -> Option<usize> {
        // A block is tested as a whole first: that loop has no exits, so it vectorizes and runs at the memory's rate.
        const BLOCK: usize = 4096;
        let exponent = match self {
            Self::F32 => {
                return first_at(bytes, BLOCK, |b: [u8; 4]| u32::from_le_bytes(b) & 0x7f80_0000 == 0x7f80_0000);
            }
            Self::Bf16 => 0x7f80,
            Self::F16 => 0x7c00,
        };
        first_at(bytes, BLOCK, |b: [u8; 2]| u16::from_le_bytes(b) & exponent == exponent)
    }
}

#[inline(always)]
fn zip2<const N: usize>(bytes: &[u8], out: &mut [f32], convert: impl Fn([u8; N]) -> f32) {
    for (o, b) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *o = convert(*b);
    }
}

fn first_at<const N: usize>(bytes: &[u8], block: usize, bad: impl Fn([u8; N]) -> bool) -> Option<usize> {
    let numbers = bytes.as_chunks::<N>().0;
    for (i, chunk) in numbers.chunks(block).enumerate() {
        if chunk.iter().fold(false, |any, &b| any | bad(b)) {
            return chunk.iter().position(|&b| bad(b)).map(|at| i * block + at);
        }
    }
    None
}

/// `x` rounded to BF16, for finite `x`; bit arithmetic, so that loops over it vectorize.
#[inline(always)]
pub fn round_bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff_0000)
}

/// `x` rounded to F16, for finite `x`; without branches or calls, so that loops over it vectorize.
#[inline(always)]
pub fn round_f16(x: f32) -> f32 {
    const LEAST_NORMAL: f32 = 6.103_515_6e-5;
    let bits = x.to_bits();
    let normal = f32::from_bits((bits + 0xfff + ((bits >> 13) & 1)) & 0xffff_e000);
    // Below, numbers are 2^-24 apart, as they are between 0.5 and 1.
    let small = f32::from_bits(((x.abs() + 0.5) - 0.5).to_bits() | (bits & 0x8000_0000));
    let rounded = if x.abs() < LEAST_NORMAL { small } else { normal };
    if rounded.abs() > 65504.0 { f32::INFINITY.copysign(x) } else { rounded }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bit_rounding_is_halfs_rounding(bits in any::<u32>()) {
            let x = f32::from_bits(bits);
            prop_assume!(x.is_finite());
            prop_assert_eq!(round_bf16(x).to_bits(), bf16::from_f32(x).to_f32().to_bits());
            prop_assert_eq!(round_f16(x).to_bits(), f16::from_f32(x).to_f32().to_bits());
        }
    }

    #[test]
    fn halves_round_as_they_do_at_every_edge() {
        for half in 0..=0x7bffu16 {
            let (a, b) = (f16::from_bits(half).to_f32(), f16::from_bits(half + 1).to_f32());
            let b = if b.is_finite() { b } else { 65536.0 };
            let middle = a + (b - a) / 2.0;
            for x in [a, middle, middle.next_up(), middle.next_down()] {
                for x in [x, -x] {
                    assert_eq!(round_f16(x).to_bits(), f16::from_f32(x).to_f32().to_bits(), "{x:e}");
                }
            }
        }
    }

    #[test]
    fn the_first_bad_number_is_found_wherever_it_stands() {
        for at in [0, 1, 4095, 4096, 9999] {
            let mut bytes = vec![0u8; 20_000];
            bytes[2 * at + 1] = 0x7f;
            bytes[2 * at] = 0x80;
            assert_eq!(Float::Bf16.first_non_finite(&bytes), Some(at));
        }
        assert_eq!(Float::F16.first_non_finite(&[0xff, 0x7b]), None);
        assert_eq!(Float::F16.first_non_finite(&[0x00, 0xfc]), Some(0));
        assert_eq!(Float::F32.first_non_finite(&f32::NAN.to_le_bytes()), Some(0));
    }
}
