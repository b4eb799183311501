//! Text from files and from the hub, through the library's one door, against golden windows and a loopback hub.

#[allow(dead_code, reason = "each test file uses its part")]
#[path = "support/hub.rs"]
mod server;
mod support;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

use gptoss::Error;
use gptoss::checkpoint::hub::Settings;
use gptoss::pipeline::progress::Progress;
use gptoss::text::dataset::Split;
use gptoss::text::tokenizer::Tokenizer;
use gptoss::text::windows::Layout;
use gptoss::text::{Source, Text, TextRequest, load_with};
use safetensors::SafeTensors;
use server::{COMMIT, Faults, Hub};
use support::parquet::{chats_file, parquet_file};
use support::{files, root, tiny};

fn tokenizer() -> Tokenizer {
    Tokenizer::open(&tiny(), 2048).unwrap()
}

fn request(source: Source) -> TextRequest {
    TextRequest { source, samples: None, max_seq_length: 256, layout: Layout::Pack, pad: false, seed: None }
}

fn settings(cache: PathBuf, endpoint: &str, offline: bool) -> Settings {
    let patience = std::time::Duration::from_secs(30);
    Settings { cache, token: None, endpoint: endpoint.to_owned(), offline, patience, verified: None }
}

#[test]
fn packed_windows_are_those_of_transformers() {
    let request = TextRequest { samples: Some(128), ..request(Source::File(tiny().join("test.jsonl"))) };
    let quiet = Progress::new(true);
    let text = load_with(&request, &tokenizer(), &tiny(), &quiet, || panic!("no hub is needed")).unwrap();
    let golden = std::fs::read(root().join("tests/golden/tiny-logits/tiny-logits.safetensors")).unwrap();
    let golden = SafeTensors::deserialize(&golden).unwrap();
    let windows = golden.tensor("windows").unwrap();
    assert_eq!(windows.shape(), [128, 256]);
    for (i, (have, want)) in text.sequences.iter().zip(windows.data().chunks(4 * 256)).enumerate() {
        let have: Vec<u8> = have.ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        assert!(have == want, "window {i}");
    }
    assert_eq!(text.sequences.len(), 128);
}

/// A dataset's repository on a loopback hub, and a cache.
struct Place {
    dir: tempfile::TempDir,
    hub: Hub,
    template: Option<&'static str>,
}

impl Place {
    fn new(repo: &str, files: &[(&str, Vec<u8>)]) -> Self {
        Self::with(repo, files, Faults::default())
    }

    fn with(repo: &str, files: &[(&str, Vec<u8>)], faults: Faults) -> Self {
        let files: BTreeMap<_, _> = files.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.clone())).collect();
        let hub = Hub::serve_files(&format!("datasets/{repo}"), files, faults);
        Self { dir: tempfile::tempdir().unwrap(), hub, template: None }
    }

    fn load(&self, name: &str, config: Option<&str>, split: Split, offline: bool) -> Result<Text, Error> {
        let source = Source::Dataset { name: name.into(), config: config.map(str::to_owned), split };
        let request = TextRequest { layout: Layout::Truncate, ..request(source) };
        let settings = settings(self.dir.path().join("hub"), &self.hub.endpoint, offline);
        let checkpoint = self.dir.path().join("checkpoint");
        std::fs::create_dir_all(&checkpoint).unwrap();
        if let Some(template) = self.template {
            std::fs::write(checkpoint.join("chat_template.jinja"), template).unwrap();
        }
        load_with(&request, &tokenizer(), &checkpoint, &Progress::new(true), || Ok(settings))
    }

    /// The documents' texts as the sequences have them.
    fn texts(&self, name: &str, config: Option<&str>) -> Vec<String> {
        let text = self.load(name, config, Split::Train, false).unwrap();
        let tokenizer = tokenizer();
        text.sequences.iter().map(|s| tokenizer.decode(&s.ids).unwrap()).collect()
    }
}

#[test]
fn open_platypus_is_put_in_the_words_of_alpaca() {
    let file = parquet_file(&[
        ("input", &["", "1 2"]),
        ("output", &["Ok.", "3"]),
        ("instruction", &["Go.", "Add."]),
        ("data_source", &["x", "x"]),
    ]);
    let name = "data/train-00000-of-00001-4fe2df04669d1669.parquet";
    let place = Place::new("garage-bAInd/Open-Platypus", &[(name, file), ("README.md", b"x".to_vec())]);
    let texts = place.texts("open_platypus", None);
    assert!(texts[0].ends_with("request.\n\n### Instruction:\nGo.\n\n### Response:\nOk."), "{texts:?}");
    assert!(texts[1].ends_with("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3"), "{texts:?}");
    let report = place.load("open_platypus", None, Split::Train, false).unwrap().report;
    assert_eq!(report.source.name, "open_platypus (default)");
    assert_eq!(report.source.hub.unwrap(), format!("garage-bAInd/Open-Platypus@{COMMIT}"));
    assert_eq!(report.source.file.as_deref(), Some(name));
    assert!(place.hub.log().iter().all(|(p, _)| !p.contains("README")), "{:?}", place.hub.log());
}

#[test]
fn gsm8k_has_two_configurations() {
    let file = |answer: &str| parquet_file(&[("question", &["1+1?"]), ("answer", &[answer])]);
    let place = Place::new(
        "openai/gsm8k",
        &[
            ("main/train-00000-of-00001.parquet", file("2")),
            ("main/test-00000-of-00001.parquet", file("not this")),
            ("socratic/train-00000-of-00001.parquet", file("what is 1? 2")),
        ],
    );
    assert_eq!(place.texts("gsm8k", None), ["Question: 1+1?\nAnswer: 2"]);
    assert_eq!(place.texts("gsm8k", Some("socratic")), ["Question: 1+1?\nAnswer: what is 1? 2"]);
}

#[test]
fn rows_of_wikitext_are_one_text_of_the_split_that_is_wanted() {
    let place = Place::new(
        "Salesforce/wikitext",
        &[
            ("wikitext-2-raw-v1/test-00000-of-00001.parquet", parquet_file(&[("text", &["test"])])),
            ("wikitext-2-raw-v1/train-00000-of-00001.parquet", parquet_file(&[("text", &["", " = A = \n", "b"])])),
        ],
    );
    assert_eq!(place.texts("wikitext2", None), ["\n\n = A = \n\n\nb"]);
    let test = place.load("wikitext", Some("wikitext-2-raw-v1"), Split::Test, false).unwrap();
    assert_eq!(tokenizer().decode(&test.sequences[0].ids).unwrap(), "test");
}

#[test]
fn c4_is_unpacked_and_its_empty_rows_are_counted() {
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(
        b"{\"text\":\"one\",\"url\":\"u\"}\n{\"text\":\"\",\"url\":\"u\"}\n{\"text\":\"two\",\"url\":\"u\"}\n",
    )
    .unwrap();
    let gz = gz.finish().unwrap();
    let other = b"not read".to_vec();
    let place = Place::new(
        "allenai/c4",
        &[("en/c4-train.00000-of-01024.json.gz", gz), ("en/c4-train.00001-of-01024.json.gz", other)],
    );
    assert_eq!(place.texts("c4", None), ["one", "two"]);
    let text = place.load("c4", None, Split::Train, false).unwrap();
    assert_eq!(text.report.documents_empty, 1);
    assert!(text.notes[0].contains("1 documents without text"), "{:?}", text.notes);
}

#[test]
fn ultrachat_goes_through_the_checkpoints_template() {
    let file = chats_file(&[&[("user", "hi"), ("assistant", "ho")], &[("user", "x")]]);
    let name = "data/train_sft-00000-of-00003-a3ecf92756993583.parquet";
    let mut place = Place::new("HuggingFaceH4/ultrachat_200k", &[(name, file)]);
    let e = place.load("ultrachat", None, Split::Train, false).unwrap_err().to_string();
    assert!(e.contains("checkpoint: has no chat template"), "{e}");
    place.template = Some("{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}");
    let want =
        ["<|start|>user<|message|>hi<|end|><|start|>assistant<|message|>ho<|end|>", "<|start|>user<|message|>x<|end|>"];
    assert_eq!(place.texts("ultrachat_200k", None), want);
}

#[test]
fn a_dataset_is_downloaded_once_and_then_found_offline() {
    let file = parquet_file(&[("question", &["1+1?"]), ("answer", &["2"])]);
    let name = "main/train-00000-of-00001.parquet";
    let faults = Faults { cuts: vec![20, 0], damaged: 1, ..Default::default() };
    let place = Place::with("openai/gsm8k", &[(name, file)], faults);
    let e = place.load("gsm8k", None, Split::Train, true).unwrap_err().to_string();
    assert!(e.contains("HF_HUB_OFFLINE is set, and the cache"), "{e}");
    let online = place.load("gsm8k", None, Split::Train, false).unwrap();
    let asked = place.hub.log().len();
    assert_eq!(place.load("gsm8k", None, Split::Train, true).unwrap(), online);
    let pinned = place.load(&format!("gsm8k@{COMMIT}"), None, Split::Train, true).unwrap();
    assert_eq!(pinned.report, online.report);
    // What a manifest says of a text is enough to have it again.
    let again = online.report.request(None).unwrap();
    let cache = place.dir.path().join("hub");
    let settings = settings(cache, &place.hub.endpoint, true);
    let checkpoint = place.dir.path().join("checkpoint");
    assert_eq!(load_with(&again, &tokenizer(), &checkpoint, &Progress::new(true), || Ok(settings)).unwrap(), online);
    let e = place.load("gsm8k", Some("socratic"), Split::Train, true).unwrap_err().to_string();
    assert!(e.contains("does not have socratic/train-00000-of-*.parquet"), "{e}");
    assert_eq!(place.hub.log().len(), asked, "nothing was asked");
    assert!(place.dir.path().join("hub/datasets--openai--gsm8k/refs/main").exists());
}

#[test]
fn what_the_hub_does_not_have_is_said_by_name() {
    let place = Place::new("openai/gsm8k", &[("data/train.parquet", vec![1])]);
    let error = |name: &str| place.load(name, None, Split::Train, false).unwrap_err().to_string();
    let e = error("gsm8k");
    assert!(e.contains("openai/gsm8k@main: has no file main/train-00000-of-*.parquet"), "{e}");
    assert!(error("gsm8k@v9").contains("openai/gsm8k@v9: the hub does not have the repository"));
    assert!(error("c4").contains("allenai/c4@main: the hub does not have the repository"));
}

#[test]
fn a_hub_that_lies_about_paths_gets_nowhere() {
    let file = parquet_file(&[("question", &["q"]), ("answer", &["a"])]);
    let faults = Faults {
        extra: vec![
            "main/train-00000-of-/../../../../../escape.parquet".into(),
            "../main/train-00000-of-1.parquet".into(),
        ],
        ..Default::default()
    };
    let place = Place::with("openai/gsm8k", &[("main/train-00000-of-00001.parquet", file)], faults);
    let report = place.load("gsm8k", None, Split::Train, false).unwrap().report;
    assert_eq!(report.source.file.as_deref(), Some("main/train-00000-of-00001.parquet"));
    assert!(place.hub.log().iter().all(|(p, _)| !p.contains("..")), "{:?}", place.hub.log());
}

#[test]
fn tokenizers_that_are_broken_in_every_place_are_errors_or_work() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    let good = std::fs::read(tiny().join("tokenizer.json")).unwrap();
    let try_it = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        if let Ok(tokenizer) = Tokenizer::open(dir.path(), 2048) {
            let _ = tokenizer.encode("fn main() { let x = \"é🔬\"; }<|end|>").and_then(|ids| tokenizer.decode(&ids));
        }
    };
    for at in (0..good.len()).step_by(good.len() / 100) {
        try_it(&good[..at]);
        for flip in [0x01, 0x02, 0x80] {
            let mut bad = good.clone();
            bad[at] ^= flip;
            try_it(&bad);
        }
    }
}
