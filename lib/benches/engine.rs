//! Products from stored codes, on the shape of an expert: how much of the time that reading the codes takes, from memory and
//! from the cache, and how fast many inputs go. Products and reads take turns, so that both meet the same machine.
//!
//!     cargo bench -p gptoss --bench engine -- [threads] [weight]

mod common;

use std::hint::black_box;
use std::time::{Duration, Instant};

use gptoss::engine::view::{Kind, ScaleKind, Scales, View};
use gptoss::engine::{Source, Task, multiply};
use gptoss::formats::activations::Activations;
use rayon::prelude::*;

use common::{median, numbers};

/// An expert's gate and up.
const SHAPE: (usize, usize) = (5760, 2880);

/// Bytes from a unit to the next, and where scale and codes begin in it, where both lie in one block.
type Block = Option<(usize, usize, usize)>;

/// Codes and scales of many weights, as a container has them.
struct Store {
    name: &'static str,
    kind: Kind,
    scale: ScaleKind,
    group: usize,
    block: Block,
    shape: (usize, usize),
    bytes: Vec<u8>,
    /// Bytes of the codes of one weight, and of its scales.
    sizes: (usize, usize),
}

impl Store {
    fn new(
        name: &'static str,
        kind: Kind,
        scale: ScaleKind,
        group: usize,
        block: Block,
        copies: usize,
        shape: (usize, usize),
    ) -> Self {
        let units = shape.0 * shape.1 / kind.unit();
        let step = block.map_or(kind.bytes(), |b| b.0);
        let scales =
            if block.is_some() || kind.is_float() { 0 } else { shape.0 * shape.1.div_ceil(group) * scale.size() };
        let sizes = (units * step, scales);
        let mut bytes = vec![0u8; copies * (sizes.0 + sizes.1)];
        // Any bytes are codes, and 0x3c3c is a scale of any kind, or near one.
        let mut s = 1u32;
        for b in &mut bytes {
            s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *b = if kind.is_float() { (s >> 30) as u8 | 0x3c } else { (s >> 24) as u8 };
        }
        for weight in bytes.chunks_exact_mut(sizes.0 + sizes.1) {
            let (codes, scales) = weight.split_at_mut(sizes.0);
            scales.fill(0x3c);
            if let Some((step, at, _)) = block {
                codes.chunks_exact_mut(step).for_each(|b| b[at..at + scale.size()].fill(0x3c));
            }
        }
        Self { name, kind, scale, group, block, shape, bytes, sizes }
    }

    fn view(&self, copy: usize) -> View<'_> {
        let all = &self.bytes[copy * (self.sizes.0 + self.sizes.1)..][..self.sizes.0 + self.sizes.1];
        let (codes, scales) = all.split_at(self.sizes.0);
        let units = self.shape.1 / self.kind.unit();
        let (kind, group) = (self.scale, self.group);
        if self.kind.is_float() {
            return View::new(self.kind, self.shape, codes, (units * self.kind.bytes(), self.kind.bytes()), None)
                .expect("fits");
        }
        let (step, at, scales) = match self.block {
            Some((step, scale, at)) => {
                (step, at, Scales { kind, bytes: &codes[scale..], row: units * step, step, group })
            }
            None => {
                let size = self.scale.size();
                let row = self.shape.1.div_ceil(group) * size;
                (self.kind.bytes(), 0, Scales { kind, bytes: scales, row, step: size, group })
            }
        };
        View::new(self.kind, self.shape, &codes[at..], (units * step, step), Some(scales)).expect("fits")
    }
}

/// Reads every byte once, as fast as vector loads go.
fn read(bytes: &[u8]) -> u64 {
    let sum = |part: &[u8]| {
        let mut lanes = [0u64; 32];
        for chunk in part.as_chunks::<256>().0 {
            for (l, c) in lanes.iter_mut().zip(chunk.as_chunks::<8>().0) {
                *l ^= u64::from_ne_bytes(*c);
            }
        }
        lanes.iter().fold(0, |a, b| a ^ b)
    };
    bytes.par_chunks(1 << 18).map(sum).reduce(|| 0, |a, b| a ^ b)
}

fn time(f: impl FnOnce()) -> Duration {
    let start = Instant::now();
    f();
    start.elapsed()
}

fn product(view: View, x: &[f32], out: &mut [f32]) {
    let columns = view.shape().1;
    let rows: Vec<usize> = (0..x.len() / columns).collect();
    let inputs = Source::new(x, columns, (Activations::Float, 1.0)).ready(&rows, view.kind());
    multiply(vec![Task { view, bias: None, inputs: &inputs, out }]);
}

fn main() {
    let threads = std::env::args().skip(1).find_map(|a| a.parse().ok()).unwrap_or(2);
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().expect("threads start");
    println!("{threads} threads; GB/s of codes and scales, GMAC/s; medians");
    println!(
        "{:>12} {:>9} {:>9} {:>6} {:>9} {:>9} {:>9}",
        "weight", "1 input", "read", "share", "in cache", "64", "512"
    );
    let (e8m0, f16, bf16) = (ScaleKind::E8m0, ScaleKind::F16, ScaleKind::Bf16);
    let all: [(&str, Kind, ScaleKind, usize, Block); 13] = [
        ("mxfp4", Kind::E2m1, e8m0, 32, None),
        ("gguf mxfp4", Kind::E2m1Halves, e8m0, 32, Some((17, 0, 1))),
        ("q4_0", Kind::Int4Halves, f16, 32, Some((18, 0, 2))),
        ("q8_0", Kind::Int8, f16, 32, Some((34, 0, 2))),
        ("int4 g32", Kind::Int4, bf16, 32, None),
        ("int4 g64", Kind::Int4, bf16, 64, None),
        ("int4", Kind::Int4, bf16, SHAPE.1, None),
        ("int8", Kind::Int8, bf16, SHAPE.1, None),
        ("int2 g64", Kind::Int2, bf16, 64, None),
        ("ternary g64", Kind::Ternary, bf16, 64, None),
        ("base 3 g64", Kind::Base3, bf16, 64, None),
        ("bf16", Kind::Bf16, f16, SHAPE.1, None),
        ("f32", Kind::F32, f16, SHAPE.1, None),
    ];
    let wanted = std::env::args().skip(1).find(|a| all.iter().any(|w| w.0 == a));
    for (name, kind, scale, group, block) in all.into_iter().filter(|w| wanted.as_deref().is_none_or(|n| n == w.0)) {
        let copies = (400 << 20) / (SHAPE.0 * SHAPE.1 / kind.unit() * kind.bytes());
        let store = Store::new(name, kind, scale, group, block, copies, SHAPE);
        let x = numbers(SHAPE.1);
        let mut out = vec![0f32; SHAPE.0];
        let size = store.sizes.0 + store.sizes.1;
        let (mut ours, mut reads) = (Vec::new(), Vec::new());
        for round in 0..40 {
            let copy = round * 7 % copies;
            let bytes = &store.bytes[(copy + copies / 2) % copies * size..][..size];
            ours.push(time(|| product(store.view(copy), &x, black_box(&mut out))));
            reads.push(time(|| _ = black_box(read(black_box(bytes)))));
        }
        let rate = |seconds: f64, size: usize| size as f64 / seconds / 1e9;
        let (one, plain) = (rate(median(ours), size), rate(median(reads), size));
        // Small enough for the second-level caches.
        let small = Store::new(name, kind, scale, group.min(SHAPE.1), block, 1, (256 * threads, SHAPE.1));
        let mut out = vec![0f32; small.shape.0];
        let times: Vec<Duration> = (0..400).map(|_| time(|| product(small.view(0), &x, black_box(&mut out)))).collect();
        let cached = rate(median(times), small.sizes.0 + small.sizes.1);
        let many = |n: usize| {
            let x = numbers(n * SHAPE.1);
            let mut out = vec![0f32; n * SHAPE.0];
            let times: Vec<Duration> =
                (0..5).map(|i| time(|| product(store.view(i % copies), &x, black_box(&mut out)))).collect();
            (n * SHAPE.0 * SHAPE.1) as f64 / median(times) / 1e9
        };
        println!(
            "{:>12} {one:>9.1} {plain:>9.1} {:>6.2} {cached:>9.1} {:>9.1} {:>9.1}",
            store.name,
            one / plain,
            many(64),
            many(512)
        );
    }
}
