//! A text through a model, one layer after the other over all of it: hidden states are kept, weights are not, so a model
//! of any size fits. Then what its logits say about the text, alone or beside another model's.

pub(crate) mod batches;
mod ranges;
mod states;

use std::ops::Range;
use std::path::Path;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::model::forward::{self, Places};
use crate::model::{Head, Model, ModelConfig};
use crate::ops::compare::RowFigures;
use crate::pipeline::progress::{Progress, Unit};
use crate::text::windows::Sequence;

pub use ranges::half_range;
pub use states::States;

use batches::{Batch, batches, caches};

/// Most tokens that go through a layer together: from here on more bring nothing, weights are decoded often enough.
pub(crate) const MOST_TOKENS: usize = 4096;
/// Most rows of logits at a time.
const MOST_LOGITS: usize = 512;

/// What an evaluation may use. None of it changes a bit.
pub struct Room<'a> {
    /// Most bytes for hidden states in memory and for what a layer computes with.
    pub memory: u64,
    /// Where hidden states go that do not fit.
    pub offload: &'a Path,
    /// Whom to tell.
    pub progress: &'a Progress,
}

/// The figures of a model on a text.
#[derive(Debug, Clone, PartialEq)]
pub struct Figures {
    /// One a token of the text that is not padding, in order.
    pub rows: Vec<RowFigures>,
    /// True where the next token was there to be predicted.
    pub predicted: Vec<bool>,
}

/// The next token of each row, where there is one, and whether the row counts at all.
fn targets(sequences: &[Sequence]) -> (Vec<Option<u32>>, Vec<bool>) {
    let of_one = |s: &Sequence| -> Vec<(Option<u32>, bool)> {
        (0..s.ids.len()).map(|i| ((i + 1 < s.real).then(|| s.ids[i + 1]), i < s.real)).collect()
    };
    sequences.iter().flat_map(of_one).unzip()
}

/// Bytes that a layer needs for one token: every intermediate result that lives at once, and the kernel's copies.
pub(crate) fn bytes_a_token(c: &ModelConfig) -> u64 {
    let attention = 4 * c.heads * c.head_dim + 2 * c.kv_heads * c.head_dim;
    let experts = 4 * c.hidden + 3 * c.intermediate;
    4 * (4 * c.hidden + attention.max(experts)) as u64
}

/// Multiply-adds of a layer for one token, attention's scores left out.
pub(crate) fn layer_work(m: &Model) -> u64 {
    let c = &m.config;
    let attention = 2 * c.hidden * (c.heads + c.kv_heads) * c.head_dim;
    (attention + m.settings.top_k * 3 * c.hidden * c.intermediate) as u64
}

/// Multiply-adds of the output head for one token.
fn head_work(m: &Model) -> u64 {
    (m.config.vocab * m.config.hidden) as u64
}

/// A model, and what it runs on.
pub struct Subject<'a, D> {
    /// The device.
    pub device: &'a D,
    /// The model.
    pub model: &'a Model,
}

impl<D> Clone for Subject<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<D> Copy for Subject<'_, D> {}

/// Figures of `subject` on `sequences`; with a reference, of the distance from it too. Both have one vocabulary.
///
/// # Errors
/// [`Error::Refused`] where a sequence is longer than a model's context, where vocabularies differ, or where a logit is no
/// number.
pub fn evaluate<D: Device>(
    subject: Subject<D>,
    reference: Option<Subject<D>>,
    sequences: &[Sequence],
    room: &Room,
) -> Result<Figures> {
    let model = subject.model;
    let tokens: usize = sequences.iter().map(|s| s.ids.len()).sum();
    let work = |m: &Model| tokens as u64 * (m.config.layers as u64 * layer_work(m) + head_work(m));
    for Subject { device, model: m } in std::iter::once(subject).chain(reference) {
        fits(m, model, sequences)?;
        // Nothing of a layer is copied here but its biases: what is missing or broken shows before the work.
        (0..m.config.layers).try_for_each(|l| m.layer(device, l).map(drop))?;
        m.head(device)?;
    }
    room.progress.start_counting("evaluate", work(model) + reference.map_or(0, |r| work(r.model)), Unit::Work);
    let reference = match reference {
        Some(r) => Some((r, last_states(r, sequences, room)?)),
        None => None,
    };
    let states = last_states(subject, sequences, room)?;
    let figures = compare((subject, states), reference, sequences, room)?;
    room.progress.finish();
    Ok(figures)
}

pub(crate) fn fits(m: &Model, model: &Model, sequences: &[Sequence]) -> Result<()> {
    let dir = m.checkpoint.dir.display();
    if m.config.vocab != model.config.vocab {
        let (a, b) = (m.config.vocab, model.config.vocab);
        return Err(Error::Refused(format!(
            "{dir} has a vocabulary of {a}, {} of {b}",
            model.checkpoint.dir.display()
        )));
    }
    let longest = sequences.iter().map(|s| s.ids.len()).max().unwrap_or(0);
    if longest > m.settings.context {
        return Err(Error::Refused(format!(
            "a sequence has {longest} tokens, and the context of {dir} is {} (max_position_embeddings); use a smaller \
             --max-seq-length",
            m.settings.context
        )));
    }
    let vocab = m.config.vocab;
    if let Some(id) = sequences.iter().flat_map(|s| &s.ids).find(|&&id| id as usize >= vocab) {
        return Err(Error::Refused(format!("the text has token {id}, and the vocabulary of {dir} is {vocab}")));
    }
    Ok(())
}

/// Hidden states behind the last layer, of all tokens.
fn last_states<D: Device>(subject: Subject<D>, sequences: &[Sequence], room: &Room) -> Result<States> {
    let Subject { device, model } = subject;
    let c = &model.config;
    let most = (room.memory / 2 / bytes_a_token(c)).clamp(1, MOST_TOKENS as u64) as usize;
    let batches = batches(sequences.iter().map(|s| s.ids.len()), most);
    let ids: Vec<u32> = sequences.iter().flat_map(|s| &s.ids).copied().collect();
    let mut states = States::new(ids.len(), c.hidden, room.memory / 4, room.offload)?;
    let embedding = model.embedding(device)?;
    for batch in &batches {
        let rows = batch.rows();
        states.put(rows.clone(), &device.download(device.embed(&embedding, &ids[rows])?)?);
    }
    let places = |b: &Batch| Places::new(device, model, &b.starts, &b.lengths);
    let places: Vec<Places<D>> = batches.iter().map(places).collect::<Result<_>>()?;
    for l in 0..c.layers {
        let weights = model.layer(device, l)?;
        // The past of a sequence that goes on in the next batch.
        let mut past = None;
        for (batch, places) in batches.iter().zip(&places) {
            let rows = batch.rows();
            let mut x = device.upload(states.get(rows.clone()).to_vec(), c.hidden)?;
            let mut caches = caches(device, &weights.attention, batch, past.take());
            forward::layer(device, model, &weights, &mut x, places, &mut caches)?;
            past = caches.pop();
            states.put(rows.clone(), &device.download(x)?);
            room.progress.advance(rows.len() as u64 * layer_work(model));
        }
        // The next layer's weights are elsewhere.
        model.checkpoint.release();
    }
    Ok(states)
}

fn compare<D: Device>(
    (subject, states): (Subject<D>, States),
    reference: Option<(Subject<D>, States)>,
    sequences: &[Sequence],
    room: &Room,
) -> Result<Figures> {
    let (targets, counts) = targets(sequences);
    let Subject { device, model } = subject;
    let c = &model.config;
    // Logits and what they are computed from, of both models.
    let a_row = 8 * (c.vocab + 4 * c.hidden) as u64;
    let most = (room.memory / 2 / a_row).clamp(1, MOST_LOGITS as u64) as usize;
    let head = model.head(device)?;
    let reference = match &reference {
        Some((r, s)) => Some((*r, r.model.head(r.device)?, s)),
        None => None,
    };
    let logits = |of: Subject<D>, head: &Head<'_, D>, states: &States, rows: Range<usize>| {
        let Subject { device, model: m } = of;
        let work = rows.len() as u64 * head_work(m);
        let x = device.upload(states.get(rows).to_vec(), m.config.hidden)?;
        let logits = forward::logits(device, m, head, &x);
        m.checkpoint.release();
        room.progress.advance(work);
        logits
    };
    let mut rows = Vec::with_capacity(targets.len());
    for first in (0..targets.len()).step_by(most) {
        let range = first..targets.len().min(first + most);
        let ours = logits(subject, &head, &states, range.clone())?;
        let theirs = match &reference {
            Some((r, head, states)) => Some(logits(*r, head, states, range.clone())?),
            None => None,
        };
        rows.extend(device.compare(&ours, theirs.as_ref(), &targets[range])?);
    }
    if let Some(at) = rows.iter().position(|r| !(r.nll.is_finite() && r.reference_nll.is_finite() && r.kl.is_finite()))
    {
        let dir = model.checkpoint.dir.display();
        return Err(Error::Refused(format!(
            "{dir}: the logits of token {at} of the text are no numbers; its weights or its source's are damaged, \
             or overflow (gptoss-verify check says which)"
        )));
    }
    let keep = |v: Vec<RowFigures>| v.into_iter().zip(&counts).filter(|(_, c)| **c).map(|(r, _)| r).collect();
    let predicted = targets.iter().zip(&counts).filter(|(_, c)| **c).map(|(t, _)| t.is_some()).collect();
    Ok(Figures { rows: keep(rows), predicted })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_counts_for_nothing() {
        let sequences = [Sequence { ids: vec![5, 6, 7, 0], real: 3 }, Sequence { ids: vec![8], real: 1 }];
        let (next, counts) = targets(&sequences);
        assert_eq!(next, [Some(6), Some(7), None, None, None]);
        assert_eq!(counts, [true, true, true, false, true]);
    }
}
