//! MXFP4 -> BF16 and FP16 in memory, beside a copy of the same output bytes: `cargo bench -p gptoss`.
//! The result of the fast path is compared with the reference before anything is timed.

use divan::{Bencher, black_box, counter::BytesCount};
use gptoss::formats::float::Float;
use gptoss::formats::mxfp4::{BLOCK, BLOCK_BYTES};
use gptoss::ops::dequantize::{Blocks, ScalesByGroup, transposed, transposed_reference};

/// One expert's gate_up of gpt-oss-20b.
const ROWS: usize = 5760;
const GROUPS: usize = 90;
/// Blocks at a time, as the tool does it: a chunk is made in the cache and goes out from there.
const STEP: usize = 3;
/// Experts in the buffers, so that neither input nor output stays in a cache.
const EXPERTS: usize = 8;
const OUT: usize = ROWS * GROUPS * BLOCK;
const CHUNK: usize = ROWS * STEP * BLOCK;

fn main() {
    divan::main();
}

fn noise(n: usize) -> Vec<u8> {
    let mut s = 1u64;
    (0..n)
        .map(|_| {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            s as u8
        })
        .collect()
}

struct Data {
    codes: Vec<u8>,
    scales: Vec<u8>,
}

impl Data {
    fn new() -> Self {
        let codes = noise(EXPERTS * ROWS * GROUPS * BLOCK_BYTES);
        let scales = noise(EXPERTS * ROWS * GROUPS).iter().map(|b| 114 + b % 11).collect();
        Self { codes, scales }
    }

    fn expert(&self, e: usize) -> Blocks<'_> {
        let n = ROWS * GROUPS;
        let codes = &self.codes[e * n * BLOCK_BYTES..][..n * BLOCK_BYTES];
        Blocks { codes, scales: &self.scales[e * n..][..n], rows: ROWS, groups: GROUPS }
    }

    /// Every chunk of every expert, with its place in the output.
    fn chunks(&self, to: Float, mut each: impl FnMut(usize, &[u16])) {
        let (mut chunk, mut scales) = (vec![0u16; CHUNK], ScalesByGroup::default());
        for e in 0..EXPERTS {
            scales.fill(self.expert(e));
            for g in (0..GROUPS).step_by(STEP) {
                transposed(self.expert(e), &scales, g..g + STEP, to, &mut chunk);
                each(e * OUT + g * BLOCK * ROWS, &chunk);
            }
        }
    }
}

/// Into memory.
#[divan::bench(args = ["bf16", "fp16"], sample_count = 30)]
fn dequantize(bencher: Bencher, dtype: &str) {
    let to = if dtype == "fp16" { Float::F16 } else { Float::Bf16 };
    let data = Data::new();
    let (mut out, mut want) = (vec![0u16; EXPERTS * OUT], vec![1u16; OUT]);
    let fill = |out: &mut [u16]| data.chunks(to, |at, chunk| out[at..at + CHUNK].copy_from_slice(chunk));
    fill(&mut out);
    transposed_reference(data.expert(0), 0..GROUPS, to, &mut want);
    assert!(out[..OUT] == want[..], "the fast path is wrong");
    bencher.counter(BytesCount::of_slice(&out[..])).bench_local(|| fill(black_box(&mut out)));
}

/// Into the cache, from where the tool hands it to the system.
#[divan::bench(sample_count = 30)]
fn chunks(bencher: Bencher) {
    let data = Data::new();
    bencher.counter(BytesCount::new(EXPERTS * OUT * 2)).bench_local(|| {
        data.chunks(Float::Bf16, |_, c| {
            black_box(c);
        })
    });
}

/// The short version.
#[divan::bench(sample_count = 10)]
fn reference(bencher: Bencher) {
    let data = Data::new();
    let mut out = vec![0u16; OUT];
    bencher.counter(BytesCount::of_slice(&out[..])).bench_local(|| {
        transposed_reference(data.expert(0), 0..GROUPS, Float::Bf16, black_box(&mut out));
    });
}

/// The machine's limit: the same output bytes, copied.
#[divan::bench(sample_count = 30)]
fn copy(bencher: Bencher) {
    let source: Vec<u16> = noise(EXPERTS * OUT).into_iter().map(u16::from).collect();
    let mut out = vec![0u16; EXPERTS * OUT];
    bencher.counter(BytesCount::of_slice(&out[..])).bench_local(|| black_box(&mut out).copy_from_slice(&source));
}
