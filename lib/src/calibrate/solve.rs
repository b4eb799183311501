//! One linear layer: weights and statistics in, codes out.

use std::sync::OnceLock;

use rayon::prelude::*;

use crate::algorithms::descent::{Quadratic, descend};
use crate::algorithms::gptq::gptq;
use crate::algorithms::pt_bitnet::pt_bitnet;
use crate::algorithms::rtn::{Codes, ErrorSums, Target, zeros};
use crate::algorithms::scales::Blocks;
use crate::algorithms::sweep::{Factor, Rounding, Unfactorable, Zeros, sweep};
use crate::algorithms::{Algorithm, scales, wanda};
use crate::device::Moments;
use crate::error::{Error, Result};
use crate::formats::activations::Activations;
use crate::formats::float::Float;
use crate::formats::minifloat::Minifloat;
use crate::formats::{NumberFormat, Params};
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
    /// f32 [rows, columns].
    pub w: Vec<f32>,
    /// Whether a transform's scales are in it, so that it is not of type `float` itself.
    pub scaled: bool,
    /// in_features.
    pub columns: usize,
    /// The type of the weight.
    pub float: Float,
    /// What [`Scheme::target`](crate::containers::compressed_tensors::Scheme::target) asks for.
    pub extremes: (f32, f32),
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
    let (module, columns) = (problem.module, problem.columns);
    if let Some(inputs) = problem.inputs
        && !inputs.squares().iter().all(|s| s.is_finite())
    {
        return Err(Error::Refused(format!(
            "the inputs of {module} are NaN or infinite on this text: the checkpoint is damaged, or overflows in f32"
        )));
    }
    let mut notes = Vec::new();
    let pruned = problem.treatment.sparse.as_ref().map(|s| prune(&problem, s, &mut notes));
    let mut rounded = round_off(&problem, pruned.as_ref(), recipe, &mut notes);
    if problem.treatment.as_floats
        && matches!(problem.treatment.scheme, Some(s) if matches!(s.weights, NumberFormat::Ggml(_)))
    {
        // Theirs are f32, and what is stored is not.
        rounded.values.iter_mut().for_each(|v| *v = problem.float.round(*v));
    }
    if let (Some(codes), Some(scheme)) = (&mut rounded.codes, problem.treatment.scheme)
        && scheme.activations == Activations::StaticFp8
    {
        codes.input_scale = input_scale(&problem, &mut notes);
    }
    let part = |(values, w): (&[f32], &[f32])| {
        let mut sums = ErrorSums::default();
        round::measure(values, w, &mut sums);
        sums
    };
    let parts: Vec<ErrorSums> =
        rounded.values.par_chunks(columns).zip(problem.w.par_chunks(columns)).map(part).collect();
    parts.iter().for_each(|p| rounded.errors.merge(p));
    if let (Some(codes), Some(scheme)) = (&rounded.codes, problem.treatment.scheme) {
        rounded.errors.zeros = zeros(scheme.weights, &codes.codes);
    }
    if !rounded.errors.squared_error.iter().sum::<f64>().is_finite() {
        let float = problem.float.config_name();
        return Err(Error::Refused(format!("{module} spans more than {float} can scale; is it damaged?")));
    }
    rounded.notes = notes;
    Ok(rounded)
}

/// The scale that takes the greatest input of the text to FP8's greatest value.
fn input_scale(problem: &Problem, notes: &mut Vec<String>) -> f32 {
    let greatest = problem.inputs.map_or(0.0, |i| i.moments.max.iter().fold(0f32, |a, &b| a.max(b)));
    if greatest == 0.0 {
        notes.push(format!("{}: its inputs are not known from this text, so their scale is 1", problem.module));
        return 1.0;
    }
    Minifloat::E4M3.fit(-greatest, greatest, problem.float).scale
}

/// The factor, where there is one; notes what is not as it was asked for.
fn usable<'f>(
    factor: std::result::Result<&'f Factor, Unfactorable>,
    asked: f64,
    module: &str,
    instead: &str,
    notes: &mut Vec<String>,
) -> Option<&'f Factor> {
    let why = match factor {
        Ok(factor) => {
            if factor.dampening_frac > asked {
                notes.push(format!(
                    "{module}: the Hessian was singular; damped by {} of its mean diagonal instead of {asked}",
                    factor.dampening_frac
                ));
            }
            return Some(factor);
        }
        Err(Unfactorable::Empty) => "its inputs are all zero on this text",
        Err(Unfactorable::NotFinite) => "its Hessian has no factor, however much it is damped",
    };
    notes.push(format!("{module}: {why}, so {instead}"));
    None
}

/// The weight with its zeros, and where they are.
fn prune(problem: &Problem, s: &Sparsity, notes: &mut Vec<String>) -> (Vec<f32>, Vec<bool>) {
    let Problem { module, w, columns, inputs, .. } = problem;
    let factor = match (inputs, s.algorithm) {
        (Some(inputs), Pruner::Sparsegpt) => {
            usable(inputs.for_pruning(s), s.dampening_frac, module, "its smallest weights became zero", notes)
        }
        _ => None,
    };
    if let Some(factor) = factor {
        // Floats that are rounded again later are not rounded now.
        let float = if problem.treatment.scheme.is_some() { Float::F32 } else { problem.float };
        let swept = sweep(w, factor, Rounding::Floats(float), Zeros::Choose(s.mask, s.sparsity, s.block_size));
        return (swept.values, swept.zeros);
    }
    // Inputs that are all zero tell nothing: magnitude then.
    let squares = inputs.map(Inputs::squares).filter(|s| s.iter().any(|s| *s > 0.0));
    let zeros = wanda::zeros(w, *columns, squares.as_deref(), s.mask, s.sparsity);
    let kept = w.iter().zip(&zeros).map(|(w, z)| if *z { 0.0 } else { *w }).collect();
    (kept, zeros)
}

/// The weight, pruned or whole, as its scheme stores it.
fn round_off(
    problem: &Problem,
    pruned: Option<&(Vec<f32>, Vec<bool>)>,
    recipe: &Recipe,
    notes: &mut Vec<String>,
) -> Rounded {
    let Problem { module, columns, float, treatment, inputs, .. } = problem;
    let (w, zeros) = pruned.map_or((&problem.w, None), |(w, z)| (w, Some(&z[..])));
    let Some(scheme) = treatment.scheme else {
        return Rounded { values: w.iter().map(|&w| float.round(w)).collect(), ..Rounded::default() };
    };
    let target = scheme.target(*columns, *float, problem.extremes);
    let algorithm = treatment.layer.algorithm;
    // Clipping is a part of AWQ (section 3.2 of the paper leaves it to its code).
    let observer = if algorithm == Algorithm::Awq { Observer::Mse } else { treatment.layer.observer };
    let asked = recipe.gptq.dampening_frac;
    let sweeps = matches!(algorithm, Algorithm::Gptq | Algorithm::PtBitnet);
    let swept = inputs.filter(|_| sweeps).and_then(|inputs| {
        usable(inputs.for_gptq(recipe), asked, module, "it was rounded to nearest", notes)
            .map(|factor| (inputs, factor))
    });
    let Some((inputs, factor)) = swept else {
        // Round-to-nearest gets the same codes with a text and without, GPTQ's where it fell back to that too.
        let blocks = inputs.filter(|_| algorithm == Algorithm::Awq);
        let blocks = blocks.map(|i| Blocks::of(&i.moments.gram, *columns, target.group));
        let params = scales::fit(w, *columns, target, observer, blocks.as_ref());
        return nearest(w, *columns, target, params, problem.scaled || zeros.is_some());
    };
    if algorithm == Algorithm::PtBitnet {
        let blocks = Blocks::of(&inputs.moments.gram, *columns, target.group);
        let q = pt_bitnet((w, &problem.w), factor, &blocks, inputs.quadratic(factor.dampening_frac), target, zeros);
        return Rounded { codes: Some(q.codes), values: q.values, ..Rounded::default() };
    }
    let mut q = gptq(w, factor, target, observer, zeros.map_or(Zeros::None, Zeros::Fixed));
    for _ in 0..recipe.gptq.descent {
        // Toward the weight as it was: zeros are made up for here too.
        descend(&problem.w, &mut q, inputs.quadratic(factor.dampening_frac), target, zeros);
    }
    Rounded { codes: Some(q.codes), values: q.values, ..Rounded::default() }
}

/// Every weight to its nearest code; `exact` where weights are not of the target's type themselves.
fn nearest(w: &[f32], columns: usize, target: Target, params: Vec<Params>, exact: bool) -> Rounded {
    let (mut codes, mut values) = (vec![0i8; w.len()], vec![0f32; w.len()]);
    let groups = target.groups(columns);
    let row = |(row, (q, values)): (usize, (&mut [i8], &mut [f32]))| {
        let (w, params) = (&w[row * columns..][..columns], &params[row * groups..][..groups]);
        let parts = w.chunks(target.group).zip(q.chunks_mut(target.group)).zip(values.chunks_mut(target.group));
        for (((w, q), values), p) in parts.zip(params) {
            round::values(w, (target.format, target.float, exact), *p, q, values);
        }
    };
    codes.par_chunks_exact_mut(columns).zip(values.par_chunks_exact_mut(columns)).enumerate().for_each(row);
    Rounded {
        codes: Some(Codes { codes, params, global: target.global, input_scale: 0.0 }),
        values,
        ..Rounded::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::algorithms::rtn::rtn;
    use crate::containers::compressed_tensors::{Scheme, Strategy};
    use crate::formats::int::IntFormat;
    use crate::recipe::{GroupSize, LayerRecipe, SchemeName};

    #[test]
    fn without_inputs_gptq_is_rounding_to_nearest_in_blocks_cut_at_the_edge_too() {
        // 160 columns: a block of 128, and a part of one.
        let (rows, columns) = (130, 160);
        let w: Vec<f32> = (0..rows * columns).map(|i| Float::Bf16.round((i * 31 % 257) as f32 - 128.0)).collect();
        let n = columns;
        let moments = Moments {
            count: 4,
            abs: vec![0.0; n],
            max: vec![0.0; n],
            gram: crate::evaluate::States::new(n, n, u64::MAX, std::path::Path::new(".")).unwrap(),
        };
        let inputs = Inputs::new(moments);
        for strategy in [Strategy::Block(128, 128), Strategy::Tensor, Strategy::Channel] {
            let weights = NumberFormat::Int(IntFormat { num_bits: 4, symmetric: true });
            let scheme = Scheme { weights, strategy, activations: Activations::Float };
            let layer = LayerRecipe {
                algorithm: Algorithm::Gptq,
                group_size: GroupSize::Block,
                observer: Observer::Mse,
                ..LayerRecipe::new(SchemeName::weight_only(4))
            };
            let treatment = Treatment { layer: layer.clone(), scheme: Some(scheme), sparse: None, as_floats: false };
            let extremes = round::extremes(&w);
            let problem = Problem {
                module: "m",
                w: w.clone(),
                scaled: false,
                columns,
                float: Float::Bf16,
                extremes,
                treatment: &treatment,
                inputs: Some(&inputs),
            };
            let solved = solve(problem, &Recipe::new(layer.clone(), layer)).unwrap();
            assert!(solved.notes[0].contains("its inputs are all zero on this text, so it was rounded to nearest"));
            let mut want = Codes::default();
            rtn(&w, columns, scheme.target(columns, Float::Bf16, extremes), Observer::Mse, &mut want);
            let have = solved.codes.unwrap();
            assert_eq!((have.codes, have.params), (want.codes, want.params), "{strategy:?}");
        }
    }
}
