//! How far a checkpoint's values are from those of the checkpoint that it was made from.

use std::collections::BTreeMap;
use std::path::Path;

use crate::algorithms::rtn::ErrorSums;
use crate::checkpoint::source::Checkpoint;
use crate::containers;
use crate::error::{Error, Result};
use crate::manifest::{ErrorReport, TensorReport};
use crate::model::padding::Padding;
use crate::model::{self, Linear, ModelConfig, Proj, Role};
use crate::ops::round;
use crate::pipeline::executor;
use crate::pipeline::progress::Progress;

use super::errors::{each, report, summary};

/// Rows that are compared at a time.
const ROWS: usize = 64;

/// What is compared in one piece of work.
enum Pair {
    Linear(Linear),
    Plain(String, Vec<usize>),
    Biases(model::Fused, usize),
}

/// Errors by family, and of all weights together.
pub struct Comparison {
    /// One line a family of matrices, then the other tensors.
    pub tensors: Vec<TensorReport>,
    /// Over everything.
    pub total: ErrorReport,
    /// What was taken back before comparing.
    pub notes: Vec<String>,
}

/// How finely a comparison reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detail {
    /// One line a family: a projection of a layer, all its experts together, with the worst one named.
    Families,
    /// One line a matrix.
    Matrices,
}

/// Scales that went from a norm into what reads it, by the norm's name [H].
type Moved = BTreeMap<String, Vec<f32>>;

/// Compares the checkpoint in `dir` with its source in `src`, value by value, whatever containers the two have. Scales that
/// a transform moved from a norm into the weights behind it are taken back first: they change no output.
///
/// # Errors
/// Where one of them cannot be read, or where they are of different models.
pub fn against(src: &Path, dir: &Path, detail: Detail, threads: usize, progress: &Progress) -> Result<Comparison> {
    let (mut a, b) = (Checkpoint::open(src)?, Checkpoint::open(dir)?);
    let mut config = ModelConfig::parse(src, &a.config)?;
    let other = ModelConfig::parse(dir, &b.config)?;
    let padding = Padding::between(&config, &other);
    if let Some(padding) = padding {
        a.pad(padding);
        config = ModelConfig::parse(src, &a.config)?;
    }
    if config != other {
        let (s, d) = (src.display(), dir.display());
        let differ = config.differences(&other);
        return Err(Error::Refused(format!("{s} and {d} are of different shapes: {differ}")));
    }
    let moved = moved(&a, &b, &config)?;
    let mut pairs = Vec::new();
    for slot in model::slots(&config) {
        match slot.role {
            Role::Plain => pairs.push(Pair::Plain(slot.name, slot.shape)),
            Role::Weight(linear) => pairs.push(Pair::Linear(linear)),
            Role::ExpertBias(fused, layer) => pairs.push(Pair::Biases(fused, layer)),
            Role::Experts(fused, layer) => {
                let each = |expert| {
                    fused.parts().iter().map(move |&(proj, _, _)| Pair::Linear(Linear { proj, layer, expert }))
                };
                pairs.extend((0..config.experts).flat_map(each));
            }
        }
    }
    // Both sides as 16-bit floats: what a reader would take the sizes for.
    progress.start("compare", pairs.iter().map(|p| 4 * p.parameters(&config)).sum());
    let sums = executor::map(&pairs, threads, |pair| {
        let sums = pair.compare(&a, &b, &config, &moved)?;
        progress.advance(4 * pair.parameters(&config));
        Ok(sums)
    })?;
    progress.finish();
    a.unchanged()?;
    b.unchanged()?;
    let mut total = ErrorSums::default();
    sums.iter().for_each(|s| total.merge(s));
    let matrices = pairs.iter().zip(&sums).filter_map(|(p, s)| match p {
        Pair::Linear(l) => Some((*l, stored(&b, &config, l), *s)),
        _ => None,
    });
    let mut tensors = match detail {
        Detail::Families => report(matrices),
        Detail::Matrices => each(matrices),
    };
    for (pair, s) in pairs.iter().zip(&sums) {
        let name = match pair {
            Pair::Linear(_) => continue,
            Pair::Plain(name, _) => name.clone(),
            Pair::Biases(fused, layer) => format!("{}_bias", fused.name(*layer)),
        };
        let stored = b.get(&name).map_or_else(|| "split".into(), |t| t.info.dtype.to_string().to_lowercase());
        tensors.push(TensorReport { name, tensors: 1, parameters: s.count, stored, error: Some(summary(s, None)) });
    }
    let mut notes: Vec<String> = a.remarks.iter().chain(&b.remarks).cloned().collect();
    notes.extend(padding.iter().map(|p| {
        let ((h, wide_h), (i, wide_i)) = (p.hidden, p.intermediate);
        format!("the source is compared as the wider model that it was padded to: hidden size {h} as {wide_h}, intermediate size {i} as {wide_i}")
    }));
    notes.extend((!moved.is_empty()).then(|| {
        let names: Vec<&str> = moved.keys().map(String::as_str).collect();
        format!(
            "scales went from norms into what reads them, and are taken back in this comparison: {}",
            names.join(", ")
        )
    }));
    Ok(Comparison { tensors, total: summary(&total, None), notes })
}

/// Norms that differ by powers of two alone, as AWQ and SmoothQuant here make them.
fn moved(a: &Checkpoint, b: &Checkpoint, config: &ModelConfig) -> Result<Moved> {
    let mut moved = Moved::new();
    for name in
        (0..config.layers).flat_map(|l| [Proj::Q, Proj::Gate].into_iter().filter_map(move |p| norm_before(p, l)))
    {
        let read = |c: &Checkpoint| containers::vector(c, &name, &[config.hidden]).map(|v| v.0);
        let (was, is) = (read(a)?, read(b)?);
        let ratio = |(was, is): (&f32, &f32)| if was == is { 1.0 } else { was / is };
        let scales: Vec<f32> = was.iter().zip(&is).map(ratio).collect();
        let power_of_two = |s: &f32| s.is_normal() && *s > 0.0 && s.to_bits() & 0x7f_ffff == 0;
        if scales.iter().any(|s| *s != 1.0) && scales.iter().all(power_of_two) {
            moved.insert(name, scales);
        }
    }
    Ok(moved)
}

/// The norm that feeds a projection.
fn norm_before(proj: Proj, layer: usize) -> Option<String> {
    let norm = match proj {
        Proj::Q | Proj::K | Proj::V => "input_layernorm",
        Proj::Router | Proj::Gate | Proj::Up => "post_attention_layernorm",
        _ => return None,
    };
    Some(format!("model.layers.{layer}.{norm}.weight"))
}

/// How a layer of `checkpoint` is stored.
fn stored(checkpoint: &Checkpoint, config: &ModelConfig, linear: &Linear) -> String {
    if let Ok(Some(scheme)) = containers::open(checkpoint, config, linear).map(|w| w.stored()) {
        return scheme.weights.name();
    }
    // Codes that have no rows of their own, or none at all.
    match containers::compressed_tensors::config::scheme_of(checkpoint, &linear.module()) {
        Ok(Some(s)) => s.weights.name(),
        _ => "float".into(),
    }
}

impl Pair {
    fn parameters(&self, config: &ModelConfig) -> u64 {
        let n = match self {
            Self::Linear(l) => l.shape(config).0 * l.shape(config).1,
            Self::Plain(_, shape) => shape.iter().product(),
            Self::Biases(fused, _) => config.experts * fused.shape(config).0,
        };
        n as u64
    }

    fn compare(&self, a: &Checkpoint, b: &Checkpoint, config: &ModelConfig, moved: &Moved) -> Result<ErrorSums> {
        let mut sums = ErrorSums::default();
        match self {
            Self::Linear(linear) => {
                let scales = norm_before(linear.proj, linear.layer).and_then(|norm| moved.get(&norm));
                let (a, b) = (containers::open(a, config, linear)?, containers::open(b, config, linear)?);
                let (out, inp) = linear.shape(config);
                let (mut x, mut y) = (vec![0f32; ROWS * inp], vec![0f32; ROWS * inp]);
                for start in (0..out).step_by(ROWS) {
                    let rows = start..out.min(start + ROWS);
                    let n = rows.len() * inp;
                    a.read_rows(rows.clone(), &mut x[..n]);
                    b.read_rows(rows, &mut y[..n]);
                    if let Some(scales) = scales {
                        y[..n].chunks_exact_mut(inp).for_each(|y| y.iter_mut().zip(scales).for_each(|(y, s)| *y /= s));
                    }
                    measure(&mut y[..n], &mut x[..n], &mut sums);
                }
            }
            Self::Plain(name, shape) => {
                let mut x = containers::vector(a, name, shape)?.0;
                let mut y = containers::vector(b, name, shape)?.0;
                if let Some(scales) = moved.get(name) {
                    y.iter_mut().zip(scales).for_each(|(y, s)| *y *= s);
                }
                measure(&mut y, &mut x, &mut sums);
            }
            Self::Biases(fused, layer) => {
                let mut x = containers::expert_biases(a, config, *fused, *layer)?;
                let mut y = containers::expert_biases(b, config, *fused, *layer)?;
                measure(&mut y, &mut x, &mut sums);
            }
        }
        Ok(sums)
    }
}

/// Adds the error of `values` against `reference`; pairs with NaN or infinity are counted and made zero first.
fn measure(values: &mut [f32], reference: &mut [f32], sums: &mut ErrorSums) {
    let bad = |v: &[f32]| v.iter().fold(false, |any, v| any | !v.is_finite());
    if bad(values) || bad(reference) {
        for (v, r) in values.iter_mut().zip(reference.iter_mut()).filter(|(v, r)| !v.is_finite() || !r.is_finite()) {
            (*v, *r) = (0.0, 0.0);
            sums.non_finite += 1;
        }
    }
    round::measure(values, reference, sums);
}
