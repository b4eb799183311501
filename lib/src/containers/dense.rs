//! Plain floats: `<module>.weight` [out, in], and the fused experts as transformers loads them, [E, in, out] with gate
//! and up columns interleaved.

use std::ops::Range;

use safetensors::Dtype;

use super::{Rows, Weight};
use crate::checkpoint::source::{Checkpoint, TensorRef};
use crate::engine::view::{Kind, View};
use crate::error::Result;
use crate::formats::float::Float;
use crate::model::{Linear, ModelConfig};
use crate::ops::decode;

/// The types that dense weights come in.
pub const FLOATS: [Dtype; 3] = [Dtype::BF16, Dtype::F16, Dtype::F32];

/// The float type of a tensor that was checked to have one.
pub fn float_of(tensor: &TensorRef) -> Result<Float> {
    let dtype = tensor.info.dtype;
    Float::of(dtype).ok_or_else(|| tensor.error(format!("has type {dtype}, wanted BF16, F16 or F32")))
}

/// The values of a plain tensor of this shape.
pub fn read(tensor: &TensorRef, shape: &[usize]) -> Result<Vec<f32>> {
    tensor.expect(&FLOATS, shape)?;
    let mut values = vec![0f32; shape.iter().product()];
    float_of(tensor)?.read(tensor.bytes, &mut values);
    Ok(values)
}

/// [out, in], as it stands.
pub(super) struct RowMajor<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) float: Float,
    pub(super) shape: (usize, usize),
}

/// One expert inside the fused, transposed tensor: element (o, i) lies at i * stride + first + o * step.
struct Transposed<'a> {
    bytes: &'a [u8],
    float: Float,
    shape: (usize, usize),
    stride: usize,
    first: usize,
    step: usize,
}

/// The [`super::READERS`] entry.
pub fn open<'a>(checkpoint: &'a Checkpoint, config: &ModelConfig, linear: &Linear) -> Result<Option<Weight<'a>>> {
    let shape = linear.shape(config);
    if let Some(tensor) = checkpoint.get(&format!("{}.weight", linear.module())) {
        tensor.expect(&FLOATS, &[shape.0, shape.1])?;
        let float = float_of(&tensor)?;
        return Ok(Some(Box::new(RowMajor { bytes: tensor.bytes, float, shape })));
    }
    let Some(fused) = linear.proj.fused() else { return Ok(None) };
    let Some(tensor) = checkpoint.get(&fused.name(linear.layer)) else { return Ok(None) };
    let (out, inp) = fused.shape(config);
    tensor.expect(&FLOATS, &[config.experts, inp, out])?;
    let float = float_of(&tensor)?;
    let len = out * inp * float.size();
    let (_, first, step) =
        *fused.parts().iter().find(|p| p.0 == linear.proj).expect("a projection is in its fused tensor");
    let bytes = &tensor.bytes[linear.expert * len..][..len];
    Ok(Some(Box::new(Transposed { bytes, float, shape, stride: out, first, step })))
}

impl Rows for RowMajor<'_> {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn values(&self) -> Option<&[f32]> {
        match self.float {
            Float::F32 if cfg!(target_endian = "little") => bytemuck::try_cast_slice(self.bytes).ok(),
            _ => None,
        }
    }

    fn float(&self) -> Float {
        self.float
    }

    fn view(&self) -> Option<View<'_>> {
        let kind = match self.float {
            Float::Bf16 => Kind::Bf16,
            Float::F16 => Kind::F16,
            Float::F32 => Kind::F32,
        };
        View::new(kind, self.shape, self.bytes, (self.shape.1 * self.float.size(), kind.bytes()), None)
    }

    fn read(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        let (width, size) = (self.shape.1, self.float.size());
        for (row, out) in rows.zip(out.chunks_exact_mut(columns.len().max(1))) {
            let at = row * width;
            decode::floats(self.float, &self.bytes[(at + columns.start) * size..(at + columns.end) * size], out);
            // The row's next block is asked for soon, and no hardware foresees so short a run.
            decode::prefetch(
                &self.bytes[(at + columns.end) * size..(at + width.min(columns.end + columns.len())) * size],
            );
        }
    }
}

impl Rows for Transposed<'_> {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn float(&self) -> Float {
        self.float
    }

    fn read(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        let (first, inp, size, n) = (columns.start, columns.len(), self.float.size(), rows.len());
        if n == 0 {
            return;
        }
        // One strip of the source holds these rows' values for one input; 32 inputs at a time keep both sides in cache.
        let span = (n - 1) * self.step + 1;
        let mut strip = vec![0f32; span];
        for start in (0..inp).step_by(32) {
            for i in start..inp.min(start + 32) {
                let at = ((first + i) * self.stride + self.first + rows.start * self.step) * size;
                decode::floats(self.float, &self.bytes[at..at + span * size], &mut strip);
                for (o, &v) in strip.iter().step_by(self.step).enumerate() {
                    out[o * inp + i] = v;
                }
            }
        }
    }
}
