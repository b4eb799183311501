//! GGUF: one file with header, tokenizer and tensors, as llama.cpp loads it. A linear layer is `<name>.weight` [out, in] in
//! floats or blocks; experts are [E, out, in], gate and up apart, so one type a projection and layer. Norms, biases, sinks
//! and the router are F32. Source: llama.cpp `src/models/openai-moe.cpp`.

use std::ops::Range;

use safetensors::Dtype;

use super::dense::{FLOATS, RowMajor, float_of};
use super::{Rows, Weight};
use crate::algorithms::rtn::Codes;
use crate::checkpoint::gguf::{Storage, Tensor};
use crate::checkpoint::header::TensorSpec;
use crate::checkpoint::source::{Checkpoint, TensorRef};
use crate::containers::compressed_tensors::{Activations, Scheme, Strategy};
use crate::engine::view::{Kind, ScaleKind, Scales, View};
use crate::error::Result;
use crate::formats::float::Float;
use crate::formats::ggml::Ggml;
use crate::formats::mxfp4::BLOCK_BYTES;
use crate::formats::{MXFP4, NumberFormat};
use crate::model::{self, Linear, ModelConfig, Proj};
use crate::ops::decode;

/// The model's name of the tensor that all experts of a layer share, or of a layer's own weight, without `.weight`.
pub fn module(linear: &Linear) -> String {
    let Linear { proj, layer, .. } = linear;
    match proj {
        Proj::Gate | Proj::Up | Proj::Down => format!("model.layers.{layer}.mlp.experts.{}", proj.name()),
        _ => linear.module(),
    }
}

/// A tensor of the model as the file has it, and as bytes that a sink takes.
pub fn tensor(name: &str, storage: Storage, shape: &[usize]) -> (Tensor, TensorSpec) {
    let name = model::gguf::from_model(name).unwrap_or_else(|| panic!("{name} is a tensor of the model"));
    let (dtype, bytes) = storage.as_bytes(shape);
    (Tensor { name: name.clone(), storage, shape: shape.to_vec() }, TensorSpec::new(name, dtype, bytes))
}

/// The blocks of whole rows of `columns`.
pub fn pack(codes: &Codes, ty: Ggml) -> Vec<u8> {
    let mut out = Vec::with_capacity(codes.codes.len() / ty.group() * ty.bytes());
    for (codes, p) in codes.codes.chunks_exact(ty.group()).zip(&codes.params) {
        ty.pack(codes, *p, &mut out);
    }
    out
}

/// One row of OpenAI's MXFP4, `blocks` [in/32, 16] and `scales` [in/32], as ggml's blocks: the scale in front, and each byte
/// holds number j and j + 16 in place of 2 j and 2 j + 1.
pub fn from_openai(blocks: &[u8], scales: &[u8], out: &mut Vec<u8>) {
    for (b, &scale) in blocks.as_chunks::<BLOCK_BYTES>().0.iter().zip(scales) {
        out.push(scale);
        for i in 0..BLOCK_BYTES / 2 {
            let (low, high) = (b[i], b[i + BLOCK_BYTES / 2]);
            out.extend([low & 15 | high << 4, low >> 4 | high & 0xf0]);
        }
    }
}

/// The way back: `blocks` [in/32, 17] -> OpenAI's codes and scales.
pub fn to_openai(blocks: &[u8], codes: &mut Vec<u8>, scales: &mut Vec<u8>) {
    for b in blocks.as_chunks::<{ Ggml::Mxfp4.bytes() }>().0 {
        scales.push(b[0]);
        let pairs = b[1..].as_chunks::<2>().0;
        codes.extend(pairs.iter().map(|[even, odd]| even & 15 | odd << 4));
        codes.extend(pairs.iter().map(|[even, odd]| even >> 4 | odd & 0xf0));
    }
}

/// Rows of one linear layer in blocks.
struct BlockRows<'a> {
    bytes: &'a [u8],
    ty: Ggml,
    shape: (usize, usize),
}

/// The tensor of `linear`, checked, with the bytes of its rows.
fn find<'a>(
    checkpoint: &'a Checkpoint,
    config: &ModelConfig,
    linear: &Linear,
) -> Result<Option<(TensorRef<'a>, &'a [u8])>> {
    let Some(tensor) = checkpoint.get(&format!("{}.weight", module(linear))) else { return Ok(None) };
    let (out, inp) = linear.shape(config);
    let (shape, experts) = match linear.proj.fused() {
        Some(_) => (vec![config.experts, out, inp], config.experts),
        None => (vec![out, inp], 1),
    };
    let types: &[Dtype] = if tensor.info.blocks.is_some() { &[Dtype::U8] } else { &FLOATS };
    tensor.expect(types, &shape)?;
    let len = tensor.bytes.len() / experts;
    Ok(Some((tensor, &tensor.bytes[linear.expert * len..][..len])))
}

/// The [`super::READERS`] entry.
pub fn open<'a>(checkpoint: &'a Checkpoint, config: &ModelConfig, linear: &Linear) -> Result<Option<Weight<'a>>> {
    if !checkpoint.is_gguf() {
        return Ok(None);
    }
    let Some((tensor, bytes)) = find(checkpoint, config, linear)? else { return Ok(None) };
    let shape = linear.shape(config);
    Ok(Some(match tensor.info.blocks {
        Some(ty) => Box::new(BlockRows { bytes, ty, shape }),
        None => Box::new(RowMajor { bytes, float: float_of(&tensor)?, shape }),
    }))
}

impl Rows for BlockRows<'_> {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn float(&self) -> Float {
        // A scale in F16 times a code has more bits than BF16; a power of two times E2M1 has not.
        if self.ty == Ggml::Mxfp4 { Float::Bf16 } else { Float::F32 }
    }

    fn read(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        let (group, size) = (self.ty.group(), self.ty.bytes());
        let width = self.ty.row_bytes(self.shape.1);
        for (row, out) in rows.zip(out.chunks_exact_mut(columns.len().max(1))) {
            let blocks = &self.bytes[row * width..][columns.start / group * size..columns.end / group * size];
            decode::ggml(self.ty, blocks, out);
        }
    }

    fn view(&self) -> Option<View<'_>> {
        // Where the scale lies in a block, and where the codes.
        let (kind, scale_kind, scale, codes) = match self.ty {
            Ggml::Q4_0 => (Kind::Int4Halves, ScaleKind::F16, 0, 2),
            Ggml::Q8_0 => (Kind::Int8, ScaleKind::F16, 0, 2),
            Ggml::Mxfp4 => (Kind::E2m1Halves, ScaleKind::E8m0, 0, 1),
            Ggml::Tq2_0 => (Kind::Tq2, ScaleKind::F16, 64, 0),
            Ggml::Q4_1 | Ggml::Q5_0 | Ggml::Q5_1 | Ggml::Tq1_0 => return None,
        };
        let (row, step) = (self.ty.row_bytes(self.shape.1), self.ty.bytes());
        let scales = Scales { kind: scale_kind, bytes: &self.bytes[scale..], row, step, group: self.ty.group() };
        View::new(kind, self.shape, &self.bytes[codes..], (row, step), Some(scales))
    }

    fn stored(&self) -> Option<Scheme> {
        // What gpt-oss is published in is the same in every container.
        let weights = if self.ty == Ggml::Mxfp4 { MXFP4 } else { NumberFormat::Ggml(self.ty) };
        Some(Scheme { weights, strategy: Strategy::Group(self.ty.group()), activations: Activations::Float })
    }

    fn codes(&self, rows: Range<usize>, out: &mut Codes) {
        let width = self.ty.row_bytes(self.shape.1);
        out.codes.resize(rows.len() * self.shape.1, 0);
        out.params.clear();
        let blocks = self.bytes[rows.start * width..rows.end * width].chunks_exact(self.ty.bytes());
        for (block, codes) in blocks.zip(out.codes.chunks_exact_mut(self.ty.group())) {
            out.params.push(self.ty.unpack(block, codes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::mxfp4;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn mxfp4_goes_there_and_back_to_the_byte(blocks in prop::collection::vec(any::<[u8; 16]>(), 1..5), scale: u8) {
            let scales: Vec<u8> = (0..blocks.len()).map(|i| scale.wrapping_add(i as u8) % 255).collect();
            let flat = blocks.concat();
            let mut there = Vec::new();
            from_openai(&flat, &scales, &mut there);
            let (mut codes, mut again) = (Vec::new(), Vec::new());
            to_openai(&there, &mut codes, &mut again);
            prop_assert_eq!((&codes, &again), (&flat, &scales));
            let (mut want, mut have) = (vec![0f32; flat.len() * 2], vec![0f32; flat.len() * 2]);
            mxfp4::decode_row(&flat, &scales, &mut want);
            decode::ggml(Ggml::Mxfp4, &there, &mut have);
            prop_assert_eq!(have.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), want.iter().map(|v| v.to_bits()).collect::<Vec<_>>());
        }
    }
}
