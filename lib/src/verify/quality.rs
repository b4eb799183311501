//! What a text says about a checkpoint: perplexity, and how far its predictions are from its source's.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::device::cpu::Cpu;
use crate::engine::Numerics;
use crate::error::{Error, Result};
use crate::evaluate::{Figures, Room, Subject, evaluate};
use crate::formats::activations::Activations;
use crate::model::Model;
use crate::text::{Text, TextReport};

/// The quality of a checkpoint on a text. Logarithms are natural.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QualityReport {
    /// The text.
    pub text: TextReport,
    /// What the checkpoint's schemes do to the inputs of linear layers; products and everything else are f32.
    pub activations: Vec<Activations>,
    /// Tokens that were predicted: all but the first of each sequence.
    pub predicted: u64,
    /// Mean negative log-likelihood of a predicted token.
    pub nll: f64,
    /// e^nll.
    pub perplexity: f64,
    /// The same text through the source; absent without one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reference: Option<ReferenceReport>,
    /// What the engine's numerics change: the checkpoint with them beside itself in exact ones. Absent where the figures
    /// above are exact.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub engine: Option<ReferenceReport>,
}

/// A reference's figures, and the distance from it. Distances are over every position, the last of a sequence included.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ReferenceReport {
    /// What the source's schemes do to inputs.
    pub activations: Vec<Activations>,
    /// Mean negative log-likelihood.
    pub nll: f64,
    /// e^nll.
    pub perplexity: f64,
    /// The checkpoint's perplexity over the source's.
    pub perplexity_ratio: f64,
    /// Mean of KL(source || checkpoint).
    pub kl_mean: f64,
    /// Its 99th percentile: the least value that 99% of the positions do not exceed.
    pub kl_p99: f64,
    /// Share of positions whose most likely token is the same.
    pub top1_agreement: f64,
}

/// Measures `model` on `text`, computing with `numerics`, beside `reference` in exact ones where there is one.
pub fn quality(
    device: &Cpu,
    numerics: Numerics,
    model: &Model,
    reference: Option<&Model>,
    text: &Text,
    room: &Room,
) -> Result<QualityReport> {
    if text.sequences.iter().all(|s| s.real < 2) {
        return Err(Error::Refused(
            "every sequence of the text has one token, so there is none to predict; use a longer --max-seq-length or \
             longer documents"
                .into(),
        ));
    }
    // Broken containers are found before the work.
    let activations = model.activations()?;
    let (device, exact) = (device.with(numerics), device.with(Numerics::Exact));
    let subject = Subject { device: &device, model };
    let beside = |model| Subject { device: &exact, model };
    // The engine's own distance needs the same figures where nothing else is asked for.
    let alone = reference.is_none() && numerics == Numerics::Engine;
    let figures = evaluate(subject, reference.or(alone.then_some(model)).map(beside), &text.sequences, room)?;
    let predicted = figures.predicted.iter().filter(|p| **p).count();
    let nll = mean(&figures, |r| r.nll, predicted);
    let perplexity = perplexity_of(nll, model)?;
    let against = |figures: &Figures, model: &Model| distance(figures, model, perplexity, predicted);
    let engine = match numerics {
        Numerics::Exact => None,
        Numerics::Engine if alone => Some(against(&figures, model)?),
        Numerics::Engine => Some(against(&evaluate(subject, Some(beside(model)), &text.sequences, room)?, model)?),
    };
    Ok(QualityReport {
        text: text.report.clone(),
        activations,
        predicted: predicted as u64,
        nll,
        perplexity,
        reference: reference.map(|r| against(&figures, r)).transpose()?,
        engine,
    })
}

/// e^nll. Beyond a float it is an error: a manifest has no number for it.
fn perplexity_of(nll: f64, model: &Model) -> Result<f64> {
    Some(libm::exp(nll)).filter(|p| p.is_finite()).ok_or_else(|| {
        Error::Refused(format!(
            "{}: a token's negative log-likelihood is {nll:e} on average, so it predicts nothing; its weights are damaged or overflow",
            model.checkpoint.dir.display()
        ))
    })
}

/// How far `figures` are from their reference, `model`.
fn distance(figures: &Figures, model: &Model, perplexity: f64, predicted: usize) -> Result<ReferenceReport> {
    let nll = mean(figures, |r| r.reference_nll, predicted);
    let reference = perplexity_of(nll, model)?;
    let mut kl: Vec<f64> = figures.rows.iter().map(|r| r.kl).collect();
    let kl_mean = kl.iter().sum::<f64>() / kl.len() as f64;
    kl.sort_by(f64::total_cmp);
    let same = figures.rows.iter().filter(|r| r.same_top).count();
    Ok(ReferenceReport {
        activations: model.activations()?,
        nll,
        perplexity: reference,
        perplexity_ratio: perplexity / reference,
        kl_mean,
        kl_p99: kl[(kl.len() * 99).div_ceil(100).max(1) - 1],
        top1_agreement: same as f64 / figures.rows.len() as f64,
    })
}

/// The mean over predicted tokens, summed in their order.
fn mean(figures: &Figures, of: impl Fn(&crate::ops::compare::RowFigures) -> f64, predicted: usize) -> f64 {
    let rows = figures.rows.iter().zip(&figures.predicted).filter(|(_, p)| **p);
    rows.map(|(r, _)| of(r)).sum::<f64>() / predicted as f64
}
