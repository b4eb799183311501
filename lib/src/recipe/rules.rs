//! What a resolved recipe must hold to, whichever form it came in.

use super::{GroupSize, Kernels, LayerRecipe, Mask, Recipe, SchemeName};
use crate::algorithms::Algorithm;
use crate::error::{Error, Result};
use crate::formats::ggml::Ggml;

const W4A8: SchemeName = SchemeName::Int { bits: 4, int8_activations: true };

impl Recipe {
    /// Checks every rule. The notes are what a user should know of a recipe that holds.
    ///
    /// # Errors
    /// [`Error::Refused`] with the first rule that is broken, the layers that break it and what would do.
    pub fn check(&self) -> Result<Vec<String>> {
        self.check_combinations()?;
        if self.has_w4a8() && self.kernels == Kernels::Absent {
            return Err(Error::Refused(format!(
                "w4a8 for {} needs kernels, and none are installed here: take w4a16 in its place (--allow-fallback), or \
                 write it for a machine that has them (--kernels present)",
                self.layers().find(|(_, l)| l.scheme == W4A8).map(|(name, _)| name).unwrap_or_default()
            )));
        }
        let mut notes = Vec::new();
        if self.smoothquant.is_some() && !self.rounds_inputs() {
            notes.push("SmoothQuant does nothing here: it makes inputs easier to round, and no scheme of this recipe rounds inputs".into());
        }
        Ok(notes)
    }

    /// Whether any layer needs the W4A8 kernels.
    pub fn has_w4a8(&self) -> bool {
        // Floats need no kernels, whatever they were rounded to.
        self.container.is_coded() && self.layers().any(|(_, l)| l.scheme == W4A8)
    }

    /// Settles whether the kernels count as installed, and what becomes of w4a8 where they do not.
    ///
    /// # Errors
    /// [`Error::Refused`] as [`Self::check`] has it.
    pub fn settle(&mut self, kernels: Kernels, allow_fallback: bool) -> Result<()> {
        // What cannot be meant stays an error: a fallback must not turn it into something that can.
        self.check_combinations()?;
        self.kernels = kernels;
        if self.has_w4a8() && kernels == Kernels::Absent && allow_fallback {
            let named = self.layers().filter(|(_, l)| l.scheme == W4A8).map(|(name, _)| name);
            let named: Vec<String> = named.collect();
            self.notes
                .push(format!("w4a16 in place of w4a8 for {}: its kernels are not installed", named.join(" and ")));
            self.layers_mut().filter(|l| l.scheme == W4A8).for_each(|l| l.scheme = SchemeName::weight_only(4));
        }
        let notes = self.check()?;
        self.notes.extend(notes);
        // The group size is for where groups exist; what is recorded is what is used.
        for layer in self.layers_mut() {
            layer.group_size = layer.scheme.own_group_size().unwrap_or(layer.group_size);
        }
        Ok(())
    }

    /// Every rule but that of the kernels.
    fn check_combinations(&self) -> Result<()> {
        for (name, layer) in self.layers() {
            layer.check(&name)?;
            if layer.scheme == SchemeName::Dense && self.sparsity.is_none() {
                return refused(format!("{name}: dense without zeros (--with-sparse) changes nothing; use keep"));
            }
        }
        self.check_sparsity()?;
        self.check_numbers()
    }

    fn check_sparsity(&self) -> Result<()> {
        let Some(s) = &self.sparsity else { return Ok(()) };
        if !(s.sparsity > 0.0 && s.sparsity < 1.0) {
            return refused(format!("sparsity is {}, wanted more than 0 and less than 1", s.sparsity));
        }
        if let Mask::Structured { zeros, of } = s.mask {
            let share = zeros as f64 / of as f64;
            if (share - s.sparsity).abs() > 1e-9 {
                return refused(format!(
                    "a mask of {} makes a sparsity of {share}, not of {}; give one of the two, or --mask unstructured",
                    s.mask, s.sparsity
                ));
            }
        }
        positive("block_size of the sparsity", s.block_size)?;
        share("dampening_frac of the sparsity", s.dampening_frac)
    }

    fn check_numbers(&self) -> Result<()> {
        positive("block_size", self.gptq.block_size)?;
        share("dampening_frac", self.gptq.dampening_frac)?;
        if !(1..=1000).contains(&self.awq.n_grid) {
            return refused(format!("AWQ's n_grid is {}, wanted 1 to 1000", self.awq.n_grid));
        }
        if let Some(s) = &self.smoothquant {
            share("SmoothQuant's strength", s.strength)?;
        }
        share("few_tokens_threshold", self.calibration.few_tokens_threshold)?;
        positive("shard_size", usize::try_from(self.shard_size).unwrap_or(usize::MAX))
    }
}

impl LayerRecipe {
    /// Whether its scales belong to rows, may be any number, and stand alone.
    fn is_for_pt_bitnet(&self) -> bool {
        let scheme = match self.scheme {
            SchemeName::Ternary(_) | SchemeName::Ggml(Ggml::Tq1_0 | Ggml::Tq2_0) => true,
            SchemeName::Int { bits: 2..=4, int8_activations: false } => self.symmetric,
            _ => false,
        };
        scheme && !matches!(self.group_size, GroupSize::Tensor | GroupSize::Block)
    }

    /// Whether algorithm, scheme and symmetry go together.
    fn check(&self, name: &str) -> Result<()> {
        let scheme = self.scheme;
        if self.algorithm == Algorithm::Awq && self.is_rounded() && scheme != SchemeName::weight_only(4) {
            return refused(format!(
                "{name}: AWQ is for w4a16, not for {scheme}; take the algorithm gptq with {scheme}, or w4a16 with AWQ"
            ));
        }
        if self.algorithm == Algorithm::Awq && matches!(self.group_size, GroupSize::Tensor | GroupSize::Block) {
            return refused(format!("{name}: AWQ searches groups and channels; take --group-size auto or channel"));
        }
        if self.algorithm == Algorithm::PtBitnet && self.is_rounded() && !self.is_for_pt_bitnet() {
            return refused(format!(
                "{name}: PT-BitNet is for ternary, ternary_b3, tq1_0, tq2_0 and symmetric w2a16 to w4a16 in groups or channels, \
                 not for {scheme}; take the algorithm gptq with it"
            ));
        }
        match scheme {
            SchemeName::Int { bits, int8_activations: true } if bits != 4 && bits != 8 => refused(format!(
                "{name}: int8 inputs go with weights of 4 or 8 bits, not of {bits}; use w{}a8 or w{bits}a16",
                if bits < 6 { 4 } else { 8 }
            )),
            W4A8 if !self.symmetric => {
                refused(format!("{name}: w4a8 is symmetric, as its kernels are; an asymmetric int4 is w4a16"))
            }
            scheme if !self.symmetric && !scheme.may_be_asymmetric() => {
                refused(format!("{name}: {scheme} has no zero points; asymmetric goes with integers, such as w4a16"))
            }
            _ => Ok(()),
        }
    }
}

fn refused(reason: String) -> Result<()> {
    Err(Error::Refused(reason))
}

fn positive(name: &str, n: usize) -> Result<()> {
    if n == 0 { refused(format!("{name} is 0, wanted at least 1")) } else { Ok(()) }
}

fn share(name: &str, x: f64) -> Result<()> {
    if (0.0..=1.0).contains(&x) { Ok(()) } else { refused(format!("{name} is {x}, wanted 0 to 1")) }
}

#[cfg(test)]
mod tests {
    use super::super::{Container, Pruner, SmoothQuant, Sparsity};
    use super::*;

    fn layer(algorithm: Algorithm, scheme: &str) -> LayerRecipe {
        LayerRecipe { algorithm, ..LayerRecipe::new(scheme.parse().unwrap()) }
    }

    fn recipe(experts: LayerRecipe) -> Recipe {
        Recipe::new(experts, layer(Algorithm::Gptq, "w8a16"))
    }

    fn refusal(recipe: &Recipe) -> String {
        recipe.check().unwrap_err().to_string()
    }

    #[test]
    fn awq_is_for_w4a16() {
        for scheme in ["w8a8", "w8a16", "w4a8", "fp8", "mxfp4", "w3a16"] {
            let e = refusal(&recipe(layer(Algorithm::Awq, scheme)));
            assert!(
                e.starts_with(&format!("the experts: AWQ is for w4a16, not for {scheme}; take the algorithm gptq")),
                "{e}"
            );
        }
        for symmetric in [true, false] {
            let layer = LayerRecipe { symmetric, ..layer(Algorithm::Awq, "w4a16") };
            assert_eq!(recipe(layer).check().unwrap(), Vec::<String>::new());
        }
        assert!(recipe(layer(Algorithm::Awq, "keep")).check().is_ok());
    }

    #[test]
    fn w4a8_needs_kernels_or_falls_back() {
        let mut r = recipe(layer(Algorithm::Gptq, "w4a8"));
        let e = refusal(&r);
        for way in ["w4a8 for the experts", "--allow-fallback", "--kernels present"] {
            assert!(e.contains(way), "{e}");
        }
        let mut present = r.clone();
        present.settle(Kernels::Present, true).unwrap();
        let mut dense = Recipe { container: Container::Dense, ..present.clone() };
        dense.settle(Kernels::Absent, false).unwrap();
        assert_eq!((present.has_w4a8(), present.kernels, present.notes.len()), (true, Kernels::Present, 0));
        assert!(r.clone().settle(Kernels::Absent, false).is_err());
        r.settle(Kernels::Absent, true).unwrap();
        assert_eq!((r.experts.scheme, r.kernels), (SchemeName::weight_only(4), Kernels::Absent));
        assert_eq!(r.notes, ["w4a16 in place of w4a8 for the experts: its kernels are not installed"]);
        // AWQ with w4a8 stays an error: falling back would make sense of it.
        let e = recipe(layer(Algorithm::Awq, "w4a8")).settle(Kernels::Absent, true).unwrap_err();
        assert!(e.to_string().contains("AWQ is for w4a16"));
    }

    #[test]
    fn zero_points_and_int8_inputs_have_their_schemes() {
        let asymmetric = |s| LayerRecipe { symmetric: false, ..layer(Algorithm::Gptq, s) };
        assert!(refusal(&recipe(asymmetric("fp8"))).contains("the experts: fp8 has no zero points"));
        assert!(refusal(&recipe(asymmetric("mxfp4"))).contains("mxfp4 has no zero points"));
        assert!(refusal(&recipe(asymmetric("w4a8"))).contains("w4a8 is symmetric"));
        assert!(recipe(asymmetric("w8a8")).check().is_ok());
        assert!(refusal(&recipe(layer(Algorithm::Rtn, "w5a8"))).contains("use w4a8 or w5a16"));
        assert!(refusal(&recipe(layer(Algorithm::Rtn, "dense"))).contains("the experts: dense without zeros"));
    }

    #[test]
    fn numbers_are_within_their_bounds() {
        let base = recipe(layer(Algorithm::Gptq, "w4a16"));
        let of = |change: &dyn Fn(&mut Recipe)| {
            let mut r = base.clone();
            change(&mut r);
            r.check().err().map(|e| e.to_string()).unwrap_or_default()
        };
        let sparse = |mask: &str, sparsity| Sparsity {
            algorithm: Pruner::Sparsegpt,
            mask: mask.parse().unwrap(),
            sparsity,
            block_size: 128,
            dampening_frac: 0.01,
            targets: Vec::new(),
            ignore: Vec::new(),
        };
        assert_eq!(of(&|r| r.sparsity = Some(sparse("2:4", 0.5))), "");
        assert_eq!(of(&|r| r.sparsity = Some(sparse("unstructured", 0.7))), "");
        assert!(
            of(&|r| r.sparsity = Some(sparse("2:4", 0.7)))
                .contains("a mask of 2:4 makes a sparsity of 0.5, not of 0.7")
        );
        assert!(of(&|r| r.sparsity = Some(sparse("unstructured", 1.0))).contains("sparsity is 1"));
        assert_eq!(of(&|r| r.gptq.block_size = 0), "block_size is 0, wanted at least 1");
        assert_eq!(of(&|r| r.gptq.dampening_frac = f64::NAN), "dampening_frac is NaN, wanted 0 to 1");
        assert_eq!(of(&|r| r.awq.n_grid = 0), "AWQ's n_grid is 0, wanted 1 to 1000");
        assert!(of(&|r| r.smoothquant = Some(SmoothQuant { strength: 1.5 })).contains("strength is 1.5"));
        assert!(of(&|r| r.calibration.few_tokens_threshold = -0.1).contains("few_tokens_threshold is -0.1"));
        let smooth = Recipe { smoothquant: Some(SmoothQuant { strength: 0.5 }), ..base.clone() };
        assert!(smooth.check().unwrap()[0].contains("no scheme of this recipe rounds inputs"));
    }
}
