//! compressed-tensors' `pack-quantized`, `int-quantized`, `float-quantized` and `mxfp4-pack-quantized`: tensors, packing,
//! `quantization_config`. Source: compressed-tensors 0.20, `compressors/pack_quantized`, `compressors/naive_quantized`,
//! `compressors/mxfp4`.

pub mod config;
mod rows;

pub use rows::open;

use safetensors::Dtype;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::algorithms::rtn::Codes;
use crate::checkpoint::header::TensorSpec;
pub use crate::formats::activations::Activations;
use crate::formats::float::Float;
use crate::formats::{NumberFormat, mxfp4};
use crate::ops::decode;

/// How the columns of a row share scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// This many columns share one.
    Group(usize),
    /// The whole row shares one.
    Channel,
}

/// The container's formats that this version writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub enum Format {
    /// Codes in 32-bit words.
    #[serde(rename = "pack-quantized")]
    Packed,
    /// One i8 a code.
    #[serde(rename = "int-quantized")]
    Int,
    /// One E4M3 number a code.
    #[serde(rename = "float-quantized")]
    Float,
    /// E2M1 codes, two a byte, and scales of one byte.
    #[serde(rename = "mxfp4-pack-quantized")]
    Mxfp4,
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
    /// Weight-only integers are packed; integers beside quantized inputs are not.
    pub fn format(&self) -> Format {
        match (self.weights, self.activations) {
            (NumberFormat::Fp8, _) => Format::Float,
            (NumberFormat::Mxfp4, _) => Format::Mxfp4,
            (NumberFormat::Int(_), Activations::Float) => Format::Packed,
            (NumberFormat::Int(_), Activations::DynamicTokenInt8 | Activations::DynamicTokenFp8) => Format::Int,
        }
    }

    /// Columns that share a scale, in a row of `columns`.
    pub fn group(&self, columns: usize) -> usize {
        match self.strategy {
            Strategy::Group(n) => n,
            Strategy::Channel => columns,
        }
    }

    /// The tensors of `module` with a weight of [out, inp] whose scales are of type `float` (MXFP4's are of their own).
    pub fn specs(&self, module: &str, (out, inp): (usize, usize), float: Float) -> Vec<TensorSpec> {
        let groups = inp / self.group(inp);
        let bits = usize::from(self.weights.bits());
        let spec = |name: &str, dtype, shape: &[usize]| TensorSpec::new(format!("{module}.{name}"), dtype, shape);
        let mut specs = match self.format() {
            Format::Packed => vec![spec("weight_packed", Dtype::I32, &[out, (inp * bits).div_ceil(32)])],
            Format::Int => vec![spec("weight", Dtype::I8, &[out, inp])],
            Format::Float => vec![spec("weight", Dtype::F8_E4M3, &[out, inp])],
            Format::Mxfp4 => vec![spec("weight_packed", Dtype::U8, &[out, inp / 2])],
        };
        let scale = if self.format() == Format::Mxfp4 { Dtype::U8 } else { float.dtype() };
        specs.push(spec("weight_scale", scale, &[out, groups]));
        if !self.weights.symmetric() {
            specs.push(match self.format() {
                Format::Packed => spec("weight_zero_point", Dtype::I32, &[(out * bits).div_ceil(32), groups]),
                _ => spec("weight_zero_point", Dtype::I8, &[out, groups]),
            });
        }
        if self.format() == Format::Packed {
            specs.push(spec("weight_shape", Dtype::I64, &[2]));
        }
        specs
    }

    /// The bytes of [`Self::specs`]' tensors, in that order, for rows that begin at a multiple of 32. The last tensor,
    /// `weight_shape`, belongs to the whole module and comes with the rows that begin at 0.
    pub fn encode(&self, codes: &Codes, first: usize, (out, inp): (usize, usize), float: Float, to: &mut Vec<Vec<u8>>) {
        to.clear();
        let groups = inp / self.group(inp);
        let bits = u32::from(self.weights.bits());
        to.push(match self.format() {
            Format::Packed => pack_rows(&codes.codes, inp, bits),
            Format::Int | Format::Float => codes.codes.iter().map(|&c| c as u8).collect(),
            Format::Mxfp4 => mxfp4::pack(&codes.codes),
        });
        to.push(if self.format() == Format::Mxfp4 {
            codes.params.iter().map(|p| mxfp4::scale_byte(p.scale)).collect()
        } else {
            let mut scales = Vec::with_capacity(codes.params.len() * float.size());
            codes.params.iter().for_each(|p| float.write(p.scale, &mut scales));
            scales
        });
        if !self.weights.symmetric() {
            let zero_points = codes.params.iter().map(|p| p.zero_point);
            to.push(match self.format() {
                Format::Packed => pack_columns(&zero_points.collect::<Vec<_>>(), groups, bits),
                _ => zero_points.map(|z| z as u8).collect(),
            });
        }
        if self.format() == Format::Packed {
            let shape = if first == 0 {
                [out as i64, inp as i64].iter().flat_map(|n| n.to_le_bytes()).collect()
            } else {
                Vec::new()
            };
            to.push(shape);
        }
    }
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
