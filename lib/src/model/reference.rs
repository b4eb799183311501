//! gpt-oss in plain candle tensors: one sequence, no cache, every weight dense in f32. It is here to be read beside the
//! model card and to hold [`super::forward`] to what it says; nothing else uses it.

use candle_core::{D, DType, Device, Result, Tensor};

use super::{Fused, Linear, Model, Proj};
use crate::containers;

fn weight(model: &Model, proj: Proj, layer: usize, expert: usize) -> Result<Tensor> {
    let linear = Linear { proj, layer, expert };
    let (out, inp) = linear.shape(&model.config);
    let rows = containers::open(&model.checkpoint, &model.config, &linear).map_err(candle_core::Error::wrap)?;
    let mut values = vec![0f32; out * inp];
    rows.read_rows(0..out, &mut values);
    Tensor::from_vec(values, (out, inp), &Device::Cpu)
}

fn plain(model: &Model, name: &str) -> Result<Tensor> {
    let t = model.checkpoint.tensor(name).map_err(candle_core::Error::wrap)?;
    let values = containers::dense::read(&t, &t.info.shape).map_err(candle_core::Error::wrap)?;
    Tensor::from_vec(values, t.info.shape.as_slice(), &Device::Cpu)
}

fn norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let variance = (x.sqr()?.mean_keepdim(D::Minus1)? + f64::from(eps))?;
    x.broadcast_div(&variance.sqrt()?)?.broadcast_mul(weight)
}

/// Rotates the halves of each head: `x` [heads, tokens, head_dim].
fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let half = x.dim(D::Minus1)? / 2;
    let (a, b) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
    let low = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
    let high = (b.broadcast_mul(cos)? + a.broadcast_mul(sin)?)?;
    Tensor::cat(&[low, high], D::Minus1)
}

/// 0 where row i may look at column j, minus infinity elsewhere.
fn mask(tokens: usize, window: Option<usize>) -> Result<Tensor> {
    let see = |i: usize, j: usize| j <= i && window.is_none_or(|w| i - j < w);
    let values = (0..tokens * tokens).map(|n| if see(n / tokens, n % tokens) { 0f32 } else { f32::NEG_INFINITY });
    Tensor::from_vec(values.collect(), (tokens, tokens), &Device::Cpu)
}

fn attention(model: &Model, l: usize, x: &Tensor) -> Result<Tensor> {
    let (c, s) = (&model.config, &model.settings);
    let tokens = x.dim(0)?;
    let linear = |x: &Tensor, proj: Proj| {
        let y = x.matmul(&weight(model, proj, l, 0)?.t()?)?;
        if !c.attention_bias {
            return Ok(y);
        }
        y.broadcast_add(&plain(model, &format!("model.layers.{l}.self_attn.{}.bias", proj.name()))?)
    };
    let heads = |x: Tensor, n: usize| x.reshape((tokens, n, c.head_dim))?.transpose(0, 1)?.contiguous();
    let (cos, sin) = s.rope.table(0..tokens);
    let half = (tokens, c.head_dim / 2);
    let (cos, sin) = (Tensor::from_vec(cos, half, &Device::Cpu)?, Tensor::from_vec(sin, half, &Device::Cpu)?);
    let q = rope(&heads(linear(x, Proj::Q)?, c.heads)?, &cos, &sin)?;
    let k = rope(&heads(linear(x, Proj::K)?, c.kv_heads)?, &cos, &sin)?;
    let v = heads(linear(x, Proj::V)?, c.kv_heads)?;
    // Each key/value head serves as many query heads as there are to one of it.
    let group = c.heads / c.kv_heads;
    let spread =
        |t: Tensor| t.unsqueeze(1)?.repeat((1, group, 1, 1))?.reshape((c.heads, tokens, c.head_dim))?.contiguous();
    let (k, v) = (spread(k)?, spread(v)?);
    let scores = (q.matmul(&k.transpose(1, 2)?.contiguous()?)? / (c.head_dim as f64).sqrt())?;
    let scores = scores.broadcast_add(&mask(tokens, s.windows[l])?)?;
    let sinks = plain(model, &format!("model.layers.{l}.self_attn.sinks"))?;
    let sinks = sinks.reshape((c.heads, 1, 1))?.broadcast_as((c.heads, tokens, 1))?;
    let all = Tensor::cat(&[scores, sinks.contiguous()?], D::Minus1)?;
    let exps = all.broadcast_sub(&all.max_keepdim(D::Minus1)?)?.exp()?;
    let shares = exps.broadcast_div(&exps.sum_keepdim(D::Minus1)?)?.narrow(D::Minus1, 0, tokens)?.contiguous()?;
    let mixed = shares.matmul(&v)?.transpose(0, 1)?.reshape((tokens, c.heads * c.head_dim))?;
    linear(&mixed, Proj::O)
}

fn expert(model: &Model, l: usize, e: usize, x: &Tensor) -> Result<Tensor> {
    let s = &model.settings;
    let bias = |fused: Fused, first: usize, step: usize| {
        let all = containers::expert_biases(&model.checkpoint, &model.config, fused, l);
        let all = all.map_err(candle_core::Error::wrap)?;
        let out = fused.shape(&model.config).0;
        let mine: Vec<f32> = all[e * out..(e + 1) * out].iter().skip(first).step_by(step).copied().collect();
        Tensor::new(mine, &Device::Cpu)
    };
    let linear = |x: &Tensor, proj, bias: Tensor| x.matmul(&weight(model, proj, l, e)?.t()?)?.broadcast_add(&bias);
    let limit = f64::from(s.limit);
    let gate = linear(x, Proj::Gate, bias(Fused::GateUp, 0, 2)?)?.minimum(limit)?;
    let up = linear(x, Proj::Up, bias(Fused::GateUp, 1, 2)?)?.clamp(-limit, limit)?;
    let sigmoid = ((&gate * -f64::from(s.alpha))?.exp()? + 1.0)?.recip()?;
    let hidden = ((up + 1.0)? * (gate * sigmoid)?)?;
    linear(&hidden, Proj::Down, bias(Fused::Down, 0, 1)?)
}

fn experts(model: &Model, l: usize, x: &Tensor) -> Result<Tensor> {
    let router = weight(model, Proj::Router, l, 0)?.t()?;
    let scores = x.matmul(&router)?.broadcast_add(&plain(model, &format!("model.layers.{l}.mlp.router.bias"))?)?;
    let rows = scores.to_vec2::<f32>()?;
    let mut shares = vec![0f32; rows.len() * model.config.experts];
    for (row, shares) in rows.iter().zip(shares.chunks_exact_mut(model.config.experts)) {
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        order.truncate(model.settings.top_k);
        let total: f32 = order.iter().map(|&e| (row[e] - row[order[0]]).exp()).sum();
        order.iter().for_each(|&e| shares[e] = (row[e] - row[order[0]]).exp() / total);
    }
    let shares = Tensor::from_vec(shares, scores.dims2()?, &Device::Cpu)?;
    let mut sum = x.zeros_like()?;
    for e in 0..model.config.experts {
        sum = (sum + expert(model, l, e, x)?.broadcast_mul(&shares.narrow(1, e, 1)?)?)?;
    }
    Ok(sum)
}

/// Logits [tokens, V] of one sequence.
pub fn logits(model: &Model, ids: &[u32]) -> Result<Tensor> {
    let eps = model.settings.eps;
    let ids = Tensor::new(ids, &Device::Cpu)?;
    let mut x = weight(model, Proj::Embed, 0, 0)?.index_select(&ids, 0)?.to_dtype(DType::F32)?;
    for l in 0..model.config.layers {
        let normed = norm(&x, &plain(model, &format!("model.layers.{l}.input_layernorm.weight"))?, eps)?;
        x = (&x + attention(model, l, &normed)?)?;
        let normed = norm(&x, &plain(model, &format!("model.layers.{l}.post_attention_layernorm.weight"))?, eps)?;
        x = (&x + experts(model, l, &normed)?)?;
    }
    let head = if model.config.tied { Proj::Embed } else { Proj::LmHead };
    norm(&x, &plain(model, "model.norm.weight")?, eps)?.matmul(&weight(model, head, 0, 0)?.t()?)
}
