//! The experts of a layer, each on the tokens that the router sends it.

use rayon::prelude::*;

use super::smooth::Smoothing;
use super::{Calibrator, Inputs, LayerReport, Output, Problem, Rounded, solve};
use crate::algorithms::rtn::ErrorSums;
use crate::containers::{self, dense};
use crate::device::{Device, Moments};
use crate::error::Result;
use crate::evaluate::{States, layer_work};
use crate::formats::activations::Activations;
use crate::manifest::Coverage;
use crate::model::{Fused, Linear, ModelConfig, Proj};
use crate::ops::matmul::{Dense, Packed, matmul};
use crate::ops::{elementwise, math, moments, route};
use crate::recipe::FewTokens;

/// Most tokens that an expert takes at a time.
const CHUNK: usize = 1024;

/// A weight that an expert computes with.
struct Matrix {
    values: Vec<f32>,
    shape: (usize, usize),
    inputs: Activations,
    bias: Vec<f32>,
}

impl Matrix {
    /// `x` [rows, columns] as this weight reads it: rounded where its scheme says so, laid out for the product.
    fn pack(&self, x: &[f32]) -> Packed {
        let k = self.shape.1;
        let rows = x.len() / k;
        if self.inputs == Activations::Float {
            return Packed::new(x, rows, k);
        }
        let mut rounded = x.to_vec();
        rounded.par_chunks_exact_mut(k).for_each(|row| self.inputs.quantize_token(row));
        Packed::new(&rounded, rows, k)
    }

    /// x W^T + bias for `rows` of x.
    fn apply(&self, x: &Packed, rows: usize) -> Vec<f32> {
        let mut out = vec![0f32; rows * self.shape.0];
        matmul(x, &Dense { values: &self.values, shape: self.shape }, Some(&self.bias), &mut out);
        out
    }
}

/// What all experts of a layer read.
struct Mlp<'a> {
    layer: usize,
    norm: &'a [f32],
    /// The normed hidden states of all tokens, where there is room for them.
    normed: Option<States>,
    /// Tokens of each expert, ascending, with the router's weight.
    routes: Vec<Vec<(u32, f32)>>,
    /// Router logits [tokens, E], where experts with few tokens need them.
    logits: Option<States>,
    /// Scales that go into gate and up.
    smoothing: Option<&'a Smoothing>,
    /// Sums over all tokens, for experts that take every token alike.
    all: Option<Inputs>,
    gate_up_bias: Vec<f32>,
    down_bias: Vec<f32>,
}

/// What an expert made.
struct Done {
    /// Its outputs [tokens of the expert, H].
    outputs: States,
    errors: Vec<(Linear, ErrorSums)>,
    notes: Vec<String>,
}

/// Which tokens tell about an expert, and how much each counts.
enum Tokens<'a> {
    /// Nothing is known.
    None,
    /// Those that it gets.
    Routed(&'a [(u32, f32)]),
    /// All, each by this weight.
    All(Vec<(u32, f32)>),
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
fn add_outputs(out: &mut [f32], h: usize, routes: &[Vec<(u32, f32)>], done: &[Done]) {
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

impl Calibrator<'_> {
    pub(super) fn experts(&mut self, l: usize, output: &dyn Output, report: &mut LayerReport) -> Result<()> {
        let (c, settings) = (&self.model.config, &self.model.settings);
        let weights = self.model.layer(self.device, l)?;
        let (norm_name, sequential) =
            (format!("model.layers.{l}.post_attention_layernorm.weight"), self.recipe.calibration.sequential_update);
        let source_norm = dense::read(&self.model.checkpoint.tensor(&norm_name)?, &[c.hidden])?;
        let router = Linear { proj: Proj::Router, layer: l, expert: 0 };
        let each = |projs: &'static [Proj]| {
            (0..c.experts).flat_map(move |expert| projs.iter().map(move |&proj| Linear { proj, layer: l, expert }))
        };
        let readers: Vec<Linear> = each(&[Proj::Gate, Proj::Up]).collect();
        let treated = each(&[Proj::Gate, Proj::Up, Proj::Down]).any(|e| output.treatment(&e).is_some());

        // The router, and what it decides.
        let smooths = output.smooths(l).1;
        let few = self.recipe.calibration.few_tokens;
        let wants_all = few == FewTokens::AllExperts && self.needs_inputs(output, &readers);
        let inputs =
            self.sums_of(smooths || wants_all || self.needs_inputs(output, &[router]), c.hidden, |batch, _| {
                self.device.norm(&self.batch(batch)?, &weights.mlp_norm, settings.eps)
            })?;
        let (smoothing, inputs) = match inputs {
            Some(inputs) if smooths => {
                let smoothing = self.smooth(&norm_name, &readers, &inputs, output, report)?;
                let inputs = smoothing.of_inputs(inputs);
                (Some(smoothing), Some(inputs))
            }
            inputs => (None, inputs),
        };
        let scales = smoothing.as_ref().map(|s| &s.scales[..]);
        let rounded_router = self.router(&router, scales, inputs.as_ref(), output, report)?;
        let norm = match (&smoothing, sequential) {
            (Some(s), true) => &s.norm,
            _ => &source_norm,
        };
        let route_by = rounded_router.unwrap_or(weights.router);
        let norm_tensor = self.device.upload(norm.clone(), c.hidden)?;
        let mut routes: Vec<Vec<(u32, f32)>> = vec![Vec::new(); c.experts];
        let mut kept = (treated && few == FewTokens::Weighted)
            .then(|| States::new(self.tokens(), c.experts, self.room.memory / 16, self.room.offload))
            .transpose()?;
        let room = (self.tokens() * c.hidden * 4) as u64 <= self.room.memory / 8;
        let mut all_normed =
            (room && treated).then(|| States::new(self.tokens(), c.hidden, u64::MAX, self.room.offload)).transpose()?;
        let (mut chosen, mut shares) = (vec![0u32; settings.top_k], vec![0f32; settings.top_k]);
        for batch in &self.batches {
            let normed = self.device.norm(&self.batch(batch)?, &norm_tensor, settings.eps)?;
            let logits = self.device.download(self.device.linear(&normed, &route_by)?)?;
            if let Some(all) = &mut all_normed {
                all.put(batch.rows(), &self.device.download(normed)?);
            }
            for (token, row) in batch.rows().zip(logits.chunks_exact(c.experts)) {
                route::top_k(row, &mut chosen, &mut shares);
                for (&expert, &share) in chosen.iter().zip(&shares) {
                    routes[expert as usize].push((token as u32, share));
                }
            }
            if let Some(kept) = &mut kept {
                kept.put(batch.rows(), &logits);
            }
        }
        report.coverage = treated.then(|| Coverage {
            layer: l,
            tokens: self.tokens() as u64,
            experts: routes.iter().map(|r| r.len() as u64).collect(),
            few: Vec::new(),
        });
        let mlp = Mlp {
            layer: l,
            norm,
            normed: all_normed,
            routes,
            logits: kept,
            smoothing: smoothing.as_ref(),
            all: inputs.filter(|_| wants_all),
            gate_up_bias: containers::expert_biases(&self.model.checkpoint, c, Fused::GateUp, l)?,
            down_bias: containers::expert_biases(&self.model.checkpoint, c, Fused::Down, l)?,
        };
        let out = self.waves(&mlp, output, report)?;
        let few = report.coverage.as_ref().map_or(0, |c| c.few.len());
        if few > 0 && self.needs_inputs(output, &each(&[Proj::Gate, Proj::Up, Proj::Down]).collect::<Vec<_>>()) {
            report.notes.push(self.few_note(l, few));
        }
        if !self.is_read(l, output) {
            return Ok(());
        }
        for batch in &self.batches {
            let mut x = self.x.get(batch.rows()).to_vec();
            self.device.enter(|| elementwise::add(&mut x, out.get(batch.rows())));
            self.x.put(batch.rows(), &x);
        }
        Ok(())
    }

    /// The router, where a transform or the recipe changes it.
    fn router(
        &self,
        router: &Linear,
        scales: Option<&[f32]>,
        inputs: Option<&Inputs>,
        output: &dyn Output,
        report: &mut LayerReport,
    ) -> Result<Option<<crate::device::cpu::Cpu as Device>::Matrix<'static>>> {
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
        let held = super::Held { values, shape, inputs: Activations::Float };
        self.next_matrix(router.layer, router, sequential.then_some(held), false)
    }

    /// All experts, as many at a time as memory allows; the sum of their outputs [tokens, H]. Experts are added in
    /// ascending order, as the forward does.
    fn waves(&self, mlp: &Mlp, output: &dyn Output, report: &mut LayerReport) -> Result<States> {
        let c = &self.model.config;
        let mut out = States::new(self.tokens(), c.hidden, self.room.memory / 8, self.room.offload)?;
        let one = an_expert(c);
        let most = 2 * self.device.enter(rayon::current_num_threads) as u64;
        let wave = (self.room.memory / 2 / one).clamp(1, most) as usize;
        let share = layer_work(self.model) * 3 / 2 * self.tokens() as u64 / c.experts as u64;
        for first in (0..c.experts).step_by(wave) {
            let experts = first..c.experts.min(first + wave);
            let done: Vec<Result<Done>> = self
                .device
                .enter(|| experts.clone().into_par_iter().map(|e| self.expert(mlp, e, wave, output)).collect());
            let done: Vec<Done> = done.into_iter().collect::<Result<_>>()?;
            if self.is_read(mlp.layer, output) {
                self.device.enter(|| add_outputs(&mut out, c.hidden, &mlp.routes[experts.clone()], &done));
            }
            for (expert, done) in experts.zip(done) {
                report.errors.extend(done.errors);
                report.notes.extend(done.notes);
                if let Some(coverage) = report.coverage.as_mut().filter(|_| self.is_few(mlp, expert)) {
                    coverage.few.push(expert);
                }
                self.room.progress.advance(share);
            }
        }
        Ok(out)
    }

    fn is_few(&self, mlp: &Mlp, expert: usize) -> bool {
        let count = mlp.routes[expert].len();
        count == 0 || (count as f64) < self.recipe.calibration.few_tokens_threshold * self.tokens() as f64
    }

    /// The tokens that tell about an expert.
    fn telling<'m>(&self, mlp: &'m Mlp, expert: usize) -> Tokens<'m> {
        let calibration = &self.recipe.calibration;
        if !self.is_few(mlp, expert) {
            return Tokens::Routed(&mlp.routes[expert]);
        }
        let all = 0..self.tokens() as u32;
        match calibration.few_tokens {
            FewTokens::Rtn => Tokens::None,
            FewTokens::AllExperts => Tokens::All(all.map(|t| (t, 1.0)).collect()),
            FewTokens::Weighted => {
                let logits = mlp.logits.as_ref().expect("kept where experts may have few tokens");
                let probability = |t: u32| {
                    let row = logits.get(t as usize..t as usize + 1);
                    let max = row.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
                    let sum: f32 = row.iter().map(|l| math::exp(l - max)).sum();
                    math::exp(row[expert] - max) / sum
                };
                Tokens::All(all.map(|t| (t, probability(t))).collect())
            }
        }
    }

    /// Sums over `make`'s rows for these tokens, each row times the root of its weight.
    fn weighted_sums(
        &self,
        tokens: &[(u32, f32)],
        columns: usize,
        by_weight: bool,
        mut make: impl FnMut(usize, &[(u32, f32)]) -> Vec<f32>,
    ) -> Result<Moments> {
        let mut sums = self.device.sums(columns, self.room.hessians())?;
        for (i, chunk) in tokens.chunks(CHUNK).enumerate() {
            let mut rows = make(i * CHUNK, chunk);
            if by_weight {
                for (row, (_, weight)) in rows.chunks_exact_mut(columns).zip(chunk) {
                    let root = weight.sqrt();
                    row.iter_mut().for_each(|v| *v *= root);
                }
            }
            sums.count += chunk.len() as u64;
            moments::add_abs(&rows, &mut sums.abs);
            moments::raise_max(&rows, &mut sums.max);
            moments::add_gram(&rows, columns, &mut sums.gram);
        }
        moments::mirror(&mut sums.gram, columns);
        Ok(sums)
    }

    /// The normed hidden states of some tokens.
    fn gather(&self, mlp: &Mlp, tokens: &[(u32, f32)]) -> Vec<f32> {
        let h = self.model.config.hidden;
        let mut rows = vec![0f32; tokens.len() * h];
        rows.par_chunks_exact_mut(h).with_min_len(64).zip(tokens).for_each(|(row, &(t, _))| {
            let one = t as usize..t as usize + 1;
            match &mlp.normed {
                Some(all) => row.copy_from_slice(all.get(one)),
                None => elementwise::rms_norm(self.x.get(one), mlp.norm, self.model.settings.eps, row),
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
        done: &mut (Vec<(Linear, ErrorSums)>, Vec<String>),
    ) -> Result<Matrix> {
        let c = &self.model.config;
        let weight = containers::open(&self.model.checkpoint, c, &linear)?;
        let (shape, module, float) = (weight.shape(), linear.module(), weight.float());
        let sequential = self.recipe.calibration.sequential_update;
        let scales = mlp.smoothing.filter(|_| linear.proj != Proj::Down).map(|s| &s.scales[..]);
        let bias = match linear.proj {
            Proj::Down => mlp.down_bias[linear.expert * c.hidden..][..c.hidden].to_vec(),
            proj => {
                let both = &mlp.gate_up_bias[linear.expert * 2 * c.intermediate..][..2 * c.intermediate];
                both.iter().skip(usize::from(proj == Proj::Up)).step_by(2).copied().collect()
            }
        };
        let w = self.source_rows(&weight, &module, 0..shape.0, scales)?;
        let Some(treatment) = output.treatment(&linear) else {
            return Ok(Matrix { values: w, shape, inputs: Activations::Float, bias });
        };
        let problem =
            Problem { module: &module, w, scaled: scales.is_some(), columns: shape.1, float, treatment, inputs };
        let rounded: Rounded = solve(problem, self.recipe)?;
        output.put(&linear, 0, &rounded)?;
        done.0.push((linear, rounded.errors));
        done.1.extend(rounded.notes);
        if sequential {
            let inputs = treatment.scheme.map_or(Activations::Float, |s| s.activations);
            Ok(Matrix { values: rounded.values, shape, inputs, bias })
        } else {
            let values = self.source_rows(&weight, &module, 0..shape.0, None)?;
            Ok(Matrix { values, shape, inputs: Activations::Float, bias })
        }
    }

    fn expert(&self, mlp: &Mlp, expert: usize, wave: usize, output: &dyn Output) -> Result<Done> {
        let (c, settings) = (&self.model.config, &self.model.settings);
        let linear = |proj| Linear { proj, layer: mlp.layer, expert };
        let routed = &mlp.routes[expert][..];
        let all = [Proj::Gate, Proj::Up, Proj::Down].map(linear);
        let telling = if self.needs_inputs(output, &all) { self.telling(mlp, expert) } else { Tokens::None };
        let by_weight = |t: &Tokens| match t {
            Tokens::All(_) => self.recipe.calibration.few_tokens == FewTokens::Weighted,
            _ => self.recipe.calibration.router_weighted,
        };
        let mut done = (Vec::new(), Vec::new());
        let tokens: Option<&[(u32, f32)]> = match &telling {
            Tokens::None => None,
            Tokens::Routed(tokens) => Some(tokens),
            Tokens::All(tokens) => Some(tokens),
        };
        let uses_all = matches!(telling, Tokens::All(_));

        let first = [linear(Proj::Gate), linear(Proj::Up)];
        let own;
        let inputs = match tokens.filter(|_| self.needs_inputs(output, &first)) {
            None => None,
            Some(_) if uses_all && !by_weight(&telling) && mlp.all.is_some() => mlp.all.as_ref(),
            Some(tokens) => {
                let sums =
                    self.weighted_sums(tokens, c.hidden, by_weight(&telling), |_, chunk| self.gather(mlp, chunk))?;
                let inputs = Inputs::new(sums);
                own = match mlp.smoothing.filter(|_| !self.recipe.calibration.sequential_update) {
                    Some(smoothing) => smoothing.of_inputs(inputs),
                    None => inputs,
                };
                Some(&own)
            }
        };
        let gate = self.projection(mlp, first[0], inputs, output, &mut done)?;
        let up = self.projection(mlp, first[1], inputs, output, &mut done)?;
        let hidden = |chunk: &[(u32, f32)]| {
            let x = self.gather(mlp, chunk);
            let packed = gate.pack(&x);
            let mut h = gate.apply(&packed, chunk.len());
            let u = if up.inputs == gate.inputs {
                up.apply(&packed, chunk.len())
            } else {
                up.apply(&up.pack(&x), chunk.len())
            };
            h.par_chunks_exact_mut(c.intermediate)
                .zip(u.par_chunks_exact(c.intermediate))
                .with_min_len(16)
                .for_each(|(h, u)| elementwise::swiglu(h, u, settings.alpha, settings.limit));
            h
        };
        let memory = self.room.memory / 8 / wave as u64;
        let mut kept = States::new(routed.len(), c.intermediate, memory, self.room.offload)?;
        let second = linear(Proj::Down);
        let mut keep = |at: usize, chunk: &[(u32, f32)]| {
            let h = hidden(chunk);
            kept.put(at..at + chunk.len(), &h);
            h
        };
        let wanted = tokens.filter(|_| self.needs_inputs(output, &[second]));
        let inputs = match wanted {
            Some(tokens) if !uses_all => {
                Some(self.weighted_sums(tokens, c.intermediate, by_weight(&telling), &mut keep)?)
            }
            other => {
                routed.chunks(CHUNK).enumerate().for_each(|(i, chunk)| drop(keep(i * CHUNK, chunk)));
                let all =
                    |tokens| self.weighted_sums(tokens, c.intermediate, by_weight(&telling), |_, chunk| hidden(chunk));
                other.map(all).transpose()?
            }
        }
        .map(Inputs::new);
        let down = self.projection(mlp, second, inputs.as_ref(), output, &mut done)?;
        if !self.is_read(mlp.layer, output) {
            let outputs = States::new(0, c.hidden, memory, self.room.offload)?;
            return Ok(Done { outputs, errors: done.0, notes: done.1 });
        }
        let mut outputs = States::new(routed.len(), c.hidden, memory, self.room.offload)?;
        for first in (0..routed.len()).step_by(CHUNK) {
            let rows = first..routed.len().min(first + CHUNK);
            let y = down.apply(&down.pack(kept.get(rows.clone())), rows.len());
            outputs.put(rows, &y);
        }
        Ok(Done { outputs, errors: done.0, notes: done.1 })
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
        format!("layer {layer}: {few} of {experts} experts got less than {share} of {tokens} tokens; {how}")
    }
}
