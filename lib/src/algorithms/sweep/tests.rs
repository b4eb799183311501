//! Properties of the sweep; `noise`, `gram` and `loss` serve the descent's tests too.

use super::*;
use crate::algorithms::gptq::gptq;
use crate::algorithms::rtn::{Codes, rtn};
use crate::formats::NumberFormat;
use crate::formats::ggml::Ggml;
use crate::formats::int::IntFormat;
use crate::formats::minifloat::Minifloat;
use crate::ops::moments;
use crate::recipe::Observer;
use proptest::prelude::*;

/// Numbers between -1 and 1 that depend on the seed alone.
pub(crate) fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut s = seed | 1;
    let mut next = || {
        s = s.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((s >> 40) as f32 / (1u64 << 23) as f32) - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// Sums of x x^T over tokens whose columns depend on each other; `dead` columns are zero.
pub(crate) fn gram(seed: u64, tokens: usize, n: usize, dead: usize) -> Vec<f32> {
    let raw = noise(seed, tokens * n);
    let mut x = vec![0f32; tokens * n];
    for (x, raw) in x.chunks_exact_mut(n).zip(raw.chunks_exact(n)) {
        for j in 0..n {
            x[j] = raw[j] * (1.0 + (j % 7) as f32) + 0.8 * raw[(j + 1) % n] + 0.5 * raw[(j * 3) % n];
        }
        x[n - dead..].fill(0.0);
    }
    let mut gram = vec![0f32; n * n];
    moments::add_gram(&x, n, &mut gram);
    moments::mirror(&mut gram, n);
    gram
}

/// tr(D G D^T) / count with D = q - w.
pub(crate) fn loss(q: &[f32], w: &[f32], gram: &[f32], n: usize, count: usize) -> f64 {
    let mut total = 0f64;
    for (q, w) in q.chunks_exact(n).zip(w.chunks_exact(n)) {
        let d: Vec<f64> = q.iter().zip(w).map(|(q, w)| f64::from(q - w)).collect();
        for (d_i, row) in d.iter().zip(gram.chunks_exact(n)) {
            total += d_i * row.iter().zip(&d).map(|(g, d)| f64::from(*g) * d).sum::<f64>();
        }
    }
    total / count as f64
}

fn formats() -> impl Strategy<Value = NumberFormat> {
    let int =
        (2u8..=8, any::<bool>()).prop_map(|(num_bits, symmetric)| NumberFormat::Int(IntFormat { num_bits, symmetric }));
    let float = prop::sample::select(&Minifloat::ALL[..]);
    prop_oneof![
        3 => int,
        2 => float.clone().prop_map(NumberFormat::Float),
        2 => float.prop_map(NumberFormat::Mx),
        1 => Just(NumberFormat::Nvfp4),
        2 => prop::sample::select(&Ggml::ALL[..]).prop_map(NumberFormat::Ggml),
    ]
}

fn orders() -> impl Strategy<Value = ActOrder> {
    prop_oneof![Just(ActOrder::Static), Just(ActOrder::Off)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn gptq_loses_no_more_than_rounding_to_nearest(
        seed: u64,
        rows in 24usize..60,
        groups in 1usize..4,
        dead in 0usize..3,
        format in formats(),
        order in orders(),
    ) {
        let (n, tokens) = (32 * groups, 256);
        let (w, gram) = (noise(seed ^ 77, rows * n), gram(seed, tokens, n, dead));
        let target = Target::new(format, 32, Float::Bf16);
        let w: Vec<f32> = w.into_iter().map(|w| Float::Bf16.round(w)).collect();
        let factor = Factor::new(&gram, tokens as u64, n, order, 0.01).unwrap();
        prop_assert_eq!((factor.dead(), factor.dampening_frac), (dead, 0.01));
        let ours = gptq(&w, &factor, target, Observer::Minmax, Zeros::None);
        for (i, (&code, value)) in ours.codes.codes.iter().zip(&ours.values).enumerate() {
            prop_assert_eq!(format.dequantize(code, ours.codes.params[i / 32], Float::Bf16), *value);
        }
        let mut nearest = Codes::default();
        rtn(&w, n, target, Observer::Minmax, &mut nearest);
        let value = |(i, &c): (usize, &i8)| format.dequantize(c, nearest.params[i / 32], Float::Bf16);
        let rounded: Vec<f32> = nearest.codes.iter().enumerate().map(value).collect();
        let (a, b) = (loss(&ours.values, &w, &gram, n, tokens), loss(&rounded, &w, &gram, n, tokens));
        prop_assert!(a <= b, "{} > {}", a, b);
    }

    /// Not in every row, for it looks at one column after the other, but over some dozens.
    #[test]
    fn choosing_zeros_with_what_the_others_make_up_for_beats_choosing_by_size(seed: u64, rows in 24usize..60, n in 1usize..16) {
        let (n, tokens) = (n * 16, 300);
        let (w, gram) = (noise(seed ^ 5, rows * n), gram(seed, tokens, n, 0));
        let factor = Factor::new(&gram, tokens as u64, n, ActOrder::Off, 0.01).unwrap();
        let mask = Mask::Structured { zeros: 2, of: 4 };
        let sparse = sweep(&w, &factor, Rounding::Floats(Float::F32), Zeros::Choose(mask, 0.5, 128));
        let cut = crate::algorithms::wanda::zeros(&w, n, None, mask, 0.5);
        let kept: Vec<f32> = w.iter().zip(&cut).map(|(w, z)| if *z { 0.0 } else { *w }).collect();
        let (ours, by_size) = (loss(&sparse.values, &w, &gram, n, tokens), loss(&kept, &w, &gram, n, tokens));
        prop_assert!(ours <= by_size, "{} > {}", ours, by_size);
    }

    #[test]
    fn two_of_four_become_zero_and_stay_zero(seed: u64, rows in 1usize..40, n in 1usize..16, order in orders()) {
        let (n, tokens) = (n * 16, 300);
        let (w, gram) = (noise(seed ^ 5, rows * n), gram(seed, tokens, n, 0));
        let factor = Factor::new(&gram, tokens as u64, n, ActOrder::Off, 0.01).unwrap();
        let mask = Mask::Structured { zeros: 2, of: 4 };
        let sparse = sweep(&w, &factor, Rounding::Floats(Float::F32), Zeros::Choose(mask, 0.5, 128));
        for (zeros, values) in sparse.zeros.chunks(4).zip(sparse.values.chunks(4)) {
            prop_assert_eq!(zeros.iter().filter(|z| **z).count(), 2);
            prop_assert!(zeros.iter().zip(values).all(|(z, v)| !z || *v == 0.0));
        }
        let format = NumberFormat::Int(IntFormat { num_bits: 4, symmetric: seed % 2 == 0 });
        let target = Target::new(format, 16, Float::Bf16);
        let ordered = Factor::new(&gram, tokens as u64, n, order, 0.01).unwrap();
        let coded = gptq(&sparse.values, &ordered, target, Observer::Minmax, Zeros::Fixed(&sparse.zeros));
        prop_assert!(sparse.zeros.iter().zip(&coded.values).all(|(z, v)| !z || *v == 0.0));
    }

    #[test]
    fn threads_and_blocks_do_not_show(seed: u64, rows in 1usize..90, n in 1usize..70, share in 0.1f64..0.9) {
        let tokens = 2 * n + 3;
        let (w, gram) = (noise(seed ^ 9, rows * n), gram(seed, tokens, n, 0));
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let factor = Factor::new(&gram, tokens as u64, n, ActOrder::Off, 0.01).unwrap();
                let zeros = Zeros::Choose(Mask::Unstructured, share, 1 + n / 2);
                let sparse = sweep(&w, &factor, Rounding::Floats(Float::Bf16), zeros);
                let target = Target::new(NumberFormat::Int(IntFormat { num_bits: 3, symmetric: true }), n, Float::F16);
                let coded = gptq(&w, &factor, target, Observer::Mse, Zeros::Fixed(&sparse.zeros));
                (sparse.values, sparse.zeros, coded.values)
            })
        };
        let one = run(1);
        prop_assert_eq!(&one, &run(2));
        prop_assert_eq!(&one, &run(5));
    }
}

#[test]
fn a_singular_hessian_is_damped_more_and_says_so() {
    let n = 24;
    // Three tokens: rank 3, and without damping nothing to divide by.
    let gram = gram(3, 3, n, 0);
    let factor = Factor::new(&gram, 3, n, ActOrder::Static, 0.0).unwrap();
    assert!(factor.dampening_frac > 0.0, "{}", factor.dampening_frac);
    let swept = sweep(&noise(4, 5 * n), &factor, Rounding::Floats(Float::Bf16), Zeros::None);
    assert!(swept.values.iter().all(|v| v.is_finite()));
    let zeros = vec![0f32; n * n];
    assert_eq!(Factor::new(&zeros, 9, n, ActOrder::Off, 0.01).err(), Some(Unfactorable::Empty));
    let mut broken = gram.clone();
    broken[0] = f32::NAN;
    assert_eq!(Factor::new(&broken, 3, n, ActOrder::Off, 0.01).err(), Some(Unfactorable::NotFinite));
}
