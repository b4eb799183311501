//! Products, over experts too, and a whole layer's launches one behind the other.

use rayon::prelude::*;

use super::super::elementwise::quantize_activations;
use super::super::hopper::{self, Hopper};
use super::super::operations::{Inputs, Mixture, Routes, Weight, combine_experts};
use super::super::product::{Block, Codes, PRODUCTS, Parts, Product};
use super::super::reference::{Layer, Output, Token, swiglu};
use super::super::{Buffer, Gpu};
use super::pattern::{Share, Wrong, describe};
use super::{Extent, KernelTest, numbers, read, stored};
use crate::error::Result;
use crate::formats::float::Float;
use crate::formats::minifloat::Minifloat::E4M3;
use crate::ops::random::Draw;

/// What rounding may do to an output: to its sum in f32, by the sizes of its parts, and half the distance of two numbers of `float`.
fn allowed(want: &Output, float: Float, sums: f64) -> f64 {
    let half = match float {
        Float::F32 => 0.0,
        Float::Bf16 => 1.0 / 256.0,
        Float::F16 => 1.0 / 2048.0,
    };
    sums * want.size + half * want.exact.abs() + f64::from(f32::MIN_POSITIVE)
}

/// What sums of some thousand parts in f32 may differ by, beside the sizes of the parts.
const SUMS: f64 = 4e-6;

/// Weights of some layers, on both sides.
struct Drawn<'g> {
    there: Weight<'g>,
    here: Layers,
}

struct Layers {
    product: Product,
    codes: Vec<u8>,
    scales: Vec<u8>,
    scale_type: Float,
    bias: Vec<f32>,
    experts: usize,
    shape: (usize, usize, usize),
}

impl<'g> Drawn<'g> {
    /// `shape` is N, K, and the columns of a scale.
    fn new(
        gpu: &'g Gpu,
        draw: &mut Draw,
        product: Product,
        experts: usize,
        shape: (usize, usize, usize),
        (scale_type, output): (Float, Float),
    ) -> Result<Self> {
        let (n, k, group) = shape;
        let codes = draw.bytes(experts * n * k * product.codes.bits() / 8);
        let groups = experts * n * (k / group);
        let scales = match product.codes {
            Codes::E2m1 => draw.bytes(groups).iter().map(|b| 119 + b % 4).collect(),
            _ => stored(&(0..groups).map(|_| draw.unit() * 0.01).collect::<Vec<_>>(), scale_type),
        };
        // Some of them alone pass SwiGLU's limit.
        let bias: Vec<f32> = (0..experts * n).map(|_| output.round(12.0 * draw.unit())).collect();
        let there = Weight {
            codes: gpu.upload(&codes)?,
            scales: gpu.upload(&scales)?,
            scale_type,
            bias: Some(gpu.upload(&stored(&bias, output))?),
            experts,
            n,
            k,
            group,
        };
        Ok(Self { there, here: Layers { product, codes, scales, scale_type, bias, experts, shape } })
    }
}

impl Layer<'_> {
    /// What each group of columns, and each part, contributes to an output.
    fn shares(&self, row: usize, token: Token) -> Vec<Share> {
        let group = |g: usize| {
            let columns = g * self.group..(g + 1) * self.group;
            Share { name: format!("group {g}"), value: self.share(row, token, columns.clone()), columns }
        };
        let mut all: Vec<Share> = (0..self.k / self.group).map(group).collect();
        let columns = Parts::of(self.k, self.group).columns();
        all.extend((0..self.k).step_by(columns).enumerate().map(|(p, first)| {
            let columns = first..(first + columns).min(self.k);
            Share { name: format!("part {p}"), value: self.share(row, token, columns.clone()), columns }
        }));
        all
    }
}

impl Layers {
    /// One of them.
    fn layer(&self, expert: usize) -> Layer<'_> {
        let (n, k, group) = self.shape;
        let (codes, scales) = (self.codes.len() / self.experts, self.scales.len() / self.experts);
        Layer {
            product: self.product,
            codes: &self.codes[expert * codes..][..codes],
            scales: &self.scales[expert * scales..][..scales],
            scale_type: self.scale_type,
            bias: Some(&self.bias[expert * n..][..n]),
            k,
            group,
        }
    }
}

/// Inputs on both sides: numbers in bf16, or what the GPU rounds them to.
struct Activated<'g> {
    values: Buffer<'g>,
    scales: Option<Buffer<'g>>,
    here: Tokens,
}

enum Tokens {
    Int8(Vec<i8>, Vec<f32>),
    Bf16(Vec<f32>),
}

impl<'g> Activated<'g> {
    /// `input` [rows, k] in bf16, as `product` takes it.
    fn new(gpu: &'g Gpu, product: Product, input: Buffer<'g>, rows: usize, k: usize) -> Result<Self> {
        if !product.int8 {
            let here = Tokens::Bf16(read(gpu, &input, Float::Bf16)?);
            return Ok(Self { values: input, scales: None, here });
        }
        let (values, scales) = (gpu.room(rows * k)?, gpu.room(4 * rows)?);
        quantize_activations(gpu, (&input, Float::Bf16), &values, &scales, (rows, k), false)?;
        let here = Tokens::Int8(gpu.download(&values)?, gpu.download(&scales)?);
        Ok(Self { values, scales: Some(scales), here })
    }

    fn inputs(&self, rows: usize) -> Inputs<'_, 'g> {
        Inputs { values: &self.values, scales: self.scales.as_ref(), rows }
    }
}

impl Tokens {
    fn token(&self, row: usize, k: usize) -> Token<'_> {
        match self {
            Self::Int8(codes, scales) => Token::Int8(&codes[row * k..][..k], scales[row]),
            Self::Bf16(numbers) => Token::Bf16(&numbers[row * k..][..k]),
        }
    }
}

/// Outputs [tokens, `rows`] of a block, or of a library, beside the reference; `sums` is what sums may differ by, 0 where every bit of the rounded output
/// is known. `shares` are what groups and parts of columns contribute to an output, where that is known. Blocks that not every GPU has are left
/// out of the digest.
fn compare(
    test: &mut KernelTest,
    block: Option<Block>,
    (sums, float): (f64, Float),
    (have, want): (&[f32], &[Output]),
    rows: usize,
    shares: impl Fn(usize) -> Vec<Share>,
    case: &str,
) {
    test.cases += 1;
    if !block.is_some_and(|b| b.is_wgmma()) {
        test.digest(have);
    }
    let right_so_far = test.failure.is_none();
    let mut wrong = Vec::new();
    for (i, (&h, w)) in have.iter().zip(want).enumerate() {
        let stated = float.round(w.stated);
        let allowed = allowed(w, float, sums.max(SUMS));
        let error = (f64::from(h) - w.exact).abs() / allowed;
        test.see(h, stated, error, || format!("{case}, output {i}"));
        let other_bits = sums == 0.0 && h.to_bits() != stated.to_bits();
        if other_bits && test.failure.is_none() {
            test.failure = Some(format!("{case}, output {i}: {h:e}, wanted the bits of {stated:e}"));
        }
        if other_bits || error.is_nan() || error > 1.0 {
            wrong.push(Wrong { at: i, excess: f64::from(h) - w.exact, allowed });
        }
    }
    if right_so_far && test.failure.is_some() {
        test.pattern = Some(describe(&wrong, want.len(), rows, shares));
    }
}

/// What cannot be told of an output behind a gated unit.
fn unknown(_: usize) -> Vec<Share> {
    Vec::new()
}

/// What [`compare`] allows the sums of a product.
fn sums(product: Product) -> f64 {
    if product.int8 { 0.0 } else { SUMS }
}

/// A single layer, with every block.
pub fn single(gpu: &Gpu, product: Product, extent: Extent) -> Result<KernelTest> {
    let float = Float::Bf16;
    let (mut test, mut draw) = (KernelTest::new(product.name, false), Draw::new(5));
    let mut shapes = vec![(1, 1, 32), (3, 65, 160), (17, 100, 576), (33, 70, 1152), (2, 18, 5120)];
    if extent == Extent::Models {
        shapes.extend([(1, 4096, 4096), (16, 5760, 2880), (5, 512, 2880), (33, 2880, 4096), (131, 2880, 2880)]);
    }
    for (m, n, k) in shapes {
        for group in [32, 64, 96, 128, 1024, k] {
            let fits = k % group == 0 && (product.codes != Codes::E2m1 || group == 32);
            if !fits || (n > 1000 && group != 64 && product.codes != Codes::E2m1) {
                continue;
            }
            let scale_type = [Float::Bf16, Float::F16, Float::F32][draw.below(3)];
            let w = Drawn::new(gpu, &mut draw, product, 1, (n, k, group), (scale_type, float))?;
            let input = gpu.upload(&stored(&numbers(&mut draw, m * k, float), float))?;
            let x = Activated::new(gpu, product, input, m, k)?;
            let (layer, tokens) = (w.here.layer(0), &x.here);
            let want = |i| layer.output(i % n, tokens.token(i / n, k));
            let want: Vec<Output> = (0..m * n).into_par_iter().map(want).collect();
            for block in Block::of(gpu) {
                if product.shared_bytes(block, k, group, scale_type) > gpu.shared_bytes {
                    continue;
                }
                let out = gpu.room(m * n * float.size())?;
                product.launch(gpu, &w.there, &x.inputs(m), (&out, float), block, None)?;
                let case = format!("M {m} N {n} K {k}, groups of {group}, blocks of {block}");
                let shares = |i: usize| layer.shares(i % n, tokens.token(i / n, k));
                let have = read(gpu, &out, float)?;
                compare(&mut test, Some(block), (sums(product), float), (&have, &want), n, shares, &case);
            }
        }
    }
    Ok(test)
}

/// A whole layer's launches one behind the other in a graph, again and again with two inputs in turn, beside the same launches each waited
/// for: where a kernel does not wait for what it reads, or another writes too early, the bits differ. A single layer is multiplied by every
/// block behind the rounding of its inputs.
pub fn chain(gpu: &Gpu, extent: Extent) -> Result<KernelTest> {
    let (float, product) = (Float::Bf16, PRODUCTS[1]);
    let (mut test, mut draw) = (KernelTest::new("chain", true), Draw::new(8));
    let (tokens, width, count, top_k, turns) = match extent {
        Extent::Small => (3, 64, 6, 2, 2),
        Extent::Models => (4, 2880, 32, 4, 50),
    };
    let types = (Float::Bf16, float);
    let gate_up = Drawn::new(gpu, &mut draw, product, count, (2 * width, width, 32), types)?;
    let down = Drawn::new(gpu, &mut draw, product, count, (width, width, 32), types)?;
    let single = Drawn::new(gpu, &mut draw, product, 1, (width, width, 32), types)?;
    let fits = |b: &Block| product.shared_bytes(*b, width, 32, types.0) <= gpu.shared_bytes;
    let blocks: Vec<Block> = Block::of(gpu).filter(fits).collect();
    // One of each kind over experts.
    let over_experts = [Block { rows: 32, tokens: 8 }, Block { rows: 128, tokens: 64 }];
    let over_experts = over_experts.into_iter().filter(|b| blocks.contains(b));
    let mixtures = over_experts.map(|b| Ok((b, Routes::new(gpu, (tokens, top_k), count, b.tokens)?)));
    let mixtures: Vec<(Block, Routes)> = mixtures.collect::<Result<_>>()?;
    let (rows, bytes) = (tokens * top_k, tokens * width * float.size());
    let mut sides = Vec::new();
    for _ in 0..2 {
        let chosen = routes(&mut draw, tokens, count, top_k);
        let x = gpu.upload(&stored(&numbers(&mut draw, tokens * width, float), float))?;
        let outputs = (0..mixtures.len() + blocks.len()).map(|_| gpu.room(bytes)).collect::<Result<Vec<_>>>()?;
        sides.push(Side { x, chosen: gpu.upload(&chosen)?, outputs });
    }
    let other = gpu.upload(&stored(&numbers(&mut draw, tokens * width, float), float))?;
    let shares = gpu.upload(&(0..rows).map(|_| draw.unit().abs()).collect::<Vec<f32>>())?;
    let (x, chosen, out) = (gpu.room(bytes)?, gpu.room(4 * rows)?, gpu.room(bytes)?);
    let (codes, scales) = (gpu.room(tokens * width)?, gpu.room(4 * tokens)?);
    let (h, h_codes, h_scales) = (gpu.room(2 * rows * width)?, gpu.room(rows * width)?, gpu.room(4 * rows)?);
    let (y, z) = (gpu.room(2 * rows * width)?, gpu.room(bytes)?);
    // `wait` is called between any two launches.
    let layer = |side: &Side, wait: &dyn Fn() -> Result<()>| -> Result<()> {
        gpu.copy(&side.x, &x)?;
        gpu.copy(&side.chosen, &chosen)?;
        wait()?;
        for (i, (&block, output)) in blocks.iter().zip(&side.outputs[mixtures.len()..]).enumerate() {
            // Something else is rounded each time: codes of the time before would be wrong.
            let from = if i % 2 == 0 { &x } else { &other };
            quantize_activations(gpu, (from, float), &codes, &scales, (tokens, width), false)?;
            wait()?;
            let inputs = Inputs { values: &codes, scales: Some(&scales), rows: tokens };
            product.launch(gpu, &single.there, &inputs, (&z, float), block, None)?;
            wait()?;
            gpu.copy(&z, output)?;
            wait()?;
        }
        for ((block, routed), output) in mixtures.iter().zip(&side.outputs) {
            let grouped = routed.group(gpu, &chosen)?;
            wait()?;
            quantize_activations(gpu, (&x, float), &codes, &scales, (tokens, width), false)?;
            wait()?;
            let inputs = Inputs { values: &codes, scales: Some(&scales), rows: tokens };
            let mixture = Mixture { gather: true, swiglu: Some((1.702, 7.0)) };
            product.launch(gpu, &gate_up.there, &inputs, (&h, float), *block, Some((grouped, mixture)))?;
            wait()?;
            quantize_activations(gpu, (&h, float), &h_codes, &h_scales, (rows, width), false)?;
            wait()?;
            let inputs = Inputs { values: &h_codes, scales: Some(&h_scales), rows };
            let mixture = Mixture { gather: false, swiglu: None };
            product.launch(gpu, &down.there, &inputs, (&y, float), *block, Some((grouped, mixture)))?;
            wait()?;
            combine_experts(gpu, grouped, &y, &shares, &out, (width, float))?;
            wait()?;
            gpu.copy(&out, output)?;
            wait()?;
        }
        Ok(())
    };
    let results =
        |side: &Side| -> Result<Vec<Vec<f32>>> { side.outputs.iter().map(|output| read(gpu, output, float)).collect() };
    let used: Vec<Block> = mixtures.iter().map(|m| m.0).chain(blocks.iter().copied()).collect();
    let mut want = Vec::new();
    for side in &sides {
        layer(side, &|| gpu.synchronize())?;
        want.push(results(side)?);
    }
    let graph =
        gpu.capture(|| (0..turns).try_for_each(|_| sides.iter().try_for_each(|side| layer(side, &|| Ok(())))))?;
    for turn in 0..turns {
        gpu.times(&graph, 1)?;
        for (side, want) in sides.iter().zip(&want) {
            for (i, (have, want)) in results(side)?.iter().zip(want).enumerate() {
                let what = if i < mixtures.len() { "experts" } else { "a layer" };
                let case = format!("turn {turn}, {what}, blocks of {}", used[i]);
                if used[i].is_wgmma() {
                    test.see_each(have, want, &case);
                } else {
                    test.see_all(have, want, &case);
                }
            }
        }
    }
    Ok(test)
}

/// What goes into a layer of [`chain`], and what comes out: of its experts by each kind of block, and of a single product by each block.
struct Side<'g> {
    x: Buffer<'g>,
    chosen: Buffer<'g>,
    outputs: Vec<Buffer<'g>>,
}

/// Experts of each token, ascending, none of them the second one.
fn routes(draw: &mut Draw, tokens: usize, count: usize, top_k: usize) -> Vec<i32> {
    let mut chosen: Vec<i32> = Vec::new();
    for _ in 0..tokens {
        let mut own: Vec<i32> = Vec::new();
        while own.len() < top_k {
            let e = draw.below(count) as i32;
            if e != 1 && !own.contains(&e) {
                own.push(e);
            }
        }
        own.sort();
        chosen.extend(own);
    }
    chosen
}

/// The library for Hopper.
pub fn hopper(gpu: &Gpu, fp8: bool, extent: Extent) -> Result<KernelTest> {
    let library = Hopper::open(gpu)?;
    let float = Float::Bf16;
    // In E4M3 tensor cores keep fewer bits of the sums of 128 columns.
    let sums = if fp8 { 5e-4 } else { SUMS };
    let (mut test, mut draw) = (KernelTest::new(hopper::name(fp8), false), Draw::new(7));
    let mut shapes = vec![(1, 8, 16), (3, 136, 160), (130, 264, 528)];
    if extent == Extent::Models {
        shapes.extend([(257, 2880, 4096), (64, 5760, 2880)]);
    }
    let values: Vec<f64> = (0..=255u8).map(|b| if fp8 { E4M3.value(b).into() } else { f64::from(b as i8) }).collect();
    for (m, n, k) in shapes {
        let input = gpu.upload(&stored(&numbers(&mut draw, m * k, float), float))?;
        let (x, x_scales) = (gpu.room(m * k)?, gpu.room(4 * m)?);
        quantize_activations(gpu, (&input, float), &x, &x_scales, (m, k), fp8)?;
        // E4M3 without its NaN.
        let w: Vec<u8> = draw.bytes(n * k).iter().map(|&b| if fp8 { b & 0xf7 } else { b }).collect();
        let scales: Vec<f32> = (0..n).map(|_| draw.unit().abs() * 0.01).collect();
        let biases: Vec<f32> = (0..n).map(|_| float.round(draw.unit())).collect();
        let weight = (&gpu.upload(&w)?, &gpu.upload(&scales)?);
        let (have_x, have_scales): (Vec<u8>, Vec<f32>) = (gpu.download(&x)?, gpu.download(&x_scales)?);
        for bias in [None, Some(gpu.upload(&stored(&biases, float))?)] {
            let out = gpu.room(m * n * float.size())?;
            let workspace = library.workspace(fp8, (m, n, k))?;
            library.product(fp8, weight, (&x, &x_scales), bias.as_ref(), &out, (m, n, k), &workspace)?;
            let with = bias.is_some();
            let want = |i: usize| {
                let (row, token) = (i % n, i / n);
                let value = |b: u8| values[usize::from(b)];
                let products =
                    w[row * k..][..k].iter().zip(&have_x[token * k..][..k]).map(|(&w, &x)| value(w) * value(x));
                let (sum, size) = products.fold((0f64, 0f64), |(sum, size), p| (sum + p, size + p.abs()));
                let scale = f64::from(scales[row]) * f64::from(have_scales[token]);
                let bias = if with { f64::from(biases[row]) } else { 0.0 };
                let exact = sum * scale + bias;
                Output { stated: exact as f32, exact, size: size * scale + bias.abs() }
            };
            let want: Vec<Output> = (0..m * n).into_par_iter().map(want).collect();
            let case = format!("M {m} N {n} K {k}, with biases: {with}");
            let have = read(gpu, &out, float)?;
            compare(&mut test, None, (sums, float), (&have, &want), n, unknown, &case);
        }
    }
    Ok(test)
}

/// A mixture of experts, gate and up with SwiGLU, then down, then combined. One expert has no tokens.
pub fn experts(gpu: &Gpu, product: Product, extent: Extent) -> Result<KernelTest> {
    let float = Float::Bf16;
    let name = format!("{}_experts", product.name);
    let (mut test, mut draw) = (KernelTest::new(name, false), Draw::new(6));
    let unit = (1.702f32, 7.0f32);
    // Tokens, hidden, inner, experts, of each token.
    // Of the last one two experts have more rows than any tile.
    let mut shapes = vec![(1, 64, 96, 6, 2), (5, 96, 64, 6, 2), (33, 128, 64, 5, 3), (70, 64, 32, 3, 2)];
    if extent == Extent::Models {
        shapes.extend([(1, 2880, 2880, 32, 4), (7, 2880, 2880, 32, 4)]);
    }
    for (tokens, hidden, inner, count, top_k) in shapes {
        let group = if product.codes == Codes::E2m1 || hidden % 64 > 0 || inner % 64 > 0 { 32 } else { 64 };
        let types = (Float::Bf16, float);
        let gate_up = Drawn::new(gpu, &mut draw, product, count, (2 * inner, hidden, group), types)?;
        let down = Drawn::new(gpu, &mut draw, product, count, (hidden, inner, group), types)?;
        let chosen = routes(&mut draw, tokens, count, top_k);
        let shares: Vec<f32> = chosen.iter().map(|_| draw.unit().abs()).collect();
        let input = gpu.upload(&stored(&numbers(&mut draw, tokens * hidden, float), float))?;
        let x = Activated::new(gpu, product, input, tokens, hidden)?;
        let rows = chosen.len();
        let (chosen_there, shares_there) = (gpu.upload(&chosen)?, gpu.upload(&shares)?);
        for block in Block::of(gpu) {
            let most = product.shared_bytes(block, hidden.max(inner), group, Float::Bf16);
            if most > gpu.shared_bytes {
                continue;
            }
            let case = format!("{tokens} tokens of {hidden}, {count} experts of {inner}, blocks of {block}");
            let routes = Routes::new(gpu, (tokens, top_k), count, block.tokens)?;
            let grouped = routes.group(gpu, &chosen_there)?;
            let places: Vec<i32> = gpu.download(&routes.places)?;
            let mut at: Vec<usize> = places.iter().map(|&p| p as usize).collect();
            at.sort();
            if at != (0..rows).collect::<Vec<_>>() {
                test.failure.get_or_insert(format!("{case}: rows are not grouped: {places:?}"));
                return Ok(test);
            }
            // Which entry of `chosen` each row is.
            let mut entries = vec![0; rows];
            places.iter().enumerate().for_each(|(entry, &place)| entries[place as usize] = entry);

            let h = gpu.room(rows * inner * float.size())?;
            let mixture = Mixture { gather: true, swiglu: Some(unit) };
            let experts = Some((grouped, mixture));
            product.launch(gpu, &gate_up.there, &x.inputs(tokens), (&h, float), block, experts)?;
            let have = read(gpu, &h, float)?;
            let (layers, inputs) = (&gate_up.here, &x.here);
            let want = |i: usize| {
                let (entry, j) = (entries[i / inner], i % inner);
                let (layer, token) = (layers.layer(chosen[entry] as usize), inputs.token(entry / top_k, hidden));
                let (gate, up) = (layer.output(2 * j, token), layer.output(2 * j + 1, token));
                let stated = swiglu(gate.stated, up.stated, unit);
                let exact = f64::from(swiglu(gate.exact as f32, up.exact as f32, unit));
                // Both factors are below 9, and the slope of the first is below 1.2.
                Output { stated, exact, size: 10.0 * (gate.size + up.size) }
            };
            let want: Vec<Output> = (0..rows * inner).into_par_iter().map(want).collect();
            // The exponential of a GPU is not that of this processor.
            let case_of = format!("gate and up, {case}");
            compare(&mut test, Some(block), (SUMS, float), (&have, &want), inner, unknown, &case_of);

            let hidden_in = Activated::new(gpu, product, h, rows, inner)?;
            let y = gpu.room(rows * hidden * float.size())?;
            let mixture = Mixture { gather: false, swiglu: None };
            let experts = Some((grouped, mixture));
            product.launch(gpu, &down.there, &hidden_in.inputs(rows), (&y, float), block, experts)?;
            let have = read(gpu, &y, float)?;
            let (layers, inputs) = (&down.here, &hidden_in.here);
            let want = |i: usize| {
                let row = i / hidden;
                let layer = layers.layer(chosen[entries[row]] as usize);
                layer.output(i % hidden, inputs.token(row, inner))
            };
            let want: Vec<Output> = (0..rows * hidden).into_par_iter().map(want).collect();
            let of_columns = |i: usize| {
                let row = i / hidden;
                layers.layer(chosen[entries[row]] as usize).shares(i % hidden, inputs.token(row, inner))
            };
            let case_of = format!("down, {case}");
            compare(&mut test, Some(block), (sums(product), float), (&have, &want), hidden, of_columns, &case_of);

            let out = gpu.room(tokens * hidden * float.size())?;
            combine_experts(gpu, grouped, &y, &shares_there, &out, (hidden, float))?;
            let sum = |i: usize| {
                let (token, column) = (i / hidden, i % hidden);
                let parts = (token * top_k..(token + 1) * top_k)
                    .map(|entry| (shares[entry], have[places[entry] as usize * hidden + column]));
                parts.fold(0f32, |sum, (share, y)| share.mul_add(y, sum))
            };
            let (have, mut same) = (read(gpu, &out, float)?, true);
            if !block.is_wgmma() {
                test.digest(&have);
            }
            for (i, &h) in have.iter().enumerate() {
                same &= h.to_bits() == float.round(sum(i)).to_bits();
            }
            test.cases += 1;
            if !same {
                test.failure.get_or_insert(format!("{case}: what experts gave is not added as it should be"));
            }
        }
    }
    Ok(test)
}
