//! ggml's block types: 32 or 256 numbers of a row under one scale of 16 bits. Their arithmetic is ggml's own, to the bit:
//! codes are products with the reciprocal of the scale before it is rounded to F16, values those with it as it is stored.
//! Source: llama.cpp `ggml-quants.c` and its mirror in gguf-py, `quants.py`.

use half::f16;

use super::float::Float;
use super::{Params, mx};

/// A block type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ggml {
    /// 4 bits; the number farthest from 0 becomes -8 times the scale, which has its sign turned.
    Q4_0,
    /// 4 bits above the least number.
    Q4_1,
    /// 5 bits, as [`Self::Q4_0`].
    Q5_0,
    /// 5 bits, as [`Self::Q4_1`].
    Q5_1,
    /// 8 bits, -127 to 127.
    Q8_0,
    /// -1, 0 and 1, five in a byte.
    Tq1_0,
    /// -1, 0 and 1, four in a byte.
    Tq2_0,
    /// E2M1 under a power of two that the exponent of the greatest number alone decides, ties toward 0.
    Mxfp4,
}

impl Ggml {
    /// All of them.
    pub const ALL: [Self; 8] =
        [Self::Q4_0, Self::Q4_1, Self::Q5_0, Self::Q5_1, Self::Q8_0, Self::Tq1_0, Self::Tq2_0, Self::Mxfp4];

    /// As recipes spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q5_0 => "q5_0",
            Self::Q5_1 => "q5_1",
            Self::Q8_0 => "q8_0",
            Self::Tq1_0 => "tq1_0",
            Self::Tq2_0 => "tq2_0",
            Self::Mxfp4 => "mxfp4",
        }
    }

    /// Bits of a code.
    pub fn bits(self) -> u8 {
        match self {
            Self::Q4_0 | Self::Q4_1 | Self::Mxfp4 => 4,
            Self::Q5_0 | Self::Q5_1 => 5,
            Self::Q8_0 => 8,
            Self::Tq1_0 | Self::Tq2_0 => 2,
        }
    }

    /// Numbers of a block.
    pub const fn group(self) -> usize {
        match self {
            Self::Tq1_0 | Self::Tq2_0 => 256,
            _ => 32,
        }
    }

    /// Bytes of a block.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Tq1_0 => 54,
            Self::Tq2_0 => 66,
            Self::Mxfp4 => 17,
        }
    }

    /// Bytes of a row of `columns`, a multiple of [`Self::group`].
    pub const fn row_bytes(self, columns: usize) -> usize {
        columns / self.group() * self.bytes()
    }

    /// Greatest code, and what is taken from a code: value = (code - that) * scale + zero.
    const fn range(self) -> (f32, f32) {
        match self {
            Self::Q4_0 => (15.0, 8.0),
            Self::Q4_1 => (15.0, 0.0),
            Self::Q5_0 => (31.0, 16.0),
            Self::Q5_1 => (31.0, 0.0),
            Self::Q8_0 => (127.0, 0.0),
            Self::Tq1_0 | Self::Tq2_0 => (1.0, 0.0),
            Self::Mxfp4 => (6.0, 0.0),
        }
    }

    /// The parameters for weights between `min` and `max`; the scale is not rounded yet. Where both are as far from 0, ggml
    /// takes the sign of the first; this takes the lesser.
    #[inline(always)]
    pub fn fit(self, min: f32, max: f32) -> Params {
        let absmax = max.max(-min);
        let (scale, zero_point) = match self {
            Self::Q4_0 | Self::Q5_0 => ((if -min >= max { min } else { max }) / -self.range().1, 0.0),
            Self::Q4_1 | Self::Q5_1 => ((max - min) / self.range().0, min),
            Self::Q8_0 => (absmax / 127.0, 0.0),
            Self::Tq1_0 | Self::Tq2_0 => (absmax, 0.0),
            Self::Mxfp4 => (mx::scale((absmax.to_bits() >> 23).saturating_sub(2) as u8), 0.0),
        };
        Params { scale, zero_point }
    }

    /// The code of `w` and its value: what [`super::NumberFormat::quantize`] and `dequantize` give.
    #[inline(always)]
    pub fn round(self, w: f32, scale: f32, zero: f32) -> (i8, f32) {
        if let Self::Mxfp4 = self {
            let a = w.abs() / scale;
            let above = |edge: f32| i8::from(a > edge);
            let code = above(0.25) + above(0.75) + above(1.25) + above(1.75) + above(2.5) + above(3.5) + above(5.0);
            let signed = if w < 0.0 && code > 0 { code + 8 } else { code };
            return (signed, self.value(signed, scale, zero));
        }
        let reciprocal = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        let (most, offset) = self.range();
        let code = match self {
            Self::Q8_0 | Self::Tq1_0 | Self::Tq2_0 => {
                // Half away from 0.
                clamp((w * reciprocal).round(), -most, most) as i8
            }
            _ => {
                let shifted = clamp((w - zero) * reciprocal + (offset + 0.5), 0.0, most);
                (shifted as i32 - offset as i32) as i8
            }
        };
        (code, self.value(code, scale, zero))
    }

    /// The value of `code` under parameters that are not rounded yet.
    #[inline(always)]
    pub fn value(self, code: i8, scale: f32, zero: f32) -> f32 {
        match self {
            Self::Mxfp4 => super::mxfp4::VALUES[usize::from(code as u8 & 15)] * scale,
            Self::Q4_1 | Self::Q5_1 => Float::F16.round(scale) * f32::from(code) + Float::F16.round(zero),
            _ => Float::F16.round(scale) * f32::from(code),
        }
    }

    /// Appends the block of [`Self::group`] codes.
    pub fn pack(self, codes: &[i8], p: Params, out: &mut Vec<u8>) {
        debug_assert_eq!(codes.len(), self.group());
        let half = |x: f32| f16::from_f32(x).to_le_bytes();
        let offset = self.range().1 as i8;
        let stored = |c: i8| (c + offset) as u8;
        let nibbles = |out: &mut Vec<u8>| {
            let (low, high) = codes.split_at(16);
            out.extend(low.iter().zip(high).map(|(&l, &h)| stored(l) & 15 | stored(h) << 4));
        };
        let fifths = |out: &mut Vec<u8>| {
            let word = codes.iter().rev().fold(0u32, |word, &c| word << 1 | u32::from(stored(c) >> 4 & 1));
            out.extend(word.to_le_bytes());
        };
        match self {
            Self::Mxfp4 => {
                out.push(mx::scale_byte(p.scale));
                nibbles(out);
            }
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 => {
                out.extend(half(p.scale));
                if matches!(self, Self::Q4_1 | Self::Q5_1) {
                    out.extend(half(p.zero_point));
                }
                if self.bits() == 5 {
                    fifths(out);
                }
                nibbles(out);
            }
            Self::Q8_0 => {
                out.extend(half(p.scale));
                out.extend(codes.iter().map(|&c| c as u8));
            }
            Self::Tq2_0 => {
                for half in codes.chunks_exact(128) {
                    out.extend((0..32).map(|k| (0..4).fold(0, |b, n| b | ((half[n * 32 + k] + 1) as u8) << (2 * n))));
                }
                out.extend(half(p.scale));
            }
            Self::Tq1_0 => {
                for (first, width, digits) in TRITS {
                    out.extend((0..width).map(|k| {
                        let digit = |n: usize| if n < digits { (codes[first + n * width + k] + 1) as u16 } else { 0 };
                        let number = (0..5).fold(0, |sum, n| sum * 3 + digit(n));
                        // Fixed point: the next digit stands in the bits above the byte once it is multiplied by 3.
                        (number * 256).div_ceil(243) as u8
                    }));
                }
                out.extend(half(p.scale));
            }
        }
    }

    /// Whether the scales of a block are numbers.
    pub fn is_sound(self, block: &[u8]) -> bool {
        // An exponent of ones is infinity or NaN.
        let number = |at: usize| block[at + 1] & 0x7c != 0x7c;
        match self {
            Self::Mxfp4 => block[0] != mx::SCALE_NAN,
            Self::Q4_1 | Self::Q5_1 => number(0) && number(2),
            Self::Q4_0 | Self::Q5_0 | Self::Q8_0 => number(0),
            Self::Tq1_0 | Self::Tq2_0 => number(self.bytes() - 2),
        }
    }

    /// The codes of a block of [`Self::bytes`], and what they mean.
    #[inline(always)]
    pub fn unpack(self, block: &[u8], codes: &mut [i8]) -> Params {
        let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
        let offset = self.range().1 as i8;
        let nibbles = |bytes: &[u8], codes: &mut [i8]| {
            let (low, high) = codes.split_at_mut(16);
            for ((&b, l), h) in bytes.iter().zip(low).zip(high) {
                (*l, *h) = ((b & 15) as i8, (b >> 4) as i8);
            }
        };
        let fifths = |at: usize, codes: &mut [i8]| {
            let word = u32::from_le_bytes(block[at..at + 4].try_into().expect("four bytes"));
            codes.iter_mut().enumerate().for_each(|(i, c)| *c |= ((word >> i & 1) << 4) as i8);
        };
        match self {
            Self::Mxfp4 => {
                nibbles(&block[1..], codes);
                return Params { scale: mx::scale(block[0]), zero_point: 0.0 };
            }
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 => {
                nibbles(&block[self.bytes() - 16..], codes);
                if self.bits() == 5 {
                    fifths(self.bytes() - 20, codes);
                }
                codes.iter_mut().for_each(|c| *c -= offset);
                let zero_point = if matches!(self, Self::Q4_1 | Self::Q5_1) { half(2) } else { 0.0 };
                return Params { scale: half(0), zero_point };
            }
            Self::Q8_0 => {
                codes.iter_mut().zip(&block[2..]).for_each(|(c, &b)| *c = b as i8);
                return Params { scale: half(0), zero_point: 0.0 };
            }
            Self::Tq2_0 => {
                for (codes, bytes) in codes.chunks_exact_mut(128).zip(block.chunks_exact(32)) {
                    codes.iter_mut().enumerate().for_each(|(i, c)| *c = (bytes[i % 32] >> (i / 32 * 2) & 3) as i8 - 1);
                }
            }
            Self::Tq1_0 => {
                let mut at = 0;
                for (first, width, digits) in TRITS {
                    for (i, c) in codes[first..first + width * digits].iter_mut().enumerate() {
                        let shifted = block[at + i % width].wrapping_mul([1, 3, 9, 27, 81][i / width]);
                        *c = ((u16::from(shifted) * 3) >> 8) as i8 - 1;
                    }
                    at += width;
                }
            }
        }
        Params { scale: half(self.bytes() - 2), zero_point: 0.0 }
    }
}

/// The parts of a block of [`Ggml::Tq1_0`]: first code, bytes, codes a byte.
const TRITS: [(usize, usize, usize); 3] = [(0, 32, 5), (160, 16, 5), (240, 4, 4)];

/// `x` within bounds; the lower one for NaN, which is 0 times an infinite reciprocal.
#[inline(always)]
fn clamp(x: f32, low: f32, high: f32) -> f32 {
    let above = if x > low { x } else { low };
    if above < high { above } else { high }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_packed_unpacks(
            which in 0usize..8,
            seed in prop::collection::vec(-1f32..1.0, 256),
            size in prop::sample::select(vec![1e-6f32, 1.0, 300.0]),
        ) {
            let ty = Ggml::ALL[which];
            let w: Vec<f32> = seed[..ty.group()].iter().map(|x| x * size).collect();
            let (min, max) = crate::ops::round::extremes(&w);
            let p = ty.fit(min, max);
            let (codes, values): (Vec<i8>, Vec<f32>) = w.iter().map(|&w| ty.round(w, p.scale, p.zero_point)).unzip();
            let (mut block, mut back) = (Vec::new(), vec![0i8; ty.group()]);
            ty.pack(&codes, p, &mut block);
            prop_assert_eq!(block.len(), ty.bytes());
            let q = ty.unpack(&block, &mut back);
            prop_assert_eq!(&back, &codes);
            let again: Vec<f32> = back.iter().map(|&c| ty.value(c, q.scale, q.zero_point)).collect();
            prop_assert_eq!(again, values);
        }
    }

    #[test]
    fn every_byte_of_trits_that_is_written_is_read_back() {
        for number in 0..243u32 {
            let digit = |n: u32| (number / 3u32.pow(4 - n) % 3) as i8 - 1;
            let mut codes = [0i8; 256];
            for (first, width, digits) in TRITS {
                for (i, c) in codes[first..first + width * digits].iter_mut().enumerate() {
                    *c = digit((i / width) as u32);
                }
            }
            let (mut block, mut back) = (Vec::new(), [0i8; 256]);
            Ggml::Tq1_0.pack(&codes, Params::default(), &mut block);
            Ggml::Tq1_0.unpack(&block, &mut back);
            assert_eq!(back, codes, "{number}");
        }
    }
}
