//! Applies a quantization recipe to a gpt-oss checkpoint.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use gptoss::calibrate::check_memory;
use gptoss::checkpoint::destination::{check_destination, check_room};
use gptoss::checkpoint::hub::{Located, Wanted, locate};
use gptoss::checkpoint::source::{Checkpoint, has_weights, read_config, read_object};
use gptoss::manifest::{Job, Manifest};
use gptoss::model::{ModelConfig, padding::Padding};
use gptoss::pipeline::progress::Progress;
use gptoss::pipeline::quant::{Plan, budget::Budget, target};
use gptoss::pipeline::{Paths, meter::Meter, model_name};
use gptoss::recipe::Recipe;
use gptoss::text::{Text, TextRequest, dataset::Split, load, tokenizer::Tokenizer};
use gptoss_tools::device::DeviceArgs;
use gptoss_tools::recipe::RecipeArgs;
use gptoss_tools::text::TextArgs;
use gptoss_tools::{Common, run, source, volatile};
use serde_json::{Map, Value};

/// The text where no flag names one, and how many sequences of it: as in the recipes of other tools.
const DATASET: &str = "open_platypus";
const SAMPLES: usize = 256;
/// What a dry run plans for without a model.
const PUBLISHED: &str = "gpt-oss-120b";

/// Quantize a gpt-oss checkpoint: experts and the other weights ("mw") each by their own recipe.
#[derive(Parser)]
#[command(
    version,
    args_override_self = true,
    after_help = "Examples:
  gptoss-quant --model-in ./gpt-oss-20b --experts w4a16 --mw w8a16 --calib-jsonl calib.jsonl
  gptoss-quant --model-in ./gpt-oss-20b --algo rtn --experts keep --mw w8a8 --output-dir out
  gptoss-quant --model-in ./gpt-oss-20b --target vllm --experts w4a16 --mw w8a16
  gptoss-quant --model-in ./gpt-oss-20b --algo rtn --target llama.cpp --experts keep --mw q8_0
  gptoss-quant --model-in ./gpt-oss-20b --target-size 8GB --calib-jsonl calib.jsonl
  gptoss-quant --model-in ./out --keep-codes --container gguf --output-dir out-gguf
  gptoss-quant --model-in ./gpt-oss-20b --recipe recipe.yaml --group-size auto
  gptoss-quant --model-in ./gpt-oss-120b/config.json --dry-run
  gptoss-dequant --src ./gpt-oss-20b --dst bf16 | gptoss-quant --algo rtn | gptoss-verify

Schemes: w2a16 to w8a16 (integer weights), w8a8 (int8 weights a channel, int8 inputs a token), w4a8 (int4 weights, int8 inputs; needs kernels), w4afp8 (FP8 inputs a token), fp8 (weights a channel, inputs a token), fp8_static (a scale a tensor, inputs' from the text), fp8_block (128 by 128, inputs in groups of 128), fp8a16, mxfp4, mxfp6, mxfp8, nvfp4 (weights alone), bf16, fp16, dense (floats, for zeros alone), keep (as in the source, bit for bit); in GGUF q4_0, q4_1, q5_0, q5_1, q8_0, tq1_0, tq2_0, mxfp4. AWQ goes with w4a16, w4a8 with gptq or rtn.
Text: gptq, awq, smoothquant and sparsity need one. Without a flag it is 256 sequences of open_platypus, each of at most 2048 tokens.
Without --model-in and a manifest on standard input, --dry-run plans for gpt-oss-120b.
Without any flag of a recipe or a text: of an MXFP4 checkpoint --preset gguf-q8, of another one w4a16 experts and w8a16 by GPTQ with --target vllm.
Containers: where a public runtime loads one, with padding if need be, that is taken; --target names a runtime, --container the container. The manifest says which runtimes load the output, and why others do not.
Exit codes: 0 done, 2 an error."
)]
struct Args {
    /// A checkpoint's folder, a hub id (org/name or org/name@revision), or - for the output of the manifest on standard
    /// input; a folder or file with a config.json alone is enough for --dry-run
    #[arg(long, visible_alias = "model", value_name = "DIR|ID")]
    model_in: Option<String>,
    /// The folder to write [default: MODEL-ALGOS-experts-SCHEME-mw-SCHEME in the current folder]
    #[arg(long, aliases = ["output_dir", "save"], value_name = "DIR")]
    output_dir: Option<PathBuf>,
    /// Plan, check what can be checked without reading weights or text, print the plan, write nothing
    #[arg(long)]
    dry_run: bool,
    /// Replace a checkpoint that stands at the output folder, and whatever unfinished output lies beside it
    #[arg(long)]
    force: bool,
    /// Go on where the source has tensors that are no part of the model, and leave them out; without it they are an error
    #[arg(long)]
    drop_unknown_tensors: bool,
    #[command(flatten)]
    recipe: RecipeArgs,
    #[command(flatten)]
    text: TextArgs,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    common: Common,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let args = Args { recipe: args.recipe.with_preset(), ..args };
    run("gptoss-quant", || quantize(args))
}

fn quantize(args: Args) -> Result<ExitCode> {
    args.recipe.check()?;
    if args.recipe.keeps_codes() && args.text.is_given() {
        bail!("--keep-codes rounds nothing: leave out the text");
    }
    let mut resources = args.common.resources();
    let statistics = args.recipe.statistics();
    resources.offload = statistics.offload_folder.clone();
    resources.offload_hessians = statistics.offload_hessians;
    let progress = &resources.progress;
    let meter = Meter::start();
    if args.dry_run {
        return dry_run(args, progress);
    }
    let mut located = source(args.model_in.as_deref(), "--model-in", Wanted::ConfigOnly, progress)?;
    let raw_config = read_config(&located.dir)?;
    let config = ModelConfig::parse(&located.dir, &raw_config)?;
    let args = &args.with_default(&raw_config);
    let mut recipe = args.recipe.resolve(&config, false, progress)?;
    target::settle(&located.dir, &raw_config, &mut recipe, args.recipe.wish())?;
    let mut measures = false;
    if let Some((bytes, _)) = args.recipe.target_size() {
        // What cannot be reached shows before anything is fetched.
        let budget = Budget::new(&located.dir, &raw_config, &recipe, bytes, None, args.recipe.wish().target)?;
        measures = budget.is_open();
        recipe = budget.least().0;
    }
    args.check_resources(&recipe, measures, &config)?;
    if let (Some(id), true) = (&args.model_in, located.hub.is_some()) {
        located = locate(id, Wanted::Everything, progress)?;
    }
    let mut checkpoint = Checkpoint::open(&located.dir)?;
    if let Some(padding) = padding(&recipe, &config)? {
        checkpoint.pad(padding);
    }
    let mut plan = Plan::new(&located.dir, &checkpoint.config, recipe.clone(), Some(&checkpoint))?;
    let dst = args.destination(&recipe, &located.dir, &config);
    let paths = Paths {
        src: located.dir.clone(),
        dst: dst.clone(),
        force: args.force,
        drop_unknown: args.drop_unknown_tensors,
    };
    // Before a text is fetched for nothing; the run looks again.
    let whole = check_destination(&located.dir, &dst, args.force)?;
    if let Some(bytes) = recipe.target_size.filter(|_| measures) {
        check_room(&whole, bytes)?;
    }
    let text = args.calibration_text(&recipe, measures, &located.dir, &config, progress)?;
    if let Some((bytes, file)) = args.recipe.target_size() {
        let wish = args.recipe.wish();
        let budget = Budget::new(&located.dir, &checkpoint.config, &recipe, bytes, Some(&checkpoint), wish.target)?;
        let beside = sensitivity_beside(&dst);
        let measured = match (&text, budget.is_open()) {
            (Some(text), true) => {
                Some(budget.measure(checkpoint.padding(), text, &resources, file.unwrap_or(&beside))?)
            }
            (None, true) => bail!("{SIZE_NEEDS_TEXT}"),
            (_, false) => None,
        };
        let recipe = budget.pick(measured.as_ref())?;
        plan = Plan::new(&located.dir, &checkpoint.config, recipe, Some(&checkpoint))?;
        target::check(&plan, args.recipe.wish())?;
    }
    let (mut manifest, resumed) = plan.run(&paths, &resources, text.as_ref())?;
    manifest.notes.iter().for_each(|n| progress.note(&format!("note: {n}")));
    let mut run = volatile(&located, Some(&dst), meter.read(), resources.threads, resumed);
    run.settings = BTreeMap::from([args.device.setting()]);
    manifest.volatile = Some(run);
    args.common.emit(&manifest)?;
    Ok(ExitCode::SUCCESS)
}

/// Plans from headers where weights are there (and then checks destination and room as a run would), from the config
/// alone where they are not.
fn dry_run(args: Args, progress: &Progress) -> Result<ExitCode> {
    let Some(located) = args.model_of_dry_run(progress)? else {
        let (dir, config) = (Path::new(PUBLISHED), ModelConfig::published(PUBLISHED).expect("it is published"));
        let args = &args.with_default(&config);
        let mut recipe = args.recipe.resolve(&ModelConfig::parse(dir, &config)?, true, progress)?;
        target::settle(dir, &config, &mut recipe, args.recipe.wish())?;
        let mut manifest = args.preview(dir, &config, recipe, None)?;
        manifest.notes.push(format!("no model was given: this is planned for {PUBLISHED}"));
        args.common.emit(&manifest)?;
        return Ok(ExitCode::SUCCESS);
    };
    let path = &located.dir;
    let has_weights = has_weights(path)?;
    let file = path.is_file();
    if file && path.extension().is_some_and(|e| e == "gguf") {
        bail!("{}: is a file; give the folder that it lies in", path.display());
    }
    let dir = if file { path.parent().unwrap_or(path) } else { path };
    let raw_config = if file { read_object(path)? } else { read_config(path)? };
    let config = ModelConfig::parse(dir, &raw_config)?;
    let args = &args.with_default(&raw_config);
    let mut recipe = args.recipe.resolve(&config, true, progress)?;
    target::settle(dir, &raw_config, &mut recipe, args.recipe.wish())?;
    args.check_resources(&recipe, args.recipe.target_size().is_some(), &config)?;
    let mut checkpoint = if has_weights { Some(Checkpoint::open(path)?) } else { None };
    if let (Some(checkpoint), Some(padding)) = (&mut checkpoint, padding(&recipe, &config)?) {
        checkpoint.pad(padding);
    }
    let raw_config = checkpoint.as_ref().map_or(raw_config, |c| c.config.clone());
    let manifest = args.preview(dir, &raw_config, recipe, checkpoint.as_ref())?;
    let Job::Quantize { recipe } = &manifest.job else { unreachable!("it is a quantization") };
    let dst = args.destination(recipe, dir, &config);
    if has_weights {
        let dst = check_destination(dir, &dst, args.force)?;
        check_room(&dst, manifest.plan.as_ref().map_or(0, |p| p.bytes))?;
    }
    args.common.emit(&manifest)?;
    Ok(ExitCode::SUCCESS)
}

/// Where measured errors are kept unless a flag says otherwise.
fn sensitivity_beside(dst: &Path) -> PathBuf {
    let mut name = dst.file_name().unwrap_or_default().to_owned();
    name.push(".sensitivity.json");
    dst.with_file_name(name)
}

/// What the recipe's widths come to for this model.
fn padding(recipe: &Recipe, config: &ModelConfig) -> Result<Option<Padding>> {
    Ok(recipe.pad_to.map(|n| Padding::to_multiple(config, n)).transpose()?.flatten())
}

impl Args {
    /// With a recipe where no flag says anything of one.
    fn with_default(self, config: &Map<String, Value>) -> Self {
        let text = self.text.is_given();
        Self { recipe: self.recipe.with_default(config, text), ..self }
    }

    /// What a calibration needs besides the model, as far as it can be told without reading it.
    fn check_resources(&self, recipe: &Recipe, measures: bool, config: &ModelConfig) -> Result<()> {
        if let Some(folder) = self.recipe.statistics().offload_folder.as_ref().filter(|f| !f.is_dir()) {
            bail!("--offload-folder {}: is no folder; create it, or give another", folder.display());
        }
        if !measures && !recipe.needs_text() {
            return Ok(());
        }
        self.text_request().check()?;
        check_memory(self.common.resources().max_memory, config)?;
        Ok(())
    }

    /// The plan of `recipe`; with a size as its target the plan of the least that it may be.
    fn preview(
        &self,
        dir: &Path,
        raw_config: &Map<String, Value>,
        recipe: Recipe,
        source: Option<&Checkpoint>,
    ) -> Result<Manifest> {
        let Some((bytes, _)) = self.recipe.target_size() else {
            return Ok(Plan::new(dir, raw_config, recipe, source)?.preview());
        };
        let wish = self.recipe.wish();
        let (recipe, note) = Budget::new(dir, raw_config, &recipe, bytes, source, wish.target)?.least();
        let mut manifest = Plan::new(dir, raw_config, recipe, source)?.preview();
        manifest.notes.push(note);
        Ok(manifest)
    }

    fn text_request(&self) -> TextRequest {
        self.text.request_or(DATASET, Some(SAMPLES), Split::Train)
    }

    fn destination(&self, recipe: &Recipe, dir: &Path, config: &ModelConfig) -> PathBuf {
        self.output_dir.clone().unwrap_or_else(|| recipe.output_name(&model_name(dir, config)).into())
    }

    /// The model to plan for; `None` where neither a flag nor standard input names one.
    fn model_of_dry_run(&self, progress: &Progress) -> Result<Option<Located>> {
        if self.model_in.is_some() {
            return source(self.model_in.as_deref(), "--model-in", Wanted::ConfigOnly, progress).map(Some);
        }
        if std::io::stdin().is_terminal() {
            return Ok(None);
        }
        let text = std::io::read_to_string(std::io::stdin()).context("cannot read standard input")?;
        if text.trim().is_empty() {
            return Ok(None);
        }
        let manifest = Manifest::parse(&text, "standard input")?;
        Ok(Some(Located { dir: manifest.output_path()?.to_path_buf(), hub: None }))
    }

    /// The text that the recipe needs, if it needs one.
    fn calibration_text(
        &self,
        recipe: &Recipe,
        measures: bool,
        dir: &Path,
        config: &ModelConfig,
        progress: &Progress,
    ) -> Result<Option<Text>> {
        if !measures && !recipe.needs_text() {
            if self.text.is_given() {
                progress.note("note: this recipe needs no text, so the one that was given is not used");
            }
            return Ok(None);
        }
        let tokenizer = Tokenizer::open(dir, config.vocab)?;
        let text = load(&self.text_request(), &tokenizer, dir, progress);
        let why = if measures { SIZE_NEEDS_TEXT } else { NO_TEXT };
        let text = if self.text.is_given() { text? } else { text.context(why)? };
        text.notes.iter().for_each(|n| progress.note(&format!("note: {n}")));
        Ok(Some(text))
    }
}

const SIZE_NEEDS_TEXT: &str = "--target-size measures on a calibration text, whatever the algorithm, and open_platypus, which is \
taken where none is named, cannot be had; give --calib-jsonl FILE";
const NO_TEXT: &str = "this recipe needs a calibration text, and open_platypus, which is taken where none is named, cannot \
be had; give --calib-jsonl FILE, or --algo rtn, which needs none";
