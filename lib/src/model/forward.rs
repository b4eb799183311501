//! The forward pass of gpt-oss, written once over a device's operations. Source: the model card and
//! openai/gpt-oss `gpt_oss/torch/model.py`; numerics as transformers' in f32.
//!
//! A batch is one or more sequences, one after the other in the rows of a tensor, each with its caches. A whole batch
//! goes through one layer after the other ([`layer`]); a single token is a batch of one row. Both give a token the same
//! bits.

use super::weights::{Head, Layer, Model};
use crate::device::{Device, Heads};
use crate::error::Result;

/// Where the rows of a batch stand.
pub struct Places<D: Device> {
    /// Rows of each sequence.
    pub lengths: Vec<usize>,
    cos: D::Tensor,
    sin: D::Tensor,
}

impl<D: Device> Places<D> {
    /// For sequences of these lengths, whose first rows stand at the positions `starts`.
    pub fn new(device: &D, model: &Model, starts: &[usize], lengths: &[usize]) -> Result<Self> {
        let rope = &model.settings.rope;
        let (cos, sin) = rope.table(starts.iter().zip(lengths).flat_map(|(&s, &n)| s..s + n));
        let half = rope.frequencies.len();
        Ok(Self { lengths: lengths.to_vec(), cos: device.upload(cos, half)?, sin: device.upload(sin, half)? })
    }
}

/// One layer over the hidden states `x` [rows, H], in place. `caches` has one entry a sequence, with its past.
pub fn layer<D: Device>(
    device: &D,
    model: &Model,
    w: &Layer<'_, D>,
    x: &mut D::Tensor,
    places: &Places<D>,
    caches: &mut [D::Cache],
) -> Result<()> {
    let settings = &model.settings;
    let normed = device.norm(x, &w.attention_norm, settings.eps)?;
    let attended = attended(device, w, &normed, places, caches)?;
    device.add(x, &device.linear(&attended, &w.o)?)?;

    let normed = device.norm(x, &w.mlp_norm, settings.eps)?;
    let routes = device.route(&device.linear(&normed, &w.router)?, settings.top_k)?;
    device.add(x, &device.experts(&normed, &routes, &w.experts)?)
}

/// What the heads of a layer bring home from the normed hidden states [rows, H], before the output projection.
pub fn attended<D: Device>(
    device: &D,
    w: &Layer<'_, D>,
    normed: &D::Tensor,
    places: &Places<D>,
    caches: &mut [D::Cache],
) -> Result<D::Tensor> {
    let [query, key, value] = device.linears(normed, [&w.q, &w.k, &w.v])?;
    let mut heads = Heads { query, key, value };
    device.rotate(&mut heads.query, &places.cos, &places.sin)?;
    device.rotate(&mut heads.key, &places.cos, &places.sin)?;
    device.attend(&heads, &w.attention, &places.lengths, caches)
}

/// Logits [rows, V] of hidden states that left the last layer.
pub fn logits<D: Device>(device: &D, model: &Model, head: &Head<'_, D>, x: &D::Tensor) -> Result<D::Tensor> {
    device.linear(&device.norm(x, &head.norm, model.settings.eps)?, &head.output)
}

/// A model with its weights at hand and the state of one sequence: text comes out a token at a time.
pub struct Session<'w, D: Device> {
    device: &'w D,
    model: &'w Model,
    embedding: D::Matrix<'w>,
    layers: Vec<Layer<'w, D>>,
    head: Head<'w, D>,
    caches: Vec<D::Cache>,
    position: usize,
}

impl<'w, D: Device> Session<'w, D> {
    /// An empty sequence.
    pub fn new(device: &'w D, model: &'w Model) -> Result<Self> {
        let layers = (0..model.config.layers).map(|l| model.layer(device, l)).collect::<Result<Vec<_>>>()?;
        let caches = layers.iter().map(|l| device.cache(&l.attention)).collect();
        let (embedding, head) = (model.embedding(device)?, model.head(device)?);
        Ok(Self { device, model, embedding, layers, head, caches, position: 0 })
    }

    /// How many tokens were taken in.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Forgets the sequence.
    pub fn clear(&mut self) {
        self.caches = self.layers.iter().map(|l| self.device.cache(&l.attention)).collect();
        self.position = 0;
    }

    /// Takes `ids` in; the hidden states behind the last layer [ids, H].
    pub fn advance(&mut self, ids: &[u32]) -> Result<D::Tensor> {
        let mut x = self.device.embed(&self.embedding, ids)?;
        let places = Places::new(self.device, self.model, &[self.position], &[ids.len()])?;
        for (w, cache) in self.layers.iter().zip(&mut self.caches) {
            let caches = std::slice::from_mut(cache);
            layer(self.device, self.model, w, &mut x, &places, caches)?;
        }
        self.position += ids.len();
        Ok(x)
    }

    /// Logits [rows, V] of what [`Self::advance`] gave.
    pub fn logits(&self, hidden: &D::Tensor) -> Result<D::Tensor> {
        logits(self.device, self.model, &self.head, hidden)
    }
}
