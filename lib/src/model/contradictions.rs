//! Checkpoints whose parts contradict each other: read as transformers reads them, with a remark that says so.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::checkpoint::source::Checkpoint;

const EMBED: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";
const TIED: &str = "tie_word_embeddings";

/// Brings the config of a checkpoint that was just opened into line with its weights.
pub(crate) fn settle(checkpoint: &mut Checkpoint) {
    tied_with_a_head(checkpoint);
    rope_twice(checkpoint);
}

/// transformers ties where both tensors are there and the same, and keeps both where they differ.
fn tied_with_a_head(checkpoint: &mut Checkpoint) {
    if checkpoint.config.get(TIED) != Some(&Value::Bool(true)) {
        return;
    }
    let (Some(embed), Some(head)) = (checkpoint.get(EMBED), checkpoint.get(HEAD)) else { return };
    let same = embed.info.dtype == head.info.dtype && embed.info.shape == head.info.shape && embed.bytes == head.bytes;
    let remark = if same {
        format!("config.json says {TIED}, and {HEAD} is there as well, with the embedding's values: they are one")
    } else {
        checkpoint.config.insert(TIED.into(), false.into());
        format!(
            "config.json says {TIED}, but {HEAD} is there and is not the embedding: it was taken for the head, as \
             transformers does; set {TIED} to false"
        )
    };
    checkpoint.remarks.push(remark);
}

/// transformers takes `rope_scaling` where `rope_parameters` is there too.
fn rope_twice(checkpoint: &mut Checkpoint) {
    let said = |key: &str| match checkpoint.config.get(key) {
        Some(Value::Object(map)) if !map.is_empty() => Some(map),
        _ => None,
    };
    let (Some(scaling), Some(parameters)) = (said("rope_scaling"), said("rope_parameters")) else { return };
    // One spelling for each key, and the theta that stands outside where there is none inside.
    let theta = checkpoint.config.get("rope_theta").cloned();
    let plain = |map: &serde_json::Map<String, Value>| {
        let key = |k: &String| if k == "type" { "rope_type".to_owned() } else { k.clone() };
        let mut all: BTreeMap<String, Value> = map.iter().map(|(k, v)| (key(k), v.clone())).collect();
        if let Some(theta) = &theta {
            all.entry("rope_theta".into()).or_insert_with(|| theta.clone());
        }
        all
    };
    if plain(scaling) != plain(parameters) {
        checkpoint.remarks.push(
            "config.json has rope_scaling and rope_parameters, and they differ: rope_scaling was taken, as transformers does; \
             remove the other"
                .into(),
        );
    }
}
