//! How large hidden states become: weights may fit in FP16 while what is computed from them does not.

use half::f16;

use super::batches::{batches, caches};
use crate::device::Device;
use crate::error::Result;
use crate::model::Model;
use crate::model::forward::{self, Places};

/// Tokens of the forward that looks.
const TOKENS: usize = 32;
/// From this share of the largest FP16 number on, another text may well overflow.
const NEAR: f32 = 0.25;

/// The largest absolute value of the residual stream after each layer, over tokens from all over the vocabulary.
fn largest<D: Device>(device: &D, model: &Model) -> Result<Vec<f32>> {
    let c = &model.config;
    let n = TOKENS.min(model.settings.context).min(c.vocab);
    let ids: Vec<u32> = (0..n).map(|i| (i * c.vocab / n) as u32).collect();
    let batch = batches(std::iter::once(n), n).pop().expect("there is one sequence");
    let places = Places::new(device, model, &batch.starts, &batch.lengths)?;
    let mut x = device.embed(&model.embedding(device)?, &ids)?;
    let mut found = Vec::new();
    for l in 0..c.layers {
        let weights = model.layer(device, l)?;
        let mut caches = caches(device, &weights.attention, &batch, None);
        forward::layer(device, model, &weights, &mut x, &places, &mut caches)?;
        let values = device.download(x)?;
        // NaN compares as nothing, and is what an overflow of f32 leads to.
        let most = values.iter().fold(0f32, |m, v| if v.is_nan() { f32::INFINITY } else { m.max(v.abs()) });
        found.push(most);
        x = device.upload(values, c.hidden)?;
        model.checkpoint.release();
    }
    Ok(found)
}

/// What to say of a model whose weights are stored as FP16, so that runtimes compute in FP16; `None` where its hidden
/// states have room there.
pub fn half_range<D: Device>(device: &D, model: &Model) -> Result<Option<String>> {
    let most = f16::MAX.to_f32();
    let found = largest(device, model)?;
    let over = found.iter().position(|&v| v > most);
    let top = found.iter().copied().fold(0f32, f32::max);
    Ok(match over {
        Some(layer) => Some(format!(
            "hidden states reach {top:.3e}, more than FP16 holds ({most}), from layer {layer} on: a runtime that computes in \
             FP16 gives NaN for every logit; run it in BF16 or F32, whatever the weights are stored in"
        )),
        None if top > most * NEAR => Some(format!(
            "hidden states reach {top:.3e} in a forward of {TOKENS} tokens, and FP16 holds {most}: a runtime that computes in \
             FP16 may overflow on another text; run it in BF16 or F32"
        )),
        None => None,
    })
}
