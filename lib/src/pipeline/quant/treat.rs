//! What becomes of each linear layer: the recipe's treatment, or the source's own codes, and what the container asks of them.

use super::linears::Experts;
use super::{Plan, gguf};
use crate::containers;
use crate::containers::compressed_tensors::Scheme;
use crate::error::{Error, Result};
use crate::formats::NumberFormat;
use crate::formats::float::Float;
use crate::model::{self, Class, Linear, Proj};
use crate::recipe::{Container, Rules, Treatment};

impl Plan<'_> {
    /// Asks the recipe about every linear layer.
    pub(super) fn treat(&mut self) -> Result<()> {
        if self.recipe.keep_codes {
            return self.treat_codes();
        }
        let rules = Rules::new(&self.recipe)?;
        let modules: Vec<(Linear, String)> = model::linears(&self.config).map(|l| (l, l.module())).collect();
        rules.every_pattern_hits(modules.iter().map(|m| &m.1[..]))?;
        for (linear, _) in modules {
            if let Some(layer) = rules.layer(&linear) {
                let mut scheme = layer.resolve(&linear, &self.config)?;
                if self.is_gguf() {
                    scheme = scheme.map(|s| gguf::scheme(&linear, s)).transpose()?;
                }
                let coded = self.recipe.container.is_coded();
                let codes = |s: &Scheme| !matches!(s.weights, NumberFormat::Half(_));
                if let Some(scheme) = scheme.filter(|s| coded && codes(s) && s.stored().is_none()) {
                    let (module, format) = (linear.module(), scheme.weights.name());
                    return Err(Error::Refused(format!(
                        "{module}: compressed-tensors has no layout for {format}; {}--container dense writes the floats that \
                         its codes stand for",
                        if matches!(scheme.weights, NumberFormat::Ggml(_)) {
                            "--container gguf has one, and "
                        } else {
                            ""
                        }
                    )));
                }
                let as_floats = self.recipe.container == Container::Dense;
                let sparse = rules.sparse(&linear).cloned();
                if scheme.is_some() || sparse.is_some() {
                    if self.config.tied && linear.proj == Proj::LmHead {
                        return Err(Error::Refused(
                            "lm_head: config.json says tie_word_embeddings, so the head is the embedding and has no weight of its \
                             own to quantize: give --lm-head keep (--embed-tokens rounds the weight that is both)"
                                .into(),
                        ));
                    }
                    self.treated.insert(linear, Treatment { layer: layer.clone(), scheme, sparse, as_floats });
                }
            }
        }
        // A GGUF file, or a wider model, is something to make all the same.
        let other = (self.is_gguf() || self.is_padded()) && self.recipe.sparsity.is_none();
        if self.treated.is_empty() && !other {
            return Err(Error::Refused(
                "the recipe ignores or keeps every linear layer: nothing is left to quantize".into(),
            ));
        }
        Ok(())
    }

    /// Takes the source's own codes for what each layer becomes.
    pub(super) fn treat_codes(&mut self) -> Result<()> {
        let Some(source) = self.source else {
            return Err(Error::Refused("--keep-codes needs the weights: there are none beside this config".into()));
        };
        if self.recipe.container == Container::Dense {
            return Err(Error::Refused("--container dense keeps no codes; gptoss-dequant writes their floats".into()));
        }
        let linears: Vec<Linear> = model::linears(&self.config).collect();
        for linear in linears {
            // Blocks that stay blocks are copied, and go to a GGUF file by a way of their own.
            if self.config.tied && linear.proj == Proj::LmHead || self.mxfp4 && linear.proj.fused().is_some() {
                continue;
            }
            let weight = containers::open(source, &self.config, &linear)?;
            let module = linear.module();
            let Some(stored) = weight.stored() else {
                if source.get(&format!("{module}.weight_scale")).is_some() {
                    return Err(Error::Refused(format!(
                        "{module}: codes whose scales belong to more than their own rows are not put into other containers"
                    )));
                }
                continue;
            };
            let scheme = if self.is_gguf() { gguf::scheme(&linear, stored)? } else { stored };
            if self.recipe.container.is_coded() && scheme.stored().is_none() {
                let (format, container) = (scheme.weights.name(), self.recipe.container.name());
                return Err(Error::Refused(format!("{module}: {container} has no layout for {format}")));
            }
            let layer = self.recipe.class(linear.proj.class()).clone();
            self.treated.insert(linear, Treatment { layer, scheme: Some(scheme), sparse: None, as_floats: false });
        }
        Ok(())
    }

    /// What a container asks of the whole recipe.
    ///
    /// # Errors
    /// [`Error::Refused`] with the first module that it cannot hold.
    pub(super) fn check_container(&self) -> Result<()> {
        let container = self.recipe.container;
        if !matches!(container, Container::Openai | Container::VllmFp8) {
            return Ok(());
        }
        if let Some(linear) = self.treated.keys().find(|l| l.proj.class() == Class::Main && self.coded(l).is_some()) {
            return Err(Error::Refused(format!(
                "{}: container {} holds the other weights as floats alone; {}",
                linear.module(),
                container.name(),
                if self.recipe.keep_codes { "compressed-tensors keeps their codes" } else { "give --mw keep" }
            )));
        }
        let other =
            |l: &usize| self.experts[*l] != Experts::Native && !(self.experts[*l] == Experts::Stay && self.mxfp4);
        match (0..self.config.layers).find(other).filter(|_| container == Container::Openai) {
            Some(layer) => Err(Error::Refused(format!(
                "model.layers.{layer}.mlp.experts: container openai holds experts of MXFP4 alone; give --experts mxfp4"
            ))),
            None => Ok(()),
        }
    }

    /// What the numbers of `linear` are rounded to.
    pub(super) fn scheme(&self, linear: &Linear) -> Option<Scheme> {
        self.treated.get(linear).and_then(|t| t.scheme)
    }

    /// What its codes are stored as; `None` where floats are.
    pub(super) fn coded(&self, linear: &Linear) -> Option<Scheme> {
        self.scheme(linear).filter(|s| self.recipe.container.is_coded() && !matches!(s.weights, NumberFormat::Half(_)))
    }

    /// The type that the numbers of `linear`, of type `float`, are written in where no codes are.
    pub(super) fn written(&self, linear: &Linear, float: Float) -> Float {
        match self.scheme(linear).map(|s| s.weights) {
            Some(NumberFormat::Half(half)) => half,
            _ => float,
        }
    }
}
