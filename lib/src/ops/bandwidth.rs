//! How fast this machine reads memory: what no product of a single row can beat.

use std::hint::black_box;
use std::time::Instant;

use rayon::prelude::*;

use super::for_this_cpu;

/// Bytes of a piece of work.
const PIECE: usize = 1 << 20;
/// Passes; the middle one counts.
const PASSES: usize = 5;

for_this_cpu! {
    fn xor(bytes: &[u8]) -> u64 = xor_body
}

#[inline(always)]
fn xor_body(bytes: &[u8]) -> u64 {
    let mut lanes = [0u64; 32];
    for chunk in bytes.as_chunks::<256>().0 {
        for (lane, word) in lanes.iter_mut().zip(chunk.as_chunks::<8>().0) {
            *lane ^= u64::from_ne_bytes(*word);
        }
    }
    lanes.iter().fold(0, |a, b| a ^ b)
}

/// 10^9 bytes a second at which the threads of the current pool read `parts`: the median of five passes, after one that
/// brings them into memory.
pub fn read_rate(parts: &[&[u8]]) -> f64 {
    let bytes: usize = parts.iter().map(|p| p.len()).sum();
    let pieces: Vec<&[u8]> = parts.iter().flat_map(|p| p.chunks(PIECE)).collect();
    let pass = || {
        let start = Instant::now();
        black_box(pieces.par_iter().map(|p| xor(p)).reduce(|| 0, |a, b| a ^ b));
        bytes as f64 / start.elapsed().as_secs_f64() / 1e9
    };
    pass();
    let mut rates: Vec<f64> = (0..PASSES).map(|_| pass()).collect();
    rates.sort_by(f64::total_cmp);
    rates[PASSES / 2]
}
