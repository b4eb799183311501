//! llm-compressor's `recipe.yaml`: stages of modifiers.
//!
//! As there: a stage is `NAME_stage: {NAME_modifiers: {Modifier: {...}}}`, and modifiers may also stand in a stage or in the
//! file itself; a later modifier counts before an earlier one; within a modifier an exact name counts before a regular
//! expression and that before the class `Linear`; what no target matches stays as it is. An AWQModifier without a scheme
//! takes that of the QuantizationModifier behind it. Different here: smoothing is over the pairs that are exact for gpt-oss,
//! so `mappings` may only name those; and a name in `ignore` or `targets` may be any whole components of a module's name.

mod modifiers;
mod scheme;

use std::path::Path;

use std::time::Duration;

use serde_json::Value;

use self::modifiers::{MODIFIERS, Reading};
use self::scheme::Rule;
use super::keys::{self, Object, suggestion};
use super::pattern::Patterns;
use super::simplify::simplify;
use super::{LayerRecipe, Override, Recipe, SchemeName};
use crate::error::{Error, Result};
use crate::guard::{Limits, limited};
use crate::model::{Linear, ModelConfig, Proj};

/// What the reader of YAML may take. A recipe takes a millisecond; some texts take a time that grows with the square of their
/// length.
const LIMITS: Limits = Limits { time: Duration::from_secs(5), memory: 512 << 20, stack: 16 << 20 };

/// Reads a file for a model of these shapes.
///
/// # Errors
/// [`Error::BadFile`] with the key's path in the file.
pub fn read(file: &Path, config: &ModelConfig) -> Result<Recipe> {
    parse(file, &keys::text(file)?, config)
}

fn parse(file: &Path, text: &str, config: &ModelConfig) -> Result<Recipe> {
    let bad = |e: String| Error::file(file, format!("is not YAML: {e}"));
    // Through YAML's own type, which refuses keys that stand twice.
    keys::refuse_deep_yaml(file, text)?;
    let text = text.to_owned();
    let read = limited("it", LIMITS, move || {
        let yaml: yaml_serde::Value = yaml_serde::from_str(&text).map_err(|e| e.to_string())?;
        serde_json::to_value(yaml).map_err(|e| e.to_string())
    });
    let value: Value = read.and_then(|r| r).map_err(bad)?;
    let root = Object::new(file, "", &value)?;
    let mut reading = Reading::default();
    stages(&root, &mut reading)?;
    let recipe = reading.finish(&root)?;
    simplify(recipe, config, file)
}

/// Stages, groups of modifiers and modifiers, in the file's order.
fn stages(root: &Object, reading: &mut Reading) -> Result<()> {
    for key in root.keys() {
        if key.ends_with("_stage") {
            let Some(stage) = root.object(key)? else { continue };
            for key in stage.keys() {
                if key == "run_type" {
                    if stage.text(key)? != Some("oneshot") {
                        return Err(stage.error(key, "only oneshot is in this version"));
                    }
                } else {
                    group_or_modifier(&stage, key, reading)?;
                }
            }
        } else {
            group_or_modifier(root, key, reading)?;
        }
    }
    Ok(())
}

fn group_or_modifier(o: &Object, key: &str, reading: &mut Reading) -> Result<()> {
    if key == "modifiers" || key.ends_with("_modifiers") {
        let Some(group) = o.object(key)? else { return Ok(()) };
        return group.keys().try_for_each(|key| modifier(&group, key, reading));
    }
    modifier(o, key, reading)
}

fn modifier(o: &Object, name: &str, reading: &mut Reading) -> Result<()> {
    let known = MODIFIERS.iter().map(|m| m.0).collect::<Vec<_>>();
    if !known.contains(&name) {
        let hint = suggestion(name, &known);
        let hint = if hint.starts_with("known") { format!("there are {}", known.join(", ")) } else { hint };
        return Err(if name.ends_with("Modifier") {
            o.error(name, format!("is not in this version; {hint}"))
        } else {
            o.error(name, format!("is no stage (NAME_stage), group (NAME_modifiers) or modifier; {hint}"))
        });
    }
    // A modifier with every setting at its default may stand without any.
    let nothing = Value::Object(serde_json::Map::new());
    match o.object(name)? {
        Some(settings) => reading.modifier(name, &settings),
        None => reading.modifier(name, &o.empty(name, &nothing)?),
    }
}

/// Turns the rules of all modifiers into classes, overrides and ignored modules.
fn assemble(recipe: &mut Recipe, rules: Vec<Rule>) {
    // What every modifier ignores is ignored for good; the rest is said where it belongs.
    let mut lists: Vec<&Vec<String>> = rules.iter().map(|r| &r.ignore).collect();
    lists.extend(recipe.sparsity.iter().map(|s| &s.ignore));
    let everywhere = |p: &&String| lists.iter().all(|l| l.contains(p));
    let common: Vec<String> = lists.first().map_or(Vec::new(), |l| l.iter().filter(everywhere).cloned().collect());
    let rest = |list: &[String]| list.iter().filter(|p| !common.contains(p)).cloned().collect::<Vec<_>>();
    if let Some(s) = &mut recipe.sparsity {
        s.ignore = rest(&s.ignore);
    }
    for rule in rules {
        let (mut targets, mut ignore) = (rule.targets, rest(&rule.ignore));
        if targets.iter().any(|t| t == "Linear") {
            targets = vec!["re:.*".into()];
            not_linear(&mut ignore, &common);
        }
        recipe.overrides.push(Override { targets, ignore, layer: rule.layer });
    }
    recipe.ignore = ["embed_tokens".to_owned()].into_iter().chain(common).collect();
}

/// Takes out of a rule for the class `Linear` what is none in transformers' model: GptOssTopKRouter holds bare parameters.
/// (The experts are none there either; llm-compressor turns them into linear layers before it looks.)
fn not_linear(ignore: &mut Vec<String>, common: &[String]) {
    const LAYERS: usize = 512;
    let said = Patterns::new(&[&ignore[..], common].concat());
    let router = |layer| Linear { proj: Proj::Router, layer, expert: 0 }.module();
    // An expression that is none is told where the recipe is checked.
    let ignored = said.is_ok_and(|p| (0..LAYERS).all(|layer| p.any(&router(layer))));
    if !ignored {
        ignore.push("mlp.router".into());
    }
}

/// A layer that nothing is said of: floats where zeros are made, untouched otherwise.
fn unspoken(recipe: &Recipe) -> LayerRecipe {
    LayerRecipe::new(if recipe.sparsity.is_some() { SchemeName::Dense } else { SchemeName::Keep })
}

#[cfg(test)]
mod tests;
