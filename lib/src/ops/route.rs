//! The router's choice.

use super::math::exp;

/// The `k` greatest of `logits` (the earlier of equals first), and the softmax over those: `experts` in ascending order,
/// `weights` beside them. The order of experts is the order in which their outputs are added.
pub fn top_k(logits: &[f32], experts: &mut [u32], weights: &mut [f32]) {
    let k = experts.len();
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let greater = |&a: &u32, &b: &u32| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b));
    if k < order.len() {
        order.select_nth_unstable_by(k, greater);
    }
    order.truncate(k);
    order.sort_unstable();
    experts.copy_from_slice(&order);
    let chosen = |&e: &u32| logits[e as usize];
    let max = order.iter().map(chosen).fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a });
    let mut sum = 0f32;
    for (w, e) in weights.iter_mut().zip(&order) {
        *w = exp(chosen(e) - max);
        sum += *w;
    }
    weights.iter_mut().for_each(|w| *w /= sum);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_greatest_are_chosen(logits in prop::collection::vec(-4i8..4, 1..40), k in 1usize..6) {
            let logits: Vec<f32> = logits.into_iter().map(f32::from).collect();
            let k = k.min(logits.len());
            let (mut experts, mut weights) = (vec![0; k], vec![0.0; k]);
            top_k(&logits, &mut experts, &mut weights);
            let mut order: Vec<usize> = (0..logits.len()).collect();
            order.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).unwrap()); // stable: the earlier of equals first
            let mut want = order[..k].to_vec();
            want.sort_unstable();
            prop_assert_eq!(experts.iter().map(|&e| e as usize).collect::<Vec<_>>(), want);
            let total: f32 = experts.iter().map(|&e| logits[e as usize].exp()).sum();
            for (e, w) in experts.iter().zip(&weights) {
                prop_assert!((logits[*e as usize].exp() / total - w).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn nan_and_infinity_do_not_panic() {
        let (mut experts, mut weights) = ([0; 2], [0.0; 2]);
        top_k(&[f32::NAN, f32::NEG_INFINITY, 1.0], &mut experts, &mut weights);
        assert_eq!(experts, [0, 2]);
    }
}
