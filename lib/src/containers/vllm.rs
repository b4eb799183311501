//! Experts under the names that vLLM's gpt-oss loader reads, an expert a module, gate and up rows interleaved as OpenAI
//! has them. Two ways:
//!
//! - integers (compressed-tensors): `experts.E.w13_weight_packed` i32 [2 I, H b / 32], `.w13_weight_scale` [2 I, groups],
//!   `.w13_bias` [2 I], and the same with `w2`; symmetric, no `weight_shape`;
//! - FP8 (quark): `experts.E.gate_up_proj.weight` f8e4m3 [2 I, H], `.weight_scale` f32 [2 I], `.bias` [2 I], and the same
//!   with `down_proj`.
//!
//! Source: vLLM 0.33 `model_executor/models/gpt_oss.py` (`_load_weights_other`, `_load_weights_quark`) and
//! `layers/quantization/quark/quark_moe.py`.

use std::ops::Range;

use serde_json::{Map, Value, json};

use super::compressed_tensors::{self, Activations, Scheme, Strategy};
use super::{Rows, Weight};
use crate::algorithms::rtn::Codes;
use crate::checkpoint::header::TensorSpec;
use crate::checkpoint::source::Checkpoint;
use crate::engine::view::View;
use crate::error::Result;
use crate::formats::float::Float;
use crate::formats::{FP8, NumberFormat};
use crate::model::{Fused, Linear, ModelConfig};

/// FP8 as vLLM computes it: a scale a row, inputs rounded a token.
pub const FP8_SCHEME: Scheme =
    Scheme { weights: FP8, strategy: Strategy::Channel, activations: Activations::DynamicTokenFp8 };

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Integers under compressed-tensors' words.
    Int,
    /// FP8 under quark's.
    Fp8,
}

impl Kind {
    /// Whether it can hold `scheme`.
    pub fn holds(self, scheme: &Scheme) -> bool {
        match self {
            Self::Int => {
                let bits =
                    matches!(scheme.weights, NumberFormat::Int(int) if int.symmetric && [4, 8].contains(&int.num_bits));
                let shared = matches!(scheme.strategy, Strategy::Group(32 | 64 | 128) | Strategy::Channel);
                bits && shared && scheme.activations == Activations::Float
            }
            Self::Fp8 => *scheme == FP8_SCHEME,
        }
    }

    /// What it holds, for messages.
    pub fn schemes(self) -> &'static str {
        match self {
            Self::Int => "w4a16 and w8a16, symmetric, in groups of 32, 64, 128 or a channel",
            Self::Fp8 => "fp8",
        }
    }

    fn module(self, fused: Fused, layer: usize, expert: usize) -> String {
        let experts = format!("model.layers.{layer}.mlp.experts.{expert}");
        match (self, fused) {
            (Self::Int, Fused::GateUp) => format!("{experts}.w13_"),
            (Self::Int, Fused::Down) => format!("{experts}.w2_"),
            (Self::Fp8, Fused::GateUp) => format!("{experts}.gate_up_proj."),
            (Self::Fp8, Fused::Down) => format!("{experts}.down_proj."),
        }
    }

    /// The type of scales beside weights of type `float`.
    pub fn scales(self, float: Float) -> Float {
        match self {
            Self::Int => float,
            Self::Fp8 => Float::F32,
        }
    }

    /// Name of an expert's codes.
    pub fn codes(self, fused: Fused, layer: usize, expert: usize) -> String {
        let name = if self == Self::Int { "weight_packed" } else { "weight" };
        format!("{}{name}", self.module(fused, layer, expert))
    }

    /// Name of an expert's bias.
    pub fn bias(self, fused: Fused, layer: usize, expert: usize) -> String {
        format!("{}bias", self.module(fused, layer, expert))
    }

    /// Codes and scales of an expert's fused matrix.
    pub fn specs(
        self,
        (fused, layer, expert): (Fused, usize, usize),
        scheme: &Scheme,
        float: Float,
        config: &ModelConfig,
    ) -> [TensorSpec; 2] {
        let module = self.module(fused, layer, expert);
        let mut specs = scheme.specs("", fused.shape(config), self.scales(float)).into_iter();
        let mut next = || specs.next().expect("codes and scales");
        let (mut codes, mut scales) = (next(), next());
        codes.name = format!("{module}{}", codes.name.trim_start_matches('.'));
        scales.name = format!("{module}{}", scales.name.trim_start_matches('.'));
        if self == Self::Fp8 {
            // One number a row, and no second extent.
            scales.shape.truncate(1);
        }
        [codes, scales]
    }
}

/// The expression that names all experts of `layer`, or of every layer, to vLLM and to readers of modules: vLLM looks for
/// gate_proj, up_proj and down_proj of expert 0, with a name between that it made up.
pub fn target(layer: Option<usize>) -> String {
    let layer = layer.map_or(String::new(), |l| format!(r"layers\.{l}\."));
    format!(r"re:.*{layer}mlp\.experts\..*(gate|up|down)_proj$")
}

/// The `quantization_config` of [`Kind::Fp8`].
pub fn quark_config() -> Value {
    let tensor = |dynamic: bool| {
        json!({
            "dtype": "fp8_e4m3",
            "is_dynamic": dynamic,
            "qscheme": "per_channel",
            "ch_axis": if dynamic { 1 } else { 0 },
            "group_size": null,
            "symmetric": true,
            "round_method": "half_even",
            "scale_type": "float",
            "scale_format": "float32",
            "observer_cls": "PerChannelMinMaxObserver",
        })
    };
    json!({
        "quant_method": "quark",
        "quant_mode": "eager_mode",
        "global_quant_config": {
            "weight": tensor(false), "input_tensors": tensor(true), "output_tensors": null, "bias": null,
        },
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "exclude": ["re:.*attn.*", "re:.*router.*", "re:.*embed.*", "lm_head"],
        "algo_config": null,
        "export": {
            "kv_cache_group": [],
            "min_kv_scale": 0.0,
            "pack_method": "order",
            "weight_format": "real_quantized",
            "weight_merge_groups": null,
        },
    })
}

/// Whether a config.json speaks of [`Kind::Fp8`].
fn is_quark(config: &Map<String, Value>) -> bool {
    config.get("quantization_config").is_some_and(|q| q["quant_method"] == "quark")
}

/// The kind that a checkpoint stores the experts of `layer` in.
pub fn kind_of(checkpoint: &Checkpoint, layer: usize) -> Option<Kind> {
    let has = |kind: Kind, name: &str| {
        let name = format!("{}{name}", kind.module(Fused::GateUp, layer, 0));
        checkpoint.get(&name).is_some()
    };
    match (has(Kind::Int, "weight_packed"), has(Kind::Fp8, "weight")) {
        (true, _) => Some(Kind::Int),
        (_, true) => Some(Kind::Fp8),
        _ => None,
    }
}

/// Every name of a layer's experts, of either kind.
pub fn names(config: &ModelConfig, layer: usize) -> impl Iterator<Item = String> {
    let each = (0..config.experts).flat_map(|e| [Fused::GateUp, Fused::Down].map(|f| (f, e)));
    each.flat_map(move |(fused, expert)| {
        let of = |kind: Kind, names: [&str; 3]| {
            let module = kind.module(fused, layer, expert);
            names.map(|n| format!("{module}{n}"))
        };
        let (int, fp8) = (
            of(Kind::Int, ["weight_packed", "weight_scale", "bias"]),
            of(Kind::Fp8, ["weight", "weight_scale", "bias"]),
        );
        int.into_iter().chain(fp8)
    })
}

/// One projection's rows of a fused matrix.
struct Lane<'a> {
    inner: Weight<'a>,
    first: usize,
    step: usize,
}

/// The [`super::READERS`] entry.
pub fn open<'a>(checkpoint: &'a Checkpoint, config: &ModelConfig, linear: &Linear) -> Result<Option<Weight<'a>>> {
    let Some(fused) = linear.proj.fused() else { return Ok(None) };
    let Some(kind) = kind_of(checkpoint, linear.layer) else { return Ok(None) };
    let scheme = match kind {
        Kind::Fp8 if is_quark(&checkpoint.config) => Some(FP8_SCHEME),
        Kind::Fp8 => None,
        Kind::Int => compressed_tensors::config::scheme_of(checkpoint, &linear.module())?,
    };
    let module = kind.module(fused, linear.layer, linear.expert);
    let scale = checkpoint.tensor(&format!("{module}weight_scale"))?;
    let Some(scheme) = scheme.filter(|s| kind.holds(s)) else {
        return Err(scale.error("is here, but quantization_config in config.json says nothing that fits it"));
    };
    let float = super::dense::float_of(&scale)?;
    let mut tensors = Vec::new();
    for spec in kind.specs((fused, linear.layer, linear.expert), &scheme, float, config) {
        let tensor = checkpoint.tensor(&spec.name)?;
        tensor.expect(&[spec.dtype], &spec.shape)?;
        tensors.push(tensor);
    }
    let inner = compressed_tensors::symmetric(scheme, fused.shape(config), float, tensors[0].bytes, tensors[1].bytes);
    let &(_, first, step) =
        fused.parts().iter().find(|p| p.0 == linear.proj).expect("a projection is in its fused tensor");
    Ok(Some(Box::new(Lane { inner, first, step })))
}

impl Rows for Lane<'_> {
    fn shape(&self) -> (usize, usize) {
        let (out, inp) = self.inner.shape();
        (out / self.step, inp)
    }

    fn float(&self) -> Float {
        self.inner.float()
    }

    fn inputs(&self) -> Activations {
        self.inner.inputs()
    }

    fn read(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]) {
        for (row, out) in rows.zip(out.chunks_exact_mut(columns.len().max(1))) {
            let row = self.first + row * self.step;
            self.inner.read(row..row + 1, columns.clone(), out);
        }
    }

    fn view(&self) -> Option<View<'_>> {
        Some(self.inner.view()?.lane(self.first, self.step))
    }

    fn stored(&self) -> Option<Scheme> {
        self.inner.stored()
    }

    fn codes(&self, rows: Range<usize>, out: &mut Codes) {
        out.codes.clear();
        out.params.clear();
        let mut one = Codes::default();
        for row in rows {
            let row = self.first + row * self.step;
            self.inner.codes(row..row + 1, &mut one);
            out.codes.extend_from_slice(&one.codes);
            out.params.extend_from_slice(&one.params);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::containers::compressed_tensors::config;
    use crate::model::Proj;
    use crate::recipe::pattern::matches;

    /// Its mapper renames `self_attn` in paths and leaves expressions alone; of the experts it asks for expert 0's, with or
    /// without a module of its own in between.
    #[test]
    fn targets_name_the_modules_as_vllm_calls_them_and_as_everybody_else_does() {
        for proj in [Proj::Q, Proj::K, Proj::V, Proj::O] {
            for attention in ["self_attn", "attn"] {
                let module = format!("model.layers.11.{attention}.{}", proj.name());
                assert!(matches(&config::target(proj), &module).unwrap(), "{module}");
            }
        }
        for between in ["", "routed_experts."] {
            for name in ["gate_proj", "up_proj", "down_proj"] {
                let module = format!("model.layers.11.mlp.experts.{between}0.{name}");
                assert!(matches(&target(None), &module).unwrap() && matches(&target(Some(11)), &module).unwrap());
                assert!(!matches(&target(Some(1)), &module).unwrap(), "{module}");
            }
        }
        assert!(!matches(&target(None), "model.layers.11.self_attn.o_proj").unwrap());
    }
}
