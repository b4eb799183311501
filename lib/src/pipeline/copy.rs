//! Tensors that pass through: copied byte for byte, or converted to another float type. Either way every number is
//! looked at, and NaN or infinity in a weight is an error.

use std::ops::Range;

use half::f16;

use crate::checkpoint::sink::Sink;
use crate::checkpoint::source::TensorRef;
use crate::error::{Error, Result};
use crate::formats::float::Float;
use crate::formats::mxfp4::{Fate, SCALE_NAN};
use crate::ops::dequantize::HalfCounts;

/// Bytes of source that one unit passes on.
pub const PIECE: usize = 4 << 20;

/// Byte ranges of at most [`PIECE`], cut between numbers of `size` bytes.
pub fn pieces(len: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    let step = PIECE - PIECE % size;
    (0..len).step_by(step).map(move |at| at..len.min(at + step))
}

/// The error for a weight that is no number.
pub fn not_finite(tensor: &TensorRef, element: usize) -> Error {
    let mut at = element;
    let mut index: Vec<usize> = tensor.info.shape.iter().rev().map(|&d| (at % d, at /= d).0).collect();
    index.reverse();
    tensor.error(format!("holds NaN or infinity, first at {index:?}; the checkpoint is damaged"))
}

/// Checks the numbers of `tensor` in the byte range `range`; types without NaN pass.
pub fn check(tensor: &TensorRef, range: &Range<usize>) -> Result<()> {
    let bytes = &tensor.bytes[range.clone()];
    if let Some(float) = Float::of(tensor.info.dtype) {
        if let Some(at) = float.first_non_finite(bytes) {
            return Err(not_finite(tensor, range.start / float.size() + at));
        }
    } else if tensor.name.ends_with("_scales")
        && let Some(at) = bytes.iter().position(|&b| b == SCALE_NAN)
    {
        return Err(nan_scale(tensor, range.start + at));
    }
    Ok(())
}

/// The error for an E8M0 scale that is NaN.
pub fn nan_scale(scales: &TensorRef, element: usize) -> Error {
    let (rows, groups) = (scales.info.shape[1], scales.info.shape[2]);
    let (expert, row, group) = (element / groups / rows, element / groups % rows, element % groups);
    scales.error(format!("holds the scale byte 255, which is NaN, at expert {expert}, row {row}, block {group}"))
}

/// Copies a byte range unchanged into tensor `to`.
pub fn copy(sink: &Sink, to: usize, tensor: &TensorRef, range: &Range<usize>) -> Result<()> {
    check(tensor, range)?;
    sink.write(to, range.start, &tensor.bytes[range.clone()])
}

/// Converts a byte range of floats to `float` into tensor `to`.
pub fn convert(
    sink: &Sink,
    to: usize,
    tensor: &TensorRef,
    range: &Range<usize>,
    from: Float,
    float: Float,
) -> Result<HalfCounts> {
    if from == float {
        copy(sink, to, tensor, range)?;
        return Ok(HalfCounts::default());
    }
    check(tensor, range)?;
    let mut values = vec![0f32; range.len() / from.size()];
    from.read(&tensor.bytes[range.clone()], &mut values);
    let mut counts = HalfCounts::default();
    let mut out = Vec::with_capacity(values.len() * float.size());
    for &v in &values {
        counts.add(fate(v, float));
        float.write(v, &mut out);
    }
    sink.write(to, range.start / from.size() * float.size(), &out)?;
    Ok(counts)
}

/// What becomes of the number `v` in the type `to`. Infinity before the conversion is no overflow of it.
pub fn fate(v: f32, to: Float) -> Fate {
    if !v.is_finite() {
        return Fate::Nan;
    }
    let rounded = to.round(v);
    let smallest = match to {
        Float::F16 => f16::MIN_POSITIVE.to_f32(),
        Float::Bf16 | Float::F32 => f32::MIN_POSITIVE,
    };
    if rounded.is_infinite() {
        Fate::Overflow
    } else if v == 0.0 || rounded.abs() >= smallest {
        Fate::Exact
    } else if rounded == 0.0 {
        Fate::Underflow
    } else {
        Fate::Subnormal
    }
}
