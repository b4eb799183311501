//! The parts of GPTQ on a layer of gpt-oss's width beside the machine's own limit: a large f32 product by the `gemm` crate,
//! in the same run, on the same threads. Rates count the multiply-adds that the algorithm needs, not those that are done.
//! Fails where the Hessian or the sweep runs below half of the product's rate.
//!
//!     cargo bench -p gptoss --bench gptq -- [threads]

mod common;

use std::time::{Duration, Instant};

use gemm::Parallelism;
use gptoss::algorithms::descent::{Quadratic, descend};
use gptoss::algorithms::gptq::gptq;
use gptoss::algorithms::rtn::Target;
use gptoss::algorithms::sweep::{Factor, Zeros};
use gptoss::formats::NumberFormat;
use gptoss::formats::float::Float;
use gptoss::formats::int::IntFormat;
use gptoss::ops::moments;
use gptoss::recipe::{ActOrder, Observer};

use common::{median, numbers};

/// Width of gpt-oss, and the rows of gate and up together.
const N: usize = 2880;
const ROWS: usize = 5760;
const TOKENS: usize = 4096;
const ROUNDS: usize = 5;

fn product(x: &[f32], w: &[f32], out: &mut [f32], threads: usize) {
    let parallelism = if threads == 1 { Parallelism::None } else { Parallelism::Rayon(threads) };
    let (out, x, w) = (out.as_mut_ptr(), x.as_ptr(), w.as_ptr());
    let (s, one) = (N as isize, 1);
    // SAFETY: the strides describe row-major [TOKENS, N] twice and the transpose of [N, N].
    unsafe {
        gemm::gemm(
            TOKENS,
            N,
            N,
            out,
            one,
            s,
            false,
            x,
            one,
            s,
            w,
            s,
            one,
            0.0f32,
            1.0f32,
            false,
            false,
            false,
            parallelism,
        );
    }
}

fn main() {
    let threads = std::env::args().skip(1).find_map(|a| a.parse().ok()).unwrap_or(2);
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().expect("threads start");
    let (x, w) = (numbers(TOKENS * N), numbers(ROWS * N));
    let (square, mut out, mut gram) = (numbers(N * N), vec![0f32; TOKENS * N], vec![0f32; N * N]);
    moments::add_gram(&x, N, &mut gram);
    moments::mirror(&mut gram, N);
    let sums = gram.clone();
    let target = Target::new(NumberFormat::Int(IntFormat { num_bits: 4, symmetric: true }), 64, Float::Bf16);
    let factor = || Factor::new(&sums, TOKENS as u64, N, ActOrder::Static, 0.01).expect("full rank");
    let (factored, quadratic) = (factor(), Quadratic::new(&sums, N, 0.01));
    let mut q = gptq(&w, &factored, target, Observer::Minmax, Zeros::None);
    let mut times: [Vec<Duration>; 5] = Default::default();
    for _ in 0..ROUNDS {
        let mut time = |arm: usize, f: &mut dyn FnMut()| {
            let start = Instant::now();
            f();
            times[arm].push(start.elapsed());
        };
        time(0, &mut || product(&x, &square, &mut out, threads));
        time(1, &mut || moments::add_gram(&x, N, &mut gram));
        time(2, &mut || drop(std::hint::black_box(factor())));
        time(3, &mut || q = gptq(&w, &factored, target, Observer::Minmax, Zeros::None));
        time(4, &mut || descend(&w, &mut q, &quadratic, target, None));
    }
    let (n, rows, tokens) = (N as f64, ROWS as f64, TOKENS as f64);
    let needs = [tokens * n * n, tokens * n * n / 2.0, n * n * n / 6.0, rows * n * n / 2.0, rows * n * n];
    let names = ["f32 product", "Hessian", "factor (f64)", "sweep", "descent"];
    let seconds = times.map(median);
    let limit = needs[0] / seconds[0];
    println!("{threads} threads; in_features {N}, {TOKENS} tokens, {ROWS} rows; medians of {ROUNDS}");
    println!("{:>14} {:>9} {:>10} {:>18}", "part", "seconds", "GFLOP/s", "of the product");
    let mut missed = false;
    for ((name, need), s) in names.iter().zip(needs).zip(seconds) {
        let share = need / s / limit;
        println!("{name:>14} {s:>9.3} {:>10.1} {share:>18.2}", 2.0 * need / s / 1e9);
        missed |= matches!(*name, "Hessian" | "sweep") && share < 0.5;
    }
    std::process::exit(i32::from(missed));
}
