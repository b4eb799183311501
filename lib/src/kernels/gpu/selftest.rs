//! Every kernel on the GPU beside what this processor computes.

use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::hopper::{self, Hopper};
use super::operations::{
    Codes, Cut, Inputs, Mixture, PRODUCTS, Product, Rounded, Routes, Scratch, TILES, Weight, combine_experts,
    dequantize_mxfp4, fake_quantize, mask_2_4, quantize_activations,
};
use super::reference::{Layer, Output, Token, swiglu};
use super::{Buffer, Gpu};
use crate::algorithms::wanda;
use crate::error::Result;
use crate::formats::float::Float;
use crate::formats::int::IntFormat;
use crate::formats::minifloat::Minifloat::{self, E4M3};
use crate::formats::ternary::{self, Trits};
use crate::formats::{FP8, NumberFormat, Params, mxfp4, nvfp4};
use crate::ops::random::Draw;
use crate::pipeline::progress::Progress;
use crate::recipe::Mask;

/// What became of a kernel.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct KernelTest {
    /// Its name; of a product over experts with `_experts` behind it.
    pub kernel: String,
    /// Launches that were looked at.
    pub cases: usize,
    /// Numbers that were compared.
    pub numbers: usize,
    /// Of these, how many have the same bits as the reference.
    pub same: usize,
    /// True where all of them have to.
    pub exact: bool,
    /// The greatest distance from the result in f64, in parts of what rounding the sums and the output may do: at most 1. 0 where the bits are
    /// compared.
    pub error: f64,
    /// The first case that is wrong.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub failure: Option<String>,
}

impl KernelTest {
    fn new(kernel: impl Into<String>, exact: bool) -> Self {
        Self { kernel: kernel.into(), cases: 0, numbers: 0, same: 0, exact, error: 0.0, failure: None }
    }

    /// A number of the kernel beside the reference; `error` is their distance in parts of what is allowed.
    fn see(&mut self, have: f32, want: f32, error: f64, place: impl FnOnce() -> String) {
        self.numbers += 1;
        let same = have.to_bits() == want.to_bits() || have.is_nan() && want.is_nan();
        self.same += usize::from(same);
        let error = if self.exact { 0.0 } else { error };
        self.error = self.error.max(if error.is_nan() { f64::INFINITY } else { error });
        let right = if self.exact { same } else { error <= 1.0 };
        if !right && self.failure.is_none() {
            self.failure = Some(format!("{}: {have:e}, wanted {want:e}", place()));
        }
    }

    /// Numbers that have to have the same bits.
    fn see_all(&mut self, have: &[f32], want: &[f32], case: &str) {
        self.cases += 1;
        assert_eq!(have.len(), want.len(), "as many numbers");
        for (i, (&h, &w)) in have.iter().zip(want).enumerate() {
            self.see(h, w, f64::INFINITY, || format!("{case}, number {i}"));
        }
    }
}

/// Which shapes are tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// Small ones: seconds on a GPU.
    Small,
    /// Those of gpt-oss too.
    Models,
}

/// Sums of four, so that most are small.
fn numbers(draw: &mut Draw, n: usize, float: Float) -> Vec<f32> {
    (0..n).map(|_| float.round(draw.unit() + draw.unit() + draw.unit() + draw.unit())).collect()
}

fn stored(values: &[f32], float: Float) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(values.len() * float.size());
    values.iter().for_each(|&v| float.write(v, &mut bytes));
    bytes
}

fn read(gpu: &Gpu, buffer: &Buffer, float: Float) -> Result<Vec<f32>> {
    let bytes: Vec<u8> = gpu.download(buffer)?;
    let mut values = vec![0f32; bytes.len() / float.size()];
    float.read(&bytes, &mut values);
    Ok(values)
}

fn floats(codes: &[i8]) -> Vec<f32> {
    codes.iter().map(|&c| f32::from(c)).collect()
}

/// Inputs of W4A8 and W8A8.
const INT8: IntFormat = IntFormat { num_bits: 8, symmetric: true };

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

/// Tests every kernel of the installed build whose name contains one of `only`; all of them where that is empty. What the driver refuses is a
/// failure of the kernel.
pub fn run(gpu: &Gpu, extent: Extent, only: &[String], progress: &Progress) -> Vec<KernelTest> {
    let mut tests = Vec::new();
    let mut add = |name: &str, test: &dyn Fn() -> Result<KernelTest>| {
        if only.is_empty() || only.iter().any(|o| name.contains(&o[..])) {
            // One that fails to launch is no reason not to look at the others.
            let test =
                test().unwrap_or_else(|e| KernelTest { failure: Some(e.to_string()), ..KernelTest::new(name, true) });
            let outcome = test.failure.as_deref().unwrap_or("right");
            progress.note(&format!("{}: {} launches, {outcome}", test.kernel, test.cases));
            tests.push(test);
        }
    };
    add("quantize_activations", &|| quantize(gpu));
    add("dequantize_mxfp4", &|| dequantize(gpu));
    add("fake_quantize", &|| fake(gpu));
    add("mask_2_4", &|| mask(gpu));
    for product in PRODUCTS {
        add(product.name, &|| single(gpu, product, extent));
        add(&format!("{}_experts", product.name), &|| experts(gpu, product, extent));
    }
    add("chain", &|| chain(gpu, extent));
    if gpu.has_hopper() {
        for fp8 in [false, true] {
            add(hopper::name(fp8), &|| hopper(gpu, fp8, extent));
        }
    }
    tests
}

/// The rules of the formats are the reference.
fn quantize(gpu: &Gpu) -> Result<KernelTest> {
    let (mut test, mut draw) = (KernelTest::new("quantize_activations", true), Draw::new(1));
    for float in [Float::Bf16, Float::F16, Float::F32] {
        for (m, k) in [(1, 32), (3, 2880), (17, 4096)] {
            let mut x = numbers(&mut draw, m * k, float);
            // A token of zeros.
            x[(m - 1) * k..].fill(0.0);
            let (input, codes, scales) = (gpu.upload(&stored(&x, float))?, gpu.room(m * k)?, gpu.room(4 * m)?);
            for format in [NumberFormat::Int(INT8), FP8] {
                quantize_activations(gpu, (&input, float), &codes, &scales, (m, k), format == FP8)?;
                let (have, scales): (Vec<i8>, Vec<f32>) = (gpu.download(&codes)?, gpu.download(&scales)?);
                for (t, row) in x.chunks(k).enumerate() {
                    let (low, high) = row.iter().fold((0f32, 0f32), |(l, h), &x| (l.min(x), h.max(x)));
                    let p = format.fit(low, high, Float::F32, 1.0);
                    let wanted: Vec<i8> = row.iter().map(|&x| format.quantize(x, p, Float::F32)).collect();
                    let case = format!("token {t} of [{m}, {k}] in {float:?} to {}", format.name());
                    test.see_all(&[scales[t]], &[p.scale], &case);
                    test.see_all(&floats(&have[t * k..][..k]), &floats(&wanted), &case);
                }
            }
        }
    }
    Ok(test)
}

/// [`mxfp4`] is the reference.
fn dequantize(gpu: &Gpu) -> Result<KernelTest> {
    let (mut test, mut draw) = (KernelTest::new("dequantize_mxfp4", true), Draw::new(2));
    for float in [Float::Bf16, Float::F16, Float::F32] {
        for (n, k) in [(1, 32), (65, 96), (130, 288)] {
            let codes = draw.bytes(n * k / 2);
            // Exponents that every one of the types has.
            let scales: Vec<u8> = draw.bytes(n * k / 32).iter().map(|b| 115 + b % 24).collect();
            let mut rows = vec![0f32; n * k];
            mxfp4::decode_row(&codes, &scales, &mut rows);
            rows.iter_mut().for_each(|x| *x = float.round(*x));
            let (c, s) = (gpu.upload(&codes)?, gpu.upload(&scales)?);
            for turned in [false, true] {
                let out = gpu.room(n * k * float.size())?;
                dequantize_mxfp4(gpu, (&c, &s), (&out, float), (n, k), turned)?;
                let want: Vec<f32> = match turned {
                    false => rows.clone(),
                    true => (0..n * k).map(|i| rows[i % n * k + i / n]).collect(),
                };
                test.see_all(&read(gpu, &out, float)?, &want, &format!("[{n}, {k}] to {float:?}, turned: {turned}"));
            }
        }
    }
    Ok(test)
}

/// The formats that [`fake_quantize`] knows.
fn formats() -> Vec<NumberFormat> {
    let ints = (2..=8).flat_map(|num_bits| [true, false].map(|symmetric| IntFormat { num_bits, symmetric }));
    let mut all: Vec<NumberFormat> = ints.map(NumberFormat::Int).collect();
    all.extend(Minifloat::ALL.map(NumberFormat::Float));
    all.extend(Minifloat::ALL.map(NumberFormat::Mx));
    all.extend([NumberFormat::Nvfp4, NumberFormat::Ternary(Trits::Quarters)]);
    all
}

/// [`NumberFormat`] is the reference.
fn fake(gpu: &Gpu) -> Result<KernelTest> {
    let (mut test, mut draw) = (KernelTest::new("fake_quantize", true), Draw::new(3));
    for format in formats() {
        for float in [Float::Bf16, Float::F16, Float::F32] {
            let group = match format {
                NumberFormat::Nvfp4 => 16,
                NumberFormat::Mx(_) => 32,
                _ => [32, 64, 96, 7][draw.below(4)],
            };
            let (rows, k) = (5, 3 * group);
            let mut w = numbers(&mut draw, rows * k, float);
            // A group of zeros, and one on one side of it.
            w[..group].fill(0.0);
            w[group..2 * group].iter_mut().for_each(|x| *x = x.abs());
            let (low, high) = w.iter().fold((0f32, 0f32), |(l, h), &x| (l.min(x), h.max(x)));
            let global = if format == NumberFormat::Nvfp4 { nvfp4::global(low, high, float) } else { 1.0 };
            let fit = |w: &[f32]| match format {
                NumberFormat::Ternary(_) => {
                    Params { scale: ternary::absmean(std::iter::once(w), float), zero_point: 0.0 }
                }
                _ => {
                    let extremes = w.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), &x| (l.min(x), h.max(x)));
                    format.fit(extremes.0, extremes.1, float, global)
                }
            };
            let params: Vec<Params> = w.chunks(group).map(fit).collect();
            let (mut codes, mut values) = (Vec::new(), Vec::new());
            for (w, &p) in w.chunks(group).zip(&params) {
                codes.extend(w.iter().map(|&w| format.quantize(w, p, float)));
                values.extend(w.iter().map(|&w| format.dequantize(format.quantize(w, p, float), p, float)));
            }
            let input = gpu.upload(&stored(&w, float))?;
            let (scales, zeros) = (gpu.room(4 * params.len())?, gpu.room(4 * params.len())?);
            for given in [false, true] {
                let (v, c) = (gpu.room(w.len() * float.size())?, gpu.room(w.len())?);
                let out = Rounded { values: &v, codes: &c, scales: &scales, zero_points: &zeros };
                fake_quantize(gpu, format, (&input, float), &out, (rows, k, group), global, given)?;
                let case = format!("{} in groups of {group}, {float:?}, given: {given}", format.name());
                let have: Vec<i8> = gpu.download(&c)?;
                test.see_all(
                    &gpu.download::<f32>(&scales)?,
                    &params.iter().map(|p| p.scale).collect::<Vec<_>>(),
                    &case,
                );
                let zero_points: Vec<f32> = params.iter().map(|p| p.zero_point).collect();
                test.see_all(&gpu.download::<f32>(&zeros)?, &zero_points, &case);
                test.see_all(&floats(&have), &floats(&codes), &format!("codes of {case}"));
                test.see_all(&read(gpu, &v, float)?, &values, &format!("values of {case}"));
            }
        }
    }
    Ok(test)
}

/// [`wanda::zeros`] is the reference.
fn mask(gpu: &Gpu) -> Result<KernelTest> {
    let (mut test, mut draw) = (KernelTest::new("mask_2_4", true), Draw::new(4));
    let rule = Mask::Structured { zeros: 2, of: 4 };
    for float in [Float::Bf16, Float::F16, Float::F32] {
        for (rows, k) in [(1, 4), (33, 96), (7, 2880)] {
            let mut w = numbers(&mut draw, rows * k, float);
            // Many of one size.
            w.iter_mut().step_by(3).for_each(|x| *x = 0.5f32.copysign(*x));
            let squares: Vec<f32> = (0..k).map(|_| draw.unit().abs()).collect();
            for with in [None, Some(&squares[..])] {
                let (input, output, zeros) =
                    (gpu.upload(&stored(&w, float))?, gpu.room(w.len() * float.size())?, gpu.room(w.len())?);
                let sums = with.map(|s| gpu.upload(s)).transpose()?;
                mask_2_4(gpu, (&input, float), sums.as_ref(), (&output, &zeros), (rows, k))?;
                let wanted = wanda::zeros(&w, k, with, rule, 0.5);
                let kept: Vec<f32> = w.iter().zip(&wanted).map(|(&w, &z)| if z { 0.0 } else { w }).collect();
                let case = format!("[{rows}, {k}] {float:?}, with norms: {}", with.is_some());
                let places: Vec<f32> = gpu.download::<u8>(&zeros)?.iter().map(|&z| f32::from(z)).collect();
                test.see_all(&places, &wanted.iter().map(|&z| f32::from(u8::from(z))).collect::<Vec<_>>(), &case);
                test.see_all(&read(gpu, &output, float)?, &kept, &case);
            }
        }
    }
    Ok(test)
}

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

/// Outputs beside the reference; `sums` is what sums may differ by, 0 where every bit of the rounded output is known.
fn compare(test: &mut KernelTest, sums: f64, float: Float, have: &[f32], want: &[Output], case: &str) {
    test.cases += 1;
    for (i, (&h, w)) in have.iter().zip(want).enumerate() {
        let stated = float.round(w.stated);
        let error = (f64::from(h) - w.exact).abs() / allowed(w, float, sums.max(SUMS));
        test.see(h, stated, error, || format!("{case}, output {i}"));
        if sums == 0.0 && h.to_bits() != stated.to_bits() && test.failure.is_none() {
            test.failure = Some(format!("{case}, output {i}: {h:e}, wanted the bits of {stated:e}"));
        }
    }
}

/// What [`compare`] allows the sums of a product.
fn sums(product: Product) -> f64 {
    if product.int8 { 0.0 } else { SUMS }
}

/// A single layer, for every number of tokens a block and several splits.
fn single(gpu: &Gpu, product: Product, extent: Extent) -> Result<KernelTest> {
    let float = Float::Bf16;
    let (mut test, mut draw) = (KernelTest::new(product.name, false), Draw::new(5));
    let mut shapes = vec![(1, 1, 32), (3, 65, 160), (17, 100, 576), (65, 70, 1152)];
    if extent == Extent::Models {
        shapes.extend([(1, 4096, 4096), (16, 5760, 2880), (5, 512, 2880), (33, 2880, 4096), (131, 2880, 2880)]);
    }
    for (m, n, k) in shapes {
        for group in [32, 64, 96, k] {
            let fits = k % group == 0 && (product.codes != Codes::E2m1 || group == 32);
            if !fits || (n > 1000 && group != 64 && product.codes != Codes::E2m1) {
                continue;
            }
            let scale_type = [Float::Bf16, Float::F16, Float::F32][draw.below(3)];
            let w = Drawn::new(gpu, &mut draw, product, 1, (n, k, group), (scale_type, float))?;
            let input = gpu.upload(&stored(&numbers(&mut draw, m * k, float), float))?;
            let x = Activated::new(gpu, product, input, m, k)?;
            let largest = (k / group).min(3);
            for splits in [1, largest] {
                let (layer, tokens) = (w.here.layer(0), &x.here);
                let want = |i| layer.output(i % n, tokens.token(i / n, k), splits);
                let want: Vec<Output> = (0..m * n).into_par_iter().map(want).collect();
                for tokens in TILES {
                    let cut = Cut { tokens, splits };
                    if product.shared_bytes(cut, k, group, scale_type) > gpu.shared_bytes {
                        continue;
                    }
                    let out = gpu.room(m * n * float.size())?;
                    let scratch = Scratch::new(gpu, cut, m, m.div_ceil(tokens), n)?;
                    // Twice: tickets come back.
                    for _ in 0..2 {
                        product.launch(gpu, &w.there, &x.inputs(m), (&out, float), &scratch, None)?;
                    }
                    let case = format!("M {m} N {n} K {k}, groups of {group}, tiles of {tokens}, {splits} splits");
                    compare(&mut test, sums(product), float, &read(gpu, &out, float)?, &want, &case);
                }
            }
        }
    }
    Ok(test)
}

/// A whole layer's launches one behind the other in a graph, again and again with two inputs in turn, beside the same launches each waited
/// for: where a kernel does not wait for what it reads, or another writes too early, the bits differ.
fn chain(gpu: &Gpu, extent: Extent) -> Result<KernelTest> {
    let (float, product) = (Float::Bf16, PRODUCTS[1]);
    let (mut test, mut draw) = (KernelTest::new("chain", true), Draw::new(8));
    let (tokens, width, count, top_k, turns) = match extent {
        Extent::Small => (3, 64, 6, 2, 2),
        Extent::Models => (4, 2880, 32, 4, 50),
    };
    let types = (Float::Bf16, float);
    let gate_up = Drawn::new(gpu, &mut draw, product, count, (2 * width, width, 32), types)?;
    let down = Drawn::new(gpu, &mut draw, product, count, (width, width, 32), types)?;
    let cut = Cut { tokens: TILES[0], splits: 2 };
    let (rows, bytes) = (tokens * top_k, tokens * width * float.size());
    let mut sides = Vec::new();
    for _ in 0..2 {
        let chosen = routes(&mut draw, tokens, count, top_k);
        let x = gpu.upload(&stored(&numbers(&mut draw, tokens * width, float), float))?;
        sides.push((x, gpu.upload(&chosen)?, gpu.room(bytes)?));
    }
    let shares = gpu.upload(&(0..rows).map(|_| draw.unit().abs()).collect::<Vec<f32>>())?;
    let (x, chosen, out) = (gpu.room(bytes)?, gpu.room(4 * rows)?, gpu.room(bytes)?);
    let (codes, scales) = (gpu.room(tokens * width)?, gpu.room(4 * tokens)?);
    let (h, h_codes, h_scales) = (gpu.room(2 * rows * width)?, gpu.room(rows * width)?, gpu.room(4 * rows)?);
    let y = gpu.room(2 * rows * width)?;
    let routed = Routes::new(gpu, (tokens, top_k), count, cut.tokens)?;
    let scratch = Scratch::new(gpu, cut, rows, routed.tile_count, 2 * width)?;
    // `wait` is called between any two launches.
    let layer = |side: &(Buffer, Buffer, Buffer), wait: &dyn Fn() -> Result<()>| -> Result<()> {
        gpu.copy(&side.0, &x)?;
        gpu.copy(&side.1, &chosen)?;
        wait()?;
        routed.group(gpu, &chosen)?;
        wait()?;
        quantize_activations(gpu, (&x, float), &codes, &scales, (tokens, width), false)?;
        wait()?;
        let inputs = Inputs { values: &codes, scales: Some(&scales), rows: tokens };
        let mixture = Mixture { gather: true, swiglu: Some((1.702, 7.0)) };
        product.launch(gpu, &gate_up.there, &inputs, (&h, float), &scratch, Some((&routed, mixture)))?;
        wait()?;
        quantize_activations(gpu, (&h, float), &h_codes, &h_scales, (rows, width), false)?;
        wait()?;
        let inputs = Inputs { values: &h_codes, scales: Some(&h_scales), rows };
        let mixture = Mixture { gather: false, swiglu: None };
        product.launch(gpu, &down.there, &inputs, (&y, float), &scratch, Some((&routed, mixture)))?;
        wait()?;
        combine_experts(gpu, &routed, &y, &shares, &out, (width, float))?;
        wait()?;
        gpu.copy(&out, &side.2)
    };
    let mut want = Vec::new();
    for side in &sides {
        layer(side, &|| gpu.synchronize())?;
        want.push(read(gpu, &side.2, float)?);
    }
    let graph =
        gpu.capture(|| (0..turns).try_for_each(|_| sides.iter().try_for_each(|side| layer(side, &|| Ok(())))))?;
    for turn in 0..turns {
        gpu.times(&graph, 1)?;
        for (side, want) in sides.iter().zip(&want) {
            test.see_all(&read(gpu, &side.2, float)?, want, &format!("turn {turn}"));
        }
    }
    Ok(test)
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
fn hopper(gpu: &Gpu, fp8: bool, extent: Extent) -> Result<KernelTest> {
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
            compare(&mut test, sums, float, &read(gpu, &out, float)?, &want, &case);
        }
    }
    Ok(test)
}

/// A mixture of experts, gate and up with SwiGLU, then down, then combined. One expert has no tokens.
fn experts(gpu: &Gpu, product: Product, extent: Extent) -> Result<KernelTest> {
    let float = Float::Bf16;
    let name = format!("{}_experts", product.name);
    let (mut test, mut draw) = (KernelTest::new(name, false), Draw::new(6));
    let unit = (1.702f32, 7.0f32);
    // Tokens, hidden, inner, experts, of each token.
    let mut shapes = vec![(1, 64, 96, 6, 2), (5, 96, 64, 6, 2), (33, 128, 64, 5, 3)];
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
        for (tile, splits) in TILES.into_iter().zip([1, 2, 1, 2]) {
            let splits = splits.min(hidden / group).min(inner / group);
            let cut = Cut { tokens: tile, splits };
            let most = product.shared_bytes(cut, hidden.max(inner), group, Float::Bf16);
            if most > gpu.shared_bytes {
                continue;
            }
            let case =
                format!("{tokens} tokens of {hidden}, {count} experts of {inner}, tiles of {tile}, {splits} splits");
            let routes = Routes::new(gpu, (tokens, top_k), count, tile)?;
            routes.group(gpu, &chosen_there)?;
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
            let scratch = Scratch::new(gpu, cut, rows, routes.tile_count, hidden.max(2 * inner))?;
            let mixture = Mixture { gather: true, swiglu: Some(unit) };
            let experts = Some((&routes, mixture));
            product.launch(gpu, &gate_up.there, &x.inputs(tokens), (&h, float), &scratch, experts)?;
            let have = read(gpu, &h, float)?;
            let (layers, inputs) = (&gate_up.here, &x.here);
            let want = |i: usize| {
                let (entry, j) = (entries[i / inner], i % inner);
                let (layer, token) = (layers.layer(chosen[entry] as usize), inputs.token(entry / top_k, hidden));
                let (gate, up) = (layer.output(2 * j, token, splits), layer.output(2 * j + 1, token, splits));
                let stated = swiglu(gate.stated, up.stated, unit);
                let exact = f64::from(swiglu(gate.exact as f32, up.exact as f32, unit));
                // Both factors are below 9, and the slope of the first is below 1.2.
                Output { stated, exact, size: 10.0 * (gate.size + up.size) }
            };
            let want: Vec<Output> = (0..rows * inner).into_par_iter().map(want).collect();
            // The exponential of a GPU is not that of this processor.
            compare(&mut test, SUMS, float, &have, &want, &format!("gate and up, {case}"));

            let hidden_in = Activated::new(gpu, product, h, rows, inner)?;
            let y = gpu.room(rows * hidden * float.size())?;
            let mixture = Mixture { gather: false, swiglu: None };
            let experts = Some((&routes, mixture));
            product.launch(gpu, &down.there, &hidden_in.inputs(rows), (&y, float), &scratch, experts)?;
            let have = read(gpu, &y, float)?;
            let (layers, inputs) = (&down.here, &hidden_in.here);
            let want = |i: usize| {
                let row = i / hidden;
                let layer = layers.layer(chosen[entries[row]] as usize);
                layer.output(i % hidden, inputs.token(row, inner), splits)
            };
            let want: Vec<Output> = (0..rows * hidden).into_par_iter().map(want).collect();
            compare(&mut test, sums(product), float, &have, &want, &format!("down, {case}"));

            let out = gpu.room(tokens * hidden * float.size())?;
            combine_experts(gpu, &routes, &y, &shares_there, &out, (hidden, float))?;
            let sum = |i: usize| {
                let (token, column) = (i / hidden, i % hidden);
                let parts = (token * top_k..(token + 1) * top_k)
                    .map(|entry| (shares[entry], have[places[entry] as usize * hidden + column]));
                parts.fold(0f32, |sum, (share, y)| share.mul_add(y, sum))
            };
            let (have, mut same) = (read(gpu, &out, float)?, true);
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
