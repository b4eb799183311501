//! The experts of a layer, each on the tokens that the router sends it.

use std::borrow::Cow;
use std::sync::Arc;

use rayon::prelude::*;

use super::smooth::Smoothing;
use super::{Calibrator, Held, Inputs, LayerReport, Output, Problem, Rounded, solve};
use crate::containers;
use crate::device::cpu::Cpu;
use crate::device::{Device, Moments};
use crate::error::Result;
use crate::evaluate::{States, layer_work};
use crate::formats::activations::Activations;
use crate::manifest::Coverage;
use crate::model::{Fused, Linear, ModelConfig, Proj};
use crate::ops::matmul::{Packed, matmul};
use crate::ops::{elementwise, math, moments, route};
use crate::recipe::FewTokens;

/// Most tokens that an expert takes at a time.
const CHUNK: usize = 1024;

/// A projection that an expert computes with.
struct Matrix {
    weight: Held,
    bias: Vec<f32>,
}

impl Matrix {
    /// `x` [rows, columns] as this weight reads it: rounded where its scheme says so, laid out for the product.
    fn pack(&self, x: &[f32]) -> Packed {
        let (k, inputs) = (self.weight.shape.1, self.weight.inputs);
        let rows = x.len() / k;
        if inputs == Activations::Float {
            return Packed::new(x, rows, k);
        }
        let mut rounded = x.to_vec();
        rounded.par_chunks_exact_mut(k).for_each(|row| inputs.quantize_token(row, self.weight.input_scale));
        Packed::new(&rounded, rows, k)
    }

    /// x W^T + bias for `rows` of x.
    fn apply(&self, x: &Packed, rows: usize) -> Vec<f32> {
        let mut out = vec![0f32; rows * self.weight.shape.0];
        matmul(x, &self.weight, Some(&self.bias), &mut out);
        out
    }
}

/// A token and the router's weight for it.
pub(super) type Share = (u32, f32);

/// What stands in front of the experts of a layer, as the text goes on through it.
pub(super) struct Front<'w> {
    norm: Vec<f32>,
    router: <Cpu as Device>::Matrix<'w>,
    /// Scales that go into gate and up.
    smoothing: Option<Smoothing>,
    /// Sums over all tokens, for experts that take every token alike.
    all: Option<Arc<Inputs>>,
}

/// What the router makes of all tokens.
struct Routing {
    /// Tokens of each expert, ascending.
    tokens: Vec<Vec<Share>>,
    /// Softmax of the router's logits [tokens, E], where experts with few tokens need it.
    probabilities: Option<States>,
    /// The normed hidden states of all tokens, where there is room for them.
    normed: Option<States>,
}

/// What all experts of a layer read.
pub(super) struct Mlp<'w> {
    layer: usize,
    front: Front<'w>,
    routing: Routing,
    gate_up_bias: Vec<f32>,
    down_bias: Vec<f32>,
}

/// What an expert made.
pub(super) struct Done {
    /// Its outputs [tokens of the expert, H].
    outputs: States,
    report: LayerReport,
}

impl Mlp<'_> {
    /// The tokens of an expert.
    pub(super) fn tokens(&self, expert: usize) -> &[Share] {
        &self.routing.tokens[expert]
    }

    /// Adds what `experts` made to `out` [tokens, H].
    pub(super) fn add_outputs(&self, out: &mut [f32], h: usize, experts: std::ops::Range<usize>, done: &[Done]) {
        add_outputs(out, h, &self.routing.tokens[experts], done);
    }
}

impl Done {
    /// [tokens of the expert, H].
    pub(super) fn outputs(&self) -> &[f32] {
        &self.outputs
    }
}

/// The tokens that tell about an expert.
struct Telling<'a> {
    tokens: Cow<'a, [Share]>,
    /// Whether each counts by its weight.
    by_weight: bool,
    /// Whether these are all tokens and not those that it gets.
    all: bool,
}

/// Bytes that one expert takes: sums, their factor (in f64, then tiles), three weights before and after, and a chunk of
/// tokens.
pub(super) fn an_expert(c: &ModelConfig) -> u64 {
    let widest = c.hidden.max(c.intermediate);
    (18 * widest * widest + 28 * c.hidden * c.intermediate + 16 * CHUNK * widest) as u64
}

/// Tokens whose sums one thread adds up.
const SPAN: usize = 256;

/// Adds the experts' outputs, by the router's weights, to `out` [tokens, H]; experts ascending.
fn add_outputs(out: &mut [f32], h: usize, routes: &[Vec<Share>], done: &[Done]) {
    out.par_chunks_mut(SPAN * h).enumerate().for_each(|(i, rows)| {
        let (first, last) = (i * SPAN, i * SPAN + rows.len() / h);
        for (routes, done) in routes.iter().zip(done) {
            let begin = routes.partition_point(|r| (r.0 as usize) < first);
            for (at, &(token, weight)) in routes.iter().enumerate().skip(begin) {
                if token as usize >= last {
                    break;
                }
                let row = &mut rows[(token as usize - first) * h..][..h];
                elementwise::add_scaled(row, weight, done.outputs.get(at..at + 1));
            }
        }
    });
}

/// Logits become probabilities.
fn softmax(row: &mut [f32]) {
    let max = row.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    row.iter_mut().for_each(|v| *v = math::exp(*v - max));
    let sum: f32 = row.iter().sum();
    row.iter_mut().for_each(|v| *v /= sum);
}

impl<'a> Calibrator<'a> {
    pub(super) fn experts(&mut self, l: usize, output: &dyn Output, report: &mut LayerReport) -> Result<()> {
        let experts = self.model.config.experts;
        let each: Vec<Linear> = (0..experts)
            .flat_map(|expert| [Proj::Gate, Proj::Up, Proj::Down].map(|proj| Linear { proj, layer: l, expert }))
            .collect();
        let treated = each.iter().any(|e| output.treatment(e).is_some());
        let front = self.front(l, output, report)?;
        let mlp = self.mlp(l, front, treated)?;
        report.coverage = treated.then(|| Coverage {
            layer: l,
            tokens: self.tokens() as u64,
            experts: mlp.routing.tokens.iter().map(|r| r.len() as u64).collect(),
            few: Vec::new(),
        });
        let out = self.waves(&mlp, output, report)?;
        let few = report.coverage.as_ref().map_or(0, |c| c.few.len());
        if few > 0 && self.needs_inputs(output, &each) {
            report.notes.push(self.few_note(l, few));
        }
        if self.is_read(l, output) {
            for batch in &self.batches {
                let mut x = self.x.get(batch.rows()).to_vec();
                self.device.enter(|| elementwise::add(&mut x, out.get(batch.rows())));
                self.x.put(batch.rows(), &x);
            }
        }
        Ok(())
    }

    /// What the experts read, with the routes of all tokens.
    pub(super) fn mlp(&self, l: usize, front: Front<'a>, treated: bool) -> Result<Mlp<'a>> {
        let (checkpoint, c) = (&self.model.checkpoint, &self.model.config);
        Ok(Mlp {
            layer: l,
            routing: self.route(&front, treated)?,
            front,
            gate_up_bias: containers::expert_biases(checkpoint, c, Fused::GateUp, l)?,
            down_bias: containers::expert_biases(checkpoint, c, Fused::Down, l)?,
        })
    }

    /// The norm and the router, with the scales of a transform in them, and rounded where the recipe says so.
    pub(super) fn front(&self, l: usize, output: &dyn Output, report: &mut LayerReport) -> Result<Front<'a>> {
        let c = &self.model.config;
        let weights = self.model.layer(self.device, l)?;
        let name = format!("model.layers.{l}.post_attention_layernorm.weight");
        let mut norm = containers::vector(&self.model.checkpoint, &name, &[c.hidden])?.0;
        let router = Linear { proj: Proj::Router, layer: l, expert: 0 };
        let readers: Vec<Linear> = (0..c.experts)
            .flat_map(|expert| [Proj::Gate, Proj::Up].map(|proj| Linear { proj, layer: l, expert }))
            .collect();
        let smooths = output.smooths(l).1;
        let few = self.recipe.calibration.few_tokens;
        let wants_all = few == FewTokens::AllExperts && self.needs_inputs(output, &readers);
        let wanted = smooths || wants_all || self.needs_inputs(output, &[router]);
        let mut inputs = self.sums_of(wanted, c.hidden, |batch, _| {
            self.device.norm(&self.batch(batch)?, &weights.mlp_norm, self.model.settings.eps)
        })?;
        let mut smoothing = None;
        if let Some(raw) = inputs.take_if(|_| smooths) {
            let found = self.smooth(&name, &readers, &raw, output, report)?;
            inputs = Some(found.of_inputs(raw));
            if self.recipe.calibration.sequential_update {
                norm.clone_from(&found.norm);
            }
            smoothing = Some(found);
        }
        let scales = smoothing.as_ref().map(|s| &s.scales[..]);
        let changed = self.router(&router, scales, inputs.as_ref(), output, report)?;
        let all = inputs.filter(|_| wants_all).map(Arc::new);
        Ok(Front { norm, router: changed.unwrap_or(weights.router), smoothing, all })
    }

    /// Which tokens go to which expert; `treated` where what they look like is asked for later.
    fn route(&self, front: &Front, treated: bool) -> Result<Routing> {
        let (c, settings) = (&self.model.config, &self.model.settings);
        let norm = self.device.upload(front.norm.clone(), c.hidden)?;
        let weighted = treated && self.recipe.calibration.few_tokens == FewTokens::Weighted;
        let states = |width, memory| States::new(self.tokens(), width, memory, self.room.offload);
        let fits = (self.tokens() * c.hidden * 4) as u64 <= self.room.memory / 8;
        let mut routing = Routing {
            tokens: vec![Vec::new(); c.experts],
            probabilities: weighted.then(|| states(c.experts, self.room.memory / 16)).transpose()?,
            normed: (fits && treated).then(|| states(c.hidden, u64::MAX)).transpose()?,
        };
        let (mut chosen, mut shares) = (vec![0u32; settings.top_k], vec![0f32; settings.top_k]);
        for batch in &self.batches {
            let normed = self.device.norm(&self.batch(batch)?, &norm, settings.eps)?;
            let mut logits = self.device.download(self.device.linear(&normed, &front.router)?)?;
            if let Some(all) = &mut routing.normed {
                all.put(batch.rows(), &self.device.download(normed)?);
            }
            for (token, row) in batch.rows().zip(logits.chunks_exact(c.experts)) {
                route::top_k(row, &mut chosen, &mut shares);
                for (&expert, &share) in chosen.iter().zip(&shares) {
                    routing.tokens[expert as usize].push((token as u32, share));
                }
            }
            if let Some(probabilities) = &mut routing.probabilities {
                logits.chunks_exact_mut(c.experts).for_each(softmax);
                probabilities.put(batch.rows(), &logits);
            }
        }
        Ok(routing)
    }

    /// The router, where a transform or the recipe changes it.
    fn router(
        &self,
        router: &Linear,
        scales: Option<&[f32]>,
        inputs: Option<&Inputs>,
        output: &dyn Output,
        report: &mut LayerReport,
    ) -> Result<Option<<Cpu as Device>::Matrix<'static>>> {
        let sequential = self.recipe.calibration.sequential_update;
        if output.treatment(router).is_some() {
            let held = self.round(router, inputs, scales, output, report)?;
            return self.next_matrix(router.layer, router, held, scales.is_some());
        }
        let Some(scales) = scales else { return Ok(None) };
        let weight = containers::open(&self.model.checkpoint, &self.model.config, router)?;
        let (shape, float) = (weight.shape(), weight.float());
        let mut values = self.source_rows(&weight, &router.module(), 0..shape.0, Some(scales))?;
        values.iter_mut().for_each(|v| *v = float.round(*v));
        output.put_plain(&format!("{}.weight", router.module()), &values)?;
        let held = Held::plain(values, shape);
        self.next_matrix(router.layer, router, sequential.then_some(held), false)
    }

    /// All experts, as many at a time as memory allows; the sum of their outputs [tokens, H]. Experts are added in
    /// ascending order, as the forward does.
    fn waves(&self, mlp: &Mlp, output: &dyn Output, report: &mut LayerReport) -> Result<States> {
        let c = &self.model.config;
        let read = self.is_read(mlp.layer, output);
        let mut out = States::new(self.tokens(), c.hidden, self.room.memory / 8, self.room.offload)?;
        let share = layer_work(self.model) * 3 / 2 * self.tokens() as u64 / c.experts as u64;
        let make = |expert, wave| self.expert(mlp, expert, wave, output, read);
        self.in_waves(make, |experts, done: Vec<Done>| {
            if read {
                self.device.enter(|| mlp.add_outputs(&mut out, c.hidden, experts.clone(), &done));
            }
            for (expert, done) in experts.zip(done) {
                report.errors.extend(done.report.errors);
                report.notes.extend(done.report.notes);
                if let Some(coverage) = report.coverage.as_mut().filter(|_| self.is_few(mlp, expert)) {
                    coverage.few.push(expert);
                }
                self.room.progress.advance(share);
            }
        })?;
        Ok(out)
    }

    /// Calls `make` for every expert, with how many there are at a time, and `take` with what each wave of them made.
    pub(super) fn in_waves<T: Send>(
        &self,
        make: impl Fn(usize, usize) -> Result<T> + Sync,
        mut take: impl FnMut(std::ops::Range<usize>, Vec<T>),
    ) -> Result<()> {
        let c = &self.model.config;
        let most = 2 * self.device.enter(rayon::current_num_threads) as u64;
        let wave = (self.room.memory / 2 / an_expert(c)).clamp(1, most) as usize;
        for first in (0..c.experts).step_by(wave) {
            let experts = first..c.experts.min(first + wave);
            let done: Vec<Result<T>> =
                self.device.enter(|| experts.clone().into_par_iter().map(|e| make(e, wave)).collect());
            take(experts, done.into_iter().collect::<Result<_>>()?);
        }
        Ok(())
    }

    fn is_few(&self, mlp: &Mlp, expert: usize) -> bool {
        let count = mlp.routing.tokens[expert].len();
        count == 0 || (count as f64) < self.recipe.calibration.few_tokens_threshold * self.tokens() as f64
    }

    /// The tokens that tell about an expert; `None` where nothing is known.
    fn telling<'m>(&self, mlp: &'m Mlp, expert: usize) -> Option<Telling<'m>> {
        let calibration = &self.recipe.calibration;
        if !self.is_few(mlp, expert) {
            let tokens = Cow::Borrowed(&mlp.routing.tokens[expert][..]);
            return Some(Telling { tokens, by_weight: calibration.router_weighted, all: false });
        }
        let all = 0..self.tokens() as u32;
        let tokens = match (calibration.few_tokens, &mlp.routing.probabilities) {
            (FewTokens::Rtn, _) => return None,
            (FewTokens::Weighted, Some(p)) => all.map(|t| (t, p.get(t as usize..t as usize + 1)[expert])).collect(),
            _ => all.map(|t| (t, 1.0)).collect(),
        };
        Some(Telling { tokens, by_weight: calibration.few_tokens == FewTokens::Weighted, all: true })
    }

    /// Sums over `make`'s rows for these tokens, each row times the root of its weight.
    fn weighted_sums(
        &self,
        telling: &Telling,
        columns: usize,
        mut make: impl FnMut(usize, &[Share]) -> Vec<f32>,
    ) -> Result<Moments> {
        let mut sums = self.device.sums(columns, self.room.hessians())?;
        // The range of inputs is what it is, however much they count.
        let mut max = vec![0f32; columns];
        for (i, chunk) in telling.tokens.chunks(CHUNK).enumerate() {
            let mut rows = make(i * CHUNK, chunk);
            moments::raise_max(&rows, &mut max);
            if telling.by_weight {
                for (row, (_, weight)) in rows.chunks_exact_mut(columns).zip(chunk) {
                    let root = weight.sqrt();
                    row.iter_mut().for_each(|v| *v *= root);
                }
            }
            self.device.accumulate(&self.device.upload(rows, columns)?, &mut sums)?;
        }
        Ok(Moments { max, ..self.device.moments(sums)? })
    }

    /// The normed hidden states of some tokens.
    fn gather(&self, mlp: &Mlp, tokens: &[Share]) -> Vec<f32> {
        let h = self.model.config.hidden;
        let mut rows = vec![0f32; tokens.len() * h];
        rows.par_chunks_exact_mut(h).with_min_len(64).zip(tokens).for_each(|(row, &(t, _))| {
            let one = t as usize..t as usize + 1;
            match &mlp.routing.normed {
                Some(all) => row.copy_from_slice(all.get(one)),
                None => elementwise::rms_norm(self.x.get(one), &mlp.front.norm, self.model.settings.eps, row),
            }
        });
        rows
    }

    /// Rounds one projection; gives what is computed with.
    fn projection(
        &self,
        mlp: &Mlp,
        linear: Linear,
        inputs: Option<&Inputs>,
        output: &dyn Output,
        report: &mut LayerReport,
    ) -> Result<Matrix> {
        let c = &self.model.config;
        let weight = containers::open(&self.model.checkpoint, c, &linear)?;
        let (shape, module, float) = (weight.shape(), linear.module(), weight.float());
        let sequential = self.recipe.calibration.sequential_update;
        let scales = mlp.front.smoothing.as_ref().filter(|_| linear.proj != Proj::Down).map(|s| &s.scales[..]);
        let bias = match linear.proj {
            Proj::Down => mlp.down_bias[linear.expert * c.hidden..][..c.hidden].to_vec(),
            proj => {
                let both = &mlp.gate_up_bias[linear.expert * 2 * c.intermediate..][..2 * c.intermediate];
                both.iter().skip(usize::from(proj == Proj::Up)).step_by(2).copied().collect()
            }
        };
        let w = self.source_rows(&weight, &module, 0..shape.0, scales)?;
        let Some(treatment) = output.treatment(&linear) else {
            return Ok(Matrix { weight: Held::plain(w, shape), bias });
        };
        let (scaled, extremes) = (scales.is_some(), self.extremes(&linear, treatment, scales)?);
        let problem = Problem { module: &module, w, scaled, columns: shape.1, float, extremes, treatment, inputs };
        let rounded: Rounded = solve(problem, self.recipe)?;
        output.put(&linear, 0, &rounded)?;
        report.add(linear, rounded.errors, rounded.notes);
        let weight = if sequential {
            let inputs = treatment.scheme.map_or(Activations::Float, |s| s.activations);
            let input_scale = rounded.codes.map_or(1.0, |c| c.input_scale);
            Held { values: rounded.values, shape, inputs, input_scale }
        } else {
            Held::plain(self.source_rows(&weight, &module, 0..shape.0, None)?, shape)
        };
        Ok(Matrix { weight, bias })
    }

    /// What gate and up make of some tokens [tokens, I].
    fn hidden(&self, mlp: &Mlp, [gate, up]: &[Matrix; 2], tokens: &[Share]) -> Vec<f32> {
        let settings = &self.model.settings;
        let x = self.gather(mlp, tokens);
        let packed = gate.pack(&x);
        let mut h = gate.apply(&packed, tokens.len());
        let u = if up.weight.inputs == gate.weight.inputs {
            up.apply(&packed, tokens.len())
        } else {
            up.apply(&up.pack(&x), tokens.len())
        };
        h.par_chunks_exact_mut(self.model.config.intermediate)
            .zip(u.par_chunks_exact(self.model.config.intermediate))
            .with_min_len(16)
            .for_each(|(h, u)| elementwise::swiglu(h, u, settings.alpha, settings.limit));
        h
    }

    /// Rounds an expert and takes its tokens through it, with outputs where they are `read`.
    pub(super) fn expert(
        &self,
        mlp: &Mlp,
        expert: usize,
        wave: usize,
        output: &dyn Output,
        read: bool,
    ) -> Result<Done> {
        let c = &self.model.config;
        let [first, second, last] =
            [Proj::Gate, Proj::Up, Proj::Down].map(|proj| Linear { proj, layer: mlp.layer, expert });
        let telling = self.needs_inputs(output, &[first, second, last]).then(|| self.telling(mlp, expert)).flatten();
        let mut report = LayerReport::default();

        let wanted = telling.as_ref().filter(|_| self.needs_inputs(output, &[first, second]));
        let inputs = wanted.map(|telling| self.normed_inputs(mlp, telling)).transpose()?;
        let gate = self.projection(mlp, first, inputs.as_deref(), output, &mut report)?;
        let up = self.projection(mlp, second, inputs.as_deref(), output, &mut report)?;
        drop(inputs);
        let gate_up = [gate, up];

        let routed = &mlp.routing.tokens[expert][..];
        let memory = self.room.memory / 8 / wave as u64;
        let states = |rows, width| States::new(rows, width, memory, self.room.offload);
        let mut kept = states(routed.len(), c.intermediate)?;
        let mut keep = |at: usize, chunk: &[Share]| {
            let h = self.hidden(mlp, &gate_up, chunk);
            kept.put(at..at + chunk.len(), &h);
            h
        };
        let wanted = telling.as_ref().filter(|_| self.needs_inputs(output, &[last]));
        let own = wanted.filter(|telling| !telling.all);
        let mut inputs = own.map(|telling| self.weighted_sums(telling, c.intermediate, &mut keep)).transpose()?;
        if own.is_none() {
            routed.chunks(CHUNK).enumerate().for_each(|(i, chunk)| drop(keep(i * CHUNK, chunk)));
            let all =
                |telling| self.weighted_sums(telling, c.intermediate, |_, chunk| self.hidden(mlp, &gate_up, chunk));
            inputs = wanted.map(all).transpose()?;
        }
        let inputs = inputs.map(Inputs::new);
        let down = self.projection(mlp, last, inputs.as_ref(), output, &mut report)?;

        let mut outputs = states(if read { routed.len() } else { 0 }, c.hidden)?;
        for first in (0..outputs.rows()).step_by(CHUNK) {
            let rows = first..outputs.rows().min(first + CHUNK);
            let y = down.apply(&down.pack(kept.get(rows.clone())), rows.len());
            outputs.put(rows, &y);
        }
        Ok(Done { outputs, report })
    }

    /// Sums over what gate and up read.
    fn normed_inputs(&self, mlp: &Mlp, telling: &Telling) -> Result<Arc<Inputs>> {
        if let (true, Some(all)) = (telling.all && !telling.by_weight, &mlp.front.all) {
            return Ok(all.clone());
        }
        let sums = self.weighted_sums(telling, self.model.config.hidden, |_, chunk| self.gather(mlp, chunk))?;
        let inputs = Inputs::new(sums);
        // The text goes on as it was, but the weights that are rounded have the scales in them.
        let unscaled = mlp.front.smoothing.as_ref().filter(|_| !self.recipe.calibration.sequential_update);
        Ok(Arc::new(match unscaled {
            Some(smoothing) => smoothing.of_inputs(inputs),
            None => inputs,
        }))
    }

    /// One line for all experts of a layer that got few tokens; the coverage names them.
    fn few_note(&self, layer: usize, few: usize) -> String {
        let (experts, tokens) = (self.model.config.experts, self.tokens());
        let share = self.recipe.calibration.few_tokens_threshold;
        let how = match self.recipe.calibration.few_tokens {
            FewTokens::Rtn => "they were rounded to nearest",
            FewTokens::AllExperts => "their statistics are over all tokens",
            FewTokens::Weighted => "their statistics are over all tokens, weighted by the router",
        };
        let (percent, least) = (100.0 * share, (share * tokens as f64).ceil().max(1.0));
        format!(
            "layer {layer}: {few} of {experts} experts got fewer than {least} of {tokens} tokens ({percent}%); {how}"
        )
    }
}
