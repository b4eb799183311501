//! AlphaQuant's layer configuration: `{"default": {wq, aq, group_size, extra}, "overrides": [{pattern, wq, aq, group_size,
//! skip}]}`.
//!
//! As there: a pattern is a glob over names of modules (here also over the fused names, see [`super::pattern`]); every
//! override that matches lays its own fields over what is there, in the file's order, so the last one counts, field by
//! field; without a `wq` a layer stays as it is; the embedding is no linear layer and always stays. Beyond that: a glob that
//! matches nothing or that others hide is an error. A missing `group_size` is `auto`.

use std::path::Path;

use serde_json::Value;

use super::keys::{self, Object};
use super::pattern::Patterns;
use super::simplify::simplify;
use super::{ActOrder, GroupSize, LayerRecipe, Observer, Override, Recipe, SCHEMES, SchemeName};
use crate::algorithms::Algorithm;
use crate::error::{Error, Result};
use crate::formats::minifloat::Minifloat;
use crate::model::{ModelConfig, Proj, linears};

const FIELDS: [&str; 6] = ["wq", "aq", "group_size", "extra", "skip", "comment"];
/// Settings of one layer, under `extra`.
const LAYER_EXTRA: [&str; 3] = ["method", "symmetric", "observer"];
/// Settings of the whole run, under `default.extra`.
const RUN_EXTRA: [&str; 4] = ["blocksize", "percdamp", "actorder", "static_groups"];
/// What AlphaQuant's command line says of the text.
const TEXT: [&str; 4] = ["nsamples", "dataset", "seqlen", "seed"];

/// What one object says; later ones are laid over earlier ones.
#[derive(Clone, Default, PartialEq)]
struct Fields {
    wq: Option<String>,
    aq: Option<String>,
    group_size: Option<GroupSize>,
    skip: Option<bool>,
    method: Option<Algorithm>,
    symmetric: Option<bool>,
    observer: Option<Observer>,
}

/// Reads a file for a model of these shapes.
///
/// # Errors
/// [`Error::BadFile`] with the key's path in the file.
pub fn read(file: &Path, config: &ModelConfig) -> Result<Recipe> {
    let text = keys::text(file)?;
    parse(file, &keys::json(file, &text)?, config)
}

fn parse(file: &Path, value: &Value, config: &ModelConfig) -> Result<Recipe> {
    let root = Object::new(file, "", value)?;
    root.only(&["default", "overrides", "comment"])?;
    if root.get("default").is_none() && root.get("overrides").is_none() {
        return Err(root.refuse("has neither default nor overrides"));
    }
    let default = root.object("default")?;
    let base = default.as_ref().map_or(Ok(Fields::default()), |d| fields(d, false))?;
    let overrides = root.objects("overrides")?;
    let mut patterns = Vec::new();
    let mut each = Vec::new();
    for o in &overrides {
        each.push(fields(o, true)?);
        let pattern = o.text("pattern")?.ok_or_else(|| o.refuse("has no pattern"))?;
        patterns.push(format!("glob:{pattern}"));
    }
    let start = base.layer(default.as_ref().unwrap_or(&root))?;
    let mut recipe = Recipe::new(start.clone(), start);
    recipe.ignore = vec!["embed_tokens".into()];
    if let Some(extra) = default.as_ref().map(|d| d.object("extra")).transpose()?.flatten() {
        run_settings(&extra, &mut recipe)?;
    }
    let (modules, hits) = matches(&patterns, config)?;
    for (i, (o, pattern)) in overrides.iter().zip(patterns).enumerate() {
        let mut outcomes = decided(i, o, &base, &each, &hits)?.into_iter();
        let (_, layer) = outcomes.next().expect("there is one at least");
        recipe.overrides.push(Override { targets: vec![pattern], ignore: Vec::new(), layer });
        // What comes out otherwise, because of earlier overrides, is said by name.
        for (rows, layer) in outcomes {
            let targets = rows.into_iter().map(|row| modules[row].clone()).collect();
            recipe.overrides.push(Override { targets, ignore: Vec::new(), layer });
        }
    }
    simplify(recipe, config, file)
}

/// The linear layers, and for each which patterns match it. The embedding is none.
fn matches(patterns: &[String], config: &ModelConfig) -> Result<(Vec<String>, Vec<Vec<bool>>)> {
    let compiled = patterns.iter().map(|p| Patterns::new(std::slice::from_ref(p))).collect::<Result<Vec<_>>>()?;
    let modules: Vec<String> = linears(config).filter(|l| l.proj != Proj::Embed).map(|l| l.module()).collect();
    let hits = modules.iter().map(|m| compiled.iter().map(|p| p.any(m)).collect()).collect();
    Ok((modules, hits))
}

/// What the override at `i` comes to on the modules that it has the last word on, the most frequent outcome first: what it
/// does not say may differ with what earlier ones say.
fn decided(
    i: usize,
    o: &Object,
    base: &Fields,
    each: &[Fields],
    hits: &[Vec<bool>],
) -> Result<Vec<(Vec<usize>, LayerRecipe)>> {
    let upto_here = |row: &Vec<bool>| {
        let mut sum = base.clone();
        (0..=i).filter(|&k| row[k]).for_each(|k| sum.lay(&each[k]));
        sum
    };
    let last = |(_, row): &(usize, &Vec<bool>)| row[i] && !row[i + 1..].contains(&true);
    let mut found: Vec<(Vec<usize>, LayerRecipe)> = Vec::new();
    for (at, row) in hits.iter().enumerate().filter(last) {
        let layer = upto_here(row).layer(o)?;
        match found.iter_mut().find(|f| f.1 == layer) {
            Some(f) => f.0.push(at),
            None => found.push((vec![at], layer)),
        }
    }
    if found.is_empty() {
        // Others hide it, or it matches nothing; that is found later.
        let sum = hits.iter().find(|row| row[i]).map_or_else(|| each[i].clone(), upto_here);
        return Ok(vec![(Vec::new(), sum.layer(o)?)]);
    }
    found.sort_by_key(|f| std::cmp::Reverse(f.0.len()));
    Ok(found)
}

fn fields(o: &Object, is_override: bool) -> Result<Fields> {
    let known: Vec<&str> = is_override.then_some("pattern").into_iter().chain(FIELDS).collect();
    o.only(&known)?;
    let mut fields = Fields {
        wq: o.text("wq")?.map(str::to_lowercase),
        aq: o.text("aq")?.map(str::to_lowercase),
        group_size: group_size(o)?,
        skip: o.flag("skip")?,
        ..Fields::default()
    };
    let Some(extra) = o.object("extra")? else { return Ok(fields) };
    if let Some(key) = extra.keys().find(|k| TEXT.contains(k)) {
        return Err(
            extra.error(key, "the calibration text is the command line's: --nsamples, --dataset, --max-seq-length")
        );
    }
    if let Some(key) = extra.keys().find(|k| is_override && RUN_EXTRA.contains(k)) {
        return Err(extra.error(key, "is one for all layers; it belongs into default.extra"));
    }
    let known: Vec<&str> = LAYER_EXTRA.into_iter().chain(RUN_EXTRA).collect();
    extra.only(&known)?;
    let about = |key: &'static str| move |e: Error| extra_error(o, key, &e);
    fields.method = extra.text("method")?.map(str::parse).transpose().map_err(about("method"))?;
    fields.symmetric = extra.flag("symmetric")?;
    fields.observer = extra.text("observer")?.map(str::parse).transpose().map_err(about("observer"))?;
    Ok(fields)
}

fn extra_error(o: &Object, key: &str, e: &Error) -> Error {
    o.error(&format!("extra.{key}"), e)
}

fn group_size(o: &Object) -> Result<Option<GroupSize>> {
    match o.integer("group_size")? {
        None => Ok(None),
        Some(-1) => Ok(Some(GroupSize::Channel)),
        Some(n) => match usize::try_from(n) {
            Ok(n) if n > 0 => Ok(Some(GroupSize::Size(n))),
            _ => Err(o.error("group_size", format!("is {n}, wanted -1 (the whole row) or a number such as 64"))),
        },
    }
}

fn run_settings(extra: &Object, recipe: &mut Recipe) -> Result<()> {
    if let Some(n) = extra.count("blocksize")? {
        recipe.gptq.block_size = n;
    }
    if let Some(x) = extra.number("percdamp")? {
        recipe.gptq.dampening_frac = x;
    }
    if let Some(on) = extra.flag("actorder")? {
        recipe.gptq.actorder = if on { ActOrder::Static } else { ActOrder::Off };
    }
    if extra.flag("static_groups")? == Some(false) {
        return Err(extra.error("static_groups", super::settings::STATIC_GROUPS));
    }
    Ok(())
}

impl Fields {
    fn lay(&mut self, over: &Self) {
        let Self { wq, aq, group_size, skip, method, symmetric, observer } = over.clone();
        self.wq = wq.or(self.wq.take());
        self.aq = aq.or(self.aq.take());
        self.group_size = group_size.or(self.group_size);
        self.skip = skip.or(self.skip);
        self.method = method.or(self.method);
        self.symmetric = symmetric.or(self.symmetric);
        self.observer = observer.or(self.observer);
    }

    /// As a layer's recipe; GPTQ where there is no method, as on our command line.
    fn layer(&self, o: &Object) -> Result<LayerRecipe> {
        let scheme = self.scheme(o)?;
        if self.skip == Some(true) || scheme == SchemeName::Keep {
            return Ok(LayerRecipe::new(SchemeName::Keep));
        }
        Ok(LayerRecipe {
            algorithm: self.method.unwrap_or(Algorithm::Gptq),
            scheme,
            symmetric: self.symmetric.unwrap_or(true),
            group_size: self.group_size.unwrap_or(GroupSize::Auto),
            observer: self.observer.unwrap_or_default(),
        })
    }

    fn scheme(&self, o: &Object) -> Result<SchemeName> {
        let (wq, aq) = (self.wq.as_deref().unwrap_or("bf16"), self.aq.as_deref().unwrap_or("bf16"));
        const WEIGHTS: [&str; 15] = [
            "int2", "int3", "int4", "int5", "int6", "int7", "int8", "fp4", "fp6", "fp8", "mxfp4", "mxfp6", "mxfp8",
            "bf16", "none",
        ];
        const INPUTS: [&str; 4] = ["bf16", "int8", "fp8", "none"];
        if !WEIGHTS.contains(&wq) {
            return Err(o.error(
                "wq",
                format!(
                    "{wq} is not in this version; it has int2 to int8, fp4, fp6, fp8, mxfp4, mxfp6, mxfp8 and bf16"
                ),
            ));
        }
        if !INPUTS.contains(&aq) {
            return Err(o.error("aq", format!("{aq} is not in this version; it has bf16, int8 and fp8")));
        }
        let plain = |s: &str| matches!(s, "bf16" | "none");
        let bits = wq.strip_prefix("int").and_then(|n| n.parse().ok());
        match (bits, aq) {
            (None, aq) if plain(wq) && plain(aq) => Ok(SchemeName::Keep),
            (Some(bits), aq) if plain(aq) => Ok(SchemeName::weight_only(bits)),
            (Some(bits), "int8") => Ok(SchemeName::Int { bits, int8_activations: true }),
            (None, "fp8") if wq == "fp8" => Ok(SchemeName::Fp8),
            (Some(4), "fp8") => Ok(SchemeName::W4afp8),
            (None, aq) if wq == "fp8" && plain(aq) => Ok(SchemeName::Float(Minifloat::E4M3)),
            (None, aq) if plain(aq) => wq.parse(),
            _ => Err(o.refuse(format!(
                "weights of {wq} with inputs of {aq} are not in this version; it has {SCHEMES} (int N with bf16 or int8, \
                 int4 and fp8 with fp8, others with bf16)"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::Linear;

    fn config() -> ModelConfig {
        ModelConfig::parse(Path::new("m"), &ModelConfig::published("gpt-oss-20b").unwrap()).unwrap()
    }

    fn recipe(value: Value) -> Result<Recipe> {
        parse(Path::new("f.json"), &value, &config())
    }

    fn refusal(value: Value) -> String {
        recipe(value).unwrap_err().to_string()
    }

    #[test]
    fn a_file_in_alphaquants_form_is_two_classes_where_it_speaks_of_two() {
        let got = recipe(json!({
            "default": {"wq": "int8", "aq": "int8", "group_size": -1, "extra": {"method": "rtn", "percdamp": 0.05}},
            "overrides": [
                {"pattern": "model.layers.*.mlp.experts.*", "wq": "int4", "aq": "bf16", "group_size": 64},
                {"pattern": "*.mlp.router", "skip": true, "comment": "small"},
                {"pattern": "lm_head", "wq": "bf16", "aq": "bf16"},
            ],
        }))
        .unwrap();
        let (group_size, scheme) = (GroupSize::Size(64), SchemeName::weight_only(4));
        assert_eq!(got.experts, LayerRecipe { group_size, ..LayerRecipe::new(scheme) });
        let mw = LayerRecipe::new(SchemeName::Int { bits: 8, int8_activations: true });
        assert_eq!(got.mw, LayerRecipe { group_size: GroupSize::Channel, ..mw });
        assert!(got.overrides.is_empty() && got.gptq.dampening_frac == 0.05);
        assert_eq!(got.ignore, ["embed_tokens", "glob:*.mlp.router", "glob:lm_head"]);
    }

    #[test]
    fn later_overrides_are_laid_over_earlier_ones() {
        let got = recipe(json!({
            "default": {"wq": "int4", "group_size": 64},
            "overrides": [
                {"pattern": "*.self_attn.*", "wq": "int8"},
                {"pattern": "*.self_attn.q_proj", "group_size": -1},
                {"pattern": "*.3.mlp.experts.gate_up_proj", "wq": "fp8", "aq": "fp8"},
            ],
        }))
        .unwrap();
        let rules = super::super::Rules::new(&got).unwrap();
        let layer =
            |proj, layer| rules.layer(&Linear { proj, layer, expert: 5 }).map(|l| (l.scheme.to_string(), l.group_size));
        assert_eq!(layer(Proj::K, 0), Some(("w8a16".into(), GroupSize::Size(64))));
        assert_eq!(layer(Proj::Q, 0), Some(("w8a16".into(), GroupSize::Channel)));
        assert_eq!(layer(Proj::Up, 3), Some(("fp8".into(), GroupSize::Size(64))));
        assert_eq!(layer(Proj::Down, 3), Some(("w4a16".into(), GroupSize::Size(64))));
        assert_eq!(layer(Proj::LmHead, 0).unwrap().0, "w4a16");
        assert_eq!(layer(Proj::Embed, 0), None);
    }

    #[test]
    fn hidden_and_useless_globs_are_refused() {
        let both = |a: Value, b: Value| json!({"default": {"wq": "int4"}, "overrides": [a, b]});
        let e = refusal(both(
            json!({"pattern": "*.q_proj", "wq": "int8"}),
            json!({"pattern": "*.self_attn.*", "wq": "int3"}),
        ));
        assert!(e.contains("\"*.q_proj\" has no effect: \"*.self_attn.*\" hides it on every module"), "{e}");
        let e = refusal(json!({"default": {"wq": "int8"}, "overrides": [{"pattern": "*embed_tokens", "wq": "int4"}]}));
        assert!(e.contains("\"*embed_tokens\" matches only the embedding"), "{e}");
        // The same wish twice is no contradiction.
        recipe(both(json!({"pattern": "*.q_proj", "wq": "int8"}), json!({"pattern": "*.self_attn.*", "wq": "int8"})))
            .unwrap();
        let e = refusal(both(json!({"pattern": "*.w1", "wq": "int8"}), json!({"pattern": "*", "wq": "int8"})));
        assert!(e.contains("the override pattern \"glob:*.w1\" matches no module"), "{e}");
    }

    #[test]
    fn fields_are_laid_over_those_of_earlier_overrides_module_by_module() {
        let outcome = |a: Value, b: Value| {
            let got = recipe(json!({"default": {"wq": "int4"}, "overrides": [a, b]})).unwrap();
            let rules = super::super::Rules::new(&got).unwrap();
            [(Proj::Q, 0), (Proj::K, 0), (Proj::Q, 1), (Proj::K, 1)].map(|(proj, layer)| {
                rules.layer(&Linear { proj, layer, expert: 0 }).map(|l| (l.scheme.to_string(), l.group_size))
            })
        };
        let is = |scheme: &str, group_size| Some((scheme.to_owned(), group_size));
        let (auto, g32) = (GroupSize::Auto, GroupSize::Size(32));
        assert_eq!(
            outcome(
                json!({"pattern": "*.q_proj", "wq": "int8"}),
                json!({"pattern": "model.layers.0.*", "group_size": 32})
            ),
            [is("w8a16", g32), is("w4a16", g32), is("w8a16", auto), is("w4a16", auto)]
        );
        // What is skipped has no other fields to agree on.
        assert_eq!(
            outcome(json!({"pattern": "*.q_proj", "wq": "int8"}), json!({"pattern": "model.layers.0.*", "skip": true})),
            [None, None, is("w8a16", auto), is("w4a16", auto)]
        );
        assert_eq!(
            outcome(json!({"pattern": "*.q_proj", "skip": true}), json!({"pattern": "*self_attn*", "wq": "int8"})),
            [None, is("w8a16", auto), None, is("w8a16", auto)]
        );
    }

    #[test]
    fn a_key_that_stands_twice_is_an_error() {
        let e = keys::json(Path::new("f.json"), r#"{"default": {"wq": "int4", "wq": "int8"}}"#).unwrap_err();
        assert!(e.to_string().contains("the key \"wq\" stands twice"), "{e}");
        let text = r#"{"a": [1, -2, 0.5, null, true, "x"], "b": {"c": {}}}"#;
        let value: Value = serde_json::from_str(text).unwrap();
        assert_eq!(keys::json(Path::new("f.json"), text).unwrap(), value);
    }

    #[test]
    fn unknown_keys_and_formats_are_refused_with_what_there_is() {
        for (value, want) in [
            (
                json!({"default": {"wq": "int4", "groupsize": 64}}),
                "f.json: default.groupsize: is no known key; did you mean group_size?",
            ),
            (json!({"default": {}, "override": []}), "f.json: override: is no known key; did you mean overrides?"),
            (json!({"overrides": [{"patern": "*"}]}), "overrides[0].pattern"),
            (json!({"overrides": [{"wq": "int4"}]}), "overrides[0]: has no pattern"),
            (json!({}), "has neither default nor overrides"),
            (json!({"default": {"wq": "int9"}}), "default.wq: int9 is not in this version; it has int2 to int8"),
            (json!({"default": {"wq": "mxfp4", "aq": "mxfp8"}}), "default.aq: mxfp8 is not in this version"),
            (
                json!({"default": {"wq": "mxfp8", "aq": "fp8"}}),
                "default: weights of mxfp8 with inputs of fp8 are not in this version",
            ),
            (json!({"default": {"wq": "int4", "group_size": 0}}), "default.group_size: is 0, wanted -1"),
            (json!({"default": {"wq": 4}}), "default.wq: is 4, wanted a text"),
            (
                json!({"default": {"extra": {"nsamples": 128}}}),
                "default.extra.nsamples: the calibration text is the command line's",
            ),
            (json!({"default": {"extra": {"percdam": 1}}}), "did you mean percdamp?"),
            (
                json!({"default": {"extra": {"method": "qqq"}}}),
                "default.extra.method: the algorithm qqq is not in this version",
            ),
            (json!({"default": {"wq": "int4", "extra": {"static_groups": false}}}), "static_groups"),
        ] {
            let e = refusal(value.clone());
            let want = if want == "overrides[0].pattern" {
                "overrides[0].patern: is no known key; did you mean pattern?"
            } else {
                want
            };
            assert!(e.contains(want), "{value}: {e}");
        }
    }
}
