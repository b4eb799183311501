//! How a container lays a linear layer out in tensors. Reading goes through [`Rows`], whatever the container;
//! a container is one file and one line in [`READERS`].

pub mod compressed_tensors;
pub mod dense;
pub mod gguf;
pub mod openai;
mod padded;
pub mod vllm;

use std::collections::BTreeSet;
use std::ops::Range;

use crate::algorithms::rtn::Codes;
use crate::checkpoint::source::Checkpoint;
use crate::containers::compressed_tensors::Scheme;
use crate::engine::view::View;
use crate::error::{Error, Result};
use crate::formats::activations::Activations;
use crate::formats::float::Float;
use crate::model::padding::Vector;
use crate::model::{self, Fused, Linear, ModelConfig, Proj, Role};
use crate::ops::round;

/// Where a range of columns may begin.
pub const COLUMNS: usize = 256;

/// The weight of one linear layer, read block by block as values.
pub trait Rows: Send + Sync {
    /// (out_features, in_features).
    fn shape(&self) -> (usize, usize);
    /// The type whose rounding the values have: arithmetic on them rounds to it.
    fn float(&self) -> Float;
    /// What the scheme does to the layer's inputs.
    fn inputs(&self) -> Activations {
        Activations::Float
    }
    /// The scale of the inputs, where [`Self::inputs`] has a fixed one.
    fn input_scale(&self) -> f32 {
        1.0
    }
    /// The values at `rows` and `columns` into `out`, f32 [rows, columns]. `columns` begins at a multiple of
    /// [`COLUMNS`] and ends at one or with the row, so that no block that shares a byte is cut.
    fn read(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [f32]);
    /// What its codes mean; `None` where numbers are stored, and for codes that [`Self::codes`] cannot give.
    fn stored(&self) -> Option<Scheme> {
        None
    }
    /// The codes of whole rows as they are stored, and their parameters.
    ///
    /// # Panics
    /// Where [`Self::stored`] is `None`.
    fn codes(&self, _rows: Range<usize>, _out: &mut Codes) {
        panic!("no codes are stored");
    }
    /// The whole weight [out_features, in_features] where it lies in memory as f32.
    fn values(&self) -> Option<&[f32]> {
        None
    }
    /// The stored bytes, where the engine has kernels for them.
    fn view(&self) -> Option<View<'_>> {
        None
    }
    /// Whole rows into `out`, f32 [rows, in_features].
    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        self.read(rows, 0..self.shape().1, out);
    }
}

/// A weight of a checkpoint.
pub type Weight<'a> = Box<dyn Rows + 'a>;

type Reader = for<'a> fn(&'a Checkpoint, &ModelConfig, &Linear) -> Result<Option<Weight<'a>>>;

const READERS: [Reader; 5] = [gguf::open, vllm::open, openai::open, compressed_tensors::open, dense::open];

/// The least and the greatest weight of `linear`, of all that runtimes fuse with it where `fused`; each column times its
/// scale where a transform has some.
pub fn extremes(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    linear: Linear,
    fused: bool,
    scales: Option<&[f32]>,
) -> Result<(f32, f32)> {
    const ROWS: usize = 64;
    let mut found = (0f32, 0f32);
    for linear in if fused { linear.fused_with() } else { vec![linear] } {
        let weight = open(checkpoint, config, &linear)?;
        let (rows, columns) = weight.shape();
        let mut part = vec![0f32; ROWS * columns];
        for first in (0..rows).step_by(ROWS) {
            let some = first..rows.min(first + ROWS);
            let part = &mut part[..some.len() * columns];
            weight.read_rows(some, part);
            if let Some(scales) = scales {
                part.chunks_exact_mut(columns).for_each(|row| row.iter_mut().zip(scales).for_each(|(w, s)| *w *= s));
            }
            let (least, greatest) = round::extremes(part);
            found = (found.0.min(least), found.1.max(greatest));
        }
    }
    Ok(found)
}

/// Opens the weight of `linear` in whatever container the checkpoint has.
///
/// # Errors
/// [`Error::MissingTensor`] where no container has it; [`Error::BadTensor`] where its tensors do not fit the config.
pub fn open<'a>(checkpoint: &'a Checkpoint, config: &ModelConfig, linear: &Linear) -> Result<Weight<'a>> {
    let narrow = checkpoint.padding().map(|p| p.narrow(config));
    for reader in READERS {
        if let Some(weight) = reader(checkpoint, narrow.as_ref().unwrap_or(config), linear)? {
            return Ok(padded::pad(weight, linear.shape(config)));
        }
    }
    Err(Error::MissingTensor {
        dir: checkpoint.dir.clone(),
        tensor: format!("{}.weight", linear.module()),
        reason: format!(
            "config.json implies it, and no container that this tool reads has it{}",
            checkpoint.hint(&format!("{}.weight", linear.module()))
        ),
    })
}

/// Every name that a tensor of this model can have, in any container.
fn known_names(config: &ModelConfig) -> BTreeSet<String> {
    const OF_A_MODULE: [&str; 8] = [
        "weight",
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_global_scale",
        "input_scale",
        "bias",
    ];
    let mut known = BTreeSet::new();
    let mut module = |linear: Linear| known.extend(OF_A_MODULE.map(|t| format!("{}.{t}", linear.module())));
    let mut others = Vec::new();
    for slot in model::slots(config) {
        match slot.role {
            Role::Weight(linear) => module(linear),
            Role::Experts(fused, layer) => {
                others.extend(model::mxfp4_specs(fused, layer, config).map(|s| s.name));
                for expert in 0..config.experts {
                    fused.parts().iter().for_each(|&(proj, _, _)| module(Linear { proj, layer, expert }));
                }
            }
            Role::Plain | Role::ExpertBias(..) => {}
        }
        others.push(slot.name);
    }
    for layer in 0..config.layers {
        for proj in [Proj::Gate, Proj::Up, Proj::Down] {
            let fused = gguf::module(&Linear { proj, layer, expert: 0 });
            others.extend(["weight", "bias"].map(|t| format!("{fused}.{t}")));
        }
        others.extend(vllm::names(config, layer));
    }
    known.extend(others);
    known
}

/// Tensors of a checkpoint that no reading of the model asks for: an output leaves them out. They are found by reading all
/// of the model, so a bias that config.json denies, or a zero point beside symmetric codes, is among them.
pub fn foreign_tensors<'a>(checkpoint: &'a Checkpoint, config: &ModelConfig) -> Vec<&'a str> {
    let (read, mut known) = checkpoint.used_by(|| read_all(checkpoint, config));
    if read.is_err() {
        // What is wrong is said elsewhere; what belongs to the model by its name is no stranger beside it.
        known.extend(known_names(config));
    }
    // Tables that old versions of transformers saved beside the weights, and a head that is the embedding again.
    let spare = |n: &str| n.ends_with(".rotary_emb.inv_freq") || (config.tied && n == "lm_head.weight");
    checkpoint.names().filter(|n| !known.contains(*n) && !spare(n)).collect()
}

/// Asks for every tensor of the model once.
fn read_all(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<()> {
    for slot in model::slots(config) {
        match slot.role {
            Role::Weight(linear) => drop(open(checkpoint, config, &linear)?),
            Role::Experts(fused, layer) => {
                for expert in 0..config.experts {
                    for &(proj, _, _) in fused.parts() {
                        open(checkpoint, config, &Linear { proj, layer, expert })?;
                    }
                }
            }
            Role::ExpertBias(fused, layer) => drop(expert_biases(checkpoint, config, fused, layer)?),
            Role::Plain => drop(checkpoint.tensor(&slot.name)?),
        }
    }
    Ok(())
}

/// Refuses a weight that is there in two forms, blocks beside floats say: whichever were read, the other would be lost.
pub fn refuse_twice(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<()> {
    if checkpoint.is_gguf() {
        return Ok(());
    }
    let one_of = |names: &[String]| {
        let mut there = names.iter().filter_map(|n| checkpoint.get(n));
        match (there.next(), there.next()) {
            (Some(first), Some(second)) => Err(second.error(format!(
                "is the same weight as {} in another form: only one of the two can be meant, remove the other",
                first.name
            ))),
            _ => Ok(()),
        }
    };
    let forms = |linear: &Linear| ["weight", "weight_packed"].map(|t| format!("{}.{t}", linear.module()));
    for slot in model::slots(config) {
        match slot.role {
            Role::Weight(linear) => one_of(&forms(&linear))?,
            Role::Experts(fused, layer) => {
                let whole = fused.name(layer);
                let whole = [whole.clone(), format!("{whole}_blocks")];
                one_of(&whole)?;
                for expert in 0..config.experts {
                    for &(proj, _, _) in fused.parts() {
                        one_of(&[&whole[..], &forms(&Linear { proj, layer, expert })].concat())?;
                    }
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// The biases of all experts of a layer, f32 [E, out] with gate and up interleaved, from the fused tensor or from one
/// tensor an expert.
pub fn expert_biases(checkpoint: &Checkpoint, config: &ModelConfig, fused: Fused, layer: usize) -> Result<Vec<f32>> {
    let Some(padding) = checkpoint.padding() else { return stored_biases(checkpoint, config, fused, layer) };
    let narrow = padding.narrow(config);
    let biases = stored_biases(checkpoint, &narrow, fused, layer)?;
    let (own, wide) = (fused.shape(&narrow).0, fused.shape(config).0);
    let padded = |row: &[f32]| row.iter().copied().chain(std::iter::repeat_n(0.0, wide - own)).collect::<Vec<_>>();
    Ok(biases.chunks_exact(own).flat_map(padded).collect())
}

/// A tensor of the model that is no linear layer's weight, and the type that it is to be stored in.
pub fn vector(checkpoint: &Checkpoint, name: &str, shape: &[usize]) -> Result<(Vec<f32>, Float)> {
    let tensor = checkpoint.tensor(name)?;
    let kind = checkpoint.padding().map_or(Vector::Same, |p| p.vector(name));
    let Some(padding) = checkpoint.padding().filter(|_| kind != Vector::Same) else {
        let values = dense::read(&tensor, shape)?;
        return Ok((values, dense::float_of(&tensor)?));
    };
    let mut values = dense::read(&tensor, &[padding.hidden.0])?;
    let mut float = dense::float_of(&tensor)?;
    if kind == Vector::Norm {
        let factor = padding.norm_factor();
        values.iter_mut().for_each(|v| *v = (f64::from(*v) * factor) as f32);
        float = Float::F32;
    }
    values.resize(padding.hidden.1, 0.0);
    Ok((values, float))
}

/// The type of a layer's expert biases that are not in one tensor; BF16 where F32 holds nothing more.
pub fn expert_bias_float(checkpoint: &Checkpoint, fused: Fused, layer: usize) -> Result<Float> {
    let proj = fused.parts()[0].0;
    let one = Linear { proj, layer, expert: 0 };
    let name = match vllm::kind_of(checkpoint, layer) {
        _ if checkpoint.is_gguf() => format!("{}.bias", gguf::module(&one)),
        Some(kind) => kind.bias(fused, layer, 0),
        None => format!("{}.bias", one.module()),
    };
    dense::float_of(&checkpoint.tensor(&name)?)
}

fn stored_biases(checkpoint: &Checkpoint, config: &ModelConfig, fused: Fused, layer: usize) -> Result<Vec<f32>> {
    let (out, _) = fused.shape(config);
    let mut all = vec![0f32; config.experts * out];
    let whole = format!("{}_bias", fused.name(layer));
    if let Some(tensor) = checkpoint.get(&whole) {
        tensor.expect(&dense::FLOATS, &[config.experts, out])?;
        dense::float_of(&tensor)?.read(tensor.bytes, &mut all);
        return Ok(all);
    }
    if checkpoint.is_gguf() {
        for &(proj, first, step) in fused.parts() {
            let name = format!("{}.bias", gguf::module(&Linear { proj, layer, expert: 0 }));
            let values = dense::read(&checkpoint.tensor(&name)?, &[config.experts, out / step])?;
            all.iter_mut().skip(first).step_by(step).zip(values).for_each(|(o, v)| *o = v);
        }
        return Ok(all);
    }
    if let Some(kind) = vllm::kind_of(checkpoint, layer) {
        for (expert, biases) in all.chunks_exact_mut(out).enumerate() {
            biases.copy_from_slice(&dense::read(&checkpoint.tensor(&kind.bias(fused, layer, expert))?, &[out])?);
        }
        return Ok(all);
    }
    for (expert, biases) in all.chunks_exact_mut(out).enumerate() {
        for &(proj, first, step) in fused.parts() {
            let name = format!("{}.bias", Linear { proj, layer, expert }.module());
            let Some(tensor) = checkpoint.get(&name) else {
                let reason = format!("config.json implies it, and {name} is not there either");
                return Err(Error::MissingTensor { dir: checkpoint.dir.clone(), tensor: whole, reason });
            };
            tensor.expect(&dense::FLOATS, &[out / step])?;
            let mut values = vec![0f32; out / step];
            dense::float_of(&tensor)?.read(tensor.bytes, &mut values);
            for (o, v) in biases.iter_mut().skip(first).step_by(step).zip(values) {
                *o = v;
            }
        }
    }
    Ok(all)
}
