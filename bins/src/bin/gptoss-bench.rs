//! Measures how fast a checkpoint runs on this machine, and how fast single products are.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::{Parser, Subcommand};
use gptoss::checkpoint::hub::{Located, Wanted};
use gptoss::device::cpu::Cpu;
use gptoss::engine::Numerics;
use gptoss::generate::check_prompt;
use gptoss::manifest::{BenchRow, Job, Manifest};
use gptoss::model::Model;
use gptoss::model::forward::Session;
use gptoss::ops::bandwidth::read_rate;
use gptoss::pipeline::meter::Meter;
use gptoss_tools::gemm::GemmArgs;
use gptoss_tools::{Common, note_kernels, parse_numerics, parse_threads, run, source, volatile};

/// Measure tokens a second and the bytes of weights that a token needs, or products beside those of floats.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:
  gptoss-bench decode --model ./gpt-oss-20b
  gptoss-bench decode --model ./out --context 1024 --tokens 64 --sweep 1,2,4
  gptoss-bench prefill --model ./out --tokens 512
  gptoss-quant --model-in ./gpt-oss-20b | gptoss-bench decode
  gptoss-bench gemm --M 16 --K 4096 --N 4096 --iters 50
  gptoss-bench gemm --shapes gpt-oss-20b --plot speed.svg

Without --sweep, threads go 1, 2, 4 ... up to --threads."
)]
struct Args {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    common: Common,
}

#[derive(Subcommand)]
enum Command {
    /// One token after the other, as text is generated
    Decode {
        #[command(flatten)]
        what: What,
        /// Tokens that are taken in before timing starts
        #[arg(long, value_name = "N", default_value_t = 64, value_parser = parse_tokens)]
        context: usize,
        /// Tokens that are timed
        #[arg(long, value_name = "N", default_value_t = 32, value_parser = parse_tokens)]
        tokens: usize,
    },
    /// A prompt, all its tokens together
    Prefill {
        #[command(flatten)]
        what: What,
        /// Tokens of the prompt
        #[arg(long, value_name = "N", default_value_t = 512, value_parser = parse_tokens)]
        tokens: usize,
        /// How often it is taken in
        #[arg(long, value_name = "N", default_value_t = 3, value_parser = parse_tokens)]
        repeat: usize,
    },
    /// Linear layers: the kernels of this processor and of a GPU beside products of floats
    Gemm(GemmArgs),
}

#[derive(clap::Args)]
struct What {
    /// A checkpoint's folder or a hub id; without it, the output of the manifest on standard input
    #[arg(long, value_name = "DIR")]
    model: Option<String>,
    /// What it computes with: engine (stored codes, inputs in int8) or exact (values and inputs in f32)
    #[arg(long, value_name = "NAME", value_parser = parse_numerics, default_value = "engine")]
    numerics: Numerics,
    /// Numbers of threads to try, such as 1,2,4
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = parse_threads)]
    sweep: Vec<usize>,
}

/// A number of tokens or runs; more than any context is a typing error.
fn parse_tokens(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n @ 1..=10_000_000) => Ok(n),
        _ => Err("wanted a number from 1 to 10000000".into()),
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    run("gptoss-bench", || match &args.command {
        Command::Decode { what, context, tokens } => {
            let job = Job::Bench { what: "decode".into(), context: *context, tokens: *tokens };
            sweep(what, &args.common, job, |device, model| decode(device, model, *context, *tokens))
        }
        Command::Prefill { what, tokens, repeat } => {
            let job = Job::Bench { what: "prefill".into(), context: 0, tokens: *tokens };
            sweep(what, &args.common, job, |device, model| prefill(device, model, *tokens, *repeat))
        }
        Command::Gemm(gemm) => gemm.run("gptoss-bench", &args.common),
    })
}

/// Times of `f` for each number of threads, as a manifest.
fn sweep(what: &What, common: &Common, job: Job, f: impl Fn(&Cpu, &Model) -> Result<Times>) -> Result<ExitCode> {
    let (resources, meter) = (common.resources(), Meter::start());
    let located: Located = source(what.model.as_deref(), "--model", Wanted::Everything, &resources.progress)?;
    let model = Model::open(&located.dir)?;
    note_kernels(&model, what.numerics, &resources.progress)?;
    let mut threads = what.sweep.clone();
    if threads.is_empty() {
        threads.extend(std::iter::successors(Some(1), |n| Some(2 * n)).take_while(|&n| n < resources.threads));
        threads.push(resources.threads);
    }
    let mut rows = Vec::new();
    for threads in threads {
        resources.progress.note(&format!("{threads} threads"));
        let device = Cpu::new(threads)?.with(what.numerics);
        let times = f(&device, &model)?;
        let read = (times.tokens == 1).then(|| device.enter_awake(|| read_rate(&model.some_weights(READ))));
        rows.push(times.row(threads, model.bytes_a_token(), read));
    }
    let mut manifest = Manifest::new("gptoss-bench", job).with(what.numerics);
    let mut run = volatile(&located, None, meter.read(), resources.threads, 0);
    run.bench = rows;
    manifest.volatile = Some(run);
    common.emit(&manifest)?;
    Ok(ExitCode::SUCCESS)
}

/// Bytes of weights that are read to see how fast this machine reads.
const READ: usize = 2 << 30;

/// Steps of `tokens` tokens each; one token a step is a decode.
struct Times {
    steps: Vec<Duration>,
    tokens: usize,
}

impl Times {
    fn row(mut self, threads: usize, bytes_per_token: u64, read: Option<f64>) -> BenchRow {
        self.steps.sort();
        let at = |share: usize| self.tokens as f64 / self.steps[(self.steps.len() - 1) * share / 10].as_secs_f64();
        let tokens_per_second = at(5);
        let gigabytes_per_second = (self.tokens == 1).then(|| tokens_per_second * bytes_per_token as f64 / 1e9);
        BenchRow {
            threads,
            tokens_per_second,
            slow_tokens_per_second: at(9),
            bytes_per_token,
            gigabytes_per_second,
            read_gigabytes_per_second: read,
        }
    }
}

/// Tokens all over the vocabulary, so that the experts take turns.
fn tokens(model: &Model, n: usize) -> Vec<u32> {
    (0..n).map(|i| (i * 7919 % model.config.vocab) as u32).collect()
}

fn decode(device: &Cpu, model: &Model, context: usize, n: usize) -> Result<Times> {
    let ids = tokens(model, context + n);
    check_prompt(model, &ids)?;
    let steps = device.enter_awake(|| -> Result<Vec<Duration>> {
        let mut session = Session::new(device, model)?;
        session.advance(&ids[..context])?;
        let step = |id: &u32| {
            let start = Instant::now();
            let hidden = session.advance(std::slice::from_ref(id))?;
            session.logits(&hidden)?;
            Ok(start.elapsed())
        };
        ids[context..].iter().map(step).collect()
    })?;
    Ok(Times { steps, tokens: 1 })
}

fn prefill(device: &Cpu, model: &Model, n: usize, repeat: usize) -> Result<Times> {
    let ids = tokens(model, n);
    check_prompt(model, &ids)?;
    let steps = device.enter(|| -> Result<Vec<Duration>> {
        let mut session = Session::new(device, model)?;
        let step = |_| {
            session.clear();
            let start = Instant::now();
            session.advance(&ids)?;
            Ok(start.elapsed())
        };
        (0..repeat).map(step).collect()
    })?;
    Ok(Times { steps, tokens: n })
}
