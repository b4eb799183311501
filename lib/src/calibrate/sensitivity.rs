//! What a scheme would cost in each place: how far what an attention, or one expert, makes of a text moves when its weights
//! are rounded, beside the hidden states that it becomes a part of. The text itself goes on through the source's weights.
//!
//! The figure is the sum over tokens of |y' - y|^2 / |x + y|^2, an expert's output weighted by the router. Hidden states are
//! normed before anything reads them, so figures of different layers and experts can be compared and added up.

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::experts::{Done, Share};
use super::{Calibrator, LayerReport, Output, Rounded};
use crate::device::Device;
use crate::error::Result;
use crate::evaluate::{States, layer_work};
use crate::model::Linear;
use crate::ops::elementwise;
use crate::recipe::Treatment;

/// Rounds layers and throws the codes away: only what the rounded layers make of the text is looked at.
#[derive(Debug, Clone, Copy, Default)]
pub struct Trial<'t>(pub Option<&'t BTreeMap<Linear, Treatment>>);

impl Output for Trial<'_> {
    fn treatment(&self, linear: &Linear) -> Option<&Treatment> {
        self.0?.get(linear)
    }

    fn smooths(&self, _layer: usize) -> (bool, bool) {
        (false, false)
    }

    fn put(&self, _linear: &Linear, _first: usize, _rounded: &Rounded) -> Result<()> {
        Ok(())
    }

    fn put_plain(&self, _name: &str, _values: &[f32]) -> Result<()> {
        Ok(())
    }
}

/// What each trial does to a layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerErrors {
    /// Of q, k, v and o together, by trial.
    pub attention: Vec<f64>,
    /// Of gate, up and down of each expert together, by trial.
    pub experts: Vec<Vec<f64>>,
}

impl Calibrator<'_> {
    /// Takes the text through layer `l` as it is.
    pub fn pass(&mut self, l: usize) -> Result<()> {
        self.layer(l, &Trial::default()).map(drop)
    }

    /// The same, and gives what rounding would change. Attention and experts have trials of their own.
    pub fn measure(&mut self, l: usize, attention: &[Trial], experts: &[Trial]) -> Result<LayerErrors> {
        let attention = self.measure_attention(l, attention)?;
        let experts = self.measure_experts(l, experts)?;
        self.model.checkpoint.release();
        Ok(LayerErrors { attention, experts })
    }

    fn measure_attention(&mut self, l: usize, trials: &[Trial]) -> Result<Vec<f64>> {
        let attend = |output: &Trial| {
            self.round_attention(l, self.model.layer(self.device, l)?, output, &mut LayerReport::default())
        };
        let (h, plain) = (self.model.config.hidden, attend(&Trial::default())?);
        let mut moved = Vec::with_capacity(trials.len());
        for trial in trials {
            let rounded = attend(trial)?;
            let mut rows = Vec::with_capacity(self.tokens());
            for batch in &self.batches {
                let outputs = [&plain, &rounded].map(|a| self.attention_output(a, batch));
                let [plain, rounded] = outputs.map(|y| y.and_then(|y| self.device.download(y)));
                rows.extend(distances(&plain?, &rounded?, h));
            }
            moved.push(rows);
            self.room.progress.advance(self.tokens() as u64 * layer_work(self.model) / 2);
        }
        for batch in &self.batches {
            let mut x = self.batch(batch)?;
            self.device.add(&mut x, &self.attention_output(&plain, batch)?)?;
            self.x.put(batch.rows(), &self.device.download(x)?);
        }
        let norms = self.norms();
        let relative = |rows: &Vec<f64>| rows.iter().zip(&norms).map(|(moved, norm)| moved / norm).sum();
        Ok(moved.iter().map(relative).collect())
    }

    fn measure_experts(&mut self, l: usize, trials: &[Trial]) -> Result<Vec<Vec<f64>>> {
        let (h, untouched) = (self.model.config.hidden, Trial::default());
        let front = self.front(l, &untouched, &mut LayerReport::default())?;
        let mlp = self.mlp(l, front, true)?;
        let mut out = States::new(self.tokens(), h, self.room.memory / 8, self.room.offload)?;
        let mut moved = Vec::with_capacity(self.model.config.experts);
        let make = |expert: usize, wave: usize| {
            let plain = self.expert(&mlp, expert, wave, &untouched, true)?;
            let moved = |trial: &Trial| {
                let rounded = self.expert(&mlp, expert, wave, trial, true)?;
                Ok(distances(plain.outputs(), rounded.outputs(), h))
            };
            let moved = trials.iter().map(moved).collect::<Result<Vec<Vec<f64>>>>()?;
            Ok((plain, moved))
        };
        let share = (1 + trials.len() as u64) * self.tokens() as u64 * layer_work(self.model) / 2;
        self.in_waves(make, |experts, made: Vec<(Done, Vec<Vec<f64>>)>| {
            let (done, found): (Vec<Done>, Vec<_>) = made.into_iter().unzip();
            self.device.enter(|| mlp.add_outputs(&mut out, h, experts.clone(), &done));
            moved.extend(found);
            self.room.progress.advance(share * experts.len() as u64 / self.model.config.experts as u64);
        })?;
        for batch in &self.batches {
            let mut x = self.x.get(batch.rows()).to_vec();
            self.device.enter(|| elementwise::add(&mut x, out.get(batch.rows())));
            self.x.put(batch.rows(), &x);
        }
        let norms = self.norms();
        let relative = |(expert, trials): (usize, &Vec<Vec<f64>>)| {
            let sum = |rows: &Vec<f64>| {
                let weighted = |((token, weight), moved): (&Share, &f64)| {
                    f64::from(*weight) * f64::from(*weight) * moved / norms[*token as usize]
                };
                mlp.tokens(expert).iter().zip(rows).map(weighted).sum()
            };
            trials.iter().map(sum).collect()
        };
        Ok(moved.iter().enumerate().map(relative).collect())
    }

    /// |x|^2 of every token; where there is nothing, nothing can be compared with it.
    fn norms(&self) -> Vec<f64> {
        let norm = |x: &[f32]| x.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>();
        let positive = |norm: f64| if norm > 0.0 { norm } else { f64::INFINITY };
        let states = self.x.get(0..self.tokens());
        states.par_chunks_exact(self.model.config.hidden).map(|x| positive(norm(x))).collect()
    }
}

/// |b - a|^2 of each row.
fn distances(a: &[f32], b: &[f32], width: usize) -> Vec<f64> {
    let row = |(a, b): (&[f32], &[f32])| a.iter().zip(b).map(|(a, b)| f64::from(b - a) * f64::from(b - a)).sum();
    a.par_chunks_exact(width).zip(b.par_chunks_exact(width)).map(row).collect()
}
