//! The Cholesky factorization with one and two threads, beside the rate that multiply-adds of f64 reach in registers on
//! one core: `cargo bench -p gptoss --bench cholesky`. Items are floating-point operations, n^3 / 3 for a factorization.

use std::hint::black_box;

use divan::{Bencher, counter::ItemsCount};
use gptoss::ops::cholesky::cholesky;

fn main() {
    divan::main();
}

/// Symmetric, and its diagonal outweighs the rest of each row.
fn definite(n: usize) -> Vec<f64> {
    let value = |i: usize, j: usize| if i == j { n as f64 } else { ((i * j) % 97) as f64 / 97.0 };
    (0..n * n).map(|i| value(i / n, i % n)).collect()
}

#[divan::bench(args = [512, 2880, 4096], consts = [1, 2], sample_count = 9, sample_size = 1)]
fn factor<const THREADS: usize>(bencher: Bencher, n: usize) {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(THREADS).build().expect("threads start");
    let a = definite(n);
    bencher
        .counter(ItemsCount::new(n * n * n / 3))
        .with_inputs(|| a.clone())
        .bench_local_refs(|a| pool.install(|| cholesky(a, n)).expect("it is definite"));
}

/// Independent chains: those that the factorization keeps going at a time.
const CHAINS: usize = 12;
const ROUNDS: usize = 2_000_000;

#[divan::bench(sample_count = 20, sample_size = 1)]
fn registers(bencher: Bencher) {
    bencher.counter(ItemsCount::new(2 * 4 * CHAINS * ROUNDS)).bench_local(|| {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            #[target_feature(enable = "avx2,fma")]
            fn fast() -> [[f64; 4]; CHAINS] {
                chains(ROUNDS)
            }
            // SAFETY: AVX2 and FMA are there.
            return unsafe { fast() };
        }
        chains(ROUNDS)
    });
}

#[inline(always)]
fn chains(rounds: usize) -> [[f64; 4]; CHAINS] {
    let (x, y) = (black_box([0.5f64; 4]), black_box([1f64; 4]));
    let mut sums = [[0f64; 4]; CHAINS];
    for _ in 0..rounds {
        for sums in &mut sums {
            for lane in 0..4 {
                sums[lane] = x[lane].mul_add(y[lane], sums[lane]);
            }
        }
    }
    sums
}
