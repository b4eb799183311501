//! The kernels on a GPU beside cuBLAS. Each run is a graph of one launch for every copy of the weights, so that neither the time of a launch
//! nor the L2 cache is in the figures.

use super::{GemmRow, Measured, Request, Shape, routing};
use crate::error::Result;
use crate::formats::float::Float;
use crate::kernels::gpu::blas::Blas;
use crate::kernels::gpu::operations::{
    Codes, Cut, Inputs, Mixture, PRODUCTS, Product, Routes, Scratch, Weight, quantize_activations,
};
use crate::kernels::gpu::{Buffer, Gpu};
use crate::ops::random::Draw;
use crate::pipeline::progress::Progress;

/// Copies of the weights at least.
const COPIES: usize = 8;
/// Copies at most, however small they are.
const MANY: usize = 64;
/// Runs that warm up.
const WARM: usize = 5;
/// Bytes of a copy whose rate is measured.
const COPIED: usize = 1 << 28;
/// What inputs, outputs and biases are.
const FLOAT: Float = Float::Bf16;

/// Everything that `request` asks for. `splits` is the number of parts of K; what suits the GPU where `None`.
///
/// # Errors
/// [`crate::error::Error::Gpu`] where the driver or cuBLAS refuse something, memory above all.
pub fn run(gpu: &Gpu, request: &Request, splits: Option<usize>, progress: &Progress) -> Result<(Vec<GemmRow>, Vec<String>)> {
    let blas = Blas::open(gpu)?;
    let mut notes = Vec::new();
    if blas.is_none() {
        notes.push("cuBLAS (libcublas.so.13 or .12) is not found, so nothing on the GPU was compared with it".into());
    }
    let rate = copy_rate(gpu, COPIED.min(gpu.memory_bytes / 8))?;
    let mut rows = Vec::new();
    for shape in &request.shapes {
        for &m in &request.m {
            progress.note(&format!("gpu: {} M {m}", shape.name));
            let mut baseline = None;
            for (name, float) in [("cublas-f16", Float::F16), ("cublas-bf16", Float::Bf16)] {
                let Some(blas) = blas.as_ref().filter(|_| request.wants(name)) else { continue };
                let row = floats(gpu, blas, (name, float), shape, m, request.iters)?.row(None, rate);
                let first = *baseline.get_or_insert(row.microseconds);
                rows.push(GemmRow { speedup: Some(first / row.microseconds), ..row });
            }
            for product in PRODUCTS {
                let group = if product.codes == Codes::E2m1 { Some(32) } else { request.group_of(shape.k) };
                let wanted = request.wants(product.name) && gpu.has(product.name);
                let Some(group) = group.filter(|_| wanted) else { continue };
                match codes(gpu, product, shape, (m, group), splits, request.iters)? {
                    Some(measured) => rows.push(measured.row(baseline, rate)),
                    None => notes.push(format!(
                        "{} needs more shared memory than this GPU has for {} in groups of {group}",
                        product.name, shape.name
                    )),
                }
            }
        }
    }
    Ok((rows, notes))
}

/// Bytes a second of copies within the GPU, each read and written: the best of some.
fn copy_rate(gpu: &Gpu, bytes: usize) -> Result<f64> {
    let (from, to) = (gpu.filled(bytes, 1)?, gpu.filled(bytes, 2)?);
    let graph = gpu.capture(|| gpu.copy(&from, &to))?;
    let seconds = gpu.times(&graph, 4 * WARM)?;
    Ok(2.0 * bytes as f64 / seconds.into_iter().fold(f64::INFINITY, f64::min))
}

/// How many copies of `bytes` take turns: four times the L2 cache, and what a quarter of the memory holds.
fn copies(gpu: &Gpu, bytes: usize) -> usize {
    let wanted = (4 * gpu.l2_bytes).div_ceil(bytes).clamp(COPIES, MANY);
    wanted.min(gpu.memory_bytes / 4 / bytes).max(1)
}

/// Seconds of one launch of `body`, which launches for each of `copies`.
fn times(gpu: &Gpu, copies: usize, iters: usize, body: impl Fn(usize) -> Result<()>) -> Result<Vec<f64>> {
    // What is loaded or allocated at its first use is not captured.
    body(0)?;
    gpu.synchronize()?;
    let graph = gpu.capture(|| (0..copies).try_for_each(&body))?;
    gpu.times(&graph, WARM)?;
    Ok(gpu.times(&graph, iters)?.into_iter().map(|s| s / copies as f64).collect())
}

/// 16-bit floats of middling size.
fn halves(n: usize) -> Vec<u8> {
    let mut bytes = Draw::new(4).bytes(2 * n);
    // 0x30 to 0x3f in the upper byte: below 1.9 in F16, below 2 in BF16.
    bytes.iter_mut().skip(1).step_by(2).for_each(|b| *b = *b & 0x8f | 0x30);
    bytes
}

/// How many rows each expert gets that gets any, by expert; one entry for a single layer.
fn rows_of(shape: &Shape, m: usize) -> Vec<usize> {
    let Some((count, top_k)) = shape.experts else { return vec![m] };
    let mut rows = vec![0; count];
    routing(m, (count, top_k)).into_iter().for_each(|e| rows[e] += 1);
    rows
}

/// cuBLAS, one product for each expert that has rows, which lie together already.
fn floats<'a>(
    gpu: &Gpu,
    blas: &Blas,
    (name, float): (&str, Float),
    shape: &'a Shape,
    m: usize,
    iters: usize,
) -> Result<Measured<'a>> {
    let Shape { n, k, .. } = *shape;
    let of = rows_of(shape, m);
    let (rows, weights) = (of.iter().sum::<usize>(), of.iter().filter(|&&r| r > 0).count());
    let copies = copies(gpu, 2 * n * k * of.len());
    let numbers = halves(n * k);
    let all: Vec<Vec<Buffer>> = (0..copies)
        .map(|_| of.iter().map(|_| gpu.upload(&numbers)).collect())
        .collect::<Result<_>>()?;
    let (x, out) = (gpu.upload(&halves(rows * k))?, gpu.room(2 * rows * n)?);
    let seconds = times(gpu, copies, iters, |copy| {
        let mut first = 0;
        for (expert, &rows) in of.iter().enumerate().filter(|(_, r)| **r > 0) {
            blas.product((&all[copy][expert], 0), &x, &out, first, (rows, n, k), float)?;
            first += rows;
        }
        Ok(())
    })?;
    let bytes = 2 * (weights * n * k + rows * (n + k));
    Ok(Measured { device: "gpu", shape, kernel: name.into(), m, group: 0, rows, weights, bytes, copies, seconds })
}

/// A kernel, and the rounding of its inputs before it. `None` where the GPU has too little shared memory.
fn codes<'a>(
    gpu: &Gpu,
    product: Product,
    shape: &'a Shape,
    (m, group): (usize, usize),
    splits: Option<usize>,
    iters: usize,
) -> Result<Option<Measured<'a>>> {
    let Shape { n, k, .. } = *shape;
    let of = rows_of(shape, m);
    let (rows, active) = (of.iter().sum::<usize>(), of.iter().filter(|&&r| r > 0).count());
    let Some(mut cut) = product.cut(gpu, rows.div_ceil(active), active, (n, k, group), FLOAT) else { return Ok(None) };
    if let Some(splits) = splits {
        cut.splits = splits.clamp(1, k / group);
        if product.shared_bytes(cut, k, group, FLOAT) > gpu.shared_bytes {
            return Ok(None);
        }
    }
    let code_bytes = n * k * product.codes.bits() / 8;
    let scale_bytes = n * (k / group) * product.codes.scale_bytes(FLOAT);
    let copies = copies(gpu, (code_bytes + scale_bytes) * of.len());
    let codes = Draw::new(3).bytes(code_bytes);
    // 2^-7 in E8M0 and about 0.01 in BF16.
    let scales = vec![if product.codes == Codes::E2m1 { 120u8 } else { 0x3c }; scale_bytes];
    let weight = |_| {
        let (codes, scales) = (codes.repeat(of.len()), scales.repeat(of.len()));
        let (codes, scales) = (gpu.upload(&codes)?, gpu.upload(&scales)?);
        Ok(Weight { codes, scales, scale_type: FLOAT, bias: None, experts: of.len(), n, k, group })
    };
    let weights: Vec<Weight> = (0..copies).map(weight).collect::<Result<_>>()?;
    let x = gpu.upload(&halves(m * k))?;
    let (values, token_scales) = (gpu.room(m * k)?, gpu.room(4 * m)?);
    let out = gpu.room(2 * rows * n)?;
    let routes = shape.experts.map(|e| routes(gpu, m, e, cut)).transpose()?;
    let tiles = routes.as_ref().map_or(m.div_ceil(cut.tokens), |r| r.tile_count);
    let scratch = Scratch::new(gpu, cut, rows, tiles, n)?;
    let mixture = Mixture { gather: true, swiglu: None };
    let seconds = times(gpu, copies, iters, |copy| {
        let inputs = if product.int8 {
            quantize_activations(gpu, (&x, FLOAT), &values, &token_scales, (m, k))?;
            Inputs { values: &values, scales: Some(&token_scales), rows: m }
        } else {
            Inputs { values: &x, scales: None, rows: m }
        };
        let experts = routes.as_ref().map(|r| (r, mixture));
        product.launch(gpu, &weights[copy], &inputs, (&out, FLOAT), cut, &scratch, experts)
    })?;
    let bytes = active * (code_bytes + scale_bytes) + 2 * (m * k + rows * n);
    let (kernel, device) = (product.name.into(), "gpu");
    Ok(Some(Measured { device, shape, kernel, m, group, rows, weights: active, bytes, copies, seconds }))
}

/// The rows of the experts, grouped once: a layer's products have that in common.
fn routes<'g>(gpu: &'g Gpu, m: usize, experts: (usize, usize), cut: Cut) -> Result<Routes<'g>> {
    let chosen: Vec<i32> = routing(m, experts).into_iter().map(|e| e as i32).collect();
    let routes = Routes::new(gpu, (m, experts.1), experts.0, cut.tokens)?;
    routes.group(gpu, &gpu.upload(&chosen)?)?;
    gpu.synchronize()?;
    Ok(routes)
}
