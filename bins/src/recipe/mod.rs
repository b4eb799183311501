//! From the command line to a recipe: flags, or the file of another tool with flags beside it.

mod flags;
mod kernels;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use gptoss::algorithms::Algorithm;
use gptoss::formats::ternary::Trits;
use gptoss::model::{ModelConfig, linears};
use gptoss::pipeline::progress::Progress;
use gptoss::pipeline::quant::target::Wish;
use gptoss::recipe::pattern::Patterns;
use gptoss::recipe::{
    Container, DEFAULT_IGNORE, GroupSize, LayerRecipe, Mask, Override, Recipe, SchemeName, SmoothQuant, Sparsity,
    alphaquant, llm_compressor, settings, simplify,
};
use gptoss::runtimes::Runtime;
use serde_json::{Map, Value};

pub use self::flags::{
    AlgorithmArgs, FileArgs, Installed, KernelArgs, LayerArgs, Preset, StatisticsArgs, Symmetry, WeightType,
};
use crate::parse_size;

/// Every flag that the output depends on, but for those that say which text is used.
#[derive(Debug, Clone, clap::Args)]
pub struct RecipeArgs {
    #[command(flatten)]
    files: FileArgs,
    /// A recipe by name; flags beside it replace its parts
    #[arg(long, value_enum, value_name = "NAME", conflicts_with_all = ["config", "recipe", "keep_codes"], help_heading = "Recipe")]
    preset: Option<Preset>,
    #[command(flatten)]
    layers: LayerArgs,
    #[command(flatten)]
    algorithms: AlgorithmArgs,
    #[command(flatten)]
    statistics: StatisticsArgs,
    #[command(flatten)]
    kernels: KernelArgs,
    /// The runtime that must load the output: vllm, transformers, llama.cpp or native (gptoss-run). It chooses container,
    /// names and, where nothing else would do, padding; or says by which rule it cannot be, and what comes nearest [default:
    /// vllm where a rule allows the recipe, else none]
    #[arg(long, value_name = "RUNTIME", help_heading = "Recipe")]
    target: Option<Runtime>,
    /// GPUs over which vLLM must be able to cut every layer: 1, 2, 4 or 8. It chooses the groups that nobody chose, or padding, whichever is
    /// smaller; without it a note says which numbers the output serves
    #[arg(long, value_name = "N", value_parser = parse_gpus, conflicts_with_all = ["keep_codes", "target_size"], help_heading = "Recipe")]
    tensor_parallel: Option<usize>,
    /// What the output is: compressed-tensors (experts that all are MXFP4 in OpenAI's own layout), openai (MXFP4 experts in
    /// that layout, floats beside them, nothing else), dense (the floats that the codes stand for: as large as the source in
    /// BF16, holds every format), gguf (one file for llama.cpp, tokenizer and all), vllm-int (int4 or int8 experts as w13_*
    /// and w2_*), vllm-fp8 (FP8 experts in quark's words) [default: what the target asks for]
    #[arg(long, value_name = "NAME", help_heading = "Recipe")]
    container: Option<Container>,
    /// Change the container alone: codes and scales stay what they are (compressed-tensors int4 or int8 to vllm-int and back,
    /// MXFP4 to gguf and back)
    #[arg(long, requires = "container", conflicts_with_all = ["algo", "experts", "mw", "config", "recipe", "pad_to", "target"], help_heading = "Recipe")]
    keep_codes: bool,
    /// Widen hidden and intermediate size to multiples of N with zeros: the same function, in which group size 128 (N = 128)
    /// and 256-wide formats (N = 256) fit a gpt-oss
    #[arg(long, value_name = "N", help_heading = "Recipe")]
    pad_to: Option<usize>,
    /// Most bytes of weights in the output, such as 8GB. The recipe is then the least that each layer gets; where the text shows
    /// that it loses most, experts and attentions get more bits, one by one, until the size is reached. Without --experts
    /// the least is ternary_b3, but for --container gguf
    #[arg(long, value_name = "SIZE", value_parser = parse_size, conflicts_with = "keep_codes", help_heading = "Recipe")]
    target_size: Option<u64>,
    /// Where the measured errors of --target-size are kept, or were by a run for another size [default: beside the output,
    /// OUTPUT.sensitivity.json]
    #[arg(long, value_name = "FILE", requires = "target_size", help_heading = "Recipe")]
    sensitivity: Option<PathBuf>,
    /// Most data in one shard
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = parse_size)]
    shard_size: u64,
}

fn parse_gpus(text: &str) -> Result<usize, String> {
    match text {
        "1" | "2" | "4" | "8" => Ok(usize::from(text.as_bytes()[0] - b'0')),
        _ => Err("wanted 1, 2, 4 or 8".into()),
    }
}

impl RecipeArgs {
    /// The flags that were given, and those that a preset stands for.
    pub fn with_preset(mut self) -> Self {
        if let Some(preset) = self.preset {
            preset.lay_under(&mut self.layers);
            self.container = self
                .container
                .or(preset.container().filter(|_| self.target.is_none() && self.tensor_parallel.is_none()));
        }
        self
    }

    /// The recipe for a run that says nothing of one: an output that is smaller than its source and that a public runtime
    /// loads. MXFP4 experts have lost nothing at 4 bits, so they stay, and the rest goes to 8 bits in a GGUF file; another
    /// checkpoint gets the default schemes, as vLLM reads them. `text` says that a calibration text is given.
    pub fn with_default(mut self, config: &Map<String, Value>, text: bool) -> Self {
        if self.says_something() {
            return self;
        }
        if config.get("quantization_config").is_some_and(|q| q["quant_method"] == "mxfp4")
            && !text
            && self.tensor_parallel.is_none()
        {
            self.preset = Some(Preset::GgufQ8);
            return self.with_preset();
        }
        self.target = Some(Runtime::Vllm);
        self
    }

    fn says_something(&self) -> bool {
        let flags = self.of_classes().chain(self.of_modifiers()).chain(self.of_both()).any(|f| f.1);
        let files = self.files.config.is_some() || self.files.recipe.is_some() || self.preset.is_some();
        let output = self.container.is_some() || self.target.is_some() || self.pad_to.is_some();
        flags || files || output || self.keep_codes || self.target_size.is_some()
    }

    /// Finds what contradicts itself, before anything is looked at.
    pub fn check(&self) -> Result<()> {
        if self.algorithms.static_groups == Some(false) {
            bail!("--static-groups false: {}", settings::STATIC_GROUPS);
        }
        if let (Some(_), Some(target)) = (self.tensor_parallel, self.target.filter(|t| *t != Runtime::Vllm)) {
            bail!("--tensor-parallel is about vLLM: leave out --target {}", target.name());
        }
        if let Some(pattern) = self.layers.experts_regex.as_ref().filter(|p| !p.starts_with("re:")) {
            bail!("--experts-regex {pattern}: wanted re: and a regular expression, such as 're:.*experts.*'");
        }
        if self.keep_codes
            && let Some((flag, _)) = self.of_classes().chain(self.of_modifiers()).chain(self.of_both()).find(|f| f.1)
        {
            bail!("--keep-codes rounds nothing: leave out {flag}");
        }
        if let Some(file) = &self.files.recipe {
            self.alone("--recipe", file, self.of_classes().chain(self.of_modifiers()))?;
        }
        if let Some(file) = &self.files.config {
            self.alone("--config", file, self.of_classes())?;
        }
        if self.files.config.is_none() && self.files.recipe.is_none() {
            // Only the patterns need a model: whatever else is wrong shows here.
            let mut recipe = self.flags_alone()?;
            self.lay_over(&mut recipe);
            recipe.settle(gptoss::recipe::Kernels::Present, false)?;
        }
        Ok(())
    }

    fn alone(&self, flag: &str, file: &Path, mut others: impl Iterator<Item = (&'static str, bool)>) -> Result<()> {
        match others.find(|o| o.1) {
            Some((other, _)) => bail!("{flag} {} says that already: leave out {other}", file.display()),
            None => Ok(()),
        }
    }

    /// Flags that speak of one class, and of symmetry.
    fn of_classes(&self) -> impl Iterator<Item = (&'static str, bool)> + use<> {
        let l = &self.layers;
        [
            ("--experts-algo", l.experts_algo.is_some()),
            ("--mw-algo", l.mw_algo.is_some()),
            ("--experts-scheme", l.experts.is_some()),
            ("--mw-scheme", l.mw.is_some()),
            ("--experts-type", l.experts_type.is_some()),
            ("--mw-type", l.mw_type.is_some()),
            ("--experts-group-size", l.experts_group_size.is_some()),
            ("--mw-group-size", l.mw_group_size.is_some()),
            ("--lm-head", l.lm_head.is_some()),
            ("--embed-tokens", l.embed_tokens.is_some()),
            ("--experts-regex", l.experts_regex.is_some()),
            ("--symmetric", l.symmetric),
            ("--asymmetric", l.asymmetric),
            ("--experts-symmetry", l.experts_symmetry.is_some()),
            ("--mw-symmetry", l.mw_symmetry.is_some()),
        ]
        .into_iter()
    }

    /// Flags that no file of another tool replaces.
    fn of_both(&self) -> impl Iterator<Item = (&'static str, bool)> + use<> {
        [
            ("--group-size", self.layers.group_size.is_some()),
            ("--extra-ignore", !self.layers.extra_ignore.is_empty()),
            ("--descent", self.algorithms.descent.is_some()),
        ]
        .into_iter()
    }

    /// Flags whose settings stand in modifiers.
    fn of_modifiers(&self) -> impl Iterator<Item = (&'static str, bool)> + use<> {
        let a = &self.algorithms;
        [
            ("--algo", self.layers.algo.is_some()),
            ("--observer", self.layers.observer.is_some()),
            ("--block-size", a.block_size.is_some()),
            ("--dampening-frac", a.dampening_frac.is_some()),
            ("--actorder", a.actorder.is_some()),
            ("--awq-grid", a.awq_grid.is_some()),
            ("--smoothquant-strength", a.smoothquant_strength.is_some()),
            ("--with-sparse", a.with_sparse),
        ]
        .into_iter()
    }

    /// Whether nothing is rounded.
    pub fn keeps_codes(&self) -> bool {
        self.keep_codes
    }

    /// The size of the output, and the file of what was measured for it.
    pub fn target_size(&self) -> Option<(u64, Option<&Path>)> {
        self.target_size.map(|bytes| (bytes, self.sensitivity.as_deref()))
    }

    /// Where the output is to go.
    pub fn wish(&self) -> Wish {
        Wish {
            target: self.target,
            container: self.container,
            narrow: self.target_size.is_some(),
            tensor_parallel: self.tensor_parallel,
        }
    }

    /// The recipe for a model of these shapes. What depends on the machine, the kernels, is settled here.
    pub fn resolve(&self, config: &ModelConfig, dry_run: bool, progress: &Progress) -> Result<Recipe> {
        if let (true, Some(container)) = (self.keep_codes, self.container) {
            return Ok(Recipe { shard_size: self.shard_size, ..Recipe::keeping_codes(container) });
        }
        let mut recipe = match (&self.files.config, &self.files.recipe) {
            (Some(file), _) => alphaquant::read(file, config)?,
            (None, Some(file)) => llm_compressor::read(file, config)?,
            (None, None) => self.flags_alone()?,
        };
        if self.files.config.is_some() || self.files.recipe.is_some() {
            self.replace_layers(&mut recipe);
        }
        if let Some(pattern) = &self.layers.experts_regex {
            let compiled = Patterns::new(std::slice::from_ref(pattern))?;
            if !linears(config).any(|l| compiled.any(&l.module())) {
                bail!(
                    "--experts-regex {pattern}: matches no module of this model; the experts are model.layers.N.mlp.experts.N.*"
                );
            }
            recipe = simplify(recipe, config, Path::new("--experts-regex"))?;
        }
        self.lay_over(&mut recipe);
        kernels::settle(&mut recipe, &self.kernels, dry_run, progress)?;
        Ok(recipe)
    }

    /// Where Hessians and hidden states go; none of it changes the output.
    pub fn statistics(&self) -> &StatisticsArgs {
        &self.statistics
    }

    fn flags_alone(&self) -> Result<Recipe> {
        let l = &self.layers;
        let symmetry = |own: Option<Symmetry>| own.map_or(!l.asymmetric, |s| s == Symmetry::Symmetric);
        let algorithm = l.algo.unwrap_or(Algorithm::Gptq);
        let group_size = l.group_size.unwrap_or(GroupSize::Auto);
        let observer = l.observer.unwrap_or_default();
        let grows = self.target_size.is_some() && self.container != Some(Container::Gguf);
        let least = if grows { SchemeName::Ternary(Trits::Fifths) } else { SchemeName::weight_only(4) };
        let experts = LayerRecipe {
            algorithm: l.experts_algo.unwrap_or(algorithm),
            scheme: scheme("experts", l.experts, l.experts_type, least)?,
            symmetric: symmetry(l.experts_symmetry),
            group_size: l.experts_group_size.unwrap_or(group_size),
            observer,
        };
        let mw = LayerRecipe {
            algorithm: l.mw_algo.unwrap_or(algorithm),
            scheme: scheme("mw", l.mw, l.mw_type, SchemeName::weight_only(8))?,
            symmetric: symmetry(l.mw_symmetry),
            group_size: l.mw_group_size.unwrap_or(group_size),
            observer,
        };
        let mut recipe = Recipe::new(experts, mw);
        for (own, layer) in [(l.experts_algo, &mut recipe.experts), (l.mw_algo, &mut recipe.mw)] {
            // What GPTQ makes of absmean is no use.
            if own.or(l.algo).is_none() && layer.scheme.is_ternary() {
                layer.algorithm = Algorithm::PtBitnet;
            }
        }
        recipe.ignore = DEFAULT_IGNORE.map(str::to_owned).to_vec();
        if let Some(pattern) = &l.experts_regex {
            let over = |targets: &str, ignore: &str, layer: &LayerRecipe| Override {
                targets: vec![targets.to_owned()],
                ignore: vec![ignore.to_owned()],
                layer: layer.clone(),
            };
            recipe.overrides =
                vec![over("mlp.experts", pattern, &recipe.mw), over(pattern, "mlp.experts", &recipe.experts)];
        }
        for (module, scheme, calibrated) in
            [("embed_tokens", l.embed_tokens, false), ("lm_head", l.lm_head, recipe.mw.algorithm == Algorithm::Gptq)]
        {
            let Some(scheme) = scheme else { continue };
            if module == "embed_tokens" && scheme.rounds_inputs() {
                bail!(
                    "--embed-tokens {scheme}: nothing is multiplied with the embedding, so it has no inputs to round; take w8a16"
                );
            }
            let algorithm = if calibrated { Algorithm::Gptq } else { Algorithm::Rtn };
            let (group_size, observer) = (l.group_size.unwrap_or(GroupSize::Auto), recipe.mw.observer);
            let layer = LayerRecipe { algorithm, observer, group_size, ..LayerRecipe::new(scheme) };
            recipe.also(module, layer);
        }
        Ok(recipe)
    }

    /// The flags that count for every layer of a file.
    fn replace_layers(&self, recipe: &mut Recipe) {
        let l = &self.layers;
        for layer in recipe.layers_mut().filter(|layer| layer.is_rounded()) {
            layer.algorithm = l.algo.unwrap_or(layer.algorithm);
            layer.observer = l.observer.unwrap_or(layer.observer);
            if layer.group_size != GroupSize::Channel {
                layer.group_size = l.group_size.unwrap_or(layer.group_size);
            }
        }
    }

    /// The settings that are one for all layers, and patterns to ignore.
    fn lay_over(&self, recipe: &mut Recipe) {
        // A regular expression or a glob may have commas of its own.
        let extra =
            self.layers.extra_ignore.iter().flat_map(|p| match p.starts_with("re:") || p.starts_with("glob:") {
                true => vec![p.clone()],
                false => p.split(',').map(str::to_owned).collect(),
            });
        recipe.ignore.extend(extra);
        let (a, s) = (&self.algorithms, &self.statistics);
        let put = |flag: Option<usize>, to: &mut usize| *to = flag.unwrap_or(*to);
        put(a.block_size, &mut recipe.gptq.block_size);
        put(a.awq_grid, &mut recipe.awq.n_grid);
        recipe.gptq.dampening_frac = a.dampening_frac.unwrap_or(recipe.gptq.dampening_frac);
        recipe.gptq.actorder = a.actorder.unwrap_or(recipe.gptq.actorder);
        recipe.gptq.descent = a.descent.map_or(recipe.gptq.descent, usize::from);
        if let Some(strength) = a.smoothquant_strength {
            recipe.smoothquant = Some(SmoothQuant { strength });
        }
        if a.with_sparse {
            recipe.sparsity = Some(self.sparsity(recipe));
        }
        let c = &mut recipe.calibration;
        c.sequential_update = s.sequential_update || (c.sequential_update && !s.no_sequential_update);
        c.few_tokens = s.few_tokens.unwrap_or(c.few_tokens);
        c.few_tokens_threshold = s.few_tokens_threshold.unwrap_or(c.few_tokens_threshold);
        c.router_weighted |= s.router_weighted;
        recipe.container = self.container.unwrap_or(recipe.container);
        recipe.pad_to = self.pad_to.or(recipe.pad_to);
        recipe.shard_size = self.shard_size;
    }

    fn sparsity(&self, recipe: &Recipe) -> Sparsity {
        let (a, l) = (&self.algorithms, &self.layers);
        let quantized =
            [("embed_tokens", l.embed_tokens), ("lm_head", l.lm_head)].into_iter().filter(|m| m.1.is_some());
        let mask = a.mask.unwrap_or(Mask::Structured { zeros: 2, of: 4 });
        let share = match mask {
            Mask::Structured { zeros, of } => zeros as f64 / of as f64,
            Mask::Unstructured => 0.5,
        };
        Sparsity {
            algorithm: a.sparse_algo.unwrap_or_default(),
            mask,
            sparsity: a.sparsity.unwrap_or(share),
            block_size: recipe.gptq.block_size,
            dampening_frac: recipe.gptq.dampening_frac,
            targets: Vec::new(),
            // To quantize them is no wish for zeros in them.
            ignore: quantized.map(|(module, _)| module.to_owned()).collect(),
        }
    }
}

/// A scheme and a weight type must agree; either alone is enough.
fn scheme(
    class: &str,
    scheme: Option<SchemeName>,
    weight: Option<WeightType>,
    default: SchemeName,
) -> Result<SchemeName> {
    match (scheme, weight) {
        (Some(s), Some(t)) if !t.fits(s) => {
            bail!("--{class}-scheme {s} does not have weights of --{class}-type {}", t.name())
        }
        (Some(s), _) => Ok(s),
        (None, Some(t)) => Ok(t.alone()),
        (None, None) => Ok(default),
    }
}

#[cfg(test)]
mod tests;
