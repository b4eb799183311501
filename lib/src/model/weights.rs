//! The weights of a layer as a device holds them, from whatever container the checkpoint has.

use std::path::Path;

use super::padding::Padding;
use super::{Fused, Linear, ModelConfig, Proj, Settings};
use crate::checkpoint::source::Checkpoint;
use crate::containers;
use crate::device::{Attention, Device, Experts};
use crate::error::Result;
use crate::formats::activations::Activations;

/// A checkpoint that is run.
pub struct Model {
    /// Where the weights are.
    pub checkpoint: Checkpoint,
    /// Shapes.
    pub config: ModelConfig,
    /// The rest of what the forward needs.
    pub settings: Settings,
}

/// One layer.
pub struct Layer<'w, D: Device> {
    /// input_layernorm.
    pub attention_norm: D::Tensor,
    /// Query.
    pub q: D::Matrix<'w>,
    /// Key.
    pub k: D::Matrix<'w>,
    /// Value.
    pub v: D::Matrix<'w>,
    /// Output.
    pub o: D::Matrix<'w>,
    /// How the heads look at the past.
    pub attention: Attention<D::Tensor>,
    /// post_attention_layernorm.
    pub mlp_norm: D::Tensor,
    /// Router.
    pub router: D::Matrix<'w>,
    /// Experts.
    pub experts: Experts<D::Matrix<'w>>,
}

/// The final norm and the output head.
pub struct Head<'w, D: Device> {
    /// model.norm.
    pub norm: D::Tensor,
    /// lm_head, or the embedding where they are tied.
    pub output: D::Matrix<'w>,
}

impl Model {
    /// Opens the checkpoint in `dir`; weights are read when they are used.
    pub fn open(dir: &Path) -> Result<Self> {
        Self::open_padded(dir, None)
    }

    /// The same, as the wider model that [`Padding`] makes of it.
    pub fn open_padded(dir: &Path, padding: Option<Padding>) -> Result<Self> {
        let mut checkpoint = Checkpoint::open(dir)?;
        padding.into_iter().for_each(|p| checkpoint.pad(p));
        let config = ModelConfig::parse(dir, &checkpoint.config)?;
        let settings = Settings::parse(dir, &checkpoint.config, &config)?;
        crate::containers::refuse_twice(&checkpoint, &config)?;
        Ok(Self { checkpoint, config, settings })
    }

    /// Every linear layer that the forward multiplies with, in the order of use.
    pub fn linears(&self) -> impl Iterator<Item = Linear> {
        let (layers, experts) = (self.config.layers, self.config.experts);
        let of_layer = move |layer| {
            let main = [Proj::Q, Proj::K, Proj::V, Proj::O, Proj::Router].map(|proj| Linear { proj, layer, expert: 0 });
            let of_expert = move |expert| [Proj::Gate, Proj::Up, Proj::Down].map(|proj| Linear { proj, layer, expert });
            main.into_iter().chain((0..experts).flat_map(of_expert))
        };
        let head = if self.config.tied { Proj::Embed } else { Proj::LmHead };
        (0..layers).flat_map(of_layer).chain([Linear { proj: head, layer: 0, expert: 0 }])
    }

    /// What the schemes do to inputs: each rule that some layer has, once.
    pub fn activations(&self) -> Result<Vec<Activations>> {
        let mut rules = Vec::new();
        for linear in self.linears() {
            rules.push(containers::open(&self.checkpoint, &self.config, &linear)?.inputs());
        }
        rules.sort();
        rules.dedup();
        Ok(rules)
    }

    /// The linear layers whose codes the engine has no kernel for: it takes their values.
    pub fn without_kernel(&self) -> Result<Vec<Linear>> {
        let mut without = Vec::new();
        for linear in self.linears() {
            if containers::open(&self.checkpoint, &self.config, &linear)?.view().is_none() {
                without.push(linear);
            }
        }
        Ok(without)
    }

    /// The weights, tensor by tensor, up to about `most` bytes of them.
    pub fn some_weights(&self, most: usize) -> Vec<&[u8]> {
        let mut left = most;
        let tensors = self.checkpoint.names().filter_map(|n| self.checkpoint.get(n)).map(|t| t.bytes);
        let taken = tensors.take_while(|b| {
            let take = left > 0;
            left = left.saturating_sub(b.len());
            take
        });
        taken.collect()
    }

    /// Bytes of weights that one token needs: everything once, but of the experts the share that it is routed to, and of
    /// the embedding one row.
    pub fn bytes_a_token(&self) -> u64 {
        let c = &self.config;
        let of = |name: &str| {
            let bytes = self.checkpoint.get(name).map_or(0, |t| t.bytes.len()) as u64;
            match name {
                n if n.contains(".mlp.experts.") => bytes * self.settings.top_k as u64 / c.experts as u64,
                n if n.starts_with("model.embed_tokens.") && !c.tied => bytes / c.vocab as u64,
                _ => bytes,
            }
        };
        self.checkpoint.names().map(of).sum()
    }

    /// The embedding.
    pub fn embedding<'w, D: Device>(&'w self, device: &D) -> Result<D::Matrix<'w>> {
        self.matrix(device, Proj::Embed, 0, 0, None)
    }

    /// Layer `l`.
    pub fn layer<'w, D: Device>(&'w self, device: &D, l: usize) -> Result<Layer<'w, D>> {
        let (c, s) = (&self.config, &self.settings);
        let attention = |proj: Proj| self.matrix(device, proj, l, 0, self.bias(l, proj)?);
        let row = |name: &str, columns: usize| {
            device.upload(self.plain(&format!("model.layers.{l}.{name}"), &[columns])?, columns)
        };
        Ok(Layer {
            attention_norm: row("input_layernorm.weight", c.hidden)?,
            q: attention(Proj::Q)?,
            k: attention(Proj::K)?,
            v: attention(Proj::V)?,
            o: attention(Proj::O)?,
            attention: Attention {
                head_dim: c.head_dim,
                kv_heads: c.kv_heads,
                window: s.windows[l],
                sinks: row("self_attn.sinks", c.heads)?,
            },
            mlp_norm: row("post_attention_layernorm.weight", c.hidden)?,
            router: self.matrix(device, Proj::Router, l, 0, self.bias(l, Proj::Router)?)?,
            experts: Experts {
                gate: self.expert_matrices(device, Proj::Gate, l)?,
                up: self.expert_matrices(device, Proj::Up, l)?,
                down: self.expert_matrices(device, Proj::Down, l)?,
                alpha: s.alpha,
                limit: s.limit,
            },
        })
    }

    /// The bias of q, k, v, o or the router of layer `l`.
    pub fn bias(&self, l: usize, proj: Proj) -> Result<Option<Vec<f32>>> {
        let linear = Linear { proj, layer: l, expert: 0 };
        if proj != Proj::Router && !self.config.attention_bias {
            return Ok(None);
        }
        self.plain(&format!("{}.bias", linear.module()), &[linear.shape(&self.config).0]).map(Some)
    }

    /// What follows the last layer.
    pub fn head<'w, D: Device>(&'w self, device: &D) -> Result<Head<'w, D>> {
        let norm = device.upload(self.plain("model.norm.weight", &[self.config.hidden])?, self.config.hidden)?;
        let proj = if self.config.tied { Proj::Embed } else { Proj::LmHead };
        Ok(Head { norm, output: self.matrix(device, proj, 0, 0, None)? })
    }

    fn matrix<'w, D: Device>(
        &'w self,
        device: &D,
        proj: Proj,
        layer: usize,
        expert: usize,
        bias: Option<Vec<f32>>,
    ) -> Result<D::Matrix<'w>> {
        let weight = containers::open(&self.checkpoint, &self.config, &Linear { proj, layer, expert })?;
        device.matrix(weight, bias)
    }

    fn expert_matrices<'w, D: Device>(&'w self, device: &D, proj: Proj, l: usize) -> Result<Vec<D::Matrix<'w>>> {
        let fused = if proj == Proj::Down { Fused::Down } else { Fused::GateUp };
        let &(_, first, step) =
            fused.parts().iter().find(|p| p.0 == proj).expect("a projection is in its fused tensor");
        let biases = containers::expert_biases(&self.checkpoint, &self.config, fused, l)?;
        let of_one = biases.chunks_exact(fused.shape(&self.config).0).enumerate();
        let one = |(expert, all): (usize, &[f32])| {
            let bias = all.iter().skip(first).step_by(step).copied().collect();
            self.matrix(device, proj, l, expert, Some(bias))
        };
        of_one.map(one).collect()
    }

    fn plain(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        containers::vector(&self.checkpoint, name, shape).map(|v| v.0)
    }
}
