//! The modifiers, each with its keys.

use super::super::keys::Object;
use super::super::pattern::Patterns;
use super::super::{ActOrder, Awq, Gptq, LayerRecipe, Mask, Pruner, Recipe, SchemeName, SmoothQuant, Sparsity};
use super::scheme::{self, Rule};
use super::{assemble, unspoken};
use crate::algorithms::Algorithm;
use crate::error::Result;

/// Names, and what reads each.
pub const MODIFIERS: [(&str, Reader); 6] = [
    ("GPTQModifier", Reading::gptq),
    ("QuantizationModifier", Reading::quantization),
    ("AWQModifier", Reading::awq),
    ("SmoothQuantModifier", Reading::smoothquant),
    ("SparseGPTModifier", Reading::sparsegpt),
    ("WandaPruningModifier", Reading::wanda),
];

type Reader = fn(&mut Reading, &Object) -> Result<()>;

const GPTQ: [&str; 6] =
    ["block_size", "dampening_frac", "actorder", "offload_hessians", "sequential_update", "sequential_targets"];
const AWQ: [&str; 6] =
    ["mappings", "duo_scaling", "n_grid", "offload_device", "sequential_targets", "cache_chunk_size_batches"];
const SMOOTHQUANT: [&str; 5] =
    ["smoothing_strength", "mappings", "ignore", "num_calibration_steps", "calibration_function"];
const PRUNING: [&str; 9] = [
    "sparsity",
    "sparsity_profile",
    "mask_structure",
    "owl_m",
    "owl_lmbda",
    "sequential_update",
    "sequential_targets",
    "targets",
    "ignore",
];
const SPARSEGPT: [&str; 4] = ["block_size", "dampening_frac", "preserve_sparsity_mask", "offload_hessians"];

/// What was read so far.
#[derive(Default)]
pub struct Reading {
    /// Of all modifiers; later ones count first.
    rules: Vec<Rule>,
    gptq: Option<Gptq>,
    awq: Option<Awq>,
    /// True behind an AWQModifier without a scheme; with what it ignores.
    awq_waits: Option<Vec<String>>,
    smoothquant: Option<SmoothQuant>,
    sparsity: Option<Sparsity>,
    sequential_update: Option<bool>,
}

impl Reading {
    /// Reads one modifier.
    pub fn modifier(&mut self, name: &str, o: &Object) -> Result<()> {
        let (_, read) = MODIFIERS.iter().find(|m| m.0 == name).expect("the caller looked it up");
        if self.awq_waits.is_some() && name != "QuantizationModifier" {
            return Err(o.refuse(
                "stands behind an AWQModifier without a scheme; AWQ here rounds to nearest, so a QuantizationModifier follows",
            ));
        }
        read(self, o)
    }

    /// The recipe that the modifiers make.
    pub fn finish(self, root: &Object) -> Result<Recipe> {
        if self.awq_waits.is_some() {
            return Err(root.refuse("AWQModifier has no scheme and no QuantizationModifier behind it that has one"));
        }
        if self.rules.is_empty() && self.sparsity.is_none() {
            return Err(root.refuse("has no modifier that quantizes or prunes"));
        }
        let keep = LayerRecipe::new(SchemeName::Keep);
        let mut recipe = Recipe::new(keep.clone(), keep);
        recipe.sparsity = self.sparsity;
        recipe.smoothquant = self.smoothquant;
        recipe.gptq = self.gptq.unwrap_or_default();
        recipe.awq = self.awq.unwrap_or_default();
        recipe.calibration.sequential_update = self.sequential_update.unwrap_or(true);
        (recipe.experts, recipe.mw) = (unspoken(&recipe), unspoken(&recipe));
        assemble(&mut recipe, self.rules);
        Ok(recipe)
    }

    /// Adds a modifier's rules: the class first, then regular expressions, then names, so that the last one that matches
    /// is the one that llm-compressor takes.
    fn add(&mut self, rules: Vec<Rule>) {
        let mut single: Vec<(u8, Rule)> = Vec::new();
        for rule in rules {
            for target in &rule.targets {
                let rank = if target == "Linear" { 0 } else { 2 - u8::from(target.starts_with("re:")) };
                single.push((rank, Rule { targets: vec![target.clone()], ..rule.clone() }));
            }
        }
        // Among several it takes the first in alphabetical order.
        single.sort_by(|(a, x), (b, y)| a.cmp(b).then_with(|| y.targets.cmp(&x.targets)));
        for (_, rule) in single {
            match self.rules.last_mut().filter(|r| r.layer == rule.layer && r.ignore == rule.ignore) {
                Some(last) if last.targets[0] != "Linear" && rule.targets[0] != "Linear" => {
                    last.targets.extend(rule.targets);
                }
                _ => self.rules.push(rule),
            }
        }
    }

    fn gptq(&mut self, o: &Object) -> Result<()> {
        o.only(&[&scheme::KEYS[..], &GPTQ].concat())?;
        sequential_targets(o)?;
        self.sequential(o)?;
        o.flag("offload_hessians")?;
        let layers = scheme::layers(o, Algorithm::Gptq)?;
        if layers.rules.is_empty() {
            return Err(o.refuse("has neither scheme nor config_groups"));
        }
        let own = scheme::actorder(o)?;
        if let (Some(a), Some(b)) = (own, layers.actorder)
            && a != b
        {
            return Err(o.error("actorder", "differs from that of config_groups; give one of the two"));
        }
        let default = Gptq::default();
        let gptq = Gptq {
            block_size: o.count("block_size")?.unwrap_or(default.block_size),
            dampening_frac: o.number("dampening_frac")?.unwrap_or(default.dampening_frac),
            actorder: layers.actorder.or(own).unwrap_or(ActOrder::Static),
            ..Gptq::default()
        };
        if self.gptq.as_ref().is_some_and(|g| *g != gptq) {
            return Err(o.refuse(
                "differs from the GPTQModifier before in block_size, dampening_frac or actorder; here they are one for all layers",
            ));
        }
        self.gptq = Some(gptq);
        self.add(layers.rules);
        Ok(())
    }

    fn quantization(&mut self, o: &Object) -> Result<()> {
        o.only(&scheme::KEYS)?;
        let waits = self.awq_waits.take();
        let algorithm = if waits.is_some() { Algorithm::Awq } else { Algorithm::Rtn };
        let layers = scheme::layers(o, algorithm)?;
        if layers.rules.is_empty() {
            return Err(o.refuse("has neither scheme nor config_groups"));
        }
        if let Some(alone) = waits.iter().flatten().find(|p| !layers.rules[0].ignore.contains(p)) {
            return Err(o.error("ignore", format!("the AWQModifier before ignores {alone:?}, this one must too")));
        }
        self.add(layers.rules);
        Ok(())
    }

    fn awq(&mut self, o: &Object) -> Result<()> {
        o.only(&[&scheme::KEYS[..], &AWQ].concat())?;
        sequential_targets(o)?;
        mappings(o)?;
        if o.text("duo_scaling").is_ok_and(|d| d == Some("both")) {
            return Err(o.error("duo_scaling", "both is not in this version; it has true and false"));
        }
        let default = Awq::default();
        let awq = Awq {
            n_grid: o.count("n_grid")?.unwrap_or(default.n_grid),
            duo_scaling: o.flag("duo_scaling")?.unwrap_or(default.duo_scaling),
        };
        if self.awq.as_ref().is_some_and(|a| *a != awq) {
            return Err(o.refuse(
                "differs from the AWQModifier before in n_grid or duo_scaling; here they are one for all layers",
            ));
        }
        self.awq = Some(awq);
        let layers = scheme::layers(o, Algorithm::Awq)?;
        if layers.rules.is_empty() {
            self.awq_waits = Some(o.texts("ignore")?.unwrap_or_default());
        }
        self.add(layers.rules);
        Ok(())
    }

    fn smoothquant(&mut self, o: &Object) -> Result<()> {
        o.only(&SMOOTHQUANT)?;
        o.without("num_calibration_steps", "the whole text is used")?;
        o.without("calibration_function", "is Python")?;
        if o.texts("ignore")?.is_some_and(|i| !i.is_empty()) {
            return Err(o.error("ignore", "every layer's pairs are smoothed here; leave it out"));
        }
        mappings(o)?;
        if self.smoothquant.is_some() {
            return Err(o.refuse("stands twice"));
        }
        self.smoothquant = Some(SmoothQuant { strength: o.number("smoothing_strength")?.unwrap_or(0.5) });
        Ok(())
    }

    fn sparsegpt(&mut self, o: &Object) -> Result<()> {
        o.only(&[&PRUNING[..], &SPARSEGPT].concat())?;
        o.flag("offload_hessians")?;
        if o.flag("preserve_sparsity_mask")? == Some(true) {
            return Err(o.error("preserve_sparsity_mask", "is not in this version"));
        }
        self.prune(o, Pruner::Sparsegpt)
    }

    fn wanda(&mut self, o: &Object) -> Result<()> {
        o.only(&PRUNING)?;
        self.prune(o, Pruner::Wanda)
    }

    fn prune(&mut self, o: &Object, algorithm: Pruner) -> Result<()> {
        for key in ["sparsity_profile", "owl_m", "owl_lmbda"] {
            o.without(key, "one sparsity is for all layers here")?;
        }
        sequential_targets(o)?;
        self.sequential(o)?;
        if self.sparsity.is_some() {
            return Err(o.refuse("is the second modifier that prunes; one is for all layers here"));
        }
        let mask: Mask = match o.text("mask_structure")? {
            Some(mask) => mask.parse().map_err(|e| o.error("mask_structure", e))?,
            None => Mask::Unstructured,
        };
        let sparsity = match (mask, o.number("sparsity")?) {
            (_, Some(s)) => s,
            (Mask::Structured { zeros, of }, None) => zeros as f64 / of as f64,
            (Mask::Unstructured, None) => return Err(o.refuse("has neither sparsity nor mask_structure")),
        };
        let targets = o.texts("targets")?.unwrap_or_else(|| vec!["Linear".into()]);
        let mut ignore = o.texts("ignore")?.unwrap_or_default();
        let linear = targets.iter().any(|t| t == "Linear");
        if linear {
            super::not_linear(&mut ignore, &[]);
        }
        let targets = if linear { Vec::new() } else { targets };
        let default = Gptq::default();
        self.sparsity = Some(Sparsity {
            algorithm,
            mask,
            sparsity,
            block_size: o.count("block_size")?.unwrap_or(default.block_size),
            dampening_frac: o.number("dampening_frac")?.unwrap_or(default.dampening_frac),
            targets,
            ignore,
        });
        Ok(())
    }

    fn sequential(&mut self, o: &Object) -> Result<()> {
        let Some(update) = o.flag("sequential_update")? else { return Ok(()) };
        if self.sequential_update.is_some_and(|u| u != update) {
            return Err(o.error("sequential_update", "differs from that of the modifier before"));
        }
        self.sequential_update = Some(update);
        Ok(())
    }
}

fn sequential_targets(o: &Object) -> Result<()> {
    match o.texts("sequential_targets")? {
        Some(t) if t != ["GptOssDecoderLayer"] => {
            Err(o.error("sequential_targets", "calibration goes by GptOssDecoderLayer here; leave it out"))
        }
        _ => Ok(()),
    }
}

/// Norms, and the layers behind them that see what they give.
const EXACT: [(&str, &[&str]); 2] = [
    ("input_layernorm", &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    ("post_attention_layernorm", &["mlp.router", "mlp.experts.0.gate_proj", "mlp.experts.0.up_proj"]),
];

/// The rest of a layer's linear modules, which patterns must not match.
const REST: [&str; 2] = ["self_attn.o_proj", "mlp.experts.0.down_proj"];

/// Accepts the mappings that are exact for gpt-oss, both of them: an object with smooth_layer and balance_layers, or
/// SmoothQuant's pair of a list and a norm.
fn mappings(o: &Object) -> Result<()> {
    const WHY: &str = "exact for gpt-oss are input_layernorm with q_proj, k_proj, v_proj and post_attention_layernorm with \
                       router, gate_proj, up_proj; give those two or leave mappings out";
    let Some(list) = o.get("mappings") else { return Ok(()) };
    let mut found = Vec::new();
    for mapping in list.as_array().into_iter().flatten() {
        let parts = match mapping.as_array() {
            Some(pair) if pair.len() == 2 => Some((&pair[1], &pair[0])),
            Some(_) => None,
            None => mapping.get("smooth_layer").zip(mapping.get("balance_layers")),
        };
        let texts = |v: &serde_json::Value| -> Option<Vec<String>> {
            match v {
                serde_json::Value::String(s) => Some(vec![s.clone()]),
                v => v.as_array()?.iter().map(|s| s.as_str().map(str::to_owned)).collect(),
            }
        };
        let Some((smooth, balance)) = parts.and_then(|(s, b)| texts(s).zip(texts(b))) else {
            return Err(o.error("mappings", "each is {smooth_layer, balance_layers} or [[layers], norm]"));
        };
        found.push(exact(&Patterns::new(&smooth)?, &Patterns::new(&balance)?).ok_or_else(|| o.error("mappings", WHY))?);
    }
    found.sort_unstable();
    if found == [0, 1] { Ok(()) } else { Err(o.error("mappings", WHY)) }
}

/// Which of [`EXACT`] a mapping is.
fn exact(smooth: &Patterns, balance: &Patterns) -> Option<usize> {
    let hits = |patterns: &Patterns, name: &str| patterns.any(&format!("model.layers.0.{name}"));
    let norms: Vec<usize> = (0..2).filter(|&i| hits(smooth, EXACT[i].0)).collect();
    let [at] = norms[..] else { return None };
    let others = EXACT[1 - at].1.iter().chain(&REST);
    let all = EXACT[at].1.iter().all(|name| hits(balance, name));
    (all && !others.into_iter().any(|name| hits(balance, name))).then_some(at)
}
