//! A recipe over a checkpoint -> a quantized one, in any of the containers. The plan is made from the config (and the headers,
//! where weights are there), so that whatever cannot work fails before any data is read.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::OnceLock;

use safetensors::Dtype;
use serde_json::{Map, Value};

pub mod budget;
mod calibrated;
mod gguf;
mod linears;
mod output;
mod plain;
mod store;
pub mod target;
mod treat;

use super::executor::Unit;
use super::task::{self, GroupResult, Pipeline, Task};
use super::{Paths, Resources, copy, half_range, refuse_what_would_be_lost, seal, side_files, source_notes};
use crate::algorithms::rtn::{Codes, ErrorSums, Target, rtn};
use crate::checkpoint::gguf as gguf_file;
use crate::checkpoint::header::TensorSpec;
use crate::checkpoint::layout::{Layout, Planned};
use crate::checkpoint::sink::{Order, Sink};
use crate::checkpoint::source::{Checkpoint, TensorRef};
use crate::containers::compressed_tensors::Scheme;
use crate::containers::dense::{FLOATS, float_of};
use crate::containers::{self, Weight, gguf as gguf_container};
use crate::error::{Error, Result};
use crate::formats::NumberFormat;
use crate::formats::float::Float;
use crate::manifest::{Job, Manifest, TensorReport};
use crate::model::padding::Padding;
use crate::model::{self, Fused, Linear, ModelConfig, Proj, Role, Slot};
use crate::ops::dequantize::Blocks;
use crate::ops::round;
use crate::recipe::{Container, Recipe, Treatment};
use crate::text::Text;
use crate::verify::errors::{relative, report};

use linears::Experts;
use store::{Store, Values};

/// Which biases have a tensor of their own: experts first, then projections.
#[derive(Debug, Clone, Copy)]
pub(super) struct Split {
    experts: bool,
    projections: bool,
}

/// A unit of work; `to` is the (first) output tensor's number, `job` that of a [`LinearJob`].
pub(super) enum Work<'a> {
    /// Pass a byte range on unchanged.
    Copy { to: usize, tensor: TensorRef<'a>, range: Range<usize> },
    /// Round rows of a linear layer.
    Quantize { job: usize, rows: Range<usize> },
    /// Write rows of a layer that gets no codes.
    Plain { job: usize, rows: Range<usize> },
    /// Pass a byte range on as another float.
    Convert { to: usize, tensor: TensorRef<'a>, range: Range<usize>, float: Float },
    /// One projection of an expert that stays MXFP4, as ggml's blocks.
    Blocks { to: usize, blocks: Blocks<'a>, scales: TensorRef<'a>, expert: usize, proj: Proj },
    /// The biases of all experts of a layer, in tensors from `to` on.
    Biases { to: usize, fused: Fused, layer: usize, float: Float, split: Split },
    /// A norm's weight or a bias.
    Vector { to: usize, name: String },
    /// Rows of a linear layer whose codes stay what they are.
    Keep { job: usize, rows: Range<usize> },
}

/// One linear layer that is opened and rewritten.
struct LinearJob<'a> {
    linear: Linear,
    weight: Option<Weight<'a>>,
    float: Float,
    scheme: Option<Scheme>,
    /// Whether the source's codes go where codes go.
    kept: bool,
    /// Least and greatest weight, once somebody asked.
    extremes: OnceLock<(f32, f32)>,
    store: Store,
}

/// A quantization whose plan holds.
pub struct Plan<'a> {
    source: Option<&'a Checkpoint>,
    raw_config: Map<String, Value>,
    config: ModelConfig,
    recipe: Recipe,
    mxfp4: bool,
    padding: Option<Padding>,
    jobs: Vec<LinearJob<'a>>,
    units: Vec<Unit<Work<'a>>>,
    tensors: Vec<Planned>,
    /// The same tensors as a GGUF file describes them, and its metadata; empty for others.
    described: Vec<gguf_file::Tensor>,
    metadata: Vec<(String, gguf_file::Value)>,
    /// What becomes of each linear layer that does not stay.
    treated: BTreeMap<Linear, Treatment>,
    /// How each layer's experts are written.
    experts: Vec<Experts>,
    /// Modules that are not.
    unquantized: Vec<String>,
    /// Whether a text goes through the model.
    calibrated: bool,
    /// Tensors that a transform changes, with their numbers and types.
    changed: BTreeMap<String, (usize, Float)>,
    /// What is reported of tensors that stay, by group.
    stays: Vec<(usize, TensorReport)>,
}

impl<'a> Plan<'a> {
    /// Plans `recipe` over the checkpoint, or, where `source` is `None`, over the config alone.
    ///
    /// # Errors
    /// [`Error::Refused`] where the recipe cannot work on these shapes; names the layer and what would work.
    pub fn new(
        dir: &Path,
        raw_config: &Map<String, Value>,
        recipe: Recipe,
        source: Option<&'a Checkpoint>,
    ) -> Result<Self> {
        let mut raw_config = raw_config.clone();
        let mut config = ModelConfig::parse(dir, &raw_config)?;
        // A source is padded by whoever opened it.
        let padding = match (source, recipe.pad_to) {
            (Some(source), _) => source.padding(),
            (None, Some(n)) => Padding::to_multiple(&config, n)?,
            (None, None) => None,
        };
        if let Some(p) = padding.filter(|_| source.is_none()) {
            p.apply(&mut raw_config);
            config = ModelConfig::parse(dir, &raw_config)?;
        }
        let said = raw_config.get("quantization_config").filter(|q| !q.is_null());
        let method = said.map(|q| q["quant_method"].as_str().unwrap_or("?").to_owned());
        if source.is_some_and(Checkpoint::is_gguf) && !recipe.keep_codes {
            return Err(Error::Refused(format!(
                "{} is a GGUF file, which --keep-codes puts into another container; to quantize, give the checkpoint that it \
                 was made from",
                dir.display()
            )));
        }
        if let Some(m) = method.as_deref().filter(|&m| m != "mxfp4" && !recipe.keep_codes) {
            return Err(Error::Refused(format!(
                "{} is quantized already ({m}); give the checkpoint that it was made from",
                dir.display()
            )));
        }
        let mxfp4 = match source {
            Some(s) => s.get(&model::mxfp4_specs(Fused::GateUp, 0, &config)[0].name).is_some(),
            None => method.is_some(),
        };
        let mut plan = Self {
            source,
            raw_config,
            config,
            recipe,
            mxfp4,
            padding,
            jobs: Vec::new(),
            units: Vec::new(),
            tensors: Vec::new(),
            described: Vec::new(),
            metadata: Vec::new(),
            treated: BTreeMap::new(),
            experts: Vec::new(),
            unquantized: Vec::new(),
            calibrated: false,
            changed: BTreeMap::new(),
            stays: Vec::new(),
        };
        plan.treat()?;
        plan.calibrated = plan.recipe.needs_text();
        plan.experts = (0..plan.config.layers).map(|l| plan.experts_of(l)).collect();
        plan.check_container()?;
        if plan.is_gguf() {
            plan.metadata = plan.gguf_metadata(dir)?;
        }
        for slot in model::slots(&plan.config) {
            if plan.is_gguf() { plan.gguf_slot(&slot)? } else { plan.slot(&slot)? }
        }
        plan.tell_kept();
        Ok(plan)
    }

    /// Whether the output is a GGUF file.
    fn is_gguf(&self) -> bool {
        self.recipe.container == Container::Gguf
    }

    /// Where every byte of the output lies.
    fn layout(&self) -> Layout {
        match self.is_gguf() {
            true => self.gguf_layout(),
            false => Layout::new(self.tensors.clone(), self.recipe.shard_size),
        }
    }

    /// Whether [`Self::run`] needs a text.
    pub fn needs_text(&self) -> bool {
        self.calibrated
    }

    fn slot(&mut self, slot: &Slot) -> Result<()> {
        match slot.role {
            Role::Experts(fused, layer) if self.experts[layer] != Experts::Stay => self.experts(slot, fused, layer),
            Role::Experts(fused, layer) if self.mxfp4 => {
                let specs = model::mxfp4_specs(fused, layer, &self.config);
                self.stay(slot, "mxfp4");
                specs.into_iter().try_for_each(|spec| self.copy(slot.group, spec, &[Dtype::U8]))
            }
            Role::ExpertBias(fused, layer) if self.experts[layer] == Experts::Modules => {
                self.biases(slot, fused, layer)
            }
            Role::ExpertBias(fused, layer) if matches!(self.experts[layer], Experts::Vllm(_)) => {
                let Experts::Vllm(kind) = self.experts[layer] else { unreachable!("it was just looked at") };
                self.vllm_biases(slot, kind, fused, layer)
            }
            Role::ExpertBias(fused, layer) if self.is_padded() || !self.has(&slot.name) => {
                self.fused_biases(slot, fused, layer)
            }
            Role::Weight(linear) if self.treated.contains_key(&linear) => self.linear(slot.group, linear),
            Role::Weight(linear) if self.is_padded() && !self.is_changed(&slot.name, &slot.role) => {
                self.stay(slot, self.float_of(&slot.name)?.config_name());
                self.linear(slot.group, linear)
            }
            _ => {
                if let Role::Weight(linear) = slot.role {
                    self.unquantized.push(linear.module());
                }
                let float = self.float_of(&slot.name)?;
                self.stay(slot, float.config_name());
                if self.is_changed(&slot.name, &slot.role) {
                    let to = self.add(slot.group, TensorSpec::new(&slot.name, float.dtype(), slot.shape.clone()));
                    self.changed.insert(slot.name.clone(), (to, float));
                    return Ok(());
                }
                if self.is_padded() || self.is_converted(&slot.name, float)? {
                    let to = self.add(slot.group, TensorSpec::new(&slot.name, float.dtype(), slot.shape.clone()));
                    return self.vector(slot, to);
                }
                self.copy(slot.group, TensorSpec::new(&slot.name, float.dtype(), slot.shape.clone()), &FLOATS)
            }
        }
    }

    /// Whether the model becomes wider.
    fn is_padded(&self) -> bool {
        self.padding.is_some()
    }

    fn stay(&mut self, slot: &Slot, stored: &str) {
        let parameters = slot.shape.iter().product::<usize>() as u64;
        let report =
            TensorReport { name: slot.name.clone(), tensors: 1, parameters, stored: stored.into(), error: None };
        self.stays.push((slot.group, report));
    }

    fn add(&mut self, group: usize, spec: TensorSpec) -> usize {
        self.tensors.push(Planned { spec, group });
        self.tensors.len() - 1
    }

    fn copy(&mut self, group: usize, spec: TensorSpec, dtypes: &[Dtype]) -> Result<()> {
        let (name, shape) = (spec.name.clone(), spec.shape.clone());
        let to = self.add(group, spec);
        let Some(source) = self.source else { return Ok(()) };
        let tensor = source.tensor(&name)?;
        tensor.expect(dtypes, &shape)?;
        for range in copy::pieces(tensor.bytes.len(), 8) {
            self.units.push(Unit { group, bytes: range.len() as u64, work: Work::Copy { to, tensor, range } });
        }
        Ok(())
    }

    /// Bytes that the weight of a linear layer which stays takes in the output.
    fn kept_bytes(&self, linear: &Linear) -> u64 {
        let (rows, columns) = linear.shape(&self.config);
        let float = self.float_of(&format!("{}.weight", linear.module())).map_or(2, Float::size);
        (rows * columns * float) as u64
    }

    /// Working memory of one worker.
    fn scratch_bytes(&self) -> u64 {
        self.jobs.iter().map(|j| j.store.unit_bytes()).max().unwrap_or(copy::PIECE as u64)
    }

    /// Does it, with the calibration text that the recipe needs. The manifest's `volatile` part is left to the caller, who is
    /// told how many groups were there already.
    ///
    /// # Errors
    /// [`Error::Refused`] without weights, and without a text where the recipe needs one.
    pub fn run(mut self, paths: &Paths, resources: &Resources, text: Option<&Text>) -> Result<(Manifest, usize)> {
        let Some(source) = self.source else {
            return Err(Error::Refused(
                "there are no weights to quantize, only a config.json; --dry-run plans from that".into(),
            ));
        };
        let text = match (self.calibrated, text) {
            (true, None) => {
                return Err(Error::Refused(
                    "this recipe needs a calibration text: give --calib-jsonl FILE, or --algo rtn, which needs none where no scheme \
                     fixes the scale of its inputs (fp8_static does)"
                        .into(),
                ));
            }
            (true, text) => text,
            (false, _) => None,
        };
        let job = Job::Quantize { recipe: self.recipe.clone() };
        let task = Task {
            verb: "quantize",
            source,
            job: &job,
            text: &text.map_or(String::new(), |t| calibrated::hash_of(&t.sequences)),
            scratch_bytes: self.scratch_bytes(),
            order: if text.is_some() { Order::Ascending } else { Order::Any },
            layout: self.layout(),
            units: std::mem::take(&mut self.units),
        };
        refuse_what_would_be_lost(source, &self.config, paths.drop_unknown)?;
        let done = match text {
            None => task::run(&self, task, paths, resources)?,
            Some(text) => calibrated::run(&self, task, paths, resources, text)?,
        };
        let mut manifest = Manifest::new("gptoss-quant", job);
        manifest.source = Some(done.source);
        manifest.calibration = text.map(|t| t.report.clone());
        manifest.notes = source_notes(source, &self.config)?;
        manifest.notes.extend(text.iter().flat_map(|t| t.notes.clone()));
        for group in done.groups {
            manifest.tensors.extend(group.tensors);
            manifest.coverage.extend(group.coverage);
            manifest.notes.extend(group.notes);
        }
        self.say_what_matters(&mut manifest);
        let config = self.output_config();
        if !self.is_gguf() && config.get("dtype").is_some_and(|d| d == Float::F16.config_name()) {
            manifest.notes.extend(half_range(source, resources)?);
        }
        let files = side_files(source, &config)?;
        done.sink.finish(files, |files| Ok(seal(&mut manifest, self.layout_word(), files)))?;
        Ok((manifest, done.resumed))
    }

    /// Reads rows of a job's weight into the scratch; gives their width.
    fn read(&self, job: &LinearJob, rows: &Range<usize>, scratch: &mut Scratch) -> usize {
        let weight = job.weight.as_ref().expect("weights are there in a run");
        let columns = weight.shape().1;
        scratch.rows.resize(rows.len() * columns, 0.0);
        weight.read_rows(rows.clone(), &mut scratch.rows);
        columns
    }

    /// The least and the greatest weight, for schemes that ask for them. Workers that ask at once all read them.
    fn extremes(&self, job: &LinearJob, scheme: Scheme) -> Result<(f32, f32)> {
        let Some(source) = self.source.filter(|_| scheme.needs_extremes()) else { return Ok((0.0, 0.0)) };
        if let Some(found) = job.extremes.get() {
            return Ok(*found);
        }
        let fused = scheme.weights == NumberFormat::Nvfp4;
        let found = containers::extremes(source, &self.config, job.linear, fused, None)?;
        Ok(*job.extremes.get_or_init(|| found))
    }

    /// The error for the first NaN or infinity among rows that were just read, if there is one.
    fn not_finite(&self, job: &LinearJob, rows: &Range<usize>, scratch: &Scratch) -> Result<()> {
        let Some(at) = scratch.rows.iter().position(|v| !v.is_finite()) else { return Ok(()) };
        let columns = scratch.rows.len() / rows.len();
        let (row, column) = (rows.start + at / columns, at % columns);
        let module = job.linear.module();
        let reason = format!("{module} holds NaN or infinity at row {row}, column {column}; the checkpoint is damaged");
        Err(self.about(job, reason))
    }

    /// An error about the source's tensor that a job reads.
    fn about(&self, job: &LinearJob, reason: String) -> Error {
        match self.source_tensor(&job.linear) {
            Some(t) => t.error(reason),
            None => Error::Refused(reason),
        }
    }

    /// The source's tensor that holds a linear layer's weight.
    fn source_tensor(&self, linear: &Linear) -> Option<TensorRef<'a>> {
        let source = self.source?;
        let (module, own) = (linear.module(), gguf_container::module(linear));
        let mut names = vec![format!("{module}.weight"), format!("{module}.weight_packed"), format!("{own}.weight")];
        if let Some(fused) = linear.proj.fused() {
            let name = fused.name(linear.layer);
            names.extend([format!("{name}_blocks"), name]);
            if let Some(kind) = containers::vllm::kind_of(source, linear.layer) {
                names.push(kind.codes(fused, linear.layer, linear.expert));
            }
        }
        names.iter().find_map(|name| source.get(name))
    }

    /// Writes rows whose codes stay what they are.
    fn keep(&self, job: &LinearJob, rows: &Range<usize>, codes: &mut Codes, sink: &Sink) -> Result<()> {
        let weight = job.weight.as_ref().expect("weights are there in a run");
        weight.codes(rows.clone(), codes);
        if let Some(at) = codes.params.iter().position(|p| !p.scale.is_finite() || !p.zero_point.is_finite()) {
            let (module, row) = (job.linear.module(), rows.start + at * rows.len() / codes.params.len());
            return Err(self.about(job, format!("{module} has a scale that is NaN or infinite at row {row}")));
        }
        job.store.write(rows.clone(), Values::Codes(codes), sink)
    }
}

/// What `codes` stand for, f32 [rows, columns].
fn values_of(codes: &Codes, columns: usize, target: Target, values: &mut [f32]) {
    let rows = codes.codes.chunks_exact(columns).zip(codes.params.chunks_exact(target.groups(columns)));
    for ((codes, params), values) in rows.zip(values.chunks_exact_mut(columns)) {
        let groups = codes.chunks(target.group).zip(values.chunks_mut(target.group)).zip(params);
        for ((codes, values), p) in groups {
            let one = |(v, &c): (&mut f32, &i8)| *v = target.format.dequantize(c, *p, target.float);
            values.iter_mut().zip(codes).for_each(one);
        }
    }
}

impl<'a> Pipeline for Plan<'a> {
    type Work = Work<'a>;
    type Scratch = Scratch;
    type Found = Option<(usize, ErrorSums)>;

    fn shard_of(&self, work: &Work) -> Option<usize> {
        match work {
            Work::Copy { tensor, .. } | Work::Convert { tensor, .. } => Some(tensor.shard),
            Work::Blocks { scales, .. } => Some(scales.shard),
            Work::Vector { name, .. } => self.source?.get(name).map(|t| t.shard),
            Work::Biases { fused, layer, .. } => {
                let source = self.source?;
                // In other layouts they lie where the experts do.
                let one = Linear { proj: fused.parts()[0].0, layer: *layer, expert: 0 };
                let whole = source.get(&format!("{}_bias", fused.name(*layer)));
                whole.or_else(|| self.source_tensor(&one)).map(|t| t.shard)
            }
            Work::Quantize { job, .. } | Work::Plain { job, .. } | Work::Keep { job, .. } => {
                self.source_tensor(&self.jobs[*job].linear).map(|t| t.shard)
            }
        }
    }

    fn work(&self, work: &Work<'a>, scratch: &mut Scratch, sink: &Sink) -> Result<Self::Found> {
        match work {
            Work::Copy { to, tensor, range } => copy::copy(sink, *to, tensor, range)?,
            Work::Convert { to, tensor, range, float } => {
                copy::convert(sink, *to, tensor, range, float_of(tensor)?, *float)?;
            }
            Work::Blocks { to, blocks, scales, expert, proj } => {
                gguf::write_blocks(*to, (blocks, scales), *expert, *proj, sink)?;
            }
            Work::Biases { to, fused, layer, float, split } => {
                self.write_biases(*to, (*fused, *layer), *float, *split, sink)?;
            }
            Work::Vector { to, name } => self.write_vector(*to, name, sink)?,
            Work::Keep { job, rows } => self.keep(&self.jobs[*job], rows, &mut scratch.codes, sink)?,
            Work::Plain { job, rows } => {
                let job = &self.jobs[*job];
                self.read(job, rows, scratch);
                self.not_finite(job, rows, scratch)?;
                job.store.write(rows.clone(), Values::Numbers(&scratch.rows), sink)?;
            }
            Work::Quantize { job, rows } => {
                let number = *job;
                let job = &self.jobs[number];
                let columns = self.read(job, rows, scratch);
                let scheme = job.scheme.expect("planned for quantization");
                let target = scheme.target(columns, job.float, self.extremes(job, scheme)?);
                let observer = self.treated[&job.linear].layer.observer;
                let mut sums = rtn(&scratch.rows, columns, target, observer, &mut scratch.codes);
                // The squares of finite f32 are finite in f64, so the sum tells without another look at the weights.
                if !sums.squared_weight.iter().sum::<f64>().is_finite() {
                    self.not_finite(job, rows, scratch)?;
                }
                if !sums.squared_error.iter().sum::<f64>().is_finite() {
                    let (module, float) = (job.linear.module(), job.float.config_name());
                    return Err(self.about(job, format!("{module} spans more than {float} can scale; is it damaged?")));
                }
                if job.store.takes_codes() {
                    job.store.write(rows.clone(), Values::Codes(&scratch.codes), sink)?;
                } else if let NumberFormat::Half(half) = scheme.weights {
                    scratch.rows.iter_mut().for_each(|v| *v = half.round(*v));
                    job.store.write(rows.clone(), Values::Numbers(&scratch.rows), sink)?;
                } else {
                    let was = std::mem::take(&mut scratch.rows);
                    scratch.rows.resize(was.len(), 0.0);
                    values_of(&scratch.codes, columns, target, &mut scratch.rows);
                    // ggml's values are f32, and what is stored is not: the error is that of what is stored.
                    scratch.rows.iter_mut().for_each(|v| *v = job.store.float.round(*v));
                    sums = ErrorSums::default();
                    round::measure(&scratch.rows, &was, &mut sums);
                    job.store.write(rows.clone(), Values::Numbers(&scratch.rows), sink)?;
                }
                return Ok(Some((number, sums)));
            }
        }
        Ok(None)
    }

    /// Errors by family; they come in unit order, so the result is the same for any number of workers.
    fn close(&self, group: usize, found: Vec<Self::Found>) -> GroupResult {
        self.result(group, found.into_iter().flatten())
    }
}

impl Plan<'_> {
    /// A group's result, from what was measured of its jobs.
    fn result(&self, group: usize, found: impl Iterator<Item = (usize, ErrorSums)>) -> GroupResult {
        let mut jobs: BTreeMap<usize, ErrorSums> = BTreeMap::new();
        for (job, s) in found {
            jobs.entry(job).or_default().merge(&s);
        }
        let measured =
            jobs.iter().map(|(&job, sums)| (self.jobs[job].linear, output::stored_as(&self.jobs[job]), *sums));
        let lost: Vec<_> = jobs.iter().filter(|(_, sums)| relative(sums) > LOST).map(|(&job, _)| job).collect();
        let notes = lost.first().map(|&job| {
            let (module, more) = (self.jobs[job].linear.module(), lost.len() - 1);
            format!(
                "{module}{} lost its values (relative error above {LOST}): scales that the source's type cannot hold become \
                 zero; give a source in BF16 or F32",
                if more > 0 { format!(" and {more} more of its layer each") } else { String::new() }
            )
        });
        let mut tensors = report(measured);
        tensors.extend(self.stays.iter().filter(|s| s.0 == group).map(|s| s.1.clone()));
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        GroupResult { tensors, notes: notes.into_iter().collect(), ..GroupResult::default() }
    }
}

/// Relative error above which nothing of a weight is left. Ternary weights have 0.5.
const LOST: f64 = 0.99;

/// A worker's buffers.
#[derive(Default)]
pub(super) struct Scratch {
    rows: Vec<f32>,
    codes: Codes,
}
