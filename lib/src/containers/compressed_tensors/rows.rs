//! Reading what this container holds, as values.

use std::ops::Range;

use safetensors::Dtype;

use super::{Format, Scheme, config, unpack_range};
use crate::algorithms::rtn::{Codes, Target};
use crate::checkpoint::source::{Checkpoint, TensorRef};
use crate::containers::dense::{FLOATS, float_of};
use crate::containers::{COLUMNS, Rows, Weight};
use crate::engine::view::{Kind, ScaleKind, Scales, View};
use crate::error::Result;
use crate::formats::activations::Activations;
use crate::formats::float::Float;
use crate::formats::minifloat::Minifloat;
use crate::formats::ternary::Trits;
use crate::formats::{Params, mx};
use crate::model::{Linear, ModelConfig};
use crate::ops::decode;

struct Quantized<'a> {
    scheme: Scheme,
    shape: (usize, usize),
    float: Float,
    codes: &'a [u8],
    scales: &'a [u8],
    zero_points: Option<&'a [u8]>,
    /// NVFP4's.
    global: f32,
    /// The scale of inputs that have a fixed one.
    input_scale: f32,
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
        Format::Mxfp4 | Format::Mxfp6 | Format::Mxfp8 | Format::Nvfp4 => Float::Bf16,
        _ => {
            scale.expect(&FLOATS, &scheme.grid(shape))?;
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
    let global = match scheme.format() {
        Format::Nvfp4 => positive(&tensors[2], Float::F32)?,
        _ => 1.0,
    };
    let input_scale = match scheme.activations {
        Activations::StaticFp8 => {
            let tensor = checkpoint.tensor(&format!("{module}.input_scale"))?;
            tensor.expect(&FLOATS, &[1])?;
            positive(&tensor, float_of(&tensor)?)?
        }
        _ => 1.0,
    };
    let (codes, scales) = (tensors[0].bytes, tensors[1].bytes);
    Ok(Some(Box::new(Quantized { scheme, shape, float, codes, scales, zero_points, global, input_scale })))
}

/// A symmetric weight whose codes and scales another container names.
pub fn symmetric<'a>(
    scheme: Scheme,
    shape: (usize, usize),
    float: Float,
    codes: &'a [u8],
    scales: &'a [u8],
) -> Weight<'a> {
    Box::new(Quantized { scheme, shape, float, codes, scales, zero_points: None, global: 1.0, input_scale: 1.0 })
}

/// The number of a tensor of one.
fn positive(tensor: &TensorRef, float: Float) -> Result<f32> {
    let mut one = [0f32];
    float.read(tensor.bytes, &mut one);
    if one[0].is_finite() && one[0] > 0.0 {
        Ok(one[0])
    } else {
        Err(tensor.error(format!("holds {}, wanted a positive number", one[0])))
    }
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
        let row = match self.scheme.rows() {
            Target::ALL => 0,
            rows => row / rows,
        };
        let at = row * groups + group;
        let scale = match self.scheme.format() {
            Format::Mxfp4 | Format::Mxfp6 | Format::Mxfp8 => mx::scale(self.scales[at]),
            Format::Nvfp4 => Minifloat::E4M3.value(self.scales[at]) / self.global,
            _ => {
                let mut scale = [0f32];
                let size = self.float.size();
                self.float.read(&self.scales[at * size..(at + 1) * size], &mut scale);
                scale[0]
            }
        };
        let bits = u32::from(self.scheme.weights.bits());
        let zero_point = self.zero_points.map_or(0.0, |z| match self.scheme.packs_zero_points() {
            true => f32::from(zero_point(z, row, group, groups, bits)),
            false => f32::from(z[at] as i8),
        });
        Params { scale, zero_point }
    }

    /// Whether codes from column `start` on are integers of 4 bits, each row with scales of its own and nothing else.
    fn is_int4(&self, group: usize, start: usize) -> bool {
        let plain = self.scheme.format() == Format::Packed && self.scheme.weights.bits() == 4;
        plain
            && self.zero_points.is_none()
            && self.scheme.rows() == 1
            && group.is_multiple_of(2)
            && start.is_multiple_of(2)
    }

    /// The values of one row of MXFP4 codes at `columns`, which cut no block.
    fn blocks(&self, row: usize, codes: &[u8], columns: &Range<usize>, out: &mut [f32]) {
        let scales = &self.scales[row * self.shape.1 / mx::BLOCK..][..self.shape.1 / mx::BLOCK];
        let bytes = columns.start / 2..columns.end / 2;
        let groups = columns.start / mx::BLOCK..columns.end / mx::BLOCK;
        decode::decode_row(&codes[bytes], &scales[groups], out);
    }

    /// The values of the columns from `at` on, which lie in one group and are at most [`COLUMNS`].
    fn piece(&self, row: usize, codes: &[u8], at: usize, out: &mut [f32]) {
        let group = self.scheme.group(self.shape.1);
        let p = self.params(row, at / group, self.shape.1.div_ceil(group));
        let stored = at..at + out.len();
        match self.scheme.format() {
            Format::Float | Format::Naive | Format::Mxfp8 => decode::e4m3(&codes[stored], p.scale, self.float, out),
            Format::Int => decode::integers(bytemuck::cast_slice(&codes[stored]), p, self.float, out),
            Format::Packed => {
                let unpacked = &mut [0i8; COLUMNS][..out.len()];
                unpack_range(codes, at, u32::from(self.scheme.weights.bits()), unpacked);
                decode::integers(unpacked, p, self.float, out);
            }
            Format::Ternary | Format::TernaryBase3 => {
                let trits = if self.scheme.format() == Format::Ternary { Trits::Quarters } else { Trits::Fifths };
                let unpacked = &mut [0i8; COLUMNS][..out.len()];
                let columns = self.shape.1;
                unpacked.iter_mut().zip(at..).for_each(|(q, c)| *q = trits.code(codes, columns, c));
                decode::integers(unpacked, p, self.float, out);
            }
            // Groups begin at whole bytes.
            Format::Mxfp4 | Format::Nvfp4 => decode::e2m1(&codes[at / 2..], p.scale, self.float, out),
            Format::Mxfp6 => decode::e2m3(&codes[at / 4 * 3..], p.scale, self.float, out),
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

    fn input_scale(&self) -> f32 {
        self.input_scale
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
            if self.is_int4(group, columns.start) {
                let (groups, size) = (self.shape.1.div_ceil(group), self.float.size());
                let (first, last) = (columns.start / group, columns.end.div_ceil(group));
                let scales = &self.scales[(row * groups + first) * size..(row * groups + last) * size];
                let to_next = (first + 1) * group - columns.start;
                decode::int4(&codes[columns.start / 2..], scales, (to_next, group), self.float, out);
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

    fn view(&self) -> Option<View<'_>> {
        let kind = match (self.scheme.format(), self.scheme.weights.bits()) {
            _ if self.zero_points.is_some() => return None,
            (Format::Packed, 4) => Kind::Int4,
            (Format::Packed, 2) => Kind::Int2,
            (Format::Packed, 8) => Kind::Int8Offset,
            (Format::Int, 8) => Kind::Int8,
            (Format::Mxfp4, _) => Kind::E2m1,
            (Format::Ternary, _) => Kind::Ternary,
            (Format::TernaryBase3, _) if Trits::Fifths.in_blocks(self.shape.1) == self.shape.1 => Kind::Base3,
            (Format::Float | Format::Naive, _) => Kind::E4m3,
            _ => return None,
        };
        // Inputs in FP8 are floats.
        if !kind.is_float() && !matches!(self.scheme.activations, Activations::Float | Activations::DynamicTokenInt8) {
            return None;
        }
        let columns = self.shape.1;
        let groups = columns.div_ceil(self.scheme.group(columns));
        let scale_kind = match (kind, self.float) {
            (Kind::E2m1, _) => ScaleKind::E8m0,
            (_, Float::Bf16) => ScaleKind::Bf16,
            (_, Float::F16) => ScaleKind::F16,
            (_, Float::F32) => ScaleKind::F32,
        };
        let step = scale_kind.size();
        let row = match self.scheme.rows() {
            1 => groups * step,
            Target::ALL => 0,
            _ => return None,
        };
        let scales = Scales { kind: scale_kind, bytes: self.scales, row, step, group: self.scheme.group(columns) };
        // A row begins at a whole word of 32 bits.
        let row = self.codes.len() / self.shape.0;
        View::new(kind, self.shape, self.codes, (row, kind.bytes()), Some(scales))
    }

    fn stored(&self) -> Option<Scheme> {
        // NVFP4's scales go with a number of the whole tensor, and those of a tensor or block with other rows.
        let alone = matches!(self.scheme.strategy, super::Strategy::Group(_) | super::Strategy::Channel);
        let split = matches!(self.scheme.format(), Format::Nvfp4 | Format::Mxfp6);
        (alone && !split && self.scheme.activations != Activations::StaticFp8).then_some(self.scheme)
    }

    fn codes(&self, rows: Range<usize>, out: &mut Codes) {
        let (columns, row_bytes) = (self.shape.1, self.codes.len() / self.shape.0);
        let groups = columns.div_ceil(self.scheme.group(columns));
        out.codes.clear();
        out.params.clear();
        for row in rows {
            let packed = &self.codes[row * row_bytes..][..row_bytes];
            let at = out.codes.len();
            out.codes.resize(at + columns, 0);
            let codes = &mut out.codes[at..];
            match self.scheme.format() {
                Format::Packed => unpack_range(packed, 0, u32::from(self.scheme.weights.bits()), codes),
                Format::Ternary => {
                    codes.iter_mut().enumerate().for_each(|(c, q)| *q = Trits::Quarters.code(packed, columns, c))
                }
                Format::TernaryBase3 => {
                    codes.iter_mut().enumerate().for_each(|(c, q)| *q = Trits::Fifths.code(packed, columns, c))
                }
                Format::Mxfp4 => codes
                    .chunks_mut(2)
                    .zip(packed)
                    .for_each(|(two, b)| two.iter_mut().zip([b & 15, b >> 4]).for_each(|(c, b)| *c = b as i8)),
                _ => codes.iter_mut().zip(packed).for_each(|(c, &b)| *c = b as i8),
            }
            out.params.extend((0..groups).map(|g| self.params(row, g, groups)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::algorithms::rtn::rtn;
    use crate::containers::compressed_tensors::Strategy as Sharing;
    use crate::formats::int::IntFormat;
    use crate::formats::{FP8, MXFP4, NumberFormat};
    use proptest::prelude::*;

    fn schemes() -> impl Strategy<Value = Scheme> {
        let activations = || prop_oneof![Just(Activations::Float), Just(Activations::DynamicTokenInt8)];
        let sharing = prop_oneof![
            6 => (1usize..140).prop_map(Sharing::Group),
            1 => Just(Sharing::Channel),
            1 => Just(Sharing::Tensor),
            1 => (1usize..50, 1usize..150).prop_map(|(rows, columns)| Sharing::Block(rows, columns)),
        ];
        let ints = (2u8..=8, any::<bool>(), sharing.clone(), activations()).prop_map(
            |(bits, symmetric, strategy, activations)| Scheme {
                weights: NumberFormat::Int(IntFormat { num_bits: bits, symmetric }),
                strategy,
                activations,
            },
        );
        let fp8 = (sharing, any::<bool>()).prop_map(|(strategy, inputs)| Scheme {
            weights: FP8,
            strategy,
            activations: if inputs { Activations::DynamicTokenFp8 } else { Activations::Float },
        });
        let blocks = prop::sample::select(vec![
            (MXFP4, mx::BLOCK),
            (NumberFormat::Mx(Minifloat::E2M3), mx::BLOCK),
            (NumberFormat::Mx(Minifloat::E4M3), mx::BLOCK),
            (NumberFormat::Nvfp4, 16),
        ]);
        let blocks = blocks.prop_map(|(weights, group)| Scheme {
            weights,
            strategy: Sharing::Group(group),
            activations: Activations::Float,
        });
        let ternary = (prop::sample::select(vec![Trits::Quarters, Trits::Fifths]), 1usize..140).prop_map(|(t, n)| {
            Scheme { weights: NumberFormat::Ternary(t), strategy: Sharing::Group(n), activations: Activations::Float }
        });
        prop_oneof![1 => ternary, 4 => ints, 1 => fp8, 2 => blocks]
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
            // Blocks may be cut at the edge; groups divide a row.
            let inp = match scheme.strategy {
                Sharing::Group(n) => n * groups,
                _ => 32 * groups + 5,
            };
            let mut s = seed;
            let w: Vec<f32> = (0..out * inp)
                .map(|i| {
                    s = s.wrapping_mul(1664525).wrapping_add(1013904223);
                    // Some groups of zeros, some rows much larger than others.
                    let size = if i / 32 % 5 == 0 { 0.0 } else { 2f32.powi((i / inp % 13) as i32 - 9) };
                    float.round((s >> 8) as f32 / (1u32 << 24) as f32 * size - size / 3.0)
                })
                .collect();
            let own = matches!(scheme.weights, NumberFormat::Mx(_) | NumberFormat::Nvfp4);
            let float = if own { Float::Bf16 } else { float };
            let extremes = crate::ops::round::extremes(&w);
            let target = scheme.target(inp, float, extremes);
            let mut codes = Codes::default();
            rtn(&w, inp, target, Default::default(), &mut codes);
            let mut parts = Vec::new();
            scheme.encode(&codes, 0, (out, inp), float, &mut parts);
            let specs = scheme.specs("m", (out, inp), float);
            prop_assert_eq!(specs.len(), parts.len());
            for (spec, part) in specs.iter().zip(&parts) {
                prop_assert_eq!(spec.byte_len(), part.len(), "{}", &spec.name);
            }
            let zero_points = (!scheme.weights.symmetric()).then(|| &parts[2][..]);
            let rows = Quantized {
                scheme,
                shape: (out, inp),
                float,
                codes: &parts[0],
                scales: &parts[1],
                zero_points,
                global: target.global,
                input_scale: 1.0,
            };
            let (first, from) = (out / 3, inp / 2 / COLUMNS * COLUMNS);
            let mut have = vec![0f32; (out - first) * (inp - from)];
            rows.read(first..out, from..inp, &mut have);
            for (i, have) in have.into_iter().enumerate() {
                let (row, column) = (first + i / (inp - from), from + i % (inp - from));
                let p = codes.params[row * target.groups(inp) + column / target.group];
                let want = scheme.weights.dequantize(codes.codes[row * inp + column], p, float);
                prop_assert_eq!(have.to_bits(), want.to_bits(), "value {} {}", row, column);
            }
        }
    }
}
