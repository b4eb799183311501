//! Matrix products straight from stored codes, for inputs that are rounded to int8: what makes text fast. Weights stay
//! where their checkpoint is mapped; nothing is dequantized but a few rows at a time, in a register or a cache.
//!
//! The numerics are fixed ([`reference`]): integer sums of 32 columns are exact, and what is summed in f32 is summed in one
//! order, so every kernel, batch size and number of threads gives the same bits, and so does every container of the same
//! weight that has a kernel. Weights that are floats meet f32 inputs.
//!
//! [`exact`] is apart: f32 inputs and the values of codes, as the forward computes otherwise, for one row.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod exact;
pub mod inputs;
pub mod layer;
mod portable;
pub mod reference;
pub mod view;

use std::ops::Range;
use std::sync::OnceLock;

use rayon::prelude::*;

use crate::formats::activations::Activations;
use crate::ops::matmul::Columns;
use inputs::Inputs;
use view::{Kind, View};

/// Bytes of codes that are worth waking a thread for.
const LEAST: usize = 1 << 16;
/// Bytes of codes of one piece of work: many enough that its first rows, which nobody has asked for, do not count.
const PIECE: usize = 1 << 18;
/// Most inputs that meet a weight row by row; more meet it panel by panel.
const FEW: usize = 4;

/// What linear layers compute with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Numerics {
    /// The stored codes, and inputs in int8 where weights are integers: fast.
    Engine,
    /// The values that the codes stand for, and inputs in f32, but where the scheme says otherwise.
    Exact,
}

impl Numerics {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Engine, Self::Exact];

    /// `engine` or `exact`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Engine => "engine",
            Self::Exact => "exact",
        }
    }
}

/// Inputs [rows, columns] of linear layers, rounded when a kernel asks for it.
pub struct Source<'a> {
    values: &'a [f32],
    columns: usize,
    /// And their scale, where it is a fixed one.
    activations: (Activations, f32),
    rounded: OnceLock<Inputs>,
}

/// Some rows of a [`Source`] in the order in which a kernel meets them.
pub struct Ready {
    rows: usize,
    how: How,
}

enum How {
    #[cfg(target_arch = "x86_64")]
    Wide(Vec<avx512::Arranged>),
    #[cfg(target_arch = "x86_64")]
    Vectors(Vec<avx2::vector::Arranged>),
    #[cfg(target_arch = "x86_64")]
    Batch(avx2::panels::Batch),
    #[cfg(target_arch = "x86_64")]
    Floats(avx2::floats::Arranged),
    Integers(Inputs),
    Plain(Vec<f32>),
}

/// One product: `out` [rows of inputs, rows of the weight] = inputs W^T + bias.
pub struct Task<'a> {
    /// The weight.
    pub view: View<'a>,
    /// One number an output.
    pub bias: Option<&'a [f32]>,
    /// What [`Source::ready`] made for the weight's kind.
    pub inputs: &'a Ready,
    /// The result.
    pub out: &'a mut [f32],
}

impl<'a> Source<'a> {
    /// `values` [rows, columns]. `activations` is what the layers' scheme does to them, with the scale of a fixed one; layers
    /// with float inputs get them in int8 as [`Inputs::new`] says, where their weights are integers.
    pub fn new(values: &'a [f32], columns: usize, activations: (Activations, f32)) -> Self {
        Self { values, columns, activations, rounded: OnceLock::new() }
    }

    /// These rows for weights of `kind`.
    pub fn ready(&self, rows: &[usize], kind: Kind) -> Ready {
        self.ready_for(rows, kind, Path::best())
    }

    fn ready_for(&self, rows: &[usize], kind: Kind, path: Path) -> Ready {
        let how = if kind.is_float() { self.floats(rows, kind, path) } else { self.integers(rows, kind, path) };
        Ready { rows: rows.len(), how }
    }

    fn integers(&self, rows: &[usize], kind: Kind, path: Path) -> How {
        let all = self.rounded.get_or_init(|| Inputs::new(self.values, self.columns, self.activations.0));
        #[cfg(target_arch = "x86_64")]
        if path != Path::Portable {
            if path == Path::Avx512 && avx512::takes(kind) && rows.len() <= FEW {
                return How::Wide(rows.iter().map(|&i| avx512::Arranged::new(all, i, kind)).collect());
            }
            let vnni = path == Path::Vnni || path == Path::Avx512 && avx2::has_vnni();
            return match rows.len() <= FEW {
                true => How::Vectors(rows.iter().map(|&i| avx2::vector::Arranged::new(all, i, kind, vnni)).collect()),
                false => How::Batch(avx2::panels::Batch::new(all, rows, kind, vnni)),
            };
        }
        let _ = (kind, path);
        How::Integers(all.select(rows))
    }

    fn floats(&self, rows: &[usize], kind: Kind, path: Path) -> How {
        let mut values: Vec<f32> =
            rows.iter().flat_map(|&i| &self.values[i * self.columns..][..self.columns]).copied().collect();
        let (activations, scale) = self.activations;
        values.chunks_exact_mut(self.columns).for_each(|x| activations.quantize_token(x, scale));
        #[cfg(target_arch = "x86_64")]
        if path != Path::Portable {
            return How::Floats(avx2::floats::Arranged::new(&values, self.columns, kind));
        }
        let _ = (kind, path);
        How::Plain(values)
    }
}

/// Whose kernels are taken; all give the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Path {
    /// Any processor's.
    Portable,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// The same, with AVX-VNNI.
    #[cfg(target_arch = "x86_64")]
    Vnni,
    /// The same, with AVX-512 where that has a kernel.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Path {
    /// Every one that this processor has, slowest first.
    fn here() -> impl DoubleEndedIterator<Item = Self> {
        let all = [
            (Self::Portable, true),
            #[cfg(target_arch = "x86_64")]
            (Self::Avx2, avx2::is_here()),
            #[cfg(target_arch = "x86_64")]
            (Self::Vnni, avx2::has_vnni()),
            #[cfg(target_arch = "x86_64")]
            (Self::Avx512, avx512::is_here()),
        ];
        all.into_iter().filter(|p| p.1).map(|p| p.0)
    }

    fn best() -> Self {
        Self::here().next_back().unwrap_or(Self::Portable)
    }
}

/// All of `tasks`, their rows shared among the threads of the current pool.
pub fn multiply(tasks: Vec<Task>) {
    let threads = rayon::current_num_threads();
    let total: usize = tasks.iter().map(|t| t.view.shape().0 * t.view.row_bytes() * t.inputs.rows.div_ceil(FEW)).sum();
    let mut pieces: Vec<(usize, Range<usize>)> = Vec::new();
    for (i, task) in tasks.iter().enumerate() {
        let (rows, a_row) = (task.view.shape().0, task.view.row_bytes() * task.inputs.rows.div_ceil(FEW));
        // Whole panels, and several pieces a thread, so that none waits long for the others.
        let n = (PIECE / a_row.max(1)).clamp(8, 256).min(rows.div_ceil(4 * threads)).next_multiple_of(8);
        pieces.extend((0..rows).step_by(n).map(|r| (i, r..rows.min(r + n))));
    }
    let shared = |Task { view, bias, inputs, out }| {
        assert!(bias.is_none_or(|b| b.len() == view.shape().0), "a bias has one value an output");
        Shared { view, bias, inputs, out: Columns::new(out, inputs.rows, view.shape().0) }
    };
    let tasks: Vec<Shared> = tasks.into_iter().map(shared).collect();
    // SAFETY: every piece has rows of the weight of its own.
    let one = |(i, rows): &(usize, Range<usize>)| unsafe { piece(&tasks[*i], rows.clone()) };
    if threads == 1 || total < LEAST {
        pieces.iter().for_each(one);
    } else {
        pieces.par_iter().for_each(one);
    }
}

/// A [`Task`] whose output several threads write.
struct Shared<'a> {
    view: View<'a>,
    bias: Option<&'a [f32]>,
    inputs: &'a Ready,
    out: Columns<'a>,
}

/// # Safety
/// Nobody else writes these columns of the task's output.
unsafe fn piece(task: &Shared, rows: Range<usize>) {
    let (n, first) = (task.inputs.rows, rows.start);
    // SAFETY: the caller's.
    let mut outs: Vec<&mut [f32]> = (0..n).map(|i| unsafe { task.out.row(i, first, rows.len()) }).collect();
    let view = &task.view;
    match &task.inputs.how {
        #[cfg(target_arch = "x86_64")]
        How::Wide(inputs) => avx512::integers(view, rows, inputs, &mut outs),
        #[cfg(target_arch = "x86_64")]
        How::Vectors(inputs) => avx2::vector::integers(view, rows, inputs, &mut outs),
        #[cfg(target_arch = "x86_64")]
        How::Batch(batch) => avx2::panels::integers_here(view, rows.clone(), batch, |i, r, eight| {
            let n = eight.len().min(rows.end - r);
            outs[i][r - first..r - first + n].copy_from_slice(&eight[..n]);
        }),
        #[cfg(target_arch = "x86_64")]
        How::Floats(inputs) => avx2::floats::floats(view, rows, inputs, &mut outs),
        How::Integers(inputs) => {
            portable::integers(view, rows, inputs, &mut outs);
        }
        How::Plain(x) => {
            let x = x.chunks_exact(view.shape().1);
            outs.iter_mut().zip(x).for_each(|(out, x)| portable::floats(view, rows.clone(), x, out));
        }
    }
    if let Some(bias) = task.bias {
        for out in outs {
            out.iter_mut().zip(&bias[first..]).for_each(|(o, b)| *o += b);
        }
    }
}

#[cfg(test)]
mod tests;
