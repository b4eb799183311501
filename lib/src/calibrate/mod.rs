//! The calibrated pipeline: a text goes through the model layer by layer; what the inputs of each linear layer look like says
//! how its weight is rounded, and then the text goes on through the rounded layer.
//!
//! Within a layer the order is that of the data: q, k and v; the output projection, whose inputs come from the rounded q, k,
//! v; then the experts, each on the tokens that it gets: gate and up, then down on what the rounded gate and up make. So
//! every layer is fitted to the inputs that it will see, and every token goes through it once. Nothing that is summed
//! depends on threads, batches or memory.

mod experts;
mod persist;
pub mod sensitivity;
mod smooth;
mod solve;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use rayon::prelude::*;

use crate::algorithms::rtn::ErrorSums;
use crate::containers::compressed_tensors::Scheme;
use crate::containers::{self, Rows, Weight};
use crate::device::cpu::{Cpu, Tensor};
use crate::device::{Device, Moments};
use crate::error::{Error, Result};
use crate::evaluate::batches::{Batch, batches, caches};
use crate::evaluate::{MOST_TOKENS, States, bytes_a_token, fits, layer_work};
use crate::formats::NumberFormat;
use crate::formats::activations::Activations;
use crate::formats::float::Float;
use crate::manifest::Coverage;
use crate::model::forward::{self, Places};
use crate::model::{Layer, Linear, Model, ModelConfig, Proj};
use crate::pipeline::progress::Progress;
use crate::recipe::{Recipe, Treatment};
use crate::text::windows::Sequence;

pub use persist::{PREFIX as STATES_PREFIX, Saved};
pub use solve::{Inputs, Problem, Rounded, solve};

/// Bytes of intermediate results that the caches are taken to hold, and tokens of a batch whatever they hold.
const CACHE: u64 = 8 << 20;
const LEAST_TOKENS: u64 = 1024;
/// Fewest rows of a weight that are solved together; a multiple of 32, as every range of rows.
const ROWS: usize = 1024;

/// Who takes what calibration makes.
pub trait Output: Sync {
    /// What becomes of a linear layer; `None` where it stays.
    fn treatment(&self, linear: &Linear) -> Option<&Treatment>;
    /// Whether the scales of a transform go into this layer's first and second norm.
    fn smooths(&self, layer: usize) -> (bool, bool);
    /// Takes rows `first`.. of a treated layer.
    fn put(&self, linear: &Linear, first: usize, rounded: &Rounded) -> Result<()>;
    /// Takes a tensor that a transform changed, values that its type holds exactly.
    fn put_plain(&self, name: &str, values: &[f32]) -> Result<()>;
}

/// What a run may use; none of it changes a bit.
pub struct Room<'a> {
    /// Most bytes of working memory.
    pub memory: u64,
    /// Where hidden states go that do not fit.
    pub offload: &'a Path,
    /// Whether Hessians go there too, whatever the memory.
    pub offload_hessians: bool,
    /// Whom to tell.
    pub progress: &'a Progress,
}

impl Room<'_> {
    fn hessians(&self) -> Option<&Path> {
        self.offload_hessians.then_some(self.offload)
    }

    /// Bytes that [`Self::offload`] has to take for a text of so many tokens, roughly: a full disk should show now and not
    /// after hours.
    pub fn offloaded(&self, model: &Model, tokens: u64) -> u64 {
        let c = &model.config;
        let [hidden, width, intermediate] = [c.hidden, c.heads * c.head_dim, c.intermediate].map(|n| n as u64);
        let states = |width: u64| Some(4 * tokens * width).filter(|b| *b > self.memory / 8).unwrap_or(0);
        let hessian = |columns: u64| if self.offload_hessians { 4 * columns * columns } else { 0 };
        let attention = states(width) + hessian(hidden) + hessian(width);
        let experts = states(hidden) + hessian(hidden) + hessian(hidden.max(intermediate));
        // Two saved copies lie beside the states that are worked on.
        2 * 4 * tokens * hidden + states(hidden) + attention.max(experts)
    }
}

/// Refuses a [`Room::memory`] in which not even one expert can be calibrated.
pub fn check_memory(memory: u64, config: &ModelConfig) -> Result<()> {
    let need = experts::an_expert(config);
    if memory < need {
        let refusal = format!("--max-memory {memory} is too small: calibrating one expert needs {need} bytes");
        return Err(Error::Refused(refusal));
    }
    Ok(())
}

/// What is known of a layer when it is done.
#[derive(Debug, Default)]
pub struct LayerReport {
    /// Errors of each treated linear layer.
    pub errors: Vec<(Linear, ErrorSums)>,
    /// Tokens of each expert.
    pub coverage: Option<Coverage>,
    /// What went otherwise than asked.
    pub notes: Vec<String>,
}

impl LayerReport {
    fn add(&mut self, linear: Linear, errors: ErrorSums, notes: Vec<String>) {
        self.errors.push((linear, errors));
        self.notes.extend(notes);
    }

    /// What is said of more than a few matrices of layer `l` in the same words is said once.
    fn shorten_notes(&mut self, l: usize) {
        const FEW: usize = 3;
        let mut said: Vec<(String, Vec<String>)> = Vec::new();
        for note in std::mem::take(&mut self.notes) {
            let (module, words) = note.split_once(": ").unwrap_or(("", &note));
            let (module, words) = (module.to_owned(), words.to_owned());
            match said.iter_mut().find(|s| s.0 == words) {
                Some(s) if s.1.last() == Some(&module) => {}
                Some(s) => s.1.push(module),
                None => said.push((words, vec![module])),
            }
        }
        for (words, modules) in said {
            match modules.len() {
                1..=FEW => self.notes.extend(modules.iter().map(|m| match &m[..] {
                    "" => words.clone(),
                    m => format!("{m}: {words}"),
                })),
                n => self.notes.push(format!("layer {l}: {n} matrices, the first {}: {words}", modules[0])),
            }
        }
    }
}

/// A weight that is computed with: f32, with what its scheme does to inputs.
struct Held {
    values: Vec<f32>,
    shape: (usize, usize),
    inputs: Activations,
    /// Of inputs with a fixed scale.
    input_scale: f32,
}

impl Held {
    /// Without anything that happens to inputs.
    fn plain(values: Vec<f32>, shape: (usize, usize)) -> Self {
        Self { values, shape, inputs: Activations::Float, input_scale: 1.0 }
    }
}

impl Rows for Held {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn float(&self) -> Float {
        Float::F32
    }

    fn inputs(&self) -> Activations {
        self.inputs
    }

    fn input_scale(&self) -> f32 {
        self.input_scale
    }

    fn values(&self) -> Option<&[f32]> {
        Some(&self.values)
    }

    fn read(&self, rows: std::ops::Range<usize>, columns: std::ops::Range<usize>, out: &mut [f32]) {
        for (row, out) in rows.zip(out.chunks_exact_mut(columns.len().max(1))) {
            out.copy_from_slice(&self.values[row * self.shape.1..][columns.clone()]);
        }
    }
}

/// An attention on its way.
struct Attended<'w> {
    /// What its heads make of the text [tokens, width].
    values: States,
    /// What is left to do.
    o: <Cpu as Device>::Matrix<'w>,
}

/// Positions and lengths of a batch's pieces.
type Shape<'b> = (&'b [usize], &'b [usize]);

/// A text on its way through a model.
pub struct Calibrator<'a> {
    device: &'a Cpu,
    model: &'a Model,
    recipe: &'a Recipe,
    room: Room<'a>,
    batches: Vec<Batch>,
    /// Tables of positions; batches of one shape share one.
    places: Vec<Arc<Places<Cpu>>>,
    ids: Vec<u32>,
    /// Hidden states [tokens, H].
    x: States,
}

impl<'a> Calibrator<'a> {
    /// With the embedded text.
    ///
    /// # Errors
    /// [`Error::Refused`] where the text does not fit the model.
    pub fn new(
        device: &'a Cpu,
        model: &'a Model,
        recipe: &'a Recipe,
        sequences: &[Sequence],
        room: Room<'a>,
    ) -> Result<Self> {
        fits(model, model, sequences)?;
        let c = &model.config;
        // What a batch computes with should stay in the caches, but weights are decoded once a batch.
        let cached = (CACHE / bytes_a_token(c)).clamp(LEAST_TOKENS, MOST_TOKENS as u64);
        let most = (room.memory / 4 / bytes_a_token(c)).clamp(1, cached) as usize;
        // Padding stands behind the text, where nothing that counts sees it.
        let batches = batches(sequences.iter().map(|s| s.real), most);
        let ids: Vec<u32> = sequences.iter().flat_map(|s| &s.ids[..s.real]).copied().collect();
        let mut known: BTreeMap<Shape, Arc<Places<Cpu>>> = BTreeMap::new();
        let mut places = Vec::with_capacity(batches.len());
        for b in &batches {
            let table = match known.get(&(&b.starts[..], &b.lengths[..])) {
                Some(table) => table.clone(),
                None => Arc::new(Places::new(device, model, &b.starts, &b.lengths)?),
            };
            known.insert((&b.starts, &b.lengths), table.clone());
            places.push(table);
        }
        let x = States::new(ids.len(), c.hidden, room.memory / 8, room.offload)?;
        Ok(Self { device, model, recipe, room, batches, places, ids, x })
    }

    /// How many tokens.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// Multiply-adds that a layer takes, roughly, for progress.
    pub fn work_a_layer(&self) -> u64 {
        self.tokens() as u64 * 2 * layer_work(self.model)
    }

    /// Starts with the embedding.
    pub fn embed(&mut self) -> Result<()> {
        let embedding = self.model.embedding(self.device)?;
        for batch in &self.batches {
            let rows = batch.rows();
            let values = self.device.download(self.device.embed(&embedding, &self.ids[rows.clone()])?)?;
            self.x.put(rows, &values);
        }
        Ok(())
    }

    /// Hidden states, to be kept for a run that is interrupted.
    pub fn states(&self) -> &[f32] {
        self.x.get(0..self.tokens())
    }

    /// Goes on from hidden states that were kept; gives what `read` says of them.
    pub fn restore<T>(&mut self, read: impl FnOnce(&mut States) -> Result<T>) -> Result<T> {
        read(&mut self.x)
    }

    /// Rounds layer `l` and takes the text through it.
    pub fn layer(&mut self, l: usize, output: &dyn Output) -> Result<LayerReport> {
        let mut report = LayerReport::default();
        let weights = self.model.layer(self.device, l)?;
        self.attention(l, weights, output, &mut report)?;
        self.experts(l, output, &mut report)?;
        report.shorten_notes(l);
        self.model.checkpoint.release();
        Ok(report)
    }

    /// Rounds the output head, or whatever reads the last hidden states.
    pub fn head(&mut self, output: &dyn Output) -> Result<LayerReport> {
        let mut report = LayerReport::default();
        let linear = Linear { proj: Proj::LmHead, layer: 0, expert: 0 };
        if output.treatment(&linear).is_some() {
            let norm = self.model.head(self.device)?.norm;
            let inputs = self.sums_of(self.needs_inputs(output, &[linear]), self.model.config.hidden, |batch, _| {
                self.device.norm(&self.batch(batch)?, &norm, self.model.settings.eps)
            })?;
            self.round(&linear, inputs.as_ref(), None, output, &mut report)?;
        }
        Ok(report)
    }

    /// Whether anything reads what comes out of layer `l`.
    pub fn is_read(&self, l: usize, output: &dyn Output) -> bool {
        let head = Linear { proj: Proj::LmHead, layer: 0, expert: 0 };
        l + 1 < self.model.config.layers || output.treatment(&head).is_some()
    }

    fn attention(
        &mut self,
        l: usize,
        weights: Layer<'_, Cpu>,
        output: &dyn Output,
        report: &mut LayerReport,
    ) -> Result<()> {
        let attention = self.round_attention(l, weights, output, report)?;
        for batch in &self.batches {
            let mut x = self.batch(batch)?;
            self.device.add(&mut x, &self.attention_output(&attention, batch)?)?;
            self.x.put(batch.rows(), &self.device.download(x)?);
            self.room.progress.advance(batch.rows().len() as u64 * layer_work(self.model) / 2);
        }
        Ok(())
    }

    /// Rounds the attention of layer `l`, each projection on what those before it make of the text.
    fn round_attention<'w>(
        &self,
        l: usize,
        mut weights: Layer<'w, Cpu>,
        output: &dyn Output,
        report: &mut LayerReport,
    ) -> Result<Attended<'w>> {
        let (c, eps) = (&self.model.config, self.model.settings.eps);
        let linear = |proj| Linear { proj, layer: l, expert: 0 };
        let readers = [Proj::Q, Proj::K, Proj::V].map(linear);
        let smooths = output.smooths(l).0;
        let wanted = smooths || self.needs_inputs(output, &readers);
        let mut inputs = self.sums_of(wanted, c.hidden, |batch, _| {
            self.device.norm(&self.batch(batch)?, &weights.attention_norm, eps)
        })?;
        let mut scales = None;
        if let Some(raw) = inputs.take_if(|_| smooths) {
            let name = format!("model.layers.{l}.input_layernorm.weight");
            let smoothing = self.smooth(&name, &readers, &raw, output, report)?;
            inputs = Some(smoothing.of_inputs(raw));
            if self.recipe.calibration.sequential_update {
                weights.attention_norm = self.device.upload(smoothing.norm, c.hidden)?;
            }
            scales = Some(smoothing.scales);
        }
        for (i, reader) in readers.iter().enumerate() {
            let held = self.round(reader, inputs.as_ref(), scales.as_deref(), output, report)?;
            if let Some(matrix) = self.next_matrix(l, reader, held, scales.is_some())? {
                *[&mut weights.q, &mut weights.k, &mut weights.v][i] = matrix;
            }
        }
        drop(inputs);
        let last = linear(Proj::O);
        let width = c.heads * c.head_dim;
        let (values, inputs) = self.attended(&weights, width, self.needs_inputs(output, &[last]))?;
        let held = self.round(&last, inputs.as_ref(), None, output, report)?;
        if let Some(matrix) = self.next_matrix(l, &last, held, false)? {
            weights.o = matrix;
        }
        Ok(Attended { values, o: weights.o })
    }

    /// What is added to the hidden states of a batch.
    fn attention_output(&self, attention: &Attended<'_>, batch: &Batch) -> Result<Tensor> {
        let width = self.model.config.heads * self.model.config.head_dim;
        let values = self.device.upload(attention.values.get(batch.rows()).to_vec(), width)?;
        self.device.linear(&values, &attention.o)
    }

    /// What the heads make of the text [tokens, width], and where it is asked for the sums over it.
    fn attended(&self, weights: &Layer<'_, Cpu>, width: usize, wanted: bool) -> Result<(States, Option<Inputs>)> {
        let mut attended = States::new(self.tokens(), width, self.room.memory / 8, self.room.offload)?;
        let mut sums = wanted.then(|| self.device.sums(width, self.room.hessians())).transpose()?;
        let mut past = None;
        for (batch, places) in self.batches.iter().zip(&self.places) {
            let mut caches = caches(self.device, &weights.attention, batch, past.take());
            let normed = self.device.norm(&self.batch(batch)?, &weights.attention_norm, self.model.settings.eps)?;
            let out = forward::attended(self.device, weights, &normed, places, &mut caches)?;
            past = caches.pop();
            if let Some(sums) = &mut sums {
                self.device.accumulate(&out, sums)?;
            }
            attended.put(batch.rows(), &self.device.download(out)?);
        }
        Ok((attended, sums.map(|s| self.device.moments(s).map(Inputs::new)).transpose()?))
    }

    /// The hidden states of a batch.
    fn batch(&self, batch: &Batch) -> Result<Tensor> {
        self.device.upload(self.x.get(batch.rows()).to_vec(), self.model.config.hidden)
    }

    /// Whether some of these layers are rounded by what their inputs look like.
    fn needs_inputs(&self, output: &dyn Output, linears: &[Linear]) -> bool {
        linears.iter().filter_map(|l| output.treatment(l)).any(|t| {
            t.sparse.is_some()
                || t.scheme.is_some_and(|s| t.layer.algorithm.needs_text() || s.activations == Activations::StaticFp8)
        })
    }

    /// Sums over what `inputs` makes of each batch.
    fn sums_of(
        &self,
        wanted: bool,
        columns: usize,
        inputs: impl Fn(&Batch, &Places<Cpu>) -> Result<Tensor>,
    ) -> Result<Option<Inputs>> {
        if !wanted {
            return Ok(None);
        }
        let mut sums: Moments = self.device.sums(columns, self.room.hessians())?;
        for (batch, places) in self.batches.iter().zip(&self.places) {
            self.device.accumulate(&inputs(batch, places)?, &mut sums)?;
        }
        Ok(Some(Inputs::new(self.device.moments(sums)?)))
    }

    /// Rows of the source's weight, times the scales of a transform.
    fn source_rows(
        &self,
        weight: &Weight,
        module: &str,
        rows: std::ops::Range<usize>,
        scales: Option<&[f32]>,
    ) -> Result<Vec<f32>> {
        let columns = weight.shape().1;
        let mut w = vec![0f32; rows.len() * columns];
        w.par_chunks_mut(64 * columns).enumerate().for_each(|(i, w)| {
            let first = rows.start + i * 64;
            weight.read_rows(first..first + w.len() / columns, w);
        });
        if let Some(at) = w.par_iter().position_first(|v| !v.is_finite()) {
            let (row, column) = (rows.start + at / columns, at % columns);
            return Err(Error::Refused(format!(
                "{module} holds NaN or infinity at row {row}, column {column}; the checkpoint is damaged"
            )));
        }
        if let Some(scales) = scales {
            w.par_chunks_mut(columns).for_each(|row| row.iter_mut().zip(scales).for_each(|(w, s)| *w *= s));
        }
        Ok(w)
    }

    /// Rounds a linear layer; what is computed with from now on, where the text goes on through rounded layers.
    fn round(
        &self,
        linear: &Linear,
        inputs: Option<&Inputs>,
        scales: Option<&[f32]>,
        output: &dyn Output,
        report: &mut LayerReport,
    ) -> Result<Option<Held>> {
        let Some(treatment) = output.treatment(linear) else { return Ok(None) };
        let weight = containers::open(&self.model.checkpoint, &self.model.config, linear)?;
        let (shape, module, float) = (weight.shape(), linear.module(), weight.float());
        let keep = self.recipe.calibration.sequential_update && !matches!(linear.proj, Proj::LmHead | Proj::Embed);
        let mut values = Vec::new();
        let (mut errors, mut notes) = (ErrorSums::default(), Vec::new());
        // The table of a vocabulary would be large as a whole. Rows know nothing of each other.
        let fit = self.room.memory / 8 / (13 * shape.1 as u64);
        let step = (fit as usize).max(ROWS) / 32 * 32;
        // Rows that share scales stay together.
        let step = treatment.scheme.map_or(step, |s| step.next_multiple_of(s.step()));
        let extremes = self.extremes(linear, treatment, scales)?;
        let mut input_scale = 1.0;
        for first in (0..shape.0).step_by(step) {
            let w = self.source_rows(&weight, &module, first..shape.0.min(first + step), scales)?;
            let scaled = scales.is_some();
            let problem = Problem { module: &module, w, scaled, columns: shape.1, float, extremes, treatment, inputs };
            let mut rounded = self.device.enter(|| solve(problem, self.recipe))?;
            output.put(linear, first, &rounded)?;
            errors.merge(&rounded.errors);
            input_scale = rounded.codes.as_ref().map_or(1.0, |c| c.input_scale);
            notes.append(&mut rounded.notes);
            if keep {
                values.append(&mut rounded.values);
            }
        }
        notes.dedup();
        report.add(*linear, errors, notes);
        let inputs = treatment.scheme.map_or(Activations::Float, |s| s.activations);
        Ok(keep.then_some(Held { values, shape, inputs, input_scale }))
    }

    /// What the scheme of `linear` asks for, as [`Problem::extremes`].
    fn extremes(&self, linear: &Linear, treatment: &Treatment, scales: Option<&[f32]>) -> Result<(f32, f32)> {
        match treatment.scheme.filter(Scheme::needs_extremes) {
            Some(s) => {
                let fused = s.weights == NumberFormat::Nvfp4;
                containers::extremes(&self.model.checkpoint, &self.model.config, *linear, fused, scales)
            }
            None => Ok((0.0, 0.0)),
        }
    }

    /// The matrix that the text goes on through: the rounded one, or the source's with a transform's scales in it; `None`
    /// where that is the one which is there.
    fn next_matrix<'w>(
        &self,
        l: usize,
        linear: &Linear,
        held: Option<Held>,
        scaled: bool,
    ) -> Result<Option<<Cpu as Device>::Matrix<'w>>> {
        let Some(held) = held else {
            assert!(!scaled || !self.recipe.calibration.sequential_update, "what is scaled is rounded too");
            return Ok(None);
        };
        let bias = self.model.bias(l, linear.proj)?;
        self.device.matrix(Box::new(held), bias).map(Some)
    }
}
