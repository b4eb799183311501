//! Every parser of files that strangers write, fed with files that are a little wrong: whatever they are, a parser gives a result or an error,
//! within ten seconds and a gigabyte. `tests/fuzz/` has a folder of good inputs for each, and of those that broke something once.
//!
//! `FUZZ_SECONDS` is how long each parser is tried (default 1; 60 in `FULL` runs), `FUZZ` the seed. An input that breaks a parser is written
//! to the folder that the message names.

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use gptoss::Error;
use gptoss::checkpoint::journal::{Finished, Journal};
use gptoss::checkpoint::source::{Checkpoint, read_object};
use gptoss::checkpoint::{gguf, header};
use gptoss::manifest::Manifest;
use gptoss::model::{ModelConfig, Settings};
use gptoss::recipe::{alphaquant, llm_compressor};
use gptoss::text::chat::ChatTemplate;
use gptoss::text::clock::Clock;
use gptoss::text::reader;
use gptoss::text::rows::Rows;
use gptoss::text::tokenizer::Tokenizer;
use serde_json::{Value, json};
use support::mutate::mutate;
use support::random::Random;
use support::{root, tiny};

/// How long one input may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes that one input may take.
const MEMORY: usize = 1 << 30;

/// The tests of this file count what the whole process allocates, so they come one after the other.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    // A test that failed has done what it holds this for.
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How long a parser is tried.
#[derive(Clone, Copy)]
enum Tries {
    /// Seconds.
    For(f64),
    /// Inputs, however long they take.
    Count(usize),
}

/// Counts what is allocated.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all of it is the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Relaxed) + layout.size();
        MOST.fetch_max(now, Relaxed);
        // SAFETY: as the caller vouches for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as the caller vouches for.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What a parser said of an input: nothing, or why not.
type Said = Result<(), String>;
type Parser = Arc<dyn Fn(&[u8]) -> Said + Send + Sync>;

/// An input that breaks a parser.
struct Found {
    bytes: Vec<u8>,
    /// In which way.
    how: String,
    /// Whether it is none of those that the folder has.
    changed: bool,
}

/// A parser under test.
struct Target {
    /// Its folder in `tests/fuzz/`.
    name: &'static str,
    /// Whether its files are text.
    text: bool,
    /// Inputs beside those of the folder.
    more: Vec<Vec<u8>>,
    parser: Parser,
    /// Part of an error that only an input which is good but for one thing can cause: where a planted fault lies.
    deep: &'static str,
}

impl Target {
    fn seeds(&self) -> Vec<Vec<u8>> {
        let folder = root().join("tests/fuzz").join(self.name);
        let entries = std::fs::read_dir(&folder).into_iter().flatten();
        let mut paths: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).collect();
        paths.sort();
        let read = paths.iter().map(|p| std::fs::read(p).unwrap());
        read.chain(self.more.iter().cloned()).collect()
    }

    /// Tries the folder's inputs, and then changed ones for some time or until one breaks the parser, with what is said of how.
    fn try_for(
        &self,
        parser: Parser,
        tries: Tries,
        patience: Duration,
        random: &mut Random,
        said: &mut BTreeMap<String, usize>,
    ) -> Option<Found> {
        let (input, inputs) = channel::<Vec<u8>>();
        let (output, outputs) = channel::<Result<Said, String>>();
        // A parser that hangs keeps its thread.
        let thread = std::thread::Builder::new().stack_size(2 << 20);
        let worker = thread.spawn(move || {
            for bytes in inputs {
                let before = NOW.load(Relaxed);
                MOST.store(before, Relaxed);
                let ran = catch_unwind(AssertUnwindSafe(|| parser(&bytes)));
                let taken = MOST.load(Relaxed).saturating_sub(before);
                let words = |panic: Box<dyn std::any::Any + Send>| {
                    let text = panic.downcast_ref::<String>().cloned();
                    text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_default()
                };
                let outcome = match ran {
                    Err(panic) => Err(format!("panics: {}", words(panic))),
                    Ok(_) if taken > MEMORY => Err(format!("takes {} MB", taken >> 20)),
                    Ok(said) => Ok(said),
                };
                if output.send(outcome).is_err() {
                    return;
                }
            }
        });
        let worker = worker.unwrap();
        let (seeds, start) = (self.seeds(), Instant::now());
        assert!(!seeds.is_empty(), "{}: no good inputs", self.name);
        let mut count = 0;
        let more = |count: usize| match tries {
            Tries::For(seconds) => start.elapsed().as_secs_f64() < seconds,
            Tries::Count(most) => count < most,
        };
        while count < seeds.len() || more(count) {
            let changed = count >= seeds.len();
            let bytes = if count < seeds.len() { seeds[count].clone() } else { mutate(random, &seeds, self.text) };
            input.send(bytes.clone()).unwrap();
            let found = |how: String| Some(Found { bytes: bytes.clone(), how, changed });
            match outputs.recv_timeout(patience) {
                Ok(Ok(Err(message))) => *said.entry(message).or_default() += 1,
                Ok(Ok(Ok(()))) => *said.entry(String::new()).or_default() += 1,
                Ok(Err(how)) => return found(how),
                Err(RecvTimeoutError::Timeout) => return found(format!("takes more than {} s", patience.as_secs())),
                Err(RecvTimeoutError::Disconnected) => return found("ends its thread".into()),
            }
            count += 1;
        }
        drop(input);
        worker.join().unwrap();
        println!("{}: {count} inputs", self.name);
        None
    }
}

/// A file of this content.
fn file(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

fn said<T>(result: Result<T, Error>) -> Said {
    result.map(drop).map_err(|e| e.to_string())
}

fn published() -> ModelConfig {
    let config = ModelConfig::published("gpt-oss-20b").unwrap();
    ModelConfig::parse(Path::new("gpt-oss-20b"), &config).unwrap()
}

/// Every parser, each with a folder of its own to write what it reads into.
fn targets(folder: &Path) -> Vec<Target> {
    let own = |name: &str| {
        let path = folder.join(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    };
    let target = |name, text, deep, parser: Parser| Target { name, text, more: Vec::new(), parser, deep };
    let documents = |path: PathBuf, rows: Rows| -> Said {
        let documents = reader::open(&path, rows).map_err(|e| e.to_string())?;
        for document in documents.take(2000) {
            document.map_err(|e| e.to_string())?;
        }
        Ok(())
    };

    let index = own("index");
    for (i, bytes) in shards().into_iter().enumerate() {
        file(&index, &format!("model-0000{}-of-00002.safetensors", i + 1), &bytes);
    }
    std::fs::copy(tiny().join("config.json"), index.join("config.json")).unwrap();
    let whole = own("gguf");
    let config = own("config");
    let tokenizer = own("tokenizer");
    let template = own("template");
    let (journal, parquet, jsonl) = (own("journal"), own("parquet"), own("jsonl"));
    let (json_recipe, yaml_recipe) = (own("recipe-json"), own("recipe-yaml"));
    let messages = [json!({"role": "user", "content": "hello"}), json!({"role": "assistant", "content": "hi"})];
    let mut all = vec![
        target(
            "header",
            true,
            "data_offsets span",
            Arc::new(|bytes| said(header::parse(Path::new("x.safetensors"), bytes))),
        ),
        target(
            "index",
            true,
            "is not in ",
            Arc::new(move |bytes| {
                file(&index, "model.safetensors.index.json", bytes);
                said(Checkpoint::open(&index))
            }),
        ),
        target(
            "config",
            true,
            "num_attention_heads",
            Arc::new(move |bytes| {
                let map = read_object(&file(&config, "config.json", bytes)).map_err(|e| e.to_string())?;
                let shapes = ModelConfig::parse(&config, &map).map_err(|e| e.to_string())?;
                said(Settings::parse(&config, &map, &shapes))
            }),
        ),
        target(
            "gguf",
            false,
            "no multiple of",
            Arc::new(move |bytes| {
                gguf::parse(Path::new("x.gguf"), bytes).map_err(|e| e.to_string())?;
                file(&whole, "model.gguf", bytes);
                said(Checkpoint::open(&whole))
            }),
        ),
        target(
            "manifest",
            true,
            "unknown field",
            Arc::new(|bytes| said(Manifest::parse(&String::from_utf8_lossy(bytes), "standard input"))),
        ),
        target(
            "journal",
            true,
            "2 of 3 groups",
            Arc::new(move |bytes| {
                let opened = Journal::open(&file(&journal, "journal", bytes), "job").map_err(|e| e.to_string())?;
                // How many groups are believed.
                opened.map_or(Err("another job's".into()), |(_, groups)| Err(format!("{} of 3 groups", groups.len())))
            }),
        ),
        target(
            "recipe-json",
            true,
            "wanted -1",
            Arc::new(move |bytes| said(alphaquant::read(&file(&json_recipe, "recipe.json", bytes), &published()))),
        ),
        target(
            "recipe-yaml",
            true,
            "only oneshot",
            Arc::new(move |bytes| said(llm_compressor::read(&file(&yaml_recipe, "recipe.yaml", bytes), &published()))),
        ),
        target(
            "tokenizer",
            true,
            "vocab_size is",
            Arc::new(move |bytes| {
                file(&tokenizer, "tokenizer.json", bytes);
                let opened = Tokenizer::open(&tokenizer, 64).map_err(|e| e.to_string())?;
                let ids = opened.encode("a b, ab <|end|> c\u{e9}").map_err(|e| e.to_string())?;
                said(opened.decode(&ids))
            }),
        ),
        target(
            "jsonl",
            true,
            "wanted an object with a string role",
            Arc::new(move |bytes| documents(file(&jsonl, "text.jsonl", bytes), Rows::TextOrMessages)),
        ),
        target(
            "parquet",
            false,
            "Error reading BYTE_ARRAY",
            Arc::new(move |bytes| documents(file(&parquet, "text.parquet", bytes), Rows::TextOrMessages)),
        ),
        target(
            "template",
            true,
            "refuses it",
            Arc::new(move |bytes| {
                file(&template, "chat_template.jinja", bytes);
                let opened = ChatTemplate::open(&template, Clock::At(0)).map_err(|e| e.to_string())?;
                opened.map_or(Ok(()), |t| said(t.render(&messages, true)))
            }),
        ),
    ];
    // What is made by the program itself.
    let made = own("made");
    for target in &mut all {
        target.more = match target.name {
            "header" => shards(),
            "journal" => vec![finished_journal(&made)],
            "parquet" => support::parquet::samples(),
            _ => Vec::new(),
        };
    }
    all
}

/// Two shards of a few tensors each.
fn shards() -> Vec<Vec<u8>> {
    let shard = |names: &[&str]| {
        let mut header = serde_json::Map::new();
        for (i, name) in names.iter().enumerate() {
            header.insert(
                (*name).into(),
                json!({"dtype": "BF16", "shape": [2, 4], "data_offsets": [16 * i, 16 * (i + 1)]}),
            );
        }
        header.insert("__metadata__".into(), json!({"format": "pt"}));
        let text = Value::Object(header).to_string();
        [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &vec![0; 16 * names.len()]].concat()
    };
    vec![
        shard(&["model.embed_tokens.weight", "model.norm.weight"]),
        shard(&["lm_head.weight", "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.sinks"]),
    ]
}

/// A journal of three groups.
fn finished_journal(folder: &Path) -> Vec<u8> {
    let path = folder.join("journal");
    let (mut journal, _) = Journal::open(&path, "job").unwrap().unwrap();
    for group in 0..3 {
        journal
            .finished(&Finished { group, bytes: format!("{group:016x}"), result: json!({"groups": [group]}) })
            .unwrap();
    }
    std::fs::read(path).unwrap()
}

fn seconds() -> f64 {
    let given = std::env::var("FUZZ_SECONDS").ok().map(|s| s.parse().expect("FUZZ_SECONDS is a number"));
    given.unwrap_or(if std::env::var_os("FULL").is_some() { 60.0 } else { 1.0 })
}

/// Where an input that broke a parser is kept.
fn keep(target: &str, bytes: &[u8]) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz");
    std::fs::create_dir_all(&folder).unwrap();
    file(&folder, target, bytes)
}

#[test]
fn no_input_breaks_a_parser() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random::from_env("FUZZ");
    let mut broken = Vec::new();
    for target in targets(folder.path()) {
        let mut messages = BTreeMap::new();
        let tries = Tries::For(seconds());
        if let Some(found) = target.try_for(target.parser.clone(), tries, PATIENCE, &mut random, &mut messages) {
            broken.push(format!("{} {}: {}", target.name, found.how, keep(target.name, &found.bytes).display()));
        }
        if std::env::var_os("FUZZ_MESSAGES").is_some() {
            messages.iter().for_each(|(message, count)| println!("{}: {count} {message:?}", target.name));
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

/// A parser that panics where it refuses an input for one reason is found out, and by the input that is kept.
#[test]
fn a_planted_fault_is_found_in_each_parser() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random::from_env("FUZZ");
    for target in targets(folder.path()) {
        let (parser, deep) = (target.parser.clone(), target.deep);
        let planted: Parser = Arc::new(move |bytes: &[u8]| {
            let said = parser(bytes);
            assert!(!said.as_ref().is_err_and(|message| message.contains(deep)), "planted");
            said
        });
        let mut messages = BTreeMap::new();
        let tries = Tries::Count(1 << 20);
        let found = target.try_for(planted.clone(), tries, PATIENCE, &mut random, &mut messages);
        let found = found.unwrap_or_else(|| panic!("{}: nothing said {deep:?}: {messages:#?}", target.name));
        assert_eq!(found.how, "panics: planted", "{}", target.name);
        assert!(found.changed, "{}: a good input says {deep:?}, so finding it says nothing", target.name);
        let again = catch_unwind(AssertUnwindSafe(|| planted(&found.bytes)));
        assert!(again.is_err(), "{}", target.name);
    }
}

/// So are one that hangs and one that takes too much.
#[test]
fn what_hangs_or_takes_too_much_is_found() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let mut random = Random::from_env("FUZZ");
    let all = targets(folder.path());
    let greedy: Parser = Arc::new(|_: &[u8]| {
        let all: Vec<u8> = Vec::with_capacity(std::hint::black_box(MEMORY + 1));
        (all.capacity() > MEMORY).then_some(()).ok_or_else(String::new)
    });
    let mut broken =
        |parser| all[0].try_for(parser, Tries::Count(1), Duration::from_secs(1), &mut random, &mut BTreeMap::new());
    assert_eq!(broken(greedy).unwrap().how, "takes 1024 MB");
    let hanging: Parser = Arc::new(|_: &[u8]| {
        loop {
            std::thread::sleep(Duration::from_secs(1));
        }
    });
    assert_eq!(broken(hanging).unwrap().how, "takes more than 1 s");
}
