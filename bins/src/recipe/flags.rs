//! The flags themselves, by what they speak of. What they mean together is in [`super`].
//!
//! A flag without a value may stand twice: command lines are put together from the parts of recipes.

use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::builder::TypedValueParser;
use clap::{Args, ValueEnum};
use gptoss::algorithms::Algorithm;
use gptoss::formats::ggml::Ggml;
use gptoss::formats::minifloat::Minifloat;
use gptoss::formats::ternary::Trits;
use gptoss::recipe::{ActOrder, Container, FewTokens, GroupSize, Mask, Observer, Pruner, SchemeName};

use crate::text::parse_bool;

/// Recipes of other tools.
#[derive(Debug, Clone, Args)]
pub struct FileArgs {
    /// AlphaQuant's JSON: default and overrides, each with wq, aq, group_size, skip
    #[arg(long, value_name = "FILE.json", conflicts_with = "recipe", help_heading = "Recipe")]
    pub config: Option<PathBuf>,
    /// llm-compressor's YAML: stages of modifiers
    #[arg(long, value_name = "FILE.yaml", help_heading = "Recipe")]
    pub recipe: Option<PathBuf>,
}

/// How layers are quantized.
#[derive(Debug, Clone, Args)]
pub struct LayerArgs {
    /// Algorithm for both classes: gptq, awq (int4 weights alone), pt-bitnet (2 to 4 bits), rtn (needs no calibration text)
    /// [default: gptq, for ternary schemes pt-bitnet]
    #[arg(long, visible_alias = "method", value_name = "NAME", help_heading = "Recipe")]
    pub algo: Option<Algorithm>,
    /// Algorithm for the experts [default: --algo]
    #[arg(long, value_name = "NAME", help_heading = "Recipe")]
    pub experts_algo: Option<Algorithm>,
    /// Algorithm for the other weights [default: --algo]
    #[arg(long, value_name = "NAME", help_heading = "Recipe")]
    pub mw_algo: Option<Algorithm>,
    /// Scheme of the experts; int4 and int8 mean w4a16 and w8a8 [default: w4a16]
    #[arg(long, visible_alias = "experts-scheme", value_name = "SCHEME", value_parser = scheme_or_type, help_heading = "Recipe")]
    pub experts: Option<SchemeName>,
    /// Scheme of the other weights; int4 and int8 mean w4a16 and w8a8 [default: w8a16]
    #[arg(long, visible_alias = "mw-scheme", value_name = "SCHEME", value_parser = scheme_or_type, help_heading = "Recipe")]
    pub mw: Option<SchemeName>,
    /// Type of the experts' weights: int2 to int8, fp8, mxfp4; alone it means the scheme with floating inputs
    #[arg(long, value_name = "TYPE", value_parser = WeightType::parse, help_heading = "Recipe")]
    pub experts_type: Option<WeightType>,
    /// Type of the other weights
    #[arg(long, value_name = "TYPE", value_parser = WeightType::parse, help_heading = "Recipe")]
    pub mw_type: Option<WeightType>,
    /// Quantize the output head too, with this scheme and --mw-algo where it is gptq, else rtn
    #[arg(long, value_name = "SCHEME", help_heading = "Recipe")]
    pub lm_head: Option<SchemeName>,
    /// Quantize the embedding too, with this scheme; always rtn, for no inputs are multiplied with it
    #[arg(long, visible_alias = "embeddings", value_name = "SCHEME", help_heading = "Recipe")]
    pub embed_tokens: Option<SchemeName>,
    /// Find the experts by their names, as always
    #[arg(long, overrides_with = "auto_detect_experts", help_heading = "Recipe")]
    pub auto_detect_experts: bool,
    /// Other experts: what matches this (re: and a regular expression) is quantized as the experts are, and experts that do
    /// not match as the other weights
    #[arg(long, value_name = "PATTERN", help_heading = "Recipe")]
    pub experts_regex: Option<String>,
    /// Columns that share a scale, where the scheme has groups: auto (the largest of 128, 64, 32 that divides in_features),
    /// channel, tensor, block (128 by 128), or a number; beside a recipe file in place of its group sizes [default: auto]
    #[arg(
        long,
        aliases = ["groupsize", "group_size"],
        value_name = "N",
        allow_hyphen_values = true,
        help_heading = "Recipe"
    )]
    pub group_size: Option<GroupSize>,
    /// The same for the experts alone [default: --group-size]
    #[arg(long, value_name = "N", allow_hyphen_values = true, help_heading = "Recipe")]
    pub experts_group_size: Option<GroupSize>,
    /// The same for the other weights alone [default: --group-size]
    #[arg(long, value_name = "N", allow_hyphen_values = true, help_heading = "Recipe")]
    pub mw_group_size: Option<GroupSize>,
    /// Zero points of 0 (the default)
    #[arg(long, overrides_with = "symmetric", conflicts_with = "asymmetric", help_heading = "Recipe")]
    pub symmetric: bool,
    /// A zero point for each group
    #[arg(long, help_heading = "Recipe")]
    pub asymmetric: bool,
    /// The same for the experts alone
    #[arg(long, value_enum, value_name = "KIND", help_heading = "Recipe")]
    pub experts_symmetry: Option<Symmetry>,
    /// The same for the other weights alone
    #[arg(long, value_enum, value_name = "KIND", help_heading = "Recipe")]
    pub mw_symmetry: Option<Symmetry>,
    /// More modules to leave as they are, beside mlp.router and, unless a flag gives them a scheme, embed_tokens and lm_head:
    /// name components (q_proj, layers.0),
    /// re: and a regular expression, or glob: and a shell pattern; may be given several times, names also with commas between
    #[arg(long, value_name = "PATTERN", help_heading = "Recipe")]
    pub extra_ignore: Vec<String>,
    /// How scales are fitted: minmax, or mse (shrunk to where the squared error is least); awq and pt-bitnet search by
    /// themselves [default: minmax]
    #[arg(long, value_name = "NAME", help_heading = "Recipe")]
    pub observer: Option<Observer>,
}

/// Recipes with a name. Sizes are of gpt-oss-20b, divergences of the tiny model in tests/fixtures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Preset {
    /// MXFP4 experts as they are, Q4_0, and Q8_0 for embedding and head, in a GGUF file: 11.8 GB, KL 0.003; llama.cpp and
    /// gptoss-run. Of a BF16 checkpoint add --experts q4_0: 12.4 GB, KL 0.006
    Snapdragon,
    /// MXFP4 experts as they are, Q8_0 otherwise, to nearest, in a GGUF file: 12.1 GB, no calibration; llama.cpp and
    /// gptoss-run. What a run without flags makes of an MXFP4 checkpoint
    #[value(name = "gguf-q8")]
    GgufQ8,
    /// Experts of -1, 0 and 1 in base 3, a scale a row, int8 otherwise: 5.7 GB, KL 0.20; gptoss-run alone
    Ternary,
    /// Experts of 2 bits, int4 otherwise: 6.3 GB, KL 0.14; gptoss-run alone
    #[value(name = "mobile-2bit")]
    Mobile2bit,
}

impl Preset {
    /// Schemes of experts, other weights, head and embedding.
    fn schemes(self) -> [SchemeName; 4] {
        let int = SchemeName::weight_only;
        match self {
            Self::Snapdragon => {
                let eight = SchemeName::Ggml(Ggml::Q8_0);
                [SchemeName::Keep, SchemeName::Ggml(Ggml::Q4_0), eight, eight]
            }
            Self::GgufQ8 => {
                let eight = SchemeName::Ggml(Ggml::Q8_0);
                [SchemeName::Keep, eight, eight, eight]
            }
            Self::Ternary => [SchemeName::Ternary(Trits::Fifths), int(8), int(8), int(8)],
            Self::Mobile2bit => [int(2), int(4), int(4), int(4)],
        }
    }

    /// The container, where it is no matter of taste.
    pub fn container(self) -> Option<Container> {
        matches!(self, Self::Snapdragon | Self::GgufQ8).then_some(Container::Gguf)
    }

    /// Lays itself under the flags that were given.
    pub fn lay_under(self, l: &mut LayerArgs) {
        let [experts, mw, head, embedding] = self.schemes();
        // A type says which scheme is meant, too.
        let own = l.experts.is_none() && l.experts_type.is_none();
        if own {
            l.experts = Some(experts);
        }
        if l.mw_type.is_none() {
            l.mw.get_or_insert(mw);
        }
        if self == Self::GgufQ8 {
            l.algo.get_or_insert(Algorithm::Rtn);
        }
        l.lm_head.get_or_insert(head);
        l.embed_tokens.get_or_insert(embedding);
        if own && self == Self::Ternary && l.group_size.is_none() {
            l.experts_group_size.get_or_insert(GroupSize::Channel);
        }
    }
}

/// Settings of the algorithms.
#[derive(Debug, Clone, Args)]
pub struct AlgorithmArgs {
    /// Columns among which an unstructured mask is chosen; GPTQ's and N:M masks' bits do not depend on it [default: 128]
    #[arg(long, alias = "blocksize", value_name = "N", help_heading = "Algorithms")]
    pub block_size: Option<usize>,
    /// Added to the Hessian's diagonal, as a share of its mean [default: 0.01]
    #[arg(long, alias = "percdamp", value_name = "F", help_heading = "Algorithms")]
    pub dampening_frac: Option<f64>,
    /// GPTQ's order of columns: static (alias weight; groups stay where they are) or off [default: static]
    #[arg(long, value_name = "ORDER", num_args = 0..=1, default_missing_value = "static", help_heading = "Algorithms")]
    pub actorder: Option<ActOrder>,
    /// Passes of coordinate descent behind GPTQ's sweep; 0 is GPTQ as published, and pt-bitnet has its own number [default: 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=16), help_heading = "Algorithms")]
    pub descent: Option<u8>,
    /// Fit scales once, before the columns are gone through: always so
    #[arg(
        long,
        alias = "static_groups",
        value_name = "BOOL",
        num_args = 0..=1,
        default_missing_value = "true",
        value_parser = parse_bool,
        help_heading = "Algorithms"
    )]
    pub static_groups: Option<bool>,
    /// Exponents that AWQ tries [default: 20]
    #[arg(long, value_name = "N", help_heading = "Algorithms")]
    pub awq_grid: Option<usize>,
    /// SmoothQuant before rounding: 0 leaves the inputs' range to themselves, 1 moves all of it into the weights; 0.5 is usual
    #[arg(long, alias = "smoothing_strength", value_name = "F", help_heading = "Algorithms")]
    pub smoothquant_strength: Option<f64>,
    /// Make zeros before rounding and keep them through it
    #[arg(long, overrides_with = "with_sparse", help_heading = "Algorithms")]
    pub with_sparse: bool,
    /// Share of zeros [default: what the mask makes, or 0.5]
    #[arg(long, value_name = "F", requires = "with_sparse", help_heading = "Algorithms")]
    pub sparsity: Option<f64>,
    /// N:M for N zeros in every M columns, or unstructured [default: 2:4]
    #[arg(long, value_name = "MASK", requires = "with_sparse", help_heading = "Algorithms")]
    pub mask: Option<Mask>,
    /// Who chooses the zeros [default: sparsegpt]
    #[arg(
        long,
        value_name = "NAME",
        value_parser = PossibleValuesParser::new(["sparsegpt", "wanda"]).map(pruner),
        requires = "with_sparse",
        help_heading = "Algorithms"
    )]
    pub sparse_algo: Option<Pruner>,
}

/// How statistics are gathered, and where they lie meanwhile.
#[derive(Debug, Clone, Args)]
pub struct StatisticsArgs {
    /// A layer's inputs come through the layers before it as they were, not as quantized
    #[arg(long, conflicts_with = "sequential_update", help_heading = "Calibration")]
    pub no_sequential_update: bool,
    /// A layer's inputs come through the quantized layers before it (the default)
    #[arg(long, help_heading = "Calibration")]
    pub sequential_update: bool,
    /// Experts that few tokens reach: round to nearest, or take all tokens, equal or weighted by the router's probability
    /// [default: weighted]
    #[arg(
        long,
        value_name = "HOW",
        value_parser = PossibleValuesParser::new(["rtn", "all-experts", "weighted"]).map(few_tokens),
        help_heading = "Calibration"
    )]
    pub few_tokens: Option<FewTokens>,
    /// What share of all tokens is few; 1 takes every expert for one with few [default: 0.005]
    #[arg(long, value_name = "F", help_heading = "Calibration")]
    pub few_tokens_threshold: Option<f64>,
    /// A token counts for an expert by the router's weight
    #[arg(long, overrides_with = "router_weighted", help_heading = "Calibration")]
    pub router_weighted: bool,
    /// Keep Hessians in the offload folder; changes the speed, never the output
    #[arg(long, overrides_with = "offload_hessians", alias = "offload_hessians", help_heading = "Calibration")]
    pub offload_hessians: bool,
    /// Where hidden states go: those that a run resumes from, and those, with Hessians, that do not fit in --max-memory [default:
    /// beside the unfinished output]
    #[arg(long, value_name = "DIR", help_heading = "Calibration")]
    pub offload_folder: Option<PathBuf>,
}

/// What becomes of w4a8, which needs kernels.
#[derive(Debug, Clone, Args)]
pub struct KernelArgs {
    /// Whether the kernels of w4a8 count as installed; the recipe records it
    #[arg(long, value_enum, value_name = "STATE", default_value = "detect", help_heading = "Kernels")]
    pub kernels: Installed,
    /// Take w4a16 in place of w4a8 where its kernels are missing
    #[arg(long, overrides_with = "allow_fallback", help_heading = "Kernels")]
    pub allow_fallback: bool,
    /// Install them with gptoss-kernel-install where they are missing; asks first
    #[arg(long, overrides_with = "try_install_qqq", help_heading = "Kernels")]
    pub try_install_qqq: bool,
    /// Do not ask
    #[arg(long, overrides_with = "yes", short, help_heading = "Kernels")]
    pub yes: bool,
}

/// Whether kernels count as installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Installed {
    /// Look
    Detect,
    /// They are, whatever is here
    Present,
    /// They are not, whatever is here
    Absent,
}

/// The type of a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeightType(SchemeName);

impl WeightType {
    fn parse(text: &str) -> Result<Self, String> {
        match text.to_ascii_lowercase().as_str() {
            name @ ("fp4" | "fp6" | "fp8" | "mxfp4" | "mxfp6" | "mxfp8" | "nvfp4") => {
                Ok(Self(name.parse().expect("these are schemes")))
            }
            other => match other.strip_prefix("int").map(str::parse) {
                Some(Ok(bits @ 2..=8)) => Ok(Self(SchemeName::weight_only(bits))),
                _ => Err("wanted int2 to int8, fp4, fp6, fp8, mxfp4, mxfp6, mxfp8 or nvfp4".into()),
            },
        }
    }

    /// The scheme that it means alone.
    pub fn alone(self) -> SchemeName {
        self.0
    }

    /// Whether `scheme` stores this type.
    pub fn fits(self, scheme: SchemeName) -> bool {
        let fp8 = [SchemeName::Fp8, SchemeName::Fp8Static, SchemeName::Fp8Block, SchemeName::Float(Minifloat::E4M3)];
        self.0 == scheme
            || (self.0 == SchemeName::Fp8 && fp8.contains(&scheme))
            || (self.0.int_bits().is_some() && self.0.int_bits() == scheme.int_bits())
    }

    /// As it was given.
    pub fn name(self) -> String {
        self.0.int_bits().map_or_else(|| self.0.to_string(), |bits| format!("int{bits}"))
    }
}

/// Whether there are zero points.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Symmetry {
    /// Zero points of 0
    Symmetric,
    /// A zero point for each group
    Asymmetric,
}

/// A scheme, or a type of weights as a shortcut for the scheme that it is mostly used in: int8 beside int8 inputs, narrower
/// integers beside floating ones.
fn scheme_or_type(text: &str) -> Result<SchemeName, String> {
    text.parse().map_err(|e: gptoss::Error| e.to_string()).or_else(|e| match text {
        "int8" => Ok(SchemeName::Int { bits: 8, int8_activations: true }),
        _ if text.starts_with("int") => WeightType::parse(text).map(WeightType::alone),
        _ => Err(e),
    })
}

fn pruner(name: String) -> Pruner {
    if name == "wanda" { Pruner::Wanda } else { Pruner::Sparsegpt }
}

fn few_tokens(name: String) -> FewTokens {
    match name.as_str() {
        "rtn" => FewTokens::Rtn,
        "all-experts" => FewTokens::AllExperts,
        _ => FewTokens::Weighted,
    }
}
