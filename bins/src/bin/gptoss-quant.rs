//! Applies a quantization recipe to a gpt-oss checkpoint.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Parser, ValueEnum};
use gptoss::algorithms::Algorithm;
use gptoss::checkpoint::INDEX;
use gptoss::checkpoint::destination::{check_destination, check_room};
use gptoss::checkpoint::hub::Wanted;
use gptoss::checkpoint::source::{Checkpoint, read_config, read_object};
use gptoss::model::ModelConfig;
use gptoss::pipeline::quant::Plan;
use gptoss::pipeline::{Paths, meter::Meter, model_name};
use gptoss::recipe::{DEFAULT_IGNORE, GroupSize, LayerRecipe, Recipe, SchemeName};
use gptoss_tools::{Common, parse_size, run, source, volatile};

/// Quantize a gpt-oss checkpoint: experts and the other weights ("mw") each by their own recipe.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:
  gptoss-quant --model-in ./gpt-oss-20b --experts w4a16 --mw w8a16
  gptoss-quant --model-in ./gpt-oss-20b --experts keep --mw w8a8 --output-dir out
  gptoss-quant --model-in ./gpt-oss-120b/config.json --dry-run
  gptoss-dequant --src ./gpt-oss-20b --dst bf16 | gptoss-quant --experts w4a16 | gptoss-verify

Schemes: w4a16 (int4 weights), w8a16 (int8 weights), w8a8 (int8 weights a channel, int8 activations a token),
keep (as in the source, bit for bit). Algorithms: rtn (needs no calibration text).
The output is a compressed-tensors checkpoint with llm-compressor's names; the manifest says which runtimes load it.
Exit codes: 0 done, 2 an error."
)]
struct Args {
    /// A checkpoint's folder, a hub id (org/name or org/name@revision), or - for the output of the manifest on standard
    /// input; a folder or file with a config.json alone is enough for --dry-run
    #[arg(long, value_name = "DIR|ID")]
    model_in: Option<String>,
    /// The folder to write [default: MODEL-ALGOS-experts-SCHEME-mw-SCHEME in the current folder]
    #[arg(long, value_name = "DIR")]
    output_dir: Option<PathBuf>,
    /// Plan, check everything, print the plan, write nothing
    #[arg(long)]
    dry_run: bool,
    /// Replace a checkpoint that stands at the output folder, and whatever unfinished output lies beside it
    #[arg(long)]
    force: bool,
    /// Most data in one shard
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = parse_size)]
    shard_size: u64,

    /// Algorithm for both classes
    #[arg(long, value_name = "NAME", default_value = "rtn", help_heading = "Recipe")]
    algo: Algorithm,
    /// Algorithm for the experts [default: --algo]
    #[arg(long, value_name = "NAME", help_heading = "Recipe")]
    experts_algo: Option<Algorithm>,
    /// Algorithm for the other weights [default: --algo]
    #[arg(long, value_name = "NAME", help_heading = "Recipe")]
    mw_algo: Option<Algorithm>,
    /// Scheme of the experts: w4a16, w8a16, w8a8, keep [default: w4a16]
    #[arg(long, visible_alias = "experts-scheme", value_name = "SCHEME", help_heading = "Recipe")]
    experts: Option<SchemeName>,
    /// Scheme of the other weights: w4a16, w8a16, w8a8, keep [default: w8a16]
    #[arg(long, visible_alias = "mw-scheme", value_name = "SCHEME", help_heading = "Recipe")]
    mw: Option<SchemeName>,
    /// Type of the experts' weights; alone it means w4a16 or w8a16
    #[arg(long, value_enum, value_name = "TYPE", help_heading = "Recipe")]
    experts_type: Option<WeightType>,
    /// Type of the other weights; alone it means w4a16 or w8a16
    #[arg(long, value_enum, value_name = "TYPE", help_heading = "Recipe")]
    mw_type: Option<WeightType>,
    /// Columns that share a scale: auto (the largest of 128, 64, 32 that divides in_features), channel, or a number
    #[arg(long, value_name = "N", default_value = "auto", allow_hyphen_values = true, help_heading = "Recipe")]
    group_size: GroupSize,
    /// The same for the experts alone [default: --group-size]
    #[arg(long, value_name = "N", allow_hyphen_values = true, help_heading = "Recipe")]
    experts_group_size: Option<GroupSize>,
    /// The same for the other weights alone [default: --group-size]
    #[arg(long, value_name = "N", allow_hyphen_values = true, help_heading = "Recipe")]
    mw_group_size: Option<GroupSize>,
    /// Zero points of 0 (the default)
    #[arg(long, conflicts_with = "asymmetric", help_heading = "Recipe")]
    symmetric: bool,
    /// A zero point for each group
    #[arg(long, help_heading = "Recipe")]
    asymmetric: bool,
    /// The same for the experts alone
    #[arg(long, value_enum, value_name = "KIND", help_heading = "Recipe")]
    experts_symmetry: Option<Symmetry>,
    /// The same for the other weights alone
    #[arg(long, value_enum, value_name = "KIND", help_heading = "Recipe")]
    mw_symmetry: Option<Symmetry>,
    /// More modules to leave as they are, beside embed_tokens, mlp.router and lm_head: name components (q_proj, layers.0)
    /// or re: and a regular expression; may be given several times, names also with commas between
    #[arg(long, value_name = "PATTERN", help_heading = "Recipe")]
    extra_ignore: Vec<String>,

    #[command(flatten)]
    text: gptoss_tools::text::TextArgs,
    #[command(flatten)]
    common: Common,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum WeightType {
    /// 4 bits
    Int4,
    /// 8 bits
    Int8,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Symmetry {
    /// Zero points of 0
    Symmetric,
    /// A zero point for each group
    Asymmetric,
}

fn main() -> ExitCode {
    let args = Args::parse();
    run("gptoss-quant", || quantize(&args))
}

fn quantize(args: &Args) -> Result<ExitCode> {
    let recipe = args.recipe()?;
    let resources = args.common.resources();
    let wanted = if args.dry_run { Wanted::ConfigOnly } else { Wanted::Everything };
    let located = source(args.model_in.as_deref(), "--model-in", wanted, &resources.progress)?;
    let meter = Meter::start();
    if args.dry_run {
        return dry_run(args, &located.dir, recipe);
    }
    let checkpoint = Checkpoint::open(&located.dir)?;
    let plan = Plan::new(&located.dir, &checkpoint.config, recipe.clone(), Some(&checkpoint))?;
    let model = model_name(&located.dir, &ModelConfig::parse(&located.dir, &checkpoint.config)?);
    let dst = args.output_dir.clone().unwrap_or_else(|| recipe.output_name(&model).into());
    let paths = Paths { src: located.dir.clone(), dst: dst.clone(), force: args.force };
    let text = match plan.needs_text() {
        true => Some(gptoss::text::load(
            &args.text.request(Some(256), gptoss::text::dataset::Split::Train)?,
            &gptoss::text::tokenizer::Tokenizer::open(
                &located.dir,
                ModelConfig::parse(&located.dir, &checkpoint.config)?.vocab,
            )?,
            &located.dir,
            &resources.progress,
        )?),
        false => None,
    };
    let (mut manifest, resumed) = plan.run(&paths, &resources, text.as_ref())?;
    manifest.notes.iter().for_each(|n| resources.progress.note(&format!("note: {n}")));
    manifest.volatile = Some(volatile(&located, Some(&dst), meter.read(), resources.threads, resumed));
    args.common.emit(&manifest)?;
    Ok(ExitCode::SUCCESS)
}

/// Plans from headers where weights are there (and then checks destination and room as a run would), from the config
/// alone where they are not.
fn dry_run(args: &Args, path: &Path, recipe: Recipe) -> Result<ExitCode> {
    let has_weights = path.join(INDEX).exists() || path.join("model.safetensors").exists();
    let file = path.is_file();
    let dir = if file { path.parent().unwrap_or(path) } else { path };
    let config = if file { read_object(path)? } else { read_config(path)? };
    let checkpoint = if has_weights { Some(Checkpoint::open(path)?) } else { None };
    let model = model_name(dir, &ModelConfig::parse(dir, &config)?);
    let dst = args.output_dir.clone().unwrap_or_else(|| recipe.output_name(&model).into());
    let manifest = Plan::new(dir, &config, recipe, checkpoint.as_ref())?.preview();
    if has_weights {
        let dst = check_destination(dir, &dst, args.force)?;
        check_room(&dst, manifest.plan.as_ref().map_or(0, |p| p.bytes))?;
    }
    args.common.emit(&manifest)?;
    Ok(ExitCode::SUCCESS)
}

impl Args {
    fn recipe(&self) -> Result<Recipe> {
        let symmetry = |own: Option<Symmetry>| own.map_or(!self.asymmetric, |s| s == Symmetry::Symmetric);
        // A regular expression may have commas of its own.
        let extra = self.extra_ignore.iter().flat_map(|p| match p.starts_with("re:") {
            true => vec![p.clone()],
            false => p.split(',').map(str::to_owned).collect(),
        });
        let ignore = DEFAULT_IGNORE.into_iter().map(str::to_owned).chain(extra).collect();
        Ok(Recipe {
            experts: LayerRecipe {
                algorithm: self.experts_algo.unwrap_or(self.algo),
                scheme: scheme("experts", self.experts, self.experts_type, SchemeName::weight_only(4))?,
                symmetric: symmetry(self.experts_symmetry),
                group_size: self.experts_group_size.unwrap_or(self.group_size),
                observer: Default::default(),
            },
            mw: LayerRecipe {
                algorithm: self.mw_algo.unwrap_or(self.algo),
                scheme: scheme("mw", self.mw, self.mw_type, SchemeName::weight_only(8))?,
                symmetric: symmetry(self.mw_symmetry),
                group_size: self.mw_group_size.unwrap_or(self.group_size),
                observer: Default::default(),
            },
            overrides: Vec::new(),
            sparsity: None,
            smoothquant: None,
            gptq: Default::default(),
            awq: Default::default(),
            calibration: Default::default(),
            kernels: Default::default(),
            ignore,
            shard_size: self.shard_size,
        })
    }
}

/// A scheme and a weight type must agree; either alone is enough.
fn scheme(
    class: &str,
    scheme: Option<SchemeName>,
    weight: Option<WeightType>,
    default: SchemeName,
) -> Result<SchemeName> {
    let bits = |t| if t == WeightType::Int4 { 4 } else { 8 };
    match (scheme, weight) {
        (Some(s), Some(t)) if s.int_bits() != Some(bits(t)) => {
            bail!("--{class}-scheme {} does not have weights of --{class}-type int{}", s, bits(t))
        }
        (Some(s), _) => Ok(s),
        (None, Some(WeightType::Int4)) => Ok(SchemeName::weight_only(4)),
        (None, Some(WeightType::Int8)) => Ok(SchemeName::weight_only(8)),
        (None, None) => Ok(default),
    }
}
