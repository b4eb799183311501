//! What happens to a row of activations between the matrix products: norm, rotary embedding, SwiGLU, additions.

use super::for_this_cpu;
use super::math::{LANES, sigmoid, tree};

for_this_cpu! {
    /// RMSNorm of one row: x / sqrt(mean(x^2) + eps) * weight. Source: Zhang and Sennrich, 2019.
    pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) = rms_norm_body
}

for_this_cpu! {
    /// Rotates the halves of each head of one row: (a, b) -> (a cos - b sin, b cos + a sin), where `cos` and `sin` have one
    /// value a pair [head_dim / 2].
    pub fn rope(x: &mut [f32], cos: &[f32], sin: &[f32]) = rope_body
}

for_this_cpu! {
    /// The clamped SwiGLU of gpt-oss into `gate`: g = min(gate, limit), u = clamp(up, -limit, limit),
    /// (u + 1) g sigmoid(alpha g).
    pub fn swiglu(gate: &mut [f32], up: &[f32], alpha: f32, limit: f32) = swiglu_body
}

for_this_cpu! {
    /// x += y.
    pub fn add(x: &mut [f32], y: &[f32]) = add_body
}

for_this_cpu! {
    /// x += factor * y.
    pub fn add_scaled(x: &mut [f32], factor: f32, y: &[f32]) = add_scaled_body
}

#[inline(always)]
fn rms_norm_body(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mut lanes = [0f32; LANES];
    let (x8, rest) = x.as_chunks::<LANES>();
    for x in x8 {
        for j in 0..LANES {
            lanes[j] = x[j].mul_add(x[j], lanes[j]);
        }
    }
    for (j, x) in rest.iter().enumerate() {
        lanes[j] = x.mul_add(*x, lanes[j]);
    }
    let factor = 1.0 / (tree(lanes) / x.len() as f32 + eps).sqrt();
    for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
        *o = x * factor * w;
    }
}

#[inline(always)]
fn rope_body(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    for head in x.chunks_exact_mut(2 * cos.len()) {
        let (low, high) = head.split_at_mut(cos.len());
        for ((a, b), (c, s)) in low.iter_mut().zip(high).zip(cos.iter().zip(sin)) {
            (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
        }
    }
}

#[inline(always)]
fn swiglu_body(gate: &mut [f32], up: &[f32], alpha: f32, limit: f32) {
    for (g, &u) in gate.iter_mut().zip(up) {
        // `min` and `clamp` of a NaN: a NaN in, a NaN out, never a plausible number.
        let x = if *g > limit { limit } else { *g };
        *g = (u.clamp(-limit, limit) + 1.0) * (x * sigmoid(alpha * x));
    }
}

#[inline(always)]
fn add_body(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

#[inline(always)]
fn add_scaled_body(x: &mut [f32], factor: f32, y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x = factor.mul_add(*y, *x));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn same(a: &[f32], b: &[f32]) -> bool {
        a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
    }

    proptest! {
        #[test]
        fn fast_and_baseline_bodies_agree(x in prop::collection::vec(-20f32..20.0, 2..80)) {
            let y: Vec<f32> = x.iter().rev().copied().collect();
            let n = x.len();
            let (mut a, mut b) = (vec![0f32; n], vec![0f32; n]);
            rms_norm(&x, &y, 1e-5, &mut a);
            rms_norm_body(&x, &y, 1e-5, &mut b);
            prop_assert!(same(&a, &b));
            (a, b) = (x.clone(), x.clone());
            swiglu(&mut a, &y, 1.702, 7.0);
            swiglu_body(&mut b, &y, 1.702, 7.0);
            prop_assert!(same(&a, &b));
            let half = n / 2;
            (a, b) = (x[..2 * half].to_vec(), x[..2 * half].to_vec());
            rope(&mut a, &y[..half], &x[..half]);
            rope_body(&mut b, &y[..half], &x[..half]);
            prop_assert!(same(&a, &b));
        }

        #[test]
        fn norm_and_swiglu_are_what_their_formulas_say(x in prop::collection::vec(-20f32..20.0, 1..80)) {
            let y: Vec<f32> = x.iter().rev().copied().collect();
            let mut out = vec![0f32; x.len()];
            rms_norm(&x, &y, 1e-5, &mut out);
            let mean = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / x.len() as f64;
            for ((o, &x), &w) in out.iter().zip(&x).zip(&y) {
                let want = f64::from(x) / (mean + 1e-5).sqrt() * f64::from(w);
                prop_assert!((f64::from(*o) - want).abs() <= 1e-6 * want.abs().max(1e-3));
            }
            let mut gate = x.clone();
            swiglu(&mut gate, &y, 1.702, 7.0);
            for ((o, &g), &u) in gate.iter().zip(&x).zip(&y) {
                let (g, u) = (f64::from(g).min(7.0), f64::from(u).clamp(-7.0, 7.0));
                let want = (u + 1.0) * g / (1.0 + (-f64::from(1.702f32) * g).exp());
                prop_assert!((f64::from(*o) - want).abs() <= 2e-6 * want.abs().max(1e-3), "{o} {want}");
            }
        }
    }

    #[test]
    fn nan_stays_nan() {
        let mut gate = [f32::NAN, 1.0];
        swiglu(&mut gate, &[1.0, f32::NAN], 1.702, 7.0);
        assert!(gate[0].is_nan() && gate[1].is_nan());
    }
}
