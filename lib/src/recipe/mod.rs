//! What the user asks for, and its resolution against a model's shapes.

pub mod alphaquant;
mod keys;
pub mod llm_compressor;
pub mod pattern;
pub mod rules;
mod scheme;
pub mod settings;
mod simplify;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::algorithms::Algorithm;
use crate::containers::compressed_tensors::Scheme;
use crate::error::{Error, Result};
use crate::model::{Class, Linear};
use pattern::Patterns;
pub use scheme::{GroupSize, SCHEMES, SchemeName};
pub use settings::{
    ActOrder, Awq, Calibration, Container, FewTokens, Gptq, Kernels, Mask, Observer, Pruner, SmoothQuant, Sparsity,
};
pub use simplify::simplify;

/// Modules that stay as they are unless a recipe says otherwise.
pub const DEFAULT_IGNORE: [&str; 3] = ["embed_tokens", "mlp.router", "lm_head"];

/// Most bytes of data in a shard, unless a recipe says otherwise.
pub const SHARD_SIZE: u64 = 5_000_000_000;

/// How a linear layer is quantized.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LayerRecipe {
    /// Weights -> codes.
    pub algorithm: Algorithm,
    /// Storage.
    pub scheme: SchemeName,
    /// True for zero points of 0.
    pub symmetric: bool,
    /// Sharing of scales, where the scheme has groups.
    pub group_size: GroupSize,
    /// How scales are fitted.
    #[serde(default)]
    pub observer: Observer,
}

/// What becomes of a linear layer.
#[derive(Debug, Clone)]
pub struct Treatment {
    /// As the recipe says.
    pub layer: LayerRecipe,
    /// What that comes to on its shape; `None` for floats.
    pub scheme: Option<Scheme>,
    /// Zeros that are made first.
    pub sparse: Option<Sparsity>,
    /// Whether the values that codes stand for are stored, in the weight's own type.
    pub as_floats: bool,
}

/// Modules that are quantized otherwise than their class.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Override {
    /// Patterns of modules; see [`pattern`].
    pub targets: Vec<String>,
    /// Patterns of modules that it leaves alone all the same.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ignore: Vec<String>,
    /// How.
    pub layer: LayerRecipe,
}

/// A whole recipe. Together with the source's bytes, the calibration text's and the version it fixes every bit of the output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// gate, up, down of every expert.
    pub experts: LayerRecipe,
    /// The other linear layers.
    pub mw: LayerRecipe,
    /// Exceptions from the two; where several match a module, the last counts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub overrides: Vec<Override>,
    /// Patterns of modules that stay as they are.
    pub ignore: Vec<String>,
    /// Zeros that are made before rounding.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sparsity: Option<Sparsity>,
    /// Scaling of activations into weights before rounding.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub smoothquant: Option<SmoothQuant>,
    /// Settings of every GPTQ layer.
    #[serde(default)]
    pub gptq: Gptq,
    /// Settings of every AWQ layer.
    #[serde(default)]
    pub awq: Awq,
    /// How statistics are gathered.
    #[serde(default)]
    pub calibration: Calibration,
    /// Whether the W4A8 kernels count as installed.
    #[serde(default)]
    pub kernels: Kernels,
    /// What rounded weights are written as.
    #[serde(default)]
    pub container: Container,
    /// Codes stay what they are, and only the container changes; no layer is rounded.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keep_codes: bool,
    /// Hidden and intermediate width grow to multiples of this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pad_to: Option<usize>,
    /// Most bytes of data in a shard.
    pub shard_size: u64,
    /// Bytes of the output that overrides were chosen for; they say already what follows from it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_size: Option<u64>,
    /// What was decided on the way to this recipe, such as a fallback; stands among the manifest's notes as well.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

impl LayerRecipe {
    /// Round to nearest in `scheme`, symmetric, with groups that fit.
    pub fn new(scheme: SchemeName) -> Self {
        let (group_size, observer) = (GroupSize::Auto, Observer::default());
        Self { algorithm: Algorithm::Rtn, scheme, symmetric: true, group_size, observer }
    }
}

impl Recipe {
    /// A recipe for the two classes, with every setting at its default and nothing ignored.
    pub fn new(experts: LayerRecipe, mw: LayerRecipe) -> Self {
        Self {
            experts,
            mw,
            overrides: Vec::new(),
            ignore: Vec::new(),
            sparsity: None,
            smoothquant: None,
            gptq: Gptq::default(),
            awq: Awq::default(),
            calibration: Calibration::default(),
            kernels: Kernels::default(),
            container: Container::default(),
            keep_codes: false,
            pad_to: None,
            shard_size: SHARD_SIZE,
            target_size: None,
            notes: Vec::new(),
        }
    }

    /// The recipe that rounds nothing and changes the container alone.
    pub fn keeping_codes(container: Container) -> Self {
        let keep = || LayerRecipe::new(SchemeName::Keep);
        Self { keep_codes: true, container, ..Self::new(keep(), keep()) }
    }

    /// Quantizes a module that is ignored otherwise.
    pub fn also(&mut self, module: &str, layer: LayerRecipe) {
        self.ignore.retain(|p| p != module);
        self.overrides.push(Override { targets: vec![module.to_owned()], ignore: Vec::new(), layer });
    }

    /// How each kind of layer is quantized, with a name for messages.
    pub fn layers(&self) -> impl Iterator<Item = (String, &LayerRecipe)> {
        let named = |o: &Override| format!("the override of {}", o.targets.join(", "));
        let overrides = self.overrides.iter().map(move |o| (named(o), &o.layer));
        [("the experts".to_owned(), &self.experts), ("the other weights".to_owned(), &self.mw)]
            .into_iter()
            .chain(overrides)
    }

    /// The same, to change them.
    pub fn layers_mut(&mut self) -> impl Iterator<Item = &mut LayerRecipe> {
        [&mut self.experts, &mut self.mw].into_iter().chain(self.overrides.iter_mut().map(|o| &mut o.layer))
    }

    /// The settings for a class.
    pub fn class(&self, class: Class) -> &LayerRecipe {
        match class {
            Class::Experts => &self.experts,
            Class::Main => &self.mw,
        }
    }

    /// Whether a text must go through the model.
    pub fn needs_text(&self) -> bool {
        self.layers().any(|(_, l)| l.is_rounded() && (l.algorithm.needs_text() || l.scheme == SchemeName::Fp8Static))
            || (self.smoothquant.is_some() && self.rounds_inputs())
            || self.sparsity.is_some()
    }

    /// Whether any scheme rounds inputs.
    pub fn rounds_inputs(&self) -> bool {
        self.layers().any(|(_, l)| l.scheme.rounds_inputs())
    }

    /// The default name of the output: model, sparsity, algorithms, schemes.
    pub fn output_name(&self, model: &str) -> String {
        if self.keep_codes {
            return format!("{model}-{}", self.container.name());
        }
        let tag = |c: &LayerRecipe| if c.scheme == SchemeName::Keep { "KEEP" } else { c.algorithm.tag() };
        let (e, m) = (&self.experts, &self.mw);
        let sparse = self.sparsity.as_ref().map_or(String::new(), |s| format!("-{}", s.mask.tag()));
        let container = match self.container {
            Container::CompressedTensors => String::new(),
            other => format!("-{}", other.name()),
        };
        let wide = self.pad_to.map_or(String::new(), |n| format!("-pad{n}"));
        let size = self.target_size.map_or(String::new(), |n| match n {
            n if n.is_multiple_of(1_000_000_000) => format!("-{}GB", n / 1_000_000_000),
            n if n.is_multiple_of(1_000_000) => format!("-{}MB", n / 1_000_000),
            n => format!("-{n}B"),
        });
        format!("{model}{wide}{sparse}-{}-{}-experts-{}-mw-{}{container}{size}", tag(e), tag(m), e.scheme, m.scheme)
    }
}

/// A recipe with its patterns compiled: answers for each module.
pub struct Rules<'r> {
    recipe: &'r Recipe,
    /// Targets and ignored modules of each override.
    overrides: Vec<(Patterns, Patterns)>,
    ignore: Patterns,
    sparse: Option<(Patterns, Patterns)>,
}

impl<'r> Rules<'r> {
    /// Compiles the patterns.
    ///
    /// # Errors
    /// [`Error::Refused`] for a regular expression that is none.
    pub fn new(recipe: &'r Recipe) -> Result<Self> {
        let both = |targets: &[String], ignore: &[String]| Ok((Patterns::new(targets)?, Patterns::new(ignore)?));
        let overrides = recipe.overrides.iter().map(|o| both(&o.targets, &o.ignore)).collect::<Result<_>>()?;
        let sparse = |s: &Sparsity| both(&s.targets, &s.ignore);
        let sparse = recipe.sparsity.as_ref().map(sparse).transpose()?;
        Ok(Self { recipe, overrides, ignore: Patterns::new(&recipe.ignore)?, sparse })
    }

    /// How `linear` is quantized; `None` where it stays.
    pub fn layer(&self, linear: &Linear) -> Option<&'r LayerRecipe> {
        let module = linear.module();
        if self.ignore.any(&module) {
            return None;
        }
        let hit = |(targets, ignore): &(Patterns, Patterns)| targets.any(&module) && !ignore.any(&module);
        let found = self.overrides.iter().rposition(hit).map(|i| &self.recipe.overrides[i].layer);
        let layer = found.unwrap_or_else(|| self.recipe.class(linear.proj.class()));
        (layer.scheme != SchemeName::Keep).then_some(layer)
    }

    /// Whether zeros are made in `linear`.
    pub fn sparse(&self, linear: &Linear) -> Option<&'r Sparsity> {
        let ((targets, ignore), sparsity) = (self.sparse.as_ref()?, self.recipe.sparsity.as_ref()?);
        let module = linear.module();
        let hit = (sparsity.targets.is_empty() || targets.any(&module)) && !ignore.any(&module);
        hit.then_some(sparsity)
    }

    /// Looks for patterns that match no module: typing errors that would go unseen.
    ///
    /// # Errors
    /// [`Error::Refused`] with the first such pattern.
    pub fn every_pattern_hits<'a>(&self, modules: impl Iterator<Item = &'a str>) -> Result<()> {
        let r = self.recipe;
        let sparse = r.sparsity.iter().flat_map(|s| [("sparsity target", &s.targets), ("sparsity ignore", &s.ignore)]);
        let lists: Vec<(&str, &Vec<String>)> = [("ignore", &r.ignore)]
            .into_iter()
            .chain(r.overrides.iter().flat_map(|o| [("override", &o.targets), ("override's ignore", &o.ignore)]))
            .chain(sparse)
            .collect();
        let patterns: Vec<&String> = lists.iter().flat_map(|l| l.1).collect();
        let compiled = Patterns::new(&patterns.iter().map(|p| (*p).clone()).collect::<Vec<_>>())?;
        let mut hit = vec![false; patterns.len()];
        modules.for_each(|m| compiled.hits(m).for_each(|i| hit[i] = true));
        let kinds = lists.iter().flat_map(|(kind, list)| list.iter().map(move |_| kind));
        match kinds.zip(patterns).zip(hit).find(|(_, hit)| !hit) {
            Some(((kind, pattern), _)) => {
                Err(Error::Refused(format!("the {kind} pattern {pattern:?} matches no module of this model")))
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
