//! The fields of `config.json` that the forward needs beyond shapes.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::ModelConfig;
use super::rope::{Rope, Yarn};
use crate::checkpoint::CONFIG;
use crate::error::{Error, Result};

/// How a gpt-oss computes.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// rms_norm_eps.
    pub eps: f32,
    /// The window of each layer: sliding_window, or `None` for full attention.
    pub windows: Vec<Option<usize>>,
    /// num_experts_per_tok.
    pub top_k: usize,
    /// swiglu_alpha; 1.702 where the config is silent, as the hub's is.
    pub alpha: f32,
    /// swiglu_limit.
    pub limit: f32,
    /// max_position_embeddings.
    pub context: usize,
    /// rope_theta with rope_scaling, or rope_parameters.
    pub rope: Rope,
}

#[derive(Deserialize)]
struct Raw {
    #[serde(default = "default_eps")]
    rms_norm_eps: f64,
    sliding_window: Option<usize>,
    layer_types: Option<Vec<String>>,
    num_experts_per_tok: Option<usize>,
    #[serde(default = "default_alpha")]
    swiglu_alpha: f64,
    #[serde(default = "default_limit")]
    swiglu_limit: f64,
    #[serde(default = "default_context")]
    max_position_embeddings: usize,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
    hidden_act: Option<String>,
}

/// `rope_scaling`, or with `rope_theta` inside, `rope_parameters`.
#[derive(Deserialize, Default, PartialEq)]
struct RawRope {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    original_max_position_embeddings: Option<usize>,
    truncate: Option<bool>,
    attention_factor: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
}

impl RawRope {
    /// What a gpt-oss has whose config is silent.
    fn gpt_oss() -> Self {
        Self {
            rope_type: Some("yarn".into()),
            factor: Some(32.0),
            beta_fast: Some(32.0),
            beta_slow: Some(1.0),
            original_max_position_embeddings: Some(4096),
            truncate: Some(false),
            ..Self::default()
        }
    }
}

/// rms_norm_eps of a config that does not say.
pub const EPS: f64 = 1e-5;

fn default_eps() -> f64 {
    EPS
}

fn default_alpha() -> f64 {
    1.702
}

fn default_limit() -> f64 {
    7.0
}

fn default_context() -> usize {
    131_072
}

/// The window of a config that does not say.
const WINDOW: usize = 128;
/// rope_theta of a config that does not say.
const THETA: f64 = 150_000.0;
/// Greatest factor on cos and sin that is believed; gpt-oss has 1.35.
const MAX_ROPE_FACTOR: f64 = 1000.0;

impl Settings {
    /// Reads and checks the fields of a `config.json` that lies in `dir`.
    pub fn parse(dir: &Path, config: &Map<String, Value>, shapes: &ModelConfig) -> Result<Self> {
        let bad = |reason: String| Error::file(dir.join(CONFIG), reason);
        if config.get("sliding_window").is_some_and(Value::is_null) {
            return Err(bad("sliding_window is null, wanted a number of positions".into()));
        }
        let raw: Raw = serde_json::from_value(Value::Object(config.clone())).map_err(|e| bad(e.to_string()))?;
        Self::build(raw, shapes).map_err(bad)
    }

    fn build(raw: Raw, shapes: &ModelConfig) -> std::result::Result<Self, String> {
        if let Some(act) = raw.hidden_act.filter(|a| a != "silu") {
            return Err(format!("hidden_act is {act:?}, a gpt-oss has \"silu\""));
        }
        let top_k = raw.num_experts_per_tok.unwrap_or(4);
        if top_k == 0 || top_k > shapes.experts {
            return Err(format!("num_experts_per_tok is {top_k}, wanted 1 to num_local_experts, {}", shapes.experts));
        }
        if !shapes.heads.is_multiple_of(shapes.kv_heads) {
            let (heads, kv) = (shapes.heads, shapes.kv_heads);
            return Err(format!("num_key_value_heads {kv} does not divide num_attention_heads {heads}"));
        }
        if !shapes.head_dim.is_multiple_of(2) {
            return Err(format!("head_dim is {}, and an odd one has no halves to rotate", shapes.head_dim));
        }
        for (name, value) in
            [("rms_norm_eps", raw.rms_norm_eps), ("swiglu_alpha", raw.swiglu_alpha), ("swiglu_limit", raw.swiglu_limit)]
        {
            positive(name, value)?;
        }
        if raw.max_position_embeddings == 0 {
            return Err("max_position_embeddings is 0".into());
        }
        let window = raw.sliding_window.unwrap_or(WINDOW);
        let windows = windows(raw.layer_types.as_deref(), window, shapes.layers)?;
        // As transformers does: rope_scaling before rope_parameters, an absent, null or empty object for gpt-oss's own.
        let said = |rope: Option<RawRope>| rope.filter(|r| *r != RawRope::default());
        let rope = said(raw.rope_scaling).or(said(raw.rope_parameters));
        let rope = rope.unwrap_or_else(RawRope::gpt_oss);
        let theta = rope.rope_theta.or(raw.rope_theta).unwrap_or(THETA);
        if !(theta.is_finite() && theta > 1.0) {
            return Err(format!("rope_theta is {theta}, wanted more than 1"));
        }
        let context = raw.max_position_embeddings;
        let rope = Rope::new(shapes.head_dim, theta, yarn(&rope, context)?.as_ref());
        if !rope.frequencies.iter().all(|f| f.is_finite()) || rope.factor > MAX_ROPE_FACTOR {
            return Err("rope_scaling gives angles or factors that are no sensible numbers".into());
        }
        Ok(Self {
            eps: raw.rms_norm_eps as f32,
            windows,
            top_k,
            alpha: raw.swiglu_alpha as f32,
            limit: raw.swiglu_limit as f32,
            context,
            rope,
        })
    }
}

fn positive(name: &str, value: f64) -> std::result::Result<f64, String> {
    if value.is_finite() && value > 0.0 { Ok(value) } else { Err(format!("{name} is {value}, wanted more than 0")) }
}

/// The window of each layer; types alternate, sliding first, where the config is silent.
fn windows(types: Option<&[String]>, window: usize, layers: usize) -> std::result::Result<Vec<Option<usize>>, String> {
    let slides = types.is_none_or(|t| t.iter().any(|t| t == "sliding_attention"));
    if window == 0 && slides {
        return Err("sliding_window is 0: a token would not see itself".into());
    }
    let Some(types) = types else {
        return Ok((0..layers).map(|l| l.is_multiple_of(2).then_some(window)).collect());
    };
    if types.len() != layers {
        return Err(format!("layer_types has {} entries, num_hidden_layers is {layers}", types.len()));
    }
    let one = |t: &String| match t.as_str() {
        "full_attention" => Ok(None),
        "sliding_attention" => Ok(Some(window)),
        other => Err(format!("layer_types has {other:?}, wanted sliding_attention or full_attention")),
    };
    types.iter().map(one).collect()
}

fn yarn(r: &RawRope, context: usize) -> std::result::Result<Option<Yarn>, String> {
    match r.rope_type.as_deref() {
        None | Some("default") => return Ok(None),
        Some("yarn") => {}
        Some(other) => return Err(format!("rope_type is {other:?}, this tool knows yarn and default")),
    }
    let original = r.original_max_position_embeddings.unwrap_or(context);
    if original == 0 {
        return Err("original_max_position_embeddings is 0".into());
    }
    let factor = positive("rope factor", r.factor.unwrap_or(context as f64 / original as f64))?;
    let scale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * libm::log(factor) + 1.0 };
    let by_factor = match (r.mscale, r.mscale_all_dim) {
        (Some(m), Some(all)) if m != 0.0 && all != 0.0 => scale(m) / scale(all),
        _ => scale(1.0),
    };
    Ok(Some(Yarn {
        factor,
        beta_fast: positive("beta_fast", r.beta_fast.unwrap_or(32.0))?,
        beta_slow: positive("beta_slow", r.beta_slow.unwrap_or(1.0))?,
        original_context: original as f64,
        truncate: r.truncate.unwrap_or(true),
        attention_factor: positive("attention_factor", r.attention_factor.unwrap_or(by_factor))?,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(change: impl Fn(&mut Map<String, Value>)) -> Result<Settings> {
        let text = include_str!("../../../tests/fixtures/configs/gpt-oss-20b.json");
        let mut map: Map<String, Value> = serde_json::from_str(text).unwrap();
        change(&mut map);
        let shapes = ModelConfig::parse(Path::new("m"), &map)?;
        Settings::parse(Path::new("m"), &map, &shapes)
    }

    #[test]
    fn both_spellings_say_the_same() {
        let old = parse(|_| {}).unwrap();
        assert_eq!((old.top_k, old.windows[0], old.windows[1]), (4, Some(128), None));
        let new = parse(|m| {
            let mut rope = m.remove("rope_scaling").unwrap();
            rope["rope_theta"] = m.remove("rope_theta").unwrap();
            m.insert("rope_parameters".into(), rope);
        });
        assert_eq!(old, new.unwrap());
    }

    #[test]
    fn what_cannot_be_computed_is_named() {
        let error =
            |name: &str, value: Value| parse(|m| drop(m.insert(name.into(), value.clone()))).unwrap_err().to_string();
        assert!(error("num_experts_per_tok", 33.into()).contains("num_experts_per_tok is 33, wanted 1 to"));
        assert!(error("num_key_value_heads", 7.into()).contains("num_key_value_heads 7 does not divide"));
        assert!(error("layer_types", vec!["full_attention"].into()).contains("layer_types has 1 entries"));
        assert!(error("hidden_act", "gelu".into()).contains("hidden_act is \"gelu\""));
        assert!(error("rms_norm_eps", (-1.0).into()).contains("rms_norm_eps is -1, wanted more than 0"));
        assert!(error("rope_scaling", serde_json::json!({"rope_type": "linear"})).contains("rope_type is \"linear\""));
        assert!(error("head_dim", 63.into()).contains("head_dim is 63"));
        assert!(error("sliding_window", Value::Null).contains("sliding_window is null"));
        assert!(error("sliding_window", 0.into()).contains("sliding_window is 0"));
        assert!(error("rope_theta", 1.into()).contains("rope_theta is 1"));
        let no_types = parse(|m| {
            m.remove("layer_types");
            m.insert("sliding_window".into(), 0.into());
        });
        assert!(no_types.unwrap_err().to_string().contains("sliding_window is 0"));
        let wild = serde_json::json!({"rope_type": "yarn", "factor": 32, "attention_factor": 1e300});
        assert!(error("rope_scaling", wild).contains("no sensible numbers"));
    }

    #[test]
    fn what_the_config_leaves_out_is_gpt_oss_s_own() {
        let whole = parse(|_| {}).unwrap();
        for value in [None, Some(Value::Null), Some(serde_json::json!({}))] {
            let silent = parse(|m| {
                m.remove("rope_scaling");
                value.clone().map(|v| m.insert("rope_scaling".into(), v));
            });
            assert_eq!(silent.unwrap().rope, whole.rope, "{value:?}");
        }
        let scaled = parse(|m| {
            m["rope_scaling"]["mscale"] = 2.into();
            m["rope_scaling"]["mscale_all_dim"] = 1.into();
        });
        let want = (0.2 * 32f64.ln() + 1.0) / (0.1 * 32f64.ln() + 1.0);
        assert!((scaled.unwrap().rope.factor - want).abs() < 1e-12);
    }
}
