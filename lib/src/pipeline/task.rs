//! What the two loops share: a plan becomes a sink and a list of units, workers do them, groups are closed, source shards
//! are hashed on the way. [`Pipeline`] is what differs.

use std::collections::BTreeMap;
use std::sync::{Mutex, OnceLock};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::executor::{self, Step, Unit};
use super::progress::Progress;
use super::{Paths, Resources, layout_name};
use crate::checkpoint::destination::check_destination;
use crate::checkpoint::layout::Layout;
use crate::checkpoint::sink::{Order, Sink};
use crate::checkpoint::source::Checkpoint;
use crate::checkpoint::{digest, map};
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
    /// What goes before the units of a group that is left to do, where groups come one after the other.
    fn before(&self, _group: usize) -> Result<()> {
        Ok(())
    }
    /// What a group's units found, in unit order. Called once a group, after its last unit.
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
    /// Whether groups come one after the other, each with [`Pipeline::before`] first.
    pub(super) order: Order,
}

/// A task whose weights are written; [`Sink::finish`] is left.
pub(super) struct Done {
    pub(super) sink: Sink,
    pub(super) groups: Vec<GroupResult>,
    pub(super) source: FileSet,
    /// Groups that an earlier run had finished.
    pub(super) resumed: usize,
}

/// A unit of the loop, or the hash of a source shard.
enum Do<W> {
    Hash(usize),
    Work(W),
}

/// A task whose destination is open.
pub(super) struct Opened<'a, W> {
    units: Vec<Unit<W>>,
    verb: &'a str,
    source: &'a Checkpoint,
    workers: usize,
    order: Order,
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
        let fingerprint = fingerprint(task.job, task.text, &layout.fingerprint(), task.source);
        let sink = Sink::open(&dst, layout, &fingerprint, paths.force, task.order)?;
        if !sink.damaged.is_empty() {
            let n = sink.damaged.len();
            resources.progress.note(&format!(
                "{n} groups that an interrupted run had finished were changed since in {}; {} made again",
                sink.partial().display(),
                if task.order == Order::Any { "they are" } else { "everything is" }
            ));
        }
        if !sink.resumed.is_empty() {
            let n = sink.resumed.len();
            resources.progress.note(&format!("resuming behind {n} finished groups of an interrupted run"));
        }
        let units = task.units;
        Ok(Self { units, verb: task.verb, source: task.source, workers, order: task.order, sink, fingerprint })
    }

    /// Does what is left; gives every group's result and the source's files.
    pub(super) fn work<P: Pipeline<Work = W>>(
        &self,
        pipeline: &P,
        resources: &Resources,
    ) -> Result<(Vec<GroupResult>, FileSet)> {
        if self.order == Order::Any {
            resources.progress.start(self.verb, self.left().map(|u| u.bytes).sum());
        }
        let hashes = SourceHashes(self.source.shards.iter().map(|_| OnceLock::new()).collect());
        let closed = Mutex::new(self.sink.resumed.clone());
        let shards = self.source.shards.len();
        if self.order == Order::Ascending {
            // Progress is what `before` does.
            let quiet = Resources { progress: Progress::new(true), ..resources.clone() };
            let groups = self.groups();
            let ordered: Vec<&Unit<W>> = groups.values().flatten().copied().collect();
            let mut due = Due::new(&ordered, shards, |work| pipeline.shard_of(work));
            let mut at = 0;
            for (group, units) in groups {
                pipeline.before(group)?;
                let steps = due.steps(at, &units);
                at += units.len();
                work(pipeline, &steps, self.workers, &self.sink, &quiet, &hashes, self.source, &closed)?;
                if units.is_empty() {
                    self.sink.finish_group(group, close(pipeline, group, Vec::new(), &closed))?;
                }
            }
        } else {
            let units: Vec<&Unit<W>> = self.left().collect();
            let steps = Due::new(&units, shards, |work| pipeline.shard_of(work)).steps(0, &units);
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

    /// The units of groups that no earlier run finished.
    fn left(&self) -> impl Iterator<Item = &Unit<W>> {
        self.units.iter().filter(|u| !self.sink.resumed.contains_key(&u.group))
    }

    /// The units that are left, by group. A group is every group of the output: one that calibration alone writes has no
    /// units, and its end is to be noted all the same.
    fn groups(&self) -> BTreeMap<usize, Vec<&Unit<W>>> {
        let mut groups: BTreeMap<usize, Vec<&Unit<W>>> = self.sink.groups_left().map(|g| (g, Vec::new())).collect();
        self.left().for_each(|unit| groups.entry(unit.group).or_default().push(unit));
        groups
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
                let partial = self.sink.partial().display().to_string();
                if error.is_transient() {
                    resources.progress.note(&format!("unfinished output stays in {partial}; the same command resumes"));
                } else if let Err(second) = self.sink.discard() {
                    resources.progress.note(&format!("unfinished output stays in {partial}, for {second}"));
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
    steps: &[Step<Do<&P::Work>>],
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
            Do::Hash(shard) => {
                hashes.compute(source, *shard);
                Ok(None)
            }
            Do::Work(work) => {
                let found = pipeline.work(work, scratch, sink);
                // Nothing that was made of zeros where the source was cut off may be journaled; and where a unit failed, a
                // source that changed is why.
                let lost = map::intact();
                if lost.is_err() || found.is_err() {
                    source.unchanged()?;
                }
                lost.and(found).map(Some)
            }
        },
        |group, found: Vec<Option<P::Found>>| close(pipeline, group, found.into_iter().flatten().collect(), closed),
    )
}

/// A group's result, noted in `closed`, as the journal keeps it.
fn close<P: Pipeline>(
    pipeline: &P,
    group: usize,
    found: Vec<P::Found>,
    closed: &Mutex<BTreeMap<usize, Value>>,
) -> Value {
    let value = serde_json::to_value(pipeline.close(group, found)).expect("plain data serializes");
    closed.lock().expect("no thread panics while it holds this").insert(group, value.clone());
    value
}

/// Source shards that are to be hashed, by the number of the unit after which that is due: the last one that reads the shard.
/// Its pages are in memory then, and the output, whose hash takes longest, is not kept waiting. A shard that no unit reads
/// is due before the first.
struct Due(BTreeMap<usize, Vec<usize>>);

impl Due {
    fn new<W>(units: &[&Unit<W>], shards: usize, reads: impl Fn(&W) -> Option<usize>) -> Self {
        let mut last = vec![0; shards];
        for (i, unit) in units.iter().enumerate() {
            if let Some(shard) = reads(&unit.work) {
                last[shard] = i + 1;
            }
        }
        let mut due: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        last.into_iter().enumerate().for_each(|(shard, at)| due.entry(at).or_default().push(shard));
        Self(due)
    }

    /// `units`, the first of which is number `first` of all, with the hashes that are due among them. Hashes belong to no
    /// group, so it does not matter to a group where they stand.
    fn steps<'w, W>(&mut self, first: usize, units: &[&'w Unit<W>]) -> Vec<Step<Do<&'w W>>> {
        let mut steps = Vec::with_capacity(units.len());
        let mut hash = |at: usize, steps: &mut Vec<_>| {
            let shards = self.0.remove(&at).unwrap_or_default().into_iter();
            steps.extend(shards.map(|shard| Step { group: None, bytes: 0, work: Do::Hash(shard) }));
        };
        hash(first, &mut steps);
        for (i, unit) in units.iter().enumerate() {
            steps.push(Step { group: Some(unit.group), bytes: unit.bytes, work: Do::Work(&unit.work) });
            hash(first + i + 1, &mut steps);
        }
        steps
    }
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
        for name in source.small_files() {
            files.push(digest::record(&source.dir, name)?);
        }
        files.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(FileSet::new(layout_name(source), files))
    }
}

/// What makes two runs the same job: version, recipe, calibration text, planned layout, and the source's files as the system dates them.
pub(super) fn fingerprint(job: &Job, text: &str, layout: &str, source: &Checkpoint) -> String {
    let files: Vec<_> = source.stamps().map(|(name, stamp)| (name, stamp.dated())).collect();
    let all = serde_json::json!([env!("CARGO_PKG_VERSION"), NUMERICS, job, text, layout, files]);
    digest::sha256(all.to_string().as_bytes())
}
