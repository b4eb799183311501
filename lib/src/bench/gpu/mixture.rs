//! A whole layer of experts as one figure: rows are grouped, inputs rounded, gate and up multiplied with SwiGLU behind, rounded again, multiplied
//! down, and combined.

use super::{Coded, FLOAT, halves, routes, rows_of, times};
use crate::bench::{GemmRow, Measured, Mixture as Layer, Shape};
use crate::error::{Error, Result};
use crate::kernels::gpu::Gpu;
use crate::kernels::gpu::elementwise::quantize_activations;
use crate::kernels::gpu::operations::{Inputs, Mixture, combine_experts};
use crate::kernels::gpu::product::{Block, Extents, PRODUCTS};

/// gpt-oss's alpha and limit.
const SWIGLU: (f32, f32) = (1.702, 7.0);

/// `m` tokens through a layer with the product of this name; `None` where the build has it not.
pub(super) fn measure(
    gpu: &Gpu,
    layer: &Layer,
    name: &str,
    m: usize,
    iters: usize,
    rate: f64,
) -> Result<Option<GemmRow>> {
    let Some(product) = PRODUCTS.into_iter().find(|p| p.name == name).filter(|p| gpu.has(p.name)) else {
        return Ok(None);
    };
    let Layer { hidden, inner, experts, .. } = *layer;
    let shape = |n, k| Shape { name: layer.name.clone(), n, k, experts: Some(experts) };
    let (up_shape, down_shape) = (shape(2 * inner, hidden), shape(hidden, inner));
    let of = rows_of(&up_shape, m);
    let (rows, active) = (of.iter().sum::<usize>(), of.iter().filter(|&&r| r > 0).count());
    let suits = |n, k| product.block(gpu, rows.div_ceil(active), active, Extents { n, k, group: 32, scale: FLOAT });
    let refused = || Error::Refused("it needs more shared memory than this GPU has".into());
    let (Some(up), Some(down)) = (suits(2 * inner, hidden)?, suits(hidden, inner)?) else { return Err(refused()) };
    // Both products share the tiles of the rows.
    let (block, block_down) = if up.tokens == down.tokens {
        (up, down)
    } else {
        let fewer = |b: &Block| {
            let fits = |k| product.shared_bytes(*b, k, 32, FLOAT) <= gpu.shared_bytes;
            b.tokens == up.tokens.min(down.tokens) && fits(hidden) && fits(inner)
        };
        let one = Block::of(gpu).find(fewer).ok_or_else(refused)?;
        (one, one)
    };
    let (up, down) = (Coded::new(gpu, product, &up_shape, 32)?, Coded::new(gpu, product, &down_shape, 32)?);
    let (room, chosen) = routes(gpu, m, experts, block)?;
    let x = gpu.upload(&halves(m * hidden))?;
    let shares = gpu.upload(&vec![0.25f32; rows])?;
    let (x_codes, x_scales) = (gpu.room(m * hidden)?, gpu.room(4 * m)?);
    let h = gpu.room(2 * rows * inner)?;
    let (h_codes, h_scales) = (gpu.room(rows * inner)?, gpu.room(4 * rows)?);
    let (y, out) = (gpu.room(2 * rows * hidden)?, gpu.room(2 * m * hidden)?);
    let copies = up.weights.len().min(down.weights.len());
    let seconds = times(gpu, copies, iters, |copy| {
        let grouped = room.group(gpu, &chosen)?;
        let inputs = if product.int8 {
            quantize_activations(gpu, (&x, FLOAT), &x_codes, &x_scales, (m, hidden), false)?;
            Inputs { values: &x_codes, scales: Some(&x_scales), rows: m }
        } else {
            Inputs { values: &x, scales: None, rows: m }
        };
        let gated = Mixture { gather: true, swiglu: Some(SWIGLU) };
        product.launch(gpu, &up.weights[copy], &inputs, (&h, FLOAT), block, Some((grouped, gated)))?;
        let inputs = if product.int8 {
            quantize_activations(gpu, (&h, FLOAT), &h_codes, &h_scales, (rows, inner), false)?;
            Inputs { values: &h_codes, scales: Some(&h_scales), rows }
        } else {
            Inputs { values: &h, scales: None, rows }
        };
        let plain = Mixture { gather: false, swiglu: None };
        product.launch(gpu, &down.weights[copy], &inputs, (&y, FLOAT), block_down, Some((grouped, plain)))?;
        combine_experts(gpu, grouped, &y, &shares, &out, (hidden, FLOAT))
    })?;
    // Weights, scales, and what goes in and comes out of the layer. As a product it is one of three times the inner size.
    let weight = hidden * inner * 3;
    let bytes = active * (weight / 2 + weight / 32) + 2 * 2 * m * hidden;
    let whole = Shape { name: layer.name.clone(), n: 3 * inner, k: hidden, experts: Some(experts) };
    let kernel = name.into();
    let measured = Measured {
        device: "gpu",
        shape: &whole,
        kernel,
        m,
        group: 32,
        block: Some(block),
        rows,
        weights: active,
        bytes,
        copies,
        seconds,
    };
    Ok(Some(measured.row(None, rate)))
}
