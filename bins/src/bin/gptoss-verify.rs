//! Looks at what is there: checkpoints and the machine.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
use gptoss::checkpoint::hub::Located;
use gptoss::checkpoint::source::Checkpoint;
use gptoss::manifest::{Finding, Job, Manifest, Verdict};
use gptoss::model::ModelConfig;
use gptoss::pipeline::{Resources, meter::Meter};
use gptoss::verify::against::{Detail, against};
use gptoss::verify::check::{check, obstacle};
use gptoss::verify::env::Environment;
use gptoss_tools::gemm::GemmArgs;
use gptoss_tools::kernels::KernelArgs;
use gptoss_tools::quality::QualityArgs;
use gptoss_tools::reproduce::ReproduceArgs;
use gptoss_tools::{Common, DIFFERENT, changed_file, file_set, run, volatile, write_out};

/// Check a checkpoint, compare it with its source, measure what it says, describe the machine.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:
  gptoss-quant --model-in ./gpt-oss-20b | gptoss-verify
  gptoss-verify check ./out
  gptoss-verify against ./gpt-oss-20b ./out
  gptoss-verify quality ./out --against ./gpt-oss-20b --text test.jsonl
  gptoss-verify reproduce ./out --source ./gpt-oss-20b --text calib.jsonl
  gptoss-verify env
  gptoss-verify kernels
  gptoss-verify --bench --M 16 --K 4096 --N 4096 --iters 50

Without a subcommand it reads a manifest from standard input, checks the checkpoint that the manifest names and, where its source is at hand, compares the two.
Exit codes: 0 done (a lossy comparison is no failure), 1 the checkpoint contradicts its manifest, its config or its headers, 2 it cannot be read at all."
)]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// Measure products, as gptoss-bench gemm does
    #[arg(long)]
    bench: bool,
    #[command(flatten)]
    gemm: GemmArgs,
    #[command(flatten)]
    common: Common,
}

#[derive(Subcommand)]
enum Command {
    /// Check a checkpoint against its manifest and its own headers
    Check {
        /// The checkpoint's folder
        dir: PathBuf,
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
    },
    /// Measure perplexity on a text and, against the source, KL divergence and agreement
    Quality(QualityArgs),
    /// Say which runtimes load a checkpoint, whoever wrote it, and why
    Runtimes {
        /// The checkpoint's folder
        dir: PathBuf,
    },
    /// Do a manifest's job again, in a folder that goes away, and compare hashes
    Reproduce(ReproduceArgs),
    /// Describe processor, memory, driver, GPUs, nvcc, installed kernels, and whether Python has the package qqq
    Env,
    /// Compare installed kernels with their hashes, and what each computes on the GPU with this processor
    Kernels(KernelArgs),
    /// Print the JSON Schema of manifests
    Schema,
}

fn main() -> ExitCode {
    let args = Args::parse();
    run("gptoss-verify", || match &args.command {
        Some(_) if args.bench || args.gemm.is_given() => {
            bail!("--bench and the flags of products stand alone, without a subcommand")
        }
        None if !args.bench && args.gemm.is_given() => bail!("flags of products want --bench beside them"),
        Some(Command::Check { dir }) => check_folder(dir, &args.common),
        Some(Command::Against { src, dir, each }) => compare(src, dir, *each, &args.common),
        Some(Command::Quality(quality)) => quality.run(&args.common),
        Some(Command::Runtimes { dir }) => runtimes(dir, &args.common),
        Some(Command::Reproduce(reproduce)) => reproduce.run(&args.common),
        Some(Command::Env) => environment(&args.common),
        Some(Command::Kernels(kernels)) => kernels.run(&args.common),
        Some(Command::Schema) => schema(),
        None if args.bench => args.gemm.run("gptoss-verify", &args.common),
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

fn runtimes(dir: &Path, common: &Common) -> Result<ExitCode> {
    let checkpoint = Checkpoint::open(dir)?;
    let mut manifest = Manifest::new("gptoss-verify", Job::Runtimes);
    manifest.runtimes = match obstacle(&checkpoint)? {
        Some(obstacle) => gptoss::runtimes::none_loads(&obstacle),
        None => {
            let config = ModelConfig::parse(dir, &checkpoint.config)?;
            gptoss::runtimes::report(&gptoss::runtimes::facts(&checkpoint, &config)?)
        }
    };
    manifest.notes = checkpoint.remarks.clone();
    checkpoint.unchanged()?;
    common.emit(&manifest)?;
    Ok(ExitCode::SUCCESS)
}

fn compare(src: &Path, dir: &Path, each: bool, common: &Common) -> Result<ExitCode> {
    let (resources, meter) = (common.resources(), Meter::start());
    let detail = if each { Detail::Matrices } else { Detail::Families };
    let comparison = against(src, dir, detail, resources.threads, &resources.progress)?;
    let mut manifest = Manifest::new("gptoss-verify", Job::Against);
    (manifest.source, manifest.output) =
        (Some(file_set(src, resources.threads)?), Some(file_set(dir, resources.threads)?));
    (manifest.tensors, manifest.notes) = (comparison.tensors, comparison.notes);
    let tensors = Checkpoint::open(dir)?.names().count() as u64;
    // A difference is no failure. What is no number cannot be compared, unless its maker said that it would be there.
    let stated = Manifest::in_folder(dir)?.and_then(|m| m.conversion).map_or(0, |c| c.overflows);
    let non_finite = comparison.total.non_finite;
    let finding = (non_finite > stated).then(|| Finding {
        kind: "value".into(),
        file: dir.display().to_string(),
        message: format!("{non_finite} numbers are NaN or infinite here or in the source; the figures leave them out"),
    });
    let findings: Vec<Finding> = finding.into_iter().collect();
    let total_error = Some(comparison.total);
    let verdict = Verdict { passed: findings.is_empty(), tensors, hashes_checked: false, findings, total_error };
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
    let changed = match (&source, &manifest.source) {
        (Some(src), Some(files)) => changed_file(src, files, resources.threads)?,
        _ => None,
    };
    if let (Some(src), Some(file)) = (&source, &changed) {
        let note = format!("{} in {} has changed since, so nothing was compared with it", file, src.display());
        manifest.notes.push(note);
    } else if let Some(src) = &source {
        let comparison = against(src, &dir, Detail::Families, resources.threads, &resources.progress)?;
        manifest.tensors = comparison.tensors;
        manifest.notes.extend(comparison.notes);
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
    // What its maker said of runtimes was of an output that is no longer this one.
    if let Some(finding) = verdict.findings.first().filter(|_| !manifest.runtimes.is_empty()) {
        manifest.runtimes = gptoss::runtimes::none_loads(&format!("{}: {}", finding.file, finding.message));
    }
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
