//! Folders and names that are no checkpoint, or another tool's: what to say so that the user knows what to do.

use std::path::Path;

use serde_json::Value;

use super::source::read_object;
use super::{CONFIG, INDEX};
use crate::error::{Error, Result};

const ADAPTER: &str = "adapter_config.json";

/// The error for a folder without `config.json`.
pub(super) fn no_config(dir: &Path) -> Result<Error> {
    Ok(adapter(dir)?.unwrap_or_else(|| Error::file(dir, format!("has no {CONFIG}, so it is no checkpoint"))))
}

/// The error for a folder with `config.json` and no weights.
pub(super) fn no_weights(dir: &Path) -> Result<Error> {
    if let Some(error) = adapter(dir)? {
        return Ok(error);
    }
    let is_pickle = |n: &String| n.starts_with("pytorch_model") && n.ends_with(".bin") || n.ends_with(".pth");
    let mut pickles: Vec<String> = names(dir)?.into_iter().filter(is_pickle).collect();
    pickles.sort();
    let shard = names(dir)?.into_iter().filter(|n| n.ends_with(".safetensors")).min();
    Ok(match (pickles.first(), shard) {
        (_, Some(shard)) => Error::file(
            dir,
            format!(
                "has shards such as {shard}, and neither {INDEX}, which says what lies in which, nor model.safetensors: an incomplete \
                 download? fetch the index, or rename a single shard to model.safetensors"
            ),
        ),
        (Some(first), None) => Error::file(
            dir,
            format!(
                "has its weights in {first}, which only PyTorch reads: convert it to safetensors (load it with transformers and \
                 save_pretrained)"
            ),
        ),
        (None, None) => Error::file(dir, format!("has neither {INDEX} nor model.safetensors: the weights are missing")),
    })
}

/// The error for a folder that holds an adapter, where it does.
fn adapter(dir: &Path) -> Result<Option<Error>> {
    let path = dir.join(ADAPTER);
    if !super::files::is_there(&path)? {
        return Ok(None);
    }
    let config = read_object(&path)?;
    let text = |key: &str| config.get(key).and_then(Value::as_str);
    let kind = text("peft_type").map_or("an".into(), |k| format!("a {k}"));
    let base = text("base_model_name_or_path").map(|b| format!(" of {b}")).unwrap_or_default();
    let reason =
        format!("holds {kind} adapter{base}, not a model: merge it first (peft: merge_and_unload, save_pretrained)");
    Ok(Some(Error::file(dir, reason)))
}

fn names(dir: &Path) -> Result<Vec<String>> {
    let entries = std::fs::read_dir(dir).map_err(Error::io("list", dir))?;
    entries.map(|e| Ok(e.map_err(Error::io("list", dir))?.file_name().to_string_lossy().into_owned())).collect()
}

/// What may be meant by a config without `model_type`, as the end of a sentence.
pub(crate) fn other_layout(config: &serde_json::Map<String, Value>) -> Option<&'static str> {
    // Keys of OpenAI's own loader that transformers' config does not have.
    let ours = ["initial_context_length", "rope_scaling_factor", "num_experts"].iter().all(|k| config.contains_key(*k));
    ours.then_some(
        "this is OpenAI's own layout, the folder original/ of its repositories; give the folder above it, which has the \
         model under transformers' names",
    )
}

/// Which of the names that are there may stand for `missing`, and where such names come from.
pub(super) fn hint<'a>(missing: &str, mut there: impl Iterator<Item = &'a str> + Clone) -> Option<String> {
    if let Some(found) = there.clone().find(|n| n.len() > missing.len() && n.ends_with(missing)) {
        let prefix = &found[..found.len() - missing.len()];
        let who = if prefix == "_orig_mod." { " (torch.compile wraps modules so)" } else { "" };
        return Some(format!("the file calls it {found}: take the prefix {prefix:?} off all names{who}"));
    }
    let (module, last) = missing.rsplit_once('.').unwrap_or((missing, ""));
    let wrapped = format!("{module}.base_layer.{last}");
    if there.clone().any(|n| n == wrapped) {
        return Some(format!(
            "{wrapped} is there: an adapter is wrapped around it; merge it first (peft: merge_and_unload, save_pretrained)"
        ));
    }
    let unsloth = [module.replace(".mlp.router", ".mlp.router.linear"), by_expert(module)];
    if let Some(found) = there.clone().find(|n| unsloth.iter().any(|u| u != module && n.starts_with(&format!("{u}."))))
    {
        return Some(format!(
            "{found} is there: such names come from a model that unsloth loaded in 4 bits and merged; save it again as merged \
             16 bits of a model that was loaded in BF16"
        ));
    }
    // The most alike, where it is more than by chance.
    let closeness = |n: &str| strsim::normalized_damerau_levenshtein(n, missing);
    let last = |n: &str| n.rsplit('.').next().unwrap_or_default().to_owned();
    let mut best: Option<(f64, &str)> = None;
    let mut tried = 0;
    while let Some(n) = there.next()
        && tried < 2000
    {
        tried += 1;
        if last(n) == last(missing) && closeness(n) > best.map_or(0.85, |b| b.0) {
            best = Some((closeness(n), n));
        }
    }
    best.map(|(_, n)| format!("the most similar name that is there is {n}"))
}

/// `experts.3.gate_proj` as experts are called that are one linear layer each with gate and up together.
fn by_expert(module: &str) -> String {
    let Some((layer, rest)) = module.split_once(".mlp.experts.") else { return module.to_owned() };
    match rest.split_once('.') {
        Some((expert, "gate_proj" | "up_proj")) => format!("{layer}.mlp.experts.gate_up_projs.{expert}"),
        Some((expert, "down_proj")) => format!("{layer}.mlp.experts.down_projs.{expert}"),
        _ => format!("{layer}.mlp.experts.{}s.0", rest.trim_end_matches("_bias")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_other_tools_are_known() {
        let hint = |missing: &str, there: &[&str]| hint(missing, there.iter().copied()).unwrap_or_default();
        let m = "model.layers.0.self_attn.q_proj.weight";
        assert!(hint(m, &["_orig_mod.model.layers.0.self_attn.q_proj.weight"]).contains("torch.compile"));
        assert!(hint(m, &["model.layers.0.self_attn.q_proj.base_layer.weight"]).contains("adapter"));
        let expert = "model.layers.0.mlp.experts.3.up_proj.weight";
        assert!(hint(expert, &["model.layers.0.mlp.experts.gate_up_projs.3.weight"]).contains("unsloth"));
        let router = "model.layers.0.mlp.router.weight";
        assert!(hint(router, &["model.layers.0.mlp.router.linear.weight"]).contains("unsloth"));
        assert!(hint(m, &["model.layers.0.self_attn.qproj.weight"]).contains("most similar"));
        assert_eq!(hint(m, &["lm_head.weight", "model.norm.weight"]), "");
    }
}
