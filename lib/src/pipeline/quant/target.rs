//! Which container, and which settings beside it, make a recipe's output load in a runtime: plans are made on the config
//! alone, and the rules of [`crate::runtimes`] judge them.

use std::path::Path;

use serde_json::{Map, Value};

use super::Plan;
use super::output::{heads_serve, list};
use crate::error::{Error, Result};
use crate::model::ModelConfig;
use crate::recipe::{Container, GroupSize, Recipe, SchemeName};
use crate::runtimes::{self, Runtime};

/// The multiples to which a target may pad where nobody said: vLLM's kernels want the first, ggml's wide blocks the second.
const PADS: [usize; 2] = [128, 256];

/// Runtimes for which a container is looked for that nobody asked for, in this order. Not llama.cpp: ggml's types round by rules of
/// their own, so another container would be other numbers.
const PUBLIC: [Runtime; 2] = [Runtime::Vllm, Runtime::Transformers];

/// What a user says of where the output goes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wish {
    /// The runtime that must load it.
    pub target: Option<Runtime>,
    /// The container.
    pub container: Option<Container>,
    /// No padding that nobody asked for: it takes bytes, and a size is to be met.
    pub narrow: bool,
    /// GPUs over which vLLM must be able to cut every layer; the target is vLLM then.
    pub tensor_parallel: Option<usize>,
}

/// Looks again at a plan whose schemes were chosen after its container was.
///
/// # Errors
/// [`Error::Refused`] where the wished runtime does not load them side by side.
pub fn check(plan: &Plan, wish: Wish) -> Result<()> {
    let refused = wish.target.and_then(|t| runtimes::refusal(t, &plan.facts()).map(|reason| (t.name(), reason)));
    match refused {
        None => Ok(()),
        Some((target, reason)) => Err(Error::Refused(format!(
            "--target {target} does not load the schemes that were chosen for --target-size side by side: {reason}; give one of \
             the two flags alone"
        ))),
    }
}

/// Settles the container of `recipe` for the model of `raw_config` in `dir`. Without a wish it is the first that a public
/// runtime loads, padded where that is what it takes; else compressed-tensors, and the plan says which runtimes are lost.
///
/// # Errors
/// [`Error::Refused`] where the target cannot load the recipe's output, with the rule and what comes nearest.
pub fn settle(dir: &Path, raw_config: &Map<String, Value>, recipe: &mut Recipe, wish: Wish) -> Result<()> {
    let plan = |container: Container, pad_to: Option<usize>| {
        let recipe = Recipe { container, pad_to, ..recipe.clone() };
        Plan::new(dir, raw_config, recipe, None).map(|plan| plan.facts())
    };
    if let (true, Some(container)) = (recipe.keep_codes, wish.container) {
        recipe.container = container;
        return Ok(());
    }
    if let Some(gpus) = wish.tensor_parallel {
        return settle_over(dir, raw_config, recipe, wish.container, gpus);
    }
    let pad_to = recipe.pad_to;
    let Some(target) = wish.target else {
        if let Some(container) = wish.container {
            recipe.container = container;
            return Ok(());
        }
        // Nothing else holds ggml's types.
        let ggml = recipe.layers().any(|(_, l)| matches!(l.scheme, SchemeName::Ggml(_)));
        let other = if ggml { Container::Gguf } else { Container::CompressedTensors };
        let widths = if pad_to.is_some() || wish.narrow { vec![pad_to] } else { vec![None, Some(PADS[0])] };
        let found = widths.into_iter().find_map(|pad_to| {
            PUBLIC.into_iter().find_map(|runtime| {
                let loads = |c: &&Container| plan(**c, pad_to).is_ok_and(|f| runtimes::refusal(runtime, &f).is_none());
                runtime.containers().iter().find(loads).map(|c| (*c, pad_to))
            })
        });
        (recipe.container, recipe.pad_to) = found.unwrap_or((other, pad_to));
        return Ok(());
    };
    let containers = wish.container.map_or(target.containers().to_vec(), |c| vec![c]);
    // What a user gave comes first; padding that nobody asked for last.
    let widths = if pad_to.is_some() { vec![pad_to] } else { vec![None, Some(PADS[0]), Some(PADS[1])] };
    let (mut by_rule, mut by_plan) = (None, Vec::new());
    for (i, &pad_to) in widths.iter().enumerate() {
        for &container in &containers {
            match plan(container, pad_to) {
                Ok(facts) => match runtimes::refusal(target, &facts) {
                    None => {
                        (recipe.container, recipe.pad_to) = (container, pad_to);
                        return Ok(());
                    }
                    // The last container is the one that is furthest from what others read.
                    Some(reason) if i == 0 => by_rule = Some((container, reason)),
                    Some(_) => {}
                },
                Err(e) if i == 0 => by_plan.push(format!("container {}: {e}", container.name())),
                Err(_) => {}
            }
        }
    }
    let why = match by_rule {
        // What the others would have needed says more than what this one lacks.
        Some((Container::CompressedTensors, reason)) => [vec![reason], by_plan].concat().join("; "),
        Some((_, reason)) => reason,
        None => by_plan.join("; "),
    };
    Err(Error::Refused(format!("--target {}: {why}", target.name())))
}

/// Settles container, groups and padding of `recipe` so that vLLM loads its output and can cut it over so many GPUs: the smallest such output.
/// What the user chose stays as it is.
fn settle_over(
    dir: &Path,
    raw_config: &Map<String, Value>,
    recipe: &mut Recipe,
    container: Option<Container>,
    gpus: usize,
) -> Result<()> {
    let config = ModelConfig::parse(dir, raw_config)?;
    if !heads_serve(&config, gpus) {
        let (heads, kv) = (config.heads, config.kv_heads);
        return Err(Error::Refused(format!(
            "--tensor-parallel {gpus}: vLLM cannot share {heads} heads and {kv} key heads among {gpus} GPUs"
        )));
    }
    let mut widths = match recipe.pad_to {
        Some(given) => vec![Some(given)],
        None => vec![None, Some(PADS[0]), Some(PADS[0] * gpus)],
    };
    widths.dedup();
    let containers = container.map_or(Runtime::Vllm.containers().to_vec(), |c| vec![c]);
    let is_free = recipe.layers().any(|(_, l)| l.group_size == GroupSize::Auto && l.scheme.own_group_size().is_none());
    let groups: &[GroupSize] = if is_free { &GROUPS } else { &GROUPS[..1] };
    let (mut best, mut served): (Option<(u64, Recipe)>, Option<Vec<usize>>) = (None, None);
    for &pad_to in &widths {
        for &group in groups {
            for &container in &containers {
                let mut candidate = Recipe { container, pad_to, ..recipe.clone() };
                for layer in candidate.layers_mut().filter(|l| l.scheme.own_group_size().is_none()) {
                    if layer.group_size == GroupSize::Auto {
                        layer.group_size = group;
                    }
                }
                let Ok(plan) = Plan::new(dir, raw_config, candidate.clone(), None) else { continue };
                if runtimes::refusal(Runtime::Vllm, &plan.facts()).is_some() {
                    continue;
                }
                let sizes = plan.tensor_parallel();
                let bytes = plan.bytes();
                if sizes.contains(&gpus) && best.as_ref().is_none_or(|b| bytes < b.0) {
                    best = Some((bytes, candidate));
                }
                served.get_or_insert(sizes);
            }
        }
    }
    match (best, served) {
        (Some((_, found)), _) => {
            *recipe = found;
            Ok(())
        }
        (None, Some(sizes)) => Err(Error::Refused(format!(
            "--tensor-parallel {gpus}: no group size and no padding of this recipe lets every GPU have whole groups; as it is it \
             serves {}",
            list(&sizes)
        ))),
        // Why vLLM does not load it at all.
        (None, None) => {
            let wish = Wish { target: Some(Runtime::Vllm), container, ..Wish::default() };
            settle(dir, raw_config, recipe, wish)
        }
    }
}

/// Groups that are tried for layers whose group nobody chose.
const GROUPS: [GroupSize; 3] = [GroupSize::Auto, GroupSize::Size(64), GroupSize::Size(32)];
