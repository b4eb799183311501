//! One query head against the keys that it sees.

use super::for_this_cpu;
use super::math::{LANES, dot, exp, tree};

/// A query head and what it attends to.
pub struct Head<'a> {
    /// [head_dim].
    pub query: &'a [f32],
    /// [keys, head_dim], oldest first: exactly the positions that the query sees.
    pub keys: &'a [f32],
    /// [keys, head_dim].
    pub values: &'a [f32],
    /// The learned logit that joins the softmax and is dropped after it.
    pub sink: f32,
    /// Factor on every score: 1 / sqrt(head_dim).
    pub scale: f32,
}

for_this_cpu! {
    /// softmax([scores, sink]) without its last column, times the values, into `out` [head_dim]. `scores` is scratch.
    pub fn attend(head: &Head, scores: &mut Vec<f32>, out: &mut [f32]) = attend_body
}

#[inline(always)]
fn attend_body(head: &Head, scores: &mut Vec<f32>, out: &mut [f32]) {
    let dim = head.query.len();
    scores.clear();
    scores.resize(head.keys.len() / dim, 0.0);
    // A plain loop: a closure that an iterator calls out of line would not be compiled for this processor.
    for (s, key) in scores.iter_mut().zip(head.keys.chunks_exact(dim)) {
        *s = dot(head.query, key) * head.scale;
    }
    let max = scores.iter().fold(head.sink, |a, &b| if b > a { b } else { a });
    let mut lanes = [0f32; LANES];
    let (s8, rest) = scores.as_chunks_mut::<LANES>();
    for s in s8 {
        for j in 0..LANES {
            s[j] = exp(s[j] - max);
            lanes[j] += s[j];
        }
    }
    for (j, s) in rest.iter_mut().enumerate() {
        *s = exp(*s - max);
        lanes[j] += *s;
    }
    let sum = tree(lanes) + exp(head.sink - max);
    // Eight columns at a time stay in one register while the values stream by.
    let (o8, o_rest) = out.as_chunks_mut::<LANES>();
    for (c, o) in o8.iter_mut().enumerate() {
        let mut acc = [0f32; LANES];
        for (value, &p) in head.values.chunks_exact(dim).zip(scores.iter()) {
            let v: &[f32; LANES] = value[c * LANES..][..LANES].try_into().expect("a chunk of the head");
            for j in 0..LANES {
                acc[j] = p.mul_add(v[j], acc[j]);
            }
        }
        *o = acc.map(|a| a / sum);
    }
    let done = dim - o_rest.len();
    for (i, o) in o_rest.iter_mut().enumerate() {
        let column = head.values.chunks_exact(dim).zip(scores.iter());
        *o = column.fold(0f32, |acc, (value, &p)| p.mul_add(value[done + i], acc)) / sum;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_head_is_softmax_with_a_sink(
            dim in 1usize..40,
            keys in 1usize..40,
            seed in prop::collection::vec(-3f32..3.0, 64),
            sink in -4f32..4.0,
        ) {
            let make = |n: usize, step: usize| -> Vec<f32> { (0..n).map(|i| seed[(i * step + i / 7) % 64]).collect() };
            let (q, k, v) = (make(dim, 3), make(keys * dim, 5), make(keys * dim, 11));
            let scale = 1.0 / (dim as f32).sqrt();
            let head = Head { query: &q, keys: &k, values: &v, sink, scale };
            let (mut fast, mut plain) = (vec![0f32; dim], vec![1f32; dim]);
            attend(&head, &mut Vec::new(), &mut fast);
            attend_body(&head, &mut Vec::new(), &mut plain);
            prop_assert_eq!(fast.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), plain.iter().map(|v| v.to_bits()).collect::<Vec<_>>());

            let score = |t: usize| (0..dim).map(|d| f64::from(q[d]) * f64::from(k[t * dim + d])).sum::<f64>() * f64::from(scale);
            let exps: Vec<f64> = (0..keys).map(|t| score(t).exp()).collect();
            let total: f64 = exps.iter().sum::<f64>() + f64::from(sink).exp();
            for d in 0..dim {
                let want: f64 = (0..keys).map(|t| exps[t] / total * f64::from(v[t * dim + d])).sum();
                prop_assert!((want - f64::from(fast[d])).abs() < 1e-5, "{want} {}", fast[d]);
            }
        }
    }
}
