//! What the two loops share: a plan becomes a sink and a list of units, workers do them, groups are closed, source shards
//! are hashed on the way. [`Pipeline`] is what differs.

use std::collections::BTreeMap;
use std::sync::{Mutex, OnceLock};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::executor::{self, Unit};
use super::progress::Progress;
use super::{Paths, Resources, layout_name};
use crate::checkpoint::destination::check_destination;
use crate::checkpoint::layout::Layout;
use crate::checkpoint::sink::Sink;
use crate::checkpoint::source::Checkpoint;
use crate::checkpoint::{CONFIG, INDEX, digest};
use crate::error::{Error, Result};
use crate::manifest::{Coverage, FileRecord, FileSet, Job, NUMERICS, TensorReport};
use crate::ops::dequantize::HalfCounts;

/// One loop: its units, and what they find.
pub(super) trait Pipeline: Sync {
    /// A unit's work.
    type Work: Sync;
    /// A worker's buffers.
    type Scratch: Default;
    /// What a unit finds.
    type Found: Send;
    /// The source shard that a unit reads, where it reads one.
    fn shard_of(&self, work: &Self::Work) -> Option<usize>;
    /// Does a unit.
    fn work(&self, work: &Self::Work, scratch: &mut Self::Scratch, sink: &Sink) -> Result<Self::Found>;
    /// Whether groups come one after the other, each with [`Self::before`] first.
    fn in_order(&self) -> bool {
        false
    }
    /// What goes before the units of a group that is left to do.
    fn before(&self, _group: usize) -> Result<()> {
        Ok(())
    }
    /// What a group's units found, in unit order.
    fn close(&self, group: usize, found: Vec<Self::Found>) -> GroupResult;
}

/// What a group's units found, in the form that the journal keeps.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct GroupResult {
    pub(super) tensors: Vec<TensorReport>,
    #[serde(default)]
    pub(super) conversion: HalfCounts,
    #[serde(default)]
    pub(super) coverage: Vec<Coverage>,
    #[serde(default)]
    pub(super) notes: Vec<String>,
}

/// A plan, ready to run.
pub(super) struct Task<'a, W> {
    /// `dequantize`, `quantize`.
    pub(super) verb: &'a str,
    pub(super) source: &'a Checkpoint,
    pub(super) job: &'a Job,
    /// A hash of the calibration text, empty where there is none.
    pub(super) text: &'a str,
    pub(super) layout: Layout,
    pub(super) units: Vec<Unit<W>>,
    /// Working memory of one worker.
    pub(super) scratch_bytes: u64,
}

/// A task whose weights are written; [`Sink::finish`] is left.
pub(super) struct Done {
    pub(super) sink: Sink,
    pub(super) groups: Vec<GroupResult>,
    pub(super) source: FileSet,
    /// Groups that an earlier run had finished.
    pub(super) resumed: usize,
}

/// A unit of the loop, or one that hashes a source shard.
enum Step<W> {
    Hash(usize),
    Work(W),
}

/// A task whose destination is open.
pub(super) struct Opened<'a, W> {
    units: Vec<Unit<W>>,
    verb: &'a str,
    source: &'a Checkpoint,
    workers: usize,
    /// The output.
    pub(super) sink: Sink,
    /// What makes two runs the same job.
    pub(super) fingerprint: String,
}

/// Runs `task`.
pub(super) fn run<P: Pipeline>(
    pipeline: &P,
    task: Task<P::Work>,
    paths: &Paths,
    resources: &Resources,
) -> Result<Done> {
    let opened = Opened::new(task, paths, resources)?;
    let outcome = opened.work(pipeline, resources);
    opened.end(outcome, resources)
}

impl<'a, W: Sync> Opened<'a, W> {
    /// Opens the destination, or what an interrupted run left of it.
    pub(super) fn new(task: Task<'a, W>, paths: &Paths, resources: &Resources) -> Result<Self> {
        let dst = check_destination(&paths.src, &paths.dst, paths.force)?;
        let workers = resources.workers(task.scratch_bytes)?;
        let layout = task.layout;
        let fingerprint = fingerprint(task.job, task.text, &layout.fingerprint(), task.source)?;
        let sink = Sink::open(&dst, layout, &fingerprint, paths.force)?;
        if !sink.resumed.is_empty() {
            let n = sink.resumed.len();
            resources.progress.note(&format!("resuming behind {n} finished groups of an interrupted run"));
        }
        let mut units = task.units;
        units.retain(|u| u.group.is_none_or(|g| !sink.resumed.contains_key(&g)));
        Ok(Self { units, verb: task.verb, source: task.source, workers, sink, fingerprint })
    }

    /// Does what is left; gives every group's result and the source's files.
    pub(super) fn work<P: Pipeline<Work = W>>(
        &self,
        pipeline: &P,
        resources: &Resources,
    ) -> Result<(Vec<GroupResult>, FileSet)> {
        if !pipeline.in_order() {
            resources.progress.start(self.verb, self.units.iter().map(|u| u.bytes).sum());
        }
        let steps = hash_behind(&self.units, self.source.shards.len(), |work| pipeline.shard_of(work));
        let hashes = SourceHashes(self.source.shards.iter().map(|_| OnceLock::new()).collect());
        let closed = Mutex::new(self.sink.resumed.clone());
        if pipeline.in_order() {
            // Progress is what `before` does.
            let quiet = Resources { progress: Progress::new(true), ..resources.clone() };
            let same = |a: &Unit<Step<&W>>, b: &Unit<Step<&W>>| a.group.is_none() || a.group == b.group;
            for steps in steps.chunk_by(same) {
                if let Some(group) = steps.iter().find_map(|s| s.group) {
                    pipeline.before(group)?;
                }
                work(pipeline, steps, self.workers, &self.sink, &quiet, &hashes, self.source, &closed)?;
            }
        } else {
            work(pipeline, &steps, self.workers, &self.sink, resources, &hashes, self.source, &closed)?;
        }
        let closed = closed.into_inner().expect("no thread panics while it holds this");
        let parsed: std::result::Result<_, _> = closed.into_values().map(serde_json::from_value).collect();
        let groups = parsed.map_err(|e| Error::BadManifest {
            origin: "the journal of the interrupted run".into(),
            reason: format!("holds a result that this version does not read: {e}"),
        })?;
        resources.progress.finish();
        Ok((groups, hashes.file_set(self.source)?))
    }

    /// After a failure what could go better next time is kept to resume from, what bad input made is removed.
    pub(super) fn end(self, outcome: Result<(Vec<GroupResult>, FileSet)>, resources: &Resources) -> Result<Done> {
        match outcome {
            Ok((groups, source)) => {
                let resumed = self.sink.resumed.len();
                Ok(Done { sink: self.sink, groups, source, resumed })
            }
            Err(error) => {
                resources.progress.clear();
                if !error.is_transient() {
                    self.sink.discard()?;
                } else {
                    let partial = self.sink.partial().display();
                    resources.progress.note(&format!("unfinished output stays in {partial}; the same command resumes"));
                }
                Err(error)
            }
        }
    }
}

/// Does some steps; notes each group's result in `closed`.
#[allow(clippy::too_many_arguments, reason = "one caller, and a struct for it would say nothing more")]
fn work<P: Pipeline>(
    pipeline: &P,
    steps: &[Unit<Step<&P::Work>>],
    workers: usize,
    sink: &Sink,
    resources: &Resources,
    hashes: &SourceHashes,
    source: &Checkpoint,
    closed: &Mutex<BTreeMap<usize, Value>>,
) -> Result<()> {
    executor::run(
        steps,
        workers,
        sink,
        &resources.progress,
        P::Scratch::default,
        |step, scratch| match step {
            Step::Hash(shard) => {
                hashes.compute(source, *shard);
                Ok(None)
            }
            Step::Work(work) => pipeline.work(work, scratch, sink).map(Some),
        },
        |group, found: Vec<Option<P::Found>>| {
            let result = pipeline.close(group, found.into_iter().flatten().collect());
            let value = serde_json::to_value(result).expect("plain data serializes");
            closed.lock().expect("no thread panics while it holds this").insert(group, value.clone());
            value
        },
    )
}

/// Puts, behind the last unit that reads each source shard, a step that hashes it: its pages are in memory then, and
/// the output, whose hash takes longest, is not kept waiting. A shard that no unit names comes first.
fn hash_behind<W>(units: &[Unit<W>], shards: usize, reads: impl Fn(&W) -> Option<usize>) -> Vec<Unit<Step<&W>>> {
    let mut last = vec![0; shards];
    for (i, unit) in units.iter().enumerate() {
        if let Some(shard) = reads(&unit.work) {
            last[shard] = i + 1;
        }
    }
    let mut due: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    last.into_iter().enumerate().for_each(|(shard, at)| due.entry(at).or_default().push(shard));
    let mut steps = Vec::with_capacity(units.len() + shards);
    let mut hash = |at: usize, steps: &mut Vec<Unit<Step<&W>>>| {
        let shards = due.remove(&at).unwrap_or_default().into_iter();
        steps.extend(shards.map(|shard| Unit { group: None, bytes: 0, work: Step::Hash(shard) }));
    };
    hash(0, &mut steps);
    for (i, unit) in units.iter().enumerate() {
        steps.push(Unit { group: unit.group, bytes: unit.bytes, work: Step::Work(&unit.work) });
        hash(i + 1, &mut steps);
    }
    steps
}

/// Hashes of the source's shards, filled in by workers as they come by.
struct SourceHashes(Vec<OnceLock<String>>);

impl SourceHashes {
    fn compute(&self, source: &Checkpoint, shard: usize) -> &str {
        self.0[shard].get_or_init(|| digest::sha256(source.shards[shard].bytes()))
    }

    /// Records of every file that was read.
    fn file_set(&self, source: &Checkpoint) -> Result<FileSet> {
        let mut files = Vec::new();
        for (i, shard) in source.shards.iter().enumerate() {
            let sha256 = self.compute(source, i).to_owned();
            files.push(FileRecord { name: shard.name.clone(), bytes: shard.bytes().len() as u64, sha256 });
        }
        let mut small = source.side_files()?;
        // A GGUF file may be alone.
        small.extend([CONFIG, INDEX].into_iter().filter(|name| source.dir.join(name).exists()).map(str::to_owned));
        for name in small {
            files.push(digest::record(&source.dir, &name)?);
        }
        files.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(FileSet::new(layout_name(source), files))
    }
}

/// What makes two runs the same job: version, recipe, calibration text, planned layout, and the source's files as the system dates them.
pub(super) fn fingerprint(job: &Job, text: &str, layout: &str, source: &Checkpoint) -> Result<String> {
    use std::os::unix::fs::MetadataExt;
    let mut files = Vec::new();
    let small =
        source.side_files()?.into_iter().chain([CONFIG.to_owned()]).map(|n| source.dir.join(n)).filter(|p| p.exists());
    for path in source.shards.iter().map(|s| s.path.clone()).chain(small) {
        let m = std::fs::metadata(&path).map_err(Error::io("stat", &path))?;
        files.push((path.file_name().map(|n| n.to_string_lossy().into_owned()), m.len(), m.mtime(), m.mtime_nsec()));
    }
    let all = serde_json::json!([env!("CARGO_PKG_VERSION"), NUMERICS, job, text, layout, files]);
    Ok(digest::sha256(all.to_string().as_bytes()))
}
