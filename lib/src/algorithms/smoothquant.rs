//! SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): the range of activations goes over into the weights, channel by channel,
//! s = max |x|^a / max |w|^(1 - a), so that both round well.

use crate::ops::math;

/// The scales [columns]: weights are multiplied by them, inputs divided. `inputs` and `weights` are the greatest magnitudes
/// of each channel. A channel that is always zero keeps the scale 1.
pub fn scales(inputs: &[f32], weights: &[f32], strength: f64) -> Vec<f32> {
    let one = |(&x, &w): (&f32, &f32)| {
        if x <= 0.0 || w <= 0.0 {
            return 1.0;
        }
        let a = strength as f32;
        math::exp(a * libm::logf(x) - (1.0 - a) * libm::logf(w)).clamp(1e-5, 1e5)
    };
    inputs.iter().zip(weights).map(one).collect()
}
