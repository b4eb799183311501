//! Kernels whose every bit is known: the number formats of this crate are the reference.

use super::super::Gpu;
use super::super::elementwise::{
    Rounded, dequantize_mxfp4, fake_quantize, mask_2_4, normalize_activations, quantize_activations,
};
use super::{KernelTest, numbers, read, stored};
use crate::algorithms::wanda;
use crate::error::Result;
use crate::formats::float::Float;
use crate::formats::int::IntFormat;
use crate::formats::minifloat::Minifloat;
use crate::formats::ternary::{self, Trits};
use crate::formats::{FP8, NumberFormat, Params, mxfp4, nvfp4};
use crate::ops::random::Draw;
use crate::recipe::Mask;

fn floats(codes: &[i8]) -> Vec<f32> {
    codes.iter().map(|&c| f32::from(c)).collect()
}

/// Inputs of W4A8 and W8A8.
const INT8: IntFormat = IntFormat { num_bits: 8, symmetric: true };

/// The rules of the formats are the reference.
pub fn quantize(gpu: &Gpu) -> Result<KernelTest> {
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

/// Plain loops in the kernel's order are the reference.
pub fn normalize(gpu: &Gpu) -> Result<KernelTest> {
    let (mut test, mut draw) = (KernelTest::new("normalize_activations", true), Draw::new(9));
    let int8 = NumberFormat::Int(INT8);
    let epsilon = 1e-5;
    for float in [Float::Bf16, Float::F16, Float::F32] {
        for (m, k) in [(1, 32), (3, 2880), (2, 12_288)] {
            let mut x = numbers(&mut draw, m * k, float);
            x[(m - 1) * k..].iter_mut().step_by(3).for_each(|x| *x = 0.0);
            let weights = numbers(&mut draw, k, Float::Bf16);
            let (input, weight) = (gpu.upload(&stored(&x, float))?, gpu.upload(&stored(&weights, Float::Bf16))?);
            let (output, codes, scales) = (gpu.room(m * k * float.size())?, gpu.room(m * k)?, gpu.room(4 * m)?);
            let norm = (&weight, Float::Bf16, epsilon);
            normalize_activations(gpu, (&input, float), norm, (&output, &codes, &scales), (m, k), false)?;
            let (have, have_codes) = (read(gpu, &output, float)?, gpu.download::<i8>(&codes)?);
            let have_scales: Vec<f32> = gpu.download(&scales)?;
            for (t, row) in x.chunks(k).enumerate() {
                let case = format!("token {t} of [{m}, {k}] in {float:?}");
                let inverse = 1.0 / (sum_of_squares(row) / k as f32 + epsilon).sqrt();
                let want: Vec<f32> = row.iter().zip(&weights).map(|(x, w)| float.round(w * (x * inverse))).collect();
                test.see_all(&have[t * k..][..k], &want, &case);
                let (low, high) = want.iter().fold((0f32, 0f32), |(l, h), &x| (l.min(x), h.max(x)));
                let p = int8.fit(low, high, Float::F32, 1.0);
                let wanted: Vec<i8> = want.iter().map(|&x| int8.quantize(x, p, Float::F32)).collect();
                test.see_all(&[have_scales[t]], &[p.scale], &case);
                test.see_all(&floats(&have_codes[t * k..][..k]), &floats(&wanted), &case);
            }
        }
    }
    Ok(test)
}

/// In the order that kernels/activations.cuh states.
fn sum_of_squares(row: &[f32]) -> f32 {
    const THREADS: usize = 512;
    let of_thread = |t: usize| {
        let eights = row.chunks(8).skip(t).step_by(THREADS).flatten();
        eights.fold(0f32, |sum, x| x.mul_add(*x, sum))
    };
    let mut sums: Vec<f32> = (0..THREADS).map(of_thread).collect();
    for distance in [16, 8, 4, 2, 1] {
        sums = (0..THREADS).map(|t| sums[t] + sums[t ^ distance]).collect();
    }
    sums.into_iter().step_by(32).reduce(|a, b| a + b).unwrap_or(0.0)
}

/// [`mxfp4`] is the reference.
pub fn dequantize(gpu: &Gpu) -> Result<KernelTest> {
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
pub fn fake(gpu: &Gpu) -> Result<KernelTest> {
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
pub fn mask(gpu: &Gpu) -> Result<KernelTest> {
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
