//! The plan and the calibrated pipeline: groups come in order, each layer is calibrated first, then its other tensors are
//! written, then it is journaled.

use std::collections::BTreeMap;
use std::sync::Mutex;

use super::store::Values;
use super::{Plan, Role, Scratch, Work};
use crate::algorithms::Algorithm;
use crate::calibrate::{Calibrator, LayerReport, Output, Room, Rounded, Saved, check_memory};
use crate::checkpoint::destination::{check_free, check_offload, check_room};
use crate::checkpoint::sink::Sink;
use crate::checkpoint::source::Checkpoint;
use crate::checkpoint::{digest, map};
use crate::device::cpu::Cpu;
use crate::error::{Error, Result};
use crate::formats::activations::Activations;
use crate::model::{Class, Linear, Model, Proj};
use crate::pipeline::progress::Unit;
use crate::pipeline::task::{Done, GroupResult, Opened, Pipeline, Task};
use crate::pipeline::{Paths, Resources};
use crate::recipe::Treatment;
use crate::text::Text;
use crate::text::windows::Sequence;

/// A hash of the ids that go through the model.
pub(super) fn hash_of(sequences: &[Sequence]) -> String {
    let mut bytes = Vec::new();
    for s in sequences {
        bytes.extend((s.real as u64).to_le_bytes());
        bytes.extend(s.ids[..s.real].iter().flat_map(|id| id.to_le_bytes()));
    }
    digest::sha256(&bytes)
}

/// Runs a plan whose recipe looks at a text.
pub(super) fn run(plan: &Plan, task: Task<Work>, paths: &Paths, resources: &Resources, text: &Text) -> Result<Done> {
    let model = Model::open_padded(&paths.src, plan.padding)?;
    crate::evaluate::fits(&model, &model, &text.sequences)?;
    let device = Cpu::new(resources.threads)?;
    check_memory(resources.max_memory, &model.config)?;
    if let Some(offload) = &resources.offload {
        check_offload(&paths.src, offload)?;
    }
    let tokens = text.sequences.iter().map(|s| s.real as u64).sum();
    if resources.offload.is_none() {
        // Hidden states lie beside the output then, so both have to fit, and nothing is made where they do not.
        let room = Room {
            memory: resources.max_memory,
            offload: &paths.dst,
            offload_hessians: resources.offload_hessians,
            progress: &resources.progress,
        };
        check_room(&paths.dst, task.layout.total_bytes() + room.offloaded(&model, tokens))?;
    }
    let mut opened = Opened::new(task, paths, resources)?;
    let offload = resources.offload.clone().unwrap_or_else(|| opened.sink.partial().to_path_buf());
    let saved = Saved::new(&offload, opened.sink.partial(), &opened.fingerprint);
    let room = Room {
        memory: resources.max_memory,
        offload: &offload,
        offload_hessians: resources.offload_hessians,
        progress: &resources.progress,
    };
    let room_enough = check_free(&offload, room.offloaded(&model, tokens), saved.taken());
    let calibrator = || Calibrator::new(&device, &model, &plan.recipe, &text.sequences, room);
    let begun = room_enough.and_then(|()| calibrator()).and_then(|mut calibrator| {
        let Some(layer) = needed_states(plan, &opened.sink) else { return Ok((calibrator, None)) };
        if calibrator.restore(|states| saved.load(layer, states))? {
            return Ok((calibrator, Some(layer)));
        }
        // Where they were to be beside the output nobody can have forgotten to say where they are: they are lost.
        if resources.offload.is_some() && !paths.force {
            return Err(saved.gone(layer));
        }
        resources.progress.note("the interrupted run's hidden states are not there as it kept them: starting over");
        opened.sink.start_over()?;
        Ok((calibrator, None))
    });
    let jobs = plan.jobs.iter().enumerate().map(|(i, j)| (j.linear, i)).collect();
    let taker = Taker { plan, sink: &opened.sink, jobs };
    let outcome = begun.and_then(|(calibrator, at)| {
        let left = model.config.layers.saturating_sub(opened.sink.resumed.len().saturating_sub(1));
        resources.progress.start_counting("calibrate", calibrator.work_a_layer() * left as u64, Unit::Work);
        let state = Mutex::new(State { calibrator, at, reports: BTreeMap::new() });
        let run = Calibrated { plan, taker: &taker, saved: &saved, source: &model.checkpoint, state };
        opened.work(&run, resources)
    });
    let kept = matches!(&outcome, Err(e) if e.is_transient());
    let removed = if kept { Ok(()) } else { saved.remove() };
    // What ended the run is told before what could not be cleaned up behind it.
    let done = opened.end(outcome, resources)?;
    removed.map(|()| done)
}

/// The layer whose hidden states a run needs to go on: the first one that is left, where that is not the first of all.
fn needed_states(plan: &Plan, sink: &Sink) -> Option<usize> {
    let layer = sink.groups_left().min()?.checked_sub(1).filter(|&l| l > 0)?;
    let head = layer == plan.config.layers;
    (!head || plan.treated.keys().any(|l| l.proj == Proj::LmHead)).then_some(layer)
}

/// Writes what calibration makes into the sink.
struct Taker<'p> {
    plan: &'p Plan<'p>,
    sink: &'p Sink,
    jobs: BTreeMap<Linear, usize>,
}

impl Output for Taker<'_> {
    fn treatment(&self, linear: &Linear) -> Option<&Treatment> {
        self.plan.treated.get(linear)
    }

    fn smooths(&self, layer: usize) -> (bool, bool) {
        (self.plan.smooths(layer, Class::Main), self.plan.smooths(layer, Class::Experts))
    }

    fn put(&self, linear: &Linear, first: usize, rounded: &Rounded) -> Result<()> {
        let job = &self.plan.jobs[self.jobs[linear]];
        let rows = first..first + rounded.values.len() / job.store.shape.1;
        let codes = rounded.codes.as_ref().filter(|_| job.store.takes_codes());
        let values = codes.map_or(Values::Numbers(&rounded.values), Values::Codes);
        job.store.write(rows, values, self.sink)?;
        self.sink.advance();
        Ok(())
    }

    fn put_plain(&self, name: &str, values: &[f32]) -> Result<()> {
        let (to, float) = self.plan.changed[name];
        let mut bytes = Vec::with_capacity(values.len() * float.size());
        values.iter().for_each(|&v| float.write(v, &mut bytes));
        self.sink.write(to, 0, &bytes)
    }
}

/// Where the calibration stands.
struct State<'m> {
    calibrator: Calibrator<'m>,
    /// The layer that the hidden states are in front of.
    at: Option<usize>,
    reports: BTreeMap<usize, LayerReport>,
}

struct Calibrated<'p, 'm> {
    plan: &'p Plan<'p>,
    taker: &'p Taker<'p>,
    saved: &'p Saved,
    /// The source as the calibration has it open.
    source: &'p Checkpoint,
    state: Mutex<State<'m>>,
}

impl<'p> Pipeline for Calibrated<'p, '_> {
    type Work = Work<'p>;
    type Scratch = Scratch;
    type Found = <Plan<'p> as Pipeline>::Found;

    fn shard_of(&self, work: &Work) -> Option<usize> {
        self.plan.shard_of(work)
    }

    fn work(&self, work: &Work<'p>, scratch: &mut Scratch, sink: &Sink) -> Result<Self::Found> {
        self.plan.work(work, scratch, sink)
    }

    fn before(&self, group: usize) -> Result<()> {
        let layers = self.plan.config.layers;
        let mut state = self.state.lock().expect("groups come one after the other");
        let Some(layer) = group.checked_sub(1) else { return Ok(()) };
        let head = layer == layers;
        if head && self.plan.treated.keys().all(|l| l.proj != Proj::LmHead) {
            return Ok(());
        }
        match state.at {
            Some(at) => assert_eq!(at, layer, "layers come one after the other"),
            None if layer == 0 => state.calibrator.embed()?,
            None => return Err(Error::Fault(format!("layer {layer} comes first, and nobody has its hidden states"))),
        }
        let made = if head { state.calibrator.head(self.taker) } else { state.calibrator.layer(layer, self.taker) };
        // The calibration reads the source through maps of its own. What it made of a source that changed meanwhile may not
        // be journaled, and where it failed, the change is why.
        self.source.unchanged()?;
        map::intact()?;
        let report = made?;
        if !head && state.calibrator.is_read(layer, self.taker) {
            self.saved.save(layer + 1, state.calibrator.states())?;
        }
        state.at = Some(layer + 1);
        state.reports.insert(group, report);
        Ok(())
    }

    fn close(&self, group: usize, found: Vec<Self::Found>) -> GroupResult {
        let report = self.state.lock().expect("groups come one after the other").reports.remove(&group);
        let report = report.unwrap_or_default();
        let measured = report.errors.iter().map(|(linear, sums)| (self.taker.jobs[linear], *sums));
        let mut result = self.plan.result(group, found.into_iter().flatten().chain(measured));
        result.coverage = report.coverage.into_iter().collect();
        result.notes.extend(report.notes);
        result
    }
}

impl Plan<'_> {
    /// True where calibration brings the weight of `linear`.
    pub(super) fn calibrates(&self, linear: &Linear) -> bool {
        self.calibrated && linear.proj != Proj::Embed && self.treated.contains_key(linear)
    }

    /// True where a tensor that stays for all others is changed by a transform.
    pub(super) fn is_changed(&self, name: &str, role: &Role) -> bool {
        let layer =
            || name.strip_prefix("model.layers.").and_then(|r| r.split('.').next()).and_then(|l| l.parse().ok());
        match (role, layer()) {
            (Role::Plain, Some(l)) if name.ends_with(".input_layernorm.weight") => self.smooths(l, Class::Main),
            (Role::Plain, Some(l)) if name.ends_with(".post_attention_layernorm.weight") => {
                self.smooths(l, Class::Experts)
            }
            (Role::Weight(linear), _) if linear.proj == Proj::Router => self.smooths(linear.layer, Class::Experts),
            _ => false,
        }
    }

    /// True where scales go into the norm in front of a layer's attention ([`Class::Main`]) or experts: all that read it are
    /// rounded, and either by AWQ or under SmoothQuant.
    pub(super) fn smooths(&self, layer: usize, class: Class) -> bool {
        let readers = self.readers(layer, class);
        let all_rounded = readers.iter().all(|l| self.rounded(l).is_some());
        readers.iter().all(|l| self.is_awq(l)) || (all_rounded && readers.iter().any(|l| self.wants_smoothing(l)))
    }

    /// Layers where a transform is asked for and cannot be, with the class and the transform.
    pub(super) fn not_smoothed(&self) -> Vec<String> {
        let mut notes = Vec::new();
        for (class, who, norm) in [
            (Class::Main, "q, k and v", "input_layernorm"),
            (Class::Experts, "gate and up of every expert", "post_attention_layernorm"),
        ] {
            for (transform, all, wants) in [
                ("AWQ", "rounded by it", Self::is_awq as fn(&Self, &Linear) -> bool),
                ("SmoothQuant", "rounded", Self::wants_smoothing),
            ] {
                let missed = |layer: &usize| {
                    !self.smooths(*layer, class) && self.readers(*layer, class).iter().any(|l| wants(self, l))
                };
                let layers: Vec<String> = (0..self.config.layers).filter(missed).map(|l| l.to_string()).collect();
                if !layers.is_empty() {
                    notes.push(format!(
                        "{transform} moves no scales into {norm} of layers {}: not all that read it ({who}) are {all}",
                        layers.join(", ")
                    ));
                }
            }
        }
        notes
    }

    /// What reads the norm in front of a layer's attention or experts, but for the router.
    fn readers(&self, layer: usize, class: Class) -> Vec<Linear> {
        match class {
            Class::Main => [Proj::Q, Proj::K, Proj::V].map(|proj| Linear { proj, layer, expert: 0 }).to_vec(),
            Class::Experts => (0..self.config.experts)
                .flat_map(|expert| [Proj::Gate, Proj::Up].map(|proj| Linear { proj, layer, expert }))
                .collect(),
        }
    }

    fn rounded(&self, linear: &Linear) -> Option<&Treatment> {
        self.treated.get(linear).filter(|t| t.scheme.is_some())
    }

    fn is_awq(&self, linear: &Linear) -> bool {
        self.rounded(linear).is_some_and(|t| t.layer.algorithm == Algorithm::Awq)
    }

    /// Whether SmoothQuant is asked for, and something gained by it: the range of inputs that nobody rounds is nobody's
    /// trouble.
    fn wants_smoothing(&self, linear: &Linear) -> bool {
        let scheme = self.rounded(linear).and_then(|t| t.scheme);
        self.recipe.smoothquant.is_some() && scheme.is_some_and(|s| s.activations != Activations::Float)
    }
}
