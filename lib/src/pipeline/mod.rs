//! `source -> plan -> for each group of tensors: read, round, pack -> sink`. [`dequant`] and [`quant`] are the two loops;
//! what they share is here: the crew of workers, progress, memory, pass-through copies.

pub mod copy;
pub mod dequant;
pub mod executor;
pub mod meter;
pub mod progress;
pub mod quant;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::checkpoint::sink::{Sink, to_text};
use crate::checkpoint::source::Checkpoint;
use crate::checkpoint::{CONFIG, INDEX, digest};
use crate::error::{Error, Result};
use crate::manifest::{FileRecord, FileSet, Job, Manifest, NUMERICS, TensorReport};
use crate::ops::dequantize::HalfCounts;
use progress::Progress;

/// What a run may use. None of it changes a bit of the output.
#[derive(Debug, Clone)]
pub struct Resources {
    /// Worker threads.
    pub threads: usize,
    /// Most bytes of working memory; mapped input does not count.
    pub max_memory: u64,
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
}

/// What a group's units found, in the form that the journal keeps.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct GroupResult {
    pub(crate) tensors: Vec<TensorReport>,
    pub(crate) conversion: HalfCounts,
}

/// Hashes of the source's shards, filled in by workers as they come by.
pub(crate) struct SourceHashes(Vec<OnceLock<String>>);

impl SourceHashes {
    pub(crate) fn new(source: &Checkpoint) -> Self {
        Self(source.shards.iter().map(|_| OnceLock::new()).collect())
    }

    pub(crate) fn compute(&self, source: &Checkpoint, shard: usize) {
        self.0[shard].get_or_init(|| digest::sha256(source.shards[shard].bytes()));
    }

    /// Records of every file that was read. A shard that no unit touched is hashed here.
    pub(crate) fn file_set(&self, source: &Checkpoint) -> Result<FileSet> {
        let mut files = Vec::new();
        for (i, shard) in source.shards.iter().enumerate() {
            self.compute(source, i);
            let sha256 = self.0[i].get().expect("computed right above").clone();
            files.push(FileRecord { name: shard.name.clone(), bytes: shard.bytes().len() as u64, sha256 });
        }
        let mut small = source.side_files()?;
        small.push(CONFIG.into());
        if source.dir.join(INDEX).exists() {
            small.push(INDEX.into());
        }
        for name in small {
            files.push(digest::record(&source.dir, &name)?);
        }
        files.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(FileSet::new(layout_name(source), files))
    }
}

/// Puts, behind the last unit that reads each source shard, a unit that hashes it: its pages are in memory then, and
/// the output, whose hash takes longest, is not kept waiting.
pub(crate) fn hash_behind<T>(
    units: &mut Vec<executor::Unit<T>>,
    shards: usize,
    reads: impl Fn(&T) -> Option<usize>,
    hash: impl Fn(usize) -> T,
) {
    let mut last = vec![0; shards];
    for (i, unit) in units.iter().enumerate() {
        if let Some(shard) = reads(&unit.work) {
            last[shard] = i + 1;
        }
    }
    let mut order: Vec<(usize, usize)> = last.into_iter().enumerate().map(|(shard, at)| (at, shard)).collect();
    order.sort_unstable();
    for (at, shard) in order.into_iter().rev() {
        units.insert(at, executor::Unit { group: None, bytes: 0, work: hash(shard) });
    }
}

/// How a checkpoint stores its weights, in a word.
pub fn layout_name(checkpoint: &Checkpoint) -> String {
    use safetensors::Dtype;
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
    let folder = || std::path::absolute(dir).ok().and_then(|p| p.file_name().map(|n| n.to_string_lossy().into_owned()));
    config.known_name().map(str::to_owned).or_else(folder).unwrap_or_else(|| "model".into())
}

/// What makes two runs the same job: version, recipe, planned layout, and the source's files as the system dates them.
pub(crate) fn fingerprint(job: &Job, layout: &str, source: &Checkpoint) -> Result<String> {
    use std::os::unix::fs::MetadataExt;
    let mut files = Vec::new();
    let small = source.side_files()?.into_iter().chain([CONFIG.to_owned()]).map(|n| source.dir.join(n));
    for path in source.shards.iter().map(|s| s.path.clone()).chain(small) {
        let m = std::fs::metadata(&path).map_err(Error::io("stat", &path))?;
        files.push((path.file_name().map(|n| n.to_string_lossy().into_owned()), m.len(), m.mtime(), m.mtime_nsec()));
    }
    let all = serde_json::json!([env!("CARGO_PKG_VERSION"), NUMERICS, job, layout, files]);
    Ok(digest::sha256(all.to_string().as_bytes()))
}

/// The small files of the output: the configuration and what travels unchanged.
pub(crate) fn side_files(
    source: &Checkpoint,
    config: &serde_json::Map<String, Value>,
) -> Result<Vec<(String, Vec<u8>)>> {
    let mut files = vec![(CONFIG.to_owned(), to_text(config).into_bytes())];
    for name in source.side_files()? {
        let path = source.dir.join(&name);
        files.push((name, std::fs::read(&path).map_err(Error::io("read", &path))?));
    }
    Ok(files)
}

/// What a reader of the output must know of its source.
pub(crate) fn source_notes(source: &Checkpoint, config: &crate::model::ModelConfig) -> Result<Vec<String>> {
    let foreign = crate::containers::foreign_tensors(source, config);
    let mut notes: Vec<String> =
        foreign.iter().map(|n| format!("{n} is no tensor of gpt-oss and was left out")).collect();
    if !source.side_files()?.iter().any(|n| n.starts_with("tokenizer")) {
        notes.push("the source has no tokenizer, and so has the output".into());
    }
    Ok(notes)
}

/// Tells that an interrupted run goes on.
pub(crate) fn announce(sink: &Sink, resources: &Resources) {
    match sink.resumed.len() {
        0 => {}
        n => resources.progress.note(&format!("resuming behind {n} finished groups of an interrupted run")),
    }
}

/// After a failure: what could go better next time is kept to resume from, what bad input made is removed.
pub(crate) fn give_up(sink: Sink, error: Error, resources: &Resources) -> Error {
    resources.progress.clear();
    if error.is_transient() {
        resources
            .progress
            .note(&format!("unfinished output stays in {}; the same command resumes", sink.partial().display()));
        return error;
    }
    sink.discard().err().unwrap_or(error)
}

/// The groups' results, of this run and of those before it.
pub(crate) fn group_results(all: BTreeMap<usize, Value>, failed: Option<Error>) -> (Vec<GroupResult>, Option<Error>) {
    let parsed: std::result::Result<Vec<GroupResult>, _> = all.into_values().map(serde_json::from_value).collect();
    match (parsed, failed) {
        (Ok(results), failed) => (results, failed),
        (Err(_), Some(error)) => (Vec::new(), Some(error)),
        (Err(e), None) => {
            let reason = format!("holds a result that this version does not read: {e}");
            (Vec::new(), Some(Error::BadManifest { origin: "the journal of the interrupted run".into(), reason }))
        }
    }
}

/// Completes the manifest with the output's files; the text for the folder.
pub(crate) fn seal(manifest: &mut Manifest, layout: String, files: &[FileRecord]) -> String {
    manifest.output = Some(FileSet::new(layout, files.to_vec()));
    to_text(manifest)
}
