//! What the benchmarks share.

use std::time::Duration;

/// `n` numbers between -1 and 1, always the same.
pub fn numbers(n: usize) -> Vec<f32> {
    let mut s = 1u32;
    let next = || {
        s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (s >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(n).collect()
}

/// The middle of some times, in seconds.
pub fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64()
}
