//! gpt-oss in ggml's words: names of tensors, keys of the metadata. Source: llama.cpp `src/models/openai-moe.cpp` and
//! `src/llama-arch.cpp`.

use std::path::Path;

use serde_json::{Map, Value as Json, json};

use super::{ModelConfig, Settings};
use crate::checkpoint::gguf::{Metadata, Value};
use crate::error::{Error, Result};

/// `general.architecture`.
pub const ARCHITECTURE: &str = "gpt-oss";
/// Key of the tokens.
pub const TOKENS: &str = "tokenizer.ggml.tokens";

/// ggml's name and the model's, of what stands outside layers.
const OUTSIDE: [(&str, &str); 3] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
];

/// The same behind `blk.N.` and `model.layers.N.`. Experts are fused there, each projection alone, [E, out, in].
const INSIDE: [(&str, &str); 19] = [
    ("attn_norm.weight", "input_layernorm.weight"),
    ("attn_q.weight", "self_attn.q_proj.weight"),
    ("attn_q.bias", "self_attn.q_proj.bias"),
    ("attn_k.weight", "self_attn.k_proj.weight"),
    ("attn_k.bias", "self_attn.k_proj.bias"),
    ("attn_v.weight", "self_attn.v_proj.weight"),
    ("attn_v.bias", "self_attn.v_proj.bias"),
    ("attn_output.weight", "self_attn.o_proj.weight"),
    ("attn_output.bias", "self_attn.o_proj.bias"),
    ("attn_sinks.weight", "self_attn.sinks"),
    ("post_attention_norm.weight", "post_attention_layernorm.weight"),
    ("ffn_gate_inp.weight", "mlp.router.weight"),
    ("ffn_gate_inp.bias", "mlp.router.bias"),
    ("ffn_gate_exps.weight", "mlp.experts.gate_proj.weight"),
    ("ffn_gate_exps.bias", "mlp.experts.gate_proj.bias"),
    ("ffn_up_exps.weight", "mlp.experts.up_proj.weight"),
    ("ffn_up_exps.bias", "mlp.experts.up_proj.bias"),
    ("ffn_down_exps.weight", "mlp.experts.down_proj.weight"),
    ("ffn_down_exps.bias", "mlp.experts.down_proj.bias"),
];

/// The model's name of ggml's tensor `name`, where it is one of a gpt-oss.
pub fn to_model(name: &str) -> Option<String> {
    if let Some((_, model)) = OUTSIDE.iter().find(|n| n.0 == name) {
        return Some((*model).to_owned());
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let (_, model) = INSIDE.iter().find(|n| n.0 == rest)?;
    layer.parse::<usize>().ok().map(|layer| format!("model.layers.{layer}.{model}"))
}

/// ggml's name of the model's tensor `name`.
pub fn from_model(name: &str) -> Option<String> {
    if let Some((ggml, _)) = OUTSIDE.iter().find(|n| n.1 == name) {
        return Some((*ggml).to_owned());
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    INSIDE.iter().find(|n| n.1 == rest).map(|(ggml, _)| format!("blk.{layer}.{ggml}"))
}

/// The keys that describe the model.
///
/// # Errors
/// [`Error::Refused`] for what llama.cpp has no key for, or computes otherwise.
pub fn metadata(config: &ModelConfig, settings: &Settings, name: &str) -> Result<Vec<(String, Value)>> {
    fits(config, settings)?;
    let n = |n: usize| Value::U32(n as u32);
    // A single layer may have none; llama.cpp wants a number all the same.
    let window = settings.windows.iter().flatten().next().copied().unwrap_or(settings.context);
    let mut keys = vec![
        ("general.architecture".to_owned(), Value::Text(ARCHITECTURE.into())),
        ("general.type".to_owned(), Value::Text("model".into())),
        ("general.name".to_owned(), Value::Text(name.to_owned())),
        ("general.quantization_version".to_owned(), Value::U32(2)),
    ];
    let own = [
        ("block_count", n(config.layers)),
        ("context_length", n(settings.context)),
        ("embedding_length", n(config.hidden)),
        ("feed_forward_length", n(config.intermediate)),
        ("attention.head_count", n(config.heads)),
        ("attention.head_count_kv", n(config.kv_heads)),
        ("attention.key_length", n(config.head_dim)),
        ("attention.value_length", n(config.head_dim)),
        ("attention.layer_norm_rms_epsilon", Value::F32(settings.eps)),
        ("attention.sliding_window", n(window)),
        ("expert_count", n(config.experts)),
        ("expert_used_count", n(settings.top_k)),
        ("expert_feed_forward_length", n(config.intermediate)),
        ("vocab_size", n(config.vocab)),
        ("rope.dimension_count", n(config.head_dim)),
        ("rope.freq_base", Value::F32(settings.rope.theta as f32)),
    ];
    keys.extend(own.map(|(key, value)| (format!("{ARCHITECTURE}.{key}"), value)));
    if let Some(y) = &settings.rope.yarn {
        let own = [
            ("type", Value::Text("yarn".into())),
            ("factor", Value::F32(y.factor as f32)),
            ("original_context_length", Value::U32(y.original_context as u32)),
            ("yarn_beta_fast", Value::F32(y.beta_fast as f32)),
            ("yarn_beta_slow", Value::F32(y.beta_slow as f32)),
            // Ours: llama.cpp rounds the bounds of the ramp to whole dimensions whatever this says.
            ("yarn_truncate", Value::Bool(y.truncate)),
        ];
        keys.extend(own.map(|(key, value)| (format!("{ARCHITECTURE}.rope.scaling.{key}"), value)));
    }
    Ok(keys)
}

/// What llama.cpp takes for granted.
fn fits(config: &ModelConfig, settings: &Settings) -> Result<()> {
    let Settings { windows, alpha, limit, rope, .. } = settings;
    let alternate = windows.iter().enumerate().all(|(l, w)| w.is_some() == l.is_multiple_of(2));
    let near = |a: f64, b: f64| (a - b).abs() < 1e-6;
    let factor =
        rope.yarn.as_ref().map_or(1.0, |y| if y.factor <= 1.0 { 1.0 } else { 0.1 * libm::log(y.factor) + 1.0 });
    let wrong = if !alternate {
        "layers whose windows do not alternate, the first of them sliding"
    } else if !near(f64::from(*alpha), 1.702) || !near(f64::from(*limit), 7.0) {
        "another swiglu_alpha than 1.702, or another swiglu_limit than 7"
    } else if !near(rope.factor, factor) {
        "an attention_factor of its own in rope_scaling"
    } else if !config.attention_bias {
        "no biases in its attention"
    } else if config.tied {
        "no lm_head of its own (tie_word_embeddings)"
    } else {
        return Ok(());
    };
    Err(Error::Refused(format!("gguf: this model has {wrong}, and llama.cpp's gpt-oss knows no such thing")))
}

/// A `config.json` from the metadata of `file`.
///
/// # Errors
/// [`Error::BadFile`] for another architecture, and for keys that are missing.
pub fn config(file: &Path, metadata: &Metadata) -> Result<Map<String, Json>> {
    match metadata.get("general.architecture") {
        Some(Value::Text(a)) if a == ARCHITECTURE => {}
        Some(Value::Text(a)) if a == "gptoss" => {
            let reason = "general.architecture is gptoss: this is a file of Ollama's own; take one that llama.cpp made, \
                          whose architecture is gpt-oss";
            return Err(Error::file(file, reason));
        }
        Some(Value::Text(a)) => {
            let reason = format!("general.architecture is {a:?}, this tool knows {ARCHITECTURE:?}");
            return Err(Error::file(file, reason));
        }
        _ => return Err(Error::file(file, "has no general.architecture in its metadata: it is no model")),
    }
    let key = |name: &str| format!("{ARCHITECTURE}.{name}");
    let number = |name: &str| match metadata.get(&key(name)) {
        Some(Value::U32(v)) => Ok(Json::from(*v)),
        Some(Value::U64(v)) => Ok(Json::from(*v)),
        Some(Value::I32(v)) => Ok(Json::from(*v)),
        Some(Value::F32(v)) => Ok(Json::from(f64::from(*v))),
        Some(other) => Err(Error::file(file, format!("the metadata key {} is {other}, wanted a number", key(name)))),
        None => Err(Error::file(file, format!("the metadata key {} is missing, wanted a number", key(name)))),
    };
    let layers = number("block_count")?;
    let types: Vec<&str> = (0..layers.as_u64().unwrap_or(0).min(1 << 16))
        .map(|l| if l.is_multiple_of(2) { "sliding_attention" } else { "full_attention" })
        .collect();
    let vocab = match metadata.get(TOKENS) {
        Some(Value::Texts(tokens)) => Json::from(tokens.len()),
        _ => number("vocab_size")?,
    };
    let heads = number("attention.head_count")?;
    let head_dim = number("attention.key_length")?;
    let mut config = json!({
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": true,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": number("embedding_length")?,
        "intermediate_size": number("expert_feed_forward_length")?,
        "layer_types": types,
        "max_position_embeddings": number("context_length")?,
        "num_attention_heads": heads,
        "num_experts_per_tok": number("expert_used_count")?,
        "num_hidden_layers": layers,
        "num_key_value_heads": number("attention.head_count_kv")?,
        "num_local_experts": number("expert_count")?,
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon")?,
        "rope_theta": number("rope.freq_base")?,
        "sliding_window": number("attention.sliding_window")?,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": false,
        "dtype": "bfloat16",
        "vocab_size": vocab,
    });
    if metadata.contains_key(&key("rope.scaling.factor")) {
        let beta = |name: &str, default: f64| number(name).unwrap_or_else(|_| default.into());
        config["rope_scaling"] = json!({
            "rope_type": "yarn",
            "factor": number("rope.scaling.factor")?,
            "original_max_position_embeddings": number("rope.scaling.original_context_length")?,
            "beta_fast": beta("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": beta("rope.scaling.yarn_beta_slow", 1.0),
            // What is silent is llama.cpp's own gpt-oss, made from a config that says no.
            "truncate": metadata.get(&key("rope.scaling.yarn_truncate")) == Some(&Value::Bool(true)),
        });
    }
    for (name, key) in [("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")] {
        if let Some(Value::U32(id)) = metadata.get(&format!("tokenizer.ggml.{key}_token_id")) {
            config[name] = (*id).into();
        }
    }
    match config {
        Json::Object(map) => Ok(map),
        _ => unreachable!("it was written as one"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Role, slots};

    fn published() -> (ModelConfig, Settings, Map<String, Json>) {
        let map = ModelConfig::published("gpt-oss-20b").unwrap();
        let config = ModelConfig::parse(Path::new("m"), &map).unwrap();
        let settings = Settings::parse(Path::new("m"), &map, &config).unwrap();
        (config, settings, map)
    }

    #[test]
    fn every_tensor_has_a_name_there_and_back() {
        let (config, ..) = published();
        for slot in slots(&config) {
            if let Role::Experts(..) | Role::ExpertBias(..) = slot.role {
                continue;
            }
            let ggml = from_model(&slot.name).unwrap_or_else(|| panic!("{}", slot.name));
            assert_eq!(to_model(&ggml).unwrap(), slot.name);
        }
        let experts = "model.layers.3.mlp.experts.up_proj.bias";
        assert_eq!(from_model(experts).unwrap(), "blk.3.ffn_up_exps.bias");
        assert_eq!(to_model("blk.3.ffn_up_exps.bias").unwrap(), experts);
        assert_eq!(to_model("blk.x.ffn_up_exps.bias"), None);
        assert_eq!(to_model("rope_freqs.weight"), None);
    }

    #[test]
    fn the_metadata_is_the_config_again() {
        let (config, settings, _) = published();
        let mut keys: Metadata = metadata(&config, &settings, "m").unwrap().into_iter().collect();
        let again = super::config(Path::new("m.gguf"), &keys).unwrap();
        assert_eq!(ModelConfig::parse(Path::new("m"), &again).unwrap(), config);
        assert_eq!(Settings::parse(Path::new("m"), &again, &config).unwrap(), settings);
        let mut whole = settings.clone();
        whole.rope.yarn.as_mut().unwrap().truncate = true;
        let said: Metadata = metadata(&config, &whole, "m").unwrap().into_iter().collect();
        let again = super::config(Path::new("m.gguf"), &said).unwrap();
        assert!(Settings::parse(Path::new("m"), &again, &config).unwrap().rope.yarn.unwrap().truncate);
        keys.remove("gpt-oss.expert_count");
        let e = super::config(Path::new("m.gguf"), &keys).unwrap_err().to_string();
        assert!(e.contains("gpt-oss.expert_count is missing, wanted a number"), "{e}");
    }

    #[test]
    fn what_llama_cpp_does_not_know_is_refused() {
        let (config, settings, _) = published();
        let refused =
            |config: &ModelConfig, settings: &Settings| metadata(config, settings, "m").unwrap_err().to_string();
        let mut s = settings.clone();
        s.windows[1] = Some(128);
        assert!(refused(&config, &s).contains("windows do not alternate"));
        let s = Settings { limit: 8.0, ..settings.clone() };
        assert!(refused(&config, &s).contains("swiglu_limit"));
        let tied = ModelConfig { tied: true, ..config.clone() };
        assert!(refused(&tied, &settings).contains("tie_word_embeddings"));
    }
}
