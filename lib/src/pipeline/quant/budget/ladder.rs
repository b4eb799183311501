//! The schemes that a class of layers may grow through.

use std::collections::BTreeMap;

use super::gigabytes;
use crate::algorithms::Algorithm;
use crate::calibrate::sensitivity::Trial;
use crate::error::{Error, Result};
use crate::formats::ggml::Ggml;
use crate::formats::minifloat::Minifloat;
use crate::formats::ternary::Trits;
use crate::model::{Class, Linear};
use crate::pipeline::quant::Plan;
use crate::recipe::{GroupSize, LayerRecipe, Recipe, SchemeName, Treatment};

const MXFP4: SchemeName = SchemeName::Mx(Minifloat::E2M1);

/// The schemes of a class, the recipe's own first, each larger than the one before.
pub struct Ladder {
    pub class: Class,
    pub rungs: Vec<Rung>,
}

/// A scheme for a whole class.
pub struct Rung {
    pub layer: LayerRecipe,
    /// Of the whole output, where the class has this scheme and nothing else is raised.
    bytes: u64,
    /// What becomes of each linear layer in that plan.
    pub treated: BTreeMap<Linear, Treatment>,
    /// Bytes that each takes there.
    pub sizes: BTreeMap<Linear, u64>,
}

/// `recipe` with another layer for a class.
pub fn with(recipe: &Recipe, class: Class, layer: LayerRecipe) -> Recipe {
    let mut recipe = recipe.clone();
    match class {
        Class::Experts => recipe.experts = layer,
        Class::Main => recipe.mw = layer,
    }
    recipe
}

impl Rung {
    fn new(layer: LayerRecipe, plan: &Plan) -> Self {
        let mut sizes: BTreeMap<Linear, u64> = plan.jobs.iter().map(|j| (j.linear, j.store.bytes() as u64)).collect();
        for linear in crate::model::linears(&plan.config) {
            sizes.entry(linear).or_insert_with(|| plan.kept_bytes(&linear));
        }
        Self { layer, bytes: plan.layout().total_bytes(), treated: plan.treated.clone(), sizes }
    }
}

impl Ladder {
    /// Of `class` in the recipe whose plan is `own`; `plan` makes the plans of others.
    pub fn new<'a>(class: Class, own: &Plan<'a>, plan: impl Fn(Recipe) -> Result<Plan<'a>>) -> Result<Self> {
        let least = own.recipe.class(class);
        // Codes of the source's own type are the source.
        let is_exact = |r: &Rung| own.mxfp4 && class == Class::Experts && r.layer.scheme == MXFP4;
        let first = Rung::new(least.clone(), own);
        let mut larger: Vec<Rung> = Vec::new();
        for scheme in larger_than(least, class) {
            let layer = raised(least, scheme, class, own.mxfp4);
            let recipe = with(&own.recipe, class, layer.clone());
            // What this container or these shapes cannot hold is no rung.
            if let Ok(plan) = recipe.check().and_then(|_| plan(recipe)) {
                larger.push(Rung::new(layer, &plan));
            }
        }
        if let Some(exact) = larger.iter().find(|r| is_exact(r) && r.bytes <= first.bytes) {
            return Err(Error::Refused(format!(
                "--target-size: the experts of this checkpoint are MXFP4, which loses nothing and is smaller ({}) than {} ({}); \
                 give --experts keep, or a smaller scheme",
                gigabytes(exact.bytes),
                least.scheme,
                gigabytes(first.bytes)
            )));
        }
        larger.sort_by_key(|r| r.bytes);
        let mut rungs = vec![first];
        for rung in larger {
            let top = &rungs[rungs.len() - 1];
            if rung.bytes > top.bytes && !is_exact(top) {
                rungs.push(rung);
            }
        }
        Ok(Self { class, rungs })
    }

    /// The largest.
    pub fn top(&self) -> &LayerRecipe {
        &self.rungs[self.rungs.len() - 1].layer
    }

    /// One a rung; none where there is nothing to choose.
    pub fn trials(&self) -> Vec<Trial<'_>> {
        if self.rungs.len() == 1 {
            return Vec::new();
        }
        // What is kept is the source, and needs no trial.
        self.rungs.iter().filter(|r| r.layer.is_rounded()).map(|r| Trial(Some(&r.treated))).collect()
    }
}

/// Schemes that may be larger than a layer's own and ask the same of its inputs.
fn larger_than(own: &LayerRecipe, class: Class) -> Vec<SchemeName> {
    let int = SchemeName::weight_only;
    let int8 = |bits| SchemeName::Int { bits, int8_activations: true };
    let experts = class == Class::Experts;
    let mut schemes = match own.scheme {
        SchemeName::Keep | SchemeName::Dense | SchemeName::Half(_) => return Vec::new(),
        SchemeName::Ggml(_) => {
            [Ggml::Tq1_0, Ggml::Tq2_0, Ggml::Q4_0, Ggml::Q5_0, Ggml::Q8_0].map(SchemeName::Ggml).to_vec()
        }
        // Base 3 and two bits stand for the same values.
        SchemeName::Ternary(_) => vec![int(2), int(4), int(8)],
        SchemeName::Int { int8_activations: false, .. }
        | SchemeName::Mx(_)
        | SchemeName::Nvfp4
        | SchemeName::Float(_) => {
            vec![SchemeName::Ternary(Trits::Quarters), int(2), int(4), int(8)]
        }
        SchemeName::Int { int8_activations: true, .. } => vec![int8(4), int8(8)],
        SchemeName::W4afp8 | SchemeName::Fp8 | SchemeName::Fp8Static | SchemeName::Fp8Block => Vec::new(),
    };
    if experts && !own.scheme.rounds_inputs() {
        schemes.push(MXFP4);
    }
    if !experts {
        schemes.push(SchemeName::Keep);
    }
    schemes.retain(|s| *s != own.scheme);
    schemes
}

/// How a layer that was `own` is quantized on a larger rung.
fn raised(own: &LayerRecipe, scheme: SchemeName, class: Class, mxfp4: bool) -> LayerRecipe {
    let exact = mxfp4 && class == Class::Experts && scheme == MXFP4;
    let algorithm = match own.algorithm {
        Algorithm::Rtn => Algorithm::Rtn,
        _ if exact || scheme == SchemeName::Keep => Algorithm::Rtn,
        _ if scheme.is_ternary() => Algorithm::PtBitnet,
        Algorithm::PtBitnet if scheme == SchemeName::weight_only(2) => Algorithm::PtBitnet,
        _ => Algorithm::Gptq,
    };
    // A scale a row is what makes the smallest schemes so small; larger ones have the usual groups.
    let group_size = match own.group_size {
        size @ GroupSize::Size(_) if own.scheme.own_group_size().is_none() => size,
        _ => GroupSize::Auto,
    };
    LayerRecipe {
        algorithm,
        scheme,
        symmetric: own.symmetric || !scheme.may_be_asymmetric(),
        group_size: scheme.own_group_size().unwrap_or(group_size),
        observer: own.observer,
    }
}
