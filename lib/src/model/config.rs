//! The fields of `config.json` that fix shapes.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::checkpoint::foreign::other_layout;
use crate::error::{Error, Result};

/// Largest extent that is believed.
const MAX_EXTENT: usize = 1 << 20;
/// Most layers times experts, 14 times those of the 120b: a plan names each.
const MAX_EXPERTS: usize = 1 << 16;
/// Most parameters that are believed, 75 times those of the 120b: every size in bytes is far from overflow.
const MAX_PARAMETERS: u128 = 1 << 43;

/// Shapes of a gpt-oss.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelConfig {
    /// num_hidden_layers.
    pub layers: usize,
    /// num_local_experts.
    pub experts: usize,
    /// hidden_size.
    pub hidden: usize,
    /// intermediate_size.
    pub intermediate: usize,
    /// num_attention_heads.
    pub heads: usize,
    /// num_key_value_heads.
    pub kv_heads: usize,
    /// head_dim.
    pub head_dim: usize,
    /// vocab_size.
    pub vocab: usize,
    /// attention_bias.
    pub attention_bias: bool,
    /// tie_word_embeddings.
    pub tied: bool,
}

#[derive(Deserialize)]
struct Raw {
    model_type: String,
    num_hidden_layers: usize,
    #[serde(alias = "num_experts")]
    num_local_experts: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: Option<usize>,
    vocab_size: usize,
    #[serde(default = "yes")]
    attention_bias: bool,
    #[serde(default)]
    tie_word_embeddings: bool,
}

fn yes() -> bool {
    true
}

impl ModelConfig {
    /// Reads and checks the fields of a `config.json` that lies in `dir`.
    pub fn parse(dir: &Path, config: &Map<String, Value>) -> Result<Self> {
        let file = dir.join(crate::checkpoint::CONFIG);
        let bad = |reason: String| Error::file(&file, reason);
        match config.get("model_type") {
            Some(Value::String(t)) if t == "gpt_oss" => {}
            Some(Value::String(t)) => {
                let wrapped = match config.get("text_config").and_then(|c| c.get("model_type")) {
                    Some(Value::String(inner)) if inner == "gpt_oss" => {
                        "; its text model, in text_config, is one: save that alone (with transformers: take the text model out \
                         of the loaded one and call save_pretrained on it)"
                    }
                    _ => "",
                };
                return Err(bad(format!("model_type is {t:?}, this tool knows gpt_oss{wrapped}")));
            }
            _ => {
                let other = other_layout(config).map(|o| format!("; {o}")).unwrap_or_default();
                return Err(bad(format!("has no model_type; a gpt-oss says \"gpt_oss\"{other}")));
            }
        }
        let raw: Raw = serde_json::from_value(Value::Object(config.clone())).map_err(|e| bad(e.to_string()))?;
        debug_assert_eq!(raw.model_type, "gpt_oss");
        // As transformers' GptOssConfig has it: 64 where the key is missing, a share of the width where it is null.
        let head_dim = match (raw.head_dim, config.contains_key("head_dim")) {
            (Some(n), _) => n,
            (None, false) => 64,
            (None, true) => raw.hidden_size / raw.num_attention_heads.max(1),
        };
        let extents = [
            ("num_hidden_layers", raw.num_hidden_layers),
            ("num_local_experts", raw.num_local_experts),
            ("hidden_size", raw.hidden_size),
            ("intermediate_size", raw.intermediate_size),
            ("num_attention_heads", raw.num_attention_heads),
            ("num_key_value_heads", raw.num_key_value_heads),
            ("head_dim", head_dim),
            ("vocab_size", raw.vocab_size),
        ];
        for (name, n) in extents {
            if n == 0 || n > MAX_EXTENT {
                return Err(bad(format!("{name} is {n}, wanted 1 to {MAX_EXTENT}")));
            }
        }
        let config = Self {
            layers: raw.num_hidden_layers,
            experts: raw.num_local_experts,
            hidden: raw.hidden_size,
            intermediate: raw.intermediate_size,
            heads: raw.num_attention_heads,
            kv_heads: raw.num_key_value_heads,
            head_dim,
            vocab: raw.vocab_size,
            attention_bias: raw.attention_bias,
            tied: raw.tie_word_embeddings,
        };
        config.check_products().map_err(bad)?;
        Ok(config)
    }

    /// Which fields differ, for people: `hidden_size 2880 and 2944, ...`.
    pub fn differences(&self, other: &Self) -> String {
        let numbers = |c: &Self| {
            [
                ("num_hidden_layers", c.layers),
                ("num_local_experts", c.experts),
                ("hidden_size", c.hidden),
                ("intermediate_size", c.intermediate),
                ("num_attention_heads", c.heads),
                ("num_key_value_heads", c.kv_heads),
                ("head_dim", c.head_dim),
                ("vocab_size", c.vocab),
                ("attention_bias", usize::from(c.attention_bias)),
                ("tie_word_embeddings", usize::from(c.tied)),
            ]
        };
        let both = numbers(self).into_iter().zip(numbers(other)).filter(|(a, b)| a != b);
        both.map(|((name, a), (_, b))| format!("{name} {a} and {b}")).collect::<Vec<_>>().join(", ")
    }

    /// Products of extents, each of which is at most 2^20.
    fn check_products(&self) -> std::result::Result<(), String> {
        if self.layers * self.experts > MAX_EXPERTS {
            let (l, e) = (self.layers, self.experts);
            return Err(format!("{l} layers of {e} experts are {} experts, wanted at most {MAX_EXPERTS}", l * e));
        }
        for (name, heads) in [("num_attention_heads", self.heads), ("num_key_value_heads", self.kv_heads)] {
            let width = heads * self.head_dim;
            if width > MAX_EXTENT {
                return Err(format!("{name} times head_dim is {width}, wanted at most {MAX_EXTENT}"));
            }
        }
        let wide = |n: usize| n as u128;
        let attention = 2 * wide(self.hidden) * wide((self.heads + self.kv_heads) * self.head_dim);
        let experts = wide(self.experts) * wide(self.hidden) * wide(3 * self.intermediate + 1);
        let total = wide(self.layers) * (attention + experts) + 2 * wide(self.vocab) * wide(self.hidden);
        if total > MAX_PARAMETERS {
            return Err(format!("its sizes make {total} parameters, wanted at most {MAX_PARAMETERS}"));
        }
        Ok(())
    }

    /// The `config.json` of a published model, `gpt-oss-20b` or `gpt-oss-120b`: enough for a plan without the model.
    pub fn published(name: &str) -> Option<Map<String, Value>> {
        let text = match name {
            "gpt-oss-20b" => include_str!("../../../tests/fixtures/configs/gpt-oss-20b.json"),
            "gpt-oss-120b" => include_str!("../../../tests/fixtures/configs/gpt-oss-120b.json"),
            _ => return None,
        };
        Some(serde_json::from_str(text).expect("a committed file"))
    }

    /// The name of the published model that has these shapes.
    pub fn known_name(&self) -> Option<&'static str> {
        match (self.layers, self.experts, self.hidden, self.intermediate) {
            (24, 32, 2880, 2880) => Some("gpt-oss-20b"),
            (36, 128, 2880, 2880) => Some("gpt-oss-120b"),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(change: impl Fn(&mut Map<String, Value>)) -> Result<ModelConfig> {
        let text = include_str!("../../../tests/fixtures/configs/gpt-oss-20b.json");
        let mut map: Map<String, Value> = serde_json::from_str(text).unwrap();
        change(&mut map);
        ModelConfig::parse(Path::new("m"), &map)
    }

    #[test]
    fn the_real_config_is_the_20b() {
        let c = parse(|_| {}).unwrap();
        assert_eq!(c.known_name(), Some("gpt-oss-20b"));
        let slots = super::super::slots(&c);
        // The hub's index lists 459 tensors; each fused weight stands there twice, as blocks and scales.
        let fused = slots.iter().filter(|s| matches!(s.role, crate::model::Role::Experts(..))).count();
        assert_eq!(slots.len() + fused, 459);
        let parameters: usize = slots.iter().map(|s| s.shape.iter().product::<usize>()).sum();
        assert_eq!(parameters, 20_914_757_184);
    }

    #[test]
    fn errors_name_field_and_value() {
        let e = parse(|m| drop(m.insert("model_type".into(), "llama".into()))).unwrap_err().to_string();
        assert_eq!(e, "m/config.json: model_type is \"llama\", this tool knows gpt_oss");
        let wrapped = |m: &mut Map<String, Value>| {
            let inner = Value::Object(m.clone());
            m.insert("model_type".into(), "llava".into());
            m.insert("text_config".into(), inner);
        };
        assert!(parse(wrapped).unwrap_err().to_string().contains("in text_config, is one: save that alone"));
        let e = parse(|m| drop(m.insert("hidden_size".into(), (1u64 << 60).into()))).unwrap_err().to_string();
        assert!(e.contains("hidden_size is 1152921504606846976"), "{e}");
        let e = parse(|m| drop(m.remove("hidden_size"))).unwrap_err().to_string();
        assert!(e.contains("hidden_size"), "{e}");
        assert_eq!(parse(|m| drop(m.remove("head_dim"))).unwrap().head_dim, 64);
        let renamed = |m: &mut Map<String, Value>| {
            let n = m.remove("num_local_experts").unwrap();
            m.insert("num_experts".into(), n);
        };
        assert_eq!(parse(renamed).unwrap().experts, 32);
        let both = parse(|m| drop(m.insert("num_experts".into(), 4.into()))).unwrap_err().to_string();
        assert!(both.contains("duplicate field"), "{both}");
    }
}
