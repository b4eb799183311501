//! What a gpt-oss is: its configuration, its tensors, its linear layers, its forward pass. The only place that knows the
//! architecture.
//!
//! Dimension letters: L layers, E experts, H hidden_size, I intermediate_size, A heads x head_dim, B key/value heads x
//! head_dim, V vocab_size.

mod config;
pub(crate) mod contradictions;
pub mod forward;
pub mod gguf;
pub mod padding;
pub mod reference;
pub mod rope;
mod settings;
mod weights;

pub use config::ModelConfig;
pub use settings::{EPS, Settings};
pub use weights::{Head, Layer, Model};

use crate::checkpoint::header::TensorSpec;
use safetensors::Dtype;

/// The linear layers of gpt-oss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Proj {
    /// Token embedding [V, H]; a table, listed here because it is ignored by name like a linear layer.
    Embed,
    /// Attention query [A, H].
    Q,
    /// Attention key [B, H].
    K,
    /// Attention value [B, H].
    V,
    /// Attention output [H, A].
    O,
    /// Router [E, H].
    Router,
    /// An expert's gate [I, H].
    Gate,
    /// An expert's up [I, H].
    Up,
    /// An expert's down [H, I].
    Down,
    /// Output head [V, H].
    LmHead,
}

/// The two classes that a recipe sets apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// gate, up, down of every expert.
    Experts,
    /// Everything else that is a linear layer ("mw": the main weights).
    Main,
}

/// One linear layer. `layer` and `expert` are 0 where they mean nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Linear {
    /// Which one.
    pub proj: Proj,
    /// Of which layer.
    pub layer: usize,
    /// Of which expert.
    pub expert: usize,
}

impl Proj {
    /// Its last name component.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embed => "embed_tokens",
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::Router => "router",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
            Self::LmHead => "lm_head",
        }
    }

    /// Experts or main weights.
    pub fn class(self) -> Class {
        match self {
            Self::Gate | Self::Up | Self::Down => Class::Experts,
            _ => Class::Main,
        }
    }

    /// The fused tensor that holds an expert's projection.
    pub fn fused(self) -> Option<Fused> {
        match self {
            Self::Gate | Self::Up => Some(Fused::GateUp),
            Self::Down => Some(Fused::Down),
            _ => None,
        }
    }
}

impl Linear {
    /// Its module's name, as llm-compressor names it: experts apart, gate and up apart.
    pub fn module(&self) -> String {
        let (l, e, name) = (self.layer, self.expert, self.proj.name());
        match self.proj {
            Proj::Embed => "model.embed_tokens".into(),
            Proj::LmHead => "lm_head".into(),
            Proj::Q | Proj::K | Proj::V | Proj::O => format!("model.layers.{l}.self_attn.{name}"),
            Proj::Router => format!("model.layers.{l}.mlp.router"),
            Proj::Gate | Proj::Up | Proj::Down => format!("model.layers.{l}.mlp.experts.{e}.{name}"),
        }
    }

    /// The layers that runtimes lay on top of each other, this one among them: q, k and v; gate and up of an expert.
    pub fn fused_with(self) -> Vec<Self> {
        let projections: &[Proj] = match self.proj {
            Proj::Q | Proj::K | Proj::V => &[Proj::Q, Proj::K, Proj::V],
            Proj::Gate | Proj::Up => &[Proj::Gate, Proj::Up],
            _ => return vec![self],
        };
        projections.iter().map(|&proj| Self { proj, ..self }).collect()
    }

    /// (out_features, in_features).
    pub fn shape(&self, c: &ModelConfig) -> (usize, usize) {
        match self.proj {
            Proj::Embed | Proj::LmHead => (c.vocab, c.hidden),
            Proj::Q => (c.heads * c.head_dim, c.hidden),
            Proj::K | Proj::V => (c.kv_heads * c.head_dim, c.hidden),
            Proj::O => (c.hidden, c.heads * c.head_dim),
            Proj::Router => (c.experts, c.hidden),
            Proj::Gate | Proj::Up => (c.intermediate, c.hidden),
            Proj::Down => (c.hidden, c.intermediate),
        }
    }
}

/// Every linear layer of a model, and the embedding.
pub fn linears(c: &ModelConfig) -> impl Iterator<Item = Linear> + use<> {
    let experts = c.experts;
    let one = |proj| Linear { proj, layer: 0, expert: 0 };
    let per_layer = move |layer| {
        let main = [Proj::Q, Proj::K, Proj::V, Proj::O, Proj::Router];
        let main = main.into_iter().map(move |proj| Linear { proj, layer, expert: 0 });
        let each = move |expert| [Proj::Gate, Proj::Up, Proj::Down].map(|proj| Linear { proj, layer, expert });
        main.chain((0..experts).flat_map(each))
    };
    [one(Proj::Embed), one(Proj::LmHead)].into_iter().chain((0..c.layers).flat_map(per_layer))
}

/// The two tensors that hold all experts of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fused {
    /// gate and up, rows interleaved: even rows gate, odd rows up.
    GateUp,
    /// down.
    Down,
}

impl Fused {
    /// Name of the fused weight of `layer`, without a suffix.
    pub fn name(self, layer: usize) -> String {
        let name = match self {
            Self::GateUp => "gate_up_proj",
            Self::Down => "down_proj",
        };
        format!("model.layers.{layer}.mlp.experts.{name}")
    }

    /// (out_features, in_features) of one expert.
    pub fn shape(self, c: &ModelConfig) -> (usize, usize) {
        match self {
            Self::GateUp => (2 * c.intermediate, c.hidden),
            Self::Down => (c.hidden, c.intermediate),
        }
    }

    /// The projections inside, each with its first row and the distance between its rows.
    pub fn parts(self) -> &'static [(Proj, usize, usize)] {
        match self {
            Self::GateUp => &[(Proj::Gate, 0, 2), (Proj::Up, 1, 2)],
            Self::Down => &[(Proj::Down, 0, 1)],
        }
    }
}

/// What a tensor of the model is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A norm, a bias, the sinks: never quantized.
    Plain,
    /// The weight of one linear layer.
    Weight(Linear),
    /// The fused weights of all experts of a layer.
    Experts(Fused, usize),
    /// The fused biases of all experts of a layer.
    ExpertBias(Fused, usize),
}

/// A tensor of the model in the layout that transformers loads.
#[derive(Debug, Clone)]
pub struct Slot {
    /// Name; for [`Role::Experts`] the MXFP4 layout appends `_blocks` and `_scales`.
    pub name: String,
    /// Shape of the dense tensor.
    pub shape: Vec<usize>,
    /// What it is.
    pub role: Role,
    /// 0 for the embedding, 1 + layer, then one for the rest: the unit in which work is finished and resumed.
    pub group: usize,
}

/// Every tensor of the model, in the order in which work is done.
pub fn slots(c: &ModelConfig) -> Vec<Slot> {
    let mut slots = Vec::new();
    let mut push = |group: usize, name: String, shape: &[usize], role: Role| {
        slots.push(Slot { name, shape: shape.to_vec(), role, group });
    };
    let weight = |proj, layer| Role::Weight(Linear { proj, layer, expert: 0 });
    push(0, "model.embed_tokens.weight".into(), &[c.vocab, c.hidden], weight(Proj::Embed, 0));
    for l in 0..c.layers {
        let at = |rest: &str| format!("model.layers.{l}.{rest}");
        let mut push = |name: &str, shape: &[usize], role: Role| push(1 + l, at(name), shape, role);
        push("input_layernorm.weight", &[c.hidden], Role::Plain);
        for proj in [Proj::Q, Proj::K, Proj::V, Proj::O] {
            let (out, inp) = Linear { proj, layer: l, expert: 0 }.shape(c);
            push(&format!("self_attn.{}.weight", proj.name()), &[out, inp], weight(proj, l));
            if c.attention_bias {
                push(&format!("self_attn.{}.bias", proj.name()), &[out], Role::Plain);
            }
        }
        push("self_attn.sinks", &[c.heads], Role::Plain);
        push("post_attention_layernorm.weight", &[c.hidden], Role::Plain);
        push("mlp.router.weight", &[c.experts, c.hidden], weight(Proj::Router, l));
        push("mlp.router.bias", &[c.experts], Role::Plain);
        let (e, h, i) = (c.experts, c.hidden, c.intermediate);
        push("mlp.experts.gate_up_proj", &[e, h, 2 * i], Role::Experts(Fused::GateUp, l));
        push("mlp.experts.gate_up_proj_bias", &[e, 2 * i], Role::ExpertBias(Fused::GateUp, l));
        push("mlp.experts.down_proj", &[e, i, h], Role::Experts(Fused::Down, l));
        push("mlp.experts.down_proj_bias", &[e, h], Role::ExpertBias(Fused::Down, l));
    }
    push(1 + c.layers, "model.norm.weight".into(), &[c.hidden], Role::Plain);
    if !c.tied {
        push(1 + c.layers, "lm_head.weight".into(), &[c.vocab, c.hidden], weight(Proj::LmHead, 0));
    }
    slots
}

/// Blocks and scales of a fused expert weight in OpenAI's MXFP4 layout: u8 [E, out, in/32, 16] and u8 [E, out, in/32].
pub fn mxfp4_specs(fused: Fused, layer: usize, c: &ModelConfig) -> [TensorSpec; 2] {
    let (out, inp) = fused.shape(c);
    let base = fused.name(layer);
    [
        TensorSpec::new(format!("{base}_blocks"), Dtype::U8, [c.experts, out, inp / 32, 16]),
        TensorSpec::new(format!("{base}_scales"), Dtype::U8, [c.experts, out, inp / 32]),
    ]
}
