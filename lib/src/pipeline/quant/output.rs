//! What a quantization says of itself: the output's config.json, the plan's manifest.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::{LinearJob, Plan};
use crate::checkpoint::layout::Layout;
use crate::containers::compressed_tensors::{Scheme, Strategy, config};
use crate::formats::float::Float;
use crate::manifest::{Job, Manifest, PlanReport, TensorReport};
use crate::model::{Class, Linear, Proj};
use crate::runtimes::{self, ExpertLayout, MainLayout};
use crate::verify::errors::Family;

/// Key in config.json that says which tensors were kept in another format than `quantization_config` speaks of.
pub const KEPT: &str = "gptoss_kept";

impl Plan<'_> {
    /// How the output stores experts and main weights.
    fn layouts(&self) -> (ExpertLayout, MainLayout) {
        let quantized = |class| self.treated.iter().any(|(l, t)| l.proj.class() == class && t.scheme.is_some());
        let experts = if (0..self.config.layers).any(|l| !self.experts_stay(l)) {
            ExpertLayout::PerExpert
        } else if self.mxfp4 {
            ExpertLayout::Mxfp4
        } else {
            ExpertLayout::Dense
        };
        (experts, if quantized(Class::Main) { MainLayout::CompressedTensors } else { MainLayout::Dense })
    }

    pub(super) fn keeps_mxfp4(&self) -> bool {
        self.mxfp4 && (0..self.config.layers).any(|l| self.experts_stay(l))
    }

    pub(super) fn output_config(&self) -> Map<String, Value> {
        let mut config = self.raw_config.clone();
        let mut ignore = self.unquantized.clone();
        let staying: Vec<usize> = (0..self.config.layers).filter(|&l| self.experts_stay(l)).collect();
        if staying.len() == self.config.layers {
            ignore.push(r"re:.*mlp\.experts.*".into());
        } else {
            ignore.extend(staying.iter().map(|l| format!(r"re:.*layers\.{l}\.mlp\.experts.*")));
        }
        let was = config.insert("quantization_config".into(), config::encode(&self.config_groups(), &ignore));
        if let (true, Some(was)) = (self.keeps_mxfp4(), was) {
            let kept = json!({
                "quant_method": "mxfp4",
                "tensors": ["model.layers.*.mlp.experts.*_blocks", "model.layers.*.mlp.experts.*_scales"],
                "modules_to_not_convert": was["modules_to_not_convert"],
            });
            config.insert(KEPT.into(), kept);
        }
        if !config.contains_key("dtype") && !config.contains_key("torch_dtype") {
            let float = self.jobs.first().map_or(Float::Bf16, |j| j.float);
            config.insert("dtype".into(), float.config_name().into());
        }
        config
    }

    /// Modules by scheme. A projection whose layers all have one scheme is named by one expression.
    fn config_groups(&self) -> Vec<(Scheme, Vec<String>)> {
        let mut by_proj: BTreeMap<Proj, Vec<(Linear, Scheme)>> = BTreeMap::new();
        for (linear, t) in &self.treated {
            if let Some(scheme) = t.scheme {
                by_proj.entry(linear.proj).or_default().push((*linear, scheme));
            }
        }
        let mut groups: Vec<(Scheme, Vec<String>)> = Vec::new();
        let mut add = |scheme: Scheme, target: String| match groups.iter_mut().find(|g| g.0 == scheme) {
            Some(g) => g.1.push(target),
            None => groups.push((scheme, vec![target])),
        };
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

    /// What the plan says without running: the manifest of a dry run.
    pub fn preview(&self) -> Manifest {
        let mut manifest = Manifest::new("gptoss-quant", Job::Quantize { recipe: self.recipe.clone() });
        let layout = Layout::new(self.tensors.clone(), self.recipe.shard_size);
        manifest.plan = Some(PlanReport {
            bytes: layout.total_bytes(),
            shards: layout.shard_count() as u64,
            tensors: self.tensors.len() as u64,
            weights_read: self.source.is_some(),
        });
        let mut families: BTreeMap<(usize, String), TensorReport> = BTreeMap::new();
        for job in &self.jobs {
            let (out, inp) = job.linear.shape(&self.config);
            let family = Family::of(&job.linear);
            let group = job.linear.layer + 1;
            let stored = stored_as(job);
            let line = families.entry((group, family.name())).or_insert_with(|| TensorReport {
                name: family.name(),
                tensors: 0,
                parameters: 0,
                stored,
                error: None,
            });
            line.tensors += 1;
            line.parameters += (out * inp) as u64;
        }
        let mut lines: Vec<(usize, TensorReport)> = families.into_iter().map(|((g, _), r)| (g, r)).collect();
        lines.extend(self.stays.iter().cloned());
        lines.sort_by(|a, b| (a.0, &a.1.name).cmp(&(b.0, &b.1.name)));
        manifest.tensors = lines.into_iter().map(|l| l.1).collect();
        self.say_what_matters(&mut manifest);
        manifest
    }

    pub(super) fn say_what_matters(&self, manifest: &mut Manifest) {
        manifest.notes.extend(self.recipe.notes.iter().cloned());
        let (experts, main) = self.layouts();
        manifest.runtimes = runtimes::report(experts, main);
        if self.keeps_mxfp4() {
            manifest.notes.push(format!(
                "the experts are kept as MXFP4 blocks and scales beside compressed-tensors modules; a runtime must read {KEPT} in config.json"
            ));
        }
    }
}

/// `int4 g64`, `int8 channel asymmetric`, `bfloat16`.
pub(super) fn stored_as(job: &LinearJob) -> String {
    let Some(s) = job.scheme else { return job.float.config_name().into() };
    let sharing = match s.strategy {
        Strategy::Group(n) => format!("g{n}"),
        Strategy::Channel => "channel".into(),
    };
    let zero = if s.weights.symmetric() { "" } else { " asymmetric" };
    format!("{} {sharing}{zero}", s.weights.name())
}
