//! One linear layer: weights and statistics in, codes out.

use std::sync::OnceLock;

use rayon::prelude::*;

use crate::algorithms::descent::{Quadratic, descend};
use crate::algorithms::gptq::gptq;
use crate::algorithms::rtn::{Codes, ErrorSums, Target};
use crate::algorithms::sweep::{Factor, Rounding, Unfactorable, Zeros, sweep};
use crate::algorithms::{Algorithm, scales, wanda};
use crate::device::Moments;
use crate::error::{Error, Result};
use crate::formats::Params;
use crate::formats::float::Float;
use crate::ops::round;
use crate::recipe::{ActOrder, Observer, Pruner, Recipe, Sparsity, Treatment};

/// What is known of a layer's inputs; layers that read the same inputs share it, and its factors.
pub struct Inputs {
    /// Sums over tokens.
    pub moments: Moments,
    gptq: OnceLock<std::result::Result<Factor, Unfactorable>>,
    pruning: OnceLock<std::result::Result<Factor, Unfactorable>>,
    quadratic: OnceLock<Quadratic>,
}

impl Inputs {
    /// Sums that are complete.
    pub fn new(moments: Moments) -> Self {
        Self { moments, gptq: OnceLock::new(), pruning: OnceLock::new(), quadratic: OnceLock::new() }
    }

    /// Sums of squares, by column.
    pub fn squares(&self) -> Vec<f32> {
        let n = self.moments.abs.len();
        (0..n).map(|i| self.moments.gram[i * n + i]).collect()
    }

    fn factor(&self, order: ActOrder, dampening_frac: f64) -> std::result::Result<Factor, Unfactorable> {
        let m = &self.moments;
        Factor::new(&m.gram, m.count, m.abs.len(), order, dampening_frac)
    }

    /// The factor that GPTQ sweeps with.
    fn for_gptq(&self, recipe: &Recipe) -> std::result::Result<&Factor, Unfactorable> {
        let g = &recipe.gptq;
        self.gptq.get_or_init(|| self.factor(g.actorder, g.dampening_frac)).as_ref().map_err(|e| *e)
    }

    /// What columns are rounded again by.
    fn quadratic(&self, dampening_frac: f64) -> &Quadratic {
        let m = &self.moments;
        self.quadratic.get_or_init(|| Quadratic::new(&m.gram, m.abs.len(), dampening_frac))
    }

    /// The factor that zeros are chosen with, in the order of the columns, which masks of neighbours need.
    fn for_pruning(&self, s: &Sparsity) -> std::result::Result<&Factor, Unfactorable> {
        self.pruning.get_or_init(|| self.factor(ActOrder::Off, s.dampening_frac)).as_ref().map_err(|e| *e)
    }
}

/// A layer's new weight.
#[derive(Debug, Default)]
pub struct Rounded {
    /// `None` for floats.
    pub codes: Option<Codes>,
    /// What a runtime multiplies with, f32 [rows, columns].
    pub values: Vec<f32>,
    /// The distance from what was rounded.
    pub errors: ErrorSums,
    /// What went otherwise than asked.
    pub notes: Vec<String>,
}

/// Rows of a linear layer that is to be rounded.
pub struct Problem<'a> {
    /// The module's name, for messages.
    pub module: &'a str,
    /// f32 [rows, columns], scaled already where a transform asks for it.
    pub w: Vec<f32>,
    /// in_features.
    pub columns: usize,
    /// The type of the weight.
    pub float: Float,
    /// What is to become of it.
    pub treatment: &'a Treatment,
    /// `None` where no token says anything: everything is rounded to nearest then.
    pub inputs: Option<&'a Inputs>,
}

/// Solves it.
///
/// # Errors
/// [`Error::Refused`] where inputs are NaN or infinite, or a weight spans more than its type can scale.
pub fn solve(problem: Problem, recipe: &Recipe) -> Result<Rounded> {
    let Problem { module, w, columns, float, treatment, inputs } = problem;
    let mut notes = Vec::new();
    if let Some(inputs) = inputs
        && !inputs.squares().iter().all(|s| s.is_finite())
    {
        return Err(Error::Refused(format!(
            "the inputs of {module} are NaN or infinite on this text: the checkpoint is damaged, or overflows in f32"
        )));
    }
    let mut usable = |factor: std::result::Result<&'_ Factor, Unfactorable>, asked: f64| match factor {
        Ok(factor) => {
            if factor.dampening_frac > asked {
                notes.push(format!(
                    "{module}: the Hessian was singular; damped by {} of its mean diagonal instead of {asked}",
                    factor.dampening_frac
                ));
            }
            Some(true)
        }
        Err(why) => {
            let why = match why {
                Unfactorable::Empty => "its inputs are all zero on this text",
                Unfactorable::NotFinite => "its Hessian has no factor, however much it is damped",
            };
            notes.push(format!("{module}: {why}, so it was rounded to nearest"));
            None
        }
    };
    let original = w;
    let mut pruned: Option<(Vec<f32>, Vec<bool>)> = None;
    if let Some(s) = &treatment.sparse {
        let factor = match (inputs, s.algorithm) {
            (Some(i), Pruner::Sparsegpt) => Some(i.for_pruning(s)).filter(|f| usable(*f, s.dampening_frac).is_some()),
            _ => None,
        };
        pruned = Some(match factor {
            Some(Ok(factor)) => {
                // Floats that are rounded again later are not rounded now.
                let float = if treatment.scheme.is_some() { Float::F32 } else { float };
                let zeros = Zeros::Choose(s.mask, s.sparsity, s.block_size);
                let swept = sweep(&original, factor, Rounding::Floats(float), zeros);
                (swept.values, swept.zeros)
            }
            _ => {
                let squares = inputs.map(Inputs::squares);
                let zeros = wanda::zeros(&original, columns, squares.as_deref(), s.mask, s.sparsity);
                let kept = original.iter().zip(&zeros).map(|(w, z)| if *z { 0.0 } else { *w }).collect();
                (kept, zeros)
            }
        });
    }
    let (w, zeros) = pruned.as_ref().map_or((&original, None), |(w, z)| (w, Some(z)));
    let mut rounded = match treatment.scheme {
        None => Rounded { values: w.iter().map(|&w| float.round(w)).collect(), ..Rounded::default() },
        Some(scheme) => {
            let target = Target { format: scheme.weights, group: scheme.group(columns), float };
            // Clipping is a part of AWQ (section 3.2 of the paper leaves it to its code).
            let awq = treatment.layer.algorithm == Algorithm::Awq;
            let observer = if awq { Observer::Mse } else { treatment.layer.observer };
            let factor = match (treatment.layer.algorithm, inputs) {
                (Algorithm::Gptq, Some(inputs)) => Some(inputs.for_gptq(recipe)),
                _ => None,
            };
            match factor.filter(|f| usable(*f, recipe.gptq.dampening_frac).is_some()) {
                Some(Ok(factor)) => {
                    let swept = zeros.map_or(Zeros::None, |z| Zeros::Fixed(z));
                    let mut q = gptq(w, factor, target, observer, swept);
                    let quadratic =
                        inputs.filter(|_| recipe.gptq.descent > 0).map(|i| i.quadratic(factor.dampening_frac));
                    // Toward the weight as it was: zeros are made up for here too.
                    for _ in 0..recipe.gptq.descent {
                        descend(
                            &original,
                            &mut q,
                            quadratic.expect("made for a pass"),
                            target,
                            zeros.map(Vec::as_slice),
                        );
                    }
                    Rounded { codes: Some(q.codes), values: q.values, ..Rounded::default() }
                }
                _ => nearest(w, columns, target, observer, inputs.map(Inputs::squares).as_deref()),
            }
        }
    };
    let part = |(values, w): (&[f32], &[f32])| {
        let mut sums = ErrorSums::default();
        round::measure(values, w, &mut sums);
        sums
    };
    let parts: Vec<ErrorSums> =
        rounded.values.par_chunks(columns).zip(original.par_chunks(columns)).map(part).collect();
    parts.iter().for_each(|p| rounded.errors.merge(p));
    if !rounded.errors.squared_error.iter().sum::<f64>().is_finite() {
        let float = float.config_name();
        return Err(Error::Refused(format!("{module} spans more than {float} can scale; is it damaged?")));
    }
    rounded.notes = notes;
    Ok(rounded)
}

/// The weights and the codes of a group.
type Group<'g> = (&'g [f32], &'g mut [i8]);

/// Every weight to its nearest code.
fn nearest(w: &[f32], columns: usize, target: Target, observer: Observer, importance: Option<&[f32]>) -> Rounded {
    let params = scales::fit(w, columns, target, observer, importance);
    let (mut codes, mut values) = (vec![0i8; w.len()], vec![0f32; w.len()]);
    let group = |((w, q), (values, p)): (Group, (&mut [f32], &Params))| {
        let mut unused = ErrorSums::default();
        round::group(w, target.format, *p, target.float, q, &mut unused);
        q.iter().zip(values).for_each(|(q, v)| *v = target.format.dequantize(*q, *p, target.float));
    };
    w.par_chunks_exact(target.group)
        .zip(codes.par_chunks_exact_mut(target.group))
        .zip(values.par_chunks_exact_mut(target.group).zip(&params))
        .with_min_len(64)
        .for_each(group);
    Rounded { codes: Some(Codes { codes, params }), values, ..Rounded::default() }
}
