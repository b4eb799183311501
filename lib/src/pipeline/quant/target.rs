//! Which container, and which settings beside it, make a recipe's output load in a runtime: plans are made on the config
//! alone, and the rules of [`crate::runtimes`] judge them.

use std::path::Path;

use serde_json::{Map, Value};

use super::Plan;
use crate::error::{Error, Result};
use crate::recipe::{Container, Recipe, SchemeName};
use crate::runtimes::{self, Runtime};

/// The multiple to which a target may pad where nobody said.
const PAD: usize = 128;

/// What a user says of where the output goes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wish {
    /// The runtime that must load it.
    pub target: Option<Runtime>,
    /// The container.
    pub container: Option<Container>,
}

/// Settles the container of `recipe` for the model of `raw_config` in `dir`. Without a wish it is what vLLM loads, where
/// something does; else compressed-tensors, and the plan says which runtimes are lost.
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
    let pad_to = recipe.pad_to;
    let Some(target) = wish.target else {
        recipe.container = wish.container.unwrap_or_else(|| {
            let loads = |c: &Container| plan(*c, pad_to).is_ok_and(|f| runtimes::refusal(Runtime::Vllm, &f).is_none());
            // Nothing else holds ggml's types.
            let ggml = recipe.layers().any(|(_, l)| matches!(l.scheme, SchemeName::Ggml(_)));
            let other = if ggml { Container::Gguf } else { Container::CompressedTensors };
            Runtime::Vllm.containers().iter().copied().find(loads).unwrap_or(other)
        });
        return Ok(());
    };
    let containers = wish.container.map_or(target.containers().to_vec(), |c| vec![c]);
    // What a user gave comes first; padding that nobody asked for last.
    let widths = if pad_to.is_some() { vec![pad_to] } else { vec![None, Some(PAD)] };
    let mut why: Option<String> = None;
    for pad_to in widths {
        for &container in &containers {
            let reason = match plan(container, pad_to) {
                Ok(facts) => match runtimes::refusal(target, &facts) {
                    None => {
                        (recipe.container, recipe.pad_to) = (container, pad_to);
                        return Ok(());
                    }
                    Some(reason) => reason,
                },
                // A container that cannot hold it at all says less than a runtime that has a rule for it.
                Err(e) if containers.len() == 1 => e.to_string(),
                Err(_) => continue,
            };
            why.get_or_insert(reason);
        }
    }
    let why = why.unwrap_or_else(|| "no container of its own can hold this recipe".into());
    Err(Error::Refused(format!("--target {}: {why}", target.name())))
}
