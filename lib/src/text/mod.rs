//! Text for calibration and measuring: `source -> documents -> ids -> sequences`, through one door, [`load`].
//!
//! A source is a file ([`reader`]) or a dataset that has a name ([`dataset`]). Chats go through the checkpoint's own template
//! ([`chat`]), text through its own tokenizer ([`tokenizer`]). The same source, request and checkpoint give the same
//! sequences everywhere; [`TextReport`] says what they are, for the manifest.

pub mod chat;
pub mod clock;
pub mod config;
pub mod dataset;
pub mod gguf;
mod parquet;
mod python;
pub mod reader;
pub mod rows;
pub mod sample;
pub mod tokenizer;
pub mod windows;

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::chat::ChatTemplate;
use self::clock::Clock;
use self::dataset::{Choice, Split};
use self::reader::Documents;
use self::rows::{Document, Placed, Rows};
use self::tokenizer::Tokenizer;
use self::windows::{Layout, Sequence, Spec, Windows};
use crate::checkpoint::digest;
use crate::checkpoint::hub::Settings;
use crate::error::{Error, Result};
use crate::pipeline::progress::Progress;

/// Where text comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A file, of the kinds that [`reader`] knows.
    File(PathBuf),
    /// A dataset of [`dataset::DATASETS`].
    Dataset {
        /// Its name, with `@revision` behind it where another than `main` is wanted.
        name: String,
        /// Its configuration; the dataset's first where `None`.
        config: Option<String>,
        /// Which part of it.
        split: Split,
    },
}

/// What text is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextRequest {
    /// Where it comes from.
    pub source: Source,
    /// Most sequences; all where `None`.
    pub samples: Option<usize>,
    /// Most ids in a sequence.
    pub max_seq_length: usize,
    /// How documents become sequences.
    pub layout: Layout,
    /// Short sequences are filled to `max_seq_length`.
    pub pad: bool,
    /// Documents are drawn at random by this seed, or the windows of a source that is one document; in the order of the
    /// source where `None`.
    pub seed: Option<u64>,
}

impl TextRequest {
    /// Whether the source can be there: a file that is one, a dataset that is known. Nothing is fetched.
    ///
    /// # Errors
    /// What [`load`] would say.
    pub fn check(&self) -> Result<()> {
        match &self.source {
            Source::File(file) => is_regular(file),
            Source::Dataset { name, config, split } => Choice::find(name, config.as_deref(), *split).map(drop),
        }
    }
}

/// A text is read twice, for its hash and for what it says.
fn is_regular(file: &Path) -> Result<()> {
    match std::fs::metadata(file).map_err(Error::io("open", file))?.is_file() {
        true => Ok(()),
        false => Err(Error::file(file, "is no regular file; save the text to one (a pipe can be read once only)")),
    }
}

/// Text that is ready for the model.
#[derive(Debug, Clone, PartialEq)]
pub struct Text {
    /// At least one.
    pub sequences: Vec<Sequence>,
    /// What they are.
    pub report: TextReport,
    /// What a user should know, such as that there was less text than asked for.
    pub notes: Vec<String>,
}

/// What text was used, for a manifest. Nothing in it depends on the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TextReport {
    /// The file or the dataset.
    pub source: TextSource,
    /// Documents of which something was used.
    pub documents: usize,
    /// Documents without text that were passed over on the way.
    pub documents_empty: usize,
    /// Sequences.
    pub sequences: usize,
    /// Tokens in them, padding not counted.
    pub tokens: usize,
    /// Tokens that were read and are in no sequence: behind the cut of a document, or in a last window that is not full.
    pub tokens_dropped: usize,
    /// Most tokens in a sequence.
    pub max_seq_length: usize,
    /// How documents became sequences.
    pub layout: Layout,
    /// True where short sequences were filled to max_seq_length.
    pub padded: bool,
    /// The seed of the draw; in the order of the source where there is none.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub seed: Option<u64>,
    /// Sequences that were asked for; all where there is no number.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub samples: Option<usize>,
}

/// Where text came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TextSource {
    /// The file's name, or the dataset's with its configuration.
    pub name: String,
    /// SHA-256 of the file, where it is the user's own.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub sha256: Option<String>,
    /// `org/name@commit` of a dataset.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub hub: Option<String>,
    /// Path of the dataset's file in its repository.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub file: Option<String>,
}

impl TextReport {
    /// The request that gives the same text once more; of a dataset its training part, at the same commit. `file` is the user's own text.
    ///
    /// # Errors
    /// [`Error::Refused`] where it came from a file and none is given.
    pub fn request(&self, file: Option<&Path>) -> Result<TextRequest> {
        let TextSource { name, hub, .. } = &self.source;
        // "gsm8k (main)", as `load` writes it, and "openai/gsm8k@commit".
        let dataset = || {
            let (name, config) = name.strip_suffix(')')?.split_once(" (")?;
            let commit = hub.as_ref()?.split_once('@')?.1;
            let (name, config) = (format!("{name}@{commit}"), Some(config.to_owned()));
            Some(Source::Dataset { name, config, split: Split::Train })
        };
        let source = file
            .map(|f| Source::File(f.to_path_buf()))
            .or_else(dataset)
            .ok_or_else(|| Error::Refused(format!("the text was {name}, a file: give --text FILE")))?;
        Ok(TextRequest {
            source,
            samples: self.samples,
            max_seq_length: self.max_seq_length,
            layout: self.layout,
            pad: self.padded,
            seed: self.seed,
        })
    }
}

/// Reads the text that `request` asks for. `checkpoint` is the folder whose chat template chats are rendered with.
///
/// With no seed, no more is read than is needed; with one, all documents of the source are held in memory.
pub fn load(request: &TextRequest, tokenizer: &Tokenizer, checkpoint: &Path, progress: &Progress) -> Result<Text> {
    load_with(request, tokenizer, checkpoint, progress, Settings::from_env)
}

/// [`load`] with other settings of the hub than those of the environment. They are asked for where a dataset is wanted.
pub fn load_with(
    request: &TextRequest,
    tokenizer: &Tokenizer,
    checkpoint: &Path,
    progress: &Progress,
    settings: impl FnOnce() -> Result<Settings>,
) -> Result<Text> {
    if request.max_seq_length == 0 || request.samples == Some(0) {
        return Err(Error::Refused(
            "no text was asked for: --max-seq-length and the number of samples are at least 1".into(),
        ));
    }
    let (source, file, rows) = match &request.source {
        Source::File(file) => {
            is_regular(file)?;
            let name = file.file_name().unwrap_or(file.as_os_str()).to_string_lossy().into_owned();
            let sha256 = Some(digest::of_file(file)?.1);
            (TextSource { name, sha256, hub: None, file: None }, file.clone(), Rows::TextOrMessages)
        }
        Source::Dataset { name, config, split } => {
            let choice = Choice::find(name, config.as_deref(), *split)?;
            let fetched = choice.fetch(&settings()?, progress)?;
            let name = format!("{} ({})", choice.dataset.name, choice.config.name);
            let source = TextSource { name, sha256: None, hub: Some(fetched.hub), file: Some(fetched.name) };
            (source, fetched.path, choice.dataset.rows)
        }
    };
    let mut texts = Texts { documents: reader::open(&file, rows)?, file: &file, checkpoint, template: None, empty: 0 };
    let windows = sequences(&mut texts, tokenizer, request)?;
    if windows.sequences.is_empty() {
        let why = match texts.empty {
            0 => "it has no documents".into(),
            n => format!("its {n} documents are empty"),
        };
        return Err(Error::file(file, format!("there is no text in it: {why}")));
    }
    let mut text = finish(request, source, windows, texts.empty);
    text.notes.extend(tokenizer.remark());
    Ok(text)
}

fn sequences(texts: &mut Texts, tokenizer: &Tokenizer, request: &TextRequest) -> Result<Windows> {
    let TextRequest { max_seq_length, layout, pad, samples, .. } = *request;
    let spec = Spec { max_seq_length, layout, pad, samples };
    let Some(seed) = request.seed else { return windows::windows(texts, tokenizer, spec) };
    let mut all: Vec<String> = texts.collect::<Result<_>>()?;
    if let [one] = &mut all[..] {
        let one = std::iter::once(Ok(std::mem::take(one)));
        let every = windows::windows(one, tokenizer, Spec { samples: None, ..spec })?;
        return Ok(windows::draw(every, samples, seed));
    }
    windows::windows(sample::shuffled(all, seed).map(Ok), tokenizer, spec)
}

fn finish(request: &TextRequest, source: TextSource, windows: Windows, empty: usize) -> Text {
    let (have, length) = (windows.sequences.len(), request.max_seq_length);
    let mut notes = Vec::new();
    if let Some(asked) = request.samples.filter(|&n| n > have) {
        notes.push(format!(
            "{} has text for {have} sequences of at most {length} tokens, {asked} were asked for",
            source.name
        ));
    }
    if empty > 0 {
        notes.push(format!("{}: {empty} documents without text were passed over", source.name));
    }
    let report = TextReport {
        source,
        documents: windows.documents,
        documents_empty: empty,
        sequences: have,
        tokens: windows.tokens,
        tokens_dropped: windows.dropped,
        max_seq_length: length,
        layout: request.layout,
        padded: request.pad,
        seed: request.seed,
        samples: request.samples,
    };
    Text { sequences: windows.sequences, report, notes }
}

/// The text of each document that has one.
struct Texts<'a> {
    documents: Documents,
    /// The file that they are from.
    file: &'a Path,
    /// The folder with the chat template.
    checkpoint: &'a Path,
    /// Opened for the first chat.
    template: Option<ChatTemplate>,
    /// Documents that were passed over.
    empty: usize,
}

impl Iterator for Texts<'_> {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.documents.next()? {
                Err(e) => return Some(Err(e)),
                Ok(placed) if placed.document.is_empty() => self.empty += 1,
                Ok(Placed { document: Document::Text(text), .. }) => return Some(Ok(text)),
                Ok(Placed { document: Document::Chat(messages), place }) => return Some(self.chat(&messages, &place)),
            }
        }
    }
}

impl Texts<'_> {
    fn chat(&mut self, messages: &[serde_json::Value], place: &str) -> Result<String> {
        let template = match self.template.take() {
            Some(template) => Ok(template),
            None => ChatTemplate::require(self.checkpoint, Clock::FIXED),
        };
        let rendered = template.and_then(|t| self.template.insert(t).render(messages, false));
        rendered.map_err(|e| Error::file(self.file, format!("{place}: {e}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/tiny-gpt-oss");

    fn request(file: impl Into<PathBuf>) -> TextRequest {
        TextRequest {
            source: Source::File(file.into()),
            samples: None,
            max_seq_length: 256,
            layout: Layout::Pack,
            pad: false,
            seed: None,
        }
    }

    fn loaded(request: &TextRequest) -> Result<Text> {
        let dir = Path::new(TINY);
        let tokenizer = Tokenizer::open(dir, 2048).unwrap();
        load_with(request, &tokenizer, dir, &Progress::new(true), || panic!("no hub is needed"))
    }

    #[test]
    fn the_report_says_what_was_used() {
        let request = TextRequest { samples: Some(128), ..request(Path::new(TINY).join("test.jsonl")) };
        let text = loaded(&request).unwrap();
        assert_eq!(text.sequences.len(), 128);
        let report = &text.report;
        assert_eq!((report.source.name.as_str(), report.sequences, report.tokens), ("test.jsonl", 128, 128 * 256));
        assert!(report.documents > 1 && report.documents < 150, "{report:?}");
        assert_eq!(report.tokens_dropped, 0);
        assert_eq!(text.notes, Vec::<String>::new());
        let json = serde_json::to_value(report).unwrap();
        assert_eq!(serde_json::from_value::<TextReport>(json).unwrap(), *report);
    }

    #[test]
    fn a_seed_draws_documents_and_less_text_than_asked_for_is_a_note() {
        let mut request = TextRequest { samples: Some(10), ..request(Path::new(TINY).join("calib.jsonl")) };
        let ordered = loaded(&request).unwrap();
        request.seed = Some(1);
        let drawn = loaded(&request).unwrap();
        assert_ne!(ordered.sequences, drawn.sequences);
        assert_eq!(drawn, loaded(&request).unwrap());
        request.samples = Some(100_000);
        let all = loaded(&request).unwrap();
        assert_eq!(all.report.documents, 159);
        assert!(all.notes[0].contains("100000 were asked for"), "{:?}", all.notes);
    }

    #[test]
    fn windows_of_a_single_text_are_drawn() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.txt");
        std::fs::write(&file, (0..5000).map(|i| format!("line {i}\n")).collect::<String>()).unwrap();
        let mut request = TextRequest { samples: Some(4), seed: Some(3), ..request(&file) };
        let drawn = loaded(&request).unwrap();
        request.seed = None;
        assert_ne!(loaded(&request).unwrap().sequences, drawn.sequences);
        request.samples = None;
        let all = loaded(&request).unwrap().sequences;
        assert!(drawn.sequences.len() == 4 && drawn.sequences.iter().all(|s| all.contains(s)));
    }

    #[test]
    fn without_text_or_a_template_there_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x.jsonl");
        let error = |content: &str| {
            std::fs::write(&file, content).unwrap();
            loaded(&request(&file)).unwrap_err().to_string()
        };
        assert!(error("").contains("there is no text in it: it has no documents"));
        assert!(error("{\"text\": \"\"}\n{\"text\": \" \"}\n").contains("its 2 documents are empty"));
        let e = error("{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}]}");
        assert!(e.contains("tiny-gpt-oss: has no chat template"), "{e}");
        assert!(error("{\"text\": \"a\"}\nx").contains("line 2: is not JSON"));
        let none = TextRequest { max_seq_length: 0, ..request(&file) };
        assert!(loaded(&none).unwrap_err().to_string().contains("at least 1"));
    }
}
