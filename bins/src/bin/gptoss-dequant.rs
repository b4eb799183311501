//! Turns a gpt-oss checkpoint (MXFP4, or compressed-tensors as gptoss-quant writes it) into plain BF16 or FP16.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use gptoss::checkpoint::hub::Wanted;
use gptoss::checkpoint::source::Checkpoint;
use gptoss::formats::float::Float;
use gptoss::pipeline::dequant::{Options, Plan};
use gptoss::pipeline::{Paths, meter::Meter};
use gptoss_tools::device::DeviceArgs;
use gptoss_tools::{Common, parse_size, run, source, volatile};

/// Dequantize a gpt-oss checkpoint to BF16 or FP16, streaming.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:
  gptoss-dequant --src openai/gpt-oss-20b --dst gpt-oss-20b-bf16
  gptoss-dequant --src ./gpt-oss-20b --dst bf16 | gptoss-quant --experts w4a16 --mw w8a16 | gptoss-verify

The manifest of what was done goes to standard output (a table on a terminal) and lies in DST as gptoss-manifest.json. DST appears when it is complete; a killed run leaves DST.partial, and the same command resumes it.
Exit codes: 0 done, 2 an error."
)]
struct Args {
    /// A checkpoint's folder, a hub id (org/name or org/name@revision), or - for the output of the manifest on standard
    /// input
    #[arg(long, value_name = "DIR|ID")]
    src: Option<String>,
    /// The folder to write
    #[arg(long, value_name = "DIR")]
    dst: PathBuf,
    /// Type of the output; BF16 is exact for MXFP4 and compressed-tensors
    #[arg(long, value_enum, default_value = "bf16")]
    dtype: Dtype,
    /// Most data in one shard
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = parse_size)]
    shard_size: u64,
    /// Replace a checkpoint that stands at DST, and whatever unfinished output lies beside it
    #[arg(long)]
    force: bool,
    /// Go on where the source has tensors that are no part of the model, and leave them out; without it they are an error
    #[arg(long)]
    drop_unknown_tensors: bool,
    #[command(flatten)]
    device: DeviceArgs,
    /// Folder for what outgrows memory. Dequantization holds a few megabytes and spills nothing; the flag is there for
    /// command lines that have it
    #[arg(long, value_name = "DIR", help_heading = "Resources")]
    offload_folder: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

#[derive(Clone, Copy, ValueEnum)]
enum Dtype {
    /// The upper half of a 32-bit float: exact for MXFP4
    Bf16,
    /// IEEE half: large scales overflow, small ones lose bits; both are counted
    Fp16,
}

fn main() -> ExitCode {
    let args = Args::parse();
    run("gptoss-dequant", || dequantize(&args))
}

fn dequantize(args: &Args) -> Result<ExitCode> {
    let resources = args.common.resources();
    if let Some(folder) = &args.offload_folder {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot create the offload folder {}", folder.display()))?;
    }
    let located = source(args.src.as_deref(), "--src", Wanted::Everything, &resources.progress)?;
    let meter = Meter::start();
    let checkpoint = Checkpoint::open(&located.dir)?;
    let dtype = match args.dtype {
        Dtype::Bf16 => Float::Bf16,
        Dtype::Fp16 => Float::F16,
    };
    let plan = Plan::new(&checkpoint, Options { dtype, shard_size: args.shard_size })?;
    if let Some(folder) = &args.offload_folder {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot create the offload folder {}", folder.display()))?;
    }
    let paths = Paths {
        src: located.dir.clone(),
        dst: args.dst.clone(),
        force: args.force,
        drop_unknown: args.drop_unknown_tensors,
    };
    let (mut manifest, resumed) = plan.run(&paths, &resources)?;

    if let Some(c) = manifest.conversion.filter(|c| c.overflows + c.subnormals + c.underflows > 0) {
        resources.progress.note(&format!(
            "warning: {} weights overflowed, {} became subnormal, {} became zero",
            c.overflows, c.subnormals, c.underflows
        ));
    }
    manifest.notes.iter().for_each(|n| resources.progress.note(&format!("note: {n}")));
    let mut run = volatile(&located, Some(&args.dst), meter.read(), resources.threads, resumed);
    run.settings = BTreeMap::from([args.device.setting()]);
    manifest.volatile = Some(run);
    args.common.emit(&manifest)?;
    Ok(ExitCode::SUCCESS)
}
