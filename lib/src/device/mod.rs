//! What the forward is written over: a dozen coarse operations. A device is one implementation of them; [`cpu`] is the
//! first. Nothing above this trait assumes that a tensor lies in host memory.

pub mod cpu;

use std::path::Path;

use crate::containers::Weight;
use crate::error::Result;
use crate::evaluate::States;
use crate::generate::Sampler;
use crate::ops::compare::RowFigures;

/// How the heads of a layer look at the past.
pub struct Attention<T> {
    /// Width of a head.
    pub head_dim: usize,
    /// Key/value heads; query heads are a multiple of them, head h reads from h / (heads / kv_heads).
    pub kv_heads: usize,
    /// A query sees this many positions, itself included; all where `None`.
    pub window: Option<usize>,
    /// One learned logit a query head [1, heads]: it joins the softmax and is dropped after it.
    pub sinks: T,
}

/// The experts of a layer.
pub struct Experts<M> {
    /// [I, H] each.
    pub gate: Vec<M>,
    /// [I, H] each.
    pub up: Vec<M>,
    /// [H, I] each.
    pub down: Vec<M>,
    /// Factor inside the sigmoid.
    pub alpha: f32,
    /// Clamp of gate and up.
    pub limit: f32,
}

/// Query, key and value rows of a layer, rotated.
pub struct Heads<T> {
    /// [rows, heads * head_dim].
    pub query: T,
    /// [rows, kv_heads * head_dim].
    pub key: T,
    /// [rows, kv_heads * head_dim].
    pub value: T,
}

/// Sums over the inputs of a linear layer, from the first token to the last.
pub struct Moments {
    /// Tokens.
    pub count: u64,
    /// Sum of |x| [columns].
    pub abs: Vec<f32>,
    /// Greatest |x| [columns].
    pub max: Vec<f32>,
    /// Sum of x x^T [columns, columns], symmetric.
    pub gram: States,
}

/// A device. Tensors are f32 matrices; a row is a token.
///
/// Rows do not influence each other anywhere but in [`Device::attend`], where a row sees the rows of its own sequence, so
/// the bits of a row do not depend on the batch that it came in.
pub trait Device: Sync {
    /// A matrix [rows, columns].
    type Tensor: Send + Sync;
    /// A linear layer: a weight, however it is stored, its bias, and what its scheme does to inputs.
    type Matrix<'w>: Send + Sync;
    /// Keys and values of one layer and one sequence.
    type Cache: Send;
    /// Which experts each row goes to, with which weights.
    type Routes;
    /// [`Moments`] while they grow.
    type Sums;

    /// A tensor of host values [rows, columns].
    fn upload(&self, values: Vec<f32>, columns: usize) -> Result<Self::Tensor>;
    /// The values of a tensor.
    fn download(&self, tensor: Self::Tensor) -> Result<Vec<f32>>;
    /// Takes a weight over, as codes where it is stored as codes.
    fn matrix<'w>(&self, weight: Weight<'w>, bias: Option<Vec<f32>>) -> Result<Self::Matrix<'w>>;
    /// An empty cache for one layer of one sequence.
    fn cache(&self, attention: &Attention<Self::Tensor>) -> Self::Cache;

    /// Rows `ids` of a table. `ids` are below its height.
    fn embed(&self, table: &Self::Matrix<'_>, ids: &[u32]) -> Result<Self::Tensor>;
    /// RMSNorm of each row.
    fn norm(&self, x: &Self::Tensor, weight: &Self::Tensor, eps: f32) -> Result<Self::Tensor>;
    /// x W^T + bias, x rounded first where the scheme says so.
    fn linear(&self, x: &Self::Tensor, w: &Self::Matrix<'_>) -> Result<Self::Tensor> {
        let [out] = self.linears(x, [w])?;
        Ok(out)
    }
    /// The same for layers that have their inputs in common.
    fn linears<const N: usize>(&self, x: &Self::Tensor, w: [&Self::Matrix<'_>; N]) -> Result<[Self::Tensor; N]>;
    /// Rotary embedding by `cos` and `sin` [rows, head_dim / 2].
    fn rotate(&self, x: &mut Self::Tensor, cos: &Self::Tensor, sin: &Self::Tensor) -> Result<()>;
    /// Appends keys and values to the sequences' caches, then lets every row attend to its own past and itself. The
    /// first `lengths[0]` rows belong to the first sequence, and so on.
    fn attend(
        &self,
        heads: &Heads<Self::Tensor>,
        attention: &Attention<Self::Tensor>,
        lengths: &[usize],
        caches: &mut [Self::Cache],
    ) -> Result<Self::Tensor>;
    /// x += y.
    fn add(&self, x: &mut Self::Tensor, y: &Self::Tensor) -> Result<()>;
    /// The `k` greatest of each row of router logits, with the softmax over them.
    fn route(&self, logits: &Self::Tensor, k: usize) -> Result<Self::Routes>;
    /// The weighted sum of each row's experts.
    fn experts(
        &self,
        x: &Self::Tensor,
        routes: &Self::Routes,
        experts: &Experts<Self::Matrix<'_>>,
    ) -> Result<Self::Tensor>;
    /// The next token after the last row of logits.
    fn sample(&self, logits: &Self::Tensor, sampler: &mut Sampler) -> Result<u32>;
    /// Figures of each row of logits; `targets` has one entry a row.
    fn compare(
        &self,
        logits: &Self::Tensor,
        reference: Option<&Self::Tensor>,
        targets: &[Option<u32>],
    ) -> Result<Vec<RowFigures>>;

    /// Empty sums; x x^T in a file in `offload` where there is one.
    fn sums(&self, columns: usize, offload: Option<&Path>) -> Result<Self::Sums>;
    /// Adds the rows of `x`. The sums do not depend on how rows are cut into calls.
    fn accumulate(&self, x: &Self::Tensor, sums: &mut Self::Sums) -> Result<()>;
    /// The sums.
    fn moments(&self, sums: Self::Sums) -> Result<Moments>;
}
