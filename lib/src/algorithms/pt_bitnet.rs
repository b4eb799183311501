//! PT-BitNet's two stages, for codes of very few bits (Guo et al. 2025, "PT-BitNet: Scaling up the 1-bit large language model
//! with post-training quantization"): first the weights' distribution is brought to the grid, then codes and grid are fitted
//! together, with what the inputs' second moments say of the outputs.
//!
//! Stage 1 looks for the scale of each group under which its nearest codes lose the outputs least, where absmean looks at
//! weights alone. Stage 2 is GPTQ's sweep with these scales, and then turns: each group's scale by least squares with all
//! other errors in mind, each column's codes by coordinate descent. Neither step of a turn raises the loss, but for the
//! rounding of scales to the type that they are stored in.

use super::descent::{Quadratic, descend, refit};
use super::gptq::Quantized;
use super::rtn::{Codes, Target};
use super::scales::{self, Blocks};
use super::sweep::{Factor, Rounding, Zeros, sweep};
use crate::recipe::Observer;

/// Turns of stage 2; later ones change next to nothing.
const TURNS: usize = 6;

/// Quantizes `w` [rows, columns], of which `zeros` stay zero, so that it comes near `whole`, which has no zeros yet; `blocks`
/// and `quadratic` are of the Hessian that `factor` is.
pub fn pt_bitnet(
    (w, whole): (&[f32], &[f32]),
    factor: &Factor,
    blocks: &Blocks,
    quadratic: &Quadratic,
    target: Target,
    zeros: Option<&[bool]>,
) -> Quantized {
    let params = scales::fit(w, factor.columns(), target, Observer::Mse, Some(blocks));
    let swept = sweep(w, factor, Rounding::Codes(target, &params), zeros.map_or(Zeros::None, Zeros::Fixed));
    let codes = Codes { codes: swept.codes, params, global: target.global, input_scale: 0.0 };
    let mut q = Quantized { codes, values: swept.values };
    for _ in 0..TURNS {
        descend(whole, &mut q, quadratic, target, zeros);
        refit(whole, &mut q, quadratic, target);
    }
    descend(whole, &mut q, quadratic, target, zeros);
    q
}
