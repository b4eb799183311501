//! The kernels on a GPU beside cuBLAS. Each run is a graph of one launch for every copy of the weights, so that neither the time of a launch
//! nor the L2 cache is in the figures.

mod mixture;

use std::time::{Duration, Instant};

use super::{GemmRow, Measured, Request, Shape, routing};
use crate::error::{Error, Result};
use crate::formats::float::Float;
use crate::kernels::gpu::blas::Blas;
use crate::kernels::gpu::elementwise::quantize_activations;
use crate::kernels::gpu::hopper::{self, Hopper};
use crate::kernels::gpu::operations::{Inputs, Mixture, Routes, Weight};
use crate::kernels::gpu::product::{Block, Codes, Extents, PRODUCTS, Product};
use crate::kernels::gpu::{Buffer, Gpu, Graph};
use crate::ops::random::Draw;
use crate::pipeline::progress::Progress;

/// Copies of the weights at least.
const COPIES: usize = 8;
/// Copies at most, however small they are: together they should be beyond any L2 cache.
const MANY: usize = 512;
/// Launches of a graph at least.
const LAUNCHES: usize = 32;
/// Runs that warm up.
const WARM: usize = 3;
/// Seconds after which a figure has enough runs, and how many it has at least.
const PATIENCE: f64 = 1.0;
const FEW: usize = 5;
/// Bytes of a copy whose rate is measured: far beyond any L2 cache.
const COPIED: usize = 1 << 30;
/// How long a GPU is kept at work before anything is measured.
const SPIN: Duration = Duration::from_millis(300);
/// What inputs, outputs and biases are.
const FLOAT: Float = Float::Bf16;

/// Everything that `request` asks for; `emit` gets each row as soon as it is measured. Gives all rows, by M, and what a reader must know of them. What
/// fails is left out, and said.
///
/// # Errors
/// [`crate::error::Error::Gpu`] where not even a copy can be measured.
pub fn run(
    gpu: &Gpu,
    request: &Request,
    progress: &Progress,
    emit: &mut dyn FnMut(&GemmRow) -> Result<()>,
) -> Result<(Vec<GemmRow>, Vec<String>)> {
    let copied = COPIED.min(gpu.memory_bytes / 8);
    let (from, to) = (gpu.filled(copied, 1)?, gpu.filled(copied, 2)?);
    let copy = gpu.capture(|| gpu.copy(&from, &to))?;
    spin(gpu, &copy)?;
    let rate = 2.0 * copied as f64 / gpu.times(&copy, 4 * WARM)?.into_iter().fold(f64::INFINITY, f64::min);
    let mut notes = vec![format!("copies within the GPU: {:.0} GB/s, each byte read and written", rate / 1e9)];
    let blas = Blas::open(gpu).unwrap_or_else(|e| {
        notes.push(e.to_string());
        None
    });
    if blas.is_none() {
        notes.push("cuBLAS (libcublas.so.13 or .12) is not at hand, so nothing on the GPU was compared with it".into());
    }
    let mut rows = Vec::new();
    for shape in &request.shapes {
        progress.note(&format!("gpu: {}", shape.name));
        // A GPU that idled runs at a fraction of its clock.
        spin(gpu, &copy)?;
        let mut table = Table { request, shape, rate, baseline: Vec::new(), rows: Vec::new(), emit: &mut *emit };
        // Weights are made once for all M, and one kernel's at a time.
        let floats = |name, float| -> Result<Vec<Measured>> {
            let Some(blas) = blas.as_ref().filter(|_| request.wants(name)) else { return Ok(Vec::new()) };
            let weights = Floats::new(gpu, shape)?;
            let one = |&m: &usize| weights.measure(gpu, blas, (name, float), m, request.iters);
            request.m.iter().map(one).collect()
        };
        for (name, float) in [(BASELINE, Float::F16), ("cublas-bf16", Float::Bf16)] {
            table.take(name, floats(name, float), &mut notes)?;
        }
        if let Some(blas) =
            blas.as_ref().filter(|b| shape.experts.is_some() && request.wants(GROUPED) && b.has_groups())
        {
            let all = || -> Result<Vec<Measured>> {
                let weights = Floats::new(gpu, shape)?;
                request.m.iter().map(|&m| weights.measure_grouped(gpu, blas, m, request.iters)).collect()
            };
            table.take(GROUPED, all(), &mut notes)?;
        }
        for product in PRODUCTS.into_iter().filter(|p| request.wants(p.name) && gpu.has(p.name)) {
            let group = if product.codes == Codes::E2m1 { Some(32) } else { request.group_of(shape.k) };
            let Some(group) = group else {
                notes.push(request.no_group(product.name, shape));
                continue;
            };
            let all = || -> Result<Vec<Measured>> {
                let weights = Coded::new(gpu, product, shape, group)?;
                let one = |&m: &usize| weights.measure(gpu, m, request.block, request.iters);
                request.m.iter().map(one).collect()
            };
            table.take(product.name, all(), &mut notes)?;
        }
        if gpu.has_hopper() && shape.experts.is_none() && Hopper::takes((shape.n, shape.k)) {
            for fp8 in [false, true].into_iter().filter(|&fp8| request.wants(hopper::name(fp8))) {
                let all = || -> Result<Vec<Measured>> {
                    let (library, weights) = (Hopper::open(gpu)?, on_hopper(gpu, shape)?);
                    let one = |&m: &usize| measure_hopper(gpu, &library, fp8, (shape, &weights), m, request.iters);
                    request.m.iter().map(one).collect()
                };
                table.take(hopper::name(fp8), all(), &mut notes)?;
            }
        }
        // Whether the GPU is still as fast as when the baseline was measured.
        if let Ok(again) = floats(BASELINE, Float::F16) {
            notes.extend(table.drift(&again));
        }
        rows.extend(table.finish());
    }
    if let Some(layer) = &request.mixture {
        spin(gpu, &copy)?;
        for &m in &request.m {
            for name in MIXTURES.into_iter().filter(|n| request.wants(n)) {
                match mixture::measure(gpu, layer, name, m, request.iters, rate) {
                    Ok(Some(row)) => {
                        emit(&row)?;
                        rows.push(row);
                    }
                    Ok(None) => {}
                    Err(e) => notes.push(format!("{name} on {} is left out: {e}", layer.name)),
                }
            }
        }
    }
    Ok((rows, notes))
}

/// What the kernels are compared with.
const BASELINE: &str = "cublas-f16";
/// The same over experts, in one call.
const GROUPED: &str = "cublas-f16-grouped";
/// Products that a whole layer of experts is measured with.
const MIXTURES: [&str; 2] = ["mxfp4_a8", "mxfp4_a16"];
/// By how much the baseline may differ between the begin and the end of a shape.
const DRIFT: f64 = 0.05;

/// Rows of a shape.
struct Table<'r, 'e> {
    request: &'r Request,
    shape: &'r Shape,
    rate: f64,
    /// Seconds of the baseline for each M.
    baseline: Vec<(usize, f64)>,
    rows: Vec<GemmRow>,
    emit: &'e mut dyn FnMut(&GemmRow) -> Result<()>,
}

impl<'r> Table<'r, '_> {
    /// Keeps what was measured, or says why nothing was.
    fn take(&mut self, name: &str, result: Result<Vec<Measured<'r>>>, notes: &mut Vec<String>) -> Result<()> {
        let measured = match result {
            Ok(measured) => measured,
            Err(e) => {
                notes.push(format!("{name} on {} is left out: {e}", self.shape.name));
                return Ok(());
            }
        };
        if name == BASELINE {
            self.baseline = measured.iter().map(|one| (one.m, one.median())).collect();
        }
        for one in measured {
            let compared = self.baseline.iter().find(|b| b.0 == one.m).map(|b| b.1 * 1e6);
            let row = one.row(compared, self.rate);
            (self.emit)(&row)?;
            self.rows.push(row);
        }
        Ok(())
    }

    /// Where the baseline is no longer what it was.
    fn drift(&self, again: &[Measured]) -> Option<String> {
        let off = |one: &&Measured| {
            let before = self.baseline.iter().find(|b| b.0 == one.m);
            before.is_some_and(|b| (one.median() / b.1 - 1.0).abs() > DRIFT)
        };
        let one = again.iter().find(off)?;
        let before = self.baseline.iter().find(|b| b.0 == one.m)?;
        let (name, change) = (&self.shape.name, 100.0 * (one.median() / before.1 - 1.0));
        Some(format!(
            "{name}: {BASELINE} at M = {} took {change:+.0}% at the end of the shape: ratios there are that uncertain",
            one.m
        ))
    }

    /// By M, and for each in the order of measuring, which begins with what the others are compared with.
    fn finish(mut self) -> Vec<GemmRow> {
        self.rows.sort_by_key(|row| self.request.m.iter().position(|&m| m == row.m));
        self.rows
    }
}

/// Keeps the GPU at work until its clock is up.
fn spin(gpu: &Gpu, work: &Graph) -> Result<()> {
    let start = Instant::now();
    while start.elapsed() < SPIN {
        gpu.times(work, WARM)?;
    }
    Ok(())
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
    // A graph takes some time to begin, too.
    let launches = copies * LAUNCHES.div_ceil(copies);
    let graph = gpu.capture(|| (0..launches).try_for_each(|i| body(i % copies)))?;
    let warm = gpu.times(&graph, WARM)?;
    let iters = iters.min(((PATIENCE / warm[WARM - 1]) as usize).max(FEW));
    Ok(gpu.times(&graph, iters)?.into_iter().map(|s| s / launches as f64).collect())
}

/// As many buffers with the same content; the first comes from here, the others from it.
fn alike<'g>(gpu: &'g Gpu, bytes: &[u8], copies: usize) -> Result<Vec<Buffer<'g>>> {
    let mut all = vec![gpu.upload(bytes)?];
    for _ in 1..copies {
        let next = gpu.room(bytes.len())?;
        gpu.copy(&all[0], &next)?;
        all.push(next);
    }
    gpu.synchronize()?;
    Ok(all)
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

/// Weights for cuBLAS, which multiplies once for each expert that has rows; those lie together already.
struct Floats<'s, 'g> {
    shape: &'s Shape,
    /// Copies of the layer of all experts.
    weights: Vec<Buffer<'g>>,
}

impl<'s, 'g> Floats<'s, 'g> {
    fn new(gpu: &'g Gpu, shape: &'s Shape) -> Result<Self> {
        let experts = shape.experts.map_or(1, |e| e.0);
        let bytes = halves(shape.n * shape.k).repeat(experts);
        Ok(Self { shape, weights: alike(gpu, &bytes, copies(gpu, bytes.len()))? })
    }

    fn measure(
        &self,
        gpu: &Gpu,
        blas: &Blas,
        (name, float): (&str, Float),
        m: usize,
        iters: usize,
    ) -> Result<Measured<'s>> {
        let Shape { n, k, .. } = *self.shape;
        let of = rows_of(self.shape, m);
        let (rows, weights) = (of.iter().sum::<usize>(), of.iter().filter(|&&r| r > 0).count());
        let (x, out) = (gpu.upload(&halves(rows * k))?, gpu.room(2 * rows * n)?);
        let copies = self.weights.len();
        let seconds = times(gpu, copies, iters, |copy| {
            let mut first = 0;
            for (expert, &rows) in of.iter().enumerate().filter(|(_, r)| **r > 0) {
                blas.product((&self.weights[copy], expert), &x, &out, first, (rows, n, k), float)?;
                first += rows;
            }
            Ok(())
        })?;
        let bytes = 2 * (weights * n * k + rows * (n + k));
        let (kernel, shape, device) = (name.into(), self.shape, "gpu");
        Ok(Measured { device, shape, kernel, m, group: 0, block: None, rows, weights, bytes, copies, seconds })
    }
}

impl<'s> Floats<'s, '_> {
    /// All experts in one call.
    fn measure_grouped(&self, gpu: &Gpu, blas: &Blas, m: usize, iters: usize) -> Result<Measured<'s>> {
        let Shape { n, k, .. } = *self.shape;
        let of = rows_of(self.shape, m);
        let (rows, weights) = (of.iter().sum::<usize>(), of.iter().filter(|&&r| r > 0).count());
        let (x, out) = (gpu.upload(&halves(rows * k))?, gpu.room(2 * rows * n)?);
        let groups = |weight| blas.groups(gpu, weight, (&x, &out), &of, (n, k));
        let groups = self.weights.iter().map(groups).collect::<Result<Vec<_>>>()?;
        let copies = groups.len();
        let seconds = times(gpu, copies, iters, |copy| blas.grouped(&groups[copy], (n, k), Float::F16))?;
        let bytes = 2 * (weights * n * k + rows * (n + k));
        let (kernel, shape, device) = (GROUPED.into(), self.shape, "gpu");
        Ok(Measured { device, shape, kernel, m, group: 0, block: None, rows, weights, bytes, copies, seconds })
    }
}

/// Weights for a kernel.
struct Coded<'s, 'g> {
    product: Product,
    shape: &'s Shape,
    group: usize,
    weights: Vec<Weight<'g>>,
}

impl<'s, 'g> Coded<'s, 'g> {
    fn new(gpu: &'g Gpu, product: Product, shape: &'s Shape, group: usize) -> Result<Self> {
        let Shape { n, k, .. } = *shape;
        let experts = shape.experts.map_or(1, |e| e.0);
        let codes = Draw::new(3).bytes(n * k * product.codes.bits() / 8).repeat(experts);
        // 2^-7 in E8M0 and about 0.01 in BF16.
        let scale = if product.codes == Codes::E2m1 { 120u8 } else { 0x3c };
        let scales = vec![scale; experts * n * (k / group) * product.codes.scale_bytes(FLOAT)];
        let copies = copies(gpu, codes.len() + scales.len());
        let both = alike(gpu, &codes, copies)?.into_iter().zip(alike(gpu, &scales, copies)?);
        let weight = |(codes, scales)| Weight { codes, scales, scale_type: FLOAT, bias: None, experts, n, k, group };
        Ok(Self { product, shape, group, weights: both.map(weight).collect() })
    }

    /// The kernel, and the rounding of its inputs before it.
    fn measure(&self, gpu: &Gpu, m: usize, block: Option<Block>, iters: usize) -> Result<Measured<'s>> {
        let (product, group) = (self.product, self.group);
        let Shape { n, k, .. } = *self.shape;
        let of = rows_of(self.shape, m);
        let (rows, active) = (of.iter().sum::<usize>(), of.iter().filter(|&&r| r > 0).count());
        let block = match block {
            None => product.block(gpu, rows.div_ceil(active), active, Extents { n, k, group, scale: FLOAT })?,
            given => given,
        };
        if block.is_some_and(|b| b.is_wgmma()) && !gpu.has_wgmma() {
            return Err(Error::Refused("blocks of 64 tokens multiply by wgmma, which code for 9.0a alone has".into()));
        }
        let fits = |block: &Block| product.shared_bytes(*block, k, group, FLOAT) <= gpu.shared_bytes;
        let Some(block) = block.filter(fits) else {
            return Err(Error::Refused(format!("groups of {group} need more shared memory than this GPU has")));
        };
        let x = gpu.upload(&halves(m * k))?;
        let (values, token_scales) = (gpu.room(m * k)?, gpu.room(4 * m)?);
        let out = gpu.room(2 * rows * n)?;
        let routes = self.shape.experts.map(|e| routes(gpu, m, e, block)).transpose()?;
        let grouped = routes.as_ref().map(|(routes, chosen)| routes.group(gpu, chosen)).transpose()?;
        gpu.synchronize()?;
        let mixture = Mixture { gather: true, swiglu: None };
        let copies = self.weights.len();
        let seconds = times(gpu, copies, iters, |copy| {
            let inputs = if product.int8 {
                quantize_activations(gpu, (&x, FLOAT), &values, &token_scales, (m, k), false)?;
                Inputs { values: &values, scales: Some(&token_scales), rows: m }
            } else {
                Inputs { values: &x, scales: None, rows: m }
            };
            let experts = grouped.map(|g| (g, mixture));
            product.launch(gpu, &self.weights[copy], &inputs, (&out, FLOAT), block, experts)
        })?;
        let scale_bytes = n * (k / group) * product.codes.scale_bytes(FLOAT);
        let bytes = active * (n * k * product.codes.bits() / 8 + scale_bytes) + 2 * (m * k + rows * n);
        let (kernel, shape, device, weights) = (product.name.into(), self.shape, "gpu", active);
        Ok(Measured { device, shape, kernel, m, group, block: Some(block), rows, weights, bytes, copies, seconds })
    }
}

/// Weights for the library for Hopper, and their scales.
struct HopperWeights<'g> {
    codes: Vec<Buffer<'g>>,
    scales: Buffer<'g>,
}

fn on_hopper<'g>(gpu: &'g Gpu, shape: &Shape) -> Result<HopperWeights<'g>> {
    let Shape { n, k, .. } = *shape;
    // E4M3 without its NaN; int8 as well.
    let codes: Vec<u8> = Draw::new(3).bytes(n * k).iter().map(|b| b & 0xf7).collect();
    Ok(HopperWeights { codes: alike(gpu, &codes, copies(gpu, n * k))?, scales: gpu.upload(&vec![0.01f32; n])? })
}

/// The library for Hopper, and the rounding of its inputs before it.
fn measure_hopper<'s>(
    gpu: &Gpu,
    library: &Hopper,
    fp8: bool,
    (shape, weights): (&'s Shape, &HopperWeights),
    m: usize,
    iters: usize,
) -> Result<Measured<'s>> {
    let Shape { n, k, .. } = *shape;
    let copies = weights.codes.len();
    let x = gpu.upload(&halves(m * k))?;
    let (values, token_scales, out) = (gpu.room(m * k)?, gpu.room(4 * m)?, gpu.room(2 * m * n)?);
    let workspace = library.workspace(fp8, (m, n, k))?;
    let seconds = times(gpu, copies, iters, |copy| {
        quantize_activations(gpu, (&x, FLOAT), &values, &token_scales, (m, k), fp8)?;
        let weight = (&weights.codes[copy], &weights.scales);
        library.product(fp8, weight, (&values, &token_scales), None, &out, (m, n, k), &workspace)
    })?;
    let bytes = n * k + 4 * n + 2 * (m * k + m * n);
    let kernel = hopper::name(fp8).into();
    Ok(Measured { device: "gpu", shape, kernel, m, group: k, block: None, rows: m, weights: 1, bytes, copies, seconds })
}

/// Room for the rows of the experts, and which experts the tokens go to.
fn routes<'g>(gpu: &'g Gpu, m: usize, experts: (usize, usize), block: Block) -> Result<(Routes<'g>, Buffer<'g>)> {
    let chosen: Vec<i32> = routing(m, experts).into_iter().map(|e| e as i32).collect();
    Ok((Routes::new(gpu, (m, experts.1), experts.0, block.tokens)?, gpu.upload(&chosen)?))
}
