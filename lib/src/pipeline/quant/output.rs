//! What a quantization says of itself: the output's config.json, the plan's manifest.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::linears::Experts;
use super::{LinearJob, Plan};
use crate::containers::compressed_tensors::{Scheme, Strategy, config};
use crate::containers::openai::{KEPT, experts_module, kept_name};
use crate::containers::vllm::{self, Kind};
use crate::formats::float::Float;
use crate::formats::{MXFP4, NumberFormat};
use crate::manifest::{Job, Manifest, PlanReport, TensorReport};
use crate::model::gguf::TOKENS;
use crate::model::{self, Class, Linear, ModelConfig, Proj, Role, Slot};
use crate::recipe::{Container, Treatment};
use crate::runtimes::{self, ExpertLayout, Facts, Feature, MainLayout, Runtime};
use crate::verify::errors::Family;

/// What the published checkpoints do not convert.
const NOT_CONVERTED: [&str; 4] =
    ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"];

impl Plan<'_> {
    /// True where a layer's experts are MXFP4 blocks in the output.
    fn has_blocks(&self, layer: usize) -> bool {
        !self.is_gguf()
            && match self.experts[layer] {
                Experts::Native => true,
                Experts::Stay => self.mxfp4,
                Experts::Fused | Experts::Modules | Experts::Vllm(_) => false,
            }
    }

    /// How the output stores experts and main weights.
    pub(super) fn layouts(&self) -> (ExpertLayout, MainLayout) {
        if self.is_gguf() {
            return (ExpertLayout::Gguf, MainLayout::Dense);
        }
        let main = self.treated.keys().any(|l| l.proj.class() == Class::Main && self.coded(l).is_some());
        let main = if main { MainLayout::CompressedTensors } else { MainLayout::Dense };
        match self.recipe.container.vllm() {
            Some(Kind::Int) => return (ExpertLayout::VllmInt, main),
            Some(Kind::Fp8) => return (ExpertLayout::VllmFp8, main),
            None => {}
        }
        let blocks = (0..self.config.layers).filter(|&l| self.has_blocks(l)).count();
        let experts = if self.experts.contains(&Experts::Modules) {
            ExpertLayout::PerExpert
        } else if blocks == self.config.layers {
            ExpertLayout::Mxfp4
        } else if blocks == 0 {
            ExpertLayout::Dense
        } else {
            ExpertLayout::Mixed
        };
        (experts, main)
    }

    /// What runtimes look at.
    pub fn facts(&self) -> Facts {
        let (experts, main) = self.layouts();
        let coded =
            self.treated.keys().filter(|l| l.proj.class() == Class::Main).filter_map(|l| self.coded(l)?.stored());
        let mut formats: Vec<_> = coded.collect();
        formats.sort();
        formats.dedup();
        let eps = runtimes::eps(&self.raw_config);
        let gates =
            (0..self.config.layers).filter_map(|layer| self.coded(&Linear { proj: Proj::Gate, layer, expert: 0 }));
        let features = Feature::of(&self.config, |l| self.coded(l).filter(|s| s.stored().is_some()));
        let (groups, hidden) = (runtimes::groups(gates), self.config.hidden);
        Facts { experts, main, formats, features, groups, hidden, eps }
    }

    /// Bytes of the output's tensors.
    pub(super) fn bytes(&self) -> u64 {
        self.layout().total_bytes()
    }

    /// Over how many GPUs, of 1, 2, 4 and 8, vLLM can cut the layers (tensor parallelism): each GPU keeps whole heads, and whole groups of a
    /// scale in the layers whose columns are cut, which are o_proj and down of the experts. vLLM's own `create_weights` and Marlin's check were
    /// seen to decide so for int4 experts under its names; the rest follows by the same arithmetic. Of MXFP4 experts nothing is asked: no such
    /// run was seen.
    pub fn tensor_parallel(&self) -> Vec<usize> {
        let ModelConfig { heads, head_dim, intermediate, .. } = self.config;
        let whole = |proj: Proj, columns: usize, gpus: usize| {
            (0..self.config.layers).all(|layer| match self.coded(&Linear { proj, layer, expert: 0 }) {
                Some(Scheme { strategy: Strategy::Group(n) | Strategy::Block(_, n), .. }) => {
                    columns.is_multiple_of(gpus) && (columns / gpus).is_multiple_of(n)
                }
                Some(_) => columns.is_multiple_of(gpus),
                None => true,
            })
        };
        let serves = |&gpus: &usize| {
            let experts = match self.layouts().0 {
                ExpertLayout::Mxfp4 | ExpertLayout::Mixed => true,
                _ => intermediate.is_multiple_of(gpus) && whole(Proj::Down, intermediate, gpus),
            };
            heads_serve(&self.config, gpus) && whole(Proj::O, heads * head_dim, gpus) && experts
        };
        [1, 2, 4, 8].into_iter().filter(serves).collect()
    }

    /// The output's layout in a word.
    pub(super) fn layout_word(&self) -> String {
        if self.is_gguf() || self.recipe.container.vllm().is_some() {
            return self.recipe.container.name().into();
        }
        let blocks = (0..self.config.layers).any(|l| self.has_blocks(l));
        match (self.config_groups().is_empty(), blocks) {
            (false, false) => "compressed-tensors".into(),
            (false, true) => "compressed-tensors+mxfp4".into(),
            (true, true) => "mxfp4".into(),
            (true, false) => match self.jobs.first().map_or(Float::Bf16, |j| j.store.float) {
                Float::Bf16 => "bf16".into(),
                Float::F16 => "fp16".into(),
                Float::F32 => "fp32".into(),
            },
        }
    }

    pub(super) fn output_config(&self) -> Map<String, Value> {
        let mut config = self.raw_config.clone();
        // The key keeps its place where the source has it.
        let was = config.get("quantization_config").cloned();
        let groups = self.config_groups();
        let blocks: Vec<usize> = (0..self.config.layers).filter(|&l| self.has_blocks(l)).collect();
        if self.recipe.container.vllm() == Some(Kind::Fp8) {
            config.insert("quantization_config".into(), vllm::quark_config());
        } else if !groups.is_empty() {
            config.insert("quantization_config".into(), config::encode(&groups, &self.ignored()));
            if !blocks.is_empty() {
                config.insert(KEPT.into(), self.kept(&blocks, was.as_ref()));
            }
        } else if !blocks.is_empty() {
            config.insert("quantization_config".into(), self.openai_config(was));
        } else {
            config.shift_remove("quantization_config");
        }
        let halves = |t: &Treatment| t.scheme.is_some_and(|s| s.weights == NumberFormat::Half(Float::F16));
        if !self.treated.is_empty() && self.treated.values().all(halves) {
            config.shift_remove("torch_dtype");
            config.insert("dtype".into(), Float::F16.config_name().into());
        }
        if !config.contains_key("dtype") && !config.contains_key("torch_dtype") {
            let float = self.jobs.first().map_or(Float::Bf16, |j| j.float);
            config.insert("dtype".into(), float.config_name().into());
        }
        config
    }

    /// What compressed-tensors must leave alone: single modules, and the experts of layers that have none.
    fn ignored(&self) -> Vec<String> {
        let mut ignored = self.unquantized.clone();
        let is_fused = |l: &usize| !matches!(self.experts[*l], Experts::Modules | Experts::Vllm(_));
        let fused: Vec<usize> = (0..self.config.layers).filter(is_fused).collect();
        if fused.len() == self.config.layers {
            ignored.push(r"re:.*mlp\.experts.*".into());
        } else {
            ignored.extend(fused.iter().map(|l| format!(r"re:.*layers\.{l}\.mlp\.experts.*")));
        }
        ignored
    }

    /// What is said of MXFP4 blocks beside compressed-tensors modules.
    fn kept(&self, blocks: &[usize], was: Option<&Value>) -> Value {
        let layers: Vec<String> = match blocks.len() == self.config.layers {
            true => vec!["*".into()],
            false => blocks.iter().map(usize::to_string).collect(),
        };
        let tensors: Vec<String> = layers.iter().flat_map(|l| ["blocks", "scales"].map(|t| kept_name(l, t))).collect();
        let not = was.map_or_else(|| NOT_CONVERTED.into(), |was| was["modules_to_not_convert"].clone());
        json!({"quant_method": "mxfp4", "tensors": tensors, "modules_to_not_convert": not})
    }

    /// OpenAI's own `quantization_config`: the source's, or what the published checkpoints have.
    fn openai_config(&self, was: Option<Value>) -> Value {
        let mut ours = was.unwrap_or_else(|| json!({"modules_to_not_convert": NOT_CONVERTED, "quant_method": "mxfp4"}));
        let floats = (0..self.config.layers).filter(|&l| !self.has_blocks(l)).map(experts_module);
        if let Some(list) = ours["modules_to_not_convert"].as_array_mut() {
            list.extend(floats.map(Value::from));
        }
        ours
    }

    /// Experts under vLLM's names: one expression, or one a layer.
    fn vllm_groups(&self) -> Vec<(Scheme, String)> {
        if self.recipe.container.vllm() != Some(Kind::Int) {
            return Vec::new();
        }
        let of = |layer| self.coded(&Linear { proj: Proj::Gate, layer, expert: 0 }).expect("the plan has looked at it");
        let schemes: Vec<Scheme> = (0..self.config.layers).map(of).collect();
        match schemes.iter().all(|s| *s == schemes[0]) {
            true => vec![(schemes[0], vllm::target(None))],
            false => schemes.into_iter().enumerate().map(|(l, s)| (s, vllm::target(Some(l)))).collect(),
        }
    }

    /// Modules by scheme. A projection whose layers all have one scheme is named by one expression.
    fn config_groups(&self) -> Vec<(Scheme, Vec<String>)> {
        let mut by_proj: BTreeMap<Proj, Vec<(Linear, Scheme)>> = BTreeMap::new();
        for linear in self.treated.keys() {
            // Experts in OpenAI's own layout are no modules of this container.
            let own = |l: usize| matches!(self.experts[l], Experts::Native | Experts::Vllm(_));
            let native = linear.proj.class() == Class::Experts && own(linear.layer);
            if let Some(scheme) = self.coded(linear).filter(|_| !native) {
                by_proj.entry(linear.proj).or_default().push((*linear, scheme));
            }
        }
        let mut groups: Vec<(Scheme, Vec<String>)> = Vec::new();
        let mut add = |scheme: Scheme, target: String| match groups.iter_mut().find(|g| g.0 == scheme) {
            Some(g) => g.1.push(target),
            None => groups.push((scheme, vec![target])),
        };
        for (scheme, target) in self.vllm_groups() {
            add(scheme, target);
        }
        for (proj, linears) in by_proj {
            let first = linears[0].1;
            if linears.iter().all(|l| l.1 == first) {
                add(first, config::target(proj));
            } else {
                linears.iter().for_each(|(linear, scheme)| add(*scheme, linear.module()));
            }
        }
        groups
    }

    /// One line a family and way of being stored, of the jobs that `takes` takes, with its group.
    fn families(&self, takes: impl Fn(&LinearJob) -> bool) -> Vec<(usize, TensorReport)> {
        let mut families: BTreeMap<(usize, String, String), TensorReport> = BTreeMap::new();
        for job in self.jobs.iter().filter(|j| takes(j)) {
            let (out, inp) = job.linear.shape(&self.config);
            let family = Family::of(&job.linear);
            let group = job.linear.layer + 1;
            let stored = stored_as(job);
            let line = families.entry((group, family.name(), stored.clone())).or_insert_with(|| TensorReport {
                name: family.name(),
                tensors: 0,
                parameters: 0,
                stored,
                error: None,
            });
            line.tensors += 1;
            line.parameters += (out * inp) as u64;
        }
        families.into_iter().map(|((g, ..), r)| (g, r)).collect()
    }

    /// Notes what keeps its codes as what stays: nobody measures it.
    pub(super) fn tell_kept(&mut self) {
        let kept = self.families(|job| job.kept && self.treated.contains_key(&job.linear));
        self.stays.extend(kept);
    }

    /// What the plan says without running: the manifest of a dry run.
    pub fn preview(&self) -> Manifest {
        let mut manifest = Manifest::new("gptoss-quant", Job::Quantize { recipe: self.recipe.clone() });
        let layout = self.layout();
        manifest.plan = Some(PlanReport {
            bytes: layout.total_bytes(),
            shards: layout.shard_count() as u64,
            tensors: self.tensors.len() as u64,
            weights_read: self.source.is_some(),
        });
        // What stays is in a list of its own.
        let told: BTreeSet<&str> = self.stays.iter().map(|s| s.1.name.as_str()).collect();
        let is_told = |l: &Linear| {
            let fused = l.proj.fused().map(|f| f.name(l.layer));
            told.contains(&*format!("{}.weight", l.module())) || fused.is_some_and(|f| told.contains(&*f))
        };
        let mut lines = self.families(|job| !job.kept && !is_told(&job.linear));
        lines.extend(self.stays.iter().cloned());
        lines.sort_by(|a, b| (a.0, &a.1.name).cmp(&(b.0, &b.1.name)));
        manifest.tensors = lines.into_iter().map(|l| l.1).collect();
        self.say_what_matters(&mut manifest);
        manifest
    }

    pub(super) fn say_what_matters(&self, manifest: &mut Manifest) {
        manifest.notes.extend(self.recipe.notes.iter().cloned());
        manifest.runtimes = runtimes::report(&self.facts());
        manifest.notes.extend(self.not_smoothed());
        if self.recipe.container == Container::Dense && self.recipe.rounds_inputs() {
            manifest
                .notes
                .push("floats say nothing of inputs: no runtime rounds them, as the schemes would have it".into());
        }
        if self.recipe.keep_codes {
            manifest.notes.push("codes and scales are the source's own; nothing was rounded".into());
        }
        let same = |(l, t): (&Linear, &Treatment)| {
            let native = l.proj.class() == Class::Experts && t.scheme.is_some_and(|s| s.weights == MXFP4);
            native && t.sparse.is_none() && !self.smooths(l.layer, Class::Experts)
        };
        if self.mxfp4 && self.recipe.target_size.is_none() && self.treated.iter().any(same) {
            manifest.notes.push(
                "MXFP4 experts are fitted to MXFP4 with nothing in front (zeros, smoothing), which gives the values that they \
                 have; the scheme keep copies them without a calibration"
                    .into(),
            );
        }
        if self.is_gguf() && self.metadata.iter().all(|(key, _)| key != TOKENS) {
            manifest
                .notes
                .push("planned from a config alone: the size is without the tokenizer, which a run needs".into());
        }
        if self.recipe.pad_to.is_some() {
            manifest.notes.push(self.said_of_padding());
        }
        let coded = self.recipe.container.vllm().is_some() || self.layouts().1 == MainLayout::CompressedTensors;
        if coded && runtimes::refusal(Runtime::Vllm, &self.facts()).is_none() {
            manifest.notes.push(match &self.tensor_parallel()[..] {
                [1, 2, 4, 8] => "vLLM can cut it over 1, 2, 4 and 8 GPUs (tensor parallelism)".into(),
                sizes => {
                    let more = [2, 4, 8].iter().any(|gpus| !sizes.contains(gpus) && heads_serve(&self.config, *gpus));
                    let more = if more { "; --tensor-parallel chooses groups or padding for more" } else { "" };
                    match sizes {
                        [1] => format!("vLLM can run it on one GPU alone{more}"),
                        sizes => format!("vLLM can cut it over {} GPUs (tensor parallelism){more}", list(sizes)),
                    }
                }
            });
        }
        let (size, source) = (self.layout().total_bytes(), self.source_bytes());
        if size >= source {
            manifest.notes.push(format!(
                "the output is not smaller than its source: {size} bytes of weights, the source has {source}"
            ));
        }
        if self.layout_word() == "compressed-tensors+mxfp4" {
            manifest.notes.push(format!(
                "experts are MXFP4 blocks and scales beside compressed-tensors modules; a runtime must read {KEPT} in config.json"
            ));
        }
        manifest.notes.extend(runtimes::nowhere(&self.facts()));
    }
}

impl Plan<'_> {
    /// Bytes of the source's shards; where only a config is there, of the tensors that it implies.
    fn source_bytes(&self) -> u64 {
        if let Some(source) = self.source {
            return source.shards.iter().map(|s| s.bytes().len() as u64).sum();
        }
        let narrow = self.padding.map(|p| p.narrow(&self.config));
        let config = narrow.as_ref().unwrap_or(&self.config);
        let bytes = |slot: &Slot| match slot.role {
            Role::Experts(fused, layer) if self.mxfp4 => {
                model::mxfp4_specs(fused, layer, config).iter().map(|s| s.byte_len()).sum()
            }
            _ => 2 * slot.shape.iter().product::<usize>(),
        };
        model::slots(config).iter().map(|s| bytes(s) as u64).sum()
    }

    fn said_of_padding(&self) -> String {
        let (h, i) = (self.config.hidden, self.config.intermediate);
        match self.padding {
            None => format!("hidden size {h} and intermediate size {i} are multiples of --pad-to already"),
            Some(p) if p.hidden.0 == p.hidden.1 => {
                format!("intermediate size is padded from {} to {i}", p.intermediate.0)
            }
            Some(p) => format!(
                "hidden size is padded from {} to {h}, intermediate size from {} to {i}; norms' weights are F32, and a runtime \
                 that rounds them to BF16 changes outputs by a little",
                p.hidden.0, p.intermediate.0
            ),
        }
    }
}

/// `int4 g64`, `int8 channel asymmetric`, `mxfp4`, `bfloat16`.
pub(super) fn stored_as(job: &LinearJob) -> String {
    let Some(s) = job.scheme else { return job.float.config_name().into() };
    if matches!(s.weights, NumberFormat::Half(_)) {
        return job.store.float.config_name().into();
    }
    if !job.store.takes_codes() {
        return format!("{} of {}", job.float.config_name(), s.weights.name());
    }
    if matches!(s.weights, NumberFormat::Mx(_) | NumberFormat::Nvfp4 | NumberFormat::Ggml(_)) {
        return s.weights.name();
    }
    let sharing = match s.strategy {
        Strategy::Group(n) => format!("g{n}"),
        Strategy::Channel => "channel".into(),
        Strategy::Tensor => "tensor".into(),
        Strategy::Block(rows, columns) => format!("block {rows}x{columns}"),
    };
    let zero = if s.weights.symmetric() { "" } else { " asymmetric" };
    format!("{} {sharing}{zero}", s.weights.name())
}

/// `1, 2 and 4`.
pub(super) fn list(numbers: &[usize]) -> String {
    let words: Vec<String> = numbers.iter().map(ToString::to_string).collect();
    match words.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} and {last}", rest.join(", ")),
        Some((last, _)) => last.clone(),
        None => "none".into(),
    }
}

/// Whether so many GPUs can have whole heads each, or share a key head, as vLLM shares them.
pub(super) fn heads_serve(config: &ModelConfig, gpus: usize) -> bool {
    let (heads, kv) = (config.heads, config.kv_heads);
    heads.is_multiple_of(gpus) && (kv.is_multiple_of(gpus) || gpus.is_multiple_of(kv))
}
