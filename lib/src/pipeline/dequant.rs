//! Any container -> plain BF16 or FP16 in the layout that transformers loads.

use std::ops::Range;

use safetensors::Dtype;
use serde_json::Value;

use super::executor::Unit;
use super::task::{self, GroupResult, Pipeline, Task};
use super::{Paths, Resources, copy, half_range, refuse_what_would_be_lost, seal, side_files, source_notes};
use crate::checkpoint::header::TensorSpec;
use crate::checkpoint::layout::{Layout, Planned};
use crate::checkpoint::sink::{Order, Sink};
use crate::checkpoint::source::{Checkpoint, TensorRef};
use crate::containers::dense::float_of;
use crate::containers::openai::Experts;
use crate::containers::{self, Weight};
use crate::error::{Error, Result};
use crate::formats::float::Float;
use crate::formats::ggml::Ggml;
use crate::formats::mxfp4::{BLOCK, SCALE_NAN};
use crate::manifest::{Job, Manifest, TensorReport};
use crate::model::{self, Fused, Linear, ModelConfig, Role, Slot};
use crate::ops::dequantize::{HalfCounts, ScalesByGroup, transposed};
use crate::runtimes::{self, ExpertLayout, Facts, MainLayout};

/// Output bytes that the fast path makes at a time: about a core's second-level cache. Smaller chunks read each line of
/// the input more than once, larger ones leave the cache before they are written (lib/benches/dequantize.rs).
const CHUNK: usize = 1152 << 10;
/// Rows that the general path reads at a time.
const ROWS: usize = 64;

/// The key of `config.json` that says how weights are stored.
const QUANTIZATION: &str = "quantization_config";

/// What to make.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// [`Float::Bf16`] or [`Float::F16`].
    pub dtype: Float,
    /// Most bytes of data in a shard.
    pub shard_size: u64,
}

/// A unit of work; `to` is the output tensor's number.
pub(super) enum Work<'a> {
    /// Pass a byte range on.
    Copy { to: usize, tensor: TensorRef<'a>, from: Float, range: Range<usize> },
    /// Blocks of one expert through the fast path.
    Blocks { to: usize, slot: usize, expert: usize },
    /// A weight of one expert, or of a main layer, through [`containers::Rows`].
    Rows { to: usize, slot: usize, expert: usize },
}

/// A worker's buffers.
#[derive(Default)]
pub(super) struct Scratch {
    out: Vec<u16>,
    scales: ScalesByGroup,
}

/// A dequantization whose plan holds.
pub struct Plan<'a> {
    source: &'a Checkpoint,
    config: ModelConfig,
    options: Options,
    slots: Vec<Slot>,
    experts: Vec<Option<Experts<'a>>>,
    units: Vec<Unit<Work<'a>>>,
    tensors: Vec<Planned>,
    /// Whether every weight of the source is stored as floats.
    all_floats: bool,
}

impl<'a> Plan<'a> {
    /// Plans from the headers alone; every tensor that the config implies must be there with its type and shape.
    pub fn new(source: &'a Checkpoint, options: Options) -> Result<Self> {
        if options.dtype == Float::F32 {
            return Err(Error::Refused("the output is bf16 or fp16".into()));
        }
        let config = ModelConfig::parse(&source.dir, &source.config)?;
        let slots = model::slots(&config);
        let mut plan = Self {
            source,
            config,
            options,
            slots,
            experts: Vec::new(),
            units: Vec::new(),
            tensors: Vec::new(),
            all_floats: false,
        };
        for i in 0..plan.slots.len() {
            plan.slot(i)?;
        }
        plan.all_floats = plan.units.iter().all(|u| matches!(u.work, Work::Copy { .. }));
        plan.refuse_pointless()?;
        Ok(plan)
    }

    fn slot(&mut self, i: usize) -> Result<()> {
        let slot = self.slots[i].clone();
        let to = self.tensors.len();
        self.tensors.push(Planned {
            spec: TensorSpec::new(&slot.name, self.options.dtype.dtype(), slot.shape.clone()),
            group: slot.group,
        });
        let mut experts = None;
        if let Role::Experts(fused, layer) = slot.role {
            experts = Experts::open(self.source, &self.config, fused, layer)?;
        }
        let dense = self.source.get(&slot.name);
        match (slot.role, &experts, dense) {
            (Role::Experts(fused, _), Some(_), _) => self.blocks(i, to, fused),
            (_, _, Some(tensor)) if Float::of(tensor.info.dtype).is_some() => {
                self.copies(slot.group, to, tensor, &slot.shape)?
            }
            (Role::Experts(fused, layer), None, None) => self.rows(i, to, fused, layer)?,
            (Role::Weight(linear), _, _) => {
                containers::open(self.source, &self.config, &linear)?;
                let bytes = slot.shape.iter().product::<usize>() * 2;
                self.units.push(Unit {
                    group: slot.group,
                    bytes: bytes as u64,
                    work: Work::Rows { to, slot: i, expert: 0 },
                });
            }
            (Role::ExpertBias(fused, layer), _, None) => {
                containers::expert_biases(self.source, &self.config, fused, layer)?;
                let work = Work::Rows { to, slot: i, expert: 0 };
                self.units.push(Unit { group: slot.group, bytes: 0, work });
            }
            (_, _, _) => drop(self.source.tensor(&slot.name)?.expect(&containers::dense::FLOATS, &slot.shape)?),
        }
        self.experts.push(experts);
        Ok(())
    }

    fn copies(&mut self, group: usize, to: usize, tensor: TensorRef<'a>, shape: &[usize]) -> Result<()> {
        tensor.expect(&containers::dense::FLOATS, shape)?;
        let from = float_of(&tensor)?;
        for range in copy::pieces(tensor.bytes.len(), from.size()) {
            let bytes = (range.len() / from.size() * 2) as u64;
            self.units.push(Unit { group, bytes, work: Work::Copy { to, tensor, from, range } });
        }
        Ok(())
    }

    fn blocks(&mut self, slot: usize, to: usize, fused: Fused) {
        let (out, inp) = fused.shape(&self.config);
        let (group, bytes) = (self.slots[slot].group, (out * inp * 2) as u64);
        for expert in 0..self.config.experts {
            self.units.push(Unit { group, bytes, work: Work::Blocks { to, slot, expert } });
        }
    }

    fn rows(&mut self, slot: usize, to: usize, fused: Fused, layer: usize) -> Result<()> {
        let (out, inp) = fused.shape(&self.config);
        for expert in 0..self.config.experts {
            for &(proj, _, _) in fused.parts() {
                let weight = containers::open(self.source, &self.config, &Linear { proj, layer, expert });
                weight.map_err(|e| name_the_fused(e, fused, layer))?;
            }
            let (group, bytes) = (self.slots[slot].group, (out * inp * 2) as u64);
            self.units.push(Unit { group, bytes, work: Work::Rows { to, slot, expert } });
        }
        Ok(())
    }

    /// A source that is already what was asked for.
    fn refuse_pointless(&self) -> Result<()> {
        let same = |u: &Unit<Work>| match &u.work {
            Work::Copy { from, .. } => *from == self.options.dtype,
            _ => false,
        };
        if self.units.iter().all(same) && !self.source.config.contains_key(QUANTIZATION) {
            let (dir, dtype) = (self.source.dir.display(), self.options.dtype.config_name());
            return Err(Error::Refused(format!("{dir} is plain {dtype} already: there is nothing to dequantize")));
        }
        Ok(())
    }

    /// Working memory of one worker.
    fn scratch_bytes(&self) -> u64 {
        let general = self.units.iter().filter_map(|u| match u.work {
            Work::Rows { .. } => Some(u.bytes),
            _ => None,
        });
        let (out, inp) = Fused::GateUp.shape(&self.config);
        let rows = (ROWS * inp.max(out) * 8) as u64;
        general.max().map_or(0, |b| b + rows) + (CHUNK.max(out * BLOCK * 2) + copy::PIECE * 3) as u64
    }

    /// Does it. The manifest's `volatile` part is left to the caller, who is told how many groups were there already.
    pub fn run(mut self, paths: &Paths, resources: &Resources) -> Result<(Manifest, usize)> {
        let job = Job::Dequantize { dtype: self.options.dtype, shard_size: self.options.shard_size };
        let task = Task {
            verb: "dequantize",
            source: self.source,
            job: &job,
            text: "",
            scratch_bytes: self.scratch_bytes(),
            order: Order::Any,
            layout: Layout::new(std::mem::take(&mut self.tensors), self.options.shard_size),
            units: std::mem::take(&mut self.units),
        };
        refuse_what_would_be_lost(self.source, &self.config, paths.drop_unknown)?;
        let done = task::run(&self, task, paths, resources)?;
        let mut manifest = self.manifest(job, &done.groups, done.source)?;
        if self.options.dtype == Float::F16 {
            manifest.notes.extend(half_range(self.source, resources)?);
        }
        let files = side_files(self.source, &self.output_config())?;
        done.sink.finish(files, |files| Ok(seal(&mut manifest, layout_word(self.options.dtype), files)))?;
        Ok((manifest, done.resumed))
    }

    /// One expert's blocks, a chunk of columns at a time: each is written, and hashed, while it is in the cache.
    fn fast(
        &self,
        to: usize,
        experts: &Experts,
        expert: usize,
        scratch: &mut Scratch,
        sink: &Sink,
    ) -> Result<HalfCounts> {
        let blocks = experts.expert(expert);
        let column = blocks.rows * 2;
        let step = (CHUNK / (BLOCK * column)).max(1);
        let mut counts = HalfCounts::default();
        scratch.scales.fill(blocks);
        for first in (0..blocks.groups).step_by(step) {
            let groups = first..blocks.groups.min(first + step);
            scratch.out.resize(groups.len() * BLOCK * blocks.rows, 0);
            counts += transposed(blocks, &scratch.scales, groups, self.options.dtype, &mut scratch.out);
            if counts.nans > 0 {
                let n = blocks.scales.len();
                let at = blocks.scales.iter().position(|&b| b == SCALE_NAN).expect("its NaN was just counted");
                return Err(copy::nan_scale(&experts.scales, expert * n + at));
            }
            sink.write(to, (expert * blocks.groups + first) * BLOCK * column, as_bytes(&scratch.out))?;
            sink.advance();
        }
        Ok(counts)
    }

    /// Any other container: values row by row, transposed here.
    fn general(
        &self,
        to: usize,
        slot: &Slot,
        expert: usize,
        scratch: &mut Vec<u16>,
        sink: &Sink,
    ) -> Result<HalfCounts> {
        let mut counts = HalfCounts::default();
        let mut put = |scratch: &mut [u16], at: usize, v: f32| {
            counts.add(copy::fate(v, self.options.dtype));
            scratch[at] = half_bits(v, self.options.dtype);
        };
        let offset = match slot.role {
            Role::ExpertBias(fused, layer) => {
                let all = containers::expert_biases(self.source, &self.config, fused, layer)?;
                scratch.resize(all.len(), 0);
                all.iter().enumerate().for_each(|(i, &v)| put(scratch, i, v));
                0
            }
            Role::Experts(fused, layer) => {
                let (out, inp) = fused.shape(&self.config);
                scratch.resize(out * inp, 0);
                for &(proj, first, step) in fused.parts() {
                    let weight = containers::open(self.source, &self.config, &Linear { proj, layer, expert })?;
                    for_rows(&weight, |o, row| {
                        row.iter().enumerate().for_each(|(i, &v)| put(scratch, i * out + first + o * step, v))
                    });
                }
                expert * out * inp * 2
            }
            Role::Weight(linear) => {
                let weight = containers::open(self.source, &self.config, &linear)?;
                let (out, inp) = weight.shape();
                scratch.resize(out * inp, 0);
                for_rows(&weight, |o, row| row.iter().enumerate().for_each(|(i, &v)| put(scratch, o * inp + i, v)));
                0
            }
            Role::Plain => unreachable!("a plain tensor is copied"),
        };
        if counts.nans > 0 {
            return Err(self.not_finite(slot, expert));
        }
        sink.write(to, offset, as_bytes(scratch))?;
        Ok(counts)
    }

    /// The error for a weight whose stored form stands for NaN or infinity.
    fn not_finite(&self, slot: &Slot, expert: usize) -> Error {
        let modules: Vec<String> = match slot.role {
            Role::Weight(linear) => vec![linear.module()],
            Role::Experts(fused, layer) | Role::ExpertBias(fused, layer) => {
                fused.parts().iter().map(|&(proj, _, _)| Linear { proj, layer, expert }.module()).collect()
            }
            Role::Plain => Vec::new(),
        };
        let bad = |tensor: &TensorRef| float_of(tensor).is_ok_and(|f| f.first_non_finite(tensor.bytes).is_some());
        let names = modules.iter().flat_map(|m| ["weight_scale", "weight", "bias"].map(|t| format!("{m}.{t}")));
        let found: Vec<String> = names.chain([slot.name.clone()]).collect();
        let reason = "holds NaN or infinity; the checkpoint is damaged";
        match found.iter().filter_map(|n| self.source.get(n)).find(bad) {
            Some(tensor) => tensor.error(reason),
            None => Error::tensor(&self.source.dir, &slot.name, reason),
        }
    }

    fn output_config(&self) -> serde_json::Map<String, Value> {
        let mut config = self.source.config.clone();
        config.shift_remove(QUANTIZATION);
        config.shift_remove(crate::containers::openai::KEPT);
        let dtype = Value::from(self.options.dtype.config_name());
        // Older configs spell it torch_dtype; one that is there must not contradict.
        if let Some(old) = config.get_mut("torch_dtype") {
            *old = dtype.clone();
        }
        config.insert("dtype".into(), dtype);
        config
    }

    fn manifest(&self, job: Job, groups: &[GroupResult], source: crate::manifest::FileSet) -> Result<Manifest> {
        let mut manifest = Manifest::new("gptoss-dequant", job);
        manifest.source = Some(source);
        let mut conversion = HalfCounts::default();
        groups.iter().for_each(|g| conversion += g.conversion);
        manifest.conversion = Some(conversion);
        manifest.runtimes = match self.options.dtype.dtype() {
            Dtype::BF16 | Dtype::F16 => runtimes::report(&Facts {
                experts: ExpertLayout::Dense,
                main: MainLayout::Dense,
                formats: Vec::new(),
                features: Default::default(),
                groups: Vec::new(),
                hidden: self.config.hidden,
                eps: runtimes::eps(&self.source.config),
            }),
            _ => Vec::new(),
        };
        manifest.tensors = self
            .slots
            .iter()
            .map(|s| TensorReport {
                name: s.name.clone(),
                tensors: 1,
                parameters: s.shape.iter().product::<usize>() as u64,
                stored: self.options.dtype.config_name().into(),
                error: None,
            })
            .collect();
        manifest.notes = source_notes(self.source, &self.config)?;
        let foreign = crate::containers::foreign_tensors(self.source, &self.config);
        let read = || self.source.names().filter(|n| !foreign.contains(n)).filter_map(|n| self.source.get(n));
        let to = self.options.dtype;
        let coded = |t: &TensorRef| t.info.blocks.is_some_and(|b| b != Ggml::Mxfp4);
        for (found, what) in [
            (to != Float::F32 && read().any(|t| t.info.dtype == Dtype::F32), "F32 numbers"),
            (to == Float::Bf16 && read().any(|t| t.info.dtype == Dtype::F16), "F16 numbers"),
            (read().any(|t| coded(&t)), "scales in F16"),
        ] {
            if found {
                manifest.notes.push(format!("the source has {what}: they were rounded to {}", to.config_name()));
            }
        }
        if self.source.config.contains_key(QUANTIZATION) && self.all_floats {
            manifest.notes.push(format!(
                "config.json's {QUANTIZATION} announces weights that are not there, all are floats: the output goes without it"
            ));
        }
        if conversion.overflows > 0 {
            let n = conversion.overflows;
            manifest.notes.push(format!(
                "{n} weights are too large for {} and became infinite",
                self.options.dtype.config_name()
            ));
        }
        Ok(manifest)
    }
}

impl<'a> Pipeline for Plan<'a> {
    type Work = Work<'a>;
    type Scratch = Scratch;
    type Found = HalfCounts;

    /// The general path may read several shards, and names none.
    fn shard_of(&self, work: &Work) -> Option<usize> {
        match work {
            Work::Copy { tensor, .. } => Some(tensor.shard),
            Work::Blocks { slot, .. } => self.experts[*slot].as_ref().map(|e| e.blocks.shard),
            Work::Rows { .. } => None,
        }
    }

    fn work(&self, work: &Work<'a>, scratch: &mut Scratch, sink: &Sink) -> Result<HalfCounts> {
        match work {
            Work::Copy { to, tensor, from, range } => {
                copy::convert(sink, *to, tensor, range, *from, self.options.dtype)
            }
            Work::Blocks { to, slot, expert } => {
                let experts = self.experts[*slot].as_ref().expect("planned from its blocks");
                self.fast(*to, experts, *expert, scratch, sink)
            }
            Work::Rows { to, slot, expert } => self.general(*to, &self.slots[*slot], *expert, &mut scratch.out, sink),
        }
    }

    fn close(&self, _group: usize, found: Vec<HalfCounts>) -> GroupResult {
        let mut conversion = HalfCounts::default();
        found.into_iter().for_each(|c| conversion += c);
        GroupResult { tensors: Vec::new(), conversion, ..GroupResult::default() }
    }
}

fn layout_word(dtype: Float) -> String {
    if dtype == Float::F16 { "fp16".into() } else { "bf16".into() }
}

/// An expert that no container has is missing under the name that its readers know.
fn name_the_fused(error: Error, fused: Fused, layer: usize) -> Error {
    match error {
        Error::MissingTensor { dir, tensor, .. } => {
            let base = fused.name(layer);
            let reason = format!("config.json implies it, and neither {base}_blocks nor {tensor} is there");
            Error::MissingTensor { dir, tensor: base, reason }
        }
        other => other,
    }
}

fn for_rows(weight: &Weight, mut each: impl FnMut(usize, &[f32])) {
    let (out, inp) = weight.shape();
    let mut rows = vec![0f32; ROWS * inp];
    for start in (0..out).step_by(ROWS) {
        let end = out.min(start + ROWS);
        weight.read_rows(start..end, &mut rows[..(end - start) * inp]);
        rows.chunks_exact(inp).take(end - start).enumerate().for_each(|(i, row)| each(start + i, row));
    }
}

fn half_bits(v: f32, to: Float) -> u16 {
    if to == Float::F16 { half::f16::from_f32(v).to_bits() } else { half::bf16::from_f32(v).to_bits() }
}

/// The little-endian bytes of 16-bit floats.
fn as_bytes(numbers: &[u16]) -> &[u8] {
    const { assert!(cfg!(target_endian = "little"), "checkpoints are little-endian, and so must be the machine") };
    // SAFETY: u16 has no padding and u8 no alignment; the length is in bytes.
    unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), std::mem::size_of_val(numbers)) }
}
