//! How a modifier says what becomes of which modules: a scheme by name, or `config_groups`.

use super::super::keys::{Object, suggestion};
use super::super::{ActOrder, GroupSize, LayerRecipe, Observer, SchemeName};
use crate::algorithms::Algorithm;
use crate::error::Result;
use crate::formats::minifloat::Minifloat;

/// Keys of every modifier that quantizes.
pub const KEYS: [&str; 10] = [
    "targets",
    "ignore",
    "scheme",
    "config_groups",
    "kv_cache_scheme",
    "weight_observer",
    "input_observer",
    "output_observer",
    "observer",
    "bypass_divisibility_checks",
];

/// compressed-tensors' preset schemes that this version has, with their group size (-1 for the whole row) and symmetry.
const PRESETS: [(&str, &str, i64, bool); 21] = [
    ("UNQUANTIZED", "keep", -1, true),
    ("W8A16", "w8a16", -1, true),
    ("W4A16", "w4a16", 128, true),
    ("W4A16_ASYM", "w4a16", 128, false),
    ("W8A8", "w8a8", -1, true),
    ("INT8", "w8a8", -1, true),
    ("W4A8", "w4a8", 128, true),
    ("INT4", "w4a8", 128, true),
    ("W4AFP8", "w4afp8", 128, true),
    ("W2A16", "w2a16", 128, true),
    ("W3A16", "w3a16", 128, true),
    ("W5A16", "w5a16", 128, true),
    ("W6A16", "w6a16", 128, true),
    ("W7A16", "w7a16", 128, true),
    ("FP8", "fp8_static", -1, true),
    ("FP8_DYNAMIC", "fp8", -1, true),
    ("FP8_BLOCK", "fp8_block", -1, true),
    ("MXFP4A16", "mxfp4", 32, true),
    ("MXFP6A16", "mxfp6", 32, true),
    ("MXFP8A16", "mxfp8", 32, true),
    ("NVFP4A16", "nvfp4", 16, true),
];

/// Those that it has not.
const OTHER_PRESETS: [&str; 5] = ["NVFP4", "MXFP4", "MXFP6", "MXFP8", "NVFP4_MXFP4"];

/// Modules and what becomes of them.
#[derive(Debug, Clone, PartialEq)]
pub struct Rule {
    /// Patterns; `Linear` is every linear layer.
    pub targets: Vec<String>,
    /// Patterns of modules that it leaves alone.
    pub ignore: Vec<String>,
    /// How.
    pub layer: LayerRecipe,
}

/// What a modifier says of layers.
pub struct Layers {
    /// In the file's order; empty where it has neither a scheme nor groups.
    pub rules: Vec<Rule>,
    /// The activation order that its groups name.
    pub actorder: Option<ActOrder>,
}

/// Reads what `modifier` says of layers, which `algorithm` rounds.
pub fn layers(modifier: &Object, algorithm: Algorithm) -> Result<Layers> {
    modifier.without("kv_cache_scheme", "a quantized cache is not in this version")?;
    if modifier.flag("bypass_divisibility_checks")? == Some(true) {
        return Err(modifier.error("bypass_divisibility_checks", "a group size must divide every row here"));
    }
    let targets = modifier.texts("targets")?.unwrap_or_else(|| vec!["Linear".into()]);
    let ignore = modifier.texts("ignore")?.unwrap_or_default();
    check_targets(modifier, "targets", &targets)?;
    let observer = observer(modifier)?;
    let mut found = Layers { rules: Vec::new(), actorder: None };
    if modifier.get("scheme").is_some() && modifier.get("config_groups").is_some() {
        return Err(modifier.refuse("has scheme and config_groups; give one of the two"));
    }
    for (name, targets) in schemes(modifier, &targets)? {
        let mut layer = preset(modifier, &name, algorithm)?;
        layer.observer = observer.unwrap_or_default();
        found.rules.push(Rule { targets, ignore: ignore.clone(), layer });
    }
    if let Some(groups) = modifier.object("config_groups")? {
        for key in groups.keys() {
            let group = groups.object(key)?.ok_or_else(|| groups.error(key, "is empty"))?;
            let (mut rule, order) = config_group(&group, algorithm)?;
            rule.layer.observer = observer.unwrap_or(rule.layer.observer);
            rule.ignore.clone_from(&ignore);
            match (found.actorder, order) {
                (Some(a), Some(b)) if a != b => {
                    return Err(group.refuse("names another actorder than a group before; GPTQ has one for all layers"));
                }
                _ => found.actorder = order.or(found.actorder),
            }
            found.rules.push(rule);
        }
    }
    Ok(found)
}

/// `scheme: W4A16` is for the modifier's targets; `scheme: {W4A16: [...]}` names its own.
fn schemes(modifier: &Object, targets: &[String]) -> Result<Vec<(String, Vec<String>)>> {
    match modifier.get("scheme") {
        None => Ok(Vec::new()),
        Some(serde_json::Value::String(name)) => Ok(vec![(name.clone(), targets.to_vec())]),
        Some(_) => {
            let map = modifier.object("scheme")?.expect("it is there");
            let one = |name: &str| {
                let targets = map.texts(name)?.ok_or_else(|| map.error(name, "has no targets"))?;
                check_targets(&map, name, &targets)?;
                Ok((name.to_owned(), targets))
            };
            map.keys().map(one).collect()
        }
    }
}

/// A word with a capital in front and no dot is the class of a module.
fn check_targets(o: &Object, key: &str, targets: &[String]) -> Result<()> {
    let is_class = |t: &&String| !t.contains([':', '.']) && t.starts_with(|c: char| c.is_ascii_uppercase());
    match targets.iter().filter(is_class).find(|t| *t != "Linear") {
        Some(class) => Err(o.error(key, format!("the class {class} is not quantized by this version; Linear is"))),
        None if targets.is_empty() => Err(o.error(key, "is empty")),
        None => Ok(()),
    }
}

fn preset(modifier: &Object, name: &str, algorithm: Algorithm) -> Result<LayerRecipe> {
    let upper = name.to_ascii_uppercase();
    if let Some((_, scheme, group, symmetric)) = PRESETS.iter().find(|p| p.0 == upper) {
        let group_size = usize::try_from(*group).map_or(GroupSize::Channel, GroupSize::Size);
        let layer = LayerRecipe { symmetric: *symmetric, group_size, ..LayerRecipe::new(scheme.parse()?) };
        return Ok(if layer.is_rounded() { LayerRecipe { algorithm, ..layer } } else { layer });
    }
    let names: Vec<&str> = PRESETS.iter().map(|p| p.0).collect();
    if OTHER_PRESETS.contains(&upper.as_str()) {
        return Err(modifier.error("scheme", format!("{name} is not in this version; it has {}", names.join(", "))));
    }
    Err(modifier.error("scheme", format!("there is no scheme {name}; {}", suggestion(name, &names))))
}

/// The observer that a modifier names for weights, beside its groups.
fn observer(modifier: &Object) -> Result<Option<Observer>> {
    modifier.without("output_observer", "outputs are not quantized by this version")?;
    modifier.without("input_observer", "inputs are rounded by their own extremes, token by token")?;
    let both = modifier.object("observer")?;
    if let Some(both) = &both {
        both.only(&["weights", "input", "output"])?;
        both.without("output", "outputs are not quantized by this version")?;
        both.without("input", "inputs are rounded by their own extremes, token by token")?;
        if modifier.get("weight_observer").is_some() {
            return Err(modifier.refuse("has weight_observer and observer; give one of the two"));
        }
        return parsed(both, "weights");
    }
    parsed(modifier, "weight_observer")
}

fn parsed<T: std::str::FromStr<Err = crate::Error>>(o: &Object, key: &str) -> Result<Option<T>> {
    o.text(key)?.map(|text| text.parse().map_err(|e| o.error(key, e))).transpose()
}

fn config_group(group: &Object, algorithm: Algorithm) -> Result<(Rule, Option<ActOrder>)> {
    group.only(&["targets", "weights", "input_activations", "output_activations", "format"])?;
    let targets = group.texts("targets")?.ok_or_else(|| group.refuse("has no targets"))?;
    check_targets(group, "targets", &targets)?;
    group.without("output_activations", "outputs are not quantized by this version")?;
    group.without("format", "the format follows from the scheme; leave it out")?;
    let inputs = group.object("input_activations")?;
    let rule = |layer| Rule { targets: targets.clone(), ignore: Vec::new(), layer };
    let Some(weights) = group.object("weights")? else {
        return match inputs {
            None => Ok((rule(LayerRecipe::new(SchemeName::Keep)), None)),
            Some(i) => Err(i.refuse("inputs alone are not quantized by this version; give weights too")),
        };
    };
    let kind = |o: &Object| -> Result<(String, i64)> {
        Ok((o.text("type")?.unwrap_or("int").to_owned(), o.integer("num_bits")?.unwrap_or(8)))
    };
    let of_inputs = |i: &Object| kind(i).and_then(|(name, bits)| Ok((name, bits, input_sharing(i)?)));
    let input = inputs.as_ref().map(of_inputs).transpose()?;
    let group_size = sharing(&weights)?;
    let (name, bits) = kind(&weights)?;
    let input = input.as_ref().map(|(name, bits, shared)| (name.as_str(), *bits, *shared));
    const TOKEN: InputSharing = InputSharing::Token;
    let scheme = match (name.as_str(), bits, input) {
        ("int", 2..=8, None) => SchemeName::weight_only(bits as u8),
        ("int", 2..=8, Some(("int", 8, TOKEN))) => SchemeName::Int { bits: bits as u8, int8_activations: true },
        ("float", 8, Some(("float", 8, TOKEN))) if group_size == GroupSize::Channel => SchemeName::Fp8,
        ("float", 8, Some(("float", 8, InputSharing::Fixed))) if group_size == GroupSize::Tensor => {
            SchemeName::Fp8Static
        }
        ("float", 8, Some(("float", 8, InputSharing::Groups))) if group_size == GroupSize::Block => {
            SchemeName::Fp8Block
        }
        ("float", 8, None) if group_size == GroupSize::Size(32) => SchemeName::Mx(Minifloat::E4M3),
        ("int", 4, Some(("float", 8, TOKEN))) => SchemeName::W4afp8,
        ("float", 8, None) => SchemeName::Float(Minifloat::E4M3),
        ("float", 6, None) if group_size == GroupSize::Size(32) => SchemeName::Mx(Minifloat::E2M3),
        ("float", 4, None) if group_size == GroupSize::Size(32) => SchemeName::Mx(Minifloat::E2M1),
        ("float", 4, None) if group_size == GroupSize::Size(16) => SchemeName::Nvfp4,
        _ => {
            let inputs = input.map_or("none".into(), |(name, bits, _)| format!("{name}{bits}"));
            return Err(group.refuse(format!(
                "weights {name}{bits} with inputs {inputs} and these strategies are not in this version; it has int2 to int8, \
                 with inputs int8 too, int4 with inputs float8; float8 alone, a channel, tensor or block of 128 by 128 with \
                 inputs float8; float8, float6 and float4 in groups of 32 (MX), float4 in groups of 16 (NVFP4)"
            )));
        }
    };
    let layer = LayerRecipe {
        algorithm,
        scheme,
        symmetric: weights.flag("symmetric")?.unwrap_or(true),
        group_size,
        observer: parsed(&weights, "observer")?.unwrap_or_default(),
    };
    Ok((rule(layer), actorder(&weights)?))
}

const ARGUMENTS: [&str; 12] = [
    "num_bits",
    "type",
    "symmetric",
    "group_size",
    "strategy",
    "block_structure",
    "dynamic",
    "actorder",
    "scale_dtype",
    "zp_dtype",
    "observer",
    "observer_kwargs",
];

/// What all quantization arguments have in common.
fn arguments(o: &Object) -> Result<()> {
    o.only(&ARGUMENTS)?;
    // The type of scales follows from the format.
    if !matches!(o.text("scale_dtype")?, None | Some("torch.uint8" | "torch.float8_e4m3fn")) {
        return Err(o.error("scale_dtype", "scales are of the weight's own type, and bytes in MX and NVFP4"));
    }
    o.without("zp_dtype", "zero points are of the codes' type")?;
    match o.object("observer_kwargs")? {
        Some(kwargs) => kwargs.only(&[]).map_err(|_| o.error("observer_kwargs", "an observer has no settings here")),
        None => Ok(()),
    }
}

/// Which inputs share a scale.
#[derive(Clone, Copy, PartialEq, Eq)]
enum InputSharing {
    /// Those of a token, each its own.
    Token,
    /// 128 of a token.
    Groups,
    /// All, found by calibration.
    Fixed,
}

fn input_sharing(inputs: &Object) -> Result<InputSharing> {
    arguments(inputs)?;
    if inputs.flag("symmetric")? == Some(false) {
        return Err(inputs.error("symmetric", "inputs are rounded symmetrically here"));
    }
    inputs.without("actorder", "inputs have no order")?;
    match (inputs.flag("dynamic")? == Some(true), inputs.text("strategy")?, inputs.integer("group_size")?) {
        (true, None | Some("token"), None) => Ok(InputSharing::Token),
        (true, Some("group"), Some(128)) => Ok(InputSharing::Groups),
        (false, None | Some("tensor"), None) => Ok(InputSharing::Fixed),
        _ => Err(inputs.refuse(
            "inputs are rounded a token (dynamic: true), in groups of 128 (dynamic: true, strategy: group), or all with one \
             scale (dynamic: false, strategy: tensor)",
        )),
    }
}

/// Strategy and group size of weights; either says the other, as in compressed-tensors.
fn sharing(weights: &Object) -> Result<GroupSize> {
    arguments(weights)?;
    if weights.flag("dynamic")? == Some(true) {
        return Err(weights.error("dynamic", "a weight's scales are fixed"));
    }
    let block = match weights.get("block_structure") {
        None | Some(serde_json::Value::Null) => false,
        Some(sizes) if *sizes == serde_json::json!([128, 128]) => true,
        Some(sizes) => {
            return Err(weights.error("block_structure", format!("is {sizes}; blocks are of [128, 128] here")));
        }
    };
    match (weights.text("strategy")?, weights.integer("group_size")?) {
        (Some("block"), None) if block => Ok(GroupSize::Block),
        (Some("block"), _) => Err(weights.refuse("strategy block needs block_structure: [128, 128] and no group_size")),
        (Some("tensor_group"), Some(n @ 1..)) => Ok(GroupSize::Size(n as usize)),
        (Some("tensor") | None, None) => Ok(GroupSize::Tensor),
        (None | Some("group"), Some(n @ 1..)) => Ok(GroupSize::Size(n as usize)),
        (Some("group"), None) => Err(weights.refuse("strategy group needs a group_size")),
        (Some("channel"), None | Some(-1)) | (None, Some(-1)) => Ok(GroupSize::Channel),
        (Some("channel"), Some(n)) => Err(weights.error("group_size", format!("is {n} beside strategy channel"))),
        (strategy, Some(n)) if n < 1 => {
            Err(weights.error("group_size", format!("is {n} beside strategy {}", strategy.unwrap_or("none"))))
        }
        (strategy, _) => {
            let found = strategy.unwrap_or("none");
            Err(weights
                .error("strategy", format!("{found} is not in this version; it has group, channel, tensor and block")))
        }
    }
}

/// `false` and nothing leave it to the modifier; `true` means `group` there.
pub fn actorder(o: &Object) -> Result<Option<ActOrder>> {
    let word = match o.get("actorder") {
        None => return Ok(None),
        Some(serde_json::Value::Bool(on)) => {
            if *on {
                "group"
            } else {
                "off"
            }
        }
        Some(_) => o.text("actorder")?.unwrap_or_default(),
    };
    word.parse().map(Some).map_err(|e| o.error("actorder", e))
}
