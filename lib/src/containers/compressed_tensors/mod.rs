//! compressed-tensors, every format that it writes: tensors, packing, `quantization_config`. Source: compressed-tensors
//! 0.20, `compressors/`.

pub mod config;
mod rows;

pub use rows::{open, symmetric};

use safetensors::Dtype;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::algorithms::rtn::{Codes, Target};
use crate::checkpoint::header::TensorSpec;
pub use crate::formats::activations::Activations;
use crate::formats::float::Float;
use crate::formats::minifloat::Minifloat;
use crate::formats::ternary::Trits;
use crate::formats::{FP8, MXFP4, NumberFormat, Params, mx, mxfp4, nvfp4};
use crate::ops::decode;

/// Which weights share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// This many columns of a row.
    Group(usize),
    /// A row.
    Channel,
    /// All.
    Tensor,
    /// This many rows and columns; those at the edges may be fewer.
    Block(usize, usize),
}

/// The container's formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub enum Format {
    /// Integers in 32-bit words.
    #[serde(rename = "pack-quantized")]
    Packed,
    /// One i8 a code.
    #[serde(rename = "int-quantized")]
    Int,
    /// One E4M3 number a code, beside inputs in FP8.
    #[serde(rename = "float-quantized")]
    Float,
    /// One E4M3 number a code, beside inputs that stay floats.
    #[serde(rename = "naive-quantized")]
    Naive,
    /// E2M1 codes, two a byte, and scales of one byte.
    #[serde(rename = "mxfp4-pack-quantized")]
    Mxfp4,
    /// E2M3 codes, four in three bytes, and scales of one byte.
    #[serde(rename = "mxfp6-pack-quantized")]
    Mxfp6,
    /// One E4M3 number a code, and scales of one byte.
    #[serde(rename = "mxfp8-quantized")]
    Mxfp8,
    /// E2M1 codes, two a byte, E4M3 scales, and one f32 number.
    #[serde(rename = "nvfp4-pack-quantized")]
    Nvfp4,
    /// Ternary codes in two bits. No other program's format.
    #[serde(rename = "ternary-quantized")]
    Ternary,
    /// Ternary codes, five a byte. No other program's format.
    #[serde(rename = "ternary-base3-quantized")]
    TernaryBase3,
}

/// How one linear layer is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheme {
    /// Codes.
    pub weights: NumberFormat,
    /// Sharing of scales.
    pub strategy: Strategy,
    /// Inputs.
    pub activations: Activations,
}

impl Scheme {
    /// The container's format; `None` where it has none for these numbers. Weight-only integers are packed; integers beside
    /// quantized inputs are not.
    pub fn stored(&self) -> Option<Format> {
        Some(match (self.weights, self.activations) {
            (NumberFormat::Int(_), Activations::Float) => Format::Packed,
            (NumberFormat::Int(_), _) => Format::Int,
            (FP8, Activations::Float) => Format::Naive,
            (FP8, _) => Format::Float,
            (MXFP4, _) => Format::Mxfp4,
            (NumberFormat::Mx(Minifloat::E2M3), _) => Format::Mxfp6,
            (NumberFormat::Mx(Minifloat::E4M3), _) => Format::Mxfp8,
            (NumberFormat::Nvfp4, _) => Format::Nvfp4,
            (NumberFormat::Ternary(Trits::Quarters), _) => Format::Ternary,
            (NumberFormat::Ternary(Trits::Fifths), _) => Format::TernaryBase3,
            (NumberFormat::Float(_) | NumberFormat::Mx(_) | NumberFormat::Ggml(_) | NumberFormat::Half(_), _) => {
                return None;
            }
        })
    }

    /// [`Self::stored`].
    ///
    /// # Panics
    /// Where there is none: plans refuse such schemes.
    pub fn format(&self) -> Format {
        self.stored().unwrap_or_else(|| panic!("compressed-tensors has no format for {}", self.weights.name()))
    }

    /// Columns that share a scale, in a row of `columns`.
    pub fn group(&self, columns: usize) -> usize {
        match self.strategy {
            Strategy::Group(n) | Strategy::Block(_, n) => n,
            Strategy::Channel | Strategy::Tensor => columns,
        }
    }

    /// Rows that share their scales.
    pub fn rows(&self) -> usize {
        match self.strategy {
            Strategy::Group(_) | Strategy::Channel => 1,
            Strategy::Block(n, _) => n,
            Strategy::Tensor => Target::ALL,
        }
    }

    /// Whether [`Self::target`] needs the least and the greatest weight.
    pub fn needs_extremes(&self) -> bool {
        self.strategy == Strategy::Tensor || self.weights == NumberFormat::Nvfp4
    }

    /// What a weight of type `float` with rows of `columns` is rounded to; `extremes` of the whole tensor (for NVFP4 of all
    /// that runtimes fuse with it) where [`Self::needs_extremes`].
    pub fn target(&self, columns: usize, float: Float, extremes: (f32, f32)) -> Target {
        let global = match self.weights {
            NumberFormat::Nvfp4 => nvfp4::global(extremes.0, extremes.1, float),
            _ => 1.0,
        };
        Target { format: self.weights, group: self.group(columns), rows: self.rows(), float, extremes, global }
    }

    /// Whether zero points are packed along the rows, 32 to some words; else they are one i8 a scale.
    fn packs_zero_points(&self) -> bool {
        self.format() == Format::Packed && matches!(self.strategy, Strategy::Group(_) | Strategy::Channel)
    }

    /// Shape of scales and, but for packing, zero points.
    fn grid(&self, (out, inp): (usize, usize)) -> Vec<usize> {
        match self.strategy {
            Strategy::Tensor => vec![1],
            _ => vec![out.div_ceil(self.rows()), inp.div_ceil(self.group(inp))],
        }
    }

    /// The tensors of `module` with a weight of [out, inp] whose scales are of type `float` (but for those of byte scales).
    pub fn specs(&self, module: &str, (out, inp): (usize, usize), float: Float) -> Vec<TensorSpec> {
        let (grid, format) = (self.grid((out, inp)), self.format());
        let bits = usize::from(self.weights.bits());
        let spec = |name: &str, dtype, shape: &[usize]| TensorSpec::new(format!("{module}.{name}"), dtype, shape);
        let mut specs = vec![match format {
            Format::Packed => spec("weight_packed", Dtype::I32, &[out, (inp * bits).div_ceil(32)]),
            Format::Int => spec("weight", Dtype::I8, &[out, inp]),
            Format::Float | Format::Naive | Format::Mxfp8 => spec("weight", Dtype::F8_E4M3, &[out, inp]),
            Format::Mxfp4 | Format::Mxfp6 | Format::Nvfp4 => spec("weight_packed", Dtype::U8, &[out, inp * bits / 8]),
            Format::Ternary => spec("weight_packed", Dtype::U8, &[out, Trits::Quarters.row_bytes(inp)]),
            Format::TernaryBase3 => spec("weight_packed", Dtype::U8, &[out, Trits::Fifths.row_bytes(inp)]),
        }];
        let scale = match format {
            Format::Mxfp4 | Format::Mxfp6 | Format::Mxfp8 => Dtype::U8,
            Format::Nvfp4 => Dtype::F8_E4M3,
            _ => float.dtype(),
        };
        specs.push(spec("weight_scale", scale, &grid));
        if !self.weights.symmetric() {
            specs.push(match self.packs_zero_points() {
                true => spec("weight_zero_point", Dtype::I32, &[(grid[0] * bits).div_ceil(32), grid[1]]),
                false => spec("weight_zero_point", Dtype::I8, &grid),
            });
        }
        match format {
            Format::Packed => specs.push(spec("weight_shape", Dtype::I64, &[2])),
            Format::Nvfp4 => specs.push(spec("weight_global_scale", Dtype::F32, &[1])),
            _ => {}
        }
        if self.activations == Activations::StaticFp8 {
            specs.push(spec("input_scale", float.dtype(), &[1]));
        }
        specs
    }

    /// Where a range of rows that is encoded alone may begin: at multiples of this.
    pub fn step(&self) -> usize {
        match self.strategy {
            Strategy::Block(n, _) => n.next_multiple_of(32),
            _ => 32,
        }
    }

    /// The bytes of [`Self::specs`]' tensors, in that order, for rows that begin at a multiple of [`Self::step`]. What belongs
    /// to the whole module (`weight_shape`, a global scale, the scale of a tensor or of inputs) comes with the rows that begin at 0.
    pub fn encode(&self, codes: &Codes, first: usize, (out, inp): (usize, usize), float: Float, to: &mut Vec<Vec<u8>>) {
        to.clear();
        let groups = inp.div_ceil(self.group(inp));
        let bits = u32::from(self.weights.bits());
        let format = self.format();
        to.push(match format {
            Format::Packed => pack_rows(&codes.codes, inp, bits),
            Format::Int | Format::Float | Format::Naive | Format::Mxfp8 => {
                codes.codes.iter().map(|&c| c as u8).collect()
            }
            Format::Mxfp4 | Format::Nvfp4 => mxfp4::pack(&codes.codes),
            Format::Mxfp6 => pack_sixes(&codes.codes),
            Format::Ternary => pack_trits(&codes.codes, inp, Trits::Quarters),
            Format::TernaryBase3 => pack_trits(&codes.codes, inp, Trits::Fifths),
        });
        // Rows that share parameters repeat them; each is stored once.
        let rows = match self.strategy {
            Strategy::Tensor => {
                if first == 0 {
                    0..1
                } else {
                    0..0
                }
            }
            _ => 0..codes.params.len() / groups,
        };
        let once: Vec<Params> = rows
            .step_by(self.rows().min(out))
            .flat_map(|r| &codes.params[r * groups..(r + 1) * groups])
            .copied()
            .collect();
        to.push(match format {
            Format::Mxfp4 | Format::Mxfp6 | Format::Mxfp8 => once.iter().map(|p| mx::scale_byte(p.scale)).collect(),
            Format::Nvfp4 => once.iter().map(|p| nvfp4::scale_byte(p.scale, codes.global)).collect(),
            _ => {
                let mut scales = Vec::with_capacity(once.len() * float.size());
                once.iter().for_each(|p| float.write(p.scale, &mut scales));
                scales
            }
        });
        if !self.weights.symmetric() {
            let zero_points: Vec<i8> = once.iter().map(|p| p.zero_point as i8).collect();
            to.push(match self.packs_zero_points() {
                true => pack_columns(&zero_points, groups, bits),
                false => zero_points.iter().map(|&z| z as u8).collect(),
            });
        }
        let mut whole = Vec::new();
        match format {
            Format::Packed => whole.extend([out as i64, inp as i64].iter().flat_map(|n| n.to_le_bytes())),
            Format::Nvfp4 => whole.extend(codes.global.to_le_bytes()),
            _ if self.activations == Activations::StaticFp8 => float.write(codes.input_scale, &mut whole),
            _ => return,
        }
        to.push(if first == 0 { whole } else { Vec::new() });
    }
}

/// Packs each row of `columns` ternary codes.
fn pack_trits(codes: &[i8], columns: usize, trits: Trits) -> Vec<u8> {
    let mut out = Vec::with_capacity(codes.len() / columns * trits.row_bytes(columns));
    codes.chunks_exact(columns).for_each(|row| trits.pack(row, &mut out));
    out
}

/// Packs codes of 6 bits, four in three bytes, the first in the low bits.
fn pack_sixes(codes: &[i8]) -> Vec<u8> {
    let three = |four: &[i8; 4]| {
        let word = four.iter().rev().fold(0u32, |word, &code| word << 6 | u32::from(code as u8 & 63));
        [word as u8, (word >> 8) as u8, (word >> 16) as u8]
    };
    codes.as_chunks::<4>().0.iter().flat_map(three).collect()
}

/// Packs each row of `columns` codes into 32-bit words, the first code in the least significant bits, dense across words.
pub fn pack_rows(codes: &[i8], columns: usize, bits: u32) -> Vec<u8> {
    let words = (columns * bits as usize).div_ceil(32);
    let mut out = vec![0u8; codes.len() / columns * words * 4];
    for (row, out) in codes.chunks_exact(columns).zip(out.chunks_exact_mut(words * 4)) {
        match bits {
            8 => row.iter().zip(out).for_each(|(&c, o)| *o = offset(c, 8) as u8),
            4 => row.chunks(2).zip(out).for_each(|(c, o)| {
                *o = (offset(c[0], 4) | c.get(1).map_or(0, |&c| offset(c, 4) << 4)) as u8;
            }),
            _ => {
                let (eights, rest) = row.as_chunks::<8>();
                let (whole, last) = out.split_at_mut(eights.len() * bits as usize);
                eights.iter().zip(whole.chunks_exact_mut(bits as usize)).for_each(|(c, o)| pack_eight(c, bits, o));
                pack_bits(rest.iter().copied(), bits, last);
            }
        }
    }
    out
}

/// Eight codes fill as many bytes as a code has bits.
#[inline(always)]
fn pack_eight(codes: &[i8; 8], bits: u32, out: &mut [u8]) {
    let word = codes.iter().rev().fold(0, |word, &code| word << bits | u64::from(offset(code, bits)));
    out.copy_from_slice(&word.to_le_bytes()[..bits as usize]);
}

/// Packs `codes` [rows, columns] along the rows: words [ceil(rows * bits / 32), columns].
pub fn pack_columns(codes: &[i8], columns: usize, bits: u32) -> Vec<u8> {
    let rows = codes.len() / columns;
    let words = (rows * bits as usize).div_ceil(32);
    let mut out = vec![0u8; words * columns * 4];
    let mut packed = vec![0u8; words * 4];
    for column in 0..columns {
        packed.fill(0);
        pack_bits(codes.iter().skip(column).step_by(columns).copied(), bits, &mut packed);
        for (w, word) in packed.chunks_exact(4).enumerate() {
            out[(w * columns + column) * 4..][..4].copy_from_slice(word);
        }
    }
    out
}

/// Stored codes are unsigned: code + 2^(bits - 1).
#[inline(always)]
fn offset(code: i8, bits: u32) -> u32 {
    ((i32::from(code) + (1 << (bits - 1))) as u32) & ((1 << bits) - 1)
}

/// A bit stream, least significant first.
fn pack_bits(codes: impl Iterator<Item = i8>, bits: u32, out: &mut [u8]) {
    let (mut held, mut n) = (0u32, 0);
    let mut at = 0;
    for code in codes {
        held |= offset(code, bits) << n;
        n += bits;
        while n >= 8 {
            out[at] = held as u8;
            at += 1;
            held >>= 8;
            n -= 8;
        }
    }
    if n > 0 {
        out[at] = held as u8;
    }
}

/// Codes `first`, `first + 1` ... of a packed row.
pub fn unpack_range(packed: &[u8], first: usize, bits: u32, codes: &mut [i8]) {
    match bits {
        8 => codes.iter_mut().zip(&packed[first..]).for_each(|(c, &b)| *c = (b ^ 0x80) as i8),
        // Ranges begin at a multiple of 32 or of a group size; an odd group size takes the general way.
        4 if first.is_multiple_of(2) => decode::nibbles(&packed[first / 2..], codes),
        _ => {
            let odd = codes.len().min(first.next_multiple_of(8) - first);
            let end = odd + (codes.len() - odd) / 8 * 8;
            if end > odd {
                decode::eights(bits, &packed[(first + odd) / 8 * bits as usize..], &mut codes[odd..end]);
            }
            (0..odd).chain(end..codes.len()).for_each(|i| codes[i] = unpack(packed, first + i, bits));
        }
    }
}

/// Code number `i` of a packed row.
pub fn unpack(packed: &[u8], i: usize, bits: u32) -> i8 {
    let bit = i * bits as usize;
    let byte = bit / 8;
    let word = u32::from(packed[byte]) | packed.get(byte + 1).map_or(0, |&b| u32::from(b) << 8);
    let code = (word >> (bit % 8)) & ((1 << bits) - 1);
    (code as i32 - (1 << (bits - 1))) as i8
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_packed_unpacks(bits in 2u32..=8, rows in 1usize..20, columns in 1usize..70, seed in any::<u64>()) {
            let mut s = seed | 1;
            let low = -(1i32 << (bits - 1));
            let codes: Vec<i8> = (0..rows * columns)
                .map(|_| {
                    s = s.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    (low + ((s >> 33) as i32 & ((1 << bits) - 1))) as i8
                })
                .collect();
            let by_row = pack_rows(&codes, columns, bits);
            let words = by_row.len() / rows;
            prop_assert_eq!(words, (columns * bits as usize).div_ceil(32) * 4);
            let by_column = pack_columns(&codes, columns, bits);
            for (i, &code) in codes.iter().enumerate() {
                let (r, c) = (i / columns, i % columns);
                prop_assert_eq!(unpack(&by_row[r * words..][..words], c, bits), code);
                let mut rest = vec![0i8; columns - c];
                unpack_range(&by_row[r * words..][..words], c, bits, &mut rest);
                prop_assert_eq!(&rest, &codes[i..(r + 1) * columns]);
                let column: Vec<u8> = by_column.chunks_exact(4).skip(c).step_by(columns).flatten().copied().collect();
                prop_assert_eq!(unpack(&column, r, bits), code);
            }
        }
    }
}
