//! Which tensors the linear layers become, and the units that make them.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use super::store::{Lane, Place, Store};
use super::{LinearJob, Plan, Split, Work};
use crate::checkpoint::header::TensorSpec;
use crate::containers::compressed_tensors::{Scheme, Strategy};
use crate::containers::dense::float_of;
use crate::containers::vllm::Kind;
use crate::containers::{self, Weight};
use crate::error::{Error, Result};
use crate::formats::MXFP4;
use crate::formats::float::Float;
use crate::model::{self, Fused, Linear, Proj, Slot};
use crate::pipeline::executor::Unit;

/// How the experts of a layer are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Experts {
    /// As the source has them.
    Stay,
    /// As OpenAI's blocks and scales: each of them becomes MXFP4.
    Native,
    /// As the fused floats that transformers loads: none of them gets codes.
    Fused,
    /// A module an expert and projection.
    Modules,
    /// As vLLM's loader names them: each gets codes.
    Vllm(Kind),
}

impl<'a> Plan<'a> {
    /// What the treatment of a layer's experts comes to.
    pub(super) fn experts_of(&self, layer: usize) -> Experts {
        let projections = [Proj::Gate, Proj::Up, Proj::Down];
        let each = (0..self.config.experts).flat_map(|e| projections.map(|proj| Linear { proj, layer, expert: e }));
        let (each, treated): (Vec<_>, Vec<_>) = each.map(|linear| (linear, self.treated.get(&linear))).unzip();
        let scheme = |i: usize| self.coded(&each[i]);
        let mut all = 0..treated.len();
        if let Some(kind) = self.recipe.container.vllm() {
            return Experts::Vllm(kind);
        }
        if treated.iter().all(Option::is_none) {
            // A GGUF file has its floats by projection.
            let alike = self.mxfp4 || self.has(&Fused::GateUp.name(layer));
            match (self.is_padded() || !alike, self.mxfp4) {
                (false, _) => Experts::Stay,
                (true, true) => Experts::Native,
                (true, false) => Experts::Fused,
            }
        } else if all.clone().all(|i| scheme(i).is_none()) {
            Experts::Fused
        } else if all.all(|i| scheme(i).is_some_and(|s| s.weights == MXFP4)) {
            Experts::Native
        } else {
            Experts::Modules
        }
    }

    /// The weights of all experts of a layer, which do not stay.
    pub(super) fn experts(&mut self, slot: &Slot, fused: Fused, layer: usize) -> Result<()> {
        let kind = self.experts[layer];
        let one = Linear { proj: fused.parts()[0].0, layer, expert: 0 };
        let treated = |expert, proj| self.treated.contains_key(&Linear { proj, layer, expert });
        if (0..self.config.experts).all(|expert| fused.parts().iter().all(|p| !treated(expert, p.0))) {
            let float = self.open(&one)?.1.config_name();
            self.stay(slot, if kind == Experts::Native { "mxfp4" } else { float });
        }
        let to = match kind {
            Experts::Native => {
                let [blocks, scales] = model::mxfp4_specs(fused, layer, &self.config);
                let to = self.add(slot.group, blocks);
                self.add(slot.group, scales);
                to
            }
            Experts::Fused => {
                let float = self.written(&one, self.open(&one)?.1);
                self.add(slot.group, TensorSpec::new(&slot.name, float.dtype(), slot.shape.clone()))
            }
            Experts::Vllm(kind) => return self.vllm_experts(slot, kind, fused, layer),
            Experts::Stay | Experts::Modules => {
                let each = (0..self.config.experts).flat_map(|e| fused.parts().iter().map(move |p| (e, p.0)));
                return each
                    .map(|(expert, proj)| Linear { proj, layer, expert })
                    .try_for_each(|linear| self.linear(slot.group, linear));
            }
        };
        for expert in 0..self.config.experts {
            let (halves, jobs) = (Arc::default(), self.jobs.len());
            for &(proj, first, step) in fused.parts() {
                let lane = Lane { expert, first, step, halves: Arc::clone(&halves) };
                let place =
                    if kind == Experts::Native { Place::Native { to, lane } } else { Place::Fused { to, lane } };
                let linear = Linear { proj, layer, expert };
                let (weight, float) = self.open(&linear)?;
                let written = self.written(&linear, float);
                if kind == Experts::Fused && written.dtype() != self.tensors[to].spec.dtype {
                    let (module, other) = (linear.module(), one.module());
                    return Err(Error::Refused(format!(
                        "{module} has another type than {other}; one tensor holds both"
                    )));
                }
                self.job(linear, weight, float, place);
            }
            self.units_of(slot.group, jobs..self.jobs.len());
        }
        Ok(())
    }

    /// The experts of a layer under vLLM's names.
    fn vllm_experts(&mut self, slot: &Slot, kind: Kind, fused: Fused, layer: usize) -> Result<()> {
        for expert in 0..self.config.experts {
            let (halves, jobs, to) = (Arc::default(), self.jobs.len(), self.tensors.len());
            for &(proj, first, step) in fused.parts() {
                let linear = Linear { proj, layer, expert };
                let scheme = self.vllm_scheme(kind, &linear)?;
                let (weight, float) = self.open(&linear)?;
                if first == 0 {
                    let specs = kind.specs((fused, layer, expert), &scheme, float, &self.config);
                    for spec in specs {
                        self.add(slot.group, spec);
                    }
                }
                // The tensors are this expert's alone.
                let lane = Lane { expert: 0, first, step, halves: Arc::clone(&halves) };
                self.job(linear, weight, float, Place::Interleaved { to, lane, scheme, scales: kind.scales(float) });
            }
            self.units_of(slot.group, jobs..self.jobs.len());
        }
        Ok(())
    }

    /// The scheme of an expert that goes under vLLM's names.
    ///
    /// # Errors
    /// [`Error::Refused`] where vLLM has no kernel for it, or another for other experts of the layer.
    fn vllm_scheme(&self, kind: Kind, linear: &Linear) -> Result<Scheme> {
        let (module, name) = (linear.module(), self.recipe.container.name());
        let Some(scheme) = self.scheme(linear) else {
            return Err(Error::Refused(format!(
                "{module} would stay as it is, and {name} holds experts of {} alone",
                kind.schemes()
            )));
        };
        if !kind.holds(&scheme) {
            let layer = &self.treated[linear].layer;
            let (given, asymmetric) = (layer.scheme, if scheme.weights.symmetric() { "" } else { " with zero points" });
            return Err(Error::Refused(format!(
                "{module}: {name} holds experts of {}, not of {given}{asymmetric}{}",
                kind.schemes(),
                if let Strategy::Group(n) = scheme.strategy { format!(" in groups of {n}") } else { String::new() }
            )));
        }
        let first = Linear { proj: Proj::Gate, expert: 0, ..*linear };
        if self.scheme(&first) != Some(scheme) {
            return Err(Error::Refused(format!(
                "{module} has another scheme than {}, and vLLM wants one for all experts of a layer",
                first.module()
            )));
        }
        Ok(scheme)
    }

    /// The biases of a layer's experts, a tensor an expert.
    pub(super) fn vllm_biases(&mut self, slot: &Slot, kind: Kind, fused: Fused, layer: usize) -> Result<()> {
        let float = self.float_of_biases(slot, fused, layer)?;
        let (to, (out, _)) = (self.tensors.len(), fused.shape(&self.config));
        for expert in 0..self.config.experts {
            self.add(slot.group, TensorSpec::new(kind.bias(fused, layer, expert), float.dtype(), [out]));
        }
        self.stay(slot, float.config_name());
        self.bias_unit(
            slot,
            fused,
            layer,
            Work::Biases { to, fused, layer, float, split: Split { experts: true, projections: false } },
        )
    }

    /// The type of a layer's expert biases, whatever tensors they are in.
    pub(super) fn float_of_biases(&self, slot: &Slot, fused: Fused, layer: usize) -> Result<Float> {
        match self.source {
            None => Ok(Float::Bf16),
            Some(source) => match source.get(&slot.name) {
                Some(tensor) => float_of(&tensor),
                None => {
                    let values = containers::expert_biases(source, &self.config, fused, layer)?;
                    let whole = values.iter().all(|v| v.to_bits() & 0xffff == 0);
                    if whole { Ok(Float::Bf16) } else { containers::expert_bias_float(source, fused, layer) }
                }
            },
        }
    }

    /// A linear layer under its own name: quantized, or (an expert that the recipe ignores) as plain rows.
    pub(super) fn linear(&mut self, group: usize, linear: Linear) -> Result<()> {
        let (weight, float) = self.open(&linear)?;
        let (module, shape) = (linear.module(), linear.shape(&self.config));
        let to = self.tensors.len();
        let place = match self.coded(&linear) {
            Some(scheme) => {
                for spec in scheme.specs(&module, shape, float) {
                    self.add(group, spec);
                }
                Place::CompressedTensors { to, scheme }
            }
            None => {
                let written = self.written(&linear, float);
                self.add(group, TensorSpec::new(format!("{module}.weight"), written.dtype(), [shape.0, shape.1]));
                self.unquantized.push(module);
                Place::Plain { to, first: 0 }
            }
        };
        self.alone(group, linear, (weight, float), place);
        Ok(())
    }

    /// A job that shares its place with no other, and its units.
    pub(super) fn alone(&mut self, group: usize, linear: Linear, opened: (Option<Weight<'a>>, Float), place: Place) {
        let job = self.jobs.len();
        self.job(linear, opened.0, opened.1, place);
        self.units_of(group, job..job + 1);
    }

    pub(super) fn open(&self, linear: &Linear) -> Result<(Option<Weight<'a>>, Float)> {
        let weight = self.source.map(|s| containers::open(s, &self.config, linear)).transpose()?;
        let float = weight.as_ref().map_or(Float::Bf16, |w| w.float());
        Ok((weight, float))
    }

    fn job(&mut self, linear: Linear, weight: Option<Weight<'a>>, float: Float, place: Place) {
        let stored = if matches!(place, Place::Plain { .. } | Place::Fused { .. }) {
            self.written(&linear, float)
        } else {
            float
        };
        let store = Store { place, shape: linear.shape(&self.config), float: stored };
        let kept = store.takes_codes() && (self.recipe.keep_codes || !self.treated.contains_key(&linear));
        self.jobs.push(LinearJob {
            linear,
            weight,
            float,
            kept,
            scheme: self.scheme(&linear),
            extremes: OnceLock::new(),
            store,
        });
    }

    /// The units of `jobs`, which have one shape and one kind of store: the same rows of each, then the next.
    fn units_of(&mut self, group: usize, jobs: Range<usize>) {
        let store = &self.jobs[jobs.start].store;
        let (out, step, bytes) = (store.shape.0, store.unit_rows(), store.bytes());
        // Without weights there is nothing to do, only to plan.
        let all = if self.source.is_some() { 0..out } else { 0..0 };
        for start in all.step_by(step) {
            let rows = start..out.min(start + step);
            for job in jobs.clone() {
                // Calibration brings these.
                if self.calibrates(&self.jobs[job].linear) {
                    continue;
                }
                let (rows, bytes) = (rows.clone(), (bytes * rows.len() / out) as u64);
                let work = match self.jobs[job].scheme {
                    _ if self.jobs[job].kept => Work::Keep { job, rows },
                    Some(_) => Work::Quantize { job, rows },
                    None => Work::Plain { job, rows },
                };
                self.units.push(Unit { group, bytes, work });
            }
        }
    }

    pub(super) fn biases(&mut self, slot: &Slot, fused: Fused, layer: usize) -> Result<()> {
        let float = self.float_of_biases(slot, fused, layer)?;
        let (out, _) = fused.shape(&self.config);
        let to = self.tensors.len();
        for expert in 0..self.config.experts {
            for &(proj, _, step) in fused.parts() {
                let name = format!("{}.bias", Linear { proj, layer, expert }.module());
                self.add(slot.group, TensorSpec::new(name, float.dtype(), [out / step]));
            }
        }
        self.stay(slot, float.config_name());
        self.bias_unit(
            slot,
            fused,
            layer,
            Work::Biases { to, fused, layer, float, split: Split { experts: true, projections: true } },
        )
    }

    /// The biases of a layer's experts as they were, but wider.
    pub(super) fn fused_biases(&mut self, slot: &Slot, fused: Fused, layer: usize) -> Result<()> {
        let float = self.float_of_biases(slot, fused, layer)?;
        let to = self.add(slot.group, TensorSpec::new(&slot.name, float.dtype(), slot.shape.clone()));
        self.stay(slot, float.config_name());
        self.bias_unit(
            slot,
            fused,
            layer,
            Work::Biases { to, fused, layer, float, split: Split { experts: false, projections: false } },
        )
    }

    /// The unit that does `work`, where biases are there.
    pub(super) fn bias_unit(&mut self, slot: &Slot, fused: Fused, layer: usize, work: Work<'a>) -> Result<()> {
        let Some(source) = self.source else { return Ok(()) };
        containers::expert_biases(source, &self.config, fused, layer)?;
        let bytes = slot.shape.iter().product::<usize>() as u64 * 2;
        self.units.push(Unit { group: slot.group, bytes, work });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::FP8;
    use crate::recipe::Recipe;
    use crate::runtimes::{ExpertLayout, MainLayout};
    use serde_json::{Map, Value, json};
    use std::path::Path;

    fn layer(scheme: &str) -> Value {
        json!({"algorithm": "rtn", "scheme": scheme, "symmetric": true, "group_size": "auto"})
    }

    /// A recipe without exceptions from the defaults, changed by `change`, over the 20b cut to three layers of four experts.
    fn plan(experts: &str, mw: &str, mxfp4: bool, change: impl FnOnce(&mut Value)) -> Plan<'static> {
        let text = include_str!("../../../../tests/fixtures/configs/gpt-oss-20b.json");
        let mut config: Map<String, Value> = serde_json::from_str(text).unwrap();
        config.insert("num_hidden_layers".into(), 3.into());
        config.insert("num_local_experts".into(), 4.into());
        if !mxfp4 {
            config.remove("quantization_config");
        }
        let mut recipe = json!({
            "experts": layer(experts),
            "mw": layer(mw),
            "ignore": ["embed_tokens", "mlp.router", "lm_head"],
            "shard_size": 5_000_000_000u64,
        });
        change(&mut recipe);
        let recipe: Recipe = serde_json::from_value(recipe).unwrap();
        Plan::new(Path::new("m"), &config, recipe, None).unwrap()
    }

    fn sparse(recipe: &mut Value) {
        recipe["sparsity"] = json!({
            "algorithm": "wanda", "mask": "2:4", "sparsity": 0.5, "block_size": 128, "dampening_frac": 0.01,
            "targets": ["mlp.experts"],
        });
    }

    fn has(plan: &Plan, name: &str) -> bool {
        plan.tensors.iter().any(|t| t.spec.name == name)
    }

    fn loaders(plan: &Plan) -> usize {
        let loads =
            |r: &&crate::manifest::RuntimeReport| r.status == crate::manifest::Loads::Loads && r.runtime != "native";
        plan.preview().runtimes.iter().filter(loads).count()
    }

    const BASE: &str = "model.layers.1.mlp.experts";

    #[test]
    fn experts_of_mxfp4_alone_are_a_checkpoint_as_openai_publishes_it() {
        for source in [true, false] {
            let plan = plan("mxfp4", "keep", source, |_| {});
            for name in ["gate_up_proj_blocks", "gate_up_proj_scales", "gate_up_proj_bias", "down_proj_scales"] {
                assert!(has(&plan, &format!("{BASE}.{name}")), "{name}");
            }
            assert!(!plan.tensors.iter().any(|t| t.spec.name.contains("experts.0")));
            let config = plan.output_config();
            assert_eq!(config["quantization_config"]["quant_method"], "mxfp4");
            let not = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"];
            assert_eq!(config["quantization_config"]["modules_to_not_convert"], json!(not));
            assert!(!config.contains_key(crate::containers::openai::KEPT));
            assert_eq!((plan.layouts(), loaders(&plan)), ((ExpertLayout::Mxfp4, MainLayout::Dense), 2));
            assert_eq!(plan.layout_word(), "mxfp4");
        }
    }

    #[test]
    fn mxfp4_beside_modules_is_said_in_a_key_of_its_own_and_by_layer() {
        let plan = plan("mxfp4", "fp8", false, |recipe| {
            recipe["overrides"] = json!([{"targets": ["layers.1.mlp.experts.2"], "layer": layer("w4a16")}]);
        });
        assert!(
            has(&plan, "model.layers.0.mlp.experts.gate_up_proj_blocks")
                && !has(&plan, &format!("{BASE}.gate_up_proj_blocks"))
        );
        for name in
            ["0.gate_proj.weight_packed", "2.up_proj.weight_shape", "3.down_proj.weight_scale", "1.gate_proj.bias"]
        {
            assert!(has(&plan, &format!("{BASE}.{name}")), "{name}");
        }
        let config = plan.output_config();
        assert_eq!(config["quantization_config"]["format"], "mixed-precision");
        let said = [0, 1, 2].map(|l| crate::containers::openai::says_blocks(&config, l));
        assert_eq!(said, [true, false, true]);
        let Value::Object(quantization) = &config["quantization_config"] else { panic!("an object") };
        let of = |module: &str| crate::containers::compressed_tensors::config::lookup(quantization, module).unwrap();
        assert_eq!(of("model.layers.0.mlp.experts.2.gate_proj"), None);
        assert_eq!(of("model.layers.1.mlp.experts.1.gate_proj").unwrap().weights, MXFP4);
        assert_eq!(of("model.layers.1.mlp.experts.2.gate_proj").unwrap().weights.name(), "int4");
        assert_eq!(of("model.layers.2.self_attn.v_proj").unwrap().weights, FP8);
        assert_eq!(plan.layouts(), (ExpertLayout::PerExpert, MainLayout::CompressedTensors));
        assert_eq!(plan.layout_word(), "compressed-tensors+mxfp4");
    }

    #[test]
    fn experts_that_only_lose_numbers_are_the_fused_floats_that_transformers_loads() {
        for source in [true, false] {
            let plan = plan("dense", "keep", source, sparse);
            let fused = plan.tensors.iter().find(|t| t.spec.name == format!("{BASE}.gate_up_proj")).unwrap();
            assert_eq!(fused.spec.shape, [4, 2880, 5760]);
            assert!(has(&plan, &format!("{BASE}.down_proj")) && has(&plan, &format!("{BASE}.down_proj_bias")));
            let config = plan.output_config();
            assert!(!config.contains_key("quantization_config") && config["dtype"] == "bfloat16");
            assert_eq!((plan.layouts(), loaders(&plan)), ((ExpertLayout::Dense, MainLayout::Dense), 2));
            assert_eq!(plan.layout_word(), "bf16");
        }
    }

    #[test]
    fn floats_in_some_layers_and_blocks_in_others_are_said_by_layer() {
        let plan = plan("dense", "keep", true, |recipe| {
            sparse(recipe);
            recipe["sparsity"]["ignore"] = json!(["layers.0"]);
        });
        let config = plan.output_config();
        assert_eq!([0, 1, 2].map(|l| crate::containers::openai::says_blocks(&config, l)), [true, false, false]);
        assert_eq!(plan.layouts(), (ExpertLayout::Mixed, MainLayout::Dense));
        assert_eq!(loaders(&plan), 0);
    }
}
