//! Linear layers and mixtures of experts: which inputs meet which weights.

use rayon::prelude::*;

use super::view::{Kind, View};
use super::{Ready, Source, Task, multiply};
use crate::formats::activations::Activations;
use crate::ops::elementwise;

/// Numbers that are worth waking a thread for.
const GRAIN: usize = 1 << 14;

/// A linear layer.
#[derive(Clone, Copy)]
pub struct Layer<'a> {
    /// [out, in].
    pub view: View<'a>,
    /// [out].
    pub bias: Option<&'a [f32]>,
    /// What its scheme does to inputs, and the scale of a fixed one.
    pub inputs: (Activations, f32),
}

/// An expert.
#[derive(Clone, Copy)]
pub struct Expert<'a> {
    /// [I, H].
    pub gate: Layer<'a>,
    /// [I, H].
    pub up: Layer<'a>,
    /// [H, I].
    pub down: Layer<'a>,
}

/// A layer and the rows that it takes, in their order in its output.
pub struct Job<'a> {
    /// The layer.
    pub layer: Layer<'a>,
    /// Rows of the inputs.
    pub rows: &'a [usize],
    /// [rows, out].
    pub out: &'a mut [f32],
}

/// Some layers that have the inputs `x` [rows, columns] in common, in one pass over the threads.
pub fn products(x: &[f32], columns: usize, jobs: Vec<Job>) {
    type Key<'k> = (&'k [usize], Kind, (Activations, f32));
    let mut sources: Vec<Source> = Vec::new();
    let mut keys: Vec<Key> = Vec::new();
    let mut places = Vec::with_capacity(jobs.len());
    for job in &jobs {
        let key = (job.rows, job.layer.view.kind(), job.layer.inputs);
        if !sources.iter().any(|s| s.activations == key.2) {
            sources.push(Source::new(x, columns, key.2));
        }
        // Gate and up share theirs, and so do all experts of a single row.
        places.push(keys.iter().position(|k| *k == key).unwrap_or_else(|| {
            keys.push(key);
            keys.len() - 1
        }));
    }
    let make = |(rows, kind, inputs): &Key| {
        let source = sources.iter().find(|s| s.activations == *inputs).expect("every layer has a source");
        source.ready(rows, *kind)
    };
    let ready: Vec<Ready> =
        if x.len() < GRAIN { keys.iter().map(make).collect() } else { keys.par_iter().map(make).collect() };
    let mut tasks: Vec<Task> = Vec::with_capacity(places.len());
    for (Job { layer, out, .. }, at) in jobs.into_iter().zip(&places) {
        tasks.push(Task { view: layer.view, bias: layer.bias, inputs: &ready[*at], out });
    }
    multiply(tasks);
}

/// x W^T + bias [rows, out] for each of `layers`, which are as wide as x.
pub fn linears(x: &[f32], layers: &[Layer]) -> Vec<Vec<f32>> {
    let Some(columns) = layers.first().map(|l| l.view.shape().1) else { return Vec::new() };
    let rows: Vec<usize> = (0..x.len() / columns).collect();
    let mut outs: Vec<Vec<f32>> = layers.iter().map(|l| vec![0f32; rows.len() * l.view.shape().0]).collect();
    let jobs = layers.iter().zip(&mut outs).map(|(&layer, out)| Job { layer, rows: &rows, out });
    products(x, columns, jobs.collect());
    outs
}

/// The weighted sums of the experts of each row of `x` [rows, H]. `rows_of` has for each of `experts` the rows that go
/// there, with their weights; experts ascending, and so they are added. `alpha` and `limit` are SwiGLU's.
pub fn experts(x: &[f32], experts: &[Expert], rows_of: &[Vec<(usize, f32)>], alpha: f32, limit: f32) -> Vec<f32> {
    let Some(first) = experts.first() else { return vec![0.0; x.len()] };
    let (inner, columns) = first.gate.view.shape();
    let picked: Vec<Vec<usize>> = rows_of.iter().map(|r| r.iter().map(|r| r.0).collect()).collect();
    let pairs: usize = picked.iter().map(Vec::len).sum();
    let (mut hidden, mut up) = (vec![0f32; pairs * inner], vec![0f32; pairs * inner]);
    let mut jobs = Vec::with_capacity(2 * experts.len());
    let outs = parts(&mut hidden, &picked, inner).zip(parts(&mut up, &picked, inner));
    for ((e, rows), (gate, up)) in experts.iter().zip(&picked).zip(outs) {
        jobs.extend([Job { layer: e.gate, rows, out: gate }, Job { layer: e.up, rows, out: up }]);
    }
    products(x, columns, jobs);

    let swiglu = |(gate, up): (&mut [f32], &[f32])| elementwise::swiglu(gate, up, alpha, limit);
    if hidden.len() < GRAIN {
        hidden.chunks_exact_mut(inner).zip(up.chunks_exact(inner)).for_each(swiglu);
    } else {
        hidden.par_chunks_mut(1 << 10).zip(up.par_chunks(1 << 10)).for_each(swiglu);
    }

    let ends = picked.iter().scan(0, |end, rows| {
        *end += rows.len();
        Some((*end, rows.len()))
    });
    let places: Vec<Vec<usize>> = ends.map(|(end, n)| (end - n..end).collect()).collect();
    let mut results = vec![0f32; pairs * columns];
    let jobs = experts.iter().zip(&places).zip(parts(&mut results, &picked, columns));
    products(&hidden, inner, jobs.map(|((e, rows), out)| Job { layer: e.down, rows, out }).collect());

    let mut of_row = vec![Vec::new(); x.len() / columns];
    for (place, &(row, weight)) in rows_of.iter().flatten().enumerate() {
        of_row[row].push((place, weight));
    }
    let mut out = vec![0f32; x.len()];
    let sum = |(out, of): (&mut [f32], &Vec<(usize, f32)>)| {
        of.iter().for_each(|&(at, w)| elementwise::add_scaled(out, w, &results[at * columns..(at + 1) * columns]));
    };
    if out.len() < GRAIN {
        out.chunks_exact_mut(columns).zip(&of_row).for_each(sum);
    } else {
        out.par_chunks_exact_mut(columns).zip(&of_row).for_each(sum);
    }
    out
}

/// One part of `all` for each list of rows, `width` numbers a row.
fn parts<'a>(all: &'a mut [f32], rows: &'a [Vec<usize>], width: usize) -> impl Iterator<Item = &'a mut [f32]> {
    let mut rest = all;
    rows.iter().map(move |r| {
        let (part, behind) = std::mem::take(&mut rest).split_at_mut(r.len() * width);
        rest = behind;
        part
    })
}
