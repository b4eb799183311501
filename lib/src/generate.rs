//! Text from a model, a token at a time.

use std::path::Path;
use std::time::{Duration, Instant};

use candle_core::{Device as CandleDevice, Tensor};
use candle_transformers::generation::{LogitsProcessor, Sampling};
use serde_json::{Map, Value};

use crate::checkpoint::CONFIG;
use crate::checkpoint::files;
use crate::checkpoint::source::read_object;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::forward::Session;

/// Tokens of a prompt that go through the layers together.
const PREFILL: usize = 512;

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingOptions {
    /// 0 takes the most likely token.
    pub temperature: f64,
    /// Only this many of the most likely tokens.
    pub top_k: Option<usize>,
    /// Only the most likely tokens that together have this probability.
    pub top_p: Option<f64>,
    /// The same seed gives the same text on one machine; probabilities go through the system's `expf`.
    pub seed: u64,
}

/// candle's sampler over a row of logits.
pub struct Sampler(LogitsProcessor);

impl Sampler {
    /// # Errors
    /// [`Error::Refused`] for a temperature below 0, a top-k of 0, or a top-p outside (0, 1].
    pub fn new(o: SamplingOptions) -> Result<Self> {
        let refuse = |what: String| Err(Error::Refused(what));
        if !(o.temperature >= 0.0 && o.temperature.is_finite()) {
            return refuse(format!("--temperature is {}, wanted 0 (the most likely token) or more", o.temperature));
        }
        if o.top_k == Some(0) {
            return refuse("--top-k is 0, wanted 1 or more".into());
        }
        if let Some(p) = o.top_p.filter(|p| !(*p > 0.0 && *p <= 1.0)) {
            return refuse(format!("--top-p is {p}, wanted more than 0, and 1 at most"));
        }
        let temperature = o.temperature;
        // Less than any probability of the most likely token: that one alone. candle would round it to nothing.
        let top_p = o.top_p.filter(|p| *p < 1.0).map(|p| p.max(1e-7));
        let sampling = match (o.top_k, top_p) {
            // Temperatures that a division by would overflow on stand for 0.
            _ if temperature < 1e-7 => Sampling::ArgMax,
            (None, None) => Sampling::All { temperature },
            (Some(k), None) => Sampling::TopK { k, temperature },
            (None, Some(p)) => Sampling::TopP { p, temperature },
            (Some(k), Some(p)) => Sampling::TopKThenTopP { k, p, temperature },
        };
        Ok(Self(LogitsProcessor::from_sampling(o.seed, sampling)))
    }

    /// The next token.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        if logits.iter().any(|l| l.is_nan()) {
            return Err(Error::Refused(
                "the model's logits are no numbers; its weights are damaged or overflow".into(),
            ));
        }
        let tensor = Tensor::from_slice(logits, logits.len(), &CandleDevice::Cpu);
        let token = tensor.and_then(|t| self.0.sample(&t));
        token.map_err(|e| Error::Refused(format!("cannot sample from the model's logits: {e}")))
    }
}

/// What `generation_config.json` and `config.json` say about generating.
#[derive(Debug, Clone, PartialEq)]
pub struct Defaults {
    /// Tokens that end a text.
    pub eos: Vec<u32>,
    /// temperature, 1 where it is not said; 0 where do_sample is not true.
    pub temperature: f64,
    /// top_k, where it is more than 0.
    pub top_k: Option<usize>,
    /// top_p.
    pub top_p: Option<f64>,
}

impl Defaults {
    /// Reads them from a checkpoint's folder.
    pub fn read(dir: &Path) -> Result<Self> {
        let file = dir.join("generation_config.json");
        let generation = if files::is_there(&file)? { read_object(&file)? } else { Map::new() };
        let config = read_object(&dir.join(CONFIG))?;
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let ids = |v: &Value| match v {
            Value::Array(list) => list.iter().map(id).collect::<Option<Vec<u32>>>(),
            one => id(one).map(|id| vec![id]),
        };
        let of = |map: &Map<String, Value>, name: &str| map.get(name).filter(|v| !v.is_null()).cloned();
        let eos = match of(&generation, "eos_token_id").or(of(&config, "eos_token_id")) {
            None => Vec::new(),
            Some(v) => ids(&v).ok_or_else(|| {
                let reason =
                    format!("eos_token_id is {v} (here or in {CONFIG}), wanted a token's id or a list of them");
                Error::file(&file, reason)
            })?,
        };
        let number = |name: &str, fits: fn(f64) -> bool| match of(&generation, name) {
            None => Ok(None),
            Some(v) => match v.as_f64().filter(|&x| fits(x)) {
                Some(x) => Ok(Some(x)),
                None => Err(Error::file(&file, format!("{name} is {v}, which cannot be sampled with"))),
            },
        };
        let (warmth, top_p) = (number("temperature", |t| t >= 0.0)?, number("top_p", |p| p > 0.0 && p <= 1.0)?);
        let top_k = number("top_k", |k| k >= 0.0 && k.fract() == 0.0)?.filter(|&k| k > 0.0).map(|k| k as usize);
        // As in transformers, without do_sample the most likely token is taken.
        let sampled = generation.get("do_sample").and_then(Value::as_bool).unwrap_or(false);
        Ok(Self { eos, temperature: if sampled { warmth.unwrap_or(1.0) } else { 0.0 }, top_k, top_p })
    }
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The model said so.
    Eos,
    /// As many tokens as were asked for.
    Length,
    /// The context is full.
    Context,
    /// The caller's `more` said no.
    Stopped,
}

impl Finish {
    /// `eos`, `length`, `context`, `stopped`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Eos => "eos",
            Self::Length => "length",
            Self::Context => "context",
            Self::Stopped => "stopped",
        }
    }
}

/// A text that came to its end.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// The new tokens, without the one that ended the text.
    pub ids: Vec<u32>,
    /// How many tokens were sampled: the one that ended the text counts.
    pub sampled: usize,
    /// Why it ended.
    pub finish: Finish,
    /// From the start to the first new token.
    pub first: Duration,
    /// From the first new token to the last step.
    pub rest: Duration,
}

impl Generated {
    /// New tokens a second after the first; 0 where there was one only.
    pub fn rate(&self) -> f64 {
        let steps = self.sampled.saturating_sub(1);
        if steps == 0 { 0.0 } else { steps as f64 / self.rest.as_secs_f64() }
    }
}

/// Checks a prompt against a model.
///
/// # Errors
/// [`Error::Refused`] where it is empty, longer than the context leaves room for, or has an id outside the vocabulary.
pub fn check_prompt(model: &Model, prompt: &[u32]) -> Result<()> {
    let context = model.settings.context;
    if prompt.is_empty() {
        return Err(Error::Refused("the prompt is empty: it has no tokens".into()));
    }
    if prompt.len() >= context {
        return Err(Error::Refused(format!(
            "the prompt has {} tokens, and the model's context is {context} (max_position_embeddings): there is no room \
             for an answer",
            prompt.len()
        )));
    }
    match prompt.iter().find(|&&id| id as usize >= model.config.vocab) {
        Some(id) => Err(Error::Refused(format!("token {id} is outside the vocabulary of {}", model.config.vocab))),
        None => Ok(()),
    }
}

/// Takes `prompt` in and generates up to `most` tokens; `each` gets every new one and says whether to go on. It is asked
/// before the first token too, with `None`, while the prompt is taken in.
pub fn generate<D: Device>(
    device: &D,
    session: &mut Session<'_, D>,
    context: usize,
    prompt: &[u32],
    (most, eos): (usize, &[u32]),
    sampler: &mut Sampler,
    mut each: impl FnMut(Option<u32>) -> Result<bool>,
) -> Result<Generated> {
    let start = Instant::now();
    let done = |ids, finish, first: Option<Instant>, sampled| {
        let now = Instant::now();
        let first = first.unwrap_or(now);
        Ok(Generated { ids, sampled, finish, first: first - start, rest: now - first })
    };
    let (last, before) = prompt.split_last().expect("the prompt was checked");
    for part in before.chunks(PREFILL) {
        if !each(None)? {
            return done(Vec::new(), Finish::Stopped, None, 0);
        }
        session.advance(part)?;
    }
    let (mut ids, mut next, mut first, mut sampled) = (Vec::new(), *last, None, 0);
    loop {
        if ids.len() == most {
            return done(ids, Finish::Length, first, sampled);
        }
        if session.position() == context {
            return done(ids, Finish::Context, first, sampled);
        }
        let hidden = session.advance(&[next])?;
        next = device.sample(&session.logits(&hidden)?, sampler)?;
        first.get_or_insert_with(Instant::now);
        sampled += 1;
        if eos.contains(&next) {
            return done(ids, Finish::Eos, first, sampled);
        }
        ids.push(next);
        if !each(Some(next))? {
            return done(ids, Finish::Stopped, first, sampled);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(temperature: f64, top_k: Option<usize>, top_p: Option<f64>, seed: u64) -> Sampler {
        Sampler::new(SamplingOptions { temperature, top_k, top_p, seed }).unwrap()
    }

    #[test]
    fn options_mean_what_they_say() {
        let logits: Vec<f32> = (0..50).map(|i| ((i * 37 % 50) as f32) / 10.0).collect();
        let best = (0..50u32).max_by(|a, b| logits[*a as usize].total_cmp(&logits[*b as usize])).unwrap();
        assert_eq!(sampler(0.0, None, None, 1).sample(&logits).unwrap(), best);
        assert_eq!(sampler(5.0, Some(1), None, 2).sample(&logits).unwrap(), best);
        assert_eq!(sampler(1.0, None, Some(1e-6), 3).sample(&logits).unwrap(), best);
        let draw = |seed| {
            let mut s = sampler(2.0, Some(5), Some(0.99), seed);
            (0..100).map(|_| s.sample(&logits).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draw(4), draw(4));
        assert_ne!(draw(4), draw(5));
        let mut order: Vec<u32> = (0..50).collect();
        order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
        assert!(draw(6).iter().all(|t| order[..5].contains(t)));
    }

    #[test]
    fn what_cannot_be_sampled_is_refused() {
        let refused = |temperature, top_k, top_p| {
            Sampler::new(SamplingOptions { temperature, top_k, top_p, seed: 0 }).err().unwrap().to_string()
        };
        assert!(refused(-1.0, None, None).contains("--temperature is -1"));
        assert!(refused(f64::NAN, None, None).contains("--temperature"));
        assert!(refused(1.0, Some(0), None).contains("--top-k is 0"));
        assert!(refused(1.0, None, Some(1.5)).contains("--top-p is 1.5"));
        assert!(sampler(1.0, None, None, 0).sample(&[f32::NAN, 1.0]).is_err());
    }
}
