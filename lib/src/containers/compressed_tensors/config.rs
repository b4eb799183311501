//! `quantization_config` of this container: written from a plan, read back from a checkpoint.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::{Activations, Format, Scheme, Strategy};
use crate::checkpoint::CONFIG;
use crate::checkpoint::source::Checkpoint;
use crate::error::{Error, Result};
use crate::formats::activations;
use crate::formats::int::IntFormat;
use crate::formats::minifloat::Minifloat;
use crate::formats::ternary::Trits;
use crate::formats::{FP8, MXFP4, NumberFormat, mx, nvfp4};
use crate::model::Proj;

/// The version of compressed-tensors whose layout is written.
const VERSION: &str = "0.20.0";

/// As config.json spells the types of MX scales and of NVFP4's.
const E8M0: &str = "torch.uint8";
const E4M3: &str = "torch.float8_e4m3fn";

/// Types of our own.
const TERNARY: &str = "ternary";
const TERNARY_BASE3: &str = "ternary-base3";

/// A regular expression for every module of one projection.
pub fn target(proj: Proj) -> String {
    match proj {
        Proj::Embed => "re:.*embed_tokens$".into(),
        Proj::LmHead => "re:.*lm_head$".into(),
        Proj::Router => r"re:.*mlp\.router$".into(),
        Proj::Q | Proj::K | Proj::V | Proj::O => format!(r"re:.*attn\.{}$", proj.name()),
        Proj::Gate | Proj::Up | Proj::Down => format!(r"re:.*mlp\.experts\.\d+\.{}$", proj.name()),
    }
}

/// Quantization arguments of a weight.
fn weight_arguments(scheme: &Scheme) -> Value {
    let (strategy, group_size, block) = match scheme.strategy {
        Strategy::Group(n) if scheme.weights == NumberFormat::Nvfp4 => ("tensor_group", Some(n), None),
        Strategy::Group(n) => ("group", Some(n), None),
        Strategy::Channel => ("channel", None, None),
        Strategy::Tensor => ("tensor", None, None),
        Strategy::Block(rows, columns) => ("block", None, Some([rows, columns])),
    };
    let mut arguments = arguments(scheme.weights, strategy, group_size, false);
    arguments["block_structure"] = json!(block);
    match scheme.weights {
        NumberFormat::Mx(_) => arguments["scale_dtype"] = E8M0.into(),
        NumberFormat::Nvfp4 => arguments["scale_dtype"] = E4M3.into(),
        _ => {}
    }
    arguments
}

fn input_arguments(activations: Activations) -> Value {
    let int8 = NumberFormat::Int(IntFormat { num_bits: 8, symmetric: true });
    match activations {
        Activations::Float => Value::Null,
        Activations::DynamicTokenInt8 => arguments(int8, "token", None, true),
        Activations::DynamicTokenFp8 => arguments(FP8, "token", None, true),
        Activations::DynamicGroupFp8 => arguments(FP8, "group", Some(activations::GROUP), true),
        Activations::StaticFp8 => arguments(FP8, "tensor", None, false),
    }
}

fn arguments(format: NumberFormat, strategy: &str, group_size: Option<usize>, dynamic: bool) -> Value {
    json!({
        "num_bits": format.bits(),
        "type": match format {
            NumberFormat::Int(_) => "int",
            NumberFormat::Ternary(Trits::Quarters) => TERNARY,
            NumberFormat::Ternary(Trits::Fifths) => TERNARY_BASE3,
            _ => "float",
        },
        "symmetric": format.symmetric(),
        "group_size": group_size,
        "strategy": strategy,
        "block_structure": null,
        "dynamic": dynamic,
        "actorder": null,
        "observer": if dynamic { Value::Null } else { "memoryless_minmax".into() },
        "observer_kwargs": {},
    })
}

/// The whole `quantization_config` for these schemes, each with its targets, and the modules that stay as they are.
pub fn encode(groups: &[(Scheme, Vec<String>)], ignore: &[String]) -> Value {
    let name = |f: Format| serde_json::to_value(f).expect("a unit variant");
    let config_groups: Map<String, Value> = groups
        .iter()
        .enumerate()
        .map(|(i, (scheme, targets))| {
            let group = json!({
                "targets": targets,
                "weights": weight_arguments(scheme),
                "input_activations": input_arguments(scheme.activations),
                "output_activations": null,
                "format": name(scheme.format()),
            });
            (format!("group_{i}"), group)
        })
        .collect();
    let mut formats: Vec<Format> = groups.iter().map(|g| g.0.format()).collect();
    formats.sort();
    formats.dedup();
    let format = if let [one] = formats[..] { name(one) } else { "mixed-precision".into() };
    json!({
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "global_compression_ratio": null,
        "kv_cache_scheme": null,
        "config_groups": config_groups,
        "ignore": ignore,
        "version": VERSION,
    })
}

/// The scheme that a checkpoint's `quantization_config` gives `module`; `None` where it is not this container's or the
/// module is ignored or in no group.
pub fn scheme_of(checkpoint: &Checkpoint, module: &str) -> Result<Option<Scheme>> {
    let file = checkpoint.dir.join(CONFIG);
    match checkpoint.config.get("quantization_config") {
        Some(Value::Object(config)) => lookup(config, module).map_err(|reason| Error::file(file, reason)),
        _ => Ok(None),
    }
}

/// [`scheme_of`] on the bare object; the error says what is wrong with it.
pub fn lookup(config: &Map<String, Value>, module: &str) -> std::result::Result<Option<Scheme>, String> {
    if config.get("quant_method").and_then(Value::as_str) != Some("compressed-tensors") {
        return Ok(None);
    }
    let strings = |v: Option<&Value>| -> Vec<String> {
        let list = v.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        list.iter().filter_map(|s| s.as_str().map(str::to_owned)).collect()
    };
    if matches_any(&strings(config.get("ignore")), module)? {
        return Ok(None);
    }
    let Some(Value::Object(groups)) = config.get("config_groups") else {
        return Err("quantization_config has no object config_groups".into());
    };
    let ordered: BTreeMap<&String, &Value> = groups.iter().collect();
    for (name, group) in ordered {
        if matches_any(&strings(group.get("targets")), module)? {
            return parse_group(group).map(Some).map_err(|e| format!("quantization_config: {name}: {e}"));
        }
    }
    Ok(None)
}

fn matches_any(patterns: &[String], module: &str) -> std::result::Result<bool, String> {
    for p in patterns {
        // "Linear" is a class: every linear layer, of which each module here is one.
        if p == "Linear" || crate::recipe::pattern::matches(p, module).map_err(|e| e.to_string())? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn parse_group(group: &Value) -> std::result::Result<Scheme, String> {
    let arguments = &group["weights"];
    let block = || -> Option<(usize, usize)> {
        let sizes = arguments["block_structure"].as_array()?;
        let size = |v: &Value| v.as_u64().filter(|n| (1..=1 << 20).contains(n)).map(|n| n as usize);
        match &sizes[..] {
            [rows, columns] => Some((size(rows)?, size(columns)?)),
            _ => None,
        }
    };
    let strategy = match (arguments["strategy"].as_str(), arguments["group_size"].as_u64(), block()) {
        (Some("group" | "tensor_group"), Some(n @ 1..), _) => Strategy::Group(n as usize),
        (Some("channel"), ..) => Strategy::Channel,
        (Some("tensor"), ..) => Strategy::Tensor,
        (Some("block"), _, Some((rows, columns))) => Strategy::Block(rows, columns),
        (s, g, _) => return Err(format!("strategy {s:?} with group_size {g:?} is not read by this version")),
    };
    let weights = parse_weights(arguments, strategy)?;
    let scheme = Scheme { weights, strategy, activations: parse_inputs(&group["input_activations"])? };
    match scheme.stored() {
        Some(_) => Ok(scheme),
        None => Err(format!("float weights with {arguments} are not read by this version")),
    }
}

fn parse_inputs(inputs: &Value) -> std::result::Result<Activations, String> {
    if inputs.is_null() {
        return Ok(Activations::Float);
    }
    if inputs["symmetric"].as_bool() == Some(false) {
        return Err("input_activations that are not symmetric are not read by this version".into());
    }
    let what = (inputs["type"].as_str(), inputs["num_bits"].as_u64(), inputs["dynamic"].as_bool());
    match (what, inputs["strategy"].as_str(), inputs["group_size"].as_u64()) {
        ((Some("int"), Some(8), Some(true)), Some("token"), _) => Ok(Activations::DynamicTokenInt8),
        ((Some("float"), Some(8), Some(true)), Some("token"), _) => Ok(Activations::DynamicTokenFp8),
        ((Some("float"), Some(8), Some(true)), Some("group"), Some(128)) => Ok(Activations::DynamicGroupFp8),
        ((Some("float"), Some(8), Some(false)), Some("tensor"), _) => Ok(Activations::StaticFp8),
        _ => Err(format!("input_activations {inputs} are not read by this version")),
    }
}

fn parse_weights(arguments: &Value, strategy: Strategy) -> std::result::Result<NumberFormat, String> {
    const MX: Strategy = Strategy::Group(mx::BLOCK);
    const NV: Strategy = Strategy::Group(nvfp4::GROUP);
    let (kind, num_bits) = (&arguments["type"], &arguments["num_bits"]);
    let (bits, scales) = (num_bits.as_u64(), arguments["scale_dtype"].as_str());
    let symmetric = arguments["symmetric"].as_bool().unwrap_or(true);
    match (kind.as_str(), bits, strategy, scales, symmetric) {
        (Some("int"), Some(n @ 2..=8), _, None, _) => Ok(NumberFormat::Int(IntFormat { num_bits: n as u8, symmetric })),
        (Some("int"), ..) => Err(format!("num_bits is {num_bits} with scales {scales:?}, wanted 2 to 8 and none")),
        (Some("float"), Some(4), NV, None | Some(E4M3), true) => Ok(NumberFormat::Nvfp4),
        (Some("float"), Some(4), MX, None | Some(E8M0), true) => Ok(MXFP4),
        (Some("float"), Some(6), MX, None | Some(E8M0), true) => Ok(NumberFormat::Mx(Minifloat::E2M3)),
        (Some("float"), Some(8), MX, Some(E8M0), true) => Ok(NumberFormat::Mx(Minifloat::E4M3)),
        (Some("float"), Some(8), _, None, true) => Ok(FP8),
        (Some("float"), ..) => Err(format!("float weights with {arguments} are not read by this version")),
        (Some(TERNARY), Some(2), Strategy::Group(_) | Strategy::Channel, None, true) => {
            Ok(NumberFormat::Ternary(Trits::Quarters))
        }
        (Some(TERNARY_BASE3), Some(2), Strategy::Group(_) | Strategy::Channel, None, true) => {
            Ok(NumberFormat::Ternary(Trits::Fifths))
        }
        (Some(TERNARY | TERNARY_BASE3), ..) => {
            Err(format!("ternary weights with {arguments} are not read by this version"))
        }
        _ => Err(format!("weights of type {kind} are not read by this version; int, float and ternary are")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_scheme_is_read_back_and_floats_of_other_kinds_are_refused() {
        let int = |num_bits, symmetric| NumberFormat::Int(IntFormat { num_bits, symmetric });
        for (weights, strategy, activations, format) in [
            (int(3, true), Strategy::Group(64), Activations::Float, "pack-quantized"),
            (int(5, false), Strategy::Channel, Activations::Float, "pack-quantized"),
            (int(4, true), Strategy::Group(96), Activations::DynamicTokenInt8, "int-quantized"),
            (FP8, Strategy::Channel, Activations::DynamicTokenFp8, "float-quantized"),
            (FP8, Strategy::Tensor, Activations::StaticFp8, "float-quantized"),
            (FP8, Strategy::Block(128, 128), Activations::DynamicGroupFp8, "float-quantized"),
            (FP8, Strategy::Channel, Activations::Float, "naive-quantized"),
            (int(4, true), Strategy::Group(128), Activations::DynamicTokenFp8, "int-quantized"),
            (int(8, false), Strategy::Tensor, Activations::Float, "pack-quantized"),
            (MXFP4, Strategy::Group(32), Activations::Float, "mxfp4-pack-quantized"),
            (NumberFormat::Mx(Minifloat::E2M3), Strategy::Group(32), Activations::Float, "mxfp6-pack-quantized"),
            (NumberFormat::Mx(Minifloat::E4M3), Strategy::Group(32), Activations::Float, "mxfp8-quantized"),
            (NumberFormat::Nvfp4, Strategy::Group(16), Activations::Float, "nvfp4-pack-quantized"),
            (NumberFormat::Ternary(Trits::Quarters), Strategy::Group(64), Activations::Float, "ternary-quantized"),
            (NumberFormat::Ternary(Trits::Fifths), Strategy::Channel, Activations::Float, "ternary-base3-quantized"),
        ] {
            let scheme = Scheme { weights, strategy, activations };
            let Value::Object(config) = encode(&[(scheme, vec![target(Proj::Q)])], &[]) else { panic!("an object") };
            assert_eq!(config["format"], format);
            let module = "model.layers.0.self_attn.q_proj";
            assert_eq!(lookup(&config, module), Ok(Some(scheme)));
            if !matches!(weights, NumberFormat::Int(_)) {
                for (field, value) in [("num_bits", 5.into()), ("symmetric", false.into()), ("scale_dtype", "x".into())]
                {
                    let mut config = config.clone();
                    config["config_groups"]["group_0"]["weights"][field] = value;
                    assert!(lookup(&config, module).unwrap_err().contains("are not read by this version"), "{field}");
                }
            }
        }
    }

    #[test]
    fn inputs_are_read_or_refused() {
        let scheme = Scheme {
            weights: NumberFormat::Int(IntFormat { num_bits: 8, symmetric: true }),
            strategy: Strategy::Channel,
            activations: Activations::DynamicTokenInt8,
        };
        let Value::Object(config) = encode(&[(scheme, vec![target(Proj::Q)])], &[]) else { panic!("an object") };
        let with = |field: &str, value: Value| {
            let mut config = config.clone();
            config["config_groups"]["group_0"]["input_activations"][field] = value;
            lookup(&config, "model.layers.0.self_attn.q_proj")
        };
        assert_eq!(with("dynamic", true.into()), Ok(Some(scheme)));
        let fp8 = Scheme { activations: Activations::DynamicTokenFp8, ..scheme };
        assert_eq!(with("type", "float".into()), Ok(Some(fp8)));
        assert!(with("symmetric", false.into()).unwrap_err().contains("not symmetric"));
        for (field, value) in [("num_bits", 4.into()), ("dynamic", false.into()), ("strategy", Value::from("group"))] {
            assert!(with(field, value).unwrap_err().contains("are not read by this version"), "{field}");
        }
    }
}
