//! Reading what this container holds, as values.

use std::ops::Range;

use safetensors::Dtype;

use super::{Format, Scheme, config, unpack_range};
use crate::checkpoint::source::{Checkpoint, TensorRef};
use crate::containers::dense::{FLOATS, float_of};
use crate::containers::{COLUMNS, Rows, Weight};
use crate::error::Result;
use crate::formats::activations::Activations;
use crate::formats::float::Float;
use crate::formats::{Params, mxfp4};
use crate::model::{Linear, ModelConfig};
use crate::ops::decode;

struct Quantized<'a> {
    scheme: Scheme,
    shape: (usize, usize),
    float: Float,
    codes: &'a [u8],
    scales: &'a [u8],
    zero_points: Option<&'a [u8]>,
}

/// The [`crate::containers::READERS`] entry.
pub fn open<'a>(checkpoint: &'a Checkpoint, model: &ModelConfig, linear: &Linear) -> Result<Option<Weight<'a>>> {
    let module = linear.module();
    let Some(scale) = checkpoint.get(&format!("{module}.weight_scale")) else { return Ok(None) };
    let Some(scheme) = config::scheme_of(checkpoint, &module)? else {
        return Err(scale.error("is here, but quantization_config in config.json has no group for its module"));
    };
    let shape = linear.shape(model);
    if let super::Strategy::Group(n) = scheme.strategy
        && !shape.1.is_multiple_of(n)
    {
        return Err(scale.error(format!("group_size {n} does not divide in_features {}", shape.1)));
    }
    let float = match scheme.format() {
        // As from OpenAI's blocks: exact in the type that the other weights have.
        Format::Mxfp4 => Float::Bf16,
        _ => {
            scale.expect(&FLOATS, &[shape.0, shape.1 / scheme.group(shape.1)])?;
            float_of(&scale)?
        }
    };
    let mut tensors = Vec::new();
    for spec in scheme.specs(&module, shape, float) {
        let tensor = checkpoint.tensor(&spec.name)?;
        tensor.expect(&[spec.dtype], &spec.shape)?;
        tensors.push(tensor);
    }
    let zero_points = (!scheme.weights.symmetric()).then(|| tensors[2].bytes);
    if scheme.format() == Format::Packed {
        check_shape_tensor(&tensors[tensors.len() - 1], shape)?;
    }
    let (codes, scales) = (tensors[0].bytes, tensors[1].bytes);
    Ok(Some(Box::new(Quantized { scheme, shape, float, codes, scales, zero_points })))
}

fn check_shape_tensor(tensor: &TensorRef, shape: (usize, usize)) -> Result<()> {
    tensor.expect(&[Dtype::I64], &[2])?;
    let stored: Vec<i64> = tensor.bytes.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect();
    if stored != [shape.0 as i64, shape.1 as i64] {
        return Err(tensor.error(format!("holds {stored:?}, config.json implies [{}, {}]", shape.0, shape.1)));
    }
    Ok(())
}

impl Quantized<'_> {
    fn params(&self, row: usize, group: usize, groups: usize) -> Params {
        let mut scale = [0f32];
        let at = (row * groups + group) * self.float.size();
        self.float.read(&self.scales[at..at + self.float.size()], &mut scale);
        let zero_point = self.zero_points.map_or(0, |z| match self.scheme.format() {
            Format::Packed => zero_point(z, row, group, groups, u32::from(self.scheme.weights.bits())),
            _ => z[row * groups + group] as i8,
        });
        Params { scale: scale[0], zero_point }
    }

    /// The values of one row of E2M1 codes at `columns`, which cut no block.
    fn blocks(&self, row: usize, codes: &[u8], columns: &Range<usize>, out: &mut [f32]) {
        let scales = &self.scales[row * self.shape.1 / mxfp4::BLOCK..][..self.shape.1 / mxfp4::BLOCK];
        let bytes = columns.start / 2..columns.end / 2;
        let groups = columns.start / mxfp4::BLOCK..columns.end / mxfp4::BLOCK;
        decode::decode_row(&codes[bytes], &scales[groups], out);
    }

    /// The values of the columns from `at` on, which lie in one group and are at most [`COLUMNS`].
    fn piece(&self, row: usize, codes: &[u8], at: usize, out: &mut [f32]) {
        let group = self.scheme.group(self.shape.1);
        let p = self.params(row, at / group, self.shape.1 / group);
        let stored = at..at + out.len();
        match self.scheme.format() {
            Format::Float => decode::e4m3(&codes[stored], p.scale, self.float, out),
            Format::Int => decode::integers(bytemuck::cast_slice(&codes[stored]), p, self.float, out),
            _ => {
                let unpacked = &mut [0i8; COLUMNS][..out.len()];
                unpack_range(codes, at, u32::from(self.scheme.weights.bits()), unpacked);
                decode::integers(unpacked, p, self.float, out);
            }
        }
    }
}

/// Zero points are packed along the rows: word w of column `group` holds bits 32 w .. 32 w + 32 of its stream.
fn zero_point(packed: &[u8], row: usize, group: usize, groups: usize, bits: u32) -> i8 {
    let word = row * bits as usize / 32;
    let mut two = [0u8; 8];
    for (i, half) in two.chunks_exact_mut(4).enumerate() {
        if let Some(bytes) = packed.get(((word + i) * groups + group) * 4..).and_then(|b| b.get(..4)) {
            half.copy_from_slice(bytes);
        }
    }
    let shift = row * bits as usize % 32;
    let code = (u64::from_le_bytes(two) >> shift) & ((1 << bits) - 1);
    (code as i32 - (1 << (bits - 1))) as i8
}

impl Rows for Quantized<'_> {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn float(&self) -> Float {
        self.float
    }

    fn inputs(&self) -> Activations {
        self.scheme.activations
    }

    fn read(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        let group = self.scheme.group(self.shape.1);
        let row_bytes = self.codes.len() / self.shape.0;
        for (row, out) in rows.zip(out.chunks_exact_mut(columns.len().max(1))) {
            let codes = &self.codes[row * row_bytes..][..row_bytes];
            // The row's next block is asked for soon.
            let (from, n) = (columns.end * row_bytes / self.shape.1, columns.len() * row_bytes / self.shape.1);
            decode::prefetch(&codes[from..row_bytes.min(from + n)]);
            if self.scheme.format() == Format::Mxfp4 {
                self.blocks(row, codes, &columns, out);
                continue;
            }
            let mut at = columns.start;
            // Pieces that lie in one group: a range of columns may begin and end inside one.
            while at < columns.end {
                let end = columns.end.min((at / group + 1) * group).min(at + COLUMNS);
                self.piece(row, codes, at, &mut out[at - columns.start..end - columns.start]);
                at = end;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::algorithms::rtn::{Codes, Target, rtn};
    use crate::containers::compressed_tensors::Strategy as Sharing;
    use crate::formats::NumberFormat;
    use crate::formats::int::IntFormat;
    use proptest::prelude::*;

    fn schemes() -> impl Strategy<Value = Scheme> {
        let activations = || prop_oneof![Just(Activations::Float), Just(Activations::DynamicTokenInt8)];
        let ints =
            (2u8..=8, any::<bool>(), 1usize..150, activations()).prop_map(|(bits, symmetric, n, activations)| {
                let weights = NumberFormat::Int(IntFormat { num_bits: bits, symmetric });
                Scheme { weights, strategy: if n > 140 { Sharing::Channel } else { Sharing::Group(n) }, activations }
            });
        let fp8 = Scheme {
            weights: NumberFormat::Fp8,
            strategy: Sharing::Channel,
            activations: Activations::DynamicTokenFp8,
        };
        let mxfp4 = Scheme {
            weights: NumberFormat::Mxfp4,
            strategy: Sharing::Group(mxfp4::BLOCK),
            activations: Activations::Float,
        };
        prop_oneof![4 => ints, 1 => Just(fp8), 1 => Just(mxfp4)]
    }

    proptest! {
        #[test]
        fn what_is_encoded_reads_back_as_its_codes_say(
            scheme in schemes(),
            out in 1usize..80,
            groups in 1usize..12,
            float in prop_oneof![Just(Float::Bf16), Just(Float::F16), Just(Float::F32)],
            seed in any::<u32>(),
        ) {
            let group = if let Sharing::Group(n) = scheme.strategy { n } else { 32 };
            let inp = group * groups;
            let mut s = seed;
            let w: Vec<f32> = (0..out * inp)
                .map(|i| {
                    s = s.wrapping_mul(1664525).wrapping_add(1013904223);
                    // Some groups of zeros, some rows much larger than others.
                    let size = if i / group % 5 == 0 { 0.0 } else { 2f32.powi((i / inp % 13) as i32 - 9) };
                    float.round((s >> 8) as f32 / (1u32 << 24) as f32 * size - size / 3.0)
                })
                .collect();
            let float = if scheme.weights == NumberFormat::Mxfp4 { Float::Bf16 } else { float };
            let target = Target { format: scheme.weights, group: scheme.group(inp), float };
            let mut codes = Codes::default();
            rtn(&w, inp, target, Default::default(), &mut codes);
            let mut parts = Vec::new();
            scheme.encode(&codes, 0, (out, inp), float, &mut parts);
            for (spec, part) in scheme.specs("m", (out, inp), float).iter().zip(&parts) {
                prop_assert_eq!(spec.byte_len(), part.len(), "{}", &spec.name);
            }
            let zero_points = (!scheme.weights.symmetric()).then(|| &parts[2][..]);
            let rows = Quantized { scheme, shape: (out, inp), float, codes: &parts[0], scales: &parts[1], zero_points };
            let (first, from) = (out / 3, inp / 2 / COLUMNS * COLUMNS);
            let mut have = vec![0f32; (out - first) * (inp - from)];
            rows.read(first..out, from..inp, &mut have);
            for (i, have) in have.into_iter().enumerate() {
                let at = (first + i / (inp - from)) * inp + from + i % (inp - from);
                let want = scheme.weights.dequantize(codes.codes[at], codes.params[at / target.group], float);
                prop_assert_eq!(have.to_bits(), want.to_bits(), "value {}", at);
            }
        }
    }
}
