//! `source -> plan -> for each group of tensors: read, round, pack -> sink`. [`dequant`] and [`quant`] are the two loops;
//! what they share is [`task`] and the files beside it: workers, progress, memory, pass-through copies.

pub mod copy;
pub mod dequant;
pub mod executor;
pub mod meter;
pub mod progress;
pub mod quant;
mod task;

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::checkpoint::sink::to_text;
use crate::checkpoint::source::{Checkpoint, SideFile};
use crate::checkpoint::{CONFIG, map};
use crate::error::{Error, Result};
use crate::manifest::{FileRecord, FileSet, Manifest};
use progress::Progress;

/// What a run may use. None of it changes a bit of the output.
#[derive(Debug, Clone)]
pub struct Resources {
    /// Worker threads.
    pub threads: usize,
    /// Most bytes of working memory; mapped input does not count.
    pub max_memory: u64,
    /// Where hidden states go; beside the unfinished output where it is `None`.
    pub offload: Option<PathBuf>,
    /// Whether Hessians go there too, whatever the memory.
    pub offload_hessians: bool,
    /// Whom to tell.
    pub progress: Progress,
}

impl Resources {
    /// How many workers fit, when each needs `scratch` bytes.
    pub fn workers(&self, scratch: u64) -> Result<usize> {
        let fit = self.max_memory / scratch.max(1);
        if fit == 0 {
            let (have, need) = (self.max_memory, scratch);
            return Err(Error::Refused(format!("--max-memory {have} is too small: one worker needs {need} bytes")));
        }
        Ok(self.threads.min(usize::try_from(fit).unwrap_or(usize::MAX)).max(1))
    }
}

/// Where a run reads and writes.
#[derive(Debug, Clone)]
pub struct Paths {
    /// The source's folder.
    pub src: PathBuf,
    /// The folder that appears when all is done.
    pub dst: PathBuf,
    /// Replace a checkpoint that stands there, or another job's unfinished one.
    pub force: bool,
    /// Leave tensors out that are no part of the model; without it they are an error.
    pub drop_unknown: bool,
}

/// How a checkpoint stores its weights, in a word.
pub fn layout_name(checkpoint: &Checkpoint) -> String {
    use safetensors::Dtype;
    if checkpoint.is_gguf() {
        return "gguf".into();
    }
    let mut parts = Vec::new();
    let ends = |s: &str| checkpoint.names().any(|n| n.ends_with(s));
    if ends(".weight_packed") || ends(".weight_scale") {
        parts.push("compressed-tensors");
    }
    if ends("_blocks") {
        parts.push("mxfp4");
    }
    if parts.is_empty() {
        let first = checkpoint.names().next().and_then(|n| checkpoint.get(n));
        parts.push(match first.map(|t| t.info.dtype) {
            Some(Dtype::F16) => "fp16",
            Some(Dtype::F32) => "fp32",
            _ => "bf16",
        });
    }
    parts.join("+")
}

/// The name of the source for people: the published model's, or the folder's.
pub fn model_name(dir: &Path, config: &crate::model::ModelConfig) -> String {
    let folder = || {
        let whole = std::path::absolute(dir).ok()?;
        let name = |p: &Path| p.file_name().map(|n| n.to_string_lossy().into_owned());
        // A snapshot in a hub's cache lies in models--ORG--NAME/snapshots/COMMIT.
        let repo = whole.parent().filter(|p| name(p).as_deref() == Some("snapshots")).and_then(Path::parent);
        let repo = repo.and_then(name).and_then(|n| n.rsplit_once("--").map(|(_, n)| n.to_owned()));
        repo.or_else(|| name(&whole))
    };
    config.known_name().map(str::to_owned).or_else(folder).unwrap_or_else(|| "model".into())
}

/// Refuses a source with tensors that an output would silently lack: tensors that are no part of the model, and second forms
/// of a weight.
///
/// # Errors
/// [`Error::BadTensor`] for the first of them. With `drop_unknown`, tensors that are no part of the model are allowed.
pub(crate) fn refuse_what_would_be_lost(
    source: &Checkpoint,
    config: &crate::model::ModelConfig,
    drop_unknown: bool,
) -> Result<()> {
    crate::containers::refuse_twice(source, config)?;
    let foreign = crate::containers::foreign_tensors(source, config);
    let Some(first) = foreign.first().filter(|_| !drop_unknown) else { return Ok(()) };
    let first = source.tensor(first)?;
    let more = match foreign.len() {
        1 => String::new(),
        n => format!(" (nor are {} more)", n - 1),
    };
    Err(first.error(format!(
        "is no tensor of the model that config.json describes{more}, and the output would lack it: --drop-unknown-tensors allows \
         that"
    )))
}

/// What to say of an output that is stored as FP16; see [`crate::evaluate::half_range`].
pub(crate) fn half_range(source: &Checkpoint, resources: &Resources) -> Result<Option<String>> {
    use crate::engine::Numerics;
    use crate::model::{Model, Settings};
    let device = crate::device::cpu::Cpu::new(resources.threads)?.with(Numerics::Engine);
    let config = crate::model::ModelConfig::parse(&source.dir, &source.config)?;
    let looked = Settings::parse(&source.dir, &source.config, &config)
        .and_then(|_| Model::open_padded(&source.dir, source.padding()))
        .and_then(|model| crate::evaluate::half_range(&device, &model));
    match looked {
        // The weights are converted; a config that no forward can run takes nothing from that.
        Err(e) if !e.is_transient() => Ok(Some(format!("whether hidden states fit in FP16 could not be told: {e}"))),
        other => other,
    }
}

/// The small files of the output: the configuration and what travels unchanged.
pub(crate) fn side_files(source: &Checkpoint, config: &serde_json::Map<String, Value>) -> Result<Vec<SideFile>> {
    let mut files = vec![SideFile { name: CONFIG.to_owned(), bytes: to_text(config).into_bytes(), mode: None }];
    files.extend(source.read_side_files()?);
    // The last look: everything was read by now.
    source.unchanged()?;
    map::intact()?;
    Ok(files)
}

/// What a reader of the output must know of its source.
pub(crate) fn source_notes(source: &Checkpoint, config: &crate::model::ModelConfig) -> Result<Vec<String>> {
    let foreign = crate::containers::foreign_tensors(source, config);
    let mut notes = source.remarks.clone();
    notes.extend(
        foreign.iter().map(|n| format!("{n} is no tensor of the model that config.json describes, and was left out")),
    );
    if !source.side_files().any(|n| n.starts_with("tokenizer")) {
        notes.push(match source.is_gguf() {
            true => {
                "the source has no tokenizer.json, and so has the output: the tokenizer is not read out of a GGUF file"
                    .into()
            }
            false => "the source has no tokenizer, and so has the output".into(),
        });
    }
    Ok(notes)
}

/// Completes the manifest with the output's files; the text for the folder.
pub(crate) fn seal(manifest: &mut Manifest, layout: String, files: &[FileRecord]) -> String {
    manifest.output = Some(FileSet::new(layout, files.to_vec()));
    to_text(manifest)
}
