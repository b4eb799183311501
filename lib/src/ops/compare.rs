//! What a row of logits says: the likelihood of the token that came, and how far it is from another model's row.

use super::for_this_cpu;
use super::math::{LANES, exp};

/// Figures of one position.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RowFigures {
    /// Negative log-likelihood of the target, in nats.
    pub nll: f64,
    /// The same under the reference.
    pub reference_nll: f64,
    /// KL(reference || this), in nats.
    pub kl: f64,
    /// True where both have the same most likely token.
    pub same_top: bool,
}

for_this_cpu! {
    /// log(sum(exp(logits))), summed in eight lanes of f64.
    pub fn log_sum_exp(logits: &[f32]) -> f64 = log_sum_exp_body
}

for_this_cpu! {
    /// sum(p (log p - log q)) for p, q = softmax of the two rows, whose log_sum_exp are `a` and `b`.
    pub fn kl(reference: &[f32], logits: &[f32], a: f64, b: f64) -> f64 = kl_body
}

#[inline(always)]
fn sum(lanes: [f64; LANES]) -> f64 {
    ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]))
}

#[inline(always)]
fn log_sum_exp_body(logits: &[f32]) -> f64 {
    let max = logits.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
    let mut lanes = [0f64; LANES];
    for chunk in logits.chunks(LANES) {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(exp(x - max));
        }
    }
    f64::from(max) + libm::log(sum(lanes))
}

#[inline(always)]
fn kl_body(reference: &[f32], logits: &[f32], a: f64, b: f64) -> f64 {
    let mut lanes = [0f64; LANES];
    let (a32, shift) = (a as f32, a - b);
    for (r, l) in reference.chunks(LANES).zip(logits.chunks(LANES)) {
        for (lane, (&r, &l)) in lanes.iter_mut().zip(r.iter().zip(l)) {
            // p is rounded to f32, the logarithms are not: their difference is what is measured.
            *lane += f64::from(exp(r - a32)) * (f64::from(r) - f64::from(l) - shift);
        }
    }
    sum(lanes)
}

/// The most likely token, the first of equals; NaN counts as greatest, so that it shows.
pub fn argmax(logits: &[f32]) -> usize {
    let mut best = 0;
    for (i, x) in logits.iter().enumerate() {
        if x.total_cmp(&logits[best]).is_gt() {
            best = i;
        }
    }
    best
}

/// Figures of one row; without a reference, `kl` is 0 and `same_top` true.
pub fn figures(logits: &[f32], reference: Option<&[f32]>, target: Option<u32>) -> RowFigures {
    let b = log_sum_exp(logits);
    let nll = |row: &[f32], lse: f64| target.map_or(0.0, |t| lse - f64::from(row[t as usize]));
    let mut f = RowFigures { nll: nll(logits, b), reference_nll: 0.0, kl: 0.0, same_top: true };
    if let Some(r) = reference {
        let a = log_sum_exp(r);
        f.reference_nll = nll(r, a);
        f.kl = kl(r, logits, a, b);
        f.same_top = argmax(r) == argmax(logits);
    }
    f
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn figures_are_what_their_formulas_say(
            rows in prop::collection::vec((-30f32..30.0, -30f32..30.0), 1..50),
        ) {
            let (p, q): (Vec<f32>, Vec<f32>) = rows.into_iter().unzip();
            let target = (p.len() / 2) as u32;
            let f = figures(&q, Some(&p), Some(target));
            let lse = |x: &[f32]| x.iter().map(|&v| f64::from(v).exp()).sum::<f64>().ln();
            let (a, b) = (lse(&p), lse(&q));
            let want: f64 = p.iter().zip(&q).map(|(&x, &y)| {
                let (lp, lq) = (f64::from(x) - a, f64::from(y) - b);
                lp.exp() * (lp - lq)
            }).sum();
            prop_assert!((f.kl - want).abs() < 1e-4 * want.abs().max(0.1), "{} {want}", f.kl);
            let nll = b - f64::from(q[target as usize]);
            prop_assert!((f.nll - nll).abs() < 1e-5 * nll.abs().max(0.1));
            let same = figures(&p, Some(&p), Some(target));
            prop_assert!(same.kl.abs() < 1e-12 && same.same_top);
            prop_assert_eq!(log_sum_exp(&p).to_bits(), log_sum_exp_body(&p).to_bits());
            prop_assert_eq!(kl(&p, &q, a, b).to_bits(), kl_body(&p, &q, a, b).to_bits());
        }
    }
}
