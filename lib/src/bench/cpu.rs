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

/// Everything that `request` asks for, and what a reader of it must know.
///
/// # Errors
/// Where the threads or the float product cannot be had.
pub fn run(request: &Request, threads: usize, progress: &Progress) -> Result<(Vec<GemmRow>, Vec<String>)> {
    let device = Cpu::new(threads)?;
    device.enter_awake(|| {
        let rate = {
            let bytes = filled(READ);
            read_rate(&[&bytes]) * 1e9
        };
        let mut notes = vec![format!("reads of this processor's memory by {threads} threads: {:.1} GB/s", rate / 1e9)];
        let mut rows = Vec::new();
        for shape in &request.shapes {
            progress.note(&format!("cpu: {}", shape.name));
            let inputs: Vec<Inputs> = request.m.iter().map(|&m| Inputs::new(shape, m)).collect();
            let most = inputs.iter().map(|i| i.rows.len()).max().unwrap_or(1);
            let mut of_shape: Vec<Measured> = Vec::new();
            if request.wants(BASELINE) {
                let weights = Floats::new(shape, most, request.memory)?;
                for inputs in &inputs {
                    of_shape.push(weights.measure(inputs, request.iters)?);
                }
            }
            for (name, kind, scale) in KERNELS.into_iter().filter(|k| request.wants(k.0)) {
                let group = if kind == Kind::E2m1 { Some(32) } else { request.group_of(shape.k) };
                let Some(group) = group else {
                    notes.push(request.no_group(name, shape));
                    continue;
                };
                let weights = Coded::new(shape, (name, kind, scale, group), most, request.memory);
                of_shape.extend(inputs.iter().map(|inputs| weights.measure(inputs, request.iters)));
            }
            // By M; what the others are compared with comes first.
            of_shape.sort_by_key(|one| request.m.iter().position(|&m| m == one.m));
            let mut baseline = None;
            for one in of_shape {
                if one.kernel == BASELINE {
                    baseline = Some(one.median() * 1e6);
                }
                rows.push(one.row(baseline, rate));
            }
        }
        Ok((rows, notes))
    })
}

/// What the kernels are compared with.
const BASELINE: &str = "f32";

/// Random bytes, repeated where there are many.
fn filled(bytes: usize) -> Vec<u8> {
    let drawn = Draw::new(3).bytes(bytes.min(DRAWN));
    let mut all = drawn.repeat(bytes.div_ceil(drawn.len()));
    all.truncate(bytes);
    all
}

/// How many copies of `bytes` take turns.
fn copies(bytes: usize, memory: u64) -> usize {
    let room = (memory / bytes as u64) as usize;
    BEYOND_CACHE.div_ceil(bytes).min(room).clamp(1, MANY)
}

/// Seconds of `run` with each set of weights in turn, after one warming run of each.
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

/// Copies of the weights of a shape as f32, one behind the other. Few tokens go to few of the experts, so that more sets of them take turns.
struct Floats<'s> {
    shape: &'s Shape,
    all: Vec<Tensor>,
}

fn failed(e: candle_core::Error) -> Error {
    Error::Refused(format!("the product in f32 failed: {e}"))
}

impl<'s> Floats<'s> {
    fn new(shape: &'s Shape, weights: usize, memory: u64) -> Result<Self> {
        let (n, k) = (shape.n, shape.k);
        let mut draw = Draw::new(2);
        let numbers: Vec<f32> = (0..n * k).map(|_| draw.unit()).collect();
        let one = |_| Tensor::from_slice(&numbers, (n, k), &candle_core::Device::Cpu).map_err(failed);
        let all = (0..copies(4 * n * k * weights, memory) * weights).map(one).collect::<Result<_>>()?;
        Ok(Self { shape, all })
    }

    fn measure(&self, inputs: &Inputs, iters: usize) -> Result<Measured<'s>> {
        let (n, k, weights) = (self.shape.n, self.shape.k, inputs.rows.len());
        let gather = |rows: &Vec<usize>| {
            let x: Vec<f32> = rows.iter().flat_map(|&r| &inputs.values[r * k..(r + 1) * k]).copied().collect();
            Tensor::from_vec(x, (rows.len(), k), &candle_core::Device::Cpu).map_err(failed)
        };
        let x: Vec<Tensor> = inputs.rows.iter().map(gather).collect::<Result<_>>()?;
        let copies = self.all.len() / weights;
        let seconds = times(copies, iters, |copy| {
            for (x, w) in x.iter().zip(&self.all[copy * weights..]) {
                black_box(w.t().and_then(|w| x.matmul(&w)).map_err(failed)?);
            }
            Ok(())
        })?;
        let rows = inputs.pairs();
        let bytes = 4 * (weights * n * k + rows * (n + k));
        let (device, shape, kernel) = ("cpu", self.shape, BASELINE.into());
        let (m, group, block) = (inputs.m, 0, None);
        Ok(Measured { device, shape, kernel, m, group, block, rows, weights, bytes, copies, seconds })
    }
}

/// The same as codes.
struct Coded<'s> {
    shape: &'s Shape,
    name: &'static str,
    kind: Kind,
    scale: ScaleKind,
    group: usize,
    /// Bytes of the codes of one weight.
    code_bytes: usize,
    codes: Vec<u8>,
    /// Of one weight; all have the same.
    scales: Vec<u8>,
}

impl<'s> Coded<'s> {
    fn new(
        shape: &'s Shape,
        (name, kind, scale, group): (&'static str, Kind, ScaleKind, usize),
        weights: usize,
        memory: u64,
    ) -> Self {
        let code_bytes = shape.n * (shape.k / kind.unit()) * kind.bytes();
        let codes = filled(copies(code_bytes * weights, memory) * weights * code_bytes);
        // 2^-7 in E8M0 and about 0.01 in BF16.
        let fill = if kind == Kind::E2m1 { 120u8 } else { 0x3c };
        let scales = vec![fill; shape.n * (shape.k / group) * scale.size()];
        Self { shape, name, kind, scale, group, code_bytes, codes, scales }
    }

    fn view(&self, at: usize) -> View<'_> {
        let (n, k, step) = (self.shape.n, self.shape.k, self.scale.size());
        let row = k / self.group * step;
        let scales = Scales { kind: self.scale, bytes: &self.scales, row, step, group: self.group };
        let codes = &self.codes[at * self.code_bytes..][..self.code_bytes];
        let lie = (self.code_bytes / n, self.kind.bytes());
        View::new(self.kind, (n, k), codes, lie, Some(scales)).expect("the shape is whole groups")
    }

    fn measure(&self, inputs: &Inputs, iters: usize) -> Measured<'s> {
        let (n, k, weights) = (self.shape.n, self.shape.k, inputs.rows.len());
        let rows = inputs.pairs();
        let mut out = vec![0f32; rows * n];
        let run = |copy: usize| {
            let (mut jobs, mut rest) = (Vec::new(), &mut out[..]);
            for (i, rows) in inputs.rows.iter().enumerate() {
                let (part, behind) = std::mem::take(&mut rest).split_at_mut(rows.len() * n);
                rest = behind;
                let view = self.view(copy * weights + i);
                let layer = Layer { view, bias: None, inputs: (Activations::Float, 1.0) };
                jobs.push(Job { layer, rows, out: part });
            }
            products(&inputs.values, k, jobs);
            Ok(())
        };
        let copies = self.codes.len() / self.code_bytes / weights;
        let seconds = times(copies, iters, run).expect("products cannot fail");
        let bytes = weights * (self.code_bytes + self.scales.len()) + 4 * rows * (n + k);
        let (device, shape, kernel) = ("cpu", self.shape, self.name.into());
        let (m, group, block) = (inputs.m, self.group, None);
        Measured { device, shape, kernel, m, group, block, rows, weights, bytes, copies, seconds }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// However few experts the tokens go to, what is read before it is read again is beyond the cache.
    #[test]
    fn all_copies_take_turns_whatever_the_tokens_need() {
        let shape = Shape { name: "experts".into(), n: 64, k: 64, experts: Some((8, 2)) };
        let (m, shapes, kernels) = (vec![1, 64], vec![shape], vec!["f32".into(), "w4a8".into()]);
        let request =
            Request { m, shapes, mixture: None, group: None, iters: 2, kernels, block: None, memory: 64 << 20 };
        let (rows, notes) = run(&request, 1, &Progress::new(true)).unwrap();
        assert!(rows.len() == 4 && notes.len() == 1, "{notes:?}");
        for pair in [[0, 2], [1, 3]] {
            let [few, many] = pair.map(|i| &rows[i]);
            assert_eq!((few.m, few.weights, many.m, many.weights), (1, 2, 64, 8));
            assert_eq!(few.copies * few.weights, many.copies * many.weights);
            assert!(many.copies > 1);
        }
    }
}
