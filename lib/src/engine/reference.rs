//! What every kernel must give, to the bit: one output at a time.

use super::inputs::Inputs;
use super::view::{GROUP, View};
use crate::ops::math::tree;

/// Chains of an output of a float kernel.
pub const CHAINS: usize = 16;

/// Output `r` of row `i` of the inputs, for integers: the exact sum of each group of 32 columns, times the product of the
/// weight's scale and the inputs', summed along two chains of fused multiply-adds: even groups and odd ones.
pub fn integers(view: &View, r: usize, inputs: &Inputs, i: usize) -> f32 {
    let (kind, groups) = (view.kind(), view.groups());
    let mut chains = [0f32; 2];
    for g in 0..groups {
        let sum: i32 = (g * GROUP..(g + 1) * GROUP)
            .map(|c| {
                let unit = view.unit(r, c / kind.unit());
                kind.integer(unit, c % kind.unit()) * i32::from(inputs.codes[i * inputs.columns + c])
            })
            .sum();
        let scale = view.scale(r, g * GROUP) * (inputs.scales[i * groups + g] * kind.step());
        chains[g % 2] = (sum as f32).mul_add(scale, chains[g % 2]);
    }
    chains[0] + chains[1]
}

/// Output `r` for the inputs `x`, for floats: column c belongs to chain c mod 16; the chains' sum times the row's scale.
pub fn floats(view: &View, r: usize, x: &[f32]) -> f32 {
    let kind = view.kind();
    let mut chains = [0f32; CHAINS];
    for (c, x) in x.iter().enumerate() {
        let w = kind.float(view.unit(r, c / kind.unit()), c % kind.unit());
        chains[c % CHAINS] = x.mul_add(w, chains[c % CHAINS]);
    }
    sum(&chains) * view.scale(r, 0)
}

/// The sum of the chains of a float kernel.
#[inline(always)]
pub fn sum(chains: &[f32; CHAINS]) -> f32 {
    tree(std::array::from_fn(|i| chains[2 * i] + chains[2 * i + 1]))
}
