//! The engine's products on this processor, beside products in f32 by the `gemm` crate, which candle uses.

use std::hint::black_box;
use std::time::{Duration, Instant};

use candle_core::Tensor;

use super::{GemmRow, Measured, Request, Shape, routing};
use crate::device::cpu::Cpu;
use crate::engine::layer::{Job, Layer, products};
use crate::engine::view::{Kind, ScaleKind, Scales, View};
use crate::error::{Error, Result};
use crate::formats::activations::Activations;
use crate::ops::bandwidth::read_rate;
use crate::ops::random::Draw;
use crate::pipeline::progress::Progress;

/// Bytes that no cache holds: so many the copies of a weight have together, unless it is so small that there would be more of them than
/// [`MANY`].
const BEYOND_CACHE: usize = 512 << 20;
/// Copies at most.
const MANY: usize = 256;
/// Random bytes that are drawn, and repeated.
const DRAWN: usize = 16 << 20;
/// After so long no further run begins.
const PATIENCE: Duration = Duration::from_secs(2);
/// Bytes that are read to see how fast that goes.
const READ: usize = 512 << 20;

/// Kinds of weights, the names of their schemes, how scales are stored.
const KERNELS: [(&str, Kind, ScaleKind); 3] = [
    ("w4a8", Kind::Int4, ScaleKind::Bf16),
    ("mxfp4_a8", Kind::E2m1, ScaleKind::E8m0),
    ("w8a8", Kind::Int8, ScaleKind::Bf16),
];

/// Inputs of a layer, and the rows that each weight takes.
struct Inputs {
    m: usize,
    values: Vec<f32>,
    rows: Vec<Vec<usize>>,
}

impl Inputs {
    fn new(shape: &Shape, m: usize) -> Self {
        let mut draw = Draw::new(m as u64);
        let values = (0..m * shape.k).map(|_| draw.unit()).collect();
        let rows = match shape.experts {
            None => vec![(0..m).collect()],
            Some((count, top_k)) => {
                let mut rows = vec![Vec::new(); count];
                routing(m, (count, top_k)).iter().enumerate().for_each(|(i, &e)| rows[e].push(i / top_k));
                rows.retain(|r| !r.is_empty());
                rows
            }
        };
        Self { m, values, rows }
    }

    fn pairs(&self) -> usize {
        self.rows.iter().map(Vec::len).sum()
    }
}

/// Everything that `request` asks for.
///
/// # Errors
/// Where the threads or the float product cannot be had.
pub fn run(request: &Request, threads: usize, progress: &Progress) -> Result<Vec<GemmRow>> {
    let device = Cpu::new(threads)?;
    device.enter_awake(|| {
        let rate = {
            let bytes = filled(READ);
            read_rate(&[&bytes]) * 1e9
        };
        let mut rows = Vec::new();
        for shape in &request.shapes {
            for &m in &request.m {
                progress.note(&format!("cpu: {} M {m}", shape.name));
                let inputs = Inputs::new(shape, m);
                let mut baseline = None;
                if request.wants("f32") {
                    let row = floats(shape, &inputs, request.iters)?.row(None, rate);
                    baseline = Some(row.microseconds);
                    rows.push(GemmRow { speedup: Some(1.0), ..row });
                }
                for (name, kind, scale) in KERNELS {
                    let group = if kind == Kind::E2m1 { Some(32) } else { request.group_of(shape.k) };
                    let Some(group) = group.filter(|_| request.wants(name)) else { continue };
                    rows.push(codes(shape, &inputs, (name, kind, scale, group), request.iters).row(baseline, rate));
                }
            }
        }
        Ok(rows)
    })
}

/// Random bytes, repeated where there are many.
fn filled(bytes: usize) -> Vec<u8> {
    let drawn = Draw::new(3).bytes(bytes.min(DRAWN));
    let mut all = drawn.repeat(bytes.div_ceil(drawn.len()));
    all.truncate(bytes);
    all
}

fn copies(bytes: usize) -> usize {
    BEYOND_CACHE.div_ceil(bytes).clamp(1, MANY)
}

/// Seconds of `run` with each copy in turn, after one warming run of each.
fn times(copies: usize, iters: usize, mut run: impl FnMut(usize) -> Result<()>) -> Result<Vec<f64>> {
    let start = Instant::now();
    for copy in 0..copies {
        run(copy)?;
        if start.elapsed() > PATIENCE {
            break;
        }
    }
    let (start, mut seconds) = (Instant::now(), Vec::new());
    for i in 0..iters {
        let one = Instant::now();
        run(i % copies)?;
        seconds.push(one.elapsed().as_secs_f64());
        if start.elapsed() > PATIENCE {
            break;
        }
    }
    Ok(seconds)
}

fn floats<'a>(shape: &'a Shape, inputs: &Inputs, iters: usize) -> Result<Measured<'a>> {
    let failed = |e: candle_core::Error| Error::Refused(format!("the product in f32 failed: {e}"));
    let (n, k, weights) = (shape.n, shape.k, inputs.rows.len());
    let copies = copies(4 * n * k * weights);
    let mut draw = Draw::new(2);
    let cpu = &candle_core::Device::Cpu;
    let numbers: Vec<f32> = (0..n * k).map(|_| draw.unit()).collect();
    let one = || Tensor::from_slice(&numbers, (n, k), cpu);
    let all: Vec<Tensor> = (0..copies * weights).map(|_| one()).collect::<candle_core::Result<_>>().map_err(failed)?;
    drop(numbers);
    let gather = |rows: &Vec<usize>| {
        let x: Vec<f32> = rows.iter().flat_map(|&r| &inputs.values[r * k..(r + 1) * k]).copied().collect();
        Tensor::from_vec(x, (rows.len(), k), cpu)
    };
    let x: Vec<Tensor> = inputs.rows.iter().map(gather).collect::<candle_core::Result<_>>().map_err(failed)?;
    let seconds = times(copies, iters, |copy| {
        for (x, w) in x.iter().zip(&all[copy * weights..]) {
            black_box(w.t().and_then(|w| x.matmul(&w)).map_err(failed)?);
        }
        Ok(())
    })?;
    let rows = inputs.pairs();
    let bytes = 4 * (weights * n * k + rows * (n + k));
    let kernel = "f32".into();
    Ok(Measured { device: "cpu", shape, kernel, m: inputs.m, group: 0, rows, weights, bytes, copies, seconds })
}

fn codes<'a>(
    shape: &'a Shape,
    inputs: &Inputs,
    (name, kind, scale, group): (&str, Kind, ScaleKind, usize),
    iters: usize,
) -> Measured<'a> {
    let (n, k, weights) = (shape.n, shape.k, inputs.rows.len());
    let row_bytes = k / kind.unit() * kind.bytes();
    let (code_bytes, scale_bytes) = (n * row_bytes, n * (k / group) * scale.size());
    let copies = copies((code_bytes + scale_bytes) * weights);
    let all = filled(copies * weights * code_bytes);
    // 2^-7 in E8M0 and about 0.01 in BF16.
    let scales = vec![if kind == Kind::E2m1 { 120u8 } else { 0x3c }; scale_bytes];
    let view = |at: usize| {
        let row = k / group * scale.size();
        let scales = Scales { kind: scale, bytes: &scales, row, step: scale.size(), group };
        let codes = &all[at * code_bytes..][..code_bytes];
        View::new(kind, (n, k), codes, (row_bytes, kind.bytes()), Some(scales)).expect("the shape is whole groups")
    };
    let rows = inputs.pairs();
    let mut out = vec![0f32; rows * n];
    let run = |copy: usize| {
        let (mut jobs, mut rest) = (Vec::new(), &mut out[..]);
        for (i, rows) in inputs.rows.iter().enumerate() {
            let (part, behind) = std::mem::take(&mut rest).split_at_mut(rows.len() * n);
            rest = behind;
            let layer = Layer { view: view(copy * weights + i), bias: None, inputs: (Activations::Float, 1.0) };
            jobs.push(Job { layer, rows, out: part });
        }
        products(&inputs.values, k, jobs);
        Ok(())
    };
    let seconds = times(copies, iters, run).expect("products cannot fail");
    let bytes = weights * (code_bytes + scale_bytes) + 4 * rows * (n + k);
    let kernel = name.into();
    Measured { device: "cpu", shape, kernel, m: inputs.m, group, rows, weights, bytes, copies, seconds }
}
