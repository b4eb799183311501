//! Which runtime loads what. The rules are data ([`rules`]): each line names a runtime, what it speaks of, why, and where that
//! was read.

mod rules;

use std::collections::BTreeSet;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::checkpoint::source::Checkpoint;
use crate::containers::compressed_tensors::{Format, Scheme, Strategy, config::scheme_of};
use crate::containers::openai::says_blocks;
use crate::containers::vllm;
use crate::error::{Error, Result};
use crate::formats::activations::Activations;
use crate::formats::{FP8, NumberFormat};
use crate::manifest::{Loads, RuntimeReport};
use crate::model::{Class, EPS, Fused, Linear, ModelConfig, Proj, linears, mxfp4_specs};
use crate::recipe::Container;

/// How the two classes of weights are stored, as far as runtimes care.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpertLayout {
    /// OpenAI's blocks and scales.
    Mxfp4,
    /// Fused plain floats.
    Dense,
    /// OpenAI's blocks in some layers, fused floats in others.
    Mixed,
    /// compressed-tensors, a module an expert.
    PerExpert,
    /// A GGUF file.
    Gguf,
    /// Integers under vLLM's names.
    VllmInt,
    /// FP8 under vLLM's names.
    VllmFp8,
}

/// How the other weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MainLayout {
    /// Plain floats.
    Dense,
    /// compressed-tensors.
    CompressedTensors,
}

use ExpertLayout::{Dense as DenseExperts, Mixed, Mxfp4, PerExpert, VllmFp8, VllmInt};

/// Programs that run a gpt-oss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Runtime {
    /// vLLM.
    #[serde(rename = "vllm")]
    Vllm,
    /// Hugging Face transformers.
    #[serde(rename = "transformers")]
    Transformers,
    /// llama.cpp.
    #[serde(rename = "llama.cpp")]
    LlamaCpp,
    /// gptoss-run.
    #[serde(rename = "native")]
    Native,
}

impl Runtime {
    /// All of them, in the order in which they are reported.
    pub const ALL: [Self; 4] = [Self::Vllm, Self::Transformers, Self::LlamaCpp, Self::Native];

    /// As the command line and manifests spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vllm => "vllm",
            Self::Transformers => "transformers",
            Self::LlamaCpp => "llama.cpp",
            Self::Native => "native",
        }
    }

    /// The containers that may hold something for it, the preferred ones first.
    pub fn containers(self) -> &'static [Container] {
        use Container::{CompressedTensors, Dense, Gguf, VllmFp8, VllmInt};
        match self {
            Self::Vllm => &[CompressedTensors, VllmInt, VllmFp8],
            Self::Transformers => &[CompressedTensors],
            Self::LlamaCpp => &[Gguf],
            Self::Native => &[CompressedTensors, Gguf, Dense],
        }
    }
}

impl FromStr for Runtime {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let names: Vec<&str> = Self::ALL.iter().map(|r| r.name()).collect();
        let found = Self::ALL.into_iter().find(|r| r.name() == s);
        found.ok_or_else(|| Error::Refused(format!("there is no runtime {s:?}; there are {}", names.join(", "))))
    }
}

/// What runtimes look at in a checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    /// The experts.
    pub experts: ExpertLayout,
    /// The other weights.
    pub main: MainLayout,
    /// compressed-tensors' formats among the other weights.
    pub formats: Vec<Format>,
    /// What stands out.
    pub features: BTreeSet<Feature>,
    /// Group sizes of int4 experts.
    pub groups: Vec<usize>,
    /// hidden_size.
    pub hidden: usize,
    /// rms_norm_eps.
    pub eps: f64,
}

/// What a checkpoint may have that runtimes mind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Feature {
    /// The embedding is stored as codes.
    CodedEmbedding,
    /// The output head is.
    CodedHead,
    /// A router is.
    CodedRouter,
    /// FP8 weights beside floating inputs, with a scale for each group of columns.
    Fp8InGroups,
    /// int4 weights beside FP8 inputs.
    Int4Fp8,
    /// q, k and v of a layer, which some fuse, do not have one scheme.
    UnequalQkv,
    /// FP8 experts, a module each.
    Fp8Modules,
    /// config.json announces MXFP4 experts that are not there.
    AnnouncedBlocks,
}

impl Feature {
    /// Those of a model whose linear layers are stored as `coded` says; `None` for floats.
    pub fn of(config: &ModelConfig, coded: impl Fn(&Linear) -> Option<Scheme>) -> BTreeSet<Self> {
        let mut found = BTreeSet::new();
        let one = |proj, layer| coded(&Linear { proj, layer, expert: 0 });
        let mut add = |is: bool, feature: Self| {
            if is {
                found.insert(feature);
            }
        };
        add(one(Proj::Embed, 0).is_some(), Self::CodedEmbedding);
        add(one(Proj::LmHead, 0).is_some(), Self::CodedHead);
        for layer in 0..config.layers {
            add(one(Proj::Router, layer).is_some(), Self::CodedRouter);
            let [q, k, v, o] = [Proj::Q, Proj::K, Proj::V, Proj::O].map(|proj| one(proj, layer));
            add(q != k || k != v, Self::UnequalQkv);
            for scheme in [q, k, v, o].into_iter().flatten() {
                let fp8_inputs =
                    matches!(scheme.activations, Activations::DynamicTokenFp8 | Activations::DynamicGroupFp8);
                let int4 = matches!(scheme.weights, NumberFormat::Int(int) if int.num_bits == 4);
                add(int4 && (fp8_inputs || scheme.activations == Activations::StaticFp8), Self::Int4Fp8);
                let alone = scheme.weights == FP8 && scheme.activations == Activations::Float;
                add(alone && matches!(scheme.strategy, Strategy::Group(_)), Self::Fp8InGroups);
            }
            add(one(Proj::Gate, layer).is_some_and(|s| s.weights == FP8), Self::Fp8Modules);
        }
        found
    }
}

/// What must be so for a rule to speak.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Condition {
    /// The experts are stored so.
    Experts(ExpertLayout),
    /// The other weights are stored so.
    Main(MainLayout),
    /// Some of the other weights have this format.
    MainIs(Format),
    /// This stands out.
    Has(Feature),
    /// Some int4 experts have groups of this size.
    GroupsAre(usize),
    /// This does not divide hidden_size.
    HiddenIsNoMultiple(usize),
    /// rms_norm_eps is another number.
    EpsIsNot(f64),
}

impl Condition {
    fn holds(&self, facts: &Facts) -> bool {
        match *self {
            Self::Experts(layout) => facts.experts == layout,
            Self::Main(layout) => facts.main == layout,
            Self::MainIs(format) => facts.formats.contains(&format),
            Self::Has(feature) => facts.features.contains(&feature),
            Self::GroupsAre(n) => facts.groups.contains(&n),
            Self::HiddenIsNoMultiple(n) => !facts.hidden.is_multiple_of(n),
            Self::EpsIsNot(eps) => (facts.eps / eps - 1.0).abs() > 1e-6,
        }
    }
}

/// One line of the table.
struct Rule {
    runtime: Runtime,
    when: &'static [Condition],
    status: Loads,
    reason: &'static str,
    source: &'static str,
    /// The nearest that would load.
    instead: &'static str,
}

/// What is added to a rule's reason.
struct Remark {
    runtime: Runtime,
    when: &'static [Condition],
    text: &'static str,
}

/// How a checkpoint, whoever wrote it, stores its weights.
///
/// # Errors
/// [`Error::MissingTensor`] where a layer's experts are in no layout that is known.
pub fn facts(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<Facts> {
    let eps = eps(&checkpoint.config);
    let mut formats = Vec::new();
    for linear in linears(config).filter(|l| l.proj.class() == Class::Main) {
        let module = linear.module();
        if checkpoint.get(&format!("{module}.weight_scale")).is_some()
            && let Some(format) = scheme_of(checkpoint, &module)?.and_then(|s| s.stored())
            && !formats.contains(&format)
        {
            formats.push(format);
        }
    }
    let coded = |linear: &Linear| {
        let module = linear.module();
        checkpoint.get(&format!("{module}.weight_scale"))?;
        scheme_of(checkpoint, &module).ok().flatten()
    };
    let mut features = Feature::of(config, coded);
    let (experts, main) = layouts(checkpoint, config)?;
    let mut schemes = Vec::new();
    for layer in 0..config.layers {
        schemes.extend(scheme_of(checkpoint, &Linear { proj: Proj::Gate, layer, expert: 0 }.module())?);
    }
    let groups = groups(schemes.into_iter());
    let announced = (0..config.layers).any(|layer| says_blocks(&checkpoint.config, layer));
    if announced && !matches!(experts, Mxfp4 | Mixed) {
        features.insert(Feature::AnnouncedBlocks);
    }
    Ok(Facts { experts, main, formats, features, groups, hidden: config.hidden, eps })
}

/// rms_norm_eps of a `config.json`, or what a gpt-oss has that does not say.
pub fn eps(config: &Map<String, Value>) -> f64 {
    config.get("rms_norm_eps").and_then(Value::as_f64).unwrap_or(EPS)
}

/// The group sizes of those among `schemes` that are int4.
pub fn groups(schemes: impl Iterator<Item = Scheme>) -> Vec<usize> {
    let of = |s: Scheme| match (s.weights, s.strategy) {
        (NumberFormat::Int(int), Strategy::Group(n)) if int.num_bits == 4 => Some(n),
        _ => None,
    };
    let mut groups: Vec<usize> = schemes.filter_map(of).collect();
    groups.sort_unstable();
    groups.dedup();
    groups
}

fn layouts(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<(ExpertLayout, MainLayout)> {
    if checkpoint.is_gguf() {
        return Ok((ExpertLayout::Gguf, MainLayout::Dense));
    }
    let has = |name: &str| checkpoint.get(name).is_some();
    let mut experts = Vec::new();
    for layer in 0..config.layers {
        let [blocks, fused] = [mxfp4_specs(Fused::GateUp, layer, config)[0].name.clone(), Fused::GateUp.name(layer)];
        let module = Linear { proj: Proj::Gate, layer, expert: 0 }.module();
        let one = ["weight", "weight_packed"].iter().any(|w| has(&format!("{module}.{w}")));
        let vllm = match vllm::kind_of(checkpoint, layer) {
            Some(vllm::Kind::Int) => Some(VllmInt),
            Some(vllm::Kind::Fp8) => Some(VllmFp8),
            None => None,
        };
        experts.push(match (has(&blocks), has(&fused), one) {
            _ if vllm.is_some() => vllm.expect("it was just looked at"),
            (true, ..) => Mxfp4,
            (_, true, _) => DenseExperts,
            (_, _, true) => PerExpert,
            _ => {
                return Err(Error::MissingTensor {
                    dir: checkpoint.dir.clone(),
                    tensor: blocks,
                    reason: "the experts are in no layout that is known".into(),
                });
            }
        });
    }
    let experts = match experts.first() {
        _ if experts.contains(&PerExpert) => PerExpert,
        Some(&first) if experts.iter().all(|e| *e == first) => first,
        _ => Mixed,
    };
    let quantized =
        linears(config).filter(|l| l.proj.class() == Class::Main).any(|l| has(&format!("{}.weight_scale", l.module())));
    Ok((experts, if quantized { MainLayout::CompressedTensors } else { MainLayout::Dense }))
}

/// The rule that decides for a runtime.
fn deciding(runtime: Runtime, facts: &Facts) -> &'static Rule {
    let holds = |r: &&Rule| r.runtime == runtime && r.when.iter().all(|c| c.holds(facts));
    rules::RULES.iter().find(holds).expect("a runtime's last rule has no conditions")
}

/// What each runtime does with a checkpoint of which this is known.
pub fn report(facts: &Facts) -> Vec<RuntimeReport> {
    let one = |runtime: Runtime| {
        let rule = deciding(runtime, facts);
        let mut reason = rule.reason.to_owned();
        let remarks = rules::REMARKS.iter().filter(|r| r.runtime == runtime && rule.status == Loads::Loads);
        for remark in remarks.filter(|r| r.when.iter().all(|c| c.holds(facts))) {
            reason = format!("{reason}; {}", remark.text);
        }
        RuntimeReport { runtime: runtime.name().into(), status: rule.status, reason, source: rule.source.into() }
    };
    Runtime::ALL.map(one).to_vec()
}

/// The report of a checkpoint that is not whole: no runtime loads it.
pub fn none_loads(obstacle: &str) -> Vec<RuntimeReport> {
    let one = |runtime: Runtime| RuntimeReport {
        runtime: runtime.name().into(),
        status: Loads::DoesNotLoad,
        reason: format!("the checkpoint is not whole, or not one that this tool knows: {obstacle}"),
        source: "gptoss-verify check".into(),
    };
    Runtime::ALL.map(one).to_vec()
}

/// What to say where no runtime but this project's own loads it; `None` where one does.
pub fn nowhere(facts: &Facts) -> Option<String> {
    let public = Runtime::ALL.into_iter().filter(|r| *r != Runtime::Native);
    if public.into_iter().any(|r| refusal(r, facts).is_none()) {
        return None;
    }
    let nearest = deciding(Runtime::Vllm, facts).instead;
    Some(format!(
        "no public runtime loads this output: neither vLLM nor transformers nor llama.cpp; what comes nearest and loads in \
         vLLM: {nearest}"
    ))
}

/// Why a runtime does not load it, and what comes nearest that it would; `None` where it does.
pub fn refusal(runtime: Runtime, facts: &Facts) -> Option<String> {
    let rule = deciding(runtime, facts);
    (rule.status != Loads::Loads).then(|| format!("{} ({}); nearest: {}", rule.reason, rule.source, rule.instead))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(experts: ExpertLayout, main: MainLayout, hidden: usize) -> Facts {
        let features = BTreeSet::new();
        Facts { experts, main, formats: Vec::new(), features, groups: Vec::new(), hidden, eps: 1e-5 }
    }

    fn statuses(facts: &Facts) -> Vec<Loads> {
        report(facts).into_iter().map(|r| r.status).collect()
    }

    const FEATURES: [Option<Feature>; 9] = [
        None,
        Some(Feature::CodedEmbedding),
        Some(Feature::CodedHead),
        Some(Feature::CodedRouter),
        Some(Feature::Fp8InGroups),
        Some(Feature::Int4Fp8),
        Some(Feature::UnequalQkv),
        Some(Feature::Fp8Modules),
        Some(Feature::AnnouncedBlocks),
    ];

    fn with(feature: Feature, facts: Facts) -> Facts {
        Facts { features: BTreeSet::from([feature]), ..facts }
    }

    const LAYOUTS: [ExpertLayout; 7] = [Mxfp4, DenseExperts, Mixed, PerExpert, ExpertLayout::Gguf, VllmInt, VllmFp8];

    #[test]
    fn every_layout_is_decided_for_every_runtime_and_every_rule_decides_something() {
        let mut used = vec![false; rules::RULES.len()];
        for experts in LAYOUTS {
            for main in [MainLayout::Dense, MainLayout::CompressedTensors] {
                let of = |format| (2944, vec![format]);
                let odd = [Format::Mxfp6, Format::Ternary, Format::TernaryBase3].map(of);
                for (hidden, formats) in [(2880, vec![]), (2944, vec![])].into_iter().chain(odd) {
                    for (feature, runtime) in Runtime::ALL.into_iter().flat_map(|r| FEATURES.map(|f| (f, r))) {
                        let features = feature.into_iter().collect();
                        let facts = Facts { formats: formats.clone(), features, ..facts(experts, main, hidden) };
                        assert_eq!(report(&facts).len(), Runtime::ALL.len());
                        let rule = deciding(runtime, &facts);
                        let at = rules::RULES.iter().position(|r| std::ptr::eq(r, rule)).unwrap();
                        used[at] = true;
                        assert_eq!(rule.instead.is_empty(), rule.status == Loads::Loads, "{}", rule.reason);
                    }
                }
            }
        }
        for (rule, used) in rules::RULES.iter().zip(used) {
            assert!(used, "{}: {} is never reached", rule.runtime.name(), rule.reason);
        }
    }

    #[test]
    fn widths_and_schemes_decide() {
        use Loads::{DoesNotLoad, Loads as Good, LoadsWrongly};
        let coded = MainLayout::CompressedTensors;
        // vllm, transformers, llama.cpp, native.
        let no = DoesNotLoad;
        assert_eq!(statuses(&facts(VllmInt, coded, 2944)), [Good, no, no, Good]);
        assert_eq!(statuses(&facts(VllmInt, coded, 2880)), [LoadsWrongly, no, no, Good]);
        assert_eq!(statuses(&facts(VllmFp8, MainLayout::Dense, 2880)), [Good, no, no, Good]);
        assert_eq!(statuses(&facts(VllmFp8, coded, 2880)), [no, no, no, Good]);
        assert_eq!(statuses(&facts(Mxfp4, MainLayout::Dense, 2880)), [Good, Good, no, Good]);
        assert_eq!(statuses(&facts(Mxfp4, coded, 2880)), [no, LoadsWrongly, no, Good]);
        assert_eq!(statuses(&facts(DenseExperts, coded, 2880)), [Good, Good, no, Good]);
        assert_eq!(statuses(&facts(PerExpert, coded, 2880)), [LoadsWrongly, LoadsWrongly, no, Good]);
        assert_eq!(statuses(&facts(ExpertLayout::Gguf, MainLayout::Dense, 2880))[2..], [Good, Good]);
        // As vLLM 0.32 does it on a CPU.
        for (feature, vllm, transformers) in [
            (Feature::CodedEmbedding, LoadsWrongly, no),
            (Feature::CodedHead, no, Good),
            (Feature::CodedRouter, LoadsWrongly, LoadsWrongly),
            (Feature::Fp8InGroups, no, Good),
            (Feature::Int4Fp8, no, Good),
            (Feature::UnequalQkv, no, Good),
        ] {
            let facts = with(feature, facts(DenseExperts, coded, 2880));
            assert_eq!(statuses(&facts), [vllm, transformers, no, Good], "{feature:?}");
        }
        assert_eq!(statuses(&with(Feature::Fp8Modules, facts(PerExpert, coded, 2880)))[0], no);
        let announced = with(Feature::AnnouncedBlocks, facts(DenseExperts, MainLayout::Dense, 2880));
        assert_eq!(statuses(&announced), [no, Good, no, Good]);
        let sixes = Facts { formats: vec![Format::Mxfp6], ..facts(DenseExperts, coded, 2880) };
        assert_eq!(statuses(&sixes), [no, Good, no, Good]);
        assert!(refusal(Runtime::Vllm, &facts(VllmInt, coded, 2880)).unwrap().ends_with("nearest: --pad-to 128"));
        assert_eq!(refusal(Runtime::Vllm, &facts(VllmInt, coded, 2944)), None);
    }

    #[test]
    fn an_eps_that_vllm_does_not_take_is_remarked() {
        let wide = Facts { eps: 1e-5 * 2880.0 / 2944.0, ..facts(Mxfp4, MainLayout::Dense, 2944) };
        assert!(report(&wide)[0].reason.contains("take an eps of 1e-5"), "{:?}", report(&wide)[0]);
        assert!(!report(&facts(Mxfp4, MainLayout::Dense, 2880))[0].reason.contains("eps"));
        let fine = Facts { groups: vec![32], ..facts(VllmInt, MainLayout::Dense, 2944) };
        assert!(report(&fine)[0].reason.contains("groups of 64 or 128"), "{:?}", report(&fine)[0]);
    }
}
