//! Looks at what is there: checkpoints and the machine.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
use gptoss::checkpoint::hub::Located;
use gptoss::checkpoint::source::Checkpoint;
use gptoss::manifest::{FileSet, Job, Manifest, Verdict};
use gptoss::pipeline::{Resources, layout_name, meter::Meter};
use gptoss::verify::against::{Detail, against};
use gptoss::verify::check::check;
use gptoss::verify::env::Environment;
use gptoss_tools::{Common, DIFFERENT, run, volatile, write_out};

/// Check a checkpoint, compare it with its source, describe the machine.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:
  gptoss-quant --model-in ./gpt-oss-20b | gptoss-verify
  gptoss-verify check ./out
  gptoss-verify against ./gpt-oss-20b ./out
  gptoss-verify env

Without a subcommand it reads a manifest from standard input, checks the checkpoint that the manifest names and, where
its source is at hand, compares the two.
Exit codes: 0 done (a lossy comparison is no failure), 1 the checkpoint contradicts its manifest, its config or its
headers, 2 it cannot be read at all."
)]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    common: Common,
}

#[derive(Subcommand)]
enum Command {
    /// Check a checkpoint against its manifest and its own headers
    Check {
        /// The checkpoint's folder
        dir: PathBuf,
        #[command(flatten)]
        common: Common,
    },
    /// Dequantize two checkpoints and report the difference, tensor by tensor
    Against {
        /// The checkpoint that DIR was made from
        src: PathBuf,
        /// The checkpoint to judge
        dir: PathBuf,
        /// One line a matrix instead of one for all experts of a layer
        #[arg(long)]
        each: bool,
        #[command(flatten)]
        common: Common,
    },
    /// Describe processor, memory, driver, GPUs, nvcc and installed kernels
    Env {
        #[command(flatten)]
        common: Common,
    },
    /// Print the JSON Schema of manifests
    Schema,
}

fn main() -> ExitCode {
    let args = Args::parse();
    run("gptoss-verify", || match &args.command {
        Some(Command::Check { dir, common }) => check_folder(dir, common),
        Some(Command::Against { src, dir, each, common }) => compare(src, dir, *each, common),
        Some(Command::Env { common }) => environment(common),
        Some(Command::Schema) => schema(),
        None => from_manifest(&args.common),
    })
}

fn check_folder(dir: &Path, common: &Common) -> Result<ExitCode> {
    let (resources, meter) = (common.resources(), Meter::start());
    let own = Manifest::in_folder(dir).ok().flatten();
    let mut manifest = Manifest::new("gptoss-verify", Job::Check);
    let verdict = check(dir, None, resources.threads)?;
    if let Some(own) = own {
        (manifest.source, manifest.output, manifest.runtimes) = (own.source, own.output, own.runtimes);
    }
    finish(manifest, verdict, None, dir, &resources, meter, common)
}

fn compare(src: &Path, dir: &Path, each: bool, common: &Common) -> Result<ExitCode> {
    let (resources, meter) = (common.resources(), Meter::start());
    let detail = if each { Detail::Matrices } else { Detail::Families };
    let comparison = against(src, dir, detail, resources.threads, &resources.progress)?;
    let mut manifest = Manifest::new("gptoss-verify", Job::Against);
    (manifest.source, manifest.output) = (Some(file_set(src)?), Some(file_set(dir)?));
    manifest.tensors = comparison.tensors;
    let total_error = Some(comparison.total);
    // A comparison judges nothing, so there are no findings in it.
    let tensors = Checkpoint::open(dir)?.names().count() as u64;
    let verdict = Verdict { passed: true, tensors, hashes_checked: false, findings: Vec::new(), total_error };
    finish(manifest, verdict, Some(src), dir, &resources, meter, common)
}

fn from_manifest(common: &Common) -> Result<ExitCode> {
    if std::io::stdin().is_terminal() {
        bail!("give a subcommand (check, against, env), or pipe a manifest into this tool; --help has examples");
    }
    let (resources, meter) = (common.resources(), Meter::start());
    let piped = Manifest::from_stdin()?;
    let dir = piped.output_path()?.to_path_buf();
    let mut verdict = check(&dir, Some(&piped), resources.threads)?;
    let source = piped.volatile.as_ref().and_then(|v| v.source_path.clone()).map(PathBuf::from);
    let source = source.filter(|s| s.is_dir() && verdict.passed);
    let mut manifest = Manifest::new("gptoss-verify", Job::Check);
    (manifest.runtimes, manifest.notes, manifest.conversion) = (piped.runtimes, piped.notes, piped.conversion);
    (manifest.source, manifest.output) = (piped.source, piped.output);
    if let Some(src) = &source {
        let comparison = against(src, &dir, Detail::Families, resources.threads, &resources.progress)?;
        manifest.tensors = comparison.tensors;
        verdict.total_error = Some(comparison.total);
    } else if verdict.passed {
        manifest.notes.push("the source is not at hand, so nothing was compared with it".into());
    }
    finish(manifest, verdict, source.as_deref(), &dir, &resources, meter, common)
}

fn finish(
    mut manifest: Manifest,
    verdict: Verdict,
    src: Option<&Path>,
    dir: &Path,
    resources: &Resources,
    meter: Meter,
    common: &Common,
) -> Result<ExitCode> {
    let code = if verdict.passed { ExitCode::SUCCESS } else { ExitCode::from(DIFFERENT) };
    manifest.verdict = Some(verdict);
    let located = Located { dir: src.unwrap_or(dir).to_path_buf(), hub: None };
    let mut run = volatile(&located, Some(dir), meter.read(), resources.threads, 0);
    if src.is_none() {
        run.source_path = None;
    }
    manifest.volatile = Some(run);
    common.emit(&manifest)?;
    Ok(code)
}

/// A folder's files as its manifest has them, or their sizes where it has none.
fn file_set(dir: &Path) -> Result<FileSet> {
    if let Some(set) = Manifest::in_folder(dir)?.and_then(|m| m.output) {
        return Ok(set);
    }
    let checkpoint = Checkpoint::open(dir)?;
    let mut files = Vec::new();
    for shard in &checkpoint.shards {
        files.push(gptoss::checkpoint::digest::record(dir, &shard.name)?);
    }
    Ok(FileSet::new(layout_name(&checkpoint), files))
}

fn environment(common: &Common) -> Result<ExitCode> {
    let mut manifest = Manifest::new("gptoss-verify", Job::Env);
    manifest.environment = Some(Environment::detect());
    common.emit(&manifest)?;
    Ok(ExitCode::SUCCESS)
}

fn schema() -> Result<ExitCode> {
    write_out(&(serde_json::to_string_pretty(&Manifest::json_schema())? + "\n"))?;
    Ok(ExitCode::SUCCESS)
}
