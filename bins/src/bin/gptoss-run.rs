//! Generates text from a checkpoint.

use std::io::{IsTerminal, Read, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use clap::Parser;
use gptoss::Error;
use gptoss::checkpoint::hub::Wanted;
use gptoss::device::cpu::Cpu;
use gptoss::engine::Numerics;
use gptoss::generate::{Defaults, Finish, Generated, Sampler, SamplingOptions, check_prompt, generate};
use gptoss::model::Model;
use gptoss::model::forward::Session;
use gptoss::pipeline::progress::Progress;
use gptoss::text::chat::ChatTemplate;
use gptoss::text::clock::Clock;
use gptoss::text::tokenizer::{Special, Tokenizer};
use gptoss_tools::{note_kernels, parse_numerics, parse_threads, run, source};
use serde_json::{Value, json};

/// Generate text from any checkpoint that the toolkit reads: MXFP4, BF16, FP16, quantized.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:
  gptoss-run --model ./gpt-oss-20b --prompt 'The capital of France is' --max-tokens 20
  gptoss-run --model ./gpt-oss-20b --chat --prompt 'Why is the sky blue?'
  cat question.txt | gptoss-run --model ./out --temperature 0
  gptoss-quant --model-in ./gpt-oss-20b | gptoss-run --prompt 'Once upon a time'

The text goes to standard output, times go to standard error. The same command prints the same text: the seed is 0 unless --seed says otherwise.
Exit codes: 0 done, 2 an error, 130 ended by Ctrl-C."
)]
struct Args {
    /// A checkpoint's folder or a hub id; without it, the output of the manifest on standard input
    #[arg(long, value_name = "DIR")]
    model: Option<String>,
    /// The text to go on from; without it, standard input to its end
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// Take the prompt for a user's message and render it with the checkpoint's chat template
    #[arg(long)]
    chat: bool,
    /// A system message before the user's
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
    /// Most new tokens
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_tokens: usize,
    /// 0 takes the most likely token every time [default: the checkpoint's generation_config.json]
    #[arg(long, value_name = "T", allow_negative_numbers = true, help_heading = "Sampling")]
    temperature: Option<f64>,
    /// Only the most likely tokens that together have this probability
    #[arg(long, value_name = "P", allow_negative_numbers = true, help_heading = "Sampling")]
    top_p: Option<f64>,
    /// Only this many of the most likely tokens
    #[arg(long, value_name = "K", help_heading = "Sampling")]
    top_k: Option<usize>,
    /// Seed of the sampler
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Sampling")]
    seed: u64,
    /// What it computes with: engine (stored codes, inputs in int8; fast) or exact (values and inputs in f32)
    #[arg(long, value_name = "NAME", value_parser = parse_numerics, default_value = "engine")]
    numerics: Numerics,
    /// Print one JSON object at the end instead of the text as it comes
    #[arg(long)]
    json: bool,
    /// Print special tokens too
    #[arg(long)]
    special: bool,
    /// Threads [default: all processors]
    #[arg(long, value_name = "N", value_parser = parse_threads)]
    threads: Option<usize>,
    /// No times on standard error
    #[arg(long, short)]
    quiet: bool,
}

/// Exit code after Ctrl-C: 128 + SIGINT.
const INTERRUPTED: u8 = 130;

fn main() -> ExitCode {
    let args = Args::parse();
    run("gptoss-run", || text(&args))
}

fn text(args: &Args) -> Result<ExitCode> {
    let progress = Progress::new(args.quiet);
    let from_manifest = args.model.as_deref().is_none_or(|m| m == "-");
    if from_manifest && args.prompt.is_none() {
        bail!("give --model DIR, and --prompt TEXT or the text on standard input");
    }
    let dir = source(args.model.as_deref(), "--model", Wanted::Everything, &progress)?.dir;
    let model = Model::open(&dir)?;
    model.checkpoint.remarks.iter().for_each(|r| progress.note(&format!("note: {r}")));
    let tokenizer = Tokenizer::open(&dir, model.config.vocab)?;
    let defaults = Defaults::read(&dir)?;
    let mut sampler = Sampler::new(SamplingOptions {
        temperature: args.temperature.unwrap_or(defaults.temperature),
        top_k: args.top_k.or(defaults.top_k),
        top_p: args.top_p.or(defaults.top_p),
        seed: args.seed,
    })?;
    let prompt = match args.chat {
        true => chat(args, &dir, prompt_text(args)?)?,
        false => prompt_text(args)?,
    };
    let ids = tokenizer.encode(&prompt)?;
    check_prompt(&model, &ids)?;

    let stop = interrupted()?;
    note_kernels(&model, args.numerics, &progress)?;
    let threads = args.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, Into::into));
    let device = Cpu::new(threads)?.with(args.numerics);
    let mut stream = tokenizer.stream(if args.special { Special::Show } else { Special::Skip });
    if defaults.eos.is_empty() {
        progress.note(
            "neither generation_config.json nor config.json has an eos_token_id: only --max-tokens ends the text",
        );
    }
    let mut whole = String::new();
    // False from the moment on when nobody reads any more.
    let mut show = |text: &str| {
        whole.push_str(text);
        if args.json { Ok(true) } else { print(text) }
    };
    let done = device.enter_awake(|| -> Result<Generated> {
        let mut session = Session::new(&device, &model)?;
        let each = |id: Option<u32>| {
            let going = match id {
                Some(id) => show(&stream.push(id)?)?,
                None => true,
            };
            Ok(going && !stop.load(Ordering::Relaxed))
        };
        let ends = (args.max_tokens, &defaults.eos[..]);
        Ok(generate(&device, &mut session, model.settings.context, &ids, ends, &mut sampler, each)?)
    })?;
    model.checkpoint.unchanged()?;
    show(&stream.finish()?)?;
    report(args, &whole, ids.len(), &done)?;
    let by_hand = stop.load(Ordering::Relaxed);
    Ok(if by_hand { ExitCode::from(INTERRUPTED) } else { ExitCode::SUCCESS })
}

/// The flag's text, or standard input's.
fn prompt_text(args: &Args) -> Result<String> {
    if let Some(text) = &args.prompt {
        return Ok(text.clone());
    }
    if std::io::stdin().is_terminal() {
        bail!("give --prompt TEXT, or the text on standard input");
    }
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).context("cannot read the prompt from standard input")?;
    Ok(text)
}

fn chat(args: &Args, dir: &std::path::Path, user: String) -> Result<String> {
    let message = |role: &str, content: &str| json!({"role": role, "content": content});
    let system = args.system.as_ref().map(|s| message("system", s));
    let messages: Vec<Value> = system.into_iter().chain([message("user", &user)]).collect();
    Ok(ChatTemplate::require(dir, Clock::Now)?.render(&messages, true)?)
}

/// Set by the first Ctrl-C, which lets the token in work be finished; the second one ends the process.
fn interrupted() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(i32::from(INTERRUPTED));
        }
    })
    .context("cannot listen for Ctrl-C")?;
    Ok(stop)
}

/// Writes at once; false where the reader has gone away.
fn print(text: &str) -> gptoss::Result<bool> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(Error::io("write", "standard output")(e)),
    }
}

fn report(args: &Args, text: &str, prompt_tokens: usize, done: &Generated) -> Result<()> {
    if args.json {
        let result = json!({
            "text": text,
            "tokens": done.ids,
            "finish": done.finish.name(),
            "prompt_tokens": prompt_tokens,
            "seed": args.seed,
            "numerics": args.numerics.name(),
            "seconds_to_first_token": done.first.as_secs_f64(),
            "tokens_per_second": done.rate(),
        });
        gptoss_tools::write_out(&format!("{result}\n"))?;
    } else {
        print("\n")?;
    }
    if !args.quiet {
        let why = if done.finish == Finish::Eos { "the model ended the text" } else { done.finish.name() };
        // Nobody to tell is no error.
        let _ = writeln!(
            std::io::stderr(),
            "{prompt_tokens} prompt tokens, first token after {:.2} s; {} new tokens, {:.2} tokens/s ({why})",
            done.first.as_secs_f64(),
            done.ids.len(),
            done.rate()
        );
    }
    Ok(())
}
