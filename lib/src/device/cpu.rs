//! The operations on this processor: threads over outputs, each with one owner and a fixed order of its sums.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::{Attention, Device, Experts, Heads, Moments};
use crate::containers::Weight;
use crate::engine::layer::{self, Layer};
use crate::engine::{Numerics, exact};
use crate::error::{Error, Result};
use crate::evaluate::States;
use crate::formats::activations::Activations;
use crate::generate::Sampler;
use crate::ops::attention::{Head, attend};
use crate::ops::compare::{RowFigures, figures};
use crate::ops::matmul::{Packed, matmul};
use crate::ops::{elementwise, moments, route};

/// Multiply-adds that are worth waking a thread for.
const GRAIN: usize = 1 << 15;

/// This processor.
pub struct Cpu {
    pool: Arc<ThreadPool>,
    /// Whether its threads look for work: [`Self::enter_awake`].
    awake: Arc<AtomicBool>,
    numerics: Numerics,
}

/// A matrix in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    columns: usize,
    values: Vec<f32>,
}

/// A linear layer whose weight stays where its checkpoint is mapped.
pub struct Matrix<'w> {
    weight: Weight<'w>,
    bias: Option<Vec<f32>>,
}

/// Keys and values, a growing array a head.
pub struct Cache {
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    /// Position of the first row that is kept.
    first: usize,
    /// Position of the next row.
    next: usize,
}

/// Experts and weights of each row, `k` a row, experts ascending.
pub struct Routes {
    k: usize,
    experts: Vec<u32>,
    weights: Vec<f32>,
}

impl Cpu {
    /// With this many threads, but no more than eight a processor, which would only wait for each other. It changes no
    /// bit.
    pub fn new(threads: usize) -> Result<Self> {
        let threads = threads.min(8 * std::thread::available_parallelism().map_or(1, Into::into));
        let pool = ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("gptoss-{i}")).build();
        let pool = pool.map_err(|e| Error::Refused(format!("cannot start {threads} threads: {e}")))?;
        Ok(Self { pool: Arc::new(pool), awake: Arc::default(), numerics: Numerics::Exact })
    }

    /// The same threads, computing with `numerics`.
    pub fn with(&self, numerics: Numerics) -> Self {
        Self { numerics, pool: self.pool.clone(), awake: self.awake.clone() }
    }

    /// `w` as the engine takes it, where it is asked for and can.
    fn by_codes<'a>(&self, w: &'a Matrix<'_>) -> Option<Layer<'a>> {
        if self.numerics == Numerics::Exact {
            return None;
        }
        let inputs = (w.weight.inputs(), w.weight.input_scale());
        Some(Layer { view: w.weight.view()?, bias: w.bias.as_deref(), inputs })
    }

    /// [`Device::experts`] by the engine, where it can take every expert that is needed; `rows_of` has the places of each
    /// expert in `routes`.
    fn experts_by_codes(
        &self,
        x: &Tensor,
        routes: &Routes,
        rows_of: &[Vec<usize>],
        experts: &Experts<Matrix<'_>>,
    ) -> Option<Vec<f32>> {
        let used: Vec<usize> = (0..rows_of.len()).filter(|&e| !rows_of[e].is_empty()).collect();
        let one = |&e: &usize| {
            let (gate, up, down) = (&experts.gate[e], &experts.up[e], &experts.down[e]);
            Some(layer::Expert { gate: self.by_codes(gate)?, up: self.by_codes(up)?, down: self.by_codes(down)? })
        };
        let layers = used.iter().map(one).collect::<Option<Vec<_>>>()?;
        let rows: Vec<Vec<(usize, f32)>> =
            used.iter().map(|&e| rows_of[e].iter().map(|&p| (p / routes.k, routes.weights[p])).collect()).collect();
        Some(self.pool.install(|| layer::experts(&x.values, &layers, &rows, experts.alpha, experts.limit)))
    }

    /// x W^T + bias through the values that the codes stand for.
    fn by_values(&self, x: &Tensor, w: &Matrix<'_>, out: &mut Tensor) {
        self.pool.install(|| {
            let (inputs, bias) = (w.weight.inputs(), w.bias.as_deref());
            let mut x = Cow::Borrowed(x);
            if inputs != Activations::Float {
                let scale = w.weight.input_scale();
                x.to_mut().each_row(|_, row| inputs.quantize_token(row, scale));
            }
            if x.rows() == 1
                && let Some(view) = w.weight.view()
                && exact::row(&view, w.weight.float(), &x.values, bias, &mut out.values)
            {
                return;
            }
            matmul(&Packed::new(&x.values, x.rows(), x.columns), &*w.weight, bias, &mut out.values);
        });
    }

    /// Runs `f` on the pool's threads, which saves each operation inside it the way there.
    pub fn enter<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.pool.install(f)
    }

    /// The same for many short operations one after the other: meanwhile the other threads look for work instead of going
    /// to sleep, because waking them takes as long as some of these do. Without work for a tenth of a second they sleep as
    /// always; where the pool is busy with something else, or awake already, it is [`Self::enter`].
    pub fn enter_awake<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        let threads = self.pool.current_num_threads();
        // With more threads than processors, those that look for work would take time from those that have some.
        let crowded = threads > std::thread::available_parallelism().map_or(1, Into::into);
        if threads == 1 || crowded || self.awake.swap(true, Ordering::AcqRel) {
            return self.enter(f);
        }
        let watch = Watch { awake: self.awake.clone(), ..Watch::default() };
        self.enter(|| {
            let (this, watch) = (rayon::current_thread_index(), Arc::new(watch));
            let other = watch.clone();
            self.pool.spawn_broadcast(move |c| {
                if Some(c.index()) != this {
                    other.look_for_work();
                }
            });
            // Every thread must be in its watch before `f` begins: one that took this job while it waits inside `f` would not
            // go on there before `f` ends, and `f` would wait for it.
            let start = Instant::now();
            while watch.begun.load(Ordering::Acquire) < threads - 1 && start.elapsed() < Watch::PATIENCE {
                std::thread::yield_now();
            }
            let complete = watch.begun.load(Ordering::Acquire) == threads - 1;
            // A watch that not everyone came to ends here, and those who come later go away at once.
            let _end = complete.then_some(End(watch));
            f()
        })
    }
}

/// What threads share that look for work until the end.
#[derive(Default)]
struct Watch {
    begun: AtomicUsize,
    over: AtomicBool,
    /// The pool's.
    awake: Arc<AtomicBool>,
}

impl Watch {
    /// How long to wait for threads that are busy.
    const PATIENCE: Duration = Duration::from_millis(2);
    /// Without work for so long, a thread sleeps as always.
    const IDLE: Duration = Duration::from_millis(100);

    fn look_for_work(&self) {
        if self.over.load(Ordering::Acquire) {
            return;
        }
        self.begun.fetch_add(1, Ordering::Release);
        let mut last = Instant::now();
        while !self.over.load(Ordering::Acquire) && last.elapsed() < Self::IDLE {
            if rayon::yield_now() == Some(rayon::Yield::Executed) {
                last = Instant::now();
            } else {
                std::thread::yield_now();
            }
        }
    }
}

/// Ends a watch, also where there is a panic.
struct End(Arc<Watch>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::Release);
        self.0.awake.store(false, Ordering::Release);
    }
}

impl Tensor {
    fn new(rows: usize, columns: usize) -> Self {
        Self { columns, values: vec![0.0; rows * columns] }
    }

    fn rows(&self) -> usize {
        self.values.len() / self.columns
    }

    fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.columns..][..self.columns]
    }

    /// `f` on each row and its number, by several threads where there is enough to do.
    fn each_row(&mut self, f: impl Fn(usize, &mut [f32]) + Sync) {
        let grain = (GRAIN / self.columns).max(1);
        if self.rows() <= grain {
            self.values.chunks_exact_mut(self.columns).enumerate().for_each(|(i, row)| f(i, row));
        } else {
            let rows = self.values.par_chunks_exact_mut(self.columns).with_min_len(grain);
            rows.enumerate().for_each(|(i, row)| f(i, row));
        }
    }
}

impl Cache {
    /// Appends one row of keys and values [kv_heads * head_dim].
    fn push(&mut self, key: &[f32], value: &[f32], head_dim: usize) {
        let append = |heads: &mut Vec<Vec<f32>>, row: &[f32]| {
            heads.iter_mut().zip(row.chunks_exact(head_dim)).for_each(|(h, part)| h.extend_from_slice(part));
        };
        append(&mut self.keys, key);
        append(&mut self.values, value);
        self.next += 1;
    }

    /// Forgets what lies outside the window of every later row, now and then.
    fn trim(&mut self, window: usize, head_dim: usize) {
        let needed = (self.next + 1).saturating_sub(window);
        if needed >= self.first + window {
            let gone = (needed - self.first) * head_dim;
            self.keys.iter_mut().chain(&mut self.values).for_each(|h| drop(h.drain(..gone)));
            self.first = needed;
        }
    }
}

impl Device for Cpu {
    type Tensor = Tensor;
    type Matrix<'w> = Matrix<'w>;
    type Cache = Cache;
    type Routes = Routes;
    type Sums = Moments;

    fn upload(&self, values: Vec<f32>, columns: usize) -> Result<Tensor> {
        assert!(columns > 0 && values.len().is_multiple_of(columns), "values are whole rows");
        Ok(Tensor { columns, values })
    }

    fn download(&self, tensor: Tensor) -> Result<Vec<f32>> {
        Ok(tensor.values)
    }

    fn matrix<'w>(&self, weight: Weight<'w>, bias: Option<Vec<f32>>) -> Result<Matrix<'w>> {
        Ok(Matrix { weight, bias })
    }

    fn cache(&self, attention: &Attention<Tensor>) -> Cache {
        let heads = || vec![Vec::new(); attention.kv_heads];
        Cache { keys: heads(), values: heads(), first: 0, next: 0 }
    }

    fn embed(&self, table: &Matrix<'_>, ids: &[u32]) -> Result<Tensor> {
        let mut out = Tensor::new(ids.len(), table.weight.shape().1);
        self.pool.install(|| {
            out.each_row(|i, row| {
                let id = ids[i] as usize;
                table.weight.read_rows(id..id + 1, row);
            });
        });
        Ok(out)
    }

    fn norm(&self, x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
        let mut out = Tensor::new(x.rows(), x.columns);
        self.pool.install(|| out.each_row(|i, row| elementwise::rms_norm(x.row(i), &weight.values, eps, row)));
        Ok(out)
    }

    fn linears<const N: usize>(&self, x: &Tensor, w: [&Matrix<'_>; N]) -> Result<[Tensor; N]> {
        let mut out = w.map(|w| Tensor::new(0, w.weight.shape().0));
        let coded: Vec<(usize, Layer)> =
            w.iter().enumerate().filter_map(|(i, w)| Some((i, self.by_codes(w)?))).collect();
        if !coded.is_empty() {
            let layers: Vec<Layer> = coded.iter().map(|c| c.1).collect();
            let values = self.pool.install(|| layer::linears(&x.values, &layers));
            coded.iter().zip(values).for_each(|(&(i, _), values)| out[i].values = values);
        }
        for (i, (out, w)) in out.iter_mut().zip(w).enumerate() {
            if coded.iter().all(|c| c.0 != i) {
                *out = Tensor::new(x.rows(), w.weight.shape().0);
                self.by_values(x, w, out);
            }
        }
        Ok(out)
    }

    fn rotate(&self, x: &mut Tensor, cos: &Tensor, sin: &Tensor) -> Result<()> {
        self.pool.install(|| x.each_row(|i, row| elementwise::rope(row, cos.row(i), sin.row(i))));
        Ok(())
    }

    fn attend(
        &self,
        heads: &Heads<Tensor>,
        attention: &Attention<Tensor>,
        lengths: &[usize],
        caches: &mut [Cache],
    ) -> Result<Tensor> {
        let dim = attention.head_dim;
        let (mut row, mut places) = (0, Vec::with_capacity(heads.query.rows()));
        for (sequence, (&length, cache)) in lengths.iter().zip(caches.iter_mut()).enumerate() {
            for _ in 0..length {
                places.push((sequence, cache.next));
                cache.push(heads.key.row(row), heads.value.row(row), dim);
                row += 1;
            }
        }
        assert_eq!(row, heads.query.rows(), "every row belongs to a sequence");
        let (query_heads, scale) = (heads.query.columns / dim, 1.0 / (dim as f32).sqrt());
        let group = query_heads / attention.kv_heads;
        let mut out = Tensor::new(row, heads.query.columns);
        let caches_now = &*caches;
        let one = |scores: &mut Vec<f32>, (i, out): (usize, &mut [f32])| {
            let (row, head) = (i / query_heads, i % query_heads);
            let (sequence, position) = places[row];
            let (cache, kv) = (&caches_now[sequence], head / group);
            let seen = attention.window.map_or(0, |w| (position + 1).saturating_sub(w));
            let range = (seen - cache.first) * dim..(position + 1 - cache.first) * dim;
            let head = Head {
                query: &heads.query.row(row)[head * dim..][..dim],
                keys: &cache.keys[kv][range.clone()],
                values: &cache.values[kv][range],
                sink: attention.sinks.values[head],
                scale,
            };
            attend(&head, scores, out);
        };
        let longest = caches_now.iter().map(|c| c.next - c.first).max().unwrap_or(0);
        let grain = (GRAIN / (longest * dim).max(1)).max(1);
        if row * query_heads <= grain {
            let mut scores = Vec::new();
            out.values.chunks_exact_mut(dim).enumerate().for_each(|part| one(&mut scores, part));
        } else {
            self.pool.install(|| {
                let parts = out.values.par_chunks_exact_mut(dim).with_min_len(grain).enumerate();
                parts.for_each_init(Vec::new, one);
            });
        }
        if let Some(window) = attention.window {
            caches.iter_mut().for_each(|c| c.trim(window, dim));
        }
        Ok(out)
    }

    fn add(&self, x: &mut Tensor, y: &Tensor) -> Result<()> {
        self.pool.install(|| x.each_row(|i, row| elementwise::add(row, y.row(i))));
        Ok(())
    }

    fn route(&self, logits: &Tensor, k: usize) -> Result<Routes> {
        let n = logits.rows() * k;
        let (mut experts, mut weights) = (vec![0; n], vec![0.0; n]);
        let rows = experts.chunks_exact_mut(k).zip(weights.chunks_exact_mut(k)).enumerate();
        rows.for_each(|(i, (e, w))| route::top_k(logits.row(i), e, w));
        Ok(Routes { k, experts, weights })
    }

    fn experts(&self, x: &Tensor, routes: &Routes, experts: &Experts<Matrix<'_>>) -> Result<Tensor> {
        let mut rows_of = vec![Vec::new(); experts.gate.len()];
        for (i, &expert) in routes.experts.iter().enumerate() {
            rows_of[expert as usize].push(i);
        }
        if let Some(values) = self.experts_by_codes(x, routes, &rows_of, experts) {
            return Ok(Tensor { columns: x.columns, values });
        }
        let mut out = Tensor::new(x.rows(), x.columns);
        for (expert, places) in rows_of.iter().enumerate().filter(|(_, p)| !p.is_empty()) {
            let mut input = Tensor { columns: x.columns, values: Vec::with_capacity(places.len() * x.columns) };
            places.iter().for_each(|place| input.values.extend_from_slice(x.row(place / routes.k)));
            let mut hidden = self.linear(&input, &experts.gate[expert])?;
            let up = self.linear(&input, &experts.up[expert])?;
            let (alpha, limit) = (experts.alpha, experts.limit);
            self.pool.install(|| hidden.each_row(|i, row| elementwise::swiglu(row, up.row(i), alpha, limit)));
            let result = self.linear(&hidden, &experts.down[expert])?;
            // Experts come in ascending order, and so are they added, whatever batch the row is in.
            for (i, &place) in places.iter().enumerate() {
                let row = &mut out.values[place / routes.k * x.columns..][..x.columns];
                elementwise::add_scaled(row, routes.weights[place], result.row(i));
            }
        }
        Ok(out)
    }

    fn sample(&self, logits: &Tensor, sampler: &mut Sampler) -> Result<u32> {
        sampler.sample(logits.row(logits.rows() - 1))
    }

    fn compare(&self, logits: &Tensor, reference: Option<&Tensor>, targets: &[Option<u32>]) -> Result<Vec<RowFigures>> {
        assert_eq!(logits.rows(), targets.len(), "one target a row");
        let one = |i: usize| figures(logits.row(i), reference.map(|r| r.row(i)), targets[i]);
        Ok(self.pool.install(|| (0..targets.len()).into_par_iter().map(one).collect()))
    }

    fn sums(&self, columns: usize, offload: Option<&Path>) -> Result<Moments> {
        let memory = if offload.is_some() { 0 } else { u64::MAX };
        let gram = States::new(columns, columns, memory, offload.unwrap_or(Path::new(".")))?;
        Ok(Moments { count: 0, abs: vec![0.0; columns], max: vec![0.0; columns], gram })
    }

    fn accumulate(&self, x: &Tensor, sums: &mut Moments) -> Result<()> {
        sums.count += x.rows() as u64;
        self.pool.install(|| {
            moments::add_abs(&x.values, &mut sums.abs);
            moments::raise_max(&x.values, &mut sums.max);
            moments::add_gram(&x.values, x.columns, &mut sums.gram);
        });
        Ok(())
    }

    fn moments(&self, mut sums: Moments) -> Result<Moments> {
        moments::mirror(&mut sums.gram, sums.abs.len());
        Ok(sums)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(device: &Cpu) -> u64 {
        device.enter(|| (0..10_000u64).into_par_iter().sum())
    }

    #[test]
    fn threads_that_are_kept_awake_compute_and_end() {
        for threads in [1, 2, 3] {
            let device = Cpu::new(threads).unwrap();
            let other = device.with(Numerics::Engine);
            for _ in 0..50 {
                assert_eq!(device.enter_awake(|| sum(&device)), 49_995_000);
                assert_eq!(device.enter_awake(|| other.enter_awake(|| sum(&other))), 49_995_000, "one in another");
                let twice = std::thread::scope(|s| {
                    let one = s.spawn(|| device.enter_awake(|| sum(&device)));
                    let two = s.spawn(|| other.enter_awake(|| sum(&other)));
                    (one.join().unwrap(), two.join().unwrap())
                });
                assert_eq!(twice, (49_995_000, 49_995_000), "two at once");
            }
            let panic =
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| device.enter_awake(|| panic!("on purpose"))));
            assert!(panic.is_err());
            assert_eq!(device.enter_awake(|| sum(&device)), 49_995_000, "after a panic");
            // A thread that came too late is nobody's: it must not wait for a watch that is over.
            std::thread::sleep(Watch::IDLE);
            assert_eq!(sum(&device), 49_995_000);
        }
    }
}
